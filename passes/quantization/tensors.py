"""Tensors of several layers, such as weights, fake-quantised by one call.

Like vectors (`batched`), they share a Case with a branch for each execution mode, as a Case for each would cost more
than some of them take to quantise. Tensors are not concatenated: each is large enough for ops of its own.
"""

from __future__ import annotations

import numpy as np

from passes.quantization.batched import GENERAL, NAMES, straight_through
from passes.quantization.quantizers import Differentiable, QuantizerSpec, Values, wide
from passes.quantization.schemes import FLOAT
from rewriter.expr import Expr, Function, Shape, array, constant, op, parameter, select


def tensor_function(specs: tuple[QuantizerSpec, ...], mode: int) -> Function:
    """Return the function of an execution mode: (amount, bits, limits.., noise.., tensors..) -> tensors.

    Bits are int64 [tensors]. Limits are float32 [2], or [ranges, 2], for each tensor whose range is not dynamic. Noise
    is float32 of the tensor's shape, for each tensor with stochastic rounding.
    """
    amount, bits = parameter("amount", FLOAT), parameter("bits", "int64")
    limits = {i: parameter(f"limits_{i}", FLOAT) for i, spec in enumerate(specs) if spec.limited}
    noise = {i: parameter(f"noise_{i}", FLOAT) for i, spec in enumerate(specs) if spec.stochastic}
    tensors = [parameter(f"tensor_{i}", spec.dtype) for i, spec in enumerate(specs)]
    shapes: list[Shape] = [
        (),
        (len(specs),),
        *(specs[i].limits_shape for i in limits),
        *(specs[i].shape for i in noise),
        *(spec.shape for spec in specs),
    ]
    results: list[Expr] = []
    for i, (spec, tensor) in enumerate(zip(specs, tensors, strict=True)):
        width = op("GatherV2", bits, array(np.array([i], np.int32)), constant(0, "int32"))
        on_grid = Differentiable(Values(spec, tensor, spec.shape), width, limits.get(i), noise.get(i))
        acting = op("Greater", amount, 0.0) & wide(width)
        if mode == GENERAL and not spec.limited:
            # XLA compiles the gradient of a Case only if no branch passes on to it what the others do not compute, such
            # as the condition of a select.
            quantized = straight_through(tensor, select(acting, on_grid.blend(amount), tensor))
            results.append(op("Reshape", quantized, array(np.array(spec.shape, np.int32))))
        elif mode == GENERAL:
            results.append(select(acting, on_grid.through(amount), tensor))
        else:
            results.append(on_grid.through() if mode else tensor)
    parameters = (amount, bits, *limits.values(), *noise.values(), *tensors)
    return Function(f"bnqat_{len(specs)}_tensors_{NAMES[mode]}", parameters, tuple(shapes), tuple(results))
