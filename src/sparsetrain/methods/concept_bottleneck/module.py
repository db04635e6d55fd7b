"""The two layers over concepts, where a classifier's head was, and what they are told of a forward.

Legend: b rows, t tokens, e width of the encoder, d concepts, c classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrain.core.anatomy import trained_copy
from sparsetrain.methods.concept_bottleneck.config import ConceptBottleneck
from sparsetrain.ops.concept_bottleneck import (
    check_finite,
    contrastive_loss,
    gumbel_loss,
    gumbel_noise,
    soft_threshold,
)
from sparsetrain.surgery.reclass import dense_forward
from sparsetrain.surgery.site import Site

FIXED = ("vectors", "profiles", "scale", "center")
TOO_FEW = 2


@dataclass(eq=False)
class Seen:
    """What a forward of the model leaves for its head: the tokens' states, which of them are real, and the labels.

    A copy of the model has the same: hooks hold it, and it is read in the forward that wrote it.
    """

    states_bte: Tensor | None = None
    mask_bt: Tensor | None = None
    labels_b: Tensor | None = None

    def __deepcopy__(self, memo: Any) -> Seen:
        return self

    def clear(self) -> None:
        self.states_bte = self.mask_bt = self.labels_b = None


def pooled(states_bte: Tensor, mask_bt: Tensor | None) -> Tensor:
    """The mean of the real tokens' states, [b, e], in fp32 or wider."""
    states_bte = states_bte.to(torch.promote_types(states_bte.dtype, torch.float32))
    if mask_bt is None:
        return states_bte.mean(1)
    real_bt1 = mask_bt[..., None].to(states_bte.dtype)
    return (states_bte * real_bt1).sum(1) / real_bt1.sum(1).clamp(min=1)


class ConceptLayers(nn.Module):
    """W [d, d] and W_F [c, d]: z = W ψ, logits = W_F z. No biases, so that a logit is a sum over concepts.

    W begins as the identity: each concept stands for itself, and training decides what else it takes.
    """

    def __init__(self, bottleneck_dd: Tensor, head_cd: Tensor) -> None:
        super().__init__()
        self.bottleneck = nn.Parameter(bottleneck_dd.clone())
        self.head = nn.Parameter(head_cd.clone())

    def forward(self, psi_bd: Tensor, cut: bool = False) -> tuple[Tensor, Tensor]:
        """(z [b, d], logits [b, c]); `cut` keeps the gradient of the logits from W."""
        z_bd = psi_bd @ self.bottleneck.t().to(psi_bd.dtype)
        return z_bd, (z_bd.detach() if cut else z_bd) @ self.head.t().to(psi_bd.dtype)


class Concepts(Site):
    """Scores, layers and losses at a head.

    Attributes:
        vectors: [d, e], the concepts' embeddings, of length 1.
        scale: scalar, on the cosines. center: [d], what is taken off the scaled cosines.
        profiles: [c, d], cosines of the classes with the concepts; no rows where they were not described.
        reads_mean: the pooled states stand for an input, and not what the dense head reads.
    """

    adds_losses = True
    vectors: Tensor
    profiles: Tensor
    scale: Tensor
    center: Tensor

    def __init__(self, config: ConceptBottleneck, tensors: dict[str, Tensor], *, reads_mean: bool) -> None:
        super().__init__()
        self.config, self.reads_mean, self.seen = config, reads_mean, Seen()
        for name in FIXED:
            self.register_buffer(name, tensors[name].float().clone(), persistent=False)
        self.concept_layers = ConceptLayers(tensors["bottleneck"].float(), tensors["head"].float())
        self.step, self.z_bd = 0, None

    @property
    def layers(self) -> ConceptLayers:
        """Those that train: PEFT trains a copy."""
        return trained_copy(self.concept_layers)

    def scores(self, x_be: Tensor) -> Tensor:
        """ψ [b, d]: scaled cosines with the concepts, less their mean; in fp32 or wider, whatever the model was cast
        to."""
        center, scale, vectors = self._wide("center", "scale", "vectors")
        return torch.addmm(-center, scale * F.normalize(x_be.to(vectors.dtype), dim=-1), vectors.t())

    def _wide(self, *names: str) -> tuple[Tensor, ...]:
        dtype = torch.promote_types(self.vectors.dtype, torch.float32)
        return tuple(getattr(self, name).to(dtype) for name in names)

    def forward(self, x_be: Tensor) -> Tensor:
        """Logits [b, c], with the bottleneck's loss on their path in training.

        Args:
            x_be: what the dense head would read.
        """
        seen = self.seen
        with torch.autocast(x_be.device.type, enabled=False):
            if self.reads_mean:
                assert seen.states_bte is not None, "the encoder's hook has run before the head"
                x_be = pooled(seen.states_bte, seen.mask_bt)
            psi_bd = self.scores(x_be)
            z_bd, logits_bc = self.concept_layers(psi_bd, not self.config.ce_to_cbl)
            self.z_bd = z_bd.detach()
            if self.training and torch.is_grad_enabled():
                logits_bc = self._with_loss(logits_bc, psi_bd, z_bd, seen.labels_b)
        return logits_bc

    def _with_loss(self, logits_bc: Tensor, psi_bd: Tensor, z_bd: Tensor, labels_b: Tensor | None) -> Tensor:
        config = self.config
        if config.loss == "none" or (config.loss == "l1" and config.prox):
            return logits_bc
        if config.loss == "l1":
            norm = self.layers.bottleneck.abs().sum()
            return self.add_loss(logits_bc, norm, config.l1_in_force / len(config.concepts))
        return self.add_loss(logits_bc, self.pairing_loss(psi_bd, z_bd, labels_b), config.weight)

    def pairing_loss(self, psi_bd: Tensor, z_bd: Tensor, labels_b: Tensor | None) -> Tensor:
        """The contrastive or Gumbel loss of z with the profiles of the rows' classes, or with the rows' own ψ.

        Raises:
            ValueError: a batch of one row, or scores that are not finite.
        """
        config = self.config
        if len(z_bd) < TOO_FEW:
            raise ValueError(
                f"concept_bottleneck: loss={config.loss!r} compares the rows of a batch, and this one has {len(z_bd)}. "
                "Raise batch_size, or choose loss='l1'."
            )
        check_finite("concept_bottleneck", z_bd)
        if labels_b is None or len(self.profiles) == 0:
            profiles_bd, labels_b = F.normalize(psi_bd, dim=-1), None
        else:
            center, scale, profiles = self._wide("center", "scale", "profiles")
            profiles_bd = F.normalize(scale * profiles - center, dim=-1)[labels_b]
        scores_bb = z_bd @ profiles_bd.t()
        if config.loss == "contrastive":
            return contrastive_loss(scores_bb, labels_b)
        return gumbel_loss(
            scores_bb,
            labels_b,
            noise=self._noise(scores_bb),
            temperature=config.temperature,
            score=config.score,
            form=config.gumbel_form,
        )

    def _noise(self, like: Tensor) -> Tensor:
        """A function of seed and step alone, so that a resumed run draws the same."""
        generator = torch.Generator().manual_seed((self.config.seed * 1_000_003 + self.step) % (1 << 62))
        return gumbel_noise(torch.rand(like.shape, generator=generator).to(like.device))

    def set_step(self, step: int, total_steps: int | None) -> None:
        self.step = step

    @torch.no_grad()
    def updated(self) -> None:
        """The proximal step of l1, by λ times the learning rate of the step that was taken."""
        if self.config.loss != "l1" or not self.config.prox:
            return
        if self.learning_rate is None:
            raise ValueError(
                "concept_bottleneck: prox shrinks weights by the learning rate, and handle.updated() was not told it. "
                "Call handle.updated(learning_rate=...), or set prox=False."
            )
        weight = self.layers.bottleneck
        weight.copy_(soft_threshold(weight, self.config.l1_in_force * self.learning_rate))

    def tensors(self) -> dict[str, Tensor]:
        layers = self.layers
        fixed = {name: getattr(self, name) for name in FIXED}
        return {**fixed, "bottleneck": layers.bottleneck.detach(), "head": layers.head.detach()}

    @torch.no_grad()
    def take(self, owner: nn.Module, tensors: dict[str, Tensor]) -> None:
        own = self.tensors()
        for name in own:
            if own[name].shape != tensors[name].shape:
                raise ValueError(f"{name} is {tuple(tensors[name].shape)} there and {tuple(own[name].shape)} here")
            own[name].copy_(tensors[name])

    def held_tensors(self) -> list[Tensor]:
        return [] if self.z_bd is None else [self.z_bd]

    def stats(self) -> dict[str, float]:
        """Shares of exact zeros, and how many concepts count: exp(entropy) of softmax(z), in the last forward."""
        weight = self.layers.bottleneck.detach()
        found = {
            "zero_weight_ratio": weight.eq(0).float().mean().item(),
            "dropped_concepts": float(weight.eq(0).all(1).sum()),
        }
        if self.z_bd is not None:
            found["zero_activation_ratio"] = self.z_bd.eq(0).float().mean().item()
            log_p = F.log_softmax(self.z_bd, dim=-1)
            entropy = -(log_p.exp() * log_p).sum(-1).mean().item()
            found |= {"entropy": entropy, "effective_concepts": float(torch.tensor(entropy).exp())}
        return found

    def merge_error(self) -> str | None:
        return "its logits are sums over concepts, which the dense head does not compute"


class ByConcepts:
    """Mixed into the head."""

    concept_bottleneck: Concepts

    def forward(self, x: Tensor) -> Tensor:
        if self.concept_bottleneck.runs_dense:
            return dense_forward(ByConcepts, self, x)
        return self.concept_bottleneck(x)


class SeesLabels:
    """Mixed into the model: its head learns the labels, which the contrastive losses pair by."""

    concepts_seen: Seen
    extra_arguments = ()

    def around(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """Run `forward`; see `surgery.outermost`."""
        labels = kwargs.get("labels")
        self.concepts_seen.labels_b = labels if isinstance(labels, Tensor) and not labels.is_floating_point() else None
        try:
            return forward(*args, **kwargs)
        finally:
            self.concepts_seen.clear()
