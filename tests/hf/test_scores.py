"""Held-out scores: logits of the asked positions alone, where those are few, give what all logits give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from sparsetrain.hf.train.tasks import next_token_scores
from tests.families import llama_config


class Whole(LlamaForCausalLM):
    """As a model that cannot be told for which positions logits are wanted."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **more: Any) -> Any:  # type: ignore[override]
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **more)


def batch(targets: list[list[int]]) -> dict[str, torch.Tensor]:
    ids = torch.randint(64, (len(targets), 16), generator=torch.Generator().manual_seed(1))
    labels = torch.full_like(ids, -100)
    for row, places in enumerate(targets):
        labels[row, places] = ids[row, places]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.mark.parametrize("adapter", [False, True], ids=["plain", "peft"])
@pytest.mark.parametrize(
    ("kind", "targets", "positions"),
    [
        (LlamaForCausalLM, [[0, 3, 15], [7]], 3),  # 0 has nothing before it; 2, 6 and 14 predict
        (LlamaForCausalLM, [[5], []], 1),
        (LlamaForCausalLM, [[], []], 0),
        (LlamaForCausalLM, [list(range(16)), [2]], 16),
        (Whole, [[0, 3, 15], [7]], 16),
    ],
)
def test_logits_of_few_positions_score_as_all_do(
    kind: Any, targets: list[list[int]], positions: int, adapter: bool
) -> None:
    torch.manual_seed(0)
    model: Any = kind(llama_config(vocab_size=64)).eval()
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda _module, _args, out: seen.append(out.shape[1]))
    if adapter:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    given = batch(targets)
    with torch.no_grad():
        found = next_token_scores(model, given)
        logits = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), given["labels"][:, 1:].flatten(), reduction="sum")
    assert seen[0] == positions and found.loss == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    assert found.count == sum(place > 0 for row in targets for place in row)
