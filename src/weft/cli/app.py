"""The list of commands, and what they share: options, the way usage errors are found, lazy loading."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .. import __version__
from ..errors import InputError, UsageError, near
from .output import Output

if TYPE_CHECKING:
    from ..delta import Delta

F = TypeVar("F", bound=Callable[..., Any])

COMMANDS = {
    "demo": "the whole story on a real model, offline",
    "methods": "the catalogue of methods, with their options",
    "tune": "tune a base on data; the result is a delta",
    "edit": "change facts of a language model; the result is a delta",
    "undo": "take single edits out of a delta",
    "merge": "merge deltas or checkpoints",
    "compress": "make a delta smaller",
    "port": "carry a delta over to another base",
    "search": "find what to tune and how, or fit laws to runs",
    "diff": "the delta between a base and a checkpoint",
    "fold": "write deltas into a full checkpoint",
    "show": "what a delta is and what it changes",
    "verify": "check every byte of a delta, and that it fits its base",
    "eval": "measure a base, with or without deltas",
    "check": "what deltas made better and what they broke, with gates",
    "generate": "continue a prompt",
    "import": "a PEFT adapter as a delta",
    "export": "a delta as a PEFT adapter, or as what vLLM serves",
}
"""Every command and its summary, in the order of `weft --help`. A command is the module of its name (`import_` for `import`)."""

_PROBLEMS = "weft.problems"


class Lazy(click.Group):
    """A group that imports a command's module only when that command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = import_module(f".{name}_" if name == "import" else f".{name}", __package__)
        return module.command  # type: ignore[no-any-return]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise UsageError(f"there is no command {args[0]!r}{near(args[0], COMMANDS, 'the commands are')}", hint="weft --help")
        return super().resolve_command(ctx, args)


@click.group(cls=Lazy, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="weft")
@click.pass_context
def app(ctx: click.Context) -> None:
    """Updates to pretrained models: make them, merge them, fold them in, check them, take them back.

    A delta is one .safetensors file that says which base it belongs to. Start with `weft demo`.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


# --- parameters that report every problem at once


class _Collects:
    """A parameter whose problem is kept until all parameters were looked at."""

    def handle_parse_result(self, ctx: click.Context, opts: Any, args: list[str]) -> tuple[Any, list[str]]:
        try:
            return super().handle_parse_result(ctx, opts, args)  # type: ignore[misc,no-any-return]
        except click.UsageError as error:
            ctx.meta.setdefault(_PROBLEMS, []).append(error.format_message())
            return None, args


class _Option(_Collects, click.Option):
    pass


class _Argument(_Collects, click.Argument):
    pass


class _Command(click.Command):
    def invoke(self, ctx: click.Context) -> Any:
        problems = ctx.meta.get(_PROBLEMS, [])
        if len(problems) == 1:
            raise UsageError(f"{ctx.command_path}: {problems[0]}", hint=f"{ctx.command_path} --help")
        if problems:
            raise UsageError(f"{ctx.command_path}: {len(problems)} problems", problems=problems, hint=f"{ctx.command_path} --help")
        return super().invoke(ctx)


argument = partial(click.argument, cls=_Argument)
option = partial(click.option, cls=_Option)
"""As click's own; a problem with one parameter does not hide those of others."""


def declare(name: str, *, formats: Sequence[str] = ("human", "json", "quiet")) -> Callable[[Callable[..., None]], click.Command]:
    """Make a function a command: it gets the `Output` first, and `--format` and `--debug` are handled here.

    The docstring is the help; its summary is in `COMMANDS`.
    """

    def wrap(function: Callable[..., None]) -> click.Command:
        for extra in (
            option("--debug", is_flag=True, expose_value=False, is_eager=True, callback=_set_debug, help="Show the traceback of an error."),
            option(
                "--format",
                type=click.Choice(formats),
                default="human",
                show_default=True,
                expose_value=False,
                is_eager=True,
                callback=_set_format,
                help="json: one object on stdout; quiet: the bare result.",
            ),
        ):
            function = extra(function)
        return click.command(name, cls=_Command, short_help=COMMANDS[name])(click.pass_obj(function))

    return wrap


def _set_debug(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    ctx.ensure_object(Output).debug = value


def _set_format(ctx: click.Context, param: click.Parameter, value: str) -> None:
    ctx.ensure_object(Output).mode = value


# --- parameters that several commands have


def _limit_threads(ctx: click.Context, param: click.Parameter, value: int | None) -> int | None:
    """Before numpy and torch are imported they read the environment; afterwards torch can still be told."""
    if value is not None:
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ[name] = str(value)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(value)
    return value


def threads(function: F) -> F:
    return option("--threads", type=click.IntRange(1), expose_value=False, callback=_limit_threads, help="Threads for arithmetic.  [default: all cores]")(
        function
    )


def workers(function: F) -> F:
    """`--threads` for functions that take the number: they compute in threads of their own."""
    about = "Threads to work in; the result is the same.  [default: all cores]"
    return option("--threads", type=click.IntRange(1), default=_cores, callback=_limit_threads, help=about)(function)


def _cores() -> int:
    from ..engine.stream import thread_count

    return thread_count(None)


def device(function: F) -> F:
    return option("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps, ...  [default: an accelerator if there is one]")(function)


def dtype(function: F) -> F:
    return option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="What the model runs in.  [default: the checkpoint's]")(function)


def seed(function: F) -> F:
    return option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Everything random follows from it.")(function)


def mode(function: F) -> F:
    modes = click.Choice(["auto", "fast", "functional", "materialised"])
    return option("--mode", type=modes, default="auto", show_default=True, help="How deltas run; auto: written into the weights, as folded.")(function)


def base(function: F) -> F:
    return argument("base", metavar="BASE")(function)


def deltas(function: F) -> F:
    return argument("deltas", metavar="[DELTA]...", nargs=-1, type=click.Path(path_type=Path))(function)


def params(function: F) -> F:
    return option("-p", "params", metavar="NAME=VALUE", multiple=True, help="An option of the method (see `weft methods`); again for each.")(function)


def out_file(function: F) -> F:
    path = click.Path(path_type=Path)
    return option("-o", "--out", "target", metavar="OUT.safetensors", required=True, type=path, callback=delta_name, help="Where the delta goes.")(function)


def out_folder(function: F) -> F:
    path = click.Path(path_type=Path)
    return option("-o", "--out", "target", metavar="DIR", required=True, type=path, callback=new_folder, help="The folder to make.")(function)


def delta_name(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """Looked at before the work is done, not after it."""
    if value is not None:
        if value.suffix != ".safetensors":
            raise click.BadParameter(f"a delta is one .safetensors file, got {value}; name it {value.with_suffix('.safetensors')}")
        require_folder(value)
    return value


def new_folder(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    if value is not None:
        require_folder(value)
        if value.exists() and (not value.is_dir() or any(value.iterdir())):
            raise InputError(f"cannot write {value}: it exists already", hint="choose another name, or remove it first")
    return value


def require_folder(path: Path) -> None:
    """InputError if the folder that `path` is to be written in does not exist."""
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: the folder {path.parent} does not exist", hint=f"mkdir -p {path.parent}")


def read_deltas(paths: Sequence[Path]) -> list[Delta]:
    """The deltas of a command line, read and validated."""
    from ..delta import Delta

    return [Delta.load(path) for path in paths]


def pairs(params: Sequence[str], function: Callable[..., Any]) -> dict[str, Any]:
    """`-p name=value` texts as keyword arguments for `function`, which knows more of them; all that is wrong at once."""
    from inspect import signature

    taken = set(signature(function).parameters)
    found: dict[str, Any] = {}
    wrong: list[str] = []
    for pair in params:
        name, equals, value = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            wrong.append(f"{pair!r}: expected name=value")
        elif name in taken:
            wrong.append(f"{name}: it is no option of a method, see --help")
        elif name in found:
            wrong.append(f"{name}: given twice ({found[name]!r} and {value!r})")
        else:
            found[name] = value
    if wrong:
        raise UsageError(f"-p: {len(wrong)} problem{'s' * (len(wrong) != 1)}", problems=wrong, hint="weft methods")
    return found
