"""The functions of a model that serve and that train, and the correspondence of their inputs and outputs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from passes.batch_norm.batch_norms import batch_norms
from passes.batch_norm.roles import MEAN
from passes.batch_norm.site import Site
from passes.batch_norm.sites import sites
from rewriter import op_defs, ops
from rewriter.dataflow import call_graph
from rewriter.ir import MAIN, Entry, Error, Graph, Model, Signature, Spec, Value
from rewriter.liveness import Assumption

# From names of this form, TensorFlow's loader strips the prefix and the number.
TRAIN = "__inference_bnqat_train_0"
TRAIN_SIGNATURE = "__inference_bnqat_train_signature_0"
SERVE = "__inference_bnqat_serve_0"
"""Names of the functions that a rewrite adds."""

FROZEN = "_frozen"
"""Suffix of the names of the functions in which training normalises with frozen statistics."""

HINT = " (--passes quantize rewrites without a training function)"


class Alignment(NamedTuple):
    """The order in which one function's inputs and outputs are those of another."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def serving_signature(model: Model) -> Signature | None:
    """Return the signature that computes a batch norm in inference: the default one, if it does, else the first."""
    signatures = [s for s in model.signatures.values() if _infers(model, s.entry)]
    return min(signatures, key=lambda s: (s.name != "serving_default", s.name), default=None)


def serving_entry(model: Model) -> Entry:
    """Return the function that serves.

    The candidates are, in this order, the root's own `serve`, the function of `serving_signature`, the root's call and
    its other functions.

    Raises:
        Error: none of them computes a batch norm in inference.
    """
    signature = serving_signature(model)
    signed = [model.entries[signature.entry]] if signature is not None else []
    named = (*model.root_entries("serve"), *signed, *model.root_entries("__call__"))
    others = sorted(entries_of_root(model), key=lambda e: e.paths)
    for entry in (*named, *others):
        if _infers(model, entry.function):
            return entry
    raise Error(f"no signature and no function of the root object computes a batch norm in inference{HINT}")


def _infers(model: Model, function: str) -> bool:
    """Return true if a function computes a batch norm in inference."""
    reached = running_from(model, function)
    return any(s.graph in reached and s.inference for s in model.analysis(sites))


def trains(model: Model, function: str) -> bool:
    """Return true if a batch norm may normalise with a batch's statistics when a function runs."""
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


def running_from(model: Model, function: str) -> Mapping[str, list[Assumption]]:
    """Return the graphs that can run when a function does, with the facts known in them.

    Branches that constants rule out are not among them: a serving function may call the one that takes the mode as an
    argument, with a constant.
    """
    memo = model.analysis(_run)
    if function not in memo:
        memo[function] = {}
        _running(model, function, {}, memo[function])
    return memo[function]


def _run(_: Model) -> dict[str, dict[str, list[Assumption]]]:
    """Return a memo for `running_from`, by function: empty at first."""
    return {}


def _running(model: Model, name: str, known: Mapping[Value, bool], assumptions: dict[str, list[Assumption]]) -> None:
    """Collect the graphs that run, where some boolean arguments of a function are known."""
    graph = model.graphs[name]
    assumption = Assumption(model, graph, known)
    if any(other.values == known for other in assumptions.setdefault(name, [])):
        return
    assumptions[name].append(assumption)
    for node in dict.fromkeys(call.node for call in model.analysis(call_graph).calls.get(name, [])):
        call = graph.nodes[node]
        form = ops.call_form_of(model, call)
        known_inputs = [assumption.known(v) if _boolean(model, graph, v) else None for v in call.inputs[form.first :]]
        for callee in assumption.taken(call):
            arguments = model.graphs[callee].arguments
            # A loop may change its booleans from round to round.
            inner = {
                Value(a): v for a, v in zip(arguments, known_inputs, strict=True) if v is not None and not form.carried
            }
            _running(model, callee, inner, assumptions)


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


def _boolean(model: Model, graph: Graph, value: Value) -> bool:
    return op_defs.output_dtype(model, graph, value) == "bool"


def training_trace(model: Model, serving: Entry) -> Entry | None:
    """Return a function of the root with the inputs and outputs of serving that trains its batch norms, or None.

    Keras 2 saves its model's call with training=True as one. A serving function that takes its mode as an
    argument is one itself. A batch norm that it runs in inference mode is one that the source leaves frozen; serving
    itself may do so only with batch norms that no function trains.
    """

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


def entries_of_root(model: Model) -> list[Entry]:
    """Return the concrete functions that the root itself holds."""
    return [e for e in model.entries.values() if any("." not in p for p in e.paths)]


def computed(model: Model, function: str, *, training: bool = False) -> frozenset[str]:
    """Return the names of the batch norms that a function computes, or of those that it may train."""
    running = running_from(model, function)
    return frozenset(
        bn.name
        for bn in model.analysis(batch_norms)
        if any(s.graph in running and (not training or _trains(s, running)) for s in bn.sites)
    )


def align(model: Model, entry: Entry, like: Entry) -> Alignment | None:
    """Return the alignment of `entry` with the inputs and outputs of `like`; None where it is not clear.

    Inputs are told apart by name. Outputs are told apart by name, or else by the layer that computes them:
    Keras names a signature's outputs after their layers, and nothing else.
    """
    inputs = _by_name(entry.inputs, like.inputs)
    outputs = _by_name(entry.outputs, like.outputs)
    if outputs is None and len(entry.outputs) == len(like.outputs):
        scopes = [_scopes(model, entry.function, r.value) for r in model.graphs[entry.function].results]
        candidates = [[i for i, scope in enumerate(scopes) if _plain(s.name) in scope] for s in like.outputs]
        if all(len(f) == 1 for f in candidates) and len({f[0] for f in candidates}) == len(candidates):
            outputs = tuple(f[0] for f in candidates)
    if inputs is None or outputs is None:
        return None
    fits = [_fits(entry.inputs[i], s) for i, s in zip(inputs, like.inputs, strict=True)]
    fits += [_fits(entry.outputs[i], s) for i, s in zip(outputs, like.outputs, strict=True)]
    return Alignment(inputs, outputs) if all(fits) else None


def _fits(a: Spec, b: Spec) -> bool:
    """Return true if two specs have the same dtype, and the same shape where both are known."""
    return a.dtype == b.dtype and (a.shape == b.shape or a.shape is None or b.shape is None)


def _by_name(specs: tuple[Spec, ...], like: tuple[Spec, ...]) -> tuple[int, ...] | None:
    """Return the positions in `specs` of the specs of `like`, by name; None where names do not tell."""
    if len(specs) != len(like):
        return None
    if len(specs) == 1:
        return (0,)
    names = [s.name for s in specs]
    if len(set(names)) != len(names) or set(names) != {s.name for s in like}:
        return None
    return tuple(names.index(s.name) for s in like)


def _plain(name: str) -> str:
    """Return a layer's name as a spec has it: TensorFlow puts an underscore for what an identifier cannot hold."""
    return re.sub(r"\W", "_", name)


def _scopes(model: Model, graph: str, value: Value) -> set[str]:
    """Return the parts of the names of the nodes that a value comes from, through forwarding ops and calls."""
    scopes: set[str] = set()
    while True:
        node = model.graphs[graph].nodes[value.node]
        scopes |= {_plain(part) for part in node.name.split("/")}
        called = ops.callees(model, node)
        if len(called) == 1:
            graph, value = called[0], model.graphs[called[0]].results[value.port].value
            continue
        passed = ops.forwarded(node, value.port)
        if passed is None:
            return scopes
        value = passed


def capturable(model: Model, entry: Entry) -> bool:
    """Return true if the main graph has all that a function captures, so that a signature can compute it.

    It has every variable, and of other objects those that its signatures use already.
    """
    calls = model.analysis(call_graph).calls.get(MAIN, [])
    available = {c for call in calls if call.callee in model.entries for c in model.entries[call.callee].captures}
    return all(isinstance(c, str) or c in available for c in entry.captures)


def frozen(model: Model) -> frozenset[str]:
    """Return the functions of the second phase alone, and those that only call its root."""
    calls = model.analysis(call_graph)
    prefixes = tuple(f"{name}{FROZEN}" for name in (TRAIN, TRAIN_SIGNATURE))
    return frozenset().union(*(calls.reached(name) for name in model.graphs if name.startswith(prefixes)))
