"""python scripts/bench.py dora|generate|metrics|startup [--rounds 5] [--json FILE]: both sides interleaved in one process, with their ratio."""

from __future__ import annotations

from pathlib import Path

from kit.cli import announce, parser, run
from kit.config import resolve
from kit.errors import UserError, unknown


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("what", help="dora, generate, metrics or startup")
    options.add_argument("--rounds", type=int, default=5, metavar="N", help="timed rounds after a warm-up [5]")
    options.add_argument("--json", metavar="FILE", help="write the figures to a file")
    flags = options.parse()
    what, rounds, path = (flags.pop(k, None) for k in ("what", "rounds", "json"))

    from kit.bench import BENCHES

    if what not in BENCHES:
        raise UserError(unknown("bench", what, BENCHES))
    if rounds < 1:
        raise UserError(f"--rounds must be at least 1, got {rounds}")
    config = resolve(flags)
    announce(config, flags)

    from kit.files import write_json
    from kit.report.tables import bench_table

    found = BENCHES[what](config, rounds)
    bench_table(found)
    if path:
        write_json(Path(path), found)


if __name__ == "__main__":
    run(main)
