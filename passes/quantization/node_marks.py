"""Marks on the nodes that compute the parts of a quantiser's arithmetic.

TensorFlow keeps attributes of nodes when a user loads and saves a model again, but gives functions and arguments other
names.
"""

from __future__ import annotations

from dataclasses import replace

from rewriter import ops, protos
from rewriter.expr import Apply, Expr

AMOUNT = "amount"
"""The blend weight, float32 scalar: 0 is float, 1 is quantised."""

WIDTH = "width"
"""A comparison whose first input is the width in force, int32."""

CODE = "code"
"""The codes of the values, whole numbers in a float dtype."""

SCALE = "scale"
"""The distance between two levels."""

ZERO_POINT = "zero_point"
"""The code of zero, a whole number in a float dtype."""

ORIGIN = "origin"
"""The level of code 0, in the coordinate in which levels are equally spaced."""

EPSILON = "epsilon"
"""The number that was added to a variance before its logarithm was taken, float32 scalar."""


def marked(name: str, value: Expr) -> Expr:
    """Return an expression whose node is marked as this part.

    Raises:
        AssertionError: it has no node of its own.
    """
    if not isinstance(value, Apply):
        raise AssertionError(f"{name} is not what an op computes")
    return replace(value, attrs={**value.attrs, ops.LABEL: protos.attr(name)})
