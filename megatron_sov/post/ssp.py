"""The spectrum phase of VibeThinker (arXiv 2511.06221): which checkpoint is best in which domain, how sure
that is, and what a merged one gains over it.  The folder of a probe:

    asked.json       problems, reward, samples: the same for every checkpoint
    problems.jsonl   all domains' problems, as `eval passk` takes them
    checkpoints/     NAME-DIGEST: what `eval passk` made of a checkpoint; it is not made again
    table/           an artifact: pass@k of each checkpoint in each domain, and the choices
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_sov.base.artifacts import (
    MANIFEST, atomic_write, damaged_files, new_artifact, read_manifest, to_json)
from megatron_sov.base.digests import fingerprint
from megatron_sov.base.documents.rows import read_rows
from megatron_sov.base.errors import UserError
from megatron_sov.convert.sources import is_hf_folder
from megatron_sov.eval.pass_at_k import JudgedItem, pass_at_k, read_judged_parts
from megatron_sov.eval.statistics import difference_interval
from megatron_sov.runs.checkpoints import (
    CHECKPOINT_KIND, CHECKPOINTS_FOLDER, MERGED, check_model_path, find_checkpoint, list_complete)


@dataclass(frozen=True)
class MeasuredCheckpoint:
    """What one checkpoint does in one domain."""

    checkpoint: str
    """Its name."""
    domain: str
    figures: Mapping[str, Any]
    """Of `JudgedItem.figures`."""
    solved: Mapping[int, Mapping[str, float]]
    """k -> problem -> its pass@k; problems with fewer than k scored samples are left out."""

    @staticmethod
    def of(checkpoint: str, domain: str, judged: JudgedItem, ks: Sequence[int]) -> MeasuredCheckpoint:
        return MeasuredCheckpoint(checkpoint, domain, judged.figures(ks), {
            k: {problem: pass_at_k(counts.num_scored, counts.num_right, k)
                for problem, counts in judged.prompts.items() if counts.num_scored >= k} for k in ks})

    def value(self, k: int) -> float:
        return fmean(self.solved[k].values())

    def row(self, ks: Sequence[int]) -> dict[str, Any]:
        return {"checkpoint": self.checkpoint, "domain": self.domain,
                **{name: self.figures.get(name)
                   for name in ("num_prompts", "num_unscored", "mean_reward", "share_at_limit")},
                "pass_at_k": [e for e in self.figures["pass_at_k"] if e["k"] in ks]}


@dataclass(frozen=True)
class DomainChoice:
    """The best checkpoint of a domain: the argmax of pass@k, of equals the first one."""

    domain: str
    checkpoint: str
    value: float
    """Its pass@k; the greatest of several estimates is likely to flatter."""
    as_good: tuple[str, ...]
    """The others that these problems do not tell from it: the 95 % interval of the mean difference over
    problems reaches 0."""

    def row(self) -> dict[str, Any]:
        return {**asdict(self), "as_good": list(self.as_good), "is_clear": not self.as_good}


def choose(candidates: Sequence[MeasuredCheckpoint], k: int) -> DomainChoice:
    """Return the best of the candidates in one domain, the earlier ones first."""
    best = max(candidates, key=lambda measured: measured.value(k))  # the first of equals
    as_good = tuple(other.checkpoint for other in candidates
                    if other is not best and not _gain(best, other, k)[1][0] > 0)
    return DomainChoice(best.domain, best.checkpoint, best.value(k), as_good)


def gain(merged: MeasuredCheckpoint, expert: MeasuredCheckpoint, k: int) -> dict[str, Any]:
    value, interval = _gain(merged, expert, k)
    return {"checkpoint": merged.checkpoint, "domain": merged.domain, "expert": expert.checkpoint, "k": k,
            "gain": value, "interval": list(interval)}


def _gain(one: MeasuredCheckpoint, other: MeasuredCheckpoint, k: int) -> tuple[float, tuple[float, float]]:
    """Return the mean difference of pass@k over common problems, and its 95 % interval; without a common
    problem it may be anything."""
    differences = [share - other.solved[k][problem] for problem, share in one.solved[k].items()
                   if problem in other.solved[k]]
    return (fmean(differences), difference_interval(differences)) if differences else (0.0, (-1.0, 1.0))


TABLE_KIND = "ssp_probe"
ASKED, PROBLEMS, CHECKPOINTS, TABLE, RESULTS = ("asked.json", "problems.jsonl", "checkpoints", "table",
                                                "results.json")
DOMAIN = "probe_domain"
"""Field of a problem, and of the responses to it."""
SAMPLES, PROBLEM = "samples.jsonl", "prompt_index"
"""The file of `eval passk` with all responses, and the field of those to one problem."""


@dataclass(frozen=True)
class ProbedCheckpoint:
    """A checkpoint that is probed."""

    path: Path
    is_merged: bool
    """Whether it is a mean of others, which is compared with them and never chosen."""

    @property
    def name(self) -> str:
        path = self.path
        is_of_run = path.parent.name == CHECKPOINTS_FOLDER
        return f"{path.parent.parent.name}/{path.name}" if is_of_run else path.name

    def folder(self, probe: Path) -> Path:
        # Two paths may have one name.
        digest = hashlib.sha256(str(self.path).encode()).hexdigest()[:8]
        return probe / CHECKPOINTS / f"{self.name.replace('/', '-')}-{digest}"

    def is_done(self, probe: Path) -> bool:
        """Return whether its responses are there: those of the files that lie at its place now, if any."""
        folder = self.folder(probe)
        if not (folder / MANIFEST).is_file():
            return False
        model = read_manifest(folder, "passk").settings.get("model")
        asked = model.get("files") if isinstance(model, dict) else None
        return not self.path.is_dir() or bool(asked == fingerprint(self.path))


def candidates_of(paths: Sequence[Path]) -> list[ProbedCheckpoint]:
    """Return the checkpoints that paths mean, each once: of a run all complete ones, the oldest first.

    Raises:
        UserError: a path is none, or a run has none.
    """
    found: dict[Path, ProbedCheckpoint] = {}
    for path in paths:
        check_model_path(path)
        of_run = list_complete(path / CHECKPOINTS_FOLDER) if (path / CHECKPOINTS_FOLDER).is_dir() else []
        for one in of_run or [path if is_hf_folder(path) else find_checkpoint(path)]:
            found.setdefault(one.resolve(), _candidate(one.resolve()))
    return list(found.values())


def _candidate(path: Path) -> ProbedCheckpoint:
    is_merged = not is_hf_folder(path) and MERGED in read_manifest(path, CHECKPOINT_KIND).content
    return ProbedCheckpoint(path, is_merged)


def write_problems(probe: Path, domains: Mapping[str, Path]) -> Path:
    """Write all domains' problems into the probe's folder, and return the file.

    Args:
        probe: the folder.
        domains: domain -> file that `check_rows` has passed.
    """
    lines = [json.dumps({**row, DOMAIN: domain}) + "\n" for domain, file in domains.items()
             for _, row in read_rows(file, "--problems", "prompt")]
    atomic_write(probe / PROBLEMS, "".join(lines))
    return probe / PROBLEMS


def known_candidates(probe: Path, asked: Sequence[ProbedCheckpoint]) -> list[ProbedCheckpoint]:
    """Return the checkpoints of the table that is there, then those that are asked for beside them.

    Raises:
        UserError: two of them would have one name.
    """
    before = _read_table(probe)[0] if (probe / TABLE / MANIFEST).is_file() else []
    found = {c.path: c for c in [*before, *asked]}
    names: dict[str, Path] = {}
    for candidate in found.values():
        if (other := names.setdefault(candidate.name, candidate.path)) != candidate.path:
            raise UserError(f"{candidate.path}: would be called {candidate.name} in the table, as {other} "
                            "is; give one of the two another name")
    return list(found.values())


def write_table(probe: Path, candidates: Sequence[ProbedCheckpoint], k: int, right_from: float) -> dict[str,
                                                                                                        Any]:
    """Write the table of all checkpoints and return its content.

    Args:
        probe: the folder, in which the responses of all are.
        candidates: the earlier ones first.
        k: by whose pass@k the best is chosen.
        right_from: least reward of a right response.

    Raises:
        UserError: a checkpoint's responses in a domain have no reward, or too few.
    """
    ks = sorted({1, k})
    found = {(m.checkpoint, m.domain): m for c in candidates for m in _measure(probe, c, ks, right_from)}
    domains = list(dict.fromkeys(domain for _, domain in found))
    # A merge is compared with its experts, and is never an expert itself.
    single = [c for c in candidates if not c.is_merged]
    chosen = [choose([found[c.name, domain] for c in single], k) for domain in domains] if single else []
    content = {
        "k": k, "domains": domains,
        "checkpoints": [{"name": c.name, "path": str(c.path), "is_merged": c.is_merged} for c in candidates],
        "table": [m.row(ks) for m in found.values()],
        "choice": [choice.row() for choice in chosen],
        "merged": [gain(found[c.name, choice.domain], found[choice.checkpoint, choice.domain], size)
                   for c in candidates if c.is_merged for choice in chosen for size in ks]}
    with new_artifact(probe / TABLE, TABLE_KIND, overwrite=True) as artifact:
        atomic_write(artifact.path / RESULTS, to_json(content))
        artifact.content = content
        artifact.settings = dict(json.loads((probe / ASKED).read_text(encoding="utf-8")))
        for candidate in candidates:
            artifact.add_input(candidate.folder(probe))
    return content


def _measure(probe: Path, candidate: ProbedCheckpoint, ks: Sequence[int],
             right_from: float) -> Iterator[MeasuredCheckpoint]:
    if problems := damaged_files(candidate.folder(probe)):
        raise UserError(f"{problems[0]}; delete {candidate.folder(probe)}, and the same command asks again")
    parts = read_judged_parts(candidate.folder(probe) / SAMPLES, DOMAIN, PROBLEM, right_from)
    for domain, judged in parts.items():
        try:
            yield MeasuredCheckpoint.of(candidate.name, domain, judged, ks)
        except UserError as e:
            raise UserError(f"{candidate.name}, domain {domain}: {e}") from None


def experts_of(probe: Path) -> list[tuple[Path, float]]:
    """Return the best checkpoint of each domain with its weight, the number of domains that it is best in.

    Raises:
        UserError: the folder holds no complete probe.
    """
    weights: dict[Path, float] = {}
    for path in _read_table(probe)[1]:
        weights[path] = weights.get(path, 0.0) + 1.0
    return list(weights.items())


def _read_table(probe: Path) -> tuple[list[ProbedCheckpoint], list[Path]]:
    content = read_manifest(probe / TABLE, TABLE_KIND).content
    try:
        found = {c["name"]: ProbedCheckpoint(Path(c["path"]),
                                             bool(c["is_merged"])) for c in content["checkpoints"]}
        return list(found.values()), [found[choice["checkpoint"]].path for choice in content["choice"]]
    except (KeyError, TypeError) as e:
        raise UserError(f"{probe / TABLE}: is damaged ({e!r}); delete it, and `ssp probe` writes it again "
                        "from the answers that are there") from None


def table(content: Mapping[str, Any]) -> str:
    """Return the figures as a person reads them: the best of a domain has a star."""
    k, domains = content["k"], content["domains"]
    cells = {(row["checkpoint"], row["domain"]): next(e for e in row["pass_at_k"] if e["k"] == k)
             for row in content["table"]}
    best = {(c["checkpoint"], c["domain"]) for c in content["choice"]}
    names = [c["name"] + (" (merged)" if c["is_merged"] else "") for c in content["checkpoints"]]
    width = max(map(len, [*names, f"pass@{k}"]))
    lines = [f"{f'pass@{k}':<{width}}  " + "  ".join(f"{domain:>16}" for domain in domains)]
    for name, c in zip(names, content["checkpoints"], strict=True):
        shown = [_cell(cells[c["name"], domain], (c["name"], domain) in best) for domain in domains]
        lines.append(f"{name:<{width}}  " + "  ".join(f"{text:>16}" for text in shown))
    for c in content["choice"]:
        doubt = f", not told from {', '.join(c['as_good'])}" if c["as_good"] else ", clearly"
        lines.append(f"{c['domain']}: {c['checkpoint']}{doubt}")
    lines += [f"{g['domain']}: {g['checkpoint']} against {g['expert']}, pass@{g['k']} {g['gain']:+.1%} "
              f"({g['interval'][0]:+.1%} to {g['interval'][1]:+.1%})" for g in content["merged"]]
    return "\n".join(lines)


def _cell(estimate: Mapping[str, Any], is_best: bool) -> str:
    low, high = estimate["interval"]
    return f"{'*' if is_best else ''}{estimate['value']:.1%} {low:.0%}-{high:.0%}"
