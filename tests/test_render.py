"""The report's blocks as Markdown, HTML and PDF: nothing is lost, no text is obeyed, the same input gives the same bytes; and the HTML in a real browser."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from conftest import ROOT

from kit.console import printable
from kit.report import html, markdown, pdf
from kit.report.blocks import Block, Bullets, Cell, Code, Figure, Heading, Paragraph, Sample, Samples, Table

HOSTILE = [
    "<script>alert(1)</script>", "</td></tr></table>", "a | b \\| c", "`tick` ``` fence", '#eval("1 + 1") #panic()', "] [x](y) ![z](u)", "*b* **b** _i_ ~~s~~",
    "$x$ $$y$$", "two\n\nparagraphs", "NUL \x00 ESC \x1b[31m", "right to left \u202eabc", "lone \ud800 surrogate", "{{ 7 * 7 }} {% raw %} &amp; &#60;",
    "# heading", "- item", "1. item", "1)", "+ item", "---", "===", "\\", "' onload=x \"", "```\nclosed", "<!-- --> ]]>", "</script></style></title>",
]  # fmt: skip
SCRIPTS = "日本語 한국어 简体 العربية עברית हिन्दी ไทย বাংলা தமிழ் ქართული 😀 🚀"
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="70" height="42"><rect width="70" height="42" fill="#0072b2"/></svg>'


def document(text: str = "plain") -> list[Block]:
    """Every kind of block, with a text in each place that takes one."""
    rows = [[Cell(f"{text} {n}"), Cell(f"{text} {v}", v, best=v == 10)] for n, v in (("one", 9.0), ("two", None), ("three", 10.0))]
    return [
        Paragraph(f"headline {text}", "headline"), Heading(f"First {text}"), Paragraph(text), Paragraph(f"note {text}", "note"), Bullets([text, "bullet"]),
        Table(["name", text], rows, f"caption {text}"), Figure("small", f"small {text}"), Figure("large", f"large {text}"), Heading("Second", 3),
        Samples([Sample("sample A", text, f"reference {text}", [("run 1", text), (text, "")]), Sample("sample B", "other prompt", None, [("run 1", "B1")])]),
        Code(text),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from matplotlib.image import imsave

    folder = tmp_path_factory.mktemp("figures")
    for name, size in (("small", 0), ("large", html.LARGE)):
        (folder / f"{name}.svg").write_text(SVG + f"<!--{'x' * size}-->")
        imsave(folder / f"{name}.png", np.zeros((4, 7, 3)))
    return folder


def pages(data: bytes) -> list[str]:
    pypdf = pytest.importorskip("pypdf")
    return [page.extract_text() for page in pypdf.PdfReader(io.BytesIO(data)).pages]


def squeezed(text: str) -> str:
    return re.sub(r"\s", "", text)


def test_every_kind_of_block_is_in_every_format(figures: Path) -> None:
    blocks = document("some text")
    assert {type(b) for b in blocks} == set(get_args(Block))
    made = {
        "md": markdown.render("The title", blocks),
        "html": html.render("The title", blocks, figures),
        "pdf": " ".join(pages(pdf.render("The title", blocks, figures))),
    }
    said = ["The title", "headline some", "First some", "note some", "bullet", "caption some", "three", "10.0", "★", "small some", "large some", "Second",
            "sample A", "sample B", "reference some", "other prompt", "run 1", "(empty)", "B1"]  # fmt: skip
    for name, text in made.items():
        assert not [s for s in said if squeezed(s) not in squeezed(text)], name
    assert "![small some text](figures/small.png)" in made["md"]
    assert made["html"].count("data:image/svg+xml;base64,") == made["html"].count("data:image/png;base64,") == 1, "a large figure is inlined as its PNG"


def test_the_same_input_gives_the_same_bytes_in_another_process_and_without_torch(figures: Path) -> None:
    code = (
        "import sys, hashlib; from pathlib import Path; from test_render import *; f = Path(sys.argv[1]); b = document(SCRIPTS)\n"
        "made = [markdown.render('T', b).encode(), html.render('T', b, f).encode(), pdf.render('T', b, f)]\n"
        "print(*(hashlib.sha256(m).hexdigest() for m in made), 'torch' in sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"}
    found = subprocess.run([sys.executable, "-c", code, str(figures)], env=env, capture_output=True, text=True, check=True, cwd=figures).stdout.split()
    blocks = document(SCRIPTS)
    made = [markdown.render("T", blocks).encode(), html.render("T", blocks, figures).encode(), pdf.render("T", blocks, figures)]
    assert found == [*(hashlib.sha256(m).hexdigest() for m in made), "False"]


def test_an_endless_number_is_a_missing_one(figures: Path) -> None:
    blocks = [Table(["a", "b"], [[Cell("x"), Cell("endless", value)] for value in (float("inf"), float("nan"))])]
    assert "data-value" not in html.render("T", blocks, figures).split("<main>")[1].split("<script>")[0]
    assert "endless" in pages(pdf.render("T", blocks, figures))[0]


class Elements(HTMLParser):
    """The tags of a page with their classes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, ...]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, *(f"{k}={v}" if k == "class" else k for k, v in attrs)))

    def handle_endtag(self, tag: str) -> None:
        self.tags.append((tag, "end"))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text_in_html(text: str, figures: Path) -> None:
    found, plain = (Elements(html.render(t, document(t), figures)) for t in (text, "p" * len(printable(text))))
    assert found.tags == plain.tags
    assert found.text.count(printable(text)) >= 10
    found.text.encode()


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text_in_markdown(text: str) -> None:
    from markdown_it import MarkdownIt

    def shown(text: str) -> tuple[list[str], str]:
        tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(markdown.render(text, document(text)))
        inner = [t for token in tokens for t in [token, *(token.children or [])]]
        return [t.type for t in inner], "\n".join(t.content for t in inner if t.type in ("text", "text_special", "fence"))

    (kinds, said), (plain, _) = shown(text), shown("plain")
    assert [k for k in kinds if k not in ("text", "text_special")] == [k for k in plain if k not in ("text", "text_special")]
    line = " ".join(printable(text).split())
    assert squeezed(said).count(squeezed(line)) >= 10
    assert "<" not in re.sub(r"```+text\n.*?\n```+", "", markdown.render("T", document(text)), flags=re.DOTALL).replace("\\<", "")
    said.encode()


def test_hostile_text_stays_text_in_pdf(figures: Path) -> None:
    # One document for all: compiling is the dear part. U+202E and the like are spelled out before they get there.
    blocks = [b for text in HOSTILE for b in document(text)]
    said = squeezed("".join(pages(pdf.render(HOSTILE[0], blocks, figures))))
    assert not [t for t in HOSTILE if said.count(squeezed(printable(t))) < 10]


def test_pdf_sets_all_scripts_and_emoji_and_spells_out_what_no_font_has(figures: Path) -> None:
    pypdf = pytest.importorskip("pypdf")
    assert pdf.uncovered(set(SCRIPTS + "∑ ✓ █ 𝑥 ⠿ →")) == set()
    assert pdf.uncovered({"日", "𒀀", "\u202e", "\ufe0f"}) == {"𒀀"}
    made = pdf.render(f"T {SCRIPTS}", [Table(["a", "b"], [[Cell("日本"), Cell("😀")]]), Code("日本 😀"), Paragraph("cuneiform 𒀀")], figures)
    reader = pypdf.PdfReader(io.BytesIO(made))
    said = reader.pages[0].extract_text()
    assert "日本" in said
    assert "😀" in said
    assert "cuneiform <U+12000>" in said
    names = {str(font.get_object()["/BaseFont"]) for font in reader.pages[0]["/Resources"]["/Font"].values()}
    wanted = ("NotoSans-", "NotoSansArabic", "NotoSansHebrew", "NotoSansDevanagari", "NotoSansThai", "NotoSansCJK", "NotoEmoji", "DejaVuSansMono")
    assert not [w for w in wanted if not any(w in n for n in names)], names
    assert not [n for n in names if "NewCM" in n or "Libertinus" in n], "set in a font that coverage does not count"


def test_pdf_breaks_tables_between_pages_and_columns_and_numbers_its_pages(figures: Path) -> None:
    pypdf = pytest.importorskip("pypdf")
    long = Table(["name", "score"], [[Cell(f"row{n}"), Cell(f"{n}.25", n)] for n in range(150)])
    wide = Table(["setting", *(f"head{n}" for n in range(40))], [[Cell("learning_rate"), *(Cell(f"value{n}of40") for n in range(40))]], texts=41, wide=True)
    unbroken = "0123456789abcdef" * 20
    made = pdf.render("The title", [Heading("Long"), long, Heading("Wide"), wide, Paragraph(unbroken), Figure("small", "seen")], figures)
    reader = pypdf.PdfReader(io.BytesIO(made))
    text = pages(made)
    assert len(text) >= 3
    assert [t.split()[-3:] for t in text] == [[str(n + 1), "/", str(len(text))] for n in range(len(text))]
    assert all("name" in t for t in text[: next(i for i, t in enumerate(text) if "row149" in t) + 1]), "the heading is repeated"
    every = " ".join(text)
    assert not [n for n in range(150) if f"row{n}" not in every]
    assert not [n for n in range(40) if squeezed(f"value{n}of40") not in squeezed(every)]
    assert every.count("learning_rate") > 1, "each part of a wide table repeats the first column"
    assert unbroken not in every, "a word longer than a line is broken"
    assert unbroken in squeezed(every)
    assert [o["/Title"] for o in reader.outline if not isinstance(o, list)] == ["Long", "Wide"]
    assert not [image for page in reader.pages for image in page.images], "figures are vector"
    starts: list[float] = []
    for page in reader.pages:
        page.extract_text(visitor_text=lambda text, cm, tm, *_: starts.append(tm[4] * cm[0] + tm[5] * cm[2] + cm[4]) if text.strip() else None)
    assert max(starts) < 595 - 51, "nothing starts in the right margin"


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update
 --disable-sync""".split()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    if not (CHROMIUM and DRIVER):
        pytest.skip("needs chromium and chromedriver on the path")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: Any, figures: Path, tmp_path: Path) -> Any:
    """The report as a user opens it, on a phone's screen; only hostile texts in it."""
    path = tmp_path / "report.html"
    rows = [[Cell(t), Cell(str(v), v), Cell("wide " * 9)] for t, v in (("b10", 10.0), ("b9", 9.5), ("none", None), ("a", -1.0), ("c", 100.0))]
    blocks = [*(b for text in HOSTILE for b in document(text)), Table(["run", "score", "words"], rows), Table(["x" * 90, "y" * 90], [])]
    path.write_text(html.render("T", [*blocks, Heading("Last"), Code("z" * 300)], figures), encoding="utf-8")
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True})
    for kind in ("browser", "performance"):
        browser.get_log(kind)  # what the browser's own first page did
    browser.get(path.as_uri())
    return browser


def column(page: Any, n: int) -> list[str]:
    """A column of the table of runs as it is shown."""
    return page.execute_script(f"return [...[...document.querySelectorAll('table')].at(-2).tBodies[0].rows].map(r => r.cells[{n}].textContent)")


def test_browser_loads_the_page_without_an_error_or_a_request(page: Any) -> None:
    assert page.get_log("browser") == []
    sent = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in sent if m["method"] == "Network.requestWillBeSent"]
    assert [url[:5] for url in asked if not url.startswith("data:")] == ["file:"]
    images = page.execute_script("return [...document.images].map(i => i.complete && i.naturalWidth)")
    assert len(images) == 2 * len(HOSTILE)
    assert all(images)
    assert page.execute_script("return document.documentElement.scrollWidth") == 360, "no sideways scrolling on a phone"
    assert page.execute_script("return document.querySelectorAll('script').length") == 1


def test_browser_lets_no_foreign_script_run(page: Any) -> None:
    page.execute_script("const s = document.createElement('div'); s.innerHTML = '<img src=x onerror=\"window.hit = 1\">'; document.body.append(s)")
    page.execute_async_script("setTimeout(arguments[0], 200)")
    assert page.execute_script("return window.hit") is None
    assert any("Content Security Policy" in entry["message"] for entry in page.get_log("browser"))


def test_browser_sorts_numbers_by_value_with_missing_ones_last_and_by_keyboard(page: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    heads = page.find_elements("css selector", "table")[-2].find_elements("css selector", "th")
    buttons = [head.find_element("css selector", "button") for head in heads]
    original = column(page, 0)
    page.execute_script("arguments[0].scrollIntoView({block: 'center', inline: 'center'})", buttons[1])
    buttons[1].click()
    assert column(page, 1) == ["-1.0", "9.5", "10.0", "100.0", "None"]
    assert heads[1].get_attribute("aria-sort") == "ascending"
    buttons[1].send_keys(Keys.ENTER)
    assert column(page, 1) == ["100.0", "10.0", "9.5", "-1.0", "None"]
    assert heads[1].get_attribute("aria-sort") == "descending"
    buttons[0].send_keys(Keys.SPACE)
    assert column(page, 0) == ["a", "b9", "b10", "c", "none"]
    assert [h.get_attribute("aria-sort") for h in heads] == ["ascending", None, None]
    buttons[0].send_keys(Keys.SPACE)
    buttons[0].send_keys(Keys.SPACE)
    assert column(page, 0) == original


def test_browser_shows_the_sample_that_is_chosen_and_all_on_paper_or_without_a_script(page: Any) -> None:
    from selenium.webdriver.support.ui import Select

    def shown() -> list[str]:
        return [h.text for h in page.find_element("css selector", ".samples").find_elements("css selector", "h3") if h.is_displayed()]

    assert shown() == ["sample A"]
    Select(page.find_element("css selector", ".samples select")).select_by_index(1)
    assert shown() == ["sample B"]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert shown() == ["sample A", "sample B"]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    page.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    page.refresh()
    assert shown() == ["sample A", "sample B"]
    page.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_browser_prints_heads_that_can_be_repeated(page: Any) -> None:
    """Chromium repeats a table's head on every page of paper, but no buttons in it."""
    head = page.find_element("css selector", "thead th")
    text = head.text
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    printed = page.execute_script("return getComputedStyle(arguments[0], '::before').content", head)
    assert text
    assert printed == f'"{text}"'
    assert not head.find_element("css selector", "button").is_displayed()
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_browser_follows_the_dark_mode_with_legible_text(page: Any) -> None:
    def colours(mode: str) -> list[list[int]]:
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": mode}]})
        asked = (("body", "backgroundColor"), ("body", "color"), ("images[0].parentElement", "backgroundColor"))
        style = [f"getComputedStyle(document.{element}).{name}" for element, name in asked]
        return [[int(n) for n in re.findall(r"\d+", text)] for text in page.execute_script(f"return [{', '.join(style)}]")]

    (page_light, text_light, _), (page_dark, text_dark, card) = colours("light"), colours("dark")
    assert sum(page_light) - sum(text_light) > 550
    assert sum(text_dark) - sum(page_dark) > 550
    assert card == [255, 255, 255], "figures stay on white"
