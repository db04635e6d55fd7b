"""A model small enough to count by hand, which describes itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrain.core.anatomy import Anatomy, AttentionSite, Block, FFNSite

VOCAB, WIDTH, FFN, HEADS = 11, 8, 20, 2
FLOAT = 4


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x_td: Tensor) -> Tensor:
        q_td, k_td, v_td = self.qkv(x_td).chunk(3, dim=-1)
        return self.out(torch.softmax(q_td @ k_td.t(), dim=-1) @ v_td)


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, FFN, bias=False)
        self.act = nn.ReLU()
        self.down = nn.Linear(FFN, WIDTH, bias=False)

    def forward(self, x_td: Tensor) -> Tensor:
        return self.down(self.act(self.up(x_td)))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attn = Attention()
        self.mlp = FeedForward()

    def forward(self, x_td: Tensor) -> Tensor:
        x_td = x_td + self.attn(self.norm(x_td))
        return x_td + self.mlp(x_td)


class TinyModel(nn.Module):
    """Embedding, `num_layers` layers, a final norm, a head; ids [t] -> logits [t, v], or the loss with labels."""

    def __init__(self, num_layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(num_layers))
        self.final_norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids_t: Tensor, labels_t: Tensor | None = None) -> Tensor:
        x_td = self.embed(ids_t)
        for layer in self.layers:
            x_td = layer(x_td)
        logits_tv = self.head(self.final_norm(x_td))
        return logits_tv if labels_t is None else F.cross_entropy(logits_tv, labels_t)

    def anatomy(self) -> Anatomy:
        return Anatomy(
            family="tiny",
            model_class="TinyModel",
            blocks=tuple(self._block(layer) for layer in range(len(self.layers))),
            embedding="embed",
            head="head",
        )

    def _block(self, layer: int) -> Block:
        name = f"layers.{layer}"
        return Block(
            name=name,
            layer=layer,
            norms=(f"{name}.norm",),
            attention=AttentionSite(
                name=f"{name}.attn", layer=layer, num_heads=1, num_kv_heads=1, head_dim=WIDTH, causal=False
            ),
            ffn=FFNSite(
                name=f"{name}.mlp",
                layer=layer,
                hidden_size=WIDTH,
                ffn_size=FFN,
                activation="relu",
                up="up",
                down="down",
                bypass=("act",),
            ),
        )


class Adapted(nn.Module):
    """A frozen linear with a low-rank update, laid out as PEFT lays it out."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base_layer = linear.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(linear.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, linear.out_features, bias=False)})

    def forward(self, x_td: Tensor) -> Tensor:
        return self.base_layer(x_td) + self.lora_B["default"](self.lora_A["default"](x_td))
