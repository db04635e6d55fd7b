"""Embedded assets: the registry, the cache, and (where fetched) the converted weights against transformers' own."""

import base64
import dataclasses
import hashlib
import json
import zipfile
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

from sparsetrain.hf import assets
from sparsetrain.hf.assets import llama_gguf, package, registry, store

ROOT = Path(__file__).parents[2]
CONTENT = b"a,b\n1,2\n"


def make_wheel(path: Path, members: dict[str, bytes], record: dict[str, bytes] | None = None) -> str:
    """Write a wheel with a RECORD (of `record`'s contents where they differ) and return its sha256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, content in {**members, **(record or {})}.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(content)}")
    metadata = b"Metadata-Version: 2.1\nName: sparsetrain-toy-asset\nVersion: 1.0\n"
    tags = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    info = "sparsetrain_toy_asset-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in members.items():
            wheel.writestr(name, content)
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(f"{info}/WHEEL", tags)
        wheel.writestr(f"{info}/RECORD", "\n".join([*lines, f"{info}/RECORD,,"]) + "\n")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def toy_asset(sha256: str) -> assets.Asset:
    return assets.Asset(
        name="toy",
        kind="data",
        source="pypi",
        package="sparsetrain-toy-asset==1.0",
        sha256=sha256,
        licence="MIT",
        files=MappingProxyType({"toy/data.csv": "data.csv"}),
        download_bytes=1000,
        description="a toy",
    )


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> assets.Asset:
    """An asset that real pip can get from a local folder, offline, in an empty cache."""
    monkeypatch.setenv("SPARSETRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    members = {"toy/data.csv": CONTENT, "toy/__init__.py": b"raise RuntimeError('asset code was run')\n"}
    asset = toy_asset(make_wheel(tmp_path / "wheels" / "sparsetrain_toy_asset-1.0-py3-none-any.whl", members))
    known = MappingProxyType({**assets.ASSETS, "toy": asset})
    for module in (registry, store):
        monkeypatch.setattr(module, "ASSETS", known)
    return asset


def silent(line: str) -> None:
    del line


def test_registry_is_sound():
    for asset in assets.list_assets():
        assert asset.name == assets.find_asset(asset.name).name
        assert asset.licence and asset.description and asset.kind in ("model", "data")
        assert not any(name.endswith((".py", ".pkl", ".bin", ".pt")) for name in asset.files)
        if asset.source in ("pypi", "debian"):
            assert len(asset.sha256) == 64 and asset.download_bytes > 0 and asset.files
    assert not any("gpqa" in member.lower() for member in assets.find_asset("gsm8k").files)
    assert {asset.name for asset in assets.list_assets("model")} == {"smollm2-135m", "minilm"}


def test_requirements_file_agrees_with_the_registry():
    assert (ROOT / "requirements-assets.txt").read_text(encoding="utf-8") == assets.requirements_text()


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("SPARSETRAIN_CACHE", str(tmp_path / "own"))
    assert assets.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("SPARSETRAIN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert assets.cache_folder() == tmp_path / "xdg" / "sparsetrain"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert assets.cache_folder() == Path.home() / ".cache" / "sparsetrain"


def test_fetch_unpacks_only_the_named_files_and_is_a_no_op_afterwards(toy: assets.Asset):
    assert assets.asset_status("toy").state == "absent"
    lines: list[str] = []
    folder = assets.fetch("toy", progress=lines.append)["toy"]
    assert sorted(path.name for path in folder.iterdir()) == ["asset.json", "data.csv"]
    assert (folder / "data.csv").read_bytes() == CONTENT
    assert [path.name for path in assets.cache_folder().iterdir()] == ["toy"]  # nothing of the scratch folder is left
    assert any("downloading" in line for line in lines)
    status = assets.asset_status("toy", deep=True)
    assert (status.state, status.bytes) == ("ready", len(CONTENT))
    lines.clear()
    assert assets.fetch(["toy"], progress=lines.append) == {"toy": folder}
    assert lines == []
    assert assets.resolve_data("toy") == str(folder)


def test_verify_finds_damage_and_fetch_repairs_it(toy: assets.Asset):
    folder = assets.fetch("toy", progress=silent)["toy"]
    (folder / "data.csv").write_bytes(CONTENT[::-1])  # same size: only the hash can tell
    assert assets.asset_status("toy").state == "ready"
    with pytest.raises(ValueError, match=r"damaged: .*data\.csv does not have the sha256"):
        assets.verify("toy")
    assert assets.verify(assets.fetch("toy", progress=silent).popitem()[0]) == folder
    (folder / "data.csv").write_bytes(b"short")
    assert "5 bytes instead of 8" in assets.asset_status("toy").problem
    (folder / "data.csv").unlink()
    assert "missing" in assets.asset_status("toy").problem
    (folder / "asset.json").write_text("{}", encoding="utf-8")
    assert "cannot be read" in assets.asset_status("toy").problem
    assert assets.fetch("toy", progress=silent) == {"toy": folder}
    assert (folder / "data.csv").read_bytes() == CONTENT


def test_a_folder_made_from_another_package_is_not_taken(toy: assets.Asset, monkeypatch: pytest.MonkeyPatch):
    folder = assets.fetch("toy", progress=silent)["toy"]
    manifest = json.loads((folder / "asset.json").read_text(encoding="utf-8"))
    manifest["sha256"] = "0" * 64
    (folder / "asset.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert "made from" in assets.asset_status("toy").problem


def test_pip_refuses_another_hash(toy: assets.Asset, monkeypatch: pytest.MonkeyPatch):
    known = MappingProxyType({"toy": dataclasses.replace(toy, sha256="0" * 64)})
    monkeypatch.setattr(registry, "ASSETS", known)
    with pytest.raises(RuntimeError, match=r"(?s)Fetching 'toy'.*pip ended with code"):
        assets.fetch("toy", progress=silent)
    assert list(assets.cache_folder().iterdir()) == []


def test_an_absent_package_says_what_to_do(toy: assets.Asset, tmp_path: Path):
    next((tmp_path / "wheels").iterdir()).unlink()
    with pytest.raises(RuntimeError, match=r"(?s)sparsetrain-toy-asset==1\.0.*Check that pip can reach"):
        assets.fetch("toy", progress=silent)
    assert list(assets.cache_folder().iterdir()) == []


def test_no_pip_says_what_to_do(toy: assets.Asset, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(package.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="ensurepip"):
        assets.fetch("toy", progress=silent)


def test_a_wheel_that_contradicts_its_record_is_refused(tmp_path: Path):
    wheel = tmp_path / "toy-1.0-py3-none-any.whl"
    asset = toy_asset(make_wheel(wheel, {"toy/data.csv": CONTENT}, record={"toy/data.csv": b"other"}))
    with pytest.raises(RuntimeError, match="RECORD"):
        package.unpack(asset, wheel, tmp_path / "out")
    asset = dataclasses.replace(asset, files=MappingProxyType({"toy/gone.csv": "gone.csv"}))
    with pytest.raises(RuntimeError, match="does not list"):
        package.unpack(asset, wheel, tmp_path / "out2")


def test_a_debian_asset_without_apt_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SPARSETRAIN_CACHE", str(tmp_path))
    monkeypatch.setattr(package.shutil, "which", lambda tool: None)
    with pytest.raises(RuntimeError, match="needs apt-get and dpkg-deb"):
        assets.fetch("fashion-mnist", progress=silent)


def test_a_package_with_another_hash_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SPARSETRAIN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "other.deb").write_bytes(b"not the pinned one")
    monkeypatch.setattr(package, "_apt_download", lambda asset, folder: tmp_path / "other.deb")
    with pytest.raises(RuntimeError, match=r"other\.deb has sha256 .*'fashion-mnist' is pinned to 39e172fe"):
        assets.fetch("fashion-mnist", progress=silent)
    assert list(assets.cache_folder().iterdir()) == []


def test_names_resolve_by_kind():
    assert assets.resolve_model("org/some-model") == "org/some-model"
    assert assets.resolve_data("./folder") == "./folder"
    with pytest.raises(ValueError, match=r"'gsm8k' is an embedded data asset; a model was asked for.*smollm2-135m"):
        assets.resolve_model("gsm8k")
    with pytest.raises(ValueError, match=r"'minilm' is an embedded model asset"):
        assets.resolve_data("minilm")
    with pytest.raises(ValueError, match=r"No embedded asset is called 'nope'. Found: smollm2-135m"):
        assets.fetch("nope")


def test_python_stdlib_is_always_there():
    status = assets.asset_status("python-stdlib")
    assert status.state == "ready" and (status.path / "os.py").is_file()
    assert assets.fetch("python-stdlib", progress=silent) == {"python-stdlib": status.path}


def test_unpermute_rotary_undoes_the_gguf_order():
    num_heads, width = 3, 8
    rows = np.arange(num_heads * width * 2, dtype=np.float32).reshape(num_heads * width, 2)
    # llama.cpp's converter: (heads, 2, half) -> (heads, half, 2)
    stored = rows.reshape(num_heads, 2, width // 2, 2).swapaxes(1, 2).reshape(num_heads * width, 2)
    assert not np.array_equal(stored, rows)
    assert np.array_equal(llama_gguf.unpermute_rotary(stored, num_heads), rows)


def write_tiny_gguf(path: Path, architecture: str = "llama") -> None:
    """A Llama of 2 layers, 4 heads of 16 and 2 key heads, quantised as SmolLM2's file is (Q4_1, Q8_0, F32)."""
    from gguf import GGMLQuantizationType, GGUFWriter, quants
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *bytes_to_unicode().values(), "ab", "ĠĠ"]
    writer = GGUFWriter(path, architecture)
    for key, value in {
        "block_count": 2,
        "context_length": 64,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "rope.dimension_count": 16,
        "vocab_size": len(tokens),
    }.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.rope.freq_base", 10_000.0)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", "smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b", "Ġ Ġ"])
    for kind, token_id in {"bos": 1, "eos": 2, "unknown": 0, "padding": 2}.items():
        writer.add_uint32(f"tokenizer.ggml.{kind}_token_id", token_id)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    generator = np.random.default_rng(0)

    def add(name: str, kind: GGMLQuantizationType, *shape: int) -> None:
        values = generator.normal(scale=0.2, size=shape).astype(np.float32)
        writer.add_tensor(name, quants.quantize(values, kind), raw_dtype=kind)

    q4, q8, f32 = GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0, GGMLQuantizationType.F32
    add("token_embd.weight", q8, len(tokens), 64)
    add("output_norm.weight", f32, 64)
    for i in range(2):
        for name, rows, columns in (("q", 64, 64), ("k", 32, 64), ("v", 32, 64), ("output", 64, 64)):
            add(f"blk.{i}.attn_{name}.weight", q4, rows, columns)
        for name, rows, columns in (("gate", 96, 64), ("up", 96, 64), ("down", 64, 96)):
            add(f"blk.{i}.ffn_{name}.weight", q4, rows, columns)
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{i}.{name}.weight", f32, 64)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_conversion_equals_transformers_own_reading(tmp_path: Path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = tmp_path / "tiny.gguf"
    write_tiny_gguf(source)
    folder = tmp_path / "converted"
    folder.mkdir()
    llama_gguf.convert_llama_gguf(source, folder)
    assert (folder / "model.safetensors").stat().st_mode & 0o044 == 0o044
    assert "quantization_config" not in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=source.name, dtype=torch.float32)
    state = theirs.state_dict()
    assert ours.state_dict().keys() == state.keys()
    for name, value in ours.state_dict().items():
        assert torch.equal(value, state[name]), name
    ids = torch.arange(20)[None] * 11
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Digits are split off first, so the two blanks before one stay together; a byte-level split alone parts them.
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("ab  12<|im_end|>")["input_ids"])
    assert tokens == ["ab", "ĠĠ", "1", "2", "<|im_end|>"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.model_max_length == 64 and tokenizer.chat_template


def test_conversion_refuses_other_architectures(tmp_path: Path):
    write_tiny_gguf(tmp_path / "other.gguf", architecture="qwen2")
    with pytest.raises(ValueError, match=r"\('qwen2', 'gpt2'\); only \('llama', 'gpt2'\)"):
        llama_gguf.convert_llama_gguf(tmp_path / "other.gguf", tmp_path)


def fetched(name: str) -> Path:
    status = assets.asset_status(name)
    if status.state != "ready":
        pytest.skip(f"asset {name!r} is {status.state}: {status.problem}; fetch it with sparsetrain.hf.assets.fetch")
    return status.path


@pytest.mark.assets
@pytest.mark.parametrize("name", [asset.name for asset in assets.list_assets()])
def test_fetched_assets_verify(name: str):
    fetched(name)
    assert assets.verify(name).is_dir()


@pytest.mark.assets
def test_smollm2_loads_answers_and_splits_digits():
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = fetched("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(tokenizer("x =  12")["input_ids"]) == ["x", "Ġ=", "ĠĠ", "1", "2"]
    text = "def f(x):\n    return x  # 3.14 — ünïcode 日本\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=10, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


@pytest.mark.assets
def test_minilm_loads():
    from transformers import AutoModel, AutoTokenizer

    folder = fetched("minilm")
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and model.config.num_hidden_layers == 6
    assert AutoTokenizer.from_pretrained(folder)("hello")["input_ids"] == [101, 7592, 102]


def test_damage_of_equal_size_is_found_once_it_is_written(toy: assets.Asset):
    folder = assets.fetch(toy.name, progress=silent)[toy.name]
    assert assets.resolve_data(toy.name) == str(folder)
    name = next(iter(toy.files.values()))
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(bytes(byte ^ 1 for byte in whole))
    assert assets.asset_status(toy.name).state == "ready"  # sizes alone
    said: list[str] = []
    assert assets.resolve_data(toy.name, progress=said.append) == str(folder)
    assert "sha256" in said[0] and "fetching it again" in said[0]
    assert (folder / name).read_bytes() == whole


def test_files_are_hashed_once(toy: assets.Asset, monkeypatch: pytest.MonkeyPatch):
    assets.fetch(toy.name, progress=silent)
    assets.resolve_data(toy.name)
    monkeypatch.setattr(store, "_sha256", lambda path: pytest.fail("hashed again"))
    assets.resolve_data(toy.name)
    monkeypatch.setattr(store, "_boot", lambda: "another start of the machine")
    with pytest.raises(pytest.fail.Exception, match="hashed again"):
        assets.resolve_data(toy.name)


def test_a_manifest_of_other_types_is_damage(toy: assets.Asset):
    folder = assets.fetch(toy.name, progress=silent)[toy.name]
    entries = '{"format": 1, "package": "p", "sha256": "s", "files": {"a": {"bytes": {}, "sha256": []}}}'
    others = '{"format": [], "package": {}, "sha256": 1, "files": []}'
    for content in ("[]", "null", '{"format": 1}', others, entries, "[" * 100_000, "\udcff", ""):
        (folder / "asset.json").write_bytes(content.encode(errors="surrogateescape"))
        assert assets.asset_status(toy.name).state == "damaged", content[:40]
    assert assets.resolve_data(toy.name, progress=silent) == str(folder)
    assert assets.asset_status(toy.name, deep=True).state == "ready"
