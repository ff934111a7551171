"""`sov-data encode-media`: records that name pictures, sounds and videos become text that `sov-data pack`
reads."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from data_prep.media.settings import MediaSettings
from megatron_sov.settings import AtLeastOne, Flag, add_options, num_cores, only_with, read_options
from megatron_sov.work.arrays import ClusterOptions


@dataclass(frozen=True, kw_only=True)
class EncodeMediaOptions(ClusterOptions):
    """Turn records that name pictures, sounds and videos into text in which discrete tokens stand in their
    place, and into banks of what continuous encoders will see; `sov-data pack` reads both.

    A killed command continues where it was when it is run again."""

    input: Annotated[tuple[Path, ...], Flag(many=True)]
    """JSONL files, or folders of them: chats ("messages") or documents ("content") whose parts are {"type":
    "text" | "image" | "audio" | "video", ...}."""
    output: Annotated[Path, Flag(value="DIR")]
    """Folder for what is written."""
    settings: MediaSettings
    threads: AtLeastOne = field(default_factory=num_cores)
    """Media that are decoded at a time, each by a process of its own; the output does not depend on it
    (default: this machine's cores)."""
    workers: Annotated[AtLeastOne | None, only_with("cluster")] = None
    """With --cluster: jobs that encode (default: 4)."""
    overwrite: bool = False
    """Replace what is already there."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_options(parser, EncodeMediaOptions)


def run(typed: argparse.Namespace) -> int:
    """Run `sov-data encode-media`; returns 0."""
    args = read_options(EncodeMediaOptions, typed)
    from data_prep.media.running import Order, run_order

    order = Order(args.input, args.output, args.settings, args.threads, args.overwrite)
    if args.cluster:
        from data_prep.media.slurm_array import submit_order

        submit_order(order, args, args.workers or 4)
        return 0
    run_order(order)
    return 0
