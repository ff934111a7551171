"""Folders whose tensors or config do not match a supported model are rejected by name."""

import json
import re
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

from megatron_sov import convert
from megatron_sov.base.artifacts import MANIFEST, FileRecord, create_artifact, find_file_damage, read_manifest
from megatron_sov.base.errors import UserError
from megatron_sov.checkpoint.stored_tensors import StoredBlock, StoredTensors
from megatron_sov.cli import main
from megatron_sov.commands.models import convert_run
from megatron_sov.convert import hf_import
from megatron_sov.convert.hf_import import verify_source
from megatron_sov.convert.sources import CheckpointWeights
from megatron_sov.model.families.weights import Link
from megatron_sov.model.pretrained import load_pretrained
from megatron_sov.work.progress.resumable import ResumableArtifact
from tests.convert.hf_folders import check_refused, edit_tensors, round_trip, save_tensors, set_config


def test_prediction_layer_of_another_family_is_rejected(solar_dir: Path, tmp_path: Path) -> None:
    bad = edit_tensors(shutil.copytree(solar_dir, tmp_path / "bad"),
                       lambda t: t.update({"mtp.norm.weight": torch.ones(32)}))
    check_refused(bad, r"unexpected \(mtp\.norm\.weight\)")


def test_prediction_layer_is_detected_without_config_field(exaone_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(exaone_dir, tmp_path / "silent")
    set_config(tmp_path / "silent", num_nextn_predict_layers=None)
    assert convert.open_weights(tmp_path / "silent").model.num_mtp_layers == 1


@pytest.mark.each(("fields", "expected"), [
    ({"swiglu_limits": [7.0] * 4}, "swiglu_limits = .* for each of num_hidden_layers = 5 layers"),
    ({"attention_chunk_size": 3}, r"attention_chunk_size = 3 \(read by transformers, but not supported"),
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
def test_unsupported_config_fields_are_rejected(exaone_dir: Path, tmp_path: Path, fields,
                                                expected: str) -> None:
    shutil.copytree(exaone_dir, tmp_path / "bad")
    set_config(tmp_path / "bad", **fields)
    check_refused(tmp_path / "bad", expected)


def test_ignored_fields_are_rejected_unless_harmless(solar_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(solar_dir, tmp_path / "hf")
    set_config(tmp_path / "hf", first_k_dense_replace=0, intermediate_size=10240, partial_rotary_factor=1.0,
               rope_scaling=None)
    assert convert.open_weights(tmp_path / "hf").model.num_dense_layers == 0
    set_config(tmp_path / "hf", first_k_dense_replace=1)
    check_refused(tmp_path / "hf", "first_k_dense_replace = 1, but only 0")


def test_folders_without_a_model_are_rejected(solar_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    check_refused(tmp_path / "empty", "is empty, so it is not a Hugging Face folder")
    shutil.copytree(solar_dir, tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "pickled/pytorch_model.bin").write_bytes(b"")
    check_refused(tmp_path / "pickled", "is a pickle, and pickles can run code")


# Unused tensors of older programs, tied heads, and the advice in messages.

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tiny_folder(folder: Path, model_type: str = "llama", **config: Any) -> Path:
    """Write a random model of two layers as transformers does."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "intermediate_size": 24, "head_dim": 8, "max_position_embeddings": 64,
             "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes | config))
    model.save_pretrained(folder)
    return folder


def compute_logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        found: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder)(torch.arange(60)[None]).logits
    return found


@pytest.mark.parametrize("name", [
    "model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.cos_cached",
    "model.layers.1.self_attn.rotary_emb.sin_cached", "model.rotary_emb.inv_freq",
    "model.rotary_emb.original_inv_freq", "rope.freqs", "model.layers.0.attention.masked_bias",
    "model.layers.0.attn.bias", "model.layers.0.self_attn.masked_bias"])
def test_recomputed_tensors_are_not_converted(name: str, tmp_path: Path,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_folder(tmp_path / "hf")
    expected = load_file(folder / "model.safetensors")
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.ones(4)}))
    back = round_trip(folder, tmp_path)
    error = capsys.readouterr().err
    assert error.count("warning") == 1
    assert f"tensors that are not converted: {name} (programs compute" in error
    file = load_file(back / "model.safetensors")
    assert file.keys() == expected.keys() and all(torch.equal(file[key], expected[key]) for key in file)
    load_pretrained(AutoModelForCausalLM, folder)  # as commands that run a folder by transformers do


@pytest.mark.each("name", [
    "model.layers.0.self_attn.q_proj.bias", "model.layers.0.mlp.bias", "bias", "model.layers.0.attn.weight",
    "model.rotary_emb.inv_freq.weight", "model.layers.2.input_layernorm.weight"])
def test_unexpected_tensors_are_rejected_until_removed(name: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "hf")
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.ones(16)}))
    check_refused(folder, r"correct config\.json, or remove the unexpected tensors if no program reads them")
    edit_tensors(folder, lambda tensors: tensors.pop(name))
    convert.from_hf(folder, tmp_path / "out")


def test_advice_for_missing_tensors_and_sizes_works(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "hf", tie_word_embeddings=False)
    whole = load_file(folder / "model.safetensors")
    edit_tensors(folder, lambda tensors: tensors.pop(HEAD))
    check_refused(folder, r"correct config\.json if the model has no such tensors, "
                          "otherwise copy or download it")
    set_config(folder, tie_word_embeddings=True)
    convert.from_hf(folder, tmp_path / "tied")
    set_config(folder, tie_word_embeddings=False)
    save_tensors(folder, whole)
    convert.from_hf(folder, tmp_path / "again")
    set_config(folder, intermediate_size=25)
    check_refused(folder, r"(?s)^(?!.*download).*correct the sizes in config\.json")


def test_equal_tied_head_is_not_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_folder(tmp_path / "hf", tie_word_embeddings=True)
    expected = load_file(folder / "model.safetensors")
    edit_tensors(folder, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    back = round_trip(folder, tmp_path)
    assert f"not converted: {HEAD} (config.json ties it to {EMBEDDING}, which" in capsys.readouterr().err
    assert load_file(back / "model.safetensors").keys() == expected.keys()
    assert torch.equal(compute_logits(back), compute_logits(folder))


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_different_tied_head_is_converted_as_in_transformers(model_type: str, tmp_path: Path,
                                                             capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_folder(tmp_path / "hf", model_type, tie_word_embeddings=True)
    tied = compute_logits(folder)
    edit_tensors(folder, lambda tensors: tensors.update({HEAD: torch.randn(64, 16)}))
    back = round_trip(folder, tmp_path)
    assert f"{HEAD} and {EMBEDDING} differ, and config.json says that they" in capsys.readouterr().err
    assert json.loads((back / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(compute_logits(back), compute_logits(folder))
    assert not torch.equal(compute_logits(folder), tied)
    # the advice
    set_config(folder, tie_word_embeddings=False)
    convert.from_hf(folder, tmp_path / "untied")
    assert convert.verify(tmp_path / "ckpt", tmp_path / "untied").passed
    assert "differ" not in capsys.readouterr().err


def test_tied_head_with_one_changed_bit_is_converted(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "hf", tie_word_embeddings=True)

    def copy_but_one(tensors: dict[str, torch.Tensor]) -> None:
        tensors[HEAD] = tensors[EMBEDDING].clone()
        tensors[HEAD].view(torch.int32)[63, 15] ^= 1

    assert not convert.open_weights(edit_tensors(folder, copy_but_one)).model.tied_embeddings


def test_lone_tied_head_is_the_embedding(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "hf", tie_word_embeddings=True)
    expected = compute_logits(folder)
    edit_tensors(folder, lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}))
    assert torch.equal(compute_logits(folder), expected)
    assert torch.equal(compute_logits(round_trip(folder, tmp_path)), expected)


@pytest.mark.parametrize("tied", [True, False])
def test_index_may_list_a_missing_tied_head(tied: bool, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "hf", tie_word_embeddings=True)
    names = [*load_file(folder / "model.safetensors"), HEAD]
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(
        {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}))
    set_config(folder, tie_word_embeddings=tied)
    if tied:
        assert torch.equal(compute_logits(round_trip(folder, tmp_path)), compute_logits(folder))
    else:
        check_refused(folder, re.escape(f"1 missing ({HEAD})"))
    (folder / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": dict.fromkeys([*names, "model.gone"], "model-00001-of-00001.safetensors")}))
    check_refused(folder, r"disagrees with the files about model\.gone")


def test_ignored_fields_are_warned_about_and_exported(tmp_path: Path,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_folder(tmp_path / "hf", pretraining_tp=2)
    fields = {"unsloth_fixed": True, "transformers.js_config": {"kv": [1]}, "num_hidden_layer": 3,
              "nothing": None}
    set_config(folder, **fields)
    back = round_trip(folder, tmp_path)
    error = capsys.readouterr().err
    assert error.count("warning") == 1 and (
        "config.json: fields without effect on the computation, which to-hf writes unchanged: unsloth_fixed, "
        "transformers.js_config, num_hidden_layer (did you mean 'num_hidden_layers'?)\n") in error
    set_fields = {name: value for name, value in fields.items() if value is not None}
    recorded = read_manifest(tmp_path / "ckpt").content["config_fields"]
    assert recorded == set_fields | {"pretraining_tp": 2}
    assert recorded.items() <= json.loads((back / "config.json").read_text()).items()
    # a second time, from the converted folder
    convert.from_hf(back, tmp_path / "second")
    assert read_manifest(tmp_path / "second").content["config_fields"] == recorded


def import_with_unknown_field(tmp_path: Path, *options: str) -> int:
    folder = tiny_folder(tmp_path / "hf")
    set_config(folder, unsloth_fixed=True)
    return main(["convert", "from-hf", str(folder), str(tmp_path / "ckpt"), *options])


@pytest.mark.parametrize(("options", "code", "expected", "message"), [
    ((), 0, 0, ""), ((), 3, 3, ""), (("--no-verify",), None, 0, ""),
    ((), 2, 0, "ckpt: was not compared with transformers (see above); if the model runs elsewhere, type "
               "`megatron-sov convert verify ")])
def test_import_with_a_warning_is_verified(
        options: tuple[str, ...], code: int | None, expected: int, message: str, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run = Mock(return_value=code)
    monkeypatch.setattr(convert_run, "run_command", run)
    assert import_with_unknown_field(tmp_path, *options) == expected
    assert message in capsys.readouterr().err
    expected_words = ["megatron_sov", "convert", "verify", str(tmp_path / "ckpt"), str(tmp_path / "hf")]
    assert [call.args[0] for call in run.call_args_list] == ([] if code is None else [expected_words])


@pytest.mark.deep
def test_verification_after_an_import_runs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert import_with_unknown_field(tmp_path) == 0
    assert "verified: the same model" in capfd.readouterr().out


def test_a_block_is_read_once_for_all_its_tensors(imported: dict[str, Path],
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    weights, blocks = CheckpointWeights(imported["solar_open"]), list[Link]()
    read = weights.read_block
    monkeypatch.setattr(weights, "read_block", lambda link: blocks.append(link) or read(link))
    for name in weights.list_names():
        weights.read(name)
    assert blocks == weights.links


# Source hashes are computed during conversion, and results from a damaged file never count.


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    """Weights in two files, `a` and `b`, with one tensor each, `A` and `B`."""
    with create_artifact(tmp_path / "weights", "hf_model") as artifact:
        artifact.content = {"parts": ["model", "optimizer"]}
        (artifact.path / "optimizer").mkdir()
        for name in ("a", "b", "optimizer/o"):
            (artifact.path / name).write_text(name)
    return SimpleNamespace(path=tmp_path / "weights", list_files=lambda name: {name.lower()},
                           list_keys_in=lambda file: [file.upper()] if file in ("a", "b") else [])


def test_conversion_runs_while_sources_are_hashed(folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = threading.Event()

    def later(file: Path, record: FileRecord) -> str | None:
        assert begun.wait(600)
        return find_file_damage(file, record)

    monkeypatch.setattr(hf_import, "find_file_damage", later)
    with verify_source(folder, workers=1) as wait_for:
        begun.set()
        wait_for(["A"])


def test_verification_rejects_only_damaged_files(folder: Any) -> None:
    (folder.path / "b").write_text("B")
    with (pytest.raises(UserError, match="b: its content differs"),
          verify_source(folder, workers=2) as wait_for):
        wait_for(["A"])
        with pytest.raises(UserError, match="b: its content differs"):
            wait_for(["A", "B"])


def test_damage_replaces_other_errors(folder: Any) -> None:
    with pytest.raises(ZeroDivisionError), verify_source(folder, workers=2):
        raise ZeroDivisionError
    (folder.path / "a").unlink()
    with pytest.raises(UserError, match="a: is missing"), verify_source(folder, workers=2):
        raise ZeroDivisionError


class ExpertFiles(StoredTensors):
    """A stacked weight of 100 experts, with two experts in each file."""

    def __init__(self) -> None:
        pieces = [StoredBlock(str(first), "w", (first, 0), (2, 8)) for first in range(0, 100, 2)]
        super().__init__("folder", {"w": (100, 8)}, {"w": torch.float32}, {"w": pieces}, "")

    def read_slice(self, key: str, piece: StoredBlock, block: tuple[slice, ...]) -> torch.Tensor:
        raise AssertionError


def test_an_expert_waits_only_for_its_own_file() -> None:
    experts = ExpertFiles()
    assert experts.list_files("w") == {str(first) for first in range(0, 100, 2)}
    assert experts.list_files("w", (6, 0), (1, 8)) == {"6"}
    assert experts.list_files("w", (3, 0), (2, 8)) == {"2", "4"}
    listed = [experts.list_files("w", (expert, 0), (1, 8)) for expert in range(100)]
    assert sum(map(len, listed)) == 100, "the work for all experts grows with their number, not its square"


def test_other_parts_and_unhashed_folders_are_not_verified(folder: Any) -> None:
    (folder.path / "optimizer/o").write_text("?")
    with verify_source(folder, workers=1):
        pass
    (folder.path / MANIFEST).unlink()
    (folder.path / "a").unlink()
    with verify_source(folder, workers=1) as wait_for:
        wait_for(["A"])


def test_export_finishes_a_file_after_its_sources_are_verified(solar_dir: Path, tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    written, counted, too_early = threading.Event(), threading.Event(), list[bool]()

    def after_the_writing(file: Path, record: FileRecord) -> str | None:
        if file.suffix == ".safetensors":
            assert written.wait(600)
            too_early.append(counted.wait(0.1))
        return find_file_damage(file, record)

    def write(*arguments: Any, now: Any = hf_import.write_tensors) -> FileRecord:
        record: FileRecord = now(*arguments)
        written.set()
        return record

    def finish(*arguments: Any, now: Any = ResumableArtifact.finish) -> None:
        counted.set()
        now(*arguments)

    convert.from_hf(solar_dir, tmp_path / "ckpt")
    monkeypatch.setattr(hf_import, "find_file_damage", after_the_writing)
    monkeypatch.setattr(hf_import, "write_tensors", write)
    monkeypatch.setattr(ResumableArtifact, "finish", finish)
    convert.to_hf(tmp_path / "ckpt", tmp_path / "hf")
    assert counted.is_set() and too_early == [False]
