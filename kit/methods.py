"""METHODS: each fine-tuning technique is one entry; flags, help, Make's list, report rows and tests derive from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Method:
    """What a technique quantises, what it trains, and with which settings of its own.

    `adapter` is lora, dora or none (then the weights themselves are trained); `projection` names the low-rank projection of the gradients.
    `settings` stand between the recipe and the recipe's block for the method. `parts` are the methods whose training it builds on, `papers` what
    the report refers to, by the keys of kit/report/references.py.
    """

    title: str
    about: str
    four_bit: bool = False
    adapter: str = "lora"
    projection: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    parts: tuple[str, ...] = ()
    papers: tuple[str, ...] = ()

    @property
    def full(self) -> bool:
        """Whether the weights themselves are trained."""
        return self.adapter == "none"

    @property
    def unused(self) -> frozenset[str]:
        """The settings that mean nothing to it: two runs that differ in one of these do not differ by it."""
        return frozenset(
            (("alpha", "dropout", "rslora", "loraplus_lr_ratio") if self.full else ("train_embeddings",))
            + (("rank", "target_modules") if self.full and not self.projection else ())
            + (() if self.projection else ("update_gap", "projection_scale"))
            + (() if self.adapter == "dora" else ("dora_kernel",))
        )


HIGH_RANK = {"rank": 128, "alpha": 32}
# Its scale is 11 times highrank's; the rate is that of Unsloth's notebooks for this rank, alpha and scale.
RSLORA = {**HIGH_RANK, "rslora": True, "learning_rate": 5e-5}
# The usual ratio of 2^4, at the lower rate that PEFT's and LLaMA-Factory's examples have with it.
LORAPLUS = {"learning_rate": 5e-5, "loraplus_lr_ratio": 16.0}
GALORE = {"rank": 128, "learning_rate": 1e-4, "projection_scale": 0.25}
# As its authors' code and transformers have it: a scale of 1, at a rate that moves the weights as far as GaLore's does.
APOLLO = {"rank": 128, "learning_rate": 2.5e-5, "projection_scale": 1.0}

METHODS: dict[str, Method] = {
    "qlora": Method(
        "QLoRA", "LoRA on a base model stored in 4-bit NF4 with double quantisation (Dettmers et al. 2023).",
        four_bit=True, papers=("qlora", "lora"),
    ),
    "lora": Method("LoRA", "Trained low-rank updates beside frozen weights (Hu et al. 2021).", papers=("lora",)),
    "dora": Method("DoRA", "LoRA on the direction of each weight row, with its magnitude trained apart (Liu et al. 2024).", adapter="dora", papers=("dora",)),
    "qdora": Method("QDoRA", "DoRA on a base model stored in 4-bit NF4.", four_bit=True, adapter="dora", papers=("dora", "qlora")),
    "loraplus": Method(
        "LoRA+", "LoRA whose B learns at a higher rate than its A (Hayou et al. 2024).",
        settings=LORAPLUS, papers=("loraplus", "lora"),
    ),
    "highrank": Method(
        "high-rank LoRA", 'LoRA of a high rank on attention and MLP, which one study called "modified GaLore".',
        settings=HIGH_RANK, papers=("lora",),
    ),
    "rslora": Method(
        "rsLoRA", "LoRA of a high rank scaled by alpha / sqrt(rank), so that a higher rank does not learn less (Kalajdzievski 2023).",
        settings=RSLORA, papers=("rslora", "lora"),
    ),
    "galore": Method(
        "GaLore", "All weights of the layers trained, with gradients and Adam's moments in a low-rank subspace (Zhao et al. 2024).",
        adapter="none", projection="galore", settings=GALORE, papers=("galore",),
    ),
    "apollo": Method(
        "APOLLO", "All weights of the layers trained, each channel scaled as Adam on a random low-rank projection would (Zhu et al. 2024).",
        adapter="none", projection="apollo", settings=APOLLO, papers=("apollo",),
    ),
    "full": Method("full", "Every weight trained: the reference.", adapter="none", settings={"learning_rate": 2e-5, "train_embeddings": True}),
    "hybrid": Method(
        "hybrid", "QLoRA for the first half of the steps, then its adapter widened to a higher rank and trained on, without changing the function in between.",
        four_bit=True, settings=HIGH_RANK, parts=("qlora",), papers=("qlora", "lora"),
    ),
    "combined": Method(
        "combined", "A weighted combination of the QLoRA and high-rank adapters (PEFT's linear, svd, ties or dare), chosen on validation rows.",
        settings=HIGH_RANK, parts=("qlora", "highrank"), papers=("qlora", "lora", "ties", "dare"),
    ),
}  # fmt: skip
