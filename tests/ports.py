"""Inputs and outputs of the quantisers in a loaded function, compared with the reference."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from passes.batch_norm.roles import ROLES
from tests import harness
from tests.reference import Quantized, quantize


class Port(NamedTuple):
    """One quantiser of one run: its tag, output and inputs."""

    tag: dict[str, Any]
    got: np.ndarray
    raw: np.ndarray
    amount: float
    bits: int
    limits: np.ndarray | None
    noise: np.ndarray | None

    def wanted(self, epsilon: float) -> np.ndarray:
        """Return the reference's output for the same inputs."""
        if self.amount == 0 or self.bits == 0:
            return self.raw
        scheme = self.tag["scheme"]
        options: dict[str, Any] = {"narrow": self.tag["narrow_range"], "limits": self.limits, "noise": self.noise}
        quantised: Quantized = quantize(scheme, self.raw, self.bits, epsilon, **options)
        amount = np.float32(self.amount)
        blend: np.ndarray = quantised.value * amount + self.raw * (np.float32(1) - amount)
        return blend


def ports(body: Any, x: Sequence[Any]) -> list[Port]:
    """Call a concrete function once, and return the quantisers in its own body."""
    nodes = [op for op in body.graph.get_operations() if harness.TAG in op.node_def.attr]
    tensors = [t for node in nodes for t in _needed(node)]
    names = list(dict.fromkeys(t.name for t in tensors))
    values = dict(zip(names, harness.fetch(body, x, names), strict=True))
    batched: dict[str, BatchedVector] = {}
    for choice in {node.inputs[0].op.name: node.inputs[0].op for node in nodes}.values():
        if choice.type == "StatelessCase":
            batched |= _batched_vectors(body, values, choice)
    result = []
    for node in nodes:
        tag = json.loads(node.node_def.attr[harness.TAG].s)
        result.append(batched[node.name].port(tag) if node.name in batched else _single(values, node, tag))
    return result


def _needed(node: Any) -> Iterator[Any]:
    """Yield the tensors that hold a tagged node's inputs and output."""
    call = _call(node)
    yield from (node.outputs[0], node.inputs[-1], *call.inputs)
    if call.type == "StatelessCase":
        yield from (t for i in call.inputs if i.op.type == "Cast" for t in i.op.inputs[0].op.inputs[:2])


def _call(node: Any) -> Any:
    """Return the op that quantises: the node itself, the op whose result is unpacked, or the batched StatelessCase."""
    before = node.inputs[0].op
    return before.inputs[0].op if before.type == "Unpack" else before if before.type == "StatelessCase" else node


class BatchedVector(NamedTuple):
    """One vector of a batched call: its output and inputs."""

    got: np.ndarray
    raw: np.ndarray
    amount: np.ndarray
    bits: int
    noise: np.ndarray | None

    def port(self, tag: dict[str, Any]) -> Port:
        """Return the port of this vector."""
        return Port(tag, self.got, self.raw, float(self.amount), self.bits, None, self.noise)


def _batched_vectors(body: Any, values: Mapping[str, np.ndarray], choice: Any) -> dict[str, BatchedVector]:
    """Return the vectors of a batched call by tagged node.

    The inputs of the StatelessCase hold them, laid out as by `passes.quantization.batched.batch_function`.
    """
    branch = choice.get_attr("branches")[0].name
    library = body.graph.as_graph_def().library.function
    (names,) = ([a.name for a in f.signature.input_arg] for f in library if f.signature.name == branch)
    inputs = dict(zip(names, choice.inputs[1:], strict=True))
    input_values = {name: values[t.name] for name, t in inputs.items()}
    tagged = {}
    for op in (op for t in choice.outputs for op in t.consumers() if harness.TAG in op.node_def.attr):
        tag = json.loads(op.node_def.attr[harness.TAG].s)
        tagged[tag["role"], tag["layer"]] = op
    vectors: dict[str, BatchedVector] = {}
    for name in (name for name in inputs if name.startswith("bits_")):
        of, places = (values[t.name] for t in inputs[name].op.inputs[0].op.inputs[:2])
        noise = input_values.get(name.replace("bits", "noise"))
        first = 0
        for number, place in enumerate(places.ravel()):
            op = tagged[ROLES[place // (len(of) // len(ROLES))], place % (len(of) // len(ROLES))]
            raw = input_values[f"vector_{op.inputs[0].value_index}"]
            vector_noise = None if noise is None else noise.ravel()[first : first + raw.size]
            output = values[op.outputs[0].name]
            vectors[op.name] = BatchedVector(
                output, raw, input_values["amount"], int(input_values[name][number, 0]), vector_noise
            )
            # Each vector's noise starts at a new block of the row.
            first += 0 if noise is None else -(-raw.size // noise.shape[1]) * noise.shape[1]
    return vectors


def _single(values: Mapping[str, np.ndarray], node: Any, tag: dict[str, Any]) -> Port:
    """Return the port of a single quantiser, or of one row of a stack with one spec."""
    call = _call(node)
    row = None if call is node else node.inputs[0].value_index
    output, raw, *call_inputs = (values[t.name] for t in (node.outputs[0], node.inputs[-1], *call.inputs[:-1]))
    amount, bits, *rest = call_inputs if row is None else [call_inputs[0], *(t[row] for t in call_inputs[1:])]
    limits = rest.pop(0) if tag["range"] != "dynamic" else None
    noise = rest.pop(0) if rest else None
    return Port(tag, output, raw, float(amount), int(np.ravel(bits)[0]), limits, noise)


def assert_equal(port: Port, epsilon: float) -> None:
    """Assert that a port equals the reference bit for bit.

    The scheme log may differ by one ulp of v + epsilon, as two libraries compute the logarithms.
    """
    expected = port.wanted(epsilon)
    if port.tag["scheme"] == "log":
        ulp = np.spacing((np.abs(expected) + np.float32(epsilon)).astype(np.float32))
        assert (np.abs(port.got - expected) <= ulp).all(), (port, expected)
    elif port.amount in (0, 1):
        np.testing.assert_array_equal(port.got, expected)
    else:
        np.testing.assert_allclose(port.got, expected, rtol=1e-6, atol=1e-7)  # a product and a sum may be one operation
