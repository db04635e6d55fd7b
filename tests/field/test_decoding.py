"""Decoding with a cache gives what the whole forward gives: sliding, static and cropped caches, chunks, padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, Gemma3TextConfig, MistralConfig, StaticCache
from transformers import Gemma3ForCausalLM as Gemma3
from transformers import MistralForCausalLM as Mistral

from sparsetrain import FloodFillAttention, PQAttention, sparsify
from sparsetrain.core.backend import use_backend
from sparsetrain.core.config import MethodConfig
from tests.families import _DECODER, FAMILIES, VOCAB, llama_config
from tests.turns import in_turn

TOKENS, WINDOW = 40, 12
_FLOOD: dict[str, Any] = {"block_tokens": 4, "filter_edge": 3, "quantile": 0.5, "max_dense_steps": 0}
_PQ: dict[str, Any] = {"granularity": "token", "local_tokens": 2, "codebook_init": "normal"}
METHODS = {
    "flood": FloodFillAttention(**_FLOOD),
    "flood_phantom": FloodFillAttention(**_FLOOD, softmax="phantom_zero"),
    "pq_table": PQAttention(**_PQ, num_keys=6),
    "pq_match": PQAttention(**_PQ, num_keys=6, score="match_count"),
}
CHUNKS = {"steps": [20, *[1] * 20], "chunks": [10, 10, 3, 1, 4, 12]}


def model_of(family: str, config: MethodConfig) -> Any:
    """A tiny model of fp32 with peaked attention, converted."""
    torch.manual_seed(0)
    model: Any
    if family == "mistral":
        model = Mistral(MistralConfig(**_DECODER, sliding_window=WINDOW))
    elif family == "gemma3":
        layers = ["sliding_attention", "full_attention", "sliding_attention"]
        model = Gemma3(Gemma3TextConfig(**_DECODER, head_dim=8, sliding_window=9, layer_types=layers))
    else:
        model = FAMILIES["llama"].model()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.08)
    draw = torch.Generator().manual_seed(1)
    rows = [{"input_ids": torch.randint(3, VOCAB, (2, 64), generator=draw)} for _ in range(2)]
    sparsify(model.eval(), config, calibration=rows)
    return model


def mask_of(kind: str) -> Tensor:
    mask = torch.ones(2, TOKENS, dtype=torch.int64)
    if kind != "full":
        mask[0, :7] = 0
    if kind == "inside":
        mask[1, 15:19] = 0
    return mask


def gap(model: Any, mask: Tensor, chunks: list[int], cache: Any) -> float:
    """Largest difference of cached logits and those of the whole forward, on tokens."""
    ids = torch.randint(3, VOCAB, mask.shape, generator=torch.Generator().manual_seed(3))
    place = (mask.cumsum(1) - 1).clamp(min=0)
    found, at = [], 0
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=mask, position_ids=place, use_cache=False).logits
        for n in chunks:
            given = {"input_ids": ids[:, at : at + n], "position_ids": place[:, at : at + n]}
            found.append(model(**given, attention_mask=mask[:, : at + n], past_key_values=cache).logits)
            at += n
    return float((torch.cat(found, 1) - whole)[mask > 0].abs().max())


@in_turn(
    "method, family, kind, chunks",
    list(METHODS),
    ["mistral", "gemma3", "llama"],
    ["full", "left", "inside"],
    list(CHUNKS),
    turns=3,
)
def test_cached_logits_are_those_of_the_whole_forward(method: str, family: str, kind: str, chunks: str) -> None:
    model = model_of(family, METHODS[method])
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=50)):
        assert gap(model, mask_of(kind), CHUNKS[chunks], cache) < 2e-4


def test_a_sequence_is_as_long_as_it_is_not_as_what_a_sliding_cache_holds() -> None:
    model = model_of("mistral", PQAttention(**_PQ, num_keys=6, dense_below=30, layers=(2,)))
    ids = torch.randint(3, VOCAB, (1, TOKENS), generator=torch.Generator().manual_seed(5))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        model(input_ids=ids[:, :-1], past_key_values=cache)
        last = model(input_ids=ids[:, -1:], past_key_values=cache).logits
    assert (last[:, -1] - whole[:, -1]).abs().max() < 2e-4


@pytest.mark.parametrize("method", ["flood", "pq_table"])
def test_generation_is_the_same_with_every_cache(method: str) -> None:
    model = model_of("mistral", METHODS[method])
    ids = torch.randint(3, VOCAB, (2, 20), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[0, :5] = ids[0, :5] = 0
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}

    def generate(rows: slice, **more: Any) -> Tensor:
        return model.generate(input_ids=ids[rows], attention_mask=mask[rows], **options, **more)

    both, one = slice(0, 2), slice(1, 2)
    expected = generate(both, use_cache=False)
    assert torch.equal(generate(both), expected)
    assert torch.equal(generate(both, cache_implementation="static"), expected)
    alone = generate(one, use_cache=False)
    assert torch.equal(generate(one, prompt_lookup_num_tokens=3), alone)  # its cache is cropped
    assert torch.equal(generate(one, prefill_chunk_size=7), alone)


@pytest.mark.parametrize("score", ["table", "match_count", "attention"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_reference_runs_in_the_dtype_of_the_model(score: str, dtype: torch.dtype) -> None:
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config()).to(dtype).eval()
    sparsify(model, PQAttention(**_PQ, num_keys=6, score=score))
    ids = torch.randint(3, VOCAB, (2, 12))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with use_backend("reference"):
            found = model(input_ids=ids).logits
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 if dtype == torch.float64 else 5e-2)
