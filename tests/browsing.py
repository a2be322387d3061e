"""Pages in a real browser, with what they request and write to the console."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page


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
