"""report.html: the blocks in one file that needs nothing else, neither a network nor a server."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

from kit.console import printable
from kit.report.blocks import BEST, Block, Heading, plain

LARGE = 300_000  # bytes; of a figure with more vector data than this the PNG is inlined


def render(title: str, blocks: Sequence[Block], figures: Path) -> str:
    """The whole file. `figures` holds NAME.svg and NAME.png of every Figure block. A content security policy lets nothing run but what the template
    holds, so no reply can, whatever it is."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    env = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    env.filters["sha256"] = lambda text: base64.b64encode(hashlib.sha256(str(text).encode()).digest()).decode()
    env.filters["inlined"] = lambda name: _inlined(figures, name)
    contents = [(f"s{n}", printable(b.text), b.level) for n, b in enumerate(blocks) if isinstance(b, Heading)]
    return env.get_template("report.html.jinja").render(title=printable(title), blocks=plain(list(blocks)), contents=contents, legend=BEST)


def _inlined(figures: Path, name: str) -> str:
    """A figure as a data URI."""
    path = figures / f"{name}.svg"
    kind = "image/svg+xml"
    if path.stat().st_size > LARGE:
        path, kind = path.with_suffix(".png"), "image/png"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
