"""A real browser: Chromium, as Debian's package `chromium` brings it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Playwright

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def chromium(playwright: Playwright) -> Browser:
    """Return the browser; the test fails if there is none."""
    path = os.environ.get("BNQAT_CHROMIUM") or shutil.which("chromium")
    if path is None:
        pytest.fail("tests of pages need Chromium (Debian's package chromium), or its path in BNQAT_CHROMIUM")
    return playwright.chromium.launch(executable_path=path, args=ARGUMENTS)


@dataclass
class Opened:
    """An open page with its requests and console messages."""

    page: Page
    requests: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def stop(self) -> dict[str, Any]:
        """Return the current choice on the page."""
        found: dict[str, Any] = self.page.evaluate("current")
        return found


@contextmanager
def opened(browser: Browser, file: Path, fragment: str = "", **options: Any) -> Iterator[Opened]:
    """Open a page from a file; fail if it writes to the console."""
    context = browser.new_context(viewport={"width": 1400, "height": 900}, accept_downloads=True, **options)
    page = context.new_page()
    opened_page = Opened(page)
    page.on("request", lambda request: opened_page.requests.append(request.url))
    page.on("console", lambda message: opened_page.messages.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: opened_page.messages.append(f"error: {error}"))
    page.goto(file.as_uri() + fragment)
    try:
        yield opened_page
        assert opened_page.messages == []
    finally:
        context.close()
