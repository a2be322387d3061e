"""Drafts of graphs under edit: the only mutable state, alive only inside `apply.apply`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from rewriter.effects import stateful
from rewriter.expr import Apply, Expr, Function, Handle, Passed, PerCall, Port, Use, reads_of
from rewriter.frames import ENTERS, Frame, frames
from rewriter.ir import ARG, MAIN, Edge, Effect, Error, Graph, Names, Node, Result, Value, Variable
from rewriter.op_defs import attribute
from rewriter.protos import Dtype, attr, dtype_attr, more_shapes, shape_attr, shapes_attr

INVALID_IN_NODE_NAMES = re.compile(r"[^A-Za-z0-9_.\\/>-]", re.ASCII)
"""Pattern of a character that TensorFlow refuses in a node's name.

Source: ``tensorflow/python/framework/ops.py``, ``_VALID_OP_NAME_REGEX``.
"""

Need = Handle | PerCall | Passed
"""An expression that a function may need from its callers."""


class Draft:
    """A mutable copy of one graph, which collects the changes to it.

    Attributes:
        graph: the graph as it was.
        entry: true if calls enter the model here, so that per-call values are computed here.
        bound: variables that the function captures already -> the arguments that carry them.
        needs: expressions that the function takes from its callers -> the arguments that carry them.
        inlined: outputs of inlined calls -> the values that replace them.
    """

    def __init__(self, graph: Graph, entry: bool, bound: Mapping[Variable, str] | None = None) -> None:
        self.graph = graph
        self.entry = entry
        self.bound = bound or {}
        self.nodes = dict(graph.nodes)
        self.results = list(graph.results)
        self.effects = list(graph.effects)
        self._result_names = Names(r.name for r in graph.results)
        self._effect_names = Names(e.name for e in graph.effects)
        self._effect_nodes = {e.node for e in graph.effects}
        self.needs: dict[Need, str] = {}
        self.stateful = graph.stateful
        self._placed: dict[Expr, Value] = {}
        self._node_names = Names(graph.nodes)
        self._frames = dict(frames(graph))
        self._entered: dict[tuple[Value, Frame], Value] = {}
        self.inlined: dict[Value, Value] = {}
        self._run_last: list[str] = []

    def mint(self, hint: str) -> str:
        """Return a valid node name like `hint` that is new in the graph.

        Hints contain names that users chose, such as a signature's key ``dense/Softmax:0``. In a node's name, the colon
        would start the number of an output.
        """
        return self._node_names.new(INVALID_IN_NODE_NAMES.sub("_", hint))

    def place(self, expr: Expr, scope: str) -> Value:
        """Return the value of an expression in this graph; place its parts that are not placed yet."""
        stack = [expr]
        while stack:
            e = stack[-1]
            if isinstance(e, PerCall) and self.entry and e.inner not in self._placed:
                # The scope is its label, whichever edit needs it first: readers of a saved model find it by that name.
                self.place(e.inner, e.label)
            missing = [] if e in self._placed else [i for i in self._operands(e) if i not in self._placed]
            if missing:
                stack.extend(reversed(missing))
                continue
            stack.pop()
            if e not in self._placed:
                self._placed[e] = self._place(e, scope)
        return self._placed[expr]

    def _operands(self, expr: Expr) -> tuple[Expr, ...]:
        """Return the expressions that are placed before this one."""
        match expr:
            case Apply():
                return (*expr.inputs, *expr.after)
            case Port(of=of):
                return (of,)
            case PerCall(inner=inner) if self.entry:
                return (inner,)
        return ()

    def _place(self, expr: Expr, scope: str) -> Value:
        match expr:
            case Use(value=value):
                return value
            case Port(of=of, port=port):
                return Value(self._placed[of].node, port)
            case Passed(graph=graph, value=value) if graph == self.graph.name:
                return value
            case PerCall(inner=inner) if self.entry:
                self._reads_are_effects(inner)
                return self._placed[inner]
            case Handle() if self.graph.name == MAIN:
                return self.var_handle(expr.variable)
            case Handle() | PerCall() | Passed():
                return Value(self.need(expr))
            case Apply():
                return Value(self._add_op(expr, self.mint(f"{scope}/{expr.name or expr.op}")))
        raise AssertionError(expr)

    def _reads_are_effects(self, expr: Expr) -> None:
        """Make an expression's reads of variables effects, so that a caller's later assignments wait for them."""
        for read in reads_of(expr):
            self.add_effect(self._placed[read].node)

    def place_as(self, expr: Apply, name: str) -> Value:
        """Place an op and return its value; its node is named `name` if that name is free."""
        for operand in self._operands(expr):
            self.place(operand, name)
        self._placed[expr] = Value(self._add_op(expr, self.mint(name)))
        return self._placed[expr]

    def _add_op(self, expr: Apply, name: str) -> str:
        operands = (*(self._placed[i] for i in expr.inputs), *(self._placed[e] for e in expr.after))
        # All inputs of an op must be of one frame: the innermost one, into which the others are brought.
        frame = max((self._frames.get(v.node, ()) for v in operands), key=len, default=())
        inputs = self._inputs(expr, frame)
        if frame:
            self._frames[name] = frame
        after = tuple(dict.fromkeys(self._placed[e].node for e in expr.after))
        self.nodes[name] = Node(name, expr.op, inputs, after, dict(expr.attrs))
        return name

    def _inputs(self, expr: Apply, frame: Frame) -> tuple[Value, ...]:
        """Return an op's inputs, brought into the loop with this frame."""
        return tuple(self._enter(self._placed[i], i.dtype, frame) for i in expr.inputs)

    def _enter(self, value: Value, dtype: str, frame: Frame) -> Value:
        """Return a value that gives another one in every iteration of the loop with this frame, through Enter nodes."""
        value_frame = self._frames.get(value.node, ())
        while len(value_frame) < len(frame):
            value_frame = frame[: len(value_frame) + 1]
            if (value, value_frame) not in self._entered:
                # A frame is known by the name that its Enter ops state, so a new one takes it from another.
                enter = next(
                    n for n in self.nodes.values() if n.op in ENTERS and self._frames.get(n.name) == value_frame
                )
                attrs = {k: v for k, v in enter.attrs.items() if k in ("frame_name", "parallel_iterations")}
                name = self.mint(f"{value.node}/Enter")
                attrs |= {"T": dtype_attr(dtype), "is_constant": attr(value=True)}
                self.nodes[name] = Node(name, "Enter", (value,), attrs=attrs)
                self._frames[name] = value_frame
                self._entered[value, value_frame] = Value(name)
            value = self._entered[value, value_frame]
        return value

    def need(self, need: Need) -> str:
        """Return the argument that carries an expression that callers supply; add it if there is none yet."""
        if isinstance(need, Handle) and need.variable in self.bound:
            return self.bound[need.variable]
        if need not in self.needs:
            name = self.mint(need.label)
            self.nodes[name] = Node(name, ARG, attrs={"T": dtype_attr(need.dtype)})
            self.needs[need] = name
            self._placed[need] = Value(name)
        return self.needs[need]

    def var_handle(self, variable: Variable) -> Value:
        """Return the resource of a variable, which the main graph makes."""
        if variable.node:
            return Value(variable.node)
        # An earlier batch of edits may have placed it.
        for node in self.nodes.values():
            if node.op == "VarHandleOp" and attribute(node, "shared_name").s == variable.key.encode():
                return Value(node.name)
        node = var_handle(self.mint(variable.name), variable)
        self.nodes[node.name] = node
        return Value(node.name)

    def rewire(self, edge: Edge, value: Expr, scope: str) -> None:
        """Let one edge use another value."""
        new = self.place(value, scope)
        if not edge.node:
            self.results[edge.position] = self.results[edge.position]._replace(value=new)
            return
        node = self._node(edge.node)
        if self._frames:
            # An Enter takes its input from outside of the frame that it opens.
            frame = self._frames.get(node.name, ())
            new = self._enter(new, value.dtype, frame[:-1] if node.op in ENTERS else frame)
        inputs = list(node.inputs)
        inputs[edge.position] = new
        self.nodes[edge.node] = replace(node, inputs=tuple(inputs))

    def run(self, value: Expr, scope: str, last: bool) -> None:
        """Place an op and run it whenever the graph runs."""
        name = self.place(value, scope).node
        self.add_effect(name)
        if last:
            self._run_last.append(name)

    def add_effect(self, node: str) -> None:
        """Let a node run whenever the graph does."""
        # A GraphDef has no control outputs.
        if self.graph.name != MAIN and node not in self._effect_nodes:
            self.effects.append(Effect(self._effect_names.new(node), node))
            self._effect_nodes.add(node)
            self.stateful = True

    def run_after(self, name: str, others: tuple[str | Expr, ...], scope: str) -> None:
        """Let a node run after others."""
        names = [other if isinstance(other, str) else self.place(other, scope).node for other in others]
        node = self._node(name)
        self.nodes[name] = replace(node, after=tuple(dict.fromkeys((*node.after, *names))))

    def replace(self, name: str, value: Apply) -> None:
        """Let a node be another op; what uses the expression elsewhere uses the node."""
        node = self._node(name)
        for operand in self._operands(value):
            self.place(operand, name)
        inputs = self._inputs(value, self._frames.get(name, ()))
        after = tuple(dict.fromkeys((*node.after, *(self._placed[e].node for e in value.after))))
        self.nodes[name] = replace(node, op=value.op, inputs=inputs, after=after, attrs=dict(value.attrs))
        self._placed[value] = Value(name)

    def inline(self, call: str, callee: Graph, first: int) -> None:
        """Put a function's nodes in place of a node that calls it."""
        node = self.nodes.pop(call)
        names = {name: self.mint(f"{call}/{name}") for name in callee.nodes if name not in callee.arguments}
        arguments = dict(zip(callee.arguments, node.inputs[first:], strict=True))

        def inlined_value(value: Value) -> Value:
            return arguments[value.node] if value.node in arguments else Value(names[value.node], value.port)

        for name, new in names.items():
            inner = callee.nodes[name].with_attrs(_class=None)  # _class names nodes of the function
            after = (*node.after, *(names[a] for a in inner.after if a in names))
            self.nodes[new] = replace(
                inner, name=new, inputs=tuple(inlined_value(v) for v in inner.inputs), after=after
            )
        # Nodes that waited for the call wait for the inlined effects; without any, for what the call waited for.
        effects = tuple(dict.fromkeys(names[n] for n in self._nodes_run_by(callee) if n in names)) or node.after
        results = {Value(call, port): inlined_value(r.value) for port, r in enumerate(callee.results)}
        for user in list(self.nodes.values()):
            inputs = tuple(results.get(v, v) for v in user.inputs)
            after = tuple(dict.fromkeys(n for a in user.after for n in (effects if a == call else (a,))))
            if inputs != user.inputs or after != user.after:
                self.nodes[user.name] = replace(user, inputs=inputs, after=after)
        self.results = [r._replace(value=results.get(r.value, r.value)) for r in self.results]
        if any(e.node == call for e in self.effects):
            self.effects = [e for e in self.effects if e.node != call]
            self._effect_nodes.discard(call)
            for name in effects:
                self.add_effect(name)
        self.inlined.update(results)

    @staticmethod
    def _nodes_run_by(callee: Graph) -> Iterator[str]:
        """Yield the nodes that a call certainly runs: effects, results, and every op that has an effect."""
        yield from (e.node for e in callee.effects)
        yield from (r.value.node for r in callee.results)
        for node in callee.nodes.values():
            if stateful(node):
                yield node.name

    def set_attr(self, node: str, name: str, value: Any) -> None:
        """Set or, with None, remove an attribute of a node."""
        self.nodes[node] = self._node(node).with_attrs(**{name: value})

    def set_node(self, node: Node) -> None:
        """Put a node in place of the one of the same name."""
        self.nodes[node.name] = node

    def add_result(self, name: str, value: Value, dtype: str) -> None:
        """Let the graph return one more value."""
        self.results.append(Result(self._result_names.new(name), value, dtype))

    def reorder(self, order: tuple[int, ...]) -> None:
        """Let the graph return its results in another order."""
        self.results = [self.results[position] for position in order]

    def _node(self, name: str) -> Node:
        if name not in self.nodes:
            raise Error(f"there is no node {name} in {self.graph.name or 'the main graph'} to edit")
        return self.nodes[name]

    def finish(self) -> Graph:
        """Return the edited graph."""
        for name in self._run_last:
            before = {r.value.node for r in self.results} | {
                e.node for e in self.effects if e.node not in self._run_last
            }
            # Arguments are there before anything runs. Sorted, as the order of a set of names differs from run to run.
            arguments = {n for n in before if self.nodes[n].op == ARG}
            waits_for = (before - arguments) | set(self.nodes[name].after)
            self.nodes[name] = replace(self.nodes[name], after=tuple(sorted(waits_for)))
        new_arguments = tuple(self.needs.values())
        attrs = dict(self.graph.attrs)
        if new_arguments and "_input_shapes" in attrs:
            # One entry per argument, or the function cannot be loaded; resources and bools are scalars.
            attrs["_input_shapes"] = more_shapes(attrs["_input_shapes"], [need.shape for need in self.needs])
        return replace(
            self.graph,
            nodes=self.nodes,
            arguments=(*self.graph.arguments, *new_arguments),
            results=tuple(self.results),
            effects=tuple(self.effects),
            attrs=attrs,
            stateful=self.stateful,
        )


def define(function: Function) -> Graph:
    """Return the graph of a function."""
    names = tuple(p.value.node for p in function.parameters)
    nodes = {p.value.node: Node(p.value.node, ARG, attrs={"T": dtype_attr(p.dtype)}) for p in function.parameters}
    draft = Draft(Graph(function.name, nodes, names), entry=False)
    for result in function.results:
        draft.add_result("result", draft.place(result, "compute"), result.dtype)
    return replace(draft.finish(), attrs={"_input_shapes": shapes_attr(list(function.shapes))})


def var_handle(name: str, variable: Variable) -> Node:
    """Return a VarHandleOp node for a variable. The shared name is the variable's key, as names need not be unique."""
    shape = shape_attr(variable.shape or ())
    attrs = {"dtype": attr(Dtype(variable.dtype)), "shape": shape, "shared_name": attr(variable.key)}
    return Node(name, "VarHandleOp", attrs=attrs)
