"""The compressor of long recordings: of each chunk of features one stays, which a Mamba-2 layer has written
at a learned query behind the chunk.

It is MambaMia2 as the authors serve it (OmniServe, mambamia_videoaudio_compressor.py), with their names: a
projection to the layer's width, a query behind each chunk, a norm, one block (norm, gated pooling of the
chunk into its query, Mamba-2, residual), a norm, a projection to the model's width.  Their dropout inside the
block is left out: what is computed would depend on the layout.

The scan is Mamba-2's (arXiv 2405.21060, listing 1) in plain torch, piece by piece; where `mamba_ssm` is
installed and the layer is on a GPU, its kernel does the same.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import pad, rms_norm, silu, softplus

from megatron_sov.config import AudioEncoderConfig

EPS = 1e-5
INPUT_EPS = 1e-6
CONV_KERNEL = 4
"""Tokens that the layer's convolution sees."""
SCAN_TOKENS = 64
"""Tokens of a piece of the scan: inside of it all pairs are weighed, between pieces a state is passed on."""
GATE_MARGIN = 0.01
"""Least share of the query, and of its chunk, in what the layer reads at the query."""


Scan = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""x, dt, a, b, c of `scan` -> y."""


def scan(x: torch.Tensor, dt: torch.Tensor, a: torch.Tensor, b: torch.Tensor,
         c: torch.Tensor) -> torch.Tensor:
    """Return y with state[t] = exp(dt[t] a) state[t - 1] + dt[t] x[t] b[t]^T and y[t] = state[t] c[t].

    Args:
        x: [n, tokens, heads, head dim].
        dt: [n, tokens, heads], positive.
        a: [heads], negative.
        b: [n, tokens, state size], one for all heads.
        c: as `b`.
    """
    tokens = x.shape[1]
    gap = -tokens % SCAN_TOKENS
    # behind the end: steps of length 0 change nothing
    x, dt, b, c = (pad(t, (0, 0) * (t.dim() - 2) + (0, gap)).unflatten(1, (-1, SCAN_TOKENS))
                   for t in (x, dt, b, c))
    decay = (dt * a).cumsum(2)
    weighed = x * dt[..., None]
    # inside a piece: what each token adds to the ones behind it
    apart = decay[:, :, :, None] - decay[:, :, None]
    later = torch.ones(SCAN_TOKENS, SCAN_TOKENS, dtype=torch.bool, device=x.device).tril()
    kept = apart.masked_fill(~later[:, :, None], -torch.inf).exp()
    inside = torch.einsum("ngtk,ngsk,ngtsh,ngshd->ngthd", c, b, kept, weighed)
    # between pieces: the state at the end of each
    last = decay[:, :, -1:]
    added = torch.einsum("ngsk,ngsh,ngshd->nghdk", b, (last - decay).exp(), weighed)
    states, state = [], torch.zeros_like(added[:, 0])
    for piece in range(added.shape[1]):
        states.append(state)
        state = state * last[:, piece, 0].exp()[..., None, None] + added[:, piece]
    before = torch.einsum("ngtk,ngth,nghdk->ngthd", c, decay.exp(), torch.stack(states, 1))
    return (inside + before).flatten(1, 2)[:, :tokens]


def fastest(device: torch.device) -> Scan:
    """Return the kernel of `mamba_ssm` where it is installed and the numbers are on a GPU, else `scan`."""
    if device.type != "cuda" or importlib.util.find_spec("mamba_ssm") is None:
        return scan
    kernel: Any = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    return lambda x, dt, a, b, c: kernel(x, dt, a, b.unsqueeze(2), c.unsqueeze(2), SCAN_TOKENS)


class Mixer(torch.nn.Module):
    """A Mamba-2 mixer with one group, which normalises before its gate."""

    def __init__(self, width: int, head_dim: int, state_size: int) -> None:
        super().__init__()
        self.inner, self.state_size, self.head_dim = 2 * width, state_size, head_dim
        self.heads = self.inner // head_dim
        channels = self.inner + 2 * state_size
        self.dt_bias = torch.nn.Parameter(torch.ones(self.heads))
        self.A_log = torch.nn.Parameter(torch.ones(self.heads))
        self.D = torch.nn.Parameter(torch.ones(self.heads))
        self.conv1d = torch.nn.Conv1d(channels, channels, CONV_KERNEL, groups=channels,
                                      padding=CONV_KERNEL - 1)
        self.in_proj = torch.nn.Linear(width, self.inner + channels + self.heads, bias=False)
        self.norm = Norm(self.inner)
        self.out_proj = torch.nn.Linear(self.inner, width, bias=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return [n, tokens, width]; every token knows those before it."""
        projected = self.in_proj(states)
        gate, mixed, dt = projected.split([self.inner, self.inner + 2 * self.state_size, self.heads], -1)
        mixed = silu(self.conv1d(mixed.transpose(1, 2))[..., :states.shape[1]].transpose(1, 2))
        x, b, c = mixed.split([self.inner, self.state_size, self.state_size], -1)
        # bf16 would lose what is added to a long sum
        wide = torch.promote_types(states.dtype, torch.float32)
        x, b, c = x.unflatten(-1, (self.heads, self.head_dim)).to(wide), b.to(wide), c.to(wide)
        dt, a = softplus(dt.to(wide) + self.dt_bias.to(wide)), -self.A_log.to(wide).exp()
        y = fastest(x.device)(x, dt, a, b, c) + x * self.D.to(wide)[:, None]
        out: torch.Tensor = self.out_proj(self.norm(y.flatten(2).to(states.dtype)) * silu(gate))
        return out


class Norm(torch.nn.Module):
    """RMSNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(width))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return the states, normalised."""
        return rms_norm(states, self.weight.shape, self.weight, EPS)


class Block(torch.nn.Module):
    """A layer over chunks with a query behind each: the chunk is pooled into the query, then mixed."""

    def __init__(self, width: int, chunk: int, head_dim: int, state_size: int) -> None:
        super().__init__()
        self.norm = Norm(width)
        self.mixer = Mixer(width, head_dim, state_size)
        self.weight_fc = torch.nn.Linear(width, chunk)
        self.gate_fc = torch.nn.Linear(width, 1)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return [n, chunks, chunk + 1, width]."""
        normed = self.norm(states)
        features, query = normed[:, :, :-1], normed[:, :, -1]
        pooled = (features * self.weight_fc(query).softmax(-1)[..., None]).sum(2)
        gate = self.gate_fc(query).sigmoid() * (1 - 2 * GATE_MARGIN) + GATE_MARGIN
        read = torch.cat([features, (pooled * gate + query * (1 - gate)).unsqueeze(2)], 2)
        mixed: torch.Tensor = self.mixer(read.flatten(1, 2)).unflatten(1, states.shape[1:3])
        return mixed + states


class Backbone(torch.nn.Module):
    """The one block, and the norm behind it."""

    def __init__(self, block: Block, width: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([block])
        self.norm_f = Norm(width)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return [n, chunks, chunk + 1, width]."""
        out: torch.Tensor = self.norm_f(self.layers[0](states))
        return out


class Compressor(torch.nn.Module):
    """Makes one feature of each chunk of a record's features."""

    def __init__(self, config: AudioEncoderConfig, hidden_size: int) -> None:
        super().__init__()
        width, self._chunk = config.compressor_size, config.compression
        self.query_token = torch.nn.Parameter(torch.zeros(width))
        self.input_proj = torch.nn.Linear(hidden_size, width)
        self.model = Backbone(Block(width, self._chunk, config.compressor_head_dim,
                                    config.compressor_state_size), width)
        self.input_norm = torch.nn.LayerNorm(width, eps=INPUT_EPS)
        self.output_proj = torch.nn.Linear(width, hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return [records, features / chunk, hidden] of [records, features, hidden]."""
        chunks = self.input_proj(features).unflatten(1, (-1, self._chunk))
        query = self.query_token.expand(*chunks.shape[:2], 1, -1)
        states = self.model(self.input_norm(torch.cat([chunks, query], 2)))
        out: torch.Tensor = self.output_proj(states[:, :, -1])
        return out
