"""`megatron-sov bundle --output DIR [--python X.Y] [--platform TAG] [--extra NAME] [--with DIR]`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from megatron_sov.base.settings import Flag, add_options, read_options
from megatron_sov.commands.shared_options import OverwriteOptions


@dataclass(frozen=True, kw_only=True)
class BundleOptions(OverwriteOptions):
    """Options of `bundle`."""

    output: Annotated[Path, Flag(value="DIR")]
    """Folder to write."""
    python: Annotated[str, Flag(value="X.Y")] = ""
    """Version of Python over there (default: this one's)."""
    platform: Annotated[tuple[str, ...], Flag(value="TAG")] = ()
    """Platform tag of wheels that run there, e.g. manylinux_2_28_x86_64; several in order of preference
    (default: this machine's)."""
    extra: Annotated[tuple[str, ...], Flag(value="NAME")] = ()
    """Optional part to take along, e.g. dev."""
    folders: Annotated[tuple[Path, ...], Flag("--with", "DIR")] = ()
    """Tokenizer, Hugging Face folder or checkpoint to take along."""
    source: Annotated[Path | None, Flag(value="DIR")] = None
    """Checkout of megatron-sov (default: what this command runs from)."""


add_arguments = partial(add_options, cls=BundleOptions)


def run(typed: argparse.Namespace) -> int:
    """Gather the bundle and say how it is installed.

    Raises:
        UserError: something is missing, or pip cannot find a wheel.
    """
    args = read_options(BundleOptions, typed)
    from megatron_sov.operate.bundle.gathering import Bundle, gather, own_source

    bundle = Bundle(args.source or own_source(), args.python, args.platform, args.extra,
                    args.folders)
    manifest = gather(bundle, args.output, overwrite=args.overwrite)
    num_bytes = sum(record.size_bytes for record in manifest.files.values())
    print(f"{args.output}: {manifest.content['wheels']} wheels for Python {bundle.python_version} on "
          f"{bundle.machine}, {num_bytes / 1e6:,.0f} MB; copy it, then: "
          f"sh {args.output.name}/install.sh ENVIRONMENT")
    return 0
