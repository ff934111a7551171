"""VibeThinker's spectrum phase (arXiv 2511.06221): choose the checkpoint with the best pass@k per domain,
and measure a merged checkpoint's gain over it, with confidence intervals. A probe's folder:

    asked.json       problems, reward and samples, equal for all checkpoints
    problems.jsonl   problems of all domains, the input of `eval passk`
    checkpoints/     NAME-DIGEST: output of `eval passk` for a checkpoint, reused by later commands
    table/           an artifact: pass@k per checkpoint and domain, and the choices
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_sov.base.artifacts import (
    MANIFEST, create_artifact, find_damaged_files, format_json, read_manifest, write_atomically)
from megatron_sov.base.digests import fingerprint_folder
from megatron_sov.base.documents.rows import read_rows
from megatron_sov.base.errors import UserError
from megatron_sov.convert.sources import is_hf_folder
from megatron_sov.eval.pass_at_k import ScoredResponses, compute_pass_at_k, read_scored_parts
from megatron_sov.eval.statistics import compute_difference_interval
from megatron_sov.runs.checkpoints import (
    CHECKPOINT_KIND, CHECKPOINTS_FOLDER, MERGED, check_model_path, find_checkpoint, list_complete)

TABLE_KIND = "ssp_probe"
CONDITIONS, PROBLEMS, CHECKPOINTS, TABLE, RESULTS = ("asked.json", "problems.jsonl", "checkpoints", "table",
                                                "results.json")
DOMAIN = "probe_domain"
"""Field with the domain, in problems and responses."""
SAMPLES, PROBLEM = "samples.jsonl", "prompt_index"
"""File from `eval passk` with all responses, and the field with the problem's index."""


@dataclass(frozen=True)
class MeasuredCheckpoint:
    """A checkpoint's results in a domain."""

    checkpoint: str
    domain: str
    figures: Mapping[str, Any]
    """See `ScoredResponses.figures`."""
    pass_at_k: Mapping[int, Mapping[str, float]]
    """k -> problem -> pass@k; problems with fewer than k scored samples are left out."""

    @staticmethod
    def from_responses(checkpoint: str, domain: str, responses: ScoredResponses, ks: Sequence[int]
                       ) -> "MeasuredCheckpoint":
        pass_at_k: dict[int, dict[str, float]] = {}
        for k in ks:
            pass_at_k[k] = {problem: compute_pass_at_k(counts.num_scored, counts.num_right, k)
                            for problem, counts in responses.prompts.items() if counts.num_scored >= k}
        return MeasuredCheckpoint(checkpoint, domain, responses.figures(ks), pass_at_k)

    def mean_pass_at_k(self, k: int) -> float:
        return fmean(self.pass_at_k[k].values())

    def row(self, ks: Sequence[int]) -> dict[str, Any]:
        row: dict[str, Any] = {"checkpoint": self.checkpoint, "domain": self.domain}
        for name in ("num_prompts", "num_unscored", "mean_reward", "share_at_limit"):
            row[name] = self.figures.get(name)
        return {**row, "pass_at_k": [e for e in self.figures["pass_at_k"] if e["k"] in ks]}


@dataclass(frozen=True)
class DomainChoice:
    """The checkpoint with the best pass@k in a domain; ties go to the earliest checkpoint."""

    domain: str
    checkpoint: str
    value: float
    """pass@k of `checkpoint`; a maximum over several estimates is biased upwards."""
    as_good: tuple[str, ...]
    """Checkpoints that are not significantly worse: the 95 % interval of the mean difference contains 0."""

    def row(self) -> dict[str, Any]:
        return {**asdict(self), "as_good": list(self.as_good), "is_clear": not self.as_good}


def choose_checkpoint(candidates: Sequence[MeasuredCheckpoint], k: int) -> DomainChoice:
    """Choose the best candidate in a domain; `candidates` are ordered from the earliest."""
    best = max(candidates, key=lambda measured: measured.mean_pass_at_k(k))  # max returns the first tie
    # A candidate is worse if the interval of (best - candidate) lies above 0.
    as_good = tuple(candidate.checkpoint for candidate in candidates
                    if candidate is not best and not _compare_values(best, candidate, k)[1][0] > 0)
    return DomainChoice(best.domain, best.checkpoint, best.mean_pass_at_k(k), as_good)


def compare_with_expert(merged: MeasuredCheckpoint, expert: MeasuredCheckpoint, k: int) -> dict[str, Any]:
    """Return a row with the gain in pass@k of a merged checkpoint over a domain's best checkpoint."""
    value, interval = _compare_values(merged, expert, k)
    return {"checkpoint": merged.checkpoint, "domain": merged.domain, "expert": expert.checkpoint, "k": k,
            "gain": value, "interval": list(interval)}


def _compare_values(first: MeasuredCheckpoint, second: MeasuredCheckpoint, k: int
                    ) -> tuple[float, tuple[float, float]]:
    """Return the mean of pass@k of `first` minus `second` over common problems, and its 95 % interval;
    without common problems 0 and (-1, 1)."""
    differences = [value - second.pass_at_k[k][problem] for problem, value in first.pass_at_k[k].items()
                   if problem in second.pass_at_k[k]]
    if not differences:
        return 0.0, (-1.0, 1.0)
    return fmean(differences), compute_difference_interval(differences)


@dataclass(frozen=True)
class ProbedCheckpoint:
    path: Path
    is_merged: bool
    """Whether the checkpoint is an average; averages are compared with experts and never chosen."""

    @property
    def name(self) -> str:
        path = self.path
        is_in_run = path.parent.name == CHECKPOINTS_FOLDER
        return f"{path.parent.parent.name}/{path.name}" if is_in_run else path.name

    def folder(self, probe: Path) -> Path:
        # The digest separates equal names with different paths.
        digest = hashlib.sha256(str(self.path).encode()).hexdigest()[:8]
        return probe / CHECKPOINTS / f"{self.name.replace('/', '-')}-{digest}"

    def is_done(self, probe: Path) -> bool:
        """Return whether the probe has responses from `path`, whose files have not changed since."""
        folder = self.folder(probe)
        if not (folder / MANIFEST).is_file():
            return False
        model = read_manifest(folder, "passk").settings.get("model")
        files = model.get("files") if isinstance(model, dict) else None
        return not self.path.is_dir() or bool(files == fingerprint_folder(self.path))


def find_candidates(paths: Sequence[Path]) -> list[ProbedCheckpoint]:
    """Return the distinct checkpoints in `paths`; a run folder has several, oldest first."""
    candidates: dict[Path, ProbedCheckpoint] = {}
    for path in paths:
        check_model_path(path)
        folder = path / CHECKPOINTS_FOLDER
        checkpoints = list_complete(folder) if folder.is_dir() else []
        if not checkpoints:
            checkpoints = [path if is_hf_folder(path) else find_checkpoint(path)]
        for checkpoint in checkpoints:
            resolved = checkpoint.resolve()
            is_merged = (not is_hf_folder(resolved)
                         and MERGED in read_manifest(resolved, CHECKPOINT_KIND).content)
            candidates.setdefault(resolved, ProbedCheckpoint(resolved, is_merged))
    return list(candidates.values())


def write_problems(probe: Path, domains: Mapping[str, Path]) -> Path:
    """Write the problems of all domains to `PROBLEMS` in the probe's folder; return the file.

    Args:
        probe: the folder.
        domains: domain -> file; "": the rows name their domains.
    """
    lines = [json.dumps({**row, DOMAIN: domain or row["domain"]}) + "\n" for domain, file in domains.items()
             for _, row in read_rows(file, "--problems", "prompt")]
    write_atomically(probe / PROBLEMS, "".join(lines))
    return probe / PROBLEMS


def read_candidates(probe: Path, requested: Sequence[ProbedCheckpoint]) -> list[ProbedCheckpoint]:
    """Return the checkpoints in the existing table, then the `requested` checkpoints."""
    earlier = _read_table(probe)[0] if (probe / TABLE / MANIFEST).is_file() else []
    candidates = {c.path: c for c in [*earlier, *requested]}
    names: dict[str, Path] = {}
    for candidate in candidates.values():
        if (first := names.setdefault(candidate.name, candidate.path)) != candidate.path:
            raise UserError(f"{candidate.path}: has the name {candidate.name} in the table, as {first} has; "
                            "rename one of the two")
    return list(candidates.values())


def write_table(probe: Path, candidates: Sequence[ProbedCheckpoint], k: int, right_from: float
                ) -> dict[str, Any]:
    """Write the artifact `TABLE` and return the manifest content. Raises `UserError`: responses of a
    checkpoint in a domain have too few rewards."""
    ks = sorted({1, k})
    measured = {(result.checkpoint, result.domain): result for candidate in candidates
                for result in _measure_checkpoint(probe, candidate, ks, right_from)}
    domains = list(dict.fromkeys(domain for _, domain in measured))
    names = [candidate.name for candidate in candidates if not candidate.is_merged]
    choices = [choose_checkpoint([measured[name, domain] for name in names], k) for domain in domains
               if names]
    merged = []
    for candidate in candidates:
        if candidate.is_merged:
            merged += [compare_with_expert(measured[candidate.name, choice.domain],
                                           measured[choice.checkpoint, choice.domain], size)
                       for choice in choices for size in ks]
    content = {
        "k": k, "domains": domains,
        "checkpoints": [{"name": c.name, "path": str(c.path), "is_merged": c.is_merged} for c in candidates],
        "table": [result.row(ks) for result in measured.values()],
        "choice": [choice.row() for choice in choices], "merged": merged}
    with create_artifact(probe / TABLE, TABLE_KIND, overwrite=True) as artifact:
        write_atomically(artifact.path / RESULTS, format_json(content))
        artifact.content = content
        artifact.settings = dict(json.loads((probe / CONDITIONS).read_text(encoding="utf-8")))
        for candidate in candidates:
            artifact.add_input(candidate.folder(probe))
    return content


def _measure_checkpoint(probe: Path, candidate: ProbedCheckpoint, ks: Sequence[int],
                        right_from: float) -> Iterator[MeasuredCheckpoint]:
    if problems := find_damaged_files(candidate.folder(probe)):
        raise UserError(f"{problems[0]}; delete {candidate.folder(probe)}, and repeat the command")
    parts = read_scored_parts(candidate.folder(probe) / SAMPLES, DOMAIN, PROBLEM, right_from)
    for domain, responses in parts.items():
        try:
            yield MeasuredCheckpoint.from_responses(candidate.name, domain, responses, ks)
        except UserError as e:
            raise UserError(f"{candidate.name}, domain {domain}: {e}") from None


def read_experts(probe: Path) -> list[tuple[Path, float]]:
    """Return each best checkpoint, with a weight: the number of domains in which it is best."""
    weights: dict[Path, float] = {}
    for path in _read_table(probe)[1]:
        weights[path] = weights.get(path, 0.0) + 1.0
    return list(weights.items())


def _read_table(probe: Path) -> tuple[list[ProbedCheckpoint], list[Path]]:
    content = read_manifest(probe / TABLE, TABLE_KIND).content
    try:
        candidates = {c["name"]: ProbedCheckpoint(Path(c["path"]), bool(c["is_merged"]))
                      for c in content["checkpoints"]}
        best = [candidates[choice["checkpoint"]].path for choice in content["choice"]]
        return list(candidates.values()), best
    except (KeyError, TypeError) as e:
        raise UserError(f"{probe / TABLE}: is damaged ({e!r}); delete it, and `ssp probe` writes it again "
                        "from the existing responses") from None


def format_table(content: Mapping[str, Any]) -> str:
    """Format the table as text; a star marks the best checkpoint in a domain."""
    k, domains = content["k"], content["domains"]
    cells = {(row["checkpoint"], row["domain"]): next(cell for cell in row["pass_at_k"] if cell["k"] == k)
             for row in content["table"]}
    best = {(choice["checkpoint"], choice["domain"]) for choice in content["choice"]}
    names = [checkpoint["name"] for checkpoint in content["checkpoints"]]
    titles = [f"{entry['name']}{' (merged)' * entry['is_merged']}" for entry in content["checkpoints"]]
    width = max(map(len, [*titles, f"pass@{k}"]))
    lines = [f"{f'pass@{k}':<{width}}  " + "  ".join(f"{domain:>16}" for domain in domains)]
    for name, title in zip(names, titles, strict=True):
        texts = [_format_cell(cells[name, domain], (name, domain) in best) for domain in domains]
        lines.append(f"{title:<{width}}  " + "  ".join(f"{text:>16}" for text in texts))
    for choice in content["choice"]:
        as_good = ", ".join(choice["as_good"])
        doubt = f", not clearly better than {as_good}" if as_good else ", clearly"
        lines.append(f"{choice['domain']}: {choice['checkpoint']}{doubt}")
    for gain in content["merged"]:
        low, high = gain["interval"]
        lines.append(f"{gain['domain']}: {gain['checkpoint']} against {gain['expert']}, pass@{gain['k']} "
                     f"{gain['gain']:+.1%} ({low:+.1%} to {high:+.1%})")
    return "\n".join(lines)


def _format_cell(estimate: Mapping[str, Any], is_best: bool) -> str:
    low, high = estimate["interval"]
    return f"{'*' if is_best else ''}{estimate['value']:.1%} {low:.0%}-{high:.0%}"
