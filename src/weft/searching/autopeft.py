"""autopeft: which layers to tune, in which space, and how large: what reaches most with the fewest parameters.

Objectives: the metric on held-out rows, and the number of trained parameters (or the bytes of the delta). A configuration says of each layer
and of each role (attention, mlp) whether it is tuned, names a space, and gives its size. Trials are cheap (`steps`); the configurations
that no other is better than in both are tuned once more with `final_steps` and fresh seeds, and are the result.

    --space FILE.yaml       layers: [0, 1, 2, 3]                      switched on and off one by one; default: all of the base
                            roles: [attention, mlp]                   likewise; any tokens that `targets` takes
                            spaces: {lora: {rank: [1, 2, 4, 8]}}      the spaces, and the options of each that are chosen
                            options: {lr: {low: 1e-4, high: 1e-2, log: true}}    options of tune that are chosen whatever the space

Where nothing else is said the sizes of a space are those that the catalogue suggests: a rank in powers of two, a density in tenths.

Not followed: one space a configuration instead of a serial adapter, a parallel adapter and a prefix at once, each with a size; the
paper's Gaussian process with a sparse prior and its expected hypervolume improvement (BoTorch) are Optuna's samplers here, of which `gp` is
the nearest and `tpe` the fastest. Its 200 trials, 20 by chance: -p trials=200 -p startup=20.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from .. import methods
from ..config import options as options_of
from ..errors import UsageError, near
from ..methods import method
from ._method import Report, Task
from ._study import Objective, Params
from ._study import choices as distributions
from ._trials import TrialsConfig, Tuning, searched

SIZES: dict[str, list[Any]] = {
    "rank": [1, 2, 4, 8, 16, 32, 64],
    "density": [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1],
    "k": [4, 16, 64, 256, 1024],
    "d": [50, 100, 200, 500, 1000, 2000, 5000],
}
"""Sizes to choose from, by the name of the option that sets them."""


class AutoPEFTConfig(TrialsConfig, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Options of AutoPEFT."""

    spaces: Annotated[tuple[str, ...], msgspec.Meta(description="spaces to choose from, where no file says it", min_length=1)] = ("lora", "apet")
    cost: Annotated[Literal["parameters", "bytes"], msgspec.Meta(description="what is to be small: trained entries, or the delta")] = "parameters"


@method("search", config=AutoPEFTConfig, paper="Zhou et al., 2024, arXiv:2301.12132", formula="Pareto set of (metric, cost) over layers x roles x space x size")
def autopeft(task: Task, cfg: AutoPEFTConfig) -> Report:
    """Layers, space and size of an update: the best metric for every number of parameters."""
    base, rows = task.tuned("autopeft")
    tuning = Tuning(task, base, rows, cfg)
    layers, roles, spaces, free = _space(task.space, cfg, tuning)
    choices = {f"layer.{number}": [True, False] for number in layers} | {f"role.{role}": [True, False] for role in roles if len(roles) > 1}
    choices |= {"space": list(spaces)} | {f"{name}.{option}": said for name, own in spaces.items() for option, said in own.items()} | free

    def options(params: Params) -> dict[str, Any] | None:
        where = [role for role in roles if params.get(f"role.{role}", True)]
        on = [number for number in layers if params[f"layer.{number}"]]
        targets = [f"{role}@{number}" for role in where for number in on] if layers else where
        if not targets:
            return None
        own = {f"space.{option}": params[f"{params['space']}.{option}"] for option in spaces[params["space"]]}
        return {"method": params["space"], "space.targets": targets, **own, **{name: params[name] for name in free}}

    def measure(delta: Any, tuning: Tuning) -> dict[str, float]:
        cost = delta.notes["parameters"] if cfg.cost == "parameters" else delta.nbytes
        return {**tuning.measured(delta, tuning.valid), cfg.cost: float(cost)}

    return searched(tuning, "autopeft", distributions(choices), [tuning.metric, Objective(cfg.cost)], options, measure)


def _space(said: Mapping[str, Any], cfg: AutoPEFTConfig, tuning: Tuning) -> tuple[list[int], list[str], dict[str, dict[str, Any]], dict[str, Any]]:
    """Layers, roles, the choices of each space, and those of tune: what is said, and the rest from the base and the catalogue."""
    known = ("layers", "roles", "spaces", "options")
    wrong = [f"{key}: no such part{near(key, known)}" for key in said if key not in known]
    spaces = dict(said.get("spaces") or dict.fromkeys(cfg.spaces))
    made: dict[str, dict[str, Any]] = {}
    for name, own in spaces.items():
        listed = {option.name for option in options_of(methods.get("space", name).config)}
        if "targets" not in listed:
            wrong.append(f"{name}: this space has no targets, so layers cannot be chosen for it")
        wrong += [f"{name}.{option}: no such option{near(option, listed)}" for option in own or {} if option not in listed]
        size = next((option for option in SIZES if option in listed), None)
        made[name] = dict(own) if own is not None else {size: SIZES[size]} if size else {}
    if wrong:
        raise UsageError("the search space cannot be", problems=wrong, hint="weft methods space")
    return list(said["layers"]) if "layers" in said else _layers(tuning), list(said.get("roles", ("attention", "mlp"))), made, dict(said.get("options") or {})


def _layers(tuning: Tuning) -> list[int]:
    from ..sites import all_sites

    return sorted({site.layer for site in all_sites(tuning.base.model()) if site.layer is not None})
