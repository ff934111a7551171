"""Episodes by servers: rows equal those of an engine, with delays and deadlines inside turns."""

import contextlib
import hashlib
import itertools
import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sov.base.documents.shard_files import RouteShape
from megatron_sov.base.errors import UserError
from megatron_sov.chat.encode import TurnEncoder
from megatron_sov.infer.engines.fleet import Fleet
from megatron_sov.infer.engines.server_engine import ServerEngine
from megatron_sov.judge.tools.episode import GeneratedTurn
from megatron_sov.judge.tools.playing import EpisodeSettings
from megatron_sov.judge.tools.registry import build_versioned_environment, request_environment
from megatron_sov.model.config.post_training import RolloutConfig
from megatron_sov.post.rl.generate import requests
from megatron_sov.post.rl.generate.episodes import Episodes
from megatron_sov.post.rl.generate.pieces import PendingPieces, PieceQueue, SampleAttempt
from megatron_sov.post.rl.generate.requests import RolloutRequestQueue, build_requests, write_by_requests
from megatron_sov.post.rl.generate.responses import compute_sampling_digest
from megatron_sov.rollouts.prompts import PromptList, RolloutPrompt
from megatron_sov.rollouts.round_order import PromptPiece
from megatron_sov.rollouts.rows import UNFINISHED, Rollout, select_last_attempts
from megatron_sov.rollouts.store import RolloutStore
from megatron_sov.runs.rounds import Policy
from megatron_sov.work.endpoints.token_server import (
    ABORTED, LENGTH, STOP, TokenAnswer, TokenRequest, VersionSpan)
from megatron_sov.work.progress.locks import Claims
from tests.judge.tools.fuzzed_episodes import BEGIN, LIMITS, FuzzedPolicy, chat_encoder

ROLLOUT = RolloutConfig(rounds=1, prompts_per_round=2, samples_per_prompt=2, piece_prompts=2,
                        max_new_tokens=LIMITS.max_response_tokens)
SHAPE = RouteShape(2, 2, 8)
CHAT = chat_encoder()
ENCODER = TurnEncoder(CHAT, "the test's tokenizer")
(BEGINS,) = CHAT.encode_text(BEGIN)


class Greedy:
    """A model that writes one turn after a conversation, and continues a partial turn."""

    def __init__(self, turn: Callable[[Sequence[int]], list[int]]) -> None:
        self._turn = turn

    def behind(self, ids: Sequence[int]) -> list[int]:
        # the opening of the turn: its mark, the role, a line feed
        opening = CHAT.encode_text(f"{BEGIN}assistant\n")
        first = max(n for n, id_ in enumerate(ids) if id_ == BEGINS) + len(opening)
        turn = self._turn(ids[:first])
        assert list(ids[first:]) == turn[:len(ids) - first], "it goes on with what it did not write"
        return turn[len(ids) - first:]

    def sample(self, prompts: Sequence[Sequence[int]], max_new_tokens: int,
               streams: Sequence[int]) -> list[GeneratedTurn]:
        written = [self.behind(prompt)[:max_new_tokens] for prompt in prompts]
        return [GeneratedTurn(ids, [-id_ / 1000 for id_ in ids], routes=routes_of([*prompt, *ids][:-1]))
                for prompt, ids in zip(prompts, written, strict=True)]


def fuzzed(before: Sequence[int]) -> list[int]:
    """Return a turn of any kind that follows from the conversation alone."""
    seed = hashlib.sha256(np.array(before, np.int32).tobytes()).digest()
    rng, policy = random.Random(seed), FuzzedPolicy("files", CHAT, ENCODER.end_ids[0])
    while BEGINS in (ids := policy._turn(rng)):
        pass
    return ids


def routes_of(ids: Sequence[int]) -> np.ndarray:
    """Return routes in which each token has gone where it and its place say."""
    first = (np.array(ids) + np.arange(len(ids)))[:, None, None] + np.arange(2)[None, :, None]
    return np.concatenate([first % 8, (first + 1) % 8], axis=2).astype(SHAPE.dtype)


@dataclass
class Server:
    """A server of such a model, and its keeper."""

    model: Greedy
    url: str = "http://double"
    token_s: float = 0.0
    held_at: int | None = None
    """Tokens of a turn after which it waits to be aborted."""
    version: int = 0
    num_written: int = 0
    aborted: set[str] = field(default_factory=set)

    def write(self, request: TokenRequest) -> list[TokenAnswer]:
        told: list[int] = []
        versions: list[int] = []
        for token in self.model.behind(request.ids)[:request.max_new_tokens]:
            time.sleep(self.token_s)
            while len(told) == self.held_at and request.name not in self.aborted:
                time.sleep(0.001)
            if request.name in self.aborted:
                return self._answer(request, told, versions, ABORTED)
            told.append(token)
            versions.append(self.version)
            self.num_written += 1
            if token in request.stop_ids:
                return self._answer(request, told, versions, STOP)
        return self._answer(request, told, versions, LENGTH)

    def _answer(self, request: TokenRequest, told: list[int], versions: list[int],
                reason: str) -> list[TokenAnswer]:
        spans = tuple(VersionSpan(v, versions.index(v), versions.index(v) + versions.count(v))
                      for v in sorted(set(versions)))
        # a server reports nothing about requests aborted before they began
        routes = routes_of([*request.ids, *told][:-1]).astype(np.int32) if told else None
        return [TokenAnswer(told, [-token / 1000 for token in told], reason, spans, routes)]

    def abort(self, requests: Sequence[TokenRequest]) -> None:
        self.aborted |= {request.name for request in requests}

    def update(self, files: Sequence[str], version: int) -> None:
        self.version = version

    def is_healthy(self) -> bool:
        return True

    def is_alive(self) -> bool:
        return True

    def start(self, should_stop: Callable[[], bool]) -> Any:
        return self

    def pause(self) -> None:
        pass

    resume = end = pause


class Job:
    """A job with servers, over the tasks of a world."""

    def __init__(self, folder: Path, world: str, tasks: Sequence[Any], servers: Sequence[Server],
                 rollout: RolloutConfig = ROLLOUT) -> None:
        self.prompts = PromptList.from_prompts(RolloutPrompt(f"{n:016x}", task) for n,
                                               task in enumerate(tasks))
        self.store = RolloutStore.create(folder / "store", "sha256:0", ENCODER.end_ids[0] + 1)
        self.step, self.stack = 0, contextlib.ExitStack()
        fleet = self.stack.enter_context(Fleet(servers, ENCODER.end_ids[0] + 1, 4, look_s=0.02))
        engine = ServerEngine(fleet, folder, folder / "weights", 4)
        engine._route_shape = SHAPE
        self.source = Episodes(
            table=EpisodeSettings(request_environment(world, {}), ENCODER, LIMITS,
                                  4), version="v1", decode=CHAT.decode,
            end_ids=ENCODER.end_ids, rollout=rollout, engine_name="script", chosen_by={}, with_routes=True)
        pending = PendingPieces(
            store=self.store, claims=Claims(self.store.claims, 60.0), prompts=self.prompts, rollout=rollout,
            rounds=range(1, 2), find_policy=lambda number: Policy(folder, self.step, f"{self.step:064x}"),
            sampling_digest=lambda number: compute_sampling_digest(rollout, number, {}))
        self.requests = build_requests(engine, self.source, 4)
        self.queue = PieceQueue(pending=pending, store=self.store, wait_s=0.0, provenance={})
        self.fleet = fleet

    def take(self, policy: Policy) -> None:
        self.fleet.update([], policy.step)

    def rows(self) -> list[Rollout]:
        return [row for part in self.store.parts(1) for row in self.store.read_rollouts(part.name)]

    def in_step(self, model: Greedy) -> list[Rollout]:
        """Return the rows of an engine that plays all episodes in step."""
        piece = PromptPiece(1, 0, self.prompts)
        [rows] = self.source.play_attempts(model, [SampleAttempt(piece, 0, Policy(Path(), 0, "0" * 64))])
        return rows


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    with contextlib.ExitStack() as stack:
        def make_job(*given: Any) -> Job:
            found = Job(tmp_path, *given)
            stack.enter_context(found.stack)
            stack.callback(found.requests.close)
            return found

        yield make_job


def told(row: Rollout) -> tuple[Any, ...]:
    assert row.routes is not None
    return (row.tokens.tolist(), row.logprobs.tolist(), row.is_written.tolist(), row.response,
            row.finish_reason, row.outcome, row.prompt_tokens.tolist(), row.routes.tolist())


EXAMPLES: Any = build_versioned_environment(request_environment("files", {}))[0]


def test_servers_make_the_same_rows_as_an_engine_in_step(job: Callable[..., Job]) -> None:
    model = Greedy(fuzzed)
    one = job("files", EXAMPLES.EXAMPLES[:2], [Server(model), Server(model)])
    summary = write_by_requests(one.requests, one.queue, 4, one.take)
    assert (summary["parts"], summary["responses"], summary["waits_for"]) == (1, 4, "")
    found = {(row.key.prompt, row.key.sample): told(row) for row in one.rows()}
    expected = {(row.key.prompt, row.key.sample): told(row) for row in one.in_step(model)}
    assert found == expected and len(found) == 4
    assert any(len(row.spans) > 1 for row in one.rows()), "no tool was called"
    # each token that was read has gone where it went when it was read first
    for row in one.rows():
        whole = [*row.prompt_tokens.tolist(), *row.tokens.tolist()]
        assert row.routes is not None and np.array_equal(row.routes, routes_of(whole[:-1]))


def test_the_next_policy_continues_a_turn_after_a_deadline(job: Callable[..., Job]) -> None:
    model, now_s = Greedy(fuzzed), [0.0]
    server = Server(model, held_at=3)
    one = job("files", EXAMPLES.EXAMPLES[:2], [server], replace(ROLLOUT, deadline_s=10.0))
    queue = RolloutRequestQueue(requests=one.requests, pieces=one.queue, load_policy=one.take, room=4,
                         clock_s=lambda: now_s[0])
    assert queue.advance(1.0, lambda: server.num_written < 12) is False
    now_s[0] = 20.0
    assert queue.advance(1.0, lambda: not one.store.parts(1)) is False
    cut = [row for row in one.rows() if row.finish_reason == UNFINISHED]
    assert cut and all(len(row.tokens) and row.tokens[-1] not in ENCODER.end_ids for row in cut)
    # a second episode in the same process would end a running server session
    asked: Any = one.requests
    processes = [host._workers._workers for host in asked._player._free_hosts]
    assert processes.count([]) >= len(cut)
    one.step, server.held_at = 1, None
    while queue.advance(1.0, lambda: True):
        pass
    found = {(row.key.prompt, row.key.sample): row for row in select_last_attempts(one.rows())}
    for row in one.in_step(model):
        ended = found.pop((row.key.prompt, row.key.sample))
        assert told(ended) == told(row)
        assert {0, 1} <= set(ended.versions[ended.is_written].tolist()), "none was cut off"
    assert not found


@pytest.mark.deep
def test_a_run_whose_deadline_is_too_short_for_a_token_ends(job: Callable[..., Job],
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy that could go on with them would learn from the round that waits for them."""
    monkeypatch.setattr(requests, "LOOKUP_S", 0.02)  # the clock that counts is the one below
    clock = itertools.count(0, 20)
    one = job("files", EXAMPLES.EXAMPLES[:2], [Server(Greedy(fuzzed), held_at=0)],
              replace(ROLLOUT, deadline_s=10.0))
    queue = RolloutRequestQueue(requests=one.requests, pieces=replace(one.queue, wait_s=60.0),
                                load_policy=None, room=4, clock_s=lambda: float(next(clock)))
    with pytest.raises(UserError, match=r"rollout.deadline_s = 10: some"):
        queue.advance(1e9, lambda: True)


WAITING = '''
import pathlib
import time
from megatron_sov.judge.tools.environment import World
from megatron_sov.judge.tools.environment import tool

class Waiting(World):
    @tool
    def wait(self) -> str:
        """Wait for the other."""
        while not pathlib.Path(self.task["file"]).exists():
            time.sleep(0.01)
        return "it came"

    @tool
    def look(self) -> str:
        """Look."""
        return "nothing"

    @tool
    def go(self) -> str:
        """Let the other go on."""
        pathlib.Path(self.task["file"]).touch()
        return "went"

    def score(self, answer: str) -> float:
        return 1.0
'''


def test_an_episode_waits_for_no_tool_of_another(job: Callable[..., Job], tmp_path: Path) -> None:
    """In step the slow tool of the first turn would hold up the second turn, which lets it go on."""
    (tmp_path / "world.py").write_text(WAITING)
    turns = {"first": ["wait"], "second": ["look", "go"]}

    def turn(before: Sequence[int]) -> list[int]:
        text = CHAT.decode(before)
        calls = turns["first" if "I am first" in text else "second"]
        place = text.count(f"{BEGIN}tool")
        said = "done" if place == len(calls) else (
            f"<tool_call>{json.dumps({'name': calls[place], 'arguments': {}})}</tool_call>")
        return [*CHAT.encode_text(said), ENCODER.end_ids[0]]

    tasks = [{"question": f"I am {who}.", "file": str(tmp_path / "went")} for who in turns]
    one = job(f"{tmp_path / 'world.py'}:Waiting", tasks, [Server(Greedy(turn))],
              replace(ROLLOUT, samples_per_prompt=1))
    write_by_requests(one.requests, one.queue, 4, one.take)
    first, second = one.rows()
    assert "it came" in first.response and "went" in second.response
    assert all(row.outcome is not None and row.outcome["reward"] == 1.0 for row in (first, second))


def test_a_wrong_task_ends_the_work_and_every_episode(job: Callable[..., Job]) -> None:
    server = Server(Greedy(fuzzed), token_s=0.01)
    one = job("files", [EXAMPLES.EXAMPLES[0], {"question": 3}], [server])
    with pytest.raises(UserError, match="task question = '3'"):
        write_by_requests(one.requests, one.queue, 4, one.take)
    assert not one.rows() and not [t for t in threading.enumerate() if t.name.startswith("episode")]
