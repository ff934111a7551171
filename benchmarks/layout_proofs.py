"""Compare recommended layouts with one process, and check that planted communication faults are found.

Usage: python benchmarks/layout_proofs.py layouts [RECIPE GPU RANKS ...]
       python benchmarks/layout_proofs.py recommended
       python benchmarks/layout_proofs.py faults [LAYOUT ...] > FAULTS.jsonl
       python benchmarks/layout_proofs.py again FAULTS.jsonl ... > AGAIN.jsonl
       python benchmarks/layout_proofs.py tally FAULTS.jsonl ... AGAIN.jsonl

`layouts` plays recommended layouts of large recipes (`CASES`, or those that are named) by all of their
processes, as `megatron-sov plan --prove` does, each in a process of its own.  `recommended` plays every
layout that is recommended for any recipe, each on the fewest processes that can have it and of which two
hold the same weights and two the same experts.  `faults` plays the layouts of `data/layout_faults.yaml`
once for each fault: each place that sends something done wrongly in each way, and functions with another
text.  `again` plants those that were not found, after something was
mended, and `tally` tells how many are found in the end, and of how many the place is named.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from planted_faults import Fault, mutated

FAULTS = yaml.safe_load((Path(__file__).parent / "data/layout_faults.yaml").read_text(encoding="utf-8"))
LAYOUTS: dict[str, dict[str, str]] = FAULTS["layouts"]
CASES = (("solar-open-102b", "b200", 480), ("solar-open-102b", "h100", 512),
         ("k-exaone-236b", "h100", 512), ("k-exaone-236b", "b200", 512))


def _dropped(kind: str, parts: Sequence[Any]) -> None:
    """Drop the collective: every process continues with its own values."""
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
    """Give every process the values of its predecessor."""
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
    "left out": (False, _dropped), "doubled": (True, _scaled(2.0)), "halved": (True, _scaled(0.5)),
    "one rank on": (True, _shifted), "nothing for the last": (True, _one_lacks)}
"""Way -> whether it comes behind the call's own work, and what it does."""
OTHER_GROUP = "over another group"


def _set(parts: Sequence[Any], values: Sequence[Sequence[torch.Tensor]]) -> None:
    for part, row in zip(parts, values, strict=True):
        for output, value in zip(part.outputs, row, strict=True):
            output.copy_(value)


def _clones(parts: Sequence[Any]) -> list[list[torch.Tensor]]:
    return [[output.clone() for output in part.outputs] for part in parts]


def _do_wrongly(way: str, site: Any, parts: Sequence[Any], work: Callable[[Any], None]) -> None:
    behind, do = WAYS[way]
    if behind:
        work(list(parts))
    do(site.kind, parts)


@dataclass(frozen=True)
class FaultyMessage:
    """Spoil the messages of one call site."""

    site: Any
    way: str

    def __call__(self, site: Any, parts: Sequence[Any], work: Callable[[Any], None]) -> bool:
        if site == self.site:
            _do_wrongly(self.way, site, parts, work)
        return bool(site == self.site)


@dataclass
class FaultsThatMatter:
    """Find the messages whose corruption would change a value. Others are no faults: all processes send the
    same values, or none."""

    found: dict[FaultyMessage, None] = field(default_factory=dict)

    def __call__(self, site: Any, parts: Sequence[Any], work: Callable[[Any], None]) -> bool:
        if len(parts) == 1 and site.kind != "recv":
            return False
        before = _clones(parts)
        # objects that are sent as bytes are settings of the start
        ways = ["left out"] if "object" in site.where or "param_groups" in site.where else WAYS
        work(list(parts))
        right = _clones(parts)
        for way in ways:
            _set(parts, before)
            _do_wrongly(way, site, parts, work)
            if any(not torch.equal(output, value) for part, values in zip(parts, right, strict=True)
                   for output, value in zip(part.outputs, values, strict=True)):
                self.found[FaultyMessage(site, way)] = None
        _set(parts, right)
        return True


@contextlib.contextmanager
def over_another_group(at: Any) -> Iterator[list[int]]:
    """Have a place call another group of as many processes; yields the ranks that did."""
    from torch.distributed import distributed_c10d

    from megatron_sov.engine.parallel import simulated_messages, simulated_world

    real, moved = simulated_world.SimulatedGroup._call, list[int]()

    def call(group: Any, kind: str, part: Any, work: Any) -> Any:
        if simulated_messages.find_call_site(kind, group._description) == at:
            others: Any = distributed_c10d._world.pg_map
            for other in others:
                if other.size() == group.size() and other._members != group._members:
                    moved.append(group._rank)
                    return real(other, kind, part, work)
        return real(group, kind, part, work)

    with mock.patch.object(simulated_world.SimulatedGroup, "_call", call):
        yield moved


def layout(recipe: str, gpu: str, num_ranks: int, settings: Sequence[str] | None = None) -> dict[str, Any]:
    """Prove one layout in this process, and return the verdict.

    Args:
        recipe: name of the recipe.
        gpu: kind of GPU whose recommended layout it is; "any" with settings.
        num_ranks: number of processes.
        settings: the layout; None: the recommended layout for `num_ranks`.
    """
    from megatron_sov.model import recipes
    from megatron_sov.model.config import apply_settings
    from megatron_sov.plan.search.recommended_layouts import get_recommended_settings
    from megatron_sov.proof.layout_proof import proof_to_json, prove_run

    config = recipes.get(recipe)
    if settings is None:
        settings = get_recommended_settings(config, num_ranks, gpu)
    result = proof_to_json(*prove_run(apply_settings(config, settings), num_ranks))
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return result | {"settings": settings, "cpu_s": usage.ru_utime + usage.ru_stime,
                     "peak_bytes": usage.ru_maxrss * 1024}


def every_recommended() -> Iterator[tuple[str, str, int, tuple[str, ...]]]:
    """Yield each recommended layout of each recipe once, with the fewest processes that cover it."""
    from megatron_sov.model import recipes
    from megatron_sov.model.config import apply_settings
    from megatron_sov.plan.search.recommended_layouts import RECOMMENDED

    for recipe, of_gpus in RECOMMENDED.items():
        for settings in dict.fromkeys(found for of_gpu in of_gpus.values() for found in of_gpu):
            config = apply_settings(recipes.get(recipe), [*settings])
            p = config.parallel
            together = p.pp * math.lcm(p.tp * p.cp, p.etp * p.ep)
            num_ranks = next(n for n in range(2 * together, 2048 + 1, together) if not config.problems(n))
            yield recipe, "any", num_ranks, settings


def layouts(cases: Iterable[tuple[str, str, int, Sequence[str] | None]]) -> bool:
    """Prove layouts one after another; return whether all equal one process."""
    equal = True
    for recipe, gpu, num_ranks, settings in cases:
        completed = subprocess.run([sys.executable, __file__, "one", recipe, gpu, str(num_ranks),
                                    *([] if settings is None else ["--", *settings])], text=True,
                                   stdout=subprocess.PIPE, check=True)
        parsed = json.loads(completed.stdout.splitlines()[-1])
        equal &= parsed["outcome"] == "equal"
        print(f"{recipe} on {num_ranks} {gpu}: {parsed['outcome']}, {parsed['largest']:.1e} apart at most, "
              f"{parsed['messages']:,} messages, {parsed['cpu_s'] / 60:.1f} processor minutes "
              f"({parsed['seconds'] / 60:.0f} by the clock), {parsed['peak_bytes'] / 2**30:.1f} GiB "
              f"({' '.join(parsed['settings'])})", flush=True)
        for place in [*parsed["places"], *parsed["sites"]][:10]:
            print(f"  {place}", flush=True)
    return equal


def faults(names: Sequence[str], only: Collection[tuple[str, str, str]] = ()) -> None:
    """Plant faults in some layouts, and print a line of JSON for each.

    Args:
        names: names of the layouts.
        only: (kind, layout, fault) to plant; empty: all.
    """
    from megatron_sov.model import recipes
    from megatron_sov.model.config import apply_settings
    from megatron_sov.proof.layout_proof import EQUAL, FAILS, Verdict, prove_miniature, run_reference
    from megatron_sov.proof.miniature import build_miniature
    from megatron_sov.proof.random_documents import write_documents

    known = set[Any]()
    for name in names:
        recipe, settings = LAYOUTS[name]["recipe"], LAYOUTS[name]["settings"].split()
        in_source = [Fault(f["kind"], f["function"], f["right"], f["wrong"]) for f in FAULTS["source"]
                     if name in f["layouts"]]
        with tempfile.TemporaryDirectory() as folder:
            config = apply_settings(recipes.get(recipe), [*settings, "train.global_batch_size=32"])
            small = build_miniature(config, 4, data := Path(folder, "documents"))
            write_documents(data, small.config)
            whole, matter = run_reference(small), FaultsThatMatter()
            assert prove_miniature(small, matter, whole).outcome == EQUAL, name
            for planted in in_source:
                if only and (planted.kind, name, str(planted)) not in only:
                    continue
                # in one process too, as it is in code that somebody has written
                with mutated(planted):
                    try:
                        verdict = prove_miniature(small)
                    except Exception as e:  # failures of the single process are reported too
                        verdict = Verdict(FAILS, 4, places=[f"one process alone: {e}"])
                place = FAULTS["places"][planted.place.rpartition(":")[2]]
                _told(planted.kind, name, str(planted), verdict,
                      re.search(place, " ".join(verdict.places[:1])) is not None)
            sent = [fault for fault in matter.found
                    if name not in FAULTS["losses"] or fault.site not in known]
            known |= {fault.site for fault in matter.found}
            for site in dict.fromkeys(fault.site for fault in sent):
                if only and (f"a message {OTHER_GROUP}", name, str(site)) not in only:
                    continue
                with over_another_group(site) as moved:
                    other = prove_miniature(small, None, whole) if "object" not in site.where else None
                if moved and other is not None:
                    _told(f"a message {OTHER_GROUP}", name, str(site), other, _names(other, site))
            for fault in sent:
                if only and (f"a message {fault.way}", name, str(fault.site)) not in only:
                    continue
                verdict = prove_miniature(small, fault, whole)
                _told(f"a message {fault.way}", name, str(fault.site), verdict, _names(verdict, fault.site))


def _names(verdict: Any, site: Any) -> bool:
    """Return whether a verdict says where the message is sent from."""
    return any(site.where in told for told in (*verdict.sites, *verdict.places))


def _told(kind: str, layout: str, fault: str, verdict: Any, is_named: bool) -> None:
    """Print the outcome of a fault, and whether its place was named."""
    print(json.dumps({
        "kind": kind, "layout": layout, "fault": fault, "outcome": verdict.outcome,
        "first": verdict.places[:3], "num_sites": len(verdict.sites), "seconds": verdict.seconds,
        "is_named": is_named}), flush=True)


def _rows(files: Sequence[str]) -> list[dict[str, Any]]:
    """Return the outcome of each fault, the latest one if it was planted again."""
    rows = [json.loads(line) for file in files for line in Path(file).read_text().splitlines()]
    return [*{(row["kind"], row["layout"], row["fault"]): row for row in rows}.values()]


def tally(files: Sequence[str]) -> bool:
    """Print the outcomes of `faults` by kind; return whether every fault that changes a value was found."""
    rows = _rows(files)
    equal = [row for row in rows if row["outcome"] == "equal"]
    middle_s = statistics.median(row["seconds"] for row in rows)
    print(f"{len(rows) - len(equal)} of {len(rows)} planted faults found, {sum(r['is_named'] for r in rows)} "
          f"by their place; {len(equal)} not found; {middle_s:.1f} s each (median, on a busy machine)")
    for name, asked in LAYOUTS.items():
        of_layout = [row for row in rows if row["layout"] == name]
        if of_layout:
            print(f"  {sum(row['outcome'] != 'equal' for row in of_layout)} of {len(of_layout)}: {name} "
                  f"({asked['recipe']} {asked['settings']})")
    print("kind of fault: found of planted, of these named by place")
    for kind in dict.fromkeys(row["kind"] for row in rows):
        of_kind = [row for row in rows if row["kind"] == kind]
        print(f"  {kind}: {sum(row['outcome'] != 'equal' for row in of_kind)} of {len(of_kind)}, "
              f"{sum(row['is_named'] for row in of_kind)}")
    unexplained = []
    print("not found:")
    for row in equal:
        why = next((known["why"] for known in FAULTS["no_faults"] if known["kind"] in row["kind"]
                    and known["text"] in f"{row['layout']}: {row['fault']}"), None)
        unexplained += [row] if why is None else []
        print(f"  {row['kind']}: {row['layout']}: {row['fault']}: {why or 'A GAP'}")
    return not unexplained


def main(argv: Sequence[str]) -> int:
    """Run the command line; return 1 if a layout differs or a fault was missed."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    warnings.simplefilter("ignore")
    from megatron_sov.engine.parallel import cpu_shims

    cpu_shims.prepare_without_gpu()
    if argv[0] == "one":
        print(json.dumps(layout(argv[1], argv[2], int(argv[3]), argv[5:] if "--" in argv else None)))
        return 0
    if argv[0] == "faults":
        faults(argv[1:] or [*LAYOUTS])
        return 0
    if argv[0] == "again":
        missed = {(row["kind"], row["layout"], row["fault"]) for row in _rows(argv[1:])
                  if row["outcome"] == "equal"}
        faults([name for name in LAYOUTS if any(layout == name for _, layout, _ in missed)], missed)
        return 0
    if argv[0] == "tally":
        return int(not tally(argv[1:]))
    if argv[0] == "recommended":
        return int(not layouts(every_recommended()))
    given = [(argv[i], argv[i + 1], int(argv[i + 2]), None) for i in range(1, len(argv), 3)]
    return int(not layouts(given or ((*case, None) for case in CASES)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
