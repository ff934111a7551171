"""The door: `sov-data COMMAND ...`."""

from __future__ import annotations

import argparse
import sys

from data_prep import inspect_tokens, mix, pack, sample, stats, trajectories, verify
from data_prep.demo import corpus
from megatron_sov.errors import ExitCode, UserError

COMMANDS = {"pack": pack, "mix": mix, "inspect": inspect_tokens, "stats": stats, "sample": sample, "verify": verify,
            "trajectories": trajectories, "demo-corpus": corpus}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(prog="sov-data", description="Prepare text for training.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=module.HELP))
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run `sov-data`; a `UserError` becomes one message and exit code 2."""
    args = build_parser().parse_args(argv)
    try:
        return COMMANDS[args.command].run(args)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return ExitCode.USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
