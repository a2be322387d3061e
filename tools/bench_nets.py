"""Nets that differ only in how they compute batch norm, as SavedModels with a training and a serving step."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorflow as tf

from tests.models import keras_application, perturb
from tests.models.chosen import Norm, moments_inside, two_kernels

SIZE = (96, 96, 3)


def keras3(net: str, path: Path) -> None:
    """Write a net of Keras 3's own layers, which are single ops; `train` and `serve` are two functions."""
    import keras

    keras.utils.set_random_seed(0)
    model = getattr(keras.applications, net)(weights=None, input_shape=SIZE, classes=10)
    perturb(model.weights)
    archive = keras.export.ExportArchive()
    archive.track(model)
    spec = [tf.TensorSpec((None, *SIZE), name="x")]
    archive.add_endpoint("serve", lambda x: model(x, training=False), input_signature=spec)
    archive.add_endpoint("train", lambda x: model(x, training=True), input_signature=spec)
    with contextlib.redirect_stdout(io.StringIO()):
        archive.write_out(str(path), verbose=False)


def keras2(change: Callable[[Any], Any]) -> Callable[[str, Path], None]:
    """Return a writer of Keras 2's model after a change; `train` and `serve` are two functions."""

    def write(net: str, path: Path) -> None:
        model = change(keras_application(net))
        spec = [tf.TensorSpec((None, *SIZE), name="x")]
        module = tf.Module()
        module.held = model.variables
        module.serve = tf.function(lambda x: model(x, training=False), input_signature=spec)
        module.train = tf.function(lambda x: model(x, training=True), input_signature=spec)
        tf.saved_model.save(module, str(path), signatures={"serving_default": module.serve})

    return write


def qkeras(model: Any) -> Any:
    """Replace batch norms by QKeras' with its defaults."""
    import tf_keras
    from qkeras import QBatchNormalization

    def own(layer: Any) -> Any:
        if isinstance(layer, tf_keras.layers.BatchNormalization):
            axis = layer.axis[0] if isinstance(layer.axis, list) else layer.axis
            return QBatchNormalization(axis=axis, momentum=layer.momentum, epsilon=layer.epsilon, name=layer.name)
        return layer.__class__.from_config(layer.get_config())

    changed = tf_keras.models.clone_model(model, clone_function=own)
    changed.set_weights(model.get_weights())
    return changed


def tfmot(model: Any) -> Any:
    """Rewrite a model by TFMOT for quantisation-aware training, which quantises weights and activations."""
    import tensorflow_model_optimization

    return tensorflow_model_optimization.quantization.keras.quantize_model(model)


def tfmot_weights(model: Any) -> Any:
    """Rewrite a model by TFMOT with the quantisers that its default has for kernels, and no others."""
    import tf_keras
    from tensorflow_model_optimization import quantization

    own: Any = quantization.keras.default_8bit
    default: Any = own.Default8BitQuantizeScheme
    registry = own.Default8BitQuantizeRegistry()
    config_type = type(registry.get_quantize_config(tf_keras.layers.Dense(1)))
    types = {config_type.__name__: config_type}

    class Scheme(default):
        """The default, without its transformations, which add quantisers of activations."""

        def get_layout_transformer(self) -> Any:
            return self

        def apply(self, model: Any, config_of_layer: Any) -> tuple[Any, Any]:
            return model, config_of_layer

    def annotated(layer: Any) -> Any:
        config = config_type([], [], quantize_output=False)  # else TFMOT quantises outputs that a kernel's layer reads
        if layer.__class__.__name__ in ("Conv2D", "DepthwiseConv2D", "Dense"):
            config = registry.get_quantize_config(layer)
            config.activation_attrs = []
        types[type(config).__name__] = type(config)
        return quantization.keras.quantize_annotate_layer(layer, config)

    changed = tf_keras.models.clone_model(model, clone_function=annotated)
    changed.set_weights(model.get_weights())
    with tf_keras.utils.custom_object_scope(types):
        return quantization.keras.quantize_apply(changed, Scheme())


def chosen(norm: Norm) -> Callable[[str, Path], None]:
    """Return a writer of a net with hand-written batch norms; the mode is an argument of its only function."""

    def write(net: str, path: Path) -> None:
        import tf_keras

        class Layer(tf_keras.layers.Layer):
            def build(self, shape: Any) -> None:
                for name, initial in (("gamma", "ones"), ("beta", "zeros")):
                    setattr(self, name, self.add_weight(name, [shape[-1]], initializer=initial))
                for name, initial in (("moving_mean", "zeros"), ("moving_variance", "ones")):
                    weight = self.add_weight(name, [shape[-1]], initializer=initial, trainable=False)
                    setattr(self, name, weight)

            def call(self, x: Any, training: Any = None) -> Any:
                return norm(x, self, tf.constant(False) if training is None else training)

        def own(layer: Any) -> Any:
            is_norm = isinstance(layer, tf_keras.layers.BatchNormalization)
            return Layer(name=layer.name) if is_norm else layer.__class__.from_config(layer.get_config())

        model = tf_keras.models.clone_model(keras_application(net), clone_function=own)
        perturb(model.weights)
        module = tf.Module()
        module.held = model.variables
        specs = [tf.TensorSpec((None, *SIZE), name="x"), tf.TensorSpec([], tf.bool, name="training")]
        module.serve = tf.function(lambda x, training: model(x, training=training), input_signature=specs)
        tf.saved_model.save(module, str(path), signatures={"serving_default": module.serve})

    return write


NETS: dict[str, Callable[[str, Path], None]] = {
    "keras3": keras3,
    "by_hand": chosen(moments_inside),
    "two_kernels": chosen(two_kernels),
    "fused": keras2(lambda model: model),
    "qkeras": keras2(qkeras),
    "tfmot": keras2(tfmot),
    "tfmot_weights": keras2(tfmot_weights),
}
"""By form; each writes a net of this name (`MobileNetV2`, `ResNet50`) to a directory."""
