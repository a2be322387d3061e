"""The frames of TensorFlow 1's while loops.

Enter brings a value into a loop's frame, and Exit brings it out. All inputs of an op must be of one frame. So a loop
that uses a value from outside needs an Enter that gives it in every iteration.
"""

from __future__ import annotations

from collections.abc import Mapping

from rewriter import op_defs, protos
from rewriter.ir import Graph, Model, Node

Frame = tuple[str, ...]
"""Names of the frames that contain a node, from the outermost; empty outside of loops."""

ENTERS = ("Enter", "RefEnter")
"""Ops that bring a value into a frame."""

EXITS = ("Exit", "RefExit")
"""Ops that bring a value out of a frame."""


def frames(graph: Graph) -> Mapping[str, Frame]:
    """Return the frame of each node that lies in a loop."""
    users: dict[str, list[Node]] = {}
    waiting = [node for node in graph.nodes.values() if node.op in ENTERS]
    for node in graph.nodes.values() if waiting else ():
        for name in (*(v.node for v in node.inputs), *node.after):
            users.setdefault(name, []).append(node)
    node_frames: dict[str, Frame] = {}
    while waiting:
        node = waiting.pop()
        frame = of_node(node, node_frames)
        # A node may be met first by an input from outside of its loop; the deepest of its inputs tells its frame.
        if len(frame) > len(node_frames.get(node.name, ())):
            node_frames[node.name] = frame
            waiting += users.get(node.name, [])
        elif node.op in EXITS:
            waiting += [u for u in users.get(node.name, []) if u.name not in node_frames and frame]
    return node_frames


def loop_frames(_: Model, graph: Graph) -> Mapping[str, Frame]:
    """Return the frame of each node that lies in a loop, in the form that `Model.analysis_of` takes."""
    return frames(graph)


def of_node(node: Node, node_frames: Mapping[str, Frame]) -> Frame:
    """Return the frame of a node, from the frames of its inputs and control inputs."""
    sources = (*(v.node for v in node.inputs), *node.after)
    deepest = max((node_frames.get(name, ()) for name in sources), key=len, default=())
    if node.op in ENTERS:
        name = protos.text(op_defs.attribute(node, "frame_name").s)
        # TensorFlow names each loop's frame anew. A damaged graph may enter a loop from within: that is no deeper one.
        return deepest if name in deepest else (*deepest, name)
    return deepest[:-1] if node.op in EXITS else deepest
