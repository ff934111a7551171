"""How samples are checked: the steps of a file, and what the command line adds to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from data_prep.curate.pipeline.pipeline_file import Pipeline, read_pipeline
from data_prep.synth.checks.arguments import CheckOptions
from data_prep.synth.checks.labels import read_labels
from data_prep.synth.checks.texts import ANSWERS, CONTEXT, INPUT, SAMPLES, SOURCES
from megatron_sov.base.errors import UserError, list_problems
from megatron_sov.base.settings import (
    Located, ProblemCode, SettingsProblem, as_problem, read_located, read_text)

DEFAULTS = Path(__file__).parent / "defaults"
"""Files of steps: one for each kind of record, and for generators that need others."""
SHARD_BYTES = 64_000_000


@dataclass(frozen=True)
class CheckSettings(CheckOptions):
    """The same, with what its files say."""

    @classmethod
    def of(cls, options: CheckOptions) -> CheckSettings:
        """Return what a command's options ask for; its `problems` are the caller's to tell."""
        return cls(**{field.name: getattr(options, field.name) for field in fields(CheckOptions)})

    def problems(self) -> list[SettingsProblem]:
        """Return every rule that is broken, by option; files are read."""
        found: list[SettingsProblem] = []
        if self.min_kappa is not None and self.labels is None:
            found.append(SettingsProblem(ProblemCode.RULE, "--min-kappa", "there is nothing to agree with",
                                         self.min_kappa, "add --labels FILE"))
        found += [SettingsProblem(ProblemCode.FILE, "--benchmarks", "does not exist", path, "check the path")
                  for path in self.benchmarks if not path.exists()]
        if self.steps is not None and not self.steps.is_file():
            return [*found, SettingsProblem(ProblemCode.FILE, "--checks", "does not exist", self.steps,
                                            f"pass a YAML file, e.g. a copy of {DEFAULTS / 'chat.yaml'}")]
        try:
            if self.labels is not None:
                read_labels(self.labels)
            if not found:
                self.pipeline(self.steps or DEFAULTS / "text.yaml", dict.fromkeys(SOURCES))
        except UserError as e:
            found.append(as_problem(str(e)))
        return found

    def file(self, generator: str, kind: str) -> Path:
        """Return the file of steps for records of a kind; `generator`: empty where it is not its own kind."""
        if self.steps is not None and generator:
            return self.steps
        own = DEFAULTS / f"{generator}.yaml"
        return own if generator and own.is_file() else DEFAULTS / f"{kind}.yaml"

    def pipeline(self, file: Path, folders: Mapping[str, Path | None]) -> Pipeline:
        """Return the steps of a file as a pipeline.

        Args:
            file: YAML with `steps`.
            folders: source that there is -> folder of its texts; None: any file will do, nothing is run.

        Raises:
            UserError: the file has mistakes; all of them are told, by line.
        """
        located = read_located(read_text(file))
        raw = located.value
        if not isinstance(raw, dict) or set(raw) != {"steps"} or not isinstance(raw["steps"], list):
            more = [f"{file}:{problem.line}: {problem.sentence}" for problem in located.problems]
            raise UserError(list_problems(f"--checks {file}", more) if more else
                            f"--checks {file}: must be a mapping with the list `steps`, and nothing else; "
                            "sources and output are the run's")
        located = _of_sources(located, tuple(folders))
        languages = self._with_languages(file, located, ANSWERS if ANSWERS in folders else SAMPLES)
        held = [SAMPLES, *([CONTEXT] if CONTEXT in folders else [])]
        leaks = [{"decontaminate": {"benchmarks": [str(path.absolute()) for path in self.benchmarks]},
                  "only": {"sources": held}}] if self.benchmarks else []
        located.value = {
            "name": "checks", "shard_bytes": SHARD_BYTES, "on_bad": "refuse",
            "sources": [{"name": name, "path": [str((folder or file).absolute())],
                         "format": "jsonl" if folder else "auto", "priority": int(name == INPUT)}
                        for name, folder in folders.items()],
            "steps": [*located.value["steps"], *languages, *leaks]}
        return read_pipeline(file, located)

    def _with_languages(self, file: Path, located: Located, judged: str) -> list[dict[str, Any]]:
        """Have the step `language` keep the asked languages; returns a step that does where there is none."""
        if not self.languages:
            return []
        entries = [(i, entry) for i, entry in enumerate(located.value["steps"])
                   if entry == "language" or (isinstance(entry, dict) and "language" in entry)]
        for i, entry in entries:
            written = {} if entry == "language" else entry["language"] or {}
            if isinstance(written, dict) and "keep" in written:
                line = located.line(("steps", i))
                raise UserError(f"--languages {' '.join(self.languages)}: {file}:{line} says `keep` itself; "
                                "leave one of them out")
            if isinstance(written, dict):
                other = {} if entry == "language" else entry
                located.value["steps"][i] = {**other,
                                             "language": {**written, "keep": list(self.languages)}}
        return [] if entries else [{"language": {"keep": list(self.languages), "min_score": 0.0},
                                    "only": {"sources": [judged]}}]


def _of_sources(located: Located, names: Sequence[str]) -> Located:
    """Return steps whose `only.sources` names none that this run lacks; a step for such sources alone is left
    out.  A name that no run has stays, and is told as a mistake."""
    steps: list[Any] = []
    lines = {place: line for place, line in located.lines.items() if place[:1] != ("steps",)}
    for i, entry in enumerate(located.value["steps"]):
        only = entry.get("only") if isinstance(entry, dict) else None
        asked = only.get("sources") if isinstance(only, dict) else None
        if isinstance(asked, list):
            here = [name for name in asked if name in names or name not in SOURCES]
            if asked and not here:
                continue
            entry = {**entry, "only": {**only, "sources": here}} if isinstance(only, dict) else entry
        lines |= {("steps", len(steps), *place[2:]): line for place, line in located.lines.items()
                  if place[:2] == ("steps", i)}
        steps.append(entry)
    return Located({"steps": steps}, lines, list(located.problems))
