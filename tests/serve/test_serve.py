"""`megatron-sov serve` as in docs/serve.md: OpenAI's client gets the text of `generate`; refusals; end."""

import contextlib
import io
import json
import shlex
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from megatron_sov.cli import main
from megatron_sov.infer.engines.target import find_target
from megatron_sov.serve.bodies import RequestEncoder, parse_completion_body
from megatron_sov.work.processes.children import STOP_SIGNALS
from tests.pages_typed import ROOT, blocks, list_commands

SAMPLING_OPTIONS = ["--temperature", "0.9", "--top-p", "0.95", "--top-k", "50"]
SAMPLING: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "extra_body": {"top_k": 50}}
PAGE = (ROOT / "docs/serve.md").read_text()
START_OPTIONS = [shlex.split(line)[3:] for line in list_commands(PAGE) if " serve my-checkpoint " in line]
"""Options after the target, for each command that starts a server; test_processes.py runs the second."""
PROMPTS = ["def parse(self", "The ", "import argparse", "한국어 "]


@pytest.fixture(scope="module", params=["checkpoint", "folder"])
def server(serving: Any, imported: dict[str, Path], hf_models: dict[str, Path],
           request: pytest.FixtureRequest) -> Iterator[Any]:
    """Two servers for this file, one after the other: of a checkpoint, and of the same folder."""
    first, *_ = START_OPTIONS
    target, more = ((imported, ["--set", "train.num_threads=1"]) if request.param == "checkpoint"
                    else (hf_models, []))
    with serving(target["solar_open"], *first, "--max-batch", "8", *more) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)


@pytest.fixture
def generate(one_rank: None, imported: dict[str, Path], capsys: Any) -> Callable[..., list[dict[str, Any]]]:
    """Return `generate(*options)`: the output of `generate`."""

    def run_generate(*options: str) -> list[dict[str, Any]]:
        assert main(["generate", str(imported["solar_open"]), *options, "--json", "--logprobs"]) == 0
        return list(json.loads(capsys.readouterr().out))

    return run_generate


def test_openai_client_receives_the_text_of_generate(client: openai.OpenAI, generate: Any) -> None:
    for prompt in PROMPTS[:2]:
        (expected,) = generate("--prompt", prompt, "--max-new-tokens", "9", *SAMPLING_OPTIONS, "--seed", "7")
        result = client.completions.create(model="mine", prompt=prompt, max_tokens=9, seed=7, **SAMPLING)
        choice = result.choices[0]
        assert (choice.text, choice.finish_reason) == (expected["text"], expected["finish_reason"])
        assert result.usage is not None and result.usage.completion_tokens == len(expected["tokens"])
    several = generate("--prompt", "Hello", "--chat", "--max-new-tokens", "8", *SAMPLING_OPTIONS,
                       "--samples", "3")
    chat = client.chat.completions.create(model="mine", messages=[{"role": "user", "content": "Hello"}], n=3,
                                          max_tokens=8, seed=0, **SAMPLING)
    assert [c.message.content for c in chat.choices] == [e["text"] for e in several]
    (greedy,) = generate("--prompt", "Hello", "--chat", "--max-new-tokens", "8")
    chat = client.chat.completions.create(model="mine", messages=[{"role": "user", "content": "Hello"}],
                                          max_completion_tokens=8, temperature=0)
    assert chat.choices[0].message.content == greedy["text"]


@pytest.mark.tier1_cases(1)
def test_answers_do_not_depend_on_other_requests(client: openai.OpenAI) -> None:
    def ask(number: int) -> list[str]:
        result = client.completions.create(model="mine", prompt=PROMPTS[number % 4],
                                           max_tokens=4 + number % 9,
                                           seed=number, temperature=number % 3 / 2, stop=["e ", "xq"])
        return [choice.text for choice in result.choices]

    alone = [ask(number) for number in range(0, 64, 9)]
    with ThreadPoolExecutor(64) as pool:
        together = list(pool.map(ask, range(64)))
    assert together[::9] == alone


@pytest.mark.tier1_cases(1)
def test_streamed_text_equals_the_whole_answer(client: openai.OpenAI) -> None:
    for stop in (None, ["e"], ["re", "st"]):
        request: dict[str, Any] = {"model": "mine", "max_tokens": 24, "seed": 3, "temperature": 1.0,
                                 "stop": stop}
        chat = {**request, "messages": [{"role": "user", "content": "한국어?"}], "n": 2}
        whole = client.chat.completions.create(**chat)
        contents = ["", ""]
        chunks = list(client.chat.completions.create(**chat, stream=True,
                                                     stream_options={"include_usage": True}))
        for chunk in chunks:
            for choice in chunk.choices:
                contents[choice.index] += choice.delta.content or ""
        assert contents == [choice.message.content for choice in whole.choices]
        assert chunks[-1].usage == whole.usage
        text = client.completions.create(**request, prompt="The ").choices[0].text
        pieces = list(client.completions.create(**request, prompt="The ", stream=True))
        assert "".join(p.choices[0].text for p in pieces) == text
        assert pieces[-1].choices[0].finish_reason is not None
    assert len(chunks) > 8


def test_token_ids_are_prompts_and_the_model_is_listed(client: openai.OpenAI, generate: Any,
                                                       imported: dict[str, Path]) -> None:
    from megatron_sov.infer.engines.load import load_tokenizer

    ids = load_tokenizer(imported["solar_open"] / "tokenizer").encode("The ", add_special_tokens=False)
    texts = [client.completions.create(model="mine", prompt=prompt, temperature=0).choices[0].text
             for prompt in ("The ", ids)]
    assert texts[0] == texts[1]
    both = client.completions.create(model="mine", prompt=["The ", "import "], temperature=0, n=2)
    assert [c.index for c in both.choices] == [0, 1, 2, 3] and both.choices[1].text == texts[0]
    assert [model.id for model in client.models.list()] == ["mine"]


def test_ignored_end_tokens_do_not_end_the_answer(imported: dict[str, Path]) -> None:
    encoder = RequestEncoder(find_target(imported["solar_open"]), 64)
    body: dict[str, Any] = {"prompt": [5], "stop_token_ids": [7]}
    requests = [parse_completion_body(json.dumps(fields).encode(), "m")
                for fields in (body, body | {"ignore_eos": True})]
    with_eos, without_eos = (set(encoder.encode_request(request).end_ids) for request in requests)
    assert without_eos == {7} < with_eos


INVALID_BODIES: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "a", "temprature": 1}, "temprature is not known; did you mean 'temperature'?"),
    ({"prompt": "a", "frequency_penalty": 0.5}, "frequency_penalty is 0.5: this server does nothing"),
    ({"prompt": "a", "temperature": -1}, "temperature is -1: Input should be greater than or equal"),
    ({"prompt": "a", "temperature": 1e-9}, "temperature is 1e-09: below 0.01 numbers overflow"),
    ({"prompt": "a", "temperature": "1"}, "temperature is \"1\""),
    ({"prompt": "a", "stop_token_ids": [-1]}, "stop_token_ids is [-1]"),
    ({"prompt": "a", "logprobs": 1}, "logprobs is 1: this server does nothing with it but for false"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens is 0"),
    ({"prompt": "a", "max_tokens": 512}, "this server takes 512 in all"),
    ({"prompt": "a " * 600}, "this server takes 512 in all"),
    ({"prompt": "a", "seed": -1}, "seed is -1"),
    ({"prompt": "a", "n": 1000}, "n is 1000"),
    ({"prompt": ["a"] * 20, "n": 10}, "are 200 answers, at most 128"),
    ({"prompt": "a", "stop": ["a"] * 17}, "stop is"),
    ({"prompt": "a", "stop": ""}, "stop is"),
    ({"prompt": ""}, "prompt is empty"),
    ({"prompt": [1, 99999]}, "ids below 1024"),
    ({"prompt": "\ud800"}, "half of a surrogate pair"),
    ({"messages": [{"role": "user", "content": "a"}], "tools": [{"a": "\udfff"}]}, "surrogate pair"),
    ({}, "prompt is missing"),
    ({"prompt": "a", "model": "gpt-9"}, "model 'gpt-9' does not exist; this server has 'mine'"),
    ({"messages": [{"role": "user", "content": "a"}], "echo": True}, "echo is true"),
    ({"messages": []}, "'messages' must be a non-empty list"),
    ({"messages": [{"role": "king", "content": "a"}]}, "role 'king'"),
    ({"messages": [{"role": "user", "content": "a", "audio": {"id": "x"}}]}, "'audio', which"),
    ({"messages": [{"role": "user", "content": "a"}], "tool_choice": "required"}, "tool_choice is"),
    ({"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"messages": 1}},
     "gets anyway"),
    ({"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "json_object"}},
     "response_format is"),
]
"""Body, part of the error message."""
MALFORMED_BODIES = (
    b"", b"{", b"[]", b"nul", b"\xff\xfe", b'{"prompt": NaN}', b"[" * 10**5, b'{"a":1e999}',
    b'{"temperature": ' + b"[" * 900 + b"]" * 900 + b"}", b'{"seed": ' + b"9" * 5000 + b"}")


def test_invalid_requests_get_a_status_and_a_message(server: Any) -> None:
    with httpx.Client(base_url=server.url, headers={"Content-Type": "application/json"}) as http:
        for body, message in INVALID_BODIES:
            path = "/chat/completions" if "messages" in body else "/completions"
            response = http.post(path, content=json.dumps(body))
            error, status = response.json()["error"], 404 if "model" in body else 400
            assert (response.status_code, set(error)) == (status, {"message", "type", "param", "code"})
            assert message in error["message"]
        for content in MALFORMED_BODIES:
            response = http.post("/completions", content=content)
            assert response.status_code == 400
            assert response.json()["error"]["type"] == "invalid_request_error"
        assert http.post("/completions", content=b" " * (9 << 20)).status_code == 413
        for status, headers in ((415, {"Content-Type": "application/x-www-form-urlencoded"}),
                                (415, {"Content-Encoding": "gzip"}), (403, {"Host": "evil.example"})):
            assert http.post("/completions", content=b"prompt=a", headers=headers).status_code == status
        assert http.get("/nothing").status_code == 404 and http.get("/completions").status_code == 405
        assert httpx.get(server.url.removesuffix("/v1") + "/health").json() == {"status": "ok", "waiting": 0}


def test_the_pages_client_prints_the_answer_of_generate(server: Any, generate: Any) -> None:
    (block,) = blocks(PAGE, "python")
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(block.replace("http://127.0.0.1:8000/v1", server.url), {})
    (expected,) = generate("--prompt", "1 + 2?", "--chat", "--max-new-tokens", "32")
    assert output.getvalue() == expected["text"] + "\n"


@pytest.mark.parametrize(("options", "message"), [
    (["--host", "0.0.0.0"], '--host "0.0.0.0": is reachable from other machines'),
    (["--host", "example.org"], '--host "example.org": is reachable from other machines'),
    (["--host", "0.0.0.0", "--api-key-env", "NO_SUCH"], "--api-key-env NO_SUCH: the variable is unset"),
    (["--max-length", "9999"], "--max-length 9999: the model ends at 512"),
    (["--parent-pid", "4194999"], "--parent-pid 4194999: there is no such process"),
    (["--host", "203.0.113.1", "--api-key-env", "PATH"], "--host 203.0.113.1 --port 8000: cannot be"),
    (["--set", "parallel.tp=3"], "parallel.tp"), (["--address-file", "/"], "--address-file /: is a folder"),
    (["--name", " "], '--name " ": must be 1 to 200 printable'),
    (["--max-batch", "0", "--port", "70000"], "command line: 2 problems")])
def test_invalid_options_end_with_one_error(options: list[str], message: str, one_rank: None,
                                            imported: dict[str, Path], capsys: Any) -> None:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        code = main(["serve", str(imported["solar_open"]), *options])
    except SystemExit as e:  # of a rank, which has printed the error
        code = int(e.code or 0)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert code == 2
    printed = capsys.readouterr().err
    # the address is opened by the running model, whose precision is printed first
    error = printed.partition("runs in megatron with fp32 on the CPU\n")[2] or printed
    assert error.startswith("error: ") and message in error and "Traceback" not in error


def test_a_folder_without_a_model_is_refused(tmp_path: Path, get_refusal: Any) -> None:
    for target in (tmp_path, tmp_path / "none"):
        assert get_refusal("serve", str(target)).count("error: ") == 1
