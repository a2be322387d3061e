"""The fake-quantise functions of weights, against the reference: in a graph, op by op and under XLA, bit for bit."""

from __future__ import annotations

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
from tests.passes.quantizer_runs import eager_function

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
