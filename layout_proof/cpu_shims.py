"""Patches of torch that let unmodified megatron-core run on CPUs: call `prepare_without_gpu` before importing
megatron. The docstring of a patch names Megatron-Core's assumption."""

import contextlib
import functools
import importlib.util
import os
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._device import _device_constructors

CPU = torch.device("cpu")
_is_prepared = False


def prepare_without_gpu() -> None:
    """Switch this process to megatron-core on CPUs, permanently, even if the machine has a GPU."""
    global _is_prepared
    if _is_prepared:
        return
    _is_prepared = True
    stub_paged_stash()
    # megatron uses Transformer Engine's optimizers, products and norms if the import succeeds (login nodes,
    # hidden CUDA devices), but these need CUDA. None makes the import fail; an imported module stays.
    sys.modules.setdefault("transformer_engine", None)  # type: ignore[arg-type]
    _patch_current_device()
    _redirect_cuda_requests()
    _patch_type_names()
    _redirect_cuda_generator()
    with _disable_compilation(), _hide_trackers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a missing GPU extension prints a warning on import
        # not at the top: `library_patches` imports megatron-core, which reads the patched torch
        from layout_proof import library_patches
    library_patches.patch_for_cpus()


def is_cpu_only() -> bool:
    """Return whether the shims are installed: `torch.cuda` then answers for the CPU."""
    return _is_prepared


def stub_paged_stash() -> None:
    """Let megatron-core import without triton, which only torch's CUDA builds include: it always imports the
    kernels of the paged expert stash, an option that needs a GPU."""
    os.environ.setdefault("NO_VCS_VERSION", "1")  # or megatron-core reads a commit from the caller's git
    if importlib.util.find_spec("triton") is None:
        absent: Any = types.ModuleType("megatron.core.transformer.moe.ops.paged_stash")
        absent.GLOBAL_BLOCK_SIZE = absent.paged_stash_copy_kernel = absent.paged_stash_pop_kernel = None
        sys.modules[absent.__name__] = absent


class _Stream:
    """Stands for `torch.cuda.Stream` and `torch.cuda.Event`: CPU work is already in program order."""

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
    """megatron reads device, streams and memory statistics from `torch.cuda`, and marks ranges for a
    profiler."""
    cuda: Any = torch.cuda
    cuda.current_device = lambda: CPU
    cuda.set_device = lambda *args: None
    # a torch with CUDA counts devices here, and `torch.optim` asks the driver
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


def _is_cuda_device(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.split(":")[0] == "cuda"


def _redirect_cuda_requests() -> None:
    """megatron allocates with `device="cuda"`, `.cuda()` and pinned memory, which do not exist on CPUs."""

    def create_on_cpu(function: Any) -> Any:
        @functools.wraps(function)
        def create_with_cpu(*args: Any, **kwargs: Any) -> Any:
            if _is_cuda_device(kwargs.get("device")):
                kwargs["device"] = CPU
            # pinned memory needs the CUDA driver
            kwargs.pop("pin_memory", None)
            return function(*args, **kwargs)

        return create_with_cpu

    _device_constructors()  # caches the original functions for `with torch.device(...)`
    for name in ("tensor", "as_tensor", "empty", "zeros", "ones", "full", "arange", "rand", "randn",
                 "randint", "eye", "linspace", "empty_like", "zeros_like", "ones_like", "full_like"):
        setattr(torch, name, create_on_cpu(getattr(torch, name)))

    tensor: Any = torch.Tensor
    move = tensor.to

    @functools.wraps(move)  # function modes of torch see the name
    def move_to_cpu(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _is_cuda_device(args[0]):
            args = (CPU, *args[1:])
        if _is_cuda_device(kwargs.get("device")):
            kwargs["device"] = CPU
        return move(self, *args, **kwargs)

    tensor.to = move_to_cpu
    tensor.cuda = lambda self, *args, **kwargs: self
    tensor.record_stream = lambda self, stream: None
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def _patch_type_names() -> None:
    """megatron's optimizers recognize parameters by name only: `param.type() == "torch.cuda.FloatTensor"`
    etc. float64 gets the name of float32."""
    tensor: Any = torch.Tensor
    original = tensor.type

    def get_type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return original(self, *args, **kwargs)
        return original(self).replace("torch.", "torch.cuda.", 1).replace("DoubleTensor", "FloatTensor")

    tensor.type = get_type_name


def _redirect_cuda_generator() -> None:
    """Dropout and recomputation save and restore CUDA's generator; on CPUs this is the default generator."""
    cuda: Any = torch.cuda
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
        module.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
        module.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
        module.manual_seed_all = lambda seed: None


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
