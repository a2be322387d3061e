"""Ops that call functions, and ops that forward or choose a value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from rewriter import protos
from rewriter.ir import Error, Model, Node, Value


class CallForm(NamedTuple):
    """How an op calls functions.

    Attributes:
        callees: the attributes that name them (each holds one function or a list).
        types: the attribute that lists the dtypes of the inputs passed on; None where there is none.
        first: index of the first input that is passed on.
        carried: whether what goes in must come out of the callee again (loop variables).
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
"""Ops whose outputs are, or read, one of their inputs: the index of that input."""


CHOICES: Mapping[str, int] = {"Merge": 0, "RefMerge": 0, "Select": 1, "SelectV2": 1}
"""Ops whose first output is one of several inputs: the index of the first of them."""


GRADIENT = "_gradient_op_type"
"""Attribute of an op that has a gradient of its own: of which kind (``tf.custom_gradient``)."""


QUANTIZER_MARK = "_bnqat"
"""Attribute of a node that stands for its last input, in another precision: TensorFlow keeps it when a user
loads and saves a model again, on nodes but not on functions."""


PART = "_bnqat_part"
"""Attribute of a node inside a quantiser: the part of its arithmetic, as named in `passes.quantization.node_marks`."""


GENERAL_BRANCH = "_bnqat_general"
"""Attribute of a Case whose branches compute the same, each under a condition of its own: the position of the one that
does so under every condition."""


def forwarded(node: Node, port: int) -> Value | None:
    """The value that this output of a node is, or reads, or stands for; None where the node computes it."""
    if QUANTIZER_MARK in node.attrs and node.inputs:
        return node.inputs[-1]
    if node.op == "IdentityN":
        return node.inputs[port]
    return node.inputs[FORWARDS[node.op]] if node.op in FORWARDS else None


def call_form(model: Model, node: Node) -> CallForm | None:
    """How this node calls functions; None where it does not, or not in a way that inputs can be added to."""
    form = CALLS.get(node.op)
    if form is None and node.op in model.graphs:
        return CallForm((), None, 0, False, node.op)
    return form


def call_form_of(model: Model, node: Node) -> CallForm:
    """How this node, which is known to call a function, calls it.

    Raises:
        Error: it calls none.
    """
    form = call_form(model, node)
    if form is None:
        raise Error(f"node {node.name} ({node.op}) is not a call")
    return form


def callees(model: Model, node: Node) -> tuple[str, ...]:
    """The functions that a node with a call form calls, in order."""
    form = CALLS.get(node.op)
    if form is None:
        return (node.op,) if node.op in model.graphs else ()
    return tuple(name for key in form.callees if key in node.attrs for name in protos.functions_in(node.attrs[key]))
