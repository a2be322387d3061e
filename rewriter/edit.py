"""The closed set of edits. Passes yield them; only `rewriter.apply` applies them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

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
    """Let a node run after others: nodes of its graph, or expressions to be placed there."""

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
        callees: a function that the source calls -> the function that the copy calls instead.
        inputs: new order of the leading arguments: the copy's i-th is the source's `inputs[i]`-th.
        outputs: new order of the results: the copy's i-th is the source's `outputs[i]`-th; empty for the same order.
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
        nodes: names of the nodes to copy; the copies are named `prefix`/name and use each other.
        instead: a value that the originals use -> the value that the copies use instead.
    """

    graph: str
    nodes: tuple[str, ...]
    prefix: str
    instead: Mapping[Value, Value] = field(default_factory=dict)


@dataclass(frozen=True)
class Replace:
    """Make a node another op under the same name: its first output becomes `value`."""

    graph: str
    node: str
    value: Apply


@dataclass(frozen=True)
class AddResult:
    """Let a function return one more value; other edits adapt its callers."""

    graph: str
    name: str
    value: Expr
    scope: str


@dataclass(frozen=True)
class Reorder:
    """Let a function return its results in another order, including the results that this batch adds.

    Attributes:
        order: the i-th result becomes the one that would be the `order[i]`-th.
    """

    graph: str
    order: tuple[int, ...]


@dataclass(frozen=True)
class Sweep:
    """Remove nodes that nothing uses any more, and the nodes that only they needed.

    A node stays if a node, a result, a signature or a collection still uses it, or if it has an effect. With `moved`,
    neither an effect nor a control input keeps a node. Other edits of the batch then move the effects elsewhere, and
    make the nodes that waited for them wait for the moved ones.
    """

    graph: str
    nodes: tuple[str, ...]
    moved: bool = False


@dataclass(frozen=True)
class Inline:
    """Replace a call by the nodes of its callee, which are named below the call's node.

    Attributes:
        callee: the function; of an op with several callees, the one that it would call.
    """

    graph: str
    node: str
    callee: str


@dataclass(frozen=True)
class Dispatch:
    """Let a function only call one of two others, which take and return the same as it does.

    Attributes:
        condition: a boolean, computed from the function's arguments and variables alone.
        then: the function to call if the condition is true.
        otherwise: the function to call if the condition is false.
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
    """Add functions from elsewhere, and the gradient functions among them by the kind of op that they differentiate."""

    graphs: tuple[Graph, ...]
    gradients: Mapping[str, Gradient] = field(default_factory=dict)


@dataclass(frozen=True)
class AddVariable:
    """Add a variable and expose it at its `path`."""

    variable: Variable


@dataclass(frozen=True)
class Assign:
    """Save a variable of the source with another value, of the same dtype and shape."""

    variable: str
    value: Any


@dataclass(frozen=True)
class Keep:
    """Keep only these concrete functions and what they need; remove the rest, after all other edits."""

    functions: tuple[str, ...]


@dataclass(frozen=True)
class Synchronize:
    """Change the modes in which the replicas of a variable are synchronised and aggregated.

    Attributes:
        key: checkpoint key of a variable of the source, or of one that an earlier pass added.
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
    """Let a signature of the main graph return another value as one of its outputs."""

    signature: str
    position: int
    value: Expr
    scope: str


@dataclass(frozen=True)
class MainSignature:
    """A signature with the inputs and output names of the signature `like`, computed in the main graph.

    Attributes:
        fetches: values of the outputs of `like`, followed by those of the additional outputs.
        added: names, dtypes and shapes of the additional outputs.
        feeds: placeholders for additional inputs, with their names, dtypes and shapes.
    """

    like: str
    fetches: tuple[Expr, ...]
    scope: str
    added: tuple[Spec, ...] = ()
    feeds: tuple[tuple[Spec, Value], ...] = ()


@dataclass(frozen=True)
class AddSignature:
    """Add a signature, computed by a function or by the main graph."""

    name: str
    value: Endpoint | MainSignature


@dataclass(frozen=True)
class Skip:
    """Leave a node unchanged, and give the reason."""

    graph: str
    node: str
    reason: str


@dataclass(frozen=True)
class Note:
    """A sentence that the user should know about the result.

    Attributes:
        kind: "train" if it says what the training function is, or why there is none; "detail" if there is nothing in it
            to decide on, so that a summary leaves it out; else "decision".
    """

    text: str
    kind: Literal["decision", "train", "detail"] = "decision"


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
