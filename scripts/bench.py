"""python scripts/bench.py WHAT [--rounds N] [--json FILE]: both sides of a claim of speed, interleaved, with their ratio.

data      the data stage beside plain datasets and chat-template tokenisation
dora      a training and a generation step of LoRA, the kit's DoRA and PEFT's
generate  replies one by one, in random batches, and as the kit makes them
metrics   BLEU-4 and ROUGE-L by their libraries, and by the kit with intervals
report    the report of 25 runs of 6,000 replies
scaling   training cost as rows, length and rank grow; with --json also a figure beside the file
startup   help, a wrong flag, and Make's list
train     the training step beside a plain transformers + TRL + PEFT script; every method, or --method alone

dora takes --only "NF4 autocast" (part of a setting's name): all 15 take half an hour on a CPU, and longer on a GPU, where each is compiled.
train and scaling take --model-config gemma-3-1b, that shape with random weights; on a CPU with --layers 2.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

from kit.cli import announced, parser, run
from kit.config import BASE
from kit.errors import UserError, unknown


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("what", nargs="?", help="data, dora, generate, metrics, report, scaling, startup or train")
    options.add_argument("--rounds", type=int, metavar="N", help="timed rounds after a warm-up")
    options.add_argument("--json", metavar="FILE", help="write the figures to a file")
    options.add_argument("--model-config", metavar="NAME", help="train, scaling: a model of this shape with random weights: gemma-3-1b")
    options.add_argument("--only", metavar="TEXT", help="dora: only settings with this in their name")
    options.add_argument("--layers", type=int, metavar="N", help="only the first N layers of --model-config")
    flags = options.parse()
    what, rounds, path, shape, layers, only = (flags.pop(k, None) for k in ("what", "rounds", "json", "model_config", "layers", "only"))

    from kit.bench import BENCHES, OF_METHODS, ROUNDS

    if what is None:
        raise UserError(f"say which bench: {', '.join(BENCHES)}")
    if what not in BENCHES:
        raise UserError(unknown("bench", what, BENCHES))
    if rounds is not None and rounds < 1:
        raise UserError(f"--rounds must be at least 1, got {rounds}")
    if shape and what not in OF_METHODS:
        raise UserError(f"--model-config is for {' and '.join(OF_METHODS)}")
    if layers is not None and (layers < 1 or not shape):
        raise UserError("--layers must be at least 1 and goes with --model-config")
    if only and what != "dora":
        raise UserError("--only is for dora")
    config = announced({"method": BASE} | flags)

    from kit.bench.harness import ONLY, measure
    from kit.bench.shapes import shaped
    from kit.files import write_json
    from kit.report.tables import bench_table

    ONLY[:] = [only] if only else []
    with shaped(config, shape, layers) if shape else nullcontext(config) as used:
        found = measure(what, used, rounds or ROUNDS[what], sys.argv[1:])
    bench_table(found)
    if path:
        write_json(Path(path), found)
        if what == "scaling":
            from kit.bench.scaling import draw

            draw(found, Path(path))


if __name__ == "__main__":
    run(main)
