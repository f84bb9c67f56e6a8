"""The protocol of an op: one kind of change, defined once by `apply(w) -> w'`.

Everything else that a delta can do (attach, fold, revert, merge, save, test) is derived from `apply` and from the
facts an op declares about itself. To add an op: one file in this package named after its kind, one subclass of `Op`,
one instance called `OP`. The contract suite in `tests/contract` then tests it without another line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    import numpy as np

Array = Any
Shape = tuple[int, ...]
Config = Mapping[str, Any]
Tensors = Mapping[str, Array]


class Info(Protocol):
    """What `check` needs to know of a tensor: all from the header, no data."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> Shape: ...


class Generator:
    """Reproducible random arrays for `Op.init`: the same bits on every machine, each call a new stream."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._stream = 0

    def normal(self, shape: Sequence[int], std: float = 1.0) -> np.ndarray[Any, Any]:
        import numpy as np

        from .. import xp

        self._stream += 1
        numbers = xp.normals(np.zeros(0), xp.key(self.seed, self._stream), 0, prod(shape))
        return np.asarray(numbers * np.float32(std)).reshape(tuple(shape))

    def uniform(self, shape: Sequence[int], bound: float) -> np.ndarray[Any, Any]:
        """Uniform in [-bound, bound)."""
        import numpy as np

        from .. import xp

        self._stream += 1
        numbers = xp.uniforms(np.zeros(0), xp.key(self.seed, self._stream), 0, prod(shape))
        return np.asarray((2 * numbers - 1) * bound).astype(np.float32).reshape(tuple(shape))

    def permutation(self, size: int) -> np.ndarray[Any, Any]:
        import numpy as np

        return np.argsort(self.uniform((size,), 1.0), kind="stable").astype(np.int64)


def spread(shape: Shape, axis: int) -> Shape:
    """The shape that broadcasts a vector along `axis` of a tensor of `shape`."""
    return tuple(size if k == axis % len(shape) else 1 for k, size in enumerate(shape))


def flat_shape(shape: Shape) -> tuple[int, int]:
    """A tensor as a matrix: first axis by all the others (a vector is one column)."""
    return (shape[0], prod(shape[1:])) if shape else (1, 1)


class Op:
    """Base of all ops. Subclasses are stateless; all state is in `t` (tensors by field) and `cfg`."""

    kind: ClassVar[str]
    """The name in files."""
    fields: ClassVar[tuple[str, ...]] = ()
    """Fields that must be there."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Fields that may be there."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """Config keys with their defaults; the default's type is the key's type."""
    on: ClassVar[str] = "weight"
    """What it changes: "weight" (a checkpoint tensor: foldable), "module" or "input" (at run time only)."""
    additive: ClassVar[bool] = False
    """apply(w) - w does not depend on w and is proportional to cfg["scale"]."""
    by_rows: ClassVar[bool] = False
    """Rows of apply(w) depend only on the same rows of w (the first axis); `rows` then gives the parts. See `streams`."""
    row_fields: ClassVar[frozenset[str]] = frozenset()
    """With `by_rows`: the fields whose own first axis follows the rows; the others are used whole."""
    raw: ClassVar[bool] = False
    """Works on stored values of any dtype, without arithmetic (`assign`)."""
    first: ClassVar[bool] = False
    """Must be the first op on its tensor: it speaks of the base's own stored values (`xor`)."""
    trainable: ClassVar[tuple[str, ...] | None] = None
    """Fields with gradients; None means every floating-point field."""
    drops: ClassVar[bool] = False
    """Whether `forward` drops entries of its input while training (`ctx.drop`)."""
    identity_at_init: ClassVar[bool] = True
    """Whether apply(w, init(...)) is w, bit for bit."""

    # --- meaning

    def apply(self, w: Array, t: Tensors, cfg: Config) -> Array:
        """THE definition. w float32 (or float64) in, the same dtype and shape out; never in place."""
        raise NotImplementedError

    def forward(self, m: Any, x: Any, y: Any, t: Tensors, cfg: Config, ctx: Any) -> Any:
        """The same on activations: from module m's input x and output y so far, the new output.

        Called only where `fast(m, param, cfg)` is true, or for ops on modules and inputs. `ctx.param` names the
        parameter changed; see `weft.attaching.Context` for the rest.
        """
        raise NotImplementedError

    def fast(self, m: Any, param: str, cfg: Config) -> bool:
        """Whether `forward` is available for this module and parameter, and may be chained with others."""
        return False

    # --- facts from headers

    def check(self, shape: Shape, cfg: Config, t: Mapping[str, Info]) -> None:
        """Raise ValueError (field, expected, got) unless the tensors fit a target of `shape`."""
        raise NotImplementedError

    def check_stored(self, dtype: str, cfg: Config, t: Mapping[str, Info]) -> None:
        """For `raw` ops: raise ValueError unless the op fits a target stored as `dtype`."""

    def init(self, shape: Shape, gen: Generator) -> dict[str, np.ndarray[Any, Any]]:
        """Tensors to start from, for a target of `shape`; ops may take more keyword arguments (rank, ...)."""
        raise NotImplementedError

    def streams(self, shape: Shape, cfg: Config) -> bool:
        """Whether `rows` may be used with this config."""
        return self.by_rows

    def rows(self, t: Mapping[str, Any], cfg: Config, shape: Shape, lo: int, hi: int) -> tuple[dict[str, Array], Config]:
        """Tensors and config that make `apply` right for rows lo..hi alone. `t` holds `weft.stored.Tensor`s."""
        return {f: v.rows(lo, hi) if f in self.row_fields else v.read() for f, v in t.items()}, cfg

    def example(self, shape: Shape, gen: Generator) -> dict[str, np.ndarray[Any, Any]]:
        """Tensors that change w: `init` with every number drawn at random. Tests and documentation use it."""
        return {f: gen.normal(v.shape, 0.5) if v.dtype.kind == "f" else v for f, v in self.init(shape, gen).items()}

    def check_values(self, shape: Shape, cfg: Config, t: Tensors) -> None:
        """Raise ValueError for numbers that no writer makes (positions outside the target, ...). `t` holds only index fields."""

    # --- shared by all ops

    def config(self, cfg: Config) -> dict[str, Any]:
        """cfg with defaults filled in; ValueError for unknown keys or wrong types."""
        out = dict(self.defaults)
        for name, value in cfg.items():
            if name not in self.defaults:
                raise ValueError(f"unknown config key {name!r}; {self.kind} has {sorted(self.defaults) or 'none'}")
            want = type(self.defaults[name])
            if want is float and type(value) is int:
                value = float(value)
            if type(value) is not want:
                raise ValueError(f"config {name!r} must be {want.__name__}, got {value!r}")
            out[name] = value
        return out

    def validate(self, shape: Shape, cfg: Config, t: Mapping[str, Info]) -> None:
        """All checks on one entry: config, which fields are there, then the op's own `check`. Raises ValueError."""
        full = self.config(cfg)
        missing, extra = set(self.fields) - set(t), set(t) - set(self.fields) - set(self.optional)
        if missing or extra:
            raise ValueError(f"fields {sorted(missing)} are missing" if missing else f"fields {sorted(extra)} are unknown")
        self.check(shape, full, t)


def check_positions(index: Array, size: int) -> None:
    """ValueError unless the flat positions are sorted, unique and inside a target of `size` entries."""
    if index.size and (index.min() < 0 or index.max() >= size or not (index[1:] > index[:-1]).all()):
        raise ValueError(f"field index: positions must be sorted, unique and within 0..{size - 1}")


def expect_positions(t: Mapping[str, Info], size: int) -> Shape:
    """Check the shape and dtype of the field `index`, flat positions in a target of `size` entries; return its shape."""
    shape = expect(t, "index", [None], "index")
    if shape[0] > size:  # a coded tensor of a few bytes can claim any number of them
        raise ValueError(f"field index: {shape[0]:,} positions in a target of {size:,} entries")
    return shape


def expect(t: Mapping[str, Info], field: str, shape: Sequence[int | None], kind: str = "float") -> Shape:
    """Check one field's shape (None: any size) and dtype class ("float" or "index"); return its shape."""
    from ..stored import FLOATS

    info = t[field]
    if len(info.shape) != len(shape) or any(want is not None and want != got for want, got in zip(shape, info.shape, strict=True)):
        wanted = ", ".join("any" if s is None else str(s) for s in shape)
        raise ValueError(f"field {field}: expected shape [{wanted}], got {list(info.shape)}")
    if info.dtype not in (("I64", "I32") if kind == "index" else FLOATS):
        raise ValueError(f"field {field}: expected {'I64 or I32' if kind == 'index' else 'floating point'} values, got {info.dtype}")
    return info.shape
