"""The width and depth operators: against their matrices, and that each undoes the other."""

from __future__ import annotations

import pytest
import torch

from sparsetrain.ops.unit_groups import MERGES, WAYS, map_units, read_groups
from sparsetrain.ops.unit_groups.cases import REAL, TINY, TOLERANCE, Case
from sparsetrain.ops.unit_groups.reference import merging_matrix, row_normalised

cases = pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)


def mapped(case: Case, how: str, x: torch.Tensor, backend: str = "auto") -> torch.Tensor:
    return map_units(x, case.groups, how, dim=case.dim, unit=case.unit, backend=backend)  # type: ignore[arg-type]


@cases
@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gathering_is_the_product_with_the_matrix(case: Case, how: str, dtype: torch.dtype) -> None:
    x = case.tensor(how not in MERGES, dtype)
    found, expected = mapped(case, how, x, "torch"), mapped(case, how, x, "reference")
    assert found.shape == expected.shape and found.is_contiguous()
    assert (found - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


@cases
@pytest.mark.parametrize(("up", "down"), [("copy", "mean"), ("split", "sum")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merging_undoes_spreading(case: Case, up: str, down: str, dtype: torch.dtype) -> None:
    x = case.tensor(True, dtype)
    back = mapped(case, down, mapped(case, up, x))
    if all(len(group) in (1, 2, 4) for group in case.groups):
        assert torch.equal(back, x)  # 0.0
    else:
        assert (back - x).abs().max() <= 2 * TOLERANCE[dtype] * x.abs().max()


@cases
def test_gradients(case: Case) -> None:
    for how in WAYS:
        x = case.tensor(how not in MERGES, torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(lambda x, how=how: mapped(case, how, x), x)


@cases
def test_a_row_of_a_has_a_single_one(case: Case) -> None:
    a_st = row_normalised(merging_matrix(case.groups).T)
    assert torch.equal(a_st.sort(1).values[:, :-1], torch.zeros(a_st.shape[0], a_st.shape[1] - 1).double())
    assert torch.equal(a_st.amax(1), torch.ones(len(a_st)).double())
    assert torch.allclose(row_normalised(a_st.T), merging_matrix(case.groups), rtol=0, atol=1e-15)


@pytest.mark.parametrize("case", REAL, ids=lambda case: case.name)
def test_real_sizes(case: Case) -> None:
    w = case.tensor(False)
    assert mapped(case, "mean", w).shape == (w.shape[0] // 2, w.shape[1])


def test_schemes() -> None:
    assert read_groups("far", 6, 2, "heads") == ((0, 3), (1, 4), (2, 5))
    assert read_groups("adjacent", 6, 3, "heads") == ((0, 1, 2), (3, 4, 5))
    assert read_groups("0+2|1", 3, 2, "heads") == ((0, 2), (1,))
    with pytest.raises(ValueError, match=r"heads: 5 cannot be merged 2 to one. Take 1, 5"):
        read_groups("far", 5, 2, "heads")
    with pytest.raises(ValueError, match=r"layers: groups '0\+1\|1\+2' hold units .* Every one of the 3 units"):
        read_groups("0+1|1+2", 3, 2, "layers")
    with pytest.raises(ValueError, match=r"Every one of the 4 units"):
        read_groups("0+1|2", 4, 2, "layers")
    with pytest.raises(ValueError, match=r"layers: 'near' is no scheme. Write far"):
        read_groups("near", 4, 2, "layers")


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dimension 0 of \(7,\) is no whole number of copies of 2 units of 2"):
        map_units(torch.zeros(7), ((0,), (1,)), "copy", unit=2)
    with pytest.raises(ValueError, match=r"how='median' is unknown"):
        map_units(torch.zeros(4), ((0,), (1,)), "median", unit=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="in exactly one group"):
        map_units(torch.zeros(4), ((0, 0), ()), "sum", unit=2)
