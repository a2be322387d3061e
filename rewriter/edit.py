"""The closed set of edits, and their application.

Passes yield edits; only `apply` changes anything. It places expressions, mints names, and brings the
variables and per-call values that expressions need to every graph and every caller.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rewriter.draft import Draft, define
from rewriter.expr import Expr, Function
from rewriter.frames import ENTERS
from rewriter.ir import MAIN, Attrs, Edge, Endpoint, Error, Exposed, Model, Signature, Value, Variable
from rewriter.lift import lift, make_stateful
from rewriter.ops import attr, call_form_of, functions_in


@dataclass(frozen=True)
class Rewire:
    """Let `edge` use `value` instead. New nodes are named below `scope`."""

    edge: Edge
    value: Expr
    scope: str


@dataclass(frozen=True)
class Run:
    """Run an op for its effect whenever `graph` runs, and make the effect known to every caller.

    With `last`, it runs after everything that the graph's results and other effects need.
    """

    graph: str
    value: Expr
    scope: str
    last: bool = False


@dataclass(frozen=True)
class RunAfter:
    """Let a node run after others, which are nodes of its graph or are to be placed there."""

    graph: str
    node: str
    others: tuple[str | Expr, ...]
    scope: str = ""


@dataclass(frozen=True)
class SetAttr:
    """Set an attribute of a node; None returns it to its op definition's default."""

    graph: str
    node: str
    name: str
    value: Any


@dataclass(frozen=True)
class Clone:
    """Add a copy of a function under a new name; edits of the copy may be in the same batch.

    Attributes:
        callees: functions to call instead of others.
        inputs: new order of the leading arguments: the copy's i-th is the function's `inputs[i]`-th.
        outputs: new order of the results, likewise.
    """

    graph: str
    name: str
    callees: Mapping[str, str] = field(default_factory=dict)
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()


@dataclass(frozen=True)
class Duplicate:
    """Add copies of nodes to the same graph; edits of the copies may be in the same batch.

    Attributes:
        nodes: their names; the copies are named `prefix`/name and use each other.
        instead: values that the copies use in place of others.
    """

    graph: str
    nodes: tuple[str, ...]
    prefix: str
    instead: Mapping[Value, Value] = field(default_factory=dict)


@dataclass(frozen=True)
class Replace:
    """Let a node be of another op, with other inputs and attributes, under its name."""

    graph: str
    node: str
    op: str
    inputs: tuple[Value, ...]
    attrs: Attrs


@dataclass(frozen=True)
class Inline:
    """Put what a function computes in place of a node that calls it; its nodes are named below the node.

    Of an op with several callees, this is the one that it would call.
    """

    graph: str
    node: str
    callee: str


@dataclass(frozen=True)
class Define:
    """Add a function that expressions call."""

    function: Function


@dataclass(frozen=True)
class AddVariable:
    """Add a variable and expose it at its `path`."""

    variable: Variable


@dataclass(frozen=True)
class Expose:
    """Make a function, a variable or a list of variables an attribute of the root, by dotted path."""

    path: str
    value: Exposed


@dataclass(frozen=True)
class Refetch:
    """Let an output of a signature that the main graph computes be another value."""

    signature: str
    position: int
    value: Expr
    scope: str


@dataclass(frozen=True)
class MainSignature:
    """A signature with the inputs and output names of the signature `like`, computed in the main graph."""

    like: str
    fetches: tuple[Expr, ...]
    scope: str


@dataclass(frozen=True)
class AddSignature:
    """Make a function, or values of the main graph, a signature."""

    name: str
    value: Endpoint | MainSignature


@dataclass(frozen=True)
class Skip:
    """Leave a node as it is, and say why."""

    graph: str
    node: str
    reason: str


@dataclass(frozen=True)
class Note:
    """Something that the user should know about the result, in a sentence."""

    text: str


Edit = (
    Rewire
    | Run
    | RunAfter
    | SetAttr
    | Replace
    | Clone
    | Duplicate
    | Inline
    | Define
    | AddVariable
    | Expose
    | AddSignature
    | Refetch
    | Skip
    | Note
)


def apply(model: Model, edits: Iterable[Edit]) -> Model:
    """A model with the edits made, all in one batch: each refers to the graphs as they were, or to clones.

    Graphs that no edit concerns are the same objects in the result.

    Raises:
        Error: an edit refers to something that is not there, or a value is needed in a function that
            cannot be given another argument.
    """
    batch = list(edits)
    if all(isinstance(e, Skip | Note) for e in batch):
        return model
    model = _add_variables(model, [e.variable for e in batch if isinstance(e, AddVariable)])
    model = _add_functions(model, [e.function for e in batch if isinstance(e, Define)])
    model = _add_clones(model, [e for e in batch if isinstance(e, Clone)])
    model = _duplicate(model, [e for e in batch if isinstance(e, Duplicate)])
    model = _expose(model, batch)
    drafts = _Drafts(model)
    signed = dict(model.main_signatures)
    fetched: dict[tuple[str, int], Value] = {}
    for edit in batch:
        match edit:
            case Rewire(edge, value, scope):
                drafts[edge.graph].rewire(edge, value, scope)
            case Run(graph, value, scope, last):
                drafts[graph].run(value, scope, last)
            case RunAfter(graph, node, others, scope):
                drafts[graph].run_after(node, others, scope or node)
            case Replace(graph, node, op, inputs, attrs):
                drafts[graph].replace(node, op, inputs, attrs)
            case Inline(graph, node, callee):
                drafts[graph].inline(
                    node, model.graphs[callee], call_form_of(model, model.graphs[graph].nodes[node]).first
                )
            case SetAttr(graph, node, name, proto):
                drafts[graph].set_attr(node, name, proto)
            case AddSignature(name, MainSignature() as value):
                signed[name] = _sign(model, drafts[MAIN], name, value)
            case Refetch(name, position, value, scope):
                fetched[name, position] = drafts[MAIN].place(value, scope)
            case _:
                pass
    make_stateful(model, drafts)
    inlined = drafts[MAIN].inlined if MAIN in drafts else {}
    old = {n: _refetched(s, fetched, inlined) for n, s in model.signatures.items()}
    new = {n: _refetched(s, {}, inlined) for n, s in signed.items()}
    return replace(lift(model, drafts), signatures=old, main_signatures=new)


def _refetched(
    signature: Signature, fetched: Mapping[tuple[str, int], Value], inlined: Mapping[Value, Value]
) -> Signature:
    values = [fetched.get((signature.name, i), v) for i, v in enumerate(signature.fetches)]
    return replace(signature, fetches=tuple(inlined.get(v, v) for v in values))


def _sign(model: Model, main: Draft, name: str, value: MainSignature) -> Signature:
    like = model.signatures[value.like]
    fetches = tuple(main.place(e, f"{value.scope}/{n}") for e, n in zip(value.fetches, like.outputs, strict=True))
    return replace(like, name=name, fetches=fetches, like=like.name)


class _Drafts(dict[str, Draft]):
    """Drafts by graph, opened when first asked for."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def __missing__(self, name: str) -> Draft:
        if name not in self.model.graphs:
            raise Error(f"there is no graph {name!r} to edit")
        graph = self.model.graphs[name]
        entry = self.model.entries.get(name)
        bound = {}
        if entry is not None:
            carried = zip(entry.captures, graph.arguments[len(entry.inputs) :], strict=True)
            bound = {self.model.variables[c]: argument for c, argument in carried if isinstance(c, str)}
        draft = Draft(graph, name == MAIN or entry is not None, bound)
        self[name] = draft
        return draft


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


def _add_functions(model: Model, functions: list[Function]) -> Model:
    graphs = dict(model.graphs)
    for function in functions:
        if function.name in graphs:
            raise Error(f"the model has a function {function.name} already")
        graphs[function.name] = define(function)
    return replace(model, graphs=graphs)


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
            nodes = {
                n.name: replace(n, attrs={k: _renamed(v, clone.callees) for k, v in n.attrs.items()})
                for n in source.nodes.values()
            }
        arguments = source.arguments
        graphs[clone.name] = replace(
            source,
            name=clone.name,
            nodes=nodes,
            arguments=(*(arguments[i] for i in clone.inputs), *arguments[len(clone.inputs) :]),
            results=tuple(source.results[i] for i in clone.outputs) or source.results,
            attrs=_reordered(source.attrs, clone.inputs),
        )
    return replace(model, graphs=graphs)


def _duplicate(model: Model, edits: list[Duplicate]) -> Model:
    graphs = dict(model.graphs)
    for edit in edits:
        graph = graphs[edit.graph]
        names = {name: f"{edit.prefix}/{name}" for name in edit.nodes}

        def moved(value: Value, edit: Duplicate = edit, names: Mapping[str, str] = names) -> Value:
            while value in edit.instead:
                value = edit.instead[value]
            return Value(names.get(value.node, value.node), value.port)

        added = {}
        for name, new in names.items():
            if new in graph.nodes:
                raise Error(f"there is a node {new} already")
            node = graph.nodes[name]
            if node.op in ENTERS:
                # Two loops of one frame's name would run as one.
                frame = node.attrs["frame_name"].s.decode()
                node = node.with_attrs(frame_name=attr(f"{edit.prefix}/{frame}"))
            after = tuple(dict.fromkeys(moved(Value(a)).node for a in node.after))
            added[new] = replace(node, name=new, inputs=tuple(moved(v) for v in node.inputs), after=after)
        graphs[edit.graph] = replace(graph, nodes={**graph.nodes, **added})
    copies = tuple((edit.prefix, edit.nodes) for edit in edits if edit.graph == MAIN)
    return replace(model, graphs=graphs, copies=(*model.copies, *copies))


def _reordered(attrs: Attrs, inputs: tuple[int, ...]) -> Attrs:
    """A function's attributes with the shapes of its arguments in a new order."""
    if "_input_shapes" not in attrs or inputs == tuple(range(len(inputs))):
        return attrs
    old = attrs["_input_shapes"]
    shapes = type(old)()
    shapes.list.shape.extend([*(old.list.shape[i] for i in inputs), *old.list.shape[len(inputs) :]])
    return {**attrs, "_input_shapes": shapes}


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    """An attribute with functions' names replaced; the attribute itself where it has none of them."""
    if not any(name in names for name in functions_in(value)):
        return value
    copy = type(value)()
    copy.CopyFrom(value)
    for function in copy.list.func if copy.WhichOneof("value") == "list" else (copy.func,):
        function.name = names.get(function.name, function.name)
    return copy


def _expose(model: Model, batch: list[Edit]) -> Model:
    exposed = {e.path: e.value for e in batch if isinstance(e, Expose)}
    signatures = {e.name: e.value for e in batch if isinstance(e, AddSignature) and isinstance(e.value, Endpoint)}
    if not exposed and not signatures:
        return model
    entries = dict(model.entries)
    for value in (*exposed.values(), *signatures.values()):
        if isinstance(value, Endpoint):
            like, bound = model.entries[value.like], model.entries[value.bound]
            entries[value.function] = replace(like, function=value.function, captures=bound.captures, paths=())
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
