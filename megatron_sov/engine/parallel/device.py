"""Where this process computes: on its CUDA device, or on the CPU once the shims for it are in place."""

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

from megatron_sov.base.errors import UserError, first_line, told_in_a_line
from megatron_sov.model.config import RunConfig
from megatron_sov.runs.gpu_driver import visible_gpus
from megatron_sov.runs.launch_environment import own_gpu_index
from megatron_sov.work.clusters.chips import Gpu
from megatron_sov.work.clusters.units import GIB

# The same bits in every run: what has to be settled in a process before CUDA and NCCL start.

VARIABLES = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NCCL_ALGO": ("Ring", "Tree", "CollnetDirect", "CollnetChain", "^NVLS"),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
}
"""Environment variable -> values under which results repeat; the first is set where the
environment says nothing.

Sources: cuBLAS' section on reproducibility; the list that Megatron-LM accepts for `--deterministic-mode`
(in-switch reductions, NVLS, add up in no fixed order); Transformer Engine's variable for fused attention.
"""


def switch_on() -> None:
    """Have torch, cuBLAS, cuDNN, NCCL and Transformer Engine choose algorithms that give the
    same bits each time.

    An operation that has no such algorithm raises instead of running.  The model's part is the library's
    `deterministic_mode`, which `model/specs.py` sets.

    Raises:
        UserError: the environment asks for something else.
    """
    for name, allowed in VARIABLES.items():
        value = os.environ.setdefault(name, allowed[0])
        if value not in allowed:
            raise UserError(f"train.deterministic = True: the environment has {name}={value}, "
                            f"with which results do not repeat; unset it or use {' or '.join(allowed)}")
    # a process that has done so already may do one run after another
    if torch.cuda.is_initialized() and not torch.are_deterministic_algorithms_enabled():
        raise RuntimeError("CUDA has started before determinism.switch_on()")
    torch.use_deterministic_algorithms(True)
    # it would fill all empty memory, of every activation; what is read before it is written is a defect
    # elsewhere
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


# What CUDA, NCCL and Transformer Engine are told of a run before they start, unless the environment says
# something else: what NVIDIA's own recipes for mixtures of experts set (Megatron-Bridge 26.08,
# `perf_recipes`).


def run_variables(config: RunConfig, gpu_name: str) -> dict[str, str]:
    """Return environment variables that suit a run on GPUs of a name, as the driver has it."""
    parallel, flex = config.parallel, config.parallel.expert_dispatcher in ("deepep", "hybridep")
    # one queue keeps kernels of tensor and context parallelism in the order in which they overlap; Blackwell
    # needs none for that, and messages of experts beside another micro-batch need several
    ordered = ((parallel.tp > 1 or parallel.cp > 1) and parallel.expert_overlap == "none"
               and not any(name in gpu_name for name in BLACKWELL_NAMES))
    found = {"TORCH_NCCL_HIGH_PRIORITY": "1",  # messages are not queued behind products
             CONNECTIONS: "1" if ordered else "32",
             # sums in NVLink switches take memory for every group, and gain where buffers are registered
             "NCCL_NVLS_ENABLE": str(int(config.gpu.nccl_user_buffers == "on"))}
    if config.gpu.cuda_graphs:
        found["NCCL_GRAPH_REGISTER"] = "0"  # it would hold on to memory that torch's allocator moves
    if parallel.overlap_grad_reduce or parallel.expert_overlap != "none":
        # norms take all multiprocessors, and leave NCCL or DeepEP none
        found |= dict.fromkeys(("NVTE_FWD_LAYERNORM_SM_MARGIN", "NVTE_BWD_LAYERNORM_SM_MARGIN"),
                               "20" if flex else "16")
    return found


CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
BLACKWELL_NAMES = ("B200", "B300")
HOPPER, BLACKWELL = 9, 10
"""Their compute capabilities begin so."""
REPEATS_CUDNN = 91801
"""The first cuDNN, as torch counts, whose attention over packed rows repeats its bits on Blackwell; on Hopper
Transformer Engine leaves it out from documents x heads x longest document squared = 2**30, and nothing bounds
the documents of a row."""


_variables: dict[str, str] = {}
"""Those that this process has set for its run."""


def set_variables(config: RunConfig) -> None:
    """Set what `run_variables` says and the environment does not; before CUDA starts.  What an earlier run
    of this process had set so is not the environment's own.

    Raises:
        UserError: the environment's own value stands against a setting.
    """
    gpus = visible_gpus()
    for name, value in _variables.items():
        if os.environ.get(name) == value:
            del os.environ[name]
    _variables.clear()
    for name, value in run_variables(config, gpus[0].name if gpus else "").items():
        if name not in os.environ:
            os.environ[name] = _variables[name] = value
    if config.parallel.expert_overlap == "micro_batches" and os.environ[CONNECTIONS] == "1":
        raise UserError(f"parallel.expert_overlap = micro_batches: the environment has {CONNECTIONS}=1, with "
                        "which messages wait for products; unset it or use 32")


CPU = torch.device("cpu")
_on_cpu = False


def compute_on_cpu() -> None:
    """Note that the CPU shims are in place: from now on `torch.cuda` answers for the CPU and no longer
    says what is there."""
    global _on_cpu
    _on_cpu = True


def computes_on_cpu() -> bool:
    return _on_cpu


def on_gpu() -> bool:
    """Return whether this process computes on a CUDA device; does not start CUDA."""
    # the driver's own answer: torch's usual question starts CUDA, and a fork of this process could not use it
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    return not _on_cpu and torch.cuda.is_available()


PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
"""`train.precision` -> dtype of weights and activations."""


def inference_precision() -> Literal["bf16", "fp32"]:
    """Return the precision in which a model is run unless a setting says otherwise: bf16 on a GPU, fp32 on a
    CPU, for every engine and whatever dtype the weights are stored in, so that a checkpoint and its Hugging
    Face folder give the same text."""
    return "bf16" if on_gpu() else "fp32"


def local_device() -> torch.device:
    """Return the device of this process's parameters and batches."""
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu() else CPU


def release_unused() -> None:
    """Give the memory of a model that is gone back to the device, for what this process does next."""
    if on_gpu():
        gc.collect()
        torch.cuda.empty_cache()  # which starts no CUDA where there is none yet


def record_for_nsys(*, on: bool) -> None:
    """Have NVIDIA's profiler begin or end to record, where this process was started with it, and the library
    name the parts of its passes for it (NVTX)."""
    from megatron.core.utils import configure_nvtx_profiling

    configure_nvtx_profiling(on)
    torch.cuda.synchronize()
    (torch.cuda.profiler.start if on else torch.cuda.profiler.stop)()


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return values of the host on a device; to a GPU they go from pinned memory, so that nobody waits."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


# Host memory that a GPU copies to and from without waiting: pinned, in few large pieces.

PIECE_BYTES = 1 << 30
_ALIGN_BYTES = 64


class Arena:
    """Host memory in few large pieces: pinned memory is handed out in powers of two."""

    def __init__(self, total_bytes: int) -> None:
        """Prepare for tensors of so many bytes together."""
        self._piece_bytes = min(PIECE_BYTES, total_bytes + _ALIGN_BYTES)
        self._free = torch.empty(0, dtype=torch.uint8)

    def like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return contiguous memory of a tensor's shape and dtype."""
        wanted = -(-num_bytes(tensor) // _ALIGN_BYTES) * _ALIGN_BYTES
        if self._free.numel() < wanted:
            self._free = torch.empty(max(wanted, self._piece_bytes), dtype=torch.uint8, pin_memory=on_gpu())
        taken, self._free = self._free[:wanted], self._free[wanted:]
        return taken[:num_bytes(tensor)].view(tensor.dtype).view(tensor.shape)


def num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# The GPU of this process: which one it is, that no other rank has it, and that there is room on it.
#
# What is wrong with one rank's GPU is told by all of them, over the rendezvous, before NCCL begins: there a
# rank that has left would only be waited for.

def kind() -> Gpu:
    """Return what this process's GPU is."""
    found = torch.cuda.get_device_properties(own_gpu_index(torch.cuda.device_count()))
    return Gpu(found.name, found.total_memory)


def take_gpu(store: dist.Store, rank: int, size: int, needs_bytes: int,
             timeout: datetime.timedelta) -> torch.device:
    """Make this process's GPU the current one; called by every rank.

    Args:
        store: the rendezvous.
        rank: of this process.
        size: number of ranks.
        needs_bytes: memory that it will take at least; 0: nobody knows.
        timeout: how long to wait for the other ranks.

    Raises:
        UserError: a GPU cannot be used, is another rank's as well, or has too little free memory; on every
            rank.
    """
    device, uuid, problem = torch.device("cuda", own_gpu_index(torch.cuda.device_count())), "", ""
    try:
        torch.cuda.set_device(device)
        properties = torch.cuda.get_device_properties(device)
        uuid = str(properties.uuid)
        stay_beside(properties)
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    except RuntimeError as e:  # CUDA's own: held by another process alone, fallen off the bus
        problem = f"cannot be used ({first_line(e)}); `nvidia-smi` shows who has it and how it is"
    else:
        if free_bytes < needs_bytes:
            problem = (f"has {free_bytes / GIB:.1f} of {total_bytes / GIB:.1f} GiB free, and the run takes "
                       f"{needs_bytes / GIB:.1f}; end the other processes on it (`nvidia-smi` names them), "
                       "or choose other GPUs by CUDA_VISIBLE_DEVICES")
    agree(store, rank, size, uuid, problem, timeout)
    return device


PCI = Path("/sys/bus/pci/devices")


def stay_beside(properties: Any, devices: Path = PCI) -> None:
    """Keep this process, the threads that it will start and, since pages come from where a thread runs, its
    memory on the processors that are next to its GPU; where the kernel does not tell, or a launcher has left
    none of them, it stays where it is.

    Args:
        properties: what torch says of the GPU.
        devices: the kernel's list of devices.
    """
    try:
        place = (f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:"
                 f"{properties.pci_device_id:02x}.0")
        text = (devices / place / "local_cpulist").read_text(encoding="ascii")
        spans = [[int(end) for end in span.split("-")] for span in text.strip().split(",") if span]
        near = {cpu for span in spans for cpu in range(span[0], span[-1] + 1)} & os.sched_getaffinity(0)
        if near:
            os.sched_setaffinity(0, near)
    except (OSError, ValueError, AttributeError):  # no such file, form, call on macOS, or place
        return


def agree(store: dist.Store, rank: int, size: int, uuid: str, problem: str,
          timeout: datetime.timedelta) -> None:
    """Raise `UserError` on every rank where something is wrong with the GPU of one, or two have the same.

    Args:
        store: the rendezvous.
        rank: of this process.
        size: number of ranks.
        uuid: of its GPU.
        problem: what is wrong with that; empty: nothing.
        timeout: how long to wait for the other ranks.
    """
    if uuid and store.add(f"gpu/{uuid}", 1) > 1:
        place = f"LOCAL_RANK = {os.environ.get('LOCAL_RANK', '0')}"
        problem = problem or (f"({uuid}) is another rank's as well: {place} of {torch.cuda.device_count()} "
                              "visible GPUs; start one process for each GPU, and let each see all of its "
                              "node or its own")
    if problem:
        store.set("gpu/problem", f"rank {rank}: its GPU {problem}")
    # the last rank to come says so: whoever is awake then has seen every problem that was set before
    if store.add("gpu/ranks", 1) == size:
        store.set("gpu/all", "seen")
    store.wait(["gpu/all"], timeout)
    if store.check(["gpu/problem"]):
        raise UserError(store.get("gpu/problem").decode())


# What Transformer Engine says of the GPU; asked here, where nothing imports megatron, which imports it too.

FP8_FUNCTIONS = {"tensorwise": "is_fp8_available", "blockwise": "is_fp8_block_scaling_available",
                 "mxfp8": "is_mxfp8_available", "nvfp4": "is_nvfp4_available"}
"""Recipe of `train.fp8` -> function of Transformer Engine that says whether this GPU has it, and why not."""


def lacking_fp8() -> dict[str, str]:
    """Return recipe -> why Transformer Engine does not have it on this process's GPU; empty: it has."""
    import transformer_engine.pytorch as te

    answers = {fp8: getattr(te, name)(return_reason=True) for fp8, name in FP8_FUNCTIONS.items()}
    return {fp8: "" if available else str(reason) for fp8, (available, reason) in answers.items()}


# DeepEP, whose kernels carry tokens to their experts.

DEEP_EP_NAMES = {"deepep": ("deep_ep.Buffer", "deep_ep.utils.EventHandle", "deep_ep.utils.EventOverlap"),
                 "hybridep": ("deep_ep.HybridEPBuffer",)}
"""`parallel.expert_dispatcher` -> what the library imports for it (`fused_a2a`), both versions."""


@functools.cache
def lacking_deep_ep(dispatcher: str) -> str:
    """Return why DeepEP does not serve a dispatcher here, in its own words; empty: it does."""
    for name in DEEP_EP_NAMES[dispatcher]:
        module, _, last = name.rpartition(".")
        try:
            getattr(importlib.import_module(module), last)
        except Exception as e:  # newer ones assert that NCCL's library is the one that they were built with
            return told_in_a_line(e)
    return ""


# The kernels of linear attention of flash-linear-attention, whose package is called fla-core.

FLA_KERNEL = ("fla.ops.kda", "chunk_kda")
"""Module and function."""
FLA_OLDEST = (0, 6)
"""First version whose calls are held against its source."""


@functools.cache
def lacking_fla() -> str:
    """Return why the kernel does not serve here, in its own words; empty: it does."""
    module, name = FLA_KERNEL
    try:
        getattr(importlib.import_module(module), name)
    except Exception as e:  # without a driver Triton ends with errors of its own
        return told_in_a_line(e)
    version = str(getattr(sys.modules["fla"], "__version__", "unknown"))
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or (int(found[1]), int(found[2])) < FLA_OLDEST:
        return f"version {version} is older than {'.'.join(map(str, FLA_OLDEST))}"
    return ""


def hide_broken_deep_ep() -> None:
    """Have the library import without a DeepEP that does not: it catches ImportError alone."""
    if importlib.util.find_spec("deep_ep") is None:
        return
    if lacking_deep_ep("deepep").partition(":")[0] not in (
            "", "ImportError", "ModuleNotFoundError", "AttributeError"):
        sys.modules["deep_ep"] = None  # type: ignore[assignment]
