"""A form's batch norm, for graphs and for functions: statistics, choice, arithmetic and updates."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf
from tensorflow.python.framework.smart_cond import smart_cond
from tensorflow.python.training.moving_averages import assign_moving_average

from tests.models.handwritten.form import Form

v1 = tf.compat.v1

EPSILON = 1e-3
MOMENTUM = 0.9

Pair = tuple[Any, Any]
"""A mean and a variance."""


@dataclass
class Layer:
    """The variables of one batch norm.

    Attributes:
        gamma, beta: None where the form has none.
        moving_mean, moving_variance: None until ``ExponentialMovingAverage`` has made them.
        biased: of mean and variance, a biased average and a count of updates, where the library does not keep them.
    """

    gamma: Any = None
    beta: Any = None
    moving_mean: Any = None
    moving_variance: Any = None
    biased: Sequence[tuple[Any, Any]] = ()


@dataclass
class HandWritten:
    """One batch norm of x.

    Attributes:
        training: the mode, a Python bool or a boolean tensor.
        momentum: a number or a scalar tensor.
        reads: moving statistics that were read before their updates; None where they are read when they are used.
    """

    form: Form
    x: tf.Tensor
    layer: Layer
    training: Any
    momentum: Any
    reads: Pair | None = None

    def __call__(self) -> tuple[tf.Tensor, list[Any]]:
        """Return the output, and the update ops that the caller has to run."""
        form = self.form
        outside = None if form.branches == "inside" else self._batch_results()
        updates: list[Any] = []
        if form.averaged == "batch" and form.placement != "branch" and outside is not None:
            updates = self._packed(outside[1:])
        if self.training is False:
            updates = []  # they have made the averages
        if form.chosen == "output":
            y, *statistics = self._choice_of_outputs(outside, updates)
        else:
            statistics = list(self._choice_of_statistics(outside))
        if form.averaged == "chosen":
            updates = self._packed(statistics)
        if form.chosen != "output":
            with self._waiting(updates):
                y = self._normalised(self._x(updates), *statistics)
        if form.placement == "output":
            with tf.control_dependencies(updates):
                y = tf.identity(y)
        return y, updates if form.placement == "collection" else []

    def _batch_results(self) -> Sequence[Any] | None:
        """The output in training, which may be None, and the batch's statistics, computed before the choice."""
        if self.training is False and self.form.updates != "ema":
            return None
        if self.form.arithmetic == "kernels":
            return self._kernel(training=True)
        return (None, *self._moments())

    def _choice_of_statistics(self, outside: Sequence[Any] | None) -> Sequence[Any]:
        every = [[0], [1]] if self.form.chosen == "each" else [[0, 1]]
        return [s for some in every for s in self._chosen(*self._branches_of_statistics(outside, some))]

    def _branches_of_statistics(self, outside: Sequence[Any] | None, some: list[int]) -> Any:
        """Return two functions: of some of the batch's statistics, and of the moving ones."""

        def train() -> list[Any]:
            batch = self._moments() if outside is None else outside[1:]
            return self._updated([batch[i] for i in some], some, batch)

        def infer() -> list[Any]:
            return [self._passed(self._moving()[i]) for i in some]

        return train, infer

    def _choice_of_outputs(self, outside: Sequence[Any] | None, updates: list[Any]) -> Sequence[Any]:
        """The chosen output and, if the averages take them, the chosen statistics."""
        form = self.form
        both = [0, 1] if form.averaged == "chosen" else []
        trained = inferred = None
        if outside is not None and self.training is not False:
            with self._waiting(updates):
                trained = outside[0] if outside[0] is not None else self._normalised(self._x(updates), *outside[1:])
        if form.branches != "inside" and self.training is not True:
            inferred = self._inferred(updates)

        def train() -> list[Any]:
            y, *batch = (trained, *outside[1:]) if outside is not None else self._trained()
            return self._updated([y, *(batch[i] for i in both)], [0, 1], batch)

        def infer() -> list[Any]:
            y = self._inferred(updates) if inferred is None else inferred
            return [self._passed(t) for t in (y, *(self._moving()[i] for i in both))]

        return self._chosen(train, infer)

    def _trained(self) -> Sequence[Any]:
        if self.form.arithmetic == "kernels":
            return self._kernel(training=True)
        batch = self._moments()
        return (self._normalised(self.x, *batch), *batch)

    def _inferred(self, updates: list[Any]) -> tf.Tensor:
        with self._waiting(updates):
            if self.form.arithmetic == "kernels":
                return self._kernel(training=False)[0]
            return self._normalised(self._x(updates), *self._moving())

    def _updated(self, results: list[Any], some: list[int], batch: Sequence[Any]) -> list[Any]:
        """The results of the branch for training, after its updates if they are placed there."""
        updates = self._packed(batch, some) if self.form.placement == "branch" else []
        with tf.control_dependencies(updates):
            return [tf.identity(t) if updates else self._passed(t) for t in results]

    def _passed(self, tensor: Any) -> Any:
        return tf.identity(tensor) if self.form.branches == "identities" else tensor

    def _chosen(self, train: Callable[[], list[Any]], infer: Callable[[], list[Any]]) -> Sequence[Any]:
        """The results of the branch for the mode."""
        chooser = self.form.chooser
        if chooser == "python":
            return train() if self.training else infer()
        if chooser == "where":
            return [tf.where(self.training, a, b) for a, b in zip(train(), infer(), strict=True)]
        if chooser == "case":
            chosen = tf.case([(self.training, train)], default=infer)
        else:
            chosen = (smart_cond if chooser == "smart_cond" else tf.cond)(self.training, train, infer)
        return chosen if isinstance(chosen, list | tuple) else [chosen]

    @contextlib.contextmanager
    def _waiting(self, updates: list[Any]) -> Iterator[None]:
        """Let all ops wait for the updates, where they are control dependencies of the input."""
        with tf.control_dependencies(updates if self.form.placement == "input" else []):
            yield

    def _x(self, updates: list[Any]) -> tf.Tensor:
        return tf.identity(self.x) if self.form.placement == "input" and updates else self.x

    def _moments(self) -> Pair:
        x = tf.cast(self.x, tf.float32) if self.x.dtype.size == 2 else self.x  # bytes
        mean, variance = tf.nn.moments(x, list(range(self.form.rank - 1)))
        return mean, variance

    def _moving(self) -> Pair:
        """Return the moving statistics."""
        return self.reads or (self.layer.moving_mean, self.layer.moving_variance)

    def _normalised(self, x: tf.Tensor, mean: Any, variance: Any) -> tf.Tensor:
        """Normalise x by the form's arithmetic."""
        form, layer = self.form, self.layer
        mean, variance = tf.cast(mean, x.dtype), tf.cast(variance, x.dtype)
        gamma, beta = (None if p is None else tf.cast(p, x.dtype) for p in (layer.gamma, layer.beta))
        if form.arithmetic == "library":
            return tf.nn.batch_normalization(x, mean, variance, beta, gamma, EPSILON)
        inv = tf.math.rsqrt(variance + EPSILON)
        if form.arithmetic == "folded":
            inv = inv if gamma is None else inv * gamma
            y = (x * inv) - (mean * inv)
        else:
            y = (x - mean) * inv
            y = y if gamma is None else y * gamma
        return y if beta is None else y + beta

    def _kernel(self, training: bool) -> Sequence[Any]:
        """The fused kernel's output, mean and variance; it knows ranks 4 and 5 only."""
        x, rank, channels = self.x, self.form.rank, self.x.shape[-1]
        if rank < 4:
            x = tf.reshape(x, [-1, *x.shape[1:-1], *[1] * (4 - rank), channels])
        mean, variance = (None, None) if training else self._moving()
        y, mean, variance = v1.nn.fused_batch_norm(
            x,
            tf.ones([channels]) if self.layer.gamma is None else self.layer.gamma,
            tf.zeros([channels]) if self.layer.beta is None else self.layer.beta,
            mean,
            variance,
            epsilon=EPSILON,
            is_training=training,
            data_format="NDHWC" if rank == 5 else "NHWC",
        )
        return (y if rank >= 4 else tf.reshape(y, [-1, *self.x.shape[1:]]), mean, variance)

    def _packed(self, statistics: Sequence[Any], some: Sequence[int] = (0, 1)) -> list[Any]:
        """Updates of some of the averages, packed as the form has it."""
        if self.form.packing == "cond":
            return [tf.cond(self.training, lambda: tf.group(*self._updates(statistics, some)), tf.no_op)]
        early = self.form.api == "graph" and self.form.unguarded and self.form.averaged == "batch"
        if early and self.form.updates != "ema":  # what inference reads is defined only if it is read before
            self.reads = (tf.identity(self.layer.moving_mean), tf.identity(self.layer.moving_variance))
        with tf.control_dependencies(self.reads or []):
            updates = self._updates(statistics, some)
        return [tf.group(*updates)] if self.form.packing == "group" else updates

    def _updates(self, statistics: Sequence[Any], some: Sequence[int]) -> list[Any]:
        if self.form.updates == "ema":
            average = v1.train.ExponentialMovingAverage(self.momentum)
            update = average.apply([statistics[i] for i in some])
            for i in some:
                setattr(self.layer, ("moving_mean", "moving_variance")[i], average.average(statistics[i]))
            return [update]
        return [self._update(i, statistics[i]) for i in some]

    def _update(self, index: int, batch: Any) -> Any:
        """An update of the moving mean (0) or variance (1)."""
        average = (self.layer.moving_mean, self.layer.moving_variance)[index]
        momentum = self.momentum
        if self.form.updates == "helper" or (self.form.updates == "debiased" and not self.layer.biased):
            return assign_moving_average(average, batch, momentum, zero_debias=self.form.updates == "debiased")
        if isinstance(momentum, tf.Tensor):
            momentum = tf.cast(momentum, average.dtype.base_dtype)
        if self.form.updates == "assign":
            return v1.assign(average, average * momentum + batch * (1 - momentum))
        if self.form.updates == "assign_sub":
            return v1.assign_sub(average, (average - batch) * (1 - momentum))
        biased, count = self.layer.biased[index]  # as assign_moving_average does, whose variables a function loses
        biased.assign_sub((biased - batch) * (1 - momentum))
        count.assign_add(1)
        return average.assign(biased / (1 - tf.pow(tf.cast(momentum, count.dtype), count)))
