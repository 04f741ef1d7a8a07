"""The two hybrids that the published studies only proposed: QLoRA continued at high rank, and trained adapters combined."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from kit import dataset, gates, runs
from kit.config import RunConfig
from kit.console import say
from kit.errors import UserError
from kit.files import read_json, read_jsonl, replaced_folder, write_jsonl
from kit.model import free_memory, import_unsloth, load_base, ordered
from kit.prompts import Renderer
from kit.resources import Phases, energy
from kit.settings import sibling
from kit.trainer import steps_per_epoch
from kit.training import perplexity, run, train

Record = dict[str, Any]
# PEFT's combination types, and the weight of the first adapter (the second has the rest).
KINDS = ("linear", "svd", "ties", "dare_linear")
WEIGHTS = (0.25, 0.5, 0.75)
# Share of each adapter's values that ties and dare keep (the middle of what Yadav et al. 2023 and Yu et al. 2023 try).
DENSITY = 0.5


def total_steps(config: RunConfig, rows: int) -> int:
    """Optimiser steps of a whole training."""
    return config.max_steps or math.ceil(config.epochs * steps_per_epoch(rows, config.micro_batch * config.accumulation))


def sequential(config: RunConfig, folder: Path) -> Record:
    """Half of the steps as QLoRA, the other half at high rank from its result: the same rows and as many steps as the other methods."""
    steps = total_steps(config, len(dataset.rows(config, "train")))
    if steps < 2:
        raise UserError("hybrid needs at least 2 optimiser steps, one for each half")
    first = replace(sibling(config, "qlora"), runs_dir=str(folder / "first"), max_steps=steps // 2)
    if first.rank > config.rank:
        raise UserError(f"hybrid widens QLoRA's adapter: --rank {config.rank} is smaller than QLoRA's {first.rank}")
    half = train(first)
    free_memory()
    if not (folder / "checkpoints").exists():
        write_jsonl(folder / "log.jsonl", read_jsonl(first.run_dir / "log.jsonl"))
    record = run(replace(config, max_steps=steps - steps // 2), folder, skip=steps // 2, start=first.run_dir / "adapter")
    return {**record, "phases": phases_of([half, record]), "parts": [_part(first, half)], "gates": record["gates"] | failed_gates({"qlora": half})}


def phases_of(records: list[Record]) -> Record:
    """Phases of several trainings as of one: times and energy added, peaks the largest."""
    out: Record = {}
    for name in dict.fromkeys(name for r in records for name in r["phases"]):
        found = [r["phases"][name] for r in records if name in r["phases"]]
        for key in found[0]:
            known = [f[key] for f in found if f[key] is not None]
            join = all if isinstance(found[0][key], bool) else sum if key in ("wall_s", "energy_j") else max
            out.setdefault(name, {})[key] = join(known) if known else None
    return out


def summed(records: list[Record], price_per_kwh: float | None) -> Record:
    """What several trainings cost together."""
    total = {k: sum(r[k] for r in records) for k in ("steps", "epochs", "train_wall_s", "tokens_total", "tokens_supervised")}
    peaks = [r["peak_memory_gib"] for r in records if r["peak_memory_gib"] is not None]
    timed = sum(r["tokens_per_s"] * r["train_wall_s"] for r in records if r["tokens_per_s"])
    speed = timed / total["train_wall_s"] if timed else None
    joules = [r["energy"]["joules"] for r in records if r["energy"]]
    used = energy(sum(joules) if len(joules) == len(records) else None, price_per_kwh)
    return total | {"peak_memory_gib": max(peaks, default=None), "tokens_per_s": speed, "energy": used}


def failed_gates(records: dict[str, Record]) -> Record:
    """The parts' gates that failed: what is built on them is not ranked either."""
    return {f"{method} {name}": gate for method, r in records.items() for name, gate in r["gates"].items() if gate["passed"] is False}


def _part(config: RunConfig, record: Record) -> Record:
    keys = ("steps", "train_wall_s", "tokens_total", "peak_memory_gib", "valid_perplexity", "gates")
    return {"method": config.method, "run": str(config.run_dir), "rank": config.rank, "alpha": config.alpha} | {k: record[k] for k in keys}


def adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tensors by name, adapter_config) of a saved PEFT adapter."""
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors"), read_json(folder / "adapter_config.json")


def scale(settings: dict[str, Any]) -> float:
    """The factor of an adapter's update, from its adapter_config."""
    return float(settings["lora_alpha"] / (math.sqrt(settings["r"]) if settings.get("use_rslora") else settings["r"]))


def widen(model: Any, start: Path) -> None:
    """Copies a saved adapter of lower rank into the model's new one; the function stays what the saved adapter made it.

    The first rows of A and columns of B take the old values, multiplied because the scales differ; the other columns of B are zero as initialised.
    """
    import torch

    tensors, settings = adapter(start)
    parameters = dict(model.named_parameters())
    new = model.peft_config["default"]
    factor = math.sqrt(scale(settings) / scale(new.to_dict()))
    with torch.no_grad():
        for name, old in tensors.items():
            target = parameters[name.replace("_A.weight", "_A.default.weight").replace("_B.weight", "_B.default.weight")]
            target[tuple(slice(n) for n in old.shape)] = (old * factor).to(target)


def padded(source: Path, target: Path, rank: int) -> Path:
    """A saved adapter at a higher rank with zeros: the same function, for combinations that need equal ranks."""
    import torch
    from safetensors.torch import save_file

    tensors, settings = adapter(source)
    target.mkdir(parents=True, exist_ok=True)
    extra = rank - settings["r"]
    wide = {n: torch.nn.functional.pad(t, (0, 0, 0, extra) if "lora_A" in n else (0, extra)).contiguous() for n, t in tensors.items()}
    save_file(wide, target / "adapter_model.safetensors")
    # Not rank-stabilised, since PEFT makes combinations of such ones with another scale than they have.
    (target / "adapter_config.json").write_text(json.dumps(settings | {"r": rank, "lora_alpha": scale(settings) * rank, "use_rslora": False}))
    return target


def combine(config: RunConfig, folder: Path) -> Record:
    """Trains the parts that are missing, tries every kind and weight of combination on the validation rows, and saves the best."""
    parts = {m: sibling(config, m) for m in config.technique.parts}
    if len({(p.target_modules) for p in parts.values()}) > 1:
        say("the parts adapt different layers: where only one of them has an adapter, it is scaled by its weight")
    records = {}
    for method, part in parts.items():
        say(f"combined needs {method}")
        records[method] = train(part)
        free_memory()
    import_unsloth()
    phases = Phases()
    with phases("load"):
        model, tokenizer, chosen = load_base(config)
        renderer = Renderer(tokenizer, config.format, config.max_length)
        exams = renderer.exams(dataset.rows(config, "valid"))
        model = _with_parts(model, parts, folder)
    with phases("search"):
        tried = list(_search(config, model, list(parts), exams, tokenizer.pad_token_id))
    best = min((t for t in tried if t["kind"] != "alone"), key=lambda t: t["valid_perplexity"] or math.inf)
    weights = ", ".join(f"{method} {weight:g}" for method, weight in best["weights"].items())
    say(f"best on validation: {best['kind']} with weights {weights}; perplexity {best['valid_perplexity']:.3f}")
    with phases("save"):
        _save(config, model, tokenizer, best, folder)
    done = [records[m] for m in parts]
    size = sum(t.numel() for t in adapter(folder / "adapter")[0].values())
    examples = renderer.examples(dataset.rows(config, "train")[: gates.PROBED])
    model.set_adapter("best")
    gates.write_probe(model, examples, tokenizer.pad_token_id, folder)
    return {
        "schema": runs.SCHEMA, "status": "done", "phases": phases_of([*done, {"phases": phases.record}]), **summed(done, config.price_per_kwh),
        "trainable_params": size, "total_params": done[-1]["total_params"], "adapter_mib": size * 4 / 2**20, "final_loss": None,
        "valid_perplexity": best["valid_perplexity"], "tried": tried, "parts": [_part(parts[m], records[m]) for m in parts],
        "precision": chosen._asdict(), "gates": failed_gates(records), "provenance": runs.provenance(config, dataset.manifest_hash(config)),
    }  # fmt: skip


def _with_parts(model: Any, parts: dict[str, RunConfig], folder: Path) -> Any:
    """The base model with every part's adapter, all at the highest rank."""
    from peft import PeftModel

    rank = max(p.rank for p in parts.values())
    wide = {m: padded(p.run_dir / "adapter", folder / "parts" / m, rank) for m, p in parts.items()}
    first, *others = wide
    model = PeftModel.from_pretrained(model, str(wide[first]), adapter_name=first)
    for method in others:
        model.load_adapter(str(wide[method]), adapter_name=method)
    shutil.rmtree(folder / "parts")
    import_unsloth().FastModel.for_inference(model)
    return model


def _search(config: RunConfig, model: Any, parts: list[str], exams: list[Any], pad: int) -> Iterator[Record]:
    """Validation perplexity of each part alone and of every combination."""
    for method in parts:
        model.set_adapter(method)
        yield {"kind": "alone", "weights": {method: 1.0}, "valid_perplexity": perplexity(model, exams, pad)}
    for kind in KINDS:
        for weight in WEIGHTS:
            weights = dict(zip(parts, (weight, 1 - weight), strict=True))
            _add(config, model, "tried", kind, weights)
            model.set_adapter("tried")
            yield {"kind": kind, "weights": weights, "valid_perplexity": perplexity(model, exams, pad)}
            model.set_adapter(parts[0])  # PEFT warns when the active one goes
            model.delete_adapter("tried")


def _add(config: RunConfig, model: Any, name: str, kind: str, weights: dict[str, float]) -> None:
    import torch

    torch.manual_seed(config.seed)  # dare drops values at random
    density = DENSITY if kind.startswith(("ties", "dare")) else None
    model.add_weighted_adapter(list(weights), list(weights.values()), name, combination_type="linear" if kind == "svd" else kind, density=density)
    if kind == "svd":
        for module in model.modules():
            if name in getattr(module, "lora_A", {}):
                low_rank_sum(module, weights, name)


def low_rank_sum(module: Any, weights: dict[str, float], name: str) -> None:
    """Makes a layer's adapter the best approximation of its rank to the weighted sum of other adapters, as PEFT's "svd" does.

    The sum is B A, of the adapters' B side by side and A one above the other: with QR decompositions of both, what is left to decompose is as small
    as their ranks together and not as the layer (for a layer of gemma-3-1b's MLP 15 times as fast on a CPU).
    """
    import torch

    a = torch.cat([module.lora_A[m].weight for m in weights if m in module.lora_A]).detach().float()
    b = torch.cat([w * module.scaling[m] * module.lora_B[m].weight for m, w in weights.items() if m in module.lora_B], 1).detach().float()
    (left, upper), (right, lower) = torch.linalg.qr(b), torch.linalg.qr(a.T)
    u, s, v = torch.linalg.svd(upper @ lower.T)
    rank = min(len(s), module.r[name])
    new_a, new_b = (torch.zeros_like(each[name].weight, dtype=torch.float32) for each in (module.lora_A, module.lora_B))
    new_a[:rank] = v[:rank] @ right.T
    new_b[:, :rank] = left @ (u[:, :rank] * s[:rank]) / module.scaling[name]
    module.lora_A[name].weight.data, module.lora_B[name].weight.data = new_a, new_b


def _save(config: RunConfig, model: Any, tokenizer: Any, best: Record, folder: Path) -> None:
    """The combination as an ordinary adapter in folder/adapter."""
    _add(config, model, "best", best["kind"], best["weights"])
    with replaced_folder(folder / "adapter") as beside:
        ordered(model).save_pretrained(str(beside), selected_adapters=["best"])
        for file in (beside / "best").iterdir():
            file.rename(beside / file.name)
        (beside / "best").rmdir()
        tokenizer.save_pretrained(str(beside))
