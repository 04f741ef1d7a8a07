"""DoRA on the kit's path, on PEFT's, and LoRA: a training step and a generation step."""

from __future__ import annotations

from typing import Any

from kit.bench.harness import interleave, summary
from kit.config import RunConfig

# Layer widths of gemma-3-1b; two layers and a small vocabulary, so that the adapted layers are what is timed.
WIDE = {"hidden_size": 1152, "intermediate_size": 6912, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "num_hidden_layers": 2,
        "vocab_size": 2048, "query_pre_attn_scalar": 256}  # fmt: skip


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
