"""The report of a check: tasks with both sides and what became of each row, who was compared, and a summary in plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp, fsum, isfinite
from typing import TYPE_CHECKING, Any

from .tasks import Task

if TYPE_CHECKING:
    from ..delta import Delta
    from .measuring import Measured


def told(task: Task, base: Measured, delta: Measured, samples: int, seed: int, examples: int) -> dict[str, Any]:
    """One task of the report, from what both sides said. At most `examples` of its rows are shown."""
    from .flips import count, outcome

    outcomes: list[str | None] = [
        None if was is None or now is None else outcome(was, now, before == after)
        for was, now, before, after in zip(base.right, delta.right, base.answers, delta.answers, strict=True)
    ]
    judged = [each for each in outcomes if each is not None]
    shown: Sequence[str | None] = outcomes
    against = None
    if task.kind in ("agreement", "generation"):
        same = [before == after for before, after in zip(base.answers, delta.answers, strict=True)]
        if task.kind == "agreement":
            shown = ["same" if each else "different" for each in same]
        kl = delta.kl
        against = {
            "agreement": sum(same) / len(same) if base.finite and delta.finite else None,
            "kl_mean": _finite(fsum(kl) / len(kl)) if kl else None,
            "kl_max": _finite(max(kl, key=lambda value: (value != value, value))) if kl else None,
            "kl_rows": len(kl),
        }
    before, after = base.metrics(task), delta.metrics(task)
    return {
        "name": task.name,
        "kind": task.kind,
        "n": len(task.rows),
        "metrics": {
            name: {"base": _finite(before[name]), "delta": _finite(after[name]), "change": _finite(after[name] - before[name]), "better": better}
            for name, better in task.metrics.items()
        },
        "flips": count(judged, samples=samples, seed=seed) if judged else None,
        "against_base": against,
        "ratio": _ratio(base, delta) if task.kind == "text" else None,
        "examples": _examples(task, base, delta, shown, examples),
        "truncated": max(base.truncated, delta.truncated),
        "finite": base.finite and delta.finite,
    }


def _finite(value: float) -> float | None:
    """A figure as a JSON value."""
    return value if isfinite(value) else None


def _ratio(base: Measured, delta: Measured) -> dict[str, float | None]:
    """Perplexity of the delta's side over the base's: mean and median over rows, and of all tokens together."""
    from statistics import median

    def ratio(log: float) -> float:
        return exp(log) if log < 700 else float("inf")

    rows = [ratio((after - before) / tokens) for before, after, tokens in zip(base.nll, delta.nll, base.tokens, strict=True)]
    pooled = ratio((fsum(delta.nll) - fsum(base.nll)) / sum(base.tokens))
    if not (base.finite and delta.finite):
        return {"mean": None, "median": None, "pooled": None}
    return {"mean": _finite(fsum(rows) / len(rows)), "median": _finite(median(rows)), "pooled": _finite(pooled)}


_FIRST = ("negative", "positive", "changed", "different")


def _examples(task: Task, base: Measured, delta: Measured, outcomes: Sequence[str | None], most: int) -> list[dict[str, Any]]:
    """Rows with both answers: flips and changed answers first, then the others as they come."""
    order = sorted(range(len(outcomes)), key=lambda k: (_FIRST.index(found) if (found := outcomes[k]) in _FIRST else len(_FIRST), k))
    asked = "text" if task.kind == "classification" else "prompt"
    return [
        {
            "row": task.numbers[k],
            "prompt": task.rows[k][asked],
            "expected": base.expected[k],
            "base": base.answers[k],
            "delta": delta.answers[k],
            "outcome": outcomes[k],
        }
        for k in order[:most]
    ]


def about(delta: Delta, name: str) -> dict[str, Any]:
    """Which delta was checked, and how it was made."""
    made = {key: delta.recipe.get(key) for key in ("verb", "method")}
    return {"id": delta.id, "name": name, **made, "targets": len(delta.entries), "nbytes": delta.nbytes, "parents": list(delta.parents)}


def versions() -> dict[str, str]:
    """What the figures were computed with."""
    import platform
    from importlib.metadata import version

    from .. import __version__

    return {"weft": __version__, "python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers", "numpy")}}


def summary(gates: Sequence[Mapping[str, Any]], tasks: Sequence[Mapping[str, Any]], layers: Sequence[Mapping[str, Any]], cuts: Mapping[str, int]) -> str:
    """The report in a few plain sentences."""
    said = []
    failed = [gate for gate in gates if not gate["passed"]]
    if failed:
        first = failed[0]
        value = "no number" if first["value"] is None else f"{first['value']:.4g}"
        said.append(f"{len(failed)} of {len(gates)} limits not kept: {first['where']}, {first['metric']} is {value}, limit {first['limit']}.")
    elif gates:
        said.append(f"All {len(gates)} limits are kept." if len(gates) > 1 else "The limit is kept.")
    else:
        said.append("No limits were set.")
    if broken := [task["name"] for task in tasks if not task["finite"]]:
        said.append(f"The model's output is not finite on {', '.join(broken)}.")
    if wild := [layer["target"] for layer in layers if not layer["finite"]]:
        said.append(f"Changed tensors with entries that are not finite: {len(wild)}, {wild[0]} for one.")
    if not broken:
        said.append(_effect(tasks))
    if cuts:
        listed = ", ".join(f"{count:,} of {name}" for name, count in cuts.items())
        said.append(f"Right answers that go on after a stop text, and are compared only up to it: {listed}.")
    return " ".join(said)


def _effect(tasks: Sequence[Mapping[str, Any]]) -> str:
    """What the delta did to the answers, in one sentence."""
    from .flips import OUTCOMES, bound

    if not any(map(_differs, tasks)):
        return "The delta changes nothing on this data: every answer and every figure is as before."
    flips = [task["flips"] for task in tasks if task["flips"]]
    parts = []
    if flips:
        rows = sum(flip[name] for flip in flips for name in OUTCOMES)
        negative, positive = (sum(flip[name] for flip in flips) for name in ("negative", "positive"))
        parts.append(f"of {rows:,} answers {positive:,} became right and {negative:,} wrong")
        if not negative and (right := sum(flip["both_right"] for flip in flips)):  # only what was right can be lost
            parts[-1] += f" (of answers like the {right:,} that were right, less than {bound(right):.2g} are lost, with 95 % confidence)"
    parts += [f"perplexity on {task['name']} is {task['ratio']['pooled']:#.5g} times the base's" for task in tasks if task["ratio"] and task["ratio"]["pooled"]]
    parts += [f"{task['against_base']['agreement']:.1%} of the answers to {task['name']} are the base's" for task in tasks if task["kind"] == "agreement"]
    text = "; ".join(parts) or "the figures changed"
    return f"{text[0].upper()}{text[1:]}."


def _differs(task: Mapping[str, Any]) -> bool:
    """Whether anything that was measured changed."""
    against, flips = task["against_base"], task["flips"]
    return (
        any(metric["change"] != 0 for metric in task["metrics"].values())
        or bool(flips and (flips["negative"] or flips["positive"] or flips["changed"]))
        or bool(against and (against["agreement"] < 1 or against["kl_max"]))
    )
