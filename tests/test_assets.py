"""The built-in sample data and tokenizer are what their script makes (the model takes 20 minutes: make assets)."""

from __future__ import annotations

import json
from pathlib import Path

from kit.assets import compose, make
from kit.sources import SOURCES


def test_the_sample_data_is_what_the_script_makes(tmp_path: Path) -> None:
    make.write_data(tmp_path)
    names = sorted({s.sample for s in SOURCES.values()})
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    for name in names:
        assert (tmp_path / name).read_bytes() == (make.HERE / "data" / name).read_bytes()


def test_the_tokenizer_is_what_the_script_makes(tmp_path: Path) -> None:
    make.make_tokenizer(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text()) == json.loads((make.HERE / "model" / "tokenizer.json").read_text())


def test_half_of_the_skills_are_left_to_fine_tuning() -> None:
    assert set(compose.WARM) < set(compose.SKILLS)
    assert 2 * len(compose.WARM) == len(compose.SKILLS)


def test_any_text_survives_the_tokenizer(tokenizer) -> None:
    for text in ("漢字 and emoji 🙂\ttabs\n\n\nlines", "  two  spaces ", "a\u2028b\x00c"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
