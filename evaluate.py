"""What a pretrained encoder is worth on a label set, beside baselines (paper 5.1, 5.3)."""
import argparse
import json
import math
import re
from itertools import permutations
from pathlib import Path
from typing import NamedTuple, Optional
from urllib.parse import quote

import numpy as np
import pandas as pd
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from tqdm import tqdm

from data import (CLASSES, LEADS, TEST_FOLD, TRAIN_FOLDS, VAL_FOLD, InputError, add_shared, bounded,
                  fold_names, list_recordings, normalize, prepare, read_recording, reading,
                  run_script, save_arrays, source_names, write_atomic, write_json, write_text)
from model import C, load_encoder, read_args
from train import NOT_A_RESULT, pick_device
from views import VIEWS

KEY_COLUMNS = ["protocol", "row", "labels", "leads"]  # of metrics.csv, as in a Key
PAPER = "the paper"
BASELINES = {"untrained": "the untrained encoder", "rocket": "ROCKET"}
GAINS = {"above": "yes", "below": "no, it does harm",
         "not told apart from": "these records do not tell"}
MANY = 8  # classes; of more the tables show the means alone
DIGITS = dict(calinski_harabasz=".1f", rankme=".1f", records=".0f", records_per_second=".0f",
              peak_mib=".0f", strength=".2g")
REPRESENTATION = dict(silhouette="silhouette", davies_bouldin="Davies-Bouldin (low)",
                      calinski_harabasz="Calinski-Harabasz", shift="shift (low)", rankme="RankMe")
SCORED = {"official": fold_names(TEST_FOLD), "cv": "each by a probe of other folds",
          "table3": f"{fold_names([VAL_FOLD, TEST_FOLD])}, one class"}
INTERVALS = ("Intervals hold 95 %, over patients; where that of a difference holds 0, these "
             "records do not tell.")
OVER_SEEDS = ("Means over seeds, with intervals over these too, or the standard deviation. No "
              "correction for the number of comparisons; the highest is chosen on these scores.")
ABOUT = {
    "official": f"**Official protocol.** Several labels at once; {fold_names(TRAIN_FOLDS)} train, "
                f"{fold_names(VAL_FOLD)} chooses C and thresholds, {fold_names(TEST_FOLD)} tests. "
                "Accuracy: all classes right.",
    "cv": "**Cross-validated.** The same, but each labelled record is scored once, by a probe that "
          "learned from other folds.",
    "table3": "**Table 3 of the paper.** One superclass, each view of a record a sample, "
              f"{fold_names([VAL_FOLD, TEST_FOLD])} test. The paper: its own, on all of PTB-XL.",
    "fewer": "**Fewer labels, fewer leads.** Macro AUROC. Labels: so many records in all, of each "
             "class (10shot), or a share; means over draws. Leads: the others are zero; the probes "
             "also learned from masked records.",
    "representation": "**Representation**, and Table 2 of the paper. Records of "
                      f"{fold_names([VAL_FOLD, TEST_FOLD])} with one class. Shift: distance to "
                      "itself half a second later over that between records; low is good, as for "
                      "Davies-Bouldin.",
    "streams": "**The two streams.** Macro AUROC of the official probe, "
               f"{fold_names([VAL_FOLD, TEST_FOLD])}, while one stream sees another record, or "
               "zeros."}
# Okabe and Ito's colours, safe for the colour-blind.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
ROW_COLORS = dict(zip(("pretrained", "finetuned", "resnet18", "resnet18-supervised", "supervised",
                       "untrained", "rocket", "majority"), COLORS))


def group_name(folder):
    """The name that the runs of all seeds share: of the folder, without -s0, -s1, ..."""
    return re.sub(r"-s\d+$", "", Path(folder).name)


def results_folder(folder, labels="superclass", data=None):
    """Where the results of a run go: one folder for each label set, and for each other data.

    labels: the name of the label set; data: the folder of a cache that the run was not trained on
    """
    folder = Path(folder)
    if data is not None:
        folder = folder / f"on-{Path(data).name}"
    if labels != "superclass":
        folder = folder / f"labels-{quote(labels.replace(' ', ','), safe='=+,')}"
    return folder


# ---- report ----

# Tables in Markdown

def look_up(table, **facts):
    """The line of a table of metrics that these facts name, as a Series; None if there is none.

    By default the macro AUROC of the pretrained encoder's probe with all labels and leads.
    """
    facts = dict(row="pretrained", minus="", labels="100%", leads="all",
                 metric="macro_auroc") | facts
    chosen = np.logical_and.reduce([table[name] == value for name, value in facts.items()])
    return table[chosen].iloc[0] if chosen.any() else None


def cell(line):
    """A line of metrics as 0.781 [0.712, 0.840]; with a sign if a difference, a dash if unknown.

    Without an interval 0.781 ± 0.020, the standard deviation over runs, if it has one.
    """
    if line is None or not math.isfinite(line.value):
        return "-"
    form = DIGITS.get(line.metric, ".3f")
    text = f"{line.value:+{form}}" if line.minus else f"{line.value:{form}}"
    if math.isfinite(line.low):
        return f"{text} [{line.low:{form}}, {line.high:{form}}]"
    if getattr(line, "sd", 0) > 0:
        return f"{text} ± {line.sd:{form}}"
    return text


def markdown(head, rows):
    """A Markdown table, columns aligned so that it reads as plain text too."""
    cells = [[str(c) for c in row] for row in (head, *rows)]
    width = [max(map(len, column)) for column in zip(*cells)]
    text = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, width)) + " |" for row in cells]
    return "\n".join([text[0], "|" + "|".join("-" * (w + 2) for w in width) + "|", *text[1:]])


def pivot(table, index, columns):
    """Lines of metrics as a Markdown table: a row for each value of `index`, a list of columns.

    columns: {metric: its heading}; those that no line has are left out
    """
    table = table[table.metric.isin(columns)]
    table = table.assign(cell=[cell(line) for line in table.itertuples()],
                         row=[ROWS.get(row, row) for row in table.row])
    wide = table.pivot_table("cell", index, "metric", "first", sort=False).fillna("-")
    there = [metric for metric in columns if metric in wide]
    return markdown([*index, *(columns[metric] for metric in there)],
                    wide[there].reset_index().to_numpy())


def score_table(table, protocol, classes, index):
    """The table of a protocol's scores from all labels and leads, as Markdown.

    Beside each row how far the pretrained encoder is above it; of few classes their F1, as in the
    paper's Table 3, or their AUROC.
    """
    part = table[(table.protocol == protocol) & (table.labels == "100%") & (table.leads == "all")]
    compared = part[part.minus.isin(ROWS) & (part.minus != "pretrained")
                    & (part.metric == "macro_auroc")]
    compared = compared.assign(row=compared.minus, metric="difference")
    columns = dict(macro_auroc="macro AUROC", difference="pretrained minus it",
                   macro_f1="macro F1", accuracy="accuracy")
    if len(classes) <= MANY:
        kind = "f1" if protocol == "table3" else "auroc"
        columns |= {f"{kind}/{name}": f"{kind.upper()} {name}" for name in classes}
    return pivot(pd.concat([part[part.minus == ""], compared]), index, columns)


def fewer_table(table, protocol, index):
    """The table of macro AUROC with fewer labels and with fewer leads, as Markdown."""
    part = table[(table.protocol == protocol) & (table.metric == "macro_auroc")
                 & (table.minus == "") & (table.row != "majority")]
    few_labels = part[(part.labels != "100%") & (part.leads == "all")]
    few_leads = part[(part.labels == "100%") & (part.leads != "all")]
    columns = {budget: f"{budget} labels" for budget in few_labels.labels.unique()}
    columns |= {f"{n} leads": name_leads(n) for n in LEAD_SETS}
    lines = pd.concat([few_labels.assign(metric=few_labels.labels),
                       few_leads.assign(metric=few_leads.leads + " leads")])
    return pivot(lines, index, columns)


def name_leads(n):
    """How texts name one of LEAD_SETS: "leads I, II, V2", "lead II", "12 leads"."""
    if n > 3:
        return f"{n} leads"
    return f"{'lead' if n == 1 else 'leads'} {', '.join(LEAD_SETS[n])}"


def paper_lines(view, group):
    """What the paper reports of a view, on all of PTB-XL, as lines of metrics (Tables 2 and 3)."""
    table2 = dict(zip(CLUSTERING, VIEWS[view].table2 or ()))
    names = [f"f1/{name}" for name in CLASSES]
    table3 = dict(zip([*names, "accuracy", "macro_f1"], VIEWS[view].table3 or ()))
    found = lines(Key("clustering", PAPER), table2) + lines(Key("table3", PAPER), table3)
    return pd.DataFrame(found).assign(group=group)


def make_tables(table, about, index):
    """Every table, below what it means: a list of Markdown texts. index: see pivot()."""
    protocols = [name for name in ABOUT if name in about["tested"]]
    tables = {name: score_table(table, name, about["classes"], index) for name in protocols}
    tables["fewer"] = fewer_table(table, headline(table), index)
    tables["representation"] = pivot(
        table[table.protocol.isin(("clustering", "quality"))], index, REPRESENTATION)
    streams = table[(table.protocol == "streams") & (table.metric == "macro_auroc")
                    & (table.minus == "")]
    if len(streams):
        names = BOTH_STREAMS, *ONE_STREAM
        tables["streams"] = pivot(streams.assign(metric=streams.row), ["group"],
                                  dict(zip(names, names)))
    return [f"{ABOUT[name]}\n\n{text}" for name, text in tables.items()]


# The answer

def headline(table):
    """The protocol that the answer rests on: the one that tests most records."""
    return "cv" if "cv" in set(table.protocol) else "official"


def verdict(line):
    """What the interval of a difference says."""
    if line.low > 0:
        return "above"
    if line.high < 0:
        return "below"
    return "not told apart from"


def standing(table, names, **facts):
    """A score and how it stands to others: "0.781 [...], above ROCKET (+0.012 [0.003, 0.020])".

    names: {row: what it is called}; rows that it was not compared with are left out
    """
    known = []
    for row, name in names.items():
        line = look_up(table, minus=row, **facts)
        if line is not None:
            known.append(f"{verdict(line)} {name} ({cell(line)})")
    return f"{cell(look_up(table, **facts))}, {' and '.join(known)}"


def answer(table, abouts, base=None):
    """What the numbers of groups of runs say, in a few sentences: a list.

    abouts: {group: what about.json says of its runs}; base: a group to compare the others with, by
    default the highest.
    """
    protocol = headline(table)
    scores = {group: look_up(table, group=group, protocol=protocol).value for group in abouts}
    best = max(scores, key=scores.get)
    tested = {name: f"{n} records, {SCORED[name]}" for name, n in abouts[best]["tested"].items()}
    sentences = [f"Does pretraining help? By macro AUROC of linear probes, {tested[protocol]}:"]
    for group in abouts:
        facts = dict(group=group, protocol=protocol)
        gain = GAINS[verdict(look_up(table, minus="untrained", **facts))]
        sentences.append(f"- {group}: {gain}. {standing(table, BASELINES, **facts)}.")
    if len(abouts) > 1:
        base = best if base is None else base
        lines = {group: look_up(table, group=group, protocol=protocol, minus="pretrained",
                                minus_group=base) for group in abouts if group != base}
        others = [f"{group} is {verdict(line)} it ({cell(line)})" for group, line in lines.items()
                  if line is not None]
        sentences.append(f"The highest is {best}. Against {base}: {', '.join(others)}.")
    facts = dict(group=best, protocol="official")
    if protocol != "official":
        sentences.append(f"On {tested['official']}: {standing(table, BASELINES, **facts)}.")
    networks = {row: ROWS[row] for row in ROWS if row in SLOW
                and look_up(table, minus=row, **facts) is not None}
    if networks:
        sentences.append(f"Against other networks, on {tested['official']}: "
                         f"{standing(table, networks, **facts)}.")
    facts["protocol"], leads = protocol, min(LEAD_SETS)
    few = table[(table.metric == "records") & (table.protocol == protocol)
                & (table.row == "pretrained") & (table.labels != "100%")]
    if len(few):
        budget = few.labels[few.value.idxmin()]
        text = standing(table, BASELINES, labels=budget, **facts)
        sentences.append(f"With few labels ({budget}) {best} reaches {text}.")
    text = standing(table, BASELINES, leads=str(leads), **facts)
    sentences.append(f"From {name_leads(leads)} alone {best} reaches {text}.")
    if any(about["data"]["synthetic"] for about in abouts.values()):
        sentences.append("The data are SYNTHETIC: this says nothing of patients.")
    return sentences


def describe_data(meta):
    """The data of a cache in a few words, for titles."""
    return f"{'SYNTHETIC data ' if meta['synthetic'] else ''}{source_names(meta)}"


def describe(saved, meta):
    """A run and its data in one line, for titles; meta: of the cache."""
    left_out = len(meta["left_out"])
    records = f"{meta['records']} records" + (f", {left_out} left out," if left_out else "")
    return (f"View {saved['args']['view']}, seed {saved['args']['seed']}, "
            f"{saved['config']['arch']}; {describe_data(meta)}, {records} at {meta['rate']} Hz")


# A report of a run

def evaluate(args):
    """Evaluate one run: metrics.csv, report.md, figures/ and eval/ in its results_folder()."""
    run = open_run(args)
    meta, arch = run.cache.meta, run.saved["config"]["arch"]
    title = f"{describe(run.saved, meta)}; labels: {run.labels.name}"
    print(f"{run.folder}: {title}", flush=True)
    rows = [row for row in ROWS if not (args.fast and row in SLOW)
            and not (arch == "resnet18" and row.startswith("resnet18"))]
    table = measure(run, rows)
    about = dict(
        format=FORMAT, settings=vars(args), view=run.trained["view"], seed=run.trained["seed"],
        labels=run.labels.name, classes=list(run.labels.classes),
        tested={name: len(task.tested) for name, task in run.protocols.items()},
        data={key: meta[key] for key in ("data", "rate", "records", "synthetic", "fingerprint")})

    shown, notes = table, []
    if run.labels.name == "superclass":
        shown = pd.concat([table, paper_lines(about["view"], run.group)])
    if rare := note_rare(run.protocols, run.labels.classes):
        notes.append(rare)
    if meta["left_out"]:
        notes.append(f"Left out of the data: {len(meta['left_out'])} records, such as "
                     f"{meta['left_out'][0]}.")
    if meta["fingerprint"] != run.saved["data"]["fingerprint"]:
        notes.append(f"Pretrained on other data: {run.saved['data']['data']}.")
    training = [f"{line.metric} {cell(line)}" for line in table.itertuples()
                if line.protocol == "training"]
    notes.append(f"Training, last epoch and median speed: {', '.join(training)}.")
    figures = " ".join(f"![{path.stem}](figures/{path.name})" for path in draw(run, table, title))
    sentences = answer(table, {run.group: about})
    text = [f"# {run.out}\n{title}", "\n".join(sentences), "\n".join([INTERVALS, *notes]),
            *make_tables(shown, about, ["row"]), figures]

    write_json(run.out / "eval" / "about.json", about)
    write_atomic(run.out / "metrics.csv", lambda tmp: table.to_csv(tmp, index=False))
    write_text(run.out / "report.md", "\n\n".join(text) + "\n")
    print("\n".join(sentences))
    print(f"-> {run.out}: report.md (the tables), metrics.csv (every number), figures/")


# Figures

def class_colors(classes):
    """A colour for each class: Okabe and Ito's, safe for the colour-blind, as far as they go."""
    colors = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
    more = len(classes) - len(colors)
    colors += [colormaps["turbo"](i / more) for i in range(more)]
    return dict(zip(classes, colors))


def save_figure(figure, path, numbers):
    """Write a figure and, next to it, its numbers: rows as CSV, a dict of arrays as NPZ."""
    write_atomic(path, lambda tmp: figure.savefig(tmp, format=path.suffix[1:], dpi=150))
    if isinstance(numbers, dict):
        save_arrays(path.with_suffix(".npz"), numbers)
    else:
        write_atomic(path.with_suffix(".csv"), lambda tmp: pd.DataFrame(numbers).to_csv(
            tmp, index=False, float_format="%.6g"))


def plot_tsne(points, labels, classes, title, path):
    """t-SNE of representations side by side, one colour a class: Fig. 10 of the paper.

    points: {panel: table of n rows with ecg_id, x, y}; labels: (n,) numbers of classes
    """
    figure = Figure((4.2 * len(points) + 1.6, 4.4), layout="constrained")
    axes = figure.subplots(1, len(points), squeeze=False)[0]
    colors = class_colors(classes)
    for axis, (panel, table) in zip(axes, points.items()):
        for k in np.unique(labels):
            x, y = table.x[labels == k], table.y[labels == k]
            axis.scatter(x, y, s=14, color=colors[classes[k]], label=f"{classes[k]} ({len(x)})")
        axis.set(title=panel, xlabel="t-SNE 1", ylabel="t-SNE 2", xticks=[], yticks=[])
    axes[-1].legend(fontsize=7, ncols=math.ceil(len(classes) / 20), loc="center left",
                    bbox_to_anchor=(1, 0.5))
    figure.suptitle(title, fontsize=9)
    save_figure(figure, path, pd.concat([
        table.assign(panel=panel, label=np.array(classes)[labels])
        for panel, table in points.items()]))


def plot_fewer(table, title, path):
    """Macro AUROC of each row with fewer labels, and with fewer leads, with 95 % intervals."""
    protocol = headline(table)
    part = table[(table.protocol == protocol) & (table.minus == "") & (table.row != "majority")]
    sizes = part[(part.metric == "records") & (part.row == "pretrained")].set_index("labels").value
    sizes = sizes.sort_values()
    part = part[part.metric == "macro_auroc"]
    panels = [("labels", part[part.leads == "all"], list(sizes.index),
               [f"{budget}\n({n:.0f})" for budget, n in sizes.items()], "labels (records)"),
              ("leads", part[(part.leads != "all") & (part.labels == "100%")],
               [str(n) for n in sorted(LEAD_SETS)], None, "leads at test")]
    figure = Figure((11, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (column, found, values, names, xlabel) in zip(axes, panels):
        for i, (row, points) in enumerate(found.groupby("row", sort=False)):
            points = points.set_index(column).reindex(values)
            bars = [(points.value - points.low).clip(0), (points.high - points.value).clip(0)]
            axis.errorbar(np.arange(len(values)) + 0.05 * i, points.value, bars, marker="o",
                          capsize=2, markersize=4, color=ROW_COLORS[row], label=ROWS[row],
                          linestyle="--" if row in NETWORKS else "-")
        axis.set_xticks(range(len(values)), names or values)
        axis.set(xlabel=xlabel, ylabel="macro AUROC")
    handles, words = axes[0].get_legend_handles_labels()
    figure.legend(handles, words, fontsize=8, loc="outside right center")
    figure.suptitle(title, fontsize=9)
    save_figure(figure, path, part[["row", "labels", "leads", "value", "low", "high"]])


def draw(run, table, title):
    """The figures of a run, in its folder figures/; returns their paths."""
    rows, everything = run.single, np.arange(len(run.cache.index))
    paths = [run.out / "figures" / f"{name}.{run.settings.format}" for name in ("fewer", "tsne")]
    plot_fewer(table, f"Fewer labels, fewer leads: {SCORED[headline(table)]}. {title}", paths[0])
    if len(rows) < 4:
        return paths[:1]  # too few records with one class alone for a map of them
    points = {}
    for row in ("untrained", "pretrained"):
        z = run.represent(row, everything).mean(1)[rows]
        tsne = TSNE(perplexity=min(30, (len(z) - 1) / 3), random_state=0)
        points[row] = pd.DataFrame(tsne.fit_transform(z), columns=["x", "y"])
        points[row].insert(0, "ecg_id", run.cache.index.ecg_id.to_numpy()[rows])
    plot_tsne(points, run.labels.y[rows].argmax(1), run.labels.classes,
              f"t-SNE, {fold_names([VAL_FOLD, TEST_FOLD])}, one class. {title}", paths[1])
    return paths


# Several runs

class Evaluated(NamedTuple):
    """What evaluate() left of a run; settings: those that runs of a group share."""

    folder: Path
    about: dict
    settings: dict
    metrics: pd.DataFrame
    scores: dict


class Sample(NamedTuple):
    """A number of each of a group's S runs (S,); its bootstrap draws (S, n), or None."""

    values: np.ndarray
    draws: Optional[np.ndarray] = None


def read_evaluated(folder, labels):
    """The Evaluated of a run folder under a label set; None, with a note, if there is none.

    Raises InputError, which names the file, when something is damaged.
    """
    results, again = results_folder(folder, labels), f"make eval RUN={folder}"
    if not (results / "metrics.csv").exists():
        print(f"note: {folder} is left out: not evaluated for the labels {labels}; {again}")
        return None
    saved = read_args(folder)
    with reading(results / "eval" / "about.json", f"evaluate it again: {again}"):
        about = json.loads((results / "eval" / "about.json").read_text(encoding="utf-8"))
        settings = {key: value for key, value in saved["args"].items()
                    if key not in NOT_A_RESULT | {"seed"}}
        settings |= dict(strengths=saved["strengths"], classes=about["classes"],
                         label_lr=about["settings"]["label_lr"],
                         data=about["data"]["fingerprint"][:6])
    if about["format"] != FORMAT:
        print(f"note: {folder} is left out: evaluated by other code; {again}")
        return None
    scores = read_scores(results / "eval" / "scores.npz")
    with reading(results / "metrics.csv", f"evaluate it again: {again}"):
        numbers = ["value", "low", "high"]
        metrics = pd.read_csv(results / "metrics.csv", keep_default_na=False,
                              dtype=dict.fromkeys(COLUMNS, str) | dict.fromkeys(numbers, float),
                              na_values=dict.fromkeys(numbers, [""]))
        if list(metrics) != COLUMNS:
            raise ValueError(f"columns {', '.join(metrics)[:200]}")
        listed = {Key(*facts) for facts in metrics[KEY_COLUMNS].to_numpy()}
        missing = {key._replace(draw=0) for key in scores} - listed
        if missing:
            raise ValueError(f"no line of {missing.pop()}")
    return Evaluated(Path(folder), about, settings, metrics, scores)


def group_runs(runs):
    """Runs whose folders differ by -s0, -s1, ... alone, together: {name: runs}, by view.

    Raises InputError where runs of one name differ by more than their seed, or not even by it.
    """
    groups, order = {}, list(VIEWS)
    for run in sorted(runs, key=lambda run: order.index(run.about["view"])):
        groups.setdefault(group_name(run.folder), []).append(run)
    for first, *others in groups.values():
        seeds = {first.about["seed"]}
        for run in others:
            differ = [f"{key} {first.settings.get(key)} and {value}"
                      for key, value in run.settings.items() if first.settings.get(key) != value]
            if run.about["seed"] in seeds:
                differ.append(f"seed {run.about['seed']} twice")
            if differ:
                raise InputError(f"{first.folder} and {run.folder} are of one name, but have "
                                 f"{', '.join(differ)}; leave one out, or rename its folder")
            seeds.add(run.about["seed"])
    return groups


def sample_group(runs, n):
    """{(Key, metric): Sample} of what all runs of a group have; n: bootstrap draws."""
    draws = []
    for run in runs:
        of_run = {}
        for key, scores in run.scores.items():
            of_run.setdefault(key._replace(draw=0), []).append(bootstrap(*scores, n))
        draws.append({key: np.mean(several, axis=0) for key, several in of_run.items()})
    tables = [run.metrics[run.metrics.minus == ""].set_index([*KEY_COLUMNS, "metric"]).value
              for run in runs]
    samples = {}
    for facts in tables[0].index:
        *key, metric = facts
        key = Key(*key)
        if not all(facts in table.index for table in tables):
            continue
        values, of_metric = np.array([table[facts] for table in tables]), None
        if metric in MEASURES and key in draws[0]:
            of_metric = np.stack([of_run[key][:, MEASURES.index(metric)] for of_run in draws])
        samples[key, metric] = Sample(values, of_metric)
    return samples


def pool(sample, minus=None):
    """value, low, high and sd of the mean over a group's runs, or of its difference from another.
    """
    value, low, high = sample.values.mean(), np.nan, np.nan
    if minus is not None:
        value -= minus.values.mean()
    if sample.draws is not None:
        low, high = interval_over_runs(*sample, minus)
    sd = sample.values.std(ddof=1) if minus is None and len(sample.values) > 1 else np.nan
    return dict(value=value, low=low, high=high, sd=sd)


def same_patients(one, other):
    """Whether two Scores are of the same patients, with the same labels: then they can be paired.
    """
    return (np.array_equal(np.unique(one.patients), np.unique(other.patients))
            and np.allclose(one.y.mean(0), other.y.mean(0)))


def pool_groups(groups, n):
    """Lines of metrics over groups of runs, {name: runs}, as a table.

    COLUMNS, minus_group (of `minus`; "" without) and sd over runs. Means; paired differences of
    each row from `pretrained` within a group, and of `pretrained` between groups.
    """
    found, samples = [], {}

    def add(group, key, metric, numbers, minus="", minus_group=""):
        if metric in MEASURES:  # of few runs Student's intervals are wider than the scale
            least = -1.0 if minus else 0.0
            numbers |= dict(low=max(numbers["low"], least), high=min(numbers["high"], 1.0))
        found.append(dict(group=group, row=key.row, minus=minus, minus_group=minus_group,
                          protocol=key.protocol, labels=key.labels, leads=key.leads,
                          metric=metric) | numbers)

    for group in tqdm(groups, "intervals", unit="group", disable=None):
        samples[group] = sample_group(groups[group], n)
    for group, of_group in samples.items():
        for (key, metric), sample in of_group.items():
            add(group, key, metric, pool(sample))
            first = key._replace(row=BOTH_STREAMS if key.protocol == "streams" else "pretrained")
            base = of_group.get((first, metric))
            if sample.draws is not None and base is not None and key != first:
                paired = Sample(base.values - sample.values, base.draws - sample.draws)
                add(group, first, metric, pool(paired), key.row, group)
    for one, other in permutations(samples, 2):
        for (key, metric), sample in samples[one].items():
            minus = samples[other].get((key, metric))
            if (key.row == "pretrained" and sample.draws is not None and minus is not None
                    and same_patients(groups[one][0].scores[key], groups[other][0].scores[key])):
                add(one, key, metric, pool(sample, minus), key.row, other)
    return pd.DataFrame(found)


def compare(args):
    """Tables over several runs, the paper's numbers beside ours: OUT.md and OUT.csv."""
    labels = " ".join(args.labels_of.split())
    runs = [run for run in (read_evaluated(folder, labels) for folder in args.runs)
            if run is not None]
    if not runs:
        raise InputError(f"no evaluated run among {len(args.runs)} folders: train and evaluate "
                         "some first (make pretrain, make eval)")
    groups = group_runs(runs)
    if args.base not in (None, *groups):
        raise InputError(f"--base {args.base}: give one of {', '.join(groups)}")
    abouts = {group: of_group[0].about for group, of_group in groups.items()}
    table = pool_groups(groups, args.bootstrap)

    last = {about["view"]: group for group, about in abouts.items()}
    notes, shown = [INTERVALS + " " + OVER_SEEDS], []
    for group, about in abouts.items():
        seeds = ", ".join(str(run.about["seed"]) for run in groups[group])
        notes.append(f"{group}: view {about['view']}, seeds {seeds}; "
                     f"{describe_data(about['data'])}, {about['data']['records']} records at "
                     f"{about['data']['rate']} Hz; labels: {labels}.")
        shown.append(table[table.group == group])
        if labels == "superclass" and last[about["view"]] == group:
            shown.append(paper_lines(about["view"], about["view"]))
    sentences = answer(table, abouts, args.base)
    text = ["# Comparison of runs", "\n".join(sentences), "\n".join(notes),
            *make_tables(pd.concat(shown), about, ["group", "row"])]
    write_text(f"{args.out}.md", "\n\n".join(text) + "\n")
    write_atomic(f"{args.out}.csv", lambda tmp: table.to_csv(tmp, index=False))
    print("\n".join(sentences))
    print(f"-> {args.out}.md (the tables), {args.out}.csv (every number)")


# Recordings of one's own

def embed_recording(encoder, recording):
    """What an Encoder makes of a Recording: windows (W, T, C), a line of OUT.csv and z (d,).

    Raises InputError for a recording that cannot be used.
    """
    signal, there, notes = prepare(recording, encoder.rate, encoder.shortest)
    windows, keep = normalize(torch.from_numpy(signal)), torch.from_numpy(there)
    parts = [encoder(part, keep.expand(len(part), C)).cpu() for part in windows.split(64)]
    z, probabilities = torch.cat(parts).mean(0), {}
    if encoder.probe is not None:
        probabilities = dict(zip(encoder.classes, encoder.probabilities(z, keep).tolist()))
        if not there.all():
            notes = [*notes, "probabilities by the probe that learned from masked leads"]
    line = dict(leads=int(there.sum()), windows=len(windows), **probabilities,
                notes="; ".join(notes))
    return windows.numpy(), line, z.numpy()


def embed_recordings(args):
    """Representations and probabilities of recordings: OUT.csv, OUT.npz; of a single one a figure.

    A recording that cannot be used is named, and the others go on; raises InputError when none can.
    """
    encoder, found = load_encoder(args.run, pick_device(args.device)), list_recordings(args.ecg)
    rows, z, out = [], [], Path(args.out or Path(args.run) / "embed")
    for path, number in tqdm(found, "embed", unit="recording", disable=None):
        file = str(path) if number is None else f"{path}#{number}"
        row = dict(file=file, name=path.stem, leads=0, windows=0)
        try:
            recording = read_recording(path, number, args.source_rate, args.unit, args.leads)
            windows, line, features = embed_recording(encoder, recording)
            rows.append(row | dict(name=recording.name) | line)
            z.append(features)
        except InputError as error:
            rows.append(row | dict(notes=str(error)))
    table = pd.DataFrame(rows)
    if not z:
        raise InputError(f"none of {len(table)} recordings can be used:\n  "
                         + "\n  ".join(table.notes.head(10)))
    table["notes"] = table.pop("notes")  # the last column
    used = table[table.windows > 0]
    write_atomic(f"{out}.csv", lambda tmp: table.to_csv(tmp, index=False, float_format="%.6g"))
    save_arrays(Path(f"{out}.npz"), dict(
        z=np.stack(z), probabilities=used[encoder.classes].to_numpy(),
        names=used.name.to_numpy(str), files=used.file.to_numpy(str)))
    files = f"{out}.csv, {out}.npz"
    if len(table) == 1:
        path = Path(f"{out}-ecg.{args.format}")
        draw_recording(windows[0], table.iloc[0], encoder, path)
        files += f", {path}"
    shown = table.drop(columns="file").head(20).round(3)
    print(markdown(list(shown), shown.to_numpy()))
    print(f"{len(used)} of {len(table)} recordings, {len(z[0])} features of each")
    if encoder.probe is None:
        print(f"No probabilities, for want of a probe: make eval RUN={args.run}")
    else:
        print(f"Probabilities: each class for itself. For research: this is no medical device.\n"
              f"F1 on {fold_names(VAL_FOLD)} was best at {name_thresholds(encoder, '')}")
        if (used.leads < C).any():
            print(f"where leads are missing at {name_thresholds(encoder, 'masked_')}")
    print(f"-> {files}")


def name_thresholds(encoder, prefix):
    """The thresholds of an Encoder's probe in words; prefix: "" or, of missing leads, "masked_"."""
    pairs = zip(encoder.classes, encoder.probe[f"{prefix}thresholds"])
    return ", ".join(f"{name} {threshold:.2f}" for name, threshold in pairs)


def draw_recording(x, line, encoder, path):
    """Traces of a window x (T, C), absent leads in grey, and probabilities of the line of OUT.csv.

    Of many classes the most probable ones.
    """
    figure = Figure((11, 6), layout="constrained")
    traces, bars = figure.subplots(1, 2, width_ratios=[4, 1])
    seconds = np.arange(len(x)) / encoder.rate
    for c, lead in enumerate(LEADS):
        color = "black" if x[:, c].any() else "0.8"
        traces.plot(seconds, c - (x[:, c] / 12).clip(-0.8, 0.8), linewidth=0.6, color=color)
    traces.set(title=f"{line['name']}, z-scored", xlabel="time (s)", ylim=(len(LEADS), -1),
               xlim=(0, len(x) / encoder.rate))
    traces.set_yticks(range(len(LEADS)), LEADS)
    bars.set(title="no probe yet", xlim=(0, 1))
    if encoder.probe is not None:
        p = line[encoder.classes].astype(float).nlargest(12)[::-1]
        colors = class_colors(encoder.classes)
        bars.barh(p.index, p, color=[colors[name] for name in p.index])
        prefix = "" if line.leads == C else "masked_"
        at = dict(zip(encoder.classes, encoder.probe[f"{prefix}thresholds"]))
        bars.plot([at[name] for name in p.index], p.index, "k|", markersize=14)
        bars.set_title("probability, threshold (|)")
    save_figure(figure, path, dict(x=x))


# Command line

def budget(text):
    """The `type` of --labels."""
    if not re.fullmatch(r"[1-9]\d*(shot)?|(100|[1-9]\d?)%", text):
        raise argparse.ArgumentTypeError(
            f"{text}: give such as 10, for 10 records in all, 10shot, for 10 a class, or 1%, 10%, "
            "100% of the training records")
    return text


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    style = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    count, run = bounded(int, 1), "runs/noncontig-s0"

    p = commands.add_parser("run", help="evaluate one run", **style)
    p.add_argument("--run", default=run, help="a finished run folder")
    p.add_argument("--fast", action="store_true", help="leave out the rows that train networks: "
                   "fine-tuning, from scratch, ResNet-18")
    p.add_argument("--cv", action="store_true", help="score every labelled record of all folds by "
                   "probes of the other folds as well: narrower intervals on small data")
    p.add_argument("--labels", nargs="+", type=budget, default=["10", "10shot", "10%"],
                   help="few labels: 10 for 10 records in all (paper), 10shot for 10 a class, or "
                   "shares such as 1%% 10%% 100%%; with 100%% fine-tuning takes all, too")
    p.add_argument("--seeds", type=count, default=3, help="draws of few labels")
    p.add_argument("--label-lr", type=bounded(float, 1e-12), help="peak learning rate of networks "
                   "trained with labels (a fine-tuned encoder takes a tenth); by default the run's "
                   "--max-lr")
    p.add_argument("--bootstrap", type=count, default=1000, help="resamples, by patient")
    add_shared(p, "cache", "labels_of", "device", "format")

    p = commands.add_parser("embed", help="representations and probabilities of your recordings",
                            **style)
    p.add_argument("ecg", nargs="+", help="files (WFDB, npy, npz, CSV, HDF5) or folders")
    p.add_argument("--run", default=run, help="an evaluated run")
    p.add_argument("--source-rate", type=bounded(float, 1), help="Hz, where the file does not tell")
    p.add_argument("--unit", help="mV, uV or V, where the file does not tell it")
    p.add_argument("--leads", nargs="+", help="names of the columns, where the file has none")
    p.add_argument("--out", help="OUT.csv, OUT.npz, and OUT-ecg.png of a single recording; by "
                   "default RUN/embed")
    add_shared(p, "device", "format")

    p = commands.add_parser("compare", help="tables over several evaluated runs", **style)
    p.add_argument("runs", nargs="+", help="run folders; those that differ by -s0, -s1, ... alone "
                   "are a group; those not evaluated are named, left out")
    p.add_argument("--base", help="group that the others are compared with; by default the highest")
    p.add_argument("--bootstrap", type=count, default=1000, help="resamples, by patient")
    p.add_argument("--out", default="runs/compare", help="tables go to OUT.md and OUT.csv")
    add_shared(p, "labels_of")
    return parser.parse_args(argv)


def main(args):
    commands = dict(run=evaluate, embed=embed_recordings, compare=compare)
    commands[args.command](args)


if __name__ == "__main__":
    run_script(lambda: main(get_args()))
