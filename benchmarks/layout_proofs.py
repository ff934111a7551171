"""Recommended layouts against one process, and faults on purpose in what is sent.

Usage: python benchmarks/layout_proofs.py layouts [RECIPE GPU RANKS ...]
       python benchmarks/layout_proofs.py faults

`layouts` plays recommended layouts of large recipes (`CASES`, or those that are named) by all of their
processes, as `megatron-sov plan --prove` does, each in a process of its own.  `faults` plays layouts of
eight processes once for each place that sends something and each way to do that wrongly (`WAYS`), and tells
how many are found, and of how many the place is named.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

CASES = (("solar-open-102b", "b200", 480), ("solar-open-102b", "h100", 512),
         ("k-exaone-236b", "h100", 512), ("k-exaone-236b", "b200", 512))
FAULTY = {
    "tiny-k-exaone": ("parallel.tp=2", "parallel.sp=true", "parallel.pp=2", "parallel.ep=4",
                      "parallel.zero1=true", "parallel.overlap_grad_reduce=true",
                      "parallel.overlap_param_gather=true"),
    "tiny-solar-open": ("parallel.tp=2", "parallel.sp=true", "parallel.cp=2", "parallel.ep=2",
                        "parallel.etp=2"),
    "tiny-qwen3": ("parallel.tp=2", "parallel.pp=2", "parallel.vpp=2", "model.num_layers=4",
                   "model.tied_embeddings=true")}
"""Recipe -> its layout on eight processes."""


def _dropped(kind: str, parts: Sequence[Any]) -> None:
    """Everyone goes on with what is its own."""
    for index, part in enumerate(parts):
        if kind == "reduce_scatter":
            part.outputs[0].copy_(part.inputs[index])
        elif kind == "allgather":
            for output in part.outputs:
                output.copy_(part.inputs[0])
        elif kind == "alltoall":
            part.outputs[0].zero_()


def _scaled(factor: float) -> Callable[[str, Sequence[Any]], None]:
    def scale(kind: str, parts: Sequence[Any]) -> None:
        for part in parts:
            for output in part.outputs:
                if output.is_floating_point():
                    output.mul_(factor)
    return scale


def _shifted(kind: str, parts: Sequence[Any]) -> None:
    """Everyone has what belongs to the one before it."""
    came = [[output.clone() for output in part.outputs] for part in parts]
    for part, other in zip(parts, [came[-1], *came[:-1]], strict=True):
        for output, value in zip(part.outputs, other, strict=True):
            if output.shape == value.shape:
                output.copy_(value)


def _one_lacks(kind: str, parts: Sequence[Any]) -> None:
    """The last one has not given its own."""
    for output in parts[-1].outputs:
        output.zero_()


WAYS: dict[str, tuple[bool, Callable[[str, Sequence[Any]], None]]] = {
    "left out": (False, _dropped), "twice as large": (True, _scaled(2.0)),
    "half as large": (True, _scaled(0.5)), "one rank on": (True, _shifted),
    "nothing for the last": (True, _one_lacks)}
"""Way -> whether it comes behind the call's own work, and what it does."""


@dataclass
class PlantedFault:
    """Does one thing wrongly."""

    site: Any
    way: str
    hits: int = 0
    changes: int = 0
    """How often something else came of it than should have."""

    def __call__(self, site: Any, parts: Sequence[Any], work: Callable[[Any], None]) -> bool:
        if site != self.site:
            return False
        self.hits += 1
        behind, do = WAYS[self.way]
        before = [[output.clone() for output in part.outputs] for part in parts]
        work(list(parts))
        right = [[output.clone() for output in part.outputs] for part in parts]
        if not behind:
            for part, values in zip(parts, before, strict=True):
                for output, value in zip(part.outputs, values, strict=True):
                    output.copy_(value)
        do(site.kind, parts)
        self.changes += any(not torch.equal(output, value) for part, values in zip(parts, right, strict=True)
                            for output, value in zip(part.outputs, values, strict=True))
        return True


def layout(recipe: str, gpu: str, num_ranks: int) -> dict[str, Any]:
    """Prove a recommended layout in this process; returns what was found."""
    from megatron_sov.model import recipes
    from megatron_sov.model.config import apply_settings
    from megatron_sov.plan.search.recommended import settings_for
    from megatron_sov.proof.miniature import miniature, write_documents
    from megatron_sov.proof.proving import as_json, prove

    config = recipes.get(recipe)
    settings = settings_for(config, num_ranks, gpu)
    with tempfile.TemporaryDirectory() as folder:
        write_documents(data := Path(folder, "documents"))
        small = miniature(apply_settings(config, settings), num_ranks, data)
        found = as_json(small, prove(small))
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return found | {"settings": settings, "cpu_s": usage.ru_utime + usage.ru_stime,
                    "peak_bytes": usage.ru_maxrss * 1024}


def layouts(cases: Sequence[tuple[str, str, int]]) -> bool:
    """Prove layouts one after the other; returns whether all are equal to one process."""
    equal = True
    for recipe, gpu, num_ranks in cases:
        done = subprocess.run([sys.executable, __file__, "one", recipe, gpu, str(num_ranks)], text=True,
                              stdout=subprocess.PIPE, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        equal &= found["outcome"] == "equal"
        print(f"{recipe} on {num_ranks} {gpu}: {found['outcome']}, {found['largest']:.1e} apart at most, "
              f"{found['messages']:,} messages, {found['cpu_s'] / 60:.1f} processor minutes, "
              f"{found['peak_bytes'] / 2**30:.1f} GiB ({' '.join(found['settings'])})", flush=True)
        for place in [*found["places"], *found["sites"]][:10]:
            print(f"  {place}", flush=True)
    return equal


def faults() -> bool:
    """Plant faults in what layouts send; returns whether all are found."""
    from megatron_sov.model import recipes
    from megatron_sov.model.config import apply_settings
    from megatron_sov.proof.miniature import miniature, write_documents
    from megatron_sov.proof.proving import EQUAL, play_alone, prove

    planted, found, named, missed = Counter[str](), Counter[str](), 0, []
    for recipe, settings in FAULTY.items():
        with tempfile.TemporaryDirectory() as folder:
            write_documents(data := Path(folder, "documents"))
            config = apply_settings(recipes.get(recipe), [*settings, "train.global_batch_size=32"])
            small = miniature(config, 8, data)
            whole, sites = play_alone(small), dict[Any, None]()

            def noted(site: Any, parts: Sequence[Any], work: Callable[[Any], None],
                      sites: dict[Any, None] = sites) -> bool:
                if len(parts) > 1 or site.kind == "recv":
                    sites[site] = None
                return False

            assert prove(small, noted, whole).outcome == EQUAL, recipe
            for site in sites:
                for way in WAYS:
                    fault = PlantedFault(site, way)
                    verdict = prove(small, fault, whole)
                    if not fault.changes:
                        continue  # all had the same, or nothing: it is no fault
                    planted[way] += 1
                    if verdict.outcome == EQUAL:
                        missed.append(f"{recipe}: {way}: {site}")
                        continue
                    found[way] += 1
                    named += str(site) in verdict.sites or any(
                        site.where in place for place in verdict.places)
        print(f"{recipe}: {len(sites)} places that send, so far {sum(planted.values())} faults, "
              f"{sum(found.values())} found", flush=True)
    for way, count in planted.items():
        print(f"{way}: {found[way]} of {count} found")
    print(f"faults: {sum(found.values())} of {sum(planted.values())} found; of {named} the place is named")
    for line in missed:
        print(f"not found: {line}")
    return not missed


def main(argv: Sequence[str]) -> int:
    """Do what the command line says; 1: something differs, or a fault was not found."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    warnings.simplefilter("ignore")
    from megatron_sov.engine.parallel import cpu_shims

    cpu_shims.prepare_without_gpu()
    if argv[0] == "one":
        print(json.dumps(layout(argv[1], argv[2], int(argv[3]))))
        return 0
    if argv[0] == "faults":
        return int(not faults())
    given = [(argv[i], argv[i + 1], int(argv[i + 2])) for i in range(1, len(argv), 3)]
    return int(not layouts(given or CASES))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
