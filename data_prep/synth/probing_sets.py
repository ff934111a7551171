"""`sov-data probing-sets`: freeze problems from `sov-data synth probes` into sets for `ssp probe`."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from data_prep.synth.readers.problems import list_line_files
from megatron_sov.base.artifacts import check_output_folder, create_artifact
from megatron_sov.base.documents.overlap import find_units
from megatron_sov.base.documents.reading import read_records
from megatron_sov.base.errors import ExitCode, UserError
from megatron_sov.base.settings import DeclaredCommand, Flag

KIND = "probing_sets"
MAX_DOMAIN_CHARS = 60


@dataclass(frozen=True, kw_only=True)
class ProbingSetsOptions:
    """Write a file with different problems for each domain, as an artifact with hashes that detect
    changes."""

    input: Annotated[tuple[Path, ...], Flag(many=True)]
    """Folder from `sov-data synth probes`, or lines with prompt, answer and domain."""
    output: Annotated[Path, Flag(value="DIR")]
    """Folder for the sets."""
    overwrite: bool = False
    """Replace existing sets."""


def write_probing_sets(options: ProbingSetsOptions) -> ExitCode:
    """Write the sets; raises `UserError` if a line holds no problem, or the input is unreadable or empty."""
    check_output_folder(options.output, KIND, options.overwrite)
    problems: dict[bytes, dict[str, str]] = {}
    num_lines = 0
    for place, record in (line for file in list_line_files(options.input) for line in read_records(file)):
        num_lines += 1
        problem = _read_problem(record, place)
        # hashes of words ignore case and punctuation
        problems.setdefault(find_units(problem["prompt"]).hashes.tobytes(), problem)
    if not problems:
        raise UserError(f"{', '.join(map(str, options.input))}: has no problems; run `sov-data synth probes` "
                        "first")
    counts = Counter(problem["domain"] for problem in problems.values())
    with create_artifact(options.output, KIND, overwrite=options.overwrite) as artifact:
        for domain in counts:
            with open(artifact.path / f"{domain}.jsonl", "w", encoding="utf-8") as file:
                file.writelines(json.dumps(problem, ensure_ascii=False) + "\n"
                                for problem in problems.values() if problem["domain"] == domain)
        artifact.settings = {"inputs": list(options.input)}
        artifact.content = {"domains": dict(counts), "num_repeated": num_lines - len(problems)}
    for domain, count in counts.items():
        print(f"{domain}: {count:,} problems")
    print(f"left out: {num_lines - len(problems):,} repeated\n"
          f"wrote {options.output}; megatron-sov ssp probe ... --problems {options.output} --reward math")
    return ExitCode.OK


def _read_problem(record: dict[str, Any], place: str) -> dict[str, str]:
    prompt, answer, domain = (record.get(name) for name in ("prompt", "answer", "domain"))
    if not all(isinstance(value, str) and value.strip() for value in (prompt, answer, domain)):
        raise UserError(f"{place}: needs the texts prompt, answer and domain (fields: "
                        f"{', '.join(record) or 'none'}); `sov-data synth probes` writes them")
    name = str(domain)
    if not set(name) - {"."} or len(name) > MAX_DOMAIN_CHARS or not all(
            c.isalnum() or c in "._-" for c in name):
        raise UserError(f"{place}: domain = {name[:80]!r} must be a name of letters, digits, '.', '_' and "
                        "'-', such as algebra")
    return {"prompt": str(prompt), "answer": str(answer), "domain": name,
            "id": str(record.get("id") or place)}


PROBING_SETS = DeclaredCommand(ProbingSetsOptions, write_probing_sets)
