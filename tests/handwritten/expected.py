"""The meaning of a form, computed in float64 without TensorFlow."""

from __future__ import annotations

import numpy as np

from tests.handwritten.behaviour import STEPS, Behaviour
from tests.models.handwritten.form import Form
from tests.models.handwritten.nets import CHANNELS, STATISTICS, batch, initial
from tests.models.handwritten.norm import EPSILON, MOMENTUM


class Expected:
    """A net of two batch norms with its moving statistics."""

    def __init__(self, form: Form) -> None:
        self.form = form
        self.moving = [{role: initial(role, i) for role in STATISTICS} for i in range(1 if form.shared else 2)]
        # The library keeps a biased average for every update, even of averages that are shared.
        keepers = len(self.moving) if form.api == "function" else 2
        self.biased = [dict.fromkeys(STATISTICS, np.zeros(CHANNELS)) for _ in range(keepers)]
        self.counts = [0] * keepers

    def run(self, step: int, training: bool) -> np.ndarray:
        """Return the output for a batch; update the moving statistics if the form does."""
        form, x = self.form, batch(self.form, step).astype(np.float64)
        for index in range(2):
            layer = min(index, len(self.moving) - 1)
            x = (np.tanh(x) if index else x) @ initial("mix", index)
            axes = tuple(range(x.ndim - 1))
            statistics = {"moving_mean": x.mean(axes), "moving_variance": x.var(axes)}
            elements = x.size // CHANNELS
            corrected = elements / (elements - 1) if form.arithmetic == "kernels" else 1.0
            # In a function, updates that nothing guards run in inference too, and before the averages are read.
            if training or (form.unguarded and form.averaged == "batch" and form.api == "function"):
                corrected_variance = statistics["moving_variance"] * corrected
                self._update(index, {**statistics, "moving_variance": corrected_variance})
            mean, variance = (statistics if training else self.moving[layer]).values()
            gamma = initial("gamma", layer) if form.scale else 1.0
            beta = initial("beta", layer) if form.center else 0.0
            x = (x - mean) / np.sqrt(variance + EPSILON) * gamma + beta
        return x

    def _update(self, index: int, statistics: dict[str, np.ndarray]) -> None:
        moving, keeper = self.moving[min(index, len(self.moving) - 1)], min(index, len(self.biased) - 1)
        self.counts[keeper] += 1
        for role, value in statistics.items():
            averages = self.biased[keeper] if self.form.updates == "debiased" else moving
            averages[role] = MOMENTUM * averages[role] + (1 - MOMENTUM) * value
            if self.form.updates == "debiased":
                moving[role] = averages[role] / (1 - MOMENTUM ** self.counts[keeper])


def expected(form: Form) -> Behaviour:
    """Return the output in inference, the outputs of training steps, and the moving statistics after them by number."""
    result = Behaviour(served=Expected(form).run(0, training=False))
    net = Expected(form)
    result.outputs = [net.run(step, training=True) for step in range(STEPS)]
    values = [moving[role] for moving in net.moving for role in STATISTICS]
    result.averages = {str(index): value for index, value in enumerate(values)}
    return result
