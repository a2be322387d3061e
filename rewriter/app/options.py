"""Types of the command line's options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args, get_origin

import click

from passes import GROUPS, OPTIONS, roles
from passes.options import Option, options_of
from passes.quantization.options import QuantizerOptions
from passes.quantization.roles import MAX_BITS, MIN_BITS


class ByRole(click.ParamType[Any, Any]):
    """Type of an option with one value for all roles, as ``8``, or values by role, as ``gamma=4,beta=8``."""

    def __init__(self, name: str, parse: Callable[[str], Any], expected: str) -> None:
        """`parse` turns a text into a value or raises ValueError; `expected` describes such a text in an error."""
        self.name = name
        self.parse = parse
        self.expected = expected

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return a value, or values by role."""
        if not isinstance(value, str):
            return value
        pairs = [part.partition("=") for part in value.split(",")] if "=" in value else [("", "", value)]
        by_role: dict[str, Any] = {}
        for role, _, text in ((role.strip(), sign, text.strip()) for role, sign, text in pairs):
            if "=" in value and role not in {*roles(), *GROUPS}:
                self.fail(f"{role!r} is no role; there are {', '.join((*roles(), *GROUPS))}", param, ctx)
            if role in by_role:
                self.fail(f"{value!r} names {role} twice", param, ctx)
            try:
                by_role[role] = self.parse(text)
            except ValueError:
                self.fail(f"{text!r}: {self.expected}", param, ctx)
        return by_role.get("", by_role)


def width(text: str) -> int:
    """Return a width.

    Raises:
        ValueError: the text is no number, or out of range.
    """
    if not MIN_BITS <= int(text) <= MAX_BITS:
        raise ValueError(text)
    return int(text)


def _one_of(names: Mapping[str, Any]) -> Callable[[str], Any]:
    """Return a function that returns what one of these names stands for, and raises ValueError for another text."""

    def value(text: str) -> Any:
        if text not in names:
            raise ValueError(text)
        return names[text]

    return value


def _by_role(option: Option) -> ByRole:
    """Return the command line's type of a quantiser's option."""
    if option.text is not None:
        return ByRole(*option.text)
    kind = get_origin(option.type) or option.type
    if kind is bool:
        return ByRole("yes|no", _one_of({"yes": True, "no": False}), "it is yes or no")
    if kind is Literal:
        names = get_args(option.type)
        return ByRole(option.name, _one_of({name: name for name in names}), f"it is one of {', '.join(names)}")
    least, limit = (bound or 0 for bound in option.bounds)

    def number(text: str) -> Any:
        value = kind(text)
        if not least <= value < limit:
            raise ValueError(text)
        return value

    greatest = f"{limit - 1}" if kind is int else f"less than {limit}"
    return ByRole(option.name, number, f"it is a number from {least} to {greatest}, or a list like gamma=4,beta=8")


def quantizer_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command all options of quantisers, each with one value or values by role."""
    for option in reversed(options_of(QuantizerOptions)):
        names = ", ".join(get_args(option.type)) if get_origin(option.type) is Literal else ""
        text = f"{option.help}: {names}" if names else option.help
        text += "" if option.default is None else f" ({option.default} if not given)"
        text += "; or by role" + (", as gamma=4,beta=8." if option.type is int else ".")
        flag_name = f"--{option.name.replace('_', '-')}"
        command = click.option(flag_name, option.name, type=_by_role(option), help=text)(command)
    return command


def _tags(_: click.Context, __: click.Parameter, value: str | None) -> list[str] | None:
    return None if value is None else [tag for tag in value.split(",") if tag]


TAGS = click.option(
    "--tags", callback=_tags, help="Tags of the meta graph, comma-separated, where the model holds several."
)


def _named_nodes(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, str] | None:
    nodes: dict[str, str] = {}
    for value in values:
        name, sign, node = value.partition("=")
        if not (name and sign and node):
            raise click.BadParameter(f"{value!r} is not NAME=NODE")
        if name in nodes:
            raise click.BadParameter(f"the name {name} is given twice")
        nodes[name] = node
    return nodes or None


def flag(option: Option) -> str:
    """Return the name of an option on the command line; that of a boolean says the opposite of its default."""
    name = option.name.replace("_", "-")
    if get_origin(option.type) is Mapping:  # each use adds one entry
        return f"--{name.removesuffix('s')}"
    return f"--no-{name}" if option.default is True else f"--{name}"


FLAGS = {option.name: flag(option) for options in OPTIONS for option in options_of(options)}
"""Names of the passes' options on the command line."""


def pass_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command all options of passes. An option that is not given is None, so that the file's value counts."""
    for option in reversed([option for options in OPTIONS for option in options_of(options)]):
        command = click.option(flag(option), option.name, help=_help(option), **_form(option))(command)
    return command


def _form(option: Option) -> dict[str, Any]:
    """Return the arguments of `click.option` that follow from an option's type."""
    kind = get_origin(option.type) or option.type
    if kind is bool:
        return {"is_flag": True, "flag_value": not option.default, "default": None}
    if kind is Mapping:
        return {"multiple": True, "callback": _named_nodes, "metavar": "NAME=NODE"}
    if kind is Literal:
        return {"type": click.Choice(get_args(option.type))}
    if kind is int:
        least, limit = option.bounds
        return {"type": click.IntRange(least, None if limit is None else limit - 1)}
    return {"type": kind}  # the bounds of floats are checked with the configuration file's


def _help(option: Option) -> str:
    """Return an option's help text, with its default, as a sentence."""
    if option.default is True:
        return f"Do not {option.help[0].lower()}{option.help[1:]}."
    if get_origin(option.type) is Mapping:
        return f"{option.help}; repeatable."
    if option.default is None or option.default is False:
        return f"{option.help}."
    return f"{option.help} ({option.default} if not given)."


RUN_TRUSTED = click.option(
    "--trust", is_flag=True, help="Run it even if it holds ops for files, the network or Python."
)

VERBOSE = click.option(
    "-v",
    "--verbose",
    is_flag=True,
    help="List sites and all notes; print each pass, with its edits and its time, to stderr.",
)
