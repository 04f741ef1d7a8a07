"""BLEU-4 and ROUGE-L: the libraries without intervals, and the kit with them."""

from __future__ import annotations

import random
from typing import Any

from kit.bench.harness import interleave, summary
from kit.config import RunConfig
from kit.metrics import METRICS
from kit.statistics import intervals


def metrics(_: RunConfig, rounds: int, rows: int = 6000) -> dict[str, Any]:
    """BLEU-4 and ROUGE-L of composed replies of about 200 words: sacreBLEU and rouge_score without intervals, and the kit with 10,000 resamples."""
    made = composed(rows)
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


def composed(rows: int, seed: int = 0) -> list[dict[str, str]]:
    """References of 200 words, the same for every seed, and predictions that keep a random share of them."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 8))) for _ in range(3000)]
    pairs = [(" ".join(rng.choices(words, k=200)), rng.random()) for _ in range(rows)]
    rng.seed(seed)
    return [{"reference": text, "prediction": " ".join(w if rng.random() < keep else rng.choice(words) for w in text.split())} for text, keep in pairs]
