from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import bnqat
from passes.batch_norm.points import BatchNormPoints
from passes.batch_norm.sites import sites
from passes.quantization.choice import Rule
from passes.quantization.controls import step
from passes.quantize import Quantize
from rewriter.edit import Skip
from rewriter.ir import MAIN, Entry, Error, Graph, Model, Spec, Variable
from rewriter.pipeline import Pipeline
from rewriter.savedmodel.read import load
from rewriter.text import from_text, to_text
from tests import harness, reference
from tests.models import FusedBatchNorm, Trainable, perturb, save_module

Paths = Callable[[str], Path]

BEFORE = """\
stateful function f(x: float32, g: resource, b: resource, m: resource, v: resource) -> (y = bn: float32) {
  gamma = ReadVariableOp(g) {dtype: float32}
  beta = ReadVariableOp(b) {dtype: float32}
  mean = ReadVariableOp(m) {dtype: float32}
  variance = ReadVariableOp(v) {dtype: float32}
  bn = FusedBatchNormV3(x, gamma, beta, mean, variance) {T: float32, U: float32, exponential_avg_factor: 0.25}
  new_mean = AssignVariableOp(m, bn:1) {dtype: float32}
  new_variance = AssignVariableOp(v, bn:2) {dtype: float32}
  effect new_mean = new_mean
  effect new_variance = new_variance
}
"""
AFTER = """\
stateful function f(x: float32, g: resource, b: resource, m: resource, v: resource)
gamma = ReadVariableOp(g)
beta = ReadVariableOp(b)
mean = ReadVariableOp(m)
variance = ReadVariableOp(v)
bn = FusedBatchNormV3(x, bn/gamma, bn/beta, mean, variance)
new_mean = AssignVariableOp(m, bn/moving_mean/AddV2)
new_variance = AssignVariableOp(v, bn/moving_variance/AddV2)
bn/Const = Const()
bn/GatherV2 = GatherV2(bits/Minimum, bn/Const, bits/Const)
bn/stacked = Pack(gamma, beta)
bn/quantized = PartitionedCall(amount/SelectV2, bn/GatherV2, bn/stacked)
bn/Unpack = Unpack(bn/quantized)
bn/gamma = PartitionedCall(bn/Unpack, gamma)
bn/beta = PartitionedCall(bn/Unpack:1, beta)
bn/moving_mean/Const = Const()
bn/moving_mean/Mul = Mul(mean, bn/moving_mean/Const)
bn/moving_mean/Const_1 = Const()
bn/moving_mean/GatherV2 = GatherV2(bits/Minimum, bn/moving_mean/Const_1, bits/Const)
bn/moving_mean/moving_mean = PartitionedCall(amount/SelectV2, bn/moving_mean/GatherV2, bn:1)
bn/moving_mean/Const_2 = Const()
bn/moving_mean/Mul_1 = Mul(bn/moving_mean/moving_mean, bn/moving_mean/Const_2)
bn/moving_mean/AddV2 = AddV2(bn/moving_mean/Mul, bn/moving_mean/Mul_1)
bn/moving_variance/Mul = Mul(variance, bn/moving_mean/Const)
bn/moving_variance/Const = Const()
bn/moving_variance/GatherV2 = GatherV2(bits/Minimum, bn/moving_variance/Const, bits/Const)
bn/moving_variance/moving_variance = PartitionedCall(amount/SelectV2, bn/moving_variance/GatherV2, bn:2)
bn/moving_variance/Mul_1 = Mul(bn/moving_variance/moving_variance, bn/moving_mean/Const_2)
bn/moving_variance/AddV2 = AddV2(bn/moving_variance/Mul, bn/moving_variance/Mul_1)
effect new_mean = new_mean
effect new_variance = new_variance
}
"""

CONTROLS = """\
amount/ReadVariableOp = ReadVariableOp(quantization/step)
amount/ReadVariableOp_1 = ReadVariableOp(quantization/start_step)
amount/Sub = Sub(amount/ReadVariableOp, amount/ReadVariableOp_1)
amount/ReadVariableOp_2 = ReadVariableOp(quantization/ramp_steps)
amount/GreaterEqual = GreaterEqual(amount/Sub, amount/ReadVariableOp_2)
amount/Const = Const()
amount/GreaterEqual_1 = GreaterEqual(amount/Sub, amount/Const)
amount/LogicalAnd = LogicalAnd(amount/GreaterEqual, amount/GreaterEqual_1)
amount/Const_1 = Const()
amount/Maximum = Maximum(amount/Sub, amount/Const)
amount/Cast = Cast(amount/Maximum)
amount/Const_2 = Const()
amount/Maximum_1 = Maximum(amount/ReadVariableOp_2, amount/Const_2)
amount/Cast_1 = Cast(amount/Maximum_1)
amount/RealDiv = RealDiv(amount/Cast, amount/Cast_1)
amount/SelectV2 = SelectV2(amount/LogicalAnd, amount/Const_1, amount/RealDiv)
bits/ReadVariableOp = ReadVariableOp(quantization/layer_bits/gamma)
bits/Const = Const()
bits/GreaterEqual = GreaterEqual(bits/ReadVariableOp, bits/Const)
bits/ReadVariableOp_1 = ReadVariableOp(quantization/bits/gamma)
bits/SelectV2 = SelectV2(bits/GreaterEqual, bits/ReadVariableOp, bits/ReadVariableOp_1)
bits/ReadVariableOp_2 = ReadVariableOp(quantization/layer_bits/beta)
bits/GreaterEqual_1 = GreaterEqual(bits/ReadVariableOp_2, bits/Const)
bits/ReadVariableOp_3 = ReadVariableOp(quantization/bits/beta)
bits/SelectV2_1 = SelectV2(bits/GreaterEqual_1, bits/ReadVariableOp_2, bits/ReadVariableOp_3)
bits/ReadVariableOp_4 = ReadVariableOp(quantization/layer_bits/moving_mean)
bits/GreaterEqual_2 = GreaterEqual(bits/ReadVariableOp_4, bits/Const)
bits/ReadVariableOp_5 = ReadVariableOp(quantization/bits/moving_mean)
bits/SelectV2_2 = SelectV2(bits/GreaterEqual_2, bits/ReadVariableOp_4, bits/ReadVariableOp_5)
bits/ReadVariableOp_6 = ReadVariableOp(quantization/layer_bits/moving_variance)
bits/GreaterEqual_3 = GreaterEqual(bits/ReadVariableOp_6, bits/Const)
bits/ReadVariableOp_7 = ReadVariableOp(quantization/bits/moving_variance)
bits/SelectV2_3 = SelectV2(bits/GreaterEqual_3, bits/ReadVariableOp_6, bits/ReadVariableOp_7)
bits/ConcatV2 = ConcatV2(bits/SelectV2, bits/SelectV2_1, bits/SelectV2_2, bits/SelectV2_3, bits/Const)
bits/Maximum = Maximum(bits/ConcatV2, bits/Const)
bits/Const_1 = Const()
bits/Minimum = Minimum(bits/Maximum, bits/Const_1)
"""


def test_text_of_a_training_site() -> None:
    """Parameters pass through quantisers, batched by kind; the moving average's base stays outside."""
    keys = ("gamma", "beta", "moving_mean", "moving_variance")
    variables = {k: Variable(k, f"layer/{k}", "float32", (3,)) for k in keys}
    spec = (Spec("x", "float32", None),)
    graphs = {MAIN: Graph(MAIN, {}), "f": from_text(BEFORE)}
    after = quantized(Model(graphs, variables, {"f": Entry("f", spec, spec, keys)}))
    text = re.sub("quantization_(amount|bits)", r"\1", to_text(after.graphs["f"]))
    lines = [re.sub(r" \{.*| -> .*|, quantization/[^:]*: resource", "", line).strip() for line in text.splitlines()]
    controls = [line for line in lines if line.startswith(("amount", "bits"))]
    reads = [line.split(" = ")[0] for line in controls if "= ReadVariableOp(" in line]
    assert controls == CONTROLS.splitlines()
    # What a call reads of the controls is read before anything later assigns them.
    other_lines = [line for line in lines if line not in controls]
    assert other_lines == [*AFTER.splitlines()[:-1], *(f"effect {read} = {read}" for read in reads), "}"]
    assert "exponential_avg_factor" not in after.graphs["f"].nodes["bn"].attrs
    constants = [after.graphs["f"].nodes[f"bn/moving_mean/{n}"] for n in ("Const", "Const_2")]
    assert [c.attrs["value"].tensor.float_val[0] for c in constants] == [0.75, 0.25]
    added = [k for k in after.variables if k not in variables]
    assert after.entries["f"].captures == (*keys, *sorted(added))


def quantized(model: Model, **options: object) -> Model:
    return Pipeline([Quantize(**options)]).run(model)[0]  # type: ignore[arg-type]


def test_counts_of_a_keras_save(model: Paths) -> None:
    """Four quantisers for each site; two sites in training, three in inference, for each of two layers."""
    after = quantized(load(model("keras_save")))
    quantizers = [n for g in after.graphs.values() for n in g.nodes.values() if "_bnqat" in n.attrs]
    assert len(quantizers) == 2 * 5 * 4
    assert all(n.op == "PartitionedCall" for n in quantizers)
    roles = [json.loads(n.attrs["_bnqat"].s)["role"] for n in quantizers]
    assert {roles.count(r) for r in ("gamma", "beta", "moving_mean", "moving_variance")} == {10}
    functions = {n.attrs["f"].func.name for n in quantizers}
    assert len(functions) == 5  # affine and log, with two epsilons, and a row of a stack; both have eight channels


def test_no_other_attribute_of_a_kernel_changes(model: Paths) -> None:
    before = load(model("mobilenet_short_save"))
    after = quantized(before)
    for site in before.analysis(sites):
        old = before.graphs[site.graph].nodes[site.node]
        new = after.graphs[site.graph].nodes[site.node]
        attrs = {k: v for k, v in old.attrs.items() if k != "exponential_avg_factor"}
        assert dict(new.attrs) == attrs
        assert (new.op, new.after, new.device) == (old.op, old.after, old.device)
        assert new.inputs[0] == old.inputs[0]
        assert (new.inputs[3:] == old.inputs[3:]) is site.training


def test_running_twice_adds_nothing(model: Paths) -> None:
    once = quantized(load(model("module_train")))
    pipeline = Pipeline([Quantize()])
    twice, (step,) = pipeline.run(once)
    assert twice is once
    assert {s.reason for s in step.skipped} == {"already quantised"}
    assert all(isinstance(e, Skip) for e in step.edits)


def test_variables_are_added_once_and_captured_once(model: Paths, rewritten: Callable[..., Path]) -> None:
    after = quantized(load(model("module")), start_step=9)
    assert after.variables[step(after).key].name == "quantization/step"
    assert [v.initial for k, v in after.variables.items() if "start_step" in k] == [9]
    names = [v.name for v in tf.saved_model.load(str(rewritten("keras_export"))).quantization.variables]
    assert len(names) == len(set(names))


def test_averages_stay_in_the_kernel_without_quantisation(model: Paths) -> None:
    after = quantized(load(model("module_train")), providers=(BatchNormPoints("none"),))
    for site in after.analysis(sites):
        assert site.kernel_average is site.training


class SharedUnequally(tf.Module):
    """One function for two layers, of which one has no gamma."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = [FusedBatchNorm(3), FusedBatchNorm(3, scale=False)]
        perturb(v for n in self.norms for v in n.variables)

        def norm(x: tf.Tensor, gamma: tf.Tensor, beta: Any, mean: Any, variance: Any) -> tf.Tensor:
            return tf.raw_ops.FusedBatchNormV3(
                x=x, scale=gamma, offset=beta, mean=mean, variance=variance, is_training=False
            )[0]

        self.norm = tf.function(norm)

    @tf.function(input_signature=[tf.TensorSpec((None, 4, 4, 3), name="x")])
    def serve(self, x: tf.Tensor) -> tf.Tensor:
        for n in self.norms:
            gamma = tf.ones([3]) if n.gamma is None else tf.convert_to_tensor(n.gamma)
            x = self.norm(x, gamma, n.beta, n.moving_mean, n.moving_variance)
        return x


def test_a_role_that_only_one_of_two_layers_has_is_quantised(tmp_path: Path) -> None:
    after = quantized(load(save_module(SharedUnequally(), tmp_path / "m")))
    (shared,) = [s for s in after.analysis(sites) if len(s.binding.origins) == 2]
    assert [tag["role"] for tag in shared.binding.quantized] == ["gamma", "beta", "moving_mean", "moving_variance"]


class OwnGradients(Trainable):
    """A model with a function that has a gradient inside, like an exported training step."""

    @tf.function(input_signature=[tf.TensorSpec((None, 8, 8, 3), name="x")])
    def gradients(self, x: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(self.call(x, training=True) ** 2)
        return tape.gradient(loss, self.kernels[0])


def test_gradients_in_the_graph_use_the_quantised_gamma(tmp_path: Path) -> None:
    bnqat.rewrite(save_module(OwnGradients(), tmp_path / "m"), tmp_path / "out", bits=2)
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    x = harness.images((None, 8, 8, 3))
    stored = loaded.gradients(x)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(loaded.quantization.train(x) ** 2)
    taped = tape.gradient(loss, loaded.kernels[0])
    np.testing.assert_allclose(stored, taped, rtol=0, atol=1e-5 * np.abs(taped).max())


class Twice(tf.Module):
    """Two layers. The first runs in training, then in inference, where its updated averages are read."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = [FusedBatchNorm(6), FusedBatchNorm(6)]
        perturb(v for n in self.norms for v in n.variables)

    @tf.function(input_signature=[tf.TensorSpec((None, 4, 4, 6), name="x")])
    def serve(self, x: tf.Tensor) -> tf.Tensor:
        first, second = self.norms
        return first(second(first(x, training=True), training=False), training=False)


def batched_nodes(graph: Graph) -> set[str]:
    """Return the names of tagged nodes that are outputs of a batched call: a `StatelessCase` on the execution mode."""
    names = set()
    for node in graph.nodes.values():
        if "_bnqat" in node.attrs and graph.nodes[node.inputs[0].node].op == "StatelessCase":
            choice = graph.nodes[node.inputs[0].node]
            assert choice.inputs[node.inputs[0].port - len(choice.attrs["Tout"].list.type)] == node.inputs[1]
            names.add(node.name)
    return names


def tagged(graph: Graph) -> dict[str, dict[str, Any]]:
    return {n.name: json.loads(n.attrs["_bnqat"].s) for n in graph.nodes.values() if "_bnqat" in n.attrs}


def test_vectors_of_several_batch_norms_are_quantised_together(model: Paths) -> None:
    """One op chooses the execution mode of 36 quantisers; its branches run each step of each arithmetic in one op."""
    before = load(model("mobilenet_short_export"))
    after = quantized(before)
    (serve,) = (after.graphs[e.function] for e in before.root_entries("serve"))
    tags = tagged(serve)
    assert len(tags) == 4 * 9
    assert batched_nodes(serve) == set(tags)
    (choice,) = (n for n in serve.nodes.values() if n.op == "StatelessCase")
    off, on, partly = (after.graphs[f.name] for f in choice.attrs["branches"].list.func)
    assert [r.value.node for r in off.results] == list(off.arguments[-4 * 9 :])
    for branch in (on, partly):
        ops = [n.op for n in branch.nodes.values()]
        assert (ops.count("RealDiv"), ops.count("ConcatV2"), ops.count("Log")) == (3, 2, 3)  # log's limits, one by one
    assert sum(n.op == "Round" for n in serve.nodes.values()) == 0  # functions hold the arithmetic


def test_what_is_read_after_an_update_is_quantised_by_itself(tmp_path: Path) -> None:
    source = save_module(Twice(), tmp_path / "m")
    before = load(source)
    after = quantized(before)
    (serve,) = (after.graphs[e.function] for e in before.root_entries("serve"))
    batched, tags = batched_nodes(serve), tagged(serve)
    alone = sorted((tags[n]["layer_name"], tags[n]["role"]) for n in tags if n not in batched)
    joint = sorted((tags[n]["layer_name"], tags[n]["role"]) for n in batched)
    first, second = sorted({tag["layer_name"] for tag in tags.values()})
    assert {(first, "moving_mean"), (first, "moving_variance")} <= set(alone)
    assert {(first, "gamma"), (second, "gamma"), (first, "beta"), (second, "beta")} <= set(joint)
    bnqat.rewrite(source, tmp_path / "off", start_step=2**40, quantize_average="none")
    bnqat.rewrite(source, tmp_path / "on", bits=3)
    x = harness.images((None, 4, 4, 6))
    wanted, off, on = (tf.saved_model.load(str(p)) for p in (source, tmp_path / "off", tmp_path / "on"))
    for _ in range(3):
        np.testing.assert_array_equal(off.serve(x), wanted.serve(x))
    body = harness.concrete(on.serve)
    for name, tag in harness.tags(body).items():
        node = body.graph.get_operation_by_name(name)
        got, raw = harness.fetch(body, [x], [node.outputs[0].name, node.inputs[-1].name])
        wanted = reference.quantize(tag["scheme"], raw, 3, 1e-3).value
        np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-7 if tag["scheme"] == "log" else 0)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (Quantize, {"start_step": -1}),
        (Quantize, {"start_step": 2**63}),
        (Quantize, {"ramp_steps": -1}),
        (Quantize, {"quantizers": {"delta": None}}),
        (Quantize, {"rules": (Rule("", {"delta": None}),)}),
        (BatchNormPoints, {"quantize_average": "all"}),
    ],
)
def test_options_out_of_range(make: Any, options: dict[str, object]) -> None:
    with pytest.raises(Error):
        make(**options)
