"""Writes the golden files of the format: `python tests/golden/make.py`. Run it again only when the format changes.

All numbers come from integer arithmetic and one division, so the files are the same on every machine.
"""

from __future__ import annotations

from math import prod
from pathlib import Path

import ml_dtypes
import numpy as np

from weft.base import Base
from weft.delta import Builder, Delta
from weft.file import container_header
from weft.ops import At, Ref
from weft.stored import ITEMSIZE, Tensor, hold

HERE = Path(__file__).parent


def numbers(*shape: int, start: int = 0, dtype: type = np.float32) -> np.ndarray:
    """Values between -1 and 1 that are not short binary fractions."""
    steps = (np.arange(start, start + prod(shape)) * 37) % 101 - 50
    return (steps / 51).astype(dtype).reshape(shape)


def write_base(path: Path) -> None:
    """A checkpoint of every dtype that the golden deltas touch. `odd` holds a signalling NaN, an infinity and -0."""
    tensors: dict[str, Tensor] = {
        "a.bias": hold(numbers(4, start=3)),
        "a.weight": hold(numbers(4, 3, start=7)),
        "conv.weight": hold(numbers(2, 3, 2, start=19)),
        "half.weight": hold(numbers(3, 4, start=31).astype(ml_dtypes.bfloat16)),
        "odd": hold(np.array([0x7D01, 0x7C00, 0x8000, 0x3C00], np.uint16).view(np.float16)),
        "old.weight": hold(numbers(2, 2, start=43)),
        "steps": hold(np.arange(5) * 3),
        "wide.weight": hold(numbers(2, 2, start=47, dtype=np.float64)),
    }
    order = sorted(tensors, key=lambda key: (-ITEMSIZE[tensors[key].dtype], key))
    with open(path, "wb") as out:
        out.write(container_header(tensors, order, {"format": "pt"}))
        for key in order:
            out.writelines(tensors[key].blocks())


def tiny(base: Base) -> Delta:
    """The worked example of docs/format.md."""
    build = Builder(base)
    build.put("a.weight", "lowrank", {"A": np.array([[1, -2, 0.5]], np.float32), "B": np.array([[1], [0], [-1], [0.25]], np.float32)}, scale=0.5)
    return build.done(recipe={"verb": "example"}, notes={"title": "tiny"})


def additive(base: Base) -> Delta:
    build = Builder(base)
    build.put("a.bias", "dense", {"values": numbers(4, start=5)}, scale=-0.75)
    build.put("a.weight", "sparse", {"index": np.array([0, 5, 11], np.int32), "values": numbers(3, start=9)})
    pair = {"A": numbers(2, 4), "B": numbers(3, 2, start=8)}
    frozen = {"A0": numbers(1, 4, start=14).astype(ml_dtypes.bfloat16), "B0": numbers(3, 1, start=18)}
    build.put("half.weight", "lowrank", {**pair, **frozen}, scale=1e-3)
    return build.done(recipe={"verb": "golden"})


def factors(base: Base) -> Delta:
    build = Builder(base)
    own = {"P": numbers(4, 2), "lam": numbers(2, start=8), "Q": numbers(2, 3, start=10)}
    build.put("a.weight", "svd", {**own, "P0": numbers(4, 1, start=16), "lam0": numbers(1, start=20), "Q0": numbers(1, 3, start=21)})
    build.put("wide.weight", "bilinear", {"A": numbers(1, 2), "M": numbers(3, 1, start=2), "B": numbers(2, 3, start=5, dtype=np.float64)}, scale=2.0)
    build.put("half.weight", "kron", {"A": numbers(2, 3, 2, start=11), "B": numbers(2, 1, 2, start=23)}, scale=0.5)
    return build.done(recipe={"verb": "golden"})


def axes(base: Base) -> Delta:
    build = Builder(base)
    core = {"core": numbers(2, 1, 2), "U0": numbers(2, 2, start=4), "U1": numbers(3, 1, start=8), "U2": numbers(2, 2, start=11)}
    build.put("conv.weight", "tucker", core, scale=3.0)
    build.put("a.weight", "seeded", {"coef": numbers(3, start=15)}, seed=7, stream=3)
    build.put("half.weight", "seeded", {"a": numbers(2, start=18), "b": numbers(3, start=20)}, seed=2**53, stream=1, rank=2, scale=0.25)
    return build.done(recipe={"verb": "golden"})


def relative(base: Base) -> Delta:
    build = Builder(base)
    order = build.share("stream", np.array([2, 0, 3, 1]))
    build.put("a.weight", "permute", {"perm": order}, group="stream")
    build.put("a.bias", "permute", {"perm": order}, group="stream")
    build.put("a.weight", "scale_shift", {"scale": numbers(3, start=1), "shift": numbers(3, start=4)}, axis=-1)
    build.put("half.weight", "magnitude", {"m": numbers(4, start=7)}, axis=1)
    build.put("conv.weight", "magnitude", {"m": numbers(2, start=11)})
    return build.done(recipe={"verb": "golden"})


def structure(base: Base) -> Delta:
    build = Builder(base)
    build.add("head.weight", numbers(2, 3))
    build.add("a.weight", numbers(2, 2, start=6).astype(ml_dtypes.bfloat16), kind="replace")
    build.copy("half.twin", "half.weight")
    build.put("half.twin", "sparse", {"index": np.array([7]), "values": numbers(1, start=10)})
    build.remove("old.weight")
    build.put("a.bias", "scale_shift", {"scale": numbers(4, start=11)})
    build.blob("ledger", b"kept as it is")
    patch = {"id2label": {"0": "no", "1": "yes"}, "problem_type": None, "num_labels": 2}
    return build.done(recipe={"verb": "golden"}, config=patch, tied=(("a.bias", "b.bias"),), parents=("0" * 64,))


def references(base: Base) -> Delta:
    """Rows of a shared pool, views, and a `sum` inside a `sum` (made by the algebra)."""
    build = Builder(base)
    build.share("pool", numbers(5, 2))
    build.share("rows", np.array([4, 0, 3], np.int32))
    rows = Ref("@shared/pool", "@shared/rows", (2, 3))
    build.put("a.weight", "lowrank", {"A": rows, "B": numbers(2, 2, start=10)}, at=At(index=((1, 3),)))
    build.put("conv.weight", "dense", {"values": numbers(3, start=14)}, at=At(reshape=(2, 6), transpose=(1, 0), index=((2, 5), 1)))
    turned = Builder(base)
    turned.put("a.weight", "permute", {"perm": np.array([1, 2, 0])}, axis=1)
    return 0.5 * build.done() + -2.0 * turned.done()


def pools(base: Base) -> Delta:
    """A pool in whose rows a factor's columns are, and coefficients that two targets share."""
    build = Builder(base)
    pool, coef = build.share("pool", numbers(5, 2)), build.share("coef", numbers(3, start=4))
    build.put("a.weight", "lowrank", {"A": numbers(2, 3), "B": build.pick(pool, np.array([4, 0, 3, 0], np.int32), (2, 4), transpose=True)}, scale=0.5)
    build.put("wide.weight", "fastfood", {"coef": coef, "gain": numbers(1, start=9)}, seed=2**50, stream=2)
    build.put("half.weight", "fastfood", {"coef": coef}, scale=0.25)
    build.put("conv.weight", "fastfood", {"coef": numbers(70)}, scale=1e-3, stream=1, first=125)
    return build.done(recipe={"verb": "golden"})


def replay(base: Base) -> Delta:
    build = Builder(base)
    build.put("steps", "assign", {"values": np.arange(5)[::-1].copy()})
    odd = np.array([0x7E0F, 0x3555], np.uint16).view(np.float16)
    build.put("odd", "assign", {"index": np.array([1, 3]), "values": odd})
    build.put("a.weight", "dense", {"values": numbers(4, 3, start=2)})
    build.put("a.weight", "assign", {"index": np.array([0, 4]), "values": np.array([-0.0, np.inf], np.float32)})
    build.put("half.weight", "assign", {"index": np.array([2, 3]), "values": numbers(2, start=3).astype(ml_dtypes.bfloat16)})
    build.put("half.weight", "dense", {"values": numbers(3, 4, start=5)})
    return build.done(recipe={"verb": "golden"})


def flipped(base: Base) -> Delta:
    build = Builder(base)
    build.put("half.weight", "xor", {"bits": (np.arange(12, dtype=np.uint16) * 11 % 128).reshape(3, 4)}, dtype="BF16")
    build.put("odd", "xor", {"bits": np.array([0x0102, 0, 0x8000, 0x3C01], np.uint16)}, dtype="F16")
    build.put("steps", "xor", {"bits": np.array([1, 0, 2**64 - 1, 5, 0], np.uint64)}, dtype="I64")
    build.put("a.bias", "xor", {"bits": np.array([1, 0x400000, 0x80000000, 0], np.uint32)})
    build.put("a.bias", "scale_shift", {"scale": numbers(4, start=21)})
    return build.done(recipe={"verb": "golden"})


def live(base: Base) -> Delta:
    build = Builder(base)
    shapes = {"down": (2, 4), "up": (4, 2), "down_bias": (2,), "up_bias": (4,)}
    build.put("@module/a", "adapter", {name: numbers(*shape, start=len(name)) for name, shape in shapes.items()}, act="gelu", scale=2.0)
    build.put("@input/embeddings", "prompt", {"rows": numbers(2, 4, start=9)})
    return build.done(
        recipe={"verb": "golden", "seed": 3, "numbers": [1e-7, 1e-6, -0.5, 1e20, 1e21, 5e-324]}, over=("1" * 64, "2" * 64), notes={"made": "today", "é": "ü\n"}
    )


def routed(base: Base) -> Delta:
    """Ops beside a module whose change depends on the token, or on the row's task."""
    build = Builder(base)
    shapes = {"router": (3, 3), "A": (3, 1, 3), "B": (3, 4, 1)}
    build.put("@module/a", "mixture", {name: numbers(*shape, start=len(name)) for name, shape in shapes.items()}, scale=0.5, top_k=1)
    build.put("@module/a", "by_task", {"A": numbers(2, 1, 3, start=4), "B": numbers(2, 4, 1, start=9)}, tasks=["qa", "día"], scale=2.0)
    skills = {"A": numbers(3, 2, 4, start=6), "B": numbers(3, 2, 2, start=2), "Z": numbers(1, 2, 3, start=11)}
    build.put("@module/old", "by_task", skills)
    return build.done(recipe={"verb": "golden"})


DELTAS = (tiny, additive, factors, axes, relative, structure, references, pools, replay, flipped, live, routed)


def write_all(folder: Path) -> dict[str, str]:
    """Write every golden file into `folder`; return the ids by name."""
    write_base(folder / "base.safetensors")
    base = Base.open(folder / "base.safetensors")
    return {make.__name__: make(base).save(folder / f"{make.__name__}.safetensors") for make in DELTAS}


if __name__ == "__main__":
    for name, id in write_all(HERE).items():
        print(f'    "{name}": "{id}",')
