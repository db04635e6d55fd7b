"""A language model whose classes come with it, as models on the hub have them: what `trust_remote_code` is for."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.hf.runs import CONTEXT, WORDS, tokenizer

CODE = """
import os

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutput

with open(MARKER, "a") as file:
    file.write("ran")


class OwnConfig(PreTrainedConfig):
    model_type = "own_decoder"

    def __init__(self, vocab_size=19, hidden_size=32, num_hidden_layers=2, max_position_embeddings=128, **options):
        super().__init__(**options)
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers, self.max_position_embeddings = num_hidden_layers, max_position_embeddings
        self.num_attention_heads = 4


class OwnBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.mixes, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, hidden):
        batch, tokens, width = hidden.shape
        q, k, v = self.mixes(self.norm(hidden)).view(batch, tokens, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        hidden = hidden + self.out(mixed.transpose(1, 2).reshape(hidden.shape))
        return hidden + self.narrow(F.gelu(self.wide(hidden)))


class OwnForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = OwnConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(OwnBlock(config.hidden_size) for _ in range(config.num_hidden_layers))
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        logits, loss = self.head(hidden), None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutput(loss=loss, logits=logits)
"""


def own_model(folder: Path, marker: Path) -> Path:
    """A folder with the model, its tokenizer and `modeling_own.py`, which writes `marker` wherever it runs."""
    folder.mkdir()
    (folder / "modeling_own.py").write_text(CODE.replace("MARKER", repr(str(marker))), encoding="utf-8")
    names = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config = {"model_type": "own_decoder", "architectures": ["OwnForCausalLM"], "auto_map": names, "dtype": "float32"}
    config |= {"vocab_size": len(WORDS) + 4, "hidden_size": 32, "num_hidden_layers": 2}
    config |= {"max_position_embeddings": CONTEXT, "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    draw = torch.Generator().manual_seed(0)
    sizes = {"norm.weight": (32,), "norm.bias": (32,), "mixes.weight": (96, 32), "mixes.bias": (96,)}
    sizes |= {"out.weight": (32, 32), "out.bias": (32,), "wide.weight": (64, 32), "wide.bias": (64,)}
    sizes |= {"narrow.weight": (32, 64), "narrow.bias": (32,)}
    shapes = {f"blocks.{i}.{name}": shape for i in range(2) for name, shape in sizes.items()}
    shapes |= {"embed.weight": (len(WORDS) + 4, 32), "head.weight": (len(WORDS) + 4, 32)}
    weights = {name: 0.3 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer().save_pretrained(folder)
    return folder
