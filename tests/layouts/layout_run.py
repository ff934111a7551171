"""Functions that run inside ranks: training steps and gradients of a real `Trainer`, as numbers and
checkpoints."""

import functools
import hashlib
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from megatron_sov import recipes
from megatron_sov.checkpoint.sharded_tensors import TensorReader
from megatron_sov.engine.model.local_shards import list_local_shards
from megatron_sov.engine.parallel import world
from megatron_sov.model.config import RunConfig, apply_settings
from megatron_sov.post.sft import SupervisedFineTuning
from megatron_sov.runs.folder import RunFolder
from megatron_sov.train.data.sources import open_sources, tokenizer_folder
from megatron_sov.train.loop import train_step
from megatron_sov.train.objectives.data_objective import LanguageModelling
from megatron_sov.train.trainer import Trainer
from tests.checkpoints import save_checkpoint

PATCHES = ("/layout_proof/cpu_shims.py", "/layout_proof/library_patches.py")
SMALL = ("model.vocab_size=368", "model.hidden_size=32", "model.num_heads=4", "model.num_kv_heads=2",
         "model.head_dim=8", "model.expert_ffn_dim=16", "train.global_batch_size=8",
         "train.micro_batch_size=2", "train.steps=20", "train.head_chunk_tokens=24", "optim.warmup_steps=2",
         "data.heldout_tokens=128")
FAMILIES = {
    "tiny-solar-open": ("model.num_layers=4", "model.num_experts=4",
                        'model.yarn={"factor": 4.0, "original_max_position_tokens": 16}'),
    "tiny-k-exaone": ("model.num_experts=4", "model.dense_ffn_dim=48", "model.sliding_window_tokens=8"),
    "tiny-k-exaone2": ("model.num_experts=4", "model.dense_ffn_dim=48", "model.sliding_window_tokens=8",
                       "model.layer_windows=[0, 12, 8, 8, 8, 0]",
                       "model.swiglu_limits=[0, 0.3, 0, 0, 0.2, 0.1]"),
    "tiny-qwen2": ("model.dense_ffn_dim=48",),
    "tiny-qwen3": ("model.dense_ffn_dim=48", "model.tied_embeddings=true"),
    "tiny-qwen3-moe": ("model.num_experts=4", "model.seq_aux_loss_coeff=0.01",),
    "tiny-exaone4": ("model.dense_ffn_dim=48", "model.sliding_window_tokens=8"),
    "tiny-gemma3": ("model.dense_ffn_dim=48", "model.sliding_window_tokens=8", "model.attention_pattern=LG"),
    "tiny-deepseek-v3": ("model.num_experts=4", "model.num_expert_groups=2", "model.num_groups_per_token=1",
                         "model.dense_ffn_dim=48", "model.num_kv_heads=4", "model.head_dim=20",
                         'model.latent_attention={"kv_lora_rank": 12, "q_lora_rank": 20, '
                         '"qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10}',
                         'model.yarn={"factor": 4.0, "original_max_position_tokens": 16, "mscale": 0.7}'),
    "tiny-hyperclovax": ("model.dense_ffn_dim=48",),
}
FAMILIES["tiny-solar-open2"] = (
    "model.num_experts=4",
    'model.linear_attention={"num_key_heads": 4, "num_value_heads": 4, "key_head_dim": 6, '
    '"value_head_dim": 6, "gate_rank": 6, "negative_eigenvalues": true}')


def find_caller() -> str:
    """Return `file:function` of the innermost frame in this project or Megatron-Core, without comprehensions
    and lambdas."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if ("/megatron" in code.co_filename and not code.co_filename.endswith(PATCHES)
                and not code.co_name.startswith("<")):
            return f"{Path(code.co_filename).name}:{code.co_name}"
        frame = frame.f_back
    return "outside"


def build_small_config(recipe: str, settings: list[str], paths: list[str], objective: str) -> RunConfig:
    """Return a recipe with a few thousand parameters and samples of 32 tokens; `settings` take precedence."""
    base = recipes.get(recipe)
    phases = 'data.phases=[{"name": "main", "seq_len": 32}]'
    chosen = [*SMALL, *FAMILIES[recipe], f"objective.name={objective}", phases, *settings]
    config = apply_settings(base, chosen)
    return apply_settings(config, [f"data.paths={{{', '.join(f'{chr(34)}{p}{chr(34)}: 1' for p in paths)}}}"])


def build_trainer(config: RunConfig, run: str = "not-written") -> Trainer:
    place = world.join_world(config.parallel)
    config.check(place.size)
    factory = LanguageModelling if config.objective.name == "lm" else SupervisedFineTuning
    sources = open_sources(config.data.paths, config.model.vocab_size)
    return Trainer(config, place, RunFolder(Path(run)), sources, factory)


def run_step(trainer: Trainer) -> dict[str, Any]:
    result = train_step(trainer)
    biases: list[Any] = [None] * trainer.world.size
    dist.all_gather_object(biases, {m.layer_number: m.expert_bias.tolist() for m in trainer.model.modules()
                                    if getattr(m, "expert_bias", None) is not None})
    router_biases = {layer: bias for part in biases for layer, bias in part.items()}
    return {"loss": result.loss, "grad_norm": result.grad_norm, "lr": result.lr, "tokens": result.num_tokens,
            **{f"term {name}": value for name, value in result.losses.items()},
            **{f"source {name}": value for name, value in result.losses_by_source.items()},
            **({"load": trainer.expert_load.gather().tolist()} if trainer.config.model.num_experts else {}),
            **({"router bias": [router_biases[i] for i in sorted(router_biases)]} if router_biases else {})}


def compute_first_batch(recipe: str, settings: list[str], paths: list[str], objective: str,
                        out: str) -> dict[str, Any]:
    """Return the losses of the first global batch and the batch itself; write checkpoints `out`/weights and
    `out`/gradients."""
    config = build_small_config(recipe, settings, paths, objective)
    trainer = build_trainer(config)
    # before the step, which updates router biases
    state = {"step": 0, "tokens": 0}
    save_checkpoint(Path(out) / "weights", trainer.model, None, state, config.to_dict(),
              tokenizer_folder(trainer.sources))
    batch = trainer.objective.prepare(trainer.objective.collect(trainer.policy, 0))
    sums = trainer.forward_backward.compute_gradients(batch, trainer.objective, 1)
    losses = {t: total / batch.targets[t] for t, total in sums.terms.items()}
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.copy_(parameter.main_grad)
    save_checkpoint(Path(out) / "gradients", trainer.model, None, state, config.to_dict(),
              tokenizer_folder(trainer.sources))
    return {"losses": losses, "loss": sum(trainer.objective.coefficients[t] * v for t, v in losses.items()),
            "micro_batches": [{"bounds": m.inputs.cu_seqlens.tolist(), "padding": m.inputs.padding.tolist(),
                               "tokens": m.inputs.tokens.tolist(), "labels": m.labels.tolist(),
                               "weights": m.weights.tolist(), "types": m.types.tolist()}
                              for m in batch.micro_batches]}


def train_and_continue(recipe: str, settings: list[str], paths: list[str], reference: str, *,
                       is_reference: bool, num_steps: int = 2) -> dict[str, Any]:
    """Train from scratch, then repeat the second half from the reference's checkpoint; return the steps and
    the largest differences to the reference's checkpoints.

    `reference` is the run folder of the single process, which trains first.
    """
    trainer = build_trainer(build_small_config(recipe, settings, paths, "lm"), reference)
    trainer.folder.checkpoints.mkdir(parents=True, exist_ok=True)
    scratch, half = [], num_steps // 2
    for _ in range(num_steps):
        scratch.append(run_step(trainer))
        if is_reference and trainer.step in (half, num_steps):
            trainer.save()
    trainer.checkpointer.finish()
    last = trainer.folder.checkpoint(num_steps)
    result = {"scratch": scratch, "scratch differences": compute_differences(trainer, last)}
    trainer.resume(trainer.folder.checkpoint(half))
    result |= {"continued": [run_step(trainer) for _ in range(num_steps - half)],
               "continued differences": compute_differences(trainer, last)}
    trainer.close()
    return result


@functools.cache
def read_checkpoint_tensors(path: Path, part: str) -> dict[str, tuple[torch.Tensor, float]]:
    """Return a checkpoint's tensors, each with its largest absolute value."""
    reader = TensorReader(path, part)
    tensors = {key: reader.read(key) for key in reader.keys()}  # noqa: SIM118  (a reader is no dict)
    return {key: (tensor, max(float(tensor.abs().max()), 1e-12)) for key, tensor in tensors.items()}


def compute_differences(trainer: Trainer, path: Path) -> dict[str, float]:
    """Return the largest differences of weights and optimizer state to a checkpoint, relative to each
    tensor's largest value."""
    largest_differences = {}
    for part, blocks in (("model", list_local_shards(trainer.model)),
                         ("optimizer", trainer.optimizer.state_shards())):
        differences = []
        for block in blocks:
            tensor, largest = read_checkpoint_tensors(path, part)[block.key]
            expected = tensor[tuple(slice(o, o + n) for o, n in zip(block.offset, block.shape, strict=True))]
            differences.append(float((expected.reshape(block.data.shape) - block.data).abs().max()) / largest)
        largest_differences[part] = max(differences)
    return largest_differences


def train_with_overlap(settings: list[str], paths: list[str]) -> dict[str, Any]:
    """Train, evaluate, train: return weight hashes after updates and evaluation, and the number of overlapped
    reductions."""
    trainer = build_trainer(build_small_config("tiny-k-exaone", settings, paths, "lm"))
    groups = [g for chunk in trainer.optimizer.wrapped
              for g in chunk.bucket_groups + chunk.expert_parallel_bucket_groups]
    finalize, reductions_in_flight = trainer.model.config.finalize_model_grads_func, []

    def count_reductions(*args: Any, **kwargs: Any) -> None:
        reductions_in_flight.append(sum(g.grad_reduce_handle is not None for g in groups))
        finalize(*args, **kwargs)

    trainer.model.config.finalize_model_grads_func = count_reductions
    losses = [train_step(trainer).loss for _ in range(2)]
    updated = hash_weights(trainer.model)
    heldout = {name: result.loss for name, result in trainer.evaluate().items()}
    evaluated = hash_weights(trainer.model)
    losses += [train_step(trainer).loss for _ in range(2)]
    trainer.model.finish_param_gather()
    return {"losses": losses, "heldout": heldout, "updated": updated, "evaluated": evaluated,
            "final": hash_weights(trainer.model), "groups": len(groups),
            "reductions in flight": reductions_in_flight, "dp_rank": trainer.world.dp_rank}


def hash_weights(model: torch.nn.Module) -> str:
    """Hash this process's weights."""
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
