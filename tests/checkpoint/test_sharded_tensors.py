"""Sharded tensors: any grid of blocks is read in any other grid, and invalid indices are rejected."""

import json
import math
import os
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st

from megatron_sov.base.errors import UserError
from megatron_sov.checkpoint import sharded_tensors
from megatron_sov.checkpoint.sharded_tensors import TensorReader, TensorWriter, write_index
from megatron_sov.checkpoint.stored_tensors import count_owners

Block = tuple[tuple[int, ...], tuple[int, ...]]
"""Offset and shape."""


@st.composite
def grids(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Block]]:
    """Draw a tensor shape and irregular blocks that cover it."""
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    blocks: list[Block] = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 4))):
        offset, extent = blocks.pop(draw(st.integers(0, len(blocks) - 1)))
        axis = draw(st.integers(0, len(shape) - 1))
        cuts = [0, *sorted(draw(st.sets(st.integers(1, max(1, extent[axis] - 1)), max_size=2))), extent[axis]]
        for first, end in pairwise(sorted(set(cuts))):
            blocks.append(((*offset[:axis], offset[axis] + first, *offset[axis + 1:]),
                           (*extent[:axis], end - first, *extent[axis + 1:])))
    return shape, blocks


def slice_block(tensor: torch.Tensor, block: Block) -> torch.Tensor:
    return tensor[tuple(slice(o, o + n) for o, n in zip(*block, strict=True))]


def write_tensor(folder: Path, tensor: torch.Tensor, blocks: list[Block], num_ranks: int = 1) -> None:
    indices = []
    for rank in range(num_ranks):
        writer = TensorWriter(folder, "model", rank)
        for block in blocks[rank::num_ranks]:
            writer.add("w", slice_block(tensor, block), tensor.shape, block[0])
        indices.append(writer.finish())
    write_index(folder, "model", indices)


@given(grids(), st.sampled_from([torch.float32, torch.bfloat16, torch.int64]), st.integers(1, 3), st.data())
def test_reader_returns_any_block_of_any_grid(tmp_path_factory,
                                              grid: tuple[tuple[int, ...], list[Block]],
                                              dtype: torch.dtype, num_ranks: int,
                                              data: st.DataObject) -> None:
    shape, blocks = grid
    folder = tmp_path_factory.mktemp("grid")
    tensor = torch.arange(math.prod(shape)).reshape(shape).to(dtype)
    write_tensor(folder, tensor, blocks, num_ranks)
    reader = TensorReader(folder)
    assert (reader.keys(), reader.get_shape("w"), reader.get_dtype("w")) == (["w"], shape, dtype)
    assert reader.read("w").equal(tensor)
    offset = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    extent = tuple(data.draw(st.integers(1, n - o)) for n, o in zip(shape, offset, strict=True))
    assert reader.read("w", offset, extent).equal(slice_block(tensor, (offset, extent)))


@given(grids(), st.data())
def test_write_index_rejects_gaps_and_overlaps(tmp_path_factory,
                                               grid: tuple[tuple[int, ...], list[Block]],
                                               data: st.DataObject) -> None:
    """Drops, repeats or moves a block, and compares with a count of blocks per element."""
    shape, blocks = grid
    i = data.draw(st.integers(0, len(blocks) - 1))
    offset, extent = blocks[i]
    axis = data.draw(st.integers(0, len(shape) - 1))
    moved_offset = (*offset[:axis], max(0, offset[axis] - 1), *offset[axis + 1:])
    dropped, repeated = blocks[:i] + blocks[i + 1:], [*blocks, blocks[i]]
    moved = [*blocks[:i], (moved_offset, extent), *blocks[i + 1:]]
    changed = data.draw(st.sampled_from([dropped, repeated, moved]))
    owners = torch.zeros(shape, dtype=torch.int)
    for block in changed:
        slice_block(owners, block).add_(1)
    pieces = [{"file": "f", "name": f"{number}", "offset": list(block_offset), "shape": list(block_shape)}
              for number, (block_offset, block_shape) in enumerate(changed)]
    index = {"w": {"dtype": "float32", "shape": list(shape), "pieces": pieces}}
    folder = tmp_path_factory.mktemp("owners")
    if (owners == 1).all():
        write_index(folder, "model", [index])
    elif changed:
        with pytest.raises(ValueError, match="covered by 1"):
            write_index(folder, "model", [index])


@pytest.mark.each(("blocks", "message"), [
    # as many elements as the tensor has, but one is missing
    ([(0, torch.zeros(2), 0), (0, torch.zeros(2), 1)], "covered by 0 to"),
    ([(0, torch.zeros(3), 2)], "reaches beyond"),
    ([(0, torch.zeros(2), 0), (1, torch.zeros(2).bfloat16(), 2)], "written as float32")])
def test_write_index_rejects_wrong_blocks(tmp_path: Path, blocks: list[tuple[int, torch.Tensor, int]],
                                          message: str) -> None:
    writers = [TensorWriter(tmp_path, "model", rank) for rank in range(2)]
    for rank, block, start in blocks:
        writers[rank].add("w", block, (4,), (start,))
    indices = [writer.finish() for writer in writers]
    with pytest.raises(ValueError, match=message):
        write_index(tmp_path, "model", indices)


def test_many_overlapping_blocks_are_rejected_early() -> None:
    """Counting all overlaps would take quadratic time: minutes here."""
    single_elements = [{"offset": [i], "shape": [1]} for i in range(20_000)]
    assert (count_owners([20_000], single_elements) == 1).all()
    with pytest.raises(ValueError, match="40000 blocks overlap"):
        count_owners([20_000], single_elements + [{"offset": [0], "shape": [20_000]}] * 20_000)


def test_large_parts_use_several_files_and_close_them(tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded_tensors, "MAX_FILE_BYTES", 100)
    tensor = torch.randn(10, 20)
    write_tensor(tmp_path, tensor, [((row, 0), (1, 20)) for row in range(10)])
    assert len(list(tmp_path.glob("model/00000/rank-00000-*.safetensors"))) == 10  # rows of 20 x 4 bytes
    reader = TensorReader(tmp_path)
    num_open_files = len(os.listdir("/proc/self/fd"))
    assert reader.read("w").equal(tensor)
    assert reader.read("w").equal(tensor)
    assert len(os.listdir("/proc/self/fd")) == num_open_files


def damage_index(folder: Path, change: Any) -> None:
    index = json.loads((folder / "model.index.json").read_text())
    change(index)
    (folder / "model.index.json").write_text(json.dumps(index))


def test_damaged_checkpoint_raises_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no model\.index\.json"):
        TensorReader(tmp_path)
    write_tensor(tmp_path, torch.randn(6, 2), [((0, 0), (3, 2)), ((3, 0), (3, 2))])
    damage_index(tmp_path, lambda index: index["w"]["pieces"].pop())
    with pytest.raises(UserError, match="6 of the 12"):
        TensorReader(tmp_path).read("w")
    with pytest.raises(UserError, match="is damaged"):
        TensorReader(tmp_path).read("w", (0, 0), (9, 2))  # more than the tensor has
    file = next(tmp_path.glob("model/*/*"))
    file.write_bytes(file.read_bytes()[:-8])
    pattern = (r"safetensors: cannot be read .*\bw@3,0 is cut off: .* 8 bytes too early.*; "
               r"use an earlier checkpoint")
    with pytest.raises(UserError, match=pattern):
        TensorReader(tmp_path).read("w", (0, 0), (1, 2))
    file.unlink()
    with pytest.raises(UserError, match="safetensors: cannot be read"):
        TensorReader(tmp_path).read("w", (0, 0), (1, 2))
    (tmp_path / "model.index.json").write_text("{")
    with pytest.raises(UserError, match=r"model\.index\.json: is damaged"):
        TensorReader(tmp_path)


@pytest.mark.each("value", [[[]], [None, 2], ["6", 2], [6.0, 2], [True, 2], [-6, 2], [6], [6, 2, 1],
                            {}, "62", 6, None, [10**30, 2]])
@pytest.mark.each("place", ["shape", "offset", "tensor"])
def test_invalid_sizes_in_index_raise_user_error(place: str, value: Any, tmp_path: Path) -> None:
    write_tensor(tmp_path, torch.randn(6, 2), [((0, 0), (3, 2)), ((3, 0), (3, 2))])

    def set_value(index: Any) -> None:
        if place == "tensor":
            index["w"]["shape"] = value
        else:
            index["w"]["pieces"][0][place] = value

    damage_index(tmp_path, set_value)
    with pytest.raises(UserError, match=r"is damaged|a block reaches beyond|a part of w"):
        TensorReader(tmp_path).check_complete()


@pytest.mark.each("value", [5, None, ["x"], {}, "\0", "x" * 5000])
@pytest.mark.each("name", ["file", "name"])
def test_invalid_names_in_index_raise_user_error(name: str, value: Any, tmp_path: Path) -> None:
    write_tensor(tmp_path, torch.randn(6, 2), [((0, 0), (6, 2))])
    damage_index(tmp_path, lambda index: index["w"]["pieces"][0].update({name: value}))
    with pytest.raises(UserError, match=r"is damaged|cannot be read|the file lacks it"):
        TensorReader(tmp_path).read("w")


def test_index_must_match_its_files(tmp_path: Path) -> None:
    def damage_and_call(change: Any,
                        call: Callable[[TensorReader], Any] = TensorReader.check_complete) -> str:
        """Change the index of a tensor `w` of two blocks, and return the error of a reader's method."""
        write_tensor(tmp_path, torch.randn(6, 2), [((0, 0), (3, 2)), ((3, 0), (3, 2))])
        damage_index(tmp_path, lambda index: change(index["w"]))
        with pytest.raises(UserError) as e:
            call(TensorReader(tmp_path))
        return str(e.value)

    assert "w points to ../x, which is outside" in damage_and_call(
        lambda w: w["pieces"][0].update(file="../x"))
    assert "w points to /x" in damage_and_call(lambda w: w["pieces"][0].update(file="/x"))
    assert "a part of w [6, 2] is missing (the pieces begin at (0, 0))" in damage_and_call(
        lambda w: w["pieces"].pop())
    assert "a part of w [6, 2] is stored in several pieces" in damage_and_call(
        lambda w: w["pieces"].append(w["pieces"][0]))
    assert "w: a block reaches beyond" in damage_and_call(lambda w: w["pieces"][0].update(shape=[9, 2]))
    read = partial(TensorReader.read, key="w")
    assert "w at (0, 0) is torch.float16 [3, 2] in the index, but the file stores F32" in damage_and_call(
        lambda w: w.update(dtype="float16"), read)
    assert "but the file lacks it" in damage_and_call(lambda w: w["pieces"][0].update(name="v@0,0"), read)
