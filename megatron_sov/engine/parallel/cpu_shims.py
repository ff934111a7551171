"""Patches that let unmodified megatron-core run on CPUs over gloo, and fix its defects.

`megatron_sov.engine` calls `prepare_megatron()` before any of its modules imports megatron. Each patch is a
function whose docstring names the assumption or defect. `patch_defects` fixes defects that occur on any
device. No part is reimplemented: model, schedules, dispatchers, optimizers and process groups are the
library's, on CPU tensors.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from megatron_sov.engine.parallel.device import CPU, hide_broken_deep_ep, is_cpu_only, mark_cpu_only, on_gpu

# Defects on any device. `test_cpu_shims.py::test_the_library_still_needs_the_patch` fails when the library no
# longer has one.

@functools.cache
def patch_defects() -> None:
    """Fix the library's defects in this process; call it before building a model."""
    _patch_norm_marks()
    _patch_empty_experts()


def _patch_empty_experts() -> None:
    """Transformer Engine's permutation asserts that local experts receive a token, and its inverse returns no
    rows for no tokens, while the library needs zeros. With few tokens, some processes receive none."""
    import megatron.core.transformer.moe.token_dispatcher as dispatcher

    permute, unpermute = dispatcher.permute, dispatcher.unpermute

    @functools.wraps(permute)
    def permute_any(tokens: Any, routing_map: Any, probs: Any = None, num_out_tokens: Any = None,
                    fused: bool = False, **options: Any) -> Any:
        # do not synchronize for a count on the GPU: it counts all choices of a router and is never 0
        on_host = num_out_tokens is not None and not getattr(num_out_tokens, "is_cuda", False)
        fused = fused and not (on_host and int(num_out_tokens) == 0)
        return permute(tokens, routing_map, probs, num_out_tokens, fused=fused, **options)

    @functools.wraps(unpermute)
    def unpermute_any(permuted_tokens: Any, *args: Any, fused: bool = False, **options: Any) -> Any:
        return unpermute(permuted_tokens, *args, fused=fused and len(permuted_tokens) > 0, **options)

    dispatcher.permute, dispatcher.unpermute = permute_any, unpermute_any


def _patch_norm_marks() -> None:
    """WrappedTorchNorm refuses sequence parallelism because torch's norms do not mark their weight for the
    gradient sum over the tensor-parallel group. The patch sets the mark."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

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


def prepare_megatron() -> None:
    """Prepare this process for megatron-core. Does nothing with CUDA or when called again."""
    if on_gpu():
        hide_broken_deep_ep()
    else:
        prepare_without_gpu()


def prepare_without_gpu() -> None:
    """Switch this process to megatron-core on CPUs, permanently, even if the machine has a GPU."""
    if is_cpu_only():
        return
    mark_cpu_only()
    _hide_transformer_engine()
    _patch_current_device()
    _redirect_cuda_requests()
    _patch_type_names()
    _redirect_cuda_generator()
    with _disable_compilation(), _hide_trackers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each missing GPU extension prints a warning on import
        import megatron.core.models.gpt.gpt_layer_specs
        import megatron.core.optimizer
        import megatron.core.pipeline_parallel
        import megatron.core.transformer.multi_token_prediction  # noqa: F401
    _patch_rng_tracker()
    _patch_split_sizes()
    _patch_uneven_gathers()
    patch_defects()


def _hide_transformer_engine() -> None:
    """megatron uses Transformer Engine's optimizers, products and norms if it imports, for example on a login
    node or with hidden CUDA devices, but they need CUDA. An already imported module stays."""
    # None in sys.modules makes the import fail as if the package were missing
    sys.modules.setdefault("transformer_engine", None)  # type: ignore[arg-type]


class _Stream:
    """Stands for torch.cuda.Stream and Event: CPU work is already in program order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.order = "program"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self

    def query(self) -> bool:
        """Return True: all work is finished."""
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0


def _patch_current_device() -> None:
    """megatron reads device, streams and memory statistics from torch.cuda, and marks ranges for a
    profiler."""
    cuda: Any = torch.cuda
    cuda.current_device = lambda: CPU
    cuda.set_device = lambda *args: None
    # a torch with CUDA counts devices for its answer, and its optimizers ask the driver then
    cuda.is_available = lambda: False
    cuda.device_count = lambda: 1
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.empty_cache = lambda: None
    cuda.Stream = cuda.Event = _Stream
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: _Stream()
    cuda.stream = lambda *args, **kwargs: contextlib.nullcontext()
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *args: 0
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, lambda *args, **kwargs: 0)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.split(":")[0] == "cuda"


def _redirect_cuda_requests() -> None:
    """megatron allocates with `device="cuda"`, `.cuda()` and pinned memory, which do not exist on CPUs."""

    def create_on_cpu(function: Any) -> Any:
        @functools.wraps(function)
        def create_with_cpu(*args: Any, **kwargs: Any) -> Any:
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = CPU
            # pinned memory needs the CUDA driver
            kwargs.pop("pin_memory", None)
            return function(*args, **kwargs)

        return create_with_cpu

    from torch.utils._device import _device_constructors

    _device_constructors()  # caches the original functions for `with torch.device(...)`
    for name in ("tensor", "as_tensor", "empty", "zeros", "ones", "full", "arange", "rand", "randn",
                 "randint", "eye", "linspace", "empty_like", "zeros_like", "ones_like", "full_like"):
        setattr(torch, name, create_on_cpu(getattr(torch, name)))

    tensor: Any = torch.Tensor
    move = tensor.to

    @functools.wraps(move)  # function modes of torch see the name
    def move_to_cpu(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _is_cuda(args[0]):
            args = (CPU, *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return move(self, *args, **kwargs)

    tensor.to = move_to_cpu
    tensor.cuda = lambda self, *args, **kwargs: self
    tensor.record_stream = lambda self, stream: None
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def _patch_type_names() -> None:
    """megatron's optimizers recognize parameters by name only: `param.type() == "torch.cuda.FloatTensor"`
    etc."""
    tensor: Any = torch.Tensor
    original = tensor.type

    def get_type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return original(self, *args, **kwargs)
        return original(self).replace("torch.", "torch.cuda.", 1)

    tensor.type = get_type_name


def _redirect_cuda_generator() -> None:
    """Dropout and recomputation save and restore CUDA's generator; on CPUs this is the default generator."""
    cuda: Any = torch.cuda
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
        module.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
        module.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
        module.manual_seed_all = lambda seed: None  # torch.manual_seed itself calls it


@contextlib.contextmanager
def _disable_compilation() -> Iterator[None]:
    """megatron sets `jit_fuser = torch.compile` during import; compilation costs about 9 s in a CPU's first
    step."""
    compile_ = torch.compile
    torch.compile = (lambda function=None, **kwargs: function  # type: ignore[assignment]
                     if function is not None else (lambda f: f))
    try:
        yield
    finally:
        torch.compile = compile_


@contextlib.contextmanager
def _hide_trackers() -> Iterator[None]:
    """megatron imports its trackers if installed, which takes a fifth of a command's start; runs use
    `runs.obs.trackers` instead."""
    # None in sys.modules makes the import fail as if the package were missing
    absent = [name for name in ("wandb", "torch.utils.tensorboard") if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


def _patch_rng_tracker() -> None:
    """The tensor-parallel RNG tracker accesses CUDA states through private functions, and warns if the CPU
    state changes."""
    import megatron.core.tensor_parallel.random as random

    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    logging.getLogger(random.__name__).addFilter(
        lambda record: "CPU RNG state changed within GPU RNG context" not in record.getMessage())


def _patch_split_sizes() -> None:
    """The all-to-all dispatcher converts split sizes to numbers only for CUDA tensors; gloo needs numbers
    too."""
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as dispatcher

    def to_numbers(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = dispatcher.maybe_move_tensor_to_cpu = to_numbers


def _patch_uneven_gathers() -> None:
    """gloo gathers and scatters only equal parts; tokens of experts split over processes have unequal
    parts."""
    import megatron.core.tensor_parallel.mappings as mappings

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
