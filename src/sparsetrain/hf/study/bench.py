"""bench(): every method on the user's own model, length and machine, against the strongest dense step, timed in turns.

A candidate is first planned (what does not fit is refused, with the reason), then checked on two layers of the model:
its dense limit must equal the dense model, and its fast path the reference, in outputs and gradients. Only then is it
timed: whole training steps, dense and sparse in one loop whose order flips; selection, routing and everything else a
user pays for is inside.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparsetrain.core.anatomy import describe
from sparsetrain.core.config import MethodConfig, plain_values, registered_methods
from sparsetrain.core.errors import PlanError, Unsupported
from sparsetrain.core.fields import shown
from sparsetrain.core.units import seconds_text
from sparsetrain.hf.study.bench_checks import CHECK_LAYERS, distances
from sparsetrain.hf.study.bench_cut import cut_head, cut_layers, first_layers
from sparsetrain.hf.study.training_step import TrainingStep, convert_step, dense_twin, open_measured_parts
from sparsetrain.hf.train import assemble
from sparsetrain.hf.train.dtype import with_dtype
from sparsetrain.hf.train.parts import Parts
from sparsetrain.measure.components import Place
from sparsetrain.measure.follow import following
from sparsetrain.measure.machine import describe_machine
from sparsetrain.measure.memory import saved_activations
from sparsetrain.measure.rates import Rates, measure_rates
from sparsetrain.measure.timing import clock, compare, ratio
from sparsetrain.recipes.finetune import Recipe, without_lora
from sparsetrain.recipes.presets import PRESETS
from sparsetrain.runs.bench_outcome import Bench, Outcome
from sparsetrain.runs.events import Report, silent
from sparsetrain.surgery.plan import Plan, plan

QUICK_LAYERS = 4
OWN = "yours"
TOLERANCE = 1e-5
"""Relative L2 distance allowed between two ways to compute the same numbers. Checks run in fp32: a tolerance
that allows for the rounding of bf16 would hide small faults."""


def candidates(names: str, own: tuple[MethodConfig, ...] = ()) -> dict[str, tuple[MethodConfig, ...]]:
    """Name -> configs: `all` (every method with its defaults, every preset; none that grows a model, whose steps are
    of other models than the recipe's), or some of them by name, and one's own.

    Raises:
        ValueError: no such method or preset.
    """
    known = {name: (kind(),) for name, kind in registered_methods().items()}
    known |= {name: configs for name, configs in PRESETS.items() if configs and configs not in known.values()}
    steady = [name for name, configs in known.items() if not any(config.grows for config in configs)]
    chosen = steady if names == "all" else [name.strip() for name in names.split(",") if name.strip()]
    if unknown := [name for name in chosen if name not in known]:
        raise ValueError(f"--methods: {shown(unknown[0])} is unknown. Use all, or some of {', '.join(known)}.")
    return {name: known[name] for name in chosen} | ({OWN: own} if own else {})


def bench(
    recipe: Recipe,
    chosen: dict[str, tuple[MethodConfig, ...]],
    *,
    rounds: int = 7,
    layers: int | None = None,
    report: Report = silent,
) -> Bench:
    """Time every candidate against the dense step of `recipe`.

    Args:
        recipe: model, length, batch, LoRA, without its methods. What trains without LoRA is timed against all weights.
        chosen: as `candidates` gives them.
        rounds: timed pairs of steps for each, at least 3; more are taken while a verdict is undecided.
        layers: use only the first so many layers; with random tokens, the vocabulary is cut in the same proportion.
        report: told what is being done.

    Raises:
        ValueError: the recipe does not fit the machine, the model or the data; fewer than 3 rounds.
    """
    if rounds < 3:
        raise ValueError(f"rounds={rounds} gives no quartiles. Use at least 3; 7 is the default.")
    if not chosen:
        raise ValueError("no method is given, so there is nothing to time. Name at least one.")
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    notes: list[str] = []
    begin = time.perf_counter()

    def tell(text: str) -> None:
        report({"event": "note", "text": text})

    recipe = with_dtype(recipe, lambda event: tell(event["text"]))
    tell("timing the machine")
    rates = measure_rates(assemble.pick_device(recipe), seconds=0.3)
    # attention dropout is off on both sides, as in a comparison: a candidate may make attention sparse
    every = recipe.model_copy(update={"methods": tuple(c for configs in chosen.values() for c in configs)})
    parts = open_measured_parts(dense_twin(recipe), lambda event: notes.append(event.get("text", "")), every)
    model_layers = parts.config.num_hidden_layers
    dense = _open_dense(parts, layers, notes)
    once = _seconds(dense.baseline(parts).step)
    estimate = seconds_text(once * (2 * (rounds + 1) + 4) * len(chosen))
    tell(f"a dense step takes {seconds_text(once)}; {len(chosen)} candidates take {estimate} or more")
    outcomes = []
    for i, (name, configs) in enumerate(chosen.items()):
        asked = _as_trained(dense.parts, configs, own=name == OWN)
        outcomes.append(outcome := _judged(name, configs, asked, dense, rounds))
        _record(outcome, configs, asked, rates)
        more = f": {outcome.reason}" if outcome.step is None else f", {outcome.step.median:.2f}x"
        spent = seconds_text(time.perf_counter() - begin)
        tell(f"{name} ({i + 1} of {len(chosen)}, {spent}): {outcome.verdict}{more}")
    return Bench(
        recipe=dense.parts.recipe,
        layers=dense.parts.config.num_hidden_layers,
        model_layers=model_layers,
        outcomes=outcomes,
        rates=rates,
        machine=describe_machine().to_dict(),
        notes=[note for note in notes if note],
    )


@dataclass(frozen=True, kw_only=True)
class _Baseline:
    """A dense step, and what it saves."""

    step: TrainingStep
    saved_bytes: int


@dataclass(kw_only=True)
class _Dense:
    """The dense side. base: the model that every candidate converts a copy of; small: its first layers, in fp32."""

    parts: Parts
    base: nn.Module
    new_modules: list[str]
    small: nn.Module
    _made: dict[int, _Baseline] = dataclasses.field(default_factory=dict)

    def baseline(self, parts: Parts) -> _Baseline:
        """The dense step with the LoRA of `parts`, or of all weights; one is held at a time, for its memory."""
        rank = parts.recipe.lora_r
        if rank not in self._made:
            self._made.clear()
            like = dataclasses.replace(parts, recipe=dense_twin(parts.recipe))
            step = convert_step(copy.deepcopy(self.base), self.new_modules, like)
            self._made[rank] = _Baseline(step=step, saved_bytes=saved_activations(step.model, step.loss).total)
        return self._made[rank]


def _open_dense(parts: Parts, layers: int | None, notes: list[str]) -> _Dense:
    """Load the dense model, cut to `layers`, and make its training step; `notes` is told of a cut."""
    model_layers = parts.config.num_hidden_layers
    cut = layers is not None and layers < model_layers
    if layers is not None and cut:
        cut_layers(parts.config, layers)
    base, new_modules = assemble.load_model(parts, cut=cut)
    if layers is not None and cut:
        parts, note = cut_head(base, parts, layers, model_layers)
        notes.append(note)
    return _Dense(parts=parts, base=base, new_modules=new_modules, small=first_layers(base, CHECK_LAYERS).float())


def _as_trained(parts: Parts, configs: tuple[MethodConfig, ...], *, own: bool) -> Parts:
    """The parts of a candidate's run, as `finetune` trains it where it isn't told: without LoRA where the methods have
    it so (one's own are as one's recipe says), and sparse to the end where that is what they are for."""
    update: dict[str, Any] = {"methods": configs}
    if without_lora(configs) and not own:
        update |= {"lora_r": 0, "lora_dtype": "fp32", "lora": {}, "load_in_4bit": False, "load_in_8bit": False}
    if any(config.stays_sparse for config in configs):
        update["deploy"] = "sparse"
    return dataclasses.replace(parts, recipe=parts.recipe.model_copy(update=update))


def _judged(name: str, configs: tuple[MethodConfig, ...], parts: Parts, dense: _Dense, rounds: int) -> Outcome:
    """One candidate, checked and timed, or refused."""
    against = "the same LoRA" if parts.recipe.lora_r else "all weights"
    methods = [plain_values(config) for config in configs]
    outcome = Outcome(name=name, methods=methods, verdict="not timed", against=against)
    try:
        outcome = _checked(outcome, configs, parts, dense)
        return outcome if outcome.verdict == "refused" else _timed(outcome, parts, dense, rounds)
    except Exception as error:  # one candidate's failure, out of memory too, costs the others nothing
        return dataclasses.replace(outcome, verdict="refused", reason=_reason(error))


def _seconds(step: TrainingStep) -> float:
    found = []
    for _ in range(3):
        start = time.perf_counter()
        step()
        found.append(time.perf_counter() - start)
    return min(found)


def _reason(error: Exception) -> str:
    if isinstance(error, (PlanError, ValueError, Unsupported, NotImplementedError)):
        return str(error)
    return f"it failed here: {type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _checked(outcome: Outcome, configs: tuple[MethodConfig, ...], parts: Parts, dense: _Dense) -> Outcome:
    """The outcome with its checks: refused if one fails."""
    plan(dense.base, *configs, seq_tokens=parts.recipe.seq_len)
    checks = distances(dense.small, configs, parts)
    if red := {check: found for check, found in checks.items() if not found < TOLERANCE}:
        what = "; ".join(
            f"{check}: relative distance {found:.1e}, {TOLERANCE:.0e} allowed" for check, found in red.items()
        )
        return dataclasses.replace(outcome, verdict="refused", reason=f"a check failed: {what}.", checks=checks)
    return dataclasses.replace(outcome, checks=checks)


def _timed(checked: Outcome, parts: Parts, dense: _Dense, rounds: int) -> Outcome:
    sparse = convert_step(copy.deepcopy(dense.base), dense.new_modules, parts)
    assert sparse.handle is not None
    saved = saved_activations(sparse.model, sparse.loss).total
    sites = _sites(sparse.handle.plan, dense.base)
    spent: dict[str, list[float]] = {"dense": [], "sparse": []}
    _, now = clock(parts.device)
    prefix = "base_model.model." if parts.recipe.lora_r else ""
    places = {f"{prefix}{site}": place for site, place in sites.items()}
    base = dense.baseline(parts)
    with following(base.step.model, now, places) as left, following(sparse.model, now, places) as right:

        def one(side: str, step: TrainingStep, found: Any, other: Any) -> None:
            found.spent, other.clock = {}, None  # an optimizer's hooks are global
            found.clock = now
            found.start()
            step()
            found.settle()
            spent[side].append(sum(s for (_, place), s in found.spent.items() if place.component == "part"))

        whole = compare(
            lambda: one("dense", base.step, left, right),
            lambda: one("sparse", sparse, right, left),
            rounds=rounds,
            device=parts.device,
        )
    part = ratio(spent["dense"][1:], spent["sparse"][1:], clock=whole.clock)
    return dataclasses.replace(
        checked,
        verdict=whole.verdict,
        step=whole,
        part=part,
        saved_bytes=saved,
        dense_saved_bytes=base.saved_bytes,
    )


def _sites(planned: Plan, base: nn.Module) -> dict[str, Place]:
    """Where the methods work: their sites are the `part`. An attention's own linears are not: they stay as they are."""
    attentions = {site.name for site in describe(base).attentions}
    found = {}
    for edit in planned.edits:
        found[edit.site] = Place("part", edit.layer)
        if edit.site in attentions:
            for child, module in base.get_submodule(edit.site).named_children():
                if hasattr(module, "weight"):
                    found[f"{edit.site}.{child}"] = Place("projection", edit.layer)
    return found


def _record(outcome: Outcome, configs: tuple[MethodConfig, ...], parts: Parts, rates: Rates) -> None:
    """Note a candidate's speed-ups for the planner, under the names of its methods."""
    if outcome.part is None:
        return
    rates.methods.setdefault("+".join(config.method for config in configs), []).append(
        {
            "tokens": parts.recipe.seq_len,
            "batch_size": parts.recipe.batch_size,
            "hidden": parts.config.hidden_size,
            "speedup": outcome.part.median,
            "step_speedup": outcome.step.median if outcome.step else None,
            "lora_r": parts.recipe.lora_r,
            "checkpointing": parts.recipe.gradient_checkpointing != "none",
            "configs": outcome.methods,
        }
    )
