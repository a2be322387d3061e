"""Lifting: values that a function needs (a variable's resource, a per-call value) reach it through all its callers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rewriter import op_defs, ops, protos
from rewriter.dataflow import CallGraph, call_graph
from rewriter.draft import Draft, Need
from rewriter.expr import Handle, Passed, PerCall, handle, variables_of
from rewriter.ir import MAIN, Entry, Error, Model, Value


def make_stateful(model: Model, drafts: dict[str, Draft]) -> None:
    """Make every caller of a graph that gained effects stateful, and make the call an effect of it."""
    calls = model.analysis(call_graph)
    changed = [n for n, d in drafts.items() if len(d.effects) > len(d.graph.effects)]
    done: set[str] = set()
    while changed:
        name = changed.pop()
        if name in done:
            continue
        done.add(name)
        _decline_opaque(calls, name)
        for call in calls.callers.get(name, []):
            draft = drafts[call.graph]
            node = draft.nodes.get(call.node)
            if node is None:
                continue  # the call was inlined
            form = ops.call_form_of(model, node)
            # The attribute lists resources that the callee only reads; the new effect may assign one of them.
            draft.set_node(replace(node.with_attrs(_read_only_resource_inputs=None), op=form.stateful))
            draft.add_effect(call.node)
            changed.append(call.graph)


def lift(model: Model, drafts: dict[str, Draft]) -> Model:
    """Return the model with all drafts finished: functions get arguments for what they need, and callers pass them.

    Variables' resources become captures of concrete functions and VarHandleOps of the main graph. Per-call values are
    computed where a call enters the model.
    """
    _propagate_needs(model, drafts, model.analysis(call_graph))
    for draft in drafts.values():
        # Functions called by the same node share one list of inputs, so the order must be the same.
        draft.needs = dict(sorted(draft.needs.items(), key=lambda item: _sort_key(item[0])))
    for draft in list(drafts.values()):
        _extend_calls(model, drafts, draft)
    graphs = dict(model.graphs)
    entries = dict(model.entries)
    for name, draft in drafts.items():
        graphs[name] = draft.finish()
        if name in entries:
            entries[name] = _with_captures(entries[name], draft)
    return replace(model, graphs=graphs, entries=entries)


def _sort_key(need: Need) -> tuple[str, str]:
    # Names of variables need not be unique; keys are.
    return need.label, need.variable.key if isinstance(need, Handle) else ""


def _decline_opaque(calls: CallGraph, name: str) -> None:
    if name in calls.opaque:
        raise Error(f"the function {name} is used by an op other than a call, so it can be given no further input")


def _propagate_needs(model: Model, drafts: dict[str, Draft], calls: CallGraph) -> None:
    """Give each function's needs to its callers, and to functions called by the same nodes, until nothing changes."""
    waiting = [name for name, draft in drafts.items() if draft.needs]
    while waiting:
        name = waiting.pop()
        _decline_opaque(calls, name)
        needs = tuple(drafts[name].needs)
        for call in calls.callers.get(name, []):
            # A node passes the same inputs to all functions that it may call.
            siblings = ops.callees(model, model.graphs[call.graph].nodes[call.node])
            waiting.extend(neighbour for neighbour in (call.graph, *siblings) if _add_needs(drafts, neighbour, needs))


def _add_needs(drafts: dict[str, Draft], name: str, needs: tuple[Need, ...]) -> bool:
    """Add needs to a graph; return true if some were new."""
    draft = drafts[name]
    if name == MAIN:
        return False  # the main graph has no callers, and makes the values that it passes
    before = len(draft.needs)
    for need in needs:
        if isinstance(need, Passed) and need.graph == name:
            continue
        # Calls enter here, so the value is computed here, from variables that the function needs instead.
        if isinstance(need, PerCall) and draft.entry:
            for variable in variables_of(need):
                draft.need(handle(variable))
        else:
            draft.need(need)
    return len(draft.needs) > before


def _extend_calls(model: Model, drafts: Mapping[str, Draft], draft: Draft) -> None:
    calls = model.analysis(call_graph).calls.get(draft.graph.name, [])
    for name in dict.fromkeys(c.node for c in calls):
        node = draft.nodes.get(name)
        if node is None:
            continue  # the call was inlined
        callee_drafts = [drafts[f] for f in ops.callees(model, node) if f in drafts]
        needs = list(dict.fromkeys(n for d in callee_drafts for n in d.needs))
        if not needs:
            continue
        form = ops.call_form_of(model, node)
        scope = f"{name}/inputs"
        arguments = tuple(draft.place(n, scope) for n in needs)
        attrs: dict[str, Any] = {}
        if form.types is not None:
            attrs[form.types] = protos.more_dtypes(op_defs.attribute(node, form.types), [n.dtype for n in needs])
        if form.carried:
            _return_needs(callee_drafts[-1], needs)
            shapes = op_defs.attribute(node, "output_shapes")
            if shapes.list.shape:
                attrs["output_shapes"] = protos.more_shapes(shapes, [n.shape for n in needs])
            # It has an entry for each output, and the loop has more outputs now.
            attrs["_output_shapes"] = None
        draft.set_node(replace(node.with_attrs(**attrs), inputs=(*node.inputs, *arguments)))


def _return_needs(body: Draft, needs: list[Need]) -> None:
    """Let a loop's body return the arguments that carry its needs, as it must for all loop variables."""
    for need in needs:
        argument = body.need(need)
        if all(r.value != Value(argument) for r in body.results):
            body.add_result(argument, Value(argument), need.dtype)


def _with_captures(entry: Entry, draft: Draft) -> Entry:
    added = tuple(need.variable.key for need in draft.needs if isinstance(need, Handle))
    return replace(entry, captures=(*entry.captures, *added))
