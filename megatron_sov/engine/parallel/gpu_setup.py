"""Set up this process for its GPU before CUDA and NCCL start: environment variables, deterministic
algorithms, and the choice of the GPU.

Ranks exchange problems through the rendezvous store: NCCL would only wait for a rank that has failed."""

import datetime
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_sov.base.errors import UserError, first_error_line
from megatron_sov.model.config import RunConfig
from megatron_sov.runs.gpu_driver import list_visible_gpus
from megatron_sov.runs.launch_environment import local_gpu_index
from megatron_sov.work.clusters.units import GIB

DETERMINISM_VARIABLES = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NCCL_ALGO": ("Ring", "Tree", "CollnetDirect", "CollnetChain", "^NVLS"),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",)}
"""Environment variable -> values with deterministic results; the first is the default.

Sources: the reproducibility section of cuBLAS; the list that Megatron-LM accepts for `--deterministic-mode`
(NVLS sums inside switches, in no fixed order); Transformer Engine's variable for fused attention."""
MAX_CONNECTIONS_VARIABLE = "CUDA_DEVICE_MAX_CONNECTIONS"
"""Variable with the number of hardware queues for kernels."""
BLACKWELL_NAMES = ("B200", "B300")
"""Parts of the driver's names for Blackwell GPUs."""
PCI_DEVICES = Path("/sys/bus/pci/devices")
"""The kernel's folder of PCI devices."""
_variables: dict[str, str] = {}
"""Variables set by `set_run_variables` for the current run."""


def enable_determinism() -> None:
    """Make torch, cuBLAS, cuDNN, NCCL and Transformer Engine choose deterministic algorithms.

    Operations without a deterministic algorithm raise an error. The model's part is Megatron-Core's
    `deterministic_mode`, set by `model/specs.py`. Raises `UserError`: an environment variable has a
    conflicting value."""
    for name, allowed in DETERMINISM_VARIABLES.items():
        value = os.environ.setdefault(name, allowed[0])
        if value not in allowed:
            raise UserError(f"train.deterministic = True: the environment has {name}={value}, "
                            f"with which results do not repeat; unset it or use {' or '.join(allowed)}")
    # a process that is already deterministic may start another run
    if torch.cuda.is_initialized() and not torch.are_deterministic_algorithms_enabled():
        raise RuntimeError("CUDA has started before enable_determinism()")
    torch.use_deterministic_algorithms(True)
    # filling uninitialized memory would cost time for every activation
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def build_run_variables(config: RunConfig, gpu_name: str) -> dict[str, str]:
    """Return environment variables for a run, after NVIDIA's recipes for mixture-of-experts models
    (Megatron-Bridge 26.08, `perf_recipes`); `gpu_name` is the driver's name of the GPU."""
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


def set_run_variables(config: RunConfig) -> None:
    """Set the variables from `build_run_variables` that the environment lacks; call before CUDA starts.

    The user's environment takes precedence; values from an earlier run in this process are replaced. Raises
    `UserError`: the environment conflicts with a setting."""
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
    check_all_gpus(store, rank, size=size, uuid=uuid, problem=problem, timeout=timeout)
    return device


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
