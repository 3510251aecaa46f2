"""Models that read or change their cache's layers themselves: refused before the first token, none forgotten."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import hf_ctxopt
from hf_ctxopt import UnsupportedModelError
from hf_ctxopt.models.readers import READERS, SPLITTERS, check_reads
from tests.families import VOCAB, build

IDS = torch.randint(2, VOCAB, (1, 9), generator=torch.Generator().manual_seed(3))
UNPAGED = {"glm5_next"}
"""Families that read layers which no page cache takes the place of."""

_STATES = re.compile(r"\.(?:keys|values)\b(?!\s*\()|\.layers \+=")
_OF_A_LAYER = re.compile(r"(?:\b(?:c|layer|cache_layer)|layers\[\w+(?:\.\w+)?\])\.(?:keys|values)$|\.layers \+=$")


def _base() -> dict[str, Any]:
    return {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": None,
    }  # fmt: skip


def _dory(mode: str) -> torch.nn.Module:
    if not hasattr(transformers, "DoryConfig"):
        pytest.skip("this transformers has no Dory")
    config = transformers.DoryConfig(
        **_base(), head_dim=8, n_input_layers=2, n_output_layers=2, recurrent_kv_cache_mode=mode
    )
    return transformers.DoryForCausalLM(config).eval()


def _mllama() -> torch.nn.Module:
    config = transformers.MllamaTextConfig(**_base(), cross_attention_layers=[2])
    return transformers.MllamaForCausalLM(config).eval()


@pytest.mark.parametrize("model", ["dory per_loop", "dory last_loop", "mllama"])
def test_readers_are_refused_before_the_first_token(model: str) -> None:
    family, *mode = model.split()
    built = _dory(*mode) if family == "dory" else _mllama()
    plain = built.generate(IDS, max_new_tokens=3)
    ran: list[Any] = []
    hook = built.register_forward_pre_hook(lambda *given: ran.append(given))
    for call in (
        lambda: built.generate(IDS, max_new_tokens=3, cache_implementation="ctx_paged"),
        lambda: hf_ctxopt.make_cache(built, "ctx_sink", window=8),
        lambda: hf_ctxopt.patch_model(built, "ctx_paged"),
        lambda: hf_ctxopt.plan(built, vram="8GiB"),
    ):
        with pytest.raises(UnsupportedModelError, match=f"{family}.*layers.*transformers' own"):
            call()
    assert ran == []
    hook.remove()
    assert torch.equal(built.generate(IDS, max_new_tokens=3), plain)


def test_whisper_is_refused_where_it_would_split_its_cache() -> None:
    config = transformers.WhisperConfig(
        vocab_size=VOCAB, num_mel_bins=8, d_model=16, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_source_positions=20,
        max_target_positions=32, decoder_start_token_id=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config).eval()
    model.generation_config.no_timestamps_token_id = 50
    features = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(0))
    expected = model.generate(features, max_new_tokens=4)
    assert torch.equal(model.generate(features, max_new_tokens=4, cache_implementation="ctx_paged"), expected)
    with pytest.raises(UnsupportedModelError, match=r"whisper.*return_dict_in_generate"):
        model.generate(features, max_new_tokens=4, cache_implementation="ctx_paged", return_dict_in_generate=True)


def test_the_tensors_of_a_paged_layer_cannot_be_touched() -> None:
    layer = hf_ctxopt.make_cache(build("llama"), "ctx_paged").layers[1]
    for touch in (lambda: layer.keys, lambda: layer.values):
        with pytest.raises(UnsupportedModelError, match=r"layer 1.*pages"):
            touch()
    for name in ("keys", "values"):
        with pytest.raises(AttributeError):
            setattr(layer, name, IDS)


def test_no_reader_is_forgotten() -> None:
    """The installed transformers has no model outside the tables that reads self-attention states from layers."""
    found = set(_readers())
    assert "mllama" in found
    assert found - set(READERS) - set(SPLITTERS) - UNPAGED == set()


def _readers() -> Iterator[str]:
    """Families whose code reads layers of their cache, other than the encoder's states in a cross-attention's."""
    models = Path(str(transformers.__file__)).parent / "models"
    for file in [*models.glob("*/modeling_*.py"), *models.glob("*/generation_*.py")]:
        text = file.read_text(encoding="utf-8")
        for match in _STATES.finditer(text):
            before = text[max(0, match.end() - 1200) : match.end()].split("\n")[-13:]
            encoders = re.search(r"is_updated|is_cross_attention|cross_attention_cache", "\n".join(before))
            if not encoders and _OF_A_LAYER.search(before[-1]):
                yield file.parent.name


@pytest.mark.parametrize("kind", ["mllama", "mllama_text_model", "diffusion_gemma_text", "ragtime", "llama"])
def test_families_go_by_the_beginning_of_their_type(kind: str) -> None:
    config = transformers.LlamaConfig()
    config.model_type = kind
    if kind in ("ragtime", "llama"):
        check_reads(config)
        return
    with pytest.raises(UnsupportedModelError):
        check_reads(config)
