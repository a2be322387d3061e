"""Expressions: values that are not placed in a graph yet.

A pass writes ``quantised = (q - z) * s``; the engine places it in a graph when it applies the edit that uses it. An
expression is placed once per graph, however often it is used. Sharing goes by identity, not by equality.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np

from rewriter import op_defs, protos
from rewriter.ir import Error, Value, Variable


@dataclass(frozen=True, eq=False)
class Expr:
    """A value to be computed, of a dtype given by name; arithmetic on expressions makes expressions."""

    dtype: str

    def __add__(self, other: Operand) -> Expr:
        return op("AddV2", self, other)

    def __sub__(self, other: Operand) -> Expr:
        return op("Sub", self, other)

    def __mul__(self, other: Operand) -> Expr:
        return op("Mul", self, other)

    def __truediv__(self, other: Expr) -> Expr:
        """Divide by another expression. No constants: Grappler would turn a constant divisor into a product."""
        return op("RealDiv", self, other)

    def __neg__(self) -> Expr:
        return op("Neg", self)

    def __ge__(self, other: Operand) -> Expr:
        return op("GreaterEqual", self, other)

    def __lt__(self, other: Operand) -> Expr:
        return op("Less", self, other)

    def __and__(self, other: Expr) -> Expr:
        return op("LogicalAnd", self, other)


@dataclass(frozen=True, eq=False)
class Use(Expr):
    """A value that the graph already has."""

    value: Value


@dataclass(frozen=True, eq=False)
class Apply(Expr):
    """The first output of an op.

    Attributes:
        op: the op.
        inputs: its data inputs.
        attrs: its attributes.
        name: a hint for the node's name.
        after: expressions whose nodes run first (control inputs).
    """

    op: str
    inputs: tuple[Expr, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    after: tuple[Expr, ...] = ()


@dataclass(frozen=True, eq=False)
class Port(Expr):
    """An output of an op other than its first."""

    of: Apply
    port: int


# Compared by value, unlike other expressions: edits that pass the same value share one argument.
@dataclass(frozen=True)
class Passed(Expr):
    """A value of a graph, used there or in a function that the graph calls; the function gets one more argument."""

    graph: str
    value: Value
    shape: tuple[int, ...] | None

    @property
    def label(self) -> str:
        """Name hint of an argument that carries the value."""
        return f"{self.value.node}_{self.value.port}"


@dataclass(frozen=True, eq=False)
class Handle(Expr):
    """The resource of a variable. The engine brings it to every graph that needs it."""

    variable: Variable
    # Every need (`draft.Need`) has a label and a shape; a resource is a scalar.
    shape = ()

    @property
    def label(self) -> str:
        """Name hint of an argument that carries the resource."""
        return self.variable.name


@dataclass(frozen=True, eq=False)
class PerCall(Expr):
    """A value computed in concrete functions, where calls enter the model, and passed down from there.

    Any other function takes it as an argument. Ops that assign the variables that it depends on must run last
    (`edit.Run`): a concrete function that another one calls computes the value again.
    """

    label: str
    inner: Expr
    shape: tuple[int, ...] = ()


Shape = tuple[int, ...] | None

Operand = Expr | bool | int | float


@cache  # whose keys take 1 and True as equal, and 0.0 and -0.0
def _constant(kind: str, sign: float, value: bool | int | float, dtype: str) -> Expr:  # noqa: ARG001  they tell these apart
    array = np.asarray(value, dtype=dtype)
    attrs = {"dtype": protos.attr(protos.Dtype(dtype)), "value": protos.attr(array)}
    return Apply(dtype, "Const", (), attrs)


def constant(value: bool | int | float | np.generic, dtype: str) -> Expr:
    """Return a scalar constant; equal constants are one expression."""
    scalar = value.item() if isinstance(value, np.generic) else value
    return _constant(type(scalar).__name__, math.copysign(1.0, scalar), scalar, dtype)


def array(value: np.ndarray) -> Apply:
    """Return a constant array; an array of bytes objects is a constant of strings."""
    dtype = "string" if value.dtype == object else value.dtype.name
    return Apply(dtype, "Const", (), {"dtype": protos.attr(protos.Dtype(dtype)), "value": protos.attr(value)})


def filled(value: float, dtype: str, shape: tuple[int, ...]) -> Apply:
    """Return a constant array filled with one value, which is stored once; equal ones are one expression."""
    return _filled(math.copysign(1.0, value), value, dtype, shape)


@cache
def _filled(sign: float, value: float, dtype: str, shape: tuple[int, ...]) -> Apply:  # noqa: ARG001  0.0 equals -0.0
    # A constant may store fewer elements than its shape has: the last one stands for the rest. Of several elements,
    # make_tensor_proto writes the bytes (tensor_content), which have to be complete.
    proto = protos.attr(np.full((1,), value, dtype))
    proto.tensor.tensor_shape.CopyFrom(protos.shape_attr(shape).shape)
    return Apply(dtype, "Const", (), {"dtype": protos.attr(protos.Dtype(dtype)), "value": proto})


def per_call(label: str, inner: Expr, shape: tuple[int, ...] = ()) -> PerCall:
    """Return `inner`, of this shape, computed once per call of the model; arguments that carry it are named `label`."""
    return PerCall(inner.dtype, label, inner, shape)


@cache
def handle(variable: Variable) -> Handle:
    """Return a variable's resource; one expression per variable."""
    return Handle("resource", variable)


@cache
def read(variable: Variable) -> Expr:
    """Return a variable's value, read once per graph."""
    attrs = {"dtype": protos.attr(protos.Dtype(variable.dtype))}
    return Apply(variable.dtype, "ReadVariableOp", (handle(variable),), attrs)


def op(name: str, *inputs: Operand, **attrs: Any) -> Apply:
    """Return the output of an op with one output; dtype attributes follow from the inputs.

    Plain numbers among the inputs become constants of the first expression's dtype.

    Raises:
        Error: there is no such op, or it takes another number of inputs.
    """
    definition = op_defs.registered(name)
    if definition is None or len(definition.input_arg) != len(inputs):
        raise Error(f"no op {name} with {len(inputs)} inputs")
    dtype = next(i.dtype for i in inputs if isinstance(i, Expr))
    operands = tuple(i if isinstance(i, Expr) else constant(i, dtype) for i in inputs)
    values = {k: protos.attr(v) for k, v in attrs.items()}
    for arg, operand in zip(definition.input_arg, operands, strict=True):
        if arg.type_attr:
            values[arg.type_attr] = protos.dtype_attr(operand.dtype)
    return Apply(_result_dtype(definition, values), name, operands, values)


def ordered(value: Apply, after: Iterable[Expr]) -> Apply:
    """Return an op with other control inputs, so that it runs after these expressions."""
    return replace(value, after=tuple(after))


def _result_dtype(definition: Any, attrs: Mapping[str, Any]) -> str:
    if not definition.output_arg:
        return ""
    arg = definition.output_arg[0]
    if not arg.type_attr:
        return protos.dtype_name(arg.type)
    if arg.type_attr in attrs:
        return protos.dtype_name(attrs[arg.type_attr].type)
    default = next(a.default_value for a in definition.attr if a.name == arg.type_attr)
    return protos.dtype_name(default.type)


@dataclass(frozen=True, eq=False)
class Function:
    """A function to be added to the model, which computes `results` from `parameters`.

    Attributes:
        shapes: the parameters' shapes, None if unknown; known shapes make gradients cheaper. The results have the
            shapes of the last parameters, in order.
    """

    name: str
    parameters: tuple[Use, ...]
    shapes: tuple[Shape, ...]
    results: tuple[Expr, ...]

    @property
    def result_shapes(self) -> tuple[Shape, ...]:
        """The results' shapes."""
        return self.shapes[len(self.shapes) - len(self.results) :]

    def __call__(self, *inputs: Expr, name: str = "", **tags: Any) -> Apply:
        """Return a call of the function, with a name hint and attributes that start with an underscore."""
        attrs = {**_call_attrs(self), **{k: protos.attr(v) for k, v in tags.items()}}
        return Apply(self.results[0].dtype, "PartitionedCall", inputs, attrs, name)

    def inlined(self, *inputs: Expr, name: str = "", **tags: Any) -> Expr:
        """Return the function's first result computed without a call; its last op gets the hint and attributes."""
        replacements: dict[Expr, Expr] = dict(zip(self.parameters, inputs, strict=True))
        result = _substituted(self.results[0], replacements)
        if not isinstance(result, Apply):
            return result
        attrs = {**result.attrs, **{k: protos.attr(v) for k, v in tags.items()}}
        return replace(result, attrs=attrs, name=name)


@cache
def _call_attrs(function: Function) -> Mapping[str, Any]:
    attrs = {**_type_attrs(function), "f": protos.attr(protos.Func(function.name))}
    if None not in function.result_shapes:
        attrs["_output_shapes"] = protos.shapes_attr(list(function.result_shapes))
    return attrs


def _type_attrs(function: Function) -> Mapping[str, Any]:
    return {
        "Tin": protos.attr([protos.Dtype(p.dtype) for p in function.parameters]),
        "Tout": protos.attr([protos.Dtype(r.dtype) for r in function.results]),
    }


def case(index: Expr, branches: Sequence[Function], inputs: Sequence[Expr], name: str = "", **tags: Any) -> Apply:
    """Return a call of one of several functions, which take and return the same; the others do not run.

    `index`, an int32 scalar, is the position of the function to call. Name and tags are as in `Function.__call__`.
    """
    first = branches[0]
    attrs = {
        **_type_attrs(first),
        "branches": protos.attr([protos.Func(branch.name) for branch in branches]),
        "output_shapes": protos.shapes_attr(list(first.result_shapes)),
        **{k: protos.attr(v) for k, v in tags.items()},
    }
    # Without _lower_using_switch_merge, unlike `cond`: after lowering, the executor still passes over every op of the
    # branches that do not run (docs/performance.md).
    return Apply(first.results[0].dtype, "StatelessCase", (index, *inputs), attrs, name)


def cond(predicate: Expr, then: Function, otherwise: Function, inputs: Sequence[Expr]) -> Apply:
    """Return a call of one of two functions, which take and return the same; the other does not run.

    Source: op ``StatelessIf``, with the attributes that ``tf.cond`` gives it.
    """
    attrs = {
        **_type_attrs(then),
        "Tcond": protos.dtype_attr("bool"),
        "then_branch": protos.attr(protos.Func(then.name)),
        "else_branch": protos.attr(protos.Func(otherwise.name)),
        "output_shapes": protos.shapes_attr(list(then.result_shapes)),
        "_lower_using_switch_merge": protos.attr(value=True),  # else the branches are not optimised
    }
    return Apply(then.results[0].dtype, "StatelessIf", (predicate, *inputs), attrs)


def _substituted(expr: Expr, replacements: dict[Expr, Expr]) -> Expr:
    """Return an expression with the replacements applied; `replacements` also keeps each new part, made once."""
    if expr not in replacements:
        if isinstance(expr, Port):
            of = _substituted(expr.of, replacements)
            replacements[expr] = replace(expr, of=of) if isinstance(of, Apply) else expr
        elif isinstance(expr, Apply) and expr.inputs:
            replacements[expr] = replace(expr, inputs=tuple(_substituted(i, replacements) for i in expr.inputs))
        else:
            replacements[expr] = expr
    return replacements[expr]


def parameter(name: str, dtype: str) -> Use:
    """Return a parameter of a `Function`."""
    return Use(dtype, Value(name))


def select(condition: Expr, then: Expr, otherwise: Expr) -> Expr:
    """Return `then` where `condition` is true, else `otherwise`; op SelectV2, which broadcasts."""
    return op("SelectV2", condition, then, otherwise)


def concat(values: Sequence[Expr], axis: int = 0) -> Expr:
    """Return tensors of one dtype, joined along an axis; a single tensor is returned as it is."""
    if len(values) == 1:  # the op takes two or more
        return values[0]
    dtype = values[0].dtype
    # `op` makes no op whose inputs are a list.
    attrs = {
        "N": protos.attr(len(values)),
        "T": protos.dtype_attr(dtype),
        "Tidx": protos.dtype_attr("int32"),
    }
    return Apply(dtype, "ConcatV2", (*values, constant(axis, "int32")), attrs)


def switch(value: Expr, predicate: Expr) -> tuple[Expr, Expr]:
    """Return the outputs of a Switch for a false and for a true predicate; ops that use the dead one do not run."""
    switch_op = op("Switch", value, predicate)
    return Port(value.dtype, switch_op, 0), Port(value.dtype, switch_op, 1)


def merge(first: Expr, second: Expr) -> Apply:
    """Return the one of two values that is computed; the other one is dead."""
    attrs = {"N": protos.attr(2), "T": protos.dtype_attr(first.dtype)}
    return Apply(first.dtype, "Merge", (first, second), attrs)


def stop_gradient(value: Expr) -> Expr:
    """Return the value, with no gradient."""
    return op("StopGradient", value)


def _walk(expr: Expr) -> Iterator[Expr]:
    """Yield an expression and all its parts, each once."""
    visited: set[int] = set()
    stack = [expr]
    while stack:
        e = stack.pop()
        if id(e) in visited:
            continue
        visited.add(id(e))
        yield e
        if isinstance(e, PerCall):
            stack.append(e.inner)
        elif isinstance(e, Port):
            stack.append(e.of)
        elif isinstance(e, Apply):
            stack.extend(reversed((*e.inputs, *e.after)))


def variables_of(expr: Expr) -> tuple[Variable, ...]:
    """Return the variables whose resources an expression needs, each once."""
    return tuple(dict.fromkeys(e.variable for e in _walk(expr) if isinstance(e, Handle)))


def reads_of(expr: Expr) -> tuple[Apply, ...]:
    """Return the reads of variables in an expression."""
    return tuple(e for e in _walk(expr) if isinstance(e, Apply) and e.op == "ReadVariableOp")
