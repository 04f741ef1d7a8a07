"""The model card of a run: README.md beside its weights, with the hub's metadata, the results as model-index, and how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kit import dataset
from kit.config import BASE, RunConfig
from kit.console import printable
from kit.files import read_json, write_text
from kit.gates import failed
from kit.hub import BUILTIN
from kit.metrics import METRICS
from kit.model import saved_folder
from kit.report.rows import duration, interval, number
from kit.runs import scored_by
from kit.sources import SOURCES

Record = dict[str, Any]
# The hub's names of metrics, for its model-index.
ON_THE_HUB = {"bleu4": "bleu", "rouge_l": "rouge", "perplexity": "perplexity"}


class Licence(NamedTuple):
    """The hub's identifier, and where the text lies."""

    id: str
    link: str


# By the start of the model's own name, so that mirrors count as what they mirror.
LICENCES = {
    "gemma-2": Licence("gemma", "https://ai.google.dev/gemma/terms"),
    "gemma-3": Licence("gemma", "https://ai.google.dev/gemma/terms"),
    "gpt-neo": Licence("mit", "https://opensource.org/license/mit"),
    "builtin": Licence("apache-2.0", "https://www.apache.org/licenses/LICENSE-2.0"),
}


def licence(model: str) -> Licence | None:
    """The base model's licence as far as the kit knows it."""
    name = model.rpartition("/")[2].lower()
    return next((found for start, found in LICENCES.items() if name.startswith(start)), None)


def on_hub(model: str) -> bool:
    """Whether a model is named by its hub id: a folder's name must not stand in metadata, where the hub would look it up."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    return model not in BUILTIN and not Path(model).expanduser().is_dir()


def write(config: RunConfig, trained: Record, scored: Record | None = None) -> None:
    """Writes the card in place of what PEFT puts there; `scored` is the run's eval.json, once there is one."""
    write_text(saved_folder(config) / "README.md", text(config, trained, scored))


NEEDED = ("steps", "trainable_params", "train_wall_s", "peak_memory_gib", "precision", "gates", "provenance")


def refresh(config: RunConfig) -> None:
    """Rewrites the card from the run's own files, once it is evaluated; the base model has none."""
    if config.method != BASE:
        write(config, read_json(config.run_dir / "train.json", *NEEDED), read_json(config.run_dir / "eval.json", "all", "provenance"))


def behind(config: RunConfig) -> bool:
    """Whether the card is older than the scores: a kill came between the two."""
    made, scored = saved_folder(config) / "README.md", config.run_dir / "eval.json"
    return config.method != BASE and made.exists() and made.stat().st_mtime_ns < scored.stat().st_mtime_ns


def text(config: RunConfig, trained: Record, scored: Record | None = None, *, merged: str = "") -> str:
    """The card. `merged`: what an export found when it held the merged model against the run (then the card is that model's)."""
    manifest = dataset.manifest_of(config)
    if manifest is None or trained["provenance"]["data"] != dataset.manifest_hash(config):  # the run's own is gone
        manifest = {"sources": {}}
    whole = bool(merged) or config.technique.full
    kind = "fine-tuned" if config.technique.full else "adapter merged into" if merged else "adapter for"
    name = shown(config.model) if config.model in BUILTIN else code(shown(config.model))
    body = [
        f"# {config.technique.title} {kind} {name}", config.technique.about, f"{merged} The scores below are the run's, from before that." if merged else "",
        *_results(config, scored), *_loading(config, whole=whole, exported=bool(merged)),
        *_training(config, trained, manifest), *_limits(config, trained, scored, manifest),
    ]  # fmt: skip
    return f"---\n{metadata(config, scored, manifest, whole=whole).to_yaml()}\n---\n\n" + "\n\n".join(part for part in body if part) + "\n"


def metadata(config: RunConfig, scored: Record | None, manifest: Record, *, whole: bool) -> Any:
    """huggingface_hub's ModelCardData; it refuses results without a value or a name."""
    from huggingface_hub import ModelCardData

    known, hub = licence(config.model), on_hub(config.model)
    terms: Record = {"license": known.id if known else "other"}
    if known is None and hub:
        terms |= {"license_name": "base-model", "license_link": f"https://huggingface.co/{config.model}"}
    base: Record = {"base_model": config.model, "base_model_relation": "finetune" if whole else "adapter"} if hub else {}
    origins = [s["origin"] for s in manifest["sources"].values() if s["revision"]]
    return ModelCardData(
        **base, **terms, library_name="transformers" if whole else "peft", pipeline_tag="text-generation", datasets=origins or None,
        tags=[config.method, "sft", "unsloth", "trl", *([] if config.technique.full else ["lora"])],
        model_name=f"{shown(config.model)} {config.run_name}", eval_results=_model_index(scored, manifest) or None,
    )  # fmt: skip


def _model_index(scored: Record | None, manifest: Record) -> list[Any]:
    """The main metrics over all test rows and for each source; the hub takes no result without a number."""
    from huggingface_hub import EvalResult

    if scored is None:
        return []
    blocks = [("all sources", "mixture", None, scored["all"])]
    for name, scores in scored["per_source"].items():
        source = manifest["sources"].get(name, {})
        blocks.append((name, source["origin"] if source.get("revision") else name, source.get("revision"), scores))
    return [
        EvalResult(
            task_type="text-generation", dataset_type=kind, dataset_name=f"{name}, held-out rows", dataset_revision=revision,
            metric_type=hub_name, metric_name=METRICS[metric].title, metric_value=round(scores[metric]["value"], 4),
        )
        for name, kind, revision, scores in blocks
        for metric, hub_name in ON_THE_HUB.items()
        if scores[metric]["value"] is not None
    ]  # fmt: skip


def shown(model: str) -> str:
    """A model as a card may name it: a folder by its last part, since the rest says where somebody keeps it."""
    return "the kit's built-in model" if model in BUILTIN else model if on_hub(model) else Path(model).expanduser().resolve().name


def code(foreign: str) -> str:
    """Foreign text on one line, in which nothing is markup."""
    flat = " ".join(printable(foreign).split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", flat)), default=0))
    return f"{fence} {flat} {fence}" if "`" in flat else f"`{flat}`"


def _results(config: RunConfig, scored: Record | None) -> list[str]:
    """Scores of the base model and the run on the same test rows."""
    if scored is None:
        return ["## Results", "Not evaluated yet."]
    path = config.run_dir.parent / BASE / "eval.json"
    base = read_json(path, "all", "provenance") if path.exists() else None
    tokens = [scored_by(s or {}) for s in (base, scored)]
    same = base is not None and all(base["provenance"].get(k) == scored["provenance"].get(k) for k in ("data", "model_revision"))
    comparable = same and tokens[0] == tokens[1]
    lines = ["| | base model | tuned |", "| --- | ---: | ---: |"]
    for name in ON_THE_HUB:
        pair = (base["all"][name] if base and comparable else None, scored["all"][name])
        before, after = (interval(score if score and score["value"] is not None else None) for score in pair)
        lines.append(f"| {METRICS[name].title} | {before} | {after} |")
    said = ["## Results", f"On {scored['all']['bleu4']['n']:,} held-out rows, with 95% bootstrap intervals; BLEU-4 and ROUGE-L from 0 to 100 "
            f"({tokens[1]} tokens), perplexity the lower the better.", "\n".join(lines)]  # fmt: skip
    return said + _beside(scored)


def _beside(scored: Record) -> list[str]:
    """The scores without what resembles training rows, and what was measured elsewhere."""
    leaks, lost = scored.get("leaks") or {}, (scored.get("forgetting") or {}).get("perplexity")
    without = ", ".join(f"{METRICS[name].title} {interval(leaks['without'][name])}" for name in ON_THE_HUB) if leaks.get("without") else ""
    flagged = [f"{leaks['flagged']:,} of these rows resemble training rows{f'; without them: {without}' * bool(without)}."] if leaks.get("flagged") else []
    before = (scored.get("forgetting") or {}).get("perplexity_before")
    was = f", the base model's {interval(before)}" if before else ""
    return flagged + ([f"On general text ({code(scored['forgetting']['text'])}) its perplexity is {interval(lost)}{was}."] if lost else [])


def _loading(config: RunConfig, *, whole: bool, exported: bool) -> list[str]:
    """Snippets that load the model as it was evaluated."""
    base = "kit/assets/" + BUILTIN[config.model].name if config.model in BUILTIN else shown(config.model)
    revision = f", revision={config.revision!r}" if config.revision else ""
    # The built-in models are for CPUs, where bitsandbytes has no 16-bit product with layers as narrow as theirs.
    four_bit = config.technique.four_bit and not whole and config.model not in BUILTIN
    nf4 = ['nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)'] if four_bit else []
    what = "FOLDER" if whole else f"{base!r}{revision}{', quantization_config=nf4' if four_bit else ''}"
    chat = 'tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")'
    # An exported tokenizer has a template of the format that the model was tuned on, another run's has its base's.
    templated = config.format == "chat" or exported
    asked = chat if templated else 'tokenizer(f"### Instruction:\\n{question}\\n\\n### Response:\\n", return_tensors="pt")'
    plain = [
        *([] if whole else ["from peft import PeftModel"]),
        f"from transformers import AutoModelForCausalLM, AutoTokenizer{', BitsAndBytesConfig' if four_bit else ''}", "", *nf4,
        f'model = AutoModelForCausalLM.from_pretrained({what}, dtype="auto", device_map="auto")',
        *([] if whole else ["model = PeftModel.from_pretrained(model, FOLDER)"]), "tokenizer = AutoTokenizer.from_pretrained(FOLDER)",
        *(['messages = [{"role": "user", "content": "Why is the sky blue?"}]'] if templated else ['question = "Why is the sky blue?"']),
        f"inputs = {asked}.to(model.device)",
        f"out = model.generate(**inputs, max_new_tokens={config.max_new_tokens}, do_sample=False)",
        'print(tokenizer.decode(out[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))',
    ]  # fmt: skip
    length = config.max_length + config.max_new_tokens
    fast = ["from unsloth import FastModel", "", f"model, tokenizer = FastModel.from_pretrained(FOLDER, max_seq_length={length}, load_in_4bit={four_bit})"]
    said = "`FOLDER` is the folder of this card, or its name on the hub."
    if four_bit:
        said += " Without a GPU leave `quantization_config` out: the adapter then works on the 16-bit base, near what it was trained on."
    return ["## How to load", said, fenced(plain), "Or with Unsloth:", fenced(fast)]


def fenced(lines: Sequence[str]) -> str:
    return "\n".join(["```python", *lines, "```"])


def cells(rows: Mapping[str, Any]) -> str:
    """A two-column table; a bar in a value is no border."""
    lines = (f"| {k} | {code(str(v)).replace('|', chr(92) + '|')} |" for k, v in rows.items())
    return "\n".join(["| setting | value |", "| --- | --- |", *lines])


def _training(config: RunConfig, trained: Record, manifest: Record) -> list[str]:
    rows = [f"- {code(name)}: {source['train']:,} rows from {_origin(name, source)}" for name, source in manifest["sources"].items()]
    # Those of a combination's parts differ, and it has another alpha than any of them.
    scale = {"alpha": config.alpha, "scale": f"alpha / {'sqrt(rank)' if config.rslora else 'rank'}"} if len(config.technique.parts) < 2 else {}
    adapter = {"rank": config.rank, **scale, "dropout": config.dropout, "target modules": ", ".join(config.target_modules)}
    plus = config.loraplus_lr_ratio
    rates = {"learning rate": config.learning_rate} | (
        {"learning rate of B": f"{plus * config.learning_rate:g}"} if plus != 1 and not config.technique.full else {}
    )
    projection = {"projection rank": config.rank, "update gap": config.update_gap, "projection scale": config.projection_scale}
    settings: Record = {} if config.technique.full else adapter
    settings |= projection if config.technique.projection else {}
    batch = trained.get("micro_batch", config.micro_batch) * trained.get("accumulation", config.accumulation)
    settings |= {
        "optimiser": config.optimizer, **rates, "schedule": f"{config.schedule}, {config.warmup_ratio:.0%} warm-up",
        "weight decay": config.weight_decay, "effective batch": batch, "optimiser steps": trained["steps"], "maximum length": config.max_length,
        "format": config.format, "seed": config.seed, "base model in": "4-bit NF4" if config.technique.four_bit else trained["precision"]["name"],
        "computed in": trained["precision"]["name"], "trained parameters": f"{trained['trainable_params']:,}",
        "training time": duration(trained["train_wall_s"]), "peak memory": number(trained["peak_memory_gib"], 2, " GiB"),
        "hardware": trained["provenance"]["gpu"] or trained["provenance"]["cpu"] or "—",
    }  # fmt: skip
    versions = ", ".join(f"{name} {version}" for name, version in trained["provenance"]["versions"].items() if version)
    limit = f" The first {config.limit_train:,} rows were used." if config.limit_train else ""
    about = f"Supervised fine-tuning; the loss is on the assistant's replies and their terminators alone.{limit}"
    return ["## Training", about, "\n".join(rows), cells(settings), f"Versions: {versions}."]


def _origin(name: str, source: Record) -> str:
    if source["revision"]:
        return f"[{source['origin']}](https://huggingface.co/datasets/{source['origin']}) at {code(source['revision'])}"
    return "the kit's built-in sample" if name in SOURCES and source["origin"] == "builtin" else code(Path(source["origin"]).name)


def _limits(config: RunConfig, trained: Record, scored: Record | None, manifest: Record) -> list[str]:
    known, hub = licence(config.model), on_hub(config.model)
    terms = f"[{known.id}]({known.link})" if known else f"the one on [its page](https://huggingface.co/{config.model})" if hub else "one the kit does not know"
    hubs = any(s["revision"] for s in manifest["sources"].values())
    problems = failed(trained["gates"] | (scored or {}).get("gates", {}))
    notes = [
        f"The base model's licence is {terms}; it binds this model too." + (" The datasets have licences of their own." if hubs else ""),
        "It was tuned for the comparison of techniques and tested on rows like those it was tuned on; it was not tested for safety, bias or other uses.",
        "Whatever the base model gets wrong, it may get wrong too.",
        *(["The built-in model is tiny and its text composed: this run shows that the pipeline works and nothing else."] if config.model in BUILTIN else []),
        *([f"Checks of the run that failed: {'; '.join(problems)}. Do not trust it."] if problems else []),
    ]  # fmt: skip
    return ["## Limits and licence", "\n".join(f"- {note}" for note in notes)]
