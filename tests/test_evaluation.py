"""Scores that can be trusted: rescoring without a model, damaged and foreign predictions, the leak audit, and evaluations that were killed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, config, places

from kit import dataset, evaluation, runs, scoring
from kit.config import RunConfig
from kit.errors import UserError
from kit.evaluation import evaluate
from kit.files import read_json, read_jsonl, sha256, write_json, write_jsonl
from kit.metrics import METRICS, Metric, ratio, scores
from kit.prompts import FIXED_PROMPTS

Make = Callable[..., RunConfig]
SMALL = ("--limit-test", "9", "--train-per-source", "60", "--test-per-source", "10", "--valid-per-source", "0")
DECODING = ("--max-new-tokens", "8", "--eval-tokens", "250")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    dataset.prepare(config(*places(folder), *SMALL))
    return folder


@pytest.fixture
def make(built: Path, tmp_path: Path) -> Make:
    shutil.copytree(built / "data", tmp_path / "data")
    return lambda *flags: config(*places(tmp_path), *SMALL, *DECODING, *flags)


def answered(base: RunConfig) -> Path:
    """A run whose replies are the references but for their last word, as evaluate() leaves it; its generation record is made up."""
    rows = dataset.rows(base, "test")
    made = [scoring.asked(r) | {"reply_tokens": 3, "finished": True, "nll": 2.5, "nll_tokens": 4} for r in rows]
    made = [m | {"prediction": m["reference"].rpartition(" ")[0]} for m in made]
    folder = runs.open_run(base)
    write_jsonl(folder / "predictions.jsonl", made)
    record = scoring.summary(made, dataset.prepare(base)) | {
        "predictions_sha256": sha256(folder / "predictions.jsonl"), "generation": scoring.reply_counts(made) | {"wall_s": 7.0},
        "forgetting": {"text": "builtin", "perplexity": {"value": 2.0, "low": 1.0, "high": 3.0}, "kl": None, "perplexity_before": None},
        "forgetting_reason": None, "phases": {"generation": {"wall_s": 7.0}}, "gates": {}, "provenance": {"data": dataset.manifest_hash(base)},
    }  # fmt: skip
    write_json(folder / "eval.json", record)
    return folder


def rewrite(folder: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    rows = list(read_jsonl(folder / "predictions.jsonl"))
    change(rows)
    write_jsonl(folder / "predictions.jsonl", rows)


RESCORE = """
import runpy, sys
sys.argv = ["scripts/eval.py", *sys.argv[1:], "--rescore"]
try:
    runpy.run_path("scripts/eval.py", run_name="__main__")
except SystemExit as stop:
    assert stop.code == 0
print([m for m in ("torch", "unsloth", "transformers") if m in sys.modules])
"""


def test_rescoring_loads_no_model_and_gives_the_same_record(make: Make) -> None:
    base = make("--method", "base")
    folder = answered(base)
    whole = (folder / "eval.json").read_bytes()
    write_json(folder / "eval.json", read_json(folder / "eval.json") | {"all": {}, "per_source": {}, "leaks": None})
    flags = ("--data-dir", base.data_dir, "--report-dir", base.report_dir)
    done = subprocess.run([sys.executable, "-c", RESCORE, str(folder), *flags], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "is not the file that was scored" not in done.stdout
    assert json.loads(whole) == read_json(folder / "eval.json")


def test_an_edited_prediction_changes_the_scores_and_is_said(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    base = make("--method", "base")
    folder = answered(base)
    before = read_json(folder / "eval.json")
    rewrite(folder, lambda rows: rows[0].update(prediction="", finished=False))
    after = scoring.rescore(base)
    assert "is not the file that was scored before" in capsys.readouterr().out
    assert after["all"]["rouge_l"]["value"] < before["all"]["rouge_l"]["value"]
    assert (after["generation"]["empty"], after["generation"]["unfinished"]) == (1, 1)
    kept = ("generation", "forgetting", "phases", "gates", "provenance")
    assert {k: after[k] for k in kept[1:]} == {k: before[k] for k in kept[1:]}
    assert after["generation"]["wall_s"] == 7.0
    assert after == read_json(folder / "eval.json")
    assert after["predictions_sha256"] == sha256(folder / "predictions.jsonl") != before["predictions_sha256"]


def test_other_tokens_score_anew_and_stay(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    base = make("--method", "base")
    folder = answered(base)
    before = read_json(folder / "eval.json")
    other = make("--method", "base", "--score-tokens", "char")
    after = evaluate(other)
    assert "was not scored by char tokens, and is now" in capsys.readouterr().out
    assert after == read_json(folder / "eval.json")
    assert (before["score_tokens"], after["score_tokens"]) == ("13a", "char")
    assert after["all"]["bleu4"]["value"] != before["all"]["bleu4"]["value"]
    assert after["generation"] == before["generation"]
    for again in (lambda: evaluate(base), lambda: scoring.rescore(base), lambda: evaluate(other)):  # nobody asked for others
        assert again()["all"] == after["all"]
    assert scoring.rescore(make("--method", "base", "--score-tokens", "13a"))["all"] == before["all"]


def test_replies_that_are_gone_are_made_again(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    base = make("--method", "base", "--forgetting-text", "none")
    folder = answered(base)
    (folder / "predictions.jsonl").unlink()
    record = evaluate(base)
    assert "predictions.jsonl is gone: evaluating again" in capsys.readouterr().out
    assert record["predictions_sha256"] == sha256(folder / "predictions.jsonl")


def test_a_run_that_is_not_trained_to_its_end_is_not_scored(make: Make) -> None:
    lora = make("--method", "lora")
    folder = answered(lora)
    for record in (None, {"status": "cancelled"}):
        if record:
            write_json(folder / "train.json", record)
        for stage in (evaluate, scoring.rescore):
            with pytest.raises(UserError, match=r"is not trained yet; run: python scripts/train\.py"):
                stage(lora)
    write_json(folder / "train.json", {"status": "done", "provenance": {"data": "of before"}})
    with pytest.raises(UserError, match=r"train\.json comes from other data than .* holds now"):
        scoring.rescore(lora)


def test_a_run_that_is_not_there_has_no_data_built_for_it(tiny: Make) -> None:
    """Of a name that was mistyped."""
    lora = tiny("--method", "lora")
    with pytest.raises(UserError, match="is not trained yet"):
        evaluate(lora)
    assert not lora.data_path.exists()


def test_the_order_of_the_predictions_changes_no_score(make: Make) -> None:
    base = make("--method", "base")
    folder = answered(base)
    before = read_json(folder / "eval.json")
    rewrite(folder, lambda rows: rows.reverse())
    assert scoring.rescore(base)["all"] == before["all"]


def test_the_last_reply_of_a_conversation_is_the_reference() -> None:
    messages = [{"role": r, "content": t} for r, t in (("user", "Hi"), ("assistant", "Hello."), ("user", "And?"), ("assistant", "Bye."))]
    asked = scoring.asked({"id": "x", "source": "s", "messages": messages})
    assert asked == {"id": "x", "source": "s", "prompt": "User: Hi\n\nAssistant: Hello.\n\nUser: And?", "reference": "Bye."}


BAD = {
    "of other data": (lambda rows: rows[1].update(id="alpaca-0"), "row 2: alpaca-0 is no row of this test set"),
    "another reference": (lambda rows: rows[1].update(reference="x"), r"row 2: its reference differs from test row \S+; restore the file"),
    "another prompt": (lambda rows: rows[0].update(prompt="x", source="y"), "row 1: its source and prompt differ from test row"),
    "no reference": (lambda rows: rows[2].pop("reference"), "row 3: reference is missing"),
    "empty reference": (lambda rows: rows[2].update(reference=""), "row 3: its reference is empty"),
    "null": (lambda rows: rows[0].update(prediction=None), "row 1: prediction is missing"),
    "wrong kind": (lambda rows: rows[0].update(nll="2"), r"row 1: nll is of the wrong kind \(str\)"),
    "no boolean": (lambda rows: rows[0].update(reply_tokens=True), r"row 1: reply_tokens is of the wrong kind \(bool\)"),
    "no tokens": (lambda rows: rows[0].update(nll_tokens=0), "row 1: nll_tokens must be above 0, found 0"),
    "no id": (lambda rows: rows[0].pop("id"), "row 1: id is missing"),
    "twice": (lambda rows: rows.append(rows[0]), "row 10: it answers a row for the second time"),
    "missing": (lambda rows: rows.pop(), r"lacks 1 of 9 test rows \("),
    "all missing": (lambda rows: rows.clear(), "lacks 9 of 9 test rows"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_predictions_that_cannot_be_scored_are_one_line_and_change_nothing(make: Make, name: str) -> None:
    base = make("--method", "base")
    folder = answered(base)
    before = (folder / "eval.json").read_bytes()
    change, message = BAD[name]
    rewrite(folder, change)
    with pytest.raises(UserError, match=message) as error:
        scoring.rescore(base)
    assert len(error.value.problems) == 1
    assert (folder / "eval.json").read_bytes() == before


def test_a_torn_or_missing_file_is_one_line(make: Make) -> None:
    base = make("--method", "base")
    path = answered(base) / "predictions.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="line 9: not valid JSON"):
        scoring.rescore(base)
    path.unlink()
    with pytest.raises(UserError, match="jsonl is missing"):
        scoring.rescore(base)
    (path.parent / "eval.json").unlink()
    with pytest.raises(UserError, match=r"is not evaluated yet; run: python scripts/eval\.py --method base"):
        scoring.rescore(base)
    shutil.rmtree(base.data_path)
    with pytest.raises(UserError, match="is not there, and predictions are scored against their data"):
        scoring.rescore(base)


def test_only_empty_and_undefined_answers_give_no_nan(make: Make) -> None:
    base = make("--method", "base")
    folder = answered(base)
    rewrite(folder, lambda rows: [row.update(prediction="", reply_tokens=0, nll=float("nan")) for row in rows])
    record = scoring.rescore(base)
    assert "NaN" not in (folder / "eval.json").read_text(encoding="utf-8")
    assert record["all"]["bleu4"]["value"] == record["all"]["rouge_l"]["value"] == record["all"]["length_ratio"]["value"] == 0
    assert record["all"]["perplexity"]["value"] is record["all"]["distinct_1"]["value"] is None
    assert record["generation"] == {"empty": 9, "unfinished": 0, "mean_reply_tokens": 0, "wall_s": 7.0}


def test_every_metric_is_there_for_all_rows_each_source_and_the_unflagged(make: Make) -> None:
    base = make("--method", "base")
    rows = list(read_jsonl(answered(base) / "predictions.jsonl"))
    flagged = [rows[0]["id"], rows[3]["id"]]
    manifest = {"leaks": {"same_prompt": {"test_ids": [flagged[0], "not-evaluated"]}, "same_opening": {"test_ids": flagged}}}
    found = scoring.summary(rows, manifest)
    assert found["leaks"] == {"flagged": 2, "ids": flagged, "trained_on": None, "without": scores([r for r in rows if r["id"] not in flagged])}
    assert found["leaks"]["without"]["bleu4"]["n"] == 7
    assert scoring.summary(rows, manifest, "char")["leaks"]["without"] == scores([r for r in rows if r["id"] not in flagged], "char")
    for block in (found["all"], found["leaks"]["without"], *found["per_source"].values()):
        assert set(block) == set(METRICS)
        assert all(score["signature"] for score in block.values())


def test_a_new_metric_is_one_entry(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(read_jsonl(answered(make("--method", "base")) / "predictions.jsonl"))
    words = Metric("Words", None, lambda rs: np.array([[len(r["prediction"].split()), 1.0] for r in rs]), ratio, lambda: "mean words", show=lambda x: x)
    monkeypatch.setitem(METRICS, "words", words)
    found = scoring.summary(rows, {"leaks": {"same_prompt": {"test_ids": [rows[0]["id"]]}}})
    assert found["all"]["words"]["value"] == pytest.approx(np.mean([len(r["prediction"].split()) for r in rows]))
    assert found["all"]["words"]["signature"] == "mean words"
    assert all("words" in block for block in (found["leaks"]["without"], *found["per_source"].values()))


@pytest.mark.parametrize(("clean", "flagged"), [(9, 0), (1, 8), (0, 9)])
def test_without_flagged_or_without_the_rest_there_is_nothing_to_compare(make: Make, clean: int, flagged: int) -> None:
    rows = list(read_jsonl(answered(make("--method", "base")) / "predictions.jsonl"))
    manifest = {"leaks": {"same_prompt": {"test_ids": [r["id"] for r in rows[clean:]]}}}
    assert scoring.summary(rows, manifest)["leaks"] == {"flagged": flagged, "ids": [r["id"] for r in rows[clean:]], "trained_on": None, "without": None}


def test_what_resembles_a_training_row_that_was_not_used_is_not_flagged() -> None:
    manifest = {"leaks": {"same_prompt": {"test_ids": ["a", "b"], "train_rows": [0, 5]}, "same_opening": {"test_ids": ["b", "c"], "train_rows": [3, 4]}}}
    assert scoring.leaked(manifest, None) == {"a", "b", "c"}
    assert scoring.leaked(manifest, 4) == {"a", "b"}
    assert scoring.leaked(manifest, 3) == {"a"}
    older = {"leaks": {k: {"test_ids": v["test_ids"]} for k, v in manifest["leaks"].items()}}
    assert scoring.leaked(older, 3) == {"a", "b", "c"}


@pytest.fixture
def unloadable(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(evaluation, "load_trained", refuse)


@pytest.mark.usefixtures("unloadable")
def test_one_test_row_is_refused_before_a_model_is_loaded(make: Make) -> None:
    with pytest.raises(UserError, match="there is only 1 test row; scores with intervals take at least 2: raise --limit-test or --test-per-source"):
        evaluate(make("--method", "base", "--limit-test", "1"))


@pytest.mark.usefixtures("unloadable")
def test_the_base_is_reused_for_the_same_model_data_format_and_decoding_alone(make: Make) -> None:
    folder = answered(make("--method", "base"))
    # What only training depends on does not matter.
    assert evaluate(make("--method", "base", "--rank", "4", "--seed", "3", "--learning-rate", "1")) == read_json(folder / "eval.json")
    others = {"max_new_tokens": "9", "eval_tokens": "500", "limit_test": "8", "precision": "bfloat16", "format": "alpaca", "model": "builtin-gptneo"}
    for field, value in others.items():
        with pytest.raises(UserError, match=rf"was (made with other settings|built from other inputs) \(([^)]*, )?{field}"):
            evaluate(make("--method", "base", f"--{field.replace('_', '-')}", value))
    manifest = make().data_path / "manifest.json"
    manifest.write_text(manifest.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"eval\.json comes from other data than .* holds now"):
        evaluate(make("--method", "base"))


@pytest.mark.usefixtures("unloadable")
def test_replies_to_other_data_are_not_gone_on_with(make: Make) -> None:
    base = make("--method", "base")
    folder = answered(base)
    (folder / "eval.json").unlink()
    rewrite(folder, lambda rows: rows[0].update(reference="another"))
    with pytest.raises(UserError, match="row 1: its reference differs from test row"):
        evaluate(base)


def tuned(run: RunConfig) -> None:
    """A run as training leaves it, whose adapter is noise."""
    import torch

    from kit.model import attach, load_base

    model = attach(load_base(run)[0], run)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.02)
    model.save_pretrained(runs.open_run(run) / "adapter")
    write_json(run.run_dir / "train.json", {"status": "done"})


def lasting(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what the clock and memory say, and without the hash of a file whose order may differ."""
    generation = {k: v for k, v in record["generation"].items() if k not in ("wall_s", "peak_memory_gib", "tokens_per_s")}
    return {k: v for k, v in record.items() if k not in ("phases", "predictions_sha256")} | {"generation": generation}


@pytest.mark.slow
def test_killed_at_any_time_an_evaluation_ends_where_an_undisturbed_one_does(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from kit import card, forgetting

    tuned(make("--method", "lora"))  # whose train.json has nothing for a card
    refreshed: list[RunConfig] = []
    monkeypatch.setattr(card, "refresh", refreshed.append)
    measure = forgetting.divergences
    for method in ("base", "lora"):
        run = make("--method", method)
        whole = evaluate(run)
        path, result = run.run_dir / "predictions.jsonl", run.run_dir / "eval.json"
        samples = (run.run_dir / "samples.json").read_bytes()
        assert [s["prompt"] for s in json.loads(samples)["samples"]] == list(FIXED_PROMPTS)
        assert (whole["forgetting"]["kl"] is None) == (whole["forgetting"]["perplexity_before"] is None) == (method == "base")
        rows = {r["id"]: r for r in read_jsonl(path)}
        # Killed while generating, in the middle of a line; then while forgetting is measured.
        result.unlink()
        path.write_bytes(path.read_bytes()[:-500])
        write_jsonl(run.run_dir / "generation.jsonl", [{"wall_s": 1000.0, "peak_gib": 77.0}])

        def killed(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(forgetting, "divergences", killed)
        with pytest.raises(KeyboardInterrupt):
            evaluate(run)
        assert read_json(result)["forgetting"] is None
        assert lasting(read_json(result))["all"] == whole["all"]
        # What was generated before counts, and once.
        assert 1000 < read_json(result)["generation"]["wall_s"] < 1000 + whole["generation"]["wall_s"]
        assert read_json(result)["generation"]["peak_memory_gib"] == 77
        assert not (run.run_dir / "generation.jsonl").exists()
        (run.run_dir / "generation.jsonl").touch()  # as a kill would leave it right after the scores
        monkeypatch.setattr(forgetting, "divergences", measure)
        again = evaluate(run)
        assert {r["id"]: r for r in read_jsonl(path)} == rows
        assert lasting(again) == lasting(whole) == lasting(read_json(result))
        assert not (run.run_dir / "generation.jsonl").exists()
        assert refreshed[-2:] == [run, run]
        assert set(again["phases"]) == {"load", "gates", "generation", "samples", "forgetting"}
        assert (run.run_dir / "samples.json").read_bytes() == samples
    assert 0 <= whole["forgetting"]["kl"]["low"] < whole["forgetting"]["kl"]["value"]
    assert whole["forgetting"]["perplexity_before"] == read_json(make("--method", "base").run_dir / "eval.json")["forgetting"]["perplexity"]
