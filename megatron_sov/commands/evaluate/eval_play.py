"""`megatron-sov eval play`: a model plays with tools and its episodes are scored, which goes on behind a
kill.

Its tasks have files, episodes, and scores in the form of `eval lm`'s results; turns come from a model in a
folder or behind an OpenAI-compatible endpoint.  What a model said is given back to it as it said it: its
calls, and its thoughts under the name that the endpoint told them by, which models that think between calls
were trained with.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from megatron_sov.base.artifacts import sha256_file
from megatron_sov.base.documents.messages import REASONING
from megatron_sov.base.errors import ExitCode, StopRequested, UserError, visible
from megatron_sov.base.outputs import check_output
from megatron_sov.base.plugins.registry import PluginOrder
from megatron_sov.base.settings import AtLeastOne, Flag, command_of, read_options
from megatron_sov.bench.lm.answers import endpoint_at
from megatron_sov.bench.lm.results import (
    EvaluatedModel, ResultItem, Results, ResultSample, TaskSampling, TaskScores, judged_by, metric_of_items,
    write_results)
from megatron_sov.bench.lm.settings import (
    ENDPOINTS, EndpointModel, EndpointSettings, JudgedSettings, Settings)
from megatron_sov.bench.lm.tasks import DATA
from megatron_sov.bench.suites.catalogue import TaskData, TaskFile
from megatron_sov.bench.suites.folding import fold, folded_results
from megatron_sov.bench.suites.protocol import Folded, Protocol, SuiteResponse, TaskItem
from megatron_sov.chat.marks import BEGIN_CALL, BEGIN_THOUGHTS, END_CALL, END_THOUGHTS
from megatron_sov.chat.tool_calls import BadCall, ToolCall, parse_turn
from megatron_sov.commands.shared_options import AnyTarget, RecordOptions, RedoOptions, words_of
from megatron_sov.judge.rewards.reward import Result
from megatron_sov.judge.tools.environment import INFRASTRUCTURE, Task
from megatron_sov.judge.tools.episode import Episode, EpisodeLines, lines_in
from megatron_sov.judge.tools.playing import (
    EpisodeTable, Message, NoTurn, Said, ToolPolicy, identity_of, play)
from megatron_sov.judge.tools.registry import digest_of, make, order
from megatron_sov.runs.checkpoints import refuse_missing
from megatron_sov.runs.folder import RunEvents
from megatron_sov.train.stopping import StopFlag, stoppable
from megatron_sov.work.endpoints.answers import CHAT_PROBES, BadAnswer, only, told_tokens
from megatron_sov.work.endpoints.cache import EndpointCache
from megatron_sov.work.endpoints.transport import is_address
from megatron_sov.work.progress.journal import open_journal
from megatron_sov.work.progress.progress_bar import work_bar

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
    parallel: Annotated[AtLeastOne, Flag("--concurrent")] = 8
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
Play = Callable[[list[Task], EpisodeLines, Ended, Check], list[Episode]]


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
    from megatron_sov.bench.suites.protocol import changed_as_asked
    from megatron_sov.engine.parallel.cpu_shims import prepare_megatron

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
    from megatron_sov.bench.lm.subject import content_hash
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


def tasks_of(task: TaskFile, data_dir: Path, limit: int | None = None) -> list[Task]:
    """Return what is to be played.

    Raises:
        UserError: a file is missing, or a row breaks a rule.
    """
    data = TaskData.of(task.sov)
    found: list[Task] = [row for paths in task.files(data_dir).values() for path in paths
                         for _, row in data.rows(path)]
    return found if limit is None else found[:limit]


def order_of(protocol: Protocol, data_dir: Path) -> PluginOrder:
    """Return the order for a protocol's environment.

    Raises:
        UserError: there is none of that name.
    """
    settings = {name: value.replace(DATA, str(data_dir)) if isinstance(value, str) else value
                for name, value in protocol.environment_settings.items()}
    return order(protocol.environment, settings)


def fold_episodes(protocol: Protocol, tasks: Sequence[Task], episodes: Sequence[Sequence[Episode]],
                  data_dir: Path, workers: int = 0) -> Folded:
    """Return the scores of tasks whose episodes have ended; raises as `fold` does."""
    items = [item_of(protocol, task, played) for task, played in zip(tasks, episodes, strict=True)]
    if protocol.reward:  # of the answer; an episode that failed has none to judge
        return _without_failed(fold(protocol, items, workers), episodes)
    results = [[_result(protocol, episode) for episode in played] for played in episodes]
    _, version = make(order_of(protocol, data_dir))
    return folded_results(protocol, items, {"": results}, {"environment": {
        "name": protocol.environment, "version": version, "settings": dict(protocol.environment_settings)}})


def item_of(protocol: Protocol, task: Mapping[str, Any], episodes: Sequence[Episode]) -> TaskItem:
    return TaskItem(task, str(task.get("question", "")), [
        SuiteResponse(episode.answer, _finish(protocol, episode)) for episode in episodes])


def _finish(protocol: Protocol, episode: Episode) -> str:
    """Return how an episode ended; where one turn is all that is asked for, it is no limit."""
    return "stop" if episode.end == "answered" or (
        episode.end == "turns" and protocol.episode_limits.max_turns == 1) else episode.end


def _result(protocol: Protocol, episode: Episode) -> Result:
    assert episode.result is not None, f"episode {episode.number} has not ended"
    # a call of a function that does not exist, or of none at all, is not noted by the world: one too many
    if protocol.environment == "functions" and episode.result.reward and episode.faults():
        return dataclasses.replace(episode.result, reward=0.0)
    return episode.result


def _without_failed(folded: Folded, episodes: Sequence[Sequence[Episode]]) -> Folded:
    items = []
    for item, played in zip(folded.items, episodes, strict=True):
        # What a broken tool cost is no score of the model.
        failed = [episode for episode in played if episode.end == INFRASTRUCTURE]
        if failed:
            item = dataclasses.replace(
                item, scores={}, failed=f"{len(failed)} of {len(played)} episodes failed by what they ran on")
        items.append(item)
    return dataclasses.replace(folded, items=items)


def write_episodes(output: Path, task: TaskFile, protocol: Protocol, model: EvaluatedModel,
                   tasks: Sequence[Task], episodes: Sequence[Sequence[Episode]], folded: Folded,
                   data_dir: Path, limit: int | None) -> Results:
    """Write what was found; returns it.

    Raises:
        UserError: nothing can be written there.
    """
    items = []
    for number, (asked, played, of_item) in enumerate(zip(tasks, episodes, folded.items, strict=True)):
        samples = tuple(ResultSample("\n".join(turn.text for turn in episode.turns), episode.end, reward)
                        for episode, reward in zip(played, of_item.sample_scores, strict=True))
        values = {name: of_item.scores.get(name) for name in folded.metric_names}
        items.append(ResultItem(task.name, str(number), _hash(dict(asked)), protocol.cluster(asked),
                                str(asked.get("question", "")), str(asked.get("answer", "")), values, samples,
                                of_item.failed))
    files = {path.relative_to(data_dir).as_posix(): sha256_file(path)
             for paths in task.files(data_dir).values() for path in paths}
    told = protocol.as_json()
    prompts = [list(episode.prompt) or asdict(episode.opening) for played in episodes for episode in played]
    scores = TaskScores(
        _hash([dict(task.config), asdict(protocol), files]), str(task.config.get("output_type")), len(items),
        tuple(metric_of_items(name, items, []) for name in folded.metric_names), {"files": files}, 0,
        _hash(prompts), True, protocol.mode, TaskSampling(**told["sampling"]), judged_by(folded.judge),
        told["agent_limits"], limit,
        sum(item.failed is not None for item in items), sum(item.num_at_limit for item in folded.items), None,
        protocol.published_as or None)
    return write_results(output, Results(model, {task.name: scores}, {}), items)


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=dict).encode()).hexdigest()


CACHE = "endpoint.sqlite"


class EndpointSpeaker:
    """A model behind an endpoint."""

    def __init__(self, url: str, settings: EndpointSettings, protocol: Protocol, cache: Path,
                 sleep: Callable[[float], object]) -> None:
        self._endpoint = endpoint_at(f"{url.rstrip('/')}/chat/completions", settings,
                                     EndpointCache(cache / CACHE), CHAT_PROBES, sleep)
        self._sampling = protocol.sampling
        self._request: dict[str, Any] = {"model": settings.model, "temperature": protocol.temperature}
        if protocol.temperature:
            self._request |= {"top_p": protocol.top_p}
            self._request |= {"top_k": protocol.top_k} if protocol.top_k else {}
        if protocol.chat_template_kwargs:  # as vLLM, SGLang and ours take it
            self._request["chat_template_kwargs"] = protocol.chat_template_kwargs

    def say(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], max_tokens: int,
            stream: int) -> Said:
        """Return the next turn, see `Speaker`."""
        payload = {**self._request, "messages": list(messages), "max_tokens": max_tokens}
        if tools:
            payload["tools"] = list(tools)
        if self._sampling.temperature:
            payload["seed"] = (self._sampling.seed + stream) % 2**31
        try:
            return self._endpoint.ask(payload, said_in)
        except (BadAnswer, TimeoutError) as e:
            raise NoTurn(str(e)) from None


def said_in(answer: Any) -> Said:
    """Return what a chat completion says.

    Raises:
        BadAnswer: it is none.
        UserError: it does not tell how many tokens there were.
    """
    choice = only(answer, "choices")
    message = choice.get("message")
    content = message.get("content") if isinstance(message, dict) else None
    calls = message.get("tool_calls") or [] if isinstance(message, dict) else None
    if not isinstance(message, dict) or not isinstance(calls, list) or not isinstance(content or "", str):
        raise BadAnswer("the endpoint sent a choice without a message of text and calls")
    tokens = told_tokens(answer)
    if tokens is None:
        raise UserError("the endpoint does not tell the tokens of its answers (`usage`), by which an "
                        "episode's limits are counted; serve the model with one that does, such as vLLM or "
                        "`megatron-sov serve`")
    # Servers name thoughts differently; they are given back under the name that they came by.
    told = next((name for name in REASONING if isinstance(message.get(name), str) and message[name]), None)
    given: Message = {"role": "assistant", "content": content or ""}
    text = content or ""
    if calls:
        # Written as text and read again: judged as strictly as a local model's calls.
        pieces = [_write_call(call) for call in calls]
        given["tool_calls"] = [_given_back(parse_turn(piece).calls[0]) for piece in pieces]
        # Marks in the text itself are no calls: the server has taken those out.
        text = text.replace(BEGIN_CALL, _break_mark(BEGIN_CALL)) + "".join(pieces)
    elif found := parse_turn(text).calls:  # a server without a parser of calls leaves them in the text
        thoughts, end, _ = text.rpartition(END_THOUGHTS)
        given |= {"content": f"{thoughts}{end}{parse_turn(text).content}",
                  "tool_calls": [_given_back(call) for call in found]}
    if told is not None:
        given[told] = message[told]
        thoughts = message[told].replace(END_THOUGHTS, _break_mark(END_THOUGHTS))
        text = f"{BEGIN_THOUGHTS}{thoughts}{END_THOUGHTS}{text}"
    return Said(text, given, choice.get("finish_reason") == "length", *tokens)


def _break_mark(mark: str) -> str:
    """Return a mark as text: what an endpoint has told apart already is not told apart once more."""
    return f"{mark[0]} {mark[1:]}"


def _write_call(call: Any) -> str:
    """Return a call as a model writes it, so that it is read as strictly as where no endpoint stands
    between."""
    function = call.get("function") if isinstance(call, Mapping) else None
    function = function if isinstance(function, Mapping) else {}
    name, said = json.dumps(function.get("name")), function.get("arguments")
    arguments = (said.strip() or "{}") if isinstance(said, str) else json.dumps(said)
    piece = f'{BEGIN_CALL}{{"name": {name}, "arguments": {arguments}}}{END_CALL}'
    try:
        json.loads(arguments)
        if len(parse_turn(piece).calls) == 1:
            return piece
    except (ValueError, RecursionError):
        pass
    # as a text, which is no object of arguments
    return f'{BEGIN_CALL}{{"name": {name}, "arguments": {json.dumps(arguments)}}}{END_CALL}'


def _given_back(call: ToolCall | BadCall) -> dict[str, Any]:
    """Return a call as it is given back: one that is none has no arguments, which templates would not read;
    its result says what was wrong."""
    name, arguments = getattr(call, "name", "unknown"), getattr(call, "arguments", {})
    return {"type": "function",
            "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}}
