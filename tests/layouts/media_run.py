"""Functions that run inside ranks: training steps on rows with
images and audio, as numbers and checkpoints."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from megatron_sov import recipes
from megatron_sov.checkpoint.sharded_tensors import TensorReader
from megatron_sov.engine.model.local_shards import list_local_shards
from megatron_sov.engine.parallel import world
from megatron_sov.model.config import apply_settings
from megatron_sov.model.modality import PICTURES, SOUNDS, EncoderInput, EncoderInputs, take_records
from megatron_sov.omni.media.banks import BankShape
from megatron_sov.runs.folder import RunFolder
from megatron_sov.train.data.sources import Source
from megatron_sov.train.loop import train_step
from megatron_sov.train.objectives.data_objective import LanguageModelling
from megatron_sov.train.trainer import Trainer
from tests.checkpoints import save_checkpoint

IMAGE_PAD, AUDIO_PAD = 5, 6
VISION = {"kind": "siglip", "placeholder_ids": [IMAGE_PAD], "image_size": 8, "patch_size": 4,
          "hidden_size": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 24, "adapter": "mlp"}
AUDIO = {"kind": "qwen2_audio", "placeholder_ids": [AUDIO_PAD], "num_mels": 4, "num_frames": 60,
         "hidden_size": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 24, "compression": 5,
         "compressor_size": 16, "compressor_head_dim": 8, "compressor_state_size": 4}
SMALL = ("model.vocab_size=96", "model.hidden_size=32", "model.num_heads=4", "model.num_kv_heads=2",
         "model.head_dim=8", "model.dense_ffn_dim=48", "train.global_batch_size=8",
         "train.micro_batch_size=2", "train.steps=20", "train.head_chunk_tokens=24",
         "optim.warmup_steps=2", "model.init_std=0.1", 'data.phases=[{"name": "main", "seq_len": 32}]',
         'model.audio_tokens={"first": 60, "size": 16}', 'model.image_tokens={"first": 76, "size": 20}',
         "objective.audio_weight=0.5", "objective.image_weight=2.0", "media.train_encoders=true",
         "data.paths={}")


class Documents:
    """Documents of 5 to 40 tokens with images of 4 features and audio of 3; samples end inside some of them.
    The last third is text only."""

    is_plain = False
    columns = ()
    banks = {PICTURES: BankShape(PICTURES, (3, 8, 8), 4, (IMAGE_PAD,)),
             SOUNDS: BankShape(SOUNDS, (4, 60), 3, (AUDIO_PAD,), 16000, 160)}

    def __init__(self, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.records = {PICTURES: random.integers(0, 256, (40, 3, 8, 8), dtype=np.uint8),
                        SOUNDS: random.normal(size=(40, 4, 60)).astype(np.float16)}
        self.ids: list[np.ndarray] = []
        self.features: list[np.ndarray] = []
        for document in range(60):
            ids, features = list(random.integers(10, 96, random.integers(1, 6))), [-1] * 40
            features = features[:len(ids)]
            for pad, slots in ((IMAGE_PAD, 4), (AUDIO_PAD, 3)) * 2:
                if document < 40 and random.random() < 0.7:
                    row = int(random.integers(40))
                    ids += [pad] * slots
                    features += [row * slots + slot for slot in range(slots)]
                text = list(random.integers(10, 96, random.integers(1, 8)))
                ids, features = ids + text, features + [-1] * len(text)
            self.ids.append(np.array(ids))
            self.features.append(np.array(features))
        self.lengths = np.array([len(ids) for ids in self.ids])

    def tokens(self, document: int, start: int, count: int) -> np.ndarray:
        """Return token ids."""
        return self.ids[document][start:start + count].astype(np.int64)

    def loss_weights(self, document: int, start: int, count: int) -> np.ndarray:
        """Return 0 for placeholders, else 1."""
        return (self.tokens(document, start, count) >= 10).astype(np.float32)

    def types(self, document: int, start: int, count: int) -> np.ndarray:
        """Return zeros."""
        return np.zeros(count, np.uint8)

    def encoder_inputs(self, document: int, start: int, count: int) -> EncoderInputs:
        """Return the images and audio of some tokens."""
        tokens, features = self.tokens(document, start, count), self.features[document][start:start + count]
        inputs: dict[str, EncoderInput] = {}
        for kind, bank in self.banks.items():
            is_placeholder = np.isin(tokens, bank.placeholder_ids)
            if is_placeholder.any():
                places = np.flatnonzero(is_placeholder)
                inputs[kind] = take_records(places, features[is_placeholder], self.records[kind], bank.slots)
        return inputs


def build_trainer(recipe: str, settings: list[str], run: str = "not-written") -> Trainer:
    """Return a trainer of a tiny model with both encoders."""
    both = [f"model.vision={json.dumps(VISION)}", f"model.audio={json.dumps(AUDIO)}"]
    config = apply_settings(recipes.get(recipe), [*both, *SMALL, *settings])
    documents = Documents()
    source = Source("media", None, "text", {}, {"train": int(documents.lengths.sum()), "heldout": 0}, 1.0,
                    train_documents=documents, banks=documents.banks)
    rank_world = world.join_world(config.parallel)
    config.check(rank_world.size)
    return Trainer(config, rank_world, RunFolder(Path(run)), [source], LanguageModelling)


def compute_first_batch(recipe: str, settings: list[str], out: str) -> dict[str, Any]:
    """Return the losses of the first global batch; write checkpoints `out`/weights and `out`/gradients."""
    result = build_trainer(recipe, settings)
    config, state = result.config, {"step": 0, "tokens": 0}
    save_checkpoint(Path(out) / "weights", result.model, None, state, config.to_dict(), None)
    batch = result.objective.prepare(result.objective.collect(result.policy, 0))
    sums = result.forward_backward.compute_gradients(batch, result.objective, 1)
    trained_ids = {id(p) for chunk in result.optimizer.wrapped for p in chunk.param_to_bucket_group}
    frozen = [name for chunk in result.model.chunks for name, p in chunk.named_parameters()
              if id(p) not in trained_ids]
    moments = sorted({b.key for b in result.optimizer.state_shards() if b.key.startswith("exp_avg/")})
    with torch.no_grad():
        for parameter in result.model.parameters():
            gradient = getattr(parameter, "main_grad", None)
            parameter.copy_(torch.zeros_like(parameter) if gradient is None else gradient)
    save_checkpoint(Path(out) / "gradients", result.model, None, state, config.to_dict(), None)
    return {"losses": {t: total / batch.targets[t] for t, total in sums.terms.items()},
            "meters": sums.meters, "frozen": frozen, "moments": moments,
            "micro_batches": [{"bounds": m.inputs.cu_seqlens.tolist(), "tokens": m.inputs.tokens.tolist(),
                               "labels": m.labels.tolist(), "weights": m.weights.tolist(),
                               "media": {kind: {"places": part.places.tolist(),
                                                "features": part.features.tolist(),
                                                "records": np.stack(part.records).tolist()}
                                         for kind, part in (m.inputs.encoder_inputs or {}).items()}}
                              for m in batch.micro_batches]}


def run_step(trainer: Trainer) -> dict[str, Any]:
    """Train a step; return its loss and a hash of weights and optimizer state."""
    loss = train_step(trainer).loss
    digest = hashlib.sha256()
    for block in (*list_local_shards(trainer.model), *trainer.optimizer.state_shards()):
        digest.update(block.key.encode() + block.data.detach().contiguous().numpy().tobytes())
    return {"loss": loss, "state": digest.hexdigest()}


def train_with_checkpoint(settings: list[str], run: str) -> list[dict[str, Any]]:
    """Train two steps, with a checkpoint after the first."""
    result = build_trainer("tiny-qwen3", settings, run)
    result.folder.checkpoints.mkdir(parents=True, exist_ok=True)
    steps = [run_step(result)]
    result.save()
    result.checkpointer.finish()
    steps.append(run_step(result))
    return steps


def resume_training(settings: list[str], run: str) -> dict[str, Any]:
    """Train the second step from the checkpoint of the first."""
    result = build_trainer("tiny-qwen3", settings)
    result.resume(RunFolder(Path(run)).checkpoint(1))
    return run_step(result)


def start_with_encoders(plain: str, encoder: str) -> dict[str, list[str]]:
    """Start from a checkpoint without encoders, with a picture encoder from a folder; return the tensors of
    the checkpoint, of the folder, and of neither.

    `plain` is the checkpoint, which is written first.
    """
    without_encoders = build_trainer("tiny-qwen3", ["model.vision=null", "model.audio=null"])
    save_checkpoint(Path(plain), without_encoders.model, None, {"step": 0, "tokens": 0},
                    without_encoders.config.to_dict(), None)
    world.leave_world()
    outcome = build_trainer("tiny-qwen3", ["train.seed=2", f"media.vision_from={encoder}"])
    outcome.load_start_weights(Path(plain))
    reader, stored = TensorReader(Path(plain), "model"), load_file(Path(encoder) / "model.safetensors")
    known = set(reader.keys())
    result: dict[str, list[str]] = {"checkpoint": [], "folder": [], "neither": []}
    for block in list_local_shards(outcome.model):
        name = block.key.removeprefix("vision.encoder.")
        same = [tensor for tensor_name, tensor in stored.items() if tensor_name.endswith(name)]
        if block.key in known:
            whole = reader.read(block.key, block.offset, block.shape).reshape(block.data.shape)
            result["checkpoint" if whole.equal(block.data) else "neither"].append(block.key)
        elif same and same[0].equal(block.data):
            result["folder"].append(block.key)
        else:
            result["neither"].append(block.key)
    return result
