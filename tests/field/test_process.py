"""What happens to the process of a command: interrupted again and again, or short of memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.conftest import write_text

STUBBORN = """
import time
from sparsetrain.cli import answer_to_interrupts
answer_to_interrupts()
print("ready", flush=True)
while True:
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        print("caught", flush=True)
"""


def test_a_third_interrupt_ends_the_process() -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for _ in range(2):
            time.sleep(0.3)  # until it sleeps: an interrupt between two of its lines would end it
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == "caught\n"
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
    assert process.returncode == 130 and error == ""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of a process's memory")
def test_a_limit_of_memory_is_out_of_memory(tmp_path: Path) -> None:
    code = (
        "import resource, sys, sparsetrain.hf.train.pretrain, torch; torch.set_num_threads(1)\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**29,) * 2)\n"
        "from sparsetrain.cli import run; sys.exit(run(sys.argv[1:]))"
    )
    text = write_text(tmp_path / "text.txt", 3000)
    flags = ["--model", "gpt2-nano", "--set", "n_embd=4096", "--set", "n_layer=4", "--data", str(text)]
    command = [sys.executable, "-c", code, "pretrain", *flags, "--output", str(tmp_path / "run"), "--device", "cpu"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "Out of memory" in done.stderr and "--batch-size" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and "report it" not in done.stderr
    assert not (tmp_path / "run").exists()
