"""How flood-fill attention meets a model: its edits, their costs, the rows it probes, and its schedule."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparsetrain.core.anatomy import Anatomy, AttentionSite, Undo, describe
from sparsetrain.core.cost import Cost, attention_cost, mean_visible_keys
from sparsetrain.methods.flood_fill_attention.config import FloodFillAttention
from sparsetrain.methods.flood_fill_attention.module import PROBE, FloodFillSparseAttention
from sparsetrain.methods.flood_fill_attention.pictures import pictures
from sparsetrain.methods.flood_fill_attention.schedule import AT_ONCE, SwitchSchedule, probe
from sparsetrain.surgery.attention import attention_claim, attention_names, install_attention, refuse_attention
from sparsetrain.surgery.edits import edits_at
from sparsetrain.surgery.method import QUANTISED, Edit, Method, RowFacts, State, register_method
from sparsetrain.surgery.site import Site


def edits(config: FloodFillAttention, anatomy: Anatomy, model: nn.Module) -> list[Edit]:
    """One edit for each attention the config takes.

    Raises:
        ValueError: attention dropout, or an adapter without a way into attention, so that it cannot be probed.
    """
    return edits_at(
        config,
        anatomy,
        anatomy.attentions,
        install,
        check=lambda site: refuse_attention("flood_fill_attention", site, anatomy),
        cost=lambda site, tokens: costs(config, site, tokens),
        claims=attention_claim,
        blank=lambda _site: blank(config),
        note=lambda _site: _note(config),
    )


def _note(config: FloodFillAttention) -> str:
    if config.is_dense:
        return "dense"
    kept = ", ".join(f"{name} {value:g}" for name, value in config.target.items())
    return f"{config.variant}, {kept}, {config.block_tokens}-token blocks; dense until the switch"


def costs(config: FloodFillAttention, site: AttentionSite, num_tokens: int) -> tuple[Cost, Cost]:
    """(dense, sparse) per token at a sequence length, after the switch, without the projections.

    Kept blocks are computed whole. With `quantile`, how many blocks a pattern keeps is known only when it is cut; the
    number here is that of `top_q` with its marks on the diagonal, and flood fill keeps fewer.
    """
    visible = mean_visible_keys(num_tokens, site.causal, site.window)
    shape = (site.num_heads, site.num_kv_heads, site.head_dim)
    dense = attention_cost(*shape, visible)
    if config.is_dense:
        return dense, dense
    blocks = -(-num_tokens // config.block_tokens)
    kept = max(blocks, int(config.target_ratio * _seen_blocks(config, site, blocks) + 1e-6))
    return dense, attention_cost(*shape, min(kept * config.block_tokens**2 / num_tokens, visible))


def _seen_blocks(config: FloodFillAttention, site: AttentionSite, blocks: int) -> int:
    """Blocks with a visible pair: a block `far` blocks away begins at (far - 1) * block_tokens + 1 tokens."""
    far = blocks - 1
    if site.window is not None:
        far = min(far, -(-(site.window - 1) // config.block_tokens))
    below = sum(blocks - distance for distance in range(1, far + 1))
    return blocks + below * (1 if site.causal else 2)


def install(
    model: nn.Module, tensors: dict[str, Tensor], config: FloodFillAttention, site: AttentionSite
) -> tuple[Undo, Site]:
    """Give the attention its place for a pattern, and let the model call our attention function."""
    sparse = FloodFillSparseAttention(config, site, tensors)
    return install_attention(model, site, sparse), sparse


def blank(config: FloodFillAttention) -> dict[str, Tensor]:
    """What a planner without data gets: one probe row, so the site is in its dense phase, where its memory peaks.

    Raises:
        ValueError: there is no dense phase; which blocks a pattern keeps follows from the data's attention maps.
    """
    if config.is_dense:
        return {}
    if config.max_dense_steps == 0:
        raise ValueError(
            "flood_fill_attention with max_dense_steps=0 cuts its pattern from the data at the conversion, so a plan "
            "without weights cannot know its blocks. Give it a dense phase, or time it: sparsetrain bench."
        )
    return {f"{PROBE}0.input_ids": torch.zeros(1, 1, dtype=torch.int64)}


def prepare(
    model: nn.Module, planned: list[Edit], batches: list[dict[str, Tensor]], progress: Callable[[str, float], None]
) -> State:
    """Keep the rows to probe; with `max_dense_steps=0`, probe them now and cut every pattern."""
    config = planned[0].config
    assert isinstance(config, FloodFillAttention)
    if config.is_dense:
        return {}
    rows = probe_rows(batches, config.probe_rows)
    if config.max_dense_steps != 0:
        kept = {f"{PROBE}{i}.{name}": value for i, batch in enumerate(rows) for name, value in batch.items()}
        return {planned[0].key: kept}
    if not rows:
        raise ValueError(
            "flood_fill_attention: max_dense_steps=0 cuts the patterns at the conversion, and there are no rows to "
            "look at. Pass calibration=[batches] to sparsify()."
        )
    maps = probe(model, config, [edit.site for edit in planned], rows, progress)
    state: State = {}
    sites = {block.attention.name: block.attention for block in describe(model).blocks if block.attention is not None}
    for edit in planned:
        site = FloodFillSparseAttention(config, sites[edit.site], {})
        site.observe(maps[edit.site])
        site.switch(0, AT_ONCE)
        state[edit.key] = site.tensors()
    return state


def probe_rows(batches: list[dict[str, Tensor]], num_rows: int) -> list[dict[str, Tensor]]:
    """The longest rows, one a batch, without labels: a pattern serves no sequence longer than it was cut from."""
    rows = []
    for batch in batches:
        tensors = {name: x for name, x in batch.items() if isinstance(x, Tensor) and x.ndim and name != "labels"}
        rows += [{name: x[i : i + 1].clone() for name, x in tensors.items()} for i in range(_num_rows(tensors))]
    return sorted(rows, key=_length, reverse=True)[:num_rows]


def _num_rows(tensors: dict[str, Tensor]) -> int:
    return min((len(x) for x in tensors.values()), default=0)


def _length(row: dict[str, Tensor]) -> int:
    """Tokens of a row that are not padding; of images, all rows are alike."""
    if "attention_mask" in row:
        return int((row["attention_mask"] != 0).sum())
    return row["input_ids"].shape[1] if "input_ids" in row else 0


def schedule(model: nn.Module, config: FloodFillAttention, modules: list[nn.Module]) -> SwitchSchedule:
    return SwitchSchedule(model, config, modules)  # type: ignore[arg-type]


def refuse(config: FloodFillAttention, facts: RowFacts) -> str | None:
    """A sequence longer than patterns will reach would fail late, in the evaluation."""
    if config.is_dense or config.extend != "error" or facts.lengths is None or facts.eval_lengths is None:
        return None
    probed, block = max(facts.lengths()), config.block_tokens
    longest = max(probed, max(facts.eval_lengths()))
    if -(-longest // block) <= -(-probed // block):
        return None
    return (
        f"patterns are cut from training rows of at most {probed} tokens, and another sequence has {longest}, which is "
        f"past their last block of {block}. Use more training rows, or set extend=diagonal"
    )


register_method(
    FloodFillAttention,
    Method(
        edits=edits,
        site_names=attention_names,
        prepare=prepare,
        schedule=schedule,
        refuse=refuse,
        reads_longest=lambda config: not config.is_dense,
        pictures=pictures,
        limits={
            **dict.fromkeys(QUANTISED, "it has not been tried on quantised models. Load the model in bf16 or fp32"),
            "cost": "in bidirectional models the counted FLOPs differ from the plan by more than 6 % of the dense part",
        },
    ),
)
