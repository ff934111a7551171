"""`megatron-sov doctor`: what works on this machine, what is missing, and the command that adds it.

One function per subject, each returning checks; nothing here changes anything.  Optional parts are looked for
in the way that tells the truth: Transformer Engine by importing it (its bare package installs without a GPU
and fails on import), apex by its files (a package of another kind bears the same name).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import psutil

from megatron_sov.base.artifacts import format_json
from megatron_sov.base.errors import ExitCode, UserError, format_error, format_install_command
from megatron_sov.base.settings import add_options, read_options
from megatron_sov.operate.contract import first_difference
from megatron_sov.sandbox.sandbox import machine_enclosure
from megatron_sov.version import OUR_PACKAGES
from megatron_sov.work.clusters.units import GIB

Status = Literal["ok", "missing", "warning", "broken"]

MIN_PYTHON = (3, 11)
MIN_FREE_DISK_BYTES = 5 * 10**9
MIN_FREE_MEMORY_BYTES = 4 * 10**9
REQUIRED_PACKAGES = ("numpy", "megatron-core", "transformers", "tokenizers", "safetensors", "pydantic",
                     "jinja2", "tqdm", "psutil", "tiktoken", "pyarrow", "blake3", "numba")
OPTIONAL_PACKAGES = {"tensorboard": "trackers", "wandb": "trackers", "math-verify": "rl",
                     "httpx": "judge", "aiohttp": "serve", "ray": "ray"}
CONTRACT_LIBRARIES = {"megatron.core": "megatron-core", "torch": "torch",
                      "transformer_engine": "transformer-engine", "vllm": "vllm"}
"""Package of `operate/contract.json` -> its distribution."""
TE_COMMAND = format_install_command("gpu",
                                    "--no-build-isolation") + " (needs a CUDA toolchain, see docs/install.md)"
DEEP_EP_REMEDY = ("build the commit that containers/install.sh names: DEEPEP_ARCH=10.0 sh "
                  "containers/install.sh")
ENCLOSED_BY = {"namespaces": "programs have processes, files and a network of their own",
               "landlock": "programs are kept to their folder and away from the network by Landlock and a "
                           "filter of system calls; namespaces, which hold better, are not allowed"}
_COMMAND_TIMEOUT_S = 60


@dataclass(frozen=True)
class MachineCheck:
    """What was found about one subject."""

    name: str
    """The subject."""
    status: Status
    """ok: works; missing: an optional part is not there; warning: works, but look at it; broken:
    needed and does not work."""
    detail: str
    """What was found."""
    remedy: str = ""
    """What adds or mends it; empty where there is nothing to do."""


def run_checks() -> list[MachineCheck]:
    """Look at everything, in the order in which it is read: what is needed first,
    then accelerators, cluster, machine."""
    groups = (iter_python_checks, iter_package_checks, iter_shadow_checks, iter_torch_checks,
              iter_transformer_engine_checks, iter_compiler_checks, iter_contract_checks,
              iter_quantization_checks, iter_deep_ep_checks, iter_linear_attention_checks,
              iter_optional_checks, iter_sandbox_checks, iter_slurm_checks, iter_resource_checks)
    return [check for group in groups for check in group()]


def iter_python_checks() -> Iterator[MachineCheck]:
    """The interpreter's version."""
    needed = ".".join(map(str, MIN_PYTHON))
    if sys.version_info >= MIN_PYTHON:
        yield MachineCheck("Python", "ok", platform.python_version())
    else:
        yield MachineCheck("Python", "broken", f"{platform.python_version()} is older than {needed}",
                           f"install Python {needed} or newer")


def installed_version(distribution: str) -> str | None:
    """Return the version of an installed distribution, or None; nothing is imported."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def iter_package_checks() -> Iterator[MachineCheck]:
    """The libraries that every path needs, by their metadata."""
    for name in REQUIRED_PACKAGES:
        version = installed_version(name)
        if version is None:
            yield MachineCheck(name, "broken", "is not installed", "make setup, or install the wheel again")
        else:
            yield MachineCheck(name, "ok", version)


def iter_shadow_checks() -> Iterator[MachineCheck]:
    """Foreign packages that install a top-level name of ours and would be imported,
    or overwrite it, in our place."""
    root = Path(__file__).parents[3]
    owners = importlib.metadata.packages_distributions()
    for name in OUR_PACKAGES:
        # found and not imported: a foreign package would run here
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).parent if spec and spec.origin else None
        foreign = sorted(set(owners.get(name, [])) - {"megatron-sov"})
        if found != root / name:
            # a folder on the path belongs to no distribution that pip could take away
            remedy = (f"pip uninstall {' '.join(foreign)}" if foreign
                      else "remove that folder from PYTHONPATH, or start elsewhere")
            yield MachineCheck(name, "broken", f"is imported from {found}, not from {root / name}", remedy)
        elif foreign:
            yield MachineCheck(name, "warning", f"{', '.join(foreign)} installs a package of the same name",
                               f"pip uninstall {' '.join(foreign)}, then make setup, or install the wheel "
                               "again")
        else:
            yield MachineCheck(name, "ok", "is ours")


def iter_torch_checks() -> Iterator[MachineCheck]:
    """PyTorch, its process groups, and the GPUs it sees."""
    try:
        import torch
        import torch.distributed as dist
    except Exception as e:  # a broken CUDA library raises OSError, a broken build RuntimeError
        yield MachineCheck("torch", "broken", f"cannot be imported ({type(e).__name__}: {e})",
                           "make setup, or pip install torch again")
        return
    yield MachineCheck("torch", "ok", f"{torch.__version__}, " + (f"CUDA {torch.version.cuda}"
                                                                  if torch.version.cuda
                                                                  else "CPU build"))
    if dist.is_available() and dist.is_gloo_available():
        yield MachineCheck("gloo", "ok", "processes on CPUs can talk to each other")
    else:
        yield MachineCheck("gloo", "broken", "this torch has no gloo process group",
                           "pip install the torch of constraints.txt")
    if not torch.cuda.is_available():
        why = "no usable NVIDIA driver or device" if torch.version.cuda else "torch is a CPU build"
        yield MachineCheck("GPU", "missing", f"{why}; training runs on the CPU",
                           "" if torch.version.cuda else "on a machine with an NVIDIA GPU: "
                                                         "install torch from the default index")
        return
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        memory_gib = gpu.total_memory / GIB
        yield MachineCheck(f"GPU {i}", "ok",
                           f"{gpu.name}, {memory_gib:.0f} GiB, compute capability {gpu.major}.{gpu.minor}")
    if dist.is_nccl_available():
        yield MachineCheck("NCCL", "ok", ".".join(map(str, torch.cuda.nccl.version())))
    else:
        yield MachineCheck("NCCL", "broken", "this torch has no NCCL, which GPUs need",
                           "pip install torch from the default index")


def _cudnn(version: int) -> str:
    """Return a version of cuDNN, which torch counts as major * 10,000 + minor * 100 + patch."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def iter_transformer_engine_checks() -> Iterator[MachineCheck]:
    """Transformer Engine, by importing it; a machine with GPUs cannot train in bf16 without."""
    gpu = _has_gpu()
    if importlib.util.find_spec("transformer_engine") is None:
        yield MachineCheck("Transformer Engine", "broken" if gpu else "missing",
                           "is not installed; fused GPU kernels need it"
                           + (", and so does train.precision=bf16 on the GPUs here" if gpu else ""),
                           TE_COMMAND)
        return
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as e:  # it raises RuntimeError, OSError or ImportError, depending on what is missing
        first_line = (str(e).splitlines() or ["no message"])[0]
        yield MachineCheck("Transformer Engine", "broken" if gpu else "warning",
                           f"is installed but does not import ({type(e).__name__}: {first_line})", TE_COMMAND)
        return
    if gpu and (found := _other_cudnn()):
        yield MachineCheck("Transformer Engine", "warning", found, 'export CUDNN_HOME="$(python -c \'import '
                           'nvidia.cudnn as n; print(n.__path__[0])\')" for all processes: torch\'s own')
        return
    yield MachineCheck("Transformer Engine", "ok", installed_version("transformer-engine") or "imports")


def iter_compiler_checks() -> Iterator[MachineCheck]:
    """The C++ compiler and ninja, which recomputing norms and expert activations on GPUs needs."""
    from megatron_sov.engine.parallel.storage_extension import TOOLS_COMMAND, find_missing_tools

    if missing := find_missing_tools():
        yield MachineCheck("C++ compiler", "warning" if _has_gpu() else "missing",
                           f"no {' and no '.join(missing)} in PATH; gpu.recompute_modules = layernorm or "
                           "moe_act needs a C++ compiler and ninja", TOOLS_COMMAND)
    else:
        yield MachineCheck("C++ compiler", "ok", "with ninja")


def iter_contract_checks() -> Iterator[MachineCheck]:
    """Signatures that this project calls, in the sources of each library that is installed."""
    checked = []
    for package, distribution in CONTRACT_LIBRARIES.items():
        version = installed_version(distribution)
        if version is None:
            continue
        remedy = (TE_COMMAND if package == "transformer_engine"
                  else f"pip install the {distribution} of constraints.txt")
        try:
            wanted, difference = first_difference(package)
        except (OSError, SyntaxError, ValueError, RecursionError) as e:
            yield MachineCheck("signatures", "warning", f"the sources of {distribution} cannot be read "
                               f"({format_error(e)}), so they are not compared with the version that this "
                               "project was read against", remedy)
            continue
        if difference:
            yield MachineCheck("signatures", "warning", f"{distribution} {version} differs from {wanted}, "
                               f"against which this project was read: {difference}", remedy)
            continue
        checked.append(distribution)
    if checked:
        yield MachineCheck("signatures", "ok", f"{', '.join(checked)}: as this project calls them")


def _other_cudnn() -> str:
    """Return what is wrong where Transformer Engine has loaded another cuDNN than torch, as it does where the
    system has one too; empty: nothing."""
    import torch
    import transformer_engine.pytorch as te

    theirs, ours = ".".join(map(str, te.get_cudnn_version())), torch.backends.cudnn.version()
    if ours is None or _cudnn(ours) == theirs:
        return ""
    return (f"has loaded cuDNN {theirs}, and torch {_cudnn(ours)}: parts of the one do not load with the "
            "other, and Transformer Engine has no fused attention then (gpu.attention)")


def iter_quantization_checks() -> Iterator[MachineCheck]:
    """The recipes of `train.fp8` that the first GPU can take, by Transformer Engine's own answer."""
    if not _has_gpu():
        yield MachineCheck("train.fp8", "missing", "none of its recipes: there is no GPU here")
        return
    from megatron_sov.engine.parallel.device import find_fp8_problems

    try:
        reasons = find_fp8_problems()
    except Exception:  # transformer_engine_checks says what is wrong with it, and how to mend that
        yield MachineCheck("train.fp8", "missing", "none of its recipes: Transformer Engine does not work")
        return
    yield MachineCheck("train.fp8", "missing" if all(reasons.values()) else "ok", _there_and_not(reasons))


def _there_and_not(reasons: dict[str, str]) -> str:
    """Return in words which of several are there, and which are not, and why; empty reasons: it is."""
    there = ", ".join(name for name, why in reasons.items() if not why)
    return "; ".join(filter(None, [there, *(f"not {name} ({why})" for name, why in reasons.items() if why)]))


def _absent(name: str, module: str, remedy: str) -> MachineCheck | None:
    """Return what to say of a library for GPUs that is not installed, or that serves nothing here; None: it
    is to be tried."""
    if importlib.util.find_spec(module) is None:
        return MachineCheck(name, "missing", "is not installed; optional", remedy)
    if not _has_gpu():
        return MachineCheck(name, "missing", "is installed, and serves on GPUs alone; there is none here")
    return None


def iter_deep_ep_checks() -> Iterator[MachineCheck]:
    """DeepEP, which `parallel.expert_dispatcher` may name, by importing what the library does."""
    if absent := _absent("DeepEP", "deep_ep", DEEP_EP_REMEDY):
        yield absent
        return
    from megatron_sov.engine.parallel.device import DEEP_EP_NAMES, find_deep_ep_problem

    reasons = {dispatcher: find_deep_ep_problem(dispatcher) for dispatcher in DEEP_EP_NAMES}
    yield MachineCheck("DeepEP", "warning" if all(reasons.values()) else "ok", _there_and_not(reasons),
                       DEEP_EP_REMEDY if any(reasons.values()) else "")


def iter_linear_attention_checks() -> Iterator[MachineCheck]:
    """flash-linear-attention, which `gpu.linear_attention` may name, by importing its kernels."""
    name, remedy = "flash-linear-attention", "pip install fla-core==0.6.0, for models with linear attention"
    if absent := _absent(name, "fla", remedy):
        yield absent
        return
    from megatron_sov.engine.parallel.device import find_fla_problem

    reason = find_fla_problem()
    yield MachineCheck(name, "warning" if reason else "ok", _there_and_not({"Kimi Delta Attention": reason}),
                       remedy if reason else "")


def _has_gpu() -> bool:
    """Return whether torch sees a GPU; False where it does not import, which has a check of its own."""
    try:
        import torch
    except Exception:
        return False
    return torch.cuda.is_available()


def iter_optional_checks() -> Iterator[MachineCheck]:
    """Trackers and rollout engines, by their metadata."""
    for name, extra in OPTIONAL_PACKAGES.items():
        version = installed_version(name)
        if version is None:
            yield MachineCheck(name, "missing", "is not installed; optional", format_install_command(extra))
        else:
            yield MachineCheck(name, "ok", version)


def iter_sandbox_checks() -> Iterator[MachineCheck]:
    """What encloses the programs of a model, by enclosing one."""
    try:
        found = machine_enclosure()
    except UserError as e:
        reasons = "; ".join(line.strip() for line in str(e).splitlines()[1:])
        yield MachineCheck("Sandbox", "missing",
                           "this machine cannot enclose a program, which the reward code "
                           f"needs: {reasons}",
                           "allow user namespaces, or set a command that encloses (docs/sandbox.md)")
    else:
        yield MachineCheck("Sandbox", "ok", f"{found}: {ENCLOSED_BY[found]}")


def first_line_of(command: list[str]) -> str | None:
    """Return the first line that a program prints, or None where it is missing, fails or hangs."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.splitlines()
    return lines[0].strip() if lines else None


def iter_slurm_checks() -> Iterator[MachineCheck]:
    """The scheduler's client."""
    version = first_line_of(["sbatch", "--version"])
    if version is None:
        yield MachineCheck("Slurm", "missing",
                           "sbatch is not on PATH or does not answer; jobs run on this machine only",
                           "run on a login node of the cluster, or load its Slurm module")
    else:
        yield MachineCheck("Slurm", "ok", version)


def iter_resource_checks() -> Iterator[MachineCheck]:
    """Cores, memory and disk, as this process may use them."""
    # the cores that this process may use: Slurm and containers give fewer than there are
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield MachineCheck("CPU cores", "ok", str(cores))
    free_memory_bytes = psutil.virtual_memory().available
    yield _room("Memory", free_memory_bytes, MIN_FREE_MEMORY_BYTES,
                "close other programs, or use a smaller micro-batch")
    free_disk_bytes = shutil.disk_usage(Path.cwd()).free
    yield _room("Disk", free_disk_bytes, MIN_FREE_DISK_BYTES, f"free some space on the disk of {Path.cwd()}")


def _room(name: str, free_bytes: int, wanted_bytes: int, remedy: str) -> MachineCheck:
    detail = f"{free_bytes / 1e9:.1f} GB free"
    if free_bytes >= wanted_bytes:
        return MachineCheck(name, "ok", detail)
    return MachineCheck(name, "warning",
                        f"{detail}, less than the {wanted_bytes / 1e9:.0f} GB that the demo wants", remedy)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Show what this machine has, and what is missing."""

    json: bool = False
    """Print the checks as JSON."""


add_arguments = partial(add_options, cls=DoctorOptions)


def run(typed: argparse.Namespace) -> int:
    """Print every check; return 0 when training on this machine's CPU works,
    2 when something it needs is broken."""
    args = read_options(DoctorOptions, typed)
    checks = run_checks()
    works = not any(check.status == "broken" for check in checks)
    if args.json:
        print(format_json({"works": works, "checks": [dataclasses.asdict(check) for check in checks]}),
              end="")
    else:
        print(format_checks(checks))
        print("\nThis machine can train." if works
              else "\nThis machine cannot train yet: mend what is broken above.")
    return ExitCode.OK if works else ExitCode.USER_ERROR


def format_checks(checks: list[MachineCheck]) -> str:
    """Return one line per check, and a line with the remedy under it where there is one."""
    name_width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.status:<8} {check.name:<{name_width}}  {check.detail}")
        if check.remedy:
            lines.append(f"{'':<8} {'':<{name_width}}  -> {check.remedy}")
    return "\n".join(lines)
