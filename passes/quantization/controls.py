"""The variables with which a running program controls quantisation, and the values that a call reads from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from passes.quantization.batched import execution_mode
from passes.quantization.custom import Quantizer
from passes.quantization.kept_ranges import KeptRange, KeptRanges
from passes.quantization.node_marks import AMOUNT, marked
from passes.quantization.quantizers import learned_limits
from passes.quantization.ranges import Ema, Fixed, Learned
from passes.quantization.roles import MAX_BITS
from passes.quantization.schemes import FLOAT, Scheme
from rewriter import op_defs
from rewriter.expr import Apply, Expr, PerCall, array, concat, constant, handle, op, per_call, read, select
from rewriter.ir import MAIN, Error, Model, Variable
from rewriter.protos import Dtype

AUTO, ON_WRITE, ON_READ = 0, 2, 3
"""Numbers of `tf.VariableSynchronization` in a SavedModel."""

NONE, MEAN, ONLY_FIRST_REPLICA = 0, 2, 3
"""Numbers of `tf.VariableAggregation` in a SavedModel."""

AS_ROLE = -1
"""Stands for the role's value in a variable that has a value for each layer."""


# Every replica of a distribution strategy counts the step. With ON_WRITE and ONLY_FIRST_REPLICA one of them writes, and
# all read the same number, so quantisers start at once everywhere.
def control(model: Model, name: str, initial: int, dtype: str = "int64") -> Variable:
    """Return the scalar `quantization/<name>`, the same on every replica: the model's, or a new one if it has none."""
    return _existing(model, name, ()) or _new_variable(model, name, np.array(initial, dtype))


def _existing(model: Model, name: str, shape: tuple[int, ...]) -> Variable | None:
    """Return the model's variable `quantization/<name>`, or None.

    Raises:
        Error: the model has one of another shape.
    """
    full = f"quantization/{name}"
    variable = next((v for v in model.variables.values() if v.name == full), None)
    if variable is not None and variable.shape != shape:
        raise Error(
            f"the model has {full} of another number of layers already: it was rewritten when it had other "
            "layers; rewrite the float model again"
        )
    return variable


def _new_variable(
    model: Model,
    name: str,
    initial: np.ndarray,
    *,
    synchronization: int = ON_WRITE,
    aggregation: int = ONLY_FIRST_REPLICA,
) -> Variable:
    """Return a new variable `quantization/<name>`, which is not yet in the model."""
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
    """Return the variable that counts training steps: one for each call of the training function."""
    return control(model, "step", 0)


def has_quantizers(model: Model) -> bool:
    """Return true if a rewrite has given the model quantisers, each role of which has a width."""
    return any(v.name.startswith("quantization/bits/") for v in model.variables.values())


def control_values(model: Model, *names: str) -> dict[str, int]:
    """Return the values of the scalars `quantization/<name>`, by name, of those that the model has."""
    full_names = {f"quantization/{name}": name for name in names}
    keys = {full_names[v.name]: key for key, v in model.variables.items() if v.name in full_names and v.shape == ()}
    return {name: int(model.value_of(key)) for name, key in keys.items()}


def increment(model: Model) -> Apply:
    """Return the op that counts one step."""
    return op("AssignAddVariableOp", handle(step(model)), constant(1, "int64"))


def counters(model: Model) -> tuple[str, ...]:
    """Return the nodes of the main graph that count steps."""
    main = model.graphs[MAIN]
    handles = {v.node for v in model.variables.values() if v.name == "quantization/step"}
    key = step(model).key.encode()
    handles |= {
        n.name for n in main.nodes.values() if n.op == "VarHandleOp" and op_defs.attribute(n, "shared_name").s == key
    }
    return tuple(n.name for n in main.nodes.values() if n.op == "AssignAddVariableOp" and n.inputs[0].node in handles)


class Schedule(NamedTuple):
    """Initial values of the variables that say when, and with which widths, quantisers act.

    Attributes:
        start_step: the first step at which they act.
        ramp_steps: the number of steps from there on in which float and quantised value are blended.
        bits: the width of each role; 0 where it has no quantiser.
    """

    start_step: int
    ramp_steps: int
    bits: Mapping[str, int]


class Controls:
    """The values that quantisers are given, read from variables that the model has or gets.

    A value for each quantiser is a row: those of a role, one for each layer, follow those of the role before it.

    Attributes:
        quantizers: each role's quantisers, one for each layer; None where a layer has none.
        starting_limits: the limits, [layers, 2], that the ranges of each role begin with.
        variables: the variables that are read, by name below `quantization/`.
        amount: blend weight, float32 scalar, from 0 before `start_step` to 1 from `ramp_steps` later.
        bits: int32 [rows], the widths in force.
        execution_mode: int32 scalar, the branch of batched calls: see `passes.quantization.batched.execution_mode`.
        limits: float32 [rows, 2], the ranges that are not dynamic, each in its scheme's coordinate; or None.
        key: uint64 [1], the key of random numbers: the step.
        kept: the ranges of weights that are kept, by role; they are none of `limits`.
    """

    def __init__(
        self,
        model: Model,
        quantizers: Mapping[str, Sequence[Quantizer | None]],
        schedule: Schedule,
        limits: Mapping[str, np.ndarray],
        kept: Mapping[str, Mapping[int, KeptRange]],
    ) -> None:
        self.model = model
        self.quantizers = quantizers
        self.schedule = schedule
        self.starting_limits = limits
        self.first_rows = dict(zip(quantizers, accumulate((0, *map(len, quantizers.values()))), strict=False))
        start, ramp = (control(model, name, getattr(schedule, name)) for name in ("start_step", "ramp_steps"))
        self.variables: dict[str, Variable] = {"start_step": start, "ramp_steps": ramp, "step": step(model)}
        # What all quantisers need is computed once for each call of a function from outside, and passed down to them: a
        # read and a comparison at each of a hundred quantisers would cost more than the quantising.
        self.amount = per_call("quantization_amount", _amount(*(read(self.variables[n]) for n in self.variables)))
        self.bits = per_call("quantization_bits", self._bits(), (self._rows,))
        rows = [self.row(role, i) for role, of in quantizers.items() for i, q in enumerate(of) if q is not None]
        self.execution_mode = per_call(
            "quantization_how", execution_mode(self.amount, gathered(self.bits, np.array(rows)))
        )
        self.limits = self._limits()
        self.kept = {
            role: KeptRanges(role, dict(sorted(of.items())), self._range_variable) for role, of in kept.items()
        }
        for ranges in self.kept.values():
            self.variables |= ranges.variables
        seed = op("Cast", read(self.variables["step"]), DstT=Dtype("uint64"))
        self.key = per_call("quantization_key", op("Reshape", seed, array(np.array([1], np.int32))), (1,))

    @property
    def given_limits(self) -> Expr:
        """The limits, for a quantiser whose range is not dynamic."""
        if self.limits is None:
            raise AssertionError("all ranges are dynamic")
        return self.limits

    def row(self, role: str, layer: int) -> int:
        """Return the row of a quantiser's values."""
        return self.first_rows[role] + layer

    @property
    def _rows(self) -> int:
        return sum(map(len, self.quantizers.values()))

    def ranges(self, role: str) -> Variable:
        """Return the variable of a role's moving averages of limits, float32 [layers, 2]."""
        return self.variables[f"range/{role}"]

    def _bits(self) -> Expr:
        """Return the widths, 0 to 16: each layer's own where it has one, else its role's."""
        rows: list[Expr] = []
        for role, quantizers in self.quantizers.items():
            shape = (len(quantizers),)
            initial_bits = [AS_ROLE if q is None or q.bits == self.schedule.bits[role] else q.bits for q in quantizers]
            of_role = control(self.model, f"bits/{role}", self.schedule.bits[role], "int32")
            of_layers = _existing(self.model, f"layer_bits/{role}", shape) or _new_variable(
                self.model, f"layer_bits/{role}", np.array(initial_bits, np.int32)
            )
            self.variables |= {f"bits/{role}": of_role, f"layer_bits/{role}": of_layers}
            rows.append(select(read(of_layers) >= 0, read(of_layers), read(of_role)))
        # The variables are the user's to assign, and a width of 17 would read beyond the tables of `by_width`.
        return op("Minimum", op("Maximum", concat(rows), 0), MAX_BITS)

    def _limits(self) -> PerCall | None:
        """Return the limits: fixed ones, moving averages and learned ones; None if all ranges are dynamic."""
        vectors = [of_role for role, of_role in self.quantizers.items() if role in self.starting_limits]
        if all(q is None or q.range.name == "dynamic" for of_role in vectors for q in of_role):
            return None
        limits = concat([self._limits_of(role) for role in self.quantizers])
        return per_call("quantization_limits", limits, (self._rows, 2))

    def _limits_of(self, role: str) -> Expr:
        if role not in self.starting_limits:
            return array(np.zeros((len(self.quantizers[role]), 2), np.float32))
        quantizers, initial = self.quantizers[role], self.starting_limits[role]
        masks = {
            range_type: [q is not None and isinstance(q.range, range_type) for q in quantizers]
            for range_type in (Fixed, Ema, Learned)
        }
        # Limits of dynamic ranges stay 0: no quantiser reads these rows.
        limits: Expr = array(initial * np.array(masks[Fixed], np.float32)[:, None])
        if any(masks[Ema]):
            name = f"range/{role}"
            shape = (len(quantizers), 2)
            # Each replica observes its own part of a batch; on saving, its mean over replicas is stored.
            new = _new_variable(self.model, name, initial, synchronization=ON_READ, aggregation=MEAN)
            self.variables[name] = _existing(self.model, name, shape) or new
            limits = _where(masks[Ema], read(self.variables[name]), limits)
        if any(masks[Learned]):
            limits = _where(masks[Learned], self._learned(role, masks[Learned]), limits)
        return limits

    def _learned(self, role: str, mask: Sequence[bool]) -> Expr:
        """Return learned limits, from trainable scales and, where a scheme has them, trainable low limits."""
        schemes = [
            q if learned and isinstance(q, Scheme) else None
            for q, learned in zip(self.quantizers[role], mask, strict=True)
        ]
        pairs = [
            (1.0, 0.0) if q is None else q.learnable(tuple(self.starting_limits[role][i]))
            for i, q in enumerate(schemes)
        ]
        scale_and_low = []
        for index, name in enumerate((f"scale/{role}", f"low/{role}")):
            if index == 0 or any(q is not None and q.has_low for q in schemes):
                values = np.array([pair[index] for pair in pairs], np.float32)
                new = _new_variable(self.model, name, values, synchronization=AUTO, aggregation=NONE)
                new = replace(new, trainable=True)
                self.variables[name] = _existing(self.model, name, values.shape) or new
                scale_and_low.append(read(self.variables[name]))
        return learned_limits(schemes, scale_and_low[0], scale_and_low[1] if len(scale_and_low) > 1 else None)

    def _range_variable(self, name: str, initial: np.ndarray, trainable: bool) -> Variable:
        """Return the model's variable of a kept range, or a new one."""
        modes = {"synchronization": AUTO, "aggregation": NONE} if trainable else {}
        new = replace(_new_variable(self.model, name, initial, **modes), trainable=trainable)
        return _existing(self.model, name, initial.shape) or new


def gathered(values: Expr, index: np.ndarray) -> Expr:
    """Return elements along the first axis, in the index's shape."""
    return op("GatherV2", values, array(index.astype(np.int32)), constant(0, "int32"))


def _amount(start: Expr, ramp: Expr, now: Expr) -> Expr:
    """Return the blend weight: 0 before the start, then the fraction of the ramp that is over, 1 from its end on."""
    over = now - start
    fraction = op("Cast", op("Maximum", over, 0), DstT=Dtype(FLOAT)) / op(
        "Cast", op("Maximum", ramp, 1), DstT=Dtype(FLOAT)
    )
    # A negative ramp, which a user may assign, must not let quantisers act before the start.
    return marked(AMOUNT, select((over >= ramp) & (over >= 0), constant(1.0, FLOAT), fraction))


def _where(mask: Sequence[bool], then: Expr, otherwise: Expr) -> Expr:
    return then if all(mask) else select(array(np.array(mask)[:, None]), then, otherwise)
