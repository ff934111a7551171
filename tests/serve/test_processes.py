"""A server on several processes, and a server of a model with linear attention."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from megatron_sov.cli import main
from tests.serve.test_serve import PROMPTS, START_OPTIONS


def test_two_processes_answer_like_one_and_end_with_their_parent(serving: Any, imported: dict[str, Path],
                                                                 one_rank: None, capsys: Any,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    expected = []
    for number, prompt in enumerate(PROMPTS):
        assert main(["generate", str(imported["solar_open"]), "--prompt", prompt, "--samples", "2", "--json",
                     "--temperature", "1", "--seed", str(number), "--max-new-tokens", str(6 + number)]) == 0
        expected.append([sample["text"] for sample in json.loads(capsys.readouterr().out)])
    monkeypatch.setenv("SERVE_KEY", "sesame")
    parent = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with serving(imported["solar_open"], *START_OPTIONS[1], "--parent-pid", str(parent.pid),
                 "--set", "train.num_threads=1") as two:
        client = openai.OpenAI(base_url=two.url, api_key="sesame", max_retries=0)
        assert [model.id for model in client.models.list()] == ["solar_open"]

        def ask(number: int) -> list[str]:
            answer = client.completions.create(model="solar_open", prompt=PROMPTS[number], n=2, seed=number,
                                               temperature=1, max_tokens=6 + number)
            return [choice.text for choice in answer.choices]

        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            assert list(pool.map(ask, range(len(PROMPTS)))) == expected
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=two.url, api_key="none", max_retries=0).models.list()
        parent.kill()
        parent.wait()
        two.thread.join(600)
        assert two.ended and not os.path.exists(f"/proc/{two.pid}")


def count_cache_elements(lengths: list[int]) -> list[dict[str, int]]:
    """Return the cache elements of linear and of full attention, for two sequences of each maximum length."""
    import torch

    from megatron_sov.engine.decode.cached_decoder import CachedDecoder
    from megatron_sov.engine.decode.forward_only import ForwardModel
    from megatron_sov.engine.model.cache_rows import CacheSize, CacheSpan
    from megatron_sov.engine.model.kv_cache import CachedAttention
    from tests.tiny import tiny_model

    _, model = tiny_model("tiny-solar-open2", "model.num_experts=4", layout={})
    results = []
    for tokens in lengths:
        with CachedDecoder(ForwardModel(model, 50), CacheSize(2, tokens)) as decoder:
            for past, length in ((0, 7), (7, 1), (8, 1)):
                spans = [CacheSpan(slot, past, [5] * length) for slot in range(2)]
                decoder.read(spans, decoder.agree_row_tokens(2 * length))
            sizes = {"linear": 0, "attention": 0}
            for layer in decoder._layers:
                kind = "attention" if isinstance(layer, CachedAttention) else "linear"
                tensors = layer.stored or () if isinstance(layer, CachedAttention) else vars(layer).values()
                sizes[kind] += sum(t.numel() for t in tensors if isinstance(t, torch.Tensor))
            results.append(sizes)
    return results


@pytest.mark.distributed
def test_linear_attention_state_is_constant_in_length(ranks: Any, job: Any) -> None:
    ((short, long),) = ranks(job(__file__, "count_cache_elements", 1, {"lengths": [64, 4096]}))[0]
    assert short["linear"] == long["linear"] > 0
    assert long["attention"] == short["attention"] * 4096 // 64
