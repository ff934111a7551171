"""Other libraries as engines: transformers with its continuous batching, and vLLM, which is optional and for
GPUs.

transformers 5 holds a layer's experts stacked, gate and up in one tensor, and renames others; files have one
tensor for each expert.  Its own conversion, the one that `save_pretrained` applies, is run on views of the
parameters, so writing into a result writes into the model.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.multiprocessing.reductions import reduce_tensor
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from megatron_sov.base.documents.shard_files import RouteShape
from megatron_sov.base.errors import UserError, how_to_install
from megatron_sov.convert.changed_values import Changed
from megatron_sov.convert.growing import open_weights
from megatron_sov.convert.sources import HfWeights, check_whole_model, refuse_damaged_export, tensors_left_out
from megatron_sov.infer.decoder.sampling import best_words, rows_of, seed_of
from megatron_sov.infer.request import (
    LENGTH, STOP, Batching, Generated, HeldWeights, NamedTensors, Sampling, StopRule, Tokens, Written,
    refuse_drafts, refuse_routes, refuse_rules)
from megatron_sov.model.pretrained import load_pretrained
from megatron_sov.train.data.requirements import shape_of

PAGE_TOKENS = 16
"""Tokens of a page of transformers' cache."""
MASK_PLACES = 1 << 28
"""Places of the mask (tokens of a pass x tokens of the cache), which SDPA and eager attention lay out whole:
1 GiB in fp32, and twice that for a model with sliding layers."""
PASS_TOKENS = 1024
"""Tokens of a pass below which rather fewer sequences are continued at a time."""


def load_hf(folder: Path, dtype: str | torch.dtype = "auto") -> Any:
    """Return transformers' model in evaluation mode, on the GPU if there is one;
    code files in the folder are not run.

    Raises:
        UserError: transformers cannot load the folder, or would make up a part of the weights.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    refuse_damaged_export(folder)
    model: Any = load_pretrained(AutoModelForCausalLM, folder, left_out=tensors_left_out(folder), dtype=dtype)
    # the folder's own defaults would answer for what a caller left open
    model.generation_config = GenerationConfig()
    return model.eval().to(device)


class HfEngine:
    """A transformers model as an engine."""

    def __init__(self, model: Any, batching: Batching | None = None) -> None:
        """Take a model.

        Args:
            model: as `load_hf` gives it.
            batching: what bounds memory.
        """
        self._model, self._batching = model, batching or Batching()
        self._held = HeldWeights("transformers")

    @torch.no_grad()
    def generate(self, prompts: Sequence[Tokens], sampling: Sampling, *, stop: StopRule | None = None,
                 streams: Sequence[int] | None = None) -> Generated:
        """Continue prompts, see `Engine`; samples depend on the whole batch,
        of whose streams one seed is made.

        Raises:
            UserError: transformers gave a prompt up, as where memory is too small for it; or routes are
                asked for.
        """
        refuse_drafts("transformers", sampling)
        refuse_rules("transformers", sampling)
        refuse_routes("transformers", sampling)
        refuse_latent_attention(self._model.config)
        sampling.check()
        stop, version = stop or StopRule(), self._held.version
        if not prompts:
            return Generated.of([], sampling, stop, version)
        # Pages are made for the longest sequence, which bounds how many there can be at a time.
        longest = max(map(len, prompts)) + sampling.max_new_tokens
        slots, pages, pass_tokens = cache_sizes(len(prompts), longest, self._batching)
        chosen: dict[str, Any] = {"do_sample": False}
        if sampling.temperature:
            chosen = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p,
                      "top_k": sampling.top_k}
        # -1: no token ends a continuation
        asked = GenerationConfig(max_new_tokens=sampling.max_new_tokens, eos_token_id=list(stop.ids) or -1,
                                 pad_token_id=0, **chosen)
        # without sizes of its own the cache is made for the whole memory, and is slow
        sizes = ContinuousBatchingConfig(
            page_size=PAGE_TOKENS, num_blocks=pages, max_requests_per_batch=slots,
            max_batch_tokens=pass_tokens, return_logprobs=True,
            seed=sampling.seed if streams is None else seed_of(sampling.seed, *streams))
        found = self._model.generate_batch(inputs=[list(p) for p in prompts], generation_config=asked,
                                           continuous_batching_config=sizes, warmup=False)
        outputs = list(found.values())
        failed = [o.error for o in outputs if o.error is not None]
        if failed or len(outputs) != len(prompts):
            why = failed[0] if failed else "it says more above"
            raise UserError(f"transformers answered {len(outputs) - len(failed)} of {len(prompts)} prompts "
                            f"of up to {longest} tokens ({why}); with more memory, or with shorter prompts "
                            "and continuations, it may")
        # transformers tells those of the tempered and cut distribution; of a greedy token, of the plain one
        written = [(stop.cut(o.generated_tokens), o.logprobs) for o in outputs]
        return Generated.of([(tokens, logprobs[:len(tokens)]) for tokens, logprobs in written],
                            sampling, stop, version)

    def update(self, weights: NamedTensors | None, version: int) -> None:
        """Copy other weights over the model's, see `Engine`."""
        if weights is None:
            raise ValueError("the engine transformers has a model of its own: an update needs its weights")
        with self._held.replaced(version, weights):
            copy_weights(self._model, weights)

    def update_changed(self, changed: Iterator[Changed], version: int, since: int) -> None:
        """Write changed values over the model's, see `PatchedEngine`."""
        with self._held.replaced(version, changed, since):
            copy_changed(self._model, changed)

    @torch.no_grad()
    def choose(self, documents: Sequence[Tokens], count: int, words: Sequence[int]) -> list[list[int]]:
        """Return the most probable words, see `ChoosingEngine`."""
        self._held.check()
        found: list[list[int]] = []
        for row in rows_of(documents):
            ids = torch.tensor([list(documents[i][:-1]) for i in row], device=self._model.device)
            logits = self._model(input_ids=ids, logits_to_keep=count, use_cache=False).logits
            found += best_words(logits.flatten(0, 1), words).reshape(len(row), count).tolist()
        return found


def refuse_latent_attention(config: Any) -> None:
    """Raise `UserError` for a model with latent attention: pages of transformers (5.x) hold keys and values
    of one width, `head_dim`, and its keys are wider than its values."""
    if getattr(config, "kv_lora_rank", None):
        raise UserError(f"kv_lora_rank = {config.kv_lora_rank}: transformers' continuous batching has no "
                        "cache for latent attention; take the engine megatron or vllm (--engine)")


def cache_sizes(num_prompts: int, longest: int, batching: Batching) -> tuple[int, int, int]:
    """Return the sequences to continue at a time, the pages of their cache, and the tokens of a pass.

    Both of the last two bound the mask, so that contexts of 262,144 tokens need no more memory for
    it than short ones; a pass is no longer than all sequences together, so that a few short ones need
    next to none.

    Args:
        num_prompts: all that are asked.
        longest: tokens to which the longest of them may grow.
        batching: bounds of the caller.
    """
    pages = -(-longest // PAGE_TOKENS) + 1
    slots = max(1,
                min(batching.slots(num_prompts, longest), MASK_PLACES // (PASS_TOKENS * PAGE_TOKENS * pages)))
    cache_tokens = slots * pages * PAGE_TOKENS
    # Whichever bound is the narrowest; but at least one token of every sequence.
    most = min(batching.prefill_tokens, slots * longest, MASK_PLACES // cache_tokens)
    return slots, slots * pages, max(slots, most)


class _View(torch.Tensor):
    """A tensor that stays where it is when transformers would lay a part of it out anew."""

    def contiguous(self, *_: Any, **__: Any) -> _View:
        return self


def live_views(model: Any) -> dict[str, torch.Tensor]:
    """Return the model's tensors by their names in files, as views of its memory.

    Raises:
        UserError: a tensor in files is more than a part of one in memory for this class of model.
    """
    live = model.state_dict()
    # of an output head that is the embedding, files have one; what comes back may be copies, so names only
    own = {name: live[name] for name in remove_tied_weights_from_state_dict(dict(live), model)}
    # A result in other memory is a copy, and writing to it would not reach the model.
    memory = {t.untyped_storage().data_ptr() for t in own.values()}
    found = revert_weight_conversion(model, {name: t.as_subclass(_View) for name, t in own.items()})
    for name, view in found.items():
        if view.untyped_storage().data_ptr() not in memory:
            raise UserError(f"{type(model).__name__}: transformers computes {name} from tensors of its own, "
                            "so it cannot be updated in place; load the model from a folder")
    return {name: view.as_subclass(torch.Tensor) for name, view in found.items()}


@torch.no_grad()
def copy_weights(model: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy tensors into a loaded model, one after the other, in place.

    Args:
        model: as `load_hf` gives it.
        weights: all of its tensors, by their names in files; those that its class ignores in files, such as
            a multi-token prediction layer, may be among them.

    Raises:
        UserError: a tensor is missing, unknown, of another shape or comes twice; the model is then part
            old, part new.
    """
    views = live_views(model)
    for name, tensor in check_whole_model(weights, *_shapes_of(model, views)):
        views[name].copy_(tensor)


@torch.no_grad()
def copy_changed(model: Any, changed: Iterable[Changed]) -> None:
    """Write what has changed in every tensor into a loaded model; arguments and errors as of
    `copy_weights`."""
    views = live_views(model)
    for name, found in check_whole_model(((one.name, one) for one in changed), *_shapes_of(model, views)):
        view = views[name]
        view.index_put_(tuple(axis.to(view.device) for axis in found.coordinates()), found.values.to(view))


def _shapes_of(model: Any, views: Mapping[str, torch.Tensor]
               ) -> tuple[dict[str, tuple[int, ...]], Sequence[str]]:
    """Return the shapes of a model's tensors, and what it may be given and does without."""
    return ({name: tuple(view.shape) for name, view in views.items()},
            model._keys_to_ignore_on_load_unexpected or ())


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
        # Before the import, which takes long.
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
        written = [_read_completion(answer.outputs[0], stop) for answer in found]
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
            # `check_whole_model` raises last where a tensor is missing: the update then never finishes.
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
            # The tensors must outlive the message: vLLM reads them where they are.
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
    return {str(torch.cuda.get_device_properties(tensor.device).uuid): reduce_tensor(tensor)[1]}


def _read_completion(output: Any, stop: StopRule) -> Written:
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
        # The leading dense layers have no experts: the last `layers` rows are those that route.
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
