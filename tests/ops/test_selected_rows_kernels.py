"""The Triton kernels of attention on selected rows: through the interpreter here, compiled where there is a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import pytest
import torch

triton: Any = pytest.importorskip("triton", reason="triton is not installed: the kernels are not run")

from sparsetrain.ops.selected_rows import choice  # noqa: E402
from sparsetrain.ops.selected_rows.cases import FORMS, TINY, Case  # noqa: E402
from tests.ops.test_selected_rows_backends import EMPTY, SINGLE, WIDE, off, problem, run  # noqa: E402


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(
        _version(triton.__version__) < (3, 8) and _version(numpy.__version__) >= (2, 4),
        reason="the interpreter of triton before 3.8 cannot loop with numpy 2.4",
    ),
]
FEW = [case for case in TINY if case.name.endswith("h4_2_17_4")]
"""One of every form: grouped heads, samples with different numbers of rows."""
OTHERS = [case for case in TINY if case not in FEW]
LIMIT = {torch.float32: 5e-6, torch.float16: 4e-3}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles in a tiny case; and the interpreter, which patches the whole language at every call of one jitted
    function by another, does so once a kernel (a case takes one second instead of five)."""
    monkeypatch.setattr(choice.kernels(), "_tiles", lambda *_: (32, 32, 4, 1))
    from triton.runtime.interpreter import InterpretedFunction

    call = InterpretedFunction.__call__

    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = not self.fn.__module__.startswith("triton.")
        return self.rewrite()(*args, **kwargs) if own else call(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "__call__", called)


def check(case: Case, dtype: torch.dtype, known: bool, context: bool) -> None:
    """Output and every gradient, beside plain PyTorch in fp32; no error beyond rounding."""
    selected, e, rows = problem(case, dtype)
    found = run(selected, e, rows, "triton", known, context)
    exact = [x.detach().float().requires_grad_() for x in selected]
    wide = type(e)(e.k_bgsd.float(), e.v_bgsd.float(), e.causal, e.scale, e.segments_bs, e.window)
    assert off(found, run(exact, wide, rows, "torch", known, context)) < LIMIT[dtype]


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("case", [*FEW, EMPTY, SINGLE, WIDE], ids=lambda case: case.name)
def test_kernels_equal_plain_pytorch(case: Case, known: bool) -> None:
    check(case, torch.float32, known, context=False)


@pytest.mark.parametrize("case", [FEW[0], FEW[list(FORMS).index("packed_window")]], ids=lambda case: case.name)
def test_kernels_in_half_precision_and_with_gradient_to_every_key(case: Case) -> None:
    check(case, torch.float16, known=True, context=True)


@pytest.mark.slow  # the interpreter takes a second or more for each
@pytest.mark.parametrize("case", OTHERS, ids=lambda case: case.name)
def test_kernels_equal_plain_pytorch_in_every_case(case: Case) -> None:
    check(case, torch.float32, known=False, context=True)


def test_the_ops_keep_to_what_they_declare() -> None:
    """opcheck: schema, autograd, fake tensors, a trace with symbolic shapes. Takes some seconds: the interpreter runs
    thirty calls."""
    (q, _, _), e, rows = problem(Case(name="", heads=2, kv_heads=1, counts=(9, 0), tokens=19))
    index, counts = rows.on_device(0)
    who = index, counts, None, None, True, 0.4, 0
    given = q.detach(), e.k_bgsd, e.v_bgsd, *who
    kernels = choice.kernels()
    for values in (True, False):
        torch.library.opcheck(kernels.rows_forward, (*given, values))
    o, lse = kernels.rows_forward(*given, True)
    for everywhere in (True, False):
        backward = torch.randn_like(o), *given[:3], o, lse, *who, everywhere
        torch.library.opcheck(kernels.rows_backward, backward)


def test_kernels_are_launched_where_their_tensors_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device, which need not be that of the tensors."""
    kernels, inside, launched = choice.kernels(), [], []

    @contextmanager
    def device_of(x: torch.Tensor) -> Iterator[None]:
        inside.append(x.device)
        yield
        inside.pop()

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *_, **__: launched.append(list(inside))

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    names = ("_statistics_kernel", "_dq_kernel", "_dkv_kernel")
    for name in names:
        monkeypatch.setattr(kernels, name, Kernel())
    selected, e, rows = problem(SINGLE)
    run(selected, e, rows, "triton")
    assert launched == [[torch.device("cpu")]] * len(names)


def test_the_check_before_first_use_finds_the_kernels_right_and_a_fault_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes three seconds: it interprets a call with twenty tiles."""
    monkeypatch.setattr(choice.kernels(), "_tiles", lambda *_: (64, 64, 4, 1))
    form = (torch.device("cpu"), torch.float32, 16, True, False, True, False)
    assert choice.fails.__wrapped__(*form) is None
    true = choice.kernels().rows_backward
    monkeypatch.setattr(choice.kernels(), "rows_backward", lambda *a: tuple(1.1 * x for x in true(*a)))
    assert "off by" in str(choice.fails.__wrapped__(*form))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("packed", [False, True])
def test_kernels_on_a_gpu(dtype: torch.dtype, head_dim: int, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    form = (True, False, packed, False)
    assert choice.fails(torch.device("cuda", torch.cuda.current_device()), dtype, head_dim, *form) is None
