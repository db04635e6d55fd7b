"""A chat template in place of a tokenizer's own: a Jinja file, that of another model, or its text."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsetrain.core.plain_files import regular_file
from sparsetrain.core.quote import quoted

_JINJA = re.compile(r"\{[{%]")
_MOST_BYTES = 2**20
_SPECIAL = re.compile(r"<[|｜]?[A-Za-z_▁][\w▁./ -]*[|｜]?>|\[/?[A-Z_]{3,}\]")
"""How tokens of a chat are written: <|im_start|>, <start_of_turn>, [INST]."""
_TALK = [{"role": "user", "content": "what-is-asked"}, {"role": "assistant", "content": "what-is-answered"}]


def use_template(tokenizer: Any, asked: str, open_other: Callable[[str], Any]) -> list[str]:
    """Give a tokenizer the chat template that a recipe's `chat_template_path` names, as TRL's key of that name does.

    Other than there, tokens of another model are not added: a template that writes some is noted.

    Args:
        asked: a Jinja file, the folder or name of a model, or the text of a template.
        open_other: name or folder -> the tokenizer of another model.

    Returns:
        Notes.

    Raises:
        ValueError: there is no such template, it is no Jinja, or it does not render a question and its answer.
    """
    text = _text(asked, open_other)
    tokenizer.chat_template = text
    try:
        said = tokenizer.apply_chat_template([dict(message) for message in _TALK], tokenize=False)
    except MemoryError:
        raise
    except Exception as error:  # jinja's, Python's, or those of the template itself
        raise ValueError(
            f"chat_template_path={_shown(asked)} does not render a question and its answer ({type(error).__name__}: "
            f"{quoted(str(error))}). Correct the template, or leave it out for the model's own."
        ) from None
    if missing := [message["role"] for message in _TALK if message["content"] not in said]:
        raise ValueError(
            f"chat_template_path={_shown(asked)} leaves out what the {missing[0]} says. A template goes over "
            "`messages` and writes the role and content of each."
        )
    found = dict.fromkeys(_SPECIAL.findall(said))
    split = [word for word in found if len(tokenizer.encode(word, add_special_tokens=False)) > 1]
    if not split:
        return []
    words = ", ".join(split[:4])
    return [f"The chat template writes {words}, for which the tokenizer has no token: they are learnt as text."]


def _text(asked: str, open_other: Callable[[str], Any]) -> str:
    if _JINJA.search(asked):
        return asked
    if os.path.lexists(asked) and not Path(asked).is_dir():
        regular_file(asked, _MOST_BYTES)
        try:
            text = Path(asked).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"chat_template_path={quoted(asked)} cannot be read as text: {error}.") from None
        if not _JINJA.search(text):
            raise ValueError(
                f"chat_template_path={quoted(asked)} holds no Jinja ({{{{ … }}}} or {{% … %}}). Name the file of "
                "a chat template, such as a model's chat_template.jinja."
            )
        return text
    if asked.endswith((".jinja", ".j2", ".txt")) or (asked.startswith((".", "/", "~")) and not os.path.isdir(asked)):
        raise ValueError(f"chat_template_path={quoted(asked)} is not there. Name a Jinja file, or a model.")
    try:
        found = open_other(asked).chat_template
    except FileNotFoundError as error:
        raise ValueError(f"chat_template_path={quoted(asked)}: {error}") from None
    found = found.get("default") if isinstance(found, dict) else found
    if not found:
        raise ValueError(
            f"chat_template_path={quoted(asked)}: that model's tokenizer has no chat template. Name an instruction "
            "model, or a Jinja file."
        )
    return found


def _shown(asked: str) -> str:
    return quoted(asked, 60)
