"""A run -> a folder that other engines can serve: the merged model in 16 bits, the tokenizer with a chat template, and the card."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from kit import card, gates
from kit.config import BASE, RunConfig
from kit.console import say
from kit.errors import UserError
from kit.files import read_json, replaced_folder, write_text
from kit.generation import ends
from kit.hub import hub_errors, load_tokenizer, loadable
from kit.model import architecture, free_memory, quiet, saved_folder, settle, undamaged
from kit.preflight import existing
from kit.prompts import Renderer
from kit.resources import size

# What kit.prompts renders as the Alpaca format, for engines that know chat templates alone.
# As in training, a system message goes in front of the next instruction.
ALPACA = (
    "{%- set ns = namespace(before='', turns=0) -%}{%- for message in messages -%}{%- if message.role == 'system' -%}"
    "{%- set ns.before = ns.before + message.content | trim + '\\n\\n' -%}{%- elif message.role == 'user' -%}"
    "{{ '' if ns.turns == 0 else '\\n\\n' }}{{ '### Instruction:\\n' + ns.before + message.content | trim + '\\n\\n### Response:\\n' }}"
    "{%- set ns.before = '' -%}{%- set ns.turns = ns.turns + 1 -%}{%- elif message.role == 'assistant' -%}{{ message.content | trim + eos_token }}"
    "{%- else -%}{{ raise_exception('roles are system, user and assistant') }}{%- endif -%}{%- endfor -%}"
)


def export(config: RunConfig, target: Path) -> str:
    """Writes `target`, which appears only when it is complete and checked; returns what the check found.

    An adapter goes into the 16-bit base: merged into the weights that a 4-bit method quantised it would be another model. Merging is done in
    float32 on the CPU, 4 bytes a parameter, and rounded once.
    """
    if config.method == BASE:
        raise UserError(f"base is the untuned model, {config.model}: it has nothing to export")
    trained = config.run_dir / "train.json"
    record = read_json(trained) if trained.exists() else {}
    if record.get("status") != "done":
        raise UserError(f"{config.run_dir} is no trained run; run: python scripts/train.py {config.again}")
    if not any(saved_folder(config).glob("*.safetensors")):
        raise UserError(f"{saved_folder(config)} is gone; train again: python scripts/train.py {config.again}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists already and nothing is overwritten; choose another --out or remove it")
    need, free = record["total_params"] * 2, shutil.disk_usage(existing(target)).free
    if need > free:
        raise UserError(f"the exported model needs {size(need)} of disk and {target} has {size(free)} free")
    scored = config.run_dir / "eval.json"
    with replaced_folder(target) as folder:
        found = _fill(config, record, folder)
        write_text(folder / "README.md", card.text(config, record, read_json(scored) if scored.exists() else None, merged=found))
    return found


def _fill(config: RunConfig, record: dict[str, Any], folder: Path) -> str:
    tokenizer: Any = load_tokenizer(str(saved_folder(config)))
    renderer = Renderer(tokenizer, config.format, config.max_length)
    stored = read_json(config.run_dir / "probe.json", "rows", "log_probs")
    rows = [(prompt, reply) for prompt, reply in stored["rows"]]
    say(f"loading {saved_folder(config)} in float32")
    model, kind = _whole(config)
    before = gates.probe(model, rows, tokenizer.pad_token_id)
    model = model.merge_and_unload() if not config.technique.full else model
    settle(model, saved=True)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = ends(model.generation_config, renderer), tokenizer.pad_token_id
    model.to(kind).save_pretrained(str(folder))
    if config.format == "alpaca":
        tokenizer.chat_template = ("{{ bos_token }}" if renderer.bos else "") + ALPACA
    tokenizer.save_pretrained(str(folder))
    sentencepiece(config, folder)
    for file in folder.glob("*.safetensors"):  # which are written for their owner alone
        file.chmod((folder / "config.json").stat().st_mode)
    del model
    free_memory()
    say("checking what was written")
    after = gates.probe(_load(str(folder)), rows, tokenizer.pad_token_id)
    name = str(kind).removeprefix("torch.")
    checks = [gates.close(after, before, name, f"the exported model and the {'' if config.technique.full else 'adapter on the 16-bit '}model")]
    loosest = max(name, record["precision"]["name"], key=gates.BOUNDS.__getitem__)
    trained = gates.close(after, stored["log_probs"], loosest, "the exported model and the trained one")
    if config.technique.four_bit:  # no check: it was trained on other, quantised weights
        trained = trained._replace(passed=None, detail=f"{trained.detail.partition(' (')[0]}, since that one's base is in 4-bit")
    checks.append(trained)
    if wrong := [c.detail for c in checks if c.passed is False]:
        raise UserError(f"nothing is exported: {'; '.join(wrong)}")
    merged = "Whole model" if config.technique.full else "Adapter merged into the 16-bit base"
    return f"{merged}, stored in {name}; {'; '.join(c.detail for c in checks)}.{prompting(renderer)}"


def prompting(renderer: Renderer) -> str:
    """What to ask of engines where the template's own prompt is not the trained one: Qwen3's lets the model think first."""
    if renderer.format != "chat" or renderer.is_own_prompt():
        return ""
    remedy = "; ask engines for enable_thinking=false" if renderer.is_own_prompt(enable_thinking=False) else ", so replies may differ from the run's"
    return f" The chat template's own prompt is not the one that was trained{remedy}."


def sentencepiece(config: RunConfig, folder: Path) -> None:
    """Beside the tokenizer the file that it was made from, where the base has one: transformers leaves it out, and llama.cpp converts no Gemma without."""
    from huggingface_hub import errors, hf_hub_download

    source, name = loadable(config.model, config.revision), "tokenizer.model"
    try:
        found = Path(source, name) if Path(source).is_dir() else Path(hf_hub_download(source, name, revision=config.revision or None))
    except (errors.EntryNotFoundError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        return
    if found.exists():
        shutil.copyfile(found, folder / name)


def _whole(config: RunConfig) -> tuple[Any, Any]:
    """(the run's model in float32 on its 16-bit base, the 16-bit type to store: the base's own, or bfloat16)."""
    import torch

    source, revision = loadable(config.model, config.revision), config.revision or None
    kind = architecture(config).dtype
    kind = kind if kind in (torch.float16, torch.bfloat16) else torch.bfloat16
    with hub_errors(f"model {config.model}"):
        if config.technique.full:
            return _load(str(saved_folder(config))), kind
        model = _load(source, revision)
    from peft import PeftModel

    with undamaged(saved_folder(config)):
        return PeftModel.from_pretrained(model, str(saved_folder(config))).eval(), kind


def _load(source: str, revision: str | None = None) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    quiet()
    return AutoModelForCausalLM.from_pretrained(source, revision=revision, dtype=torch.float32, trust_remote_code=False, use_safetensors=True).eval()
