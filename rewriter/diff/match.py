"""Pairs of the graphs of two models: by name, else by holder, caller or content."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping

from rewriter import op_defs, protos
from rewriter.ir import Graph, Model
from rewriter.savedmodel.objects import held_functions

Keyed = Iterable[tuple[Hashable, str]]
"""Pairs (key, graph's name); the key may identify the graph in both models."""


def match(before: Model, after: Model) -> dict[str, str]:
    """Return the pairs of graphs: name before -> name after.

    Names alone do not suffice: TensorFlow numbers its functions anew each time it traces them. Graphs are paired in
    this order:

    1. graphs of the same name;
    2. concrete functions that an object of the same path holds for the same arguments;
    3. functions that nodes of the same name call in paired graphs;
    4. graphs of the same content.
    """
    matching = _Pairs(before, after)
    matching.by_key(_by_holder(before), _by_holder(after))
    matching.by_calls()
    matching.by_key(_by_content(before, matching.pairs), _by_content(after, matching.matched_after))
    matching.by_calls()
    return matching.pairs


class _Pairs:
    """Pairs found so far; no graph is in two pairs.

    Attributes:
        pairs: name before -> name after.
        matched_after: the graphs after that are in a pair.
        pending: pairs whose calls are still to be paired.
    """

    def __init__(self, before: Model, after: Model) -> None:
        self.before = before
        self.after = after
        self.pairs: dict[str, str] = {}
        self.matched_after: set[str] = set()
        self.pending: list[tuple[str, str]] = []
        for name in before.graphs:
            if name in after.graphs:
                self.add(name, name)

    def add(self, old: str, new: str) -> None:
        """Pair two graphs, if neither is in a pair."""
        if old not in self.pairs and new not in self.matched_after:
            self.pairs[old] = new
            self.matched_after.add(new)
            self.pending.append((old, new))

    def by_key(self, old: Keyed, new: Keyed) -> None:
        """Pair graphs with the same key, if no other graph of either model has this key."""
        new_names = _with_unique_key(new)
        for key, name in _with_unique_key(old).items():
            if key in new_names:
                self.add(name, new_names[key])

    def by_calls(self) -> None:
        """Pair the functions that nodes of the same name call in paired graphs."""
        while self.pending:
            old, new = (m.graphs[n] for m, n in zip((self.before, self.after), self.pending.pop(), strict=True))
            for name in old.nodes.keys() & new.nodes.keys():
                callees = (_named_functions(m, g, name) for m, g in ((self.before, old), (self.after, new)))
                for old_callee, new_callee in zip(*callees, strict=False):
                    self.add(old_callee, new_callee)


def _with_unique_key(keyed: Keyed) -> Mapping[Hashable, str]:
    """Return the graphs whose key no other graph has, by key."""
    listed = list(keyed)
    count = Counter(key for key, _ in listed)
    return {key: name for key, name in listed if count[key] == 1}


def _by_holder(model: Model) -> Iterator[tuple[Hashable, str]]:
    """Yield the concrete functions, keyed by the path of the object that holds them and by their arguments."""
    objects = model.source.proto.meta_graphs[model.source.index].object_graph_def
    for path, name in held_functions(objects):
        signature = objects.concrete_functions[name].canonicalized_input_signature
        yield (path, signature.SerializeToString(deterministic=True)), name


def _named_functions(model: Model, graph: Graph, name: str) -> list[str]:
    """Return the model's functions that a node names, in the order of its attributes' names."""
    node = graph.nodes[name]
    if node.op in model.graphs:
        return [node.op]
    if not op_defs.refers_to_functions(node.op):
        return []
    return [f for _, value in sorted(node.attrs.items()) for f in protos.functions_in(value) if f in model.graphs]


def _by_content(model: Model, paired: Iterable[str]) -> Iterator[tuple[Hashable, str]]:
    """Yield the graphs that are in no pair, keyed by their nodes' names, ops and inputs."""
    paired_names = set(paired)
    for name, graph in model.graphs.items():
        if name not in paired_names:
            # The op of a direct call is a function's name, which may differ between the models.
            content = frozenset(
                (n.name, "" if n.op in model.graphs else n.op, n.inputs, n.after) for n in graph.nodes.values()
            )
            yield content, name
