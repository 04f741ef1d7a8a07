"""Benches: variants take turns, ratios are of pairs, and what they compare is really run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import config, script

from kit import bench
from kit.bench import interleave, summary


def test_variants_take_turns_and_the_first_round_is_left_out() -> None:
    calls: list[str] = []
    times, peaks = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert "".join(calls) == "ab" * 4
    assert {name: len(t) for name, t in times.items()} == {"a": 3, "b": 3}
    assert peaks.keys() == times.keys()


def test_a_ratio_is_the_median_of_the_pairs() -> None:
    """A machine that slows down in the last round moves the medians, but not the ratio."""
    found = summary("x", {"a": [2.0, 2.0, 20.0], "b": [1.0, 1.0, 10.0]}, {"a": 1.0}, [("a", "b")])
    assert found["ratios"] == {"a/b": 2.0}
    assert found["variants"]["a"] == {"median_s": 2.0, "iqr_s": 18.0, "peak_memory_gib": 1.0, "n": 3}
    assert found["versions"]["torch"]


def test_the_script_writes_what_it_measured(tmp_path: Path) -> None:
    done = script("bench", "startup", "--recipe", "tiny", "--rounds", "1", "--json", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["what"], set(found["variants"])) == ("startup", {"--help", "wrong flag", "make help"})


@pytest.mark.parametrize(
    ("flags", "message"), [(["dorra"], "unknown bench 'dorra'; did you mean 'dora'?"), (["dora", "--rounds", "0"], "--rounds must be at least 1, got 0")]
)
def test_user_errors(flags: list[str], message: str) -> None:
    done = script("bench", *flags, "--recipe", "tiny")
    assert (done.returncode, done.stderr) == (2, f"error: {message}\n")


def test_the_dora_bench_compares_the_same_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "WIDE", bench.WIDE | {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "query_pre_attn_scalar": 16})
    found = bench.dora(config("--rank", "4"), 1)
    assert set(found["ratios"]) == {f"{p} {n}/{p} lora" for p in ("train", "generate") for n in ("dora-kit", "dora-peft")}
