"""Reports as lines and tables: on a terminal, as text, and in a notebook. Names in them are untrusted text."""

from __future__ import annotations

import io
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import IO, TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, cast

from rewriter.app.terminal import printable, say

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from rewriter.app.report_schema import QuantizerReport

WIDTH = 160
"""Characters of a line of a table, if it is not printed to a terminal."""


@dataclass(frozen=True)
class Line:
    """A line of text, in bold letters if it is a heading; `label` precedes it, in a colour of click's or none."""

    text: str
    label: str = ""
    colour: str | None = None
    bold: bool = False


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        folded: true if long words are broken over lines; else they are cut.
        unbroken: true if a cell is always one line.
    """

    name: str
    justify: Literal["left", "right"] = "left"
    folded: bool = False
    unbroken: bool = False


@dataclass(frozen=True)
class Table:
    """A table of texts."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    title: str = ""


Block: TypeAlias = Line | Table


def columns(*names: str, justify: Literal["left", "right"] = "left", folded: bool = False) -> list[Column]:
    """Return columns of one kind."""
    return [Column(name, justify, folded) for name in names]


def print_blocks(blocks: Iterable[Block]) -> None:
    """Print lines and tables to stdout, with colours and as wide as the terminal if there is one."""
    for block in blocks:
        if isinstance(block, Table):
            _print_table(block, sys.stdout, None if sys.stdout.isatty() else WIDTH)
        else:
            say(block.label, nl=False, fg=block.colour)
            say(block.text, bold=block.bold or None)


def text_of(blocks: Iterable[Block]) -> str:
    """Return lines and tables as plain text of a fixed width."""
    text = io.StringIO()
    for block in blocks:
        if isinstance(block, Table):
            _print_table(block, text, WIDTH)
        else:
            text.write(f"{printable(block.label + block.text)}\n")
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def html_of(blocks: Iterable[Block]) -> str:
    """Return lines and tables as HTML for a notebook's cell."""
    from rewriter.page.shell import fragment

    return fragment("report.html.j2", blocks=list(blocks), printable=printable)


def _print_table(table: Table, file: IO[str], width: int | None) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable

    drawn = RichTable(box=box.SIMPLE_HEAD, title=table.title or None)
    for column in table.columns:
        overflow: Any = "fold" if column.folded else "ellipsis"
        drawn.add_column(column.name, justify=column.justify, overflow=overflow, no_wrap=column.unbroken)
    for row in table.rows:
        drawn.add_row(*map(printable, row))
    # A notebook and variables such as FORCE_COLOR would let rich write to somewhere else, and with colours.
    terminal = file.isatty()
    console = Console(
        file=file,
        width=width,
        force_terminal=terminal,
        force_jupyter=False,
        color_system="auto" if terminal else None,
        markup=False,
        emoji=False,
        highlight=False,
    )
    console.print(drawn)


class Report:
    """A dataclass that reads well: `repr()` is one line, `str()` what its command prints; a notebook shows tables."""

    PLACES: ClassVar[Sequence[str]] = ()
    """Fields with the paths of models and files, on which the JSON text does not depend."""

    @property
    def headline(self) -> str:
        """The result in a few words."""
        raise NotImplementedError

    def blocks(self) -> Iterable[Block]:
        """Return what the report's command prints."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Return the report without paths, as dicts and lists."""
        content = asdict(cast("DataclassInstance", self))
        return {name: value for name, value in content.items() if name not in self.PLACES}

    def to_json(self) -> str:
        """Return the report without paths, as JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {printable(self.headline)}>"

    def __str__(self) -> str:
        return text_of(self.blocks())

    def _repr_html_(self) -> str:
        return html_of(self.blocks())


def counted(number: int, noun: str) -> str:
    """Return a number and its noun, like "1 site" or "2 sites"."""
    return f"{number} {noun}" if number == 1 else f"{number} {plural(noun)}"


def plural(noun: str) -> str:
    """Return the plural of a noun, such as a role's name: "weights", "biases"."""
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


def widths_text(widths: Sequence[int]) -> str:
    """Return sorted widths as "4 bits", "4 and 8 bits" or "2 to 8 bits"."""
    two = 2
    between = " and " if len(widths) == two else " to "
    return f"{between.join(str(bits) for bits in dict.fromkeys((widths[0], widths[-1])))} bits"


def quantized_text(quantizers: Iterable[QuantizerReport]) -> str:
    """Return the quantised values by role, as "2 weights to 8 bits, 1 bias to 4 bits"."""
    widths: dict[str, list[int]] = {}
    numbers: Counter[str] = Counter()
    for quantizer in quantizers:
        widths.setdefault(quantizer.role, []).append(quantizer.bits)
        numbers[quantizer.role] += members(quantizer.layer_name)
    return ", ".join(
        f"{counted(numbers[role], noun_of(role))} to {widths_text(sorted(of_role))}" for role, of_role in widths.items()
    )


def members(layer_name: str) -> int:
    """Return the number of layers that a name means: several that share a function are joined with "+"."""
    return layer_name.count("+") + 1


def quantizers_table(quantizers: Iterable[QuantizerReport], title: str) -> Table:
    """Return a row for each quantised value that is not a batch norm's, by layer and role."""
    heads = [
        *columns("layer", folded=True),
        *columns("role", "scheme", "range", "granularity"),
        *columns("bits", "places", justify="right"),
    ]
    rows = [
        (q.layer_name, q.role, q.scheme, q.range, q.granularity.replace("_", " "), str(q.bits), str(len(q.places)))
        for q in quantizers
    ]
    return Table(heads, rows, title)


def noun_of(role: str) -> str:
    """Return a role's name as a noun."""
    return role.replace("_", " ")


SHOWN = 3
"""Number of names that a line lists."""


def listed(names: Sequence[str]) -> str:
    """Return names as "a, b, c and 4 more"."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def layers_named(names: Sequence[str], noun: str = "batch norm") -> str:
    """Return the names of a few layers; of many, also their number."""
    return f"{counted(len(names), noun)} ({listed(names)})" if len(names) > SHOWN else listed(names)
