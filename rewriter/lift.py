"""Bringing what a function needs (a variable's resource, a per-call value) to it through all its callers."""

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
    """Make every caller of a graph that gained effects run the call, and know that it has effects."""
    calls = model.analysis(call_graph)
    changed = [n for n, d in drafts.items() if len(d.effects) > len(d.graph.effects)]
    seen: set[str] = set()
    while changed:
        name = changed.pop()
        if name in seen:
            continue
        seen.add(name)
        _decline_opaque(calls, name)
        for call in calls.callers.get(name, []):
            draft = drafts[call.graph]
            node = draft.nodes.get(call.node)
            if node is None:
                continue  # it was inlined
            form = ops.call_form_of(model, node)
            # Which resources the callee only reads is no longer what the attribute says.
            draft.set_node(replace(node.with_attrs(_read_only_resource_inputs=None), op=form.stateful))
            draft.add_effect(call.node)
            changed.append(call.graph)


def lift(model: Model, drafts: dict[str, Draft]) -> Model:
    """Finish the drafts: every function gets arguments for what it needs, every caller passes them.

    Variables' resources end as captures of concrete functions and as VarHandleOps of the main graph;
    per-call values are computed where a call enters.
    """
    _spread(model, drafts, model.analysis(call_graph))
    for draft in drafts.values():
        # Functions called in the same place share one list of inputs, so the order must be the same.
        draft.needs = dict(sorted(draft.needs.items(), key=lambda item: _order(item[0])))
    for draft in list(drafts.values()):
        _extend_calls(model, drafts, draft)
    graphs = dict(model.graphs)
    entries = dict(model.entries)
    for name, draft in drafts.items():
        graphs[name] = draft.finish()
        if name in entries:
            entries[name] = _capture(entries[name], draft)
    return replace(model, graphs=graphs, entries=entries)


def _order(need: Need) -> tuple[str, str]:
    return need.label, need.variable.key if isinstance(need, Handle) else ""


def _decline_opaque(calls: CallGraph, name: str) -> None:
    if name in calls.opaque:
        raise Error(f"the function {name} is used by an op other than a call, so it can be given no further input")


def _spread(model: Model, drafts: dict[str, Draft], calls: CallGraph) -> None:
    """Let callers, and functions called in the same place, need what a function needs; until nothing changes."""
    waiting = [name for name, draft in drafts.items() if draft.needs]
    while waiting:
        name = waiting.pop()
        _decline_opaque(calls, name)
        needs = tuple(drafts[name].needs)
        for call in calls.callers.get(name, []):
            siblings = ops.callees(model, model.graphs[call.graph].nodes[call.node])
            waiting.extend(other for other in (call.graph, *siblings) if _add_needs(drafts, other, needs))


def _add_needs(drafts: dict[str, Draft], name: str, needs: tuple[Need, ...]) -> bool:
    draft = drafts[name]
    if name == MAIN:
        return False  # it has no callers, and makes what it passes
    before = len(draft.needs)
    for need in needs:
        if isinstance(need, Passed) and need.graph == name:
            continue
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
            continue  # what it called stands in its place
        called = [drafts[f] for f in ops.callees(model, node) if f in drafts]
        needs = list(dict.fromkeys(n for d in called for n in d.needs))
        if not needs:
            continue
        form = ops.call_form_of(model, node)
        scope = f"{name}/inputs"
        passed = tuple(draft.place(n, scope) for n in needs)
        attrs: dict[str, Any] = {}
        if form.types is not None:
            attrs[form.types] = protos.more_dtypes(op_defs.attribute(node, form.types), [n.dtype for n in needs])
        if form.carried:
            _carry(called[-1], needs)
            shapes = op_defs.attribute(node, "output_shapes")
            if shapes.list.shape:
                attrs["output_shapes"] = protos.more_shapes(shapes, [n.shape for n in needs])
            attrs["_output_shapes"] = None
        draft.set_node(replace(node.with_attrs(**attrs), inputs=(*node.inputs, *passed)))


def _carry(body: Draft, needs: list[Need]) -> None:
    """A loop's body returns what it was given."""
    for need in needs:
        argument = body.need(need)
        if all(r.value != Value(argument) for r in body.results):
            body.add_result(argument, Value(argument), need.dtype)


def _capture(entry: Entry, draft: Draft) -> Entry:
    added = tuple(need.variable.key for need in draft.needs if isinstance(need, Handle))
    return replace(entry, captures=(*entry.captures, *added))
