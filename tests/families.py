"""Tiny random models, one per model family, for every test that must hold "for each family".

A family is a factory from a config: nothing is downloaded, nothing is trained. Weights are drawn from a fixed
seed and scaled up, because a freshly initialised model gives almost flat logits and almost uniform attention:
greedy choices would be ties and a dropped key would not show. `eos_token_id` is None, so generation always
runs to its length.

Does not know any cache: see `tests/modes.py` for the ways to generate and `tests/test_families.py` for what
is checked of the models themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

VOCAB = 128
SLIDING = 10
MAX_POSITIONS = 512
"""Large enough that no test outgrows it: tests of positions past the trained length build their own model."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row of the family matrix.

    Attributes:
        name: key in `FAMILIES`, also the xdist group of the family's tests.
        make: builds the model from changes to its config; the caller has seeded torch.
        attn: attention implementation of the dense route; eager where sdpa cannot do the family.
        fused: whether `patch_model` is expected to give the fused route.
        variant: a twist on another family (a rotary kind, an odd shape); it runs in fewer modes.
        builds_dense: why the fused route builds dense K/V for this family; None where it reads pages.
        slides: some layer attends over the last `SLIDING` tokens only.
        encoder_decoder: prompts go to the encoder; the decoder starts from one token.
        positions: "rope", "learned", "alibi" or "relative".
    """

    name: str
    make: Callable[..., nn.Module]
    attn: str = "sdpa"
    fused: bool = True
    variant: bool = False
    builds_dense: str | None = None
    slides: bool = False
    encoder_decoder: bool = False
    positions: str = "rope"


def _base(**changes: Any) -> dict[str, Any]:
    """Config of a two-layer decoder with grouped-query attention; `name=None` drops an entry."""
    config: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_POSITIONS,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        "tie_word_embeddings": False,
    }
    dropped = {name for name, value in changes.items() if value is None}
    config.update({name: value for name, value in changes.items() if value is not None})
    return {name: value for name, value in config.items() if name not in dropped}


def _causal(prefix: str, config: str | None = None, **changes: Any) -> Callable[..., nn.Module]:
    """Factory of `{prefix}ForCausalLM` from its config (or the one named) with changes; a caller may add more."""

    def make(**more: Any) -> nn.Module:
        model_class = getattr(transformers, f"{prefix}ForCausalLM")
        config_class = getattr(transformers, config or f"{prefix}Config")
        model: nn.Module = model_class(config_class(**_base(**{**changes, **more})))
        return model

    return make


def _llama_rope(rope_type: str, **parameters: Any) -> Callable[..., nn.Module]:
    """Llama whose rotary module is one of the scaled kinds."""
    return _causal("Llama", rope_parameters={"rope_theta": 10000.0, "rope_type": rope_type, **parameters})


def _longrope() -> dict[str, Any]:
    """Rope parameters of Phi-3 longrope: one factor per rotary frequency (head_dim 16 has 8)."""
    return {
        "rope_theta": 10000.0,
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.05 * i for i in range(8)],
        "long_factor": [4.0] * 8,
        "factor": 8.0,
        "original_max_position_embeddings": MAX_POSITIONS,
        "partial_rotary_factor": 1.0,
    }


def _gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=MAX_POSITIONS,
            pad_token_id=0, bos_token_id=1, eos_token_id=None, tie_word_embeddings=False,
        )
    )  # fmt: skip


def _opt() -> nn.Module:
    config = _base(num_key_value_heads=None, intermediate_size=None)
    return transformers.OPTForCausalLM(transformers.OPTConfig(**config, ffn_dim=128, word_embed_proj_dim=64))


def _falcon(**more: Any) -> nn.Module:
    config = _base(num_key_value_heads=None, intermediate_size=None, **more)
    return transformers.FalconForCausalLM(transformers.FalconConfig(**config, new_decoder_architecture=False))


def _bloom() -> nn.Module:
    return transformers.BloomForCausalLM(
        transformers.BloomConfig(
            vocab_size=VOCAB, hidden_size=64, n_layer=2, n_head=4,
            pad_token_id=0, bos_token_id=1, eos_token_id=None, tie_word_embeddings=False,
        )
    )  # fmt: skip


def _bart() -> nn.Module:
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=VOCAB, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
            max_position_embeddings=MAX_POSITIONS, pad_token_id=0, bos_token_id=1, eos_token_id=None,
            decoder_start_token_id=1, forced_eos_token_id=None, tie_word_embeddings=False,
        )
    )  # fmt: skip


def _t5() -> nn.Module:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=VOCAB, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4,
            pad_token_id=0, decoder_start_token_id=1, eos_token_id=None,
        )
    )  # fmt: skip


def _hybrid(prefix: str, config: str | None = None, **changes: Any) -> Callable[..., nn.Module]:
    """Three layers of which the middle one is full attention, the others slide."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return _causal(
        prefix, config, num_hidden_layers=3, head_dim=16, sliding_window=SLIDING, layer_types=kinds, **changes
    )


_DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
    "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
}  # fmt: skip

_ROWS = [
    Family(name="llama", make=_causal("Llama")),
    Family(name="qwen2", make=_causal("Qwen2")),
    Family(name="qwen3", make=_causal("Qwen3", head_dim=16)),
    Family(name="mistral", make=_causal("Mistral", sliding_window=SLIDING), slides=True),
    Family(name="gemma2", make=_hybrid("Gemma2", attn_logit_softcapping=5.0), attn="eager", slides=True),
    Family(name="gemma3", make=_hybrid("Gemma3", "Gemma3TextConfig"), slides=True),
    Family(name="phi", make=_causal("Phi")),
    Family(name="phi3", make=_causal("Phi3")),
    Family(name="gpt_neox", make=_causal("GPTNeoX", num_key_value_heads=None)),
    Family(name="gpt2", make=_gpt2, positions="learned"),
    Family(name="cohere", make=_causal("Cohere", logit_scale=1.0)),
    Family(name="olmo2", make=_causal("Olmo2")),
    Family(name="granite", make=_causal("Granite")),
    Family(name="opt", make=_opt, positions="learned"),
    Family(
        name="gpt_oss",  # all experts at work: which one of two a bf16 rounding picks is no business of the cache
        make=_hybrid("GptOss", num_local_experts=2, num_experts_per_tok=2),
        attn="eager",
        slides=True,
    ),
    Family(name="falcon", make=_falcon, fused=False),
    Family(name="bart", make=_bart, fused=False, encoder_decoder=True, positions="learned"),
    Family(name="t5", make=_t5, attn="eager", fused=False, encoder_decoder=True, positions="relative"),
    Family(
        name="llama3_rope",
        make=_llama_rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
        variant=True,
    ),
    Family(name="linear_rope", make=_llama_rope("linear", factor=4.0), variant=True),
    Family(
        name="yarn_rope",
        make=_llama_rope("yarn", factor=8.0, original_max_position_embeddings=64),
        variant=True,
    ),
    Family(name="dynamic_rope", make=_llama_rope("dynamic", factor=4.0), variant=True),
    Family(
        name="longrope",
        make=_causal("Phi3", rope_parameters=_longrope(), original_max_position_embeddings=MAX_POSITIONS),
        variant=True,
    ),
    Family(name="glm", make=_causal("Glm", head_dim=16), variant=True),
    Family(
        name="mimo_v2_flash",
        make=_hybrid("MiMoV2Flash", v_head_dim=12, mlp_layer_types=["dense"] * 3),
        attn="eager",
        slides=True,
        variant=True,
    ),
    Family(
        name="deepseek_v3",
        make=_causal("DeepseekV3", **_DEEPSEEK),
        variant=True,
        builds_dense="MLA: the cache holds latents, which the model itself projects to keys and values",
    ),
    Family(
        name="diffllama",
        make=_causal("DiffLlama"),
        variant=True,
        builds_dense="differential attention splits the cached values in two before attention",
    ),
    Family(
        name="doge",
        make=_causal("Doge"),
        variant=True,
        builds_dense="the mask depends on the cached values, which the model reads before attention",
    ),
    Family(
        name="falcon_alibi",
        make=functools.partial(_falcon, alibi=True),
        fused=False,
        positions="alibi",
        variant=True,
    ),
    Family(name="bloom", make=_bloom, attn="eager", fused=False, positions="alibi", variant=True),
]
SEEDS: dict[str, int] = {
    "llama": 2, "qwen3": 3, "gemma3": 1, "phi": 1, "phi3": 2, "cohere": 1, "opt": 3, "gpt_oss": 1,
    "llama3_rope": 1, "yarn_rope": 3, "dynamic_rope": 2, "deepseek_v3": 1,
}  # fmt: skip
"""Seeds other than 0, chosen so that greedy decoding meets no near-tie (tests/test_families.py)."""
_EMBEDDINGS = ("embed_", "wte", "wpe", "shared", "word_embeddings")
SCALE = 5.0
FAMILIES: dict[str, Family] = {row.name: row for row in _ROWS}


def _sharpen(model: nn.Module, noise: float) -> None:
    """Scales weights so that attention is peaked and the context, not the last token, decides the logits.

    Embeddings keep their size: large ones would drown what attention adds to the residual stream.
    Biases and learned sinks are drawn at zero or near it; they get a size, or nothing would show that they
    are used. `noise` (relative) is added to every matrix.
    """
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2:
                weight.mul_(1.0 if any(part in name for part in _EMBEDDINGS) else SCALE)
                if noise:
                    weight.add_(torch.randn_like(weight), alpha=noise * float(weight.std()))
            elif name.endswith(("bias", "sinks")):
                weight.add_(torch.randn_like(weight), alpha=0.5 if name.endswith("sinks") else 0.1)


def build(
    name: str, dtype: torch.dtype = torch.float32, noise: float = 0.0, attn: str | None = None, **changes: Any
) -> nn.Module:
    """Builds a fresh model of a family; equal arguments give equal weights.

    Args:
        name: key of `FAMILIES`.
        dtype: dtype of all parameters; drawn in float32 and cast, so bf16 weights are rounded float32 ones.
        noise: relative noise on every matrix: a near copy, for an assistant that is right only sometimes.
        attn: attention implementation; the family's own when None.
        changes: entries of the config that differ, for the families built by `_causal`.
    """
    family = FAMILIES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEEDS.get(name, 0))
        model = family.make(**changes)
        _sharpen(model, noise)
    model = model.to(dtype).eval()
    model.set_attn_implementation(attn or family.attn)
    return model


@functools.cache
def model_for(name: str, role: str, dtype: torch.dtype = torch.float32, attn: str | None = None) -> nn.Module:
    """The process-wide model of a family for one role.

    Roles never share an object: what one route leaves behind cannot change the reference it is compared with.
    """
    return build(name, dtype=dtype, attn=attn)


@functools.cache
def assistant_for(name: str) -> nn.Module:
    """A near copy of the family's model, right only sometimes, with settings that make every run draft alike.

    Its window is too long to matter: on transformers 5.17 an assistant with a sliding window of its own fails
    (its cache records the past, its mask does not count it), whatever cache the main model has.
    """
    model = build(name, noise=0.05, **({"sliding_window": MAX_POSITIONS} if FAMILIES[name].slides else {}))
    config = model.generation_config
    config.num_assistant_tokens, config.num_assistant_tokens_schedule = 4, "constant"
    config.assistant_confidence_threshold = 0.0
    return model
