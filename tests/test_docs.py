"""What the docs say is so: generated parts are current, links lead somewhere, every Python snippet runs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsetrain
import sparsetrain.methods
from bench import report
from bench.tables.mechanisms import PICTURES, shown
from bench.tables.steps import registered
from sparsetrain.core.config import registered_methods
from sparsetrain.surgery.method import method_of
from tests.cli.conftest import byte_tokenizer
from tests.families import llama_config

REPO = Path(__file__).parents[1]
PAGES = [REPO / "README.md", *(REPO / method.page for method in registered().values())]
GROWN = {REPO / registered()[name].page for name in registered() if method_of(registered_methods()[name]).growth}
MARKDOWN = [
    *REPO.glob("*.md"),
    *(REPO / "docs").rglob("*.md"),
    *(REPO / "src" / "sparsetrain" / "methods").glob("*/README.md"),
]


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), flags=re.M | re.S)


def snippets() -> Iterator[Any]:
    for page in PAGES:
        for number in range(len(blocks(page))):
            name = f"{page.parent.name if page.parent != REPO else 'README'}-{number}"
            yield pytest.param(page, number, id=name)


class Tiny:
    """Stands for the models that snippets open by their name on the hub: random, four blocks, a byte a token."""

    @classmethod
    def model(cls, name: str, **options: Any) -> Any:
        from transformers import LlamaForCausalLM

        assert name == "HuggingFaceTB/SmolLM2-135M-Instruct" and options == {"dtype": "float32"}
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
        sizes |= {"max_position_embeddings": 2048, "vocab_size": len(byte_tokenizer())}
        return LlamaForCausalLM(llama_config(**sizes))

    @classmethod
    def tokenizer(cls, name: str) -> Any:
        assert name == "HuggingFaceTB/SmolLM2-135M-Instruct"
        return byte_tokenizer()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Names of the hub open tiny models, and the working directory has notes and pairs."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", Tiny.model)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", Tiny.tokenizer)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    for number in range(4):
        letters = torch.randint(97, 123, (640,), generator=torch.Generator().manual_seed(number))
        (tmp_path / "notes" / f"{number}.txt").write_text(bytes(letters.tolist()).decode())
    pairs = [json.dumps({"prompt": "1 + 1 = 2. " * n, "completion": "And 2 + 2 = 4."}) for n in (4, 9, 20)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(pairs))


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning")
@pytest.mark.parametrize(("page", "number"), list(snippets()))
def test_the_snippet_runs(page: Path, number: int, hub: None) -> None:
    """With the page's earlier snippets before it, in one namespace."""
    namespace: dict[str, Any] = {}
    for block in blocks(page)[: number + 1]:
        exec(compile(block, f"{page.name}, snippet {number}", "exec"), namespace)
    if page in GROWN:  # they make models, and leave no handle
        assert type(namespace["model"]).__module__.startswith("transformers.")
    else:
        assert namespace["handle"].active and namespace["handle"].plan.edits
    assert all(weight.isfinite().all() for weight in namespace["model"].parameters())
    if ".train()" in blocks(page)[number]:
        assert list(Path("runs").glob("*/checkpoint-*")), "it trained to its end"


def test_every_page_of_a_method_has_a_snippet() -> None:
    assert all(blocks(page) for page in PAGES)


def test_each_method_has_its_picture() -> None:
    """What it shows is `bench.tables.mechanisms`'; that it is current is held with all that is generated."""
    assert PICTURES.keys() == {page.parent.name for page in PAGES[1:]}
    for method in PICTURES:
        page = (REPO / "src" / "sparsetrain" / "methods" / method / "README.md").read_text()
        assert "\n".join(shown(method)) in page.partition("```")[0], "before the first code"
        for theme in ("light", "dark"):
            drawn = (REPO / "docs" / "pictures" / f"{method}-{theme}.svg").read_text()
            assert "<text" in drawn and "<image" not in drawn and "prefers-color-scheme" not in drawn


def test_what_is_generated_is_current() -> None:
    stale = [str(path.relative_to(REPO)) for path, text in report.pages().items() if path.read_text() != text]
    assert not stale, f"run `make docs`: {stale}"


def test_every_registered_method_is_in_the_tables() -> None:
    readme, support = (REPO / "README.md").read_text(), (REPO / "docs" / "support.md").read_text()
    for name in registered():
        config = registered_methods()[name]
        assert f"[`{config.__name__}`]" in readme, f"{name}: run `make docs`"
        assert f" {name} |" in support or f"`{name}`" in support, f"{name}: run `make docs`"


def test_the_version_is_said_once() -> None:
    assert f"version: {sparsetrain.__version__}\n" in (REPO / "CITATION.cff").read_text()


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: str(page.relative_to(REPO)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        path, _, heading = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not heading or heading in headings(target), link


def headings(page: Path) -> set[str]:
    """As GitHub names them."""
    found = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in found}
