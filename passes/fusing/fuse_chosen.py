"""The fused kernel where a graph chooses between a batch's and the moving statistics while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from passes.batch_norm.kernel import Normalised, normalised
from passes.batch_norm.updates import only_assigned
from passes.control_flow.branches import FIRST, Branches
from passes.control_flow.predicates import assumption, choice, decided_by, switches
from passes.declined import DeclinedError
from passes.fusing.batch_statistics import averages_of, final_uses, rewired
from passes.fusing.either_mode import EitherMode
from passes.fusing.fusable import Fusable, replaced
from passes.roles import MEAN, VARIANCE
from rewriter import op_defs
from rewriter.edit import Edit, Rewire, Sweep
from rewriter.expr import Expr, Use, array, merge, op, parameter, switch
from rewriter.frames import loop_frames
from rewriter.ir import ARG, Edge, Graph, Node, Value
from rewriter.liveness import BRANCHES
from rewriter.shapes import shape_of

STATISTICS = (MEAN, VARIANCE)
MOMENTS = ("Mean", "Sub")
"""Ops that give a batch's statistics."""


def chosen(found: Fusable) -> Iterator[Edit]:
    """One kernel for each mode, of which only one runs.

    Raises:
        DeclinedError: what chooses is neither a Merge nor an If, or does not choose between the two.
    """
    graph = found.graph
    values = [found.computed(graph, found.used(role)) for role in STATISTICS]
    choosing = [graph.nodes[v.node] for v in values]
    if found.site.node in found.model.analysis_of(graph, loop_frames):
        raise DeclinedError("it chooses its mode inside of a while loop")
    if all(node.op == "Merge" for node in choosing):
        yield from _Merged(found, choosing).edits()
    elif choosing[0] == choosing[1] and choosing[0].op in BRANCHES:
        yield from _Branched(found, choosing[0], values).edits()
    else:
        what = " and ".join(dict.fromkeys(f"{node.name} ({node.op})" for node in choosing))
        raise DeclinedError(f"its statistics are chosen by {what}; one tf.cond, or Switch and Merge, can be followed")


def _met(found: Fusable) -> list[Value]:
    """The mean and the variance that x meets."""
    return [found.used(role) for role in STATISTICS]


def _trains(when: dict[bool, list[tuple[Graph, Value]]]) -> bool:
    """The value of a predicate with which mean and variance are the batch's."""
    found = [value for value, pair in when.items() if all(g.nodes[v.node].op in MOMENTS for g, v in pair)]
    if len(found) != 1:
        raise DeclinedError("it chooses its statistics, but one of the choices is not the batch's in a known form")
    return found[0]


class _Merged:
    """Statistics chosen by Merge: x and the parameters are switched before the kernels, and y is merged."""

    def __init__(self, found: Fusable, merges: list[Node]) -> None:
        self.found, self.model, self.graph = found, found.model, found.graph
        self.merges = merges
        first, second = (choice(self.model, self.graph, node) for node in merges)
        if first is None or second is None or first.predicate != second.predicate:
            raise DeclinedError("what chooses its mean and its variance is not one boolean")
        self.predicate = first.predicate
        when = {True: (first.then, second.then), False: (first.otherwise, second.otherwise)}
        values = {k: [(self.graph, found.computed(self.graph, v)) for v in pair] for k, pair in when.items()}
        self.training = _trains(values)
        self.entering = when[self.training]
        self.batch = [v for _, v in values[self.training]]
        self.moving = dict(zip(STATISTICS, when[not self.training], strict=True))
        self.switches: dict[Expr, tuple[Expr, Expr]] = {}
        self.gates = self.model.analysis_of(self.graph, switches).get(self.predicate, frozenset())

    def edits(self) -> Iterator[Edit]:
        """Both kernels, and what the averages take."""
        found, site, layout = self.found, self.found.site, self.found.layout
        moments = found.moments_of_x(self.graph, self.batch[0], self.batch[1])
        found.require_own(moments.nodes)
        x, parameters = found.given(), found.parameters()
        moving = found.held(self.graph, self.moving)

        def side(on: bool, vectors: dict[str, Expr], training: bool) -> Normalised:
            known = {role: self._switched(v, on) for role, v in vectors.items()}
            return normalised(self._switched(x, on), known, layout, site.epsilon, training=training)

        trained = side(self.training, parameters, training=True)
        inferred = side(not self.training, parameters | moving, training=False)
        y = merge(inferred.y, found.waiting(trained.y, self.graph, self.entering, moments.nodes))
        yield replaced(found, self.found.waiting(op("Identity", y), self.graph, _met(found), site.interior))
        # An update that runs in inference too still gets the batch's statistics; nothing else computes them there.
        spares = layout.moments(self._switched(x, not self.training))
        statistics = dict(zip(STATISTICS, zip((trained.mean, trained.variance), spares, strict=True), strict=True))
        for role, batch, node in zip(STATISTICS, self.batch, self.merges, strict=True):
            own, spare = statistics[role]
            yield from self._averages(batch, own, merge(spare, own), moments.nodes)
            held = self._switched(moving[role], not self.training)
            yield from self._averages(Value(node.name), own, merge(held, own), moments.nodes)
        yield Sweep(site.graph, site.interior)

    def _averages(self, value: Value, statistic: Expr, always: Expr, moments: frozenset[str]) -> Iterator[Edit]:
        own = {*self.found.site.interior, self.found.site.node, *moments}
        taken = {self.predicate.node, *(v.node for v in self.moving.values())}
        for edge, used in averages_of(self.found, value, own, self.gates):
            if not self.found.before_kernel([edge.node], taken):
                self.found.feeds([edge.node], taken)
                inside = self._only(used, self.training)
                yield from rewired(self.model, self.graph, edge, used, statistic if inside else always)

    def _only(self, value: Value, on: bool) -> bool:
        """Whether a value is computed only where the predicate has this value."""
        return value in assumption(self.model, self.graph, self.predicate, not on).dead

    def _switched(self, value: Expr, on: bool) -> Expr:
        if isinstance(value, Use) and self._only(value.value, on):
            return value
        if value not in self.switches:
            self.switches[value] = switch(value, Use("bool", self.predicate))
        return self.switches[value][on]


class _Branched:
    """Statistics chosen by If: its branches compute the kernels too, and it gives y."""

    def __init__(self, found: Fusable, node: Node, values: list[Value]) -> None:
        self.found, self.model, self.graph = found, found.model, found.graph
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
        if found.before_kernel([node.name]):
            raise DeclinedError(
                f"what it normalises, or its gamma or beta, waits for {node.name}, which it would be in"
            )
        found.feeds([node.name])
        self.either = self._either_mode()

    def _within(self, branch: Graph, port: int) -> tuple[Graph, Value]:
        """What a branch returns: a value that it computes, or one of the graph that it was given."""
        value = self.found.computed(branch, branch.results[port].value)
        if branch.nodes[value.node].op != ARG:
            return branch, value
        return self.graph, self.found.computed(self.graph, self.branches.outer(branch, value))

    def edits(self) -> Iterator[Edit]:
        """A kernel in each branch, one more result, and what the averages take."""
        found, site, node = self.found, self.found.site, self.branches.node
        holder, mean = self.batch[0]
        moments = found.moments_of_x(holder, mean, self.batch[1][1], lambda v: self._outer(holder, v))
        nodes = moments.nodes if holder is self.graph else frozenset()
        found.require_own(nodes)
        inferring = self.branches.taken(not self.training)
        moving = found.held(inferring, self.moving)
        trained, inferred = (
            normalised(
                found.given(partial(self.branches.bring, branch)),
                found.parameters(partial(self.branches.bring, branch)) | known,
                found.layout,
                site.epsilon,
                training=branch is self.inside,
            )
            for branch, known in ((self.inside, {}), (inferring, moving))
        )
        returned = [self.inside.results[port].value for port in self.ports.values()]
        y = found.waiting(trained.y, self.inside, returned, moments.nodes - nodes)
        pair = (y, inferred.y) if self.training else (inferred.y, y)
        shape = shape_of(self.model, self.graph, found.x) or ()
        yield from self.branches.results({"y": pair}, [shape], site.node)
        chosen_y = op("Identity", Use(y.dtype, Value(node.name, len(self.inside.results))))
        yield replaced(found, found.waiting(chosen_y, self.graph, _met(found), (*site.interior, *nodes)))
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

    def _averages(self, holder: Graph, value: Value, role: str, statistic: Expr, own: frozenset[str]) -> Iterator[Edit]:
        """Let the branch return the kernel's statistic, and averages use it."""
        self._require_averages(self.ports[role])
        node = self.branches.node
        if holder is not self.graph:
            yield from self._within_branch(holder, value, statistic, own)
            return
        for edge, used in final_uses(self.model, self.graph, value, self.found.precise):
            if edge.node == node.name:
                argument = Value(self.inside.arguments[edge.position - FIRST])
                yield from self._within_branch(self.inside, argument, statistic, frozenset())
                yield from self._unused(edge, used)
            elif edge.node not in own and only_assigned(self.model, self.graph, edge):
                chosen_one = self._result(self.ports[role])
                alike = self.branches.chooses_alike(edge, self.training)
                if self.found.before_kernel([edge.node]) or not (alike or self.branches.serves(edge, self.found.fed)):
                    continue  # it keeps the batch's statistics in single ops
                self.found.feeds([edge.node], {node.name})
                statistic_used = chosen_one if alike else self.either.statistic(role, chosen_one)
                yield from rewired(self.model, self.graph, edge, used, statistic_used)

    def _within_branch(self, branch: Graph, value: Value, statistic: Expr, own: frozenset[str]) -> Iterator[Edit]:
        """Let the branch return the kernel's statistic as the chosen one, and its averages use it."""
        for edge, used in final_uses(self.model, branch, value, self.found.precise):
            chosen_one = not edge.node and edge.position in self.ports.values()
            if chosen_one or (edge.node not in own and only_assigned(self.model, branch, edge)):
                yield from rewired(self.model, branch, edge, used, statistic)

    def _either_mode(self) -> EitherMode:
        """The batch's statistics for updates that run in inference too."""
        found = self.found
        x = parameter("x", found.dtype(self.graph, found.x))
        return EitherMode(
            found.site,
            decided_by(self.graph, self.branches.predicate),
            self.training,
            found.layout.channels,
            {x: (found.given(), shape_of(self.model, self.graph, found.x))},
            dict(zip(STATISTICS, found.layout.moments(x), strict=True)),
        )

    def _result(self, port: int) -> Expr:
        """A chosen statistic as a vector."""
        value = Value(self.branches.node.name, port)
        made = Use(op_defs.output_dtype(self.model, self.graph, value), value)
        shape = shape_of(self.model, self.graph, value) or (0,)
        if len(shape) == 1:
            return made
        return op("Reshape", made, array(np.array([self.found.layout.channels], dtype=np.int32)))

    def _require_averages(self, port: int) -> None:
        """Refuse chosen statistics that are used for more than averages, as the kernel's have no gradient."""
        own = {*self.found.site.interior, self.found.site.node}
        for edge, _ in final_uses(self.model, self.graph, Value(self.branches.node.name, port), self.found.precise):
            if edge.node not in own and not only_assigned(self.model, self.graph, edge):
                what = edge.node or "the function's caller"
                raise DeclinedError(f"{what} uses the statistic that {self.branches.node.name} chooses")

    def _unused(self, edge: Edge, used: Value) -> Iterator[Edit]:
        """Pass nothing where a branch has no use for it any longer."""
        argument = Value(self.inside.arguments[edge.position - FIRST])
        shape = shape_of(self.model, self.graph, used)
        unused = not self.branches.uses(not self.training, edge)
        replaced_by_kernel = all(
            not e.node or only_assigned(self.model, self.inside, e)
            for e, _ in final_uses(self.model, self.inside, argument, self.found.precise)
        )
        if unused and replaced_by_kernel and shape is not None:
            dtype = op_defs.output_dtype(self.model, self.graph, used)
            yield Rewire(edge, array(np.zeros(shape, dtype)), used.node)
