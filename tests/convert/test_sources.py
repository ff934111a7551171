"""Folders whose tensors or config are not exactly those of a supported model are refused by name."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sov import convert
from megatron_sov.base.artifacts import MANIFEST, FileRecord, file_damage, new_artifact
from megatron_sov.base.errors import UserError
from megatron_sov.convert import hf_import
from megatron_sov.convert.hf_import import checked_source
from megatron_sov.work.progress.resumable import ResumableArtifact


def copy_with(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def set_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def refused(hf_dir: Path, tmp_path: Path) -> str:
    with pytest.raises(UserError) as e:
        convert.from_hf(hf_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    return str(e.value)


def test_a_prediction_layer_is_refused_where_the_family_has_none(solar_dir: Path, tmp_path: Path) -> None:
    bad = copy_with(solar_dir, tmp_path / "bad", lambda t: t.update({"mtp.norm.weight": torch.ones(32)}))
    assert "unexpected (mtp.norm.weight)" in refused(bad, tmp_path)


def test_prediction_layer_is_found_by_its_tensors_where_the_config_is_silent(exaone_dir: Path,
                                                                             tmp_path: Path) -> None:
    shutil.copytree(exaone_dir, tmp_path / "silent")
    set_config(tmp_path / "silent", num_nextn_predict_layers=None)
    assert convert.open_weights(tmp_path / "silent").model.num_mtp_layers == 1


@pytest.mark.parametrize(("fields", "expected"), [
    ({"swiglu_limits": [7.0] * 4}, "swiglu_limits = .* for each of num_hidden_layers = 5 layers"),
    ({"attention_chunk_size": 3}, r"attention_chunk_size = 3 \(transformers reads it, and it is not supported"),
    ({"n_group": 3}, "model.num_expert_groups = 3 must divide model.num_experts = "),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu', but only 'silu'"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings = True"),
    ({"layer_types": ["full_attention"]}, "layer_types must name"),
    ({"mlp_layer_types": ["sparse", "dense"] + ["sparse"] * 3, "first_k_dense_replace": None},
     "must name dense layers first"),
    ({"first_k_dense_replace": 2}, "mlp_layer_types and first_k_dense_replace disagree"),
    ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "rope_type = 'dynamic'"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "lacks 'original_max_position_embeddings'"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
     "rope_parameters = .* and rope_scaling = .* disagree"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "factor": 2.0}},
     "rope parameters factor are unknown"),
    ({"hidden_size": "wide"}, r'model\.hidden_size = "wide"'),
    ({"model_type": "exaone_mo"}, r"did you mean 'exaone_moe'\?"),
    ({"architectures": ["ExaoneForCausalLM"]}, "make them agree"),
])
def test_config_fields_that_we_would_not_honour_are_refused(exaone_dir: Path, tmp_path: Path, fields,
                                                            expected: str) -> None:
    shutil.copytree(exaone_dir, tmp_path / "bad")
    set_config(tmp_path / "bad", **fields)
    with pytest.raises(UserError, match=expected):
        convert.from_hf(tmp_path / "bad", tmp_path / "out")


def test_fields_that_transformers_ignores_are_refused_unless_harmless(solar_dir: Path,
                                                                      tmp_path: Path) -> None:
    shutil.copytree(solar_dir, tmp_path / "hf")
    set_config(tmp_path / "hf", first_k_dense_replace=0, intermediate_size=10240, partial_rotary_factor=1.0,
               rope_scaling=None)
    assert convert.open_weights(tmp_path / "hf").model.num_dense_layers == 0
    set_config(tmp_path / "hf", first_k_dense_replace=1)
    assert "first_k_dense_replace = 1, but only 0" in refused(tmp_path / "hf", tmp_path)


def test_folders_that_are_no_models(solar_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "is empty, so it is not a Hugging Face folder" in refused(tmp_path / "empty", tmp_path)
    shutil.copytree(solar_dir, tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "pickled/pytorch_model.bin").write_bytes(b"")
    assert "it is no archive of torch.save" in refused(tmp_path / "pickled", tmp_path)


# The source's hashes are computed beside the conversion, and what comes of a damaged file never counts.


class Folder:
    """Weights of which the files `a` and `b` hold one tensor each, `A` and `B`."""

    def __init__(self, path: Path) -> None:
        self.path: Any = path
        self.model: Any = None
        self.links: Any = []

    def held_in(self, file: str) -> list[str]:
        return [file.upper()] if file in ("a", "b") else []

    def files_of(self, name: str) -> set[str]:
        return {name.lower()}

    def names(self) -> Any: ...
    def dtype(self, name: str) -> Any: ...
    def read(self, name: str) -> Any: ...


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    with new_artifact(tmp_path / "weights", "hf_model") as artifact:
        artifact.content = {"parts": ["model", "optimizer"]}
        (artifact.path / "optimizer").mkdir()
        for name in ("a", "b", "optimizer/o"):
            (artifact.path / name).write_text(name)
    return Folder(tmp_path / "weights")


def test_what_is_inside_does_not_wait_for_the_hashes(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = threading.Event()

    def later(file: Path, record: FileRecord) -> str | None:
        assert begun.wait(600)
        return file_damage(file, record)

    monkeypatch.setattr(hf_import, "file_damage", later)
    with checked_source(folder, workers=1) as check:
        begun.set()
        check.require(["A"])


def test_only_what_was_made_of_damaged_files_is_refused(folder: Folder) -> None:
    (folder.path / "b").write_text("B")
    with (pytest.raises(UserError, match=r"b: its content differs .*\(it holds B\); copy or download it"),
          checked_source(folder, workers=2) as check):
        check.require(["A"])
        with pytest.raises(UserError, match="b: its content differs"):
            check.require(["A", "B"])


def test_damage_explains_what_else_goes_wrong(folder: Folder) -> None:
    with pytest.raises(ZeroDivisionError), checked_source(folder, workers=2):
        raise ZeroDivisionError
    (folder.path / "a").unlink()
    with pytest.raises(UserError, match="a: is missing"), checked_source(folder, workers=2):
        raise ZeroDivisionError


def test_other_parts_and_folders_without_a_manifest_are_not_looked_at(folder: Folder) -> None:
    (folder.path / "optimizer/o").write_text("?")
    with checked_source(folder, workers=1):
        pass
    (folder.path / MANIFEST).unlink()
    (folder.path / "a").unlink()
    with checked_source(folder, workers=1) as check:
        check.require(["A"])


def test_an_export_counts_a_file_only_when_what_it_was_made_of_is_whole(
        solar_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, counted, too_early = threading.Event(), threading.Event(), list[bool]()

    def after_the_writing(file: Path, record: FileRecord) -> str | None:
        if file.suffix == ".safetensors":
            assert written.wait(600)
            too_early.append(counted.wait(0.1))
        return file_damage(file, record)

    def write(*arguments: Any, now: Any = hf_import.write_file) -> FileRecord:
        record: FileRecord = now(*arguments)
        written.set()
        return record

    def finish(*arguments: Any, now: Any = ResumableArtifact.finish) -> None:
        counted.set()
        now(*arguments)

    convert.from_hf(solar_dir, tmp_path / "ckpt")
    monkeypatch.setattr(hf_import, "file_damage", after_the_writing)
    monkeypatch.setattr(hf_import, "write_file", write)
    monkeypatch.setattr(ResumableArtifact, "finish", finish)
    convert.to_hf(tmp_path / "ckpt", tmp_path / "hf")
    assert counted.is_set() and too_early == [False]
