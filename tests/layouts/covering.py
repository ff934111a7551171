"""Selects the layouts to test: every setting alone, and products that contain every possible pair of
settings."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from allpairspy import AllPairs

MAX_RANKS = 8
FACTORS: dict[str, tuple[str, ...]] = {
    "tensor": ("", "TP2", "TP2+SP"),
    "pipeline": ("", "PP2", "PP2 VPP2"),
    "context": ("", "CP2"),
    "expert": ("", "EP2", "EP2 allgather"),
    "expert tensor": ("", "ETP2"),
    "optimizer": ("", "ZeRO-1", "ZeRO-1 overlap"),
    "memory": ("", "recompute"),
}
"""Factor -> its options; "" disables the factor."""
SETTINGS = {
    "TP2": ("parallel.tp=2",), "TP2+SP": ("parallel.tp=2", "parallel.sp=true"),
    "PP2": ("parallel.pp=2",), "PP2 VPP2": ("parallel.pp=2", "parallel.vpp=2"), "CP2": ("parallel.cp=2",),
    "EP2": ("parallel.ep=2",), "EP2 allgather": ("parallel.ep=2", "parallel.expert_dispatcher=allgather"),
    "ETP2": ("parallel.etp=2",), "ZeRO-1": ("parallel.zero1=true",),
    "ZeRO-1 overlap": ("parallel.zero1=true", "parallel.overlap_grad_reduce=true",
                       "parallel.overlap_param_gather=true"), "recompute": ("train.recompute=true",),
}
MANDATORY = ("TP2+SP", "PP2", "CP2", "EP2", "", "ZeRO-1", "")
"""A product of almost all factors, on eight processes."""


@dataclass(frozen=True)
class Layout:
    """One option per factor."""

    choice: tuple[str, ...]
    """Options in the order of `FACTORS`."""

    @property
    def name(self) -> str:
        """Name in the table."""
        return " x ".join(part for part in self.choice if part) or "DP2"

    @property
    def num_ranks(self) -> int:
        """Smallest number of processes at which every option has an effect."""
        tensor, pipeline, context, expert, expert_tensor, optimizer, _ = (2 if part else 1
                                                                          for part in self.choice)
        count = max(tensor * pipeline * context, expert * expert_tensor * pipeline)
        if optimizer > 1:  # ZeRO-1 needs at least two data-parallel processes
            count = max(count, 2 * tensor * pipeline)
        return 2 if self.name == "DP2" else count

    @property
    def settings(self) -> list[str]:
        """Arguments of `--set`."""
        chosen = [s for part in self.choice if part for s in SETTINGS[part]]
        data_parallel = self.num_ranks // (2 ** sum(bool(part) for part in self.choice[:3]))
        # two micro-batches of the eight samples, one per pipeline stage; four with interleaved stages
        num_micro_batches = 4 if "VPP2" in self.name and data_parallel <= 2 else 2
        return [*chosen, f"train.micro_batch_size={8 // data_parallel // num_micro_batches}"]


def is_possible(choice: tuple[str, ...], experts: bool) -> bool:
    """Return whether the first factors' options can run together: MoE models need SP with TP, dense models
    have no EP."""
    parts = tuple(choice) + ("",) * (len(FACTORS) - len(choice))
    if parts[0] == "TP2" if experts else parts[3] or parts[4]:
        return False
    return Layout(parts).num_ranks <= MAX_RANKS


def list_single_options(experts: bool) -> list[Layout]:
    """Return plain data parallelism and every option alone."""
    defaults = ("",) * len(FACTORS)
    single_choices = [(*defaults[:i], part, *defaults[i + 1:]) for i, parts in enumerate(FACTORS.values())
                      for part in parts if part]
    return [Layout(choice) for choice in [defaults, *single_choices] if is_possible(choice, experts)]


def list_products(experts: bool) -> list[Layout]:
    """Return the mandatory product, and products that cover every possible pair of options."""
    covering_choices = [tuple(pair) for pair in AllPairs(
        list(FACTORS.values()), filter_func=lambda row: is_possible(tuple(row), experts))]
    choices = [MANDATORY, *covering_choices] if experts else covering_choices
    chosen = [Layout(c) for c in dict.fromkeys(choices) if sum(map(bool, c)) > 1]
    all_layouts = sorted((Layout(c) for c in itertools.product(*FACTORS.values()) if is_possible(c, experts)),
                         key=lambda x: x.num_ranks)
    # the greedy search misses pairs if some choices exclude others
    for pair in sorted(list_possible_pairs(experts) - collect_pairs(chosen)):
        if pair not in collect_pairs(chosen):
            chosen.append(next(layout for layout in all_layouts if pair in collect_pairs([layout])))
    return chosen


def select_fewest(layouts: list[Layout], having: Callable[[Layout], set[Any]]) -> list[Layout]:
    """Return a small subset of the layouts with the same union of `having`: greedily take the layout with
    most new elements, at the fewest processes."""
    chosen: list[Layout] = []
    uncovered = set().union(*map(having, layouts))
    while uncovered:
        chosen.append(max(layouts, key=lambda x: (len(having(x) & uncovered), -x.num_ranks)))
        uncovered -= having(chosen[-1])
    return chosen


def collect_pairs(layouts: list[Layout]) -> set[tuple[str, str]]:
    """Return the pairs of options that occur together in a layout."""
    return {pair for layout in layouts
            for pair in itertools.combinations([part for part in layout.choice if part], 2)}


def list_possible_pairs(experts: bool) -> set[tuple[str, str]]:
    """Return the pairs of options that can occur together, by enumeration."""
    return collect_pairs([Layout(c) for c in itertools.product(*FACTORS.values()) if is_possible(c, experts)])
