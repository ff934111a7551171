"""Rounds by engine servers: over HTTP, with a fake vLLM."""

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sov.infer.engines.fleet import Fleet
from megatron_sov.infer.engines.server_engine import ServerEngine, ServerLocations
from megatron_sov.infer.engines.server_process import EngineServers
from megatron_sov.model.config.post_training import RolloutConfig
from megatron_sov.post.rl.generate import live, requests, servers
from megatron_sov.post.rl.generate.live import LiveRollouts
from megatron_sov.post.rl.generate.pieces import PendingPieces, PieceQueue
from megatron_sov.post.rl.generate.requests import (
    RequestWriter, RolloutRequestQueue, build_requests, write_by_requests)
from megatron_sov.post.rl.generate.responses import ResponseSource, compute_sampling_digest
from megatron_sov.post.rl.generate.servers import LiveServers, ServerSettings
from megatron_sov.post.rl.generate.writers import GenerationSettings
from megatron_sov.post.rl.reward import NO_REWARD, RewardJudge
from megatron_sov.rollouts.prompts import PromptList, UnusedRows, read_prompts
from megatron_sov.rollouts.rows import LENGTH, Rollout
from megatron_sov.rollouts.store import RolloutStore
from megatron_sov.runs.rounds import Policy
from megatron_sov.work.endpoints import transport
from megatron_sov.work.progress.locks import Claims
from tests.infer.engines.test_fleet import DoubleKeeper
from tests.token_servers import VOCAB, token_at

ROLLOUT = RolloutConfig(rounds=2, prompts_per_round=3, samples_per_prompt=2, piece_prompts=1,
                        max_new_tokens=6)


def settings_of(folder: Path, urls: tuple[str, ...] = (),
                servers: EngineServers | None = None) -> ServerSettings:
    return ServerSettings(start=folder, places=ServerLocations(folder, urls), longest=8,
                          servers=servers or EngineServers(), vocab_size=VOCAB, with_routes=False)


class Numbers:
    """In the place of a tokenizer: a prompt says its only id; nothing ends an answer early."""

    end_ids = (VOCAB - 1 + 100,)

    def encode_prompts(self, prompts: list[str]) -> list[list[int]]:
        return [[int(text)] for text in prompts]

    def decode(self, tokens: list[int]) -> str:
        return " ".join(map(str, tokens))

    def opened_thoughts(self, asked: list[int]) -> str:
        return ""


class Desk:
    """A job with servers; `newest` is the step of the newest policy."""

    def __init__(self, folder: Path, keepers: list[DoubleKeeper], rollout: RolloutConfig = ROLLOUT) -> None:
        path = folder / "prompts.jsonl"
        path.write_text("".join(json.dumps({"prompt": str(k)}) + "\n" for k in range(10, 16)))
        self.prompts: PromptList = read_prompts(path)
        self.newest, self.taken = 0, list[int]()
        self.store = RolloutStore.create(folder / "store", "sha256:0", VOCAB)
        self.fleet = Fleet(keepers, VOCAB, 4, look_s=0.02, backoff_s=(0.01, 0.05)).__enter__()
        self.engine = ServerEngine(self.fleet, folder, folder / "weights", 4)
        self.source = ResponseSource(Numbers(), rollout, "vllm", True, {})  # type: ignore[arg-type]
        self.requests = build_requests(self.engine, self.source, 4)
        pending = PendingPieces(
            store=self.store, claims=Claims(self.store.claims, 60.0), prompts=self.prompts, rollout=rollout,
            rounds=range(1, rollout.rounds + 1), find_policy=self._policy_of,
            sampling_digest=partial(self._sampling, rollout))
        self.queue = PieceQueue(pending=pending, store=self.store, wait_s=0.0, provenance={})

    def _policy_of(self, number: int) -> Policy | None:
        return Policy(Path("p"), self.newest, f"{self.newest:064x}") if self.newest >= number - 1 else None

    @staticmethod
    def _sampling(rollout: RolloutConfig, number: int) -> str:
        return compute_sampling_digest(rollout, number, {})

    def take(self, policy: Policy) -> None:
        self.taken.append(policy.step)
        self.fleet.update([f"/weights/{policy.step}"], policy.step)

    def rows(self, number: int) -> list[Rollout]:
        return [row for part in self.store.parts(number) for row in self.store.read_rollouts(part.name)]


@pytest.fixture
def desks(tmp_path: Path) -> Iterator[Callable[..., Desk]]:
    opened: list[Desk] = []

    def make(*given: object) -> Desk:
        opened.append(Desk(tmp_path, *given))  # type: ignore[arg-type]
        return opened[-1]

    yield make
    for desk in opened:
        desk.fleet.close()


def check_whole(rows: list[Rollout]) -> None:
    """Check that each response occurs once, and that each token has the policy version that wrote it."""
    assert len({(row.key.prompt, row.key.sample) for row in rows}) == len(rows) == 6
    for row in rows:
        ids = row.prompt_tokens.tolist()
        assert row.tokens.tolist() == [token_at(ids, i, int(v)) for i, v in enumerate(row.versions)]
        assert row.finish_reason == LENGTH and len(row.tokens) == 6


def test_rounds_are_written_by_the_newest_policy_and_published_piece_by_piece(
        desks: Callable[..., Desk]) -> None:
    keepers = [DoubleKeeper(), DoubleKeeper()]
    desk = desks(keepers)
    summary = write_by_requests(desk.requests, desk.queue, 4, desk.take)
    assert summary["parts"] == 3 and "round 2 waits for a policy" in summary["waits_for"]
    check_whole(desk.rows(1))
    # the samples of a prompt in one request
    asked = [body for keeper in keepers for body in keeper.doubles[0].asked]
    assert [body["sampling_params"]["n"] for body in asked] == [2, 2, 2]
    desk.newest = 1
    again = write_by_requests(desk.requests, desk.queue, 4, desk.take)
    assert again["parts"] == 6 and desk.taken == [1]
    check_whole(desk.rows(2))
    assert {int(v) for row in desk.rows(2) for v in row.versions} == {1}


@pytest.mark.parametrize(("more", "room", "sent"), [
    ({}, 6, 1), ({}, 5, 3), ({"max_staleness": 1}, 6, 3), ({"deadline_s": 60.0}, 6, 3)])
def test_samples_of_a_prompt_are_joined_in_a_request(more: dict[str, Any], room: int, sent: int,
                                                     desks: Callable[..., Desk]) -> None:
    keeper = DoubleKeeper()
    desk = desks([keeper], replace(ROLLOUT, rounds=1, piece_prompts=3, **more))
    desk.fleet.requests = room
    whole = build_requests(desk.engine, desk.source, room, is_live=True)
    requests = RolloutRequestQueue(requests=whole, pieces=desk.queue, load_policy=None, room=room)
    while requests.advance(5.0, lambda: not desk.queue.pending.is_complete):
        pass
    requests.close()
    check_whole(desk.rows(1))
    names = [body["request_id"] for body in keeper.doubles[0].asked]
    assert len(set(names)) == sent


@pytest.mark.parametrize(("is_live", "deadline_s", "asked"), [
    (True, 0.0, 6), (True, 60.0, 2), (False, 0.0, 2)])
def test_servers_receive_all_available_work_ahead(is_live: bool, deadline_s: float, asked: int,
                                                  desks: Callable[..., Desk]) -> None:
    desk = desks([DoubleKeeper(0.05)], replace(ROLLOUT, rounds=1, deadline_s=deadline_s))
    requests = RolloutRequestQueue(requests=desk.requests, pieces=desk.queue, room=1,
                            load_policy=None if is_live else desk.take)
    assert requests.advance(0.0, lambda: True)
    assert sum(len(piece.rows) for piece in requests.under_way) == asked
    requests.close()


def test_a_round_asks_a_server_for_no_more_than_it_needs(desks: Callable[..., Desk],
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "KEEPALIVE_S", 60.0)  # a busy machine may stand still for longer than that
    keeper, now_s = DoubleKeeper(), [0.0]
    desk = desks([keeper], replace(ROLLOUT, piece_prompts=3))
    # the clock stands still: waiting between two rounds would never end
    queue = RolloutRequestQueue(requests=desk.requests, pieces=desk.queue, load_policy=None, room=4,
                         clock_s=lambda: now_s[0])
    seen: list[tuple[int, int]] = []
    for number in (1, 2):
        desk.newest = number - 1
        desk.fleet.update([f"/weights/{number}"], desk.newest)
        queue.begin(range(number, number + 1), lambda: False)
        assert queue.under_way, "nothing is asked for before the first look"
        looks = 0
        while queue.advance(1.0, partial(desk.queue.pending.is_open, number)):
            looks += 1
            assert looks < 100
        server = keeper.doubles[0]
        seen.append((len(server.asked), len(server.orders)))
    queue.close()
    check_whole(desk.rows(2))
    # of each round one request for both samples of a prompt, and the seven orders of one update
    assert seen == [(3, 7), (6, 14)]
    # there is room for two requests: a thread and a connection for each, and others for orders and a watch
    assert server.num_connections <= 2 + 2
    assert len(desk.fleet._threads) <= 2 + 1


def test_a_stop_releases_claims_and_the_next_command_finishes(desks: Callable[..., Desk]) -> None:
    desk = desks([DoubleKeeper(0.05)], replace(ROLLOUT, rounds=1))
    asked: list[bool] = []
    desk.queue.asked_to_stop = lambda: bool(asked)
    requests = RolloutRequestQueue(requests=desk.requests, pieces=desk.queue, load_policy=desk.take, room=4)
    assert requests.advance(0.05, lambda: True)
    asked.append(True)
    assert not requests.advance(1.0, lambda: True)
    requests.close()
    asked.clear()
    write_by_requests(desk.requests, desk.queue, 4, desk.take)
    check_whole(desk.rows(1))


def test_validations_ask_the_servers_that_training_has_at_work(desks: Callable[..., Desk], tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    desk = desks([DoubleKeeper(0.02)])
    live_servers = LiveServers(settings_of(tmp_path), engine=desk.engine)
    pushed: list[int] = []
    monkeypatch.setattr(live_servers, "push_weights", lambda view, policy: pushed.append(policy.step))
    monkeypatch.setattr(live_servers, "check", lambda *_: None)
    for module in (live, requests):
        monkeypatch.setattr(module, "run_on_main", lambda world, work: work())

    def rollouts_of(prompts: PromptList, rollout: RolloutConfig, store: RolloutStore) -> LiveRollouts:
        source = ResponseSource(Numbers(), rollout, "vllm", True, {})  # type: ignore[arg-type]
        opened: Any = SimpleNamespace(open=lambda: store)
        settings = GenerationSettings(
            store=opened, prompts=prompts, set_aside=UnusedRows({}, [], ""), rollout=rollout, run=tmp_path,
            source=source, provenance={})
        return LiveRollouts(settings=settings, writer=RequestWriter(settings, live_servers),
                            reward=RewardJudge(NO_REWARD, (), 1, NO_REWARD))

    held = RolloutStore.create(tmp_path / "validation", "sha256:0", VOCAB)
    training = rollouts_of(desk.prompts, replace(ROLLOUT, max_staleness=1), desk.store)
    validation = rollouts_of(desk.prompts[:2], ROLLOUT.for_validation(2), held)
    view: Any = SimpleNamespace(world=None, step=0, checkpointer=SimpleNamespace(advance=lambda: None),
                                events=SimpleNamespace(write=lambda *_, **__: None))
    policy = Policy(Path("p"), 0, "0" * 64)
    training.write(view, 1, policy, lambda: False)
    check_whole(desk.rows(1))
    # while the servers write round 2
    validation.write(view, 1, policy, lambda: False)
    assert [len(row.tokens) for part in held.parts(1) for row in held.read_rollouts(part.name)] == [6, 6]
    training.write(view, 2, policy, lambda: False)
    check_whole(desk.rows(2))
    assert pushed == [0, 0, 0]
    training.close()
    validation.close()  # whose servers have ended
    assert live_servers._closed.is_set()


@pytest.mark.parametrize(("urls", "given"), [((), []), (("http://other:8000",), [0])])
def test_remote_servers_get_the_initial_weights(urls: tuple[str, ...], given: list[int], tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    updates: list[int] = []
    engine = SimpleNamespace(update=lambda weights, version: updates.append(version))
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(servers, "find_target", lambda path: SimpleNamespace(path=path, is_hf=True))
    monkeypatch.setattr(servers, "open_server_engine", lambda *args, **kwargs: nullcontext(engine))
    monkeypatch.setattr(servers, "export_weights", lambda model: iter(()))
    monkeypatch.setattr(servers, "run_on_main", lambda world, work: work())
    live_servers = LiveServers(settings_of(tmp_path, urls))
    while live_servers.is_opening(1.0):
        pass
    view: Any = SimpleNamespace(world=SimpleNamespace(is_main=True), policy=SimpleNamespace(
        model=SimpleNamespace(finish_param_gather=lambda: None)))
    for _ in range(2):
        live_servers.push_weights(view, Policy(Path("p"), 0, "0" * 64))
    live_servers.close()
    assert updates == given


def test_a_stopping_run_does_not_wait_for_a_silent_server(tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(servers, "find_target", lambda path: SimpleNamespace(path=path, is_hf=True))
    live_servers = LiveServers(settings_of(tmp_path, ("http://127.0.0.1:9",), EngineServers(start_s=1e6)))
    assert live_servers.is_opening(0.1)
    live_servers.close()
    assert live_servers.engine is None
