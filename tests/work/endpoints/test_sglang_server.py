from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from megatron_sov.work.endpoints.answers import BadAnswer, NeverAnswered
from megatron_sov.work.endpoints.sglang_server import SglangServer, is_sglang
from megatron_sov.work.endpoints.token_server import TokenAnswer, TokenRequest, VersionSpan
from tests.token_servers import SglangDouble, VllmDouble, token_at

PROMPT = [5, 6, 7]


@pytest.fixture
def double() -> Iterator[SglangDouble]:
    found = SglangDouble()
    yield found
    found.close()


def words(count: int, version: int = 0) -> list[int]:
    return [token_at(PROMPT, place, version) for place in range(count)]


def begin(server: SglangServer, *requests: TokenRequest) -> list[TokenAnswer]:
    """Have requests written beside each other; the list grows by their answers."""
    found: list[TokenAnswer] = []
    for request in requests:
        threading.Thread(target=lambda r=request: found.extend(server.write(r)), daemon=True).start()
    return found


def wait_until(holds: Any) -> None:
    ends_s = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < ends_s
        time.sleep(0.002)


def test_tokens_logprobs_and_versions_come_as_they_were_drawn(double: SglangDouble) -> None:
    server = SglangServer(double.url)
    [answer] = server.write(TokenRequest("a", PROMPT, 4, 0.7, stop_ids=(2,)))
    assert answer == TokenAnswer(words(4), [-t / 100 for t in words(4)], "length", (VersionSpan(0, 0, 4),))
    sent = double.asked[0]["sampling_params"]
    assert sent == {"max_new_tokens": 4, "temperature": 0.7, "ignore_eos": True, "stop_token_ids": [2]}
    [stopped] = server.write(TokenRequest("b", PROMPT, 9, stop_ids=(words(3)[2],)))
    assert (stopped.tokens, stopped.reason) == (words(3), "stop")
    assert server.score([4, 9, 8]) == [-0.09, -0.08]
    assert double.asked[-1]["sampling_params"]["max_new_tokens"] == 0


@pytest.mark.parametrize(("top_k", "top_p", "sent"), [(8, 1.0, 8), (0, 0.9, 4096), (9000, 0.9, 4096)])
def test_logprobs_of_a_cut_distribution_are_those_it_was_drawn_from(double: SglangDouble, top_k: int,
                                                                   top_p: float, sent: int) -> None:
    [answer] = SglangServer(double.url).write(TokenRequest("a", PROMPT, 3, 1.0, top_k, top_p))
    assert answer.logprobs == [-t / 200 for t in words(3)]
    assert double.asked[0]["sampling_params"]["top_k"] == sent
    # greedily written tokens have those of all tokens, whatever cuts
    [greedy] = SglangServer(double.url).write(TokenRequest("b", PROMPT, 3, 0.0, top_k, top_p))
    assert greedy.logprobs == [-t / 100 for t in words(3)]


def test_weights_change_in_the_middle_of_an_answer_and_each_token_tells_its_own(double: SglangDouble) -> None:
    double.held_at, server = 4, SglangServer(double.url)
    found = begin(server, TokenRequest("a", PROMPT, 20))
    wait_until(lambda: double.num_written > 3)
    server.pause()
    double.held_at = None
    assert server.is_healthy()
    server.update(["/weights/3/00000.safetensors"], 3)
    server.resume()
    wait_until(lambda: found)
    [before, after] = found[0].versions
    assert (before.version, after.version, before.end, after.end) == (0, 3, after.start, 20)
    assert found[0].tokens == words(before.end) + words(20, 3)[before.end:]
    assert double.weights == "/weights/3" and '"mode": "retract"' in double.orders[0] and server.is_healthy()


def test_an_aborted_request_ends_alone(double: SglangDouble) -> None:
    double.held_at, server = 4, SglangServer(double.url)
    asked = TokenRequest("a-1", PROMPT, 4000)
    found = begin(server, asked, TokenRequest("a-10", PROMPT, 60))
    wait_until(lambda: double.num_written == 8)
    server.abort([asked, TokenRequest("never", PROMPT, 4)])
    wait_until(lambda: found)
    double.held_at = None
    wait_until(lambda: len(found) == 2)
    # SGLang would end a-10 too, whose name begins with the other's
    assert [(answer.reason, len(answer.tokens) < 60) for answer in found] == [("abort", True),
                                                                              ("length", False)]


def test_prompts_of_one_request_are_answered_in_their_order(double: SglangDouble) -> None:
    several = SglangServer(double.url).write(TokenRequest("c", PROMPT, 4, count=2, others=([9],)))
    assert [answer.tokens for answer in several] == [
        *[words(4)] * 2, *[[token_at([9], n, 0) for n in range(4)]] * 2]


def test_some_answers_are_asked_for_at_once_and_end_together(double: SglangDouble) -> None:
    server = SglangServer(double.url)
    assert [answer.tokens for answer in server.write(TokenRequest("a", PROMPT, 4, count=3))] == [words(4)] * 3
    double.token_s = 0.002
    found = begin(server, asked := TokenRequest("b", PROMPT, 4000, count=2))
    wait_until(lambda: double.num_written > 20)
    server.abort([asked])
    wait_until(lambda: found)
    assert [answer.reason for answer in found] == ["abort"] * 2 and found[0].tokens


def test_routes_come_without_a_shape(double: SglangDouble) -> None:
    [answer] = SglangServer(double.url).write(TokenRequest("a", PROMPT, 2, with_routes=True))
    assert answer.routes is not None and (answer.routes == np.arange(16).reshape(4, 4)).all()


def test_refusals_are_told(double: SglangDouble) -> None:
    server = SglangServer(double.url)
    with pytest.raises(NeverAnswered, match=r"HTTP 400: The input \(4096 tokens\) is longer"):
        server.write(TokenRequest("a", [1] * 4096, 4))
    with pytest.raises(BadAnswer, match="HTTP 400: Failed to get weights iterator"):
        server.update(["/broken/00000.safetensors"], 3)
    double.is_dead = True
    with pytest.raises(BadAnswer, match="HTTP 503") as told:
        server.write(TokenRequest("a", PROMPT, 4))
    assert told.value.is_away and not server.is_healthy()


def test_a_server_of_sglang_is_recognised(double: SglangDouble) -> None:
    other = VllmDouble()
    other.refuses = lambda path: path == "/model_info"
    assert is_sglang(double.url + "/v1") and not is_sglang(other.url)
    other.close()
    assert not is_sglang(other.url)
