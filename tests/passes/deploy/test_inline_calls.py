from __future__ import annotations

from pathlib import Path

from passes.deploy.inline_calls import InlineCalls
from rewriter.pipeline import Pipeline, Step
from tests.passes.control_flow.test_settle_choices import Chosen
from tests.passes.layered import Layered, computing, saved, serving


def test_what_a_function_computes_takes_the_place_of_its_call(tmp_path: Path) -> None:
    before = saved(tmp_path / "m", Layered())
    calls = "StatefulPartitionedCall = StatefulPartitionedCall(Conv2D, unknown, unknown_0, unknown_1, unknown_2)"
    assert computing(serving(before)) == [
        "Conv2D = Conv2D(x, Conv2D/ReadVariableOp)",
        calls,
        "PartitionedCall = PartitionedCall(StatefulPartitionedCall)",
    ]
    after, _ = Pipeline([InlineCalls()]).run(before)
    read = "StatefulPartitionedCall/FusedBatchNormV3/ReadVariableOp"
    kernel = f"FusedBatchNormV3(Conv2D, {read}, {read}_1, {read}_2, {read}_3)"
    assert computing(serving(after)) == [
        "Conv2D = Conv2D(x, Conv2D/ReadVariableOp)",
        f"StatefulPartitionedCall/FusedBatchNormV3 = {kernel}",
        "PartitionedCall/mul = Mul(StatefulPartitionedCall/Identity, PartitionedCall/mul/y)",
    ]


def test_it_is_run_until_no_call_is_left(tmp_path: Path) -> None:
    model = saved(tmp_path / "m", Layered())
    runs: list[Step] = []
    while not runs or runs[-1].edits:
        model, (step,) = Pipeline([InlineCalls()]).run(model)
        runs.append(step)
    assert [bool(step.edits) for step in runs] == [True, True, False]  # the signature's wrapper calls `serve`
    assert not any("PartitionedCall" in n.op for n in serving(model).nodes.values())


def test_a_model_without_batch_norm_is_left(tmp_path: Path) -> None:
    before = saved(tmp_path / "m", Chosen(flag=True))
    after, _ = Pipeline([InlineCalls()]).run(before)
    assert after is before
