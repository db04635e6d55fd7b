"""Every mistake we know of: one clear paragraph, a non-zero exit, and nothing half-written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Call, Result, save_llama, write_text

SPARSE = "routed_ffn:num_blocks=4,num_active=2"


def assert_refused(result: Result, output: Path, *words: str, code: int = 2) -> None:
    """The error names what is wrong without a traceback, stdout is empty, and the output folder was not made."""
    assert result.code == code, result.err
    for word in words:
        assert word in result.err, result.err
    assert "sparsetrain: " in result.err
    assert result.out == ""
    assert not output.exists()


@pytest.fixture
def train(call: Call, llama: Path, text: Path, tmp_path: Path):
    """finetune on the tiny model and text, with the given flags in place of the usual ones."""

    def run(*extra: str, **flags: object) -> Result:
        usual = {"model": llama, "data": text, "seq_len": 32, "steps": 3, "output": tmp_path / "run", "method": SPARSE}
        usual |= {"eval_tokens": 64, "save_every": 1, "threads": 1}
        pairs = [("--" + key.replace("_", "-"), value) for key, value in (usual | flags).items() if value is not None]
        return call("finetune", *[part for pair in pairs for part in pair], *extra)

    return run


def test_unknown_model(train, tmp_path: Path) -> None:
    assert_refused(train(model="no-such/model"), tmp_path / "run", "no-such/model", "embedded", "local folder", "hub")
    assert_refused(train(model=tmp_path / "nowhere"), tmp_path / "run", "nowhere")


def test_a_folder_without_a_model(train, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_refused(train(model=tmp_path / "empty"), tmp_path / "run", "empty")


def test_a_damaged_model(train, tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert_refused(train(model=folder), tmp_path / "run", str(folder))


def test_data_that_cannot_be_meant(train, tmp_path: Path) -> None:
    pipe, rows, packed = tmp_path / "pipe.txt", tmp_path / "rows.json", tmp_path / "text.gz"
    os.mkfifo(pipe)
    rows.write_text('[{"instruction": "a", "output": "b"}]')
    packed.write_bytes(b"\x1f\x8brest")
    for data, *words in (
        ("", "An argument is empty (--data)"),
        (" ", "An argument is empty (--data)"),
        (pipe, "pipe.txt is a named pipe, not a regular file"),
        ("/dev/zero", "is a device"),
        (rows, "rows.json[0] has no 'text'", "task=sft"),
        (packed, "compressed by gzip", "gunzip"),
        ("a" * 5000, "File name too long"),
    ):
        result = train("--task", "lm", data=data)
        assert_refused(result, tmp_path / "run", *words)
        assert len(result.err) < 1000


def test_missing_data(train, tmp_path: Path) -> None:
    assert_refused(train(data=tmp_path / "gone.txt"), tmp_path / "run", "gone.txt", "does not exist")
    assert_refused(train(data=tmp_path / "*.txt"), tmp_path / "run", "*.txt")


def test_empty_data(train, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    assert_refused(train(data=tmp_path / "empty.txt"), tmp_path / "run", "empty.txt", "empty")
    assert_refused(train(data=tmp_path / "folder"), tmp_path / "run", "folder")


def test_too_little_data(train, tmp_path: Path) -> None:
    assert_refused(train(data=write_text(tmp_path / "short.txt", 1)), tmp_path / "run", "short.txt")


def test_a_binary_file_as_text(train, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(bytes(range(256)) * 40)
    assert_refused(train(data=tmp_path / "text.txt"), tmp_path / "run", "text.txt", "binary")


def test_sequence_longer_than_the_context(train, tmp_path: Path) -> None:
    assert_refused(train(seq_len=129), tmp_path / "run", "129", "128", "context")


def test_wrong_key_in_a_recipe(call: Call, llama: Path, text: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "run.yaml"
    recipe.write_text(f"model: {llama}\ndata: {text}\nseq_length: 32\noutput: {tmp_path / 'run'}\n")
    assert_refused(
        call("finetune", "--recipe", recipe), tmp_path / "run", "seq_length", "Did you mean 'seq_len'?", "run.yaml"
    )


def test_wrong_flag(call: Call, tmp_path: Path) -> None:
    assert_refused(call("finetune", "--seq-length", 32), tmp_path / "run", "--seq-length", "--seq-len", "--help")
    assert_refused(call("finetun"), tmp_path / "run", "finetun", "--help")
    assert_refused(call("finetune", "--steps", "many"), tmp_path / "run", "steps='many'", "integer")


def test_required_values(call: Call, tmp_path: Path) -> None:
    assert_refused(call("finetune", "--output", tmp_path / "run"), tmp_path / "run", "--model", "--data")


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("pq_attention:keep_ratio=1.5", ("keep_ratio", "1.5", "(0, 1]")),
        ("pq_attention:keep_ratio=0", ("keep_ratio", "(0, 1]")),
        ("routed_ffn:num_active=9,num_blocks=4", ("num_active=9", "num_blocks=4")),
        ("routed_ffn:shared_ratio=1", ("shared_ratio", "[0, 1)")),
        ("routed_ffn:num_blocks=5", ("64", "num_blocks=5")),
    ],
)
def test_ratio_out_of_range(train, tmp_path: Path, method: str, words: tuple[str, ...]) -> None:
    assert_refused(train(method=method), tmp_path / "run", *words)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("routed_fnn", ("routed_fnn", "Did you mean 'routed_ffn'?")),
        ("routed_ffn:num_block=4", ("num_block", "Did you mean 'num_blocks'?")),
        ("routed_ffn:num_blocks", ("'num_blocks'", "=")),
        ("routed_ffn:num_blocks=many", ("num_blocks", "many", "int")),
    ],
)
def test_invalid_method_string(train, tmp_path: Path, method: str, words: tuple[str, ...]) -> None:
    assert_refused(train(method=method), tmp_path / "run", *words)


def test_unknown_preset_task_and_values(train, tmp_path: Path) -> None:
    assert_refused(train(method=None, preset="stp"), tmp_path / "run", "stp", "Did you mean 'spt'?")
    assert_refused(train(task="translate"), tmp_path / "run", "task", "translate", "classify")
    assert_refused(train(dtype="fp8"), tmp_path / "run", "dtype", "fp8", "bf16")
    assert_refused(train(steps=0), tmp_path / "run", "steps")
    assert_refused(train(device="cuda:99"), tmp_path / "run", "cuda:99")


def test_head_width_not_divisible_by_8(train, tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "model", hidden_size=24)
    assert_refused(train(model=folder, method="pq_attention"), tmp_path / "run", "12", "8", "self_attn")


def test_two_methods_on_one_site(call: Call, llama: Path, text: Path, tmp_path: Path) -> None:
    flags = ("--model", llama, "--data", text, "--seq-len", 32, "--output", tmp_path / "run")
    two = ("--method", SPARSE, "--method", "routed_ffn:num_blocks=8,layers=1")
    assert_refused(call("finetune", *flags, *two), tmp_path / "run", "layers.1.mlp", "targets", "both claim")


def test_a_pattern_that_matches_nothing(train, tmp_path: Path) -> None:
    assert_refused(
        train(method=f"{SPARSE},targets=encoder.*"), tmp_path / "run", "matches nothing", "encoder.*", "layers.0.mlp"
    )
    assert_refused(train(method=f"{SPARSE},layers=7"), tmp_path / "run", "matches nothing", "7")


def test_a_mixture_of_experts(train, tmp_path: Path) -> None:
    from transformers import MixtralConfig

    from tests.cli.conftest import byte_tokenizer

    folder = tmp_path / "mixtral"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    MixtralConfig(vocab_size=300, num_key_value_heads=1, num_local_experts=2, **sizes).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    assert_refused(train(model=folder), tmp_path / "run", "mixture of experts", "routed already")


def test_an_unknown_family(train, tmp_path: Path) -> None:
    from transformers import BloomConfig

    BloomConfig(vocab_size=300, hidden_size=32, n_layer=1, n_head=2).save_pretrained(tmp_path / "bloom")
    assert_refused(train(model=tmp_path / "bloom"), tmp_path / "run", "BloomBlock", "FAMILIES")


def test_malformed_yaml(call: Call, tmp_path: Path) -> None:
    recipe = tmp_path / "run.yaml"
    for content, word in (("model: [a\n", "run.yaml"), ("- a\n- b\n", "list"), ("", "run.yaml")):
        recipe.write_text(content)
        assert_refused(call("finetune", "--recipe", recipe), tmp_path / "run", word)
    assert_refused(call("finetune", "--recipe", tmp_path / "gone.yaml"), tmp_path / "run", "gone.yaml")


def test_output_folder_not_empty(train, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("precious")
    result = train()
    assert result.code == 2 and "not empty (it holds thesis.tex). Choose another." in result.err
    assert os.listdir(tmp_path / "run") == ["thesis.tex"]
    assert train(output=tmp_path / "run" / "thesis.tex").code == 2
    assert (tmp_path / "run" / "thesis.tex").read_text() == "precious"


def test_compare_without_a_method(train, tmp_path: Path) -> None:
    assert_refused(train(method=None, preset="dense", compare="dense"), tmp_path / "run", "compare=dense", "--method")


def test_errors_are_json_when_asked(call: Call, tmp_path: Path) -> None:
    for arguments in (("finetune", "--model", "a", "--data", "b", "--task", "x"), ("finetune", "--nope"), ("nope",)):
        result = call(*arguments, "--json")
        assert result.json["ok"] is False and result.json["error"]["exit_code"] == result.code == 2
        assert result.json["error"]["message"] and result.err == ""


def interrupted_run(train, monkeypatch: pytest.MonkeyPatch, at_step: int = 3) -> Result:
    """A run that is interrupted (Ctrl-C) in its `at_step`-th step, with a whole checkpoint for each step before."""
    from sparsetrain.hf.train.callbacks import StepRecorder

    ordinary = StepRecorder.on_step_begin

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == at_step - 1:
            raise KeyboardInterrupt
        return ordinary(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(StepRecorder, "on_step_begin", interrupt)
        return train()


def test_interrupted_and_resumed(train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted = interrupted_run(train, monkeypatch)
    assert interrupted.code == 130 and "--resume" in interrupted.err
    kept = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert kept == ["checkpoint-1", "checkpoint-2"]

    changed = train("--resume", "--json", lr=1e-3)
    assert changed.code == 2
    message = changed.json["error"]["message"]
    assert "another recipe" in message and "lr" in message and "0.001" in message

    weights = tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    truncated = train("--resume", "--json")
    assert truncated.code == 2 and "adapter_model.safetensors" in truncated.json["error"]["message"]
    assert not (tmp_path / "run" / "adapter").exists()

    weights.write_bytes(whole)
    resumed = train("--resume", "--json")
    assert resumed.code == 0 and resumed.json["resumed_from"] == 2
    losses = [step["loss"] for step in resumed.json["run"]["steps"]]
    unbroken = train("--json", output=tmp_path / "other").json
    assert losses == [step["loss"] for step in unbroken["run"]["steps"]]

    again = train("--resume", "--json")
    assert again.code == 2 and "finished" in again.json["error"]["message"]


def test_resume_of_nothing_starts_with_a_line_that_says_so(train, tmp_path: Path) -> None:
    """As after a kill before anything was written."""
    result = train("--resume")
    assert result.code == 0 and result.err.count("holds no whole checkpoint; starting from the beginning") == 1
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").write_text("x")
    refused = train("--resume", "--json", output=tmp_path / "theirs")
    assert refused.code == 2 and "thesis.tex" in refused.json["error"]["message"]


@pytest.mark.slow
def test_disk_full(llama: Path, text: Path, tmp_path: Path) -> None:
    """The limit on the size of a file stops the first checkpoint's weights half-way, as a full disk does."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "from sparsetrain.cli import run; sys.exit(run(sys.argv[1:]))"
    )
    flags = ["--model", llama, "--data", text, "--seq-len", 32, "--steps", 2, "--eval-tokens", 64, "--method", SPARSE]
    command = [sys.executable, "-c", code, "finetune", *flags, "--output", tmp_path / "run", "--save-every", 1]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr and "--resume" in done.stderr
    assert "File too large" in done.stderr
    assert not (tmp_path / "run" / "adapter").exists()
    assert not [path for path in (tmp_path / "run").rglob("manifest.json")]


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("keep_ratio=0", ("keep_ratio=0", "(0, 1]")),
        ("keep_ratio=1.5", ("keep_ratio=1.5", "(0, 1]")),
        ("keep_ratio=0.3,num_tokens=4", ("keep_ratio=0.3", "num_tokens=4", "Give one")),
        ("num_tokens=0", ("num_tokens=0", "at least 1")),
        ("policy=best", ("best", "random")),
        ("unbiased=true,policy=loss", ("unbiased", "random")),
        ("num_tokens=40", ("num_tokens=40", "32 tokens", "keep_ratio")),
    ],
)
def test_a_selection_that_cannot_be_made(train, tmp_path: Path, method: str, words: tuple[str, ...]) -> None:
    assert_refused(train(method=f"token_selection:{method}"), tmp_path / "run", *words)


def test_a_selection_that_the_rows_do_not_allow(train, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"x = {i} + y if else for,{'ab'[i % 2]}\n" for i in range(40)))
    classify = {"data": rows, "task": "classify"}
    for method in ("pool=targets", "policy=loss", "policy=gradient_norm"):
        result = train(method=f"token_selection:{method}", **classify)
        assert_refused(result, tmp_path / "run", "label a token", "policy=random")
    assert_refused(train(method="token_selection:pool=scored"), tmp_path / "run", "token_scores", "pool=all")


def test_a_selection_without_a_single_target(train, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "{"x = y + " * 40}{i}", "completion": "1"}}\n' for i in range(40)))
    assert_refused(
        train(data=rows, task="sft", method="token_selection"), tmp_path / "run", "assistant token within max_length=32"
    )


def test_a_selection_in_a_model_whose_blocks_are_not_known(train, tmp_path: Path) -> None:
    from transformers import GPTJConfig, GPTJForCausalLM

    folder = save_llama(tmp_path / "model")
    sizes = {"n_embd": 32, "n_inner": 48, "n_layer": 1, "n_head": 2, "rotary_dim": 4}
    GPTJForCausalLM(GPTJConfig(vocab_size=300, bos_token_id=1, eos_token_id=2, **sizes)).save_pretrained(folder)
    assert_refused(train(model=folder, method="token_selection"), tmp_path / "run", "GPTJ", "FAMILIES")


@pytest.mark.parametrize(
    ("model", "words"),
    [("runs/nope", "is not there: no run"), ("there", "has no recipe.yaml"), ("minilm", "is an embedded model")],
)  # fmt: skip
def test_eval_says_what_is_missing(
    model: str, words: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    result = call("eval", model)
    assert result.code == 2 and words in result.err and "--data" in result.err
