"""The functions of a model that train.

A function trains if it counts a step, or if a batch norm may normalise with a batch's statistics in it. In a model
without batch norms, a function of the source trains if it was traced for training and draws random numbers that serving
does not draw, such as those of dropout.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from passes.batch_norm.batch_norms import batch_norms
from passes.batch_norm.roles import MEAN
from passes.batch_norm.site import Site
from passes.batch_norm.sites import sites
from passes.control_flow.running_graphs import running_from
from passes.entries.alignment import align
from passes.entries.serving import entries_of_root, has_batch_norms, serving_entry
from passes.quantization.training_functions import counting
from rewriter.dataflow import call_graph
from rewriter.ir import MAIN, Entry, Error, Model
from rewriter.liveness import Assumption

RANDOM = re.compile(r"Random|TruncatedNormal|Multinomial|StatefulUniform|StatefulStandardNormal|StatelessShuffle")
"""Ops that draw random numbers."""

TRAINING_NAME = re.compile("train")
"""Beginning of the names of a source's functions that train, where no flag tells."""


def trains(model: Model, function: str) -> bool:
    """Return true if a function trains."""
    if function in model.analysis(counting) or function in model.analysis(_drawing_traces):
        return True
    running = running_from(model, function)
    return any(
        _trains(s, running) and any(a.runs(s.node) for a in running[s.graph])
        for s in model.analysis(sites)
        if s.graph in running
    )


def only_training(model: Model) -> frozenset[str]:
    """Return the functions that run in training and never else: what they compute may depend on that."""
    calls = model.analysis(call_graph)
    reached: dict[bool, set[str]] = {True: set(), False: set()}
    for entry in model.entries.values():
        reached[trains(model, entry.function)] |= calls.reached(entry.function)
    return frozenset(reached[True] - reached[False] - {MAIN})


def draws(model: Model, function: str) -> frozenset[tuple[str, str]]:
    """Return the (graph, node) of the ops that draw random numbers when a function runs."""
    return frozenset(
        (name, node.name)
        for name, assumptions in running_from(model, function).items()
        for node in model.graphs[name].nodes.values()
        if RANDOM.search(node.op) and any(assumed.runs(node.name) for assumed in assumptions)
    )


def _drawing_traces(model: Model) -> frozenset[str]:
    """Return the functions of the root that train in a model without batch norms, by their random numbers."""
    if model.analysis(has_batch_norms):
        return frozenset()
    traced = [e for e in entries_of_root(model) if any(e.flags) or any(TRAINING_NAME.match(p) for p in e.paths)]
    if not traced:
        return frozenset()
    try:
        served = draws(model, serving_entry(model).function)
    except Error:
        return frozenset()
    return frozenset(e.function for e in traced if len(draws(model, e.function)) > len(served))


def _drawing_trace(model: Model, serving: Entry) -> Entry | None:
    """Return a function of the source that trains, with the inputs, outputs and variables of serving; or None."""

    def rank(entry: Entry) -> tuple[bool, bool, str]:
        same_names = [s.name for s in entry.inputs] == [s.name for s in serving.inputs]
        return "__call__" not in entry.paths, not same_names, entry.function

    traces = [e for e in entries_of_root(model) if e.function in model.analysis(_drawing_traces)]
    for entry in sorted(traces, key=rank):
        if set(serving.captures) <= set(entry.captures) and align(model, entry, serving) is not None:
            return entry
    return None


def training_trace(model: Model, serving: Entry) -> Entry | None:
    """Return a function of the root with the inputs and outputs of serving that trains its batch norms, or None.

    Keras 2 saves its model's call with training=True as one. A serving function that takes its mode as an
    argument is one itself. A batch norm that it runs in inference mode is one that the source leaves frozen; serving
    itself may do so only with batch norms that no function trains. In a model without batch norms, it is one that draws
    random numbers beyond those of serving.
    """
    if not model.analysis(has_batch_norms):
        return _drawing_trace(model, serving)

    def trained(entry: Entry) -> frozenset[str]:
        return computed(model, entry.function, training=True)

    # Of several functions that train, some may train a part of the layers only, so the one that trains most is first.
    def rank(entry: Entry) -> tuple[int, bool, bool, str]:
        same_names = [s.name for s in entry.inputs] == [s.name for s in serving.inputs]
        return -len(trained(entry)), "__call__" not in entry.paths, not same_names, entry.function

    served = computed(model, serving.function)
    never_trained = {bn.name for bn in model.analysis(batch_norms) if not any(s.training for s in bn.sites)}
    others = [e for e in entries_of_root(model) if e.function != serving.function]
    for entry in (*sorted(others, key=rank), serving):
        complete = served <= (trained(entry) | never_trained if entry is serving else computed(model, entry.function))
        if trained(entry) and complete and align(model, entry, serving) is not None:
            return entry
    return None


def computed(model: Model, function: str, *, training: bool = False) -> frozenset[str]:
    """Return the names of the batch norms that a function computes, or of those that it may train."""
    running = running_from(model, function)
    return frozenset(
        bn.name
        for bn in model.analysis(batch_norms)
        if any(s.graph in running and (not training or _trains(s, running)) for s in bn.sites)
    )


def _trains(site: Site, running: Mapping[str, list[Assumption]]) -> bool:
    """Return true if a site may train.

    It may not where its mode or that of its updates is known to be another.
    """
    # Where a constant chooses inference, the graph may compute the other mode too, for nothing.
    assumptions = [a for a in running.get(site.graph, []) if a.returns(site.node)]
    held_means = site.binding.parameters.get(MEAN, ()) if site.mode == "both" else ()
    if not site.training or all(any(a.settles(e) and a.passes(e) for e in held_means) for a in assumptions):
        return False
    updates = [edge for edges in site.binding.statistics.values() for edge in edges]
    return not updates or any(a.passes(edge) for edge in updates for a in running.get(edge.graph, ()))
