"""What a linear or embedding does in its model, told from its transformers name.

The mixes' rules go by these roles, as llama.cpp's go by its tensor names (`llama-quant.cpp`, `tensor_get_category`).
"""

from __future__ import annotations

import functools
import re
from enum import Enum


class Role(Enum):
    """Roles that a mix tells apart; the value is the stem of llama.cpp's tensor name."""

    EMBEDDING = "token_embd"
    HEAD = "output"
    Q = "attn_q"
    K = "attn_k"
    V = "attn_v"
    QKV = "attn_qkv"
    KV_B = "attn_kv_b"
    ATTENTION_OUT = "attn_output"
    GATE = "ffn_gate"
    UP = "ffn_up"
    DOWN = "ffn_down"
    OTHER = "other"


# Last parts of a module's name, by role. A parameter of stacked experts (`experts.down_proj`) has the same last part.
NAMES: dict[Role, tuple[str, ...]] = {
    Role.EMBEDDING: ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings"),
    Role.HEAD: ("lm_head", "embed_out", "output_head"),
    Role.Q: ("q_proj", "query", "wq"),
    Role.K: ("k_proj", "key", "wk"),
    Role.V: ("v_proj", "value", "wv"),
    Role.QKV: ("qkv_proj", "c_attn", "query_key_value", "Wqkv", "qkv", "W_pack", "in_proj_qkv"),
    Role.KV_B: ("kv_b_proj",),
    Role.ATTENTION_OUT: ("o_proj", "out_proj", "wo"),
    Role.GATE: ("gate_proj", "w1"),
    Role.UP: ("up_proj", "gate_up_proj", "fc1", "c_fc", "dense_h_to_4h", "w3", "fc_in", "input_linear"),
    Role.DOWN: ("down_proj", "fc2", "dense_4h_to_h", "w2", "fc_out", "output_linear"),
}
# Names that mean different things in different places: (pattern of the whole name, role), looked at first.
PLACES: tuple[tuple[str, Role], ...] = (
    (r"attn\.c_proj$|attention\.dense$|attn\.dense$|self_attention\.dense$", Role.ATTENTION_OUT),
    (r"mlp\.c_proj$|ffn\.down$", Role.DOWN),
    (r"conv\.(in|out)_proj$|linear_attn\.|mamba\.|mixer\.|router", Role.OTHER),
)
_BY_NAME = {name: role for role, names in NAMES.items() for name in names}
_PLACES = tuple((re.compile(pattern), role) for pattern, role in PLACES)
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")
# Never quantized (`tensor_allows_quantization`): norms, routers, short convolutions, positions, state-space terms.
# A model's own name says nothing of its parts (`roberta_prelayernorm.encoder…`).
_KEPT = re.compile(
    r"norm[^.]*$|\..*norm|ln_|(^|\.)gate$|router|shared_expert_gate|conv1d|conv\.conv|wpe|embed_positions|position_emb"
    r"|altup|laurel|per_layer_model_projection|relative_attention_bias|patch_emb|A_log|dt_bias|(^|\.)D$"
)


def _module(name: str) -> str:
    """`name` less a final `.weight`."""
    return name.removesuffix(".weight")


@functools.lru_cache(4096)  # a plan asks for the same names over and over
def role(name: str) -> Role:
    """Role of the module or parameter called `name`, e.g. `model.layers.3.mlp.down_proj(.weight)`."""
    name = _module(name)
    for pattern, found in _PLACES:
        if pattern.search(name):
            return found
    return _BY_NAME.get(name.rpartition(".")[2], Role.OTHER)


def layer_of(name: str) -> int | None:
    """Number of the layer that `name` is in; `None` for embeddings and heads."""
    found = _LAYER.search(name)
    return None if found is None else int(found[1])


@functools.lru_cache(4096)
def kept(name: str) -> bool:
    """Whether `name` is never quantized, whatever its shape: a norm, a bias, a router, a short convolution."""
    return name.endswith(".bias") or _KEPT.search(_module(name)) is not None
