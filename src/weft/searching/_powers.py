"""Power laws fitted to measured losses: L(x_1, ..., x_k) = E + sum_i A_i x_i^-a_i.

The fit minimises the Huber loss of log L^ - log L (Hoffmann et al. 2022, arXiv 2203.15556), from several starts: exponents on a
grid, for each of which E and the A_i are a linear least-squares problem with no negative solution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from ..errors import InputError, WeftError

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_STARTS = (0.05, 0.15, 0.3, 0.5, 0.8, 1.3)
_REFINED = 4
"""Starts that are followed to the end."""

_STEEPEST = 5.0


@dataclass(frozen=True)
class Power:
    """A law: `floor` is E, `factors` and `exponents` are those of the terms, in the order of the columns of x."""

    floor: float
    factors: tuple[float, ...]
    exponents: tuple[float, ...]

    def __call__(self, x: Array) -> Array:
        """The loss at the rows of x (n x k)."""
        import numpy as np

        terms: Array = np.asarray(self.factors) * np.asarray(x, float) ** -np.asarray(self.exponents)
        out: Array = self.floor + terms.sum(1)
        return out

    @property
    def numbers(self) -> tuple[float, ...]:
        """All of them in one row: floor, factors, exponents."""
        return (self.floor, *self.factors, *self.exponents)


def fit(x: Array, loss: Array, *, delta: float = 1e-3, floor: bool = True, start: Power | None = None) -> Power:
    """The law nearest to `loss` (n) at x (n x k), all positive.

    delta: residuals of log L up to this count squared, larger ones by their size; floor: whether there is an E
    start: go on from this law alone, instead of from several starts

    Raises InputError where there are too few runs, or a column of x does not vary, so that nothing could be told apart.
    """
    import numpy as np

    x, loss = np.asarray(x, float), np.asarray(loss, float)
    unknowns = 2 * x.shape[1] + floor
    if len(loss) <= unknowns:
        raise InputError(f"a law of {unknowns} unknowns needs more than {unknowns} runs, got {len(loss)}", hint="more runs, or fewer variables")
    if not (np.isfinite(x).all() and np.isfinite(loss).all() and (x > 0).all() and (loss > 0).all()):
        raise InputError("a power law is fitted to positive numbers; some are zero, negative or not finite")
    flat = [column for column in range(x.shape[1]) if x[:, column].min() == x[:, column].max()]
    if flat:
        raise InputError(f"variable {flat[0] + 1} is the same in all runs, so its exponent cannot be known", hint="leave it out")
    middle = np.exp(np.log(x).mean(0))
    scaled = x / middle
    if start is not None:
        begun = [(start.floor, np.asarray(start.factors) * middle ** -np.asarray(start.exponents), np.asarray(start.exponents))]
    else:
        begun = _starts(scaled, loss, floor)
    found = [_refined(scaled, loss, each, delta, floor) for each in begun]
    cost, values = min(found, key=lambda each: each[0])
    if not np.isfinite(cost):
        raise WeftError("no power law was found: the fit did not converge from any start")
    k = x.shape[1]
    exponents = values[1 + k :]
    factors = np.exp(values[1 : 1 + k]) * middle**exponents
    return Power(float(values[0]), tuple(map(float, factors)), tuple(map(float, exponents)))


def _starts(x: Array, loss: Array, floor: bool) -> list[tuple[float, Array, Array]]:
    """(E, A, a) of the best exponents of a grid."""
    import numpy as np
    from scipy.optimize import nnls

    tried = []
    for exponents in product(_STARTS, repeat=x.shape[1]):
        columns = x ** -np.asarray(exponents)
        if floor:
            columns = np.column_stack([np.ones(len(x)), columns])
        solution, rest = nnls(columns / loss[:, None], np.ones(len(x)))
        lowest = solution[0] if floor else 0.0
        tried.append((float(rest), (float(lowest), solution[int(floor) :], np.asarray(exponents))))
    tried.sort(key=lambda each: each[0])
    return [start for _, start in tried[:_REFINED]]


def _refined(x: Array, loss: Array, start: tuple[float, Array, Array], delta: float, floor: bool) -> tuple[float, Array]:
    """(cost, [E, log A, a]) at the end of a descent."""
    import numpy as np
    from scipy.optimize import least_squares

    k = x.shape[1]
    logs, target = np.log(x), np.log(loss)

    def terms(values: Array) -> Array:
        out: Array = np.exp(values[1 : 1 + k] - values[1 + k :] * logs)
        return out

    def residuals(values: Array) -> Array:
        out: Array = np.log(values[0] + terms(values).sum(1)) - target
        return out

    def slopes(values: Array) -> Array:
        each = terms(values)
        whole = (values[0] + each.sum(1))[:, None]
        out: Array = np.concatenate([np.full((len(x), 1), float(floor)) / whole, each / whole, -each * logs / whole], 1)
        return out

    top = loss.min() if floor else 1e-12 * loss.min()
    low = np.concatenate([[0.0], np.full(k, -60.0), np.full(k, 1e-4)])
    high = np.concatenate([[top], np.full(k, 60.0), np.full(k, _STEEPEST)])
    first = np.concatenate([[min(start[0], top)], np.log(np.maximum(start[1], 1e-6 * loss.min())), start[2]])
    inside = 1e-6 * (high - low)
    first = np.clip(first, low + inside, high - inside)
    done = least_squares(residuals, first, slopes, bounds=(low, high), loss="huber", f_scale=delta, x_scale="jac", max_nfev=400)
    return float(done.cost), done.x


def bootstrap(x: Array, loss: Array, law: Power, *, samples: int, seed: int, delta: float = 1e-3, floor: bool = True) -> tuple[list[Power], Array]:
    """Laws fitted to `samples` redrawn sets of runs, and the residuals of log L that were drawn from.

    The runs stay where they are and get residuals of one another, made larger by sqrt(n / (n - unknowns)) for what the fit took up:
    a grid of sizes is chosen, not drawn, and leaving rows of a small one out would leave exponents unknown.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    predicted = law(x)
    rest = np.log(loss) - np.log(predicted)
    rest = (rest - np.median(rest)) * np.sqrt(len(loss) / (len(loss) - len(law.numbers) + (not floor)))
    laws = []
    for _ in range(samples):
        drawn = predicted * np.exp(rng.choice(rest, len(loss)))
        laws.append(fit(x, drawn, delta=delta, floor=floor, start=law))
    return laws, rest


def interval(values: Sequence[float] | Array, level: float) -> tuple[float, float]:
    """The middle share `level` of some values."""
    import numpy as np

    low, high = np.quantile(np.asarray(values, float), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
