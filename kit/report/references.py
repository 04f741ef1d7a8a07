"""What the report rests on: the papers and programs that concern its runs and the terms that it uses, each beside the topic that calls for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kit.forgetting import HUB
from kit.methods import METHODS, Method
from kit.report.blocks import Block, Bullets, Heading
from kit.report.rows import SCORES, SECONDARY, Row
from kit.report.verdicts import Verdict

PAPERS = {
    "alpaca": "Taori, R., et al. (2023). Stanford Alpaca: An Instruction-following LLaMA model. github.com/tatsu-lab/stanford_alpaca.",
    "apollo": "Zhu, H., et al. (2024). APOLLO: SGD-like Memory, AdamW-level Performance. MLSys 2025. arXiv:2412.05270.",
    "bleu": "Papineni, K., Roukos, S., Ward, T., Zhu, W.-J. (2002). BLEU: a Method for Automatic Evaluation of Machine Translation. ACL 2002, 311–318.",
    "bootstrap": "Efron, B., Tibshirani, R. J. (1993). An Introduction to the Bootstrap. Chapman & Hall. (Bootstrap-t: section 12.5.)",
    "chrf": "Popović, M. (2015). chrF: character n-gram F-score for automatic MT evaluation. WMT 2015, 392–395.",
    "dare": "Yu, L., et al. (2023). Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch. ICML 2024. "
            "arXiv:2311.03099.",
    "distinct": "Li, J., et al. (2016). A Diversity-Promoting Objective Function for Neural Conversation Models. NAACL-HLT 2016, 110–119. arXiv:1510.03055.",
    "dora": "Liu, S.-Y., et al. (2024). DoRA: Weight-Decomposed Low-Rank Adaptation. ICML 2024. arXiv:2402.09353.",
    "galore": "Zhao, J., et al. (2024). GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection. ICML 2024. arXiv:2403.03507.",
    "gemma": "Gemma Team (2025). Gemma 3 Technical Report. arXiv:2503.19786.",
    "gptneo": "Black, S., et al. (2021). GPT-Neo: Large Scale Autoregressive Language Modeling with Mesh-Tensorflow. Zenodo. "
              "doi:10.5281/zenodo.5297715.",
    "harness": "Gao, L., et al. (2021). A framework for few-shot language model evaluation. Zenodo. doi:10.5281/zenodo.5371628.",
    "holm": "Holm, S. (1979). A Simple Sequentially Rejective Multiple Test Procedure. Scandinavian Journal of Statistics 6(2), 65–70.",
    "kappa": "Cohen, J. (1968). Weighted kappa: Nominal scale agreement with provision for scaled disagreement or partial credit. Psychological Bulletin "
             "70(4), 213–220.",
    "krippendorff": "Krippendorff, K. (2011). Computing Krippendorff's Alpha-Reliability. University of Pennsylvania.",
    "lora": "Hu, E. J., et al. (2021). LoRA: Low-Rank Adaptation of Large Language Models. ICLR 2022. arXiv:2106.09685.",
    "loraplus": "Hayou, S., Ghosh, N., Yu, B. (2024). LoRA+: Efficient Low Rank Adaptation of Large Models. ICML 2024. arXiv:2402.12354.",
    "peft": "Mangrulkar, S., et al. (2022). PEFT: State-of-the-art Parameter-Efficient Fine-Tuning methods. github.com/huggingface/peft.",
    "qlora": "Dettmers, T., Pagnoni, A., Holtzman, A., Zettlemoyer, L. (2023). QLoRA: Efficient Finetuning of Quantized LLMs. NeurIPS 2023. arXiv:2305.14314.",
    "randomisation": "Riezler, S., Maxwell, J. T. (2005). On Some Pitfalls in Automatic Evaluation and Significance Testing for MT. ACL Workshop on "
                     "Intrinsic and Extrinsic Evaluation Measures for MT and/or Summarization, 57–64.",
    "rouge": "Lin, C.-Y. (2004). ROUGE: A Package for Automatic Evaluation of Summaries. Text Summarization Branches Out, 74–81.",
    "rslora": "Kalajdzievski, D. (2023). A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA. arXiv:2312.03732.",
    "sacrebleu": "Post, M. (2018). A Call for Clarity in Reporting BLEU Scores. WMT 2018, 186–191. arXiv:1804.08771.",
    "ties": "Yadav, P., et al. (2023). TIES-Merging: Resolving Interference When Merging Models. NeurIPS 2023. arXiv:2306.01708.",
    "trl": "von Werra, L., et al. (2020). TRL: Transformers Reinforcement Learning. github.com/huggingface/trl.",
    "tulu": "Ivison, H., et al. (2023). Camels in a Changing Climate: Enhancing LM Adaptation with Tulu 2. arXiv:2311.10702.",
    "ultrachat": "Ding, N., et al. (2023). Enhancing Chat Language Models by Scaling High-quality Instructional Conversations. EMNLP 2023. arXiv:2305.14233.",
    "unsloth": "Han, D., Han, M., Unsloth team (2023). Unsloth. github.com/unslothai/unsloth.",
    "wikitext": "Merity, S., Xiong, C., Bradbury, J., Socher, R. (2016). Pointer Sentinel Mixture Models. ICLR 2017. arXiv:1609.07843.",
    "wilson": "Wilson, E. B. (1927). Probable Inference, the Law of Succession, and Statistical Inference. Journal of the American Statistical Association "
              "22(158), 209–212.",
}  # fmt: skip

TERMS = {
    "NF4": "4-bit NormalFloat: each weight is one of 16 values, spaced like quantiles of a normal distribution and scaled by block. Double quantisation "
           "stores the scales in 8 bits too.",
    "13a": "the rules by which sacreBLEU splits Latin text into words and punctuation, those of the script mteval-v13a.",
    "chrF": "F-score of the characters' 1- to 6-grams in reply and reference, with recall weighed higher.",
    "distinct-n": "the share of a reply's n-grams that differ from each other, 1 where none is repeated.",
    "equivalence margin": "the largest difference that is taken not to matter.",
    "Holm's correction": "raises p for the number of comparisons, so that the chance of any false better or worse among them stays below 5%.",
    "KL divergence": "how far one distribution of the next token is from another; 0 if they are the same.",
    "nat": "unit of natural logarithms, 1.44 bits; x nats a token are a perplexity of e to the power of x.",
    "Krippendorff's alpha": "agreement of raters beyond chance, of scores that have an order (ordinal): 1 is full agreement, 0 what chance gives.",
    "weighted kappa": "Cohen's, agreement beyond chance of two series of scores, in which a disagreement counts by its square (quadratic weights).",
}  # fmt: skip


class Topic(NamedTuple):
    """Keys of PAPERS and TERMS."""

    papers: tuple[str, ...] = ()
    terms: tuple[str, ...] = ()


# By how the hub's names of models and datasets begin.
OF_NAMES = {
    "google/gemma-3-": Topic(("gemma",)), "EleutherAI/gpt-neo-": Topic(("gptneo",)), "tatsu-lab/alpaca": Topic(("alpaca",)),
    "allenai/tulu-v2-sft-mixture": Topic(("tulu",)), "HuggingFaceH4/ultrachat_200k": Topic(("ultrachat",)),
}  # fmt: skip
TRAINED = Topic(("unsloth", "trl"), ("nat",))
SCORED = Topic(("bleu", "sacrebleu", "rouge", "bootstrap"))
OF_SECONDARY = Topic(("chrf", "distinct", "wilson"), ("chrF", "distinct-n"))
BY_13A = Topic(terms=("13a",))
COMPARED = Topic(("randomisation", "holm"), ("Holm's correction", "equivalence margin"))
FORGOTTEN = Topic(terms=("KL divergence", "nat"))
ON_WIKITEXT = Topic(("wikitext",))
ON_TASKS = Topic(("harness",))
RATED = Topic(("krippendorff", "kappa"), ("Krippendorff's alpha", "weighted kappa"))


def topics(rows: Sequence[Row], found: Sequence[Verdict], rated: Mapping[str, Any] | None) -> list[Topic]:
    """What this report speaks of."""
    methods = [r["method"] for r in rows if r["method"] in METHODS]
    configs = [r["config"] for r in rows if r["config"]]
    names = {str(c.get("model")) for c in configs} | {s.partition("=")[2] for c in configs for s in c.get("source") or []}
    done = [r for r in rows if r["status"] == "done"]
    if_so = [
        (TRAINED, methods), (SCORED, any(r[m] for r in rows for m in SCORES)), (OF_SECONDARY, any(r[m] for r in rows for m in SECONDARY)),
        (BY_13A, any(r["score_tokens"] == "13a" for r in done)), (COMPARED, found), (FORGOTTEN, any(r["forgetting"] for r in rows)),
        (ON_WIKITEXT, any((r["forgetting"] or {}).get("text") == HUB["wikitext"].name for r in rows)), (ON_TASKS, any(r["tasks"] for r in rows)),
        (RATED, rated),
    ]  # fmt: skip
    named = [topic for start, topic in OF_NAMES.items() if any(name.startswith(start) for name in names)]
    return [*(_of(METHODS[m]) for m in methods), *named, *(topic for topic, is_so in if_so if is_so)]


def _of(method: Method) -> Topic:
    return Topic(method.papers + (() if method.full else ("peft",)), ("NF4",) if method.four_bit else ())


def references(rows: Sequence[Row], found: Sequence[Verdict], rated: Mapping[str, Any] | None) -> list[Block]:
    """The terms and the papers of the report, in small type."""
    spoken_of = topics(rows, found, rated)
    terms = {term for topic in spoken_of for term in topic.terms}
    papers = {PAPERS[key] for topic in spoken_of for key in topic.papers}
    out: list[Block] = [Heading("Terms"), Bullets([f"{term}: {TERMS[term]}" for term in TERMS if term in terms], small=True)] if terms else []
    return out + ([Heading("References"), Bullets(sorted(papers, key=str.lower), small=True)] if papers else [])
