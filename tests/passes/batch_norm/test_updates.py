from __future__ import annotations

import pytest

from passes.batch_norm.updates import scalar, update
from rewriter.ir import MAIN, Edge, Graph, Model, Value
from rewriter.text import from_text

CONSTANT = '{dtype: float32, value: proto "tensor { dtype: DT_FLOAT tensor_shape { } float_val: %s }"}'
HEAD = "stateful function f(x: float32, m: resource) -> (y = b: float32) {\n  b = Mean(x, x) {T: float32}\n"
FORMS = {
    "kernel": "a = AssignVariableOp(m, b) {dtype: float32}",
    "assign_sub": f"""
  old = ReadVariableOp(m) {{dtype: float32}}
  d = Sub(old, b) {{T: float32}}
  w = Const() {CONSTANT % 0.25}
  p = Mul(d, w) {{T: float32}}
  a = AssignSubVariableOp(m, p) {{dtype: float32}}""",
    "assign": f"""
  old = ReadVariableOp(m) {{dtype: float32}}
  one = Const() {CONSTANT % 1}
  decay = Const() {CONSTANT % 0.75}
  w = Sub(one, decay) {{T: float32}}
  p = Mul(b, w) {{T: float32}}
  q = Mul(old, decay) {{T: float32}}
  s = AddV2(q, p) {{T: float32}}
  a = AssignVariableOp(m, s) {{dtype: float32}}""",
    "corrected": f"""
  old = ReadVariableOp(m) {{dtype: float32}}
  bessel = Rank(x) {{T: float32}}
  c = Mul(b, bessel) {{T: float32}}
  d = Sub(old, c) {{T: float32}}
  w = Const() {CONSTANT % 0.25}
  p = Mul(d, w) {{T: float32}}
  a = AssignSubVariableOp(m, p) {{dtype: float32}}""",
}


def found(body: str) -> object:
    graph = from_text(f"{HEAD}  {body.strip()}\n}}\n")
    model = Model({MAIN: Graph(MAIN, {}), "f": graph})
    return update(model, graph, Value("b"))


@pytest.mark.parametrize(
    ("form", "entered", "weight"),
    [
        ("kernel", ("a", 1), None),
        ("assign_sub", ("d", 1), 0.25),
        ("assign", ("p", 0), 0.25),
        ("corrected", ("c", 0), 0.25),
    ],
)
def test_each_form_says_where_the_statistic_enters_and_with_which_weight(
    form: str, entered: tuple[str, int], weight: float | None
) -> None:
    result = found(FORMS[form])
    assert result.edges == (Edge("f", *entered),)  # type: ignore[attr-defined]
    assert result.weight == weight  # type: ignore[attr-defined]
    assert result.runs == (("f", "a"),)  # type: ignore[attr-defined]
    assert result.targets == (("f", Value("m")),)  # type: ignore[attr-defined]


def test_a_statistic_that_normalises_is_no_update() -> None:
    body = """
  inv = Rsqrt(b) {T: float32}
  y1 = Mul(x, inv) {T: float32}
  r = Relu(y1) {T: float32}
  a = AssignVariableOp(m, r) {dtype: float32}"""
    assert found(body).edges == ()  # type: ignore[attr-defined]


def test_a_biased_average_is_followed_to_the_average() -> None:
    graph = from_text(f"""\
stateful function f(x: float32, biased: resource, m: resource) -> (y = b: float32) {{
  b = Mean(x, x) {{T: float32}}
  old = ReadVariableOp(biased) {{dtype: float32}}
  d = Sub(old, b) {{T: float32}}
  w = Const() {CONSTANT % 0.5}
  p = Mul(d, w) {{T: float32}}
  a = AssignSubVariableOp(biased, p) {{dtype: float32}}
  again = ReadVariableOp(biased) after(a) {{dtype: float32}}
  one = RealDiv(again, w) {{T: float32}}
  average = AssignVariableOp(m, one) {{dtype: float32}}
}}
""")
    result = update(Model({MAIN: Graph(MAIN, {}), "f": graph}), graph, Value("b"))
    assert [target for _, target in result.targets] == [Value("biased"), Value("m")]
    assert result.runs == (("f", "a"), ("f", "average"))
    assert result.weight == 0.5


def test_numbers_are_computed_from_constants_alone() -> None:
    graph = from_text(f"""\
function f(x: float32) -> (y = s: float32) {{
  one = Const() {CONSTANT % 1}
  decay = Const() {CONSTANT % 0.75}
  s = Sub(one, decay) {{T: float32}}
  t = Sub(one, x) {{T: float32}}
}}
""")
    assert scalar(graph, Value("s")) == 0.25
    assert scalar(graph, Value("t")) is None
