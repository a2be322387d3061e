"""Tests of ``bnqat verify``: every claim holds on real models, and fails on a model broken in exactly that respect."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

import bnqat
from passes.batch_norm.sites import sites
from passes.quantization.controls import increment, step
from passes.quantization.training_functions import TRAIN
from rewriter.app.verification.claims import FAILS, HOLDS, NOT_APPLICABLE, Claim, Verification, verify
from rewriter.app.verification.running import session_of
from rewriter.edit import Edit, Rewire, Run
from rewriter.expr import Expr, Use, constant, op, read, select, stop_gradient
from rewriter.ir import Edge, Model
from rewriter.pipeline import Pass, Pipeline
from rewriter.savedmodel.read import load
from rewriter.savedmodel.write import save
from tests import harness
from tests.models import FusedBatchNorm, perturb, save_keras, small_keras
from tests.models.chosen import CHOSEN_MODELS
from tests.models.v1 import Options, draw, net, save_v1, settings, two_fused
from tests.reliability.forks import Server

v1 = tf.compat.v1
Paths = Callable[..., Path]
CLAIMS = ("signatures", "off", "on", "statistics", "gradients", "kernels in inference", "kernels in training")
"""Claims for every model; `training` is for models with a training function of their own."""
X = harness.images((None, 8, 8, 3)).numpy()


def statuses(verification: Verification) -> dict[str, str]:
    """Return the statuses, by name, of the claims that apply to every model."""
    return {claim.name: claim.status for claim in verification.claims if claim.name != "training"}


def claim(verification: Verification, name: str) -> Claim:
    return next(c for c in verification.claims if c.name == name)


def broken(verification: Verification) -> list[str]:
    """Return the names of the claims that fail."""
    assert verification.ok is not any(c.status == FAILS for c in verification.claims)
    return [c.name for c in verification.claims if c.status == FAILS]


HOLDING = ["module", "module_train", "module_shared", "keras_save", "v1_two_fused", "keras3", "frozen"]
HOLDING += ["v1_layers_fused_references", "v1_updated_first_if", "form_library_sequence", "form_v3_bfloat16", "if"]
DETAILS = {
    "keras3": {
        "off": "serve within 1e-05 of the largest element, as 2 sites in single ops became the kernel",
        "kernels in inference": "and 2 sites in single ops became the kernel",
    },
    "frozen": {"off": "without constant folding"},
}
"""Details that claims tell besides their status, where single ops became the kernel and of unfrozen constants."""


@pytest.mark.parametrize("name", HOLDING)
def test_every_claim_holds(name: str, model: Paths, rewritten: Paths) -> None:
    options = {"unfreeze_constants": True} if name.startswith("frozen") else {}
    source, result = model(name), rewritten(name, **options)
    before = harness.digest(source), harness.digest(result)
    verification = verify(source, result)
    assert statuses(verification) == dict.fromkeys(CLAIMS, HOLDS)
    assert verification.ok
    assert (harness.digest(source), harness.digest(result)) == before
    document = json.loads(verification.to_json())
    assert document == {"ok": True, **asdict(verification)}
    rows = document["claims"][2]["table"]
    assert rows
    assert all(0 < row["rms"] <= row["largest"] < 1 and 0 < row["relative_rms"] < 0.1 for row in rows)
    assert all(detail in claim(verification, about).detail for about, detail in DETAILS.get(name, {}).items())


def test_where_single_ops_stay_outputs_are_the_same_bits(model: Paths, rewritten: Paths) -> None:
    same = verify(model("keras3"), rewritten("keras3", fuse=False))
    assert "2 outputs the same bit for bit" in claim(same, "off").detail
    assert claim(same, "kernels in inference").status == claim(same, "kernels in training").status == NOT_APPLICABLE


@pytest.mark.parametrize("name", ["chosen_two_kernels_always", "chosen_moments_inside"])
def test_only_the_chosen_mode_may_run(name: str, tmp_path: Path) -> None:
    CHOSEN_MODELS[name](tmp_path / "a")
    bnqat.rewrite(tmp_path / "a", tmp_path / "b")
    assert statuses(verify(tmp_path / "a", tmp_path / "b")) == dict.fromkeys(CLAIMS, HOLDS)


def test_after_training_the_source_runs_with_the_new_values(model: Paths, rewritten: Paths, tmp_path: Path) -> None:
    loaded = tf.saved_model.load(str(rewritten("module", bits=4)))
    for v in loaded.quantization.trainable_variables:
        v.assign(v * 1.1)
    loaded.quantization.train(X)
    tf.saved_model.save(loaded, str(tmp_path / "b"), signatures=dict(loaded.signatures))
    verification = verify(model("module"), tmp_path / "b")
    assert statuses(verification) == dict.fromkeys(CLAIMS, HOLDS)
    assert "the source was run with 10 values that the result was trained to" in claim(verification, "off").detail


def test_values_that_nothing_trained_are_not_excused(model: Paths, rewritten: Paths, tmp_path: Path) -> None:
    loaded = tf.saved_model.load(str(rewritten("module")))
    loaded.norms[1].beta.assign_add(loaded.norms[1].beta)
    tf.saved_model.save(loaded, str(tmp_path / "b"), signatures=dict(loaded.signatures))
    assert broken(verify(model("module"), tmp_path / "b")) == ["off"]


def test_a_trained_model_whose_source_is_frozen_is_not_compared(model: Paths, rewritten: Paths, tmp_path: Path) -> None:
    loaded = tf.saved_model.load(str(rewritten("frozen", unfreeze_constants=True)))
    loaded.quantization.train(X)
    tf.saved_model.save(loaded, str(tmp_path / "b"), signatures=dict(loaded.signatures))
    off = claim(verify(model("frozen"), tmp_path / "b"), "off")
    assert off.status == NOT_APPLICABLE
    assert "trained for 1 steps, and the source holds its parameters as constants" in off.detail


WITHOUT_KERAS = """
import sys
import tensorflow as tf
sys.modules["tf_keras"] = None
from rewriter.app.verification.claims import verify
source, result = sys.argv[1:]
try:
    tf.saved_model.load(source)
except AttributeError as e:
    assert "add_slot" in str(e)  # its optimizer's slots
    print(verify(source, result).to_json())
"""


def test_a_compiled_keras_model_which_plain_loading_refuses(plain_forks: Server, tmp_path: Path) -> None:
    import tf_keras

    net = small_keras()
    net.compile(tf_keras.optimizers.legacy.Adam(), "mse")
    net.fit(np.zeros((4, 8, 8, 3)), np.zeros((4, 10)), verbose=0)
    save_keras(net, tmp_path / "a")
    bnqat.rewrite(tmp_path / "a", tmp_path / "b")
    done = plain_forks.python(WITHOUT_KERAS, tmp_path / "a", tmp_path / "b")
    assert done.code == 0, done.err[-2000:]
    claims = json.loads(done.out)["claims"]
    assert {c["name"]: c["status"] for c in claims} == dict.fromkeys((*CLAIMS, "training"), HOLDS)
    assert "the source's own training function 2 " in claims[-1]["detail"]


def test_what_does_not_apply(model: Paths, rewritten: Paths) -> None:
    loop = verify(model("v1_loop"), rewritten("v1_loop"))
    assert claim(loop, "gradients").status == NOT_APPLICABLE
    assert "the source cannot be differentiated either" in claim(loop, "gradients").detail
    references = verify(model("v1_by_hand_serving"), rewritten("v1_by_hand_serving", keep_ref=True))
    assert claim(references, "statistics").status == NOT_APPLICABLE
    assert "a reference, which is trained in V1 sessions only" in claim(references, "statistics").detail
    passes = ["split-modes", "select-to-branch", "merge-choices", "fuse-batch-norm", "choose-branch"]
    fused = statuses(verify(model("keras3"), rewritten("keras3", passes=passes)))
    checked = ("signatures", "off", "kernels in inference")
    assert fused == {name: HOLDS if name in checked else NOT_APPLICABLE for name in CLAIMS}


def test_nothing_checked_is_not_ok() -> None:
    assert not Verification([], "").ok
    assert not Verification([Claim("signatures", HOLDS, ""), Claim("off", NOT_APPLICABLE, "")], "").ok
    assert Verification([Claim("off", HOLDS, "")], "").ok


@pytest.fixture
def module(model: Paths) -> Path:
    return model("module")


@pytest.fixture
def result(rewritten: Paths) -> Path:
    return rewritten("module")


@dataclass(frozen=True)
class Scaled:
    """Let a signature return a little more."""

    def edits(self, model: Model) -> Iterable[Edit]:
        graph = model.graphs[model.signatures["serving_default"].entry]
        output = Use("float32", graph.results[0].value)
        yield Rewire(Edge(graph.name, "", 0), output * constant(1 + 1e-4, "float32"), "test")


@dataclass(frozen=True)
class Counting:
    """Let a signature count a step."""

    def edits(self, model: Model) -> Iterable[Edit]:
        yield Run(model.signatures["serving_default"].entry, increment(model), "test", last=True)


@dataclass(frozen=True)
class Cut:
    """Insert a node between a gamma and its kernel in training."""

    through: Callable[[Expr], Expr]

    def edits(self, model: Model) -> Iterable[Edit]:
        site = next(s for s in model.analysis(sites) if s.graph == TRAIN)
        (edge,) = site.inputs["gamma"]
        value = model.graphs[TRAIN].nodes[edge.node].inputs[edge.position]
        yield Rewire(edge, self.through(Use("float32", value)), "test")


def infinite(gamma: Expr) -> Expr:
    """Make gradients NaN: a root's gradient is infinite at zero, and infinity times zero is NaN."""
    zero = op("Relu", -gamma - constant(1e3, "float32"))
    return gamma + op("Sqrt", zero * gamma)


@dataclass(frozen=True)
class Overflowing:
    """Let a signature return NaN while quantisers act."""

    def edits(self, model: Model) -> Iterable[Edit]:
        graph = model.graphs[model.signatures["serving_default"].entry]
        output = Use("float32", graph.results[0].value)
        start = next(v for v in model.variables.values() if v.name == "quantization/start_step")
        acting = read(step(model)) >= read(start)
        yield Rewire(Edge(graph.name, "", 0), select(acting, output * constant(np.nan, "float32"), output), "test")


PASSES: dict[str, tuple[Pass, str]] = {
    "off": (Scaled(), "output output_0: differs by 0.0001 of its largest element, 0 is allowed"),
    "on": (Overflowing(), "signature serving_default, output output_0: not finite"),
    "statistics": (Counting(), "running the signature serving_default changes quantization/step"),
    "gradients": (Cut(stop_gradient), "zero for gamma:0"),
    "gradients, infinite": (Cut(infinite), "not finite for gamma"),
}


@pytest.mark.parametrize("case", PASSES)
def test_a_rewrite_that_breaks_one_promise(case: str, module: Path, result: Path, tmp_path: Path) -> None:
    by, detail = PASSES[case]
    name = case.partition(",")[0]
    save(Pipeline([by]).run(load(result))[0], tmp_path / "b")
    verification = verify(module, tmp_path / "b")
    assert broken(verification) == [name]
    assert detail in claim(verification, name).detail


def edited(source: Path, target: Path, change: Callable[[Any], None]) -> Path:
    """Return a copy of a model with a changed proto."""
    shutil.copytree(source, target)
    proto = saved_model_pb2.SavedModel.FromString((target / "saved_model.pb").read_bytes())
    change(proto.meta_graphs[0])
    (target / "saved_model.pb").write_bytes(proto.SerializeToString())
    return target


def function(meta: Any, start: str) -> Any:
    return next(f for f in meta.graph_def.library.function if f.signature.name.startswith(start))


def serving(meta: Any) -> Any:
    return function(meta, "__inference_serve_")


def training(meta: Any) -> Any:
    return function(meta, TRAIN)


def without(of: str, nodes: Callable[[Any], bool]) -> Callable[[Any], None]:
    """Return a change that disables the first of some nodes of a function."""

    def change(meta: Any) -> None:
        node = next(n for n in function(meta, of).node_def if nodes(n))
        after = [f"^{i.partition(':')[0]}" for i in node.input if ":" in i]
        del node.input[:]
        node.input.extend(after)
        node.op = "NoOp"
        node.attr.clear()

    return change


def twice(body: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Return a change that adds a second kernel beside a function's first; its output never has an effect.

    In inference Grappler no longer fuses the first with the convolution before them, which rounds differently.
    """

    def change(meta: Any) -> None:
        function_def = body(meta)
        kernel = next(n for n in function_def.node_def if n.op == "FusedBatchNormV3")
        users = [n for n in function_def.node_def if f"{kernel.name}:y:0" in n.input]
        second, least, sunk, largest = (function_def.node_def.add() for _ in range(4))
        second.CopyFrom(kernel)
        second.name = "second"
        second.attr["epsilon"].f = 0.5
        least.name, least.op = "least", "Const"
        least.attr["dtype"].type = 1
        least.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(-1e30))
        for node, op_type, inputs in ((sunk, "AddV2", ["second:y:0", "least:output:0"]), (largest, "Maximum", [])):
            node.name, node.op = f"_{op_type}", op_type
            node.attr["T"].type = 1
            node.input.extend(inputs or [f"{kernel.name}:y:0", "_AddV2:z:0"])
        sunk.name, largest.input[1], largest.name = "sunk", "sunk:z:0", "larger"
        for user in users:
            for index, name in enumerate(user.input):
                if name == f"{kernel.name}:y:0":
                    user.input[index] = "larger:z:0"

    return change


def unequal_strides(meta: Any) -> None:
    node = next(n for n in function(meta, TRAIN).node_def if n.op == "Conv2D")
    node.attr["strides"].list.i[:] = [1, 1, 2, 1]


def never_training(meta: Any) -> None:
    for node in training(meta).node_def:
        if node.op == "FusedBatchNormV3":
            node.attr["is_training"].b = False


def assigns(node: Any) -> bool:
    return bool(node.op == "AssignVariableOp")


def counts(node: Any) -> bool:
    return bool(node.op == "AssignAddVariableOp")


FILES: dict[str, tuple[Callable[[Any], None], list[str], str]] = {
    "an average": (without(TRAIN, assigns), ["statistics"], "1 of 4 do not change, moving_"),
    "the step": (without(TRAIN, counts), ["statistics"], "counts 0 steps, not one"),
    "a kernel": (twice(serving), ["kernels in inference"], "serving_default executes"),
    "a training kernel": (twice(training), ["kernels in training"], "3 kernels in training mode, and serving runs 2"),
    "the mode": (
        never_training,
        ["statistics", "kernels in training"],
        "0 kernels in training mode, and serving runs 2",
    ),
    "all": (unequal_strides, ["statistics", "gradients", "kernels in training"], "Error: "),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_breaks_one_promise(case: str, module: Path, result: Path, tmp_path: Path) -> None:
    change, failing, detail = FILES[case]
    verification = verify(module, edited(result, tmp_path / "b", change))
    assert broken(verification) == failing
    assert detail in claim(verification, failing[-1]).detail
    assert "\n" not in claim(verification, failing[-1]).detail


def renamed(meta: Any) -> None:
    meta.signature_def["other"].CopyFrom(meta.signature_def.pop("serving_default"))


def renamed_output(meta: Any) -> None:
    outputs = meta.signature_def["serving_default"].outputs
    outputs["other"].CopyFrom(outputs.pop("output_0"))


def reshaped(meta: Any) -> None:
    meta.signature_def["serving_default"].inputs["x"].tensor_shape.dim[0].size = 3


def test_signatures_that_are_not_the_sources(model: Paths, rewritten: Paths, tmp_path: Path) -> None:
    for name, change, failing, detail in (
        ("a", renamed, ["signatures"], "the signature serving_default is missing"),
        ("b", renamed_output, ["signatures", "off", "on"], "has the outputs other, not output_0"),
        ("c", reshaped, ["signatures"], "x of the signature serving_default is float32(3, 8, 8, 3), not float32(None"),
    ):
        verification = verify(model("module"), edited(rewritten("module"), tmp_path / name, change))
        assert broken(verification) == failing
        assert detail in claim(verification, "signatures").detail
    missing = verify(model("module"), tmp_path / "a")
    assert statuses(missing)["off"] == statuses(missing)["on"] == NOT_APPLICABLE


def test_quantisers_that_do_not_act(model: Paths, rewritten: Paths, tmp_path: Path) -> None:
    loaded = tf.saved_model.load(str(rewritten("module")))
    widths = [getattr(loaded.quantization.bits, r) for r in ("gamma", "beta", "moving_mean", "moving_variance")]
    for width in widths:
        width.assign(0)
    tf.saved_model.save(loaded, str(tmp_path / "b"), signatures=dict(loaded.signatures))
    verification = verify(model("module"), tmp_path / "b")
    assert broken(verification) == ["on"]
    assert claim(verification, "on").detail == "quantisers change no output"


def test_single_ops_in_place_of_a_kernel(model: Paths, rewritten: Paths) -> None:
    """The source uses fused kernels; the result has the same layers in single ops only."""
    verification = verify(model("form_v1"), rewritten("form_library_image", fuse=False))
    assert statuses(verification)["kernels in inference"] == statuses(verification)["kernels in training"] == FAILS
    assert "serving_default executes none, the source 2 " in claim(verification, "kernels in inference").detail


def test_the_inputs_that_are_given(model: Paths, rewritten: Paths) -> None:
    source, result = model("module"), rewritten("module")
    given = verify(source, result, inputs={"x": X})
    assert statuses(given) == dict.fromkeys(CLAIMS, HOLDS)
    assert given.inputs == f"given: x, {len(X)} examples"
    any_name = verify(source, result, inputs={"anything": X})
    assert claim(any_name, "on").table == claim(given, "on").table
    random = verify(source, result, seed=1)
    assert random.inputs == "random, seed 1, 3 examples"
    assert claim(random, "on").table == claim(verify(source, result, seed=1), "on").table
    assert claim(random, "on").table != claim(verify(source, result), "on").table


def test_classes_that_agree_are_counted(model: Paths, rewritten: Paths) -> None:
    (row,) = claim(verify(model("module"), rewritten("module", bits=2), inputs={"x": X}), "on").table
    loaded = tf.saved_model.load(str(rewritten("module", bits=2)))
    source = tf.saved_model.load(str(model("module")))
    expected, outputs = source.serve(X).numpy(), loaded.serve(X).numpy()
    assert row.agreement == np.mean(expected.argmax(1) == outputs.argmax(1))
    assert row.largest == pytest.approx(np.abs(expected - outputs).max(), rel=1e-4)
    assert row.rms == pytest.approx(np.sqrt(np.mean((expected - outputs) ** 2)), rel=1e-4)
    assert row.relative_rms == pytest.approx(np.linalg.norm(expected - outputs) / np.linalg.norm(expected), rel=1e-4)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"x": X[:, :4]}, "the input x is to have the shape"),
        ({"x": X, "y": X}, "the signature serving_default takes x, not x, y"),
        ({"x": np.full(X.shape, "a")}, "the input x is to have the dtype float32"),
        ([X], "inputs are arrays by name"),
    ],
)
def test_inputs_that_do_not_fit(inputs: Any, message: str, model: Paths, rewritten: Paths) -> None:
    with pytest.raises(bnqat.Error, match=message) as caught:
        verify(model("module"), rewritten("module"), inputs=inputs)
    assert "\n" not in str(caught.value)


class Examples(tf.Module):
    """A model whose inputs are serialised `tf.train.Example` protos."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = FusedBatchNorm(6)
        perturb(self.norm.variables)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="examples")])
    def serve(self, examples: tf.Tensor) -> tf.Tensor:
        parsed = tf.io.parse_example(examples, {"v": tf.io.FixedLenFeature([6], tf.float32)})
        return self.norm(parsed["v"][:, None, None, :], training=False)


def test_a_model_that_runs_on_no_random_inputs(tmp_path: Path) -> None:
    module = Examples()
    tf.saved_model.save(module, str(tmp_path / "a"), signatures={"serving_default": module.serve})
    bnqat.rewrite(tmp_path / "a", tmp_path / "b")
    with pytest.raises(bnqat.Error, match="give it some with --inputs"):
        verify(tmp_path / "a", tmp_path / "b")
    values = np.random.default_rng(0).normal(size=(4, 6))
    features = [tf.train.Features(feature={"v": {"float_list": {"value": row}}}) for row in values]
    examples = np.array([tf.train.Example(features=f).SerializeToString() for f in features])
    verification = verify(tmp_path / "a", tmp_path / "b", inputs={"examples": examples})
    assert statuses(verification) == dict.fromkeys(CLAIMS, HOLDS)
    with pytest.raises(bnqat.Error, match=r"the source runs on none of the inputs given: .*Error"):
        verify(tmp_path / "a", tmp_path / "b", inputs={"examples": np.array([b"no example"])})


def unstrided(meta: Any) -> None:
    del next(n for n in training(meta).node_def if n.op == "Conv2D").attr["strides"].list.i[2:]


def test_what_is_no_model(module: Path, result: Path, tmp_path: Path) -> None:
    with pytest.raises(bnqat.Error, match="does not exist"):
        verify(tmp_path / "nowhere", result)
    with pytest.raises(bnqat.Error, match=r"is a rewritten model and .*/module is none; pass the source first"):
        verify(result, module)
    with pytest.raises(bnqat.Error, match=r"b does not load in a V1 session: \w+Error: ") as caught:
        verify(module, edited(result, tmp_path / "b", unstrided))
    assert "\n" not in str(caught.value)


def test_a_second_phase_runs_no_further_kernel(model: Callable[[str], Path], rewritten: Callable[..., Path]) -> None:
    """The branch with frozen statistics is placed in the graph but not reached."""
    kernels_claim = claim(verify(model("keras_save"), rewritten("keras_save", freeze_step=50)), "kernels in training")
    assert kernels_claim.status == "holds", kernels_claim.detail
    assert "it has two phases, of which one runs: 2 are reached" in kernels_claim.detail


def test_a_result_of_another_model(model: Paths, rewritten: Paths) -> None:
    verification = verify(model("module"), rewritten("keras_save"))
    assert "signatures" in broken(verification)
    assert claim(verification, "off").detail == "signature serving_default: the result takes input_1, not x"
    assert not any("Error" in c.detail for c in verification.claims)


def test_inputs_that_may_fail_claims_by_themselves(model: Paths, rewritten: Paths) -> None:
    pair = model("module"), rewritten("module")
    assert verify(*pair, inputs={"x": X}).notes == []
    (note,) = verify(*pair, inputs={"x": np.zeros_like(X)}).notes
    assert note == "the input x holds one value only, with which statistics and gradients may stay as they are"
    with pytest.raises(bnqat.Error, match="the input x is not finite in places"):
        verify(*pair, inputs={"x": np.where(X.max() == X, np.nan, X)})


def test_kernels_of_both_modes_are_placed_and_those_that_run_are_told(tmp_path: Path) -> None:
    save_v1(tmp_path / "a", two_fused)
    bnqat.rewrite(tmp_path / "a", tmp_path / "b")
    verification = verify(tmp_path / "a", tmp_path / "b")
    assert statuses(verification) == dict.fromkeys(CLAIMS, HOLDS)
    assert "(2 reached)" in claim(verification, "kernels in inference").detail
    assert "which of its ops train, only its program knows" in claim(verification, "training").detail
    detail = claim(verification, "kernels in training").detail
    assert detail == "training executes 2 kernels in training mode, and serving runs 2 sites"


def test_inputs_of_which_one_is_missing(model: Paths, rewritten: Paths) -> None:
    pair = model("v1_two_fused_if"), rewritten("v1_two_fused_if")
    with pytest.raises(bnqat.Error, match=r"none of the inputs given: .*; is_training is missing$"):
        verify(*pair, inputs={"x": X})
    with pytest.raises(bnqat.Error, match=r"; is_training is missing$"):
        bnqat.sensitivity(pair[1], {"x": X})


@pytest.mark.parametrize("references", [False, True])
def test_a_variable_that_loading_leaves_without_a_value(references: bool, tmp_path: Path) -> None:
    options = Options(references=references)
    with settings(options), v1.Session() as session:
        x, logits = net(two_fused, False, options)
        saver = v1.train.Saver(v1.global_variables())
        v1.get_variable("unsaved", ())
        session.run(v1.global_variables_initializer())
        draw(session)
        signature = v1.saved_model.predict_signature_def({"x": x}, {"logits": logits})
        builder = v1.saved_model.Builder(str(tmp_path / "a"))
        builder.add_meta_graph_and_variables(session, ["serve"], {"serving_default": signature}, saver=saver)
        builder.save()
    bnqat.rewrite(tmp_path / "a", tmp_path / "b")
    with session_of(tmp_path / "a") as opened:
        assert opened.values()
        assert "unsaved" not in opened.values()
    assert not broken(verify(tmp_path / "a", tmp_path / "b"))
