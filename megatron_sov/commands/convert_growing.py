"""`megatron-sov convert upcycle | deepen`: a larger model that begins as a smaller one."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from megatron_sov.errors import ExitCode


def add_growing(action: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Declare both actions."""
    upcycle = action("upcycle", "write a dense checkpoint as one with experts that computes the same")
    deepen = action("deepen", "write a checkpoint with more layers, which repeat its own")
    for sub in (upcycle, deepen):
        sub.add_argument("checkpoint", metavar="CHECKPOINT", type=Path,
                         help="checkpoint, or run (its newest one)")
        sub.add_argument("out", metavar="OUT", type=Path, help="checkpoint folder to write")
        sub.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is at OUT")
        sub.add_argument("--workers", type=int, default=1, metavar="N",
                         help="files at a time, each with two tensors in memory (default: %(default)s)")
    upcycle.add_argument("--experts", type=int, required=True, metavar="E", help="experts of each layer")
    upcycle.add_argument("--top-k", type=int, required=True, metavar="K", help="experts that a token visits")
    upcycle.add_argument("--granularity", type=int, default=1, metavar="G",
                         help="cut each copy of the dense network into G experts (default: %(default)s)")
    upcycle.add_argument("--noise", type=float, default=0.0, metavar="S",
                         help="add noise of S standard deviations of each matrix (default: %(default)s: the "
                              "model computes exactly what the dense one does)")
    upcycle.add_argument("--seed", type=int, default=0, metavar="N",
                         help="of the router and the noise (default: %(default)s)")
    upcycle.add_argument("--family", default="", metavar="NAME",
                         help="family of the model with experts (default: the one that fits)")
    deepen.add_argument("--layers", type=int, required=True, metavar="N", help="layers of the deeper model")
    deepen.add_argument("--how", choices=("stack", "interleave"), default="interleave",
                        help="stack: layers 0 1 2 0 1 2; interleave: 0 0 1 1 2 2 (default: %(default)s)")
    deepen.add_argument("--identity", action="store_true",
                        help="repeated layers write nothing at first, so the model computes what it did")


def run_growing(args: argparse.Namespace) -> int:
    """Run the chosen one; returns the exit code."""
    if args.action == "upcycle":
        from megatron_sov.convert.upcycling import Upcycling, upcycle

        upcycle(args.checkpoint, args.out, Upcycling(args.experts, args.top_k, args.granularity, args.noise,
                                                     args.seed, args.family),
                workers=args.workers, overwrite=args.overwrite)
    else:
        from megatron_sov.convert.deepening import Deepening, deepen

        deepen(args.checkpoint, args.out, Deepening(args.layers, args.how, args.identity),
               workers=args.workers, overwrite=args.overwrite)
    print(f"wrote checkpoint {args.out}")
    return ExitCode.OK
