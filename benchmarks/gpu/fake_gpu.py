"""Run GPU code of any size on a CPU: GPU tensors are torch's fake tensors, with shape, dtype and device only.

Host tensors are real, so a process does all work that a host does next to a GPU; torch may be built without
CUDA. As on a GPU, an operation fails if it mixes host and GPU tensors, if shapes do not fit, or if it breaks
off the capture of a CUDA graph. `WAITS` counts where the host waited for the device.

Call `install` before importing megatron-core, which binds some of the patched functions at import.
"""

import contextlib
import os
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeWork, ProcessGroup
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
WAITS: Counter[str] = Counter()
"""FILE:FUNCTION -> how often the host waited there for the GPU, or for a copy to it."""
CAPABILITY = {"capability": (9, 0)}
"""CUDA compute capability that the device reports."""
CAPTURE: dict[str, Callable[[], bool]] = {"is_recording": lambda: False}
"""Function that returns whether a CUDA graph is being captured; the capturing code sets it."""
aten = torch.ops.aten
TYPES = {torch.float32: "Float", torch.bfloat16: "BFloat16", torch.float16: "Half", torch.float64: "Double",
         torch.int64: "Long", torch.int32: "Int", torch.uint8: "Byte", torch.bool: "Bool"}


def refuse_in_capture(operation: str) -> None:
    """Break off the current capture of a graph, as CUDA does.

    Raises:
        RuntimeError: a graph is being captured.
    """
    if CAPTURE["is_recording"]():
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({operation})")


def wait() -> None:
    """Count a wait of the host for its innermost function outside torch; simulated kernels do not wait."""
    refuse_in_capture("the host waits")
    caller = _caller()
    if caller is not None and not _is_kernel(caller):
        WAITS[f"{Path(caller.co_filename).name}:{caller.co_name}"] += 1


def _caller() -> CodeType | None:
    """Return the innermost function outside torch and this file that has a name."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if (f"{os.sep}torch{os.sep}" not in code.co_filename and code.co_filename != __file__
                and not code.co_name.startswith("<")):
            return code
        frame = frame.f_back
    return None


def _is_kernel(code: CodeType) -> bool:
    path = Path(code.co_filename)
    return "transformer_engine" in path.parts or path.name == "fake_rank.py"


class Ledger:
    """Bytes of GPU tensors as torch's allocator counts them: each storage once, in whole blocks, while a
    tensor uses it. Temporary memory of the double's kernels is not counted, because real kernels use
    registers. CUDA graphs share a pool that never shrinks."""

    BLOCK = 512

    def __init__(self) -> None:
        self.now = self.peak = self._pool_used = self._pool_size = 0
        self._in_pool: set[int] = set()
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._sizes: dict[int, int] = {}
        """Storage address -> counted bytes."""

    def note(self, tensors: Any) -> None:
        """Count the storages of tensors that an operation returned."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, FakeTensor):
                self._enter(tensor.untyped_storage())
        if self.now > self.peak and not ((caller := _caller()) is not None and _is_kernel(caller)):
            self.peak = self.now

    def reserve(self, func: Any, args: Any, kwargs: Any, found: Any) -> None:
        """Move the new storages of a captured operator's result to the pool of the CUDA graphs."""
        given, returned = ({t.untyped_storage()._cdata for t in tree_leaves(tensors)
                            if isinstance(t, FakeTensor)} for tensors in ((args, kwargs), found))
        for place in returned - given - self._in_pool:
            size = self._sizes[place]
            self._count(place, 0)
            self._in_pool.add(place)
            self._count(place, size)

    def resize(self, storage: torch.UntypedStorage, size: int) -> None:
        """Count a known storage as `size` bytes: the library frees activations by `resize_(0)`."""
        place = storage._cdata
        if place in self._known and self._known[place]() is not None:
            self._count(place, size)

    def _enter(self, storage: torch.UntypedStorage) -> None:
        place = storage._cdata
        if place in self._known and self._known[place]() is not None:
            return

        def leave(gone: weakref.ref[torch.UntypedStorage]) -> None:
            if self._known.get(place) is gone:
                del self._known[place]
                self._count(place, 0)
                self._in_pool.discard(place)

        self._known[place] = weakref.ref(storage, leave)
        self._count(place, storage.nbytes())

    def _count(self, place: int, size: int) -> None:
        in_blocks = -(-size // self.BLOCK) * self.BLOCK
        change = in_blocks - self._sizes.get(place, 0)
        self._sizes[place] = in_blocks
        if place in self._in_pool:
            self._pool_used += change
            change = max(0, self._pool_used - self._pool_size)
            self._pool_size += change
        self.now += change


class _Event:
    """Stand-in for `torch.cuda.Event`, and base of the stand-in for streams."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = GPU

    def synchronize(self) -> None:
        wait()

    def query(self) -> bool:
        refuse_in_capture("the host queries an event")
        return True

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Event)

    def __hash__(self) -> int:
        return 0


class _Stream(_Event):
    """Stand-in for `torch.cuda.Stream`."""


DEFAULT = _Stream()
_current = [DEFAULT]
"""Stack of streams; operations go to the last one."""


@contextlib.contextmanager
def _use_stream(stream: _Stream | None) -> Iterator[None]:
    """Replace `torch.cuda.stream`."""
    _current.append(stream or _current[-1])
    try:
        yield
    finally:
        _current.pop()


def _break_captures(expanded: torch.Tensor) -> None:
    """Make a weight's `AccumulateGrad` node break off captures if it was created on the default stream.

    Megatron-core's data parallelism takes the node from the expanded weight and holds it. When the node runs,
    the stream on which it was created waits; the default stream must not wait for a captured stream.
    """
    if _current[-1] is not DEFAULT or expanded.grad_fn is None:
        return
    node = expanded.grad_fn.next_functions[0][0]
    if node is not None and node.name().endswith("AccumulateGrad"):
        node.register_prehook(lambda _: refuse_in_capture("the default stream waits for a captured one"))


class _Shapes(FakeTensorMode):
    """Fake tensor mode that computes no values, not even of constants."""

    avoid_device_init = True


class _Operations(TorchDispatchMode):
    """Runs operations on host tensors as usual; with a GPU tensor, computes only shape, dtype and device."""

    def __init__(self, num_routed: int, ledger: Ledger) -> None:
        super().__init__()
        self._ledger = ledger
        self._shapes, self._num_routed = _Shapes(allow_non_fake_inputs=True), num_routed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.prim.device.default:
            return torch.device("meta")  # for autograd, which would look up streams of a GPU
        if func.namespace == "c10d":
            return _complete_collective(func, args)
        device = kwargs.get("device")
        to_gpu = device is not None and device.type in ("cuda", "meta")
        if to_gpu:
            kwargs["device"] = GPU
        on_gpu = any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs)))
        if not (on_gpu or to_gpu):
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            wait()
            return torch.ones((), dtype=args[0].dtype).item()
        if func is aten._to_copy.default and device is not None:
            if to_gpu != on_gpu and not kwargs.get("non_blocking"):
                wait()
            if not to_gpu:
                return self._read(args[0], kwargs.get("dtype") or args[0].dtype)
        if func is aten.copy_.default and not all(isinstance(t, FakeTensor) for t in args[:2]):
            if not (kwargs.get("non_blocking") or (len(args) > 2 and args[2])):
                wait()
            if not isinstance(args[0], FakeTensor):
                return args[0].copy_(self._read(args[1], args[0].dtype))
        with self._shapes:
            result = func(*args, **kwargs)
        self._ledger.note(result)
        return self._read(result, result.dtype) if device is not None and not to_gpu else result

    def _read(self, tensor: FakeTensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the values that the host reads from a GPU tensor: integers are equal token counts of the
        experts, floats are ones."""
        count = tensor.dim() > 0 and not tensor.is_floating_point() and tensor.dtype != torch.bool
        return torch.full(tensor.shape, self._num_routed // tensor.numel() if count else 1, dtype=dtype)


_GATHERS = {"_allgather_base_", "allgather_into_tensor_coalesced_"}
_SCATTERS = {"_reduce_scatter_base_", "reduce_scatter_tensor_coalesced_"}


def _complete_collective(func: Any, args: Any) -> Any:
    """Check a collective's arguments as NCCL would, and return a completed work without communication.

    Raises:
        RuntimeError: a tensor is on the host.
        ValueError: sizes or types do not fit.
    """
    name = func._schema.name.partition("::")[2]
    tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
    if name != "barrier" and not all(isinstance(tensor, FakeTensor) for tensor in tensors):
        raise RuntimeError(f"{name}: No backend type associated with device type cpu")
    size = ProcessGroup.unbox(next(a for a in args if isinstance(a, torch.ScriptObject))).size()
    if len({tensor.dtype for tensor in tensors}) > 1:
        raise ValueError(f"{name}: tensors of {' and '.join(str(tensor.dtype) for tensor in tensors)}")
    if name in _GATHERS | _SCATTERS:
        outputs, inputs = (a if isinstance(a, list) else [a] for a in args[:2])
        for output, given in zip(outputs, inputs, strict=True):
            whole, part = (output, given) if name in _GATHERS else (given, output)
            if whole.numel() != size * part.numel():
                raise ValueError(f"{name}: {tuple(whole.shape)} is not {size} times {tuple(part.shape)}")
    if name == "alltoall_base_":
        for tensor, splits in ((args[0], args[3]), (args[1], args[4])):
            if (len(splits) != size or sum(splits) != len(tensor)) if splits else len(tensor) % size:
                raise ValueError(f"{name}: {tuple(tensor.shape)} among {size} processes by {splits}")
    work = FakeWork().boxed()
    return work if len(func._schema.returns) == 1 else (args[0], work)


class _Calls(TorchFunctionMode):
    """Redirects calls that name the GPU to `_Operations`; a torch without CUDA would refuse them earlier."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        kwargs.pop("pin_memory", None)
        if _is_gpu(kwargs.get("device")):
            kwargs["device"] = GPU
        if name == "pin_memory":
            return args[0]
        if name == "tensor" and kwargs.get("device") == GPU:
            return func(*args, **kwargs | {"device": CPU}).to(GPU)
        if func == torch.Tensor.data.__set__ and not isinstance(  # type: ignore[attr-defined]
                args[0], FakeTensor):
            return _move(*args) if isinstance(args[1], FakeTensor) else func(*args, **kwargs)
        if name == "cuda":
            name, func, args = "to", torch.Tensor.to, (args[0], GPU)
        if name == "to" and isinstance(args[0], FakeTensor):  # already on the GPU: the operation would copy
            wanted = [a.dtype if isinstance(a, FakeTensor) else a for a in args[1:] if not _is_gpu(a)]
            if kwargs.get("device") == GPU:
                del kwargs["device"]
            if not wanted and kwargs.get("dtype") is None:
                return args[0]
            args = (args[0], *wanted)
        elif name == "to":
            args = (args[0], *(GPU if _is_gpu(a) else a for a in args[1:]))
        result = func(*args, **kwargs)
        if name == "expand_as":
            _break_captures(result)
        return result


def _is_gpu(device: Any) -> bool:
    """Return whether an argument is a name or index of the GPU."""
    if isinstance(device, (str, torch.device)):
        return torch.device(device).type == "cuda"
    return isinstance(device, int) and not isinstance(device, bool)


def _move(tensor: torch.Tensor, data: torch.Tensor) -> None:
    """Replace a host parameter in place by a GPU parameter, with all attributes that the library set."""
    parameter = torch.nn.Parameter(data, requires_grad=tensor.requires_grad)
    vars(parameter).update(vars(tensor))
    torch.utils.swap_tensors(tensor, parameter)


@contextlib.contextmanager
def use_fake_gpu(num_routed: int) -> Iterator[Ledger]:
    """Use the fake GPU in the `with` block, with `num_routed` routed tokens per micro-batch; yield the memory
    ledger."""
    ledger = Ledger()
    resize = torch.UntypedStorage.resize_

    def resize_and_count(storage: torch.UntypedStorage, size: int) -> Any:
        ledger.resize(storage, size)
        return resize(storage, size)

    with _Calls(), _Operations(num_routed, ledger), patch.object(
            torch.UntypedStorage, "resize_", resize_and_count):
        yield ledger


def install() -> None:
    """Make one GPU visible in this process, permanently, and complete object collectives locally."""
    cuda, properties = _as_any(torch.cuda), SimpleNamespace(name="fake", total_memory=1 << 40, uuid="GPU-0")
    answers: dict[str, Any] = {
        "_lazy_init": None, "is_available": True, "is_initialized": True, "device_count": 1,
        "current_device": 0, "set_device": None, "empty_cache": None, "manual_seed": None,
        "manual_seed_all": None, "get_device_properties": properties, "get_device_name": "fake",
        "mem_get_info": (1 << 40, 1 << 40), "memory_allocated": 0, "max_memory_allocated": 0,
        "memory_reserved": 0, "max_memory_reserved": 0, "default_stream": DEFAULT}
    for name, answer in answers.items():
        setattr(cuda, name, _return_always(answer))
    cuda.get_device_capability = lambda device=None: CAPABILITY["capability"]
    cuda.synchronize = lambda device=None: wait()
    cuda.Stream, cuda.Event, cuda.stream = _Stream, _Event, _use_stream
    cuda.current_stream = lambda device=None: _current[-1]
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *args: 0
    cuda.nccl.version = _return_always((2, 28, 9))
    for module in (cuda, cuda.random):
        module.get_rng_state = _rng_state
        module.set_rng_state = lambda state, device="cuda": torch.set_rng_state(state)
    _as_any(fake_tensor).init_gpu_context = _return_always(None)  # a torch with CUDA would ask the driver
    tensor, fake = _as_any(torch.Tensor), _as_any(FakeTensor)
    fake.is_cuda = property(lambda self: self.device.type == "cuda")
    fake.is_cpu = fake.is_meta = property(lambda self: False)
    fake.get_device = lambda self: 0
    fake.type = lambda self, *args: (
        torch.Tensor.type(self, *args) if args else f"torch.cuda.{TYPES[self.dtype]}Tensor")
    tensor.record_stream = lambda self, stream: None
    # calls through `__torch_function__` would disable `_Calls` during autograd's passes
    _as_any(torch.autograd).has_torch_function = _return_always(False)
    tensor.backward = lambda self, gradient=None, retain_graph=None, create_graph=False, inputs=None: (
        torch.autograd.backward(self, gradient, retain_graph, create_graph, inputs=inputs))
    _as_any(dist).get_backend = lambda group=None: "nccl"
    _as_any(dist).all_gather_object = _gather_object
    _as_any(dist).broadcast_object_list = _return_always(None)


def _rng_state(device: Any = "cuda") -> torch.Tensor:
    refuse_in_capture("the host reads the generator's state")
    return torch.get_rng_state()


def _as_any(thing: Any) -> Any:
    return thing


def _return_always(answer: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: answer


def _gather_object(found: list[Any], value: Any, group: Any = None) -> None:
    found[:] = [value] * len(found)
