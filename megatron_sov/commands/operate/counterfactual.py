"""`megatron-sov counterfactual RUN --without SOURCE --output DIR`: a run as it would be had it never read
some documents."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from megatron_sov.base.errors import ExitCode, UserError
from megatron_sov.base.outputs import refuse_nowhere
from megatron_sov.base.settings import AtLeastOne, Flag, add_options, read_options
from megatron_sov.model.config.data import documents_named


@dataclass(frozen=True, kw_only=True)
class CounterfactualOptions:
    """Train a run again as if it had never read some documents, from the newest checkpoint before their first
    use and with all else in its order, and tell how far it comes from the run; a killed command goes on."""

    run: Annotated[Path, Flag("RUN")]
    """Run of `pretrain`, `sft` or `prefer`."""
    without: Annotated[tuple[str, ...], Flag("--without", "SOURCE[:FIRST[-LAST]]", many=True)]
    """Sources, or training documents of one by number from 0."""
    output: Annotated[Path, Flag(value="DIR", writes=True)]
    """Folder for the repetition, removal.json and removal.html."""
    control: bool = False
    """Repeat it with nothing left out too: every bit must be the run's; exit code 3 where one is not."""
    start_from: Annotated[Path | None, Flag("--from", "CHECKPOINT|RUN")] = None
    """Model that the run began from, where it did not begin from its seed."""
    reference: Annotated[Path | None, Flag(value="CHECKPOINT|RUN")] = None
    """Model of `prefer --reference`, where the run had one."""
    nproc: AtLeastOne | None = None
    """Processes (default: as many as the run had)."""
    key: Annotated[Path | None, Flag(value="FILE")] = None
    """Sign removal.json: a secret key of minisign without a password."""


add_arguments = partial(add_options, cls=CounterfactualOptions)


def run(typed: argparse.Namespace) -> int:
    """Repeat, compare and tell; returns that of a gate where the control is not the run.

    Raises:
        UserError: the run cannot be repeated, there are no such documents, or training fails.
    """
    args = read_options(CounterfactualOptions, typed)
    refuse_nowhere(args.output)
    if not args.without:
        raise UserError("--without: is missing; name sources or documents, such as --without news news2:0-99")
    for named in args.without:
        documents_named(named)

    from megatron_sov.audit.commitment import sign, try_key
    from megatron_sov.audit.counterfactual import plan_repetition, remove, sentence, write_removal
    from megatron_sov.audit.repeating import RepeatOutcome

    if args.key is not None:
        try_key(args.key)
    repetition = plan_repetition(args.run, args.without, args.output, args.start_from, args.nproc,
                                 reference=args.reference)
    removal = remove(repetition, with_control=args.control)
    args.output.mkdir(parents=True, exist_ok=True)
    file = write_removal(removal, args.output)
    if args.key is not None:
        sign(args.output / "removal.json", args.key)
    print(sentence(removal))
    print(f"{file}: opens in any browser without a network")
    return ExitCode.OK if removal.control in ("", RepeatOutcome.EQUAL) else ExitCode.GATE_FAILED
