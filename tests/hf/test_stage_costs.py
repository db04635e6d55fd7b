"""What each stage of a growing run was planned to take, beside what it took: the bytes are equal, one by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sparsetrain.hf.study.stage_trace import planned_stages
from sparsetrain.hf.train.pretrain import PretrainRecipe, pretrain
from sparsetrain.hf.train.run import run_report
from sparsetrain.measure import render_text
from tests.hf import test_masked_growth_training as masked
from tests.hf import test_multi_level_training as levels
from tests.hf.test_pretrain import images
from tests.hf.test_stages import Kill, named

VIT = ["hidden/2 heads/2 layers=1", "hidden*2 heads*2 layers=2"]
RUNS: dict[str, Callable[[Path], PretrainRecipe]] = {
    "masked growth": masked.recipe,
    "masked growth, RMSNorm": masked.llama,
    "masked growth, ViT": lambda folder: images(folder, methods=[masked.PLAN | {"plan": VIT}], steps=8),
    "V-cycle": levels.recipe,
}


@pytest.mark.parametrize("name", RUNS)
def test_a_stage_holds_the_bytes_that_were_planned(name: str, tmp_path: Path) -> None:
    asked = named(RUNS[name](tmp_path), "out", dtype="fp32", save_every=0)
    result = pretrain(asked, forecast=planned_stages)
    costs, stages = result.run["stage_costs"], result.run["stages"]  # type: ignore[typeddict-item]
    assert len(costs) == len(stages) == 3
    for cost in costs:
        planned = cost["planned"]  # type: ignore[typeddict-item]
        assert (cost["static_bytes"], cost["saved_bytes"]) == (planned["static_bytes"], planned["saved_bytes"])
        assert planned["static_bytes"] < planned["peak_bytes"] and planned["time_s"] > 0
    assert len({cost["static_bytes"] for cost in costs}) > 1  # they are of other sizes
    text = [line for line in render_text(run_report(result)) if ", stage " in line]
    assert len(text) == 3 and all("; planned " in line for line in text)
    assert "<th>planned" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_a_run_that_goes_on_has_the_costs_of_all_stages(tmp_path: Path) -> None:
    asked = masked.recipe(tmp_path, dtype="fp32")
    for stop in (5, 8):  # inside of the first stage, and of the ramp
        with pytest.raises(KeyboardInterrupt):
            pretrain(named(asked, "out", resume=stop > 5), callbacks=[Kill(stop)], write=False, forecast=planned_stages)
    result = pretrain(named(asked, "out", resume=True), write=False, forecast=planned_stages)
    for cost in result.run["stage_costs"]:  # type: ignore[typeddict-item]
        planned = cost["planned"]  # type: ignore[typeddict-item]
        assert (cost["static_bytes"], cost["saved_bytes"]) == (planned["static_bytes"], planned["saved_bytes"])
