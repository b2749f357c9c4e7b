"""Figures of attention, training, data and views (paper Figs. 2-5, 7-9 and 11-14, Table 1).

In:  run folders of train.py, and the caches that they were trained on.
Out: in RUN/figures a PNG (or PDF) a figure and the numbers behind it next to it, as CSV or NPZ:
     attention-time-*.npz holds map (layers, N, N) float32, queries first, rows sum to 1.

    python attention.py maps --run runs/noncontig-s0 --superclass NORM
    python attention.py plots runs/demo-noncontig-s0
    python attention.py plots runs/noncontig-s0 runs/contig-s0 --out runs/plots

Maps are of the first view of a record, by the model's own softmax, averaged over heads.
"""
import argparse
import math
import textwrap
from collections import defaultdict
from dataclasses import dataclass
from itertools import chain, cycle
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.signal import resample_poly
from scipy.stats import t as student
from tqdm import tqdm
from wfdb.processing import xqrs_detect

from data import (CLASSES, LEADS, RATES, SECONDS, TEST_FOLD, VAL_FOLD, InputError, add_shared,
                  bounded, from_args, normalize, run_script, write_atomic)
from evaluate import (CLASS_COLORS, describe, describe_data, markdown, number, open_data,
                      save_figure, untrained)
from model import load_run, read_args, read_log, watch_attention
from train import Feed, chance, pick_device
from views import VIEWS, ViewConfig, draw_leads, generator

MM = 1 / 25.4  # inch
PAGE_MM = 297  # the long side of A4: no record is drawn higher
# Rows of a printed ECG: 10 s are 2.5 s a lead, one after another, and a rhythm strip; 5 s are two
# leads at the same time.
LAYOUTS = {10: (("I", "aVR", "V1", "V4"), ("II", "aVL", "V2", "V5"), ("III", "aVF", "V3", "V6"),
                ("II",)), 5: tuple(zip(LEADS[:6], LEADS[6:]))}
PEAK_S = 0.05  # a token within this of an R peak is on it
BEAT_S = np.linspace(-0.3, 0.5, 81)  # around an R peak
STREAMS = {"time": "time stream", "channel": "channel stream",
           "time_to_channel": "time attends to channels",
           "channel_to_time": "channels attend to time"}
KINDS = {"time": ("time", "time"), "channel": ("lead", "lead"), "time_to_channel": ("time", "lead"),
         "channel_to_time": ("lead", "time")}  # what queries and keys are
STYLE = {"figure.constrained_layout.use": True, "figure.titlesize": 10, "axes.titlesize": 9,
         "legend.fontsize": 8, "lines.markersize": 4, "errorbar.capsize": 2,
         # after Okabe and Ito, safe for the colour-blind
         "axes.prop_cycle": matplotlib.cycler(color=["#0072B2", "#E69F00", "#009E73", "#CC79A7",
                                                     "#D55E00", "#56B4E9", "#000000", "#997700",
                                                     "#999999"])}
DASHED = dict(color="0.5", linewidth=0.8, linestyle="--")
# Columns of the report's table: (quantity, encoder).
COLUMNS = {"entropy": ("entropy", "this run"), "untrained": ("entropy", "untrained"),
           "on R peaks": ("share", "this run"), "chance": ("chance", "this run"),
           "ratio": ("ratio", "this run"), "ratio, shifted": ("shifted", "this run"),
           "ratio, untrained": ("ratio", "untrained")}
# Figures of training: title, scale, size in inches; and rows of panels: a title, a y label and
# columns of log.jsonl, the first drawn solid, the second dashed.
TRAINING = {
    "loss": ("Loss along training", "linear", (8, 4.6), [[
        ("", "loss; thin: chance, dots\nin training, dashes on fold 9",
         ("loss", "val_loss"))]]),
    "gradients": ("Gradient norms of the streams", "log", (11, 6.4), [[
        ("at mean-pooled tokens, as in the paper", "norm", ("grad_norm_time", "grad_norm_channel")),
        ("tokens x sqrt(N)", "", ("grad_norm_time_corrected", "grad_norm_channel_corrected")),
        ("over the parameters", "", ("param_grad_norm_time", "param_grad_norm_channel"))], [
        ("", "channel / time; dashed: equal", ("grad_norm_ratio",)),
        ("", "", ("grad_norm_ratio_corrected",)), ("", "", ("param_grad_norm_ratio",))]]),
    "clustering": ("Clustering of fold 9's records with one superclass", "linear", (11, 3.8), [[
        ("silhouette (higher is better)", "", ("silhouette",)),
        ("Davies-Bouldin (lower is better)", "", ("davies_bouldin",)),
        ("Calinski-Harabasz (higher is better)", "", ("calinski_harabasz",))]])}


# What attention does

def observe(model, x, keep=None):
    """How an encoder attends on one view (paper 5.2), in every layer of every stream.

    x: (1, T, C), keep: (1, C) bool or None  ->  {(stream, layer): dict of map (N, M), the mean over
    heads; entropy (H,), of the queries' weights over ln(M), 1 if uniform; received (H, M), a key's
    mean weight x M}
    """
    found = {}

    def see(stream, layer, head, weights):
        w, M = weights[0], weights.shape[-1]
        at = found.setdefault((stream, layer), dict(map=0, entropy=[], received=[]))
        at["map"] = at["map"] + w  # not all heads at once: a map has up to 5000 x 5000 weights
        at["entropy"].append(float(torch.special.entr(w).sum(-1).mean()) / max(math.log(M), 1e-9))
        at["received"].append((w.mean(0) * M).cpu().numpy())

    watch_attention(model, x, see, keep)
    return {key: dict(map=(at["map"] / len(at["entropy"])).cpu().numpy(),
                      entropy=np.array(at["entropy"]), received=np.stack(at["received"]))
            for key, at in found.items()}


class Mean:
    """A running mean over records of arrays too large to keep, with a 95 % interval."""

    def __init__(self):
        self.n, self.mean, self.squares = 0, 0.0, 0.0

    def add(self, x):
        self.n += 1
        step = x - self.mean
        self.mean = self.mean + step / self.n
        self.squares = self.squares + step * (x - self.mean)  # Welford's update

    @property
    def half(self):
        """Half the width of Student's interval of the mean; NaN for one record."""
        if self.n < 2:
            return np.full_like(self.mean, np.nan)
        return student.ppf(0.975, self.n - 1) * np.sqrt(self.squares / (self.n - 1) / self.n)


def rms(x):
    """Root mean square over the leads: (T, C) -> (T,)."""
    return np.sqrt((x ** 2).mean(1))


def r_peaks(signal, rate):
    """Times of the R peaks of a record in s; empty when no QRS complexes are found.

    Complexes are found by wfdb's XQRS in one lead; the peak of each is where the root mean square
    over all leads is largest, so that it is no matter which way a lead deflects.
    signal: (T, C) int16 microvolt
    """
    x = resample_poly(signal / 1000, 500 // rate, 1)  # at 100 Hz XQRS takes T waves for beats
    size, reach = rms(x - np.median(x, axis=0)), round(PEAK_S * 500)
    for lead in ("II", "V2", "V5", "I"):  # the first in which it finds beats
        trace = x[:, LEADS.index(lead)]
        if trace.std() > 0:
            peaks = xqrs_detect(trace, fs=500, verbose=False)
            peaks = [p for p in peaks if reach <= p < len(x) - reach]
            if len(peaks) > 2:
                moved = [p - reach + size[p - reach:p + reach].argmax() for p in peaks]
                return np.array(moved) / 500
    return np.array([])


def token_times(T, stride, span):
    """Middle of each time token of a view in s; T samples over span s, stride samples a token."""
    return (np.arange(T // stride) * stride + (stride - 1) / 2) * span / T


def on_peaks(received, near):
    """How much attention falls on R peaks, a value a head (H,): share, chance, ratio of the two.

    received: (H, M); near: (M,) bool, the keys on peaks. Chance is their share of the keys. Last,
    shifted (2,): the central 95 % of the heads' mean ratio over circular shifts of the keys.
    """
    share, chance = received @ near / len(near), np.full(len(received), near.mean())
    ratios = [np.roll(near, i) @ received.mean(0) / near.sum() for i in range(len(near))]
    return share, chance, share / chance, np.quantile(ratios, (0.025, 0.975))


def around_peaks(values, seconds, peaks):
    """Mean course of values (M,) around the R peaks at BEAT_S; None when no beat is whole."""
    whole = [p for p in peaks if p + BEAT_S[0] >= seconds[0] and p + BEAT_S[-1] <= seconds[-1]]
    if whole:
        return np.mean([np.interp(p + BEAT_S, seconds, values) for p in whole], axis=0)


def study(model, look, device, keep_maps=True):
    """Means over records of what attention does: {(stream, layer): {quantity: Mean}}.

    Of entropy and of attention on peaks the mean over heads, then each head: (1 + H,).
    """
    found = defaultdict(lambda: defaultdict(Mean))
    for x, keep, peaks in zip(tqdm(look.views, "records", leave=False, disable=None), look.keep,
                              look.beats):
        near = (np.abs(look.seconds[:, None] - peaks) <= PEAK_S).any(1)
        for key, at in observe(model, x[None].to(device), keep[None].to(device)).items():
            received, heads, means = at["received"].mean(0), dict(entropy=at["entropy"]), found[key]
            means["received"].add(received)
            if keep_maps:
                means["map"].add(at["map"])
            if key[0] in ("time", "channel_to_time"):  # keys are times
                beat = around_peaks(received, look.seconds, peaks)
                if beat is not None:
                    means["beat"].add(beat)
                if near.any():
                    *on, shifted = on_peaks(at["received"], near)
                    heads |= zip(("share", "chance", "ratio"), on)
                    means["shifted"].add(shifted)
            for quantity, values in heads.items():
                means[quantity].add(np.append(values.mean(), values))
    return found


def attention_rows(found, encoder):
    """Rows of the table: a stream, layer and quantity each, with the 95 % interval over records and
    the lowest and highest head; `shifted` is a range alone, of one record."""
    rows = []
    for (stream, layer), means in found.items():
        row = dict(encoder=encoder, attention=STREAMS[stream], layer=layer + 1,
                   keys=len(means["received"].mean))
        for quantity in ("entropy", "share", "chance", "ratio"):
            if quantity in means:
                n, (value, *heads) = means[quantity].n, means[quantity].mean
                low, high = value - means[quantity].half[0], value + means[quantity].half[0]
                bounds = (low, high) if n > 1 and quantity in ("entropy", "ratio") else None
                rows.append(row | dict(
                    quantity=quantity, records=n, value=value, low=low, high=high,
                    head_min=min(heads), head_max=max(heads), text=number(value, bounds)))
        if "shifted" in means and means["shifted"].n == 1:
            low, high = means["shifted"].mean
            rows.append(row | dict(quantity="shifted", records=1, low=low, high=high,
                                   text=f"{number(low)} to {number(high)}"))
    return rows


ABOUT = ("Entropy: of the queries' weights over ln(keys), 1 is uniform; mean over heads. On R "
         f"peaks: share of the attention on keys within {1000 * PEAK_S:.0f} ms of an R peak; "
         "chance: share of such keys; ratio: of the two, mean over records; shifted: central 95 % "
         "of one record's ratio when its peaks are shifted in time, all together.")


def attention_table(table, by=()):
    """The table as Markdown: a row a stream and layer, this run beside the untrained encoder."""
    cells = table.pivot_table("text", [*by, "attention", "layer", "keys"], ["quantity", "encoder"],
                              aggfunc="first", sort=False)
    columns = pd.MultiIndex.from_tuples(COLUMNS.values())
    cells = cells.reindex(columns=columns, fill_value="-").fillna("-")
    return markdown([*cells.index.names, *COLUMNS], cells.reset_index().to_numpy())


# Drawing an ECG

def rows_apart(signals, gap):
    """Offsets (n,) that stack traces (T, n) from top to bottom without touching."""
    high, low = signals.max(0), signals.min(0)
    return -np.cumsum([0, *(high[1:] - low[:-1] + gap)])


def ecg_rows(mv):
    """The rows of a printed ECG: names of their leads, traces (rows, T') in mV, where they hang.

    mv: (T, C) millivolt, 5 or 10 s; each lead's median is at 0
    """
    leads = LAYOUTS[5 if len(mv) in {5 * rate for rate in RATES} else 10]
    mv, rows = mv - np.median(mv, axis=0), []
    for row in leads:
        parts = [mv] * 2 if len(leads) == 6 else np.split(mv, len(row))
        rows.append(np.concatenate([part[:, LEADS.index(lead)] for part, lead in zip(parts, row)]))
    rows = np.stack(rows)
    return leads, rows, rows_apart(rows.T.clip(-4, 4), 0.6)


def ecg_size(mv):
    """(width, height) in inches, (lowest, highest) mV, and mm per mV of a record (T, C) as drawn.

    10 mm/mV, or what a page has room for: at some sources amplitudes are no millivolts.
    """
    _, rows, offsets = ecg_rows(mv)
    low, high = offsets[-1] + rows[-1].min() - 0.3, rows[0].max() + 0.6
    scale = min(10, (PAGE_MM - 17) / (high - low))
    return ((10.5 * 25 + 8) * MM, (scale * (high - low) + 17) * MM), (low, high), scale


def draw_ecg(figure, mv, title):
    """A record as a clinician reads it: 12 leads, 25 mm/s and 10 mm/mV when printed at 100 %.

    figure: a (sub)figure of ecg_size(mv); mv: (T, C) millivolt, 5 or 10 s
    """
    (width, height), (low, high), scale = ecg_size(mv)
    (leads, rows, offsets), ink = ecg_rows(mv), dict(color="black", linewidth=0.8)
    axis = figure.add_axes((4 * MM / width, 9 * MM / height, 1 - 8 * MM / width,
                            1 - 17 * MM / height), frame_on=False)
    seconds = np.linspace(0, SECONDS, rows.shape[1], endpoint=False)
    for names, offset, row in zip(leads, offsets, rows):
        axis.plot([-0.45, -0.4, -0.4, -0.2, -0.2, -0.15], offset + np.array([0, 0, 1, 1, 0, 0]),
                  **ink)
        axis.plot(seconds, row + offset, color="black", linewidth=0.7)
        for lead, s, y in zip(names, *(np.split(a, len(names)) for a in (seconds, row + offset))):
            axis.vlines(s[0], offset - 0.25, offset + 0.25, **ink)
            top = y[s < s[0] + 0.6].max()  # of what is below the lead's name
            axis.text(s[0] + 0.06, top + 0.12, lead, fontsize=8, weight="bold")
    for mm, color in ((1, "#F8DDDD"), (5, "#E9A8A8")):
        step, grid = mm / scale, dict(color=color, linewidth=0.4, zorder=0)
        axis.hlines(np.arange(math.ceil(low / step) * step, high, step), -0.5, SECONDS, **grid)
        axis.vlines(np.arange(-0.4, SECONDS + 0.01, mm / 25), low, high, **grid)
    axis.set(xlim=(-0.5, SECONDS), ylim=(low, high), yticks=[])
    axis.set_xticks(range(SECONDS + 1), [*range(5), *range(6)] if len(leads) == 6 else None)
    axis.tick_params(length=0, labelsize=7)
    volts = "10 mm/mV" if scale == 10 else f"{scale:.2g} mm/mV, not 10, for want of height,"
    axis.set_xlabel(f"time (s); 25 mm/s and {volts} when printed at 100 %; the pulse is 1 mV and "
                    "0.2 s", fontsize=7, labelpad=1)
    figure.text(0.5, 1 - 4 * MM / height, title, ha="center", fontsize=10)


# Drawing attention

@dataclass
class Look:
    """The records whose attention is studied, as the encoder sees them, and what to call them."""

    subject: str
    title: str  # subject and run
    data: str
    ecg_id: np.ndarray  # (n,)
    views: torch.Tensor  # (n, T, C), z-scored: the first view of each record
    keep: torch.Tensor  # (n, C) bool, the leads that are seen
    mv: np.ndarray  # (T, C) millivolt, the same of one record; None for several
    beats: list  # of each record the times of its R peaks in s
    seconds: np.ndarray  # (N,) middle of each time token
    end: float  # of the last time token in s
    span: float  # of a view in s
    tokens: list  # names of the channel tokens

    @property
    def token(self):
        return "lead" if self.tokens == LEADS else "mixed channel token"

    @property
    def legend(self):
        return "Beats are not aligned: for those see attention-beats" if self.mv is None else (
            "Black: attention that a key receives, mean over queries; blue: lead II; triangles: R "
            "peaks")


def canvas(look, height):
    """(figure, subfigure of that height in inches below the record's ECG, if it is one record)."""
    if look.mv is None:
        figure = Figure((10.7, height))
        return figure, figure.subfigures()
    (width, ecg_height), _, _ = ecg_size(look.mv)
    figure = Figure((width, ecg_height + height))
    top, below = figure.subfigures(2, 1, height_ratios=(ecg_height, height), hspace=0)
    draw_ecg(top, look.mv, look.subject)
    return figure, below


def name_axis(axis, along, role, kind, look):
    """What lies along x or y: queries or keys (role), of time or of leads (kind)."""
    if kind == "time":
        axis.set(**{f"{along}label": f"{role}: time (s)"})
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.set_xlim(0, look.span)
    else:
        axis.set(**{f"{along}label": f"{role}: {look.token}", f"{along}ticks": range(len(LEADS)),
                    f"{along}ticklabels": look.tokens})
        axis.tick_params(axis=along, labelsize=7, rotation=90 if along == "x" else 0)


def draw_maps(axes, layers, stream, look, raw):
    """A stream's maps (N, M), a layer an axis, on one scale: weights, or log2(weight x M), which is
    0 where attention is uniform. Keys are along x, but time is where there is one."""
    values, (query, key) = np.stack([means["map"].mean for means in layers]), KINDS[stream]
    uniform, label = 1 / values.shape[2], "weight; line: uniform"
    style = dict(cmap="cividis", vmin=0, vmax=np.quantile(values, 0.995))
    if not raw:
        values = np.log2((values / uniform).clip(1 / 16, 16))
        limit = np.abs(np.quantile(values, (0.005, 0.995))).max()
        style = dict(cmap="PuOr_r", vmin=-limit, vmax=limit)
        uniform, label = 0, "log2(attention / uniform)"
    x, y = ("key", key), ("query", query)
    if stream == "time_to_channel":
        values, x, y = values.swapaxes(1, 2), y, x
    ends = dict(time=(0, look.end), lead=(-0.5, len(LEADS) - 0.5))
    for i, (axis, shown, means) in enumerate(zip(axes, values, layers)):
        image = axis.imshow(shown, aspect="auto", extent=(*ends[x[1]], *ends[y[1]][::-1]), **style)
        axis.set_title(f"layer {i + 1}: entropy / ln(keys) {means['entropy'].mean[0]:.3f}")
        name_axis(axis, "x", *x, look)
        name_axis(axis, "y", *y, look)
    bar = axis.figure.colorbar(image, ax=axes, shrink=0.8, extend="both", label=label)
    bar.ax.axhline(uniform, color="white")


def draw_mean(axis, x, values, **style):
    """A mean over records along x, in its 95 % interval."""
    (line,) = axis.plot(x, values.mean, **style)
    axis.fill_between(x, values.mean - values.half, values.mean + values.half, alpha=0.2,
                      color=line.get_color(), linewidth=0)


def draw_received(axis, received, kind, look, along="x"):
    """What keys of a kind receive / uniform, along x or y, with intervals for several records;
    behind time, of one record, lead II and its R peaks."""
    leads, style = range(len(LEADS)), dict(fmt="o", color="black")
    if along == "y":
        axis.errorbar(received.mean, leads, xerr=received.half, **style)
        axis.axvline(1, **DASHED)
        axis.set(xlabel="received /\nuniform", ylim=(len(LEADS) - 0.5, -0.5))
    else:
        axis.axhline(1, **DASHED)
        axis.set_ylabel("received /\nuniform")
    if along == "x" and kind == "lead":
        axis.errorbar(leads, received.mean, yerr=received.half, **style)
    if kind == "time":
        draw_mean(axis, look.seconds, received, color="black", linewidth=0.9)
    if kind == "time" and look.mv is not None:
        x, behind = look.views[0, :, LEADS.index("II")], axis.twinx()
        behind.plot(np.arange(len(x)) * look.span / len(x), x, color="#56B4E9", linewidth=0.6)
        behind.plot(look.beats[0], [x.max()] * len(look.beats[0]), "v", color="#D55E00")
        behind.set_yticks([])
    name_axis(axis, along, "key", kind, look)


def arrays(layers, look):
    """The numbers behind maps of some layers, for NPZ: weights, and what keys receive / uniform."""
    out = {}
    for name, key in (("map", "map"), ("received_ratio", "received")):
        out[name] = np.stack([means[key].mean for means in layers], dtype=np.float32)
        if look.mv is None:
            out[f"{name}_half"] = np.stack([means[key].half for means in layers], dtype=np.float32)
    if look.mv is not None:
        out |= dict(millivolt=look.mv, r_peaks=look.beats[0].astype(np.float32))
    return out | dict(seconds=look.seconds, channel_tokens=look.tokens, ecg_id=look.ecg_id,
                      data=look.data)


def plot_self(found, stream, look, raw, path):
    """Self-attention of a stream, a column a layer: Figs. 12 (time) and 13 (channel) of the paper.
    """
    layers = [means for (name, _), means in found.items() if name == stream]
    height = min(4.0, 9 / len(layers))
    figure, below = canvas(look, height + 2.2)
    axes = below.subplots(2, len(layers), squeeze=False, height_ratios=(height, 1.2), sharex=True,
                          sharey="row")
    draw_maps(axes[0], layers, stream, look, raw)
    for axis, means in zip(axes[1], layers):
        draw_received(axis, means["received"], KINDS[stream][1], look)
    for axis in axes.flat:
        axis.label_outer()
    below.suptitle(f"Self-attention of the {STREAMS[stream]}. {look.title}\n{look.legend}")
    save_figure(figure, path, arrays(layers, look))


def plot_cross(found, look, raw, path):
    """Both directions of the cross-attention, time along x in both: Fig. 14 of the paper."""
    both = {stream: [found[stream, 0]] for stream in ("time_to_channel", "channel_to_time")}
    figure, below = canvas(look, 6.4)
    axes = below.subplots(3, 2, width_ratios=(6, 1), height_ratios=(2, 2, 1.1))
    for axis, (stream, layers) in zip(axes[:, 0], both.items()):
        draw_maps([axis], layers, stream, look, raw)
        axis.set_title(f"{STREAMS[stream]}, {axis.get_title()}")
    draw_received(axes[0, 1], found["time_to_channel", 0]["received"], "lead", look, along="y")
    draw_received(axes[2, 0], found["channel_to_time", 0]["received"], "time", look)
    axes[1, 1].set_axis_off()
    axes[2, 1].set_axis_off()
    below.suptitle(f"Cross-attention. {look.title}\n{look.legend}")
    save_figure(figure, path, {f"{stream}/{key}": value for stream, layers in both.items()
                               for key, value in arrays(layers, look).items()})


def plot_side_by_side(seen, streams, raw, path):
    """Maps of some streams of several runs, a run a row: {name: (Look, what study() found)}."""
    keys = [key for stream in streams for key in sorted(
        {key for _, found in seen.values() for key in found if key[0] == stream})]
    figure, numbers = Figure((4.2 * len(keys) + 1, 3.1 * len(seen) + 0.8)), {}
    for axes, (name, (look, found)) in zip(figure.subplots(len(seen), len(keys), squeeze=False),
                                           seen.items()):
        for stream in streams:
            here = [(axis, found[key]) for axis, key in zip(axes, keys)
                    if key[0] == stream and key in found]
            draw_maps([axis for axis, _ in here], [means for _, means in here], stream, look, raw)
            numbers |= {f"{name}/{stream}/{key}": value for key, value in arrays(
                [means for _, means in here], look).items()}
        axes[0].set_ylabel(f"{name}\n{axes[0].get_ylabel()}")
    figure.suptitle(f"Attention: {', '.join(STREAMS[name] for name in streams)}\n{look.subject}")
    save_figure(figure, path, numbers)


def plot_beats(both, look, path):
    """Attention that time tokens receive around the R peaks, of {encoder: what study() found}."""
    T, signal = look.views.shape[1], Mean()
    for x, peaks in zip(look.views.numpy(), look.beats):
        beat = around_peaks(rms(x), np.arange(T) * look.span / T, peaks)
        if beat is not None:
            signal.add(beat)
    if not signal.n:
        print(f"note: no whole beat was found, so that {path} is not drawn")
        return
    figure = Figure((9.5, 5.6))
    axes = figure.subplots(2, 2, sharex=True, sharey="row", height_ratios=(1, 2))
    numbers = [dict(attention="root mean square of the leads", received=signal.mean)]
    for (above, axis), (encoder, found) in zip(axes.T, both.items()):
        above.plot(BEAT_S, signal.mean, color="black")
        above.set_title(encoder)
        axis.axhline(1, **DASHED)
        axis.set_xlabel("time from the R peak (s)")
        beats = {key: means["beat"] for key, means in found.items() if "beat" in means}
        for ((stream, layer), beat), style in zip(beats.items(), cycle(("-", "--", ":", "-."))):
            draw_mean(axis, BEAT_S, beat, linestyle=style,
                      label=f"{STREAMS[stream]}, layer {layer + 1}")
            numbers.append(dict(encoder=encoder, attention=stream, layer=layer + 1,
                                received=beat.mean, half=beat.half))
    axes[0, 0].set_ylabel("leads, root mean\nsquare (z-score)")
    axes[1, 0].set_ylabel("attention received / uniform")
    axes[1, 1].legend()
    figure.suptitle(f"Attention around the R peaks. {look.title}")
    save_figure(figure, path, pd.concat([pd.DataFrame(dict(seconds=BEAT_S, **part))
                                         for part in numbers]))


# Attention maps of a run

def choose(cache, args):
    """Rows of the records to show: one, or of a superclass several, one a patient.

    By default the first of fold 10 that is NORM alone, as in the paper. Raises InputError for an
    ecg_id or a superclass that is not there.
    """
    index, folds = cache.index, cache.index.strat_fold
    if args.superclass:
        ours = index[folds.isin((VAL_FOLD, TEST_FOLD)) & (index[args.superclass] == 1)]
        ours = ours.sample(frac=1, random_state=0).drop_duplicates("patient_id")[:args.records]
        if len(ours) < 2:
            raise InputError(f"--superclass {args.superclass}: {len(ours)} patients of folds 9 and "
                             f"10 have it in {cache.folder}; an interval needs 2")
        return np.sort(ours.index)
    if args.ecg_id is None:
        normal = (index[list(CLASSES)].sum(axis=1) == 1) & (index.NORM == 1)
        return np.array([np.argmax(2 * normal + (folds == TEST_FOLD))])
    found = np.flatnonzero(index.ecg_id == args.ecg_id)
    if not len(found):
        raise InputError(f"--ecg-id {args.ecg_id} is not in the data: it has {len(index)} records, "
                         f"such as {', '.join(map(str, index.ecg_id[:5]))}")
    return found


def name_record(index, row):
    """Such as: ecg_id 39 (NORM), fold 10."""
    classes = ", ".join(name for name in CLASSES if index[name][row]) or "no superclass"
    return f"ecg_id {index.ecg_id[row]} ({classes}), fold {index.strat_fold[row]}"


def look_at(cache, rows, saved, trained, run, args):
    """The Look of some rows of a cache; saved, trained: args.json and arguments of the run."""
    data, rate, signals = describe_data(cache.meta), cache.meta["rate"], cache.signals[rows]
    stride = saved["config"]["time_stride"]
    config, keep = from_args(ViewConfig, trained), torch.ones(len(rows), len(LEADS)).bool()
    T = signals.shape[1]
    at = config.split(torch.arange(T)[None, :, None] / rate)[0][0, :, 0].tolist()  # s
    if args.masked:
        keep = draw_leads(keep.shape, trained["mask_p"], generator("mask", trained["seed"], *rows))
    views = config.split(normalize(torch.from_numpy(signals)))[0]
    start, span = at[0], round(len(at) * (at[1] - at[0]), 6)
    subject, mv = f"{data}: {name_record(cache.index, rows[0])}", None
    if args.superclass:
        subject = (f"{data}: {len(rows)} records of folds 9 and 10 with {args.superclass}, one a "
                   "patient: mean, 95 % interval")
    else:
        first = round(start * rate)
        mv = signals[0, first:first + (10 if span == 10 else 5) * rate] / np.float32(1000)
    subject += "; leads masked" * args.masked
    peaks = [r_peaks(signal, rate) for signal in signals]
    numbered = [str(i + 1) for i in range(len(LEADS))]
    return Look(
        subject=subject, title=f"{subject}\n{run}: {describe(saved, cache.meta)}", data=data,
        ecg_id=cache.index.ecg_id.to_numpy()[rows], views=views, keep=keep, mv=mv,
        beats=[p[(p >= start) & (p < start + span)] - start for p in peaks],
        seconds=token_times(len(at), stride, span),
        end=len(at) // stride * stride * span / len(at), span=span,
        tokens=numbered if saved["config"]["mix_leads"] else LEADS)


def attend(run, name, args):
    """The Look of a run's folder, what study() finds in it and in it untrained, a table of both."""
    device = pick_device(args.device)
    model, saved = load_run(run, device)
    trained, cache = open_data(run, saved, args.cache)
    look = look_at(cache, choose(cache, args), saved, trained, name, args)
    found = study(model, look, device)
    fresh = study(untrained(saved["config"], trained["seed"], device), look, device, False)
    return look, found, fresh, pd.DataFrame(attention_rows(found, "this run")
                                            + attention_rows(fresh, "untrained"))


def maps(run, args):
    """Attention maps, table and beats of a run, for one record or for a superclass."""
    look, found, fresh, table = attend(run, Path(run).resolve().name, args)
    text = f"# Attention\n{look.title}\n\n{ABOUT}\n\n{attention_table(table)}\n"
    folder = Path(args.out or Path(run) / "figures")
    name = args.superclass or f"ecg{look.ecg_id[0]}"
    write_atomic(folder / f"attention-{name}.md", lambda tmp: tmp.write_text(text))
    write_atomic(folder / f"attention-{name}.csv", lambda tmp: table.drop(
        columns="text").assign(data=look.data).to_csv(tmp, index=False, float_format="%.6g"))
    end = f"{name}.{args.format}"
    plot_self(found, "time", look, args.raw, folder / f"attention-time-{end}")
    plot_self(found, "channel", look, args.raw, folder / f"attention-channel-{end}")
    plot_cross(found, look, args.raw, folder / f"attention-cross-{end}")
    plot_beats({"this run": found, "untrained": fresh}, look, folder / f"attention-beats-{end}")
    print(f"{text}\n-> {folder}/attention-*{name}*")


# Curves of training: one run a line

def draw_curves(axis, runs, columns):
    """Columns of the runs' logs by epoch, in the colours of their views where these differ."""
    own = len({saved["args"]["view"] for saved, _ in runs.values()}) == len(runs)
    for i, ((name, (saved, log)), marker) in enumerate(zip(runs.items(), cycle("osD^vPX"))):
        color = VIEWS[saved["args"]["view"]].color if own else f"C{i}"
        for column, style, fill in zip(columns, ("-", "--"), ("full", "none")):
            axis.plot(log.index, log[column].astype(float), style, color=color, marker=marker,
                      fillstyle=fill, markevery=max(len(log) // 8, 1),
                      label=name if len(columns) == 1 else f"{name}, {column}")
        if "loss" in columns:
            for level, style in zip(chance(saved["args"], saved["in_effect"]), (":", "--")):
                axis.axhline(level, linestyle=style, linewidth=0.8, color=color)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def plot_training(runs, out, end):
    """The figures of TRAINING, Figs. 7 to 9 of the paper; runs: {name: (args.json, log)}."""
    streams = {name: (saved, log.assign(param_grad_norm_ratio=log.param_grad_norm_channel
                                        / log.param_grad_norm_time))
               for name, (saved, log) in runs.items() if "param_grad_norm_time" in log}
    plot_curves("loss", runs, out / f"training-loss.{end}")
    plot_curves("clustering", runs, out / f"training-clustering.{end}")
    if streams:
        plot_curves("gradients", streams, out / f"training-gradients.{end}")
    else:
        print("note: no gradient norms of streams: a ResNet-18 has none")


def plot_curves(kind, runs, path):
    """One figure of TRAINING; the numbers behind it are the logs'."""
    title, scale, size, rows = TRAINING[kind]
    figure = Figure(size)
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False, sharex=True,
                           sharey="row" if kind == "gradients" else False)
    for axis, (name, label, columns) in zip(axes.flat, chain(*rows)):
        draw_curves(axis, runs, columns)
        axis.set(title=name, ylabel=label, yscale=scale)
        if "ratio" in columns[0]:
            axis.axhline(1, **DASHED)
    if kind == "loss":
        axis.set_ylim(min(0, axis.get_ylim()[0]), 1.08 * axis.get_ylim()[1])
    for axis in axes[-1]:
        axis.set_xlabel("epoch")
        axis.set_xlim(left=0)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(title)
    logs = {name: log for name, (_, log) in runs.items()}
    save_figure(figure, path, pd.concat(logs, names=["run"]).reset_index())


# Data

def plot_ages(index, about, path):
    """Ages in bins of five years, those above 89 apart: Fig. 2 of the paper.

    index: a table with age and sex (0 male, 1 female), as in PTB-XL, where 300 means above 89
    """
    starts = np.arange(0, 95, 5)
    counts = np.histogram(index.age.dropna(), [*starts, np.inf])[0]  # 90 and above: all 300
    figure = Figure((8, 4))
    axis = figure.subplots()
    bars = axis.bar(starts, counts, width=4.6, align="edge", color=["#56B4E9"] * 18 + ["0.8"],
                    edgecolor="black")
    axis.bar_label(bars, fontsize=7)
    axis.set(xlabel="age (years), in bins of 5; grey: above 89, which PTB-XL hides (coded 300)",
             ylabel="records", xticks=range(0, 91, 10))
    low, median, high = index.age.quantile((0.25, 0.5, 0.75))  # ranks: 300 is above all the others
    axis.set_title(f"Ages of {len(index)} records: median {median:g}, quartiles {low:g} and "
                   f"{high:g}; {index.age.isna().sum()} unknown; {(index.sex == 0).mean():.0%} "
                   f"male\n{about}")
    save_figure(figure, path, pd.DataFrame(dict(
        age_from=starts, age_below=[*starts[1:], np.nan], records=counts)))


def plot_superclasses(index, about, path):
    """How many records have each superclass, alone or not, and which occur together: Table 1."""
    has = index[list(CLASSES)].to_numpy()
    counts, alone, none = has.T @ has, has[has.sum(1) == 1].sum(0), (has.sum(1) == 0).sum()
    figure = Figure((9, 4))
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
    names, colors = [*CLASSES, "none"], [*CLASS_COLORS.values(), "#999999"]
    bars = left.bar(names, [*counts.diagonal(), none], color="white", edgecolor=colors, hatch="//")
    left.bar_label(bars)
    left.bar(names, [*alone, none], color=colors)
    left.set_ylabel("records; hatched: with another superclass")
    share = counts / counts.diagonal()[:, None].clip(1)
    right.imshow(share, cmap="Greys", vmin=0, vmax=2)
    for i, j in np.ndindex(counts.shape):
        right.text(j, i, f"{counts[i, j]}\n{share[i, j]:.0%}", ha="center", va="center", fontsize=8)
    right.set_xticks(range(len(CLASSES)), CLASSES)
    right.set_yticks(range(len(CLASSES)), CLASSES)
    right.set(xlabel="... and this one", ylabel="records with this superclass ...")
    figure.suptitle(f"Superclasses of {len(index)} records; a record may have several\n{about}")
    table = pd.DataFrame(counts, columns=[f"with_{name}" for name in CLASSES])
    save_figure(figure, path, table.assign(superclass=CLASSES, alone=alone))


# Views

def example(cache, config, seed, row):
    """Both views of a record (2, T', C), or a window of each, and the leads they keep (2, C) bool.

    Made by the code of training, for a batch of this record alone; of a step in which the pool has
    changed both, since it may change none.
    """
    x = normalize(torch.from_numpy(cache.signals[[row]]))
    feed, untouched = Feed(cache, config, seed, torch.device("cpu")), torch.cat(config.split(x))
    for batch in feed((step, np.array([row])) for step in range(100)):
        pair = torch.cat(list(batch.cut(slice(0, 1)))[::config.windows])
        if not config.augment_p or pair.shape[1:] != untouched.shape[1:] or (
                pair != untouched).any((1, 2)).all():
            break
    kept = np.ones((2, len(LEADS)), bool) if batch.keep is None else (
        batch.keep[::config.windows, 0].numpy())
    return pair.numpy(), kept


def draw_leads_apart(axis, seconds, x, kept, offsets, color):
    """All leads of x (T, C) below one another; masked ones are flat, grey and marked."""
    for trace, offset, there in zip(x.T, offsets, kept):
        axis.plot(seconds, (trace if there else 0 * trace) + offset, linewidth=0.6,
                  color=color if there else "0.7")
        if not there:
            axis.text(seconds[len(seconds) // 2], offset, "masked", fontsize=7, color="0.4",
                      ha="center", va="center", backgroundcolor="white")
    axis.set_yticks(offsets, LEADS, fontsize=7)
    axis.margins(x=0.01, y=0.02)


def draw_beat(axis, x, parts, peaks, color):
    """Lead II of a record x (T, C) around a beat, with the (seconds, samples) of its two views."""
    lead, styles = LEADS.index("II"), (("o-", "full"), ("s--", "none"))
    axis.plot(np.arange(len(x)) * SECONDS / len(x), x[:, lead], color="0.6", linewidth=1.5,
              label="normalised record")
    for i, ((seconds, part), (style, fill)) in enumerate(zip(parts, styles)):
        axis.plot(seconds, part[:, lead], style, fillstyle=fill, color=color, markersize=4,
                  linewidth=0.8, label=f"view {i + 1}")
    middle = min(peaks, key=lambda peak: abs(peak - SECONDS / 2), default=SECONDS / 2)
    axis.set(xlim=(middle - 0.6, middle + 0.6), xlabel="time (s)")
    axis.set_ylabel("lead II, unmasked and\nundisturbed (z-score)", fontsize=8)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def plot_views(cache, config, seed, row, about, path):
    """A record raw, normalised, and its two views; below, what each view holds of one beat.

    Figs. 3 (stochastic), 4 (contig) and 5 (noncontig) of the paper.
    """
    signal, rate, color = cache.signals[row], cache.meta["rate"], VIEWS[config.view].color
    mv, x = signal / np.float32(1000), normalize(torch.from_numpy(signal[None].copy()))
    t, raw, every = np.arange(len(mv)) / rate, mv - np.median(mv, axis=0), np.ones(len(LEADS), bool)
    pair, kept = example(cache, config, seed, row)
    times, parts = ([part[0].numpy() for part in 2 * config.split(a)][:2]  # as evaluation sees them
                    for a in (torch.from_numpy(t)[None, :, None], x))
    times = [time[:, 0] for time in times]
    apart = config.shift or config.disturbances or config.equal  # a view has a time of its own
    if config.augment_p and not apart:
        parts = pair
    x, figure = x[0].numpy(), Figure((11, 9))
    top, below = figure.subfigures(2, 1, height_ratios=(3, 1))
    axes, offsets = top.subplots(1, 4), rows_apart(x, 0.5)
    draw_leads_apart(axes[0], t, raw, every, rows_apart(raw, 0.2), "black")
    draw_leads_apart(axes[1], t, x, every, offsets, "black")
    axes[0].set_title("raw, medians aside; bar: 1 mV")
    axes[1].set_title("normalised; bar: 5 deviations")
    for axis, size in zip(axes, (1, 5)):
        axis.plot([-0.4] * 2, [-size, 0], color="black", linewidth=3, solid_capstyle="butt")
        axis.set_xlabel("time (s)")
    for i, axis in enumerate(axes[2:]):
        start = times[i][0] if apart else 0
        seconds = times[i][:len(pair[i])] - start
        draw_leads_apart(axis, seconds, pair[i], kept[i], offsets, color)
        axis.set(title=f"view {i + 1}: {kept[i].sum()} of 12 leads", ylim=axes[1].get_ylim(),
                 xlabel="time from the view's start (s)" if apart else "time (s)")
    draw_beat(below.subplots(), x, zip(times, parts), r_peaks(signal, rate), color)
    figure.suptitle(f"{textwrap.fill(config.describe(), 110)}\n{about}")
    save_figure(figure, path, dict(millivolt=mv, normalized=x, views=pair, kept=kept, leads=LEADS))


# Every figure

def plots(args):
    """Every figure of a run, in its folder; of several runs their curves of training together."""
    folders, runs = [Path(run) for run in args.runs], {}
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError(f"the same run twice: {' '.join(args.runs)}")
    for folder in folders:
        saved, log = read_args(folder), read_log(folder)
        unique = [other.name for other in folders].count(folder.name) == 1
        name = folder.name if unique else str(folder)
        runs[f"{name}, SYNTHETIC" if saved["data"]["synthetic"] else name] = saved, log
    if len(folders) == 1:
        return plot_run(folders[0], runs, args)
    out = Path(args.out or "runs/plots")
    plot_training(runs, out, args.format)
    print(f"-> {out}/training-*")
    finished = {name: folder for folder, (name, (saved, _)) in zip(folders, runs.items())
                if (folder / "model.pt").exists() and saved["config"]["arch"] == "dualview"}
    if finished:
        compare_maps(finished, args, out)


def compare_maps(folders, args, out):
    """Attention of several runs {name: folder}: maps in one figure a stream, one table."""
    seen, tables = {}, []
    for name, folder in folders.items():
        look, found, _, table = attend(folder, name, args)
        seen[name] = look, found
        tables.append(table.assign(run=name))
    for figure, streams in (("time", ["time"]), ("channel", ["channel"]),
                            ("cross", ["time_to_channel", "channel_to_time"])):
        plot_side_by_side(seen, streams, args.raw, out / f"attention-views-{figure}.{args.format}")
    table = pd.concat(tables)
    text = f"## Attention\n{look.subject}. {ABOUT}\n\n{attention_table(table, ['run'])}\n"
    write_atomic(out / "attention-views.md", lambda tmp: tmp.write_text(text))
    write_atomic(out / "attention-views.csv", lambda tmp: table.drop(columns="text").to_csv(
        tmp, index=False, float_format="%.6g"))
    print(f"{text}\n-> {out}/attention-views*")


def plot_run(folder, runs, args):
    """Every figure of one run; runs: {its name: (args.json, log)}."""
    (saved, _), = runs.values()
    trained, cache = open_data(folder, saved, args.cache)
    row = choose(cache, args)[0]  # before anything is drawn, so that an error comes at once
    if cache.meta["fingerprint"] != saved["data"]["fingerprint"]:
        print(f"note: trained on {saved['data']['data']}, drawn with {cache.meta['data']}")
    out, end, data = Path(args.out or folder / "figures"), args.format, describe_data(cache.meta)
    plot_training(runs, out, end)
    plot_ages(cache.index, data, out / f"data-ages.{end}")
    plot_superclasses(cache.index, data, out / f"data-superclasses.{end}")
    at = f"{data} at {cache.meta['rate']} Hz"
    for view in VIEWS:
        config = ViewConfig(view=view)
        if view == trained["view"]:
            config = from_args(ViewConfig, trained)
        plot_views(cache, config, trained["seed"], row, f"{name_record(cache.index, row)}, {at}",
                   out / f"views-{view}.{end}")
    print(f"-> {out}: training-*, data-*, views-*")
    if not (folder / "model.pt").exists():
        print("note: no attention maps before the run is finished")
    elif saved["config"]["arch"] != "dualview":
        print(f"note: no attention maps: this run is of --arch {saved['config']['arch']}")
    else:
        maps(folder, args)


def get_args(argv=None):
    both = argparse.ArgumentParser(add_help=False)
    g = both.add_mutually_exclusive_group()
    g.add_argument("--ecg-id", type=int, help="the record to show; by default the first of fold 10 "
                   "that is NORM alone")
    g.add_argument("--superclass", choices=CLASSES, help="attention: the mean over records of "
                   "folds 9 and 10 with this superclass, with intervals, instead of one record")
    both.add_argument("--records", type=bounded(int, 2), default=64, help="at most so many for "
                      "--superclass")
    both.add_argument("--masked", action="store_true", help="attention under random lead masking, "
                      "as in training; by default all leads are seen")
    both.add_argument("--raw", action="store_true", help="colours of maps show the weights; by "
                      "default log2 of weight x number of keys, 0 where attention is uniform")
    both.add_argument("--out", help="folder; by default the run's figures/, runs/plots for several")
    add_shared(both, "cache", "device", "format")
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    style = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    p = commands.add_parser("maps", help="attention maps of one run", parents=[both], **style)
    p.add_argument("--run", default="runs/noncontig-s0", help="a finished run folder")
    p = commands.add_parser("plots", help="every figure of a run, or curves of several",
                            parents=[both], **style)
    p.add_argument("runs", nargs="+", help="run folders. One: all figures, into its figures/. "
                   "Several: their curves of training and their attention side by side")
    return parser.parse_args(argv)


def main(args):
    with matplotlib.rc_context(STYLE):
        if args.command == "maps":
            maps(args.run, args)
        else:
            plots(args)


if __name__ == "__main__":
    run_script(lambda: main(get_args()))
