"""The CPU door: lets the unmodified megatron-core run on a machine without CUDA, over gloo.

`prepare_megatron()` is called once, before megatron is imported anywhere else.  It does nothing where CUDA
works.  Each patch is one function whose docstring names the assumption that it answers; what is wrong on
any device is mended by `mend`.  No second implementation of anything is switched in: model,
schedules, dispatchers, optimizers and process groups are the library's own, on CPU tensors.
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

from megatron_sov.engine.parallel.device import (
    CPU, compute_on_cpu, computes_on_cpu, hide_broken_deep_ep, on_gpu)

# Defects of megatron-core that a model meets on any device, mended in place.
#
# Each is one function whose docstring names it; tests/engine/parallel/test_cpu_shims.py fails when the
# library no longer has it.

@functools.cache
def mend() -> None:
    """Mend the library in this process; called before a model is built."""
    _norms_under_sequence_parallelism()
    _experts_without_tokens()


def _experts_without_tokens() -> None:
    """Transformer Engine's permutation asserts that a process's experts get a token, and its inverse makes no
    rows of none, where the library wants zeros; a few tokens over many processes leave some without."""
    import megatron.core.transformer.moe.token_dispatcher as dispatcher

    permute, unpermute = dispatcher.permute, dispatcher.unpermute

    @functools.wraps(permute)
    def permute_any(tokens: Any, routing_map: Any, probs: Any = None, num_out_tokens: Any = None,
                    fused: bool = False, **asked: Any) -> Any:
        # a number on a GPU is not waited for: it counts a router's choices, which every token has
        known = num_out_tokens is not None and not getattr(num_out_tokens, "is_cuda", False)
        fused = fused and not (known and int(num_out_tokens) == 0)
        return permute(tokens, routing_map, probs, num_out_tokens, fused=fused, **asked)

    @functools.wraps(unpermute)
    def unpermute_any(permuted_tokens: Any, *args: Any, fused: bool = False, **asked: Any) -> Any:
        return unpermute(permuted_tokens, *args, fused=fused and len(permuted_tokens) > 0, **asked)

    dispatcher.permute, dispatcher.unpermute = permute_any, unpermute_any


def _norms_under_sequence_parallelism() -> None:
    """WrappedTorchNorm refuses sequence parallelism because torch's norms do not mark their weight for the
    gradient sum over the tensor-parallel group; the mark is all that is missing."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    original = WrappedTorchNorm.__new__
    def marked(cls: Any, config: Any, hidden_size: int, eps: float = 1e-5, *args: Any, **kwargs: Any) -> Any:
        wanted, config.sequence_parallel = config.sequence_parallel, False
        try:
            norm = original(cls, config, hidden_size, eps, *args, **kwargs)
        finally:
            config.sequence_parallel = wanted
        for parameter in norm.parameters():
            parameter.sequence_parallel = wanted
        return norm

    WrappedTorchNorm.__new__ = staticmethod(marked)


def prepare_megatron() -> None:
    """Prepare this process for megatron-core; a no-op with CUDA, and when called again."""
    if on_gpu():
        hide_broken_deep_ep()
    else:
        prepare_without_gpu()


def prepare_without_gpu() -> None:
    """Prepare this process for megatron-core on the CPU, for good, whatever the machine has."""
    if computes_on_cpu():
        return
    compute_on_cpu()
    _without_transformer_engine()
    _current_device_is_cpu()
    _cuda_requests_land_on_cpu()
    _tensor_type_names()
    _cuda_generator_is_cpu_generator()
    with _eager_jit(), _without_trackers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each missing GPU extension is announced on import
        import megatron.core.models.gpt.gpt_layer_specs
        import megatron.core.optimizer
        import megatron.core.pipeline_parallel
        import megatron.core.transformer.multi_token_prediction  # noqa: F401
    _rng_tracker()
    _dispatcher_split_sizes()
    _uneven_gathers()
    mend()


def _without_transformer_engine() -> None:
    """megatron takes Transformer Engine's optimizers, products and norms where it imports, as it does on a
    login node or where CUDA's devices are hidden, and all of them are CUDA's.  One that this process has
    imported before is meant."""
    # None in sys.modules makes an import fail as if the package were not installed
    sys.modules.setdefault("transformer_engine", None)  # type: ignore[arg-type]


class _Stream:
    """Stands for torch.cuda.Stream and Event: work on a CPU is already in program order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.order = "program"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self

    def query(self) -> bool:
        """Report that all work is done."""
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0


def _current_device_is_cpu() -> None:
    """megatron asks torch.cuda where it runs (`device=torch.cuda.current_device()`),
    for streams and memory figures, and names parts of its passes for a profiler."""
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


def _is_cuda(wanted: Any) -> bool:
    if isinstance(wanted, torch.device):
        return wanted.type == "cuda"
    return isinstance(wanted, str) and wanted.split(":")[0] == "cuda"


def _cuda_requests_land_on_cpu() -> None:
    """megatron allocates with `device="cuda"`, `.cuda()` and pinned memory, none of which exist here."""

    def on_cpu(function: Any) -> Any:
        @functools.wraps(function)
        def create(*args: Any, **kwargs: Any) -> Any:
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = CPU
            # pinned memory is asked of the CUDA driver, which is not there
            kwargs.pop("pin_memory", None)
            return function(*args, **kwargs)

        return create

    from torch.utils._device import _device_constructors

    _device_constructors()  # caches the original functions, which `with torch.device(...)` recognises
    for name in ("tensor", "as_tensor", "empty", "zeros", "ones", "full", "arange", "rand", "randn",
                 "randint", "eye", "linspace", "empty_like", "zeros_like", "ones_like", "full_like"):
        setattr(torch, name, on_cpu(getattr(torch, name)))

    tensor: Any = torch.Tensor
    move = tensor.to

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _is_cuda(args[0]):
            args = (CPU, *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return move(self, *args, **kwargs)

    tensor.to = to
    tensor.cuda = lambda self, *args, **kwargs: self
    tensor.record_stream = lambda self, stream: None
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def _tensor_type_names() -> None:
    """megatron's optimizers accept parameters by name only: `param.type() ==
    "torch.cuda.FloatTensor"` and so on."""
    tensor: Any = torch.Tensor
    original = tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return original(self, *args, **kwargs)
        return original(self).replace("torch.", "torch.cuda.", 1)

    tensor.type = type_


def _cuda_generator_is_cpu_generator() -> None:
    """Dropout and recomputation save and restore "the CUDA generator";
    here it is the default CPU generator."""
    cuda: Any = torch.cuda
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
        module.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
        module.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
        module.manual_seed_all = lambda seed: None  # torch.manual_seed itself calls it


@contextlib.contextmanager
def _eager_jit() -> Iterator[None]:
    """megatron binds `jit_fuser = torch.compile` while it is imported; compiling costs about 9 s in
    a CPU's first step."""
    compile_ = torch.compile
    torch.compile = (lambda function=None, **kwargs: function  # type: ignore[assignment]
                     if function is not None else (lambda f: f))
    try:
        yield
    finally:
        torch.compile = compile_


@contextlib.contextmanager
def _without_trackers() -> Iterator[None]:
    """megatron imports trackers of its own loops where they are installed, which cost a fifth of a command's
    start; runs write to them by `runs.obs.trackers`."""
    # None in sys.modules makes an import fail as if the package were not installed
    absent = [name for name in ("wandb", "torch.utils.tensorboard") if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


def _rng_tracker() -> None:
    """The tensor-parallel RNG tracker reads and writes CUDA states by private functions,
    and warns when the CPU's moves."""
    import megatron.core.tensor_parallel.random as random

    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    logging.getLogger(random.__name__).addFilter(
        lambda record: "CPU RNG state changed within GPU RNG context" not in record.getMessage())


def _dispatcher_split_sizes() -> None:
    """The all-to-all dispatcher turns split sizes into numbers only for CUDA tensors;
    gloo then gets tensors."""
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as dispatcher

    def to_numbers(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = dispatcher.maybe_move_tensor_to_cpu = to_numbers


def _uneven_gathers() -> None:
    """gloo gathers and scatters equal parts only; tokens of experts that are split over processes
    come in unequal ones."""
    import megatron.core.tensor_parallel.mappings as mappings

    gather, reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_any(input_: torch.Tensor, group: Any, output_split_sizes: list[int] | None = None,
                   use_global_buffer: bool = False) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            even: torch.Tensor = gather(input_, group, output_split_sizes, use_global_buffer)
            return even
        # every part is filled up to the longest, sent, and cut again: bytes that nobody reads, and the same
        # numbers
        longest = max(output_split_sizes)
        parts = (gather(_lengthened(input_, longest), group).unflatten(0, (-1, longest)) if longest
                 else [input_] * group.size())
        return torch.cat([part[:n] for part, n in zip(parts, output_split_sizes, strict=True)])

    def reduce_scatter_any(input_: torch.Tensor, group: Any, input_split_sizes: list[int] | None = None,
                           use_global_buffer: bool = False) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            even: torch.Tensor = reduce_scatter(input_, group, input_split_sizes, use_global_buffer)
            return even
        longest = max(input_split_sizes)
        if longest == 0:
            return input_
        parts = torch.cat([_lengthened(part, longest) for part in input_.split(input_split_sizes)])
        own: torch.Tensor = reduce_scatter(parts, group)
        return own[:input_split_sizes[group.rank()]]

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = (
        gather_any, reduce_scatter_any)


def _lengthened(tensor: torch.Tensor, length: int) -> torch.Tensor:
    """[n, ...] -> [length, ...], zeros behind."""
    return torch.cat([tensor, tensor.new_zeros(length - tensor.shape[0], *tensor.shape[1:])])
