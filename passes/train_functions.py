"""Training clones of serving functions."""

from __future__ import annotations

from collections.abc import Iterator

from passes.entries import HINT
from passes.sites import Site, sites
from passes.train_sites import DEFAULT_MOMENTUM, Training, averages, factors
from rewriter import ops
from rewriter.dataflow import call_graph
from rewriter.edit import Clone, Edit, Note, Run, RunAfter
from rewriter.expr import Use, op
from rewriter.ir import ARG, Error, Model, Value


class FunctionClones:
    """Training clones of functions and of all that they call on the way to a batch norm.

    Attributes:
        tops: the functions to clone, by the name of the clone.
        cloned: the graphs to clone; those that others of them call have a name in `names`.
    """

    def __init__(self, model: Model, tops: dict[str, str], momentum: float | None) -> None:
        self.model = model
        self.momentum = momentum
        self.calls = model.analysis(call_graph)
        self.tops = tops
        reached = set().union(*(self.calls.reached(f) for f in tops.values()))
        self.sites = [s for s in model.analysis(sites) if s.graph in reached and s.mode == "inference"]
        held = {s.graph for s in self.sites}
        self.cloned = held.union(*(self.calls.reaching(g) for g in held)) & reached
        called = {c.callee for g in self.cloned for c in self.calls.calls.get(g, [])} & self.cloned
        self.names = {g: f"{g}_train" for g in called}
        for name, function in tops.items():
            if function in called:
                self.names[function] = name
        self.trainable = [s for s in self.sites if not s.reason and averages(model, s)]

    def edits(self) -> Iterator[Edit]:
        """Clones, sites in training mode, and updates of moving statistics.

        Raises:
            Error: no site can be trained, or the order of two updates is not known.
        """
        if not self.sites:
            raise Error(
                "no training function can be derived: serving chooses the mode of its batch norms, and a constant "
                f"chooses inference; without --no-fuse each mode becomes a function{HINT}"
            )
        if not self.trainable:
            reason = self.sites[0].reason or "its moving statistics are read in another function"
            raise Error(f"no training function can be derived: {self.sites[0].node} cannot be trained: {reason}{HINT}")
        clones = {name: graph for graph, name in self.names.items()} | self.tops
        for name, graph in sorted(clones.items()):
            yield Clone(graph, name, self.names)
            yield from self._train(graph, name)
            yield from self._order_calls(graph, name)
        yield from notes(self.model, self.sites, self.trainable, self.momentum)

    def _train(self, graph: str, target: str) -> Iterator[Edit]:
        training = Training(self.model, target, str, self.momentum)
        for site in self.trainable:
            if site.graph == graph:
                yield from training.edits(site)
        for holder, value in training.updates.items():
            yield Run(target, op("AssignVariableOp", Use("resource", holder), value), f"{holder.node}/update")

    def _order_calls(self, graph: str, target: str) -> Iterator[Edit]:
        """Calls that update the same variables run one after the other, in the order of the graph."""
        nodes = self.model.graphs[graph].nodes
        inline = {a.holder for s in self.trainable if s.graph == graph for a in averages(self.model, s).values()}
        last: dict[Value, str] = {}
        for name in dict.fromkeys(c.node for c in self.calls.calls.get(graph, []) if c.callee in self.cloned):
            resources = [v for v in nodes[name].inputs if self._is_resource(graph, v)]
            if inline & set(resources):
                raise Error(
                    f"no training function can be derived: {graph} computes a batch norm itself and again in a "
                    f"function that it calls, so the order of the updates is not known{HINT}"
                )
            before = tuple(dict.fromkeys(last[v] for v in resources if v in last))
            if before:
                yield RunAfter(target, name, before)
            last.update(dict.fromkeys(resources, name))

    def _is_resource(self, graph: str, value: Value) -> bool:
        node = self.model.graphs[graph].nodes[value.node]
        return node.op == ARG and "T" in node.attrs and node.attrs["T"].type == ops.RESOURCE


def notes(model: Model, found: list[Site], trainable: list[Site], momentum: float | None) -> Iterator[Note]:
    """What a user should know about training that was derived."""
    text = "train is derived from serving: dropout and regularisers of the original are absent"
    if momentum is None and not all(factors(model, s) for s in trainable):
        text += f"; momentum {DEFAULT_MOMENTUM} is assumed (--momentum sets it)"
    yield Note(text)
    left = len(found) - len(trainable)
    if left:
        yield Note(f"{left} sites stay in inference mode in train, as another function reads their moving statistics")
    if any(len(factors(model, s)) > 1 for s in trainable):
        yield Note("a function is shared by batch norms of different momentum; train uses that of the first")
