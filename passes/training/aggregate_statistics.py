"""Aggregation of moving statistics over replicas, where the model does not say how to do it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from passes.batch_norm.batch_norms import batch_norms
from passes.batch_norm.sites import STATISTICS
from passes.quantization.controls import AUTO, MEAN, NONE, ON_READ
from rewriter.edit import Edit, Synchronize
from rewriter.ir import Model


@dataclass(frozen=True)
class AggregateStatistics:
    """Let every replica under `tf.distribute` move its own statistics, and let their mean be read and saved.

    Keras 2 asks for this. Hand-written modules and exports of Keras 3 ask for nothing, so the replicas' statistics
    drift apart, and only the first one's are saved. An aggregation that a model asks for is kept. Trainable
    variables cannot be read in this way and stay as they are. So does a model in TensorFlow 1's format, which no
    strategy loads.
    """

    name: ClassVar[str] = "aggregate-statistics"

    def edits(self, model: Model) -> Iterable[Edit]:
        """Yield one edit for each moving statistic that a training function updates."""
        if not model.object_based:
            return
        for bn in model.analysis(batch_norms):
            if any(site.training for site in bn.sites):
                for role in STATISTICS:
                    variable = model.variables.get(bn.variables.get(role, ""))
                    if variable is None or variable.trainable:
                        continue
                    if (variable.synchronization, variable.aggregation) == (AUTO, NONE):
                        yield Synchronize(variable.key, ON_READ, MEAN)
