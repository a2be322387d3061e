"""Running TensorFlow 1 graphs of hand-written batch norms in sessions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow as tf

from tests.handwritten.behaviour import STEPS, Arrays, Behaviour, loss_of
from tests.models.handwritten.form import Form
from tests.models.handwritten.nets import assign, batch, graph_net, save_graph
from tests.models.handwritten.norm import MOMENTUM, v1

FORWARD = ("FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3")


@dataclass
class GraphRun:
    """A graph in a session: the source's own, or one that was loaded.

    Attributes:
        placeholders: those of x, the mode and the momentum, as far as there are some, by name.
        y: the output.
        updates: collected ops.
        variables: all variables by name.
        averages: names of moving statistics.
        gradients: gradients of the loss, by parameter.
        training: the mode to train in.
    """

    form: Form
    session: Any
    placeholders: Mapping[str, tf.Tensor]
    y: tf.Tensor
    updates: Sequence[Any]
    variables: Mapping[str, Any]
    averages: Sequence[str]
    gradients: Mapping[str, tf.Tensor]
    training: bool = True

    def behaviour(self) -> Behaviour:
        """Serve once, then train; each starts from the current variables."""
        start = self.session.run(dict(self.variables))
        result = Behaviour(start={name: start[name] for name in self.averages})
        if self.form.mode != "true":
            result.served, result.kernels[False] = traced(self.session, self.y, self._fed(0, training=False))
            result.served_averages = self._averages()
            self._restore(start)
        if self.form.mode != "false":
            self._train(result)
            self._restore(start)
        return result

    def trained(self) -> Behaviour:
        """Train, starting from the current variables."""
        start = self.session.run(dict(self.variables))
        result = Behaviour(start={name: start[name] for name in self.averages})
        self._train(result)
        self._restore(start)
        return result

    def _train(self, result: Behaviour) -> None:
        """Make training steps on the output, and run the updates that are collected."""
        alone = self.updates if self.form.shared else []  # nothing orders them within one run
        fetches = [self.y, dict(self.gradients), [u for u in self.updates if u not in alone]]
        for step in range(STEPS):
            fed = self._fed(step, self.training)
            if step:
                y, gradients, _ = self.session.run(fetches, fed)
            else:
                (y, gradients, _), result.kernels[True] = traced(self.session, fetches, fed)
            for update in alone:
                self.session.run(update, fed)
            result.outputs.append(y)
            result.gradients.append(gradients)
        result.averages = self._averages()

    def _fed(self, step: int, training: bool) -> dict[tf.Tensor, Any]:
        """Return values for the placeholders; assign the mode if it is a variable."""
        if "is_training" in self.variables:
            self.variables["is_training"].load(training, self.session)
        values = {"x": batch(self.form, step), "is_training": training, "momentum": MOMENTUM}
        return {placeholder: values[name] for name, placeholder in self.placeholders.items()}

    def _averages(self) -> Arrays:
        values: Arrays = self.session.run({name: self.variables[name] for name in self.averages})
        return values

    def _restore(self, values: Arrays) -> None:
        assign(self.session, [(variable, values[name]) for name, variable in self.variables.items()])


def traced(session: Any, fetches: Any, fed: Mapping[tf.Tensor, Any]) -> tuple[Any, list[bool]]:
    """Return fetched values, and the attribute `is_training` of every fused kernel that ran for them."""
    metadata = v1.RunMetadata()
    options = v1.RunOptions(trace_level=v1.RunOptions.FULL_TRACE, output_partition_graphs=True)
    values = session.run(fetches, fed, options=options, run_metadata=metadata)
    ran = {n.node_name for d in metadata.step_stats.dev_stats for n in d.node_stats}
    nodes = [n for g in metadata.partition_graphs for n in g.node if n.op in FORWARD]
    return values, sorted(n.attr["is_training"].b for n in nodes if n.name in ran)


def source_graph(form: Form, path: Path | None) -> Behaviour:
    """Build a graph, write it if there is a path, and run it."""
    with graph_net(form) as net:
        if path is not None:
            with v1.Session() as session:
                net.begin(session)
                save_graph(net, session, path)
        gradients = _gradients(net.y, form)  # these change an If, so it must be in no session yet; nor in the file
        with v1.Session() as session:
            net.begin(session)
            placeholders = {**net.inputs, **net.fed}
            run = GraphRun(form, session, placeholders, net.y, net.updates, _variables(), net.averages, gradients)
            return run.behaviour()


def loaded_graph(form: Form, path: Path, source: Behaviour) -> tuple[Behaviour, Behaviour | None]:
    """Run a graph that was loaded: by its own ops, and by its signature `train`, if it has one."""
    differentiable = form.control_flow == 1  # a V1 session has no gradient of an If that it loaded
    with tf.Graph().as_default() as graph, v1.Session() as session:
        signatures = v1.saved_model.load(session, ["serve"], str(path)).signature_def

        def tensors(signature: str, kind: str) -> dict[str, tf.Tensor]:
            return {n: graph.get_tensor_by_name(t.name) for n, t in getattr(signatures[signature], kind).items()}

        def run(signature: str, **others: Any) -> GraphRun:
            y = tensors(signature, "outputs")["y"]
            gradients = _gradients(y, form) if differentiable else {}
            variables = {n: v for n, v in _variables().items() if not n.startswith("quantization/")}
            return GraphRun(
                form, session, y=y, variables=variables, averages=sorted(source.start), gradients=gradients, **others
            )

        updates = v1.get_collection(v1.GraphKeys.UPDATE_OPS)
        behaviour = run("serving_default", placeholders=dict(_placeholders(graph)), updates=updates).behaviour()
        if "train" not in signatures:
            return behaviour, None
        inputs = tensors("train", "inputs")
        trained = run("train", placeholders=inputs, updates=[], training=False).trained()  # it trains in either mode
    if not differentiable:
        trained.gradients = _gradients_of_loaded(form, path)
    return behaviour, trained


def _placeholders(graph: tf.Graph) -> Iterator[tuple[str, tf.Tensor]]:
    for op in graph.get_operations():
        if op.name in ("x", "is_training", "momentum") and op.type.startswith("Placeholder"):
            yield op.name, op.outputs[0]


def _variables() -> dict[str, Any]:
    return {v.op.name: v for v in v1.global_variables()}


def _gradients(y: tf.Tensor, form: Form) -> dict[str, tf.Tensor]:
    parameters = v1.trainable_variables()
    gradients = v1.gradients(loss_of(y, form), parameters)
    return {v.op.name: g for v, g in zip(parameters, gradients, strict=True) if g is not None}


def _gradients_of_loaded(form: Form, path: Path) -> list[Arrays]:
    """Return the gradients of TensorFlow 2 through the loaded signature `train`."""
    loaded = tf.saved_model.load(str(path))
    train = loaded.signatures["train"]
    parameters = {v.name.partition(":")[0]: v for v in loaded.variables if v.trainable}
    arguments = {"is_training": tf.constant(value=False), "momentum": tf.constant(MOMENTUM)}
    arguments = {name: value for name, value in arguments.items() if name in train.structured_input_signature[1]}
    results: list[Arrays] = []
    for step in range(STEPS):
        with tf.GradientTape() as tape:
            loss = loss_of(train(x=tf.constant(batch(form, step)), **arguments)["y"], form)
        gradients = tape.gradient(loss, parameters)
        results.append({name: g.numpy() for name, g in gradients.items() if g is not None})
    return results
