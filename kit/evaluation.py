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
from kit.generation import generate, likelihoods, longest_first, take
from kit.metrics import scores_by_source
from kit.model import free_memory, load_trained, prepare_data
from kit.progress import Bar
from kit.prompts import Exam, Renderer, plain_prompt
from kit.resources import Phases, clock, is_memory_error


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
    """Fills `done` and the predictions file, batch by batch. The batches do not depend on what is done already; out of memory halves those to come."""
    order, tokens, at = longest_first(exams), config.eval_tokens, 0
    with path.open("a", encoding="utf-8", newline="\n") as file, Bar("generating", len(rows)) as bar:
        started, fresh = clock(), 0
        while at < len(order):
            lengths = [len(exams[i].prompt_ids) + config.max_new_tokens for i in order[at:]]
            batch = order[at : at + take(lengths, tokens)]
            if not all(rows[i]["id"] in done for i in batch):
                try:
                    made = [r | {"batch_tokens": tokens} for r in answers(config, model, renderer, [rows[i] for i in batch], [exams[i] for i in batch])]
                except Exception as error:
                    if not is_memory_error(error):
                        raise
                    made = []
                # Outside the handler: the exception's frames hold the batch.
                if not made:
                    tokens = _halved(len(batch), lengths[0])
                    continue
                new = [row for row in made if row["id"] not in done]
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in new)
                file.flush()
                done |= {row["id"]: row for row in new}
                fresh += sum(row["reply_tokens"] for row in made)
                bar.update(len(done), f"{fresh / (clock() - started):.0f} tokens/s")
            at += len(batch)


def _halved(rows: int, longest: int) -> int:
    """Half of the tokens of a batch that memory had no room for; a single row without room is an error."""
    free_memory()
    if rows == 1:
        raise UserError("out of memory while generating a single reply; lower --max-new-tokens, or --max-length for data of its own --name")
    say(f"out of memory while generating {rows} replies at once: going on with batches of {rows * longest // 2:,} tokens")
    return rows * longest // 2


def answers(config: RunConfig, model: Any, renderer: Renderer, rows: list[dict[str, Any]], exams: list[Exam]) -> list[dict[str, Any]]:
    """One batch's rows of predictions.jsonl: greedy replies, and the likelihood of the references."""
    pad = renderer.tokenizer.pad_token_id
    replies = generate(model, [e.prompt_ids for e in exams], stop=renderer.stop_ids, pad=pad, max_new_tokens=config.max_new_tokens)
    nlls = likelihoods(model, exams, pad)
    return [
        {
            "id": row["id"], "source": row["source"], "prompt": plain_prompt(row), "reference": row["messages"][-1]["content"],
            "prediction": renderer.tokenizer.decode(reply.ids, skip_special_tokens=True).strip(), "reply_tokens": len(reply.ids),
            "finished": reply.finished, "nll": nll, "nll_tokens": len(exam.reference_ids),
        }
        for row, exam, reply, nll in zip(rows, exams, replies, nlls, strict=True)
    ]  # fmt: skip


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Scores for all rows and for each source."""
    return {"schema": runs.SCHEMA} | scores_by_source(rows)


def generation_record(rows: list[dict[str, Any]], phases: Phases) -> dict[str, Any]:
    """How the replies came out, and what generating cost; after an interruption the time covers the last part only."""
    tokens = sum(r["reply_tokens"] for r in rows)
    wall = phases.record["generation"]["wall_s"]
    return {
        "empty": sum(not r["prediction"] for r in rows), "unfinished": sum(not r["finished"] for r in rows),
        "mean_reply_tokens": tokens / len(rows), "batch_tokens": min(r["batch_tokens"] for r in rows),
        "wall_s": wall, "peak_memory_gib": phases.peak_gib("generation"),
    }  # fmt: skip
