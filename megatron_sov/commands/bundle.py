"""`megatron-sov bundle --output DIR [--python X.Y] [--platform TAG] [--extra NAME] [--with DIR]`."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megatron-sov bundle`."""
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--python", default="", metavar="X.Y",
                        help="version of Python over there (default: this one's)")
    parser.add_argument("--platform", action="append", default=[], metavar="TAG",
                        help="platform tag of wheels that run there, e.g. manylinux_2_28_x86_64; "
                             "several in order of preference (default: this machine's)")
    parser.add_argument("--extra", action="append", default=[], metavar="NAME",
                        help="optional part to take along, e.g. dev")
    parser.add_argument("--with", dest="folders", action="append", default=[], type=Path, metavar="DIR",
                        help="tokenizer, Hugging Face folder or checkpoint to take along")
    parser.add_argument("--source", type=Path, metavar="DIR",
                        help="checkout of megatron-sov (default: what this command runs from)")
    parser.add_argument("--overwrite", action="store_true", help="replace a bundle that is already there")


def run(args: argparse.Namespace) -> int:
    """Gather the bundle and say how it is installed.

    Raises:
        UserError: something is missing, or pip cannot find a wheel.
    """
    from megatron_sov.bundle.gathering import Bundle, gather, own_source

    bundle = Bundle(args.source or own_source(), args.python, tuple(args.platform), tuple(args.extra),
                    tuple(args.folders))
    manifest = gather(bundle, args.output, overwrite=args.overwrite)
    num_bytes = sum(record.size_bytes for record in manifest.files.values())
    print(f"{args.output}: {manifest.content['wheels']} wheels for Python {bundle.python_version} on "
          f"{bundle.machine}, {num_bytes / 1e6:,.0f} MB; copy it, then: "
          f"sh {args.output.name}/install.sh ENVIRONMENT")
    return 0
