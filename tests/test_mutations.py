"""A small change that a rewrite did not make is found among all that it made: in the text, the JSON and the page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from click.testing import CliRunner
from playwright.sync_api import Browser

import bnqat
from rewriter.app.cli import main
from tests.browsing import opened
from tests.mutate import function_with, mutated, nodes_of, with_value

Paths = Callable[..., Path]


def edge_of_an_untouched_node(meta: Any) -> tuple[str, str]:
    relu = next(nodes_of(function_with(meta, "Conv2D"), "Relu"))
    relu.input[0] = next(nodes_of(function_with(meta, "Conv2D"), "Conv2D")).name + ":output:0"
    return relu.name, "input 0"


def edge_of_a_node_that_was_rewired(meta: Any) -> tuple[str, str]:
    function = function_with(meta, "FusedBatchNormV3", training=False)
    kernel = next(nodes_of(function, "FusedBatchNormV3"))
    kernel.input[0] = "x"
    return kernel.name, "input 0"


def edge_of_a_node_that_was_added(meta: Any) -> tuple[str, str]:
    function = function_with(meta, "FusedBatchNormV3", training=False)
    quantizers = [n for n in function.node_def if "_bnqat" in n.attr]
    data = [len([i for i in n.input if i[0] != "^"]) - 1 for n in quantizers[:2]]
    quantizers[0].input[data[0]] = quantizers[1].input[data[1]]
    return quantizers[0].name, f"input {data[0]}"


def control_input(meta: Any) -> tuple[str, str]:
    function = function_with(meta, "Conv2D")
    relu = next(nodes_of(function, "Relu"))
    relu.input.append("^" + next(nodes_of(function, "Conv2D")).name)
    return relu.name, "control inputs"


def attribute(meta: Any) -> tuple[str, str]:
    kernel = next(nodes_of(function_with(meta, "FusedBatchNormV3", training=False), "FusedBatchNormV3"))
    kernel.attr["epsilon"].f = 0.5
    return kernel.name, "attribute epsilon"


def attribute_of_a_node_that_was_added(meta: Any) -> tuple[str, str]:
    node = next(n for n in function_with(meta, "FusedBatchNormV3", training=False).node_def if "_bnqat" in n.attr)
    node.attr["_bnqat"].s = node.attr["_bnqat"].s.replace(b'"bits": 4', b'"bits": 5')
    return node.name, "attribute _bnqat"


def node(meta: Any) -> tuple[str, str]:
    function_with(meta, "Conv2D").node_def.add(name="stray", op="NoOp")
    return "stray", ""


def function_that_was_added(meta: Any) -> tuple[str, str]:
    function = next(f for f in meta.graph_def.library.function if "bnqat_train" in f.signature.name)
    next(nodes_of(function, "Relu")).device = "/device:CPU:0"
    return function.signature.name, ""


def variable(meta: Any) -> tuple[str, str]:
    saved = next(n.variable for n in meta.object_graph_def.nodes if n.variable.name == "kernel_0")
    saved.trainable = False
    return "kernels/0/.ATTRIBUTES/VARIABLE_VALUE", "trainable"


def variable_that_was_added(meta: Any) -> tuple[str, str]:
    saved = next(n.variable for n in meta.object_graph_def.nodes if n.variable.name == "quantization/step")
    saved.aggregation = 1
    return "quantization/step/.ATTRIBUTES/VARIABLE_VALUE", "aggregation"


def signature(meta: Any) -> tuple[str, str]:
    meta.signature_def["serving_default"].inputs["x"].tensor_shape.dim[1].size = 9
    return "serving_default", "input x"


def objects(meta: Any) -> tuple[str, str]:
    meta.object_graph_def.nodes[0].user_object.identifier = "_tf_keras_model"
    return "the root", "identifier"


def children_that_are_exchanged(meta: Any) -> tuple[str, str]:
    norm = next(n for n in meta.object_graph_def.nodes if {"gamma", "beta"} <= {c.local_name for c in n.children})
    gamma, beta = (next(c for c in norm.children if c.local_name == name) for name in ("gamma", "beta"))
    gamma.node_id, beta.node_id = beta.node_id, gamma.node_id
    return "norms.0", "child gamma"


def another_name_of_an_object(meta: Any) -> tuple[str, str]:
    root = meta.object_graph_def.nodes[0]
    root.children.add(node_id=root.children[0].node_id, local_name="zzz")
    return "the root", "child zzz"


def default_of_a_signature(meta: Any) -> tuple[str, str]:
    meta.signature_def["serving_default"].defaults["x"].dtype = 1
    return "serving_default", "default of x"


def device_of_a_variable(meta: Any) -> tuple[str, str]:
    next(n for n in meta.object_graph_def.nodes if n.variable.name == "kernel_0").variable.device = "/device:CPU:0"
    return "kernels/0/.ATTRIBUTES/VARIABLE_VALUE", "device"


def definition_of_an_op(meta: Any) -> tuple[str, str]:
    op = next(o for o in meta.meta_info_def.stripped_op_list.op if o.name == "Relu")
    op.is_commutative = True
    return "meta graph", "definition of Relu"


def resource_of_an_argument(meta: Any) -> tuple[str, str]:
    function = function_with(meta, "FusedBatchNormV3", training=False)
    function.resource_arg_unique_id[1] = 77
    return function.signature.name, "description and numbers of resources"


MUTATIONS = (
    children_that_are_exchanged,
    another_name_of_an_object,
    default_of_a_signature,
    device_of_a_variable,
    definition_of_an_op,
    resource_of_an_argument,
    edge_of_an_untouched_node,
    edge_of_a_node_that_was_rewired,
    edge_of_a_node_that_was_added,
    control_input,
    attribute,
    attribute_of_a_node_that_was_added,
    node,
    function_that_was_added,
    variable,
    variable_that_was_added,
    signature,
    objects,
)


@pytest.mark.parametrize("change", MUTATIONS, ids=lambda change: change.__name__)
def test_one_other_change_is_found(
    change: Callable[[Any], tuple[str, str]],
    browser: Browser,
    model: Paths,
    rewritten: Paths,
    tmp_path: Path,
) -> None:
    changes: list[tuple[str, str]] = []
    after = mutated(rewritten("module", bits=4), tmp_path / "mutated", lambda meta: changes.append(change(meta)))
    ((name, aspect),) = changes
    assert_found_once(model("module"), after, name, aspect, browser, tmp_path=tmp_path)


@pytest.mark.parametrize("key", ["kernels/0", "quantization/bits/gamma"])
def test_a_value_is_found(key: str, browser: Browser, model: Paths, rewritten: Paths, tmp_path: Path) -> None:
    key += "/.ATTRIBUTES/VARIABLE_VALUE"
    after = with_value(rewritten("module", bits=4), tmp_path / "mutated", key, lambda v: v + np.ones_like(v))
    assert run_diff(model("module"), after)[2].startswith("no other changes")
    assert run_diff(model("module"), after, "--values")[2].startswith("1 other change (")
    assert_found_once(model("module"), after, key, "value", browser, tmp_path=tmp_path, values=True)


def run_diff(*arguments: Path | str) -> list[str]:
    done = CliRunner().invoke(main, ["diff", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    return done.stdout.splitlines()


def assert_found_once(
    before: Path,
    after: Path,
    name: str,
    aspect: str,
    browser: Browser,
    *,
    tmp_path: Path,
    values: bool = False,
) -> None:
    page = tmp_path / "page.html"
    difference = bnqat.diff(before, after, values=values)
    text = str(difference).splitlines()
    page.write_text(difference.to_html(), encoding="utf-8")

    assert text[2].startswith("1 other change (")
    assert name in text[3]
    assert text[3].lstrip()[0] in "+~-?"

    content = json.loads(difference.to_json())
    others = [c for c in content["changes"] if not c["by"]]
    assert content["verdict"]["other_changes"] == len(others) == 1
    assert content["changes"][0] == others[0]
    assert others[0]["name"] == name
    assert not aspect or aspect in [d["aspect"] for d in others[0]["details"]]

    with opened(browser, page) as shown:
        fact = shown.page.locator("#others")
        assert fact.locator("b").inner_text() == "1 other change"
        assert "bad" in (fact.get_attribute("class") or "")
        assert shown.page.locator("#list h2").first.inner_text().lower() == "other changes"
        assert shown.page.evaluate("current.name") == name  # the first that is shown
        panel = shown.page.locator("#panel").inner_text()
        assert "by nothing that the record of the rewrite knows" in panel
        assert not aspect or aspect in panel
        shown.page.locator("#filters button", has_text="other changes").click()
        assert shown.page.locator("#list [data-key]").count() == 1


def test_what_the_record_has_and_is_not_so_is_found(model: Paths, rewritten: Paths, tmp_path: Path) -> None:
    """A signature that the rewrite added is taken away again."""

    def edit(meta: Any) -> None:
        del meta.signature_def["train"]

    report = bnqat.diff(model("module"), mutated(rewritten("module", bits=4), tmp_path / "mutated", edit)).report
    (change,) = report.other
    assert (change.kind, change.what, change.name) == ("signature", "missing", "train")


def test_a_rewired_edge_that_is_as_before_again_is_found(model: Paths, rewritten: Paths, tmp_path: Path) -> None:
    def edit(meta: Any) -> None:
        function = function_with(meta, "FusedBatchNormV3", training=False)
        kernel = next(nodes_of(function, "FusedBatchNormV3"))
        quantizer = next(n for n in function.node_def if n.name == kernel.input[1].partition(":")[0])
        kernel.input[1] = quantizer.input[len([i for i in quantizer.input if i[0] != "^"]) - 1]

    report = bnqat.diff(model("module"), mutated(rewritten("module", bits=4), tmp_path / "mutated", edit)).report
    (change,) = report.other
    assert (change.what, [d.aspect for d in change.details]) == ("missing", ["input 1"])


def test_a_changed_source_is_found(model: Paths, rewritten: Paths, tmp_path: Path) -> None:
    """The record is about the model that was rewritten, and no other."""

    def edit(meta: Any) -> None:
        next(nodes_of(function_with(meta, "FusedBatchNormV3"), "FusedBatchNormV3")).input[1] = "x"

    source = mutated(model("module"), tmp_path / "other", edit)
    report = bnqat.diff(source, rewritten("module", bits=4)).report
    assert [[d.aspect for d in c.details] for c in report.other] == [["input 1"]]
    assert [d.old for d in report.other[0].details] == ["x"]


def test_a_forged_or_damaged_record(model: Paths, rewritten: Paths, tmp_path: Path) -> None:
    after = mutated(rewritten("module", bits=4), tmp_path / "mutated", lambda _: None)
    record = after / "assets.extra" / "bnqat_changes.json"
    for text in ("", "{}", "[1]", '{"schema_version": 1, "changes": {"node": 3}}', "\0"):
        record.write_text(text)
        with pytest.raises(bnqat.Error, match=r"bnqat_changes\.json is no record of a rewrite"):
            bnqat.diff(model("module"), after)
    record.write_text('{"schema_version": 2, "source": "", "authors": [], "changes": {}}')
    with pytest.raises(bnqat.Error, match="later version"):
        bnqat.diff(model("module"), after)
    record.unlink()
    report = bnqat.diff(model("module"), after).report
    assert report.verdict.other_changes is None
    assert report.other == []
    assert report.verdict.sites_rewritten == 2


def test_after_fine_tuning_the_record_is_gone_and_functions_have_new_names(
    model: Paths, rewritten: Paths, tmp_path: Path
) -> None:
    loaded = tf.saved_model.load(str(rewritten("module", bits=4)))
    tf.saved_model.save(loaded, str(tmp_path / "tuned"), signatures=dict(loaded.signatures))
    report = bnqat.diff(model("module"), tmp_path / "tuned").report
    assert report.verdict.other_changes is None
    assert report.verdict.sites_rewritten == report.verdict.sites_found == 2
    assert report.verdict.signatures_intact == 1
    assert len(report.renamed) >= 2
