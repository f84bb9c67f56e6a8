"""What every test may use: a base in memory, tiny checkpoints on disk, and no network."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest

from weft.stored import Held, Tensor

hypothesis.settings.register_profile("untimed", deadline=None)  # no test is a matter of how busy the machine is
hypothesis.settings.load_profile("untimed")


class MemoryBase:
    """A base that is a dict of arrays: all that `Builder` and `Delta.require_base` ask for."""

    def __init__(self, arrays: Mapping[str, Any], fingerprint: str | None = "ab" * 32) -> None:
        self.arrays = dict(arrays)
        self.fingerprint = fingerprint

    def tensor(self, name: str) -> Tensor:
        return Held(self.arrays[name])

    def sha256(self, name: str) -> str:
        return self.tensor(name).sha256


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20261121)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fingerprint caches of tests stay out of the user's."""
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path_factory.getbasetemp() / "weft-cache"))


def bits(x: Any) -> bytes:
    """The raw bytes of an array or tensor: equality of these is equality to the bit."""
    from weft import xp

    return np.ascontiguousarray(xp.to_numpy(x)).tobytes()


def raw_for(t: dict[str, np.ndarray], dtype: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The fields of a raw op's example, made for float32, and its config, for a target that is stored as `dtype`."""
    from weft.stored import dtype_code

    dtype = np.dtype(dtype)
    if "bits" in t:  # the upper ones
        return {"bits": (t["bits"] >> np.uint32(32 - 8 * dtype.itemsize)).astype(f"u{dtype.itemsize}")}, {"dtype": dtype_code(dtype)}
    return {**t, "values": t["values"].astype(dtype)}, {}


@pytest.fixture
def small_delta(tmp_path: Path) -> Path:
    """A valid delta file of a few kilobytes, with sharing, a sum, a view, an added tensor and notes."""
    from weft.delta import Builder
    from weft.ops import At, Generator

    gen = Generator(5)
    base = MemoryBase({"a.weight": gen.normal((12, 8)), "b.weight": gen.normal((6, 8)), "b.bias": gen.normal((6,))})
    build = Builder(base)
    shared = build.share("A", gen.normal((2, 8)))
    build.put("a.weight", "lowrank", {"A": shared, "B": gen.normal((4, 2))}, at=At(index=((2, 6),)), scale=0.5)
    build.put("b.weight", "lowrank", {"A": shared, "B": gen.normal((6, 2))})
    build.put("b.weight", "magnitude", {"m": gen.normal((6,))})
    build.put("b.bias", "sparse", {"index": np.array([1, 4]), "values": gen.normal((2,))})
    build.add("head.weight", gen.normal((3, 8)))
    delta = build.done(recipe={"verb": "test", "seed": 3}, config={"id2label": {"0": "no", "1": "yes"}}, notes={"made": "today"})
    (2.0 * delta).save(path := tmp_path / "small.safetensors")
    return path
