"""Types of the command line's options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args, get_origin

import click

from passes import OPTIONS, roles
from passes.options import Option, options_of
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
            if "=" in value and role not in roles():
                self.fail(f"{role!r} is no role; there are {', '.join(roles())}", param, ctx)
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


def _one_of(*names: str) -> Callable[[str], str]:
    """Return a function that returns one of these names, and raises ValueError for another text."""

    def check(text: str) -> str:
        if text not in names:
            raise ValueError(text)
        return text

    return check


def _limits(text: str) -> str | list[float]:
    """Return a range: its name, or two limits from a text like ``-1:1``."""
    if text in RANGES:
        return text
    low, high = text.split(":")
    return [float(low), float(high)]


def _yes_or_no(text: str) -> bool:
    return {"yes": True, "no": False}[_one_of("yes", "no")(text)]


SCHEMES = ("affine", "symmetric", "power_of_two", "log", "none")
RANGES = ("dynamic", "ema", "learned")
BITS = ByRole("bits", width, f"a width is a number from {MIN_BITS} to {MAX_BITS}, or a list like gamma=4,beta=8")
SCHEME = ByRole("scheme", _one_of(*SCHEMES), f"a scheme is one of {', '.join(SCHEMES)}")
RANGE = ByRole("range", _limits, f"a range is one of {', '.join(RANGES)}, or two limits like -1:1")
ROUNDING = ByRole("rounding", _one_of("nearest", "stochastic"), "rounding is nearest or stochastic")
NARROW = ByRole("yes|no", _yes_or_no, "it is yes or no")
QUANTIZER = ByRole("module:function", str, "")


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

VERBOSE = click.option("-v", "--verbose", is_flag=True, help="Print each pass, its edits and its time to stderr.")
