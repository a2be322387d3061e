"""Invocations: the ways in which graphs run when a function is called, or a signature computed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from passes.control_flow.predicates import assumption, switches
from rewriter import op_defs, ops
from rewriter.dataflow import Argument, Captured, Origin, VariableKey, follow
from rewriter.effects import has_effect
from rewriter.ir import MAIN, Entry, Graph, Model, Node, Signature, Value
from rewriter.liveness import Assumption

NOTHING: Mapping[str, bool] = {}


class Invocation(NamedTuple):
    """One way in which a graph runs.

    Attributes:
        assumed: the graph, with the booleans that are known.
        arguments: the origins of its arguments; None if the outermost caller gives it, or if it is not known.
        needed: the nodes that run.
        certain: true if it runs whenever the outermost function does.
    """

    assumed: Assumption
    arguments: tuple[Origin | None, ...]
    needed: Collection[str]
    certain: bool

    @property
    def graph(self) -> Graph:
        """The graph that runs."""
        return self.assumed.graph

    def origin(self, value: Value) -> Origin | None:
        """The origin of a value in this invocation."""
        inner_origin = follow(self.assumed.model, self.graph, value)
        return self.arguments[inner_origin.position] if isinstance(inner_origin, Argument) else inner_origin

    def always(self, node: str) -> bool:
        """Return true if a node runs in every such run, whatever the undecided Switches choose."""
        if not self.certain:
            return False
        model, graph = self.assumed.model, self.graph
        # A LoopCond only decides whether its loop runs another round.
        deciding = (
            predicate
            for predicate in model.analysis_of(graph, switches)
            if graph.nodes[predicate.node].op != "LoopCond" and self.assumed.known(predicate) is None
        )
        return all(assumption(model, graph, p, value).runs(node) for p in deciding for value in (True, False))


def of_signature(model: Model, signature: Signature) -> list[Invocation]:
    """Return the invocations when the main graph computes a signature."""
    return list(_CallWalk(model).graph(MAIN, [v.node for v in signature.fetches], (), {}, certain=True))


def of_entry(
    model: Model, entry: Entry, known: Mapping[str, bool] = NOTHING, ignored: Collection[str] = ()
) -> list[Invocation]:
    """Return the invocations when a concrete function is called; some booleans are known, some functions left out."""
    captured = (VariableKey(c) if isinstance(c, str) else Captured(c) for c in entry.captures)
    arguments = (*(None for _ in entry.inputs), *captured)
    values = {Value(name): value for name, value in known.items()}
    return list(_CallWalk(model, ignored).function(entry.function, arguments, values, certain=True))


@dataclass
class _CallWalk:
    """A traversal that meets each way of running a graph once."""

    model: Model
    ignored: Collection[str] = ()
    seen: set[object] = field(default_factory=set)

    def function(
        self, name: str, arguments: tuple[Origin | None, ...], known: Mapping[Value, bool], *, certain: bool
    ) -> Iterator[Invocation]:
        graph = self.model.graphs[name]
        roots = [*(r.value.node for r in graph.results), *(e.node for e in graph.effects)]
        if not graph.effects:  # as older releases wrote functions: what has an effect runs
            roots += [n.name for n in graph.nodes.values() if has_effect(self.model, n)]
        yield from self.graph(name, roots, arguments, known, certain=certain)

    def graph(
        self,
        name: str,
        roots: list[str],
        arguments: tuple[Origin | None, ...],
        known: Mapping[Value, bool],
        *,
        certain: bool,
    ) -> Iterator[Invocation]:
        key = (name, arguments, frozenset(known.items()), certain)
        if key in self.seen:
            return
        self.seen.add(key)
        assumed = Assumption(self.model, self.model.graphs[name], known)
        invocation = Invocation(assumed, arguments, assumed.needed(roots), certain)
        yield invocation
        for node_name in invocation.needed:
            yield from self._called(invocation, invocation.graph.nodes[node_name])

    def _called(self, caller: Invocation, call: Node) -> Iterator[Invocation]:
        form = ops.call_form(self.model, call)
        if form is None:
            return
        callees = [name for name in caller.assumed.taken(call) if name not in self.ignored]
        passed = call.inputs[form.first :]
        # A loop may give its body other values in the next round.
        arguments = tuple(
            None if form.carried and not self._carried_unchanged(call, i) else caller.origin(v)
            for i, v in enumerate(passed)
        )
        # One of several branches is not certain to run. A loop's body counts as certain, though there may be no round.
        certain = (len(callees) == 1 or form.carried) and caller.always(call.name)
        for name in callees:
            passed_to = zip(self.model.graphs[name].arguments, passed, strict=True)
            known = {
                Value(a): b
                for a, v in passed_to
                if (b := self._known_boolean(caller, v)) is not None and not form.carried
            }
            yield from self.function(name, arguments, known, certain=certain)

    def _carried_unchanged(self, loop: Node, position: int) -> bool:
        """Return true if a loop's body returns one of its values as it was given."""
        body = self.model.graphs[ops.callees(self.model, loop)[-1]]
        return follow(self.model, body, body.results[position].value) == Argument(body.name, position)

    def _known_boolean(self, caller: Invocation, value: Value) -> bool | None:
        boolean = op_defs.output_dtype(self.model, caller.graph, value) == "bool"
        return caller.assumed.known(value) if boolean else None
