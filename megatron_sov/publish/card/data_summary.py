"""What the model learned from: the card that `sov-data card` writes of all its token shards together.

The two programs meet in that card alone.  It is made by a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sov.base.artifacts import sha256_file
from megatron_sov.base.command_line import check_part
from megatron_sov.base.errors import ExitCode, UserError
from megatron_sov.publish.card.lineage import Graph, Node
from megatron_sov.publish.card.run_record import ANSWERS, CardAnswers, Figure, RecordedOrigin, unknown

CARD, DATA_FORMAT, DATA_VERSION = "card.json", "megatron-sov data card", 2
SOV_DATA = "data_prep.cli"
"""Module of `sov-data`."""
DATA = "data"
"""Folder of the data's card, below the model's; also what origins call it."""
FILE = f"{DATA}/{CARD}"
NOT_RECORDED = "not recorded"
"""What the data's card says for what nobody knows."""
TOLD = ("error: ", "  ")
"""How the lines of a command's mistakes begin."""


@dataclass(frozen=True)
class DataCard:
    """A card of data as `sov-data card` writes it."""

    content: dict[str, Any]
    """card.json."""
    sha256: str
    """Hash of the file."""
    files: dict[str, bytes]
    """Name of each file of the card -> its bytes."""


def data_card(shards: Sequence[Path], elsewhere: Sequence[Path], about: Path | None) -> DataCard:
    """Have `sov-data card` make the card of token shards, and return it.

    Args:
        shards: folders of token shards.
        elsewhere: corpora and token shards that lie no longer where the manifests say.
        about: what no manifest knows of the data.

    Raises:
        UserError: as `sov-data card` tells it, or the part with that command is not installed.
    """
    check_part(SOV_DATA)
    with tempfile.TemporaryDirectory(prefix="sov-card-") as folder:
        command = [sys.executable, "-m", SOV_DATA, "card", *_paths(shards), "--output", folder]
        command += ["--from", *_paths(elsewhere)] if elsewhere else []
        command += ["--about", *_paths([about])] if about is not None else []
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode == ExitCode.USER_ERROR:
            lines = [line for line in done.stderr.splitlines() if line.startswith(TOLD)]
            raise UserError("\n".join(lines).removeprefix("error: ") or done.stderr.strip())
        if done.returncode:
            raise RuntimeError(f"`sov-data card` ended with {done.returncode}: {done.stderr[-2000:]}")
        return read_data_card(Path(folder))


def _paths(paths: Sequence[Path]) -> list[str]:
    """Return paths that no option can be taken for."""
    return [str(path.absolute()) for path in paths]


def read_data_card(folder: Path) -> DataCard:
    """Return the card that `sov-data card` has written into a folder.

    Raises:
        UserError: there is none of this version.
    """
    file = folder / CARD
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{file}: cannot be read ({e}); write it with `sov-data card`") from None
    known = DATA_FORMAT, DATA_VERSION
    if not isinstance(content, dict) or (content.get("format"), content.get("version")) != known:
        raise UserError(f"{file}: is no data card of version {DATA_VERSION}; write it again with "
                        "`sov-data card`")
    return DataCard(content, sha256_file(file), {
        found.name: found.read_bytes() for found in sorted(folder.iterdir()) if found.is_file()})


def figures_of_data(card: DataCard, answers: CardAnswers) -> dict[str, Any]:
    """Return what a model's card says of its data."""
    content = card.content
    totals = {name: _recorded(value, f"totals.{name}", "B" if name.startswith("bytes") else "")
              for name, value in content["totals"].items() if value is not None}
    return {"totals": totals,
            "languages": [_recorded(row["value"], f"languages[{i}].value")
                          for i, row in enumerate(content["languages"])],
            "sources": [_source(i, source, answers) for i, source in enumerate(content["sources"])],
            "synthesis": [_synthesis(i, one) for i, one in enumerate(content.get("synthesis", ()))],
            "synthetic_tokens": {name: _recorded(value, f"synthetic_tokens.{name}")
                                 for name, value in (content.get("synthetic_tokens") or {}).items()},
            "tokens": [{"name": str(row["name"]),
                        "tokens": _recorded(row["tokens"], f"tokens.sources[{i}].tokens"),
                        "documents": _recorded(row["documents"], f"tokens.sources[{i}].documents")}
                       for i, row in enumerate((content["tokens"] or {}).get("sources", ()))],
            "steps": [{"name": str(step["step"]),
                       **{name: _recorded(step[name], f"steps[{i}].{name}")
                          for name in ("documents_in", "documents_kept", "documents_changed")}}
                      for i, step in enumerate(content["steps"])]}


def _source(i: int, source: dict[str, Any], answers: CardAnswers) -> dict[str, Any]:
    name = str(source["name"])
    licence = _recorded(source["licence"], f"sources[{i}].licence")
    if not source["licence"]:
        licence = (Figure(answers.licences[name], "stated",
                          (RecordedOrigin(ANSWERS, ANSWERS, f"licences.{name}"),))
                   if answers.licences.get(name) else
                   unknown(f"licence of source {name!r}", "add it as `licence` in the pipeline's file, or "
                           "under `licences` in --answers"))
    return {"name": name, "licence": licence, "category": str(source["category"]),
            "synthetic": _recorded(source["synthetic"], f"sources[{i}].synthetic"),
            "documents": _recorded(source["documents_kept"], f"sources[{i}].documents_kept"),
            "bytes": _recorded(source["bytes_kept"], f"sources[{i}].bytes_kept", "B")}


def _synthesis(i: int, one: dict[str, Any]) -> dict[str, Any]:
    """Return what is known of samples that a model wrote."""
    key = f"synthesis[{i}]"
    model = _recorded(one["model"], f"{key}.model") if one["model"] else unknown(
        f"model that wrote {one['name']!r}", "run `sov-data synth` with --model")
    licences = [str(licence["value"]) for licence in one["licences"]]
    licence = (_recorded(licences, f"{key}.licences[*].value") if licences and NOT_RECORDED not in licences
               else unknown(f"licence of what {one['name']!r} was made from",
                            "state it with the input of `sov-data synth`"))
    return {"name": str(one["name"]), "generator": str(one["generator"]), "model": model, "licence": licence,
            "samples": _recorded(one["samples_kept"], f"{key}.samples_kept")}


def _recorded(value: Any, key: str, unit: str = "") -> Figure:
    return Figure(value, "recorded", (RecordedOrigin(DATA, FILE, key),), unit)


def add_data(graph: Graph, card: DataCard) -> None:
    """Put raw files, sources, steps and shards in front of the runs that read them."""
    content = card.content
    for row in content["provenance"]:
        graph.add(Node(row["manifest_sha256"], str(row["kind"]), str(row["name"]), row["manifest_sha256"],
                       f"made on {row['created']}", row["created"] != NOT_RECORDED))
    for row in content["provenance"]:
        for sha256 in row["made_from"]:
            if sha256 in graph.nodes:
                graph.join(sha256, row["manifest_sha256"], "manifest.json")
    entries = _add_steps(graph, content["steps"])
    for source in content["sources"]:
        corpus = source["manifest_sha256"]
        node = f"{corpus}/source/{source['name']}"
        graph.add(Node(node, "source", str(source["name"]), detail=(
            f"{source['licence'] or 'licence not recorded'}; {source['documents_kept']:,} documents kept")))
        graph.join(node, entries.get(corpus, corpus), "summary.json")
    for row in content["raw_files"]:
        node = f"{row['manifest_sha256']}/raw/{row['source']}"
        graph.add(Node(node, "raw", f"files of {row['source']}", row["sha256"], f"{row['files']:,} files",
                       content={"listed": row["listed"]}))
        source = f"{row['manifest_sha256']}/source/{row['source']}"
        graph.join(node, source if source in graph.nodes else row["manifest_sha256"], row["told_by"])
    followed = {row["manifest_sha256"] for row in content["provenance"]
                if any(sha256 in graph.nodes and graph.nodes[sha256].kind in ("corpus", "tokens")
                       for sha256 in row["made_from"])}
    for row in (content["tokens"] or {}).get("sources", ()):
        if row["manifest_sha256"] not in followed and row["input_sha256"]:
            node = f"{row['manifest_sha256']}/raw/{row['name']}"
            graph.add(Node(node, "raw", f"files of {row['name']}", row["input_sha256"],
                           f"{row['documents']:,} documents"))
            graph.join(node, row["manifest_sha256"], "manifest.json")


def _add_steps(graph: Graph, steps: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Add the steps of each corpus as a chain; returns hash of a corpus -> id of its first step."""
    entries: dict[str, str] = {}
    before: dict[str, str] = {}
    for step in sorted((step for step in steps if step["number"]), key=lambda step: int(step["number"])):
        corpus = step["manifest_sha256"]
        node = f"{corpus}/step/{step['number']}"
        graph.add(Node(node, "step", str(step["step"]), detail=(
            f"{step['documents_kept']:,} of {step['documents_in']:,} documents kept")))
        if corpus in before:
            graph.join(before[corpus], node, "summary.json")
        entries.setdefault(corpus, node)
        before[corpus] = node
    for corpus, node in before.items():
        graph.join(node, corpus, "summary.json")
    return entries
