"""The checkpoints of a run: what one holds beside tensors, how it is taken, and how a run
gets all of it back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_sov.base.artifacts import manifest_sha256
from megatron_sov.base.errors import UserError
from megatron_sov.engine.data.token_shards import Source, tokenizer_folder
from megatron_sov.engine.mcore.checkpoint import load
from megatron_sov.engine.mcore.checkpoint.save import Companions, Saved, Saver
from megatron_sov.engine.mcore.model.language_model import LanguageModel
from megatron_sov.engine.mcore.optimizer.optimizer import Optimizer
from megatron_sov.engine.mcore.parallel import collectives
from megatron_sov.engine.mcore.parallel.named_values import sum_dict
from megatron_sov.model.config import RunConfig
from megatron_sov.runs import checkpoints
from megatron_sov.runs.folder import RunFolder
from megatron_sov.train.restoring import TrainState
from megatron_sov.train.stopping import StopFlag

STOP = "asked to stop"


class Stateful(Protocol):
    """Something with a memory that a resumed run must have."""

    def state(self) -> dict[str, Any]:
        """Return plain values for the checkpoint."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        ...


class Checkpointer:
    """Takes checkpoints of one run and loads them; every call is made by all processes together."""

    def __init__(self, config: RunConfig, folder: RunFolder, sources: list[Source], model: LanguageModel,
                 optimizer: Optimizer, batches: Stateful, parts: Mapping[str, Stateful],
                 on_saved: Callable[[Saved], None]) -> None:
        """Begin without a checkpoint.

        Args:
            config: the run's settings.
            folder: the run's folder.
            sources: what is read; the hashes of their manifests are kept.
            model: its weights.
            optimizer: its moments and master weights.
            batches: the data order.
            parts: what else has a memory, by its name in the checkpoint.
            on_saved: called when a checkpoint is complete.
        """
        self._config, self._folder, self._model, self._optimizer = config, folder, model, optimizer
        self._batches, self._parts = batches, parts
        self._data = {s.name: manifest_sha256(s.artifact) for s in sources if s.artifact is not None}
        self._tokenizer = tokenizer_folder(sources)
        self._saver = Saver(on_saved, config.train.save_timeout_s)

    def save(self, done: TrainState) -> None:
        """Take a checkpoint, which is written in the background; waits for the one before.  Where
        `train.async_save` is off, `finish` must be called before the next step.

        Args:
            done: the loop's counters.
        """
        settings, folder = self._config.train, self._folder.checkpoints
        state = {"step": done.step, "tokens": done.tokens, "wall_s": done.wall_s,
                 "trained_tokens": done.trained_tokens, "num_updates": self._optimizer.num_updates,
                 "order": self._batches.state(), "data": self._data,
                 **{name: part.state() for name, part in self._parts.items()}}
        self._saver.begin(self._folder.checkpoint(done.step), self._model, self._optimizer,
                          Companions(state, self._config.to_dict(), self._tokenizer),
                          then=lambda: checkpoints.prune(folder, settings.keep_checkpoints,
                                                         settings.keep_every_steps),
                          waits=not settings.async_save)

    def sync(self, stop: StopFlag) -> bool:
        """Do the all-reduce at the end of a step: who was asked to stop,
        and how far the outstanding checkpoint is.

        Where all processes have written their part of the checkpoint it is completed,
        and appears under its name.

        Returns:
            Whether any process was asked to stop.

        Raises:
            UserError: the outstanding checkpoint failed.
        """
        sums = sum_dict({STOP: float(stop.reason is not None), **self._saver.progress()},
                        collectives.all_reduce_world)
        self._saver.advance(sums)
        return sums[STOP] > 0

    def finish(self) -> None:
        """Wait for the outstanding checkpoint, if there is one.

        Raises:
            UserError: it failed.
        """
        self._saver.finish()

    def finish_alone(self) -> None:
        """Let the outstanding checkpoint become complete where an error has ended the steps behind it; no
        collective."""
        self._saver.finish_alone()

    def load_weights(self, path: Path) -> None:
        """Start from the weights of another run's checkpoint."""
        load.check(path)
        self._load_model(path, new_encoders=True)

    def load(self, path: Path, *, data_too: bool = True) -> TrainState:
        """Bring back what a (sound) checkpoint of this run holds, and return the loop's
        counters as they were.

        Args:
            path: the checkpoint.
            data_too: also the place in the data; else they go on where they are.

        Raises:
            UserError: a source is not what the run has read so far.
        """
        state = load.read_state(path)
        for name, read_so_far in state["data"].items():
            if self._data.get(name, read_so_far) != read_so_far:
                raise UserError(f"source {name!r}: its data was packed anew since {path} was written, "
                                "and the cursor into it means nothing now; resume with the data of before, "
                                "or start a new --run --from that checkpoint")
        self._load_model(path)
        load.load_optimizer(path, self._optimizer, state["num_updates"])
        for name, part in self._parts.items():
            if name in state:
                part.restore(state[name])
        if data_too:
            self._batches.restore(state["order"])
        return TrainState(state["step"], state["tokens"], state["wall_s"], checkpoints.trained_tokens(path))

    def _load_model(self, path: Path, *, new_encoders: bool = False) -> None:
        load.load_model(path, self._model, new_encoders=new_encoders)
        self._optimizer.sync_master_weights()
