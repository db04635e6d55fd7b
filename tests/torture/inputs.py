"""Bad inputs: every command with a flag, a recipe, data, a model, an adapter, a run or a cache spoilt in one place.

Each kind is a function of a random generator and the case's own copy of the world; it spoils the copy and returns the
command, and whether the command has to refuse it (where a spoilt input may also be a good one, it needn't).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from tests.torture.world import PQ, ROUTED, SMALL, finetune, pretrain

Spoilt = tuple[tuple[str, ...], bool]
Kind = Callable[[Random, Path], Spoilt]

TEXTS = [
    "", " ", ".", "..", "/", "/dev/null", "/proc/self/mem", "~", "*", "**/*", "nan", "inf", "-inf", "1e400", "-1", "0",
    "0.5", "1,2,,3", "0-99999999999", "true", "null", "None", "[]", "{}", "{a: [1", "a" * 5000, "\x1b[31mred",
    "\u202egnp", "\udcff", "é", "org/model", "http://127.0.0.1/x", "llama", "llama/config.json", "text.txt", "fifo",
    "loop", "-", "--", "text.txt/below", "x" * 300, "foreign", "a\nb",
]  # fmt: skip
VALUES: list[Any] = [
    *TEXTS, None, True, False, 0, -1, 1.5, 10**30, -(10**30), 1e308, float("nan"), float("inf"), [], {}, [1.5], [[]],
    [None], {"a": 1}, [True], ["q_proj"], "999999999999", [0, 10**12], b"\xff",
]  # fmt: skip
ENDLESS = {"steps", "epochs", "grad_accum", "rounds", "distill_steps", "batch_size", "train_rows"}
"""Where a large number is a long run, and no bad input."""
BASES: dict[str, tuple[str, ...]] = {
    "finetune": finetune("--steps", "1", "--method", ROUTED),
    "pretrain": pretrain("--steps", "1"),
    "eval": ("eval", "run", *SMALL[:2], "--data", "text.txt", "--eval-tokens", "64"),
    "export": ("export", "run", "--output", "out"),
    "plan": ("plan", "--model", "llama", *SMALL[:2], "--memory", "1GB"),
    "profile": ("profile", "--model", "llama", "--data", "text.txt", *SMALL, "--method", ROUTED),
    "sensitivity": ("sensitivity", "--model", "llama", "--data", "text.txt", *SMALL, "--eval-tokens", "64"),
    "bench": ("bench", "--model", "llama", "--data", "text.txt", *SMALL, "--methods", "routed_ffn", "--rounds", "3"),
    "patterns": ("patterns", "run"),
    "methods": ("methods", "routed_ffn"),
    "models": ("models", "verify", "minilm"),
}
LOADERS = ("finetune", "eval", "export", "plan", "sensitivity")


def flags(draw: Random, folder: Path) -> Spoilt:
    """A flag of any command with an odd value, in place of the good one."""
    import click
    import typer

    from sparsetrain.cli.app import app_of

    special_files(folder)
    name = draw.choice([name for name in BASES if name != "models"])
    command: Any = typer.main.get_command(app_of()).commands[name]  # type: ignore[attr-defined]
    options = [p for p in command.params if isinstance(p, click.Option) or p.param_type_name == "option"]
    valued = [p for p in options if not getattr(p, "is_flag", False) and p.name != "output"]
    if not valued:  # a command without such a flag takes a name
        return (name, draw.choice(TEXTS)), False
    option = draw.choice(valued)
    spelled = option.opts[0]
    value = draw.choice([text for text in TEXTS if option.name not in ENDLESS or not text.isdigit()])
    base = [*BASES[name]]
    while spelled in base and option.name != "methods":
        at = base.index(spelled)
        del base[at : at + 2]
    return (*base, *_json(draw), spelled, value), False


def methods(draw: Random, folder: Path) -> Spoilt:
    """A method with an odd value, or a key that it lacks."""
    import sparsetrain.methods  # noqa: F401
    from sparsetrain.core.config import registered_methods

    kinds = registered_methods()
    kind = draw.choice(sorted(kinds))
    keys = [*kinds[kind].__dataclass_fields__, "numblocks", "", "method", "__class__"]
    text = f"{kind}:{draw.choice(keys)}={draw.choice(TEXTS)}"
    if draw.random() < 0.15:
        text = draw.choice(["", ":", kind + ":", kind + ":=", kind + ":a", kind + ":a=1,,b", kind.upper(), "," * 50])
    name = draw.choice(["finetune", "plan", "pretrain", "sensitivity", "profile"])
    base = [part for part in BASES[name] if part not in ("--method", ROUTED)]
    return (*base, "--method", text), False


def recipes(draw: Random, folder: Path) -> Spoilt:
    """A recipe file with a spoilt key, spoilt YAML, or spoilt bytes."""
    import yaml

    path = folder / "recipe.yaml"
    values = yaml.safe_load(path.read_text()) | {"output": "out", "model": "llama", "data": "text.txt", "steps": 1}
    text = yaml.safe_dump(values)
    how = draw.randrange(6)
    must_fail = False
    if how < 3:
        key = draw.choice([*values, "stepz", "methods", "model_options"])
        odd = draw.choice([v for v in VALUES if key not in ENDLESS or not isinstance(v, int) or isinstance(v, bool)])
        if key == "methods" and draw.random() < 0.7:
            entry = dict(draw.choice(values["methods"]))
            entry[draw.choice([*entry, "layers", "targets", "gate", "partition", "num_blocks"])] = odd
            odd = [entry]
        text = yaml.safe_dump(values | {key: odd})
    elif how == 3:
        text, must_fail = draw.choice(
            [
                ("a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
                    f"{c}: &{c} [{','.join(['*' + p] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)
                ), True),
                ("[" * 20000, True), ("{a: " * 5000, True), (text + "steps: 2\n", True), (text + text, True),
                ("", True), ("- 1\n", True), ("!!python/object/apply:os.system ['touch executed']", True),
                ("model: !!python/name:os.system\n", True), (text.replace("\n", "\n\t"), True), ("\x00", True),
                ("&a {a: *a}", True), ("methods: [" + "{method: routed_ffn}," * 3000 + "]", True), ("a" * 10**7, True),
                ("? [a]\n: b\n", True), ("1: 2\n", True), ("steps: 1\n" * 2, True),
            ]
        )  # fmt: skip
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    if how == 4:
        _spoil_bytes(draw, path)
    if how == 5:
        special_files(folder)
        path = folder / draw.choice(["fifo", "loop", "foreign", "no.yaml", "llama"])
        must_fail = True
    return (draw.choice(["finetune", "plan"]), "--recipe", str(path.name)), must_fail


def data(draw: Random, folder: Path) -> Spoilt:
    """Data of each task with spoilt bytes, spoilt rows, or no data at all."""
    name, task = draw.choice(
        [("text.txt", "lm"), ("sft.jsonl", "sft"), ("labels.csv", "classify"), ("rows.json", "sft")]
    )
    path = folder / name
    how = draw.randrange(4)
    must_fail = False
    if how == 0:
        _spoil_bytes(draw, path)
    elif how == 1 and path.suffix in (".jsonl", ".json"):
        rows = [json.loads(line) for line in (folder / "sft.jsonl").read_text().splitlines()]
        at = draw.randrange(len(rows))
        rows[at] = draw.choice([
            None, 1, [], {}, {"prompt": None, "completion": "x"}, {"prompt": 1, "completion": 2}, {"messages": []},
            {"prompt": "\ud800", "completion": "x"}, {"messages": [{"role": "x", "content": {}}]}, {"text": "x"},
            {"messages": [{"role": "user", "content": None}]}, {"prompt": "x" * 10**6, "completion": ""},
            {"prompt": "", "completion": ""}, {"messages": [{}]}, {"messages": "x"}, {"prompt": [], "completion": {}},
            {"prompt": "a", "completion": "b", "tools": 5}, {"messages": [{"role": "assistant", "content": "b"}]},
        ])  # fmt: skip
        text = json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(draw.choice([text, text.replace('"x"', "NaN"), text + "[" * 30000, text + "{", '{"a":' * 5000]))
    elif how == 2:
        special_files(folder)
        name = draw.choice(
            ["fifo", "loop", "foreign", "empty", "locked", "no*", "/dev/zero", "/proc/self/mem", ".", ""]
        )
        must_fail = name not in ("foreign", ".")
    else:
        text = path.read_text()
        path.write_bytes(draw.choice([
            text.encode("utf-16"), text.encode("utf-32"), text.encode("utf-8-sig"), b"", b"\n" * 1000, b"\xff" * 100,
            text.replace(",", ";").encode(), text[: len(text) // 2].encode(), b"\x00" * 10, b"\x1f\x8b" + b"x" * 100,
            text.upper().encode(), b"text,label\n", b'"' * 10000, b"{}" * 1000, b"[]", b"null",
            b"PK\x03\x04", b"1" * 10000,
        ]))  # fmt: skip
    command = draw.choice(["finetune", "eval", "sensitivity"])
    if command == "finetune":
        base = ["finetune", "--model", "llama", "--output", "out", *SMALL, "--eval-tokens", "64", "--steps", "1"]
    elif command == "eval":
        base = ["eval", "run", "--eval-tokens", "64"]
    else:
        base = ["sensitivity", "--model", "llama", *SMALL, "--eval-tokens", "64"]
    return (*base, "--data", name, "--task", task, *_json(draw)), must_fail


def model(draw: Random, folder: Path) -> Spoilt:
    """A model's folder with a spoilt config, tokenizer or weights; or one that is no language model."""
    path = folder / "llama"
    how = draw.randrange(5)
    must_fail = False
    if how < 2:
        file = path / draw.choice(["config.json", "config.json", "tokenizer_config.json", "generation_config.json"])
        _spoil_json(draw, file, grow=("num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size"))
    elif how == 2:
        file = draw.choice([p for p in path.iterdir() if p.name != "config.json"])
        _spoil_file(draw, file)
        must_fail = file.suffix == ".safetensors"
    elif how == 3:
        must_fail = True
        _spoil_weights(draw, path / "model.safetensors")
    else:
        path = folder / "encoder"
        must_fail = True
    command = draw.choice(LOADERS)
    base = [("llama" if part == "run" else part) for part in BASES[command]]
    at_plan = command == "plan"  # reads no weights
    return tuple(str(path.name) if part == "llama" else part for part in base), must_fail and not at_plan


def strangers(draw: Random, folder: Path) -> Spoilt:
    """A folder of a stranger, that would like its own code to run."""
    path = folder / "llama"
    (path / "evil.py").write_text(
        "import pathlib\npathlib.Path('executed').touch()\n"
        "from transformers import LlamaConfig as C, LlamaForCausalLM as M, PreTrainedTokenizerFast as T\n"
    )
    for at in (folder / "run" / "adapter", folder / "full" / "model"):
        shutil.copy(path / "evil.py", at / "evil.py")
    auto = {"AutoConfig": "evil.C", "AutoTokenizer": ["evil.T", "evil.T"], "AutoProcessor": "evil.T"}
    auto |= dict.fromkeys(("AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification"), "evil.M")
    how = draw.randrange(6)
    target = draw.choice(["llama", "run", "full"])
    holder = {"llama": path, "run": folder / "run" / "adapter", "full": folder / "full" / "model"}[target]
    config = holder / "config.json" if (holder / "config.json").exists() else path / "config.json"
    if how == 0:
        _edit(config, auto_map=auto, model_type=draw.choice(["llama", "evil", ""]))
    elif how == 1:
        _edit(path / "tokenizer_config.json", auto_map=auto, tokenizer_class="T")
        if (holder / "tokenizer_config.json").exists():
            _edit(holder / "tokenizer_config.json", auto_map=auto, tokenizer_class="T")
    elif how == 2:
        _edit(config, _attn_implementation="org/kernel", attn_implementation="org/kernel")
    elif how == 3:
        side = folder / "run" / "adapter" / "sparsity_config.json"
        _edit(config, auto_map=auto, model_type="evil")
        _edit(side, base_model=draw.choice(["../../llama", ".", "evil", str(path)]),
              model_options={"trust_remote_code": True, "code_revision": "x", "torch_dtype": "auto"})  # fmt: skip
        target = "run"
    elif how == 4:
        below = "''.__class__.__base__.__subclasses__()"
        evil = f"{{{{ {below} }}}}{{% for c in {below} %}}{{% endfor %}}"
        for at in (path, holder):
            if (at / "tokenizer_config.json").exists():
                _edit(at / "tokenizer_config.json", chat_template=evil)
    else:
        import pickle

        class Evil:
            def __reduce__(self) -> Any:
                return (os.system, ("touch executed",))

        where = draw.choice(
            ["pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth"]
        )
        for at in (path, holder, *(folder / "stopped").glob("checkpoint-*")):
            (at / where).write_bytes(pickle.dumps(Evil()))
            if where in ("pytorch_model.bin", "adapter_model.bin"):
                for weights in at.glob("*model.safetensors"):
                    weights.unlink()
    if how == 5 and draw.random() < 0.5:
        (folder / "stopped").rename(folder / "out")
        return (*finetune("--steps", "2", "--method", PQ, "--method", ROUTED), "--resume"), False
    if target == "llama":
        command = draw.choice(LOADERS)
        return tuple("llama" if part == "run" else part for part in BASES[command]), False
    extra = ("--output", "out")
    return draw.choice(
        [("eval", target, "--data", "text.txt", "--eval-tokens", "64"), ("export", target, *extra)]
    ), False


def saved(draw: Random, folder: Path) -> Spoilt:
    """A finished run with a spoilt adapter, sidecar, state or manifest."""
    name = draw.choice(["run", "full"])
    held = folder / name / ("adapter" if name == "run" else "model")
    file = draw.choice([p for p in held.iterdir() if p.is_file()])
    must_fail = False
    if file.suffix == ".json" and draw.random() < 0.75:
        _spoil_json(draw, file)
    elif file.suffix == ".safetensors" and draw.random() < 0.5:
        _spoil_weights(draw, file)
        must_fail = True
    else:
        _spoil_file(draw, file)
        must_fail = file.suffix == ".safetensors" or file.name in ("adapter_config.json", "sparsity_config.json")
    where = draw.choice([name, f"{name}/{held.name}"])
    extra = ("--eval-tokens", "64")
    return draw.choice([("eval", where, "--data", "text.txt", *extra), ("export", where, "--output", "out")]), must_fail


def stopped(draw: Random, folder: Path) -> Spoilt:
    """A run that was stopped, spoilt, and asked to go on."""
    (folder / "stopped").rename(folder / "out")
    file = draw.choice([p for p in (folder / "out").rglob("*") if p.is_file()])
    if file.suffix == ".json" and draw.random() < 0.6:
        _spoil_json(draw, file)
    else:
        _spoil_file(draw, file)
    if draw.random() < 0.2:
        shutil.rmtree(folder / "out")
        shutil.copytree(folder / "foreign", folder / "out")
    return (*finetune("--steps", "2", "--method", PQ, "--method", ROUTED), "--resume"), False


def outputs(draw: Random, folder: Path) -> Spoilt:
    """An output that cannot be written."""
    special_files(folder)
    (folder / "file").write_text("x")
    (folder / "dangling").symlink_to(folder / "nowhere" / "x")
    bad = [
        "",
        "file",
        "file/below",
        "/dev/null",
        "/proc/x",
        "fifo",
        "loop",
        "x" * 300,
        "foreign",
        "llama",
        "dangling",
        "run",
    ]
    command, key = draw.choice(
        [("finetune", "--output"), ("pretrain", "--output"), ("export", "--output"), ("plan", "--write"),
         ("plan", "--plot"), ("profile", "--plot"), ("bench", "--output"), ("sensitivity", "--write"),
         ("patterns", "--output")]
    )  # fmt: skip
    base = [*BASES[command]]
    if key in base:
        at = base.index(key)
        del base[at : at + 2]
    must_fail = command in ("finetune", "pretrain", "export")
    value = draw.choice(bad if must_fail else [*bad, "x.unknown", ".", "noextension"])
    return (*base, key, value), must_fail


def caches(draw: Random, folder: Path) -> Spoilt:
    """What earlier commands have kept, spoilt."""
    cache = folder / ".cache" / "sparsetrain"
    cache.mkdir(parents=True, exist_ok=True)
    names = ["measured.json", "machine.json", "minilm/asset.json", "plans/x.json", "hashes.json"]
    file = cache / draw.choice(names)
    file.parent.mkdir(exist_ok=True)
    odd = [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"{" * 5000,
        b'{"rates": {"gemm": "x"}}',
        b'{"format": 1, "files": 5}',
        b"\xff",
        b"1e999",
    ]
    file.write_bytes(draw.choice(odd))
    return draw.choice(
        [BASES["plan"], ("models", "list"), ("models", "verify"), ("plan", "--model", "minilm"), BASES["bench"]]
    ), False


KINDS: dict[str, tuple[Kind, int]] = {
    "flags": (flags, 6),
    "methods": (methods, 3),
    "recipes": (recipes, 4),
    "data": (data, 4),
    "model": (model, 4),
    "strangers": (strangers, 2),
    "saved": (saved, 4),
    "stopped": (stopped, 3),
    "outputs": (outputs, 2),
    "caches": (caches, 1),
}
"""Each kind of input, and its share of the cases."""


def special_files(folder: Path) -> None:
    """What isn't a regular file, under names that cases use."""
    os.mkfifo(folder / "fifo")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "empty").mkdir()
    (folder / "locked").mkdir()
    (folder / "locked").chmod(0)


def _json(draw: Random) -> tuple[str, ...]:
    return ("--json",) if draw.random() < 0.3 else ()


def _edit(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | changes))


def _spoil_json(draw: Random, path: Path, grow: tuple[str, ...] = ()) -> None:
    """Set one entry, at any depth, to an odd value; or spoil the bytes."""
    if draw.random() < 0.15:
        return _spoil_file(draw, path)
    values = json.loads(path.read_text())
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in pairs:
            places.append((node, key))
            walk(value)

    walk(values)
    if not places:
        return _spoil_file(draw, path)
    node, key = draw.choice(places)
    if grow and draw.random() < 0.5:
        node, key = values, draw.choice([name for name in grow if name in values] or [key])
    if draw.random() < 0.15 and isinstance(node, dict):
        del node[key]
    else:
        odd = draw.choice([v for v in VALUES if not isinstance(v, bytes)])
        node[key] = odd
    path.write_text(json.dumps(values), encoding="utf-8", errors="surrogatepass")
    return None


def _spoil_file(draw: Random, path: Path) -> None:
    how = draw.randrange(7)
    if how == 0:
        path.unlink()
    elif how == 1:
        path.write_bytes(b"")
    elif how == 2:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == 3:
        path.unlink()
        path.mkdir()
    elif how == 4:
        path.unlink()
        os.mkfifo(path)
    elif how == 5:
        path.unlink()
        path.symlink_to("/dev/zero")
    else:
        path.write_bytes(b"[" * 50000)


def _spoil_bytes(draw: Random, path: Path) -> None:
    raw = bytearray(path.read_bytes())
    for _ in range(draw.choice([1, 3, 50])):
        at = draw.randrange(len(raw))
        piece = draw.choice(
            [
                b"\x00",
                b"\xff",
                b"\xed\xa0\x80",
                b'"',
                b"{",
                b"}",
                b"\\",
                b"\n",
                b"\r",
                b"\t",
                b",",
                b"\x1b[2J",
                b"'",
                b":",
            ]
        )
        raw[at : at + draw.randrange(3)] = piece
    path.write_bytes(bytes(raw))


def _spoil_weights(draw: Random, path: Path) -> None:
    """Weights that are missing, renamed, of another shape, or no numbers; or a header that claims too much."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    if not tensors:
        path.write_bytes(b"")
        return
    name = draw.choice(sorted(tensors))
    how = draw.randrange(6)
    if how == 0:
        del tensors[name]
    elif how == 1:
        tensors["x." + name] = tensors.pop(name)
    elif how == 2:
        tensors[name] = torch.zeros(3, 5)
    elif how == 3:
        tensors[name] = torch.full_like(tensors[name].float(), float("nan"))
    elif how == 4:
        path.write_bytes((2**40).to_bytes(8, "little") + b"{}")
        return
    else:
        raw = path.read_bytes()
        path.write_bytes(raw[: -len(raw) // 3])
        return
    save_file(tensors, path, metadata={"format": "pt"})
