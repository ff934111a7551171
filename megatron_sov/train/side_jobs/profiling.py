"""A trace of some steps of process 0: what each took, to be read in Perfetto (ui.perfetto.dev) or Chrome."""

from __future__ import annotations

from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from megatron_sov.base.artifacts import disk_errors
from megatron_sov.engine.mcore.parallel.device import on_gpu
from megatron_sov.model.config import GpuConfig

FOLDER = "profile"


class Profiling:
    """Watches the steps that the settings name; of a run that goes on behind the first, what is left."""

    def __init__(self, config: GpuConfig, run: Path, is_main: bool) -> None:
        self._steps = range(config.profile_first_step, config.profile_last_step + 1 if is_main else 0)
        self._folder = run / FOLDER
        self._profile: profile | None = None
        self._began_at = 0

    def before_step(self, step: int) -> None:
        """Begin to watch, if `step` (1-based) is one to be watched."""
        if step in self._steps and step > 0 and self._profile is None:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu() else [])]
            self._profile, self._began_at = profile(activities=activities, record_shapes=True), step
            self._profile.start()

    def after_step(self, step: int) -> None:
        """Write the trace, if `step` was the last one to be watched."""
        if self._profile is not None and step >= self._steps[-1]:
            self._write(step)

    def _write(self, step: int) -> None:
        assert self._profile is not None
        self._profile.stop()
        trace = self._folder / f"steps-{self._began_at}-{step}.json.gz"
        with disk_errors(trace):
            self._folder.mkdir(exist_ok=True)
            unfinished = trace.with_name(f".{trace.name}")  # its end says that it is to be compressed
            self._profile.export_chrome_trace(str(unfinished))
            unfinished.replace(trace)
        self._profile = None

    def close(self, step: int) -> None:
        """Write what there is of a run that ends earlier."""
        if self._profile is not None:
            self._write(step)
