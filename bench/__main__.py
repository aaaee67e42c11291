"""``python -m bench``: list the benchmarks, run one or all."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

from openmae.errors import OpenMAEError

from .report import RESULTS

BENCHMARKS = {  # a module of this package each, with run(quick: bool) -> Report
    "pretrain": "images/s of a pretraining step, compared with dense ConvNeXt V2, transformers and timm",
    "input": "images/s from JPEG files to batches, compared with torchvision and timm on PIL",
    "attention": "both forms of attention on a CPU, by precision and number of tokens",
    "memory": "peak memory of a pretraining step, compared with the same",
    "startup": "seconds until commands answer, and until the first step of a training",
    "scaling": "how the time of a step grows with batch, resolution, visible units and depth",
    "checkpoints": "what writing checkpoints during training costs its steps",
    "decoding": "a pretraining step with fewer targets and with cross-attention, compared with the paper's decoder",
    "decoding_cost": "what these cost in accuracy on the quickstart's digits",
    "plan": "what a large pretraining needs: operations, memory, hours at stated rates of GPUs",
    "batches": "memory of pretraining on a GPU, and the largest batches that fit, counted without one",
    "gpu": "on a machine with a GPU, in less than eight minutes: steps, runs, loading, and equality with the CPU",
    "deploy": "images/s of ONNX Runtime fp32 and int8, compared with torch, on the CPU",
    "serve": "latency and requests/s of `mae serve` at 1 and 8 clients",
    "recipes": "accuracies with train.recipe auto, tao and paper on five small image sets",
    "automl": "what 20 trials find, and the epochs they take, by algorithm",
}
# no part of pretraining's speed, or an hour long; plan and batches measure nothing
ONLY_BY_NAME = {
    "attention",
    "automl",
    "batches",
    "checkpoints",
    "decoding",
    "decoding_cost",
    "deploy",
    "gpu",
    "plan",
    "recipes",
    "serve",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks that ``argv`` names (default: the command line) and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Without a name: list the benchmarks.")
    parser.add_argument("name", nargs="?", choices=[*BENCHMARKS, "all"], help="which one")
    parser.add_argument("--quick", action="store_true", help="small models, few repetitions: shows that it runs")
    args = parser.parse_args(argv)
    if args.name is None:
        width = max(map(len, BENCHMARKS))
        print("\n".join(f"{name:{width}}  {about}" for name, about in BENCHMARKS.items()))
        return 0
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for name in [name for name in BENCHMARKS if name not in ONLY_BY_NAME] if args.name == "all" else [args.name]:
        try:
            report = importlib.import_module(f"bench.{name}").run(args.quick)
        except OpenMAEError as error:
            print(error, file=sys.stderr)
            return error.exit_code
        print(report.write(RESULTS, name, args.quick))
    return 0


if __name__ == "__main__":
    sys.exit(main())
