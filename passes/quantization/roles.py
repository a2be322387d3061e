"""Roles: the kinds of values that are quantised. Importing this module does not import TensorFlow."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from rewriter.ir import Error

MIN_BITS, MAX_BITS = 2, 16
"""The least and the greatest width of a code."""


NAME = re.compile(r"[a-z][a-z0-9_]*")
"""Form of a role's name."""


@dataclass(frozen=True)
class Role:
    """A kind of value that is quantised.

    Attributes:
        name: its name in options, variables and reports.
        scheme: its scheme where the user gives none.
        always: true if it is quantised unless the user says otherwise; else it is quantised where the user gives an
            option for it by name.
        unsuited: schemes and ranges that make no sense for it, with the reason.
        device: true if its codes are those of an integer device (`passes.quantization.device_schemes`).

    Raises:
        Error: its name is no name of a variable.
    """

    name: str
    scheme: str = "affine"
    always: bool = False
    unsuited: Mapping[str, str] = field(default_factory=lambda: {"log": "the scheme log is for values above zero"})
    device: bool = False

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise Error(f"{self.name!r} is no name of a role: it is one of letters, digits and _, as variables bear it")
