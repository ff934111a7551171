"""`megatron-sov eval inspect`: tasks of inspect-ai, run by the library itself on a model that is served here
or elsewhere, or a log of it that somebody else made; scores in the form of `eval lm`'s results.

The library runs in a process of its own, by a Python that may be another one: what it needs and what this
project needs may disagree.  Its `eval-set` keeps finished logs and goes on with others, so that the same
command does the rest behind a kill.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

from megatron_sov.base.artifacts import to_json
from megatron_sov.base.errors import ExitCode, StopRequested, UserError, visible
from megatron_sov.base.outputs import check_output, refuse_input
from megatron_sov.base.settings import AtLeastOne, Flag, SettingsError, command_of, parse_nested, read_options
from megatron_sov.bench.inspect_logs import ScoredLog, read_log
from megatron_sov.bench.lm.results import EvaluatedModel, Results, table, write_results
from megatron_sov.bench.lm.settings import DEFAULT_KEY_ENV, ENDPOINTS
from megatron_sov.commands.shared_options import RecordOptions, named_tasks, words_of
from megatron_sov.infer.request import RankOptions
from megatron_sov.runs.checkpoints import refuse_missing, refuse_no_model
from megatron_sov.runs.folder import RunEvents
from megatron_sov.runs.obs.events import EVENT, EVENTS, is_recorded, read_events, score_events
from megatron_sov.train.stopping import StopFlag, stoppable
from megatron_sov.work.endpoints.local_server import serving
from megatron_sov.work.endpoints.transport import address_problems, is_address
from megatron_sov.work.processes.children import end_commands, start_command
from megatron_sov.work.progress.locks import holding

LIBRARY = "inspect-ai==0.3.285"
"""As in setup.py's extra `inspect`."""
SERVICE = "sov"
"""Name of the endpoint for the library: it reads SOV_BASE_URL and SOV_API_KEY of its environment alone."""
LOOK_S, END_S, RETRIES, TIMEOUT_S = 0.2, 60.0, 5, 600
IDENTITY = "sov-identity.json"
"""What the logs of a folder are of."""


@dataclass(frozen=True, kw_only=True)
class EvalInspectOptions(RankOptions, RecordOptions):
    """Have inspect-ai score a model on its tasks, or read a log of it."""

    target: Annotated[str, Flag("TARGET", help="Checkpoint, run (its newest one), Hugging Face folder, or "
                                               "the address of an OpenAI-compatible endpoint, up to /v1; "
                                               "none with --from-log.")] = ""
    tasks: Annotated[str, Flag(value="A,B")] = ""
    """FILE.py@NAME or package/name; a task is code, and is run as you."""
    from_log: Annotated[tuple[Path, ...], Flag(value="FILE")] = ()
    """Read a log that is there, and run nothing; may be repeated."""
    output: Annotated[Path, Flag(value="OUT.json")]
    """Results to write; the items come to lie beside it as OUT.items.jsonl."""
    log: Annotated[Path | None, Flag(value="DIR", writes=True)] = None
    """Folder of the library's logs (default: OUT.logs)."""
    limit: AtLeastOne | None = None
    """Only the first N items of each task."""
    epochs: Annotated[AtLeastOne | None, Flag("--samples")] = None
    """Answers to each item (default: the task's)."""
    max_connections: Annotated[AtLeastOne, Flag("--concurrent")] = 10
    """Requests under way at a time."""
    task_settings: Annotated[tuple[str, ...], Flag("--task-set", "key=value")] = ()
    """An argument of the tasks; may be repeated."""
    python: Annotated[str, Flag(value="PATH")] = sys.executable
    """Python that has inspect-ai (default: this one)."""
    max_length: AtLeastOne | None = None
    """Tokens of the longest prompt with its answer (default: as the model takes, up to 8,192)."""
    model: Annotated[str, Flag(value="NAME", group=ENDPOINTS)] = ""
    """Name that the endpoint knows the model by."""
    key_env: Annotated[str, Flag(value="NAME", group=ENDPOINTS)] = DEFAULT_KEY_ENV
    """Variable of the environment with the key; none is sent where it is not set."""

    @property
    def log_folder(self) -> Path:
        return self.log or self.output.with_name(f"{self.output.name.removesuffix('.json')}.logs")


@dataclass(frozen=True)
class _Endpoint:
    url: str
    name: str
    key: str


def run_inspect(args: EvalInspectOptions) -> int:
    """Evaluate or read, write, and print the table.

    Raises:
        UserError: the model, a task, a log or an option cannot be used.
        StopRequested: a signal asked for it; the library has kept what was answered.
    """
    _refuse(args)
    check_output("--output", args.output)
    refuse_input("--output", args.output, *args.from_log)
    events = RunEvents(args.run)
    model: EvaluatedModel | None = None
    logs = list(args.from_log)
    if not logs:
        model = _model(args)
        with stoppable() as flag, holding(args.log_folder, f"--log {args.log_folder}"):
            _keep_identity(args, model)
            with _endpoint(args, flag) as endpoint:
                _run_library(args, endpoint, flag)
            logs = _newest(args.log_folder)
    results = _write(args, model, [read_log(log) for log in logs])
    if args.run is not None:
        step = results.model.step if results.model.step is not None else events.last_step()
        known = [event for event in read_events(args.run / EVENTS) if event["event"] == EVENT]
        for event in score_events(asdict(results), step, args.output):
            if not is_recorded(event, known):
                events.add(EVENT, **event)
    print(to_json(results).rstrip() if args.json else visible(table(results)))
    return ExitCode.OK


def _refuse(args: EvalInspectOptions) -> None:
    asks = {"TARGET": args.target, "--tasks": args.tasks, "--limit": args.limit, "--samples": args.epochs,
            "--log": args.log, "--task-set": args.task_settings, "--model": args.model,
            "--max-length": args.max_length, "--nproc": args.nproc, "--set": args.settings}
    given = [name for name, value in asks.items() if value]
    if args.from_log:
        if given:
            raise UserError(f"{', '.join(given)}: for an evaluation, and --from-log runs none; leave it out")
        return
    if not args.target or not named_tasks(args.tasks):
        raise UserError("eval inspect: needs TARGET and --tasks, e.g. `megatron-sov eval inspect my-model "
                        "--tasks sums.py@sums --output scores.json`, or a log with --from-log FILE.eval")
    parse_nested(args.task_settings)
    if not is_address(args.target):
        if args.model:
            raise UserError(f"--model {args.model}: for an endpoint, and {args.target} is a folder; leave "
                            "it out")
        refuse_missing(Path(args.target))
        refuse_no_model(Path(args.target))
        return
    if problems := address_problems("TARGET", args.target.rstrip("/"), "--key-env"):
        raise SettingsError("eval inspect", problems)
    if not args.model:
        raise UserError(f"{args.target}: --model is missing; an endpoint may know several models, name one")
    of_folders = [name for name in given if name in ("--max-length", "--nproc", "--set")]
    if of_folders:
        raise UserError(f"{', '.join(of_folders)}: an endpoint runs its model itself; leave it out")


def _model(args: EvalInspectOptions) -> EvaluatedModel:
    run = str(args.run) if args.run else None
    if is_address(args.target):
        url = args.target.rstrip("/")
        # as `eval lm` has it: nothing else is known of a model behind an address
        digest = hashlib.sha256(json.dumps([url, args.model]).encode()).hexdigest()
        return EvaluatedModel(f"{url} {args.model}", digest, "endpoint", None, run)
    from megatron_sov.bench.lm.subject import content_hash
    from megatron_sov.infer.engines.target import find_target

    found = find_target(Path(args.target))
    kind = "huggingface" if found.is_hf else "checkpoint"
    return EvaluatedModel(str(found.path), content_hash(found), kind, found.step, run)


def _keep_identity(args: EvalInspectOptions, model: EvaluatedModel) -> None:
    """Note what the logs of a folder are of; the library knows a model by its name alone, and would go on
    with the answers of another one.

    Raises:
        UserError: the folder has logs of something else.
    """
    made = {"model": model.hash, "tasks": named_tasks(args.tasks), "arguments": list(args.task_settings),
            "limit": args.limit, "epochs": args.epochs, "settings": list(args.settings),
            "max_length": args.max_length}
    file = args.log_folder / IDENTITY
    if not file.exists():
        if any(args.log_folder.glob("*.eval")):
            raise UserError(f"--log {args.log_folder}: has logs of other evaluations; name another folder, "
                            "or read one of them with --from-log")
        file.write_text(to_json(made), encoding="utf-8")
        return
    try:
        known = json.loads(file.read_bytes())
        changed = [name for name, value in made.items() if known[name] != value]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{file}: is damaged; name another folder by --log") from None
    if changed:
        raise UserError(f"--log {args.log_folder}: has logs of another evaluation ({', '.join(changed)} "
                        "differ); name another folder, or give the same command to go on")


@contextlib.contextmanager
def _endpoint(args: EvalInspectOptions, flag: StopFlag) -> Iterator[_Endpoint]:
    """Give where the model answers; one of this machine does so until the context ends."""
    if is_address(args.target):
        # the library wants some key, and sends it as it is
        yield _Endpoint(args.target.rstrip("/"), args.model, os.environ.get(args.key_env, "") or "none")
        return

    def sleep(seconds: float) -> None:
        _refuse_stop(flag)
        time.sleep(seconds)

    words = [*words_of(RankOptions(nproc=args.nproc, settings=args.settings)),
             *(["--max-length", str(args.max_length)] if args.max_length else [])]
    with serving([Path(args.target)], f"{args.target}: ", names=["model"], options=words,
                 sleep=sleep) as server:
        yield _Endpoint(server.url, server.models[0], server.key)


def _run_library(args: EvalInspectOptions, endpoint: _Endpoint, flag: StopFlag) -> None:
    """Have the library do what is left of the tasks.

    Raises:
        UserError: it is not there, or could not; its own words stand on standard error.
        StopRequested: a signal asked for it.
    """
    program = shutil.which(args.python)
    if program is None:
        raise UserError(f"--python {args.python}: is no program; name a Python that has inspect-ai")
    words = ["eval-set", *named_tasks(args.tasks), "--model", f"openai-api/{SERVICE}/{endpoint.name}",
             "--log-dir", str(args.log_folder), "--log-format", "eval", "--display", "plain", "--no-ansi",
             "--ctl-server", "false", "--max-connections", str(args.max_connections),
             # one that never answers must not hold the evaluation for ever; it is a failed item
             "--retry-attempts", "0", "--max-retries", str(RETRIES), "--timeout", str(TIMEOUT_S),
             "--no-fail-on-error", "--log-dir-allow-dirty",
             *(word for name, value in (("--limit", args.limit), ("--epochs", args.epochs)) if value
               for word in (name, str(value))),
             *(word for setting in args.task_settings for word in ("-T", setting))]
    variables = {f"{SERVICE.upper()}_BASE_URL": endpoint.url, f"{SERVICE.upper()}_API_KEY": endpoint.key}
    # standard output is for the results; a key must not be seen on a command line
    with open(os.dup(2), "wb") as out:
        child = start_command([program, "-m", "inspect_ai", *words], stdout=out, own_group=True,
                              ends_with_this=True, environment=os.environ | variables)
    try:
        while child.poll() is None:
            _refuse_stop(flag)
            time.sleep(LOOK_S)
    finally:
        end_commands([child], END_S)
    if child.returncode:
        raise UserError(f"inspect-ai ended with {child.returncode}; its own words are above. The logs so far "
                        f"are in {args.log_folder}. If it is not installed: {_how_to_install()}")


def _how_to_install() -> str:
    return (f"`python3 -m venv inspect-env`, `inspect-env/bin/pip install {LIBRARY}`, and `--python "
            "inspect-env/bin/python`")


def _refuse_stop(flag: StopFlag) -> None:
    if flag.reason is not None:
        raise StopRequested(f"{flag.reason}: answers of finished items are kept; run the same command again "
                            "to go on")


def _newest(folder: Path) -> list[Path]:
    """Return the last log of each task: a task that went on has a later one with the same number, which the
    file's name ends with."""
    logs = {log.stem.rpartition("_")[2]: log for log in sorted(folder.glob("*.eval"))}
    if not logs:
        raise UserError(f"{folder}: inspect-ai has left no log there; look at its words above")
    return sorted(logs.values())


def _write(args: EvalInspectOptions, model: EvaluatedModel | None, logs: Sequence[ScoredLog]) -> Results:
    """Write what the logs hold.

    Raises:
        UserError: two logs are of one task, or of several models, or nothing can be written.
    """
    names = [log.task for log in logs]
    if twice := sorted({visible(name) for name in names if names.count(name) > 1}):
        raise UserError(f"eval inspect: {len(logs)} logs, of which several are of task {', '.join(twice)}; "
                        "results hold one of each, so write them into several files")
    told = model or logs[0].model
    if model is None and (other := next((log.model for log in logs if log.model != told), None)):
        raise UserError(f"--from-log: is of two models, {visible(told.path)} and {visible(other.path)}; "
                        "write each into a file of its own")
    told = replace(told, run=str(args.run) if args.run else None)
    for note in (note for log in logs for note in log.notes):
        print(visible(note), file=sys.stderr)
    harness = {"inspect_ai": ", ".join(sorted({log.version for log in logs}))}
    harness |= {f"log of {log.task}": log.sha256 for log in logs}
    return write_results(args.output, Results(told, {log.task: log.scores for log in logs}, harness),
                         (item for log in logs for item in log.items))


INSPECT = command_of(EvalInspectOptions, lambda typed: run_inspect(read_options(EvalInspectOptions, typed)))
