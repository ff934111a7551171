"""Write the output folder of a `sov-data synth` run with given samples."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_prep.synth.finishing import finish
from data_prep.synth.run_records import SynthRunRecord
from data_prep.synth.samples import Kind
from data_prep.synth.synth import SynthOptions
from megatron_sov.work.endpoints.cache import EndpointCache, Usage
from megatron_sov.work.progress.journal import Journal, lock_work_folder, work_folder

RUN = SynthRunRecord("facts", "text", "writer-7b", judge="judge-70b", settings={"count": 1})
GOOD = ("The tide gauge at the old harbour stands beside a granite wall, where two keepers note the height "
        "of the water every morning before the first ferry leaves for the islands in the west.")
OTHER = ("In winter the potter fires her kiln with birch, since oak burns too slowly for the thin bowls that "
         "she sells to the inns along the northern road between the two market towns.")


def build_sample(record: Mapping[str, Any], failed: str = "", **more: Any) -> dict[str, Any]:
    """Return a sample as a run stores it. `failed` names the generator's check that it fails, if any."""
    verdicts = [{"check": failed or "grounded", "passed": not failed, "detail": "as the generator saw it"}]
    return {"record": dict(record), "verdicts": verdicts, "notes": {"tries": 1}, **more}


def build_chat(question: str, answer: str) -> dict[str, Any]:
    """Return the record of a conversation."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def finish_run(output: Path, kind: Kind = "text", checks: Path | None = None, inputs: Sequence[Path] = (),
               *, is_complete: bool = True) -> Path:
    """Finish a folder of `write_run` and return it."""
    finish(replace(RUN, kind=kind), SynthOptions(checks=checks, input=tuple(inputs), workers=1), output,
           is_complete=is_complete)
    return output


def write_run(output: Path, items: Sequence[Sequence[Mapping[str, Any]]]) -> Path:
    """Write a run folder whose items, with the ids i0, i1, ..., have these samples."""
    output.mkdir(parents=True, exist_ok=True)
    with lock_work_folder(output, "sov-data synth", {}):
        add_records(output, [(i, {
            "item": {"id": f"i{i}", "source": "notes", "licence": "CC-BY-4.0" if i else "", "digest": ""},
            "samples": list(samples), "asked": [f"key{i}"], "unusable": ""})
            for i, samples in enumerate(items)])
    cache = EndpointCache(output / "answers.sqlite")
    for i in range(len(items)):
        cache.note(f"key{i}", "429", Usage(0, 0, 0.0), 0.25)
        cache.note(f"key{i}", "200", Usage(100, 50, 0.5), 1.0)
    return output


def add_records(output: Path, records: Sequence[tuple[int, Mapping[str, Any]]], writer: str = "") -> None:
    """Append (item number, record) pairs to the run's journal of `writer`, in this order."""
    journal = Journal(work_folder(output), writer)
    journal.add((number, json.dumps(record).encode()) for number, record in records)
    journal.close()


def copy_run(run: Path, folder: Path) -> Path:
    """Copy a run and its work folder to `folder`, and return the copy."""
    shutil.copytree(work_folder(run), work_folder(folder))
    return Path(shutil.copytree(run, folder))


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines."""
    return [json.loads(line) for line in file.read_text().splitlines()]
