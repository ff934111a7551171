"""The program `layout-proof FILE.py:NAME --tp 8 ...`; torch is imported after the options are read."""

import argparse
import json
import sys
import warnings
from collections.abc import Sequence

from layout_proof.layout import CannotPlay, Layout

DESCRIPTION = """Run two training steps of a Megatron-Core model on all ranks of a layout, in this process and
without a GPU, and compare losses, gradients, gradient norm, optimizer state and weights with one rank.

FILE.py:NAME is a function build(config=None, pre_process=True, post_process=True, vp_stage=None) that returns
a GPTModel or HybridModel, or (model, loss), with its own config or the given one."""
EPILOG = "exit codes: 0 equal, 3 differs, 2 cannot be simulated (one line says why)"
SIZES = {"tp": "tensor parallel size", "pp": "pipeline stages", "vpp": "model chunks of a stage",
         "cp": "context parallel size", "ep": "expert parallel size",
         "etp": "tensor parallel size of experts (0: --tp)", "ranks": "processes (0: one replica)"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `layout-proof` and return its exit code."""
    options = vars(build_parser().parse_args(argv))
    builder, full_masks, as_json = (options.pop(name) for name in ("builder", "full_masks", "json"))
    options["ranks"] = options["ranks"] or Layout(**options | {"ranks": 1}).replica_ranks
    warnings.filterwarnings("ignore", module="megatron|torch")
    try:
        layout = Layout(**options)
        layout.check()
        from layout_proof.proof import EQUAL, prove_layout
        from layout_proof.small_model import load_builder

        verdict = prove_layout(load_builder(builder), layout, full_masks=full_masks)
    except CannotPlay as e:
        print(json.dumps({"outcome": "cannot be simulated", "reason": str(e)}) if as_json else
              f"layout-proof: {e}", file=sys.stdout if as_json else sys.stderr)
        return 2
    print(verdict.to_json() if as_json else verdict)
    return 0 if verdict.outcome == EQUAL else 3


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("layout-proof", description=DESCRIPTION, epilog=EPILOG,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("builder", metavar="FILE.py:NAME", help="function that builds the model")
    for name, text in SIZES.items():
        parser.add_argument(f"--{name}", type=int, metavar="N", default=0 if name in ("etp", "ranks") else 1,
                            help=text)
    parser.add_argument("--sp", action="store_true", help="sequence parallelism")
    parser.add_argument("--distributed-optimizer", action="store_true", help="shard the optimizer state")
    parser.add_argument("--full-masks", action="store_true", help="every token is learned; default: 70 %%")
    parser.add_argument("--json", action="store_true", help="print the verdict as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
