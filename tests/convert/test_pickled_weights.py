"""Folders whose weights `torch.save` wrote (`pytorch_model.bin`) are read without running the pickle; files
that hold anything but a dict from names to tensors are refused, and nothing is written."""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_sov import convert
from megatron_sov.base.errors import UserError
from megatron_sov.cli import main
from megatron_sov.convert.inert_pickle import read_weights
from megatron_sov.convert.sources import PickledFile
from megatron_sov.model.pretrained import weight_files

CANARY = Path("/tmp/megatron-sov-canary-weights")
BIN = "pytorch_model.bin"


class Calls:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


def pickled(source: Path, target: Path, split: int = 1, **options: Any) -> Path:
    """Copy a folder with its weights in `split` files of `torch.save`."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(source / "model.safetensors")
    if split == 1:
        torch.save(tensors, target / BIN, **options)
        return target
    files = {f"pytorch_model-{i + 1:05d}-of-{split:05d}.bin": dict(list(tensors.items())[i::split])
             for i in range(split)}
    for name, part in files.items():
        torch.save(part, target / name, **options)
    (target / f"{BIN}.index.json").write_text(json.dumps({
        "metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}))
    return target


@pytest.mark.parametrize("split", [1, 3])
def test_a_pickled_folder_gives_the_checkpoint_of_the_same_tensors(hf_dir: Path, split: int,
                                                                  tmp_path: Path) -> None:
    """bfloat16 matrices and float32 router biases; in one file, and in several with an index."""
    convert.from_hf(pickled(hf_dir, tmp_path / "hf", split), tmp_path / "ckpt")
    convert.to_hf(tmp_path / "ckpt", tmp_path / "back")
    found, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "back", hf_dir))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) and found[name].dtype == expected[name].dtype
               for name in expected)


def whole_model() -> dict[str, torch.Tensor]:
    """Return tensors as state dicts have them: slices of a storage, one storage twice, a scalar, nothing."""
    big = torch.arange(24, dtype=torch.float32).reshape(6, 4)
    return {"whole": big, "rows": big[2:5], "again": big, "scalar": torch.tensor(3.5),
            "none": torch.empty(0, 4), "half": torch.randn(3, 2).half(), "b": torch.randn(5).bfloat16(),
            "double": torch.randn(2).double(), "long": torch.arange(3),
            "parameter": torch.nn.Parameter(torch.randn(2, 2)),
            "one": torch.randn(1, 5)[:, :4]}


@pytest.mark.parametrize("kind", [dict, collections.OrderedDict, "module"])
def test_every_tensor_is_what_torch_load_reads(kind: Any, tmp_path: Path) -> None:
    file = tmp_path / BIN
    torch.save(torch.nn.Linear(3, 2).state_dict() if kind == "module" else kind(whole_model()), file)
    expected = torch.load(file, weights_only=True)
    opened = PickledFile(file, "copy it")
    assert opened.entries.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(opened.read(name), tensor) and opened.dtype(name) == tensor.dtype, name
    part = [slice(1, 3), slice(0, 2)]
    if kind is dict:
        assert torch.equal(opened.read("rows", part), expected["rows"][1:3, :2])


def test_safetensors_come_first_and_only_conversion_reads_pickles(solar_dir: Path, tmp_path: Path) -> None:
    both = pickled(solar_dir, tmp_path / "both")
    shutil.copyfile(solar_dir / "model.safetensors", both / "model.safetensors")
    (both / BIN).write_bytes(b"evil")
    assert [*weight_files(both)] == [*weight_files(both, pickled=True)] == ["model.safetensors"]
    only = pickled(solar_dir, tmp_path / "only")
    assert [*weight_files(only, pickled=True)] == [BIN]
    with pytest.raises(UserError, match="pickled weights"):
        weight_files(only)
    # the advice
    assert main(["convert", "from-hf", str(only), str(tmp_path / "ckpt")]) == 0
    assert main(["convert", "to-hf", str(tmp_path / "ckpt"), str(tmp_path / "hf")]) == 0
    assert [*weight_files(tmp_path / "hf")] == ["model.safetensors"]


def archive(header: bytes, method: int = zipfile.ZIP_STORED, **members: bytes) -> bytes:
    with zipfile.ZipFile(raw := io.BytesIO(), "w", method) as file:
        file.writestr("archive/data.pkl", header)
        for name, content in {"0": b"\0" * 64, **members}.items():
            file.writestr(f"archive/{name if name == 'byteorder' else f'data/{name}'}", content)
    return raw.getvalue()


def saved(value: Any, **options: Any) -> bytes:
    torch.save(value, raw := io.BytesIO(), **options)
    return raw.getvalue()


def edited(old: bytes, new: bytes, value: Any = None) -> bytes:
    """Return what `torch.save` writes with other bytes in its header."""
    raw = saved({"a": torch.arange(6.0)} if value is None else value)
    with zipfile.ZipFile(io.BytesIO(raw)) as file:
        root = file.namelist()[0].split("/")[0]
        header, data = file.read(f"{root}/data.pkl"), file.read(f"{root}/data/0")
    assert header.count(old) == 1
    with zipfile.ZipFile(made := io.BytesIO(), "w") as file:
        file.writestr("x/data.pkl", header.replace(old, new))
        file.writestr("x/data/0", data)
    return made.getvalue()


TOUCH = f"touch {CANARY}"
NESTED = b"\x80\x02}X\x01\x00\x00\x00a" + b")" + b"\x85" * 200_000 + b"s."
HOSTILE: dict[str, tuple[bytes, str]] = {
    "a call of the system": (archive(pickle.dumps(Calls(os.system, TOUCH), 2)), "posix.system"),
    "a call beside the tensors": (saved({"a": torch.ones(2), "b": Calls(os.system, TOUCH)}), "posix.system"),
    "eval": (saved({"a": Calls(eval, "1")}), "eval"),
    "a class of ours": (saved({"a": Calls(Path, "/etc/passwd")}), "no place in it"),
    "a module": (saved(torch.nn.Linear(2, 2)), "no place in it"),
    "optimizer states": (saved({"model": {"a": torch.ones(2)}, "optimizer": {"lr": 0.1}}),
                         "'model' is no tensor of weights"),
    "a number": (saved({"a": torch.ones(2), "step": 3}), "'step' is no tensor of weights"),
    "a list": (saved([torch.ones(2)]), "a dict with text for keys is needed"),
    "a key that is no text": (saved({3: torch.ones(2)}), "a dict with text for keys is needed"),
    "columns first": (saved({"a": torch.ones(4, 6).T}), "does not stand row by row"),
    "a repeated number": (saved({"a": torch.ones(1).expand(1 << 40)}), "does not stand row by row"),
    "a tensor without end": (edited(b"K\x06\x85", b"\x8a\x06\0\0\0\0\0\x01\x85"), "reaches beyond its bytes"),
    "a negative size": (edited(b"K\x06\x85", b"J\xff\xff\xff\xff\x85"), "has no sizes"),
    "an offset behind the storage": (edited(b"QK\x00K\x06", b"QK\x05K\x06"), "reaches beyond its bytes"),
    "a storage that is not there": (edited(b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x007"),
                                    "does not hold the 6 numbers"),
    "a storage elsewhere": (edited(b"X\x01\x00\x00\x000", b"X\x0b\x00\x00\x00../../x/0/0"),
                            "does not hold the 6 numbers"),
    "values inside one another": (archive(NESTED), "is no tensor of weights"),
    "a compressed archive": (archive(pickle.dumps({}, 2), zipfile.ZIP_DEFLATED), "is compressed"),
    "big-endian bytes": (archive(pickle.dumps({}, 2), byteorder=b"big"), "big-endian"),
    "the format before torch 1.6": (saved({"a": torch.ones(2)}, _use_new_zipfile_serialization=False),
                                    "no archive of torch.save"),
    "no archive": (b"not a zip", "no archive of torch.save"),
    "nothing": (b"", "no archive of torch.save"),
    "a cut file": (saved({"a": torch.ones(4096)})[:-700], "no archive of torch.save"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_is_not_a_dict_of_tensors_is_refused(name: str) -> None:
    raw, sentence = HOSTILE[name]
    with pytest.raises((ValueError, RecursionError), match=r".") as refused:
        read_weights(io.BytesIO(raw))
    assert sentence in str(refused.value) and not CANARY.exists()


def test_a_header_above_the_limit_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_sov.convert.inert_pickle.MAX_HEADER_BYTES", 100)
    with pytest.raises(ValueError, match="above 100 bytes"):
        read_weights(io.BytesIO(saved({"a": torch.ones(2)})))


@pytest.mark.parametrize("name", ["a call of the system", "optimizer states", "values inside one another",
                                  "the format before torch 1.6"])
def test_the_command_says_it_in_one_sentence_and_writes_nothing(
        name: str, solar_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pickled(solar_dir, tmp_path / "hf")
    raw, sentence = HOSTILE[name]
    (folder / BIN).write_bytes(raw)
    assert main(["convert", "from-hf", str(folder), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert sentence in error and BIN in error and len(error.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["hf"] and not CANARY.exists()


def test_an_index_that_sends_out_of_the_folder_or_to_another_kind_of_file_is_refused(
        solar_dir: Path, tmp_path: Path) -> None:
    folder = pickled(solar_dir, tmp_path / "hf", split=2)
    index = folder / f"{BIN}.index.json"
    for file in ("../x.bin", "x.pt", "/etc/passwd", 5):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))
        with pytest.raises(UserError, match="same folder"):
            convert.open_weights(folder)
    safe = shutil.copytree(solar_dir, tmp_path / "safe")
    (safe / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a.weight": "x.bin"}}))
    with pytest.raises(UserError, match=r"name \.safetensors files"):
        convert.open_weights(safe)


def resident_bytes(field: str) -> int:
    """Return the memory of this process, VmRSS, or its peak, VmHWM."""
    (line,) = (line for line in Path("/proc/self/status").read_text().split("\n") if line.startswith(field))
    return int(line.split()[1]) << 10


def test_memory_holds_what_is_asked_for(tmp_path: Path) -> None:
    """Of a file of 128 MiB, which is opened and of which one row is read."""
    torch.save({"large": torch.zeros(32, 1 << 20), "small": torch.ones(3)}, tmp_path / BIN)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident_bytes("VmRSS")
    opened = PickledFile(tmp_path / BIN, "copy it")
    assert opened.read("large", [slice(5, 6), slice(0, 1 << 20)]).numel() == 1 << 20
    assert opened.read("small").tolist() == [1.0] * 3
    assert resident_bytes("VmHWM") - before < 32 << 20
