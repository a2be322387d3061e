"""Public models made by others, used by someone who has neither bnqat nor Keras 2.

A few of each kind, as this loads and saves a model several times; test_survey.py takes every model through all columns.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import bnqat
import passes
from passes.weights.kernels import KERNELS
from rewriter.savedmodel.read import load
from tests.conftest import PUBLIC
from tests.reliability.forks import Server
from tests.test_contract import PLAIN_USER

pytestmark = pytest.mark.corpus

KERAS = ("mlcommons+tiny+1", "spotify+basic-pitch+1")
"""Compiled Keras 2 models, which plain loading does not take as they came."""

V1 = ("MaybeShewill-CV+CRNN_Tensorflow+1", "intel-analytics+analytics-zoo+1")
"""Those of TensorFlow 1's format: of slim, with reference variables, and of Keras, with resource variables."""

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


V1_USER = """
import sys
import numpy as np, tensorflow as tf
for name in ("bnqat", "rewriter", "passes", "tf_keras"):
    sys.modules[name] = None  # cannot be imported
m = tf.saved_model.load(sys.argv[1])
(name,) = set(m.signatures) - {"train"}
train, serve = m.signatures["train"], m.signatures[name]
specs = train.structured_input_signature[1]
sizes = {k: [s.shape[0] or 3, *(d or 32 for d in s.shape[1:])] for k, s in specs.items()}
x = {k: tf.random.stateless_normal(size, [1, 2]) for k, size in sizes.items()}
variables = {v.name: v for v in m.variables}
own = {k: v for k, v in variables.items() if not k.startswith("quantization/")}
moving = {k: v.numpy() for k, v in own.items() if "moving" in k and k.endswith(("mean:0", "variance:0"))}
assert moving
before = tf.nest.flatten(serve(**x))
for _ in range(2):
    train(**x)
assert variables["quantization/step:0"].numpy() == 2
assert all(not np.array_equal(variables[k].numpy(), old) for k, old in moving.items())
after = tf.nest.flatten(serve(**x))
decoded = not any(a.dtype.is_floating for a in after)  # a decoder may still say the same
assert decoded or any(not np.array_equal(a, b) for a, b in zip(before, after))
tf.saved_model.save(m, sys.argv[2], signatures=dict(m.signatures))
n = tf.saved_model.load(sys.argv[2])
for a, b in zip(after, tf.nest.flatten(n.signatures[name](**x))):
    np.testing.assert_array_equal(a, b)
n.signatures["train"](**x)
print("fine")
"""


@pytest.mark.parametrize("name", [*KERAS, *V1])
def test_whoever_has_only_tensorflow_loads_trains_and_saves_the_result(
    name: str, plain_forks: Server, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source = public(name, request)
    if name in KERAS:
        loading = plain_forks.python(PLAIN_LOAD, source)
        assert loading.out == "fails\n", loading.err[-500:]
    bnqat.rewrite(source, tmp_path / "out", bits=dict.fromkeys(passes.roles(), 4))
    done = plain_forks.python(V1_USER if name in V1 else PLAIN_USER, tmp_path / "out", tmp_path / "again")
    assert done.out == "fine\n", done.err[-2000:]


WEIGHTS = {
    "ArmDeveloperEcosystem+ml-image-classification-example-for-openmv+1": 28,
    "FlorianColombo+xtrack+1": 29,
    "JetBrains+KotlinDL+1": 5,
    "MaybeShewill-CV+CRNN_Tensorflow+1": 12,
    "idealo+image-quality-assessment+1": 28,
    "intel-analytics+analytics-zoo+1": 3,
    "kupcimat+tello+1": 53,
    "mlcommons+tiny+1": 10,
    "spotify+basic-pitch+1": 9,
}
"""The number of weights of each model: filters and matrices, and the constants that basic-pitch transforms with."""


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_weight_is_quantised(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    report = bnqat.rewrite(
        public(name, request), tmp_path / "q", bits={"weight": 8}, scheme={"batch_norm": "none"}, dry_run=True
    )
    assert len([q for q in report.quantizers if q.role == "weight"]) == WEIGHTS[name]
    source = load(public(name, request))
    ops = {source.graphs[s.graph].nodes[s.node].op for s in report.skipped if s.node in source.graphs[s.graph].nodes}
    assert not ops & KERNELS.keys()


def public(name: str, request: pytest.FixtureRequest) -> Path:
    if not PUBLIC:
        pytest.skip("corpus absent: BNQAT_CORPUS is not set")
    folder: Path = request.getfixturevalue("corpus")
    return folder / name
