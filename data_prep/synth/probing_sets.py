"""`sov-data probing-sets`: problems of `sov-data synth probes` frozen into sets for `ssp probe`."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from data_prep.json_lines import read_objects
from data_prep.synth.problems import line_files
from megatron_sov.base.artifacts import check_output_folder, create_artifact
from megatron_sov.base.documents.overlap import find_units
from megatron_sov.base.errors import UserError
from megatron_sov.base.settings import Flag, add_options, read_options

KIND = "probing_sets"
MAX_DOMAIN_CHARS = 60


@dataclass(frozen=True, kw_only=True)
class ProbingSetsOptions:
    """Write one file of problems for each domain."""

    input: Annotated[tuple[Path, ...], Flag(many=True)]
    """The folder of `sov-data synth probes`, or lines with prompt, answer and domain."""
    output: Annotated[Path, Flag(value="DIR")]
    """Folder for the sets."""
    overwrite: bool = False
    """Replace sets that are already there."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = ("Write one file of problems for each domain, each problem once, as an artifact "
                          "whose hashes prove that the sets stay the same.")
    add_options(parser, ProbingSetsOptions)


def run(typed: argparse.Namespace) -> int:
    """Freeze the sets.

    Raises:
        UserError: a line is no problem or cannot be read, or there is none.
    """
    args = read_options(ProbingSetsOptions, typed)
    check_output_folder(args.output, KIND, args.overwrite)
    found: dict[bytes, dict[str, str]] = {}
    num_lines = 0
    for where, row in (line for file in line_files(args.input) for line in read_objects(file)):
        num_lines += 1
        problem = _problem(row, where)
        # by the hashes of its words: case and punctuation make no other problem
        found.setdefault(find_units(problem["prompt"]).hashes.tobytes(), problem)
    if not found:
        raise UserError(f"{', '.join(map(str, args.input))}: has no problems; run `sov-data synth probes` "
                        "first")
    counts = Counter(problem["domain"] for problem in found.values())
    with create_artifact(args.output, KIND, overwrite=args.overwrite) as artifact:
        for domain in counts:
            with open(artifact.path / f"{domain}.jsonl", "w", encoding="utf-8") as out:
                out.writelines(json.dumps(problem, ensure_ascii=False) + "\n" for problem in found.values()
                               if problem["domain"] == domain)
        artifact.settings = {"inputs": list(args.input)}
        artifact.content = {"domains": dict(counts), "num_repeated": num_lines - len(found)}
    for domain, count in counts.items():
        print(f"{domain}: {count:,} problems")
    print(f"left out: {num_lines - len(found):,} repeated\n"
          f"wrote {args.output}; megatron-sov ssp probe ... --problems {args.output} --reward math")
    return 0


def _problem(row: dict[str, Any], where: str) -> dict[str, str]:
    prompt, answer, domain = (row.get(name) for name in ("prompt", "answer", "domain"))
    if not all(isinstance(value, str) and value.strip() for value in (prompt, answer, domain)):
        raise UserError(f"{where}: needs the texts prompt, answer and domain (fields: "
                        f"{', '.join(row) or 'none'}); `sov-data synth probes` writes them")
    name = str(domain)
    if not set(name) - {"."} or len(name) > MAX_DOMAIN_CHARS or not all(
            c.isalnum() or c in "._-" for c in name):
        raise UserError(f"{where}: domain = {name[:80]!r} must be a name of letters, digits, '.', '_' and "
                        "'-', such as algebra")
    return {"prompt": str(prompt), "answer": str(answer), "domain": name, "id": str(row.get("id") or where)}
