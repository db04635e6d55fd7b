"""A plan is kept: under a memory limit below dense LoRA's need, its recipe trains where dense LoRA dies."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparsetrain.hf.model.model_config import read_config
from sparsetrain.hf.study.predict import predictor_of
from sparsetrain.planner.candidates import candidates, recipe_yaml
from sparsetrain.planner.machines import known_machines
from sparsetrain.planner.predictor import predict
from sparsetrain.planner.search import Question

TOKENS = 768
TRAIN = """
import gc, resource, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
from sparsetrain import plan, sparsify
from sparsetrain.hf.model.models import add_lora
from sparsetrain.hf.assets import resolve_model
from sparsetrain.hf.model.checkpointing import recompute
from sparsetrain.hf.study.recipe_trace import example_batch, training_step
from sparsetrain.recipes.finetune import Recipe
from sparsetrain.surgery.method import blank_state

recipe, limit = Recipe.from_yaml(sys.argv[1], {"data": "none"}), int(sys.argv[2])
torch.set_num_threads(1)
torch.randn(64, 64).mm(torch.randn(64, 64))  # the libraries' own buffers are there before the limit is set
model = AutoModelForCausalLM.from_pretrained(resolve_model(recipe.model), dtype=torch.float32)
handle = None
if recipe.methods:
    handle = sparsify(model, *recipe.configs, state=blank_state(plan(model, *recipe.configs).edits))
model = add_lora(model, recipe, handle, [])
model.train()
if recipe.gradient_checkpointing != "none":
    recompute(model)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
gc.collect()
data = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
weights = sum(p.numel() * p.element_size() for p in model.parameters())
# Data segments, not address space: reserved address space takes no memory. What is there now beside the weights
# (interpreter, libraries, what loading left) is not the plan's.
allowed = int(data.split()[1]) * 1024 - weights + limit
resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))
step = training_step(model, example_batch(recipe, model.config, recipe.seq_len, rows=1), False)
for _ in range(2):
    loss = step()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
print("trained", float(loss))
"""


def train(recipe: Path, limit: int) -> subprocess.CompletedProcess[str]:
    # freed memory returns to the system at once, and one arena: the limit then counts tensors
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", TRAIN, str(recipe), str(limit)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | malloc)


@pytest.mark.slow
@pytest.mark.assets
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA limits memory on Linux")
def test_the_planned_run_stays_under_a_limit_where_dense_lora_dies(tmp_path: Path) -> None:
    base = {"seq_len": TOKENS, "batch_size": 1, "grad_accum": 1}
    predictor = predictor_of(read_config("smollm2-135m"), base, bf16=False, cache=None)
    some = [c for c in candidates(base) if "methods" in c.values and len(c.values["methods"]) < 2]
    some = [c for c in some if c.label.startswith(("LoRA", "token_selection"))]  # the others take minutes to trace
    free = predict(predictor, Question(tokens=TOKENS, rates=known_machines()["cpu"]), some)
    need = next(row.peak.total for row in free.rows if row.candidate.label == "LoRA" and row.peak is not None)
    limit = int(0.7 * need)
    made = predict(predictor, Question(tokens=TOKENS, memory_bytes=limit, rates=known_machines()["cpu"]), some)
    assert made.picked is not None and made.picked.candidate.label != "LoRA"
    planned, dense = tmp_path / "plan.yaml", tmp_path / "dense.yaml"
    planned.write_text(recipe_yaml(made, predictor.recipe(made.picked.candidate), data=None))
    dense.write_text(f"model: smollm2-135m\nmethods: []\nseq_len: {TOKENS}\n")
    # allocators round up and keep some: 8 % above the prediction is what the plan's rows are measured to need
    done = train(planned, int(1.08 * limit))
    assert done.returncode == 0 and "trained" in done.stdout, done.stderr[-1500:]
    died = train(dense, int(1.08 * limit))
    assert died.returncode != 0 and "allocate" in died.stderr, died.stdout
    assert "trained" in train(dense, int(1.3 * need)).stdout
