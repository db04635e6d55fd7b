"""Choosing blocks, grouping pairs, and the balance loss."""

import pytest
import torch

from sparsetrain.ops.routing import balance_loss, block_loads, choose_blocks, group_by_block, load_stats


def test_ties_go_to_the_lowest_block_and_choices_are_sorted() -> None:
    logits = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 3.0, 3.0, 3.0], [2.0, 0.0, 1.0, 2.0]])
    assert choose_blocks(logits, 2).tolist() == [[0, 1], [1, 2], [0, 3]]
    assert choose_blocks(logits, 4).tolist() == [[0, 1, 2, 3]] * 3
    for wrong in (0, 5):
        with pytest.raises(ValueError, match="num_active"):
            choose_blocks(logits, wrong)


@pytest.mark.parametrize("num_blocks", [5, 300])
@pytest.mark.parametrize("padded", [False, True])
def test_grouping_matches_a_scalar_loop(num_blocks: int, padded: bool) -> None:
    torch.manual_seed(0)
    choice = choose_blocks(torch.randn(13, num_blocks), 3)
    valid = torch.rand(13) > 0.4 if padded else None
    groups = group_by_block(choice, num_blocks, valid)
    expected = [
        [t * 3 + s for t in range(13) for s in range(3) if choice[t, s] == g and (valid is None or valid[t])]
        for g in range(num_blocks)
    ]
    for g, pairs in enumerate(expected):
        assert groups.order_p[groups.offsets[g] : groups.offsets[g + 1]].tolist() == pairs
    assert groups.offsets[-1] == 3 * (13 if valid is None else int(valid.sum()))
    assert torch.equal(groups.order_p[groups.inverse_tk.reshape(-1)], torch.arange(39))
    assert torch.equal(groups.token_p, groups.order_p // 3)
    assert torch.equal(groups.offsets.diff(), block_loads(choice, num_blocks, valid))


def test_balance_loss_at_both_ends() -> None:
    logits = torch.zeros(8, 4, dtype=torch.float64)
    uniform = torch.arange(8)[:, None] % 4
    assert balance_loss(logits, uniform).item() == pytest.approx(1.0)
    logits = torch.full((8, 4), -400.0)
    logits[:, 2] = 400.0
    collapsed = torch.full((8, 1), 2)
    assert balance_loss(logits, collapsed).item() == pytest.approx(4.0)
    stats = load_stats(collapsed, 4)
    assert stats["load_entropy"].item() == 0 and stats["load_max_over_mean"].item() == 4
    stats = load_stats(uniform, 4)
    assert stats["load_entropy"].item() == pytest.approx(1) and stats["load_max_over_mean"].item() == 1


def test_balance_loss_ignores_padding_and_has_a_true_gradient() -> None:
    torch.manual_seed(0)
    logits = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    choice, valid = choose_blocks(logits, 2), torch.arange(9) < 6
    alone = balance_loss(logits[:6], choice[:6])
    torch.testing.assert_close(balance_loss(logits, choice, valid), alone)
    assert torch.autograd.gradcheck(lambda x: balance_loss(x, choice, valid), logits)
    assert balance_loss(logits, choice, torch.zeros(9, dtype=torch.bool)).item() == 0
