"""`weft methods`."""

from __future__ import annotations

from typing import Any

from ..errors import UsageError, near
from .app import argument, declare
from .output import Output, table


@declare("methods", formats=("human", "json", "quiet", "markdown"))
@argument("which", metavar="[VERB|NAME]", required=False)
def command(out: Output, which: str | None) -> None:
    """The catalogue: every method by verb; with a verb, a kind or a name, each method's options too.

    \b
    Example:
      weft methods
      weft methods merge
      weft methods lora
    """
    from ..methods import render_catalogue

    records = _chosen(which)
    if out.mode == "markdown":
        if which is not None:
            raise UsageError("--format markdown is the whole catalogue; it takes no name", hint="weft methods --format markdown")
        out.result({}, render_catalogue())
        return
    out.result({"methods": records}, _listed(records, options=which is not None), "\n".join(record["name"] for record in records))
    if which is None and records:
        out.next(f"weft methods {records[0]['name']}")


def _chosen(which: str | None) -> list[dict[str, Any]]:
    from ..methods import KINDS, catalogue

    verbs = {about.verb for about in KINDS.values()}
    if which is None or which in verbs or which in KINDS:
        return catalogue(which)
    records = catalogue()
    found = [record for record in records if record["name"] == which]
    if not found:
        known = {record[key] for record in records for key in ("verb", "kind", "name")}
        raise UsageError(f"there is no verb, kind or method {which!r}{near(which, known)}", hint="weft methods")
    return found


def _listed(records: list[dict[str, Any]], *, options: bool) -> str:
    if not records:
        return "no methods yet"
    from ..methods import KINDS

    lines: list[str] = []
    for kind, about in KINDS.items():
        of_kind = [record for record in records if record["kind"] == kind]
        if not of_kind:
            continue
        lines.append(f"{kind}: weft {about.verb} {about.flag}")
        if options:
            for record in of_kind:
                lines += _whole(record)
        else:
            lines.append(table([(record["name"], record["summary"], record["paper"]) for record in of_kind]))
        lines.append("")
    return "\n".join(lines[:-1])


def _whole(record: dict[str, Any]) -> list[str]:
    from ..config import Option
    from ..methods import OVER_DEPTH, typed

    lines = [f"  {record['name']}", f"    {record['summary']}"]
    lines += [f"    {key}: {record[key]}" for key in ("formula", "paper") if record[key]]
    rows = []
    for option in (Option(**each) for each in record["options"]):
        default = "required" if option.required else typed(option.default)
        expected = option.expected + OVER_DEPTH * (option.name in record["varies"])
        rows.append((f"-p {option.name}=", expected, default, option.description))
    if rows:
        lines.append(table([("option", "type", "default", "meaning"), *rows], indent="    "))
    return lines
