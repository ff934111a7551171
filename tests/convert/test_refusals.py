"""Conversion rejects damaged inputs in both directions, by tensor name, and leaves no output."""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sov import convert
from megatron_sov.base.artifacts import MANIFEST, FileRecord
from megatron_sov.base.errors import UserError
from megatron_sov.checkpoint import safetensors_files

SHARD_BYTES = 20_000
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def sound_folders(solar_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Undamaged inputs: a folder of several shards without a manifest, as published, and a checkpoint."""
    folder = tmp_path_factory.mktemp("sound")
    convert.from_hf(solar_dir, folder / "ckpt")
    convert.to_hf(folder / "ckpt", folder / "hf", max_shard_bytes=SHARD_BYTES)
    (folder / "hf" / MANIFEST).unlink()
    return {"hf": folder / "hf", "ckpt": folder / "ckpt"}


def find_tensor_file(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]


def edit_json(file: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(file.read_text())
    change(content)
    if file.name == MANIFEST:
        content["sha256"] = ""  # else the manifest itself counts as damaged
    file.write_text(json.dumps(content))


def change_shard(name: str, change: Callable[[Tensors], Any]) -> Callable[[Path], None]:
    """Change the tensors in the file of `name`, and update the index."""
    def damage(folder: Path) -> None:
        file = find_tensor_file(folder, name)
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

        def update_index(index: dict[str, Any]) -> None:
            other_files = {n: f for n, f in index["weight_map"].items() if f != file.name}
            index["weight_map"] = other_files | dict.fromkeys(tensors, file.name)

        edit_json(folder / "model.safetensors.index.json", update_index)

    return damage


def change_json(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / name, change)


def set_value(name: str, value: float) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors[name].view(-1)[5:6].fill_(value)


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
BIAS = "model.layers.0.mlp.gate.e_score_correction_bias"
NORM, HEAD = "model.norm.weight", "lm_head.weight"
INDEX = "model.safetensors.index.json"
HF = {
    "truncated shard": (lambda d: os.truncate(find_tensor_file(d, EXPERT),
                                              os.stat(find_tensor_file(d, EXPERT)).st_size - 9),
                        r"model-0.*safetensors: cannot be read .*\(model\.\S+ is cut off"),
    "truncated header": (lambda d: os.truncate(find_tensor_file(d, EXPERT), 99),
                         rf"it should hold .*{re.escape(EXPERT.split('.3.')[0])}"),
    "missing shard": (lambda d: find_tensor_file(d, NORM).unlink(),
                      r"No such file.*it should hold .*embed_tokens\.weight"),
    "missing expert": (change_shard(EXPERT, lambda t: t.pop(EXPERT)), rf"1 missing \({EXPERT}\)"),
    "extra key": (change_shard(NORM, lambda t: t.update(stray=torch.ones(2))), r"1 unexpected \(stray\)"),
    "one expert too many": (change_shard(
        EXPERT, lambda t: t.update({EXPERT.replace(".3.", ".8."): t[EXPERT].clone()})),
                            r"1 unexpected \(model\.layers\.1\.mlp\.experts\.8\.up_proj\.weight\)"),
    "wrong shape": (change_shard(HEAD, lambda t: t.update({HEAD: torch.ones(96, 31)})),
                    rf"{HEAD} \[96, 31\] instead of \[96, 32\]"),
    "nan": (change_shard(EXPERT, set_value(EXPERT, torch.nan)),
            rf"{EXPERT} contains NaN \(1 of 768 values\)"),
    "infinity": (change_shard(NORM, set_value(NORM, -torch.inf)), rf"{NORM} contains infinity"),
    "missing correction bias": (change_shard(BIAS, lambda t: t.pop(BIAS)), rf"1 missing \({BIAS}\)"),
    "rounded bias": (change_shard(BIAS, lambda t: t.update({BIAS: t[BIAS].bfloat16()})),
                     rf"{BIAS} has dtype torch.bfloat16"),
    "integers": (change_shard(NORM, lambda t: t.update({NORM: t[NORM].int()})),
                 rf"{NORM} has dtype torch.int32"),
    "experts of two dtypes": (change_shard(EXPERT, lambda t: t.update({EXPERT: t[EXPERT].float()})),
                              rf"{EXPERT} has .*one tensor"),
    "unprintable field": (change_json("config.json", lambda c: c.update({"z\x1b[31m": 1})),
                          r"field 'z\\x1b\[31m' has characters that cannot be printed"),
    "deep field": (change_json("config.json", lambda c: c.update(zz=json.loads("[" * 900 + "]" * 900))),
                   "field zz is nested 900 levels deep"),
    "config disagrees": (change_json("config.json", lambda c: c.update(n_routed_experts=7)),
                         r"unexpected \(model\.layers\.0\.mlp\.experts\.7.*mlp\.gate\.weight \[8, "
                         r"32\] instead of \[7, 32\]"),
    "two shards": (change_shard(EXPERT, lambda t: t.update({NORM: torch.ones(32)})),
                   rf"holds {NORM}, which .* as well"),
    "outside": (change_json(INDEX, lambda i: i["weight_map"].update({NORM: "../x"})),
                rf"it maps {NORM} to ../x"),
    "absolute": (change_json(INDEX, lambda i: i["weight_map"].update({NORM: "/x"})),
                 rf"it maps {NORM} to /x"),
    "index without a tensor": (change_json(INDEX, lambda i: i["weight_map"].pop(HEAD)),
                               rf"disagrees with the files about {HEAD}"),
}


def get_refusal(call: Callable[[Path], None], out: Path) -> str:
    before = sorted(out.parent.iterdir())
    with pytest.raises(UserError) as e:
        call(out)
    assert sorted(out.parent.iterdir()) == before, "something was left behind"
    return str(e.value)


def find_weights_file(folder: Path) -> Path:
    (file,) = (folder / "model").rglob("*.safetensors")
    return file


def change_weights(change: Callable[[Tensors], Any]) -> Callable[[Path], None]:
    """Change the tensors of the checkpoint's file, and update the hashes of the manifest."""
    def damage(folder: Path) -> None:
        tensors = load_file(find_weights_file(folder))
        change(tensors)
        save_file(tensors, find_weights_file(folder), metadata={"format": "pt"})
        reseal(folder)

    return damage


def change_index(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        edit_json(folder / "model.index.json", change)
        reseal(folder)

    return damage


def reseal(folder: Path) -> None:
    def follow(manifest: dict[str, Any]) -> None:
        for name in manifest["files"]:
            manifest["files"][name] = vars(FileRecord.of(folder / name))

    edit_json(folder / MANIFEST, follow)


def flip_a_bit(folder: Path) -> None:
    raw = bytearray(find_weights_file(folder).read_bytes())
    raw[-7] ^= 4
    find_weights_file(folder).write_bytes(raw)


FC1 = "decoder.layers.1.mlp.experts.experts.linear_fc1.weight"
FC1_EXPERT = f"{FC1}@3,0,0"
ROUTER, EXPERT_BIAS = "decoder.layers.1.mlp.router.weight", "decoder.layers.0.mlp.router.expert_bias"
CHECKPOINT = {
    "truncated file": (lambda d: os.truncate(find_weights_file(d), 20_000),
                       r"safetensors: has 20000 bytes.*it holds embedding"),
    "flipped bit": (flip_a_bit, r"safetensors: its content differs from the hash .*it holds embedding"),
    "truncated and sealed": (lambda d: (os.truncate(find_weights_file(d), 20_000), reseal(d)),
                             r"cannot be read .*\S+ is cut off"),
    "missing expert": (change_index(lambda i: i[FC1]["pieces"].pop(3)),
                       rf"a part of {FC1} \[8, 48, 32\] is missing"),
    "block missing in the file": (change_weights(lambda t: t.pop(FC1_EXPERT)),
                                  rf"{FC1} at \(3, 0, 0\) .* the file lacks it"),
    "extra key": (change_index(lambda i: i.update(stray=i[ROUTER])), r"1 unexpected \(stray\)"),
    "wrong shape": (change_index(lambda i: i[ROUTER].update(shape=[8, 31])),
                    rf"{ROUTER} \[8, 31\] instead of \[8, 32\]"),
    "wrong shape in the file": (change_weights(lambda t: t.update({f"{ROUTER}@0,0": torch.ones(8,
                                                                                               31).bfloat16()})),
                                rf"{ROUTER} at \(0, 0\) is torch.bfloat16 \[8, 32\] in the index, "
                                r"but the file .* \[8, 31"),
    "nan": (change_weights(set_value(FC1_EXPERT, torch.nan)),
            r"layers\.1\.mlp\.experts\.3\.gate_proj\.weight contains NaN"),
    "infinity": (change_weights(set_value(f"{ROUTER}@0,0", torch.inf)),
                 r"layers\.1\.mlp\.gate\.weight contains infinity"),
    "missing correction bias": (change_index(lambda i: i.pop(EXPERT_BIAS)), rf"1 missing \({EXPERT_BIAS}\)"),
    "rounded bias": (change_index(lambda i: i[EXPERT_BIAS].update(dtype="bfloat16")),
                     rf"{BIAS} has dtype torch.bfloat16"),
    "settings disagree": (change_json(MANIFEST, lambda m: m["settings"]["model"].update(num_experts=7)),
                          rf"{re.escape(FC1.replace('.1.', '.0.'))} \[8, 48, 32\] instead of \[7, 48, 32\]"),
    "no heads": (change_json(MANIFEST, lambda m: m["settings"]["model"].update(num_kv_heads=0)),
                 r"manifest\.json: its settings cannot be used \(config: model\.num_kv_heads = 0 must be"),
    "a block twice": (change_index(lambda i: i[FC1]["pieces"].append(i[FC1]["pieces"][3])),
                      rf"a part of {FC1} .* several pieces"),
    "outside": (change_index(lambda i: i[ROUTER]["pieces"][0].update(file="model/../../x")),
                rf"{ROUTER} points to model"),
}


@pytest.mark.each(("kind", "case"), [
    *(("hf", case) for case in HF), *(("ckpt", case) for case in CHECKPOINT)])
def test_damaged_folders_and_checkpoints_are_rejected(kind: str, case: str, sound_folders: dict[str, Path],
                                                      tmp_path: Path) -> None:
    (damage, expected), action = (HF[case], convert.from_hf) if kind == "hf" else (
        CHECKPOINT[case], convert.to_hf)
    folder = shutil.copytree(sound_folders[kind], tmp_path / "bad")
    damage(folder)
    assert re.search(expected, get_refusal(lambda out: action(folder, out), tmp_path / "out"))


def test_overflowing_value_is_rejected(sound_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(sound_folders["ckpt"], tmp_path / "large")
    change_weights(set_value(f"{ROUTER}@0,0", 1e6))(folder)
    message = get_refusal(lambda out: convert.to_hf(folder, out, "float16"), tmp_path / "out")
    assert ("layers.1.mlp.gate.weight: its largest value 999424 does not fit float16 (65504); "
            "use --dtype bfloat16" in message)


@pytest.mark.parametrize("action", ["from_hf", "to_hf"])
def test_full_disk_during_writing_is_reported(action: str, sound_folders: dict[str, Path], tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, raw: memoryview) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(safetensors_files, "_write_bytes", full)
    with pytest.raises(UserError, match="device; free some space"):
        getattr(convert, action)(sound_folders["hf" if action == "from_hf" else "ckpt"], tmp_path / "out")
    assert not list(tmp_path.iterdir())
