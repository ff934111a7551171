"""What one rank holds while it trains, and the actions that the loop is made of."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_sov.artifacts import manifest_sha256
from megatron_sov.config import RunConfig
from megatron_sov.config.schedules import Schedule
from megatron_sov.data.order import OrderState
from megatron_sov.data.token_bytes import token_bytes
from megatron_sov.data.token_shards import Source, provenance, tokenizer_folder
from megatron_sov.errors import UserError
from megatron_sov.mcore.checkpoint import load
from megatron_sov.mcore.checkpoint.save import Companions, Saved, Saver
from megatron_sov.mcore.decode.forward_only import ForwardModel
from megatron_sov.mcore.model import init, replica_checks
from megatron_sov.mcore.model.expert_load import ExpertLoad
from megatron_sov.mcore.model.language_model import build
from megatron_sov.mcore.optimizer.optimizer import Optimizer
from megatron_sov.mcore.parallel import rng
from megatron_sov.mcore.parallel.world import World
from megatron_sov.models.count import num_params
from megatron_sov.obs import process_start, routing
from megatron_sov.obs.events import EVENTS, EventLog
from megatron_sov.obs.progress_bar import ProgressBar
from megatron_sov.obs.trackers import Trackers
from megatron_sov.runs import checkpoints
from megatron_sov.runs.folder import RunFolder
from megatron_sov.train.computation import Computation
from megatron_sov.train.data_batches import DataBatches
from megatron_sov.train.evaluate import HeldoutEvaluator, HeldoutLoss
from megatron_sov.train.gate import Gate
from megatron_sov.train.guards.fault_injection import Fault, Faults, corrupt
from megatron_sov.train.guards.routing_monitor import RoutingMonitor
from megatron_sov.train.guards.sdc import SdcChecks
from megatron_sov.train.guards.step_guard import Refusal, StepGuard
from megatron_sov.train.guards.stragglers import Stragglers
from megatron_sov.train.guards.watchdog import Watchdog
from megatron_sov.train.objective import GlobalBatch, Objective
from megatron_sov.train.side_jobs.side_jobs import SideJobs
from megatron_sov.train.state import StepResult, TrainState

ObjectiveFactory = Callable[[RunConfig, DataBatches], Objective]


class Trainer:
    """Model, optimizer, data order and records of one rank."""

    def __init__(self, config: RunConfig, world: World, folder: RunFolder, sources: list[Source],
                 objective: ObjectiveFactory, gate: Gate | None = None, faults: Sequence[Fault] = ()) -> None:
        self.config, self.world, self.folder, self.sources = config, world, folder, sources
        self.schedule = Schedule(config)
        self.num_steps = self.schedule.num_steps
        self.gate = gate
        self.state = TrainState()
        self.model = build(config.model, config.parallel, config.train)
        init.initialise(self.model, config.model, config.train.seed)
        self.optimizer = Optimizer(self.model, config.optim, config.parallel)
        self.expert_load = ExpertLoad(self.model)
        self._experts = config.model.num_layers, config.model.num_experts
        self.model.config.finalize_model_grads_func = self.expert_load.finalize
        self.policy = ForwardModel(self.model, config.train.head_chunk_tokens)
        self.batches = DataBatches(config, sources, world)
        self._objective_factory = objective
        self.objective = objective(config, self.batches)
        self.tokenizer = tokenizer_folder(sources)
        self.saver = Saver(self._note_saved, config.train.save_timeout_s)
        self._evaluator: HeldoutEvaluator | None = None
        self.events = EventLog(None)
        self._trackers: Trackers | None = None
        self._progress: Progress | None = None
        self._side_jobs: SideJobs | None = None
        self._continues: str | None = None
        self._data = {s.name: manifest_sha256(s.artifact) for s in sources if s.artifact is not None}
        self._worn_out: set[str] = set()
        self._entered_s = time.monotonic()
        self._watch(faults)

    def _watch(self, faults: Sequence[Fault]) -> None:
        """Set up what watches the run."""
        settings = self.config.guards
        self.guard = StepGuard(settings, self.world.is_main)
        self.watchdog = Watchdog(self.folder.path, self.world.rank, settings.hang_timeout_s,
                                 lambda step, places: self.events.write("hang", step=step, places=places))
        self.sdc = SdcChecks(settings)
        self.stragglers = Stragglers(settings)
        self.routing = RoutingMonitor(settings)
        self.faults = Faults(faults, self.folder.path, self.world.rank)
        self.computation = Computation(self.config, self.model, self.optimizer, self.expert_load, len(self.sources), self.faults,
                                       self.stragglers.clock)

    @property
    def finished(self) -> bool:
        """Whether there is no more to train: the last step is done, or the gate has passed."""
        return self.state.step >= self.num_steps or (self.gate is not None and self.gate.passed)

    # starting and resuming

    def load_weights(self, path: Path) -> None:
        """Start from the weights of another run's checkpoint."""
        load.check(path)
        load.load_model(path, self.model)
        self.optimizer.sync_master_weights()

    def resume(self, path: Path) -> None:
        """Continue exactly where a (sound) checkpoint of this run was taken.

        Raises:
            UserError: a source is not what the run has read so far.
        """
        state = load.read_state(path)
        for name, read_so_far in state["data"].items():
            if self._data.get(name, read_so_far) != read_so_far:
                raise UserError(f"source {name!r}: its data was packed anew since {path} was written, and the cursor "
                                "into it means nothing now; resume with the data of before, or start a new --run --from that "
                                "checkpoint")
        self._load(path, state)
        self.state = TrainState(state["step"], state["tokens"], state["wall_s"])
        self.batches.close()
        self.batches = DataBatches(self.config, self.sources, self.world, OrderState.from_dict(state["order"]))
        self.objective = self._objective_factory(self.config, self.batches)
        self._continues = path.name

    def rollback_to(self, path: Path) -> int:
        """Return to the weights of a (sound) checkpoint and go on with the data where they are; returns the checkpoint's step."""
        state = load.read_state(path)
        self._load(path, state)
        self.state.tokens = state["tokens"]
        return int(state["step"])

    def _load(self, path: Path, state: dict[str, Any]) -> None:
        load.load_model(path, self.model)
        self.optimizer.sync_master_weights()
        load.load_optimizer(path, self.optimizer, state["num_updates"])
        if self.gate is not None and "gate" in state:
            self.gate.restore(state["gate"])
        if "guard" in state:
            self.guard.restore(state["guard"])

    def open_records(self) -> None:
        """Open events and trackers; called on rank 0 only."""
        self.events = EventLog(self.folder.path / EVENTS)
        self._trackers = Trackers(self.config.obs, self.folder.path, self.config.to_dict())
        self._side_jobs = SideJobs(self.folder.path, self.config, self.events.write)
        self.faults.tell(self.events)

    def announce(self) -> None:
        """Record what runs where."""
        if self._continues is not None:
            self.events.write("resume", step=self.state.step, reason=f"continued from {self._continues}")
        count = num_params(self.config.model)
        parallel = {**asdict(self.config.parallel), "dp": self.world.dp_size}
        self.events.write(
            "run_start", recipe=self.config.recipe, num_ranks=self.world.size, layout=parallel, num_params=count.total,
            num_active_params=count.active, num_steps=self.num_steps, resumed_from=self.state.step,
            began_s=process_start.began_s(),
            inputs=provenance(self.sources),
            machine={"host": platform.node(), "python": platform.python_version(), "torch": torch.__version__,
                     "threads": torch.get_num_threads()})
        for entry in self.batches.ledger.entries:
            self.events.write("phase", step=entry.first_step, name=entry.phase, blend=entry.weights, seq_len=entry.seq_len,
                              global_batch_size=entry.global_batch_size, skip=entry.skip)
        if self.world.is_main:
            self._progress = ProgressBar(self.num_steps, self.state.step, self.config.recipe)

    # one step

    def update(self) -> StepResult | None:
        """Do one optimizer step; None where the ledger says to pass over its batch, or the guard refuses to learn it.

        Raises:
            UserError: loss or gradient is not a finite number, and `guards.skip` is off; nothing is saved then.
            SilentCorruption: a process does not compute the same twice.
        """
        start = time.monotonic()
        step = self.state.step
        rng.reseed(self.config.train.seed, step)
        self.guard.enter(step, self.batches.ledger)
        if self.batches.next_entry().skip:
            self.batches.skip()
            self.state.step += 1
            self.events.write("skip", step=self.state.step, reason="data.skip_steps")
            return None
        batch = self.objective.prepare(self.objective.collect(self.policy, step))
        self._before_computing(batch)
        lr = self.schedule.learning_rate(step)
        sums = self.computation.sums(batch, self.objective, step + 1)
        terms = sorted(self.objective.coefficients)
        losses = {t: float(s) / batch.targets[t] for t, s in zip(terms, sums[:len(terms)], strict=True) if batch.targets[t] > 0}
        by_source = sums[len(terms):].reshape(-1, 2).tolist()
        loss = sum(self.objective.coefficients[t] * value for t, value in losses.items())
        grad_norm = self.optimizer.step(lr, lambda norm: self.guard.accepts(loss, norm))
        self.state.step += 1
        if self.guard.refusal is not None:
            self._refuse(self.guard.refusal)
            return None
        self.state.tokens += batch.num_tokens
        self._warn_of_epochs()
        return StepResult(
            loss=loss, losses=losses,
            losses_by_source={s.name: total / n for s, (total, n) in zip(self.sources, by_source, strict=True) if n > 0},
            grad_norm=grad_norm, lr=lr, num_tokens=batch.num_tokens, phase=batch.phase,
            padding_share=1 - batch.num_tokens / (batch.num_sequences * batch.seq_len), seconds=time.monotonic() - start)

    def _before_computing(self, batch: GlobalBatch) -> None:
        """Let faults on purpose come, and check that this process computes the same twice."""
        step = self.state.step + 1
        self.faults.tell(self.events)
        self.faults.trigger("step", step)
        if self.faults.due("bitflip", "step", step):
            replica_checks.flip_bit(next(p for p in self.model.parameters() if p.dim() == 2))
        if self.sdc.probe_is_due(step):
            compute = partial(self.computation.own_gradients, batch, self.objective, step)
            self.sdc.repeat(step, self.model, compute, self.events)

    def _refuse(self, refusal: Refusal) -> None:
        """Take note that the step that was just computed is not learned."""
        step = self.state.step
        if not self.config.guards.skip:
            self.saver.finish()
            newest = checkpoints.latest(self.folder.checkpoints)
            start = f"--run --from {newest}, the last checkpoint" if newest else "--run, since there is no checkpoint yet"
            raise UserError(f"step {step}: the loss is {refusal.loss:g} and the gradient norm {refusal.grad_norm:g}; lower "
                            f"optim.lr = {self.config.optim.lr:g} and start a new {start}, or switch on guards.skip")
        self.expert_load.undo()
        self.batches.ledger.pass_over(step - 1, step)
        ranks = replica_checks.ranks_where(not self.computation.is_finite)
        self.events.write("skip", step=step, reason=refusal.reason, loss=refusal.loss, grad_norm=refusal.grad_norm, ranks=ranks)
        if self.world.is_main:
            where = f" (not finite on rank {', '.join(map(str, ranks))})" if ranks else ""
            print(f"warning: step {step} is not learned: {refusal.reason}{where}", file=sys.stderr, flush=True)

    def _warn_of_epochs(self) -> None:
        """Say once for each source that it is gone through more often than `data.max_epochs`."""
        limit = self.config.data.max_epochs
        for name, epochs in self.batches.epochs.items():
            if limit and epochs > limit and name not in self._worn_out:
                self._worn_out.add(name)
                text = (f"source {name} is gone through {epochs:.1f} times, more than data.max_epochs = {limit:g}; "
                        "add data or lower its weight")
                self.events.write("warning", step=self.state.step, text=text)
                if self.world.is_main:
                    print(f"warning: {text}", file=sys.stderr)

    # records

    def log(self, result: StepResult) -> None:
        """Record a step: events, trackers, progress bar."""
        every, step = self.config.train.log_every_steps, self.state.step
        self.stragglers.report(step, self.events)
        if self.routing.is_due(step):
            load, biases = self.expert_load.gather(*self._experts), self.expert_load.biases(*self._experts)
            self.routing.follow(step, load, biases, self.events)
        if self._side_jobs is not None:
            self._side_jobs.poll()
        if step % every and step != self.num_steps:
            return
        balance = self._balance()
        tokens_per_s = result.num_tokens / result.seconds
        self.events.write(
            "step", step=step, loss=result.loss, losses=result.losses, losses_by_source=result.losses_by_source,
            grad_norm=result.grad_norm, lr=result.lr, tokens=self.state.tokens, step_time_s=result.seconds,
            tokens_per_s=tokens_per_s, phase=result.phase, padding_share=result.padding_share, **balance)
        if self._trackers is not None:
            self._trackers.log_step(step, {
                "loss": result.loss, "grad_norm": result.grad_norm, "lr": result.lr, "tokens_per_s": tokens_per_s,
                **balance, **{f"loss/{t}": v for t, v in result.losses.items()}})
        if self._progress is not None:
            self._progress.update(step, result.loss, tokens_per_s)

    def _balance(self) -> dict[str, float]:
        """Return the worst layer's MaxVio of the last step, by name; nothing for a dense model."""
        load = self.expert_load.gather(*self._experts)
        routed = load[load.sum(dim=1) > 0]
        return {"max_violation": float(routing.max_violation(routed.numpy()).max())} if len(routed) else {}

    def log_expert_load(self) -> None:
        """Record every expert's share of its layer's tokens in the last step."""
        self._write_expert_load(self.expert_load.gather(*self._experts))

    def _write_expert_load(self, load: torch.Tensor, **fields: Any) -> None:
        layers = [i for i in range(len(load)) if load[i].sum() > 0]
        if layers:
            shares = [(load[i] / load[i].sum()).tolist() for i in layers]
            self.events.write("expert_load", step=self.state.step, load=shares, layers=[i + 1 for i in layers], **fields)

    # evaluation and checkpoints

    def evaluate(self) -> dict[str, HeldoutLoss]:
        """Evaluate on held-out documents and record it."""
        if self._evaluator is None:
            vocab = self.config.model.vocab_size
            sizes = token_bytes(self.tokenizer, vocab) if self.tokenizer else None
            self._evaluator = HeldoutEvaluator(
                self.sources, sizes, self.batches.ledger.max_seq_len(), self.config.train.micro_batch_size,
                self.config.data.heldout_tokens, self.world)
        results = self._evaluator.run(self.policy, self._count_experts)
        self.events.write("eval", step=self.state.step, heldout={name: asdict(r) for name, r in results.items()})
        consumed = self.batches.consumed_tokens()
        self.events.write("data_consumed", step=self.state.step, tokens=consumed, plan=self._planned_tokens())
        return results

    def _count_experts(self, source: str, action: Callable[[], Any]) -> Any:
        """Do something with the documents of one source, and record which experts they go to."""
        result, load = self.expert_load.during(action, *self._experts)
        self._write_expert_load(load, source=source)
        return result

    def _planned_tokens(self) -> dict[str, int]:
        """Return the tokens of each source that the ledger asks for up to now; a source that was taken away keeps its own."""
        plan = dict.fromkeys((s.name for s in self.sources), 0.0)
        entries = self.batches.ledger.entries
        for entry, after in zip(entries, [*(e.first_step for e in entries[1:]), self.num_steps], strict=True):
            steps = max(0, min(self.state.step, after) - entry.first_step)
            for name, weight in entry.weights.items():
                plan[name] = plan.get(name, 0.0) + steps * entry.global_batch_size * entry.seq_len * weight
        return {name: round(tokens) for name, tokens in plan.items()}

    def save(self) -> None:
        """Take a checkpoint; it is written in the background, or at once where `train.async_save` is off."""
        settings = self.config.train
        self.sdc.compare(self.state.step, self.model, self.events)
        state = {"step": self.state.step, "tokens": self.state.tokens, "wall_s": self.wall_s(),
                 "num_updates": self.optimizer.num_updates, "order": self.batches.state(), "data": self._data,
                 "guard": self.guard.state(),
                 **({"gate": self.gate.state()} if self.gate is not None else {})}
        self.saver.begin(
            self.folder.checkpoint(self.state.step), self.model, self.optimizer,
            Companions(state, self.config.to_dict(), self.tokenizer),
            then=lambda: checkpoints.prune(self.folder.checkpoints, settings.keep_checkpoints, settings.keep_every_steps))
        self.faults.trigger("save", self.state.step)
        if not settings.async_save:
            self.saver.finish()

    def _note_saved(self, saved: Saved) -> None:
        self.events.write("checkpoint", step=saved.step, path=f"{self.folder.checkpoints.name}/{saved.path.name}",
                          save_s=saved.save_s, stall_s=saved.stall_s)
        if self.faults.due("corrupt-checkpoint", "save", saved.step):
            corrupt(saved.path)
        if self._side_jobs is not None:
            self._side_jobs.offer(saved.step, saved.path, last=self.finished and saved.step == self.state.step)

    def wall_s(self) -> float:
        """Return the seconds that the run has worked, over all its restarts."""
        return self.state.wall_s + time.monotonic() - self._entered_s

    def close(self) -> None:
        """End the records, and what runs beside."""
        self.watchdog.close()
        if self._side_jobs is not None:
            self._side_jobs.close()
        if self._progress is not None:
            self._progress.close()
        if self._trackers is not None:
            self._trackers.close()
        self.faults.tell(self.events)
        self.events.close()
        self.batches.close()
