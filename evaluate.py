"""What a pretrained encoder is worth on a label set, beside baselines (paper 5.1, 5.3).

In:  a finished run folder of train.py, and the cache that it was trained on (or one like it).
Out: in that folder metrics.csv, every number, a line each: group, row, minus, protocol, labels,
     leads, metric, value, low, high; report.md and figures/, made from it; eval/scores.npz, labels
     and scores of all test records; eval/probe.npz, the probes; eval/pieces/, finished work, each
     piece kept while nothing changes that it depends on (ROCKET's: in the cache's folder).
     eval/embeddings-pretrained.npz has z (N, S, d) float32, S = 1 or 2 views, ids and labels.

How a number comes about: open_run() reads the run; measure() asks encoders for representations
(Run.represent), fits probes to them fold by fold (score_probe), and keeps each row's Scores; from
these, and nothing else, follow values and intervals (results, score_lines).

    python evaluate.py run --run runs/noncontig-s0
    python evaluate.py run --run runs/demo-noncontig-s0 --fast --cv
    python evaluate.py compare runs/contig-s0 runs/contig-s1 runs/noncontig-s0 --out runs/compare
    python evaluate.py embed one.hea a/folder --run runs/noncontig-s0
"""
import argparse
import json
import math
import os
import re
import warnings
from argparse import Namespace
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import joblib
import numpy as np
import pandas as pd
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.figure import Figure
from scipy.spatial.distance import pdist
from scipy.special import expit, logit
from scipy.stats import chi2
from scipy.stats import t as student
from sklearn import config_context
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.metrics import accuracy_score, f1_score, precision_recall_curve, roc_auc_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from data import (CLASSES, LEADS, TEST_FOLD, TRAIN_FOLDS, VAL_FOLD, Cache, InputError, Labels,
                  add_shared, bounded, fold_names, from_args, list_recordings, normalize,
                  open_cache, prepare, read_labels, read_recording, reading, run_script,
                  save_arrays, source_names, write_atomic, write_json, write_text)
from model import (NO_STREAMS, C, Config, Contrastive, embed, load_encoder, load_run, read_args,
                   read_log)
from train import NOT_A_RESULT, VAL_STEP, clustering, fetch, pick_device, pick_precision, train
from views import VIEWS, ViewConfig, draw_leads, generator, shift

FORMAT = 4  # raise it when the meaning of a piece or of a result changes: they are then made anew
FOLDS = sorted([*TRAIN_FOLDS, VAL_FOLD, TEST_FOLD])
STRENGTHS = 10.0 ** np.arange(-4, 0.1, 0.5)  # inverse L2 penalties that a probe chooses from
LEAD_SETS = {12: LEADS, 6: LEADS[:6], 3: ("I", "II", "V2"), 2: ("I", "II"), 1: ("II",)}
MASKED = 0.5, 0.8  # a probe for fewer leads also learns from copies of its records, masked so
LABEL_EPOCHS, LABEL_STEPS, LABEL_BATCH = 60, 100, 32  # of networks that learn from labels
MEASURES = ("macro_auroc", "macro_f1", "accuracy")  # the metrics that have intervals
CLUSTERING = ("silhouette", "davies_bouldin", "calinski_harabasz")
RARE = 10  # test records; classes with fewer are named in the notes
BOTH_STREAMS = "both streams"
ONE_STREAM = {  # row: the stem whose input is changed, and how: (B, T', C) -> (B, T', C)
    "time stream sees another record": ("time_stem", lambda x: x.roll(1, 0)),
    "time stream sees nothing": ("time_stem", torch.zeros_like),
    "channel stream sees another record": ("channel_stem", lambda x: x.roll(1, 0)),
    "channel stream sees nothing": ("channel_stem", torch.zeros_like)}
LOGGED = ("loss", "val_loss", "grad_norm_ratio", "grad_norm_ratio_corrected")  # of the last epoch
SPEED = ("records_per_second", "data_share", "peak_mib")  # medians over the epochs
COLUMNS = ["group", "row", "minus", "protocol", "labels", "leads", "metric", "value", "low", "high"]
ROWS = {"majority": "the most frequent classes, always",
        "rocket": "random convolutions (ROCKET), probed",
        "untrained": "this encoder untrained, probed",
        "pretrained": "this encoder pretrained, probed",
        "resnet18": "ResNet-18 pretrained, probed",
        "finetuned": "this encoder fine-tuned",
        "supervised": "this encoder from scratch",
        "resnet18-supervised": "ResNet-18 from scratch"}
NETWORKS = ("finetuned", "supervised", "resnet18-supervised")  # they learn from labels
SLOW = {"resnet18", *NETWORKS}  # rows that train networks: --fast leaves them out
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
SCORED = {"official": fold_names(TEST_FOLD), "cv": "each scored by a probe of other folds"}
INTERVALS = ("Intervals hold 95 %, over patients; where that of a difference holds 0, these "
             "records do not tell.")
OVER_SEEDS = ("Means over seeds, with intervals over these too, or the standard deviation; of a "
              "group of one run the interval is over patients alone. No correction for the number "
              "of comparisons; the highest is chosen on these scores.")
ABOUT = {
    "official": f"**Official protocol.** Several labels at once; {fold_names(TRAIN_FOLDS)} train, "
                f"{fold_names(VAL_FOLD)} chooses C and thresholds, {fold_names(TEST_FOLD)} tests. "
                "Accuracy: all classes right.",
    "cv": "**Cross-validated.** The same, but each labelled record is scored once, by a probe that "
          "learned from other folds; the scores of all probes are ranked together. Pretraining saw "
          f"the signals of {fold_names(TRAIN_FOLDS)}, never a label.",
    "table3": "**Table 3 of the paper.** One superclass, each view of a record a sample, "
              f"{fold_names([VAL_FOLD, TEST_FOLD])} test. The paper: its own, on all of PTB-XL.",
    "fewer": "**Fewer labels, fewer leads.** Macro AUROC. Labels: so many records in all, of each "
             "class (10shot), or a share; means over draws. All labels of the fold that chooses C "
             "and thresholds are seen. Leads: the others are zero; the probes also learned from "
             "masked records.",
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


# Protocols: which records train, choose and test

class Fold(NamedTuple):
    """Row numbers of records: `choose` settles the penalty, thresholds and when a network stops."""

    train: np.ndarray
    choose: np.ndarray
    test: np.ndarray


@dataclass(frozen=True)
class Protocol:
    """Labels y (N, K) 0/1 and patients (N,) of a cache's records, and the folds to score them by.

    Each record that is tested is tested in one fold, by what was learned from that fold's `train`.
    By default each class has a sigmoid and a threshold, chosen on `choose`. table3: as the paper's,
    one softmax, whose largest score decides; each view of a record is a sample; and `choose` trains
    too, once it has settled the penalty.
    """

    name: str
    y: np.ndarray
    patients: np.ndarray
    folds: list
    table3: bool = False

    @property
    def tested(self):
        """Row numbers of all records that are tested, ascending."""
        return np.sort(np.concatenate([fold.test for fold in self.folds]))

    def samples(self, z, rows):
        """Features z (N, S, d) of some records -> (n, d), and the n rows that they belong to."""
        if self.table3:
            return z[rows].reshape(-1, z.shape[2]), np.repeat(rows, z.shape[1])
        return z[rows].mean(axis=1), rows


def protocols(index, labels, cv=False):
    """The Protocols {name: Protocol} of a cache's index and Labels.

    official: the benchmark of Strodthoff et al. 2021 (doi 10.1109/JBHI.2020.3022989). table3, for
    superclasses alone: as the paper's Table 3, records with exactly one, each view a sample, tested
    on both folds not trained on; C is chosen on the last training fold. cv: all folds are tested,
    the fold that follows chooses, the others train. Raises InputError where a part has no record.
    """
    splits = dict(official=[(TRAIN_FOLDS, [VAL_FOLD], [TEST_FOLD])])
    if labels.name == "superclass":
        splits["table3"] = [(TRAIN_FOLDS[:-1], TRAIN_FOLDS[-1:], [VAL_FOLD, TEST_FOLD])]
    if cv:
        splits["cv"] = [([f for f in FOLDS if f not in (test, choose)], [choose], [test])
                        for test, choose in zip(FOLDS, FOLDS[1:] + FOLDS[:1])]
    tasks = {}
    for name, split in splits.items():
        member = labels.member
        if name == "table3":
            member = member & (labels.y.sum(1) == 1)
        folds = [Fold(*(rows_of(index, member, name, part) for part in parts)) for parts in split]
        tasks[name] = Protocol(name, labels.y, index.patient_id.to_numpy(), folds,
                               table3=name == "table3")
    return tasks


def rows_of(index, member, name, folds):
    """Row numbers of the members in some folds; raises InputError if there is none."""
    rows = np.flatnonzero(member & np.isin(index.strat_fold, folds))
    if len(rows) == 0:
        raise InputError(f"{len(index)} records, but {fold_names(folds)} has none with a label for "
                         f"the protocol {name}: each part needs some; see python data.py info, "
                         "take more records, leave out --cv, or evaluate on others: --cache")
    return rows


def note_rare(tasks, classes):
    """A line that names the classes with few test records, or ""; tasks: {name: Protocol}."""
    few = [f"{name} {n} ({task.name})" for task in tasks.values()
           for name, n in zip(classes, task.y[task.tested].sum(0)) if n < RARE]
    if not few:
        return ""
    return (f"Classes with fewer than {RARE} of the records tested (with 0 the macro means are of "
            f"the others): {', '.join(few)}.")


def draw_labels(y, rows, budget, seed):
    """Rows whose labels a method may use: "10" in all, "10shot" a class, "10%" of them.

    y: (N, K) of all records. For 10shot each class, the rarest first, gets 10 records that have it
    and were not drawn yet.
    """
    rng = np.random.default_rng([seed, int(re.sub(r"\D", "", budget))])
    rows = rng.permutation(rows)
    if budget.endswith("%"):
        return np.sort(rows[:max(1, round(len(rows) * float(budget[:-1]) / 100))])
    if budget.isdigit():
        return np.sort(rows[:int(budget)])
    drawn = []
    for k in np.argsort(y[rows].sum(0)):
        free = rows[~np.isin(rows, drawn) & (y[rows, k] == 1)]
        drawn += free[:int(budget.removesuffix("shot"))].tolist()
    return np.sort(drawn)


# Scores

class Key(NamedTuple):
    """What a row's scores are of."""

    protocol: str
    row: str
    labels: str = "100%"  # or few: see draw_labels()
    leads: str = "all"  # or their number: then by the probe that learned from masked copies too
    draw: int = 0  # of few labels


class Scores(NamedTuple):
    """Of n test records, or of their views: labels, scores, decisions (n, K); patients (n,)."""

    y: np.ndarray
    p: np.ndarray
    predicted: np.ndarray
    patients: np.ndarray


def write_scores(path, scores):
    """Keep {Key: Scores} in an .npz file: `keys` (m, 5), and y-0, p-0, ... of the first of them."""
    arrays = dict(keys=np.array([[str(part) for part in key] for key in scores]))
    for i, found in enumerate(scores.values()):
        arrays |= {f"{name}-{i}": array for name, array in found._asdict().items()}
    save_arrays(path, arrays)


def read_scores(path):
    """What write_scores() wrote: {Key: Scores}; raises InputError for a damaged file."""
    scores = {}
    with reading(path, "evaluate the run again: make eval"), np.load(path) as arrays:
        for i, (*key, draw) in enumerate(arrays["keys"].tolist()):
            scores[Key(*key, int(draw))] = Scores(*(arrays[f"{name}-{i}"]
                                                    for name in Scores._fields))
    return scores


def join_folds(task, parts):
    """Scores from parts (rows, p, predicted) of a protocol's folds, in the order of the records."""
    rows, p, predicted = (np.concatenate(arrays) for arrays in zip(*parts))
    order = np.argsort(rows, kind="stable")
    rows = rows[order]
    return Scores(task.y[rows], p[order], predicted[order].astype(int), task.patients[rows])


def best_thresholds(y, p):
    """For each class the threshold of p (n, K) with the highest F1 on y (n, K); 0.5 if unknown."""
    thresholds = np.full(y.shape[1], 0.5)
    for k in np.flatnonzero(y.any(0)):
        precision, recall, at = precision_recall_curve(y[:, k], p[:, k])
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        thresholds[k] = at[f1[:-1].argmax()]
    return thresholds


def mean_of_known(a):
    """Mean over the last axis of what is not NaN; NaN where nothing is known."""
    known = np.isfinite(a)
    return np.where(known, a, 0).sum(-1) / np.where(known.any(-1), known.sum(-1), np.nan)


def aurocs(y, p):
    """AUROC of each class (K,) from labels and scores (n, K); NaN where y is constant."""
    return np.array([roc_auc_score(a, b) if 0 < a.sum() < len(a) else np.nan
                     for a, b in zip(y.T, p.T)])


def score(y, p, predicted, classes):
    """AUROC and F1 of each class and their means, accuracy (all classes right); all in 0..1.

    y, p, predicted: (n, K). Higher is better. NaN for a class without positives (or negatives),
    which the means leave out.
    """
    auroc = aurocs(y, p)
    f1 = np.array([f1_score(a, b, zero_division=0) if a.any() else np.nan
                   for a, b in zip(y.T, predicted.T)])
    return dict(macro_auroc=mean_of_known(auroc), macro_f1=mean_of_known(f1),
                accuracy=accuracy_score(y, predicted),
                **{f"auroc/{name}": value for name, value in zip(classes, auroc)},
                **{f"f1/{name}": value for name, value in zip(classes, f1)})


# Intervals

def bootstrap(y, p, predicted, patients, n, seed=0):
    """Draws (n, 3) of the MEASURES when patients are drawn with replacement, all their records.

    Computed for all draws at once from how often each record is drawn; equal to `score` on the
    repeated records, but NaN where a draw lacks a class that is there. The same patients in the
    same order are drawn alike: runs can be paired.
    """
    who, member = np.unique(patients, return_inverse=True)
    drawn = np.random.default_rng(seed).multinomial(len(who), np.full(len(who), 1 / len(who)), n)
    w = drawn[:, member].astype(float)  # (n, records)
    auroc = np.full((n, y.shape[1]), np.nan)
    with np.errstate(invalid="ignore"):  # 0 / 0 where a draw lacks a class
        for k in range(y.shape[1]):  # Mann-Whitney: pairs whose positive has the higher score
            at = np.argsort(p[:, k])
            ties = np.flatnonzero(np.diff(p[at, k], prepend=-np.inf))  # where equal scores begin
            yes, no = (np.add.reduceat(w[:, at] * (y[at, k] == v), ties, axis=1) for v in (1, 0))
            auroc[:, k] = (yes * (no.cumsum(1) - no / 2)).sum(1) / (yes.sum(1) * no.sum(1))
        f1 = 2 * (w @ (y * predicted)) / (w @ y + w @ predicted)
    f1[w @ y == 0] = np.nan
    right = w @ (y == predicted).all(1) / w.sum(1)
    lacks = (w @ y == 0)[:, y.any(0)].any(1)  # a mean over other classes is another number
    auroc[lacks] = f1[lacks] = np.nan
    return np.stack([mean_of_known(auroc), mean_of_known(f1), right], axis=1)


def interval(draws):
    """95 % percentile interval of bootstrap draws, without those that could not be computed."""
    draws = draws[np.isfinite(draws)]
    if len(draws) == 0:
        return np.nan, np.nan
    low, high = np.percentile(draws, (2.5, 97.5))
    return low, high


def interval_over_runs(values, draws, minus=None):
    """95 % interval of the mean of a group of S runs, over patients and over runs.

    values: (S,) of the runs on the same test records; draws: (S, n) of their paired bootstraps over
    patients; minus: (values, draws) of another group, for the difference of the two means.

    Variance of the mean: what patients vary it, from the draws, and the runs' variance / S beyond
    what patients vary each run by itself. Student's factor with the degrees of freedom of Welch and
    Satterthwaite. For these the runs' variance is taken at its upper 75 % limit: two runs that
    agree by chance would else pass for certain (their intervals hold the truth in 88 %). A single
    run, or two, one a group, have percentile intervals.
    """
    groups = [(values, draws)]
    if minus is not None:
        groups.append(minus)
    middle, drawn, parts = 0.0, 0.0, []
    for sign, (group_values, group_draws) in zip((1, -1), groups):
        S = len(group_values)
        middle = middle + sign * np.mean(group_values)
        drawn = drawn + sign * group_draws.mean(0)
        if S > 1:
            centred = group_draws - np.nanmean(group_draws, axis=1, keepdims=True)
            own = np.nanmean(centred.var(axis=0, ddof=1))  # patients' part in each run by itself
            parts.append((np.var(group_values, ddof=1) / S, own / S, S - 1))
    if not parts:
        return interval(drawn)

    of_runs, own, freedom = np.array(parts).T  # of each group
    of_patients, total = np.nanvar(drawn, ddof=1), of_runs.sum()
    if total > 0:
        freedom = total ** 2 / (of_runs ** 2 / freedom).sum()
        limit = max(0.0, total * freedom / chi2.ppf(0.25, freedom) - own.sum())
        freedom = freedom * (of_patients + limit) ** 2 / max(limit, 1e-12) ** 2
    else:
        freedom = math.inf
    variance = of_patients + max(0.0, total - own.sum())
    half = student.ppf(0.975, freedom) * math.sqrt(variance)
    return middle - half, middle + half


# Quality without labels

def shift_distance(z, later):
    """Mean distance of a record to itself, started later, over that between records: low is good.

    z, later: (n, d). 0 when the representation does not mind when beats fall; about 1 when that is
    all it tells.
    """
    return float(np.linalg.norm(z - later, axis=1).mean() / max(pdist(z).mean(), 1e-12))


def rankme(z):
    """Effective rank of representations z (n, d): 1..min(n, d), high is good.

    exp of the entropy of the singular values (Garrido et al. 2023, arXiv 2210.02885).
    """
    s = np.linalg.svd(z, compute_uv=False)
    p = s / s.sum() + 1e-7
    return float(np.exp(-(p * np.log(p)).sum()))


# Features without training

class Rocket:
    """Random dilated convolutions (ROCKET, Dempster et al. 2020, doi 10.1007/s10618-020-00701-z).

    Called with x (B, T, C): the share of positive values and the maximum of each of n kernels over
    a random subset of the leads -> (B, 1, 2 n). Dilations are powers of 2, so that kernels of one
    shape share a convolution.
    """

    def __init__(self, T, n=1000, seed=0):
        rng, groups = np.random.default_rng(seed), {}
        for _ in range(n):
            length = int(rng.choice((7, 9, 11)))
            dilation = 2 ** int(rng.uniform(0, math.log2((T - 1) / (length - 1))))
            padding = int(rng.integers(2)) * (length - 1) * dilation // 2
            w = rng.standard_normal((C, length))
            w -= w.mean(axis=1, keepdims=True)
            w[rng.permutation(C)[int(2 ** rng.uniform(0, math.log2(C + 1))):]] = 0
            groups.setdefault((dilation, padding, length), []).append((w, rng.uniform(-1, 1)))
        self.groups = [(*shape[:2], *(torch.tensor(np.stack(a), dtype=torch.float32)
                                      for a in zip(*kernels))) for shape, kernels in groups.items()]

    def __call__(self, x):
        features = []
        for dilation, padding, w, b in self.groups:
            h = F.conv1d(x.transpose(1, 2), w.to(x.device), b.to(x.device), 1, padding, dilation)
            features += [(h > 0).float().mean(dim=2), h.amax(dim=2)]  # h: (B, kernels, T')
        return torch.cat(features, dim=1)[:, None]


# Probes: logistic regression on representations

@threadpool_limits.wrap(limits=1)  # problems are small: BLAS threads get in each other's way
def fit_pipeline(z, y, strength, single):
    """Logistic regression on standardised features z (n, d), as scikit-learn's pipeline.

    y: (n, K) 0/1. single: one softmax; else a sigmoid for each class. strength: C of scikit-learn.
    A class that no record has, or all have, gets a constant score.
    """
    classifier, target = LogisticRegression(C=strength, max_iter=5000), y
    if not single:
        classifier = OneVsRestClassifier(classifier)
    else:
        target = y.argmax(1)
        if np.ptp(target) == 0:
            classifier = DummyClassifier()
    with (warnings.catch_warnings(),
          config_context(assume_finite=True, skip_parameter_validation=True)):  # many small fits
        # a class is constant: its score is then, too
        warnings.filterwarnings("ignore", "Label .* is present in all training examples")
        return make_pipeline(StandardScaler(), classifier).fit(z, target)


def predict(pipeline, z, K):
    """Scores (n, K) of fit_pipeline()'s result for features z (n, d)."""
    p = pipeline.predict_proba(z)
    if isinstance(pipeline[-1], OneVsRestClassifier):
        return p[:, -K:]  # of one class scikit-learn gives the probability of none, too
    return p @ np.eye(K)[pipeline.classes_]  # a softmax over the classes that training had


def choose_probe(z, task, fold, rows):
    """The probe that learns from `rows` and whose cross-entropy on `choose` is least: (probe, C).

    z: features (N, S, d) of all records. The probe is a pipeline of fit_pipeline().
    """
    K = task.y.shape[1]
    x, rows = task.samples(z, rows)
    x_choose, choose = task.samples(z, fold.choose)
    y, best = task.y[choose], math.inf
    for strength in STRENGTHS:
        candidate = fit_pipeline(x, task.y[rows], strength, task.table3)
        p = predict(candidate, x_choose, K).clip(1e-7, 1 - 1e-7)
        terms = y * np.log(p)
        if not task.table3:
            terms = terms + (1 - y) * np.log(1 - p)
        loss = -terms.sum(1).mean()
        if loss < best:
            best, probe, chosen = loss, candidate, float(strength)
    if task.table3:
        x, rows = np.concatenate([x, x_choose]), np.concatenate([rows, choose])
        probe = fit_pipeline(x, task.y[rows], chosen, task.table3)
    return probe, chosen


def score_probe(z, task, budget="100%", draw=0):
    """Scores of a row's probes, fold by fold, and what they learned from.

    z: features (N, S, d) of all records
    ->  Scores, a list of dicts (one a fold) of probe, strength, records, thresholds
    """
    K, parts, learned = task.y.shape[1], [], []
    for fold in task.folds:
        rows = draw_labels(task.y, fold.train, budget, draw)
        probe, strength = choose_probe(z, task, fold, rows)
        x, tested = task.samples(z, fold.test)
        p, thresholds = predict(probe, x, K), None
        if task.table3:
            predicted = np.eye(K)[p.argmax(1)]
        else:
            p_choose = predict(probe, task.samples(z, fold.choose)[0], K)
            thresholds = best_thresholds(task.y[fold.choose], p_choose)
            predicted = p >= thresholds
        parts.append((tested, p, predicted))
        learned.append(dict(probe=probe, strength=strength, records=len(rows),
                            thresholds=thresholds))
    return join_folds(task, parts), learned


def score_masked_probe(copies, fewer, task, strengths):
    """Scores with fewer leads, fold by fold, by probes that also learned from masked records.

    copies: [(N, d)] features of all records, whole and masked; fewer: {number of leads: (N, d)} of
    the records that are tested; strengths: of each fold's probe of whole records
    ->  {number of leads: Scores}, a list of dicts (one a fold) of probe and thresholds
    """
    K, learned, parts = task.y.shape[1], [], {n: [] for n in fewer}
    for fold, strength in zip(task.folds, strengths):
        x, x_choose = (np.concatenate([z[rows] for z in copies])
                       for rows in (fold.train, fold.choose))
        y, y_choose = (np.tile(task.y[rows], (len(copies), 1))
                       for rows in (fold.train, fold.choose))
        probe = fit_pipeline(x, y, strength / len(copies), False)  # as strong as on whole records
        thresholds = best_thresholds(y_choose, predict(probe, x_choose, K))
        for n, z in fewer.items():
            p = predict(probe, z[fold.test], K)
            parts[n].append((fold.test, p, p >= thresholds))
        learned.append(dict(probe=probe, thresholds=thresholds))
    return {n: join_folds(task, of_folds) for n, of_folds in parts.items()}, learned


def score_majority(task):
    """Scores of always answering the most frequent classes."""
    parts = []
    for fold in task.folds:
        y = task.y[fold.train]
        answers, count = np.unique(y, axis=0, return_counts=True)
        parts.append((fold.test, np.tile(y.mean(0), (len(fold.test), 1)),
                      np.tile(answers[count.argmax()], (len(fold.test), 1))))
    return join_folds(task, parts)


def weights_of(pipeline):
    """A probe as weights (K, d) and biases (K,) of its logits, on features as they come."""
    scaler, weights, biases = pipeline[0], [], []
    for classifier in pipeline[1].estimators_:
        if hasattr(classifier, "coef_"):
            w, b = classifier.coef_[0] / scaler.scale_, classifier.intercept_[0]
        else:  # a class that no record has, or all have
            w = np.zeros(len(scaler.mean_))
            b = logit(classifier.predict_proba(w[None])[0, 1])
        weights.append(w)
        biases.append(b - w @ scaler.mean_)
    return np.array(weights), np.array(biases)


# Networks that learn from labels

class Classifier(nn.Module):
    """An encoder with a logit for each class: x (B, T, C), keep (B, C) or None -> (B, 1, K)."""

    def __init__(self, model, views, K):
        super().__init__()
        self.model, self.views = model, views
        self.head = nn.Linear(model.width, K)

    def forward(self, x, keep=None):
        return self.head(embed(self.model, x, self.views, keep).mean(1, keepdim=True))


def fit_network(net, run, task, rows, rates, seed):
    """Train encoder and head of a Classifier on the labels of some rows, a sigmoid for each class.

    Each record starts at a random time, circularly: without that small sets are overfitted. The
    weights that end up in net are those with the highest macro AUROC on `choose`, looked at
    ten times. rates: peak ones of encoder and head. Raises FloatingPointError when a loss is not
    finite.
    """
    torch.manual_seed(seed)
    batch = min(LABEL_BATCH, max(8, len(rows) // 4), len(rows))  # few labels: smaller batches
    steps = max(LABEL_EPOCHS * math.ceil(len(rows) / batch), LABEL_STEPS)
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(rows) for _ in range(steps * batch // len(rows) + 1)])
    y = torch.from_numpy(task.y).float().to(run.device)
    optimizer = torch.optim.AdamW([dict(params=net.model.encoder.parameters()),
                                   dict(params=net.head.parameters())], weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, list(rates), total_steps=steps)
    best, choose = -math.inf, task.folds[0].choose
    for step in range(steps):
        net.train()
        optimizer.zero_grad(set_to_none=True)
        now = order[step * batch:(step + 1) * batch]
        for part in np.array_split(now, math.ceil(batch / run.trained["micro_batch"])):
            x = normalize(fetch(run.cache, part, run.device))
            x = shift(x, torch.from_numpy(rng.integers(x.shape[1], size=len(x))).to(run.device))
            logits = net(x)[:, 0]
            loss = F.binary_cross_entropy_with_logits(logits, y[part]) * len(part) / batch
            if not loss.isfinite():
                raise FloatingPointError(f"loss {loss} at step {step} of training with labels; try "
                                         "a lower --label-lr")
            loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % (steps // 10) == 0:
            p = run.apply(net.eval(), choose)[:, 0]
            auroc = mean_of_known(aurocs(task.y[choose], p))
            if not auroc <= best:
                best, state = auroc, deepcopy(net.state_dict())
    net.load_state_dict(state)
    return net.eval()


def score_network(run, task, key):
    """Scores of a network that learns from labels, in a Protocol of one fold; [a dict] of it."""
    (fold,), row, lr = task.folds, key.row, run.settings.label_lr
    if lr is None:
        lr = run.trained["max_lr"]
    rates = (0.1 * lr, lr) if row == "finetuned" else (lr, lr)
    rows = draw_labels(task.y, fold.train, key.labels, key.draw)
    seed = key.draw + 1000 * run.trained["seed"]  # other runs: other weights, the same labels

    def make():
        torch.manual_seed(seed)
        if row == "finetuned":
            model = deepcopy(run.models["pretrained"])
        elif row == "supervised":
            model = run.fresh(run.saved["config"], seed)
        else:
            model = run.fresh(resnet_config(run.saved["config"]), seed)
        net = Classifier(model, run.views, task.y.shape[1]).to(run.device)
        fit_network(net, run, task, rows, rates, seed)
        return [expit(run.apply(net, part)[:, 0]) for part in (fold.choose, fold.test)]

    p_choose, p = run.remember(make, row, y=task.y, fold=fold, rows=rows, rates=rates, seed=seed,
                               constants=[LABEL_EPOCHS, LABEL_STEPS, LABEL_BATCH])
    predicted = p >= best_thresholds(task.y[fold.choose], p_choose)
    return join_folds(task, [(fold.test, p, predicted)]), [dict(records=len(rows))]


# One run: its encoders, and what they make of the records

def compute(key, make):
    """What make() gives. joblib.Memory keeps it by `key`, a dict of all that it depends on."""
    return make()


def open_data(folder, saved, cache=None):
    """What a run was trained with and the records to look at: (its arguments as a dict, Cache).

    saved: its args.json; cache: a folder, by default the run's own. Raises InputError when its rate
    is another one.
    """
    trained = saved["args"]
    cache = open_cache(cache or trained["cache"])
    rate, was = cache.meta["rate"], saved["data"]["rate"]
    if rate != was:
        raise InputError(f"{folder} was trained at {was} Hz, {cache.folder} is at {rate} Hz: give "
                         f"a --cache at {was} Hz (make cache RATE={was} DATA=...)")
    return trained, cache


def untrained(config, seed, device):
    """A Contrastive with fresh weights: those that a run of this seed began with."""
    torch.manual_seed(seed)
    return Contrastive(Config(**config)).to(device).eval()


def resnet_config(settings):
    """The same settings (of a Config, or of a run) for a ResNet-18, which has no streams."""
    return settings | NO_STREAMS | dict(arch="resnet18")


@dataclass
class Run:
    """A finished run and the records that it is tested on; add_models() adds to the last two."""

    folder: Path
    out: Path  # where the results go: the folder, or one within it for other data than its own
    saved: dict  # args.json
    trained: dict  # its arguments
    views: ViewConfig  # its strategy
    cache: Cache
    device: torch.device
    labels: Labels
    protocols: dict  # name -> Protocol
    settings: Namespace  # of the evaluation
    models: dict = field(default_factory=dict)  # row -> Contrastive, or Rocket: rows to be probed
    weights: dict = field(default_factory=dict)  # row -> digest of the model's weights

    @property
    def group(self):
        """The name that the runs of all seeds share."""
        return group_name(self.folder)

    @property
    def single(self):
        """Row numbers of the records with one class alone, of the folds not trained on."""
        one = self.labels.member & (self.labels.y.sum(1) == 1)
        return np.flatnonzero(one & np.isin(self.cache.index.strat_fold, [VAL_FOLD, TEST_FOLD]))

    def fresh(self, config, seed):
        """An untrained model that computes in the precision of this run's."""
        model = untrained(config, seed, self.device)
        model.precision = self.models["pretrained"].precision
        return model

    @torch.no_grad()
    def apply(self, function, rows, keep=None):
        """What function(x, keep) gives for z-scored records x (b, T, C) of the cache -> (n, ...).

        keep: leads that are there, of all records (C,) or of each (n, C); None: all leads
        """
        size, found = max(self.trained["micro_batch"], 16), []
        for at in np.array_split(np.arange(len(rows)), math.ceil(max(len(rows), 1) / size)):
            x, there = normalize(fetch(self.cache, rows[at], self.device)), None
            if keep is not None:
                there = torch.from_numpy(np.broadcast_to(keep, (len(rows), C))[at])
                there = there.to(self.device)
            found.append(function(x, there).float().cpu().numpy())
        return np.concatenate(found)

    def encode(self, row, x, keep=None, change=None):
        """Features (B, S, d) by a row's model of z-scored x (B, T, C), keep (B, C) or None.

        change: "later", records start half a second later; or one of ONE_STREAM: the other stream
        sees the record as before, and the cross-attention joins the two.
        """
        model = self.models[row]
        if change == "later":
            x = x.roll(-(self.cache.meta["rate"] // 2), 1)
        if row == "rocket":
            return model(x if keep is None else x * keep[:, None])
        if change not in ONE_STREAM:
            return embed(model, x, self.views, keep)

        stem, feed = ONE_STREAM[change]
        hook = getattr(model.encoder, stem).register_forward_pre_hook(
            lambda module, args: (feed(args[0]), *args[1:]))
        z = embed(model, x, self.views, keep)
        hook.remove()
        return z

    def represent(self, row, rows, keep=None, change=None):
        """encode() of some records (n, S, d), kept on disk; keep: as for apply()."""
        def make():
            z = self.apply(lambda x, keep: self.encode(row, x, keep, change), rows, keep)
            if not np.isfinite(z).all():
                raise FloatingPointError(f"{row}: features of {self.cache.folder} are not finite")
            return z

        return self.remember(make, row, rows=rows, keep=keep, change=change)

    def remember(self, make, row, **depends):
        """What make() gives, kept on disk while all that it depends on is the same.

        ROCKET's features depend on no run: they are kept in the cache's folder, if it can be
        written, for all runs. A damaged piece is made anew.
        """
        pieces = self.folder / "eval" / "pieces"
        key = depends | dict(row=row, weights=self.weights.get(row), format=FORMAT,
                             data=self.cache.meta["fingerprint"])
        if row != "rocket":
            key |= dict(pretrained=self.weights["pretrained"], config=self.saved["config"],
                        precision=self.models["pretrained"].precision, views=self.views,
                        device=self.device.type, micro_batch=self.trained["micro_batch"])
        elif os.access(self.cache.folder, os.W_OK):
            pieces = self.cache.folder / "pieces"
        return joblib.Memory(pieces, verbose=0).cache(compute, ignore=["make"])(key, make)


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


def open_run(args):
    """The Run that the arguments name; raise InputError for settings that it cannot have."""
    folder, device = Path(args.run), pick_device(args.device)
    model, saved = load_run(folder, device)
    trained, cache = open_data(folder, saved, args.cache)
    model.precision = pick_precision(trained["precision"], device)
    labels = read_labels(cache, args.labels_of)
    other = cache.meta["fingerprint"] != saved["data"]["fingerprint"]
    out = results_folder(folder, labels.name, cache.folder if other else None)
    return Run(folder, out, saved, trained, from_args(ViewConfig, trained), cache,
               device, labels, protocols(cache.index, labels, args.cv), args,
               models=dict(pretrained=model))


def pretrain_resnet(run):
    """ResNet-18, pretrained as this run was, in the folder resnet18 within its own."""
    folder, cache = run.folder / "resnet18", run.cache.folder
    if run.out != run.folder:  # tested on other data than this run was trained on
        cache = run.trained["cache"]
    if not (folder / "model.pt").exists():
        print(f"ResNet-18 is pretrained with this run's settings, in {folder}", flush=True)
        train(Namespace(**resnet_config(run.trained) | dict(
            run=str(folder), cache=str(cache), device=str(run.device))))
    model, _ = load_run(folder, run.device)
    model.precision = run.models["pretrained"].precision
    return model


def add_models(run, rows):
    """Add to a Run the models of the rows that are probed, and the digests of their weights."""
    run.models["untrained"] = run.fresh(run.saved["config"], run.trained["seed"])
    if "resnet18" in rows:
        run.models["resnet18"] = pretrain_resnet(run)
    for row, model in run.models.items():
        run.weights[row] = joblib.hash([weight.cpu().numpy()
                                        for weight in model.state_dict().values()])
    rocket = Rocket(run.cache.signals.shape[1], seed=run.trained["seed"])
    run.models["rocket"] = rocket
    run.weights["rocket"] = joblib.hash([[*shape, w.numpy(), b.numpy()]
                                         for *shape, w, b in rocket.groups])


# Every number of a run

def score_rows(run, rows):
    """Scores of the rows under every protocol, and what they learned from.

    Networks, which train long, are scored by the official protocol alone; fine-tuning takes all
    labels where --labels names them. Of few labels there are --seeds draws; in cv one, since each
    of its folds draws anew.
    ->  {Key: Scores}, {Key: [a dict for each fold]}
    """
    scores, learned, everything = {}, {}, np.arange(len(run.cache.index))
    bar = tqdm(rows, "rows", disable=None)
    for row in bar:
        bar.set_postfix_str(row)
        for task in run.protocols.values():
            if row in NETWORKS and task.name != "official":
                continue
            keys = [Key(task.name, row)]
            if not task.table3:
                keys += [Key(task.name, row, budget, draw=draw) for budget in run.settings.labels
                         for draw in range(run.settings.seeds)
                         if draw == 0 or task.name == "official" and budget != "100%"]
            if row == "majority":
                keys = keys[:1]  # few labels make no other majority
            if row == "finetuned":
                keys = keys[1:]
            for key in dict.fromkeys(keys):
                if row == "majority":
                    scores[key] = score_majority(task)
                elif row in NETWORKS:
                    scores[key], learned[key] = score_network(run, task, key)
                else:
                    z = run.represent(row, everything)
                    scores[key], learned[key] = score_probe(z, task, key.labels, key.draw)
        if row in run.models:
            add_fewer_leads(run, row, scores, learned)
    return scores, learned


def add_fewer_leads(run, row, scores, learned):
    """Add to score_rows()'s results those of a row with fewer leads.

    The masked copies of records are the same for all rows of a run.
    """
    tasks = [task for task in run.protocols.values() if not task.table3]
    tested, everything = tasks[-1].tested, np.arange(len(run.cache.index))  # of cv, if it is there
    z = run.represent(row, everything).mean(1)
    copies, fewer = [z], {C: z}
    for p in MASKED:
        rng = generator("mask", run.trained["seed"], VAL_STEP)
        keep = draw_leads((len(z), C), p, rng).numpy()
        copies.append(run.represent(row, everything, keep).mean(1))
    for n, names in LEAD_SETS.items():
        if n < C:
            fewer[n] = np.zeros_like(z)
            fewer[n][tested] = run.represent(row, tested, np.isin(LEADS, names)).mean(1)
    for task in tasks:
        strengths = [fold["strength"] for fold in learned[Key(task.name, row)]]
        found, probes = score_masked_probe(copies, fewer, task, strengths)
        for n, of_leads in found.items():
            key = Key(task.name, row, leads=str(n))
            scores[key], learned[key] = of_leads, probes


def score_streams(run, probe, thresholds):
    """Scores of this run's official probe when one stream sees another record, or nothing.

    On all records with labels of the folds that did not train. {Key: Scores}
    """
    official = run.protocols["official"]
    (fold,) = official.folds
    tested = np.append(fold.choose, fold.test)
    scores = {}
    for row in (BOTH_STREAMS, *ONE_STREAM):
        z = run.represent("pretrained", tested, change=None if row == BOTH_STREAMS else row)
        p = predict(probe, z.mean(1), official.y.shape[1])
        scores[Key("streams", row)] = join_folds(official, [(tested, p, p >= thresholds)])
    return scores


def write_probe(run, learned):
    """Keep the official probes of this run, for whole records and for fewer leads: eval/probe.npz.

    Each class for itself: logits are z @ weights.T + biases; load_encoder() reads it.
    """
    arrays = dict(classes=np.array(run.labels.classes))
    for prefix, leads in (("", "all"), ("masked_", str(C))):
        (fold,) = learned[Key("official", "pretrained", leads=leads)]
        weights, biases = weights_of(fold["probe"])
        arrays |= {f"{prefix}weights": weights, f"{prefix}biases": biases,
                   f"{prefix}thresholds": fold["thresholds"]}
    save_arrays(run.out / "eval" / "probe.npz", arrays)


def results(scores, classes, n):
    """Values and bootstrap draws of {Key: Scores}; of several draws of few labels their means.

    ->  {Key with draw 0: ({metric: value}, draws (n, 3) of the MEASURES)}
    """
    together = {}
    for key, found in scores.items():
        together.setdefault(key._replace(draw=0), []).append(found)
    out = {}
    for key, several in tqdm(together.items(), "intervals", leave=False, disable=None):
        values = pd.DataFrame([score(*found[:3], classes) for found in several])
        draws = np.mean([bootstrap(*found, n) for found in several], axis=0)
        out[key] = values.mean(skipna=False).to_dict(), draws
    return out


def lines(key, values, draws=None, minus=""):
    """Lines of metrics.csv, without their group: of a Key, {metric: value} and draws (n, 3)."""
    out = []
    for metric, value in values.items():
        low, high = np.nan, np.nan
        if draws is not None and metric in MEASURES:
            low, high = interval(draws[:, MEASURES.index(metric)])
        out.append(dict(row=key.row, minus=minus, protocol=key.protocol, labels=key.labels,
                        leads=key.leads, metric=metric, value=value, low=low, high=high))
    return out


def score_lines(found, learned):
    """Lines of results(), with how many labels were used and the penalty (C) that they chose.

    Then their paired differences: this run minus the others, both streams minus one.
    """
    out, differences = [], []
    for key, (values, draws) in found.items():
        out += lines(key, values, draws)
        folds = [fold for other in learned if other._replace(draw=0) == key
                 for fold in learned[other]]
        for name in ("records", "strength"):
            if folds and name in folds[0]:
                out += lines(key, {name: float(np.median([fold[name] for fold in folds]))})
        first = key._replace(row=BOTH_STREAMS if key.protocol == "streams" else "pretrained")
        if key != first and first in found:
            first_values, first_draws = found[first]
            values = {metric: first_values[metric] - values[metric] for metric in MEASURES}
            differences += lines(first, values, first_draws - draws, minus=key.row)
    return out + differences


def representation_lines(run):
    """Lines of what each row's representations are like, without a probe.

    clustering: scores of Run.single under its classes; `chance`: of this run's, classes permuted.
    quality: `shift` of the same records, and RankMe of all. Nothing where there are no two of them.
    """
    out, rows, everything = [], run.single, np.arange(len(run.cache.index))
    if len(rows) < 2:
        return out
    labels, rng = run.labels.y[rows].argmax(1), np.random.default_rng(0)
    for row in [row for row in ROWS if row in run.models]:
        z = run.represent(row, everything).mean(1)
        later = run.represent(row, rows, change="later").mean(1)
        quality = dict(shift=shift_distance(z[rows], later))
        if row == "rocket":  # its shares and maxima have different scales
            z = StandardScaler().fit_transform(z)
        else:
            quality["rankme"] = rankme(z)
        out += lines(Key("quality", row), quality)
        out += lines(Key("clustering", row), clustering(z[rows], labels))
        if row == "pretrained":
            permuted = pd.DataFrame([clustering(z[rows], rng.permutation(labels))
                                     for _ in range(20)])
            out += lines(Key("clustering", "chance"), permuted.astype(float).mean().to_dict())
    return out


def training_lines(folder):
    """Lines of a run's log: losses and gradient ratios of the last epoch, medians of its speed."""
    if not (folder / "log.jsonl").exists():
        return []
    log = read_log(folder).reindex(columns=[*LOGGED, *SPEED]).astype(float)
    values = log[list(LOGGED)].iloc[-1].to_dict() | log[list(SPEED)].median().to_dict()
    return lines(Key("training", "pretrained"), values)


def measure(run, rows):
    """Every number of a run: a table of COLUMNS; writes eval/scores.npz, probe.npz, embeddings.

    rows: some of ROWS, `pretrained` and `untrained` among them
    """
    add_models(run, rows)
    scores, learned = score_rows(run, rows)
    write_probe(run, learned)
    if run.saved["config"]["arch"] != "resnet18":
        (fold,) = learned[Key("official", "pretrained")]
        scores |= score_streams(run, fold["probe"], fold["thresholds"])
    (run.out / "metrics.csv").unlink(missing_ok=True)  # a kill must not leave one of other scores
    write_scores(run.out / "eval" / "scores.npz", scores)
    index, z = run.cache.index, run.represent("pretrained", np.arange(len(run.cache.index)))
    save_arrays(run.out / "eval" / "embeddings-pretrained.npz", dict(
        z=z, labels=run.labels.y, classes=np.array(run.labels.classes),
        **{key: index[key].to_numpy() for key in ("ecg_id", "patient_id", "strat_fold")}))
    found = results(scores, run.labels.classes, run.settings.bootstrap)
    table = score_lines(found, learned) + representation_lines(run) + training_lines(run.folder)
    return pd.DataFrame(table).assign(group=run.group)[COLUMNS]


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


def paper_lines(view):
    """What the paper reports of a view, on all of PTB-XL, as lines of metrics (Tables 2 and 3)."""
    table2 = dict(zip(CLUSTERING, VIEWS[view].table2 or ()))
    names = [f"f1/{name}" for name in CLASSES]
    table3 = dict(zip([*names, "accuracy", "macro_f1"], VIEWS[view].table3 or ()))
    found = lines(Key("clustering", PAPER), table2) + lines(Key("table3", PAPER), table3)
    return pd.DataFrame(found).assign(group=view)


def make_tables(table, classes, index):
    """Every table, below what it means: a list of Markdown texts. index: see pivot()."""
    protocols = [name for name in ("official", "cv", "table3") if name in set(table.protocol)]
    tables = {name: score_table(table, name, classes, index) for name in protocols}
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
    """The protocol that the answer rests on: the one that tests most records, in all groups."""
    ours = table[table.row != PAPER]
    everywhere = set(ours.group[ours.protocol == "cv"]) == set(ours.group)
    return "cv" if everywhere else "official"


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
    tested = {name: f"{abouts[best]['tested'][name]} records ({SCORED[name]})"
              for name in ("official", protocol)}
    sentences = [f"Does pretraining help? By macro AUROC of linear probes on {tested[protocol]}:"]
    for group in abouts:
        facts = dict(group=group, protocol=protocol)
        gain = GAINS[verdict(look_up(table, minus="untrained", **facts))]
        sentences.append(f"- {group}: {gain}. It reaches {standing(table, BASELINES, **facts)}.")
    if len(abouts) > 1:
        if base is None:
            base = best
        found = {group: look_up(table, group=group, protocol=protocol, minus="pretrained",
                                minus_group=base) for group in abouts}
        others = [f"{group} is {verdict(line)} it ({cell(line)})" for group, line in found.items()
                  if line is not None]
        sentences.append(f"The highest is {best}. Against {base}: {', '.join(others)}.")
    facts = dict(group=best, protocol="official")
    if protocol != "official":
        sentences.append(f"On {tested['official']} {best} reaches "
                         f"{standing(table, BASELINES, **facts)}.")
    networks = {row: ROWS[row] for row in ROWS if row in SLOW
                and look_up(table, minus=row, **facts) is not None}
    if networks:
        sentences.append(f"Against other networks, on {tested['official']}, it reaches "
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


def write_report(path, title, table, abouts, notes, base=None):
    """Write the answer, notes and a table a protocol to a Markdown file; print the answer.

    abouts, base: as answer() takes them; notes: a list of lines
    """
    sentences, shown, index = answer(table, abouts, base), [table], ["group", "row"]
    if len(abouts) == 1:
        index = ["row"]
    for about in {about["view"]: about for about in abouts.values()}.values():
        if about["labels"] == "superclass":
            shown.append(paper_lines(about["view"]))
    parts = [f"# {title}", "\n".join(sentences), "\n".join(notes),
             *make_tables(pd.concat(shown), about["classes"], index)]
    write_text(path, "\n\n".join(parts) + "\n")
    print("\n".join(sentences))


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
    write_json(run.out / "eval" / "about.json", about)
    write_atomic(run.out / "metrics.csv", lambda tmp: table.to_csv(tmp, index=False))

    notes = [INTERVALS]
    if rare := note_rare(run.protocols, run.labels.classes):
        notes.append(rare)
    if meta["left_out"]:
        notes.append(f"Left out of the data: {len(meta['left_out'])} records, such as "
                     f"{meta['left_out'][0]}.")
    if meta["fingerprint"] != run.saved["data"]["fingerprint"]:
        notes.append(f"Pretrained on other data: {run.saved['data']['data']}.")
    training = table[table.protocol == "training"]
    if len(training):
        numbers = ", ".join(f"{line.metric} {cell(line)}" for line in training.itertuples())
        notes.append(f"Training, last epoch and median speed: {numbers}.")
    notes += [f"![{path.stem}](figures/{path.name})" for path in draw(run, table, title)]
    write_report(run.out / "report.md", f"{run.out}\n{title}", table, {run.group: about}, notes)
    print(f"-> {run.out}: report.md (the tables), metrics.csv (every number), figures/")


# Figures

def class_colors(classes):
    """A colour for each class: Okabe and Ito's, safe for the colour-blind, as far as they go."""
    colors = list(COLORS[:6])
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
                         draws_of_labels=about["settings"]["seeds"],
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
    """Of what all S runs of a group have: {(Key, metric): values (S,), draws (S, n) or None}."""
    found = [results(run.scores, run.about["classes"], n) for run in runs]
    tables = [run.metrics[run.metrics.minus == ""].set_index([*KEY_COLUMNS, "metric"]).value
              for run in runs]
    samples = {}
    for facts in tables[0].index:
        if all(facts in table.index for table in tables):
            *key, metric = facts
            key, draws = Key(*key), None
            if metric in MEASURES and key in found[0]:
                draws = np.stack([of_run[key][1][:, MEASURES.index(metric)] for of_run in found])
            samples[key, metric] = np.array([table[facts] for table in tables]), draws
    return samples


def pool(values, draws, minus=None):
    """value, low, high and sd of the mean over a group's runs, or of its difference from another.

    values, draws, minus: as interval_over_runs() takes them, but without draws no interval
    """
    value, low, high, sd = values.mean(), np.nan, np.nan, np.nan
    if draws is not None:
        low, high = interval_over_runs(values, draws, minus)
    if minus is not None:
        value -= minus[0].mean()
    elif len(values) > 1:
        sd = values.std(ddof=1)
    return dict(value=value, low=low, high=high, sd=sd)


def same_patients(one, other):
    """Whether two Scores can be paired: they are of the same patients, with the same labels."""
    return (np.array_equal(np.unique(one.patients), np.unique(other.patients))
            and np.allclose(one.y.mean(0), other.y.mean(0)))


def pool_groups(groups, n):
    """Lines of metrics over groups of runs, {name: runs}, as a table; n: bootstrap draws.

    COLUMNS, minus_group (of `minus`; "" without) and sd over runs. Means; paired differences of
    `pretrained` from other rows within a group, and from `pretrained` of other groups.
    """
    out, samples = [], {}

    def add(group, key, metric, numbers, minus="", minus_group=""):
        if metric in MEASURES:  # of few runs Student's intervals are wider than the scale
            least = -1.0 if minus else 0.0
            numbers |= dict(low=max(numbers["low"], least), high=min(numbers["high"], 1.0))
        out.append(dict(group=group, row=key.row, minus=minus, minus_group=minus_group,
                        protocol=key.protocol, labels=key.labels, leads=key.leads,
                        metric=metric) | numbers)

    for group in tqdm(groups, "groups", disable=None):
        samples[group] = sample_group(groups[group], n)
        for (key, metric), (values, draws) in samples[group].items():
            add(group, key, metric, pool(values, draws))
            first = key._replace(row=BOTH_STREAMS if key.protocol == "streams" else "pretrained")
            if draws is not None and key != first and (first, metric) in samples[group]:
                first_values, first_draws = samples[group][first, metric]
                numbers = pool(first_values - values, first_draws - draws)
                add(group, first, metric, numbers, key.row, group)
    for one, other in permutations(groups, 2):
        for (key, metric), (values, draws) in samples[one].items():
            minus = samples[other].get((key, metric))
            if (key.row == "pretrained" and draws is not None and minus is not None
                    and same_patients(groups[one][0].scores[key], groups[other][0].scores[key])):
                add(one, key, metric, pool(values, draws, minus), key.row, other)
    return pd.DataFrame(out)


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

    notes = [INTERVALS, OVER_SEEDS]
    for group, about in abouts.items():
        seeds = ", ".join(str(run.about["seed"]) for run in groups[group])
        notes.append(f"- {group}: view {about['view']}, seeds {seeds}; "
                     f"{describe_data(about['data'])}, {about['data']['records']} records at "
                     f"{about['data']['rate']} Hz; labels: {labels}.")
    write_report(f"{args.out}.md", "Comparison of runs", table, abouts, notes, args.base)
    write_atomic(f"{args.out}.csv", lambda tmp: table.to_csv(tmp, index=False))
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
    if read_args(args.run)["data"]["synthetic"]:
        print("The encoder learned from SYNTHETIC data: its numbers say nothing of patients.")
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
