"""The house keeps its shape: what is public, what may import what, and words that are not used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import sparsetrain
from sparsetrain.hf.model.attention import NAME

SOURCE = Path(sparsetrain.__file__).parent


def test_importing_the_package_imports_no_hugging_face_library_and_no_triton() -> None:
    code = (
        "import sys, sparsetrain; "
        "names = ('transformers', 'peft', 'trl', 'datasets', 'accelerate', 'diffusers', 'triton', 'matplotlib'); "
        "print([name for name in names if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    # torch itself imports triton where it is installed
    assert set(eval(out)) <= {"triton"}


def test_every_method_has_its_folder_and_page() -> None:
    for folder in (SOURCE / "methods").iterdir():
        if folder.is_dir() and folder.name != "__pycache__":
            for name in ("__init__.py", "config.py", "module.py", "surgery.py", "README.md", "evidence.json"):
                assert (folder / name).exists(), f"{folder.name}/{name}"


def test_every_op_has_a_reference() -> None:
    helpers = {"segments", "routing", "balanced_clustering"}  # plain PyTorch throughout: they are their own reference
    for folder in (SOURCE / "ops").iterdir():
        if folder.is_dir() and folder.name not in helpers | {"__pycache__"}:
            assert (folder / "reference.py").exists(), folder.name


def test_the_attention_name_is_taken_for_no_other_backend() -> None:
    assert not any(word in NAME for word in ("flash", "sdpa", "flex_attention", "/", "|"))


def test_no_file_is_named_for_nothing_in_particular() -> None:
    for file in SOURCE.rglob("*.py"):
        assert not any(word in file.stem for word in ("util", "helper", "manager", "wrapper")), file
