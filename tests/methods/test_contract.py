"""What every method keeps on every family. A new method is tested here by being registered."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

import sparsetrain
import sparsetrain.methods  # enters every method in the registry
from sparsetrain.core.anatomy import Anatomy, describe, submodule
from sparsetrain.core.config import MethodConfig, registered_methods
from sparsetrain.hf.model.families import family_limits, further_families
from sparsetrain.hf.model.four_bit import keep_unpacked
from sparsetrain.surgery.grow import growth_method
from sparsetrain.surgery.method import method_of
from sparsetrain.surgery.record import handles_of
from sparsetrain.surgery.support import FEATURES, UNPROVEN, check_support, why_not
from tests.families import FAMILIES, FURTHER, UNET, Family
from tests.field import test_ranks_matrix as on_ranks

CASES = FAMILIES | {UNET.name: UNET} | FURTHER
KINDS = registered_methods()
METHODS = [name for name, kind in KINDS.items() if method_of(kind).edits]
GROWTHS = [name for name, kind in KINDS.items() if method_of(kind).growth]
assert METHODS, "no method is registered, so nothing would be tested"
# a family that is not in the docs' matrix would be claimed by nobody
assert set(FAMILIES) == set(family_limits())


def _takes(kind: type[MethodConfig], anatomy: Anatomy) -> bool:
    """Has the model sites for it, and none that it refuses?"""
    names = method_of(kind).site_names(anatomy)
    refused = {ffn.name for ffn in anatomy.ffns if ffn.refused}
    return bool(names) and not refused & set(names)


ANATOMIES = {name: describe(case.build()) for name, case in CASES.items()}
WIDE = [
    (method, name)
    for method in METHODS
    for name, anatomy in ANATOMIES.items()
    if name not in method_of(KINDS[method]).limits and _takes(KINDS[method], anatomy)
]
PAIRS = [(method, name) for method, name in WIDE if name not in FURTHER]
KIN = ("qwen2", "qwen3", "mistral")
"""Families of Llama's row: what a method's own code decides is asked of Llama."""
TURNS = 3


def in_turn(pairs: list[tuple[str, str]], turn: int, ways: Sequence[Any] = ()) -> list[Any]:
    """Of families that are built like others, each pair has every third of such tests, so that each test meets each
    method and each family; the others are slow. Of the two `ways` of a test, a pair of other families has one."""
    families = list(CASES)

    def waits(method: str, family: str, *way: Any) -> bool:
        place = METHODS.index(method) + families.index(family) + turn + sum(map(ways.index, way))
        return place % (TURNS if family in FURTHER or family in KIN else len(ways) or 1) != 0

    cells = [(*pair, *way) for pair in pairs for way in ([(each,) for each in ways] or [()])]
    return [pytest.param(*cell, marks=pytest.mark.slow) if waits(*cell) else cell for cell in cells]


def of_its_own(pairs: list[tuple[str, str]]) -> list[Any]:
    """The pairs, of which those of families of Llama's row are slow."""
    return [pytest.param(*pair, marks=pytest.mark.slow) if pair[1] in KIN else pair for pair in pairs]


own = pytest.mark.parametrize(("method", "family"), of_its_own(PAIRS))
wide = pytest.mark.parametrize(("method", "family"), WIDE)
causal = pytest.mark.parametrize(("method", "family"), [pair for pair in PAIRS if CASES[pair[1]].causal])
all_or_some = pytest.mark.parametrize(
    ("method", "family", "some"),
    [
        *in_turn([pair for pair in PAIRS if CASES[pair[1]].causal], turn=2, ways=(False, True)),
        *in_turn([pair for pair in WIDE if pair[1] in FURTHER and CASES[pair[1]].causal], turn=2, ways=(False,)),
    ],
)
"""`wide` are further families, too, which are built like others; `own` those that differ in their row."""


def claimed(feature: str, further: int | None = None, **ways: Sequence[Any]) -> Any:
    """Every method on every family where the support matrix says yes, on further ones and in both `ways` `in_turn`."""
    limits = family_limits() | (further_families() if further is not None else {})
    pairs = [(m, f) for m, f in WIDE if f in limits and why_not(m, feature, limits[f]) is None]
    assert pairs or feature in UNPROVEN, f"nobody claims {feature}"
    return pytest.mark.parametrize(("method", "family", *ways), in_turn(pairs, further or 0, *ways.values()))


def convert(model: Any, family: Family, *configs: MethodConfig) -> sparsetrain.Handle:
    return sparsetrain.sparsify(model, *configs, calibration=[family.batch(4, seed=5), family.batch(4, seed=6)])


def example(method: str) -> MethodConfig:
    return KINDS[method].example()


def output(model: Any, batch: dict[str, Tensor]) -> Tensor:
    found = model(**batch)
    return found.logits if hasattr(found, "logits") else found.sample


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return output(model, batch)


def gradients(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    output(model, batch).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def one_layer(method: str, family: str) -> tuple[int, ...]:
    """The second layer that a method takes, or the only one."""
    layers = sorted({edit.layer for edit in sparsetrain.plan(CASES[family].model(), example(method)).edits})
    return (layers[min(1, len(layers) - 1)],)


def replaced(handle: sparsetrain.Handle) -> set[str]:
    """Names of the dense weights that are in the model no more."""
    return {name for edit in handle.plan.edits for name in edit.replaces}


def assert_near(a: Tensor, b: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(1.0, b.abs().max().item()))


@wide
def test_dense_limit_equals_dense_in_outputs_and_gradients(method: str, family: str) -> None:
    case = CASES[family]
    model, batch = case.model(), case.batch()
    expected, expected_grads = logits(model, batch), gradients(model.train(), batch)
    handle = convert(model.eval(), case, KINDS[method].dense_limit())
    assert_near(logits(model, batch), expected)
    found = gradients(model.train(), batch)
    for name, grad in expected_grads.items():
        if name not in replaced(handle):
            assert_near(found[name], grad)


@pytest.mark.parametrize(("method", "family"), in_turn(WIDE, turn=1))
def test_changes_something_and_restores_bit_exactly(method: str, family: str) -> None:
    case = CASES[family]
    model, batch = case.model(), case.batch()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    ids = {name: id(p) for name, p in model.named_parameters()}
    classes = [type(m) for m in model.modules()]
    expected, expected_grads = logits(model, batch), gradients(model.train(), batch)
    handle = convert(model.eval(), case, example(method))
    found = gradients(model.train(), batch)
    # what is frozen or replaced has no gradient any more
    moved = (
        (found[name] - grad if name in found else grad).abs().max() > 1e-4 * grad.abs().max()
        for name, grad in expected_grads.items()
    )
    assert any(moved)
    moved = (logits(model.eval(), batch) - expected).abs().max()
    assert moved > 1e-4 if example(method).changes_outputs else moved == 0
    handle.restore()
    assert torch.equal(logits(model, batch), expected)
    assert {name: id(p) for name, p in model.named_parameters()} == ids
    assert [type(m) for m in model.modules()] == classes
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not handle.active


@own
def test_plan_is_pure_and_its_parameters_are_exact(method: str, family: str) -> None:
    case = CASES[family]
    model = case.model()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    params = sum(p.numel() for p in model.parameters())
    planned = sparsetrain.plan(model, example(method), seq_tokens=100)
    assert len(planned.edits) == len(method_of(KINDS[method]).site_names(ANATOMIES[family]))
    assert method in str(planned)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    convert(model, case, example(method))
    added = sum(row["added_params"] for row in planned.rows())
    assert sum(p.numel() for p in model.parameters()) == params + added


@all_or_some
def test_causality(method: str, family: str, some: bool) -> None:
    case = CASES[family]
    model, batch = case.model(), case.batch()
    config = dataclasses.replace(example(method), layers=one_layer(method, family) if some else None)
    convert(model, case, config)
    expected = logits(model, batch)
    for t in (37, 71, 99):
        changed = copy.deepcopy(batch)
        changed["input_ids"][:, t] = (changed["input_ids"][:, t] + 7) % 50 + 3
        moved = (logits(model, changed) - expected).abs().amax(-1)
        assert moved[:, :t].max() < 1e-5, t
        assert moved[:, t].min() > 1e-5


@claimed("padding", further=0, side=("left", "right"))
def test_padding_changes_nothing(method: str, family: str, side: str) -> None:
    case = CASES[family]
    model = case.model()
    convert(model, case, example(method))
    ids = case.batch(2, 83)["input_ids"]
    alone = logits(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    pad = torch.zeros(2, 13, dtype=ids.dtype)
    ones, zeros = torch.ones_like(ids), torch.zeros_like(pad)
    order = (pad, ids) if side == "left" else (ids, pad)
    mask = torch.cat((zeros, ones) if side == "left" else (ones, zeros), 1)
    batch = {"input_ids": torch.cat(order, 1), "attention_mask": mask}
    if not case.causal:
        if side == "left":
            pytest.skip("the classification token stands first")
        assert_near(logits(model, batch), alone)
        return
    if side == "left" and family != "opt":  # OPT makes its positions from the mask
        batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    found = logits(model, batch)
    assert_near(found[:, 13:] if side == "left" else found[:, :83], alone)


@claimed("packing", further=1)
def test_packed_sequences_equal_separate_ones(method: str, family: str) -> None:
    case = CASES[family]
    model = case.model()
    convert(model, case, example(method))
    first, second = case.batch(1, 71, seed=3)["input_ids"], case.batch(1, 86, seed=4)["input_ids"]
    positions = torch.cat([torch.arange(71), torch.arange(86)])[None]
    # without a cache, as trainers do: dense attention of transformers separates packed sequences only then
    packed = {"input_ids": torch.cat([first, second], 1), "position_ids": positions, "use_cache": False}
    found = logits(model, packed)
    assert_near(found[:, :71], logits(model, {"input_ids": first}))
    assert_near(found[:, 71:], logits(model, {"input_ids": second}))


@own
def test_same_seed_same_result_and_the_global_generator_is_left_alone(method: str, family: str) -> None:
    case = CASES[family]
    results = []
    for _ in range(2):
        model = case.model()
        torch.manual_seed(3)
        convert(model, case, example(method))
        results.append((logits(model, case.batch()), torch.rand(1)))
    assert torch.equal(results[0][0], results[1][0])
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), results[0][1])


@claimed("checkpointing", reentrant=(False, True))
def test_gradients_with_checkpointing_equal_those_without(method: str, family: str, reentrant: bool) -> None:
    if reentrant and (reason := why_not(method, "checkpointing_reentrant", family_limits()[family])):
        pytest.skip(reason)
    case = CASES[family]
    model, batch = case.model(), case.batch()
    dense = {name for name, _ in model.named_parameters()}
    handle = convert(model, case, example(method))
    handle.step(0, 10, 1.0)
    model.train()
    plain = gradients(model, batch)
    # renamed in transformers 5.23; the old name warns there
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    found = gradients(model, batch)
    assert plain.keys() == found.keys()
    assert {name for name, _ in model.named_parameters()} - dense <= plain.keys(), "what the method adds gets gradient"
    for name, grad in plain.items():
        assert_near(found[name], grad)


@claimed("autocast")
def test_autocast(method: str, family: str) -> None:
    case = CASES[family]
    model, batch = case.model(), case.batch()
    convert(model, case, example(method))
    expected = logits(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        uncached = model(**batch, **({"use_cache": False} if hasattr(model.config, "use_cache") else {})).logits
        assert torch.equal(model(**batch).logits, uncached), "a cache joins fp32 keys and bf16 values to fp32"
        model.train()
        out = model(**batch).logits
    out.float().square().mean().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in grads)
    # routing and selection are discrete, so single tokens may differ; the outputs as a whole may not
    assert (out.float() - expected).norm() < 0.3 * expected.norm()


@claimed("lora", further=2)
def test_lora_trains_beside_it(method: str, family: str) -> None:
    case = CASES[family]
    model, batch = case.model(), case.batch()
    handle = convert(model, case, example(method))
    config = LoraConfig(r=2, target_modules="all-linear", modules_to_save=handle.modules_to_save or None)
    adapted = get_peft_model(model, config).train()
    adapted(**batch).logits.float().square().mean().backward()
    found = {name: p.grad for name, p in adapted.named_parameters() if "lora_B" in name}
    assert found and all(grad is None or bool(grad.isfinite().all()) for grad in found.values())
    assert any(grad is not None and bool(grad.any()) for grad in found.values())


@own
def test_dense_checkpoints_load_and_ours_hold_the_dense_order(method: str, family: str) -> None:
    case = CASES[family]
    model, other, batch = case.model(0), case.model(1), case.batch()
    dense = {name: p.clone() for name, p in model.state_dict().items()}
    handle = convert(model, case, example(method))
    for name, value in model.state_dict().items():
        if name in dense:
            assert torch.equal(value, dense[name]), name
    assert dense.keys() - set(model.state_dict()) == replaced(handle)
    missing, unexpected = model.load_state_dict(other.state_dict(), strict=False)
    assert set(unexpected) == replaced(handle)
    assert not set(missing) & dense.keys()
    if not replaced(handle):
        handle.restore()
        assert torch.equal(logits(model, batch), logits(other, batch))


@own
def test_inside_dense_the_model_is_the_dense_one(method: str, family: str) -> None:
    case = CASES[family]
    model, batch = case.model(), case.batch()
    expected = logits(model, batch)
    handle = convert(model, case, example(method))
    if replaced(handle):
        pytest.skip("the dense weights are gone")
    handle.step(1, 1)
    sparse = logits(model, batch)
    with handle.dense():
        assert_near(logits(model, batch), expected)
    assert torch.equal(logits(model, batch), sparse)


@own
def test_after_commit_there_is_no_way_back(method: str, family: str) -> None:
    case = CASES[family]
    model, batch = case.model(), case.batch()
    handle = convert(model, case, example(method))
    expected = logits(model, batch)
    handle.commit()
    with pytest.raises(ValueError, match="after commit"):
        handle.restore()
    assert handle.active and torch.equal(logits(model, batch), expected)


@own
def test_state_rebuilds_the_conversion(method: str, family: str) -> None:
    case = CASES[family]
    model, batch = case.model(), case.batch()
    handle = convert(model, case, example(method))
    again = case.model()
    sparsetrain.sparsify(again, *handle.configs, state=handle.state())
    assert torch.equal(logits(again, batch), logits(model, batch))


@own
def test_merge_is_refused_where_it_would_change_an_output(method: str, family: str) -> None:
    case = CASES[family]
    model, batch = case.model(), case.batch()
    handle = convert(model, case, example(method))
    if example(method).changes_outputs:
        with pytest.raises(ValueError, match="cannot be merged"):
            handle.merge()
        assert handle.active
        handle.restore()
    else:
        expected = logits(model, batch)
        assert torch.equal(logits(handle.merge(), batch), expected)
        assert not handle.active
    handle = convert(model, case, KINDS[method].dense_limit())
    sparse = logits(model, batch)
    assert_near(logits(handle.merge(), batch), sparse)


@own
def test_no_match_and_double_claims_are_errors_that_change_nothing(method: str, family: str) -> None:
    case = CASES[family]
    model, batch = case.model(), case.batch()
    expected = logits(model, batch)
    config = example(method)
    nowhere = type(config).from_dict({**config.to_dict(), "targets": ("decoder.blocks.*",)})
    with pytest.raises(sparsetrain.PlanError, match="matches nothing"):
        convert(model, case, nowhere)
    with pytest.raises(sparsetrain.PlanError, match="both claim"):
        convert(model, case, config, dataclasses.replace(config, layers=one_layer(method, family)))
    assert torch.equal(logits(model, batch), expected)


@causal
def test_generation_with_a_cache_equals_generation_without(method: str, family: str) -> None:
    case = CASES[family]
    model = case.model()
    convert(model, case, KINDS[method].dense_limit())
    batch = case.batch(2, 30)
    options = {"max_new_tokens": 4, "do_sample": False, "min_new_tokens": 4}
    with_cache = model.generate(**batch, **options, use_cache=True)
    without = model.generate(**batch, **options, use_cache=False)
    assert torch.equal(with_cache, without)


def together() -> Iterator[Any]:
    """Every two methods on every family that has sites for both; all but Llama and one more, in turn, are slow."""
    for i, (first, second) in enumerate(itertools.combinations(METHODS, 2)):
        families = [name for name in CASES if {(first, name), (second, name)} <= set(PAIRS)]
        quick = {"llama", families[i % len(families)]} if families else set()
        for name in families:
            yield pytest.param(first, second, name, marks=() if name in quick else pytest.mark.slow)


@pytest.mark.parametrize(("first", "second", "family"), list(together()))
def test_two_methods_compose_or_claim_the_same(first: str, second: str, family: str) -> None:
    case = CASES[family]
    model, batch = case.model(), case.batch()
    expected = logits(model, batch)
    configs = [example(first), example(second)]
    plans = [sparsetrain.plan(model, config) for config in configs]
    claims = [{claim for edit in planned.edits for claim in edit.claims} for planned in plans]
    if claims[0] & claims[1]:
        with pytest.raises(sparsetrain.PlanError, match="both claim"):
            convert(model, case, *configs)
    else:
        handle = convert(model, case, *configs)
        assert len(handle.plan.edits) == sum(len(planned.edits) for planned in plans)
        changes = any(config.changes_outputs for config in configs)
        assert torch.equal(logits(model, batch), expected) != changes
        handle.restore()
    assert torch.equal(logits(model, batch), expected)


def counted_flops(model: Any, batch: dict[str, Tensor]) -> int:
    """FLOPs of a forward as torch's counter has them; attention's by visible pairs, as costs are planned, and distances
    that are added up channel by channel, which are no product to it."""

    def attention(q: Any, k: Any, v: Any, dropout: float = 0.0, causal: bool = False, **_: Any) -> float:
        (b, h, t, d), s = q, k[2]
        return 4 * b * h * d * (t * (t + 1) / 2 if causal else t * s)

    def distances(x: Any, y: Any, *_: Any, **__: Any) -> int:
        return 2 * math.prod(torch.broadcast_shapes(*(each for each in (x, y) if isinstance(each, torch.Size))))

    flash: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counted = {flash: attention, torch.ops.aten.sub: distances}
    with FlopCounterMode(display=False, custom_mapping=counted) as counter, torch.no_grad():
        model(**batch)
    return counter.get_total_flops()


@claimed("cost")
def test_the_planned_saving_is_what_a_counter_measures(method: str, family: str) -> None:
    if family in ("mistral", "gemma3"):
        pytest.skip("dense attention runs a window as a mask, and computes every pair")
    case = CASES[family]
    model, batch = case.model(), case.batch()
    dense = counted_flops(model, batch)
    tokens = 101 if case.vision else 100
    rows = sparsetrain.plan(model, example(method), seq_tokens=tokens).rows()
    convert(model, case, example(method)).step(1, 1)
    before, after = (sum(row[key] for row in rows) * 1e6 * 2 * tokens for key in ("mflop_before", "mflop_after"))
    # tiles are computed whole and groups padded: at 100 tokens up to 5 % of the dense part
    assert abs((dense - counted_flops(model, batch)) - (before - after)) <= 0.06 * before


HEADS = {"classify": AutoModelForSequenceClassification, "mlm": AutoModelForMaskedLM}


def with_head(feature: str, case: Family) -> Any:
    """The family's tiny model under the head of a task."""
    torch.manual_seed(0)
    model: Any = case.model() if case.vision else HEADS[feature].from_config(case.model().config)
    return model.eval()


def assert_trains_with_a_head(feature: str, method: str, family: str) -> None:
    """The dense limit has the dense loss; the method itself trains to finite gradients, padding included."""
    case = CASES[family]
    model, batch = with_head(feature, case), case.batch(2, 90)
    if not case.vision:
        batch["attention_mask"][1, 70:] = 0
        batch["input_ids"][1, 70:] = 0  # by the padding token, causal classifiers find the last real one
    labels = torch.tensor([0, 1]) if feature == "classify" else batch["input_ids"]
    expected = model(**batch, labels=labels).loss
    handle = convert(model, case, KINDS[method].dense_limit())
    assert_near(model(**batch, labels=labels).loss, expected)
    handle.restore()
    convert(model, case, example(method)).step(1, 1)
    model.train()
    loss = model(**batch, labels=labels).loss
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert loss.isfinite() and grads and all(g.isfinite().all() for g in grads)


@claimed("classify")
def test_classification_trains(method: str, family: str) -> None:
    assert_trains_with_a_head("classify", method, family)


@claimed("mlm")
def test_masked_language_modelling_trains(method: str, family: str) -> None:
    assert_trains_with_a_head("mlm", method, family)


@pytest.mark.slow
@claimed("compile")
def test_torch_compile_traces_and_changes_nothing(method: str, family: str) -> None:
    case = CASES[family]
    model, batch = case.model(), case.batch()
    convert(model, case, example(method))
    expected, expected_grads = logits(model, batch), gradients(model, batch)
    torch._dynamo.reset()
    counters.clear()
    try:
        with warnings.catch_warnings():  # dynamo warns of what it leaves to eager
            warnings.simplefilter("ignore")
            compiled = torch.compile(model, backend="eager")
            assert_near(logits(compiled, batch), expected)
            found = gradients(compiled, batch)
        assert counters["stats"]["unique_graphs"] > 0, "nothing was traced"
        for name, grad in expected_grads.items():
            assert_near(found[f"_orig_mod.{name}"], grad)
    finally:
        torch._dynamo.reset()


@pytest.mark.gpu
@claimed("gpu")
def test_a_gpu_gives_what_the_cpu_gives(method: str, family: str) -> None:
    case = CASES[family]
    model, batch = case.model(), case.batch()
    convert(model, case, example(method))
    expected = logits(model, batch)
    model.cuda()
    assert_near(logits(model, {name: value.cuda() for name, value in batch.items()}).cpu(), expected, 1e-3)


def quantised(old: torch.nn.Linear, bits: int) -> torch.nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    sizes = old.in_features, old.out_features, old.bias is not None
    if bits == 4:
        new = bnb.nn.Linear4bit(*sizes, compute_dtype=torch.float32)
        new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False)
    else:
        new = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
        new.weight = bnb.nn.Int8Params(old.weight.data, requires_grad=False, has_fp16_weights=False)
    new.bias = old.bias
    return new.to("cpu")


def gradients_on_quantised_weights(method: str, family: str, bits: int) -> dict[str, torch.Tensor]:
    """After checks that something is quantised, and that outputs are as before where the method changes none."""
    case = CASES[family]
    model, batch = case.model(), case.batch()
    for parent in [module for block in describe(model).blocks for module in submodule(model, block.name).modules()]:
        for name, old in parent.named_children():
            # the 4-bit kernel for CPUs takes multiples of 32 alone
            if isinstance(old, torch.nn.Linear) and old.out_features % 32 == 0 and old.in_features % 32 == 0:
                setattr(parent, name, quantised(old, bits))
    assert any(type(module).__name__ in ("Linear4bit", "Linear8bitLt") for module in model.modules())
    keep_unpacked(model)
    expected = logits(model, batch)
    convert(model, case, example(method))
    if not example(method).changes_outputs:
        assert_near(logits(model, batch), expected)
    return gradients(model, batch)


@claimed("four_bit")
def test_four_bit_weights_train(method: str, family: str) -> None:
    found = gradients_on_quantised_weights(method, family, 4)
    assert found and all(grad.isfinite().all() for grad in found.values())


@claimed("eight_bit")
def test_eight_bit_weights_train(method: str, family: str) -> None:
    found = gradients_on_quantised_weights(method, family, 8)
    assert found and all(grad.isfinite().all() for grad in found.values())


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("method", GROWTHS)
def test_growth_makes_a_plain_model_and_carries_the_optimizer(method: str, family: str) -> None:
    case, config = FAMILIES[family], example(method)
    if family in method_of(config).limits:
        pytest.skip(method_of(config).limits[family])
    with pytest.raises(sparsetrain.PlanError, match="Use grow"):
        sparsetrain.plan(case.model(), config)
    stages = growth_method(config).stages(config)
    assert abs(sum(stage.share for stage in stages) - 1) < 1e-9
    kept: dict[str, Any] = {}
    model, batch = sparsetrain.grow(case.model(), config, stage=0, kept=kept), case.batch()
    for stage in range(1, len(stages)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        model.zero_grad()
        output(model.train(), batch).square().mean().backward()
        optimizer.step()
        expected, before = logits(model.eval(), batch), {n: p.clone() for n, p in model.named_parameters()}
        new = sparsetrain.grow(model, config, optimizer, stage=stage, kept=kept).eval()
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters()), "the old model is left as it is"
        if not config.changes_outputs:
            assert_near(logits(new, batch), expected)
        assert {p for group in optimizer.param_groups for p in group["params"]} == set(new.parameters())
        for handle in handles_of(new):  # what the stage carries is taken out again
            handle.restore()
        plain = type(case.model())(new.config).eval()
        plain.load_state_dict(new.state_dict())
        assert_near(logits(plain, batch), logits(new, batch))
        model = new


HELD_BY = {
    "four_bit": test_four_bit_weights_train,
    "eight_bit": test_eight_bit_weights_train,
    "cpu": test_dense_limit_equals_dense_in_outputs_and_gradients,
    "gpu": test_a_gpu_gives_what_the_cpu_gives,
    "padding": test_padding_changes_nothing,
    "packing": test_packed_sequences_equal_separate_ones,
    "checkpointing": test_gradients_with_checkpointing_equal_those_without,
    "checkpointing_reentrant": test_gradients_with_checkpointing_equal_those_without,
    "autocast": test_autocast,
    "compile": test_torch_compile_traces_and_changes_nothing,
    "lora": test_lora_trains_beside_it,
    "classify": test_classification_trains,
    "mlm": test_masked_language_modelling_trains,
    "cost": test_the_planned_saving_is_what_a_counter_measures,
    "export": test_state_rebuilds_the_conversion,
    "ddp": on_ranks.test_every_method,  # on several ranks; one of Llama's, as the ranks know no family
    "fsdp2": on_ranks.test_every_method,
}


def test_every_feature_is_held_by_a_test_or_refused() -> None:
    assert set(HELD_BY) | set(UNPROVEN) == set(FEATURES)
    assert not set(HELD_BY) & set(UNPROVEN)


@own
def test_what_is_not_claimed_is_refused_with_its_reason(method: str, family: str) -> None:
    model, limits = CASES[family].model(), ANATOMIES[family].limits
    refused = {feature: why for feature in FEATURES if (why := why_not(method, feature, limits))}
    assert set(UNPROVEN) <= set(refused)
    for feature, reason in refused.items():
        with pytest.raises(ValueError, match=feature) as error:
            check_support([example(method)], describe(model), [feature])
        assert reason in str(error.value)
    check_support([example(method)], describe(model), set(FEATURES) - set(refused))


@pytest.mark.parametrize("feature, attribute", [("four_bit", "is_loaded_in_4bit"), ("eight_bit", "is_loaded_in_8bit")])
@pytest.mark.parametrize("method", [m for m in METHODS if why_not(m, "four_bit")])
def test_quantised_weights_are_refused_before_anything_changes(method: str, feature: str, attribute: str) -> None:
    case = FAMILIES["llama"]
    model, batch = case.model(), case.batch()
    expected = logits(model, batch)
    setattr(model, attribute, True)
    with pytest.raises(ValueError, match=feature):
        convert(model, case, example(method))
    assert torch.equal(logits(model, batch), expected)


@pytest.mark.parametrize("method", [m for m in METHODS if why_not(m, "eight_bit")])
def test_int8_codes_are_not_multiplied_as_weights(method: str) -> None:
    """A linear that was put in by hand says nothing of itself on the model."""
    case = FAMILIES["llama"]
    model = case.model()
    for block in describe(model).blocks:
        for parent in submodule(model, block.name).modules():
            for name, old in parent.named_children():
                if isinstance(old, torch.nn.Linear):
                    setattr(parent, name, quantised(old, 8))
    with pytest.raises(ValueError, match="Load the model in"):
        convert(model, case, example(method))
