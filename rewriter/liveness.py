"""What runs of a graph when predicates are known.

In TensorFlow 1's control flow an op with a dead input does not run; Switch makes one of its outputs dead, and
Merge is dead only if all its inputs are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from rewriter import constants, op_defs, ops
from rewriter.dataflow import call_graph
from rewriter.ir import MAIN, Edge, Graph, Model, Node, Value

BRANCHES = ("If", "StatelessIf")
SELECTS = ("Select", "SelectV2")
SWITCHES = ("Switch", "RefSwitch")
MERGES = ("Merge", "RefMerge")


@dataclass(frozen=True)
class Assumption:
    """A graph, with what some of its booleans, as placeholders, are assumed to be."""

    model: Model
    graph: Graph
    values: Mapping[Value, bool]

    def known(self, value: Value) -> bool | None:
        """What a boolean is; None where that is not known."""
        if value in self.values:
            return self.values[value]
        node = self.graph.nodes[value.node]
        array = constants.constant_of(self.graph, value)
        if array is not None:
            return bool(array.reshape(())) if array.size == 1 else None
        if node.op == "LogicalNot":
            inner = self.known(node.inputs[0])
            return None if inner is None else not inner
        if node.op in ("LogicalAnd", "LogicalOr"):
            deciding = node.op == "LogicalOr"
            inputs = [self.known(v) for v in node.inputs]
            return deciding if deciding in inputs else None if None in inputs else not deciding
        if node.op == "PlaceholderWithDefault" and self.graph.name != MAIN:
            return self.known(node.inputs[0])  # in a function, nobody can feed it
        passed = ops.forwarded(node, value.port)
        return None if passed is None else self.known(passed)

    def chosen(self, node: Node) -> Value | None:
        """The input that Switch, Select or Merge passes on; None where that is not known."""
        if node.op in SWITCHES and self.known(node.inputs[1]) is not None:
            return node.inputs[0]
        if node.op in SELECTS:
            condition = self.known(node.inputs[0])
            return None if condition is None else node.inputs[1 if condition else 2]
        if node.op in MERGES:
            living = [v for v in node.inputs if v not in self.dead]
            return living[0] if len(living) == 1 and len(node.inputs) > 1 else None
        return None

    def resolved(self, value: Value) -> Value:
        """What a value is, where choices are known."""
        chosen = self.chosen(self.graph.nodes[value.node])
        return value if chosen is None or value.port else self.resolved(chosen)

    def settled(self, value: Value) -> Value:
        """A value before all choices that are known; of a branch that is not taken, the value itself."""
        while True:
            node = self.graph.nodes[value.node]
            if node.op in SWITCHES:
                taken = self.known(node.inputs[1])
                if taken is None or value.port != int(taken):
                    return value
                value = node.inputs[0]
            elif node.op in ops.CHOICES and not value.port and self.chosen(node) is not None:
                value = self.resolved(value)
            else:
                return value

    @cached_property
    def dead(self) -> frozenset[Value]:
        """The values that are not computed."""
        found: set[Value] = set()
        waiting: list[Value] = []
        uses = self.graph.consumers()
        for node in self.graph.nodes.values():
            if node.op in SWITCHES:
                predicate = self.known(node.inputs[1])
                if predicate is not None:
                    waiting.append(Value(node.name, 0 if predicate else 1))
        followers: dict[str, list[str]] = {}
        for node in self.graph.nodes.values():
            for name in node.after:
                followers.setdefault(name, []).append(node.name)
        while waiting:
            value = waiting.pop()
            if value in found:
                continue
            found.add(value)
            node = self.graph.nodes[value.node]
            users = [e.node for e in uses.get(value, ()) if e.node]
            if node.op not in SWITCHES:
                users += followers.get(node.name, [])
            for name in users:
                user = self.graph.nodes[name]
                if user.op not in MERGES or all(v in found for v in user.inputs):
                    waiting += [Value(name, port) for port in range(max(1, op_defs.output_count(self.model, user)))]
        return frozenset(found)

    def runs(self, name: str) -> bool:
        """Whether a node runs at all."""
        return Value(name) not in self.dead or (Value(name, 1) not in self.dead and self._switches(name))

    def _switches(self, name: str) -> bool:
        return self.graph.nodes[name].op in SWITCHES

    def passes(self, edge: Edge) -> bool:
        """Whether what is used at an edge, perhaps in a branch that the graph calls, can have an effect."""
        if edge.graph != self.graph.name:
            return edge.graph not in self._unused_branches
        if not edge.node:
            return True
        node = self.graph.nodes[edge.node]
        value = node.inputs[edge.position]
        if value in self.dead:
            return False
        if node.op in BRANCHES:
            return value in self._passed(node)
        chosen = self.chosen(node)
        return chosen is None or edge.position == 0 or node.op not in ops.CHOICES or chosen == value

    def settles(self, edge: Edge) -> bool:
        """Whether it is known which of several alternatives is taken, of which the value used at an edge is one."""
        if edge.graph != self.graph.name:
            return edge.graph in self._settled_branches
        return bool(edge.node) and self.chosen(self.graph.nodes[edge.node]) is not None

    @cached_property
    def _settled_branches(self) -> frozenset[str]:
        """The functions of If nodes of the graph whose predicates are known."""
        settled = [n for n in self.graph.nodes.values() if n.op in BRANCHES and self.known(n.inputs[0]) is not None]
        return frozenset(name for node in settled for name in ops.callees(self.model, node))

    @cached_property
    def _unused_branches(self) -> frozenset[str]:
        """The functions that If nodes of the graph do not call."""
        unused, used = set(), set()
        for node in self.graph.nodes.values():
            if node.op in BRANCHES:
                then, otherwise = ops.callees(self.model, node)
                predicate = self.known(node.inputs[0])
                used |= {then} if predicate is not False else set()
                used |= {otherwise} if predicate is not True else set()
                unused |= {then, otherwise}
        return frozenset(unused - used)

    def called(self, nodes: Iterable[str]) -> frozenset[str]:
        """The functions that these nodes call, directly or not, but for branches that are not taken."""
        calls = self.model.analysis(call_graph)
        found: set[str] = set()
        for name in nodes:
            node = self.graph.nodes[name]
            for function in self.taken(node):
                found |= calls.reached(function)
        return frozenset(found)

    def taken(self, node: Node) -> tuple[str, ...]:
        """The functions that a node calls, as far as its predicate is known."""
        called = ops.callees(self.model, node)
        predicate = self.known(node.inputs[0]) if node.op in BRANCHES else None
        return called if predicate is None else (called[0 if predicate else 1],)

    def _passed(self, node: Node) -> tuple[Value, ...]:
        """What a node needs; of a branch that is known, only what that branch uses."""
        taken = self.taken(node)
        if node.op not in BRANCHES or len(taken) > 1:
            return node.inputs
        branch = self.model.graphs[taken[0]]
        used = {value.node for value, _ in branch.edges()}
        passed = zip(branch.arguments, node.inputs[1:], strict=True)
        return (node.inputs[0], *(value for argument, value in passed if argument in used))

    def returns(self, name: str) -> bool:
        """Return whether a result of the function needs a node; of the main graph, this is not known."""
        return self.graph.name == MAIN or name in self._returned

    @cached_property
    def _returned(self) -> dict[str, None]:
        """The nodes that the function's results need."""
        return self.needed(result.value.node for result in self.graph.results)

    def needed(self, roots: Iterable[str]) -> dict[str, None]:
        """The nodes that these need, themselves among them."""
        found: dict[str, None] = {}
        waiting = list(roots)
        while waiting:
            name = waiting.pop()
            if name in found:
                continue
            found[name] = None
            node = self.graph.nodes[name]
            chosen = self.chosen(node)
            inputs = self._passed(node) if chosen is None else (chosen,)
            waiting += [v.node for v in inputs if v not in self.dead]
            waiting += [n for n in node.after if self.runs(n)]
        return found
