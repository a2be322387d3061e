"""Quantised weights in whole models, against the source with the reference's weights: widths, ramps, rules, ranges."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import bnqat
from tests.models import FusedBatchNorm, perturb
from tests.weight_reference import Limits, mse_limit, quantize_weight, weight_limits

F = np.float32
IMAGE = (8, 8, 3)
LAST = (-1,)


class Net(tf.Module):
    """Two convolutions. A batch norm follows the first."""

    def __init__(self) -> None:
        super().__init__()
        rng = np.random.default_rng(0)
        self.first = tf.Variable(rng.normal(0, 0.3, (3, 3, 3, 6)).astype(F), name="first")
        self.second = tf.Variable(rng.normal(0, 0.3, (3, 3, 6, 4)).astype(F), name="second")
        self.norm = FusedBatchNorm(6)
        perturb((self.norm.gamma, self.norm.beta, self.norm.moving_mean, self.norm.moving_variance))

    @tf.function(input_signature=[tf.TensorSpec((None, *IMAGE), name="x")])
    def serve(self, x: Any) -> Any:
        y = tf.nn.relu(self.norm(tf.nn.conv2d(x, self.first, 1, "SAME"), training=False))
        return tf.reduce_mean(tf.nn.conv2d(y, self.second, 1, "SAME"), [1, 2])


X = np.random.default_rng(1).normal(0, 1, (2, *IMAGE)).astype(F)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "m"
    net = Net()
    tf.saved_model.save(net, str(path), signatures={"serving_default": net.serve})
    return path


@pytest.fixture
def quantized(source: Path, tmp_path: Path) -> Callable[..., Any]:
    """Return the source, rewritten with some options for weights and with float batch norms, and loaded."""

    def loaded(**options: Any) -> Any:
        of_weights = {name: {"weight": value} for name, value in options.items() if name in ("bits", "range")}
        scheme = {"batch_norm": "none", **options.get("scheme", {})}
        bnqat.rewrite(source, tmp_path / "q", **{**options, **of_weights, "scheme": scheme})
        return tf.saved_model.load(str(tmp_path / "q"))

    return loaded


def of_source(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return what the source gives with other weights."""
    net = Net()
    net.first.assign(first)
    net.second.assign(second)
    result: np.ndarray = net.serve(X).numpy()
    return result


def weights() -> tuple[np.ndarray, np.ndarray]:
    net = Net()
    return net.first.numpy(), net.second.numpy()


def dynamic(v: np.ndarray, bits: int) -> np.ndarray:
    """Return a weight, quantised as by default; itself for a width of 0."""
    return quantize_weight("symmetric", v, bits, LAST).value if bits else v


def test_widths_of_layers_change_at_run_time(quantized: Callable[..., Any]) -> None:
    model = quantized(bits=8)
    first, second = weights()
    widths = model.quantization.layer_bits.weight
    for of_layers, of_role, expected in [
        ([-1, -1], 8, (8, 8)),
        ([4, -1], 8, (4, 8)),
        ([2, 16], 8, (2, 16)),
        ([-1, 3], 5, (5, 3)),
        ([0, -1], 4, (0, 4)),
        ([-1, -1], 0, (0, 0)),
    ]:
        widths.assign(of_layers)
        model.quantization.bits.weight.assign(of_role)
        wanted = of_source(dynamic(first, expected[0]), dynamic(second, expected[1]))
        np.testing.assert_array_equal(model.serve(X), wanted)
    np.testing.assert_array_equal(wanted, of_source(first, second))  # all are off in the end


def test_a_start_and_a_ramp(quantized: Callable[..., Any]) -> None:
    model = quantized(bits=4, start_step=2, ramp_steps=4)
    for step in range(8):
        model.quantization.step.assign(step)
        a = min(max((step - 2) / 4, 0), 1)
        wanted = of_source(*(dynamic(v, 4) * F(a) + v * F(1 - a) if a else v for v in weights()))
        if a in (0, 1):
            np.testing.assert_array_equal(model.serve(X), wanted)
        else:
            np.testing.assert_allclose(model.serve(X), wanted, rtol=1e-5, atol=1e-6)


def test_rules_by_layer(quantized: Callable[..., Any], tmp_path: Path) -> None:
    config = tmp_path / "rules.toml"
    config.write_text(
        '[defaults.weight]\nbits = 6\n[[rules]]\nmatch = "^first"\nscheme = "affine"\nbits = 3\n'
        '[[rules]]\nmatch = "^second"\ngranularity = "per_tensor"\n'
    )
    first, second = weights()
    wanted = of_source(
        quantize_weight("affine", first, 3, LAST).value, quantize_weight("symmetric", second, 6, ()).value
    )
    model = quantized(config=config)
    np.testing.assert_array_equal(model.serve(X), wanted)


def test_a_rule_leaves_a_layer_float(quantized: Callable[..., Any]) -> None:
    model = quantized(config={"defaults": {"weight": {"bits": 4}}, "rules": [{"match": "second", "scheme": "none"}]})
    first, second = weights()
    np.testing.assert_array_equal(model.serve(X), of_source(dynamic(first, 4), second))


def searched(v: np.ndarray, bits: int) -> np.ndarray:
    """Return the limits of the least squared error, [channels, 2]."""
    m = mse_limit("symmetric", v, bits, LAST)
    return np.stack([-m, m], -1)


def within(v: np.ndarray, limits: np.ndarray, bits: int) -> np.ndarray:
    return quantize_weight("symmetric", v, bits, LAST, limits=Limits(limits[:, 0], limits[:, 1])).value


def test_ranges_of_the_least_error_are_found_at_the_rewrite_and_again(quantized: Callable[..., Any]) -> None:
    model = quantized(bits=3, range="mse")
    limits = model.quantization.range.weight
    first, second = weights()
    found = [searched(v, 3) for v in (first, second)]
    np.testing.assert_array_equal(limits, np.concatenate(found))
    assert (found[0][:, 1] < np.abs(first).max((0, 1, 2))).any()
    wanted = of_source(*(within(v, of, 3) for v, of in zip((first, second), found, strict=True)))
    np.testing.assert_array_equal(model.serve(X), wanted)

    # Other weights, and another width for one of them: the limits stay until they are asked for.
    variables = {v.name.removesuffix(":0"): v for v in model.signatures["train"].graph.variables}
    first, second = (v[..., ::-1, :] * F(1.5) for v in (first, second))
    variables["first"].assign(first)
    variables["second"].assign(second)
    model.quantization.layer_bits.weight.assign([-1, 2])
    np.testing.assert_array_equal(limits, np.concatenate(found))
    assert bnqat.find_ranges(model) == 10
    again = [searched(first, 3), searched(second, 2)]
    np.testing.assert_array_equal(limits, np.concatenate(again))
    wanted = of_source(within(first, again[0], 3), within(second, again[1], 2))
    np.testing.assert_array_equal(model.serve(X), wanted)


def test_a_model_without_ranges_to_find_is_told_so(quantized: Callable[..., Any]) -> None:
    with pytest.raises(bnqat.Error, match="no weight has a range of the least squared error; rewrite with --range"):
        bnqat.find_ranges(quantized(bits=3))


def test_behind_a_batch_norm_a_learned_limit_is_a_fraction(quantized: Callable[..., Any]) -> None:
    """Scaling a kernel leaves its codes where a batch norm follows; elsewhere, the limit is in the weight's units."""
    model = quantized(bits=4, range="learned")
    first, second = weights()
    learned = model.quantization.limit.weight.numpy()
    largest = weight_limits(np.abs(first), LAST).high
    np.testing.assert_array_equal(learned[:6], searched(first, 4)[:, 1] / largest)
    np.testing.assert_array_equal(learned[6:], searched(second, 4)[:, 1])
    variables = {v.name.removesuffix(":0"): v for v in model.signatures["train"].graph.variables}
    codes = []
    for factor in (F(1), F(4)):
        variables["first"].assign(first * factor)
        variables["second"].assign(second * factor)
        m = learned[:6] * (largest * factor)
        of_first = quantize_weight("symmetric", first * factor, 4, LAST, limits=m)
        of_second = quantize_weight("symmetric", second * factor, 4, LAST, limits=learned[6:])
        np.testing.assert_array_equal(model.serve(X), of_source(of_first.value, of_second.value))
        codes.append((of_first.codes, of_second.codes))
    np.testing.assert_array_equal(codes[0][0], codes[1][0])
    assert not np.array_equal(codes[0][1], codes[1][1])
