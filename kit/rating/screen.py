"""A sitting in the terminal: a reply at a time, one keypress a score; without a terminal, by lines of input."""

from __future__ import annotations

import os
import re
import select
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from rich.control import Control
from rich.text import Text

from kit.console import console, printable, say
from kit.rating.deck import Item, deck, evaluated
from kit.rating.ledger import QUESTIONS, SCALE, Ledger, open_ledger

HELP = "0-5 score   u undo   s skip   r reference   space b ↑ ↓ scroll   q quit"
SCROLL = {" ": 1, "b": -1, "j": 0, "k": 0}
# One key: a control sequence (ECMA-48), a function key, a lone escape, or any other byte. An unfinished sequence does not match.
KEY = re.compile(rb"\x1b\[[\x20-\x3f]*[^\x20-\x3f]|\x1bO.|\x1b(?=[^\[O])|[^\x1b]", re.DOTALL)
# Arrows, pages, backspace, Ctrl-C and Ctrl-D.
KEYS = {b"\x1b[A": "k", b"\x1bOA": "k", b"\x1b[B": "j", b"\x1bOB": "j", b"\x1b[5~": "b", b"\x1b[6~": " ", b"\x7f": "u", b"\x08": "u",
        b"\x03": "q", b"\x04": "q"}  # fmt: skip
SUSPEND = "\x1a"


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
