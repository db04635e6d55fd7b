"""Kill one of several ranks at any moment, and go on: what must be whole, counted.

    python -m tests.field.killed_ranks --times 30 --folder DIR     # goes on where it was stopped

Each trial is a launch of the command line, a SIGKILL, and the same command with --resume. Ranks are forks of a process
that has imported everything, and this one does what torchrun's agent does: it holds the store, and ends all others when
one has died. Every second kill is aimed at a checkpoint that is being written.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from sparsetrain.runs.checkpoints import own_checkpoints
from sparsetrain.runs.manifest import MANIFEST, verify_manifest
from tests.parallel.ranks import PRELOADED

RANKS = 4
FLAGS = "--seq-len 32 --steps 8 --batch-size 1 --grad-accum 4 --save-every 2 --device cpu --dtype fp32 --lr 1e-2"
FLAGS += " --calibration-tokens 64 --eval-tokens 64 --lora-r 4 --method routed_ffn:num_blocks=4,num_active=2"
LIMIT_S = 240.0
Killer = Callable[[list[Any], float], None]
"""(the ranks, when the output folder appeared) -> nothing; called again and again until it has killed one."""


def rank(place: int, port: int, flags: list[str], log: str) -> None:
    """One rank, as torchrun starts it."""
    os.environ.update({"RANK": str(place), "LOCAL_RANK": str(place), "MASTER_ADDR": "127.0.0.1"})
    os.environ.update({"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS), "MASTER_PORT": str(port)})
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    with open(log, "a") as said:  # c10d's own words too
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    torch.set_num_threads(1)
    from sparsetrain.cli import run

    sys.exit(run(flags))


class Ranks:
    """A tiny model and text, and launches on them."""

    def __init__(self, folder: Path, model: Path, text: Path) -> None:
        self.folder = folder
        self.flags = f"finetune --model {model} --data {text} {FLAGS}".split()
        multiprocessing.set_forkserver_preload(PRELOADED)
        self.context = multiprocessing.get_context("forkserver")

    def launch(self, output: Path, *more: str, kill: Killer | None = None) -> tuple[int, float, str]:
        """(the first exit code that is not 0, seconds since the folder appeared, what was said)."""
        store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
        log = self.folder / f"{output.name}.log"
        log.unlink(missing_ok=True)
        flags = [*self.flags, "--output", str(output), *more]
        made = [self.context.Process(target=rank, args=(i, store.port, flags, str(log))) for i in range(RANKS)]
        for process in made:
            process.start()
        code, appeared = self._watch(made, output, kill)
        return code, time.monotonic() - appeared, log.read_text()

    def _watch(self, made: list[Any], output: Path, kill: Killer | None) -> tuple[int, float]:
        began, appeared, code = time.monotonic(), None, 0
        while any(process.is_alive() for process in made):
            if appeared is None and output.exists():
                appeared = time.monotonic()
            if kill is not None and appeared is not None:
                kill(made, appeared)
            codes = [process.exitcode for process in made]
            if not code and (code := next((c for c in codes if c), 0)):
                for process in made:
                    if process.exitcode is None:
                        process.terminate()
            if time.monotonic() - began > LIMIT_S:
                for process in made:
                    process.kill()
                raise TimeoutError(f"ranks of {output} did not end in {LIMIT_S} s.")
            time.sleep(0.01)
        return code or next((p.exitcode for p in made if p.exitcode), 0), appeared or began


class Kill:
    """SIGKILL of one rank: after a share of a whole run's time, or in the middle of a checkpoint being written."""

    def __init__(self, draw: random.Random, output: Path, whole_s: float, saving: bool) -> None:
        self.output, self.saving, self.place = output, saving, draw.randrange(RANKS)
        self.after_s, self.save = draw.uniform(0, whole_s), draw.randrange(2, 9, 2)
        self.into_s, self.seen, self.done, self.unfinished = draw.uniform(0, 0.1), 0.0, False, False

    def __call__(self, made: list[Any], appeared: float) -> None:
        if self.done or made[self.place].exitcode is not None or not self._due(appeared):
            return
        os.kill(made[self.place].pid, signal.SIGKILL)
        self.done, self.unfinished = True, bool(begun(self.output))

    def _due(self, appeared: float) -> bool:
        now = time.monotonic()
        if not self.saving:
            return now - appeared >= self.after_s
        if not self.seen and f"checkpoint-{self.save}" in {path.name for path in begun(self.output)}:
            self.seen = now
        return bool(self.seen) and now - self.seen >= self.into_s


def begun(output: Path) -> list[Path]:
    """Checkpoints that are being written, or were when a rank died."""
    return [path for path in output.glob("checkpoint-*") if not (path / MANIFEST).is_file()]


def outcome(output: Path) -> dict[str, Any]:
    """What a run that ended has: its losses, and its weights to the bit."""
    losses = [step["loss"] for step in json.loads((output / "result.json").read_text())["run"]["steps"]]
    return {"losses": losses, "weights": (output / "adapter" / "adapter_model.safetensors").read_bytes().hex()}


def trial(ranks: Ranks, whole: Path, whole_s: float, seed: int) -> dict[str, Any]:
    """Kill, look at what is left, go on, compare. Raises AssertionError for what must not be."""
    output = ranks.folder / f"killed-{seed}"
    shutil.rmtree(output, ignore_errors=True)
    kill = Kill(random.Random(seed), output, whole_s, saving=seed % 2 == 1)
    code, _, said = ranks.launch(output, kill=kill)
    if not kill.done:
        assert code == 0, said
        return {"seed": seed, "killed": False}
    assert code != 0, said
    told = [line for line in said.splitlines() if line.startswith(("sparsetrain:", "sparsetrain,"))]
    assert len(told) <= 1, told
    found = [path for path in own_checkpoints(output) if (path / MANIFEST).is_file()]
    for path in found:
        verify_manifest(path)
    last = max((int(path.name.rpartition("-")[2]) for path in found), default=None)
    code, _, said = ranks.launch(output, "--resume")
    assert code == 0, said
    resumed = json.loads((output / "result.json").read_text())["resumed_from"]
    assert resumed == last, (resumed, last)
    assert outcome(output) == outcome(whole)
    shutil.rmtree(output)
    how = {"seed": seed, "killed": True, "rank": kill.place, "saving": kill.unfinished, "resumed_from": last}
    return how | {"told": told[0] if told else ""}


def trials(ranks: Ranks, seeds: range) -> list[dict[str, Any]]:
    """Those that are left of these; each is recorded when it is done."""
    whole, record = ranks.folder / "whole", ranks.folder / "trials.json"
    kept = json.loads(record.read_text()) if record.exists() else {}
    if not kept:
        code, whole_s, said = ranks.launch(whole)
        assert code == 0, said
        kept = {"whole_s": whole_s, "trials": []}
        record.write_text(json.dumps(kept))
    for seed in seeds:
        if seed not in {done["seed"] for done in kept["trials"]}:
            kept["trials"].append(trial(ranks, whole, kept["whole_s"], seed))
            record.write_text(json.dumps(kept, indent=1))
    return kept["trials"]


def main() -> None:
    from tests.cli.conftest import save_llama, write_text

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=30)
    parser.add_argument("--folder", type=Path, required=True)
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    text = asked.folder / "text.txt"
    if not text.exists():
        save_llama(asked.folder / "llama")
        write_text(text, 3000)
    ranks, seed = Ranks(asked.folder, asked.folder / "llama", text), 0
    while True:
        done = [each for each in trials(ranks, range(seed)) if each["killed"]]
        saving = sum(each["saving"] for each in done)
        print(f"{len(done)} kills, {saving} of them while a checkpoint was written: all went on alike", flush=True)
        if len(done) >= asked.times:
            return
        seed += 1


if __name__ == "__main__":
    main()
