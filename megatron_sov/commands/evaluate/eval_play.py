"""`megatron-sov eval play`: a model plays with tools and its episodes are scored, which goes on behind a
kill."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from megatron_sov.base.errors import ExitCode, StopRequested, UserError, visible
from megatron_sov.base.outputs import check_output
from megatron_sov.base.settings import AtLeastOne, Flag, command_of, read_options
from megatron_sov.bench.lm.settings import (
    ENDPOINTS, EndpointModel, EndpointSettings, JudgedSettings, Settings)
from megatron_sov.commands.shared_options import AnyTarget, RecordOptions, RedoOptions, words_of
from megatron_sov.judge.tools.environment import Task
from megatron_sov.judge.tools.episode import EpisodeLines, lines_in
from megatron_sov.judge.tools.playing import EpisodeTable, ToolPolicy, identity_of, play
from megatron_sov.judge.tools.registry import digest_of
from megatron_sov.runs.checkpoints import refuse_missing
from megatron_sov.runs.folder import RunEvents
from megatron_sov.train.stopping import StopFlag, stoppable
from megatron_sov.work.endpoints.transport import is_address
from megatron_sov.work.progress.journal import open_journal
from megatron_sov.work.progress.progress_bar import work_bar

if TYPE_CHECKING:
    from megatron_sov.bench.lm.results import EvaluatedModel, Results
    from megatron_sov.bench.suites.catalogue import TaskFile
    from megatron_sov.bench.suites.protocol import Protocol
    from megatron_sov.judge.tools.episode import Episode


POLL_S = 0.2
"""How often one who waits looks whether to stop."""


@dataclass(frozen=True, kw_only=True)
class EvalPlayOptions(JudgedSettings, RecordOptions, RedoOptions):
    """Have a model play a benchmark's tasks with tools, and score its episodes."""

    target: AnyTarget
    tasks: Annotated[str, Flag(value="NAME")]
    """A task of `eval suites` with an environment, or the path of a task file of yours."""
    data_dir: Annotated[Path, Flag(value="DIR")]
    """Folder of your copies of the data."""
    output: Annotated[Path, Flag(value="OUT.json")]
    """Scores; episodes beside them in OUT.items.jsonl."""
    parallel: AtLeastOne = 8
    """Episodes at a time."""
    cache: Annotated[Path | None, Flag(value="DIR", group=ENDPOINTS, writes=True)] = None
    """Folder of the endpoint's answers (default: OUT.cache)."""
    endpoint: EndpointModel = field(default_factory=EndpointModel)
    """Used where the target is an address."""


@dataclass(frozen=True)
class _Game:
    args: EvalPlayOptions
    task: TaskFile
    protocol: Protocol
    tasks: Sequence[Task]
    flag: StopFlag

    @property
    def num_episodes(self) -> int:
        return len(self.tasks) * self.protocol.samples


Ended = Callable[[int], object]
"""Is told how many more episodes have ended."""
Check = Callable[[], object]
"""Raises to end the play; the journal keeps what was said."""
Play = Callable[[list[Task], EpisodeLines, Ended, Check], "list[Episode]"]


def run_play(args: EvalPlayOptions) -> int:
    """Play, score and write; an evaluation that was killed goes on where it was.

    Raises:
        UserError: there is no such task, data are missing, or the model cannot play.
        StopRequested: a signal asked for it; what was played is kept.
    """
    check_output("--output", args.output)
    events = RunEvents(args.run)
    with stoppable() as flag:
        # an address or a folder: the first speaks for a server, the second loads weights here
        if is_address(args.target):
            stopped = _by_endpoint(_checked_game(args, flag), events)
        else:
            refuse_missing(Path(args.target))
            _refuse_of_endpoints(args)
            stopped = _by_engine(_checked_game(args, flag), events)
    if stopped:
        raise StopRequested(stopped)
    return ExitCode.OK


def _refuse_of_endpoints(args: EvalPlayOptions) -> None:
    given = [*words_of(args.endpoint), *(["--cache", str(args.cache)] if args.cache else [])]
    if given:
        raise UserError(f"{shlex.join(given)}: for an endpoint, and {args.target} is a folder; leave it out")


def _checked_game(args: EvalPlayOptions, flag: StopFlag) -> _Game:
    from megatron_sov.bench.suites.catalogue import chosen, read_task, require_data
    from megatron_sov.bench.suites.episodes import order_of, tasks_of
    from megatron_sov.bench.suites.protocol import changed_as_asked
    from megatron_sov.engine.parallel.cpu_shims import prepare_megatron
    from megatron_sov.judge.tools.registry import make

    found = [read_task(Path(args.tasks))] if args.tasks.endswith((".yaml", ".yml")) else chosen([args.tasks])
    played = [task for task in found if task is not None and task.protocol and task.protocol.environment]
    if len(played) != 1:
        raise UserError(f"--tasks {args.tasks}: names {len(played)} tasks with an environment, must be one; "
                        "`megatron-sov eval suites` lists them, and `eval lm` asks the others")
    task, protocol = played[0], played[0].protocol
    assert protocol is not None
    protocol = changed_as_asked(protocol, args)
    require_data(task, args.data_dir)
    # made once before the model is loaded: an environment that cannot start is told now
    make(order_of(protocol, args.data_dir))
    prepare_megatron()
    return _Game(args, task, protocol, tasks_of(task, args.data_dir, args.num_items), flag)


def _by_engine(game: _Game, events: RunEvents) -> str:
    """Play with a model of a folder; returns why it was stopped."""
    from megatron_sov.bench.lm.results import EvaluatedModel
    from megatron_sov.bench.lm.subject import content_hash
    from megatron_sov.bench.suites.episodes import order_of
    from megatron_sov.infer.turns import Player, Runs

    args, protocol = game.args, game.protocol
    player = Player(Path(args.target), Runs(args.engine, args.settings, args.nproc), protocol.episode_limits,
                    "lower `limits` in a task file of your own", protocol.chat_template_kwargs)
    target = player.target
    table = EpisodeTable(order_of(protocol, args.data_dir), player.encoder, protocol.episode_limits,
                         args.parallel)

    def played(policy: ToolPolicy) -> str:
        model = EvaluatedModel(str(target.path), content_hash(target),
                               "huggingface" if target.is_hf else "checkpoint", target.step)
        known_by: dict[str, object] = {
            "path": str(target.path), "hash": model.hash, "engine": player.engine, "chat": player.chat}

        def play_on(tasks: list[Task], lines: EpisodeLines, ended: Ended, check: Check) -> list[Episode]:
            return play(tasks, policy, table, lines, ended, lambda: bool(check()))

        return _played(game, model, known_by, play_on, events)

    return str(player.run(protocol.sampling, args.parallel, played) or "")


def _by_endpoint(game: _Game, events: RunEvents) -> str:
    """Play with a model behind an endpoint; returns why it was stopped."""
    from megatron_sov.bench.lm.subject import subject_of
    from megatron_sov.bench.suites.episodes import EndpointSpeaker, order_of
    from megatron_sov.judge.tools.playing import MessageTable, play_by_messages

    args, flag = game.args, game.flag
    endpoint = EndpointSettings(**vars(args.endpoint), concurrent=args.parallel)
    settings = Settings(output=args.output, cache=args.cache, engine=args.engine, settings=args.settings,
                        nproc=args.nproc, endpoint=endpoint)
    subject = subject_of(args.target, settings)

    def sleep(seconds: float) -> None:
        # in small steps: a signal must not wait for a server's retry delay
        end_s = time.monotonic() + seconds
        while (left_s := end_s - time.monotonic()) > 0:
            if flag.reason is not None:
                raise StopRequested(flag.reason)
            time.sleep(min(left_s, POLL_S))

    speaker = EndpointSpeaker(args.target, endpoint, game.protocol, settings.cache_folder, sleep)

    table = MessageTable(order_of(game.protocol, args.data_dir), game.protocol.episode_limits, args.parallel)

    def play_on(tasks: list[Task], lines: EpisodeLines, ended: Ended, check: Check) -> list[Episode]:
        return play_by_messages(tasks, speaker, table, lines, ended, check)

    return _played(game, subject.model, subject.identity, play_on, events)


def _played(game: _Game, model: EvaluatedModel, known_by: dict[str, object], play_on: Play,
            events: RunEvents) -> str:
    """Play what is left, score and write; returns why it was stopped, empty at the end."""
    from megatron_sov.bench.suites.episodes import fold_episodes, order_of, write_episodes
    from megatron_sov.judge.tools.registry import make

    args, protocol, num_ended = game.args, game.protocol, 0
    _, version = make(order_of(protocol, args.data_dir))
    # all that a turn depends on: an unfinished evaluation goes on only if nothing of it changed
    identity = identity_of(digest_of(game.tasks), version, protocol.episode_limits, known_by,
                           {**protocol.as_json()["sampling"], "mode": protocol.mode})

    def ended(count: int) -> None:
        nonlocal num_ended
        num_ended += count
        bar.update(count)

    def check() -> None:
        if game.flag.reason is not None:
            raise StopRequested(game.flag.reason)

    try:
        with (open_journal(args.output, "megatron-sov eval play", identity, redo=args.redo) as journal,
              work_bar("play", game.num_episodes, "episode") as bar):
            # one long list: samples of a task are neighbours, and are cut apart again below
            flat = play_on([task for task in game.tasks for _ in range(protocol.samples)], lines_in(journal),
                           ended, check)
            episodes = [flat[i:i + protocol.samples] for i in range(0, len(flat), protocol.samples)]
            folded = fold_episodes(protocol, game.tasks, episodes, args.data_dir, args.workers)
            results = write_episodes(args.output, game.task, protocol, model, game.tasks, episodes, folded,
                                     args.data_dir, args.num_items)
    except StopRequested as e:
        return (f"{e}: {num_ended:,} of {game.num_episodes:,} episodes have ended, and all turns are kept; "
                "run the same command again to go on")
    _tell(game, results, events)
    for item in folded.items:
        if item.failed:
            print(visible(item.failed), file=sys.stderr)
            break
    return ""


def _tell(game: _Game, results: Results, events: RunEvents) -> None:
    """Print the scores, and add them to a run's events."""
    args, told, scores = game.args, game.protocol.as_json(), results.tasks[game.task.name]
    step = results.model.step if results.model.step is not None else events.last_step()
    for metric in scores.metrics:
        events.add("eval_lm", step=step, model_hash=results.model.hash, task=game.task.name,
                   task_hash=scores.task_hash, metric=metric.name, filter=metric.filter, k=metric.k,
                   value=metric.value, interval=metric.interval and list(metric.interval),
                   items=scores.items, failed=scores.failed, at_limit=scores.at_limit,
                   sampling=told["sampling"], mode=game.protocol.mode, contamination=None,
                   published_as=scores.published_as, output=str(args.output.absolute()))
        # a figure that is not known is no 0
        value = "-" if metric.value is None else f"{metric.value:.4f}"
        if not args.json:
            print(f"{game.task.name}  {metric.label}  {value}  {scores.items} items, {scores.failed} failed, "
                  f"{scores.at_limit} episodes at a limit")
    if args.json:
        print(json.dumps(json.loads(args.output.read_text(encoding="utf-8")), indent=1, ensure_ascii=False))


PLAY = command_of(EvalPlayOptions, lambda typed: run_play(read_options(EvalPlayOptions, typed)))
