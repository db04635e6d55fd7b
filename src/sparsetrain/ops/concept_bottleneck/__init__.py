"""The sparse concept bottleneck: its losses, the search of the concept matrix, and the soft threshold.

Formulas: Sparse-CBM (arXiv 2404.03323, sections 3 and 4). b rows, d concepts, c classes, k rows of a batch that are
paired with themselves. Scores ψ_bd say how well a row fits each concept; the bottleneck gives z = W ψ.
"""

from __future__ import annotations

import warnings

from torch import Tensor
from torch.nn import functional as F

from sparsetrain.ops.concept_bottleneck.reference import averaged_loss, cosines, pair_loss, shrunk

FORMS = ("paper", "official")
SCORES = ("logits", "log_softplus")
RULES = ("cosine", "max_score")
NORMS = ("none", "rowsum")


def contrastive_loss(scores_kk: Tensor, labels_k: Tensor | None = None) -> Tensor:
    """Each row shall fit its own profile best, and each profile its own row.

    Equals: (F.cross_entropy(G, arange(K)) + F.cross_entropy(G.T, arange(K))) / 2.

    Args:
        scores_kk: G, [k, k], row k's score with the profile of row j.
        labels_k: [k]; rows of a class have one profile, so its other pairs are no negatives and are left out.

    Returns:
        A scalar.

    Raises:
        ValueError: G is not square, has fewer than two rows, is not finite, or the labels are not one a row.
    """
    _check_square("contrastive_loss", scores_kk, labels_k)
    return pair_loss(scores_kk, labels_k)


def gumbel_loss(
    scores: Tensor,
    labels_k: Tensor | None = None,
    *,
    noise: Tensor | None = None,
    temperature: float = 1.0,
    score: str = "logits",
    form: str = "paper",
    hard: bool = False,
) -> Tensor:
    """The contrastive loss of (G + g) / τ with Gumbel noise g.

    Args:
        scores: G, [k, k]; of any two sizes for `form="official"`.
        labels_k: as of `contrastive_loss`.
        noise: g, of the scores' shape (`gumbel_noise`); None outside of training.
        temperature: τ, above 0.
        score: `logits` takes G as it is; `log_softplus` takes log softplus(G), which is defined for every sign.
        form: `paper`, or `official`: the mean over all entries, which is least where all scores are equal. It is there
            to be compared with, and warns.
        hard: refused: a one-hot choice has logarithms of 0.

    Raises:
        ValueError: as `contrastive_loss`; an unknown word; τ that is not positive; `hard`.
    """
    if hard:
        raise ValueError("gumbel_loss: hard=True takes the logarithm of 0. Leave it out.")
    for name, value, choices in (("score", score, SCORES), ("form", form, FORMS)):
        if value not in choices:
            raise ValueError(f"gumbel_loss: {name}={value!r} is unknown. Choose from {choices}.")
    if not temperature > 0:
        raise ValueError(f"gumbel_loss: temperature={temperature}. It must be above 0.")
    if form == "paper":
        _check_square("gumbel_loss", scores, labels_k)
    if score == "log_softplus":
        scores = F.softplus(scores).clamp(min=1e-30).log()
    scores = (scores if noise is None else scores + noise) / temperature
    if form == "paper":
        return pair_loss(scores, labels_k)
    warnings.warn(
        "form='official' averages over all entries: it is least where all scores are equal, and flattens them. Use "
        "form='paper' to train.",
        stacklevel=2,
    )
    return averaged_loss(scores)


def gumbel_noise(uniform: Tensor) -> Tensor:
    """−log(−log u), g of `gumbel_loss`, of numbers u drawn uniformly from [0, 1)."""
    return -(-uniform.clamp(1e-7, 1 - 1e-7).log()).log()


def concept_matrix_search(v_bd: Tensor, t_cd: Tensor, *, rule: str = "cosine", norm: str = "none") -> Tensor:
    """CMS: classify without training, by the class whose profile of concepts is most like the row's.

    Equals: F.cosine_similarity(V[:, None], T[None], dim=-1).argmax(1).

    Args:
        v_bd: V, cosines of rows with concepts. t_cd: T, cosines of classes with concepts.
        rule: `cosine`, or `max_score`: the row's best concept chooses the class that it fits best.
        norm: `rowsum` divides rows by their sums first, as the authors' code does: a negative sum flips the row.

    Returns:
        classes [b], int64. Scaling a row by a positive number changes none of them.

    Raises:
        ValueError: V and T differ in their number of concepts, an unknown word, or numbers that are not finite.
    """
    if v_bd.ndim != 2 or t_cd.ndim != 2 or v_bd.shape[1] != t_cd.shape[1]:
        raise ValueError(
            f"concept_matrix_search: rows {tuple(v_bd.shape)} and classes {tuple(t_cd.shape)}. Both need one column a "
            "concept."
        )
    for name, value, choices in (("rule", rule, RULES), ("norm", norm, NORMS)):
        if value not in choices:
            raise ValueError(f"concept_matrix_search: {name}={value!r} is unknown. Choose from {choices}.")
    check_finite("concept_matrix_search", v_bd, t_cd)
    if norm == "rowsum":
        v_bd, t_cd = v_bd / v_bd.sum(-1, keepdim=True), t_cd / t_cd.sum(-1, keepdim=True)
    if rule == "max_score":
        return t_cd[:, v_bd.argmax(1)].argmax(0)
    return cosines(v_bd, t_cd).argmax(1)


def soft_threshold(weight: Tensor, amount: float) -> Tensor:
    """The proximal step of amount · ‖w‖₁: entries go towards 0 by `amount`, and those within it become exactly 0.

    Raises:
        ValueError: a negative amount.
    """
    if amount < 0:
        raise ValueError(f"soft_threshold: amount={amount}. It must be 0 or more.")
    return shrunk(weight, amount)


def check_finite(op: str, *tensors: Tensor) -> None:
    """Raise ValueError if a score is infinite or not a number."""
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise ValueError(f"{op}: scores are not finite. Look at the encoder's outputs and at the scale.")


def _check_square(op: str, scores: Tensor, labels: Tensor | None) -> None:
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1]:
        raise ValueError(
            f"{op}: scores {tuple(scores.shape)} are not square. Row k is paired with its own profile, so give one "
            "profile a row (of its class, or of itself), not one a concept."
        )
    if len(scores) < 2:
        raise ValueError(f"{op}: a batch of {len(scores)} has nothing to tell apart. Give at least two rows.")
    if labels is not None and labels.shape != scores.shape[:1]:
        raise ValueError(f"{op}: {tuple(labels.shape)} labels for {len(scores)} rows. Give one a row.")
    check_finite(op, scores)
