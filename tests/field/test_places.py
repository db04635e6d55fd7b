"""Where nothing can be written is said before anything is read, and nothing is left there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sparsetrain.cli import run
from sparsetrain.runs.checkpoints import held_in
from sparsetrain.runs.places import check_file, check_folder
from tests.cli.conftest import save_llama, write_text


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def refused_folders(folder: Path) -> dict[str, str]:
    """Where no output can be -> what the message says of it."""
    (folder / "file").write_text("mine")
    (folder / "dangling").symlink_to(folder / "nowhere")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "to_file").symlink_to(folder / "file")
    os.mkfifo(folder / "pipe")
    return {
        "file": "is a file",
        "to_file": "is a file",
        "file/run": "which is a file",
        "file/deep/run": "which is a file",
        "dangling": "a symbolic link to nothing",
        "dangling/run": "a symbolic link to nothing",
        "loop": "a symbolic link to nothing",
        "pipe": "a device or pipe",
        "pipe/run": "a device or pipe",
        "/dev/null": "a device or pipe",
        "/dev/null/run": "a device or pipe",
        "/proc/run": "cannot be written",
        "x" * 300: "too long",
        "a/" + "x" * 300 + "/b": "too long",
        "/".join(["d" * 100] * 50): "too long",
        "a\x1b[31m": "no text",
        "a\nb": "no text",
    }


def test_folders(tmp_path: Path) -> None:
    places = refused_folders(tmp_path)
    before = files_in(tmp_path)
    for name, words in places.items():
        with pytest.raises(ValueError, match=words) as raised:
            check_folder(tmp_path / name, "output")
        assert str(raised.value).isprintable() and len(str(raised.value)) < 700
    for name in ("new", "new/deep/run", "."):
        check_folder(tmp_path / name, "output")
    assert files_in(tmp_path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="cannot be written"):
        check_folder(tmp_path / "run", "output")
    tmp_path.chmod(0o700)


def test_a_parent_where_nothing_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, **_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ValueError, match="Permission denied"):
        check_folder(tmp_path / "run", "output")


def test_a_process_killed_while_it_asked_leaves_what_a_resume_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rmdir", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        check_folder(tmp_path, "output")
    assert len(list(tmp_path.iterdir())) == 1 and held_in(tmp_path) == []
    check_folder(tmp_path, "output")  # which takes it away
    assert not list(tmp_path.iterdir())


def test_files(tmp_path: Path) -> None:
    refused_folders(tmp_path)
    before = files_in(tmp_path)
    for name, words in {
        ".": "is a folder",
        "dangling": "a symbolic link to nothing",
        "pipe": "a device or pipe",
        "/dev/null": "a device or pipe",
        "file/a.png": "which|is a file",
        "x" * 300: "too long",
        "plain": "ends in nothing",
        "a.gif": "ends in .gif",
    }.items():
        with pytest.raises(ValueError, match=words):
            check_file(tmp_path / name, "--plot", (".png",))
    for name in ("a.png", "A.PNG", "new/a.png"):
        check_file(tmp_path / name, "--plot", (".png",))
    check_file(tmp_path / "file", "--write")  # may be written over
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("verb", ["finetune", "pretrain", "export", "bench", "patterns"])
def test_outputs_of_every_verb(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = refused_folders(tmp_path)
    before = files_in(tmp_path)
    about = [str(tmp_path)] if verb in ("export", "patterns") else ["--model", "no-such-model", "--data", "d"]
    about = ["--model", "gpt2-nano", "--data", "no-such-data"] if verb == "pretrain" else about
    for name, words in places.items():
        code, error = run([verb, *about, "--output", str(tmp_path / name)]), capsys.readouterr().err
        assert code == 2 and words in error, (name, error)
    assert files_in(tmp_path) == before


def test_targets_of_lora(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a match: said before the data is read, which is not there; with one, the data is what is missed."""
    model = save_llama(tmp_path / "llama")
    before = files_in(tmp_path)
    begin = ["finetune", "--model", str(model), "--seq-len", "32", "--output", str(tmp_path / "run")]
    begin += ["--data", str(tmp_path / "gone.txt")]
    for targets, words in {
        "q_porj": "'q_porj' matches no linear",
        "q_proj,q_porj": "Did you mean 'q_proj'?",
        "model.layers.7.self_attn.q_proj": "matches no linear",
        "input_layernorm": "matches no linear",
        "proj": "matches no linear",
        "q_proj,v_proj": "gone.txt",
        "layers.1.self_attn.q_proj": "gone.txt",
        "all-linear": "gone.txt",
    }.items():
        for method in (["--preset", "dense"], ["--method", "routed_ffn:num_blocks=4"]):
            code, error = run([*begin, "--lora-targets", targets, *method]), capsys.readouterr().err
            assert code == 2 and words in error, error
    assert files_in(tmp_path) == before


def test_nothing_is_left_of_a_refused_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, text = save_llama(tmp_path / "llama"), write_text(tmp_path / "short.txt", 1)
    before = files_in(tmp_path)
    begin = ["finetune", "--model", str(model), "--data", str(text), "--seq-len", "32"]
    for more in (
        ["--epochs", "inf"],
        [],
        ["--compare", "dense"],
        ["--device", "cuda:9"],
        ["--method", "routed_ffn:gate=5"],
    ):
        assert run([*begin, "--output", str(tmp_path / "new" / "run"), *more]) == 2, capsys.readouterr().err
        assert files_in(tmp_path) == before, more
