"""Where else the events of a run go: TensorBoard and Weights & Biases. Off unless asked for; nothing is sent anywhere otherwise.

    tensorboard:FOLDER      event files in the folder, to be looked at with `tensorboard --logdir FOLDER`
    wandb:PROJECT           a run of the project; what wandb itself needs (an account, WANDB_MODE=offline) is told to wandb

Numbers of steps appear as train/loss, train/lr, ..., those of evaluations as eval/NAME, each at its step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..errors import MissingExtra, UsageError, near

Event = Mapping[str, Any]
_GROUPS = {"step": "train", "eval": "eval"}
_PLACE = ("event", "time", "step", "first", "total")


def numbers(event: Event) -> dict[str, float]:
    """What there is to draw of an event, under the names it has in a sink."""
    group = _GROUPS.get(event["event"])
    return {f"{group}/{name}": value for name, value in event.items() if name not in _PLACE and isinstance(value, int | float)} if group else {}


@contextmanager
def sink(where: str) -> Iterator[Callable[[Event], None]]:
    """A function to call with every event, open for the time of the block. UsageError for a place of no known kind; MissingExtra."""
    kind, _, name = where.partition(":")
    if kind not in _KINDS or not name:
        known = near(kind, _KINDS) if kind not in _KINDS else ""
        raise UsageError(f"cannot log to {where!r}{known}", hint="tensorboard:FOLDER or wandb:PROJECT")
    with _KINDS[kind](name) as write:
        yield write


@contextmanager
def _tensorboard(folder: str) -> Iterator[Callable[[Event], None]]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingExtra("tensorboard", "tensorboard", "logging to TensorBoard") from None
    writer: Any = SummaryWriter(folder)  # type: ignore[no-untyped-call,unused-ignore]

    def write(event: Event) -> None:
        for name, value in numbers(event).items():
            writer.add_scalar(name, value, event["step"])

    try:
        yield write
    finally:
        writer.close()


@contextmanager
def _wandb(project: str) -> Iterator[Callable[[Event], None]]:
    try:
        import wandb  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise MissingExtra("wandb", "wandb", "logging to Weights & Biases") from None
    run: Any = wandb.init(project=project)

    def write(event: Event) -> None:
        if event["event"] == "start":
            run.config.update({name: value for name, value in event.items() if name not in _PLACE}, allow_val_change=True)
        elif found := numbers(event):
            run.log(found, step=event["step"])

    try:
        yield write
    finally:
        run.finish()


_KINDS = {"tensorboard": _tensorboard, "wandb": _wandb}
