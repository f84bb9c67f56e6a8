"""The walk over tensors in blocks, in a pool of threads: what fold, diff and merge share.

    for lo, hi in row_blocks(tensor.shape):
        block = tensor.rows(lo, hi)

Memory is a few blocks for each thread, whatever the size of a tensor. No order of events here may change a result: jobs
are independent, and their results come back in the order in which the jobs were given.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from itertools import chain, islice
from math import prod
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import UsageError
from ..stored import Computed, Stored, Tensor, hold

if TYPE_CHECKING:
    from concurrent.futures import Future

    import numpy as np

T = TypeVar("T")

BLOCK = 1 << 18
"""Entries in one block, unless told otherwise: float64 temporaries of 2 MB."""

_ARENA = 24 << 20


def reuse_memory() -> None:
    """Let the C library keep freed blocks for the next one: without it half of a walk's time goes into page faults.

    Freeing one large mapped piece, never touched, raises glibc's limit for mapping pieces of their own (it adapts up to
    32 MB). Elsewhere this does nothing.
    """
    import numpy as np

    np.empty(_ARENA, np.uint8)


_BLAS = (
    ("scipy_openblas_get_num_threads64_", "scipy_openblas_set_num_threads64_"),
    ("openblas_get_num_threads64_", "openblas_set_num_threads64_"),
    ("openblas_get_num_threads", "openblas_set_num_threads"),
    ("MKL_Get_Max_Threads", "MKL_Set_Num_Threads"),
)
_LOCK = threading.Lock()
_inside = 0
_before = 0


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Inside, numpy's matrix products run on the thread that asks for them (where its BLAS is one that can be told so).

    The products of a walk are small and there is a thread for each: BLAS's own threads would only wait for each other.
    The setting belongs to the process; the last one out puts it back.
    """
    global _inside, _before
    get, put = _blas()
    with _LOCK:
        if not _inside:
            _before = get()
            put(1)
        _inside += 1
    try:
        yield
    finally:
        with _LOCK:
            _inside -= 1
            if not _inside:
                put(_before)


@cache
def _blas() -> tuple[Callable[[], int], Callable[[int], Any]]:
    """How to ask and to tell numpy's BLAS its number of threads; does nothing where that is unknown."""
    import ctypes
    import sys

    import numpy as np

    module = sys.modules.get("numpy._core._multiarray_umath") or sys.modules.get("numpy.core._multiarray_umath")
    with suppress(OSError, AttributeError, TypeError):
        library = ctypes.CDLL(module.__file__ if module else np.__file__)  # its symbols include those of the BLAS it is linked to
        for get, put in _BLAS:
            if hasattr(library, get) and hasattr(library, put):
                return getattr(library, get), getattr(library, put)
    return lambda: 1, lambda count: None


def row_blocks(shape: Sequence[int], block: int = BLOCK, lo: int = 0, hi: int | None = None) -> Iterator[tuple[int, int]]:
    """Ranges of rows (first axis) that cover lo..hi, of about `block` entries and at least one row each."""
    step = max(1, block // max(1, prod(shape[1:])))
    end = shape[0] if hi is None else hi
    for start in range(lo, end, step):
        yield start, min(start + step, end)


def flat(tensor: Tensor) -> Tensor:
    """The same tensor with one axis, so that a walk over single entries does not depend on its shape."""
    shape = (prod(tensor.shape),)
    if isinstance(tensor, Stored | Computed):
        return replace(tensor, shape=shape)
    return hold(tensor.read().reshape(shape))


class Fields:
    """A delta's tensors for `chain.Rows`: rows are read by position, but what is read whole is read once and kept.

    One for each target; it is dropped with the last block. `widen` names keys whose floats are kept as float32: those
    that only arithmetic on float32 uses.
    """

    def __init__(self, tensors: Mapping[str, Tensor], widen: Iterable[str] = ()) -> None:
        self._tensors, self._widen = tensors, frozenset(widen)
        self._kept: dict[str, _Kept] = {}

    def __call__(self, key: str) -> Tensor:
        if key not in self._kept:
            self._kept.setdefault(key, _Kept(self._tensors[key], key in self._widen))
        return self._kept[key]


class _Kept(Tensor):
    def __init__(self, tensor: Tensor, widen: bool) -> None:
        self.dtype, self.shape = tensor.dtype, tensor.shape
        self._tensor, self._widen = tensor, widen
        self._array: np.ndarray[Any, Any] | None = None

    def blocks(self, size: int = 1 << 20) -> Iterator[bytes | memoryview]:
        return self._tensor.blocks(size)

    def rows(self, lo: int, hi: int) -> np.ndarray[Any, Any]:
        if isinstance(self._tensor, Computed):  # it has no parts: reading rows would make all of it, every time
            return self.read()[lo:hi]
        return self._tensor.rows(lo, hi)

    def read(self) -> np.ndarray[Any, Any]:
        if self._array is None:
            from .. import xp

            array = self._tensor.read()
            array = (xp.cast(array, "float32") if self._widen else array).view()
            array.flags.writeable = False  # the exact product keeps its split of factors that nobody can change
            self._array = array
        return self._array


def thread_count(threads: int | None) -> int:
    """The number of threads that was asked for; by default the CPUs of this process, at most 8. UsageError below 1."""
    if threads is None:
        return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    if threads < 1:
        raise UsageError(f"threads must be at least 1, got {threads}")
    return threads


def in_threads(jobs: Iterable[Callable[[], T]], threads: int) -> Generator[T, None, None]:
    """Results of `jobs` in their order. Jobs are drawn as they are needed; an error or a break cancels what waits.

    Close the iterator before closing what the jobs write to: closing waits for those that run.
    """
    jobs = iter(jobs)
    first = list(islice(jobs, 2))
    jobs = chain(first, jobs)
    single = len(first) < 2  # starting a thread takes longer than most tiny tensors do
    del first
    if threads <= 1 or single:
        for job in jobs:
            yield job()
        return
    from concurrent.futures import ThreadPoolExecutor

    pool = ThreadPoolExecutor(threads)
    waiting: deque[Future[T]] = deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(job))
            del job  # a job holds its tensors' fields; the pool lets go of them when it is done
            if len(waiting) > 4 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
