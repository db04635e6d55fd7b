"""explanation.html: which concepts decided, and how they add up, an input a section; one file, every text escaped."""

from __future__ import annotations

from collections.abc import Sequence

from sparsetrain.core.explanation import Explanation
from sparsetrain.measure.markup import (
    Bar,
    Bars,
    Bullets,
    Figure,
    Fold,
    Group,
    Picture,
    Piece,
    Quote,
    Section,
    Table,
    Text,
    document,
)

FOR, AGAINST = "sparse", "checkpointing"
"""The report's colours for what speaks for the decision and against it."""


def render_explanations(
    explanations: Sequence[Explanation], title: str, *, top: int = 10, pictures: Sequence[bytes | None] = ()
) -> str:
    """The whole page as text.

    Args:
        top: concepts that are drawn of each; the others are one bar.
        pictures: PNG bytes of each input, None where it is a text.
    """
    shown = [*pictures, *[None] * (len(explanations) - len(pictures))]
    parts = [_part(each, place, top, picture) for place, (each, picture) in enumerate(zip(explanations, shown), 1)]
    count = "an input" if len(explanations) == 1 else f"{len(explanations)} inputs"
    return document(title, f"sparsetrain explanation of {count}", [*parts, _how(explanations)])


def _part(each: Explanation, place: int, top: int, picture: bytes | None) -> Section:
    won, second = each.classes[each.decided], each.classes[each.runner_up]
    headline = f"{won}, {each.probabilities[each.decided]:.0%}. It leads {second} by {each.lead:.2f}."
    words = f"{each.counted()} of {len(each.concepts)} concepts add anything; {each.effective():.1f} carry it."
    found: list[Piece] = [Text(headline, "headline"), _input(each, picture), Text(words, "advice")]
    found.append(Bars(_bars(each, top), {FOR: f"speaks for {won}", AGAINST: f"speaks for {second}"}))
    found += [Text(f"{name}: {chosen}.", "note") for name, chosen in each.also.items()]
    found.append(Fold("All numbers", [_numbers(each)]))
    return Section(f"{place}. {won}", f"input-{place}", found)


def _input(each: Explanation, picture: bytes | None) -> Piece:
    if picture is None:
        return Group("sample", [Quote(each.subject, "prompt")])
    return Figure("", Picture(picture, kind="small"), each.subject)


def _bars(each: Explanation, top: int) -> list[Bar]:
    """What each concept adds to the lead, the rest, and their sum."""
    leads = [pair for pair in each.leads() if pair[1] != 0]
    rest = sum(value for _, value in leads[top:])
    found = [_bar(name, value) for name, value in leads[:top]]
    if leads[top:]:
        found.append(_bar(f"the other {len(leads) - top}, together", rest))
    return [*found, _bar("sum: the lead", each.lead)]


def _bar(name: str, value: float) -> Bar:
    return Bar(name, {FOR if value >= 0 else AGAINST: abs(value)}, f"{value:+.2f}")


def _numbers(each: Explanation) -> Table:
    head = ("Concept", "match", "activation", *(f"to {name}" for name in each.classes))
    order = {name: i for i, name in enumerate(each.concepts)}
    rows = []
    for name, _ in each.leads():
        i = order[name]
        values = (each.scores[i], each.activations[i], *(row[i] for row in each.contributions))
        rows.append([name, *(f"{value:.3f}" for value in values)])
    rows.append(["Sum: the logit", "", "", *(f"{logit:.3f}" for logit in each.logits)])
    return Table(head, rows, "numbers totals")


def _how(explanations: Sequence[Explanation]) -> Section:
    lines = [
        "A logit is the sum of what each concept contributes: the class's weight of the concept times the concept's "
        "activation. Bars show the winner's contributions less the runner-up's: what decided between the two.",
        "A match is the scaled cosine of the input with the concept's text, counted from its mean over training rows "
        "where the model was trained so. An activation is what the bottleneck makes of all matches, so it may draw on "
        "other concepts than the one that names it.",
        "A concept that weighs against its own words, or decides about an input that says nothing of it, is a reason "
        "to distrust the model. What is missing from the list cannot be shown.",
    ]
    return Section("How to read this", "how", [Bullets(lines)] if explanations else [])
