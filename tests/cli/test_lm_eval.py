"""EleutherAI's harness reads what a run leaves: an exported model, and a plain adapter on its base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.cli.conftest import Call, save_llama, write_text

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'sparsetrain[lm-eval]'")
ROWS = [
    {"question": "for x in", "choices": [" y", " (", " 0"], "answer": 0},
    {"question": "if x", "choices": [" else", " return", " )"], "answer": 1},
    {"question": "def self", "choices": [" (", " ="], "answer": 0},
    {"question": "import", "choices": [" while x", " y"], "answer": 1},
]


def task(folder: Path) -> None:
    """The file of docs/export.md, on rows in this folder."""
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
    text = page.partition("# tasks/mine.yaml")[2].partition("```")[0]
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "mine.yaml").write_text(text.replace("tasks/rows.jsonl", str(folder / "rows.jsonl")))


def accuracy(model: Any, tokenizer: Any) -> float:
    def told(row: dict[str, Any]) -> int:
        sums = []
        for choice in row["choices"]:
            prompt, whole = (tokenizer(text).input_ids for text in (row["question"], row["question"] + choice))
            with torch.no_grad():
                logs = model(torch.tensor([whole])).logits.log_softmax(-1)[0]
            sums.append(sum(float(logs[i - 1, whole[i]]) for i in range(len(prompt), len(whole))))
        return sums.index(max(sums))

    return sum(told(row) == row["answer"] for row in ROWS) / len(ROWS)


def test_an_exported_model_and_an_adapter(call: Call, tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    base, run, whole = save_llama(tmp_path / "llama"), tmp_path / "run", tmp_path / "whole"
    flags = "--seq-len 32 --steps 4 --batch-size 2 --lr 1e-1 --preset dense --eval-tokens 64 --device cpu --dtype fp32"
    data = write_text(tmp_path / "text.txt", 2000)
    trained = call("finetune", "--model", base, "--data", data, "--output", run, *flags.split())
    assert trained.code == 0, trained.err
    assert call("export", run, "--output", whole).code == 0
    task(tmp_path / "tasks")
    expected = accuracy(AutoModelForCausalLM.from_pretrained(whole), AutoTokenizer.from_pretrained(whole))
    for arguments in (f"pretrained={whole}", f"pretrained={base},peft={run / 'adapter'}"):
        found = simple_evaluate(
            model="hf",
            model_args=f"{arguments},dtype=float32",
            tasks=["mine"],
            task_manager=TaskManager(include_path=str(tmp_path / "tasks")),
            device="cpu",
            bootstrap_iters=0,
        )
        assert found["results"]["mine"]["acc,none"] == pytest.approx(expected)
