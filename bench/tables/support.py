"""docs/support.md, from the data that runs are checked against."""

from __future__ import annotations

from bench.tables.steps import registered
from bench.tables.trainers import trainers

TRAINERS = """
## Trainers

Each yes is a training of three steps by the real trainer (`tests/hf/test_every_trainer.py`) with `deploy="dense"`: the
method is on in training, evaluation is the dense model's, and plain PEFT loads what was saved and computes the same.
Each no is a refusal, tested too. DPO, KTO, GRPO and RLOO read the log-probability of every token: with token selection
these are exact, and gradient flows through selected tokens. TRL's own `activation_offloading` changes no loss beside
each method (tested through its bookkeeping, with copies from a CPU to a CPU; TRL needs a GPU for it). axolotl and
LLaMA-Factory: [others.md](others.md).
"""


def support() -> str:
    """docs/support.md: what each method works with, from the data that runs are checked against."""
    import sparsetrain.methods  # noqa: F401  (enters them in the registry)
    from sparsetrain.hf.model.families import family_limits, further_families
    from sparsetrain.surgery.support import FEATURES, support_rows

    families = family_limits()
    ours = registered()
    rows = [row for row in support_rows(families) if row["method"] in ours]
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
        "| feature | " + " | ".join(row["method"] for row in rows) + " |",
        "| --- |" + " --- |" * len(rows),
    ]
    for feature, meaning in FEATURES.items():
        lines.append(f"| {meaning} | " + " | ".join(row["features"][feature] for row in rows) + " |")
    reasons = {f"{feature}: {reason}." for row in rows for feature, reason in row["reasons"].items()}
    reasons |= {
        f"{name}, {feature}: {reason}." for name, found in families.items() for feature, reason in found.items()
    }
    for row in rows:
        reasons |= {f"{row['method']} on {name}: {reason}." for name, reason in row["refused_families"].items()}
    lines += ["", "## Why not", "", *(f"- {reason}" for reason in sorted(reasons))]
    return "\n".join([*lines, TRAINERS.rstrip(), *trainers()]) + "\n"
