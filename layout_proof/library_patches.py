"""Patches of megatron-core functions: fixes of its defects on any device, and CPU support over gloo.

Importing this module imports megatron-core: `cpu_shims` first prepares the process. The docstring of each
patch names the assumption or defect.
"""

import functools
import logging
from typing import Any

# unused imports are for `cpu_shims`: imported while compilation and warnings are off
import megatron.core.models.gpt.gpt_layer_specs
import megatron.core.optimizer
import megatron.core.pipeline_parallel
import megatron.core.transformer.multi_token_prediction  # noqa: F401
import torch
from megatron.core.tensor_parallel import mappings, random
from megatron.core.transformer.moe import moe_utils, token_dispatcher
from megatron.core.transformer.torch_norm import WrappedTorchNorm


@functools.cache
def patch_defects() -> None:
    """Fix Megatron-Core's defects in this process; call it before building a model.

    `test_cpu_shims.py::test_megatron_core_still_needs_the_patch` fails when Megatron-Core no longer has a
    defect.
    """
    _patch_norm_marks()
    _patch_empty_experts()


def _patch_empty_experts() -> None:
    """Transformer Engine's permutation asserts that local experts receive a token, and its inverse returns no
    rows instead of zeros without tokens. Processes that receive no token use the unfused functions."""
    permute, unpermute = token_dispatcher.permute, token_dispatcher.unpermute

    @functools.wraps(permute)
    def permute_tokens(tokens: Any, routing_map: Any, probs: Any = None, num_out_tokens: Any = None,
                    fused: bool = False, **options: Any) -> Any:
        # reading a count on the GPU would synchronize; it has every choice of a router, never 0
        on_host = num_out_tokens is not None and not getattr(num_out_tokens, "is_cuda", False)
        fused = fused and not (on_host and int(num_out_tokens) == 0)
        return permute(tokens, routing_map, probs, num_out_tokens, fused=fused, **options)

    @functools.wraps(unpermute)
    def unpermute_tokens(permuted_tokens: Any, *args: Any, fused: bool = False, **options: Any) -> Any:
        return unpermute(permuted_tokens, *args, fused=fused and len(permuted_tokens) > 0, **options)

    token_dispatcher.permute, token_dispatcher.unpermute = permute_tokens, unpermute_tokens


def _patch_norm_marks() -> None:
    """WrappedTorchNorm refuses sequence parallelism because torch's norms do not mark their weight for the
    gradient sum over the tensor-parallel group. The patch sets the mark."""
    original = WrappedTorchNorm.__new__

    def create_marked_norm(cls: Any, config: Any, hidden_size: int, eps: float = 1e-5,
                           *args: Any, **kwargs: Any) -> Any:
        sequence_parallel, config.sequence_parallel = config.sequence_parallel, False
        try:
            norm = original(cls, config, hidden_size, eps, *args, **kwargs)
        finally:
            config.sequence_parallel = sequence_parallel
        for parameter in norm.parameters():
            parameter.sequence_parallel = sequence_parallel
        return norm

    WrappedTorchNorm.__new__ = staticmethod(create_marked_norm)


def patch_for_cpus() -> None:
    """Patch the functions that assume CUDA or NCCL, and the defects; call it once per process."""
    _patch_rng_tracker()
    _patch_split_sizes()
    _patch_uneven_gathers()
    patch_defects()


def _patch_rng_tracker() -> None:
    """The tensor-parallel RNG tracker accesses CUDA states through private functions, and warns if the CPU
    state changes."""
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    logging.getLogger(random.__name__).addFilter(
        lambda record: "CPU RNG state changed within GPU RNG context" not in record.getMessage())


def _patch_split_sizes() -> None:
    """The all-to-all dispatcher converts split sizes to numbers only for CUDA tensors; gloo needs numbers
    too."""
    def convert_to_numbers(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = convert_to_numbers


def _patch_uneven_gathers() -> None:
    """gloo gathers and scatters only equal parts; tokens of experts split over processes have unequal
    parts."""
    gather, reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_uneven(input_: torch.Tensor, group: Any, output_split_sizes: list[int] | None = None,
                      use_global_buffer: bool = False) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            even: torch.Tensor = gather(input_, group, output_split_sizes, use_global_buffer)
            return even
        # pad every part to the longest before the gather, and cut the padding afterwards
        longest = max(output_split_sizes)
        parts = (gather(_pad_rows(input_, longest), group).unflatten(0, (-1, longest)) if longest
                 else [input_] * group.size())
        return torch.cat([part[:n] for part, n in zip(parts, output_split_sizes, strict=True)])

    def reduce_scatter_uneven(input_: torch.Tensor, group: Any, input_split_sizes: list[int] | None = None,
                              use_global_buffer: bool = False) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            even: torch.Tensor = reduce_scatter(input_, group, input_split_sizes, use_global_buffer)
            return even
        longest = max(input_split_sizes)
        if longest == 0:
            return input_
        parts = torch.cat([_pad_rows(part, longest) for part in input_.split(input_split_sizes)])
        local: torch.Tensor = reduce_scatter(parts, group)
        return local[:input_split_sizes[group.rank()]]

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = (
        gather_uneven, reduce_scatter_uneven)


def _pad_rows(tensor: torch.Tensor, length: int) -> torch.Tensor:
    """Pad [n, ...] with zeros to [length, ...]."""
    return torch.cat([tensor, tensor.new_zeros(length - tensor.shape[0], *tensor.shape[1:])])
