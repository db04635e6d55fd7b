"""explain_run(): why a trained model decides as it does about texts or images, where a method of its can say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from sparsetrain.core.config import registered_methods
from sparsetrain.core.explanation import Explanation
from sparsetrain.core.fields import shown
from sparsetrain.data.collate import ImageCollator
from sparsetrain.data.picture import as_png, read_picture
from sparsetrain.hf.data.images import normalisation, prepared
from sparsetrain.hf.model.io import Loaded, load
from sparsetrain.hf.model.pair import of_texts
from sparsetrain.hf.train.rows import reader
from sparsetrain.planner.image_sizes import image_shape
from sparsetrain.surgery.method import method_of


@dataclass(frozen=True, kw_only=True)
class Explained:
    """What was asked about, and why. pictures: PNG bytes of each input, None where it is a text."""

    explanations: list[Explanation]
    pictures: list[bytes | None]


def explain_run(run: str | Path, subjects: Sequence[str], *, max_tokens: int | None = None) -> Explained:
    """Explain decisions of a finished run, or of a saved model.

    Args:
        subjects: texts, or paths of images, as the model takes.
        max_tokens: texts are cut to that; None: to the model's context.

    Raises:
        ValueError: no method of the run explains; a blank text; an image that is missing or unreadable.
        CheckpointError: the run's files are damaged.
    """
    loaded = load(run)
    found = [config for config in (loaded.handle.configs if loaded.handle else ()) if method_of(config).explain]
    if not found or loaded.handle is None:
        able = [name for name, kind in registered_methods().items() if method_of(kind).explain]
        raise ValueError(
            f"{shown(str(run))} was not trained with a method that explains its decisions. Train it with "
            f"--method {' or '.join(able)}."
        )
    images = getattr(loaded.model, "main_input_name", "") == "pixel_values"
    batch, pictures = _pictures(loaded, subjects) if images else _texts(loaded, subjects, max_tokens)
    explain = method_of(found[0]).explain
    assert explain is not None
    labels = [str(name) for _, name in sorted(loaded.model.config.id2label.items())]
    return Explained(explanations=explain(loaded.handle, loaded.model, batch, subjects, labels), pictures=pictures)


def _texts(
    loaded: Loaded, subjects: Sequence[str], max_tokens: int | None
) -> tuple[dict[str, Tensor], list[bytes | None]]:
    if (tokenizer := of_texts(loaded.tokenizer)) is None:
        raise ValueError("the model has no tokenizer beside its weights, so it reads no text. Save one there.")
    if blank := [i for i, subject in enumerate(subjects, 1) if not subject.strip()]:
        raise ValueError(f"text {blank[0]} of {len(subjects)} is blank. Give something to explain.")
    context = getattr(loaded.model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    read = reader(tokenizer, min(max_tokens or context, context), "cpu")
    return read(subjects), [None] * len(subjects)


def _pictures(loaded: Loaded, subjects: Sequence[str]) -> tuple[dict[str, Tensor], list[bytes | None]]:
    image = image_shape(loaded.model.config)
    processor = getattr(loaded.tokenizer, "pictures", None)
    prepare = None if processor is None else partial(prepared, processor, image[0])
    pictures = [read_picture(Path(subject), image, prepare) for subject in subjects]
    batch = ImageCollator(*normalisation(processor))([{"pixel_values": picture} for picture in pictures])
    return batch, [as_png(picture) for picture in pictures]
