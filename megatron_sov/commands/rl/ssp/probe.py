"""Options and checks for `megatron-sov ssp probe`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from megatron_sov.base.artifacts import find_damaged_files, read_manifest
from megatron_sov.base.documents.files import ACCEPTED_SAMPLES
from megatron_sov.base.documents.rows import check_rows, read_rows
from megatron_sov.base.errors import Fix, UserError
from megatron_sov.base.settings import AtLeastOne, DeclaredCommand, Flag, at_most_field, parse_nested
from megatron_sov.commands.evaluate.eval_passk import PROMPT, JudgedSamplingOptions
from megatron_sov.infer.request import RankOptions
from megatron_sov.judge.rewards.registry import build_versioned_reward, request_reward
from megatron_sov.runs.checkpoints import check_model

SYNTHESIS = "synthesis"
"""Artifact kind from `sov-data synth`."""
OWN_DOMAINS = ""
"""Key for a file whose rows name their domains."""


@dataclass(frozen=True, kw_only=True)
class SspProbeOptions(JudgedSamplingOptions, RankOptions):
    """Measure pass@k of a run's checkpoints per domain, and find the best checkpoint per domain."""

    checkpoints: Annotated[tuple[Path, ...], Flag("RUN|CHECKPOINT")]
    """Checkpoints or Hugging Face folders; a run stands for its complete checkpoints."""
    problem_sets: Annotated[tuple[str, ...], Flag("--problems", "DOMAIN=FILE.jsonl|DIR", many=True)]
    """Problems per domain: a JSON object per line, with `prompt` and the fields that the reward needs; or a
    folder from `sov-data synth probes`, whose rows name their domains."""
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
    """Domain, or `OWN_DOMAINS`, -> file with problems."""


def check_probe(options: SspProbeOptions) -> ProbeRequest:
    """Check problems, reward and checkpoints before the first command starts."""
    problems: dict[str, Path] = {}
    for text in options.problem_sets:
        domain, file = _parse_problem_set(text)
        if domain in problems:
            raise UserError(f"--problems {text}: domain {domain} already has {problems[domain]}; merge the "
                            "two files")
        problems[domain] = file
    build_versioned_reward(request_reward(options.reward, parse_nested(options.reward_set, "--reward-set")))
    for path in options.checkpoints:
        check_model(path)
    for file in problems.values():
        check_rows(file, "--problems", PROMPT)
    if OWN_DOMAINS in problems:
        for line, row in read_rows(problems[OWN_DOMAINS], "--problems", PROMPT):
            if not isinstance(row.get("domain"), str) or not row["domain"]:
                raise UserError(f"--problems {problems[OWN_DOMAINS]}: line {line} has no text in 'domain'; "
                                "pass DOMAIN=FILE.jsonl")
    return ProbeRequest(options, problems)


PROBE = DeclaredCommand(SspProbeOptions, check_probe,
                        "megatron_sov.commands.rl.ssp.probe_run:probe_checkpoints")


def _parse_problem_set(text: str) -> tuple[str, Path]:
    """Return domain and file of a --problems value."""
    domain, equals, name = text.partition("=")
    if not equals and Path(text).is_dir():
        read_manifest(Path(text), SYNTHESIS)
        if damage := find_damaged_files(Path(text)):
            raise UserError(f"--problems {text}: {damage[0]}; the files have changed since `sov-data synth` "
                            "wrote them")
        return OWN_DOMAINS, Path(text) / ACCEPTED_SAMPLES
    if domain and equals and name:
        return domain, Path(name)
    raise UserError(f"--problems {text}: must be DOMAIN=FILE.jsonl, e.g. algebra=algebra.jsonl, or "
                    "a folder of `sov-data synth probes`",
                    Fix(words={text: f"{Path(text).stem}={text}"}) if Path(text).is_file() else None)
