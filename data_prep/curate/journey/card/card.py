"""The card of a data set: every figure of it from a manifest or summary, and what nobody recorded by name."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_prep.curate.journey.card.lineage import (
    CorpusRecord, DataLineage, Origin, RawFiles, SynthesisRecord, TokenSource)
from data_prep.curate.journey.facts import BINS, NONE, REST, SCORES, Facts, total
from data_prep.curate.journey.page import BYTES_PER_TOKEN
from data_prep.curate.journey.summary import SourceSummary
from data_prep.tags import SYNTHETIC
from megatron_sov.base.errors import UserError, list_problems, nearest
from megatron_sov.base.settings import read_file
from megatron_sov.base.settings.text import Text
from megatron_sov.version import __version__

# What a team says of its data that no manifest knows: a YAML file, whose mistakes are all reported at once.

Category = Literal["public", "licensed", "third_party", "crawled", "user", "synthetic", "other", ""]
CATEGORIES: dict[str, str] = {
    "public": "publicly available datasets", "licensed": "commercially licensed datasets",
    "third_party": "private datasets of third parties", "crawled": "crawled and scraped from online sources",
    "user": "user data", "synthetic": "synthetic data", "other": "other sources", "": "not recorded"}
"""Where a source stands in section 2 of the European Commission's template."""


@dataclass(frozen=True)
class AboutSource:
    """What is known of one source beside the pipeline."""

    category: Category = ""
    """One of public, licensed, third_party, crawled, user, synthetic, other."""
    description: Text = ""
    """What it is, in a sentence."""
    link: Text = ""
    """Where it can be found."""
    collected_from: Text = ""
    """First month in which it was collected, e.g. 2024-01."""
    collected_to: Text = ""
    """Last month."""
    crawlers: tuple[Text, ...] = ()
    """Names of the crawlers, as they told them to servers."""
    crawler_purposes: Text = ""
    """What the crawlers collect for."""
    crawler_behaviour: Text = ""
    """How crawlers treat robots.txt, captchas, paywalls."""
    is_publicly_known: bool | None = None
    """Of a private dataset of a third party: whether the public knows that it exists, so that it is named."""
    generated_by: tuple[Text, ...] = ()
    """General-purpose models on the market that wrote synthetic text."""
    generated_by_others: Text = ""
    """Other models that wrote it, the provider's own among them, and what they were trained on."""
    services: Text = ""
    """Services of the provider whose users' data it is."""
    is_from_model: bool | None = None
    """Of user data: whether users gave it to the model itself (prompts), and not to another service."""


@dataclass(frozen=True)
class About:
    """What a team says; an empty field is one that nobody has filled in."""

    name: Text = ""
    """Name of the data for readers."""
    version: Text = ""
    """Version of the public summary, e.g. 1.2."""
    updated: Text = ""
    """Date of its last update."""
    description: Text = ""
    """What the data is for, in a few sentences."""
    licence: Text = ""
    """Licence of the collection as a whole; that of each source is in its manifest."""
    link: Text = ""
    """Where the data or the model is published."""
    provider: Text = ""
    """Provider's name and contact details."""
    representative: Text = ""
    """Authorised representative in the Union, where the provider is established elsewhere."""
    models: tuple[Text, ...] = ()
    """Versioned names of the models that the data trains."""
    dependencies: Text = ""
    """Models that these were made from."""
    market_date: Text = ""
    """Date of placement on the Union market."""
    types_of_content: Text = ""
    """Such as fiction, scientific text, press, source code."""
    collected_until: Text = ""
    """Latest date of acquisition or collection, e.g. 2026-10."""
    is_continuous: bool | None = None
    """Whether the model goes on being trained on new data after that date."""
    languages: Text = ""
    """On the languages, beside the figures."""
    characteristics: Text = ""
    """Other relevant characteristics, such as regional or demographic ones."""
    is_small: bool | None = None
    """Whether the provider is a small or medium-sized enterprise, which names fewer domains."""
    is_signatory: bool | None = None
    """Whether the provider signed the Code of Practice for general-purpose AI models."""
    opt_outs: Text = ""
    """How reservations of rights from text and data mining are respected."""
    illegal_content: Text = ""
    """How illegal content is removed, beside the steps of the pipeline."""
    comments: Text = ""
    """Anything else."""
    sources: Mapping[str, AboutSource] = field(default_factory=dict)
    """Name of a source in the pipeline's file -> what is known of it."""


def read_about(file: Path, sources: Collection[str]) -> About:
    """Return what an --about file says.

    Args:
        file: the YAML file.
        sources: names of the sources that it may describe.

    Raises:
        UserError: it cannot be read, or breaks rules; all of them are told.
    """
    about = read_file(About, file, f"--about {file}")
    if strange := [name for name in about.sources if name not in sources]:
        raise UserError(list_problems(f"--about {file}", [
            f"sources.{name}: the data has no such source{nearest(name, sources)}" for name in strange],
            f"sources are {', '.join(sources) or 'none'}"))
    return about


FORMAT, VERSION = "megatron-sov data card", 2
NOT_RECORDED = "not recorded"
HIDDEN_SETTINGS = ("path", "model", "files", "benchmarks", "lists", "domains")
"""Settings that name places on a machine: of these the card has the last part alone."""


def make_card(found: DataLineage, about: About) -> dict[str, Any]:
    """Return the card as plain values, ready for JSON.

    Args:
        found: the artifacts and what they were made from.
        about: what the team says.
    """
    facts = total(one for corpus in found.corpora for one in corpus.facts.values())
    sources = [_source(corpus, source, about.sources.get(source.name, AboutSource()))
               for corpus in found.corpora for source in corpus.summary.sources]
    tokens = sum(s.num_tokens for s in found.token_sources)
    packed = sum(s.num_documents for s in found.token_sources)
    return {
        "format": FORMAT, "version": VERSION, "written_by": f"megatron-sov {__version__}",
        "name": about.name or (found.corpora[0].summary.name if found.corpora else found.artifacts[0].name),
        "description": about.description, "licence": about.licence, "link": about.link,
        "artifacts": [_origin(origin) for origin in found.artifacts],
        "totals": {
            "documents_read": sum(s["documents_read"] for s in sources) if found.corpora else None,
            "bytes_read": sum(s["bytes_read"] for s in sources) if found.corpora else None,
            "documents": facts.num_documents if found.corpora else None,
            "bytes": facts.num_bytes if found.corpora else None,
            "packed_documents": packed if found.token_sources else None,
            "tokens": tokens if found.token_sources else None,
            # An estimate only where nothing was counted: the card has one figure of tokens.
            "tokens_estimate": (round(facts.num_bytes / BYTES_PER_TOKEN)
                                if found.corpora and not found.token_sources else None)},
        "sources": sources,
        "steps": [step for corpus in found.corpora for step in _steps(corpus)],
        "output": [{"name": name, "documents": one.num_documents, "bytes": one.num_bytes}
                   for corpus in found.corpora for name, one in corpus.facts.items()],
        "tokens": {"tokenizers": found.tokenizers, "sources": [
            {"name": s.name, "tokens": s.num_tokens, "documents": s.num_documents, "weight": s.weight,
             "manifest_sha256": s.artifact_sha256, "input_sha256": s.input_sha256}
            for s in found.token_sources]} if found.token_sources else None,
        "synthesis": [_synthesis(one) for one in found.syntheses],
        "synthetic_tokens": _synthetic_tokens(found.token_sources),
        **_values(facts),
        "hosts": _shares({h: n for h, n in facts.hosts.items() if h}),
        "dates": _dates(facts),
        "scores": {name: {"lowest": SCORES[name][0], "highest": SCORES[name][1], "documents": parts[:BINS],
                          "without": parts[BINS]} for name, parts in facts.scores.items()},
        "named": facts.named,
        "provenance": [{**_origin(origin), "made_from": list(origin.made_from)} for origin in found.origins],
        "raw_files": [_raw(origin, raw) for origin, raw in [
            *((corpus.origin, raw) for corpus in found.corpora for raw in corpus.raw), *found.other_corpora]],
        "not_recorded": [*found.unknown, *_missing(sources, about), *_unstated(found)]}


def day(unix_s: float) -> str:
    """Return the day of a time, in UTC; "not recorded" where it is 0."""
    return time.strftime("%Y-%m-%d", time.gmtime(unix_s)) if unix_s > 0 else NOT_RECORDED


def _source(corpus: CorpusRecord, source: SourceSummary, said: AboutSource) -> dict[str, Any]:
    read, last = source.read, source.last
    return {
        "name": source.name, "corpus": corpus.origin.name, "manifest_sha256": corpus.origin.sha256,
        "category": said.category or ("synthetic" if source.synthetic else ""),
        "description": said.description, "link": said.link, "format": source.format, "kind": source.kind,
        "licence": source.licence, "synthetic": source.synthetic, "files": source.num_files,
        "raw_bytes": source.raw_bytes, "documents_read": read.documents_kept, "bytes_read": read.bytes_kept,
        "documents_kept": last.documents_kept, "bytes_kept": last.bytes_kept,
        "quarantined": sum(source.quarantine.values()),
        "collected_from": said.collected_from, "collected_to": said.collected_to,
        "crawlers": list(said.crawlers), "crawler_purposes": said.crawler_purposes,
        "crawler_behaviour": said.crawler_behaviour, "generated_by": list(said.generated_by),
        "generated_by_others": said.generated_by_others, "is_publicly_known": said.is_publicly_known,
        "services": said.services, "is_from_model": said.is_from_model}


def _synthesis(one: SynthesisRecord) -> dict[str, Any]:
    return {"name": one.origin.name, "manifest_sha256": one.origin.sha256, "generator": one.generator,
            "version": one.version, "model": one.model, "judge": one.judge,
            "samples_kept": one.num_kept, "samples_rejected": one.num_rejected,
            "licences": [{"value": licence or NOT_RECORDED, "samples": num}
                         for licence, num in sorted(one.licences.items())]}


def _synthetic_tokens(sources: Iterable[TokenSource]) -> dict[str, Any] | None:
    """Return how many tokens models wrote, by the tags of the sources; None where there are no tokens."""
    counted: dict[bool | None, int] = {True: 0, False: 0, None: 0}
    for source in sources:
        # Two values, or none: then it is unknown how many of the tokens a model wrote.
        said = list(source.tags.get(SYNTHETIC, ()))
        is_synthetic = {"true": True, "false": False}.get(said[0]) if len(said) == 1 else None
        counted[is_synthetic] += source.num_tokens
    whole = sum(counted.values())
    return {"tokens": counted[True], "share": counted[True] / whole,
            "tokens_not_recorded": counted[None]} if whole else None


def _unstated(found: DataLineage) -> Iterable[str]:
    for one in found.syntheses:
        if unstated := one.licences.get("", 0):
            yield (f"samples {one.origin.name!r}: the licence of what {unstated:,} of {one.num_kept:,} were "
                   "made from")
        if not one.model:
            yield f"samples {one.origin.name!r}: the model that wrote them"
    if found.syntheses:
        for source in found.token_sources:
            if len(source.tags.get(SYNTHETIC, ())) != 1:
                yield f"tokens {source.name!r}: how many of them models wrote"


def _steps(corpus: CorpusRecord) -> list[dict[str, Any]]:
    found = []
    for number, kind in corpus.summary.steps():
        done = corpus.summary.of_step(number)
        reasons: dict[str, dict[str, int]] = {}
        for step in done:
            for reason, lost in step.dropped.items():
                old = reasons.setdefault(reason, {"documents": 0, "bytes": 0})
                reasons[reason] = {"documents": old["documents"] + lost.documents,
                                   "bytes": old["bytes"] + lost.bytes}
        found.append({
            "corpus": corpus.origin.name, "manifest_sha256": corpus.origin.sha256,
            "number": number, "step": kind,
            "settings": {} if number == 0 else _public(done[0].settings),
            "sources": len(done), "documents_in": sum(s.documents_in for s in done),
            "documents_kept": sum(s.documents_kept for s in done),
            "bytes_kept": sum(s.bytes_kept for s in done),
            "documents_changed": sum(s.documents_changed for s in done), "dropped": reasons})
    return found


def _public(value: Any, hide: bool = False) -> Any:
    if isinstance(value, dict):
        return {key: _public(item, key in HIDDEN_SETTINGS) for key, item in value.items()}
    if isinstance(value, list):
        return [_public(item, hide) for item in value]
    if isinstance(value, str) and (hide or value.startswith(("/", "~", "./", "../"))):
        return value.rstrip("/").rpartition("/")[2]
    return value


def _values(facts: Facts) -> dict[str, Any]:
    names = {"language": "languages", "form": "forms", "kind": "kinds", "level": "levels",
             "licence": "licences", "topic": "topics"}
    return {name: _shares(facts.values.get(column, {})) for column, name in names.items()}


def _shares(counts: dict[str, list[int]]) -> list[dict[str, Any]]:
    # What has no value, or is the rest, comes last, however large.
    ranked = sorted(counts.items(), key=lambda item: (item[0] in (NONE, REST), -item[1][1], item[0]))
    return [{"value": value or NOT_RECORDED, "documents": n[0], "bytes": n[1]} for value, n in ranked]


def _dates(facts: Facts) -> dict[str, Any]:
    dated = sorted(month for month in facts.months if month)
    return {"earliest": dated[0] if dated else None, "latest": dated[-1] if dated else None,
            "documents_without": facts.months.get(NONE, 0) if facts.months else facts.num_documents}


def _origin(origin: Origin) -> dict[str, Any]:
    return {"kind": origin.kind, "name": origin.name, "manifest_sha256": origin.sha256,
            "created": day(origin.created_s)}


def _raw(origin: Origin, raw: RawFiles) -> dict[str, Any]:
    return {"manifest_sha256": origin.sha256, "source": raw.source, "told_by": raw.told_by,
            "files": raw.num_files, "bytes": raw.size_bytes, "sha256": raw.sha256, "listed": list(raw.listed)}


def _missing(sources: Iterable[dict[str, Any]], about: About) -> list[str]:
    missing = []
    for source in sources:
        wanted = {"licence": source["licence"], "category": source["category"],
                  "description": source["description"], "link": source["link"]}
        absent = [name for name, value in wanted.items() if not value]
        if absent:
            missing.append(f"source {source['name']!r}: {', '.join(absent)}")
    if not about.collected_until and not any(s["collected_to"] for s in sources):
        missing.append("until when data was collected")
    return missing
