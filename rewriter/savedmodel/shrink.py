"""Removal of what a model no longer has from both object graphs, the saver and the signatures.

These objects stay: the root, its functions and signatures that the model still has, the variables and resources that
these capture, and the objects that belong to such a resource, such as the functions that fill a table.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from rewriter import op_defs, protos
from rewriter.dataflow import Argument, follow
from rewriter.ir import MAIN, Graph, Model, Value, unused
from rewriter.prune import following, prune, without_orphans
from rewriter.savedmodel.captured import renumbered
from rewriter.savedmodel.main_graph import OBJECT_GRAPH_KEY, bound_values, find_saver, restored, saved, strings
from rewriter.savedmodel.objects import belongings, functions_of, make_user_object


def shrink_objects(model: Model, objects: Any, trackables: Any) -> Model:
    """Remove the objects that the model does not need from both object graphs.

    Returns:
        The model, with the objects' new numbers.
    """
    numbers = model.source.numbers
    while len(trackables.nodes) < len(objects.nodes):
        trackables.nodes.add()
    for name in set(objects.concrete_functions) - set(model.entries):
        del objects.concrete_functions[name]
    captures = {c for entry in model.entries.values() for c in entry.captures}
    captured = {c for c in captures if isinstance(c, int)} | {n for key, n in numbers.items() if key in captures}
    gradients = [g.signature for g in model.gradients.values() if g.signature is not None]
    captured |= {n for signature in gradients for n in signature.bound_inputs}
    kept_numbers = {0}.union(*(belongings(objects, number) for number in captured))
    holders = {n for n, node in enumerate(objects.nodes) if not model.entries.keys().isdisjoint(functions_of(node))}
    for child in objects.nodes[0].children:
        node = objects.nodes[child.node_id]
        if child.node_id in holders or node.user_object.identifier == "signature_map":
            kept_numbers |= {child.node_id, *(holders & {c.node_id for c in node.children})}
    new_numbers = {old: new for new, old in enumerate(sorted(kept_numbers))}
    for graph in (objects, trackables):
        _keep_nodes(graph, new_numbers)
    for node in objects.nodes:
        if node.WhichOneof("kind") == "function":
            names = [n for n in node.function.concrete_functions if n in model.entries]
            del node.function.concrete_functions[:]
            node.function.concrete_functions.extend(names)
    entries = {
        name: replace(entry, captures=tuple(c if isinstance(c, str) else new_numbers[c] for c in entry.captures))
        for name, entry in model.entries.items()
    }
    return replace(
        model,
        gradients={kind: renumbered(gradient, new_numbers) for kind, gradient in model.gradients.items()},
        entries=entries,
        constants={new_numbers[n]: node for n, node in model.constants.items() if n in new_numbers},
        source=replace(model.source, numbers={key: new_numbers[n] for key, n in numbers.items() if n in new_numbers}),
    )


def _keep_nodes(graph: Any, new_numbers: Mapping[int, int]) -> None:
    nodes = [graph.nodes[old] for old in new_numbers]
    copies = [type(node).FromString(node.SerializeToString(deterministic=True)) for node in nodes]
    del graph.nodes[:]
    for node in copies:
        for name in {"children", "dependencies"} & set(node.DESCRIPTOR.fields_by_name):
            links = [link for link in getattr(node, name) if link.node_id in new_numbers]
            for link in links:
                link.node_id = new_numbers[link.node_id]
            node.ClearField(name)
            getattr(node, name).extend(links)
        node.ClearField("slot_variables")
        for saveable in getattr(node, "saveable_objects", {}).values():  # the checkpoint's objects lack this field
            saveable.save_function = new_numbers[saveable.save_function]
            saveable.restore_function = new_numbers[saveable.restore_function]
        graph.nodes.append(node)


def hold_captured(objects: Any, trackables: Any) -> None:
    """Make the root hold all captured objects in lists; otherwise nothing keeps them alive in a loaded model."""
    captured = sorted({n for f in objects.concrete_functions.values() for n in f.bound_inputs})
    names = {c.local_name for c in objects.nodes[0].children}
    for hint, of_variables in (("variables", True), ("resources", False)):
        members = [n for n in captured if (objects.nodes[n].WhichOneof("kind") == "variable") is of_variables]
        if members:
            make_user_object(objects.nodes.add(), "trackable_list_wrapper")
            trackables.nodes.add()
            name = unused(hint, names)
            for graph in (objects, trackables):
                number = len(graph.nodes) - 1
                graph.nodes[0].children.add(node_id=number, local_name=name)
                for index, member in enumerate(members):
                    graph.nodes[number].children.add(node_id=member, local_name=str(index))


def checkpoint_keys(trackables: Any, stored: Iterable[str]) -> set[str]:
    """Return the keys of the stored tensors that belong to objects in the checkpoint's object graph.

    A table's attribute ``.../table`` is stored in several tensors, ``.../table-keys`` and ``.../table-values``.
    """
    names = {a.checkpoint_key for node in trackables.nodes for a in node.attributes}
    return {key for key in stored if key in names or key.rpartition("-")[0] in names}


def _takes_resource(function: Graph, position: int) -> bool:
    return op_defs.argument_dtype(function.nodes[function.arguments[position]]) == "resource"


def shrink_saver(model: Model, saver_def: Any, keys: Collection[str]) -> Model:
    """Return a model whose saver saves and restores these tensors alone.

    A variable that an export holds twice has two resources in the main graph. The saver must use the resource that
    the main graph passes to concrete functions.
    """
    saver = find_saver(model, saver_def)
    if saver is None:
        return model
    kept_keys = {OBJECT_GRAPH_KEY.encode(), *(key.encode() for key in keys)}
    save = _without_tensors(model, model.graphs[saver.save], kept_keys)
    restore = _without_tensors(model, model.graphs[saver.restore], kept_keys)
    nodes = dict(model.graphs[MAIN].nodes)
    for call, function, positions in (
        (saver.save_node, save, saved(model, save)),
        (saver.restore_node, restore, restored(model, restore)),
    ):
        inputs = list(nodes[call].inputs)
        for key, value in bound_values(model).items():
            # Older versions of TensorFlow read the variables outside of the function that saves them.
            if isinstance(key, str) and key in positions and _takes_resource(function, positions[key]):
                inputs[positions[key]] = value
        nodes[call] = replace(nodes[call], inputs=tuple(inputs))
    main = replace(model.graphs[MAIN], nodes=nodes)
    former_inputs = [
        v.node for call in (saver.save_node, saver.restore_node) for v in model.graphs[MAIN].nodes[call].inputs
    ]
    main = without_orphans(model, main, former_inputs)
    return prune(replace(model, graphs={**model.graphs, MAIN: main, saver.save: save, saver.restore: restore}))


def _without_tensors(model: Model, graph: Graph, kept_keys: Collection[bytes]) -> Graph:
    """Return a function that saves or restores, without all other tensors and the nodes that only these needed."""
    nodes = dict(graph.nodes)
    dropped_values: set[Value] = set()
    ports: dict[Value, Value] = {}
    for node in graph.nodes.values():
        if node.op not in ("SaveV2", "RestoreV2"):
            continue
        names = strings(graph, node)
        kept_positions = [i for i, name in enumerate(names) if name in kept_keys]
        dropped_positions = [i for i, name in enumerate(names) if name not in kept_keys]
        for position in (1, 2):
            old = nodes[node.inputs[position].node]
            texts = strings(graph, node, position)
            text = np.array([texts[i] for i in kept_positions], dtype=object)
            nodes[old.name] = old.with_attrs(value=protos.attr(text), _output_shapes=None)
        dtypes = op_defs.attribute(node, "dtypes")
        kept_dtypes = type(dtypes)()
        kept_dtypes.list.type.extend(dtypes.list.type[i] for i in kept_positions)
        tensors = node.inputs[3:]
        # RestoreV2 takes no tensors.
        inputs = (*node.inputs[:3], *(tensors[i] for i in kept_positions if tensors))
        nodes[node.name] = replace(node.with_attrs(dtypes=kept_dtypes, _output_shapes=None), inputs=inputs)
        if node.op == "SaveV2":
            kept_origins = {follow(model, graph, tensors[i]) for i in kept_positions}
            freed = {follow(model, graph, tensors[i]) for i in dropped_positions} - kept_origins
            dropped_values |= {Value(graph.arguments[o.position]) for o in freed if isinstance(o, Argument)}
        else:
            dropped_values |= {Value(node.name, i) for i in dropped_positions}
            ports |= {Value(node.name, old): Value(node.name, new) for new, old in enumerate(kept_positions)}
    # Nodes that used a tensor which is no longer restored, or an object which is no longer saved.
    dead = following(
        replace(graph, nodes=nodes), {n.name for n in nodes.values() if not dropped_values.isdisjoint(n.inputs)}
    )
    kept_nodes = {}
    for node in nodes.values():
        if node.name not in dead:
            inputs = tuple(ports.get(v, v) for v in node.inputs)
            kept_nodes[node.name] = replace(node, inputs=inputs, after=tuple(a for a in node.after if a not in dead))
    return replace(graph, nodes=kept_nodes, effects=tuple(e for e in graph.effects if e.node not in dead))


def share_by_name(main: Graph) -> Graph:
    """Return the main graph with each variable's ``shared_name`` set to its node's name.

    LiteRT's converter looks for the variable under this name.
    """
    nodes = {
        name: node.with_attrs(shared_name=protos.attr(name)) if node.op == "VarHandleOp" else node
        for name, node in main.nodes.items()
    }
    return replace(main, nodes=nodes)


def shrink_meta(meta: Any, graphs: Mapping[str, Graph], signatures: Collection[str]) -> None:
    """Remove signatures from a meta graph, and all signatures, aliases and assets of nodes or functions that are gone.

    Args:
        meta: the meta graph.
        graphs: the graphs of the model to write.
        signatures: the names of the signatures to remove.
    """
    main = graphs[MAIN]
    for name, signature in list(meta.signature_def.items()):
        tensors = (*signature.inputs.values(), *signature.outputs.values())
        if (
            name in signatures
            or not signature.outputs
            or any(t.name and t.name.partition(":")[0] not in main.nodes for t in tensors)
        ):
            del meta.signature_def[name]
    for name in set(meta.meta_info_def.function_aliases) - set(graphs):
        del meta.meta_info_def.function_aliases[name]
    assets = [a for a in meta.asset_file_def if a.tensor_info.name.partition(":")[0] in main.nodes]
    del meta.asset_file_def[:]
    meta.asset_file_def.extend(assets)
