"""Run transformers with continuous batching as an inference engine.

transformers 5 stacks the experts of a layer in memory and renames other tensors, while files have one tensor
per expert. For updates, transformers' own conversion (of `save_pretrained`) runs on views of the parameters,
so that writing to its results writes to the model.
"""

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
from megatron_sov.convert.sources import check_export, check_whole_model, list_ignored_prefixes
from megatron_sov.engine.parallel.device import PRECISION, choose_inference_precision
from megatron_sov.infer.decoder.sampling import derive_seed
from megatron_sov.infer.engines.target import report_precision
from megatron_sov.infer.request import (
    Batching, GenerationResult, NamedTensors, Sampling, StopRule, Tokens, WeightVersion, check_no_routes,
    check_no_rules)
from megatron_sov.model.pretrained import find_low_bit_options, load_pretrained

PAGE_TOKENS = 16
"""Tokens per KV cache page in transformers."""
MAX_MASK_ELEMENTS = 1 << 28
"""Limit of mask elements (pass tokens x cached tokens), which SDPA and eager attention allocate: 1 GiB in
fp32, twice for models with sliding-window layers."""
PASS_TOKENS = 1024
"""Preferred minimum tokens per pass; fewer sequences run at a time to reach the minimum."""


class HfEngine:
    """Inference engine for a transformers model from `load_hf`; `batching` limits memory."""

    def __init__(self, model: Any, batching: Batching | None = None) -> None:
        self._model, self._batching = model, batching or Batching()
        self._weight_version = WeightVersion("transformers")

    @torch.no_grad()
    def generate(self, prompts: Sequence[Tokens], sampling: Sampling, *, stop: StopRule | None = None,
                 streams: Sequence[int] | None = None) -> GenerationResult:
        """Continue prompts, see `Engine.generate`; samples depend on the whole batch, which shares a seed.
        Raises `UserError`: transformers failed for a prompt, e.g. for lack of memory, or routes are
        requested."""
        check_no_rules("transformers", sampling)
        check_no_routes("transformers", sampling)
        check_cache_support(self._model.config)
        sampling.check()
        stop, version = stop or StopRule(), self._weight_version.version
        if not prompts:
            return GenerationResult.of([], sampling, stop, version)
        # each sequence reserves pages for the longest sequence, which bounds the number of sequences
        longest = max(map(len, prompts)) + sampling.max_new_tokens
        slots, pages, pass_tokens = compute_cache_sizes(len(prompts), longest, self._batching)
        sampling_options: dict[str, Any] = {"do_sample": False}
        if sampling.temperature:
            sampling_options = {"do_sample": True, "temperature": sampling.temperature,
                                "top_p": sampling.top_p, "top_k": sampling.top_k}
        # -1: no stop token.
        generation_config = GenerationConfig(max_new_tokens=sampling.max_new_tokens,
                                             eos_token_id=list(stop.ids) or -1, pad_token_id=0,
                                             **sampling_options)
        # without explicit sizes, transformers gives all free memory to the cache, and is slow
        sizes = ContinuousBatchingConfig(
            page_size=PAGE_TOKENS, num_blocks=pages, max_requests_per_batch=slots,
            max_batch_tokens=pass_tokens, return_logprobs=True,
            seed=sampling.seed if streams is None else derive_seed(sampling.seed, *streams))
        results = self._model.generate_batch(
            inputs=[list(p) for p in prompts], generation_config=generation_config,
            continuous_batching_config=sizes, warmup=False)
        outputs = list(results.values())
        failed = [o.error for o in outputs if o.error is not None]
        if failed or len(outputs) != len(prompts):
            why = failed[0] if failed else "see its messages above"
            raise UserError(f"transformers answered {len(outputs) - len(failed)} of {len(prompts)} prompts "
                            f"of up to {longest} tokens ({why}); free memory, or use shorter prompts "
                            "and continuations")
        # transformers returns log-probabilities of the truncated distribution, for greedy tokens of the plain
        # one.
        written = [(stop.cut(o.generated_tokens), o.logprobs) for o in outputs]
        return GenerationResult.of([(tokens, logprobs[:len(tokens)]) for tokens, logprobs in written],
                                   sampling, stop, version)

    def update(self, weights: NamedTensors | None, version: int) -> None:
        """Copy weights into the model, see `Engine`."""
        if weights is None:
            raise ValueError("the engine transformers has its own model: an update needs weights")
        with self._weight_version.replace_weights(version, weights):
            copy_weights(self._model, weights)


def load_hf(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """Load a transformers model for inference, on the GPU if available; code in the folder is not run.

    Args:
        folder: Hugging Face folder.
        dtype: dtype of the weights; None uses `choose_inference_precision`.

    Raises:
        UserError: transformers cannot load the folder, or would initialize missing weights.
    """
    dtype = dtype or PRECISION[choose_inference_precision()]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_export(folder)
    options = {"dtype": dtype, **find_low_bit_options(folder)}
    model: Any = load_pretrained(AutoModelForCausalLM, folder, left_out=list_ignored_prefixes(folder),
                                 **options)
    if options["dtype"] != dtype:
        model = model.to(dtype)
    _check_ignored_fields(folder, model)
    # The folder's generation defaults would replace unset options.
    model.generation_config = GenerationConfig()
    return model.eval().to(device)


def load_configured_hf(folder: Path, settings: Sequence[str] = (), option: str = "--set") -> Any:
    """Load a transformers model in the precision of `settings` (`train.precision=NAME`), see `load_hf`.
    Raises `UserError`: the precision does not exist."""
    precision = [choose_inference_precision(), *(setting.partition("=")[2] for setting in settings)][-1]
    if precision not in PRECISION:
        raise UserError(f"{option} {settings[-1]}: must be one of {', '.join(PRECISION)}")
    report_precision(folder, "transformers", precision)
    return load_hf(folder, PRECISION[precision])


def _check_ignored_fields(folder: Path, model: Any) -> None:
    """Raise `UserError` if transformers' class ignores per-layer bounds or windows in config.json.

    It would silently compute another model (K-EXAONE 2.0 before transformers' #47802).
    """
    has_field = {"swiglu_limits": any(getattr(model.config, "swiglu_limits", None) or []),
            "sliding_windows": len({*(getattr(model.config, "sliding_windows", None) or [])} - {0, None}) > 1}
    source = inspect.getsource(inspect.getmodule(type(model)) or type(model))
    ignored = [name for name, is_set in has_field.items() if is_set and name not in source]
    if ignored:
        raise UserError(f"{folder}: transformers {transformers.__version__} does not read "
                        f"{' and '.join(ignored)} of config.json, and would compute another model; use "
                        "--engine megatron or vllm")


def check_cache_support(config: Any, fix: str = "take the engine megatron or vllm (--engine)") -> None:
    """Raise `UserError` (ending with `fix`) for models that transformers' paged cache (5.x) does not support.

    Its pages have keys and values of width `head_dim` and no states: no latent and no linear attention.
    """
    kinds = getattr(config, "layer_types", None) or ()
    for value, reason in (
            (getattr(config, "kv_lora_rank", None), "kv_lora_rank = {}: latent attention"),
            ("linear_attention" in kinds, "layer_types has linear_attention: linear attention")):
        if value:
            raise UserError(f"config.json: {reason.format(value)} has no cache in transformers' continuous "
                            f"batching; {fix}")


def compute_cache_sizes(num_prompts: int, longest: int, batching: Batching) -> tuple[int, int, int]:
    """Return the sequences at a time, the number of cache pages, and the tokens per pass.

    Sequences and pass tokens bound the attention mask, so long contexts need no more memory for it than short
    ones. A pass is not longer than all sequences together, so a few short sequences need little.

    Args:
        num_prompts: number of prompts.
        longest: limit of tokens of the longest sequence.
        batching: limits of the caller.
    """
    pages = -(-longest // PAGE_TOKENS) + 1
    max_slots = MAX_MASK_ELEMENTS // (PASS_TOKENS * PAGE_TOKENS * pages)
    slots = max(1, min(batching.slots(num_prompts, longest), max_slots))
    cache_tokens = slots * pages * PAGE_TOKENS
    # the smallest limit counts, but each sequence reads at least a token
    max_pass_tokens = min(batching.prefill_tokens, slots * longest, MAX_MASK_ELEMENTS // cache_tokens)
    return slots, slots * pages, max(slots, max_pass_tokens)


class _View(torch.Tensor):
    """A tensor that stays a view when transformers calls `contiguous`."""

    def contiguous(self, *_: Any, **__: Any) -> "_View":
        return self


def get_live_views(model: Any) -> dict[str, torch.Tensor]:
    """Return tensor name in the files -> view into the model's memory. Raises `UserError`: transformers'
    conversion copies a tensor, so it cannot be updated in place."""
    live = model.state_dict()
    # files store a tied head once; the conversion may return copies, so only the names are used
    tensors = {name: live[name] for name in remove_tied_weights_from_state_dict(dict(live), model)}
    # writing to a copy would not reach the model
    memory = {t.untyped_storage().data_ptr() for t in tensors.values()}
    views = revert_weight_conversion(model, {name: t.as_subclass(_View) for name, t in tensors.items()})
    for name, view in views.items():
        if view.untyped_storage().data_ptr() not in memory:
            raise UserError(f"{type(model).__name__}: transformers copies {name} when it converts its "
                            "weights, so it cannot be updated in place; load the model from a folder")
    return {name: view.as_subclass(torch.Tensor) for name, view in views.items()}


@torch.no_grad()
def copy_weights(model: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy tensors into a loaded model, in place, a tensor at a time.

    Args:
        model: model from `load_hf`.
        weights: all tensors under their names in files; tensors that the class ignores, such as a multi-token
            prediction layer, are skipped.

    Raises:
        UserError: a tensor is missing, unknown, repeated or has a wrong shape; the model is then partly
            updated.
    """
    views = get_live_views(model)
    for name, tensor in check_whole_model(weights, *_get_shapes(model, views)):
        views[name].copy_(tensor)


def _get_shapes(model: Any, views: Mapping[str, torch.Tensor]
                ) -> tuple[dict[str, tuple[int, ...]], Sequence[str]]:
    """Return a model's tensor shapes, and name patterns for ignored tensors."""
    return ({name: tuple(view.shape) for name, view in views.items()},
            model._keys_to_ignore_on_load_unexpected or ())
