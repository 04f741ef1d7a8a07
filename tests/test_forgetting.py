"""Forgetting: perplexity and KL against a plain computation, texts of every kind, and what is said when it cannot be measured."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from hub_server import Hub, Repo

from kit import dataset, forgetting
from kit.config import RunConfig, load_recipe, recipes
from kit.errors import UserError
from kit.forgetting import HUB, LENGTH, TOKENS, Text, chunks, divergences, load, measure, measured, overlap
from kit.preflight import possible
from kit.prompts import Renderer

Make = Callable[..., RunConfig]
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any, Any]:
    """The built-in model, the same with a changed adapter, and its renderer."""
    import torch
    from conftest import config

    from kit.model import attach, load_base

    run = config("--method", "lora")
    base, tokenizer, _ = load_base(run)
    tuned = attach(load_base(run)[0], run)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.02)
    return base.eval(), tuned.eval(), Renderer(tokenizer, "chat", 256)


def plain(model: Any, exam: Any) -> Any:
    """Log-probabilities [tokens, vocabulary] of one chunk by itself, in float64."""
    import torch

    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*exam.prompt_ids, *exam.reference_ids]])).logits[0]
    return logits[len(exam.prompt_ids) - 1 : -1].double().log_softmax(-1)


@pytest.mark.slow
@pytest.mark.parametrize("logits", [None, 965 * 40])
def test_sums_equal_a_plain_computation_in_batches_and_alone(models: Any, monkeypatch: pytest.MonkeyPatch, logits: int | None) -> None:
    import torch

    base, tuned, renderer = models
    exams = chunks(renderer, Text("x", "", ["Anna walks by the river. " * n for n in (1, 9, 2, 40, 3)]))
    if logits:  # smaller than one chunk: every chunk by itself
        monkeypatch.setattr(forgetting, "LOGITS", logits)
    found = divergences(tuned, base, exams, 0)
    expected = []
    for exam in sorted(exams, key=lambda e: -len(e.reference_ids)):
        p, q, ids = plain(base, exam), plain(tuned, exam), torch.tensor(exam.reference_ids)[:, None]
        expected.append([-float(q.gather(1, ids).sum()), -float(p.gather(1, ids).sum()), float((p.exp() * (p - q)).sum()), len(ids)])
    assert found == pytest.approx(torch.tensor(expected).numpy(), rel=1e-4, abs=1e-5)
    assert (found[:, 2] > 0).all()
    assert (found[:, 0] != found[:, 1]).all()
    same = divergences(base, base, exams, 0)
    assert abs(same[:, 2]).max() < 1e-6
    assert (same[:, 0] == same[:, 1]).all()


@pytest.mark.slow
def test_out_of_memory_with_two_models_leaves_the_perplexity_and_the_reason(models: Any, tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned, renderer = models
    run = tiny("--method", "lora")
    text = load(run)[0]
    assert text is not None
    exams, calls = chunks(renderer, text)[:8], []
    monkeypatch.setattr("kit.forgetting.load_trained", lambda config: (base, None, calls.append(config.method)))
    whole, reason = measure(run, tuned, text, exams, 0)
    assert (calls, reason) == (["base"], None)
    assert whole is not None
    assert 0 <= whole["kl"]["low"] < whole["kl"]["value"] < whole["kl"]["high"]
    assert whole["overlap"] == overlap(text, dataset.rows(run, "train"))
    compute = divergences

    def crowded(model: Any, other: Any, *rest: Any) -> Any:
        if other is not None:
            raise MemoryError
        return compute(model, other, *rest)

    monkeypatch.setattr(forgetting, "divergences", crowded)
    assert measure(run, tuned, text, exams, 0) == (whole | {"kl": None, "perplexity_before": None}, "out of memory with both models")

    def never(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(forgetting, "divergences", never)
    assert measure(run, tuned, text, exams, 0) == (None, "out of memory")


def test_the_built_in_text_is_always_the_same_and_holds_no_task(tiny: Make) -> None:
    first, second = (load(tiny())[0] for _ in range(2))
    assert first == second
    assert first is not None
    assert first.sha256 == "2a1d97e664b2f892b39d65dcb0174324743cd247e12f93b48c12de0a7bf061dc"
    assert not [d for d in first.documents if "Task:" in d]


def test_chunks_hold_every_token_once(tokenizer: Any, gpt2_tokenizer: Any) -> None:
    text = Text("x", "", ["word " * 700, "", "one two", "<end_of_turn>"])
    made = chunks(Renderer(tokenizer, "chat", 1024), text)
    assert all(e.prompt_ids == [2] and 0 < len(e.reference_ids) <= LENGTH for e in made)
    assert [i for e in made for i in e.reference_ids] == [
        i for d in text.documents for i in tokenizer(d, add_special_tokens=False, split_special_tokens=True).input_ids
    ]
    # Without a beginning-of-text token the first token of a chunk is given.
    made = chunks(Renderer(gpt2_tokenizer, "alpaca", 1024), text)
    assert [i for e in made for i in [*e.prompt_ids, *e.reference_ids]] == [i for d in text.documents for i in gpt2_tokenizer(d).input_ids]
    assert all(e.reference_ids for e in chunks(Renderer(gpt2_tokenizer, "alpaca", 1024), Text("x", "", ["a", "word " * 700])))
    many = chunks(Renderer(tokenizer, "chat", 1024), Text("x", "", ["word " * 2 * TOKENS, "lake " * TOKENS]))
    assert 0.4 * TOKENS < sum(len(e.reference_ids) for e in many) <= TOKENS
    assert "lake" in tokenizer.decode(many[-1].reference_ids)  # of all the text
    assert max(len(e.prompt_ids) + len(e.reference_ids) for e in chunks(Renderer(tokenizer, "chat", 64), text)) == 64
    with pytest.raises(UserError, match=r"--forgetting-text x has \d+ tokens; an interval takes at least 2 chunks of 255"):
        chunks(Renderer(tokenizer, "chat", 1024), Text("x", "", ["short"]))


def test_own_texts(tiny: Make, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A text\nof two lines.", encoding="utf-8")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write('{"text": "one"}\n{"text": "two"}\n')
    made = {name: load(tiny("--forgetting-text", str(tmp_path / name))) for name in ("a.txt", "b.jsonl.gz")}
    assert made["a.txt"][0] is not None
    assert (made["a.txt"][0].name, made["a.txt"][0].documents) == ("a.txt", ["A text\nof two lines."])
    assert made["b.jsonl.gz"][0] is not None
    assert made["b.jsonl.gz"][0].documents == ["one", "two"]
    assert load(tiny("--forgetting-text", "none")) == (None, "turned off")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.txt", b"caf\xe9", "c.txt, byte 4: not valid UTF-8"),
        ("c.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "c.jsonl, row 2: expected a text under the key text"),
        ("c.jsonl", b'{"text": "a"}\n{"text"\n', "c.jsonl, line 2: not valid JSON"),
        ("c.md", b"x", "c.md: unknown format"),
        ("c.jsonl", b"", "c.jsonl: the file is empty"),
        ("wikitxt", None, "--forgetting-text: no such file: .*wikitxt; give a .txt, a .jsonl with a text a row, or one of builtin, wikitext, none"),
    ],
)
def test_a_text_that_cannot_be_used_is_one_line(tiny: Make, tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load(tiny("--forgetting-text", str(path)))


def test_a_text_that_is_not_there_is_missed_before_the_training(tiny: Make) -> None:
    with pytest.raises(UserError, match=r"--forgetting-text: no such file: gone\.txt"):
        possible(tiny("--forgetting-text", "gone.txt"))


def test_measured_means_the_same_text(tiny: Make, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("text", encoding="utf-8")
    own, off, built_in = (tiny("--forgetting-text", t) for t in (str(path), "none", "builtin"))
    text = load(own)[0]
    assert text is not None
    record = {"forgetting": {"text": "a.txt", "sha256": text.sha256}}
    assert measured(record, own)
    assert measured(record, off)
    assert not measured(record, built_in)
    assert measured({"forgetting": {"text": HUB["wikitext"].name}}, tiny("--forgetting-text", "wikitext"))
    assert measured({"forgetting": None}, off)
    assert not measured({}, own)
    path.write_text("another", encoding="utf-8")
    assert not measured(record, own)


def row(*turns: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": turn} for turn in turns]}


def test_the_share_of_a_text_that_the_training_rows_hold_is_counted() -> None:
    first, second = "One two three four five six seven eight nine.", "a b c d e f g h"
    rows = [row("Say it.", f"He said:\nONE two  three four five six seven eight {second.upper()}"), row("other words")]
    assert overlap(Text("x", "", [first]), rows) == 0.5
    assert overlap(Text("x", "", [first, second, first]), rows) == pytest.approx(2 / 3)
    assert overlap(Text("x", "", ["nothing of this is in any of the rows"]), rows) == 0
    assert overlap(Text("x", "", [f"{second}\n{second}"]), rows) == 1, "lines are looked for one by one"
    assert overlap(Text("x", "", ["a b c d\ne f g h"]), rows) == 1, "short ones together"
    assert overlap(Text("x", "", ["too short", ""]), rows) is None


def test_a_text_of_training_rows_is_known_as_such(ready: Make, tmp_path: Path) -> None:
    run = ready()
    rows = dataset.rows(run, "train")
    path = tmp_path / "general.jsonl"
    path.write_text("".join(json.dumps({"text": r["messages"][-1]["content"]}) + "\n" for r in rows[:200]))
    own, built_in = load(ready("--forgetting-text", str(path)))[0], load(run)[0]
    assert own is not None
    assert built_in is not None
    assert overlap(own, rows) == 1
    # Both are of the built-in world, but for what the model was pretrained on other sentences are made.
    assert 0.1 < (overlap(built_in, rows) or 0) < 0.3


def test_hub_models_are_measured_on_the_hub_text() -> None:
    found = {name: load_recipe(name)["forgetting_text"] for name in recipes()}
    assert found == dict.fromkeys(recipes(), "wikitext") | {"tiny": "builtin"}


HUB_TEXT = """
import sys
from kit.config import RunConfig
from kit.forgetting import load
print(load(RunConfig(forgetting_text="wikitext")))
"""


def from_hub(endpoint: str, cache: Path) -> str:
    env = {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_TOKEN": "", "NO_PROXY": "127.0.0.1", "HF_HUB_ETAG_TIMEOUT": "2", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", HUB_TEXT], env=env, capture_output=True, text=True, check=True, timeout=120).stdout


def test_the_hub_text_is_fetched_once_and_a_hub_out_of_reach_is_said(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": [" = A = \n", "", " It is .\n"]}), tmp_path / "t.parquet")
    hub = HUB["wikitext"]
    server = Hub({hub.dataset: Repo({hub.file: (tmp_path / "t.parquet").read_bytes()})})
    try:
        made = from_hub(server.endpoint, tmp_path / "hf")
        assert json.dumps(hub.name)[1:-1] in made
        assert r"documents=[' = A = \n It is .\n']" in made
    finally:
        server.shutdown()
        server.server_close()
    failed = from_hub(NOWHERE, tmp_path / "empty")
    reason = f"dataset {hub.dataset} is not in the local cache and the hub cannot be reached"
    assert f"forgetting is not measured: {reason}; the same command tries again" in failed
    assert f"(None, '{reason}')" in failed
