"""The tables in benchmarks/results/layout_agreement.txt: losses, gradient norms and weights at every layout
equal one process's.

Runs use float64, so that a difference means a mistake and not another summation order. `make test` runs the
fewest products that contain every setting, alternating between the two MoE models, and the dense model at one
product. `make deep` runs the fewest products that contain every pair of settings. Other families, objectives,
uneven parts and optimizers are tested in tests/proof. SOV_WRITE_TABLE=1 runs all rows of the page and
rewrites it.
"""

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from allpairspy import AllPairs

RUN = str(Path(__file__).with_name("layout_run.py"))
PAGE = Path(__file__).parents[2] / "benchmarks/results/layout_agreement.txt"
WHOLE_TABLE = bool(os.environ.get("SOV_WRITE_TABLE"))
MODELS: dict[str, tuple[str, list[str], bool]] = {
    # a vocabulary that tensor parallelism pads
    "dense, tied embeddings": ("tiny-qwen3", ["model.vocab_size=369"], False),
    "experts, YaRN": ("tiny-solar-open", [], True),
    "experts, sliding windows, multi-token prediction": ("tiny-k-exaone", [], True),
}
"""Name in the table -> recipe, settings, whether the model has experts. All read rows of packed documents."""
ONLY_DENSE = {"TP2", "PP2"}
"""Settings that only the dense model tests: TP without SP, and tied embeddings on two stages."""
LIMITS = {"loss": 1e-12, "gradient norm": 1e-12, "weights": 2e-11, "other": 1e-12}
"""Largest relative difference. For a gradient near zero AdamW divides its last bits, about 1e-18, by eps =
1e-8: a weight then moves by 1e-10 of the learning rate, the only difference that may exceed 1e-12."""
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


def compute_difference(ours: Any, theirs: Any) -> float:
    """Return the largest difference relative to the largest value."""
    a, b = np.array(ours), np.array(theirs)
    return float(np.abs(a - b).max(initial=0.0) / max(1e-3, np.abs(b).max(initial=0.0)))


def compare_steps(steps: list[dict[str, Any]], expected: list[dict[str, Any]]) -> dict[str, float]:
    """Return the largest differences of two runs in loss, gradient norm and other step fields."""
    assert [step.keys() for step in steps] == [step.keys() for step in expected]
    names = {"loss": "loss", "grad_norm": "gradient norm"}
    largest = dict.fromkeys(("loss", "gradient norm", "other"), 0.0)
    for ours, theirs in zip(steps, expected, strict=True):
        for field, value in ours.items():
            column = names.get(field, "other")
            largest[column] = max(largest[column], compute_difference(value, theirs[field]))
    return largest


def compare_runs(name: str, per_rank: list[dict[str, Any]], reference: dict[str, Any]
                 ) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Return the largest differences of a layout's runs, from scratch and continued, from one process's runs,
    and a description of each difference beyond `LIMITS`."""
    assert all(result["scratch"] == per_rank[0]["scratch"] for result in per_rank), (
        f"{name}: processes report other numbers")
    differences, problems = {}, []
    for start in ("scratch", "continued"):
        state = {part: max(result[f"{start} differences"][part] for result in per_rank)
                 for part in ("model", "optimizer")}
        columns = compare_steps(per_rank[0][start], reference[start])
        columns |= {"other": max(columns["other"], state["optimizer"]), "weights": state["model"]}
        differences[start] = columns
        problems += [f"{name}, {start}: {column} differs by {value:.1e}"
                     for column, value in columns.items() if not value <= LIMITS[column]]
    return differences, problems


def list_all_layouts(experts: bool) -> list[Any]:
    return [*list_single_options(experts), *list_products(experts)]


def select_layouts(model: str, *, all_pairs: bool) -> list[Any]:
    """Return the layouts to run for a model: all settings, or all pairs of settings."""
    experts = MODELS[model][2]
    if WHOLE_TABLE:
        return list_all_layouts(experts)
    products = list_products(experts)
    if not experts:
        return [max((x for x in products if set(x.choice) >= ONLY_DENSE), key=lambda x: len(set(x.choice)))]
    model_index = [name for name in MODELS if MODELS[name][2]].index(model)
    if all_pairs:
        fewest = select_fewest(products, lambda x: collect_pairs([x]))
        selected = dict.fromkeys([products[0], *fewest])
    else:
        selected = dict.fromkeys(select_fewest(products, lambda x: set(filter(None, x.choice))))
    return [x for i, x in enumerate(selected) if i % 2 == model_index]


FIRST = "experts, YaRN"
"""Model that `make test` runs, at one product of eight processes."""


@pytest.mark.distributed
@pytest.mark.essential
@pytest.mark.parametrize(("model", "all_pairs"), [
    *(pytest.param(model, False, marks=() if model == FIRST else pytest.mark.deep) for model in MODELS),
    *(pytest.param(model, True, marks=pytest.mark.deep) for model in MODELS if MODELS[model][2])])
def test_every_layout_trains_like_one_process(ranks: Any, job: Any, packed_data: Any, tmp_path: Path,
                                              model: str, all_pairs: bool) -> None:
    recipe, settings, _ = MODELS[model]
    layouts = select_layouts(model, all_pairs=all_pairs)
    num_steps = 4 if WHOLE_TABLE else 2
    common = {"recipe": recipe, "paths": [str(packed_data.text)], "reference": str(tmp_path),
              "num_steps": num_steps}
    base = ["train.precision=fp64", *settings, *["model.num_experts=8"] * (MODELS[model][2] and WHOLE_TABLE)]
    one = job(RUN, "train_and_continue", 1, {**common, "settings": base, "is_reference": True})
    (reference,), *others = ranks(one, *(job(RUN, "train_and_continue", x.num_ranks, {
        **common, "settings": [*base, *x.settings], "is_reference": False}) for x in layouts), timeout_s=1200)
    assert reference["scratch"][0]["loss"] > reference["scratch"][-1]["loss"]
    half = reference["scratch"][num_steps // 2:]
    assert half == reference["continued"]
    assert reference["continued differences"] == {"model": 0, "optimizer": 0}
    rows, problems = [], []
    for layout, per_rank in zip(layouts, others, strict=True):
        differences, problems_of_layout = compare_runs(layout.name, per_rank, reference)
        rows.append((layout, differences))
        problems += problems_of_layout
    assert problems == [], "\n".join(problems)
    if WHOLE_TABLE and not all_pairs:
        write_table(model, rows)


def write_table(model: str, rows: list[tuple[Any, dict[str, dict[str, float]]]]) -> None:
    """Replace one model's table in the page."""
    lines = [f"## {model[0].upper()}{model[1:]}", "", "| Layout | Processes | Loss | Gradient norm | Weights "
                                                      "| Loss, continued | Gradient norm | Weights |",
             "|---|---|---|---|---|---|---|---|"]
    for layout, differences in rows:
        cells = [f"{run[column]:.0e}" for run in differences.values()
                 for column in ("loss", "gradient norm", "weights")]
        lines.append(f"| {layout.name} | {layout.num_ranks} | {' | '.join(cells)} |")
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(lines[0] + "\n")
    after = rest[rest.index("\n## "):] if "\n## " in rest else ""
    PAGE.write_text(before + "\n".join(lines) + "\n" + after, encoding="utf-8")


def test_the_published_table_lists_every_layout() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for model, (_, _, experts) in MODELS.items():
        _, heading, section = text.partition(f"## {model[0].upper()}{model[1:]}\n")
        assert heading, model
        table = section.partition("\n## ")[0].splitlines()
        rows = [line.split(" | ")
                for line in table if line.startswith("| ") and not line.startswith("| Layout")]
        assert [(r[0].removeprefix("| "), int(r[1])) for r in rows] == [
            (x.name, x.num_ranks) for x in list_all_layouts(experts)]
        worst = max(float(cell.rstrip(" |")) for r in rows for cell in r[2:4] + r[5:7])
        assert worst <= LIMITS["loss"]


@pytest.mark.parametrize("all_pairs", [False, True])
def test_every_setting_every_pair_and_everything_at_once_are_tried(all_pairs: bool) -> None:
    dense, *with_experts = (select_layouts(model, all_pairs=all_pairs) for model in MODELS)
    selected = [x for layouts in with_experts for x in layouts]
    settings = {part for x in list_single_options(True) for part in x.choice}
    assert {part for x in selected for part in x.choice} == settings
    assert set(selected) <= set(list_all_layouts(True))
    for layouts in with_experts:
        assert any(x.num_ranks == MAX_RANKS for x in layouts)
    if all_pairs:
        assert collect_pairs(selected) == list_possible_pairs(True)
        assert MANDATORY in [x.choice for x in selected]
    (product,) = dense
    assert set(product.choice) > {*ONLY_DENSE, "CP2", "ZeRO-1"}


@pytest.mark.parametrize("experts", [False, True])
def test_all_settings_that_can_meet_do_meet(experts: bool) -> None:
    selected = list_products(experts)
    assert collect_pairs(selected) == list_possible_pairs(experts)
    assert all(x.num_ranks <= MAX_RANKS for x in selected)
    assert not experts or selected[0].name == "TP2+SP x PP2 x CP2 x EP2 x ZeRO-1"


ZERO1 = ["parallel.zero1=true", "parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true",
         "parallel.bucket_params=9000"]
PP2 = ["parallel.pp=2", "parallel.vpp=2"]


@pytest.mark.distributed
@pytest.mark.parametrize("cases", [
    [("bf16", 2, [*ZERO1, "parallel.ep=2", "model.num_layers=3"])],
    pytest.param([("fp32", 2, PP2), ("bf16", 4, [*ZERO1, "parallel.tp=2", "parallel.sp=true",
                                                 "optim.name=muon"])], marks=pytest.mark.deep)],
                         ids=["experts", "stages, tensors"])
def test_the_same_layout_continues_bit_for_bit(ranks: Any, job: Any, packed_data: Any, tmp_path: Path,
                                               cases: list[Any]) -> None:
    common = {"recipe": "tiny-k-exaone", "paths": [str(packed_data.text)], "is_reference": True}
    results = ranks(*(job(RUN, "train_and_continue", n, {
        **common, "settings": [f"train.precision={precision}", *layout],
        "reference": str(tmp_path / str(number))}) for number, (precision, n, layout) in enumerate(cases)))
    for case, per_rank in zip(cases, results, strict=True):
        for rank_result in per_rank:
            assert rank_result["continued"] == rank_result["scratch"][1:], case
            assert rank_result["continued differences"] == {"model": 0, "optimizer": 0}, case
