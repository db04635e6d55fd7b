"""The command line under a launcher: one report, one checkpoint, one line of what went wrong; any number goes on.

Each launch takes some eight seconds, most of them imports in two processes: nothing less is a launch.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from torch import distributed

from sparsetrain.cli import run
from sparsetrain.core import ranks as run_ranks
from sparsetrain.runs.checkpoints import own_checkpoints
from sparsetrain.runs.launch import joined
from sparsetrain.runs.manifest import MANIFEST, verify_manifest
from tests.cli.conftest import save_llama, write_text
from tests.parallel.ranks import start

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch without distributed")

TINY = "--seq-len 64 --steps 6 --batch-size 2 --grad-accum 4 --save-every 2 --device cpu --dtype fp32 --lr 1e-2"
TINY += " --calibration-tokens 256 --eval-tokens 512"
ROUTED = "--method routed_ffn:num_blocks=4,num_active=2"


ACCELERATE = """compute_environment: LOCAL_MACHINE
distributed_type: {kind}
num_machines: 1
num_processes: 2
mixed_precision: bf16
use_cpu: {cpu}
main_process_port: 0
"""
"""What `accelerate config` writes, of a user whose other runs are in bf16."""


class Launch:
    """Commands on a tiny model, with or without a launcher."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model = folder, save_llama(folder / "llama")
        self.text = write_text(folder / "text.txt", 6000)

    def command(self, ranks: int, output: str, more: str, verb: str) -> list[str]:
        flags = self.flags(output, more, verb)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
        return [*(torchrun if ranks else [sys.executable, "-m"]), "sparsetrain", *flags]

    def flags(self, output: str, more: str = ROUTED, verb: str = "finetune") -> list[str]:
        model = str(self.model) if verb == "finetune" else "gpt2-nano"
        return f"{verb} --model {model} --data {self.text} --output {self.folder / output} {TINY} {more}".split()

    def start(self, ranks: int, output: str, more: str = ROUTED, verb: str = "finetune") -> subprocess.Popen[str]:
        return self.run(self.command(ranks, output, more, verb))

    def run(self, command: list[str], **variables: str) -> subprocess.Popen[str]:
        streams: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)} | variables
        return subprocess.Popen(command, env=env, **streams)

    def accelerate(self, output: str, kind: str, cpu: str) -> tuple[int, str, str]:
        """A run by accelerate's launcher and a config file: (exit code, stdout, stderr)."""
        config = self.folder / f"{kind}.yaml"
        config.write_text(ACCELERATE.format(kind=kind, cpu=cpu))
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(config), "-m", "sparsetrain"]
        process = self.run([sys.executable, *launcher, *self.flags(output, f"{ROUTED} --json")])
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err

    def __call__(self, ranks: int, output: str, more: str = ROUTED, verb: str = "finetune") -> tuple[int, str, str]:
        """(exit code, stdout, stderr)."""
        process = self.start(ranks, output, more, verb)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err

    def result(self, output: str) -> dict[str, Any]:
        return json.loads((self.folder / output / "result.json").read_text())


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    return Launch(tmp_path)


def losses(result: dict[str, Any]) -> list[float]:
    return [step["loss"] for step in result["run"]["steps"]]


def ours(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith(("sparsetrain:", "sparsetrain,"))]


def test_two_ranks_train_as_one_process_and_go_on_as_one(launch: Launch) -> None:
    """Fifteen seconds: two launches; one process is this one."""
    assert run(launch.flags("one")) == 0
    code, out, err = launch(2, "two", f"{ROUTED} --json")
    assert code == 0, err
    alone, found = launch.result("one"), json.loads(out)  # one document on stdout
    assert losses(found) == pytest.approx(losses(alone), rel=1e-5)
    assert [step["tokens"] for step in found["run"]["steps"]] == [step["tokens"] for step in alone["run"]["steps"]]
    folder = launch.folder / "two"
    assert {path.name for path in own_checkpoints(folder)} == {"checkpoint-4", "checkpoint-6"}
    files = set(verify_manifest(folder / "checkpoint-4")["files"])
    assert {"rng_state_0.pth", "rng_state_1.pth", "progress.json"} <= files
    assert not list(folder.glob(".*")), "no lock and nothing half-done is left"
    for ranks in (0, 2):  # on fewer ranks, and on the same
        output = f"again{ranks}"
        for name in ("checkpoint-4", "run.json", "recipe.yaml"):
            copy = shutil.copytree if name == "checkpoint-4" else shutil.copy
            (launch.folder / output).mkdir(exist_ok=True)
            copy(folder / name, launch.folder / output / name)
        more = f"{ROUTED} --resume"
        code, _, err = launch(ranks, output, more) if ranks else (run(launch.flags(output, more)), "", "")
        assert code == 0, err
        assert launch.result(output)["resumed_from"] == 4
        assert losses(launch.result(output)) == pytest.approx(losses(alone), rel=1e-5)


def test_what_is_wrong_is_told_once_and_leaves_nothing(launch: Launch) -> None:
    """Fifteen seconds: two launches."""
    code, out, err = launch(2, "bad", f"{ROUTED} --grad-accum 1 --batch-size 1")
    assert code != 0 and out == "" and not (launch.folder / "bad").exists()
    (line,) = ours(err)
    assert "2 ranks cannot share 1 equally" in line and "grad_accum=2" in line
    (line,) = ours(launch(2, "bad", f"{ROUTED} --compare dense")[2])
    assert "--compare dense was asked of 2 ranks" in line


@pytest.mark.slow
def test_accelerate_launch_trains_as_one_process(launch: Launch) -> None:
    """The config file says bf16, and the recipe fp32: the recipe says what is trained."""
    assert launch(0, "one", f"{ROUTED} --json")[0] == 0
    code, out, err = launch.accelerate("two", "MULTI_GPU", "false")
    assert code == 0, err
    found = json.loads(out)  # one document of two processes
    assert losses(found) == pytest.approx(losses(launch.result("one")), rel=1e-5)
    assert "ACCELERATE_MIXED_PRECISION=bf16 is passed over: the recipe says dtype" in err
    folder = launch.folder / "two"
    assert {path.name for path in own_checkpoints(folder)} == {"checkpoint-4", "checkpoint-6"}
    assert "rng_state_1.pth" in verify_manifest(folder / "checkpoint-6")["files"]
    code, out, err = launch.accelerate("none", "MULTI_CPU", "true")  # accelerate starts one process of two
    assert code != 0 and "--multi_gpu --num_processes N" in out and not (launch.folder / "none").exists()


@pytest.mark.slow
def test_mpirun_trains_as_one_process(launch: Launch) -> None:
    """What Open MPI's mpirun sets, which `accelerate launch --cpu --mpirun_hostfile` calls."""
    assert launch(0, "one")[0] == 0
    port = str(free_port())
    started = []
    for rank in "01":
        told = {"RANK": rank, "SIZE": "2", "LOCAL_RANK": rank, "LOCAL_SIZE": "2"}
        told = {f"OMPI_COMM_WORLD_{key}": value for key, value in told.items()} | {"MASTER_PORT": port}
        started.append(launch.run([sys.executable, "-m", "sparsetrain", *launch.flags("two")], **told))
    for process in started:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    assert losses(launch.result("two")) == pytest.approx(losses(launch.result("one")), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("more", ["semi_structured", "multi_level:levels=2", "masked_growth:ramp_ratio=0.1"])
def test_pretraining_from_stage_to_stage(more: str, launch: Launch) -> None:
    more = f"--method {more} --steps 20 --set n_layer=2 --set n_head=2 --set n_embd=32"
    code, _, err = launch(0, "one", more, "pretrain")
    assert code == 0, err
    code, _, err = launch(2, "two", more, "pretrain")
    assert code == 0, err
    assert losses(launch.result("two")) == pytest.approx(losses(launch.result("one")), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_rank_that_is_killed(seed: int, launch: Launch) -> None:
    """Any rank, at any moment after the first checkpoint: one line, a whole checkpoint, equal losses after it."""
    more = f"{ROUTED} --steps 60 --save-every 5"
    assert launch(2, "whole", more)[0] == 0
    draw, process, output = random.Random(seed), launch.start(2, "killed", more), launch.folder / "killed"
    while not any((path / MANIFEST).is_file() for path in own_checkpoints(output)):
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(draw.uniform(0, 1))
    os.kill(draw.choice(children(process.pid)), signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    (line,) = ours(err)
    assert "another rank of this run has ended" in line and "--resume" in line
    newest = [path for path in own_checkpoints(output) if (path / MANIFEST).is_file()][-1]
    verify_manifest(newest)
    code, _, err = launch(2, "killed", f"{more} --resume")
    assert code == 0, err
    assert launch.result("killed")["resumed_from"] == int(newest.name.rpartition("-")[2])
    assert losses(launch.result("killed")) == losses(launch.result("whole"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def children(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text()
        except OSError:
            continue
        if int(text.rpartition(")")[2].split()[1]) == pid:
            found.append(int(path.parent.name))
    return sorted(found)


def _leaves(place: int, folder: str, port: int) -> None:
    os.environ.update({"RANK": str(place), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    passed = Path(folder) / "passed"
    with pytest.MonkeyPatch.context() as patch:
        if place == 1:
            patch.setattr(run_ranks, "wait", lambda: (distributed.barrier(), time.sleep(0.5), passed.touch()))
        with joined("cpu"):
            pass
    (Path(folder) / f"left-{place}").write_text(str(passed.exists()))


def test_no_rank_closes_its_connections_before_all_have_ended(tmp_path: Path) -> None:
    """One of a hundred runs that had ended well was said to have lost a rank: the others had gone while it read."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start(_leaves, (str(tmp_path), port), 2)
    assert [(tmp_path / f"left-{place}").read_text() for place in range(2)] == ["True", "True"]
