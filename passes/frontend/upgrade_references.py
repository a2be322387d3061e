"""TensorFlow 1's reference variables become resource variables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from passes.frontend.options import ReferenceOptions
from rewriter import op_defs, protos
from rewriter.dataflow import REFERENCES, consumers
from rewriter.edit import Edit, Note, Refetch, Replace, Rewire, RunAfter
from rewriter.expr import Apply, Use, op, ordered
from rewriter.ir import MAIN, Attrs, Edge, Graph, Model, Node, Value

RESOURCE_OPS: Mapping[str, str] = {
    "Assign": "AssignVariableOp",
    "AssignAdd": "AssignAddVariableOp",
    "AssignSub": "AssignSubVariableOp",
    "CountUpTo": "ResourceCountUpTo",
    "Identity": "ReadVariableOp",
    "IsVariableInitialized": "VarIsInitializedOp",
}
"""Resource ops by the op that takes a reference. The resource op of any other is named Resource<op>."""

FORWARDS: Mapping[str, str] = {
    "RefEnter": "Enter",
    "RefIdentity": "Identity",
    "RefMerge": "Merge",
    "RefSwitch": "Switch",
}
"""Ops that pass a reference on, with the ops that pass a resource on."""


@dataclass(frozen=True)
class UpgradeReferences(ReferenceOptions):
    """Turn every reference variable (``VariableV2``) into a resource variable of the same name.

    ``tf.saved_model.load`` neither lists reference variables nor gives them gradients. Every op that reads or
    changes one is replaced by its twin for resources, in place and under its name. Where the output of an
    assignment is used, the variable is read after the assignment.
    """

    name: ClassVar[str] = "upgrade-references"

    def edits(self, model: Model) -> Iterable[Edit]:
        """Replace every reference variable and its users; yield nothing where there is none."""
        main = model.graphs[MAIN]
        variables = [n for n in main.nodes.values() if n.op in REFERENCES]
        if self.keep_ref:
            if variables:
                yield Note(f"{len(variables)} reference variables are kept: the result trains in V1 sessions only")
            return
        upgrade = _Upgrade(model, main)
        for node in variables:
            yield Replace(MAIN, node.name, Apply("resource", "VarHandleOp", (), _handle_attrs(node)))
            yield from upgrade.uses(Value(node.name), Value(node.name))
        if variables:
            yield Note(
                f"{len(variables)} reference variables are resource variables now, so that they can be trained "
                "after tf.saved_model.load",
                "detail",
            )


def _handle_attrs(node: Node) -> Attrs:
    # References without a shared name go by their nodes' names; resources without one would all be one variable.
    name = op_defs.attribute(node, "shared_name").s
    kept_attrs = {k: v for k, v in node.attrs.items() if k in ("dtype", "shape", "container", "_class")}
    return {**kept_attrs, "shared_name": protos.attr(name or node.name)}


@dataclass
class _Upgrade:
    """A traversal that follows each reference to its uses.

    Attributes:
        replaced: nodes that are replaced already. A node that takes several references is met once for each.
    """

    model: Model
    graph: Graph
    replaced: set[str] = field(default_factory=set)

    def uses(self, reference: Value, handle: Value) -> Iterator[Edit]:
        """Yield the edits for the users of a reference that is `handle` now."""
        yield from self._fetches(reference, self._read(handle, reference))
        for edge in self.model.analysis_of(self.graph, consumers).get(reference, ()):
            user = self.graph.nodes[edge.node]
            # At its input 1, RefSwitch reads the reference as a predicate.
            if user.op in FORWARDS and not (user.op == "RefSwitch" and edge.position):
                yield from self._replace(user, FORWARDS[user.op], {"T": protos.dtype_attr("resource")})
                for port in range(2 if user.op == "RefSwitch" else 1):
                    yield from self.uses(Value(user.name, port), Value(user.name, port))
            elif self._takes_reference(user, edge.position):
                yield from self._replace(user, self._twin(user.op), {})
                # An assignment to a reference returns the reference; an assignment to a resource returns nothing.
                if op_defs.op_def(self.model, user.op).output_arg[0].is_ref:
                    yield from self._after(user, handle)
            else:
                yield Rewire(edge, self._read(handle, reference), f"{handle.node}/value")

    def _twin(self, name: str) -> str:
        if name in RESOURCE_OPS:
            return RESOURCE_OPS[name]
        return name.replace("SparseApply", "ResourceSparseApply") if "SparseApply" in name else f"Resource{name}"

    def _takes_reference(self, user: Node, position: int) -> bool:
        """Return true if an op takes the variable itself at this input, and not its value."""
        if user.op == "Identity":  # it becomes ReadVariableOp
            return True
        definition = op_defs.op_def(self.model, user.op)
        counts = list(op_defs.argument_counts(definition.input_arg, user.attrs, op_defs.defaults(definition)))
        arguments = [arg for arg, (_, count) in zip(definition.input_arg, counts, strict=True) for _ in range(count)]
        return bool(arguments[position].is_ref)

    def _replace(self, user: Node, twin: str, new_attrs: Mapping[str, Any]) -> Iterator[Edit]:
        if user.name in self.replaced:
            return
        self.replaced.add(user.name)
        attr_names = {a.name for a in op_defs.op_def(self.model, twin).attr}
        attrs = {k: v for k, v in user.attrs.items() if k in attr_names or k == "_class"}
        dtype_attrs = [a.name for a in op_defs.op_def(self.model, user.op).attr if a.name in ("T", "dtype")]
        if "dtype" in attr_names and dtype_attrs:
            attrs["dtype"] = op_defs.attribute(user, dtype_attrs[0])
        inputs = tuple(Use("", v) for v in user.inputs)
        yield Replace(MAIN, user.name, Apply("", twin, inputs, {**attrs, **new_attrs}))

    def _after(self, assign: Node, handle: Value) -> Iterator[Edit]:
        """Let the users of an assignment's output reference read the variable after the assignment."""
        assigned = Value(assign.name)
        yield from self._fetches(assigned, ordered(self._read(handle, assigned), [Use("", assigned)]))
        for edge in self.model.analysis_of(self.graph, consumers).get(Value(assign.name), ()):
            user = self.graph.nodes[edge.node]
            # The resource does not pass through the assignment, so a control input keeps the order.
            if user.op in FORWARDS or (user.op != "Identity" and self._takes_reference(user, edge.position)):
                yield RunAfter(MAIN, user.name, (assign.name,))
                yield from self._again(user, edge, handle)
            else:
                value = self._read(handle, Value(assign.name))
                yield Rewire(edge, ordered(value, [Use("", Value(assign.name))]), f"{assign.name}/value")

    def _fetches(self, reference: Value, value: Apply) -> Iterator[Edit]:
        """Refetch the outputs of signatures that are this reference."""
        for signature in self.model.signatures.values():
            for position, fetched in enumerate(signature.fetches):
                if fetched == reference:
                    yield Refetch(signature.name, position, value, f"{reference.node}/value")

    def _again(self, user: Node, edge: Edge, handle: Value) -> Iterator[Edit]:
        yield from self._replace(user, FORWARDS.get(user.op) or self._twin(user.op), {})
        yield Rewire(edge, Use("resource", handle), user.name)
        yield from self._after(user, handle)

    def _read(self, handle: Value, reference: Value) -> Apply:
        dtype = op_defs.output_dtype(self.model, self.graph, reference)
        return op("ReadVariableOp", Use("resource", handle), dtype=protos.Dtype(dtype))
