"""Detectors: batch norms before boxes and scores, of which non-maximum suppression chooses some."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorflow as tf

from tests.models import Net, save_module
from tests.models.v1 import Options, net, settings, two_fused, write

ANCHORS, CLASSES, KEPT = 64, 2, 5


def heads(features: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Return boxes [batch, anchors, 4] and the scores of their classes, in nodes called `boxes` and `scores`."""
    corners = tf.reshape(tf.sigmoid(features[..., :4]), [-1, ANCHORS, 4])
    ends = corners[..., :2] + corners[..., 2:]
    boxes = tf.concat([corners[..., :2], ends], -1, name="boxes")
    return boxes, tf.reshape(tf.sigmoid(features[..., 4 : 4 + CLASSES]), [-1, ANCHORS, CLASSES], name="scores")


def combined(boxes: tf.Tensor, scores: tf.Tensor) -> dict[str, tf.Tensor]:
    """Return each image's best boxes of all classes; every output is a float without a gradient."""
    detections = tf.image.combined_non_max_suppression(boxes[:, :, None], scores, KEPT, KEPT)
    return {"detection_boxes": detections.nmsed_boxes, "detection_scores": detections.nmsed_scores}


def soft(boxes: tf.Tensor, scores: tf.Tensor) -> dict[str, tf.Tensor]:
    """Return the first image's selected boxes, by `tf.gather`, and the scores that soft suppression reduces."""
    selected, kept_scores = tf.image.non_max_suppression_with_scores(
        boxes[0], scores[0, :, 0], KEPT, soft_nms_sigma=0.5
    )
    return {"detection_boxes": tf.gather(boxes[0], selected), "detection_scores": kept_scores}


Suppression = Callable[[tf.Tensor, tf.Tensor], dict[str, tf.Tensor]]


class Detector(Net):
    """A detector that serves its boxes and scores after suppression.

    `nested` puts the heads into a function that the serving function calls; `twice` calls it twice.
    """

    def __init__(self, suppression: Suppression = combined, nested: bool = False, twice: bool = False) -> None:
        super().__init__()
        self.suppression = suppression
        self.heads: Any = tf.function(heads) if nested or twice else heads
        self.twice = twice

    def features(self, x: tf.Tensor, training: bool) -> tf.Tensor:
        for kernel, norm in zip(self.kernels, self.norms, strict=True):
            x = self.activation(norm(tf.nn.conv2d(x, kernel, 1, "SAME"), training))
        return x

    def call(self, x: tf.Tensor, training: bool) -> dict[str, tf.Tensor]:
        features = self.features(x, training)
        boxes, scores = self.heads(features)
        if self.twice:
            boxes = (boxes + self.heads(features * 2.0)[0]) / 2.0
        return self.suppression(boxes, scores)


class TrainableDetector(Detector):
    """A detector with the source's own training function."""

    @tf.function(input_signature=[tf.TensorSpec((None, 8, 8, 3), name="x")])
    def train(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        return self.call(x, training=True)


def v1_detector(path: Path) -> Path:
    """A detector in TensorFlow 1's format, which also returns its scores as they were before suppression."""
    options = Options(training=False)
    with settings(options):
        x, logits = net(two_fused, training=False, options=options)
        features = tf.tile(logits[:, None, None], [1, 8, 8, 2])
        boxes, scores = heads(features)
        outputs = combined(boxes, scores) | {"raw_scores": tf.identity(scores)}
        write(path, {"x": x}, outputs)
    return path


DETECTORS: dict[str, Callable[[Path], Path]] = {
    "detector": lambda p: save_module(Detector(), p),
    "detector_soft": lambda p: save_module(Detector(soft), p),
    "detector_nested": lambda p: save_module(Detector(nested=True), p),
    "detector_train": lambda p: save_module(TrainableDetector(), p),
    "v1_detector": v1_detector,
}
"""All makers by name; each writes one SavedModel."""
