"""What passes through the modules of a model, as two sums for each that no layout changes: of all values, and
of their squares, over all tokens, channels and micro-batches of a step."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_sov.engine.model.language_model import LanguageModel
from megatron_sov.engine.parallel.simulated_messages import CallSite

Sums = tuple[float, float]
Place = tuple[int, str]
BEFORE = "before the first module"
LEFT, CAME = "forward behind ", "backward of "
"""Parts of a step that begin when a module has given something, or a gradient has come to what it gave."""
REDUCED = "DATA_PARALLEL"
"""In the names of groups over which gradients are summed up, where this goes on beside the backward pass."""
_EXPERT = re.compile(r"\.local_experts\.\d+")
_PARTIAL = re.compile(r"\.mlp\.experts(\.local_experts\.\d+(\.linear_fc2)?)?$")
"""What experts give, where several processes hold parts of one."""
MOST_EXPERTS = 16
"""Of a layer on a process, which are looked into."""
_REPLICA_TOLERANCE = 1e-12
"""Relative: two processes with sums so close hold the same tensor, and two parts of one never do."""


@dataclass
class Observed:
    """Of one process."""

    group: tuple[int, ...]
    """Its tensor parallel group."""
    expert_group: tuple[int, ...]
    """That of its experts."""
    step: int = 1
    """Which step is computed; whoever computes counts."""
    forward: dict[Place, Sums] = field(default_factory=dict)
    """Step and module -> of its outputs, in the order of first calls."""
    backward: dict[Place, Sums] = field(default_factory=dict)
    """Step and module -> of the gradients of its outputs, in the order in which their last parts came: what
    is called twice, such as an embedding that prediction layers ask too, has them whole only then."""
    sent: dict[Place, dict[CallSite, None]] = field(default_factory=dict)
    """Step and part of it, as `forward of MODULE`, in the order in which they began -> what was sent in it
    from where."""
    part: str = "building"

    def enter(self, part: str) -> None:
        """Have a part of the step begin."""
        self.part, place = part, (self.step, part)
        if part.startswith(CAME):
            self.sent[place] = self.sent.pop(place, {})  # as gradients are ordered: by their last parts
        else:
            self.sent.setdefault(place, {})

    def begin(self, step: int) -> None:
        """Have a step begin."""
        self.step = step
        self.enter(BEFORE)

    def note(self, site: CallSite) -> None:
        """Keep where something is sent from."""
        self.sent.setdefault((self.step, self.part), {})[site] = None


def observe(model: LanguageModel) -> Observed:
    """Return what fills while the model computes with gradients."""
    found = Observed(_ranks_of(parallel_state.get_tensor_model_parallel_group()),
                     _ranks_of(parallel_state.get_expert_tensor_parallel_group()))
    for name, module in _named(model):
        module.register_forward_pre_hook(_Enter(found, name))
        module.register_forward_hook(_Leave(found, name))
    return found


def locate(expected: Observed, seen: Sequence[Observed], step: int,
           tolerance: float) -> tuple[list[str], list[str]]:
    """Return the modules at which a difference begins, forward and backward, and what is sent between the
    last thing that is right and the first that is not.

    Args:
        expected: of one process.
        seen: of all processes of a layout, by rank.
        step: which is looked at.
        tolerance: relative.
    """
    found = {kind: _first_difference(_of_step(getattr(expected, kind), step),
                                     _joined([_of_step(getattr(one, kind), step) for one in seen], seen),
                                     tolerance)
             for kind in ("forward", "backward")}
    first = next(((LEFT if kind == "forward" else CAME) + module for kind, module in found.items()
                  if module is not None), "")
    sites = {str(site) for one in seen for site in _sent_before(one, step, first)}
    return [f"{kind} of {module}" for kind, module in found.items() if module is not None], sorted(sites)


def _sent_before(one: Observed, step: int, first: str) -> Iterator[CallSite]:
    """Yield what a process sends between what comes right before a part of a step and that part.

    Args:
        one: the process.
        step: which.
        first: the part that begins with something wrong; "": nothing that passes through modules is wrong,
            so that it is what is done with losses and gradients.
    """
    parts = [(part, sites) for (number, part), sites in one.sent.items() if number == step]
    names = [part for part, _ in parts]
    if first and first not in names:
        return  # this process has another stage
    end = names.index(first) if first else len(names)
    begin = max((i for i, name in enumerate(names[:end]) if name.startswith((LEFT, CAME) if first else CAME)),
                default=0)
    if first.startswith(CAME) and (left := LEFT + first.removeprefix(CAME)) in names:
        used = names.index(left)  # what is sent where it is used may be wrong in its gradient alone
        stop = next((i for i, name in enumerate(names) if i > used and name.startswith(LEFT)), used + 1)
        yield from (site for _, sites in parts[used:stop] for site in sites)
    if first.startswith(CAME) and not names[begin].startswith(CAME):
        yield from dict(parts).get(BEFORE, {})  # the loss may be divided by something wrong
    if not first:
        yield from (site for _, sites in parts[:begin] for site in sites if REDUCED in site.group)
    # what is not summed up looks like something cut, until it is used: the last that was sent is named
    while begin > 0 and not any(sites for _, sites in parts[begin:end]):
        begin -= 1
    for _, sites in parts[begin:end]:
        yield from sites


def _of_step(sums: Mapping[Place, Sums], step: int) -> dict[str, Sums]:
    return {name: value for (number, name), value in sums.items() if number == step}


def _joined(parts: Sequence[Mapping[str, Sums]], seen: Sequence[Observed]) -> dict[str, Sums]:
    """Return the sums over all processes, what several hold alike counted once."""
    found: dict[str, Sums] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        groups: dict[tuple[int, ...], list[Sums]] = defaultdict(list)
        for one, part in zip(seen, parts, strict=True):
            if name in part:
                groups[one.expert_group if ".experts" in name else one.group].append(part[name])
        totals = [_of_group(parts) for parts in groups.values()]
        found[name] = sum(t[0] for t in totals), sum(t[1] for t in totals)
    return found


def _first_difference(expected: Mapping[str, Sums], found: Mapping[str, Sums],
                      tolerance: float) -> str | None:
    """Return the first module whose sums differ; None: none's do."""
    for name, (total, squares) in expected.items():
        if (other := found.get(name)) is None:
            continue  # it is not looked at in the layout; what is held by nobody is told apart
        # a plain sum may cancel: what it is measured by is the size of its terms
        scale = squares ** 0.5 + abs(total)
        apart = (abs(total - other[0]) / max(scale, 1e-30), abs(squares - other[1]) / max(squares, 1e-30))
        # of NaN neither is true
        if not all(value <= tolerance for value in apart):
            return name
    return None


def _of_group(parts: list[Sums]) -> Sums:
    first = parts[0]
    is_replica = len(parts) > 1 and all(
        abs(part[i] - first[i]) <= _REPLICA_TOLERANCE * max(abs(first[i]), 1e-300)
        for part in parts for i in (0, 1))
    return first if is_replica else (sum(part[0] for part in parts), sum(part[1] for part in parts))


class _Enter:
    def __init__(self, found: Observed, name: str) -> None:
        self._found, self._name = found, name

    def __call__(self, module: Any, args: Any) -> None:
        self._found.enter(f"forward of {self._name}")


class _Leave:
    def __init__(self, found: Observed, name: str) -> None:
        self._found, self._name = found, name

    def __call__(self, module: Any, args: Any, output: Any) -> None:
        self._found.enter(LEFT + self._name)
        if not torch.is_grad_enabled():
            return  # it is computed again, with gradients, when they are needed
        # what stands beside it is a bias that is added later, whole on each process
        tensor = output[0] if isinstance(output, tuple) else output
        if isinstance(tensor, torch.nn.Parameter):  # a weight, which is compared as one
            return
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            _add(self._found.forward, (self._found.step, self._name), tensor.detach())
            if tensor.requires_grad:
                tensor.register_hook(self._came)

    def _came(self, gradient: torch.Tensor) -> None:
        self._found.enter(CAME + self._name)
        sums, place = self._found.backward, (self._found.step, self._name)
        sums[place] = sums.pop(place, (0.0, 0.0))  # it is the last now
        _add(sums, place, gradient)


def _add(sums: dict[Place, Sums], place: Place, tensor: torch.Tensor) -> None:
    total, squares = sums.get(place, (0.0, 0.0))
    sums[place] = total + float(tensor.sum()), squares + float(tensor.square().sum())


def _named(model: LanguageModel) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield modules by names that are the same at every layout: layers by their number in the model, experts
    together."""
    for chunk in model.chunks:
        layers = {name: module for name, module in chunk.named_modules()
                  if isinstance(module, TransformerLayer)}
        holders = {"", *(layer[:dot.start()] for layer in layers for dot in re.finditer(r"\.", layer))}
        for name, module in chunk.named_modules():
            # what holds layers gives what the next stage gets, and each stage makes angles of its own
            if name in holders or "rotary" in name:
                continue
            # of many experts what they give together is enough: each would be asked for two sums
            if (inside := _EXPERT.search(name)) and len(chunk.get_submodule(name[:inside.start()])
                                                        .local_experts) > MOST_EXPERTS:
                continue
            # which is summed up on its way back to the token
            if _PARTIAL.search(name) and parallel_state.get_expert_tensor_parallel_world_size() > 1:
                continue
            above = name
            while above and above not in layers:
                above = above.rpartition(".")[0]
            at = above or None
            if at is not None:
                kind = "prediction layer" if ".mtp." in f".{at}" else "layer"
                name = f"{kind} {layers[at].layer_number}{name[len(at):]}"
            yield _EXPERT.sub(".experts", name).removeprefix("module.") or "model", module


def _ranks_of(group: Any) -> tuple[int, ...]:
    return tuple(torch.distributed.get_process_group_ranks(group))
