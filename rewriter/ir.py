"""The in-memory form of a SavedModel: values, nodes, graphs, variables, models.

Everything here is a frozen value. A node's identity is its name; an edit yields a new graph. The main
GraphDef and every FunctionDef have the same form. So a pass need not know their two spellings of an edge (`name:2`
against `name:output_arg:0`).

Attributes are TensorFlow's ``AttrValue`` protos, carried through untouched. Fields of a proto that this form does not
model travel along, serialised, in `residue`.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

MAIN = ""
"""Name of the main graph among a model's graphs."""

ARG = "Arg"
"""Op of the nodes that stand for a function's arguments."""

Attrs = Mapping[str, Any]
T = TypeVar("T")


class Error(Exception):
    """An error whose message tells a user in one sentence what is wrong and what to do."""


def unused(hint: str, taken: Container[str]) -> str:
    """Return `hint`, or `hint` with the first number that makes it a name not taken."""
    name, count = hint, 0
    while name in taken:
        count += 1
        name = f"{hint}_{count}"
    return name


class Names:
    """A growing set of unique names.

    Attributes:
        taken: all names in use.
    """

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self.taken = set(taken)
        # The last number tried for each hint: without it, many names of one hint take quadratic time.
        self._counts: dict[str, int] = {}

    def new(self, hint: str) -> str:
        """Return and take `hint`, or `hint` with the first number that makes it a name not taken."""
        name, count = hint, self._counts.get(hint, 0)
        while name in self.taken:
            count += 1
            name = f"{hint}_{count}"
        self._counts[hint] = count
        self.taken.add(name)
        return name


class Value(NamedTuple):
    """One output of one node. Ports number all outputs of a node, across its output arguments."""

    node: str
    port: int = 0


class Edge(NamedTuple):
    """One use of a value: data input `position` of `node`, or result `position` of the graph if `node` is ""."""

    graph: str
    node: str
    position: int


@dataclass(frozen=True, slots=True)
class Node:
    """One operation, or one argument of a function (op `Arg`, dtype in the attribute `T`).

    Attributes:
        inputs: data inputs, in order.
        after: names of the nodes that must run first (control inputs).
        attrs: attribute protos by name; absent ones have their op definition's default.
        residue: a serialised ``NodeDef`` (or ``ArgDef``) with the fields that are not modelled here.
    """

    name: str
    op: str
    inputs: tuple[Value, ...] = ()
    after: tuple[str, ...] = ()
    attrs: Attrs = field(default_factory=dict)
    device: str = ""
    residue: bytes = b""

    def with_attrs(self, **attrs: Any) -> Node:
        """Return the node with these attribute protos set; a value of None removes the attribute."""
        merged = {**self.attrs, **attrs}
        return replace(self, attrs={k: v for k, v in merged.items() if v is not None})


class Result(NamedTuple):
    """One output of a function: its name, value and dtype. `residue` is a serialised ``ArgDef``."""

    name: str
    value: Value
    dtype: str
    residue: bytes = b""


class Effect(NamedTuple):
    """A control output: a node that runs whenever the function does, even if no result needs it."""

    name: str
    node: str


@dataclass(frozen=True, slots=True)
class Graph:
    """The main GraphDef (`name` is "") or one FunctionDef.

    Attributes:
        arguments: names of the `Arg` nodes, in order.
        attrs: the FunctionDef's own attributes.
        stateful: ``OpDef.is_stateful`` of the function's signature.
        residue: a serialised ``FunctionDef`` or ``GraphDef`` with the fields that are not modelled here.
    """

    name: str
    nodes: Mapping[str, Node]
    arguments: tuple[str, ...] = ()
    results: tuple[Result, ...] = ()
    effects: tuple[Effect, ...] = ()
    attrs: Attrs = field(default_factory=dict)
    stateful: bool = False
    residue: bytes = b""

    def edges(self) -> Iterator[tuple[Value, Edge]]:
        """Yield every data edge: the value and its use."""
        for node in self.nodes.values():
            for index, value in enumerate(node.inputs):
                yield value, Edge(self.name, node.name, index)
        for index, result in enumerate(self.results):
            yield result.value, Edge(self.name, "", index)

    def used_at(self, edge: Edge) -> Value:
        """Return the value that is used at an edge of this graph."""
        return self.nodes[edge.node].inputs[edge.position] if edge.node else self.results[edge.position].value

    def consumers(self) -> Mapping[Value, list[Edge]]:
        """Return all uses of each value of this graph."""
        uses: dict[Value, list[Edge]] = {}
        for value, edge in self.edges():
            uses.setdefault(value, []).append(edge)
        return uses


@dataclass(frozen=True)
class Variable:
    """One variable of the model. Names need not be unique; `key`, its name in the checkpoint, is unique.

    Attributes:
        shape: None if unknown; -1 for an unknown dimension.
        synchronization: ``tf.VariableSynchronization`` as its integer value.
        aggregation: ``tf.VariableAggregation`` as its integer value.
        path: for a new variable, its attribute path from the root, such as ``quantization.step``.
        initial: for a new variable, the value that it is saved with.
        node: in a model without an object graph, the node of the main graph that makes it.
        frozen: true if objects list it as one of their variables, and none lists it as a trainable variable. Keras
            freezes a layer by these lists, and does not change `trainable`.
    """

    key: str
    name: str
    dtype: str
    shape: tuple[int, ...] | None
    trainable: bool = False
    synchronization: int = 0
    aggregation: int = 0
    path: str = ""
    # An array has no hash, and variables are keys of caches (`expr.handle`).
    initial: Any = field(default=None, compare=False)
    node: str = ""
    frozen: bool = False


class Gradient(NamedTuple):
    """A function that differentiates ops of one kind, and its call signature, a ``SavedConcreteFunction``."""

    function: str
    signature: Any


class Spec(NamedTuple):
    """Name, dtype and shape of one input or output (shape None: unknown rank; size -1: unknown)."""

    name: str
    dtype: str
    shape: tuple[int, ...] | None


@dataclass(frozen=True)
class Entry:
    """A concrete function: a graph that can be called from outside, and its captures.

    Attributes:
        inputs: specs of the leading arguments, which a caller supplies.
        outputs: specs of the results, in order.
        captures: objects bound to the remaining arguments: a variable's key, or the number of another object (a table,
            an asset, a constant).
        paths: its paths in the object graph, such as ``__call__`` or ``signatures.serving_default``.
        keys: if it returns a dict of tensors, the keys in the order of the results; else empty.
        flags: the Python booleans among the arguments that it was traced with, such as Keras' `training`.
    """

    function: str
    inputs: tuple[Spec, ...]
    outputs: tuple[Spec, ...]
    captures: tuple[str | int, ...]
    paths: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    flags: tuple[bool, ...] = ()


@dataclass(frozen=True)
class Signature:
    """A signature of the model. Names of inputs and outputs are those that the caller sees, in order.

    Attributes:
        entry: the concrete function that computes it; "" if the main graph does.
        feeds: in the main graph, the value that each input replaces.
        fetches: in the main graph, the value of each output.
        specs: if the main graph computes it, the specs of the inputs, followed by those of the outputs.
        like: for a new signature in the main graph, the signature whose inputs and names it has.
    """

    name: str
    entry: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    feeds: tuple[Value, ...] = ()
    fetches: tuple[Value, ...] = ()
    specs: tuple[Spec, ...] = ()
    like: str = ""


@dataclass(frozen=True)
class Endpoint:
    """A new function exposed as an attribute of the root (positional) or as a signature.

    Attributes:
        like: the concrete function whose inputs and output structure it has; for a signature, the concrete function of
            another signature.
        bound: the concrete function whose captures it has, in order.
        inputs, outputs: for a signature that is like no other, names of the inputs and outputs of `like`. The function
            takes and returns them in the order of the names, as signatures do.
        returns: specs of the dict that it returns, in the order of the keys, if `like` returns something else.
    """

    function: str
    like: str
    bound: str
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    returns: tuple[Spec, ...] = ()


@dataclass(frozen=True)
class VariablesOf:
    """A list of the variables that a concrete function captures, or only of the trainable ones."""

    function: str
    trainable_only: bool = False


Exposed = Endpoint | Variable | VariablesOf


@dataclass(frozen=True)
class Model:
    """A whole SavedModel.

    Attributes:
        graphs: main graph and functions by name.
        variables: variables by checkpoint key.
        entries: concrete functions by the name of their graph.
        signatures: the source's signatures by name.
        root_names: names of the root object's attributes in the source.
        attributes: objects that passes added below the root, by dotted path.
        new_signatures: signatures that passes added and functions compute.
        main_signatures: signatures that passes added and the main graph computes.
        collections: the main graph's collections of nodes.
        copies: (prefix, names) of nodes of the main graph that passes copied.
        object_based: true if it has an object graph, as TensorFlow 2 writes it; a model of TensorFlow 1 has
            collections instead.
        owned: concrete functions that belong to captured objects other than variables, by the object's number; for
            example, those that fill a table.
        constants: the main graph's nodes of captured constants, by their number in the object graph.
        gradients: the gradient function of each kind of op that has a custom gradient.
        op_defs: op definitions that the model brings for ops that may not be registered here.
        values: function that reads a value of the source's checkpoint, by key.
        assigned: values to be saved instead of those of the checkpoint, by key.
        source: the data from which `rewriter.savedmodel` writes the model again.
    """

    graphs: Mapping[str, Graph]
    variables: Mapping[str, Variable] = field(default_factory=dict)
    entries: Mapping[str, Entry] = field(default_factory=dict)
    signatures: Mapping[str, Signature] = field(default_factory=dict)
    root_names: frozenset[str] = frozenset()
    attributes: Mapping[str, Exposed] = field(default_factory=dict)
    new_signatures: Mapping[str, Endpoint] = field(default_factory=dict)
    main_signatures: Mapping[str, Signature] = field(default_factory=dict)
    collections: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    copies: tuple[tuple[str, tuple[str, ...]], ...] = ()
    object_based: bool = True
    owned: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    constants: Mapping[int, str] = field(default_factory=dict)
    gradients: Mapping[str, Gradient] = field(default_factory=dict, compare=False)
    op_defs: Attrs = field(default_factory=dict, compare=False, repr=False)
    values: Callable[[str], Any] | None = field(default=None, compare=False, repr=False)
    assigned: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    source: Any = field(default=None, compare=False, repr=False)
    # Not an argument of __init__, so `replace` begins with an empty one: an edit may change any of these results.
    _memo: dict[Any, Any] = field(default_factory=dict, init=False, compare=False, repr=False)
    _graph_memo: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)  # shared by its successors

    def analysis(self, of: Callable[[Model], T]) -> T:
        """Return the result of `of(self)`, computed once: models are immutable."""
        if of not in self._memo:
            self._memo[of] = of(self)
        result: T = self._memo[of]
        return result

    def analysis_of(self, graph: Graph, of: Callable[[Model, Graph], T]) -> T:
        """Return the result of `of(self, graph)`, computed once for this graph, even if other graphs change."""
        cached_graph, result = self._graph_memo.get((of, graph.name), (None, None))
        # One result per name: that of an edited graph takes the place of the old one, so nothing piles up.
        if cached_graph is not graph:
            result = of(self, graph)
            self._graph_memo[of, graph.name] = (graph, result)
        typed_result: T = result
        return typed_result

    def new_key(self, name: str) -> str:
        """Return the checkpoint key that TensorFlow would give a new variable of this name."""
        return f"{name}/.ATTRIBUTES/VARIABLE_VALUE" if self.object_based else name

    def value_of(self, key: str) -> Any:
        """Return the value of a variable as a NumPy array: as a pass set it, or else from the source's checkpoint.

        Raises:
            Error: the value cannot be read.
        """
        variable = self.variables[key]
        if variable.initial is not None:
            return variable.initial
        if key in self.assigned:
            return self.assigned[key]
        if self.values is None:
            raise Error(f"the model brings no value of {variable.name}")
        return self.values(key)

    def root_entries(self, attribute: str) -> tuple[Entry, ...]:
        """Return the concrete functions that are this attribute of the root (one per trace)."""
        return tuple(e for e in self.entries.values() if attribute in e.paths)

    def captured(self, of: VariablesOf) -> tuple[Variable, ...]:
        """Return the variables of a list, in the order in which the function captures them."""
        captures = self.entries[of.function].captures
        variables = (self.variables[c] for c in captures if isinstance(c, str))
        return tuple(v for v in variables if v.trainable or not of.trainable_only)

    def signature_of(self, entry: str) -> Signature:
        """Return the signature that a concrete function computes.

        Raises:
            Error: it computes no signature.
        """
        for signature in self.signatures.values():
            if signature.entry == entry:
                return signature
        raise Error(f"no signature is computed by {entry}")
