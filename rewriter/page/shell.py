"""A page as one file: styles, scripts and data inside, nothing from anywhere else."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

HERE = Path(__file__).parent
PARTS = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True)


def page(template: str, styles: list[str], scripts: list[str], **values: Any) -> str:
    """A page.

    What a template is given is escaped. A content security policy inside lets these scripts and styles run, and nothing
    else, wherever the page is opened from.

    Args:
        template: the file with its body.
        styles: files of style sheets.
        scripts: files of scripts, which run in this order as one.
        values: what the template uses; `data` is what the scripts find as JSON.
    """
    style = "".join(read(name) for name in styles)
    script = "".join(read(name) for name in scripts)
    data = json.dumps(values.pop("data", None), ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        data = data.replace(character, f"\\u{ord(character):04x}")
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src blob: data:; "
        "base-uri 'none'; form-action 'none'"
    )
    parts = {"style": Markup(style), "script": Markup(script), "data": Markup(data)}  # noqa: S704  our own, and escaped
    return PARTS.get_template(template).render(policy=policy, **parts, **values)


def fragment(template: str, **values: Any) -> str:
    """A part of a page, such as a notebook's cell, without styles and scripts; what a template is given is escaped."""
    return PARTS.get_template(template).render(**values)


def read(name: str) -> str:
    """A file beside this one."""
    return (HERE / name).read_text(encoding="utf-8")


def frame(content: str) -> str:
    """A page inside a notebook: it can neither reach the notebook nor be reached by its styles."""
    return (
        f'<iframe srcdoc="{html.escape(content)}" sandbox="allow-scripts allow-downloads" width="100%" height="720" '
        'style="border:0" title="bnqat"></iframe>'
    )


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
