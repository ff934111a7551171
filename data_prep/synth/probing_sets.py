"""`sov-data probing-sets`: problems of the generator `probes` frozen into sets for `megatron-sov ssp probe`.

Checkpoints are chosen by these problems, so none may be in what they were trained on: the training input is
read once, and each problem that shares ten words in a row with it is left out.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tqdm import tqdm

from data_prep.curate.decontamination.step import text_in
from data_prep.json_lines import read_objects
from data_prep.synth.declared.readers import Domain
from data_prep.synth.problems import line_files
from megatron_sov.base.artifacts import new_artifact, refuse_existing
from megatron_sov.base.documents.item_search import ItemSearch, SearchItem, forms
from megatron_sov.base.documents.overlap import WORDS, find_units
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import (
    Flag, NotNegativeInt, SettingsError, add_options, problems_of, read_options)

KIND = "probing_sets"
MIN_WORDS = 5
"""A shorter problem cannot be looked for, and is left out."""


@dataclass(frozen=True, kw_only=True)
class ProbingSetsOptions:
    """Write one file of problems for each domain."""

    input: Annotated[tuple[Path, ...], Flag(many=True)]
    """The folder of `sov-data synth probes`, or lines with prompt, answer and domain."""
    against: Annotated[tuple[Path, ...], Flag(many=True)] = ()
    """.jsonl files, or folders of them, of what checkpoints are trained on: text, chats or prompts."""
    per_domain: NotNegativeInt = 0
    """Problems of a set at most (default: all)."""
    output: Annotated[Path, Flag(value="DIR")]
    """Folder for the sets."""
    overwrite: bool = False
    """Replace sets that are already there."""


@dataclass(frozen=True)
class ProbingProblem:
    """A problem that checkpoints may be probed by."""

    domain: Domain
    """Its set."""
    prompt: str
    """What is asked."""
    answer: str
    """What is right."""
    id: str
    """Of its line."""
    model: str
    """Who wrote it; empty: not said."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = ("Write one file of problems for each domain, without those in the training "
                          "input, as an artifact whose hashes prove that they stay the same.")
    add_options(parser, ProbingSetsOptions)


def run(typed: argparse.Namespace) -> int:
    args = read_options(ProbingSetsOptions, typed)
    content = freeze(args.input, args.against, args.output, args.per_domain, overwrite=args.overwrite)
    for domain, count in content["domains"].items():
        print(f"{domain}: {count:,} problems")
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in content["left_out"].items())
    print(f"left out: {left_out or 'none'}; {content['num_lines_against']:,} lines of training input read")
    if not args.against:
        print("no training input was given (--against), so nothing is known of what these sets share with it")
    print(f"wrote {args.output}; megatron-sov ssp probe ... --problems {args.output} --reward math")
    return 0


def freeze(files: Sequence[Path], against: Sequence[Path], output: Path, per_domain: int = 0, *,
           overwrite: bool = False) -> dict[str, Any]:
    """Write an artifact of kind "probing_sets"; returns its content.

    Args:
        files: of problems, and folders of them.
        against: of training input, likewise.
        output: the artifact.
        per_domain: problems of a set at most; 0: all.
        overwrite: replace sets that are already there.

    Raises:
        UserError: a line is no problem or cannot be read, or a domain has no problem left.
    """
    refuse_existing(output, KIND, overwrite)
    problems, left_out = _read(files)
    search = ItemSearch([SearchItem(p.domain, p.id, "prompt", p.prompt) for p in problems], WORDS, MIN_WORDS)
    # what cannot be looked for cannot be cleared either
    gone = dict.fromkeys(search.too_short, "too short to be looked for")
    num_lines = 0
    for file in line_files(against):
        for _, record in tqdm(read_objects(file), desc=file.name, unit=" records", disable=None):
            num_lines += 1
            for form in forms(text_in(record)):
                gone.update((found.item, "in the training input") for found in search.find(find_units(form)))
    left_out.update(gone.values())
    sets: dict[str, list[ProbingProblem]] = defaultdict(list)
    for number, problem in enumerate(problems):
        # this makes the set also where the problem goes, so that a domain that loses all is seen below
        of_domain = sets[problem.domain]
        if number not in gone and not 0 < per_domain <= len(of_domain):
            of_domain.append(problem)
    if empty := [domain for domain, found in sets.items() if not found]:
        raise UserError(f"{empty[0]}: no problem of this domain is left "
                        f"({', '.join(f'{n:,} {why}' for why, n in left_out.items())}); write more with "
                        "`sov-data synth probes`")
    with new_artifact(output, KIND, overwrite=overwrite) as artifact:
        for domain, left in sets.items():
            with open(artifact.path / f"{domain}.jsonl", "w", encoding="utf-8") as out:
                for p in left:
                    row = {"prompt": p.prompt, "answer": p.answer, "domain": domain, "id": p.id}
                    out.write(json.dumps(row, ensure_ascii=False) + "\n")
        models = sorted({p.model for left in sets.values() for p in left if p.model})
        artifact.settings = {"inputs": list(files), "against": list(against), "per_domain": per_domain}
        artifact.content = {"domains": {domain: len(found) for domain, found in sets.items()},
                            "left_out": dict(left_out), "num_lines_against": num_lines, "models": models}
    return artifact.content


def _read(files: Sequence[Path]) -> tuple[list[ProbingProblem], Counter[str]]:
    """Return the problems that differ, in order, and how many were left out for what reason."""
    found: dict[bytes, ProbingProblem] = {}
    left_out: Counter[str] = Counter()
    for file in line_files(files):
        for where, row in read_objects(file):
            prompt, answer, domain = (row.get(name) for name in ("prompt", "answer", "domain"))
            if not all(isinstance(value, str) and value.strip() for value in (prompt, answer, domain)):
                raise UserError(f"{where}: needs the texts prompt, answer and domain (fields: "
                                f"{', '.join(row) or 'none'}); `sov-data synth probes` writes them")
            made = row.get("synthetic")
            problem = ProbingProblem(str(domain), str(prompt), str(answer), str(row.get("id") or where),
                                     str(made.get("model") or "") if isinstance(made, dict) else "")
            if problems := problems_of(problem):
                raise SettingsError(where, problems)
            # by the hashes of its words: case and punctuation make no other problem
            if found.setdefault(find_units(problem.prompt).hashes.tobytes(), problem) is not problem:
                left_out["repeated"] += 1
    if not found:
        raise UserError(f"{', '.join(map(str, files))}: has no problems; run `sov-data synth probes` first")
    return list(found.values()), left_out
