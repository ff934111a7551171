"""Simulate a layout's ranks in the calling process, and compare training steps with a single rank."""

import json
import logging
import math
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from layout_proof import te_layers  # first, before any import of megatron
from layout_proof.layout import DIFFERS, EQUAL, FAILS, STANDS, TOLERANCE, CannotPlay, Layout
from layout_proof.module_sums import locate_first_step
from layout_proof.simulated_messages import Deadlock, format_failure
from layout_proof.simulated_world import SimulatedRanks
from layout_proof.small_model import Builder, SmallModel, form_groups, set_layout, shrink_model
from layout_proof.training_steps import SPREAD, STEPS, Key, Piece, RankTrainer, use_float64

te_layers.replace_te_layers()  # before a builder's file is imported

FLOOR = 1e-6
"""Least size for relative differences, as a share of the largest tensor: zeros have rounding errors."""
ASSUMED = ("kernels compute what plain torch computes, messages arrive as sent, and sends never wait",
           "Transformer Engine's layers, and their messages, act as the plain layers that run here; "
           "attention under --cp gathers whole rows",
           "widths do not matter: heads, channels, experts and the layers of even stages are few",
           "Adam; no dropout, low precision or overlapped messages")
ORDER = {"gradient": 0, "exp_avg": 2, "exp_avg_sq": 3, "weights": 4}
SHOWN = 8


@dataclass
class LayoutVerdict:
    """Result of `prove_layout`."""
    outcome: str  # `EQUAL`, `DIFFERS`, `STANDS` (a deadlock) or `FAILS` (an error on a rank)
    layout: Layout
    largest: float = 0.0  # largest relative difference
    places: list[str] = field(default_factory=list)  # differing modules, parameters and numbers in order
    sites: list[str] = field(default_factory=list)  # messages at the first difference, with file and line
    num_tensors: int = 0
    num_messages: int = 0

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={value}" for name, value in asdict(self.layout).items() if value)
        if self.outcome == EQUAL:
            lines = [f"{sizes}: equal to one rank in {STEPS} steps, {self.largest:.1e} apart at most "
                     f"(allowed {TOLERANCE:g}); {self.num_tensors:,} tensors, {self.num_messages:,} messages"]
        else:
            lines = [f"{sizes}: NOT equal to one rank: {self.outcome}"]
            lines += [f"  {place}" for place in self.places[:SHOWN]]
            lines += [f"  sent there: {site}" for site in self.sites[:SHOWN]]
        return "\n".join([*lines, *(f"- assumed: {text}" for text in ASSUMED)])

    def to_json(self) -> str:
        values = asdict(self) | {"assumed": ASSUMED, "tolerance": TOLERANCE}
        return json.dumps({name: None if isinstance(value, float) and not math.isfinite(value) else value
                           for name, value in values.items()})


def assert_layout_equals_one_rank(builder: Builder, *, full_masks: bool = False, **sizes: Any
                                  ) -> LayoutVerdict:
    """Prove a layout in a test, for example `tp=2, pp=2, ranks=8`; `AssertionError` names the first place."""
    verdict = prove_layout(builder, Layout(**sizes), full_masks=full_masks)
    assert verdict.outcome == EQUAL, str(verdict)
    return verdict


def prove_layout(builder: Builder, layout: Layout, *, full_masks: bool = False) -> LayoutVerdict:
    """Run `STEPS` training steps of a small model on a layout's ranks, and on a single rank. Raises
    `CannotPlay`: no simulation is possible."""
    layout.check()
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    with use_float64():
        model = shrink_model(builder, layout)
        with model.use_small_arguments():
            return _compare(model, layout, full_masks)


def _compare(model: SmallModel, layout: Layout, full_masks: bool) -> LayoutVerdict:
    num_microbatches = layout.replicas * layout.num_microbatches
    try:
        set_layout(model.config, layout)
    except (ValueError, AssertionError) as e:
        raise CannotPlay(f"the config does not allow this layout: {e}") from e
    try:
        [comparison] = SimulatedRanks(1).run(form_groups(Layout()), lambda _: _Comparison(
            RankTrainer(model, Layout(), num_microbatches, full_masks)))
    except (Exception, SystemExit) as e:
        raise CannotPlay(f"one rank cannot do this step: {format_failure(e)}; no layout is proved") from e
    ranks = SimulatedRanks(layout.ranks)

    def run_rank(rank: int) -> None:
        trainer = RankTrainer(model, layout, num_microbatches, full_masks)
        comparison.load_weights(trainer, rank)
        ranks.sums[rank] = trainer.sums
        for step in range(STEPS):
            comparison.add_step(step, rank, *trainer.run_step(step))
            torch.distributed.barrier()
            if comparison.places:
                return  # a difference in one step affects everything in the next

    try:
        ranks.run(form_groups(layout), run_rank)
    except Deadlock as e:
        return LayoutVerdict(STANDS, layout, math.inf, [str(e)])
    except (Exception, SystemExit) as e:
        return LayoutVerdict(FAILS, layout, math.inf, [format_failure(e)])
    comparison.add_missing()
    verdict = LayoutVerdict(DIFFERS if comparison.places else EQUAL, layout, comparison.largest,
                            num_tensors=len(comparison.covered), num_messages=sum(ranks.sites.values()))
    if comparison.places:
        _, verdict.places, verdict.sites = locate_first_step(
            comparison.sums, ranks.sums, STEPS, {step + 1 for step, *_ in comparison.places}, TOLERANCE)
    verdict.places += [text for _, text in sorted(comparison.places.items())]
    return verdict


class _Comparison:
    """Results on a single rank, and differences on the simulated ranks."""

    def __init__(self, trainer: RankTrainer) -> None:
        """Run the reference steps with random weights."""
        self.initial: dict[str, torch.Tensor] = {}
        self.tensors: list[dict[Key, torch.Tensor]] = []
        self.numbers: list[dict[str, float]] = []
        self.floors: dict[str, float] = defaultdict(lambda: 1e-30)
        """Kind -> least tensor size for relative differences."""
        self.sums, self.largest = trainer.sums, 0.0
        self.places: dict[tuple[int, int, str], str] = {}
        """(step, order, name) -> text with the first rank that differs."""
        self.covered: set[tuple[int, Key]] = set()
        random = torch.Generator().manual_seed(0)
        for key, shape, block, data in trainer.blocks:
            with torch.no_grad():
                data.add_(torch.randn(data.shape, generator=random), alpha=SPREAD)
            tensor = self.initial.setdefault(key, torch.zeros(shape))
            tensor[block] = data.detach().reshape(tensor[block].shape)
        trainer.optimizer.reload_model_params()
        for step in range(STEPS):
            (numbers, pieces), tensors = trainer.run_step(step), dict[Key, torch.Tensor]()
            for piece in pieces:
                tensor = tensors.setdefault(piece.key, torch.zeros(piece.global_shape))
                tensor[piece.block] = piece.values.view(tensor[piece.block].shape)
                size = float(piece.values.abs().max()) if step == 0 else 0.0
                self.floors[piece.key[0]] = max(self.floors[piece.key[0]], FLOOR * size)
            self.tensors.append(tensors)
            self.numbers.append(numbers)

    def load_weights(self, trainer: RankTrainer, rank: int) -> None:
        """Give a rank the reference's initial weights."""
        for key, shape, block, data in trainer.blocks:
            expected = self.initial.get(key)
            if expected is None or tuple(expected.shape) != shape:
                has = "none" if expected is None else list(expected.shape)
                text = f"weights {key} {list(shape)} of rank {rank}: one rank has {has}"
                self._add(0, -1, key, text, math.inf)
                continue
            with torch.no_grad():
                data.copy_(expected[block].reshape(data.shape))
        trainer.optimizer.reload_model_params()

    def add_missing(self) -> None:
        """Report tensors without a rank."""
        for key in self.tensors[0]:
            if (0, key) not in self.covered:
                self._add(0, ORDER[key[0]], key[1], f"step 1: {key[0]} of {key[1]}: no rank has it", math.inf)

    def add_step(self, step: int, rank: int, numbers: dict[str, float], pieces: list[Piece]) -> None:
        """Compare a rank's step (0-based)."""
        for name, value in numbers.items():
            expected = self.numbers[step].get(name, math.nan)
            difference = abs(value - expected) / max(abs(expected), 1e-30)
            self._add(step, 1, name, f"step {step + 1}: {name} of rank {rank}: {value:.10g}, one rank has "
                                     f"{expected:.10g}", difference)
        for piece in pieces:
            self._add_piece(step, rank, piece)

    def _add_piece(self, step: int, rank: int, piece: Piece) -> None:
        kind, name = piece.key
        expected = self.tensors[step].get(piece.key)
        self.covered.add((step, piece.key))
        if expected is None or tuple(expected.shape) != piece.global_shape:
            text = f"step {step + 1}: {kind} of {name}: one rank has none"
            self._add(step, ORDER[kind], name, text, math.inf)
            return
        part = expected[piece.block].reshape(-1)[piece.start:piece.start + piece.values.numel()]
        size = max(float(expected.abs().max()), self.floors[kind])
        difference = float((part - piece.values).abs().max()) / size
        self._add(step, ORDER[kind], name,
                  f"step {step + 1}: {kind} of {name} on rank {rank}, {difference:.2g} apart", difference)

    def _add(self, step: int, order: int, name: str, text: str, difference: float) -> None:
        value = difference if difference == difference else math.inf
        self.largest = max(self.largest, value)
        if value > TOLERANCE:
            self.places.setdefault((step, order, name), text)


