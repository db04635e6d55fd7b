"""The concept bottleneck: its list of concepts, what trains, real zeros, explanations, runs, and bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sparsetrain
from sparsetrain import ConceptBottleneck
from sparsetrain.methods.concept_bottleneck.config import read_concepts
from sparsetrain.methods.concept_bottleneck.embedding import start
from sparsetrain.methods.concept_bottleneck.explain import explain
from sparsetrain.methods.concept_bottleneck.module import Concepts, pooled
from sparsetrain.ops.concept_bottleneck.cases import TINY
from tests.families import FAMILIES

NAMES = ("good", "bad", "long", "short", "green")


def convert(family: str = "bert", **options: Any) -> tuple[Any, Any, dict[str, Tensor]]:
    case = FAMILIES[family]
    model = case.model()
    config = ConceptBottleneck(**{"concepts": NAMES, **options})
    handle = sparsetrain.sparsify(model, config, calibration=[case.batch(8, 20, seed=5)])
    return model, handle, case.batch(4, 30)


def site_of(handle: Any) -> Concepts:
    (site,) = handle.sites("concept_bottleneck").values()
    return site


def write(folder: Path, text: str) -> str:
    path = folder / "concepts.txt"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_file_becomes_its_list(tmp_path: Path) -> None:
    path = write(tmp_path, "# of films\n\n  witty dialogue \nthin, weak plot\n")
    found = ConceptBottleneck(concepts=path)  # type: ignore[arg-type]
    assert found.concepts == read_concepts(path) == ("witty dialogue", "thin, weak plot")
    assert ConceptBottleneck.from_dict(found.to_dict()) == found
    assert ConceptBottleneck.from_dict({"concepts": [path]}) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "holds no concept"), ("# only\n\n", "holds no concept"), ("a\nb\nA \n", r"twice \(lines 1 and 3\)")],
)
def test_a_file_that_is_empty_or_has_a_concept_twice_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConceptBottleneck(concepts=(write(tmp_path, text),))


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        ConceptBottleneck(concepts=(str(tmp_path / "none.txt"),))
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00x")
    with pytest.raises(ValueError, match="not UTF-8"):
        ConceptBottleneck(concepts=(str(tmp_path / "binary.txt"),))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"concepts": ("a", " A")}, "twice"),
        ({"concepts": ("a", " ")}, "blank"),
        ({"concepts": NAMES, "classes": ("x", "x")}, "twice"),
        ({"concepts": NAMES, "loss": "l2"}, "loss"),
        ({"concepts": NAMES, "ce_to_cbl": False}, "learn nothing"),
        ({"concepts": NAMES, "temperature": 0.0}, "temperature"),
        ({"concepts": NAMES, "scale": -1.0}, "scale"),
    ],
)
def test_bad_values_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConceptBottleneck(**options)


def test_a_model_without_a_head_for_labels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has none\. Load an encoder"):
        sparsetrain.plan(FAMILIES["llama"].model(), ConceptBottleneck(concepts=NAMES))
    with pytest.raises(ValueError, match="3 classes are described, and classifier has 2"):
        convert(classes=("x", "y", "z"))
    with pytest.raises(ValueError, match="0 rows for 5 concepts"):
        sparsetrain.sparsify(FAMILIES["bert"].model(), ConceptBottleneck(concepts=NAMES))


def test_texts_are_read_in_their_order_and_rows_give_the_center() -> None:
    case = FAMILIES["bert"]
    model, asked = case.model(), list[str]()

    def read(texts: Any) -> dict[str, Tensor]:
        asked.extend(texts)
        return case.batch(len(texts), 12, seed=9)

    rows = case.batch(6, 20, seed=5)
    with torch.no_grad():
        texts = F.normalize(pooled(model.bert(**case.batch(7, 12, seed=9)).last_hidden_state, None), dim=-1)
        states = F.normalize(pooled(model.bert(**rows).last_hidden_state, None), dim=-1)
    config = ConceptBottleneck(concepts=NAMES, classes=("x", "y"))
    handle = sparsetrain.sparsify(model, config, calibration=[rows], read=read)
    assert asked == [*NAMES, "x", "y"]
    site = site_of(handle)
    torch.testing.assert_close(site.vectors, texts[:5])
    torch.testing.assert_close(site.profiles, texts[5:] @ texts[:5].t())
    torch.testing.assert_close(site.center, 20 * (states @ texts[:5].t()).mean(0))
    assert site.scores(states).mean(0).abs().max() < 1e-4


def test_padding_does_not_move_the_mean() -> None:
    states = torch.randn(2, 5, 3)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    torch.testing.assert_close(pooled(states, mask)[0], states[0, :3].mean(0))
    assert pooled(states, torch.zeros(2, 5)).isfinite().all()


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_contributions_sum_to_the_logit(family: str) -> None:
    model, handle, batch = convert(family)
    site_of(handle).layers.bottleneck.data.add_(torch.randn(5, 5))
    with torch.no_grad():
        logits = model(**batch).logits
    found = explain(handle, model, batch, ["a", "b", "c", "d"], ["no", "yes"])
    for row, each in enumerate(found):
        sums = torch.tensor(each.contributions).sum(1)
        torch.testing.assert_close(sums, logits[row], rtol=1e-5, atol=1e-5)
        assert each.decided == int(logits[row].argmax()) and each.concepts == NAMES
        assert sum(value for _, value in each.leads()) == pytest.approx(each.lead, abs=1e-9)
        shown = each.to_dict(top=2)
        assert sum(c["lead"] for c in shown["concepts"]) + shown["rest"] == pytest.approx(each.lead, abs=1e-9)


@pytest.mark.parametrize("cut", [False, True])
def test_the_class_gradient_reaches_the_bottleneck_only_if_asked(cut: bool) -> None:
    model, handle, batch = convert(loss="gumbel", ce_to_cbl=not cut, weight=0.0)
    model.train()(**batch, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    layers = site_of(handle).layers
    assert bool(layers.bottleneck.grad.any()) != cut
    assert layers.head.grad.any()


@pytest.mark.parametrize("classes", [(), ("a bad one", "a good one")])
@pytest.mark.parametrize("loss", ["contrastive", "gumbel"])
def test_the_losses_are_attached_with_their_weight_and_in_training_alone(loss: str, classes: tuple[str, ...]) -> None:
    labels = torch.tensor([0, 1, 0, 1])
    grads = {}
    for weight in (0.0, 1.0, 2.0):
        model, handle, batch = convert(loss=loss, weight=weight, classes=classes)
        model.train()(**batch, labels=labels).loss.backward()
        grads[weight] = site_of(handle).layers.bottleneck.grad.clone()
    torch.testing.assert_close(grads[2.0] - grads[1.0], grads[1.0] - grads[0.0], rtol=1e-4, atol=1e-6)
    assert (grads[1.0] - grads[0.0]).abs().max() > 1e-4
    model, handle, batch = convert(loss=loss, classes=classes)
    expected = model.eval()(**batch).logits
    handle.step(7, 10)  # other noise, which evaluation has none of
    assert torch.equal(model(**batch).logits, expected)


def test_noise_is_of_the_step() -> None:
    def loss_at(step: int) -> Tensor:
        _, handle, _ = convert(loss="gumbel")
        site = site_of(handle)
        site.set_step(step, 10)
        psi = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
        return site.pairing_loss(psi, psi, None)

    assert loss_at(3) == loss_at(3) != loss_at(4)


def test_a_batch_of_one_row_is_told() -> None:
    model, _, batch = convert(loss="contrastive")
    one = {name: value[:1] for name, value in batch.items()}
    with pytest.raises(ValueError, match="Raise batch_size"):
        model.train()(**one, labels=torch.tensor([0]))
    model.eval()(**one)


def test_prox_makes_real_zeros_by_the_learning_rate_and_must_be_told_it() -> None:
    _, handle, _ = convert(loss="l1", l1=0.5)
    weight = site_of(handle).layers.bottleneck
    weight.data.copy_(torch.linspace(-1, 1, 25).view(5, 5))
    before = weight.detach().clone()
    handle.updated(0.2)
    torch.testing.assert_close(weight.detach(), before.sign() * (before.abs() - 0.1).clamp(min=0))
    assert weight.eq(0).sum() == 3
    with pytest.raises(ValueError, match="learning_rate"):
        handle.updated()


def test_l1_keeps_the_probes_accuracy_with_most_weights_at_zero() -> None:
    case = TINY[0]
    rows, concepts, classes, labels = case.tensors()
    config = ConceptBottleneck(concepts=tuple(f"c{i}" for i in range(case.concepts)), loss="l1", center=False)
    torch.manual_seed(0)
    texts = torch.cat([concepts, classes[:0]])
    site: Any = Concepts(config, start(config, (case.classes, case.width), texts), reads_mean=False)
    probe = torch.nn.Linear(case.width, case.classes)
    for model, rate in ((site, 3e-3), (probe, 3e-2)):
        optimizer = torch.optim.Adam(model.parameters(), lr=rate)
        for _ in range(250):
            F.cross_entropy(model(rows[:300]), labels[:300]).backward()
            optimizer.step()
            optimizer.zero_grad()
            if model is site:
                site.learning_rate = rate
                site.updated()
    found, known = ((m(rows[300:]).argmax(1) == labels[300:]).float().mean().item() for m in (site, probe))
    assert known > 0.9 and found >= 0.95 * known
    stats = site.stats()
    assert stats["zero_weight_ratio"] >= 0.5
