"""The door: `sov-data COMMAND ...`."""

from __future__ import annotations

import argparse
import sys

from data_prep import inspect_tokens, mix, pack, sample, stats, trajectories, verify
from data_prep.demo import corpus
from megatron_sov.command_line import exit_code, parser_of

COMMANDS = {"pack": pack, "mix": mix, "inspect": inspect_tokens, "stats": stats, "sample": sample,
            "verify": verify, "trajectories": trajectories, "demo-corpus": corpus}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    return parser_of("sov-data", "Prepare text for training.", COMMANDS)


def main(argv: list[str] | None = None) -> int:
    """Run `sov-data`; a `UserError` becomes one message and exit code 2."""
    args = build_parser().parse_args(argv)
    return exit_code(lambda: COMMANDS[args.command].run(args))


if __name__ == "__main__":
    sys.exit(main())
