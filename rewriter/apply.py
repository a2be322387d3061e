"""The application of edits to a model.

This module places expressions and mints names. It brings the variables and per-call values that expressions need to
every graph and every caller.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from rewriter.dataflow import captures
from rewriter.draft import Draft, define
from rewriter.edit import (
    AddResult,
    AddSignature,
    AddVariable,
    Assign,
    Clone,
    Define,
    Dispatch,
    Duplicate,
    Edit,
    Expose,
    Import,
    Inline,
    Keep,
    MainSignature,
    Note,
    Refetch,
    Reorder,
    Replace,
    Rewire,
    Run,
    RunAfter,
    SetAttr,
    Skip,
    Sweep,
    Synchronize,
)
from rewriter.frames import ENTERS
from rewriter.ir import (
    MAIN,
    Attrs,
    Edge,
    Effect,
    Endpoint,
    Error,
    Graph,
    Model,
    Node,
    Signature,
    Spec,
    Value,
    Variable,
    unused,
)
from rewriter.lift import lift, make_stateful
from rewriter.op_defs import argument_dtype, attribute
from rewriter.ops import call_form_of
from rewriter.protos import Dtype, Func, attr, dtype_attr, shapes_attr, text, with_functions
from rewriter.prune import keep
from rewriter.shapes import shape_of
from rewriter.sweep import sweep


def apply(model: Model, edits: Iterable[Edit]) -> Model:
    """Return the model with all edits of a batch applied.

    Each edit refers to the graphs as they were before the batch, or to clones that the batch adds. Graphs that no edit
    concerns are the same objects in the result.

    Raises:
        Error: an edit refers to something that does not exist, or a function needs a value but cannot be given another
            argument.
    """
    batch = list(edits)
    if all(isinstance(e, Skip | Note) for e in batch):
        return model
    # Variables, functions, clones and copies come first: the other edits of the batch may refer to them.
    model = _add_variables(model, [e.variable for e in batch if isinstance(e, AddVariable)])
    model = _assign(model, [e for e in batch if isinstance(e, Assign)])
    model = _synchronize(model, [e for e in batch if isinstance(e, Synchronize)])
    model = _add_functions(model, [e for e in batch if isinstance(e, Define | Import)])
    model = _add_clones(model, [e for e in batch if isinstance(e, Clone)])
    model = _duplicate(model, [e for e in batch if isinstance(e, Duplicate)])
    model, rewires = _dispatch(model, [e for e in batch if isinstance(e, Dispatch)])
    batch += rewires
    # Before the drafts: a draft asks the model whether calls enter at its graph, and which variables it captures.
    model = _expose(model, batch)
    drafts = _Drafts(model)
    added_signatures = dict(model.main_signatures)
    new_fetches: dict[tuple[str, int], Value] = {}
    for edit in batch:
        match edit:
            case Rewire(edge, value, scope):
                drafts[edge.graph].rewire(edge, value, scope)
            case Run(graph, value, scope, last):
                drafts[graph].run(value, scope, last)
            case RunAfter(graph, node, others, scope):
                drafts[graph].run_after(node, others, scope or node)
            case Replace(graph, node, value):
                drafts[graph].replace(node, value)
            case AddResult(graph, name, value, scope):
                drafts[graph].add_result(name, drafts[graph].place(value, scope), value.dtype)
            case Inline(graph, node, callee):
                drafts[graph].inline(
                    node, model.graphs[callee], call_form_of(model, model.graphs[graph].nodes[node]).first
                )
            case SetAttr(graph, node, name, proto):
                drafts[graph].set_attr(node, name, proto)
            case AddSignature(name, MainSignature() as value):
                added_signatures[name] = _main_signature(model, drafts[MAIN], name, value)
            case Refetch(name, position, value, scope):
                new_fetches[name, position] = drafts[MAIN].place(value, scope)
            case _:
                pass
    _reorder(drafts, [e for e in batch if isinstance(e, Reorder)])
    # Before `lift`, which finishes the drafts that this changes.
    make_stateful(model, drafts)
    inlined = drafts[MAIN].inlined if MAIN in drafts else {}
    signatures = {n: _refetched(s, new_fetches, inlined) for n, s in model.signatures.items()}
    main_signatures = {n: _refetched(s, {}, inlined) for n, s in added_signatures.items()}
    lifted = replace(lift(model, drafts), signatures=signatures, main_signatures=main_signatures)
    # Last: only the finished graphs tell what is still used.
    swept = sweep(lifted, [e for e in batch if isinstance(e, Sweep)])
    kept_functions = [e.functions for e in batch if isinstance(e, Keep)]
    return keep(swept, frozenset().union(*kept_functions)) if kept_functions else swept


def _refetched(
    signature: Signature, new_fetches: Mapping[tuple[str, int], Value], inlined: Mapping[Value, Value]
) -> Signature:
    """Return a signature with new fetches, by signature name and position, and with outputs of inlined calls moved."""
    values = [new_fetches.get((signature.name, i), v) for i, v in enumerate(signature.fetches)]
    return replace(signature, fetches=tuple(inlined.get(v, v) for v in values))


def _main_signature(model: Model, main: Draft, name: str, value: MainSignature) -> Signature:
    """Return the signature that a `MainSignature` describes, after placing its fetches in the main graph."""
    like = model.signatures[value.like]
    outputs = (*like.outputs, *(spec.name for spec in value.added))
    fetches = tuple(main.place(e, f"{value.scope}/{n}") for e, n in zip(value.fetches, outputs, strict=True))
    input_count = len(like.inputs)
    specs = (*like.specs[:input_count], *(spec for spec, _ in value.feeds), *like.specs[input_count:], *value.added)
    inputs = (*like.inputs, *(spec.name for spec, _ in value.feeds))
    feeds = (*like.feeds, *(placeholder for _, placeholder in value.feeds))
    return Signature(name, "", inputs, outputs, feeds, fetches, specs, like.name)


class _Drafts(dict[str, Draft]):
    """Drafts by graph name; a draft is opened on first access."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def __missing__(self, name: str) -> Draft:
        if name not in self.model.graphs:
            raise Error(f"there is no graph {name!r} to edit")
        graph = self.model.graphs[name]
        entry = self.model.entries.get(name)
        bound = {}
        if entry is not None:  # variables that the function captures already need no further argument
            captured = zip(entry.captures, graph.arguments[len(entry.inputs) :], strict=True)
            bound = {self.model.variables[c]: argument for c, argument in captured if isinstance(c, str)}
        draft = Draft(graph, name == MAIN or entry is not None, bound)
        self[name] = draft
        return draft


def _reorder(drafts: _Drafts, edits: list[Reorder]) -> None:
    """Reorder results, once all results of the batch are added."""
    for edit in edits:
        drafts[edit.graph].reorder(edit.order)


def _add_variables(model: Model, variables: list[Variable]) -> Model:
    for variable in variables:
        if variable.key in model.variables:
            raise Error(f"the model has a variable {variable.key} already")
    paths = {v.path: v for v in variables}
    return replace(
        model,
        variables={**model.variables, **{v.key: v for v in variables}},
        attributes={**model.attributes, **paths},
    )


def _assign(model: Model, edits: list[Assign]) -> Model:
    """Return the model with new values for some variables.

    Raises:
        Error: a value does not have the variable's dtype and shape.
    """
    for edit in edits:
        variable = model.variables[edit.variable]
        shape = variable.shape if variable.shape is not None else edit.value.shape
        fits = len(shape) == edit.value.ndim and all(a in (b, -1) for a, b in zip(shape, edit.value.shape, strict=True))
        if edit.value.dtype.name != variable.dtype or not fits:
            raise Error(f"{variable.name} cannot hold a {edit.value.dtype.name} of shape {edit.value.shape}")
    return replace(model, assigned={**model.assigned, **{e.variable: e.value for e in edits}}) if edits else model


def _synchronize(model: Model, edits: list[Synchronize]) -> Model:
    variables = dict(model.variables)
    for edit in edits:
        if edit.key not in variables:
            raise Error(f"there is no variable {edit.key} to synchronise")
        variables[edit.key] = replace(
            variables[edit.key], synchronization=edit.synchronization, aggregation=edit.aggregation
        )
    # New variables are written from `attributes`, so these hold the changed ones as well.
    attributes = {p: variables[v.key] if isinstance(v, Variable) else v for p, v in model.attributes.items()}
    return replace(model, variables=variables, attributes=attributes) if edits else model


def _add_functions(model: Model, edits: Iterable[Define | Import]) -> Model:
    graphs, gradients = dict(model.graphs), dict(model.gradients)
    for edit in edits:
        for graph in edit.graphs if isinstance(edit, Import) else (define(edit.function),):
            if graph.name in graphs:
                raise Error(f"the model has a function {graph.name} already")
            graphs[graph.name] = graph
        gradients |= edit.gradients if isinstance(edit, Import) else {}
    return replace(model, graphs=graphs, gradients=gradients)


def _add_clones(model: Model, clones: list[Clone]) -> Model:
    if not clones:
        return model
    graphs = dict(model.graphs)
    for clone in clones:
        if clone.name in graphs:
            raise Error(f"the model has a function {clone.name} already")
        source = model.graphs[clone.graph]
        nodes = source.nodes
        if clone.callees:
            # A direct call has the function's name as its op; other calls name it in an attribute.
            nodes = {
                n.name: replace(
                    n,
                    op=clone.callees.get(n.op, n.op),
                    attrs={k: with_functions(v, clone.callees) for k, v in n.attrs.items()},
                )
                for n in source.nodes.values()
            }
        arguments = source.arguments
        graphs[clone.name] = replace(
            source,
            name=clone.name,
            nodes=nodes,
            arguments=(*(arguments[i] for i in clone.inputs), *arguments[len(clone.inputs) :]),
            results=tuple(source.results[i] for i in clone.outputs) or source.results,
            attrs=_reordered_attrs(source.attrs, clone.inputs),
        )
    return replace(model, graphs=graphs)


def _duplicate(model: Model, edits: list[Duplicate]) -> Model:
    graphs = dict(model.graphs)
    for edit in edits:
        graph = graphs[edit.graph]
        names = {name: f"{edit.prefix}/{name}" for name in edit.nodes}

        def copy_of(value: Value, edit: Duplicate = edit, names: Mapping[str, str] = names) -> Value:
            # The value that is used instead may itself be replaced.
            while value in edit.instead:
                value = edit.instead[value]
            return Value(names.get(value.node, value.node), value.port)

        new_nodes = {}
        for name, new in names.items():
            if new in graph.nodes:
                raise Error(f"there is a node {new} already")
            node = graph.nodes[name]
            if node.op in ENTERS:
                # Two loops of one frame's name would run as one.
                frame = text(attribute(node, "frame_name").s)
                node = node.with_attrs(frame_name=attr(f"{edit.prefix}/{frame}"))
            after = tuple(dict.fromkeys(copy_of(Value(a)).node for a in node.after))
            new_nodes[new] = replace(node, name=new, inputs=tuple(copy_of(v) for v in node.inputs), after=after)
        graphs[edit.graph] = replace(graph, nodes={**graph.nodes, **new_nodes})
    # The writer gives copied loops and conditionals control flow contexts of their own (`v1.extend`).
    copies = tuple((edit.prefix, edit.nodes) for edit in edits if edit.graph == MAIN)
    return replace(model, graphs=graphs, copies=(*model.copies, *copies))


def _dispatch(model: Model, edits: list[Dispatch]) -> tuple[Model, list[Rewire]]:
    """Return the model with functions that call one of two others, and the edits that wire their conditions."""
    graphs = dict(model.graphs)
    rewires = []
    for edit in edits:
        graph = graphs[edit.graph]
        branches = [_branch(model, graphs[callee]) for callee in (edit.then, edit.otherwise)]
        graphs |= {branch.name: branch for branch in branches}
        name = unused("mode", graph.arguments)
        attrs = {
            "Tcond": dtype_attr("bool"),
            "then_branch": attr(Func(branches[0].name)),
            "else_branch": attr(Func(branches[1].name)),
            "_lower_using_switch_merge": attr(value=True),  # as tf.cond sets it; else the branches are not optimised
            "output_shapes": shapes_attr([shape_of(model, graph, result.value) for result in graph.results]),
        }
        # The first argument only fills the condition's place, until the edit below wires the condition.
        conditional = Node(name, "If" if graph.stateful else "StatelessIf", (Value(graph.arguments[0]),), attrs=attrs)
        rewires.append(Rewire(Edge(graph.name, name, 0), edit.condition, name))
        graphs[graph.name] = _wrapper(graph, conditional)
    return (replace(model, graphs=graphs) if edits else model), rewires


def _branch(model: Model, graph: Graph) -> Graph:
    """Return the function that a conditional uses as its branch for a graph: the graph itself, or a wrapper.

    To differentiate a branch, TensorFlow builds its graph anew. Gradients of ops that capture tensors still refer to
    the tensors of the loaded graph, and an assertion fails. TensorFlow differentiates a function that a branch calls
    as it was loaded, so a wrapper avoids this.
    """
    if not captures(model, graph):
        return graph
    call = "StatefulPartitionedCall" if graph.stateful else "PartitionedCall"
    node = Node(unused("call", graph.arguments), call, attrs={"f": attr(Func(graph.name))})
    return replace(_wrapper(graph, node), name=unused(f"{graph.name}_branch", model.graphs))


def _wrapper(graph: Graph, node: Node) -> Graph:
    """Return a function that only runs one node, with the arguments, results and name of a graph."""
    arguments = {name: graph.nodes[name] for name in graph.arguments}
    types = {
        "Tin": attr([Dtype(argument_dtype(argument)) for argument in arguments.values()]),
        "Tout": attr([Dtype(result.dtype) for result in graph.results]),
    }
    inputs = (*node.inputs, *(Value(argument) for argument in arguments))
    node = replace(node, inputs=inputs, attrs={**types, **node.attrs})
    results = tuple(result._replace(value=Value(node.name, port)) for port, result in enumerate(graph.results))
    effects = (Effect(node.name, node.name),) if graph.stateful else ()
    return replace(graph, nodes={**arguments, node.name: node}, results=results, effects=effects)


def _reordered_attrs(attrs: Attrs, inputs: tuple[int, ...]) -> Attrs:
    """Return a function's attributes with the shapes of its arguments in a new order."""
    if "_input_shapes" not in attrs or inputs == tuple(range(len(inputs))):
        return attrs
    old = attrs["_input_shapes"]
    shapes = type(old)()
    shapes.list.shape.extend([*(old.list.shape[i] for i in inputs), *old.list.shape[len(inputs) :]])
    return {**attrs, "_input_shapes": shapes}


def _renamed_specs(names: Sequence[str], specs: Sequence[Spec]) -> tuple[Spec, ...]:
    """Return specs under new names, sorted by name, as signatures have them."""
    return tuple(sorted(spec._replace(name=name) for name, spec in zip(names, specs, strict=True)))


def _expose(model: Model, batch: list[Edit]) -> Model:
    """Return the model with the root attributes and function signatures that a batch adds."""
    exposed = {e.path: e.value for e in batch if isinstance(e, Expose)}
    signatures = {e.name: e.value for e in batch if isinstance(e, AddSignature) and isinstance(e.value, Endpoint)}
    if not exposed and not signatures:
        return model
    entries = dict(model.entries)
    for value in (*exposed.values(), *signatures.values()):
        if isinstance(value, Endpoint):
            like, bound = model.entries[value.like], model.entries[value.bound]
            entries[value.function] = replace(like, function=value.function, captures=bound.captures, paths=())
            if value.returns:
                keys = tuple(spec.name for spec in value.returns)
                entries[value.function] = replace(entries[value.function], outputs=value.returns, keys=keys)
            if value.inputs:
                entry = entries[value.function]
                inputs = _renamed_specs(value.inputs, entry.inputs)
                outputs = _renamed_specs(value.outputs, entry.outputs)
                entries[value.function] = replace(entry, inputs=inputs, outputs=outputs)
    for path, value in exposed.items():
        if isinstance(value, Endpoint):
            entry = entries[value.function]
            entries[value.function] = replace(entry, paths=(*entry.paths, path))
    return replace(
        model,
        entries=entries,
        attributes={**model.attributes, **exposed},
        new_signatures={**model.new_signatures, **signatures},
    )
