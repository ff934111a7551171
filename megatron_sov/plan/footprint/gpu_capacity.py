"""Check that a run fits GPU and host memory (`memory.py`), and find the nearest fitting layout."""

import bisect
import dataclasses
import itertools
import math
import os
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

import psutil

from megatron_sov.base.errors import Fix, UserError
from megatron_sov.base.figures import format_memory
from megatron_sov.base.settings import format_change
from megatron_sov.model import recipes
from megatron_sov.model.config import ModelConfig, ParallelConfig, RunConfig
from megatron_sov.model.process_memory import MemoryEstimate, StatePlace
from megatron_sov.plan.footprint.activations import list_layer_kinds
from megatron_sov.plan.footprint.memory import MemoryAccount, build_account, get_largest_imbalance
from megatron_sov.plan.footprint.stage_parameters import list_chunk_layers
from megatron_sov.plan.footprint.states import StageBuffers, estimate_states
from megatron_sov.runs.gpu_driver import list_visible_gpus
from megatron_sov.runs.launch_environment import has_launcher, num_ranks
from megatron_sov.work.clusters.chips import Gpu
from megatron_sov.work.clusters.units import GIB

USABLE_SHARE = 0.95
"""Usable share of a GPU's memory: the CUDA context, kernel code and workspaces of cuBLAS, cuDNN and
Transformer Engine need the rest, 2 to 4 GiB of 79. Assumed; not measured."""
MAX_TP = 8
"""Largest proposed tensor parallel size: inside a node."""
TEACHERS = {"typhoon-s-8b-opd": "qwen3-30b-a3b-2507"}
"""Recipe -> its teacher's recipe (arXiv 2601.18129)."""
USABLE_HOST_SHARE = 0.9
"""Maximum pinned share of host memory; processes, data and the system need the rest. Assumed."""
SPILL_LIMITS = (1.2, 1.1)
"""Proposed `gpu.expert_spill`, the best first: with bias-balanced routers, few processes exceed 1.2 over
their layers after some hundred steps. Assumed."""
IMBALANCE_STEP = 0.05
"""Resolution of `find_imbalance_limit`."""
DRIVER_FILE = "/dev/nvidiactl"
"""NVIDIA's device file: a machine with the file has GPUs, even without `nvidia-smi`."""


def find_fullest_stage(config: RunConfig, num_ranks: int) -> tuple[int, MemoryAccount]:
    """Return the pipeline stage (0-based) with the fullest processes, and their `MemoryAccount`, at the
    longest samples.

    Rounds that learn distributions have a teacher on the same GPUs: the recipe's teacher, or one as large as
    the student.
    """
    longest = max(phase.seq_len for phase in config.data.phases)
    teacher = None
    if config.objective.name == "policy" and config.policy.learns_distributions:
        teacher_recipe = TEACHERS.get(config.recipe)
        teacher = recipes.get(teacher_recipe).model if teacher_recipe else config.model
    best: tuple[int, MemoryAccount] | None = None
    for stage in _list_distinct_stages(config):
        needs = build_account(config, num_ranks, stage, longest)
        if teacher is not None:
            states = estimate_states(dataclasses.replace(config, model=teacher), num_ranks, stage)
            needs = dataclasses.replace(needs, teacher=states.weights)
        if best is None or needs.total > best[1].total:
            best = stage, needs
    assert best is not None
    return best


def _list_distinct_stages(config: RunConfig) -> list[int]:
    """Return a stage (0-based) per kind: the first, which has the most pending micro-batches."""
    m, p = config.model, config.parallel
    layer_kinds = list_layer_kinds(m)
    stages: dict[tuple[object, ...], int] = {}
    for stage in range(p.pp):
        layers = list_chunk_layers(p, stage, m.num_layers)
        # `optim.groups` may name single layers, and under `train.fp8` the first and last layers use bf16.
        kinds = tuple(tuple(sorted(layer_kinds[layer] for layer in chunk)) for chunk in layers)
        edge = config.train.fp8 != "none" or config.optim.groups
        stages.setdefault((kinds, stage == 0, stage == p.pp - 1, stage if edge else None), stage)
    return list(stages.values())


def estimate_memory(config: RunConfig, num_ranks: int) -> MemoryEstimate:
    """Estimate the memory on a run's processes at the longest samples."""
    first = build_account(config, num_ranks, 0, max(phase.seq_len for phase in config.data.phases))
    gpus = list_visible_gpus() if config.parallel.ep > 1 else []
    limit = find_imbalance_limit(config, num_ranks, Gpu(gpus[0].name, gpus[0].memory_bytes)) if gpus else 0.0
    return MemoryEstimate(states=first.states, peak=first.total, on_host=first.on_host,
                          fullest=find_fullest_stage(config, num_ranks)[1].total, imbalance_limit=limit)


def get_usable_bytes(gpu: Gpu) -> int:
    return int(USABLE_SHARE * gpu.memory_bytes)


def can_run(config: RunConfig, num_ranks: int, limit_bytes: float) -> bool:
    """Return whether a run's settings are valid and its fullest process needs at most `limit_bytes`."""
    return not config.problems(num_ranks) and find_fullest_stage(config, num_ranks)[1].total <= limit_bytes


def find_imbalance_limit(config: RunConfig, num_ranks: int, gpu: Gpu) -> float:
    """Return the largest load of the busiest expert-parallel process, relative to the mean, that fits GPU
    memory; infinity if all tokens on a process fit, 0 if an even load does not."""
    largest = get_largest_imbalance(config)
    num_steps = math.ceil((largest - 1) / IMBALANCE_STEP)

    def is_too_large(step: int) -> bool:
        changed = _set_gpu(config, expert_imbalance=min(largest, 1 + IMBALANCE_STEP * step))
        return find_fullest_stage(changed, num_ranks)[1].total > get_usable_bytes(gpu)

    first = bisect.bisect_left(range(num_steps + 1), True, key=is_too_large)
    if first > num_steps:
        return math.inf
    return round(1 + IMBALANCE_STEP * (first - 1), 2) if first else 0.0


def format_imbalance_limit(config: RunConfig, limit: float) -> str:
    """Format the result of `find_imbalance_limit` as a clause."""
    spill = config.gpu.expert_spill
    rest = f", activations above {spill:g} times in host memory" if spill else ""
    load = "every token" if limit == math.inf else f"{limit:g} times the mean tokens"
    return f"GPU memory suffices for {load} on one of {config.parallel.ep} expert-parallel ranks{rest}"


def spill_experts(config: RunConfig, num_ranks: int, gpu: Gpu) -> str:
    """Return the `gpu.expert_spill` setting with which a run fits GPU memory, or ""."""
    if config.gpu.expert_spill or config.parallel.ep == 1:
        return ""
    for limit in SPILL_LIMITS:
        if can_run(_set_gpu(config, expert_spill=limit), num_ranks, get_usable_bytes(gpu)):
            return f"gpu.expert_spill={limit}"
    return ""


def refuse_too_large(config: RunConfig, num_ranks: int, gpu: Gpu) -> None:
    """Refuse a run that needs more than the usable GPU memory. Raises `UserError`: with needed and usable
    GiB, and the nearest layout that fits."""
    stage, needs = find_fullest_stage(config, num_ranks)
    if needs.total <= get_usable_bytes(gpu):
        return
    location = f" of pipeline stage {stage + 1}" if config.parallel.pp > 1 else ""
    if needs.imbalance and (limit := find_imbalance_limit(config, num_ranks, gpu)):
        location += f" at gpu.expert_imbalance = {config.gpu.expert_imbalance:g}, up to {limit:g} fits"
    fix, settings, name = None, [spill_experts(config, num_ranks, gpu)], "it fits with"
    advice = "no layout fits so many processes: use more GPUs, or a larger parallel.cp for long samples"
    if not settings[0]:
        nearest, name = find_nearest_layout(config, num_ranks, gpu), "the nearest layout that fits"
        settings = list_changed_settings(config.parallel, nearest) if nearest else []
    if settings:
        options = " ".join(f"--set {shlex.quote(setting)}" for setting in settings)
        advice = f"{name}: {options}"
        fix = Fix(options=tuple(word for setting in settings for word in ("--set", setting)))
    raise UserError(
        f"{config.recipe} on {num_ranks} processes: {config.parallel.format_sizes()} needs "
        f"{needs.total / GIB:.1f} GiB on each process{location} ({_format_items(needs)}), and a run may take "
        f"{get_usable_bytes(gpu) / GIB:.1f} GiB of a {gpu.name} with "
        f"{gpu.memory_bytes / GIB:.1f} GiB; {advice}", fix)


def _format_items(needs: MemoryAccount) -> str:
    """Format an account's items in GiB."""
    states = {"weights": needs.weights, "quantised weights": needs.quantized_weights,
              "gradients": needs.gradients, "optimizer": needs.optimizer, "teacher": needs.teacher}
    items = {name: n for name, n in states.items() if n or name not in ("quantised weights", "teacher")}
    rest = {"activations": needs.allocated - sum(items.values()),
              "NCCL and gaps": needs.total - needs.allocated}
    return ", ".join(f"{name} {n / GIB:.1f}" for name, n in (items | rest).items())


def find_nearest_layout(config: RunConfig, num_ranks: int, gpu: Gpu) -> ParallelConfig | None:
    """Return the fitting layout with the fewest changes to `config.parallel`: ZeRO-1 is free; doubling `ep`,
    `pp` or `tp`, and dropping `pipeline_layout`, counts as one. Ties go to the layout with least memory."""
    p = config.parallel
    best: tuple[float, float, ParallelConfig] | None = None
    for candidate in _iter_candidates(config.model, p):
        steps = sum(abs(math.log2(getattr(candidate, n) / getattr(p, n))) for n in ("ep", "pp", "tp"))
        steps += candidate.pipeline_layout != p.pipeline_layout
        # Skip the slow account: a candidate with more changes cannot win.
        if best is not None and steps > best[0]:
            continue
        changed = dataclasses.replace(config, parallel=candidate)
        # The layout's rules first: they are cheap and exclude most candidates.
        if candidate.problems(config.model, num_ranks) or changed.problems(num_ranks):
            continue
        needs = find_fullest_stage(changed, num_ranks)[1].total
        if needs <= get_usable_bytes(gpu) and (best is None or (steps, needs) < best[:2]):
            best = (steps, needs, candidate)
    return best[2] if best else None


def list_changed_settings(before: ParallelConfig, after: ParallelConfig) -> list[str]:
    """Return the changes between two layouts, as --set takes them."""
    values = {f.name: getattr(after, f.name) for f in dataclasses.fields(after)}
    return [format_change(f"parallel.{name}", value) for name, value in values.items()
            if value != getattr(before, name)]


def _iter_candidates(model: ModelConfig, p: ParallelConfig) -> Iterator[ParallelConfig]:
    """Yield layouts with `zero1` and unchanged `cp` and `etp`, with `p.pipeline_layout` and equal stages."""
    experts = list_divisors(model.num_experts) if model.num_moe_layers() else [1]
    if p.pipeline_layout:
        for ep, tp in itertools.product(experts, list_divisors(MAX_TP)):
            yield dataclasses.replace(p, ep=ep, tp=tp, sp=tp > 1, zero1=True)
    for ep, pp, tp in itertools.product(experts, list_divisors(model.num_layers), list_divisors(MAX_TP)):
        vpp = p.vpp if pp > 1 and (model.num_layers // pp) % p.vpp == 0 else 1
        yield dataclasses.replace(p, ep=ep, pp=pp, tp=tp, sp=tp > 1, vpp=vpp, zero1=True, pipeline_layout=())


def list_divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def count_node_bytes(config: RunConfig, count: int, ranks: Sequence[int]) -> int:
    """Return the host bytes that `ranks` pin in a run on `count` processes."""
    # Processes on a stage pin about equal amounts.
    stage_bytes = [StageBuffers(config, count, stage).count_states(StatePlace()).on_host
                   for stage in range(config.parallel.pp)]
    return sum(stage_bytes[rank // (count // config.parallel.pp)] for rank in ranks)


def refuse_on_nodes(config: RunConfig, count: int, per_node: int, memory_bytes: int, gpu: Gpu | None) -> None:
    """Refuse a run that pins more host memory than a node has. Raises `UserError`: with needed and usable
    GiB, and the nearest share that fits."""
    if config.gpu.optimizer_offload:
        nodes = [range(first, min(first + per_node, count)) for first in range(0, count, per_node)]
        fullest = max(nodes, key=lambda ranks: count_node_bytes(config, count, ranks))
        _refuse_offload(config, count, ranks=fullest, memory_bytes=memory_bytes, has="has", gpu=gpu)


def refuse_on_this_node(config: RunConfig, nproc: int | None, gpu: Gpu | None) -> None:
    """Refuse a run that pins more host memory on this machine than is available (`refuse_on_nodes`). Call
    before a process pins memory."""
    if not config.gpu.optimizer_offload:
        return
    count = num_ranks(nproc)
    ranks = range(count)
    if has_launcher():
        first = int(os.environ.get("RANK", "0")) - int(os.environ.get("LOCAL_RANK", "0"))
        ranks = range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    _refuse_offload(config, count, ranks, psutil.virtual_memory().available, "has available", gpu)


def refuse_on_this_machine(config: RunConfig, nproc: int | None) -> None:
    """Refuse a run that does not fit this machine's visible GPUs, or, without GPUs and launcher, its host
    memory: then only the local processes' weights, gradients and optimizer states count. Under a launcher,
    the first process of each machine checks. Raises `UserError`: with needed and present memory."""
    if has_launcher() and os.environ.get("LOCAL_RANK", "0") != "0":
        return
    count = num_ranks(nproc)
    gpus = [Gpu(gpu.name, gpu.memory_bytes) for gpu in list_visible_gpus()[:count]]
    for gpu in dict.fromkeys(gpus):
        refuse_too_large(config, count, gpu)
    refuse_on_this_node(config, nproc, gpus[0] if gpus else None)
    if gpus or has_launcher() or os.path.exists(DRIVER_FILE):
        return
    pp, total_bytes = config.parallel.pp, psutil.virtual_memory().total
    longest = max(phase.seq_len for phase in config.data.phases)
    needs = sum(build_account(config, count, stage, longest).states for stage in range(pp)) * count // pp
    if needs > USABLE_HOST_SHARE * total_bytes:
        plural = "es" if count > 1 else ""
        raise UserError(
            f"{config.recipe} on {count} process{plural} of this machine, which has no GPU: weights, "
            f"gradients and optimizer take {format_memory(needs)}, and the machine has "
            f"{format_memory(total_bytes)}; take a smaller model (`megatron-sov recipes`), or a cluster: "
            "`megatron-sov plan --cluster h100` shows what it needs, `megatron-sov submit` checks its job",
            Fix(prefix="submit", options=("--cluster", "h100", "--account", "ACCOUNT", "--nodes", "1")))


def _refuse_offload(config: RunConfig, count: int, ranks: Sequence[int], memory_bytes: int, has: str,
                    gpu: Gpu | None) -> None:
    needs, usable = count_node_bytes(config, count, ranks), USABLE_HOST_SHARE * memory_bytes
    if needs <= usable:
        return
    share = config.gpu.optimizer_offload
    # In hundredths, then lower: each parameter moves to the host entirely or not.
    nearest = math.floor(100 * share * usable / needs) / 100
    changed = _set_gpu(config, optimizer_offload=nearest)
    while nearest > 0 and count_node_bytes(changed, count, ranks) > usable:
        nearest = round(nearest - 0.01, 2)
        changed = _set_gpu(config, optimizer_offload=nearest)
    advice = "no share fits both host and GPU: use more GPUs, or nodes with more memory"
    if gpu is None or find_fullest_stage(changed, count)[1].total <= get_usable_bytes(gpu):
        advice = f"the nearest share that fits: --set gpu.optimizer_offload={nearest:g}"
    raise UserError(f"gpu.optimizer_offload = {share:g} pins {needs / GIB:.1f} GiB of host memory for the "
                    f"{len(ranks)} processes of a node, and a run may take {usable / GIB:.1f} GiB of the "
                    f"{memory_bytes / GIB:.1f} GiB that it {has}; {advice}")


def _set_gpu(config: RunConfig, **values: Any) -> RunConfig:
    return dataclasses.replace(config, gpu=dataclasses.replace(config.gpu, **values))
