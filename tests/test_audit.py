"""The audit's parts: percentiles, scripts, groups."""

from __future__ import annotations

import numpy as np
import pytest

from kit import audit


def test_percentiles_are_nearest_rank() -> None:
    assert audit.percentiles(list(range(1, 101))) == {"p5": 5, "p25": 25, "p50": 50, "p75": 75, "p95": 95, "p99": 99, "p100": 100}
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


def test_the_kits_label_of_an_input_is_no_difference() -> None:
    labelled = row("Find the place.\n\nInput: Anna walks.", "The lake.", input="Anna walks.")
    plain = row("Find the place.\n\nAnna walks.", "The lake.")
    assert audit.prompt_hash(labelled) == audit.prompt_hash(plain)
    assert audit.shingles(labelled) == audit.shingles(plain)
    assert audit.prompt_hash(plain) != audit.prompt_hash(row("Find the place.\n\nAnna runs.", "The lake."))
