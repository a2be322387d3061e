"""Two conditionals that choose mean and variance alike, merged into one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from passes.batch_norm.roles import MEAN, VARIANCE
from passes.batch_norm.sites import sites
from passes.batch_norm.updates import ASSIGNING
from passes.control_flow.branches import Branches, claim_conditionals
from passes.control_flow.cones import moveable
from passes.control_flow.predicates import decided_by, leads_to
from passes.declined import DeclinedError
from rewriter import op_defs
from rewriter.dataflow import consumers, following
from rewriter.edit import Edit, Rewire, Run, RunAfter, Skip, Sweep
from rewriter.expr import Apply, Expr, Port, Use
from rewriter.ir import ARG, Graph, Model, Value
from rewriter.liveness import BRANCHES
from rewriter.pattern import origin
from rewriter.shapes import shape_of
from rewriter.sweep import held

MOVED = ("Const", "Identity", "NoOp", "ReadVariableOp")
"""Ops of a branch that pass its arguments on, or read them."""


@dataclass(frozen=True)
class MergeChoices:
    """Let one ``If`` choose a batch norm's mean and variance, where two choose by the same boolean.

    `tf.compat.v1.layers` writes two. With a single one, the fused kernel can be computed in its branches.
    """

    name: ClassVar[str] = "merge-choices"

    def edits(self, model: Model) -> Iterable[Edit]:
        """Add the mean to the conditional that chooses the variance; yield a `Skip` where the two cannot be merged."""
        extended: set[tuple[str, str]] = set()
        merged: dict[str, dict[str, list[str]]] = {}
        for site in model.analysis(sites):
            graph = model.graphs[site.graph]
            if site.kind != "decomposed" or site.mode != "both" or site.binding.quantized:
                continue
            edges = [site.inputs[role][0] for role in (MEAN, VARIANCE)]
            mean, variance = (origin(graph, graph.nodes[e.node].inputs[e.position]) for e in edges)
            nodes = [graph.nodes[v.node] for v in (mean, variance)]
            if nodes[0] == nodes[1] or any(node.op not in BRANCHES for node in nodes):
                continue
            first, second = (Branches(model, graph, node) for node in nodes)
            conditionals = _MergedConditionals(model, graph, mean, first, second, merged.setdefault(site.graph, {}))
            try:
                yield from claim_conditionals(list(conditionals.edits()), extended)
            except DeclinedError as e:
                yield Skip(site.graph, site.node, str(e))


@dataclass(frozen=True)
class _MergedConditionals:
    """The first conditional's mean, chosen by the second conditional.

    Attributes:
        merged: conditional -> the conditionals of the graph that it was merged with, and so runs together with.
        moved: expressions for nodes of the first one's branches, by the predicate's value and the node.
    """

    model: Model
    graph: Graph
    value: Value
    first: Branches
    second: Branches
    merged: dict[str, list[str]]
    moved: dict[tuple[bool, str], Apply] = field(default_factory=dict)

    def edits(self) -> Iterator[Edit]:
        """Let the second return the value and run after all that both ran after; remove the first."""
        first, second = self.first.node.name, self.second.node.name
        predicates = {decided_by(self.graph, conditional.predicate) for conditional in (self.first, self.second)}
        if len(predicates) > 1:
            raise DeclinedError(f"{first} and {second}, which choose its statistics, do not choose by the same boolean")
        directions = ((first, second), (second, first))
        if any(leads_to(self.model, self.graph, [start], {end}, self.merged) for start, end in directions):
            raise DeclinedError(f"{first} and {second}, which choose its statistics, run one after the other")
        if not (self.first.exclusive and self.second.exclusive):
            raise DeclinedError(
                f"the branches of {first} or {second}, which choose its statistics, are called elsewhere"
            )
        then, otherwise = (self._moved(on, self.first.taken(on).results[self.value.port].value) for on in (True, False))
        yield from self._effects()
        shape = shape_of(self.model, self.graph, self.value)
        port = len(self.second.taken(True).results)
        yield from self.second.results({"mean": (then, otherwise)}, [shape], second)
        for edge in self.model.analysis_of(self.graph, consumers).get(self.value, ()):
            yield Rewire(edge, Use(then.dtype, Value(second, port)), second)
        if self.first.node.after:
            yield RunAfter(self.graph.name, second, self.first.node.after)
        for node in self.model.analysis_of(self.graph, following).get(first, ()):
            yield RunAfter(self.graph.name, node.name, (second,))
        # Its effects run in the second one now, so they do not keep it.
        yield Sweep(self.graph.name, (first,), moved=True)
        # What waits for one of the two waits for both from here on, which may close a cycle with a later pair.
        for name, other in directions:
            self.merged.setdefault(name, []).append(other)

    def _effects(self) -> Iterator[Edit]:
        """Run the first one's effects in the second's branches.

        Raises:
            DeclinedError: the first would still run and repeat an effect, or nothing waits for an effect.
        """
        first = self.first.node.name
        for on in (True, False):
            branch, other = self.first.taken(on), self.second.taken(on)
            yield from (Run(other.name, self._node(on, effect.node), first) for effect in branch.effects)
            acting = [n for n in branch.nodes.values() if n.op not in (*MOVED, ARG) and not moveable(n)]
            for node in acting:
                if (on, node.name) not in self.moved:
                    raise DeclinedError(f"nothing in a branch of {first} waits for {node.name} ({node.op})")
            if acting and self._used_otherwise():
                raise DeclinedError(f"{first}, which updates an average, gives more than its mean")

    def _used_otherwise(self) -> bool:
        """Return true if something uses the first one for more than the value."""
        uses = self.model.analysis_of(self.graph, consumers)
        ports = (Value(self.first.node.name, p) for p in range(len(self.first.taken(True).results)))
        return any(uses.get(v) for v in ports if v != self.value) or self.first.node.name in self.model.analysis(held)

    def _moved(self, on: bool, value: Value) -> Expr:
        """Return a value of the first conditional's branch as an expression of the second's."""
        branch = self.first.taken(on)
        node = branch.nodes[value.node]
        dtype = op_defs.output_dtype(self.model, branch, value)
        if node.op == ARG:
            return self.second.bring(self.second.taken(on), dtype, self.first.outer(branch, value))
        moved = self._node(on, value.node)
        return Port(dtype, moved, value.port) if value.port else moved

    def _node(self, on: bool, name: str) -> Apply:
        """Return a node of the first conditional's branch as an expression of the second's, with its control inputs."""
        branch = self.first.taken(on)
        node = branch.nodes[name]
        if not (node.op in MOVED or node.op.startswith(ASSIGNING) or moveable(node)):
            raise DeclinedError(f"{node.name} ({node.op}), in a branch that gives a mean, has an effect")
        if (on, node.name) not in self.moved:
            # `_class` colocates a node with others of its branch, which the second's branch does not have.
            attrs = {k: v for k, v in node.attrs.items() if k != "_class"}
            dtype = (
                op_defs.output_dtype(self.model, branch, Value(name)) if op_defs.output_count(self.model, node) else ""
            )
            inputs = tuple(self._moved(on, v) for v in node.inputs)
            after = tuple(self._node(on, n) for n in node.after if branch.nodes[n].op != ARG)
            self.moved[on, node.name] = Apply(dtype, node.op, inputs, attrs, after=after)
        return self.moved[on, node.name]
