"""Which form of each operation runs on a device, and why no better one does; in a line each."""

from __future__ import annotations


def backends(device: str) -> dict[str, str]:
    """Operation -> what runs an ordinary call of it, before anything is timed, and why what would come first cannot."""
    import torch

    from sparsetrain.core.backend import no_triton
    from sparsetrain.ops import block_sparse_attention, mvue24, nm_mask, routed_ffn
    from sparsetrain.ops.sparse24_linear.packing import kernel_refusal

    place = torch.device(device)
    work = torch.bfloat16 if place.type == "cuda" else torch.float32
    q = torch.empty(1, 1, 128, 64, dtype=work, device=place)
    kernels = {name: kernel_refusal(name, (1024, 1024), torch.bfloat16, place) for name in ("cusparselt", "cutlass")}
    return {
        "block-sparse attention": _said(block_sparse_attention.on_device(q)),
        "routed FFN": _routed(routed_ffn.on_device(place, work), place.type == "cuda"),
        "loss head": "torch (in chunks of rows, on any device)",
        "Monarch": _monarch(no_triton(place), place.type == "cuda"),
        "2:4 products": _said({**kernels, "emulate": None}),
        "2:4 masks": _said(nm_mask.on_device(place)),
        "2:4 gradients": _said(mvue24.on_device(place)),
    }


def _monarch(reason: str | None, gpu: bool) -> str:
    if gpu and reason is None:
        return "triton or torch (timed at each shape)"
    return f"torch (triton: {reason or 'its interpreter is for tests'})"


def _routed(available: dict[str, str | None], gpu: bool) -> str:
    if gpu and available["grouped_mm"] is None:
        return "grouped_mm or torch (timed at each shape)"
    return _said(available)


def _said(available: dict[str, str | None]) -> str:
    """The first that can, and the reasons of those before it."""
    names = list(available)
    first = next(name for name in names if available[name] is None)
    before = [f"{name}: {available[name]}" for name in names[: names.index(first)]]
    return f"{first} ({'; '.join(before)})" if before else first
