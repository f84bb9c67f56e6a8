"""The arithmetic that ops are written in: the same lines run on numpy arrays and on torch tensors.

Only what differs between the two engines is here; indexing, `+`, `*`, `.reshape` are the arrays' own. Nothing writes
into what it is given. numpy is imported at first use, torch only when a torch tensor is met.

Two precisions:

* *Exact* (numpy always; torch inside `with exact():`): `mm` and `sumsq` are sums without rounding, in float64, so
  the bits do not depend on threads, BLAS, blocking or engine. Folding uses this.
* *Plain* (torch otherwise): the ordinary product, differentiable. Training and serving use this.

The exact product splits each float32 factor into hi + lo, integer multiples of 2^(e-b) and 2^(e-2b), where 2^e bounds
the entry's row (left factor) or column (right factor) and b = floor((53 - ceil(log2 2K)) / 2) for inner size K. Then
hi.hi and [hi lo].[lo; hi] have no rounding in any partial sum in float64; lo.lo, below 2^(2e-2b), is left out.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from math import ceil, log2
from typing import Any

Array = Any
"""A numpy.ndarray or a torch.Tensor; an op never needs to know which."""

_EXACT: ContextVar[bool] = ContextVar("weft_exact", default=False)


@contextmanager
def exact() -> Iterator[None]:
    """Inside, torch tensors use the exact product too (no gradients)."""
    token = _EXACT.set(True)
    try:
        yield
    finally:
        _EXACT.reset(token)


def is_torch(x: Array) -> bool:
    return hasattr(x, "requires_grad")


def _lib(x: Array) -> Any:
    if is_torch(x):
        import torch

        return torch
    import numpy

    return numpy


def plain(x: Array) -> bool:
    """Whether x is computed with in the plain precision."""
    if not is_torch(x):
        return False
    import torch

    return torch.compiler.is_compiling() or not _EXACT.get()  # torch.compile cannot read a ContextVar, and nobody folds inside it


def to_numpy(x: Array) -> Array:
    """A torch tensor (any device, bfloat16 and float8 included) or array as numpy; shares memory where it can."""
    if not is_torch(x):
        return x
    import torch

    x = x.detach().cpu().contiguous()
    odd = {torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}.get(x.dtype)
    if odd is None:
        return x.numpy()
    from .stored import numpy_dtype

    raw = x.view(torch.int16 if odd == "BF16" else torch.uint8)
    return raw.numpy().view(numpy_dtype(odd))


def to_torch(x: Array) -> Array:
    """A numpy array as a torch tensor of the same dtype (copied if it is read-only)."""
    if is_torch(x):
        return x
    import numpy as np
    import torch

    x = np.ascontiguousarray(x) if x.ndim else np.array(x)
    name = str(x.dtype)
    if name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        raw = x.view(np.int16 if name == "bfloat16" else np.uint8)
        return torch.from_numpy(raw.copy()).view(getattr(torch, name))
    return torch.from_numpy(x if x.flags.writeable else x.copy())


def dtype(x: Array) -> str:
    """The dtype's plain name: "float32", "bfloat16", ..."""
    return str(x.dtype).removeprefix("torch.") if is_torch(x) else _numpy_name(x.dtype)


@cache
def _numpy_name(dtype: Any) -> str:
    return str(dtype)  # numpy takes 10 us to find it


def cast(x: Array, name: str) -> Array:
    """x in another dtype, rounded to nearest even. bfloat16 is available in both engines."""
    if dtype(x) == name:
        return x
    if is_torch(x):
        import torch

        return x.to(getattr(torch, name))
    import numpy as np

    if name == "bfloat16":
        return _to_bf16(x.astype(np.float32, copy=False))
    if dtype(x) == "bfloat16" and name in ("float32", "float64"):
        wide = (x.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
        return wide if name == "float32" else wide.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):  # NaNs stay NaN and large values become inf: what rounding means
        return x.astype(name)


def _to_bf16(x: Array) -> Array:
    """float32 to bfloat16, nearest even. NaNs keep what fits of their payload, as torch's do, which takes more care (and time)."""
    import ml_dtypes
    import numpy as np

    if not (x != x).any():
        return x.astype(ml_dtypes.bfloat16)
    flat = np.ascontiguousarray(x).reshape(-1)
    out = np.empty(flat.size, np.uint16)
    for start in range(0, flat.size, 1 << 18):
        bits = flat[start : start + (1 << 18)].view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        if nan.any():
            rounded = np.where(nan, (bits >> np.uint32(16)) | np.uint32(0x40), rounded)
        out[start : start + (1 << 18)] = rounded
    return out.view(ml_dtypes.bfloat16).reshape(x.shape)


def wide(x: Array) -> Array:
    """x as the type in which results of `mm` and `sumsq` come: float64 when exact, x's own when plain."""
    return x if plain(x) else cast(x, "float64")


def narrow(x: Array, like: Array) -> Array:
    """x rounded to the dtype of `like`."""
    return cast(x, dtype(like))


def integers(x: Array) -> Array:
    """The bits of x (any dtype) as signed integers of the same size."""
    if is_torch(x):
        import torch

        return x.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    import numpy as np

    return np.ascontiguousarray(x).reshape(x.shape).view(f"i{x.itemsize}")


def where(mask: Array, x: Array, y: Array) -> Array:
    """x where `mask` is true, else y."""
    return _lib(x).where(mask, x, y)


def change(new: Array, old: Array) -> Array:
    """new - old, wide. Exact: 0 where they are equal, infinities too, of which the difference would be NaN."""
    if plain(new):
        return new - old
    import numpy as np

    with np.errstate(invalid="ignore"):
        out = wide(new) - wide(old)
    return out if bool((out == out).all()) else where(new == old, zeros(out.shape, out), out)


def concat(parts: Sequence[Array], axis: int) -> Array:
    lib = _lib(parts[0])
    return lib.cat(tuple(parts), axis) if is_torch(parts[0]) else lib.concatenate(parts, axis)


def permute_axes(x: Array, axes: Sequence[int]) -> Array:
    return x.permute(*axes) if is_torch(x) else x.transpose(axes)


def take(x: Array, index: Array, axis: int = 0) -> Array:
    """Entries of x along `axis` at the integer positions `index` (1-d)."""
    if is_torch(x):
        return x.index_select(axis, index.to(device=x.device).long())
    return x.take(index, axis)


def put(x: Array, index: Array, values: Array, *, add: bool = False) -> Array:
    """A copy of x with flat positions `index` (unique) set to `values`, or increased by them."""
    if is_torch(x):
        flat, index = x.reshape(-1), index.to(device=x.device).long()
        return (flat.index_add(0, index, values) if add else flat.index_copy(0, index, values)).reshape(x.shape)
    flat = x.reshape(-1).copy()
    flat[index] = flat[index] + values if add else values
    return flat.reshape(x.shape)


def set_part(x: Array, where: tuple[int | slice, ...], part: Array) -> Array:
    """A copy of x whose view `x[where]` is `part`."""
    out = x.clone() if is_torch(x) else x.copy()
    out[where] = part
    return out


def zeros(shape: Sequence[int], like: Array) -> Array:
    lib = _lib(like)
    return lib.zeros(tuple(shape), dtype=like.dtype, device=like.device) if is_torch(like) else lib.zeros(tuple(shape), like.dtype)


_LEAST = -900
"""The least exponent of a grid: no unit underflows, and float32 values (2^-149 at the least) are far above it. Parts of float64
values below 2^-900 that fall under the grid are dropped."""


def _bits(inner: int) -> int:
    return (53 - ceil(log2(2 * max(inner, 1)))) // 2


def _split(x: Array, axis: int, b: int) -> tuple[Array, Array]:
    """x (float64 holding float32 values) as hi + lo, on the grid that its largest magnitude along `axis` sets."""
    lib = _lib(x)
    if x.shape[axis] == 0:
        return x, x
    if is_torch(x):
        peak, nearest = abs(x).amax(axis, keepdim=True), lib.round
        unit_hi = lib.ldexp(lib.ones_like(peak), lib.frexp(peak)[1].clamp(min=_LEAST) - b)
    else:
        peak, nearest = abs(x).max(axis, keepdims=True), lib.rint
        unit_hi = lib.ldexp(1.0, lib.maximum(lib.frexp(peak)[1], _LEAST) - b)
    unit_lo = unit_hi * 2.0**-b
    hi = nearest(x / unit_hi) * unit_hi
    lo = nearest((x - hi) / unit_lo) * unit_lo
    return hi, lo


def mm(a: Array, b: Array) -> Array:
    """The matrix product a @ b (2-d). Exact: float64 without rounding in any partial sum; plain: torch's own."""
    if plain(a):
        return a @ b
    bits = _bits(a.shape[1])
    a_hi, a_lo = _split(cast(a, "float64"), 1, bits)
    b_hi, b_cross = _right(b, bits)
    return a_hi @ b_hi + concat((a_hi, a_lo), 1) @ b_cross


_RIGHT = threading.local()
_KEPT, _KEPT_SIZE = 2, 1 << 19


def _right(b: Array, bits: int) -> tuple[Array, Array]:
    """The right factor's hi and [lo; hi]. Those of the last read-only arrays are kept: a walk over blocks of rows meets them at every block."""
    kept: list[tuple[Array, int, tuple[Array, Array]]] = getattr(_RIGHT, "kept", [])
    for known, same_bits, split in kept:
        if known is b and same_bits == bits:
            return split
    hi, lo = _split(cast(b, "float64"), 0, bits)
    split = hi, concat((lo, hi), 0)
    if not is_torch(b) and not b.flags.writeable and b.size <= _KEPT_SIZE:
        _RIGHT.kept = [*kept, (b, bits, split)][-_KEPT:]
    return split


def sumsq(x: Array, axis: int) -> Array:
    """Sum of squares along `axis`, kept as size 1. Exact: float64, any order of summation gives the same bits."""
    if plain(x):
        return (x * x).sum(axis, keepdim=True)
    x = cast(x, "float64")
    hi, lo = _split(x, axis, _bits(x.shape[axis]))
    kept = {"keepdim": True} if is_torch(x) else {"keepdims": True}
    return (hi * hi).sum(axis, **kept) + 2.0 * (hi * lo).sum(axis, **kept)


def sqrt(x: Array) -> Array:
    return _lib(x).sqrt(x)


# --- reproducible random numbers -------------------------------------------------------------------------------------

_M1, _M2, _GOLDEN = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * _M1) & _MASK
    z = ((z ^ (z >> 27)) * _M2) & _MASK
    return z ^ (z >> 31)


def key(seed: int, stream: int = 0) -> int:
    """A 64-bit key for a seed and a stream number (splitmix64 of both)."""
    return _mix((_mix((seed + _GOLDEN) & _MASK) + stream * _GOLDEN) & _MASK)


def named_key(seed: int, name: str) -> int:
    """A 64-bit key for a seed and a name: the stream is the first 8 bytes of the name's sha256."""
    import hashlib

    return key(seed, int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "big"))


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _words(like: Array, key_: int, start: int, count: int) -> Array:
    """splitmix64(key + counter) for counters start..start+count, as int64 bit patterns."""
    z: Array
    if is_torch(like):
        import torch

        z = torch.arange(start, start + count, dtype=torch.int64, device=like.device)
    else:
        import numpy as np

        z = np.arange(start, start + count, dtype=np.int64)
    z += 1  # in place, which is twice as fast, on what nobody else has
    z *= _signed(_GOLDEN)
    z += _signed(key_)
    for shift, factor in ((30, _M1), (27, _M2)):
        z ^= _shifted(z, shift)
        z *= _signed(factor)
    z ^= _shifted(z, 31)
    return z


def _shifted(z: Array, by: int) -> Array:
    """Bits moved down, zeros moving in from above."""
    high = z >> by
    high &= (1 << (64 - by)) - 1
    return high


_QUANTILES: list[Array] = []
# a plain list, because torch.compile traces through functools.lru_cache


def _quantiles() -> Array:
    """Standard normal quantiles at (i + 1/2) / 65536, on a grid of 2^-20 so that libm's last bit cannot matter."""
    if _QUANTILES:
        return _QUANTILES[0]
    from statistics import NormalDist

    import numpy as np

    inverse = NormalDist().inv_cdf
    upper = np.array([inverse((i + 0.5) / 65536) for i in range(32768, 65536)])
    upper = np.round(upper * 2**20) / 2**20
    _QUANTILES.append(np.concatenate([-upper[::-1], upper]).astype(np.float32))
    return _QUANTILES[0]


def normals(like: Array, key_: int, start: int, count: int) -> Array:
    """Standard normal float32 numbers `start`..`start+count` of the sequence `key_`, in the engine of `like`.

    Every number depends on (key, its position) alone: any block can be made again by itself. 16 random bits pick one
    of 65,536 quantiles, so values lie within +-4.33; the same bits in numpy and torch.
    """
    index = _words(like, key_, start, count) & 0xFFFF
    table = _quantiles()
    if is_torch(like):
        import torch

        return torch.from_numpy(table).to(like.device)[index]
    return table[index]


def uniforms(like: Array, key_: int, start: int, count: int) -> Array:
    """Uniform float64 numbers in [0, 1), `start`..`start+count` of the sequence `key_`: 53 random bits each."""
    return cast((_words(like, key_, start, count) >> 11) & ((1 << 53) - 1), "float64") * 2.0**-53


def signs(like: Array, key_: int, start: int, count: int) -> Array:
    """Random signs `start`..`start+count` of the sequence `key_`, 1 or -1 by the highest bit of each word, float32 in the engine of `like`."""
    return 1 - 2 * cast((_words(like, key_, start, count) >> 63) & 1, "float32")


def scrambled(like: Array, key_: int, size: int) -> Array:
    """A pseudo-random permutation of 0..size-1 by a key, `size` a power of two up to 2^31, in the engine of `like`.

    i -> a i + c, i xor (i >> h), a i + c, all modulo the size, with a odd and h half of the size's bits, rounded up.
    """

    def places() -> Array:
        if is_torch(like):
            import torch

            return torch.arange(size, dtype=torch.int64, device=like.device)
        import numpy as np

        return np.arange(size, dtype=np.int64)

    i = places()
    a, c, half = key_ % size | 1, (key_ >> 32) % size, size.bit_length() // 2
    i = (i * a + c) % size
    i = i ^ (i >> half)
    return (i * a + c) % size


def sixteen_bits(key_: int, start: int, count: int) -> Array:
    """Uniform integers below 65,536, `start`..`start+count` of the sequence `key_`, as a numpy array: four from each word, lowest bits first."""
    import numpy as np

    first = start // 4
    words = _words(np.zeros(0), key_, first, (start + count + 3) // 4 - first)
    return words.astype("<i8", copy=False).view("<u2")[start - 4 * first :][:count]
