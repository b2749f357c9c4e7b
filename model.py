"""The dual-view transformer (paper 4.3), a 1-D ResNet-18 to compare with, and NT-Xent.

In:  a view x (B, T, C) float32, z-scored; optionally keep (B, C) bool, the leads that it keeps.
Out: Output(z, time, channel): z (B, rep_dim), and the features of the two streams. Contrastive adds
     projections (B, proj_dim) for the loss, and represent(): what is used downstream.
     load_run(folder) gives a trained one, load_encoder(folder) one that takes recordings.

Glossary, for all files: B batch, T time samples, C leads (12), D model width, H heads, N tokens,
K classes, V views of a record in training (2), S in evaluation (1 or 2), W windows of a recording,
d width of the representation, tau temperature. Signals are (B, T, C); a Conv1d sees (B, C, T).

    python model.py                   # size of the default (paper) model
    python model.py --preset conv     # of the one that is worth most on small data
"""
import argparse
import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from data import (LEADS, SECONDS, InputError, Recording, add_flags, from_args, normalize, prepare,
                  reading, run_script, setting)
from views import ViewConfig

C = len(LEADS)
group_norm = partial(nn.GroupNorm, 8)  # of a record alone: the same in training and evaluation
# Of eval/probe.npz, (K, d), (K,), (K,); masked_: of the probe that learned from masked leads.
PROBE = ("weights", "biases", "thresholds", "masked_weights", "masked_biases", "masked_thresholds")
# What --arch resnet18 needs, which has no streams.
NO_STREAMS = dict(stems="linear", mix_leads=False, channel_dropout=0.0, gate_channel=False,
                  aux_losses=False, late_masking=False)
PRESETS = {  # settings of this file, of views.py and of train.py; defaults are the paper's
    "paper": {},
    # for CPUs and a few hundred to a few thousand records at 100 Hz
    "small": dict(
        width=96, heads=4, depth=2, ff_mult=4, stem_width=48, time_stride=4, channel_bins=128,
        fusion_width=384, rep_dim=256, proj_dim=128, max_lr=1e-3, epochs=40, micro_batch=64),
    # for such records too: convolutional stems, disturbed views and a schedule that suits them
    "conv": dict(
        stems="conv", width=96, heads=4, depth=1, ff_mult=2, stem_width=64, time_stride=8,
        fusion_width=192, rep_dim=192, proj_dim=128, dropout=0.0, aux_losses=True, aux_weight=1.0,
        disturb=True, max_lr=2e-3, weight_decay=0.05, epochs=90, micro_batch=128)}


@dataclass
class Config:
    """Size and options of an encoder; each field is a flag of train.py. Defaults: 21.48 M."""

    arch: str = setting("dualview", "dualview; or resnet18 (1-D), as a baseline",
                        choices=("dualview", "resnet18"))
    width: int = setting(384, "model width D")
    heads: int = setting(6, "attention heads H; must divide the width")
    depth: int = setting(4, "encoder layers of each stream")
    ff_mult: int = setting(5, "feed-forward width over D")
    stem_width: int = setting(192, "width of the first convolutions; of the leads' conv stem half")
    time_stride: int = setting(1, "samples per time token; cost falls about in proportion")
    channel_bins: int = setting(512, "samples that a linear channel stem pools a lead to")
    fusion_width: int = setting(2048, "hidden width of the fusion network")
    rep_dim: int = setting(512, "width of z")
    proj_dim: int = setting(256, "width of the projection that the loss sees")
    dropout: float = setting(0.1, "dropout of residual branches")
    # conv stands for all of: residual nets without positions, maxima beside means, a token a lead
    # to the end, and the features of both streams beside z
    stems: str = setting("linear", "linear: as in the paper; conv: for small data",
                         choices=("linear", "conv"))
    mix_leads: bool = setting(False, "mix the leads before they become tokens, as in the paper")
    channel_dropout: float = setting(0.0, "paper section 6: probability to drop a channel token")
    gate_channel: bool = setting(False, "paper section 6: gates on the channel stream's residuals")
    aux_losses: bool = setting(False, "paper section 6: the loss on each stream's features too")
    late_masking: bool = setting(False, "paper section 7: mask lifted features, not the signal")

    def __post_init__(self):
        conv, stride = self.stems == "conv", self.time_stride
        if self.width % self.heads or self.width % 2:
            raise InputError(f"--heads {self.heads} does not divide --width {self.width} (even)")
        if conv and (stride < 2 or stride & stride - 1):
            raise InputError(f"--time-stride {stride}: --stems conv needs 2, 4, 8, ...")
        if conv and (self.mix_leads or self.late_masking):
            raise InputError("--stems conv: leave out --mix-leads and --late-masking")
        if self.arch == "resnet18" and not NO_STREAMS.items() <= vars(self).items():
            raise InputError("--arch resnet18 has no streams: leave out their options; with "
                             "--preset conv give --stems linear --no-aux-losses")

    @property
    def widths(self):
        """Features of Output's z, time and channel."""
        if self.stems == "conv":
            return self.rep_dim, 2 * self.width, C * self.width
        return self.rep_dim, self.width, self.width


class Output(NamedTuple):
    """z: (B, rep_dim); time, channel: features of the streams, (B, D) or wider, or None."""

    z: torch.Tensor
    time: Optional[torch.Tensor] = None
    channel: Optional[torch.Tensor] = None


class Attention(nn.Module):
    """Multi-head attention; of x to itself, or to a context. Fused kernel, no attention dropout.

    x: (B, N, D), context: (B, M, D)  ->  (B, N, D)
    When `watch` is set, the explicit softmax runs instead, and watch(head, weights) is called for
    one head after the other: weights (B, N, M), 25 MB for a record's 2500 x 2500.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.watch = heads, None
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
        if self.watch is None:
            y = F.scaled_dot_product_attention(q, k, v)  # (B, H, N, D // H)
        else:
            y = torch.empty_like(q)
            for h in range(self.heads):
                scores = q[:, h] @ k[:, h].transpose(1, 2) / math.sqrt(D // self.heads)
                weights = scores.softmax(-1)  # (B, N, M)
                self.watch(h, weights)
                y[:, h] = weights @ v[:, h]
        return self.out(y.transpose(1, 2).reshape(B, N, D))


class Layer(nn.Module):
    """A pre-norm transformer encoder layer: (B, N, D) -> (B, N, D)."""

    def __init__(self, config, gated=False):
        super().__init__()
        D = config.width
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attention = Attention(D, config.heads)
        self.ff = nn.Sequential(nn.Linear(D, config.ff_mult * D), nn.GELU(),
                                nn.Linear(config.ff_mult * D, D))
        self.dropout = nn.Dropout(config.dropout)
        self.gates = nn.Parameter(torch.full((2,), 0.1)) if gated else None

    def forward(self, x):
        y = self.dropout(self.attention(self.norm1(x)))
        x = x + (y if self.gates is None else self.gates[0].sigmoid() * y)
        y = self.dropout(self.ff(self.norm2(x)))
        return x + (y if self.gates is None else self.gates[1].sigmoid() * y)


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
        self.dropout = nn.Dropout(config.dropout)

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
        if h.device.type == "mps":  # which pools whole ratios alone (PyTorch's issue 96056)
            h = h.cpu()
        h = F.adaptive_avg_pool1d(h, self.bins).to(x.device)  # (B, C, bins)
        return self.norm(self.out(h))


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


class ConvTimeStem(nn.Module):
    """Lift samples to time tokens by residual convolutions: (B, T, C) -> (B, T // stride, D)."""

    def __init__(self, config):
        super().__init__()
        W, D = config.stem_width, config.width
        halvings = int(math.log2(config.time_stride)) - 1  # the first convolution is another one
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
        time_stem, channel_stem = STEMS[config.stems]
        self.time_stem, self.channel_stem = time_stem(config), channel_stem(config)
        self.time_layers = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.channel_layers = nn.ModuleList(Layer(config, config.gate_channel)
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

    def pool_tokens(self, t, c):
        """Features of the streams from their tokens (B, N, D) and (B, C, D): as Config.widths."""
        if self.config.stems == "conv":
            return torch.cat([t.mean(1), t.amax(1)], dim=-1), c.flatten(1)
        return t.mean(1), c.mean(1)

    def forward(self, x, keep=None):
        seen = x if keep is None else x * keep[:, None, :]
        t = self.time_stem(x, keep) if self.config.late_masking else self.time_stem(seen)
        c = self.channel_dropout(self.channel_stem(seen))  # (B, C, D); t: (B, N, D)
        early = torch.cat(self.pool_tokens(t, c), dim=-1)  # (B, 2 D), or wider
        if self.config.stems == "linear":
            t = t + positions(t.shape[1], t.shape[2], t.device)
        for layer in self.time_layers:
            t = layer(t)
        for layer in self.channel_layers:
            c = layer(c)
        t2, c2 = self.cross(t, c)
        time, channel = self.pool_tokens(t + t2, c + c2)
        fused = self.fusion(torch.cat([time, channel], dim=-1))
        z = fused + self.gate.sigmoid() * self.shortcut(early)
        return Output(z, time, channel)


class ResNet18(nn.Module):
    """ResNet-18 (He et al. 2016, arXiv 1512.03385) with 1-D kernels of 7, for 12-lead signals.

    x: (B, T, C), keep: (B, C) bool or None  ->  Output with z (B, rep_dim) only
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


class Contrastive(nn.Module):
    """An encoder with its projection head, and one more head for each stream with aux_losses.

    x: (B, T, C), keep: (B, C) bool or None  ->  Output, projections (1 or 3, B, proj_dim) float32
    of length 1. precision: of the arithmetic, float32, tf32 or bfloat16; weights are float32.
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.precision = config, "float32"
        # features of the representation, d
        self.width = sum(config.widths) if config.stems == "conv" else config.rep_dim
        self.encoder = DualView(config) if config.arch == "dualview" else ResNet18(config)
        self.heads = nn.ModuleList()
        for width in config.widths if config.aux_losses else config.widths[:1]:
            hidden = min(width, 512)
            self.heads.append(nn.Sequential(nn.Linear(width, hidden), nn.LayerNorm(hidden),
                                            nn.ReLU(), nn.Linear(hidden, config.proj_dim)))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                # PyTorch's own weights put all records into one narrow cone, where the loss of
                # `contig` first collapses; without its biases the first loss is far from chance
                nn.init.xavier_uniform_(module.weight)

    @property
    def device(self):
        return next(self.parameters()).device

    def forward(self, x, keep=None):
        # deviation: the paper held the weights in bf16, where a step of lr 3e-5 is lost in rounding
        with torch.autocast(x.device.type, torch.bfloat16, self.precision == "bfloat16"):
            output = self.encoder(x, keep)
            projections = [head(h) for head, h in zip(self.heads, output)]
        return output, torch.stack([F.normalize(p.float(), dim=-1) for p in projections])

    def represent(self, x, keep=None):
        """Representations of views, (B, d) float32: z, with conv stems also both streams' features.

        x: (B, T, C), keep: (B, C) bool or None
        """
        output, _ = self(x, keep)
        return torch.cat(output if self.config.stems == "conv" else output[:1], dim=-1).float()


def nt_xent(z1, z2, tau=0.1):
    """NT-Xent (Chen et al. 2020, arXiv 2002.05709): mean over the 2B anchors, in nats.

    z1, z2: (B, d) of length 1, row i of both from the same record. ln(2B - 1) at chance, >= 0.
    """
    B = len(z1)
    z = torch.cat([z1, z2])
    similarity = (z @ z.T / tau).fill_diagonal_(-torch.inf)  # an anchor is not its own negative
    positive = torch.arange(2 * B, device=z.device).roll(B)
    return F.cross_entropy(similarity, positive)


@torch.no_grad()
def watch_attention(model, x, watch):
    """Run the encoder on a view x (B, T, C) and show every softmax weight (paper 5.2).

    watch(name, layer, head, weights) is called with name `time` (weights (B, N, N)), `channel`
    (B, C, C), `time_to_channel` (B, N, C) or `channel_to_time` (B, C, N), queries first: rows sum
    to 1. Raises InputError for a ResNet.
    """
    encoder = model.encoder
    if model.config.arch == "resnet18":
        raise InputError("a resnet18 has no attention to show: give a run of --arch dualview")
    modules = {("time_to_channel", 0): encoder.cross.time_to_channel,
               ("channel_to_time", 0): encoder.cross.channel_to_time}
    for i, layers in enumerate(zip(encoder.time_layers, encoder.channel_layers)):
        modules["time", i], modules["channel", i] = (layer.attention for layer in layers)
    try:
        for key, module in modules.items():
            module.watch = partial(watch, *key)
        encoder(x)
    finally:
        for module in modules.values():
            module.watch = None


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


def read_args(folder):
    """args.json of a run folder as a dict; raise InputError when it is missing or damaged."""
    path = Path(folder) / "args.json"
    with reading(path, "give a run folder, or train one: make pretrain with the same VIEW or RUN"):
        saved = json.loads(path.read_text())
        Config(**saved["config"])  # an error for a run of other code
    return saved


def read_log(folder):
    """log.jsonl of a run folder as a table by epoch; raise InputError when empty or damaged."""
    import pandas as pd  # here: loading an encoder needs no pandas

    path = Path(folder) / "log.jsonl"
    with reading(path, "give a run folder with at least one epoch done"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return pd.DataFrame(rows).set_index("epoch")


def load_run(folder, device="cpu"):
    """A finished run: (Contrastive in eval mode, its args.json); raises InputError for another."""
    path, saved = Path(folder) / "model.pt", read_args(folder)
    with reading(path, "give the run's command again, which finishes it; remove a damaged file"):
        state = torch.load(path, map_location=device)
        model = Contrastive(Config(**state["config"]))
        model.load_state_dict(state["model"])
    return model.to(device).eval(), saved


def embed(model, x, views, keep=None):
    """Representations of the views of whole records: never augmented, nor masked unless asked.

    x: (B, T, C) z-scored 10 s records; views: a ViewConfig; keep: (B, C) bool or None, the leads
    that are there  ->  (B, S, d), S = 1 where both views have the record's full length, else 2
    """
    return torch.stack([model.represent(v, keep) for v in views.split(x)], dim=1)


class Encoder:
    """A trained encoder as it is used, on recordings from anywhere: load_encoder() gives one.

    views: a ViewConfig, how it was trained; rate: Hz; shortest: seconds that a recording needs;
    probe: tensors by the names of PROBE, or None without a probe; classes: its K names.
    """

    def __init__(self, model, views, rate):
        self.model, self.views, self.rate, self.probe, self.classes = model, views, rate, None, []
        self.shortest = SECONDS * views.timing()[0]

    def prepare(self, signal, rate, unit, leads):
        """A recording as this encoder takes it: x (W, T, C) float32, keep (W, C) bool.

        signal: (T', n) array at `rate` Hz in `unit` (mV, uV or V); leads: n names in any order,
        others are ignored. W windows of 10 s, or of one view when it is shorter, z-scored; leads
        that are missing are masked. Raises InputError for what cannot be used.
        """
        recording = Recording("signal", np.asarray(signal), float(rate), [unit], list(leads))
        x, there, _ = prepare(recording, self.rate, self.shortest)
        return normalize(torch.from_numpy(x)), torch.from_numpy(there).expand(len(x), -1)

    @torch.no_grad()
    def __call__(self, x, keep=None):
        """Representations of windows: x (W, T, C), keep (W, C) or None -> (W, d) float32."""
        x = x.to(self.model.device)
        keep = None if keep is None else keep.to(x.device)
        if x.shape[1] == SECONDS * self.rate:
            return embed(self.model, x, self.views, keep).mean(1)
        duration, samples = self.views.timing()  # the windows are single views
        return self.model.represent(x[:, ::round(duration / samples)], keep)

    def probabilities(self, z, keep=None):
        """Probabilities of the classes, each for itself: z (..., d) -> (..., K) float64.

        keep: (..., C) bool or None; where a lead is missing, they come from the probe that learned
        from masked leads. Raises InputError without a probe.
        """
        if self.probe is None:
            raise InputError("this encoder has no probe: make eval RUN=... fits one")
        z = z.cpu().double()
        logits = z @ self.probe["weights"].T + self.probe["biases"]
        if keep is not None:
            masked = z @ self.probe["masked_weights"].T + self.probe["masked_biases"]
            logits = torch.where(keep.cpu().all(-1, keepdim=True), logits, masked)
        return logits.sigmoid()


def load_encoder(folder, device="cpu"):
    """The Encoder of a run folder: args.json, model.pt and, after `make eval`, eval/probe.npz.

    Raises InputError. Needs none of the data, pandas, wfdb or ecgmentations.
    """
    model, saved = load_run(folder, device)
    views = ViewConfig(view=saved["args"]["view"], equal=saved["args"]["equal"])
    encoder, path = Encoder(model, views, saved["data"]["rate"]), Path(folder) / "eval/probe.npz"
    if path.exists():
        with reading(path, f"make it again: make eval RUN={folder}"), np.load(path) as arrays:
            encoder.probe = {name: torch.from_numpy(arrays[name]).double() for name in PROBE}
            encoder.classes = arrays["classes"].tolist()
    return encoder


def add_model_flags(parser):
    """--preset and a flag for each field of Config."""
    parser.add_argument("--preset", choices=PRESETS, default="paper",
                        help=f"settings that flags then change: {PRESETS}")
    add_flags(parser, "model", Config)


def parse(parser, argv=None):
    """Parse arguments; the chosen preset's values are the defaults."""
    parser.set_defaults(**PRESETS[parser.parse_args(argv).preset])
    return parser.parse_args(argv)


def main(args):
    model = Contrastive(from_args(Config, vars(args)))
    for name, part in (*model.encoder.named_children(), ("heads", model.heads), ("all", model)):
        print(f"{n_parameters(part):>12,}  {name}")


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_model_flags(parser)
    return parse(parser, argv)


if __name__ == "__main__":
    run_script(lambda: main(get_args()))
