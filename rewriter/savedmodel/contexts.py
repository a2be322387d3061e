"""What ``tf.gradients`` needs to know of copied loops and conditionals in TensorFlow 1's format.

Source: ``tensorflow/core/protobuf/control_flow.proto``. A context names the tensors of one loop or branch; it
is held in the collections ``while_context`` and ``cond_context``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from tensorflow.core.protobuf import control_flow_pb2

from rewriter.frames import ENTERS, frames
from rewriter.ir import Graph, Node

KINDS = {"while_context": control_flow_pb2.WhileContextDef, "cond_context": control_flow_pb2.CondContextDef}


def copy(meta: Any, prefix: str, nodes: Collection[str]) -> None:
    """Add contexts for the copies `prefix`/name of nodes: of every loop or branch that was copied."""

    def moved(text: str) -> str:
        name, colon, port = text.partition(":")
        return f"{prefix}/{name}{colon}{port}" if name in nodes else text

    for collection, kind in KINDS.items():
        if collection in meta.collection_def:
            values = meta.collection_def[collection].bytes_list.value
            found = [kind.FromString(data) for data in values]
            whole = [context for context in found if context.pivot_name.partition(":")[0] in nodes]
            for context in whole:
                if collection == "while_context" or _switched(context, nodes):
                    _rename(context, prefix, moved)
                    values.append(context.SerializeToString(deterministic=True))


def complete(meta: Any, graph: Graph, outputs: Callable[[Node], int]) -> None:
    """Let loops' contexts know the nodes that were added to them; `outputs` counts those of a node."""
    collection = meta.collection_def.get("while_context")
    if collection is None:
        return
    inside: dict[str, list[Node]] = {}
    for name, frame in frames(graph).items():
        inside.setdefault(frame[-1], []).append(graph.nodes[name])
    values = collection.bytes_list.value
    for index, data in enumerate(list(values)):
        context = control_flow_pb2.WhileContextDef.FromString(data)
        held = context.values_def
        known = {text.partition(":")[0] for text in held.values} - set(_outer(held))
        for node in sorted(inside.get(context.context_name, ()), key=lambda n: n.name):
            if node.name not in known:
                held.values.extend(f"{node.name}:{port}" for port in range(outputs(node)))
                if node.op in ENTERS:
                    outer = f"{node.inputs[0].node}:{node.inputs[0].port}"
                    held.values.append(outer)
                    held.external_values[outer] = f"{node.name}:0"
        values[index] = context.SerializeToString(deterministic=True)


def _outer(held: Any) -> list[str]:
    return [text.partition(":")[0] for text in held.external_values]


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
