"""Eight short runs of the command line on real text, and what they gave when they were recorded.

Modules may move and be cut anew; what is trained must not change with them, to the last bit. So losses, qualities and
saved tensors of each run are kept in `tests/hf/recorded_runs.json`, and nothing of the package is imported to repeat
them: only the command line is called, which stays where it is.

    python -m tests.recorded              compare this code with the record
    python -m tests.recorded --record     rewrite the record, after a change that is meant to change results
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from safetensors import deserialize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import sparsetrain
from sparsetrain.measure.machine import cpu_fields

RECORD = Path(__file__).parent / "hf" / "recorded_runs.json"
SOURCE = Path(sparsetrain.__file__).resolve().parents[1]

Fields = dict[str, Any]
"""What a run gave: steps/3/loss, quality/perplexity/dense, tensors/<folder>/<file>/<key>, ... -> value."""

Strictness = Literal["bits", "numbers", "names"]
"""What of a run is compared: everything; losses and qualities up to rounding; the names of the fields only."""

RTOL = 2e-3
"""How far apart losses and qualities may be on two machines, whose kernels round differently."""

ONE_ROW = 0.04
"""How far apart accuracies may be there: of some thirty held-out texts, one may change sides."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run: `command` is finetune or pretrain; `recipe` is YAML with paths relative to the run's folder.

    Together the recipes reach what a step can be made of: adapters and all weights, accumulated and recomputed
    gradients, distillation, evaluation on the way, and each schedule before and after it turns.
    """

    command: str
    recipe: str

    @property
    def values(self) -> dict[str, Any]:
        return yaml.safe_load(self.recipe)


HERE = """
output: out
device: cpu
threads: 1
dtype: fp32
"""

# 192 tokens, because 64 keys are kept at the least
LLAMA = f"""{HERE}
model: ./llama
data: python-stdlib
seq_len: 192
batch_size: 2
calibration_tokens: 1536
eval_tokens: 1536
steps: 8
save_every: 4
"""

GPT2 = f"""{HERE}
model: gpt2-nano
set: {{n_layer: 2, n_embd: 64}}
data: python-stdlib
seq_len: 128
batch_size: 4
eval_tokens: 2048
lr: 3.0e-3
warmup_steps: 2
steps: 12
save_every: 6
"""

RUNS = {
    "spt": Run(
        command="finetune",
        recipe=f"""{LLAMA}
preset: spt
lora_r: 4
lr: 1.0e-2
""",
    ),
    # at ten times the rate, rounding on another machine makes queries choose other keys, and losses part by 0.4 %
    "spt-paper": Run(
        command="finetune",
        recipe=f"""{LLAMA}
preset: spt-paper
lora_r: 4
lr: 1.0e-3
gradient_checkpointing: non-reentrant
""",
    ),
    "tokens": Run(
        command="finetune",
        recipe=f"""{LLAMA}
preset: tokens
lora_r: 0
lr: 1.0e-3
weight_decay: 0.1
""",
    ),
    "spt+tokens": Run(
        command="finetune",
        recipe=f"""{LLAMA}
preset: spt+tokens
lora_r: 4
lr: 1.0e-2
distill_steps: 3
deploy: sparse
grad_accum: 2
""",
    ),
    "dense": Run(
        command="finetune",
        recipe=f"""{LLAMA}
preset: dense
lora_r: 4
lora_targets: [q_proj, v_proj]
lr: 1.0e-2
lr_schedule: linear
warmup_steps: 2
eval_every: 3
""",
    ),
    "classify": Run(
        command="finetune",
        recipe=f"""{HERE}
model: minilm
data: movie-reviews
task: classify
seq_len: 64
batch_size: 4
lora_r: 4
lr: 1.0e-3
calibration_tokens: 1024
eval_tokens: 2048
steps: 8
save_every: 4
methods:
- {{method: routed_ffn, num_active: 1, shared_ratio: 0.5, partition: clustered, compensation_rank: 16, layers: 3-5}}
- {{method: token_selection}}
""",
    ),
    # three looks at the maps, at steps 2, 4 and 6; then sparse
    "flood_fill_attention": Run(
        command="pretrain",
        recipe=f"""{GPT2}
methods:
- {{method: flood_fill_attention, block_tokens: 8, filter_edge: 5, quantile: 0.8, probe_every: 2, max_dense_steps: 8,
   change_threshold: 1000, restart_lr: true}}
""",
    ),
    # new masks at steps 0, 4 and 8; dense from step 9 on
    "semi_structured": Run(
        command="pretrain",
        recipe=f"""{GPT2}
methods:
- {{method: semi_structured, wgrad: mvue, refresh_every: 4, dense_tail_ratio: 0.25}}
""",
    ),
}


def carry_out(run: Run, folder: Path) -> Fields:
    """Run the command line in a process of its own, in `folder`, and collect what it gave."""
    if run.values["model"] == "./llama":
        save_llama(folder / "llama")
    (folder / "recipe.yaml").write_text(run.recipe, encoding="utf-8")
    command = [sys.executable, "-m", "sparsetrain.cli", run.command, "--recipe", "recipe.yaml", "--json"]
    done = subprocess.run(command, cwd=folder, env=_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[2:])} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return {**_numbers(json.loads(done.stdout)), **_tensors(folder / "out", run.values["save_every"])}


def save_llama(folder: Path) -> None:
    """A random Llama of four layers that reads bytes: a tokenizer of real text that needs no download."""
    bytes_as_text = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<pad>", "<s>", "</s>", *bytes_as_text]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokens),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=256,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    for parameter in model.parameters():  # the default 0.02 leaves attention uniform and FFNs silent
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def _environment() -> dict[str, str]:
    """This process's environment, with the source that it imports, one thread, and the hub left alone."""
    path = os.pathsep.join([str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])])
    fixed = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    return os.environ | fixed | {"PYTHONPATH": path}


def _numbers(answer: dict[str, Any]) -> Fields:
    """The numbers of a result that the machine's speed and memory have no part in."""
    run = answer["run"]
    found: Fields = {key: answer[key] for key in ("data_order", "parameters", "trainable_parameters")}
    for step in run["steps"]:
        for key in ("learning_rate", "loss", "grad_norm"):
            found[f"steps/{step['step']}/{key}"] = step[key]
    for metric in ("perplexity", "accuracy"):
        for stage, value in run.get(metric, {}).items():
            found[f"quality/{metric}/{stage}"] = value
    for point in run["evals"]:
        found[f"evals/{point['step']}/loss"] = point["loss"]
    return found


def _tensors(output: Path, middle: int) -> Fields:
    """The digest of every tensor in the saved result and in the checkpoint of step `middle`."""
    saved = next(output / name for name in ("adapter", "model") if (output / name).is_dir())
    found: Fields = {}
    for folder in (saved, output / f"checkpoint-{middle}"):
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise RuntimeError(f"{folder} holds no tensors.")
        for file in files:
            for key, tensor in deserialize(file.read_bytes()):
                found[f"tensors/{folder.name}/{file.name}/{key}"] = _digest(tensor)
    return dict(sorted(found.items()))  # a file does not keep the order of its keys


def _digest(tensor: dict[str, Any]) -> str:
    about = f"{tensor['dtype']} {list(tensor['shape'])}".encode()
    return hashlib.sha256(about + bytes(tensor["data"])).hexdigest()


def this_machine() -> dict[str, Any]:
    """What decides how sums are rounded: processor, the kernels chosen for it, and versions."""
    fields = cpu_fields()
    flags = fields.get("flags") or fields.get("Features") or ""
    kinds = ("avx", "fma", "amx", "asimd", "sve", "bf16")
    packages = ("torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors", "datasets", "numpy")
    return {
        "cpu": " ".join(fields.get(key, "?") for key in ("model name", "cpu family", "model", "stepping")),
        "flags": " ".join(sorted(flag for flag in flags.split() if flag.startswith(kinds))),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}},
    }


def strictness(run: Run, recorded: dict[str, Any], here: dict[str, Any]) -> Strictness:
    """How much of a run this machine can repeat: all bits of its own record, else numbers up to rounding.

    With another Python the standard library is another text, and only the names of the fields can be compared.
    """
    if recorded == here:
        return "bits"
    same_text = run.values["data"] != "python-stdlib" or recorded["versions"]["python"] == here["versions"]["python"]
    return "numbers" if same_text else "names"


def differences(name: str, expected: Fields, found: Fields, strict: Strictness) -> list[str]:
    """Where a run differs from its record, a line a field, in the order in which a run goes wrong."""
    nothing = "no such field"
    pairs = {field: (expected.get(field, nothing), found.get(field, nothing)) for field in [*expected, *found]}
    return [
        f"{name}: {field}: expected {wanted!r}, found {got!r}"
        for field, (wanted, got) in pairs.items()
        if nothing in (wanted, got) or not _agree(field, wanted, got, strict)
    ]


def _agree(field: str, wanted: Any, got: Any, strict: Strictness) -> bool:
    if strict == "names" or (strict == "numbers" and (field.startswith("tensors/") or field.endswith("/grad_norm"))):
        return True
    if strict == "numbers" and isinstance(wanted, float) and isinstance(got, float):
        return math.isclose(wanted, got, rel_tol=RTOL, abs_tol=ONE_ROW if "/accuracy/" in field else 0.0)
    return wanted == got


def compare(name: str, folder: Path) -> tuple[Strictness, list[str]]:
    """Carry out a run and hold it against the record."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    strict = strictness(RUNS[name], record["machine"], this_machine())
    return strict, differences(name, record["runs"][name], carry_out(RUNS[name], folder), strict)


def check() -> bool:
    """Compare every run with the record and print what was found; True if all agree."""
    recorded, here = json.loads(RECORD.read_text(encoding="utf-8"))["machine"], this_machine()
    changed = ", ".join(key for key in recorded if recorded[key] != here[key])
    print(f"{SOURCE}, on {f'another machine ({changed})' if changed else 'the machine of the record'}", flush=True)
    agree = True
    for name in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            strict, found = compare(name, Path(folder))
        print("\n".join(found) or f"{name}: equal ({strict})", flush=True)
        agree = agree and not found
    return agree


def record() -> None:
    """Carry out every run and rewrite the record."""
    runs: dict[str, Fields] = {}
    for name, run in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            runs[name] = carry_out(run, Path(folder))
        print(f"{name}: {len(runs[name])} fields recorded", flush=True)
    text = json.dumps({"machine": this_machine(), "runs": runs}, indent=1, allow_nan=False)
    RECORD.write_text(text + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare this code's short runs with their record.")
    parser.add_argument("--record", action="store_true", help="rewrite the record instead")
    if parser.parse_args().record:
        record()
    elif not check():
        sys.exit(1)


if __name__ == "__main__":
    main()
