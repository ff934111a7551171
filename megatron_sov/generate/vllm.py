"""vLLM as an engine: optional, for GPUs; it reads Hugging Face folders."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_sov.errors import UserError
from megatron_sov.generate.engine import VLLM
from megatron_sov.generate.held_weights import HeldWeights
from megatron_sov.generate.request import (
    LENGTH,
    STOP,
    Batching,
    Generated,
    Sampling,
    Stop,
    Tokens,
    Written,
    refuse_drafts,
)
from megatron_sov.generate.sampling import seed_of


class VllmEngine:
    """vLLM's engine for one Hugging Face folder."""

    def __init__(self, folder: Path, longest: int, batching: Batching | None = None,
                 dtype: str = "auto") -> None:
        """Load the folder; code in it is not run.

        Args:
            folder: the model.
            longest: tokens of the longest sequence, prompt and continuation.
            batching: what bounds memory.
            dtype: of the weights; auto: as stored.

        Raises:
            UserError: vLLM is not installed.
        """
        if importlib.util.find_spec("vllm") is None:
            raise UserError(f"--engine vllm: vllm, which would run {folder}, is not installed for this "
                            "Python; install megatron-sov[rollout] on a machine with a GPU "
                            "(docs/install.md), or use --engine transformers")
        from vllm import LLM

        batching = batching or Batching()
        # "vllm": the folder's own sampling defaults would answer for what a caller left open
        self._llm = LLM(model=str(folder), skip_tokenizer_init=True, trust_remote_code=False,
                        generation_config="vllm", dtype=dtype, max_model_len=longest,
                        max_num_seqs=batching.max_sequences, enable_chunked_prefill=True,
                        max_num_batched_tokens=max(batching.prefill_tokens, batching.max_sequences),
                        # of what was sampled from, not of the model's own distribution
                        logprobs_mode="processed_logprobs")
        self._held = HeldWeights(VLLM)

    def generate(self, prompts: Sequence[Tokens], sampling: Sampling, *, stop: Stop | None = None,
                 streams: Sequence[int] | None = None) -> Generated:
        """Continue prompts, see `Engine`; each prompt has a seed of its own."""
        from vllm import SamplingParams

        refuse_drafts(VLLM, sampling)
        sampling.check()
        stop, version = stop or Stop(), self._held.version
        numbers = range(len(prompts)) if streams is None else streams
        asked = [SamplingParams(max_tokens=sampling.max_new_tokens, temperature=sampling.temperature,
                                top_p=sampling.top_p, top_k=sampling.top_k or -1,
                                seed=seed_of(sampling.seed, number), stop_token_ids=list(stop.ids),
                                # 0: of the chosen token, and of no others
                                logprobs=0, ignore_eos=True, detokenize=False) for number in numbers]
        found = self._llm.generate([{"prompt_token_ids": list(p)} for p in prompts], asked, use_tqdm=False)
        return Generated.of([_written(answer.outputs[0], stop) for answer in found], sampling, stop, version)


def _written(output: Any, stop: Stop) -> Written:
    """Return a `CompletionOutput` up to what ends it, which vLLM may have read past: it knows tokens only."""
    if output.finish_reason not in (STOP, LENGTH):
        raise UserError(f"vLLM ended a continuation of {len(output.token_ids)} tokens with "
                        f"{output.finish_reason!r}, not with {STOP!r} or {LENGTH!r}; its log says why")
    tokens = stop.cut(list(output.token_ids))
    return tokens, [float(place[token].logprob)
                    for token, place in zip(tokens, output.logprobs, strict=False)]
