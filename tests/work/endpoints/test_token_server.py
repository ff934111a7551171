"""The client of a token-level engine server: sampled tokens, weight updates, retries and rejected answers."""

import base64
import io
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from megatron_sov.work.endpoints import transport
from megatron_sov.work.endpoints.answers import BadAnswer, RequestRefused
from megatron_sov.work.endpoints.token_server import (
    ServerCalls, TokenAnswer, TokenRequest, VersionSpan, check_answers)
from megatron_sov.work.endpoints.vllm_server import VllmServer, _parse_choices
from tests.token_servers import VllmDouble, compute_token

PROMPT = [5, 6, 7]


@pytest.fixture
def vllm() -> Iterator[VllmDouble]:
    vllm_double = VllmDouble()
    yield vllm_double
    vllm_double.close()


def compute_answer(count: int, version: int = 0) -> list[int]:
    """Return the first tokens that the double generates for PROMPT."""
    return [compute_token(PROMPT, position, version) for position in range(count)]


def test_answers_contain_sampled_tokens_logprobs_and_versions(vllm: VllmDouble) -> None:
    server = VllmServer(vllm.url)
    [answer] = server.write(TokenRequest("a", PROMPT, 4, 0.7, stop_ids=(2,)))
    tokens = compute_answer(4)
    assert answer == TokenAnswer(tokens, [-t / 100 for t in tokens], "length", (VersionSpan(0, 0, 4),))
    sent = vllm.generate_bodies[0]["sampling_params"]
    # vLLM crashes with a seed on a CPU, and stops at the config's eos unless disabled
    assert "seed" not in sent and sent["ignore_eos"] and sent["top_k"] == -1 and sent["temperature"] == 0.7
    [stopped] = server.write(TokenRequest("b", PROMPT, 9, stop_ids=(compute_answer(3)[2],)))
    assert (stopped.tokens, stopped.reason) == (compute_answer(3), "stop")
    assert server.score([4, 9, 8]) == [-0.09, -0.08]


def test_tokens_report_version_across_weight_update(vllm: VllmDouble) -> None:
    vllm.stall_at, server = 4, VllmServer(vllm.url)
    answers: list[TokenAnswer] = []
    thread = threading.Thread(target=lambda: answers.extend(server.write(TokenRequest("a", PROMPT, 20))))
    thread.start()
    while vllm.num_generated < 4:
        time.sleep(0.001)
    server.pause()
    vllm.stall_at = None
    server.update(["/weights"], 3)
    server.resume()
    thread.join()
    [before, after] = answers[0].versions
    assert (before.version, after.version, before.end, after.end) == (0, 3, after.start, 20)
    assert answers[0].tokens == compute_answer(before.end) + compute_answer(20, 3)[before.end:]
    # without a cache reset, vLLM would continue with keys and values of the old weights
    assert vllm.control_paths[-2:] == ["/reset_prefix_cache?reset_running_requests=true", "/resume"]
    assert vllm.control_paths[0] == "/pause?mode=keep&clear_cache=false"


def test_open_update_of_killed_trainer_is_finished_first(vllm: VllmDouble) -> None:
    killed = VllmServer(vllm.url)
    killed.pause()
    killed._calls.tell("/start_weight_update")
    server = VllmServer(vllm.url)
    server.pause()
    server.update(["/weights/3"], 3)
    server.resume()
    assert vllm.control_paths.count("/start_weight_update") == 3  # the second one is refused
    [answer] = server.write(TokenRequest("a", PROMPT, 2))
    assert answer.tokens == compute_answer(2, 3)


@pytest.mark.parametrize("route", ["/inference/v1/generate", "/v1/completions"])
def test_aborted_request_returns_partial_answer(vllm: VllmDouble, route: str) -> None:
    vllm.refuses = lambda path: path == "/inference/v1/generate" != route
    vllm.token_s, server = 0.01, VllmServer(vllm.url)
    answers: list[TokenAnswer] = []
    thread = threading.Thread(target=lambda: answers.extend(server.write(TokenRequest("a", PROMPT, 500))))
    thread.start()
    while not vllm.num_generated:
        time.sleep(0.01)
    server.abort([TokenRequest("a", PROMPT, 500)])
    thread.join()
    assert answers[0].reason == "abort" and 0 < len(answers[0].tokens) < 500


@pytest.mark.parametrize("route", ["/inference/v1/generate", "/v1/completions"])
def test_several_answers_per_request(vllm: VllmDouble, route: str) -> None:
    vllm.refuses = lambda path: path == "/inference/v1/generate" != route
    server = VllmServer(vllm.url)
    answers = server.write(TokenRequest("a", PROMPT, 4, count=3))
    assert [answer.tokens for answer in answers] == [compute_answer(4)] * 3
    assert len(vllm.generate_bodies) == 1
    vllm.max_answers = 2
    with pytest.raises(RequestRefused, match="at most 2, got 3"):
        server.write(TokenRequest("b", PROMPT, 4, count=3))


def test_prompts_of_request_are_answered_in_order(vllm: VllmDouble) -> None:
    request = TokenRequest("a", PROMPT, 4, count=2, others=([8, 9], [4]))
    assert request.num_answers == 6
    answers = VllmServer(vllm.url).write(request)
    assert [answer.tokens for answer in answers] == [
        [compute_token(prompt, position, 0) for position in range(4)]
        for prompt in (PROMPT, [8, 9], [4]) for _ in range(2)]
    # the completions path reports no versions, and servers without a tokenizer return token ids only
    assert not answers[0].versions
    assert all(body["return_tokens_as_token_ids"] for body in vllm.generate_bodies)
    [single] = VllmServer(vllm.url).write(TokenRequest("b", PROMPT, 4))
    assert single.versions == (VersionSpan(0, 0, 4),)


def test_server_without_token_route_uses_completions(vllm: VllmDouble) -> None:
    vllm.refuses = lambda path: path == "/inference/v1/generate"
    [answer] = VllmServer(vllm.url + "/v1").write(TokenRequest("a", PROMPT, 4))
    assert answer == TokenAnswer(compute_answer(4), [-t / 100 for t in compute_answer(4)], "length")
    assert VllmServer(vllm.url).score([4, 9, 8]) == [-0.09, -0.08]


def test_temporary_and_permanent_failures_differ(vllm: VllmDouble) -> None:
    vllm.refuses = lambda path: path != "/health"
    with pytest.raises(RequestRefused, match=r"/pause.* answered HTTP 404: Not Found"):
        VllmServer(vllm.url).pause()
    vllm.is_dead = True
    server = VllmServer(vllm.url)
    with pytest.raises(BadAnswer, match="HTTP 500: EngineCore") as error:
        server.write(TokenRequest("a", PROMPT, 4))
    assert error.value.is_unavailable and not server.is_healthy()


@pytest.mark.each(("choice", "message"), [
    ({}, "KeyError: 'token_ids'"), ({"token_ids": ["x"]}, "ValueError"),
    ({"token_ids": [1], "finish_reason": "stop", "logprobs": {"content": [{}]}}, "KeyError: 'logprob'")])
def test_incomplete_answer_is_rejected(choice: dict[str, Any], message: str) -> None:
    with pytest.raises(BadAnswer, match=message):
        _parse_choices({"choices": [choice]}, "http://here")


@pytest.mark.each(("answer", "message"), [
    (TokenAnswer([1, 2], [-1.0], "stop"), "2 tokens but 1 log-probabilities"),
    (TokenAnswer([1], [-1.0], "repetition"), "'repetition'"),
    (TokenAnswer([1, 2], [-1.0, -9999.0], "stop"), "gives no probability"),
    (TokenAnswer([1, 2], [float("nan"), -1.0], "stop"), "gives no probability"),
    (TokenAnswer([1, 2], [-1.0, -1.0], "stop", (VersionSpan(1, 0, 1),)), "but 2 tokens"),
    (TokenAnswer([1, 2], [-1.0, -1.0], "stop", (VersionSpan(1, 0, 1), VersionSpan(2, 0, 2))), "versions")])
def test_inconsistent_answer_is_rejected(answer: TokenAnswer, message: str) -> None:
    with pytest.raises(BadAnswer, match=message):
        check_answers([answer], 1, "http://here")


def test_wrong_number_of_answers_is_rejected() -> None:
    with pytest.raises(BadAnswer, match="returned 1 answers instead of 2"):
        check_answers([TokenAnswer([1], [-1.0], "stop")], 2, "http://here")


def test_routes_are_decoded_without_unpickling() -> None:
    def build_response(array: np.ndarray) -> dict[str, Any]:
        out = io.BytesIO()
        np.save(out, array)
        return {"choices": [{"token_ids": [], "finish_reason": "abort",
                             "routed_experts": base64.b64encode(out.getvalue()).decode()}]}

    routes = np.arange(12).reshape(3, 2, 2)
    [answer] = _parse_choices(build_response(routes), "http://here")
    assert answer.routes is not None and (answer.routes == routes).all()
    with pytest.raises(BadAnswer, match="allow_pickle=False"):
        _parse_choices(build_response(np.array([{}], object)), "http://here")


def test_idle_connection_is_not_reused(vllm: VllmDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    client_addresses: list[Any] = []
    answer = vllm._answer
    monkeypatch.setattr(vllm, "_answer", lambda handler, body: (
        client_addresses.append(handler.client_address), answer(handler, body)))
    for keepalive_s, num_connections in ((30.0, 1), (0.02, 2)):
        monkeypatch.setattr(transport, "KEEPALIVE_S", keepalive_s)
        client_addresses.clear()
        calls = transport.Transport(f"{vllm.url}/v1/models", "", 20)
        assert calls.get().status_code == 200
        time.sleep(0.1)
        assert calls.get().status_code == 200
        assert len(set(client_addresses)) == num_connections


def _npy(save: Any, *parts: Any) -> str:
    file = io.BytesIO()
    save(file, *parts)
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.each("fields", [
    {"token_ids": [5, 1e999]}, {"token_ids": [5, 6.7]}, {"token_ids": [5, True]},
    {"token_ids": [5, 1 << 31]}, {"token_ids": [5, -1]},
    {"weight_versions": [{"version": 1 << 31, "start": 0, "end": 2}]},
    {"routed_experts": ""}, {"routed_experts": base64.b64encode(b"PK\x03\x04").decode()},
    {"routed_experts": _npy(np.savez, np.zeros(2))},
    {"routed_experts": _npy(np.save, np.full((2, 1, 1), np.nan))},
    {"weight_versions": [{"version": 1, "start": 0, "end": -1}, {"version": 2, "start": -1, "end": 2}]}])
def test_hostile_answers_are_rejected(fields: dict[str, Any]) -> None:
    valid_choice = {"token_ids": [5, 6], "logprobs": {"content": [{"logprob": -1.0}] * 2},
                    "finish_reason": "stop"}
    check_answers(_parse_choices({"choices": [valid_choice]}, "http://x"), 1, "http://x")
    with pytest.raises(BadAnswer, match="http://x"):
        check_answers(_parse_choices({"choices": [valid_choice | fields]}, "http://x"), 1, "http://x")


def test_deeply_nested_json_is_rejected() -> None:
    with pytest.raises(BadAnswer, match="http://x/p: answered JSON that is nested too deep"):
        ServerCalls("http://x", "", 1.0)._parse_response("/p", httpx.Response(200, content=b"[" * 200_000))
