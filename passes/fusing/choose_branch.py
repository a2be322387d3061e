"""Kernels moved behind a choice: of a batch norm that a graph computes in both modes, only the chosen mode runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from passes.batch_norm.site import Site
from passes.batch_norm.sites import STATISTICS, sites
from passes.batch_norm.updates import only_assigned
from passes.control_flow.branches import FIRST, Branches, claim_conditionals
from passes.control_flow.cones import Cone, cone
from passes.control_flow.predicates import assumption, decided_by, leads_to
from passes.declined import DeclinedError
from passes.fusing.either_mode import EitherMode, channels_of, kernel_statistics
from rewriter import op_defs
from rewriter.dataflow import consumers
from rewriter.edit import Edit, Rewire, RunAfter, Skip, Sweep
from rewriter.expr import Apply, Expr, Port, Use, array, merge, parameter, switch
from rewriter.frames import loop_frames
from rewriter.ir import Edge, Graph, Model, Value
from rewriter.liveness import SWITCHES
from rewriter.shapes import Shape, shape_of

# The file holds every element: 65,536 zeros in float32 are 256 KiB.
SMALL = 1 << 16
"""Limit to the elements of a constant that stands for a value which a branch no longer uses."""

GRADIENTS = range(3, 6)
"""Ports of the kernel's outputs that only its gradient uses."""

HELD = "the graph holds its gradient, which runs in both modes"


@dataclass(frozen=True)
class ChooseBranch:
    """Let a fused batch norm run only in the mode in which its output is used.

    An average that is updated in one mode only stays so. Where an update runs in the other mode too, it still gets
    the batch's statistics.
    """

    name: ClassVar[str] = "choose-branch"

    def edits(self, model: Model) -> Iterable[Edit]:
        """Put Switches before a kernel, or a kernel into a branch; yield a `Skip` where it has to run in both modes."""
        extended: set[tuple[str, str]] = set()
        for site in model.analysis(sites):
            if site.kind == "fused" and not site.binding.quantized:
                try:
                    edits = claim_conditionals(list(_chosen(model, site)), extended)
                except DeclinedError as e:
                    yield Skip(site.graph, site.node, str(e))
                    continue
                yield from edits


def _chosen(model: Model, site: Site) -> Iterator[Edit]:
    graph = model.graphs[site.graph]
    kernel_cone = cone(model, graph, Value(site.node))
    # In a loop of TensorFlow 1, `tf.gradients` would take a further Switch for one of the loop's own.
    if not kernel_cone.ends or site.node in model.analysis_of(graph, loop_frames):
        return
    choosing = {edge.node for edge, _ in kernel_cone.ends}
    kinds = {graph.nodes[name].op in SWITCHES for name in choosing}
    if kinds == {True}:
        yield from _KernelBeforeSwitch(model, graph, site, kernel_cone).edits()
    elif kinds == {False} and len(choosing) == 1:
        yield from _KernelBeforeIf(
            model, graph, site, kernel_cone, Branches(model, graph, graph.nodes[choosing.pop()])
        ).edits()


def _always_used(model: Model, site: Site, kernel_cone: Cone) -> bool:
    """Return true if something uses a kernel whatever is chosen.

    Raises:
        DeclinedError: something does, and the graph computes the batch norm in the other mode too.
    """
    if not kernel_cone.others:
        return False
    # A kernel without a twin in the other mode computes nothing in vain, so there is nothing to report.
    other_modes = [s for s in model.analysis(sites) if s.graph == site.graph and s.mode != site.mode]
    if any(other.binding.variables & site.binding.variables for other in other_modes):
        raise DeclinedError(f"{kernel_cone.others[0] or 'its caller'} uses it whatever the mode is")
    return True


class _KernelBeforeSwitch:
    """A kernel before Switch, whose inputs are switched instead of its output."""

    def __init__(self, model: Model, graph: Graph, site: Site, kernel_cone: Cone) -> None:
        self.model, self.graph, self.site = model, graph, site
        self.node = graph.nodes[site.node]
        self.uses = model.analysis_of(graph, consumers)
        self.cone = kernel_cone
        self.switches = [graph.nodes[edge.node] for edge, _ in kernel_cone.ends]
        self.switched: dict[Value, tuple[Expr, Expr]] = {}

    def edits(self) -> Iterator[Edit]:
        """Switch the kernel's inputs, unless both sides of a Switch are used or the kernel runs on one side already."""
        predicates = {decided_by(self.graph, node.inputs[1]) for node in self.switches}
        ports = {port for node in self.switches for port in (0, 1) if Value(node.name, port) in self.uses}
        if len(predicates) > 1 or len(ports) > 1 or not ports:
            return
        self.predicate, on = predicates.pop(), bool(ports.pop())
        # A predicate that depends on the kernel's output cannot decide whether the kernel runs.
        if self._only(self.site.node, on) or leads_to(self.model, self.graph, [self.site.node], {self.predicate.node}):
            return
        if _always_used(self.model, self.site, self.cone):
            return
        if any(Value(self.site.node, port) in self.uses for port in GRADIENTS):
            raise DeclinedError(HELD)
        # One dead input would stop the kernel. Parameters are switched too, because the gradient of a kernel that did
        # not run is dead, and makes its sum with that of the other kernel dead. The gradient of a Switch merges them.
        inputs = self.node.inputs
        for position, value in enumerate(inputs):
            if self.graph.nodes[value.node].op != "Const":
                yield Rewire(Edge(self.graph.name, self.node.name, position), self._switched(value, on), self.node.name)
        always = [
            (role, edge, Use("float32", Value(self.node.name, port)))
            for role, port in STATISTICS.items()
            for edge in self.uses.get(Value(self.node.name, port), ())
            if not edge.node or not self._only(edge.node, on)
        ]
        if always:
            spares = kernel_statistics(self.model, self.graph, self.site, lambda value: self._switched(value, not on))
            yield from (
                Rewire(edge, merge(statistic, spares[role]), self.node.name) for role, edge, statistic in always
            )

    def _only(self, name: str, on: bool) -> bool:
        """Return true if a node runs only where the predicate has this value."""
        return not assumption(self.model, self.graph, self.predicate, not on).runs(name)

    def _switched(self, value: Value, on: bool) -> Expr:
        used = Use(op_defs.output_dtype(self.model, self.graph, value), value)
        if self.graph.nodes[value.node].op == "Const":
            return used
        if value not in self.switched:
            self.switched[value] = switch(used, Use("bool", self.predicate))
        return self.switched[value][on]


class _KernelBeforeIf:
    """A kernel before an ``If``, moved with the nodes between them into the branch that uses it."""

    def __init__(self, model: Model, graph: Graph, site: Site, kernel_cone: Cone, branches: Branches) -> None:
        self.model, self.graph, self.site, self.cone, self.branches = model, graph, site, kernel_cone, branches
        self.moved: dict[str, Apply] = {}
        self.nodes: tuple[str, ...] = ()

    def edits(self) -> Iterator[Edit]:
        """Move the kernel into a branch, unless both branches use what follows it."""
        users = {on for edge, _ in self.cone.ends for on in (False, True) if self.branches.uses(on, edge)}
        if len(users) != 1 or leads_to(self.model, self.graph, [self.site.node], {self.branches.predicate.node}):
            return
        (self.on,) = users
        if _always_used(self.model, self.site, self.cone):
            return
        if not self.branches.exclusive:
            raise DeclinedError(f"the branches of {self.branches.node.name} are called elsewhere too")
        if any(Value(self.site.node, port) in self.model.analysis_of(self.graph, consumers) for port in GRADIENTS):
            raise DeclinedError(HELD)
        self.inside = self.branches.taken(self.on)
        returned: dict[Value, int] = {}
        alike, always = self._statistics()
        if always:
            yield from (
                edit for role, port in always.items() for edit in self._averages_in_either_mode(role, port, returned)
            )
            yield from self.either.definitions()
        self.nodes = tuple(dict.fromkeys(n for c in (self.cone, *alike) for n in c.nodes))
        ends = dict.fromkeys(end for c in (self.cone, *alike) for end in c.ends)
        for edge, value in ends:
            if edge.node == self.branches.node.name:
                yield from self._computed_inside(edge, value)
            else:
                dtype = op_defs.output_dtype(self.model, self.graph, value)
                yield Rewire(edge, Use(dtype, self._returned(value, returned)), self.site.node)
        if returned:
            yield from self._results(list(returned))
        # A node in a branch cannot wait for one outside, so the ``If`` waits instead.
        before = dict.fromkeys(name for n in self.nodes for name in self.graph.nodes[n].after if name not in self.nodes)
        if before:
            yield RunAfter(self.graph.name, self.branches.node.name, tuple(before))
        yield Sweep(self.graph.name, self.nodes)

    def _results(self, values: list[Value]) -> Iterator[Edit]:
        """Let the ``If`` return values of the branch that are used after it, and zeros from the other branch."""
        zeros = [self._zeros(value) for value in values]
        pairs = [(self._value(v), z) if self.on else (z, self._value(v)) for v, z in zip(values, zeros, strict=True)]
        added = {f"statistic_{index}": pair for index, pair in enumerate(pairs)}
        shapes = [shape_of(self.model, self.graph, value) or () for value in values]
        yield from self.branches.results(added, shapes, self.site.node)

    def _statistics(self) -> tuple[list[Cone], dict[str, int]]:
        """Return the cones of statistics that are used in the same mode only, and the ports of the others by role."""
        alike, always = [], {}
        for role, port in STATISTICS.items():
            followers = cone(self.model, self.graph, Value(self.site.node, port))
            if followers.others or not all(self.branches.chooses_alike(edge, self.on) for edge, _ in followers.ends):
                always[role] = port
            else:
                alike.append(followers)
        return alike, always

    def _averages_in_either_mode(self, role: str, port: int, returned: dict[Value, int]) -> Iterator[Edit]:
        """Let averages that are updated in either mode take the statistic that the branch returns, or its equivalent.

        Raises:
            DeclinedError: the statistic is used for something else, or before the choice.
        """
        value = Value(self.site.node, port)
        edges = self.model.analysis_of(self.graph, consumers).get(value, ())
        if not all(only_assigned(self.model, self.graph, edge) for edge in edges):
            raise DeclinedError("its batch's statistics are used whatever the mode is")
        if not all(self.branches.serves(edge) for edge in edges):
            raise DeclinedError(f"its averages are updated before {self.branches.node.name} chooses, or without it")
        branch_statistic = Use("float32", self._returned(value, returned))
        for edge in edges:
            alike = self.branches.chooses_alike(edge, self.on)
            yield Rewire(
                edge, branch_statistic if alike else self.either.statistic(role, branch_statistic), self.site.node
            )

    @cached_property
    def either(self) -> EitherMode:
        """The batch's statistics for updates that also run in inference.

        Raises:
            DeclinedError: the number of channels is not known.
        """
        operands: dict[Use, tuple[Expr, Shape | None]] = {}

        def bring(value: Value) -> Expr:
            stands_for = parameter(f"input_{len(operands)}", self._dtype(value))
            operands[stands_for] = Use(stands_for.dtype, value), shape_of(self.model, self.graph, value)
            return stands_for

        spares = kernel_statistics(self.model, self.graph, self.site, bring)
        predicate = decided_by(self.graph, self.branches.predicate)
        channels = channels_of(self.model, self.graph, self.site)
        return EitherMode(self.site, predicate, self.on, channels, operands, spares)

    def _returned(self, value: Value, returned: dict[Value, int]) -> Value:
        """Return the output of the ``If`` that returns a value of the branch."""
        return Value(self.branches.node.name, len(self.inside.results) + returned.setdefault(value, len(returned)))

    def _moved(self, name: str) -> Apply:
        """Return a node of the graph as an expression of the branch."""
        if name not in self.moved:
            node = self.graph.nodes[name]
            inputs = tuple(self._value(v) for v in node.inputs)
            # `_class` colocates a node with others of its graph, which the branch does not have.
            attrs = {k: v for k, v in node.attrs.items() if k != "_class"}
            dtype = op_defs.output_dtype(self.model, self.graph, Value(name))
            self.moved[name] = Apply(dtype, node.op, inputs, attrs)
        return self.moved[name]

    def _value(self, value: Value) -> Expr:
        """Return a value of the graph as an expression of the branch."""
        dtype = op_defs.output_dtype(self.model, self.graph, value)
        node = self.graph.nodes[value.node]
        if node.name in self.nodes:
            return Port(dtype, self._moved(node.name), value.port)
        if node.op == "Const":
            return Apply(dtype, "Const", (), node.attrs)
        return self.branches.bring(self.inside, dtype, value)

    def _computed_inside(self, edge: Edge, value: Value) -> Iterator[Edit]:
        """Let the branch use the value that it now computes, and pass it a stand-in."""
        argument = Value(self.inside.arguments[edge.position - FIRST])
        for inner in self.model.analysis_of(self.inside, consumers).get(argument, ()):
            yield Rewire(inner, self._value(value), self.site.node)
        # Both branches take the same arguments, so the argument stays, although this branch no longer uses it.
        yield Rewire(edge, self._stand_in(value), self.site.node)

    def _stand_in(self, value: Value) -> Expr:
        """Return a stand-in of the same dtype and shape, which costs nothing."""
        x = self.graph.nodes[self.site.node].inputs[0]
        shapes, dtypes = (shape_of(self.model, self.graph, v) for v in (value, x)), (self._dtype(v) for v in (value, x))
        return Use(self._dtype(x), x) if len({*shapes}) == len({*dtypes}) == 1 else self._zeros(value)

    def _zeros(self, value: Value) -> Expr:
        """Return zeros of the same dtype and shape; an unknown size becomes 0."""
        shape = shape_of(self.model, self.graph, value)
        size = [max(s, 0) for s in shape] if shape is not None else [SMALL]
        if shape is None or np.prod(size) >= SMALL:
            raise DeclinedError(f"nothing of the shape of {value.node} can stand for it where it is not used")
        return array(np.zeros(size, self._dtype(value)))

    def _dtype(self, value: Value) -> str:
        return op_defs.output_dtype(self.model, self.graph, value)
