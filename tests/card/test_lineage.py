"""From a run back to everything: by hash, wherever it lies now; loops and strangers are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_sov.artifacts import manifest_sha256, read_manifest
from megatron_sov.card.graph import Graph, Node
from megatron_sov.card.lineage import lineage
from megatron_sov.errors import UserError


def test_runs_are_followed_by_the_checkpoint_that_they_started_from(whole_world: Any) -> None:
    found = lineage([whole_world.sft])
    assert [run.name for run in found.runs] == ["pretrain", "sft"]
    assert found.model == manifest_sha256(whole_world.sft / "checkpoints/step-4")
    assert set(found.data) == {whole_world.text, whole_world.chat} and not found.unknown


def test_what_was_moved_is_found_beside_or_where_the_user_says(world: Any) -> None:
    moved = world.root.with_name("moved")
    shutil.move(world.root, moved)
    assert [run.name for run in lineage([moved / "sft"]).runs] == ["pretrain", "sft"]
    (moved / "far").mkdir()
    shutil.move(moved / "pretrain", moved / "far/first")
    lost = lineage([moved / "sft"])
    assert [run.name for run in lost.runs] == ["sft"]
    assert [n.name for n in lost.graph.nodes.values() if not n.is_proven] == ["pretrain/step-4"]
    again = lineage([moved / "sft"], [moved / "far/first"])
    assert [run.name for run in again.runs] == ["first", "sft"]


def test_a_checkpoint_that_is_gone_is_known_by_what_its_run_ended_with(world: Any) -> None:
    shutil.rmtree(world.pretrain / "checkpoints/step-4")
    found = lineage([world.sft])
    assert [run.name for run in found.runs] == ["pretrain", "sft"] and not found.unknown
    (world.pretrain / "complete.json").unlink()
    assert "only its path says" in lineage([world.sft]).unknown[0]


def test_runs_of_earlier_versions_are_joined_by_hand(world: Any) -> None:
    file = world.sft / "events.jsonl"
    events = [json.loads(line) for line in file.read_text().splitlines()]
    for event in events:
        if "inputs" in event:
            event["inputs"] = event["inputs"][:1]
    file.write_text("".join(json.dumps(event) + "\n" for event in events))
    assert [run.name for run in lineage([world.sft]).runs] == ["sft"]
    found = lineage([world.pretrain, world.sft])
    assert [run.name for run in found.runs] == ["pretrain", "sft"]
    assert [e.told_by for e in found.graph.edges.values() if e.target == "run sft"][-1] == "the command line"


def test_a_loop_ends_in_a_sentence(world: Any) -> None:
    file = world.pretrain / "events.jsonl"
    events = [json.loads(line) for line in file.read_text().splitlines()]
    last = world.sft / "checkpoints/step-4"
    events[0]["inputs"].append({"kind": "checkpoint", "path": str(last),
                                "manifest_sha256": manifest_sha256(last)})
    file.write_text("".join(json.dumps(event) + "\n" for event in events))
    with pytest.raises(UserError, match="is made from itself, which no true manifest says"):
        lineage([world.sft])


def test_hostile_inputs_are_passed_over_or_named(world: Any, changed: Callable[..., None]) -> None:
    file = world.sft / "events.jsonl"
    first, *rest = file.read_text().splitlines()
    event = json.loads(first)
    event["inputs"] += [1, {"kind": "tokens"}, {"kind": 3, "path": "x", "manifest_sha256": "y"},
                        {"kind": "tokens", "path": "\0/x", "manifest_sha256": "z"},
                        {"kind": "checkpoint", "path": "/" + "a/" * 3000, "manifest_sha256": "v"}]
    file.write_text("\n".join([json.dumps(event), *rest]))
    names = [n.sha256 for n in lineage([world.sft]).graph.nodes.values() if not n.is_proven]
    assert names == ["z", "v"]
    changed(world.hf, inputs=[*read_manifest(world.hf).inputs, {"kind": "checkpoint"}])
    with pytest.raises(UserError, match="an input without kind, path or hash"):
        lineage([world.sft], hf_folder=world.hf)


def test_folders_that_are_none_of_it_are_refused(world: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused: list[tuple[tuple[Any, ...], str]] = [
            (([tmp_path / "empty"],), "empty: is empty, so it is not a run; pass the folder given to --run"),
            (([world.sft], [tmp_path / "empty"]), "--from .*: is neither a run nor an artifact"),
            (([world.pretrain], [], world.hf), "--hf-folder .*: was not made from a checkpoint of"),
            (([world.sft], [], world.text), "--hf-folder .*: was not made from a checkpoint of")]
    for arguments, said in refused:
        with pytest.raises(UserError, match=said):
            lineage(*arguments)


def test_a_graph_has_a_limit_and_an_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_sov.card.graph.MAX_NODES", 3)
    graph = Graph()
    for name in "cab":
        assert graph.add(Node(name, "raw", name, is_proven=False))
    assert not graph.add(Node("a", "raw", "seen"))
    graph.join("a", "b", "x")
    graph.join("b", "c", "x")
    assert [node.name for node in graph.order()] == ["seen", "b", "c"]
    assert graph.ancestors(["b"]) == {"a", "b"}
    with pytest.raises(UserError, match="more than 3 things"):
        graph.add(Node("d", "raw", "d"))
