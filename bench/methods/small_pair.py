"""A small pair of an image and a text encoder, trained on Fashion-MNIST with captions made of its labels."""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsetrain.data.captions import CLOTHES, all_attributes, caption
from sparsetrain.data.images import FASHION_LABELS

SPECIAL = ("<pad>", "<unk>", "<s>", "</s>")
CONTEXT = 16


def tokenizer() -> Any:
    """One token a word of the captions."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    split = Whitespace()
    texts = ["a photo of , and", *CLOTHES, *all_attributes(CLOTHES)]
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate((*SPECIAL, *words))}, unk_token="<unk>"))
    inner.pre_tokenizer = split
    inner.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=CONTEXT, **names)


def config(words: int, width: int = 64, layers: int = 2) -> Any:
    """A CLIP of that width."""
    from transformers import CLIPConfig

    shared = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    shared |= {"num_attention_heads": max(1, width // 32), "projection_dim": width}
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    text = {"vocab_size": words, "max_position_embeddings": CONTEXT, **ids, **shared}
    vision = {"image_size": 28, "patch_size": 7, "num_channels": 1, **shared}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=width, num_labels=len(FASHION_LABELS))


def train(
    pixels: Tensor, labels: Tensor, *, epochs: int, seed: int, batch: int = 256, lr: float = 1e-3, **size: int
) -> Any:
    """A trained pair: images and their captions shall find each other in a batch (CLIP's loss; images of one label are
    no negatives of each other).

    Args:
        pixels: [n, 1, 28, 28] in [-1, 1]. size: as of `config`.
    """
    from sparsetrain.hf.model.pair import PairClassifier
    from sparsetrain.hf.train.rows import reader
    from sparsetrain.ops.concept_bottleneck import contrastive_loss

    torch.manual_seed(seed)
    words = tokenizer()
    model: Any = PairClassifier.from_config(config(len(words), **size)).train()
    read, draw = reader(words, CONTEXT, "cpu"), Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(2, epochs * (len(pixels) // batch)))
    for _ in range(epochs):
        order = torch.randperm(len(pixels))
        for at in range(0, len(order) - batch + 1, batch):
            chosen = order[at : at + batch]
            texts = [caption(FASHION_LABELS[label], CLOTHES, draw) for label in labels[chosen].tolist()]
            images_be = F.normalize(model.embed(pixels[chosen]), dim=-1)
            texts_be = F.normalize(model.embed(**read(texts)), dim=-1)
            loss = contrastive_loss(model.pair.logit_scale.exp() * images_be @ texts_be.t(), labels[chosen])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return model.eval()
