"""Figures of attention, training, data and views (paper Figs. 2-5, 7-9 and 11-14, Table 1).

In:  run folders of train.py, and the caches that they were trained on.
Out: in RUN/figures a PNG (or PDF) a figure and the numbers behind it next to it, as CSV or NPZ:
     attention-time-*.npz holds map (layers, N, N) float32, queries first, rows sum to 1.

    python attention.py maps --run runs/noncontig-s0 --superclass NORM
    python attention.py plots runs/demo-noncontig-s0
    python attention.py plots runs/noncontig-s0 runs/contig-s0 --out runs/plots

Maps are of the first view of a record, unmasked, by the model's own softmax, averaged over heads.
"""
import argparse
import json
import math
from argparse import Namespace
from collections import defaultdict
from pathlib import Path

import ecgmentations as E
import numpy as np
import pandas as pd
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from scipy.signal import resample_poly, welch
from scipy.stats import t as student
from tqdm import tqdm
from wfdb.processing import xqrs_detect

from data import (CLASSES, LEADS, RATES, SECONDS, TEST_FOLD, TRAIN_FOLDS, VAL_FOLD, InputError,
                  load_tables, normalize, read_record, run_script, write_atomic)
from evaluate import (CLASS_COLORS, describe, describe_data, markdown, number, open_data,
                      save_figure, untrained)
from model import load_run, watch_attention
from train import batches, chance, draw_keep, pick_device
from views import VIEWS, BandPassFilter, ViewConfig, from_args, numpy_seed, pool, split

MM = 1 / 25.4  # inch
# Rows of a printed ECG, for 10 s: 2.5 s a lead, one after another, and a rhythm strip; for 5 s: two
# leads at the same time.
LAYOUTS = {10: (("I", "aVR", "V1", "V4"), ("II", "aVL", "V2", "V5"), ("III", "aVF", "V3", "V6"),
                ("II",)), 5: tuple(zip(LEADS[:6], LEADS[6:]))}
PEAK_S = 0.05  # a token within this of an R peak is on it
BEAT_S = np.linspace(-0.3, 0.5, 81)  # around an R peak
BAND_HZ = 1.0, 40.0  # where spectra are compared: inside the default pass band, 0.5 to 47 Hz
AGE_HIDDEN = 300  # PTB-XL's code for an age above 89
# After Tol's high-contrast colours, safe for the colour-blind and in grey print: one a view.
VIEW_COLORS = dict(zip(VIEWS, ("#997700", "#BB5566", "#004488")))
LAYER_COLORS = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
STREAMS = {"time": "time stream", "channel": "channel stream",
           "time_to_channel": "time attends to channels",
           "channel_to_time": "channels attend to time"}


# What attention does

def observe(model, x):
    """How an encoder attends on one view (paper 5.2), in every layer of every stream.

    x: (1, T, C)  ->  {(stream, layer): dict of map (N, M), the mean over heads; entropy (H,), of
    the queries' weights over ln(M), 1 if uniform; received (H, M), a key's mean weight x M}
    """
    found = {}

    def see(name, layer, head, weights):
        w, M = weights[0], weights.shape[-1]
        at = found.setdefault((name, layer), dict(map=0, entropy=[], received=[]))
        at["map"] = at["map"] + w
        at["entropy"].append(float(torch.special.entr(w).sum(-1).mean()) / max(math.log(M), 1e-9))
        at["received"].append((w.mean(0) * M).cpu().numpy())

    watch_attention(model, x, see)
    return {key: dict(map=(at["map"] / len(at["entropy"])).cpu().numpy(),
                      entropy=np.array(at["entropy"]), received=np.stack(at["received"]))
            for key, at in found.items()}


class Mean:
    """A running mean over records of arrays too large to keep, with a 95 % interval."""

    def __init__(self):
        self.n, self.mean, self.squares = 0, 0.0, 0.0

    def add(self, x):
        self.n += 1
        d = x - self.mean
        self.mean = self.mean + d / self.n
        self.squares = self.squares + d * (x - self.mean)  # Welford's update

    @property
    def half(self):
        """Half the width of Student's interval of the mean; NaN for one record."""
        if self.n < 2:
            return np.full_like(self.mean, np.nan)
        return student.ppf(0.975, self.n - 1) * np.sqrt(self.squares / (self.n - 1) / self.n)


def r_peaks(signal, rate):
    """Times of the R peaks of a record in s; empty when no QRS complexes are found.

    Complexes are found by wfdb's XQRS in one lead; the peak of each is where the root mean square
    over all leads is largest, so that it is no matter which way a lead deflects.
    signal: (T, C) int16 microvolt
    """
    x = resample_poly(signal / 1000, 500 // rate, 1)  # at 100 Hz XQRS takes T waves for beats
    size, reach = rms(x - np.median(x, axis=0)), round(PEAK_S * 500)
    for lead in ("II", "V2", "V5", "I"):  # the first in which it finds beats
        if x[:, LEADS.index(lead)].std() > 0:
            peaks = xqrs_detect(x[:, LEADS.index(lead)], fs=500, verbose=False)
            peaks = [p for p in peaks if reach <= p < len(x) - reach]
            if len(peaks) > 2:
                return np.array([p + size[p - reach:p + reach].argmax() - reach
                                 for p in peaks]) / 500
    return np.array([])


def rms(x):
    """Root mean square over the leads: (T, C) -> (T,)."""
    return np.sqrt((x ** 2).mean(1))


def token_times(T, stride, span):
    """Middle of each time token of a view in s; T samples over span s, stride samples a token."""
    return (np.arange(T // stride) * stride + (stride - 1) / 2) * span / T


def on_peaks(received, seconds, peaks):
    """How much attention falls on R peaks: dict(share, chance, lift = share / chance, null).

    received: (H, M); seconds: (M,). Chance is the share of such keys, which is the mean over all
    circular shifts of the keys too; null: the lift's central 95 % under those shifts.
    """
    near = (np.abs(seconds[:, None] - peaks) <= PEAK_S).any(1)
    share, chance = received @ near / len(near), near.mean()
    shifted = [np.roll(near, i) @ received.mean(0) / near.sum() for i in range(len(near))]
    return dict(share=share.mean(), chance=chance, lift=share.mean() / chance,
                lift_heads=share / chance, null=np.quantile(shifted, (0.025, 0.975)))


def around_peaks(values, seconds, peaks):
    """Mean course of values (M,) around the R peaks at BEAT_S; None when no beat is whole."""
    whole = [p for p in peaks if p + BEAT_S[0] >= seconds[0] and p + BEAT_S[-1] <= seconds[-1]]
    if whole:
        return np.mean([np.interp(p + BEAT_S, seconds, values) for p in whole], axis=0)


def study(model, look, device, keep_maps=True):
    """Means over records of what attention does: {(stream, layer): {quantity: Mean}}."""
    found, seconds = defaultdict(lambda: defaultdict(Mean)), look.seconds
    for x, at_s in zip(tqdm(look.views, "records", leave=False, disable=None), look.beats):
        for key, at in observe(model, x[None].to(device)).items():
            means, received = found[key], at["received"].mean(0)
            if keep_maps:
                means["map"].add(at["map"])
            means["received"].add(received)
            means["entropy"].add(at["entropy"].mean())
            means["entropy_heads"].add(at["entropy"])
            if key[0] not in ("time", "channel_to_time"):
                continue
            near = np.abs(seconds[:, None] - at_s) <= PEAK_S
            if near.any():
                for quantity, value in on_peaks(at["received"], seconds, at_s).items():
                    means[quantity].add(value)
            beat = around_peaks(received, seconds, at_s)
            if beat is not None:
                means["beat"].add(beat)
    return found


def table(found, name):
    """One row a stream and layer: entropies and attention on R peaks, with intervals or nulls."""
    rows = []
    for (stream, layer), means in sorted(found.items(), key=lambda kv: [*STREAMS].index(kv[0][0])):
        row = dict(encoder=name, attention=STREAMS[stream], layer=layer + 1,
                   records=means["entropy"].n, keys=len(means["received"].mean),
                   entropy=means["entropy"].mean, entropy_half=float(means["entropy"].half),
                   entropy_head_min=means["entropy_heads"].mean.min(),
                   entropy_head_max=means["entropy_heads"].mean.max())
        if "lift" in means:
            row |= dict(peak_records=means["lift"].n, peak_share=means["share"].mean,
                        peak_chance=means["chance"].mean, peak_lift=means["lift"].mean,
                        peak_lift_half=float(means["lift"].half),
                        peak_lift_head_min=means["lift_heads"].mean.min(),
                        peak_lift_head_max=means["lift_heads"].mean.max())
            if means["lift"].n == 1:
                row |= dict(zip(("null_low", "null_high"), means["null"].mean))
        rows.append(row)
    return rows


# Drawing an ECG

def rows_apart(signals, gap):
    """Offsets (n,) that stack traces (T, n) from top to bottom without touching."""
    high, low = signals.max(0), signals.min(0)
    return -np.cumsum([0, *(high[1:] - low[:-1] + gap)])


def ecg_rows(mv):
    """The rows of a printed ECG: names of their leads, (rows, T') traces in mV, offsets in mV.

    mv: (T, C) millivolt, 5 or 10 s; each lead's median is at its row's line
    """
    leads = LAYOUTS[5 if len(mv) in {5 * rate for rate in RATES} else 10]
    mv, rows = mv - np.median(mv, axis=0), []
    for row in leads:
        parts = [mv] * 2 if len(leads) == 6 else np.split(mv, len(row))
        rows.append(np.concatenate([part[:, LEADS.index(lead)] for part, lead in zip(parts, row)]))
    rows = np.stack(rows)
    return leads, rows, rows_apart(rows.T.clip(-4, 4), 0.6)


def ecg_size(mv):
    """Width and height in inches of a record (T, C) in mV when drawn."""
    _, rows, offsets = ecg_rows(mv)
    span = rows[0].max() + 0.6 - offsets[-1] - rows[-1].min() + 0.3  # mV
    return (10.5 * 25 + 8) * MM, (10 * span + 17) * MM


def draw_ecg(figure, mv, title):
    """A record as a clinician reads it: 12 leads, 25 mm/s and 10 mm/mV when printed at 100 %.

    figure: a (sub)figure of ecg_size(mv); mv: (T, C) millivolt, 5 or 10 s
    """
    (width, height), (leads, rows, offsets) = ecg_size(mv), ecg_rows(mv)
    axis = figure.add_axes((4 * MM / width, 9 * MM / height, 1 - 8 * MM / width,
                            1 - 17 * MM / height))
    figure.text(0.5, 1 - 4 * MM / height, title, ha="center", fontsize=10)
    n, both = rows.shape[1], len(leads) == 6
    for names, offset, row in zip(leads, offsets, rows):
        axis.plot([-0.45, -0.4, -0.4, -0.2, -0.2, -0.15], np.array([0, 0, 1, 1, 0, 0]) + offset,
                  color="black", linewidth=0.8)
        axis.plot(np.arange(n) * SECONDS / n, row + offset, color="black", linewidth=0.7)
        for i, lead in enumerate(names):
            start = i * n // len(names)
            high = row[start:start + int(0.06 * n)].max()
            axis.text(start * SECONDS / n + 0.06, offset + high + 0.12, lead, fontsize=8,
                      weight="bold")
            axis.plot([start * SECONDS / n] * 2, [offset - 0.25, offset + 0.25], color="black",
                      linewidth=0.8)
    axis.set(xlim=(-0.5, SECONDS), ylim=(offsets[-1] + rows[-1].min() - 0.3, rows[0].max() + 0.6))
    axis.set_xticks(range(SECONDS + 1), [i if i < 5 or not both else i - 5 for i in range(11)])
    for step, color in ((0.1, "#F8DDDD"), (0.5, "#E9A8A8")):  # 1 mm and 5 mm
        low, high = np.ceil(np.array(axis.get_ylim()) / step) * step
        axis.hlines(np.arange(low, high, step), -0.5, SECONDS, color=color, linewidth=0.4, zorder=0)
        axis.vlines(np.arange(-0.4, SECONDS + 0.01, 0.4 * step), *axis.get_ylim(), color=color,
                    linewidth=0.4, zorder=0)
    axis.tick_params(length=0, labelsize=7)
    axis.set_yticks([])
    axis.set_xlabel("time (s); 25 mm/s and 10 mm/mV when printed at 100 %; the pulse is 1 mV and "
                    "0.2 s", fontsize=7, labelpad=1)
    for side in axis.spines.values():
        side.set_visible(False)


# Drawing attention. `look` is what choose() gives: the record or records, and how to draw.

def canvas(look, height):
    """(figure, subfigure of that height in inches below the record's ECG, if it is one record)."""
    if look.mv is None:
        figure = Figure((10.7, height), layout="constrained")
        return figure, figure.subfigures()
    width, ecg_height = ecg_size(look.mv)
    figure = Figure((width, ecg_height + height), layout="constrained")
    top, below = figure.subfigures(2, 1, height_ratios=(ecg_height, height), hspace=0)
    draw_ecg(top, look.mv, look.subject)
    return figure, below


def shown(means, raw):
    """A map as it is drawn: its weights, or times the number of keys, 1 where it is uniform."""
    weights = means["map"].mean
    return weights if raw else weights * weights.shape[1]


def bound(values, raw):
    """The largest weight to show, or the largest factor above and below uniform, at most 16."""
    some = [v.ravel()[::max(1, v.size // 10 ** 6)] for v in values]
    low, high = np.quantile(np.concatenate(some), (0.005, 0.995))
    most = max(high, 1 / max(low, 1e-9))
    return high if raw else next((f for f in (1.1, 1.25, 1.5, 2, 3, 4, 8) if f >= most), 16)


def draw_map(axis, values, extent, raw, limit):
    """An image of a map, on a log scale around 1 unless raw."""
    style = dict(cmap="cividis", vmin=0, vmax=limit) if raw else dict(
        cmap="PuOr_r", norm=LogNorm(1 / limit, limit))
    values = values if raw else values.clip(1 / limit, limit)
    return axis.imshow(values, aspect="auto", extent=extent, interpolation="antialiased", **style)


def draw_bar(figure, image, axes, raw, limit, keys):
    """The colour bar of maps; a line where attention is uniform."""
    bar = figure.colorbar(image, ax=axes, shrink=0.8, extend="max" if raw else "both",
                          label="weight; line: uniform" if raw else "attention / uniform")
    if raw:
        return bar.ax.axhline(1 / keys, color="white")
    ticks = limit ** np.array([-1, -0.5, 0, 0.5, 1])
    bar.set_ticks(ticks, labels=[f"{tick:.3g}" for tick in ticks])
    bar.minorticks_off()


def name_leads(axis, which, look):
    """Names of the channel tokens along x or y."""
    axis.set(**{f"{which}ticks": range(len(LEADS)), f"{which}ticklabels": look.tokens})
    axis.tick_params(axis=which, labelsize=7, rotation=90 if which == "x" else 0)


def draw_time(axis, means, look):
    """Attention that time tokens receive; lead II and its R peaks behind it, for one record."""
    mean, half = means["received"].mean, means["received"].half
    axis.plot(look.seconds, mean, color="black", linewidth=0.9)
    axis.fill_between(look.seconds, (mean - half).clip(0), mean + half, color="black", alpha=0.25,
                      linewidth=0)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.axhline(1, color="0.5", linewidth=0.8, linestyle="--")
    axis.set(xlim=(0, look.span), xlabel="key: time (s)", ylabel="received /\nuniform")
    if look.mv is not None:
        behind = axis.twinx()
        behind.plot(np.arange(len(look.x)) * look.span / len(look.x), look.x[:, LEADS.index("II")],
                    linewidth=0.6, color="#56B4E9")
        behind.plot(look.peaks, np.full(len(look.peaks), 1.02), "v", color="#D55E00", markersize=3,
                    transform=behind.get_xaxis_transform(), clip_on=False)
        behind.set_yticks([])
        axis.set_zorder(behind.get_zorder() + 1)
        axis.patch.set_visible(False)


def draw_leads(axis, means, which, look):
    """Attention that leads receive, along x or y, with its interval for several records."""
    at, mean = np.arange(len(LEADS)), means["received"].mean
    half = means["received"].half if means["received"].n > 1 else None
    line = dict(color="0.5", linewidth=0.8, linestyle="--")
    if which == "x":
        axis.errorbar(at, mean, half, fmt="o", markersize=4, capsize=2, color="black")
        axis.axhline(1, **line)
        axis.set(xlabel=f"key: {look.token}", ylabel="received /\nuniform")
    else:
        axis.errorbar(mean, at, xerr=half, fmt="o", markersize=4, capsize=2, color="black")
        axis.axvline(1, **line)
        axis.set(xlabel="received /\nuniform", ylim=(len(LEADS) - 0.5, -0.5))
    name_leads(axis, which, look)


def arrays(layers, look):
    """The numbers behind maps of some layers, for NPZ: weights, and what keys receive / uniform."""
    out = dict(map=[means["map"].mean for means in layers],
               received_ratio=[means["received"].mean for means in layers])
    if look.mv is None:
        out |= dict(map_half=[means["map"].half for means in layers],
                    received_ratio_half=[means["received"].half for means in layers])
    else:
        out |= dict(millivolt=look.mv, r_peaks=look.peaks)
    return {key: np.stack(value).astype(np.float32) for key, value in out.items()} | dict(
        seconds=look.seconds, channel_tokens=look.tokens, ecg_id=look.ecg_id, data=look.data)


def plot_self(found, stream, look, path):
    """Self-attention of a stream, a column a layer: Figs. 12 (time) and 13 (channel) of the paper.
    """
    layers = [means for (name, _), means in found.items() if name == stream]
    values = [shown(means, look.raw) for means in layers]
    limit, edge = bound(values, look.raw), len(LEADS) - 0.5
    extent = (0, look.end, look.end, 0) if stream == "time" else (-0.5, edge, edge, -0.5)
    height = min(4.0, 9 / len(layers))
    figure, below = canvas(look, height + 2.2)
    axes = below.subplots(2, len(layers), squeeze=False, height_ratios=(height, 1.2), sharex=True,
                          sharey="row")
    for i, (means, axis, received) in enumerate(zip(layers, *axes)):
        image = draw_map(axis, values[i], extent, look.raw, limit)
        axis.set_title(f"layer {i + 1}: entropy / ln(keys) {means['entropy'].mean:.3f}", fontsize=8)
        if stream == "time":
            draw_time(received, means, look)
        else:
            name_leads(axis, "y", look)
            draw_leads(received, means, "x", look)
        received.label_outer()
    axes[0, 0].set_ylabel(f"query: {'time (s)' if stream == 'time' else look.token}")
    draw_bar(below, image, axes[0], look.raw, limit, values[0].shape[1])
    below.suptitle(f"Self-attention of the {STREAMS[stream]}. {look.title}\n"
                   f"{look.legend if stream == 'time' else ''}", fontsize=10)
    save_figure(figure, path, arrays(layers, look))


def plot_cross(found, look, path):
    """Both directions of the cross-attention, time along x in both: Fig. 14 of the paper."""
    both = {name: found[name, 0] for name in ("time_to_channel", "channel_to_time")}
    figure, below = canvas(look, 6.4)
    axes = below.subplots(3, 2, width_ratios=(6, 1), height_ratios=(2, 2, 1.1))
    for axis, (name, means) in zip(axes[:, 0], both.items()):
        values, edge = shown(means, look.raw), len(LEADS) - 0.5
        limit = bound([values], look.raw)
        image = draw_map(axis, values.T if name == "time_to_channel" else values,
                         (0, look.end, edge, -0.5), look.raw, limit)
        draw_bar(below, image, axis, look.raw, limit, values.shape[1])
        axis.set_title(f"{STREAMS[name]}: entropy / ln(keys) {means['entropy'].mean:.3f}",
                       fontsize=9)
        name_leads(axis, "y", look)
    axes[0, 0].set(xlabel="query: time (s)", ylabel=f"key: {look.token}", xlim=(0, look.span))
    axes[1, 0].set(xlabel="key: time (s)", ylabel=f"query: {look.token}", xlim=(0, look.span))
    draw_leads(axes[0, 1], both["time_to_channel"], "y", look)
    draw_time(axes[2, 0], both["channel_to_time"], look)
    for axis in axes[1:, 1]:
        axis.set_axis_off()
    below.suptitle(f"Cross-attention. {look.title}\n{look.legend}", fontsize=10)
    save_figure(figure, path, {f"{name}/{key}": value for name, means in both.items()
                               for key, value in arrays([means], look).items()})


def plot_beats(both, look, path):
    """Attention that time tokens receive around the R peaks, here and before training.

    both: {encoder: what study() found}
    """
    t = np.arange(look.views.shape[1]) * look.span / look.views.shape[1]
    beats = [around_peaks(rms(x), t, peaks) for x, peaks in zip(look.views.numpy(), look.beats)]
    beats = [beat for beat in beats if beat is not None]
    if not beats:
        return print(f"note: no whole beat was found, so that {path} is not drawn")
    beat = np.mean(beats, axis=0)
    figure = Figure((9.5, 5.6), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey="row", height_ratios=(1, 2))
    rows = [dict(attention="root mean square of the leads", seconds=s, received=b)
            for s, b in zip(BEAT_S, beat)]
    for (name, found), (above, axis) in zip(both.items(), axes.T):
        above.plot(BEAT_S, beat, color="black")
        above.set(title=name)
        keys = [key for key, means in found.items() if "beat" in means]
        for i, (stream, layer) in enumerate(keys):
            means = found[stream, layer]["beat"]
            label, color = f"time stream, layer {layer + 1}", LAYER_COLORS[layer % 4]
            if stream == "channel_to_time":
                label, color = STREAMS[stream], "black"
            axis.plot(BEAT_S, means.mean, ("-", "--", ":", "-.")[i % 4], color=color, label=label)
            axis.fill_between(BEAT_S, means.mean - means.half, means.mean + means.half, alpha=0.2,
                              color=color, linewidth=0)
            rows += [dict(encoder=name, attention=stream, layer=layer + 1, seconds=s, received=m,
                          half=h) for s, m, h in zip(BEAT_S, means.mean, means.half)]
        axis.axhline(1, color="0.5", linewidth=0.8, linestyle="--")
        axis.set(xlabel="time from the R peak (s)")
    axes[0, 0].set_ylabel("leads, root mean\nsquare (z-score)")
    axes[1, 0].set_ylabel("attention received / uniform")
    axes[1, 1].legend(fontsize=8)
    figure.suptitle(f"Attention around the R peaks. {look.title}", fontsize=10)
    save_figure(figure, path, rows)


# Attention maps of a run

def find_record(index, ecg_id=None):
    """Row of a record; by default the first of fold 10 that is NORM alone, as in the paper."""
    if ecg_id is None:
        normal = (index[list(CLASSES)].sum(axis=1) == 1) & (index.NORM == 1)
        return int((2 * normal + (index.strat_fold == TEST_FOLD)).to_numpy().argmax())
    found = np.flatnonzero(index.ecg_id == ecg_id)
    if not len(found):
        raise InputError(f"--ecg-id {ecg_id} is not in the data: it has {len(index)} records, such "
                         f"as {', '.join(map(str, index.ecg_id[:5]))}")
    return int(found[0])


def name_record(index, row):
    """Such as: ecg_id 39 (NORM), fold 10."""
    classes = [name for name in CLASSES if index[name][row]]
    return (f"ecg_id {index.ecg_id[row]} ({', '.join(classes) or 'no superclass'}), fold "
            f"{index.strat_fold[row]}")


def choose(cache, saved, args):
    """Which records to look at, and how: views, R peaks, times of the tokens, titles.

    Raises InputError for an ecg_id or a superclass that is not there.
    """
    index, config, view = cache.index, saved["config"], saved["args"]["view"]
    if args.superclass:
        if args.records < 2:
            raise InputError(f"--records {args.records}: an interval needs at least 2")
        ours = index[index.strat_fold.isin((VAL_FOLD, TEST_FOLD)) & (index[args.superclass] == 1)]
        ours = ours.sample(frac=1, random_state=0).drop_duplicates("patient_id")
        rows = np.sort(ours.index.to_numpy()[:args.records])
        if len(rows) < 2:
            raise InputError(f"--superclass {args.superclass}: {len(rows)} patients of folds 9 and "
                             f"10 have it in {cache.folder}; an interval needs 2")
        subject = (f"{len(rows)} records of folds 9 and 10 with {args.superclass}, one a patient: "
                   "mean, 95 % interval")
    else:
        rows = np.array([find_record(index, args.ecg_id)])
        subject = name_record(index, rows[0])
    data, span = describe_data(cache.meta), SECONDS / 2 if view == "contig" else SECONDS
    subject = f"{data}: {subject}"
    signals, several = cache.signals[rows], len(rows) > 1
    views = split(normalize(torch.from_numpy(signals)), view)[0]
    seconds = token_times(views.shape[1], config["time_stride"], span)
    beats = [p[p < span] for p in (r_peaks(signal, cache.meta["rate"]) for signal in signals)]
    mixed = config["mix_leads"]  # token i is then not lead i
    return Namespace(
        views=views, beats=beats, span=span, seconds=seconds, subject=subject, raw=args.raw,
        end=len(seconds) * config["time_stride"] * span / views.shape[1], x=views[0].numpy(),
        title=f"{subject}\n{Path(args.run).resolve().name}: {describe(saved, cache.meta)}",
        legend="Beats are not aligned: for those see attention-beats" if several else (
            "Black: attention that a key receives, mean over queries; blue: lead II; triangles: R "
            "peaks"), data=data,
        peaks=beats[0], ecg_id=index.ecg_id.to_numpy()[rows],
        mv=None if several else signals[0, :round(span * cache.meta["rate"])] / np.float32(1000),
        tokens=[str(i + 1) for i in range(len(LEADS))] if mixed else LEADS,
        token="mixed channel token" if mixed else "lead",
        name=args.superclass or f"ecg{index.ecg_id[rows[0]]}")


def attention_table(rows):
    """The table of a run's and its untrained encoder's attention, as Markdown."""
    half = len(rows) // 2
    lines = []
    for run, fresh in zip(rows[:half], rows[half:]):
        def cell(row, key):
            mean, h = row.get(key), row.get(f"{key}_half", math.nan)
            return number(mean, None if math.isnan(h) else (mean - h, mean + h))

        shifted = "-" if "null_low" not in run else " to ".join(
            number(run[end]) for end in ("null_low", "null_high"))
        lines.append([run["attention"], run["layer"], run["keys"], cell(run, "entropy"),
                      cell(fresh, "entropy"), number(run.get("peak_share")),
                      number(run.get("peak_chance")), cell(run, "peak_lift"), shifted,
                      cell(fresh, "peak_lift")])
    return markdown(["attention", "layer", "keys", "entropy", "untrained", "on R peaks", "chance",
                     "ratio", "ratio, shifted", "ratio, untrained"], lines)


def maps(args):
    """Attention maps, table and beats of a run, for one record or for a superclass."""
    device = pick_device(args.device)
    model, saved = load_run(args.run, device)
    trained, cache = open_data(args.run, saved, args.cache)
    fresh = untrained(saved["config"], trained["seed"], device)
    look = choose(cache, saved, args)
    both = {"this run": study(model, look, device),
            "untrained": study(fresh, look, device, keep_maps=False)}
    rows = [row | dict(data=look.data) for name, found in both.items()
            for row in table(found, name)]
    text = (f"# Attention\n{look.title}\n\nFirst view, unmasked. Entropy: of the queries' weights "
            "over ln(keys), 1 is uniform; mean over heads. On R peaks: share of the attention on "
            f"keys within {1000 * PEAK_S:.0f} ms of an R peak; chance: share of such keys; ratio: "
            "of the two, mean over records; shifted: central 95 % of one record's ratio when its "
            f"peaks are shifted in time, all together.\n\n{attention_table(rows)}\n")
    folder = Path(args.out or Path(args.run) / "figures")
    write_atomic(folder / f"attention-{look.name}.md", lambda tmp: tmp.write_text(text))
    write_atomic(folder / f"attention-{look.name}.csv", lambda tmp: pd.DataFrame(rows).to_csv(
        tmp, index=False, float_format="%.6g"))
    end = f"{look.name}.{args.format}"
    for stream in ("time", "channel"):
        plot_self(both["this run"], stream, look, folder / f"attention-{stream}-{end}")
    plot_cross(both["this run"], look, folder / f"attention-cross-{end}")
    plot_beats(both, look, folder / f"attention-beats-{end}")
    print(f"{text}\n-> {folder}/attention-*{look.name}*")


# Curves of training: one colour a view, one run a line

def read_log(folder):
    """(args.json, log.jsonl as a table) of a run, finished or not; InputError when not there."""
    folder = Path(folder)
    try:
        saved = json.loads((folder / "args.json").read_text())
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        if not log:
            raise ValueError("log.jsonl is empty")
        return saved, pd.DataFrame(log).set_index("epoch")
    except FileNotFoundError as error:
        raise InputError(f"{folder} has no {Path(error.filename).name}: give a run folder with at "
                         "least one epoch done, or train one: make pretrain VIEW=noncontig"
                         ) from error
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"args.json or log.jsonl in {folder} is damaged ({error}); mend it, or "
                         "train again") from error


def draw_curves(axis, runs, columns):
    """Columns of the runs' logs by epoch; {column: (line style, words)}."""
    for name, (saved, log) in runs.items():
        color = VIEW_COLORS[saved["args"]["view"]]
        same = [n for n, (other, _) in runs.items() if other["args"]["view"]
                == saved["args"]["view"]].index(name)  # a marker tells runs of one view apart
        for column, (style, words) in columns.items():
            axis.plot(log.index, log[column].astype(float), style, color=color,
                      marker=[None if len(log) > 1 else ".x"[style != "-"], *"osD^vPX"][same % 8],
                      markersize=4,
                      markevery=max(len(log) // 8, 1), label=f"{name}{words}")
    axis.set_xlabel("epoch")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlim(left=0)


def finish_curves(figure, axes, runs, title, path):
    """Legend, title and file of a figure of curves; the numbers are the logs'."""
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 3),
                  fontsize=8)
    figure.suptitle(title, fontsize=10)
    numbers = pd.concat({name: log for name, (_, log) in runs.items()}, names=["run"])
    save_figure(figure, path, numbers.reset_index())


def plot_loss(runs, path):
    """NT-Xent along training, with what chance gives: Fig. 7 of the paper."""
    figure = Figure((8, 4.6), layout="constrained")
    axis = figure.subplots()
    draw_curves(axis, runs, {"loss": ("-", ", training"), "val_loss": ("--", ", fold 9")})
    for saved, _ in runs.values():
        for loss, style in zip(chance(saved["args"], saved["in_effect"]), (
                (0, (1, 3)), (3, (3, 5)))):
            axis.axhline(loss, linewidth=0.8, linestyle=style,
                         color=VIEW_COLORS[saved["args"]["view"]])
    axis.set(ylabel="NT-Xent (nats); thin: chance, dots\nin training, dashes on fold 9",
             ylim=(0, None))
    finish_curves(figure, [axis], runs, "Loss along training", path)


def plot_gradients(runs, path):
    """Gradient norms of the streams as the paper drew them, and corrected: Fig. 8 of the paper."""
    runs = {name: run for name, run in runs.items() if "grad_norm_time_corrected" in run[1]
            and run[1].grad_norm_time_corrected.notna().any()}
    if not runs:
        return print("note: no gradient norms of streams: a ResNet-18 has none")
    figure = Figure((11, 6.4), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True, sharey="row")
    for (above, below), key, title in zip(axes.T, ("grad_norm_{}", "grad_norm_{}_corrected",
                                                   "param_grad_norm_{}"), (
            "at the tokens, as in the paper", "at the tokens x sqrt(N)", "over the parameters")):
        draw_curves(above, runs, {key.format("time"): ("-", ", time stream"),
                                  key.format("channel"): ("--", ", channel stream")})
        above.set(yscale="log", title=title, xlabel="")
        ratios = {name: (saved, pd.DataFrame(dict(
            ratio=log[key.format("channel")] / log[key.format("time")])))
            for name, (saved, log) in runs.items()}
        draw_curves(below, ratios, {"ratio": ("-", "")})
        below.set(yscale="log")
        below.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        below.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        below.yaxis.set_minor_locator(NullLocator())
        below.axhline(1, color="0.5", linewidth=0.8, linestyle=":")
    axes[0, 0].set_ylabel("gradient norm")
    axes[1, 0].set_ylabel("channel / time; dotted: equal")
    finish_curves(figure, axes.flat, runs, "Gradient norms of the streams", path)


def plot_clustering(runs, path):
    """Clustering scores along training: Fig. 9 of the paper."""
    figure = Figure((11, 3.8), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, column, title in zip(axes, ("silhouette", "davies_bouldin", "calinski_harabasz"), (
            "silhouette (higher is better)", "Davies-Bouldin (lower is better)",
            "Calinski-Harabasz (higher is better)")):
        draw_curves(axis, runs, {column: ("-", "")})
        axis.set_title(title, fontsize=10)
    finish_curves(figure, axes, runs, "Clustering of fold 9's records with one superclass", path)


# Data

def plot_ages(index, about, path):
    """Ages in bins of five years, those above 89 apart: Fig. 2 of the paper.

    index: a table with age and sex (0 male, 1 female), as in PTB-XL, where 300 means above 89
    """
    hidden, known = index.age == AGE_HIDDEN, index.age.dropna()
    counts, edges = np.histogram(index.age[~hidden].dropna(), np.arange(0, 91, 5))
    figure = Figure((8, 4), layout="constrained")
    axis = figure.subplots()
    axis.bar(edges[:-1], counts, width=4.6, align="edge", color="#56B4E9", edgecolor="black",
             linewidth=0.5)
    axis.bar(95, hidden.sum(), width=4.6, align="edge", color="white", edgecolor="black",
             hatch="///", linewidth=0.5)
    axis.text(97.3, hidden.sum(), f"{hidden.sum()}", ha="center", va="bottom", fontsize=8)
    axis.set_xticks([*range(0, 91, 10), 97.3], [*map(str, range(0, 91, 10)), "> 89"])
    low, median, high = known.quantile((0.25, 0.5, 0.75))  # ranks: 300 is above all the others
    axis.set(xlabel="age (years), in bins of 5; PTB-XL hides ages above 89 (coded 300)",
             ylabel="records")
    axis.set_title(f"Ages of {len(index)} records: median {median:g}, quartiles {low:g} and "
                   f"{high:g}; {index.age.isna().sum()} unknown; {(index.sex == 0).mean():.0%} "
                   f"male\n{about}", fontsize=9)
    save_figure(figure, path, [*(dict(age_from=a, age_below=b, records=n) for a, b, n in zip(
        edges, edges[1:], counts)), dict(age_from=90, records=hidden.sum())])


def plot_superclasses(index, about, path):
    """How many records have each superclass, alone or not, and which occur together: Table 1."""
    has = index[list(CLASSES)].to_numpy()
    counts, alone = has.T @ has, has[has.sum(1) == 1].sum(0)
    figure = Figure((9, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
    colors = [*CLASS_COLORS.values(), "#999999"]
    bars = [*zip(alone, counts.diagonal()), ((has.sum(1) == 0).sum(),) * 2]
    for i, (one, every) in enumerate(bars):
        left.bar(i, every, color="white", edgecolor=colors[i], hatch="////")
        left.bar(i, one, color=colors[i], edgecolor=colors[i])
        left.text(i, every, f"{every}", ha="center", va="bottom", fontsize=8)
    left.set_xticks(range(len(bars)), [*CLASSES, "none"])
    left.set(ylabel="records; hatched: with another superclass")
    share = counts / counts.diagonal()[:, None].clip(1)
    right.imshow(share, cmap="Greys", vmin=0, vmax=1.3)
    for i, j in np.ndindex(counts.shape):
        right.text(j, i, f"{counts[i, j]}\n{share[i, j]:.0%}", ha="center", va="center", fontsize=8,
                   color="white" if share[i, j] > 0.6 else "black")
    right.set_xticks(range(len(CLASSES)), CLASSES)
    right.set_yticks(range(len(CLASSES)), CLASSES)
    right.set(xlabel="... and this one", ylabel="records with this superclass ...")
    figure.suptitle(f"Superclasses of {len(index)} records; a record may have several\n{about}",
                    fontsize=9)
    save_figure(figure, path, [dict(superclass=a, alone=alone[i], **{
        f"with_{b}": counts[i, j] for j, b in enumerate(CLASSES)}) for i, a in enumerate(CLASSES)])


def plot_rates(folder, ecg_id, about, path):
    """One record at both rates: a beat in three leads, and the spectra of all leads.

    folder: in PTB-XL's layout. A rate that was not downloaded is named, and nothing is drawn.
    """
    try:
        names = load_tables(folder).set_index("ecg_id").loc[ecg_id]
        signals = {rate: read_record(Path(folder) / names[column], rate)
                   for rate, column in RATES.items()}
    except (InputError, KeyError) as error:
        return print(f"note: one record at both rates is not drawn, for want of one: {error}")
    peaks = r_peaks(signals[500], 500)
    start = max(peaks[len(peaks) // 2] - 0.35, 0) if len(peaks) else 0
    figure, rows = Figure((11, 3.8), layout="constrained"), []
    axes = figure.subplots(1, 4)
    for rate, style in ((500, dict(color="0.45", linewidth=1)),
                        (100, dict(color="#D55E00", marker="o", markersize=3, linewidth=0))):
        t, mv = np.arange(SECONDS * rate) / rate, signals[rate] / 1000
        inside = (t >= start) & (t < start + 0.8)
        for axis, lead in zip(axes, ("II", "V2", "V5")):
            axis.plot(t[inside], mv[inside, LEADS.index(lead)], label=f"{rate} Hz", **style)
            axis.set(title=f"lead {lead}", xlabel="time (s)", ylabel="mV")
            rows += [dict(panel=lead, rate=rate, x=a, y=b) for a, b in
                     zip(t[inside], mv[inside, LEADS.index(lead)])]
        f, power = welch(mv, rate, nperseg=2 * rate, axis=0)
        axes[3].plot(f[1:], power[1:].mean(1), color=style["color"], label=f"{rate} Hz")
        rows += [dict(panel="spectrum", rate=rate, x=a, y=b) for a, b in zip(f, power.mean(1))]
    axes[0].legend(fontsize=8)
    axes[3].set(yscale="log", title="mean over leads", xlabel="frequency (Hz)",
                ylabel="power density (mV$^2$/Hz)")
    figure.suptitle(f"ecg_id {ecg_id} at both rates. {about}", fontsize=10)
    save_figure(figure, path, rows)


# Views

def example(cache, config, seed, row):
    """Both views of a record as training makes them: views (2, T', C), leads kept (2, C) bool.

    Of an epoch in which both stochastic views differ from the record: none may be transformed.
    """
    x = normalize(torch.from_numpy(cache.signals[[row]]))
    for epoch in range(100):
        (make,) = batches(cache, config, seed, [(epoch, np.array([row]))],
                          torch.device("cpu"), 0)
        pair = torch.cat(list(make(slice(0, 1))))
        if config.view != "stochastic" or (pair != x).any((1, 2)).all():
            break
    keep = draw_keep(config, 1, seed, epoch, row)
    return pair.numpy(), np.ones((2, len(LEADS)), bool) if keep is None else keep[:, 0].numpy()


def draw_leads_apart(axis, x, seconds, kept, offsets, color, title):
    """All leads of x (T, C) below one another; masked ones are flat, grey and marked."""
    for trace, offset, there in zip(x.T, offsets, kept):
        axis.plot(seconds, (trace if there else 0 * trace) + offset, linewidth=0.6,
                  color=color if there else "0.7")
        if not there:
            axis.text(seconds[len(seconds) // 2], offset, "masked", fontsize=7, color="0.4",
                      ha="center", va="center", backgroundcolor="white")
    axis.set_yticks(offsets, LEADS, fontsize=7)
    axis.set_title(title, fontsize=9)
    axis.margins(x=0.01, y=0.02)


def plot_views(cache, config, seed, row, about, path):
    """A record raw, normalised, and its two views; below, what each view holds of one beat.

    Figs. 3 (stochastic), 4 (contig) and 5 (noncontig) of the paper.
    """
    rate, signal = cache.meta["rate"], cache.signals[row]
    mv, x = signal / np.float32(1000), normalize(torch.from_numpy(signal[None].copy()))
    pair, kept = example(cache, config, seed, row)
    figure = Figure((11, 9), layout="constrained")
    top, below = figure.subfigures(2, 1, height_ratios=(3, 1))
    axes, every = top.subplots(1, 4), np.ones(len(LEADS), bool)
    t, color = np.arange(len(mv)) / rate, VIEW_COLORS[config.view]
    raw = mv - np.median(mv, axis=0)
    draw_leads_apart(axes[0], raw, t, every, rows_apart(raw, 0.2), "black",
                     "raw, medians aside; bar: 1 mV")
    offsets = rows_apart(x[0].numpy(), 0.5)
    draw_leads_apart(axes[1], x[0].numpy(), t, every, offsets, "black",
                     "normalised; bar: 5 deviations")
    for axis, size in zip(axes, (1, 5)):
        axis.set_xlabel("time (s)")
        axis.plot([-0.4] * 2, [-size, 0], color="black", linewidth=3, solid_capstyle="butt")
    span = SECONDS / 2 if config.view == "contig" else SECONDS
    at = np.arange(pair.shape[1]) * span / pair.shape[1]
    for i, axis in enumerate(axes[2:]):
        starts = i * span * (config.view == "contig" and not config.shift)
        draw_leads_apart(axis, pair[i], starts + at, kept[i], offsets, color,
                         f"view {i + 1}: {kept[i].sum()} of 12 leads")
        axis.set(ylim=axes[1].get_ylim(), xlabel="time from the view's start (s)" if config.shift
                 else "time (s)")

    axis, lead = below.subplots(), LEADS.index("II")
    peaks = r_peaks(signal, rate)
    middle = peaks[np.abs(peaks - SECONDS / 2).argmin()] if len(peaks) else SECONDS / 2
    axis.plot(t, x[0, :, lead], color="0.6", linewidth=1.5, label="normalised record")
    if config.view == "stochastic":
        parts = [(t, view[:, lead]) for view in pair]
    else:
        times = split(torch.from_numpy(t)[None, :, None], config.view)
        parts = [(s[0, :, 0].numpy(), v[0, :, lead].numpy())
                 for s, v in zip(times, split(x, config.view))]
    for i, (style, (s, y)) in enumerate(zip(("o-", "s--"), parts)):
        axis.plot(s, y, style, color=color, markersize=4, linewidth=0.8, label=f"view {i + 1}",
                  markerfacecolor=color if i == 0 else "white")
    axis.set(xlim=(middle - 0.6, middle + 0.6), xlabel="time (s)",
             ylabel=f"lead II, unmasked{', unshifted' * config.shift}\n(z-score)")
    axis.yaxis.label.set_size(8)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(f"{config.describe()}\n{about}", fontsize=10)
    save_figure(figure, path, dict(millivolt=mv, normalized=x[0].numpy(), views=pair, kept=kept,
                                   leads=LEADS))


def spectra(x, rate):
    """Power density of each lead at each frequency in units of its power in BAND_HZ.

    x: (n, T, C)  ->  f (F,) in Hz, (n, F, C)
    """
    f, power = welch(x, rate, nperseg=2 * rate, axis=1)
    inside = (f >= BAND_HZ[0]) & (f <= min(BAND_HZ[1], 0.45 * rate))
    return f[inside], power[:, inside] / power[:, inside].sum(1, keepdims=True).clip(1e-12)


def log_spectral_distance(a, b):
    """Root mean square difference of two spectra (n, F, C) over frequencies, in dB: (n, C), >= 0.
    """
    return np.sqrt(((10 * np.log10(a.clip(1e-9) / b.clip(1e-9))) ** 2).mean(1))


def lead_correlation(a, b):
    """Correlation of each lead with itself in another version: (n, T, C) twice -> (n, C)."""
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    return (a * b).sum(1) / np.sqrt((a ** 2).sum(1) * (b ** 2).sum(1)).clip(1e-12)


def frequency_check(cache, trained):
    """Do augmented signals keep their frequencies (paper 4.2.1)? The filters alone, and the pool.

    On the first 64 records of folds 1-8  ->  f (F,) in Hz; for each kind of signal its mean
    spectrum (F,), log-spectral distance to the raw one in dB, and a lead's correlation with itself
    """
    rate, rows = cache.meta["rate"], cache.rows(TRAIN_FOLDS)[:64]
    raw = normalize(torch.from_numpy(cache.signals[rows])).numpy()
    strengths = trained | dict(view="stochastic", mask_leads=None, shift=False)
    ours, theirs = (from_args(ViewConfig, Namespace(**strengths | dict(shipped_filter=shipped)))
                    for shipped in (False, True))
    kinds = {"band-pass as shipped": E.BandPassFilter(p=1),
             "band-pass along time": BandPassFilter((ours.band_low, ours.band_high), rate, p=1),
             "pool, band-pass as shipped": pool(theirs, rate),
             "pool, band-pass along time": pool(ours, rate)}
    live, (f, before) = raw.std(1) > 0, spectra(raw, rate)  # a flat lead has no spectrum
    found = {"raw": (before.swapaxes(1, 2)[live].mean(0), 0.0, 1.0)}

    def compare(name, x):
        after = spectra(x, rate)[1]
        found[name] = (after.swapaxes(1, 2)[live].mean(0),
                       log_spectral_distance(after, before)[live].mean(),
                       lead_correlation(raw, x)[live].mean())

    for name, transform in kinds.items():
        with numpy_seed(trained["seed"]):
            compare(name, np.stack([transform(ecg=x)["ecg"] for x in raw]))
    compare("another record", np.roll(raw, 1, axis=0))
    return f, found


def plot_spectra(cache, trained, about, path):
    """The spectra of frequency_check(), with its numbers in the legends."""
    f, found = frequency_check(cache, trained)
    figure = Figure((10, 4.6), layout="constrained")
    for axis, part in zip(figure.subplots(1, 2, sharey=True), ("band-pass", "pool")):
        axis.plot(f, found["raw"][0], linewidth=3, color="0.7", label="raw")
        for name, (mean, apart, same) in found.items():
            if name.startswith(part):
                shipped = "shipped" in name
                axis.plot(f, mean, "--" if shipped else "-", color=("#0072B2", "#D55E00")[shipped],
                          label=f"{name}: {apart:.1f} dB, r = {same:.2f}")
        axis.set(yscale="log", xlabel="frequency (Hz)", title={
            "band-pass": "the filter alone", "pool": "the whole pool"}[part])
        axis.legend(fontsize=8, loc="lower left")
    figure.axes[0].set_ylabel("share of a lead's power")
    apart, same = found["another record"][1:]
    figure.suptitle("Spectra of raw and augmented signals: log-spectral distance, correlation of a "
                    f"lead with itself\n(another record: {apart:.1f} dB, r = {same:.2f}). {about}",
                    fontsize=9)
    save_figure(figure, path, [
        dict(signal=name, log_spectral_distance_db=db, correlation_with_itself=r, hz=a, share=b)
        for name, (mean, db, r) in found.items() for a, b in zip(f, mean)])


def plots(args):
    """Every figure of a run, in its folder; of several runs their curves of training together."""
    folders, end, several = [Path(run) for run in args.runs], args.format, len(args.runs) > 1
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError(f"the same run twice: {' '.join(args.runs)}")
    if several and args.ecg_id is not None:
        raise InputError("--ecg-id is for the figures of one run; give one run folder")
    names = [folder.name for folder in folders]
    runs = {}
    for name, folder in zip(names, folders):
        saved, log = read_log(folder)
        name = name if names.count(name) == 1 else str(folder)
        runs[name + ", SYNTHETIC" * saved["data"]["synthetic"]] = saved, log
    out = Path(args.out or ("runs/plots" if several else folders[0] / "figures"))
    if not several:  # before anything is drawn, so that an error comes at once
        trained, cache = open_data(folders[0], saved, args.cache)
        row = find_record(cache.index, args.ecg_id)
        if cache.meta["fingerprint"] != saved["data"]["fingerprint"]:
            print(f"note: trained on {saved['data']['data']}, drawn with {cache.meta['data']}")
    plot_loss(runs, out / f"training-loss.{end}")
    plot_gradients(runs, out / f"training-gradients.{end}")
    plot_clustering(runs, out / f"training-clustering.{end}")
    if several:
        return print(f"-> {out}/training-*")
    data, record = describe_data(cache.meta), name_record(cache.index, row)
    at = f"{data} at {cache.meta['rate']} Hz"
    plot_ages(cache.index, data, out / f"data-ages.{end}")
    plot_superclasses(cache.index, data, out / f"data-superclasses.{end}")
    plot_rates(cache.meta["data"], int(cache.index.ecg_id[row]), data, out / f"data-rates.{end}")
    for view in VIEWS:
        settings = trained if view == trained["view"] else trained | dict(
            view=view, mask_leads=None, shift=False)
        config = from_args(ViewConfig, Namespace(**settings))
        plot_views(cache, config, trained["seed"], row, f"{record}, {at}",
                   out / f"views-{view}.{end}")
    plot_spectra(cache, trained, at, out / f"spectra.{end}")
    print(f"-> {out}: training-*, data-*, views-*, spectra")
    if not (folders[0] / "model.pt").exists():
        print("note: no attention maps before the run is finished")
    elif saved["config"]["arch"] == "resnet18":
        print("note: no attention maps: this run is a ResNet-18")
    else:
        maps(Namespace(**vars(get_args(["maps"])) | dict(
            run=folders[0], cache=args.cache, ecg_id=args.ecg_id, device=args.device, format=end,
            out=args.out)))


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    style = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    p = commands.add_parser("maps", help="attention maps of one run", **style)
    p.add_argument("--run", default="runs/noncontig-s0", help="a finished run folder")
    g = p.add_mutually_exclusive_group()
    g.add_argument("--ecg-id", type=int, help="the record to show; by default the first of fold 10 "
                   "that is NORM alone")
    g.add_argument("--superclass", choices=CLASSES, help="the mean over records of folds 9 and 10 "
                   "with this superclass, with intervals, instead of one record")
    p.add_argument("--records", type=int, default=64, help="at most so many for --superclass")
    p.add_argument("--out", help="folder; by default the run's figures/")
    p.add_argument("--raw", action="store_true", help="colours show the weights; by default their "
                   "ratio to uniform attention (weight x number of keys)")
    p.add_argument("--cache", help="folder of: python data.py cache; by default the run's own")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    p.add_argument("--format", choices=("png", "pdf"), default="png", help="of the figures")
    p = commands.add_parser("plots", help="every figure of a run, or curves of several", **style)
    p.add_argument("runs", nargs="+", help="run folders. One: all figures, into its figures/. "
                   "Several: their curves of training together")
    p.add_argument("--out", help="folder; by default the run's figures/, runs/plots for several")
    p.add_argument("--ecg-id", type=int, help="the record to show; by default as for maps")
    p.add_argument("--cache", help="folder of: python data.py cache; by default the run's own")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    p.add_argument("--format", choices=("png", "pdf"), default="png", help="of the figures")
    return parser.parse_args(argv)


def main(args):
    if args.command == "maps":
        maps(args)
    else:
        plots(args)


if __name__ == "__main__":
    run_script(lambda: main(get_args()))
