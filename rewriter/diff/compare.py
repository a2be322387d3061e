"""What differs between two models, computed from the two alone."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from rewriter import op_defs, ops
from rewriter.diff.facts import TENSOR, VARIABLE, Aspects, facts
from rewriter.diff.match import match
from rewriter.diff.report import Change, Detail, What
from rewriter.ir import ARG, Attrs, Error, Graph, Model, Node, Value
from rewriter.protos import with_functions
from rewriter.text import attr_text

NODE, FUNCTION = "node", "function"
REMOVED_VALUE = ("removed", "value")
"""What nobody needs to be told."""


@dataclass(frozen=True)
class Comparison:
    """Two models, which graph is which, and all changes."""

    before: Model
    after: Model
    pairs: Mapping[str, str]
    changes: tuple[Change, ...]

    @cached_property
    def names_before(self) -> Mapping[str, str]:
        """The name before of each graph that is in a pair, by its name after."""
        return {new: old for old, new in self.pairs.items()}

    def graph_before(self, name: str) -> Graph | None:
        """The graph before that is a pair with one after."""
        old = self.names_before.get(name)
        return None if old is None else self.before.graphs[old]


def compare(
    before: Model,
    after: Model,
    *,
    values: Container[str] = (),
    describe: bool = True,
) -> Comparison:
    """All differences of two models.

    Args:
        before: one model.
        after: the other.
        values: the keys of the variables and other tensors whose values are compared.
        describe: whether to say what there is to say of nodes that were added or removed.
    """
    pairs = match(before, after)
    renamed = {old: new for old, new in pairs.items() if old != new}
    changes = list(_graphs(_Sides(before, after, pairs, renamed, describe)))
    old, new = facts(before, renamed, values), facts(after, {}, values)
    for kind, name in sorted(old.keys() | new.keys()):
        item = (kind, name)
        if kind == TENSOR and (VARIABLE, name) in old.keys() | new.keys():
            continue  # a variable in one of the models
        what: What = "added" if item not in old else "removed" if item not in new else "changed"
        details = tuple(d for d in _aspects(old.get(item, {}), new.get(item, {})) if (what, d.aspect) != REMOVED_VALUE)
        if details or what != "changed":
            changes.append(Change(kind, what, "", name, details=details))
    return Comparison(before, after, pairs, tuple(changes))


def all_keys(*models: Model) -> frozenset[str]:
    """The keys of all variables and other tensors."""
    held = (m.source.checkpoint.shapes for m in models if m.source.checkpoint is not None)
    return frozenset().union(*(m.variables for m in models), *held)


def _aspects(old: Aspects, new: Aspects) -> Iterator[Detail]:
    for aspect in dict.fromkeys((*old, *new)):
        if old.get(aspect) != new.get(aspect):
            yield Detail(aspect, old.get(aspect), new.get(aspect))


class _Sides(NamedTuple):
    before: Model
    after: Model
    pairs: Mapping[str, str]
    renamed: Mapping[str, str]
    describe: bool


def _graphs(sides: _Sides) -> Iterator[Change]:
    before, after, pairs = sides.before, sides.after, sides.pairs
    taken = {new: old for old, new in pairs.items()}
    for name, graph in after.graphs.items():
        if name not in taken:
            yield Change(FUNCTION, "added", "", name, str(len(graph.nodes)), fingerprint=fingerprint(graph))
            continue
        old = before.graphs[taken[name]]
        if old is not graph and not (taken[name] == name and _same_proto(before, after, name)):
            yield from _changed_graph(sides, old, graph)
    for name, graph in before.graphs.items():
        if name not in pairs:
            yield Change(FUNCTION, "removed", "", name, str(len(graph.nodes)), fingerprint=fingerprint(graph))


def _same_proto(before: Model, after: Model, name: str) -> bool:
    """Whether a graph is, in both models, what was read, and that is the same."""
    found = [m.source.protos.get(name) for m in (before, after)]
    if not all(
        known is not None and known[0] is m.graphs[name] for known, m in zip(found, (before, after), strict=True)
    ):
        return False
    old, new = (known[1] for known in found if known is not None)
    return bool(name) and bool(old == new)


def _changed_graph(sides: _Sides, old: Graph, new: Graph) -> Iterator[Change]:
    """What differs between two graphs that are a pair."""
    for name in dict.fromkeys((*old.nodes, *new.nodes)):
        one, other = old.nodes.get(name), new.nodes.get(name)
        if one is other:
            continue
        if one is None or other is None:
            model, graph, node = (
                (sides.before, old, old.nodes[name]) if other is None else (sides.after, new, new.nodes[name])
            )
            details = tuple(described(model, graph, node, removed=other is None)) if sides.describe else ()
            what: What = "added" if one is None else "removed"
            yield Change(NODE, what, new.name, name, node.op, details, fingerprint(graph, name))
        elif one != other:
            details = tuple(_differences(sides, (old, one), (new, other)))
            if details:
                yield Change(NODE, "changed", new.name, name, other.op, details)
    details = tuple(_aspects(_interface(old, new, sides.renamed), _interface(new, old, {})))
    if details:
        yield Change(FUNCTION, "changed", "", new.name, "", details)


def with_details(compared: Comparison, change: Change) -> Change:
    """A change with what there is to say of a node that was added or removed."""
    if change.kind != NODE or change.what not in ("added", "removed"):
        return change
    removed = change.what == "removed"
    model, name = (compared.before, compared.names_before[change.graph]) if removed else (compared.after, change.graph)
    graph = model.graphs[name]
    return replace(change, details=tuple(described(model, graph, graph.nodes[change.name], removed=removed)))


def described(model: Model, graph: Graph, node: Node, *, removed: bool) -> Iterator[Detail]:
    """All aspects of a node, as of one that is new, or was removed."""

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


def _differences(sides: _Sides, old: tuple[Graph, Node], new: tuple[Graph, Node]) -> Iterator[Detail]:
    one, other = old[1], new[1]
    op = sides.renamed.get(one.op, one.op)
    if op != other.op:
        yield Detail("op", op, other.op)
    for position in range(max(len(one.inputs), len(other.inputs))):
        was, now = (n.inputs[position] if position < len(n.inputs) else None for n in (one, other))
        if was != now:
            port = port_name(sides.after, other, position) or port_name(sides.before, one, position)
            yield Detail(f"input {position}", was and value_name(was), now and value_name(now), port)
    if set(one.after) != set(other.after):
        yield Detail("control inputs", ", ".join(sorted(one.after)), ", ".join(sorted(other.after)))
    if one.device != other.device:
        yield Detail("device", one.device, other.device)
    if one.residue != other.residue:
        yield Detail("debug information", _hash(one.residue), _hash(other.residue))
    for name in sorted(one.attrs.keys() | other.attrs.keys()):
        known, is_now = one.attrs.get(name), other.attrs.get(name)
        if known is not None and sides.renamed:
            known = with_functions(known, sides.renamed)
        if known != is_now:
            was_text, text = (None if a is None else attr_text(a) for a in (known, is_now))
            yield Detail(f"attribute {name}", was_text, text)


def _interface(graph: Graph, other: Graph, renamed: Mapping[str, str]) -> Aspects:
    """What a function says of itself besides its nodes. Arguments are nodes; only the order of common ones is here."""
    common = [name for name in graph.arguments if name in other.nodes]
    found = {"order of arguments": ", ".join(common), "stateful": str(graph.stateful)}
    for result in graph.results:
        found[f"result {result.name}"] = f"{value_name(result.value)}: {result.dtype}"
        if result.residue:
            found[f"description of result {result.name}"] = _hash(result.residue)
    for effect in graph.effects:
        found[f"control output {effect.name}"] = effect.node
    for name, attr in graph.attrs.items():
        found[f"attribute {name}"] = attr_text(with_functions(attr, renamed))
    if graph.name:
        found["description and numbers of resources"] = _hash(graph.residue)
    return found


def fingerprint(graph: Graph, only: str = "") -> str:
    """A hash of a function, or of a single node of it."""
    digest = hashlib.blake2b(digest_size=8)

    def add(attrs: Attrs, *parts: object) -> None:
        held = [(name, attr.SerializeToString(deterministic=True)) for name, attr in sorted(attrs.items())]
        digest.update(repr((parts, held)).encode())

    for name in [only] if only else sorted(graph.nodes):
        node = graph.nodes[name]
        place = graph.arguments.index(name) if only and node.op == ARG else -1
        add(
            node.attrs,
            name,
            node.op,
            [tuple(v) for v in node.inputs],
            sorted(node.after),
            node.device,
            place,
            node.residue,
        )
    if not only:
        results = [(r.name, tuple(r.value), r.dtype, r.residue) for r in graph.results]
        add(graph.attrs, graph.arguments, results, sorted(graph.effects), graph.stateful, graph.residue)
    return digest.hexdigest()


def _hash(content: bytes) -> str:
    return f"hash {hashlib.blake2b(content, digest_size=8).hexdigest()}"


def value_name(value: Value) -> str:
    """A value as TensorFlow writes it, port 0 left out."""
    return f"{value.node}:{value.port}" if value.port else value.node


def port_name(model: Model, node: Node, position: int) -> str:
    """What an op's definition, or the function that is called, calls an input; "" where that is not known."""
    try:
        form = ops.call_form(model, node)
        called = ops.callees(model, node) if form is not None else ()
        if form is not None and called and position >= form.first:
            return model.graphs[called[0]].arguments[position - form.first]
        definition = op_defs.op_def(model, node.op)
    except (Error, KeyError, IndexError):
        return ""
    names = []
    for name, count in op_defs.argument_counts(definition.input_arg, node.attrs, op_defs.defaults(definition)):
        names += [name] if count == 1 else [f"{name}[{i}]" for i in range(count)]
    return names[position] if position < len(names) else ""
