"""The variables with which a running program controls quantisation."""

from __future__ import annotations

from rewriter.expr import Expr, constant, handle, op
from rewriter.ir import MAIN, Model, Variable

ON_WRITE, ONLY_FIRST_REPLICA = 2, 3


def control(model: Model, name: str, initial: int) -> Variable:
    """The model's int64 scalar `quantization/<name>`, the same on every replica; a new one if it has none."""
    full = f"quantization/{name}"
    found = next((v for v in model.variables.values() if v.name == full), None)
    return found or Variable(
        model.new_key(full),
        full,
        "int64",
        (),
        synchronization=ON_WRITE,
        aggregation=ONLY_FIRST_REPLICA,
        path=f"quantization.{name}",
        initial=initial,
    )


def step(model: Model) -> Variable:
    """How many training steps the model has made: one for each call of its training function."""
    return control(model, "step", 0)


def increment(model: Model) -> Expr:
    """The op that counts one step."""
    return op("AssignAddVariableOp", handle(step(model)), constant(1, "int64"))


def counters(model: Model) -> tuple[str, ...]:
    """The nodes of the main graph that count steps."""
    main = model.graphs[MAIN]
    holders = {v.node for v in model.variables.values() if v.name == "quantization/step"}
    key = step(model).key.encode()
    holders |= {n.name for n in main.nodes.values() if n.op == "VarHandleOp" and n.attrs["shared_name"].s == key}
    return tuple(n.name for n in main.nodes.values() if n.op == "AssignAddVariableOp" and n.inputs[0].node in holders)
