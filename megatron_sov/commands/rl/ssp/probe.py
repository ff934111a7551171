"""Options and checks for `megatron-sov ssp probe`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from megatron_sov.base.artifacts import find_damaged_files, read_manifest
from megatron_sov.base.documents.rows import check_rows
from megatron_sov.base.errors import Fix, UserError
from megatron_sov.base.settings import AtLeastOne, DeclaredCommand, Flag, at_most_field, parse_nested
from megatron_sov.commands.evaluate.eval_passk import PROMPT, JudgedSamplingOptions
from megatron_sov.infer.request import RankOptions
from megatron_sov.judge.rewards.registry import build_versioned_reward, request_reward
from megatron_sov.runs.checkpoints import check_model

PROBING_SETS = "probing_sets"
"""Artifact kind from `sov-data probing-sets`."""


@dataclass(frozen=True, kw_only=True)
class SspProbeOptions(JudgedSamplingOptions, RankOptions):
    """Measure pass@k of a run's checkpoints per domain, and find the best checkpoint per domain."""

    checkpoints: Annotated[tuple[Path, ...], Flag("RUN|CHECKPOINT")]
    """Checkpoints or Hugging Face folders; a run stands for its complete checkpoints."""
    problem_sets: Annotated[tuple[str, ...], Flag("--problems", "DOMAIN=FILE.jsonl|DIR", many=True)]
    """Problems per domain: a JSON object per line, with `prompt` and the fields that the reward needs; or a
    folder from `sov-data probing-sets`."""
    k: Annotated[AtLeastOne, Flag(value="K"), at_most_field("samples")]
    """The checkpoint with the greatest pass@K is the best in a domain."""
    output: Annotated[Path, Flag(value="DIR")]
    """Probe folder. A repeated command continues the probe, and may add checkpoints."""
    run: Annotated[Path | None, Flag(value="DIR")] = None
    """Also record the table in DIR/events.jsonl, for the run's report."""
    dry_run: bool = False
    """Print the `eval passk` commands for checkpoints without results, and exit."""


@dataclass(frozen=True)
class ProbeRequest:
    """Checked input for `probe_run.probe_checkpoints`."""

    options: SspProbeOptions
    problems: dict[str, Path]
    """Domain -> file with problems."""


def check_probe(options: SspProbeOptions) -> ProbeRequest:
    """Check problems, reward and checkpoints before the first command starts."""
    problems: dict[str, Path] = {}
    for text in options.problem_sets:
        files = _parse_problem_set(text)
        for domain in files:
            if domain in problems:
                raise UserError(f"--problems {text}: domain {domain} already has {problems[domain]}; merge "
                                "the two files")
        problems |= files
    build_versioned_reward(request_reward(options.reward, parse_nested(options.reward_set, "--reward-set")))
    for path in options.checkpoints:
        check_model(path)
    for file in problems.values():
        check_rows(file, "--problems", PROMPT)
    return ProbeRequest(options, problems)


PROBE = DeclaredCommand(SspProbeOptions, check_probe,
                        "megatron_sov.commands.rl.ssp.probe_run:probe_checkpoints")


def _parse_problem_set(text: str) -> dict[str, Path]:
    """Return domain -> file for a --problems value."""
    domain, equals, name = text.partition("=")
    if not equals and Path(text).is_dir():
        return _read_probing_sets(Path(text))
    if domain and equals and name:
        return {domain: Path(name)}
    raise UserError(f"--problems {text}: must be DOMAIN=FILE.jsonl, e.g. algebra=algebra.jsonl, or "
                    "a folder of `sov-data probing-sets`",
                    Fix(words={text: f"{Path(text).stem}={text}"}) if Path(text).is_file() else None)


def _read_probing_sets(folder: Path) -> dict[str, Path]:
    """Return domain -> file in an artifact from `sov-data probing-sets`, whose files must be unchanged."""
    content = read_manifest(folder, PROBING_SETS).content
    if damage := find_damaged_files(folder):
        raise UserError(f"--problems {folder}: {damage[0]}; the files have changed since `sov-data "
                        "probing-sets` wrote them")
    return {str(domain): folder / f"{domain}.jsonl" for domain in content.get("domains", {})}
