"""Activation bytes that `plan` predicts, compared with the tensors that autograd saves in a complete step.

Usage: python benchmarks/plan_activations.py > benchmarks/results/plan_activations.txt

Tiny models in float32 are trained for one step, with a process per rank of their layout.  The storage of
every tensor that autograd saves is counted once, until autograd frees it; weights are left out.  `measured`
is the peak, averaged over the ranks of a pipeline stage; `predicted` is `plan`'s figure for that stage
(`plan/footprint/activations.py`).  Of several stages, the one with the largest error is printed.  Routers are
untrained, so a rank's experts can get more or fewer tokens than the even share that `plan` assumes.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from long_sequence import build_trainer, measure_ranks
from measurement import describe_machine

from megatron_sov import recipes
from megatron_sov.engine.parallel import world
from megatron_sov.model.config import RunConfig, apply_settings
from megatron_sov.plan.footprint.activations import estimate_stored

COMMON = ("train.precision=fp32", "train.steps=1", "train.eval_every_steps=0", "data.prefetch_steps=0",
          "train.micro_batch_size=1", "train.global_batch_size=1")
SEQ_LEN = 512


@dataclass(frozen=True)
class Case:
    """A configuration that is measured."""

    name: str
    recipe: str
    settings: tuple[str, ...] = ()
    nproc: int = 1
    seq_len: int = SEQ_LEN

    @property
    def config(self) -> RunConfig:
        """The recipe changed by COMMON, the sequence length and `settings`."""
        phases = json.dumps([{"name": "main", "seq_len": self.seq_len}])
        return apply_settings(recipes.get(self.recipe), [
            *COMMON, f"data.phases={phases}", *self.settings])


def _modules(*names: str) -> tuple[str, str]:
    """Return the settings that recompute only these modules."""
    return "train.recompute=selective", f"gpu.recompute_modules={json.dumps(names)}"


TP2 = ("parallel.tp=2", "parallel.sp=true")
FULL = "train.recompute=true"
SOLAR, EXAONE, QWEN, QWEN2 = "tiny-solar-open", "tiny-k-exaone", "tiny-qwen3", "tiny-qwen2"
SOLAR2 = "tiny-solar-open2"
CASES = (
    Case("dense", QWEN), Case("dense, recomputed", QWEN, (FULL,)),
    Case("dense, biases and tied embeddings", QWEN2),
    Case("dense, feed-forward recomputed", QWEN, _modules("mlp")),
    Case("dense, attention recomputed", QWEN, _modules("core_attn")),
    Case("dense, 4,096 tokens", QWEN, seq_len=4096),
    Case("dense, 4,096 tokens, recomputed", QWEN, (FULL,), seq_len=4096),
    Case("dense, tp 2", QWEN, ("parallel.tp=2",), 2), Case("dense, tp 2 with sp", QWEN, TP2, 2),
    Case("dense, cp 2", QWEN, ("parallel.cp=2",), 2),
    Case("dense, pp 2", QWEN, ("parallel.pp=2", "train.global_batch_size=4"), 2),
    Case("dense, pp 2, recomputed", QWEN, ("parallel.pp=2", "train.global_batch_size=4", FULL), 2),
    Case("dense, pp 2 with vpp 2", QWEN, ("parallel.pp=2", "parallel.vpp=2", "train.global_batch_size=4"), 2),
    Case("dense, pp 4", QWEN, ("parallel.pp=4", "train.global_batch_size=8"), 4),
    Case("dense, uneven pp 2", QWEN,
         ("parallel.pp=2", "parallel.pipeline_layout=[1,3]", "train.global_batch_size=2"), 2),
    Case("experts and a shared one", SOLAR), Case("experts, recomputed", SOLAR, (FULL,)),
    Case("experts, all of them recomputed", SOLAR, _modules("moe")),
    Case("experts, the shared one recomputed", SOLAR, _modules("shared_experts")),
    Case("experts without a shared one", "tiny-qwen3-moe"),
    Case("experts, 4 of 16", SOLAR, ("model.num_experts=16", "model.num_experts_per_token=4")),
    Case("experts, ep 2", SOLAR, ("parallel.ep=2", "train.global_batch_size=2"), 2),
    Case("experts, tp 2 with sp, etp 2", SOLAR, (*TP2, "parallel.etp=2"), 2),
    Case("experts, pp 2 with ep 2", SOLAR,
         ("parallel.pp=2", "parallel.ep=2", "train.global_batch_size=8"), 4),
    Case("windows, NoPE, prediction layer", EXAONE), Case("the same, recomputed", EXAONE, (FULL,)),
    Case("the same, 4,096 tokens", EXAONE, seq_len=4096), Case("the same, tp 2 with sp", EXAONE, TP2, 2),
    Case("the same, cp 2", EXAONE, ("parallel.cp=2",), 2),
    Case("the same, pp 2", EXAONE, ("parallel.pp=2", "train.global_batch_size=4"), 2),
    Case("the same, small chunks of the head", EXAONE, ("train.head_chunk_tokens=64",)),
    Case("linear attention alone", SOLAR2, ("model.attention_pattern=DDDDDDG",)),
    Case("gated attention, shared expert", SOLAR2, (
        "model.attention_pattern=G", "model.linear_attention=null")),
    Case("linear and gated", SOLAR2), Case("linear, recomputed", SOLAR2, (FULL,)),
    Case("linear, other sizes", SOLAR2, (
        'model.linear_attention={"num_key_heads": 2, "num_value_heads": 2, "key_head_dim": 32, '
        '"value_head_dim": 16, "gate_rank": 8}',)),
    Case("linear, 4,096 tokens", SOLAR2, seq_len=4096), Case("linear, tp 2 with sp", SOLAR2, TP2, 2),
    Case("linear, cp 2", SOLAR2, ("parallel.cp=2",), 2),
)


class Kept:
    """What autograd keeps in place of a saved tensor; its deletion reduces the counter."""

    def __init__(self, tensor: torch.Tensor, counter: Counter, storage: int) -> None:
        self.tensor, self._counter, self._storage = tensor, counter, storage

    def __del__(self) -> None:
        self._counter.drop(self._storage)


@dataclass
class Counter:
    """Counts the bytes of storages that autograd saves, each storage once."""

    weights: set[int]
    """Addresses of storages that are not counted."""
    peak: int = 0
    """Largest number of bytes that were saved at one time."""
    _current: int = 0
    _uses: dict[int, int] = field(default_factory=dict)
    """Address of a storage -> saved tensors in it."""
    _sizes: dict[int, int] = field(default_factory=dict)
    """Address of a storage -> bytes."""

    def save(self, tensor: torch.Tensor) -> Any:
        """Count a tensor, and return what autograd keeps in its place."""
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address in self.weights or not address:  # an empty storage has address 0
            return tensor
        if address not in self._uses:
            self._uses[address], self._sizes[address] = 0, storage.nbytes()
            self._current += storage.nbytes()
            self.peak = max(self.peak, self._current)
        self._uses[address] += 1
        return Kept(tensor, self, address)

    @staticmethod
    def restore(kept: Any) -> torch.Tensor:
        """Return the tensor for which `save` returned `kept`."""
        return kept.tensor if isinstance(kept, Kept) else kept  # type: ignore[no-any-return]

    def drop(self, address: int) -> None:
        """Forget one saved tensor in the storage at `address`."""
        self._uses[address] -= 1
        if not self._uses[address]:
            self._current -= self._sizes[address]
            del self._uses[address]


def measure_saved_bytes(config: RunConfig, folder: Path) -> tuple[int, int]:
    """Train a step; return this process's pipeline stage, and the peak bytes that autograd saved."""
    from megatron.core import parallel_state

    from megatron_sov.train.loop import train_step

    trainer = build_trainer(config, world.join_world(config.parallel), folder)
    counter = Counter({weight.untyped_storage().data_ptr() for weight in trainer.model.parameters()})
    with torch.autograd.graph.saved_tensors_hooks(counter.save, counter.restore):
        train_step(trainer)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    trainer.close()
    world.leave_world()
    return stage, counter.peak


def predict_saved_bytes(config: RunConfig, stage: int, nproc: int) -> int:
    """Return the saved bytes that `plan` predicts for a process on a pipeline stage."""
    replicas = nproc // config.parallel.ranks_per_replica
    count = config.train.global_batch_size // (replicas * config.train.micro_batch_size)
    return estimate_stored(config, stage, config.data.phases[0].seq_len, count).saved


def main() -> None:
    """Measure every case and print a table."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="cases whose names hold this")
    args = parser.parse_args()
    print(f"{describe_machine()}, torch {torch.__version__}; float32, {SEQ_LEN} tokens unless noted\n")
    print(f"{'case':<40}{'ranks':>6}{'measured':>14}{'predicted':>14}{'error':>8}")
    errors = []
    for case in CASES:
        if args.only and args.only not in case.name:
            continue
        bytes_by_stage: dict[int, list[int]] = {}
        case.config.check(case.nproc)
        for stage, num_bytes in measure_ranks(partial(measure_saved_bytes, case.config), case.nproc):
            bytes_by_stage.setdefault(stage, []).append(num_bytes)
        rows = [(round(statistics.mean(counts)), predict_saved_bytes(case.config, stage, case.nproc))
                for stage, counts in bytes_by_stage.items()]
        measured, predicted = max(rows, key=lambda row: abs(row[1] / row[0] - 1))
        errors.append(predicted / measured - 1)
        print(f"{case.name:<40}{case.nproc:>6}{measured:>14,}{predicted:>14,}{errors[-1]:>+8.1%}",
              flush=True)
    print(f"\n{len(errors)} cases: median {statistics.median(map(abs, errors)):.1%} off, "
          f"worst {max(map(abs, errors)):.1%}; {sum(abs(e) <= 0.05 for e in errors)} within 5 %")


if __name__ == "__main__":
    main()
