"""Models, adapters and runs as a stranger would leave them, and the verbs that read them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sparsetrain.cli import run
from tests.hf import runs

SPARSE = "routed_ffn:num_blocks=4,num_active=2"
VERBS = ("eval", "export", "export-lora", "finetune", "plan", "predict", "pretrain", "profile", "sensitivity", "load")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama in `model`, a BERT in `bert` and text in `text`."""
    folder = tmp_path_factory.mktemp("field")
    runs.llama(folder / "model")
    runs.bert(folder / "bert")
    runs.text(folder / "text", files=4, words=300)
    return folder


def changed(source: Path, folder: Path, file: str = "config.json", **values: Any) -> Path:
    """A copy of a folder with other values in one of its JSON files."""
    shutil.copytree(source, folder)
    known = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps(known | values))
    return folder


def adapter(place: Path, folder: Path, **values: Any) -> Path:
    """A LoRA adapter on the Llama, with these values in its config."""
    import peft
    from transformers import AutoModelForCausalLM

    if not (made := place / "adapter").exists():
        model = AutoModelForCausalLM.from_pretrained(place / "model")
        peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).save_pretrained(made)
    base = {"base_model_name_or_path": str(place / "model"), "task_type": "CAUSAL_LM"}
    return changed(made, folder, "adapter_config.json", **(base | values))


def arguments(verb: str, model: Path, text: Path, output: Path) -> list[str]:
    """The command line of a verb on a model or adapter."""
    data = ["--data", str(text), "--seq-len", "32"]
    trained = [*data, "--eval-tokens", "64", "--steps", "1", "--output", str(output)]
    return {
        "eval": ["eval", str(model), *data, "--eval-tokens", "64"],
        "export": ["export", str(model), "--output", str(output)],
        "export-lora": ["export", str(model), "--output", str(output), "--keep-lora"],
        "finetune": ["finetune", "--model", str(model), *trained, "--method", SPARSE],
        "plan": ["plan", "--model", str(model), "--seq-len", "32", "--method", SPARSE],
        "predict": ["plan", "--model", str(model), "--seq-len", "32", "--goal", "fit", "--method", SPARSE],
        "pretrain": ["pretrain", "--model", str(model), *trained, "--tokenizer", str(model)],
        "profile": ["profile", "--model", str(model), "--seq-len", "32", "--method", SPARSE],
        "sensitivity": ["sensitivity", "--model", str(model), *data, "--eval-tokens", "64", "--method", SPARSE],
    }[verb]


def told(capsys: pytest.CaptureFixture[str], words: list[str]) -> tuple[int, str]:
    """(exit code, what was said) of a command; never a traceback, nor a fault of a library put on us."""
    capsys.readouterr()
    code = run(words)
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    assert "The run stopped" not in err, err
    return code, out + err


def assert_refused(capsys: pytest.CaptureFixture[str], words: list[str], *said: str) -> str:
    """The command ended with 2 and one line, which holds `said`."""
    code, text = told(capsys, words)
    assert code == 2, text
    line = text.strip().splitlines()[-1]
    assert line.startswith("sparsetrain: ") and line.isprintable() and len(line) < 900, line
    for word in said:
        assert word in line, line
    return line
