"""What a pretrained encoder is worth on PTB-XL's superclasses, beside baselines (paper 5.1, 5.3).

In:  a finished run folder of train.py, and the cache that it was trained on (or one like it).
Out: in that folder metrics.csv, every number, a line each: protocol, row, labels, seed, metric,
     value, low, high; report.md and figures/, which are made from it; eval/: finished pieces of
     work, each kept while nothing changes that it depends on (ROCKET's: in the cache).
     eval/embeddings-pretrained.npz has z (N, S, d) float32, S = 1 or 2 views, ids and labels.

    python evaluate.py run --run runs/noncontig-s0
    python evaluate.py run --run runs/demo-noncontig-s0 --fast
    python evaluate.py embed one.edf a/folder --run runs/noncontig-s0
    python evaluate.py compare runs/noncontig-s0 runs/contig-s0 --out runs/compare
    python evaluate.py study --caches cache/ptbxl-100 --preset small --seeds 1
"""
import argparse
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor, as_completed
from copy import copy, deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, combinations, product
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import pandas as pd
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from scipy.ndimage import uniform_filter1d
from scipy.spatial.distance import pdist
from scipy.special import expit, logit
from scipy.stats import t as student
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.manifold import TSNE
from sklearn.metrics import (ConfusionMatrixDisplay, RocCurveDisplay, accuracy_score,
                             confusion_matrix, f1_score, precision_recall_curve, r2_score,
                             roc_auc_score)
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import (CLASSES, LEADS, SECONDS, TEST_FOLD, TRAIN_FOLDS, VAL_FOLD, InputError, add_shared,
                  bounded, from_args, list_recordings, load_tables, normalize, open_cache, prepare,
                  read_arrays, read_recording, run_script, sha256, source_names, write_atomic)
from model import (PRESETS, READOUTS, STREAM_OPTIONS, C, Config, Contrastive, embed, export,
                   load_encoder, load_run, n_parameters, read_args, read_log, refusing,
                   watch_attention)
from train import (NOT_A_RESULT, VAL_STEP, Feed, clustering, extract, parts_of, pick_device,
                   pick_precision, project, settle, train, with_defaults)
from train import get_args as train_args
from views import VIEWS, ViewConfig, draw_leads, generator, shift, whole

K = len(CLASSES)
FORMAT = 3  # raise it when the meaning of a piece in eval/ changes: older ones are then made anew
STRENGTHS = 10.0 ** np.arange(-4, 0.1, 0.5)  # inverse L2 penalties that a probe chooses from
LEAD_SETS = {12: LEADS, 6: LEADS[:6], 3: ("I", "II", "V2"), 2: ("I", "II"), 1: ("II",)}
THERE = {n: np.isin(LEADS, names) for n, names in LEAD_SETS.items()}  # (C,) each
LABEL_EPOCHS, LABEL_STEPS, LABEL_BATCH = 60, 100, 32  # of networks that learn from labels
MEASURES = ("macro_auroc", "macro_f1", "accuracy")
MASKED = 0.5, 0.8  # a probe for fewer leads also learns from copies of its records, masked so
CLUSTERING = ("silhouette", "davies_bouldin", "calinski_harabasz")
LOW_IS_GOOD = ("davies_bouldin", "shift", "alignment", "uniformity", "stream_cka")
QUALITY = ("shift", "alignment", "uniformity", "rankme", "stream_cka")
STREAMS = ("both streams", "time stream sees another record", "time stream sees nothing",
           "channel stream sees another record", "channel stream sees nothing")
COSTS = dict(records_per_second="records/s", gflop_per_record="GFLOP a record", of_peak="of peak",
             data_share="waiting", peak_mib="MiB above the start")
TRAINING = dict(loss="loss", val_loss="val_loss", grad_norm_ratio="channel/time as in the paper",
                grad_norm_ratio_corrected="corrected", **COSTS)
KEYS = ["protocol", "row", "labels", "seed", "metric"]  # of a line of metrics.csv
NUMBERS = ["value", "low", "high"]  # the rest of it
# Okabe and Ito's colours, safe for the colour-blind: one a class and one a row, in every figure.
CLASS_COLORS = dict(zip(CLASSES, ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")))
ROWS = {"majority": "the most frequent classes, always",
        "rocket": "random convolutions (ROCKET), probed",
        "untrained": "this encoder untrained, probed", "pretrained": "this run, probed",
        "resnet18": "ResNet-18 pretrained, probed", "finetuned": "this run, fine-tuned",
        "supervised": "this encoder, from scratch",
        "resnet18-supervised": "ResNet-18, from scratch"}
NETWORKS = ("finetuned", "supervised", "resnet18-supervised")  # they learn from labels
SLOW = {"resnet18", *NETWORKS}  # rows that train networks: --fast leaves them out
ROW_COLORS = dict(zip(ROWS, ("#999999", "#000000", "#56B4E9", "#0072B2", "#009E73", "#D55E00",
                             "#E69F00", "#CC79A7")))
# Macro AUROC on fold 10 of all of PTB-XL under the official protocol, as others report it.
PUBLISHED = (("S4, supervised", .932, ""), ("xresnet1d101, supervised", .928, "arXiv 2004.13701"),
             ("ECGFounder, probed", .924, ""), ("ECG-JEPA, probed", .911, ""),
             ("ST-MEM, probed", .896, ""),
             ("poly-window contrastive, probed", .891, "arXiv 2508.15225"),
             ("two views contrastive, probed", .888, "arXiv 2508.15225"),
             ("MERL, probed", .887, ""), ("HuBERT-ECG, probed", .877, ""),
             ("ECG-FM, probed", .873, ""), ("ECG-CPC, probed", .863, ""),
             ("MERL, 1 % of the labels", .845, ""), ("SimCLR, 1 % of the labels", .634, ""))


# Protocols

@dataclass
class Task:
    """A protocol: row numbers that train, choose and test; y (N, K) 0/1; patients (N,).

    single: one class each, the largest score decides; else each class has a threshold, chosen on
    `choose`. by_view: each view of a record is a sample, and `choose` trains too, at the end.
    """

    name: str
    y: np.ndarray
    patients: np.ndarray
    train: np.ndarray
    choose: np.ndarray
    test: np.ndarray
    single: bool = False
    by_view: bool = False

    def samples(self, a, rows):
        """Features or scores a (N, S, d) of some records -> (n, d), (n,) rows they belong to."""
        if self.by_view:
            return a[rows].reshape(-1, a.shape[2]), np.repeat(rows, a.shape[1])
        return a[rows].mean(axis=1), rows


def protocols(index):
    """The three Tasks of a cache's index; raise InputError where a part of one has no record.

    official: any superclass, several labels, folds 1-8 / 9 / 10 (Strodthoff et al. 2021, doi
    10.1109/JBHI.2020.3022989). paper: exactly one superclass, same folds. table3: as the paper's
    Table 3, each view of a record a sample, tested on folds 9 and 10; its C is chosen on fold 8.
    """
    y, fold = index[list(CLASSES)].to_numpy(), index.strat_fold.to_numpy()
    tasks = {}
    for name, mask, folds, more in (
            ("official", y.any(1), (TRAIN_FOLDS, [VAL_FOLD], [TEST_FOLD]), {}),
            ("paper", y.sum(1) == 1, (TRAIN_FOLDS, [VAL_FOLD], [TEST_FOLD]), dict(single=True)),
            ("table3", y.sum(1) == 1, (TRAIN_FOLDS[:-1], TRAIN_FOLDS[-1:], [VAL_FOLD, TEST_FOLD]),
             dict(single=True, by_view=True))):
        parts = [np.flatnonzero(mask & np.isin(fold, f)) for f in folds]
        for part, f in zip(parts, folds):
            if len(part) == 0:
                raise InputError(f"{len(index)} records, but none in fold {', '.join(map(str, f))} "
                                 f"has {'one superclass' if more else 'a superclass'}: each part "
                                 "needs some; see python data.py info, take more records, or "
                                 "evaluate on others: --cache")
        tasks[name] = Task(name, y, index.patient_id.to_numpy(), *parts, **more)
    return tasks


def gaps(task):
    """Notes on classes that a part of a protocol lacks, and what becomes of their numbers."""
    effects = {"train": "its score is constant", "choose": "its threshold is 0.5",
               "test": "its AUROC and F1 cannot be computed, the macro means are of the others"}
    if task.single:
        del effects["choose"]
    out = []
    for part, effect in effects.items():
        rows = getattr(task, part)
        for k, n in enumerate(task.y[rows].sum(0)):
            if n in (0, len(rows)):
                out.append(f"{task.name}: {n} of the {len(rows)} records to {part} on have "
                           f"{CLASSES[k]}: {effect}")
            elif part == "test" and n < 10:
                out.append(f"{task.name}: only {n} of the {len(rows)} test records have "
                           f"{CLASSES[k]}, which is a fifth of a macro mean; intervals leave out "
                           "resamples without any")
    return out


# Scores and intervals

def best_thresholds(y, p):
    """For each class the threshold of p (n, K) with the highest F1 on y (n, K); 0.5 if unknown."""
    out = np.full(K, 0.5)
    for k in np.flatnonzero(y.any(0)):
        precision, recall, at = precision_recall_curve(y[:, k], p[:, k])
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        out[k] = at[f1[:-1].argmax()]
    return out


def decide(task, scores):
    """Scores on `choose` and `test` as 0/1 predictions (n, K) on `test`.

    The largest wins, or a threshold for each class; `predicted`, if there, is taken as it is.
    """
    if "predicted" in scores:
        return scores["predicted"]
    if task.single:
        return np.eye(K, dtype=int)[scores["test"].argmax(1)]
    at = best_thresholds(task.y[task.choose], scores["choose"])
    return (scores["test"] >= at).astype(int)


def mean_of_known(a):
    """Mean over the last axis of what is not NaN; NaN where nothing is known."""
    known = np.isfinite(a)
    return np.where(known, a, 0).sum(-1) / np.where(known.any(-1), known.sum(-1), np.nan)


def aurocs(y, p):
    """AUROC of each class (K,) from labels and scores (n, K); NaN where y is constant."""
    return np.array([roc_auc_score(a, b) if 0 < a.sum() < len(a) else np.nan
                     for a, b in zip(y.T, p.T)])


def macro_auroc(y, p):
    """Mean AUROC of the classes that y (n, K) tells apart, from scores p (n, K)."""
    return mean_of_known(aurocs(y, p))


def score(y, p, predicted):
    """AUROC and F1 of each class and their means, accuracy (all classes right); all in 0..1.

    y, p, predicted: (n, K). Higher is better. NaN for a class without positives (or negatives),
    which the means leave out.
    """
    auroc = aurocs(y, p)
    f1 = f1_score(y, predicted, average=None, zero_division=0)
    f1[~y.any(0)] = np.nan
    return dict(macro_auroc=mean_of_known(auroc), macro_f1=mean_of_known(f1),
                accuracy=accuracy_score(y, predicted),
                **{f"auroc/{name}": value for name, value in zip(CLASSES, auroc)},
                **{f"f1/{name}": value for name, value in zip(CLASSES, f1)})


def bootstrap(y, p, predicted, patients, n, seed=0):
    """Draws (n, 3) of the MEASURES when patients are drawn with replacement, all their records.

    Computed for all draws at once from how often each record is drawn; equal to `score` on the
    repeated records, but NaN where a draw lacks a class that is there. The same patients in the
    same order are drawn alike: runs can be paired.
    """
    who, member = np.unique(patients, return_inverse=True)
    drawn = np.random.default_rng(seed).multinomial(len(who), np.full(len(who), 1 / len(who)), n)
    w = drawn[:, member].astype(float)  # (n, records)
    auroc = np.full((n, K), np.nan)
    with np.errstate(invalid="ignore"):  # 0 / 0 where a draw lacks a class
        for k in range(K):  # Mann-Whitney: pairs of which the positive has the higher score
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
    draws = np.asarray(draws)[np.isfinite(draws)]
    return np.percentile(draws, (2.5, 97.5)).tolist() if len(draws) else (None, None)


# Label-free quality

def unit(z):
    """Rows of z scaled to length 1."""
    return z / np.linalg.norm(z, axis=-1, keepdims=True).clip(1e-12)


def alignment(z1, z2):
    """Mean squared distance of the two views of a record on the unit sphere, 0..4, low is good.

    z1, z2: (n, d). Wang and Isola 2020, arXiv 2005.10242, with exponent 2.
    """
    return float(np.square(unit(z1) - unit(z2)).sum(1).mean())


def uniformity(z):
    """Log of the mean Gaussian potential of pairs on the unit sphere, -4..0, low is good.

    z: (n, d). Wang and Isola 2020, arXiv 2005.10242, with t = 2.
    """
    return float(np.log(np.exp(-2 * pdist(unit(z), "sqeuclidean")).mean()))


def shift_distance(z, later):
    """Mean distance of a record to itself, started later, over that between records: low is good.

    z, later: (n, d). 0 when the representation does not mind when beats fall; about 1 when that is
    all it tells.
    """
    return float(np.linalg.norm(z - later, axis=1).mean() / max(pdist(z).mean(), 1e-12))


def cka(a, b):
    """Linear CKA of two representations of the same n records: 0..1, 1 if one is the other rotated.

    a: (n, d), b: (n, e). Kornblith et al. 2019, arXiv 1905.00414; few records raise it.
    """
    a, b = a - a.mean(0), b - b.mean(0)
    both, one, other = (np.linalg.norm(x.T @ y) for x, y in ((a, b), (a, a), (b, b)))
    return float(both ** 2 / max(one * other, 1e-12))


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


# What learns from labels

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
    with warnings.catch_warnings():  # that a class is constant: gaps() notes it
        warnings.filterwarnings("ignore", "Label .* is present in all training examples")
        return make_pipeline(StandardScaler(), classifier).fit(z, target)


def fit_probe(z, y, strength, single):
    """fit_pipeline() as a function z (n, d) -> scores (n, K)."""
    probe = fit_pipeline(z, y, strength, single)
    if single:
        return lambda new: probe.predict_proba(new) @ np.eye(K)[probe.classes_]
    return probe.predict_proba


def choose_probe(z, task, rows):
    """The probe that learns from `rows` and whose cross-entropy on `choose` is least: (probe, C).

    z: features (N, S, d) of all records. The probe is a function z (n, d) -> scores (n, K).
    """
    x, rows = task.samples(z, rows)
    x_choose, choose = task.samples(z, task.choose)
    best = math.inf
    for strength in STRENGTHS:
        candidate = fit_probe(x, task.y[rows], strength, task.single)
        p = candidate(x_choose).clip(1e-7, 1 - 1e-7)
        y = task.y[choose]
        loss = -(y * np.log(p) + (0 if task.single else (1 - y) * np.log(1 - p))).sum(1).mean()
        if loss < best:
            best, probe, chosen = loss, candidate, float(strength)
    if task.by_view:
        x, rows = np.concatenate([x, x_choose]), np.concatenate([rows, choose])
        probe = fit_probe(x, task.y[rows], chosen, task.single)
    return probe, chosen


class Classifier(nn.Module):
    """An encoder with a logit for each class: x (B, T, C), keep (B, C) or None -> (B, 1, K)."""

    def __init__(self, model, views):
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
    best = -math.inf
    for step in range(steps):
        net.train()
        optimizer.zero_grad(set_to_none=True)
        now = order[step * batch:(step + 1) * batch]
        for part in np.array_split(now, math.ceil(batch / run.trained["micro_batch"])):
            x = normalize(torch.from_numpy(run.cache.signals[part]).to(run.device))
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
            p = run.see(net.eval(), task.choose)[:, 0]
            auroc = macro_auroc(task.y[task.choose], p)
            if not auroc <= best:
                best, state = auroc, deepcopy(net.state_dict())
    net.load_state_dict(state)
    return net.eval()


def draw_labels(task, budget, seed):
    """Rows of `train` whose labels a method may use: "10" in all, "10shot" a class, "10%" of them.

    For 10shot each class, the rarest first, gets 10 records that have it and were not drawn yet.
    """
    rng = np.random.default_rng([seed, int(re.sub(r"\D", "", budget))])
    rows = rng.permutation(task.train)
    if budget.endswith("%"):
        return np.sort(rows[:max(1, round(len(rows) * float(budget[:-1]) / 100))])
    if budget.isdigit():
        return np.sort(rows[:int(budget)])
    drawn = []
    for k in np.argsort(task.y[rows].sum(0)):
        free = rows[~np.isin(rows, drawn) & (task.y[rows, k] == 1)]
        drawn += free[:int(budget[:-4])].tolist()
    return np.sort(drawn)


# One run: its encoders, what they make of the records, and the scores of each row

def open_data(folder, saved, cache=None):
    """What a run was trained with and the records to look at: (its arguments as a dict, Cache).

    saved: its args.json; cache: a folder, by default the run's own. Raises InputError when its rate
    is another one.
    """
    trained = with_defaults(saved["args"])
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


def describe_data(meta):
    """The data of a cache in a few words, for titles."""
    return f"{'SYNTHETIC data ' if meta['synthetic'] else ''}{source_names(meta)}"


def count_records(meta):
    """The records of a cache in words, with what was left out of it."""
    left_out = len(meta["left_out"])
    return f"{meta['records']} records" + f", {left_out} left out," * (left_out > 0)


def describe(saved, meta):
    """A run and its data in one line, for titles; meta: of the cache."""
    return (f"View {saved['args']['view']}, seed {saved['args']['seed']}, "
            f"{saved['config']['arch']}; {describe_data(meta)}, {count_records(meta)} at "
            f"{meta['rate']} Hz")


@dataclass
class Run:
    """A finished run and the records that it is tested on; evaluate() fills in the last four."""

    folder: Path
    out: Path  # where the results go: the folder, or one within it for other data than its own
    saved: dict  # args.json
    trained: dict  # its arguments, those included that are younger than the run
    views: ViewConfig  # its strategy
    cache: object
    device: torch.device
    tasks: dict
    settings: Namespace
    depends: dict  # what every piece of work depends on
    amplitude: Optional[np.ndarray] = None  # log deviation of each lead (N, C), with --amplitude
    weights: dict = field(default_factory=dict)  # row -> digest, what its pieces depend on besides
    models: dict = field(default_factory=dict)  # row -> Contrastive
    encoders: dict = field(default_factory=dict)  # row -> function x, keep -> features (B, S, d)
    features: dict = field(default_factory=dict)  # row -> dict of z (N, S, d), seconds

    def alike(self, model):
        """A model that computes as this run's does: its precision and, if it can, its readout."""
        own = self.models["pretrained"]
        model.precision = own.precision
        if model.config.arch != "resnet18":
            model.readout = own.readout
        return model

    @property
    def micro(self):
        """Records in memory at once, without a graph."""
        return max(self.trained["micro_batch"], 16)

    def seeds(self, budget):
        """Seeds of the draws of so many labels; all of them are drawn once."""
        return range(1 if budget == "100%" else self.settings.seeds)

    def piece(self, name, row, make, **depends):
        """Arrays that make() gives, kept in eval/NAME.npz while what they depend on is the same.

        ROCKET's depend on no run: they are kept in the cache's folder, if it can be written, for
        all runs of its seed.
        """
        path, depends = self.out / "eval" / f"{name}.npz", self.depends | depends
        if row == "rocket" and os.access(self.cache.folder, os.W_OK):
            path = self.cache.folder / f"rocket-s{self.trained['seed']}" / f"{name}.npz"
            del depends["model"], depends["readout"]
        key = json.dumps(depends | dict(weights=self.weights.get(row)), sort_keys=True)
        if path.exists():
            with refusing(f"{path} is damaged", "remove it"):
                old = read_arrays(path)
                if old["key"] == key:
                    return old
        print(f"  {name}", flush=True)
        arrays = {k: np.asarray(v) for k, v in make().items()} | dict(key=np.array(key))
        save_arrays(path, arrays)
        return arrays

    def beside(self, z, rows, keep=1):
        """Features z (n, S, d) of some records as a probe sees them; d + C with --amplitude.

        keep: 0 for the leads that are not there, which are flat
        """
        if self.amplitude is None:
            return z
        a = (self.amplitude[rows] * keep)[:, None].repeat(z.shape[1], axis=1)
        return np.concatenate([z, a], axis=2)

    def see(self, function, rows, keep=None):
        """What function(x, keep) gives for some records (n, ...).

        keep: leads that are there, of all records (C,) or of each (n, C); None: all leads
        """
        if keep is None or keep.all():
            of_batch = function
        else:
            of_each = iter(torch.from_numpy(keep).expand(len(rows), C).to(self.device))

            def of_batch(x):  # extract() takes the rows in their order
                return function(x, torch.stack([next(of_each) for _ in x]))

        return extract(of_batch, self.cache, rows, self.device, self.micro)

    def represent(self, row, rows, keep=None):
        """Features (n, d) of some records by a row's encoder, as a probe sees them."""
        z = self.see(self.encoders[row], rows, keep)
        return self.beside(z, rows, 1 if keep is None else keep).mean(1)

    def mask(self, rows, p):
        """Leads (n, C) that are there when each is lost with probability p, the same each time."""
        rng = generator("mask", self.trained["seed"], VAL_STEP)
        return draw_leads((len(rows), C), p, rng).numpy()


def open_run(args):
    """The Run that the arguments name; raise InputError for settings that it cannot have."""
    folder, device = Path(args.run), pick_device(args.device)
    if (folder / "encoder.json").exists():
        raise InputError(f"{folder} is an export, without what a run was trained with: evaluate "
                         "the run that it was made of; on recordings use it with make embed")
    model, saved = load_run(folder, device)
    trained, cache = open_data(folder, saved, args.cache)
    model.precision = pick_precision(trained["precision"], device)
    if args.readout and saved["config"]["arch"] != "resnet18":
        model.readout = args.readout
    tasks = protocols(cache.index)
    if args.cv is not None:
        known = np.flatnonzero(tasks["official"].y.any(1))
        if lacking := set(range(1, 11)) - set(cache.index.strat_fold.iloc[known]):
            raise InputError(f"--cv: no record with a superclass in fold {min(lacking)}; leave it "
                             "out")
        tasks["cv"] = replace(tasks["official"], name="cv", train=known, test=known)
    depends = dict(
        format=FORMAT, model=sha256(folder / "model.pt"),
        data=cache.meta["fingerprint"], precision=model.precision, readout=model.readout,
        leads=list(LEAD_SETS.values()),
        labels=[LABEL_EPOCHS, LABEL_STEPS, LABEL_BATCH], strengths=STRENGTHS.tolist())
    other = cache.meta["fingerprint"] != saved["data"]["fingerprint"]
    out = folder / f"on-{cache.folder.name}" if other else folder
    amplitude = None
    if args.amplitude:  # normalize() takes it away, and hypertrophy is diagnosed by it
        deviation = np.stack([signal.std(axis=0) for signal in cache.signals])
        amplitude = np.log1p(deviation).astype(np.float32)
    views = from_args(ViewConfig, trained)
    return Run(folder, out, saved, trained, views, cache, device, tasks, args, depends,
               amplitude, models=dict(pretrained=model))


def resnet_config(config):
    """The same settings for a ResNet-18, which has no streams."""
    return config | dict(arch="resnet18", channel_dropout=0.0, readout="z") | dict.fromkeys(
        STREAM_OPTIONS, False)


def pretrain_resnet(run):
    """ResNet-18, pretrained as this run was, in the folder resnet18 within its own."""
    folder, cache = run.folder / "resnet18", run.cache.folder
    if run.out != run.folder:  # tested on other data than this run was trained on
        cache = run.trained["cache"]
    if not (folder / "model.pt").exists():
        print(f"ResNet-18 is pretrained with this run's settings, in {folder}", flush=True)
        train(Namespace(**resnet_config(run.trained) | dict(
            run=str(folder), cache=str(cache), device=str(run.device))))
    run.weights["resnet18"] = sha256(folder / "model.pt")
    return load_run(folder, run.device)[0]


def make_encoders(run):
    """For each row that is probed what turns x (B, T, C), keep (B, C) or None into features."""
    rocket = Rocket(run.cache.signals.shape[1], seed=run.trained["seed"])
    encoders = {"rocket": lambda x, keep=None: rocket(x if keep is None else x * keep[:, None])}
    for row, model in run.models.items():
        encoders[row] = lambda x, keep=None, model=model: embed(model, x, run.views, keep)
    return encoders


def embeddings(run, row):
    """Features z (N, S, d) of all records by a row's encoder, with ids, labels and seconds."""
    def make():
        began, index = time.monotonic(), run.cache.index
        z = run.see(run.encoders[row], np.arange(len(index)))
        if not np.isfinite(z).all():
            raise FloatingPointError(f"{row}: features of {run.cache.folder} are not finite")
        return dict(z=z, seconds=time.monotonic() - began, labels=index[list(CLASSES)],
                    **{key: index[key] for key in ("ecg_id", "patient_id", "strat_fold")})

    return run.piece(f"embeddings-{row}", row, make)


def majority(task):
    """Scores of always answering the most frequent classes."""
    y = task.y[task.train]
    sets, count = np.unique(y, axis=0, return_counts=True)
    test = np.tile(y.mean(0), (len(task.test), 1))
    return dict(test=test, predicted=np.tile(sets[count.argmax()], (len(test), 1)), seconds=0.0,
                leads=[test] * len(LEAD_SETS))


def probe_row(run, row, task, budget, seed):
    """Scores (n, K) of a probe on `choose`, on `test`, and on `test` with fewer leads."""
    began, z = time.monotonic(), run.beside(run.features[row]["z"], slice(None))
    rows = draw_labels(task, budget, seed)
    probe, strength = choose_probe(z, task, rows)
    scores = {part: probe(task.samples(z, getattr(task, part))[0]) for part in ("choose", "test")}
    scores |= dict(strength=strength,
                   seconds=run.features[row]["seconds"] + time.monotonic() - began)
    if task.name == "official" and len(rows) == len(task.train):
        scores["leads"] = [probe(run.represent(row, task.test, keep)) for keep in THERE.values()]
    return scores


def folds_of(run):
    """The Task `cv` for each official fold as the test; the fold that follows chooses."""
    cv, fold = run.tasks["cv"], run.cache.index.strat_fold.to_numpy()
    for f in range(1, 11):
        test, choose = (cv.test[fold[cv.test] == g] for g in (f, f % 10 + 1))
        train = np.setdiff1d(cv.test, [*test, *choose])
        yield replace(cv, train=train, choose=choose, test=test)


def cross_validate(run, row, task, budget, seed):
    """Scores, predictions (n, K) of the records of `cv`, each by a probe of other folds.

    Of the training labels a probe sees the budget. strengths: what each fold's probe chose.
    """
    began, z = time.monotonic(), run.beside(run.features[row]["z"], slice(None))
    p, predicted, strengths = *np.zeros((2, len(z), K)), []
    for fold in folds_of(run):
        probe, strength = choose_probe(z, fold, draw_labels(fold, budget, seed))
        scores = {name: probe(z[getattr(fold, name)].mean(1)) for name in ("choose", "test")}
        p[fold.test], predicted[fold.test] = scores["test"], decide(fold, scores)
        strengths.append(strength)
    return dict(test=p[task.test], predicted=predicted[task.test].astype(int), strengths=strengths,
                strength=np.median(strengths),
                seconds=run.features[row]["seconds"] + time.monotonic() - began)


def cross_validate_leads(run, row, strengths):
    """Scores (n, K) of all labelled records from fewer leads, {number of leads: scores}.

    A probe learns from its records whole and masked at random, with the strength chosen for all.
    """
    rows = run.tasks["cv"].test
    y = run.tasks["cv"].y[rows]
    copies = [run.beside(run.features[row]["z"][rows], rows).mean(1),
              *(run.represent(row, rows, run.mask(rows, p)) for p in MASKED)]
    fewer = {n: run.represent(row, rows, keep) for n, keep in THERE.items()}
    scores = {str(n): np.zeros(y.shape) for n in fewer}
    for task, strength in zip(folds_of(run), strengths):
        train, test = (np.isin(rows, part) for part in (task.train, task.test))
        probe = fit_probe(np.concatenate([copy[train] for copy in copies]),
                          np.tile(y[train], (len(copies), 1)), strength / len(copies), False)
        for n, seen in fewer.items():
            scores[str(n)][test] = probe(seen[test])
    return scores


def network_row(run, row, task, budget, seed):
    """What probe_row() gives, of a network that is trained on the labels."""
    lr, began = run.settings.label_lr or run.trained["max_lr"], time.monotonic()
    rows = draw_labels(task, budget, seed)
    seed += 1000 * run.trained["seed"]  # other runs, other weights; the labels drawn are the same
    torch.manual_seed(seed)
    config, rates = run.saved["config"], (lr, lr)
    if row == "finetuned":
        model, rates = deepcopy(run.models["pretrained"]), (0.1 * lr, lr)
    elif row == "supervised":
        model = run.alike(untrained(config, seed, run.device))
    else:
        model = run.alike(untrained(resnet_config(config), seed, run.device))
    net = Classifier(model, run.views)
    fit_network(net.to(run.device), run, task, rows, rates, seed)
    scores = dict(seconds=time.monotonic() - began, choose=expit(run.see(net, task.choose)[:, 0]),
                  test=expit(run.see(net, task.test)[:, 0]))
    if len(rows) == len(task.train):
        scores["leads"] = [expit(run.see(net, task.test, keep)[:, 0]) for keep in THERE.values()]
    return scores


def score_row(run, row, task, budget="100%", seed=0):
    """Scores of a row under a protocol from the labels of a budget: arrays `choose`, `test`.

    For `cv` see cross_validate(). With all labels networks are trained once, for `official`; the
    largest of their scores decides in `paper`.
    """
    if row == "majority":
        return majority(task)
    if row in NETWORKS and task.single and budget == "100%":
        official = run.tasks["official"]
        scores = score_row(run, row, official, budget, seed)
        return scores | {part: scores[part][np.isin(getattr(official, part), getattr(task, part))]
                         for part in ("choose", "test")}
    make, depends = probe_row, dict(amplitude=run.settings.amplitude)
    if row in NETWORKS:
        make, depends = network_row, dict(lr=run.settings.label_lr)
    elif task.name == "cv":
        make = cross_validate
    return run.piece(f"{task.name}-{row}-{budget}-{seed}", row,
                     lambda: make(run, row, task, budget, seed), **depends)


def score_all(run, rows):
    """Scores of the rows under every protocol: {(protocol, row, labels, seed): arrays}.

    Only encoders are cross-validated; networks, which stop by fold 9, are not tested on it; and
    fine-tuning takes all labels where --labels names them.
    """
    scores, labels = {}, run.settings.labels
    for (name, task), row in product(run.tasks.items(), rows):
        if not (name == "cv" and row not in run.features or name == "table3" and row in NETWORKS
                or row == "finetuned" and "100%" not in labels):
            scores[name, row, "100%", 0] = score_row(run, row, task)
    for name, budget, row in product(("official", "paper"), labels, rows):
        for seed in run.seeds(budget):
            scores[name, row, budget, seed] = score_row(run, row, run.tasks[name], budget, seed)
    return scores


# Every number, a line each

def lines(protocol, row, numbers, draws=(), labels="100%", seed=0):
    """Lines of metrics.csv from a dict of numbers; draws: {metric: its bootstrap draws (n,)}.

    A line keeps its draws, if it has any, for differences from others.
    """
    out, draws = [], dict(draws)
    for metric, value in numbers.items():
        low, high = interval(draws.get(metric, []))
        out.append(dict(protocol=protocol, row=row, labels=labels, seed=seed, metric=metric,
                        value=value, low=low, high=high, draws=draws.get(metric)))
    return out


def name_line(line):
    """The name in eval/draws.npz of a line of metrics.csv."""
    return "/".join(str(line[key]) for key in KEYS)


def score_lines(run, scores):
    """Lines of all rows' scores; those from all labels have draws."""
    out, seconds = [], dict.fromkeys(("pretrained", "finetuned"), seconds_of(run.folder))
    if "resnet18" in run.models:
        seconds["resnet18"] = seconds_of(run.folder / "resnet18")
    for (protocol, row, labels, seed), s in scores.items():
        task, p = run.tasks[protocol], s["test"]
        predicted, draws = decide(task, s), ()
        rows = np.repeat(task.test, len(p) // len(task.test))  # several samples a record, or one
        y = task.y[rows]
        if labels == "100%":
            draws = zip(MEASURES, bootstrap(y, p, predicted, task.patients[rows],
                                            run.settings.bootstrap).T)
        if labels == "100%" and protocol == "official":
            if "source" in run.cache.index:
                of = run.cache.index.source.to_numpy()[rows]
                out += lines("sources", row, {f"macro_auroc/{name}": macro_auroc(
                    y[of == name], p[of == name]) for name in sorted(set(of))})
            out += lines("leads", row, {f"macro_auroc/{n}": macro_auroc(y, fewer)
                                        for n, fewer in zip(LEAD_SETS, s["leads"])})
        numbers = score(y, p, predicted) | dict(
            strength=s.get("strength"), seconds=s["seconds"],
            records=len(draw_labels(task, labels, seed)), pretraining_seconds=seconds.get(row))
        out += lines(protocol, row, numbers, draws, labels, seed)
    return out


def few_lines(run, rows, scores):
    """Lines of macro AUROC with less, means over draws of the labels; scores: of score_all().

    labels, labels-paper: few labels, fold 10; labels-cv, leads-cv: few labels and fewer leads,
    cross-validated, each if --cv names it.
    """
    out, args = [], run.settings
    also = args.cv or ()

    def scored(name, row, budget, seed):
        return scores.get((name, row, budget, seed)) or score_row(
            run, row, run.tasks[name], budget, seed)

    for protocol, name, some in (("labels", "official", rows), ("labels-paper", "paper", rows),
                                 ("labels-cv", "cv", run.features if "labels" in also else ())):
        for row in some:
            out += auroc_lines(run, protocol, row, run.tasks[name], {
                f"macro_auroc/{budget}": [scored(name, row, budget, seed)["test"]
                                          for seed in run.seeds(budget)]
                for budget in args.labels})
    for row in run.features if "leads" in also else ():
        strengths = scored("cv", row, "100%", 0)["strengths"]
        leads = run.piece(f"cv-leads-{row}", row, lambda: cross_validate_leads(
            run, row, strengths), masked=list(MASKED), amplitude=args.amplitude)
        out += auroc_lines(run, "leads-cv", row, run.tasks["cv"],
                           {f"macro_auroc/{n}": [leads[str(n)]] for n in LEAD_SETS})
    return out


def auroc_lines(run, protocol, row, task, scores):
    """Lines of macro AUROC with their draws, means over several scores of the same records.

    scores: {metric: [(n, K) of task.test]}
    """
    y, patients, n = task.y[task.test], task.patients[task.test], run.settings.bootstrap
    values, draws = {}, {}
    for metric, some in scores.items():
        values[metric] = np.mean([macro_auroc(y, p) for p in some])
        draws[metric] = np.mean([bootstrap(y, p, p > .5, patients, n)[:, 0] for p in some], axis=0)
    return lines(protocol, row, values, draws)


def seconds_of(folder):
    """Training time of a run, from its log; None without one."""
    if not (folder / "log.jsonl").exists():
        return None
    log, batch = read_log(folder), read_args(folder)["in_effect"]["batch"]
    return float((np.diff(log.step, prepend=0) * batch / log.records_per_second).sum())


def differences(groups, wanted):
    """Lines of paired differences of what has draws, of each ((group, row), (group, row)) wanted.

    groups: {label: tables of its runs}. Points are means over a group's runs; draws, on the same
    test records, resample patients and, where there are several, runs.
    """
    found = pd.concat([table.assign(group=group) for group, tables in groups.items()
                       for table in tables]).dropna(subset="draws")
    known = {key: part for key, part in found.groupby(["group", "protocol", "row", "metric"])
             if len(part) == len(groups[key[0]])}  # what all runs of a group have

    def sampled(part, sides):
        """Draws of the mean of a group's runs; sides: groups that are compared."""
        rng = np.random.default_rng(list(groups).index(part.group.iloc[0]))  # a group's rows pair
        return resample_runs(np.stack(part.draws), rng, sides)

    out = []
    for protocol, pair in product(found.protocol.unique(), wanted):
        values, draws, sides = {}, {}, len({group for group, _ in pair})
        for metric in found.metric.unique():
            a, b = (known.get((group, protocol, row, metric)) for group, row in pair)
            if a is not None and b is not None:
                values[metric] = a.value.mean(skipna=False) - b.value.mean(skipna=False)
                draws[metric] = sampled(a, sides) - sampled(b, sides)
        name = " - ".join(f"{group}: {row}" if group else row for group, row in pair)
        out += lines(protocol, name, values, draws)
    return out


def pairs_within(group, others):
    """Pairs of rows of a group for differences(): this run and others, both streams and one."""
    return [((group, one), (group, row)) for one, rows in (
        ("pretrained", others), (STREAMS[0], STREAMS[1:])) for row in rows]


def resample_runs(draws, rng, sides):
    """Bootstrap draws (runs, n) of patients -> (n,), of their mean over runs drawn as well.

    A few runs drawn with replacement vary too little: the variance of their mean is made unbiased,
    and a 95 % interval as wide as Student's, for one group or (sides 2) the difference of two.
    """
    S, n = draws.shape
    if S == 1:
        return draws[0]
    mean, drawn = draws.mean(0), draws[rng.integers(S, size=(S, n)), np.arange(n)].mean(0)
    wider = student.ppf(0.975, sides * (S - 1)) / student.ppf(0.975, math.inf)
    return mean + wider * math.sqrt(S / (S - 1)) * (drawn - mean)


def cluster_draws(z, labels, patients, n, groups=20):
    """Draws (n, 3) of the clustering scores, for intervals: normal, of the jackknife's variance.

    Each of `groups` scores leaves out a share of the patients; resampled records, some of them
    twice, would have other scores. The same patients give draws that pair.
    """
    who, member = np.unique(patients, return_inverse=True)
    group = np.random.default_rng(0).permutation(len(who))[member] % groups
    all_, *parts = np.array([list(clustering(z[at], labels[at]).values()) for at in (
        group >= 0, *(group != g for g in range(groups)))], float)
    noise = np.random.default_rng(1).standard_normal((n, groups))
    return all_ + math.sqrt((groups - 1) / groups) * noise @ (parts - np.mean(parts, axis=0))


def cluster_lines(run):
    """Lines of the clustering scores; `chance`: of this run's representation, labels permuted."""
    out, task = [], run.tasks["table3"]
    labels, rng = task.y[task.test].argmax(1), np.random.default_rng(0)
    for row, features in run.features.items():
        z = features["z"].mean(1)
        if row == "rocket":  # its shares and maxima have different scales
            z = StandardScaler().fit_transform(z)
        z = z[task.test]
        draws = cluster_draws(z, labels, task.patients[task.test], run.settings.bootstrap)
        out += lines("clustering", row, clustering(z, labels), zip(CLUSTERING, draws.T))
        if row == "pretrained":
            found = pd.DataFrame([clustering(z, rng.permutation(labels)) for _ in range(20)])
            out += lines("clustering", "chance", found.astype(float).mean().to_dict())
    return out


def quality_lines(run):
    """Lines of the label-free quality of each row's representation."""
    out, rows = [], run.tasks["table3"].test
    for row, features in run.features.items():
        def later(x, encoder=run.encoders[row]):
            return encoder(x.roll(-run.cache.meta["rate"] // 2, 1))

        z = features["z"].mean(1)
        moved = run.piece(f"later-{row}", row, lambda: dict(z=run.see(later, rows)))["z"].mean(1)
        numbers = dict(shift=shift_distance(z[rows], moved))
        if row in run.models:
            model = run.models[row]
            z1, z2 = run.piece(f"views-{row}", row, lambda: dict(z=two_views(run, model)))["z"]
            numbers |= dict(rankme=rankme(z), alignment=alignment(z1, z2),
                            uniformity=(uniformity(z1) + uniformity(z2)) / 2)
            if model.config.arch != "resnet18":
                streams = copy(model)  # the same weights; it hands on both streams side by side
                streams.readout = "streams"
                both = run.piece(f"streams-{row}", row, lambda: dict(z=run.see(
                    lambda x: streams.represent(run.views.split(x)[0]), rows)))["z"]
                numbers |= dict(stream_cka=cka(*np.split(both, [model.config.widths[1]], axis=1)))
        out += lines("quality", row, numbers)
    return out


@torch.no_grad()
def two_views(run, model):
    """Representations (2, n, d) of the two views of fold 10 as in training, with masking."""
    rows = run.cache.rows([TEST_FOLD])
    feed = Feed(run.cache, run.views, run.trained["seed"], run.device)
    (batch,), windows = feed([(VAL_STEP, rows)]), feed.config.windows  # of these the first
    z = [project(model, batch, part)[0].z.unflatten(0, (2 * windows, -1))[::windows]
         for part in parts_of(len(rows), run.micro)]
    return torch.cat(z, dim=1).float().cpu()


def keep_probe(run, scores):
    """The official protocol's probe of this run: a function z (n, d) -> probabilities (n, K).

    Its weights go to eval/probe.npz, from where load_encoder() takes them; not with --amplitude,
    which a representation does not tell.
    """
    task, found = run.tasks["official"], scores["official", "pretrained", "100%", 0]
    z = run.beside(run.features["pretrained"]["z"], slice(None))
    x = task.samples(z, task.train)[0]
    pipeline = fit_pipeline(x, task.y[task.train], float(found["strength"]), False)
    scaler, path = pipeline[0], run.out / "eval" / "probe.npz"
    weights, biases = np.zeros((K, x.shape[1])), np.zeros(K)
    for k, classifier in enumerate(pipeline[1].estimators_):
        if hasattr(classifier, "coef_"):
            weights[k], biases[k] = classifier.coef_[0] / scaler.scale_, classifier.intercept_[0]
        else:  # a class that no record has, or all have
            biases[k] = logit(classifier.predict_proba(x[:1])[0, 1])
    if run.settings.amplitude:
        path.unlink(missing_ok=True)
    else:
        save_arrays(path, dict(
            weights=weights, biases=biases - weights @ scaler.mean_, readout=run.depends["readout"],
            thresholds=best_thresholds(task.y[task.choose], found["choose"])))
    return pipeline.predict_proba


def stream_lines(run, probe):
    """Lines of the probe's macro AUROC when one stream sees another record, or nothing.

    The other stream sees the record as before, and the cross-attention joins the two. On whole
    records and on masked ones.
    """
    official, stems, out = run.tasks["official"], run.models["pretrained"].encoder, []
    task = replace(official, test=np.append(official.choose, official.test))

    def scored(protocol, row, keep):
        p = probe(run.represent("pretrained", task.test, keep))
        return auroc_lines(run, protocol, row, task, dict(macro_auroc=[p]))

    for protocol, keep in (("streams", None), ("streams-masked", run.mask(task.test, MASKED[0]))):
        out += scored(protocol, STREAMS[0], keep)
        for row in STREAMS[1:]:
            change = torch.zeros_like if row.endswith("nothing") else (lambda x: x.roll(1, 0))
            hook = getattr(stems, f"{row.split()[0]}_stem").register_forward_pre_hook(
                lambda module, args: (change(args[0]), *args[1:]))
            out += scored(protocol, row, keep)
            hook.remove()
    return out


def heart_rates(signals, rate):
    """Beats a minute (n,) of records (n, T, C): where their slopes repeat best, from 40 to 180."""
    slopes = np.abs(np.diff(signals.astype(np.float32), axis=1)).sum(2)
    slopes = uniform_filter1d(slopes, round(0.1 * rate), axis=1)
    slopes -= slopes.mean(1, keepdims=True)
    T = slopes.shape[1]
    again = np.fft.irfft(np.abs(np.fft.rfft(slopes, 2 * T)) ** 2)  # autocorrelation
    first, last = round(rate * 60 / 180), round(rate * 60 / 40)
    return 60 * rate / (first + again[:, first:last + 1].argmax(1))


def shortcut_lines(run):
    """Lines of how well a linear probe reads from each row what no diagnosis should rest on.

    Ridge regression, folds 1-8 train, 9 and 10 test: R² of the heart rate, AUROC of the most
    frequent recorder against the others, and of any noise that PTB-XL's annotators noted.
    """
    index, signals, rate = run.cache.index, run.cache.signals, run.cache.meta["rate"]
    targets = dict(heart_rate=np.concatenate([heart_rates(signals[i:i + 256], rate)
                                              for i in range(0, len(signals), 256)]))
    try:
        table = load_tables(run.cache.meta["data"]).set_index("ecg_id").reindex(index.ecg_id)
        if "device" in table:
            devices = table.device.astype(str).str.strip()
            targets["device"] = (devices == devices.mode()[0]).to_numpy()
        noises = ["baseline_drift", "static_noise", "burst_noise", "electrodes_problems"]
        if set(noises) <= set(table):  # PTB-XL's
            targets["noise"] = table[noises].notna().any(axis=1).to_numpy()
    except InputError as error:
        print(f"note: recorder and noise are not looked for: {error}")
    train, test = run.cache.rows(TRAIN_FOLDS), run.cache.rows([VAL_FOLD, TEST_FOLD])
    out = []
    for row, features in run.features.items():
        z, numbers = features["z"].mean(1), {}
        for name, target in targets.items():
            if len(set(target[train])) < 2 or len(set(target[test])) < 2:
                continue
            probe = make_pipeline(StandardScaler(), RidgeCV(np.logspace(1, 5, 9)))
            p = probe.fit(z[train], target[train].astype(float)).predict(z[test])
            numbers[name] = (r2_score if name == "heart_rate" else roc_auc_score)(target[test], p)
        out += lines("shortcuts", row, numbers)
    return out


def training_lines(folder):
    """Lines of a run's log: losses and gradient ratios of the last epoch, medians of its costs."""
    if not (folder / "log.jsonl").exists():
        return []
    log = read_log(folder).reindex(columns=TRAINING).astype(float)
    log.peak_mib -= read_args(folder)["start_mib"]
    return lines("training", "pretrained",
                 log.iloc[-1].to_dict() | log[list(COSTS)].median().to_dict())


# Tables

def number(value, bounds=None, form=".3f"):
    """A table's cell: 0.781 [0.712, 0.840]; a dash for what could not be computed."""
    if value is None or not math.isfinite(value):
        return "-"
    if bounds is None or not np.isfinite(np.array(bounds, float)).all():
        return f"{value:{form}}"
    return f"{value:{form}} [{bounds[0]:{form}}, {bounds[1]:{form}}]"


def markdown(head, rows):
    """A Markdown table, columns aligned so that it reads as plain text too."""
    cells = [[str(c) for c in row] for row in (head, *rows)]
    width = [max(map(len, column)) for column in zip(*cells)]
    text = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, width)) + " |" for row in cells]
    return "\n".join([text[0], "|" + "|".join("-" * (w + 2) for w in width) + "|", *text[1:]])


def summarize(table):
    """Mean, standard deviation and count of values over seeds; an interval stays of one value."""
    found = table.groupby([key for key in KEYS if key != "seed"], sort=False).agg(
        value=("value", "mean"), sd=("value", "std"), n=("value", "count"), low=("low", "first"),
        high=("high", "first")).reset_index()
    found.loc[found.n > 1, ["low", "high"]] = np.nan
    return found


def cell(line):
    """0.781 [0.712, 0.840], or 0.781 ± 0.012 over several values, or a dash (also for None)."""
    if line is None:
        return "-"
    form = {"strength": ".2g", "seconds": ".0f", "pretraining_seconds": ".0f", "records": ".0f"}
    text = number(line.value, (line.low, line.high), form.get(line.metric, ".3f"))
    few = f" ({line.n} of {line.of} seeds)" if 0 < line.n < getattr(line, "of", 0) else ""
    return text + (f" ± {line.sd:.3f}" if line.sd > 0 else "") + few


def grid(found, by, columns):
    """A Markdown table of summarized lines: a row for each value of `by`, a column a metric.

    columns: {metric: what it is called} or a list of metrics
    """
    columns = columns if isinstance(columns, dict) else dict(zip(columns, columns))
    found = found[found.metric.isin(columns)]
    cells = {(*(getattr(line, key) for key in by), line.metric): cell(line)
             for line in found.itertuples()}
    rows = dict.fromkeys(key[:-1] for key in cells)  # as they come
    return markdown([*(by if len(by) > 1 else [""]), *columns.values()], [
        [*row, *(cells.get((*row, metric), "-") for metric in columns)] for row in rows])


class Section(NamedTuple):
    """A heading of a report: which numbers stand below it, and what they mean."""

    protocol: str  # "": all of them
    lines: str  # a key of `chosen` in sections()
    title: str
    about: str
    tables: tuple = ()  # the columns of each, {metric: what it is called} or metrics; (): all


SCORE_TABLES = ({m: m for m in MEASURES} | dict(strength="C", seconds="s",
                                                pretraining_seconds="pretraining s"),
                *({f"{m}/{c}": f"{m} {c}" for c in CLASSES} for m in ("auroc", "f1")))
FEW_TABLES = (("records", *MEASURES, "seconds"),)
LEAD_NAMES = {f"macro_auroc/{n}": f"{n}: {' '.join(names)}" if n < 6 else f"{n}"
              for n, names in LEAD_SETS.items()}
SECONDS_SAY = """s: to represent all records, or train the network, and to fit, with the choice of
    C. Intervals: 95 %, bootstrap by patient; they tell of the test records, not of the seed."""
FEW_SAY = """Test fold 10; mean ± standard deviation over draws of the training labels: 10 in all,
    10 a class (10shot), or a share. All of fold 9 still chooses C, thresholds and when a network
    stops."""
SECTIONS = (
    Section("official", "all labels", "Official protocol (the headline)", f"""
        Records with at least one superclass, several at once: a sigmoid for each class, thresholds
        for F1 chosen on fold 9. Accuracy: all five classes right. Majority: the most frequent set
        of classes, and class shares as scores. {SECONDS_SAY}""", SCORE_TABLES),
    Section("cv", "all labels", "Cross-validated over the folds", f"""
        As the official protocol, but each labelled record of all folds is scored once, by a probe
        that learned from the other folds; C and thresholds are chosen on the fold that follows.
        Pretraining saw the records of folds 1-8, never a label. {SECONDS_SAY}""", SCORE_TABLES),
    Section("paper", "all labels", "The paper's protocol, fold 10", f"""
        Records with exactly one superclass, the largest score wins. Networks are those of the
        official protocol, trained on all labelled records. {SECONDS_SAY}""", SCORE_TABLES),
    Section("table3", "all labels", "Linear probe: Table 3 of the paper", f"""
        As the paper's Table 3: one superclass, each view of a record a sample of its own (majority
        and ROCKET have no views: the whole record), tested on folds 9 and 10. C is chosen on fold
        8. Networks, which stop by fold 9, are left out. {SECONDS_SAY}""", SCORE_TABLES),
    Section("", "differences", "Differences", """
        Paired by patient on the same test records; where an interval holds 0, these records do not
        tell which is better. Between views: they differ untrained already, since a probe sees other
        inputs. Intervals are over patients and, for groups of several runs, over these too; those
        of clustering are normal, from a jackknife over patients.""", [MEASURES, CLUSTERING]),
    Section("official", "any labels", "Few labels, official protocol", FEW_SAY, FEW_TABLES),
    Section("paper", "any labels", "Few labels, the paper's protocol", FEW_SAY, FEW_TABLES),
    Section("labels", "differences", "Few labels, differences, official protocol", """
        Macro AUROC, means over the draws; intervals over patients."""),
    Section("labels-paper", "differences", "Few labels, differences, the paper's protocol", """
        Macro AUROC, means over the draws; intervals over patients."""),
    Section("labels-cv", "all", "Few labels, cross-validated", """
        Macro AUROC of all labelled records, each scored by a probe that saw so many labels of the
        other folds; mean over draws of them, intervals over patients alone. A whole fold more
        chooses C."""),
    Section("leads-cv", "all", "Fewer leads, cross-validated", """
        Macro AUROC of all labelled records, cross-validated. All probes, ROCKET's too, learned from
        their records whole and from two copies with leads masked at random; C as chosen with all
        leads."""),
    Section("sources", "all labels", "By source", """
        Macro AUROC, official protocol, of the test records of each source."""),
    Section("clustering", "all labels", "Clustering: Table 2 of the paper", """
        Records of folds 9 and 10 with one superclass, representations unmasked, views averaged.
        Silhouette -1..1, high is good; Davies-Bouldin from 0, low; Calinski-Harabasz from 0, high.
        By chance: this run's representations with labels permuted, mean of 20. ROCKET's features
        are standardised.""", [CLUSTERING]),
    Section("quality", "all labels", "Quality without labels", """
        No labels used. Shift: distance of a record to itself when it starts half a second later,
        over that between records (those of clustering); near 0 if the representation does not mind
        when beats fall, near 1 if it is about that. Alignment 0..4 and uniformity -4..0, low is
        good: the two views of fold 10 as in training, on the unit sphere. RankMe: effective rank
        over all records, 1..min(records, width), high is good. Stream CKA: likeness of what the two
        streams hand on, 0..1, higher the fewer records and the wider the streams.""", [QUALITY]),
    Section("leads", "all labels", "Fewer leads", """
        Macro AUROC, official protocol: trained on 12 leads, tested with the others
        zero.""", [LEAD_NAMES]),
    Section("streams", "all labels", "The two streams", """
        Macro AUROC of this run's probe of the official protocol on folds 9 and 10, while one stream
        sees another record, or zeros; the cross-attention still joins the two."""),
    Section("streams-masked", "all labels", "The two streams, leads masked", """
        The same with each lead masked with probability 0.5."""),
    Section("shortcuts", "all labels", "Shortcuts", """
        What a linear probe reads off that no diagnosis should rest on (folds 9 and 10): heart rate
        from the autocorrelation of the slopes, R² up to 1; the most frequent recorder against the
        others, and any noise that annotators noted, AUROC, 0.5 by chance.""", [dict(
            heart_rate="heart rate (R²)", device="recorder (AUROC)", noise="noise (AUROC)")]),
    Section("training", "all labels", "Training and its cost", """
        Of the log: losses and the ratio of the streams' gradient norms in the last epoch, as the
        paper takes it and with token counts corrected for (1: equal); medians of speed, GFLOP,
        share of the peak of matrix products, share of time waiting; memory.""", [TRAINING]))


def sections(numbers):
    """Markdown of all numbers of one run or of several groups, with what each table means.

    numbers: of summarize(), with the columns group ("" alone for one run) and of (seeds).
    """
    words = ROWS | {"chance": "by chance", "paper": "**the paper**"}
    bare = {row: text.removesuffix(", probed") for row, text in words.items()}

    def worded(key):  # such as "contig small: pretrained - contig small: rocket"
        sides = [side.rsplit(": ", 1) for side in key.split(" - ")]
        return " - ".join(": ".join([*group, words.get(row, row)]) for *group, row in sides)

    represented = numbers.protocol.isin(("clustering", "quality"))
    found = numbers.assign(row=np.where(represented, numbers.row.replace(bare),
                                        numbers.row.map(worded)))
    by = ["group", "row"] if found.group.nunique() > 1 else ["row"]
    compared = found.row.str.contains(" - ")
    chosen = {"all": found, "differences": found[compared], "any labels": found[~compared],
              "all labels": found[~compared & (found.labels == "100%")]}
    out = []
    for protocol, kind, title, about, tables in SECTIONS:
        part, keys = chosen[kind], [*by[:-1], "labels", "row"] if kind == "any labels" else by
        if protocol:
            part = part[part.protocol == protocol]
        else:
            keys = ["protocol", "row"]
        every = {m: m.removeprefix("macro_auroc/") for m in part.metric.unique()}
        tables = [some for some in tables or [every] if part.metric.isin(some).any()]
        if tables:
            out += [f"## {title}\n{' '.join(about.split())}"]
            out += [grid(part, keys, columns) for columns in tables]
    return "\n\n".join(out)


# Figures

def save_arrays(path, arrays):
    """Write an .npz file, whole or not at all."""
    def write(tmp):
        with open(tmp, "wb") as file:  # savez would add a suffix to a name
            np.savez(file, **arrays)

    write_atomic(path, write)


def save_figure(figure, path, numbers):
    """Write a figure and, next to it, its numbers: rows as CSV, a dict of arrays as NPZ."""
    write_atomic(path, lambda tmp: figure.savefig(tmp, format=path.suffix[1:], dpi=150))
    if isinstance(numbers, dict):
        save_arrays(path.with_suffix(".npz"), numbers)
    else:
        write_atomic(path.with_suffix(".csv"), lambda tmp: pd.DataFrame(numbers).to_csv(
            tmp, index=False, float_format="%.6g"))


def panels(n, size, title, aside=0):
    """Axes of n panels of a figure, at most four a line, and the last of the first line.

    size: (width, height) of one, in inches; aside: the width of what stands beside them
    """
    down = math.ceil(n / 4)
    across = math.ceil(n / down)
    figure = Figure((size[0] * across + aside, size[1] * down), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for axis in axes[n:]:
        axis.remove()
    return axes[:n], axes[across - 1]


def plot_tsne(points, labels, ids, title, path):
    """t-SNE of representations side by side, one colour a class: Fig. 10 of the paper.

    points: {panel: (n, 2)}; labels, ids: (n,)
    """
    axes, corner = panels(len(points), (4, 4.2), title, aside=1)
    for axis, (panel, xy) in zip(axes, points.items()):
        for k in np.unique(labels):
            at = labels == k
            axis.scatter(*xy[at].T, s=14, color=CLASS_COLORS[CLASSES[k]],
                         label=f"{CLASSES[k]} ({at.sum()})")
        axis.set(title=panel, xlabel="t-SNE 1", ylabel="t-SNE 2", xticks=[], yticks=[])
    corner.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(corner.figure, path, pd.concat([pd.DataFrame(dict(
        panel=panel, ecg_id=ids, superclass=np.array(CLASSES)[labels], x=xy[:, 0], y=xy[:, 1]))
        for panel, xy in points.items()]))


def plot_confusion(results, title, path):
    """Confusion matrices {row: (K, K) counts}, a panel each: shares of the true class."""
    (axes, corner), rows = panels(len(results), (3.3, 3.5), title), []
    for axis, (row, counts) in zip(axes, results.items()):
        display = ConfusionMatrixDisplay(counts / counts.sum(1, keepdims=True).clip(1),
                                         display_labels=CLASSES)
        display.plot(ax=axis, cmap="Blues", colorbar=False, values_format=".2f",
                     im_kw=dict(vmin=0, vmax=1))
        for text in display.text_[counts.sum(1) == 0].flat:
            text.set_text("-")  # no record has the class
        axis.tick_params(labelsize=7)
        axis.set_title(ROWS[row], fontsize=8)
        rows += [dict(row=row, true=CLASSES[i], predicted=CLASSES[j], records=n)
                 for (i, j), n in np.ndenumerate(counts)]
    save_figure(corner.figure, path, rows)


def plot_roc(y, scores, title, path):
    """ROC curves of each class, a panel a row. y (n, K); scores {row: (n, K)}."""
    (axes, corner), rows = panels(len(scores), (3.6, 4.0), title), []
    for axis, (row, p) in zip(axes, scores.items()):
        for k in np.flatnonzero(y.any(0) & ~y.all(0)):
            display = RocCurveDisplay.from_predictions(
                y[:, k], p[:, k], name=CLASSES[k], ax=axis,
                curve_kwargs=dict(color=CLASS_COLORS[CLASSES[k]]))
            rows += [dict(row=row, superclass=CLASSES[k], false_positive_rate=f,
                          true_positive_rate=t) for f, t in zip(display.fpr, display.tpr)]
        axis.plot([0, 1], [0, 1], color="0.7", linewidth=0.8, linestyle="--")
        axis.set(xlabel="false positive rate", ylabel="true positive rate")
        axis.set_title(ROWS[row], fontsize=9)
        axis.legend(fontsize=7, loc="lower right")
    save_figure(corner.figure, path, rows)


def plot_lines(found, xlabel, title, path, log=False):
    """Macro AUROC of each row against something: lines with columns row, x, value, sd, low, high.

    Bars: the interval where all points of a row have one, else the sd.
    """
    figure = Figure((8.4, 4.2), layout="constrained")
    axis = figure.subplots()
    for i, (row, points) in enumerate(found.groupby("row", sort=False)):
        points = points.sort_values("x")
        aside = 1 + 0.02 * (i - 3) if log else 1  # so that the bars do not overlap
        bars = points.sd.fillna(0)
        if points.low.notna().all():
            bars = points.value - points.low, points.high - points.value
        axis.errorbar(points.x * aside, points.value, bars, marker="osD^vPX<"[i], capsize=2,
                      markersize=5, color=ROW_COLORS[row], label=ROWS[row],
                      linestyle="--" if row in NETWORKS else "-")
    axis.set(xlabel=xlabel, ylabel="macro AUROC", xscale="log" if log else "linear")
    ticks = sorted(set(found.x))
    axis.set_xticks(ticks, [f"{x:.0f}" for x in ticks])
    axis.minorticks_off()
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(title, fontsize=9)
    save_figure(figure, path, found[["row", "x", "value", "sd", "low", "high"]])


def draw(run, table, scores):
    """All figures of a run, in RUN/figures; returns their paths."""
    about = describe(run.saved, run.cache.meta)
    paths = {name: run.out / "figures" / f"{name}.{run.settings.format}"
             for name in ("tsne", "confusion", "roc", "leads", "labels")}
    official, paper, table3 = (run.tasks[name] for name in ("official", "paper", "table3"))
    rows = table3.test
    points = run.piece("tsne", "pretrained", lambda: {row: TSNE(
        perplexity=min(30, (len(rows) - 1) / 3), random_state=0).fit_transform(
            run.features[row]["z"].mean(1)[rows]) for row in ("untrained", "pretrained")})
    plot_tsne({"this encoder untrained": points["untrained"], "this run": points["pretrained"]},
              table3.y[rows].argmax(1), run.cache.index.ecg_id.to_numpy()[rows],
              f"t-SNE, folds 9 and 10, one superclass. {about}", paths["tsne"])
    truth = paper.y[paper.test].argmax(1)
    plot_confusion({row: confusion_matrix(truth, decide(paper, s).argmax(1), labels=range(K))
                    for (protocol, row, labels, _), s in scores.items()
                    if (protocol, labels) == ("paper", "100%")},
                   f"Fold 10, one superclass ({len(truth)} records). {about}", paths["confusion"])
    plot_roc(official.y[official.test], {row: scores["official", row, "100%", 0]["test"]
                                         for row in ("rocket", "untrained", "pretrained")},
             f"Fold 10, official protocol ({len(official.test)} records). {about}", paths["roc"])
    found = summarize(table)
    name, how = "leads", "Fold 10: trained on 12 leads, tested on fewer"
    if "leads-cv" in set(found.protocol):
        name, how = "leads-cv", "Fewer leads at test, cross-validated; all probes saw masked leads"
    leads = found[(found.protocol == name) & found.row.isin(ROWS)]
    plot_lines(leads.assign(x=leads.metric.str.split("/").str[1].astype(int)), "leads at test",
               f"{how}\n{about}", paths["leads"])
    few = found[(found.protocol == "official") & (found.metric == "macro_auroc")
                & found.row.isin(ROWS)]
    plot_lines(few.assign(x=[len(draw_labels(official, b, 0)) for b in few.labels]),
               "records with labels", f"Fold 10, few labels, mean and sd; draws: "
               f"{run.settings.seeds}. {about}", paths["labels"], log=True)
    return list(paths.values())


def evaluate(args):
    """Evaluate one run: metrics.csv, report.md and figures/ in its folder."""
    run = open_run(args)
    split = [task for task in run.tasks.values() if task.name != "cv"]
    notes = [f"{task.name}: {len(task.train)} records train, {len(task.choose)} choose, "
             f"{len(task.test)} test" for task in split]
    notes += [note for task in split for note in gaps(task)]
    notes.append(f"a probe sees of an encoder: {run.depends['readout']}, "
                 f"{run.models['pretrained'].width} features"
                 + ", and all probes each lead's amplitude" * args.amplitude)
    if run.out != run.folder:
        notes.append(f"pretrained on {run.saved['data']['data']}, evaluated on other data: "
                     f"{run.cache.meta['data']}")
    notes += [f"left out of the data: {problem}" for problem in run.cache.meta["left_out"][:20]]
    arch = run.saved["config"]["arch"]
    rows = [row for row in ROWS if not (args.fast and row in SLOW)
            and not (arch == "resnet18" and row.startswith("resnet18"))]
    print(f"{run.folder}: {describe(run.saved, run.cache.meta)}\nworking on what is not done yet:",
          flush=True)

    run.models["untrained"] = run.alike(untrained(run.saved["config"], run.trained["seed"],
                                                  run.device))
    if "resnet18" in rows:
        run.models["resnet18"] = run.alike(pretrain_resnet(run))
    run.encoders = make_encoders(run)
    run.features = {row: embeddings(run, row) for row in rows if row in run.encoders}
    scores = score_all(run, rows)
    probe = keep_probe(run, scores)
    table = (score_lines(run, scores) + cluster_lines(run) + quality_lines(run)
             + few_lines(run, rows, scores) + shortcut_lines(run) + training_lines(run.folder))
    if arch != "resnet18":
        table += stream_lines(run, probe)
    draws = {name_line(line): line["draws"] for line in table if line["draws"] is not None}
    others = [row for row in rows if row != "pretrained"]
    table = pd.DataFrame(table + differences({"": [pd.DataFrame(table)]},
                                             pairs_within("", others)))[[*KEYS, *NUMBERS]]
    about = dict(format=FORMAT, settings=vars(args), view=run.trained["view"],
                 seed=run.trained["seed"], notes=notes, data=run.cache.meta,
                 tested={name: len(task.test) for name, task in run.tasks.items()})
    figures = draw(run, table, scores)
    text = "\n\n".join([
        f"# {run.out}\n{describe(run.saved, run.cache.meta)}",
        "\n".join(f"- {note}" for note in notes),
        sections(summarize(table).assign(group="")), "## Figures",
        *(f"![{figure.stem}](figures/{figure.name})" for figure in figures)]) + "\n"
    save_arrays(run.out / "eval" / "draws.npz", draws)
    write_atomic(run.out / "report.md", lambda tmp: tmp.write_text(text))
    write_atomic(run.out / "metrics.csv", lambda tmp: table.to_csv(tmp, index=False))
    write_atomic(run.out / "eval" / "about.json",
                 lambda tmp: tmp.write_text(json.dumps(about, indent=1)))
    print(f"{text}\n-> {run.out}/report.md, metrics.csv, figures/")


# Recordings of one's own, and an encoder for others

def read_prepared(found, rate, shortest, given):
    """Recordings [(file, row)] as an encoder takes them, a tuple of each.

    name, x (W, T, C) float32 z-scored, leads that are there (C,), notes. One that cannot be used
    has no window, no lead, and the reason as its note.
    """
    items = []
    for path, row in found:
        try:
            recording = read_recording(path, row, **given)
            x, there, notes = prepare(recording, rate, shortest)
            x = normalize(torch.from_numpy(x)).numpy()
            items.append((recording.name, x, there, notes))
        except InputError as error:
            name = path.stem if row is None else f"{path.stem}-{row}"
            items.append((name, np.empty((0, 0, C)), np.zeros(C, bool), [str(error)]))
    return items


def encode(encoder, items):
    """Representations (n, d) of what read_prepared() gives: means over the windows of each."""
    z = torch.zeros(len(items), encoder.model.width)
    for length in {x.shape[1] for _, x, *_ in items}:  # windows of a length go through it together
        at = [i for i, (_, x, *_) in enumerate(items) if x.shape[1] == length]
        count = [len(items[i][1]) for i in at]
        x = torch.from_numpy(np.concatenate([items[i][1] for i in at]))
        keep = torch.from_numpy(np.repeat([items[i][2] for i in at], count, axis=0))
        parts = torch.cat([encoder(*part).cpu() for part in zip(x.split(64), keep.split(64))])
        z[at] = torch.stack([part.mean(0) for part in parts.split(count)])
    return z


def nearest_records(run, z, n):
    """The n training records nearest to each of z (N, d): a table for each of them.

    Distance: 1 - cosine of representations standardised over folds 1-8, 0..2.
    """
    path = Path(run) / "eval" / "embeddings-pretrained.npz"
    with refusing(f"--neighbours needs {path}, which an export has not", "give a run folder, after "
                  "make eval; if it is there but damaged, remove it and evaluate again"):
        saved = read_arrays(path)
        train = np.isin(saved["strat_fold"], TRAIN_FOLDS)
        known, labels, ids = (saved[key][train] for key in ("z", "labels", "ecg_id"))
        known = known.mean(1)
    scaler, words = StandardScaler().fit(known), np.array(CLASSES)
    search = NearestNeighbors(n_neighbors=min(n, len(known)), metric="cosine")
    found = search.fit(scaler.transform(known)).kneighbors(scaler.transform(z))
    return [pd.DataFrame(dict(
        ecg_id=ids[nearest], distance=[round(float(d), 3) for d in distance],
        superclasses=[" ".join(words[labels[j] > 0]) or "none" for j in nearest]))
        for distance, nearest in zip(*found)]


def tell_apart(names, found):
    """Names of recordings [(file, row)]; those that are not of one alone become paths of files.

    Such paths begin below the folder that holds all the files.
    """
    top = os.path.commonpath([os.path.abspath(path.parent) for path, _ in found])
    again = pd.Series(names).duplicated(keep=False)
    return [os.path.relpath(path, top) + ("" if row is None else f"-{row}") if twice else name
            for name, twice, (path, row) in zip(names, again, found)]


def embed_recordings(args):
    """Representations and probabilities of recordings: OUT.csv, OUT.npz; of a single one a figure.

    A recording that cannot be used is named, and the others go on; raises InputError when none can.
    """
    encoder, found = load_encoder(args.run, pick_device(args.device)), list_recordings(args.ecg)
    given = dict(rate=args.source_rate, unit=args.unit, leads=args.leads)
    many = len(found) > 32
    if many and args.workers:  # a core for them: else threads would wait for one another
        torch.set_num_threads(min(torch.get_num_threads(), max(1, os.cpu_count() - 1)))
    loader = DataLoader(found, 32, num_workers=args.workers if many else 0, collate_fn=partial(
        read_prepared, rate=encoder.rate, shortest=encoder.shortest, given=given))  # in the workers
    rows, z, out = [], [], Path(args.out or Path(args.run) / "embed")
    for items in tqdm(loader, unit=" recordings", unit_scale=32, disable=None if many else True):
        z += encode(encoder, [item for item in items if len(item[1])])
        rows += [(name, there.sum(), len(x), "; ".join(notes)) for name, x, there, notes in items]
    table = pd.DataFrame(rows, columns=["name", "leads", "windows", "notes"])
    table["name"], used = tell_apart(table.name, found), table.windows > 0
    if not z:
        raise InputError(f"none of {len(table)} recordings can be used:\n  "
                         + "\n  ".join(table.notes.head(10)))
    z = torch.stack(z)
    arrays = dict(z=z.numpy(), name=table.name[used].to_numpy(str))
    end = f"No probabilities, for want of a probe: make eval RUN={args.run}"
    if encoder.probe:
        arrays["probabilities"] = encoder.probabilities(z).numpy()
        table.loc[used, list(CLASSES)] = arrays["probabilities"]
        thresholds = ", ".join(map("{} {:.2f}".format, CLASSES, encoder.probe["thresholds"]))
        end = ("Probabilities: each class for itself; its F1 on fold 9 was best at "
               f"{thresholds}. For research: this is no medical device.")
    table = table.assign(notes=table.pop("notes"), file=[str(path) for path, _ in found])
    write_atomic(f"{out}.csv", lambda tmp: table.to_csv(tmp, index=False, float_format="%.6g"))
    save_arrays(Path(f"{out}.npz"), arrays)
    near = nearest_records(args.run, z.numpy(), args.neighbours) if args.neighbours else []
    shown = table[:20].drop(columns="file").map(lambda c: number(c) if isinstance(c, float) else c)
    text = [f"{used.sum()} of {len(table)} recordings, {z.shape[1]} features of each"
            + "; the first 20:" * (len(table) > 20), markdown(list(shown), shown.to_numpy())]
    text += [f"Nearest training records to {name}:\n{markdown(list(t), t.to_numpy())}"
             for name, t in zip(table.name[used][:20], near)]
    files = f"-> {out}.csv, {out}.npz"
    if len(table) == 1:
        path = Path(f"{out}-ecg.{args.format}")
        p = arrays["probabilities"][0] if encoder.probe else []
        draw_recording(encoder, items[0], p, near[0].iloc[0] if near else None, path, args.run)
        files += f", {path}"
    print("\n\n".join([*text, end, files]))


def lead_attention(encoder, x, keep):
    """How each lead's token attends over time, relative to uniform: (C, N), and seconds covered.

    x: (1, T, C) a window; keep: (1, C). None for encoders whose channel tokens are no leads.
    """
    model, views = encoder.model, encoder.views
    x, keep = x.to(encoder.model.device), keep.to(encoder.model.device)
    if model.config.arch != "dualview" or model.config.mix_leads:
        return None
    maps, seconds = [], views.timing()[0] * SECONDS
    cut = views.split(x) if x.shape[1] == SECONDS * encoder.rate else [x]
    for view in cut if 2 * seconds == SECONDS else cut[:1]:  # halves stand side by side
        heads = []
        watch_attention(model, view * keep[:, None], lambda name, layer, head, weights: (
            heads.append(weights[0]) if name == "channel_to_time" else None), keep)
        maps.append(torch.stack(heads).mean(0) * heads[0].shape[1])
    return torch.cat(maps, dim=1).cpu().numpy(), seconds * len(maps)


def draw_traces(axis, x, there, seconds, title):
    """Traces of a window (T, C), z-scored, one above another; those of absent leads are grey."""
    t = np.linspace(0, seconds, len(x), endpoint=False)
    for c, lead in enumerate(LEADS):
        axis.plot(t, c - (x[:, c] / 12).clip(-0.8, 0.8), linewidth=0.6,
                  color="black" if there[c] else "0.8")
    axis.set(title=title, xlabel="time (s)", ylim=(len(LEADS), -1), xlim=(0, seconds))
    axis.set_yticks(range(len(LEADS)), LEADS)


def draw_recording(encoder, item, p, near, path, run):
    """The first window of an item of read_prepared(), with each lead's attention over time.

    Beside it the nearest training record of the run, if `near` names one, and probabilities p (K,),
    or none without a probe.
    """
    name, x, there, _ = item
    seconds, traces = x.shape[1] / encoder.rate, 1 if near is None else 2
    figure = Figure((5 + 5 * traces, 6), layout="constrained")
    left, *right, bars = figure.subplots(1, traces + 1, width_ratios=[4] * traces + [1])
    draw_traces(left, x[0], there, seconds, f"{name}, first {seconds:g} s")
    seen = lead_attention(encoder, torch.from_numpy(x[:1]), torch.from_numpy(there)[None])
    if seen:
        image = left.imshow(seen[0], cmap="Oranges", vmin=0, aspect="auto", interpolation="nearest",
                            extent=(0, seen[1], len(LEADS) - .5, -.5))
        figure.colorbar(image, ax=left, label="each lead's attention over time, 1: uniform",
                        shrink=0.6, location="bottom")
    if near is not None:
        _, cache = open_data(run, read_args(run))
        at = np.flatnonzero(cache.index.ecg_id == near.ecg_id)[0]
        signal = normalize(torch.from_numpy(cache.signals[at].copy())).numpy()
        draw_traces(right[0], signal, np.ones(C), SECONDS, f"nearest training record: ecg_id "
                    f"{near.ecg_id} ({near.superclasses}), distance {near.distance:.2f}")
    if len(p):
        bars.bar(CLASSES, p, color=list(CLASS_COLORS.values()))
        bars.scatter(CLASSES, encoder.probe["thresholds"], marker="_", s=300, color="black")
    bars.set(ylim=(0, 1), title="probabilities\nand thresholds" if len(p) else "no probe yet")
    bars.tick_params(axis="x", labelsize=7)
    save_figure(figure, path, dict(x=x[0], there=there, attention=seen[0] if seen else []))


def export_run(args):
    """Write the encoder of an evaluated run, with its probe and a model card, into a folder."""
    encoder, folder = load_encoder(args.run), Path(args.run)
    if encoder.probe is None:
        raise InputError(f"{args.run} has no probe to export: make eval RUN={args.run} first")
    out, about = Path(args.out or folder / "export"), encoder.about
    (run,) = read_evaluated([folder])
    found = summarize(run["table"])
    scores = grid(found[found.protocol.isin(("official", "cv")) & (found.labels == "100%")
                        & found.row.isin(("pretrained", "untrained", "rocket"))],
                  ["protocol", "row"], ["macro_auroc"])
    card = "\n\n".join([
        f"# {folder.name}: an encoder of 12-lead ECGs", textwrap.fill(
            f"Pretrained without labels on folds 1-8 of {about['data']}, {about['records']} "
            f"records in all, at {about['rate']} Hz, view {encoder.views.describe()}. "
            f"{n_parameters(encoder.model):,} parameters, {encoder.model.width} features. With a "
            f"linear probe of {', '.join(CLASSES)} from the labels of the same folds.", 99),
        f"    encoder = load_encoder({str(out)!r})  # of model.py, of the code that trained it\n"
        "    x, keep = encoder.prepare(signal, rate=500, unit='mV', leads=['I', 'II', 'V2'])\n"
        "    z = encoder(x, keep).mean(0)\n    p = encoder.probabilities(z)", scores, textwrap.fill(
            "By make eval: fold 10, or each record by a probe of the other folds; 95 % intervals "
            "over patients. Not measured on other hospitals, recorders and populations. "
            "Amplitudes are lost in normalisation, so that hypertrophy is seen less well than it "
            "could be.", 99),
        "**This is no medical device.** It is for research, not for the diagnosis or treatment of "
        "anybody.", f"Data fingerprint {about['fingerprint']}. PTB-XL is CC BY 4.0 (doi "
        "10.1038/s41597-020-0495-6), the code MIT."]) + "\n"
    export(encoder, out, card)
    print(f"-> {out}: encoder.safetensors, encoder.json, README.md; open it with "
          f"model.load_encoder({str(out)!r})")


# Several runs

def read_evaluated(folders):
    """The evaluated among run folders: dicts of folder, table, about, saved, index, n_draws."""
    runs = []
    for folder in map(Path, folders):
        if not (folder / "metrics.csv").exists():
            print(f"note: {folder} has no metrics.csv and is left out; make eval RUN={folder}")
            continue
        with refusing(f"{folder} is damaged", f"evaluate it again: make eval RUN={folder}"):
            about = json.loads((folder / "eval" / "about.json").read_text())
            if about["format"] != FORMAT:
                print(f"note: {folder}, which other code evaluated, is left out; make eval "
                      f"RUN={folder}")
                continue
            table = pd.read_csv(folder / "metrics.csv", dtype=dict.fromkeys(NUMBERS, float))
            if list(table) != [*KEYS, *NUMBERS]:
                raise ValueError("metrics.csv has other columns")
            draws = read_arrays(folder / "eval" / "draws.npz")
            names = [name_line(line) for _, line in table.iterrows()]
            if not {*draws} <= {*names}:
                raise ValueError("metrics.csv is not whole")
            table["draws"] = [draws.get(name) for name in names]
            (n_draws,) = {len(some) for some in table.draws.dropna()}  # an error if there are none
            runs.append(dict(folder=folder, table=table, about=about, saved=read_args(folder),
                             index=about["data"]["index"], n_draws=n_draws))
            overview(group_runs(runs[-1:]))  # looks at what compare() will look at
    if not runs:
        raise InputError(f"no evaluated run among {len(folders)} folders: train and evaluate some "
                         "first (make pretrain, make eval)")
    if len({run["n_draws"] for run in runs}) > 1:
        raise InputError("evaluate again with the same --bootstrap: " + ", ".join(
            f"{run['folder']} has {run['n_draws']}" for run in runs))
    return runs


def group_runs(runs):
    """Runs whose folders differ by -s0, -s1, ... at the end alone, together: {name: runs}, by view.

    Raises InputError where runs of one name differ by more than their seed, or not even by it.
    """
    def settings(run):
        about, args = run["about"], with_defaults(run["saved"]["args"])
        of_evaluation = {k: about["settings"][k] for k in ("readout", "amplitude", "label_lr")}
        return of_evaluation | {k: v for k, v in args.items() if k not in NOT_A_RESULT | {"seed"}
                                } | dict(data=about["data"]["fingerprint"][:6])

    groups, known = {}, {run["folder"]: settings(run) for run in runs}
    for run in sorted(runs, key=lambda run: list(VIEWS).index(run["about"]["view"])):
        groups.setdefault(re.sub(r"-s\d+$", "", run["folder"].name), []).append(run)
    for one, other in chain(*(combinations(members, 2) for members in groups.values())):
        a, b = known[one["folder"]], known[other["folder"]]
        differ = [f"{k} {a[k]} and {b[k]}" for k in b if a[k] != b[k]]
        if one["about"]["seed"] == other["about"]["seed"]:
            differ = differ or ["have the same seed"]
        if differ:
            raise InputError(f"{one['folder']} and {other['folder']} are of one name, but "
                             f"{', '.join(differ)}; leave one out, or give a folder another name")
    return groups


def compared(groups):
    """Numbers of groups of runs: mean, sd and count over seeds; then paired differences.

    After the last group of a view come the paper's own; differences: between rows and groups.
    """
    parts, tables, first = [], {}, {group: runs[0] for group, runs in groups.items()}
    last = {run["about"]["view"]: group for group, run in first.items()}
    for group, runs in groups.items():
        tables[group] = [run["table"] for run in runs]
        found = summarize(pd.concat(map(summarize, tables[group])))
        parts.append(found[~found.row.str.contains(" - ")].assign(group=group, of=len(runs)))
        view = first[group]["about"]["view"]
        if last[view] == group:
            table3 = *(f"f1/{name}" for name in CLASSES), "accuracy", "macro_f1"
            paper = (lines("clustering", "paper", dict(zip(CLUSTERING, VIEWS[view].table2 or ())))
                     + lines("table3", "paper", dict(zip(table3, VIEWS[view].table3 or ()))))
            parts.append(pd.DataFrame(paper).assign(group=view, n=1, of=1))
    wanted = [pair for group in groups
              for pair in pairs_within(group, ("untrained", "rocket", "finetuned"))]
    wanted += [((a, row), (b, row)) for a, b in combinations(groups, 2)
               if first[a]["index"] == first[b]["index"]
               for row in ("pretrained", "untrained")]
    parts.append(pd.DataFrame(differences(tables, wanted)).assign(group="", n=1, of=1))
    return pd.concat(parts).drop(columns=["seed", "draws"])


def overview(groups):
    """A Markdown table of the groups: data, how many records test, seeds."""
    rows = []
    for label, members in groups.items():
        about = members[0]["about"]
        rows.append([
            label, describe_data(about["data"]), about["data"]["rate"], about["data"]["records"],
            *(about["tested"][name] for name in ("official", "paper", "table3")),
            " ".join(str(run["about"]["seed"]) for run in members)])
    return markdown(["group", "data", "Hz", "records", "tested: official", "paper", "table3",
                     "seeds"], rows)


def compare(args):
    """Tables over several runs, the paper's numbers beside ours: OUT.md and OUT.csv."""
    groups = group_runs(read_evaluated(args.runs))
    numbers = compared(groups)
    text = "\n\n".join([
        "# Comparison of runs\nMean ± standard deviation over seeds. **The paper**: its own "
        "numbers, on all of PTB-XL (its clustering scores are the best of each run, ours those of "
        "the final weights).", overview(groups), sections(numbers),
        "## Published on all of PTB-XL\nMacro AUROC, fold 10, official protocol, as others report "
        "it: not measured here, and not comparable with runs on other data.",
        markdown(["method", "macro AUROC", "source"],
                 [[n, number(v), s or "not checked by us"] for n, v, s in PUBLISHED])]) + "\n"
    write_atomic(f"{args.out}.md", lambda tmp: tmp.write_text(text))
    write_atomic(f"{args.out}.csv", lambda tmp: numbers.to_csv(tmp, index=False))
    print(f"{text}-> {args.out}.md, .csv")


# A study: several seeds of several settings, for one question

@dataclass(frozen=True)
class Study:
    """A question, and flags of train.py for each row that answers it.

    Of a row's flags {more} are epochs that cost plain accumulation what the exact gradient costs,
    {tenth} a tenth of the epochs, {batch} the automatic batch and {part} a quarter of it. bases:
    {row: the one that it is compared with}, by default the best. evaluated: False for costs alone.
    """

    question: str
    rows: dict
    bases: dict = field(default_factory=dict)
    evaluated: bool = True


def equal_rows():
    """Flags and bases of each view on equal terms: with lead masking, without, with the pool."""
    rows, bases = {}, {}
    for name, view in VIEWS.items():
        rows[name] = f"--view {name} --equal"
        changed = {f"{name}-masked": "--mask-leads"}
        if view.masked:
            changed = {f"{name}-unmasked": "--no-mask-leads", f"{name}-pool": "--augment-p 0.5"}
        if view.cut is not whole or not view.masked:  # else they are the same record, or there
            rows |= {row: f"{rows[name]} {flags}" for row, flags in changed.items()}
            bases |= dict.fromkeys(changed, name)
    return rows, bases


# The Makefile reads the names here: an entry begins on a line of its own.
STUDIES = {
    "views": Study("Which view makes the better representation, each as in the paper?",
                   {name: f"--view {name}" for name in VIEWS}),
    "equal": Study("What is left of the differences between views when all have the same rate, "
                   "seconds and tokens, and all encoders are probed on the same input? What do "
                   "lead masking and the pool add to each?", *equal_rows()),
    "streams": Study("Which stream does the representation rest on, and what changes that?", dict(
        contig="--view contig", unmasked="--view contig --no-mask-leads",
        late="--view contig --late-masking", dropout="--view contig --channel-dropout 0.3",
        gates="--view contig --gate-channel", aux="--view contig --aux-losses",
        mix="--view contig --mix-leads", noncontig="--view noncontig",
        stochastic="--view stochastic"), dict.fromkeys(
            ("unmasked", "late", "dropout", "gates", "aux", "mix", "noncontig", "stochastic"),
            "contig")),
    "collapse": Study("Do scores fall again along training, and do they fall together?",
                      {name: f"--view {name} --keep-every {{tenth}}" for name in VIEWS}),
    "departures": Study("What is each departure from the paper worth?", dict(
        contig="--view contig", micro="--view contig --negatives micro --micro-batch {part} "
        "--epochs {more}", mix="--view contig --mix-leads", bf16="--view contig --bf16-weights",
        stochastic="--view stochastic", shipped="--view stochastic --shipped-filter"),
        dict(micro="contig", mix="contig", bf16="contig", shipped="stochastic")),
    "cost": Study("What does a step cost, and what do its alternatives?", {
        row: "--batch-size {batch} --micro-batch {part} " + flags for row, flags in dict(
            exact="", plain="--negatives micro", torchnn="--arch torchnn", compiled="--compile",
            stochastic="--view stochastic").items()} | {
                "one-part": "--batch-size {part} --micro-batch {part}"},
        dict.fromkeys(("plain", "torchnn", "compiled", "stochastic", "one-part"), "exact"), False)}


@dataclass
class Member:
    """A run of a study: its row, seed and folder, flags of train.py, and what failed."""

    row: str
    seed: int
    folder: Path
    flags: list
    failed: str = ""


def plan_study(args):
    """The Members of a study, seed by seed, but for rows that a preset cannot have, or has anyway.

    Raises InputError, before any is trained, where no row is left.
    """
    caches = {cache.meta["rate"]: cache for cache in map(open_cache, args.caches)}
    first, members, refused, rows = next(iter(caches.values())), [], {}, {}
    get_args(["run", *shlex.split(args.eval)])  # ends here when they are wrong
    common = ["--preset", args.preset, *shlex.split(args.train)]
    usual = train_args(common)
    plan, _ = settle(usual, len(first.rows(TRAIN_FOLDS)), len(first.rows([VAL_FOLD])))
    passes = 4 if plan.batch > plan.micro else 3  # forward, and forward and backward
    words = dict(more=round(usual.epochs * passes / 3), tenth=max(usual.epochs // 10, 1),
                 batch=plan.batch, part=max(plan.batch // 4, 2))
    for seed, (row, text) in product(range(args.seeds), STUDIES[args.study].rows.items()):
        flags = [*common, "--seed", str(seed), *text.format(**words).split()]
        parsed = vars(train_args(flags))
        views = from_args(ViewConfig, parsed)
        try:
            from_args(Config, parsed)
            if (twin := rows.setdefault(str(parsed), row)) != row:
                raise InputError(f"with this preset it is {twin}")
        except InputError as error:  # such as late masking, with a stem of conv
            refused[row] = error
            continue
        rate = VIEWS[views.view].rate if args.study == "views" else min(caches)
        folder = Path(args.out) / f"{row}-s{seed}"
        members.append(Member(row, seed, folder, [
            *flags, "--cache", str(caches.get(rate, first).folder), "--run", str(folder),
            "--device", args.device]))
    if not members:
        raise next(iter(refused.values()))
    for row, error in refused.items():
        print(f"note: row {row} is left out: {error}")
    return members


def work_on(member, args, children):
    """Train and evaluate one run of a study, what is not done yet; keep in it what fails.

    children: the processes at work, of all runs
    """
    def call(script, *flags):
        threads = {} if args.jobs == 1 else dict(OMP_NUM_THREADS=str(
            max(1, os.cpu_count() // args.jobs)))
        with open(log, "a") as file:
            child = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name(script)), *flags],
                stdout=file, stderr=file, env=os.environ | threads)
            children.add(child)
            child.wait()
            children.remove(child)
        if child.returncode:
            said = log.read_text().strip()
            said = said[max(said.rfind("error: "), 0):][:300]  # an error of ours is one message
            raise RuntimeError(f"{script}, see {log}: {said}")

    log, study = Path(args.out) / "logs" / f"{member.folder.name}.txt", STUDIES[args.study]
    try:
        call("train.py", *member.flags)
        if not (member.folder / "model.pt").exists():
            raise RuntimeError("train.py was told to stop before its end")
        for folder in kept(member) if study.evaluated else []:
            flags = ["run", "--run", str(folder), "--device", args.device, *shlex.split(args.eval)]
            about = folder / "eval" / "about.json"
            old = json.loads(about.read_text()) if about.exists() else {}
            if (old.get("settings"), old.get("format")) != (vars(get_args(flags)), FORMAT):
                call("evaluate.py", *flags)
    except Exception as error:  # the others go on
        member.failed = str(error) or repr(error)
    return f"{member.folder.name}: {'failed' if member.failed else 'done'}"


def kept(member):
    """The weights that a run has kept along training, the last ones at last: {folder: epoch}."""
    last = len(read_log(member.folder))
    epochs = {folder: int(folder.name[6:]) for folder in sorted(member.folder.glob("epoch-*"))}
    return {folder: epoch for folder, epoch in epochs.items() if epoch < last} | {
        member.folder: last}


def run_study(args):
    """Train and evaluate the runs of a study, then write its report and figures.

    A run that fails is named, and the others go on; the same command again does what is left.
    Raises InputError before work starts for flags that no run could have, and at the end when
    runs have failed.
    """
    members, out, children = plan_study(args), Path(args.out), set()
    (out / "logs").mkdir(parents=True, exist_ok=True)
    print(f"{args.study}: {len(members)} runs, {args.jobs} at a time, in {out}; what each of them "
          f"says is in {out / 'logs'}", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the children too
    with ThreadPoolExecutor(args.jobs) as workers:
        work = [workers.submit(work_on, member, args, children) for member in members]
        try:
            for done in tqdm(as_completed(work), total=len(work), unit="run", disable=None):
                tqdm.write(done.result())
        except BaseException:
            workers.shutdown(wait=False, cancel_futures=True)
            for child in list(children):
                child.terminate()
            raise
    if len(failed := [m for m in members if m.failed]) < len(members):
        write_study(args, members)
    if failed:
        said = "\n".join(f"  {m.folder.name}: {m.failed}" for m in failed)
        raise InputError(f"{len(failed)} of {len(members)} runs failed; mend it and give the same "
                         f"command again, the others are done:\n{said}")


def write_study(args, members):
    """report.md, numbers.csv and figures/ of a study, of the runs that are finished."""
    study, out = STUDIES[args.study], Path(args.out)
    rows = {row: [m for m in members if m.row == row and not m.failed] for row in study.rows}
    done = {row: some for row, some in rows.items() if some}
    first = read_args(next(iter(done.values()))[0].folder)
    meta, plan = first["data"], first["in_effect"]
    evaluated = f"; evaluated with `{args.eval}`" * study.evaluated
    text = [f"# Study: {args.study}", f"**Question.** {study.question}",
            f"**Set-up.** {describe_data(meta)}, {count_records(meta)}; preset {args.preset} "
            f"{args.train}; {plan['total']} steps of {plan['batch']} records{evaluated}. Rows "
            "differ in these flags alone:",
            markdown(["row", "flags", "Hz", "seeds"], [
                [row, study.rows[row] or "none",
                 " ".join({str(read_args(m.folder)["data"]["rate"]) for m in some}) or "-",
                 " ".join(str(m.seed) for m in some) or (
                     "**failed**" if row in {m.row for m in members} else "left out")]
                for row, some in rows.items()])]
    if lacking := ", ".join(m.folder.name for m in members if m.failed):
        text.append(f"**Not here**, for want of a finished run: {lacking}.")
    numbers, found = (findings if study.evaluated else costs)(args, done)
    text += found
    write_atomic(out / "report.md", lambda tmp: tmp.write_text("\n\n".join(text) + "\n"))
    write_atomic(out / "numbers.csv", lambda tmp: numbers.to_csv(tmp, index=False))
    print("\n\n".join(text[:9]) + f"\n\n-> {out}/report.md, numbers.csv, figures/")


def costs(args, done):
    """Numbers and Markdown of what runs cost that are not evaluated; done: {row: Members}."""
    numbers = pd.concat([summarize(pd.concat(
        pd.DataFrame(training_lines(m.folder)) for m in some)).assign(group=row, of=len(some))
        for row, some in done.items()])
    text = [grid(numbers, ["group"], COSTS)]
    for base in set(STUDIES[args.study].bases.values()) & {*done}:
        of = numbers.metric.map(numbers[numbers.group == base].set_index("metric").value)
        ratios = numbers.assign(value=numbers.value / of, sd=np.nan)
        text += [f"Ratios to {base}:", grid(ratios, ["group"], COSTS)]
    return numbers, text


def findings(args, done):
    """Numbers, and Markdown of answer, figures and tables; done: {row: Members}."""
    groups = {row: read_evaluated([m.folder for m in some]) for row, some in done.items()}
    numbers = compared(groups)
    text = answer(STUDIES[args.study], numbers) + beside_paper(numbers)
    shutil.rmtree(Path(args.out) / "figures", ignore_errors=True)  # of runs that may have gone
    if args.study == "collapse":
        text += collapse(args, chain(*done.values()))
    text += draw_study(args, groups)
    rate = {row: runs[0]["about"]["data"]["rate"] for row, runs in groups.items()}
    again = [row for i, row in enumerate(rate) if rate[row] in list(rate.values())[:i]]
    of_no_run = numbers.row.isin(("majority", "rocket")) & numbers.group.isin(again)
    return numbers, text + [
        "# All numbers\nMean ± standard deviation over seeds. **The paper**: its own numbers, on "
        "all of PTB-XL, the best of each run. What depends on no run stands beside the first.",
        overview(groups), sections(numbers[~of_no_run])]


def by_name(numbers):
    """Summarized lines with all labels: {(protocol, row, metric, group): line}."""
    return {(line.protocol, line.row, line.metric, line.group): line
            for line in numbers[numbers.labels == "100%"].itertuples()}


def headline_of(numbers):
    """The protocol that a study rests on: cross-validated where it was asked for."""
    return "cv" if "cv" in set(numbers.protocol) else "official"


def answer(study, numbers):
    """The answer of a study as Markdown: what each row is worth, and what its streams are."""
    known, auroc, headline = by_name(numbers), "macro_auroc", headline_of(numbers)

    def of(protocol, row, metric=auroc, group=""):
        return cell(known.get((protocol, row, metric, group)))

    worth = {group: line.value for (*what, group), line in known.items()
             if what == [headline, "pretrained", auroc]}
    first, order = next(iter(worth)), sorted(worth, key=worth.get, reverse=True)
    best, bases = order[0], set(study.bases.values())
    scores = [["ROCKET", of(headline, "rocket", auroc, first), *["-"] * 5,
               of("shortcuts", "rocket", "heart_rate", first), "-"]]
    streams, words = [], {"above": [], "below": [], "not told apart from": []}
    for row in order:
        base, beside = study.bases.get(row, best), ["-", "-"]
        line, turned = (known.get((headline, f"{a}: pretrained - {b}: pretrained", auroc, ""))
                        for a, b in ((row, base), (base, row)))
        if turned:
            line = turned._replace(value=-turned.value, low=-turned.high, high=-turned.low)
        if line and bases != {row}:  # the only base is compared with none
            beside = [base, cell(line)]
            how = "above" if line.low > 0 else "below" if line.high < 0 else "not told apart from"
            words[how].append(f"{row} ({base})")
        scores.append([
            row, of(headline, "pretrained", auroc, row), of(headline, "untrained", auroc, row),
            of(headline, f"{row}: pretrained - {row}: untrained"), *beside,
            of("quality", "pretrained", "shift", row),
            *(of("shortcuts", name, "heart_rate", row) for name in ("pretrained", "untrained"))])
        streams.append([
            row, of("streams", STREAMS[0], auroc, row),
            *(of("streams", f"{row}: {STREAMS[0]} - {row}: {stream} stream sees nothing")
              for stream in ("time", "channel")),
            *(of("training", "pretrained", name, row)
              for name in ("grad_norm_ratio", "grad_norm_ratio_corrected")),
            of("quality", "pretrained", "stream_cka", row)])
    said = "; ".join(f"{how} its base: {', '.join(rows)}" for how, rows in words.items() if rows)
    if {*order} - {*study.bases} - (bases if len(bases) == 1 else set()):
        said += f". Where a row has no base of its own, it is {best}, the best on these scores"
    title = next(s.title for s in SECTIONS if s.protocol == headline)
    return [f"**Answer.** Macro AUROC ({title.lower()}). With the base in brackets, {said}.",
            markdown(["row", "pretrained", "untrained", "difference", "base", "minus base", "shift",
                      "heart rate (R²)", "untrained"], scores),
            "**Limits.** Intervals resample patients and, where there are several seeds, these; "
            "they are not corrected for the number of comparisons, and hold for this data, model "
            "and length of training. `shift`: 0 if it is no matter when beats fall.",
            "**Streams.** What the probe loses on folds 9 and 10 when a stream is fed zeros; the "
            "ratio of the streams' gradient norms, channel over time.",
            markdown(["row", "both", "lost without time", "lost without channel",
                      "ratio as in the paper", "ratio, corrected", "CKA of the streams"], streams)]


def beside_paper(numbers):
    """Markdown: the paper's differences between views in Table 3, and what is left of them here."""
    rows, known = [], by_name(numbers)
    for a, b in combinations([name for name, view in VIEWS.items() if view.table3], 2):
        here = [known.get(("table3", f"{a}: pretrained - {b}: pretrained", metric, ""))
                for metric in ("accuracy", "macro_f1")]
        paper = np.subtract(VIEWS[a].table3, VIEWS[b].table3)[-2:]
        if any(here):
            rows.append([f"{a} - {b}", f"{paper[0]:.2f}", cell(here[0]), f"{paper[1]:.2f}",
                         cell(here[1])])
    return ["**The paper's differences** (Table 3), and what is left of them here.", markdown(
        ["views", "accuracy: paper", "here", "macro F1: paper", "here"], rows)] if rows else []


def collapse(args, members):
    """Of weights kept along training: a figure of the scores, and a table of best and last."""
    tables, parts, rows = {}, [], []  # tables: of the runs of a row, at an epoch
    for m in members:
        for folder, epoch in kept(m).items():
            (run,) = read_evaluated([folder])
            t = run["table"]
            tables.setdefault((m.row, epoch), []).append(t)
            parts.append(t[(t.row == "pretrained") & (t.labels == "100%")].assign(
                row=m.row, run=m.folder.name, epoch=epoch, view=run["about"]["view"]))
    table = pd.concat(parts).drop(columns="draws")
    protocols = {"macro_auroc": headline_of(table)} | dict.fromkeys(
        CLUSTERING, "clustering") | dict.fromkeys(QUALITY, "quality")
    table = table[table.metric.map(protocols) == table.protocol]
    axes, corner = panels(len(protocols), (2.6, 3), "Scores along training, mean over seeds", 1)
    for axis, (metric, protocol) in zip(axes, protocols.items()):
        for row, part in table[table.metric == metric].groupby("row", sort=False):
            means = part.groupby("epoch").value.mean()
            best = means.idxmin() if metric in LOW_IS_GOOD else means.idxmax()
            last = means.index[-1]
            lost = {line["metric"]: number(line["value"], (line["low"], line["high"]))
                    for line in differences(
                        {"last": tables[row, last], "best": tables[row, best]},
                        [(("last", "pretrained"), ("best", "pretrained"))])
                    if line["protocol"] == protocol}
            axis.plot(means, "o-", label=row, color=VIEWS[part["view"].iloc[0]].color)
            rows.append([row, metric, number(means[best]), best, number(means[last]), last,
                         lost.get(metric, "-")])
        axis.set(title=metric, xlabel="epoch")
    corner.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(corner.figure, Path(args.out) / "figures" / f"collapse.{args.format}", table)
    return ["**Along training.** The best of each score, which is what the paper reports, and the "
            "last. The best is chosen on these scores, which makes it too good and the difference "
            "too large.", markdown(
                ["row", "score", "best", "epoch", "last", "epoch", "last - best"], rows)]


def draw_study(args, groups):
    """t-SNE of all rows in one figure; curves and attention by attention.py, a process of its own.

    Returns the Markdown that shows them.
    """
    first, figures = {row: runs[0] for row, runs in groups.items()}, Path(args.out) / "figures"
    tsne = {row: read_arrays(run["folder"] / "eval" / "tsne.npz") for row, run in first.items()}
    points = {"untrained": next(iter(tsne.values()))["untrained"]} | {
        row: of_run["pretrained"] for row, of_run in tsne.items()}
    *_, run = first.values()  # the records are those of all
    saved, about = read_arrays(run["folder"] / "eval" / "embeddings-pretrained.npz"), run["about"]
    at = (saved["labels"].sum(1) == 1) & np.isin(saved["strat_fold"], (VAL_FOLD, TEST_FOLD))
    plot_tsne(points, saved["labels"][at].argmax(1), saved["ecg_id"][at],
              f"t-SNE, folds 9 and 10, one superclass. {describe_data(about['data'])}, seed "
              f"{about['seed']}; `untrained` is of {next(iter(first))}",
              figures / f"tsne.{args.format}")
    drawn = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("attention.py")), "plots",
         *(str(run["folder"]) for run in first.values()), "--out", str(figures), "--format",
         args.format, "--superclass", "NORM", "--records", "16", "--device", args.device],
        capture_output=True, text=True)
    text = [f"![{path.stem}](figures/{path.name})"
            for path in sorted(figures.glob(f"*.{args.format}"))]
    if drawn.returncode:
        return [*text, f"**Not here**: figures of training and attention: {drawn.stderr[-300:]}"]
    return [*text, *(path.read_text() for path in figures.glob("attention-views.md"))]


def budget(text):
    """The `type` of --labels."""
    if not re.fullmatch(r"[1-9]\d*(shot)?|(100|[1-9]\d?)%", text):
        raise argparse.ArgumentTypeError(
            f"{text}: give such as 10, for 10 records in all, 10shot, for 10 a class, or 1%, 10%, "
            "100% of the training records")
    return text


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    command = partial(parser.add_subparsers(dest="command", required=True).add_parser,
                      formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    count = bounded(int, 1)

    p = command("run", help="evaluate one run")
    p.add_argument("--run", default="runs/noncontig-s0", help="a finished run folder")
    p.add_argument("--fast", action="store_true", help="leave out the rows that train networks: "
                   "fine-tuning, from scratch, ResNet-18; the report is then without them")
    p.add_argument("--cv", nargs="*", choices=("labels", "leads"), help="score every labelled "
                   "record of all folds by probes of the other folds as well: narrower intervals "
                   "on small data; --cv labels leads: also with few labels, and with fewer leads")
    p.add_argument("--readout", choices=READOUTS, help="what a probe sees of an "
                   "encoder; by default as the run was trained for")
    p.add_argument("--amplitude", action="store_true", help="all probes see each lead's amplitude "
                   "too, which normalisation takes away")
    p.add_argument("--labels", nargs="+", type=budget, default=["10", "10shot", "10%"],
                   help="few labels: 10 for 10 records in all (paper), 10shot for 10 a class, or "
                   "shares such as 1%% 10%% 100%%")
    p.add_argument("--seeds", type=count, default=3, help="draws of few labels")
    p.add_argument("--label-lr", type=bounded(float, 1e-12), help="peak learning rate of networks "
                   "trained with labels (a fine-tuned encoder takes a tenth); by default the run's "
                   "--max-lr")
    p.add_argument("--bootstrap", type=count, default=1000, help="resamples, by patient")
    add_shared(p, "cache", "device", "format")

    p = command("embed", help="representations and probabilities of your recordings")
    p.add_argument("ecg", nargs="+", help="files (WFDB, EDF, npy, npz, CSV, HDF5) or folders")
    p.add_argument("--run", default="runs/noncontig-s0", help="an evaluated run, or an export")
    p.add_argument("--source-rate", type=bounded(float, 1), help="Hz, where the file does not tell")
    p.add_argument("--unit", help="mV, uV or V, where the file does not tell it")
    p.add_argument("--leads", nargs="+", help="names of the columns, where the file has none")
    p.add_argument("--neighbours", type=bounded(int, 0), default=0, help="name so many of the "
                   "training records that are nearest")
    p.add_argument("--out", help="OUT.csv, OUT.npz, and OUT-ecg.png of a single recording; by "
                   "default RUN/embed")
    p.add_argument("--workers", type=bounded(int, 0), default=min(4, os.cpu_count() or 1),
                   help="processes that read recordings ahead of the encoder")
    add_shared(p, "device", "format")

    p = command("export", help="one folder with all that the encoder needs elsewhere")
    p.add_argument("--run", default="runs/noncontig-s0", help="an evaluated run")
    p.add_argument("--out", help="folder; by default RUN/export")

    p = command("compare", help="tables over several evaluated runs")
    p.add_argument("runs", nargs="*", help="run folders; those not evaluated are named, left out")
    p.add_argument("--out", default="runs/compare", help="tables go to OUT.md and OUT.csv")

    p = command("study", help="train, evaluate and compare runs, for one question")
    p.add_argument("--study", choices=STUDIES, default="views", help="; ".join(
        f"{name}: {study.question}" for name, study in STUDIES.items()))
    p.add_argument("--caches", nargs="+", default=["cache/ptbxl-100", "cache/ptbxl-500"],
                   help="views: each view's own rate, where it is there; else the lowest")
    p.add_argument("--preset", choices=PRESETS, default="paper", help="of all runs")
    p.add_argument("--seeds", type=count, default=3, help="runs of each row")
    p.add_argument("--train", default="", help="further flags of train.py for all runs, one string")
    p.add_argument("--eval", default="--fast --cv", help="flags of evaluate.py run, one string")
    p.add_argument("--jobs", type=count, default=1, help="runs at a time, which share the cores")
    p.add_argument("--out", default="runs/study", help="folder of the runs and the report")
    add_shared(p, "device", "format")
    return parser.parse_args(argv)


def main(args):
    dict(run=evaluate, embed=embed_recordings, export=export_run, compare=compare,
         study=run_study)[args.command](args)


if __name__ == "__main__":
    run_script(lambda: main(get_args()))
