"""python scripts/sweep.py --method lora [--share 0.2]: the same small learning-rate budget for every method, judged on validation rows."""

from __future__ import annotations

from kit.cli import announced, parser, run
from kit.errors import UserError


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--share", type=float, default=0.2, metavar="X", help="share of the training rows that each trial uses")
    flags = options.parse()
    share = flags.pop("share")
    if not 0 < share <= 1:
        raise UserError(f"--share must be above 0 and at most 1, got {share}")
    flags.pop("tuned", None)  # it asks for what is looked for here
    config = announced(flags)

    from kit.report.tables import sweep_table
    from kit.sweep import sweep

    sweep_table(sweep(config, share=share), config)


if __name__ == "__main__":
    run(main)
