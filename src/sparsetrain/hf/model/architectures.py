"""Models from a config alone: built-in small architectures, a user's config.json, overrides, and random weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from sparsetrain.core.anatomy import describe
from sparsetrain.core.config import suggest
from sparsetrain.hf.data import DataBundle
from sparsetrain.hf.model.classifier import EncoderClassifier
from sparsetrain.hf.model.diffusion_config import DiffusionConfig, check_labels, set_labels
from sparsetrain.hf.model.model_config import context_length
from sparsetrain.hf.model.opening import NO_CODE, make_config, told
from sparsetrain.hf.model.weights import attention_of, new_class
from sparsetrain.planner.config_values import check_values, config_values
from sparsetrain.planner.image_sizes import image_shape, image_tokens
from sparsetrain.recipes.pretrain import PretrainRecipe
from sparsetrain.recipes.run import RunRecipe
from sparsetrain.recipes.tasks import named, task_of

ARCHITECTURES = Path(__file__).parents[1] / "assets" / "architectures"
_HEAD = {"classifier_width": 128}
_NOT_SET = {"model_type", "architectures", "dtype", "id2label", "label2id", "transformers_version", "vocab_size"}


def architecture_names() -> list[str]:
    """The built-in architectures."""
    return sorted(path.stem for path in ARCHITECTURES.glob("*.json"))


def open_architecture(recipe: PretrainRecipe) -> PreTrainedConfig:
    """The config that a recipe names, with its overrides; sizes that the data gives are not set yet.

    Raises:
        ValueError: no such architecture; no config; an override of a key that the config does not have; `seq_len`
            beyond its positions.
    """
    values = _read(recipe.model)
    plain = make_config(values, recipe.model)
    own = {*plain.to_dict(), *plain.attribute_map, *_HEAD, *values}
    known = sorted(key for key in own - _NOT_SET if not key.startswith("_"))
    for key in recipe.set:
        if key not in known:
            raise ValueError(
                f"set: {key!r} is no key of the config of {recipe.model} ({plain.model_type}).{suggest(key, known)} "
                f"Keys: {', '.join(known)}."
            )
    check_values(dict(recipe.set), "set")
    changes = {plain.attribute_map.get(key, key): value for key, value in recipe.set.items()}
    try:
        config = _config(_HEAD | values | changes)
    except Exception as error:  # transformers checks types with an exception of its own
        raise ValueError(f"set {recipe.set}: {str(error).strip().splitlines()[-1].strip()}") from None
    _check_length(recipe, config)
    return config


def fit_to_data(config: Any, recipe: PretrainRecipe, bundle: DataBundle, tokenizer: Any) -> None:
    """Set what the data decides in the config: vocabulary, special tokens, labels.

    Raises:
        ValueError: images of another size than the config's.
    """
    task = task_of(recipe.task)
    if tokenizer is not None:
        config.vocab_size = len(tokenizer)
        config.pad_token_id = tokenizer.pad_token_id
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        if tokenizer.mask_token_id is not None:
            config.mask_token_id = tokenizer.mask_token_id
    elif not task.images:
        config.vocab_size, config.pad_token_id = bundle.vocab_size, 0  # type: ignore[attr-defined]
    if task.images:
        check_images(config, recipe, bundle)
    if isinstance(config, DiffusionConfig):
        set_labels(config, bundle.num_labels)
        config.id2label = dict(enumerate(bundle.label_names))
        config.label2id = {name: i for i, name in enumerate(bundle.label_names)}
    if task.labelled:
        config.num_labels = bundle.num_labels
        config.id2label = dict(enumerate(bundle.label_names))
        config.label2id = {name: i for i, name in enumerate(bundle.label_names)}
        config.classifier_pairs = task.sequences > 1


def check_patches(config: Any, recipe: RunRecipe) -> None:
    """Raise ValueError if a classifier of images does not cut them into patches, of which rows are counted here."""
    lacking = [key for key in ("image_size", "patch_size", "num_channels") if getattr(config, key, None) is None]
    task = task_of(recipe.task)
    if task.labelled and not task.texts and lacking:  # a pair has the sizes of two encoders
        raise ValueError(
            f"{recipe.model} ({config.model_type}) does not cut images of one size into patches, so nothing here knows "
            "its tokens. Use a vision transformer: ViT, DeiT or DINOv2."
        )


def check_images(config: Any, recipe: RunRecipe, bundle: DataBundle) -> None:
    """Raise ValueError if images are of another size, or have more labels, than the config's."""
    found = bundle.collate_fn([bundle.train[0]])["pixel_values"].shape[1:]
    asked = image_shape(config)
    if tuple(found) != asked:
        raise ValueError(
            f"{recipe.data} has images of {tuple(found)} (channels, height, width), and {recipe.model} takes "
            f"{asked}. "
            + (
                f"Use --set image_size={min(found[1:])} --set num_channels={found[0]}; pictures of other sizes are "
                "scaled and cut to it."
                if recipe.job == "pretrain"
                else "Bring them to this size."
            )
        )
    if isinstance(config, DiffusionConfig):
        check_labels(config, bundle.num_labels)


def build_model(config: Any, task: str) -> Any:
    """The model of a task with random weights in fp32 and SDPA attention; seed before.

    Raises:
        ValueError: transformers has no such model of this family, or it is no decoder (lm).
    """
    try:
        kind: Any = new_class(task)
        options = {} if EncoderClassifier in kind.__mro__ else NO_CODE
        return kind.from_config(config, attn_implementation=attention_of(kind, config), **options)
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error):
            raise ValueError(f"{config.model_type} cannot be trained for task={task}: {told(error)}") from None
        raise
    except Exception as error:  # every family fails in its own way at values that do not fit each other
        raise ValueError(f"{config.model_type} cannot be trained for task={task}: {told(error)}") from None


def empty_model(config: Any, task: str) -> Any:
    """As `build_model`, on the meta device: shapes without weights."""
    with torch.device("meta"):
        return build_model(config, task)


def check_task(config: Any, recipe: PretrainRecipe) -> None:
    """Raise ValueError if the architecture is not of the task's kind."""
    task, takes_images = task_of(recipe.task), hasattr(config, "image_size")
    if takes_images != task.images:
        kind = "images" if takes_images else "tokens"
        use = "Use task=image" if takes_images else "Use vit-nano"
        raise ValueError(f"{recipe.model} ({config.model_type}) reads {kind}, and task={recipe.task}. {use}.")
    known = getattr(named(task.new_model or task.model), "_model_mapping", None)
    if known is not None and type(config) not in known:
        raise ValueError(
            f"{recipe.model} ({config.model_type}) has no head for task={task.name}: transformers has none in "
            f"{(task.new_model or task.model).partition(':')[2]}. Use an architecture of that kind, or another task."
        )
    if task.causal and not all(site.causal for site in describe(empty_model(config, task.name)).attentions):
        raise ValueError(
            f"{recipe.model} ({config.model_type}) sees tokens on both sides, so it is no language model of "
            f"task={task.name}. Use gpt2-nano or another decoder, or task=classify."
        )


def sequence_tokens(config: Any, recipe: RunRecipe) -> int:
    """Tokens in a row: `seq_len`, or an image's patches, and a classifier's class token."""
    if not task_of(recipe.task).images:
        return recipe.seq_len
    return image_tokens(config) + task_of(recipe.task).labelled


def tokens_per_input(config: Any, recipe: RunRecipe) -> float:
    """Tokens of the model per number that a Trainer counts: of an image, its pixels."""
    task = task_of(recipe.task)
    if not task.images:
        return float(task.sequences)
    return sequence_tokens(config, recipe) / math.prod(image_shape(config))


def _config(values: dict[str, Any]) -> Any:
    return AutoConfig.for_model(str(values["model_type"]), **{k: v for k, v in values.items() if k != "model_type"})


def _check_length(recipe: PretrainRecipe, config: Any) -> None:
    positions = context_length(config)
    if positions is None or task_of(recipe.task).images:
        return
    if recipe.seq_len > positions:
        raise ValueError(
            f"seq_len={recipe.seq_len} is longer than the {positions:,} positions of {recipe.model}. Lower it, or set "
            "max_position_embeddings (gpt2: n_positions)."
        )


def _read(name: str) -> dict[str, Any]:
    built_in = ARCHITECTURES / f"{name}.json"
    path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    if name in architecture_names():
        path = built_in
    elif not path.is_file():
        known = architecture_names()
        raise ValueError(
            f"architecture {name!r} is unknown.{suggest(name, known)} Built in: {', '.join(known)}; or give a "
            "config.json, or a folder with one."
        )
    dropped = ("architectures", "transformers_version", "torch_dtype", "dtype", "id2label", "label2id")
    return {key: value for key, value in config_values(path).items() if key not in dropped}
