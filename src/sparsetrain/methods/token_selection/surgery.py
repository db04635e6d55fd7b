"""How token selection meets a model: its edits and their costs."""

from __future__ import annotations

from torch import nn

from sparsetrain.core.anatomy import Anatomy, Block, Undo, submodule
from sparsetrain.core.cost import Cost, attention_cost, ffn_cost, mean_visible_keys
from sparsetrain.methods.token_selection.config import TokenSelection
from sparsetrain.methods.token_selection.model import install_model
from sparsetrain.methods.token_selection.module import SelectedBlock, SelectsTokens
from sparsetrain.methods.token_selection.saved import measure
from sparsetrain.methods.token_selection.selector import Selector
from sparsetrain.surgery.method import Edit, Method, RowFacts, register_method
from sparsetrain.surgery.reclass import declass, reclass
from sparsetrain.surgery.site import Site


def edits(config: TokenSelection, anatomy: Anatomy, model: nn.Module) -> list[Edit]:
    """One edit for each block the config takes; all share one selection.

    Raises:
        ValueError: a block without attention (rows of a recurrence cannot be cut), attention dropout, or an adapter
            without a way into attention.
    """
    taken = [block for block in anatomy.blocks if config.takes(block.name, block.layer, len(anatomy.blocks))]
    for block in taken:
        _check(block, anatomy)
    causal, cuts_last = all(site.causal for site in anatomy.attentions), taken[-1:] == list(anatomy.blocks[-1:])
    selectors: list[Selector] = []  # made when the first edit is installed: a plan holds no state

    def shared(first: bool) -> Selector:
        if first:
            selectors[:] = [Selector(config, causal, keep_last=causal and anatomy.head is None)]
        return selectors[0]

    return [
        Edit(
            config=config,
            site=block.name,
            layer=block.layer,
            claims=frozenset({f"the gradient of {block.name}"}),
            cost=lambda tokens, block=block: costs(config, block, tokens),
            install=lambda m, _, block=block, first=i == 0: install(m, anatomy, block, shared(first), first, cuts_last),
            note=_note(config),
        )
        for i, block in enumerate(taken)
    ]


def _check(block: Block, anatomy: Anatomy) -> None:
    if block.attention is None:
        raise ValueError(
            f"token_selection cannot take {block.name}: it has no attention that the anatomy knows, and through a "
            "recurrence or convolution rows cannot be cut. Leave it out with `targets`."
        )
    if anatomy.install_attention is None:
        raise ValueError(
            f"token_selection cannot take {block.name}: the anatomy of {anatomy.model_class} has no way into attention."
        )
    if block.attention.dropout > 0:
        raise ValueError(
            f"token_selection cannot take {block.name}: attention dropout is {block.attention.dropout}, and the "
            "backward forms probabilities again without it. Load the model with attention dropout 0 "
            "(attention_dropout=0.0; BERT and ViT: attention_probs_dropout_prob=0.0; GPT-2: attn_pdrop=0.0)."
        )


def _note(config: TokenSelection) -> str:
    kept = f"{config.num_tokens} tokens" if config.num_tokens is not None else f"{config.keep_ratio:.3g} of the tokens"
    if not config.keep_all_targets:
        return f"gradient through {kept}, {config.policy} of {config.pool}"
    others = {"near": "the nearest before them", "attended": "what they attend to most"}
    return f"gradient through {kept}: every target, and {others.get(config.context, f'others, {config.policy}')}"


def costs(config: TokenSelection, block: Block, num_tokens: int) -> tuple[Cost, Cost]:
    """(dense, selected) per token. The forward is the dense one; saved: r of everything, and K and V of all rows."""
    site = block.attention
    assert site is not None
    width, kv_width = site.num_heads * site.head_dim, 2 * site.num_kv_heads * site.head_dim
    attention = attention_cost(
        site.num_heads, site.num_kv_heads, site.head_dim, mean_visible_keys(num_tokens, site.causal, site.window)
    )
    dense = attention
    if block.ffn is not None and block.ffn.refused is None:
        hidden = block.ffn.hidden_size
        ffn = ffn_cost(hidden, block.ffn.ffn_size, block.ffn.gate is not None)
        projections = 2.0 * hidden * (2 * width + kv_width)
        # besides attention's and the FFN's own: the two norms' inputs, the projections' input and the output's
        dense = dense + Cost(flops=ffn.flops + projections, saved_elements=ffn.saved_elements + 3 * hidden)
    r = config.ratio(num_tokens)
    others = kv_width + (site.num_heads * site.head_dim if config.train_keys else 0)
    own = dense.saved_elements
    if config.recompute and block.ffn is not None:  # the input and the output's gradient, beside keys and values
        own = kv_width + block.ffn.hidden_size
    saved = dense.saved_elements if r == 1 else r * own + (1 - r) * others
    return dense, Cost(flops=dense.flops, saved_elements=saved)


def install(
    model: nn.Module, anatomy: Anatomy, block: Block, selector: Selector, first: bool, cuts_last: bool
) -> tuple[Undo, Site]:
    """Give a block its new forward; with the first one, the model itself learns to select.

    Args:
        cuts_last: the model's last block is among those that are taken.
    """
    assert block.attention is not None and anatomy.install_attention is not None
    module = submodule(model, block.name)
    reclass(module, SelectsTokens)
    try:
        undo_model = install_model(model, anatomy, selector, cuts_last=cuts_last) if first else None
    except ValueError:
        declass(module)
        raise
    state = SelectedBlock(selector, block.attention.name.removeprefix(f"{block.name}."), rowwise(block))
    module.selected = state
    uninstall = anatomy.install_attention(model)

    def undo() -> None:
        uninstall()
        del module.selected
        if undo_model is not None:
            undo_model()
        declass(module)

    return undo, state


def rowwise(block: Block) -> tuple[str, ...]:
    """The parts of a block, by their names in it, that treat [b, t, d] row by row: norms, and the FFN."""
    assert block.attention is not None
    attention = f"{block.attention.name}."
    found = [name for name in block.norms if not name.startswith(attention)]
    if block.ffn is not None and block.ffn.refused is None and block.ffn.name != block.name:
        found.append(block.ffn.name)
    return tuple(name.removeprefix(f"{block.name}.") for name in found)


def refuse(config: TokenSelection, facts: RowFacts) -> str | None:
    """Why rows cannot be trained on: no tokens to choose among, no scores, no label a token, or none left out."""
    if not facts.one_sequence:
        return f"it trains on some tokens of a text, and task={facts.task} has none to choose among. Use it " + (
            "with task=lm or classify"
        )
    if config.pool == "scored":
        return (
            "pool='scored' takes the scores that come with each batch as token_scores, and rows read from data have "
            "none. Use pool=all or targets, or train from Python"
        )
    if facts.labelled and (config.needs_scores or config.pool == "targets"):
        return (
            f"pool={config.pool!r}, policy={config.policy!r} need a label a token, and task={facts.task} has one a "
            "text. Use pool=all with policy=random or prefix"
        )
    if config.num_tokens is not None and config.num_tokens > facts.seq_len:
        return (
            f"num_tokens={config.num_tokens} of rows with at most {facts.seq_len} tokens selects all of them. Lower "
            "num_tokens, or use keep_ratio"
        )
    return None


def site_names(anatomy: Anatomy) -> list[str]:
    return [block.name for block in anatomy.blocks if anatomy.install_attention is not None]


register_method(
    TokenSelection,
    Method(
        edits=edits,
        site_names=site_names,
        refuse=refuse,
        measure=measure,
    ),
)
