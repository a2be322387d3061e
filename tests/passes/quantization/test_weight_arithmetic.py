"""The fake-quantise functions of weights, against the reference: in a graph, op by op and under XLA, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from passes.quantization.batched import GENERAL
from passes.quantization.tensors import tensor_function
from tests.passes.quantization.weight_runs import (
    SCHEMES,
    compiled_tensors,
    drawn,
    saved_tensors,
    specs_of,
    tensor_inputs,
)
from tests.passes.quantizer_runs import compiled, eager, eager_function, function_inputs, saved

F = np.float32
OFF, ON = 0, 1


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("mode", [ON, GENERAL])
def test_every_combination_equals_its_reference(name: str, mode: int) -> None:
    """One function serves all widths."""
    specs = specs_of(name)
    clipped = 0
    for bits in range(2, 17):
        tensors = [drawn(spec, bits) for spec in specs]
        inputs = tensor_inputs(tensors)
        expected = [t.reference() for t in tensors]
        runs = [saved_tensors(specs, mode)(*inputs), compiled_tensors(specs, mode)(*inputs)]
        if bits in (2, 5, 8, 16):
            runs.append(eager_function(tensor_function(specs, mode), inputs))
        for results in runs:
            for t, result, reference in zip(tensors, results, expected, strict=True):
                np.testing.assert_array_equal(result.numpy(), reference.value, err_msg=f"{bits} bits, {t.spec}")
        clipped += sum(not reference.inside.all() for reference in expected)
    assert clipped


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("jit", [False, True])
def test_a_single_weight_equals_its_reference(name: str, jit: bool) -> None:
    """Weights that share no call, as in TensorFlow 1's format, are quantised by a function of their own."""
    for spec in specs_of(name)[:: 3 if jit else 2]:
        for bits in (2, 3, 8, 16):
            t = drawn(spec, bits)
            inputs = function_inputs(spec, t.weight, bits, limits=t.given, noise=t.noise)
            results = [compiled(spec)(*inputs)] if jit else [saved(spec)(*inputs), eager(spec, inputs)]
            for result in results:
                np.testing.assert_array_equal(result.numpy(), t.reference().value, err_msg=f"{bits} bits, {spec}")


AMOUNT = 0.3


@pytest.mark.parametrize("name", SCHEMES)
def test_a_ramp_blends(name: str) -> None:
    specs = specs_of(name)
    tensors = [drawn(spec, 3) for spec in specs]
    inputs = tensor_inputs(tensors, AMOUNT)
    runs = [run(specs, GENERAL)(*inputs) for run in (saved_tensors, compiled_tensors)]
    runs.append(eager_function(tensor_function(specs, GENERAL), inputs))
    for i, t in enumerate(tensors):
        whole = t.reference().value
        expected = whole * F(AMOUNT) + t.weight * (F(1) - F(AMOUNT))
        in_graph, in_xla, by_op = (results[i].numpy() for results in runs)
        np.testing.assert_array_equal(by_op, expected)
        # Grappler multiplies scale and blend weight first; XLA rounds a product together with the sum.
        last_place = np.spacing(np.maximum(np.abs(whole), np.abs(t.weight)))
        for result in (in_graph, in_xla):
            assert (np.abs(result - expected) <= last_place).all()
        assert not np.array_equal(expected, whole)


@pytest.mark.parametrize("name", SCHEMES)
def test_off_is_the_weight_bit_for_bit(name: str) -> None:
    specs = specs_of(name)
    tensors = [drawn(spec, 4) for spec in specs]
    for t in tensors:
        t.weight.ravel()[:4] = [np.nan, np.inf, -np.inf, -0.0]
    amounts_and_widths = [(OFF, 1.0, 4), (GENERAL, 0.0, 4), (GENERAL, 1.0, 0)]
    for mode, amount, width in amounts_and_widths:
        inputs = tensor_inputs(tensors, amount, [width] * len(tensors))
        for run in (saved_tensors, compiled_tensors):
            for t, result in zip(tensors, run(specs, mode)(*inputs), strict=True):
                assert result.numpy().tobytes() == t.weight.tobytes()


def test_one_of_several_weights_is_switched_off() -> None:
    specs = specs_of("symmetric")[:3]
    tensors = [drawn(spec, 4) for spec in specs]
    first, second, third = saved_tensors(specs, GENERAL)(*tensor_inputs(tensors, bits=[4, 0, 4]))
    np.testing.assert_array_equal(first, tensors[0].reference().value)
    np.testing.assert_array_equal(second, tensors[1].weight)
    np.testing.assert_array_equal(third, tensors[2].reference().value)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("run", [saved_tensors, compiled_tensors])
def test_values_that_are_not_finite(name: str, run: Callable[..., Any]) -> None:
    """NaN stays NaN, an infinity makes its channel NaN, and other channels are as ever.

    The rest of a channel with NaN is not held here: kernels do not agree on the greatest of such values.
    """
    spec = specs_of(name)[0]
    t = drawn(spec, 4)
    spoiled = t.weight.copy()
    spoiled[0, 0, 0, 1:3] = np.nan, np.inf
    (result,) = [run((spec,), ON)(*tensor_inputs([t._replace(weight=spoiled)])).numpy()]
    assert np.isnan(result[0, 0, 0, 1])
    assert np.isnan(result[..., 2]).all()
    others = [0, 3, 4]
    np.testing.assert_array_equal(result[..., others], t.reference().value[..., others])
