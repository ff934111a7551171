"""The card's content: each figure comes from a file that it names, and a changed file changes the card."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.base import command_line
from megatron_sov.base.artifacts import manifest_sha256, sha256_file
from megatron_sov.base.errors import UserError
from megatron_sov.publish.card.content import ScoreFile, card_json, make_card
from megatron_sov.publish.card.data_summary import add_data, data_card
from megatron_sov.publish.card.lineage import lineage
from megatron_sov.publish.card.model_card import model_card
from megatron_sov.publish.card.run_record import CardAnswers, read_answers
from tests.publish.card.conftest import write_run


def card_of(world: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Path]]:
    """Return card and graph of a world, and where each thing that they name lies."""
    found = lineage([world.sft], hf_folder=world.hf)
    data = data_card(found.data, [], None) if found.data else None
    if data is not None:
        add_data(found.graph, data)
    file = world.root / "scores.json"
    scores = [ScoreFile(str(file), file.name, sha256_file(file), json.loads(file.read_text()))]
    answers = world.root / "answers.yaml"
    card = make_card(found, data, scores, read_answers(answers), sha256_file(answers))
    if data is not None:
        (world.root / "data-card.json").write_bytes(data.files["card.json"])
    places = {**found.places, "data": world.root / "data-card.json",
              "answers": answers, file.name: file}
    return card_json(card), found.graph.as_json(), places


def figures(value: Any, way: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the figures of card.json, and fail on a number that is none."""
    if isinstance(value, dict) and "basis" in value:
        yield way, value
    elif isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from figures(item, f"{way}.{key}")
    else:
        assert isinstance(value, (str, type(None))) or way == ".version", f"{way} = {value} is a bare number"


def values_at(value: Any, key: str) -> list[Any]:
    """Return what stands in JSON at a way such as `content.sources[0].name`; names may have dots in them."""
    if not key:
        return [value]
    if found := re.match(r"\[(\d+)\]\.?(.*)", key):
        return values_at(value[int(found[1])], found[2])
    names = [name for name in value if key == name or key.startswith((f"{name}.", f"{name}["))]
    name = max(names, key=len)
    return values_at(value[name], key[len(name):].removeprefix("."))


def looked_up(place: Path, file: str, key: str) -> list[Any]:
    """Return what stands in a file of the history at the key that a figure names."""
    path = place / file if place.is_dir() else place
    if path.suffix == ".yaml":
        import yaml
        return values_at(yaml.safe_load(path.read_text()), key)
    if path.name != "events.jsonl":
        return values_at(json.loads(path.read_text()), key)
    named = re.fullmatch(r"([*\w]+)\[(\d+|\*)\]\.?(.*)", key)
    assert named is not None, key
    kind, index, way = named.groups()
    events = [e for e in map(json.loads, path.read_text().splitlines()) if kind in ("*", e["event"])]
    chosen = events if index == "*" else [events[int(index)]]
    return [value for event in chosen if way.partition(".")[0] in event or not way
            for value in values_at(event, way)]


def test_an_adapter_and_a_dense_model_say_so(world: Any) -> None:
    run = world.root / "lora"
    write_run(run, [world.chat, world.pretrain / "checkpoints/step-4"], "lora.rank=4", "lora.dora=true",
              "model.num_experts=0", objective="sft")
    card = make_card(lineage([run]), None, [], CardAnswers())
    model = card["model"]
    assert {name: model[name].value for name in ("adapter", "adapter_rank", "base")} == {
        "adapter": "DoRA", "adapter_rank": 4, "base": "pretrain/step-4"}
    assert not [name for name in model if "experts" in name]
    assert re.search(r"adapter rank *\| *4", model_card(card))
    whole = make_card(lineage([world.pretrain]), None, [], CardAnswers())["model"]
    assert whole["num_experts_per_token"].value and "adapter" not in whole


def test_every_figure_stands_where_it_says(whole_world: Any) -> None:
    card, _, places = card_of(whole_world)
    read = {(one["of"], one["file"]): one["sha256"] for one in card["read"]}
    seen = list(figures(card))
    assert len(seen) > 100 and {figure["basis"] for _, figure in seen} == {
        "recorded", "measured", "counted", "computed", "estimated", "stated", "unknown"}
    for way, figure in seen:
        assert figure["basis"] == "unknown" or figure["from"], way
        assert figure["value"] is not None or (figure["basis"] == "unknown" and figure["how"]), way
        for origin in figure["from"]:
            place = places[origin["of"]]
            path = place / origin["file"] if place.is_dir() else place
            assert read[origin["of"], origin["file"]] == sha256_file(path), way
            found = looked_up(place, origin["file"], origin["key"])
            if figure["basis"] in ("recorded", "stated"):
                assert found == [figure["value"]], way
            elif figure["basis"] == "counted":
                assert len(found) >= figure["value"] > 0, way
            else:
                assert found, way


def remake(folder: Path, changed: Callable[..., None]) -> None:
    changed(folder, content={"changed": 1})


CHANGES: dict[str, Callable[[Any, Callable[..., None]], None]] = {
    "corpus": lambda w, changed: remake(w.corpus, changed),
    "tokenizer": lambda w, changed: remake(w.tokenizer, changed),
    "text": lambda w, changed: remake(w.text, changed), "chat": lambda w, changed: remake(w.chat, changed),
    "first checkpoint": lambda w, changed: remake(w.pretrain / "checkpoints/step-4", changed),
    "last checkpoint": lambda w, changed: remake(w.sft / "checkpoints/step-4", changed),
    "export": lambda w, changed: changed(w.hf, content={"num_tensors": 8}),
    "settings": lambda w, _: put(w.sft / "config.json", '"lr": 0.004', '"lr": 0.003'),
    "first settings": lambda w, _: put(w.pretrain / "config.json", '"precision": "fp32"',
                                       '"precision": "bf16"'),
    "end": lambda w, _: put(w.sft / "complete.json", '"tokens": 4000', '"tokens": 4001'),
    "first end": lambda w, _: put(w.pretrain / "complete.json", '"wall_s": 9.0', '"wall_s": 8.0'),
    "events": lambda w, _: put(w.sft / "events.jsonl", '"num_params": 5000', '"num_params": 5001'),
    "first events": lambda w, _: put(w.pretrain / "events.jsonl", '"tokens": 4000', '"tokens": 4001'),
    "raw files": lambda w, _: put(w.corpus / "inputs/web.json", "abab", "abac"),
    "scores": lambda w, _: put(w.root / "scores.json", "0.9375", "0.9365"),
    "answers": lambda w, _: put(w.root / "answers.yaml", "lab@", "team@"),
}


def put(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text, file
    file.write_text(text.replace(old, new))


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_of_any_file_changes_the_card_or_is_refused(
        what: str, world: Any, whole_world: Any, changed: Callable[..., None]) -> None:
    def told(of: Any) -> tuple[Any, ...] | str:
        try:
            card, graph, _ = card_of(of)
        except UserError as e:
            return str(e).replace(str(of.root), "")
        return ({name: part for name, part in card.items() if name != "read"},
                {(n["kind"], n["name"], n["sha256"] if n["kind"] == "raw" else "") for n in graph["nodes"]})

    before = told(world)
    CHANGES[what](world, changed)
    assert told(world) != before


def test_a_file_that_its_own_manifest_does_not_vouch_for_is_refused(world: Any) -> None:
    put(world.text / "manifest.json", '"num_tokens": 40', '"num_tokens": 41')
    card, _, _ = card_of(world)  # which is not the one that the run has read
    assert any("tokens 'text'" in s and "no longer the same" in s for s in card["not_known"])
    put(world.sft / "checkpoints/step-4/manifest.json", '"step": 4', '"step": 5')
    with pytest.raises(UserError, match="is not the checkpoint that "):
        card_of(world)


def test_the_graph_goes_from_raw_files_to_exported_tensors(whole_world: Any) -> None:
    _, graph, _ = card_of(whole_world)
    made_from: dict[str, list[str]] = {}
    for edge in graph["edges"]:
        made_from.setdefault(edge["to"], []).append(edge["from"])
    kinds = {node["id"]: (node["kind"], node["name"]) for node in graph["nodes"]}

    def way(node: str, kind: str) -> list[str] | None:
        if kinds[node][0] == kind:
            return [kinds[node][0]]
        return next(([*before, kinds[node][0]] for source in made_from.get(node, [])
                     if (before := way(source, kind)) is not None), None)

    export = manifest_sha256(whole_world.hf)
    assert way(export, "raw") is not None and way(export, "tokenizer") is not None
    web = next(node for node, (kind, name) in kinds.items() if (kind, name) == ("raw", "files of web"))
    reached = {web}
    for node in (n["id"] for n in graph["nodes"]):  # causes stand before effects
        if reached & set(made_from.get(node, [])):
            reached.add(node)
    assert [kinds[n["id"]] for n in graph["nodes"] if n["id"] in reached] == [
        ("raw", "files of web"), ("source", "web"), ("step", "language"), ("corpus", "corpus"),
        ("tokens", "text"), ("run", "pretrain"), ("checkpoint", "pretrain/step-4"), ("run", "sft"),
        ("checkpoint", "sft/step-4"), ("hf_model", "hf")]
    hashes = [node for node in graph["nodes"]
              if node["kind"] in ("corpus", "tokens", "checkpoint", "hf_model")]
    folders = [whole_world.corpus, whole_world.text, whole_world.chat, whole_world.hf,
               whole_world.pretrain / "checkpoints/step-4", whole_world.sft / "checkpoints/step-4"]
    assert {node["sha256"] for node in hashes} == set(map(manifest_sha256, folders))


def test_what_nobody_recorded_is_named_with_the_way_to_add_it(world: Any) -> None:
    (world.root / "answers.yaml").write_text("")
    card, _, _ = card_of(world)
    told = "\n".join(card["not_known"])
    for said in ("licence of the weights; state `licence` in --answers",
                 "licence of source 'books'; add it as `licence` in the pipeline's file",
                 "energy of run sft", "intensity_g_per_kwh in --answers", "contact; state `contact`",
                 "acc_norm of task mmlu.v1: no item", "tokens 'chat': the manifest names no corpus"):
        assert said in told
    assert card["compute"]["energy_kwh"]["value"] is None and card["licence"]["value"] is None


def test_places_and_names_of_machines_stay_out(whole_world: Any) -> None:
    card, graph, _ = card_of(whole_world)
    text = json.dumps([card, graph])
    assert str(whole_world.root) not in text and "secret-host" not in text and "/home/me" not in text


def test_scores_of_another_model_are_refused(world: Any) -> None:
    for other, said in ((world.pretrain / "checkpoints/step-4", "'pretrain/step-4', an earlier stage"),
                        (world.text, "tokens 'text', an earlier stage")):
        put(world.root / "scores.json", json.loads((world.root / "scores.json").read_text())["model"]["hash"],
            manifest_sha256(other))
        with pytest.raises(UserError, match=said):
            card_of(world)


def test_without_data_or_answers_a_card_says_so(world: Any) -> None:
    found = lineage([world.sft])
    card = card_json(make_card(found, None, [], CardAnswers()))
    assert card["data"] is None and card["scores"] == []
    assert any("data that the model learned from" in s for s in card["not_known"])
    assert "No benchmark was measured." in card["limits"]


@pytest.mark.parametrize("text", ["pue: !!int ''", "release_date: !!timestamp soon", "pue: !!bool x"])
def test_answers_that_yaml_falls_over_are_told_in_a_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "answers.yaml").write_text(text)
    with pytest.raises(UserError, match=r"answers\.yaml, line 1: .* is no plain value"):
        read_answers(tmp_path / "answers.yaml")


def test_the_card_of_data_wants_the_part_that_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_line, "is_installed", lambda module: not module.startswith("data_prep"))
    with pytest.raises(UserError, match="needs the part 'data'"):
        data_card([], [], None)
