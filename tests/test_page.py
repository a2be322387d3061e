"""The page of a comparison, in a real browser."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from xml.etree import ElementTree as ET

import pytest
import tensorflow as tf
from playwright.sync_api import Browser

import bnqat
from tests.browsing import Opened, opened
from tests.models import save_module
from tests.mutate import mutated

Paths = Callable[..., Path]


@pytest.fixture(scope="module")
def pages(model: Paths, rewritten: Paths, tmp_path_factory: pytest.TempPathFactory) -> Paths:
    """Write the page that compares a model with its rewrite, and the JSON report beside it."""
    folder = tmp_path_factory.mktemp("pages")

    def page(name: str, **options: Any) -> Path:
        file = folder / f"{name}{len(options)}.html"
        if not file.exists():
            comparison = bnqat.diff(model(name), rewritten(name, bits=4), **options)
            file.with_suffix(".json").write_text(comparison.to_json(), encoding="utf-8")
            file.write_text(comparison.to_html(), encoding="utf-8")
        return file

    return page


def report_of(page: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    return report


def address(graph: str, node: str, kind: str = "node") -> str:
    return "#" + urlencode({"kind": kind, "graph": graph, "name": node})


def texts(shown: Opened, selector: str) -> list[str]:
    return [(text or "").strip() for text in shown.page.locator(selector).all_text_contents()]


def test_one_request_and_the_verdict(browser: Browser, pages: Paths) -> None:
    file = pages("keras_save")
    report = report_of(file)
    with opened(browser, file) as shown:
        assert shown.requests == [file.as_uri()]
        verdict = report["verdict"]
        assert shown.page.locator("#headline").inner_text() == report["headline"]
        facts = {fact: text for fact in ("others", "signatures", "variables") for text in texts(shown, f"#{fact}")}
        added = sum(c["kind"] == "variable" for c in report["changes"])
        assert facts == {
            "others": f"✓No other changesthe record of the rewrite explains all {len(report['changes']):,} changes",
            "signatures": "✓1 signature is intactnew: train",
            "variables": f"·Variables: {added} added",
        }
        assert shown.page.locator("#skipped").count() == 0
        assert report["headline"] == "2 batch norms were quantised to 4 bits; the quantisers are on, so outputs differ."
        assert verdict["batch_norms_quantized"] == 2
        assert verdict["batch_norms"] == 2
        assert verdict["sites_rewritten"] == verdict["sites_found"] > 2
        shown.page.locator("#ops summary").click()
        op_counts = set(texts(shown, "#ops div span"))
        expected = {f"{op} {a}" if a == b else f"{op} {a} → {b}" for op, (a, b) in report["ops"].items()}
        assert op_counts == expected


@pytest.mark.parametrize("name", ["keras_save", "module", "v1_by_hand_references", "if"])
def test_every_site_is_as_the_report_says(name: str, browser: Browser, pages: Paths) -> None:
    file = pages(name)
    sites = [site for layer in report_of(file)["layers"] for site in layer["sites"]]
    assert sites
    drawn = 0
    with opened(browser, file) as shown:
        for site in sites:
            shown.page.evaluate("where => { location.hash = where }", address(site["graph"], site["node"]))
            shown.page.wait_for_function("name => current && current.name === name", arg=site["node"])
            rows = shown.page.locator("tr.input").evaluate_all(
                """rows => rows.map(
                  r => [r.dataset.node, r.dataset.port, ...[...r.children].map(c => c.title || c.textContent)]
                )"""
            )
            expected = [
                [
                    i["node"],
                    i["port"],
                    f"{i['role']} of the batch" if i["use"] == "statistic" else i["role"],
                    i["old"] or (i["variable"] if i["variable"] and site["what"] == "same" else "—"),
                    "—" if i["new"] is None else i["quantized"] or i["new"],
                    "show the nodes that compute it" if i["formula"] else "",
                    i["port"] if i["node"] == site["node"] else f"{i['port']} of {i['node']}",
                ]
                for i in site["inputs"]
            ]
            assert all(row in rows for row in expected)
            shown_formulas = shown.page.locator("td.formula").all_text_contents()
            assert shown_formulas == [i["formula"] for i in site["inputs"] if i["formula"]]
            for i in site["inputs"]:
                if i["node"] != site["node"] or i["use"] != "input" or i["new"] is None:
                    continue
                source = (i["quantized"] or i["new"]).partition(":")[0]
                edges = shown.page.locator('.pane[data-side="after"] path.edge').evaluate_all(
                    "edges => edges.map(e => [e.dataset.source, e.dataset.target, e.dataset.port])"
                )
                assert [source, site["node"], i["port"]] in edges
                labels = shown.page.locator('.pane[data-side="after"] [data-formula]').evaluate_all(
                    "labels => labels.map(l => l.dataset.formula)"
                )
                assert not i["formula"] or f"{i['role']} ─ {i['formula']}" in labels
                drawn += 1
    assert drawn >= len(sites)


def test_keys(browser: Browser, pages: Paths) -> None:
    with opened(browser, pages("module")) as shown:
        page = shown.page
        stops = page.evaluate("STOPS.map(s => [s.graph, s.name])")
        assert len(stops) > 10
        first = shown.stop()
        assert [first["graph"], first["name"]] == stops[0]
        page.keyboard.press("j")
        page.keyboard.press("j")
        assert [shown.stop()["graph"], shown.stop()["name"]] == stops[2]
        page.keyboard.press("k")
        assert [shown.stop()["graph"], shown.stop()["name"]] == stops[1]
        assert page.locator(".pane").count() == 2
        page.keyboard.press("u")
        assert page.locator(".pane").count() == 1
        page.keyboard.press("u")
        page.keyboard.press("k")
        few = page.locator('.pane[data-side="after"] .node').count()
        page.keyboard.press("2")
        more = page.locator('.pane[data-side="after"] .node').count()
        assert more > few
        page.keyboard.press("1")
        assert page.locator('.pane[data-side="after"] [data-formula]').count() == 4
        page.keyboard.press("e")
        assert page.locator('.pane[data-side="after"] [data-formula]').count() == 0
        assert page.locator('.pane[data-side="after"] .node.added').count() >= 4
        page.keyboard.press("/")
        assert page.evaluate("document.activeElement.id") == "search"
        page.keyboard.press("Escape")
        page.keyboard.press("?")
        assert page.locator("#help").is_visible()
        page.keyboard.press("Escape")
        assert not page.locator("#help").is_visible()
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.keyboard.press("t")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != dark


def test_search_by_name_and_op_and_filters(browser: Browser, pages: Paths) -> None:
    with opened(browser, pages("module")) as shown:
        page = shown.page
        page.fill("#search", "^Conv2D$")
        names = page.locator("#list [data-key]").evaluate_all("all => all.map(b => JSON.parse(b.dataset.key)[2])")
        assert set(names) == {"Conv2D", "Conv2D_1"}
        page.fill("#search", "^SelectV2$")
        comparison = page.locator("#list [data-key]").evaluate_all("all => all.map(b => JSON.parse(b.dataset.key)[2])")
        assert comparison
        assert all("SelectV2" in name for name in comparison)
        page.fill("#search", "(")
        assert "wrong" in (page.get_attribute("#search", "class") or "")
        assert page.locator("#wrong").inner_text().startswith("This is no regular expression")
        page.fill("#search", "^Conv2D$")
        assert not page.locator("#wrong").is_visible()
        page.keyboard.press("Enter")
        assert shown.stop()["name"] in ("Conv2D", "Conv2D_1")
        page.keyboard.press("Escape")
        assert page.input_value("#search") == ""
        assert page.locator("#list h2").count() >= 3
        page.evaluate("select(STOPS[0])")
        page.evaluate("refresh()")
        marked = page.locator('#list [aria-current="true"]')
        assert marked.get_attribute("data-layer") == report_of(pages("module"))["layers"][0]["name"]
        page.locator("#filters button", has_text="\N{MINUS SIGN} removed").click()
        assert "1 match" in page.locator("#list h2").first.inner_text().lower()
        assert texts(shown, "#list [data-key]")[0].startswith("\N{MINUS SIGN} fingerprint.pb")
        page.locator("#filters button", has_text="\N{MINUS SIGN} removed").click()
        assert page.locator("#list h2").count() >= 3


def test_the_tree_rolls_up_what_changed(browser: Browser, pages: Paths) -> None:
    file = pages("module")
    nodes = [c for c in report_of(file)["changes"] if c["kind"] == "node"]
    with opened(browser, file) as shown:
        for graph in {c["graph"] for c in nodes}:
            own = [c["what"] for c in nodes if c["graph"] == graph]
            counts = " ".join(
                f"{sign}{own.count(what)}"
                for what, sign in (("added", "+"), ("removed", "\N{MINUS SIGN}"), ("changed", "~"))
                if own.count(what)
            )
            name = report_of(file)["labels"][graph] if graph else "the main graph"
            line = shown.page.locator("#list button[aria-expanded]", has_text=name).first
            assert line.inner_text().endswith(counts)
        main = shown.page.locator("#list button[aria-expanded]", has_text="the main graph")
        main.click()
        assert main.get_attribute("aria-expanded") == "true"
        inner = shown.page.locator("#list button[aria-expanded]", has_text="quantization/")
        inner.first.click()
        assert shown.page.locator("#list [data-key]", has_text="step").count() > 0


def test_fragment_links_to_a_site_and_follows_the_choice(browser: Browser, pages: Paths) -> None:
    file = pages("keras_save")
    site = report_of(file)["layers"][1]["sites"][2]
    with opened(browser, file, address(site["graph"], site["node"])) as shown:
        assert (shown.stop()["graph"], shown.stop()["name"]) == (site["graph"], site["node"])
        shown.page.keyboard.press("j")
        now = shown.stop()
        copied = shown.page.evaluate("location.hash")
    with opened(browser, file, copied) as shown:
        assert (shown.stop()["graph"], shown.stop()["name"]) == (now["graph"], now["name"])


SHOWN = """() => [...document.querySelectorAll('.pane .scroll')].map(box => {
  const seen = box.getBoundingClientRect();
  return [...box.querySelectorAll('.node, .pill')].map(node => {
    const at = node.querySelector('rect').getBoundingClientRect(), middle = [at.x + at.width / 2, at.y + at.height / 2];
    const within = middle[0] >= seen.x && middle[0] <= seen.right && middle[1] >= seen.y && middle[1] <= seen.bottom;
    return [node.dataset.name || node.dataset.formula, within, at.x];
  });
})"""
"""For each pane, the name, whether its middle is in sight, and the left side of each box."""


def middles(shown: Opened) -> list[float]:
    """Return the left side of the chosen node in each pane, in pixels of the window."""
    found: list[float] = shown.page.locator(".pane .node.middle rect").evaluate_all(
        "all => all.map(rect => { const at = rect.getBoundingClientRect(); return at.x + at.width / 2 })"
    )
    return found


def test_both_sides_move_together(browser: Browser, pages: Paths) -> None:
    with opened(browser, pages("keras3")) as shown:
        page = shown.page
        page.keyboard.press("2")
        start = middles(shown)
        assert start[0] == pytest.approx(start[1], abs=1)
        pane = page.locator(".pane .scroll").first.bounding_box()
        assert pane is not None
        page.mouse.move(pane["x"] + 300, pane["y"] + 100)
        page.mouse.down()
        by = 40 if page.evaluate("document.querySelector('.scroll').scrollLeft") >= 40 else -40
        page.mouse.move(pane["x"] + 300 + by, pane["y"] + 100)
        page.mouse.up()
        page.wait_for_timeout(100)  # both panes have scrolled
        moved = middles(shown)
        assert moved[0] == pytest.approx(moved[1], abs=1)
        assert moved[0] == pytest.approx(start[0] + by, abs=2)
        page.keyboard.press("+")
        page.keyboard.press("+")
        assert page.evaluate("view.zoom") == pytest.approx(1.25**2)
        zoomed = middles(shown)
        assert zoomed[0] == pytest.approx(zoomed[1], abs=1)
        page.keyboard.press("f")
        assert all(within for boxes in page.evaluate(SHOWN) for _, within, _ in boxes)


@pytest.mark.parametrize("name", ["keras3", "mobilenet_export", "keras_save", "v1_by_hand_references"])
def test_opens_readable_on_a_place_that_shows_something(name: str, browser: Browser, pages: Paths) -> None:
    file = pages(name)
    first = report_of(file)["layers"][0]
    with opened(browser, file) as shown:
        assert shown.page.locator("#head h2").inner_text() == f"~ {first['name']}"
        sizes = shown.page.locator("#panes svg text").evaluate_all(
            """all => all.map(text => parseFloat(getComputedStyle(text).fontSize)
              * text.ownerSVGElement.getBoundingClientRect().width / text.ownerSVGElement.viewBox.baseVal.width)"""
        )
        assert len(sizes) > 20
        assert min(sizes) >= 10.9
        for boxes in shown.page.evaluate(SHOWN):
            in_sight = {name for name, within, _ in boxes if within}
            assert first["sites"][0]["node"] in in_sight
            assert len(in_sight) >= min(5, len(boxes))
        after = {name for name, within, _ in shown.page.evaluate(SHOWN)[1] if within}
        for key in ("3", "e", "u", "u", "e", "1"):  # in every other view, too
            shown.page.keyboard.press(key)
            shown.page.wait_for_timeout(100)
            chosen = shown.page.evaluate("current.name")
            assert all(
                [chosen, True] in [[n, within] for n, within, _ in boxes] for boxes in shown.page.evaluate(SHOWN)
            )
        site = first["sites"][0]
        own_inputs = [i for i in site["inputs"] if i["node"] == site["node"] and i["use"] == "input" and i["formula"]]
        assert own_inputs
        assert {f"{i['role']} ─ {i['formula']}" for i in own_inputs} <= after
        titles = shown.page.locator('.pane[data-side="after"] .node .op').all_text_contents()
        assert {i["variable"].rpartition("/")[2] for i in own_inputs} <= {title.strip("~+ ") for title in titles}


@pytest.mark.parametrize(("name", "hops"), [("keras3", "1"), ("keras3", "3"), ("mobilenet_export", "3")])
def test_everything_outside_a_pane_has_a_way_there(name: str, hops: str, browser: Browser, pages: Paths) -> None:
    """The buttons count the boxes that are not in sight, and pressed often enough they show each of them."""
    with opened(browser, pages(name)) as shown:
        shown.page.keyboard.press(hops)
        for number, pane in enumerate(shown.page.locator(".pane").all()):
            boxes = shown.page.evaluate(SHOWN)[number]
            seen = {box for box, within, _ in boxes if within}
            counted = sum(int(re.sub(r"\D", "", text)) for text in pane.locator(".beyond:visible").all_inner_texts())
            assert counted >= len(boxes) - len(seen)
            for way in ("scroll left", "scroll up", "scroll right", "scroll down"):
                button = pane.get_by_title(way)
                for _ in range(40):
                    if not button.is_visible():
                        break
                    button.evaluate("button => new Promise(done => { button.click(); setTimeout(done, 50) })")
                    seen |= {box for box, within, _ in shown.page.evaluate(SHOWN)[number] if within}
                assert not button.is_visible()
            # A corner may have been passed over: every box can be brought into sight where it is.
            for box in {box for box, _, _ in boxes} - seen:
                pane.locator(".node, .pill").evaluate_all(
                    """(all, name) => all.find(n => (n.dataset.name || n.dataset.formula) === name)
                      .querySelector('rect').scrollIntoView({ block: 'center', inline: 'center' })""",
                    box,
                )
                assert [box, True] in [[n, within] for n, within, _ in shown.page.evaluate(SHOWN)[number]]


@pytest.mark.parametrize("name", ["keras3", "mobilenet_export", "module", "if"])
def test_edges_run_past_boxes(name: str, browser: Browser, pages: Paths) -> None:
    """No edge runs through a box, and all text is in boxes: so no edge crosses a text."""
    crossings = """() => [...document.querySelectorAll('.pane svg')].flatMap(svg => {
      const boxes = [...svg.querySelectorAll('.node, .pill')].map(group => {
        const { e, f } = group.transform.baseVal.consolidate().matrix, rect = group.querySelector('rect');
        const [width, height] = ['width', 'height'].map(side => parseFloat(rect.getAttribute(side)));
        return { name: group.dataset.name || group.dataset.formula, x: e, y: f, width, height };
      });
      return [...svg.querySelectorAll('.edge')].flatMap(edge => {
        const points = Array.from({ length: 200 }, (_, i) => edge.getPointAtLength(edge.getTotalLength() * i / 199));
        const inside = (b, p) => p.x > b.x + 1 && p.x < b.x + b.width - 1 && p.y > b.y + 1 && p.y < b.y + b.height - 1;
        return boxes.filter(b => points.some(p => inside(b, p)))
          .map(b => [edge.dataset.source, edge.dataset.target || '', b.name]);
      });
    })"""
    with opened(browser, pages(name)) as shown:
        stops = shown.page.evaluate("STOPS.filter(s => s.site).length")
        for _ in range(min(6, stops)):
            for key in ("1", "3", "e", "u", "u", "e"):
                shown.page.keyboard.press(key)
                assert shown.page.locator(".pane .edge").count() > 0
                assert shown.page.evaluate(crossings) == []
            shown.page.keyboard.press("j")
        inside = shown.page.evaluate(
            "[...document.querySelectorAll('.pane svg text')].every(t => t.closest('.node, .pill'))"
        )
        assert inside


def test_downloads(browser: Browser, pages: Paths, tmp_path: Path) -> None:
    file = pages("module")
    with opened(browser, file) as shown:
        saved = {}
        for kind in ("SVG", "PNG", "JSON"):
            with shown.page.expect_download() as waiting:
                shown.page.locator("#tools button", has_text=kind).click()
            saved[kind] = tmp_path / waiting.value.suggested_filename
            waiting.value.save_as(saved[kind])
        labels = shown.page.evaluate(
            "arrange(currentPicture(), 1, false, 'after').boxes.map(b => b.formula).filter(Boolean)"
        )
    assert json.loads(saved["JSON"].read_text(encoding="utf-8")) == report_of(file)
    drawn = ET.parse(saved["SVG"]).getroot()  # noqa: S314  our own file
    assert drawn.tag.endswith("svg")
    assert "var(" not in saved["SVG"].read_text(encoding="utf-8")
    formulas = [e.get("data-formula") for e in drawn.iter() if e.get("data-formula")]
    assert sorted(filter(None, formulas)) == sorted(labels) != []
    png = saved["PNG"].read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", png[16:24])
    assert width > 500
    assert height > 200


def test_in_a_notebook(
    browser: Browser,
    model: Paths,
    rewritten: Paths,
    tmp_path: Path,
) -> None:
    comparison = bnqat.diff(model("module"), rewritten("module", bits=4))
    notebook = tmp_path / "notebook.html"
    notebook.write_text(f"<!doctype html><p>cell</p>{comparison._repr_html_()}", encoding="utf-8")
    with opened(browser, notebook) as shown:
        frame = shown.page.frame_locator("iframe")
        assert frame.locator("#others b").inner_text() == "No other changes"
        name = frame.locator("#head").inner_text()
        frame.locator("#head").click()
        shown.page.keyboard.press("j")
        assert frame.locator("#head").inner_text() != name
        with shown.page.expect_download() as waiting:
            frame.locator("#tools button", has_text="SVG").click()
        assert waiting.value.suggested_filename == "site.svg"


HOSTILE_NAME = "</script><img src=x onerror=\"document.title='run'\">&amp;'`${1}"
HOSTILE = f"{HOSTILE_NAME}\u2028\u202e"
"""A text that is no name, as it cannot be printed."""


def test_hostile_names_are_text(
    browser: Browser,
    model: Paths,
    rewritten: Paths,
    tmp_path: Path,
) -> None:
    def rename(meta: Any) -> None:
        meta.graph_def.node.add(name=f"a/{HOSTILE_NAME}", op="NoOp", device=HOSTILE)
        meta.signature_def[HOSTILE_NAME].CopyFrom(meta.signature_def["serving_default"])
        for function in meta.graph_def.library.function:
            for node in function.node_def:
                if node.op == "FusedBatchNormV3":
                    node.attr["_note"].s = HOSTILE.encode()

    hostile = mutated(rewritten("module", bits=4), tmp_path / f"{HOSTILE.replace('/', '')}", rename)
    comparison = bnqat.diff(model("module"), hostile)
    assert (
        comparison.report.verdict.other_changes == 5
    )  # a node, a signature, two kernels, and the function added with kernels
    page = tmp_path / "hostile.html"
    page.write_text(comparison.to_html(), encoding="utf-8")
    with opened(browser, page) as shown:
        assert shown.requests == [page.as_uri()]
        assert shown.page.title() == comparison.title
        assert shown.page.locator("img").count() == 0
        assert shown.page.locator("script").count() == 2
        assert any(HOSTILE_NAME in text for text in texts(shown, "#list [data-key]"))
        for _ in range(6):
            shown.page.keyboard.press("j")
        assert shown.page.locator("img").count() == 0
        assert shown.page.title() == comparison.title
    assert HOSTILE_NAME in json.loads(comparison.to_json())["changes"][0]["name"]
    svg = comparison.to_svg("", f"a/{HOSTILE_NAME}")
    assert "<img" not in svg
    ET.fromstring(svg)  # noqa: S314  our own text


def test_nothing_differs(browser: Browser, model: Paths, tmp_path: Path) -> None:
    comparison = bnqat.diff(model("module"), model("module"))
    assert comparison.report.changes == []
    page = tmp_path / "same.html"
    page.write_text(comparison.to_html(), encoding="utf-8")
    with opened(browser, page) as shown:
        assert "the same" in shown.page.locator("#list").inner_text()
        assert not any(texts(shown, "#list .count"))


def test_models_that_are_the_same_and_have_no_batch_norm(browser: Browser, tmp_path: Path) -> None:
    class Plain(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None], name="x")])
        def serve(self, x: tf.Tensor) -> tf.Tensor:
            return x + 1

    save_module(Plain(), tmp_path / "plain")
    page = tmp_path / "page.html"
    page.write_text(bnqat.diff(tmp_path / "plain", tmp_path / "plain").to_html(), encoding="utf-8")
    with opened(browser, page) as shown:
        assert "nothing to show" in shown.page.locator("#head").inner_text()
        shown.page.keyboard.press("j")
        assert shown.page.evaluate("current") is None


def test_skipped_sites_say_why(browser: Browser, model: Paths, rewritten: Paths, tmp_path: Path) -> None:
    comparison = bnqat.diff(model("mapped_batch_norm"), rewritten("mapped_batch_norm", bits=4))
    verdict = comparison.report.verdict
    assert verdict.sites_skipped == sum(comparison.report.skipped.values()) > 0
    page = tmp_path / "page.html"
    page.write_text(comparison.to_html(), encoding="utf-8")
    with opened(browser, page) as shown:
        (reason,) = comparison.report.skipped
        assert reason in shown.page.locator("#skipped").inner_text()
        shown.page.locator("#filters button", has_text="not quantised").click()
        shown.page.keyboard.press("j")
        assert reason in shown.page.locator("#panel").inner_text()


def test_only_skipped(browser: Browser, model: Paths, tmp_path: Path) -> None:
    """If nothing can be rewritten, the page of the model compared with itself states the reasons."""
    with pytest.raises(bnqat.NothingToRewriteError):
        bnqat.rewrite(model("module_shared"), tmp_path / "out", range="ema")
    comparison = bnqat.diff(model("mapped_batch_norm"), model("mapped_batch_norm"))
    page = tmp_path / "page.html"
    page.write_text(comparison.to_html(), encoding="utf-8")
    with opened(browser, page) as shown:
        reasons = "; ".join(comparison.report.skipped)
        assert reasons
        assert texts(shown, "#skipped") == [f"!{len(comparison.report.layers)} batch norms not quantised{reasons}"]


def test_formula_opens_the_nodes_that_compute_it(browser: Browser, pages: Paths) -> None:
    with opened(browser, pages("module")) as shown:
        assert shown.page.locator('.pane[data-side="after"] .node.added').count() == 0
        shown.page.locator("td.formula").first.click()
        names = shown.page.locator('.pane[data-side="after"] .node.added').evaluate_all(
            "all => all.map(n => n.dataset.name)"
        )
        site = report_of(pages("module"))["layers"][0]["sites"][0]
        assert {i["new"] for i in site["inputs"] if i["formula"]} <= set(names)
        assert re.search(r"Elsewhere in this function: [\d,]+ nodes?", shown.page.locator("#hidden").inner_text())


def test_the_full_page_has_a_picture_of_every_node(browser: Browser, pages: Paths) -> None:
    file = pages("module", full=True)
    with opened(browser, file) as shown:
        shown.page.evaluate("where => { location.hash = where }", address("__nothing", "there"))
        counts = shown.page.evaluate("GRAPHS.map(g => [g.name, g.after, g.nodes.length])")
        assert len(counts) > 10
        assert all(drawn >= count for _, count, drawn in counts)
