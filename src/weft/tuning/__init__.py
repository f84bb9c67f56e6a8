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
from ..engine.best import Best, direction
from ..engine.data import data_hash, read_rows
from ..engine.events import Events, PlainProgress, Progress
from ..engine.loop import Evaluate, Hooks, LoopConfig, Run, Summary, train
from ..engine.products import widened
from ..engine.quantizing import quantize as quantized
from ..engine.quantizing import require_kind
from ..engine.surroundings import default_device, processes, surroundings
from ..errors import InputError, UsageError, near
from ..names import NameMap
from ..ops import Generator
from ..stored import read_container, strict_json
from .objective import Objective, evaluation, head_tensors
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
    origin: Delta | str | Path | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    quantize: str | None = None,
    threads: int | None = None,
    tokenizer: Any = None,
    out: str | Path | None = None,
    save_every: int = 0,
    resume: str | Path | None = None,
    log: str | Path | None = None,
    log_to: Sequence[str] = (),
    progress: Progress | None = None,
    evaluate: Any = None,
    evaluate_every: int = 0,
    **params: Any,
) -> Delta:
    """Tune a base on data; returns the delta.

    base:       a `Base`, or what `Base.open` takes; with `Base.of(module)` that module is used and left as it was
    data:       a path, rows, or a dataset (see `weft.engine.data.read_rows`); each objective says which fields it reads
    method:     the space, what may change: lora, bitfit, full, ... (`weft methods tune` lists all five kinds)
    guards:     any number of guards
    on:         deltas that are active while training, in order; the new delta is made over them
    origin:     an earlier delta that the new one begins from, for the spaces that can (mhr); a parent of the new one, and not active itself
    seed:       of the head, of the start, of the order of the data and of dropout. The same seed, machine and thread count
                give the same id
    device:     default: what Accelerate finds; dtype: of the frozen model, default: the base's own (full tuning: float32)
    quantize:   "int8" or "nf4": the frozen model's linear modules in eight or four bits (see `weft.engine.quantizing`)
    threads:    of torch, for the time of the call
    tokenizer:  default: the base's
    out:        where to save the delta
    save_every: steps after which the state is written, to OUT.state; removed when the delta is there
    resume:     a state to go on from: the result is that of a run that was never interrupted, bit for bit
    log:        a file that events are added to, a JSON object a line (see `weft.engine.events`)
    log_to:     more places for events: "tensorboard:FOLDER", "wandb:PROJECT" (see `weft.engine.sinks`)
    progress:   called with every event; default: a line on stderr every 10 seconds
    evaluate:   data that the objective is measured on (loss, and for classes and tokens how many are right), given like `data`; or a
                function that is called with the run, in eval mode, and returns figures. They go to the log. With best=NAME of a
                figure the delta is that of the best evaluation, and patience=N ends the run after N without a better one
    evaluate_every: steps between evaluations; 0: after each epoch and after the last step
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
    begin = loaded([origin])[0] if origin is not None else None
    if begin is not None:
        if not getattr(chosen["space"].run, "takes_origin", False):
            raise UsageError(f"{method} does not begin from an earlier delta", hint="on=[DELTA] trains over it")
        begin.require_base(base, on=[delta.id for delta in before])
    rows = read_rows(data)
    tested = None if evaluate is None or callable(evaluate) else read_rows(evaluate)
    tokenizer = tokenizer if tokenizer is not None else _tokenizer(base)
    heard = bool(processes().is_main_process)  # one of several is enough
    with borrowing.threads(threads), _events(heard, log, progress, log_to) as events:
        goal: Objective = chosen["objective"].run(configs["objective"], base, tokenizer, rows)
        head: dict[str, Any] = {}
        if goal.adds_head and goal.architecture is not None:
            head = head_tensors(base, goal.architecture, goal.patch, Generator(xp.key(seed, _HEAD)), retrain=goal.retrains)
        build = Builder(base)
        for name, values in head.items():
            build.add(name, values, kind="replace" if name in base.tensors else "add")
        frame = replace(build.done(), config=dict(goal.patch))  # the structure that is trained, before the space adds to it
        live = bool(getattr(chosen["space"].run, "live", False))
        sharded = configs["loop"].shard and processes().num_processes > 1
        if sharded and (live or isinstance(base, LiveBase)):
            what = "a live model is used as it is" if isinstance(base, LiveBase) else f"{method} trains the weights themselves"
            raise UsageError(f"{what}, so it cannot be sharded", hint="-p shard=false")
        if quantize is not None:
            _require_quantizable(base, method, live)
            require_kind(quantize)
        model = _model(base, goal, [*before, frame], "float32" if live and dtype is None else dtype, device)

        measure, best = _evaluation(goal, configs["loop"], evaluate if tested is None else tested)

        def run_of(values: dict[str, nn.Parameter], loop: LoopConfig, hooks: Sequence[Hooks]) -> Run:
            made = chosen["optimizer"].run(values, configs["optimizer"])
            return Run(model, goal, values, made, partial(_factor, chosen["schedule"].run, configs["schedule"]), loop, seed, hooks)

        def trial(values: dict[str, nn.Parameter], steps: int) -> None:
            train(run_of(values, msgspec.structs.replace(configs["loop"], shard=False, **({"steps": steps} if steps else {})), ()), Events())

        names = NameMap.of(base, model, [*before, frame])
        computed: dict[str, Any] = (
            {} if quantize is None else {"quantize": quantized(model, quantize, {place.name for name in head for place in names.live(name)})}
        )
        if processes().num_processes > 1:
            computed["processes"] = processes().num_processes
        earlier = {} if resume is None else _found_before(Path(resume), base)
        job = Job(base, model, names, Generator(xp.key(seed, _DELTA)), head, goal, configs["loop"], trial, earlier, begin)
        with borrowing.borrowed(model), widened(model, configs["loop"].autocast):
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
                kept = Best(best, configs["loop"].patience, space.finish) if best else None
                if kept is not None:
                    hooks.append(kept)
                run = run_of(tensors, configs["loop"], hooks)
                recipe = _recipe(choices, guards, configs, seed, data_hash(rows), job.files, tokenizer, model) | computed
                if best:
                    recipe["evaluation"] = {"data": None if tested is None else data_hash(tested), "every": evaluate_every}
                identity = {"base": base.fingerprint, "over": [delta.id for delta in before], **({} if begin is None else {"origin": begin.id}), **recipe}
                summary = train(
                    run,
                    events,
                    state=state,
                    save_every=save_every,
                    resume=None if resume is None else Path(resume),
                    identity=identity,
                    evaluate=measure,
                    evaluate_every=evaluate_every,
                )
                delta = replace(
                    space.finish() if kept is None or kept.delta is None else kept.delta,
                    over=tuple(delta.id for delta in before),
                    parents=() if begin is None else (begin.id,),
                    config=dict(goal.patch),
                    recipe=recipe,
                    notes=_notes(summary, tensors, kept) | {name: value for hook in hooks for name, value in hook.notes().items()},
                )
            finally:
                for handle in reversed(active):
                    if not sharded:  # which cannot be undone: the model is not used again
                        detach(model, handle)
    if out is not None and heard:
        delta.save(out)
        delta = replace(delta, path=Path(out))
        if state is not None:
            state.unlink(missing_ok=True)
    return delta


def _require_quantizable(base: Base, method: str, live: bool) -> None:
    """UsageError where the model cannot be quantised for a run."""
    if live:
        raise UsageError(f"{method} trains the weights themselves, so they cannot be quantised", hint="--method lora, or leave out quantize")
    if isinstance(base, LiveBase):
        raise UsageError("a live model is used as it is, so it cannot be quantised", hint="open its checkpoint: Base.open(PATH)")
    if processes().num_processes > 1:
        raise UsageError("a quantised model is tuned in one process only", hint="leave out quantize, or start one process")


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


def _evaluation(goal: Objective, loop: LoopConfig, given: Any) -> tuple[Evaluate | None, str]:
    """What measures the run, and the figure that picks the delta ("": the last step does)."""
    if given is None:
        if loop.best or loop.patience:
            raise UsageError(f"{'best' if loop.best else 'patience'} needs an evaluation", hint="evaluate=DATA (--evaluate FILE)")
        return None, ""
    if loop.patience and not loop.best:
        raise UsageError("patience needs to know what must get better", hint=f"best={goal.measures[-1]}")
    name = direction(loop.best)[0] if loop.best else ""
    if callable(given):
        return given, loop.best
    if name and name not in goal.measures:
        raise UsageError(f"best={name}: the objective does not measure that{near(name, goal.measures, 'it measures')}")
    return evaluation(goal, given), loop.best


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


def _events(heard: bool, log: str | Path | None, progress: Progress | None, sinks: Sequence[str]) -> Events:
    return Events(log, progress or PlainProgress(), sinks) if heard else Events()


def _recipe(
    choices: Mapping[str, str],
    guards: Sequence[str],
    configs: Mapping[str, msgspec.Struct],
    seed: int,
    data: str,
    files: Mapping[str, str],
    tokenizer: Any,
    model: nn.Module,
) -> dict[str, Any]:
    """Everything that the result depends on. Of files that the space has read the hash of the rows, as of the data, and not where they lie."""
    parts: dict[str, Any] = {kind: {"name": name, **config.as_dict(configs[kind])} for kind, name in choices.items()}
    parts["space"] = {name: files.get(value, value) if isinstance(value, str) else value for name, value in parts["space"].items()}
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


def _notes(summary: Summary, tensors: Mapping[str, nn.Parameter], best: Best | None) -> dict[str, Any]:
    trained = sum(value.numel() for value in tensors.values())
    chosen = {} if best is None or best.delta is None else {"best": {"step": best.step, best.name: best.value}}
    return chosen | {"loss": summary.loss, "steps": summary.steps, "tokens": summary.tokens, "seconds": round(summary.seconds, 1), "parameters": trained}
