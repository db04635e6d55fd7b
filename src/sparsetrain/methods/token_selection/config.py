"""TokenSelection: which tokens a training step back-propagates through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from sparsetrain.core.config import MethodConfig, in_range, one_of

POOLS = ("all", "targets", "scored")
POLICIES = ("random", "prefix", "loss", "gradient_norm")
ALWAYS = ("first", "last")
SCORES = ("now", "previous")
CONTEXTS = ("random", "near", "attended")


@dataclass(frozen=True, kw_only=True)
class TokenSelection(MethodConfig, method="token_selection"):
    """The forward is exact; gradient and activations are kept for selected tokens only (TokenTune, arXiv 2501.18824).

    Counts are of each sample, or of each document of a packed row, without padding: n tokens, |S| of them selected.

    Args:
        keep_ratio: |S| = round(keep_ratio·n), between 1 and n, tokens that are always kept included. 0.3 when neither
            this nor `num_tokens` is given. 1 is dense training.
        num_tokens: |S| as a number; all tokens of a shorter sample.
        pool: where tokens are drawn from: `all` (published); `targets`, positions that predict a token with a loss,
            before others; `scored`, the scores that come with the batch as `token_scores`.
        policy: how they are drawn: `random` (published), uniform without replacement; `prefix`, the first ones; `loss`
            and `gradient_norm`, the largest loss or gradient norm at the head, in `token_scores` or from a look.
        scores: when tokens are scored for those two: `now`, in a look at all rows before any is selected; `previous`,
            in the sample's last visit (its first draws at random; checkpoints hold no scores).
        keep_all_targets: every target is selected, and context takes what is left of |S|; where nothing is left, |S|
            grows to the targets and the always-kept tokens. The loss is then the dense loss. Needs pool=targets.
        context: which tokens fill |S| up after the targets (pool=targets): `random`, as `policy` draws them; `near`,
            the closest to a target that sees them: in a causal model, those before one; `attended`, those that receive
            most attention from the targets, over all heads and layers, from a look at all rows before any is selected.
        train_keys: keys and values of tokens that are not selected train what makes them too: their gradient reaches
            the projections of their own block (its LoRA) and goes no further down. Saved then: what enters the
            projections, for all tokens.
        recompute: of a block keep the selected rows of its input, and keys and values of all rows; the rest is computed
            again on the selected rows in the backward (keep_ratio of a forward), and norms and FFNs run in pieces of a
            row. For very long rows, in place of gradient checkpointing.
        offload: those keys and values wait in the CPU's memory, pinned, until the backward. Needs recompute.
        always_keep: positions of every sample that are always selected: `first`, `last`.
        extra: the always-kept tokens come on top of |S| = floor(keep_ratio·(n - 2)) or num_tokens (published).
        ensure_target: if no selected token has a target, one that has takes the place of one that has not.
        unbiased: weigh the loss of each selected target by 1 / its probability of selection (policy `random`).
        seed: with the step and the sample's own token ids, the whole state of the draw.
    """

    about: ClassVar[str] = (
        "Gradient and activations for some tokens alone (keep_ratio or num_tokens; policy random, prefix, "
        "loss, gradient_norm; pool targets for sft); the forward stays exact. Not where activations are small "
        "beside weights and optimizer state, nor above keep_ratio=0.5."
    )
    changes_outputs: ClassVar[bool] = False
    ops: ClassVar[tuple[str, ...]] = ("selected_rows",)
    own_dropout: ClassVar[bool] = True
    frees_inputs: ClassVar[bool] = True

    keep_ratio: float | None = None
    num_tokens: int | None = None
    pool: str = "all"
    policy: str = "random"
    scores: str = "now"
    keep_all_targets: bool = False
    context: str = "random"
    train_keys: bool = False
    recompute: bool = False
    offload: bool = False
    always_keep: tuple[str, ...] = ("first",)
    extra: bool = False
    ensure_target: bool = True
    unbiased: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.keep_ratio is None and self.num_tokens is None:
            object.__setattr__(self, "keep_ratio", 0.3)
        super().__post_init__()

    @classmethod
    def paper(cls, **changes: object) -> Self:
        """The published choices: k random tokens of all, plus the first and the last; no target is ensured."""
        published = {"always_keep": ("first", "last"), "extra": True, "ensure_target": False}
        return cls(**{**published, **changes})  # type: ignore[arg-type]

    @classmethod
    def dense_limit(cls) -> Self:
        return cls(keep_ratio=1.0)

    @classmethod
    def example(cls) -> Self:
        return cls(keep_ratio=0.3)

    def shortest_trace(self) -> float:
        # the loss head works in chunks of 128 rows, and fewer fill none; shorter rows are selected whole
        return max(128 / (self.keep_ratio or 1.0), 2.0 * (self.num_tokens or 0))

    @property
    def needs_scores(self) -> bool:
        """Must every batch bring `token_scores`?"""
        return self.pool == "scored" or self.policy in ("loss", "gradient_norm")

    def count(self, num_tokens: int) -> int:
        """|S| of a sample of that many tokens, before `keep_all_targets`."""
        if self.num_tokens is not None:
            wanted = self.num_tokens + (2 if self.extra else 0)
        elif self.extra:
            wanted = int(self.keep_ratio * max(0, num_tokens - 2)) + 2  # type: ignore[operator]
        else:
            wanted = round(self.keep_ratio * num_tokens)  # type: ignore[operator]
        return min(max(wanted, 1), num_tokens)

    def ratio(self, num_tokens: int) -> float:
        """ρ = |S| / n."""
        return self.count(num_tokens) / num_tokens

    def check(self) -> None:
        super().check()
        if self.keep_ratio is not None and self.num_tokens is not None:
            raise ValueError(
                f"token_selection: keep_ratio={self.keep_ratio} and num_tokens={self.num_tokens} are both given. "
                "Give one."
            )
        if self.keep_ratio is not None:
            in_range("token_selection", "keep_ratio", self.keep_ratio, 0, 1, low_open=True)
        if self.num_tokens is not None and self.num_tokens < 1:
            raise ValueError(f"token_selection: num_tokens={self.num_tokens}; it must be at least 1.")
        one_of("token_selection", "pool", self.pool, POOLS)
        one_of("token_selection", "policy", self.policy, POLICIES)
        one_of("token_selection", "context", self.context, CONTEXTS)
        one_of("token_selection", "scores", self.scores, SCORES)
        for name in self.always_keep:
            one_of("token_selection", "always_keep", name, ALWAYS)
        self._check_targets()
        if self.unbiased and (self.policy != "random" or self.pool == "scored"):
            raise ValueError(
                f"token_selection: unbiased=True needs known probabilities of selection, and policy={self.policy!r} "
                f"with pool={self.pool!r} has none. Use policy='random' with pool='all' or 'targets'."
            )

        self._check_recompute()

    def _check_recompute(self) -> None:
        if self.offload and not self.recompute:
            raise ValueError(
                "token_selection: offload=True moves what recompute=True leaves of a block, and recompute=False. Give "
                "recompute=True too, or leave offload out."
            )
        if self.recompute and self.train_keys:
            raise ValueError(
                "token_selection: train_keys=True keeps what enters the projections for all tokens, and recompute=True "
                "keeps selected rows alone. Give one of them."
            )

    def _check_targets(self) -> None:
        if self.scores == "previous" and self.policy not in ("loss", "gradient_norm"):
            raise ValueError(
                f"token_selection: scores='previous' says when tokens are scored, and policy={self.policy!r} scores "
                "none. Use policy='loss' or 'gradient_norm'."
            )
        if self.pool != "targets" and (self.keep_all_targets or self.context != "random"):
            raise ValueError(
                f"token_selection: keep_all_targets={self.keep_all_targets} and context={self.context!r} tell targets "
                f"from context, and pool={self.pool!r} draws both alike. Use pool='targets'."
            )
        if self.keep_all_targets and self.policy in ("loss", "gradient_norm"):
            raise ValueError(
                f"token_selection: policy={self.policy!r} ranks targets, and keep_all_targets=True keeps them all. Use "
                "policy='random', or keep_all_targets=False."
            )
