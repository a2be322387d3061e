"""Ops that call functions, and ops that forward or choose a value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from rewriter import protos
from rewriter.ir import Error, Model, Node, Value


class CallForm(NamedTuple):
    """The calling convention of an op that calls functions.

    Attributes:
        callees: the attributes that name the functions (each holds one function or a list).
        types: the attribute that lists the dtypes of the inputs passed on; None if there is none.
        first: index of the first input that is passed on.
        carried: true if the callee must return all that it takes, as for loop variables.
        stateful: the op to use when a callee gains side effects.
    """

    callees: tuple[str, ...]
    types: str | None
    first: int
    carried: bool
    stateful: str


CALLS: Mapping[str, CallForm] = {
    "PartitionedCall": CallForm(("f",), "Tin", 0, False, "StatefulPartitionedCall"),
    "StatefulPartitionedCall": CallForm(("f",), "Tin", 0, False, "StatefulPartitionedCall"),
    "If": CallForm(("then_branch", "else_branch"), "Tin", 1, False, "If"),
    "StatelessIf": CallForm(("then_branch", "else_branch"), "Tin", 1, False, "If"),
    "Case": CallForm(("branches",), "Tin", 1, False, "Case"),
    "StatelessCase": CallForm(("branches",), "Tin", 1, False, "Case"),
    "While": CallForm(("cond", "body"), "T", 0, True, "While"),
    "StatelessWhile": CallForm(("cond", "body"), "T", 0, True, "While"),
}
"""Call form of each op that calls functions named by its attributes."""


FORWARDS: Mapping[str, int] = dict.fromkeys(
    (
        "Cast",
        "CheckNumerics",
        "EnsureShape",
        "Enter",
        "Identity",
        "PreventGradient",
        "ReadVariableOp",
        "RefEnter",
        "RefIdentity",
        "RefSwitch",
        "Snapshot",
        "StopGradient",
        "Switch",
    ),
    0,
)
"""Ops whose outputs are, or read, one of their inputs -> the index of that input."""


READS = frozenset({"ReadVariableOp", "ResourceGather", "ResourceGatherNd"})
"""Ops that read variables: they are stateful, but change nothing."""


NEXT_ITERATIONS = ("NextIteration", "RefNextIteration")
"""Ops that pass a value on to the next iteration of a loop."""


SHAPED_LIKE: Mapping[str, tuple[int, ...]] = dict.fromkeys(
    ("FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3"), (0, 1, 1)
)
"""Ops whose first outputs have the shape of an input -> the index of that input, for each output."""


CHOICES: Mapping[str, int] = {"Merge": 0, "RefMerge": 0, "Select": 1, "SelectV2": 1}
"""Ops whose first output is one of several inputs -> the index of the first of them."""


GRADIENT = "_gradient_op_type"
"""Attribute of an op that has a custom gradient (``tf.custom_gradient``): the gradient's kind."""


STAND_IN = "_bnqat"
"""Attribute of a node that stands for its last input, which it gives in another form. When a user loads and saves a
model again, TensorFlow keeps the attribute on nodes but not on functions."""


LABEL = "_bnqat_part"
"""Attribute that tells a node from others that compute the same, by the part that it plays for a pass."""


GENERAL_BRANCH = "_bnqat_general"
"""Attribute of a Case whose branches compute the same result, each for its own conditions: the position of the branch
that is right for all conditions."""


def forwarded(node: Node, port: int) -> Value | None:
    """Return the value that an output of a node is, or reads, or stands for; None if the node computes it."""
    # Every cycle of a valid graph passes through a NextIteration. It forwards nothing, whatever a file marks it as, so
    # whoever follows forwarded values comes to an end.
    if STAND_IN in node.attrs and node.inputs and node.op not in NEXT_ITERATIONS:
        return node.inputs[-1]
    if node.op == "IdentityN":
        return node.inputs[port]
    return node.inputs[FORWARDS[node.op]] if node.op in FORWARDS else None


def call_form(model: Model, node: Node) -> CallForm | None:
    """Return the call form of a node; None if it calls no function, or if its call cannot take more inputs."""
    form = CALLS.get(node.op)
    if form is None and node.op in model.graphs:  # a direct call: the op is the function's name
        return CallForm((), None, 0, False, node.op)
    return form


def call_form_of(model: Model, node: Node) -> CallForm:
    """Return the call form of a node that is known to be a call.

    Raises:
        Error: the node is no call.
    """
    form = call_form(model, node)
    if form is None:
        raise Error(f"node {node.name} ({node.op}) is not a call")
    return form


def callees(model: Model, node: Node) -> tuple[str, ...]:
    """Return the functions that a node with a call form calls, in order; empty for any other node."""
    form = CALLS.get(node.op)
    if form is None:
        return (node.op,) if node.op in model.graphs else ()
    return tuple(name for key in form.callees if key in node.attrs for name in protos.functions_in(node.attrs[key]))
