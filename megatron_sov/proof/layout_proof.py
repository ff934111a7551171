"""Prove a layout: compare two simulated training steps on `num_ranks` ranks with the reference process."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import signal
import tempfile
import textwrap
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from layout_proof.layout import DIFFERS, EQUAL, FAILS, STANDS, TOLERANCE
from layout_proof.module_sums import ModuleSums, locate_first_step, observe_modules
from layout_proof.simulated_messages import Deadlock, MessageFault, format_failure
from layout_proof.simulated_world import SimulatedRanks, use_single_thread
from megatron_sov.base.artifacts import ArtifactWriter
from megatron_sov.base.errors import UserError
from megatron_sov.checkpoint import load
from megatron_sov.checkpoint.host_snapshot import HostSnapshot, SnapshotRecord
from megatron_sov.checkpoint.sharded_tensors import TensorReader, write_index
from megatron_sov.engine.model.local_shards import LocalShard, list_local_shards
from megatron_sov.engine.parallel.world import ParallelWorld, form_groups
from megatron_sov.model.config import ParallelConfig, RunConfig
from megatron_sov.proof.miniature import Miniature, build_miniature
from megatron_sov.runs.checkpoints import CHECKPOINT_KIND, MODEL
from megatron_sov.runs.folder import RunFolder
from megatron_sov.train.data.sources import open_sources
from megatron_sov.train.loop import train_step
from megatron_sov.train.trainer import Trainer
from megatron_sov.work.progress.progress_bar import create_bar

STEPS = 2
"""The second step shows that weights and counters after the first step agree."""
SHOWN = 8
"""Most differences in `format_proof`, and half the most call sites; `proof_to_json` has all."""
ASSUMED = ("kernels compute what their plain versions do, messages arrive as sent, and sends never wait",
           "Transformer Engine's layers, and what they send under TP and SP, do what megatron-core's own "
           "layers do, which run here",
           "widths do not matter: heads, channels, experts and vocabulary are as few as the layout divides")
FIRST_MOMENTS = ("exp_avg", "momentum")
"""Optimizer states that equal the clipped gradient after the first step, up to a factor."""
_LOSS, _OPTIMIZER = "loss of ", "optimizer"


class _StepFailed(Exception):
    """The layout refuses a step that the reference completes, e.g. for a NaN loss."""


@dataclass(frozen=True)
class ReferenceSteps:
    """Results of `run_reference` on a single process."""

    numbers: list[dict[str, float]]
    """Name -> value, per step."""
    tensors: list[dict[str, torch.Tensor]]
    """Global weights and optimizer states, per step."""
    observed: ModuleSums
    checkpoint: Path
    """Folder with the tensors after the first step."""


@dataclass
class Verdict:
    """Result of `prove_miniature`."""

    outcome: str
    """`EQUAL`, `DIFFERS`, `STANDS` or `FAILS`."""
    num_ranks: int
    largest: float = 0.0
    """Largest relative difference."""
    places: list[str] = field(default_factory=list)
    """Differing tensors and numbers, in `train_step` order."""
    sites: list[str] = field(default_factory=list)
    """Messages at the first difference."""
    losses: dict[str, float] = field(default_factory=dict)
    """Loss term -> reference value in the first step."""
    compared: dict[str, int] = field(default_factory=dict)
    """Kind -> number compared, from `_Comparison.count_values`."""
    messages: int = 0
    """Number of collective and point-to-point calls in `SimulatedRanks.sites`."""
    seconds: float = 0.0


def prove_run(config: RunConfig, num_ranks: int) -> tuple[Miniature, Verdict]:
    """Build a run's miniature and compare the layout on `num_ranks` ranks with the reference.

    Raises:
        UserError: the run's settings break a rule.
    """
    from megatron_sov.proof.random_documents import write_documents

    with _exit_on_sigterm(), tempfile.TemporaryDirectory(prefix="megatron-sov-") as folder:
        documents = Path(folder, "documents")
        small = build_miniature(config, num_ranks, documents)
        write_documents(documents, small.config)
        return small, prove_miniature(small)


def prove_miniature(small: Miniature, fault: MessageFault | None = None,
                    reference: ReferenceSteps | None = None) -> Verdict:
    """Simulate two steps of a layout, perhaps with an injected message fault, and compare the results with
    the reference (None: of `run_reference`). Raises `UserError`: settings that the model builder rejects."""
    began_s = time.monotonic()
    with use_single_thread():
        verdict = _compare_layout(small, run_reference(small) if reference is None else reference, fault)
    verdict.seconds = time.monotonic() - began_s
    return verdict


def run_reference(small: Miniature) -> ReferenceSteps:
    """Run the steps on a single rank, and write a checkpoint next to the documents.

    Raises:
        UserError: the reference fails too.
    """
    checkpoint = Path(tempfile.mkdtemp(prefix="alone-", dir=small.folder))
    try:
        [reference] = SimulatedRanks(1).run(form_groups(ParallelConfig()), lambda place: _run_reference_steps(
            small.build_reference_config(), place, checkpoint))
    except UserError as e:  # its text would blame the user's settings
        raise UserError(f"the miniature of this run breaks a rule: {e}; not proved") from e
    except Exception as e:
        raise UserError(f"one process cannot do this step: {format_failure(e)}; no layout is proved") from e
    return reference


def _compare_layout(small: Miniature, reference: ReferenceSteps, fault: MessageFault | None) -> Verdict:
    ranks = SimulatedRanks(small.num_ranks, fault)
    comparison = _Comparison(reference)
    # cached: hundreds of simulated processes read the same index
    with (create_bar("prove", small.num_ranks * (STEPS + 1), "step of a process") as bar,
          mock.patch.object(load, "TensorReader", functools.cache(TensorReader)),
          tempfile.TemporaryDirectory(prefix="layout-", dir=small.folder) as folder):
        comparison.done = bar.update
        try:
            ranks.run(form_groups(small.config.parallel), lambda place: _run_rank(
                small.config, place, comparison, ranks, Path(folder)))
            if not comparison.differs:
                comparison.add_written(_read_tensors(Path(folder)))
        except Deadlock as e:
            return Verdict(STANDS, small.num_ranks, float("inf"), [str(e)])
        except UserError:
            raise
        except Exception as e:
            # a layout that crashes is refuted, too
            return Verdict(FAILS, small.num_ranks, float("inf"), [format_failure(e)])
    verdict = _build_verdict(small, comparison, ranks.sums)
    verdict.messages = sum(ranks.sites.values())
    return verdict


def _run_rank(config: RunConfig, place: ParallelWorld, comparison: "_Comparison", ranks: SimulatedRanks,
              folder: Path) -> None:
    """Run a rank's steps, write a checkpoint, and read the reference's checkpoint."""
    trainer = _build_trainer(config, place)
    sums = ranks.sums[place.rank] = observe_modules(trainer.model.chunks)
    try:
        for step in range(STEPS):
            sums.begin_step(step + 1)
            if (numbers := _run_step(trainer)) is None:
                comparison.numbers[f"step {step + 1}: a guard refuses it"] = float("inf")
            else:
                comparison.add_step(step, trainer, place.rank, numbers)
            torch.distributed.barrier()
            if comparison.differs:
                return  # an error in one step affects everything in the next
        sums.begin_step(STEPS + 1)
        _write_checkpoint(trainer, place, folder)
        load.load_model(comparison.reference.checkpoint, trainer.model)
        load.load_optimizer(comparison.reference.checkpoint, trainer.optimizer, num_updates=1)
        comparison.add_read(trainer)
    except UserError as e:
        raise _StepFailed(str(e)) from e


def _build_verdict(small: Miniature, comparison: "_Comparison", sums: Mapping[int, ModuleSums]) -> Verdict:
    """Build the verdict; the first differing step comes first, with modules before tensors."""
    reference, differing = comparison.reference, comparison.list_differences()
    verdict = Verdict(EQUAL, small.num_ranks, comparison.largest, compared=comparison.count_values())
    verdict.losses = {name.removeprefix(_LOSS): value for name, value in reference.numbers[0].items()
                      if name.startswith(_LOSS)}
    differing_steps = {step for step in range(1, STEPS + 1)
                       if any(place.startswith(f"step {step}: ") for place in differing)}
    first, modules, verdict.sites = locate_first_step(
        reference.observed, sums, STEPS, differing_steps, TOLERANCE)
    verdict.places = modules + sorted(differing, key=lambda place: not place.startswith(f"step {first}: "))
    if verdict.places:
        verdict.outcome = DIFFERS
    return verdict


class _Comparison:
    """Comparison of simulated ranks with the `ReferenceSteps`."""

    def __init__(self, reference: ReferenceSteps) -> None:
        self.reference = reference
        self.numbers: dict[str, float] = {}
        """Step and name -> largest relative difference."""
        self.tensors: dict[tuple[int, str], float] = {}
        """(step, tensor) -> largest relative difference."""
        self.gradients: dict[str, float] = {}
        """Parameter -> largest relative gradient difference in the first step."""
        self.checkpoint_tensors: dict[str, float] = {}
        """Tensor written to or read from a checkpoint -> largest relative difference."""
        self.replicas: dict[str, set[str]] = defaultdict(set)
        """Kind -> tensors with replicas."""
        self._covered: dict[tuple[int, str], torch.Tensor] = {}
        self._steps: set[int] = set()
        self.done: Callable[[], Any] = lambda: None
        """Called after a rank's step."""

    @property
    def largest(self) -> float:
        return max((*self.numbers.values(), *self.tensors.values(), *self.checkpoint_tensors.values()),
                   default=0.0)

    @property
    def differs(self) -> bool:
        return not self.largest <= TOLERANCE

    def add_step(self, step: int, trainer: Trainer, rank: int, numbers: Mapping[str, float]) -> None:
        """Compare a rank's tensors after a step (0-based), and the step's numbers."""
        self._steps.add(step)
        for name in numbers.keys() - self.reference.numbers[step].keys():
            self.numbers[f"step {step + 1}: {name}: one process has none"] = float("inf")
        for name, value in self.reference.numbers[step].items():
            # processes without a router do not report its biases
            if name in numbers:
                difference = abs(numbers[name] - value) / max(abs(value), 1e-6)
                _update_largest(self.numbers, f"step {step + 1}: {name}", difference)
            elif not name.startswith("router bias"):
                self.numbers[f"step {step + 1}: {name} of rank {rank}"] = float("inf")
        # a wrong norm scales every gradient; undo the scale to find wrong gradients
        limit = trainer.config.optim.clip_grad
        scale = (_compute_clip_scale(self.reference.numbers[step]["gradient norm"], limit)
                 / _compute_clip_scale(numbers["gradient norm"], limit))
        for key, block in _iter_shards(trainer):
            expected = self.reference.tensors[step].get(key)
            if expected is None:
                self.tensors[step, key] = float("inf")
                continue
            if (step, key) not in self._covered:
                self._covered[step, key] = torch.zeros(block.global_shape, dtype=torch.int32)
            if block.owned:
                self._covered[step, key][_get_slices(block)] += 1
            else:
                self.replicas[key.partition("/")[0]].add(key)
            expected_block = expected[_get_slices(block)]
            _update_largest(self.tensors, (step, key),
                            _compute_difference(expected_block, block.data, expected))
            part, _, name = key.partition("/")
            if step == 0 and part in FIRST_MOMENTS:
                _update_largest(self.gradients, name, _compute_difference(
                    expected_block, block.data * scale, expected))
        self.done()

    def add_read(self, trainer: Trainer) -> None:
        """Compare a rank's tensors after reading the reference's checkpoint."""
        for key, block in _iter_shards(trainer):
            expected = self.reference.tensors[0][key]
            _update_largest(self.checkpoint_tensors, f"read from one process' checkpoint: {key}",
                            _compute_difference(expected[_get_slices(block)], block.data, expected))
        self.done()

    def add_written(self, written: Mapping[str, torch.Tensor]) -> None:
        """Compare the global tensors in the layout's checkpoint with the reference."""
        expected = self.reference.tensors[-1]
        for key in expected.keys() | written.keys():
            name = f"written into a checkpoint: {key}"
            self.checkpoint_tensors[name] = float("inf")
            if key in expected and key in written and expected[key].shape == written[key].shape:
                self.checkpoint_tensors[name] = _compute_difference(expected[key], written[key],
                                                                    expected[key])

    def count_values(self) -> dict[str, int]:
        names = {name.partition(": ")[2] for name in self.numbers}
        parts = Counter(key.partition("/")[0] for key in {key for _, key in self.tensors})
        num_read = sum(name.startswith("read") for name in self.checkpoint_tensors)
        prefixes = {"losses": _LOSS, "gradient norms": "gradient norm", "loads of experts": "load of expert",
                    "biases of routers": "router bias"}
        counts = {kind: sum(name.startswith(prefix) for name in names) for kind, prefix in prefixes.items()}
        return {**counts,
                "gradients": len(self.gradients), "first moments": sum(parts[name] for name in FIRST_MOMENTS),
                "second moments": parts["exp_avg_sq"], "weights": parts["weights"],
                "replicas of weights": len(self.replicas["weights"]),
                "modules": len(self.reference.observed.forward) // STEPS,
                "tensors of its checkpoint": len(self.checkpoint_tensors) - num_read,
                "tensors read from one process' checkpoint": num_read}

    def list_differences(self) -> list[str]:
        """List values above `TOLERANCE`, moments before weights, and elements without a single writer."""
        order = {"momentum": 0, "exp_avg": 0, "exp_avg_sq": 1, "master": 2, "weights": 3}
        wrong = sorted((step, order.get(key.partition("/")[0], 2), key)
                       for (step, key), value in self.tensors.items() if not value <= TOLERANCE)
        differences = [f"step 1: gradient of {name}" for name, value in sorted(self.gradients.items())
                       if not value <= TOLERANCE]
        # the guard's state comes after the step's numbers
        numbers = sorted(self.numbers.items(), key=lambda item: (": guard's" in item[0], item))
        differences += [name for name, value in numbers if not value <= TOLERANCE]
        differences += [f"step {step + 1}: {name}: no process has it" for step in sorted(self._steps)
                  for name in self.reference.numbers[step] if f"step {step + 1}: {name}" not in self.numbers]
        differences += [f"step {step + 1}: {key}" for step, _, key in wrong]
        for (step, key), count in self._covered.items():
            if step == 0 and not bool((count == 1).all()):
                differences.append(f"step 1: {key}: {int((count == 0).sum())} of {count.numel()} elements "
                                   f"are written by nobody, {int((count > 1).sum())} by several")
        for key in self.reference.tensors[0] if self.tensors else ():
            if (0, key) not in self.tensors:
                differences.append(f"step 1: {key}: is held by nobody")
        return differences + [name for name, value in sorted(self.checkpoint_tensors.items())
                              if not value <= TOLERANCE]


def _compute_clip_scale(norm: float, limit: float) -> float:
    """Return the gradient clipping factor as in `megatron.core`."""
    return min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0


def _get_slices(block: LocalShard) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(block.offset, block.shape, strict=True))


def _compute_difference(expected: torch.Tensor, own: torch.Tensor, tensor: torch.Tensor) -> float:
    """Return a shard's largest difference, relative to the largest number in the global `tensor`."""
    if not own.numel():
        return 0.0
    difference = (expected.reshape(own.shape) - own.detach()).abs().max()
    return float(difference / tensor.abs().max().clamp(min=1e-12))


def _update_largest(largest: dict[Any, float], key: Any, value: float) -> None:
    # `max` would drop NaN
    largest[key] = max(largest.get(key, 0.0), value if value == value else float("inf"))


def _run_reference_steps(config: RunConfig, place: ParallelWorld, checkpoint: Path) -> ReferenceSteps:
    trainer = _build_trainer(config, place)
    observed = observe_modules(trainer.model.chunks)
    numbers, tensors = [], []
    for step in range(STEPS):
        observed.begin_step(step + 1)
        step_numbers = _run_step(trainer)
        assert step_numbers is not None, "no guard refuses what one process does"
        numbers.append(step_numbers)
        step_tensors: dict[str, torch.Tensor] = {}
        for key, block in _iter_shards(trainer):
            if key not in step_tensors:
                step_tensors[key] = torch.zeros(block.global_shape, dtype=block.data.dtype)
            step_tensors[key][_get_slices(block)] = block.data.detach().reshape(block.shape)
        tensors.append(step_tensors)
        if step == 0:
            _write_checkpoint(trainer, place, checkpoint)
    return ReferenceSteps(numbers, tensors, observed, checkpoint)


def _iter_shards(trainer: Trainer) -> Iterator[tuple[str, LocalShard]]:
    for block in list_local_shards(trainer.model):
        yield f"weights/{block.key}", block
    for block in trainer.optimizer.state_shards():
        yield block.key, block


def _build_trainer(config: RunConfig, place: ParallelWorld) -> Trainer:
    from megatron_sov.proof.random_documents import select_objective

    config.check(place.size)
    sources = open_sources(config.data.paths, config.model.vocab_size, formats=None, warns=False)
    trainer = Trainer(config, place, RunFolder(Path(os.devnull)), sources, select_objective(config, sources))
    # random log-probabilities would trigger the warning about an unsound engine
    vars(trainer.objective)["doubt"] = lambda step, meters: ""
    return trainer


def _run_step(trainer: Trainer) -> dict[str, float] | None:
    """Run a step; return name -> number, or None for a rejected step."""
    result = train_step(trainer)
    if result is None:
        return None
    usual = trainer.guards.step_guard.state()
    load: Mapping[str, float] = {}
    if trainer.config.model.num_experts:
        counts = trainer.expert_load.gather().flatten().tolist()
        load = {f"load of expert {i}": float(count) for i, count in enumerate(counts)}
    biases: dict[str, float] = defaultdict(float)
    for module in trainer.model.modules():
        bias = getattr(module, "expert_bias", None)
        if isinstance(bias, torch.Tensor):
            biases |= {f"router bias {module.layer_number}.{i}": float(value)
                       for i, value in enumerate(bias.tolist())}
    return {**{_LOSS + name: value for name, value in result.losses.items()},
            **{f"mean of {name}": value for name, value in result.meters.items()},
            # the guard's state is saved in checkpoints and rejects later steps
            "guard's loss": usual["losses"][-1], "guard's gradient norm": usual["grad_norms"][-1],
            "loss": result.loss, "tokens": float(result.num_tokens), **load,
            "gradient norm": result.grad_norm, **biases}


# Checkpoints: the layout writes every tensor exactly once, with the reference's numbers, and reads the
# reference's checkpoint. Files do not depend on the layout, so proved layouts share checkpoints.


def _write_checkpoint(trainer: Trainer, place: ParallelWorld, folder: Path) -> None:
    """Write a checkpoint; collective.

    Raises:
        ValueError: an element without exactly one writer.
    """
    snapshot = HostSnapshot()
    snapshot.copy_blocks({MODEL: list_local_shards(trainer.model, rounded=True),
                          _OPTIMIZER: trainer.optimizer.state_shards()}, tensors_change=False)
    snapshot.write(folder, place.rank)
    torch.distributed.barrier()
    if place.is_main:
        snapshots = [SnapshotRecord.read(folder, rank) for rank in range(place.size)]
        for part in (MODEL, _OPTIMIZER):
            write_index(folder, part, [index for record in snapshots for index in record.indices[part]])
        artifact = ArtifactWriter(folder, CHECKPOINT_KIND)
        artifact.hashed_files = {name: file for record in snapshots for name, file in record.files.items()}
        artifact.content = {"step": trainer.optimizer.num_updates, "parts": [MODEL, _OPTIMIZER]}
        artifact.complete()
    torch.distributed.barrier()


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return key in `_iter_shards` -> global tensor in a checkpoint."""
    tensors: dict[str, torch.Tensor] = {}
    for part, prefix in ((MODEL, "weights/"), (_OPTIMIZER, "")):
        reader = TensorReader(folder, part)
        tensors |= {prefix + key: reader.read(key, (0,) * len(reader.get_shape(key)), reader.get_shape(key))
                  for key in sorted(reader.keys())}
    return tensors


@contextlib.contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into SystemExit, which removes temporary folders."""
    def raise_exit(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    is_ours = (threading.current_thread() is threading.main_thread()
               and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)
    if is_ours:
        signal.signal(signal.SIGTERM, raise_exit)
    try:
        yield
    finally:
        if is_ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def format_proof(small: Miniature, verdict: Verdict) -> str:
    m, c = small.config.model, small.config
    lines = [f"{verdict.num_ranks} processes: {_format_layout(small)}",
             f"in miniature: {m.num_layers} layers, {m.num_experts} experts, {c.train.global_batch_size} "
             f"rows of {c.data.phases[0].seq_len} tokens a step"]
    if verdict.outcome == EQUAL:
        counts = verdict.compared
        lines.append(f"equal to one process in two steps, {verdict.largest:.1e} apart at most (allowed "
                     f"{TOLERANCE:g}); each element has one owner, and each other process its number")
        lines.append(", ".join(f"{kind}: {count}" for kind, count in counts.items() if count))
    else:
        lines.append(f"NOT equal to one process: {_format_outcome(verdict)}")
        lines += [f"  {place}" for place in verdict.places[:SHOWN]]
        if len(verdict.places) > SHOWN:
            lines.append(f"  and {len(verdict.places) - SHOWN} more")
        lines += [f"  sent there: {site}" for site in verdict.sites[:2 * SHOWN]]
    lines.append(f"{verdict.messages:,} messages, {verdict.seconds:.0f} s")
    for item in (*ASSUMED, *(f"not covered: {part}" for part in small.uncovered)):
        lines += textwrap.wrap(f"- {item}", 110, subsequent_indent="  ")
    return "\n".join(lines)


def proof_to_json(small: Miniature, verdict: Verdict) -> dict[str, Any]:
    """Convert the verdict to JSON values."""
    values = json.loads(json.dumps(dataclasses.asdict(verdict)))
    # JSON has no infinity
    largest = verdict.largest if math.isfinite(verdict.largest) else None
    return {**values, "largest": largest, "layout": dataclasses.asdict(small.config.parallel),
            "tolerance": TOLERANCE, "assumed": list(ASSUMED), "not_covered": list(small.uncovered)}


def _format_outcome(verdict: Verdict) -> str:
    if verdict.outcome != DIFFERS:
        return f"it {verdict.outcome}"
    if verdict.largest <= TOLERANCE:
        return "not each element is held once, though numbers agree"
    return f"numbers are {verdict.largest:.2g} apart (allowed {TOLERANCE:g})"


def _format_layout(small: Miniature) -> str:
    p = small.config.parallel
    switches = [name for name in ("sp", "overlap_grad_reduce", "overlap_param_gather") if getattr(p, name)]
    return ", ".join([p.format_sizes(), *switches])
