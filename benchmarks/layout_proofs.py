"""Compare recommended layouts with one process, and check that planted communication faults are found.

Usage: python benchmarks/layout_proofs.py layouts [RECIPE GPU RANKS ...]
       python benchmarks/layout_proofs.py recommended
       python benchmarks/layout_proofs.py faults [LAYOUT ...] > FAULTS.jsonl
       python benchmarks/layout_proofs.py again FAULTS.jsonl ... > AGAIN.jsonl
       python benchmarks/layout_proofs.py tally FAULTS.jsonl ... AGAIN.jsonl

`layouts` proves recommended layouts of large recipes (`CASES`, or the named ones) with all of their simulated
ranks, as `megatron-sov plan --prove` does, each in its own process. `recommended` proves every layout that is
recommended for any recipe, on the fewest ranks with two replicas of the weights and of the experts. `faults`
runs the layouts of `data/layout_faults.yaml` once for each fault: every communication call corrupted in every
way, and functions with changed source. `again` plants the missed faults again after a correction, and `tally`
prints how many faults were found, and how many were located.
"""

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


def drop_message(kind: str, parts: Sequence[Any]) -> None:
    """Drop the collective: every process continues with its own values."""
    for index, part in enumerate(parts):
        if kind == "reduce_scatter":
            part.outputs[0].copy_(part.inputs[index])
        elif kind == "allgather":
            for output in part.outputs:
                output.copy_(part.inputs[0])
        elif kind == "alltoall":
            part.outputs[0].zero_()


def scale_message(factor: float) -> Callable[[str, Sequence[Any]], None]:
    """Return a function that multiplies every result by `factor`."""
    def scale(kind: str, parts: Sequence[Any]) -> None:
        for part in parts:
            for output in part.outputs:
                if output.is_floating_point():
                    output.mul_(factor)
    return scale


def shift_message(kind: str, parts: Sequence[Any]) -> None:
    """Give every process the values of its predecessor."""
    received = [[output.clone() for output in part.outputs] for part in parts]
    for part, values in zip(parts, [received[-1], *received[:-1]], strict=True):
        for output, value in zip(part.outputs, values, strict=True):
            if output.shape == value.shape:
                output.copy_(value)


def zero_last(kind: str, parts: Sequence[Any]) -> None:
    """Zero the result of the last process."""
    for output in parts[-1].outputs:
        output.zero_()


CORRUPTIONS: dict[str, tuple[bool, Callable[[str, Sequence[Any]], None]]] = {
    "left out": (False, drop_message), "doubled": (True, scale_message(2.0)),
    "halved": (True, scale_message(0.5)),
    "one rank on": (True, shift_message), "nothing for the last": (True, zero_last)}
"""Name -> (whether the message is sent before the corruption, function that corrupts the results)."""
OTHER_GROUP = "over another group"


def restore_outputs(parts: Sequence[Any], values: Sequence[Sequence[torch.Tensor]]) -> None:
    for part, row in zip(parts, values, strict=True):
        for output, value in zip(part.outputs, row, strict=True):
            output.copy_(value)


def clone_outputs(parts: Sequence[Any]) -> list[list[torch.Tensor]]:
    return [[output.clone() for output in part.outputs] for part in parts]


def corrupt_message(way: str, site: Any, parts: Sequence[Any], work: Callable[[Any], None]) -> None:
    """Corrupt a message of all processes in one way of CORRUPTIONS; `work` sends it."""
    sends_first, corrupt = CORRUPTIONS[way]
    if sends_first:
        work(list(parts))
    corrupt(site.kind, parts)


@dataclass(frozen=True)
class FaultyMessage:
    """Corrupts the messages of one call site in one way (a key of CORRUPTIONS)."""

    site: Any
    way: str

    def __call__(self, site: Any, parts: Sequence[Any], work: Callable[[Any], None]) -> bool:
        if site == self.site:
            corrupt_message(self.way, site, parts, work)
        return bool(site == self.site)


@dataclass
class FaultsThatMatter:
    """Records the messages whose corruption changes a value. Corrupting other messages is no fault, because
    all processes send equal values or none."""

    found: dict[FaultyMessage, None] = field(default_factory=dict)

    def __call__(self, site: Any, parts: Sequence[Any], work: Callable[[Any], None]) -> bool:
        if len(parts) == 1 and site.kind != "recv":
            return False
        before = clone_outputs(parts)
        # objects sent as bytes are settings exchanged at the start: only drop them
        ways = ["left out"] if "object" in site.where or "param_groups" in site.where else CORRUPTIONS
        work(list(parts))
        right = clone_outputs(parts)
        for way in ways:
            restore_outputs(parts, before)
            corrupt_message(way, site, parts, work)
            if any(not torch.equal(output, value) for part, values in zip(parts, right, strict=True)
                   for output, value in zip(part.outputs, values, strict=True)):
                self.found[FaultyMessage(site, way)] = None
        restore_outputs(parts, right)
        return True


@contextlib.contextmanager
def over_another_group(call_site: Any) -> Iterator[list[int]]:
    """Redirect a call site to another group of the same size; yields the list of redirected ranks."""
    from torch.distributed import distributed_c10d

    from layout_proof import simulated_messages, simulated_world

    original, moved_ranks = simulated_world.SimulatedGroup._call, list[int]()

    def call(group: Any, kind: str, part: Any, work: Any) -> Any:
        if simulated_messages.find_call_site(kind, group._description) == call_site:
            groups: Any = distributed_c10d._world.pg_map
            for other in groups:
                if other.size() == group.size() and other._members != group._members:
                    moved_ranks.append(group._rank)
                    return original(other, kind, part, work)
        return original(group, kind, part, work)

    with mock.patch.object(simulated_world.SimulatedGroup, "_call", call):
        yield moved_ranks


def prove_layout(recipe: str, gpu: str, num_ranks: int, settings: Sequence[str] | None = None
                 ) -> dict[str, Any]:
    """Prove one layout in this process, and return the verdict.

    Args:
        recipe: name of the recipe.
        gpu: kind of GPU whose recommended layout it is; "any" with settings.
        num_ranks: number of processes.
        settings: the layout; None: the recommended layout for `num_ranks`.
    """
    from megatron_sov.model import recipes
    from megatron_sov.model.config import apply_settings
    from megatron_sov.plan.search.recommended_layouts import find_recommended
    from megatron_sov.proof.layout_proof import proof_to_json, prove_run

    config = recipes.get(recipe)
    if settings is None:
        settings = find_recommended(config, num_ranks, gpu) or ()
    result = proof_to_json(*prove_run(apply_settings(config, settings), num_ranks))
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return result | {"settings": settings, "cpu_s": usage.ru_utime + usage.ru_stime,
                     "peak_bytes": usage.ru_maxrss * 1024}


def iter_recommended_layouts() -> Iterator[tuple[str, str, int, tuple[str, ...]]]:
    """Yield each recommended layout of each recipe once, with the fewest processes that cover it."""
    from megatron_sov.model import recipes
    from megatron_sov.model.config import apply_settings
    from megatron_sov.plan.search.recommended_layouts import RECOMMENDED

    for recipe, layouts_of_gpus in RECOMMENDED.items():
        layouts = [settings for layouts in layouts_of_gpus.values() for settings in layouts]
        for settings in dict.fromkeys(layouts):
            config = apply_settings(recipes.get(recipe), [*settings])
            p = config.parallel
            replica = p.pp * math.lcm(p.tp * p.cp, p.etp * p.ep)
            num_ranks = next(n for n in range(2 * replica, 2048 + 1, replica) if not config.problems(n))
            yield recipe, "any", num_ranks, settings


def prove_layouts(cases: Iterable[tuple[str, str, int, Sequence[str] | None]]) -> bool:
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


def plant_faults(names: Sequence[str], only: Collection[tuple[str, str, str]] = ()) -> None:
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

    covered_sites = set[Any]()
    for name in names:
        recipe, settings = LAYOUTS[name]["recipe"], LAYOUTS[name]["settings"].split()
        source_faults = [Fault(f["kind"], f["function"], f["right"], f["wrong"]) for f in FAULTS["source"]
                         if name in f["layouts"]]
        with tempfile.TemporaryDirectory() as folder:
            config = apply_settings(recipes.get(recipe), [*settings, "train.global_batch_size=32"])
            miniature = build_miniature(config, 4, data := Path(folder, "documents"))
            write_documents(data, miniature.config)
            reference, messages = run_reference(miniature), FaultsThatMatter()
            assert prove_miniature(miniature, messages, reference).outcome == EQUAL, name
            for source_fault in source_faults:
                if only and (source_fault.kind, name, str(source_fault)) not in only:
                    continue
                # in the reference process too, as a fault in the source would be
                with mutated(source_fault):
                    try:
                        verdict = prove_miniature(miniature)
                    except Exception as e:  # failures of the single process are reported too
                        verdict = Verdict(FAILS, 4, places=[f"one process alone: {e}"])
                place = FAULTS["places"][source_fault.place.rpartition(":")[2]]
                print_fault(source_fault.kind, name, str(source_fault), verdict,
                            re.search(place, " ".join(verdict.places[:1])) is not None)
            message_faults = [fault for fault in messages.found
                              if name not in FAULTS["losses"] or fault.site not in covered_sites]
            covered_sites |= {fault.site for fault in messages.found}
            for site in dict.fromkeys(fault.site for fault in message_faults):
                if only and (f"a message {OTHER_GROUP}", name, str(site)) not in only:
                    continue
                with over_another_group(site) as moved_ranks:
                    redirected = None
                    if "object" not in site.where:
                        redirected = prove_miniature(miniature, None, reference)
                if moved_ranks and redirected is not None:
                    print_fault(f"a message {OTHER_GROUP}", name, str(site), redirected,
                                names_call_site(redirected, site))
            for fault in message_faults:
                if only and (f"a message {fault.way}", name, str(fault.site)) not in only:
                    continue
                verdict = prove_miniature(miniature, fault, reference)
                print_fault(f"a message {fault.way}", name, str(fault.site), verdict,
                            names_call_site(verdict, fault.site))


def names_call_site(verdict: Any, site: Any) -> bool:
    """Return whether a verdict names the call site of the message."""
    return any(site.where in text for text in (*verdict.sites, *verdict.places))


def print_fault(kind: str, layout: str, fault: str, verdict: Any, is_named: bool) -> None:
    """Print the outcome of a fault, and whether its place was named."""
    print(json.dumps({
        "kind": kind, "layout": layout, "fault": fault, "outcome": verdict.outcome,
        "first": verdict.places[:3], "num_sites": len(verdict.sites), "seconds": verdict.seconds,
        "is_named": is_named}), flush=True)


def read_rows(files: Sequence[str]) -> list[dict[str, Any]]:
    """Return the outcome of each fault, the latest one if it was planted again."""
    rows = [json.loads(line) for file in files for line in Path(file).read_text().splitlines()]
    return [*{(row["kind"], row["layout"], row["fault"]): row for row in rows}.values()]


def tally(files: Sequence[str]) -> bool:
    """Print the outcomes of `faults` by kind; return whether every fault that changes a value was found."""
    rows = read_rows(files)
    equal = [row for row in rows if row["outcome"] == "equal"]
    median_s = statistics.median(row["seconds"] for row in rows)
    print(f"{len(rows) - len(equal)} of {len(rows)} planted faults found, {sum(r['is_named'] for r in rows)} "
          f"by their place; {len(equal)} not found; {median_s:.1f} s each (median, on a busy machine)")
    for name, layout in LAYOUTS.items():
        layout_rows = [row for row in rows if row["layout"] == name]
        if layout_rows:
            print(f"  {sum(row['outcome'] != 'equal' for row in layout_rows)} of {len(layout_rows)}: {name} "
                  f"({layout['recipe']} {layout['settings']})")
    print("kind of fault: found of planted, of these named by place")
    for kind in dict.fromkeys(row["kind"] for row in rows):
        kind_rows = [row for row in rows if row["kind"] == kind]
        print(f"  {kind}: {sum(row['outcome'] != 'equal' for row in kind_rows)} of {len(kind_rows)}, "
              f"{sum(row['is_named'] for row in kind_rows)}")
    unexplained = []
    print("not found:")
    for row in equal:
        fault = f"{row['layout']}: {row['fault']}"
        reasons = [harmless["why"] for harmless in FAULTS["no_faults"]
                   if harmless["kind"] in row["kind"] and harmless["text"] in fault]
        if not reasons:
            unexplained.append(row)
        print(f"  {row['kind']}: {fault}: {reasons[0] if reasons else 'A GAP'}")
    return not unexplained


def main(argv: Sequence[str]) -> int:
    """Run the command line; return 1 if a layout differs or a fault was missed."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    warnings.simplefilter("ignore")
    from layout_proof import cpu_shims

    cpu_shims.prepare_without_gpu()
    if argv[0] == "one":
        print(json.dumps(prove_layout(argv[1], argv[2], int(argv[3]), argv[5:] if "--" in argv else None)))
        return 0
    if argv[0] == "faults":
        plant_faults(argv[1:] or [*LAYOUTS])
        return 0
    if argv[0] == "again":
        missed = {(row["kind"], row["layout"], row["fault"]) for row in read_rows(argv[1:])
                  if row["outcome"] == "equal"}
        plant_faults([name for name in LAYOUTS if any(layout == name for _, layout, _ in missed)],
                     missed)
        return 0
    if argv[0] == "tally":
        return int(not tally(argv[1:]))
    if argv[0] == "recommended":
        return int(not prove_layouts(iter_recommended_layouts()))
    cases = [(argv[i], argv[i + 1], int(argv[i + 2]), None) for i in range(1, len(argv), 3)]
    return int(not prove_layouts(cases or ((*case, None) for case in CASES)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
