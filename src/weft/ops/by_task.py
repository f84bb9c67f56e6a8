"""by_task: a low-rank product beside a module, another one for each task; each row of a batch has its own task.

    y' = y + scale * B_t A_t x        t: the task of the row that x belongs to

Without `Z` there is one pair A_t, B_t for each task (the specific part of MTLoRA, Agiza et al. 2024, arXiv 2403.20320). With `Z` the pairs
are S skills that all tasks share, mixed by weights of the task's own, p_t = softmax(Z_t) over the skills:

    A_t = sum_s p_ts A_s,  B_t = sum_s p_ts B_s        Poly (Ponti et al. 2022, arXiv 2202.13914), one head

With H heads the input is cut into H blocks and the output too; block h of A_t (columns) and of B_t (rows) is mixed with the weights of
head h (MHR, Caccia et al. 2022, arXiv 2211.03831).

Its target is `@module/PATH` of a linear module. It cannot be folded as it is, but for one task it is a `lowrank` (`of_task`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InputError, near
from .op import Array, Config, Generator, Info, Op, Shape, Tensors, expect


class ByTask(Op):
    """A (S x r x d_in), B (S x d_out x r) and, where tasks mix them, Z (T x H x S); without Z, S is the number of tasks.

    cfg `tasks` are the T names, in order; without them tasks are called "0", "1", ...
    """

    kind = "by_task"
    fields = ("A", "B")
    optional = ("Z",)
    defaults = {"scale": 1.0, "tasks": []}
    on = "module"
    drops = True

    def check(self, shape: Shape, cfg: Config, t: Mapping[str, Info]) -> None:
        skills, rank, width = expect(t, "A", [None, None, None])
        out = expect(t, "B", [skills, None, rank])[1]
        count = skills
        if "Z" in t:
            count, heads, _ = expect(t, "Z", [None, None, skills])
            if heads < 1 or width % heads or out % heads:
                raise ValueError(f"field Z: {heads} heads must divide both sides, {width} and {out}; got the shape {list(t['Z'].shape)}")
        names = cfg["tasks"]
        if any(type(name) is not str for name in names) or len(set(names)) != len(names):
            raise ValueError(f"config 'tasks' must be texts, each once, got {names!r}")
        if count < 1 or (names and len(names) != count):
            field = "Z" if "Z" in t else "A"
            raise ValueError(f"field {field}: expected {len(names) or 'some'} tasks, got {count}, shape {list(t[field].shape)}")

    def init(self, shape: Shape, gen: Generator, *, rank: int = 8, tasks: int = 2, skills: int = 0, heads: int = 1) -> dict[str, Any]:
        """`shape` is (output width, input width). A is uniform (bound 1/sqrt(d_in)), B zero: the identity. With skills, Z is
        uniform up to 0.001: nearly the mean of the skills."""
        import numpy as np

        out, width, count = shape[0], shape[-1], skills or tasks
        t = {"A": gen.uniform((count, rank, width), width**-0.5), "B": np.zeros((count, out, rank), np.float32)}
        return {**t, "Z": gen.uniform((tasks, heads, skills), 1e-3)} if skills else t

    def forward(self, m: Any, x: Any, y: Any, t: Tensors, cfg: Config, ctx: Any) -> Any:
        import torch

        present, rows = _sorted_out(names_of(t, cfg), ctx.tasks, x.shape[0])
        a, b = _mixed(t, torch.tensor(present, device=x.device))
        flat = ctx.drop(x).reshape(x.shape[0], -1, x.shape[-1])
        if len(present) == 1:
            change = flat @ a[0].T @ b[0].T
        else:
            each = torch.tensor(rows, device=x.device)
            change = torch.bmm(torch.bmm(flat, a[each].transpose(1, 2)), b[each].transpose(1, 2))
        return y + cfg["scale"] * change.reshape(y.shape)


def names_of(t: Mapping[str, Any], cfg: Config) -> Sequence[str]:
    """The names of an op's tasks, in order."""
    return cfg["tasks"] or [str(k) for k in range(t["Z" if "Z" in t else "A"].shape[0])]


def factors(t: Tensors, cfg: Config, task: str) -> tuple[Array, Array]:
    """A_t (r x d_in) and B_t (d_out x r) of one task, as numpy arrays; InputError if it is unknown."""
    import torch

    from .. import xp

    (number,), _ = _sorted_out(names_of(t, cfg), [task], 1)
    a, b = _mixed({name: xp.to_torch(value).float() for name, value in t.items()}, torch.tensor([number]))
    return xp.to_numpy(a[0]), xp.to_numpy(b[0])


def _sorted_out(known: Sequence[str], tasks: Sequence[str], count: int) -> tuple[list[int], list[int]]:
    """The numbers of the tasks that occur, and for each of `count` rows which of these is its own.

    An op that knows one task needs no name; one name serves all rows. Rows may be a multiple of the names: what a model makes of one
    row (beams, tokens in a list) stands together.
    """
    if not tasks and len(known) == 1:
        return [0], [0] * count
    if not tasks:
        raise InputError(
            f"the model changes by task, and no task was named; it knows {', '.join(known)}",
            hint="rows with a field 'task', --task NAME, or weft.attaching.set_tasks(model, NAME)",
        )
    present = list(dict.fromkeys(tasks))
    for name in present:
        if name not in known:
            raise InputError(f"there is no task {name!r}{near(name, known)}")
    if count % len(tasks):
        raise InputError(f"{len(tasks)} tasks were named for {count} rows", hint="one name for each row, or one for all")
    place = {name: number for number, name in enumerate(present)}
    return [known.index(name) for name in present], [place[name] for name in tasks for _ in range(count // len(tasks))]


def _mixed(t: Tensors, present: Any) -> tuple[Any, Any]:
    """A (n x r x d_in) and B (n x d_out x r) of the tasks `present`."""
    import torch

    if "Z" not in t:
        return t["A"][present], t["B"][present]
    p = t["Z"][present].float().softmax(-1).to(t["A"])
    heads = p.shape[1]
    a = torch.einsum("ths,srhd->trhd", p, t["A"].unflatten(-1, (heads, -1))).flatten(-2)
    b = torch.einsum("ths,shor->thor", p, t["B"].unflatten(1, (heads, -1))).flatten(1, 2)
    return a, b


OP = ByTask()
