"""TensorFlow 1's format: results trained in V1 sessions, and loaded by TensorFlow 2."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow.python.saved_model.signature_def_utils_impl import op_signature_def

import bnqat
from passes.batch_norm.roles import ROLES
from rewriter.app.verification.claims import verify
from tests import reference
from tests.models.v1 import EPSILON, V1_MODELS, Options, by_hand, draw, net, settings, two_fused, v1, write
from tests.mutate import mutated

Paths = Callable[[str], Path]
OFF = 2**40
CONTROLS = {f"quantization/{name}" for name in ("step", "start_step", "ramp_steps")} | {
    f"quantization/{widths}/{role}" for widths in ("bits", "layer_bits") for role in ROLES
}
WITH_TRAIN_OP = [
    "v1_by_hand",
    "v1_by_hand_if",
    "v1_by_hand_references",
    "v1_two_fused",
    "v1_two_fused_references",
    "v1_layers_plain",
]


@contextmanager
def session_of(path: Path) -> Iterator[tuple[Any, Any]]:
    with tf.Graph().as_default(), v1.Session() as session:
        yield session, v1.saved_model.load(session, ["serve"], str(path))


def batch(seed: int, size: int = 6) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(0.3, 1.5, (size, 8, 8, 3)).astype("float32"), rng.integers(0, 5, size)


def feed(session: Any, seed: int, training: bool = True) -> dict[Any, Any]:
    x, labels = batch(seed)
    graph = session.graph
    names = {op.name for op in graph.get_operations()}
    fed = {"x": x, "labels": labels, "is_training": training}
    return {graph.get_tensor_by_name(f"{k}:0"): v for k, v in fed.items() if k in names}


def values(session: Any) -> dict[str, np.ndarray]:
    """All variables but those that the rewrite added."""
    variables = {v.op.name: v for v in v1.global_variables() if not v.op.name.startswith("quantization/")}
    return session.run(variables)  # type: ignore[no-any-return]


def step_of(session: Any) -> int:
    return int(session.run(next(v for v in v1.global_variables() if v.op.name == "quantization/step")))


def trained(path: Path, steps: int = 3) -> tuple[dict[str, np.ndarray], list[float], int]:
    """Run the source's own train op in a V1 session.

    Returns:
        All variables after the steps, the losses of the steps and of one more, and the counted steps.
    """
    with session_of(path) as (session, _):
        (op,) = v1.get_collection(v1.GraphKeys.TRAIN_OP)
        loss = session.graph.get_tensor_by_name("loss:0")
        losses = [session.run([loss, op], feed(session, seed))[0] for seed in range(steps)]
        counted = any(v.op.name == "quantization/step" for v in v1.global_variables())
        result = values(session), step_of(session) if counted else 0
        losses.append(session.run([loss, op], feed(session, steps))[0])
        return result[0], losses, result[1]


@pytest.mark.parametrize("name", WITH_TRAIN_OP)
def test_the_sources_own_train_op_trains_as_before_until_quantisers_start(
    name: str, model: Paths, rewritten: Any
) -> None:
    """Each step counts; with quantisers off losses and variables are the same bits."""
    before, losses, _ = trained(model(name), steps=2)
    after, same, count = trained(rewritten(name, start_step=2, bits=2), steps=2)
    assert count == 2
    assert same[:2] == losses[:2]
    assert before.keys() == after.keys()
    for key, value in before.items():
        np.testing.assert_array_equal(value, after[key], err_msg=key)
    assert same[2] != losses[2]


def quantized_tensors(session: Any) -> dict[str, str]:
    """Map the output names of the main graph's quantisers to their inputs' names."""
    return {
        op.outputs[0].name: op.inputs[len(op.inputs) - 1].name
        for op in session.graph.get_operations()
        if "_bnqat" in op.node_def.attr
    }


@pytest.mark.parametrize("name", ["v1_by_hand", "v1_two_fused_references", "v1_loop"])
def test_values_equal_the_reference(name: str, rewritten: Any) -> None:
    with session_of(rewritten(name, bits=3)) as (session, _):
        for output, source in quantized_tensors(session).items():
            if "while" in output or output.startswith("train/") or ("moving" not in source and "gamma" not in source):
                continue
            quantised, raw = session.run([output, source], feed(session, 0, training=False))
            if "variance" in source:
                np.testing.assert_allclose(quantised, reference.log(raw, 3, EPSILON), rtol=3e-7)
            else:
                np.testing.assert_array_equal(quantised, reference.affine(raw, 3))


@pytest.mark.parametrize("name", ["v1_two_fused", "v1_layers_fused", "v1_by_hand"])
def test_the_gradients_of_a_train_op_use_what_the_batch_norm_used(name: str, rewritten: Any) -> None:
    with session_of(rewritten(name)) as (session, _):
        operations = session.graph.get_operations()
        gradients = [op for op in operations if op.name.startswith("gradients/")]
        kernels = [op for op in gradients if "FusedBatchNormGrad" in op.type]
        assert len(kernels) == (0 if name == "v1_by_hand" else 4 if name == "v1_two_fused" else len(kernels) or -1)
        assert all("_bnqat" in op.inputs[2].op.node_def.attr for op in kernels)
        gamma_reads = [
            op for op in operations if op.type == "ReadVariableOp" and op.inputs[0].op.name.endswith("/gamma")
        ]
        assert gamma_reads
        assert not [op.name for op in gradients for i in op.inputs if i.op in gamma_reads]


@pytest.mark.parametrize("name", sorted(set(V1_MODELS) - {"v1_two_fused_training", "v1_loop_updates"}))
def test_a_new_optimizer_trains_the_signature(name: str, rewritten: Any, tmp_path: Path) -> None:
    """Gradients reach every gamma and beta, through copied loops and branches too; the result is saved and served."""
    with session_of(rewritten(name, start_step=1)) as (session, meta):
        signature = meta.signature_def["train"]
        logits = session.graph.get_tensor_by_name(signature.outputs["logits"].name)
        labels = v1.placeholder(tf.int32, [None])
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits))
        parameters = [v for v in v1.trainable_variables() if "gamma" in v.name or "beta" in v.name]
        gradients = v1.gradients(loss, parameters)
        assert all(g is not None for g in gradients)
        op = v1.train.GradientDescentOptimizer(0.1).minimize(loss)
        x, y = batch(0, 24)
        fed: dict[Any, Any] = {session.graph.get_tensor_by_name("x:0"): x, labels: y}
        placeholder = signature.inputs.get("is_training")
        if placeholder is not None:
            fed[session.graph.get_tensor_by_name(placeholder.name)] = False
        moving = {v.op.name: v for v in v1.global_variables() if "moving" in v.name and "quantization" not in v.name}
        before = session.run(moving)
        losses = [session.run([loss, op], fed)[0] for _ in range(8)]
        outputs = {k: t.name for k, t in meta.signature_def["serving_default"].outputs.items()}
        after, served = session.run([moving, outputs], fed)
        assert losses[-1] < losses[0]
        assert sum(not np.array_equal(before[k], after[k]) for k in moving) == 4
        saver = v1.train.Saver()
        saver.save(session, str(tmp_path / "again"))
    with v1.Session(graph=session.graph) as again:
        saver.restore(again, str(tmp_path / "again"))
        restored = again.run(outputs, fed)
        np.testing.assert_array_equal(restored["logits"], served["logits"])
        with session.graph.as_default():
            assert step_of(again) == 8


@pytest.mark.parametrize("name", ["v1_by_hand_references", "v1_two_fused", "v1_layers_fused_if"])
def test_tensorflow_2_trains_what_it_loads(name: str, rewritten: Any) -> None:
    loaded = tf.saved_model.load(str(rewritten(name, start_step=2)))
    train, variables = loaded.signatures["train"], {v.name: v for v in loaded.variables}
    parameters = [v for v in loaded.variables if v.trainable]
    assert sum("gamma" in v.name or "beta" in v.name for v in parameters) == 4
    x, labels = batch(1, 24)
    inputs = {"x": tf.constant(x)}
    if "is_training" in train.structured_input_signature[1]:
        inputs["is_training"] = tf.constant(False)  # training does not depend on it
    losses = []
    for _ in range(6):
        with tf.GradientTape() as tape:
            logits = train(**inputs)["logits"]
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits))
        for v, g in zip(parameters, tape.gradient(loss, parameters), strict=True):
            v.assign_sub(0.1 * g)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert int(variables["quantization/step:0"]) == 6


def test_derived_training_is_the_sources_training(rewritten: Any) -> None:
    """With two fused ops, training derived from the serving graph equals the graph of both modes on one batch."""
    moved = []
    x, _ = batch(2)
    for name in ("v1_two_fused", "v1_two_fused_serving"):
        loaded = tf.saved_model.load(str(rewritten(name, start_step=OFF, momentum=0.9)))
        outputs = loaded.signatures["train"](x=tf.constant(x))["logits"]
        source_variables = [v for v in loaded.variables if not v.name.startswith("quantization/")]
        moved.append([outputs.numpy(), *(v.numpy() for v in source_variables if "moving" in v.name)])
    assert len(moved[0]) == 5
    for a, b in zip(*moved, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_train_changes_nothing_but_averages_and_the_step(rewritten: Any) -> None:
    """The optimizer's slots and the trained variables stay as they are."""
    loaded = tf.saved_model.load(str(rewritten("v1_layers_fused_adam")))
    before = {v.name: v.numpy() for v in loaded.variables}
    loaded.signatures["train"](x=tf.constant(batch(0)[0]))
    changed = {v.name for v in loaded.variables if not np.array_equal(before[v.name], v.numpy())}
    assert {n for n in changed if "moving" not in n} == {"quantization/step:0"}
    assert len(changed) == 5


def test_reference_variables_can_be_kept_for_v1_sessions(model: Paths, tmp_path: Path) -> None:
    source = model("v1_by_hand_references")
    report = bnqat.rewrite(source, tmp_path / "kept", keep_ref=True, start_step=OFF)
    assert any("reference variables are kept" in note for note in report.notes)
    with session_of(tmp_path / "kept") as (session, _):
        assert "VariableV2" in {op.type for op in session.graph.get_operations()}
    before, losses, _ = trained(source)
    after, same, count = trained(tmp_path / "kept")
    assert (same, count) == (losses, 3)
    for key, value in before.items():
        np.testing.assert_array_equal(value, after[key], err_msg=key)


def test_upgraded_references_are_reported_and_gone(model: Paths, tmp_path: Path) -> None:
    source = model("v1_two_fused_references")
    with session_of(source) as (session, _):
        count = sum(op.type == "VariableV2" for op in session.graph.get_operations())
    report = bnqat.rewrite(source, tmp_path / "out")
    assert any(note.startswith(f"{count} reference variables are resource variables now") for note in report.notes)
    with session_of(tmp_path / "out") as (session, _):
        types = {op.type for op in session.graph.get_operations()}
        assert types.isdisjoint({"VariableV2", "Assign", "AssignSub", "ApplyMomentum", "IsVariableInitialized"})
        assert all(v.op.type == "VarHandleOp" for v in v1.global_variables())


@pytest.mark.parametrize("name", ["v1_by_hand", "v1_by_hand_references"])
def test_collections_initialisers_and_saver_know_the_new_variables(name: str, rewritten: Any, tmp_path: Path) -> None:
    with session_of(rewritten(name, start_step=7)) as (session, _):
        new = {v.op.name: v for v in v1.global_variables() if v.op.name.startswith("quantization/")}
        assert set(new) == CONTROLS
        assert not set(new) & {v.op.name for v in v1.trainable_variables()}
        session.run(v1.global_variables_initializer())
        initial = session.run(new)
        assert {k: v for k, v in initial.items() if v.ndim == 0} == {
            "quantization/start_step": 7,
            "quantization/ramp_steps": 0,
            "quantization/step": 0,
            **{f"quantization/bits/{role}": 8 for role in ROLES},
        }
        assert all((v == -1).all() for v in initial.values() if v.ndim)
        assert session.run(v1.report_uninitialized_variables()).size == 0
        saver = v1.train.Saver()
        saver.save(session, str(tmp_path / "saved"))
    names = dict(tf.train.list_variables(str(tmp_path / "saved")))
    assert set(names) >= CONTROLS


def test_rewriting_twice_adds_nothing(rewritten: Any, tmp_path: Path) -> None:
    with pytest.raises(bnqat.Error, match="quantised already"):
        bnqat.rewrite(rewritten("v1_by_hand"), tmp_path / "again")


def custom(path: Path, build: Any, **options: Any) -> Path:
    """A graph on one hand-written batch norm; `build` gives the signature's output."""
    with settings(Options(**options)):
        x = v1.placeholder(tf.float32, [None, 8, 8, 3], name="x")
        with v1.variable_scope("norm_0"):
            y = by_hand(x, training=False)
        write(path, {"x": x}, {"y": build(y)})
    return path


def outputs(path: Path) -> dict[str, np.ndarray]:
    with session_of(path) as (session, meta):
        names = {k: t.name for k, t in meta.signature_def["serving_default"].outputs.items()}
        return session.run(names, {"x:0": batch(0)[0]})  # type: ignore[no-any-return]


def assert_outputs(source: Path, folder: Path) -> None:
    """Assert equal bits where single ops stay, and equality up to float rounding with the fused kernel."""
    expected = outputs(source)["y"]
    for name, fuse in (("qat", False), ("fused", True)):
        bnqat.rewrite(source, folder / name, start_step=OFF, fuse=fuse)
    np.testing.assert_array_equal(outputs(folder / "qat")["y"], expected)
    fused = outputs(folder / "fused")["y"]
    assert np.abs(fused - expected).max() <= 1e-5 * np.abs(expected).max()


def variable(name: str) -> Any:
    return next(v for v in v1.global_variables() if v.op.name == name)


@pytest.mark.parametrize(
    "build",
    [
        lambda _: variable("norm_0/gamma")._ref(),
        lambda y: v1.assign(variable("norm_0/beta"), variable("norm_0/beta") + tf.reduce_mean(y, [0, 1, 2])),
        lambda _: tf.raw_ops.CountUpTo(ref=v1.get_variable("n", [], tf.int32, v1.zeros_initializer())._ref(), limit=9),
    ],
    ids=["variable", "assignment", "count"],
)
def test_outputs_that_are_references_give_the_same_values(build: Any, tmp_path: Path) -> None:
    source = custom(tmp_path / "float", build, references=True)
    assert_outputs(source, tmp_path)
    tf.saved_model.load(str(tmp_path / "fused"))


def test_the_output_of_a_branch_that_is_always_taken(tmp_path: Path) -> None:
    def build(y: Any) -> Any:
        return tf.cond(tf.constant(value=True), lambda: y + 1.0, lambda: y)

    assert_outputs(custom(tmp_path / "float", build, control_flow_v2=True), tmp_path)


@pytest.mark.parametrize("references", [True, False])
def test_an_update_written_by_hand_keeps_the_float_value(references: bool, tmp_path: Path) -> None:
    """gamma = clip(gamma - 0 * gradient): the quantised value enters the gradient and not the base."""

    def build(y: Any) -> Any:
        gamma = variable("norm_0/gamma")
        (gradient,) = v1.gradients(tf.reduce_sum(tf.square(y)), [gamma])
        v1.add_to_collection("step", v1.assign(gamma, tf.clip_by_value(gamma - 0.0 * gradient, -9.0, 9.0)).op)
        return y

    source = custom(tmp_path / "float", build, references=references)
    bnqat.rewrite(source, tmp_path / "qat", bits=2)
    with session_of(tmp_path / "qat") as (session, _):
        before = session.run(variable("norm_0/gamma"))
        session.run(v1.get_collection("step"), {"x:0": batch(0)[0]})
        np.testing.assert_array_equal(session.run(variable("norm_0/gamma")), before)


@pytest.mark.parametrize("average", ["statistic", "stored"])
@pytest.mark.parametrize("name", ["v1_by_hand", "v1_two_fused", "v1_by_hand_references"])
def test_ranges_widths_and_noise_in_the_first_format(name: str, average: str, rewritten: Any) -> None:
    """Ranges move with the averages, in training alone; widths are variables by name; noise follows the step."""
    options: dict[str, Any] = {"range": "ema", "rounding": "stochastic", "quantize_average": average, "bits": 4}
    path = str(rewritten(name, **options))
    loaded = tf.saved_model.load(path)
    x, _ = batch(0)
    by_name = {v.name.partition(":")[0]: v for v in loaded.variables}
    ranges = [by_name[f"quantization/range/{role}"] for role in ROLES]
    before = [v.numpy() for v in ranges]
    modes = {"is_training": tf.constant(False)} if name == "v1_by_hand_references" else {}
    (served,) = loaded.signatures["serving_default"](x=tf.constant(x), **modes).values()
    assert all(np.array_equal(v, old) for v, old in zip(ranges, before, strict=True))
    loaded.signatures["train"](x=tf.constant(x), **modes)
    assert by_name["quantization/step"].numpy() == 1
    assert all(not np.array_equal(v, old) for v, old in zip(ranges[2:], before[2:], strict=True))
    for role in ROLES:
        by_name[f"quantization/bits/{role}"].assign(0)
    (off,) = loaded.signatures["serving_default"](x=tf.constant(x), **modes).values()
    assert not np.array_equal(served, off)
    with session_of(rewritten(name, **options)) as (session, meta):
        train = meta.signature_def["train"]
        fed = {train.inputs[k].name: v for k, v in {"x": x, **dict.fromkeys(modes, False)}.items()}
        outputs = [t.name for t in train.outputs.values()]
        once, again = (session.run(outputs, fed)[0] for _ in range(2))
        assert not np.array_equal(once, again)  # the noise is that of the step
        assert step_of(session) == 2


def _saved(path: Path, **options: Any) -> None:
    """Save the default graph with x and logits, and further arguments for the builder."""
    graph = tf.compat.v1.get_default_graph()
    x, logits = (graph.get_tensor_by_name(f"{name}:0") for name in ("x", "logits"))
    signatures = {"serving_default": v1.saved_model.predict_signature_def({"x": x}, {"logits": logits})}
    with v1.Session() as session:
        session.run(v1.global_variables_initializer())
        draw(session)
        builder = v1.saved_model.Builder(str(path))
        builder.add_meta_graph_and_variables(session, ["serve"], signatures, **options)
        builder.save()


def test_partitioned_variables(tmp_path: Path) -> None:
    """The checkpoint holds whole tensors, and the saver restores slices of them."""
    with settings(Options()):
        x = v1.placeholder(tf.float32, [None, 8, 8, 3], name="x")
        kernel = v1.get_variable("kernel", [1, 1, 3, 6], partitioner=v1.fixed_size_partitioner(2, axis=3))
        logits = by_hand(
            tf.nn.conv2d(x, tf.convert_to_tensor(kernel), 1, "SAME"), v1.placeholder_with_default(False, [])
        )
        tf.identity(logits, name="logits")
        _saved(tmp_path / "source")
    report = bnqat.rewrite(tmp_path / "source", tmp_path / "target")
    assert report.sites_rewritten == report.sites_found == 1
    assert verify(tmp_path / "source", tmp_path / "target").ok
    with session_of(tmp_path / "source") as (session, _):
        expected = values(session)
    with session_of(tmp_path / "target") as (session, _):
        actual = values(session)
    assert {"kernel/part_0", "kernel/part_1"} <= actual.keys()
    assert all(np.array_equal(actual[name], value) for name, value in expected.items())


def test_init_and_train_ops_are_signatures_of_ops_alone(tmp_path: Path) -> None:
    with settings(Options()):
        x = v1.placeholder(tf.float32, [None, 4, 4, 6], name="x")
        logits = tf.identity(by_hand(x, v1.placeholder_with_default(False, [])), name="logits")
        train = v1.train.GradientDescentOptimizer(0.1).minimize(tf.reduce_sum(logits**2))
        proto = op_signature_def(train, "__saved_model_train_op")  # as estimators' builder added it
        _saved(tmp_path / "saved", main_op=tf.group(v1.tables_initializer(), name="main"))

    def edit(meta: Any) -> None:
        meta.signature_def["__saved_model_train_op"].CopyFrom(proto)

    mutated(tmp_path / "saved", tmp_path / "source", edit)
    bnqat.rewrite(tmp_path / "source", tmp_path / "target")
    (before,), (after,) = (
        saved_model_pb2.SavedModel.FromString((tmp_path / name / "saved_model.pb").read_bytes()).meta_graphs
        for name in ("source", "target")
    )
    for name in ("__saved_model_init_op", "__saved_model_train_op"):
        assert after.signature_def[name] == before.signature_def[name]
    with session_of(tmp_path / "target") as (session, _):
        start = values(session)
        session.run("GradientDescent", {"x:0": np.ones((2, 4, 4, 6), "float32")})
        assert any(not np.array_equal(start[name], value) for name, value in values(session).items())


def test_sparse_outputs(tmp_path: Path) -> None:
    """A sparse output has three tensors, in the source's signatures, in added ones, and in `verify`."""
    with settings(Options()):
        training = v1.placeholder_with_default(False, [], name="is_training")
        x, logits = net(two_fused, training, Options())
        write(tmp_path / "source", {"x": x}, {"scores": tf.sparse.from_dense(tf.nn.relu(logits)), "logits": logits})
    bnqat.rewrite(tmp_path / "source", tmp_path / "target", start_step=OFF)
    result = verify(tmp_path / "source", tmp_path / "target")
    assert result.ok, result
    x_, _ = batch(0)
    with session_of(tmp_path / "target") as (session, meta):
        for name, signature in meta.signature_def.items():
            sparse, dense = signature.outputs["scores"], signature.outputs["logits"]
            assert sparse.WhichOneof("encoding") == "coo_sparse", name
            scores = v1.SparseTensor(
                *(
                    session.graph.get_tensor_by_name(getattr(sparse.coo_sparse, f"{part}_tensor_name"))
                    for part in ("indices", "values", "dense_shape")
                )
            )
            fetched = [tf.sparse.to_dense(scores), session.graph.get_tensor_by_name(dense.name)]
            scattered, plain = session.run(fetched, {session.graph.get_tensor_by_name("x:0"): x_})
            np.testing.assert_array_equal(scattered, np.maximum(plain, 0))
        assert {"serving_default", "train"} <= set(meta.signature_def)


def test_sparse_outputs_that_the_graph_lacks(tmp_path: Path) -> None:
    with settings(Options()):
        x, logits = net(two_fused, False, Options())
        write(tmp_path / "source", {"x": x}, {"scores": tf.sparse.from_dense(logits)})

    def edit(meta: Any) -> None:
        meta.signature_def["serving_default"].outputs["scores"].coo_sparse.indices_tensor_name = "nowhere:0"

    damaged = mutated(tmp_path / "source", tmp_path / "damaged", edit)
    with pytest.raises(bnqat.Error, match=r"'scores' of the signature 'serving_default' is 'nowhere:0', which"):
        bnqat.rewrite(damaged, tmp_path / "target")
