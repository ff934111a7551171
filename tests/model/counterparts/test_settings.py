"""Settings of other stacks, as ours: read and never run, and nothing is passed over in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_sov import recipes
from megatron_sov.base.errors import UserError
from megatron_sov.cli import main
from megatron_sov.model.config import RunConfig, from_dict
from megatron_sov.model.counterparts.architecture import architecture, model_fields, of_arguments
from megatron_sov.model.counterparts.settings import read_arguments, translate

SCRIPT = r"""#!/bin/bash
#SBATCH --nodes 4
TP=2   # of a node
export SEQ=${SEQ:-4096}
BATCH="256"
MODEL_ARGS=(
    --num-layers 48 --hidden-size 2048
    --num-attention-heads 32 --group-query-attention --num-query-groups 4 --kv-channels 128
    --ffn-hidden-size 6144
    --normalization RMSNorm --norm-epsilon 1e-6 --swiglu --disable-bias-linear --qk-layernorm
    --position-embedding-type rope --rotary-base 1000000   # --rotary-percent 0.5
    --untie-embeddings-and-output-weights --make-vocab-size-divisible-by 1187
    --num-experts 128 --moe-router-topk 8 --moe-ffn-hidden-size 768
    --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 1e-3
    --moe-token-dispatcher-type alltoall --moe-layer-freq "([1]*48)"
)
torchrun --nproc_per_node 8 pretrain_gpt.py "${MODEL_ARGS[@]}" \
    --seq-length $SEQ --max-position-embeddings 40960 --vocab-size 151936 \
    --tensor-model-parallel-size $TP --sequence-parallel --expert-model-parallel-size=8 \
    --train-samples 2_560_000 --global-batch-size $BATCH --micro-batch-size 1 \
    --lr 3e-4 --min-lr 3e-5 --lr-decay-style WSD --lr-warmup-samples 25600 --lr-wsd-decay-samples 256000 \
    --lr-wsd-decay-style minus_sqrt --adam-beta2 0.95 --weight-decay 0.1 \
    --attention-dropout 0 --hidden-dropout 0 \
    --bf16 --use-distributed-optimizer --overlap-grad-reduce --recompute-granularity selective \
    --data-path 0.7 /data/web_text_document 0.3 /data/code_text_document --split 99,1,0 --save "$OUT/ckpt" \
    --reset-position-ids --use-mcore-models --no-such-option 3 && touch /tmp/megatron-sov-canary $(touch x)
"""


def config_of(file: Path) -> RunConfig:
    """Return what `convert settings` writes of a file."""
    out = file.with_name("run.json")
    assert main(["convert", "settings", str(file), "--output", str(out)]) == 0
    return from_dict(json.loads(out.read_text()))


def test_a_script_becomes_a_run_that_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.sh").write_text(SCRIPT)
    config = config_of(tmp_path / "train.sh")
    out = capsys.readouterr().out
    model, parallel, train, optim = config.model, config.parallel, config.train, config.optim
    assert (model.family, model.num_experts, model.vocab_size) == ("qwen3_moe", 128, 151936)
    assert model.rope_theta == recipes.get("qwen3-4b").model.rope_theta and model.norm_topk_prob
    assert (parallel.tp, parallel.sp, parallel.ep, parallel.zero1) == (2, True, 8, True)
    assert (train.steps, train.global_batch_size, train.recompute) == (10_000, 256, "selective")
    assert (optim.schedule, optim.warmup_steps, optim.decay_share) == ("wsd", 100, 0.1)
    assert (optim.decay_form, optim.beta2, optim.eps) == ("one_minus_sqrt", 0.95, 1e-8)
    assert config.data.phases[0].seq_len == 4096 and config.data.phases[0].blend == {"web": 0.7, "code": 0.3}
    assert config.problems(num_ranks=16) == []
    assert "adopt web=/data/web_text_document code=/data/code_text_document --tokenizer" in out
    assert "save: $OUT/ckpt is not set there" in out
    assert "use_mcore_models: it always is" in out and "no_such_option" in out.split("not known here")[1]
    assert not Path("/tmp/megatron-sov-canary").exists()


@pytest.mark.parametrize("weights", [(".nan", 1), (".inf", 1), (-1, 1), (0, 0), (1e308, 1e308), (True, 1)])
def test_weights_that_are_none_are_told(weights: tuple[Any, Any]) -> None:
    numbers = [float(w[1:]) if isinstance(w, str) else w for w in weights]
    made = translate({"seq_length": 64, "data_path": [numbers[0], "/a", numbers[1], "/b"]})
    assert "blend" not in made.ours["data.phases"][0]
    assert "weights must be finite and above 0; mend them, or run `sov-data" in made.lost["data_path"]


def test_sources_get_names_that_adopt_takes() -> None:
    made = translate({"data_path": [1, "/x/a b:c", 2, "/x/tokenizer", 3, "/x/.한", 4, "/y/.."]})
    assert made.ours["data.phases"][0]["blend"] == {"a-b-c": 1, "tokenizer-2": 2, "한": 3, "source-4": 4}
    assert "adopt 'a-b-c=/x/a b:c' tokenizer-2=/x/tokenizer" in made.lost["data_path"]


@pytest.mark.parametrize("quote", ['"', "'"])
def test_a_variable_of_arguments_on_one_line_is_read(quote: str) -> None:
    found = read_arguments(f"export GPT_ARGS={quote}--num-layers 32 --lr 3e-4 --bf16{quote}\n"
                           "torchrun pretrain_gpt.py $GPT_ARGS --seq-length 64\n")
    assert found.values == {"num_layers": 32, "lr": 3e-4, "bf16": True, "seq_length": 64}


def test_a_file_of_bridge_is_read_as_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sections: dict[str, Any] = {
        "_target_": "os.system",
        "model": {"_target_": "megatron.bridge.models.llama.llama_provider.Llama31ModelProvider8B",
                  "num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_query_groups": 8,
                  "ffn_hidden_size": 14336, "kv_channels": 128, "vocab_size": 128256,
                  "normalization": "RMSNorm",
                  "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
                  "gated_linear_unit": True, "add_bias_linear": False,
                  "share_embeddings_and_output_weights": False,
                  "position_embedding_type": "rope", "rotary_base": 500000, "rope_scaling": True,
                  "rope_scaling_factor": 8.0, "seq_length": 8192, "hidden_dropout": 0.0,
                  "attention_dropout": 0.0,
                  "tensor_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": None},
        "train": {"train_iters": 100, "global_batch_size": 8, "micro_batch_size": 1},
        "optimizer": {"optimizer": "adam", "lr": 3e-4, "adam_beta2": 0.95, "fp16": True},
        "scheduler": {"lr_decay_style": "exponential", "lr_warmup_iters": 10},
        "mixed_precision": "bf16_mixed"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(sections))
    model, out = config_of(tmp_path / "run.yaml").model, capsys.readouterr().out
    assert (model.family, model.rope_theta, model.llama3_rope) == (
        "llama", 5e5, recipes.get("llama-3.1-8b").model.llama3_rope)
    assert "lr_decay_style: 'exponential': choose one of" in out and "fp16: use bf16" in out


LLAMA = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 48,
         "vocab_size": 96, "gated_linear_unit": True, "normalization": "RMSNorm", "seq_length": 64}


@pytest.mark.parametrize(("stated", "sentence"), [
    ({"normalization": "LayerNorm"}, "normalization = 'LayerNorm': only 'RMSNorm' is read"),
    ({"multi_latent_attention": True}, "multi_latent_attention = True: only False is read"),
    ({"vocab_size": None}, "model.vocab_size is not said; pass --set model.vocab_size=N"),
    ({"moe_layer_freq": 2, "num_moe_experts": 4}, "only dense layers in front of all those with experts"),
    ({"moe_layer_freq": "__import__('os').system('x')", "num_moe_experts": 4}, "is no list of numbers"),
    ({"moe_layer_freq": "[1]*999999999999", "num_moe_experts": 4}, "is no list of numbers"),
    ({"num_layers": "many"}, "num_layers = 'many': must be a whole number"),
    ({"num_layers": 10**30}, "must be a whole number from 0 to 10,000"),
    ({"mtp_num_layers": 10**30}, "must be a whole number from 0 to 10,000"),
    ({"moe_layer_freq": "[1,1,1]*99999", "num_moe_experts": 4}, "is of more than 10,000 layers"),
    ({"add_bias_linear": True}, "add_bias_linear = True: only False is read"),
])
def test_an_architecture_that_is_none_of_ours_is_refused(stated: dict[str, Any], sentence: str) -> None:
    assert architecture(LLAMA).family == "llama"
    with pytest.raises(UserError) as refused:
        architecture(LLAMA | stated)
    assert sentence in str(refused.value)


def test_positions_divided_by_a_factor_are_read() -> None:
    assert architecture(LLAMA | {"seq_len_interpolation_factor": 4}).linear_rope_factor == 4.0
    assert architecture(LLAMA | {"seq_len_interpolation_factor": None}).linear_rope_factor is None


def test_windows_and_layers_without_rotation_are_a_pattern() -> None:
    model = architecture(LLAMA | {
        "num_layers": 8, "num_moe_experts": 4, "moe_ffn_hidden_size": 24, "moe_layer_freq": "[0]*1+[1]*7",
        "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True,
        "moe_shared_expert_intermediate_size": 24, "moe_router_topk_scaling_factor": 2.5,
        "qk_layernorm": True, "share_embeddings_and_output_weights": False, "window_size": [127, 0],
        "window_attn_skip_freq": 4, "no_rope_freq": 4}, "exaone_moe")
    assert (model.attention_pattern, model.sliding_window_tokens) == ("LLLG", 128)
    assert not model.rope_on_global
    assert (model.num_dense_layers, model.num_shared_experts, model.routed_scaling_factor) == (1, 1, 2.5)


@pytest.mark.parametrize("text", ["", "--", "nothing here", "--a 'b", "$(rm -rf /)", "--x"])
def test_any_text_is_read_without_an_error(text: str) -> None:
    translate(of_arguments(read_arguments(text).values))


@pytest.mark.parametrize(("words", "sentence"), [
    (["/nowhere/run.yaml"], "cannot be read"), (["/nowhere/run.sh"], "is neither a file that can be read"),
    (["hello"], "is neither a file that can be read"),
    (["--no-such-thing 3"], "holds no setting of Megatron"),
    (["--num-layers many"], "num_layers = 'many': must be a whole number"),
    (["--global-batch-size x --train-samples 9"], "global_batch_size = 'x': must be a whole number"),
    (["--global-batch-size 8 --rampup-batch-size 2 0 9"], "does not lead to 8"),
    (["--global-batch-size 9000000000 --rampup-batch-size 1 1 9"], "does not lead to 9000000000"),
    (["--train-iters 9 --lr-warmup-fraction x"], "a value cannot be understood"),
    (["--lr 3e-4", "--output", "/nowhere/run.json"], "--output"),
])
def test_bad_command_lines_are_told_in_a_sentence(words: list[str], sentence: str,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "settings", *words]) == 2
    error = capsys.readouterr().err
    assert sentence in error and len(error.splitlines()) == 1


def test_yarns_ramp_between_channels_is_refused() -> None:
    stated = {"position_embedding_type": "yarn", "yarn_rotary_scaling_factor": 32.0}
    assert model_fields(stated)[0]["yarn"] == {"factor": 32.0}
    _, problems = model_fields(stated | {"yarn_correction_range_round_to_int": False})
    assert problems == ["yarn_correction_range_round_to_int = False: only True or None is read"]


@pytest.mark.parametrize("length", [200, 300, 5000])
def test_a_command_line_of_any_length_is_read(length: int, capsys: pytest.CaptureFixture[str]) -> None:
    """255 bytes are the most that a file name may have, 4,096 the most of a path."""
    flags = "--num-layers 4 --hidden-size 64 --lr 1e-4"
    while len(flags) < length:
        flags += " --log-interval 10"
    assert main(["convert", "settings", flags]) == 0
    assert "--set optim.lr=0.0001" in capsys.readouterr().out
