"""Figures of attention, training, data and views (paper Figs. 2-5, 7-9 and 11-14).

In:  run folders of train.py, and the caches that they were trained on.
Out: in RUN/figures, of several runs in runs/plots: a PNG (or PDF) a figure and the numbers behind
     it next to it, as CSV or NPZ. attention-time-*.npz holds RUN/time-1, the map of a first layer:
     (N, N) float32, queries first, rows sum to 1; of the first view of a record, mean over heads.

    python attention.py maps runs/noncontig-s0 --superclass NORM
    python attention.py plots runs/demo-noncontig-s0
"""
import argparse
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy.ndimage import uniform_filter1d
from scipy.signal import butter, find_peaks, resample_poly, sosfiltfilt, welch
from scipy.stats import t as student
from tqdm import tqdm

from data import (CLASSES, LEADS, SECONDS, TEST_FOLD, VAL_FOLD, InputError, add_shared, fold_names,
                  from_args, normalize, read_labels, run_script, write_atomic)
from evaluate import COLORS, describe, describe_data, open_data, save_figure, untrained
from model import load_run, read_args, read_log, watch_attention
from train import batches, chance, pick_device
from views import VIEWS, ViewConfig

PEAK_S = 0.05  # a time token whose middle is within this of an R peak is on it
RECORDS = 64  # at most so many of a superclass
# Rows of a printed ECG: 2.5 s a lead, one after another, and a rhythm strip.
PRINTED = (("I", "aVR", "V1", "V4"), ("II", "aVL", "V2", "V5"), ("III", "aVF", "V3", "V6"), ("II",))
# Of each stream, what its queries and its keys are.
STREAMS = {"time": ("time", "time"), "channel": ("lead", "lead"),
           "time_to_channel": ("time", "lead"), "channel_to_time": ("lead", "time")}
STYLE = {"figure.constrained_layout.use": True, "figure.titlesize": 10, "axes.titlesize": 9,
         "lines.markersize": 3, "axes.prop_cycle": matplotlib.cycler(color=COLORS)}
ABOUT = ("Entropy of the queries' weights over ln(keys), mean over heads: 1 is uniform. On R peaks:"
         f" share of attention on keys within {1000 * PEAK_S:.0f} ms of an R peak; chance: share of"
         " such keys; ratio: of the two. Means over records; ±: half of a 95 % interval.")
# Figures of training (paper Figs. 7 to 9): columns of log.jsonl, a panel each.
TRAINING = {"loss": ("loss", "val_loss"),
            "gradients": ("grad_norm_time", "grad_norm_channel", "grad_norm_ratio",
                          "grad_norm_ratio_corrected"),
            "clustering": ("silhouette", "davies_bouldin", "calinski_harabasz")}


# What attention does

def attend(model, x):
    """How an encoder attends on one view (paper 5.2), in every layer of every stream.

    x: (1, T, C)  ->  {(stream, layer): (map (N, M), entropy)}: the weights, queries first, and the
    entropy of the queries' weights over ln(M), 1 if uniform; both are means over heads
    """
    maps, entropies, H = defaultdict(int), defaultdict(int), model.config.heads

    def watch(stream, layer, head, weights):
        w, M = weights[0], weights.shape[-1]
        # summed, not kept head by head: a map has up to 5000 x 5000 weights
        maps[stream, layer] += w
        entropies[stream, layer] += float(torch.special.entr(w).sum(-1).mean()) / math.log(M)

    watch_attention(model, x, watch)
    return {key: ((maps[key] / H).cpu().numpy(), entropies[key] / H) for key in maps}


def r_peaks(signal, rate):
    """Times of the R peaks of a record in s; empty where no QRS complexes stand out.

    Half of the leads must show a complex: a spike in one lead is none. A peak is where the root
    mean square over all leads is largest, so that it is no matter which way a lead deflects.
    signal: (T, C) int16 microvolt, 10 s
    """
    x = resample_poly(signal - np.median(signal, axis=0), 500 // rate, 1)  # (T, C) at 500 Hz
    # where complexes have power and P and T waves little; a complex lasts some 50 samples
    fast = sosfiltfilt(butter(2, (8, 25), "bandpass", fs=500, output="sos"), x, axis=0)
    power = uniform_filter1d(fast ** 2, 50, axis=0)
    # of a typical complex: 2 s hold at least one, down to 30 beats a minute
    typical = np.median(power.reshape(SECONDS // 2, -1, x.shape[1]).max(1), axis=0)  # (C,)
    used = typical > 20 ** 2  # microvolt²: a lead with less is not asked
    if not used.any():
        return np.array([])
    power = np.median(power[:, used] / typical[used], axis=1)  # (T,)
    # noise rises above the first limit too, but there is no quiet between its peaks
    lowest = max(0.16, 9 * np.quantile(power, 0.2))
    found, _ = find_peaks(power, lowest, distance=125)  # samples, a quarter of a second
    reach, size = round(500 * PEAK_S), (x ** 2).mean(1)
    return np.array([p - reach + size[p - reach:p + reach].argmax() for p in found
                     if reach <= p < len(x) - reach]) / 500


@dataclass
class Records:
    """Records whose attention is studied, as the encoder of one run sees them."""

    views: torch.Tensor  # (n, T, C), z-scored: the first view of each record
    samples: np.ndarray  # (T,) times of the view's samples in s
    tokens: np.ndarray  # (N,) middles of the time tokens in s
    peaks: list  # of each record the times of its R peaks in s
    leads: list  # names of the channel tokens


def study(model, records, device, means=None):
    """What an encoder's attention does in each record: a table with a row a record and map.

    means: a dict to which the mean maps over records, (N, M), are added by (stream, layer)
    """
    rows = []
    for x, peaks in zip(tqdm(records.views, "records", leave=False, disable=None), records.peaks):
        near = (np.abs(records.tokens[:, None] - peaks) < PEAK_S + 1e-6).any(1)  # (N,)
        for (stream, layer), (weights, entropy) in attend(model, x[None].to(device)).items():
            if means is not None:
                means[stream, layer] = means.get((stream, layer), 0) + weights / len(records.views)
            share, expected = np.nan, np.nan
            if STREAMS[stream][1] == "time" and near.any():
                share, expected = weights.mean(0)[near].sum(), near.mean()
            rows.append({"attention": stream, "layer": layer + 1, "keys": weights.shape[1],
                         "entropy": entropy, "on R peaks": share, "chance": expected,
                         "ratio": share / expected})
    return pd.DataFrame(rows)


# Attention maps of runs

def rows_apart(signals, gap):
    """Offsets (n,) that stack traces (T, n) from top to bottom without touching."""
    high, low = signals.max(0), signals.min(0)
    return -np.cumsum([0, *(high[1:] - low[:-1] + gap)])


def plot_ecg(signal, rate, title, path):
    """A record as a clinician reads it: 12 leads, 25 mm/s and 10 mm/mV when printed at 100 %.

    Fig. 11 of the paper. signal: (T, C) int16 microvolt, 10 s
    """
    mv, peaks = (signal - np.median(signal, axis=0)) / 1000, r_peaks(signal, rate)
    rows = [np.concatenate([part[:, LEADS.index(lead)] for part, lead in zip(
        np.split(mv, len(leads)), leads)]) for leads in PRINTED]  # 4 of (T,)
    offsets = rows_apart(np.stack(rows, 1).clip(-4, 4), 0.6)
    high = rows[0].max() + 1.2
    low = max(offsets[-1] + rows[-1].min() - 1, high - 29.7)  # no higher than a page of A4
    mm = 1 / 25.4  # inch
    figure = Figure((SECONDS * 25 * mm, (high - low) * 10 * mm), layout="none")
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, SECONDS), ylim=(low, high))
    for leads, offset, row in zip(PRINTED, offsets, rows):
        axis.plot(np.arange(len(mv)) / rate, offset + row, color="black", linewidth=0.7)
        for lead, start in zip(leads, range(0, len(row), len(row) // len(leads))):
            above = row[start:start + rate // 2].max()
            axis.text(start / rate + 0.06, offset + above + 0.1, lead, weight="bold")
    axis.plot(peaks, np.full(len(peaks), low + 0.7), "^", color="#D55E00")
    for ticks, step, colour in (("minor", 1, "#F8DDDD"), ("major", 5, "#E9A8A8")):  # mm
        axis.set_xticks(np.arange(0, SECONDS, step / 25), minor=ticks == "minor")
        axis.set_yticks(np.arange(math.ceil(2 * low) / 2, high, step / 10), minor=ticks == "minor")
        axis.grid(which=ticks, color=colour, linewidth=0.4)
    axis.text(0.06, high - 0.5, title, fontsize=10)
    axis.text(0.06, low + 0.2, "25 mm/s and 10 mm/mV when printed at 100 %; triangles: R peaks")
    save_figure(figure, path, dict(millivolt=mv, leads=LEADS, r_peaks=peaks))


def draw_map(axis, values, stream, layer, records, limit):
    """A map in colours up to `limit`; above time keys, lead II of a single record.

    values: (N, M), queries first  ->  the image
    """
    kinds, half = STREAMS[stream], (records.tokens[1] - records.tokens[0]) / 2
    ends = dict(time=(records.tokens[0] - half, records.tokens[-1] + half),
                lead=(-0.5, len(LEADS) - 0.5))
    image = axis.imshow(values, aspect="auto", interpolation="nearest", cmap="PuOr_r",
                        vmin=-limit, vmax=limit, extent=(*ends[kinds[1]], *ends[kinds[0]][::-1]))
    for along, role, kind in zip((axis.yaxis, axis.xaxis), ("query", "key"), kinds):
        along.set_label_text(f"{role}: time (s)")
        if kind == "lead":
            along.set_label_text(f"{role}: channel token")
            along.set_ticks(range(len(LEADS)), records.leads, fontsize=7)
    if kinds[1] == "time" and len(records.views) == 1:
        axis = axis.inset_axes((0, 1.02, 1, 0.16), xticks=[], yticks=[], xlim=ends["time"])
        lead = records.views[0, :, LEADS.index("II")]
        axis.plot(records.samples, lead, color="black", linewidth=0.6)
        axis.plot(records.peaks[0], np.full(len(records.peaks[0]), lead.max()), "v",
                  color="#D55E00")
        axis.set_ylabel("II", rotation=0, fontsize=7)
    axis.set_title(f"{stream.replace('_', ' ')}, layer {layer + 1}")
    return image


def plot_maps(found, streams, title, path):
    """Maps of some streams, a row a run and a column a layer: Figs. 12 to 14 of the paper.

    found: {run: (Records, {(stream, layer): map (N, M)})}
    """
    shown = {run: {key: np.log2((w * w.shape[1]).clip(1 / 16, 16)) for key, w in maps.items()
                   if key[0] in streams} for run, (_, maps) in found.items()}
    columns = max(map(len, shown.values()))
    figure, numbers = Figure((3.7 * columns + 1, 3.4 * len(found) + 0.6)), {}
    axes = figure.subplots(len(found), columns, squeeze=False)
    limit = max(np.quantile(np.abs(values), 0.995) for run in shown.values()
                for values in run.values())
    for row, (run, (records, maps)) in zip(axes, found.items()):
        for axis, ((stream, layer), values) in zip(row, shown[run].items()):
            image = draw_map(axis, values, stream, layer, records, limit)
            numbers[f"{run}/{stream}-{layer + 1}"] = maps[stream, layer]
        row[0].set_ylabel(f"{run}\n{row[0].get_ylabel()}")
        numbers |= {f"{run}/seconds": records.tokens, f"{run}/channel_tokens": records.leads}
    figure.colorbar(image, ax=axes, aspect=40, extend="both", label="log2(attention / uniform)")
    figure.suptitle(title)
    save_figure(figure, path, numbers)


def choose(cache, args):
    """Rows of the records to show, and what to call them: one, or several of a superclass.

    By default the first of the test fold that is NORM alone, as in the paper; of a superclass, one
    record a patient. Raises InputError for an ecg_id or a superclass that is not there.
    """
    index, labels = cache.index, read_labels(cache)
    y = pd.DataFrame(labels.y == 1, columns=labels.classes)
    if args.superclass:
        found = index[y[args.superclass] & index.strat_fold.isin((VAL_FOLD, TEST_FOLD))]
        found = found.sample(frac=1, random_state=0).drop_duplicates("patient_id")[:RECORDS]
        subject = (f"{len(found)} records of {fold_names((VAL_FOLD, TEST_FOLD))} with "
                   f"{args.superclass}, one a patient")
        if len(found) < 2:
            raise InputError(f"{cache.folder} has {subject}; an interval needs 2")
        return np.sort(found.index), f"mean over {subject}"
    normal = y.NORM & (y.sum(axis=1) == 1)
    row = np.argmax(2 * normal + (index.strat_fold == TEST_FOLD))
    if args.ecg_id is not None:
        row = np.argmax(index.ecg_id == args.ecg_id)
        if index.ecg_id[row] != args.ecg_id:
            raise InputError(f"--ecg-id {args.ecg_id} is not in {cache.folder}: give another, "
                             f"such as {index.ecg_id[0]}")
    names = ", ".join(y.columns[y.loc[row]]) or "no superclass"
    fold = fold_names(index.strat_fold[row])
    return np.array([row]), f"ecg_id {index.ecg_id[row]} ({names}), {fold}"


def maps(folders, out, args):
    """Attention of runs {name: folder}: maps, the record that they are of, and one table."""
    device, found, tables, about = pick_device(args.device), {}, {}, []
    for name, folder in folders.items():
        model, saved = load_run(folder, device)
        trained, cache = open_data(folder, saved, args.cache)
        (rows, subject), rate, means = choose(cache, args), cache.meta["rate"], {}
        signals, split = cache.signals[rows], from_args(ViewConfig, trained).split
        samples = split(torch.arange(signals.shape[1])[None, :, None] / rate)[0][0, :, 0].numpy()
        stride, leads = saved["config"]["time_stride"], LEADS
        if saved["config"]["mix_leads"]:  # a channel token is no longer a lead
            leads = range(1, len(LEADS) + 1)
        records = Records(
            views=split(normalize(torch.from_numpy(signals)))[0], samples=samples, leads=leads,
            tokens=samples[:len(samples) // stride * stride].reshape(-1, stride).mean(1),
            peaks=[r_peaks(signal, rate) for signal in signals])
        fresh = study(untrained(saved["config"], trained["seed"], device), records, device)
        tables[name] = study(model, records, device, means).join(
            fresh[["entropy", "ratio"]].add_suffix(", untrained"))
        found[name] = records, means
        about += [subject, f"{name}: {describe(saved, cache.meta)}"]
    title, what = "\n".join(dict.fromkeys(about)), args.superclass
    if what is None:
        what = f"ecg{cache.index.ecg_id[rows[0]]}"
        plot_ecg(signals[0], rate, f"{describe_data(cache.meta)}: {subject}",
                 out / f"attention-record-{what}.{args.format}")
    for figure, streams in (("time", ["time"]), ("channel", ["channel"]),
                            ("cross", ["time_to_channel", "channel_to_time"])):
        plot_maps(found, streams, title, out / f"attention-{figure}-{what}.{args.format}")
    groups = pd.concat(tables, names=["run"]).groupby(["run", "attention", "layer", "keys"],
                                                      sort=False)
    # half of Student's 95 % interval over records, NaN for one
    mean, half = groups.mean(), groups.sem() * student.ppf(0.975, groups.count() - 1)
    cells = mean.map("{:.3f}".format).replace("nan", "-") + half.map(
        " ± {:.3f}".format).replace(" ± nan", "")
    write_atomic(out / f"attention-{what}.csv", lambda tmp: mean.join(
        half.add_suffix(", half")).to_csv(tmp, float_format="%.6g"))
    print(f"{title}\n\n{ABOUT}\n\n{cells.to_string()}\n\n-> {out}/attention-*{what}*")


# Training, data and views

def plot_training(kind, runs, path):
    """A figure of TRAINING, a panel a column and a line a run; runs: {name: (args.json, log)}."""
    columns = [column for column in TRAINING[kind]  # conv has no norms as the paper takes them
               if any(column in log and log[column].notna().any() for _, log in runs.values())]
    if not columns:
        return  # a ResNet-18 has no streams
    figure = Figure((3.6 * len(columns), 3.8))
    axes = figure.subplots(1, len(columns), sharey=kind == "loss", squeeze=False)[0]
    for i, (axis, column) in enumerate(zip(axes, columns)):
        axis.set(title=column, xlabel="epoch", yscale="log" if kind == "gradients" else "linear")
        for color, (name, (saved, log)) in enumerate(runs.items()):
            if column in log:
                axis.plot(log.index, log[column].astype(float), "o-", color=f"C{color}",
                          label=f"{name}: {describe_data(saved['data'])}")
            if kind == "loss":
                level = chance(saved["args"], saved["in_effect"])[i]
                axis.axhline(level, linestyle=":", color=f"C{color}")
                axis.set_title(f"{column} (dots: at chance)")
        axis.set_xlim(0, None)
    figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    logs = {name: log for name, (_, log) in runs.items()}
    save_figure(figure, path, pd.concat(logs, names=["run"]).reset_index())


def plot_ages(index, about, path):
    """Ages in bins of five years, those above 89 apart: Fig. 2 of the paper.

    index: a table with age, as in PTB-XL, where 300 means above 89
    """
    counts = (index.age.clip(upper=90) // 5 * 5).value_counts().sort_index()
    figure = Figure((8, 4))
    axis = figure.subplots()
    axis.bar_label(axis.bar(counts.index, counts, width=4.6, align="edge"), fontsize=7)
    axis.set(xlabel="age (years), in bins of 5; from 90: all above 89, which PTB-XL hides",
             ylabel="records", xticks=range(0, 91, 10))
    axis.set_title(f"{about}: {len(index)} records, {index.age.isna().sum()} of unknown age")
    save_figure(figure, path, counts.rename_axis("age_from").reset_index(name="records"))


def plot_views(cache, config, seed, row, path):
    """A record raw, normalised, and its two views as a first step of training would see them.

    Below, the spectra of lead II: the paper checks by an FFT that its views are true to the record
    (4.2.1). Figs. 3 (stochastic), 4 (contig) and 5 (noncontig) of the paper.
    """
    rate, color, signal = cache.meta["rate"], VIEWS[config.view].color, cache.signals[row]
    raw = (signal - np.median(signal, axis=0)) / 1000
    x = normalize(torch.from_numpy(signal.copy())).numpy()
    (batch,) = batches(cache, config, seed, [(0, np.array([row]))], torch.device("cpu"))
    views, unmasked = batch.views[:, 0].numpy(), np.ones(len(LEADS), bool)  # (2, T', C)
    keep = [unmasked, unmasked] if batch.keep is None else batch.keep[:, 0].numpy()
    times = torch.arange(len(x))[None, :, None] / rate
    cuts = [part[0, :views.shape[1], 0].numpy() for part in config.split(times)]
    if config.disturb or config.equal or config.shift:  # views start anywhere
        cuts = [part - part[0] for part in cuts]
    times, offsets = times[0, :, 0].numpy(), rows_apart(x, 0.5)
    panels = {"raw, bar: 1 mV": (times, raw, unmasked, rows_apart(raw, 0.2), "black", "-"),
              "normalised": (times, x, unmasked, offsets, "black", "-"),
              "view 1": (cuts[0], views[0], keep[0], offsets, color, "-"),
              "view 2": (cuts[-1], views[1], keep[1], offsets, color, "--")}
    figure = Figure((11, 8.5))
    axes = figure.subplot_mosaic([[*panels], ["spectra"] * 4], height_ratios=(3, 1))
    axes["raw, bar: 1 mV"].plot([0, 0], [-1, 0], color="tab:red", linewidth=3)
    for name, (seconds, part, kept, at, ink, style) in panels.items():
        axes[name].plot(seconds, part * kept + at, linewidth=0.6, color=ink)  # masked: flat
        axes[name].set_yticks(at, LEADS, fontsize=7)
        axes[name].set(title=f"{name}: {kept.sum()} of {len(LEADS)} leads", xlabel="time (s)")
        if part is not raw:  # which has another unit
            of, lead = 1 / (seconds[1] - seconds[0]), part[:, LEADS.index("II")]
            hz, power = welch(lead, of, nperseg=min(round(2.5 * of), len(lead)))
            axes["spectra"].semilogy(hz[1:], power[1:], style, color=ink, label=name)
    axes["spectra"].set(xlabel="frequency (Hz)", xlim=(0, rate / 2))
    axes["spectra"].set_ylabel("lead II, unmasked:\npower (deviations² / Hz)", fontsize=8)
    axes["spectra"].legend(ncols=3)
    figure.suptitle(f"{config.describe()}\n{describe_data(cache.meta)}: ecg_id "
                    f"{cache.index.ecg_id[row]}, {rate} Hz")
    save_figure(figure, path, dict(millivolt=raw, normalized=x, views=views, keep=keep))


def get_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("command", choices=("maps", "plots"), help="maps: attention alone; plots: "
                        "training, too, and of a single run its data and views")
    parser.add_argument("runs", nargs="+", help="run folders; several: side by side")
    g = parser.add_mutually_exclusive_group()
    g.add_argument("--ecg-id", type=int,
                   help=f"by default the first of {fold_names(TEST_FOLD)} that is NORM alone")
    g.add_argument("--superclass", choices=CLASSES,
                   help=f"the mean over records of {fold_names((VAL_FOLD, TEST_FOLD))} with it")
    parser.add_argument("--out", help="by default the run's figures/, runs/plots for several")
    add_shared(parser, "cache", "device", "format")
    return parser.parse_args(argv)


def plots(folders, out, args):
    """The curves of training of runs {name: folder}; of a single run its data and views, too."""
    runs = {name: (read_args(folder), read_log(folder)) for name, folder in folders.items()}
    for kind in TRAINING:
        plot_training(kind, runs, out / f"training-{kind}.{args.format}")
    if len(runs) == 1:
        ((name, (saved, _)),) = runs.items()
        trained, cache = open_data(folders[name], saved, args.cache)
        config, (rows, _) = from_args(ViewConfig, trained), choose(cache, args)
        plot_ages(cache.index, describe_data(cache.meta), out / f"data-ages.{args.format}")
        plot_views(cache, config, trained["seed"], rows[0],
                   out / f"views-{config.view}.{args.format}")


def main(args):
    folders = {Path(run).resolve().name: Path(run) for run in args.runs}
    if len(folders) < len(args.runs):
        raise InputError(f"two runs of one name: {' '.join(args.runs)}; rename one")
    default = Path(args.runs[0]) / "figures" if len(folders) == 1 else "runs/plots"
    out = Path(args.out or default)
    with matplotlib.rc_context(STYLE):
        if args.command == "plots":
            plots(folders, out, args)
            for name, folder in list(folders.items()):
                arch = read_args(folder)["config"]["arch"]
                if arch != "dualview" or not (folder / "model.pt").exists():
                    print(f"note: no attention maps of {name}: it is no finished run of dualview")
                    del folders[name]
        if folders:
            maps(folders, out, args)


if __name__ == "__main__":
    run_script(lambda: main(get_args()))
