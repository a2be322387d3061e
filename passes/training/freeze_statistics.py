"""A second phase of training, in which the moving statistics are used and no longer updated."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from passes.batch_norm.moving_statistics import normalise_with_moving
from passes.batch_norm.site import Site
from passes.batch_norm.sites import sites
from passes.quantization.controls import control, step
from passes.quantization.training_functions import FROZEN, TRAIN, TRAIN_SIGNATURE
from passes.training.options import FreezeOptions
from rewriter.dataflow import VariableKey, call_graph, origins
from rewriter.edit import AddVariable, Clone, Dispatch, Edit, Note
from rewriter.expr import per_call, read
from rewriter.ir import Error, Model


@dataclass(frozen=True)
class FreezeStatistics(FreezeOptions):
    """Let training normalise with the moving statistics, from the step on that `quantization.freeze_step` holds.

    There are two training functions then, and one branch at the root chooses the one that runs. The first uses the
    batch's statistics, which enter the moving averages. The second uses the moving statistics as serving has them,
    quantised if they are there. Everything else is the same, including dropout and the count of steps.

    Raises:
        Error: an option is out of range.
    """

    name: ClassVar[str] = "freeze-statistics"

    def edits(self, model: Model) -> Iterable[Edit]:
        """Add the second phase, unless no freeze step is wanted, the model has one already or has no batch norm.

        Raises:
            Error: there is no training function whose statistics could be frozen; the message says why.
        """
        if self.freeze_step is None:
            return
        limit = control(model, "freeze_step", self.freeze_step)
        if limit.key in model.variables:
            return
        tops = [name for name in (TRAIN, TRAIN_SIGNATURE) if name in model.graphs]
        if not tops:
            raise Error(
                "there is no training function with two phases to make: a freeze step needs a model in TensorFlow 2's "
                "format, and the pass derive-training"
            )
        calls = model.analysis(call_graph)
        in_training = set().union(*(calls.reached(name) for name in tops))
        if not any(site.graph in in_training for site in model.analysis(sites)):
            yield Note("--freeze-step has no effect, as train computes no batch norm whose statistics could be frozen")
            return
        yield AddVariable(limit)
        # A signature may call the function; then the branch is in the function alone.
        tops = [name for name in tops if calls.reached(name).isdisjoint(set(tops) - {name})]
        reached = set().union(*(calls.reached(name) for name in tops))
        # A function that two others run in a conditional or a loop cannot be differentiated in both.
        names = {name: f"{name}{FROZEN}" for name in sorted(reached)}
        for name, copy in names.items():
            yield Clone(name, copy, names)
        second = per_call("statistics_frozen", read(step(model)) >= read(limit))
        for top in tops:
            # `Dispatch` replaces the function's own nodes, so the first phase gets a copy as well.
            yield Clone(top, f"{top}_learning")
            yield Dispatch(top, second, names[top], f"{top}_learning")
        training_sites = [s for s in model.analysis(sites) if s.graph in reached and s.training]
        _refuse(model, training_sites, reached)
        for site in training_sites:
            yield from normalise_with_moving(model, site, names)


def _refuse(model: Model, training_sites: Iterable[Site], reached: Iterable[str]) -> None:
    """Refuse training whose statistics cannot be frozen.

    Raises:
        Error: the statistics cannot be frozen; the message says why.
    """
    for site in training_sites:
        if site.mode == "both":
            raise Error(
                f"statistics of {site.node} cannot be frozen: it chooses its mode while it runs; --freeze-step needs "
                "fusing, without --no-fuse"
            )
        if site.binding.quantized:
            raise Error("the model is quantised already; statistics are frozen before: rewrite the float model")
    for name in sorted(reached):
        graph = model.graphs[name]
        for node in graph.nodes.values():
            trains = node.op.startswith("Assign") and any(
                isinstance(o, VariableKey) and model.variables[o.key].trainable
                for o in origins(model, name, node.inputs[0])
            )
            if trains or node.op.startswith("FusedBatchNormGrad"):
                raise Error(
                    f"statistics cannot be frozen in a training function that holds its own gradients ({node.name} in "
                    f"{name}): they are those of batch statistics; leave --freeze-step away"
                )
