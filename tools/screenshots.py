"""Pictures of the page for the documentation, made from a real rewrite in a real browser.

    python -m tools.screenshots [--into docs]

Needs the extra `test` and a browser, which `python -m tools.chromium` makes sure of.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
from playwright.sync_api import ViewportSize, sync_playwright

import bnqat
from tests.models.all import ALL
from tools import chromium

SIZE: ViewportSize = {"width": 1280, "height": 860}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, default=Path("docs"))
    into = parser.parse_args().into
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        models = {"keras2": ALL["mobilenet_save"], "keras3": _keras3}
        keras2, keras3 = (_comparison(Path(scratch) / name, make) for name, make in models.items())
        source = keras3.parent / "float_model"
        inspected = Path(scratch) / "inspect.html"
        inspected.write_text(bnqat.inspect(source).to_html(), encoding="utf-8")
        browser = chromium.launch(playwright)
        for scheme, name in (("light", "diff_light.png"), ("dark", "diff_dark.png")):
            page = browser.new_page(viewport=SIZE, color_scheme=scheme)  # type: ignore[arg-type]
            page.goto(keras3.as_uri())
            page.screenshot(path=into / name)
            print(into / name)
        page = browser.new_page(viewport=SIZE, color_scheme="light")
        page.goto(keras2.as_uri())
        page.locator("#list .layer").first.click()
        page.locator("#list [data-key]", has_text="in training").first.click()
        page.screenshot(path=into / "diff_keras2.png")
        print(into / "diff_keras2.png")
        page = browser.new_page(viewport=SIZE, color_scheme="light")
        page.goto(inspected.as_uri())
        page.screenshot(path=into / "inspect.png")
        print(into / "inspect.png")
        browser.close()


def _keras3(path: Path) -> None:
    """Export MobileNetV2 from Keras 3, untrained, without the line that Keras prints."""
    keras.utils.set_random_seed(0)
    model = keras.applications.MobileNetV2((96, 96, 3), weights=None, classes=10)
    with contextlib.redirect_stdout(io.StringIO()):
        model.export(path)


def _comparison(folder: Path, make: Callable[[Path], object]) -> Path:
    """Write the page that compares a model with its rewrite; return its path."""
    source, target = folder / "float_model", folder / "qat_model"
    folder.mkdir()
    make(source)
    bnqat.rewrite(source, target, bits=4, start_step=1000)
    page = folder / "diff.html"
    page.write_text(bnqat.diff(source, target).to_html(), encoding="utf-8")
    return page


if __name__ == "__main__":
    main()
