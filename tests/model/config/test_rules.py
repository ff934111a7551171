"""Refused settings by code and key: bounds of single fields, and rules between fields."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from megatron_sov import recipes
from megatron_sov.base.settings import SettingsError
from megatron_sov.model.config import RunConfig, apply_settings

Small = Callable[..., RunConfig]
# Settings that several cases share; each makes a valid run unless a case adds a wrong one.
SELECTIVE = "train.recompute=selective gpu.recompute_modules="
OFFLOAD = "train.precision=bf16 parallel.zero1=true gpu.optimizer_offload=0.5"
BF16_SUMS = "train.precision=bf16 gpu.grad_dtype=bf16 train.micro_batch_size=1"
PASSES = "parallel.ep=2 parallel.expert_overlap=micro_batches"
ROUTERS, GRAPHS = 'gpu.cuda_graphs=["moe_router"]', 'gpu.cuda_graphs=["moe_router","moe_preprocess"]'
QUANTISED = "train.precision=bf16 train.fp8=mxfp8"
PADDED = f"{QUANTISED} train.fp8_pad_routed_tokens=true"
DENSE = "model.num_experts=0 model.dense_ffn_dim=64"
LATENT = ('model.num_kv_heads=4 model.latent_attention={"kv_lora_rank":32,"qk_nope_head_dim":8,'
          '"qk_rope_head_dim":8,"v_head_dim":8}')
LINEAR = ('model.linear_attention={"num_key_heads":2,"num_value_heads":2,"key_head_dim":8,'
          '"value_head_dim":8,"gate_rank":8}')
ODD_HEADS = LINEAR.replace(":2,", ":1,")
MORE_VALUES = LINEAR.replace('value_heads":2', 'value_heads":4')
LM = 'evaluate.background.tasks=["lm"] train.export_every_checkpoints=1'
VISION = {"placeholder_ids": [5], "full_attention_layers": [1], "num_layers": 2}
AUDIO = {"placeholder_ids": [6]}


def vision(**changes: Any) -> str:
    return f"model.vision={json.dumps({**VISION, **changes}, separators=(',', ':'))}"


def audio(**changes: Any) -> str:
    return f"model.audio={json.dumps({**AUDIO, **changes}, separators=(',', ':'))}"


@pytest.mark.each("settings", [
    "model.head_dim=15", "model.yarn.factor=0.0", "model.vision.std=[1,1,0]", "train.hidden_dropout=1",
    "parallel.pipeline_layout=[4,0]", "data.phases=[]", "data.phases.0.seq_len=1",
    "data.phases.0.blend.en=-1", "data.skip_steps=[[0,3]]", "optim.lr=1e999", "optim.rewarm=[[5,0]]",
    "policy.kl_coeff=NaN", "lora.targets=[]",
])
def test_a_value_out_of_its_bounds_is_refused(settings: str, small: Small) -> None:
    """Bounds that are more than a minimum or maximum."""
    with pytest.raises(SettingsError) as e:
        apply_settings(small(), [settings])
    key = settings.partition("=")[0]
    ((code, found),) = e.value.codes
    assert code == "bound" and found.startswith(key) and found.removeprefix(key).strip(".0123456789") == ""


@pytest.mark.each(("settings", "num_ranks", "keys"), [
    # the architecture
    ("model.num_dense_layers=5 model.dense_ffn_dim=1", 1, "model.num_dense_layers"),
    ("model.num_dense_layers=1", 1, "model.dense_ffn_dim"),
    ("model.num_kv_heads=3", 1, "model.num_kv_heads"),
    ("model.num_experts_per_token=9", 1, "model.num_experts_per_token"),
    ("model.local_rope_theta=1e4 model.yarn={}", 1, "model.local_rope_theta"),
    ("model.linear_rope_factor=2.0 model.yarn={}", 1, "model.linear_rope_factor"),
    ("model.llama3_rope={} model.yarn={}", 1, "model.llama3_rope.factor"),
    ('model.llama3_rope={"low_freq_factor":4.0}', 1, "model.llama3_rope.low_freq_factor"),
    ("model.rope_share=0.3", 1, "model.rope_share"),
    ("model.rope_share=0.5 model.yarn={}", 1, "model.rope_share"),
    ("model.yarn={} model.rope_theta=1", 1, "model.rope_theta"),
    ("model.yarn.mscale=0.5", 1, "model.yarn.mscale"),
    ("model.attention_pattern=LG", 1, "model.sliding_window_tokens"),
    ("model.attention_pattern=LX model.sliding_window_tokens=8", 1, "model.attention_pattern"),
    ("model.sliding_window_tokens=8", 1, "model.sliding_window_tokens"),
    ("model.layer_windows=[0,8]", 1, "model.layer_windows"),
    ("model.attention_pattern=LG model.sliding_window_tokens=8 model.num_layers=2 model.layer_windows=[0,8]",
     1, "model.layer_windows"),
    ("model.swiglu_limits=[7]", 1, "model.swiglu_limits"),
    ("model.tied_embeddings=true model.num_mtp_layers=1 model.dense_ffn_dim=64 parallel.pp=2", 2,
     "parallel.pp"),
    ("model.attention_pattern=DG", 1, "model.linear_attention"),
    (LINEAR, 1, "model.linear_attention"),
    (f"{LINEAR} model.attention_pattern=DG", 1, ""),
    (f"{MORE_VALUES} model.attention_pattern=DG", 1, "model.linear_attention.num_value_heads"),
    (f"{ODD_HEADS} model.attention_pattern=DG parallel.tp=2 parallel.sp=true", 2, "parallel.tp"),
    (f"{ODD_HEADS} model.attention_pattern=DG parallel.cp=2", 2, "parallel.tp"),
    ("model.attention_output_gate=true model.qkv_bias=true", 1, "model.attention_output_gate"),
    ("model.mtp_attention=L model.num_mtp_layers=1 model.dense_ffn_dim=64", 1, "model.mtp_attention"),
    ("model.num_experts=2e4 model.num_layers=100", 1, "model.num_experts"),
    ("model.num_groups_per_token=2", 1, "model.num_groups_per_token"),
    ("model.router_bias_update=quantile model.router_bias=false", 1, "model.router_bias_update"),
    ("model.num_expert_groups=3", 1, "model.num_expert_groups"),
    ("model.num_expert_groups=4 model.num_experts_per_token=3", 1, "model.num_groups_per_token"),
    (LATENT, 1, ""),
    (f"{LATENT} model.head_dim=30", 1, "model.head_dim"),
    (f"{LATENT} model.num_kv_heads=2", 1, "model.num_kv_heads"),
    (f"{LATENT} model.attention_pattern=LG model.sliding_window_tokens=8", 1, "model.attention_pattern"),
    (f"{LATENT} model.qk_norm=true", 1, "model.qk_norm"),
    (f"{LATENT} model.attention_multiplier=0.5", 1, "model.attention_multiplier"),
    # ids of media, and encoders
    ('model.audio_tokens={"first":0,"size":10} model.image_tokens={"first":10,"size":10}', 1, ""),
    ('model.audio_tokens={"first":10,"size":10} model.image_tokens={"first":0,"size":10}', 1, ""),
    ('model.audio_tokens={"first":0,"size":11} model.image_tokens={"first":10,"size":10}', 1,
     "model.audio_tokens"),
    ('model.image_tokens={"first":512,"size":1}', 1, "model.image_tokens"),
    (vision(placeholder_ids=[]), 1, "model.vision.placeholder_ids"),
    (vision(placeholder_ids=[2048]), 1, "model.vision.placeholder_ids"),
    (vision(image_size=400), 1, "model.vision.image_size"),
    (vision(image_size=28 * 1025), 1, "model.vision.image_size"),
    (vision(hidden_size=1250), 1, "model.vision.hidden_size"),
    (vision(full_attention_layers=[2]), 1, "model.vision.full_attention_layers"),
    (vision(window_size=14), 1, "model.vision.window_size"),
    (audio(num_frames=3010), 1, "model.audio.num_frames"),
    (audio(num_frames=3010, compression=25), 1, "model.audio.num_frames"),
    (audio(num_heads=3), 1, "model.audio.hidden_size"),
    (audio(compression=25, compressor_size=100), 1, "model.audio.compressor_size"),
    (f"{vision()} {audio(placeholder_ids=[5, 6])}", 1, "model.vision.placeholder_ids"),
    (f"{vision()} lora.rank=4 media.train_encoders=true", 1, "media.train_encoders"),
    # the layout
    ("parallel.tp=4 parallel.sp=true", 4, "parallel.tp"),
    ("parallel.tp=2", 2, "parallel.sp"),
    ("parallel.sp=true", 1, "parallel.sp"),
    (f"{LATENT} {DENSE} parallel.tp=2", 2, "parallel.sp"),
    ("parallel.pp=3", 3, "parallel.pp"),
    ("parallel.pp=2 parallel.vpp=4", 2, "parallel.vpp"),
    ("parallel.pipeline_layout=[4]", 1, "parallel.pipeline_layout"),
    ("parallel.pp=2 parallel.pipeline_layout=[1,1,2]", 2, "parallel.pipeline_layout"),
    ("parallel.pp=2 parallel.pipeline_layout=[1,2]", 2, "parallel.pipeline_layout"),
    ("parallel.ep=3", 3, "parallel.ep"),
    ("parallel.etp=5", 5, "parallel.etp"),
    (f"{DENSE} parallel.ep=2", 2, "parallel.ep"),
    ("parallel.overlap_param_gather=true parallel.zero1=true", 1, "parallel.overlap_param_gather"),
    ("parallel.overlap_param_gather=true parallel.overlap_grad_reduce=true", 1,
     "parallel.overlap_param_gather"),
    ("parallel.cp=2 parallel.pp=2", 6, "parallel"),
    ("parallel.ep=2", 3, "parallel"),
    ("model.yarn={} parallel.cp=3 data.phases.0.seq_len=96 train.global_batch_size=1", 3, "parallel.cp"),
    # sources, phases, batches
    ('data.phases=[{"name":"a","tokens":9},{"name":"b"}]', 1, "data.phases"),
    ('data.phases=[{"name":"a"},{"name":"b","seq_len":1000000}]', 1, "data.phases.1.seq_len"),
    ("data.phases.0.blend.web=0", 1, "data.phases.0.blend"),
    ("data.phases.0.min_lr=0.1", 1, "data.phases.0.min_lr"),
    ("data.skip_steps=[[5,4]]", 1, "data.skip_steps"),
    ("train.ramp_from_batch_size=4", 1, "train.ramp_from_batch_size"),
    ("train.ramp_from_batch_size=9 train.ramp_increment=1 train.ramp_steps=5", 1,
     "train.ramp_from_batch_size"),
    ("train.steps=0", 1, "train.steps"),
    ("train.steps=0 train.tokens=1e15", 1, "train.tokens"),
    ("", 3, "train.global_batch_size"),
    ("parallel.cp=2", 32, "train.global_batch_size"),
    ("train.average_last=1", 1, "train.average_last"),
    ("train.average_last=3", 1, "train.average_last"),
    ("train.keep_every_steps=7", 1, "train.keep_every_steps"),
    ("optim.schedule_by=tokens", 1, "optim.schedule_by"),
    ("optim.min_lr=1", 1, "optim.min_lr"),
    # objectives
    ('objective.audio_weight=0.5 model.audio_tokens={"first":0,"size":8}', 1, ""),
    ("distillation.beta=0.5 distillation.top_k=511 distillation.keep_remainder=false", 1, ""),
    ("distillation.top_k=512", 1, "distillation.top_k"),
    ("preference.chosen_coeff=0.1 preference.method=orpo", 1, "preference.chosen_coeff"),
    ("preference.chosen_coeff=0.5 preference.method=grouper", 1, "preference.chosen_coeff"),
    ("rollout.steps_per_round=3", 1, "rollout.prompts_per_round"),
    # the use of GPUs
    (f'{DENSE} gpu.recompute_modules=["mlp"]', 1, "gpu.recompute_modules"),
    (f"{SELECTIVE}[]", 1, "gpu.recompute_modules"),
    (f'{DENSE} {SELECTIVE}["moe"]', 1, "gpu.recompute_modules"),
    (f'{DENSE} {SELECTIVE}["layernorm"]', 1, "gpu.recompute_modules"),
    (f'model.num_shared_experts=0 {SELECTIVE}["shared_experts"]', 1, "gpu.recompute_modules"),
    (f'{SELECTIVE}["moe","moe_act"]', 1, "gpu.recompute_modules"),
    (f'{SELECTIVE}["mlp"]', 1, "gpu.recompute_modules"),
    (f'{SELECTIVE}["shared_experts"] gpu.shared_expert_overlap=on', 1, "gpu.recompute_modules"),
    ('train.recompute=true gpu.offload_modules=["core_attn"]', 1, "gpu.offload_modules"),
    ('gpu.offload_modules=["attn_proj"]', 1, "gpu.offload_modules"),
    (f'{DENSE} gpu.offload_modules=["expert_fc1"]', 1, "gpu.offload_modules"),
    (f'{DENSE} gpu.offload_modules=["mlp_norm"]', 1, "gpu.offload_modules"),
    (f'{GRAPHS} {SELECTIVE}["core_attn","moe_act"]', 1, ""),
    (f"{GRAPHS} {DENSE}", 1, "gpu.cuda_graphs"),
    *((f"{GRAPHS} objective.name={name}", 1, "gpu.cuda_graphs") for name in ("policy", "preference")),
    ('gpu.cuda_graphs=["moe_preprocess"]', 1, "gpu.cuda_graphs"),
    (f"{GRAPHS} train.recompute=true", 1, "gpu.cuda_graphs"),
    (f'{GRAPHS} {SELECTIVE}["layernorm","shared_experts"]', 1, ""),
    (f'{GRAPHS} {SELECTIVE}["moe"]', 1, "gpu.cuda_graphs"),
    (f'{ROUTERS} {SELECTIVE}["layernorm"]', 1, ""),
    (f'{GRAPHS} {SELECTIVE}["shared_experts"] {QUANTISED}', 1, "gpu.cuda_graphs"),
    (f"{GRAPHS} {QUANTISED} train.fp8=nvfp4 model.num_mtp_layers=1 model.mtp_experts=true", 1,
     "gpu.cuda_graphs"),
    (f'{GRAPHS} gpu.offload_modules=["moe_act"]', 1, "gpu.cuda_graphs"),
    (f"{GRAPHS} {PASSES}", 2, ""),
    (f"{GRAPHS} {PASSES.replace('micro_batches', 'weight_gradients')}", 2, "gpu.cuda_graphs"),
    (f"{GRAPHS} gpu.shared_expert_overlap=on", 1, "gpu.cuda_graphs"),
    (f"{GRAPHS} gpu.permute_fusion=off", 1, "gpu.cuda_graphs"),
    (f"{GRAPHS} {PADDED}", 1, "gpu.cuda_graphs"),
    # outside of the router's graph
    (f"{ROUTERS} gpu.permute_fusion=off gpu.shared_expert_overlap=on {PADDED}", 1, ""),
    (f"{ROUTERS} {PASSES.replace('micro_batches', 'weight_gradients')}", 2, ""),
    (f"{GRAPHS} gpu.permute_fusion=off parallel.expert_dispatcher=allgather", 1, ""),
    ("gpu.grad_dtype=bf16 train.precision=fp32", 1, "gpu.grad_dtype"),
    (f"{BF16_SUMS} train.global_batch_size=8", 1, ""), (f"{BF16_SUMS} train.global_batch_size=16", 2, ""),
    (f"{BF16_SUMS} train.global_batch_size=9", 1, "gpu.grad_dtype"),
    (f"{BF16_SUMS} train.global_batch_size=8 data.phases.0.global_batch_size=32", 2, "gpu.grad_dtype"),
    ("gpu.moment_dtype=bf16", 1, "gpu.moment_dtype"),
    ("gpu.optimizer_offload=0.5", 1, "gpu.optimizer_offload"),
    (f"{OFFLOAD} gpu.moment_dtype=bf16", 1, "gpu.optimizer_offload"),
    (OFFLOAD, 2, ""),
    (f"{OFFLOAD} optim.name=muon", 2, "gpu.optimizer_offload"),
    (f'{OFFLOAD} optim.groups=[{{"pattern":"decoder.*","optimizer":"muon"}}]', 2, "gpu.optimizer_offload"),
    ("gpu.rope_fusion=on parallel.cp=2", 2, "gpu.rope_fusion"),
    ("gpu.attention=flash parallel.cp=8", 8, "gpu.attention"),
    ("gpu.shared_expert_overlap=on model.num_shared_experts=0", 1, "gpu.shared_expert_overlap"),
    ("gpu.shared_expert_overlap=on parallel.ep=2 parallel.expert_dispatcher=deepep", 2,
     "gpu.shared_expert_overlap"),
    ("parallel.expert_dispatcher=deepep", 1, "parallel.expert_dispatcher"),
    ("parallel.expert_dispatcher=hybridep parallel.ep=2 train.precision=fp32", 2,
     "parallel.expert_dispatcher"),
    (PASSES, 2, ""), (f"{PASSES} {LINEAR}", 2, "model.linear_attention parallel.expert_overlap"),
    (PASSES.replace("micro_batches", "weight_gradients"), 2, ""),
    (PASSES.replace("ep=2", "ep=1"), 1, "parallel.expert_overlap"),
    (f"{PASSES} parallel.expert_dispatcher=allgather", 2, "parallel.expert_overlap"),
    (f"{PASSES} parallel.pp=2", 4, "parallel.expert_overlap"),
    (f"{PASSES} model.num_experts=2 model.num_experts_per_token=1", 2, "parallel.expert_overlap"),
    (f"{PASSES} train.recompute=true", 2, "parallel.expert_overlap"),
    (f'{PASSES} {SELECTIVE}["moe"]', 2, "parallel.expert_overlap"),
    (f"{PASSES} gpu.shared_expert_overlap=on", 2, "parallel.expert_overlap"),
    (f'{PASSES} gpu.offload_modules=["moe_act"]', 2, "parallel.expert_overlap"),
    (f"{DENSE} parallel.expert_overlap=weight_gradients", 1, "parallel.expert_overlap"),
    ("parallel.delay_weight_grads=true", 1, "parallel.delay_weight_grads"),
    (f'{PASSES} parallel.delay_weight_grads=true optim.groups=[{{"pattern":"*","frozen":true}}]', 2,
     "parallel.delay_weight_grads"),
    ("gpu.pad_buckets=on", 1, "gpu.pad_buckets"),
    ("gpu.profile_first_step=3 gpu.profile_last_step=2", 1, "gpu.profile_first_step"),
    # guards and measurements
    ("guards.probe_every_steps=5", 1, "guards.probe_every_steps"),
    ('evaluate.background.tasks=["ppl"]', 1, "evaluate.background.tasks"),
    (LM, 1, "evaluate.lm.tasks"),
    ('evaluate.background.tasks=["ppl","ppl"] train.export_every_checkpoints=1', 1,
     "evaluate.background.tasks"),
    (f'{LM} evaluate.lm.tasks=["x,y"]', 1, "evaluate.lm.tasks"),
    (f'{LM} evaluate.lm.tasks=["x","x"]', 1, "evaluate.lm.tasks"),
    ("evaluate.background.where=slurm", 1, "evaluate.background.where"),
])
def test_a_broken_rule_names_its_key(settings: str, num_ranks: int, keys: str, small: Small) -> None:
    problems = apply_settings(small(), settings.split()).problems(num_ranks)
    assert [(problem.code, problem.key) for problem in problems] == [("rule", key) for key in keys.split()]


@pytest.mark.each(("recipe", "settings", "key"), [
    ("tiny-qwen2", 'lora.targets=["lm_head"]', "lora.targets"),
    ("tiny-qwen2", 'lora.targets=["embed_tokens"]', "lora.targets"),
    ("tiny-qwen3", 'lora.dora=true lora.targets=["embed_tokens"]', "lora.dora"),
    ("tiny-qwen3", 'lora.dora=true lora.targets=["q_proj","lm_head"]', "lora.dora"),
    ("tiny-solar-open", "lora.dora=true", "lora.dora"),
    ("tiny-k-exaone", 'lora.targets=["embed_tokens"] parallel.pp=2', "lora.targets"),
    ("tiny-qwen3", "optim.name=muon", "lora.rank"),
    ("tiny-qwen3", "parallel.zero1=true parallel.overlap_grad_reduce=true parallel.overlap_param_gather=true",
     "lora.rank"),
    ("tiny-solar-open", "gpu.shared_expert_overlap=on", "lora.rank"),
    ("tiny-solar-open", 'gpu.cuda_graphs=["moe_router"]', "lora.rank"),
    ("tiny-solar-open", PASSES, "lora.rank"),
    ("tiny-solar-open", 'train.recompute=false gpu.offload_modules=["expert_fc1"]', "lora.targets"),
])
def test_settings_incompatible_with_adapters_are_named(recipe: str, settings: str, key: str) -> None:
    problems = apply_settings(recipes.get(recipe), ["lora.rank=4", *settings.split()]).problems(2)
    assert [problem.key for problem in problems if problem.key.startswith("lora.")] == [key]


def test_every_problem_is_listed_at_once_with_field_value_and_rule(small: Small) -> None:
    with pytest.raises(SettingsError) as e:
        apply_settings(small(), ["train.steps=-5", "optim.lr=-1", "model.num_heads=0", 'lora.targets=["x"]'])
    assert e.value.codes == [("bound", "model.num_heads"), ("bound", "optim.lr"), ("bound", "train.steps"),
                             ("choice", "lora.targets.0")]
    wrong = apply_settings(small(), ["model.num_kv_heads=3", "parallel.tp=3", "optim.min_lr=1"])
    with pytest.raises(SettingsError) as e:
        wrong.check(3)
    head, *lines = str(e.value).splitlines()
    assert head == f"recipe small: {len(lines)} problems" and ("rule", "optim.min_lr") in e.value.codes
    assert "  parallel.tp = 3 must divide model.num_heads = 4; use one of 1, 2, 4" in lines
    assert "  model.num_kv_heads = 3 must divide model.num_heads = 4; set model.num_heads=6" in lines


@pytest.mark.each(("setting", "write"), [
    ("optim.warmup_steps=0.03", "optim.warmup_steps=3"),
    ("train.eval_every_steps=10%", "train.eval_every_steps=10"),
    ("optim.min_lr=10%", "optim.min_lr=0.0001")])
def test_a_share_is_written_as_its_number(small: Small, setting: str, write: str) -> None:
    with pytest.raises(SettingsError) as e:
        apply_settings(small(), ["train.steps=100", "optim.lr=1e-3", setting])
    assert e.value.fix and e.value.fix.options == ("--set", write)


def test_bounds_of_settings_from_code_are_checked_before_rules(small: Small) -> None:
    with pytest.raises(SettingsError) as e:
        small(num_kv_heads=0).check()
    assert e.value.codes == [("bound", "model.num_kv_heads")]
