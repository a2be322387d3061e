"""A batch's statistics for averages that are updated whatever the mode is.

In a TensorFlow 1 graph, updates lie in a collection, and run when a caller says so. Where a kernel is computed in a
branch of ``If``, its statistics are there in training alone. An update that runs in inference too then gets them
from a second conditional, which only updates need: it passes on what the branch computed, or computes it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from passes.batch_norm.kernel import Layout, sample
from passes.batch_norm.roles import MEAN, VARIANCE
from passes.batch_norm.site import Site
from passes.declined import DeclinedError
from rewriter import op_defs, protos
from rewriter.edit import Define, Edit
from rewriter.expr import Expr, Function, Use, cond, op, parameter
from rewriter.ir import Graph, Model, Value
from rewriter.shapes import Shape, shape_of


@dataclass(frozen=True)
class EitherMode:
    """Conditionals that give one site's statistics in either mode.

    Attributes:
        predicate: the boolean that chooses the mode.
        training: its value with which the kernel runs in its branch.
        channels: the length of a statistic.
        operands: by parameter, the value that it stands for, and the shape of the value.
        spares: by role, the statistic as it is computed in inference, from those parameters.
    """

    site: Site
    predicate: Value
    training: bool
    channels: int
    operands: Mapping[Use, tuple[Expr, Shape | None]]
    spares: Mapping[str, Expr]
    _functions: list[Function] = field(default_factory=list)
    _conditionals: dict[str, Expr] = field(default_factory=dict)

    def statistic(self, role: str, computed: Expr) -> Expr:
        """Return a batch's statistic, a float32 vector; `computed` is the vector that the branch for training gives."""
        if role not in self._conditionals:
            name = re.sub(r"\W", "_", f"{self.site.graph}_{self.site.node}_{role}")
            # It is the last parameter, as a `Function`'s result has the shape of the last one.
            statistic = parameter("statistic", "float32")
            parameters = (*self.operands, statistic)
            shapes = (*(shape for _, shape in self.operands.values()), (self.channels,))
            passed = Function(f"{name}_passed", parameters, shapes, (op("Identity", statistic),))
            spare = Function(f"{name}_computed", parameters, shapes, (self.spares[role],))
            self._functions.extend((passed, spare))
            branches = (passed, spare) if self.training else (spare, passed)
            vector = (
                computed
                if computed.dtype == statistic.dtype
                else op("Cast", computed, DstT=protos.Dtype(statistic.dtype))
            )
            inputs = [*(value for value, _ in self.operands.values()), vector]
            self._conditionals[role] = cond(Use("bool", self.predicate), *branches, inputs)
        return self._conditionals[role]

    def definitions(self) -> Iterator[Edit]:
        """Yield the definitions of the branches of all conditionals that `statistic` has returned."""
        yield from (Define(function) for function in self._functions)


def channels_of(model: Model, graph: Graph, site: Site) -> int:
    """Return the number of channels of a fused site, which is the length of its gamma.

    Raises:
        DeclinedError: the length is not known before the graph runs.
    """
    scale = graph.nodes[site.node].inputs[1]
    (size,) = shape_of(model, graph, scale) or (-1,)
    if size < 0:
        raise DeclinedError(f"the shape of {scale.node} is not known before it runs")
    return size


def kernel_statistics(model: Model, graph: Graph, site: Site, bring: Callable[[Value], Expr]) -> Mapping[str, Expr]:
    """Return the statistics that a fused site's kernel gives, by role, in single ops and without its y.

    `bring` maps a value of the graph to an expression where the statistics are computed.

    Raises:
        DeclinedError: the number of its channels is not known.
    """
    node = graph.nodes[site.node]
    x, _, _, *averages = node.inputs
    channels = channels_of(model, graph, site)
    input_x = bring(x)
    mean, variance = Layout(op_defs.get(model, node, "data_format"), "same", channels).moments(input_x)
    batch = {MEAN: mean, VARIANCE: sample(variance, input_x, channels)}
    if not site.kernel_average:
        return batch
    moving = dict(zip(batch, (bring(value) for value in averages), strict=True))
    return {role: moving[role] + (batch[role] - moving[role]) * site.kernel_factor for role in batch}
