"""Parallel layout settings: how a model is divided over processes."""

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar, Literal

from megatron_sov.base.errors import Fix
from megatron_sov.base.settings import (
    AboveZero, ActsWhen, AtLeastOne, NotNegativeInt, ProblemCode, SettingsProblem, find_broken_rules, is_set)
from megatron_sov.model.config.model import ModelConfig

AXES = ("tp", "pp", "vpp", "cp", "ep", "etp")
"""Sizes in `parallel`."""


@dataclass(frozen=True)
class ParallelConfig:
    """Parallel layout. The data parallel size is the process count divided by `tp * pp * cp`."""

    ACTS_WHEN: ClassVar[ActsWhen] = {
        "bucket_params": is_set(".overlap_grad_reduce"), "expert_dispatcher": is_set("model.num_experts")}

    tp: AtLeastOne = 1
    """Tensor parallel size."""
    sp: bool = False
    """Sequence parallelism: split norms and residuals along the sequence inside a tensor parallel group."""
    pp: AtLeastOne = 1
    """Pipeline parallel size."""
    vpp: AtLeastOne = 1
    """Model chunks per pipeline stage. Values above 1 interleave the pipeline, which shrinks its bubble by
    this factor."""
    ep: AtLeastOne = 1
    """Expert parallel size."""
    etp: AtLeastOne = 1
    """Tensor parallel size inside each expert."""
    expert_dispatcher: Literal["alltoall", "allgather", "deepep", "hybridep"] = "alltoall"
    """How tokens reach their experts. alltoall: each token is sent to its experts' processes; allgather: all
    tokens are sent to all processes (for small `ep` and many experts per token); deepep, hybridep: alltoall
    by DeepEP or HybridEP kernels on GPUs."""
    expert_overlap: Literal["none", "micro_batches", "weight_gradients"] = "none"
    """Computation during token exchange. micro_batches: another micro-batch's layers (Megatron-Core's 1F1B
    overlap); weight_gradients: expert weight gradients, in the backward pass only (needs Transformer Engine
    on a GPU)."""
    delay_weight_grads: bool = False
    """Compute weight gradients separately from the rest of the backward pass, during token exchange; needs
    `expert_overlap=micro_batches` and Transformer Engine."""
    zero1: bool = False
    """ZeRO-1: shard optimizer state and updates over data-parallel processes."""
    overlap_grad_reduce: bool = False
    """Sum gradients over data-parallel processes during the backward pass instead of after it."""
    overlap_param_gather: bool = False
    """Gather updated weights during the next forward pass instead of before it; needs `zero1` and
    `overlap_grad_reduce`."""
    bucket_params: NotNegativeInt = 0
    """Parameters per message with `overlap_grad_reduce`. 0: the larger of 40 million and 1 million per
    data-parallel process."""
    pipeline_layout: tuple[AtLeastOne, ...] = ()
    """Layers per pipeline stage, for unequal stages. With `vpp`, layers per model chunk in layer order: every
    stage's first chunk, then every stage's second chunk. Empty: equal stages."""
    cp: AtLeastOne = 1
    """Context parallel size: processes that share each token row, for long samples."""
    timeout_s: AboveZero = 1800.0
    """Seconds after which a process stops waiting for other processes, at start-up or in a collective. Choose
    it longer than `guards.hang_timeout_s`, which writes stack traces first."""

    def format_sizes(self) -> str:
        """Format the sizes above 1, and ZeRO-1: `tp 2, pp 4, ZeRO-1`."""
        sizes = [f"{axis} {getattr(self, axis)}" for axis in AXES if getattr(self, axis) > 1]
        return ", ".join([*(sizes or ["data parallel alone"]), *(["ZeRO-1"] if self.zero1 else [])])

    @property
    def ranks_per_replica(self) -> int:
        """Processes that compute a row together; data parallelism runs copies of this group."""
        return self.tp * self.pp * self.cp

    def stage_layers(self, stage: int, num_layers: int) -> list[int]:
        """Return the layers (from 0) on pipeline stage `stage` (from 0), with all its model chunks."""
        num_chunks = self.pp * self.vpp
        chunks = self.pipeline_layout or (num_layers // num_chunks,) * num_chunks
        layers: list[int] = []
        for chunk in range(stage, len(chunks), self.pp):
            first = sum(chunks[:chunk])
            layers += range(first, first + chunks[chunk])
        return layers

    @property
    def ranks_per_expert_replica(self) -> int:
        """Processes that hold one copy of the routed experts together."""
        return self.etp * self.ep * self.pp

    @property
    def min_ranks(self) -> int:
        """Fewest processes that form whole replicas of the dense layers and of the routed experts."""
        return math.lcm(self.ranks_per_replica, self.ranks_per_expert_replica)

    @property
    def row_multiple(self) -> int:
        """Divisor for every row length in tokens. With context parallelism each process gets an early and a
        late piece of a row, so causal attention costs every process the same."""
        return self.tp * 2 * self.cp if self.cp > 1 else self.tp

    def problems(self, model: ModelConfig, num_ranks: int) -> list[SettingsProblem]:
        """Return every layout rule violated for `model` on `num_ranks` processes."""
        problems = []

        def reject(key: str, rule: str, way_out: str = "", fix: str = "") -> None:
            problems.append(SettingsProblem(ProblemCode.RULE, f"parallel.{key}", rule, getattr(self, key),
                                            way_out, fix=fix))
        for name in ("num_heads", "num_kv_heads"):
            value = getattr(model, name)
            if value % self.tp:
                reject("tp", f"must divide model.{name} = {value}", _divisors(value))
        if model.has_dense_layers() and model.dense_ffn_dim % self.tp:
            reject("tp", f"must divide model.dense_ffn_dim = {model.dense_ffn_dim}")
        # Megatron-Core builds these layers only with sequence parallelism inside a tensor parallel group.
        need_sp = [name for name, is_used in (
            ("model.latent_attention", model.latent_attention is not None),
            ("model.linear_attention", model.linear_attention is not None),
            ("experts", model.num_moe_layers() > 0)) if is_used]
        if self.tp > 1 and not self.sp and need_sp:
            reject("sp", f"must be true with parallel.tp = {self.tp} > 1 and {need_sp[0]}",
                   fix="parallel.sp=true")
        if self.sp and self.tp == 1:
            reject("sp", "needs parallel.tp > 1", "leave it out or raise tp")
        if self.vpp > 1 and self.pp == 1:
            reject("vpp", "needs parallel.pp > 1", "leave it out or raise pp")
        if self.overlap_param_gather and not (self.zero1 and self.overlap_grad_reduce):
            reject("overlap_param_gather", "needs parallel.zero1 and parallel.overlap_grad_reduce, which are "
                   f"{self.zero1} and {self.overlap_grad_reduce}".lower(), "set both or leave it out")
        if model.yarn is not None and self.cp > 1 and \
                model.yarn.original_max_position_tokens % (2 * self.cp):
            # Megatron-Core builds YaRN's position table for the original context and cuts it like a row.
            tokens = model.yarn.original_max_position_tokens
            reject("cp", f"x 2 must divide model.yarn.original_max_position_tokens = {tokens}: processes "
                   "share the table of positions", _divisors(tokens // 2))
        layout, num_chunks = self.pipeline_layout, self.pp * self.vpp
        stage_layers = model.num_layers // self.pp
        if layout and self.pp == 1:
            reject("pipeline_layout", "needs parallel.pp > 1", "leave it out or raise pp")
        elif layout and len(layout) != num_chunks:
            reject("pipeline_layout", f"has {len(layout)} numbers and must have {num_chunks}: parallel.pp "
                   f"{self.pp} x parallel.vpp {self.vpp} model chunks")
        elif layout and sum(layout) != model.num_layers:
            reject("pipeline_layout", f"adds up to {sum(layout)} layers, not to model.num_layers = "
                   f"{model.num_layers}")
        elif not layout and model.num_layers % self.pp:
            reject("pp", f"must divide model.num_layers = {model.num_layers}",
                   f"{_divisors(model.num_layers)}; or set each stage's layers in parallel.pipeline_layout")
        elif not layout and stage_layers % self.vpp:
            reject("vpp", f"must divide the {stage_layers} layers of each pipeline stage",
                   _divisors(stage_layers))
        problems += self._layer_problems(model) + self._expert_problems(model)
        nearest = self._nearest_sizes(model)
        for i, problem in enumerate(problems):
            if problem.key in nearest and not problem.fix:
                problems[i] = replace(problem, fix=f"{problem.key}={nearest[problem.key]}")
        return problems + self._rank_problems(num_ranks)

    def _rank_problems(self, num_ranks: int) -> list[SettingsProblem]:
        problems = []
        # Dense layers and experts are laid out separately over the same processes.
        for names in (("tp", "pp", "cp"), ("etp", "ep", "pp")):
            size = math.prod(getattr(self, name) for name in names)
            if num_ranks % size:
                product = " x ".join(f"{name} {getattr(self, name)}" for name in names)
                problems.append(SettingsProblem(
                    ProblemCode.RULE, "parallel", f"{product} = {size} must divide the number of processes, "
                    f"{num_ranks}", way_out=f"start a multiple of {size} (--nproc) or lower one of them",
                    fix=Fix(options=("--nproc", str(max(1, num_ranks // size) * size)))))
        return problems

    def _nearest_sizes(self, model: ModelConfig) -> dict[str, int]:
        """Return setting -> the largest size that divides the model below one that does not."""
        widths = [model.num_heads, model.num_kv_heads, model.dense_ffn_dim if model.has_dense_layers() else 0]
        if model.num_moe_layers():
            widths.append(model.num_shared_experts * model.expert_ffn_dim)
        divided = {"tp": widths, "pp": [model.num_layers],
                   "ep": [model.num_experts if model.num_moe_layers() else 1]}
        nearest = {}
        for name, numbers in divided.items():
            common, size = math.gcd(*numbers), getattr(self, name)
            if common % size:
                nearest[f"parallel.{name}"] = max(n for n in range(1, size) if common % n == 0)
        return nearest

    def _layer_problems(self, model: ModelConfig) -> list[SettingsProblem]:
        """Check linear attention, and prediction layers with tied embeddings."""
        heads = 0 if model.linear_attention is None else model.linear_attention.num_key_heads
        return find_broken_rules(
            self, "parallel",
            (heads % (self.tp * self.cp) == 0, "tp", f"x parallel.cp = {self.cp} must divide "
             f"model.linear_attention.num_key_heads = {heads}", f"for their product {_divisors(heads)}"),
            # The last stage would use one matrix as embedding and head, and Megatron-Core does not save it.
            (self.pp == 1 or not (model.tied_embeddings and model.num_mtp_layers), "pp",
             "must be 1 for a model with a prediction layer (model.num_mtp_layers) and "
             "model.tied_embeddings", "set model.tied_embeddings=false or model.num_mtp_layers=0"))

    def _expert_problems(self, model: ModelConfig) -> list[SettingsProblem]:
        if not model.num_moe_layers():
            return find_broken_rules(self, "parallel", *(
                (getattr(self, name) == 1, name, f"must be 1: model.num_experts = {model.num_experts}, so "
                 "there are no experts to divide") for name in ("ep", "etp")),
                (self.expert_overlap == "none" and not self.delay_weight_grads, "expert_overlap",
                 "and delay_weight_grads need a model with experts", "leave them out"))
        shared, overlaps = model.num_shared_experts * model.expert_ffn_dim, self.expert_overlap != "none"
        return find_broken_rules(
            self, "parallel",
            (not (overlaps or self.delay_weight_grads) or model.mtp_depths == 1, "expert_overlap",
             "and delay_weight_grads can delay a layer's weight gradients only once per pass, and "
             f"model.mtp_depths = {model.mtp_depths} applies the prediction layer repeatedly",
             "leave them out"),
            (not overlaps or self.ep > 1, "expert_overlap",
             "needs parallel.ep > 1: with 1 no token is sent to another process",
             "leave it out or raise ep"),
            (not overlaps or self.expert_dispatcher != "allgather", "expert_overlap",
             "cannot be used with parallel.expert_dispatcher = allgather", "use alltoall"),
            (self.expert_overlap != "micro_batches" or self.pp == 1 or self.vpp > 1, "expert_overlap",
             f"needs parallel.vpp > 1 with parallel.pp = {self.pp} > 1: only an interleaved pipeline "
             "computes two micro-batches at a time", "raise vpp, or leave it out"),
            # Megatron-Core frees the dispatched tokens (`should_free_input`); a single expert uses them.
            (self.expert_overlap != "micro_batches" or model.num_experts > self.ep, "expert_overlap",
             f"needs at least two experts per process, and model.num_experts = parallel.ep = {self.ep}",
             "lower ep, or leave it out"),
            (model.num_experts % self.ep == 0, "ep", f"must divide model.num_experts = {model.num_experts}",
             _divisors(model.num_experts)),
            (model.expert_ffn_dim % self.etp == 0, "etp",
             f"must divide model.expert_ffn_dim = {model.expert_ffn_dim}"),
            (not self.delay_weight_grads or self.expert_overlap == "micro_batches", "delay_weight_grads",
             f"needs parallel.expert_overlap = micro_batches, not {self.expert_overlap}",
             "set it, or leave it out"),
            (shared % self.tp == 0, "tp", "must divide the width of the shared experts, "
             f"model.num_shared_experts {model.num_shared_experts} x model.expert_ffn_dim "
             f"{model.expert_ffn_dim} = {shared}", _divisors(shared)))


@cache
def _divisors(n: int) -> str:
    divisors = [d for d in range(1, min(n, 128) + 1) if n % d == 0]
    return "use one of " + ", ".join(map(str, divisors))
