"""What a recipe passes on: `training:` to transformers' TrainingArguments, `lora:` to PEFT's LoraConfig.

    training: {optim: adafactor, label_smoothing_factor: 0.1}
    lora: {use_rslora: true, lora_dropout: 0.05}

On the command line `--set training.optim=adafactor`. Here a key is refused that the recipe has by another name, or that
would break what a run promises; which others there are, and of what type, is up to the library that is installed
(`hf.model.passed`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from sparsetrain.core.config import suggest, unknown
from sparsetrain.core.fields import shown
from sparsetrain.recipes.passed_keys import LIBRARY, NO_VARIANTS, OWNED, REFUSED, SHORT, VARIANTS
from sparsetrain.recipes.reading import read_yaml


def short_keys(sections: Collection[str]) -> list[str]:
    """The keys that stand for keys of these sections."""
    found = [key for key, (section, _) in SHORT.items() if section in sections]
    return [*found, "lora_variant"] if "lora" in sections else found


def gathered(values: Mapping[str, Any], sections: Collection[str]) -> dict[str, Any]:
    """The values with short keys moved into their sections.

    Raises:
        ValueError: one is given in both ways, or lora_variant is none that there is.
    """
    found = dict(values)
    for key in [key for key in short_keys(sections) if key in found]:
        if (value := found.pop(key)) is None:
            continue
        value = read_yaml(value) if key == "lora_dropout" and isinstance(value, str) else value
        if key == "report_to" and isinstance(value, str) and "," in value:
            value = [name.strip() for name in value.split(",")]
        moved = variant_keys(value) if key == "lora_variant" else {SHORT[key][1]: value}
        section = "lora" if key == "lora_variant" else SHORT[key][0]
        there = found.get(section) or {}
        if isinstance(there, Mapping):  # what else it may be is refused below
            for inner in moved.keys() & there.keys():
                if there[inner] != moved[inner]:
                    raise ValueError(f"{key} and {section}.{inner} are both given. Give one of them.")
            found[section] = {**there, **moved}
    return found


def variant_keys(variant: Any) -> dict[str, Any]:
    """The keys of `lora` that make a variant, such as dora.

    Raises:
        ValueError: there is none of that name, or it is not for runs of ours.
    """
    if isinstance(variant, str) and variant.lower() in NO_VARIANTS:
        why = NO_VARIANTS[variant.lower()]
        raise ValueError(f"lora_variant={variant}: {why}. Give one of {', '.join(VARIANTS)}.")
    if not isinstance(variant, str) or variant.lower() not in VARIANTS:
        raise ValueError(
            f"lora_variant={shown(variant)} is unknown.{suggest(variant, VARIANTS)} Give one of {', '.join(VARIANTS)}."
        )
    return VARIANTS[variant.lower()]


def check_section(section: str, given: Any, recipe_keys: Collection[str]) -> dict[str, Any]:
    """A section's mapping, with text of a command line's read as YAML; its plain values.

    Args:
        given: {key: value}, or entries key=value.
        recipe_keys: of the recipe, for keys that it has itself.

    Raises:
        ValueError: no mapping of plain values; a key that the recipe has itself, or that is refused.
    """
    if isinstance(given, list | tuple):
        given = read_pairs(section, given)
    if not isinstance(given, Mapping):
        raise ValueError(f"{section} is {shown(given)}. Give {{key: value, ...}}, keys of {LIBRARY[section]}.")
    for key, value in given.items():
        if (own := OWNED[section].get(key)) in recipe_keys:
            flag = f"--{str(own).replace('_', '-')}"
            raise ValueError(f"{section}.{key}: the recipe says that by {own} ({flag}). Give that instead.")
        if key in REFUSED[section]:
            raise ValueError(f"{section}.{key} is not taken: {REFUSED[section][key]}. Leave it out.")
        try:
            json.dumps({str(key): value}, allow_nan=False).encode()
        except (ValueError, TypeError):
            raise ValueError(f"{section}.{key}={shown(value)} is no text, finite number, list or mapping.") from None
    return {key: _number(value) for key, value in given.items()}


def _number(value: Any) -> Any:
    """1e-3 is text in YAML, and a number to everybody else."""
    return float(value) if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value) else value


def read_pairs(section: str, entries: Collection[Any]) -> dict[str, Any]:
    """['optim=adafactor', …] -> {'optim': 'adafactor', …}, values as YAML has them.

    Raises:
        ValueError: an entry without key or '='; one that is given twice; a value that is no YAML.
    """
    found: dict[str, Any] = {}
    for entry in entries:
        key, equals, value = str(entry).partition("=")
        key = key.strip()
        if not equals or not key:
            raise ValueError(f"{section} holds {shown(entry)}, which has no key and '='. Write key=value.")
        if key in found:
            raise ValueError(f"{section} gives {shown(key)} twice. Give it once.")
        try:
            found[key] = read_yaml(value)
        except ValueError as error:
            raise ValueError(f"{section} {shown(entry)}: {error}.") from None
    return found


def divided(entries: Collection[str], sections: Collection[str]) -> dict[str, dict[str, Any]]:
    """The `--set SECTION.KEY=VALUE` of a command line, by section.

    Raises:
        ValueError: an entry names no section; or as `read_pairs`.
    """
    found: dict[str, list[str]] = {}
    for entry in entries:
        section, dot, rest = str(entry).partition(".")
        if not dot or "=" in section or section.strip() not in sections:
            raise ValueError(
                f"--set {shown(entry)}: {unknown('section', section.partition('=')[0], sections)} "
                f"Write {' or '.join(f'{name}.KEY=VALUE ({LIBRARY[name]})' for name in sections)}."
            )
        found.setdefault(section.strip(), []).append(rest)
    return {section: read_pairs(section, pairs) for section, pairs in found.items()}


def merged(values: Mapping[str, Any], changes: Mapping[str, Any], sections: Collection[str]) -> dict[str, Any]:
    """A file's values with a command line's in their place; in a section key by key."""
    own, new = gathered(values, sections), gathered(changes, sections)
    both = own | new
    for section in sections:
        if isinstance(own.get(section), Mapping) and isinstance(new.get(section), Mapping):
            both[section] = {**own[section], **new[section]}
    return both
