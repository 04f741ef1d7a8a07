"""Human scores: the blind deck, the ledger under kills and undo, a real terminal, the CSV detour, and the statistics against published numbers."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import random
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from rich.cells import cell_len

from kit.config import RunConfig
from kit.console import printable
from kit.errors import UserError
from kit.files import write_json, write_jsonl
from kit.rating import agreement, sheet
from kit.rating.agreement import alpha, correlation, spearman, summary, weighted_kappa
from kit.rating.deck import Item, deck, evaluated, items
from kit.rating.ledger import CRITERIA, OVERALL, Rating, open_ledger, read_ratings, standing
from kit.rating.paired import comparisons
from kit.rating.screen import Session
from kit.runs import open_run
from kit.statistics import holm

Make = Callable[..., RunConfig]
METHODS = ("base", "lora", "dora")
HOSTILE = "\x1b[2J\x1b]0;owned\x07 \x9b31m \u202eabc [bold]x[/bold] =1\r\nend"


def made(config: RunConfig, replies: list[str], prompt: str = "Prompt") -> Path:
    """A run with a reply for each test row."""
    folder = open_run(config)
    rows = [
        {"id": f"t-{i}", "source": "t", "prompt": f"{prompt} {i}", "reference": f"Reference {i}", "prediction": reply, "reply_tokens": 1,
         "finished": True, "nll": 1.0, "nll_tokens": 1}
        for i, reply in enumerate(replies)
    ]  # fmt: skip
    write_jsonl(folder / "predictions.jsonl", rows)
    write_json(folder / "eval.json", {})
    return folder.parent


def test_a_reply_without_its_prompt_is_named(tiny: Make) -> None:
    folder = made(tiny("--method", "lora"), ["a", "b"])
    path = folder / "lora-s0" / "predictions.jsonl"
    path.write_text(path.read_text().replace('"prompt"', '"promp"', 1))
    with pytest.raises(UserError, match=r"predictions.jsonl, row 1: it has no prompt; restore the file"):
        items(folder)


@pytest.fixture
def folder(tiny: Make) -> Path:
    """Three runs of 20 rows; LoRA and DoRA agree on every fourth."""
    for method in METHODS:
        out = made(tiny("--method", method), [f"the same {i}" if method != "base" and i % 4 == 0 else f"{method} says {i}" for i in range(20)])
    return out


def cards(folder: Path, rater: str = "anna", limit: int = 1000) -> list[Item]:
    return deck(items(folder), rater, limit=limit, seed=0)


def fill(folder: Path, rater: str, score: Callable[[Item], int]) -> None:
    with open_ledger(folder, rater, OVERALL) as ledger:
        for card in cards(folder, rater):
            ledger.add(card, {"overall": score(card)})


# The deck


def test_identical_replies_are_one_item_of_several_runs(folder: Path) -> None:
    firsts = [i for i in cards(folder) if not i.repeats]
    assert len(firsts) == 20 * 3 - 5
    assert sorted({i.runs for i in firsts}) == [("base",), ("dora-s0",), ("dora-s0", "lora-s0"), ("lora-s0",)]


def test_the_order_is_the_raters_own_and_stays(folder: Path) -> None:
    assert cards(folder) == cards(folder)
    anna, ben = ([i for i in cards(folder, rater) if not i.repeats] for rater in ("anna", "ben"))
    assert anna != ben
    assert set(anna) == set(ben)
    rows = [i.row for i in anna]
    assert rows != sorted(rows, key=lambda r: int(r[2:]))
    assert deck(items(folder), "anna", limit=1000, seed=1) != cards(folder)


def test_all_raters_get_the_same_whole_rows_and_a_larger_limit_adds_to_them(folder: Path) -> None:
    few, ben, many = ({i.id for i in cards(folder, rater, n) if not i.repeats} for rater, n in (("anna", 12), ("ben", 12), ("anna", 30)))
    assert few == ben < many
    assert 10 <= len(few) <= 12
    rows = {i.row for i in cards(folder, limit=12)}
    assert {run for i in cards(folder, limit=12) for run in i.runs if i.row == min(rows)} == {"base", "lora-s0", "dora-s0"}
    assert len({i.row for i in cards(folder, limit=1)}) == 1
    assert {i.row for i in deck(items(folder), "anna", limit=12, seed=1)} != rows


@pytest.mark.parametrize("limit", [10, 30, 1000])
def test_a_tenth_is_repeated_far_from_its_first_showing_under_an_id_of_its_own(folder: Path, limit: int) -> None:
    drawn = cards(folder, limit=limit)
    place = {item.id: n for n, item in enumerate(drawn)}
    repeats = [i for i in drawn if i.repeats]
    firsts = len(drawn) - len(repeats)
    assert len(place) == len(drawn)
    assert len(repeats) == round(firsts / 10) > 0
    assert all(place[i.id] - place[i.repeats] >= firsts // 2 for i in repeats)


def test_only_rows_that_every_run_answered_to_the_same_prompt_are_compared(tiny: Make, folder: Path) -> None:
    made(tiny("--method", "lora"), ["short"] * 3)
    assert {i.row for i in cards(folder)} == {"t-0", "t-1", "t-2"}
    made(tiny("--method", "lora"), ["other"] * 20, prompt="Other data")
    with pytest.raises(UserError, match="base, dora-s0, lora-s0 share no test row"):
        cards(folder)


def test_an_unfinished_evaluation_does_not_count(folder: Path) -> None:
    (folder / "base" / "eval.json").unlink()
    assert {run for i in cards(folder) for run in i.runs} == {"dora-s0", "lora-s0"}
    for run in ("dora-s0", "lora-s0"):
        (folder / run / "eval.json").unlink()
    with pytest.raises(UserError, match="no evaluated run in"):
        evaluated(folder)


# The ledger


def test_what_was_added_stands_and_what_was_undone_does_not(folder: Path) -> None:
    one, two, three = cards(folder)[:3]
    with open_ledger(folder, "anna", OVERALL) as ledger:
        for item, score in ((one, 3), (two, 4), (three, 5), (one, 1)):
            ledger.add(item, {"overall": score})
        ledger.undo(two)
        before = ledger.standing
    path = folder / "ratings" / "anna.jsonl"
    assert {i: r["scores"]["overall"] for i, r in standing(path).items()} == {i: r["scores"]["overall"] for i, r in before.items()} == {three.id: 5, one.id: 1}
    assert list(standing(path)) == list(before)
    assert len(path.read_bytes().splitlines()) == 5
    row = json.loads(path.read_bytes().splitlines()[0])
    assert set(row) == {"item", "id", "runs", "reply", "scores", "repeat", "time"}
    assert (row["item"], row["id"], row["runs"]) == (one.id, one.row, list(one.runs))


def test_each_rating_is_on_the_disk_before_the_next(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    fill(folder, "anna", lambda _: 2)
    ends = list(itertools.accumulate(len(line) for line in (folder / "ratings" / "anna.jsonl").read_bytes().splitlines(keepends=True)))
    assert synced == ends


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_a_line_that_a_kill_cut_off_is_dropped_and_the_others_stay(folder: Path, cut: int) -> None:
    fill(folder, "anna", lambda _: 2)
    path = folder / "ratings" / "anna.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert len(read_ratings(folder)) == len(cards(folder)) - 1
    with open_ledger(folder, "anna", OVERALL) as ledger:
        ledger.add(cards(folder)[-1], {"overall": 2})
    assert re.sub(rb'"time": "[^"]*"', b"", path.read_bytes()) == re.sub(rb'"time": "[^"]*"', b"", whole)


@pytest.mark.parametrize(
    "line", ["{", "[]", "3", '{"item": "a"}', '{"item": "a", "id": "t", "repeat": false, "scores": {"overall": 6}}', '{"undo": "nothing"}',
             '{"item": "a", "id": "t", "repeat": false, "scores": {"beauty": 3}}', '{"item": [], "id": "t", "repeat": false, "scores": {}}'],
)  # fmt: skip
def test_a_damaged_ledger_is_named_with_its_line(folder: Path, line: str) -> None:
    fill(folder, "anna", lambda _: 2)
    path = folder / "ratings" / "anna.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:4], line, *lines[4:]]) + "\n")
    with pytest.raises(UserError, match=re.escape(f"{path}, line 5: not a rating")):
        read_ratings(folder)


@pytest.mark.parametrize("name", ["", "a b", "../anna", "a.b", "x" * 61])
def test_a_rater_is_named_so_that_a_file_can_be(folder: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot name a rater"), open_ledger(folder, name, OVERALL):
        pass


def test_a_rater_rates_in_one_place_and_on_one_scale(folder: Path) -> None:
    fill(folder, "anna", lambda _: 2)
    with open_ledger(folder, "anna", OVERALL), pytest.raises(UserError, match="anna is rating in another terminal"), open_ledger(folder, "anna", OVERALL):
        pass
    with pytest.raises(UserError, match="holds scores for overall, not for fluency, coherence, correctness"), open_ledger(folder, "anna", CRITERIA):
        pass


def test_ratings_of_replies_that_changed_are_stale_and_new_runs_share_old_ratings(tiny: Make, folder: Path) -> None:
    fill(folder, "anna", lambda card: 4 if "lora-s0" in card.runs else 1)
    made(tiny("--method", "base"), [f"base says {i}" if i < 15 else "changed" for i in range(20)])
    made(tiny("--method", "lora", "--seed", "7"), [f"lora says {i}" for i in range(20)])
    got = summary(read_ratings(folder), {})
    assert sum(not r.runs and not r.repeat for r in read_ratings(folder)) == 5
    assert {run: s["n"] for run, s in got["criteria"]["overall"]["runs"].items()} == {"base": 15, "dora-s0": 20, "lora-s0": 20, "lora-s7": 15}
    assert got["criteria"]["overall"]["runs"]["lora-s7"]["value"] == 4
    stale = got["stale"]
    assert stale == sum(not r.runs for r in read_ratings(folder)) >= 5
    said = piped(folder, "", "--rater", "anna", "--overall").stdout
    assert f"ratings set apart, because no run gives their reply any more: {stale}" in said


# The sitting, without a terminal


@pytest.fixture
def session(folder: Path) -> Iterator[Session]:
    with open_ledger(folder, "anna", CRITERIA) as ledger:
        yield Session(cards(folder, limit=12), ledger)


def press(session: Session, keys: str) -> bool:
    return [session.press(key) for key in keys][-1]


def test_keys_rate_skip_and_undo(session: Session) -> None:
    total, order = session.total, session.todo[::-1]
    press(session, "453s12")
    assert [r["scores"] for r in session.ledger.standing.values()] == [{"fluency": 4, "coherence": 5, "correctness": 3}, {}]
    assert (session.progress, session.criterion) == (f"3 of {total}", "correctness")
    press(session, "u")
    assert (session.progress, session.criterion) == (f"3 of {total}", "coherence")
    press(session, "uuu")
    assert (session.progress, session.todo[-1]) == (f"1 of {total}", order[0])
    assert not session.ledger.standing
    press(session, "u")
    assert session.note == "nothing to undo"
    assert press(session, "x")
    assert not press(session, "q")


def test_the_next_sitting_goes_on_and_can_undo_the_last(session: Session, folder: Path) -> None:
    order = session.todo[::-1]
    press(session, "000s111")
    again = Session(cards(folder, limit=12), session.ledger)
    assert [i.id for i in again.todo[::-1]] == [i.id for i in [*order[3:], order[1]]]
    press(again, "u")
    assert again.todo[-1] == order[2]
    assert not press(again, "555" * len(again.todo)), "a sitting ends when all is rated"
    assert len(again.ledger.standing) == again.total
    assert not Session(cards(folder, limit=12), session.ledger).todo


@pytest.mark.parametrize(("width", "height"), [(80, 24), (40, 15), (20, 8), (200, 60)])
def test_paging_shows_every_character_and_no_line_is_too_wide(session: Session, width: int, height: int) -> None:
    text = HOSTILE + "漢字仮名" * 90 + " 🙂 naïve" * 60 + "\n\n    indented\tword " + "unbroken" * 40
    session.todo[-1] = replace(session.todo[-1], prompt="lake " * 300, reply=text)
    seen: dict[int, str] = {}
    while True:
        lines = session.frame(width, height)
        assert len(lines) == height or height < 10
        assert all(cell_len(line.plain) <= width for line in lines)
        shown = [line.plain for line in lines[1 : 1 + session.page]]
        seen |= {session.offset + n: line for n, line in enumerate(shown)}
        before = session.offset
        session.press(" ")
        session.frame(width, height)
        if session.offset == before:
            break
    body = "".join(seen[n] for n in sorted(seen))
    squeeze = lambda s: re.sub(r"\s", "", s)  # noqa: E731
    assert squeeze(body) == squeeze("Prompt" + "lake" * 300 + "Reply" + printable(text))
    assert sorted(seen) == list(range(len(seen)))


def test_nothing_in_a_reply_commands_the_terminal() -> None:
    shown = printable(HOSTILE + "\ud800")
    assert shown == "\\x1b[2J\\x1b]0;owned\\x07 \\x9b31m \\u202eabc [bold]x[/bold] =1\nend\\ud800"
    family = "👩‍👩‍👧 می‌خواهم\tü\n"
    assert printable(family) == family


def test_the_reference_comes_on_demand_and_into_view(session: Session) -> None:
    session.todo[-1] = replace(session.todo[-1], prompt="lake " * 800, reference="REF")
    text = lambda: "\n".join(line.plain for line in session.frame(80, 24))  # noqa: E731
    assert "REF" not in text()
    session.press("r")
    assert "REF" in text()
    session.press("r")
    assert "REF" not in text()


def test_the_method_is_never_shown(session: Session) -> None:
    session.todo[-1] = replace(session.todo[-1], reply="words")
    text = "\n".join(line.plain for line in session.frame(80, 24))
    assert not re.search("base|lora|dora", text)


# The sitting, as a user has it


def flags(folder: Path, *more: str) -> list[str]:
    return [sys.executable, str(ROOT / "scripts" / "rate.py"), "--recipe", "tiny", "--runs-dir", str(folder.parent), *more]


class Terminal:
    """scripts/rate.py on a real pseudo-terminal."""

    def __init__(self, command: list[str], **env: str) -> None:
        self.ours, self.theirs = os.openpty()
        termios.tcsetwinsize(self.theirs, (24, 80))
        self.before = termios.tcgetattr(self.theirs)
        env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")} | {"TERM": "xterm-256color"} | env
        self.process = subprocess.Popen(command, stdin=self.theirs, stdout=self.theirs, stderr=self.theirs, env=env, process_group=0)
        self.raw = b""

    def until(self, text: str) -> str:
        """What came on the screen until `text` did."""
        while text not in (plain := re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.raw.decode(errors="replace"))):
            assert select.select([self.ours], [], [], 60)[0], f"no {text!r} in {plain!r}"
            self.raw += os.read(self.ours, 65536)
        return plain

    def send(self, keys: str) -> None:
        self.raw = b""
        os.write(self.ours, keys.encode())

    def rest(self) -> bytes:
        """What came since the last keys, as it came."""
        while select.select([self.ours], [], [], 0)[0]:
            self.raw += os.read(self.ours, 65536)
        return self.raw

    def end(self) -> int:
        """The exit status; the terminal must be as it was."""
        status = self.process.wait(60)
        assert termios.tcgetattr(self.theirs) == self.before
        return status


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def make(command: list[str], **env: str) -> Terminal:
        opened.append(Terminal(command, **env))
        return opened[-1]

    yield make
    for t in opened:
        t.process.kill()
        t.process.wait()
        os.close(t.ours)
        os.close(t.theirs)


def test_rating_in_a_terminal_survives_quitting_and_a_kill(folder: Path, terminal: Callable[..., Terminal]) -> None:
    command = flags(folder, "--rater", "anna", "--items", "20")
    total, path = len(cards(folder, limit=20)), folder / "ratings" / "anna.jsonl"
    first = terminal(command)
    assert "Reference" not in first.until(f"anna   1 of {total}")
    first.send("45")
    first.until("correctness: ")
    first.send("\x1b[5~\x1b[A\x7f3")  # page up and an arrow are no scores; backspace takes 5 back
    first.until("coherence 3")
    first.send("2")
    first.until(f"2 of {total}")
    first.send("111u")
    first.until("taken back")
    first.send("\x04")
    first.until("1 of")
    assert first.end() == 0
    assert [r["scores"] for r in standing(path).values()] == [{"fluency": 4, "coherence": 3, "correctness": 2}]

    second = terminal(command)
    second.until(f"2 of {total}")
    second.send("000111222")
    second.until(f"5 of {total}")
    second.send("3")
    second.until("coherence: ")
    second.process.send_signal(signal.SIGKILL)
    second.process.wait(60)
    assert len(standing(path)) == 4

    third = terminal(command)
    third.until(f"5 of {total}")
    third.send("555q")
    assert f"anna: 5 of {total} rated, 0 skipped; the same command goes on" in third.until("goes on")
    assert third.end() == 0
    assert [i.id for i in cards(folder, limit=20)[:5]] == list(standing(path))


@pytest.mark.parametrize(("how", "status"), [("\x03", 0), ("\x04", 0), (signal.SIGTERM, 143)])
def test_every_way_out_restores_the_terminal(folder: Path, terminal: Callable[..., Terminal], how: str | signal.Signals, status: int) -> None:
    shown = terminal(flags(folder))
    shown.until("1 of")
    if isinstance(how, str):
        shown.send(how)
    else:
        shown.process.send_signal(how)
    assert shown.end() == status
    assert shown.rest().count(b"\x1b[?1049l") == 1


def test_ctrl_z_stops_the_job_on_a_restored_terminal_and_fg_goes_on(folder: Path, terminal: Callable[..., Terminal]) -> None:
    shown = terminal(flags(folder))
    shown.until("q quit")
    shown.send("4\x1a")
    for _ in range(600):
        pid, status = os.waitpid(shown.process.pid, os.WUNTRACED | os.WNOHANG)
        if pid:
            break
        time.sleep(0.1)
    assert os.WIFSTOPPED(status)
    assert termios.tcgetattr(shown.theirs) == shown.before
    shown.raw = b""
    os.killpg(pid, signal.SIGCONT)
    shown.until("fluency 4")
    shown.send("q")
    assert shown.end() == 0


def test_a_new_size_is_drawn_for_and_colour_can_be_off(folder: Path, terminal: Callable[..., Terminal]) -> None:
    shown = terminal(flags(folder, "--overall"), NO_COLOR="1")
    shown.until("q quit")
    assert not re.search(rb"\x1b\[[0-9;]*3\d", shown.raw)
    shown.send("")
    termios.tcsetwinsize(shown.theirs, (30, 100))
    shown.until("─" * 81)
    shown.send("q")
    assert shown.end() == 0


def piped(folder: Path, text: str, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(flags(folder, *more), input=text, capture_output=True, text=True, timeout=60, check=False)


def test_without_a_terminal_lines_are_keys(folder: Path) -> None:
    done = piped(folder, "4 5 3\n-1\n21\nu\nr\n2\n3\nskip\ns\n", "--rater", "ben", "--items", "12")
    assert (done.returncode, done.stderr) == (0, "")
    assert "ben: 2 of" in done.stdout
    assert "rated, 1 skipped" in done.stdout
    assert done.stdout.count("Reference:") == 1
    assert "'-' is no key here, the line was ignored" in done.stdout
    scores = [tuple(r["scores"].values()) for r in standing(folder / "ratings" / "ben.jsonl").values()]
    assert scores == [(4, 5, 3), (2, 2, 3), ()]
    assert [tuple(r.scores.values()) for r in read_ratings(folder)] == scores[:2]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--items", "0"], "--items must be greater than 0, got 0"),
        (["--rater", "a/b"], "'a/b' cannot name a rater: use letters, digits, '-' and '_'"),
        (["--import", "x.csv"], "--import needs --rater, and no --export"),
        (["--ratr", "anna"], "unknown flag '--ratr'; did you mean '--rater'?"),
        (["--name", "none"], "no evaluated run in {runs}/none; make some with: make all METHOD=qlora NAME=none"),
    ],
)
def test_user_errors_are_one_line(folder: Path, more: list[str], message: str) -> None:
    done = piped(folder, "", *more)
    assert (done.returncode, done.stderr) == (2, f"error: {message.format(runs=folder.parent)}\n")


# The CSV detour


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"))))


def saved(path: Path, rows: list[dict[str, str]], delimiter: str = ",") -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_a_csv_goes_out_blind_and_comes_back_filled(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    assert piped(folder, "", "--rater", "anna", "--items", "20", "--export", str(out)).returncode == 0
    rows = table(out)
    assert [r["item"] for r in rows] == [i.id for i in cards(folder, limit=20)]
    assert list(rows[0]) == ["item", "prompt", "reply", "fluency", "coherence", "correctness"]
    assert "-s0" not in out.read_text()
    assert not (folder / "ratings").exists()
    for n, row in enumerate(rows[:5]):
        row |= {"fluency": str(n), "coherence": "'3", "correctness": "" if n == 4 else " 5 "}
    for delimiter, new in ((";", 5), (",", 0), ("\t", 0)):  # the second time they are there already
        done = piped(folder, "", "--rater", "anna", "--import", str(saved(tmp_path / "in.csv", rows, delimiter)))
        assert (done.returncode, done.stdout) == (0, f"{new} new ratings by anna from {tmp_path / 'in.csv'}\n")
    stands = standing(folder / "ratings" / "anna.jsonl")
    assert [r["scores"] for r in stands.values()][3:] == [{"fluency": 3, "coherence": 3, "correctness": 5}, {"fluency": 4, "coherence": 3}]
    assert list(stands) == [r["item"] for r in rows[:5]]


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "＝"])
def test_no_cell_of_an_export_runs_as_a_formula(tiny: Make, tmp_path: Path, start: str) -> None:
    folder = made(tiny("--method", "base"), [f'{start}1+1 \x1b[2J, "quoted"\nline'])
    sheet.export_csv(tmp_path / "out.csv", cards(folder), OVERALL)
    (row,) = table(tmp_path / "out.csv")
    assert row["reply"] == f'\'{start}1+1 \\x1b[2J, "quoted"\nline'
    for score in ("2", "3"):  # a second file corrects the first
        assert sheet.import_csv(saved(tmp_path / "in.csv", [row | {"overall": score}]), folder, "anna") == 1
    assert [r.scores for r in read_ratings(folder)] == [{"overall": 3}]
    with pytest.raises(UserError, match="exists; choose another file"):
        sheet.export_csv(tmp_path / "out.csv", cards(folder), OVERALL)


def test_every_problem_of_a_csv_is_reported_with_its_line_and_nothing_is_taken(folder: Path, tmp_path: Path) -> None:
    rows = [{"item": i.id, "reply": "two\nlines", "overall": "3"} for i in cards(folder)[:6]]
    for n, change in enumerate([{"overall": "6"}, {"overall": "2.5"}, {"item": "nobody"}, {"item": rows[0]["item"]}, {"overall": "good"}], 1):
        rows[n] |= change
    with pytest.raises(UserError) as error:
        sheet.import_csv(saved(tmp_path / "in.csv", rows), folder, "anna")
    found = [p.removeprefix(f"{tmp_path / 'in.csv'}, ") for p in error.value.problems]
    assert found == [
        "line 4: overall is '6', not one of 0 to 5",
        "line 6: overall is '2.5', not one of 0 to 5",
        "line 8: unknown item 'nobody'; it is of another experiment, or its reply has changed since the export",
        f"line 10: item '{rows[0]['item']}' is in line 2 already",
        "line 12: overall is 'good', not one of 0 to 5",
    ]
    assert not (folder / "ratings").exists()


def test_a_file_of_another_experiment_does_not_fill_the_screen(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        sheet.import_csv(saved(tmp_path / "in.csv", [{"item": f"foreign {i}", "overall": "3"} for i in range(99)]), folder, "anna")
    assert (len(error.value.problems), error.value.problems[-1]) == (11, "and 89 problems more")


def test_an_import_obeys_overall(folder: Path, tmp_path: Path) -> None:
    three = saved(tmp_path / "three.csv", [{"item": i.id, **dict.fromkeys(CRITERIA, "3")} for i in cards(folder)[:6]])
    done = piped(folder, "", "--rater", "anna", "--overall", "--import", str(three))
    assert (done.returncode, done.stderr) == (2, f"error: {three}, line 1: no column overall\n")
    both = saved(tmp_path / "both.csv", [{"item": i.id, "overall": str(n % 6), **dict.fromkeys(CRITERIA, "3")} for n, i in enumerate(cards(folder)[:6])])
    assert piped(folder, "", "--rater", "anna", "--overall", "--import", str(both)).returncode == 0
    assert [r["scores"] for r in standing(folder / "ratings" / "anna.jsonl").values()] == [{"overall": n} for n in range(6)]


def test_one_persons_scores_are_not_imported_under_a_second_name(folder: Path, tmp_path: Path) -> None:
    rows = [{"item": i.id, "overall": str(n % 6)} for n, i in enumerate(cards(folder)[:8])]
    path = saved(tmp_path / "in.csv", rows)
    assert sheet.import_csv(path, folder, "anna") == 8
    done = piped(folder, "", "--rater", "ben", "--import", str(path))
    said = f"error: {path}: all 8 rows have the scores of anna; one person's scores count once, so they are not taken as ben's\n"
    assert (done.returncode, done.stderr) == (2, said)
    assert not (folder / "ratings" / "ben.jsonl").exists()
    assert sheet.import_csv(path, folder, "anna") == 0, "the same rater's are there already"
    assert sheet.import_csv(saved(tmp_path / "few.csv", rows[:4]), folder, "ben") == 4
    assert sheet.import_csv(saved(tmp_path / "own.csv", [*rows[:7], rows[7] | {"overall": "5"}]), folder, "cleo") == 8


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"item,fluency\nx,1\n", "line 1: no column coherence, correctness"), (b"", "line 1: no column item, fluency, coherence, correctness"),
     (b"item,overall\n", "holds no score: fill in overall, 0 to 5"), ("é".encode("utf-16"), "save it as CSV in UTF-8"), (None, "cannot be read")],
)  # fmt: skip
def test_what_is_no_filled_csv_is_refused(folder: Path, tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "in.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        sheet.import_csv(path, folder, "anna")


# What the scores say

# Krippendorff (2011): four observers, twelve units.
PUBLISHED = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."]


def test_alpha_of_the_published_example() -> None:
    got = alpha([[int(v) for v in unit if v != "."] for unit in zip(*PUBLISHED, strict=True)])
    assert (round(got["value"], 3), got["n"], got["reason"]) == (0.815, 11, None)


def literal_ordinal_alpha(units: list[list[int]]) -> float:
    """From the definition: mean ordinal difference within units over that of all pairable values, pair by pair."""
    pairable = [u for u in units if len(u) > 1]
    flat = [v for u in pairable for v in u]

    def difference(a: int, b: int) -> float:
        low, high = min(a, b), max(a, b)
        return (sum(low <= v <= high for v in flat) - (flat.count(a) + flat.count(b)) / 2) ** 2

    within = sum(difference(a, b) / (len(u) - 1) for u in pairable for a, b in itertools.permutations(u, 2)) / len(flat)
    between = sum(difference(a, b) for a, b in itertools.permutations(flat, 2)) / (len(flat) * (len(flat) - 1))
    return 1 - within / between


@pytest.mark.parametrize("seed", range(5))
def test_alpha_equals_its_definition_with_missing_values(seed: int) -> None:
    rng = random.Random(seed)
    made = [[rng.randint(0, 5) for _ in range(rng.randint(0, 4))] for _ in range(25)]
    assert alpha(made)["value"] == pytest.approx(literal_ordinal_alpha(made), abs=1e-12)


def test_alpha_at_its_ends() -> None:
    assert alpha([[1, 1], [2, 2], [5, 5]])["value"] == 1
    assert alpha([[1, 2], [2, 1]])["value"] < 0
    assert alpha([[3, 3], [3, 3]]) == {"value": None, "n": 2, "reason": "all scores are the same"}
    assert alpha([[3], [4], []]) == {"value": None, "n": 0, "reason": "no reply has scores of two raters"}


def test_weighted_kappa_by_hand() -> None:
    # Mean squared difference (0 + 1 + 0 + 4) / 4; over all 16 pairs 32 / 16.
    assert weighted_kappa([(1, 1), (2, 3), (3, 3), (4, 2)])["value"] == pytest.approx(1 - 1.25 / 2)
    assert weighted_kappa([(0, 5), (5, 0)])["value"] == pytest.approx(-1)
    assert weighted_kappa([(0, 0), (5, 5)])["value"] == 1
    assert weighted_kappa([(2, 2), (2, 2)])["reason"] == "all scores are the same"
    assert weighted_kappa([(2, 3)])["reason"] == "fewer than 2 replies have both scores"


def test_weighted_kappa_equals_its_matrix_form() -> None:
    rng = np.random.default_rng(0)
    pairs = [(int(a), int(np.clip(a + d, 0, 5))) for a, d in zip(rng.integers(0, 6, 80), rng.integers(-2, 3, 80), strict=True)]
    observed = np.zeros((6, 6))
    for a, b in pairs:
        observed[a, b] += 1 / len(pairs)
    weights = np.array([[(a - b) ** 2 / 25 for b in range(6)] for a in range(6)])
    chance = np.outer(observed.sum(axis=1), observed.sum(axis=0))
    assert weighted_kappa(pairs)["value"] == pytest.approx(1 - (weights * observed).sum() / (weights * chance).sum())


def test_spearman_by_hand() -> None:
    assert spearman([(1, 1), (2, 3), (3, 2), (4, 40)])["value"] == pytest.approx(0.8)
    assert spearman([(1, 1), (2, 2), (2, 3), (3, 4)])["value"] == pytest.approx(4.5 / (4.5 * 5) ** 0.5)  # a tie
    assert spearman([(1, 0.3), (2, 0.1 + 0.2), (3, 4)]) == spearman([(1, 0.3), (2, 0.3), (3, 4)])  # a tie but for rounding
    assert spearman([(1, 1), (1, 2), (1, 3)]) == {"value": None, "n": 3, "reason": "all values of one side are the same"}
    assert spearman([(1, 1), (2, 2)])["reason"] == "fewer than 3 replies have both values"


def related(rng: np.random.Generator, rows: int) -> list[agreement.Point]:
    """Three replies a row, alike in both values."""
    row = np.repeat(rng.normal(size=(rows, 2)), 3, axis=0)
    x, y = (row + rng.normal(size=(3 * rows, 2))).T
    return [(f"t-{i // 3}", float(np.clip(round(2.5 + a), 0, 5)), float(a + b)) for i, (a, b) in enumerate(zip(x, y, strict=True))]


def test_the_interval_of_a_correlation_covers_it() -> None:
    rng = np.random.default_rng(0)
    truth = spearman([point[1:] for point in related(rng, 20_000)])["value"]
    found = [correlation(related(rng, 20)) for _ in range(200)]
    assert 0.88 < np.mean([f["low"] <= truth <= f["high"] for f in found]) <= 1
    assert all(-1 <= f["low"] < f["value"] < f["high"] <= 1 for f in found)


def test_a_correlation_over_few_rows_has_no_interval() -> None:
    points = [(f"t-{i // 3}", float(i % 5), float(i)) for i in range(12)]
    assert correlation(points) == spearman([p[1:] for p in points]) | {"low": None, "high": None}
    assert correlation([])["reason"] == "fewer than 3 replies have both values"


def test_resampled_ranks_are_those_of_the_resample() -> None:
    values, weights = np.array([2.0, 1.0, 1.0, 3.0]), np.array([[1.0, 0.0, 2.0, 1.0]])
    drawn = np.array([2.0, 1.0, 1.0, 3.0])  # the third twice, the second not at all
    ranks = agreement._ranks(drawn) - agreement._ranks(drawn).mean()
    assert agreement._drawn_ranks(values, weights)[0, [0, 2, 3]].tolist() == ranks[[0, 1, 3]].tolist()


def test_the_interval_of_a_mean_has_the_textbook_width() -> None:
    values = np.random.default_rng(1).integers(0, 6, 400).astype(float)
    got = agreement.mean_interval(list(values))
    assert got["value"] == pytest.approx(values.mean())
    assert got["high"] - got["low"] == pytest.approx(2 * 1.966 * values.std(ddof=1) / 20, rel=0.02)
    assert agreement.mean_interval([3.0] * 4) == {"value": 3.0, "low": None, "high": None, "n": 4}
    assert agreement.mean_interval([5.0, 5.0, 5.0, 4.0, 5.0])["high"] == 5.0
    assert agreement.mean_interval([0.0, 0.0, 0.0, 1.0, 0.0])["low"] == 0.0


@pytest.mark.parametrize("n", [6, 8, 12])
def test_intervals_of_few_scores_cover_the_mean(n: int) -> None:
    rng = np.random.default_rng(n)
    shares = np.array([0.05, 0.1, 0.2, 0.3, 0.25, 0.1])
    found = [agreement.mean_interval(list(rng.choice(6, n, p=shares).astype(float))) for _ in range(1000)]
    assert np.mean([f["low"] <= shares @ np.arange(6) <= f["high"] for f in found]) > 0.92


def rated(rater: str, item: str, score: int, *, runs: tuple[str, ...] = ("base",), repeat: bool = False) -> Rating:
    return Rating(rater, item, f"row-{item}", runs, {"overall": score}, repeat)


def test_the_summary_by_hand() -> None:
    ratings = [
        rated("anna", "a", 1), rated("ben", "a", 3), rated("anna", "b", 5, runs=("base", "lora-s0")), rated("ben", "b", 5, runs=("base", "lora-s0")),
        rated("anna", "c", 4, runs=("lora-s0",)), rated("anna", "a", 2, repeat=True), rated("anna", "c", 4, runs=("lora-s0",), repeat=True),
        rated("ben", "d", 3, repeat=True), Rating("ben", "gone", "row-gone", (), {"fluency": 0}, False),
    ]  # fmt: skip
    bleu = {("base", "row-a"): 10.0, ("lora-s0", "row-b"): 30.0, ("base", "row-b"): 30.0, ("lora-s0", "row-c"): 20.0}
    got = summary(ratings, {"bleu4": bleu, "rouge_l": {}})
    assert [got[k] for k in ("raters", "by_rater", "rated", "replies", "repeats", "stale")] == [["anna", "ben"], {"anna": 3, "ben": 2}, 5, 3, 3, 1]
    assert list(got["criteria"]) == ["overall"]
    overall = got["criteria"]["overall"]
    assert {run: (s["value"], s["n"]) for run, s in overall["runs"].items()} == {"base": (3.5, 2), "lora-s0": (4.5, 2)}
    assert overall["alpha"] == alpha([[1, 3], [5, 5]])
    assert overall["kappa"] == {"anna, ben": weighted_kappa([(1, 3), (5, 5)])}
    assert overall["self_consistency"]["anna"] == weighted_kappa([(1, 2), (4, 4)]) | {"exact": 0.5}
    assert overall["self_consistency"]["ben"] == {"value": None, "n": 0, "reason": "fewer than 2 replies have both scores", "exact": None}
    assert overall["correlation"]["bleu4"] == {"value": pytest.approx(1), "n": 3, "reason": None, "low": None, "high": None}
    assert overall["correlation"]["rouge_l"]["reason"] == "fewer than 3 replies have both values"


@pytest.mark.parametrize("score", [lambda _: 3, lambda card: int(card.id, 16) % 6])
def test_the_summary_of_any_ratings_is_plain_json(folder: Path, score: Callable[[Item], int]) -> None:
    assert json.loads(json.dumps(summary(read_ratings(folder), {"bleu4": {}}), allow_nan=False))["criteria"] == {}
    for rater in ("anna", "ben"):
        fill(folder, rater, score)
        got = summary(read_ratings(folder), {"bleu4": {(run, f"t-{i}"): float(i) for run in ("base", "lora-s0") for i in range(20)}})
        assert json.loads(json.dumps(got, allow_nan=False)) == got
    assert got["criteria"]["overall"]["runs"]["base"]["n"] == 20
    assert sum(r.repeat for r in read_ratings(folder)) == got["repeats"] > 0
    assert sum(s["n"] for s in got["criteria"]["overall"]["self_consistency"].values()) == got["repeats"]


# Which of two methods people score higher

RUNS = {"base": ["base"], "lora": ["lora-s0"]}


def scored(scores: dict[str, list[int]], rater: str = "anna") -> list[Rating]:
    """{run: its replies' scores, by row}."""
    return [Rating(rater, f"{run} {i}", f"t-{i}", (run,), {"overall": v}, False) for run, those in scores.items() for i, v in enumerate(those)]


def test_a_difference_is_paired_by_row_and_rater() -> None:
    strict, mild = [1, 0, 2, 1, 0, 1, 2, 0], [4, 3, 4, 4, 3, 4, 5, 3]
    ratings = scored({"base": strict, "lora-s0": [v + 1 for v in strict]}) + scored({"base": mild}, "ben")  # ben skipped all of LoRA's
    (pair,) = comparisons(ratings, RUNS)
    assert [pair[k] for k in ("a", "b", "delta", "n", "raters", "verdict", "reason")] == ["base", "lora", -1, 8, ["anna"], "worse", None]


def test_raters_are_averaged_by_row() -> None:
    anna, ben = {"base": [1, 2, 3, 1, 2, 3], "lora-s0": [3, 3, 4, 1, 5, 4]}, {"base": [0, 0, 2, 2, 2, 2], "lora-s0": [2, 2, 2, 2, 2, 2]}
    (pair,) = comparisons(scored(anna) + scored(ben, "ben"), RUNS)
    assert pair["delta"] == pytest.approx(np.mean([*anna["base"], *ben["base"]]) - np.mean([*anna["lora-s0"], *ben["lora-s0"]]))
    assert (pair["n"], pair["raters"]) == (6, ["anna", "ben"])
    assert -5 <= pair["low"] < pair["delta"] < pair["high"] <= 5


def test_pairs_and_criteria_are_one_family() -> None:
    rng = np.random.default_rng(0)
    scores = {run: list(rng.integers(0, 4, 12) + shift) for run, shift in (("base", 0), ("lora-s0", 1), ("dora-s0", 2))}
    ratings = [replace(r, scores={c: int(r.scores["overall"]) for c in CRITERIA}) for r in scored(scores)]
    found = comparisons(ratings, RUNS | {"dora": ["dora-s0"]})
    assert len(found) == 3 * len(CRITERIA)
    assert [v["p_holm"] for v in found] == holm([v["p"] for v in found])
    assert all((v["verdict"] == "worse") == (v["p_holm"] < 0.05) for v in found)
    assert any(v["p"] < 0.05 <= v["p_holm"] for v in found), "what the correction takes back is in the test"
    aside = [v for v in comparisons(ratings, RUNS | {"dora": ["dora-s0"]}, apart={("base", "dora"), ("lora", "dora")}) if "dora" not in (v["a"], v["b"])]
    assert [v["p_holm"] for v in aside] == holm([v["p"] for v in aside]), "pairs that nobody may rank weigh on no other"


def test_few_rows_and_no_common_row_give_no_verdict() -> None:
    (few,) = comparisons(scored({"base": [1] * 4, "lora-s0": [5] * 4}), RUNS)
    assert [few[k] for k in ("delta", "low", "p_holm", "verdict", "n", "reason")] == [-4, None, None, None, 4, "fewer than 5 rows"]
    apart = [r for r in scored({"base": [1] * 8, "lora-s0": [5] * 8}) if (r.row < "t-4") == (r.runs == ("base",))]
    (none,) = comparisons(apart, RUNS)
    assert [none[k] for k in ("delta", "verdict", "n", "reason")] == [None, None, 0, "no rater scored both on one test row"]
    assert comparisons(scored({"base": [1] * 8}), RUNS) == comparisons([], RUNS) == []


def test_a_seed_made_after_the_rating_leaves_the_others_their_rows() -> None:
    ratings = scored({"base": [1, 2, 3, 1, 2, 3], "lora-s0": [3, 3, 4, 1, 5, 4]})
    shared = [replace(r, runs=("lora-s0", "lora-s1")) if r.item == "lora-s0 3" else r for r in ratings]
    assert comparisons(shared, RUNS | {"lora": ["lora-s0", "lora-s1"]}) == comparisons(ratings, RUNS)


def test_repeats_and_stale_ratings_are_not_compared() -> None:
    ratings = scored({"base": [1, 2, 3, 1, 2, 3], "lora-s0": [3, 3, 4, 1, 5, 4]})
    more = [replace(r, scores={"overall": 0}, **change) for r in ratings for change in ({"repeat": True}, {"runs": ()})]
    assert comparisons(ratings + more, RUNS) == comparisons(ratings, RUNS)
