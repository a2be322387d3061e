"""A training function for every model, whether or not its source held one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from passes.batch_norm import STATISTICS, Site, batch_norms, moving_average, moving_resource, sites
from passes.entries import HINT, Alignment, align, capturable, serving_entry, serving_signature, training_trace
from passes.roles import MEAN, VARIANCE
from rewriter import ops
from rewriter.dataflow import call_graph
from rewriter.edit import AddSignature, AddVariable, Clone, Edit, Expose, Note, Run, RunAfter, SetAttr
from rewriter.expr import Expr, Use, constant, handle, op
from rewriter.ir import ARG, Endpoint, Entry, Error, Model, Value, Variable, VariablesOf

ON_WRITE, ONLY_FIRST_REPLICA = 2, 3


def control(name: str, initial: int) -> Variable:
    """An int64 scalar at `quantization.<name>`, the same on every replica."""
    return Variable(
        f"quantization/{name}/.ATTRIBUTES/VARIABLE_VALUE",
        f"quantization/{name}",
        "int64",
        (),
        synchronization=ON_WRITE,
        aggregation=ONLY_FIRST_REPLICA,
        path=f"quantization.{name}",
        initial=initial,
    )


STEP = control("step", 0)
"""How many training steps the model has made: one for each call of its training function."""

TRAIN = "__inference_bnqat_train_0"
TRAIN_SIGNATURE = "__inference_bnqat_train_signature_0"
SERVE = "__inference_bnqat_serve_0"
DEFAULT_MOMENTUM = 0.99


@dataclass(frozen=True)
class DeriveTraining:
    """Expose `serve` and `train` at the root, `quantization.train`, and the signature `train`.

    `train` is the source's own training trace where it holds one that takes and returns what serving does,
    with its dropout. Else it is derived from serving: batch norms normalise with the batch's statistics and
    keep the moving averages; dropout and regularisers cannot be recovered. Every call counts one step.

    Attributes:
        momentum: of derived moving averages where no training site says it; None stands for 0.99, assumed.

    Raises:
        Error: the momentum is not between 0 and 1.
    """

    momentum: float | None = None

    def __post_init__(self) -> None:
        if self.momentum is not None and not 0 <= self.momentum < 1:
            raise Error(f"momentum {self.momentum}: it is at least 0 and less than 1")

    def edits(self, model: Model) -> Iterable[Edit]:
        """Nothing where there is no batch norm to train, or where the model has its training function already.

        Raises:
            Error: no function serves, or one that serves cannot be trained; the message says why.
        """
        if STEP.key in model.variables or not any(s.status == "float" for s in model.analysis(sites)):
            return
        if "quantization" in model.root_names:
            raise Error("the model has an attribute 'quantization' of its own, which is where bnqat puts its controls")
        serving = serving_entry(model)
        yield AddVariable(STEP)
        if "serve" not in model.root_names:
            yield Clone(serving.function, SERVE)
            yield Expose("serve", Endpoint(SERVE, serving.function, serving.function))
        trace = training_trace(model, serving)
        signed, why_not = _signed(model, trace)
        if why_not:
            yield Note(why_not)
        if trace is not None:
            yield Note(f"train is the source's training trace {trace.function}")
            if self.momentum is not None:
                yield Note("the momentum given has no influence: the training trace has its own")
            yield from _clone_trace(model, trace, serving, signed)
        else:
            yield from _Derivation(model, serving, signed, self.momentum).edits()
        yield from _expose(model, serving, trace or serving, signed, trace or signed)


def _signed(model: Model, trace: Entry | None) -> tuple[Entry | None, str]:
    """The entry whose inputs and outputs the signature `train` has; if there is to be none, why."""
    signature = serving_signature(model)
    if "train" in model.signatures:
        return None, "the source has a signature 'train' of its own, which is kept; use the function quantization.train"
    if signature is None:
        return None, "no signature computes a batch norm, so there is no signature 'train'; use the function train"
    entry = model.entries[signature.entry]
    if trace is None:
        return entry, ""
    if align(model, trace, entry) is None:
        return None, "the training trace's outputs are not the signature's, so there is no signature 'train'"
    if not capturable(model, trace):
        return (
            None,
            "the training trace uses a table or constant that no signature has, so there is no signature 'train'",
        )
    return entry, ""


def _clone_trace(model: Model, trace: Entry, serving: Entry, signed: Entry | None) -> Iterator[Edit]:
    for top, like in ((TRAIN, serving), (TRAIN_SIGNATURE, signed)):
        if like is not None:
            inputs, outputs = align(model, trace, like) or Alignment((), ())
            yield Clone(trace.function, top, inputs=inputs, outputs=outputs)
            yield _count(top)


def _count(graph: str) -> Run:
    """One more step, after all that the graph does."""
    return Run(graph, op("AssignAddVariableOp", handle(STEP), constant(1, "int64")), "quantization/step", last=True)


def _expose(
    model: Model, serving: Entry, bound: Entry, signed: Entry | None, signature_bound: Entry | None
) -> Iterator[Edit]:
    endpoint = Endpoint(TRAIN, serving.function, bound.function)
    if "train" in model.root_names:
        yield Note(
            "the source has an attribute 'train' of its own, which is kept and counts no steps; use quantization.train"
        )
    else:
        yield Expose("train", endpoint)
    yield Expose("quantization.train", endpoint)
    yield Expose("quantization.variables", VariablesOf(TRAIN))
    yield Expose("quantization.trainable_variables", VariablesOf(TRAIN, trainable_only=True))
    if signed is not None and signature_bound is not None:
        yield AddSignature("train", Endpoint(TRAIN_SIGNATURE, signed.function, signature_bound.function))


class _Derivation:
    """Training clones of the serving functions and of all that they call on the way to a batch norm.

    Attributes:
        cloned: the graphs to clone; those that others of them call have a name in `names`.
    """

    def __init__(self, model: Model, serving: Entry, signed: Entry | None, momentum: float | None) -> None:
        self.model = model
        self.momentum = momentum
        self.calls = model.analysis(call_graph)
        self.tops = {TRAIN: serving.function}
        if signed is not None:
            self.tops[TRAIN_SIGNATURE] = signed.function
        reached = set().union(*(self.calls.reached(f) for f in self.tops.values()))
        self.sites = [s for s in model.analysis(sites) if s.graph in reached and not s.training]
        held = {s.graph for s in self.sites}
        self.cloned = held.union(*(self.calls.reaching(g) for g in held)) & reached
        called = {c.callee for g in self.cloned for c in self.calls.calls.get(g, [])} & self.cloned
        self.names = {g: f"{g}_train" for g in called}
        if serving.function in called:
            self.names[serving.function] = TRAIN
        self.trainable = [s for s in self.sites if not s.reason and self._resources(s)]

    def edits(self) -> Iterator[Edit]:
        """Clones, sites in training mode, updates of moving statistics, and the count of steps."""
        if not self.trainable:
            reason = self.sites[0].reason or "its moving statistics are read in another function"
            raise Error(f"no training function can be derived: {self.sites[0].node} cannot be trained: {reason}{HINT}")
        clones = {name: graph for graph, name in self.names.items()} | self.tops
        for name, graph in sorted(clones.items()):
            yield Clone(graph, name, self.names)
            yield from self._train_sites(graph, name)
            yield from self._order_calls(graph, name)
        for top in self.tops:
            if top == TRAIN or TRAIN not in self.names.values():
                yield _count(top)
        yield from self._notes()

    def _notes(self) -> Iterator[Note]:
        text = "train is derived from serving: dropout and regularisers of the original are absent"
        if any(self._factor(s) is None for s in self.trainable):
            text += f"; momentum {DEFAULT_MOMENTUM} is assumed (--momentum sets it)"
        yield Note(text)
        left = len(self.sites) - len(self.trainable)
        if left:
            yield Note(
                f"{left} sites stay in inference mode in train, as another function reads their moving statistics"
            )
        if any(len(self._factors(s)) > 1 for s in self.trainable):
            yield Note("a function is shared by batch norms of different momentum; train uses that of the first")

    def _factors(self, site: Site) -> list[float]:
        found = [bn.factor for bn in self.model.analysis(batch_norms) if site in bn.sites]
        return list(dict.fromkeys(f for f in found if f is not None))

    def _factor(self, site: Site) -> float | None:
        """The weight of a batch's statistics; None where it has to be assumed."""
        given = None if self.momentum is None else 1 - self.momentum
        return next(iter(self._factors(site)), given)

    def _resources(self, site: Site) -> dict[str, tuple[Value, Value]]:
        """Resource and read value of both moving statistics; empty where one is not read in the site's graph."""
        graph = self.model.graphs[site.graph]
        found = {}
        for role, index in ((MEAN, 3), (VARIANCE, 4)):
            value = graph.nodes[site.node].inputs[index]
            resource = moving_resource(graph, value)
            if resource is None:
                return {}
            found[role] = (resource, value)
        return found

    def _train_sites(self, graph: str, target: str) -> Iterator[Edit]:
        """Put sites into training mode, and update the moving statistics after them.

        Where several sites of a graph share their variables, one update follows the other.
        """
        updates: dict[Value, Expr] = {}
        for site in self.trainable:
            if site.graph != graph:
                continue
            yield SetAttr(target, site.node, "is_training", None)
            factor = self._factor(site)
            for role, (resource, old) in self._resources(site).items():
                batch = Use("float32", Value(site.node, STATISTICS[role]))
                before = updates.get(resource, Use("float32", old))
                updates[resource] = moving_average(before, batch, 1 - DEFAULT_MOMENTUM if factor is None else factor)
        for resource, value in updates.items():
            yield Run(target, op("AssignVariableOp", Use("resource", resource), value), f"{resource.node}/update")

    def _order_calls(self, graph: str, target: str) -> Iterator[Edit]:
        """Calls that update the same variables run one after the other, in the order of the graph."""
        nodes = self.model.graphs[graph].nodes
        inline = {r for s in self.trainable if s.graph == graph for r, _ in self._resources(s).values()}
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
