"""The dual-view transformer (paper 4.3), a 1-D ResNet-18 to compare with, and NT-Xent.

In:  a view x (B, T, C) float32, z-scored; optionally keep (B, C) bool, the leads that it keeps.
Out: Output(z, time, channel): z (B, rep_dim), and what the two streams hand on, (B, D) or wider;
     Contrastive adds projections (B, proj_dim) for the loss, and represent() what is used
     downstream: z, unless --readout says otherwise. load_run(folder) gives a trained one,
     load_encoder(folder) one that takes recordings from anywhere.

Glossary: B batch, T time samples, C leads (12), D model width, H heads, N tokens, K classes (5),
tau temperature. Signals are (B, T, C); only a Conv1d sees (B, C, T).

    python model.py                   # size and cost of the default (paper) model
    python model.py --preset conv     # of the one that is worth most on small data
"""
import argparse
import json
import math
import zipfile
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from data import (CLASSES, LEADS, NORMALISATION, RATES, SECONDS, InputError, Recording, add_flags,
                  from_args, normalize, prepare, read_arrays, run_script, setting, sha256,
                  source_names, write_atomic)

C = len(LEADS)
READOUTS = "z", "streams", "all"
PROBE = "weights", "biases", "thresholds"
STREAM_OPTIONS = "mix_leads", "channel_dropout", "gate_channel", "aux_losses", "late_masking"
# The fields' defaults are `paper`; some settings are those of views.py and train.py.
# small: the paper's model for CPUs and for a few hundred to a few thousand records at 100 Hz.
# conv: for such records too, but convolutional stems, strong views and a schedule that suits them.
PRESETS = {"paper": {}, "small": dict(
    width=96, heads=4, depth=2, ff_mult=4, stem_width=48, time_stride=4, channel_bins=128,
    fusion_width=384, rep_dim=256, proj_dim=128, max_lr=1e-3, epochs=40, micro_batch=64),
    "conv": dict(
    time_stem="conv", channel_stem="conv", positions=False, max_pool=True, lead_tokens=True,
    readout="all", width=96, heads=4, depth=1, ff_mult=2, stem_width=64, time_stride=8,
    fusion_width=192, rep_dim=192, proj_dim=128, dropout=0.0, aux_losses=True, aux_weight=1.0,
    window=0.5, speed=0.2, lead_gain=0.4, wander=0.5, max_noise=0.5,
    max_lr=2e-3, weight_decay=0.05, epochs=90, micro_batch=128)}


@dataclass
class Config:
    """Size and options of an encoder; each field is a flag of train.py. Defaults: 21.48 M."""

    arch: str = setting("dualview", "dualview; resnet18 (1-D) as a baseline; torchnn: dualview of "
                        "torch.nn's own layers, to compare speed with")
    width: int = setting(384, "model width D")
    heads: int = setting(6, "attention heads H; must divide the width")
    depth: int = setting(4, "encoder layers of each stream")
    ff_mult: int = setting(5, "feed-forward width over D")
    stem_width: int = setting(192, "width of the time stream's first convolution; a conv channel "
                              "stem takes half of it")
    time_stride: int = setting(1, "samples per time token; cost falls about in proportion")
    channel_bins: int = setting(512, "samples that a linear channel stem pools a lead to")
    fusion_width: int = setting(2048, "hidden width of the fusion network")
    rep_dim: int = setting(512, "width of the representation")
    proj_dim: int = setting(256, "width of the projection that the loss sees")
    dropout: float = setting(0.1, "dropout of residual branches")
    time_stem: str = setting("linear", "how samples become time tokens: linear, one convolution as "
                             "in the paper; conv, a residual net", choices=("linear", "conv"))
    channel_stem: str = setting("linear", "how leads become tokens: linear in absolute time, as in "
                                "the paper; conv, a net shared by the leads, pooled over time",
                                choices=("linear", "conv"))
    positions: bool = setting(True, "position encodings of the time tokens")
    max_pool: bool = setting(False, "streams hand on mean and maximum of their tokens, not the "
                             "mean alone")
    lead_tokens: bool = setting(False, "the channel stream hands on its tokens side by side, not "
                                "pooled")
    readout: str = setting("z", "the representation: z; streams: what the two hand on; or all of "
                           "these", choices=READOUTS)
    mix_leads: bool = setting(False, "the paper's pointwise convolutions of the channel stream, "
                              "which mix the leads before they become tokens")
    channel_dropout: float = setting(0.0, "paper section 6: probability to drop a channel token")
    gate_channel: bool = setting(False, "paper section 6: gates on the channel stream's residuals")
    aux_losses: bool = setting(False, "paper section 6: the loss on what each stream hands on as "
                              "well")
    late_masking: bool = setting(False, "paper section 7: mask the time stream's lifted features, "
                                 "not its signal; the channel stream still sees masked leads")

    def __post_init__(self):
        resnet, stride = self.arch == "resnet18", self.time_stride
        conv = "conv" in (self.time_stem, self.channel_stem)
        sizes = {f.name: getattr(self, f.name) for f in fields(self) if f.type is int}
        if self.arch not in ARCHITECTURES:
            raise InputError(f"--arch {self.arch}: choose from {', '.join(ARCHITECTURES)}")
        if small := [name for name, size in sizes.items() if size < 1]:
            raise InputError(f"{', '.join(small)}: at least 1")
        for wrong, says in (
                (self.width % self.heads or self.width % 2,
                 f"--heads {self.heads} does not divide --width {self.width} (even)"),
                (resnet and self.stem_width < 3,
                 f"--stem-width {self.stem_width}: at least 3 for resnet18"),
                (conv and (self.width % 8 or self.stem_width % 16),
                 f"--width {self.width} --stem-width {self.stem_width}: conv stems need multiples "
                 "of 8 and of 16"),
                (self.time_stem == "conv" and (stride < 2 or stride & stride - 1),
                 f"--time-stride {stride}: a conv stem needs 2, 4, 8, ..."),
                (self.late_masking and (self.stem_width % C or self.time_stem != "linear"),
                 f"--late-masking needs --time-stem linear and a --stem-width that {C} divides, "
                 f"not {self.time_stem} and {self.stem_width}"),
                (self.mix_leads and self.channel_stem != "linear",
                 "--mix-leads needs --channel-stem linear: conv keeps leads apart"),
                (not (0 <= self.dropout < 1 and 0 <= self.channel_dropout < 1),
                 "--dropout and --channel-dropout must be at least 0 and below 1"),
                (resnet and self.readout != "z",
                 f"--readout {self.readout}: give --readout z, all that resnet18 has"),
                (resnet and any(getattr(self, name) for name in STREAM_OPTIONS),
                 "--arch resnet18 has no streams: leave out their options, and give "
                 "--no-aux-losses where the preset has them"),
                (self.arch == "torchnn" and self.gate_channel,
                 "--arch torchnn has no gates: leave out --gate-channel")):
            if wrong:
                raise InputError(says)

    @property
    def widths(self):
        """Features of Output's z, time and channel."""
        pooled = self.width * (1 + self.max_pool)
        return self.rep_dim, pooled, self.width * C if self.lead_tokens else pooled


class Output(NamedTuple):
    """z: (B, rep_dim); time, channel: what the streams hand on, (B, D) or wider, or None."""

    z: torch.Tensor
    time: Optional[torch.Tensor] = None
    channel: Optional[torch.Tensor] = None


class Attention(nn.Module):
    """Multi-head attention; of x to itself, or to a context. Fused kernel, no attention dropout.

    x: (B, N, D), context: (B, M, D)  ->  (B, N, D)
    When `see` is set, the explicit softmax runs instead, head by head, and see(head, weights) is
    called with weights (B, N, M): 25 MB for a record's 2500 x 2500, however many heads there are.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.see = heads, None
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x, context=None):
        B, N, D = x.shape
        if context is None:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        else:
            w, b = self.qkv.weight, self.qkv.bias
            q = F.linear(x, w[:D], b[:D])
            k, v = F.linear(context, w[D:], b[D:]).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        if self.see is None:
            y = F.scaled_dot_product_attention(q, k, v)  # (B, H, N, D // H)
        else:
            y = torch.empty_like(q)
            for h in range(self.heads):
                scores = q[:, h] @ k[:, h].transpose(1, 2) / math.sqrt(D // self.heads)
                weights = scores.softmax(-1)  # (B, N, M)
                self.see(h, weights)
                y[:, h] = weights @ v[:, h]
        return self.out(y.transpose(1, 2).reshape(B, N, D))


class Dropout(nn.Dropout):
    """nn.Dropout; on a CPU with 16 random bits an element, in half its time, p to 1 / 65536."""

    def forward(self, x):
        cut = min(round(self.p * 2 ** 16), 2 ** 16 - 1)
        if not self.training or not cut or x.device.type != "cpu":
            return super().forward(x)
        bits = torch.randint(-2 ** 63, 2 ** 63 - 1, (-(-x.numel() // 4),)).view(torch.int16)
        keep = (bits[:x.numel()].view(x.shape) >= cut - 2 ** 15).to(x.dtype)
        return x * keep.mul_(1 / (1 - cut / 2 ** 16))


class Layer(nn.Module):
    """A pre-norm transformer encoder layer: (B, N, D) -> (B, N, D)."""

    def __init__(self, config, gated=False):
        super().__init__()
        D = config.width
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attention = Attention(D, config.heads)
        self.ff = nn.Sequential(nn.Linear(D, config.ff_mult * D), nn.GELU(),
                                nn.Linear(config.ff_mult * D, D))
        self.dropout = Dropout(config.dropout)
        self.gates = nn.Parameter(torch.full((2,), 0.1)) if gated else None

    def forward(self, x):
        y = self.dropout(self.attention(self.norm1(x)))
        x = x + (y if self.gates is None else self.gates[0].sigmoid() * y)
        y = self.dropout(self.ff(self.norm2(x)))
        return x + (y if self.gates is None else self.gates[1].sigmoid() * y)


def torch_layer(config, gated=False):
    """Layer as torch.nn has it, to compare speed with (--arch torchnn, make bench)."""
    layer = nn.TransformerEncoderLayer(
        config.width, config.heads, config.ff_mult * config.width, config.dropout, "gelu",
        batch_first=True, norm_first=True)
    layer.self_attn.dropout = 0.0  # as ours; with it the CPU has no fused kernel
    layer.dropout = nn.Identity()  # nor have ours one within the feed-forward
    return layer


class CrossAttention(nn.Module):
    """Time tokens attend to channel tokens and the reverse; residual and LayerNorm.

    t: (B, N, D), c: (B, C, D)  ->  the same shapes
    """

    def __init__(self, config):
        super().__init__()
        D = config.width
        self.time_to_channel = Attention(D, config.heads)
        self.channel_to_time = Attention(D, config.heads)
        self.norm_time, self.norm_channel = nn.LayerNorm(D), nn.LayerNorm(D)
        self.dropout = Dropout(config.dropout)

    def forward(self, t, c):
        return (self.norm_time(t + self.dropout(self.time_to_channel(t, c))),
                self.norm_channel(c + self.dropout(self.channel_to_time(c, t))))


class TimeStem(nn.Module):
    """Lift samples to time tokens: (B, T, C), keep (B, C) or None -> (B, T // time_stride, D).

    keep, of late masking: of the lift's features W / C belong to each lead, and fall with it.
    """

    def __init__(self, config):
        super().__init__()
        W, s = config.stem_width, config.time_stride
        # deviation: grouped by lead for late masking, else a masked lead reaches the time tokens
        self.lift = nn.Conv1d(C, W, s + 2, stride=s, padding=1, bias=False,  # 3 at stride 1
                              groups=C if config.late_masking else 1)
        self.mix = nn.Linear(W, W)  # the pointwise convolution, on (B, N, W)
        self.out = nn.Linear(W, config.width)
        self.norm = nn.LayerNorm(config.width)

    def forward(self, x, keep=None):
        h = F.gelu(self.lift(x.transpose(1, 2))).transpose(1, 2)  # (B, N, W)
        if keep is not None:
            h = h * keep.repeat_interleave(h.shape[2] // C, dim=1)[:, None, :]
        return self.norm(self.out(F.gelu(self.mix(h))))


@lru_cache
def pooling(n, bins, device):
    """Adaptive average pooling as a matrix (n, bins); MPS lacks it where bins does not divide n."""
    edges = torch.arange(bins)
    first, end = edges * n // bins, -(-(edges + 1) * n // bins)
    at = torch.arange(n)[:, None]
    inside = (first <= at) & (at < end)
    return (inside / (end - first)).to(device)


class ChannelStem(nn.Module):
    """Turn each lead into one channel token: (B, T, C) -> (B, C, D)."""

    def __init__(self, config):
        super().__init__()
        layers = []
        for _ in range(2):
            layers += [nn.Conv1d(C, C, 5, stride=2, padding=2, groups=C, bias=False), nn.GELU()]
            # deviation: no pointwise convolution here unless --mix-leads, because it mixes the
            # leads: token i is then not lead i, and a masked lead leaks into every token
            if config.mix_leads:
                layers += [nn.Conv1d(C, C, 1), nn.GELU()]
        self.bins, self.down = config.channel_bins, nn.Sequential(*layers)
        self.out = nn.Linear(config.channel_bins, config.width)
        self.norm = nn.LayerNorm(config.width)

    def forward(self, x):
        h = self.down(x.transpose(1, 2))  # (B, C, T // 4)
        return self.norm(self.out(h @ pooling(h.shape[2], self.bins, h.device).to(h.dtype)))


class Block(nn.Module):
    """Basic residual block of ResNet-18, in one dimension: (B, W, T) -> (B, W', T')."""

    def __init__(self, width_in, width, stride, kernel=7, norm=nn.BatchNorm1d):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(width_in, width, kernel, stride, kernel // 2, bias=False), norm(width),
            nn.ReLU(), nn.Conv1d(width, width, kernel, 1, kernel // 2, bias=False), norm(width))
        self.skip = nn.Identity() if width_in == width and stride == 1 else nn.Sequential(
            nn.Conv1d(width_in, width, 1, stride, bias=False), norm(width))

    def forward(self, x):
        return F.relu(self.body(x) + self.skip(x))


group_norm = partial(nn.GroupNorm, 8)  # of a record alone: the same in training and evaluation


class ConvTimeStem(nn.Module):
    """Lift samples to time tokens by residual convolutions: (B, T, C) -> (B, T // time_stride, D).

    time_stride: a power of 2. It does not know absolute time.
    """

    def __init__(self, config):
        super().__init__()
        W, D, halvings = config.stem_width, config.width, int(math.log2(config.time_stride)) - 1
        self.stride, self.body = config.time_stride, nn.Sequential(
            nn.Conv1d(C, W, 9, 2, 4, bias=False), group_norm(W), nn.ReLU(),
            *[Block(W, W, 2, 5, group_norm) for _ in range(halvings)],
            Block(W, D, 1, 5, group_norm), Block(D, D, 1, 5, group_norm))

    def forward(self, x):
        h = self.body(x.transpose(1, 2)).transpose(1, 2)  # (B, N or N + 1, D)
        return h[:, :x.shape[1] // self.stride]


class ConvChannelStem(nn.Module):
    """Turn each lead into one token by one net for all leads: (B, T, C) -> (B, C, D).

    Mean and maximum over time, and an embedding of the lead: it knows which lead it sees, not when.
    """

    def __init__(self, config):
        super().__init__()
        W = config.stem_width // 2
        self.net = nn.Sequential(
            nn.Conv1d(1, W, 15, 4, 7, bias=False), group_norm(W), nn.ReLU(),
            nn.Conv1d(W, 2 * W, 7, 2, 3, bias=False), group_norm(2 * W), nn.ReLU())
        self.out = nn.Linear(4 * W, config.width)
        self.lead = nn.Parameter(0.5 * torch.randn(C, config.width))

    def forward(self, x):
        B, T, C = x.shape
        h = self.net(x.transpose(1, 2).reshape(B * C, 1, T))  # (B C, 2 W, T // 8)
        h = torch.cat([h.mean(2), h.amax(2)], dim=1)
        return self.out(h).unflatten(0, (B, C)) + self.lead


STEMS = {"linear": (TimeStem, ChannelStem), "conv": (ConvTimeStem, ConvChannelStem)}


def positions(n, width, device):
    """Sinusoidal position encodings (Vaswani et al. 2017, arXiv 1706.03762): (n, width)."""
    rate = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10000) / width))
    angle = torch.arange(n, device=device)[:, None] * rate  # (n, width // 2)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


class DualView(nn.Module):
    """Time stream and channel stream, joined by cross-attention (paper 4.3, Fig. 6).

    x: (B, T, C), keep: (B, C) bool or None  ->  Output
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.time_stem = STEMS[config.time_stem][0](config)
        self.channel_stem = STEMS[config.channel_stem][1](config)
        layer = torch_layer if config.arch == "torchnn" else Layer
        self.time_layers = nn.ModuleList(layer(config) for _ in range(config.depth))
        self.channel_layers = nn.ModuleList(layer(config, config.gate_channel)
                                            for _ in range(config.depth))
        self.cross = CrossAttention(config)
        self.channel_dropout = nn.Dropout1d(config.channel_dropout)  # drops whole tokens
        joined = sum(config.widths[1:])
        self.fusion = nn.Sequential(nn.Linear(joined, config.fusion_width),
                                    nn.LayerNorm(config.fusion_width), nn.GELU(),
                                    nn.Linear(config.fusion_width, config.rep_dim),
                                    nn.LayerNorm(config.rep_dim))
        self.shortcut = nn.Linear(joined, config.rep_dim)  # "residual to the fusion head", 4.4
        self.gate = nn.Parameter(torch.tensor(0.1))

    def hand_on(self, t, c):
        """What the streams hand on of their tokens (B, N, D) and (B, C, D): Output's widths."""
        def pool(h):
            return torch.cat([h.mean(1), h.amax(1)], -1) if self.config.max_pool else h.mean(1)

        return pool(t), c.flatten(1) if self.config.lead_tokens else pool(c)

    def forward(self, x, keep=None):
        seen = x if keep is None else x * keep[:, None, :]
        t = self.time_stem(x, keep) if self.config.late_masking else self.time_stem(seen)
        c = self.channel_dropout(self.channel_stem(seen))  # (B, C, D); t: (B, N, D)
        early = torch.cat(self.hand_on(t, c), dim=-1)  # (B, 2 D), or wider
        if self.config.positions:
            t = t + positions(t.shape[1], t.shape[2], t.device)
        for layer in self.time_layers:
            t = layer(t)
        for layer in self.channel_layers:
            c = layer(c)
        t2, c2 = self.cross(t, c)
        time, channel = self.hand_on(t + t2, c + c2)
        fused = self.fusion(torch.cat([time, channel], dim=-1))
        z = fused + self.gate.sigmoid() * self.shortcut(early)
        return Output(z, time, channel)

    def stream_parameters(self, name):
        """Parameters of one stream, `time` or `channel`: its stem and its layers."""
        return [p for key, p in self.named_parameters() if key.startswith(f"{name}_")]


class ResNet18(nn.Module):
    """ResNet-18 (He et al. 2016, arXiv 1512.03385) with 1-D kernels of 7, for 12-lead signals.

    x: (B, T, C), keep: (B, C) bool or None  ->  Output with z (B, rep_dim) only. Its BatchNorm
    sees one micro-batch at a time, so that the gradient is exact for the statistics of those.
    """

    def __init__(self, config):
        super().__init__()
        W = config.stem_width // 3  # 64 at the paper preset, as in the original
        stages = [(W, W, 1), (W, 2 * W, 2), (2 * W, 4 * W, 2), (4 * W, 8 * W, 2)]
        self.body = nn.Sequential(
            nn.Conv1d(C, W, 15, 2, 7, bias=False), nn.BatchNorm1d(W), nn.ReLU(),
            nn.MaxPool1d(3, 2, 1),
            *[block for a, b, s in stages for block in (Block(a, b, s), Block(b, b, 1))],
            nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8 * W, config.rep_dim))

    def forward(self, x, keep=None):
        x = x if keep is None else x * keep[:, None, :]
        return Output(self.body(x.transpose(1, 2)))


ARCHITECTURES = {"dualview": DualView, "torchnn": DualView, "resnet18": ResNet18}


def projector(width, hidden, out):
    """Projection head: (B, width) -> (B, out)."""
    return nn.Sequential(nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.ReLU(),
                         nn.Linear(hidden, out))


class Contrastive(nn.Module):
    """An encoder with its projection head, and one more head for each stream with aux_losses.

    x: (B, T, C), keep: (B, C) bool or None  ->  Output, projections (1 or 3, B, proj_dim) float32
    of length 1. The loss sees the projections, everything downstream sees Output.z. `precision` is
    that of the arithmetic: float32, tf32 or bfloat16; weights and projections are float32.
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.precision, self.readout = config, "float32", config.readout
        self.encoder = ARCHITECTURES[config.arch](config)
        self.heads = nn.ModuleList(
            projector(width, min(width, 512) if config.lead_tokens else width, config.proj_dim)
            for width in config.widths[:1 + 2 * config.aux_losses])
        for module in self.modules():
            if isinstance(module, nn.Linear):
                # PyTorch's own weights put all records into one narrow cone, where the loss of
                # `contig` first collapses; without its biases the first loss is far from chance
                nn.init.xavier_uniform_(module.weight)

    @property
    def device(self):
        return next(self.parameters()).device

    @property
    def width(self):
        """Features of the representation."""
        z, *streams = self.config.widths
        return dict(z=z, streams=sum(streams), all=z + sum(streams))[self.readout]

    def autocast(self, device):
        """The context that the encoder and the heads run in."""
        # deviation: the paper held the weights in bf16, where a step of lr 3e-5 is lost in rounding
        if self.precision == "bfloat16":
            return torch.autocast(device.type, torch.bfloat16)
        return nullcontext()

    def forward(self, x, keep=None):
        with self.autocast(x.device):
            output = self.encoder(x, keep)
            projections = [head(h) for head, h in zip(self.heads, output)]
        return output, torch.stack([F.normalize(p.float(), dim=-1) for p in projections])

    def represent(self, x, keep=None):
        """Representations of views, by the readout: x (B, T, C), keep (B, C) or None -> (B, d)."""
        with self.autocast(x.device):
            output = self.encoder(x, keep)
            parts = dict(z=output[:1], streams=output[1:], all=output)[self.readout]
            return torch.cat(parts, dim=-1).float()


def nt_xent(z1, z2, tau=0.1, decoupled=False):
    """NT-Xent (Chen et al. 2020, arXiv 2002.05709): mean over the 2B anchors, in nats.

    z1, z2: (B, d) of length 1, row i of both from the same record. ln(2B - 1) at chance, >= 0.
    decoupled: without the positive in the denominator (Yeh et al. 2021, arXiv 2110.06848).
    """
    B = len(z1)
    z = torch.cat([z1, z2])
    similarity = (z @ z.T / tau).fill_diagonal_(-torch.inf)  # an anchor is not its own negative
    positive = torch.arange(2 * B, device=z.device).roll(B)
    if not decoupled:
        return F.cross_entropy(similarity, positive)
    others = similarity.scatter(1, positive[:, None], -torch.inf).logsumexp(1)
    return (others - similarity.gather(1, positive[:, None])[:, 0]).mean()


def barlow_twins(z1, z2, off_diagonal=0.005):
    """Barlow Twins (Zbontar et al. 2021, arXiv 2103.03230) over d: no negatives; about 1 at chance.

    z1, z2: (B, d), row i of both from the same record. Standardised over the batch, their
    correlation matrix (d, d) is drawn to the identity.
    """
    z1, z2 = ((z - z.mean(0)) / z.std(0, correction=0).clamp(min=1e-6) for z in (z1, z2))
    c = z1.T @ z2 / len(z1)
    on = (1 - c.diagonal()).square().sum()
    return (on + off_diagonal * (c.square().sum() - c.diagonal().square().sum())) / len(c)


@torch.no_grad()
def watch_attention(model, x, see, keep=None):
    """Run the encoder on a view x and show every softmax weight, head by head (paper 5.2).

    x: (B, T, C), keep: (B, C) bool or None; see(name, layer, head, weights) is called with name
    `time` (weights (B, N, N)), `channel` (B, C, C), `time_to_channel` (B, N, C) or
    `channel_to_time` (B, C, N), queries first: rows sum to 1. Raises InputError for another
    architecture.
    """
    encoder = model.encoder
    if model.config.arch != "dualview":
        raise InputError(f"this run is of --arch {model.config.arch}, which has no attention to "
                         "show; give a run of --arch dualview")
    watched = {(name, i): module for name, modules in (
        ("time", [layer.attention for layer in encoder.time_layers]),
        ("channel", [layer.attention for layer in encoder.channel_layers]),
        ("time_to_channel", [encoder.cross.time_to_channel]),
        ("channel_to_time", [encoder.cross.channel_to_time])) for i, module in enumerate(modules)}
    try:
        for key, module in watched.items():
            module.see = partial(see, *key)
        encoder(x, keep)
    finally:
        for module in watched.values():
            module.see = None


def compile_blocks(model):
    """Compile the parts that cost most, in place (torch.compile)."""
    # on a CPU the same dropout as without; elsewhere it is fused, and repeats in both passes
    torch._inductor.config.fallback_random = next(model.parameters()).device.type == "cpu"
    torch._dynamo.config.recompile_limit = 64  # two streams, with and without a graph, ...
    for module in model.modules():
        if isinstance(module, (TimeStem, Layer, CrossAttention, Block)):
            module.compile()


def n_parameters(model):
    """Number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def count_flops(config, T):
    """Floating-point operations for one view of T samples: (forward, forward and backward).

    Of the matrix products, by PyTorch's counter on the meta device, which computes nothing.
    """
    with torch.device("meta"):
        model, x = Contrastive(config), torch.empty(1, T, C)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(x)
    with FlopCounterMode(display=False) as both:
        model(x)[1].sum().backward()
    return forward.get_total_flops(), both.get_total_flops()


@contextmanager
def refusing(what, then):
    """Whatever a damaged file leads the libraries to, as an InputError that says what to do."""
    try:
        yield
    except Exception as error:
        raise InputError(f"{what} ({str(error)[:80]!r}); {then}") from error


# What args.json and a row of log.jsonl hold at least.
SAVED = dict(
    args=dict(view=str, seed=int, cache=str, preset=str, mask_leads=bool,
              aux_weight=(int, float), aux_losses=bool, negatives=str),
    in_effect=dict(batch=int, micro=int, val_batch=int, total=int),
    data=dict(data=str, rate=int, records=int, synthetic=bool, fingerprint=str))
LOGGED = "epoch", "step", "loss", "val_loss", "records_per_second"


def read_args(folder):
    """args.json of a run folder as a dict; raise InputError when it is missing or damaged."""
    path = Path(folder) / "args.json"
    if not path.exists():
        raise InputError(f"{folder} has no args.json: give a run folder, or train one: make "
                         "pretrain with the same VIEW or RUN")
    with refusing(f"{path} is damaged", f"mend it, or remove {folder} and train again"):
        saved = json.loads(path.read_text())
        for part, kinds in SAVED.items():
            for key, kind in kinds.items():
                if not isinstance(saved[part][key], kind):
                    raise ValueError(f"{key} of {part} is {saved[part][key]!r}")
        if saved["data"]["rate"] not in RATES:
            raise ValueError(f"rate {saved['data']['rate']}; {[*RATES]} are read")
        Config(**saved["config"])
    return saved


def read_log(folder):
    """log.jsonl of a run folder as a table by epoch; raise InputError when empty or damaged."""
    import pandas as pd  # here: loading an encoder needs no pandas

    path = Path(folder) / "log.jsonl"
    if not path.exists():
        raise InputError(f"{folder} has no log.jsonl: give a run folder with at least one epoch "
                         "done")
    with refusing(f"{path} is empty or damaged", "mend it, or train again"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            if None in [row[key] for key in LOGGED] or not {*map(type, row.values())} <= {
                    int, float, type(None)}:
                raise ValueError(f"not numbers: {row}")
        return pd.DataFrame(rows).set_index("epoch")


def read_tensors(path, keys, device="cpu"):
    """The dict in a file of torch.save; an error of any kind if its bits, keys or weights are not
    what was written.
    """
    if part := zipfile.ZipFile(path).testzip():  # torch.load does not look at the checksums
        raise ValueError(f"{part} has changed since it was written")
    state = torch.load(path, map_location=device)
    if set(state) != keys:
        raise ValueError(f"it holds {', '.join(map(str, state))}, not {', '.join(keys)}")
    if bad := [key for key, t in state["model"].items() if not t.isfinite().all()]:
        raise ValueError(f"{bad[0]} is not finite")
    return state


def assemble(config, tensors):
    """The Contrastive of a dict of settings with these weights; an error if they do not fit."""
    config = Config(**config)
    if config.depth > len(tensors):
        raise ValueError(f"depth {config.depth}, but {len(tensors)} tensors")
    with torch.device("meta"):  # whatever sizes it asks for, no memory is taken for them
        model = Contrastive(config)
    model.load_state_dict(tensors, assign=True)
    return model


def load_run(folder, device="cpu"):
    """A finished run: (Contrastive in eval mode, its args.json as a dict).

    Raises InputError when the folder holds no finished model.
    """
    folder = Path(folder)
    if not (folder / "model.pt").exists():
        unfinished = (folder / "last.pt").exists()
        raise InputError(f"no model.pt in {folder}: " + (
            "the run is not finished; go on with the command that began it" if unfinished
            else "give a finished run's folder, or train one: make pretrain with the same VIEW or "
            "RUN"))
    saved = read_args(folder)
    with refusing(f"{folder / 'model.pt'} is damaged, or of other code", "remove it and run the "
                  "command that made it: last.pt has the weights"):
        weights = read_tensors(folder / "model.pt", {"model", "config"}, device)
        model = assemble(weights["config"], weights["model"])
    return model.to(device).eval(), saved


def embed(model, x, views, keep=None):
    """Representations of the views of whole records: never augmented, nor masked unless asked.

    x: (B, T, C) z-scored 10 s records; views: a ViewConfig; keep: (B, C) bool or None, leads that
    are there
    ->  (B, S, d), S = 1 where both views have the record's full length, else 2
    """
    x = x if keep is None else x * keep[:, None, :]  # late masking lets the time stream see all
    return torch.stack([model.represent(v, keep) for v in views.split(x)], dim=1)


class Encoder:
    """A trained encoder as it is used, on recordings from anywhere: load_encoder() gives one.

    views: a ViewConfig, how it was trained; about: a dict of what it is, with `rate` in Hz;
    probe: a dict of weights (K, d), biases (K,) and thresholds (K,), of the official protocol;
    None before `make eval`.
    """

    def __init__(self, model, views, about, probe=None):
        self.model, self.views, self.about = model, views, about
        self.probe, self.rate = probe, about["rate"]

    @property
    def shortest(self):
        """Seconds that a recording needs: those of one view."""
        return SECONDS * self.views.timing()[0]

    def prepare(self, signal, rate, unit, leads):
        """A recording as this encoder takes it: x (W, T, C) float32, keep (W, C) bool.

        signal: (T', n) array at `rate` Hz in `unit` (mV, uV or V); leads: n names, in any order and
        case, others are ignored. W windows of 10 s, or of one view when it is shorter, z-scored as
        in training; leads that lack are masked. Raises InputError for what cannot be used.
        """
        leads = [leads] if isinstance(leads, str) else list(leads)
        x, there, _ = prepare(Recording("signal", np.asarray(signal), float(rate), [str(unit)],
                                        leads), self.rate, self.shortest)
        return normalize(torch.from_numpy(x)), torch.from_numpy(there).expand(len(x), -1)

    @torch.no_grad()
    def __call__(self, x, keep=None):
        """Representations of windows: x (W, T, C), keep (W, C) or None -> (W, d) float32."""
        device = self.model.device
        x, keep = x.to(device), None if keep is None else keep.to(device)
        if x.shape[1] == SECONDS * self.rate:
            return embed(self.model, x, self.views, keep).mean(1)
        seconds, samples = self.views.timing()  # the windows are single views
        x = x if keep is None else x * keep[:, None]
        return self.model.represent(x[:, ::round(seconds / samples)], keep)

    def probabilities(self, z):
        """Probabilities of the CLASSES, each for itself: z (..., d) -> (..., K) float64."""
        if self.probe is None:
            raise InputError("this encoder has no probe: make eval RUN=... fits one")
        weights, biases = (torch.as_tensor(self.probe[k]) for k in ("weights", "biases"))
        return (z.cpu().double() @ weights.T + biases).sigmoid()


def load_encoder(folder, device="cpu"):
    """The Encoder of a finished run, or of a folder of `make export`. Raises InputError."""
    from views import ViewConfig  # here: load_run() needs no ecgmentations

    folder = Path(folder)
    if (folder / "encoder.json").exists():
        return load_export(folder, device)
    model, saved = load_run(folder, device)
    views = ViewConfig(view=saved["args"]["view"], equal=saved["args"].get("equal", False))
    data = saved["data"]
    about = dict(rate=data["rate"], records=data["records"], fingerprint=data["fingerprint"],
                 data="synthetic records" if data["synthetic"] else source_names(data))
    path, probe = folder / "eval" / "probe.npz", None
    if path.exists():
        with refusing(f"{path} is damaged", f"make it again: make eval RUN={folder}"):
            probe = read_arrays(path)
            model.readout = str(probe.pop("readout"))
            if set(probe) != {*PROBE}:  # older ones hold more, which would be misread
                raise ValueError(f"it holds {', '.join(probe)}, not {', '.join(PROBE)}")
    return Encoder(model, views, about, probe)


def load_export(folder, device="cpu"):
    """The Encoder in a folder that export() wrote; nothing in it is unpickled."""
    from views import ViewConfig
    from safetensors.torch import load_file

    path = folder / "encoder.safetensors"
    with refusing(f"{folder} is damaged, or of other code", "export it again: make export RUN=..."):
        about = json.loads((folder / "encoder.json").read_text())
        for key, valid in (("leads", [list(LEADS)]), ("classes", [list(CLASSES)]), (
                "normalisation", [NORMALISATION]), ("rate", [*RATES]), ("readout", READOUTS), (
                "equal", (False, True)), ("n_views", [None])):  # of older exports: all, or 1
            if about.get(key) not in valid:
                raise ValueError(f"{key}: {about.get(key)} there, {valid} here")
        if sha256(path) != about["sha256"]:
            raise ValueError(f"{path.name} is not the one that was written")
        tensors = load_file(path)
        probe = {k: tensors.pop(f"probe.{k}") for k in PROBE if f"probe.{k}" in tensors}
        model = assemble(about["config"], tensors)
        model.readout = about["readout"]
        views = ViewConfig(view=about["view"], equal=about["equal"])
        return Encoder(model.to(device).eval(), views, about, probe or None)


def export(encoder, folder, card):
    """Write a folder that load_encoder() opens anywhere: weights and probe as safetensors, JSON.

    card: the text of its README.md. Not in it: the optimizer, the log, the data.
    """
    from safetensors.torch import save

    model, folder = encoder.model, Path(folder)
    tensors = model.state_dict() | {f"probe.{k}": torch.as_tensor(v)
                                    for k, v in (encoder.probe or {}).items()}
    write_atomic(folder / "encoder.safetensors", lambda tmp: tmp.write_bytes(
        save({k: v.contiguous().cpu() for k, v in tensors.items()})))
    about = encoder.about | dict(
        config=asdict(model.config), view=encoder.views.view, equal=encoder.views.equal,
        readout=model.readout, leads=LEADS, classes=CLASSES,
        normalisation=NORMALISATION, sha256=sha256(folder / "encoder.safetensors"))
    write_atomic(folder / "README.md", lambda tmp: tmp.write_text(card))
    write_atomic(folder / "encoder.json", lambda tmp: tmp.write_text(json.dumps(about, indent=1)))


def add_model_flags(parser):
    """--preset and a flag for each field of Config."""
    parser.add_argument("--preset", choices=PRESETS, default="paper", help="settings that flags "
                        "then change. " + "; ".join(f"{name}: {values}" for name, values in
                                                    PRESETS.items() if values))
    add_flags(parser, "model", Config)


def parse(parser, argv=None):
    """Parse arguments; the chosen preset's values are the defaults."""
    parser.set_defaults(**PRESETS[parser.parse_args(argv).preset])
    return parser.parse_args(argv)


def main(args):
    config = from_args(Config, vars(args))
    model = Contrastive(config)
    for part in (model.encoder, model.heads, *model.encoder.children()):
        print(f"{n_parameters(part):>12,}  {type(part).__name__}")
    print(f"{n_parameters(model):>12,}  all, {asdict(config)}")
    for samples in (500, 1000, 2500):
        forward, both = count_flops(config, samples)
        print(f"{forward / 1e9:>12.2f}  GFLOP for a view of {samples} samples, {both / 1e9:.2f} "
              "with the backward pass")


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_model_flags(parser)
    return parse(parser, argv)


if __name__ == "__main__":
    run_script(lambda: main(get_args()))
