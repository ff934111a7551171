"""One piece of work, whichever engine does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_sov.engine.parallel.cpu_shims import prepare_megatron

prepare_megatron()
from megatron_sov.base.errors import UserError  # noqa: E402
from megatron_sov.infer.asking import check_engine  # noqa: E402
from megatron_sov.infer.engine import MEGATRON, TRANSFORMERS, Engine, run_engine  # noqa: E402
from megatron_sov.infer.engines.target import find_target  # noqa: E402
from megatron_sov.infer.request import Batching, Sampling, StopRule  # noqa: E402

PROMPTS = [[5, 9, 2, 70], [300], [8, 8, 8, 8]]

SMALL = {"vocab_size": 320, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 8, "num_hidden_layers": 2, "max_position_embeddings": 128, "intermediate_size": 40,
         "initializer_range": 0.2}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
FOLDERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "bf16": ("Llama", {}, "bfloat16"), "fp16": ("Llama", {}, "float16"), "fp32": ("Llama", {}, "float32"),
    "tied": ("Qwen2", {"tie_word_embeddings": True}, "bfloat16"), "qwen3": ("Qwen3", {}, "bfloat16"),
    "experts bf16": ("Qwen3Moe", EXPERTS, "bfloat16"), "experts fp16": ("Qwen3Moe", EXPERTS, "float16")}


@pytest.mark.deep
@pytest.mark.parametrize("family", ["exaone_moe", pytest.param("solar_open", marks=pytest.mark.deep)])
def test_engines_answer_the_same_work_alike(family: str, hf_models: dict[str, Path],
                                            imported: dict[str, Path], one_rank: None) -> None:
    def work(engine: Engine) -> Any:
        whole = engine.generate(PROMPTS, Sampling(8)).continuations
        ended = engine.generate(PROMPTS, Sampling(8), stop=StopRule((whole[0][2],))).continuations
        return {"whole": whole, "ended": ended,
                "same again": engine.generate(PROMPTS, Sampling(8, temperature=1.0, seed=4))
                == engine.generate(PROMPTS, Sampling(8, temperature=1.0, seed=4), streams=None)}

    expected = run_engine(TRANSFORMERS, find_target(hf_models[family]), work, longest=16,
                          batching=Batching(2, 5))
    assert len(expected["ended"][0]) <= 3 and expected["same again"]
    found = run_engine(MEGATRON, find_target(imported[family]), work, longest=16, batching=Batching(2, 5))
    assert found == expected


@pytest.mark.parametrize("case", FOLDERS)
def test_folder_and_its_checkpoint_give_the_same_text_whatever_their_dtype(
        case: str, tmp_path: Path, one_rank: None, capfd: pytest.CaptureFixture[str]) -> None:
    import torch
    import transformers

    from megatron_sov import convert

    kind, settings, dtype = FOLDERS[case]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SMALL, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path / "hf")
    convert.from_hf(tmp_path / "hf", tmp_path / "checkpoint")

    def work(engine: Engine) -> Any:
        return vars(engine.generate(PROMPTS, Sampling(24)))

    capfd.readouterr()
    folder = run_engine(TRANSFORMERS, find_target(tmp_path / "hf"), work, longest=32, batching=Batching(2, 5))
    checkpoint = run_engine(MEGATRON, find_target(tmp_path / "checkpoint"), work, longest=32,
                            batching=Batching(2, 5))
    assert [list(c) for c in folder["continuations"]] == [list(c) for c in checkpoint["continuations"]]
    for ours, theirs in zip(checkpoint["logprobs"], folder["logprobs"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    printed = capfd.readouterr().err
    assert f"{tmp_path}/hf: runs in transformers with fp32 on the CPU" in printed
    assert f"{tmp_path}/checkpoint: runs in megatron with fp32 on the CPU" in printed


def test_precision_of_transformers_is_set_as_that_of_megatron(hf_models: dict[str, Path]) -> None:
    target = find_target(hf_models["solar_open"])

    def logprobs(*settings: str) -> Any:
        return run_engine(TRANSFORMERS, target, lambda engine: engine.generate(
            PROMPTS, Sampling(4)).logprobs, longest=16, settings=settings)

    check_engine(TRANSFORMERS, target, ["train.precision=bf16"], None)
    assert logprobs() == logprobs("train.precision=fp32") != logprobs("train.precision=bf16")
    with pytest.raises(UserError, match=r"^--set train\.precision=fp8: must be one of fp32, bf16, fp64$"):
        logprobs("train.precision=fp8")
    with pytest.raises(UserError, match=r"^--set parallel\.tp=2: is for --engine megatron"):
        check_engine(TRANSFORMERS, target, ["train.precision=bf16", "parallel.tp=2"], None)
