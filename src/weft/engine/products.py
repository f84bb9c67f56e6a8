"""How exact float32 products are: torch's switch, for the time of a run, and the error that it has on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def products(precision: str, device: torch.device) -> Iterator[dict[str, float]]:
    """Inside, products are computed with `torch.set_float32_matmul_precision(precision)`; afterwards as before. "" changes nothing.

    Gives {"matmul_error": e}, the relative error (Frobenius) of one product of random matrices against float64; {} where nothing is changed.
    What "high" and "medium" mean differs: on CPUs without 16-bit units they choose another library and cost no digits, elsewhere
    they compute in TF32 or bfloat16.
    """
    if not precision:
        yield {}
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield {"matmul_error": relative_error(device)}
    finally:
        torch.set_float32_matmul_precision(before)


def relative_error(device: torch.device, rows: int = 256, inner: int = 768) -> float:
    """||a b - exact|| / ||exact|| for normal random a (rows x inner) and b (inner x rows), float32."""
    gen = torch.Generator().manual_seed(0)
    a, b = torch.randn(rows, inner, generator=gen), torch.randn(inner, rows, generator=gen)
    exact = a.double() @ b.double()
    found = (a.to(device) @ b.to(device)).cpu().double()
    return float((found - exact).norm() / exact.norm())
