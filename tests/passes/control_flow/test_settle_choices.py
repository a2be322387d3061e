from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import tensorflow as tf

from passes.control_flow.settle_choices import SettleChoices
from rewriter.ir import Value
from rewriter.pipeline import Pipeline
from tests.passes.layered import computing, saved, serving


class Chosen(tf.Module):
    """A model that doubles x if a flag is true, and otherwise adds one."""

    def __init__(self, flag: Any) -> None:
        super().__init__()
        self.flag = flag

    @tf.function(input_signature=[tf.TensorSpec([None], name="x")])
    def serve(self, x: Any) -> Any:
        return tf.cond(tf.convert_to_tensor(self.flag), lambda: x * 2.0, lambda: x + 1.0)


def test_what_a_constant_chooses_takes_the_place_of_the_choice(tmp_path: Path) -> None:
    before = saved(tmp_path / "m", Chosen(flag=False))
    assert computing(serving(before)) == ["cond = StatelessIf(Const, x)"]
    after, (step,) = Pipeline([SettleChoices()]).run(before)
    assert computing(serving(after)) == ["cond/cond/add = AddV2(x, cond/cond/add/y)"]
    assert len(step.notes) == 1
    assert step.notes[0].startswith("its functions choose their mode by a constant")
    assert sorted(g.partition("_")[0] for g in before.graphs.keys() - after.graphs.keys()) == ["cond", "cond"]
    again, (step,) = Pipeline([SettleChoices()]).run(after)
    assert again is after
    assert step.edits == ()


def test_a_choice_of_what_another_chose_is_settled_too(tmp_path: Path) -> None:
    """The selection takes the conditional's own output, with no Identity between them."""
    module = Chosen(flag=False)
    serve = module.serve
    module.serve = tf.function(
        lambda x: tf.where(tf.constant(value=True), serve.python_function(x), x),
        input_signature=[tf.TensorSpec([None], name="x")],
    )
    before = saved(tmp_path / "m", module)
    (name,) = (graph.name for graph in before.graphs.values() if any(n.op == "SelectV2" for n in graph.nodes.values()))
    graph = before.graphs[name]
    nodes = {
        n.name: replace(n, inputs=tuple(Value("cond") if v.node == "cond/Identity" else v for v in n.inputs))
        for n in graph.nodes.values()
    }
    before = replace(before, graphs={**before.graphs, name: replace(graph, nodes=nodes)})
    after, _ = Pipeline([SettleChoices()]).run(before)
    assert computing(serving(after)) == ["cond/cond/add = AddV2(x, cond/cond/add/y)"]


def test_what_a_variable_chooses_stays(tmp_path: Path) -> None:
    before = saved(tmp_path / "m", Chosen(tf.Variable(initial_value=False)))
    after, _ = Pipeline([SettleChoices()]).run(before)
    assert after is before
