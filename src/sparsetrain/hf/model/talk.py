"""A conversation with a language model: its chat template where it has one, else each text is gone on with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import TextStreamer

from sparsetrain.core.modes import evaluating
from sparsetrain.data.special_tokens import padding_id
from sparsetrain.hf.model.io import Loaded
from sparsetrain.hf.model.model_config import context_length
from sparsetrain.hf.model.saving import base_of
from sparsetrain.recipes.tasks import task_of


class _Told(TextStreamer):
    """Hands on each piece of text as soon as its characters are whole."""

    def __init__(self, tokenizer: Any, told: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.told = told

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.told(text)


class Talk:
    """What was said so far, and what the model says to it.

    Args:
        loaded: a language model with its tokenizer.
        system: a message before all others, where the chat template takes one; "" for none.
        max_new_tokens: of an answer.
        temperature: 0 for the likeliest token, else tokens are drawn; seed: of the draws.

    Raises:
        ValueError: no language model, or no tokenizer.
    """

    def __init__(
        self, loaded: Loaded, *, system: str = "", max_new_tokens: int = 256, temperature: float = 0.7, seed: int = 0
    ) -> None:
        if not task_of(loaded.task).causal:
            raise ValueError(f"A model of task={loaded.task} says nothing. Measure it with `sparsetrain eval`.")
        if loaded.tokenizer is None:
            raise ValueError("The model has no tokenizer beside its weights. Save one into its folder.")
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.chats = bool(loaded.tokenizer.chat_template)
        self.messages = [{"role": "system", "content": system}] if system else []
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.context = context_length(base_of(self.model).config)
        torch.manual_seed(seed)

    def answer(self, text: str, told: Callable[[str], None] = lambda piece: None) -> str:
        """What the model says to a text; of a chat both become part of what was said.

        Args:
            told: called with each piece of the answer as it is made.

        Raises:
            ValueError: the text does not fit into the model's context.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        ids_bt = self._fitting(asked) if self.chats else self._read(text)
        if self.context is not None and ids_bt.shape[1] >= self.context:
            raise ValueError(f"{ids_bt.shape[1]:,} tokens do not fit into the context of {self.context:,}. Say less.")
        streamer = _Told(self.tokenizer, told)
        with evaluating(self.model), torch.no_grad():
            made_bt = self.model.generate(
                input_ids=ids_bt,
                attention_mask=torch.ones_like(ids_bt),
                streamer=streamer,
                **self._how(ids_bt.shape[1]),
            )
        said = self.tokenizer.decode(made_bt[0, ids_bt.shape[1] :], skip_special_tokens=True)
        if self.chats:
            self.messages = [*asked, {"role": "assistant", "content": said}]
        return said

    def forget(self) -> None:
        """Begin anew."""
        self.messages = [message for message in self.messages if message["role"] == "system"]

    def _fitting(self, asked: list[dict[str, str]]) -> torch.Tensor:
        """The conversation as tokens, without its oldest turns where an answer would not fit behind it."""
        while True:
            ids_bt = self._read(self.tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False))
            first = 1 if asked[0]["role"] == "system" else 0
            if self.context is None or ids_bt.shape[1] + self.max_new_tokens <= self.context or len(asked) <= first + 1:
                return ids_bt
            del asked[first : first + 2]

    def _read(self, text: str) -> torch.Tensor:
        found = self.tokenizer(text, return_tensors="pt", add_special_tokens=not self.chats)["input_ids"]
        if not found.numel():
            raise ValueError("There is no token in that text. Say something.")
        return found.to(next(self.model.parameters()).device)

    def _how(self, length: int) -> dict[str, Any]:
        room = self.max_new_tokens if self.context is None else min(self.max_new_tokens, self.context - length)
        ends = self.model.generation_config.eos_token_id
        ends = {*(ends if isinstance(ends, list) else [ends]), self.tokenizer.eos_token_id} - {None}
        how: dict[str, Any] = {"max_new_tokens": room, "pad_token_id": padding_id(self.tokenizer)}
        how |= {"eos_token_id": sorted(ends)} if ends else {}
        draws = {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        return how | draws
