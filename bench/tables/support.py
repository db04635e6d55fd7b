"""docs/support.md, from the data that runs are checked against."""

from __future__ import annotations

from bench.tables.steps import registered
from bench.tables.trainers import trainers, trainers_of_weights

TRAINERS = """
## Trainers

Each yes is a training of three steps by the real trainer (`tests/hf/test_every_trainer.py`) with `deploy="dense"`: the
method is on in training, evaluation is the dense model's, and plain PEFT loads what was saved and computes the same.
Each no is a refusal, tested too. DPO, KTO, GRPO and RLOO read the log-probability of every token: with token selection
these are exact, and gradient flows through selected tokens. TRL's own `activation_offloading` changes no weight beside
each method (tested through its bookkeeping, with copies from a CPU to a CPU; TRL needs a GPU for it). TRL 1.16 has none
for GRPO; put around its training step, it is exact there too. axolotl and LLaMA-Factory: [others.md](others.md).
"""

WEIGHTS = """
### Methods of weights

These train without LoRA (SaRA and PST on a frozen model, the others all weights) and are used as they are trained. Each
yes is such a training of three steps: the method is on in the first forward (SaRA: no entry but its tenth moves), and
what the trainer saves computes the same when `load` reads it. DPO and KTO are given a reference of their
own, RLOO runs with `beta=0`: TRL would fetch its reference by the model's name. `concept_bottleneck` classifies, and no
language model's trainer takes it.
"""


GROWTHS = """
## Methods that make several models

{names} train plain models, one after the other: what stands between two of them is what they do, and no part of them
is in the model that trains, but for the masks of a ramp. `tests/methods/test_contract.py` holds each on each family
but those refused above (the outputs before and after, the optimizer's state, the plain model at the end), their own
tests hold masks under autocast, non-reentrant checkpointing and `torch.compile`, and a resume after a kill at any step.
They train in data parallel (DDP), not under `fully_shard`. Of other features nothing is claimed: they start from random
weights, so that a LoRA, 4 bits or a trainer for preferences have no place beside them.
"""


def support() -> str:
    """docs/support.md: what each method works with, from the data that runs are checked against."""
    import sparsetrain.methods  # noqa: F401  (enters them in the registry)
    from sparsetrain.core.config import registered_methods
    from sparsetrain.hf.model.families import family_limits, further_families
    from sparsetrain.surgery.method import method_of
    from sparsetrain.surgery.support import FEATURES, support_rows

    families, kinds = family_limits(), registered_methods()
    ours = registered()
    rows = [row for row in support_rows(families) if row["method"] in ours]
    growing = [row["method"] for row in rows if method_of(kinds[row["method"]]).growth is not None]
    own = [row for row in rows if row["method"] not in growing]
    lines = [
        "# What works with what",
        "",
        "Written by `make docs` from the data that every run is checked against (`Method.limits`, the table of",
        "families, `surgery/support.py`). A yes is exercised by `tests/methods/test_contract.py`; a no is refused",
        "before a run.",
        "",
        f"Families: {', '.join(families)}.",
        "",
        "Built like these, and held to a part of the contract (dense limit, restoring, causality, padding, packing,",
        f"LoRA; they cannot be grown): {', '.join(further_families())}.",
        "",
        "| feature | " + " | ".join(row["method"] for row in own) + " |",
        "| --- |" + " --- |" * len(own),
    ]
    for feature, meaning in FEATURES.items():
        lines.append(f"| {meaning} | " + " | ".join(row["features"][feature] for row in own) + " |")
    reasons = {f"{feature}: {reason}." for row in own for feature, reason in row["reasons"].items()}
    reasons |= {
        f"{name}, {feature}: {reason}." for name, found in families.items() for feature, reason in found.items()
    }
    for row in rows:
        reasons |= {f"{row['method']} on {name}: {reason}." for name, reason in row["refused_families"].items()}
    lines += ["", "## Why not", "", *(f"- {reason}" for reason in sorted(reasons))]
    names = ", ".join(f"`{name}`" for name in growing)
    return (
        "\n".join(
            [
                *lines,
                GROWTHS.format(names=names).rstrip(),
                TRAINERS.rstrip(),
                *trainers(),
                WEIGHTS.rstrip(),
                *trainers_of_weights(),
            ]
        )
        + "\n"
    )
