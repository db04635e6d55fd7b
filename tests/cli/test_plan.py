from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from rich.console import Console

from sparsetrain.cli.answer import table
from sparsetrain.cli.predict import parse_bytes
from sparsetrain.cli.prediction import _guessed
from sparsetrain.planner.candidates import candidates
from sparsetrain.planner.optimizers import KINDS
from tests.cli.conftest import Call
from tests.hf.test_predict import config_file  # noqa: F401


@pytest.fixture(scope="session")
def outlines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("outlines")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, outlines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each test its own but for the traces, which take seconds: most tests ask of one tiny model."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "outlines").symlink_to(outlines)
    monkeypatch.setenv("SPARSETRAIN_CACHE", str(tmp_path / "cache"))


def test_sizes() -> None:
    assert parse_bytes("24GB") == 24 * 10**9 and parse_bytes("1.5 gib") == 3 * 2**29 and parse_bytes("7") == 7
    for wrong in ("many", "-1GB", "0", "3 apples"):
        with pytest.raises(ValueError, match="is no size"):
            parse_bytes(wrong)


def test_a_goal_is_answered_and_written(call: Call, config_file: Path, tmp_path: Path) -> None:  # noqa: F811
    written, drawn = tmp_path / "plan.yaml", tmp_path / "plan.png"
    flags = ("plan", "--model", config_file, "--lora-r", 4, "--seq", 128, "--preset", "dense")
    told = call(*flags, "--memory", "1GB", "--write", written, "--plot", drawn)
    assert told.code == 0 and "Take: LoRA" in told.out and "finetune --recipe" in told.out
    assert yaml.safe_load(written.read_text())["seq_len"] == 128
    assert drawn.read_bytes().startswith(b"\x89PNG")
    longest = call(*flags, "--memory", "1GB", "--fit", "seq", "--json").json
    assert longest["ok"] and longest["rows"][0]["longest"] > 128 and longest["traced"] == 0


def test_exact_tools_come_first_with_their_cost_and_the_memory_by_length(call: Call, config_file: Path) -> None:  # noqa: F811
    flags = ("plan", "--model", config_file, "--lora-r", 4, "--seq", 2048, "--preset", "dense", "--gpu", "a100")
    told = call(*flags)
    assert "LoRA + checkpointing: exact; " in told.out and "wait in the CPU's memory" in told.out
    assert "Memory by context length" in told.out and " 8,192" in told.out
    found = call(*flags, "--json").json
    ways = {row["candidate"]["label"]: row for row in found["rows"]}
    peaks = [ways[label]["peak"]["total"] for label in ("LoRA", "LoRA + tiled MLP", "LoRA + checkpointing")]
    assert peaks == sorted(peaks, reverse=True)
    assert ways["LoRA + checkpointing + offload + tiled MLP"]["candidate"]["values"]["activation_offloading"] is True
    lengths = dict(map(tuple, ways["LoRA"]["by_length"]))
    assert lengths[2048] == peaks[0] and list(lengths.values()) == sorted(lengths.values())
    assert not any("offload" in candidate.label for candidate in candidates({"lora_r": 4}))  # on a CPU
    assert ways["LoRA + 4-bit + checkpointing"]["risk"]["exact"] is False
    factors, plain = ways["LoRA + bf16 factors + checkpointing"], ways["LoRA + checkpointing"]
    assert factors["candidate"]["values"]["lora_dtype"] == "bf16" and factors["risk"]["exact"] is False
    assert plain["peak"]["optimizer"] * 0.5 <= factors["peak"]["optimizer"] < plain["peak"]["optimizer"] * 0.6


def test_a_plan_of_all_weights_compares_optimizers_and_says_that_their_time_is_unknown() -> None:
    """Their bytes are counted by `planner.optimizers`, whose tests compare them with bitsandbytes' own."""
    ways = {c.label.removeprefix("all weights + checkpointing + "): c for c in candidates({"lora_r": 0}, gpu=True)}
    asked = {label: way.values["optim"] for label, way in ways.items() if "AdamW" in label}
    assert asked == {
        "paged AdamW": "paged_adamw",
        "8-bit AdamW": "adamw_8bit",
        "paged 8-bit AdamW": "paged_adamw_8bit",
    }
    assert set(asked.values()) <= KINDS.keys()
    assert not ways["paged AdamW"].rounds and ways["8-bit AdamW"].rounds  # paged: the same numbers, elsewhere
    assert all("time of its update is not known" in ways[label].untimed for label in asked)
    assert not any("AdamW" in c.label for c in candidates({"lora_r": 0, "training": {"optim": "sgd"}}, gpu=True))
    assert not any("bf16" in c.label for c in candidates({"lora_r": 4, "lora_dtype": "bf16"}, gpu=True))


def test_of_another_machine_it_is_not_said_where_monarch_is_faster(call: Call, config_file: Path) -> None:  # noqa: F811
    told = call("plan", "--model", config_file, "--seq", 128, "--method", "monarch", "--gpu", "cpu")
    assert told.code == 0 and "monarch: not timed on that machine" in told.out and "monarch: faster" not in told.out


def test_the_longest_row_of_the_data_is_planned(call: Call, llama: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": "a" * length, "completion": "b"} for length in (5, 9, 60, 90)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("plan", "--model", llama, "--lora-r", 4, "--preset", "dense", "--memory", "1GB", "--task", "sft")
    told = call(*flags, "--seq-len", 128, "--data", data)
    assert told.code == 0 and "rows, the longest of 92 tokens" in told.out and "none is cut at seq_len=128" in told.out
    assert "1 x 92 tokens" in told.out
    cut = call(*flags, "--seq-len", 64, "--data", data, "--json").json
    assert cut["data"]["longest"] == 92 and cut["data"]["cut"] == 1 and cut["question"]["tokens"] == 64
    missing = call(*flags, "--seq-len", 128, "--data", tmp_path / "none.jsonl")
    assert missing.code == 0 and "cannot be read, so full ones are planned" in missing.err


def test_an_answer_from_the_cache_does_not_wait_for_torch(call: Call, config_file: Path) -> None:  # noqa: F811
    flags = ("plan", "--model", config_file, "--lora-r", 4, "--seq", 128, "--preset", "spt", "--memory", "1GB")
    first = call(*flags)
    code = (
        "import sys; from sparsetrain.cli import run; code = run(sys.argv[1:]); "
        "print('heavy:', [m for m in ('torch', 'transformers', 'numpy') if m in sys.modules]); sys.exit(code)"
    )
    again = subprocess.run([sys.executable, "-c", code, *map(str, flags)], capture_output=True, text=True)
    assert again.returncode == first.code == 0, again.stderr
    assert again.stdout.splitlines()[-1] == "heavy: []" and "Take: LoRA" in again.stdout


def test_an_impossible_goal_ends_with_1_and_says_the_nearest(call: Call, config_file: Path) -> None:  # noqa: F811
    told = call(
        "plan", "--model", config_file, "--lora-r", 4, "--seq-len", 128, "--preset", "dense", "--memory", "450.1MB"
    )
    assert told.code == 1 and "Nearest possible" in told.out and "GB for what was asked" in told.out
    assert "with --dtype bf16: " in told.out  # before a smaller model


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--goal", "spede"), "Did you mean 'speed'"),
        (("--gpu", "h20"), "Did you mean 'h200'"),
        (("--fit", "seq"), "needs --memory"),
        (("--memory", "lots"), "is no size"),
    ],
)
def test_wrong_goals_are_explained(call: Call, config_file: Path, flags: tuple[str, ...], message: str) -> None:  # noqa: F811
    told = call("plan", "--model", config_file, *flags)
    assert told.code == 2 and message in told.err


@pytest.mark.slow  # traces five ways to train a model of eight billion parameters
def test_the_plan_of_the_readme_is_of_the_machine_that_it_names_and_has_an_answer(call: Call) -> None:
    lines = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith("sparsetrain plan "))
    told = call(*line.partition("#")[0].split()[1:])
    assert told.code == 0, told.err
    assert "bf16, NVIDIA RTX 4090" in told.out and "Take: " in told.out


def test_a_plan_of_no_named_machine_is_of_this_one(
    call: Call,
    config_file: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the format that a run takes here; the machine that is named counts where one is."""
    from sparsetrain.core.formats import Formats, remember_formats
    from sparsetrain.hf.assets import cache_folder

    fast = Formats(device="cpu", gemm_flops={"fp32": 1e11, "bf16": 4e11}, threads=4)
    remember_formats(cache_folder() / "machine", "auto", fast)
    flags = ("plan", "--model", config_file, "--lora-r", 4, "--seq", 128, "--preset", "dense", "--memory", "1GB")
    assert call(*flags, "--json").json["question"]["dtype"] == "fp32"  # as the environment of the tests says
    assert call(*flags, "--gpu", "4090", "--json").json["question"]["dtype"] == "bf16"
    monkeypatch.delenv("SPARSETRAIN_DTYPE")
    here = call(*flags, "--json").json["question"]
    assert here["dtype"] == "bf16" and here["rates"]["machine"] == "this CPU, 4 threads"
    assert here["rates"]["gemm_flops"] == {"fp32": pytest.approx(3.2e11), "bf16": pytest.approx(12.8e11)}
    assert call(*flags, "--dtype", "fp32", "--json").json["question"]["dtype"] == "fp32"
    assert call(*flags, "--gpu", "cpu", "--json").json["question"]["dtype"] == "fp32"


def test_a_plan_of_several_models_says_each_stage(call: Call, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "grown.yaml"
    values = {"model": "gpt2-nano", "data": str(text), "seq_len": 64, "batch_size": 2, "steps": 40, "dtype": "fp32"}
    file.write_text(yaml.safe_dump({**values, "output": str(tmp_path / "run"), "methods": ["multi_level"]}))
    told = call("plan", "--recipe", file)
    lines = " ".join(told.out.split())
    assert told.code == 0 and "3 of 3, level 1: 4 layers x 128" in lines and "peak" in lines and "FLOP" in lines
    found = call("plan", "--recipe", file, "--json").json
    assert [stage["name"] for stage in found["stages"]] == ["level 1, start", "level 2", "level 1"]
    assert found["forecasts"][1]["peak_bytes"] < found["forecasts"][2]["peak_bytes"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("own", [{}, {"set": {"n_layer": 2}}, {"methods": ["semi_structured"]}])
def test_a_plan_of_a_recipe_for_pretrain_is_its_preview(
    call: Call, text: Path, tmp_path: Path, own: dict[str, object]
) -> None:
    file = tmp_path / "pretrain.yaml"
    values = {"model": "gpt2-nano", "data": str(text), "seq_len": 64, "batch_size": 2, "steps": 4, "dtype": "fp32"}
    file.write_text(yaml.safe_dump({**values, "output": str(tmp_path / "run"), **own}))
    told = call("plan", "--recipe", file)
    assert told.code == 0 and "gpt2-nano" in told.out and "all weights" in told.out, told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "code"), [("adamx", 2), ("adagrad", 0), ("adamw_torch", 0)])
def test_an_optimizer_that_nobody_knows_is_refused(name: str, code: int, call: Call, config_file: Path) -> None:  # noqa: F811
    result = call("plan", "--model", config_file, "--preset", "dense", "--gpu", "cpu", "--optim", name, "--json")
    assert result.code == code and (not code or "--optim 'adamx' is unknown" in result.json["error"]["message"])


def test_a_narrow_terminal_breaks_no_name() -> None:
    """Names of ways to train are typed after --method: `token_selecti` on a line and `on` below it are not."""
    names = ["way to train", "peak", "saved", "step", "max\nseq", "max\nbatch", "fits", "quality"]
    rows = [
        ["LoRA + ckpt + offload + tiled MLP", "9.53", "0.02", "0.584 s", "131,072", "759", "yes", "exact"],
        ["token_selection", "11.25", "1.74", "0.16 s", "90,176", "77", "yes", "x1"],
    ]
    console = Console(file=io.StringIO(), width=80)
    console.print(table("", names, rows, right=(1, 2, 3, 4, 5)))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= 80 and any(line.startswith(" token_selection ") for line in lines)
    assert "759" in console.file.getvalue() and "x1" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_gpus_step_that_is_the_rooflines_word_is_said_to_be() -> None:
    assert "no step of it was timed on that GPU" in _guessed(SimpleNamespace(timed=""), SimpleNamespace(gpu=True))
    assert not _guessed(SimpleNamespace(timed="bench"), SimpleNamespace(gpu=True))
    assert not _guessed(SimpleNamespace(timed=""), SimpleNamespace(gpu=False))
