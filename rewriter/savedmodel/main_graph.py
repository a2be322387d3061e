"""Additions to the main graph for V1 loaders, ``saved_model_cli`` and serving: new variables and signatures.

The main graph makes every variable's resource, calls one function for each signature, and calls the functions that
save and restore the checkpoint. ``tf.compat.v1.saved_model.load`` cannot load a variable that these two functions miss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from rewriter import constants, op_defs, ops, protos
from rewriter.dataflow import Argument, call_graph, follow
from rewriter.draft import Draft
from rewriter.expr import Apply, Use, array, handle, op, read
from rewriter.ir import MAIN, Endpoint, Error, Graph, Model, Node, Spec, Value, Variable

OBJECT_GRAPH_KEY = "_CHECKPOINTABLE_OBJECT_GRAPH"


class Saver(NamedTuple):
    """The main graph's calls that save and restore, and the functions that they call."""

    save_node: str
    save: str
    restore_node: str
    restore: str


def find_saver(model: Model, saver_def: Any) -> Saver | None:
    """Return the saver of a meta graph; None if it has none.

    Raises:
        Error: the saver does not consist of two function calls, as TensorFlow 2 writes it.
    """
    if not saver_def.save_tensor_name:
        return None
    main = model.graphs[MAIN]
    names = (saver_def.save_tensor_name.partition(":")[0], saver_def.restore_op_name)
    functions = []
    for name in names:
        callees = ops.callees(model, main.nodes[name]) if name in main.nodes else ()
        if len(callees) != 1:
            raise Error(f"the saver's node {name} is not a function call; this is not how TensorFlow 2 saves")
        functions.append(callees[0])
    return Saver(names[0], functions[0], names[1], functions[1])


def _first_node(graph: Graph, op_name: str) -> Node:
    # A sharded saver has one for each shard; any of them can take more tensors.
    nodes = [n for n in graph.nodes.values() if n.op == op_name]
    if not nodes:
        raise Error(f"the saver's function {graph.name} has no {op_name}")
    return nodes[0]


def _restores(restore: Graph) -> bool:
    """Return true if a saver's function restores a variable; else none is left of those that it did."""
    return any(node.op == "RestoreV2" for node in restore.nodes.values())


def strings(graph: Graph, node: Node, position: int = 1) -> list[bytes]:
    """Return the strings of a SaveV2 or RestoreV2, one for each tensor: names at input 1, slices at input 2.

    Raises:
        Error: the input is no constant, or has not one string for each tensor.
    """
    value = node.inputs[position]
    array = constants.constant_of(graph, value)
    if array is None or array.size != len(op_defs.attribute(node, "dtypes").list.type):
        raise Error(f"in {graph.name}: {value.node} is no constant with a string for each tensor of {node.name}")
    return list(array.ravel())


def bound_values(model: Model) -> dict[str | int, Value]:
    """Return the main graph's value of each captured object, as its calls of concrete functions pass it."""
    main = model.graphs[MAIN]
    values: dict[str | int, Value] = {}
    for call in model.analysis(call_graph).calls.get(MAIN, []):
        entry = model.entries.get(call.callee)
        if entry is not None:
            values.update(zip(entry.captures, main.nodes[call.node].inputs[len(entry.inputs) :], strict=False))
    return values


def captured_values(model: Model, saver: Saver | None) -> dict[str | int, Value]:
    """Return the main graph's value of each captured object, as calls of concrete functions or the saver pass it."""
    main = model.graphs[MAIN]
    values = bound_values(model)
    if saver is not None:
        restore_inputs = main.nodes[saver.restore_node].inputs
        values.update(
            (key, restore_inputs[position]) for key, position in restored(model, model.graphs[saver.restore]).items()
        )
    return values


def restored(model: Model, restore: Graph) -> dict[str, int]:
    """Return the position of the argument that each tensor of the checkpoint is assigned to; plain variables only.

    Args:
        model: the model.
        restore: its function that restores.
    """
    if not _restores(restore):
        return {}
    node = _first_node(restore, "RestoreV2")
    keys = strings(restore, node)
    positions = {}
    for assign in restore.nodes.values():
        if assign.op == "AssignVariableOp":
            resource = follow(model, restore, assign.inputs[0])
            port = _restored_port(restore, assign.inputs[1], node.name)
            if isinstance(resource, Argument) and port is not None:
                positions[protos.text(keys[port])] = resource.position
    return positions


def saved(model: Model, save: Graph) -> dict[str, int]:
    """Return the position of the argument that each tensor of the checkpoint is read from.

    Args:
        model: the model.
        save: its function that saves.
    """
    positions = {}
    for node in save.nodes.values():
        if node.op == "SaveV2":
            for key, value in zip(strings(save, node), node.inputs[3:], strict=True):
                origin = follow(model, save, value)
                if isinstance(origin, Argument):
                    positions[protos.text(key)] = origin.position
    return positions


def _restored_port(graph: Graph, value: Value, restore: str) -> int | None:
    while graph.nodes[value.node].op == "Identity":
        value = graph.nodes[value.node].inputs[0]
    return value.port if value.node == restore else None


def extend(model: Model, saver_def: Any, added: list[Variable], trackables: bytes) -> tuple[Model, dict[str, Node]]:
    """Add new variables to the saver, and calls of new signatures to the main graph.

    Args:
        model: the model.
        saver_def: its ``SaverDef``.
        added: the new variables.
        trackables: the checkpoint's object graph, serialised.

    Returns:
        The model, and the node that calls each new signature.
    """
    saver = find_saver(model, saver_def)
    values = captured_values(model, saver)
    main = Draft(model.graphs[MAIN], entry=True)
    graphs = dict(model.graphs)
    for variable in added:
        values[variable.key] = main.var_handle(variable)
    if saver is not None and added:
        graphs[saver.save] = _extend_save(model.graphs[saver.save], added)
        graphs[saver.restore] = _extend_restore(model.graphs[saver.restore], added)
        # Both functions got their new arguments in the order of `added`.
        for name in (saver.save_node, saver.restore_node):
            _pass_resources(main, name, [values[v.key] for v in added])
        _replace_object_graph(main, model.graphs[saver.save], saver.save_node, trackables)
    calls = {name: _call(model, main, name, e, values) for name, e in model.new_signatures.items()}
    graphs[MAIN] = main.finish()
    return replace(model, graphs=graphs), calls


def _pass_resources(main: Draft, name: str, values: list[Value]) -> None:
    node = main.nodes[name]
    types = protos.more_dtypes(op_defs.attribute(node, "Tin"), ["resource"] * len(values))
    main.set_node(replace(node.with_attrs(Tin=types), inputs=(*node.inputs, *values)))


def _replace_object_graph(main: Draft, save: Graph, call: str, trackables: bytes) -> None:
    """Replace the object graph that the main graph holds as a constant: a V1 session that saves again writes it."""
    node = _first_node(save, "SaveV2")
    keys = strings(save, node)
    if OBJECT_GRAPH_KEY.encode() not in keys:
        return
    source = save.nodes[node.inputs[3 + keys.index(OBJECT_GRAPH_KEY.encode())].node]
    if source.name in save.arguments:
        value = main.nodes[call].inputs[save.arguments.index(source.name)]
        main.set_attr(value.node, "value", protos.attr(np.array(trackables, dtype=object)))


def _more_strings(draft: Draft, node: Node, position: int, added: list[str]) -> None:
    """Extend a constant list of strings, and drop its shape attribute, which is stale then."""
    old, value = strings(draft.graph, node, position), node.inputs[position]
    array = np.array([*old, *(s.encode() for s in added)], dtype=object)
    draft.set_attr(value.node, "value", protos.attr(array))
    draft.set_attr(value.node, "_output_shapes", None)


def _extend_save(graph: Graph, added: list[Variable]) -> Graph:
    draft = Draft(graph, entry=False)
    node = _first_node(graph, "SaveV2")
    _more_strings(draft, node, 1, [v.key for v in added])
    _more_strings(draft, node, 2, ["" for _ in added])
    reads = [draft.place(read(v), v.name) for v in added]
    node = draft.nodes[node.name]
    attrs = {"dtypes": protos.more_dtypes(op_defs.attribute(node, "dtypes"), [v.dtype for v in added])}
    draft.set_node(replace(node.with_attrs(**attrs), inputs=(*node.inputs, *reads)))
    return draft.finish()


def _restore_nothing(restore: Graph) -> Apply:
    """Return a RestoreV2 that reads no tensor yet, from the file that a saver's function is given."""
    names, slices = (array(np.array([], object)) for _ in range(2))
    return Apply(
        "", "RestoreV2", (Use("string", Value(restore.arguments[0])), names, slices), {"dtypes": protos.attr([])}
    )


def _extend_restore(graph: Graph, added: list[Variable]) -> Graph:
    if not _restores(graph):
        empty = Draft(graph, entry=False)
        empty.place(_restore_nothing(graph), "restore")
        graph = empty.finish()
    draft = Draft(graph, entry=False)
    node = _first_node(graph, "RestoreV2")
    first = len(op_defs.attribute(node, "dtypes").list.type)
    _more_strings(draft, node, 1, [v.key for v in added])
    _more_strings(draft, node, 2, ["" for _ in added])
    attrs = {
        "dtypes": protos.more_dtypes(op_defs.attribute(node, "dtypes"), [v.dtype for v in added]),
        "_output_shapes": None,
    }
    draft.set_node(draft.nodes[node.name].with_attrs(**attrs))
    for index, v in enumerate(added):
        value = Use(v.dtype, Value(node.name, first + index))
        assign = op("AssignVariableOp", handle(v), value)
        draft.run(assign, f"{v.name}/restore", last=False)
        # A V1 session fetches the call's result, so the result waits for the assignment as well.
        for result in graph.results:
            holder = draft.nodes[result.value.node]
            draft.set_node(replace(holder, after=(*holder.after, draft.effects[-1].node)))
    return draft.finish()


def _call(model: Model, main: Draft, name: str, endpoint: Endpoint, values: Mapping[str | int, Value]) -> Node:
    """Add a call of a new signature's function to the main graph, with a placeholder for each input."""
    entry = model.entries[endpoint.function]
    like = Node(f"{name}_call", "StatefulPartitionedCall")
    input_nodes = [_placeholder(spec) for spec in entry.inputs]
    keywords = tuple(spec.name for spec in entry.inputs)
    if not endpoint.inputs:
        signature = model.signature_of(endpoint.like)
        calls = model.analysis(call_graph).calls[MAIN]
        like = next(main.graph.nodes[c.node] for c in calls if c.callee == signature.entry)
        keywords = signature.inputs
        input_nodes = [main.graph.nodes[v.node] for v in like.inputs[: len(keywords)]]
    inputs = []
    for keyword, node in zip(keywords, input_nodes, strict=True):
        placeholder = replace(node, name=main.mint(f"{name}_{keyword}"))
        main.set_node(placeholder)
        inputs.append(Value(placeholder.name))
    for capture in entry.captures:
        if capture not in values:
            raise Error(f"the main graph does not make the object {capture} that {endpoint.function} captures")
        inputs.append(values[capture])
    graph = model.graphs[endpoint.function]
    types = protos.attr([protos.Dtype(op_defs.argument_dtype(graph.nodes[a])) for a in graph.arguments])
    results = protos.attr([protos.Dtype(result.dtype) for result in graph.results])
    attrs = {"Tin": types, "Tout": results, "f": protos.attr(protos.Func(endpoint.function))}
    call = replace(like, name=main.mint(f"{name}_call"), op="StatefulPartitionedCall", inputs=tuple(inputs))
    # The attribute lists inputs of the copied call by number.
    call = call.with_attrs(**attrs, _read_only_resource_inputs=None)
    if endpoint.returns:
        call = call.with_attrs(_output_shapes=None)  # copied from a call with other outputs
    main.set_node(call)
    return call


def _placeholder(spec: Spec) -> Node:
    shape = {} if spec.shape is None else {"shape": protos.shape_attr(spec.shape)}
    return Node(spec.name, "Placeholder", attrs={"dtype": protos.dtype_attr(spec.dtype), **shape})
