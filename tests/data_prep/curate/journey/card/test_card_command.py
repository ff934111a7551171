"""`sov-data card`: figures come from manifests, what nobody recorded is called so, all text is escaped."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_prep.cli import main
from data_prep.curate.journey.card.card import About
from data_prep.curate.journey.card.dataset_card import answers, questions
from megatron_sov.base.artifacts import manifest_sha256, new_artifact, read_manifest
from megatron_sov.base.digests import BLAKE3, file_digest
from megatron_sov.base.sealed import write_json

ABOUT = """
name: Ships
licence: CC-BY-4.0
provider: Harbour Office, office@example.org
models: [ship-1b-v1]
collected_until: 2026-10
is_continuous: false
is_signatory: true
opt_outs: robots.txt was obeyed.
sources:
  web: {category: crawled, description: Pages about ships., crawlers: [harbour-bot], collected_from: 2024-01,
        collected_to: 2024-06}
"""


def card(folder: Path, output: Path, *arguments: str) -> dict[str, Any]:
    assert main(["card", str(folder), "--output", str(output), *arguments]) == 0
    found: dict[str, Any] = json.loads((output / "card.json").read_text())
    return found


def remade(folder: Path, change: Callable[[Path, dict[str, Any]], None]) -> Path:
    """Write an artifact anew with a change, with hashes that fit."""
    other = folder.with_name("other")
    with new_artifact(other, read_manifest(folder).kind) as artifact:
        shutil.copytree(folder, artifact.path, dirs_exist_ok=True)
        (artifact.path / "manifest.json").unlink()
        artifact.content = dict(read_manifest(folder).content)
        artifact.inputs = list(read_manifest(folder).inputs)
        change(artifact.path, artifact.content)
    return other


def test_figures_are_those_of_the_manifests(corpus: Path, tmp_path: Path) -> None:
    found = card(corpus, tmp_path / "card")
    content = read_manifest(corpus).content
    assert found["totals"]["documents"] == content["num_documents"] == 4
    assert found["totals"]["bytes"] == content["num_bytes"]
    assert found["totals"]["documents_read"] == 7
    assert [(s["name"], s["licence"], s["documents_kept"]) for s in found["sources"]] == [
        ("web", "CC-BY-4.0", 3), ("books", "CC0-1.0", 1)]
    assert [(row["value"], row["documents"]) for row in found["languages"]] == [("en", 3), ("ko", 1)]
    assert {row["value"] for row in found["hosts"]} == {"example.org", "other.net"}
    assert found["dates"] == {"earliest": "2021", "latest": "2024-03", "documents_without": 0}
    assert found["steps"][2]["dropped"] == {"too few words": {"documents": 1, "bytes": 11}}
    assert found["steps"][3]["settings"] == {"mask": ["email", "phone"]}
    assert found["named"]["pii"] == {"email": 1}
    origin, = found["provenance"]
    assert (origin["name"], origin["manifest_sha256"]) == ("corpus", manifest_sha256(corpus))


def test_a_changed_figure_of_a_manifest_changes_the_card(own_corpus: Path, tmp_path: Path) -> None:
    def more_read(folder: Path, _content: dict[str, Any]) -> None:
        summary = json.loads((folder / "summary.json").read_text())
        summary["sources"][0]["steps"][0]["documents_kept"] += 1000
        (folder / "summary.json").write_text(json.dumps(summary))

    before = card(own_corpus, tmp_path / "before")
    after = card(remade(own_corpus, more_read), tmp_path / "after")
    assert (before["totals"]["documents_read"], after["totals"]["documents_read"]) == (7, 1007)
    assert "1,006" in (tmp_path / "after/README.md").read_text()


def test_a_figure_that_its_manifest_does_not_vouch_for_is_refused(own_corpus: Path,
                                                                  capsys: pytest.CaptureFixture[str]) -> None:
    summary = (own_corpus / "summary.json").read_text()
    (own_corpus / "summary.json").write_text(summary.replace('"CC0-1.0"', '"CC1-1.0"'))
    assert main(["card", str(own_corpus)]) == 2
    assert "differs from the hash in the manifest; a card tells nothing" in capsys.readouterr().err
    (own_corpus / "summary.json").write_text(summary)

    def fewer(_folder: Path, content: dict[str, Any]) -> None:
        content["num_documents"] -= 1

    assert main(["card", str(remade(own_corpus, fewer))]) == 2
    assert "says num_documents = 3, its shards hold 4" in capsys.readouterr().err


def test_what_nobody_recorded_is_named(corpus: Path, tmp_path: Path,
                                       capsys: pytest.CaptureFixture[str]) -> None:
    found = card(corpus, tmp_path / "card")
    assert found["not_recorded"] == [
        "source 'web': category, description, link", "source 'books': description, link",
        "until when data was collected"]
    assert "not recorded: source 'web': category" in capsys.readouterr().out
    summary = (tmp_path / "card/training_content.md").read_text()
    assert "**Provider name and contact details** not recorded" in summary
    assert "AI-generated data created by the provider or on their behalf?** Yes: books" in summary
    assert "**Were crawlers used by the provider or on their behalf?** not recorded" in summary


def test_a_team_adds_what_no_manifest_knows(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "about.yaml").write_text(ABOUT)
    card(corpus, tmp_path / "card", "--about", str(tmp_path / "about.yaml"))
    summary = (tmp_path / "card/training_content.md").read_text()
    for said in ("**Provider name and contact details** Harbour Office, office@example.org",
                 "**Crawler names or identifiers** harbour-bot",
                 "**Period of data collection** web: 2024-01 to 2024-06",
                 "**Have publicly available datasets been used?** No",
                 "**Signatory to the Code of Practice for general-purpose AI models** Yes",
                 "2026-10; no training on new data after that date; the latest date that a document"):
        assert said in summary
    assert "steps of the pipeline that remove" in summary.lower() and 'pii {"mask": \\["email"' in summary


def test_the_template_asks_for_large_public_datasets_by_name_and_for_kinds_of_user_data() -> None:
    sources = [{"name": name, "category": category, "bytes_kept": size_bytes, "documents_kept": 1,
                "description": "", "link": "", "licence": "", "services": "", "collected_from": "",
                "collected_to": "", "crawlers": [], "crawler_purposes": "", "crawler_behaviour": "",
                "generated_by": [], "generated_by_others": "ours-1b, of the same data",
                "is_publicly_known": name == "known", "is_from_model": is_from_model}
               for name, category, size_bytes, is_from_model in (
                   ("wiki", "public", 971, None), ("tales", "public", 29, None),
                   ("known", "third_party", 1, None), ("secret", "third_party", 1, None),
                   ("prompts", "user", 1, True),
                   ("made", "synthetic", 1, None))]
    card_ = {"sources": sources, "steps": [], "hosts": [], "languages": [], "dates": {"latest": ""},
             "totals": {"tokens": 1, "tokens_estimate": None, "bytes": 1}}
    said = answers(card_, About(version="1.0"))
    assert said["large_public"].startswith("wiki: ") and "tales" not in said["large_public"], "above 3 %"
    assert said["small_public"].startswith("tales: ") and said["modality_public"] == "Text"
    assert said["known_third_party"].startswith("known: ") and said["list_third_party"].startswith("secret: ")
    assert (said["has_user_model"], said["has_user_services"]) == ("Yes: prompts", "No")
    assert said["generated_by_others"] == "made: ours-1b, of the same data" and said["version"] == "1.0"
    assert (said["modality_licensed"], said["updated"]) == ("None", "")


def test_the_summary_has_the_sections_of_the_template(corpus: Path, tmp_path: Path) -> None:
    found = card(corpus, tmp_path / "card")
    assert " ".join(s["number"] for s in questions() if s["number"]) == (
        "1 1.1 1.2 1.3 2 2.1 2.2 2.2.1 2.2.2 2.3 2.4 2.5 2.6 3 3.1 3.2 3.3")
    asked = {q["key"] for section in questions() for q in section.get("questions", ())}
    assert asked == set(found["training_content"])


def test_the_hub_reads_the_dataset_card(corpus: Path, tmp_path: Path) -> None:
    from huggingface_hub import DatasetCard

    card(corpus, tmp_path / "card")
    data = DatasetCard.load(tmp_path / "card/README.md", ignore_metadata_errors=False).data
    assert data.language == ["en", "ko"] and data.pretty_name == "ships"
    assert data.license == ["cc-by-4.0", "cc0-1.0"] and data.size_categories == ["n<1K"]
    assert data.to_dict()["configs"] == [{"config_name": "books", "data_files": "text/books/*.parquet"},
                                         {"config_name": "web", "data_files": "text/web/*.parquet"}]


def test_hostile_words_stay_words(own_corpus: Path, hostile: str, tmp_path: Path) -> None:
    def poisoned(folder: Path, _content: dict[str, Any]) -> None:
        summary = json.loads((folder / "summary.json").read_text())
        summary["sources"][0]["licence"] = f"{hostile} | [x](javascript:alert(1))\n# Title\n---"
        summary["name"] = "a: [b\n---\n"
        (folder / "summary.json").write_text(json.dumps(summary))

    card(remade(own_corpus, poisoned), tmp_path / "card")
    text = (tmp_path / "card/README.md").read_text()
    front, body = text.split("\n---\n", 1)
    assert yaml.safe_load(front.removeprefix("---\n"))["pretty_name"] == "a: [b\n---\n"
    assert "<script" not in body and "<img" not in body and not re.search(r"(?<!\\)\]\(", body)
    assert "\x1b" not in text and "\n# Title" not in body
    rows = [line for line in body.splitlines() if line.startswith("| web | ")]
    assert rows[0].replace("\\|", "").count("|") == 10


@pytest.mark.parametrize(("about", "said"), [
    ("provder: x\nsources: {wep: {category: crawled}}", ["provder: no such", "mean 'provider'?"]),
    ("models: 3\nis_small: perhaps\nsources: {web: {category: stolen}}", [
        "3 problems", "models = 3", 'is_small = "perhaps"', 'sources.web.category = "stolen"']),
    ("sources: {wep: {category: crawled}}", ["sources.wep: the data has no such source", "mean 'web'?"]),
    ("a: [", ["is no YAML"]), ("- 1", ["[1] must be an object of settings"]),
    ("a: &a [x]\nb: *a", ["2 problems", "b: no such"]), ("name: \udcff", ["is no text in UTF-8"]),
])
def test_all_mistakes_of_an_about_file_are_told(corpus: Path, tmp_path: Path, about: str, said: list[str],
                                                capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "about.yaml").write_bytes(about.encode(errors="surrogateescape"))
    assert main(["card", str(corpus), "--about", str(tmp_path / "about.yaml")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --about") and all(part in error for part in said)


def test_token_shards_and_mixes_lead_back_to_their_corpus(own_corpus: Path, tmp_path: Path,
                                                          token_shards: Path) -> None:
    for name in ("web", "books"):
        assert main(["pack", "--tokenizer", str(token_shards.parent / "tokenizer"), "--input",
                     str(own_corpus / "text" / name), "--output", str(tmp_path / name), "--heldout", "0",
                     "--workers", "1"]) == 0
    assert main(["mix", f"{tmp_path / 'web'}:3", f"{tmp_path / 'books'}:1", "--output",
                 str(tmp_path / "mix")]) == 0
    found = card(tmp_path / "mix", tmp_path / "card")
    assert [s["name"] for s in found["sources"]] == ["web", "books"] and found["totals"]["documents"] == 4
    assert found["totals"]["packed_documents"] == 4
    assert [(s["name"], s["weight"]) for s in found["tokens"]["sources"]] == [("web", 0.75), ("books", 0.25)]
    assert [o["kind"] for o in found["provenance"]] == ["tokens", "tokens", "tokenizer", "corpus", "tokens"]
    own_corpus.rename(tmp_path / "moved")
    lost = card(tmp_path / "mix", tmp_path / "lost")
    assert lost["totals"]["documents"] is None and "is not where it was" in lost["not_recorded"][0]
    again = card(tmp_path / "mix", tmp_path / "again", "--from", str(tmp_path / "moved"))
    assert again["sources"] == [{**s, "corpus": "moved"} for s in found["sources"]]


def test_of_several_folders_there_is_one_card_in_which_nothing_counts_twice(
        own_corpus: Path, tmp_path: Path, token_shards: Path) -> None:
    (own_corpus / "inputs").mkdir()
    write_json(own_corpus / "inputs/web.json", {"/home/me/b.jsonl": [7, 1, 1, 3, "cd" * 16],
                                                "/home/me/a.jsonl": [5, 1, 1, 4, "ab" * 16]})
    for name in ("web", "books"):
        assert main(["pack", "--tokenizer", str(token_shards.parent / "tokenizer"), "--input",
                     str(own_corpus / "text" / name), "--output", str(tmp_path / name), "--heldout", "0",
                     "--workers", "1"]) == 0
    alone = [card(tmp_path / name, tmp_path / f"card-{name}") for name in ("web", "books")]
    given = [str(tmp_path / "web"), str(tmp_path / "books"), str(tmp_path / "web"), str(own_corpus)]
    assert main(["card", *given, "--output", str(tmp_path / "card")]) == 0
    both = json.loads((tmp_path / "card/card.json").read_text())
    assert both["totals"]["tokens"] == sum(one["totals"]["tokens"] for one in alone)
    assert both["totals"]["documents"] == alone[0]["totals"]["documents"] == 4
    assert [a["name"] for a in both["artifacts"]] == ["web", "books"], "not what they are of"
    assert [s["weight"] for s in both["tokens"]["sources"]] == [None, None]
    shards = manifest_sha256(tmp_path / "web")
    web = next(o for o in both["provenance"] if o["manifest_sha256"] == shards)
    assert manifest_sha256(own_corpus) in web["made_from"]
    raw, = both["raw_files"]
    assert (raw["source"], raw["files"], raw["bytes"], raw["told_by"]) == ("web", 2, 12, "inputs/web.json")
    assert raw["listed"][0] == {"name": "a.jsonl", "size_bytes": 5, "digest": f"blake3:{'ab' * 16}"}
    write_json(own_corpus / "inputs/web.json", [])
    assert main(["card", str(own_corpus)]) == 2


SOURCES = {"web": "html", "books": "text", "seal": "jsonl", "content": "jsonl", "parts": "text",
           "mixed": "auto"}


def _write_raw_file(folder: Path, name: str, format_: str) -> None:
    folder.mkdir()
    text = "\n".join(f"Line {i} of the source {name} is some text about ships." for i in range(20))
    ending, written = {"html": ("html", f"<html><body><main><p>{text}</p></main></body></html>"),
                       "jsonl": ("jsonl", json.dumps({"text": text}) + "\n")}.get(format_, ("txt", text))
    (folder / f"one.{ending}").write_text(written)


def test_card_reads_the_hashes_that_a_fresh_run_has_written(tmp_path: Path) -> None:
    for name, format_ in SOURCES.items():
        _write_raw_file(tmp_path / name, name, format_)
    sources = [{"name": name, "path": [name], "format": format_} for name, format_ in SOURCES.items()]
    pipeline = {"name": "p", "sources": sources, "steps": [{"exact_dedup": {}}]}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(pipeline))
    run = ["run", str(tmp_path / "p.yaml"), "--output", str(tmp_path / "out"), "--workers", "1"]
    assert main(run) == 0
    for number in range(2):  # also after the run is found complete
        found = card(tmp_path / "out", tmp_path / f"card-{number}")
        listed = {raw["source"]: raw["listed"] for raw in found["raw_files"]}
        for name in SOURCES:
            file, = (tmp_path / name).iterdir()
            digest = file_digest(file, BLAKE3)[:len("blake3:") + 32]
            assert listed[name] == [{"name": file.name, "size_bytes": file.stat().st_size, "digest": digest}]
        assert main(run) == 0


@pytest.mark.parametrize("damage", [
    lambda data: data.replace(b"one", b"two"), lambda data: data[:-9], lambda data: b"{}", lambda data: b"",
    lambda data: b"\x00" * 40, lambda data: data.replace(b'"seal"', b'"leas"')])
def test_card_refuses_a_changed_list_of_hashes(own_corpus: Path, damage: Callable[[bytes], bytes],
                                               capsys: pytest.CaptureFixture[str]) -> None:
    file = own_corpus / "inputs/web.json"
    file.parent.mkdir()
    write_json(file, {"/home/me/one.jsonl": [7, 1, 1, 3, "cd" * 16]})
    file.write_bytes(damage(file.read_bytes()))
    assert main(["card", str(own_corpus)]) == 2
    error = capsys.readouterr().err
    assert "inputs/web.json: is damaged" in error and "delete it" in error and "Traceback" not in error


def test_token_shards_that_a_pipeline_packed_belong_to_its_corpus(own_corpus: Path, tmp_path: Path,
                                                                  token_shards: Path) -> None:
    assert main(["pack", "--tokenizer", str(token_shards.parent / "tokenizer"), "--input",
                 str(own_corpus / "text/web"), "--output", str(own_corpus / "tokens"), "--heldout", "0",
                 "--workers", "1"]) == 0

    def packed(folder: Path, content: dict[str, Any]) -> None:
        content["tokens_manifest_sha256"] = manifest_sha256(folder / "tokens")

    whole = remade(own_corpus, packed)  # another manifest than the one that stood there when it was packed
    own_corpus.rename(tmp_path / "before")
    found = card(whole / "tokens", tmp_path / "card")
    assert [o["name"] for o in found["provenance"]] == ["tokens", "other", "tokenizer"]
    assert found["totals"]["documents"] == 4 and found["totals"]["packed_documents"] == 3


def test_other_folders_and_places_are_refused(corpus: Path, token_shards: Path, tmp_path: Path,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "README.md").write_text("# My project\n")
    for arguments, said in (
            ([str(tmp_path)], "so it is not an artifact"),
            ([str(token_shards.parent / "tokenizer")], "is a 'tokenizer'"),
            ([str(corpus), "--about", str(tmp_path / "none")], "cannot be read"),
            ([str(corpus), "--output", str(tmp_path / "file")], "is a file; name a folder"),
            ([str(corpus), "--output", str(tmp_path)], "has a README.md of something else"),
            ([str(corpus), "--from", str(tmp_path / "none")], "does not exist")):
        assert main(["card", *arguments]) == 2
        assert said in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "# My project\n"
