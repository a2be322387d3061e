"""Differences of two models, computed from the two models alone."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from rewriter import op_defs, ops
from rewriter.diff.facts import TENSOR, VARIABLE, Aspects, facts
from rewriter.diff.match import match
from rewriter.diff.report import FUNCTION, NODE, Change, ChangeState, Detail
from rewriter.ir import ARG, Attrs, Error, Graph, Model, Node, Value
from rewriter.protos import with_functions
from rewriter.text import attr_text

REMOVED_VALUE = ("removed", "value")
"""A change and aspect that are left out: the value of a removed variable tells the reader nothing."""


@dataclass(frozen=True)
class Comparison:
    """Two models, the pairs of their graphs (name before -> name after), and all changes."""

    before: Model
    after: Model
    pairs: Mapping[str, str]
    changes: tuple[Change, ...]

    @cached_property
    def names_before(self) -> Mapping[str, str]:
        """The name before of each paired graph, by its name after."""
        return {new: old for old, new in self.pairs.items()}

    def graph_before(self, name: str) -> Graph | None:
        """Return the graph before that is paired with a graph after; None if there is none."""
        old = self.names_before.get(name)
        return None if old is None else self.before.graphs[old]


def compare(
    before: Model,
    after: Model,
    *,
    values: Container[str] = (),
    describe: bool = True,
) -> Comparison:
    """Return all differences of two models.

    Args:
        before: the model before.
        after: the model after.
        values: the keys of the variables and other tensors whose values are compared.
        describe: give the details of nodes that were added or removed, too.
    """
    pairs = match(before, after)
    renamed = {old: new for old, new in pairs.items() if old != new}
    changes = list(_graph_changes(_Sides(before, after, pairs, renamed, describe)))
    old, new = facts(before, renamed, values), facts(after, {}, values)
    for kind, name in sorted(old.keys() | new.keys()):
        item = (kind, name)
        if kind == TENSOR and (VARIABLE, name) in old.keys() | new.keys():
            continue  # a variable in one of the models
        what: ChangeState = "added" if item not in old else "removed" if item not in new else "changed"
        details = tuple(
            d for d in _differing_aspects(old.get(item, {}), new.get(item, {})) if (what, d.aspect) != REMOVED_VALUE
        )
        if details or what != "changed":
            changes.append(Change(kind, what, "", name, details=details))
    return Comparison(before, after, pairs, tuple(changes))


def all_keys(*models: Model) -> frozenset[str]:
    """Return the keys of all variables and other tensors of some models."""
    checkpoint_keys = (m.source.checkpoint.shapes for m in models if m.source.checkpoint is not None)
    return frozenset().union(*(m.variables for m in models), *checkpoint_keys)


def _differing_aspects(old: Aspects, new: Aspects) -> Iterator[Detail]:
    for aspect in dict.fromkeys((*old, *new)):
        if old.get(aspect) != new.get(aspect):
            yield Detail(aspect, old.get(aspect), new.get(aspect))


class _Sides(NamedTuple):
    before: Model
    after: Model
    pairs: Mapping[str, str]
    renamed: Mapping[str, str]
    describe: bool


def _graph_changes(sides: _Sides) -> Iterator[Change]:
    before, after, pairs = sides.before, sides.after, sides.pairs
    names_before = {new: old for old, new in pairs.items()}
    for name, graph in after.graphs.items():
        if name not in names_before:
            yield Change(FUNCTION, "added", "", name, str(len(graph.nodes)), fingerprint=fingerprint(graph))
            continue
        old = before.graphs[names_before[name]]
        if old is not graph and not (names_before[name] == name and _same_proto(before, after, name)):
            yield from _changed_graph(sides, old, graph)
    for name, graph in before.graphs.items():
        if name not in pairs:
            yield Change(FUNCTION, "removed", "", name, str(len(graph.nodes)), fingerprint=fingerprint(graph))


def _same_proto(before: Model, after: Model, name: str) -> bool:
    """Return true if no pass touched a function in either model, and both read the same proto."""
    sources = [m.source.protos.get(name) for m in (before, after)]
    if not all(
        source is not None and source[0] is m.graphs[name] for source, m in zip(sources, (before, after), strict=True)
    ):
        return False
    old, new = (source[1] for source in sources if source is not None)
    # Not for the main graph, whose proto holds the whole library.
    return bool(name) and bool(old == new)


def _changed_graph(sides: _Sides, old: Graph, new: Graph) -> Iterator[Change]:
    """Yield the changes between two paired graphs."""
    for name in dict.fromkeys((*old.nodes, *new.nodes)):
        old_node, new_node = old.nodes.get(name), new.nodes.get(name)
        if old_node is new_node:
            continue
        if old_node is None or new_node is None:
            model, graph, node = (
                (sides.before, old, old.nodes[name]) if new_node is None else (sides.after, new, new.nodes[name])
            )
            details = tuple(described(model, graph, node, removed=new_node is None)) if sides.describe else ()
            what: ChangeState = "added" if old_node is None else "removed"
            yield Change(NODE, what, new.name, name, node.op, details, fingerprint(graph, name))
        elif old_node != new_node:
            details = tuple(_node_differences(sides, (old, old_node), (new, new_node)))
            if details:
                yield Change(NODE, "changed", new.name, name, new_node.op, details)
    details = tuple(_differing_aspects(_interface(old, new, sides.renamed), _interface(new, old, {})))
    if details:
        yield Change(FUNCTION, "changed", "", new.name, "", details)


def with_details(compared: Comparison, change: Change) -> Change:
    """Return a change with the details of its node, if the node was added or removed."""
    if change.kind != NODE or change.what not in ("added", "removed"):
        return change
    removed = change.what == "removed"
    model, name = (compared.before, compared.names_before[change.graph]) if removed else (compared.after, change.graph)
    graph = model.graphs[name]
    return replace(change, details=tuple(described(model, graph, graph.nodes[change.name], removed=removed)))


def described(model: Model, graph: Graph, node: Node, *, removed: bool) -> Iterator[Detail]:
    """Yield all aspects of a node that was added or removed."""

    def detail(aspect: str, text: str, port: str = "") -> Detail:
        return Detail(aspect, text, None, port) if removed else Detail(aspect, None, text, port)

    for position, value in enumerate(node.inputs):
        yield detail(f"input {position}", value_name(value), port_name(model, node, position))
    if node.after:
        yield detail("control inputs", ", ".join(sorted(node.after)))
    if node.device:
        yield detail("device", node.device)
    for name, attr in sorted(node.attrs.items()):
        yield detail(f"attribute {name}", attr_text(attr))
    if node.op == ARG:
        yield detail("position", str(graph.arguments.index(node.name)))


def _node_differences(sides: _Sides, old: tuple[Graph, Node], new: tuple[Graph, Node]) -> Iterator[Detail]:
    old_node, new_node = old[1], new[1]
    op = sides.renamed.get(old_node.op, old_node.op)
    if op != new_node.op:
        yield Detail("op", op, new_node.op)
    for position in range(max(len(old_node.inputs), len(new_node.inputs))):
        old_input, new_input = (n.inputs[position] if position < len(n.inputs) else None for n in (old_node, new_node))
        if old_input != new_input:
            port = port_name(sides.after, new_node, position) or port_name(sides.before, old_node, position)
            yield Detail(
                f"input {position}", old_input and value_name(old_input), new_input and value_name(new_input), port
            )
    if set(old_node.after) != set(new_node.after):
        yield Detail("control inputs", ", ".join(sorted(old_node.after)), ", ".join(sorted(new_node.after)))
    if old_node.device != new_node.device:
        yield Detail("device", old_node.device, new_node.device)
    if old_node.residue != new_node.residue:
        yield Detail("debug information", _hash(old_node.residue), _hash(new_node.residue))
    for name in sorted(old_node.attrs.keys() | new_node.attrs.keys()):
        old_attr, new_attr = old_node.attrs.get(name), new_node.attrs.get(name)
        if old_attr is not None and sides.renamed:
            old_attr = with_functions(old_attr, sides.renamed)
        if old_attr != new_attr:
            old_text, new_text = (None if a is None else attr_text(a) for a in (old_attr, new_attr))
            yield Detail(f"attribute {name}", old_text, new_text)


def _interface(graph: Graph, counterpart: Graph, renamed: Mapping[str, str]) -> Aspects:
    """Return the aspects of a function besides its nodes.

    Arguments are nodes. Of these, the result has only the order of those that both functions have.
    """
    common = [name for name in graph.arguments if name in counterpart.nodes]
    aspects = {"order of arguments": ", ".join(common), "stateful": str(graph.stateful)}
    for result in graph.results:
        aspects[f"result {result.name}"] = f"{value_name(result.value)}: {result.dtype}"
        if result.residue:
            aspects[f"description of result {result.name}"] = _hash(result.residue)
    for effect in graph.effects:
        aspects[f"control output {effect.name}"] = effect.node
    for name, attr in graph.attrs.items():
        aspects[f"attribute {name}"] = attr_text(with_functions(attr, renamed))
    # The main graph's residue is its versions, which are facts of the meta graph.
    if graph.name:
        aspects["description and numbers of resources"] = _hash(graph.residue)
    return aspects


def fingerprint(graph: Graph, only: str = "") -> str:
    """Return a hash of a function, or of a single node of it."""
    digest = hashlib.blake2b(digest_size=8)

    def add(attrs: Attrs, *parts: object) -> None:
        attributes = [(name, attr.SerializeToString(deterministic=True)) for name, attr in sorted(attrs.items())]
        digest.update(repr((parts, attributes)).encode())

    for name in [only] if only else sorted(graph.nodes):
        node = graph.nodes[name]
        argument_position = graph.arguments.index(name) if only and node.op == ARG else -1
        add(
            node.attrs,
            name,
            node.op,
            [tuple(v) for v in node.inputs],
            sorted(node.after),
            node.device,
            argument_position,
            node.residue,
        )
    if not only:
        results = [(r.name, tuple(r.value), r.dtype, r.residue) for r in graph.results]
        add(graph.attrs, graph.arguments, results, sorted(graph.effects), graph.stateful, graph.residue)
    return digest.hexdigest()


def _hash(content: bytes) -> str:
    return f"hash {hashlib.blake2b(content, digest_size=8).hexdigest()}"


def value_name(value: Value) -> str:
    """Return a value as TensorFlow spells it; port 0 is left out."""
    return f"{value.node}:{value.port}" if value.port else value.node


def port_name(model: Model, node: Node, position: int) -> str:
    """Return the name of an input in the op's definition or the called function; "" if it is unknown."""
    try:
        form = ops.call_form(model, node)
        callees = ops.callees(model, node) if form is not None else ()
        if form is not None and callees and position >= form.first:
            return model.graphs[callees[0]].arguments[position - form.first]
        definition = op_defs.op_def(model, node.op)
    except (Error, KeyError, IndexError):
        return ""
    names = []
    for name, count in op_defs.argument_counts(definition.input_arg, node.attrs, op_defs.defaults(definition)):
        names += [name] if count == 1 else [f"{name}[{i}]" for i in range(count)]
    return names[position] if position < len(names) else ""
