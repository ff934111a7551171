"""All processes of a layout in one: each is a thread, of which one works at a time, and a message is a copy
in memory.

The library and this project run as they are, with the groups of the real number of processes: what they send,
to whom and in which order is what they would send on a cluster.  A thread gives its turn away only where it
waits for others, so that a run is the same each time; if all wait, the layout would hang, and who waits for
what is told.
"""

from __future__ import annotations

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
from torch.distributed import distributed_c10d

from megatron_sov.engine.parallel import cpu_shims
from megatron_sov.engine.parallel.simulated_messages import (
    CallSite, Meddle, Part, Standstill, deliver, plain, reduce_kind, reduced, site_of)
from megatron_sov.engine.parallel.world import ParallelWorld, make_groups, own_place, pass_over_warnings
from megatron_sov.model.config import ParallelConfig

Result = TypeVar("Result")
STACK_BYTES = 4 << 20
"""Of a thread: the default of 8 MiB, times a thousand, is refused where memory is counted strictly."""
_M_ARENA_MAX = -8  # malloc.h
_RANDOM_STATES = ("_CUDA_RNG_STATE_TRACKER", "_CUDA_RNG_STATE_TRACKER_INITIALIZED")
TOLD_WAITING = 6
"""Processes that a message about a standstill names."""


@dataclass
class _Call:
    """A call that not all members have come to."""

    asked: str
    parts: dict[int, Part] = field(default_factory=dict)
    is_done: bool = False


class SimulatedRanks:
    """The threads, and who may work."""

    def __init__(self, size: int, meddle: Meddle | None = None) -> None:
        """Start nothing yet.

        Args:
            size: number of processes.
            meddle: may do a call's work in another way.
        """
        self.size, self.meddle = size, meddle
        self.sites: dict[CallSite, int] = {}
        """Where messages were sent from -> how often, by all processes together."""
        self.watch: Callable[[int, CallSite], None] | None = None
        """Told of each call of a process."""
        self.calls: dict[tuple[str, int], _Call] = {}
        self.mail: dict[tuple[str, int, int, int], deque[tuple[CallSite, list[torch.Tensor]]]] = {}
        self.rank_groups: dict[Any, list[list[int]]] = {}
        """What the library finds for sizes alone, and each process would find once more."""
        self._turns = [_taken() for _ in range(size)]
        self._ready: deque[int] = deque(range(size))
        self._waiting: dict[int, str] = {}
        self._own: list[Sequence[Any]] = []
        self._num_left = size
        self._is_over = _taken()
        self._failure: BaseException | None = None

    def run(self, parallel: ParallelConfig, body: Callable[[ParallelWorld], Result]) -> list[Result]:
        """Have every process do something in a world of its own; returns what each returns, by rank.

        Args:
            parallel: the layout whose groups there are.
            body: called once in each process.

        Raises:
            Standstill: they would wait for ever, or nobody has taken what some have sent.
        """
        pass_over_warnings()
        found: list[Any] = [None] * self.size
        before = _own_of_process()
        self._own = [_own_at_first(before) for _ in range(self.size)]

        def play(rank: int) -> None:
            self._turns[rank].acquire()
            try:
                if self._failure is None:
                    _take_on(self._own[rank])
                    found[rank] = body(_enter(self, rank, parallel))
            except BaseException as e:
                self._failure = self._failure or e
            finally:
                self._num_left -= 1
                self._pass_on()

        _share_one_heap()
        # the library says in the environment which attention a model has, for whoever computes it next
        with (self._signals_wait(), mock.patch.dict(os.environ),
              mock.patch.object(dist, "all_gather_object", _gather_objects)):
            threading.stack_size(STACK_BYTES)
            try:
                threads = [threading.Thread(target=play, args=(rank,), daemon=True)
                           for rank in range(self.size if self.size > 1 else 0)]
                for thread in threads:
                    thread.start()
            finally:
                threading.stack_size(0)
            self._pass_on()
            if self.size == 1:
                play(0)  # nobody takes turns with it
            self._is_over.acquire()
            _take_on(before)
        if self._failure is not None:
            raise self._failure
        self._check_all_taken()
        return found

    def _check_all_taken(self) -> None:
        left = [f"rank {sender} of {group} sends to rank {to} from {box[0][0].where}"
                for (group, sender, to, _), box in self.mail.items() if box]
        left += [f"{call.asked} over {group}, which only {len(call.parts)} call"
                 for (group, _), call in self.calls.items()]
        if left:
            raise Standstill(f"nobody takes {len(left)} of the messages: " + "; ".join(left[:TOLD_WAITING]))

    @contextlib.contextmanager
    def _signals_wait(self) -> Iterator[None]:
        """Have Ctrl-C and SIGTERM end all threads at their next message, and do what they do behind that.

        A thread that computes when the interpreter ends aborts it, and an exception that came between a turn
        taken and a turn given would leave nobody with it, and all waiting.
        """
        came: list[int] = []

        def end(number: int, frame: FrameType | None) -> None:
            came.append(number)
            self._failure = self._failure or KeyboardInterrupt()

        # one process computes in this thread, where an exception ends it; other threads get no signals
        waits = self.size > 1 and threading.current_thread() is threading.main_thread()
        numbers: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM) if waits else ()
        before = {number: signal.getsignal(number) for number in numbers}
        told = {number: handler for number, handler in before.items() if callable(handler)}
        for number in told:
            signal.signal(number, end)
        try:
            yield
        finally:
            for number, handler in told.items():
                signal.signal(number, handler)
        for number in came[:1]:
            told[number](number, None)

    def wait(self, rank: int, holds: Callable[[], bool], what: str) -> None:
        """Let others work until something holds."""
        if self._failure is not None:
            raise SystemExit
        while not holds():
            self._waiting[rank] = what
            self._own[rank] = _own_of_process()
            self._pass_on()
            self._turns[rank].acquire()
            if self._failure is not None:
                # others have failed: this thread ends too, and nobody hears of it twice
                raise SystemExit
            _take_on(self._own[rank])

    def wake(self, ranks: Sequence[int]) -> None:
        """Let those go on who wait and may find that it holds now."""
        for rank in ranks:
            if self._waiting.pop(rank, None) is not None:
                self._ready.append(rank)

    def _pass_on(self) -> None:
        """Give the turn to the next who may work."""
        if self._num_left == 0:
            self._is_over.release()
            return
        if not self._ready and self._failure is None:
            told = [f"rank {rank} in {what}" for rank, what in sorted(self._waiting.items())[:TOLD_WAITING]]
            self._failure = Standstill(f"{len(self._waiting)} of {self.size} processes wait for ever: "
                                       + "; ".join(told))
        if self._failure is not None:
            self.wake(list(self._waiting))
        self._turns[self._ready.popleft()].release()


def _share_one_heap() -> None:
    """Have glibc give what one thread has freed to all of them: with heaps for every few threads 512
    processes took half as much memory again."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's own
    if sys.platform == "linux" and mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)


@contextlib.contextmanager
def _told_at(site: CallSite) -> Iterator[None]:
    """Have what is said of a message say where it was sent."""
    try:
        yield
    except Standstill as e:
        raise Standstill(f"{site}: {e}") from e


class _Done(dist.Work):
    """A message under way."""

    def __init__(self, ranks: SimulatedRanks, rank: int, holds: Callable[[], bool], what: str) -> None:
        super().__init__()
        self._ranks, self._rank, self._holds, self._what = ranks, rank, holds, what

    def wait(self, timeout: Any = None) -> bool:
        self._ranks.wait(self._rank, self._holds, self._what)
        return True

    def is_completed(self) -> bool:
        return self._holds()


# its methods are overloaded for torch's C++ side, and are called in one way each
_ProcessGroup: Any = dist.ProcessGroup


class SimulatedGroup(_ProcessGroup):
    """One process's handle of a group; torch.distributed calls it as it calls NCCL's or gloo's.

    The names of its methods are torch's: those that end in `_single` or begin with `_` are what
    `all_gather_into_tensor` and `reduce_scatter_tensor` call in its versions.
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

    def _call(self, kind: str, part: Part, work: Callable[[list[Part]], None]) -> dist.Work:
        """Give a part of a call; whoever comes last does its work for all."""
        site = self._site(kind)
        key = self._key, self._num_calls
        self._num_calls += 1
        asked = f"{kind} {part.how}".rstrip()
        call = self._ranks.calls.setdefault(key, _Call(asked))
        if call.asked != asked:
            raise Standstill(f"rank {self._rank} calls {asked} over {self._key} at {site.where}, and others "
                             f"call {call.asked} at the same time")
        call.parts[self._index] = part
        if len(call.parts) == len(self._members):
            parts = [call.parts[index] for index in range(len(self._members))]
            with torch.no_grad(), _told_at(site):
                if self._ranks.meddle is None or not self._ranks.meddle(site, parts, work):
                    work(parts)
            call.is_done = True
            del self._ranks.calls[key]
            self._ranks.wake(self._members)
        return _Done(self._ranks, self._rank, lambda: call.is_done,
                     f"{kind} over {self._key} at {site.where}")

    def _site(self, kind: str) -> CallSite:
        site = site_of(kind, self._description)
        self._ranks.sites[site] = self._ranks.sites.get(site, 0) + 1
        if self._ranks.watch is not None:
            self._ranks.watch(self._rank, site)
        return site

    def allreduce(self, tensors: list[torch.Tensor], opts: Any = None) -> dist.Work:
        how, own = reduce_kind(opts), plain(tensors)

        def work(parts: list[Part]) -> None:
            for given in zip(*(part.inputs for part in parts), strict=True):
                total = reduced(how, given)
                for tensor in given:
                    tensor.copy_(total)

        return self._call("allreduce", Part(own, own, how=how), work)

    allreduce_coalesced = allreduce

    def barrier(self, opts: Any = None) -> dist.Work:
        return self._call("barrier", Part([], []), lambda parts: None)

    def broadcast(self, tensors: list[torch.Tensor], opts: Any) -> dist.Work:
        own, root = plain(tensors), int(opts.rootRank)

        def work(parts: list[Part]) -> None:
            for part in (part for index, part in enumerate(parts) if index != root):
                for mine, sent in zip(part.outputs, parts[root].inputs, strict=True):
                    deliver(mine, sent)

        return self._call("broadcast", Part(own, own, how=f"from {self._members[root]}"), work)

    def allgather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor],
                  opts: Any = None) -> dist.Work:
        def work(parts: list[Part]) -> None:
            for part in parts:
                for mine, sender in zip(part.outputs, parts, strict=True):
                    deliver(mine, sender.inputs[0])

        return self._call("allgather", Part(plain(inputs), plain(outputs[0])), work)

    def gather_objects(self, values: list[Any], value: Any) -> dist.Work:
        """Give a value that is no tensor, which is copied once for all, since nobody changes it: of 512
        processes each would read what 512 have sent."""
        def work(parts: list[Part]) -> None:
            sent = [copy.deepcopy(part.value) for part in parts]
            for part in parts:
                part.values[:] = sent

        return self._call("allgather", Part([], [], how="objects", value=value, values=values),
                          work)

    def all_gather_single(self, output: torch.Tensor, sent: torch.Tensor, opts: Any = None) -> dist.Work:
        return self.allgather([list(output.chunk(self.size()))], [sent], opts)

    def all_gather_single_coalesced(self, outputs: list[torch.Tensor], inputs: list[torch.Tensor],
                                    opts: Any = None) -> dist.Work:
        return [self.all_gather_single(output, sent, opts)
                for output, sent in zip(outputs, inputs, strict=True)][-1]

    def reduce_scatter(self, outputs: list[torch.Tensor], inputs: list[list[torch.Tensor]],
                       opts: Any = None) -> dist.Work:
        how = reduce_kind(opts)

        def work(parts: list[Part]) -> None:
            # all sums first: a result may lie in the memory of what is summed
            totals = [reduced(how, [part.inputs[index] for part in parts]) for index in range(len(parts))]
            for part, total in zip(parts, totals, strict=True):
                deliver(part.outputs[0], total)

        return self._call("reduce_scatter", Part(plain(inputs[0]), plain(outputs), how=how), work)

    def reduce_scatter_single(self, output: torch.Tensor, summed: torch.Tensor,
                              opts: Any = None) -> dist.Work:
        return self.reduce_scatter([output], [list(summed.chunk(self.size()))], opts)

    def reduce_scatter_single_coalesced(self, outputs: list[torch.Tensor], inputs: list[torch.Tensor],
                                        opts: Any = None) -> dist.Work:
        return [self.reduce_scatter_single(output, summed, opts)
                for output, summed in zip(outputs, inputs, strict=True)][-1]

    def all_to_all_single(self, output: torch.Tensor, sent: torch.Tensor, output_sizes: list[int] | None,
                          input_sizes: list[int] | None, opts: Any = None) -> dist.Work:
        part = Part(plain([sent]), plain([output]), self._sizes(input_sizes, sent),
                    self._sizes(output_sizes, output))

        def work(parts: list[Part]) -> None:
            sent = [part.inputs[0].split(part.input_sizes) for part in parts]
            for index, part in enumerate(parts):
                for sender, mine in enumerate(part.outputs[0].split(part.output_sizes)):
                    deliver(mine, sent[sender][index])

        return self._call("alltoall", part, work)

    def _sizes(self, given: Sequence[int] | None, tensor: torch.Tensor) -> list[int]:
        """Return how many rows go to, or come from, each member: as many to each where nothing is given."""
        sizes = [int(size) for size in given] if given is not None else []
        return sizes or [len(tensor) // self.size()] * self.size()

    def alltoall(self, outputs: list[torch.Tensor], inputs: list[torch.Tensor],
                 opts: Any = None) -> dist.Work:
        def work(parts: list[Part]) -> None:
            for index, part in enumerate(parts):
                for mine, sender in zip(part.outputs, parts, strict=True):
                    deliver(mine, sender.inputs[index])

        return self._call("alltoall", Part(plain(inputs), plain(outputs)), work)

    # torch before 2.13 asks for these by other names
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single

    def gather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any) -> dist.Work:
        root = int(opts.rootRank)

        def work(parts: list[Part]) -> None:
            for mine, sender in zip(parts[root].outputs, parts, strict=True):
                deliver(mine, sender.inputs[0])

        return self._call("gather", Part(
            plain(inputs), plain(outputs[0]) if outputs else [], how=f"to {self._members[root]}"), work)

    def scatter(self, outputs: list[torch.Tensor], inputs: list[list[torch.Tensor]], opts: Any) -> dist.Work:
        root = int(opts.rootRank)

        def work(parts: list[Part]) -> None:
            for part, sent in zip(parts, parts[root].inputs, strict=True):
                deliver(part.outputs[0], sent)

        return self._call("scatter", Part(
            plain(inputs[0]) if inputs else [], plain(outputs), how=f"from {self._members[root]}"), work)

    def send(self, tensors: list[torch.Tensor], to: int, tag: int = 0) -> dist.Work:
        site = self._site("send")
        box = self._ranks.mail.setdefault((self._key, self._index, to, tag), deque())
        box.append((site, [tensor.clone() for tensor in plain(tensors)]))
        self._ranks.wake([self._members[to]])
        return _Done(self._ranks, self._rank, lambda: True, "send")

    def recv(self, tensors: list[torch.Tensor], sender: int, tag: int = 0) -> dist.Work:
        site = self._site("recv")
        box = self._ranks.mail.setdefault((self._key, sender, self._index, tag), deque())
        mine = plain(tensors)
        taken: list[torch.Tensor] = []

        def holds() -> bool:
            if not taken and box:
                taken.extend(box.popleft()[1])
                with _told_at(site):
                    for tensor, sent in zip(mine, taken, strict=True):
                        deliver(tensor, sent)
                if self._ranks.meddle is not None:
                    self._ranks.meddle(site, [Part(mine, mine)], lambda parts: None)
            return bool(taken)

        return _Done(self._ranks, self._rank, holds,
                     f"recv from rank {self._members[sender]} over {self._key} at {site.where}")


def _gather_objects(values: list[Any], value: Any, group: Any = None) -> None:
    """`torch.distributed.all_gather_object`."""
    asked: Any = group or distributed_c10d._get_default_group()
    asked.gather_objects(values, value).wait()


class _World:
    """What torch.distributed knows of one process: its groups."""

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

    def add(self, group: SimulatedGroup, members: Sequence[int]) -> SimulatedGroup:
        self.pg_map[group] = ("gloo", None)
        self.pg_names[group] = group.group_name
        self.pg_group_ranks[group] = {rank: index for index, rank in enumerate(members)}
        self.pg_backend_config[group] = "cpu:gloo"
        self.pg_default_device[group] = torch.device("cpu")
        return group


def _enter(ranks: SimulatedRanks, rank: int, parallel: ParallelConfig) -> ParallelWorld:
    """Make a process's world and the layout's groups in it; returns its place."""
    from megatron.core import parallel_state, tensor_parallel

    world = _World()
    distributed_c10d._world = world  # type: ignore[assignment]
    everyone = range(ranks.size)
    world.default_pg = world.add(SimulatedGroup(ranks, rank, everyone, "WORLD"), everyone)
    made: dict[tuple[str, tuple[int, ...]], SimulatedGroup] = {}

    def create(members: Sequence[int], *_: Any, group_desc: str = "", **__: Any) -> Any:
        if rank not in members:
            return dist.GroupMember.NON_GROUP_MEMBER
        key = group_desc, tuple(members)
        if key not in made:
            made[key] = world.add(SimulatedGroup(ranks, rank, members, group_desc), members)
        return made[key]

    find = parallel_state.generate_masked_orthogonal_rank_groups

    def rank_groups(size: int, sizes: list[int], mask: list[bool]) -> list[list[int]]:
        key = size, *sizes, *mask
        if key not in ranks.rank_groups:
            ranks.rank_groups[key] = find(size, sizes, mask)
        return [list(group) for group in ranks.rank_groups[key]]

    # nothing is sent while groups are made, so that no other thread sees this
    with (mock.patch.object(parallel_state, "create_group", create),
          mock.patch.object(parallel_state, "generate_masked_orthogonal_rank_groups", rank_groups)):
        make_groups(parallel)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    cpu_shims.mend()
    return own_place(rank, ranks.size)


@functools.cache
def _own_places() -> tuple[tuple[Any, str], ...]:
    """Return what each process has of its own among the variables of modules: (module or class, name)."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    # its groups, ranks and buffers
    groups = [(parallel_state, name) for name, value in vars(parallel_state).items()
              if name.startswith("_") and not name.startswith("__") and not callable(value)]
    states = [(random, name) for name in _RANDOM_STATES if hasattr(random, name)]
    return *groups, *states, (MTPLossLoggingHelper, "tracker"), (distributed_c10d, "_world")


def _own_at_first(before: Sequence[Any]) -> Sequence[Any]:
    """Return what a process begins with: what it makes for itself, and this one has made before, is not
    shared."""
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    made: dict[tuple[Any, str], Any] = {(random, _RANDOM_STATES[0]): None, (random, _RANDOM_STATES[1]): False,
                                        (MTPLossLoggingHelper, "tracker"): {}}
    return [made.get(place, value) for place, value in zip(_own_places(), before, strict=True)]


def _own_of_process() -> Sequence[Any]:
    return [getattr(owner, name) for owner, name in _own_places()]


def _take_on(own: Sequence[Any]) -> None:
    for (owner, name), value in zip(_own_places(), own, strict=True):
        setattr(owner, name, value)


def _taken() -> Any:
    """Return a lock that somebody has: a turn, which is given by its release."""
    lock = threading.Lock()
    lock.acquire()
    return lock
