"""CUDA graphs of modules in the order of a pipeline's passes, captured and replayed by `recording`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..common.recipe import DelayedScaling
from .quantization import autocast
from .recording import CapturedOperators

_is_capturing = False


def set_capture_start() -> None:
    """Record that graph capture has started."""
    global _is_capturing
    _is_capturing = True


def set_capture_end() -> None:
    """Record that graph capture has ended."""
    global _is_capturing
    _is_capturing = False


def is_graph_capturing() -> bool:
    """Return whether graphs are being captured."""
    return _is_capturing


def save_fp8_tensors(modules: Any, recipe: Any) -> list[Any] | None:
    """Return None: only delayed scaling has a state to save, and the double refuses it."""
    if isinstance(recipe, DelayedScaling):
        raise NotImplementedError("the double captures no delayed scaling")
    return None


def restore_fp8_tensors(modules: Any, fp8_tensors: list[Any] | None) -> None:
    """Do nothing, because `save_fp8_tensors` saves no state."""


class _Pass:
    """Forward and backward graph of one module for one micro-batch.

    The graphs read `inputs` and `output_grads`, and write `outputs` and `input_grads`. `clones` has for each
    input gradient whether a replay returns a copy. `delayed`: modules whose weight gradients the graph
    `backward_dw` computes. `in_flight`: graphs ("backward", "backward_dw") to replay before the next forward
    pass. `memory`: (pass, graph) pairs captured before this forward graph, which reuses their memory.
    """

    def __init__(self, module: torch.nn.Module, args: tuple[torch.Tensor, ...],
                 kwargs: dict[str, torch.Tensor]) -> None:
        self.module, self.args, self.kwargs = module, args, kwargs
        self.forward, self.backward, self.backward_dw = (CapturedOperators() for _ in range(3))
        self.names = list(kwargs)
        self.inputs = [*args, *kwargs.values()]
        self.parameters: tuple[torch.nn.Parameter, ...] = tuple(module.parameters())
        self.outputs: list[Any] = []
        self.output_grads: list[Any] = []
        self.spec: Any = None
        self.input_grads: list[Any] = []
        self.clones: list[bool] = []
        self.delayed: list[Any] = []
        self.in_flight: set[str] = set()
        self.memory: list[tuple[_Pass, str]] = []
        self.is_reset = False

    def run(self) -> None:
        """Compute the outputs of the module."""
        self.outputs, self.spec = tree_flatten(self.module(*self.args, **self.kwargs))

    def run_backward(self) -> list[Any]:
        """Return the gradients, computed from `output_grads`, of inputs and parameters that require one."""
        surface = [t for t in (*self.inputs, *self.parameters) if t.requires_grad]
        previous_grads = [t.grad for t in surface]
        for t in surface:
            t.grad = None
        torch.autograd.backward(tuple(o for o in self.outputs if o is not None and o.requires_grad),
                                tuple(g for g in self.output_grads if g is not None))
        gradients = [t.grad for t in surface]
        for t, grad in zip(surface, previous_grads, strict=True):
            t.grad = grad
        return gradients

    def start(self) -> None:
        """Mark the pass as in flight. Raises RuntimeError: a pass in flight still needs the same memory."""
        if any(part in other.in_flight for other, part in self.memory):
            raise RuntimeError("a forward graph writes into memory of a pass whose backward graph has not "
                               "run: it was captured after that backward graph")
        self.in_flight = {"backward", *(["backward_dw"] if self.delayed else [])}

    def list_delayed(self) -> list[Any]:
        """Return the modules whose weight gradients wait for `backward_dw`."""
        return [m for m in self.module.modules() if getattr(m, "_delayed_products", None)]

    def drop_unused_parameters(self, gradients: list[Any]) -> None:
        """Remove parameters without a gradient: other modules compute with them."""
        num_inputs = sum(t.requires_grad for t in self.inputs)
        trained = [p for p in self.parameters if p.requires_grad]
        self.parameters = tuple(parameter for parameter, gradient
                                in zip(trained, gradients[num_inputs:], strict=True) if gradient is not None)


class _Graphed(torch.autograd.Function):
    """Replays the forward and the backward graph of a pass."""

    @staticmethod
    def forward(ctx: Any, graphs: _Pass, *inputs: torch.Tensor) -> tuple[Any, ...]:
        ctx.graphs = graphs
        for buffer, tensor in zip(graphs.inputs, inputs, strict=False):
            if buffer.data_ptr() != tensor.data_ptr():
                buffer.detach().copy_(tensor)
        graphs.start()
        graphs.forward.replay()
        return tuple(o.detach() if o is not None else None for o in graphs.outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        graphs: _Pass = ctx.graphs
        for buffer, gradient in zip(graphs.output_grads, gradients, strict=True):
            if buffer is not None and buffer.data_ptr() != gradient.data_ptr():
                buffer.copy_(gradient)
        graphs.backward.replay()
        graphs.in_flight.discard("backward")
        input_grads: list[torch.Tensor | None] = []
        for gradient, is_cloned in zip(graphs.input_grads, graphs.clones, strict=True):
            if gradient is None:
                input_grads.append(None)
            else:  # without a copy, memory of the graph may become a tensor's `grad`
                input_grads.append(gradient.clone() if is_cloned else gradient.detach())
        # another graph may reuse the outputs' memory from now on: late readers find NaN
        for output in graphs.outputs:
            if output is not None and output.is_floating_point():
                output.detach().fill_(math.nan)
        return None, *input_grads


def _build_callable(graphs: _Pass, original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a callable that replays the graphs in training mode, and calls `original` otherwise."""
    def replayed(*args: Any, **kwargs: Any) -> Any:
        if graphs.is_reset:
            raise RuntimeError("This graphed callable has been reset and can no longer be used.")
        if not graphs.module.training:
            return original(*args, **kwargs)
        if missing := [name for name in graphs.names if name not in kwargs]:
            raise TypeError(f"Graphed callable was initialized with kwarg {missing[0]} ,but it was not "
                            "provided in graph replay")
        inputs = [*tree_flatten(args)[0], *(kwargs[name] for name in graphs.names)]
        return tree_unflatten(_Graphed.apply(graphs, *inputs, *graphs.parameters), graphs.spec)

    def reset() -> None:
        graphs.is_reset = True
        for graph in (graphs.forward, graphs.backward, graphs.backward_dw):
            graph.reset()

    def backward_dw() -> None:
        graphs.backward_dw.replay()
        graphs.in_flight.discard("backward_dw")
        for module in graphs.delayed:
            module._trigger_wgrad_accumulation_and_reduce_hooks()

    replayed.reset, replayed.backward_dw = reset, backward_dw  # type: ignore[attr-defined]
    return replayed


@contextmanager
def _quantize_calls(modules: tuple[Any, ...], enabled: tuple[bool, ...], recipe: Any) -> Iterator[None]:
    """Quantize the products of the enabled modules inside the context."""
    enabled_by_id = {id(module): is_enabled for module, is_enabled in zip(modules, enabled, strict=True)}
    originals = {type(m): type(m).__call__ for m in modules}

    def wrap_call(original: Any) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            with autocast(enabled=enabled_by_id.get(id(self), False), recipe=recipe, _graph=True):
                return original(self, *args, **kwargs)

        return call

    for kind, original in originals.items():
        kind.__call__ = wrap_call(original)
    try:
        yield
    finally:
        for kind, original in originals.items():
            kind.__call__ = original


def make_graphed_callables(
        modules: Any, sample_args: Any, num_warmup_iters: int = 3, allow_unused_input: bool = False,
        sample_kwargs: Any = None, fp8_enabled: Any = None, fp8_calibrating: bool | None = None,
        fp8_recipe: Any = None, fp8_group: Any = None, fp8_weight_caching: bool | None = None,
        enabled: Any = None, calibrating: bool | None = None, recipe: Any = None,
        amax_reduction_group: Any = None, cache_quantized_params: bool | None = None,
        _order: list[float] | None = None, _num_layers_per_chunk: list[int] | None = None, pool: Any = None,
        retain_graph_in_backward: bool = False, _reuse_graph_input_output_buffers: bool = False,
        clone_param_grads_on_return: bool = True, pre_warmup_hook: Callable[[], None] | None = None,
        post_warmup_hook: Callable[[], None] | None = None, capture_time_hooks: Any = None) -> Any:
    """Capture the passes of a pipeline schedule; return a replaying callable for each pass through each
    module. One warm-up pass replaces `num_warmup_iters`.

    Args:
        modules: layers of all model chunks, in order.
        sample_args: for each pass the input tensors of its graph, by chunk, then micro-batch, then layer;
            passes that are never in flight together may share tensors.
        sample_kwargs: the same for keyword arguments.
        _order: chunk numbers from 1 in schedule order; negative: backward pass; lower by a half: the weight
            gradients of that backward pass.
        _num_layers_per_chunk: layers of each chunk.
    """
    if _order is None or _num_layers_per_chunk is None:
        raise NotImplementedError("the double captures passes of a pipeline only")
    for module in modules:
        if (module._backward_hooks or module._backward_pre_hooks or module._forward_hooks
                or module._forward_pre_hooks):
            raise RuntimeError("Modules must not have hooks registered at the time they are passed.")
        if not module.training:
            raise NotImplementedError("the double captures training mode only")
    starts = [sum(_num_layers_per_chunk[:i]) for i in range(len(_num_layers_per_chunk))]
    num_whole = sum(entry == int(entry) for entry in _order)
    num_micro_batches = num_whole // len(starts) // 2  # each passes every chunk forward and backward
    sample_kwargs = sample_kwargs or [{} for _ in sample_args]
    if len(sample_args) != len(modules) * num_micro_batches:
        raise ValueError(
            f"Expected {len(modules) * num_micro_batches} args tuple, but got {len(sample_args)}.")
    pass_modules = [modules[start + layer] for start, n in zip(starts, _num_layers_per_chunk, strict=True)
                    for _ in range(num_micro_batches) for layer in range(n)]
    passes = [_Pass(module, args, kwargs)
              for module, args, kwargs in zip(pass_modules, sample_args, sample_kwargs, strict=True)]
    enabled = fp8_enabled if enabled is None else enabled
    if not isinstance(enabled, tuple):
        enabled = (bool(enabled),) * len(modules)
    save_fp8_tensors(modules, fp8_recipe if any(enabled) else None)
    set_capture_start()
    state = torch.get_rng_state()
    with _quantize_calls(modules, enabled, fp8_recipe or recipe):
        for hook in (pre_warmup_hook, post_warmup_hook):
            if hook is not None:
                hook()
        _run_schedule(_order, starts, _num_layers_per_chunk, num_micro_batches, passes, _warm_up,
                      _warm_up_backward, lambda graphs: None)
        shared: dict[Any, list[Any]] = {}
        free: list[tuple[_Pass, str]] = []
        _run_schedule(_order, starts, _num_layers_per_chunk, num_micro_batches, passes,
                      lambda graphs: _capture(graphs, free),
                      lambda graphs: _capture_backward(graphs, shared, clone_param_grads_on_return, free),
                      lambda graphs: _capture_delayed(graphs, free))
    torch.set_rng_state(state)
    set_capture_end()
    return tuple(_build_callable(graphs, graphs.module.forward) for graphs in passes)


def _run_schedule(order: list[float], starts: list[int], num_layers: list[int], num_micro_batches: int,
                  passes: list[_Pass], forward: Callable[[_Pass], None], backward: Callable[[_Pass], None],
                  delayed: Callable[[_Pass], None]) -> None:
    """Apply `forward`, `backward` or `delayed` to each pass in the order of a pipeline schedule.

    `starts` and `num_layers`: first layer and number of layers of each chunk.
    """
    micro_batches_done = {direction: [0] * len(starts) for direction in (1, -1)}
    for entry in order:
        chunk, direction = abs(math.ceil(entry)) - 1, 1 if entry > 0 else -1
        is_delayed = entry != math.ceil(entry)
        # weight gradients belong to the micro-batch whose backward pass ran last
        micro_batch = micro_batches_done[direction][chunk] - is_delayed
        micro_batches_done[direction][chunk] += not is_delayed
        first = starts[chunk] * num_micro_batches + micro_batch * num_layers[chunk]
        apply = delayed if is_delayed else {1: forward, -1: backward}[direction]
        for graphs in passes[first:first + num_layers[chunk]][::direction]:
            apply(graphs)


def _warm_up(graphs: _Pass) -> None:
    graphs.run()


def _warm_up_backward(graphs: _Pass) -> None:
    graphs.output_grads = [torch.zeros_like(o) if o is not None and o.requires_grad else None
                           for o in graphs.outputs]
    graphs.drop_unused_parameters(graphs.run_backward())
    for module in graphs.list_delayed():
        module.backward_dw()


def _capture(graphs: _Pass, free: list[tuple[_Pass, str]]) -> None:
    """Capture the forward pass, whose graph may reuse the memory of the graphs in `free`."""
    graphs.memory = list(free)
    with graphs.forward.capture():
        graphs.run()


def _capture_backward(graphs: _Pass, shared: dict[Any, list[Any]], clones: bool,
                      free: list[tuple[_Pass, str]]) -> None:
    """Capture the backward pass; graphs captured later may reuse its memory.

    `shared`: shapes and dtypes of outputs -> output gradients, which passes with equal outputs share.
    `clones`: replays return copies of parameter gradients.
    """
    free.append((graphs, "backward"))
    key = tuple((o.shape, o.dtype) for o in graphs.outputs if o is not None and o.requires_grad)
    if key not in shared:
        shared[key] = [torch.zeros_like(o) if o is not None and o.requires_grad else None
                       for o in graphs.outputs]
    graphs.output_grads = shared[key]
    with graphs.backward.capture():
        gradients = iter(graphs.run_backward())
    surface = [*graphs.inputs, *graphs.parameters]
    graphs.input_grads = [next(gradients) if t.requires_grad else None for t in surface]
    graphs.clones = [clones and i >= len(graphs.inputs) and not getattr(t, "skip_backward_post_hook", False)
                     for i, t in enumerate(surface)]
    graphs.outputs = [o.detach() if o is not None else None for o in graphs.outputs]


def _capture_delayed(graphs: _Pass, free: list[tuple[_Pass, str]]) -> None:
    """Capture the weight gradients that the backward pass postponed."""
    free.append((graphs, "backward_dw"))
    graphs.delayed = graphs.list_delayed()
    if not graphs.delayed:
        raise RuntimeError("No module needs wgrad computation but get float in order")
    with graphs.backward_dw.capture():
        for module in graphs.delayed:
            module.backward_dw()
