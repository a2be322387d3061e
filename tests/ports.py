"""What quantisers in a loaded function are given and give, held against the reference."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tests import harness
from tests.reference import Quantized, quantize


class Port(NamedTuple):
    """One quantiser: its tag, what it gave, and what it was told."""

    tag: dict[str, Any]
    got: np.ndarray
    raw: np.ndarray
    amount: float
    bits: int
    limits: np.ndarray | None
    noise: np.ndarray | None

    def wanted(self, epsilon: float) -> np.ndarray:
        """What the reference gives."""
        if self.amount == 0 or self.bits == 0:
            return self.raw
        scheme = self.tag["scheme"]
        options: dict[str, Any] = {"narrow": self.tag["narrow_range"], "limits": self.limits, "noise": self.noise}
        found: Quantized = quantize(scheme, self.raw, self.bits, epsilon, **options)
        amount = np.float32(self.amount)
        blend: np.ndarray = found.value * amount + self.raw * (np.float32(1) - amount)
        return blend


def ports(body: Any, x: Sequence[Any]) -> list[Port]:
    """The quantisers in a concrete function's own body, when it is called with these inputs."""
    nodes = [op for op in body.graph.get_operations() if harness.TAG in op.node_def.attr]
    names: list[str] = []
    for node in nodes:
        call = _call(node)
        names += [node.outputs[0].name, node.inputs[-1].name, *(t.name for t in call.inputs[:-1])]
    values = iter(harness.fetch(body, x, names))
    found = []
    for node in nodes:
        tag = json.loads(node.node_def.attr[harness.TAG].s)
        row = None if _call(node) is node else int(node.inputs[0].name.partition(":")[2])
        got, raw = next(values), next(values)
        told = [next(values) for _ in _call(node).inputs[:-1]]
        amount, bits, *rest = told if row is None else [told[0], *(t[row] for t in told[1:])]
        limits = rest.pop(0) if tag["range"] != "dynamic" else None
        noise = rest.pop(0) if rest else None
        found.append(Port(tag, got, raw, float(amount), int(np.ravel(bits)[0]), limits, noise))
    return found


def _call(node: Any) -> Any:
    """The call that quantises: the node itself, or the one of whose result it is a row."""
    unpack = node.inputs[0].op
    return unpack.inputs[0].op if unpack.type == "Unpack" else node


def assert_equal(port: Port, epsilon: float) -> None:
    """Bit for bit; log, whose logarithms are those of two libraries, within one ulp of v + epsilon."""
    wanted = port.wanted(epsilon)
    if port.tag["scheme"] == "log":
        ulp = np.spacing((np.abs(wanted) + np.float32(epsilon)).astype(np.float32))
        assert (np.abs(port.got - wanted) <= ulp).all(), (port, wanted)
    elif port.amount in (0, 1):
        np.testing.assert_array_equal(port.got, wanted)
    else:
        np.testing.assert_allclose(port.got, wanted, rtol=1e-6, atol=1e-7)  # a product and a sum may be one operation
