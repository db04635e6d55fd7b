"""What a recipe passes on to a library, against the dataclass that is installed: which keys there are, of what type."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

from peft import LoraConfig
from pydantic import ConfigDict, PydanticSchemaGenerationError, TypeAdapter, ValidationError

from sparsetrain.core.config import suggest
from sparsetrain.core.fields import shown
from sparsetrain.hf.model.opening import told
from sparsetrain.recipes.finetune import Recipe
from sparsetrain.recipes.passed_keys import LIBRARY, NO_VARIANTS, OWNED, REFUSED, VARIANTS
from sparsetrain.recipes.tasks import task_of

_STARTS = [entry["init_lora_weights"] for entry in VARIANTS.values() if "init_lora_weights" in entry]


def typed(section: str, kind: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """The values as the library's dataclass has them.

    Raises:
        ValueError: it has no such key, or one of another type.
    """
    fields = {field.name for field in dataclasses.fields(kind) if field.init}
    hints = get_type_hints(kind) if given else {}
    found = {}
    for key, value in given.items():
        if key not in fields:
            free = sorted(fields - OWNED[section].keys() - REFUSED[section].keys())
            raise ValueError(
                f"{section}.{key}: {LIBRARY[section]} has no {shown(key)}.{suggest(key, free)} Keys: {', '.join(free)}."
            )
        found[key] = _typed(f"{section}.{key}", hints[key], value)
    return found


def _typed(what: str, hint: Any, value: Any) -> Any:
    says = re.sub(r"typing\.|<class '(\w+)'>", r"\1", str(hint))
    try:
        if isinstance(value, bool | int) and (bool in (hint, *get_args(hint))) is not isinstance(value, bool):
            raise ValueError  # pydantic takes true for 1, and 1 for true
        return TypeAdapter(hint, config=_config(hint)).validate_python(value)
    except (ValidationError, ValueError):
        raise ValueError(f"{what}={shown(value)} is not of its type. Give what is a {says}.") from None
    except PydanticSchemaGenerationError:  # a class of the library's, which no plain value is
        return value


def _config(hint: Any) -> ConfigDict | None:
    return None if dataclasses.is_dataclass(hint) else ConfigDict(arbitrary_types_allowed=True)


def lora_config(recipe: Recipe, **of_model: Any) -> LoraConfig:
    """PEFT's config of a recipe's adapter; `of_model` is what depends on the model.

    Raises:
        ValueError: a key that PEFT does not have, a value that it does not take, or a start that is refused.
    """
    given = dict(recipe.lora)
    start = given.pop("init_lora_weights", True)
    if not isinstance(start, bool) and start not in _STARTS:
        why = next((f": {why}" for name, why in NO_VARIANTS.items() if str(start).startswith(name)), "")
        raise ValueError(
            f"lora.init_lora_weights={shown(start)} is not taken{why}. Give true, false or {', '.join(_STARTS)}."
        )
    values = typed("lora", LoraConfig, given)
    if not 0 <= values.get("lora_dropout", 0.0) < 1:
        raise ValueError(f"lora_dropout={values['lora_dropout']:g} is out of range. Give a share in [0, 1).")
    trained = [*(of_model.pop("modules_to_save", None) or []), *(values.pop("modules_to_save", None) or [])]
    try:
        return LoraConfig(
            task_type=task_of(recipe.task).adapter or None,
            r=recipe.lora_r,
            lora_alpha=recipe.lora_alpha,  # type: ignore[arg-type]
            target_modules=recipe.lora_targets,
            modules_to_save=list(dict.fromkeys(trained)) or None,
            init_lora_weights=start,
            **values,
            **of_model,
        )
    except (ValueError, TypeError, ImportError) as error:
        raise ValueError(f"PEFT does not take lora={shown(recipe.lora)}: {told(error)}") from None
