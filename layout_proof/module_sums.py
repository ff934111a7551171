"""Layout-independent sums over module outputs and gradients, which show where two layouts differ first.

Each module has two sums per step, over all tokens, channels and micro-batches: of values and of squares. A
part of a step lasts from one hook to the next, for example `forward of MODULE`. Messages are recorded by
part.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import TransformerLayer

from layout_proof.simulated_messages import CallSite

Sums = tuple[float, float]
StepModule = tuple[int, str]  # (step, name of a module or part)
BEFORE_FORWARD = "before the first module"
AFTER_FORWARD, AFTER_BACKWARD = "forward behind ", "backward of "
"""Prefixes for step parts: a module has returned, or the gradient for a module's output has arrived."""
REDUCTION_GROUP = "DATA_PARALLEL"
"""Substring in the names of gradient reduction groups; reduction may overlap with the backward pass."""
_EXPERT = re.compile(r"\.local_experts\.\d+")
_PARTIAL = re.compile(r"\.mlp\.experts(\.local_experts\.\d+(\.linear_fc2)?)?$")
"""Expert modules whose output is partial under expert tensor parallelism."""
MAX_EXPERTS = 16  # maximum local experts per layer for sums per expert
_REPLICA_TOLERANCE = 1e-12
"""Relative tolerance: sums this close belong to replicas of a tensor; sums of two parts differ more."""


@dataclass
class ModuleSums:
    """A process's sums and messages."""

    group: tuple[int, ...]  # ranks in the tensor-parallel group
    expert_group: tuple[int, ...]  # ranks in the expert tensor-parallel group
    step: int = 1  # current step, set by the caller
    forward: dict[StepModule, Sums] = field(default_factory=dict)
    """(step, module) -> output sums, in the order of first calls."""
    backward: dict[StepModule, Sums] = field(default_factory=dict)
    """(step, module) -> sums over the gradients of the module's outputs, ordered by the last gradient's
    arrival: a module called twice, for example an embedding with MTP layers, is complete only after the
    last."""
    sent: dict[StepModule, dict[CallSite, None]] = field(default_factory=dict)
    """(step, part) -> call sites, in the order of their first messages."""
    part: str = "building"  # current part of the step

    def begin_step_part(self, part: str) -> None:
        self.part, key = part, (self.step, part)
        if part.startswith(AFTER_BACKWARD):
            self.sent[key] = self.sent.pop(key, {})  # same order as `backward`: by last gradient
        else:
            self.sent.setdefault(key, {})

    def begin_step(self, step: int) -> None:
        self.step = step
        self.begin_step_part(BEFORE_FORWARD)

    def record_message_site(self, site: CallSite) -> None:
        """Record a message's call site."""
        self.sent.setdefault((self.step, self.part), {})[site] = None


def observe_modules(chunks: Sequence[torch.nn.Module]) -> ModuleSums:
    """Register hooks on the model chunks, and return the record that they fill in passes with gradients."""
    sums = ModuleSums(_get_group_ranks(parallel_state.get_tensor_model_parallel_group()),
                      _get_group_ranks(parallel_state.get_expert_tensor_parallel_group()))
    for name, module in _iter_named_modules(chunks):
        module.register_forward_pre_hook(lambda *_, name=name: sums.begin_step_part(f"forward of {name}"))
        module.register_forward_hook(_RecordOutputHook(sums, name))
    return sums


def locate_difference(expected: ModuleSums, observed: Sequence[ModuleSums], step: int,
                      tolerance: float) -> tuple[list[str], list[str]]:
    """Find where a step of the ranks (`observed`) begins to differ from the reference (`expected`).

    Returns:
        First differing modules, as `forward of MODULE` and `backward of MODULE`; and sorted call sites of
        the messages between the last correct module and the first wrong one.
    """
    first_modules = {}
    for kind in ("forward", "backward"):
        sums_by_rank = [_select_step_sums(getattr(process, kind), step) for process in observed]
        first_modules[kind] = _find_first_difference(
            _select_step_sums(getattr(expected, kind), step), _merge_ranks(sums_by_rank, observed), tolerance)
    prefixes = {"forward": AFTER_FORWARD, "backward": AFTER_BACKWARD}
    first = next((prefixes[kind] + module for kind, module in first_modules.items() if module is not None),
                 "")
    sites = {str(site) for process in observed for site in _iter_messages_before(process, step, first)}
    wrong_modules = [f"{kind} of {module}" for kind, module in first_modules.items() if module is not None]
    return wrong_modules, sorted(sites)


def locate_first_step(expected: ModuleSums, sums_by_rank: Mapping[int, ModuleSums], num_steps: int,
                      differing_steps: Collection[int], tolerance: float) -> tuple[int, list[str], list[str]]:
    """Return the first step that is in `differing_steps` or has a wrong module (0: none), with its modules as
    `step N: forward of MODULE` and its call sites from `locate_difference`."""
    observed = [sums_by_rank[rank] for rank in sorted(sums_by_rank)]
    for step in range(1, num_steps + 1):
        modules, sites = locate_difference(expected, observed, step, tolerance)
        if modules or step in differing_steps:
            return step, [f"step {step}: {module}" for module in modules], sites
    return 0, [], []


def _iter_messages_before(process: ModuleSums, step: int, first: str) -> Iterator[CallSite]:
    """Yield a process's messages between the part before `first` and `first`, the first wrong part. "": all
    modules are correct, so losses or gradient reductions are wrong."""
    parts = [(part, sites) for (number, part), sites in process.sent.items() if number == step]
    names = [part for part, _ in parts]
    if first and first not in names:
        return  # another pipeline stage
    end = names.index(first) if first else len(names)
    checked_prefixes = (AFTER_FORWARD, AFTER_BACKWARD) if first else (AFTER_BACKWARD,)
    start = max((i for i, name in enumerate(names[:end]) if name.startswith(checked_prefixes)), default=0)
    if first.startswith(AFTER_BACKWARD):
        forward_part = AFTER_FORWARD + first.removeprefix(AFTER_BACKWARD)
        if forward_part in names:
            # A message at the first use of the module's output may be wrong only in its gradient.
            first_use = names.index(forward_part)
            stop = next((i for i in range(first_use + 1, len(names)) if names[i].startswith(AFTER_FORWARD)),
                        first_use + 1)
            yield from (site for _, sites in parts[first_use:stop] for site in sites)
        if not names[start].startswith(AFTER_BACKWARD):
            yield from dict(parts).get(BEFORE_FORWARD, {})  # the divisor of the loss may be wrong
    if not first:
        yield from (site for _, sites in parts[:start] for site in sites if REDUCTION_GROUP in site.group)
    # a missing reduction looks like a split tensor until it is used: name the last message
    while start > 0 and not any(sites for _, sites in parts[start:end]):
        start -= 1
    for _, sites in parts[start:end]:
        yield from sites


def _select_step_sums(sums: Mapping[StepModule, Sums], step: int) -> dict[str, Sums]:
    return {name: value for (number, name), value in sums.items() if number == step}


def _merge_ranks(sums_by_rank: Sequence[Mapping[str, Sums]], observed: Sequence[ModuleSums]
                 ) -> dict[str, Sums]:
    """Add up the processes' sums, counting replicas once."""
    merged: dict[str, Sums] = {}
    for name in dict.fromkeys(name for rank_sums in sums_by_rank for name in rank_sums):
        groups: dict[tuple[int, ...], list[Sums]] = defaultdict(list)
        for process, rank_sums in zip(observed, sums_by_rank, strict=True):
            if name in rank_sums:
                groups[process.expert_group if ".experts" in name else process.group].append(rank_sums[name])
        totals = [_merge_group_sums(group_sums) for group_sums in groups.values()]
        merged[name] = sum(t[0] for t in totals), sum(t[1] for t in totals)
    return merged


def _find_first_difference(expected: Mapping[str, Sums], observed: Mapping[str, Sums],
                           tolerance: float) -> str | None:
    """Return the first module with differing sums, or None."""
    for name, (total, squares) in expected.items():
        if (observed_sums := observed.get(name)) is None:
            continue  # not observed in the layout
        # values may cancel in a plain sum: compare relative to the size of the terms
        scale = squares ** 0.5 + abs(total)
        differences = (abs(total - observed_sums[0]) / max(scale, 1e-30),
                       abs(squares - observed_sums[1]) / max(squares, 1e-30))
        # `not all(<=)` also catches NaN
        if not all(value <= tolerance for value in differences):
            return name
    return None


def _merge_group_sums(group_sums: list[Sums]) -> Sums:
    first = group_sums[0]
    is_replica = len(group_sums) > 1 and all(
        abs(rank_sums[i] - first[i]) <= _REPLICA_TOLERANCE * max(abs(first[i]), 1e-300)
        for rank_sums in group_sums for i in (0, 1))
    if is_replica:
        return first
    return sum(rank_sums[0] for rank_sums in group_sums), sum(rank_sums[1] for rank_sums in group_sums)


class _RecordOutputHook:
    """Forward hook: adds up a module's output and, on its arrival, the gradient."""

    def __init__(self, sums: ModuleSums, name: str) -> None:
        self._sums, self._name = sums, name

    def __call__(self, module: Any, args: Any, output: Any) -> None:
        self._sums.begin_step_part(AFTER_FORWARD + self._name)
        if not torch.is_grad_enabled():
            return  # recomputation will call the module again with gradients
        # the second output is a bias added later, complete on each process
        tensor = output[0] if isinstance(output, tuple) else output
        if isinstance(tensor, torch.nn.Parameter):  # a module that returns its weight
            return
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            _add_sums(self._sums.forward, (self._sums.step, self._name), tensor.detach())
            if tensor.requires_grad:
                tensor.register_hook(self._record_gradient)

    def _record_gradient(self, gradient: torch.Tensor) -> None:
        self._sums.begin_step_part(AFTER_BACKWARD + self._name)
        sums, key = self._sums.backward, (self._sums.step, self._name)
        sums[key] = sums.pop(key, (0.0, 0.0))  # move to the end
        _add_sums(sums, key, gradient)


def _add_sums(sums: dict[StepModule, Sums], key: StepModule, tensor: torch.Tensor) -> None:
    total, squares = sums.get(key, (0.0, 0.0))
    sums[key] = total + float(tensor.sum()), squares + float(tensor.square().sum())


def _iter_named_modules(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield modules with layout-independent names: layers by their number in the model, experts merged."""
    for chunk in chunks:
        layers = {name: module for name, module in chunk.named_modules()
                  if isinstance(module, TransformerLayer)}
        containers = {"", *(layer[:dot.start()] for layer in layers for dot in re.finditer(r"\.", layer))}
        for name, module in chunk.named_modules():
            # containers of layers return the next stage's input, and stages compute rotary angles
            if name in containers or "rotary" in name:
                continue
            expert_match = _EXPERT.search(name)
            if expert_match:
                experts: Any = chunk.get_submodule(name[:expert_match.start()]).local_experts
                if len(experts) > MAX_EXPERTS:
                    continue  # only the joint output of many local experts is observed
            # attention on gathered rows: each rank computes whole rows
            if ".core_attention." in name and parallel_state.get_context_parallel_world_size() > 1:
                continue
            # partial output, summed only at the token's process
            if _PARTIAL.search(name) and parallel_state.get_expert_tensor_parallel_world_size() > 1:
                continue
            layer_prefix = name
            while layer_prefix and layer_prefix not in layers:
                layer_prefix = layer_prefix.rpartition(".")[0]
            layer_name = layer_prefix or None
            if layer_name is not None:
                kind = "prediction layer" if ".mtp." in f".{layer_name}" else "layer"
                name = f"{kind} {layers[layer_name].layer_number}{name[len(layer_name):]}"
            yield _EXPERT.sub(".experts", name).removeprefix("module.") or "model", module


def _get_group_ranks(group: Any) -> tuple[int, ...]:
    return tuple(torch.distributed.get_process_group_ranks(group))
