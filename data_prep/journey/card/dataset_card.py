"""The card as a Hugging Face dataset card: YAML metadata, then sections in Markdown; all text is escaped."""

from __future__ import annotations

import json
from typing import Any

import yaml

from data_prep.journey.card.about import CATEGORIES
from data_prep.journey.card.card import NOT_RECORDED
from megatron_sov.documents.visible import visible
from megatron_sov.obs.figures import large, size
from megatron_sov.pages.markdown import hub_languages, hub_licence, link, md, table

SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"),
         (10**7, "1M<n<10M"), (10**8, "10M<n<100M"), (10**9, "100M<n<1B"), (10**10, "1B<n<10B"),
         (10**11, "10B<n<100B"), (10**12, "100B<n<1T"))
"""Size categories of the Hugging Face hub, by documents."""


def dataset_card(card: dict[str, Any]) -> str:
    """Return a card as the README.md of a Hugging Face dataset."""
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
    """Return whether the files of the card's output lie below one folder."""
    return [artifact["kind"] for artifact in card["artifacts"]] == ["corpus"]


def _opening(card: dict[str, Any]) -> list[str]:
    totals = card["totals"]
    facts = []
    if totals["documents"] is not None:
        facts.append(f"{totals['documents']:,} documents, {size(totals['bytes'])} of text, out of "
                     f"{totals['documents_read']:,} documents and {size(totals['bytes_read'])} that were "
                     "read.")
    if totals["tokens"] is not None:
        facts.append(f"{totals['tokens']:,} tokens in {totals['packed_documents']:,} packed documents.")
    elif totals["tokens_estimate"] is not None:
        facts.append(f"About {large(totals['tokens_estimate'])} tokens, assumed at 4 bytes a token; nothing "
                     "was packed.")
    dates = card["dates"]
    if dates["latest"]:
        facts.append(f"Documents carry dates from {md(dates['earliest'])} to {md(dates['latest'])}; "
                     f"{dates['documents_without']:,} carry none.")
    return [md(card["description"])] * bool(card["description"]) + [" ".join(facts)] * bool(facts)


def _sources(card: dict[str, Any]) -> list[str]:
    if not card["sources"]:
        return ["## Sources", NOT_RECORDED.capitalize() + "."]
    rows = [[s["name"], CATEGORIES[s["category"]], s["licence"] or NOT_RECORDED, s["format"],
             f"{s['files']:,}", f"{s['documents_read']:,}", f"{s['documents_kept']:,}", size(s["bytes_kept"]),
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
    """Return a sentence about the tokens that models wrote; none where there are no tokens."""
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
                [row["value"], f"{row['documents']:,}", size(row["bytes"])] for row in rows])]
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
