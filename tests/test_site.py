"""The site: every page has its place, every link of it leads somewhere in it; and it builds, where mkdocs is."""

from __future__ import annotations

import importlib.util
import pydoc
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import sparsetrain
from bench.tables.steps import registered
from sparsetrain.core.config import registered_methods
from tests.test_docs import headings

REPO = Path(__file__).parents[1]


def hooks() -> Any:
    """docs/hooks.py, as mkdocs reads it."""
    spec = importlib.util.spec_from_file_location("site_hooks", REPO / "docs" / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SITE = hooks()
PAGES = [*SITE.pages(), SITE.REFERENCE]


def places(menu: Any) -> Iterator[str]:
    """Every page that the menu leads to."""
    if isinstance(menu, str):
        yield menu
    else:
        for each in menu if isinstance(menu, list) else menu.values():
            yield from places(each)


def test_the_menu_leads_to_every_page_once() -> None:
    assert sorted(places(SITE.navigation())) == sorted(PAGES)


def test_every_method_has_a_page_with_its_verdict() -> None:
    for name in registered():
        config = registered_methods()[name]
        page = Path(registered()[name].page).parent.name
        assert f"| `{config.__name__}` | |" in SITE.written(f"methods/{page}.md"), f"{name}: run `make docs`"


def test_the_reference_has_every_public_name() -> None:
    named = re.findall(r"^::: (\S+)$", SITE.reference(), flags=re.M)
    kinds = [kind for kind in registered_methods().values() if kind.__module__.startswith("sparsetrain.")]
    assert {name.rpartition(".")[2] for name in named} == {
        *sparsetrain._HOMES,
        *(kind.__name__ for kind in kinds),
        *(name.rpartition(".")[2] for name in SITE.RUNS),
    }
    assert all(callable(pydoc.locate(name)) for name in SITE.RUNS)
    for name in named:  # griffe reads the file that defines it
        module, _, attribute = name.rpartition(".")
        assert getattr(importlib.import_module(module), attribute).__module__ == module, name


@pytest.mark.parametrize("place", PAGES)
def test_links_lead_to_pages_and_headings_of_the_site(place: str) -> None:
    text = "".join(part for part in SITE.FENCE.split(SITE.written(place)) if not part.startswith("```"))
    for _, link in SITE.LINK.findall(text):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = (Path("/site") / place).parent.joinpath(path).resolve().relative_to("/site") if path else Path(place)
        found = str(target)
        below = REPO / "docs" / found
        assert found in PAGES or found in SITE.attached() or below.is_file(), link
        if anchor and found in SITE.pages():
            assert anchor in headings(SITE.pages()[found]), link


def test_lists_and_tables_stand_apart_from_text_but_code_stays() -> None:
    text = "Two:\n- one\n- two\n\n```\na\n- b\n```\nThree:\n1. x\n| a |\n"
    assert SITE.with_blank_lines(text).startswith("Two:\n\n- one\n- two\n\n```\na\n- b\n```\nThree:\n\n1. x\n")


def test_the_settings_name_what_is_there() -> None:
    class Loader(yaml.SafeLoader):
        """mkdocs' own tags are not ours to read."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
    settings = yaml.load((REPO / "mkdocs.yml").read_text(encoding="utf-8"), Loader)
    assert (REPO / settings["docs_dir"]).is_dir() and all((REPO / hook).is_file() for hook in settings["hooks"])
    assert settings["theme"]["font"] is False and "nav" not in settings


@pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None, reason="needs the extra `docs`: pip install -e '.[docs]'"
)
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Some seconds: it renders fifty pages and reads every public docstring."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site" / "reference" / "index.html").read_text(encoding="utf-8")
    assert 'id="sparsetrain.surgery.apply.sparsify"' in page and "fonts.googleapis" not in page
