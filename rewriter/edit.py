"""The closed set of edits. Passes yield them; only `rewriter.apply` changes anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rewriter.expr import Apply, Expr, Function
from rewriter.ir import Edge, Endpoint, Exposed, Gradient, Graph, Spec, Value, Variable


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
    """Let a node be another op under its name: its first output is what `value` computes."""

    graph: str
    node: str
    value: Apply


@dataclass(frozen=True)
class AddResult:
    """Let a function return one more value; what calls it is to be told so by other edits."""

    graph: str
    name: str
    value: Expr
    scope: str


@dataclass(frozen=True)
class Reorder:
    """Let a function return its results, those that this batch adds included, in another order.

    Attributes:
        order: the i-th result is what would be the `order[i]`-th.
    """

    graph: str
    order: tuple[int, ...]


@dataclass(frozen=True)
class Sweep:
    """Remove nodes that nothing uses any more, and what only they needed.

    A node that still has a use, by a node, a result, a signature or a collection, stays; so does one with an effect.
    If they are `moved`, other edits of the batch let their effects happen elsewhere, and what waited for them wait for
    that: neither keeps them then.
    """

    graph: str
    nodes: tuple[str, ...]
    moved: bool = False


@dataclass(frozen=True)
class Inline:
    """Put what a function computes in place of a node that calls it; its nodes are named below the node.

    Of an op with several callees, this is the one that it would call.
    """

    graph: str
    node: str
    callee: str


@dataclass(frozen=True)
class Dispatch:
    """Let a function do no more than call one of two others, which take and return what it does.

    Attributes:
        condition: a boolean, from the function's arguments and variables alone.
        then: what it calls where the condition holds.
        otherwise: what it calls where it does not.
    """

    graph: str
    condition: Expr
    then: str
    otherwise: str


@dataclass(frozen=True)
class Define:
    """Add a function that expressions call."""

    function: Function


@dataclass(frozen=True)
class Import:
    """Add functions that were made elsewhere, and gradient functions among them, by the kind of op they are for."""

    graphs: tuple[Graph, ...]
    gradients: Mapping[str, Gradient] = field(default_factory=dict)


@dataclass(frozen=True)
class AddVariable:
    """Add a variable and expose it at its `path`."""

    variable: Variable


@dataclass(frozen=True)
class Assign:
    """Let a variable of the source be saved with another value, of its dtype and shape."""

    variable: str
    value: Any


@dataclass(frozen=True)
class Keep:
    """Keep these concrete functions and what they need; everything else goes, when all other edits are made."""

    functions: tuple[str, ...]


@dataclass(frozen=True)
class Synchronize:
    """Let the replicas of a variable be kept alike in another way.

    Attributes:
        key: the variable's; it is in the source, or was added by an earlier pass.
        synchronization: ``tf.VariableSynchronization`` as its integer value.
        aggregation: ``tf.VariableAggregation`` as its integer value.
    """

    key: str
    synchronization: int
    aggregation: int


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
    """A signature with the inputs and output names of the signature `like`, computed in the main graph.

    Attributes:
        fetches: what its outputs are, and after them what it returns besides.
        added: the names, dtypes and shapes of what it returns besides.
        feeds: placeholders that it takes besides, with their names, dtypes and shapes.
    """

    like: str
    fetches: tuple[Expr, ...]
    scope: str
    added: tuple[Spec, ...] = ()
    feeds: tuple[tuple[Spec, Value], ...] = ()


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
    | AddResult
    | Reorder
    | Sweep
    | Clone
    | Duplicate
    | Dispatch
    | Inline
    | Define
    | Import
    | AddVariable
    | Assign
    | Keep
    | Synchronize
    | Expose
    | AddSignature
    | Refetch
    | Skip
    | Note
)
