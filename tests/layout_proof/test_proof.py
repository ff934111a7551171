"""layout-proof: sound layouts equal one rank, defects are named, and bad input is one line."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.planted_faults import Fault, mutated
from layout_proof import cli

PAGE = Path(__file__).parents[2] / "layout_proof/README.md"
DEFECTS: dict[str, tuple[str, str, str, dict[str, Any], str]] = {
    "norm gradients not summed": (
        "megatron.core.distributed.finalize_model_grads:_allreduce_non_tensor_model_parallel_grads",
        'getattr(param, "sequence_parallel", False)', "False", {"tp": 2, "sp": True, "ranks": 2},
        r"differs.*\n  step 1: gradient of decoder.final_layernorm.weight on rank \d"),
    "norm of one rank": (
        "megatron.core.optimizer.clip_grads:get_grad_norm_fp32", "op=torch.distributed.ReduceOp.SUM",
        "op=torch.distributed.ReduceOp.MAX", {"tp": 2, "ranks": 2}, r"\n  step 1: gradient norm of rank \d"),
    "a message that one rank sends": (
        "megatron.core.distributed.finalize_model_grads:finalize_model_grads",
        "torch.distributed.all_reduce(num_tokens, group=dp_cp_group)",
        "torch.distributed.get_rank() or torch.distributed.all_reduce(num_tokens, group=dp_cp_group)",
        {"ranks": 2}, r"stands still.*\n.*finalize_model_grads.py:\d+"),
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Write the page's `model.py`, with losses per token, which are right at any layout, and with fields that
    Megatron-LM's trainer sets."""
    [source] = re.findall(r"```python\n(import torch\n.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    file = tmp_path / "layout_model.py"
    file.write_text(source.replace("bf16=True", "calculate_per_token_loss=True, bf16=True, "
                                   "tensor_parallel_num_weight_shards=1, apply_rope_fusion=True"))
    return file


@pytest.mark.each("layout", [
    "--tp 2 --sp --ranks 4 --distributed-optimizer", "--pp 2 --ranks 4", "--cp 2"])
def test_sound_layouts_equal_one_rank(model: Path, capsys: Any, layout: str) -> None:
    assert cli.main([f"{model}:build", *layout.split()]) == 0

    assert "equal to one rank in 2 steps" in capsys.readouterr().out


@pytest.mark.each("name", DEFECTS)
def test_defects_are_refused_by_their_place(model: Path, name: str) -> None:
    from layout_proof.proof import assert_layout_equals_one_rank
    from layout_proof.small_model import load_builder

    place, right, wrong, sizes, expected = DEFECTS[name]
    with mutated(Fault("defect", place, right, wrong)), pytest.raises(AssertionError, match=expected):
        assert_layout_equals_one_rank(load_builder(f"{model}:build"), **sizes)


def test_the_page_shows_a_sound_and_a_wrong_layout(model: Path, capsys: Any) -> None:
    model.write_text(model.read_text().replace("calculate_per_token_loss=True, ", ""))
    page = PAGE.read_text(encoding="utf-8")
    commands = re.findall(r"^layout-proof model.py:build (.*)$", page, re.MULTILINE)

    codes = [cli.main([f"{model}:build", *command.split(), "--json"]) for command in commands]

    verdicts = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert codes == [0, 3]
    assert [verdict["outcome"] for verdict in verdicts] == ["equal", "differs"]
    assert verdicts[1]["places"][0] == "step 1: backward of output_layer"
    assert cli.main([f"{model}:build", "--cp", "2", "--full-masks"]) == 0


BAD = {
    "no file": ("absent.py:build", "must be FILE.py:NAME with an existing file"),
    "no name": ("{model}:absent", "has no function absent"),
    "ranks": ("{model}:build --tp 4 --ranks 6", "--ranks 6: must be a multiple of --tp x --pp x --cp = 4"),
    "too many stages": ("{model}:build --pp 64", "needs 64 layers, the model has 32"),
    "raises": ("{model}:fails", "fails: ValueError: no \\x1bdata at layout_model.py:"),
    "ends the program": ("{model}:ends", "the builder fails: SystemExit: 0 at layout_model.py:"),
    "too many ranks": ("{model}:build --ranks 99999999", "--ranks 99999999: must be at most 16384"),
    "no tensor ranks": ("{model}:build --tp 0", "--tp 0: must be at least 1"),
    "no model": ("{model}:counts", "builds neither a GPTModel nor a HybridModel"),
    "weight shards": ("{model}:shards", "generalized tensor parallelism is not simulated"),
    "uneven stages": ("{model}:uneven --pp 2", "num_layers_in_first_pipeline_stage: only even stages are"),
    "no config": ("{model}:fixed", "must have a parameter `config=None`")}


@pytest.mark.each("name", BAD)
def test_bad_input_is_one_line(model: Path, capsys: Any, name: str) -> None:
    model.write_text(model.read_text() + "\n\ndef fails(config=None):\n"
                     "    raise ValueError('no \\x1bdata')\n\n\n"
                     "def ends(config=None):\n    raise SystemExit(0)\n\n\n"
                     "def counts(config=None):\n    return 1\n\n\ndef fixed():\n    return build()\n\n\n"
                     "def shards(config=None):\n    return build(config or TransformerConfig(num_layers=8, "
                     "hidden_size=64,\n        num_attention_heads=4, "
                     "tensor_parallel_num_weight_shards=2))\n\n\n"
                     "def uneven(config=None):\n    return build(config or TransformerConfig(\n"
                     "        num_layers=8, hidden_size=64, num_attention_heads=4,\n"
                     "        pipeline_model_parallel_size=2, pipeline_dtype=torch.float32,\n"
                     "        num_layers_in_first_pipeline_stage=3))\n")
    arguments, expected = BAD[name]

    assert cli.main(arguments.format(model=model).split()) == 2

    [line] = capsys.readouterr().err.splitlines()
    assert expected in line


def test_help_needs_no_torch() -> None:
    program = ("import sys; from layout_proof import cli\ntry: cli.main(['--help'])\n"
               "finally: print('torch' in sys.modules)")

    completed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert "exit codes: 0 equal, 3 differs" in completed.stdout
    assert completed.stdout.endswith("False\n")
