"""A picture of what each method does, for its page: drawn from random numbers with a seed, by our operations where they
are small enough to show.

A drawing is 100 units wide; its height is its own. SVG as `picture` has it: text is text, on no ground, in two themes.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

COLOURS = {
    "light": {"ink": "#1f2933", "soft": "#5f6c7b", "off": "#d9dfe6", "on": "#2563eb", "new": "#c2410c"},
    "dark": {"ink": "#e4e7eb", "soft": "#9aa5b1", "off": "#3a4653", "on": "#60a5fa", "new": "#fb923c"},
}
INCHES = 5.2
"""Of the width, so that letters stay readable on a telephone, where the picture is three quarters of that."""


@dataclass
class Drawing:
    """Axes in units, and the theme's colours by name."""

    axes: Any
    colours: dict[str, str]

    def cells(self, x: float, y: float, size: float, kinds: list[list[str]], shade: Tensor | None = None) -> None:
        """Squares, the first row on top of [x, y]'s right and below it; `shade` in [0, 1]: how strong each is."""
        from matplotlib.patches import Rectangle

        for i, row in enumerate(kinds):
            for j, kind in enumerate(row):
                strong = 1.0 if shade is None or kind == "off" else 0.25 + 0.75 * float(shade[i, j])
                at, edge = (x + j * size, y - (i + 1) * size), 0.86 * size
                self.axes.add_patch(Rectangle(at, edge, edge, color=self.colours[kind], alpha=strong, linewidth=0))

    def box(self, x: float, y: float, width: float, height: float, kind: str, strong: float = 1.0) -> None:
        """A rectangle with its lower left corner at [x, y]."""
        from matplotlib.patches import Rectangle

        colour = self.colours[kind]
        self.axes.add_patch(Rectangle((x, y), width, height, color=colour, alpha=strong, linewidth=0))

    def text(self, x: float, y: float, said: str, kind: str = "ink", size: float = 10, ha: str = "center") -> None:
        self.axes.text(x, y, said, color=self.colours[kind], fontsize=size, ha=ha, va="center")

    def arrow(self, start: tuple[float, float], end: tuple[float, float], kind: str = "soft") -> None:
        style = {"arrowstyle": "-|>", "color": self.colours[kind], "linewidth": 1.3, "shrinkA": 0, "shrinkB": 0}
        self.axes.annotate("", xy=end, xytext=start, arrowprops=style)

    def line(self, xs: list[float], ys: list[float], kind: str, width: float = 2.5) -> None:
        self.axes.plot(xs, ys, color=self.colours[kind], linewidth=width, solid_joinstyle="round")


def mechanism(method: str, theme: str) -> str:
    """The SVG of a method's picture, the same for the same code."""
    import matplotlib
    from matplotlib.figure import Figure

    draw, height, _ = PICTURES[method]
    settings = {"svg.hashsalt": "sparsetrain", "svg.fonttype": "none", "font.family": "sans-serif"}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(INCHES, INCHES * height / 100))
        figure.patch.set_alpha(0)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_xlim(0, 100)
        axes.set_ylim(0, height)
        axes.set_axis_off()
        draw(Drawing(axes, COLOURS[theme]))
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def shown(method: str) -> list[str]:
    """What stands on a method's page between its marks."""
    at = f"../../../../docs/pictures/{method}"
    return [
        "<picture>",
        f'  <source media="(prefers-color-scheme: dark)" srcset="{at}-dark.svg">',
        f'  <img src="{at}-light.svg" alt="{PICTURES[method][2]}">',
        "</picture>",
    ]


def _random(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(4))


def _where(mask: Tensor, yes: str = "on", no: str = "off") -> list[list[str]]:
    return [[yes if kept else no for kept in row] for row in mask.tolist()]


def _token_selection(d: Drawing) -> None:
    layers, tokens, size = 5, 14, 3.1
    kept = torch.zeros(tokens, dtype=torch.bool)
    kept[[2, 5, 6, 11]] = True
    all_on = torch.ones(layers, tokens, dtype=torch.bool)
    for x, mask, kind, said in ((3, all_on, "on", "forward"), (54, kept.expand(layers, -1), "new", "backward")):
        d.cells(x, 31, size, _where(mask, kind))
        d.text(x + tokens * size / 2, 35.5, said)
    d.text(24.7, 11, "every token, exactly")
    d.text(75.7, 11, "selected tokens alone")
    d.text(50, 4, "a column a token, a row a layer; coloured: computed", "soft", 9)


def _pq_attention(d: Drawing) -> None:
    tokens, parts, kept = 12, 3, 4
    codes = (_random(2, tokens, parts) * 3).long()
    same = (codes[0][:, None] == codes[1][None]).sum(-1).double() - 1e-3 * torch.arange(tokens).double()
    causal = torch.ones(tokens, tokens).tril().bool()
    best = same.masked_fill(~causal, -9).topk(kept, dim=1).indices
    chosen = torch.zeros(tokens, tokens, dtype=torch.bool).scatter(1, best, True) & causal
    names = ("off", "on", "new")
    for x, code, said in ((4, codes[0], "queries"), (24, codes[1], "keys")):
        d.cells(x, 44, 3.1, [[names[c] for c in row] for row in code.tolist()])
        d.text(x + 4.6, 48, said)
    d.arrow((39, 25.4), (52, 25.4))
    d.text(45.5, 29.5, "codes that", "soft", 9)
    d.text(45.5, 21.3, "agree", "soft", 9)
    d.cells(57, 44, 3.1, _where(chosen))
    d.text(75.6, 48, "attention")
    d.text(50, 3, f"each token is {parts} codes; a query reads the {kept} keys that share most of its own", "soft", 9)


def _flood_fill(d: Drawing) -> None:
    from sparsetrain.ops.flood_fill import flood_fill

    n = 14
    i = torch.arange(n)
    near = torch.exp(-(i[:, None] - i[None]).abs() / 1.2)
    scores = near + 0.8 * torch.exp(-(i[None] - 3.0).abs() / 0.6) + 0.25 * _random(n, n)
    scores = (scores * torch.ones(n, n).tril()).float()
    kept = flood_fill(scores, 0.55, causal=True).bool() | torch.eye(n, dtype=torch.bool)  # the method keeps it
    d.cells(5, 44, 2.75, _where(torch.ones(n, n).tril().bool()), scores / scores.max())
    d.arrow((46, 25), (55, 25))
    d.cells(58, 44, 2.75, _where(kept, "new"))
    d.text(24, 48, "mean attention, seen once")
    d.text(77, 48, "blocks that stay")
    d.text(50, 2.5, "filled from cell to cell along what is strong; the rest is no longer computed", "soft", 9)


def _routed_ffn(d: Drawing) -> None:
    tokens, blocks, units = 9, 4, 4
    chosen = _random(tokens, blocks).argmax(1)
    d.cells(16, 38, 3.2, [["on"] * 6] * tokens)
    for block in range(blocks):
        mask = (chosen == block)[:, None].expand(-1, units)
        d.cells(37.5 + 14.6 * block, 38, 3.2, _where(mask, "new"))
        d.text(43.7 + 14.6 * block, 41.3, f"block {block + 1}", size=9)
    d.text(25.3, 41.3, "always on", size=9)
    for token in range(tokens):
        d.text(14, 36.6 - 3.2 * token, f"token {token + 1}", "soft", 8, ha="right")
    d.text(50, 3.5, "hidden units of one FFN; each token's router chooses its block", "soft", 9)


def _monarch(d: Drawing) -> None:
    n, block = 12, 3
    i = torch.arange(n)
    diagonal = i[:, None] // block == i[None] // block
    permuted = i[None] == (i % (n // block) * block + i // (n // block))[:, None]
    parts = ((2, torch.ones(n, n).bool(), "soft", "W"), (29, diagonal, "on", "L"), (53, permuted, "ink", "P"))
    for x, mask, kind, name in (*parts, (77, diagonal, "new", "R")):
        d.cells(x, 28, 1.75, _where(mask, kind), torch.full((n, n), 0.3 if name == "W" else 1.0))
        d.text(x + 10.5, 31.5, name, size=11)
    for x, sign in ((26, "≈"), (51.5, "·"), (75.5, "·")):
        d.text(x, 17.5, sign, size=13)
    d.text(50, 3, f"{n * n} numbers; {2 * n * block} in two block-diagonal factors, P moves entries", "soft", 9)


def _pst(d: Drawing) -> None:
    n, size = 8, 2.5
    score = _random(n, n)
    kept = score > score.flatten().kthvalue(n * n // 2).values
    d.cells(2, 30, size, [["soft"] * n] * n, torch.full((n, n), 0.3))
    d.text(12, 33.5, "W, frozen", size=9.5)
    d.text(24, 20, "+", size=12)
    d.cells(27, 30, size, [["new"] * 2] * n)
    d.cells(33.5, 22.5, size, [["new"] * n] * 2)
    d.text(41, 33.5, "trained factors", size=9.5)
    d.text(57, 20, "⊙", size=12)
    d.cells(60, 30, size, _where(kept))
    d.text(70, 33.5, "mask", size=9.5)
    d.arrow((88, 21), (81.5, 21))
    d.text(91, 30, "score:", size=8.5)
    d.text(91, 26.5, "|W| + its", "soft", 9)
    d.text(91, 23.5, "own factors", "soft", 8)
    d.text(50, 3.5, "what is trained is a few columns and rows; what leaves is a pruned dense weight", "soft", 9)


def _sara(d: Drawing) -> None:
    rows, columns, size = 9, 14, 3.2
    w = _random(rows, columns)
    least = w <= w.flatten().kthvalue(12).values
    d.cells(4, 36, size, _where(least, "new", "on"), torch.where(least, torch.ones_like(w), 0.75 * w))
    d.text(4 + columns * size / 2, 39.5, "a pretrained weight, by magnitude")
    d.arrow((52, 21.6), (61, 21.6))
    d.text(56.5, 25, "smallest", "soft", 9)
    d.cells(64, 23.2, 2.75, [["new"] * 12])
    d.text(80, 28.5, "one vector is trained")
    d.text(80, 16.5, "gradients and optimizer", "soft", 9)
    d.text(80, 12.8, "state are of its length", "soft", 9)
    d.text(50, 3, "all other entries stay as they are; the file in the end is a plain dense model", "soft", 9)


def _semi_structured(d: Drawing) -> None:
    rows, columns, size = 6, 12, 3.1
    w = _random(rows, columns)
    groups = w.view(rows, columns // 4, 4)
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter(2, groups.topk(2).indices, True).view(rows, columns)
    for x, kinds in ((5, [["on"] * columns] * rows), (58, _where(mask))):
        for group in range(columns // 4):
            part = slice(4 * group, 4 * group + 4)
            d.cells(x + group * (4 * size + 0.9), 30, size, [row[part] for row in kinds], w[:, part])
    d.arrow((46.5, 20.7), (55.5, 20.7))
    d.text(24.5, 33.5, "master weights, dense")
    d.text(77.5, 33.5, "what multiplies")
    d.text(51, 24, "2 of 4", "soft", 9)
    d.text(50, 4, "chosen anew as the master weights move; the gradient reaches all of them", "soft", 9)


def _sparsedm(d: Drawing) -> None:
    w = _random(4, 8)
    groups = w.view(4, 2, 4)
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter(2, groups.topk(2).indices, True).view(4, 8)
    noisy = _random(6, 6)
    d.cells(3, 33, 2.7, [["on"] * 6] * 6, noisy)
    d.text(11, 36.5, "noisy picture", size=9)
    for y, kinds, said in ((40, [["on"] * 8] * 4, "teacher, dense"), (21, _where(mask, "new"), "student, 2 of 4")):
        d.arrow((21, 25), (33, y - 5))
        d.cells(36, y, 2.6, kinds, w)
        d.text(46.3, y + 3, said, size=9)
        d.arrow((58.5, y - 5), (68, y - 5))
        d.text(76.5, y - 5, "its noise", size=9)
    d.arrow((76.5, 32.5), (76.5, 18.5))
    d.text(79, 26, "beside each other", "soft", 8, ha="left")
    d.text(50, 4, "the student is told the real noise and the teacher's; masks can come off again", "soft", 9)


def _multi_level(d: Drawing) -> None:
    d.arrow((7, 8), (97, 8))
    d.arrow((7, 8), (7, 42))
    d.text(93, 4.3, "steps", "soft", 9)
    d.text(9, 40, "size of the model", "soft", 9, ha="left")
    d.line([10, 22], [33, 33], "on", 5)
    d.line([28, 56], [16, 16], "new", 5)
    d.line([62, 95], [33, 33], "on", 5)
    d.arrow((22.5, 31.5), (27.5, 18))
    d.arrow((56.5, 18), (61.5, 31.5))
    d.text(28, 25.5, "merged", size=9, ha="left")
    d.text(56.5, 25.5, "expanded", size=9, ha="right")
    d.text(42, 12, "cheap steps")
    d.text(78, 37, "mixed with its own start")
    d.text(16, 29.5, "a little", "soft", 9)


def _masked_growth(d: Drawing) -> None:
    from matplotlib.patches import Polygon

    d.arrow((7, 8), (97, 8))
    d.arrow((7, 8), (7, 44))
    d.text(93, 4.3, "steps", "soft", 9)
    d.text(9, 43, "width and layers", "soft", 9, ha="left")
    for x, width, height in ((8, 26, 9), (34, 30, 18), (64, 31, 29)):
        d.box(x, 8.5, width, height, "on", 0.4)
    for x, low, high in ((34, 17.5, 26.5), (64, 26.5, 37.5)):
        ramp = [(x, low), (x + 11, high), (x, high)]
        d.axes.add_patch(Polygon(ramp, color=d.colours["new"], linewidth=0))
    d.arrow((33, 34.5), (37, 25.5), "ink")
    d.text(32, 37, "new units, behind a mask", size=9)
    d.text(20, 12.8, "small", size=9)
    d.text(79, 21, "the model in the end", size=9)
    d.text(46, 2, "the mask opens from 0 to 1, so that the loss has no jump", "soft", 9)


def _concept_bottleneck(d: Drawing) -> None:
    names = ("dull", "witty", "long", "moving", "well acted", "noisy")
    values, weights = (0.9, 0.0, 0.55, 0.0, 0.3, 0.0), (-1.0, 0.8, -0.4, 0.7, 0.9, -0.5)
    d.box(2, 13, 15, 22, "off")
    d.text(9.5, 26, "encoder", size=9)
    d.text(9.5, 21.5, "frozen", "soft", 9)
    d.arrow((18, 24), (24, 24))
    for i, (name, value, weight) in enumerate(zip(names, values, weights, strict=True)):
        y = 36 - 5 * i
        d.text(42, y, name, "ink" if value else "soft", 9, ha="right")
        d.box(44, y - 1.5, max(0.6, 16 * value), 3, "on" if value else "off")
        share = 11 * value * weight
        d.box(min(80, 80 + share), y - 1.5, max(0.4, abs(share)), 3, "new" if value else "off")
    d.text(50, 42, "which concepts", size=9.5)
    d.text(80, 42, "what each adds", size=9.5)
    d.line([80, 80], [8.5, 39], "soft", 1)
    d.text(73, 6.5, "against", "soft", 9)
    d.text(84, 6.5, "for", "soft", 9)
    d.text(36, 3, "few are on; the decision is their sum", "soft", 9)


PICTURES: dict[str, tuple[Callable[[Drawing], None], float, str]] = {
    "token_selection": (_token_selection, 40, "All tokens run forward; a few selected columns of tokens run backward"),
    "pq_attention": (_pq_attention, 52, "Codes of queries and keys, and the few keys that each query attends to"),
    "flood_fill_attention": (_flood_fill, 52, "A mean attention map, and the blocks that flood fill keeps of it"),
    "routed_ffn": (_routed_ffn, 45, "Tokens by hidden units: some always on, and one block of four for each token"),
    "monarch": (_monarch, 36, "A dense weight beside two block-diagonal factors and a permutation"),
    "pst": (_pst, 38, "A frozen weight plus trained factors, under a mask that follows from a score"),
    "sara": (_sara, 44, "The smallest entries of a weight, gathered into one vector that is trained"),
    "semi_structured": (_semi_structured, 38, "Dense master weights, and the two of every four that multiply"),
    "sparsedm": (_sparsedm, 48, "A dense teacher and a student of two weights in four predict the same noise"),
    "multi_level": (_multi_level, 45, "A large model is merged into a small one, trained, and expanded again"),
    "masked_growth": (_masked_growth, 48, "A model that grows in steps, its new units behind a mask that opens"),
    "concept_bottleneck": (_concept_bottleneck, 46, "Named concepts that an encoder's output turns on, and their sum"),
}
"""Method -> (drawing, height in units, what it shows in words)."""
