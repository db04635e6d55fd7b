"""Images with labels in the idx format of MNIST and its relatives, for vision Transformers trained from scratch."""

from pathlib import Path

from datasets import Dataset

from sparsetrain.data.collate import ImageCollator
from sparsetrain.data.images import FASHION_LABELS, read_images
from sparsetrain.hf.assets import embedded_name, resolve_data
from sparsetrain.hf.data.bundle import DataBundle


def load_images(
    source: str = "fashion-mnist", *, max_rows: int | None = None, max_eval_rows: int | None = None, seed: int = 0
) -> DataBundle:
    """Grey images from "fashion-mnist" or a folder; arguments and errors as of `data.images.read_images`."""
    found = read_images(Path(resolve_data(source)), max_rows=max_rows, max_eval_rows=max_eval_rows, seed=seed)
    train, held_out = Dataset.from_dict(found.train), Dataset.from_dict(found.held_out)
    name = embedded_name(source)
    height, width = found.size
    return DataBundle(
        train=train,
        eval=held_out,
        collate_fn=ImageCollator(),
        description=f"{name or source}: {len(train):,} images of {height}x{width}; held out: {len(held_out):,}",
        counts={"train_rows": len(train), "eval_rows": len(held_out)},
        label_names=FASHION_LABELS if name == "fashion-mnist" else tuple(str(i) for i in range(found.classes)),
    )
