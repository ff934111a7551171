"""`megatron-sov submit STAGE --cluster P --nodes N ARGUMENTS...` and `megatron-sov submit chain CHAIN`."""

import argparse
import shlex

from megatron_sov.base.command_line import HelpFormatter, Parser, import_reference
from megatron_sov.base.errors import ExitCode, Fix, UserError
from megatron_sov.base.settings import add_options, read_options
from megatron_sov.commands.operate.submit.chain import list_chains
from megatron_sov.commands.operate.submit.stage_parsers import STAGE_PARSERS
from megatron_sov.commands.shared_options import list_option_words
from megatron_sov.operate.slurm.stages import STAGES, SubmitOptions

RUN_STAGE = "megatron_sov.commands.operate.submit.submit_run:submit_stage"
RUN_CHAIN = "megatron_sov.commands.operate.submit.chain_run:run_chain"
"""Imported after parsing, because they import numpy."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments; options for `submit` may precede the stage or follow it."""
    parser.epilog = ("ARGUMENTS are the arguments of the stage's command: megatron-sov pretrain, extend, "
                     "sft, prefer, distill, convert, eval, eval lm, rl run, rl train, rl generate, rl "
                     "reward; sov-tokenizer; sov-data.  Packaged chains, besides your own files: "
                     f"{', '.join(list_chains())}.")
    parser.add_argument("stage", metavar="STAGE", help=f"{', '.join(STAGES)}, or chain: several stages, from "
                                                       "a file")
    parser.add_argument("arguments", metavar="ARGUMENTS", nargs=argparse.REMAINDER,
                        help="arguments for the stage's command, or the chain file")
    add_options(parser, SubmitOptions)
    parser.set_defaults(stages=(*STAGES, "chain"))


def run(typed: argparse.Namespace) -> int:
    """Submit a stage or a chain; return the exit code."""
    if {"-h", "--help"} & set(typed.arguments):
        _print_help(typed.stage)
        return ExitCode.OK
    parser = Parser(prog="megatron-sov submit", add_help=False)
    add_options(parser, SubmitOptions)
    # options for `submit` may be mixed with the stage's arguments: parse them first
    typed, argv = parser.parse_known_args(typed.arguments, typed)
    options = read_options(SubmitOptions, typed)
    if typed.stage == "chain":
        _check_chain(argv, options)
        import_reference(RUN_CHAIN)(argv[0], options)
        return ExitCode.OK
    try:
        return int(import_reference(RUN_STAGE)(typed.stage, argv, options))
    except UserError as e:
        words = shlex.split(e.fix.line) if e.fix else []
        if words[:2] != ["submit", typed.stage]:
            raise
        line = [*words[:2], *list_option_words(options), *words[2:]]
        raise UserError(e.sentence, Fix(f"megatron-sov {shlex.join(line)}")) from None


def _print_help(stage: str) -> None:
    """Print the options for `submit`, then the options of the stage's command."""
    submit_parser = Parser(prog=f"megatron-sov submit {stage}", formatter_class=HelpFormatter,
                           usage=argparse.SUPPRESS, add_help=False,
                           description="Options of submit, before or after the stage:")
    add_options(submit_parser, SubmitOptions)
    print(submit_parser.format_help())
    if stage in STAGE_PARSERS:
        parser = Parser(prog=f"megatron-sov submit {stage}", formatter_class=HelpFormatter)
        STAGE_PARSERS[stage](parser)
        parser.print_help()
    elif stage in STAGES:
        print(f"`{'sov-tokenizer' if stage == 'tokenizer' else 'sov-data'} --help` lists the arguments after "
              f"submit {stage}")
    else:
        print(f"submit chain takes one file: {', '.join(list_chains())}, or your own YAML file "
              "(docs/slurm.md)")


def _check_chain(argv: list[str], options: SubmitOptions) -> None:
    if len(argv) != 1:
        raise UserError(f"submit chain: takes one file, not {' '.join(argv) or 'none'}; the file lists "
                        f"stages and their arguments (packaged chains: {', '.join(list_chains())})")
    extra = [name for name in ("nodes", "min_nodes", "nodes_set", "engine_nodes", "array")
             if getattr(options, name)]
    if options.prove:
        raise UserError("submit chain: --prove belongs to a stage; prove its recipe's layout with "
                        "`megatron-sov plan RECIPE --prove`")
    if extra:
        raise UserError(f"submit chain: --{extra[0].replace('_', '-')} belongs to a stage; "
                        f"write it into {argv[0]}")
    if options.scripts is not None and (options.dry_run or options.continue_chain):
        raise UserError(f"--scripts {options.scripts}: submits nothing; leave out --dry-run and --continue")
