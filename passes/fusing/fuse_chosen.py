"""The fused kernel where a graph chooses between a batch's and the moving statistics while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from passes.batch_norm.kernel import Normalised, normalised
from passes.batch_norm.roles import MEAN, VARIANCE
from passes.batch_norm.updates import only_assigned
from passes.control_flow.branches import FIRST, Branches
from passes.control_flow.predicates import assumption, choice, decided_by, switches
from passes.declined import DeclinedError
from passes.fusing.batch_statistics import averages_of, final_uses, rewired
from passes.fusing.either_mode import EitherMode
from passes.fusing.fusable import Fusable, replaced
from rewriter import op_defs
from rewriter.edit import Edit, Rewire, Sweep
from rewriter.expr import Expr, Use, array, merge, op, parameter, switch
from rewriter.frames import loop_frames
from rewriter.ir import ARG, Edge, Graph, Node, Value
from rewriter.liveness import BRANCHES
from rewriter.shapes import shape_of

STATISTICS = (MEAN, VARIANCE)
# A variance may be a difference: the mean of the squares less the square of the mean.
MOMENTS = ("Mean", "Sub")
"""Ops that compute a batch's statistics."""


def fuse_both_modes(candidate: Fusable) -> Iterator[Edit]:
    """Yield the edits for two kernels, one for each mode, of which only one runs.

    Raises:
        DeclinedError: the statistics are chosen neither by Merge nor by If, or one choice is not the batch's.
    """
    graph = candidate.graph
    values = [candidate.computed(graph, candidate.used(role)) for role in STATISTICS]
    choosing = [graph.nodes[v.node] for v in values]
    # In a loop of TensorFlow 1, `tf.gradients` would take a further Switch for one of the loop's own.
    if candidate.site.node in candidate.model.analysis_of(graph, loop_frames):
        raise DeclinedError("it chooses its mode inside of a while loop")
    if all(node.op == "Merge" for node in choosing):
        yield from _ChosenByMerge(candidate, choosing).edits()
    elif choosing[0] == choosing[1] and choosing[0].op in BRANCHES:
        yield from _ChosenByIf(candidate, choosing[0], values).edits()
    else:
        choosers = " and ".join(dict.fromkeys(f"{node.name} ({node.op})" for node in choosing))
        raise DeclinedError(
            f"its statistics are chosen by {choosers}; one tf.cond, or Switch and Merge, can be followed"
        )


def _operands(candidate: Fusable) -> list[Value]:
    """Return the mean and the variance that x meets."""
    return [candidate.used(role) for role in STATISTICS]


def _trains(when: dict[bool, list[tuple[Graph, Value]]]) -> bool:
    """Return the value of a predicate with which mean and variance are the batch's."""
    training_values = [value for value, pair in when.items() if all(g.nodes[v.node].op in MOMENTS for g, v in pair)]
    if len(training_values) != 1:
        raise DeclinedError("it chooses its statistics, but one of the choices is not the batch's in a known form")
    return training_values[0]


class _ChosenByMerge:
    """Statistics chosen by Merge: x and the parameters are switched before the kernels, and y is merged."""

    def __init__(self, candidate: Fusable, merges: list[Node]) -> None:
        self.candidate, self.model, self.graph = candidate, candidate.model, candidate.graph
        self.merges = merges
        first, second = (choice(self.model, self.graph, node) for node in merges)
        if first is None or second is None or first.predicate != second.predicate:
            raise DeclinedError("what chooses its mean and its variance is not one boolean")
        self.predicate = first.predicate
        when = {True: (first.then, second.then), False: (first.otherwise, second.otherwise)}
        values = {k: [(self.graph, candidate.computed(self.graph, v)) for v in pair] for k, pair in when.items()}
        self.training = _trains(values)
        self.entering = when[self.training]
        self.batch = [v for _, v in values[self.training]]
        self.moving = dict(zip(STATISTICS, when[not self.training], strict=True))
        self.switches: dict[Expr, tuple[Expr, Expr]] = {}
        self.gates = self.model.analysis_of(self.graph, switches).get(self.predicate, frozenset())

    def edits(self) -> Iterator[Edit]:
        """Yield both kernels, and let averages use their statistics."""
        candidate, site, layout = self.candidate, self.candidate.site, self.candidate.layout
        moments = candidate.moments_of_x(self.graph, self.batch[0], self.batch[1])
        candidate.require_own(moments.nodes)
        x, parameters = candidate.x_in(), candidate.parameters()
        moving = candidate.moving_statistics(self.graph, self.moving)

        def side(on: bool, vectors: dict[str, Expr], training: bool) -> Normalised:
            switched = {role: self._switched(v, on) for role, v in vectors.items()}
            return normalised(self._switched(x, on), switched, layout, site.epsilon, training=training)

        trained = side(self.training, parameters, training=True)
        inferred = side(not self.training, parameters | moving, training=False)
        # What the batch's statistics wait for may be in their branch. A node behind the Merge that waited for it would
        # be dead in inference.
        y = merge(inferred.y, candidate.waiting(trained.y, self.graph, self.entering, moments.nodes))
        # A Merge that stands for `tf.where` has the control inputs itself: in TensorFlow 1's graphs, updates.
        nodes = (*site.interior, *(node.name for node in self.merges))
        yield replaced(candidate, candidate.waiting(op("Identity", y), self.graph, _operands(candidate), nodes))
        # An update that runs in inference too still gets the batch's statistics; nothing else computes them there.
        spares = layout.moments(self._switched(x, not self.training))
        statistics = dict(zip(STATISTICS, zip((trained.mean, trained.variance), spares, strict=True), strict=True))
        for role, batch, node in zip(STATISTICS, self.batch, self.merges, strict=True):
            kernel_statistic, spare = statistics[role]
            yield from self._averages(batch, kernel_statistic, merge(spare, kernel_statistic), moments.nodes)
            moving_average = self._switched(moving[role], not self.training)
            yield from self._averages(
                Value(node.name), kernel_statistic, merge(moving_average, kernel_statistic), moments.nodes
            )
        yield Sweep(site.graph, site.interior)

    def _averages(self, value: Value, statistic: Expr, always: Expr, moments: frozenset[str]) -> Iterator[Edit]:
        batch_norm_nodes = {*self.candidate.site.interior, self.candidate.site.node, *moments}
        # The merged value waits for the predicate and, in inference, for the moving statistic.
        kernel_needs = {self.predicate.node, *(v.node for v in self.moving.values())}
        for edge, used in averages_of(self.candidate, value, batch_norm_nodes, self.gates):
            if not self.candidate.before_kernel([edge.node], kernel_needs):
                self.candidate.feeds([edge.node], kernel_needs)
                inside = self._only(used, self.training)
                yield from rewired(self.model, self.graph, edge, used, statistic if inside else always)

    def _only(self, value: Value, on: bool) -> bool:
        """Return true if a value is computed only where the predicate has the value `on`."""
        return value in assumption(self.model, self.graph, self.predicate, not on).dead

    def _switched(self, value: Expr, on: bool) -> Expr:
        # A value that is computed in this mode alone needs no Switch.
        if isinstance(value, Use) and self._only(value.value, on):
            return value
        if value not in self.switches:
            self.switches[value] = switch(value, Use("bool", self.predicate))
        return self.switches[value][on]


class _ChosenByIf:
    """Statistics chosen by If: its branches also compute the kernels, and it returns y."""

    def __init__(self, candidate: Fusable, node: Node, values: list[Value]) -> None:
        self.candidate, self.model, self.graph = candidate, candidate.model, candidate.graph
        self.branches = Branches(self.model, self.graph, node)
        if not self.branches.exclusive:
            raise DeclinedError(f"the branches of {node.name}, which chooses its statistics, are called elsewhere too")
        self.ports = dict(zip(STATISTICS, (v.port for v in values), strict=True))
        ports = self.ports.values()
        when = {k: [self._within(self.branches.taken(k), port) for port in ports] for k in (True, False)}
        self.training = _trains(when)
        self.batch = when[self.training]
        if self.batch[0][0] is not self.batch[1][0]:
            raise DeclinedError(
                f"one of its mean and its variance is computed in a branch of {node.name}, the other not"
            )
        self.inside = self.branches.taken(self.training)
        inferring = self.branches.taken(not self.training)
        self.moving = {role: inferring.results[port].value for role, port in self.ports.items()}
        if candidate.before_kernel([node.name]):
            raise DeclinedError(
                f"what it normalises, or its gamma or beta, waits for {node.name}, which it would be in"
            )
        candidate.feeds([node.name])
        self.either = self._either_mode()

    def _within(self, branch: Graph, port: int) -> tuple[Graph, Value]:
        """Return a branch's result with its graph: it is computed in the branch, or passed to it from the graph."""
        value = self.candidate.computed(branch, branch.results[port].value)
        if branch.nodes[value.node].op != ARG:
            return branch, value
        return self.graph, self.candidate.computed(self.graph, self.branches.outer(branch, value))

    def edits(self) -> Iterator[Edit]:
        """Yield a kernel in each branch and a result for y, and let averages use the kernel's statistics."""
        candidate, site, node = self.candidate, self.candidate.site, self.branches.node
        holder, mean = self.batch[0]
        moments = candidate.moments_of_x(holder, mean, self.batch[1][1], lambda v: self._outer(holder, v))
        nodes = moments.nodes if holder is self.graph else frozenset()
        candidate.require_own(nodes)
        inferring = self.branches.taken(not self.training)
        moving = candidate.moving_statistics(inferring, self.moving)
        trained, inferred = (
            normalised(
                candidate.x_in(partial(self.branches.bring, branch)),
                candidate.parameters(partial(self.branches.bring, branch)) | averages,
                candidate.layout,
                site.epsilon,
                training=branch is self.inside,
            )
            for branch, averages in ((self.inside, {}), (inferring, moving))
        )
        returned = [self.inside.results[port].value for port in self.ports.values()]
        y = candidate.waiting(trained.y, self.inside, returned, moments.nodes - nodes)
        pair = (y, inferred.y) if self.training else (inferred.y, y)
        shape = shape_of(self.model, self.graph, candidate.x) or ()
        yield from self.branches.results({"y": pair}, [shape], site.node)
        chosen_y = op("Identity", Use(y.dtype, Value(node.name, len(self.inside.results))))
        yield replaced(
            candidate, candidate.waiting(chosen_y, self.graph, _operands(candidate), (*site.interior, *nodes))
        )
        statistics = {MEAN: trained.mean, VARIANCE: trained.variance}
        for (_, value), role in zip(self.batch, STATISTICS, strict=True):
            yield from self._averages(holder, value, role, statistics[role], moments.nodes)
        yield from self.either.definitions()
        yield Sweep(site.graph, (*site.interior, *sorted(nodes)))
        yield Sweep(self.inside.name, tuple(sorted(moments.nodes - nodes)))

    def _outer(self, holder: Graph, value: Value) -> Value:
        if holder is not self.graph and holder.nodes[value.node].op != ARG:
            raise DeclinedError(
                f"its statistics are those of {value.node}, which a branch of {self.branches.node.name} computes"
            )
        return value if holder is self.graph else self.branches.outer(holder, value)

    def _averages(
        self, holder: Graph, value: Value, role: str, statistic: Expr, batch_norm_nodes: frozenset[str]
    ) -> Iterator[Edit]:
        """Let the branch return the kernel's statistic, and let averages use it."""
        self._require_averages(self.ports[role])
        node = self.branches.node
        if holder is not self.graph:
            yield from self._within_branch(holder, value, statistic, batch_norm_nodes)
            return
        for edge, used in final_uses(self.model, self.graph, value, self.candidate.precise):
            if edge.node == node.name:
                # The graph passes the statistic into the branch, which has the kernel's now.
                argument = Value(self.inside.arguments[edge.position - FIRST])
                yield from self._within_branch(self.inside, argument, statistic, frozenset())
                yield from self._unused(edge, used)
            elif edge.node not in batch_norm_nodes and only_assigned(self.model, self.graph, edge):
                chosen_one = self._result(self.ports[role])
                alike = self.branches.chooses_alike(edge, self.training)
                if self.candidate.before_kernel([edge.node]) or not (
                    alike or self.branches.serves(edge, self.candidate.fed)
                ):
                    continue  # it keeps the batch's statistics in single ops
                self.candidate.feeds([edge.node], {node.name})
                statistic_used = chosen_one if alike else self.either.statistic(role, chosen_one)
                yield from rewired(self.model, self.graph, edge, used, statistic_used)

    def _within_branch(
        self, branch: Graph, value: Value, statistic: Expr, batch_norm_nodes: frozenset[str]
    ) -> Iterator[Edit]:
        """Let the branch return the kernel's statistic as the chosen one, and let averages in the branch use it."""
        for edge, used in final_uses(self.model, branch, value, self.candidate.precise):
            chosen_one = not edge.node and edge.position in self.ports.values()
            if chosen_one or (edge.node not in batch_norm_nodes and only_assigned(self.model, branch, edge)):
                yield from rewired(self.model, branch, edge, used, statistic)

    def _either_mode(self) -> EitherMode:
        """Return the batch's statistics for updates that also run in inference."""
        candidate = self.candidate
        x = parameter("x", candidate.dtype(self.graph, candidate.x))
        return EitherMode(
            candidate.site,
            decided_by(self.graph, self.branches.predicate),
            self.training,
            candidate.layout.channels,
            {x: (candidate.x_in(), shape_of(self.model, self.graph, candidate.x))},
            dict(zip(STATISTICS, candidate.layout.moments(x), strict=True)),
        )

    def _result(self, port: int) -> Expr:
        """Return a chosen statistic as a vector."""
        value = Value(self.branches.node.name, port)
        chosen = Use(op_defs.output_dtype(self.model, self.graph, value), value)
        shape = shape_of(self.model, self.graph, value) or (0,)
        if len(shape) == 1:
            return chosen
        return op("Reshape", chosen, array(np.array([self.candidate.layout.channels], dtype=np.int32)))

    def _require_averages(self, port: int) -> None:
        """Refuse chosen statistics that are used for more than averages: the kernel's have no gradient."""
        batch_norm_nodes = {*self.candidate.site.interior, self.candidate.site.node}
        for edge, _ in final_uses(self.model, self.graph, Value(self.branches.node.name, port), self.candidate.precise):
            if edge.node not in batch_norm_nodes and not only_assigned(self.model, self.graph, edge):
                user = edge.node or "the function's caller"
                raise DeclinedError(f"{user} uses the statistic that {self.branches.node.name} chooses")

    def _unused(self, edge: Edge, used: Value) -> Iterator[Edit]:
        """Pass zeros in place of a statistic that no branch needs any longer."""
        argument = Value(self.inside.arguments[edge.position - FIRST])
        shape = shape_of(self.model, self.graph, used)
        unused = not self.branches.uses(not self.training, edge)
        replaced_by_kernel = all(
            not e.node or only_assigned(self.model, self.inside, e)
            for e, _ in final_uses(self.model, self.inside, argument, self.candidate.precise)
        )
        if unused and replaced_by_kernel and shape is not None:
            dtype = op_defs.output_dtype(self.model, self.graph, used)
            yield Rewire(edge, array(np.zeros(shape, dtype)), used.node)
