"""Commands' options, made from the fields of :class:`floe_kernels.pipeline.Options`."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from floe_kernels.pipeline.options import Options
from floe_kernels.pipeline.runs import CONFIG, load_run

FIELDS = {f.name: f for f in fields(Options)}
MODEL = tuple(name for name, f in FIELDS.items() if f.metadata["group"] == "Model")
DATA = tuple(name for name, f in FIELDS.items() if f.metadata["group"] == "Data")
ELSEWHERE = ("Measuring", "Budget", "Method")  # groups that only score, plan and compare have
TUNING = tuple(name for name, f in FIELDS.items() if f.metadata["group"] not in ELSEWHERE)
CHOSEN_BY = {"per": "module", "variant": "param_sum"}
"""Defaults of the commands that choose by Fisher information; benchmarks/EVIDENCE.md says why."""

Out = Annotated[Path, typer.Option(help="The run's folder.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")]


class AskedWrongly(Exception):
    """An option that cannot be; the command line leaves with code 2."""


def takes_options(
    *names: str, **defaults: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command options that are fields of :class:`Options`.

    The command is called with ``given``, those that were named on the command line, and
    ``asked``, all of them.

    Args:
        names: Which fields; none means all.
        defaults: Defaults that are the command's own.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [
            p
            for p in inspect.signature(command).parameters.values()
            if p.name not in ("given", "asked")
        ]
        chosen = {name: FIELDS[name] for name in names or FIELDS}

        @functools.wraps(command)
        def wrapper(context: typer.Context, **values: Any) -> None:
            asked = {name: values.pop(name) for name in chosen}
            given = {name: value for name, value in asked.items() if _named(context, name)}
            command(**values, given=given, asked=asked)

        parameters = [
            inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
            *(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own),
        ]
        for name, f in chosen.items():
            help_text, group = f.metadata["help"], f.metadata["group"]
            annotation = Annotated[f.type, typer.Option(help=help_text, rich_help_panel=group)]  # type: ignore[name-defined]
            default = defaults.get(name, f.default)
            parameters.append(
                inspect.Parameter(
                    name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
                )
            )
        wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
        return wrapper

    return decorate


def checked(asked: Mapping[str, Any], **defaults: Any) -> Options:
    """Make options, blaming whoever asked if they cannot be.

    Args:
        asked: Field -> value.
        defaults: Values of fields that are not among those.

    Raises:
        AskedWrongly: An option breaks its rule.
    """
    try:
        return Options(**{**defaults, **asked})
    except ValueError as error:
        raise AskedWrongly(str(error)) from error


def asked_in(folder: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the run in a folder, where ``given`` does not name others.

    Args:
        folder: The run's folder.
        given: What was named on the command line.
    """
    known = set(FIELDS)
    saved = {name: value for name, value in load_run(folder).arguments.items() if name in known}
    return {**saved, **given}


@contextlib.contextmanager
def resumable(folder: Path, how: str) -> Iterator[None]:
    """If the work in the block is interrupted, say how to take it up again.

    Args:
        folder: The run's folder.
        how: The command that goes on.
    """
    try:
        yield
    except KeyboardInterrupt:
        if (folder / CONFIG).exists():
            typer.echo(f"\nstopped; nothing finished is lost. To go on: {how}", err=True)
        raise


def _named(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
