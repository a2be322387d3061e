"""The in-memory form of a SavedModel: values, nodes, graphs, variables, models.

Everything here is a frozen value. A node's identity is its name; an edit yields a new graph. The main
GraphDef and every FunctionDef have the same form, so a pass needs to know neither of their two spellings
of an edge (`name:2` against `name:output_arg:0`).

Attributes are TensorFlow's ``AttrValue`` protos, carried through untouched. What a proto holds and this
form does not model travels along, serialised, in `residue`.
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
    """What a user can be told in one sentence: what is wrong and what to do."""


def unused(hint: str, taken: Container[str]) -> str:
    """`hint`, or `hint` with the first number that makes it a name not taken."""
    name, count = hint, 0
    while name in taken:
        count += 1
        name = f"{hint}_{count}"
    return name


class Names:
    """Names that are taken; with each new one there is one more.

    Attributes:
        taken: all of them.
    """

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self.taken = set(taken)
        self._counts: dict[str, int] = {}

    def new(self, hint: str) -> str:
        """`hint`, or `hint` with the first number that makes it a name not taken."""
        name, count = hint, self._counts.get(hint, 0)
        while name in self.taken:
            count += 1
            name = f"{hint}_{count}"
        self._counts[hint] = count
        self.taken.add(name)
        return name


class Value(NamedTuple):
    """One output of one node. Ports count a node's outputs through, across its output arguments."""

    node: str
    port: int = 0


class Edge(NamedTuple):
    """One use of a value: data input `position` of `node`, or result `position` of the graph where `node` is ""."""

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
        residue: serialised ``NodeDef`` (or ``ArgDef``) of the fields not modelled here.
    """

    name: str
    op: str
    inputs: tuple[Value, ...] = ()
    after: tuple[str, ...] = ()
    attrs: Attrs = field(default_factory=dict)
    device: str = ""
    residue: bytes = b""

    def with_attrs(self, **attrs: Any) -> Node:
        """The same node with these attribute protos set; a value of None removes the attribute."""
        merged = {**self.attrs, **attrs}
        return replace(self, attrs={k: v for k, v in merged.items() if v is not None})


class Result(NamedTuple):
    """One output of a function: its name, the value returned, and its dtype (residue: ``ArgDef``)."""

    name: str
    value: Value
    dtype: str
    residue: bytes = b""


class Effect(NamedTuple):
    """A node that runs whenever the function does, whether or not a result needs it (control output)."""

    name: str
    node: str


@dataclass(frozen=True, slots=True)
class Graph:
    """The main GraphDef (`name` is "") or one FunctionDef.

    Attributes:
        arguments: names of the `Arg` nodes, in order.
        attrs: the FunctionDef's own attributes.
        stateful: ``OpDef.is_stateful`` of the function's signature.
        residue: serialised ``FunctionDef`` or ``GraphDef`` of what is not modelled here.
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
        """Every data edge: the value used and where."""
        for node in self.nodes.values():
            for index, value in enumerate(node.inputs):
                yield value, Edge(self.name, node.name, index)
        for index, result in enumerate(self.results):
            yield result.value, Edge(self.name, "", index)

    def consumers(self) -> Mapping[Value, list[Edge]]:
        """All uses of each value of this graph."""
        uses: dict[Value, list[Edge]] = {}
        for value, edge in self.edges():
            uses.setdefault(value, []).append(edge)
        return uses


@dataclass(frozen=True)
class Variable:
    """One variable of the model. Names need not be unique; `key`, its name in the checkpoint, is.

    Attributes:
        shape: None where unknown; -1 for an unknown dimension.
        synchronization: ``tf.VariableSynchronization`` as its integer value.
        aggregation: ``tf.VariableAggregation`` as its integer value.
        path: for a new variable, its attribute path from the root, as ``quantization.step``.
        initial: for a new variable, the value it is saved with.
        node: in a model without object graph, the node of the main graph that makes it.
        frozen: whether objects list it as one of their variables, and none as one of their trainable variables. Keras
            freezes a layer by these lists, and leaves `trainable` as it is.
    """

    key: str
    name: str
    dtype: str
    shape: tuple[int, ...] | None
    trainable: bool = False
    synchronization: int = 0
    aggregation: int = 0
    path: str = ""
    initial: Any = field(default=None, compare=False)
    node: str = ""
    frozen: bool = False


class Gradient(NamedTuple):
    """A function that differentiates ops of one kind, and how it is called: a ``SavedConcreteFunction``."""

    function: str
    signature: Any


class Spec(NamedTuple):
    """Name, dtype and shape of one tensor that goes in or out (shape None: unknown rank; -1: unknown)."""

    name: str
    dtype: str
    shape: tuple[int, ...] | None


@dataclass(frozen=True)
class Entry:
    """A concrete function: a graph that can be called from outside, and what it captures.

    Attributes:
        inputs: specs of the leading arguments, which a caller supplies.
        outputs: specs of the results, in order.
        captures: what the remaining arguments are bound to: a variable's key, or the number of another
            object (a table, an asset, a constant).
        paths: where the object graph holds it, as ``__call__`` or ``signatures.serving_default``.
        keys: of what returns a dict of tensors, its keys in the order of the results; else empty.
    """

    function: str
    inputs: tuple[Spec, ...]
    outputs: tuple[Spec, ...]
    captures: tuple[str | int, ...]
    paths: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class Signature:
    """A signature of the model; names are those that the caller sees, in order.

    Attributes:
        entry: the concrete function that computes it; "" where the main graph does so itself.
        feeds: in the main graph, the value that each input takes the place of.
        fetches: in the main graph, what each output is.
        specs: of the inputs and, after them, of the outputs, where the main graph computes it.
        like: of a new signature in the main graph, the one whose inputs and names it has.
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
        like: the concrete function whose inputs and output structure it has; for a signature, one that a
            signature holds.
        bound: the concrete function whose captures it has, in order.
        inputs, outputs: for a signature that is like none, the names of what `like` takes and returns; the function
            takes and returns it in the order of the names, as signatures do.
        returns: what it returns as a dict, in the order of the keys, where that is not what `like` returns.
    """

    function: str
    like: str
    bound: str
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    returns: tuple[Spec, ...] = ()


@dataclass(frozen=True)
class VariablesOf:
    """A list of the variables that a concrete function captures, or of the trainable ones among them."""

    function: str
    trainable_only: bool = False


Exposed = Endpoint | Variable | VariablesOf


@dataclass(frozen=True)
class Model:
    """A whole SavedModel.

    Attributes:
        graphs: main graph and functions by name.
        variables: by checkpoint key.
        entries: concrete functions by the name of their graph.
        signatures: by name.
        root_names: the names of the root object's attributes in the source.
        attributes: what passes added below the root, by dotted path.
        new_signatures: signatures that passes added and functions compute.
        main_signatures: signatures that passes added and the main graph computes.
        collections: the main graph's collections of nodes.
        copies: (prefix, names) of nodes of the main graph that passes copied.
        object_based: whether it has an object graph, as TensorFlow 2 writes it; TensorFlow 1's has collections.
        owned: concrete functions that belong to captured objects which are no variables, as those that fill a table
            do, by the object's number.
        constants: the main graph's nodes of captured constants, by their number in the object graph.
        op_defs: op definitions that the model brings for ops that may not be registered here.
        gradients: what differentiates each kind of op that has a gradient of its own.
        values: what the source's checkpoint holds, by key; read when it is asked for.
        assigned: what is to be saved in place of that, by key.
        source: what `rewriter.savedmodel` needs to write the model again; nothing else looks into it.
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
    _memo: dict[Any, Any] = field(default_factory=dict, init=False, compare=False, repr=False)
    _graph_memo: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)  # shared by its successors

    def analysis(self, of: Callable[[Model], T]) -> T:
        """The result of `of(self)`, computed once: models are immutable."""
        if of not in self._memo:
            self._memo[of] = of(self)
        result: T = self._memo[of]
        return result

    def analysis_of(self, graph: Graph, of: Callable[[Model, Graph], T]) -> T:
        """The result of `of(self, graph)`, computed once for this graph, even if other graphs change."""
        known, result = self._graph_memo.get((of, graph.name), (None, None))
        if known is not graph:
            result = of(self, graph)
            self._graph_memo[of, graph.name] = (graph, result)
        found: T = result
        return found

    def new_key(self, name: str) -> str:
        """The checkpoint key that TensorFlow would give a new variable of this name."""
        return f"{name}/.ATTRIBUTES/VARIABLE_VALUE" if self.object_based else name

    def value_of(self, key: str) -> Any:
        """The value of a variable, as a pass or else the source's checkpoint has it; a NumPy array.

        Raises:
            Error: it cannot be read.
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
        """The concrete functions that the root holds under this name (one per trace)."""
        return tuple(e for e in self.entries.values() if attribute in e.paths)

    def captured(self, of: VariablesOf) -> tuple[Variable, ...]:
        """The variables that a list names, in the order in which the function captures them."""
        captures = self.entries[of.function].captures
        found = (self.variables[c] for c in captures if isinstance(c, str))
        return tuple(v for v in found if v.trainable or not of.trainable_only)

    def signature_of(self, entry: str) -> Signature:
        """The signature that this concrete function computes.

        Raises:
            Error: there is none.
        """
        for signature in self.signatures.values():
            if signature.entry == entry:
                return signature
        raise Error(f"no signature is computed by {entry}")
