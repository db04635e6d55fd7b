"""`python -m tests.torture`: counts of faults under bad inputs, kills, full disks and doubled starts."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

for _name, _value in (
    ("OMP_NUM_THREADS", "1"),
    ("TRANSFORMERS_VERBOSITY", "error"),
    ("HF_HUB_OFFLINE", "1"),
    ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
    ("HF_DATASETS_DISABLE_PROGRESS_BARS", "1"),
    ("TOKENIZERS_PARALLELISM", "false"),
):
    os.environ.setdefault(_name, _value)


def main() -> int:
    from tests.torture.attempts import PARTS
    from tests.torture.fork import import_everything
    from tests.torture.world import make

    ask = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    ask.add_argument("parts", nargs="*", choices=[[], *PARTS], help="which parts; all if none is named")
    ask.add_argument("--share", type=float, default=1.0, help="share of each part's cases to run (default 1)")
    ask.add_argument("--seed", type=int, default=0)
    ask.add_argument("--only", help="one case, by its name: its output is printed, its folder kept")
    ask.add_argument("--output", type=Path, default=Path("runs/torture"), help="where the counts and the faults go")
    asked = ask.parse_args()

    import_everything()
    root = Path(tempfile.mkdtemp(prefix="torture-"))
    make(root / "world")
    began = time.monotonic()
    counts: dict[str, dict[str, int]] = {}
    faults: list[dict[str, object]] = []
    for part in asked.parts or PARTS:
        tally: Counter[str] = Counter()
        for done in PARTS[part](root, asked.seed, asked.share, asked.only):
            tally["cases"] += 1
            tally.update(done.faults)
            if done.faults or asked.only:
                faults.append(done.to_dict())
                print(f"\n{done.name}: {', '.join(done.faults)}\n  {done.command}\n  {done.said[-800:]}", flush=True)
            elif tally["cases"] % 50 == 0:
                print(f"{part}: {tally['cases']} cases, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        counts[part] = dict(tally)
    asked.output.mkdir(parents=True, exist_ok=True)
    result = {"seconds": round(time.monotonic() - began), "counts": counts, "faults": faults}
    (asked.output / "torture.json").write_text(json.dumps(result, indent=1) + "\n")
    for part, tallied in counts.items():
        bad = {name: number for name, number in tallied.items() if name != "cases"}
        print(f"{part:8} {tallied.get('cases', 0):5} cases, {sum(bad.values())} faults{f': {bad}' if bad else ''}")
    if not asked.only:
        shutil.rmtree(root, ignore_errors=True)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
