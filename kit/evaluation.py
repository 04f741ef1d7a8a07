"""A run -> predictions.jsonl (appended as batches finish), samples.json and eval.json."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from kit import card, dataset, external, forgetting, gates, processes, runs, scoring
from kit.config import RunConfig
from kit.console import say
from kit.errors import UserError
from kit.files import held, read_json, read_jsonl, sha256, write_json
from kit.generation import Reply, ends, generate, likelihoods, longest_first, take
from kit.model import free_memory, load_trained, prepare_data
from kit.progress import Bar
from kit.prompts import FIXED_PROMPTS, Exam, Renderer
from kit.resources import Phases, clock, device_gib, is_memory_error, resident_gib

Row = dict[str, Any]
Drafted = dict[str, Reply] | None
# What each batch took, until eval.json has the sum: an evaluation may end in another process than it began in.
COSTS = "generation.jsonl"


def evaluate(config: RunConfig) -> Row:
    """The run's eval.json; goes on where an interrupted evaluation stopped, and does nothing when the result exists."""
    if processes.count() > 1:
        raise UserError("an evaluation runs in one process; start one, on one GPU")
    scoring.check_trained(config)  # before data are built, under a mistyped name
    prepare_data(config)
    with held(config.run_dir):
        return _evaluate(config)


def _evaluate(config: RunConfig) -> Row:
    data, rows = dataset.manifest_hash(config), scoring.rows_to_score(config)
    folder = runs.open_run(config)
    scoring.check_data(folder, config, data)
    result = folder / "eval.json"
    record: Row | None = read_json(result, "all", "phases", "generation", "provenance") if result.exists() else None
    if record is not None and not (folder / "predictions.jsonl").exists():
        say(f"{folder / 'predictions.jsonl'} is gone: evaluating again")
        record = None
    if record is not None and (tokens := scoring.to_score_by(config, record)) != runs.scored_by(record):
        say(f"{folder} was not scored by {tokens} tokens, and is now")
        record = scoring.rescored(config, dataset.prepare(config))
    if record is not None and forgetting.measured(record, config):
        say(f"{folder} is evaluated already")
        if card.behind(config):
            card.refresh(config)
        return record
    text, reason = forgetting.load(config)
    if record is not None and text is None:
        return record
    kept = _kept(folder / "predictions.jsonl", rows) if record is None else []
    phases, drafted = Phases(), None
    if config.engine == "vllm" and record is None:
        with phases("engine"):
            drafted = external.replies(config, rows)
    with phases("load"):
        model, tokenizer, chosen = load_trained(config)
        renderer = Renderer(tokenizer, config.format, config.max_length)
        chunks = forgetting.chunks(renderer, text) if text else []
    if record is None:
        record = _answered(config, model, renderer, rows, kept, phases, chosen.name, drafted) | {
            "forgetting": None, "forgetting_reason": reason, "precision": chosen._asdict(), "provenance": runs.provenance(config, data),
        }  # fmt: skip
        write_json(result, record)
    (folder / COSTS).unlink(missing_ok=True)
    if text is not None:
        if earlier := record.get("forgetting"):
            say(f"forgetting was measured on {earlier['text']}; measuring it on {text.name} instead")
        with phases("forgetting"):
            block, reason = forgetting.measure(config, model, text, chunks, tokenizer.pad_token_id)
        record |= {"forgetting": block, "forgetting_reason": reason, "phases": record["phases"] | {"forgetting": phases.record["forgetting"]}}
        write_json(result, record)
    card.refresh(config)
    return record


def _answered(config: RunConfig, model: Any, renderer: Renderer, rows: list[Row], kept: list[Row], phases: Phases, precision: str, drafted: Drafted) -> Row:
    """Writes predictions.jsonl and samples.json; returns the scores, and what the replies cost."""
    predictions, done = config.run_dir / "predictions.jsonl", {r["id"]: r for r in kept}
    costs = config.run_dir / COSTS
    if done:
        say(f"{len(done)} of {len(rows)} replies are there already")
    else:
        costs.unlink(missing_ok=True)
    with phases("gates"):
        checks = gates.reloaded(model, config.run_dir, renderer.tokenizer.pad_token_id, precision)
    with phases("generation"):
        _answer(config, model, renderer, rows, renderer.exams(rows), done, predictions, drafted)
    with phases("samples"):
        write_json(config.run_dir / "samples.json", {"schema": runs.SCHEMA, "samples": samples(config, model, renderer)})
    ordered = [done[row["id"]] for row in rows]
    return scoring.summary(ordered, dataset.prepare(config), config.score_tokens, config.limit_train) | {
        "predictions_sha256": sha256(predictions), "generation": generation_record(ordered, phases, costs),
        "phases": phases.record, "gates": gates.record(checks),
    }  # fmt: skip


def _kept(path: Path, rows: list[Row]) -> list[Row]:
    """The complete rows of an interrupted evaluation; a last line that a kill cut off is removed from the file."""
    if not path.exists():
        return []
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    return scoring.load(path, rows, partial=True)


def _answer(config: RunConfig, model: Any, renderer: Renderer, rows: list[Row], exams: list[Exam], done: dict[str, Row], path: Path, drafted: Drafted) -> None:
    """Fills `done` and the predictions file, batch by batch. The batches do not depend on what is done already; out of memory halves those to come."""
    order, tokens, at = longest_first(exams), config.eval_tokens, 0
    with path.open("a", encoding="utf-8", newline="\n") as file, Bar("generating", len(rows), len(done)) as bar:
        started, fresh = clock(), 0
        while at < len(order):
            lengths = [len(exams[i].prompt_ids) + config.max_new_tokens for i in order[at:]]
            batch = order[at : at + take(lengths, tokens)]
            if not all(rows[i]["id"] in done for i in batch):
                began = clock()
                asked, those = [rows[i] for i in batch], [exams[i] for i in batch]
                try:
                    made = [r | {"batch_tokens": tokens} for r in answers(config, model, renderer, asked, those, drafted)]
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
                with path.with_name(COSTS).open("a", encoding="utf-8") as spent:
                    spent.write(json.dumps({"wall_s": clock() - began, "peak_gib": device_gib()[1] or resident_gib(peak=True)}) + "\n")
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


def answers(config: RunConfig, model: Any, renderer: Renderer, rows: list[Row], exams: list[Exam], drafted: Drafted = None) -> list[Row]:
    """One batch's rows of predictions.jsonl: greedy replies (those of another engine, if it made them), and the likelihood of the references."""
    pad = renderer.tokenizer.pad_token_id
    if drafted is None:
        replies = generate(model, [e.prompt_ids for e in exams], stop=ends(model.generation_config, renderer), pad=pad, max_new_tokens=config.max_new_tokens)
    else:
        replies = [drafted[row["id"]] for row in rows]
    nlls = likelihoods(model, exams, pad)
    return [
        scoring.asked(row) | {
            "prediction": renderer.tokenizer.decode(reply.ids, skip_special_tokens=True).strip(), "reply_tokens": len(reply.ids),
            "finished": reply.finished, "nll": nll, "nll_tokens": len(exam.reference_ids),
        }
        for row, exam, reply, nll in zip(rows, exams, replies, nlls, strict=True)
    ]  # fmt: skip


def samples(config: RunConfig, model: Any, renderer: Renderer) -> list[Row]:
    """The replies to FIXED_PROMPTS."""
    rows = [{"id": "", "source": "", "messages": [{"role": "user", "content": p}, {"role": "assistant", "content": ""}]} for p in FIXED_PROMPTS]
    return [{k: made[k] for k in ("prompt", "prediction", "finished")} for made in answers(config, model, renderer, rows, renderer.exams(rows))]


def generation_record(rows: list[Row], phases: Phases, costs: Path) -> Row:
    """How the replies came out, and what generating cost, batches before an interruption included.

    Another engine's time counts; its memory is that of another process and is not known.
    """
    elsewhere, spent = "engine" in phases.record, list(read_jsonl(costs)) if costs.exists() else []
    return scoring.reply_counts(rows) | {
        "batch_tokens": min(r["batch_tokens"] for r in rows), "wall_s": phases.wall_s("engine") + sum(c["wall_s"] for c in spent),
        "peak_memory_gib": None if elsewhere else max((c["peak_gib"] for c in spent if c["peak_gib"] is not None), default=None),
    }  # fmt: skip
