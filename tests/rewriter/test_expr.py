from __future__ import annotations

import numpy as np
import pytest
from tensorflow.python.framework import tensor_util

from rewriter.expr import Apply, Expr, constant, filled


def held(expression: Expr) -> np.ndarray:
    assert isinstance(expression, Apply)
    array: np.ndarray = tensor_util.MakeNdarray(expression.attrs["value"].tensor)
    return array


@pytest.mark.parametrize(("first", "second"), [(0.0, -0.0), (-0.0, 0.0), (1, True), (1, 1.0)])
def test_a_constant_is_the_one_that_was_asked_for(first: float, second: float) -> None:
    """Values that Python takes as equal keys are constants of their own."""
    dtype = "float32" if isinstance(second, float) else "bool"
    assert held(constant(first, "float32")).tobytes() == np.float32(first).tobytes()
    assert held(constant(second, dtype)).tobytes() == np.asarray(second, dtype).tobytes()
    if dtype == "float32":
        for value in (first, second):
            assert held(filled(value, dtype, (3,))).tobytes() == np.full(3, value, dtype).tobytes()


def test_equal_constants_are_one_expression() -> None:
    assert constant(np.float32(0.5), "float32") is constant(0.5, "float32")
    assert filled(0.5, "float32", (2,)) is filled(0.5, "float32", (2,))
