"""A classifier on any encoder of transformers: mean of the real tokens' states, then a small MLP.

The heads are those of SPION's tasks (arXiv 2309.12578; widths read in the authors' code): one hidden layer with ReLU
on the pooled state, or for pairs on [x, y, x·y, x − y] of two sequences that one encoder reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel
from transformers.modeling_outputs import SequenceClassifierOutput

from sparsetrain.hf.model.headed import Headed
from sparsetrain.hf.model.opening import NO_CODE


class EncoderClassifier(Headed):
    """Encoder, mean pooling, MLP.

    The config is the encoder's own with `num_labels`, `classifier_width` (hidden units of the head, default 128) and
    `classifier_pairs` (the head reads two sequences).
    """

    base_model_prefix = "encoder"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.encoder = AutoModel.from_config(config, attn_implementation=config._attn_implementation, **NO_CODE)
        if getattr(self.encoder, "pooler", None) is not None:
            self.encoder.pooler = None  # the mean is pooled here; its own would never have a gradient
        inputs = config.hidden_size * (4 if getattr(config, "classifier_pairs", False) else 1)
        width = getattr(config, "classifier_width", 128)
        self.head = nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, config.num_labels))
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        input_ids_b: Tensor | None = None,
        attention_mask_b: Tensor | None = None,
        **options: Any,
    ) -> SequenceClassifierOutput:
        """Logits [batch, num_labels], and with labels [batch] the mean cross-entropy.

        Args:
            input_ids, attention_mask: [batch, tokens].
            input_ids_b, attention_mask_b: the second sequences of pairs.
        """
        pooled = self._pool(input_ids, attention_mask)
        if input_ids_b is not None:
            other = self._pool(input_ids_b, attention_mask_b)
            pooled = torch.cat([pooled, other, pooled * other, pooled - other], dim=-1)
        logits = self.head(pooled)
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)  # type: ignore[arg-type]

    def _pool(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        states_btd = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if attention_mask is None:
            return states_btd.mean(1)
        real_bt1 = attention_mask[..., None].to(states_btd.dtype)
        return (states_btd * real_bt1).sum(1) / real_bt1.sum(1).clamp(min=1)
