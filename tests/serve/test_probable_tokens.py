"""Log-probabilities of prompts and the most probable tokens: what transformers computes, at two layouts
and from its folder; and what lm-evaluation-harness makes of it by its own client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
import torch

PROMPTS = ["def parse(self, text):", "한국어 and more"]
LAYOUTS = {"tensors in two parts": ("parallel.tp=2", "parallel.sp=true"), "two stages": ("parallel.pp=2",)}


@pytest.fixture(scope="module", params=[*LAYOUTS, "folder"])
def server(serving: Any, imported: dict[str, Path], hf_models: dict[str, Path],
           request: pytest.FixtureRequest) -> Iterator[Any]:
    target, words = hf_models["solar_open"], []
    if request.param in LAYOUTS:
        settings = ("train.num_threads=1", *LAYOUTS[request.param])
        target = imported["solar_open"]
        words = ["--nproc", "2", *(word for setting in settings for word in ("--set", setting))]
    # a prompt is read in several pieces
    with serving(target, "--name", "mine", "--max-length", "512", "--prefill-tokens", "6", *words) as found:
        yield found


@pytest.fixture(scope="module")
def theirs(hf_models: dict[str, Path]) -> Any:
    """Return a function: text -> ids, and the log-probabilities [ids, V] of what follows each."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(hf_models["solar_open"], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(hf_models["solar_open"])

    def of(text: str) -> tuple[list[int], torch.Tensor]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        with torch.inference_mode():
            return ids, model(torch.tensor([ids])).logits[0].double().log_softmax(-1)

    return of


def test_prompts_and_probable_tokens_are_those_of_transformers(server: Any, theirs: Any) -> None:
    client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
    found = client.completions.create(model="mine", prompt=PROMPTS, temperature=0, max_tokens=1, logprobs=3,
                                      echo=True, n=2)
    for choice in found.choices:
        ids, expected = theirs(PROMPTS[choice.index // 2])
        told = choice.logprobs
        assert told is not None and told.tokens and told.token_logprobs and told.top_logprobs
        assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(ids) + 1
        assert (told.token_logprobs[0], told.top_logprobs[0]) == (None, None)
        assert told.token_logprobs[1:-1] == pytest.approx(
            [float(row[token]) for row, token in zip(expected[:-1], ids[1:], strict=True)], abs=1e-4)
        for row, top in zip(expected, told.top_logprobs[1:], strict=True):
            assert sorted(top.values())[-3:] == pytest.approx(sorted(row.topk(3)[0].tolist()), abs=1e-4)
        assert told.token_logprobs[-1] == max(told.top_logprobs[-1].values())
        assert choice.text.startswith(PROMPTS[choice.index // 2])
    drawn = client.chat.completions.create(
        model="mine", messages=[{"role": "user", "content": "Hello"}], max_tokens=4, seed=1, temperature=0.7,
        logprobs=True, top_logprobs=5, extra_body={"top_k": 2}).choices[0].logprobs
    assert drawn is not None and drawn.content is not None
    for place in drawn.content:
        assert place.logprob in [one.logprob for one in place.top_logprobs], "drawn from two"
        assert sum(torch.tensor([one.logprob for one in place.top_logprobs]).exp()) == pytest.approx(1)


def test_lm_evaluation_harness_gets_likelihoods_by_its_own_client(server: Any, theirs: Any) -> None:
    """Its requests and its reading of answers, without its transport, which wants one more library."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    client: Any = SimpleNamespace(model="mine", max_length=256)
    pairs = [("def parse(self", ", text):"), ("The end of", " the story"), ("한국어", " and more")]
    ids = [theirs(context + continuation)[0] for context, continuation in pairs]
    lengths = [len(theirs(context)[0]) for context, _ in pairs]
    prompts, contexts, _ = LocalCompletionsAPI.batch_loglikelihood_requests(
        client, [[(pair, one[:n], one[n:]) for pair, one, n in zip(pairs, ids, lengths, strict=True)]])
    payload = LocalCompletionsAPI._create_payload(client, prompts, generate=False)
    answer = httpx.post(f"{server.url}/completions", json=payload, timeout=600)
    assert answer.status_code == 200, answer.text
    found = LocalCompletionsAPI.parse_logprobs(answer.json(), tokens=prompts, ctxlens=contexts)
    for (context, continuation), one, first, (logprob, is_greedy) in zip(pairs, ids, lengths, found,
                                                                         strict=True):
        rows = theirs(context + continuation)[1][first - 1:-1]
        assert logprob == pytest.approx(float(rows.gather(1, torch.tensor(one[first:])[:, None]).sum()),
                                        abs=1e-3)
        assert is_greedy == (rows.argmax(-1).tolist() == one[first:])
