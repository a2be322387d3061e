"""Inner tensors that a training function also returns, passed up through the functions that it calls."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from passes.entries.alignment import align
from rewriter import op_defs, ops, protos
from rewriter.dataflow import Call, call_graph
from rewriter.edit import AddResult, Clone, Edit, Reorder, SetAttr
from rewriter.expr import Use
from rewriter.frames import loop_frames
from rewriter.ir import MAIN, Entry, Error, Graph, Model, Signature, Spec, Value
from rewriter.shapes import shape_of

RESULT = "inner_tensor"
"""Name of further results of functions."""

NOT_TENSORS = ("resource", "variant")


class InnerTensor(NamedTuple):
    """A tensor of a function, or of one that it calls.

    Attributes:
        spec: the name under which it is returned, its dtype and shape.
        calls: the calls that lead from the function to the tensor's graph; none if the tensor is the function's own.
        graph: the tensor's graph.
        value: the tensor.
    """

    spec: Spec
    calls: tuple[Call, ...]
    graph: str
    value: Value


def inner_tensor(model: Model, top: str, name: str, node: str) -> InnerTensor:
    """Return the tensor that the function `top` is to return as `name`.

    The text `node` is a node's name. The function's name may stand before it, and the output's number behind it:
    ``boxes``, ``boxes:1``, ``__inference_heads_12:boxes``.

    Raises:
        Error: there is no such node, there are several, or it cannot be returned.
    """
    option = f"the training output {name} = {node}"
    if not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise Error(f"{option}: a name consists of letters, digits and underscores")
    graph, value = _named_value(model, top, node, option)
    calls = _calls(model, top, graph.name, option)
    if value.port >= op_defs.output_count(model, graph.nodes[value.node]):
        raise Error(f"{option}: {value.node} has {op_defs.output_count(model, graph.nodes[value.node])} outputs")
    if value.node in model.analysis_of(graph, loop_frames):
        raise Error(f"{option}: the node lies in a loop, which gives another value in every round")
    dtype = op_defs.output_dtype(model, graph, value)
    if dtype in NOT_TENSORS:
        raise Error(f"{option}: a {dtype} is no tensor that could be returned")
    return InnerTensor(Spec(name, dtype, shape_of(model, graph, value)), calls, graph.name, value)


def _named_value(model: Model, top: str, text: str, option: str) -> tuple[Graph, Value]:
    """Return the graph and the value that a text names."""
    match = re.fullmatch(r"([^:]+)(?::(\d+))?", text)
    qualified = None if match else re.fullmatch(r"([^:]+):([^:]+)(?::(\d+))?", text)
    if match is None and qualified is None:
        raise Error(f"{option}: it is a node's name, perhaps with :1, the output's number, behind it")
    function, node, port = qualified.groups() if qualified else ("", *(match.groups() if match else ()))
    value = Value(node, int(port or 0))
    reached = model.analysis(call_graph).reached(top)
    searched = sorted(g for g in reached if function in ("", g))
    places = [name for name in searched if node in model.graphs[name].nodes]
    if top in places:
        return model.graphs[top], value
    if len(places) > 1:
        listed = ", ".join(f"{place}:{node}" for place in places)
        raise Error(f"{option}: there are several nodes of this name; write one of {listed}")
    if not places:
        node_names = [n for g in searched or sorted(reached) for n in model.graphs[g].nodes]
        close = difflib.get_close_matches(node, node_names, n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise Error(f"{option}: {top or 'the main graph'} and what it calls hold no node {node}{hint}")
    return model.graphs[places[0]], value


def _calls(model: Model, top: str, graph: str, option: str) -> tuple[Call, ...]:
    """Return the calls that lead from a function to a graph, which have to be a single chain."""
    calls = model.analysis(call_graph)
    reached = calls.reached(top)
    chain: list[Call] = []
    while graph != top:
        callers = [c for c in calls.callers.get(graph, []) if c.graph in reached]
        if len(callers) > 1:
            listed = ", ".join(f"{c.node} in {c.graph or 'the main graph'}" for c in callers)
            raise Error(f"{option}: its function {graph} is called at several places: {listed}")
        (call,) = callers
        node = model.graphs[call.graph].nodes[call.node]
        if call.graph == MAIN or len(ops.callees(model, node)) > 1 or ops.call_form_of(model, node).carried:
            raise Error(f"{option}: the node lies in a branch, a loop or a function of the main graph ({call.node})")
        chain.append(call)
        graph = call.graph
    return tuple(reversed(chain))


def refuse_used_names(tensors: Sequence[InnerTensor], names: Sequence[str]) -> None:
    """Refuse an inner tensor under the name of an output.

    Raises:
        Error: there is such a tensor.
    """
    for tensor in tensors:
        if tensor.spec.name in names:
            raise Error(f"the training output {tensor.spec.name}: train returns one of this name already")


def output_names(model: Model, like: Entry, signature: Signature | None) -> tuple[str, ...]:
    """Return the keys of the outputs of a function that is to return a dict.

    They are the keys of the dict that it returns already, else the names that the signature has for the outputs, else
    ``output_0`` and so on.
    """
    if like.keys:
        return like.keys
    names = [f"output_{position}" for position in range(len(like.outputs))]
    order = None if signature is None else align(model, like, model.entries[signature.entry])
    if signature is not None and order is not None:
        for name, position in zip(signature.outputs, order.outputs, strict=True):
            names[position] = name
    return tuple(names)


@dataclass
class InnerOutputs:
    """Further results of training functions.

    Attributes:
        tensors: the tensors to return, by the name of the training function.
        names: the keys of the other outputs, by the name of the training function.
    """

    model: Model
    tensors: Mapping[str, Sequence[InnerTensor]]
    names: Mapping[str, tuple[str, ...]]

    def __bool__(self) -> bool:
        return any(self.tensors.values())

    @property
    def graphs(self) -> frozenset[str]:
        """The graphs that hold the tensors."""
        return frozenset(tensor.graph for tensors in self.tensors.values() for tensor in tensors)

    def all_of(self, top: str, like: Entry) -> tuple[Spec, ...]:
        """Return all outputs of a training function by their keys; nothing if it returns no more than `like`."""
        added = [tensor.spec for tensor in self.tensors.get(top, ())]
        if not added:
            return ()
        specs = [spec._replace(name=name) for name, spec in zip(self.names[top], like.outputs, strict=True)]
        return tuple(sorted([*specs, *added]))

    def _order(self, top: str) -> tuple[int, ...]:
        """Return the order of all outputs by their keys, in which a function returns the tensors of a dict."""
        keys = [*self.names[top], *(tensor.spec.name for tensor in self.tensors[top])]
        return tuple(sorted(range(len(keys)), key=keys.__getitem__))

    def edits(self, clones: Mapping[str, Clone], names: Mapping[str, str]) -> Iterator[Edit]:
        """Add results to the training functions and to all functions that they call on the way to the tensors.

        Args:
            clones: the copies that are being made, by name.
            names: the names of the copies that other copies call, by the function that is copied.
        """
        results: dict[str, dict[Value, str]] = {}
        for top, tensors in self.tensors.items():
            ends = [self._value_in_top(tensor, results, names) for tensor in tensors]
            for end, tensor in zip(ends, tensors, strict=True):
                yield AddResult(top, RESULT, Use(tensor.spec.dtype, end), tensor.spec.name)
        for clone, added in results.items():
            for value, dtype in added.items():
                yield AddResult(clone, RESULT, Use(dtype, value), RESULT)
        yield from self._widened_calls(results, clones, names)
        for top, tensors in self.tensors.items():
            if tensors:
                yield Reorder(top, self._order(top))

    def _value_in_top(
        self, tensor: InnerTensor, results: dict[str, dict[Value, str]], names: Mapping[str, str]
    ) -> Value:
        """Return the tensor as a value of the function; add the results of called functions to `results`."""
        value = tensor.value
        for call in reversed(tensor.calls):
            added = results.setdefault(names[call.callee], {})
            added[value] = tensor.spec.dtype
            value = Value(call.node, len(self.model.graphs[call.callee].results) + list(added).index(value))
        return value

    def _widened_calls(
        self, results: Mapping[str, Mapping[Value, str]], clones: Mapping[str, Clone], names: Mapping[str, str]
    ) -> Iterator[Edit]:
        """Let every call of a function with further results declare them."""
        for name, clone in clones.items():
            graph = self.model.graphs[clone.graph]
            for call in self.model.analysis(call_graph).calls.get(clone.graph, []):
                node, added = graph.nodes[call.node], results.get(names.get(call.callee, ""), {})
                if added and node.op in ops.CALLS:
                    dtypes = protos.more_dtypes(op_defs.attribute(node, "Tout"), list(added.values()))
                    yield SetAttr(name, node.name, "Tout", dtypes)
                    # TensorFlow refuses a list of shapes that is shorter than the outputs.
                    yield SetAttr(name, node.name, "_output_shapes", None)
