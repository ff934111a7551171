"""What settings of Megatron-LM and Megatron-Bridge become here: the same, nothing since nothing is lost, or
nothing since it does not exist here."""

from __future__ import annotations

SAME = {
    "tensor_model_parallel_size": "parallel.tp", "pipeline_model_parallel_size": "parallel.pp",
    "context_parallel_size": "parallel.cp", "expert_model_parallel_size": "parallel.ep",
    "expert_tensor_parallel_size": "parallel.etp", "sequence_parallel": "parallel.sp",
    "use_distributed_optimizer": "parallel.zero1", "overlap_grad_reduce": "parallel.overlap_grad_reduce",
    "overlap_param_gather": "parallel.overlap_param_gather", "global_batch_size": "train.global_batch_size",
    "micro_batch_size": "train.micro_batch_size", "seed": "train.seed",
    "hidden_dropout": "train.hidden_dropout", "save_interval": "train.checkpoint_every_steps",
    "eval_interval": "train.eval_every_steps", "log_interval": "train.log_every_steps",
    "async_save": "train.async_save", "deterministic_mode": "train.deterministic", "lr": "optim.lr",
    "min_lr": "optim.min_lr", "weight_decay": "optim.weight_decay", "adam_beta1": "optim.beta1",
    "adam_beta2": "optim.beta2", "adam_eps": "optim.eps", "clip_grad": "optim.clip_grad",
    "muon_momentum": "optim.muon_momentum", "wandb_project": "obs.wandb_project",
    "moe_aux_loss_coeff": "model.seq_aux_loss_coeff",
}
"""Theirs -> ours, where a value means the same."""
UNSAID = {
    "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_eps": 1e-08, "weight_decay": 0.01, "clip_grad": 1.0,
    "hidden_dropout": 0.1, "seed": 1234, "lr_decay_style": "linear", "lr_warmup_iters": 0, "min_lr": 0.0,
}
"""What Megatron takes where a whole configuration says nothing, and ours would be another value."""
WORKED_OUT = {
    "train_iters", "train_samples", "seq_length", "sequence_length", "lr_decay_style", "lr_decay_iters",
    "lr_decay_samples", "lr_warmup_iters", "lr_warmup_samples", "lr_warmup_fraction", "lr_wsd_decay_iters",
    "lr_wsd_decay_samples", "lr_wsd_decay_style", "bf16", "fp16", "mixed_precision", "optimizer", "fp8",
    "fp8_recipe", "recompute_granularity", "virtual_pipeline_model_parallel_size", "rampup_batch_size",
    "num_layers_per_virtual_pipeline_stage", "moe_token_dispatcher_type", "moe_flex_dispatcher_backend",
    "moe_enable_deepep", "recompute_modules", "attention_dropout", "tensorboard_dir",
    "decoupled_weight_decay",
}
"""Theirs that are read together with others."""
NO_NEED = {
    "use_mcore_models": "it always is", "transformer_impl": "Transformer Engine is taken on GPUs in bf16",
    "use_flash_attn": "the attention is chosen by the hardware",
    "attention_backend": "chosen by the hardware", "ckpt_format": "checkpoints belong to no layout",
    "dist_ckpt_format": "checkpoints belong to no layout", "ckpt_fully_parallel_save": "it always is",
    "fully_parallel_save": "it always is", "fully_parallel_load": "it always is",
    "use_dist_ckpt": "it always is", "num_workers": "samples are read by memory map",
    "data_cache_path": "no index is built, so none is kept",
    "path_to_cache": "no index is built, so none is kept", "distributed_backend": "chosen by the hardware",
    "log_throughput": "events always have it", "log_params_norm": "events have the gradient's norm",
    "log_timers_to_tensorboard": "events have the times", "timing_log_level": "events have the times",
    "manual_gc": "done by the trainer", "manual_gc_interval": "done by the trainer",
    "calculate_per_token_loss": "losses are sums divided once by global counts, always",
    "moe_grouped_gemm": "taken where it serves", "moe_permute_fusion": "gpu.* chooses fusions",
    "cross_entropy_loss_fusion": "the head runs in chunks",
    "accumulate_allreduce_grads_in_fp32": "gpu.grad_dtype", "attention_softmax_in_fp32": "it always is",
    "bias_dropout_fusion": "taken where it serves", "masked_softmax_fusion": "not used",
    "apply_rope_fusion": "gpu.* chooses fusions", "gradient_accumulation_fusion": "taken where it serves",
    "bias_swiglu_fusion": "taken where it serves", "grad_reduce_in_fp32": "gpu.grad_dtype has this default",
    "exit_signal_handler": "a signal always saves first",
    "use_checkpoint_args": "a checkpoint's own settings are read",
    "group_query_attention": "num_query_groups says it", "distributed_timeout_minutes": "parallel.timeout_s",
    "params_dtype": "train.precision says it", "pipeline_dtype": "train.precision says it",
    "eval_iters": "data.heldout_tokens says how much is read",
    "moe_router_dtype": "routers compute in float32, always",
    "make_vocab_size_divisible_by": "padding follows from the layout, and no checkpoint has it",
    "use_cpu_initialization": "weights are a function of the seed",
}
"""Theirs that have no counterpart, and that nothing is lost without: why."""
INSTEAD = {
    "data_path": "run `sov-data adopt NAME=PREFIX ... --tokenizer DIR --output DIR`, and pass --data "
        "DIR[:weight]",
    "train_data_path": "run `sov-data adopt` on each pair, and pass --data DIR[:weight]",
    "blend": "run `sov-data adopt NAME=PREFIX ...`, and pass --data DIR[:weight]",
    "split": "pass --heldout SHARE to `sov-data adopt`: documents are held out, by their text",
    "tokenizer_model": "run `sov-tokenizer import` on it, and pack or adopt data with that",
    "tokenizer_type": "run `sov-tokenizer import` on its files",
    "vocab_file": "run `sov-tokenizer import` on its files",
    "merge_file": "run `sov-tokenizer import` on its files", "save": "pass --run DIR",
    "load": "run `convert from-megatron` on it, and pass --from; a run of ours goes on with --resume",
    "pretrained_checkpoint": "run `convert from-megatron` on it, and pass --from",
    "finetune": "--from begins a run with a checkpoint's weights alone",
    "reset_position_ids": "documents in a row never see each other, and positions begin anew in each",
    "reset_attention_mask": "documents in a row never see each other",
    "eod_mask_loss": "documents in a row never see each other; the loss is taken of eos too",
    "fp16": "use bf16 (train.precision): there is no loss scaling here",
    "loss_scale": "use bf16 (train.precision)", "initial_loss_scale": "use bf16 (train.precision)",
    "decoupled_lr": "set optim.groups for the embedding and the head, with lr_scale",
    "decoupled_min_lr": "set optim.groups for the embedding and the head, with lr_scale",
    "start_weight_decay": "weight decay is constant here",
    "end_weight_decay": "weight decay is constant here",
    "recompute_method": "train.recompute = true recomputes every layer",
    "recompute_num_layers": "train.recompute = true recomputes every layer",
    "distribute_saved_activations": "not done; parallel.sp does",
    "moe_z_loss_coeff": "there is no z-loss here", "moe_input_jitter_eps": "there is no jitter here",
    "moe_expert_capacity_factor": "no token is dropped here",
    "exit_duration_in_mins": "submit with the cluster's time limit: a run saves before it ends",
    "exit_interval": "set train.steps", "tp_comm_overlap": "there is no such overlap here",
    "wandb_exp_name": "the run's folder names it", "wandb_entity": "set WANDB_ENTITY",
    "use_megatron_fsdp": "use parallel.zero1 with tp and pp",
    "use_torch_fsdp2": "use parallel.zero1 with tp and pp",
    "optimizer_cpu_offload": "see gpu.* for what may lie in host memory",
    "pipeline_model_parallel_layout": "set parallel.pipeline_layout, the layers of each stage",
    "num_layers_in_first_pipeline_stage": "set parallel.pipeline_layout",
    "num_layers_in_last_pipeline_stage": "set parallel.pipeline_layout",
    "account_for_embedding_in_pipeline_split": "set parallel.pipeline_layout",
    "account_for_loss_in_pipeline_split": "set parallel.pipeline_layout",
}
"""Theirs that have no counterpart as a setting: what to do."""
