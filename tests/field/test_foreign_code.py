"""No file of a stranger's model, adapter, run or checkpoint is executed, whatever asks for it and whichever verb reads.

Each route plants Python code or a pickle that writes a marker, and a stdin that would answer every question with yes.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sparsetrain.hf.model.io import load
from sparsetrain.runs.manifest import write_manifest
from tests.field.strangers import VERBS, adapter, arguments, assert_refused, changed, told
from tests.field.strangers import place as place
from tests.hf import runs


class Yes(io.StringIO):
    """A stdin that says yes, and remembers that it was asked."""

    asked = False

    def readline(self, *_: object) -> str:
        self.asked = True
        return "y\n"


class Pickled:
    """Runs a command where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The file that planted code writes; at the end it is not there, and nobody was asked."""
    stdin = Yes()
    monkeypatch.setattr(sys, "stdin", stdin)
    monkeypatch.setattr("builtins.input", lambda *_: stdin.readline())
    path = tmp_path / "ran"
    yield path
    assert not path.exists(), "planted code ran"
    assert not stdin.asked, "a question reached stdin"


def plant(folder: Path, marker: Path) -> None:
    """Python files that a config may name, and that an import of the folder would find."""
    code = f"open({str(marker)!r}, 'w').close()\nraise SystemExit(0)\n"
    for name in ("evil", "modeling_evil", "__init__", "conftest", "sitecustomize", "custom_generate/generate"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(code)


AUTO = {
    name: "evil.Evil"
    for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
}

CONFIGS: dict[str, dict[str, object]] = {
    "auto_map of an unknown family": {"model_type": "evil", "auto_map": AUTO},
    "auto_map of a known family": {"auto_map": AUTO},
    "auto_map elsewhere": {"model_type": "evil", "auto_map": {"AutoConfig": "some/where--evil.Evil"}},
    "auto_map without a type": {"model_type": None, "auto_map": AUTO},
    "pipelines": {"custom_pipelines": {"text-generation": {"impl": "evil.Evil", "pt": ["AutoModel"]}}},
    "kernels": {"attn_implementation": "evil/kernels", "_attn_implementation": "evil/kernels"},
    "kernels by a function": {"_attn_implementation_internal": "evil/kernels:run", "experts_implementation": "evil/k"},
    "quantised": {"quantization_config": {"quant_method": "evil", "modules": "evil.Evil"}},
    "fusion": {"fusion_config": {"evil": "evil.Evil"}},
    "other weights": {"transformers_weights": "adapter_model.bin"},
    "architectures": {"architectures": ["evil.Evil", "Trainer", "os.system"]},
    "tokenizer class": {"tokenizer_class": "AutoModelForCausalLM", "model_type": "evil", "auto_map": AUTO},
}


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "profile"])  # which starts a process a time
def test_a_config_runs_nothing(
    place: Path, tmp_path: Path, marker: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    for i, values in enumerate(CONFIGS.values()):
        folder = changed(place / "model", tmp_path / f"{i}", **values)
        plant(folder, marker)
        if verb == "load":
            try:
                load(folder)
            except ValueError as error:
                assert str(error).isprintable()
        elif values.get("model_type", "") == "":  # a family of transformers: its own classes are used, if any
            if verb in ("eval", "plan"):
                told(capsys, arguments(verb, folder, place / "text", tmp_path / f"out-{i}"))
        else:
            assert_refused(capsys, arguments(verb, folder, place / "text", tmp_path / f"out-{i}"))
        assert not marker.exists(), (verb, values)


@pytest.mark.parametrize(
    "values",
    [
        {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"},
        {"auto_map": ["evil.Evil", None], "tokenizer_class": None},
        {"auto_map": {"AutoTokenizer": ["some/where--evil.Evil", None]}},
        {"tokenizer_class": "AutoModelForCausalLM"},
        {"tokenizer_class": "AutoTokenizer", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}},
        {"processor_class": "evil.Evil", "vocab_file": "../../ran", "tokenizer_file": "/dev/zero"},
    ],
)
def test_a_tokenizer_runs_nothing(
    place: Path, tmp_path: Path, marker: Path, capsys: pytest.CaptureFixture[str], values: dict[str, object]
) -> None:
    folder = changed(place / "model", tmp_path / "model", "tokenizer_config.json", **values)
    plant(folder, marker)
    for verb in ("eval", "export", "pretrain"):
        told(capsys, arguments(verb, folder, place / "text", tmp_path / verb))
        assert not marker.exists(), verb


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_pickles_are_no_weights(
    place: Path, tmp_path: Path, marker: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(place / "model", folder)
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Pickled(marker)}, folder / name)
    for verb in ("eval", "export", "finetune"):
        assert_refused(capsys, arguments(verb, folder, place / "text", tmp_path / verb), "can run code", name)


ADAPTERS: dict[str, dict[str, object]] = {
    "megatron": {"megatron_config": {"a": 1}, "megatron_core": "evil"},
    "parent library": {"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"}},
    "prompt tuning": {
        "peft_type": "PROMPT_TUNING",
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "a",
        "num_virtual_tokens": 2,
        "tokenizer_name_or_path": "base",
        "tokenizer_kwargs": {"trust_remote_code": True},
    },
    "multitask": {"peft_type": "MULTITASK_PROMPT_TUNING", "prompt_tuning_init_state_dict_path": "evil.pt"},
    "mixture": {"peft_type": "XLORA", "adapters": {"a": "evil"}},
    "shadow": {"peft_type": "SHADOW", "shadow_model": "base"},
    "covariance": {"init_lora_weights": "corda", "corda_config": {"cache_file": "evil.pt"}},
    "start": {"init_lora_weights": "evil.Evil"},
    "kind": {"peft_type": "evil.Evil"},
    "option": {"trust_remote_code": "yes", "model_options": {"trust_remote_code": True}},
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_runs_nothing(
    place: Path,
    tmp_path: Path,
    marker: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    folder = adapter(place, tmp_path / "adapter", **ADAPTERS[name])
    plant(folder, marker)
    torch.save(Pickled(marker), folder / "evil.pt")
    torch.save(Pickled(marker), folder / "training_args.bin")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(folder)
    for verb in ("eval", "export", "export-lora", "finetune"):
        told(capsys, arguments(verb, folder, place / "text", tmp_path / verb))
        assert not marker.exists(), verb
    if name != "parent library":  # that key is for a class that is not used here, and left out
        assert_refused(capsys, arguments("eval", folder, place / "text", tmp_path / "again"), "adapter_config.json")


def test_an_adapter_as_a_pickle_is_refused(
    place: Path, tmp_path: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = adapter(place, tmp_path / "adapter")
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"weight": Pickled(marker)}, folder / "adapter_model.bin")
    for verb in ("eval", "export"):
        assert_refused(capsys, arguments(verb, folder, place / "text", tmp_path / verb), "as a pickle", "can run code")


SIDECAR = {"format": 1, "configs": [], "model_class": "AutoModelForCausalLM"}


OPTIONS = (
    {"trust_remote_code": True},
    {"code_revision": "main"},
    {"use_kernels": True},
    {"attn_implementation": "evil/kernels"},
    {"adapter_kwargs": {"a": "b"}},
    {"use_safetensors": False},
    {"config": "evil.json"},
    ["trust_remote_code"],
)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_sidecar_sets_no_option_of_a_loader(
    place: Path, tmp_path: Path, marker: Path, capsys: pytest.CaptureFixture[str], options: object
) -> None:
    folder = changed(place / "model", tmp_path / "model", model_type="evil", auto_map=AUTO)
    plant(folder, marker)
    known = changed(place / "model", tmp_path / "known", auto_map=AUTO)
    plant(known, marker)
    wrapped = adapter(place, tmp_path / "adapter")
    for where, base in ((folder, None), (known, None), (wrapped, str(folder)), (wrapped, str(known))):
        (where / "sparsity_config.json").write_text(
            json.dumps(SIDECAR | {"model_options": options, "base_model": base})
        )
        for verb in ("eval", "export"):
            assert_refused(capsys, arguments(verb, where, place / "text", tmp_path / "out"))
            assert not marker.exists()
    assert_refused(capsys, arguments("eval", known, place / "text", tmp_path / "out"), "model")


def test_a_base_model_inside_the_adapters_folder_is_refused(
    place: Path, tmp_path: Path, marker: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def config_base(base: str) -> Path:
        return adapter(place, tmp_path / "in-config", base_model_name_or_path=base)

    def sidecar_base(base: str) -> Path:
        folder = adapter(place, tmp_path / "in-sidecar")
        about = SIDECAR | {"base_model": base, "model_options": {}}
        (folder / "sparsity_config.json").write_text(json.dumps(about))
        return folder

    make: Callable[[str], Path]
    for make in (config_base, sidecar_base):
        folder = make("")
        shutil.rmtree(folder)
        for base in (
            "base",
            "./base",
            str(folder / "base"),
            f"{folder.parent}/../{folder.parent.name}/{folder.name}/base",
        ):
            folder = make(base)
            changed(place / "model", folder / "base", auto_map=AUTO, model_type="evil")
            plant(folder / "base", marker)
            monkeypatch.chdir(folder)
            for verb in ("eval", "export"):
                assert_refused(
                    capsys, arguments(verb, folder, place / "text", tmp_path / "out"), "inside its own folder"
                )
            shutil.rmtree(folder)


@pytest.mark.parametrize(
    "base", [5, "", " ", "a\nb", "~/model", "../nowhere", "/nowhere", "https://host/model", "a/b/c"]
)
def test_a_base_model_is_a_name_or_a_folder(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], base: object
) -> None:
    folder = adapter(place, tmp_path / "adapter", base_model_name_or_path=base)
    assert_refused(capsys, arguments("eval", folder, place / "text", tmp_path / "out"))


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "scaler.pt"])
def test_a_checkpoint_of_a_stranger_runs_nothing(
    place: Path, tmp_path: Path, marker: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    """`--resume` in a folder whose manifest is right, with a pickle for each of the Trainer's own files."""
    made = place / "run"
    words = arguments("finetune", place / "model", place / "text", made)
    words[words.index("--steps") + 1] = "4"
    if not made.exists():
        assert told(capsys, [*words, "--save-every", "2"])[0] == 0
    stopped = tmp_path / "run"
    shutil.copytree(made, stopped)
    for path in (stopped / "result.json", stopped / "checkpoint-4", stopped / "adapter"):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    checkpoint = stopped / "checkpoint-2"
    torch.save(Pickled(marker), checkpoint / file)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    write_manifest(checkpoint, **{key: manifest[key] for key in manifest if key not in ("format", "files")})
    words[words.index(str(made))] = str(stopped)
    code, _ = told(capsys, [*words, "--save-every", "2", "--resume"])
    assert code == (0 if file == "training_args.bin" else 2)


def test_chat_templates_are_sandboxed(tmp_path: Path, marker: Path) -> None:
    tokenizer = runs.tokenizer()
    attempts = (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}".replace("MARKER", str(marker)),
        "{{ self.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
    )
    for template in attempts:
        tokenizer.chat_template = template
        try:
            found = tokenizer.apply_chat_template([{"role": "user", "content": "red"}], tokenize=False)
        except Exception:
            continue
        assert found == ""
