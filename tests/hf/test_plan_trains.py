"""A plan is kept: under a memory limit below dense LoRA's need, its recipe trains where dense LoRA dies."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sparsetrain.hf.predict import Predictor, predict, read_config, recipe_yaml
from sparsetrain.planner.machines import known_machines
from sparsetrain.planner.search import Question

TOKENS = 768
TRAIN = """
import resource, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
from sparsetrain import plan, sparsify
from sparsetrain.hf.assemble import add_lora
from sparsetrain.hf.assets import resolve_model
from sparsetrain.hf.outline import example_batch, recompute, training_step
from sparsetrain.hf.recipe import Recipe
from sparsetrain.surgery.plan import blank_state

recipe, limit = Recipe.from_yaml(sys.argv[1], {"data": "none"}), int(sys.argv[2])
torch.set_num_threads(1)
torch.randn(64, 64).mm(torch.randn(64, 64))  # the libraries' own buffers are there before the limit is set
data = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
base = int(data.split()[1]) * 1024
# data segments, not address space: files that are mapped and stacks that are reserved take no memory
resource.setrlimit(resource.RLIMIT_DATA, (base + limit, base + limit))
model = AutoModelForCausalLM.from_pretrained(resolve_model(recipe.model), dtype=torch.float32)
handle = None
if recipe.methods:
    handle = sparsify(model, *recipe.configs, state=blank_state(plan(model, *recipe.configs).edits))
model = add_lora(model, recipe, handle, [])
model.train()
if recipe.gradient_checkpointing != "none":
    recompute(model)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
step = training_step(model, handle, example_batch(recipe, model.config, recipe.seq_len, rows=1), False)
for _ in range(2):
    loss = step()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
print("trained", float(loss))
"""


def train(recipe: Path, limit: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", TRAIN, str(recipe), str(limit)], capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.assets
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA limits memory on Linux")
def test_the_planned_run_stays_under_a_limit_where_dense_lora_dies(tmp_path: Path) -> None:
    base = {"seq_len": TOKENS, "batch_size": 1, "grad_accum": 1}
    predictor = Predictor(read_config("smollm2-135m"), base, bf16=False, cache=None)
    free = predict(predictor, Question(tokens=TOKENS, rates=known_machines()["cpu"]))
    need = next(row.peak.total for row in free.rows if row.candidate.label == "LoRA" and row.peak is not None)
    limit = int(0.7 * need)
    made = predict(predictor, Question(tokens=TOKENS, memory_bytes=limit, rates=known_machines()["cpu"]))
    assert made.picked is not None and made.picked.candidate.label != "LoRA"
    planned, dense = tmp_path / "plan.yaml", tmp_path / "dense.yaml"
    planned.write_text(recipe_yaml(made, predictor, data=None))
    dense.write_text(f"model: smollm2-135m\nmethods: []\nseq_len: {TOKENS}\n")
    # allocators round up and keep some: 8 % above the prediction is what the plan's rows are measured to need
    done = train(planned, int(1.08 * limit))
    assert done.returncode == 0 and "trained" in done.stdout, done.stderr[-1500:]
    died = train(dense, int(1.08 * limit))
    assert died.returncode != 0 and "allocate" in died.stderr, died.stdout
    assert "trained" in train(dense, int(1.3 * need)).stdout
