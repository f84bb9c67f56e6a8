"""`weft export`."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import click

from ..errors import MismatchError
from .app import argument, declare, option, out_folder, threads
from .output import Output, table

if TYPE_CHECKING:
    from ..interchange import Exported


@declare("export")
@argument("delta", metavar="DELTA", type=click.Path(path_type=Path))
@option("--base", metavar="BASE", required=True, help="The checkpoint that the delta belongs to.")
@option("--to", type=click.Choice(["peft", "vllm"]), required=True, help="peft: what PEFT loads; vllm: one rank, the scale inside B.")
@option("--rank", type=click.IntRange(1), help="The largest rank; larger changes, and those of no rank, are approximated.")
@option("--energy", type=click.FloatRange(0, 1, min_open=True), help="The same, by the share of the squared norm to keep.")
@option("--served-name", metavar="NAME", help="The base's name where it is served.  [default: BASE]")
@option("--probe", is_flag=True, help="Then load the model with the adapter: every key must be used and the logits must move.")
@out_folder
@threads
def command(out: Output, delta: Path, base: str, target: Path, probe: bool, **how: Any) -> None:
    """Write a delta as an adapter folder for PEFT or vLLM.

    What is written for vLLM is checked as vLLM would read it: exit code 3, and every problem found, if it would not serve it.

    \b
    Example:
      weft export style.safetensors --base path/to/model --to peft -o adapter
      weft export style.safetensors --base path/to/model --to vllm --rank 16 --probe -o served
    """
    from .. import interchange
    from ..base import Base
    from ..delta import Delta

    opened, loaded = Base.open(base), Delta.load(delta)
    with out.progress("hashing the base") as progress:
        opened.hash_all(progress)
    done = interchange.export(loaded, target, opened, **how)
    seen = interchange.probe(target, opened) if probe else None
    out.result({**done.json(), "id": loaded.id, "probe": seen}, _page(done, seen), str(target))
    if done.problems:  # the folder stays, to look at
        listed = "".join(f"\n  - {problem}" for problem in done.problems)
        raise MismatchError(f"{target} was written, but {done.to} would not serve it as it is meant:{listed}")
    if done.serve:
        out.next(f"vllm serve {quote(base)} {done.serve}")
    else:
        out.next("weft import {} --base {} -o OUT.safetensors", target, base)


def _page(done: Exported, seen: dict[str, Any] | None) -> str:
    facts = [("wrote", f"{done.folder}, for {done.to}"), ("modules", f"{len(done.modules)} of rank {done.rank} at most")]
    if done.saved:
        facts.append(("whole", ", ".join(done.saved)))
    if done.residual:
        worst = max(done.residual, key=lambda name: done.residual[name])
        facts.append(("residual", f"{done.residual[worst]:.3g} at most ({worst}): the share of a change's norm that the rank leaves out"))
    if seen is not None:
        used = f"{seen['keys']} keys on {seen['modules']} modules, all used"
        facts.append(("probe", f"{used}; logits move by up to {seen['max_change']:.3g} (the base's largest is {seen['max_logit']:.3g})"))
    return table(facts, indent="")
