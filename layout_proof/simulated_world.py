"""Simulate the ranks of a layout by threads, where a `threading.Lock` per rank lets a single thread run.

Megatron-Core and its callers run unmodified, with groups of the real sizes: messages, receivers and order
are those of a cluster. A thread yields only while it waits for others, so every run has the same order. If
all threads wait, the layout would deadlock, and `Deadlock` names the waiting ranks.
"""

import contextlib
import copy
import ctypes
import functools
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, TypeVar
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import random
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from torch.distributed import distributed_c10d

from layout_proof.module_sums import ModuleSums
from layout_proof.simulated_messages import (
    CallPart, CallSite, Deadlock, MessageFault, copy_message_tensor, detach_tensors, find_call_site,
    get_reduction_name, reduce_call_parts)

Place = TypeVar("Place")
Result = TypeVar("Result")
STACK_BYTES = 4 << 20
"""Stack size per thread: a thousand stacks of the default 8 MiB fail under strict memory accounting."""
_M_ARENA_MAX = -8  # malloc.h
_RANDOM_STATES = ("_CUDA_RNG_STATE_TRACKER", "_CUDA_RNG_STATE_TRACKER_INITIALIZED")
MAX_NAMED_RANKS = 6  # waiting ranks or messages named in an error

# torch overloads the methods for C++, not for Python
_ProcessGroup: Any = dist.ProcessGroup


class SimulatedRanks:
    """The simulated ranks and their schedule; `run` plays a layout."""

    def __init__(self, size: int, fault: MessageFault | None = None) -> None:
        """Store the number of ranks, and a function that changes messages; `run` starts the threads."""
        self.size, self.fault = size, fault
        self.sites: dict[CallSite, int] = {}  # call site -> message count over ranks
        self.sums: dict[int, ModuleSums] = {}
        """Rank -> sums of its modules, which record the call sites of its messages."""
        self.calls: dict[tuple[str, int], _Call] = {}
        self.mail: dict[tuple[str, int, int, int], deque[tuple[CallSite, list[torch.Tensor]]]] = {}
        self.rank_groups: dict[Any, list[list[int]]] = {}
        """Cache for Megatron-Core's rank groups, a function of sizes."""
        self._turns = [_create_acquired_lock() for _ in range(size)]
        self._ready: deque[int] = deque(range(size))
        self._waiting: dict[int, str] = {}
        self._states: list[Sequence[Any]] = []
        self._num_running = size
        self._is_over = _create_acquired_lock()
        self._failure: BaseException | None = None

    def run(self, join: Callable[[int, int], Place], body: Callable[[Place], Result]) -> list[Result]:
        """Run `body` on the place that `join(rank, number of ranks)` returns, and return the results by rank.
        Raises `Deadlock`: ranks wait for each other, or a message has no receiver."""
        results: list[Any] = [None] * self.size
        previous = _read_rank_state()
        self._states = [_copy_initial_state(previous) for _ in range(self.size)]

        def run_single_rank(rank: int) -> None:
            self._turns[rank].acquire()
            try:
                if self._failure is None:
                    _write_rank_state(self._states[rank])
                    results[rank] = body(_create_world(self, rank, join))
            except BaseException as e:
                self._failure = self._failure or e
            finally:
                self._num_running -= 1
                self._run_next_ready_rank()

        _use_single_heap()
        # Megatron-Core records a model's attention in the environment, for later readers
        with (self._defer_signals(), mock.patch.dict(os.environ),
              mock.patch.object(dist, "all_gather_object", _gather_objects)):
            threading.stack_size(STACK_BYTES)
            try:
                num_threads = self.size if self.size > 1 else 0
                threads = [threading.Thread(target=run_single_rank, args=(rank,), daemon=True)
                           for rank in range(num_threads)]
                for thread in threads:
                    thread.start()
            finally:
                threading.stack_size(0)
            self._run_next_ready_rank()
            if self.size == 1:
                run_single_rank(0)  # in this thread
            self._is_over.acquire()
            _write_rank_state(previous)
        if self._failure is not None:
            raise self._failure
        self._check_mailboxes()
        return results

    def _check_mailboxes(self) -> None:
        unreceived = [f"rank {sender} of {group} sends to rank {to} from {box[0][0].where}"
                      for (group, sender, to, _), box in self.mail.items() if box]
        unreceived += [f"{call.operation} over {group}, which only {len(call.parts)} call"
                       for (group, _), call in self.calls.items()]
        if unreceived:
            raise Deadlock(f"{len(unreceived)} messages have no receiver: "
                             + "; ".join(unreceived[:MAX_NAMED_RANKS]))

    @contextlib.contextmanager
    def _defer_signals(self) -> Iterator[None]:
        """Delay Ctrl-C and SIGTERM: end all threads at their next message, then call the previous handler.

        A thread that computes at interpreter exit would abort it, and an exception between acquiring and
        passing the turn would leave all threads waiting.
        """
        received: list[int] = []

        def stop_simulated_ranks(number: int, frame: FrameType | None) -> None:
            received.append(number)
            self._failure = self._failure or KeyboardInterrupt()

        # a single rank runs in this thread, where the exception ends `body`; threads receive no signals
        defers = self.size > 1 and threading.current_thread() is threading.main_thread()
        numbers: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM) if defers else ()
        previous = {number: signal.getsignal(number) for number in numbers}
        callable_handlers = {number: handler for number, handler in previous.items() if callable(handler)}
        for number in callable_handlers:
            signal.signal(number, stop_simulated_ranks)
        try:
            yield
        finally:
            for number, handler in callable_handlers.items():
                signal.signal(number, handler)
        for number in received[:1]:
            callable_handlers[number](number, None)

    def wait_until(self, rank: int, condition: Callable[[], bool], description: str) -> None:
        """Let waiting ranks run until `condition()` is true."""
        if self._failure is not None:
            raise SystemExit
        while not condition():
            self._waiting[rank] = description
            self._states[rank] = _read_rank_state()
            self._run_next_ready_rank()
            self._turns[rank].acquire()
            if self._failure is not None:
                # a rank failed: end this thread without a second error
                raise SystemExit
            _write_rank_state(self._states[rank])

    def mark_ranks_ready(self, ranks: Sequence[int]) -> None:
        """Mark waiting ranks as ready to check their condition."""
        for rank in ranks:
            if self._waiting.pop(rank, None) is not None:
                self._ready.append(rank)

    def _run_next_ready_rank(self) -> None:
        """Let the next ready rank run."""
        if self._num_running == 0:
            self._is_over.release()
            return
        if not self._ready and self._failure is None:
            waiting = [f"rank {rank} in {description}"
                       for rank, description in sorted(self._waiting.items())[:MAX_NAMED_RANKS]]
            self._failure = Deadlock(f"{len(self._waiting)} of {self.size} processes wait for each other: "
                                     + "; ".join(waiting))
        if self._failure is not None:
            self.mark_ranks_ready(list(self._waiting))
        self._turns[self._ready.popleft()].release()


@dataclass
class _Call:
    """A collective call before the last member's `CallPart`."""

    operation: str
    parts: dict[int, CallPart] = field(default_factory=dict)
    is_done: bool = False


def _use_single_heap() -> None:
    """Make glibc use a single heap (`mallopt`): a heap per thread took 50 % more memory with 512 ranks."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's own
    if sys.platform == "linux" and mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)


@contextlib.contextmanager
def use_single_thread() -> Iterator[None]:
    """Limit torch to the thread of a simulated rank, also in the backward pass, because ranks take turns."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        torch.set_num_threads(num_threads)


@contextlib.contextmanager
def _add_call_site(site: CallSite) -> Iterator[None]:
    """Prefix `Deadlock` errors with the call site."""
    try:
        yield
    except Deadlock as e:
        raise Deadlock(f"{site}: {e}") from e


class _PendingWork(dist.Work):
    """`Work` handle for a pending message."""

    def __init__(self, ranks: SimulatedRanks, rank: int, condition: Callable[[], bool],
                 description: str) -> None:
        super().__init__()
        self._ranks, self._rank, self._condition, self._description = ranks, rank, condition, description

    def wait(self, timeout: Any = None) -> bool:
        self._ranks.wait_until(self._rank, self._condition, self._description)
        return True

    def is_completed(self) -> bool:
        return self._condition()


class SimulatedGroup(_ProcessGroup):
    """A rank's process group handle, called by torch.distributed like NCCL's or gloo's.

    The method names are torch's; `all_gather_into_tensor` and `reduce_scatter_tensor` call those that end in
    `_single` or start with `_`, depending on the version.
    """

    def __init__(self, ranks: SimulatedRanks, rank: int, members: Sequence[int], description: str) -> None:
        super().__init__(list(members).index(rank), len(members))
        self._ranks, self._rank, self._members = ranks, rank, list(members)
        self._index, self._description = self._members.index(rank), description
        self._key = f"{description} {self._members[0]}..{self._members[-1]} of {len(members)}"
        self._num_calls = 0

    def size(self) -> int:
        return len(self._members)

    def rank(self) -> int:
        return self._index

    def getBackendName(self) -> str:
        return "gloo"

    @property
    def group_name(self) -> str:
        return self._key

    @property
    def pg_name(self) -> str:
        return self._key

    def _call(self, kind: str, part: CallPart, work: Callable[[list[CallPart]], None]) -> dist.Work:
        """Add the rank's `CallPart` to a collective call; the last rank to arrive calls `work`."""
        site = self._record_call_site(kind)
        key = self._key, self._num_calls
        self._num_calls += 1
        operation = f"{kind} {part.how}".rstrip()
        call = self._ranks.calls.setdefault(key, _Call(operation))
        if call.operation != operation:
            raise Deadlock(f"rank {self._rank} calls {operation} over {self._key} at {site.where}, but "
                           f"other ranks call {call.operation}")
        call.parts[self._index] = part
        if len(call.parts) == len(self._members):
            parts = [call.parts[index] for index in range(len(self._members))]
            with torch.no_grad(), _add_call_site(site):
                if self._ranks.fault is None or not self._ranks.fault(site, parts, work):
                    work(parts)
            call.is_done = True
            del self._ranks.calls[key]
            self._ranks.mark_ranks_ready(self._members)
        return _PendingWork(self._ranks, self._rank, lambda: call.is_done,
                            f"{kind} over {self._key} at {site.where}")

    def _record_call_site(self, kind: str) -> CallSite:
        site = find_call_site(kind, self._description)
        self._ranks.sites[site] = self._ranks.sites.get(site, 0) + 1
        if self._rank in self._ranks.sums:
            self._ranks.sums[self._rank].record_message_site(site)
        return site

    def allreduce(self, tensors: list[torch.Tensor], opts: Any = None) -> dist.Work:
        how, detached = get_reduction_name(opts), detach_tensors(tensors)

        def sum_member_inputs(parts: list[CallPart]) -> None:
            for member_tensors in zip(*(part.inputs for part in parts), strict=True):
                total = reduce_call_parts(how, member_tensors)
                for tensor in member_tensors:
                    tensor.copy_(total)

        return self._call("allreduce", CallPart(detached, detached, how=how), sum_member_inputs)

    allreduce_coalesced = allreduce

    def barrier(self, opts: Any = None) -> dist.Work:
        return self._call("barrier", CallPart([], []), lambda parts: None)

    def broadcast(self, tensors: list[torch.Tensor], opts: Any) -> dist.Work:
        detached, root = detach_tensors(tensors), int(opts.rootRank)

        def copy_from_root(parts: list[CallPart]) -> None:
            for part in (part for index, part in enumerate(parts) if index != root):
                for output, sent in zip(part.outputs, parts[root].inputs, strict=True):
                    copy_message_tensor(output, sent)

        part = CallPart(detached, detached, how=f"from {self._members[root]}")
        return self._call("broadcast", part, copy_from_root)

    def allgather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor],
                  opts: Any = None) -> dist.Work:
        def copy_to_members(parts: list[CallPart]) -> None:
            for part in parts:
                for output, sender in zip(part.outputs, parts, strict=True):
                    copy_message_tensor(output, sender.inputs[0])

        return self._call("allgather", CallPart(detach_tensors(inputs), detach_tensors(outputs[0])),
                          copy_to_members)

    def gather_objects(self, values: list[Any], value: Any) -> dist.Work:
        """Gather Python objects, copied once per sender: a copy per receiver would be 262,144
        copies with 512 ranks."""
        def copy_member_objects(parts: list[CallPart]) -> None:
            sent = [copy.deepcopy(part.value) for part in parts]
            for part in parts:
                part.values[:] = sent

        return self._call("allgather", CallPart([], [], how="objects", value=value, values=values),
                          copy_member_objects)

    def all_gather_single(self, output: torch.Tensor, sent: torch.Tensor, opts: Any = None) -> dist.Work:
        return self.allgather([list(output.chunk(self.size()))], [sent], opts)

    def all_gather_single_coalesced(self, outputs: list[torch.Tensor], inputs: list[torch.Tensor],
                                    opts: Any = None) -> dist.Work:
        return [self.all_gather_single(output, sent, opts)
                for output, sent in zip(outputs, inputs, strict=True)][-1]

    def reduce_scatter(self, outputs: list[torch.Tensor], inputs: list[list[torch.Tensor]],
                       opts: Any = None) -> dist.Work:
        how = get_reduction_name(opts)

        def sum_parts_and_scatter(parts: list[CallPart]) -> None:
            # compute the sums first: outputs may share memory with inputs
            totals = [reduce_call_parts(how, [part.inputs[index] for part in parts])
                      for index in range(len(parts))]
            for part, total in zip(parts, totals, strict=True):
                copy_message_tensor(part.outputs[0], total)

        return self._call("reduce_scatter", CallPart(detach_tensors(inputs[0]), detach_tensors(outputs),
                                                     how=how), sum_parts_and_scatter)

    def reduce_scatter_single(self, output: torch.Tensor, summed: torch.Tensor,
                              opts: Any = None) -> dist.Work:
        return self.reduce_scatter([output], [list(summed.chunk(self.size()))], opts)

    def reduce_scatter_single_coalesced(self, outputs: list[torch.Tensor], inputs: list[torch.Tensor],
                                        opts: Any = None) -> dist.Work:
        return [self.reduce_scatter_single(output, summed, opts)
                for output, summed in zip(outputs, inputs, strict=True)][-1]

    def all_to_all_single(self, output: torch.Tensor, sent: torch.Tensor, output_sizes: list[int] | None,
                          input_sizes: list[int] | None, opts: Any = None) -> dist.Work:
        part = CallPart(detach_tensors([sent]), detach_tensors([output]),
                        self._list_row_sizes(input_sizes, sent), self._list_row_sizes(output_sizes, output))

        def exchange_split_rows(parts: list[CallPart]) -> None:
            sent = [part.inputs[0].split(part.input_sizes) for part in parts]
            for index, part in enumerate(parts):
                for sender, output_rows in enumerate(part.outputs[0].split(part.output_sizes)):
                    copy_message_tensor(output_rows, sent[sender][index])

        return self._call("alltoall", part, exchange_split_rows)

    def _list_row_sizes(self, sizes_or_none: Sequence[int] | None, tensor: torch.Tensor) -> list[int]:
        """Return the rows per member; equal parts by default."""
        sizes = [int(size) for size in sizes_or_none] if sizes_or_none is not None else []
        return sizes or [len(tensor) // self.size()] * self.size()

    # names before torch 2.13
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single

    def send(self, tensors: list[torch.Tensor], to: int, tag: int = 0) -> dist.Work:
        site = self._record_call_site("send")
        box = self._ranks.mail.setdefault((self._key, self._index, to, tag), deque())
        box.append((site, [tensor.clone() for tensor in detach_tensors(tensors)]))
        self._ranks.mark_ranks_ready([self._members[to]])
        return _PendingWork(self._ranks, self._rank, lambda: True, "send")

    def recv(self, tensors: list[torch.Tensor], sender: int, tag: int = 0) -> dist.Work:
        site = self._record_call_site("recv")
        box = self._ranks.mail.setdefault((self._key, sender, self._index, tag), deque())
        outputs = detach_tensors(tensors)
        message: list[torch.Tensor] = []

        def has_received_message() -> bool:
            if not message and box:
                message.extend(box.popleft()[1])
                with _add_call_site(site):
                    for tensor, sent in zip(outputs, message, strict=True):
                        copy_message_tensor(tensor, sent)
                if self._ranks.fault is not None:
                    self._ranks.fault(site, [CallPart(outputs, outputs)], lambda parts: None)
            return bool(message)

        return _PendingWork(self._ranks, self._rank, has_received_message,
                            f"recv from rank {self._members[sender]} over {self._key} at {site.where}")


def _gather_objects(values: list[Any], value: Any, group: Any = None) -> None:
    """Replace `torch.distributed.all_gather_object`."""
    process_group: Any = group or distributed_c10d._get_default_group()
    process_group.gather_objects(values, value).wait()


class _RankWorld:
    """A rank's `torch.distributed` state: the groups."""

    def __init__(self) -> None:
        self.default_pg: dist.ProcessGroup | None = None
        self.pg_map: dict[Any, Any] = {}
        self.pg_names: dict[Any, str] = {}
        self.pg_group_ranks: dict[Any, dict[int, int]] = {}
        self.pg_backend_config: dict[Any, str] = {}
        self.pg_to_tag: dict[Any, str] = {}
        self.tags_to_pg: dict[str, list[Any]] = {}
        self.pg_coalesce_state: dict[Any, list[Any]] = {}
        self.group_count = 0
        self.pg_default_device: dict[Any, torch.device] = {}
        self.comms: list[Any] = []

    def add_group(self, group: SimulatedGroup, members: Sequence[int]) -> SimulatedGroup:
        self.pg_map[group] = ("gloo", None)
        self.pg_names[group] = group.group_name
        self.pg_group_ranks[group] = {rank: index for index, rank in enumerate(members)}
        self.pg_backend_config[group] = "cpu:gloo"
        self.pg_default_device[group] = torch.device("cpu")
        return group


def _create_world(ranks: SimulatedRanks, rank: int, join: Callable[[int, int], Place]) -> Place:
    """Create a rank's `_RankWorld`, call `join` with simulated groups, and return its result."""
    world = _RankWorld()
    distributed_c10d._world = world  # type: ignore[assignment]
    all_ranks = range(ranks.size)
    world.default_pg = world.add_group(SimulatedGroup(ranks, rank, all_ranks, "WORLD"), all_ranks)
    groups: dict[tuple[str, tuple[int, ...]], SimulatedGroup] = {}

    def create_group(members: Sequence[int], *_: Any, group_desc: str = "", **__: Any) -> Any:
        if rank not in members:
            return dist.GroupMember.NON_GROUP_MEMBER
        key = group_desc, tuple(members)
        if key not in groups:
            groups[key] = world.add_group(SimulatedGroup(ranks, rank, members, group_desc), members)
        return groups[key]

    compute_rank_groups = parallel_state.generate_masked_orthogonal_rank_groups

    def compute_cached_groups(size: int, sizes: list[int], mask: list[bool]) -> list[list[int]]:
        key = size, *sizes, *mask
        if key not in ranks.rank_groups:
            ranks.rank_groups[key] = compute_rank_groups(size, sizes, mask)
        return [list(group) for group in ranks.rank_groups[key]]

    # `join` sends no message, so no thread runs meanwhile
    with (mock.patch.object(parallel_state, "create_group", create_group),
          mock.patch.object(parallel_state, "generate_masked_orthogonal_rank_groups",
                            compute_cached_groups)):
        return join(rank, ranks.size)


@functools.cache
def _list_rank_attributes() -> tuple[tuple[Any, str], ...]:
    """Return the module and class attributes with one value per rank, as (owner, name)."""
    # groups, ranks and buffers
    groups = [(parallel_state, name) for name, value in vars(parallel_state).items()
              if name.startswith("_") and not name.startswith("__") and not callable(value)]
    states = [(random, name) for name in _RANDOM_STATES if hasattr(random, name)]
    return *groups, *states, (MTPLossLoggingHelper, "tracker"), (distributed_c10d, "_world")


def _copy_initial_state(previous: Sequence[Any]) -> Sequence[Any]:
    """Return initial values for `_list_rank_attributes`; objects that this process already created are not
    shared."""
    initial: dict[tuple[Any, str], Any] = {
        (random, _RANDOM_STATES[0]): None, (random, _RANDOM_STATES[1]): False,
        (MTPLossLoggingHelper, "tracker"): {}}
    return [initial.get(attribute, value) for attribute,
            value in zip(_list_rank_attributes(), previous, strict=True)]


def _read_rank_state() -> Sequence[Any]:
    return [getattr(owner, name) for owner, name in _list_rank_attributes()]


def _write_rank_state(state: Sequence[Any]) -> None:
    for (owner, name), value in zip(_list_rank_attributes(), state, strict=True):
        setattr(owner, name, value)


def _create_acquired_lock() -> Any:
    """Return an acquired lock; its release lets a thread run."""
    lock = threading.Lock()
    lock.acquire()
    return lock
