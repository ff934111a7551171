"""`megatron-sov reproduce SEED [--claim NAME ...] [--seeds N] [--quick] --output DIR`: the claims of a
published road, at a size for two cores."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated

from megatron_sov.base.artifacts import atomic_write, to_json
from megatron_sov.base.errors import ExitCode, UserError, nearest
from megatron_sov.base.outputs import refuse_nowhere
from megatron_sov.base.settings import AtLeastOne, Flag, add_options, num_cores, read_options
from megatron_sov.bench.reproduce.claims import ClaimsFile, find_file, read_claims, register
from megatron_sov.bench.reproduce.running import RESULTS, Order, claim_folder, refuse_dropped, seeds_of
from megatron_sov.bench.reproduce.verdict import PAGE, ClaimOutcome, Judged, judge, page, result, rows
from megatron_sov.work.progress.jobs import run_job, run_share
from megatron_sov.work.progress.journal import begin_journal, done_items, slurm_folder
from megatron_sov.work.progress.progress_bar import work_bar
from megatron_sov.work.submit.arrays import (
    SharedWork, profile_of, refuse_living, refuse_many_restarts, submit_shares)
from megatron_sov.work.submit.cluster_options import ClusterOptions

SHARES = "reproduce"


@dataclass(frozen=True, kw_only=True)
class ReproduceOptions(ClusterOptions):
    """Run the claims of a published road as small ordinary stages over seeds, and say which hold; a killed
    command goes on where it was."""

    seed: Annotated[str, Flag("SEED")]
    """typhoon-s, vibethinker, k-exaone, solar-open or hyperclova-omni, or a YAML file of claims."""
    claims: Annotated[tuple[str, ...], Flag("--claim", "NAME", many=True)] = ()
    """Only these claims (default: all)."""
    seeds: AtLeastOne | None = None
    """Seeds of each claim (default: as many as it asks for; fewer decide nothing, and more are refused)."""
    quick: bool = False
    """Only the claim that is run in minutes."""
    output: Annotated[Path, Flag(value="DIR")]
    """Folder for runs, results.json and reproduce.html."""
    workers: AtLeastOne = field(default_factory=num_cores)
    """Seeds at a time, each on one core; with --cluster: jobs of the array."""
    dry_run: bool = False
    """Print claims, hashes, budgets and power, with what --output has of them, and run nothing."""


add_arguments = partial(add_options, cls=ReproduceOptions)


@dataclass(frozen=True)
class SharedClaims:
    """What the jobs of an array know of a command."""

    file: Path
    order: Order

    def publish(self, found: dict[str, dict[int, dict[str, dict[str, float]]]]) -> list[Judged]:
        """Write results and page, of the claims that ran now and of those that ran before; returns them."""
        output = self.order.output
        claims = read_claims(self.file)
        judged = []
        for claim in (register(claims, name, self.file) for name in claims.claims):
            seeds = seeds_of(claim_folder(output, claim), claim.declared) | found.get(claim.name, {})
            told = judge(output, claim, seeds)
            # a form that ran is never dropped, whether another has run since or not
            if seeds or told.earlier:
                judged.append(told)
        atomic_write(output / RESULTS, to_json(result(judged)))
        atomic_write(output / PAGE, page(claims, judged))
        return judged


@dataclass(frozen=True)
class ClaimsShare:
    """The work of an array: each task runs every `num_shares`-th seed."""

    shared: SharedClaims
    num_shares: int

    def __call__(self, task: int) -> None:
        refuse_many_restarts("megatron-sov reproduce", "take more --workers")
        run_share(self.shared.order.job(1, self.shared.publish), task, self.num_shares)


@dataclass(frozen=True)
class ClaimsFinish:
    """The work of the last job."""

    shared: SharedClaims

    def __call__(self, task: int) -> None:
        """Run what is left, and write the page."""
        run_job(self.shared.order.job(1, self.shared.publish))


def run(args: argparse.Namespace) -> int:
    """Run what is missing; returns 0 where every claim holds, else that of a gate.

    Raises:
        UserError: a file of claims that is wrong or was changed after it had run, or a command that fails.
    """
    options = read_options(ReproduceOptions, args)
    # commands of claims run in folders of their own
    options = replace(options, output=options.output.absolute())
    file = find_file(options.seed).absolute()
    claims = read_claims(file)
    registered = tuple(register(claims, name, file) for name in _chosen(options, claims))
    seeds = {c.name: options.seeds or c.claim.seeds for c in registered}
    for c in registered:
        if seeds[c.name] > c.claim.seeds:
            raise UserError(f"--seeds {options.seeds}: claim {c.name} asks for {c.claim.seeds}, and seeds "
                            "that are added until it holds prove nothing; change its `seeds`, and tell it "
                            "in its `changes`")
    order = Order(registered, seeds, options.output, file.parent)
    refuse_dropped(options.output, claims.seed, [register(claims, name, file) for name in claims.claims])
    if options.dry_run:
        _print([judge(options.output, c, seeds_of(claim_folder(options.output, c), c.declared))
                for c in registered])
        return ExitCode.OK
    refuse_nowhere(options.output)
    options.output.mkdir(parents=True, exist_ok=True)
    shared = SharedClaims(file, order)
    if options.cluster:
        _submit(options, shared)
        return ExitCode.OK
    refuse_living(slurm_folder(options.output / RESULTS))
    order.begin()
    found: dict[str, dict[int, dict[str, dict[str, float]]]] = {}
    with work_bar("reproduce", len(order.items()), "seed") as bar:
        # what is done stands in the seeds' own folders, so that one may ask for other claims next
        run_job(order.job(options.workers, found.update, lambda item: bar.update(1)), redo=True)
    judged = [j for j in shared.publish(found) if j.registered.name in found]
    _print(judged)
    print(f"{options.output / PAGE}: opens in any browser without a network")
    return ExitCode.OK if all(j.outcome == ClaimOutcome.HOLDS for j in judged) else ExitCode.GATE_FAILED


def _chosen(options: ReproduceOptions, claims: ClaimsFile) -> list[str]:
    for name in options.claims:
        if name not in claims.claims:
            raise UserError(f"--claim {name}: must be one of {', '.join(claims.claims)}"
                            f"{nearest(name, claims.claims)}")
    found = [name for name, claim in claims.claims.items()
             if (not options.claims or name in options.claims) and (claim.quick or not options.quick)]
    if not found:
        raise UserError(f"--quick: no claim of --claim {' '.join(options.claims)} is quick; leave one out")
    return found


def _print(judged: list[Judged]) -> None:
    for j in judged:
        claim = j.registered.claim
        print(f"{j.registered.name} ({j.registered.address}, {claim.seeds} seeds, {claim.minutes:g} min of a "
              f"core): {claim.says}")
    table = rows(judged)
    widths = [max(len(row[i]) for row in (table.head, *table.rows)) for i in range(len(table.head))]
    for row in (table.head, *table.rows):
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def _submit(options: ReproduceOptions, shared: SharedClaims) -> None:
    order, profile = shared.order, profile_of(options)
    job = order.job(1, shared.publish)

    def begin() -> None:
        order.begin()
        begin_journal(job.output, job.made_by, job.identity, redo=True)

    submit_shares(job.output, SharedWork(
        SHARES, to_json(job.identity), len(order.items()), "seeds",
        num_done=lambda: len(done_items(job.output, job.identity)), begin=begin,
        share=partial(ClaimsShare, shared), finish=ClaimsFinish(shared)), profile, options.workers)
