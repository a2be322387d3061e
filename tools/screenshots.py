"""Pictures of the page for the documentation, made from a real rewrite in a real browser.

    python -m tools.screenshots [--into docs]

Needs the extra `test` and a browser, which `python -m tools.chromium` makes sure of.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

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
        source, target, page_file = (Path(scratch) / name for name in ("float_model", "qat_model", "diff.html"))
        ALL["mobilenet_export"](source)
        bnqat.rewrite(source, target, bits=4)
        page_file.write_text(bnqat.diff(source, target).to_html(), encoding="utf-8")
        inspected = Path(scratch) / "inspect.html"
        inspected.write_text(bnqat.inspect(source).to_html(), encoding="utf-8")
        browser = chromium.launch(playwright)
        for scheme, name in (("light", "diff_light.png"), ("dark", "diff_dark.png")):
            page = browser.new_page(viewport=SIZE, color_scheme=scheme)  # type: ignore[arg-type]
            page.goto(page_file.as_uri())
            page.screenshot(path=into / name)
            print(into / name)
        page = browser.new_page(viewport=SIZE, color_scheme="light")
        page.goto(inspected.as_uri())
        page.screenshot(path=into / "inspect.png")
        print(into / "inspect.png")
        browser.close()


if __name__ == "__main__":
    main()
