"""The page: bars that are as long as their numbers, curves that hide no point, one colour a meaning, both themes."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from typing import Any

from matplotlib.figure import Figure

from sparsetrain.measure.colours import COLOURS, css_name
from sparsetrain.measure.components import COMPONENTS
from sparsetrain.measure.markup import Bar, Bars, Group, Section, document
from sparsetrain.measure.page import render_page
from sparsetrain.measure.plots import FEW, Line, chart, draw_lines, loss_by_step
from sparsetrain.measure.report import build_report, render_text
from sparsetrain.measure.timing import ratio
from tests.measure.test_report import MIB, make_run

SAMPLE: Any = {"prompt": "<b>def</b> f():", "reference": "It's & true.", "completion": "\x1b[31m</pre><script>"}


def page(**changes: Any) -> str:
    return render_page(report(**changes))


def report(steps: int = 20, setup: float = 5.0, samples: bool = True) -> Any:
    runs = {"dense": make_run(1.0, 3.0, steps=steps), "sparse": make_run(0.5, 3.0, steps=steps, peak=675, setup=setup)}
    if samples:
        runs["dense"]["samples"], runs["sparse"]["samples"] = [SAMPLE, SAMPLE], [SAMPLE]
    beside: Any = {"time_ratio": 1.5, "num_pairs": 3, "peak_rss_bytes": 450 * MIB, "peak_gpu_bytes": None}
    beside |= {"dense_rss_bytes": 900 * MIB, "dense_gpu_bytes": None}
    timing = ratio([1.0] * 9, [0.5] * 9).to_dict()
    return build_report(title="t", runs=runs, timing=timing, checkpointing=beside)


class Tags(HTMLParser):
    """Raises where a tag is closed that is not the last one open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_every_tag_is_closed_and_nothing_is_loaded() -> None:
    tags = Tags()
    tags.feed(page())
    assert tags.open == [] and not {"script", "link", "img", "b_"} & set(tags.seen)


def test_the_first_screen_has_three_bars_beside_dense_and_checkpointing() -> None:
    first = page().split('<table class="judgements">')[0]
    found = re.findall(r'<h3 class="">([^<]+) <span class="won (\w+)">([^<]+)</span></h3>(.*?)<p ', first)
    assert [(title, who, words) for title, who, words, _ in found] == [
        ("Time of 20 steps", "sparse", "sparse wins"),
        ("Peak memory", "checkpointing", "dense + checkpointing wins"),
        ("Perplexity", "tie", "tie"),
    ]
    widths = [re.findall(r'<i class="([\w-]+)" style="width:([\d.]+)%">', drawn) for *_, drawn in found]
    # 20 s, 30 s, and 5 s of set-up with 10 s of steps
    time = [("dense", "66.67"), ("checkpointing", "100.00"), ("setup", "16.67"), ("sparse", "33.33")]
    assert widths[0] == time
    assert widths[1] == [("dense", "100.00"), ("checkpointing", "50.00"), ("sparse", "75.00")]
    assert [name for name, _ in widths[2]] == ["before", "dense", "sparse"]
    assert widths[2][1][1] == widths[2][2][1] == f"{100 * math.exp(3) / 54.6:.2f}"
    assert "set-up 5 s, the light part" in first and "no set-up" in page(setup=0.0)
    assert "peak memory (with checkpointing)" in first


def test_bars_of_nothing_are_no_error() -> None:
    drawn = document("t", "", [Section("s", "s", [Bars([]), Bars([Bar("a", {"dense": 0.0}, "0")]), Group("g", [])])])
    assert drawn.count('class="bar-row"') == 1 and 'style="width' not in drawn


def test_what_models_say_is_text_and_both_sides_are_shown() -> None:
    drawn = page()
    body = drawn.split('<section id="samples">')[1].split("</section>")[0]
    assert body.count('<div class="sample">') == 2  # one side had no time for the second
    assert body.count("dense says") == 2 and body.count("sparse says") == 1
    assert "&lt;b&gt;def&lt;/b&gt; f():" in body and "It&#39;s &amp; true." in body and "<script" not in drawn
    assert 'id="samples"' not in page(samples=False)
    lines = render_text(report())
    assert "  a held-out prompt: … <b>def</b> f():" in lines and "  the data say: It's & true." in lines
    assert "  sparse says: [31m</pre><script>" in lines  # no escape sequence reaches the terminal


def marks(drawn: str, line: str) -> list[float]:
    """Heights of the marks of a line of a chart."""
    group = drawn.split(f'<g id="{line}">')[1].split('<g id="')[0]
    return [float(y) for y in re.findall(r'<use [^>]*y="([-\d.]+)"', group)]


def test_few_points_are_marked_and_not_smoothed() -> None:
    few = {"dense": make_run(1.0, 3.0, steps=20)}
    few["dense"]["steps"][2]["loss"] = 9.0
    heights = marks(loss_by_step(few), "dense-faint")
    assert len(heights) == 20 and min(heights) == heights[2]  # the third loss stands out, as it was
    assert len(marks(loss_by_step(few), "dense")) == 3  # each evaluation
    many = loss_by_step({"dense": make_run(1.0, 3.0, steps=FEW)})
    assert marks(many, "dense-faint") == [] and len(marks(many, "dense")) == 4


def test_a_chart_has_its_gaps_its_limits_and_the_colours_of_the_page() -> None:
    drawn = chart([Line("sparse", [0, 5, 10], [1.0, math.nan, 3.0])], "x <", "y", from_zero="xy")
    assert "x &lt;" in drawn and "nan" not in drawn and len(marks(drawn, "sparse")) == 2
    assert "var(--sparse)" in drawn and "var(--soft)" in drawn and "#0b66c3" not in drawn
    assert chart([Line("dense", [1.0], [math.inf])], "x", "y") == ""
    axes = Figure().add_subplot()
    draw_lines(axes, [Line("dense", [0, 1, 2], [1.0, 50.0, 1.0])], "x", "y", from_zero="y", top=2.0)
    assert axes.get_ylim() == (0, 2)
    draw_lines(axes, [Line("dense", [1, 2], [1.0, 1.0])], "x", "y", top=9.0)
    assert axes.get_ylim()[1] < 9  # what is not reached is not shown


def style() -> str:
    return re.search("<style>(.*?)</style>", document("t", "", []), flags=re.S)[1]  # type: ignore[index]


def test_one_colour_has_one_meaning_on_both_grounds() -> None:
    for theme in (0, 1):
        shades = [pair[theme] for pair in COLOURS.values()]
        assert len(set(shades)) == len(shades)
    assert set(COMPONENTS) <= set(COLOURS)
    bright, dark = style().split("@media (prefers-color-scheme: dark)")
    for name, (light_shade, dark_shade) in COLOURS.items():
        variable = f"--{css_name(name)}: "
        assert variable + light_shade in bright and variable + dark_shade in dark
    used = set(re.findall(r"var\((--[\w-]+)\)", style()))
    assert used <= set(re.findall(r"(--[\w-]+):", style()))


def test_a_narrow_screen_needs_no_sideways_scroll() -> None:
    """No width is asked for that 390 pixels have not; what may be wider scrolls in its own box."""
    assert all(int(width) <= 300 for width in re.findall(r"(?<!max-)(?<!min-)\bwidth: (\d+)px", style()))
    least = re.findall(r"(?:minmax\(|min-width: )(.{12})", style())
    assert len(least) >= 3 and all(re.match(r"0|min\(\d+(px|em), 1", words) for words in least)
    drawn = page()
    assert drawn.count("<table") == len(re.findall(r'<div class="table"><table', drawn))
    assert all('viewBox="' in tag and " width=" not in tag for tag in re.findall(r"<svg [^>]*>", drawn))
