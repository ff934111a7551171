"""Rows of tables in safetensors files, read back by the safetensors library:
other tensors of any dtype stay as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file

from megatron_sov.base.artifacts import FileRecord
from megatron_sov.base.errors import UserError
from tokenizer.embedding_rows import RowPlan, add_rows, copy_file, find_tables, row_bytes

PLANS = [RowPlan(6, 9, 5, range(5, 9)), RowPlan(6, 6, 3, range(3, 5)), RowPlan(6, 6, 6, range(6, 6)),
         RowPlan(6, 10_000, 6, range(6, 10_000)), RowPlan(6, 7, 6, range(6, 7))]
OTHERS = {"a.scale": torch.tensor(1.5, dtype=torch.float64), "b.mask": torch.tensor([True, False, True]),
          "c.weight": torch.randn(3, 5).to(torch.float8_e4m3fn), "d.ids": torch.arange(7),
          "e.weight": torch.randn(4, 6)}


@pytest.mark.deep
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("plan", PLANS)
def test_old_rows_are_copied_and_new_ones_are_the_mean_of_known_ones(tmp_path: Path, plan: RowPlan,
                                                                     dtype: torch.dtype) -> None:
    table, bias = torch.randn(6, 4).to(dtype), torch.randn(6).to(dtype)
    tensors = {**OTHERS, "model.embed_tokens.weight": table, "lm_head.bias": bias}
    save_file(tensors, tmp_path / "in.safetensors", metadata={"format": "pt"})
    tables = find_tables([tmp_path / "in.safetensors"], 6)
    assert (set(tables) == {"model.embed_tokens.weight", "lm_head.bias"}
            and row_bytes(tables) == 5 * dtype.itemsize)
    record = add_rows(tmp_path / "in.safetensors", tmp_path / "out.safetensors", set(tables), plan)
    raw = (tmp_path / "out.safetensors").read_bytes()
    assert record == FileRecord(f"blake3:{blake3(raw).hexdigest()}", len(raw))
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[n].view(torch.uint8) if n == "c.weight" else found[n],
                           t.view(torch.uint8) if n == "c.weight" else t) for n, t in OTHERS.items())
    for old, new in ((table, found["model.embed_tokens.weight"]), (bias, found["lm_head.bias"])):
        mean = old.double()[:plan.known_ids].mean(0).to(dtype)
        assert len(new) == plan.new_rows
        for id_, row in enumerate(new):
            if id_ in plan.made:
                torch.testing.assert_close(row, mean, rtol=0 if dtype.itemsize == 2 else 1e-6, atol=0)
            else:
                assert torch.equal(row, old[id_])


def test_files_without_tables_are_copied(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 40_000_000)
    record = copy_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()
    assert record == FileRecord(f"blake3:{blake3(b'x' * 40_000_000).hexdigest()}", 40_000_000)


def test_what_is_unclear_or_damaged_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"x.embed_tokens.weight": torch.zeros(6, 2), "x.codebook": torch.zeros(6, 2)}, file)
    with pytest.raises(UserError, match=r"x\.codebook has 6 rows, as many as the vocabulary"):
        find_tables([file], 6)
    save_file({"x.embed_tokens.weight": torch.zeros(6, 2, dtype=torch.int8)}, file)
    with pytest.raises(UserError, match="has dtype I8; rows can be averaged in F64, F32, BF16, F16"):
        find_tables([file], 6)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        find_tables([file], 6)
