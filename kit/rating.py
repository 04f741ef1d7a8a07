"""Human scores: the runs' replies as a blind shuffled deck, one keypress a score, a ledger that a kill cannot harm, and what the scores say.

runs/NAME/ratings/RATER.jsonl is the ledger of one rater: a line for every reply rated, skipped (no scores) or undone; no line is ever rewritten.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import select
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from rich.control import Control
from rich.text import Text

from kit.console import console, say
from kit.errors import UserError
from kit.files import read_jsonl, write_text

Row = dict[str, Any]
QUESTIONS = {
    "fluency": "is it grammatical, and does it read naturally?",
    "coherence": "does it hang together and keep to the subject?",
    "correctness": "does it do what the prompt asks, and is what it says right?",
    "overall": "how good is the reply, all in all?",
}
CRITERIA, OVERALL = tuple(QUESTIONS)[:3], tuple(QUESTIONS)[3:]
SCALE = "012345"
REPEATED = 0.1  # share of the replies that are shown a second time
HELP = "0-5 score   u undo   s skip   r reference   space b ↑ ↓ scroll   q quit"
SCROLL = {" ": 1, "b": -1, "j": 0, "k": 0}
# What a terminal would obey or a reader could not see: controls, direction overrides, line separators, lone surrogates.
UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
FORMULA = tuple("=+-@\t＝＋－＠")  # a spreadsheet runs a cell that starts so
# One key: a control sequence (ECMA-48), a function key, a lone escape, or any other byte. An unfinished sequence does not match.
KEY = re.compile(rb"\x1b\[[\x20-\x3f]*[^\x20-\x3f]|\x1bO.|\x1b(?=[^\[O])|[^\x1b]", re.DOTALL)
SENT = (b"\x1b[A", b"\x1bOA", b"\x1b[B", b"\x1bOB", b"\x1b[5~", b"\x1b[6~", b"\x7f", b"\x08", b"\x03", b"\x04")
KEYS = dict(zip(SENT, "kkjjb uuqq", strict=True))  # arrows, pages, backspace, Ctrl-C and Ctrl-D
SUSPEND = "\x1a"


@dataclass(frozen=True)
class Item:
    """A distinct reply to a test row and the runs that gave it; `repeats` is the id of its first showing when this is the second."""

    id: str
    row: str
    prompt: str
    reply: str
    reference: str
    runs: tuple[str, ...]
    repeats: str | None


@dataclass(frozen=True)
class Rating:
    """One rater's scores of one reply. `item` is the reply's first showing; without `runs` the reply is no run's any more: stale."""

    rater: str
    item: str
    row: str
    runs: tuple[str, ...]
    scores: Mapping[str, int]
    repeat: bool


def digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def items(folder: Path) -> dict[str, Item]:
    """Every distinct reply of the evaluated runs in runs/NAME, and its repeat, by item id. Ids hang on row, prompt and reply alone."""
    runs: dict[tuple[str, str, str], list[str]] = {}
    references: dict[tuple[str, str, str], str] = {}
    for path in sorted(folder.glob("*/predictions.jsonl")):
        for row in read_jsonl(path) if path.with_name("eval.json").exists() else ():
            key = (row["id"], row["prompt"], row["prediction"])
            runs.setdefault(key, []).append(path.parent.name)
            references[key] = row["reference"]
    out = {}
    for key, names in runs.items():
        first = digest(*key)
        for name, repeats in ((first, None), (digest(*key, "again"), first)):
            out[name] = Item(name, *key, references[key], tuple(names), repeats)
    return out


def evaluated(folder: Path) -> dict[str, Item]:
    """`items`, of which there must be some."""
    if not (known := items(folder)):
        raise UserError(f"no evaluated run in {folder}; make some with: make all METHOD=qlora NAME={folder.name}")
    return known


def deck(known: Mapping[str, Item], rater: str, *, limit: int, seed: int) -> list[Item]:
    """About `limit` replies in the rater's own order, and later in it the hidden repeats of a tenth of them.

    All raters get the same test rows, each with the replies of every run, so that runs are compared on equal rows. Orders are those of hashes, so
    that a larger limit adds rows to those drawn before. At least one row is drawn.
    """
    rows: dict[tuple[str, str], list[Item]] = {}
    for item in known.values():
        if item.repeats is None:
            rows.setdefault((item.row, item.prompt), []).append(item)
    systems = {run for item in known.values() for run in item.runs}
    whole = [replies for replies in rows.values() if {run for item in replies for run in item.runs} == systems]
    if not whole:
        raise UserError(f"{', '.join(sorted(systems))} share no test row; evaluate them on the same data")
    drawn: list[Item] = []
    for replies in sorted(whole, key=lambda r: digest(seed, r[0].row)):
        if drawn and len(drawn) + len(replies) > limit:
            break
        drawn += replies
    order = sorted(drawn, key=lambda i: digest(seed, rater, i.id))
    half = len(order) // 2
    again = {i.repeats: i for i in known.values() if i.repeats}
    repeats = sorted(range(half), key=lambda n: digest(seed, rater, order[n].id, "again"))[: round(len(order) * REPEATED)]
    placed = [*enumerate(order), *((n + half + 0.5, again[order[n].id]) for n in repeats)]
    return [item for _, item in sorted(placed, key=lambda pair: pair[0])]


def standing(path: Path) -> dict[str, Row]:
    """The ledger's rows that no later line replaced or undid, by item id, oldest first; a last line without its end is not there."""
    kept: dict[str, Row] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
            before = kept.pop(row["undo"] if "undo" in row else row["item"], None)
            if "undo" in row and before is None:
                raise ValueError("it undoes what is not there")
            if "undo" not in row:
                if not all(c in QUESTIONS and v in range(len(SCALE)) for c, v in row["scores"].items()):
                    raise ValueError("a score is not one of 0 to 5")
                kept[row["item"]] = {k: row[k] for k in ("item", "id", "scores", "repeat")}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}, line {number}: not a rating ({error}); remove the line") from None
    return kept


@dataclass
class Ledger:
    """A rater's ledger, open for appending; `standing` is the function's of this name, kept up to date."""

    rater: str
    criteria: Sequence[str]
    standing: dict[str, Row]
    file: BinaryIO

    def _write(self, row: Row) -> None:
        self.file.write(json.dumps(row | {"time": datetime.now(UTC).isoformat(timespec="seconds")}).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def add(self, item: Item, scores: Mapping[str, int]) -> None:
        row = {"item": item.id, "id": item.row, "runs": item.runs, "reply": digest(item.reply), "scores": scores, "repeat": item.repeats is not None}
        self._write(row)
        self.standing.pop(item.id, None)
        self.standing[item.id] = row

    def undo(self, item: Item) -> None:
        self._write({"undo": item.id})
        del self.standing[item.id]


@contextmanager
def open_ledger(folder: Path, rater: str, criteria: Sequence[str]) -> Iterator[Ledger]:
    """The rater's ledger in runs/NAME/ratings, without the line that a kill cut off; one holder at a time, one set of criteria for good."""
    import fcntl

    if not re.fullmatch(r"[\w-]{1,60}", rater):
        raise UserError(f"{rater!r} cannot name a rater: use letters, digits, '-' and '_'")
    path = folder / "ratings" / f"{rater}.jsonl"
    path.parent.mkdir(exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{rater} is rating in another terminal") from None
        rows = standing(path)
        if used := {c for row in rows.values() for c in row["scores"]} - set(criteria):
            raise UserError(f"{path} holds scores for {', '.join(sorted(used))}, not for {', '.join(criteria)}; choose another --rater")
        file.truncate(path.read_bytes().rfind(b"\n") + 1)
        yield Ledger(rater, criteria, rows, file)


def printable(text: str) -> str:
    """Foreign text with everything that a terminal would obey spelled out: ESC reads \\x1b."""
    return UNSAFE.sub(lambda m: m[0].encode("unicode_escape").decode(), text.replace("\r\n", "\n"))


@lru_cache(maxsize=4)
def _body(parts: tuple[tuple[str, str], ...], width: int) -> list[Text]:
    """Headings at the margin, text indented and wrapped by terminal cells, so that no text can pass for a heading."""
    lines = []
    for title, text in parts:
        lines.append(Text(title, style="bold cyan"))
        for line in Text(text).wrap(console, max(width - 2, 2)):
            line.pad_left(2)
            lines.append(line)
        lines.append(Text())
    return lines[:-1]


class Session:
    """The state of one sitting: what is left of the deck (next one last), what can be undone, and what is on the screen."""

    def __init__(self, cards: Sequence[Item], ledger: Ledger) -> None:
        self.total, self.ledger = len(cards), ledger
        left = {card.id: card for card in cards}
        self.history = [left.pop(i) for i, row in ledger.standing.items() if i in left and row["scores"]]
        # What was skipped in an earlier sitting comes again at the end.
        self.todo = sorted(left.values(), key=lambda card: card.id in ledger.standing)[::-1]
        self.page, self.note = 1, ""
        self._turn()

    def _turn(self) -> None:
        self.scores: list[int] = []
        self.offset, self.reference, self.jump = 0, False, False

    def press(self, key: str) -> bool:
        """Obeys a key; False when the sitting is over."""
        self.note = ""
        if key in SCALE:
            self.scores.append(int(key))
            if len(self.scores) == len(self.ledger.criteria):
                self._store(dict(zip(self.ledger.criteria, self.scores, strict=True)))
        elif key == "s":
            self._store({})
        elif key == "u":
            self._undo()
        elif key == "r":
            self.reference = self.jump = not self.reference
        elif key in SCROLL:
            self.offset += SCROLL[key] * max(self.page - 1, 1) + (key == "j") - (key == "k")
        elif key != "q":
            self.note = "not a key of this program"
        return key != "q" and bool(self.todo)

    def _store(self, scores: Mapping[str, int]) -> None:
        self.ledger.add(self.todo[-1], scores)
        self.history.append(self.todo.pop())
        self._turn()

    def _undo(self) -> None:
        if self.scores:
            self.scores.pop()
        elif self.history:
            self.ledger.undo(self.history[-1])
            self.todo.append(self.history.pop())
            self._turn()
            self.note = "taken back; rate it again"
        else:
            self.note = "nothing to undo"

    @property
    def progress(self) -> str:
        return f"{self.total - len(self.todo) + 1} of {self.total}"

    @property
    def criterion(self) -> str:
        return self.ledger.criteria[len(self.scores)]

    def parts(self) -> tuple[tuple[str, str], ...]:
        """(heading, text) pairs of the reply in turn, safe to print."""
        item = self.todo[-1]
        shown = [("Prompt", item.prompt), ("Reply", item.reply or "(an empty reply)"), ("Reference", item.reference)]
        return tuple((title, printable(text)) for title, text in (shown if self.reference else shown[:2]))

    def _foot(self) -> list[Text]:
        scores = Text()
        for n, criterion in enumerate(self.ledger.criteria):
            value = self.scores[n] if n < len(self.scores) else "_"
            scores.append(f"{criterion} {value}", "bold" if n == len(self.scores) else "dim").append("   ")
        return [scores, Text(f"{self.criterion}: {QUESTIONS[self.criterion]}  0 worst, 5 best"), Text(self.note or HELP, "dim")]

    def frame(self, width: int, height: int) -> list[Text]:
        """The screen: progress, as much of the text as fits from `offset` on (which is kept in bounds), scores and keys."""
        body = _body(self.parts(), width)
        foot = [line for text in self._foot() for line in text.wrap(console, width)]
        self.page = max(height - len(foot) - 2, 1)
        if self.jump:
            self.offset, self.jump = max(n for n, line in enumerate(body) if line.plain == "Reference"), False
        self.offset = max(min(self.offset, len(body) - self.page), 0)
        shown = body[self.offset : self.offset + self.page]
        end = self.offset + len(shown)
        place = f"── lines {self.offset + 1}–{end} of {len(body)} " + ("── more below: space " if end < len(body) else "")
        blank = [Text()] * (self.page - len(shown))
        head = Text(f"{self.ledger.rater}   {self.progress}"[:width], "bold")
        return [head, *shown, *blank, Text(place.ljust(width, "─")[:width], "dim"), *foot]


@contextmanager
def _single_keys(fd: int) -> Iterator[None]:
    """A terminal that hands over each key unechoed, Ctrl-C, Ctrl-D and Ctrl-Z too; as it was before on leaving."""
    import termios

    before, now = termios.tcgetattr(fd), termios.tcgetattr(fd)
    now[0] &= ~termios.IXON
    now[3] &= ~(termios.ECHO | termios.ICANON | termios.ISIG | termios.IEXTEN)
    now[6][termios.VMIN], now[6][termios.VTIME] = 1, 0
    termios.tcsetattr(fd, termios.TCSADRAIN, now)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def _keys(fd: int) -> Iterator[str]:
    """Keys as they are pressed, and an empty one when there is a new size to draw for; ends with the terminal."""
    size, waiting = None, b""
    while True:
        while found := KEY.match(waiting):
            waiting = waiting[found.end() :]
            yield KEYS.get(found[0], found[0].decode("ascii", "replace").lower())
        if console.size != size:
            size = console.size
            yield ""
        elif select.select([fd], [], [], 0.25)[0]:
            if not (read := os.read(fd, 1024)):
                return
            waiting += read


def _on_screen(session: Session) -> bool:
    """Draws and obeys keys until the sitting is over; True when Ctrl-Z asks for a pause."""
    fd = sys.stdin.fileno()
    with _single_keys(fd), console.screen() as screen:
        for key in _keys(fd):
            if key == SUSPEND:
                return True
            if key and not session.press(key):
                break
            console.control(Control.home())
            screen.update(*session.frame(*console.size))
    return False


def _by_line(session: Session) -> None:
    """The same without a terminal: a line of input is a row of keys."""
    shown = None
    while session.todo:
        if shown != (shown := (session.todo[-1].id, session.reference)):
            say("\n".join([f"\n{session.progress}", *(f"\n{title}:\n{text}" for title, text in session.parts())]))
        say(f"{session.note + '. ' if session.note else ''}{session.criterion}: {QUESTIONS[session.criterion]} (0-5, u, s, r, q)")
        if not (line := sys.stdin.readline()):
            return
        keys = line.strip().lower()
        if strange := set(keys) - {*SCALE, *"usrq "}:
            session.note = f"{printable(''.join(sorted(strange)))!r} is no key here, the line was ignored"
        elif not all(session.press(key) for key in keys if key != " "):
            return


def rate(folder: Path, rater: str, *, criteria: Sequence[str], limit: int, seed: int) -> None:
    """A sitting with one rater, which ends when all is rated or the rater quits; the next one goes on there."""
    known = evaluated(folder)
    cards = deck(known, rater, limit=limit, seed=seed)
    with open_ledger(folder, rater, criteria) as ledger:
        if stale := sum(bool(row["scores"]) for i, row in ledger.standing.items() if i not in known):
            say(f"ratings set apart, because no run gives their reply any more: {stale}")
        session = Session(cards, ledger)
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            if not (sys.stdin.isatty() and sys.stdout.isatty()) or console.is_dumb_terminal:
                _by_line(session)
            else:
                while session.todo and _on_screen(session):
                    os.kill(0, signal.SIGTSTP)  # the whole job, make included, as the terminal itself would
        except KeyboardInterrupt:
            pass
        finally:
            signal.signal(signal.SIGTERM, before)
    seen = [bool(ledger.standing[card.id]["scores"]) for card in cards if card.id in ledger.standing]
    then = "the same command goes on" if sum(seen) < len(cards) else "make report shows the scores"
    say(f"{rater}: {sum(seen)} of {len(cards)} rated, {len(seen) - sum(seen)} skipped; {then}")


def export_csv(path: Path, cards: Sequence[Item], criteria: Sequence[str]) -> None:
    """The deck as a blind CSV with empty score columns. No cell can run as a formula: an apostrophe goes before what would."""
    if path.exists():
        raise UserError(f"{path} exists; choose another file")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["item", "prompt", "reply", *criteria])
    for card in cards:
        cells = [printable(cell) for cell in (card.id, card.prompt, card.reply)]
        writer.writerow([f"'{cell}" if cell.startswith(FORMULA) else cell for cell in cells] + [""] * len(criteria))
    write_text(path, "\ufeff" + text.getvalue())  # without the mark Excel takes UTF-8 for the local code page


def import_csv(path: Path, folder: Path, rater: str) -> int:
    """Adds a filled CSV's scores to the rater's ledger, all or none; returns how many rows were new. Empty scores are not rated."""
    known = evaluated(folder)
    criteria, scores = _filled(path, known)
    with open_ledger(folder, rater, criteria) as ledger:
        fresh = {i: s for i, s in scores.items() if ledger.standing.get(i, {}).get("scores") != s}
        for item, given in fresh.items():
            ledger.add(known[item], given)
    return len(fresh)


def _filled(path: Path, known: Mapping[str, Item]) -> tuple[Sequence[str], dict[str, dict[str, int]]]:
    """The criteria and {item id: scores} of a filled CSV; commas, semicolons or tabs; every problem is reported with its line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); save it as CSV in UTF-8") from None
    csv.field_size_limit(2**31 - 1)  # a prompt may be longer than the default of 131,072 characters
    reader = csv.reader(io.StringIO(text), delimiter=max(",;\t", key=text.partition("\n")[0].count))
    header = [cell.strip() for cell in next(reader, [])]
    criteria = OVERALL if OVERALL[0] in header else CRITERIA
    if missing := [column for column in ("item", *criteria) if column not in header]:
        raise UserError(f"{path}, line 1: no column {', '.join(missing)}")
    scores: dict[str, dict[str, int]] = {}
    problems, seen, end = [], dict[str, int](), reader.line_num
    for cells in reader:
        line, end = end + 1, reader.line_num
        row = dict(zip(header, (cell.strip().removeprefix("'") for cell in cells), strict=False))
        if not any(row.values()):
            continue
        given = {c: row[c] for c in criteria if row.get(c)}
        problems += [f"{path}, line {line}: {c} is {v!r}, not one of 0 to 5" for c, v in given.items() if v not in [*SCALE]]
        item = row.get("item", "")
        if item not in known:
            problems.append(f"{path}, line {line}: unknown item {item!r}; it is of another experiment, or its reply has changed since the export")
        if item in seen:
            problems.append(f"{path}, line {line}: item {item!r} is in line {seen[item]} already")
        seen[item] = line
        if given and not problems:
            scores[item] = {c: int(v) for c, v in given.items()}
    if problems:
        raise UserError(*problems)
    return criteria, scores


def read_ratings(folder: Path) -> list[Rating]:
    """All raters' ratings in runs/NAME/ratings, each given to every run whose reply it is now."""
    paths = sorted((folder / "ratings").glob("*.jsonl"))
    known = items(folder) if paths else {}
    out = []
    for path in paths:
        for row in standing(path).values():
            item = known.get(row["item"])
            if row["scores"]:
                first = item.repeats or item.id if item else row["item"]
                out.append(Rating(path.stem, first, row["id"], item.runs if item else (), row["scores"], row["repeat"]))
    return out
