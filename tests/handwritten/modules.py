"""Running modules of hand-written batch norms, as TensorFlow 2 does."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow as tf

from tests.handwritten.behaviour import STEPS, Behaviour, loss_of
from tests.handwritten.graphs import traced
from tests.models.handwritten.form import Form
from tests.models.handwritten.nets import Module, batch, save_module
from tests.models.handwritten.norm import MOMENTUM, v1


@dataclass
class ModuleRun:
    """A module: the source, or one that was loaded."""

    form: Form
    module: Any

    def __post_init__(self) -> None:
        layers = self.module.variables_of
        self.variables = [*self.module.mixes, *(v for layer in layers for v in layer.values())]
        self.variables += [v for layer in self.module.biased for pair in layer for v in pair]
        self.averages = {_name(v): v for layer in layers for role, v in layer.items() if "moving" in role}

    def served(self, result: Behaviour) -> None:
        """Serve once, in inference."""
        start = [v.numpy() for v in self.variables]
        result.served = self._call(self.module.serve, 0, training=False).numpy()
        result.served_averages = {name: v.numpy() for name, v in self.averages.items()}
        self._restore(start)

    def trained(self, result: Behaviour, train: Any, training: bool, differentiated: bool) -> None:
        """Make training steps with a function, in a mode."""
        start = [v.numpy() for v in self.variables]
        parameters = {_name(v): v for v in self.variables if v.trainable}
        for step in range(STEPS):
            tape = tf.GradientTape()
            with tape if differentiated else contextlib.nullcontext():
                y = self._call(train, step, training)
                loss = loss_of(y, self.form)
            gradients = tape.gradient(loss, parameters) if differentiated else {}
            result.outputs.append(y.numpy())
            result.gradients.append({name: g.numpy() for name, g in gradients.items() if g is not None})
        result.averages = {name: v.numpy() for name, v in self.averages.items()}
        self._restore(start)

    def behaviour(self, differentiated: bool = True) -> Behaviour:
        """Serve once if the module can, then train if it can; each starts from the current variables."""
        result = Behaviour(start={name: v.numpy() for name, v in self.averages.items()})
        python = self.form.chooser == "python"
        if python or self.form.mode != "true":
            self.served(result)
        if self.form.mode != "false":
            train = self.module.train if python else self.module.serve
            self.trained(result, train, training=True, differentiated=differentiated)
        return result

    def _call(self, function: Any, step: int, training: bool) -> tf.Tensor:
        if self.form.mode == "variable":
            self.module.is_training.assign(training)
        inputs = [tf.constant(batch(self.form, step))]
        inputs += [tf.constant(training)] if self.form.mode == "placeholder" else []
        inputs += [tf.constant(MOMENTUM)] if self.form.momentum == "placeholder" else []
        return function(*inputs)

    def _restore(self, values: list[Any]) -> None:
        for variable, value in zip(self.variables, values, strict=True):
            variable.assign(value)


def _name(variable: Any) -> str:
    name: str = variable.name.partition(":")[0]
    return name


def source_module(form: Form, path: Path) -> Behaviour:
    """Build a module, write it, and run it."""
    module = Module(form)
    save_module(module, path)
    result = ModuleRun(form, module).behaviour()
    result.kernels = {mode: kernels for (_, mode), kernels in _kernels(form, path).items()}
    return result


def loaded_module(form: Form, path: Path, decides: bool) -> tuple[Behaviour, Behaviour | None]:
    """Run a module that was loaded: by its own functions, and by `quantization.train`, if it has one.

    Args:
        form: that of the source.
        path: the directory.
        decides: `quantization.train` takes its mode from an argument or a variable, as the source's function does.
    """
    run = ModuleRun(form, tf.saved_model.load(str(path)))
    train = getattr(getattr(run.module, "quantization", None), "train", None)
    # The source's function in training and `train` share their branches, which TensorFlow cannot differentiate twice.
    behaviour = run.behaviour(differentiated=train is None)
    kernels = _kernels(form, path)
    behaviour.kernels = {mode: ran for (name, mode), ran in kernels.items() if name != "train"}
    if train is None:
        return behaviour, None
    trained = Behaviour(
        behaviour.start, kernels={mode: ran for (name, mode), ran in kernels.items() if name == "train"}
    )
    run.trained(trained, train, training=decides, differentiated=True)
    return behaviour, trained


def _kernels(form: Form, path: Path) -> dict[tuple[str, bool], list[bool]]:
    """Return, by signature and mode, the attribute `is_training` of every fused kernel that runs."""
    modes = [False, True] if form.dynamic else [form.mode == "true" and form.chooser != "python"]
    result = {}
    with tf.Graph().as_default() as graph, v1.Session() as session:
        signatures = v1.saved_model.load(session, ["serve"], str(path)).signature_def
        mode_variables = [op for op in graph.get_operations() if op.type == "VarHandleOp"]
        mode_variables = [op for op in mode_variables if op.get_attr("shared_name") == b"is_training"]
        for name, mode in [*(("serving_default", mode) for mode in modes), ("train", True)]:
            if name not in signatures:
                continue
            for op in mode_variables:
                session.run(tf.raw_ops.AssignVariableOp(resource=op.outputs[0], value=tf.constant(mode)))
            values = {"x": batch(form, 0), "is_training": mode, "momentum": MOMENTUM}
            fed = {graph.get_tensor_by_name(t.name): values[n] for n, t in signatures[name].inputs.items()}
            outputs = [graph.get_tensor_by_name(t.name) for t in signatures[name].outputs.values()]
            _, result[name, mode] = traced(session, outputs, fed)
    return result
