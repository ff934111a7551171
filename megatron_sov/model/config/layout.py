"""How a model is laid out over processes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal

from megatron_sov.base.settings import (
    AboveZero, ActsWhen, AtLeastOne, NotNegativeInt, ProblemCode, SettingsProblem, find_broken, is_set)
from megatron_sov.model.config.model import ModelConfig


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is laid out over processes; the data parallel size follows from their number."""

    ACTS_WHEN: ClassVar[ActsWhen] = {
        "bucket_params": is_set(".overlap_grad_reduce"),
        "expert_dispatcher": is_set("model.num_experts")}

    tp: AtLeastOne = 1
    """Tensor parallel size."""
    sp: bool = False
    """Sequence parallelism: norms and residuals split along the sequence inside a tensor parallel group."""
    pp: AtLeastOne = 1
    """Pipeline parallel size."""
    vpp: AtLeastOne = 1
    """Runs of layers on each pipeline stage: above 1 the pipeline is interleaved,
    and its bubble shrinks that many times."""
    ep: AtLeastOne = 1
    """Expert parallel size."""
    etp: AtLeastOne = 1
    """Tensor parallel size inside each expert."""
    expert_dispatcher: Literal["alltoall", "allgather", "deepep", "hybridep"] = "alltoall"
    """How tokens reach their experts: each to its own (alltoall), or all to all processes (allgather; small
    `ep`, many experts for each token), or each to its own by the kernels of DeepEP or HybridEP on GPUs."""
    expert_overlap: Literal["none", "micro_batches", "weight_gradients"] = "none"
    """Send tokens to experts and back while something else is computed: a part of another micro-batch, by the
    library's 1F1B plan (micro_batches), or, in the backward pass alone, the experts' weight gradients
    (weight_gradients; Transformer Engine on a GPU)."""
    delay_weight_grads: bool = False
    """Compute weight gradients apart from the rest of a backward pass, while tokens travel; goes with
    `expert_overlap` = micro_batches and Transformer Engine."""
    zero1: bool = False
    """ZeRO-1: every data-parallel process keeps and updates its share of the optimizer's
    state, not all of it."""
    overlap_grad_reduce: bool = False
    """Sum gradients over data-parallel processes while the backward pass goes on, not after it."""
    overlap_param_gather: bool = False
    """Gather updated weights while the next forward pass goes on, not before it; needs zero1 and
    overlap_grad_reduce."""
    bucket_params: NotNegativeInt = 0
    """Parameters that are sent at a time under overlap_grad_reduce; 0: 40 million, or 1 million per
    data-parallel process."""
    pipeline_layout: tuple[AtLeastOne, ...] = ()
    """Layers of each pipeline stage, where they are not to be equal; with `vpp` of each of its runs, in the
    order of the layers (the first runs of all stages come first). Empty: all have as many."""
    cp: AtLeastOne = 1
    """Context parallel size: processes that share each row of tokens, for long samples."""
    timeout_s: AboveZero = 1800.0
    """Seconds after which a process gives up waiting for the others, at the start or in a collective; should
    be longer than `guards.hang_timeout_s`, whose watch leaves stacks to read."""

    @property
    def ranks_per_replica(self) -> int:
        """Processes that compute one row together; the others are data parallel."""
        return self.tp * self.pp * self.cp

    def layers_of_stage(self, stage: int, num_layers: int) -> list[int]:
        """Return the trunk's layers (0-based) on a pipeline stage (0-based), of all its runs."""
        runs = self.pipeline_layout or (num_layers // (self.pp * self.vpp),) * (self.pp * self.vpp)
        return [sum(runs[:run]) + i for run in range(stage, len(runs), self.pp) for i in range(runs[run])]

    @property
    def ranks_per_expert_replica(self) -> int:
        """Processes that hold one copy of the routed experts together."""
        return self.etp * self.ep * self.pp

    @property
    def row_multiple(self) -> int:
        """What the length of every row must be a multiple of: each process gets an early and
        a late piece of it."""
        return self.tp * 2 * self.cp if self.cp > 1 else self.tp

    def problems(self, model: ModelConfig, num_ranks: int) -> list[SettingsProblem]:
        """Return every rule that this layout, whose sizes are at least 1, breaks for `model` on `num_ranks`
        processes."""
        p = []

        def refuse(key: str, rule: str, way_out: str = "", fix: str = "") -> None:
            p.append(SettingsProblem(ProblemCode.RULE, f"parallel.{key}", rule, getattr(self, key), way_out,
                                     fix=fix))

        for name in ("num_heads", "num_kv_heads"):
            value = getattr(model, name)
            if value % self.tp:
                refuse("tp", f"must divide model.{name} = {value}", _divisors(value))
        if model.has_dense_layers() and model.dense_ffn_dim % self.tp:
            refuse("tp", f"must divide model.dense_ffn_dim = {model.dense_ffn_dim}")
        narrow = {"model.latent_attention meets": model.latent_attention is not None,
                  "model.linear_attention meets": model.linear_attention is not None,
                  "experts meet": model.num_moe_layers() > 0}
        if self.tp > 1 and not self.sp and any(narrow.values()):
            what = next(what for what, meets in narrow.items() if meets)
            refuse("sp", f"must be true when {what} parallel.tp = {self.tp} > 1", fix="parallel.sp=true")
        if self.sp and self.tp == 1:
            refuse("sp", "needs parallel.tp > 1", "leave it out or raise tp")
        if self.vpp > 1 and self.pp == 1:
            refuse("vpp", "needs parallel.pp > 1", "leave it out or raise pp")
        if self.overlap_param_gather and not (self.zero1 and self.overlap_grad_reduce):
            refuse("overlap_param_gather", "needs parallel.zero1 and parallel.overlap_grad_reduce, which are "
                   f"{self.zero1} and {self.overlap_grad_reduce}".lower(), "set both or leave it out")
        if model.yarn is not None and self.cp > 1 and \
                model.yarn.original_max_position_tokens % (2 * self.cp):
            # megatron-core makes YaRN's tables for the original context and cuts them as it does rows
            tokens = model.yarn.original_max_position_tokens
            refuse("cp", f"x 2 must divide model.yarn.original_max_position_tokens = {tokens}, whose table "
                   "of positions the processes share", _divisors(tokens // 2))
        given, runs, layers = self.pipeline_layout, self.pp * self.vpp, model.num_layers // self.pp
        if given and self.pp == 1:
            refuse("pipeline_layout", "needs parallel.pp > 1", "leave it out or raise pp")
        elif given and len(given) != runs:
            refuse("pipeline_layout", f"has {len(given)} numbers and must have one for each of parallel.pp "
                   f"{self.pp} x parallel.vpp {self.vpp} = {runs} runs of layers")
        elif given and sum(given) != model.num_layers:
            refuse("pipeline_layout", f"adds up to {sum(given)} layers and must to model.num_layers = "
                   f"{model.num_layers}")
        elif not given and model.num_layers % self.pp:
            refuse("pp", f"must divide model.num_layers = {model.num_layers}",
                   f"{_divisors(model.num_layers)}; or give each stage's layers in parallel.pipeline_layout")
        elif not given and layers % self.vpp:
            refuse("vpp", f"must divide the {layers} layers of each pipeline stage", _divisors(layers))
        p += self._layer_problems(model) + self._expert_problems(model)
        # Dense layers and experts have grids of their own over the same processes; data parallel sizes
        # follow from each.
        for names in (("tp", "pp", "cp"), ("etp", "ep", "pp")):
            size = math.prod(getattr(self, name) for name in names)
            if num_ranks % size:
                product = " x ".join(f"{name} {getattr(self, name)}" for name in names)
                p.append(SettingsProblem(
                    ProblemCode.RULE, "parallel", f"{product} = {size} must divide the number of processes, "
                    f"{num_ranks}", way_out=f"start a multiple of {size} (--nproc) or lower one of them"))
        return p

    def _layer_problems(self, model: ModelConfig) -> list[SettingsProblem]:
        """Tell how linear attention, and a prediction layer beside a tied head, cannot be divided."""
        heads = 0 if model.linear_attention is None else model.linear_attention.num_key_heads
        return find_broken(
            self, "parallel",
            (heads % (self.tp * self.cp) == 0, "tp", f"x parallel.cp = {self.cp} must divide "
             f"model.linear_attention.num_key_heads = {heads}", f"of their product, {_divisors(heads)}"),
            # the last stage then has one matrix for both uses, and the library does not save it
            (self.pp == 1 or not (model.tied_embeddings and model.num_mtp_layers), "pp",
             "must be 1 where a prediction layer (model.num_mtp_layers) meets a head that is the embedding "
             "(model.tied_embeddings)", "set model.tied_embeddings=false or model.num_mtp_layers=0"))

    def _expert_problems(self, model: ModelConfig) -> list[SettingsProblem]:
        """Tell how experts cannot be divided."""
        if not model.num_moe_layers():
            return find_broken(self, "parallel", *(
                (getattr(self, name) == 1, name, f"must be 1: model.num_experts = {model.num_experts}, so "
                 "there are no experts to divide") for name in ("ep", "etp")),
                (self.expert_overlap == "none" and not self.delay_weight_grads, "expert_overlap",
                 "and delay_weight_grads need experts, and the model has none", "leave them out"))
        shared, overlaps = model.num_shared_experts * model.expert_ffn_dim, self.expert_overlap != "none"
        return find_broken(
            self, "parallel",
            (not (overlaps or self.delay_weight_grads) or model.mtp_depths == 1, "expert_overlap",
             "and delay_weight_grads leave a layer's weight gradients for later, once, and model.mtp_depths "
             f"= {model.mtp_depths} applies one more often", "leave them out"),
            (not overlaps or self.ep > 1, "expert_overlap", "needs parallel.ep > 1, and nothing travels at 1",
             "leave it out or raise ep"),
            (not overlaps or self.expert_dispatcher != "allgather", "expert_overlap",
             "does not go with parallel.expert_dispatcher = allgather", "use another one"),
            (self.expert_overlap != "micro_batches" or self.pp == 1 or self.vpp > 1, "expert_overlap",
             f"needs parallel.vpp > 1 where parallel.pp = {self.pp} > 1: only an interleaved pipeline has "
             "two micro-batches to compute at a time", "raise vpp, or leave it out"),
            # the library frees what came in (`should_free_input`), which a single expert takes as it is
            (self.expert_overlap != "micro_batches" or model.num_experts > self.ep, "expert_overlap",
             f"needs two experts on each process, and model.num_experts = parallel.ep = {self.ep}",
             "lower ep, or leave it out"),
            (model.num_experts % self.ep == 0, "ep", f"must divide model.num_experts = {model.num_experts}",
             _divisors(model.num_experts)),
            (model.expert_ffn_dim % self.etp == 0, "etp",
             f"must divide model.expert_ffn_dim = {model.expert_ffn_dim}"),
            (not self.delay_weight_grads or self.expert_overlap == "micro_batches", "delay_weight_grads",
             f"needs parallel.expert_overlap = micro_batches, which is {self.expert_overlap}",
             "set it, or leave it out"),
            (shared % self.tp == 0, "tp", "must divide the width of the shared experts, "
             f"model.num_shared_experts {model.num_shared_experts} x model.expert_ffn_dim "
             f"{model.expert_ffn_dim} = {shared}", _divisors(shared)))


@cache
def _divisors(n: int) -> str:
    found = [d for d in range(1, min(n, 128) + 1) if n % d == 0]
    return "use one of " + ", ".join(map(str, found))
