"""What a message names is there: modules, classes, functions, flags and keys."""

from __future__ import annotations

import ast
import builtins
import dataclasses
import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import peft
import pytest
import torch
import transformers

import sparsetrain
from sparsetrain.core.config import registered_methods
from sparsetrain.surgery.apply import Handle
from tests.cli.test_surface import SURFACE

SOURCE = Path(sparsetrain.__file__).parent
PAGES = (
    "page",
    "explanation_page",
    "style",
    "pictures",
    "profile_report",
    "report",
    "plots",
    "bars",
    "markup",
    "first_screen",
)
"""Files of `measure/`: HTML and CSS, hardly a message."""
NAMES_OF_IDEAS = {
    "LoRA", "AdaLoRA", "DoRA", "ZeRO", "MiB", "GiB", "KiB", "NumPy", "ListOps", "SmolLM2", "MiniLM", "NaN", "ViT",
    "PyTorch", "DeepSpeed", "GitHub", "PytorchStreamWriter", "FullyShardedDataParallel", "SigLIP",
    "FlexAttention", "CorDA", "LoftQ", "DeiT",
}  # fmt: skip
OF_TORCHRUN = {"--nproc-per-node", "--nnodes"}
OF_ACCELERATE = {"--cpu", "--mpirun_hostfile", "--multi_gpu", "--num_processes", "--main_process_ip"}
OF_HUGGING_FACE = {"--per-device-train-batch-size"}
OF_PIP = {"--hash", "--no-deps", "--only-binary", "--require-hashes", "--upgrade", "--help"}
OF_MODELS = {
    "attention_probs_dropout_prob", "attn_pdrop", "attention_dropout", "image_size", "num_channels", "max_length",
    "max_position_embeddings", "tie_word_embeddings", "use_liger_kernel", "loss_type", "base_model",
    "output_attentions", "precompute_ref_log_probs",
}  # fmt: skip
ELSEWHERE = {
    "softmax", "gradient_checkpointing_enable", "anatomy", "step", "deepcopy", "get_scale", "callback", "LoraConfig",
    "no_grad", "push_to_hub", "init_process_group", "requires_grad_", "contiguous",
}  # fmt: skip


@cache
def messages() -> tuple[tuple[str, str], ...]:
    """(place, text) of every string of more than one word that is no docstring, of f-strings the constant parts."""

    def found() -> Iterator[tuple[str, str]]:
        for file in sorted(SOURCE.rglob("*.py")):
            place = str(file.relative_to(SOURCE))
            if place not in [f"measure/{name}.py" for name in PAGES]:
                tree = ast.parse(file.read_text())
                about = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
                for node in ast.walk(tree):
                    text = node.value if isinstance(node, ast.Constant) and id(node) not in about else None
                    if isinstance(text, str) and " " in text.strip():
                        yield f"{place}:{node.lineno}", text  # type: ignore[attr-defined]

    return tuple(found())


@cache
def defined() -> tuple[set[str], set[str], set[str]]:
    """(classes, functions, names of arguments and fields) of the source."""
    classes, functions, keys = set[str](), set[str](), set[str]()
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                classes.add(node.name)
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                functions.add(node.name)
                keys |= {a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                keys.add(node.target.id)
    return classes, functions, keys


def named(pattern: str) -> dict[str, str]:
    """What matches a pattern in some message -> where."""
    return {match: place for place, text in messages() for match in re.findall(pattern, text)}


def module_or_attribute(name: str) -> bool:
    parts = name.split(".")
    for depth in range(len(parts), 0, -1):
        try:
            thing = import_module(".".join(parts[:depth]))
        except ImportError:
            continue
        for part in parts[depth:]:
            if not hasattr(thing, part):
                return False
            thing = getattr(thing, part)
        return True
    return False


def test_dotted_names_can_be_imported() -> None:
    assert not {n: at for n, at in named(r"\bsparsetrain(?:\.\w+)+").items() if not module_or_attribute(n)}


def test_what_is_asked_of_a_handle_is_there() -> None:
    fields = {field.name for field in dataclasses.fields(Handle)}
    asked = named(r"\bhandle\.(\w+)")
    assert asked and not {n: at for n, at in asked.items() if not hasattr(Handle, n) and n not in fields}


def test_classes_exist() -> None:
    known = defined()[0] | NAMES_OF_IDEAS | {kind.__name__ for kind in registered_methods().values()}
    places = (transformers, transformers.pytorch_utils, peft, torch, torch.nn, torch.optim, builtins)
    found = named(r"\b[A-Z][a-z0-9]+[A-Z]\w*")
    assert not {n: at for n, at in found.items() if n not in known and not any(hasattr(p, n) for p in places)}


def test_functions_exist() -> None:
    classes, functions, _ = defined()
    known = classes | functions | ELSEWHERE | set(dir(builtins))
    assert not {n: at for n, at in named(r"\b([A-Za-z_]\w+)\(").items() if n not in known}


def test_flags_exist() -> None:
    known = set().union(*SURFACE.values()) | OF_PIP | OF_TORCHRUN | OF_ACCELERATE | OF_HUGGING_FACE
    assert not {n: at for n, at in named(r"(?<![\w-])--[a-z][a-z0-9_-]*").items() if n not in known}


@pytest.mark.filterwarnings("ignore")
def test_keys_exist() -> None:
    known = defined()[2] | OF_MODELS | {"inter"}  # of --bandwidth
    for kind in (transformers.TrainingArguments, peft.LoraConfig):
        known |= {field.name for field in dataclasses.fields(kind)}
    found = named(r"(?<![\w.{])([a-z_]\w+)=(?=[^\s=])")
    assert not {n: at for n, at in found.items() if n not in known}
