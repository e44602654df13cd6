"""`python -m tests.oracle`: kept bytes per token and layer, by family and mode.

With `--timeline FAMILY MODE`, every storage alive at the worst instant of each phase of a step. With `--compare`, the peaks that the
estimator says beside the real ones, worst first; `--sample N` takes so many cells of the grid with padding, attention and dropout.
"""

import argparse
import sys

from tests.oracle import compare
from tests.oracle.models import FAMILIES, MODES
from tests.oracle.run import kept_per_layer, step

GC = {"off": None, "on": False, "reentrant": True}


def table(families: list[str], modes: list[str], B: int, S: int) -> None:
    """One row per family, one column per mode."""
    width = max(map(len, families)) + 2
    print(f"Kept for the backward pass per token and layer [bytes], {B} × {S}; weight-sized copies are included")
    for number, mode in enumerate(modes):
        print(f"{chr(ord('A') + number):>{width}}  {mode}")
    print(" " * width + "".join(f"{chr(ord('A') + number):>9}" for number in range(len(modes))))
    for family in families:
        print(f"{family:<{width}}", end="", flush=True)
        for mode in modes:
            try:
                num_bytes, _ = kept_per_layer(family, mode, B, S)
                print(f"{num_bytes / (B * S):>9.1f}", end="", flush=True)
            except Exception as error:
                print(f"{type(error).__name__[:8]:>9}", end="", flush=True)
        print()


def timeline(family: str, mode: str, B: int, S: int, layers: int, gc: bool | None) -> None:
    """What was alive at the peaks of the first step."""
    report = step(family, mode, B, S, layers, gc=gc, granularity_bytes=1)
    print(f"static {report.static_bytes}, inputs {report.input_bytes}, kept {report.kept_bytes}, gradients {report.gradient_bytes}")
    for name, peak in report.first.items():
        print(f"\n{name}: {peak.live_bytes} bytes above static, at {peak.op}\n{peak.table()}")


def compared(families: list[str], modes: list[str], number: int | None, seed: int, lines: int) -> str:
    """Whole steps, said and real."""
    known = [name for name in families if name in compare.MODELLED]
    if number is None:
        return compare.report([cell.run() for cell in compare.grid(families=known, modes=modes)], lines)
    cells = compare.grid(
        families=known,
        modes=modes,
        attentions=(None, "eager", "sdpa"),
        padded=(False, True),
        dropouts=(0.0, 0.05),
        sizes=((3, 48), (2, 100)),
    )
    return compare.report([cell.run() for cell in compare.sample(tuple(cells), number, seed)], lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.oracle", description=__doc__)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES), metavar="FAMILY")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES), metavar="MODE")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=24)
    parser.add_argument("--timeline", nargs=2, metavar=("FAMILY", "MODE"))
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--sample", type=int, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lines", type=int, default=40)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--gc", choices=list(GC), default="off")
    args = parser.parse_args()
    if args.compare:
        print(compared(args.families, args.modes, args.sample, args.seed, args.lines))
    elif args.timeline:
        timeline(*args.timeline, args.batch, args.length, args.layers, GC[args.gc])
    else:
        table(args.families, args.modes, args.batch, args.length)
    return 0


if __name__ == "__main__":
    sys.exit(main())
