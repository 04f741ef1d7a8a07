"""The data folder: every row accounted for, the same bytes from the same inputs, and nothing lost when a build fails."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from kit import dataset
from kit.config import RunConfig
from kit.errors import UserError
from kit.files import read_json, read_jsonl

Make = Callable[..., RunConfig]


def write_rows(path: Path, n: int, seed: int = 0) -> Path:
    rng = random.Random(seed)
    path.write_text(json.dumps([{"instruction": f"Question {i}", "input": "", "output": f"Answer {rng.random()}"} for i in range(n)]))
    return path


def ids(config: RunConfig, split: str) -> list[str]:
    return [r["id"] for r in read_jsonl(config.data_path / f"{split}.jsonl")]


def test_manifest_accounts_for_every_row(tiny: Make, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    rows = json.loads(write_rows(path, 30).read_text())
    path.write_text(json.dumps([*rows, rows[0], {"instruction": "x", "output": ""}]))
    config = tiny("--source", f"alpaca={path}", "--train-per-source", "20", "--test-per-source", "10")
    source = dataset.prepare(config)["sources"]["alpaca"]
    assert source["rows_in"] == 32 == source["kept"] + sum(source["dropped"].values())
    assert source["dropped"] == {"duplicate": 1, "empty_reply": 1}
    assert (source["train"], source["test"]) == (20, 10)
    assert not set(ids(config, "train")) & set(ids(config, "test"))
    manifest = read_json(config.data_path / "manifest.json")
    assert sum(manifest["truncated"]["train"].values()) == manifest["files"]["train.jsonl"]["rows"] == 20


def test_same_inputs_give_the_same_bytes_and_the_second_call_builds_nothing(tiny: Make, capsys: pytest.CaptureFixture[str]) -> None:
    small = ("--train-per-source", "20", "--test-per-source", "5")
    first, second = (
        tiny("--name", "a", *small),
        tiny("--name", "b", "--source", "ultrachat=builtin", "--source", "tulu=builtin", "--source", "alpaca=builtin", *small),
    )
    for config in (first, second):
        dataset.prepare(config)
    for name in ("train.jsonl", "test.jsonl", "manifest.json"):
        assert (first.data_path / name).read_bytes() == (second.data_path / name).read_bytes()
    capsys.readouterr()
    dataset.prepare(first)
    assert capsys.readouterr().out == ""


def test_growing_a_split_keeps_the_rows_already_drawn(tiny: Make, tmp_path: Path) -> None:
    source = ("--source", f"alpaca={write_rows(tmp_path / 'a.json', 100)}")
    small = tiny("--name", "s", *source, "--train-per-source", "20", "--test-per-source", "10")
    large = tiny("--name", "l", *source, "--train-per-source", "60", "--test-per-source", "30")
    for config in (small, large):
        dataset.prepare(config)
    for split in dataset.SPLITS:
        assert ids(large, split)[: len(ids(small, split))] == ids(small, split)


def test_every_beginning_of_a_split_is_balanced(tiny: Make) -> None:
    config = tiny("--train-per-source", "10", "--test-per-source", "5", "--limit", "6")
    assert sorted(r["source"] for r in dataset.rows(config, "train")) == ["alpaca"] * 2 + ["tulu"] * 2 + ["ultrachat"] * 2
    assert len(dataset.rows(config, "test")) == 6


def test_other_inputs_are_an_error_and_overwrite_replaces(tiny: Make) -> None:
    config, other = tiny("--train-per-source", "10", "--test-per-source", "5"), tiny("--train-per-source", "12", "--test-per-source", "5")
    dataset.prepare(config)
    with pytest.raises(UserError, match=r"other inputs \(train_per_source\); choose another --name"):
        dataset.prepare(other)
    assert dataset.prepare(other, overwrite=True)["sources"]["tulu"]["train"] == 12
    assert [p.name for p in Path(config.data_dir).iterdir()] == ["tiny"]


def test_a_changed_source_file_is_noticed(tiny: Make, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.json", 30)
    config = tiny("--source", f"alpaca={path}", "--train-per-source", "10", "--test-per-source", "5")
    dataset.prepare(config)
    write_rows(path, 30, seed=1)
    with pytest.raises(UserError, match=r"other inputs \(source\)"):
        dataset.prepare(config)


def test_an_edited_split_is_noticed(tiny: Make) -> None:
    config = tiny("--train-per-source", "10", "--test-per-source", "5")
    dataset.prepare(config)
    with (config.data_path / "test.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(UserError, match="was changed since it was built"):
        dataset.rows(config, "test")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"instruction": "a", "output": ""}], r"no usable rows in .* \(dropped: 1 empty reply\)"),
        ([], r"no usable rows in .* \(dropped: —\)"),
        ([{"instruction": "a", "output": "b"}], r"1 usable rows in .*, fewer than 10 train \+ 5 test"),
    ],
)
def test_a_failed_build_leaves_what_was_there(tiny: Make, tmp_path: Path, rows: list[dict[str, str]], message: str) -> None:
    good = tiny("--train-per-source", "10", "--test-per-source", "5")
    dataset.prepare(good)
    before = (good.data_path / "manifest.json").read_bytes()
    (tmp_path / "bad.json").write_text(json.dumps(rows))
    bad = tiny("--source", f"alpaca={tmp_path / 'bad.json'}", "--train-per-source", "10", "--test-per-source", "5")
    with pytest.raises(UserError, match=message):
        dataset.prepare(bad, overwrite=True)
    assert (good.data_path / "manifest.json").read_bytes() == before


def test_a_source_named_twice_is_an_error(tiny: Make, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.json", 30)
    with pytest.raises(UserError, match="named twice"):
        dataset.prepare(tiny("--source", f"alpaca={path}", "--source", "alpaca=builtin"))


def test_percentiles_are_nearest_rank() -> None:
    assert dataset.percentiles(list(range(1, 101))) == {"p5": 5, "p25": 25, "p50": 50, "p75": 75, "p95": 95, "p99": 99, "p100": 100}
    assert set(dataset.percentiles([7]).values()) == {7}
