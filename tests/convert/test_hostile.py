"""Malicious checkpoints raise one error; none of their code runs, and no output is written."""

import builtins
import collections
import io
import json
import os
import pickle
import re
import struct
import subprocess
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sov import convert
from megatron_sov.base.artifacts import read_manifest
from megatron_sov.base.errors import UserError
from megatron_sov.checkpoint.sharded_tensors import TensorReader
from megatron_sov.cli import main
from megatron_sov.convert.megatron.from_megatron import _rename_fsdp_tensors, find_tensor
from megatron_sov.convert.megatron.inert_pickle import parse_file, read_index, read_settings
from tests.convert import made_by_hand

CANARY = Path("/tmp/megatron-sov-canary")
TOUCH_CANARY = f"touch {CANARY}"
KEY = "decoder.final_layernorm.weight"


class Calls:
    """An object whose pickle calls a function when it is read."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


def nest_tuples(levels: int) -> Any:
    """Return nested tuples, each with the previous tuple twice: 2 ** levels values."""
    nested: Any = (1,)
    for _ in range(levels):
        nested = (nested, nested)
    return nested


def pickle_nested_tuples(levels: int) -> bytes:
    """Return a pickle of deeply nested tuples."""
    return b"\x80\x04)" + b"\x85" * levels + b"."


OBJECTS: dict[str, tuple[Any, str]] = {
    "os.system": (Calls(os.system, TOUCH_CANARY), "it names 'posix.system'"),
    "builtins.eval": (Calls(builtins.eval, f"open({str(CANARY)!r}, 'w')"), "it names 'builtins.eval'"),
    "builtins.exec in a list": ([1, [Calls(builtins.exec, "import os")]], "it names 'builtins.exec'"),
    "subprocess.Popen": (Calls(subprocess.Popen, ["touch", str(CANARY)]), "it names 'subprocess.Popen'"),
    "a function of torch": (Calls(torch.load, "x"), "it names 'torch.serialization.load'"),
    "another class": (collections.Counter("ab"), "it names 'collections.Counter'"),
    "an object of ours": (Path, "a Metadata is needed instead of a Name"),
    "no metadata": ([1, 2], "a Metadata is needed instead of a list"),
    "a text": ("x", "a Metadata is needed instead of a str")}
PICKLES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "EOFError"),
    "no pickle": (b"\x00" * 64, "it has the opcode"),
    "bytes without end": (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60), "EOFError"),
    "a number without end": (b"\x80\x04\x8b" + struct.pack("<i", (1 << 31) - 1), "EOFError"),
    "a number of negative length": (b"\x80\x04\x8b" + struct.pack("<i", -1), "negative byte count"),
    "an old opcode that calls": (b"(S'touch x'\nios\nsystem\n.", "which pickles of plain values do not have"),
    "an extension": (b"\x80\x04\x82\x01.", "which pickles of plain values do not have"),
    "a memo that is not there": (b"\x80\x04h\x07.", "is not a pickle of plain values"),
    "a stack that is empty": (b"\x80\x04R.", "is not a pickle of plain values"),
    "a call of a number": (b"\x80\x04K\x01)R.", "is not a pickle of plain values"),
    "tuples without end": (pickle_nested_tuples(200_000), "a Metadata is needed instead of a tuple"),
    "marks alone": (b"\x80\x04((((.", "is not a pickle of plain values"),
    "a mark in a tuple": (b"\x80\x04(\x85.", "is not a pickle of plain values"),
    "a list that holds itself": (b"\x80\x04]\x94h\x00a.", "a Metadata is needed instead of a list")}


def change_index(change: Callable[[Any], None]) -> Callable[[Path], bytes]:
    def write(folder: Path) -> bytes:
        index = made_by_hand.checkpoint(folder)
        change(index)
        return pickle.dumps(index)

    return write


def change_stored(**fields: Any) -> Callable[[Any], None]:
    def change(index: Any) -> None:
        for place, info in index.storage_data.items():
            if place.fqn == KEY:
                vars(info).update(fields)

    return change


def change_chunk(offsets: Any, sizes: Any) -> Callable[[Any], None]:
    def change(index: Any) -> None:
        chunk = index.state_dict_metadata[KEY].chunks[0]
        chunk.offsets, chunk.sizes = offsets, sizes

    return change


def repeat_chunks(index: Any) -> None:
    index.state_dict_metadata[KEY].chunks *= 12


def refer_to_itself(index: Any) -> None:
    index.state_dict_metadata[KEY] = index.state_dict_metadata


def change_size(size: Any) -> Callable[[Any], None]:
    return lambda index: setattr(index.state_dict_metadata[KEY], "size", size)


INDEX_CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "a path upwards": (change_stored(relative_path="../../etc/passwd"), "outside the checkpoint"),
    "a path from the root": (change_stored(relative_path="/etc/passwd"), "outside the checkpoint"),
    "a path that no terminal shows": (change_stored(relative_path="\ud800"), "outside the checkpoint"),
    "a path that is no text": (change_stored(relative_path=7), "outside the checkpoint"),
    "a path of lists without end": (change_stored(relative_path=nest_tuples(60)), "outside the checkpoint"),
    "a place before the file": (change_stored(offset=-1), "not an integer, negative, or too large"),
    "a place beyond all files": (change_stored(offset=1 << 70), "not an integer, negative, or too large"),
    "a place that is no number": (change_stored(length="all"), "not an integer, negative, or too large"),
    "compressed": (change_stored(transform_descriptors=["zstd"]), "is compressed or transformed"),
    "a part without end": (change_chunk(torch.Size([0]), torch.Size([1 << 40])), "outside the tensor of [8]"),
    "a tensor without end": (change_size(torch.Size([1 << 60])), "too large"),
    "a tensor of many axes": (change_size(torch.Size([1] * 40)), "40 axes"),
    "a size that laughs": (change_size(nest_tuples(60)), "not an integer"),
    "a part that comes again and again": (repeat_chunks, "is not stored"),
    "an index that holds itself": (refer_to_itself, "a TensorStorageMetadata is needed instead of a Items"),
    "no dtype": (lambda index: setattr(index.state_dict_metadata[KEY], "properties", None), "no properties"),
    "no storage": (lambda index: setattr(index, "storage_data", None), "does not list stored")}


@pytest.mark.each("name", OBJECTS)
def test_malformed_index_is_rejected(name: str) -> None:
    value, sentence = OBJECTS[name]
    for protocol in (2, 4):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            read_index(pickle.dumps(value, protocol, fix_imports=False))
    assert not CANARY.exists()


@pytest.mark.parametrize("name", PICKLES)
def test_malformed_pickle_is_rejected(name: str) -> None:
    raw, sentence = PICKLES[name]
    with pytest.raises(ValueError, match=re.escape(sentence)):
        read_index(raw)


@pytest.mark.each("name", INDEX_CHANGES)
def test_index_with_an_invalid_part_is_rejected(name: str, tmp_path: Path) -> None:
    change, sentence = INDEX_CHANGES[name]
    with pytest.raises(ValueError, match=re.escape(sentence)):
        read_index(change_index(change)(tmp_path / "from"))


def test_truncated_index_is_rejected(tmp_path: Path) -> None:
    made_by_hand.checkpoint(tmp_path / "from")
    raw = (tmp_path / "from/.metadata").read_bytes()
    assert len(read_index(raw)["tensors"]) == 15
    for size in range(0, len(raw), 97):
        with pytest.raises(ValueError, match=r"."):
            read_index(raw[:size])


def build_archive(header: bytes, method: int = zipfile.ZIP_STORED, name: str = "archive") -> bytes:
    with zipfile.ZipFile(raw := io.BytesIO(), "w", method) as file:
        file.writestr(f"{name}/data.pkl", header)
        file.writestr(f"{name}/data/0", b"\0" * 64)
    return raw.getvalue()


def save_to_bytes(value: Any) -> bytes:
    torch.save(value, raw := io.BytesIO())
    return raw.getvalue()


@pytest.mark.each(("raw", "message"), [
    (build_archive(pickle.dumps(Calls(os.system, TOUCH_CANARY), 2)), "system"),
    (save_to_bytes(torch.zeros(4).numpy().tolist()), "does not describe a tensor"),
    (save_to_bytes(torch.zeros(4, 6).T), "is not contiguous"),
    (save_to_bytes({"a": torch.zeros(2)}), "does not describe a tensor"),
    (build_archive(b"\x80\x02]q\x00." + b"\0" * 70_000), "does not describe a tensor"),
    (build_archive(b"\x80\x02]q\x00." + b"\0" * 2_000_000), "a member list of more"),
    (build_archive(pickle.dumps([0] * 9000, 2), zipfile.ZIP_DEFLATED), "is compressed"),
    (b"\0" * 3_000_000 + b"PK\5\6" + struct.pack("<4H2IH", 0, 0, 9, 9, 2_999_999, 0, 0),
     "a member list of more"),
    (b"PK\5\6" + b"\xff" * 40, "not a torch.save archive"), (b"", "not a torch.save archive"),
])
def test_malformed_stored_tensor_is_rejected(raw: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"before" + raw + b"behind")
    with pytest.raises(ValueError, match=re.escape(message)):
        find_tensor(tmp_path / "x", 6, len(raw))
    assert not CANARY.exists()


def test_settings_reject_callable_names() -> None:
    with pytest.raises(ValueError, match="system"):
        read_settings(save_to_bytes({"args": Calls(os.system, TOUCH_CANARY)}))
    with pytest.raises(ValueError, match="too many values"):
        read_settings(save_to_bytes({"args": made_by_hand.argparse.Namespace(x=nest_tuples(30))}))
    assert not CANARY.exists()


def test_large_files_are_refused_before_reading(tmp_path: Path) -> None:
    with open(tmp_path / "x", "wb") as file:
        file.truncate(2 << 30)
    with pytest.raises(UserError, match="it has 2"):
        parse_file(read_index, tmp_path / "x")


def test_parsing_has_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(tmp_path / "x", "wb") as file:
        file.truncate(512 << 20)
    for name in ("BASE_MEMORY_BYTES", "MEMORY_PER_BYTE"):
        monkeypatch.setattr(f"megatron_sov.convert.megatron.inert_pickle.{name}", 0)
    with pytest.raises(UserError, match="needs more memory"):
        parse_file(read_index, tmp_path / "x")


@pytest.mark.deep
def test_repeated_text_is_bounded_by_the_memory_limit(tmp_path: Path) -> None:
    """A text of a megabyte, referenced a thousand times, would become a gigabyte of JSON."""
    long = "x" * (1 << 20)
    file = tmp_path / "common.pt"
    file.write_bytes(save_to_bytes({"args": made_by_hand.argparse.Namespace(a=[long] * 1000)}))
    assert file.stat().st_size < 2 << 20
    with pytest.raises(UserError, match="needs more memory"):
        parse_file(read_settings, file)


def build_schedule(**fields: Any) -> dict[str, Any]:
    return {"opt_param_scheduler": {"max_lr": 1e-3, "num_steps": 16, "lr_decay_steps": 400} | fields}


@pytest.mark.each(("training", "message"), [
    (build_schedule(max_lr="1; touch x"), "its max_lr = '1; touch x' must be a number from 0"),
    (build_schedule(min_lr=float("nan")), "its min_lr = 'nan' must be a number"),
    (build_schedule(num_steps=-4), "its num_steps = '-4' must be a number"),
    (build_schedule(lr_decay_steps=[1]), "its lr_decay_steps = '[1]' must be a number"),
    ({"optimizer": {"param_groups": [{"step": float("inf")}]}}, "its step = 'inf' must be a number"),
    ({"optimizer": {"param_groups": [{"betas": ["a", 1], "eps": 1}]}}, "its beta1 = 'a' must be a number"),
    ({"iteration": -1}, "its iteration = '-1' must be a number"),
    ({"opt_param_scheduler": [1], "optimizer": [7]}, ""),
    (build_schedule(lr_decay_style=["cosine"], lr_decay_steps=None), ""),
])
def test_state_that_is_no_number_is_refused(training: dict[str, Any], message: str, tmp_path: Path,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    """The command prints these numbers as `--set`, which users paste into a shell."""
    made_by_hand.checkpoint(tmp_path / "from", training)
    code = main(["convert", "from-megatron", str(tmp_path / "from"), str(tmp_path / "out")])
    assert code == (2 if message else 0) and (tmp_path / "out").exists() != bool(message)
    assert message in capsys.readouterr().err


def pickle_tensor(shape: bytes, strides: bytes) -> bytes:
    """Return a header as `torch.save` writes it, with pickles of shape and strides."""
    storage = b"(\x8c\x07storagectorch\nFloatStorage\n\x8c\x010\x8c\x03cpuK\x10tQ"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00" + shape + strides + b"tR."


HEADERS = {
    "20,000 axes": pickle_tensor(b"(" + b"K\x01" * 20_000 + b"tq\x01", b"h\x01"),
    # a list with a tuple of 200,000 items, a name, and 2,000 calls with this tuple
    "calls with many arguments": pickle_tensor(
        b"](" + b"N" * 200_000 + b"tq\x01accollections\nOrderedDict\nq\x02a" + b"h\x02h\x01Ra" * 2000, b")"),
}


@pytest.mark.each("name", HEADERS)
def test_a_small_header_takes_neither_time_nor_memory(name: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(raw := build_archive(HEADERS[name]))
    began_s = time.process_time()
    tracemalloc.start()
    with pytest.raises(ValueError, match="its header has invalid sizes"):
        find_tensor(tmp_path / "x", 0, len(raw))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.process_time() - began_s < 1 and peak_bytes < 64 << 20


def write_link_outside(folder: Path) -> None:
    made_by_hand.checkpoint(folder)
    (folder / made_by_hand.FILE).rename(folder.with_name("outside"))
    (folder / made_by_hand.FILE).symlink_to("../outside")


def write_changed_index(change: Callable[[Any], None]) -> Callable[[Path], None]:
    return lambda folder: (folder / ".metadata").write_bytes(change_index(change)(folder)) and None


def write_with(name: str, **content: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        made_by_hand.checkpoint(folder)
        (folder / name).write_text(json.dumps(content))

    return write


def write_integrity(files: Any) -> Callable[[Path], None]:
    return write_with("integrity.json", algorithm="sha256", files=files)


@pytest.mark.parametrize(("write_checkpoint", "message"), [
    (write_changed_index(lambda index: setattr(index, "planner_data", Calls(os.system, TOUCH_CANARY))),
     "it names 'posix.system'"),
    (write_changed_index(change_stored(offset=1 << 40)), "the file ends before it does"),
    (write_changed_index(change_stored(offset=3)), "cannot be read (it is not a torch.save archive"),
    (write_changed_index(change_stored(relative_path="other.distcp")), "is missing"),
    (write_changed_index(lambda index: index.state_dict_metadata.pop(KEY)),
     "1 missing (decoder.final_layernorm.weight)"),
    (write_link_outside, "is a link to"),
    (write_integrity([made_by_hand.FILE]), "must list the hash of each file"),
    (write_integrity({".metadata": "0" * 64}), "must list the hash of each file"),
    (write_integrity({made_by_hand.FILE: "0" * 64, "../x": "0" * 64}), "must list the hash of each file"),
    (write_integrity({made_by_hand.FILE: None}), "its content differs"),
    (write_with("metadata.json", sharded_backend="zarr", sharded_backend_version=1),
     "'zarr' version 1 is not supported"),
    (write_with("metadata.json", sharded_backend="torch_dist", sharded_backend_version=9),
     "version 9 is not supported"),
    (lambda folder: (folder / "mp_rank_00").mkdir(parents=True), "files of single ranks"),
    (lambda folder: folder.mkdir(), "it is not a torch_dist checkpoint"),
])
def test_hostile_checkpoint_writes_no_output(write_checkpoint: Callable[[Path], None], message: str,
                                             tmp_path: Path,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "from")
    before = sorted(p.name for p in tmp_path.iterdir())
    assert main(["convert", "from-megatron", str(tmp_path / "from"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == before and not CANARY.exists()


# A checkpoint written by Megatron-LM itself is read, and gives the same logits in transformers.


MEGATRON_WRITER = str(Path(__file__).with_name("library_written.py"))
CASES: dict[str, tuple[str, dict[str, Any], dict[str, bool]]] = {
    "layers stacked, TP2": ("llama", {"tp": 2}, {"non_homogeneous_layers": False}),
    "a name per layer, PP2": ("qwen3", {"pp": 2}, {"non_homogeneous_layers": True}),
    "experts, layers stacked, EP2": ("qwen3_moe", {"ep": 2}, {"non_homogeneous_layers": False}),
    "halves and experts by name, EP2": ("solar_open", {"ep": 2}, {"singleton_local_shards": True}),
}


def compute_hf_logits(folder: Path) -> torch.Tensor:
    """Return transformers' logits for the text that Megatron-Core reads."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                 experts_implementation="eager").eval()
    ids = torch.randint(120, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        logits: torch.Tensor = model(ids).logits
    return logits


DEEP_CASES = ("a name per layer, PP2", "experts, layers stacked, EP2")
"""Two layouts of layer tensors: stacked, and one tensor per layer."""


@pytest.mark.distributed
@pytest.mark.parametrize("names", [
    [name for name in CASES if name not in DEEP_CASES], pytest.param(DEEP_CASES, marks=pytest.mark.deep)],
    ids=["stacked and by name", "further"])
def test_imported_torch_dist_model_equals_transformers(ranks: Any, job: Any, tmp_path: Path,
                                                       names: Collection[str]) -> None:
    cases = {name: CASES[name] for name in names}
    jobs = [job(MEGATRON_WRITER, "save_megatron_checkpoint", 2,
                {"out": str(tmp_path / case), "name": name, "layout": layout,
                 "metadata": metadata})
            for case, (name, layout, metadata) in cases.items()]
    for (case, (name, _, _)), result in zip(cases.items(), ranks(*jobs), strict=True):
        out = tmp_path / f"{case}-ours"
        assert main(["convert", "from-megatron", str(tmp_path / case), str(out)]) == 0, case
        manifest = read_manifest(out, "checkpoint")
        assert manifest.settings["model"]["family"] == name, case
        assert manifest.content["from_megatron"]["iteration"] == 12
        convert.to_hf(out, tmp_path / f"{case}-hf")
        expected = torch.tensor(result[0]).view(2, 24, -1)[..., :120]
        logits = compute_hf_logits(tmp_path / f"{case}-hf")
        assert expected.abs().max() > 1, case
        assert (logits - expected).abs().max() < 2e-5 * expected.abs().max(), case


@pytest.mark.distributed
def test_imported_fsdp_dtensor_model_equals_transformers(ranks: Any, job: Any, tmp_path: Path,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    names = ("qwen3", "qwen3_moe")
    results = ranks(*(job(MEGATRON_WRITER, "save_fsdp_checkpoint", 2,
                          {"out": str(tmp_path / name), "name": name}) for name in names))
    for name, result in zip(names, results, strict=True):
        out = tmp_path / f"{name}-ours"
        assert main(["convert", "from-megatron", str(tmp_path / name), str(out), "--dtype", "bfloat16"]) == 0
        assert read_manifest(out, "checkpoint").settings["model"]["family"] == name
        output = capsys.readouterr().out
        for text in ("iteration 12", "moments of 1", "RUN/checkpoints/step-11", "optim.lr=0.01",
                     "optim.schedule=cosine", "optim.warmup_steps=2", "train.steps=100", "optim.beta2=0.95"):
            assert text in output, text
        weights, states = TensorReader(out, "model"), TensorReader(out, "optimizer")
        for key in weights.keys():  # noqa: SIM118
            weight = weights.read(key).float()
            assert states.read(f"master/{key}").equal(weight), key
            assert states.read(f"exp_avg/{key}").equal(weight / 2), key
            assert states.read(f"exp_avg_sq/{key}").equal(weight.square()), key
        convert.to_hf(out, tmp_path / f"{name}-hf")
        expected = torch.tensor(result[0]).view(2, 24, -1)[..., :120]
        logits = compute_hf_logits(tmp_path / f"{name}-hf")
        assert expected.abs().max() > 1
        assert (logits - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.each(("key", "ours"), [
    ("model.module.decoder.layers.0.mlp.experts.linear_fc1.weight3_w",
     "decoder.layers.0.mlp.experts.experts.3.linear_fc1.weight_w"),
    ("optimizer.1.state.module.module.decoder.layers.0.mlp.experts.linear_fc2.weight12.exp_avg",
     "optimizer.state.exp_avg.decoder.layers.0.mlp.experts.experts.12.linear_fc2.weight")])
def test_fsdp_keys_of_grouped_experts(key: str, ours: str) -> None:
    assert _rename_fsdp_tensors(Path("from"), {key: "entry"}) == {ours: "entry"}


def test_fsdp_tensors_with_the_same_key_are_refused() -> None:
    with pytest.raises(UserError, match=r"from: has two tensors for decoder\.x"):
        _rename_fsdp_tensors(Path("from"), {"model.decoder.x": [1], "model.module.decoder.x": [2]})
