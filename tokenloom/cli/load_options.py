"""Command line options made from `LoadOptions` and `SweepOptions`: one declaration each."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import Field, fields
from enum import StrEnum
from typing import Annotated, Any, Literal, Optional, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

from tokenloom.bench.load.options import LoadOptions, SweepOptions, flag

SEVERAL = ("--goodput", "--header", "--metadata")
"""Options that take any number of values, as `--goodput ttft:200 tpot:50`."""


class LoadCommand(TyperCommand):
    """A command whose `SEVERAL` options may be followed by several values."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the option before each further value, which is how the parser knows it."""
        expanded: list[str] = []
        current, values = "", 0
        for arg in args:
            if arg.startswith("-"):
                current, values = (arg if arg in SEVERAL else ""), 0
            elif current:
                if values:
                    expanded.append(current)
                values += 1
            expanded.append(arg)
        return super().parse_args(ctx, expanded)


def _shown(default: Any) -> str:
    if default in (None, "", ()) or isinstance(default, bool):
        return ""
    return f" [{default:g}]" if isinstance(default, float) else f" [{default}]"


def _choice_type(name: str, choices: tuple[str, ...]) -> Any:
    return StrEnum(name, {choice: choice for choice in choices})


def _plain(value: Any) -> Any:
    """A value as the options hold it."""
    if isinstance(value, list):
        return tuple(value)
    return str(value) if isinstance(value, StrEnum) else value


def _parameter(entry: Field[Any], kind: Any) -> inspect.Parameter:
    default = entry.default
    if get_origin(kind) is tuple:
        kind = list[str]
    elif get_origin(kind) is Literal:
        kind = _choice_type(entry.name, get_args(kind))
    names = (flag(entry.name), *entry.metadata["names"])
    if kind is bool and default:
        names = (f"{names[0]}/--no-{names[0][2:]}", *names[1:])
    info = typer.Option(*names, help=entry.metadata["help"] + _shown(default), show_default=False)
    if kind is not bool:
        kind = Optional[kind]  # noqa: UP045 (built at run time)
    return inspect.Parameter(
        entry.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default if kind is bool else None,
        annotation=Annotated[kind, info],
    )


def loading(*kinds: type[LoadOptions] | type[SweepOptions]) -> Callable[..., Callable[..., None]]:
    """Give a command the options of `kinds`; it gets one object of each, in that order, before its own."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(function, eval_str=True).parameters.values())[len(kinds) :]
        generated = []
        for kind in kinds:
            hints = get_type_hints(kind)
            generated += [_parameter(entry, hints[entry.name]) for entry in fields(kind)]

        def command(**given: Any) -> None:
            built: list[Any] = []
            for kind in kinds:
                values = {entry.name: given.pop(entry.name) for entry in fields(kind)}
                chosen: dict[str, Any] = {n: _plain(v) for n, v in values.items() if v is not None}
                built.append(kind(**chosen))
            function(*built, **given)

        every = [*generated, *own]
        command.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in every}
        command.__name__ = function.__name__
        command.__doc__ = function.__doc__
        return command

    return decorate
