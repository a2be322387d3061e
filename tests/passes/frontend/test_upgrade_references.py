from __future__ import annotations

from passes.frontend.upgrade_references import UpgradeReferences
from rewriter.ir import MAIN, Model, Variable
from rewriter.pipeline import Pipeline
from rewriter.text import from_text, to_text

SCALAR = 'shape: proto "shape { }"'
BEFORE = f"""\
function main() -> () {{
  v = VariableV2() {{dtype: float32, {SCALAR}, shared_name: ""}}
  read = Identity(v) {{T: float32, _class: "loc:@v"}}
  c = Placeholder() {{dtype: bool}}
  assign = Assign(v, read) {{T: float32, use_locking: true}}
  after = Neg(assign) {{T: float32}}
  direct = Abs(v) {{T: float32}}
  switch = RefSwitch(v, c) {{T: float32}}
  add = AssignAdd(switch:1, read) {{T: float32}}
  ready = IsVariableInitialized(v) {{dtype: float32}}
  momentum = ApplyGradientDescent(v, read, read) {{T: float32}}
}}
"""
AFTER = """\
  v = VarHandleOp()
  read = ReadVariableOp(v)
  c = Placeholder()
  assign = AssignVariableOp(v, read)
  after = Neg(assign/value/ReadVariableOp)
  direct = Abs(v/value/ReadVariableOp)
  switch = Switch(v, c)
  add = AssignAddVariableOp(switch:1, read)
  ready = VarIsInitializedOp(v)
  momentum = ResourceApplyGradientDescent(v, read, read)
  assign/value/ReadVariableOp = ReadVariableOp(v) after(assign)
  v/value/ReadVariableOp = ReadVariableOp(v)
"""


def test_every_use_becomes_its_twin_for_resources() -> None:
    graph = from_text(BEFORE)
    variable = Variable("v", "v", "float32", (), trainable=True, node="v")
    model = Model({MAIN: graph}, {"v": variable}, object_based=False)
    after, (step,) = Pipeline([UpgradeReferences()]).run(model)
    lines = [line.partition(" {")[0] for line in to_text(after.graphs[MAIN]).splitlines()[1:-1]]
    assert lines == AFTER.splitlines()
    assert step.notes == (
        "1 reference variables are resource variables now, so that they can be trained after tf.saved_model.load",
    )
    nodes = after.graphs[MAIN].nodes
    assert nodes["v"].attrs["shared_name"].s == b"v"
    assert set(nodes["assign"].attrs) == {"dtype"}
    assert nodes["read"].attrs["_class"].s == b"loc:@v"
    twice, _ = Pipeline([UpgradeReferences()]).run(after)
    assert twice is after
