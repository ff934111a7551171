"""`distill states`: hidden states of a teacher equal transformers' at every layout; killed jobs resume."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_sov.base.artifacts import create_artifact, find_damaged_files
from megatron_sov.base.errors import UserError
from megatron_sov.cli import main
from megatron_sov.infer.engines.target import Target
from megatron_sov.post.distillation import teacher as teaching
from megatron_sov.post.distillation.state_files import HEAD_WEIGHT, StateFiles, StateFormat, unpack_rows
from megatron_sov.post.distillation.teacher import FORMATS, TeacherReading, hash_weights, write_outputs
from megatron_sov.train.data.sources import open_sources

FAMILY, TOP_K = "exaone_moe", 5


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, token_shards: Path) -> Path:
    """Forty short documents of two sources."""
    from data_prep.cli import main as sov_data

    folder = tmp_path_factory.mktemp("short")
    for name, word in (("first", "argument"), ("second", "sequence")):
        (folder / f"{name}.jsonl").write_text("".join(
            json.dumps({"text": f"def {word}_{i}(self):\n    return {', '.join([word] * (1 + i % 7))}\n"})
            + "\n" for i in range(20)))
    assert sov_data(["pack", "--tokenizer", str(token_shards.parent / "tokenizer"), "--workers", "1",
                     "--output", str(folder / "tokens"), "--input", str(folder / "first.jsonl"),
                     str(folder / "second.jsonl")]) == 0
    return folder / "tokens"


def open_states(out: Path, data: Path) -> StateFiles:
    return StateFiles(out, open_sources({str(data): 1.0}, 1024, FORMATS))


def build_reading(model: Path, data: Path, is_hf: bool = False, top_k: int = 0) -> TeacherReading:
    return TeacherReading(Target(model, is_hf), {str(data): 1.0}, state_format=StateFormat("float32", top_k),
                          part_tokens=80)


def read_all_states(out: Path, data: Path) -> torch.Tensor:
    """Return the states of all documents, concatenated."""
    files, states = open_states(out, data), []
    for number, source in enumerate(open_sources({str(data): 1.0}, 1024, FORMATS)):
        for document, length in enumerate(source.open_split("train").lengths):
            states.append(files.read_states(number, "train", document, 0, int(length)))
    return torch.cat(states)


def test_states_and_head_are_transformers_logits(one_rank: None, hf_models: dict[str, Path], data: Path,
                                                 tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    assert main(["distill", "states", str(hf_models[FAMILY]), "--data", str(data), "--dtype", "float32",
                 "--output", str(tmp_path / "states")]) == 0
    files = open_states(tmp_path / "states", data)
    head = load_file(files.head)[HEAD_WEIGHT]
    model = AutoModelForCausalLM.from_pretrained(hf_models[FAMILY], dtype=torch.float32).eval()
    shard = open_sources({str(data): 1.0}, 1024, FORMATS)[1].open_split("train")
    for document in (0, 7, len(shard.lengths) - 1):
        ids = shard.tokens(document, 0, int(shard.lengths[document]))
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0]
        logits_of_states = files.read_states(1, "train", document, 2, len(ids) - 2) @ head.T
        torch.testing.assert_close(logits_of_states, logits[2:], rtol=2e-5, atol=2e-5)
    assert find_damaged_files(tmp_path / "states") == []
    with pytest.raises(UserError, match="99 of source 'second'"):
        files.read_states(1, "train", 99, 0, 1)
    with pytest.raises(UserError, match="document 7"):
        files.read_states(1, "train", 7, 2, int(shard.lengths[7]))


def write_states(model: str, data: str, out: str, settings: list[str], with_top_k: bool) -> None:
    """Inside ranks: write the teacher's states, and with `with_top_k` its most probable tokens."""
    write_outputs(build_reading(Path(model), Path(data)), Path(out), settings, None)
    if with_top_k:
        write_outputs(build_reading(Path(model), Path(data), top_k=TOP_K), Path(f"{out}-top"), settings, None)


@pytest.mark.distributed
@pytest.mark.deep
@pytest.mark.parametrize("split", [
    {"tp": ["parallel.tp=2", "parallel.sp=true"]},
    {"pp": ["parallel.pp=2", "parallel.pipeline_layout=[2,3]"], "ep": ["parallel.ep=2"]}])
def test_every_layout_leaves_the_same_states(split: dict[str, list[str]], imported: dict[str, Path],
                                             data: Path, tmp_path: Path, ranks, job) -> None:
    layouts = {"one": [], **split}
    ranks(*(job(__file__, "write_states", 2 if settings else 1, {
        "model": str(imported[FAMILY]), "data": str(data), "out": str(tmp_path / name), "settings": settings,
        "with_top_k": name in ("one", "tp")})
            for name, settings in layouts.items()))
    expected = read_all_states(tmp_path / "one", data)
    logprobs = (expected @ load_file(open_states(tmp_path / "one", data).head)[HEAD_WEIGHT].T).log_softmax(-1)
    for name in layouts:
        difference = (read_all_states(tmp_path / name, data) - expected).norm() / expected.norm()
        assert difference <= 2e-6, f"{name}: {difference:.1e}"
    for name in sorted({"one", "tp"} & set(layouts)):
        token_ids, top_logprobs = unpack_rows(read_all_states(tmp_path / f"{name}-top", data))
        torch.testing.assert_close(top_logprobs, logprobs.topk(TOP_K).values, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(top_logprobs, logprobs.gather(1, token_ids), rtol=1e-5, atol=1e-5)
    assert not (tmp_path / "one-top/head.safetensors").exists()


def test_a_killed_job_reads_no_part_twice(one_rank: None, imported: dict[str, Path], data: Path,
                                          tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, read_parts, read_batches = tmp_path / "states", teaching._read_parts, []

    def read_two_batches(*arguments: Any) -> None:
        if len(read_batches) == 2:
            raise KeyboardInterrupt
        read_batches.append(arguments[3])
        read_parts(*arguments)

    monkeypatch.setattr(teaching, "_read_parts", read_two_batches)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        write_outputs(build_reading(imported[FAMILY], data), out, [], None)
    assert not out.exists() and len(read_batches) == 2
    monkeypatch.setattr(teaching, "_read_parts", lambda *a: (read_batches.append(a[3]), read_parts(*a)))
    write_outputs(build_reading(imported[FAMILY], data), out, [], None)
    files = [part.file for batch in read_batches for part in batch]
    assert sorted(files) == sorted(p.relative_to(out).as_posix() for p in (out / "states").iterdir())
    assert len(set(files)) == len(files) > 4


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_no_space(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", raise_no_space)
    with pytest.raises(UserError, match=r"0000-train-0\.bin: no space left"):
        teaching._write_states(tmp_path / "0000-train-0.bin", [torch.zeros(2, 4)])


def test_another_teacher_has_another_digest(tmp_path: Path) -> None:
    def hash_checkpoint(part: str, weights: bytes, base: str = "1", alpha: int = 16) -> str:
        with create_artifact(tmp_path / "checkpoint", "checkpoint", overwrite=True) as artifact:
            (artifact.path / part).mkdir()
            (artifact.path / part / "0.safetensors").write_bytes(weights)
            artifact.settings = {"model": {"hidden_size": 8}, "lora": {"alpha": alpha}}
            artifact.content = {"base": {"path": "base", "sha256": base}} if part == "adapter" else {}
        return hash_weights(Target(tmp_path / "checkpoint", False))

    def hash_hf_folder(weights: bytes, config: str) -> str:
        (tmp_path / "model.safetensors").write_bytes(weights)
        (tmp_path / "config.json").write_text(config)
        return hash_weights(Target(tmp_path, True))

    assert hash_checkpoint("adapter", b"1") == hash_checkpoint("adapter", b"1")
    assert len({hash_checkpoint("model", b"1"), hash_checkpoint("model", b"2"),
                hash_checkpoint("adapter", b"1"),
                hash_checkpoint("adapter", b"2"), hash_checkpoint("adapter", b"1", base="2"),
                hash_checkpoint("adapter", b"1", alpha=32)}) == 6
    assert len({hash_hf_folder(b"1", "{}"), hash_hf_folder(b"2", "{}"),
                hash_hf_folder(b"1", '{"rope_theta": 1}')}) == 3


def test_mismatched_teacher_and_data_are_refused(one_rank: None, imported: dict[str, Path], data: Path,
                                                 packed_data: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"than in .* \(e.g."):
        write_outputs(build_reading(imported[FAMILY], packed_data.text), tmp_path / "states", [], None)
    with pytest.raises(UserError, match="must be one of bfloat16, float32"):
        write_outputs(TeacherReading(Target(imported[FAMILY], False), {str(data): 1.0},
                                      state_format=StateFormat("int8")),
                       tmp_path / "states", [], None)
    with pytest.raises(UserError, match="--top-k 1024: must lie"):
        write_outputs(build_reading(imported[FAMILY], data, top_k=1024), tmp_path / "states", [], None)
    write_outputs(TeacherReading(Target(imported[FAMILY], False), {str(data): 1.0}), tmp_path / "states", [],
                   None)
    assert open_states(tmp_path / "states", data).read_states(0, "train", 3, 0, 2).dtype == torch.bfloat16
    other = shutil.copytree(data, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {"sha256": "", "created_s": 1.0}))
    with pytest.raises(UserError, match="now; make them again"):
        open_states(tmp_path / "states", other)
    for part in (tmp_path / "states/states").iterdir():
        part.write_bytes(part.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"bytes, its .* tokens"):
        open_states(tmp_path / "states", data).read_states(0, "train", 0, 0, 1)
