"""Checks for `megatron-sov doctor` that need `megatron_sov.engine`, and therefore a working torch."""

import importlib.util
from collections.abc import Iterator

from megatron_sov.commands.operate.doctor.checks import MachineCheck, has_gpu
from megatron_sov.engine.parallel.gpu_libraries import (
    DEEP_EP_NAMES, find_deep_ep_problem, find_fla_problem, find_fp8_problems)
from megatron_sov.engine.parallel.storage_extension import TOOLS_COMMAND, find_missing_tools

DEEP_EP_REMEDY = ("build the commit that containers/install.sh names: DEEPEP_ARCH=10.0 sh "
                  "containers/install.sh")
PORTABLE = ("alltoall", "allgather")
"""Values of `parallel.expert_dispatcher` that need no kernels."""
FLA_REMEDY = "pip install fla-core==0.6.0, for models with linear attention"


def iter_engine_checks() -> Iterator[MachineCheck]:
    for group in (iter_compiler_checks, iter_quantization_checks, iter_deep_ep_checks, iter_profile_checks,
                  iter_linear_attention_checks):
        yield from group()


def iter_compiler_checks() -> Iterator[MachineCheck]:
    """Check the C++ compiler and ninja, which compile the extension for recomputed norms and experts."""
    if missing := find_missing_tools():
        yield MachineCheck("C++ compiler", "warning" if has_gpu() else "missing",
                           f"no {' and no '.join(missing)} in PATH; gpu.recompute_modules = layernorm or "
                           "moe_act needs a C++ compiler and ninja", TOOLS_COMMAND)
    else:
        yield MachineCheck("C++ compiler", "ok", "with ninja")


def iter_quantization_checks() -> Iterator[MachineCheck]:
    """List the `train.fp8` values that Transformer Engine supports on the first GPU."""
    if not has_gpu():
        yield MachineCheck("train.fp8", "missing", "no recipe works: this machine has no GPU")
        return
    try:
        reasons = find_fp8_problems()
    except Exception:  # reported by `iter_transformer_engine_checks`
        yield MachineCheck("train.fp8", "missing", "no recipe works: Transformer Engine does not work")
        return
    yield MachineCheck("train.fp8", "missing" if all(reasons.values()) else "ok", _format_reasons(reasons))


def iter_deep_ep_checks() -> Iterator[MachineCheck]:
    """Check the `parallel.expert_dispatcher` values that need DeepEP."""
    if absence := _check_presence("DeepEP", "deep_ep", DEEP_EP_REMEDY):
        yield absence
        return
    reasons = {dispatcher: find_deep_ep_problem(dispatcher) for dispatcher in DEEP_EP_NAMES}
    yield MachineCheck("DeepEP", "warning" if all(reasons.values()) else "ok", _format_reasons(reasons),
                       DEEP_EP_REMEDY if any(reasons.values()) else "")


def iter_profile_checks() -> Iterator[MachineCheck]:
    """Print the line of a cluster profile with the dispatchers that import here."""
    if not has_gpu():
        yield MachineCheck("cluster profile", "missing", "its dispatchers are those of a GPU node",
                           "run `megatron-sov doctor` there, in the job's Python")
        return
    is_installed = importlib.util.find_spec("deep_ep") is not None
    kernels = [name for name in DEEP_EP_NAMES if is_installed and not find_deep_ep_problem(name)]
    yield MachineCheck("cluster profile", "ok", f"dispatchers: [{', '.join([*PORTABLE, *kernels])}]",
                       "cuda_graphs: [moe_router] after a run with graphs (docs/gpu.md)")


def iter_linear_attention_checks() -> Iterator[MachineCheck]:
    """Check flash-linear-attention, a value of `gpu.linear_attention`, by importing its kernels."""
    name = "flash-linear-attention"
    if absence := _check_presence(name, "fla", FLA_REMEDY):
        yield absence
        return
    reason = find_fla_problem()
    yield MachineCheck(name, "warning" if reason else "ok", _format_reasons({"Kimi Delta Attention": reason}),
                       FLA_REMEDY if reason else "")


def _check_presence(name: str, module: str, remedy: str) -> MachineCheck | None:
    """Return a check for a missing GPU library, or for a machine without a GPU; None: try the library."""
    if importlib.util.find_spec(module) is None:
        return MachineCheck(name, "missing", "is not installed; optional", remedy)
    if not has_gpu():
        return MachineCheck(name, "missing", "is installed, but needs a GPU, which this machine lacks")
    return None


def _format_reasons(reasons: dict[str, str]) -> str:
    """Format working names, then unusable names with their `reasons` ("": works): "a, b; not c (reason)"."""
    working = ", ".join(name for name, reason in reasons.items() if not reason)
    unusable = [f"not {name} ({reason})" for name, reason in reasons.items() if reason]
    return "; ".join(filter(None, [working, *unusable]))
