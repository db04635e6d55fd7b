"""Which tokens a tokenizer has for padding, and for the beginning and the end of a text."""

from typing import Any


def padding_id(tokenizer: Any) -> int:
    """The id that fills short rows: the padding token, else the end-of-text one (masked and unlabelled anyway).

    Raises:
        ValueError: the tokenizer has neither.
    """
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token_id, int):
            return token_id
    raise ValueError(
        f"{type(tokenizer).__name__} has neither a padding nor an end-of-text token, so rows cannot be padded. "
        "Set tokenizer.pad_token."
    )


def beginning_ids(tokenizer: Any) -> list[int]:
    """[the beginning-of-text token] when the tokenizer puts one before a text (Llama, Gemma), else []."""
    ids = tokenizer("")["input_ids"]
    begins = isinstance(ids, list) and len(ids) > 0 and ids[0] == tokenizer.bos_token_id
    return [ids[0]] if begins else []


def end_id(tokenizer: Any) -> int | None:
    """The end-of-text token, else the separator that BERT-like tokenizers have, else None."""
    for token_id in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        if isinstance(token_id, int):
            return token_id
    return None
