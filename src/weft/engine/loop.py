"""The training loop: batches, gradients, hooks, events, and states from which a run goes on exactly.

What is trained is a dict of parameters; what they belong to is not the loop's business. Whatever is random at step k
depends on the seed and k alone: the batches, and torch's generators, which are seeded anew at each step. So the state of
a run is its tensors, the optimizer's, the hooks' and the number of steps done, and k + k steps equal 2k bit for bit on
the same machine with the same thread count.

Accelerate carries the loop over several processes: `batch_size` is what all of them see together, each gets its share.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import msgspec
import torch
from torch import nn

from .. import canon, xp
from .._write import atomic_file
from ..errors import FormatError, MismatchError, UsageError, WeftError
from ..file import container_header
from ..stored import hold, read_container, strict_json
from .checkpointing import checkpointed
from .data import Example, batches
from .events import Events
from .memory import forget_peak, peak_memory, trim
from .products import products
from .sharding import shard
from .surroundings import processes

Batch = dict[str, torch.Tensor]

_STATE = "weft_state"
_TRIM_EVERY = 10
_RECENT = 20
"""Steps over which the final loss is averaged."""


class LoopConfig(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """How long to train, and how much at a time."""

    epochs: Annotated[float, msgspec.Meta(description="passes over the data", gt=0)] = 3.0
    steps: Annotated[int, msgspec.Meta(description="optimizer steps, instead of epochs; 0: as many as the epochs need", ge=0)] = 0
    batch_size: Annotated[int, msgspec.Meta(description="examples for each optimizer step, over all devices", ge=1)] = 32
    micro_batch_size: Annotated[int, msgspec.Meta(description="examples that pass through the model at once; 0: the whole batch", ge=0)] = 0
    clip: Annotated[float, msgspec.Meta(description="largest norm of the gradient; longer ones are shortened; 0: never", ge=0)] = 1.0
    autocast: Annotated[bool, msgspec.Meta(description="compute in bfloat16, keep float32 weights")] = False
    matmul: Annotated[
        Literal["", "high", "medium"], msgspec.Meta(description="float32 products in torch's faster ways, with the error that the log tells; empty: exact")
    ] = ""
    bucket: Annotated[bool, msgspec.Meta(description="put examples of like length into one batch")] = True
    checkpointing: Annotated[bool, msgspec.Meta(description="compute activations again in the backward pass: less memory, a third more time")] = False
    shard: Annotated[bool, msgspec.Meta(description="with several processes: each keeps only its share of the frozen weights (FSDP2)")] = False
    best: Annotated[str, msgspec.Meta(description="figure of the evaluation that picks the delta: loss, accuracy, +NAME (more is better), -NAME")] = ""
    patience: Annotated[int, msgspec.Meta(description="evaluations in a row without a better one after which the run ends; 0: never", ge=0)] = 0


class Objective(Protocol):
    """What the loop needs of an objective (see `weft.tuning.objective`)."""

    examples: Sequence[Example]

    def collate(self, examples: Sequence[Example], keys: Sequence[int]) -> Batch: ...
    def weight(self, batch: Batch) -> float: ...
    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor: ...


@dataclass(frozen=True, eq=False)
class Part:
    """A micro-batch of a step, on the run's device. `share`: how much of the step's loss is its; over all parts and processes they sum to one."""

    batch: Batch
    share: float


class Stages:
    """The moments at which others take part in a step, in their order. Every method may be left as it is.

    An optimizer that needs more than gradients is a `Stages` as well as a torch Optimizer; the loop then calls it before the hooks.
    What it keeps is in its `state` and `param_groups`, which the loop saves anyway, in the dtypes of the tensors (torch loads them so).
    It may also ask for larger batches (`run.width`) and for smaller micro-batches (`run.pieces`), make more gradients of the
    same step (`backward`, `settle`), and add up over processes (`run.summed`).
    """

    def start(self, run: Run) -> None:
        """Before the first step, after the state of an earlier run has been loaded."""

    def batches(self, run: Run, parts: Sequence[Part]) -> None:
        """Before the gradients, with what this process makes them of."""

    def loss(self, run: Run, batch: Batch) -> torch.Tensor | None:
        """A term to add to the loss of this batch (of each micro-batch; the shares sum to one)."""
        return None

    def gradients(self, run: Run) -> None:
        """After the backward pass and before clipping: `.grad` of `run.tensors` may be changed."""

    def after_step(self, run: Run) -> None:
        """After the optimizer's step: `run.step` counts it already."""

    def evaluated(self, run: Run, figures: Mapping[str, float]) -> None:
        """After an evaluation. `run.stopped = REASON` ends the run."""

    def end(self, run: Run) -> None:
        """After the last step."""

    def close(self, run: Run) -> None:
        """At the very end, whatever happened: what was put on the model is taken off."""


class Hooks(Stages):
    """Where spaces and guards take part in the loop.

    What a hook keeps between steps goes through `state` and `load`, or resuming is not exact. A hook that draws random
    numbers may use torch's generators, or one made from `run.key`.
    """

    def state(self) -> dict[str, torch.Tensor]:
        """What must be kept to go on from here."""
        return {}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Take back what `state` gave."""

    def notes(self) -> dict[str, Any]:
        """What is worth saying of the run afterwards, as JSON values: it goes into the notes of the delta."""
        return {}


@dataclass
class Run:
    """A training run. `tensors` is what is trained, by name; `factor(place, total)` multiplies each group's learning rate.

    step:  optimizer steps done; loss: that of the last one
    place: batches of `batch_size` done; a run ends when there have been `total`
    width: how many batches one step takes, 1 unless an optimizer asks for more. No step reaches over the end of an epoch
    pieces: the fewest micro-batches that a step is cut into
    stopped: why the run ends before its last step, if it does
    """

    model: nn.Module
    objective: Objective
    tensors: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    factor: Callable[[int, int], float]
    config: LoopConfig
    seed: int = 0
    hooks: Sequence[Hooks] = ()
    step: int = 0
    place: int = 0
    width: int = 1
    pieces: int = 1
    loss: float = math.nan
    stopped: str = ""
    total: int = field(init=False)
    per_epoch: int = field(init=False)
    wrapped: nn.Module = field(init=False)
    """The model as several processes train it together; the model itself where there is one."""
    accelerator: Any = field(init=False)

    def __post_init__(self) -> None:
        self.per_epoch = math.ceil(len(self.objective.examples) / self.config.batch_size)
        self.total = self.config.steps or max(1, round(self.config.epochs * self.per_epoch))
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    @property
    def key(self) -> int:
        """A 64-bit key for what is random at this step."""
        return xp.key(self.seed, self.step)

    @property
    def sharded(self) -> bool:
        """Whether the frozen weights lie in parts on several processes; the loop then averages gradients itself."""
        return self.config.shard and self.accelerator.num_processes > 1

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    @property
    def planned(self) -> int:
        """Steps in all, if batches stay as large as they are."""
        return self.step + math.ceil((self.total - self.place) / self.width)

    @property
    def stages(self) -> list[Stages]:
        """All that take part, in order: an optimizer sees gradients as the batches give them."""
        return [*([self.optimizer] if isinstance(self.optimizer, Stages) else []), *self.hooks]

    def autocast(self) -> torch.autocast:
        """The precision of a forward pass, as a context."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.autocast)

    def said(self, value: float) -> float:
        """What the first process says: for decisions that all must take alike."""
        if self.accelerator.num_processes == 1:
            return value
        return float(self.summed(torch.tensor(value if self.accelerator.is_main_process else 0.0, dtype=torch.float64, device=self.device)))

    def summed(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all processes."""
        total: torch.Tensor = self.accelerator.reduce(value, "sum")
        return total


@dataclass(frozen=True)
class Summary:
    """What a run came to: the loss averaged over the last steps (20 at most), steps in all, tokens and seconds of this session."""

    loss: float
    steps: int
    tokens: int
    seconds: float


Evaluate = Callable[[Run], Mapping[str, float]]


def train(
    run: Run,
    events: Events,
    *,
    state: Path | None = None,
    save_every: int = 0,
    resume: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    evaluate: Evaluate | None = None,
    evaluate_every: int = 0,
) -> Summary:
    """Train `run.tensors` for `run.total` steps.

    state, save_every: where to keep the state, and after how many steps to write it (0: never)
    resume:            a state to go on from; MismatchError if it belongs to another `identity`
    evaluate:          called every `evaluate_every` steps (0: after each epoch and the last step) with the model in eval mode; its figures go
                       to the event log and to the hooks

    Raises WeftError when the loss or the gradient is not finite: the tensors are then of no use, the last state is.
    """
    from accelerate import Accelerator

    if not run.tensors:
        raise UsageError("nothing to train: the space has no trainable tensor")
    processes()
    accelerator = Accelerator()
    recent: deque[float] = deque(maxlen=_RECENT)
    if resume is not None:
        recent.extend(_restore(run, resume, identity or {}))
    run.accelerator = accelerator
    if run.sharded:
        shard(run.model, run.tensors.values(), run.device)
    run.wrapped = accelerator.prepare_model(run.model) if accelerator.num_processes > 1 and not run.sharded else run.model
    first, tokens = run.step, 0
    parameters = sum(p.numel() for p in run.tensors.values())
    start = events.seconds
    forget_peak(run.device)
    with (
        products(run.config.matmul, run.device) as exactness,
        _randomness(run),
        _training(run.model),
        _taking_part(run),
        checkpointed(run.model, run.config.checkpointing),
    ):
        events("start", total=run.planned, first=first, parameters=parameters, examples=len(run.objective.examples), **exactness)
        epoch, plan = -1, []
        while run.place < run.total and not run.stopped:
            began = events.seconds
            if run.place // run.per_epoch != epoch:
                epoch = run.place // run.per_epoch
                plan = batches([len(e["input_ids"]) for e in run.objective.examples], run.config.batch_size, run.seed, epoch, bucket=run.config.bucket)
            torch.manual_seed(xp.key(run.key, accelerator.process_index) >> 1)
            factor = run.factor(run.place, run.total)
            for group in run.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            at = run.place % run.per_epoch
            taken = plan[at : at + min(run.width, run.total - run.place)]
            parts = _parts(run, [k for batch in taken for k in batch], epoch)
            seen = sum(_tokens(part.batch) for part in parts)
            for each in run.stages:
                each.batches(run, parts)
            run.loss = backward(run, parts, lambda model, part: run.objective.loss(model, part.batch))
            norm = settle(run)
            lr = run.optimizer.param_groups[0]["lr"]
            if not (math.isfinite(run.loss) and math.isfinite(norm)):
                events("step", step=run.step, first=first, total=run.planned, loss=run.loss, lr=lr, grad_norm=norm, tokens_per_s=0.0, memory=0)
                raise WeftError(
                    f"step {run.step + 1} of {run.planned}: the {'loss' if not math.isfinite(run.loss) else 'gradient'} is not finite "
                    f"(loss {run.loss}, gradient norm {norm}, learning rate {lr:.3g})",
                    hint="a lower learning rate (-p lr=...), a longer warmup, or float32 instead of a 16-bit dtype",
                )
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)
            run.step += 1
            run.place += len(taken)
            if run.step % _TRIM_EVERY == 0:
                trim()
            for each in run.stages:
                each.after_step(run)
            recent.append(run.loss)
            tokens += seen
            rate = round(seen / max(events.seconds - began, 1e-9), 1)
            wide = {"batches": len(taken)} if len(taken) > 1 else {}
            how = {"tokens_per_s": rate, "memory": peak_memory(run.device), **wide}
            events("step", step=run.step, first=first, total=run.planned, loss=run.loss, lr=lr, grad_norm=norm, **how)
            if evaluate is not None and _due(run, evaluate_every):
                with _evaluating(run.model):
                    figures = evaluate(run)
                events("eval", step=run.step, **figures)
                for each in run.stages:
                    each.evaluated(run, figures)
            if state is not None and save_every and run.step % save_every == 0 and accelerator.is_main_process:
                save_state(state, run, recent, identity or {})
                events("save", step=run.step, path=str(state))
    if run.stopped:
        events("stop", step=run.step, reason=run.stopped)
    summary = Summary(sum(recent) / max(1, len(recent)), run.step, tokens, events.seconds)
    rate = round(tokens / max(summary.seconds - start, 1e-9), 1)
    how = {"tokens": tokens, "tokens_per_s": rate, "memory": peak_memory(run.device)}
    events("end", step=run.step, loss=summary.loss, seconds=round(summary.seconds, 3), **how)
    return summary


def _due(run: Run, every: int) -> bool:
    """Whether to evaluate after this step."""
    return run.step % every == 0 if every else run.place % run.per_epoch == 0 or run.place >= run.total


def _parts(run: Run, positions: Sequence[int], epoch: int) -> list[Part]:
    """This process's micro-batches of one step.

    A loss is a mean over `weight` things (tokens, examples), so micro-batches count by their weights: how a batch is cut, and
    over how many processes, changes nothing but rounding.
    """
    rank, count = run.accelerator.process_index, run.accelerator.num_processes
    mine = list(positions[rank::count]) or [positions[0]]
    most = math.ceil(len(positions) / count)
    size = min(run.config.micro_batch_size or most, math.ceil(most / run.pieces))
    seed = xp.key(run.seed, epoch)
    made = []
    for start in range(0, len(mine), size):
        chosen = mine[start : start + size]
        made.append(run.objective.collate([run.objective.examples[k] for k in chosen], [xp.key(seed, k) for k in chosen]))
    weights = [run.objective.weight(batch) for batch in made]
    if rank >= len(positions):  # a last batch with fewer examples than processes: run along, count for nothing
        weights = [0.0]
    if run.sharded:  # all processes run the model equally often, for each needs the others' weights
        least = math.ceil(most / size)
        weights += [0.0] * (least - len(made))
        made += made[:1] * (least - len(made))
    whole = sum(weights)
    if count > 1:
        whole = float(run.summed(torch.tensor(whole, device=run.device)))
    return [
        Part({name: value.to(run.device) for name, value in batch.items()}, weight / whole if whole else 0.0)
        for batch, weight in zip(made, weights, strict=True)
    ]


def _tokens(batch: Batch) -> int:
    return int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()


def backward(run: Run, parts: Sequence[Part], loss: Callable[[nn.Module, Part], torch.Tensor]) -> float:
    """Adds to `.grad` the gradient of the parts' losses, each with the hooks' terms and by its share; returns their sum over all processes."""
    count = run.accelerator.num_processes
    total = 0.0
    for part in parts:
        with nullcontext() if part is parts[-1] or count == 1 or run.sharded else run.accelerator.no_sync(run.wrapped):
            with run.autocast():
                value = loss(run.wrapped, part)
                for each in run.stages:
                    extra = each.loss(run, part.batch)
                    value = value if extra is None else value + extra
            (value * (part.share * count)).backward()  # processes average their gradients
        total += float(value.detach()) * part.share
    if run.sharded:
        _average(run)
    return total if count == 1 else float(run.summed(torch.tensor(total, device=run.device)))


def _average(run: Run) -> None:
    """Gradients become their mean over the processes, as they do by themselves where nothing is sharded; where none has one, there is none."""
    tensors = list(run.tensors.values())
    there = run.summed(torch.tensor([float(value.grad is not None) for value in tensors], device=run.device))
    tensors = [value for value, count in zip(tensors, there.tolist(), strict=True) if count]
    flat = torch.cat([(torch.zeros_like(value) if value.grad is None else value.grad).reshape(-1).float() for value in tensors])
    flat = run.summed(flat) / run.accelerator.num_processes
    for value, grad in zip(tensors, flat.split([value.numel() for value in tensors]), strict=True):
        value.grad = grad.reshape(value.shape).to(value.dtype)


def settle(run: Run) -> float:
    """What becomes of gradients before a step: the hooks change them, then they are clipped. Returns their norm before clipping."""
    for each in run.stages:
        each.gradients(run)
    return float(nn.utils.clip_grad_norm_(list(run.tensors.values()), run.config.clip or math.inf))


@contextmanager
def _taking_part(run: Run) -> Iterator[None]:
    try:
        for each in run.stages:
            each.start(run)
        yield
        for each in run.stages:
            each.end(run)
    finally:
        for each in run.stages:
            each.close(run)


@contextmanager
def _randomness(run: Run) -> Iterator[None]:
    """Gives torch's generators back as they were; on other devices than the CPU, asks for kernels that repeat themselves."""
    devices = [run.device] if run.device.type == "cuda" else []
    strict, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with torch.random.fork_rng(devices):
        if run.device.type != "cpu" and not strict:
            torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(strict, warn_only=warn)


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Train mode inside, and each module's own mode again afterwards."""
    with _mode(model, True):
        yield


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    with _mode(model, False), torch.no_grad(), torch.random.fork_rng():
        yield


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


# --- the state of a run: one safetensors file


def save_state(path: Path, run: Run, recent: Sequence[float] | deque[float], identity: Mapping[str, Any]) -> None:
    """Write what is needed to go on from here, atomically: tensors as they are, all else as JSON. No pickle."""
    tensors: dict[str, torch.Tensor] = {f"tensor/{name}": value.detach() for name, value in run.tensors.items()}
    optimizer = _flat(run.optimizer.state_dict(), "optimizer", tensors)
    for number, hook in enumerate(run.hooks):
        tensors |= {f"hook/{number}/{name}": value for name, value in hook.state().items()}
    about = {"step": run.step, "place": run.place, "width": run.width, "recent": list(recent), "optimizer": optimizer, "identity": dict(identity)}
    held = {name: hold(value) for name, value in tensors.items()}
    order = sorted(held, key=lambda name: (-held[name].nbytes, name))
    with atomic_file(path) as out:
        out.write(container_header(held, order, {_STATE: json.dumps(about)}))
        for name in order:
            for block in held[name].blocks():
                out.write(block)


def _restore(run: Run, path: Path, identity: Mapping[str, Any]) -> list[float]:
    """Take a state over into `run`; returns the losses of its last steps."""
    stored, metadata = read_container(path)
    if _STATE not in metadata:
        raise FormatError(f"{path}: not the state of a training run", hint="it is written next to the delta, with save_every=N")
    about = strict_json(metadata[_STATE], str(path))
    said = about["identity"]
    differ = [name for name in sorted({*said, *identity}) if canon.dumps(said.get(name)) != canon.dumps(identity.get(name))]
    if differ:
        listed = "; ".join(f"{name}: {json.dumps(said.get(name))[:80]} there, {json.dumps(identity.get(name))[:80]} here" for name in differ)
        raise MismatchError(f"{path} is the state of another run ({listed})", hint="resume with the same base, data and options, or start anew")
    expected = {f"tensor/{name}": list(value.shape) for name, value in run.tensors.items()}
    found = {name: list(value.shape) for name, value in stored.items() if name.startswith("tensor/")}
    if expected != found:
        odd = next(name for name in sorted({*expected, *found}) if expected.get(name) != found.get(name))
        raise MismatchError(f"{path}: {odd} has shape {found.get(odd, 'none')}, this run's has {expected.get(odd, 'none')}")

    def get(name: str) -> torch.Tensor:
        value: torch.Tensor = xp.to_torch(stored[name].read())
        return value

    with torch.no_grad():
        for name, value in run.tensors.items():
            value.copy_(get(f"tensor/{name}"))
    run.optimizer.load_state_dict(_deep(about["optimizer"], get))
    for number, hook in enumerate(run.hooks):
        prefix = f"hook/{number}/"
        hook.load({name.removeprefix(prefix): get(name).to(run.device) for name in stored if name.startswith(prefix)})
    run.step, run.place, run.width = about["step"], about["place"], about["width"]
    return [float(loss) for loss in about["recent"]]


def _flat(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """A nested state as JSON, its tensors put into `tensors` under names that the JSON gives."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"map": [[key, _flat(inner, f"{name}/{key}", tensors)] for key, inner in value.items()]}
    if isinstance(value, list | tuple):
        return {"tuple" if isinstance(value, tuple) else "list": [_flat(inner, f"{name}/{k}", tensors) for k, inner in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise WeftError(f"the optimizer's state holds a {type(value).__name__} at {name}, which cannot be saved")


def _deep(value: Any, get: Callable[[str], torch.Tensor]) -> Any:
    """What `_flat` made JSON of."""
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return get(inner)
    if kind == "map":
        return {key: _deep(each, get) for key, each in inner}
    if kind in ("list", "tuple"):
        return (tuple if kind == "tuple" else list)(_deep(each, get) for each in inner)
    return inner
