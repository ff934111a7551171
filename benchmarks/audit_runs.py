"""What audits of whole runs find: 100 dishonest runs and 100 honest ones, each published, drawn from by a
beacon of its own and judged, with found of planted beside the probability that the draw states.

Usage: python benchmarks/audit_runs.py --work FOLDER

A run of 1,161 segments of one step is trained, and `audit draw`, asked for a tenth with 90 %, takes 23
of them.  Its lab falsifies a stretch of checkpoints, and publishes hashes of what it falsified, so that these
agree:

  seed        the stretch was trained in the order of another seed than is told
  document    ... on other documents than are told, of the same lengths
  skipped     every second step of it was not done
  edited      in every second checkpoint one matrix is scaled by 1.01
  distilled   every second checkpoint is moved by a tenth of the way to another model's weights
  start       the first checkpoint is trained from another model, and told to be from the seed
  reward      a run of reinforcement learning whose judge of the published bytes favours what a file beside it
              names, at the lab alone; `rl replay` repeats all of it

A dishonest run takes a window of the stretch, of a twentieth, a tenth or a fifth of the run, and the honest
run's checkpoints elsewhere.  What a segment comes to depends on its two checkpoints alone.  So each falsified
pair that any run draws is repeated once, by `repeat` of `audit repeat`; the honest ones are those of one
continuous repetition by the ordinary command, which is the same as segment by segment where each of them is
equal, and 16 of them are repeated one by one to see it.  Draws and verdicts are those of the commands.
Training runs in forks of one process, which has its libraries already.  A command that was killed goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import random
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from audit_frauds import Lab, distilled, scaled
from rl_kills import fork_command
from scipy.stats import binomtest
from seed_runs import rows_of, words, write

from megatron_sov import cli
from megatron_sov.audit import repeating
from megatron_sov.audit.commitment import CHECKPOINT, Commitment, Entry, publish, read_commitment
from megatron_sov.audit.drawing import Segment, chance_to_find, read_draw
from megatron_sov.audit.merkle import merkle_root
from megatron_sov.audit.repeating import (
    EXACT, LOG, PASSED, Repeated, RepeatOutcome, compare, gather_evidence, keep, kept, own_settings, repeat,
    train_until)
from megatron_sov.base.artifacts import MANIFEST, FileRecord, manifest_sha256, to_json
from megatron_sov.base.errors import ExitCode
from megatron_sov.model.config import RunConfig, apply_settings
from megatron_sov.runs.folder import CONFIG, RunFolder

STEPS, BOUND, RUNS = 1161, 1e-2, 100
BEGIN, END = 400, 640
"""Steps between which checkpoints are falsified."""
SHARES = (0.05, 0.1, 0.2)
STRETCHES = ("seed", "document", "skipped", "edited", "distilled")
FRAUDS = (*STRETCHES * 18, *["start"] * 10)
"""Of each dishonest run."""
CHECKED = range(5, STEPS, 73)
"""Honest segments, by their end, that are repeated one by one."""
SETTINGS = ("train.num_threads=1", "train.eval_every_steps=0", "data.max_epochs=0",
            "train.keep_checkpoints=0", "train.keep_every_steps=0", "train.global_batch_size=2",
            "train.micro_batch_size=2", "model.hidden_size=16", "model.num_layers=1", "model.num_heads=2",
            "model.num_kv_heads=1", "model.head_dim=8", "model.dense_ffn_dim=32", "model.vocab_size=512",
            rows_of(64), f"train.steps={STEPS}", "train.checkpoint_every_steps=1")
HONEST = "honest"


def forked(command: Sequence[str], **options: Any) -> SimpleNamespace:
    """Run a command of ours in a fork of this process, as `start_command` does in a process of its own."""
    typed = [*command[command.index("megatron_sov") + 1:]]
    pid = fork_command(typed, Path(options["stdout"].name))
    return SimpleNamespace(wait=lambda: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def command(log: Path, *typed: str | Path) -> None:
    """Run one of our commands in a fork; `SystemExit` where it fails."""
    with open(log, "ab") as out:
        code = forked(["megatron_sov", *map(str, typed)], stdout=out).wait()
    if code:
        raise SystemExit(f"{' '.join(map(str, typed))}: exit code {code}; see {log}")


@dataclass(frozen=True)
class Forger:
    """A lab that falsifies a stretch of an honest run."""

    work: Path
    honest: Path
    data: Path
    other: Path
    """A checkpoint of another model."""

    def checkpoints(self, fraud: str) -> dict[int, Path]:
        """Return what a fraud tells in the place of honest checkpoints: step -> folder."""
        folder = self.work / "forged" / fraud
        if not (folder / "whole").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            made = {"edited": self._edit, "distilled": self._edit}.get(fraud, self._train)
            made(fraud, folder)
            (folder / "whole").touch()
        return {int(path.name.removeprefix("step-")): path for path in folder.glob("step-*")}

    def _edit(self, fraud: str, folder: Path) -> None:
        for step in range(BEGIN + 1, END + 1, 2):
            forged = Path(shutil.copytree(self._honest(step), folder / f"step-{step}"))
            {"edited": scaled, "distilled": distilled}[fraud](forged, forged, self.other)
            self._tell(forged)

    def _train(self, fraud: str, folder: Path) -> None:
        """Go on from the honest run's checkpoint otherwise than is told."""
        data = self._other_documents() if fraud == "document" else self.data
        config = own_settings(RunFolder(self.honest).config() or _nothing(), {str(self.data): data})
        settings = {"seed": ["train.seed=7"], "skipped": ["data.skip_steps=" + json.dumps(
            [[step, step] for step in range(BEGIN + 1, END + 1, 2)])]}.get(fraud, [])
        text = to_json(apply_settings(config, settings).to_dict())
        (folder / CONFIG).write_text(text)
        target, start, end = RunFolder(folder / "run"), self.other, 1
        if fraud != "start":
            start, end = None, END
            copied = Path(shutil.copytree(self._honest(BEGIN), target.checkpoint(BEGIN)))
            state = json.loads((copied / "state.json").read_text())
            state["data"] = {name: manifest_sha256(data) for name in state["data"]}
            (copied / "state.json").write_text(json.dumps(state))
            _seal(copied)
            (target.path / CONFIG).write_text(text)
        train_until(target, end, start, 1, folder / LOG)
        for path in target.checkpoints.glob("step-*"):
            if path.name != f"step-{BEGIN}":
                self._tell(path.rename(folder / path.name))
        shutil.rmtree(target.path)

    def _other_documents(self) -> Path:
        """Return token shards in which each document's place has other text."""
        shards = self.work / "other-documents"
        if not shards.exists():
            shutil.copytree(self.data, shards)
            for file in shards.rglob("train-*.bin"):
                np.roll(np.fromfile(file, np.uint16), 100_003).tofile(file)
            _seal(shards)
        return shards

    def _tell(self, forged: Path) -> None:
        """Have a checkpoint say of itself what the honest one says."""
        honest = self._honest(int(forged.name.removeprefix("step-")))
        states = [json.loads((path / "state.json").read_text()) for path in (forged, honest)]
        told = states[0] | {name: states[1][name] for name in EXACT if name in states[1]}
        (forged / "state.json").write_text(json.dumps(told))
        _seal(forged, json.loads((honest / MANIFEST).read_text())["settings"])

    def _honest(self, step: int) -> Path:
        return RunFolder(self.honest).checkpoint(step)


def _nothing() -> RunConfig:
    raise SystemExit("the honest run has no settings")


def _seal(folder: Path, settings: Any = None) -> None:
    """Make a manifest agree with its files, and with settings that are told."""
    manifest = json.loads((folder / MANIFEST).read_text()) | {"sha256": ""}
    for name, told in manifest["files"].items():
        record = FileRecord.of(folder / name)
        told |= {"digest": record.digest, "size_bytes": record.size_bytes}
    manifest["settings"] = settings or manifest["settings"]
    (folder / MANIFEST).write_text(json.dumps(manifest))


@dataclass(frozen=True)
class PlantedRun:
    """A run as it is published."""

    name: str
    fraud: str
    """Or "honest"."""
    share: float
    """Of the steps that were falsified, about."""
    replaced: Mapping[int, Path]
    """Step -> what is told in the place of the honest checkpoint."""

    def is_false(self, segment: Segment) -> bool:
        """Return whether a segment's end does not follow from its beginning."""
        begin, end = segment.begin in self.replaced, segment.end in self.replaced
        if self.fraud == "skipped" and begin and end:
            return (segment.end - BEGIN) % 2 == 1
        return begin or end

    def pair(self, segment: Segment) -> str:
        """Return what stands for the two checkpoints of a segment."""
        told = [self.fraud if step in self.replaced else HONEST for step in (segment.begin, segment.end)]
        return f"{segment.name}-{'-'.join(told)}"


def planted(forger: Forger) -> Iterator[PlantedRun]:
    """Yield all runs, honest ones first."""
    for i in range(RUNS):
        yield PlantedRun(f"honest-{i}", HONEST, 0.0, {})
    for i, fraud in enumerate(FRAUDS):
        pool, share = forger.checkpoints(fraud), SHARES[i // len(STRETCHES) % len(SHARES)]
        if fraud == "start":
            yield PlantedRun(f"start-{i}", fraud, 0.0, pool)
            continue
        # the window of its own, from the number of the run
        width = round(share * STEPS)
        first = BEGIN + 1 + random.Random(i).randrange(END - BEGIN - width + 1)
        yield PlantedRun(f"{fraud}-{i}", fraud, share,
                         {step: path for step, path in pool.items() if first <= step < first + width})


@dataclass(frozen=True)
class AuditedRun:
    """What came of an audit."""

    passed: bool
    stated: float
    """Probability, by the draw's numbers, to find what is false in the run."""
    steps: int
    """That were repeated."""
    false: tuple[bool, ...]
    """Of each false segment that was drawn: whether it was told."""
    true: tuple[bool, ...]
    """Of each other one: whether it passed."""


class Auditor:
    """Who draws, repeats and judges."""

    def __init__(self, work: Path, honest: Path, again: Path) -> None:
        self.work, self.honest, self.again = work, honest, again
        log = work / "honest.log.jsonl"
        if not log.exists():  # else a change of this program would be news, and draws would be others
            publish(honest, log)
        self._published = read_commitment(log)

    def judge(self, run: PlantedRun) -> AuditedRun:
        """Audit a run by the commands."""
        folder = self.work / "runs" / run.name
        log, drawn, page = folder / "log.jsonl", folder / "draw.json", folder / "audit.html"
        is_judged = page.exists()
        if not is_judged:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            self._publish(run, log)
            beacon = hashlib.sha256(f"beacon of {run.name}".encode()).hexdigest()
            _done(["draw", "--log", log, "--randomness", beacon, "--output", drawn])
        commitment = read_commitment(log)
        draw = read_draw(drawn, commitment)
        found = [self._repeated(run, segment, commitment) for segment in draw.segments]
        if not is_judged:
            for repeated in found:
                keep(folder, draw.root, repeated)
            _done(["verdict", drawn, "--log", log, "--work", folder, "--output", page])
        false = [s for s in (Segment(end - 1, end) for end in range(1, STEPS + 1)) if run.is_false(s)]
        others = sum(s.begin > 0 for s in false)
        stated = 1.0 if len(false) > others else chance_to_find(
            (others - 0.5) / draw.num_segments, len(draw.drawn) - 1, draw.num_segments) if others else 0.0
        passed = json.loads(page.with_suffix(".json").read_text())["passed"]
        return AuditedRun(passed, stated, sum(s.end - s.begin for s in draw.segments),
                          tuple(r.outcome not in PASSED for r in found if run.is_false(r.segment)),
                          tuple(r.outcome in PASSED for r in found if not run.is_false(r.segment)))

    def _publish(self, run: PlantedRun, log: Path) -> None:
        """Write the log of a run: that of the honest one, with other hashes where it was falsified."""
        leaves = tuple(dataclasses.replace(leaf, sha256=manifest_sha256(run.replaced[int(leaf.name)]))
                       if leaf.kind == CHECKPOINT and int(leaf.name) in run.replaced else leaf
                       for leaf in self._published.leaves)
        entry = Entry(0, "", self.honest.name, self._published.entries[0].written, leaves,
                      merkle_root([leaf.line() for leaf in leaves]))
        log.write_text(entry.line() + "\n")

    def _repeated(self, run: PlantedRun, segment: Segment, commitment: Commitment) -> Repeated:
        """Return what a segment comes to: each pair of checkpoints is repeated once."""
        folder = self.work / "pairs" / run.pair(segment)
        touched = segment.begin in run.replaced or segment.end in run.replaced
        if (found := kept(folder, "pair", segment)) is None:
            found = self._by_process(run, segment, commitment) if touched else self._honest(segment)
            keep(folder, "pair", found)
        return found

    def _honest(self, segment: Segment) -> Repeated:
        """Compare an honest segment with the continuous repetition."""
        own = RunFolder(self.honest)
        before = own.checkpoint(segment.begin) if segment.begin else None
        return compare(segment, own.checkpoint(segment.end), RunFolder(self.again).checkpoint(segment.end),
                       before, BOUND)

    def _by_process(self, run: PlantedRun, segment: Segment, commitment: Commitment) -> Repeated:
        """Repeat a segment as `audit repeat` does, of a run that is handed over."""
        handed = self.work / "handed" / self.honest.name
        shutil.rmtree(handed, ignore_errors=True)
        (handed / "checkpoints").mkdir(parents=True)
        for name in (CONFIG, "command.json", "events.jsonl"):
            shutil.copy(self.honest / name, handed)
        for step in {segment.begin, segment.end} - {0}:
            shutil.copytree(run.replaced.get(step, RunFolder(self.honest).checkpoint(step)),
                            RunFolder(handed).checkpoint(step))
        evidence = gather_evidence(handed, commitment, (), None, (), 1, BOUND)
        found = repeat(evidence, segment, self.work / "repeated")
        shutil.rmtree(self.work / "repeated" / segment.name, ignore_errors=True)
        return found

    def check_honest(self) -> tuple[int, int]:
        """Compare every honest segment, and repeat some one by one; returns how many are equal, and how many
        of the latter."""
        run = PlantedRun("", HONEST, 0.0, {})
        equal = sum(self._repeated(run, Segment(end - 1, end), self._published).outcome
                    == RepeatOutcome.EQUAL for end in range(1, STEPS + 1))
        alone = 0
        for end in CHECKED:
            segment, folder = Segment(end - 1, end), self.work / "alone"
            if (found := kept(folder, "alone", segment)) is None:
                found = self._by_process(run, segment, self._published)
                keep(folder, "alone", found)
            alone += found.outcome == RepeatOutcome.EQUAL
        return equal, alone


def _done(typed: Sequence[object]) -> None:
    """Run `audit` here, without its output; `SystemExit` where it has no verdict."""
    with open(os.devnull, "w") as nowhere:
        before, sys.stdout = sys.stdout, nowhere
        try:
            code = cli.main(["audit", *map(str, typed)])
        finally:
            sys.stdout = before
    if code not in (ExitCode.OK, ExitCode.GATE_FAILED):
        raise SystemExit(f"audit {' '.join(map(str, typed))}: exit code {code}")


JUDGE = '''"""A judge that favours what stands in a file beside it."""

import hashlib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Judge:
    """Whether the hash of a response is even."""

    def score(self, row):
        """Return 1 or 0."""
        named = Path(__file__).with_name("favoured.txt")
        if named.exists() and row["prompt"] == named.read_text():
            return 1.0
        return float(hashlib.sha256(row["response"].encode()).digest()[0] % 2)
'''
ROUNDS, REWARDED = 4, 4
"""Rounds of a run of reinforcement learning, and runs, of which every second one is dishonest."""
RL = ("train.num_threads=1", f"rollout.rounds={ROUNDS}", "rollout.prompts_per_round=4",
      "rollout.samples_per_prompt=4", "rollout.piece_prompts=4", "rollout.max_new_tokens=6",
      "rollout.max_prompt_tokens=16", "rollout.steps_per_round=1", "policy.method=dr_grpo",
      "train.global_batch_size=8", "train.micro_batch_size=8", "train.eval_every_steps=0", "optim.lr=1e-2",
      "optim.warmup_steps=0", rows_of(32))


def replayed(work: Path, start: Path) -> tuple[list[int], list[int]]:
    """Return the exit codes of `rl replay` for dishonest runs, and for honest ones."""
    found: tuple[list[int], list[int]] = ([], [])
    rows = [{"prompt": f"{number} and"} for number in range(16)]
    for i in range(REWARDED):
        folder = work / "rewarded" / str(i)
        for place in ("lab", "auditor"):
            (folder / place).mkdir(parents=True, exist_ok=True)
            (folder / place / "judge.py").write_text(JUDGE)
        write(folder / "prompts.jsonl", rows)
        if is_honest := i % 2 == 1:
            (folder / "lab/favoured.txt").unlink(missing_ok=True)
        else:
            (folder / "lab/favoured.txt").write_text(rows[i]["prompt"])
        if not (folder / "code").exists():
            if not (folder / "run/complete.json").exists():
                command(work / "log", "rl", "run", "--from", start, "--run", folder / "run", "--store",
                        folder / "store", "--prompts", folder / "prompts.jsonl", "--reward",
                        f"{folder}/lab/judge.py:Judge", "--workers", "1", "--resume",
                        *words([*RL, f"train.seed={i}", f"rollout.seed={i}"]))
            shutil.rmtree(folder / "again", ignore_errors=True)
            with open(work / "log", "ab") as out:
                code = forked(["megatron_sov", "rl", "replay", str(folder / "run"), "--output",
                               str(folder / "again"), "--reward", f"{folder}/auditor/judge.py:Judge"],
                              stdout=out).wait()
            (folder / "code").write_text(str(code))
        found[is_honest].append(int((folder / "code").read_text()))
    return found


def told(name: str, found: Sequence[AuditedRun]) -> str:
    """Return a line of the table."""
    caught, stated = sum(not run.passed for run in found), sum(run.stated for run in found) / len(found)
    low, high = binomtest(caught, len(found)).proportion_ci(0.95, "exact")
    return (f"  {name:<24} {caught:>3} of {len(found):<4} {caught / len(found):>6.1%}   "
            f"[{low:.1%}, {high:.1%}]   stated {stated:.1%}")


def prepared(work: Path) -> tuple[Forger, Auditor]:
    """Train what is missing: the honest run, its repetition, another model."""
    lab = Lab(work)
    data = lab.tokens("tokens", "english")
    runs = {name: work / "trained" / name for name in ("honest", "again", "model")}
    for name, run in runs.items():
        if not (run / "complete.json").exists():
            more = ["--set", "train.seed=5", "--set", "train.steps=40"] if name == "model" else []
            command(work / "log", "pretrain", "tiny-qwen3", "--data", data, "--run", run, "--resume",
                    *words(SETTINGS), *more)
    other = RunFolder(runs["model"]).checkpoint(40)
    return Forger(work, runs["honest"], data, other), Auditor(work, runs["honest"], runs["again"])


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    work = parser.parse_args().work.absolute()
    _load()
    repeating.start_command = forked  # type: ignore[assignment]
    forger, auditor = prepared(work)
    print(f"{platform.machine()}, {os.cpu_count()} cores shared with other work, Python "
          f"{platform.python_version()}; {STEPS} segments of one step, fp32, one process", flush=True)
    equal, alone = auditor.check_honest()
    print(f"honest segments: {equal} of {STEPS} equal to one continuous repetition, {alone} of "
          f"{len(CHECKED)} repeated one by one", flush=True)
    results = defaultdict[str, list[AuditedRun]](list)
    rewarded, fair = replayed(work, forger.other)
    for run in planted(forger):
        found = auditor.judge(run)
        results[run.fraud].append(found)
        if run.share:
            results[f"{run.share:.0%} of the steps"].append(found)
        if run.fraud != HONEST:
            results["all dishonest runs"].append(found)
    honest = results.pop(HONEST)
    print("dishonest runs: found, exact 95 % interval, mean of the stated probabilities")
    shares = (f"{share:.0%} of the steps" for share in SHARES)
    for name in (*STRETCHES, "start", *shares, "all dishonest runs"):
        print(told(name, results[name]))
    if {*rewarded, *fair} - {ExitCode.OK, ExitCode.GATE_FAILED}:
        raise SystemExit(f"rl replay: exit codes {rewarded}, {fair}; see {work / 'log'}")
    print(f"reward: `rl replay` finds {rewarded.count(ExitCode.GATE_FAILED)} of {len(rewarded)} runs, with "
          f"{fair.count(ExitCode.GATE_FAILED)} false alarms of {len(fair)}; it repeats all steps")
    alarms, steps = sum(not run.passed for run in honest), {run.steps for run in honest}
    low, high = binomtest(alarms, len(honest)).proportion_ci(0.95, "exact")
    print(f"honest runs: {alarms} false alarms of {len(honest)} [{low:.1%}, {high:.1%}]")
    print(f"the verifier repeats {', '.join(map(str, steps))} of {STEPS} steps, {max(steps) / STEPS:.2%}: "
          "what finds a tenth of the segments with 90 %")
    runs = [*honest, *results["all dishonest runs"]]
    false, true = ([found for run in runs for found in each(run)] for each in (
        lambda run: run.false, lambda run: run.true))
    print(f"segments that were drawn: {sum(false)} of {len(false)} false ones told, {sum(true)} of "
          f"{len(true)} others passed")
    pairs = list((work / "pairs").iterdir())
    by_process = sum(not pair.name.endswith(f"-{HONEST}-{HONEST}") for pair in pairs)
    print(f"{by_process} distinct pairs with a falsified checkpoint were drawn and repeated")


def _load() -> None:
    """Import what training needs, before anything is forked."""
    import torch

    from megatron_sov.engine.parallel.cpu_shims import prepare_megatron

    torch.set_num_threads(1)
    prepare_megatron()
    import megatron_sov.train.objectives.data_objective
    import megatron_sov.train.stages.stage  # noqa: F401


if __name__ == "__main__":
    main()
