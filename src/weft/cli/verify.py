"""`weft verify`."""

from __future__ import annotations

from pathlib import Path

import click

from ..delta import Delta
from .app import argument, declare, option
from .output import Output, amount


@declare("verify")
@argument("delta", metavar="DELTA", type=click.Path(path_type=Path))
@option("--base", metavar="BASE", help="Also check that it belongs to this checkpoint.")
def command(out: Output, delta: Path, base: str | None) -> None:
    """Check every byte of a delta: the header, every hash, every index, the id; with --base, that it fits that base.

    Exit code 3, and one sentence that names the tensor, when something is wrong.

    \b
    Example:
      weft verify trec.safetensors --base path/to/model
    """
    found = Delta.load(delta)
    checked = [
        f"container: {len(found.tensors)} tensors, without gaps or overlaps",
        f"manifest: canonical, {len(found.entries)} targets, every reference and shape; notes",
        f"id: {found.id}",
        f"data: sha256 of {len(found.tensors)} tensors, {amount(found.nbytes)}",
    ]
    found.validate_values()
    indexes = sum(tensor.dtype in ("I64", "I32") for tensor in found.tensors.values())
    checked.append(f"positions: {indexes} index tensors, in range, sorted and unique where they must be")
    coded = [tensor for tensor in found.tensors.values() if tensor.coding is not None]
    if coded:
        for tensor in coded:
            for _ in tensor.blocks():
                pass
        checked.append(f"codes: every block of {len(coded)} coded tensors can be decoded")
    if base is not None:
        checked += _against(out, found, base)
    record = {"ok": True, "path": str(delta), "id": found.id, "base": found.base, "base_checked": base is not None, "checked": checked}
    unchecked = [] if base is not None else ["  not checked: the base (give --base BASE)"]
    out.result(record, "\n".join([f"{delta} is whole", *(f"  {line}" for line in checked), *unchecked]))
    if base is None:
        out.next("weft show {}", delta)
    else:
        out.next("weft fold {} {} -o DIR", base, delta)


def _against(out: Output, delta: Delta, name: str) -> list[str]:
    from ..base import Base

    base = Base.open(name)
    with out.progress("hashing the base") as progress:
        base.hash_all(progress)
    delta.require_base(base, on=delta.over)
    delta.require_tensors(base)
    touched = sum(entry.base is not None for entry in delta.entries.values())
    return [f"base: fingerprint {base.fingerprint}", f"base tensors: sha256 of the {touched} that it touches"]
