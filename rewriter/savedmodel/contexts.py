"""Control flow contexts: the loops and conditionals of TensorFlow 1, as ``tf.gradients`` needs them.

Source: ``tensorflow/core/protobuf/control_flow.proto``. A context names the tensors of one loop or branch. The
collections ``while_context`` and ``cond_context`` hold the contexts.
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
    """Add a context for every loop and branch among the copied nodes; a copy is named `prefix`/name.

    If the copy has no Switch for a conditional any more, the contexts nested in that conditional become top-level.
    """

    def renamed(text: str) -> str:
        name, colon, port = text.partition(":")
        return f"{prefix}/{name}{colon}{port}" if name in nodes else text

    waiting = [(c, context) for c in KINDS for context in _contexts(meta, c)]
    while waiting:
        collection, context = waiting.pop(0)
        # Each loop and each branch has a pivot; one whose pivot was not copied was not copied itself.
        if context.pivot_name.partition(":")[0] not in nodes:
            continue
        if collection == "while_context" or _still_chooses(context, nodes):
            _rename(context, prefix, renamed)
            values = meta.collection_def[collection].bytes_list.value
            values.append(context.SerializeToString(deterministic=True))
        else:
            waiting += [_kind_and_context(inner) for inner in context.nested_contexts]


def _contexts(meta: Any, collection: str) -> list[Any]:
    if collection not in meta.collection_def:
        return []
    try:
        contexts = [KINDS[collection].FromString(data) for data in meta.collection_def[collection].bytes_list.value]
    except DecodeError:
        contexts = [None]
    if not all(map(_is_valid, contexts)):
        raise Error(f"the collection {collection!r} holds something other than loops and conditionals")
    return contexts


def _is_valid(context: Any) -> bool:
    """Return true if this is a context, and so is everything nested in it."""
    return context is not None and all(
        nested.WhichOneof("ctxt") and _is_valid(getattr(nested, nested.WhichOneof("ctxt")))
        for nested in context.nested_contexts
    )


def _kind_and_context(inner: Any) -> tuple[str, Any]:
    return ("while_context", inner.while_ctxt) if inner.HasField("while_ctxt") else ("cond_context", inner.cond_ctxt)


def complete(meta: Any, graph: Graph, outputs: Callable[[Node], int]) -> None:
    """Add new nodes to the contexts of their loops and branches, and take removed nodes out.

    A new node belongs to the innermost context of its inputs. An Enter belongs to the loop that it enters.

    Args:
        meta: the meta graph whose collections hold the contexts.
        graph: the main graph with its new nodes.
        outputs: returns the number of a node's outputs.
    """
    by_collection: dict[str, list[Any]] = {collection: [] for collection in KINDS}
    source_contexts = [(collection, context) for collection in KINDS for context in _contexts(meta, collection)]
    for collection, context in (remaining for pair in source_contexts for remaining in _remaining(*pair, graph)):
        _drop_removed(context, graph)
        by_collection[collection].append(context)
    places: dict[str, tuple[int, Any]] = {}
    loops: dict[str, tuple[int, Any]] = {}
    for collection, contexts in by_collection.items():
        for context in contexts:
            _index(collection, context, 1, places, loops)
    for node in _in_order(graph, places) if places else ():
        place = (
            loops.get(protos.text(op_defs.attribute(node, "frame_name").s))
            if node.op in ENTERS
            else _innermost(node, places)
        )
        if place is not None:
            _add(place[1], node, outputs(node))
            places[node.name] = place
    for collection, contexts in by_collection.items():
        if collection in meta.collection_def:
            values = meta.collection_def[collection].bytes_list.value
            values[:] = [context.SerializeToString(deterministic=True) for context in contexts]


def _remaining(collection: str, context: Any, graph: Graph) -> Iterator[tuple[str, Any]]:
    """Yield a context, or, if its conditional was removed, the contexts that are nested in it."""
    named = (context.pivot_name, context.pred_name) if collection == "cond_context" else ()
    if all(name.partition(":")[0] in graph.nodes for name in named):
        yield collection, context
    else:
        for inner in context.nested_contexts:
            yield from _remaining(*_kind_and_context(inner), graph)


def _drop_removed(context: Any, graph: Graph) -> None:
    values_def = context.values_def
    values_def.values[:] = [text for text in values_def.values if text.partition(":")[0] in graph.nodes]
    for outer, inner in list(values_def.external_values.items()):
        if not {outer.partition(":")[0], inner.partition(":")[0]} <= graph.nodes.keys():
            del values_def.external_values[outer]
    for nested in context.nested_contexts:
        _drop_removed(_kind_and_context(nested)[1], graph)


def _index(
    collection: str, context: Any, depth: int, places: dict[str, tuple[int, Any]], loops: dict[str, tuple[int, Any]]
) -> None:
    """Record the innermost context of each node, with its depth, and the context of each loop's frame name."""
    # A context lists these among its values, too, though they lie outside of it.
    outer = {text.partition(":")[0] for text in context.values_def.external_values}
    outer |= {text.partition(":")[0] for text in getattr(context, "loop_exit_names", ())}
    for text in context.values_def.values:
        name = text.partition(":")[0]
        if name not in outer and places.get(name, (0,))[0] < depth:
            places[name] = (depth, context)
    if collection == "while_context":
        loops[context.context_name] = (depth, context)
    for inner in context.nested_contexts:
        kind, nested = _kind_and_context(inner)
        _index(kind, nested, depth + 1, places, loops)


def _in_order(graph: Graph, places: Mapping[str, Any]) -> list[Node]:
    """Return the nodes in no context, each after its inputs; the back edges of loops (NextIteration) don't count."""
    ordered: dict[str, None] = {}
    for start in graph.nodes:
        stack = [(start, False)]
        while stack:
            name, inputs_done = stack.pop()
            if inputs_done:
                ordered[name] = None
            elif name not in ordered and name not in places:
                stack.append((name, True))
                node = graph.nodes[name]
                if node.op != "NextIteration":
                    stack += [(v.node, False) for v in node.inputs]
    return [graph.nodes[name] for name in ordered]


def _innermost(node: Node, places: Mapping[str, tuple[int, Any]]) -> tuple[int, Any] | None:
    if node.op in ("Exit", "RefExit", "Merge", "RefMerge"):
        return None  # the op that leaves a loop or branch belongs outside of it
    sources = (*(v.node for v in node.inputs), *node.after)
    return max((places[s] for s in sources if s in places), key=lambda place: place[0], default=None)


def _add(context: Any, node: Node, count: int) -> None:
    values_def = context.values_def
    values_def.values.extend(f"{node.name}:{port}" for port in range(count))
    if node.op in ENTERS:
        # As tf.while_loop does it: the tensor from outside is listed too, and maps to its name inside the loop.
        outer = f"{node.inputs[0].node}:{node.inputs[0].port}"
        values_def.values.append(outer)
        values_def.external_values[outer] = f"{node.name}:0"


def _still_chooses(context: Any, nodes: Collection[str]) -> bool:
    """Return true if the copied conditional still chooses: its predicate and its Switch were copied."""
    # ``tf.compat.v1.cond`` makes its Switch in the name scope in which it names its contexts.
    return context.pred_name.partition(":")[0] in nodes and f"{context.context_name.rpartition('/')[0]}/Switch" in nodes


def _rename(context: Any, prefix: str, renamed: Callable[[str], str]) -> None:
    context.context_name = f"{prefix}/{context.context_name}"
    for field in ("pivot_name", "pivot_for_pred_name", "pivot_for_body_name", "maximum_iterations_name", "pred_name"):
        if getattr(context, field, ""):
            setattr(context, field, renamed(getattr(context, field)))
    for field in ("loop_exit_names", "loop_enter_names"):
        names = getattr(context, field, None)
        if names is not None:
            names[:] = [renamed(n) for n in names]
    values_def = context.values_def
    values_def.values[:] = [renamed(n) for n in values_def.values]
    external = {renamed(k): renamed(v) for k, v in values_def.external_values.items()}
    values_def.external_values.clear()
    for key, value in external.items():
        values_def.external_values[key] = value
    for nested in getattr(context, "nested_contexts", ()):
        inner = getattr(nested, nested.WhichOneof("ctxt"))
        _rename(inner, prefix, renamed)
