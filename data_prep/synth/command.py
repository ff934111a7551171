"""`sov-data synth`: data that models write, checked, in a run that can be killed and continued."""

from __future__ import annotations

import argparse
import os
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.synth.checks import arguments
from megatron_sov.errors import UserError

if TYPE_CHECKING:
    from data_prep.synth.models import Model
    from data_prep.synth.running import Order

DESCRIPTION = """Make data with a model: a generator asks, checks what comes back, and keeps what passes. A
killed command goes on when it is run again, and pays for no answer twice; one that has used up a limit ends
with 75 and goes on when the limit is raised."""
EPILOG = "Generators: --list. What stands in the output folder: docs/synth.md."
_TIME = re.compile(r"(?:(\d+(?:\.\d+)?)d)?(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")
_SECONDS = (86400.0, 3600.0, 60.0, 1.0)
_OF_A_JUDGE = ("--judge-api-key-env", "--judge-input-price", "--judge-output-price",
               "--judge-max-tokens-field")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.add_argument("generator", nargs="?", default="", metavar="GENERATOR", help="what is made")
    parser.add_argument("--list", action="store_true",
                        help="list the generators, or the settings of GENERATOR, and end")
    parser.add_argument("--input", nargs="+", action="extend", type=Path, default=[], metavar="PATH",
                        help="what items are made from: files, or folders of them")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder of the run")
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="key=value",
                        help="setting of the generator")
    parser.add_argument("--prompts", type=Path, metavar="DIR",
                        help="folder of templates that go before the packaged ones of the same name")
    parser.add_argument("--limit", type=int, metavar="N", help="first N items alone")
    parser.add_argument("--redo", action="store_true",
                        help="make all items again, with other settings, templates or models, or a changed "
                             "input; answers that still fit cost nothing")
    parser.add_argument("--workers", type=int, metavar="N",
                        help="processes of the checks (default: this machine's cores); with --cluster, jobs "
                             "that ask (default: 4)")
    _add_models(parser)
    _add_limits(parser)
    _add_cluster(parser)
    arguments.add_arguments(parser)


def _add_models(parser: argparse.ArgumentParser) -> None:
    for prefix, what in (("", "the model that writes"), ("judge-", "the model that judges")):
        default = "" if not prefix else " (default: that which writes)"
        parser.add_argument(f"--{prefix}engine", default="", metavar="URL|DIR",
                            help=f"{what}: an OpenAI-compatible address up to /v1, or a checkpoint or "
                                 f"Hugging Face folder{default}")
        parser.add_argument(f"--{prefix}model", default="", metavar="NAME", help="its name at the address")
        parser.add_argument(f"--{prefix}api-key-env", default=None, metavar="VARIABLE",
                            help="variable of the environment with the key of the address"
                                 + ("" if prefix else " (default: OPENAI_API_KEY)"))
        parser.add_argument(f"--{prefix}input-price", type=float, metavar="X",
                            help="of a million tokens that it reads")
        parser.add_argument(f"--{prefix}output-price", type=float, metavar="X",
                            help="of a million tokens that it writes")
        parser.add_argument(f"--{prefix}max-tokens-field", metavar="NAME",
                            help="what it is told the longest answer by: max_tokens, max_completion_tokens, "
                                 "or none" + (" (default: that of the model that writes)" if prefix else
                                              " (default: max_tokens)"))
    parser.add_argument("--judge-max-tokens", type=int, default=1024, metavar="N",
                        help="longest answer of whoever judges, with its thoughts (default: %(default)s)")
    parser.add_argument("--same-model", action="store_true",
                        help="endpoints' models are those whose answers are kept, though they answer fixed "
                             "questions otherwise")


def _add_limits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, default=16, metavar="N",
                        help="requests at a time (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S",
                        help="seconds for one request (default: %(default)g)")
    parser.add_argument("--max-attempts", type=int, default=5, metavar="N",
                        help="for one request (default: %(default)s)")
    parser.add_argument("--patience", default="10m", metavar="TIME",
                        help="how long an endpoint that is full or away is waited for (default: %(default)s)")
    parser.add_argument("--max-tokens-total", type=int, default=0, metavar="N",
                        help="end with 75 before all commands on this folder have used more tokens")
    parser.add_argument("--max-cost", type=float, default=0.0, metavar="X",
                        help="end with 75 before they have cost more")
    parser.add_argument("--max-time", default="", metavar="TIME",
                        help="end with 75 before this command has taken longer, e.g. 2h or 1h30m")


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cluster", default="", metavar="PROFILE",
                        help="submit the run to Slurm: a cluster profile that comes with the package, or a "
                             "YAML file of your own")
    parser.add_argument("--account", metavar="NAME", help="Slurm account, where the profile names none")
    parser.add_argument("--partition", metavar="NAME", help="Slurm partition, in place of the profile's")
    parser.add_argument("--serve-vllm", type=Path, metavar="DIR",
                        help="with --cluster: submit a vLLM server of this model beside the workers, in "
                             "place of --engine")
    parser.add_argument("--vllm-args", default="", metavar="WORDS",
                        help="more arguments of `vllm serve`, in quotes")


def run(args: argparse.Namespace) -> int:
    """Run `sov-data synth`; returns 0, or 3 where people's labels do not agree with the checks."""
    from data_prep.synth.listing import generators, settings_of_generator
    from data_prep.synth.running import run_order

    if args.list:
        print(settings_of_generator(args.generator) if args.generator else generators())
        return 0
    if args.serve_vllm is not None:
        if args.engine or not args.cluster:
            raise UserError("--serve-vllm: stands in place of --engine, and needs --cluster")
        args.engine = str(args.serve_vllm)
    order = order_of(args)
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers {args.workers}: must be at least 1")
    if not args.cluster:
        if args.account or args.partition or args.vllm_args:
            raise UserError("--account, --partition, --vllm-args: belong to --cluster; pass it too, or leave "
                            "them out")
        return int(run_order(order))
    from data_prep.synth.slurm_array import Server, submit_order

    server = Server(args.serve_vllm, tuple(shlex.split(args.vllm_args))) if args.serve_vllm else None
    submit_order(order, args.cluster, args.workers or 4, server, account=args.account,
                 partition=args.partition)
    return 0


def order_of(args: argparse.Namespace) -> Order:
    """Return what the arguments ask for.

    Raises:
        UserError: something is missing, or is no time.
    """
    from data_prep.synth.budget import Most
    from data_prep.synth.models import Asked
    from data_prep.synth.running import Order
    from megatron_sov.settings import parse_nested

    if not args.generator:
        raise UserError("sov-data synth: say which generator; --list lists them")
    missing = [name for name in ("engine", "output") if not getattr(args, name)]
    if missing:
        raise UserError(f"sov-data synth {args.generator}: {' and '.join(f'--{name}' for name in missing)} "
                        f"{'is' if len(missing) == 1 else 'are'} needed (--help lists what it takes)")
    writer, judge = models_of(args)
    asked = Asked(args.threads, args.timeout, args.max_attempts, duration_s("--patience", args.patience),
                  args.judge_max_tokens, args.same_model)
    time_s = duration_s("--max-time", args.max_time) if args.max_time else 0.0
    if args.max_time and not time_s:
        raise UserError(f"--max-time {args.max_time}: leaves no time; leave it out for no limit")
    return Order(args.generator, args.output, writer, judge, tuple(args.input), parse_nested(args.changes),
                 args.prompts, asked, Most(args.max_tokens_total, args.max_cost, time_s), args.limit,
                 arguments.settings_of(args),
                 (None if args.cluster else args.workers) or len(os.sched_getaffinity(0)), args.redo)


def models_of(args: argparse.Namespace) -> tuple[Model, Model]:
    """Return the model that writes and the one that judges.  A key is sent to another address only where its
    variable is named for it.

    Raises:
        UserError: a limit of money cannot be kept, since a price is not known; a variable has no key; an
            option is a judge's, and there is none of its own.
    """
    from data_prep.synth.models import Model

    for option, variable in (("--api-key-env", args.api_key_env),
                             ("--judge-api-key-env", args.judge_api_key_env)):
        if variable and not os.environ.get(variable):
            raise UserError(f"{option} {variable}: the environment has no key there; set it, or leave the "
                            "option out where none is needed")
    key_env = "OPENAI_API_KEY" if args.api_key_env is None else args.api_key_env
    length = args.max_tokens_field or "max_tokens"
    writer = Model(args.engine, args.model, key_env, args.input_price or 0.0, args.output_price or 0.0,
                   max_tokens_field=length)
    if not args.judge_engine and not args.judge_model:
        if alone := [option for option in _OF_A_JUDGE
                     if getattr(args, option[2:].replace("-", "_")) is not None]:
            raise UserError(f"{', '.join(alone)}: there is no judge of its own; add --judge-engine or "
                            "--judge-model, or leave it out")
        return writer, writer
    if args.max_cost and args.judge_input_price is None and args.judge_output_price is None:
        raise UserError(f"--max-cost {args.max_cost:g}: what the judge costs is not known; pass "
                        "--judge-input-price and --judge-output-price, 0 where it costs nothing")
    engine = args.judge_engine or args.engine
    own = "" if args.judge_engine and args.judge_engine != args.engine else key_env
    judge = Model(engine, args.judge_model, own if args.judge_api_key_env is None else args.judge_api_key_env,
                  args.judge_input_price or 0.0, args.judge_output_price or 0.0,
                  max_tokens_field=args.judge_max_tokens_field or length,
                  options=("--judge-engine", "--judge-model"))
    return writer, judge


def duration_s(option: str, text: str) -> float:
    """Return the seconds of a time such as 2h, 1h30m, 90s or 90.

    Raises:
        UserError: it is none.
    """
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    found = _TIME.fullmatch(text)
    if not found or not text:
        raise UserError(f"{option} {text}: must be a time such as 2h, 1h30m or 90s")
    return sum(float(part) * seconds for part, seconds in zip(found.groups(), _SECONDS, strict=True) if part)
