"""Tables that are read, and those that are refused with one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sov.errors import UserError
from megatron_sov.plan.tables import spellings
from megatron_sov.plan.tables.columns import count, number, read_table
from megatron_sov.plan.tables.models import find, folded, published
from megatron_sov.plan.tables.shapes import MissingInput, shape_of


def table(tmp_path: Path, text: str) -> Path:
    """Return a file with this text."""
    file = tmp_path / "rows.csv"
    file.write_text(text, encoding="utf-8")
    return file


def test_columns_in_any_order_some_missing(tmp_path: Path) -> None:
    found = read_table(table(tmp_path, '\ufeffgpu, model ,tp,params_b\nH100,"a, b",,"1,000.5"\n\nA100,c\n'))
    assert found.columns == ["gpu", "model", "tp", "params_b"]
    assert [row["model"] for row in found.rows] == ["a, b", "c"]
    assert (count(found.rows[0], "tp"), count(found.rows[0], "pp")) == (0, 0)
    assert number(found.rows[0], "params_b") == 1000.5 and number(found.rows[1], "params_b") == 0


@pytest.mark.parametrize(("text", "said"), [
    ("gpu,micro_bach\nH100,1\n", r"unknown column 'micro_bach'; did you mean 'micro_batch'\?"),
    ("foo,bar\n1,2\n", "unknown columns 'foo', 'bar'"),
    ("tp,tp\n1,2\n", "has column 'tp' twice"),
    ("gpu,tp\nH100,two\n", "row 2, column tp: 'two' is not a whole number"),
    ("gpu,tp\nH100,1\nH100,1.5\n", "row 3, column tp: '1.5' is not a whole number"),
    ("gpu,layers\nH100,20000\n", "'20000' is not a whole number up to 10,000"),
    ("gpu,mfu\nH100,-3\n", "row 2, column mfu: '-3' is not a number"),
    ("gpu,mfu\nH100,inf\n", "row 2, column mfu: 'inf' is not a number"),
    ("gpu,tp\nH100,1,2\n", "row 2 has 3 cells and the table 2 columns"),
    ("gpu,mfu\nH100,1e-320\n", "row 2, column mfu: '1e-320' is not a number from 0 to"),
    (f"gpu,note\nH100,{'x' * 5000}\n", "row 2, column note: has 5,000 characters and may have 4,096"),
    ("", "is empty"), ("gpu,tp\n", "has no row"), ('gpu\n"H100\n', "is no CSV"),
])
def test_a_bad_table_is_refused_where_it_is_bad(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_table(table(tmp_path, text))


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_table(tmp_path / "none.csv")
    binary = tmp_path / "rows.csv"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is no text in UTF-8"):
        read_table(binary)


# What people write for chips, precisions and the rest.


@pytest.mark.parametrize(("text", "key"), [
    ("H100", "h100"), ("h100-80gb", "h100"), ("H100-96GB(HBM2e500W)", "h100-96"), ("DGX-GB300", "gb300"),
    ('A100 (paper: "NVIDIA Ampere")', "a100"), ("8x H100 SXM5", "h100"), ("NVIDIA B200 180GB", "b200"),
    ("GB200 NVL72", "gb200"), ("AMD Instinct MI300X", "mi300x"), ("A100-40GB", "a100-40"), ("H800", "h800")])
def test_chips(text: str, key: str) -> None:
    assert spellings.chip_of(text).key == key


@pytest.mark.parametrize(("text", "said"), [("", "gpu is empty"), ("TPU v5p", "is not in the table"),
                                            ("H1000", "is not in the table")])
def test_no_chips(text: str, said: str) -> None:
    with pytest.raises(MissingInput, match=said):
        spellings.chip_of(text)


@pytest.mark.parametrize(("text", "precision"), [
    ("bf16", "bf16"), ("amp_bf16", "bf16"), ("FP16", "bf16"), ("", "bf16"), ("FP8", "fp8"), ("FP8-CS", "fp8"),
    ("float8 tensorwise", "fp8"), ("BF16/FP8", "fp8"), ("FP8-MX", "mxfp8"), ("fp8_mx", "mxfp8"),
    ("MXFP8", "mxfp8"), ("NVFP4", "nvfp4"), ("fp8 blockwise", "fp8_blockwise")])
def test_precisions(text: str, precision: str) -> None:
    assert spellings.precision_of(text, "", has_fp8=True) == precision


def test_an_empty_precision_follows_from_the_notes() -> None:
    note = "parentheses note refers to fp8 quantization granularity"
    assert spellings.precision_of("", note, has_fp8=True) == "fp8"
    assert spellings.precision_of("", note, has_fp8=False) == "bf16"
    with pytest.raises(MissingInput, match="precision 'int4' is not known"):
        spellings.precision_of("int4", "", has_fp8=True)


@pytest.mark.parametrize(("text", "found"), [
    ("", ("none", ())), ("none", ("none", ())), ("full", ("full", ())),
    ("selective", ("selective", ("core_attn",))), ("selective op", ("selective", ("op",))),
    ("selective:moe+layernorm", ("selective", ("moe", "layernorm")))])
def test_recomputation(text: str, found: tuple[str, tuple[str, ...]]) -> None:
    assert spellings.recompute_of(text) == found


@pytest.mark.parametrize("text", ["sometimes", "selective:everything"])
def test_recomputation_that_nobody_knows(text: str) -> None:
    with pytest.raises(MissingInput, match="not known"):
        spellings.recompute_of(text)


@pytest.mark.parametrize(("text", "found"), [
    ("fsdp", "fsdp"), ("hsdp(megatron-fsdp)", "fsdp"), ("fsdp(DeepSpeed ZeRO-3)", "fsdp"), ("zero1", "zero1"),
    ("fsdp(DeepSpeed ZeRO-2)", "zero1"), ("ddp", "none"), ("", "zero1")])
def test_sharding(text: str, found: str) -> None:
    assert spellings.sharding_of(text, data_parallel=True) == found


@pytest.mark.parametrize(("notes", "found"), [
    ("cuda_graph=full_iteration;x", "full"), ("cuda_graph=transformer_engine['attn']", "partial"),
    ("cuda_graph=nonefull_iteration", "none"), ("no cuda graph flag", "none"), ("", "none")])
def test_cuda_graphs(notes: str, found: str) -> None:
    assert spellings.cuda_graphs_of(notes) == found


def test_numbers_and_networks_in_words() -> None:
    assert spellings.stated("lbs=2;ga=16;fsdp=8", "ga") == 16
    assert spellings.stated("mega=3", "ga") == 0
    assert spellings.network_bytes_per_s("torch.compile;network=400gbps") == 400e9 / 64
    assert spellings.network_bytes_per_s("fast") == 0


# Published models by the names that tables give them.


@pytest.mark.parametrize(("name", "known"), [
    ("LLAMA3.1_405B", "llama3-405b"), ("Llama3 70B 2-node LoRA", "llama3-70b"),
    ("DeepSeekV3 (tokendrop)", "deepseek-v3"), ("DeepSeek-V3 proxy 14L/64E (CI)", "deepseek-v3-proxy"),
    ("Qwen3_30B_a3B", "qwen3-30b-a3b"), ("nemotron_3_nano_4b", "nemotron-3-nano-4b"),
    ("Nemotron_3_5_Lightning", "nemotron-3.5-lightning"),
    ("GPT3-175B", "gpt3-175b"), ("Qwen2.5 32B LoRA", "qwen2.5-32b"), ("MPT-1b", "mpt-1b")])
def test_models_are_found_under_many_spellings(name: str, known: str) -> None:
    found = find(name)
    assert found is not None and known in found.names


def test_no_name_of_a_model_means_two() -> None:
    names = [folded(name) for model in published() for name in model.names]
    assert len(set(names)) == len(names) and find("Frontier 9000") is None


# Sizes of a row's model: stated, published, or what fits its parameters.


def test_cells_beat_what_is_published() -> None:
    shape = shape_of({"model": "Llama 3 8B", "layers": "16", "vocab": "32000"})[0]
    assert (shape.num_layers, shape.vocab_size, shape.hidden_size) == (16, 32000, 4096)
    assert shape_of({"model": "DeepSeekV3 (w/o MTP)"})[0].num_mtp_layers == 0


def test_a_width_of_heads_follows_from_the_parameters() -> None:
    """Qwen3 30B-A3B under another name: 32 heads of 128, not of 2,048 / 32."""
    shape = shape_of({"model": "mystery", "layers": "48", "hidden": "2048", "heads": "32", "kv_heads": "4",
                      "vocab": "151936", "experts": "128", "topk": "8", "moe_ffn": "768",
                      "params_b": "30.5", "active_params_b": "3.3"})[0]
    assert shape.head_dim == 128 and shape.gated


def test_a_size_alone_gives_a_usual_shape() -> None:
    shape = shape_of({"model": "mystery", "params_b": "13"})[0]
    assert shape.params() / 1e9 == pytest.approx(13, rel=0.06)
