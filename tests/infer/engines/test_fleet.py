"""A fleet of engine servers: a shared queue of requests, weight transfers, and servers that die."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_sov.base.errors import UserError
from megatron_sov.infer.engines import server_process
from megatron_sov.infer.engines.fleet import AddressKeeper, Fleet
from megatron_sov.infer.engines.server_engine import (
    GROUP, GROUPED_TOKENS, ServerEngine, ServerLocations, WeightFiles, open_fleet)
from megatron_sov.infer.engines.server_process import (
    ENGINE_PYTHON, EngineServers, ServerProcess, check_vllm_program)
from megatron_sov.infer.request import GenerationBounds, Sampling, StopRule
from megatron_sov.work.endpoints.token_server import TokenRequest
from megatron_sov.work.endpoints.vllm_server import VllmServer
from tests.token_servers import VOCAB, VllmDouble, compute_token


class DoubleKeeper:
    """Starts a new server double each time, like a process."""

    def __init__(self, token_s: float = 0.0, lives: int = 99, settings: EngineServers | None = None) -> None:
        self.doubles: list[VllmDouble] = []
        self._token_s, self._lives = token_s, lives
        self._settings = settings or EngineServers(answer_s=20)

    def start(self, should_stop: Callable[[], bool]) -> VllmServer | None:
        self.doubles.append(VllmDouble(self._token_s))
        if len(self.doubles) > self._lives:
            self.doubles[-1].is_dead = True
        return self._settings.connect(self.doubles[-1].url)

    def is_alive(self) -> bool:
        return not self.doubles[-1].is_dead

    def end(self) -> None:
        for double in self.doubles:
            double.close()


@pytest.fixture
def fleets() -> Iterator[Callable[..., Fleet]]:
    fleets_to_close: list[Fleet] = []

    def build(keepers: list[DoubleKeeper], requests: int = 4, restarts: int = 3) -> Fleet:
        fleets_to_close.append(Fleet(keepers, VOCAB, requests, restarts, look_s=0.02, backoff_s=(0.01, 0.05)))
        return fleets_to_close[-1].__enter__()

    yield build
    for fleet in fleets_to_close:
        fleet.close()


def build_requests(count: int, tokens: int = 5) -> list[TokenRequest]:
    return [TokenRequest(f"r{i}", [3 + i], tokens) for i in range(count)]


def compute_answer(request: TokenRequest, version: int = 0) -> list[int]:
    return [compute_token(list(request.ids), place, version) for place in range(request.max_new_tokens)]


def test_servers_share_one_queue(fleets: Callable[..., Fleet]) -> None:
    keepers = [DoubleKeeper(0.002), DoubleKeeper(0.002)]
    fleet = fleets(keepers, 2)
    slow_future = fleet.submit(TokenRequest("slow", [3], 2000))
    quick_futures = [(request, fleet.submit(request)) for request in build_requests(20)]
    assert all(future.result(10)[0].tokens == compute_answer(request) for request, future in quick_futures)
    # Both servers answered quick requests, although one of them was busy with the slow one.
    assert not slow_future.done() and all(keeper.doubles[0].generate_bodies for keeper in keepers)
    fleet.abort(["slow"])
    assert slow_future.result(10)[0].reason == "abort"


def test_answers_count_against_server_capacity(fleets: Callable[..., Fleet],
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """Two requests of two answers run at once on a server with room for five answers."""
    keeper = DoubleKeeper(0.02)
    fleet, lock = fleets([keeper], 5), threading.Lock()
    generate = keeper.doubles[0]._generate
    num_running = max_running = 0

    def count_and_generate(body: dict[str, Any]) -> tuple[int, Any]:
        nonlocal num_running, max_running
        with lock:
            num_running += 1
            max_running = max(max_running, num_running)
        result = generate(body)
        with lock:
            num_running -= 1
        return result

    monkeypatch.setattr(keeper.doubles[0], "_generate", count_and_generate)
    futures = [fleet.submit(TokenRequest(f"g{k}", [3], 4, count=2)) for k in range(6)]
    assert [len(future.result(10)) for future in futures] == [2] * 6
    assert max_running == 2


def test_oversized_request_runs_alone(fleets: Callable[..., Fleet]) -> None:
    future = fleets([DoubleKeeper()], 2).submit(TokenRequest("a", [3], 4, count=3))
    assert len(future.result(10)) == 3


def test_an_abort_ends_all_answers_of_a_request(fleets: Callable[..., Fleet]) -> None:
    keeper = DoubleKeeper(0.01)
    fleet = fleets([keeper], 2)
    futures = [fleet.submit(TokenRequest(name, [3], 4000, count=2)) for name in ("written", "waiting")]
    while keeper.doubles[0].num_generated < 4:
        time.sleep(0.002)
    fleet.abort(["written", "waiting"])
    running_answers, waiting_answers = (future.result(10) for future in futures)
    assert [answer.reason for answer in (*running_answers, *waiting_answers)] == ["abort"] * 4
    assert all(answer.tokens for answer in running_answers)
    assert not any(answer.tokens for answer in waiting_answers)


def wait_for_servers(fleet: Fleet, keeper: DoubleKeeper, starts: int = 1) -> None:
    """Wait until all servers run, and the keeper has started one `starts` times."""
    while len(keeper.doubles) < starts or any(member.server is None for member in fleet._members):
        time.sleep(0.01)


def test_requests_of_a_dead_server_move_and_it_restarts(fleets: Callable[..., Fleet]) -> None:
    keepers = [DoubleKeeper(0.01), DoubleKeeper(0.01)]
    fleet = fleets(keepers)
    fleet.update(["/first"], 4)
    futures = [(request, fleet.submit(request)) for request in build_requests(16, 12)]
    time.sleep(0.05)
    keepers[0].doubles[0].is_dead = True
    for request, future in futures:
        assert future.result(20)[0].tokens == compute_answer(request, version=4)
    wait_for_servers(fleet, keepers[0], starts=2)
    # a restarted server gets the newest weights before requests
    assert (keepers[0].doubles[1].weights, keepers[0].doubles[1].version) == ("/first", "4")


def test_group_transfer_reaches_restarted_servers(fleets: Callable[..., Fleet], tmp_path: Path) -> None:
    keepers = [DoubleKeeper(settings=EngineServers(answer_s=20, transfer="collective")) for _ in range(2)]
    fleet = fleets(keepers)
    wait_for_servers(fleet, keepers[0])
    engine = ServerEngine(fleet, tmp_path, tmp_path / "w", 4)
    engine.update(iter({"w": torch.arange(3.0), "b": torch.ones(1, dtype=torch.bfloat16)}.items()), 5)
    assert engine.generate([[3, 1]], Sampling(6)).version == 5
    keepers[0].doubles[0].is_dead = True
    wait_for_servers(fleet, keepers[0], starts=2)
    for double in (keepers[0].doubles[0], keepers[0].doubles[1], keepers[1].doubles[0]):
        assert double.version == "5" and not double.weights, "weights were read from files"
        assert torch.equal(double.received["w"], torch.arange(3.0))
        assert torch.equal(double.received["b"], torch.ones(1, dtype=torch.bfloat16))
    engine.close()


def test_server_that_dies_during_transfer_gets_weights_again(fleets: Callable[..., Fleet], tmp_path: Path,
                                                             capsys: pytest.CaptureFixture[str]) -> None:
    keeper = DoubleKeeper(settings=EngineServers(answer_s=20, transfer="collective"))
    engine = ServerEngine(fleets([keeper]), tmp_path, tmp_path / "w", 4)
    keeper.doubles[0].dies_in_transfer = True
    engine.update(iter({"w": torch.arange(3.0)}.items()), 5)
    assert [double.version for double in keeper.doubles] == ["default", "5"]
    assert torch.equal(keeper.doubles[1].received["w"], torch.arange(3.0))
    # the transfer or the watch of the process reports the death, whichever is first
    errors = capsys.readouterr().err
    assert f"{keeper.doubles[0].url}: " in errors and "it is restarted" in errors
    engine.close()


def test_update_during_requests_reaches_all_servers(fleets: Callable[..., Fleet]) -> None:
    keepers = [DoubleKeeper(0.01), DoubleKeeper(0.01)]
    fleet = fleets(keepers)
    futures = [fleet.submit(request) for request in build_requests(4, 30)]
    time.sleep(0.08)
    fleet.update(["/later"], 7)
    for future in futures:
        versions = [span.version for span in future.result(10)[0].versions]
        assert versions in ([0, 7], [7])
    assert {keeper.doubles[0].version for keeper in keepers} == {"7"}


def test_server_that_cannot_score_is_skipped(fleets: Callable[..., Fleet], monkeypatch: pytest.MonkeyPatch,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    keepers = [DoubleKeeper(), DoubleKeeper()]
    fleet = fleets(keepers)
    wait_for_servers(fleet, keepers[0])
    assert len(fleet.score([5, 6])) == 2
    monkeypatch.setattr(keepers[0].doubles[0], "_generate", lambda body: (500, {}))
    assert len(fleet.score([5, 6])) == 1
    assert f"{keepers[0].doubles[0].url}: cannot score a text" in capsys.readouterr().err


def test_ids_outside_the_vocabulary_are_rejected(fleets: Callable[..., Fleet]) -> None:
    keeper = DoubleKeeper()
    fleet = fleets([keeper])
    for ids in ([VOCAB], [-1], []):
        with pytest.raises(UserError, match=f"vocab_size = {VOCAB}"):
            fleet.submit(TokenRequest("bad", ids, 3))
    assert not keeper.doubles[0].generate_bodies


def test_repeated_server_deaths_raise_user_error(fleets: Callable[..., Fleet]) -> None:
    fleet = fleets([DoubleKeeper(lives=0)], restarts=2)
    future = fleet.submit(TokenRequest("a", [3], 5))
    with pytest.raises(UserError, match="died 3 times without"):
        future.result(20)
    with pytest.raises(UserError, match="died 3 times"):
        fleet.submit(TokenRequest("b", [3], 5))


def test_fleet_implements_engine(fleets: Callable[..., Fleet], tmp_path: Path) -> None:
    keeper = DoubleKeeper()
    engine = ServerEngine(fleets([keeper]), tmp_path, tmp_path / "w", 4)
    expected = [compute_token([3, 1], place, 0) for place in range(6)]
    result = engine.generate([[3, 1], [3, 2]], Sampling(6), stop=StopRule((expected[3],)))
    assert result.continuations[0] == expected[:4] and result.finish_reasons[0] == "stop"
    assert result.logprobs[0] == [-token / 100 for token in expected[:4]] and result.version == 0
    engine.update(iter({"w": torch.arange(3.0)}.items()), 5)
    file = load_file(keeper.doubles[0].weights)
    assert torch.equal(file["w"], torch.arange(3.0))
    updated_result = engine.generate([[3, 1]], Sampling(6))
    assert updated_result.version == 5
    assert updated_result.continuations[0] == [compute_token([3, 1], place, 5) for place in range(6)]
    engine.close()
    assert not list(tmp_path.iterdir())


def test_short_samples_are_grouped_into_requests(fleets: Callable[..., Fleet], tmp_path: Path) -> None:
    fleet = fleets([DoubleKeeper()], 6)
    engine = ServerEngine(fleet, tmp_path, tmp_path / "w", 6)

    def count_answers(prompts: list[list[int]], *samplings: Sampling) -> list[int]:
        """Return the number of answers that each request asks for."""
        requests = engine.requests(prompts, samplings, (2,))
        assert len({request.name for request in requests}) == len(requests)
        return [request.count for request in requests]

    short = Sampling(GROUPED_TOKENS, temperature=1.0)
    assert count_answers([[3]] * 8 + [[4]], *[short] * 9) == [6, 2, 1]
    fleet.requests = 99
    assert count_answers([[3]] * (GROUP + 1), *[short] * (GROUP + 1)) == [GROUP, 1]
    # a truncated response continues after its own ids, with fewer tokens left
    assert count_answers([[3], [3, 5], [3]], *[short] * 3) == [1, 1, 1]
    assert count_answers([[3]] * 2, short, replace(short, max_new_tokens=5)) == [1, 1]
    # long samples are not grouped: the next request starts as soon as any request has ended
    assert count_answers([[3]] * 2, *[replace(short, max_new_tokens=GROUPED_TOKENS + 1)] * 2) == [1, 1]
    assert count_answers([[3]] * 2, *[Sampling(5)] * 2) == [1, 1], "greedy samples of a prompt are equal"


def test_joined_prompts_use_one_request_per_server(fleets: Callable[..., Fleet], tmp_path: Path) -> None:
    keepers = [DoubleKeeper(), DoubleKeeper()]
    fleet = fleets(keepers, 12)
    engine = ServerEngine(fleet, tmp_path, tmp_path / "w", 24)
    prompts, short = [[3 + k // 4] for k in range(24)], Sampling(5, temperature=1.0)
    requests = engine.requests(prompts, [short] * 24, (2,), are_joined=True)
    assert [(request.prompts, request.count) for request in requests] == [
        ([[3], [4], [5]], 4), ([[6], [7], [8]], 4)]
    futures = [fleet.submit(request) for request in requests]
    answers = [answer for future in futures for answer in future.result(10)]
    assert [a.tokens for a in answers] == [[compute_token(ids, n, 0) for n in range(5)] for ids in prompts]
    # a joined request has at most as many answers as a server has room for
    fleet.requests = 8
    requests = engine.requests(prompts, [short] * 24, (2,), are_joined=True)
    assert [request.num_answers for request in requests] == [8, 8, 8]
    # long samples and samples of different settings are not joined
    long = [replace(short, max_new_tokens=GROUPED_TOKENS + 1)] * 3
    for samplings in (long, [short, replace(short, temperature=0.5), short]):
        assert len(engine.requests([[3], [4], [5]], samplings, (2,), are_joined=True)) == 3
    with pytest.raises(UserError, match="bad: has no token ids, or ids outside the model's vocab_size"):
        fleet.submit(TokenRequest("bad", [3], 3, others=([VOCAB],)))


def test_bounds_abort_running_requests(fleets: Callable[..., Fleet], tmp_path: Path) -> None:
    engine = ServerEngine(fleets([DoubleKeeper(0.01)]), tmp_path, tmp_path / "w", 4)
    ended = threading.Event()
    threading.Timer(0.1, ended.set).start()
    result = engine.generate([[3, 1], [3, 2]], Sampling(400), bounds=GenerationBounds([3, 400], ended.is_set))
    assert len(result.continuations[0]) == 3 and 0 < len(result.continuations[1]) < 400
    assert result.finish_reasons == ["length", "length"]


def test_weight_files_are_sharded_and_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_sov.infer.engines.server_engine.SHARD_BYTES", 40)
    files = WeightFiles(tmp_path / "w")
    block = torch.arange(20.0).reshape(2, 10)
    first_files = files.write(iter([("a", block[0]), ("b", block[1]), ("c", torch.ones(1))]))
    assert [list(load_file(file)) for file in first_files] == [["a"], ["b"], ["c"]]
    assert torch.equal(load_file(first_files[1])["b"], block[1])
    second_files = files.write(iter([("a", block[0])]))
    files.delete_earlier_files(second_files)
    assert not Path(first_files[0]).exists() and Path(second_files[0]).is_file()
    WeightFiles(tmp_path / "w")
    assert not Path(second_files[0]).exists()


def test_closed_fleet_fails_pending_requests() -> None:
    with Fleet([DoubleKeeper(0.01)], VOCAB, 1, look_s=0.02) as fleet:
        futures = [fleet.submit(request) for request in build_requests(3, 1000)]
    assert all("have been ended" in str(future.exception(10)) for future in futures)


@pytest.mark.parametrize("script, message", [
    (None, "is not an executable program; set the interpreter with vLLM by SOV_ENGINE_PYTHON"),
    (f'exec {sys.executable} "$@"', "python has no vLLM; install it into its own environment")])
def test_interpreter_without_vllm_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                              script: str | None, message: str) -> None:
    python = tmp_path / "python"
    if script is not None:
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
    monkeypatch.setenv(ENGINE_PYTHON, str(python))
    with pytest.raises(UserError, match=message), open_fleet(tmp_path, VOCAB, 8, EngineServers(),
                                                             ServerLocations(tmp_path)):
        pass
    # an interpreter with the module passes, and servers of other users need no interpreter
    monkeypatch.setattr(server_process, "VLLM", "json")
    check_vllm_program((), Path(sys.executable))
    check_vllm_program(("http://127.0.0.1:9",), python)


def test_silent_server_exit_is_reported(tmp_path: Path) -> None:
    server = ServerProcess(0, tmp_path, 8, EngineServers(), tmp_path, command=("true",))
    with pytest.raises(UserError, match=r"server 0 ended; .*engine-0\.log is empty"):
        server.start(lambda: False)
    server.end()


def test_waiting_for_an_address_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    double = VllmDouble()
    keeper = AddressKeeper(VllmServer(double.url, answer_s=1), 0)
    assert keeper.is_alive()
    double.close()
    assert not keeper.is_alive()
    with pytest.raises(UserError, match="answered for 0 s"):
        AddressKeeper(VllmServer(double.url, answer_s=1), 0).start(lambda: False)
    assert f"--engine-url {double.url}: does not answer; waiting up to 0 s" in capsys.readouterr().err


def test_server_without_weight_updates_is_reported(fleets: Callable[..., Fleet]) -> None:
    double = VllmDouble()
    double.refuses = lambda path: path.startswith("/pause")
    with Fleet([AddressKeeper(VllmServer(double.url), 0)], VOCAB, 1, look_s=0.02) as fleet:
        fleet.submit(build_requests(1)[0]).result(20)
        with pytest.raises(UserError, match="answered HTTP 404:"):
            fleet.update(["w"], 1)
    double.close()
