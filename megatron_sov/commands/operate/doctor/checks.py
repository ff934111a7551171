"""Checks for `megatron-sov doctor`: a generator per subject. They change nothing on the machine.

Transformer Engine is imported, not just looked up: without GPU libraries its package installs, but then fails
to import.
"""

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
from pathlib import Path
from typing import Any, Literal

import psutil

from megatron_sov.base.artifacts import format_json
from megatron_sov.base.command_line import import_reference
from megatron_sov.base.errors import ExitCode, UserError, format_error, format_install_command
from megatron_sov.commands.operate.doctor.doctor import DoctorOptions
from megatron_sov.operate.contract import find_first_difference
from megatron_sov.sandbox.sandbox import detect_enclosure
from megatron_sov.version import OUR_PACKAGES
from megatron_sov.work.clusters.units import GIB

Status = Literal["ok", "missing", "warning", "broken"]

MIN_PYTHON = (3, 11)
MIN_FREE_DISK_BYTES = 5 * 10**9
MIN_FREE_MEMORY_BYTES = 4 * 10**9
REQUIRED_PACKAGES = ("numpy", "megatron-core", "transformers", "tokenizers", "safetensors", "pydantic",
                     "jinja2", "tqdm", "psutil", "tiktoken", "pyarrow", "blake3", "numba")
# distribution -> our extra that installs it
OPTIONAL_PACKAGES = {"tensorboard": "trackers", "wandb": "trackers", "math-verify": "rl",
                     "httpx": "judge", "aiohttp": "serve", "ray": "ray"}
CONTRACT_LIBRARIES = {"megatron.core": "megatron-core", "torch": "torch",
                      "transformer_engine": "transformer-engine", "vllm": "vllm"}
"""Package in `operate/contract.json` -> distribution."""
TE_COMMAND = format_install_command("gpu",
                                    "--no-build-isolation") + " (needs a CUDA toolchain, see docs/install.md)"
# sandbox method -> sentence about what it isolates
ENCLOSED_BY = {"namespaces": "programs have processes, files and a network of their own",
               "landlock": "Landlock and a system-call filter confine programs to their folder and block the "
                           "network; namespaces, which isolate better, are not allowed"}
_COMMAND_TIMEOUT_S = 60
ENGINE_CHECKS = "megatron_sov.commands.operate.doctor.gpu_checks:iter_engine_checks"


@dataclass(frozen=True)
class MachineCheck:
    """Result of a check."""

    name: str
    status: Status
    """ok: works; missing: optional and absent; warning: works, with a problem; broken: required, unusable."""
    detail: str
    remedy: str = ""
    """Command or action that installs or repairs the part; "": none needed."""


def show_checks(options: DoctorOptions) -> int:
    """Run and print all checks; return `ExitCode.USER_ERROR` if a required part is broken."""
    checks = run_checks()
    works = not any(check.status == "broken" for check in checks)
    if options.json:
        print(format_json({"works": works, "checks": [dataclasses.asdict(check) for check in checks]}),
              end="")
    else:
        print(format_checks(checks))
        print("\nThis machine can train." if works
              else "\nThis machine cannot train yet: repair the parts marked broken.")
    return ExitCode.OK if works else ExitCode.USER_ERROR


def run_checks() -> list[MachineCheck]:
    """Run the checks in display order: required parts, then accelerators, cluster and machine."""
    checks = [*iter_python_checks(), *iter_package_checks(), *iter_shadow_checks(), *iter_torch_checks(),
              *iter_transformer_engine_checks(), *iter_contract_checks()]
    # the engine checks import torch and megatron-core; a missing torch is already reported above
    if _import_torch() is not None:
        try:
            iter_engine_checks = import_reference(ENGINE_CHECKS)
        except Exception as e:
            checks.append(MachineCheck("megatron.core", "broken", f"cannot be imported ({format_error(e)})",
                                       "make setup, or pip install megatron-core again"))
        else:
            checks += iter_engine_checks()
    return [*checks, *iter_optional_checks(), *iter_sandbox_checks(), *iter_slurm_checks(),
            *iter_resource_checks()]


def iter_python_checks() -> Iterator[MachineCheck]:
    needed = ".".join(map(str, MIN_PYTHON))
    if sys.version_info >= MIN_PYTHON:
        yield MachineCheck("Python", "ok", platform.python_version())
    else:
        yield MachineCheck("Python", "broken", f"{platform.python_version()} is older than {needed}",
                           f"install Python {needed} or newer")


def installed_version(distribution: str) -> str | None:
    """Return the version from a distribution's metadata, without an import; None: not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def iter_package_checks() -> Iterator[MachineCheck]:
    """Check `REQUIRED_PACKAGES` by their metadata."""
    for name in REQUIRED_PACKAGES:
        version = installed_version(name)
        if version is None:
            yield MachineCheck(name, "broken", "is not installed", "make setup, or install the wheel again")
        else:
            yield MachineCheck(name, "ok", version)


def iter_shadow_checks() -> Iterator[MachineCheck]:
    """Find foreign packages that install a top-level name from `OUR_PACKAGES` and shadow or overwrite it."""
    root = Path(__file__).parents[4]
    owners = importlib.metadata.packages_distributions()
    for name in OUR_PACKAGES:
        # `find_spec`, not an import: an import would run the code of a foreign package
        spec = importlib.util.find_spec(name)
        location = Path(spec.origin).parent if spec and spec.origin else None
        foreign = sorted(set(owners.get(name, [])) - {"megatron-sov"})
        if location != root / name:
            # pip cannot uninstall a plain folder of PYTHONPATH
            remedy = (f"pip uninstall {' '.join(foreign)}" if foreign
                      else "remove that folder from PYTHONPATH, or start in another folder")
            yield MachineCheck(name, "broken", f"is imported from {location}, not from {root / name}", remedy)
        elif foreign:
            yield MachineCheck(name, "warning", f"{', '.join(foreign)} installs a package of the same name",
                               f"pip uninstall {' '.join(foreign)}, then make setup, or install the wheel "
                               "again")
        else:
            yield MachineCheck(name, "ok", "is ours")


def iter_torch_checks() -> Iterator[MachineCheck]:
    """Check torch, its process groups and its GPUs."""
    try:
        torch: Any = importlib.import_module("torch")
    except Exception as e:  # a broken CUDA library raises OSError, a broken build RuntimeError
        yield MachineCheck("torch", "broken", f"cannot be imported ({type(e).__name__}: {e})",
                           "make setup, or pip install torch again")
        return
    dist = torch.distributed
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    yield MachineCheck("torch", "ok", f"{torch.__version__}, {build}")
    if dist.is_available() and dist.is_gloo_available():
        yield MachineCheck("gloo", "ok", "CPU processes can communicate")
    else:
        yield MachineCheck("gloo", "broken", "this torch has no gloo process group",
                           "pip install the torch of constraints.txt")
    if not torch.cuda.is_available():
        why, remedy = "no usable NVIDIA driver or device", ""
        if not torch.version.cuda:
            why = "torch is a CPU build"
            remedy = "on a machine with an NVIDIA GPU: install torch from the default index"
        yield MachineCheck("GPU", "missing", f"{why}; training runs on the CPU", remedy)
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


def _format_cudnn_version(version: int) -> str:
    """Format torch's integer version of cuDNN: major * 10,000 + minor * 100 + patch."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def iter_transformer_engine_checks() -> Iterator[MachineCheck]:
    """Import Transformer Engine, which GPUs need for `train.precision = bf16`."""
    gpu = has_gpu()
    if importlib.util.find_spec("transformer_engine") is None:
        yield MachineCheck("Transformer Engine", "broken" if gpu else "missing",
                           "is not installed; fused GPU kernels need it"
                           + (", and so does train.precision=bf16 on the GPUs here" if gpu else ""),
                           TE_COMMAND)
        return
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as e:  # RuntimeError, OSError or ImportError, depending on the missing library
        first_line = (str(e).splitlines() or ["no message"])[0]
        yield MachineCheck("Transformer Engine", "broken" if gpu else "warning",
                           f"is installed but does not import ({type(e).__name__}: {first_line})", TE_COMMAND)
        return
    if gpu and (mismatch := _describe_cudnn_mismatch()):
        yield MachineCheck("Transformer Engine", "warning", mismatch,
                           'export CUDNN_HOME="$(python -c \'import nvidia.cudnn as n; '
                           'print(n.__path__[0])\')" for all processes: torch\'s own')
        return
    yield MachineCheck("Transformer Engine", "ok", installed_version("transformer-engine") or "imports")


def iter_contract_checks() -> Iterator[MachineCheck]:
    """Compare the signatures in contract.json with the sources of the installed `CONTRACT_LIBRARIES`."""
    checked = []
    for package, distribution in CONTRACT_LIBRARIES.items():
        version = installed_version(distribution)
        if version is None:
            continue
        remedy = (TE_COMMAND if package == "transformer_engine"
                  else f"pip install the {distribution} of constraints.txt")
        try:
            supported_version, difference = find_first_difference(package)
        except (OSError, SyntaxError, ValueError, RecursionError) as e:
            yield MachineCheck("signatures", "warning", f"the sources of {distribution} cannot be read "
                               f"({format_error(e)}) and compared with the supported version", remedy)
            continue
        if difference:
            yield MachineCheck("signatures", "warning", f"{distribution} {version} differs from "
                               f"{supported_version}, which this project supports: {difference}", remedy)
            continue
        checked.append(distribution)
    if checked:
        yield MachineCheck("signatures", "ok", f"{', '.join(checked)}: the signatures match")


def _describe_cudnn_mismatch() -> str:
    """Describe a version mismatch between the cuDNN in Transformer Engine and in torch; "": none."""
    import transformer_engine.pytorch as te

    te_version = ".".join(map(str, te.get_cudnn_version()))
    torch_version = importlib.import_module("torch").backends.cudnn.version()
    if torch_version is None or _format_cudnn_version(torch_version) == te_version:
        return ""
    return (f"has loaded cuDNN {te_version}, and torch {_format_cudnn_version(torch_version)}: the versions "
            "are incompatible, so Transformer Engine has no fused attention (gpu.attention)")


def _import_torch() -> Any:
    """Return torch, or None if its import fails."""
    try:
        return importlib.import_module("torch")
    except Exception:
        return None


def has_gpu() -> bool:
    torch = _import_torch()
    return torch is not None and bool(torch.cuda.is_available())


def iter_optional_checks() -> Iterator[MachineCheck]:
    """Check `OPTIONAL_PACKAGES` by their metadata."""
    for name, extra in OPTIONAL_PACKAGES.items():
        version = installed_version(name)
        if version is None:
            yield MachineCheck(name, "missing", "is not installed; optional", format_install_command(extra))
        else:
            yield MachineCheck(name, "ok", version)


def iter_sandbox_checks() -> Iterator[MachineCheck]:
    """Check that a program can start in the sandbox."""
    try:
        enclosure = detect_enclosure()
    except UserError as e:
        reasons = "; ".join(line.strip() for line in str(e).splitlines()[1:])
        yield MachineCheck("Sandbox", "missing",
                           f"this machine cannot isolate a program, which the reward code needs: {reasons}",
                           "allow user namespaces, or set a sandbox command (docs/tools.md)")
    else:
        yield MachineCheck("Sandbox", "ok", f"{enclosure}: {ENCLOSED_BY[enclosure]}")


def _read_first_line(command: list[str]) -> str | None:
    """Return the first line in a program's output; None: a missing, failed or hung program."""
    if shutil.which(command[0]) is None:
        return None
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S,
                                check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = result.stdout.splitlines()
    return lines[0].strip() if lines else None


def iter_slurm_checks() -> Iterator[MachineCheck]:
    version = _read_first_line(["sbatch", "--version"])
    if version is None:
        yield MachineCheck("Slurm", "missing",
                           "sbatch is not on PATH or does not answer; jobs run on this machine only",
                           "run on a login node of the cluster, or load its Slurm module")
    else:
        yield MachineCheck("Slurm", "ok", version)


def iter_resource_checks() -> Iterator[MachineCheck]:
    """Check cores, memory and disk space for this process."""
    # Slurm and containers allow fewer cores than the machine has
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield MachineCheck("CPU cores", "ok", str(cores))
    free_memory_bytes = psutil.virtual_memory().available
    yield _check_free_space("Memory", free_memory_bytes, MIN_FREE_MEMORY_BYTES,
                "close other programs, or use a smaller micro-batch")
    free_disk_bytes = shutil.disk_usage(Path.cwd()).free
    yield _check_free_space("Disk", free_disk_bytes, MIN_FREE_DISK_BYTES,
                            f"free some space on the disk of {Path.cwd()}")


def _check_free_space(name: str, free_bytes: int, wanted_bytes: int, remedy: str) -> MachineCheck:
    detail = f"{free_bytes / 1e9:.1f} GB free"
    if free_bytes >= wanted_bytes:
        return MachineCheck(name, "ok", detail)
    return MachineCheck(name, "warning",
                        f"{detail}, less than the {wanted_bytes / 1e9:.0f} GB that the demo needs", remedy)


def format_checks(checks: list[MachineCheck]) -> str:
    """Format a line per check, and its remedy on the next line."""
    name_width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.status:<8} {check.name:<{name_width}}  {check.detail}")
        if check.remedy:
            lines.append(f"{'':<8} {'':<{name_width}}  -> {check.remedy}")
    return "\n".join(lines)
