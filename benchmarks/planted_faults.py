"""Faults on purpose, for `layout_proofs.py`: in what a place sends (`FaultyMessage`), and in the source of a
function (`SOURCE_FAULTS`, `mutated`)."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any
from unittest import mock

import torch

LAYOUTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "tensor, sequence, experts, ZeRO-1": ("tiny-k-exaone", (
        "parallel.tp=2", "parallel.sp=true", "parallel.ep=2", "parallel.zero1=true")),
    "pipeline, experts": ("tiny-k-exaone", (
        "parallel.pp=2", "parallel.ep=2", "parallel.overlap_grad_reduce=true")),
    "context, tensor, experts of two": ("tiny-solar-open", (
        "parallel.cp=2", "parallel.tp=2", "parallel.sp=true", "parallel.ep=2", "parallel.etp=2")),
    "interleaved pipeline, tensor": ("tiny-qwen3", (
        "parallel.pp=2", "parallel.vpp=2", "parallel.tp=2", "model.num_layers=4",
        "model.tied_embeddings=true")),
    "instructions, predictions; context": ("tiny-k-exaone", (
        "objective.name=sft", "parallel.cp=2", "parallel.ep=2")),
    "preferences of pairs; context": ("tiny-solar-open-dpo", ("parallel.cp=2",)),
    "preferences of one; pipeline": ("tiny-solar-open-dpo", ("preference.method=kto", "parallel.pp=2")),
    "policies; pipeline": ("tiny-solar-open-rl", ("policy.kl=k3", "policy.kl_coeff=0.1", "parallel.pp=2")),
    "a teacher; context, tensor": ("tiny-typhoon-s", (
        "objective.name=distill", "distillation.top_k=16", "parallel.cp=2", "parallel.tp=2",
        "parallel.sp=true")),
    "a teacher; tensor": ("tiny-typhoon-s", (
        "objective.name=distill", "distillation.top_k=0", "parallel.tp=2"))}
"""Name -> recipe and settings of a layout of four processes."""
ZERO, STAGES, CONTEXT, INTERLEAVED, SFT, PAIRS, UNPAIRED, POLICY, TAUGHT, TAUGHT_ALL = LAYOUTS
OBJECTIVES = (SFT, PAIRS, UNPAIRED, POLICY, TAUGHT, TAUGHT_ALL)
"""Layouts of losses beside that of pretraining.  Of their messages those are planted that the others have
not."""


def _dropped(kind: str, parts: Sequence[Any]) -> None:
    """Everyone goes on with what is its own."""
    for index, part in enumerate(parts):
        if kind == "reduce_scatter":
            part.outputs[0].copy_(part.inputs[index])
        elif kind == "allgather":
            for output in part.outputs:
                output.copy_(part.inputs[0])
        elif kind == "alltoall":
            part.outputs[0].zero_()


def _scaled(factor: float) -> Callable[[str, Sequence[Any]], None]:
    def scale(kind: str, parts: Sequence[Any]) -> None:
        for part in parts:
            for output in part.outputs:
                if output.is_floating_point():
                    output.mul_(factor)
    return scale


def _shifted(kind: str, parts: Sequence[Any]) -> None:
    """Everyone has what belongs to the one before it."""
    came = [[output.clone() for output in part.outputs] for part in parts]
    for part, other in zip(parts, [came[-1], *came[:-1]], strict=True):
        for output, value in zip(part.outputs, other, strict=True):
            if output.shape == value.shape:
                output.copy_(value)


def _one_lacks(kind: str, parts: Sequence[Any]) -> None:
    """The last one has not given its own."""
    for output in parts[-1].outputs:
        output.zero_()


WAYS: dict[str, tuple[bool, Callable[[str, Sequence[Any]], None]]] = {
    "left out": (False, _dropped), "doubled": (True, _scaled(2.0)), "halved": (True, _scaled(0.5)),
    "one rank on": (True, _shifted), "nothing for the last": (True, _one_lacks)}
"""Way -> whether it comes behind the call's own work, and what it does."""
OTHER_GROUP = "over another group"


def _set(parts: Sequence[Any], values: Sequence[Sequence[torch.Tensor]]) -> None:
    for part, row in zip(parts, values, strict=True):
        for output, value in zip(part.outputs, row, strict=True):
            output.copy_(value)


def _clones(parts: Sequence[Any]) -> list[list[torch.Tensor]]:
    return [[output.clone() for output in part.outputs] for part in parts]


def _do_wrongly(way: str, site: Any, parts: Sequence[Any], work: Callable[[Any], None]) -> None:
    behind, do = WAYS[way]
    if behind:
        work(list(parts))
    do(site.kind, parts)


@dataclass(frozen=True)
class FaultyMessage:
    """Does what one place sends wrongly."""

    site: Any
    way: str

    def __call__(self, site: Any, parts: Sequence[Any], work: Callable[[Any], None]) -> bool:
        if site == self.site:
            _do_wrongly(self.way, site, parts, work)
        return bool(site == self.site)


@dataclass
class FaultsThatMatter:
    """Finds of which messages another thing would come if they were done wrongly: the others are no faults,
    since all have the same, or nothing."""

    found: dict[FaultyMessage, None] = field(default_factory=dict)

    def __call__(self, site: Any, parts: Sequence[Any], work: Callable[[Any], None]) -> bool:
        if len(parts) == 1 and site.kind != "recv":
            return False
        before = _clones(parts)
        # objects that are sent as bytes are settings of the start
        ways = ["left out"] if "object" in site.where or "param_groups" in site.where else WAYS
        work(list(parts))
        right = _clones(parts)
        for way in ways:
            _set(parts, before)
            _do_wrongly(way, site, parts, work)
            if any(not torch.equal(output, value) for part, values in zip(parts, right, strict=True)
                   for output, value in zip(part.outputs, values, strict=True)):
                self.found[FaultyMessage(site, way)] = None
        _set(parts, right)
        return True


@contextlib.contextmanager
def over_another_group(at: Any) -> Iterator[list[int]]:
    """Have a place call another group of as many processes; yields the ranks that did."""
    from torch.distributed import distributed_c10d

    from megatron_sov.engine.parallel import simulated_messages, simulated_world

    real, moved = simulated_world.SimulatedGroup._call, list[int]()

    def call(group: Any, kind: str, part: Any, work: Any) -> Any:
        if simulated_messages.site_of(kind, group._description) == at:
            for other in distributed_c10d._world.pg_map:
                if other.size() == group.size() and other._members != group._members:
                    moved.append(group._rank)
                    return real(other, kind, part, work)
        return real(group, kind, part, work)

    with mock.patch.object(simulated_world.SimulatedGroup, "_call", call):
        yield moved


@dataclass(frozen=True)
class SourceFault:
    """A text of a function's source in place of another one."""

    kind: str
    layout: str
    function: str
    """module:qualified name."""
    right: str
    wrong: str

    def __str__(self) -> str:
        return f"{self.function.rpartition(':')[2]}: {self.right!r} is {self.wrong!r}"


_HERE, _CORE = "megatron_sov.engine", "megatron.core"
_CUT, _FINALIZE = f"{_HERE}.parallel.context", f"{_CORE}.distributed.finalize_model_grads"
_HEAD, _ROUTER = f"{_HERE}.model.chunked_head:_chunk", f"{_HERE}.router:BalancedRouter._with_balancing_loss"
_TEACHER, _PREDICTION = f"{_HERE}.model.divergence", f"{_HERE}.model.language_model:PredictionLayer"
_LAYERS, _DDP = f"{_CORE}.tensor_parallel.layers", f"{_CORE}.distributed.distributed_data_parallel"
_ONE, _BY_SIZE = "gradient_scaling_factor = 1.0", "gradient_scaling_factor = 1.0 / self.dp_cp_group.size()"
_ONES = f"{_ONE}\n        expert_{_ONE}"
_SCALING = f"{_DDP}:DistributedDataParallel.__init__"
SOURCE_FAULTS = tuple(SourceFault(*fault) for fault in (
    ("row cut wrongly", CONTEXT, f"{_CUT}:_own_pieces", "return rank, ", "return (rank + 1) % size(), "),
    ("row cut wrongly", CONTEXT, f"{_CUT}:_own_pieces", "2 * size() - 1 - rank", "size() + rank"),
    ("row cut wrongly", CONTEXT, f"{_CUT}:_in_row_order", ".flip(0)", ""),
    ("row cut wrongly", CONTEXT, f"{_CUT}:_by_rank", ".flip(0)", ""),
    ("row cut wrongly", CONTEXT, f"{_CUT}:row_index", "get_tensor_model_parallel_rank()]",
     "get_context_parallel_rank()]"),
    ("mask of another rank", CONTEXT, f"{_HERE}.model.attention:pack",
     "context.pieces(row_tokens)]", "context.pieces(row_tokens)[::-1]]"),
    *(("counted twice over a cut row", layout, f"{_CUT}:_GatherAlike.backward", "local(grads[0])",
       "_reduce_scatter(grads[0])") for layout in (CONTEXT, PAIRS)),
    *(("labels of another rank", layout, f"{_HERE}.model.logprobs:Head.logprobs", "context.local(labels)",
       "labels[:len(context.local(labels))]") for layout in (PAIRS,)),
    ("labels of another rank", TAUGHT, f"{_TEACHER}:DivergenceSums.forward", "context.local(w)",
     "w[:len(context.local(w))]"),
    ("labels of another rank", TAUGHT, "megatron_sov.post.distillation.distill:_shared",
     "at + begin - first, at + stop - first", "begin - first, stop - first"),
    ("padding counted", SFT, "megatron_sov.train.objectives.objective:with_denominators",
     "(~m.host.inputs.padding)", "(m.host.inputs.padding | True)"),
    ("tokens of another place", SFT, f"{_PREDICTION}._get_embeddings", "context.local(ahead)",
     "ahead[:len(context.local(ahead))]"),
    *(("tokens of another place", layout, f"{_PREDICTION}._get_embeddings",
       "next_tokens(ahead, packed_seq_params.bounds)", "ahead") for layout in (ZERO, STAGES, SFT)),
    ("wrong denominator", ZERO, "megatron_sov.train.objectives.data_objective:DataObjective._mtp_targets",
     "for m in micro_batches", "for m in [*micro_batches][:1]"),
    ("not summed over a cut row", CONTEXT, f"{_CUT}:_GatherKeys.backward", "_reduce_scatter(grads[0])",
     "local(grads[0])"),
    *(("wrong denominator", layout, "megatron_sov.train.objectives.objective:with_denominators",
       "sum_dict(counts, collectives.all_reduce_dp)", "dict(counts)") for layout in LAYOUTS
      if layout != TAUGHT),
    ("wrong denominator", UNPAIRED, "megatron_sov.post.preference:_distance",
     'sum_dict({"total": total, "count": count}, collectives.all_reduce_dp)',
     '{"total": total, "count": count}'),
    ("wrong denominator", CONTEXT, "megatron_sov.train.objectives.objective:with_denominators",
     "local_targets[name]", "2 * local_targets[name]"),
    ("padding counted", CONTEXT, "megatron_sov.train.objectives.objective:with_denominators",
     "(~m.host.inputs.padding)", "(m.host.inputs.padding | True)"),
    *(("vocabulary of another rank", layout, _HEAD, "group.rank() *", "(group.size() - 1 - group.rank()) *")
      for layout in (ZERO, CONTEXT, INTERLEAVED)),
    *(("vocabulary of another rank", layout, _HEAD, ".where(here, 0.0)\n    exp", "\n    exp")
      for layout in (ZERO, CONTEXT, INTERLEAVED)),
    *(("vocabulary of another rank", layout, f"{_LAYERS}:VocabParallelEmbedding.forward",
       "output_parallel[input_mask, :] = 0.0", "pass") for layout in (ZERO, CONTEXT, INTERLEAVED)),
    ("vocabulary of another rank", TAUGHT, f"{_TEACHER}:TeacherTopK.compare",
     "parallel_state.get_tensor_model_parallel_rank() * student.shape[1]", "0"),
    ("vocabulary of another rank", TAUGHT, f"{_TEACHER}:TeacherTopK.compare",
     "_sum_over_group((student * probabilities).sum(-1))", "(student * probabilities).sum(-1)"),
    *(("vocabulary of another rank", layout, f"{_TEACHER}:_normalised", "group.size() > 1", "False")
      for layout in (TAUGHT, TAUGHT_ALL)),
    ("vocabulary of another rank", TAUGHT_ALL, f"{_TEACHER}:_compare",
     "_sum_over_group(found) if over_group else found", "found"),
    ("vocabulary of another rank", TAUGHT_ALL, "megatron_sov.post.distillation.distill:KeptTeacher._head",
     "held.start:held.stop", ":len(held)"),
    ("router's counts of one part", CONTEXT, _ROUTER, "counts, tokens = both[:, :-1], both[:, -1]",
     "counts = both[:, :-1]"),
    ("router's counts of one part", CONTEXT, _ROUTER, "counts, tokens = both[:, :-1], both[:, -1]",
     "tokens = both[:, -1]"),
    ("padding counted", CONTEXT, _ROUTER, "scores = scores * valid[:, None]", "pass"),
    ("padding counted", ZERO, _ROUTER, "scores = scores * valid[:, None]", "pass"),
    *(("padding counted", layout, f"{_HERE}.router:BalancedRouter.routing", "~mask[:, 0]",
       "mask[:, 0] | True") for layout in (ZERO, STAGES, CONTEXT)),
    ("wrong group of counts", CONTEXT, f"{_CORE}.transformer.moe.moe_utils:get_updated_expert_bias",
     "with_context_parallel=True", "with_context_parallel=False"),
    ("wrong group of counts", ZERO, f"{_CORE}.transformer.moe.moe_utils:get_updated_expert_bias",
     "parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)",
     "parallel_state.get_data_parallel_group()"),
    *(("experts of another rank", layout, f"{_CORE}.transformer.moe.moe_layer:BaseMoELayer.__init__",
       "ep_rank * self.num_local_experts", "(ep_size - 1 - ep_rank) * self.num_local_experts")
      for layout in (ZERO, STAGES, CONTEXT)),
    *(("norm not summed under SP", layout, f"{_FINALIZE}:_allreduce_non_tensor_model_parallel_grads",
       'getattr(param, "sequence_parallel", False)', "False") for layout in (ZERO, CONTEXT)),
    *(("scaled by a wrong size", layout, _SCALING, _ONES, f"{_BY_SIZE}; expert_{_ONE}")
      for layout in LAYOUTS),
    *(("scaled by a wrong size", layout, _SCALING, _ONES, f"{_ONE}; expert_{_BY_SIZE}")
      for layout in (ZERO, STAGES, CONTEXT)),
    *(("replicas counted twice", layout, f"{_LAYERS}:param_is_not_tensor_parallel_duplicate",
       "tp_group.rank() == 0", "True") for layout in (ZERO, CONTEXT, INTERLEAVED)),
    *(("experts reduced as the trunk", layout, f"{_LAYERS}:ColumnParallelLinear.__init__",
       "not (self.is_expert and self.expert_parallel))", "True)") for layout in (ZERO, STAGES, CONTEXT)),
    *(("experts reduced as the trunk", layout, f"{_HERE}.model.language_model:mark_parameters",
       "parameter.allreduce = parameter.sequence_parallel = False",
       "parameter.allreduce, parameter.sequence_parallel = True, False")
      for layout in (ZERO, STAGES, CONTEXT)),
    *(("rows of another rank", layout, "megatron_sov.train.data.rows:BatchStream._mine",
       "self._dp_rank * size", "0") for layout in (ZERO, STAGES, SFT, PAIRS, UNPAIRED, POLICY, TAUGHT_ALL)),
    *(("losses not summed", layout, "megatron_sov.train.computation:Computation.sums",
       "collectives.all_reduce_dp(local)", "local") for layout in (ZERO, STAGES, POLICY)),
    ("clipped in part", CONTEXT, f"{_HERE}.optimizer.optimizer:Optimizer._clip",
     "in self.library.chained_optimizers:", "in self.library.chained_optimizers[:1]:"),
    ("norm of a part", CONTEXT, f"{_HERE}.optimizer.optimizer:Optimizer._grad_norm",
     "in self.library.chained_optimizers:", "in self.library.chained_optimizers[:1]:"),
    ("optimizer's shard shifted", ZERO, f"{_HERE}.optimizer.state_shards:pieces",
     "flat_ranges(block.data.shape, start - first, stop - first)",
     "flat_ranges(block.data.shape, max(start - first - 1, 0), stop - first - 1)"),
    *(("layers of another stage", layout,
       f"{_CORE}.transformer.transformer_layer:get_transformer_layer_offset",
       "pp_rank = parallel_state.get_pipeline_model_parallel_rank()", "pp_rank = 0")
      for layout in (STAGES, INTERLEAVED))))


PLACES = {
    "pack": "self_attention|attention.py", "_own_pieces": "self_attention", "_in_row_order": "self_attention",
    "_by_rank": "self_attention", "_GatherKeys.backward": "self_attention",
    "row_index": "pre_mlp_layernorm|router",
    "BalancedRouter._with_balancing_loss": "pre_mlp_layernorm|router",
    "BalancedRouter.routing": "pre_mlp_layernorm|router", "get_updated_expert_bias": "router bias",
    "BaseMoELayer.__init__": "experts|dispatcher|mappings.py", "_GatherAlike.backward": "final_layernorm",
    "with_denominators": "final_layernorm|step 1: tokens", "_distance": "final_layernorm|distance",
    "DataObjective._mtp_targets": "mtp.layers", "PredictionLayer._get_embeddings": "embedding|mtp.layers",
    "_chunk": "final_layernorm|step 1: loss", "VocabParallelEmbedding.forward": "word_embeddings",
    "Head.logprobs": "final_layernorm", "DivergenceSums.forward": "final_layernorm",
    "_shared": "final_layernorm", "TeacherTopK.compare": "final_layernorm|mean of entropy",
    "_normalised": "final_layernorm", "_compare": "final_layernorm|step 1: loss",
    "KeptTeacher._head": "final_layernorm",
    "_allreduce_non_tensor_model_parallel_grads": "gradient of [^ ]*norm",
    "DistributedDataParallel.__init__": "gradient of",
    "param_is_not_tensor_parallel_duplicate": "gradient norm",
    "ColumnParallelLinear.__init__": "gradient of [^ ]*experts",
    "mark_parameters": "gradient of [^ ]*experts", "BatchStream._mine": "embedding",
    "Computation.sums": "step 1: loss", "Optimizer._clip": "gradient of",
    "Optimizer._grad_norm": "gradient norm",
    "pieces": "gradient of|(written|owned) by", "get_transformer_layer_offset": "layer 1"}
"""Function -> what the first line of a verdict says where a fault of it is named by its place: the module in
which it runs or whose gradient it makes, or the number that it sums."""


@contextlib.contextmanager
def mutated(fault: SourceFault) -> Iterator[None]:
    """Have a function do something else, for all who hold it: its code is exchanged."""
    module_name, _, name = fault.function.partition(":")
    module = importlib.import_module(module_name)
    found: Any = module
    for part in name.split("."):
        found = inspect.getattr_static(found, part)
    function = inspect.unwrap(getattr(found, "__func__", found))
    assert isinstance(function, FunctionType)
    source = textwrap.dedent(inspect.getsource(function))
    if fault.right not in source:
        raise ValueError(f"{fault.function} holds no {fault.right!r}")
    # without decorators, and inside a function that has what it closes over
    body = source[source.index("def "):].replace(fault.right, fault.wrong)
    source = "\n".join(("from __future__ import annotations",
                        f"def make({', '.join(function.__code__.co_freevars)}):",
                        textwrap.indent(body, "    "), f"    return {function.__name__}"))
    names: dict[str, Any] = {}
    exec(compile(source, inspect.getsourcefile(function) or "", "exec"), function.__globals__, names)
    code = names["make"](*function.__code__.co_freevars).__code__
    right, function.__code__ = function.__code__, code
    try:
        yield
    finally:
        function.__code__ = right


_ANY_NUMBER = "what all subtract before they take exponents may be any number"
_SIGN = "the sign alone of what an expert lacks moves its bias"
_OVERWRITTEN = "the weights that it makes alike are overwritten by those of the seed"
_ALIKE = "one process does it wrongly too: no fault of a layout"
NO_FAULTS: dict[tuple[str, str], str] = {
    ("doubled", "chunked_head.py:213"): _ANY_NUMBER, ("halved", "chunked_head.py:213"): _ANY_NUMBER,
    ("doubled", "divergence.py:214"): _ANY_NUMBER, ("halved", "divergence.py:214"): _ANY_NUMBER,
    ("doubled", "get_updated_expert_bias"): _SIGN, ("halved", "get_updated_expert_bias"): _SIGN,
    ("wrong denominator", "'dict(counts)'"): "one process alone reads data here, and sums with nobody",
    ("rows of another rank", "BatchStream._mine"): "one process alone reads data here",
    ("losses not summed", "Computation.sums"): "one process alone reads data here, and sums with nobody",
    ("a message", "setup_embeddings_and_output_layer"): _OVERWRITTEN,
    ("tokens of another place", "'ahead'"): _ALIKE, ("padding counted", "BalancedRouter"): _ALIKE,
    ("padding counted", "with_denominators"): _ALIKE, ("clipped in part", ""): _ALIKE,
    ("norm of a part", ""): _ALIKE, ("wrong denominator", "'2 * local"): _ALIKE,
    ("scaled by a wrong size", f"{INTERLEAVED}: DistributedDataParallel"): "the size is 1 in this layout",
    ("counted twice over a cut row", f"{CONTEXT}: _GatherAlike"):
        "the loss of pretraining gathers nothing that has a gradient; that of preferences does",
    ("experts reduced as the trunk", "ColumnParallelLinear"):
        "the engine marks experts' weights again behind the library (mark_parameters)",
    ("experts reduced as the trunk", f"{ZERO}: mark_parameters"):
        "the experts' group has the members of the trunk's in this layout"}
"""Kind, and text of a layout and its fault, that changes nothing -> why."""
