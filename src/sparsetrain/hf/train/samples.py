"""What a trained language model answers to held-out prompts: read beside the numbers, it shows what they mean."""

from __future__ import annotations

import time
from typing import Any

import torch

from sparsetrain.core.modes import evaluating
from sparsetrain.data.prompts import prompt_of, spread
from sparsetrain.data.special_tokens import padding_id
from sparsetrain.hf.train.journal import Journal
from sparsetrain.hf.train.parts import Parts
from sparsetrain.measure.schema import Sample

COUNT, TOKENS, SECONDS = 3, 48, 20.0
"""Prompts, the most new tokens of each, and when to stop."""
SHOWN = 400
"""Characters of a prompt that are kept: its end, which the answer follows."""


def samples(model: Any, parts: Parts, *, seconds: float = SECONDS) -> list[Sample]:
    """Greedy completions of held-out prompts, in evaluation mode: the deployed model's.

    The same prompts for every model of a recipe: the first prompts of evenly spaced rows. No prompt is begun after
    `seconds`, and a completion ends there.
    """
    assert parts.bundle.eval is not None
    rows, tokenizer, device = parts.bundle.eval, parts.tokenizer, next(model.parameters()).device
    found: list[Sample] = []
    end = time.monotonic() + seconds
    with evaluating(model), torch.no_grad():
        for place in spread(len(rows), COUNT):
            batch = parts.bundle.collate_fn([rows[place]])
            prompt, reference = prompt_of(batch["input_ids"][0].tolist(), batch["labels"][0].tolist(), TOKENS)
            if not prompt or not reference or (left := end - time.monotonic()) <= 0:
                continue
            ids_bt = torch.tensor([prompt], device=device)
            made_bt = model.generate(
                input_ids=ids_bt,
                attention_mask=torch.ones_like(ids_bt),
                do_sample=False,
                max_new_tokens=TOKENS,
                max_time=left,
                pad_token_id=padding_id(tokenizer),
            )

            def text(ids: Any) -> str:
                return tokenizer.decode(ids, skip_special_tokens=True)

            answer = text(made_bt[0, len(prompt) :])
            found.append({"prompt": text(prompt)[-SHOWN:], "reference": text(reference), "completion": answer})
    return found


def record_samples(model: Any, parts: Parts, journal: Journal) -> None:
    """Put the completions into the run's records; where a model cannot generate, a note says so."""
    try:
        journal.run["samples"] = samples(model, parts)
    except Exception as error:  # whatever it is: the training is done, and is not lost for this
        text = f"No sample completions: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        journal.report({"event": "note", "text": text})
