"""A run -> predictions.jsonl (appended as batches finish) and eval.json (last)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kit import dataset, gates, runs
from kit.config import BASE, RunConfig
from kit.console import say
from kit.errors import UserError
from kit.files import read_json, read_jsonl, write_json
from kit.generation import batches, generate, likelihoods, longest_first
from kit.metrics import scores_by_source
from kit.model import load_trained, prepare_data
from kit.progress import Bar
from kit.prompts import Exam, Renderer, plain_prompt
from kit.resources import Phases, clock


def evaluate(config: RunConfig) -> dict[str, Any]:
    """The run's eval.json; goes on where an interrupted evaluation stopped, and does nothing when the result exists."""
    prepare_data(config)
    data = dataset.manifest_hash(config)
    trained = config.run_dir / "train.json"
    if config.method != BASE and (not trained.exists() or read_json(trained)["status"] != "done"):
        raise UserError(f"{config.run_dir} is not trained yet; run: python scripts/train.py --method {config.method} --seed {config.seed}")
    folder = runs.open_run(config)
    result = folder / "eval.json"
    for path in (folder / "train.json", result):
        if path.exists() and read_json(path).get("provenance", {}).get("data", data) != data:
            raise UserError(f"{path} comes from other data than {config.data_path} holds now; choose another --name or remove {folder}")
    if result.exists():
        say(f"{folder} is evaluated already")
        return dict(read_json(result))
    phases = Phases()
    rows = dataset.rows(config, "test")
    predictions = folder / "predictions.jsonl"
    done = {r["id"]: r for r in _kept(predictions)}
    if done:
        say(f"{len(done)} of {len(rows)} replies are there already")
    with phases("load"):
        model, tokenizer, chosen = load_trained(config)
        renderer = Renderer(tokenizer, config.format, config.max_length)
        exams = renderer.exams(rows)
    with phases("gates"):
        checks = gates.reloaded(model, folder, tokenizer.pad_token_id, chosen.name)
    with phases("generation"):
        _answer(config, model, renderer, rows, exams, done, predictions)
    ordered = [done[row["id"]] for row in rows]
    record = summary(ordered) | {
        "generation": generation_record(ordered, phases), "phases": phases.record, "precision": chosen._asdict(),
        "gates": gates.record(checks), "provenance": runs.provenance(config, data),
    }  # fmt: skip
    write_json(result, record)
    return record


def _kept(path: Path) -> list[dict[str, Any]]:
    """The complete rows of an interrupted evaluation; a last line that a kill cut off is removed from the file."""
    if not path.exists():
        return []
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return list(read_jsonl(path))


def _answer(config: RunConfig, model: Any, renderer: Renderer, rows: list[dict[str, Any]], exams: list[Exam],
            done: dict[str, dict[str, Any]], path: Path) -> None:  # fmt: skip
    """Fills `done` and the predictions file, batch by batch. The batches do not depend on what is done already."""
    tokenizer, pad = renderer.tokenizer, renderer.tokenizer.pad_token_id
    with path.open("a", encoding="utf-8", newline="\n") as file, Bar("generating", len(rows)) as bar:
        started, fresh = clock(), 0
        for batch in batches(longest_first(exams), config.eval_batch_size):
            if all(rows[i]["id"] in done for i in batch):
                continue
            replies = generate(model, [exams[i].prompt_ids for i in batch], stop=renderer.stop_ids, pad=pad, max_new_tokens=config.max_new_tokens)
            nlls = likelihoods(model, [exams[i] for i in batch], pad)
            for i, reply, nll in zip(batch, replies, nlls, strict=True):
                row = {
                    "id": rows[i]["id"], "source": rows[i]["source"], "prompt": plain_prompt(rows[i]),
                    "reference": rows[i]["messages"][-1]["content"], "prediction": tokenizer.decode(reply.ids, skip_special_tokens=True).strip(),
                    "reply_tokens": len(reply.ids), "finished": reply.finished, "nll": nll, "nll_tokens": len(exams[i].reference_ids),
                }  # fmt: skip
                if row["id"] not in done:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    done[row["id"]] = row
            file.flush()
            fresh += sum(len(reply.ids) for reply in replies)
            bar.update(len(done), f"{fresh / (clock() - started):.0f} tokens/s")


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Scores for all rows and for each source."""
    return {"schema": runs.SCHEMA} | scores_by_source(rows)


def generation_record(rows: list[dict[str, Any]], phases: Phases) -> dict[str, Any]:
    """How the replies came out, and what generating cost; after an interruption the time covers the last part only."""
    tokens = sum(r["reply_tokens"] for r in rows)
    wall = phases.record["generation"]["wall_s"]
    return {
        "empty": sum(not r["prediction"] for r in rows), "unfinished": sum(not r["finished"] for r in rows),
        "mean_reply_tokens": tokens / len(rows), "wall_s": wall, "peak_memory_gib": phases.peak_gib("generation"),
    }  # fmt: skip
