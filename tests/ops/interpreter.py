"""Triton kernels without a GPU (tests/conftest.py turns the interpreter on)."""

import pytest
import torch


@pytest.fixture
def interpreted() -> None:
    """Skip where kernels cannot be interpreted."""
    # earlier interpreters cannot loop to a loaded bound with numpy 2.4
    pytest.importorskip("triton", minversion="3.8", reason="kernels are interpreted by Triton 3.8 or later")
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: the tests marked `gpu` run these kernels on it")
