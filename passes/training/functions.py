"""Training clones of functions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import compress
from typing import NamedTuple

from passes.batch_norm.layers import layers_of_sites
from passes.batch_norm.moving_statistics import normalise_with_moving
from passes.batch_norm.roles import ROLES
from passes.batch_norm.site import Site
from passes.batch_norm.sites import STATISTICS, sites
from passes.control_flow.running_graphs import running_from
from passes.entries.serving import HINT
from passes.frontend.split_modes import bodies
from passes.training.frozen_layers import frozen_layers
from passes.training.layer_options import TrainingOptions
from passes.training.outputs import InnerOutputs
from passes.training.site_training import RESOURCE_ASSIGNS, Training, averages
from rewriter import op_defs
from rewriter.dataflow import VariableKey, call_graph, origins
from rewriter.edit import Clone, Edit, Replace, Rewire, Run, RunAfter, SetAttr
from rewriter.expr import Apply, Use, op
from rewriter.ir import ARG, Error, Model, Value

PREFIX = "__inference_bnqat_"
"""Prefix of the names of training functions."""


def derived_sites(model: Model, functions: Iterable[str], options: TrainingOptions) -> list[Site]:
    """Return the sites in inference mode that functions need, and that are to train in copies of the functions.

    Raises:
        Error: no site is in inference mode; or rules contradict each other.
    """
    reached = set().union(*(model.analysis(call_graph).reached(f) for f in functions))
    inference_sites = [s for s in model.analysis(sites) if s.graph in reached and s.mode == "inference"]
    if not inference_sites:
        raise Error(
            "no training function can be derived: serving chooses the mode of its batch norms, and a constant "
            f"chooses inference; without --no-fuse each mode becomes a function{HINT}"
        )
    return sites_to_train(model, inference_sites, options)


def sites_to_train(model: Model, inference_sites: list[Site], options: TrainingOptions) -> list[Site]:
    """Return those of some sites in inference mode that are to train.

    Raises:
        Error: rules contradict each other.
    """
    frozen_names = model.analysis(frozen_layers)
    layer_of = model.analysis(layers_of_sites)
    trains_by_layer = {
        layer.number: options.trains(model, layer, any(bn.name not in frozen_names for bn in layer.batch_norms))
        for layer in (layer_of[s.graph, s.node] for s in inference_sites)
    }
    return [s for s in inference_sites if trains_by_layer[layer_of[s.graph, s.node].number]]


class Switched(NamedTuple):
    """The sites of a function whose mode changes in training.

    Attributes:
        trained: sites in inference mode that are to train.
        frozen: sites in training mode that are not to train.
    """

    trained: list[Site]
    frozen: list[Site]


def switched_sites(model: Model, function: str, options: TrainingOptions) -> Switched:
    """Return the sites of a source's training function whose mode has to change.

    Raises:
        Error: a site that is to be left frozen chooses its mode while it runs; or rules contradict each other.
    """
    layer_of = model.analysis(layers_of_sites)
    running = running_from(model, function)
    running_sites = [s for s in model.analysis(sites) if s.graph in running and not s.reason]
    training = {layer_of[s.graph, s.node].number for s in running_sites if s.training}
    switched = Switched([], [])
    for site in running_sites:
        layer = layer_of[site.graph, site.node]
        trains = layer.number in training
        to_be_trained = options.trains(model, layer, trains)
        if site.training and not to_be_trained:
            if site.mode == "both":
                raise Error(
                    f"{site.node} cannot be left frozen in train: it chooses its mode while it runs; leave "
                    "--train-batch-norm away, or --no-fuse"
                )
            switched.frozen.append(site)
        elif to_be_trained and not trains:
            switched.trained.append(site)
    return switched


class FunctionClones:
    """Training clones of functions, and of all functions that they call on the way to what changes in training.

    Attributes:
        tops: the functions to clone, by the name of the clone; each with the order of its inputs and outputs.
        cloned: the graphs to clone; those that others of them call have a name in `names`. These are all that training
            runs, or those that change in training.
        trained: sites that are in training mode in the clones.
        untrainable: sites that were to be in training mode, and cannot.
        frozen: sites that are in inference mode in the clones.
        updating: the graphs that update moving averages, and those that call them.
        served: by graph, the source's own updates of averages that derived training updates.
    """

    def __init__(
        self,
        model: Model,
        tops: Mapping[str, Clone],
        options: TrainingOptions,
        switched: Switched,
        outputs: InnerOutputs,
        *,
        whole: bool = False,
    ) -> None:
        trained, frozen = switched
        self.model = model
        self.options = options
        self.calls = model.analysis(call_graph)
        self.tops = tops
        self.outputs = outputs
        self.frozen = frozen
        trainable = [bool(not s.reason and averages(model, s)) for s in trained]
        self.trained = list(compress(trained, trainable))
        self.untrainable = list(compress(trained, (not can_train for can_train in trainable)))
        functions = {top.graph for top in tops.values()}
        reached = set().union(*(self.calls.reached(f) for f in functions))
        changed = {s.graph for s in trained} | set(outputs.graphs)
        changed |= {g for s in frozen for g in _graphs_of(s)}
        self.served = dict(self._updates_in(reached))
        # A graph without a site is copied too where it updates averages: the updates go from the copy.
        changed |= self.served.keys()
        updating = {s.graph for s in self.trained}
        self.updating = updating.union(*(self.calls.reaching(g) for g in updating))
        self.cloned = changed.union(*(self.calls.reaching(g) for g in changed)) & reached
        if whole:
            run_by_nodes = {body for g in reached for body in bodies(model, model.graphs[g])}
            self.cloned |= reached - run_by_nodes
        self.whole = whole
        callers = reached if whole else self.cloned
        called = {c.callee for g in callers for c in self.calls.calls.get(g, [])} & self.cloned
        self.names = {g: f"{g}_train" for g in called}
        for name, top in tops.items():
            # A clone with other inputs or outputs than its source cannot take the source's place in a call.
            if top.graph in called and not (top.inputs or top.outputs or outputs):
                self.names[top.graph] = name

    def _updates_in(self, graphs: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
        """Yield each graph that updates averages of `trained` itself, and the nodes: derived training replaces them."""
        # An update may lie in another graph than its site, such as the caller of a branch, and would race with ours.
        held = [keys[ROLES.index(role)] for s in self.trained for keys in s.binding.variables for role in STATISTICS]
        derived = {VariableKey(key) for key in held if key is not None}
        for name in sorted(graphs):
            assigns = [n for n in self.model.graphs[name].nodes.values() if n.op in RESOURCE_ASSIGNS]
            updates = [n.name for n in assigns if derived & origins(self.model, name, n.inputs[0])]
            if updates:
                yield name, updates

    def edits(self) -> Iterator[Edit]:
        """Yield the clones, sites in their new mode, updates of moving statistics, and further results.

        Raises:
            Error: no site can be trained, or the order of two updates is not known.
        """
        if self.untrainable and not self.trained:
            reason = self.untrainable[0].reason or "its moving statistics are read in another function"
            raise Error(
                f"no training function can be derived: {self.untrainable[0].node} cannot be trained: {reason}{HINT}"
            )
        clones = {name: Clone(graph, name, self.names) for graph, name in self.names.items()}
        for name, top in {**(clones if self.whole else {}), **self.tops}.items():
            # Each clone gets bodies of its own: two functions that run the same one cannot both be differentiated.
            own_bodies = [body for body in bodies(self.model, self.model.graphs[top.graph]) if body not in self.names]
            names = self.names | {body: f"{body}_{name.removeprefix(PREFIX)}" for body in own_bodies}
            clones |= {names[body]: Clone(body, names[body], names) for body in own_bodies}
            clones[name] = Clone(top.graph, name, names, top.inputs, top.outputs)
        for name, clone in sorted(clones.items()):
            yield clone
            yield from self._train(clone.graph, name)
            yield from self._freeze(clone.graph, name)
            yield from self._order_calls(clone.graph, name)
        yield from self.outputs.edits(clones, self.names)

    def _train(self, graph: str, target: str) -> Iterator[Edit]:
        training = Training(self.model, target, str, self.options)
        for site in self.trained:
            if site.graph == graph:
                yield from training.edits(site)
        yield from (Replace(target, node, Apply("", "NoOp", ())) for node in self.served.get(graph, ()))
        for holder, value in training.updates.items():
            yield Run(target, op("AssignVariableOp", Use("resource", holder), value), f"{holder.node}/update")

    def _freeze(self, graph: str, target: str) -> Iterator[Edit]:
        """Put frozen sites into inference mode, as far as the edits concern this clone."""
        # A site's edits concern several graphs. Those of graphs other than this clone's are dropped.
        names = {**{g: "" for s in self.frozen for g in _graphs_of(s)}, **self.names, graph: target}
        for site in self.frozen:
            if graph in _graphs_of(site):
                for edit in normalise_with_moving(self.model, site, names):
                    if _edited(edit) == target:
                        yield edit

    def _order_calls(self, graph: str, target: str) -> Iterator[Edit]:
        """Let calls that update the same variables run one after the other, in the order of the graph."""
        nodes = self.model.graphs[graph].nodes
        inline = {a.holder for s in self.trained if s.graph == graph for a in averages(self.model, s).values()}
        last: dict[Value, str] = {}
        for name in dict.fromkeys(c.node for c in self.calls.calls.get(graph, []) if c.callee in self.updating):
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
        return node.op == ARG and op_defs.argument_dtype(node) == "resource"


def _graphs_of(site: Site) -> set[str]:
    """Return the graphs that hold a site in training mode: its op, the values of its statistics, and its updates."""
    statistics = [e.graph for edges in site.inputs.values() for e in edges]
    return {site.graph, *statistics, *(g for assigns in site.binding.assigns.values() for g, _ in assigns)}


def _edited(edit: Edit) -> str:
    return edit.edge.graph if isinstance(edit, Rewire) else edit.graph if isinstance(edit, Replace | SetAttr) else ""
