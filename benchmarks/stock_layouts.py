"""Prove layouts of six stock Megatron-Core models with layout-proof, and check that defects are found.

Usage: python benchmarks/stock_layouts.py sound [MODEL ...]
       python benchmarks/stock_layouts.py large MODEL SIZE=N ...
       python benchmarks/stock_layouts.py defects [TEXT ...]

`sound` proves ten layouts of each model in `MODELS`, and `large` a single layout with its processor time and
memory. `defects` restores the code before each fix in `data/stock_layouts.yaml`, or leaves Megatron-Core as
it is (`live`), and checks that the verdict names the right place and that the layout is equal after the fix.
"""

import contextlib
import functools
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

from layout_proof.layout import Layout
from layout_proof.proof import EQUAL, LayoutVerdict, prove_layout

sys.path.insert(0, str(Path(__file__).parent))
import stock_models
from measurement import read_peak_bytes
from planted_faults import Fault, mutated

CASES = yaml.safe_load((Path(__file__).parent / "data/stock_layouts.yaml").read_text(encoding="utf-8"))
MODELS = ("gpt2", "llama", "qwen3", "deepseek", "gpt_oss", "hybrid")


def parse_layout(text: str) -> Layout:
    """Return the layout of a text such as `tp=2 sp=true`."""
    pairs = dict(pair.split("=") for pair in text.split())
    sizes: dict[str, Any] = {name: value == "true" or int(value) for name, value in pairs.items()}
    return Layout(**sizes)


def get_builder(model: str, **arguments: Any) -> Any:
    """Return the function of stock_models.py that builds a model, with these arguments."""
    builder = getattr(stock_models, f"build_{model}")
    return functools.partial(builder, **arguments) if arguments else builder


def prove_and_print(model: str, text: str) -> LayoutVerdict:
    """Prove a layout, and print the verdict with the processor time and the peak memory so far."""
    begin_s = time.process_time()
    verdict = prove_layout(get_builder(model), parse_layout(text))
    print(f"{model} {text}: {verdict.outcome}, {verdict.largest:.1e} apart at most, "
          f"{verdict.num_messages:,} messages, {time.process_time() - begin_s:.1f} processor seconds, "
          f"{read_peak_bytes() / 2**30:.1f} GiB", flush=True)
    return verdict


def prove_sound(models: list[str]) -> bool:
    """Prove the sound layouts; return whether all are equal to one rank."""
    num_equal = num_layouts = 0
    for model in models or MODELS:
        for text in [*CASES["sound"], CASES["last"][model]]:
            verdict = prove_and_print(model, text)
            num_layouts += 1
            num_equal += verdict.outcome == EQUAL
            for place in [*verdict.places, *verdict.sites][:5]:
                print(f"  {place}", flush=True)
    print(f"{num_equal} of {num_layouts} sound layouts are equal to one rank")
    return num_equal == num_layouts


def prove_defect(row: dict[str, Any], is_planted: bool) -> LayoutVerdict:
    """Prove a row's layout, with the code before a fix if `is_planted`."""
    fault = Fault("defect", row["place"], row["right"], row["wrong"]) if is_planted else None
    with (mock.patch.dict(stock_models.GATED, row.get("settings", {})),
          mutated(fault) if fault else contextlib.nullcontext()):
        return prove_layout(get_builder(row["model"], **row.get("arguments", {})),
                            parse_layout(row["layout"]), full_masks=row.get("full_masks", False))


def find_defects(words: list[str]) -> bool:
    """Prove a layout with each defect; return whether at least nine of ten are named by their place."""
    rows = [row for row in CASES["defects"] if not words or any(word in row["name"] for word in words)]
    num_found = num_named = 0
    for row in rows:
        begin_s, is_planted = time.process_time(), "place" in row
        verdict = prove_defect(row, is_planted)
        duration_s = time.process_time() - begin_s
        is_sound = not is_planted or prove_defect(row, False).outcome == EQUAL
        first = [*verdict.places[:3], *verdict.sites]
        is_named = is_sound and re.search(row["shown"], " ".join(first)) is not None
        num_found += is_sound and verdict.outcome != EQUAL
        num_named += is_named
        print(f"{row['name']} ({row['model']} {row['layout']}): {verdict.outcome}"
              f"{', named' if is_named else ''}, {duration_s:.1f} s: {'; '.join(first[:3])}", flush=True)
    print(f"{num_found} of {len(rows)} defects refused, {num_named} with the right place, "
          f"{read_peak_bytes() / 2**30:.1f} GiB")
    for names, reason in {} if words else CASES["not_reached"].items():
        print(f"not reached: {names}: {reason}")
    return num_named >= 0.9 * len(rows)


def main(argv: list[str]) -> int:
    warnings.simplefilter("ignore")
    command, *words = argv
    if command == "large":
        return 0 if prove_and_print(words[0], " ".join(words[1:])).outcome == EQUAL else 1
    return 0 if {"sound": prove_sound, "defects": find_defects}[command](words) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
