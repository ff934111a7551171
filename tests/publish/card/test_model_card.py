"""README.md as the Hugging Face hub reads it; the picture and Annex XI; hostile names stay names."""

from __future__ import annotations

import json
import re
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load

from megatron_sov.base.artifacts import sha256_file
from megatron_sov.publish.card.content import ScoreFile, card_json, make_card, quantity
from megatron_sov.publish.card.data_summary import add_data, data_card
from megatron_sov.publish.card.lineage import MAX_ROWS, Graph, Node, lineage, picture
from megatron_sov.publish.card.model_card import annex_xi, answers_of, items, model_card
from megatron_sov.publish.card.run_record import CardAnswers, Figure, read_answers

HOSTILE = "</title><script>alert(1)</script> [x](javascript:alert(1)) | `\x1b[2J\n# Title\n---"


def card_of(world: Any, answers: CardAnswers | None = None,
            scores: dict[str, Any] | None = None) -> dict[str, Any]:
    found = lineage([world.sft], hf_folder=world.hf)
    data = data_card(found.data, [], None)
    add_data(found.graph, data)
    content = scores or json.loads((world.root / "scores.json").read_text())
    return make_card(found, data, [ScoreFile("scores.json", "scores.json", "", content)],
                     answers or read_answers(world.root / "answers.yaml"))


def test_the_hub_reads_the_metadata(whole_world: Any, tmp_path: Any) -> None:
    text = model_card(card_of(whole_world))
    (tmp_path / "README.md").write_text(text)
    data = ModelCard(text, ignore_metadata_errors=False).data
    assert (data.license, data.language, data.base_model) == ("apache-2.0", ["en", "ko"], "lab/base")
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    result, = data.eval_results  # the metric without a value is left out, and is not 0
    assert (result.dataset_type, result.metric_type, result.metric_value) == ("mmlu.v1", "acc", 0.75)
    assert data.model_name == "sft" and "megatron-sov-card" in data.tags
    found = metadata_load(tmp_path / "README.md")
    assert found["co2_eq_emissions"]["emissions"] > 0
    assert yaml.safe_load(text.split("---")[1]) == found


def test_each_part_of_the_card_says_what_it_rests_on(whole_world: Any) -> None:
    text = model_card(card_of(whole_world))
    for said in ("| acc | 0\\.75 \\[0.5, 0.9375\\] | recorded | 8 | 1 | 0 | default |",
                 "| acc\\_norm | not known |",
                 "2 items of web; without them 0.5", "| licence | apache-2.0 | stated |",
                 "| web | CC-BY-4.0 | recorded |", "| books | CC0-1.0 | stated |",
                 "- mmlu.v1: only the first 8 items were asked.",
                 "- mmlu.v1: 2 items stand in the training text.",
                 "| hf/model.safetensors | blake3:", "step not learned | 1 |"):
        assert said in text, said
    assert "Files beside this one" not in model_card(card_of(whole_world), is_alone=True)


def test_annex_xi_has_an_answer_or_a_gap_for_each_item(whole_world: Any) -> None:
    card = card_of(whole_world)
    numbers = [(s["section"], item["number"]) for s in items() for item in s["items"]]
    assert numbers == [("1", f"1({c})") for c in "abcdef"] + [("1", f"2({c})") for c in "abcde"] + [
        ("2", n) for n in "123"]
    said, text = answers_of(card), annex_xi(card)
    assert said["licence"] == "apache-2.0 (stated)" and said["tasks"] == ""
    assert text.count("**1(a) Tasks") == 1 and ".** not known" in text
    assert "estimated" in said["energy"] and "computed" in said["compute"] and "mmlu.v1 acc 0.75" in text


def test_hostile_names_stay_names(world: Any) -> None:
    scores = json.loads((world.root / "scores.json").read_text())
    scores["tasks"] = {HOSTILE: scores["tasks"]["mmlu.v1"] | {"mode": HOSTILE, "failed": HOSTILE}}
    said = CardAnswers(name=HOSTILE, description=HOSTILE, licence=HOSTILE, base_model=(HOSTILE,),
                       tags=(HOSTILE,),
                       intended_use=HOSTILE, region="\ud800", intensity_g_per_kwh=1.0, power_w=1.0)
    card = card_of(world, said, scores)
    for text in (model_card(card), annex_xi(card)):
        body = text.split("\n---\n", 1)[1] if text.startswith("---") else text
        assert "<script" not in body and "\x1b" not in text and "\n# Title" not in text
        assert not re.search(r"(?<!\\)\]\(j", body)
        text.encode("utf-8", "replace")
    assert ModelCard(model_card(card)).data.license == "other"
    assert json.loads(json.dumps(card_json(card)))["name"] == HOSTILE


def test_the_picture_is_one_file_of_sound_xml_that_loads_nothing() -> None:
    graph = Graph()
    for i in range(MAX_ROWS + 9):
        graph.add(Node(f"raw {i}", "raw", f"{HOSTILE}{i}\ud800\x00", "ab" * 32))
        graph.join(f"raw {i}", "run", "x")
    graph.add(Node("run", "run", "long name " * 9, is_proven=False))
    drawn = picture(graph)
    root = ElementTree.fromstring(drawn.encode())
    assert {element.tag.rpartition("}")[2] for element in root.iter()} == {
        "svg", "title", "rect", "path", "g", "text"}
    assert not re.search(r"href|url\(|<script|onload", drawn) and "and 10 more" in drawn
    boxes = [r for r in root.iter() if r.tag.endswith("rect") and r.get("rx")]
    places = {(int(r.get("x") or 0), int(r.get("y") or 0)) for r in boxes}
    assert len(boxes) == len(places) == MAX_ROWS + 1, "no box lies on another"
    assert "stroke-dasharray" in drawn


@pytest.mark.parametrize(("value", "unit", "said"), [
    (None, "", "not known"), (True, "", "yes"), ([1, 2], "", "1, 2"), ("x", "", "x"), (1234, "", "1,234"),
    (90.0, "s", "1 min 30 s"), (1.5e6, "B", "1.5 MB"), (2e21, "FLOP", "2e+21 FLOP"),
    (2500.0, "g", "2.5 kg CO2 eq"), (0.5, "kWh", "0.5 kWh")])
def test_quantities_have_their_units(value: Any, unit: str, said: str) -> None:
    assert quantity(Figure(value, "recorded", unit=unit)) == said


def test_hashes_of_score_files_are_those_of_their_bytes(whole_world: Any) -> None:
    file = whole_world.root / "scores.json"
    found = lineage([whole_world.sft])
    card = make_card(found, None, [ScoreFile(str(file), file.name, sha256_file(file),
                                             json.loads(file.read_text()))], CardAnswers())
    assert {"of": file.name, "file": file.name, "sha256": sha256_file(file)} in card["read"]
