"""Liveness: the nodes of a graph that run when predicates are known.

In TensorFlow 1's control flow an op with a dead input does not run. Switch makes one of its outputs dead, and Merge is
dead only if all its inputs are.
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
    """A graph with assumed values for some of its booleans, such as placeholders."""

    model: Model
    graph: Graph
    values: Mapping[Value, bool]

    def known(self, value: Value) -> bool | None:
        """Return the value of a boolean; None if it is not known."""
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
            return self.known(node.inputs[0])  # in a function, a placeholder cannot be fed
        source = ops.forwarded(node, value.port)
        return None if source is None else self.known(source)

    def chosen(self, node: Node) -> Value | None:
        """Return the input that Switch, Select or Merge passes on; None if it is not known."""
        # Both outputs are the input; `dead` tells which of them is computed.
        if node.op in SWITCHES and self.known(node.inputs[1]) is not None:
            return node.inputs[0]
        if node.op in SELECTS:
            condition = self.known(node.inputs[0])
            return None if condition is None else node.inputs[1 if condition else 2]
        if node.op in MERGES:
            live = [v for v in node.inputs if v not in self.dead]
            return live[0] if len(live) == 1 and len(node.inputs) > 1 else None
        return None

    def resolved(self, value: Value) -> Value:
        """Return the value that a value is equal to, after all known choices."""
        chosen = self.chosen(self.graph.nodes[value.node])
        return value if chosen is None or value.port else self.resolved(chosen)

    def settled(self, value: Value) -> Value:
        """Return the value before all known choices and Switches; in a branch that is not taken, the value itself."""
        while True:
            node = self.graph.nodes[value.node]
            if node.op in SWITCHES:
                predicate = self.known(node.inputs[1])
                if predicate is None or value.port != int(predicate):
                    return value
                value = node.inputs[0]
            elif node.op in ops.CHOICES and not value.port and self.chosen(node) is not None:
                value = self.resolved(value)
            else:
                return value

    @cached_property
    def dead(self) -> frozenset[Value]:
        """Values that are not computed."""
        dead_values: set[Value] = set()
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
            if value in dead_values:
                continue
            dead_values.add(value)
            node = self.graph.nodes[value.node]
            users = [e.node for e in uses.get(value, ()) if e.node]
            # A Switch runs even if one of its outputs is dead, and so do the nodes that it precedes.
            if node.op not in SWITCHES:
                users += followers.get(node.name, [])
            for name in users:
                user = self.graph.nodes[name]
                if user.op not in MERGES or all(v in dead_values for v in user.inputs):
                    # Port 0 also stands for a node without outputs, such as an assignment.
                    waiting += [Value(name, port) for port in range(max(1, op_defs.output_count(self.model, user)))]
        return frozenset(dead_values)

    def runs(self, name: str) -> bool:
        """Return true if a node runs."""
        return Value(name) not in self.dead or (Value(name, 1) not in self.dead and self._is_switch(name))

    def _is_switch(self, name: str) -> bool:
        return self.graph.nodes[name].op in SWITCHES

    def passes(self, edge: Edge) -> bool:
        """Return true if the value used at an edge can matter; the edge may lie in a branch that the graph calls."""
        if edge.graph != self.graph.name:
            return edge.graph not in self._unused_branches
        if not edge.node:
            return True
        node = self.graph.nodes[edge.node]
        value = node.inputs[edge.position]
        if value in self.dead:
            return False
        if node.op in BRANCHES:
            return value in self._needed_inputs(node)
        # Input 0 of Select is its condition. An input of Merge that is not chosen is dead, and ruled out above.
        chosen = self.chosen(node)
        return chosen is None or edge.position == 0 or node.op not in ops.CHOICES or chosen == value

    def settles(self, edge: Edge) -> bool:
        """Return true if the choice between the value used at an edge and its alternatives is known."""
        if edge.graph != self.graph.name:
            return edge.graph in self._settled_branches
        return bool(edge.node) and self.chosen(self.graph.nodes[edge.node]) is not None

    @cached_property
    def _settled_branches(self) -> frozenset[str]:
        """Branches of the graph's If nodes with known predicates."""
        settled = [n for n in self.graph.nodes.values() if n.op in BRANCHES and self.known(n.inputs[0]) is not None]
        return frozenset(name for node in settled for name in ops.callees(self.model, node))

    @cached_property
    def _unused_branches(self) -> frozenset[str]:
        """Branches that none of the graph's If nodes calls."""
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
        """Return the functions that nodes call, directly or not, except branches that are not taken."""
        calls = self.model.analysis(call_graph)
        functions: set[str] = set()
        for name in nodes:
            node = self.graph.nodes[name]
            for function in self.taken(node):
                functions |= calls.reached(function)
        return frozenset(functions)

    def taken(self, node: Node) -> tuple[str, ...]:
        """Return the functions that a node may call: of an If with a known predicate, only the branch taken."""
        callees = ops.callees(self.model, node)
        predicate = self.known(node.inputs[0]) if node.op in BRANCHES else None
        return callees if predicate is None else (callees[0 if predicate else 1],)

    def _needed_inputs(self, node: Node) -> tuple[Value, ...]:
        """Return the inputs that a node needs; if its branch is known, only those that this branch uses."""
        callees = self.taken(node)
        if node.op not in BRANCHES or len(callees) > 1:
            return node.inputs
        branch = self.model.graphs[callees[0]]
        used = {value.node for value, _ in branch.edges()}
        argument_values = zip(branch.arguments, node.inputs[1:], strict=True)
        return (node.inputs[0], *(value for argument, value in argument_values if argument in used))

    def returns(self, name: str) -> bool:
        """Return true if a result of the function needs a node; always true for the main graph, where it is unknown."""
        return self.graph.name == MAIN or name in self._returned

    @cached_property
    def _returned(self) -> dict[str, None]:
        """Nodes that the function's results need."""
        return self.needed(result.value.node for result in self.graph.results)

    def needed(self, roots: Iterable[str]) -> dict[str, None]:
        """Return the nodes that some nodes need, those included."""
        names: dict[str, None] = {}
        waiting = list(roots)
        while waiting:
            name = waiting.pop()
            if name in names:
                continue
            names[name] = None
            node = self.graph.nodes[name]
            chosen = self.chosen(node)
            inputs = self._needed_inputs(node) if chosen is None else (chosen,)
            waiting += [v.node for v in inputs if v not in self.dead]
            waiting += [n for n in node.after if self.runs(n)]
        return names
