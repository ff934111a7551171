"""Training records on rank 0: events, trackers, the progress bar and warnings.

On ranks above 0 the same calls write nothing. No method is collective.
"""

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
from megatron_sov.runs.launch_environment import read_processor_name
from megatron_sov.runs.obs.events import EVENTS, EventLog
from megatron_sov.runs.obs.history import NO_GRADIENT, SKIPPED_BY_SETTING
from megatron_sov.runs.obs.meters import LOSS, Meter, build_headline_fields, format_step
from megatron_sov.runs.obs.routing import max_violation
from megatron_sov.runs.obs.trackers import Trackers
from megatron_sov.train.checkpointer import TrainState
from megatron_sov.train.data.ledger import LedgerEntry
from megatron_sov.train.data.sources import Source, describe_input, describe_inputs
from megatron_sov.train.guards.step_guard import StepRejection
from megatron_sov.train.objectives.heldout_evaluator import HeldoutLoss
from megatron_sov.work.clusters.chips import find_device_chip
from megatron_sov.work.progress.progress_bar import ProgressBar

MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024
"""Bytes per unit in `ru_maxrss`, a process's peak memory."""
CARD_TFLOPS = {"NVIDIA H100 PCIe": 756.0, "NVIDIA H100 NVL": 835.5, "NVIDIA H200 NVL": 835.5}
"""CUDA device name of a PCIe card outside the chip table -> dense bf16 peak, which is half the data sheet's
figure with sparsity."""


@dataclass(frozen=True)
class StepResult:
    """Figures for an optimizer step."""

    loss: float
    """Total loss: coefficient x normalised loss, summed over terms."""
    losses: dict[str, float]
    """Term -> normalised loss."""
    losses_by_source: dict[str, float]
    """Source -> mean loss per target in the batch."""
    grad_norm: float
    """Gradient norm before clipping."""
    lr: float
    """Learning rate."""
    num_tokens: int
    """Tokens in the batch, without padding."""
    phase: str
    """Curriculum phase."""
    padding_share: float
    """Padding tokens / all tokens in the batch."""
    seq_len: int
    """Tokens per sample."""
    seconds: float = field(default=0.0)
    """Wall time."""
    meters: dict[str, float] = field(default_factory=dict)
    """Objective or feed meter -> mean over the batch."""


class Recorder:
    """Writes a run's records."""

    def __init__(self, config: RunConfig, world: ParallelWorld, num_steps: int,
                 began_s: float | None = None) -> None:
        """Prepare records without opening a file.

        `began_s` is the Unix time at which work on the run began; default: now.
        """
        self.headline: tuple[Meter, ...] = (LOSS,)
        """The run's main meters, see `get_headline`."""
        self._comparable = True
        self._config, self._world, self._num_steps = config, world, num_steps
        self._began_s = time.time() if began_s is None else began_s
        self._efficiency = Efficiency(config, world.size)
        self.events = EventLog(None)
        """Event log; closed on ranks above 0."""
        self._trackers: Trackers | None = None
        self._progress: ProgressBar | None = None
        self._over_epochs: set[str] = set()
        self._has_warned_about_meters = False

    def show_meters(self, headline: tuple[Meter, ...], *, comparable: bool) -> None:
        """Set the headline meters; `comparable`: whether to show the loss, too."""
        self.headline, self._comparable = headline, comparable

    def open(self, run: Path) -> None:
        """Open `events.jsonl` and trackers in the folder `run`, on rank 0 only."""
        self._trackers = Trackers(self._config.obs, run, self._config.to_dict())
        self.events = EventLog(run / EVENTS, self._trackers.observe)

    def record_start(self, step: int, resumed_from: str | None, sources: list[Source],
                     entries: Sequence[LedgerEntry], start: Path | None = None,
                     extra_inputs: Sequence[Mapping[str, str]] = ()) -> None:
        """Record settings, inputs and machine of the run, and open the progress bar at `step`.

        `resumed_from` names the run's own checkpoint, and `start` is the checkpoint with start weights.
        `extra_inputs` are results of `describe_input`.
        """
        config, write = self._config, self.events.write
        if resumed_from is not None:
            write("resume", step=step, reason=f"continued from {resumed_from}")
        count = count_params(config.model)
        te = specs.uses_transformer_engine(specs.PRECISION[config.train.precision])
        inputs = describe_inputs(sources)
        if start is not None:
            inputs.append(describe_input(CHECKPOINT_KIND, start))
        write("run_start", recipe=config.recipe, num_ranks=self._world.size,
              layout={**asdict(config.parallel), "dp": self._world.dp_size}, num_params=count.total,
              num_active_params=count.active, num_steps=self._num_steps, resumed_from=step,
              began_s=self._began_s, on_gpu=on_gpu(), gpu=gpu_settings.resolve_auto_settings(config, te),
              **build_headline_fields(self.headline, comparable=self._comparable),
              inputs=[*inputs, *extra_inputs],
              machine={"host": platform.node(), "device": read_device_name(),
                       "python": platform.python_version(),
                       "torch": torch.__version__, "threads": torch.get_num_threads()})
        for entry in entries:
            write("phase", step=entry.first_step, name=entry.phase, blend=entry.weights,
                  seq_len=entry.seq_len, global_batch_size=entry.global_batch_size, skip=entry.skip)
        if self._world.is_main:
            self._progress = ProgressBar(self._num_steps, step, config.recipe)

    def is_due(self, step: int) -> bool:
        return step % self._config.train.log_every_steps == 0 or step == self._num_steps

    def record_step(self, state: TrainState, result: StepResult, load: torch.Tensor | None) -> None:
        """Record a learned step in events, trackers and the progress bar, unless `load` is None.

        `state` counts this step, too. `load` is [layers, experts]: tokens per expert, 0 in dense layers.
        """
        if load is None:
            return
        routed = load[load.sum(dim=1) > 0]
        figures = self._efficiency.compute_figures(result.num_tokens, result.seq_len, result.seconds)
        if len(routed):
            figures["max_violation"] = float(max_violation(routed.numpy()).max())
        meters = {"meters": result.meters} if result.meters else {}
        tokens_per_s = result.num_tokens / result.seconds
        self.events.write(
            "step", step=state.step, loss=result.loss, losses=result.losses,
            losses_by_source=result.losses_by_source, grad_norm=result.grad_norm, lr=result.lr,
            tokens=state.tokens, step_time_s=result.seconds, tokens_per_s=tokens_per_s, phase=result.phase,
            padding_share=result.padding_share, **meters, **figures)
        if self._trackers is not None:
            self._trackers.log_step(state.step, {
                "loss": result.loss, "grad_norm": result.grad_norm, "learning_rate": result.lr,
                "tokens_per_s": tokens_per_s, **figures,
                **{f"loss/{term}": value for term, value in result.losses.items()},
                **{f"meter/{name}": value for name, value in result.meters.items()}})
        if self._progress is not None:
            event = {"loss": result.loss, "losses": result.losses, **meters}
            text = format_step(event, self.headline, comparable=self._comparable)
            self._progress.update(state.step, text, tokens_per_s)

    def record_skipped_step(self, step: int, meters: Mapping[str, float]) -> None:
        """Record that the batch for `step` (from 1) was skipped, with its round's `meters`.

        Either `data.skip_steps` names the step, or its batch would change no weight.
        """
        is_setting = any(first <= step <= last for first, last in self._config.data.skip_steps)
        fields = {"meters": dict(meters)} if meters else {}
        self.events.write("skip", step=step, reason=SKIPPED_BY_SETTING if is_setting else NO_GRADIENT,
                          **fields)
        if self._trackers is not None and meters:
            self._trackers.log_step(step, {f"meter/{name}": value for name, value in meters.items()})

    def record_rejected_step(self, step: int, rejection: StepRejection, ranks: list[int]) -> None:
        """Record a step that was computed and not learned; `ranks` had non-finite loss sums."""
        self.events.write("skip", step=step, reason=rejection.reason, loss=rejection.loss,
                          grad_norm=rejection.grad_norm, ranks=ranks)
        if self._world.is_main:
            where = f" (not finite on rank {', '.join(map(str, ranks))})" if ranks else ""
            warn(f"step {step}: rejected: {rejection.reason}{where}")

    def warn_about_meters(self, step: int, doubt: str) -> None:
        """Warn with the first non-empty result from `get_doubt`."""
        if doubt and not self._has_warned_about_meters:
            self._has_warned_about_meters = True
            if self._world.is_main:
                warn(f"step {step}: {doubt}", self.events.write, step=step)

    def warn_about_epochs(self, step: int, epochs: dict[str, float]) -> None:
        """Warn once per source if its passes in `epochs` exceed `data.max_epochs`."""
        limit = self._config.data.max_epochs
        if limit and self._config.train.epochs:  # requested; the last step is completed with another epoch
            limit = max(limit, self._config.train.epochs + 1)
        for name, count in epochs.items():
            if limit and count > limit and name not in self._over_epochs:
                self._over_epochs.add(name)
                if self._world.is_main:
                    warn(f"source {name}: {count:.1f} epochs, more than data.max_epochs = {limit:g}; add "
                         "data or lower its weight", self.events.write, step=step)

    def record_expert_load(self, step: int, load: torch.Tensor, **fields: Any) -> None:
        """Record each expert's share of its layer's tokens.

        `load` is [layers, experts]: token counts, 0 in dense layers. `fields` go into the event.
        """
        layers = [layer for layer in range(len(load)) if load[layer].sum() > 0]
        if layers:
            shares = [(load[layer] / load[layer].sum()).tolist() for layer in layers]
            self.events.write("expert_load", step=step, load=shares, layers=[layer + 1 for layer in layers],
                              **fields)

    def record_evaluation(self, step: int, results: dict[str, HeldoutLoss], consumed: dict[str, int],
                          planned: dict[str, int], over_long: dict[str, int]) -> None:
        """Record held-out losses, and tokens read per source next to the ledger's plan.

        Each dict maps source names: `consumed` to tokens read, `planned` to tokens that the ledger plans up
        to `step`, `over_long` to the number of conversations longer than a sample.
        """
        self.events.write("eval", step=step, heldout={name: asdict(r) for name, r in results.items()})
        fields: dict[str, Any] = {}
        if over_long:
            fields = {"over_long": over_long, "over_long_are": self._config.data.over_long}
        self.events.write("data_consumed", step=step, tokens=consumed, plan=planned, **fields)

    def record_checkpoint(self, saved: SavedCheckpoint) -> None:
        self.events.write("checkpoint", step=saved.step, path=f"{saved.path.parent.name}/{saved.path.name}",
                          save_s=saved.save_s, stall_s=saved.stall_s)

    def record_memory(self, step: int, by_rank_bytes: Sequence[float]) -> None:
        """Record each pipeline stage's peak memory and the rank with this peak.

        `by_rank_bytes` has the peak of each rank; ranks of a stage are consecutive.
        """
        num_stages = self._config.parallel.pp
        per_stage = len(by_rank_bytes) // num_stages
        peaks: list[float] = []
        ranks: list[int] = []
        for first in range(0, num_stages * per_stage, per_stage):
            rank = max(range(first, first + per_stage), key=by_rank_bytes.__getitem__)
            peaks.append(by_rank_bytes[rank])
            ranks.append(rank)
        self.events.write("memory", step=step, peak_memory_bytes=peaks, ranks=ranks)

    def record_gate_failure(self, step: int, text: str) -> None:
        """Record that the stage ended before `Gate.passed`."""
        self.events.write("gate_failed", step=step, text=text)

    def record_hang(self, step: int, places: dict[str, list[int]]) -> None:
        """Record a step without progress; `places` maps a code location to the ranks waiting there."""
        self.events.write("hang", step=step, places=places)

    def record_stop(self, step: int, reason: str | None) -> None:
        """Record that the run stops early, fully saved; `reason` is None if another rank got the signal."""
        self.events.write("stop", step=step, reason=reason or "another process was asked to stop")

    def record_end(self, step: int, wall_s: float, final_loss: float | None) -> None:
        self.events.write("run_end", step=step, wall_s=wall_s, final_loss=final_loss)
        if self._progress is not None:
            self._progress.close()
            self._progress = None

    def close(self) -> None:
        if self._progress is not None:
            self._progress.close()
        if self._trackers is not None:
            self._trackers.close()
        self.events.close()


class Efficiency:
    """Computes this process's throughput, model FLOPs utilisation (MFU) and peak memory."""

    def __init__(self, config: RunConfig, num_ranks: int) -> None:
        peak_tflops = find_peak_tflops(torch.cuda.get_device_name()) if on_gpu() else None
        self._model, self._num_ranks = config.model, num_ranks
        self._peak_tflops = config.gpu.peak_tflops or peak_tflops

    def compute_figures(self, num_tokens: int, seq_len: int, seconds: float) -> dict[str, float]:
        """Return `step` event field -> value.

        `num_tokens` counts over all ranks, `seq_len` is tokens per sample, `seconds` the step's wall time.
        """
        tokens_per_s = num_tokens / seconds / self._num_ranks
        tflops = tokens_per_s * compute_train_flops_per_token(self._model, seq_len) / 1e12
        figures = {"tokens_per_s_per_process": tokens_per_s, "tflops_per_process": tflops}
        if self._peak_tflops:
            figures["mfu"] = tflops / self._peak_tflops
        return figures | read_peak_memory()


def find_peak_tflops(device_name: str) -> float | None:
    """Return a GPU's dense bf16 peak in TFLOP/s by its CUDA name, or None for unknown devices."""
    chip = find_device_chip(device_name)
    return chip.bf16_flops_per_s / 1e12 if chip else CARD_TFLOPS.get(device_name)


def read_peak_memory() -> dict[str, float]:
    """Return this process's peak memory in bytes: on its GPU, or on the host without a GPU."""
    if on_gpu():
        return {"peak_memory_bytes": torch.cuda.max_memory_allocated(),
                "reserved_memory_bytes": torch.cuda.max_memory_reserved()}
    return {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_BYTES}


def read_device_name() -> str:
    """Return this machine's GPU name, or its processor name without a GPU."""
    if on_gpu():
        return str(torch.cuda.get_device_name())
    return read_processor_name()
