"""Benches: variants take turns, ratios are of pairs, and what they compare is really run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import config, script

from kit.bench import BENCHES, OF_METHODS, ROUNDS, harness
from kit.bench.harness import interleave, measure, peak_alone, summary
from kit.config import RunConfig

Make = Callable[..., RunConfig]


def test_variants_take_turns_and_the_first_round_is_left_out() -> None:
    calls: list[str] = []
    times, peaks = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert "".join(calls) == "ab" * 4
    assert {name: len(t) for name, t in times.items()} == {"a": 3, "b": 3}
    assert peaks == {"a": None, "b": None}
    calls.clear()
    times, _ = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2, now=iter(range(12)).__next__, turning=True)
    assert ("".join(calls), times) == ("baabba", {"a": [1, 1], "b": [1, 1]})


def test_a_ratio_is_the_median_of_the_pairs() -> None:
    """A machine that slows down in the last round moves the medians, but not the ratio."""
    found = summary("x", {"a": [2.0, 2.0, 20.0], "b": [1.0, 1.0, 10.0]}, {"a": 1.0}, [("a", "b")])
    assert found["ratios"] == {"a/b": 2.0}
    assert found["variants"]["a"] == {"median_s": 2.0, "iqr_s": 18.0, "peak_memory_gib": 1.0, "n": 3}
    assert found["versions"]["torch"]


def test_every_bench_has_its_rounds_and_its_place_in_the_help() -> None:
    assert ROUNDS.keys() == BENCHES.keys()
    assert set(OF_METHODS) <= BENCHES.keys()
    help_text = script("bench", "--help").stdout
    assert all(f"\n{name:<10}" in help_text for name in BENCHES)


def hungry(_: RunConfig, rounds: int) -> dict[str, Any]:
    """A variant that takes 300 MB and one that takes nothing."""
    held: list[bytearray] = []
    times, peaks = interleave({"large": lambda: held.append(bytearray(b"x") * 300_000_000), "small": lambda: held.clear()}, rounds)
    return summary("hungry", times, peaks, [("large", "small")])


def test_one_variant_alone_keeps_out_what_the_others_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "ALONE", [])
    monkeypatch.setitem(BENCHES, "hungry", hungry)
    peaks = {}
    for name in ("large", "small"):
        harness.ALONE[:] = [name]
        found = hungry(config(), 1)
        assert (list(found["variants"]), found["ratios"]) == ([name], {})
        peaks[name] = found["variants"][name]["peak_memory_gib"]
    assert peaks["large"] - peaks["small"] > 0.25


def test_memory_is_measured_in_a_new_process() -> None:
    """This process holds what a new one must not count."""
    ballast = bytearray(b"x") * 1_500_000_000
    peak = peak_alone("startup", config(), "make help")
    assert len(ballast) == 1_500_000_000
    assert peak is not None
    assert 0 < peak < 1


def test_measured_with_date_and_command(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setitem(BENCHES, "hungry", hungry)
    monkeypatch.setattr(harness, "peak_alone", lambda what, _, name: asked.append((what, name)) or 1.5)
    found = measure("hungry", config(), 1, ["hungry", "--name", "a b"])
    assert asked == [("hungry", "large"), ("hungry", "small")]
    assert {v["peak_memory_gib"] for v in found["variants"].values()} == {1.5}
    assert found["command"] == "python scripts/bench.py hungry --name 'a b'"
    assert found["date"].startswith("20")
    assert found["machine"]["threads"] >= 1


def test_the_script_writes_what_it_measured(tmp_path: Path) -> None:
    done = script("bench", "startup", "--recipe", "tiny", "--rounds", "1", "--json", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["what"], set(found["variants"])) == ("startup", {"train --help", "report --help", "wrong flag", "make help"})
    assert all(0 < v["peak_memory_gib"] < 1 for v in found["variants"].values())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "say which bench: data, dora, generate, metrics, report, scaling, startup, train"),
        (["dorra"], "unknown bench 'dorra'; did you mean 'dora'?"),
        (["dora", "--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["metrics", "--model-config", "gemma-3-1b"], "--model-config is for train and scaling"),
        (["train", "--model-config", "gemma-3-1"], "unknown model config 'gemma-3-1'; did you mean 'gemma-3-1b'?"),
        (["train", "--only", "NF4"], "--only is for dora"),
        (["train", "--layers", "0"], "--layers must be at least 1 and goes with --model-config"),
        (
            ["data", "--source", "alpaca=tatsu-lab/alpaca"],
            "the data bench reads files, not the hub: give --source NAME=FILE instead of alpaca=tatsu-lab/alpaca",
        ),
    ],
)
def test_user_errors(flags: list[str], message: str) -> None:
    done = script("bench", *flags, "--recipe", "tiny")
    assert (done.returncode, done.stderr) == (2, f"error: {message}\n")


def test_the_data_bench_makes_the_same_tokens_of_the_same_rows() -> None:
    """What is compared is equal: the kit's mask, known by construction, and the one a chat template's generation tags give."""
    found = BENCHES["data"](config("--train-per-source", "20", "--test-per-source", "10", "--valid-per-source", "0"), 1)["variants"]
    assert found["kit"]["rows"] == found["plain"]["rows"] == found["kit stage"]["rows"] == 2700
    assert found["kit"]["supervised"] == found["plain"]["supervised"] > 60_000
