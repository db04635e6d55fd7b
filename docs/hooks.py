"""What the site is made of: docs/, the README as its first page, a page a method, and a reference of the public names.

Links of a page are those of its file in the repository; here they become links of the site. mkdocs is not needed to ask
`pages`, `navigation` and `written`, and the tests ask them without it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

REPO = Path(__file__).parents[1]
DOCS = REPO / "docs"
METHODS = REPO / "src" / "sparsetrain" / "methods"
REFERENCE = "reference.md"
PICTURES = [f"![Speed and saved bytes](../pictures/steps-{theme}.svg#only-{theme})" for theme in ("light", "dark")]
"""Of a step with each method that was timed; the theme shows one of the two."""
RUNS = (
    "sparsetrain.hf.train.finetune.finetune",
    "sparsetrain.hf.train.pretrain.pretrain",
    "sparsetrain.recipes.finetune.Recipe",
    "sparsetrain.recipes.pretrain.PretrainRecipe",
    "sparsetrain.hf.study.choose.choose",
    "sparsetrain.hf.study.compare.compare",
    "sparsetrain.hf.train.evaluate.evaluate",
    "sparsetrain.hf.train.callbacks.Sparsifies",
    "sparsetrain.hf.train.callbacks.SparsityCallback",
    "sparsetrain.hf.model.io.load",
    "sparsetrain.hf.model.io.save",
)
"""Named in the README and the pages, and not among the package's own names."""
FENCE = re.compile(r"(^```.*?^```$)", flags=re.M | re.S)
LINK = re.compile(r"(\]\(|(?:src|srcset|href)=\")([^)\s\"]+)")


def pages() -> dict[str, Path]:
    """Place in the site -> the file of the repository that it is written in."""
    found = {str(path.relative_to(DOCS)): path for path in sorted(DOCS.rglob("*.md"))}
    found["index.md"] = REPO / "README.md"
    found |= {f"{name.lower()}.md": REPO / f"{name}.md" for name in ("CHANGELOG", "CONTRIBUTING")}
    return found | {f"methods/{path.parent.name}.md": path for path in sorted(METHODS.glob("*/README.md"))}


def navigation() -> list[dict[str, Any]]:
    """The menu."""
    places = pages()

    def below(folder: str) -> list[dict[str, str]]:
        return [{heading(places[at]): at} for at in places if at.startswith(f"{folder}/") and at.endswith(".md")]

    def named(*places: str) -> list[dict[str, str]]:
        return [{heading(pages()[f"{at}.md"]): f"{at}.md"} for at in places]

    return [
        {"Start": "index.md"},
        *named("will_it_fit", "exact_tools", "cookbook", "from-trl"),
        {"Methods": [*below("methods"), *named("support")]},
        {"How to": named("export", "others", "distributed", "grids", "diffusion", "security")},
        {"Results": below("results")},
        {"Reference": REFERENCE},
        {"The project": [*named("log"), {"Decisions": below("decisions")}, *named("changelog", "contributing")]},
    ]


def heading(page: Path) -> str:
    """A page's title, without what follows a colon."""
    first = next(line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("# "))
    title = first[2:].strip()
    return title if re.match(r"\d{4}:", title) else title.split(": ")[0]


def written(place: str) -> str:
    """The Markdown of a page of the site."""
    if place == REFERENCE:
        return reference()
    source = pages()[place]
    text = relinked(source.read_text(encoding="utf-8"), source, place)
    if source.parent.parent == METHODS:
        text = f"{text.rstrip()}\n\n{verdict(source)}"
    return with_blank_lines(text)


def verdict(page: Path) -> str:
    """What the README's table says of a method, one fact a line, and what its page of results concludes."""
    table = between((REPO / "README.md").read_text(encoding="utf-8"), "methods")
    head, _, *body = (row.strip("| ").split(" | ") for row in table.splitlines())
    lines = ["## Verdict", ""]
    for row in body:
        if f"({page.relative_to(REPO)})" in row[0]:
            lines += [f"| {re.sub(r'[][]|[(].*[)]', '', row[0])} | |", "| --- | --- |"]
            lines += [*(f"| {name} | {fact} |" for name, fact in zip(head[2:5], row[2:5], strict=True)), ""]
            if row[2][0].isdigit():
                lines += [*PICTURES, ""]
    results = DOCS / "results" / f"{page.parent.name}.md"
    if results.is_file():
        lines += [between(results.read_text(encoding="utf-8"), "conclusion"), ""]
        lines.append(f"[All results](../results/{results.name}). ")
    lines += [f"**{not_for(page.parent)}**", ""]
    return "\n".join([*lines, "[When not to use it](../index.md#when-not-to-use-it), in general."]) + "\n"


def not_for(method: Path) -> str:
    """What a method's own description says that it is not for."""
    config = (method / "config.py").read_text(encoding="utf-8")
    about = re.search(r"^    about: ClassVar\[str\] = \((.*?)^    \)", config, flags=re.M | re.S)
    said = "".join(re.findall(r'"(.*?)"', about[1])) if about else ""
    return said[said.index("Not for ") :] if "Not for " in said else said.split(". ")[-1]


def between(text: str, mark: str) -> str:
    """What is generated between the marks of a page."""
    return text.split(f"<!-- {mark} -->\n")[1].split(f"\n<!-- /{mark} -->")[0]


def reference() -> str:
    """Every public name, to be filled from its docstring."""
    source = (REPO / "src" / "sparsetrain" / "__init__.py").read_text(encoding="utf-8")
    verbs = re.findall(r"^    from (sparsetrain\.[\w.]+) import (\w+) as \2$", source, flags=re.M)
    configs = [
        found
        for file in sorted(METHODS.glob("*/__init__.py"))
        for found in re.findall(r"^from (\S+\.config) import (\w+) as \2$", file.read_text("utf-8"), flags=re.M)
    ]
    parts = ["# Reference", "The public names of `sparsetrain`, as their docstrings have them."]
    runs = [tuple(name.rsplit(".", 1)) for name in RUNS]
    for title, names in (
        ("What changes a model", verbs),
        ("Configs of the methods", configs),
        ("Runs, and what they leave", runs),
    ):
        parts += [f"## {title}", *(f"::: {module}.{name}" for module, name in names)]
    return "\n\n".join(parts) + "\n"


def relinked(text: str, source: Path, place: str) -> str:
    """The links of a file as links of its place in the site; what stands in fences is left alone."""

    def anew(match: re.Match[str]) -> str:
        path, mark, anchor = match[2].partition("#")
        if "://" in path or not path:
            return match[0]
        target = os.path.relpath(place_of((source.parent / path).resolve()), Path(place).parent)
        return f"{match[1]}{target}{mark}{anchor}"

    return "".join(part if part.startswith("```") else LINK.sub(anew, part) for part in FENCE.split(text))


def place_of(file: Path) -> str:
    """Where a file of the repository is in the site; of a folder its first page."""
    known = {path: place for place, path in pages().items()}
    if file.is_dir():
        file = min((path for path in known if path.parent == file), default=file)
    return known.get(file) or str(file.relative_to(DOCS if file.is_relative_to(DOCS) else REPO))


def attached() -> dict[str, Path]:
    """Place -> file of what pages link to that is no page and not below docs/: recipes, scripts, notebooks."""
    found = {}
    for source in pages().values():
        for part in FENCE.split(source.read_text(encoding="utf-8")):
            for _, link in [] if part.startswith("```") else LINK.findall(part):
                file = (source.parent / link.partition("#")[0]).resolve()
                if "://" not in link and file.is_file() and not file.is_relative_to(DOCS):
                    found[place_of(file)] = file
    return {at: file for at, file in found.items() if at not in pages()}


def with_blank_lines(text: str) -> str:
    """A blank line before lists and tables, which GitHub does without and Python's Markdown does not."""
    parts = []
    for part in FENCE.split(text):
        if not part.startswith("```"):
            part = re.sub(r"^((?![-*|\s]|\d+\. ).+)\n(?=(?:[-*]|\d+\.) |\|)", r"\1\n\n", part, flags=re.M)
        parts.append(part)
    return "".join(parts)


def on_config(config: Any) -> None:
    """mkdocs asks for the menu."""
    config.nav = navigation()


def on_files(files: Any, config: Any) -> None:
    """mkdocs asks for the files: pages from elsewhere are added as if they were in docs/."""
    from mkdocs.structure.files import File

    for place in [*pages(), REFERENCE]:
        if (old := files.get_file_from_path(place)) is not None:
            files.remove(old)
        files.append(File.generated(config, place, content=written(place)))
    for place, file in attached().items():
        files.append(File.generated(config, place, content=file.read_bytes()))
