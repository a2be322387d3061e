"""A training function for every model, whether or not its source held one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from passes.batch_norm import STATISTICS, Site, batch_norms, moving_average, moving_resource, sites
from passes.roles import MEAN, VARIANCE
from rewriter import ops
from rewriter.dataflow import CallGraph, call_graph
from rewriter.edit import AddSignature, AddVariable, Clone, Edit, Expose, Note, Run, RunAfter, SetAttr, Skip
from rewriter.expr import Expr, Use, constant, handle, op
from rewriter.ir import ARG, Endpoint, Entry, Error, Graph, Model, Spec, Value, Variable, VariablesOf

ON_WRITE, ONLY_FIRST_REPLICA = 2, 3
STEP = Variable(
    "quantization/step/.ATTRIBUTES/VARIABLE_VALUE",
    "quantization/step",
    "int64",
    (),
    synchronization=ON_WRITE,
    aggregation=ONLY_FIRST_REPLICA,
    path="quantization.step",
    initial=0,
)
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
        """Nothing where there is no batch norm to train, or where the model has its training function already."""
        if STEP.key in model.variables or not any(s.status == "float" for s in model.analysis(sites)):
            return
        if "quantization" in model.root_names:
            raise Error("the model has an attribute 'quantization' of its own, which is where bnqat puts its controls")
        serving = _serving(model)
        yield AddVariable(STEP)
        if "serve" not in model.root_names:
            yield Clone(serving.function, SERVE)
            yield Expose("serve", Endpoint(SERVE, serving.function, serving.function))
        trace = _training_trace(model, serving)
        if trace is not None:
            yield Note(f"train is the source's training trace {trace.function}")
            yield from _expose(model, serving, trace)
        else:
            yield from self._derive(model, serving)
            yield from _expose(model, serving, serving, derived=True)

    def _derive(self, model: Model, serving: Entry) -> Iterator[Edit]:
        """Training clones of the serving function and of all that it calls on the way to a batch norm."""
        calls = model.analysis(call_graph)
        found = [s for s in model.analysis(sites) if s.graph in calls.reached(serving.function) and not s.training]
        held = {s.graph for s in found}
        cloned = held.union(*(calls.reaching(g) for g in held)) & calls.reached(serving.function)
        names = {g: f"{g}_train" for g in cloned if g != serving.function}
        for graph, name in sorted(names.items()):
            yield Clone(graph, name, names)
        for top in (TRAIN, TRAIN_SIGNATURE):
            yield Clone(serving.function, top, names)
        assumed = set()
        for graph in sorted(held):
            targets = (TRAIN, TRAIN_SIGNATURE) if graph == serving.function else (names[graph],)
            here = [s for s in found if s.graph == graph]
            factors = {s.node: self._factor(model, s) for s in here}
            assumed |= {s.node for s in here if factors[s.node] is None}
            for target in targets:
                yield from _train_sites(model, target, here, factors)
        for graph in sorted(cloned):
            for target in (TRAIN, TRAIN_SIGNATURE) if graph == serving.function else (names[graph],):
                yield from _order_calls(model, calls, graph, target, cloned)
        text = f"train is derived from {serving.function}: dropout and regularisers of the original are absent"
        if assumed:
            text += f"; momentum {DEFAULT_MOMENTUM} is assumed (--momentum sets it)"
        yield Note(text)

    def _factor(self, model: Model, site: Site) -> float | None:
        """The weight of a batch's statistics; None where it has to be assumed."""
        for bn in model.analysis(batch_norms):
            if site in bn.sites and bn.factor is not None:
                return bn.factor
        return None if self.momentum is None else 1 - self.momentum


def _serving(model: Model) -> Entry:
    """The function that serves: the root's `serve`, the default signature, another signature, or a call."""
    calls = model.analysis(call_graph)
    held = {s.graph for s in model.analysis(sites) if not s.training}
    defaults = sorted(model.signatures.values(), key=lambda s: (s.name != "serving_default", s.name))
    candidates = [
        *model.root_entries("serve"),
        *(model.entries[s.entry] for s in defaults),
        *model.root_entries("__call__"),
    ]
    for entry in candidates:
        if calls.reached(entry.function) & held:
            return entry
    raise Error("no signature and no function of the root object computes a batch norm in inference")


def _training_trace(model: Model, serving: Entry) -> Entry | None:
    """A function of the root that takes and returns what serving does and trains every batch norm of it."""
    calls = model.analysis(call_graph)

    def names(entry: Entry, training: bool) -> set[str]:
        reached = calls.reached(entry.function)
        return {
            bn.name
            for bn in model.analysis(batch_norms)
            if any(s.graph in reached and (s.training or not training) for s in bn.sites)
        }

    wanted = names(serving, training=False)
    names_in = [s.name for s in serving.inputs]
    entries = sorted(
        model.entries.values(),
        key=lambda e: ("__call__" not in e.paths, [s.name for s in e.inputs] != names_in, e.function),
    )
    for entry in entries:
        if not entry.paths or entry.function == serving.function or any("." in p for p in entry.paths):
            continue
        trains = names(entry, training=True)
        if trains and wanted <= names(entry, training=False) and _same_shape(entry, serving):
            return entry
    return None


def _same_shape(a: Entry, b: Entry) -> bool:
    def alike(x: tuple[Spec, ...], y: tuple[Spec, ...], named: bool) -> bool:
        kinds = [(s.dtype, s.shape) for s in x] == [(s.dtype, s.shape) for s in y]
        return kinds and (not named or len(x) == 1 or [s.name for s in x] == [s.name for s in y])

    return alike(a.inputs, b.inputs, named=True) and alike(a.outputs, b.outputs, named=True)


def _expose(model: Model, serving: Entry, bound: Entry, derived: bool = False) -> Iterator[Edit]:
    """Clones of the training function for the root and for the signature, each counting steps."""
    signed = next((s for s in model.signatures.values() if s.name == "serving_default"), None)
    signed = signed or next(iter(model.signatures.values()), None)
    tops = (TRAIN, TRAIN_SIGNATURE) if signed is not None or derived else (TRAIN,)
    for top in tops:
        if not derived:
            yield Clone(bound.function, top)
        yield Run(top, op("AssignAddVariableOp", handle(STEP), constant(1, "int64")), "quantization/step", last=True)
    endpoint = Endpoint(TRAIN, serving.function, bound.function)
    if "train" in model.root_names:
        yield Note("the source has an attribute 'train' of its own, which is kept; use quantization.train")
    else:
        yield Expose("train", endpoint)
    yield Expose("quantization.train", endpoint)
    yield Expose("quantization.variables", VariablesOf(TRAIN))
    yield Expose("quantization.trainable_variables", VariablesOf(TRAIN, trainable_only=True))
    if signed is not None:
        yield AddSignature("train", Endpoint(TRAIN_SIGNATURE, signed.entry, bound.function))


def _train_sites(model: Model, target: str, here: list[Site], factors: dict[str, float | None]) -> Iterator[Edit]:
    """Put sites into training mode, and update the moving statistics after them.

    Where several sites of a graph share their variables, one update follows the other.
    """
    graph = model.graphs[here[0].graph]
    updates: dict[Value, Expr] = {}
    for site in here:
        if site.reason or not _resources(graph, site):
            yield Skip(target, site.node, site.reason or "its moving statistics are not read in its own function")
            continue
        yield SetAttr(target, site.node, "is_training", None)
        factor = factors[site.node]
        for role, (resource, old) in _resources(graph, site).items():
            batch = Use("float32", Value(site.node, STATISTICS[role]))
            before = updates.get(resource, Use("float32", old))
            weight = 1 - DEFAULT_MOMENTUM if factor is None else factor
            updates[resource] = moving_average(before, batch, weight)
    for resource, value in updates.items():
        yield Run(target, op("AssignVariableOp", Use("resource", resource), value), f"bnqat/{resource.node}/update")


def _resources(graph: Graph, site: Site) -> dict[str, tuple[Value, Value]]:
    """The resource and the read value of both moving statistics; empty where one is not read in this graph."""
    node = graph.nodes[site.node]
    found = {}
    for role, index in ((MEAN, 3), (VARIANCE, 4)):
        resource = moving_resource(graph, node.inputs[index])
        if resource is None:
            return {}
        found[role] = (resource, node.inputs[index])
    return found


def _order_calls(model: Model, calls: CallGraph, graph: str, target: str, cloned: set[str]) -> Iterator[Edit]:
    """Calls that update the same variables run one after the other, in the order of the graph."""
    last: dict[Value, str] = {}
    for call in calls.calls.get(graph, []):
        if call.callee not in cloned:
            continue
        node = model.graphs[graph].nodes[call.node]
        resources = [v for v in node.inputs if v in last or _is_resource(model, graph, v)]
        before = tuple(dict.fromkeys(last[v] for v in resources if v in last))
        if before:
            yield RunAfter(target, call.node, before)
        last.update(dict.fromkeys(resources, call.node))


def _is_resource(model: Model, graph: str, value: Value) -> bool:
    node = model.graphs[graph].nodes[value.node]
    return node.op == ARG and "T" in node.attrs and node.attrs["T"].type == ops.RESOURCE
