"""The four parts of the torture: each yields its cases as they end."""

from __future__ import annotations

import ctypes
import itertools
import json
import multiprocessing
import os
import resource
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from tests.torture.fork import Ended, Job, run_all, run_one
from tests.torture.inputs import KINDS
from tests.torture.judge import faults_of, half_written, snapshot, touched
from tests.torture.world import FINETUNES, FLOOD, ROUTED, finetune, pretrain

NUM_INPUTS, NUM_KILLS, NUM_DISKS, NUM_DOUBLES = 1600, 100, 20, 20
RUNS: dict[str, tuple[str, ...]] = {
    **{name: finetune("--steps", "3", *extra) for name, extra in FINETUNES.items()},
    "compared": finetune("--steps", "2", "--method", ROUTED, "--compare", "dense"),
    "pretrained": pretrain("--steps", "3", "--method", "semi_structured"),
    "flooded": pretrain("--steps", "4", "--method", FLOOD),
}
"""The ten recipes that are killed."""
KEPT = ".kept"
"""Where a run's small disk is copied to when it ends, since it goes with the process."""


@dataclass(frozen=True)
class Done:
    name: str
    command: str
    faults: list[str]
    said: str

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "faults": self.faults, "command": self.command, "said": self.said[-2000:]}


Part = Callable[[Path, int, float, str | None], Iterator[Done]]


def inputs(root: Path, seed: int, share: float, only: str | None) -> Iterator[Done]:
    """Bad inputs over all commands, in the shares of `KINDS`."""
    turns = [name for name, (_, weight) in KINDS.items() for _ in range(weight)]
    names = [f"{turns[i % len(turns)]}-{i}" for i in range(round(NUM_INPUTS * share))]

    def jobs() -> Iterator[Job]:
        for name in names:
            if only in (None, name):
                folder = _copy(root, name)
                arguments, must_fail = KINDS[name.partition("-")[0]][0](Random(f"{seed}/{name}"), folder)
                yield Job(arguments, folder, (name, must_fail, snapshot(folder)))

    for job, ended in run_all(jobs()):
        name, must_fail, before = job.mark
        found = faults_of(ended, job.folder, before, must_fail=must_fail, as_json="--json" in job.arguments)
        yield _done(name, job, ended, found, only)


def kills(root: Path, seed: int, share: float, only: str | None) -> Iterator[Done]:
    """Each of ten recipes, killed where it writes and while it computes, and asked to go on until it ends: the result
    must be the one of an undisturbed run, and no file that it didn't write may go."""
    each = max(1, round(NUM_KILLS * share / len(RUNS)))
    cases = [(name, number) for name, number in itertools.product(RUNS, range(each))]
    cases = [(name, number) for name, number in cases if only in (None, f"{name}-kill{number}")]
    _prepare(root, {name for name, _ in cases})
    yield from _two_at_once(_kill_one, [(root, seed, name, number, each, only) for name, number in cases])


def _kill_one(root: Path, seed: int, name: str, number: int, each: int, only: str | None) -> Done:
    reference, events, seconds = _undisturbed(root, name)
    label = f"{name}-kill{number}"
    draw = Random(f"{seed}/{label}")
    folder = _copy(root, label)
    before = snapshot(folder)
    # three in four at a write (evenly over all of them), the others at a moment of the computing
    if number % 4 != 3:
        at = 1 + int(events * (number + draw.random()) / each)
        ended = run_one(Job(RUNS[name], folder, label, before=lambda: _at_write(at, _end_at_once)))
    else:
        ended = run_one(Job(RUNS[name], folder, label, kill_after=seconds * draw.random()))
    found = half_written(folder, before)[:1]
    again = run_one(Job((*RUNS[name], "--resume"), folder, label)) if ended.code else ended
    if again.code and "finished" not in again.err:  # killed after its last file
        found.append("not resumed")
    else:
        found += _unequal(reference, folder / "out")
    found += ["foreign files touched"] if touched(folder, before) else []
    return _done(label, Job((*RUNS[name], "--resume"), folder, label), again, found, only)


def disks(root: Path, seed: int, share: float, only: str | None) -> Iterator[Done]:
    """A disk that is full after some kilobytes: the run ends without a fault of `judge`, leaves nothing half-written,
    and once there is room it goes on and ends as an undisturbed run does."""
    names = ["both", "full", "pretrained", "compared"]
    cases = [(names[number % len(names)], number) for number in range(max(1, round(NUM_DISKS * share)))]
    cases = [(name, number) for name, number in cases if only in (None, f"{name}-disk{number}")]
    _prepare(root, {name for name, _ in cases})
    yield from _two_at_once(_fill_one, [(root, name, number, only) for name, number in cases])


def _fill_one(root: Path, name: str, number: int, only: str | None) -> Done:
    reference, _, _ = _undisturbed(root, name)
    label = f"{name}-disk{number}"
    folder = _copy(root, label)
    size = sum(path.stat().st_size for path in reference.rglob("*") if path.is_file())
    room = int(size * (number + 0.5) / NUM_DISKS) // 4096 * 4096 + 4096
    (folder / "out").mkdir()
    before = snapshot(folder)
    ended = run_one(Job(RUNS[name], folder, label, before=lambda: _small_disk(room)))
    if (kept := folder / KEPT).exists():  # the room is given back: what was on the small disk is on a large one
        (folder / "out").rmdir()
        kept.rename(folder / "out")
    found = faults_of(ended, folder, before, must_fail=False, as_json=False)
    told = ended if found else None
    again = run_one(Job((*RUNS[name], "--resume"), folder, label)) if ended.code else ended
    found += ["not resumed"] if again.code else _unequal(reference, folder / "out")
    found += ["foreign files touched"] if touched(folder, before) else []
    return _done(label, Job((*RUNS[name], "--resume"), folder, label), told or again, found, only)


def doubles(root: Path, seed: int, share: float, only: str | None) -> Iterator[Done]:
    """Two runs on one output at the same moment: one ends well, the other is refused, and the files are one run's."""
    names = ["lora", "both", "compared", "pretrained"]
    _prepare(root, set(names))
    whole = {name: _undisturbed(root, name) for name in names}
    for number in range(max(1, round(NUM_DOUBLES * share))):
        name = names[number % len(names)]
        label = f"{name}-double{number}"
        if only not in (None, label):
            continue
        folder = _copy(root, label)
        command = RUNS[name]
        if number % 2:  # two that go on from a stopped run
            run_one(Job(command, folder, label, before=lambda at=whole[name][1] // 2: _at_write(at, _end_at_once)))
            command = (*command, "--resume")
        beside = [folder, folder / "beside"]
        beside[1].mkdir()
        for path in folder.iterdir():
            if path.name != "beside":
                (beside[1] / path.name).symlink_to(path)
        (folder / "out").mkdir(exist_ok=True)
        (beside[1] / "out").unlink(missing_ok=True)
        (beside[1] / "out").symlink_to(folder / "out")
        ends = [ended for _, ended in run_all([Job(command, place, label) for place in beside])]
        codes = sorted(ended.code for ended in ends)
        found = [] if codes == [0, 2] else [f"exit codes {codes}"]
        if codes[0] == 0:
            found += _unequal(whole[name][0], folder / "out")
        found += ["traceback" for ended in ends if "Traceback" in ended.err]
        yield _done(label, Job(command, folder, label), max(ends, key=lambda ended: ended.code), found, only)


PARTS: dict[str, Part] = {"inputs": inputs, "kills": kills, "disks": disks, "doubles": doubles}


def _two_at_once(case: Callable[..., Any], of: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
    """What a case returns for each of its arguments, as they end: two children that start children of their own."""
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
        yield from (ended.result() for ended in as_completed([pool.submit(case, *arguments) for arguments in of]))


def _prepare(root: Path, names: Iterable[str]) -> None:
    """Run what a part compares with; what is there already is not run again."""
    list(_two_at_once(_undisturbed, [(root, name) for name in sorted(names)]))


def _copy(root: Path, name: str) -> Path:
    folder = root / name
    shutil.copytree(root / "world", folder)
    return folder


def _done(name: str, job: Job, ended: Ended, found: list[str], only: str | None) -> Done:
    command = shlex.join(["sparsetrain", *(part[:200] for part in job.arguments)])
    if only is None:
        shutil.rmtree(job.folder, ignore_errors=True)
    said = (
        f"[{ended.code}, {ended.cpu_seconds:.1f} s, {ended.rss_bytes / 2**20:.0f} MiB] {ended.out[-1000:]}{ended.err}"
    )
    return Done(name, command if only is None else f"(cd {job.folder}; {command})", found, said)


def _undisturbed(root: Path, name: str) -> tuple[Path, int, float]:
    """The output of a run that nothing disturbs, how often it writes, and its processor seconds; made once."""
    folder = root / f"whole-{name}"
    if not folder.exists():
        shutil.copytree(root / "world", folder)
        ended = run_one(
            Job(RUNS[name], folder, name, before=lambda: _at_write(10**9, _end_at_once, folder / ".writes"))
        )
        if ended.code:
            raise RuntimeError(f"{name} fails undisturbed: {ended.err}")
        (folder / ".seconds").write_text(str(ended.cpu_seconds))
    writes = int((folder / ".writes").read_text())
    return folder / "out", writes, float((folder / ".seconds").read_text())


def _at_write(number: int, act: Callable[[], None], count: Path | None = None) -> None:
    """Act at the n-th time that something below `out` is opened for writing, made, renamed or removed."""
    seen = 0
    root = os.path.abspath("out")

    def hook(event: str, values: tuple[Any, ...]) -> None:
        nonlocal seen
        if event == "open":
            path, mode, how = values
            if not (isinstance(mode, str) and set(mode) & set("wax+")) and not (
                isinstance(how, int) and how & (os.O_WRONLY | os.O_RDWR)
            ):
                return
        elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink"):
            path = values[0]
        else:
            return
        if not isinstance(path, str | bytes | os.PathLike) or not os.path.abspath(os.fsdecode(path)).startswith(root):
            return
        seen += 1
        if seen == number:
            act()

    sys.addaudithook(hook)
    if count is not None:
        _at_the_end(lambda: count.write_text(str(seen)))


def _at_the_end(act: Callable[[], Any]) -> None:
    """Act when this child has done what it was started for."""
    original = os._exit

    def leave(code: int) -> None:
        act()
        original(code)

    os._exit = leave  # type: ignore[assignment]


def _end_at_once() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _small_disk(room: int) -> None:
    """Make `out` a disk of that many bytes, where this process may mount one; else let no file grow beyond them."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x00020000) == 0:  # CLONE_NEWNS: what is mounted is seen by this process alone
        libc.mount(b"none", b"/", None, 0x4000 | 0x40000, None)
        if libc.mount(b"tmpfs", os.path.abspath("out").encode(), b"tmpfs", 0, f"size={room}".encode()) == 0:
            _at_the_end(lambda: shutil.copytree("out", KEPT, symlinks=True))
            return
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room // 4, room // 4))


def _unequal(reference: Path, found: Path) -> list[str]:
    """What differs between two finished runs in their weights and in the figures that time doesn't change."""
    faults = []
    for path in sorted(reference.rglob("*")):
        name = path.relative_to(reference)
        if any(part.startswith((".", "checkpoint-")) for part in name.parts):
            continue
        if path.suffix == ".safetensors":
            if not (found / name).is_file() or _tensors(found / name) != _tensors(path):
                faults.append(f"unequal {name}")
        elif path.name == "result.json":
            if not (found / name).is_file() or _even(path) != _even(found / name):
                faults.append(f"unequal {name}")
        elif path.is_file() and not (found / name).exists():
            faults.append(f"missing {name}")
    return faults


def _tensors(path: Path) -> Any:
    """What a safetensors file says, bit by bit; the order of its metadata is another in every process."""
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        return file.metadata(), {name: file.get_tensor(name).tobytes() for name in sorted(file.keys())}


def _even(path: Path) -> Any:
    """What a result file says of the training itself: no times, no memory of a moment."""
    values = json.loads(path.read_text())
    run = values["run"]
    steps = [[step[key] for key in ("step", "loss", "grad_norm", "learning_rate", "tokens")] for step in run["steps"]]
    evals = [[one["step"], one["loss"]] for one in run["evals"]]
    sparsity = {key: value for key, value in values["sparsity"].items() if key != "stats"}  # of the last forward
    return steps, evals, run["perplexity"], run["static_bytes"], sparsity, values["plan"]
