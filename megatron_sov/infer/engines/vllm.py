"""vLLM as an engine: optional, for GPUs; it reads Hugging Face folders."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.multiprocessing.reductions import reduce_tensor

from megatron_sov.base.documents.shard_files import RouteShape
from megatron_sov.base.errors import UserError, how_to_install
from megatron_sov.engine.convert.growing import open_weights
from megatron_sov.engine.convert.sources import HfWeights, check_whole_model
from megatron_sov.engine.data.requirements import shape_of
from megatron_sov.infer.decoder.held_weights import HeldWeights, NamedTensors
from megatron_sov.infer.decoder.sampling import seed_of
from megatron_sov.infer.request import (
    LENGTH, STOP, Batching, Generated, Sampling, StopRule, Tokens, Written, refuse_drafts, refuse_rules)

PICKLES = "VLLM_ALLOW_INSECURE_SERIALIZATION"
MESSAGE_BYTES = 1 << 30
"""Of tensors that vLLM is told of at a time."""


class VllmEngine:
    """vLLM's engine for one Hugging Face folder."""

    def __init__(self, folder: Path, longest: int, batching: Batching | None = None,
                 dtype: str = "auto", *, for_updates: bool = False, with_routes: bool = False) -> None:
        """Load the folder; code in it is not run.

        Args:
            folder: the model.
            longest: tokens of the longest sequence, prompt and continuation.
            batching: what bounds memory.
            dtype: of the weights; auto: as stored.
            for_updates: whether `update` will be called, for which vLLM prepares.
            with_routes: whether routes will be asked for, which vLLM then records of all that it writes
                (0.33, docs.vllm.ai/en/latest/training/routed_experts).

        Raises:
            UserError: vLLM is not installed, or is not allowed what updates need, or the model has no
                routes.
        """
        if importlib.util.find_spec("vllm") is None:
            raise UserError(f"--engine vllm: vllm, which would run {folder}, is not installed for this "
                            f"Python; on a machine with a GPU run `{how_to_install('rollout')}` "
                            "(docs/install.md), or use --engine transformers")
        if for_updates and os.environ.get(PICKLES) != "1":
            raise UserError(f"{PICKLES} is {os.environ.get(PICKLES)!r}: for an update vLLM sends the places "
                            "of tensors in the GPU's memory between its own processes as pickles; set it to "
                            "1, on a machine that nobody else uses")
        from vllm import LLM

        batching = batching or Batching()
        self._shape = shape_of(HfWeights(folder).model) if with_routes else None
        recording = {"enable_return_routed_experts": True} if with_routes else {}
        # "vllm": the folder's own sampling defaults would answer for what a caller left open
        self._llm = LLM(model=str(folder), skip_tokenizer_init=True, trust_remote_code=False,
                        generation_config="vllm", dtype=dtype, max_model_len=longest,
                        max_num_seqs=batching.batch_size, enable_chunked_prefill=True,
                        max_num_batched_tokens=max(batching.prefill_tokens, batching.batch_size),
                        # of what was sampled from, not of the model's own distribution
                        logprobs_mode="processed_logprobs",
                        weight_transfer_config={"backend": "ipc"} if for_updates else None, **recording)
        self._held, self._folder = HeldWeights("vllm"), folder
        if for_updates:
            self._llm.init_weight_transfer_engine({"init_info": {"packed": False}})

    def generate(self, prompts: Sequence[Tokens], sampling: Sampling, *, stop: StopRule | None = None,
                 streams: Sequence[int] | None = None) -> Generated:
        """Continue prompts, see `Engine`; each prompt has a seed of its own."""
        from vllm import SamplingParams

        refuse_drafts("vllm", sampling)
        refuse_rules("vllm", sampling)
        if sampling.with_routes and self._shape is None:
            raise ValueError("the engine vllm was started without routes, and they are asked for")
        sampling.check()
        stop, version = stop or StopRule(), self._held.version
        numbers = range(len(prompts)) if streams is None else streams
        asked = [SamplingParams(max_tokens=sampling.max_new_tokens, temperature=sampling.temperature,
                                top_p=sampling.top_p, top_k=sampling.top_k or -1,
                                seed=seed_of(sampling.seed, number), stop_token_ids=list(stop.ids),
                                # 0: of the chosen token, and of no others
                                logprobs=0, ignore_eos=True, detokenize=False) for number in numbers]
        found = self._llm.generate([{"prompt_token_ids": list(p)} for p in prompts], asked, use_tqdm=False)
        written = [_written(answer.outputs[0], stop) for answer in found]
        routes = None
        if sampling.with_routes:
            assert self._shape is not None
            routes = [_routes(answer.outputs[0], len(prompt) + len(tokens) - 1, self._shape)
                      for answer, prompt, (tokens, _) in zip(found, prompts, written, strict=True)]
        return Generated.of(written, sampling, stop, version, routes=routes)

    def update(self, weights: NamedTensors | None, version: int) -> None:
        """Have vLLM read other weights out of this process's GPU memory, see `Engine`.

        It must run on the same GPU.  The four calls of vLLM's weight transfer (0.33,
        docs.vllm.ai/en/latest/training/weight_transfer), with its backend `ipc`.
        """
        if weights is None:
            raise ValueError("the engine vllm has a model of its own: an update needs its weights")
        shapes = {name: shape for link in open_weights(self._folder).links
                  for name, shape in link.hf_shapes().items()}
        with self._held.replaced(version, weights):
            self._llm.start_weight_update()
            for message in _messages(check_whole_model(weights, shapes)):
                self._llm.update_weights({"update_info": message})
            self._llm.finish_weight_update(str(version))
            # keys and values of the old weights would answer for prompts that begin alike
            if not self._llm.reset_prefix_cache():
                raise UserError("vLLM keeps keys and values of the weights before; its log says why")


def _messages(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[dict[str, Any]]:
    """Yield the places of some tensors at a time, which stay in memory until the next are asked for."""
    kept: dict[str, torch.Tensor] = {}
    kept_bytes = 0
    for name, tensor in weights:
        kept[name] = tensor.detach().contiguous()
        kept_bytes += kept[name].nbytes
        if kept_bytes >= MESSAGE_BYTES:
            yield _message(kept)
            kept, kept_bytes = {}, 0
    if kept:
        yield _message(kept)


def _message(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {"names": list(tensors),
            "dtype_names": [str(t.dtype).removeprefix("torch.") for t in tensors.values()],
            "shapes": [list(t.shape) for t in tensors.values()],
            "ipc_handles": [_place_in_memory(t) for t in tensors.values()]}


def _place_in_memory(tensor: torch.Tensor) -> dict[str, Any]:
    """Return what another process finds a tensor in GPU memory by, under the GPU's name."""
    return {str(torch.cuda.get_device_properties(tensor.device).uuid): reduce_tensor(tensor)[1]}


def _written(output: Any, stop: StopRule) -> Written:
    """Return a `CompletionOutput` up to what ends it, which vLLM may have read past: it knows tokens only."""
    if output.finish_reason not in (STOP, LENGTH):
        raise UserError(f"vLLM ended a continuation of {len(output.token_ids)} tokens with "
                        f"{output.finish_reason!r}, not with {STOP!r} or {LENGTH!r}; its log says why")
    tokens = stop.cut(list(output.token_ids))
    return tokens, [float(place[token].logprob)
                    for token, place in zip(tokens, output.logprobs, strict=False)]


def _routes(output: Any, num_tokens: int, shape: RouteShape) -> np.ndarray:
    """Return the routes of the first tokens of a prompt and its `CompletionOutput`.

    vLLM tells [prompt + continuation - 1, layers, top_k], with a layer of zeros for each leading dense one.

    Raises:
        UserError: it tells others than the model can have.
    """
    told, why = output.routed_experts, "nothing"
    if told is not None:
        told = np.asarray(told)
        why = f"shape {list(told.shape)}"
        if told.ndim == 3 and len(told) >= num_tokens and told.shape[1] >= shape.layers:
            told = told[:num_tokens, told.shape[1] - shape.layers:]
            # before they are narrowed: a number that does not fit would become another one
            if (told < 0).any() or (told >= shape.num_experts).any():
                why = f"experts from {told.min()} to {told.max()}, of {shape.num_experts}"
            elif not (why := shape.problem(told.astype(shape.dtype))):
                return told.astype(shape.dtype)
    raise UserError(f"vLLM was to tell the routes of {num_tokens} tokens, {shape.layers} layers and "
                    f"{shape.top_k} experts each, and tells {why}; it records none where experts run in a "
                    "kernel that chooses for itself (its moe backends of FlashInfer): choose another, or set "
                    "policy.router_replay=false")
