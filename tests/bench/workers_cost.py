"""What workers gain and cost, as ratios within one run.

    python tests/bench/workers_cost.py --model DIRECTORY --dataset FILE [--workers 2]

Collects the same samples in this process, on one worker and on several, in alternation, and prints
tokens a second of each against this process. With one thread a process, so that two of them on two
processors do what one on one does: set OPENBLAS_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import median

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from mlxfun import Session
from mlxfun.calibration.options import CollectOptions
from mlxfun.data.options import DatasetOptions
from mlxfun.distributed.start import start, stop


def rate(session: Session, options: CollectOptions) -> float:
    """Tokens a second of one collect."""
    began = time.perf_counter()
    tokens = session.collect(options).tokens
    return tokens / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dataset", default="demo:mixed")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    session = Session.open(args.model)
    data = DatasetOptions(args.dataset, max_samples=args.samples)
    options = CollectOptions(data, max_batch=2)
    rate(session, options)
    ratios: dict[int, list[float]] = {1: [], args.workers: []}
    for _ in range(args.rounds):
        for count, found in ratios.items():
            alone = rate(session, options)
            start(session, count)
            rate(session, options)
            found.append(rate(session, options) / alone)
            stop(session)
    for count, found in ratios.items():
        print(f"{count} workers: {median(found):.2f} of this process's tokens/s ({found})")
    session.close()


if __name__ == "__main__":
    main()
