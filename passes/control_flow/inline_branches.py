"""Branches of ``If`` that always run, inlined in TensorFlow 1's format."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from rewriter import ops
from rewriter.edit import Edit, Inline
from rewriter.ir import MAIN, Model
from rewriter.liveness import BRANCHES, Assumption


@dataclass(frozen=True)
class InlineBranches:
    """Replace an ``If`` of the main graph by the branch that always runs.

    A V1 session cannot differentiate an ``If`` that it loaded, as its gradient needs outputs that only a newly
    built one has. It need not, where training is derived and the mode is known.
    """

    name: ClassVar[str] = "inline-branches"

    def edits(self, model: Model) -> Iterable[Edit]:
        """Inline each decided ``If``; leave a model with an object graph, whose functions can be differentiated."""
        if model.object_based:
            return
        main = model.graphs[MAIN]
        assumed = Assumption(model, main, {})
        for node in main.nodes.values():
            taken = assumed.known(node.inputs[0]) if node.op in BRANCHES else None
            if taken is not None:
                then, otherwise = ops.callees(model, node)
                yield Inline(MAIN, node.name, then if taken else otherwise)
