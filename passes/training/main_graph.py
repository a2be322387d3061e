"""Training in TensorFlow 1's format: a copy of the part of the main graph that differs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from passes.batch_norm.batch_norms import batch_norms
from passes.batch_norm.layers import layers_of_sites
from passes.batch_norm.site import Site
from passes.batch_norm.sites import STATISTICS, sites
from passes.batch_norm.updates import updates_of
from passes.entries.serving import has_batch_norms, no_signature
from passes.entries.training import RANDOM
from passes.quantization.controls import increment
from passes.training.frozen_layers import step_counter
from passes.training.functions import sites_to_train
from passes.training.layer_options import TrainingOptions
from passes.training.notes import derived_notes, frozen_notes, momentum_notes
from passes.training.outputs import inner_tensor, refuse_used_names
from passes.training.site_training import Training, averages, serving_updates
from rewriter import op_defs
from rewriter.dataflow import REFERENCES, call_graph
from rewriter.edit import AddSignature, Duplicate, Edit, MainSignature, Note, Replace, Rewire, RunAfter
from rewriter.expr import Apply, Expr, Use, constant, op, ordered
from rewriter.frames import Frame, loop_frames
from rewriter.ir import MAIN, Edge, Error, Graph, Model, Signature, Spec, Value, unused
from rewriter.liveness import Assumption
from rewriter.shapes import shape_of

PREFIX = "train"
SHOWN = 4
"""Number of nodes that a note names."""
COUNT = "quantization/step"
TRAIN_OP = "train_op"
"""Collection of the op that makes a training step of the source."""


@dataclass
class MainGraphTraining:
    """The signature `train`: the default signature with batch norms in training mode, their updates and the count.

    Where the graph itself chooses its mode by a placeholder, `train` is the graph with that placeholder at the
    value for which batch norms train; else their mode is changed. In a model without batch norms, it is the value for
    which most random numbers are drawn, such as those of dropout. Only the nodes that differ are copied.
    """

    model: Model
    options: TrainingOptions
    outputs: Mapping[str, str]

    def __post_init__(self) -> None:
        self.graph: Graph = self.model.graphs[MAIN]
        self.sites = [s for s in self.model.analysis(sites) if not s.reason]
        self.count = increment(self.model)

    def edits(self) -> Iterator[Edit]:
        """Copy the nodes that differ in training, with updates and a signature; yield a note where there is none."""
        # A user may also train by the source's own train op, in a V1 session.
        yield from (RunAfter(MAIN, name, (self.count,), COUNT) for name in self.model.collections.get(TRAIN_OP, ()))
        signature = self._signature()
        if signature is None:
            yield Note(no_signature(self.model), "train")
            return
        if "train" in self.model.signatures:
            yield Note("the source has a signature 'train' of its own, which is kept and counts no steps", "train")
            return
        mode = self._mode(signature)
        if not self.model.analysis(has_batch_norms):
            yield from self._without_batch_norms(signature, mode)
            return
        running = self._running(signature, mode)
        source_trained = [s for s in running if trains(s, mode)]
        candidates = [s for s in running if s.graph == MAIN and s.mode == "inference" and self._trainable(s)]
        if self._undecided(running, mode):
            yield Note(
                "there is no signature 'train': what chooses between training and inference is not a single boolean "
                "placeholder",
                "train",
            )
            return
        if not candidates and not source_trained:
            why = (
                "are computed in functions that the main graph calls, which TensorFlow 1's format cannot differentiate"
            )
            if all(site.graph == MAIN for site in running):
                why = "neither train by their batch's statistics nor serve by variables that could be updated"
            yield Note(
                f"there is no signature 'train': the batch norms that the signature {signature.name} needs {why}",
                "train",
            )
            return
        if source_trained:
            self._refuse_freezing(source_trained)
            yield Note(_described(mode), "train")
            yield from momentum_notes(self.options)
        trained = self._sites_to_train(candidates, source_trained)
        trained_keys = {key for s in (*source_trained, *trained) for key in s.binding.variables}
        frozen_names = [
            bn.name
            for bn in self.model.analysis(batch_norms)
            if any(not s.binding.variables & trained_keys for s in bn.sites if s in running)
        ]
        yield from frozen_notes(self.model, frozen_names, self.options)
        self.count = step_counter(self.model, frozen_names)
        yield from self._copy(signature, mode, trained, source_trained)

    def _without_batch_norms(self, signature: Signature, mode: Assumption) -> Iterator[Edit]:
        """Let the signature `train` count a step, with the source's own random numbers where its graph has any."""
        if mode.values:
            yield Note(_described(mode), "train")
        else:
            yield from derived_notes(self.model, [], [], self.options, random=self._draws(signature, mode) > 0)
        yield from self._copy(signature, mode, [], [])

    def _refuse_freezing(self, source_trained: list[Site]) -> None:
        """Refuse to freeze what the graph itself trains.

        Raises:
            Error: an option asks for it.
        """
        layer_of = self.model.analysis(layers_of_sites)
        for site in source_trained:
            if not self.options.trains(self.model, layer_of[site.graph, site.node], source=True):
                raise Error(
                    f"{site.node} cannot be left frozen: in TensorFlow 1's format train is the source's own graph, "
                    "which trains it; leave --train-batch-norm away"
                )

    def _sites_to_train(self, candidates: list[Site], source_trained: list[Site]) -> list[Site]:
        """Return those of some sites in inference mode that train, beside any sites that the graph itself trains."""
        if not source_trained:
            return sites_to_train(self.model, candidates, self.options)
        layer_of = self.model.analysis(layers_of_sites)
        return [s for s in candidates if self.options.trains(self.model, layer_of[s.graph, s.node], source=False)]

    @staticmethod
    def _undecided(running: list[Site], mode: Assumption) -> bool:
        """Return true if the assumption leaves open whether some batch norm trains."""
        training = set().union(*(_keys(s) for s in running if trains(s, mode)))
        others = [s for s in running if not trains(s, mode)]
        # Where one site of a layer trains and another does not, something that the placeholders leave open chooses.
        return any(s.mode == "both" or training & _keys(s) for s in others)

    def _trainable(self, site: Site) -> bool:
        """Return true if a site's averages can be updated; a reference cannot be read in every round of a loop."""
        moving = averages(self.model, site)
        looped = site.node in self.model.analysis_of(self.graph, loop_frames)
        return bool(moving) and not (
            looped and any(self.graph.nodes[a.holder.node].op in REFERENCES for a in moving.values())
        )

    def _signature(self) -> Signature | None:
        """Return the signature to train: the default one if it computes a batch norm, else the first that does.

        In a model without batch norms, it is the one that computes with variables.
        """
        unassumed = Assumption(self.model, self.graph, {})
        signatures = list(self.model.signatures.values())
        if self.model.analysis(has_batch_norms):
            signatures = [s for s in signatures if self._running(s, unassumed)]
        else:
            holders = {v.node for v in self.model.variables.values()}
            signatures = [s for s in signatures if not holders.isdisjoint(_needed(s, unassumed))] or signatures
        return min(signatures, key=lambda s: (s.name != "serving_default", s.name), default=None)

    def _draws(self, signature: Signature, mode: Assumption) -> int:
        """Return the number of ops that draw random numbers for a signature."""
        needed = _needed(signature, mode)
        nodes = [self.graph.nodes[name] for name in needed]
        nodes += [node for name in mode.called(needed) for node in self.model.graphs[name].nodes.values()]
        return sum(bool(RANDOM.search(node.op)) for node in nodes)

    def _running(self, signature: Signature, mode: Assumption) -> list[Site]:
        """Return the sites that a signature needs."""
        needed = _needed(signature, mode)
        called = mode.called(needed)
        return [s for s in self.sites if (s.node in needed if s.graph == MAIN else s.graph in called)]

    def _mode(self, signature: Signature) -> Assumption:
        """Return the assumption under which most of a signature trains; an empty one where none helps."""
        needed = _needed(signature, Assumption(self.model, self.graph, {}))
        values: dict[Value, bool] = {}
        for name in needed:
            node = self.graph.nodes[name]
            if (
                node.op in ("Placeholder", "PlaceholderWithDefault")
                and op_defs.get(self.model, node, "dtype") == "bool"
            ):
                counts = [self._training_margin(signature, {**values, Value(name): value}) for value in (False, True)]
                if counts[0] != counts[1]:
                    values[Value(name)] = counts[1] > counts[0]
        return Assumption(self.model, self.graph, values)

    def _training_margin(self, signature: Signature, values: Mapping[Value, bool]) -> int:
        """Return the number of sites that train under an assumption, less the number of those that do not.

        In a model without batch norms, it is the number of ops that draw random numbers.
        """
        assumed = Assumption(self.model, self.graph, values)
        if not self.model.analysis(has_batch_norms):
            return self._draws(signature, assumed)
        running = self._running(signature, assumed)
        return sum(trains(s, assumed) for s in running) - sum(not trains(s, assumed) for s in running)

    def _copy(
        self, signature: Signature, mode: Assumption, changed: list[Site], source_trained: list[Site]
    ) -> Iterator[Edit]:
        linked = [r for s in source_trained for g, r in s.binding.runs if g == MAIN and mode.runs(r)]
        unlinked = self._unlinked(source_trained, mode)
        if unlinked:
            yield Note(
                f"{', '.join(unlinked[:SHOWN])} update moving averages with statistics computed apart from the batch "
                "norm; where they are not those of what its kernel takes, they stay float"
            )
        runs = tuple(dict.fromkeys([*linked, *unlinked]))
        inner = [inner_tensor(self.model, MAIN, *pair) for pair in sorted(self.outputs.items())]
        refuse_used_names(inner, signature.outputs)
        fetched_values = [*signature.fetches, *(tensor.value for tensor in inner)]
        needed = mode.needed([*(v.node for v in fetched_values), *runs])
        frame_of = self.model.analysis_of(self.graph, loop_frames)
        looped = [run for run in runs if run in frame_of]  # what makes a loop update is for training alone
        edges = [e for s in changed if s.kind == "decomposed" for r in STATISTICS for e in s.binding.parameters[r]]
        holders = {average.holder for s in changed for average in averages(self.model, s).values()}
        serving_assigns = list(serving_updates(self.graph, holders, needed))
        differing = [*(s.node for s in changed), *(e.node for e in edges), *looped, *serving_assigns]
        copied = _TrainingCopy(self.graph, mode, needed, differing, frame_of)
        # The source may have a name scope `train` of its own.
        prefix = unused(PREFIX, {name.partition("/")[0] for name in self.graph.nodes})
        yield Duplicate(MAIN, tuple(copied.names), prefix, copied.instead)

        def name(node: str) -> str:
            return f"{prefix}/{node}" if node in copied.names else node

        for node_name in copied.names:
            for position, used in enumerate(self.graph.nodes[node_name].inputs):
                placeholder = copied.resolved(used)
                if placeholder in mode.values:
                    mode_value = constant(mode.values[placeholder], "bool")
                    yield Rewire(Edge(MAIN, name(node_name), position), mode_value, prefix)
        yield from (Replace(MAIN, name(node), Apply("", "NoOp", ())) for node in serving_assigns)
        training = Training(self.model, MAIN, name, self.options, copied.resolved)
        for site in changed:
            yield from training.edits(site)
        updates: list[Expr] = []
        for run in runs:
            rounds = self._rounds(run, copied)
            yield from (RunAfter(MAIN, name(n), (name(run),)) for n in rounds)
            updates += [] if rounds else [Use("", Value(name(run)))]
        for holder, value in training.updates.items():
            update = self._assign(name, holder, value)
            rounds = self._rounds(training.after[holder].node, copied)
            # Nothing outside waits for what runs in a loop, but every next round does.
            yield from (RunAfter(MAIN, name(n), (update,), f"{prefix}/{holder.node}") for n in rounds)
            updates += [] if rounds else [update]
        last = [*updates, self.count]
        # Whatever output of the signature is run, the whole step is made.
        fetches = []
        for fetched in fetched_values:
            chosen = copied.resolved(fetched)
            dtype = op_defs.output_dtype(self.model, self.graph, fetched)
            fetches.append(ordered(op("Identity", Use(dtype, Value(name(chosen.node), chosen.port))), last))
        added = tuple(tensor.spec for tensor in inner)
        feeds = tuple(self._further_inputs(signature, mode, needed))
        if feeds:
            names = ", ".join(spec.name for spec, _ in feeds)
            yield Note(f"the signature train also takes {names}, which its updates of the moving averages need")
        yield AddSignature("train", MainSignature(signature.name, tuple(fetches), f"{prefix}/outputs", added, feeds))
        if not source_trained and self.model.analysis(has_batch_norms):
            yield from derived_notes(self.model, changed, [], self.options)

    def _unlinked(self, source_trained: list[Site], mode: Assumption) -> list[str]:
        """Return the nodes that update averages of sites with statistics not known to be those of the sites."""
        norms = [
            bn
            for bn in self.model.analysis(batch_norms)
            if any(s in source_trained and not s.binding.runs for s in bn.sites)
        ]
        keys = {bn.variables[role] for bn in norms for role in STATISTICS if role in bn.variables}
        update_nodes = (self._outermost(*update) for key in sorted(keys) for update in updates_of(self.model, key))
        return [node for node in dict.fromkeys(update_nodes) if mode.runs(node)]

    def _outermost(self, graph: str, node: str) -> str:
        """Return the node of the main graph by which a node of a function runs."""
        callers = self.model.analysis(call_graph).callers
        while graph != MAIN:
            graph, node, *_ = callers[graph][0]
        return node

    def _further_inputs(
        self, signature: Signature, mode: Assumption, needed: Iterable[str]
    ) -> Iterator[tuple[Spec, Value]]:
        """Yield the placeholders that training needs and the signature does not feed; a momentum may be one."""
        fed = {v.node for v in (*signature.feeds, *mode.values)}
        names = set(signature.inputs)
        for node in needed:
            # A placeholder with a default need not be fed.
            if self.graph.nodes[node].op == "Placeholder" and node not in fed:
                value = Value(node)
                name = unused(re.sub(r"\W", "_", node), names)
                names.add(name)
                dtype = op_defs.output_dtype(self.model, self.graph, value)
                yield Spec(name, dtype, shape_of(self.model, self.graph, value)), value

    def _rounds(self, inside: str, copied: _TrainingCopy) -> list[str]:
        """Return the ends of the rounds of the loop that a node lies in."""
        frame_of = copied.frame_of
        if inside not in frame_of:
            return []
        ends = [n for n in copied.needed if self.graph.nodes[n].op == "NextIteration"]
        return [n for n in ends if frame_of[n] == frame_of[inside]]

    def _assign(self, name: Callable[[str], str], holder: Value, value: Expr) -> Expr:
        variable = Value(name(holder.node), holder.port)
        if self.graph.nodes[holder.node].op in REFERENCES:
            return op("Assign", Use(value.dtype, variable), value)
        return op("AssignVariableOp", Use("resource", variable), value)


def _needed(signature: Signature, mode: Assumption) -> Mapping[str, None]:
    """Return the nodes of the main graph that a signature needs."""
    return mode.needed(fetched.node for fetched in signature.fetches)


def _keys(site: Site) -> set[str]:
    """Return the keys of the variables of a site."""
    return {key for keys in site.binding.variables for key in keys if key is not None}


def trains(site: Site, mode: Assumption) -> bool:
    """Return true if a site normalises with the batch's statistics under an assumption."""
    if site.mode != "both":
        return site.mode == "training"
    return not any(mode.passes(edge) for edge in site.binding.parameters.get("moving_mean", ()))


def _described(mode: Assumption) -> str:
    if not mode.values:
        return "train is the source's own graph, which is in training mode"
    values = ", ".join(f"{placeholder.node} = {value}" for placeholder, value in sorted(mode.values.items()))
    return f"train is the source's own graph with {values}"


@dataclass
class _TrainingCopy:
    """The nodes that differ in training: sites whose mode changes, placeholders with a known value, and what follows.

    Attributes:
        names: the nodes to copy.
        instead: an output of a node that only chooses -> the value that it chooses.
    """

    graph: Graph
    mode: Assumption
    needed: Mapping[str, None]
    changed: list[str]
    frame_of: Mapping[str, Frame]
    instead: dict[Value, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        users: dict[str, list[str]] = {}
        for name in self.needed:
            node = self.graph.nodes[name]
            for source in (*(v.node for v in node.inputs), *node.after):
                users.setdefault(source, []).append(name)
        for name in self.needed:
            chosen = self.mode.chosen(self.graph.nodes[name])
            if chosen is not None:
                self.instead.update({Value(name, port): chosen for port in range(2)})
        # The copy of an Enter opens a frame of its own, so every node of the loop needs a copy.
        loops: dict[str, list[str]] = {}  # a loop is copied whole
        for name, frame in self.frame_of.items():
            loops.setdefault(frame[0], []).append(name)
        waiting = [*self.changed, *(v.node for v in (*self.mode.values, *self.instead))]
        differing = set(self.changed)
        while waiting:
            for user in users.get(waiting.pop(), ()):
                for name in loops.get(self.frame_of.get(user, ("",))[0], (user,)):
                    if name not in differing:
                        differing.add(name)
                        waiting.append(name)
        choosing = {v.node for v in self.instead}
        self.names = tuple(n for n in self.graph.nodes if n in differing and n in self.needed and n not in choosing)

    def resolved(self, value: Value) -> Value:
        """Return the value that a value stands for, where choices are known."""
        while value in self.instead:
            value = self.instead[value]
        return value
