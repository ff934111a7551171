"""The card as a Hugging Face dataset card: YAML metadata, then sections in Markdown; all text is escaped."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Callable
from typing import Any

import yaml

from data_prep.curate.journey.card.card import CATEGORIES, NOT_RECORDED, About
from megatron_sov.base.errors import visible
from megatron_sov.base.figures import format_count, format_size
from megatron_sov.base.pages.markdown import hub_languages, hub_licence, link, md, table

# The European Commission's template for the public summary of training content, answered from a card.
#
# What a manifest knows stands there as it is; what only the team knows comes from its --about file; the
# rest is "not recorded".  The questions lie in training_content.yaml.

PROTECTING = ("pii", "safety", "decontaminate")
"""Steps that remove or mask content for other reasons than its quality."""
MAX_HOSTS = 200
MODALITY = "Text"
"""What all documents of a pipeline are."""
LARGE_SHARE = 0.03
"""Of all publicly available data: a larger dataset is one that the template wants listed by name."""
TOP_SHARE, SMALL_TOP_SHARE, SMALL_MOST = 0.10, 0.05, 1_000
"""Of all domain names those that the template wants named; for small enterprises fewer."""


def questions() -> list[dict[str, Any]]:
    """Return the template's sections in order, with the questions of each; those at its head have no
    number."""
    here = importlib.resources.files("data_prep.curate.journey.card")
    text = here.joinpath("training_content.yaml").read_text(encoding="utf-8")
    found: list[dict[str, Any]] = yaml.safe_load(text)
    return found


def answers(card: dict[str, Any], about: About) -> dict[str, str]:
    """Return key of a question -> its answer; "" where nobody has recorded one."""
    found = {"version": about.version, "updated": about.updated, "provider": about.provider,
             "representative": about.representative,
             "models": ", ".join(about.models), "dependencies": about.dependencies,
             "market_date": about.market_date, "types_of_content": about.types_of_content,
             "characteristics": about.characteristics, "opt_outs": about.opt_outs,
             "illegal_content": about.illegal_content, "comments": about.comments,
             "is_signatory": _yes_no(about.is_signatory), "modality": MODALITY, "size": _size(card),
             "collected_until": _until(card, about), "languages": _languages(card, about),
             "domains": _domains(card, about), "safety_steps": _steps(card, PROTECTING),
             "processing": _steps(card)}
    for category in filter(None, CATEGORIES):
        found[f"has_{category}"] = _has(card, category)
        found[f"list_{category}"] = _listed(card, category)
        found[f"modality_{category}"] = (MODALITY if _of(card, category) else
                                         "None" if found[f"has_{category}"] else "")
    found["list_unsorted"] = _listed(card, "")
    # The template wants large public datasets by name and the others in a summary, and of private ones those
    # that the public knows.
    large_bytes = LARGE_SHARE * sum(s["bytes_kept"] for s in _of(card, "public"))
    for key, category, chosen in (
            ("large_public", "public", lambda s: s["bytes_kept"] > large_bytes),
            ("small_public", "public", lambda s: s["bytes_kept"] <= large_bytes),
            ("known_third_party", "third_party", lambda s: s["is_publicly_known"]),
            ("list_third_party", "third_party", lambda s: not s["is_publicly_known"])):
        found[key] = _listed(card, category, chosen)
    for key, is_from_model in (("has_user_model", True), ("has_user_services", False)):
        found[key] = _has(card, "user", is_from_model)
    crawled, synthetic = _of(card, "crawled"), _of(card, "synthetic")
    found["crawlers"] = ", ".join(name for s in crawled for name in s["crawlers"])
    found["generated_by"] = ", ".join(dict.fromkeys(name for s in synthetic for name in s["generated_by"]))
    for key, sources in (("crawler_purposes", crawled), ("crawler_behaviour", crawled),
                         ("generated_by_others", synthetic)):
        found[key] = "; ".join(f"{s['name']}: {s[key]}" for s in sources if s[key])
    found |= _written(card, found)
    found["crawl_period"] = "; ".join(f"{s['name']}: {_period(s)}" for s in crawled if _period(s))
    return {question["key"]: found[question["key"]]
            for section in questions() for question in section.get("questions", ())}


def _written(card: dict[str, Any], said: dict[str, str]) -> dict[str, str]:
    samples = card.get("synthesis", ())
    if not samples:
        return {}
    names = [s["name"] for s in (*_of(card, "synthetic"), *samples)]
    listed = [f"{s['name']}: generator {s['generator']}, {s['samples_kept']:,} samples, licence of what they "
              f"were made from {', '.join(one['value'] for one in s['licences']) or NOT_RECORDED}"
              for s in samples]
    models = [f"{s['name']}: {s['model'] or NOT_RECORDED}" for s in samples]
    before = said["list_synthetic"] if _of(card, "synthetic") else ""
    return {"has_synthetic": f"Yes: {', '.join(names)}", "modality_synthetic": MODALITY,
            "list_synthetic": "; ".join(filter(None, [before, *listed])),
            "generated_by_others": "; ".join(filter(None, [said["generated_by_others"], *models]))}


def training_content(card: dict[str, Any], about: About) -> str:
    said = answers(card, about)
    lines = ["# Public summary of training content", "",
             "In the form of the European Commission's template (Regulation (EU) 2024/1689, Article "
             "53(1)(d); C(2025) 8311 of 5 December 2025).",
             "Made from " + "; ".join(f"{md(a['kind'])} {md(a['name'])}, manifest {a['manifest_sha256']}, of "
                                     f"{md(a['created'])}" for a in card["artifacts"]) + ".", ""]
    for section in questions():
        if section["number"]:
            depth = "#" * (2 + section["number"].count("."))
            lines += [f"{depth} {section['number']}. {section['title']}", ""]
        for question in section.get("questions", ()):
            answer = said[question["key"]]
            lines += [f"**{question['ask']}** {md(answer, 20_000) if answer else NOT_RECORDED}", ""]
    return "\n".join(lines)


def _yes_no(value: bool | None) -> str:
    return {None: "", True: "Yes", False: "No"}[value]


def _of(card: dict[str, Any], category: str) -> list[dict[str, Any]]:
    return [s for s in card["sources"] if s["category"] == category]


def _has(card: dict[str, Any], category: str, is_from_model: bool | None = None) -> str:
    """Return whether there are sources of a category; "" where some have none and could be of it.

    Args:
        card: the card.
        category: one of the template's.
        is_from_model: of user data, only what users gave to the model (or only what they did not).
    """
    found = _of(card, category)
    chosen = [s for s in found if is_from_model is None or s["is_from_model"] == is_from_model]
    if chosen:
        return f"Yes: {', '.join(s['name'] for s in chosen)}"
    # "No" is a statement to an authority: it is made only where every source has a category and, of user
    # data, an origin.
    is_unknown = is_from_model is not None and any(s["is_from_model"] is None for s in found)
    return "No" if card["sources"] and not _of(card, "") and not is_unknown else ""


def _listed(card: dict[str, Any], category: str, chosen: Callable[[dict[str, Any]], bool] = lambda s: True
            ) -> str:
    if not (found := [s for s in _of(card, category) if chosen(s)]):
        return "" if _of(card, "") or not card["sources"] else "None"
    return "; ".join(
        f"{s['name']}: {s['description'] or 'description ' + NOT_RECORDED}, "
        f"{s['link'] or 'link ' + NOT_RECORDED}, licence {s['licence'] or NOT_RECORDED}, "
        f"{s['documents_kept']:,} documents, {format_size(s['bytes_kept'])} of text"
        + (f", collected {_period(s)}" if _period(s) else "")
        + (f", services {s['services']}" if s["services"] else "") for s in found)


def _period(source: dict[str, Any]) -> str:
    if not source["collected_from"] and not source["collected_to"]:
        return ""
    return f"{source['collected_from'] or NOT_RECORDED} to {source['collected_to'] or NOT_RECORDED}"


def _size(card: dict[str, Any]) -> str:
    totals = card["totals"]
    tokens = totals["tokens"] if totals["tokens"] is not None else totals["tokens_estimate"]
    if tokens is None:
        return ""
    bin_ = ("Less than 1 billion tokens" if tokens < 10**9 else "1 billion to 10 trillion tokens"
            if tokens <= 10**13 else "More than 10 trillion tokens")
    how = "counted" if totals["tokens"] is not None else "assumed at 4 bytes a token"
    text = f"; {format_size(totals['bytes'])} of text" if totals["bytes"] is not None else ""
    return f"{bin_} ({format_count(tokens)} tokens, {how}{text})"


def _until(card: dict[str, Any], about: About) -> str:
    said = about.collected_until or max((s["collected_to"] for s in card["sources"]), default="")
    parts = [said, {None: "", True: "training on new data goes on after that date",
                    False: "no training on new data after that date"}[about.is_continuous]]
    if card["dates"]["latest"]:
        parts.append(f"the latest date that a document carries is {card['dates']['latest']}")
    return "; ".join(filter(None, parts)) if said else ""


def _languages(card: dict[str, Any], about: About) -> str:
    whole = sum(row["bytes"] for row in card["languages"])
    shares = [f"{row['value']} {row['bytes'] / whole:.1%}" for row in card["languages"][:40] if whole]
    return " ".join(filter(None, [about.languages,
                                  f"By bytes of text: {', '.join(shares)}." if shares else ""]))


def _domains(card: dict[str, Any], about: About) -> str:
    hosts = card["hosts"]
    if not hosts:
        return ""
    # The template: the top 10 % of all domain names; for small enterprises 5 %, or 1,000 if that is fewer.
    most = (min(SMALL_MOST, round(len(hosts) * SMALL_TOP_SHARE)) if about.is_small
            else round(len(hosts) * TOP_SHARE))
    named = [row["value"] for row in hosts[:max(1, most)]]
    more = f", and {len(named) - MAX_HOSTS:,} more in card.json" if len(named) > MAX_HOSTS else ""
    return (f"{len(hosts):,} hosts among the documents that carry an address; those with most text: "
            f"{', '.join(named[:MAX_HOSTS])}{more}")


def _steps(card: dict[str, Any], only: tuple[str, ...] = ()) -> str:
    return "; ".join(
        f"{s['step']} {json.dumps(s['settings'], ensure_ascii=False)}: {s['documents_in']:,} documents in, "
        f"{s['documents_kept']:,} kept, {s['documents_changed']:,} changed"
        for s in card["steps"] if s["number"] and (not only or s["step"] in only))


SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"),
         (10**7, "1M<n<10M"), (10**8, "10M<n<100M"), (10**9, "100M<n<1B"), (10**10, "1B<n<10B"),
         (10**11, "10B<n<100B"), (10**12, "100B<n<1T"))
"""Size categories of the Hugging Face hub, by documents."""


def dataset_card(card: dict[str, Any]) -> str:
    metadata = yaml.safe_dump(hub_metadata(card), allow_unicode=True, sort_keys=False, width=100)
    parts = [f"---\n{metadata}---", f"# {md(card['name'])}", *_opening(card), *_sources(card),
             *_synthesis(card), *_content(card), *_making(card), *_hashes(card), *_not_recorded(card),
             f"Written by {md(card['written_by'])} from the manifests above."]
    return "\n\n".join(parts) + "\n"


def hub_metadata(card: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata that the Hugging Face hub reads from a dataset card."""
    documents = card["totals"]["documents"] or card["totals"]["packed_documents"]
    languages = hub_languages(row["value"] for row in card["languages"])
    if any(row["value"] == "code" for row in card["forms"]):
        languages.append("code")
    # The collection's own licence counts; else those of documents; else those that the sources name.
    names = [card["licence"]] if card["licence"] else [
        row["value"] for row in card["licences"] if row["value"] != NOT_RECORDED] or [
        source["licence"] for source in card["sources"] if source["licence"]]
    return {
        "pretty_name": visible(card["name"]),
        **({"language": languages} if languages else {}),
        **hub_licence(names),
        "task_categories": ["text-generation"],
        **({"size_categories": [next((name for most, name in SIZES if documents < most), "n>1T")]}
           if documents is not None else {}),
        **({"multilinguality": ["multilingual" if len(languages) > 1 else "monolingual"]}
           if languages else {}),
        **({"configs": [{"config_name": row["name"], "data_files": f"text/{row['name']}/*.parquet"}
                        for row in card["output"]]} if _is_one_corpus(card) else {})}


def _is_one_corpus(card: dict[str, Any]) -> bool:
    return [artifact["kind"] for artifact in card["artifacts"]] == ["corpus"]


def _opening(card: dict[str, Any]) -> list[str]:
    totals = card["totals"]
    facts = []
    if totals["documents"] is not None:
        facts.append(f"{totals['documents']:,} documents, {format_size(totals['bytes'])} of text, out of "
                     f"{totals['documents_read']:,} documents and {format_size(totals['bytes_read'])} that "
                     "were "
                     "read.")
    if totals["tokens"] is not None:
        facts.append(f"{totals['tokens']:,} tokens in {totals['packed_documents']:,} packed documents.")
    elif totals["tokens_estimate"] is not None:
        facts.append(f"About {format_count(totals['tokens_estimate'])} tokens, assumed at 4 bytes a token; "
                     "nothing "
                     "was packed.")
    dates = card["dates"]
    if dates["latest"]:
        facts.append(f"Documents carry dates from {md(dates['earliest'])} to {md(dates['latest'])}; "
                     f"{dates['documents_without']:,} carry none.")
    parts = [md(card["description"])] if card["description"] else []
    if facts:
        parts.append(" ".join(facts))
    return parts


def _sources(card: dict[str, Any]) -> list[str]:
    if not card["sources"]:
        return ["## Sources", NOT_RECORDED.capitalize() + "."]
    rows = [[s["name"], CATEGORIES[s["category"]], s["licence"] or NOT_RECORDED, s["format"],
             f"{s['files']:,}", f"{s['documents_read']:,}", f"{s['documents_kept']:,}",
             format_size(s["bytes_kept"]),
             f"{s['quarantined']:,}"] for s in card["sources"]]
    told = [f"- **{md(s['name'])}**: {md(s['description'] or NOT_RECORDED)}"
            + (f" {link(s['link'])}" if s["link"] else "") for s in card["sources"]
            if s["description"] or s["link"]]
    return ["## Sources", table(["source", "category", "licence", "format", "files", "documents read",
                                 "documents kept", "text kept", "quarantined"], rows, 1_000),
            *(["\n".join(told)] if told else [])]


def _synthesis(card: dict[str, Any]) -> list[str]:
    if not card["synthesis"]:
        return []
    rows = [[s["name"], f"{s['generator']}, version {s['version']}", s["model"] or NOT_RECORDED,
             s["judge"] or "the same", f"{s['samples_kept']:,}", f"{s['samples_rejected']:,}",
             ", ".join(f"{one['value']} ({one['samples']:,})" for one in s["licences"]) or NOT_RECORDED]
            for s in card["synthesis"]]
    return ["## Written by models", table(["samples", "generator", "model", "judge", "kept", "rejected",
                                           "licence of what they were made from"], rows, 1_000),
            *_synthetic_share(card)]


def _synthetic_share(card: dict[str, Any]) -> list[str]:
    counted = card["synthetic_tokens"]
    if counted is None:
        return []
    unknown = counted["tokens_not_recorded"]
    more = f"; of {unknown:,} others nobody has recorded it" if unknown else ""
    share = f"{'At least ' if unknown else ''}{counted['share']:.1%}"
    return [f"{share} of the tokens ({counted['tokens']:,}) were written by models{more}."]


def _content(card: dict[str, Any]) -> list[str]:
    parts = []
    for title, name, what in (
            ("Languages", "languages", "language"), ("Licences of documents", "licences", "licence"),
            ("Kinds", "kinds", "kind"), ("Levels of quality", "levels", "level"),
            ("Topics", "topics", "topic"), ("Hosts", "hosts", "host")):
        rows = card[name]
        if rows and [row["value"] for row in rows] != [NOT_RECORDED]:
            parts += [f"## {title}", table([what, "documents", "text"], [
                [row["value"], f"{row['documents']:,}", format_size(row["bytes"])] for row in rows])]
    if masked := card["named"].get("pii"):
        parts += ["## Personal data that was masked", table(["what", "times"], [
            [name, f"{n:,}"] for name, n in masked.items()])]
    return parts


def _making(card: dict[str, Any]) -> list[str]:
    parts = []
    if card["steps"]:
        rows = [[s["step"], json.dumps(s["settings"], ensure_ascii=False) if s["settings"] else "–",
                 f"{s['documents_in']:,}", f"{s['documents_kept']:,}", f"{s['documents_changed']:,}",
                 ", ".join(f"{n['documents']:,} {reason}" for reason, n in sorted(
                     s["dropped"].items(), key=lambda item: -item[1]["documents"])[:8]) or "–"]
                for s in card["steps"]]
        parts += ["## How it was made", table(["step", "settings", "documents in", "kept", "changed",
                                               "dropped for"], rows, 1_000)]
    if card["tokens"]:
        rows = [[s["name"], f"{s['tokens']:,}", f"{s['documents']:,}",
                 NOT_RECORDED if s["weight"] is None else f"{s['weight']:.2%}"]
                for s in card["tokens"]["sources"]]
        parts += ["## Tokens", table(["source", "tokens", "documents", "share of a run"], rows, 1_000)]
    return parts


def _hashes(card: dict[str, Any]) -> list[str]:
    return ["## Hashes", table(["artifact", "kind", "made on", "SHA-256 of its manifest"], [
        [o["name"], o["kind"], o["created"], o["manifest_sha256"]] for o in card["provenance"]], 1_000)]


def _not_recorded(card: dict[str, Any]) -> list[str]:
    return (["## Not recorded", "\n".join(f"- {md(sentence)}" for sentence in card["not_recorded"])]
            if card["not_recorded"] else [])
