"""Batch norm in every op, layout, dtype and arithmetic in which it is found, as `tf.Module`s."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tests.models import perturb

EPSILON = 1e-3
MOMENTUM = 0.9


class Variables(tf.Module):
    """The four variables of one layer; gamma or beta may be absent."""

    def __init__(self, channels: int, scale: bool = True, center: bool = True, dtype: Any = tf.float32) -> None:
        super().__init__()
        self.gamma = tf.Variable(tf.ones([channels], dtype), name="gamma") if scale else None
        self.beta = tf.Variable(tf.zeros([channels], dtype), name="beta") if center else None
        self.moving_mean = tf.Variable(tf.zeros([channels], dtype), trainable=False, name="moving_mean")
        self.moving_variance = tf.Variable(tf.ones([channels], dtype), trainable=False, name="moving_variance")
        perturb(self.variables)


Norm = Callable[[tf.Tensor, Variables, bool], tf.Tensor]
Update = Callable[[Variables, tf.Tensor, tf.Tensor], None]


def kernel_average(v: Variables, mean: tf.Tensor, variance: tf.Tensor) -> None:
    """The kernel's outputs are the averages."""
    v.moving_mean.assign(mean)
    v.moving_variance.assign(variance)


def assign_sub(v: Variables, mean: tf.Tensor, variance: tf.Tensor) -> None:
    """m -= (m - b) (1 - d)."""
    decay = tf.constant(1.0) - MOMENTUM
    for variable, batch in ((v.moving_mean, mean), (v.moving_variance, variance)):
        variable.assign_sub((variable - tf.cast(batch, variable.dtype)) * tf.cast(decay, variable.dtype))


def assign(v: Variables, mean: tf.Tensor, variance: tf.Tensor) -> None:
    """m = d m + (1 - d) b."""
    for variable, batch in ((v.moving_mean, mean), (v.moving_variance, variance)):
        variable.assign(MOMENTUM * variable + (1 - MOMENTUM) * batch)


def momentum_tensor(momentum: tf.Variable) -> Update:
    """The momentum is a variable's value."""

    def update(v: Variables, mean: tf.Tensor, variance: tf.Tensor) -> None:
        for variable, batch in ((v.moving_mean, mean), (v.moving_variance, variance)):
            variable.assign(momentum * variable + (1 - momentum) * batch)

    return update


def zero_debiased(biased: Mapping[str, Any]) -> Update:
    """A biased average starts at zero; the moving average is that average without its bias."""

    def update(v: Variables, mean: tf.Tensor, variance: tf.Tensor) -> None:
        biased["step"].assign_add(1.0)
        for name, variable, batch in (("mean", v.moving_mean, mean), ("variance", v.moving_variance, variance)):
            biased[name].assign_sub((biased[name] - batch) * (1 - MOMENTUM))
            correction = 1 - tf.pow(MOMENTUM, biased["step"].read_value())
            variable.assign_sub(variable - biased[name].read_value() / correction)

    return update


def fused(op: str, update: Update = assign_sub, layout: str = "NHWC") -> Norm:
    """One of the fused ops."""
    raw = getattr(tf.raw_ops, op)

    def norm(x: tf.Tensor, v: Variables, training: bool) -> tf.Tensor:
        channels = v.moving_mean.shape[0]
        gamma = tf.ones([channels]) if v.gamma is None else v.gamma
        beta = tf.zeros([channels]) if v.beta is None else v.beta
        average = training and update is kernel_average
        empty = tf.constant([], tf.float32)
        keep = not training or average
        arguments: dict[str, Any] = {"epsilon": EPSILON, "is_training": training, "data_format": layout}
        if average:
            arguments["exponential_avg_factor"] = 1 - MOMENTUM
        mean, variance = (v.moving_mean, v.moving_variance) if keep else (empty, empty)
        y, mean, variance, *_ = raw(x=x, scale=gamma, offset=beta, mean=mean, variance=variance, **arguments)
        if training:
            update(v, mean, variance)
        return y

    return norm


def _statistics(x: tf.Tensor, v: Variables, training: bool, axis: int = -1) -> tuple[tf.Tensor, tf.Tensor]:
    if not training:
        return tf.convert_to_tensor(v.moving_mean), tf.convert_to_tensor(v.moving_variance)
    axes = [i for i in range(x.shape.rank) if i != axis % x.shape.rank]
    mean, variance = tf.nn.moments(tf.cast(x, v.moving_mean.dtype), axes)
    assign_sub(v, mean, variance)
    return mean, variance


def library(x: tf.Tensor, v: Variables, training: bool) -> tf.Tensor:
    """`tf.nn.batch_normalization`, over the last axis."""
    mean, variance = _statistics(x, v, training)
    return tf.nn.batch_normalization(x, mean, variance, v.beta, v.gamma, EPSILON)


def channels_first(x: tf.Tensor, v: Variables, training: bool) -> tf.Tensor:
    """`tf.nn.batch_normalization` over axis 1, with parameters reshaped to be broadcast."""
    mean, variance = _statistics(x, v, training, axis=1)
    shape = [1, -1] + [1] * (x.shape.rank - 2)
    mean, variance, beta, gamma = (tf.reshape(p, shape) for p in (mean, variance, v.beta, v.gamma))
    return tf.nn.batch_normalization(x, mean, variance, beta, gamma, EPSILON)


def centred(x: tf.Tensor, v: Variables, training: bool) -> tf.Tensor:
    """Subtract first, multiply by the inverse square root, then scale and shift."""
    mean, variance = _statistics(x, v, training)
    return v.beta + v.gamma * ((x - mean) * tf.math.rsqrt(variance + EPSILON))


def divided(x: tf.Tensor, v: Variables, training: bool) -> tf.Tensor:
    """The textbook's form, with a division by a square root."""
    mean, variance = _statistics(x, v, training)
    return v.gamma * ((x - mean) / tf.sqrt(variance + EPSILON)) + v.beta


def expanded(x: tf.Tensor, v: Variables, training: bool) -> tf.Tensor:
    """Over axis 1, with parameters expanded one axis at a time."""
    mean, variance = _statistics(x, v, training, axis=1)
    mean, variance, beta, gamma = (tf.expand_dims(tf.expand_dims(p, -1), -1) for p in (mean, variance, v.beta, v.gamma))
    return tf.nn.batch_normalization(x, mean, variance, beta, gamma, EPSILON)


def indexed(x: tf.Tensor, v: Variables, training: bool) -> tf.Tensor:
    """Over axis 1, with parameters indexed as arrays are."""
    mean, variance = _statistics(x, v, training, axis=1)
    mean, variance, beta, gamma = (
        tf.convert_to_tensor(p)[tf.newaxis, :, tf.newaxis, tf.newaxis] for p in (mean, variance, v.beta, v.gamma)
    )
    return (x - mean) / tf.sqrt(variance + EPSILON) * gamma + beta


def textbook(x: tf.Tensor, v: Variables, training: bool) -> tf.Tensor:
    """The formula in the order in which it is read aloud, from left to right."""
    mean, variance = _statistics(x, v, training)
    return v.gamma * (x - mean) / tf.sqrt(variance + EPSILON) + v.beta


def powers(x: tf.Tensor, v: Variables, training: bool) -> tf.Tensor:
    """With a power in place of a square root."""
    mean, variance = _statistics(x, v, training)
    return (x - mean) * (variance + EPSILON) ** -0.5 * v.gamma + v.beta


def by_hand(x: tf.Tensor, v: Variables, training: bool) -> tf.Tensor:
    """The arithmetic that engineers write by hand."""
    mean, variance = _statistics(x, v, training)
    inv = tf.math.rsqrt(variance + EPSILON) * v.gamma
    return (x * inv) - (mean * inv) + v.beta


def mixed(x: tf.Tensor, v: Variables, training: bool) -> tf.Tensor:
    """Half activations with float32 variables, cast for use."""
    half = tf.cast(x, tf.float16)
    mean, variance = (tf.cast(s, tf.float16) for s in _statistics(half, v, training))
    beta, gamma = (tf.cast(p, tf.float16) for p in (v.beta, v.gamma))
    y = tf.nn.batch_normalization(half, mean, variance, beta, gamma, EPSILON)
    return tf.cast(y, tf.float32)


class Form(tf.Module):
    """Two layers of one form with a product between them; `train` where the source is to have it."""

    def __init__(
        self,
        norm: Norm,
        shape: tuple[int, ...],
        *,
        train: bool = False,
        axis: int = -1,
        dtype: Any = tf.float32,
        extra: Any = None,
        **layer: Any,
    ) -> None:
        super().__init__(name="form")
        rng = np.random.default_rng(5)
        channels = shape[axis - 1] if axis > 0 else shape[axis]
        self.norm, self.axis, self.dtype, self.extra = norm, axis, dtype, extra
        self.layers = [Variables(channels, **layer), Variables(channels, **layer)]
        self.mix = tf.Variable(rng.normal(0, 0.6, (channels, channels)).astype("float32"), name="mix")
        spec = tf.TensorSpec((None, *shape), name="x")
        self.serve = tf.function(lambda x: self.call(x, training=False), input_signature=[spec])
        if train:
            self.train = tf.function(lambda x: self.call(x, training=True), input_signature=[spec])

    def call(self, x: tf.Tensor, training: bool) -> tf.Tensor:
        """Apply the layers, each after a mix of channels."""
        for layer in self.layers:
            mixed_up = tf.tensordot(x, self.mix, [[self.axis % x.shape.rank], [0]])
            if self.axis != -1:
                rank = x.shape.rank
                mixed_up = tf.transpose(mixed_up, [0, rank - 1, *range(1, rank - 1)])
            mixed_up = tf.ensure_shape(mixed_up, x.shape)
            y = self.norm(tf.cast(mixed_up, self.dtype), layer, training)
            x = tf.nn.relu(tf.cast(y, tf.float32))
        return x


def save(module: tf.Module, path: Path) -> Path:
    """Save with `serve` as the default signature."""
    tf.saved_model.save(module, str(path), signatures={"serving_default": module.serve})
    return path


IMAGE, VIDEO, VECTOR, SEQUENCE = (4, 4, 6), (3, 4, 4, 6), (6,), (5, 6)


def _debiased(op: str) -> Form:
    biased = {
        "mean": tf.Variable(tf.zeros([6]), trainable=False, name="biased_mean"),
        "variance": tf.Variable(tf.zeros([6]), trainable=False, name="biased_variance"),
        "step": tf.Variable(0.0, trainable=False, name="local_step"),
    }
    form = Form(fused(op, zero_debiased(biased)), IMAGE, train=True, extra=biased)
    form.layers = form.layers[:1]
    return form


def _momentum_tensor() -> Form:
    momentum = tf.Variable(MOMENTUM, trainable=False, name="momentum")
    return Form(fused("FusedBatchNormV3", momentum_tensor(momentum)), IMAGE, train=True, extra=momentum)


def _shared() -> Form:
    form = Form(library, IMAGE, train=True)
    form.layers = [form.layers[0], form.layers[0]]
    return form


def _double() -> Form:
    form = Form(library, VECTOR, dtype=tf.float64)
    form.layers = [Variables(6, dtype=tf.float64), Variables(6, dtype=tf.float64)]
    return form


FORMS: dict[str, Callable[[], Form]] = {
    "form_v1": lambda: Form(fused("FusedBatchNorm"), IMAGE),
    "form_v1_train": lambda: Form(fused("FusedBatchNorm"), IMAGE, train=True),
    "form_v2": lambda: Form(fused("FusedBatchNormV2"), IMAGE),
    "form_v2_half": lambda: Form(fused("FusedBatchNormV2"), IMAGE, train=True, dtype=tf.float16),
    "form_v3_half": lambda: Form(fused("FusedBatchNormV3", kernel_average), IMAGE, train=True, dtype=tf.float16),
    "form_v3_bfloat16": lambda: Form(fused("FusedBatchNormV3"), IMAGE, dtype=tf.bfloat16),
    "form_v3_video": lambda: Form(fused("FusedBatchNormV3", layout="NDHWC"), VIDEO),
    "form_v3_channels_first": lambda: Form(fused("FusedBatchNormV3", layout="NCHW"), (6, 4, 4), train=True, axis=1),
    "form_v3_video_channels_first": lambda: Form(
        fused("FusedBatchNormV3", kernel_average, "NCDHW"), (6, 3, 4, 4), train=True, axis=1
    ),
    "form_v3_no_scale": lambda: Form(fused("FusedBatchNormV3"), IMAGE, scale=False),
    "form_v3_no_centre": lambda: Form(fused("FusedBatchNormV3"), IMAGE, train=True, center=False),
    "form_update_kernel": lambda: Form(fused("FusedBatchNormV3", kernel_average), IMAGE, train=True),
    "form_update_assign": lambda: Form(fused("FusedBatchNormV3", assign), IMAGE, train=True),
    "form_update_assign_sub": lambda: Form(fused("FusedBatchNormV3"), IMAGE, train=True),
    "form_update_debiased": lambda: _debiased("FusedBatchNormV3"),
    "form_momentum_tensor": _momentum_tensor,
    "form_shared": _shared,
    "form_library_vector": lambda: Form(library, VECTOR),
    "form_library_sequence": lambda: Form(library, SEQUENCE, train=True),
    "form_library_image": lambda: Form(library, IMAGE),
    "form_library_video": lambda: Form(library, VIDEO, train=True),
    "form_library_no_scale": lambda: Form(library, IMAGE, scale=False),
    "form_library_no_centre": lambda: Form(library, IMAGE, center=False),
    "form_library_bare": lambda: Form(library, IMAGE, train=True, scale=False, center=False),
    "form_channels_first": lambda: Form(channels_first, (6, 4, 4), axis=1),
    "form_channels_first_train": lambda: Form(channels_first, (6, 4, 4), train=True, axis=1),
    "form_centred": lambda: Form(centred, VECTOR),
    "form_divided": lambda: Form(divided, IMAGE, train=True),
    "form_expanded": lambda: Form(expanded, (6, 6, 6), axis=1),
    "form_indexed": lambda: Form(indexed, (6, 6, 6), train=True, axis=1),
    "form_textbook": lambda: Form(textbook, IMAGE),
    "form_powers": lambda: Form(powers, VECTOR, train=True),
    "form_by_hand": lambda: Form(by_hand, IMAGE),
    "form_mixed": lambda: Form(mixed, IMAGE),
    "form_float64": _double,
}


def _maker(make: Callable[[], Form]) -> Callable[[Path], Path]:
    return lambda path: save(make(), path)


FORM_MODELS: dict[str, Callable[[Path], Path]] = {name: _maker(make) for name, make in FORMS.items()}
