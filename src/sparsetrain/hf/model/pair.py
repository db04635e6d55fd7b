"""A classifier of images on a pair of encoders, of images and of texts (CLIP and its relatives in transformers).

Both give embeddings of one width, and the head reads the embedding of whatever it is given. So a method that reads
texts with the model (`Method.texts`) finds them beside the images, as the pair was trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel
from transformers.modeling_outputs import SequenceClassifierOutput

from sparsetrain.core.anatomy import Anatomy
from sparsetrain.core.quote import quoted
from sparsetrain.hf.model.headed import Headed
from sparsetrain.hf.model.opening import NO_CODE


@dataclass(frozen=True)
class PairReader:
    """What a pair brings for reading: the tokenizer of its texts, and what prepares its pictures; None: they go in as
    they are."""

    tokenizer: Any
    pictures: Any = None

    def save_pretrained(self, folder: str) -> None:
        """Write both beside the weights."""
        self.tokenizer.save_pretrained(folder)
        if self.pictures is not None:
            self.pictures.save_pretrained(folder)


def of_texts(reader: Any) -> Any:
    """The tokenizer of what a model reads with; None if it reads no texts."""
    return reader.tokenizer if isinstance(reader, PairReader) else reader


def _width(config: Any) -> int:
    """Of the embeddings: a CLIP names it itself, a SigLIP in the config of its texts."""
    texts = getattr(config, "text_config", None)
    width = getattr(config, "projection_dim", None) or getattr(texts, "projection_size", None)
    if width is None:
        raise ValueError(
            f"{quoted(config.model_type)} says in no place how wide its embeddings are (projection_dim, or "
            "text_config.projection_size). Take a model such as CLIP or SigLIP."
        )
    return width


def _as_trained(config: Any, given: dict[str, Any]) -> dict[str, Any]:
    """A SigLIP has learned from texts padded to full length, reads the state of the last place, and masks nothing."""
    if not config.model_type.startswith("siglip"):
        return given
    texts, ids = config.text_config, given["input_ids"]
    missing = texts.max_position_embeddings - ids.shape[1]
    return {"input_ids": F.pad(ids, (0, max(0, missing)), value=texts.pad_token_id)}


class PairClassifier(Headed):
    """A pair of encoders, and a linear on their embeddings; the config is the pair's own with `num_labels`."""

    base_model_prefix = "pair"
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.pair: Any = AutoModel.from_config(config, attn_implementation=config._attn_implementation, **NO_CODE)
        if not (hasattr(self.pair, "get_image_features") and hasattr(self.pair, "get_text_features")):
            raise ValueError(
                f"{quoted(config.model_type)} is no pair of encoders: it has no embeddings of images and of texts. "
                "Take a model such as CLIP or SigLIP."
            )
        self.classifier = nn.Linear(_width(config), config.num_labels)
        self.post_init()

    def anatomy(self) -> Anatomy:
        """Its head; the towers are left as they are."""
        axes = {"classifier.weight": ("labels", "embed"), "classifier.bias": ("labels",)}
        return Anatomy(family=self.config.model_type, model_class=type(self).__name__, blocks=(), axes=axes)

    def embed(
        self, pixel_values: Tensor | None = None, input_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Embeddings [batch, width] of images or of texts, not scaled."""
        if (pixel_values is None) == (input_ids is None):
            raise ValueError("a pair embeds images or texts. Give one of pixel_values and input_ids.")
        if pixel_values is not None:
            found = self.pair.get_image_features(pixel_values=pixel_values)
        else:
            assert input_ids is not None
            given = {"input_ids": input_ids, "attention_mask": attention_mask}
            found = self.pair.get_text_features(**_as_trained(self.config, given))
        return getattr(found, "pooler_output", found)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> SequenceClassifierOutput:
        """Logits [batch, num_labels], and with labels [batch] the mean cross-entropy."""
        logits = self.classifier(self.embed(pixel_values, input_ids, attention_mask))
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)  # type: ignore[arg-type]
