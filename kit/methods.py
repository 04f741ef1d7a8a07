"""METHODS: each fine-tuning technique is one entry; flags, help, Make's list, report rows and tests derive from it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """What a technique freezes, quantises and adapts."""

    title: str
    about: str
    four_bit: bool
    dora: bool


METHODS: dict[str, Method] = {
    "qlora": Method("QLoRA", "LoRA on a base model stored in 4-bit NF4 with double quantisation (Dettmers et al. 2023).", four_bit=True, dora=False),
    "lora": Method("LoRA", "Trained low-rank updates beside frozen 16-bit weights (Hu et al. 2021).", four_bit=False, dora=False),
    "dora": Method("DoRA", "LoRA on the direction of each weight row, with its magnitude trained apart (Liu et al. 2024).", four_bit=False, dora=True),
}
