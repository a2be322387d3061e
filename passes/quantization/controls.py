"""The variables with which a running program controls quantisation, and what a call of the model reads of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from passes.quantization.batched import how
from passes.quantization.custom import Quantizer
from passes.quantization.node_marks import AMOUNT, marked
from passes.quantization.quantizers import learned_limits
from passes.quantization.ranges import Ema, Fixed, Learned
from passes.quantization.schemes import FLOAT, Scheme
from passes.roles import MAX_BITS, ROLES
from rewriter import op_defs
from rewriter.expr import Apply, Expr, PerCall, array, concat, constant, handle, op, per_call, read, select
from rewriter.ir import MAIN, Error, Model, Variable
from rewriter.protos import Dtype

AUTO, ON_WRITE, ON_READ = 0, 2, 3
NONE, MEAN, ONLY_FIRST_REPLICA = 0, 2, 3
AS_ROLE = -1
"""In a variable for each layer: the layer has what its role has."""


def control(model: Model, name: str, initial: int, dtype: str = "int64") -> Variable:
    """The model's scalar `quantization/<name>`, the same on every replica; a new one if it has none."""
    return _found(model, name, ()) or _variable(model, name, np.array(initial, dtype))


def _found(model: Model, name: str, shape: tuple[int, ...]) -> Variable | None:
    full = f"quantization/{name}"
    found = next((v for v in model.variables.values() if v.name == full), None)
    if found is not None and found.shape != shape:
        raise Error(
            f"the model has {full} of another number of layers already: it was rewritten when it had other "
            "batch norms; rewrite the float model again"
        )
    return found


def _variable(
    model: Model,
    name: str,
    initial: np.ndarray,
    *,
    synchronization: int = ON_WRITE,
    aggregation: int = ONLY_FIRST_REPLICA,
) -> Variable:
    full = f"quantization/{name}"
    return Variable(
        model.new_key(full),
        full,
        initial.dtype.name,
        initial.shape,
        synchronization=synchronization,
        aggregation=aggregation,
        path=full.replace("/", "."),
        initial=initial,
    )


def step(model: Model) -> Variable:
    """How many training steps the model has made: one for each call of its training function."""
    return control(model, "step", 0)


def increment(model: Model) -> Apply:
    """The op that counts one step."""
    return op("AssignAddVariableOp", handle(step(model)), constant(1, "int64"))


def counters(model: Model) -> tuple[str, ...]:
    """The nodes of the main graph that count steps."""
    main = model.graphs[MAIN]
    holders = {v.node for v in model.variables.values() if v.name == "quantization/step"}
    key = step(model).key.encode()
    holders |= {
        n.name for n in main.nodes.values() if n.op == "VarHandleOp" and op_defs.attribute(n, "shared_name").s == key
    }
    return tuple(n.name for n in main.nodes.values() if n.op == "AssignAddVariableOp" and n.inputs[0].node in holders)


class Initial(NamedTuple):
    """What the variables hold at first: widths by role, and ranges, [layers, 2], by role."""

    start_step: int
    ramp_steps: int
    bits: Mapping[str, int]
    limits: Mapping[str, np.ndarray]


class Controls:
    """What quantisers are told, by variables that the model has or gets.

    A value for each quantiser is a row: row `role * layers + layer`, roles in the order of `ROLES`.

    Attributes:
        quantizers: each role's quantisers, one for each layer; None where a layer has none.
        variables: those of which something is read.
        amount: float32 scalar, from 0 before `start_step` to 1 from `ramp_steps` later.
        bits: int32 [rows], the widths in force.
        how: int32 scalar, how vectors are quantised together, as `passes.quantization.batched.how` says.
        limits: float32 [rows, 2], the ranges that are not dynamic, each in its scheme's coordinate.
        key: uint64 [1], from which random numbers follow: the step.
    """

    def __init__(self, model: Model, quantizers: Mapping[str, Sequence[Quantizer | None]], initial: Initial) -> None:
        self.model = model
        self.quantizers = quantizers
        self.initial = initial
        self.layers = len(quantizers[ROLES[0]])
        start, ramp = (control(model, name, getattr(initial, name)) for name in ("start_step", "ramp_steps"))
        self.variables: dict[str, Variable] = {"start_step": start, "ramp_steps": ramp, "step": step(model)}
        self.amount = per_call("quantization_amount", _amount(*(read(self.variables[n]) for n in self.variables)))
        self.bits = per_call("quantization_bits", self._bits(), (4 * self.layers,))
        used = [self.row(role, i) for role in ROLES for i, q in enumerate(quantizers[role]) if q is not None]
        self.how = per_call("quantization_how", how(self.amount, taken(self.bits, np.array(used))))
        self.limits = self._limits()
        seed = op("Cast", read(self.variables["step"]), DstT=Dtype("uint64"))
        self.key = per_call("quantization_key", op("Reshape", seed, array(np.array([1], np.int32))), (1,))

    def row(self, role: str, layer: int) -> int:
        """Where a quantiser's values are."""
        return ROLES.index(role) * self.layers + layer

    def ranges(self, role: str) -> Variable:
        """The moving averages of a role's limits, float32 [layers, 2]."""
        return self.variables[f"range/{role}"]

    def _bits(self) -> Expr:
        """Each layer's own width where it has one, else its role's; from 0 to 16."""
        rows: list[Expr] = []
        shape = (self.layers,)
        for role in ROLES:
            own = [AS_ROLE if q is None or q.bits == self.initial.bits[role] else q.bits for q in self.quantizers[role]]
            of_role = control(self.model, f"bits/{role}", self.initial.bits[role], "int32")
            of_layers = _found(self.model, f"layer_bits/{role}", shape) or _variable(
                self.model, f"layer_bits/{role}", np.array(own, np.int32)
            )
            self.variables |= {f"bits/{role}": of_role, f"layer_bits/{role}": of_layers}
            rows.append(select(read(of_layers) >= 0, read(of_layers), read(of_role)))
        return op("Minimum", op("Maximum", concat(rows), 0), MAX_BITS)

    def _limits(self) -> PerCall | None:
        """Given limits, moving averages and learned ones, row by row."""
        if all(q is None or q.range.name == "dynamic" for role in ROLES for q in self.quantizers[role]):
            return None
        return per_call("quantization_limits", concat([self._limits_of(role) for role in ROLES]), (4 * self.layers, 2))

    def _limits_of(self, role: str) -> Expr:
        quantizers, initial = self.quantizers[role], self.initial.limits[role]
        held = {
            spec: [q is not None and isinstance(q.range, spec) for q in quantizers] for spec in (Fixed, Ema, Learned)
        }
        limits: Expr = array(initial * np.array(held[Fixed], np.float32)[:, None])
        if any(held[Ema]):
            name = f"range/{role}"
            shape = (self.layers, 2)
            made = _variable(self.model, name, initial, synchronization=ON_READ, aggregation=MEAN)
            self.variables[name] = _found(self.model, name, shape) or made
            limits = _where(held[Ema], read(self.variables[name]), limits)
        if any(held[Learned]):
            limits = _where(held[Learned], self._learned(role, held[Learned]), limits)
        return limits

    def _learned(self, role: str, held: Sequence[bool]) -> Expr:
        """Limits of scales, and of low limits where a scheme has one, all of them trainable."""
        chosen = [
            q if own and isinstance(q, Scheme) else None for q, own in zip(self.quantizers[role], held, strict=True)
        ]
        pairs = [
            (1.0, 0.0) if q is None else q.learnable(tuple(self.initial.limits[role][i])) for i, q in enumerate(chosen)
        ]
        found = []
        for index, name in enumerate((f"scale/{role}", f"low/{role}")):
            if index == 0 or any(q is not None and q.has_low for q in chosen):
                values = np.array([pair[index] for pair in pairs], np.float32)
                made = _variable(self.model, name, values, synchronization=AUTO, aggregation=NONE)
                made = replace(made, trainable=True)
                self.variables[name] = _found(self.model, name, (self.layers,)) or made
                found.append(read(self.variables[name]))
        return learned_limits(chosen, found[0], found[1] if len(found) > 1 else None)


def taken(values: Expr, index: np.ndarray) -> Expr:
    """Elements along the first axis, in the index's shape."""
    return op("GatherV2", values, array(index.astype(np.int32)), constant(0, "int32"))


def _amount(start: Expr, ramp: Expr, now: Expr) -> Expr:
    """0 before the start, 1 from the ramp's end on, in between the part of the ramp that is over."""
    over = now - start
    begun = op("Cast", op("Maximum", over, 0), DstT=Dtype(FLOAT)) / op(
        "Cast", op("Maximum", ramp, 1), DstT=Dtype(FLOAT)
    )
    return marked(AMOUNT, select((over >= ramp) & (over >= 0), constant(1.0, FLOAT), begun))


def _where(held: Sequence[bool], then: Expr, otherwise: Expr) -> Expr:
    return then if all(held) else select(array(np.array(held)[:, None]), then, otherwise)
