"""The frames of TensorFlow 1's while loops.

Enter brings a value into a loop's frame, Exit out of it. An op's inputs have to be of one frame, so a value
from outside that a loop uses needs an Enter that gives it in every round.
"""

from __future__ import annotations

from collections.abc import Mapping

from rewriter import op_defs, protos
from rewriter.ir import Graph, Model, Node

Frame = tuple[str, ...]
"""Names of the frames that a node lies in, from the outermost; empty outside of loops."""

ENTERS = ("Enter", "RefEnter")
EXITS = ("Exit", "RefExit")


def frames(graph: Graph) -> Mapping[str, Frame]:
    """The frame of each node that lies in one."""
    users: dict[str, list[Node]] = {}
    waiting = [node for node in graph.nodes.values() if node.op in ENTERS]
    for node in graph.nodes.values() if waiting else ():
        for name in (*(v.node for v in node.inputs), *node.after):
            users.setdefault(name, []).append(node)
    found: dict[str, Frame] = {}
    while waiting:
        node = waiting.pop()
        frame = of_node(node, found)
        if len(frame) > len(found.get(node.name, ())):
            found[node.name] = frame
            waiting += users.get(node.name, [])
        elif node.op in EXITS:
            waiting += [u for u in users.get(node.name, []) if u.name not in found and frame]
    return found


def loop_frames(_: Model, graph: Graph) -> Mapping[str, Frame]:
    """The same (to be memoised)."""
    return frames(graph)


def of_node(node: Node, known: Mapping[str, Frame]) -> Frame:
    """The frame of a node, from those of what it needs."""
    sources = (*(v.node for v in node.inputs), *node.after)
    deepest = max((known.get(name, ()) for name in sources), key=len, default=())
    if node.op in ENTERS:
        return (*deepest, protos.text(op_defs.attribute(node, "frame_name").s))
    return deepest[:-1] if node.op in EXITS else deepest
