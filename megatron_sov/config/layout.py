"""How a model is laid out over processes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megatron_sov.config.model import STRICT, ModelConfig


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is laid out over processes; the data parallel size follows from their number."""

    __pydantic_config__ = STRICT
    tp: int = 1
    """Tensor parallel size."""
    sp: bool = False
    """Sequence parallelism: norms and residuals split along the sequence inside a tensor parallel group."""
    pp: int = 1
    """Pipeline parallel size."""
    vpp: int = 1
    """Runs of layers on each pipeline stage: above 1 the pipeline is interleaved,
    and its bubble shrinks that many times."""
    ep: int = 1
    """Expert parallel size."""
    etp: int = 1
    """Tensor parallel size inside each expert."""
    expert_dispatcher: Literal["alltoall", "allgather", "deepep", "hybridep"] = "alltoall"
    """How tokens reach their experts: each to its own (alltoall), or all to all processes (allgather; small
    `ep`, many experts for each token), or each to its own by the kernels of DeepEP or HybridEP on GPUs."""
    zero1: bool = False
    """ZeRO-1: every data-parallel process keeps and updates its share of the optimizer's
    state, not all of it."""
    overlap_grad_reduce: bool = False
    """Sum gradients over data-parallel processes while the backward pass goes on, not after it."""
    overlap_param_gather: bool = False
    """Gather updated weights while the next forward pass goes on, not before it; needs zero1 and
    overlap_grad_reduce."""
    bucket_params: int = 0
    """Parameters that are sent at a time under overlap_grad_reduce; 0: 40 million, or 1 million per
    data-parallel process."""
    pipeline_layout: tuple[int, ...] = ()
    """Layers of each pipeline stage, where they are not to be equal; with `vpp` of each of its runs, in the
    order of the layers (the first runs of all stages come first). Empty: all have as many."""
    cp: int = 1
    """Context parallel size: processes that share each row of tokens, for long samples."""
    timeout_s: float = 1800.0
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

    def problems(self, model: ModelConfig, num_ranks: int) -> list[str]:
        """Return one sentence for each rule that this layout breaks for `model` on `num_ranks` processes."""
        p = []
        sizes = {"tp": self.tp, "pp": self.pp, "vpp": self.vpp, "ep": self.ep, "etp": self.etp, "cp": self.cp}
        for name, size in sizes.items():
            if size < 1:
                p.append(f"parallel.{name} = {size} must be at least 1")
        if p:
            return p
        for name in ("num_heads", "num_kv_heads"):
            value = getattr(model, name)
            if value % self.tp:
                p.append(f"parallel.tp = {self.tp} must divide model.{name} = {value}; {_divisors(value)}")
        if model.has_dense_layers() and model.dense_ffn_dim % self.tp:
            p.append(f"parallel.tp = {self.tp} must divide model.dense_ffn_dim = {model.dense_ffn_dim}")
        if model.latent_attention is not None and self.tp > 1 and not self.sp:
            p.append(f"parallel.sp = {self.sp} must be true when model.latent_attention meets parallel.tp = "
                     f"{self.tp} > 1")
        p += self._expert_problems(model)
        if self.sp and self.tp == 1:
            p.append("parallel.sp = True needs parallel.tp > 1; leave it out or raise tp")
        p += self._uneven_pipeline_problems(model) if self.pipeline_layout else self._pipeline_problems(model)
        if self.vpp > 1 and self.pp == 1:
            p.append(f"parallel.vpp = {self.vpp} needs parallel.pp > 1; leave it out or raise pp")
        if self.overlap_param_gather and not (self.zero1 and self.overlap_grad_reduce):
            p.append("parallel.overlap_param_gather = True needs parallel.zero1 and "
                     f"parallel.overlap_grad_reduce, which are {self.zero1} and {self.overlap_grad_reduce}; "
                     "set both or leave it out")
        p += self._yarn_problems(model) + self._out_of_range()
        for names in (("tp", "pp", "cp"), ("etp", "ep", "pp")):
            size = 1
            for name in names:
                size *= sizes[name]
            if num_ranks % size:
                product = " x ".join(f"{n} {sizes[n]}" for n in names)
                p.append(f"parallel {product} = {size} must divide the number of processes, {num_ranks}; "
                         f"start a multiple of {size} (--nproc) or lower one of them")
        return p

    def _expert_problems(self, model: ModelConfig) -> list[str]:
        """Tell how experts cannot be divided."""
        p = []
        if not model.num_moe_layers() and (self.ep > 1 or self.etp > 1):
            p.append(f"parallel.ep = {self.ep} and parallel.etp = {self.etp} must be 1: "
                     f"model.num_experts = {model.num_experts}, so there are no experts to divide")
        elif model.num_moe_layers():
            if model.num_experts % self.ep:
                p.append(f"parallel.ep = {self.ep} must divide model.num_experts = {model.num_experts}; "
                         f"{_divisors(model.num_experts)}")
            if model.expert_ffn_dim % self.etp:
                p.append(f"parallel.etp = {self.etp} must divide model.expert_ffn_dim = "
                         f"{model.expert_ffn_dim}")
            if model.linear_bias and self.etp > 1:
                p.append(f"parallel.etp = {self.etp} must be 1: megatron-core cuts no experts that have "
                         "biases (model.linear_bias); raise parallel.ep")
            shared = model.num_shared_experts * model.expert_ffn_dim
            if shared % self.tp:
                p.append(f"parallel.tp = {self.tp} must divide the width of the shared experts, "
                         f"model.num_shared_experts {model.num_shared_experts} x model.expert_ffn_dim "
                         f"{model.expert_ffn_dim} = {shared}; {_divisors(shared)}")
            if self.tp > 1 and not self.sp:
                p.append(f"parallel.sp = {self.sp} must be true when experts meet parallel.tp = "
                         f"{self.tp} > 1")
        return p

    def _pipeline_problems(self, model: ModelConfig) -> list[str]:
        """Tell what is wrong with a pipeline of equal stages."""
        if model.num_layers % self.pp:
            return [f"parallel.pp = {self.pp} must divide model.num_layers = {model.num_layers}; "
                    f"{_divisors(model.num_layers)}; or give each stage's layers in parallel.pipeline_layout"]
        layers = model.num_layers // self.pp
        if layers % self.vpp:
            return [f"parallel.vpp = {self.vpp} must divide the {layers} layers of each pipeline stage; "
                    f"{_divisors(layers)}"]
        return []

    def _uneven_pipeline_problems(self, model: ModelConfig) -> list[str]:
        """Tell what is wrong with an uneven pipeline."""
        given = f"parallel.pipeline_layout = {list(self.pipeline_layout)}"
        runs, p = self.pp * self.vpp, []
        if self.pp == 1:
            p.append(f"{given} needs parallel.pp > 1; leave it out or raise pp")
        elif len(self.pipeline_layout) != runs:
            p.append(f"{given} has {len(self.pipeline_layout)} numbers and must have one for each of "
                     f"parallel.pp {self.pp} x parallel.vpp {self.vpp} = {runs} runs of layers")
        elif min(self.pipeline_layout) < 1:
            p.append(f"{given} must give every stage a layer at least")
        elif sum(self.pipeline_layout) != model.num_layers:
            p.append(f"{given} adds up to {sum(self.pipeline_layout)} layers and must to model.num_layers = "
                     f"{model.num_layers}")
        return p

    def _yarn_problems(self, model: ModelConfig) -> list[str]:
        """Tell what cannot be cut of YaRN's tables, which megatron-core makes for the original context and
        cuts as it does rows."""
        if model.yarn is None or self.cp == 1 or model.yarn.original_max_position_tokens % (2 * self.cp) == 0:
            return []
        return [f"parallel.cp = {self.cp}: 2 x cp = {2 * self.cp} must divide "
                "model.yarn.original_max_position_tokens = "
                f"{model.yarn.original_max_position_tokens}, whose table of positions the processes share; "
                f"{_divisors(model.yarn.original_max_position_tokens // 2)}"]

    def _out_of_range(self) -> list[str]:
        rules = [(self.bucket_params >= 0,
                  f"parallel.bucket_params = {self.bucket_params} must not be negative"),
                 (0 < self.timeout_s < math.inf, f"parallel.timeout_s = {self.timeout_s} must be above 0")]
        return [sentence for holds, sentence in rules if not holds]


def _divisors(n: int) -> str:
    found = [d for d in range(1, min(n, 128) + 1) if n % d == 0]
    return "use one of " + ", ".join(map(str, found))
