"""The audit's parts: percentiles, scripts, groups."""

from __future__ import annotations

import numpy as np
import pytest

from kit import audit


def test_percentiles_are_nearest_rank() -> None:
    assert audit.percentiles(list(range(1, 101))) == {"p5": 5, "p25": 25, "p50": 50, "p75": 75, "p95": 95, "p99": 99, "p100": 100}
    assert audit.percentiles(list(range(1, 11)))["p25"] == 3
    assert set(audit.percentiles([7]).values()) == {7}


@pytest.mark.parametrize(("text", "name"), [("hello", "LATIN"), ("привет", "CYRILLIC"), ("漢字", "CJK"), ("123 !", "none"), ("", "none")])
def test_scripts_are_named_as_in_unicode(text: str, name: str) -> None:
    assert audit.script(text) == name


def test_similarity_is_estimated_as_the_jaccard_index() -> None:
    words = [f"w{i}" for i in range(1000)]
    sketches = audit.Sketches()
    for text in (words, words[:900], words[500:] + [f"x{i}" for i in range(500)]):
        sketches.add({"messages": [{"content": " ".join(text)}]})
    made = sketches.matrix()
    assert made.shape == (3, audit.PERMUTATIONS)
    # 898 of 998 3-grams are shared; then 498 of 1498.
    assert (made[0] == made[1]).mean() == pytest.approx(898 / 998, abs=0.1)
    assert (made[0] == made[2]).mean() == pytest.approx(498 / 1498, abs=0.15)


def test_groups_are_chains_and_carry_their_lowest_row() -> None:
    rng = np.random.default_rng(0)
    signatures = rng.integers(0, 2**32, (6, audit.PERMUTATIONS), dtype=np.uint32)
    signatures[3] = signatures[1]
    signatures[3, :10] += 1  # 90% alike
    signatures[5] = signatures[3]
    signatures[5, 50:62] += 1  # alike to 3, less to 1
    prompts = [bytes([i]) * 16 for i in (1, 2, 3, 4, 1, 6)]
    assert audit.groups(signatures, prompts).tolist() == [0, 1, 2, 1, 0, 1]


def test_rows_are_compared_with_their_buckets_first_too() -> None:
    """The first and the last agree in one whole band alone, where another row stands between them, and yet in 81 of 96 permutations."""
    signatures = np.random.default_rng(1).integers(0, 2**32, (3, audit.PERMUTATIONS), dtype=np.uint32)
    signatures[2] = signatures[0]
    signatures[2, 6::6] += 1
    signatures[1, :6] = signatures[0, :6]
    assert audit.groups(signatures, [bytes([i]) * 16 for i in range(3)]).tolist() == [0, 1, 0]


def test_no_rows_no_groups() -> None:
    assert audit.Sketches().matrix().shape == (0, audit.PERMUTATIONS)


def row(prompt: str, reply: str, **more: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}], **more}


def test_text_without_spaces_is_compared_by_characters() -> None:
    text = "湖边的老房子里住着一位画家他每天早上都去山上散步然后回家画画直到天黑"
    sketches = audit.Sketches()
    for reply in (text, text + "。", text[::-1]):
        sketches.add(row("写一句话", reply))
    assert audit.groups(sketches.matrix(), [b"1" * 16, b"2" * 16, b"3" * 16]).tolist() == [0, 0, 2]


def test_what_a_few_rows_share_is_not_common_to_all() -> None:
    sketches = audit.Sketches()
    shared = " ".join(f"w{i}" for i in range(100))
    for i in range(12):
        sketches.add(row(f"Task {i}", f"{shared} end {i}" if i < 3 else " ".join(f"{i}x{j}" for j in range(100))))
    assert audit.groups(sketches.matrix(), [bytes([i]) * 16 for i in range(1, 13)]).tolist() == [0, 0, 0, *range(3, 12)]


def test_rows_that_have_only_what_is_common_keep_it() -> None:
    sketches = audit.Sketches()
    for i in range(30):
        sketches.add(row("Go", " ".join(f"{'ab'[i % 2]}{j}" for j in range(50))))
    made = sketches.matrix()
    assert (made[0] == made[2]).all()
    assert (made[0] == made[1]).mean() < 0.5


def test_rows_are_sketched_alike_in_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for batch in (100, 4):
        monkeypatch.setattr(audit, "BATCH", batch)
        sketches = audit.Sketches()
        for i in range(10):
            sketches.add(row(f"Task {i}", f"Answer number {i}"))
        made.append(sketches.matrix())
    assert (made[0] == made[1]).all()


def test_leaks_are_looked_for_in_the_training_rows() -> None:
    one, other, valid, new = (row(prompt, "x", id=prompt[0]) for prompt in ("a question", "b question", "c question", "d question"))
    test = [row("A  Question", "y", id="1"), row("B question", "y", id="2"), row("c question", "y", id="3"), new]
    found = audit.leaks({"train": [one, other, one], "valid": [valid], "test": test})
    assert found["same_prompt"] == {"test_rows": 2, "test_ids": ["1", "2"], "train_rows": [0, 1], "examples": [["1", "a"], ["2", "b"]]}
    assert found["same_opening"]["test_ids"] == ["2"]


def test_exchanges_are_counted() -> None:
    talk = row("a", "b", source="s")
    found = audit.statistics([talk, talk | {"messages": talk["messages"] * 2}], [3, 5], [1, 2], ["whole", "whole"])
    assert found["exchanges"] == {"1": 1, "2": 1}


def test_the_kits_label_of_an_input_is_no_difference() -> None:
    labelled = row("Find the place.\n\nInput: Anna walks.", "The lake.", input="Anna walks.")
    plain = row("Find the place.\n\nAnna walks.", "The lake.")
    assert audit.prompt_hash(labelled) == audit.prompt_hash(plain)
    assert audit.shingles(labelled) == audit.shingles(plain)
    assert audit.prompt_hash(plain) != audit.prompt_hash(row("Find the place.\n\nAnna runs.", "The lake."))
