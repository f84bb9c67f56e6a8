"""The solve that closed-form editors share: the smallest change of a matrix that maps keys to residuals.

With keys K (d_in x N), residuals R (d_out x N) and a prior L (d_in x d_in, positive definite), the minimum of
sum_i ||dW k_i - r_i||^2 + tr(dW L dW^T) is

    dW = R K^T (K K^T + L)^-1

Samples are rows here, H = K^T (N x d_in) and V = R^T (N x d_out), and the result is a pair of factors, dW = B A, with

    B = V^T,    A = H (H^T H + L)^-1 = (H L^-1 H^T + I)^-1 H L^-1

The two forms of A are equal; the first has a d_in x d_in system (primal), the second an N x N one (dual). The inverse is on the side of the
keys: column i of B is the residual of sample i alone, so taking row i of A and column i of B away is the same as solving
with that residual at zero. That is what undoing one edit of many means.

All in float64, on the device of the prior's matrix, which is by far the largest, else of the keys; on the CPU if that has no float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch

from .. import xp
from ..errors import InputError, UsageError, near

if TYPE_CHECKING:
    import numpy as np

    Rows = torch.Tensor | np.ndarray

Form = Literal["auto", "dual", "primal"]
_FORMS = ("auto", "dual", "primal")


@dataclass(frozen=True)
class Factors:
    """A change of a linear map in factors: A (N x d_in) and B (d_out x N), float64. Row i of A and column i of B are sample i's."""

    A: torch.Tensor
    B: torch.Tensor

    @property
    def increment(self) -> torch.Tensor:
        """dW = B A (d_out x d_in)."""
        return self.B @ self.A


class Prior:
    """L = scale * (C + jitter * m * I), with m the mean of C's diagonal: what a change costs in each direction of the keys.

    Make it with `Prior.scaled`, once for each layer: the Cholesky factor of C is computed at first need and kept for all solves.
    """

    def __init__(self, matrix: torch.Tensor, scale: float) -> None:
        self.matrix, self.scale = matrix, scale

    @classmethod
    def scaled(cls, C: Rows, scale: float, *, jitter: float = 0.0) -> Prior:
        """scale * C for a symmetric positive definite C (d_in x d_in), such as the second moment of keys.

        jitter: added to the diagonal, relative to its mean. A C of fewer rows than d_in is singular without it.
        UsageError for a scale that is not positive or a jitter that is negative; InputError for a C that is no such matrix. Whether it is
        definite shows at the first solve.
        """
        _positive(scale, "the scale of the prior")
        if not math.isfinite(jitter) or jitter < 0:
            raise UsageError(f"jitter must not be negative, got {jitter}")
        matrix = _matrix(C, "the prior's matrix")
        if matrix.shape[0] != matrix.shape[1]:
            raise InputError(f"the prior's matrix must be square, got {list(matrix.shape)}")
        gap = float((matrix - matrix.T).abs().max())
        if gap > 1e-6 * float(matrix.abs().max()):
            raise InputError(f"the prior's matrix is not symmetric: two entries differ by {gap:.3g}")
        matrix = (matrix + matrix.T) / 2
        if jitter:
            matrix.diagonal().add_(jitter * matrix.diagonal().mean())
        return cls(matrix, float(scale))

    @property
    def size(self) -> int:
        """d_in."""
        return self.matrix.shape[0]

    @cached_property
    def cholesky(self) -> torch.Tensor:
        """The lower Cholesky factor of C. InputError if C is singular to working precision."""
        factor = _cholesky(self.matrix)
        if factor is None:
            raise InputError(
                f"the prior's matrix ({self.size} x {self.size}) is singular or not positive definite",
                hint=f"gather it from more text (well over {self.size} tokens), or give a jitter, such as 1e-6",
            )
        return factor

    def inverse(self, rows: torch.Tensor) -> torch.Tensor:
        """rows L^-1 (N x d_in)."""
        return torch.cholesky_solve(rows.T, self.cholesky).T / self.scale


def ridge(keys: Rows, residuals: Rows, prior: float | Prior, *, form: Form = "auto") -> Factors:
    """The minimum of sum_i ||dW h_i - v_i||^2 + tr(dW L dW^T), in factors.

    keys: H (N x d_in); residuals: V (N x d_out), what dW h_i should be. prior: L, a number for that multiple of the identity.
    form: "dual" solves an N x N system, "primal" one of d_in x d_in; "auto" takes the smaller.

    UsageError for a prior that is not positive; InputError for shapes that do not fit and for entries that are not finite.
    """
    if form not in _FORMS:
        raise UsageError(f"unknown form {form!r}{near(form, _FORMS)}")
    H, V = _problem(keys, residuals, prior)
    if form == "dual" or (form == "auto" and H.shape[0] <= H.shape[1]):
        return Factors(_dual(H, prior, 1.0), V.T)
    if isinstance(prior, Prior):
        system = prior.scale * prior.matrix
    else:
        system = prior * torch.eye(H.shape[1], dtype=H.dtype, device=H.device)
    factor = _cholesky(H.T @ H + system)
    if factor is None:
        raise InputError(f"keys and prior leave a singular system ({H.shape[1]} x {H.shape[1]})", hint="a larger prior, or a jitter in it, such as 1e-6")
    return Factors(torch.cholesky_solve(H.T, factor).T, V.T)


def exact(keys: Rows, residuals: Rows, prior: float | Prior, eps: float = 0.0) -> Factors:
    """The change of least tr(dW L dW^T) that maps each key to its residual: A = (H L^-1 H^T + eps I)^-1 H L^-1.

    eps = 0 means dW h_i = v_i exactly; where keys depend on each other the system is inverted on its range (pseudo-inverse), which shares
    out residuals that contradict. With eps > 0 and the prior w C this is `ridge` with the prior (w eps) C. Arguments and errors as for
    `ridge`, and UsageError for a negative eps.
    """
    if not math.isfinite(eps) or eps < 0:
        raise UsageError(f"eps must not be negative, got {eps}")
    H, V = _problem(keys, residuals, prior)
    return Factors(_dual(H, prior, eps), V.T)


def _dual(H: torch.Tensor, prior: float | Prior, eps: float) -> torch.Tensor:
    """(H L^-1 H^T + eps I)^-1 H L^-1."""
    Z = prior.inverse(H) if isinstance(prior, Prior) else H / prior
    system = Z @ H.T
    system = (system + system.T) / 2
    system.diagonal().add_(eps)
    factor = _cholesky(system)
    if factor is not None:
        return torch.cholesky_solve(Z, factor)
    inverse: torch.Tensor = torch.linalg.pinv(system, hermitian=True, rtol=_least(system))
    return inverse @ Z


def _least(matrix: torch.Tensor) -> float:
    """What is zero, relative to the largest eigenvalue."""
    return matrix.shape[0] * torch.finfo(matrix.dtype).eps


def _cholesky(matrix: torch.Tensor) -> torch.Tensor | None:
    """The lower factor, or None for a matrix that is singular to working precision (rounding can let one through)."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info):
        return None
    pivots = factor.diagonal().square()
    return None if float(pivots.min()) <= _least(matrix) * float(pivots.max()) else factor


def _problem(keys: Rows, residuals: Rows, prior: float | Prior) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and residuals in float64, checked against each other and the prior."""
    H, V = _matrix(keys, "keys"), _matrix(residuals, "residuals")
    if H.shape[0] != V.shape[0]:
        raise InputError(f"there are {H.shape[0]} keys and {V.shape[0]} residuals; expected as many of each, one a row")
    if isinstance(prior, Prior):
        if prior.size != H.shape[1]:
            raise InputError(f"the prior's matrix is {prior.size} x {prior.size}, the keys have {H.shape[1]} entries each")
        H = H.to(prior.matrix.device)
    else:
        _positive(prior, "the prior")
    return H, V.to(H.device)


def _matrix(x: Rows, what: str) -> torch.Tensor:
    x = double(x)
    if x.ndim != 2 or not x.numel():
        raise InputError(f"{what}: expected a matrix with rows and columns, got the shape {list(x.shape)}")
    if not bool(x.isfinite().all()):
        row = int((~x.isfinite()).any(1).nonzero()[0])
        raise InputError(f"{what}: row {row} has entries that are not finite", hint="run the model in float32 or bfloat16 instead of float16")
    return x


def _positive(value: float, what: str) -> None:
    if not math.isfinite(value) or value <= 0:
        raise UsageError(f"{what} must be positive and finite, got {value}")


def double(x: Rows) -> torch.Tensor:
    """x (torch or numpy) as a float64 tensor without a graph, on its own device; on the CPU where the device has no float64."""
    tensor: torch.Tensor = xp.to_torch(x).detach()
    try:
        return tensor.to(torch.float64)
    except TypeError:  # Apple's GPUs
        return tensor.cpu().to(torch.float64)
