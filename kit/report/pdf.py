"""report.pdf: the blocks through Typst, with fonts that come with the kit's requirements, so that it is the same on every machine."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from kit.console import printable
from kit.report.blocks import BEST, Block, Figure, plain

# What a font has no glyph for but draws nothing either: joiners, marks of direction, selectors, spaces.
SILENT = ("Cc", "Cf", "Zl", "Zp", "Zs")


def render(title: str, blocks: Sequence[Block], figures: Path) -> bytes:
    """The whole file, the same bytes for the same input. `figures` holds NAME.svg of every Figure block. All text reaches the template as JSON and is set
    as text there, never read as markup. A character that no font has is spelled out as its code point."""
    import typst

    data = {"title": printable(title), "blocks": plain(list(blocks)), "legend": BEST}
    data["figures"] = {b.name: (figures / f"{b.name}.svg").read_text(encoding="utf-8") for b in blocks if isinstance(b, Figure)}
    text = json.dumps(data, ensure_ascii=False)
    if missing := uncovered({c for c in text if c > "~"}):
        text = text.translate({ord(c): f"<U+{ord(c):04X}>" for c in missing})
    made = typst.compile(Path(__file__).with_name("report.typ"), font_paths=font_folders(), ignore_system_fonts=True, sys_inputs={"data": text})
    assert isinstance(made, bytes)
    return made


def font_folders() -> list[Path]:
    """Noto for text in most scripts, Noto Emoji, Noto Sans CJK; matplotlib's DejaVu for further symbols."""
    import manimgx_fonts
    import manimgx_fonts_cjk
    import matplotlib

    return [Path(manimgx_fonts.__file__).parent, Path(manimgx_fonts_cjk.__file__).parent, Path(matplotlib.get_data_path(), "fonts/ttf")]


def uncovered(characters: set[str]) -> set[str]:
    """The characters that no font has a glyph for."""
    left = {c for c in characters if unicodedata.category(c) not in SILENT and not "\ufe00" <= c <= "\ufe0f"}
    for known in _charsets():
        if not left:
            break
        left = {c for c in left if ord(c) not in known}
    return left


def _charsets() -> Iterator[frozenset[int]]:
    """The code points of each font, the likeliest first: reading all takes a second."""
    files = [file for folder in font_folders() for file in sorted(folder.iterdir()) if file.name.startswith(("Noto", "DejaVuSans.", "STIXGeneral."))]
    for file in sorted(files, key=lambda f: (f.suffix == ".ttc", not f.name.startswith("NotoSans["), f.name)):
        yield _charset(file)


@lru_cache
def _charset(file: Path) -> frozenset[int]:
    from fontTools.ttLib import TTCollection, TTFont

    with (TTCollection if file.suffix == ".ttc" else TTFont)(file, lazy=True) as font:
        return frozenset((font.fonts[0] if file.suffix == ".ttc" else font).getBestCmap())
