"""Options of passes: fields of dataclasses, each with its type, check, default and help text.

A pass inherits its options. The configuration file and the command line are made from the same fields, and the table
in the documents is tested against them. Importing this module, or `passes`, imports neither TensorFlow nor pydantic,
which checks the values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Lt

from rewriter.ir import Error


class Help(NamedTuple):
    """An option's help text: a phrase without a full stop; that of a boolean is an imperative."""

    text: str


class Strict:
    """A check that takes values of the type itself only: 1.0 is no number of steps, and "yes" is not true.

    It is pydantic's marker of this name, whose import would make ``bnqat --help`` slower by half.
    """

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Return the schema of the type, with values that are not converted."""
        return {**handler(source), "strict": True}


class Check(NamedTuple):
    """A check that no type expresses: the function returns the value as it is to be held, or raises ValueError."""

    function: Callable[[Any], Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Return the schema of a value that only the function checks."""
        del source, handler
        return {"type": "function-plain", "function": {"type": "no-info", "function": self.function}}


class Text(NamedTuple):
    """The form of an option's value on the command line, where it does not follow from the type.

    Attributes:
        name: the name of such a text in the command's help.
        parse: the value of a text; raises ValueError for one that it does not take.
        expected: what the text is to be, in an error.
    """

    name: str
    parse: Callable[[str], Any]
    expected: str


Step = Annotated[int, Strict(), Ge(0), Lt(2**63)]
"""A number of training steps, as an int64 variable holds it."""
Flag = Annotated[bool, Strict()]


class Option(NamedTuple):
    """One option of a pass.

    Attributes:
        annotation: the type as pydantic takes it, with its checks; None is allowed where it is the default.
        type: the type alone, without checks and None.
        bounds: the least value, and the first one that is too large; None where there is no bound.
        text: its form on the command line, where that does not follow from the type.
    """

    name: str
    annotation: Any
    default: Any
    help: str
    type: Any
    bounds: tuple[int | None, int | None]
    text: Text | None


@dataclass(frozen=True)
class PassOptions:
    """Base of the classes of options. Fields with a `Help` are options; a pass may have others besides.

    Raises:
        Error: an option has a wrong value.
    """

    def __post_init__(self) -> None:
        for option in options_of(type(self)):
            object.__setattr__(self, option.name, _checked(option, getattr(self, option.name)))


def options_of(options: type[PassOptions]) -> tuple[Option, ...]:
    """Return the options among the fields of a class."""
    annotations = get_type_hints(options, include_extras=True)
    described = [(field, *_unwrapped(annotations[field.name])) for field in fields(options)]
    return tuple(
        Option(
            field.name,
            annotations[field.name],
            field.default,
            help_text.text,
            type_alone,
            (_first(Ge, "ge", metadata), _first(Lt, "lt", metadata)),
            next((m for m in metadata if isinstance(m, Text)), None),
        )
        for field, type_alone, metadata in described
        for help_text in metadata
        if isinstance(help_text, Help)
    )


def _unwrapped(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return a type without metadata and None, and its metadata."""
    if get_origin(annotation) is Annotated:
        type_alone, metadata = _unwrapped(annotation.__origin__)
        return type_alone, (*metadata, *annotation.__metadata__)
    types = [t for t in get_args(annotation) if t is not NoneType]
    if get_origin(annotation) in (Union, UnionType) and len(types) == 1:
        return _unwrapped(types[0])
    return annotation, ()


def _first(kind: type, attribute: str, metadata: tuple[Any, ...]) -> int | None:
    return next((getattr(m, attribute) for m in metadata if isinstance(m, kind)), None)


def _checked(option: Option, value: Any) -> Any:
    """Return an option's value, converted to the option's type.

    Raises:
        Error: the value fails the option's check.
    """
    from pydantic import ValidationError

    try:
        return _adapter(option.annotation).validate_python(value)
    except ValidationError as e:
        error = e.errors()[0]
        raise Error(refusal(".".join(map(str, (option.name, *error["loc"]))), error)) from e


@cache
def _adapter(annotation: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(annotation)


def refusal(key: str, error: Mapping[str, Any]) -> str:
    """Return a sentence on a key's wrong value, from pydantic's error: the value, and what it is to be."""
    message = error["msg"].removeprefix("Value error, ")
    sentence = f"{key} = {error['input']!r:.100}: {message[0].lower()}{message[1:]}"
    return sentence.replace("input should be", "it is to be")
