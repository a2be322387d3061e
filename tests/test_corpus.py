"""Public models, made by others: each one goes through, or is declined for a stated reason."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import bnqat
from tests import harness
from tests.test_contract import OFF, PLAIN_USER

pytestmark = pytest.mark.corpus

DECLINED = {
    "FlorianColombo+xtrack+1": "its gamma is a constant that its function captures",
    "MaybeShewill-CV+CRNN_Tensorflow+1": "TensorFlow 1's format",
    "idealo+image-quality-assessment+1": "TensorFlow 1's format",
    "intel-analytics+analytics-zoo+1": "TensorFlow 1's format",
    "kupcimat+tello+1": "the op is FusedBatchNorm",
}
PLAIN_LOAD = """
import sys
import tensorflow as tf
sys.modules["tf_keras"] = None
try:
    tf.saved_model.load(sys.argv[1])
except AttributeError as e:
    assert "add_slot" in str(e)  # its optimizer's slots
    print("fails")
"""


def test_each_public_model_goes_through_or_is_declined(corpus_model: Path, tmp_path: Path) -> None:
    before = harness.digest(corpus_model)
    target = tmp_path / "out"
    reason = DECLINED.get(corpus_model.name)
    if reason is not None:
        with pytest.raises(bnqat.Error, match=reason):
            bnqat.rewrite(corpus_model, target)
        assert list(tmp_path.iterdir()) == []
    else:
        report = bnqat.rewrite(corpus_model, target, bits=4, start_step=OFF)
        assert report.sites_rewritten == report.sites_found > 0
        serves_as_the_source_in_a_v1_session(corpus_model, target)
        command = [sys.executable, "-c", PLAIN_LOAD, str(corpus_model)]
        loading = subprocess.run(command, capture_output=True, text=True, check=False)
        assert loading.stdout == "fails\n", f"the source loads plainly now: {loading.stderr[-500:]}"
        switched_on = tmp_path / "on"
        bnqat.rewrite(corpus_model, switched_on, bits=4)
        command = [sys.executable, "-c", PLAIN_USER, str(switched_on), str(tmp_path / "again")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.stdout == "fine\n", done.stderr[-2000:]
    assert harness.digest(corpus_model) == before


def serves_as_the_source_in_a_v1_session(source: Path, target: Path) -> None:
    """Bit for bit with the switch off; V1 sessions load the sources too, which plain loading does not."""
    rng = np.random.default_rng(0)
    outputs = []
    feeds: dict[str, np.ndarray] = {}
    for path in (source, target):
        with tf.Graph().as_default(), tf.compat.v1.Session() as session:
            signature = tf.compat.v1.saved_model.load(session, ["serve"], str(path)).signature_def["serving_default"]
            for name, tensor in signature.inputs.items():
                shape = [2, *(d.size for d in tensor.tensor_shape.dim[1:])]
                feeds.setdefault(name, rng.normal(0.2, 1, shape).astype("float32"))
            feed = {signature.inputs[k].name: v for k, v in feeds.items()}
            outputs.append(session.run({k: t.name for k, t in signature.outputs.items()}, feed))
    assert outputs[0].keys() == outputs[1].keys()
    for name, value in outputs[0].items():
        np.testing.assert_array_equal(value, outputs[1][name])
