"""What `preset: auto` may take by the records can be planned; it says dense of what it cannot trace."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from sparsetrain.hf.model.model_config import read_config
from sparsetrain.hf.study.recipe_trace import outline
from sparsetrain.planner.quality import Deployed, deployed_records
from sparsetrain.recipes.finetune import Recipe


@pytest.mark.parametrize("record", deployed_records(), ids=lambda record: record.methods[0].method)
def test_it_can_be_traced(record: Deployed) -> None:
    task = record.where["task"][0]
    model = "minilm" if task == "classify" else "smollm2-135m"
    methods = [method.to_dict() for method in record.methods]
    recipe = Recipe.from_values({"data": "none", "model": model, "task": task, "methods": methods})
    config = AutoConfig.for_model(**read_config(model).values)
    assert outline(recipe, config, bf16=True, gpu=False, lengths=(256,)).peak(256).total > 0
