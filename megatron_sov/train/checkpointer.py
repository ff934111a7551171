"""Saving and loading a run's checkpoints, searching for a sound checkpoint, and loading encoder weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_sov.base.artifacts import MANIFEST, format_json, manifest_sha256
from megatron_sov.base.errors import UserError, warn
from megatron_sov.chat.folder import (
    CONFIG_JSON, TEMPLATE_FILE, TOKENIZER_JSON, read_chat_fields, read_chat_template, read_special_token)
from megatron_sov.chat.vocabulary import find_difference
from megatron_sov.checkpoint import load
from megatron_sov.checkpoint.load import raise_on_all_ranks
from megatron_sov.checkpoint.safetensors_files import TensorFile
from megatron_sov.checkpoint.save import CheckpointMetadata, CheckpointSaver, SavedCheckpoint
from megatron_sov.convert.companion_files import GENERATION_CONFIG, copy_carried_fields
from megatron_sov.convert.sources import open_shards
from megatron_sov.engine.model.language_model import LanguageModel
from megatron_sov.engine.model.local_shards import list_local_shards
from megatron_sov.engine.optimizer.optimizer import Optimizer
from megatron_sov.engine.parallel import collectives
from megatron_sov.engine.parallel.values import sum_dict
from megatron_sov.engine.parallel.world import ParallelWorld, run_on_main
from megatron_sov.model.config import AudioEncoderConfig, ModelConfig, RunConfig, VisionEncoderConfig
from megatron_sov.model.families.encoders import AUDIO, ENCODER, VISION, encoder_shapes
from megatron_sov.model.pretrained import CONFIG, format_names, read_json
from megatron_sov.runs import checkpoints
from megatron_sov.runs.checkpoints import check_model_path
from megatron_sov.runs.folder import RunFolder
from megatron_sov.runs.obs.events import EVENTS, EventLog
from megatron_sov.train.data.sources import Source, tokenizer_folder
from megatron_sov.work.processes.stop_signals import StopFlag

MAX_STEP = 2**62
STOP = "stop requests"
ENCODER_SECTIONS = ("vision_config", "audio_config", "thinker_config")
"""Sections in a multimodal model's `config.json` that contain an encoder's fields."""
ENCODER_FIELDS = {
    "siglip": {"hidden_size": "hidden_size", "num_hidden_layers": "num_layers",
               "num_attention_heads": "num_heads", "intermediate_size": "ffn_dim", "image_size": "image_size",
               "patch_size": "patch_size"},
    "qwen2_5_vl": {"hidden_size": "hidden_size", "depth": "num_layers", "num_heads": "num_heads",
                   "intermediate_size": "ffn_dim", "patch_size": "patch_size",
                   "spatial_merge_size": "merge_size", "temporal_patch_size": "temporal_patch_size",
                   "window_size": "window_size", "out_hidden_size": "out_hidden_size",
                   "fullatt_block_indexes": "full_attention_layers"},
    "whisper": {"d_model": "hidden_size", "encoder_layers": "num_layers",
                "encoder_attention_heads": "num_heads", "encoder_ffn_dim": "ffn_dim",
                "num_mel_bins": "num_mels"}}
ENCODER_FIELDS["qwen2_audio"] = ENCODER_FIELDS["whisper"]
"""Encoder kind -> field of the transformers config -> our field. Values must agree: weight shapes alone do
not determine `num_heads`, for example."""


@dataclass
class TrainState:
    """Training-loop counters, stored in every checkpoint."""

    step: int = 0
    """Completed optimizer steps."""
    tokens: int = 0
    """Learned tokens, without padding."""
    wall_s: float = 0.0
    """Working time in seconds, summed over restarts."""
    trained_tokens: int = 0
    """Longest sample that trained the weights, in tokens, including earlier runs."""


class Stateful(Protocol):
    """A part of the run whose state checkpoints store."""

    def state(self) -> dict[str, Any]:
        """Return JSON values for the checkpoint."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a result that `state` returned."""
        ...


class Checkpointer:
    """Saves and loads a run's checkpoints; every method but `finish_alone` is collective."""

    def __init__(self, config: RunConfig, folder: RunFolder, sources: list[Source], model: LanguageModel,
                 optimizer: Optimizer, batches: Stateful, parts: Mapping[str, Stateful],
                 on_saved: Callable[[SavedCheckpoint], None]) -> None:
        """Start without a checkpoint; `on_saved` will be called with each complete checkpoint.

        Checkpoints store `model`, `optimizer`, the data order `batches`, the manifest hashes of `sources`,
        and `parts` (name -> further part).
        """
        self._config, self._folder, self._model, self._optimizer = config, folder, model, optimizer
        self._batches, self._parts = batches, parts
        self._data = {s.name: manifest_sha256(s.artifact) for s in sources if s.artifact is not None}
        self._tokenizer = tokenizer_folder(sources)
        self._companions: dict[str, bytes] = {}
        self._carried: dict[str, Any] = {}
        self._saver = CheckpointSaver(on_saved, config.train.save_timeout_s)

    def save(self, counters: TrainState) -> None:
        """Start writing a checkpoint in the background, after the outstanding checkpoint is complete.

        If `train.async_save` is off, `finish` must be called before the next step.
        """
        settings, folder = self._config.train, self._folder.checkpoints
        state = {"step": counters.step, "tokens": counters.tokens, "wall_s": counters.wall_s,
                 "trained_tokens": counters.trained_tokens, "num_updates": self._optimizer.num_updates,
                 "order": self._batches.state(), "data": self._data,
                 **{name: part.state() for name, part in self._parts.items()}}
        metadata = CheckpointMetadata(state, self._config.to_dict(), self._tokenizer, self._companions,
                                      self._carried)
        # pruned after the rename: a crash during the write must leave the previous checkpoint
        prune = partial(checkpoints.prune_checkpoints, folder, settings.keep_checkpoints,
                        settings.keep_every_steps)
        self._saver.begin(self._folder.checkpoint(counters.step), self._model, self._optimizer, metadata,
                          on_complete=prune, wait=not settings.async_save)

    def sync(self, stop: StopFlag) -> bool:
        """Share stop requests and progress of the outstanding checkpoint by an all-reduce after a step.

        The checkpoint gets its final name after every rank has written its part. Returns whether a rank got
        a stop request. Raises `UserError` if the checkpoint failed.
        """
        # a single message: the cost of a small all-reduce is its latency
        sums = sum_dict({STOP: float(stop.reason is not None), **self._saver.progress()},
                        collectives.all_reduce_world)
        self._saver.advance(sums)
        return sums[STOP] > 0

    def advance(self) -> None:
        """Complete the outstanding checkpoint if every rank has written its part; for use during long steps.

        Raises `UserError` if the checkpoint failed.
        """
        self._saver.advance(sum_dict(self._saver.progress(), collectives.all_reduce_world))

    def finish(self) -> None:
        """Wait for the outstanding checkpoint. Raises `UserError` if it failed."""
        self._saver.finish()

    def finish_alone(self) -> None:
        """Complete the outstanding checkpoint after an error, without a collective."""
        self._saver.finish_alone()

    def load_weights(self, path: Path) -> None:
        load.check_weights(path)
        self._load_model(path, new_encoders=True)

    def load(self, path: Path, *, load_data_order: bool = True) -> TrainState:
        """Restore this run's sound checkpoint `path` and return the counters.

        `load_data_order=False` leaves the data order at its position. Raises `UserError` if the data of a
        source changed after the checkpoint was written.
        """
        state = load.read_state(path)
        for name, manifest_hash in state["data"].items():
            # before a weight changes; cursors of removed sources are not used
            if self._data.get(name, manifest_hash) != manifest_hash:
                raise UserError(f"source {name!r}: its data was packed again after {path} was written, so "
                                "the checkpoint's position in it is invalid; restore the previous data, or "
                                "start a new --run --from that checkpoint")
        self._load_model(path)
        load.load_optimizer(path, self._optimizer, state["num_updates"])
        for name, part in self._parts.items():
            if name in state:
                part.restore(state[name])
        if load_data_order:
            self._batches.restore(state["order"])
        return TrainState(state["step"], state["tokens"], state["wall_s"],
                          checkpoints.read_trained_tokens(path))

    def _load_model(self, path: Path, *, new_encoders: bool = False) -> None:
        # read now: the checkpoint may be pruned before the next save
        self._carried = copy_carried_fields(path)
        if self._tokenizer is not None:
            self._companions = _read_companions(path / "tokenizer", self._tokenizer)
        load.load_model(path, self._model, new_encoders=new_encoders)
        # the next update would otherwise overwrite the loaded weights with older master weights
        self._optimizer.sync_master_weights()


def find_sound_checkpoint(folder: RunFolder, world: ParallelWorld, last_step: int = MAX_STEP) -> Path | None:
    """Return the newest sound checkpoint of a run up to `last_step`, or None. Collective.

    Damaged checkpoints are renamed, with a warning and an event.
    """
    # rank 0 lists the folder: on a network file system, ranks may see different listings
    while ((newest := run_on_main(
            world, lambda: checkpoints.latest_checkpoint_until(folder.checkpoints, last_step)))
           is not None):
        problem = load.find_damage(newest)
        if problem is None:
            return Path(newest)
        run_on_main(world, partial(_rename_damaged, folder, newest, problem))
    return None


def _rename_damaged(folder: RunFolder, damaged: Path, problem: str) -> None:
    renamed = checkpoints.rename_damaged_checkpoint(damaged)
    text = (f"{problem}; {damaged.name} is renamed to {renamed.name}, and the run goes on from the "
            "checkpoint before it")
    # a separate log: the records of a starting run are not open yet
    events = EventLog(folder.path / EVENTS)
    warn(text, events.write, step=checkpoints.checkpoint_step(damaged))
    events.write("damaged_checkpoint", path=f"{folder.checkpoints.name}/{damaged.name}", reason=problem,
                 renamed_to=f"{folder.checkpoints.name}/{renamed.name}")
    events.close()


def check_adapter_base(newest: Path, start_from: Path) -> None:
    """Raise `UserError` if an adapter's run would continue with different frozen weights."""
    base = checkpoints.read_adapter_base(newest)
    if base is not None:
        start = (checkpoints.read_adapter_base(start_from)
                 or checkpoints.AdapterBase.from_checkpoint(start_from))
        if start.sha256 != base.sha256:
            raise UserError(f"--from {start_from}: is another model than {base.path}, the base model of "
                            f"{newest}; resume with that, or start a new --run")


@torch.no_grad()
def load_encoder_weights(model: LanguageModel, config: RunConfig) -> None:
    """Load encoder weights from the folders `media.vision_from` and `media.audio_from`. Collective.

    Raises `UserError` on every rank if a folder's encoder is missing or has different sizes.
    """
    for prefix, folder in ((VISION, config.media.vision_from), (AUDIO, config.media.audio_from)):
        if not folder:
            continue
        files, names = open_encoder(Path(folder), prefix, config.model)
        blocks = [block for block in list_local_shards(model) if block.key in names]
        with raise_on_all_ranks():
            for block in blocks:
                name = names[block.key]
                block.data.copy_(files[name].read(name).reshape(block.data.shape))


def open_encoder(folder: Path, prefix: str,
                 model: ModelConfig) -> tuple[dict[str, TensorFile], dict[str, str]]:
    """Open an encoder in a Hugging Face folder, alone or inside a larger model.

    `prefix` is `VISION` or `AUDIO`. Returns tensor name in the folder -> file, and key of each encoder tensor
    in our `model` -> name in the folder. Raises `UserError` if the folder has no such encoder, has several,
    or has an encoder of different sizes.
    """
    check_model_path(folder)
    setting = f"media.{prefix[:-1]}_from = {str(folder)!r}"
    encoder = model.vision if prefix == VISION else model.audio
    assert encoder is not None  # by `RunConfig.problems`
    files = open_shards(folder)
    shapes = {key: shape for key, shape in encoder_shapes(model).items() if key.startswith(prefix + ENCODER)}
    suffixes = {key: key.removeprefix(prefix + ENCODER) for key in shapes}
    first = next(iter(suffixes.values()))
    prefixes = [name.removesuffix(first) for name in files if name == first or name.endswith("." + first)]
    complete = [start for start in prefixes if all(start + suffix in files for suffix in suffixes.values())]
    if len(complete) != 1:
        details = ""
        if not complete:
            missing = [suffix for suffix in suffixes.values()
                       if not prefixes or prefixes[0] + suffix not in files]
            details = f" (it lacks {format_names(missing)})"
        raise UserError(f"{setting}: holds {len(complete)} encoders of kind {encoder.kind!r} with "
                        f"{encoder.num_layers} layers, must hold one{details}; compare its {CONFIG} with "
                        f"model.{prefix[:-1]}")
    names = {key: complete[0] + suffix for key, suffix in suffixes.items()}
    differing = []
    for key, name in names.items():
        shape = files[name].entries[name].shape
        if tuple(shape) != shapes[key]:
            differing.append(f"{name} {list(shape)} instead of {list(shapes[key])}")
    if differing:
        raise UserError(f"{setting}: {format_names(differing)}; set model.{prefix[:-1]} to the sizes in "
                        f"its {CONFIG}")
    _check_encoder_fields(folder, setting, encoder)
    return files, names


def _check_encoder_fields(folder: Path, setting: str,
                          encoder: VisionEncoderConfig | AudioEncoderConfig) -> None:
    config: dict[str, Any] = read_json(folder / CONFIG)
    while section := next((config[name] for name in ENCODER_SECTIONS
                           if isinstance(config.get(name), dict)), None):
        config = section
    for theirs, ours in ENCODER_FIELDS[encoder.kind].items():
        value = getattr(encoder, ours)
        expected = list(value) if isinstance(value, tuple) else value
        their_value = config.get(theirs, value)
        if their_value != expected:
            raise UserError(f"{setting}: its {CONFIG} has {theirs} = {their_value}, but the model has "
                            f"{ours} = {value}; set both to the same value")


def _read_companions(start: Path, data: Path) -> dict[str, bytes]:
    """Return file name -> content for checkpoints to store in addition to `tokenizer.json`.

    Files come from the tokenizer folder `start` of the start weights, with special tokens and chat template
    from the tokenizer folder `data`. Returns {} if their vocabularies differ.
    """
    if find_difference(start, data) is not None:
        return {}
    files = {file.name: file.read_bytes() for file in sorted(start.iterdir())
             if file.is_file() and file.name not in (TOKENIZER_JSON, MANIFEST)}
    if read_chat_fields(data) == read_chat_fields(start):
        return files
    config = read_json(start / CONFIG_JSON) if CONFIG_JSON in files else {}
    defaults = read_json(start / GENERATION_CONFIG) if GENERATION_CONFIG in files else {}
    for name in ("bos_token", "eos_token"):
        text = read_special_token(data, name)
        if text and text != read_special_token(start, name):
            config[name] = text
            defaults.pop(f"{name}_id", None)
    template = read_chat_template(data)
    if template and template != read_chat_template(start):
        config["chat_template"] = template
        files.pop(TEMPLATE_FILE, None)
    changed = {CONFIG_JSON: config}
    if GENERATION_CONFIG in files:
        changed[GENERATION_CONFIG] = defaults
    return files | {name: format_json(content).encode() for name, content in changed.items()}
