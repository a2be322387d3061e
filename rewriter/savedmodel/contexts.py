"""What ``tf.gradients`` needs to know of copied loops and conditionals in TensorFlow 1's format.

Source: ``tensorflow/core/protobuf/control_flow.proto``. A context names the tensors of one loop or branch; it
is held in the collections ``while_context`` and ``cond_context``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from google.protobuf.message import DecodeError
from tensorflow.core.protobuf import control_flow_pb2

from rewriter import op_defs, protos
from rewriter.frames import ENTERS
from rewriter.ir import Error, Graph, Node

KINDS = {"while_context": control_flow_pb2.WhileContextDef, "cond_context": control_flow_pb2.CondContextDef}


def copy(meta: Any, prefix: str, nodes: Collection[str]) -> None:
    """Add contexts for the copies `prefix`/name of nodes: of every loop or branch that was copied.

    One that lies in a branch which the copy does not choose any longer stands on its own there.
    """

    def moved(text: str) -> str:
        name, colon, port = text.partition(":")
        return f"{prefix}/{name}{colon}{port}" if name in nodes else text

    waiting = [(c, context) for c in KINDS for context in _contexts(meta, c)]
    while waiting:
        collection, context = waiting.pop(0)
        if context.pivot_name.partition(":")[0] not in nodes:
            continue
        if collection == "while_context" or _switched(context, nodes):
            _rename(context, prefix, moved)
            values = meta.collection_def[collection].bytes_list.value
            values.append(context.SerializeToString(deterministic=True))
        else:
            waiting += [_nested(inner) for inner in context.nested_contexts]


def _contexts(meta: Any, collection: str) -> list[Any]:
    if collection not in meta.collection_def:
        return []
    try:
        found = [KINDS[collection].FromString(data) for data in meta.collection_def[collection].bytes_list.value]
    except DecodeError:
        found = [None]
    if not all(map(_whole, found)):
        raise Error(f"the collection {collection!r} holds something other than loops and conditionals")
    return found


def _whole(context: Any) -> bool:
    """Whether it is a context, and all that are nested in it are, too."""
    return context is not None and all(
        nested.WhichOneof("ctxt") and _whole(getattr(nested, nested.WhichOneof("ctxt")))
        for nested in context.nested_contexts
    )


def _nested(inner: Any) -> tuple[str, Any]:
    return ("while_context", inner.while_ctxt) if inner.HasField("while_ctxt") else ("cond_context", inner.cond_ctxt)


def complete(meta: Any, graph: Graph, outputs: Callable[[Node], int]) -> None:
    """Let contexts know the nodes of their loops and branches that were added, and forget those that were removed.

    `outputs` counts those of a node.

    A new node belongs where the innermost of its inputs does; an Enter belongs to the loop that it enters.
    """
    found: dict[str, list[Any]] = {collection: [] for collection in KINDS}
    before = [(collection, context) for collection in KINDS for context in _contexts(meta, collection)]
    for collection, context in (standing for each in before for standing in _standing(*each, graph)):
        _forget(context, graph)
        found[collection].append(context)
    held: dict[str, tuple[int, Any]] = {}
    loops: dict[str, tuple[int, Any]] = {}
    for collection, contexts in found.items():
        for context in contexts:
            _index(collection, context, 1, held, loops)
    for node in _in_order(graph, held) if held else ():
        place = (
            loops.get(protos.text(op_defs.attribute(node, "frame_name").s))
            if node.op in ENTERS
            else _innermost(node, held)
        )
        if place is not None:
            _add(place[1], node, outputs(node))
            held[node.name] = place
    for collection, contexts in found.items():
        if collection in meta.collection_def:
            values = meta.collection_def[collection].bytes_list.value
            values[:] = [context.SerializeToString(deterministic=True) for context in contexts]


def _standing(collection: str, context: Any, graph: Graph) -> Iterator[tuple[str, Any]]:
    """A context; in place of a conditional that was removed, those that are nested in it."""
    named = (context.pivot_name, context.pred_name) if collection == "cond_context" else ()
    if all(name.partition(":")[0] in graph.nodes for name in named):
        yield collection, context
    else:
        for inner in context.nested_contexts:
            yield from _standing(*_nested(inner), graph)


def _forget(context: Any, graph: Graph) -> None:
    held = context.values_def
    held.values[:] = [text for text in held.values if text.partition(":")[0] in graph.nodes]
    for outer, inner in list(held.external_values.items()):
        if not {outer.partition(":")[0], inner.partition(":")[0]} <= graph.nodes.keys():
            del held.external_values[outer]
    for nested in context.nested_contexts:
        _forget(_nested(nested)[1], graph)


def _index(
    collection: str, context: Any, depth: int, held: dict[str, tuple[int, Any]], loops: dict[str, tuple[int, Any]]
) -> None:
    """Where each node of a context, or of one nested in it, belongs: the depth and the context."""
    outer = {text.partition(":")[0] for text in context.values_def.external_values}
    outer |= {text.partition(":")[0] for text in getattr(context, "loop_exit_names", ())}
    for text in context.values_def.values:
        name = text.partition(":")[0]
        if name not in outer and held.get(name, (0,))[0] < depth:
            held[name] = (depth, context)
    if collection == "while_context":
        loops[context.context_name] = (depth, context)
    for inner in context.nested_contexts:
        kind, nested = _nested(inner)
        _index(kind, nested, depth + 1, held, loops)


def _in_order(graph: Graph, held: Mapping[str, Any]) -> list[Node]:
    """The nodes that no context knows, each after its inputs, but for the ways back of loops."""
    done: dict[str, None] = {}
    for start in graph.nodes:
        stack = [(start, False)]
        while stack:
            name, inputs_done = stack.pop()
            if inputs_done:
                done[name] = None
            elif name not in done and name not in held:
                stack.append((name, True))
                node = graph.nodes[name]
                if node.op != "NextIteration":
                    stack += [(v.node, False) for v in node.inputs]
    return [graph.nodes[name] for name in done]


def _innermost(node: Node, held: Mapping[str, tuple[int, Any]]) -> tuple[int, Any] | None:
    if node.op in ("Exit", "RefExit", "Merge", "RefMerge"):
        return None  # what leaves a loop or a branch is not in it
    sources = (*(v.node for v in node.inputs), *node.after)
    return max((held[s] for s in sources if s in held), key=lambda place: place[0], default=None)


def _add(context: Any, node: Node, count: int) -> None:
    held = context.values_def
    held.values.extend(f"{node.name}:{port}" for port in range(count))
    if node.op in ENTERS:
        outer = f"{node.inputs[0].node}:{node.inputs[0].port}"
        held.values.append(outer)
        held.external_values[outer] = f"{node.name}:0"


def _switched(context: Any, nodes: Collection[str]) -> bool:
    """Whether the copy of a conditional still chooses: its own Switch, before the pivot, was copied."""
    return context.pred_name.partition(":")[0] in nodes and f"{context.context_name.rpartition('/')[0]}/Switch" in nodes


def _rename(context: Any, prefix: str, moved: Callable[[str], str]) -> None:
    context.context_name = f"{prefix}/{context.context_name}"
    for field in ("pivot_name", "pivot_for_pred_name", "pivot_for_body_name", "maximum_iterations_name", "pred_name"):
        if getattr(context, field, ""):
            setattr(context, field, moved(getattr(context, field)))
    for field in ("loop_exit_names", "loop_enter_names"):
        names = getattr(context, field, None)
        if names is not None:
            names[:] = [moved(n) for n in names]
    held = context.values_def
    held.values[:] = [moved(n) for n in held.values]
    external = {moved(k): moved(v) for k, v in held.external_values.items()}
    held.external_values.clear()
    for key, value in external.items():
        held.external_values[key] = value
    for nested in getattr(context, "nested_contexts", ()):
        inner = getattr(nested, nested.WhichOneof("ctxt"))
        _rename(inner, prefix, moved)
