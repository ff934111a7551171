"""Layouts that recipes are recommended to run with on GPUs of a kind, best first.

Those of large recipes are what `plan --sweep` finds on 512 and 1,024 GPUs, on B200 also for the 480 of Solar
Open's report: of the layouts within 2 % of the fastest the one that needs least memory; behind them stand
some that recompute every layer, which fit where those do not.  None has been timed.  Which one serves depends
on the number of processes: a global batch has to divide among the data-parallel ones (13,440 samples do over
480 processes and, where 4 compute a row together, over 512; over 1,024 they need 8).
"""

from __future__ import annotations

Layout = tuple[str, ...]
"""Settings as --set takes them: of `parallel`, and of the micro-batch and what is recomputed."""

_SELECTIVE: Layout = ("train.recompute=selective", 'gpu.recompute_modules=["layernorm", "moe_act"]')
_EXPERTS_AGAIN: Layout = ("train.recompute=selective", 'gpu.recompute_modules=["moe"]')
_STORED: Layout = ("train.recompute=false",)
_HALVES: Layout = ("parallel.tp=2", "parallel.sp=true")
_NODE: Layout = ("parallel.ep=8",)
"""Experts are exchanged inside a node."""
_FOUR_STAGES: Layout = ("parallel.pp=4", "parallel.pipeline_layout=[12, 12, 13, 11]")
_EIGHT_STAGES: Layout = ("parallel.pp=8", "parallel.pipeline_layout=[6, 6, 6, 6, 6, 6, 7, 5]")
_EIGHT_PREDICTING: Layout = ("parallel.pp=8", "parallel.pipeline_layout=[6, 6, 6, 6, 6, 7, 7, 4]")
_SIXTEEN_RUNS = "parallel.pipeline_layout=[3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 4, 4, 1]"
"""Of models whose last stage has prediction layers."""
_TWO_ROWS: Layout = ("train.micro_batch_size=2",)

_ZERO1: Layout = ("parallel.zero1=true",)
_SMALL: dict[str, tuple[Layout, ...]] = dict.fromkeys(("h100", "h200", "b200"),
                                                      (_ZERO1, (*_ZERO1, *_HALVES)))
_SOLAR: tuple[Layout, ...] = ((*_EIGHT_STAGES, *_SELECTIVE), ("parallel.pp=4",), ("parallel.pp=8",))
_SOLAR_MID: tuple[Layout, ...] = (("parallel.pp=2", "parallel.cp=8", *_STORED),
                                  ("parallel.pp=4", "parallel.cp=8", *_STORED),
                                  ("parallel.pp=4", "parallel.cp=4"), ("parallel.pp=4", "parallel.cp=8"))

RECOMMENDED: dict[str, dict[str, tuple[Layout, ...]]] = {
    "solar-open-102b": {
        "h100": ((*_HALVES, *_FOUR_STAGES, *_TWO_ROWS, *_SELECTIVE), *_SOLAR),
        "h200": ((*_FOUR_STAGES, *_SELECTIVE), *_SOLAR),
        "b200": (("parallel.pp=2", "parallel.pipeline_layout=[25, 23]", *_TWO_ROWS, *_SELECTIVE),
                 (*_EIGHT_STAGES, *_TWO_ROWS, *_SELECTIVE), *_SOLAR)},
    "solar-open-102b-mid": {
        "h100": ((*_HALVES, *_FOUR_STAGES, "parallel.cp=4", *_SELECTIVE), *_SOLAR_MID[2:]),
        "h200": _SOLAR_MID, "b200": _SOLAR_MID},
    "solar-open-102b-extend": {
        "h100": (("parallel.pp=4", "parallel.vpp=4", *_NODE, *_SELECTIVE), ()),
        "h200": (("parallel.tp=2", "parallel.pp=4", "parallel.vpp=4", *_NODE, *_SELECTIVE), ()),
        "b200": (("parallel.tp=1", "parallel.sp=false", "parallel.pp=2", "parallel.vpp=4", *_NODE,
                  *_EXPERTS_AGAIN),
                 ("parallel.tp=2", "parallel.pp=2", "parallel.cp=4", *_NODE, *_EXPERTS_AGAIN),
                 ("parallel.tp=2", "parallel.pp=2", *_NODE, *_SELECTIVE), ())},
    "k-exaone-236b": {
        "h100": ((*_EIGHT_PREDICTING, *_NODE, "parallel.cp=4", *_SELECTIVE), ("parallel.pp=8", *_NODE),
                 ("parallel.pp=4", "parallel.ep=16")),
        "h200": ((*_HALVES, "parallel.pp=4", "parallel.pipeline_layout=[13, 13, 13, 9]", *_NODE, *_SELECTIVE),
                 ("parallel.pp=4", *_NODE)),
        "b200": (("parallel.pp=4", "parallel.vpp=4", "parallel.cp=2", *_NODE,
                  _SIXTEEN_RUNS, *_SELECTIVE),
                 ("parallel.pp=2", *_NODE), ("parallel.pp=4", *_NODE))},
    "k-exaone-236b-extend": {
        "h100": (("parallel.tp=2", "parallel.pp=8", "parallel.vpp=2", _SIXTEEN_RUNS, *_NODE), ()),
        "h200": (("parallel.tp=2", "parallel.pp=4", "parallel.vpp=4", _SIXTEEN_RUNS, *_NODE, "parallel.cp=4"),
                 ()),
        "b200": (("parallel.tp=4", "parallel.pp=2", "parallel.vpp=4", *_NODE, "parallel.cp=4",
                  "parallel.pipeline_layout=[6, 6, 6, 6, 6, 6, 7, 5]", *_TWO_ROWS),
                 ("parallel.tp=4", "parallel.pp=4", *_NODE), ())},
    **dict.fromkeys(("qwen2-1.5b", "qwen3-4b", "qwen3-4b-2507", "qwen3-8b", "qwen3-moe-30b",
                     "qwen3-30b-a3b-2507", "typhoon-s-8b", "typhoon-s-8b-opd", "vibethinker-1.5b"),
                    _SMALL),
}
"""Recipe -> kind of GPU (`clusters.chips.CHIPS`) -> layouts."""
