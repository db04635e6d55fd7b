"""`python -m bench`: list the benchmarks, run them, write the docs from their result files.

python -m bench                          # what there is, and how much of it is measured
python -m bench run flood_fill --quick   # a trial: few cells, nothing stored unless --output names a folder
python -m bench run all --output DIR     # every benchmark, each in a process of its own; go on where it stopped
python -m bench docs                     # rewrite tables, pictures and pages of the docs
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench import runner


def main(arguments: list[str] | None = None) -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    asked = _parser().parse_args(arguments)
    if asked.command == "run":
        _run(asked)
    elif asked.command == "call":
        module, _, function = asked.function.partition(":")
        print(json.dumps(getattr(importlib.import_module(module), function)(*json.loads(asked.arguments))))
    elif asked.command == "docs":
        from bench.report import write_all

        write_all()
    else:
        _list()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command")
    run = commands.add_parser("run", help="measure")
    run.add_argument("names", nargs="+", metavar="NAME", help="benchmarks, or all (that need no GPU)")
    run.add_argument(
        "--output", type=Path, metavar="DIR", help="folder of the result files; bench/results if not given"
    )
    run.add_argument(
        "--cells",
        "--only",
        dest="only",
        default="",
        metavar="TEXT",
        help="cells whose key contains it, or matches it as a pattern (*, ?), and what these use",
    )
    run.add_argument("--minutes", type=float, default=math.inf, metavar="N", help="begin no cell after so long")
    run.add_argument("--again", action="store_true", help="measure cells that the file holds, too")
    run.add_argument("--quick", action="store_true", help="fewer cells and rounds, for a trial")
    run.add_argument("--list", action="store_true", help="the cells, measuring nothing")
    run.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="another setting (JSON)")
    run.add_argument("--seeds", default="", metavar="0,1,2")
    run.add_argument("--threads", type=int)
    run.add_argument("--device", default="cpu")
    call = commands.add_parser("call", help="one function in this process; its answer is the last line (internal)")
    call.add_argument("function")
    call.add_argument("arguments")
    commands.add_parser("docs", help="write the docs from the result files")
    return parser


def _list() -> None:
    for name, benchmark in runner.benchmarks().items():
        cells, file = _cells(benchmark, runner.asked_of(benchmark), runner.RESULTS)
        held = sum(file.holds(cell) for cell in cells)
        print(f"{name:36} {held:3} of {len(cells):3} cells  {benchmark.measures}")


def _cells(benchmark: runner.Benchmark, asked: runner.Asked, output: Path | None) -> tuple[Any, runner.ResultFile]:
    cells = runner.cells_of(benchmark, asked)
    return cells, runner.ResultFile(benchmark, cells, output, asked.settings)


def _run(asked: argparse.Namespace) -> None:
    if asked.names != ["all"] and len(asked.names) == 1:
        return _run_one(asked.names[0], asked)
    names = asked.names
    if names == ["all"]:
        names = [name for name, benchmark in runner.benchmarks().items() if not benchmark.needs_gpu]
    flags = [word for word in sys.argv[sys.argv.index("run") + 1 :] if word not in asked.names]
    for name in names:
        subprocess.run([sys.executable, "-m", "bench", "run", name, *flags], check=True)


def _run_one(name: str, asked: argparse.Namespace) -> None:
    known = runner.benchmarks()
    if name not in known:
        raise SystemExit(f"No benchmark {name!r}. There are: {', '.join(known)}.")
    if known[name].needs_gpu and not (asked.quick or asked.list or _has_gpu()):
        raise SystemExit(f"{name} needs a GPU, and PyTorch finds none here. `--quick` tries its code on this CPU.")
    changes = {key: _value(text) for key, _, text in (word.partition("=") for word in asked.set)}
    settled = runner.asked_of(
        known[name],
        quick=asked.quick,
        changes=changes,
        seeds=tuple(int(seed) for seed in asked.seeds.split(",") if seed),
        threads=asked.threads,
        device=asked.device,
        only=asked.only,
    )
    output = asked.output or (None if asked.quick else runner.RESULTS)
    if asked.list:
        cells, file = _cells(known[name], settled, output)
        for cell in cells:
            print(f"{cell.key}{'  is there' if file.holds(cell) else ''}")
        return
    runner.run(
        known[name],
        settled,
        output=output,
        again=asked.again,
        minutes=asked.minutes,
        say=lambda line: print(line, flush=True),
    )


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


if __name__ == "__main__":
    main()
