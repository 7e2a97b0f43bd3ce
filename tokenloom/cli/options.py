"""Command line options made from the knobs of `tokenloom.config`: one declaration each."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from tokenloom.config import Config, Knob, knobs, make_config

ENGINE_SECTIONS = ("model", "cache", "scheduler", "speculation", "runtime")


def default_text(entry: Knob) -> str:
    """The default as a user would write it; empty text for an empty string."""
    if entry.type is bool:
        return "on" if entry.default else "off"
    if isinstance(entry.default, tuple):
        return ", ".join(entry.default)
    return str(entry.default)


def _choice_type(entry: Knob) -> Any:
    return StrEnum(entry.name, {choice: choice for choice in entry.choices})


def _parameter(entry: Knob, *, as_argument: bool) -> inspect.Parameter:
    kind = _choice_type(entry) if entry.choices else entry.type
    if isinstance(entry.default, tuple):
        kind = list[str]
    shown = default_text(entry)
    text = f"{entry.help} [{shown}]" if shown else entry.help
    info = (
        typer.Argument(metavar="MODEL", help=text)
        if as_argument
        else typer.Option(
            entry.flag if kind is not bool else f"{entry.flag}/--no-{entry.flag[2:]}", help=text
        )
    )
    return inspect.Parameter(
        entry.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[Optional[kind], info],  # noqa: UP045 (built at run time)
    )


def configured(
    sections: tuple[str, ...] = ENGINE_SECTIONS, *, model_argument: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of `sections` and `--config`; it gets the built tree as `config`.

    With `model_argument` the model is a positional argument instead of an option. The command's own options
    stay in front. What the user did not give comes from the environment, then the file, then the default.
    """
    entries = [entry for entry in knobs() if entry.section in sections]

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(function, eval_str=True).parameters
        parameters = [parameter for parameter in own.values() if parameter.name != "config"]
        positional = [p for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY]
        options = [p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
        generated = [_parameter(e, as_argument=model_argument and e.name == "model") for e in entries]
        file = inspect.Parameter(
            "config_file",
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                Optional[Path],  # noqa: UP045 (read at run time by older typer releases)
                typer.Option("--config", metavar="FILE", help="TOML file with any of these options."),
            ],
        )

        def command(*args: Any, **given: Any) -> None:
            values = {entry.name: given.pop(entry.name) for entry in entries}
            chosen = {name: value for name, value in values.items() if value is not None and value != []}
            config: Config = make_config(
                {name: str(v) if isinstance(v, StrEnum) else v for name, v in chosen.items()},
                file=given.pop("config_file"),
            )
            function(*args, config=config, **given)

        every = [*positional, *options, *generated, file]
        command.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in every}
        command.__name__ = function.__name__
        command.__doc__ = function.__doc__
        return command

    return decorate


def changed_from_default(config: Config) -> dict[str, Any]:
    """Values that differ from their defaults, by flat name; API keys are hidden."""
    changed = {}
    for entry in knobs():
        value = getattr(getattr(config, entry.section), entry.name)
        if value != entry.default:
            changed[entry.name] = "***" if entry.name in ("api_key", "slo_key") else value
    return changed
