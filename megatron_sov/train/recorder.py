"""What a run tells about itself: events, trackers, the progress bar,
and warnings that concern no single step.

Rank 0 opens the records; on the other processes the same calls drop what they are given.  Nothing
here is a collective.
"""

from __future__ import annotations

import platform
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_sov.base.errors import warn
from megatron_sov.checkpoint.save import SavedCheckpoint
from megatron_sov.engine.model import gpu_settings, specs
from megatron_sov.engine.parallel.device import on_gpu
from megatron_sov.engine.parallel.world import ParallelWorld
from megatron_sov.model.config import RunConfig
from megatron_sov.model.families.count import compute_train_flops_per_token, count_params
from megatron_sov.runs.checkpoints import CHECKPOINT_KIND
from megatron_sov.runs.obs.events import EVENTS, EventLog
from megatron_sov.runs.obs.history import NO_GRADIENT, SKIPPED_BY_SETTING
from megatron_sov.runs.obs.meters import LOSS, Meter, build_headline_fields, format_step
from megatron_sov.runs.obs.routing import max_violation
from megatron_sov.runs.obs.trackers import Trackers
from megatron_sov.train.checkpointer import TrainState
from megatron_sov.train.data.ledger import LedgerEntry
from megatron_sov.train.data.token_shards import Source, as_input, provenance
from megatron_sov.train.guards.step_guard import Refusal
from megatron_sov.train.objectives.heldout_evaluator import HeldoutLoss
from megatron_sov.work.clusters.chips import find_device_chip
from megatron_sov.work.progress.progress_bar import ProgressBar


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gave."""

    loss: float
    """Total loss: coefficients times normalised terms."""
    losses: dict[str, float]
    """Term -> normalised loss."""
    losses_by_source: dict[str, float]
    """Source -> mean loss of its targets in this batch."""
    grad_norm: float
    """Before clipping."""
    lr: float
    """Learning rate of the step."""
    num_tokens: int
    """Tokens of the batch."""
    phase: str
    """Phase of the curriculum."""
    padding_share: float
    """Part of the batch that was padding."""
    seq_len: int
    """Tokens of a sample."""
    seconds: float = field(default=0.0)
    """Wall time of the step."""
    meters: dict[str, float] = field(default_factory=dict)
    """Meter of the objective -> its mean over the batch."""


CPU_INFO = Path("/proc/cpuinfo")


def device_name() -> str:
    """Return what this machine's GPUs, or its processor, call themselves."""
    if on_gpu():
        return str(torch.cuda.get_device_name())
    lines = CPU_INFO.read_text(encoding="utf-8").splitlines() if CPU_INFO.is_file() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "") or platform.processor() or platform.machine()


# How well a step used its machine: model FLOPs, their share of the GPU's peak, memory.

MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024
"""What the system counts a process's memory in."""

CARD_TFLOPS = {"NVIDIA H100 PCIe": 756.0, "NVIDIA H100 NVL": 835.5, "NVIDIA H200 NVL": 835.5}
"""What CUDA calls cards for PCIe, which are in no table of chips -> dense peak in bf16, half of a data
sheet's figure with sparsity."""


def peak_tflops(device_name: str) -> float | None:
    """Return the dense peak of a GPU in bf16, TFLOP/s, by CUDA's name for it; None: it is not known."""
    chip = find_device_chip(device_name)
    return chip.bf16_flops_per_s / 1e12 if chip else CARD_TFLOPS.get(device_name)


class Efficiency:
    """The figures of a step, for this process."""

    def __init__(self, config: RunConfig, num_ranks: int) -> None:
        known = peak_tflops(torch.cuda.get_device_name()) if on_gpu() else None
        self._model, self._num_ranks = config.model, num_ranks
        self._peak_tflops = config.gpu.peak_tflops or known

    def figures(self, num_tokens: int, seq_len: int, seconds: float) -> dict[str, float]:
        """Return field of a `step` event -> value.

        Args:
            num_tokens: tokens of the step, over all processes.
            seq_len: tokens of a row's samples.
            seconds: the step's time.
        """
        per_process = num_tokens / seconds / self._num_ranks
        tflops = per_process * compute_train_flops_per_token(self._model, seq_len) / 1e12
        found = {"tokens_per_s_per_process": per_process, "tflops_per_process": tflops}
        if self._peak_tflops:
            found["mfu"] = tflops / self._peak_tflops
        return found | peak_memory()


def peak_memory() -> dict[str, float]:
    """Return the most memory that this process has had so far: on its GPU, else of the host."""
    if on_gpu():
        return {"peak_memory_bytes": torch.cuda.max_memory_allocated(),
                "reserved_memory_bytes": torch.cuda.max_memory_reserved()}
    return {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_BYTES}


class Recorder:
    """The records of one run, as one process sees them."""

    def __init__(self, config: RunConfig, world: ParallelWorld, num_steps: int,
                 began_s: float | None = None) -> None:
        """Open nothing yet.

        Args:
            config: the run's settings.
            world: this process's place.
            num_steps: the run's last step.
            began_s: Unix time at which the work on the run began; None: now.
        """
        self.headline: tuple[Meter, ...] = (LOSS,)
        """By which the run is judged."""
        self._comparable = True
        self._config, self._world, self._num_steps = config, world, num_steps
        self._began_s = time.time() if began_s is None else began_s
        self._efficiency = Efficiency(config, world.size)
        self.events = EventLog(None)
        """The run's events; open on rank 0, dropped elsewhere."""
        self._trackers: Trackers | None = None
        self._progress: ProgressBar | None = None
        self._over_epochs: set[str] = set()
        self._has_doubted = False

    def judge_by(self, headline: tuple[Meter, ...], *, comparable: bool) -> None:
        """Show an objective's meters from now on; `comparable`: and its loss, where it says something."""
        self.headline, self._comparable = headline, comparable

    def open(self, run: Path) -> None:
        """Open events and trackers; called on rank 0 only."""
        self._trackers = Trackers(self._config.obs, run, self._config.to_dict())
        self.events = EventLog(run / EVENTS, self._trackers.observe)

    def begin(self, step: int, continued_from: str | None, sources: list[Source],
              entries: Sequence[LedgerEntry], start: Path | None = None,
              besides: Sequence[Mapping[str, str]] = ()) -> None:
        """Tell what runs where.

        Args:
            step: optimizer steps done before.
            continued_from: name of the run's own checkpoint that it goes on from.
            sources: what is read.
            entries: the ledger.
            start: the checkpoint whose weights it starts from; None: none, or it goes on from its own.
            besides: what else it learns from, each as `provenance` has it.
        """
        config, write = self._config, self.events.write
        if continued_from is not None:
            write("resume", step=step, reason=f"continued from {continued_from}")
        count = count_params(config.model)
        te = specs.uses_transformer_engine(specs.PRECISION[config.train.precision])
        write("run_start", recipe=config.recipe, num_ranks=self._world.size,
              layout={**asdict(config.parallel), "dp": self._world.dp_size}, num_params=count.total,
              num_active_params=count.active, num_steps=self._num_steps, resumed_from=step,
              began_s=self._began_s, on_gpu=on_gpu(),
              gpu=gpu_settings.resolve_auto_settings(config, te),
              **build_headline_fields(self.headline, comparable=self._comparable),
              inputs=[*provenance(sources), *([] if start is None else [as_input(CHECKPOINT_KIND, start)]),
                      *besides],
              machine={"host": platform.node(), "device": device_name(), "python": platform.python_version(),
                       "torch": torch.__version__, "threads": torch.get_num_threads()})
        for entry in entries:
            write("phase", step=entry.first_step, name=entry.phase, blend=entry.weights,
                  seq_len=entry.seq_len, global_batch_size=entry.global_batch_size, skip=entry.skip)
        if self._world.is_main:
            self._progress = ProgressBar(self._num_steps, step, config.recipe)

    def is_due(self, step: int) -> bool:
        return step % self._config.train.log_every_steps == 0 or step == self._num_steps

    def step(self, done: TrainState, result: StepResult, load: torch.Tensor | None) -> None:
        """Tell what a step gave, if it is due.

        Args:
            done: how far the run is, this step included.
            result: what the step gave.
            load: [layers, experts] tokens of its experts; rows of dense layers are zero,
                None is for a step that is not due.
        """
        if load is None:
            return
        routed = load[load.sum(dim=1) > 0]
        figures = {"max_violation": float(max_violation(routed.numpy()).max())} if len(routed) else {}
        meters = {"meters": result.meters} if result.meters else {}
        tokens_per_s = result.num_tokens / result.seconds
        used = self._efficiency.figures(result.num_tokens, result.seq_len, result.seconds)
        self.events.write(
            "step", step=done.step, loss=result.loss, losses=result.losses,
            losses_by_source=result.losses_by_source, grad_norm=result.grad_norm, lr=result.lr,
            tokens=done.tokens, step_time_s=result.seconds, tokens_per_s=tokens_per_s, phase=result.phase,
            padding_share=result.padding_share, **meters, **used, **figures)
        if self._trackers is not None:
            self._trackers.log_step(done.step, {
                "loss": result.loss, "grad_norm": result.grad_norm, "learning_rate": result.lr,
                "tokens_per_s": tokens_per_s, **used, **figures,
                **{f"loss/{t}": v for t, v in result.losses.items()},
                **{f"meter/{name}": v for name, v in result.meters.items()}})
        if self._progress is not None:
            event = {"loss": result.loss, "losses": result.losses, **meters}
            self._progress.update(done.step, format_step(event, self.headline, comparable=self._comparable),
                                  tokens_per_s)

    def passed_over(self, step: int, meters: Mapping[str, float]) -> None:
        """Tell that a step's batch was passed over: the settings say so, or it is of a round and would change
        no weight.

        Args:
            step: its number, from 1.
            meters: of its round.
        """
        is_asked = any(first <= step <= last for first, last in self._config.data.skip_steps)
        self.events.write("skip", step=step, reason=SKIPPED_BY_SETTING if is_asked else NO_GRADIENT,
                          **({"meters": dict(meters)} if meters else {}))
        if self._trackers is not None and meters:
            self._trackers.log_step(step, {f"meter/{name}": value for name, value in meters.items()})

    def refused(self, step: int, refusal: Refusal, ranks: list[int]) -> None:
        """Tell that a step was computed and is not learned, and on which ranks its numbers are not finite."""
        self.events.write("skip", step=step, reason=refusal.reason, loss=refusal.loss,
                          grad_norm=refusal.grad_norm, ranks=ranks)
        if self._world.is_main:
            where = f" (not finite on rank {', '.join(map(str, ranks))})" if ranks else ""
            warn(f"step {step} is not learned: {refusal.reason}{where}")

    def doubted(self, step: int, doubt: str) -> None:
        """Warn, once a run, of what an objective doubts of its numbers; "": of nothing."""
        if doubt and not self._has_doubted:
            self._has_doubted = True
            if self._world.is_main:
                warn(f"step {step}: {doubt}", self.events.write, step=step)

    def epochs(self, step: int, epochs: dict[str, float]) -> None:
        """Warn, once for each source, that it is gone through more often than `data.max_epochs`."""
        limit = self._config.data.max_epochs
        if limit and self._config.train.epochs:  # asked for; the last step is a whole one
            limit = max(limit, self._config.train.epochs + 1)
        for name, count in epochs.items():
            if limit and count > limit and name not in self._over_epochs:
                self._over_epochs.add(name)
                if self._world.is_main:
                    warn(f"source {name} is gone through {count:.1f} times, more than data.max_epochs = "
                         f"{limit:g}; add data or lower its weight", self.events.write, step=step)

    def expert_load(self, step: int, load: torch.Tensor, **fields: Any) -> None:
        """Tell every expert's share of its layer's tokens, of [layers, experts] counts;
        rows of dense layers are zero."""
        layers = [i for i in range(len(load)) if load[i].sum() > 0]
        if layers:
            shares = [(load[i] / load[i].sum()).tolist() for i in layers]
            self.events.write("expert_load", step=step, load=shares, layers=[i + 1 for i in layers], **fields)

    def evaluated(self, step: int, results: dict[str, HeldoutLoss], consumed: dict[str, int],
                  planned: dict[str, int], over_long: dict[str, int]) -> None:
        """Tell the held-out losses, how much of each source was read beside what the ledger
        asks for, in tokens, and of how many conversations a sample did not hold all."""
        self.events.write("eval", step=step, heldout={name: asdict(r) for name, r in results.items()})
        self.events.write("data_consumed", step=step, tokens=consumed, plan=planned,
                          **({"over_long": over_long, "over_long_are": self._config.data.over_long}
                             if over_long else {}))

    def saved(self, saved: SavedCheckpoint) -> None:
        self.events.write("checkpoint", step=saved.step, path=f"{saved.path.parent.name}/{saved.path.name}",
                          save_s=saved.save_s, stall_s=saved.stall_s)

    def memory(self, step: int, by_rank_bytes: Sequence[float]) -> None:
        """Tell the most memory that the processes of each pipeline stage have had so far.

        Args:
            step: optimizer steps done.
            by_rank_bytes: of each process; those of a stage have neighbouring ranks.
        """
        num_stages = self._config.parallel.pp
        per_stage = len(by_rank_bytes) // num_stages
        stages = [by_rank_bytes[i * per_stage:(i + 1) * per_stage] for i in range(num_stages)]
        self.events.write("memory", step=step, peak_memory_bytes=[max(stage) for stage in stages],
                          ranks=[i * per_stage + max(range(per_stage), key=stage.__getitem__)
                                 for i, stage in enumerate(stages)])

    def gate_failed(self, step: int, text: str) -> None:
        """Tell that the stage is over and its gate has not passed."""
        self.events.write("gate_failed", step=step, text=text)

    def hang(self, step: int, places: dict[str, list[int]]) -> None:
        """Tell where processes stood when a step made no progress: place -> ranks."""
        self.events.write("hang", step=step, places=places)

    def stopped(self, step: int, reason: str | None) -> None:
        """Tell that the run ends before its last step, with everything saved; None:
        this process was not asked."""
        self.events.write("stop", step=step, reason=reason or "another process was asked to stop")

    def ended(self, step: int, wall_s: float, final_loss: float | None) -> None:
        self.events.write("run_end", step=step, wall_s=wall_s, final_loss=final_loss)
        if self._progress is not None:
            self._progress.close()
            self._progress = None

    def close(self) -> None:
        """End the records."""
        if self._progress is not None:
            self._progress.close()
        if self._trackers is not None:
            self._trackers.close()
        self.events.close()
