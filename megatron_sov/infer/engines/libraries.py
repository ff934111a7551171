"""transformers with its continuous batching as an engine.

transformers 5 holds a layer's experts stacked, gate and up in one tensor, and renames others; files have one
tensor for each expert.  Its own conversion, the one that `save_pretrained` applies, is run on views of the
parameters, so writing into a result writes into the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from megatron_sov.base.errors import UserError
from megatron_sov.convert.sources import check_whole_model, refuse_damaged_export, tensors_left_out
from megatron_sov.engine.parallel.device import PRECISION, choose_inference_precision
from megatron_sov.infer.decoder.sampling import seed_of
from megatron_sov.infer.engines.target import report_precision
from megatron_sov.infer.request import (
    Batching, Generated, HeldWeights, NamedTensors, Sampling, StopRule, Tokens, refuse_drafts, refuse_routes,
    refuse_rules)
from megatron_sov.model.pretrained import load_pretrained, low_bit_options

PAGE_TOKENS = 16
"""Tokens of a page of transformers' cache."""
MASK_PLACES = 1 << 28
"""Places of the mask (tokens of a pass x tokens of the cache), which SDPA and eager attention lay out whole:
1 GiB in fp32, and twice that for a model with sliding layers."""
PASS_TOKENS = 1024
"""Tokens of a pass below which rather fewer sequences are continued at a time."""


def load_configured_hf(folder: Path, settings: Sequence[str] = (), option: str = "--set") -> Any:
    """Return transformers' model as `load_hf`, in the precision of `settings` (`train.precision=NAME`, which
    `option` gives); `UserError` if there is none of that name."""
    precision = [choose_inference_precision(), *(setting.partition("=")[2] for setting in settings)][-1]
    if precision not in PRECISION:
        raise UserError(f"{option} {settings[-1]}: must be one of {', '.join(PRECISION)}")
    report_precision(folder, "transformers", precision)
    return load_hf(folder, PRECISION[precision])


def load_hf(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """Return transformers' model in evaluation mode, on the GPU if there is one, in `dtype` or else that of
    `inference_precision`; code files in the folder are not run.

    Raises:
        UserError: transformers cannot load the folder, or would make up a part of the weights.
    """
    dtype = dtype or PRECISION[choose_inference_precision()]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    refuse_damaged_export(folder)
    options = {"dtype": dtype, **low_bit_options(folder)}
    model: Any = load_pretrained(AutoModelForCausalLM, folder, left_out=tensors_left_out(folder), **options)
    if options["dtype"] != dtype:
        model = model.to(dtype)
    _refuse_ignored_fields(folder, model)
    # the folder's own defaults would answer for what a caller left open
    model.generation_config = GenerationConfig()
    return model.eval().to(device)


def _refuse_ignored_fields(folder: Path, model: Any) -> None:
    """Raise `UserError` where transformers' class reads no bounds or windows of single layers, and the folder
    has some: it would compute another model, and say nothing (K-EXAONE 2.0 before transformers' #47802)."""
    said = {"swiglu_limits": any(getattr(model.config, "swiglu_limits", None) or []),
            "sliding_windows": len({*(getattr(model.config, "sliding_windows", None) or [])} - {0, None}) > 1}
    source = inspect.getsource(inspect.getmodule(type(model)) or type(model))
    ignored = [name for name, tells in said.items() if tells and name not in source]
    if ignored:
        raise UserError(f"{folder}: transformers {transformers.__version__} does not read "
                        f"{' and '.join(ignored)} of config.json, and would compute another model; use "
                        "--engine megatron or vllm")


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
        refuse_uncached(self._model.config)
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


def refuse_uncached(config: Any, fix: str = "take the engine megatron or vllm (--engine)") -> None:
    """Raise `UserError`, which ends with `fix`, for a model whose past the pages of transformers (5.x) cannot
    hold: they have keys and values of one width, `head_dim`, and of latent attention keys are wider than
    values; and no states."""
    kinds = getattr(config, "layer_types", None) or ()
    for found, what in ((getattr(config, "kv_lora_rank", None), "kv_lora_rank = {}: latent attention"),
                        ("linear_attention" in kinds, "layer_types has linear_attention: linear attention")):
        if found:
            raise UserError(f"config.json: {what.format(found)} has no cache in transformers' continuous "
                            f"batching; {fix}")


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


def _shapes_of(model: Any, views: Mapping[str, torch.Tensor]
               ) -> tuple[dict[str, tuple[int, ...]], Sequence[str]]:
    """Return the shapes of a model's tensors, and what it may be given and does without."""
    return ({name: tuple(view.shape) for name, view in views.items()},
            model._keys_to_ignore_on_load_unexpected or ())
