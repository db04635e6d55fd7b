"""Weighted ridge regression, plain and of reduced rank. Legend: n tokens, p predictors, o outputs, r rank."""

from __future__ import annotations

import torch
from torch import Tensor


class Ridge:
    """minimise sum_n w_n |y_n - x_n B|^2 + penalty * sum_p D_p |B_p|^2,  D = the diagonal of X^T W X.

    The Cholesky factor of the [p, p] Gram matrix is kept, so further targets cost two products.
    """

    def __init__(self, x_np: Tensor, weight_n: Tensor, penalty: float = 1e-2) -> None:
        self.root_n1 = weight_n.sqrt()[:, None]
        self.x_np = x_np * self.root_n1
        gram_pp = self.x_np.T @ self.x_np
        diagonal_p = gram_pp.diagonal().clone()
        # a predictor that is always 0 (an idle block) would make the matrix singular
        gram_pp.diagonal().add_(penalty * diagonal_p + 1e-5 * diagonal_p.mean().clamp_min(1e-30))
        self.factor_pp = torch.linalg.cholesky(gram_pp)

    def fit(self, y_no: Tensor) -> Tensor:
        """B [p, o]."""
        return torch.cholesky_solve(self.x_np.T @ (y_no * self.root_n1), self.factor_pp)

    def leading(self, slope_po: Tensor, rows: slice, rank: int) -> tuple[Tensor, Tensor]:
        """(A [r, p'], B [o, r]): slope[rows]^T ~ B A, on the r output directions it fills most.

        Equals: reduced-rank regression, the leading singular vectors of the fitted values.
        """
        part_po = slope_po[rows]
        fitted_no = self.x_np[:, rows] @ part_po
        basis_or = torch.linalg.eigh(fitted_no.T @ fitted_no).eigenvectors[:, -rank:]
        return (part_po @ basis_or).T.contiguous(), basis_or.contiguous()


def with_constant(x_nd: Tensor) -> Tensor:
    """[x, 1]."""
    return torch.cat([x_nd, x_nd.new_ones(len(x_nd), 1)], dim=1)
