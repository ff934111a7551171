"""`sov-data synth`: data that models write, checked, in a run that can be killed and continued."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from data_prep.synth.bounds import MaxTokensField, Threads, Timeout
from data_prep.synth.checks.arguments import CheckOptions
from megatron_sov.errors import UserError
from megatron_sov.settings import (
    AtLeastOne,
    Flag,
    NotNegative,
    NotNegativeInt,
    add_options,
    num_cores,
    only_with,
    parse_nested,
    read_options,
)
from megatron_sov.work.arrays import ClusterOptions

if TYPE_CHECKING:
    from data_prep.synth.models import Model
    from data_prep.synth.running import Order

EPILOG = "Generators: --list. What stands in the output folder: docs/synth.md."
_TIME = re.compile(r"(?:(\d+(?:\.\d+)?)d)?(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")
_SECONDS = (86400.0, 3600.0, 60.0, 1.0)
_OF_A_JUDGE = ("--judge-api-key-env", "--judge-input-price", "--judge-output-price",
               "--judge-max-tokens-field")


@dataclass(frozen=True, kw_only=True)
class SynthModelOptions:
    """Who writes, and who judges."""

    engine: Annotated[str, Flag(value="URL|DIR")] = ""
    """The model that writes: an OpenAI-compatible address up to /v1, or a checkpoint or Hugging Face
    folder."""
    model: Annotated[str, Flag(value="NAME")] = ""
    """Its name at the address."""
    api_key_env: Annotated[str | None, Flag(value="VARIABLE")] = None
    """Variable of the environment with the key of the address (default: OPENAI_API_KEY)."""
    input_price: NotNegative | None = None
    """Of a million tokens that it reads."""
    output_price: NotNegative | None = None
    """Of a million tokens that it writes."""
    max_tokens_field: Annotated[MaxTokensField | None, Flag(value="NAME")] = None
    """What it is told the longest answer by: max_tokens, max_completion_tokens, or none (default:
    max_tokens)."""
    judge_engine: Annotated[str, Flag(value="URL|DIR")] = ""
    """The model that judges, likewise (default: that which writes)."""
    judge_model: Annotated[str, Flag(value="NAME")] = ""
    """Its name at the address."""
    judge_api_key_env: Annotated[str | None, Flag(value="VARIABLE")] = None
    """Variable of the environment with the key of the judge's address."""
    judge_input_price: NotNegative | None = None
    """Of a million tokens that the judge reads."""
    judge_output_price: NotNegative | None = None
    """Of a million tokens that the judge writes."""
    judge_max_tokens_field: Annotated[MaxTokensField | None, Flag(value="NAME")] = None
    """What the judge is told the longest answer by (default: that of the model that writes)."""
    judge_max_tokens: AtLeastOne = 1024
    """Longest answer of whoever judges, with its thoughts."""
    same_model: bool = False
    """Endpoints' models are those whose answers are kept, though they answer fixed questions otherwise."""


@dataclass(frozen=True, kw_only=True)
class SynthLimitOptions:
    """What a run may take."""

    threads: Threads = 16
    """Requests at a time."""
    timeout: Annotated[Timeout, Flag(value="S")] = 600.0
    """Seconds for one request."""
    max_attempts: AtLeastOne = 5
    """For one request."""
    patience: Annotated[str, Flag(value="TIME")] = "10m"
    """How long an endpoint that is full or away is waited for."""
    max_tokens_total: NotNegativeInt = 0
    """End with 75 before all commands on this folder have used more tokens (0: no limit)."""
    max_cost: NotNegative = 0.0
    """End with 75 before they have cost more (0: no limit)."""
    max_time: Annotated[str, Flag(value="TIME")] = ""
    """End with 75 before this command has taken longer, e.g. 2h or 1h30m."""


@dataclass(frozen=True, kw_only=True)
class SynthClusterOptions(ClusterOptions):
    """Where a run is submitted to."""

    serve_vllm: Annotated[Path | None, Flag(value="DIR"), only_with("cluster")] = None
    """With --cluster: submit a vLLM server of this model beside the workers, in place of --engine."""
    vllm_args: Annotated[str, Flag(value="WORDS"), only_with("cluster")] = ""
    """More arguments of `vllm serve`, in quotes."""


@dataclass(frozen=True, kw_only=True)
class SynthOptions(SynthModelOptions, SynthLimitOptions, SynthClusterOptions, CheckOptions):
    """Make data with a model: a generator asks, checks what comes back, and keeps what passes.

    A killed command goes on when it is run again, and pays for no answer twice; one that has used up a limit
    ends with 75 and goes on when the limit is raised."""

    generator: Annotated[str, Flag("GENERATOR")] = ""
    """What is made."""
    list: bool = False
    """List the generators, or the settings of GENERATOR, and end."""
    input: Annotated[tuple[Path, ...], Flag(many=True)] = ()
    """What items are made from: files, or folders of them."""
    output: Annotated[Path | None, Flag(value="DIR")] = None
    """Folder of the run."""
    changes: Annotated[tuple[str, ...], Flag("--set", "key=value")] = ()
    """Setting of the generator."""
    prompts: Annotated[Path | None, Flag(value="DIR")] = None
    """Folder of templates that go before the packaged ones of the same name."""
    limit: AtLeastOne | None = None
    """First N items alone."""
    redo: bool = False
    """Make all items again, with other settings, templates or models, or a changed input; answers that still
    fit cost nothing."""
    workers: AtLeastOne | None = None
    """Processes of the checks (default: this machine's cores); with --cluster, jobs that ask (default: 4)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.epilog = EPILOG
    add_options(parser, SynthOptions)


def run(typed: argparse.Namespace) -> int:
    """Run `sov-data synth`; returns 0, or 3 where people's labels do not agree with the checks."""
    args = read_options(SynthOptions, typed)
    from data_prep.synth.listing import generators, settings_of_generator
    from data_prep.synth.running import run_order

    if args.list:
        print(settings_of_generator(args.generator) if args.generator else generators())
        return 0
    if args.serve_vllm is not None:
        if args.engine:
            raise UserError("--serve-vllm: stands in place of --engine; leave one of them out")
        args = dataclasses.replace(args, engine=str(args.serve_vllm))
    order = order_of(args)
    if not args.cluster:
        return int(run_order(order))
    from data_prep.synth.slurm_array import Server, submit_order

    server = Server(args.serve_vllm, tuple(shlex.split(args.vllm_args))) if args.serve_vllm else None
    submit_order(order, args, args.workers or 4, server)
    return 0


def order_of(args: SynthOptions) -> Order:
    """Return what the arguments ask for.

    Raises:
        UserError: something is missing, or is no time.
    """
    from data_prep.synth.budget import Most
    from data_prep.synth.checks.settings import CheckSettings
    from data_prep.synth.models import Asked
    from data_prep.synth.running import Order

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
    assert args.output is not None
    return Order(args.generator, args.output, writer, judge, args.input, parse_nested(args.changes),
                 args.prompts, asked, Most(args.max_tokens_total, args.max_cost, time_s), args.limit,
                 CheckSettings.of(args),
                 (None if args.cluster else args.workers) or num_cores(), args.redo)


def models_of(args: SynthOptions) -> tuple[Model, Model]:
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
