"""The door: `sov-data COMMAND ...`."""

from __future__ import annotations

import sys

from data_prep import (
    adopt,
    decontaminate,
    groups,
    mix,
    pack,
    pairs,
    run,
    sample,
    scorer,
    stats,
    trajectories,
    unpaired,
    verify,
)
from data_prep.demo import corpus
from data_prep.journey import inspect_command, report_command
from data_prep.journey.card import card_command
from data_prep.media import command as encode_media
from data_prep.synth import command as synth
from data_prep.synth import probing_sets
from data_prep.synth.difficulty import command as difficulty
from megatron_sov.command_line import Parser, parser_of, run_program

COMMANDS = {"run": run, "synth": synth, "encode-media": encode_media, "pack": pack, "adopt": adopt,
            "mix": mix, "inspect": inspect_command, "report": report_command, "card": card_command,
            "stats": stats, "sample": sample, "verify": verify, "trajectories": trajectories,
            "groups": groups, "pairs": pairs, "unpaired": unpaired, "scorer": scorer,
            "difficulty": difficulty, "probing-sets": probing_sets, "decontaminate": decontaminate,
            "demo-corpus": corpus}


def build_parser() -> Parser:
    """Return the parser of all commands."""
    return parser_of("sov-data", "Prepare text for training.", COMMANDS)


def main(argv: list[str] | None = None) -> int:
    """Run `sov-data`; a `UserError` becomes one message and exit code 2."""
    return run_program(build_parser(), COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
