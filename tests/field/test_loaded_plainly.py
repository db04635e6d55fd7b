"""What plain PEFT makes of a trained model's folder where nothing imports us: the same numbers, or a refusal.

Slow for their processes, which are the point.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import sparsetrain
from sparsetrain import FloodFillAttention, PQAttention, RoutedFFN, TokenSelection
from sparsetrain.core.errors import CheckpointError
from sparsetrain.hf.assets import resolve_model
from sparsetrain.hf.model.io import load
from tests.field.test_saved import adapted, converted, ids, logits, trainer
from tests.hf import runs
from tests.hf.test_deploy import gpt2

FLOOD = FloodFillAttention(block_tokens=8, filter_edge=5, keep_ratio=0.15, change_threshold=0, max_dense_steps=0)
METHODS: dict[str, list[Any]] = {
    "routed": [RoutedFFN(num_blocks=4, num_active=2, shared_ratio=0.25, partition="clustered", compensation="mean")],
    "pq": [PQAttention(num_keys=16, block_q=8, block_k=8, local_tokens=4)],
    "pq by token": [PQAttention(granularity="token", num_keys=24)],
    "flood": [FLOOD],
    "tokens": [TokenSelection(keep_ratio=0.4)],
}
METHODS["spt"] = METHODS["routed"] + METHODS["pq"]
PLAIN = """
import json, sys, torch, warnings
warnings.simplefilter("ignore")
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
asked, found = json.loads(sys.stdin.read()), {}
for name, (base, folder) in asked["folders"].items():
    try:
        if name.startswith("auto "):
            model = AutoPeftModelForCausalLM.from_pretrained(folder)
        else:
            base = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
            model = PeftModel.from_pretrained(base, folder)
        x = torch.tensor(asked["ids"])
        with torch.no_grad():
            found[name] = float(model.eval()(input_ids=x, labels=x).loss)
    except KeyError as error:
        found[name] = f"KeyError {error}"
assert not any(name.startswith("sparsetrain") for name in sys.modules)
print(json.dumps(found))
"""


def lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules="all-linear")  # PEFT writes the base model's name into it


def in_a_plain_process(folders: dict[str, tuple[Path | str, Path]], x: torch.Tensor) -> Any:
    """Loss by name, or the error, of a base model and an adapter; of a name that begins with `auto`, by
    AutoPeftModelForCausalLM."""
    asked = {"folders": {name: [str(place) for place in places] for name, places in folders.items()}, "ids": x.tolist()}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PLAIN], input=json.dumps(asked), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def loss(model: Any, x: torch.Tensor) -> float:
    with torch.no_grad():
        return float(model.eval()(input_ids=x, labels=x).loss)


def six_lines(base: Path | str, out: Path, methods: list[Any], batches: list[Any], **options: Any) -> Any:
    """As the README has them, up to `trainer.save_model`; the trained model."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    sparsetrain.sparsify(model, *methods, calibration=batches, deploy="dense")
    model = get_peft_model(model, lora())
    rows = [{"input_ids": batch["input_ids"][0], "labels": batch["input_ids"][0]} for batch in batches]
    arguments = TrainingArguments(
        str(out), per_device_train_batch_size=1, report_to="none", max_steps=3, learning_rate=1e-2, use_cpu=True,
        disable_tqdm=True, save_strategy="no", dataloader_pin_memory=False, **options,
    )  # fmt: skip
    run = Trainer(model, arguments, train_dataset=rows)  # type: ignore[arg-type]
    run.train()
    run.save_model(str(out / "final"))
    return model


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.filterwarnings("ignore:.*tie")
def test_deployed_dense_it_is_a_plain_adapter_with_the_same_loss(tmp_path: Path) -> None:
    """Of every method on a Llama, one with a tied head, and a GPT-2; one process loads all of them."""
    runs.llama(tmp_path / "llama")
    runs.llama(tmp_path / "tied", tie_word_embeddings=True)
    gpt2(tmp_path / "gpt2")
    x, batches = ids(1, 5), [{"input_ids": ids(1, seed)} for seed in range(4)]
    said: dict[str, float] = {}
    folders: dict[str, tuple[Path | str, Path]] = {}
    for kind in ("llama", "tied", "gpt2"):
        base = tmp_path / kind
        untrained = loss(AutoModelForCausalLM.from_pretrained(base), x)
        for name, methods in METHODS.items():
            out, which = tmp_path / kind / name, f"{kind}, {name}"
            said[which] = loss(six_lines(base, out, methods, batches), x)
            folders[which] = (base, out / "final")
            assert abs(said[which] - untrained) > 1e-3, which
    assert in_a_plain_process(folders, x) == pytest.approx(said, rel=1e-5)


@pytest.mark.slow
def test_six_lines_on_a_real_model(tmp_path: Path) -> None:
    """Slow for SmolLM2-135M, whose reloaded loss was another than the one in memory."""
    base = resolve_model("smollm2-135m")
    generator = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(100, 40_000, (1, 128), generator=generator)} for _ in range(4)]
    methods = [PQAttention(keep_ratio=0.25, from_depth=0.7), RoutedFFN.converted()]
    x = batches[0]["input_ids"]
    said = loss(six_lines(base, tmp_path, methods, batches), x)
    assert in_a_plain_process({"six": (base, tmp_path / "final")}, x)["six"] == pytest.approx(said, rel=1e-5)


def trained_sparse(folder: Path, name: str) -> Any:
    model, handle = converted(folder, METHODS[name], lora=False)
    model = adapted(model, handle, init_lora_weights=False, task_type="CAUSAL_LM")
    trainer(model, folder / name, [], steps=1).save_model(str(folder / name))
    return model


def test_deployed_sparse_plain_peft_refuses_it_in_a_process_without_us(tmp_path: Path) -> None:
    said = {name: loss(trained_sparse(tmp_path, name), ids(1, 5)) for name in METHODS}
    base = tmp_path / "base"
    places = {f"{way}{name}": (base, tmp_path / name) for name in METHODS for way in ("", "auto ")}
    found = in_a_plain_process(places, ids(1, 5))
    # selected tokens run as in the dense model
    assert [found.pop(name) for name in ("tokens", "auto tokens")] == pytest.approx([said["tokens"]] * 2, rel=1e-5)
    assert set(found.values()) == {"KeyError 'SPARSETRAIN_LORA'"} and len(found) == 2 * len(METHODS) - 2


def test_deployed_sparse_plain_peft_refuses_it_beside_us_and_takes_it_on_a_converted_model(tmp_path: Path) -> None:
    expected = logits(trained_sparse(tmp_path, "spt"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    folder, auto = str(tmp_path / "spt"), AutoPeftModelForCausalLM
    for wrong in (
        lambda: PeftModel.from_pretrained(base, folder),
        lambda: PeftModel.from_pretrained(base, folder, config=lora()),
        lambda: auto.from_pretrained(folder),
        lambda: AutoModelForCausalLM.from_pretrained(folder),
        lambda: base.load_adapter(folder),
    ):
        with pytest.raises(CheckpointError, match="On the dense model it would compute something else"):
            wrong()
    model, _ = converted(tmp_path, METHODS["spt"], lora=False, seed=9)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(model, folder)), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(load(folder).model), expected, rtol=0, atol=1e-5)


def test_a_folder_from_before_this_kind_loads(tmp_path: Path) -> None:
    expected = logits(trained_sparse(tmp_path, "spt"))
    config = tmp_path / "spt" / "adapter_config.json"
    values = json.loads(config.read_text())
    assert values["peft_type"] == "SPARSETRAIN_LORA"
    config.write_text(json.dumps(values | {"peft_type": "LORA"}))
    torch.testing.assert_close(logits(load(tmp_path / "spt").model), expected, rtol=0, atol=1e-5)
    with pytest.raises(CheckpointError, match="converted with no method"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(tmp_path / "spt"))


def test_a_checkpoint_that_is_deployed_dense_is_plain_though_it_knows_its_methods(tmp_path: Path) -> None:
    runs.llama(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    sparsetrain.sparsify(model, *METHODS["spt"], calibration=[{"input_ids": ids(4, 1)}], deploy="dense")
    model = get_peft_model(model, lora())
    trainer(model, tmp_path / "out", [], save_strategy="steps", save_steps=3).train()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    got = PeftModel.from_pretrained(base, str(tmp_path / "out" / "checkpoint-3"))
    torch.testing.assert_close(logits(got), logits(model), rtol=0, atol=1e-5)
