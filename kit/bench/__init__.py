"""Both sides of every claim of speed, interleaved A B A B in one process: medians, spread, and the median of the paired ratios."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kit.config import RunConfig
from kit.console import say
from kit.errors import UserError
from kit.resources import Phases, clock

Variants = Mapping[str, Callable[[], object]]
ROOT = Path(__file__).parent.parent.parent
# Layer widths of gemma-3-1b; two layers and a small vocabulary, so that the adapted layers are what is timed.
WIDE = {"hidden_size": 1152, "intermediate_size": 6912, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "num_hidden_layers": 2,
        "vocab_size": 2048, "query_pre_attn_scalar": 256}  # fmt: skip


def interleave(variants: Variants, rounds: int) -> tuple[dict[str, list[float]], dict[str, float | None]]:
    """(seconds of each round, peak memory in GiB) by variant; a first round warms up and is left out. Process memory peaks include what others left."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    phases = Phases()
    for number in range(rounds + 1):
        for name, work in variants.items():
            with phases(name):
                started = clock()
                work()
                taken = clock() - started
            if number:
                times[name].append(taken)
        say(f"round {number} of {rounds}: " + ", ".join(f"{n} {t[-1]:.3f} s" for n, t in times.items() if t))
    return times, {name: phases.peak_gib(name) for name in variants}


def summary(what: str, times: Mapping[str, Sequence[float]], peaks: Mapping[str, float | None], ratios: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """{what, machine, versions, variants: {name: {median_s, iqr_s, peak_memory_gib, n}}, ratios: {"a/b": median of the paired ratios}}."""
    from kit.runs import machine, versions

    def iqr(values: Sequence[float]) -> float | None:
        low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (0.0, 0.0, 0.0)
        return high - low if len(values) > 1 else None

    variants = {n: {"median_s": statistics.median(t), "iqr_s": iqr(t), "peak_memory_gib": peaks.get(n), "n": len(t)} for n, t in times.items()}
    paired = {f"{a}/{b}": statistics.median(x / y for x, y in zip(times[a], times[b], strict=True)) for a, b in ratios}
    return {"what": what, "machine": machine(), "versions": versions(), "variants": variants, "ratios": paired}


def dora(config: RunConfig, rounds: int) -> dict[str, Any]:
    """A training step of LoRA and of DoRA on the kit's path and on PEFT's, float32, at gemma-3-1b's layer widths; then a generation step."""
    from kit.model import import_unsloth

    import_unsloth()
    models = {name: _adapted(config, dora=name != "lora", kit=name == "dora-kit") for name in ("lora", "dora-kit", "dora-peft")}
    steps = {f"train {name}": (lambda m=model: _train_step(config, m)) for name, model in models.items()}
    tokens = {f"generate {name}": (lambda m=model: _decode(m)) for name, model in models.items()}
    times, peaks = interleave(steps | tokens, rounds)
    pairs = [(f"{phase} {name}", f"{phase} lora") for phase in ("train", "generate") for name in ("dora-kit", "dora-peft")]
    return summary("dora", times, peaks, pairs)


def _adapted(config: RunConfig, *, dora: bool, kit: bool) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Gemma3ForCausalLM(Gemma3TextConfig(**WIDE)).to(device)
    settings = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=list(config.target_modules), use_dora=dora, task_type="CAUSAL_LM")
    model = get_peft_model(model, settings)
    if kit:
        from kit.dora import install

        install(model)
    model.bench_optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    return model


def _train_step(config: RunConfig, model: Any) -> None:
    import torch

    model.train()
    ids = torch.randint(0, WIDE["vocab_size"], (2, 128), generator=torch.Generator().manual_seed(0)).to(model.device)
    for _ in range(config.accumulation):
        (model(input_ids=ids, labels=ids).loss / config.accumulation).backward()
    model.bench_optimizer.step()
    model.bench_optimizer.zero_grad()


def _decode(model: Any, n: int = 16) -> None:
    """n forward passes of one token each, as generation makes them."""
    import torch

    model.eval()
    with torch.inference_mode():
        made, ids = None, torch.ones(8, 32, dtype=torch.long, device=model.device)
        for _ in range(n):
            made = model(input_ids=ids, past_key_values=made.past_key_values if made else None, use_cache=True, logits_to_keep=1)
            ids = made.logits.argmax(-1)


def generate(config: RunConfig, rounds: int, prompts: int = 128) -> dict[str, Any]:
    """Replies to test prompts: one by one and in random batches by transformers, and sorted with ended rows leaving, as the kit does."""
    import random

    import torch

    from kit import dataset, generation
    from kit.model import load_trained
    from kit.prompts import Renderer

    model, tokenizer, _ = load_trained(config)
    renderer = Renderer(tokenizer, config.format, config.max_length)
    exams = renderer.exams(dataset.rows(config, "test")[:prompts])
    options: dict[str, Any] = {"stop": renderer.stop_ids, "pad": tokenizer.pad_token_id, "max_new_tokens": config.max_new_tokens}

    def plain(rows: Sequence[int]) -> None:
        ids, mask = generation.padded([exams[i].prompt_ids for i in rows], options["pad"], model.device)
        with torch.inference_mode():
            model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=options["max_new_tokens"], do_sample=False,
                           eos_token_id=options["stop"], pad_token_id=options["pad"])  # fmt: skip

    def kit(rows: Sequence[int]) -> None:
        generation.generate(model, [exams[i].prompt_ids for i in rows], **options)

    shuffled = random.Random(0).sample(range(len(exams)), len(exams))
    ordered = generation.longest_first(exams)
    planned = [ordered[part] for part in generation.cut([len(exams[i].prompt_ids) + config.max_new_tokens for i in ordered], config.eval_tokens)]

    def over(plan: Sequence[Sequence[int]], work: Callable[[Sequence[int]], None]) -> Callable[[], None]:
        def all_batches() -> None:
            for rows in plan:
                work(rows)

        return all_batches

    single, random_batches = [[i] for i in shuffled], [shuffled[i : i + 64] for i in range(0, len(shuffled), 64)]
    variants = {"one by one": over(single, plain), "random batches of 64": over(random_batches, plain), "kit": over(planned, kit)}
    times, peaks = interleave(variants, rounds)
    return summary("generate", times, peaks, [("one by one", "kit"), ("random batches of 64", "kit")])


def metrics(_: RunConfig, rounds: int, rows: int = 6000) -> dict[str, Any]:
    """BLEU-4 and ROUGE-L of composed replies of about 200 words: sacreBLEU and rouge_score without intervals, and the kit with 10,000 resamples."""
    import random

    from kit.metrics import METRICS
    from kit.statistics import intervals

    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 8))) for _ in range(3000)]
    pairs = [(" ".join(rng.choices(words, k=200)), rng.random()) for _ in range(rows)]
    made = [{"reference": text, "prediction": " ".join(w if rng.random() < keep else rng.choice(words) for w in text.split())} for text, keep in pairs]
    wanted = {name: METRICS[name] for name in ("bleu4", "rouge_l")}

    def libraries() -> None:
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu import corpus_bleu

        predictions, references = [r["prediction"] for r in made], [r["reference"] for r in made]
        corpus_bleu(predictions, [references])
        scorer = RougeScorer(["rougeL"])
        for row in made:
            scorer.score(row["reference"], row["prediction"])

    def kit() -> None:
        intervals([{name: metric.statistics(made) for name, metric in wanted.items()}], ["x"] * rows, wanted)

    times, peaks = interleave({"libraries": libraries, "kit": kit}, rounds)
    return summary("metrics", times, peaks, [("libraries", "kit")])


def startup(_: RunConfig, rounds: int) -> dict[str, Any]:
    """Fresh processes: help, a wrong flag, and Make's list."""

    def command(expected: int, *words: str) -> Callable[[], object]:
        def started() -> None:
            done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
            if done.returncode != expected:
                raise UserError(f"{' '.join(words)} ended with exit code {done.returncode}: {done.stderr[-200:]}")

        return started

    script = str(ROOT / "scripts" / "train.py")
    variants = {"--help": command(0, sys.executable, script, "--help"), "wrong flag": command(2, sys.executable, script, "--methd", "lora"),
                "make help": command(0, "make", "help")}  # fmt: skip
    times, peaks = interleave(variants, rounds)
    return summary("startup", times, dict.fromkeys(peaks), [])


BENCHES: dict[str, Callable[[RunConfig, int], dict[str, Any]]] = {"dora": dora, "generate": generate, "metrics": metrics, "startup": startup}
