"""This process's device (CUDA or CPU), environment variables, host memory, and optional GPU libraries."""

from __future__ import annotations

import datetime
import functools
import gc
import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from megatron_sov.base.errors import UserError, first_error_line, format_error
from megatron_sov.model.config import RunConfig
from megatron_sov.runs.gpu_driver import list_visible_gpus
from megatron_sov.runs.launch_environment import local_gpu_index
from megatron_sov.work.clusters.chips import Gpu
from megatron_sov.work.clusters.units import GIB

# Deterministic algorithms; must be configured before CUDA and NCCL start.

DETERMINISM_VARIABLES = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NCCL_ALGO": ("Ring", "Tree", "CollnetDirect", "CollnetChain", "^NVLS"),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",)}
"""Environment variable -> values with deterministic results; the first is the default.

Sources: the reproducibility section of cuBLAS; the list that Megatron-LM accepts for `--deterministic-mode`
(NVLS sums inside switches, in no fixed order); Transformer Engine's variable for fused attention.
"""


def enable_determinism() -> None:
    """Make torch, cuBLAS, cuDNN, NCCL and Transformer Engine choose deterministic algorithms.

    Operations without a deterministic algorithm raise an error. The model's part is Megatron-Core's
    `deterministic_mode`, set by `model/specs.py`. Raises `UserError`: an environment variable has a
    conflicting value.
    """
    for name, allowed in DETERMINISM_VARIABLES.items():
        value = os.environ.setdefault(name, allowed[0])
        if value not in allowed:
            raise UserError(f"train.deterministic = True: the environment has {name}={value}, "
                            f"with which results do not repeat; unset it or use {' or '.join(allowed)}")
    # a process that is already deterministic may start another run
    if torch.cuda.is_initialized() and not torch.are_deterministic_algorithms_enabled():
        raise RuntimeError("CUDA has started before device.enable_determinism()")
    torch.use_deterministic_algorithms(True)
    # filling uninitialized memory would cost time for every activation
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


# Environment variables for CUDA, NCCL and Transformer Engine, after NVIDIA's recipes for mixture-of-experts
# models (Megatron-Bridge 26.08, `perf_recipes`). The user's environment takes precedence.


def build_run_variables(config: RunConfig, gpu_name: str) -> dict[str, str]:
    """Return environment variables for a run; `gpu_name` is the driver's name of the GPU."""
    parallel, flex = config.parallel, config.parallel.expert_dispatcher in ("deepep", "hybridep")
    # a single queue keeps tensor- and context-parallel kernels in the order in which they overlap; Blackwell
    # needs no such order, and expert messages that overlap with another micro-batch need several queues
    one_queue = ((parallel.tp > 1 or parallel.cp > 1) and parallel.expert_overlap == "none"
                 and not any(name in gpu_name for name in BLACKWELL_NAMES))
    variables = {"TORCH_NCCL_HIGH_PRIORITY": "1",  # messages overtake matrix products in the queue
                 MAX_CONNECTIONS_VARIABLE: "1" if one_queue else "32",
                 # NVLink SHARP takes memory for every group, and helps only with registered buffers
                 "NCCL_NVLS_ENABLE": str(int(config.gpu.nccl_user_buffers == "on"))}
    if config.gpu.cuda_graphs:
        variables["NCCL_GRAPH_REGISTER"] = "0"  # registration would pin memory that torch's allocator moves
    if parallel.overlap_grad_reduce or parallel.expert_overlap != "none":
        # norms would occupy all multiprocessors and leave none for NCCL or DeepEP
        variables |= dict.fromkeys(("NVTE_FWD_LAYERNORM_SM_MARGIN", "NVTE_BWD_LAYERNORM_SM_MARGIN"),
                                   "20" if flex else "16")
    return variables


MAX_CONNECTIONS_VARIABLE = "CUDA_DEVICE_MAX_CONNECTIONS"
BLACKWELL_NAMES = ("B200", "B300")
HOPPER, BLACKWELL = 9, 10
"""Major compute capabilities."""
MIN_CUDNN_DETERMINISTIC = 91801
"""First cuDNN version (as torch counts) with deterministic packed attention on Blackwell. On Hopper,
Transformer Engine disables the deterministic kernel from documents x heads x longest document squared =
2**30, and the number of documents per row is unbounded."""


_variables: dict[str, str] = {}
"""Variables set by `set_run_variables` for the current run."""


def set_run_variables(config: RunConfig) -> None:
    """Set the variables from `build_run_variables` that the environment lacks; call before CUDA starts.
    Replaces values from an earlier run in this process. Raises `UserError`: the environment conflicts with a
    setting."""
    gpus = list_visible_gpus()
    for name, value in _variables.items():
        if os.environ.get(name) == value:
            del os.environ[name]
    _variables.clear()
    for name, value in build_run_variables(config, gpus[0].name if gpus else "").items():
        if name not in os.environ:
            os.environ[name] = _variables[name] = value
    if config.parallel.expert_overlap == "micro_batches" and os.environ[MAX_CONNECTIONS_VARIABLE] == "1":
        raise UserError("parallel.expert_overlap = micro_batches: the environment has "
                        f"{MAX_CONNECTIONS_VARIABLE}=1, with which messages wait for products; unset it or "
                        "use 32")


CPU = torch.device("cpu")
_on_cpu = False


def mark_cpu_only() -> None:
    """Record that the CPU shims are installed: `torch.cuda` then answers for the CPU."""
    global _on_cpu
    _on_cpu = True


def is_cpu_only() -> bool:
    return _on_cpu


def on_gpu() -> bool:
    """Return whether this process computes on a CUDA device, without starting CUDA; False after
    `mark_cpu_only`."""
    # ask the driver: torch's default check starts CUDA, and a forked process could not use it afterwards
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    return not _on_cpu and torch.cuda.is_available()


PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
"""`train.precision` -> dtype for weights and activations."""


def choose_inference_precision() -> Literal["bf16", "fp32"]:
    """Return the default `train.precision` for inference: bf16 on GPUs, fp32 on CPUs.

    It does not depend on the engine or the dtype of stored weights, so a checkpoint and its Hugging Face
    folder generate the same text."""
    return "bf16" if on_gpu() else "fp32"


def get_local_device() -> torch.device:
    """Return the device for parameters and batches."""
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu() else CPU


def describe_local_device() -> str:
    """Return this process's device by name ("cuda:1", "cpu"), equal in every thread."""
    return f"cuda:{local_gpu_index(torch.cuda.device_count())}" if on_gpu() else "cpu"


def release_gpu_memory() -> None:
    """Release cached GPU memory, for example from a deleted model."""
    if on_gpu():
        gc.collect()
        torch.cuda.empty_cache()  # does not start CUDA


def toggle_nsys_recording(*, on: bool) -> None:
    """Start or stop recording in nsys, with the library's NVTX ranges. Does nothing without nsys."""
    # `prepare_megatron` needs this module before megatron may be imported
    from megatron.core.utils import configure_nvtx_profiling

    configure_nvtx_profiling(on)
    torch.cuda.synchronize()
    (torch.cuda.profiler.start if on else torch.cuda.profiler.stop)()


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a host tensor to a device; to a GPU through pinned memory, without blocking."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


# Pinned host memory for asynchronous copies, in few large pieces.

ARENA_BYTES = 1 << 30
_ALIGN_BYTES = 64


class PinnedArena:
    """Allocates pinned host memory in few large pieces: torch rounds each allocation up to a power of two."""

    def __init__(self, total_bytes: int) -> None:
        """Prepare for tensors with `total_bytes` in total."""
        self._piece_bytes = min(ARENA_BYTES, total_bytes + _ALIGN_BYTES)
        self._free = torch.empty(0, dtype=torch.uint8)

    def allocate_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Allocate contiguous memory with the shape and dtype of `tensor`."""
        needed_bytes = -(-count_bytes(tensor) // _ALIGN_BYTES) * _ALIGN_BYTES
        if self._free.numel() < needed_bytes:
            self._free = torch.empty(max(needed_bytes, self._piece_bytes), dtype=torch.uint8,
                                     pin_memory=on_gpu())
        memory, self._free = self._free[:needed_bytes], self._free[needed_bytes:]
        return memory[:count_bytes(tensor)].view(tensor.dtype).view(tensor.shape)


def count_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# Assignment of GPUs to ranks. Ranks exchange problems through the rendezvous store before NCCL starts: NCCL
# would only wait for a rank that has failed.

def get_gpu() -> Gpu:
    """Return this process's GPU model and memory."""
    properties = torch.cuda.get_device_properties(local_gpu_index(torch.cuda.device_count()))
    return Gpu(properties.name, properties.total_memory)


def select_gpu(store: dist.Store, rank: int, size: int, needs_bytes: int,
               timeout: datetime.timedelta) -> torch.device:
    """Select this process's GPU and check it. Collective.

    Args:
        store: the rendezvous store.
        rank: rank of this process.
        size: number of ranks.
        needs_bytes: memory that the run needs at least; 0: unknown.
        timeout: limit of the wait for other ranks.

    Raises:
        UserError: on every rank, if a GPU cannot be used, is shared by two ranks or lacks memory.
    """
    device, uuid, problem = torch.device("cuda", local_gpu_index(torch.cuda.device_count())), "", ""
    try:
        torch.cuda.set_device(device)
        properties = torch.cuda.get_device_properties(device)
        uuid = str(properties.uuid)
        bind_near_gpu(properties)
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    except RuntimeError as e:  # CUDA's own: held by another process alone, fallen off the bus
        problem = f"cannot be used ({first_error_line(e)}); `nvidia-smi` shows who has it and how it is"
    else:
        if free_bytes < needs_bytes:
            problem = (f"has {free_bytes / GIB:.1f} of {total_bytes / GIB:.1f} GiB free, and the run takes "
                       f"{needs_bytes / GIB:.1f}; end the other processes on it (`nvidia-smi` names them), "
                       "or choose other GPUs by CUDA_VISIBLE_DEVICES")
    check_all_gpus(store, rank, size, uuid, problem, timeout)
    return device


PCI_DEVICES = Path("/sys/bus/pci/devices")


def bind_near_gpu(properties: Any, devices: Path = PCI_DEVICES) -> None:
    """Bind this process, with future threads and memory, to the CPUs near the GPU. Does nothing if the kernel
    lists no CPUs or the launcher has excluded them.

    Args:
        properties: torch's device properties.
        devices: the kernel's folder of PCI devices.
    """
    try:
        pci_address = (f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:"
                       f"{properties.pci_device_id:02x}.0")
        text = (devices / pci_address / "local_cpulist").read_text(encoding="ascii")
        spans = [[int(end) for end in span.split("-")] for span in text.strip().split(",") if span]
        local_cpus = {cpu for span in spans for cpu in range(span[0], span[-1] + 1)} & os.sched_getaffinity(0)
        if local_cpus:
            os.sched_setaffinity(0, local_cpus)
    except (OSError, ValueError, AttributeError):  # no such file, form, call on macOS, or place
        return


def check_all_gpus(store: dist.Store, rank: int, size: int, uuid: str, problem: str,
                   timeout: datetime.timedelta) -> None:
    """Raise `UserError` on every rank if any rank's GPU has a problem or two ranks share a GPU. Collective.

    Args:
        store: the rendezvous store.
        rank: rank of this process.
        size: number of ranks.
        uuid: UUID of its GPU.
        problem: problem of its GPU. "": none.
        timeout: limit of the wait for other ranks.
    """
    if uuid and store.add(f"gpu/{uuid}", 1) > 1:
        place = f"LOCAL_RANK = {os.environ.get('LOCAL_RANK', '0')}"
        problem = problem or (f"({uuid}) is another rank's as well: {place} of {torch.cuda.device_count()} "
                              "visible GPUs; start one process for each GPU, and let each see all of its "
                              "node or its own")
    if problem:
        store.set("gpu/problem", f"rank {rank}: its GPU {problem}")
    # the last rank sets the key, after all ranks have stored their problems
    if store.add("gpu/ranks", 1) == size:
        store.set("gpu/all", "seen")
    store.wait(["gpu/all"], timeout)
    if store.check(["gpu/problem"]):
        raise UserError(store.get("gpu/problem").decode())


# FP8 support on this GPU, without importing megatron, which would import Transformer Engine.

FP8_FUNCTIONS = {"tensorwise": "is_fp8_available", "blockwise": "is_fp8_block_scaling_available",
                 "mxfp8": "is_mxfp8_available", "nvfp4": "is_nvfp4_available"}
"""Recipe of `train.fp8` -> Transformer Engine's function that checks GPU support."""


def find_fp8_problems() -> dict[str, str]:
    """Return recipe -> Transformer Engine's reason against it on this GPU, or ""."""
    import transformer_engine.pytorch as te  # optional package

    checks = {fp8: getattr(te, name)(return_reason=True) for fp8, name in FP8_FUNCTIONS.items()}
    return {fp8: "" if available else str(reason) for fp8, (available, reason) in checks.items()}


# DeepEP: kernels for expert dispatch and combine.

DEEP_EP_NAMES = {"deepep": ("deep_ep.Buffer", "deep_ep.utils.EventHandle", "deep_ep.utils.EventOverlap"),
                 "hybridep": ("deep_ep.HybridEPBuffer",)}
"""`parallel.expert_dispatcher` -> names that Megatron-Core imports for it (`fused_a2a`)."""


@functools.cache
def find_deep_ep_problem(dispatcher: str) -> str:
    """Return the error from importing DeepEP for a dispatcher, or ""."""
    for name in DEEP_EP_NAMES[dispatcher]:
        module, _, last = name.rpartition(".")
        try:
            getattr(importlib.import_module(module), last)
        except Exception as e:  # newer versions assert that NCCL's library matches their build
            return format_error(e)
    return ""


# flash-linear-attention (package fla-core).

FLA_KERNEL = ("fla.ops.kda", "chunk_kda")
"""Module and function with the kernel."""
MIN_FLA_VERSION = (0, 6)
"""Oldest version whose signature this project has checked."""


@functools.cache
def find_fla_problem() -> str:
    """Return why flash-linear-attention cannot be used here, or ""."""
    module, name = FLA_KERNEL
    try:
        getattr(importlib.import_module(module), name)
    except Exception as e:  # Triton raises its own errors without a driver
        return format_error(e)
    version = str(getattr(sys.modules["fla"], "__version__", "unknown"))
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None or (int(match[1]), int(match[2])) < MIN_FLA_VERSION:
        return f"version {version} is older than {'.'.join(map(str, MIN_FLA_VERSION))}"
    return ""


def hide_broken_deep_ep() -> None:
    """Hide a broken DeepEP from Megatron-Core, which catches only `ImportError`."""
    if importlib.util.find_spec("deep_ep") is None:
        return
    if find_deep_ep_problem("deepep").partition(":")[0] not in (
            "", "ImportError", "ModuleNotFoundError", "AttributeError"):
        sys.modules["deep_ep"] = None  # type: ignore[assignment]
