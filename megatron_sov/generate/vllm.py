"""The same requests answered by vLLM, an optional engine for GPUs that reads Hugging Face folders."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sov.errors import UserError
from megatron_sov.generate.request import Batching, Generated, Sampling, Stop, Tokens


def load_vllm(folder: Path, longest: int, batching: Batching | None = None, dtype: str = "auto") -> Any:
    """Return vLLM's engine for sequences of up to `longest` tokens, prompt and continuation; code in the folder is not run.

    Raises:
        UserError: vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UserError(f"--engine vllm: vllm, which would run {folder}, is not installed for this Python; install "
                        "megatron-sov[rollout] on a machine with a GPU (docs/install.md), or use --engine transformers")
    from vllm import LLM

    batching = batching or Batching()
    # "vllm": the folder's own sampling defaults would answer for what a caller left open
    return LLM(model=str(folder), skip_tokenizer_init=True, trust_remote_code=False, generation_config="vllm", dtype=dtype,
               max_model_len=longest, max_num_seqs=batching.max_sequences, enable_chunked_prefill=True,
               max_num_batched_tokens=max(batching.prefill_tokens, batching.max_sequences))


def generate_vllm(engine: Any, prompts: Sequence[Tokens], sampling: Sampling, *, stop: Stop | None = None,
                  streams: Sequence[int] | None = None) -> Generated:
    """Continue prompts; arguments and result as in `generator.generate`.

    Greedy continuations are the same up to rounding; samples follow the same distribution with other random numbers, a seed
    for each prompt.
    """
    from vllm import SamplingParams

    stop = stop or Stop()
    numbers = range(len(prompts)) if streams is None else streams
    asked = [SamplingParams(max_tokens=sampling.max_new_tokens, temperature=sampling.temperature, top_p=sampling.top_p,
                            top_k=sampling.top_k or -1, seed=_seed(sampling.seed, n), stop_token_ids=list(stop.ids),
                            ignore_eos=True, detokenize=False) for n in numbers]
    found = engine.generate([{"prompt_token_ids": list(p)} for p in prompts], asked, use_tqdm=False)
    return Generated([stop.cut(list(answer.outputs[0].token_ids)) for answer in found])


def _seed(seed: int, stream: int) -> int:
    """Return a seed of 31 bits for one prompt's samples."""
    return int(np.random.SeedSequence((seed, stream)).generate_state(1)[0]) >> 1
