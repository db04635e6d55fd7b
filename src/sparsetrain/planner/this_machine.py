"""The rates of the device that a run takes here, for a plan that names none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sparsetrain.core.formats import Formats, recall_formats
from sparsetrain.planner.machines import MachineRates, known_machines

OF_A_SQUARE = 0.8
"""What products of a model's shapes reach of the rate of square ones: 160 of some 200 GFLOP/s on the built-in CPU."""
BUILT_IN_CORES = 2


def this_machine(folder: Path) -> MachineRates:
    """The rates of the GPU if there is one, measured in a second; else of the CPU, whose matrix products were timed.
    An Apple GPU has no rates yet: the CPU beside it stands in.

    What is remembered is taken without waiting for torch.

    Args:
        folder: where the timed formats are remembered.
    """
    formats = recall_formats(folder, "auto")
    if formats is None or formats.device != "cpu":
        from sparsetrain.measure.rates import formats_of, measure_rates

        formats = formats_of("auto", folder)
        if formats.device == "cuda":
            return MachineRates.from_dict(measure_rates("cuda", seconds=0.1).to_dict())
        if formats.device == "mps":
            beside = formats_of("cpu", folder)
            formats = replace(beside, gemm_flops={"fp32": beside.gemm_flops["fp32"]})  # as a run computes there
    return of_cpu(formats)


def of_cpu(formats: Formats) -> MachineRates:
    """A CPU's rates from its matrix products; the other rates are those of the built-in CPU, by threads.

    On a busy machine these cannot be timed in a moment: threads wait for each other, and not for what is timed.
    """
    like = known_machines()["cpu"]
    assert like.exp_per_s is not None
    threads, cores = formats.threads, formats.threads / BUILT_IN_CORES
    timed = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in formats.gemm_flops.items())
    return replace(
        like,
        machine=f"this CPU, {threads} threads",
        gemm_flops={name: OF_A_SQUARE * threads * rate for name, rate in formats.gemm_flops.items()},
        attention_flops=like.attention_flops * cores,
        exp_per_s=like.exp_per_s * cores,
        source=f"products timed here ({timed} GFLOP/s a thread); the rest as of {like.machine}",
    )
