"""The door: `megatron-sov COMMAND ...`.

Each command is a file of `commands/` with `add_arguments(parser)` and `run(args) -> exit code`.  Only the chosen
command's module is imported, and none of them imports torch before its arguments are parsed and checked.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from dataclasses import dataclass

from megatron_sov.errors import ExitCode, GateFailed, StopRequested, UserError, nearest
from megatron_sov.obs.process_start import process_started_s


@dataclass(frozen=True)
class Command:
    """One sub-command: the module that implements it and its line in `--help`."""

    module: str
    """Dotted path of the module with `add_arguments` and `run`."""
    help: str
    """One line for `megatron-sov --help`."""


COMMANDS = {
    "pretrain": Command("megatron_sov.commands.pretrain", "train a model from token shards, from scratch or --from a checkpoint"),
    "extend": Command("megatron_sov.commands.extend", "train on at longer contexts, stage by stage, each behind a needle gate"),
    "sft": Command("megatron_sov.commands.sft", "fine-tune on chats, with an auxiliary text term"),
    "convert": Command("megatron_sov.commands.convert", "from-hf, to-hf, verify, inspect: checkpoints, Hugging Face folders"),
    "generate": Command("megatron_sov.commands.generate", "continue prompts with a checkpoint or a Hugging Face folder"),
    "eval": Command("megatron_sov.commands.eval", "ppl, needle, bigram, logits: judge a checkpoint or a Hugging Face folder"),
    "submit": Command("megatron_sov.commands.submit", "submit a stage or a chain of stages to a Slurm cluster"),
    "status": Command("megatron_sov.commands.status", "how runs stand: step, speed, time left, restarts, use of time"),
    "logs": Command("megatron_sov.commands.logs", "what a run's processes wrote, across ranks and restarts"),
    "plan": Command("megatron_sov.commands.plan", "what a run will do at each step: learning rate, batch size, blends"),
    "report": Command("megatron_sov.commands.report", "write the self-contained HTML report of one or more runs"),
    "bundle": Command("megatron_sov.commands.bundle", "gather wheels, code and folders for a cluster without a network"),
    "doctor": Command("megatron_sov.commands.doctor", "what this machine has, what is missing, and how to add it"),
    "recipes": Command("megatron_sov.commands.recipes", "list the recipes, or print one with every setting and its source"),
}


def build_parser() -> argparse.ArgumentParser:
    """Return the top-level parser; sub-commands parse their own arguments."""
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {c.help}" for name, c in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="megatron-sov", usage="megatron-sov COMMAND ...", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train your own language model, from raw text to a Hugging Face folder.",
        epilog=f"commands:\n{lines}\n\nmegatron-sov COMMAND --help explains one of them.\n"
               "exit codes: 0 complete, 2 your input needs a change, 3 a gate did not pass, 75 stopped with everything saved,\n"
               "76 a step hung, 77 a process gave wrong bits",
    )
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def run_command(argv: list[str], began_s: float) -> int:
    """Parse and run one command; raises what the command raises.

    Args:
        argv: its name and arguments.
        began_s: Unix time at which it began; commands find it in their arguments.
    """
    parser = build_parser()
    if not argv or argv[0] in ("-h", "--help"):
        parser.print_help()
        return ExitCode.OK if argv else ExitCode.USER_ERROR
    name, *rest = argv
    if name not in COMMANDS:
        raise UserError(f"command {name!r}: does not exist{nearest(name, COMMANDS)} (commands: {', '.join(COMMANDS)})")
    module = importlib.import_module(COMMANDS[name].module)
    sub = argparse.ArgumentParser(prog=f"megatron-sov {name}", description=COMMANDS[name].help)
    module.add_arguments(sub)
    sub.set_defaults(began_s=began_s)
    return int(module.run(sub.parse_args(rest)))


def main(argv: list[str] | None = None) -> int:
    """Run `megatron-sov`; a `UserError` becomes one message and `ExitCode.USER_ERROR`.

    Args:
        argv: command and arguments; None: those of this process, which then began when the process did.
    """
    try:
        if argv is None:
            return run_command(sys.argv[1:], process_started_s())
        return run_command(argv, time.time())
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return ExitCode.USER_ERROR
    except GateFailed as e:
        print(f"gate: {e}", file=sys.stderr)
        return ExitCode.GATE_FAILED
    except StopRequested as e:
        print(f"stopped: {e}", file=sys.stderr)
        return ExitCode.STOPPED
    except BrokenPipeError:
        return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
