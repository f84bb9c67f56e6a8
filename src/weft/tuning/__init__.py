"""tune: space x objective x optimizer x schedule x guards, each chosen by name.

delta = tune(base, "train.jsonl", method="lora", objective="classification", rank=16)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from .. import config, methods, xp
from ..attaching import attach, detach, probe
from ..base import Base, LiveBase
from ..delta import Builder, Delta, loaded
from ..engine import borrowing
from ..engine.data import data_hash, read_rows
from ..engine.events import Events, PlainProgress, Progress
from ..engine.loop import Evaluate, Hooks, LoopConfig, Run, Summary, train
from ..engine.surroundings import default_device, surroundings
from ..errors import InputError, UsageError
from ..names import NameMap
from ..ops import Generator
from ..stored import read_container, strict_json
from .objective import Objective, head_tensors
from .space import Job, Space

__all__ = ["tune"]

_HEAD, _DELTA = 1, 2
"""Streams of random numbers, so that a head starts the same in every space."""


def tune(
    base: Base | str | Path,
    data: Any,
    *,
    method: str = "lora",
    objective: str = "causal-lm",
    optimizer: str = "adamw",
    schedule: str = "linear",
    guards: Sequence[str] = (),
    on: Sequence[Delta | str | Path] = (),
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    threads: int | None = None,
    tokenizer: Any = None,
    out: str | Path | None = None,
    save_every: int = 0,
    resume: str | Path | None = None,
    log: str | Path | None = None,
    progress: Progress | None = None,
    evaluate: Evaluate | None = None,
    evaluate_every: int = 0,
    **params: Any,
) -> Delta:
    """Tune a base on data; returns the delta.

    base:       a `Base`, or what `Base.open` takes; with `Base.of(module)` that module is used and left as it was
    data:       a path, rows, or a dataset (see `weft.engine.data.read_rows`); each objective says which fields it reads
    method:     the space, what may change: lora, bitfit, full, ... (`weft methods tune` lists all five kinds)
    guards:     any number of guards
    on:         deltas that are active while training, in order; the new delta is made over them
    seed:       of the head, of the start, of the order of the data and of dropout. The same seed, machine and thread count
                give the same id
    device:     default: what Accelerate finds; dtype: of the frozen model, default: the base's own (full tuning: float32)
    threads:    of torch, for the time of the call
    tokenizer:  default: the base's
    out:        where to save the delta
    save_every: steps after which the state is written, to OUT.state; removed when the delta is there
    resume:     a state to go on from: the result is that of a run that was never interrupted, bit for bit
    log:        a file that events are added to, a JSON object a line (see `weft.engine.events`)
    progress:   called with every event; default: a line on stderr every 10 seconds
    evaluate:   called with the run every `evaluate_every` steps, in eval mode; returns figures for the log
    params:     options of the chosen configs and of the loop (`weft.engine.loop.LoopConfig`), by name: rank=16, epochs=1. Where
                several have one, by part: `**{"optimizer.lr": 1e-3}`; the parts are space, objective, optimizer, schedule, loop
                and the guards' names. Text is read as on the command line.

    Raises UsageError (all wrong options at once), InputError, MismatchError, and WeftError if training fails.
    """
    choices = {"space": method, "objective": objective, "optimizer": optimizer, "schedule": schedule}
    chosen = {kind: methods.get(kind, name) for kind, name in choices.items()}
    chosen |= {name: methods.get("guard", name) for name in guards}
    configs = _configs({part: found.config for part, found in chosen.items()} | {"loop": LoopConfig}, params)
    if "lr" in configs["optimizer"].__struct_fields__ and configs["optimizer"].lr is None:
        configs["optimizer"] = msgspec.structs.replace(configs["optimizer"], lr=chosen["space"].run.lr)  # type: ignore[attr-defined]
    state = Path(resume) if resume is not None else Path(f"{out}.state") if out is not None else None
    if threads is not None and threads < 1:
        raise UsageError(f"threads must be at least 1, got {threads}")
    if save_every and state is None:
        raise UsageError("save_every needs a place for the state", hint="give out=...: the state is kept next to it")
    if out is not None and Path(out).suffix != ".safetensors":
        raise UsageError(f"{out}: a delta is one .safetensors file", hint=f"out={Path(out).with_suffix('.safetensors')}")
    base = base if isinstance(base, Base) else Base.open(base)
    before = loaded(on)
    rows = read_rows(data)
    tokenizer = tokenizer if tokenizer is not None else _tokenizer(base)
    heard = _main_process()  # one of several processes is enough
    with borrowing.threads(threads), Events(log if heard else None, (progress or PlainProgress()) if heard else None) as events:
        goal: Objective = chosen["objective"].run(configs["objective"], base, tokenizer, rows)
        head: dict[str, Any] = {}
        if goal.adds_head and goal.architecture is not None:
            head = head_tensors(base, goal.architecture, goal.patch, Generator(xp.key(seed, _HEAD)), retrain=goal.retrains)
        build = Builder(base)
        for name, values in head.items():
            build.add(name, values, kind="replace" if name in base.tensors else "add")
        frame = replace(build.done(), config=dict(goal.patch))  # the structure that is trained, before the space adds to it
        live = bool(getattr(chosen["space"].run, "live", False))
        model = _model(base, goal, [*before, frame], "float32" if live and dtype is None else dtype, device)

        def run_of(values: dict[str, nn.Parameter], loop: LoopConfig, hooks: Sequence[Hooks]) -> Run:
            made = chosen["optimizer"].run(values, configs["optimizer"])
            return Run(model, goal, values, made, partial(_factor, chosen["schedule"].run, configs["schedule"]), loop, seed, hooks)

        def trial(values: dict[str, nn.Parameter], steps: int) -> None:
            train(run_of(values, msgspec.structs.replace(configs["loop"], **({"steps": steps} if steps else {})), ()), Events())

        earlier = {} if resume is None else _found_before(Path(resume), base)
        job = Job(base, model, NameMap.of(base, model, [*before, frame]), Generator(xp.key(seed, _DELTA)), head, goal, configs["loop"], trial, earlier)
        with borrowing.borrowed(model):
            active = attach(model, before, base=base)
            try:
                if live:
                    job.fill()
                space: Space = chosen["space"].run(configs["space"], job)
                space.build(build)
                if not live:
                    job.delta = build.done(config=dict(goal.patch), over=tuple(delta.id for delta in before))
                    job.handle = attach(model, job.delta, base=base, trainable=True, names=job.names)
                    active.append(job.handle)
                tensors = space.tensors()
                for value in tensors.values():
                    value.requires_grad_(True)
                goal.check(model)
                _try_out(model, goal, next(iter(tensors.values())).device)
                hooks: list[Hooks] = [space, *(chosen[name].run(configs[name], job, space) for name in guards)]
                run = run_of(tensors, configs["loop"], hooks)
                recipe = _recipe(choices, guards, configs, seed, data_hash(rows), tokenizer, model)
                identity = {"base": base.fingerprint, "over": [delta.id for delta in before], **recipe}
                summary = train(
                    run,
                    events,
                    state=state,
                    save_every=save_every,
                    resume=None if resume is None else Path(resume),
                    identity=identity,
                    evaluate=evaluate,
                    evaluate_every=evaluate_every,
                )
                delta = replace(
                    space.finish(),
                    over=tuple(delta.id for delta in before),
                    config=dict(goal.patch),
                    recipe=recipe,
                    notes=_notes(summary, tensors),
                )
            finally:
                for handle in reversed(active):
                    detach(model, handle)
    if out is not None and heard:
        delta.save(out)
        delta = replace(delta, path=Path(out))
        if state is not None:
            state.unlink(missing_ok=True)
    return delta


def _try_out(model: nn.Module, goal: Objective, device: torch.device) -> None:
    """One forward before training: every attached op must run, or its tensors would be trained for nothing."""
    batch = goal.collate(goal.examples[:4], range(len(goal.examples[:4])))
    batch = {name: value.to(device) for name, value in batch.items()}

    def forward() -> None:
        with torch.no_grad():
            goal.loss(model, batch)

    probe(model, forward)


def _configs(types: Mapping[str, type[msgspec.Struct]], params: Mapping[str, Any]) -> dict[str, Any]:
    """A config of each type, with `params` shared out over them; one UsageError with everything that is wrong."""
    shared, wrong = config.share([f"{key}={value}" for key, value in params.items()], types)
    plain = {key.replace("-", "_"): value for key, value in params.items()}
    made = {}
    for part, kind in types.items():
        values = {name: plain.get(name, plain.get(f"{part.replace('-', '_')}.{name}")) for name in shared[part]}
        try:
            made[part] = config.make(kind, values, part)
        except UsageError as error:
            wrong += [f"{part}.{problem}" for problem in error.problems]
    if wrong:
        raise UsageError(f"tune: {len(wrong)} option{'s' * (len(wrong) != 1)} that cannot be", problems=wrong, hint="weft methods tune")
    return made


def _factor(schedule: Any, cfg: msgspec.Struct, step: int, total: int) -> float:
    return float(schedule(step, total, cfg))


def _tokenizer(base: Base) -> Any:
    """The base's tokenizer, or None: some data needs none."""
    try:
        return base.tokenizer()
    except InputError:
        return None


def _model(base: Base, goal: Objective, deltas: Sequence[Delta], dtype: str | torch.dtype | None, device: str | torch.device | None) -> nn.Module:
    if isinstance(base, LiveBase):
        known = type(base.module).__name__
        if deltas[-1].entries or (goal.architecture or known) != known:
            raise UsageError(f"the objective needs a {goal.architecture}, but the base is a live {known}", hint="open its checkpoint: Base.open(PATH)")
        return base.module
    return base.model(deltas, dtype=dtype, device=default_device() if device is None else device, auto_class=goal.architecture)


def _found_before(path: Path, base: Base) -> dict[str, torch.Tensor]:
    """What the space kept in the state of a run on the same base; whether it may be gone on from is for the loop to say."""
    stored, metadata = read_container(path)
    identity = strict_json(metadata.get("weft_state", "{}"), str(path)).get("identity", {})
    if identity.get("base") != base.fingerprint:
        return {}
    return {name.removeprefix("hook/0/"): xp.to_torch(value.read()) for name, value in stored.items() if name.startswith("hook/0/")}


def _main_process() -> bool:
    from accelerate import PartialState

    return bool(PartialState().is_main_process)


def _recipe(
    choices: Mapping[str, str],
    guards: Sequence[str],
    configs: Mapping[str, msgspec.Struct],
    seed: int,
    data: str,
    tokenizer: Any,
    model: nn.Module,
) -> dict[str, Any]:
    """Everything that the result depends on."""
    parts: dict[str, Any] = {kind: {"name": name, **config.as_dict(configs[kind])} for kind, name in choices.items()}
    parts["guards"] = [{"name": name, **config.as_dict(configs[name])} for name in guards]
    parts["loop"] = config.as_dict(configs["loop"])
    return {
        "verb": "tune",
        "method": choices["space"],
        "config": parts,
        "seed": seed,
        "data": data,
        **surroundings(model, tokenizer),
    }


def _notes(summary: Summary, tensors: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    trained = sum(value.numel() for value in tensors.values())
    return {"loss": summary.loss, "steps": summary.steps, "tokens": summary.tokens, "seconds": round(summary.seconds, 1), "parameters": trained}
