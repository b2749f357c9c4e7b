"""Figures of attention, training, data and views (paper Figs. 2-5, 7-9 and 11-14).

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

from data import (CLASSES, LEADS, SECONDS, TEST_FOLD, VAL_FOLD, InputError, add_shared, bounded,
                  from_args, normalize, run_script, write_atomic)
from evaluate import describe, describe_data, markdown, number, open_data, save_figure, untrained
from model import load_run, read_args, read_log, watch_attention
from train import Feed, chance, pick_device, with_defaults
from views import VIEWS, ViewConfig, draw_leads, generator

MM = 1 / 25.4  # inch
PAGE_MM = 297  # the long side of A4: no record is drawn higher
# Rows of a printed ECG: 2.5 s a lead, one after another, and a rhythm strip.
PRINTED = (("I", "aVR", "V1", "V4"), ("II", "aVL", "V2", "V5"), ("III", "aVF", "V3", "V6"), ("II",))
PEAK_S = 0.05  # a token within this of an R peak is on it
# Of each stream: its name in figures, and what its queries and keys are.
STREAMS = {"time": ("time stream", "time", "time"), "channel": ("channel stream", "lead", "lead"),
           "time_to_channel": ("time attends to channels", "time", "lead"),
           "channel_to_time": ("channels attend to time", "lead", "time")}
STYLE = {"figure.constrained_layout.use": True, "figure.titlesize": 10, "axes.titlesize": 9,
         "legend.fontsize": 8, "lines.markersize": 4, "errorbar.capsize": 2,
         # after Okabe and Ito, safe for the colour-blind
         "axes.prop_cycle": matplotlib.cycler(color=["#0072B2", "#E69F00", "#009E73", "#CC79A7",
                                                     "#D55E00", "#56B4E9", "#000000", "#997700",
                                                     "#999999"])}
DASHED = dict(color="0.5", linewidth=0.8, linestyle="--")
# Columns of the table of attention: (quantity, encoder).
COLUMNS = {"entropy": ("entropy", "this run"), "untrained": ("entropy", "untrained"),
           "on R peaks": ("share", "this run"), "chance": ("chance", "this run"),
           "ratio": ("ratio", "this run"), "ratio, untrained": ("ratio", "untrained")}
ABOUT = ("Entropy: of the queries' weights over ln(keys), 1 is uniform; mean over heads. On R "
         f"peaks: share of the attention on keys within {1000 * PEAK_S:.0f} ms of an R peak; "
         "chance: share of such keys; ratio: of the two, mean over records. In brackets: 95 % "
         "intervals over records.")
# Figures of training: title, scale, size in inches; and rows of panels: a title, a y label and
# columns of log.jsonl, the first drawn solid, the second dashed.
TRAINING = {
    "loss": ("Loss along training", "linear", (8, 4.6), [[
        ("", "loss; thin: chance, dots\nin training, dashes on fold 9", ("loss", "val_loss"))]]),
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

    x: (1, T, C), keep: (1, C) bool or None  ->  {(stream, layer): (map (N, M), entropy)}: the
    weights, queries first, and the entropy of the queries' weights over ln(M), 1 if uniform; both
    are means over heads
    """
    maps, entropies, H = defaultdict(int), defaultdict(int), model.config.heads

    def see(stream, layer, head, weights):
        w, M = weights[0], weights.shape[-1]
        # summed, not kept head by head: a map has up to 5000 x 5000 weights
        maps[stream, layer] += w
        entropies[stream, layer] += float(torch.special.entr(w).sum(-1).mean()) / max(
            math.log(M), 1e-9)

    watch_attention(model, x, see, keep)
    return {key: ((maps[key] / H).cpu().numpy(), entropies[key] / H) for key in maps}


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


def r_peaks(signal, rate):
    """Times of the R peaks of a record in s; empty when no QRS complexes are found.

    Complexes are found by wfdb's XQRS in one lead; the peak of each is where the root mean square
    over all leads is largest, so that it is no matter which way a lead deflects.
    signal: (T, C) int16 microvolt
    """
    x = resample_poly(signal / 1000, 500 // rate, 1)  # at 100 Hz XQRS takes T waves for beats
    size = ((x - np.median(x, axis=0)) ** 2).mean(1)
    reach = round(PEAK_S * 500)
    for lead in ("II", "V2", "V5", "I"):  # the first in which it finds beats
        trace = x[:, LEADS.index(lead)]
        if trace.std() > 0:
            peaks = xqrs_detect(trace, fs=500, verbose=False)
            peaks = [p for p in peaks if reach <= p < len(x) - reach]
            if len(peaks) > 2:
                moved = [p - reach + size[p - reach:p + reach].argmax() for p in peaks]
                return np.array(moved) / 500
    return np.array([])


def study(model, look, device):
    """Means over records of what attention does: {(stream, layer): {quantity: Mean}}."""
    found = defaultdict(lambda: defaultdict(Mean))
    for x, keep, peaks in zip(tqdm(look.views, "records", leave=False, disable=None), look.keep,
                              look.peaks):
        near = (np.abs(look.seconds[:, None] - peaks) <= PEAK_S).any(1)  # tokens on R peaks
        seen = observe(model, x[None].to(device), keep[None].to(device))
        for (stream, layer), (weights, entropy) in seen.items():
            received = weights.mean(0) * weights.shape[1]  # by each key; 1 if uniform
            values = dict(map=weights, received_ratio=received, entropy=entropy)
            if STREAMS[stream][2] == "time" and near.any():
                chance, ratio = near.mean(), received[near].mean()
                values |= dict(share=ratio * chance, chance=chance, ratio=ratio)
            for quantity, value in values.items():
                found[stream, layer][quantity].add(value)
    return found


def attention_rows(found, **about):
    """Rows of the table: a stream, layer and quantity each, with the 95 % interval over records."""
    rows = []
    for (stream, layer), means in found.items():
        for quantity in ("entropy", "share", "chance", "ratio"):
            if quantity in means:
                mean = means[quantity]
                low, high = mean.mean - mean.half, mean.mean + mean.half
                bounds = (low, high) if quantity in ("entropy", "ratio") else None
                rows.append(about | dict(
                    attention=STREAMS[stream][0], layer=layer + 1,
                    keys=len(means["received_ratio"].mean), quantity=quantity, records=mean.n,
                    value=mean.mean, low=low, high=high, text=number(mean.mean, bounds)))
    return rows


# Drawing an ECG

def rows_apart(signals, gap):
    """Offsets (n,) that stack traces (T, n) from top to bottom without touching."""
    high, low = signals.max(0), signals.min(0)
    return -np.cumsum([0, *(high[1:] - low[:-1] + gap)])


def draw_ecg(mv, title, room):
    """A record as a clinician reads it: 12 leads, 25 mm/s and 10 mm/mV when printed at 100 %.

    mv: (T, C) millivolt, 10 s  ->  (figure, its subfigure of `room` inches below the record)
    """
    mv = mv - np.median(mv, axis=0)
    rows = np.stack([np.concatenate([part[:, LEADS.index(lead)] for part, lead in zip(
        np.split(mv, len(leads)), leads)]) for leads in PRINTED])  # (4, T)
    offsets = rows_apart(rows.T.clip(-4, 4), 0.6)
    low, high = offsets[-1] + rows[-1].min() - 0.3, rows[0].max() + 0.6
    # mm per mV: what a page has room for, since at some sources amplitudes are no millivolts
    scale = min(10, (PAGE_MM - 17) / (high - low))
    width, height = (SECONDS * 25 + 20.5) * MM, (scale * (high - low) + 17) * MM
    figure, ink = Figure((width, height + room)), dict(color="black", linewidth=0.8)
    top, below = figure.subfigures(2, 1, height_ratios=(height, room), hspace=0)
    axis = top.add_axes((4 * MM / width, 9 * MM / height, 1 - 8 * MM / width, 1 - 17 * MM / height),
                        frame_on=False)
    seconds = np.arange(len(mv)) * SECONDS / len(mv)
    for leads, offset, row in zip(PRINTED, offsets, rows + offsets[:, None]):
        axis.plot([-0.45, -0.4, -0.4, -0.2, -0.2, -0.15], offset + np.array([0, 0, 1, 1, 0, 0]),
                  **ink)  # the pulse
        axis.plot(seconds, row, color="black", linewidth=0.7)
        for lead, s, y in zip(leads, *(np.split(a, len(leads)) for a in (seconds, row))):
            axis.vlines(s[0], offset - 0.25, offset + 0.25, **ink)
            above = y[s < s[0] + 0.6].max()  # what is below the lead's name
            axis.text(s[0] + 0.06, above + 0.12, lead, fontsize=8, weight="bold")
    for mm, color in ((1, "#F8DDDD"), (5, "#E9A8A8")):
        step, grid = mm / scale, dict(color=color, linewidth=0.4, zorder=0)
        axis.hlines(np.arange(math.ceil(low / step) * step, high, step), -0.5, SECONDS, **grid)
        axis.vlines(np.arange(-0.4, SECONDS + 0.01, mm / 25), low, high, **grid)
    axis.set(xlim=(-0.5, SECONDS), ylim=(low, high), yticks=[], xticks=range(SECONDS + 1))
    axis.tick_params(length=0, labelsize=7)
    volts = "10 mm/mV" if scale == 10 else f"{scale:.2g} mm/mV, not 10, for want of height,"
    axis.set_xlabel(f"time (s); 25 mm/s and {volts} when printed at 100 %; the pulse is 1 mV and "
                    "0.2 s", fontsize=7, labelpad=1)
    top.text(0.5, 1 - 4 * MM / height, title, ha="center", fontsize=10)
    return figure, below


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
    mv: np.ndarray  # (T, C) millivolt: the record, if it is one; else None
    peaks: list  # of each record the times of its R peaks in s
    seconds: np.ndarray  # (N,) middle of each time token
    end: float  # of the last time token in s
    span: float  # of a view in s
    tokens: list  # names of the channel tokens


def name_axis(axis, along, role, kind, look):
    """What lies along x or y: queries or keys (role), of time or of leads (kind)."""
    if kind == "time":
        axis.set(**{f"{along}label": f"{role}: time (s)"})
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.set_xlim(0, look.span)
    else:
        token = "lead" if look.tokens == LEADS else "mixed channel token"
        axis.set(**{f"{along}label": f"{role}: {token}", f"{along}ticks": range(len(LEADS)),
                    f"{along}ticklabels": look.tokens})
        axis.tick_params(axis=along, labelsize=7, rotation=90 if along == "x" else 0)


def shades(layers, raw):
    """A stream's maps (layers, N, M) as drawn: weights, or log2(weight x M), 0 where uniform."""
    weights = np.stack([means["map"].mean for means in layers])
    return weights if raw else np.log2((weights * weights.shape[2]).clip(1 / 16, 16))


def draw_maps(axes, layers, stream, look, raw, limit):
    """A stream's maps, a layer an axis, in colours up to `limit`; keys are along x, but time is
    where there is one.
    """
    values, (words, query, key) = shades(layers, raw), STREAMS[stream]
    style, uniform = dict(cmap="PuOr_r", vmin=-limit), 0
    if raw:
        style, uniform = dict(cmap="cividis", vmin=0), 1 / values.shape[2]
    x, y = ("key", key), ("query", query)
    if stream == "time_to_channel":
        values, x, y = values.swapaxes(1, 2), y, x
    ends = dict(time=(0, look.end), lead=(-0.5, len(LEADS) - 0.5))
    for i, (axis, shown, means) in enumerate(zip(axes, values, layers)):
        image = axis.imshow(shown, aspect="auto", interpolation="nearest", vmax=limit,
                            extent=(*ends[x[1]], *ends[y[1]][::-1]), **style)
        what = f"layer {i + 1}" if query == key else words
        axis.set_title(f"{what}: entropy / ln(keys) {means['entropy'].mean:.3f}")
        name_axis(axis, "x", *x, look)
        name_axis(axis, "y", *y, look)
    bar = axis.figure.colorbar(image, ax=axes, shrink=0.8, extend="both", label=(
        "weight; line: uniform" if raw else "log2(attention / uniform)"))
    bar.ax.axhline(uniform, color="white")


def draw_received(axis, received, kind, look):
    """What keys of a kind receive / uniform, with intervals for several records; behind time, of
    one record, lead II and its R peaks."""
    axis.axhline(1, **DASHED)
    axis.set_ylabel("received /\nuniform")
    mean, half = received.mean, received.half
    if kind == "lead":
        axis.errorbar(range(len(LEADS)), mean, yerr=half, fmt="o", color="black")
    else:
        axis.plot(look.seconds, mean, color="black", linewidth=0.9)
        axis.fill_between(look.seconds, mean - half, mean + half, alpha=0.2, color="black",
                          linewidth=0)
    if kind == "time" and look.mv is not None:
        x, behind = look.views[0, :, LEADS.index("II")], axis.twinx()
        behind.plot(np.arange(len(x)) * look.span / len(x), x, color="#56B4E9", linewidth=0.6)
        behind.plot(look.peaks[0], [x.max()] * len(look.peaks[0]), "v", color="#D55E00")
        behind.set_yticks([])
    name_axis(axis, "x", "key", kind, look)


def arrays(layers, look):
    """The numbers behind maps of some layers, for NPZ: weights, and what keys receive / uniform."""
    out = {}
    for key in ("map", "received_ratio"):
        out[key] = np.stack([means[key].mean for means in layers], dtype=np.float32)
        if look.mv is None:
            out[f"{key}_half"] = np.stack([means[key].half for means in layers], dtype=np.float32)
    if look.mv is not None:
        out |= dict(millivolt=look.mv, r_peaks=look.peaks[0].astype(np.float32))
    return out | dict(seconds=look.seconds, channel_tokens=look.tokens, ecg_id=look.ecg_id,
                      data=look.data)


def plot_maps(seen, streams, raw, path):
    """Maps of some streams, a column a layer: Figs. 12 (time), 13 (channel) and 14 (cross) of the
    paper. Several runs are a row each; of a single one what keys receive is drawn below, and the
    record, if it is one, above.

    seen: {run: (Look, what study() found)}
    """
    several, cross, numbers = len(seen) > 1, len(streams) > 1, {}
    keys = sorted({key for _, found in seen.values() for key in found if key[0] in streams},
                  key=lambda key: (streams.index(key[0]), key[1]))
    look, found = next(iter(seen.values()))
    title = f"Attention: {', '.join(STREAMS[stream][0] for stream in streams)}"
    if several:
        figure = Figure((4.2 * len(keys) + 1, 3.1 * len(seen) + 0.8))
        axes = figure.subplots(len(seen), len(keys), squeeze=False)
        figure.suptitle(f"{title}\n{look.subject}")
    else:
        height, legend = min(4.0, 9 / len(keys)), "\nBand and bars: 95 % intervals"
        figure = below = Figure((10.7, height + 2.2))
        if look.mv is not None:
            figure, below = draw_ecg(look.mv, look.subject, height + 2.2)
            legend = ("\nBlack: attention that a key receives, mean over queries; blue: lead II; "
                      "triangles: R peaks")
        axes = below.subplots(2, len(keys), squeeze=False, height_ratios=(height, 1.2),
                              sharex=not cross, sharey=False if cross else "row")
        below.suptitle(f"{title}. {look.title}{legend}")
        for axis, key in zip(axes[1], keys):
            draw_received(axis, found[key]["received_ratio"], STREAMS[key[0]][2], look)
    for stream in streams:
        layers = {run: [means for (of, _), means in found.items() if of == stream]
                  for run, (_, found) in seen.items()}
        columns = [i for i, key in enumerate(keys) if key[0] == stream]
        limit = max(np.quantile(np.abs(shades(some, raw)), 0.995) for some in layers.values())
        for row, (run, (look, _)) in zip(axes, seen.items()):
            draw_maps(row[columns][:len(layers[run])], layers[run], stream, look, raw, limit)
            prefix = f"{run}/" * several + f"{stream}/" * (several or cross)
            numbers |= {prefix + key: value for key, value in arrays(layers[run], look).items()}
    if several:
        for axis, run in zip(axes[:, 0], seen):
            axis.set_ylabel(f"{run}\n{axis.get_ylabel()}")
    if not (several or cross):
        for axis in axes.flat:
            axis.label_outer()
    save_figure(figure, path, numbers)


# Attention maps of runs

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


def name_record(cache, row):
    """Such as: PTB-XL: ecg_id 39 (NORM), fold 10."""
    index = cache.index
    classes = ", ".join(name for name in CLASSES if index[name][row]) or "no superclass"
    return (f"{describe_data(cache.meta)}: ecg_id {index.ecg_id[row]} ({classes}), fold "
            f"{index.strat_fold[row]}")


def look_at(cache, rows, saved, trained, run, args):
    """The Look of some rows of a cache; saved, trained: args.json and arguments of the run."""
    rate, signals, config = cache.meta["rate"], cache.signals[rows], from_args(ViewConfig, trained)
    seconds = torch.arange(signals.shape[1])[None, :, None] / rate
    at = config.split(seconds)[0][0, :, 0].tolist()  # the view's samples, s
    step, start, stride = at[1] - at[0], at[0], saved["config"]["time_stride"]
    span, n_tokens = round(len(at) * step, 6), len(at) // stride
    keep, mv = torch.ones(len(rows), len(LEADS)).bool(), None
    if args.masked:
        keep = draw_leads(keep.shape, trained["mask_p"], generator("mask", trained["seed"], *rows))
    if args.superclass:
        subject = (f"{describe_data(cache.meta)}: {len(rows)} records of folds 9 and 10 with "
                   f"{args.superclass}, one a patient: means")
    else:
        subject, mv = name_record(cache, rows[0]), signals[0] / np.float32(1000)
    subject += "; leads masked" * args.masked
    peaks = [r_peaks(signal, rate) for signal in signals]
    numbered = [str(i + 1) for i in range(len(LEADS))]
    return Look(
        subject=subject, title=f"{subject}\n{run}: {describe(saved, cache.meta)}",
        data=describe_data(cache.meta), ecg_id=cache.index.ecg_id.to_numpy()[rows],
        views=config.split(normalize(torch.from_numpy(signals)))[0], keep=keep, mv=mv,
        peaks=[p[(p >= start) & (p < start + span)] - start for p in peaks],
        seconds=(np.arange(n_tokens) * stride + (stride - 1) / 2) * span / len(at),
        end=n_tokens * stride * span / len(at), span=span,
        tokens=numbered if saved["config"]["mix_leads"] else LEADS)


def maps(folders, out, args):
    """Attention of runs {name: folder}: maps, of several side by side, and one table of all."""
    device, seen, rows = pick_device(args.device), {}, []
    for name, folder in folders.items():
        model, saved = load_run(folder, device)
        trained, cache = open_data(folder, saved, args.cache)
        look = look_at(cache, choose(cache, args), saved, trained, name, args)
        fresh = untrained(saved["config"], trained["seed"], device)
        rows += attention_rows(study(fresh, look, device), run=name, data=look.data,
                               encoder="untrained")
        found = study(model, look, device)
        rows += attention_rows(found, run=name, data=look.data, encoder="this run")
        seen[name] = look, found
    several = len(folders) > 1
    what = "views" if several else args.superclass or f"ecg{look.ecg_id[0]}"
    for figure, streams in (("time", ["time"]), ("channel", ["channel"]),
                            ("cross", ["time_to_channel", "channel_to_time"])):
        name = f"views-{figure}" if several else f"{figure}-{what}"
        plot_maps(seen, streams, args.raw, out / f"attention-{name}.{args.format}")
    table = pd.DataFrame(rows)
    cells = table.pivot_table(
        "text", [*["run"] * several, "attention", "layer", "keys"], ["quantity", "encoder"],
        aggfunc="first", sort=False)
    cells = cells.reindex(columns=pd.MultiIndex.from_tuples(COLUMNS.values())).fillna("-")
    text = (f"## Attention\n{look.subject if several else look.title}\n\n{ABOUT}\n\n"
            + markdown([*cells.index.names, *COLUMNS], cells.reset_index().to_numpy()) + "\n")
    write_atomic(out / f"attention-{what}.md", lambda tmp: tmp.write_text(text))
    write_atomic(out / f"attention-{what}.csv", lambda tmp: table.drop(columns="text").to_csv(
        tmp, index=False, float_format="%.6g"))
    print(f"{text}\n-> {out}/attention-*{what}*")


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
            of_run = chance(with_defaults(saved["args"]), saved["in_effect"])
            for level, style in zip(of_run, (":", "--")):
                axis.axhline(level, linestyle=style, linewidth=0.8, color=color)
    if not any(log[column].notna().any() for _, log in runs.values() for column in columns):
        axis.text(0.5, 0.5, "not of this model:\nits streams hand on\nmore than a mean",
                  ha="center", va="center", transform=axis.transAxes, color="0.4")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def plot_training(kind, runs, path):
    """A figure of TRAINING, Figs. 7 to 9 of the paper; runs: {name: (args.json, log)}."""
    title, scale, size, rows = TRAINING[kind]
    if kind == "gradients":  # a ResNet-18 has no streams
        runs = {name: (saved, log.assign(param_grad_norm_ratio=log.param_grad_norm_channel
                                         / log.param_grad_norm_time))
                for name, (saved, log) in runs.items() if "param_grad_norm_time" in log}
    if not runs:
        print("note: no gradient norms of streams: a ResNet-18 has none")
        return
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


# Views

def draw_leads_apart(axis, seconds, x, kept, offsets, color):
    """All leads of x (T, C) below one another; masked ones are flat, grey and marked."""
    for trace, offset, there in zip(x.T, offsets, kept):
        axis.plot(seconds, (trace if there else 0 * trace) + offset, linewidth=0.6,
                  color=color if there else "0.7")
        if not there:
            axis.text(seconds[len(seconds) // 2], offset, "masked", fontsize=7, color="0.4",
                      ha="center", va="center", backgroundcolor="white")
    axis.set_yticks(offsets, LEADS, fontsize=7)
    axis.set_xlabel("time (s)")
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


def plot_views(cache, config, seed, row, path):
    """A record raw, normalised, and its two views; below, what each view holds of one beat.

    Figs. 3 (stochastic), 4 (contig) and 5 (noncontig) of the paper.
    """
    signal, rate, color = cache.signals[row], cache.meta["rate"], VIEWS[config.view].color
    mv, x = signal / np.float32(1000), normalize(torch.from_numpy(signal[None].copy()))
    raw, every = mv - np.median(mv, axis=0), np.ones(len(LEADS), bool)
    # what a first step of training with this record alone would see: the first window of each view
    (batch,) = Feed(cache, config, seed, torch.device("cpu"))([(0, np.array([row]))])
    pair = torch.cat(list(batch.cut(slice(0, 1)))[::config.windows]).numpy()  # (2, T', C)
    kept = [every] * 2 if batch.keep is None else batch.keep[::config.windows, 0].numpy()
    t = torch.arange(len(mv))[None, :, None] / rate
    times = [part[0, :, 0].numpy() for part in 2 * config.split(t)][:2]
    # disturbed views have times of their own: the beat is then of views as evaluation sees them
    apart = config.shift or config.disturbances or config.equal
    parts = [part[0].numpy() for part in 2 * config.split(x)][:2] if apart else pair
    t, x, figure = t[0, :, 0].numpy(), x[0].numpy(), Figure((11, 9))
    top, below = figure.subfigures(2, 1, height_ratios=(3, 1))
    axes, offsets = top.subplots(1, 4), rows_apart(x, 0.5)
    for axis, title, traces, at, bar in (
            (axes[0], "raw, medians aside; bar: 1 mV", raw, rows_apart(raw, 0.2), 1),
            (axes[1], "normalised; bar: 5 deviations", x, offsets, 5)):
        draw_leads_apart(axis, t, traces, every, at, "black")
        axis.plot([-0.4] * 2, [-bar, 0], color="black", linewidth=3, solid_capstyle="butt")
        axis.set_title(title)
    for i, axis in enumerate(axes[2:]):
        seconds = times[i][:len(pair[i])] - (times[i][0] if apart else 0)
        draw_leads_apart(axis, seconds, pair[i], kept[i], offsets, color)
        axis.set(title=f"view {i + 1}: {kept[i].sum()} of 12 leads", ylim=axes[1].get_ylim())
        if apart:
            axis.set_xlabel("time from the view's start (s)")
    draw_beat(below.subplots(), x, zip(times, parts), r_peaks(signal, rate), color)
    figure.suptitle(f"{textwrap.fill(config.describe(), 110)}\n{name_record(cache, row)}, "
                    f"{rate} Hz")
    save_figure(figure, path, dict(millivolt=mv, normalized=x, views=pair, kept=kept, leads=LEADS))


# Every figure

def plot_data(folder, saved, out, args):
    """The figures of a run's data and of all views of a record, its own as it was trained."""
    trained, cache = open_data(folder, saved, args.cache)
    row = choose(cache, args)[0]
    if cache.meta["fingerprint"] != saved["data"]["fingerprint"]:
        print(f"note: trained on {saved['data']['data']}, drawn with {cache.meta['data']}")
    plot_ages(cache.index, describe_data(cache.meta), out / f"data-ages.{args.format}")
    for view in VIEWS:
        config = ViewConfig(view=view)
        if view == trained["view"]:
            config = from_args(ViewConfig, trained)
        plot_views(cache, config, trained["seed"], row, out / f"views-{view}.{args.format}")


def plots(args):
    """Every figure of a run; of several runs those of training and attention, together."""
    folders, runs, watched = [Path(run) for run in args.runs], {}, {}
    names = [folder.resolve().name for folder in folders]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError(f"the same run twice: {' '.join(args.runs)}")
    for folder, name in zip(folders, names):
        saved, log = read_args(folder), read_log(folder)
        name = name if names.count(name) == 1 else str(folder)
        name += ", SYNTHETIC" * saved["data"]["synthetic"]
        runs[name] = saved, log
        if (folder / "model.pt").exists() and saved["config"]["arch"] == "dualview":
            watched[name] = folder
        else:
            print(f"note: no attention maps of {name}: it is no finished run of --arch dualview")
    out = Path(args.out or (folder / "figures" if len(folders) == 1 else "runs/plots"))
    if len(folders) == 1:
        plot_data(folder, saved, out, args)
    for kind in TRAINING:
        plot_training(kind, runs, out / f"training-{kind}.{args.format}")
    if watched:
        maps(watched, out, args)
    print(f"-> {out}")


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
            folder = Path(args.run)
            maps({folder.resolve().name: folder}, Path(args.out or folder / "figures"), args)
        else:
            plots(args)


if __name__ == "__main__":
    run_script(lambda: main(get_args()))
