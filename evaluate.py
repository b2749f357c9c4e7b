"""What a pretrained encoder is worth on PTB-XL's superclasses, beside baselines (paper 5.1, 5.3).

In:  a finished run folder of train.py, and the cache that it was trained on (or one like it).
Out: in that folder metrics.csv, every number, a line each: protocol, row, labels, seed, metric,
     value, low, high; report.md and figures/, which are made from it; eval/: finished pieces of
     work, each kept while nothing changes that it depends on (ROCKET's: in the cache).
     eval/embeddings-pretrained.npz has z (N, S, d) float32, S = 1 or 2 views, ids and labels.

    python evaluate.py run --run runs/noncontig-s0
    python evaluate.py run --run runs/demo-noncontig-s0 --fast
    python evaluate.py compare runs/noncontig-s0 runs/contig-s0 --out runs/compare
    python evaluate.py bench cache/ptbxl-100 cache/ptbxl-500
"""
import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from argparse import Namespace
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Optional

import numpy as np
import pandas as pd
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from scipy.spatial.distance import pdist
from scipy.special import expit
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.metrics import (ConfusionMatrixDisplay, RocCurveDisplay, accuracy_score,
                             confusion_matrix, f1_score, precision_recall_curve, roc_auc_score)
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from data import (CLASSES, LEADS, RATES, TEST_FOLD, TRAIN_FOLDS, VAL_FOLD, InputError, add_shared,
                  bounded, from_args, load_tables, normalize, open_cache, run_script, sha256,
                  write_atomic)
from model import (READOUTS, STREAM_OPTIONS, C, Config, Contrastive, load_run, read_args,
                   read_log)
from train import (NOT_A_RESULT, VAL_STEP, Feed, clustering, embed, extract, pick_device,
                   pick_precision, project, train, with_defaults)
from train import get_args as train_args
from views import VIEWS, ViewConfig, draw_leads, generator, shift

K = len(CLASSES)
FORMAT = 2  # raise it when the meaning of a piece in eval/ changes: older ones are then made anew
STRENGTHS = 10.0 ** np.arange(-4, 0.1, 0.5)  # inverse L2 penalties that a probe chooses from
LEAD_SETS = {12: LEADS, 6: LEADS[:6], 3: ("I", "II", "V2"), 2: ("I", "II"), 1: ("II",)}
LABEL_EPOCHS, LABEL_STEPS, LABEL_BATCH = 60, 100, 32  # of networks that learn from labels
MEASURES = ("macro_auroc", "macro_f1", "accuracy")
MASKED = 0.5, 0.8  # a probe for fewer leads also learns from copies of its records, masked so
CLUSTERING = ("silhouette", "davies_bouldin", "calinski_harabasz")
QUALITY = ("shift", "alignment", "uniformity", "rankme")
TABLE3_MEASURES = (*(f"f1/{name}" for name in CLASSES), "accuracy", "macro_f1")
KEYS = ["protocol", "row", "labels", "seed", "metric"]  # of a line of metrics.csv
# Okabe and Ito's colours, safe for the colour-blind: one a class and one a row, in every figure.
CLASS_COLORS = dict(zip(CLASSES, ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")))
ROWS = {"majority": "the most frequent classes, always",
        "rocket": "random convolutions (ROCKET), probed",
        "untrained": "this encoder untrained, probed", "pretrained": "this run, probed",
        "resnet18": "ResNet-18 pretrained, probed", "finetuned": "this run, fine-tuned",
        "supervised": "this encoder, from scratch",
        "resnet18-supervised": "ResNet-18, from scratch"}
PROBED = ("majority", "rocket", "untrained", "pretrained", "resnet18")
NETWORKS = ("finetuned", "supervised", "resnet18-supervised")  # they learn from labels
SLOW = {"resnet18", *NETWORKS}  # rows that train networks: --fast leaves them out
ROW_COLORS = dict(zip(ROWS, ("#999999", "#000000", "#56B4E9", "#0072B2", "#009E73", "#D55E00",
                             "#E69F00", "#CC79A7")))
# The paper's Table 2 (the best of each run) and Table 3, which is F1 by class, accuracy, macro F1.
TABLE2 = {"stochastic": (-0.0168, 7.8849, 9.89), "contig": (0.0327, 6.289, 37.55),
          "noncontig": (0.0350, 6.424, 50.92)}
TABLE3 = {"stochastic": (.78, .07, .33, .53, .11, .63, .36),  # classes in the order of CLASSES
          "contig": (.83, .42, .63, .66, .01, .72, .51),
          "noncontig": (.82, .38, .57, .60, .00, .70, .47)}
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
    `choose`. by_view: each view of a record is a sample. refit: train on `choose` too, at the end.
    """

    name: str
    y: np.ndarray
    patients: np.ndarray
    train: np.ndarray
    choose: np.ndarray
    test: np.ndarray
    single: bool = False
    by_view: bool = False
    refit: bool = False

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
             dict(single=True, by_view=True, refit=True))):
        parts = [np.flatnonzero(mask & np.isin(fold, f)) for f in folds]
        for part, f in zip(parts, folds):
            if len(part) == 0:
                raise InputError(f"{len(index)} records, but none in fold {', '.join(map(str, f))} "
                                 f"has {'one superclass' if more else 'a superclass'}: each part "
                                 "needs some; see python data.py info, and take more records")
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
    return np.percentile(draws, (2.5, 97.5)).tolist() if len(draws) else None


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
def fit_probe(z, y, strength, single):
    """Logistic regression on standardised features z (n, d): a function z -> scores (n, K).

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
        probe = make_pipeline(StandardScaler(), classifier).fit(z, target)
    if single:
        return lambda new: probe.predict_proba(new) @ np.eye(K)[probe.classes_]
    return probe.predict_proba


def choose_probe(z, task, rows=None):
    """The probe on features z (N, S, d) whose cross-entropy on `choose` is least: (scores, C).

    rows: the records to train on, by default those of the protocol. scores is a function
    z (n, d) -> (n, K).
    """
    x, rows = task.samples(z, task.train if rows is None else rows)
    x_choose, choose = task.samples(z, task.choose)
    best = math.inf
    for strength in STRENGTHS:
        candidate = fit_probe(x, task.y[rows], strength, task.single)
        p = candidate(x_choose).clip(1e-7, 1 - 1e-7)
        y = task.y[choose]
        loss = -(y * np.log(p) + (0 if task.single else (1 - y) * np.log(1 - p))).sum(1).mean()
        if loss < best:
            best, probe, chosen = loss, candidate, float(strength)
    if task.refit:
        x, rows = np.concatenate([x, x_choose]), np.concatenate([rows, choose])
        probe = fit_probe(x, task.y[rows], chosen, task.single)
    return probe, chosen


class Classifier(nn.Module):
    """An encoder with a logit for each class: x (B, T, C), keep (B, C) or None -> (B, 1, K)."""

    def __init__(self, model, view, n_views):
        super().__init__()
        self.model, self.view, self.n_views = model, view, n_views
        self.head = nn.Linear(model.width, K)

    def forward(self, x, keep=None):
        z = embed(self.model, x, self.view, keep, self.n_views)
        return self.head(z.mean(1, keepdim=True))


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
            auroc = mean_of_known(aurocs(task.y[task.choose], p))
            if not auroc <= best:
                best, state = auroc, deepcopy(net.state_dict())
    net.load_state_dict(state)
    return net.eval()


def draw_labels(task, budget, seed):
    """Rows of `train` whose labels a method may use: "10shot" (a class), or a share as "10%".

    For 10shot each class, the rarest first, gets 10 records that have it and were not drawn yet.
    """
    rng = np.random.default_rng([seed, int(re.sub(r"\D", "", budget))])
    rows = rng.permutation(task.train)
    if budget.endswith("%"):
        return np.sort(rows[:max(1, round(len(rows) * float(budget[:-1]) / 100))])
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
    return f"{'SYNTHETIC data ' if meta['synthetic'] else ''}{Path(meta['data']).name}"


def describe(saved, meta):
    """A run and its data in one line, for titles; meta: of the cache."""
    return (f"View {saved['args']['view']}, seed {saved['args']['seed']}, "
            f"{saved['config']['arch']}; {describe_data(meta)}, {meta['records']} records at "
            f"{meta['rate']} Hz")


@dataclass
class Run:
    """A finished run and the records that it is tested on; evaluate() fills in the last four."""

    folder: Path
    out: Path  # where the results go: the folder, or one within it for other data than its own
    saved: dict  # args.json
    trained: dict  # its arguments, those included that are younger than the run
    cache: object
    device: torch.device
    tasks: dict
    settings: Namespace
    depends: dict  # what every piece of work depends on
    weights: dict = field(default_factory=dict)  # row -> digest, what its pieces depend on besides
    models: dict = field(default_factory=dict)  # row -> Contrastive
    encoders: dict = field(default_factory=dict)  # row -> function x, keep -> features (B, S, d)
    features: dict = field(default_factory=dict)  # row -> dict of z (N, S, d), seconds
    amplitude: Optional[np.ndarray] = None  # log deviation of each lead (N, C), with --amplitude

    @property
    def micro(self):
        """Records in memory at once, without a graph."""
        return max(self.trained["micro_batch"], 16)

    def piece(self, name, row, make, **depends):
        """Arrays that make() gives, kept in eval/NAME.npz while what they depend on is the same.

        ROCKET's depend on no run: they are kept in the cache's folder, if it can be written, for
        all runs of its seed.
        """
        path, depends = self.out / "eval" / f"{name}.npz", self.depends | depends
        if row == "rocket" and os.access(self.cache.folder, os.W_OK):
            path = self.cache.folder / f"rocket-s{self.trained['seed']}" / f"{name}.npz"
            for of_a_run in ("model", "first_view", "readout"):
                del depends[of_a_run]
        key = json.dumps(depends | dict(weights=self.weights.get(row)), sort_keys=True)
        if path.exists():
            try:
                with np.load(path) as old:
                    if old["key"] == key:
                        return dict(old)
            except (zipfile.BadZipFile, ValueError, KeyError, EOFError) as error:
                raise InputError(f"{path} is damaged ({error}); remove it") from error
        print(f"  {name}", flush=True)
        arrays = {k: np.asarray(v) for k, v in make().items()} | dict(key=np.array(key))
        save_arrays(path, arrays)
        return arrays

    def beside(self, z, rows, kept=1):
        """Features z (n, S, d) of some records as a probe sees them; d + C with --amplitude.

        kept: 0 for the leads that are not there, which are flat
        """
        if self.amplitude is None:
            return z
        a = (self.amplitude[rows] * kept)[:, None].repeat(z.shape[1], axis=1)
        return np.concatenate([z, a], axis=2)

    def see(self, function, rows, leads=LEADS):
        """What function(x, keep) gives for some records (n, ...), from some of the leads."""
        kept = torch.tensor([lead in leads for lead in LEADS], device=self.device)
        return extract(lambda x: function(x, None if kept.all() else kept.expand(len(x), -1)),
                       self.cache, rows, self.device, self.micro)

    def see_masked(self, function, rows, p):
        """The same, and (n, C) leads that are there: each is lost with probability p."""
        keep = draw_leads((len(rows), C), p, generator("mask", self.trained["seed"], VAL_STEP))
        at = iter(keep.to(self.device))
        return extract(lambda x: function(x, torch.stack([next(at) for _ in x])),
                       self.cache, rows, self.device, self.micro), keep.numpy()


def open_run(args):
    """The Run that the arguments name; raise InputError for settings that it cannot have."""
    folder, device = Path(args.run), pick_device(args.device)
    for budget in args.labels:
        if not re.fullmatch(r"[1-9]\d*shot|(100|[1-9]\d?)%", budget):
            raise InputError(f"--labels {budget}: give such as 10shot, for 10 records a class, "
                             "or 1%, 10%, 100% of the training records")
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
        format=FORMAT, model=sha256(folder / "model.pt"), first_view=args.first_view,
        data=cache.meta["fingerprint"], precision=model.precision,
        readout=model.readout, leads=list(LEAD_SETS.values()),
        labels=[LABEL_EPOCHS, LABEL_STEPS, LABEL_BATCH], strengths=STRENGTHS.tolist())
    other = cache.meta["fingerprint"] != saved["data"]["fingerprint"]
    out = folder / f"on-{cache.folder.name}" if other else folder
    amplitude = None
    if args.amplitude:  # normalize() takes it away, and hypertrophy is diagnosed by it
        deviation = np.stack([signal.std(axis=0) for signal in cache.signals])
        amplitude = np.log1p(deviation).astype(np.float32)
    return Run(folder, out, saved, trained, cache, device, tasks, args, depends,
               models=dict(pretrained=model), amplitude=amplitude)


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
    view, n_views = run.trained["view"], 1 if run.settings.first_view else None
    rocket = Rocket(run.cache.signals.shape[1], seed=run.trained["seed"])

    def encoder(model):
        return lambda x, keep=None: embed(model, x, view, keep, n_views)

    return {"rocket": lambda x, keep=None: rocket(x if keep is None else x * keep[:, None]),
            **{row: encoder(model) for row, model in run.models.items()}}


def represent(run, row):
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


def probe_row(run, row, task, rows):
    """Scores (n, K) of a probe on `choose`, on `test`, and on `test` with fewer leads."""
    began, z = time.monotonic(), run.beside(run.features[row]["z"], slice(None))
    probe, strength = choose_probe(z, task, rows)
    scores = {part: probe(task.samples(z, getattr(task, part))[0]) for part in ("choose", "test")}
    scores |= dict(strength=strength,
                   seconds=run.features[row]["seconds"] + time.monotonic() - began)
    if task.name == "official" and len(rows) == len(task.train):
        scores["leads"] = [probe(run.beside(run.see(run.encoders[row], task.test, leads),
                                            task.test, np.isin(LEADS, leads)).mean(1))
                           for leads in LEAD_SETS.values()]
    return scores


def folds_of(run):
    """The Task `cv` for each official fold as the test; the fold that follows chooses."""
    cv, fold = run.tasks["cv"], run.cache.index.strat_fold.to_numpy()
    for f in range(1, 11):
        test, choose = (cv.test[fold[cv.test] == g] for g in (f, f % 10 + 1))
        train = np.setdiff1d(cv.test, [*test, *choose])
        yield replace(cv, train=train, choose=choose, test=test)


def cross_validate(run, row, budget="100%", seed=0):
    """Scores, predictions (n, K) of all labelled records, each by a probe of other folds.

    Of the training labels a probe sees the budget. strength: what each fold's probe chose.
    """
    began, rows = time.monotonic(), run.tasks["cv"].test
    z = run.beside(run.features[row]["z"], slice(None))
    p, predicted, strengths = *np.zeros((2, len(z), K)), []
    for task in folds_of(run):
        probe, strength = choose_probe(z, task, draw_labels(task, budget, seed))
        scores = {name: probe(z[getattr(task, name)].mean(1)) for name in ("choose", "test")}
        p[task.test], predicted[task.test] = scores["test"], decide(task, scores)
        strengths.append(strength)
    return dict(test=p[rows], predicted=predicted[rows].astype(int), strengths=strengths,
                strength=np.median(strengths),
                seconds=run.features[row]["seconds"] + time.monotonic() - began)


def cross_validate_leads(run, row, strengths):
    """Scores (n, K) of all labelled records from fewer leads, {number of leads: scores}.

    A probe learns from its records whole and masked at random, with the strength chosen for all.
    """
    rows, encoder = run.tasks["cv"].test, run.encoders[row]
    y, z = run.tasks["cv"].y[rows], run.features[row]["z"][rows]
    copies = [run.beside(z, rows).mean(1)]
    for p in MASKED:
        z, kept = run.see_masked(encoder, rows, p)
        copies.append(run.beside(z, rows, kept).mean(1))
    fewer = {n: run.beside(run.see(encoder, rows, leads), rows, np.isin(LEADS, leads)).mean(1)
             for n, leads in LEAD_SETS.items()}
    scores = {str(n): np.zeros(y.shape) for n in fewer}
    for task, strength in zip(folds_of(run), strengths):
        train, test = (np.isin(rows, part) for part in (task.train, task.test))
        probe = fit_probe(np.concatenate([copy[train] for copy in copies]),
                          np.tile(y[train], (len(copies), 1)), strength / len(copies), False)
        for n, seen in fewer.items():
            scores[str(n)][test] = probe(seen[test])
    return scores


def network_row(run, row, task, rows, seed):
    """The same of a network that is trained on the labels of some rows."""
    lr, began = run.settings.label_lr or run.trained["max_lr"], time.monotonic()
    seed += 1000 * run.trained["seed"]  # other runs, other weights; the labels drawn are the same
    torch.manual_seed(seed)
    config = run.saved["config"]
    model = (deepcopy(run.models["pretrained"]) if row == "finetuned" else
             untrained(config if row == "supervised" else resnet_config(config), seed, run.device))
    model.precision, dual = run.models["pretrained"].precision, row != "resnet18-supervised"
    model.readout = run.models["pretrained"].readout if dual else "z"
    net = Classifier(model, run.trained["view"], 1 if run.settings.first_view else None)
    rates = (0.1 * lr if row == "finetuned" else lr), lr
    fit_network(net.to(run.device), run, task, rows, rates, seed)
    scores = dict(seconds=time.monotonic() - began, choose=expit(run.see(net, task.choose)[:, 0]),
                  test=expit(run.see(net, task.test)[:, 0]))
    if len(rows) == len(task.train):
        scores["leads"] = [expit(run.see(net, task.test, leads)[:, 0])
                           for leads in LEAD_SETS.values()]
    return scores


def score_row(run, row, task, budget="100%", seed=0):
    """Scores of a row under a protocol from the labels of a budget: arrays `choose`, `test`.

    For `cv` see cross_validate(). Networks are trained once, for `official`; the largest of their
    scores decides in `paper`.
    """
    if row == "majority":
        return majority(task)
    name = f"{task.name}-{row}-{budget}-{seed}"
    if task.name == "cv":
        return run.piece(name, row, lambda: cross_validate(run, row, budget, seed),
                         amplitude=run.settings.amplitude)
    if row not in NETWORKS:
        rows = draw_labels(task, budget, seed)
        return run.piece(name, row, lambda: probe_row(run, row, task, rows),
                         amplitude=run.settings.amplitude)
    if task.single:
        official = run.tasks["official"]
        scores = score_row(run, row, official, budget, seed)
        return scores | {part: scores[part][np.isin(getattr(official, part), getattr(task, part))]
                         for part in ("choose", "test")}
    rows = draw_labels(task, budget, seed)
    return run.piece(name, row, lambda: network_row(run, row, task, rows, seed),
                     lr=run.settings.label_lr)


def score_all(run, rows):
    """Scores of the rows under every protocol: {(protocol, row, labels, seed): arrays}."""
    scores, args, official = {}, run.settings, run.tasks["official"]
    for name, task in run.tasks.items():
        for row in rows:
            if row in NETWORKS and name == "table3" or name == "cv" and row not in run.features or (
                    row == "finetuned" and "100%" not in args.labels):
                continue
            scores[name, row, "100%", 0] = score_row(run, row, task)
    for budget in args.labels:
        for row in rows:
            for seed in range(1 if budget == "100%" else args.seeds):
                scores["official", row, budget, seed] = score_row(run, row, official, budget, seed)
    return scores


def few_scores(run):
    """Cross-validated scores with less: {protocol: {row: {variant: [(n, K) a draw]}}}.

    labels-cv: few labels; leads-cv: fewer leads; each if --cv names it.
    """
    found, args, cv = {"labels-cv": {}, "leads-cv": {}}, run.settings, run.tasks["cv"]
    for row in run.features:
        if "labels" in args.cv:
            found["labels-cv"][row] = {budget: [
                score_row(run, row, cv, budget, seed)["test"]
                for seed in range(1 if budget == "100%" else args.seeds)] for budget in args.labels}
        if "leads" in args.cv:
            strengths = score_row(run, row, cv)["strengths"]
            leads = run.piece(f"cv-leads-{row}", row, lambda: cross_validate_leads(
                run, row, strengths), masked=list(MASKED), amplitude=args.amplitude)
            found["leads-cv"][row] = {str(n): [leads[str(n)]] for n in LEAD_SETS}
    return found


# Every number, a line each

def lines(protocol, row, numbers, bounds=(), labels="100%", seed=0):
    """Lines of metrics.csv from a dict of numbers; bounds: {metric: (low, high)}."""
    bounds = dict(bounds)
    return [dict(zip((*KEYS, "value", "low", "high"), (
        protocol, row, labels, seed, metric, value, *(bounds.get(metric) or (None, None)))))
        for metric, value in numbers.items()]


def score_lines(run, scores, draws):
    """Lines of all rows' scores; draws gets the bootstrap draws of those with all labels."""
    out, seconds = [], dict.fromkeys(("pretrained", "finetuned"), seconds_of(run.folder))
    if "resnet18" in run.models:
        seconds["resnet18"] = seconds_of(run.folder / "resnet18")
    for (protocol, row, labels, seed), s in scores.items():
        task, p = run.tasks[protocol], s["test"]
        predicted, bounds = decide(task, s), {}
        rows = np.repeat(task.test, len(p) // len(task.test))  # several samples a record, or one
        y = task.y[rows]
        if labels == "100%" and seed == 0:
            found = bootstrap(y, p, predicted, task.patients[rows], run.settings.bootstrap)
            draws[f"{protocol}-{row}"] = found
            bounds = {m: interval(d) for m, d in zip(MEASURES, found.T)}
            if protocol == "official":
                out += lines("leads", row, {f"macro_auroc/{n}": mean_of_known(aurocs(y, fewer))
                                            for n, fewer in zip(LEAD_SETS, s["leads"])})
        out += lines(protocol, row, score(y, p, predicted) | dict(
            strength=s.get("strength"), seconds=s["seconds"],
            records=len(draw_labels(task, labels, seed)),
            pretraining_seconds=seconds.get(row)), bounds, labels, seed)
    return out


def few_lines(run, found, draws):
    """Lines of few_scores(), means over the draws of labels; `draws` as in score_lines."""
    out, cv = [], run.tasks["cv"]
    y, patients = cv.y[cv.test], cv.patients[cv.test]
    for protocol, rows in found.items():
        for row, variants in rows.items():
            sampled = [np.mean([bootstrap(y, p, p > .5, patients, run.settings.bootstrap)[:, 0]
                                for p in some], axis=0) for some in variants.values()]
            draws |= {f"{protocol}-{row}/{name}": some for name, some in zip(variants, sampled)}
            values = {f"macro_auroc/{name}": np.mean([mean_of_known(aurocs(y, p)) for p in some])
                      for name, some in variants.items()}
            out += lines(protocol, row, values, dict(zip(values, map(interval, sampled))))
    return out


def seconds_of(folder):
    """Training time of a run, from its log; None without one."""
    if not (folder / "log.jsonl").exists():
        return None
    log, batch = read_log(folder), read_args(folder)["in_effect"]["batch"]
    return float((np.diff(log.step, prepend=0) * batch / log.records_per_second).sum())


def differences(groups, wanted):
    """Lines of paired differences, of each ((group, row), (group, row)) in `wanted`.

    groups: {label: runs}, dicts of table and draws. Points, and bootstrap draws on the same test
    records, are means over a group's runs.
    """
    def mean(protocol, group, row):
        """Means over a group's runs of what all have: {metric: (point, bootstrap draws)}."""
        found = []
        for run in groups[group]:
            t = run["table"]
            at = t[(t.protocol == protocol) & (t.row == row) & (t.labels == "100%") & (t.seed == 0)]
            points, name = at.set_index("metric").value, f"{protocol}-{row}"
            few = {f"macro_auroc/{key.split('/')[1]}": draws for key, draws in run["draws"].items()
                   if key.startswith(f"{name}/")}
            all_draws = few | dict(zip(MEASURES, run["draws"].get(name, np.empty((0, 0))).T))
            found.append({m: (points[m], draws) for m, draws in all_draws.items()})
        return {m: [np.mean(values, axis=0) for values in zip(*(one[m] for one in found))]
                for m in found[0] if all(m in one for one in found)}

    out = []
    for protocol in ("official", "cv", "paper", "labels-cv", "leads-cv"):
        for pair in wanted:
            a, b = (mean(protocol, *side) for side in pair)
            name = " - ".join(f"{group}: {row}" if group else row for group, row in pair)
            both = [m for m in a if m in b]
            out += lines(protocol, name, {m: a[m][0] - b[m][0] for m in both},
                         {m: interval(a[m][1] - b[m][1]) for m in both})
    return out


def cluster_lines(run):
    """Lines of the clustering scores; `chance`: of this run's representation, labels permuted."""
    out, task = [], run.tasks["table3"]
    labels, rng = task.y[task.test].argmax(1), np.random.default_rng(0)
    for row, features in run.features.items():
        z = features["z"].mean(1)
        if row == "rocket":  # its shares and maxima have different scales
            z = StandardScaler().fit_transform(z)
        out += lines("clustering", row, clustering(z[task.test], labels))
        if row == "pretrained":
            found = pd.DataFrame([clustering(z[task.test], rng.permutation(labels))
                                  for _ in range(20)])
            out += lines("clustering", "chance", found.astype(float).mean().to_dict())
    return out


def quality_lines(run):
    """Lines of the label-free quality of each row's representation."""
    out, rows = [], run.tasks["table3"].test
    for row, features in run.features.items():
        def later(x, keep, encoder=run.encoders[row]):
            return encoder(x.roll(-run.cache.meta["rate"] // 2, 1))

        z = features["z"].mean(1)
        moved = run.piece(f"later-{row}", row, lambda: dict(z=run.see(later, rows)))["z"].mean(1)
        numbers = dict(shift=shift_distance(z[rows], moved))
        if row in run.models:
            model = run.models[row]
            z1, z2 = run.piece(f"views-{row}", row, lambda: dict(z=two_views(run, model)))["z"]
            numbers |= dict(rankme=rankme(z), alignment=alignment(z1, z2),
                            uniformity=(uniformity(z1) + uniformity(z2)) / 2)
        out += lines("quality", row, numbers)
    return out


@torch.no_grad()
def two_views(run, model):
    """Representations (2, n, d) of the two views of fold 10 as in training, with masking."""
    rows = run.cache.rows([TEST_FOLD])
    feed = Feed(run.cache, from_args(ViewConfig, run.trained), run.trained["seed"], run.device)
    (batch,), windows = feed([(VAL_STEP, rows)]), feed.config.windows  # of these the first
    z = [project(model, batch, slice(i, min(i + run.micro, len(rows))))[0].z.unflatten(
        0, (2 * windows, -1))[::windows] for i in range(0, len(rows), run.micro)]
    return torch.cat(z, dim=1).float().cpu()


def stream_lines(run, strength):
    """Lines of the probe's macro AUROC when one stream sees another record, or nothing.

    The other stream sees the record as before, and the cross-attention joins the two.
    """
    task, z, out = run.tasks["official"], run.features["pretrained"]["z"], []
    probe = fit_probe(task.samples(z, task.train)[0], task.y[task.train], strength, False)

    def auroc():
        p = probe(run.see(run.encoders["pretrained"], task.test).mean(1))
        return dict(macro_auroc=mean_of_known(aurocs(task.y[task.test], p)))

    out += lines("streams", "both streams see the record", auroc())
    for stream in ("time", "channel"):
        stem = getattr(run.models["pretrained"].encoder, f"{stream}_stem")
        for how, change in (("another record", lambda x: x.roll(1, 0)),
                            ("nothing", torch.zeros_like)):
            hook = stem.register_forward_pre_hook(lambda module, x: change(x[0]))
            out += lines("streams", f"{stream} stream sees {how}", auroc())
            hook.remove()
    return out


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


def summarize(table, by=("protocol", "row", "labels", "metric")):
    """Mean, standard deviation and count of the values of lines that agree in the columns `by`.

    An interval stays where there is one value.
    """
    found = table.groupby(list(by), sort=False).agg(
        value=("value", "mean"), sd=("value", "std"), n=("value", "count"), low=("low", "first"),
        high=("high", "first")).reset_index()
    found.loc[found.n > 1, ["low", "high"]] = np.nan
    return found


def cell(line):
    """0.781 [0.712, 0.840], or 0.781 ± 0.012 over several values, or a dash."""
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


ABOUT = {
    "official": "Records with at least one superclass, several at once: a sigmoid for each class, "
    "thresholds for F1 chosen on fold 9. Accuracy: all five classes right. Majority: the most "
    "frequent set of classes, and class shares as scores.",
    "cv": "As the official protocol, but each labelled record of all folds is scored once, by a "
    "probe that learned from the other folds; C and thresholds are chosen on the fold that "
    "follows. Pretraining saw the records of folds 1-8, never a label.",
    "paper": "Records with exactly one superclass, the largest score wins. Networks are those of "
    "the official protocol, trained on all labelled records.",
    "table3": "As the paper's Table 3: one superclass, each view of a record a sample of its own "
    "(majority and ROCKET have no views: the whole record), tested on folds 9 and 10. C is chosen "
    "on fold 8. Networks, which stop by fold 9, are left out.",
    "seconds": "s: to represent all records, or train the network, and to fit, with the choice of "
    "C. Intervals: 95 %, bootstrap by patient; they tell of the test records, not of the seed.",
    "differences": "Paired by patient on the same test records; where an interval holds 0, these "
    "records do not tell which is better. Between views: they differ untrained already, since a "
    "probe sees other inputs. Intervals do not tell what another seed would give.",
    "labels-cv": "Macro AUROC of all labelled records, each scored by a probe that saw so many "
    "labels of the other folds; mean over draws of them, intervals over patients alone. A whole "
    "fold more chooses C.",
    "leads-cv": "Macro AUROC of all labelled records, cross-validated. All probes, ROCKET's too, "
    "learned from their records whole and from two copies with leads masked at random; "
    "C as chosen with all leads.",
    "labels": "Official protocol, test fold 10; mean ± standard deviation over draws of the "
    "training labels. All of fold 9 still chooses C, thresholds and when a network stops.",
    "clustering": "Records of folds 9 and 10 with one superclass, representations unmasked, views "
    "averaged. Silhouette -1..1, high is good; Davies-Bouldin from 0, low; Calinski-Harabasz from "
    "0, high. By chance: this run's representations with labels permuted, mean of 20. ROCKET's "
    "features are standardised.",
    "quality": "No labels used. Shift: distance of a record to itself when it starts half a second "
    "later, over that between records (those of clustering); near 0 if the representation does "
    "not mind when beats fall, near 1 if it is about that. Alignment 0..4 and uniformity -4..0, "
    "low is good: the two views of fold 10 as in training, on the unit sphere. RankMe: effective "
    "rank over all records, 1..min(records, width), high is good.",
    "leads": "Macro AUROC, official protocol: trained on 12 leads, tested with the others zero.",
    "streams": "Macro AUROC of this run's probe, official protocol, while one stream sees another "
    "record of the batch, or zeros; the cross-attention still joins the two."}
TITLES = {"official": "Official protocol (the headline)", "cv": "Cross-validated over the folds",
          "paper": "The paper's protocol, fold 10",
          "table3": "Linear probe: Table 3 of the paper", "clustering": "Clustering: Table 2 of "
          "the paper", "quality": "Quality without labels", "leads": "Fewer leads",
          "labels-cv": "Few labels, cross-validated", "leads-cv": "Fewer leads, cross-validated",
          "streams": "The two streams"}


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
    compared, out = found.row.str.contains(" - "), []
    full = found[(found.labels == "100%") & ~compared]
    for name in (name for name in ("official", "cv", "paper", "table3") if name in set(
            full.protocol)):
        part = full[full.protocol == name]
        out += [f"## {TITLES[name]}\n{ABOUT[name]} {ABOUT['seconds']}",
                grid(part, by, dict(zip(MEASURES, MEASURES)) | dict(
                    strength="C", seconds="s", pretraining_seconds="pretraining s"))]
        out += [grid(part, by, {f"{measure}/{c}": f"{measure} {c}" for c in CLASSES})
                for measure in ("auroc", "f1")]
    out += [f"## Differences\n{ABOUT['differences']}",
            grid(found[compared], ["protocol", "row"], MEASURES)]
    few = found[(found.protocol == "official") & ~compared]
    out += [f"## Few labels\n{ABOUT['labels']}",
            grid(few, [*by[:-1], "labels", "row"], ["records", *MEASURES, "seconds"])]
    leads = {f"macro_auroc/{n}": f"{n}: {' '.join(s)}" if n < 6 else f"{n}"
             for n, s in LEAD_SETS.items()}
    for name in ("labels-cv", "leads-cv"):
        part = found[found.protocol == name]
        out += [f"## {TITLES[name]}\n{ABOUT[name]}", grid(part, by, {
            m: m.split("/")[1] for m in part.metric.unique()})] if len(part) else []
    for name, columns in (("clustering", CLUSTERING), ("quality", QUALITY), ("leads", leads),
                          ("streams", ["macro_auroc"])):
        if name in set(full.protocol):  # a ResNet has no streams
            out += [f"## {TITLES[name]}\n{ABOUT[name]}",
                    grid(full[full.protocol == name], by, columns)]
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


def plot_tsne(points, labels, ids, title, path):
    """t-SNE of representations side by side, one colour a class: Fig. 10 of the paper.

    points: {panel: (n, 2)}; labels, ids: (n,)
    """
    figure = Figure((4.6 * len(points), 4.4), layout="constrained")
    axes, rows = figure.subplots(1, len(points), squeeze=False)[0], []
    for axis, (panel, xy) in zip(axes, points.items()):
        for k in np.unique(labels):
            at = labels == k
            axis.scatter(*xy[at].T, s=14, color=CLASS_COLORS[CLASSES[k]],
                         label=f"{CLASSES[k]} ({at.sum()})")
        axis.set(title=panel, xlabel="t-SNE 1", ylabel="t-SNE 2", xticks=[], yticks=[])
        rows += [dict(panel=panel, ecg_id=i, superclass=CLASSES[k], x=x, y=y)
                 for i, k, (x, y) in zip(ids, labels, xy)]
    axes[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path, rows)


def plot_confusion(results, title, path):
    """Confusion matrices {row: (K, K) counts}, a panel each: shares of the true class."""
    across = min(4, len(results))
    down = math.ceil(len(results) / across)
    figure = Figure((3.3 * across, 3.5 * down), layout="constrained")
    axes, rows = list(figure.subplots(down, across, squeeze=False).flat), []
    for axis, (row, counts) in zip(axes, results.items()):
        display = ConfusionMatrixDisplay(counts / counts.sum(1, keepdims=True).clip(1),
                                         display_labels=CLASSES)
        display.plot(ax=axis, cmap="Blues", colorbar=False, values_format=".2f",
                     im_kw=dict(vmin=0, vmax=1))
        axis.tick_params(labelsize=7)
        axis.set_title(ROWS[row], fontsize=8)
        rows += [dict(row=row, true=CLASSES[i], predicted=CLASSES[j], records=n)
                 for (i, j), n in np.ndenumerate(counts)]
    for axis in axes[len(results):]:
        axis.remove()
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path, rows)


def plot_roc(y, scores, title, path):
    """ROC curves of each class, a panel a row. y (n, K); scores {row: (n, K)}."""
    figure, rows = Figure((3.6 * len(scores), 4.0), layout="constrained"), []
    for axis, (row, p) in zip(figure.subplots(1, len(scores), squeeze=False)[0], scores.items()):
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
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path, rows)


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
    end, about = run.settings.format, describe(run.saved, run.cache.meta)
    names = "tsne", "confusion", "roc", "leads", "labels"
    paths = {name: run.out / "figures" / f"{name}.{end}" for name in names}
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
                    for (protocol, row, labels, seed), s in scores.items() if protocol == "paper"},
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
    arch = run.saved["config"]["arch"]
    rows = [row for row in ROWS if not (args.fast and row in SLOW)
            and not (arch == "resnet18" and row.startswith("resnet18"))]
    print(f"{run.folder}: {describe(run.saved, run.cache.meta)}\nworking on what is not done yet:",
          flush=True)

    run.models["untrained"] = untrained(run.saved["config"], run.trained["seed"], run.device)
    if "resnet18" in rows:
        run.models["resnet18"] = pretrain_resnet(run)
    run.models["untrained"].readout = run.depends["readout"]
    for model in run.models.values():
        model.precision = run.depends["precision"]
    run.encoders = make_encoders(run)
    run.features = {row: represent(run, row) for row in PROBED if row in run.encoders}
    scores, draws = score_all(run, rows), {}
    table = score_lines(run, scores, draws) + cluster_lines(run) + quality_lines(run)
    if "cv" in run.tasks:
        table += few_lines(run, few_scores(run), draws)
    if arch != "resnet18":
        table += stream_lines(run, float(scores["official", "pretrained", "100%", 0]["strength"]))
    table = pd.DataFrame(table)
    others = [row for row in rows if f"paper-{row}" in draws and row != "pretrained"]
    table = pd.concat([table, pd.DataFrame(differences(
        {"": [dict(table=table, draws=draws)]}, [(("", "pretrained"), ("", row))
                                                 for row in others]))])
    about = dict(settings=vars(args), view=run.trained["view"], seed=run.trained["seed"],
                 notes=notes, data=run.cache.meta,
                 tested={name: len(task.test) for name, task in run.tasks.items()})
    figures = draw(run, table, scores)
    text = "\n\n".join([
        f"# {run.out}\n{describe(run.saved, run.cache.meta)}",
        "\n".join(f"- {note}" for note in notes),
        sections(summarize(table).assign(group="")), "## Figures",
        *(f"![{figure.stem}](figures/{figure.name})" for figure in figures)]) + "\n"
    save_arrays(run.out / "eval" / "draws.npz", draws)
    write_atomic(run.out / "eval" / "about.json",
                 lambda tmp: tmp.write_text(json.dumps(about, indent=1)))
    write_atomic(run.out / "report.md", lambda tmp: tmp.write_text(text))
    write_atomic(run.out / "metrics.csv", lambda tmp: table.to_csv(tmp, index=False))
    print(f"{text}\n-> {run.out}/report.md, metrics.csv, figures/")


# Several runs

def read_evaluated(folders):
    """The evaluated ones among run folders: dicts of folder, table, about, saved, draws."""
    runs = []
    for folder in map(Path, folders):
        if not (folder / "metrics.csv").exists():
            print(f"note: {folder} has no metrics.csv and is left out; make eval RUN={folder}")
            continue
        try:
            table = pd.read_csv(folder / "metrics.csv")
            if list(table) != [*KEYS, "value", "low", "high"]:
                raise ValueError("metrics.csv has other columns")
            table["value"] = pd.to_numeric(table.value)
            if not set(MEASURES) <= set(table[(table.row == "pretrained") & (table.seed == 0) & (
                    table.protocol == "official") & (table.labels == "100%")].metric):
                raise ValueError("metrics.csv is not whole")
            about = json.loads((folder / "eval" / "about.json").read_text())
            with np.load(folder / "eval" / "draws.npz") as draws:
                runs.append(dict(folder=folder, table=table, about=about, draws=dict(draws),
                                 saved=read_args(folder)))
            about["view"], about["seed"], about["data"], about["tested"], about["settings"]
            runs[-1]["draws"]["official-pretrained"]  # a KeyError when one lacks
        except (OSError, ValueError, TypeError, KeyError, zipfile.BadZipFile) as error:
            raise InputError(f"{folder} is damaged ({error}); evaluate it again: make eval "
                             f"RUN={folder}") from error
    if not runs:
        raise InputError(f"no evaluated run among {len(folders)} folders: train and evaluate some "
                         "first (make pretrain, make eval)")
    if len({len(run["draws"]["official-pretrained"]) for run in runs}) > 1:
        raise InputError("evaluate again with the same --bootstrap: " + ", ".join(
            f"{run['folder']} has {len(run['draws']['official-pretrained'])}" for run in runs))
    return runs


def changes(run):
    """Arguments in which a run differs from the defaults of its preset, but for view and seed."""
    args, settings = run["saved"]["args"], run["about"]["settings"]
    usual = vars(train_args(["--preset", args["preset"], "--view", args["view"]]))
    usual |= asdict(from_args(ViewConfig, usual))  # settings that follow the view
    found = {k: v for k, v in args.items()
             if k not in NOT_A_RESULT | {"seed"} and usual.get(k, v) != v}
    return found | {k: settings[k] for k in ("readout", "amplitude", "first_view", "label_lr")
                    if settings.get(k)}


def group_runs(runs):
    """Runs that differ by their seed alone, together: {label: runs}, by view.

    Raises InputError when a seed is there twice in a group.
    """
    groups, out = {}, {}
    for run in sorted(runs, key=lambda run: list(VIEWS).index(run["about"]["view"])):
        args = run["saved"]["args"]
        label = " ".join([args["view"], *([args["preset"]] if args["preset"] != "paper" else []),
                          *(f"{k}={v}" for k, v in sorted(changes(run).items()))])
        groups.setdefault((label, run["about"]["data"]["fingerprint"]), []).append(run)
    for (label, fingerprint), members in groups.items():
        if len({run["about"]["seed"] for run in members}) < len(members):
            raise InputError("the same seed twice: "
                             f"{', '.join(str(run['folder']) for run in members)}; leave one out")
        if [name for name, _ in groups].count(label) > 1:
            label += f" (data {fingerprint[:6]})"
        out[label] = members
    return out


def collect(groups):
    """Numbers of all groups: mean, sd and count over seeds; the paper's own after each view."""
    parts = {}
    for label, members in groups.items():
        view = members[0]["about"]["view"]
        found = summarize(pd.concat(summarize(run["table"]) for run in members))
        parts[label] = found.assign(group=label, of=len(members))
        parts.pop(view + " (paper)", None)  # it comes after the last group of its view
        parts[view + " (paper)"] = pd.DataFrame(
            lines("clustering", "paper", dict(zip(CLUSTERING, TABLE2[view])))
            + lines("table3", "paper", dict(zip(TABLE3_MEASURES, TABLE3[view])))).drop(
                columns="seed").assign(group=view, n=1, of=1)
    return pd.concat(parts.values())


def compare(args):
    """Tables over several runs, the paper's numbers beside ours: OUT.md and OUT.csv."""
    groups = group_runs(read_evaluated(args.runs))
    wanted = [((g, "pretrained"), (g, row)) for g in groups for row in ("untrained", "rocket")]
    wanted += [((a, row), (b, row)) for a, b in combinations(groups, 2)
               if groups[a][0]["about"]["data"]["index"] == groups[b][0]["about"]["data"]["index"]
               for row in ("pretrained", "untrained")]
    found = pd.DataFrame(differences(groups, wanted)).drop(columns="seed")
    numbers = collect(groups)
    numbers = pd.concat([numbers[~numbers.row.str.contains(" - ")],
                         found.assign(group="", n=1, of=1)])
    overview = []
    for label, members in groups.items():
        about = members[0]["about"]
        overview.append([
            label, describe_data(about["data"]), about["data"]["rate"], about["data"]["records"],
            *(about["tested"][name] for name in ("official", "paper", "table3")),
            " ".join(str(run["about"]["seed"]) for run in members)])
    text = "\n\n".join([
        "# Comparison of runs\nMean ± standard deviation over seeds. **The paper**: its own "
        "numbers, on all of PTB-XL (its clustering scores are the best of each run, ours those of "
        "the final weights).", markdown(
            ["group", "data", "Hz", "records", "tested: official", "paper", "table3", "seeds"],
            overview), sections(numbers),
        "## Published on all of PTB-XL\nMacro AUROC, fold 10, official protocol, as others report "
        "it: not measured here, and not comparable with runs on other data.",
        markdown(["method", "macro AUROC", "source"],
                 [[n, number(v), s or "not checked by us"] for n, v, s in PUBLISHED])]) + "\n"
    write_atomic(f"{args.out}.md", lambda tmp: tmp.write_text(text))
    write_atomic(f"{args.out}.csv", lambda tmp: numbers.to_csv(tmp, index=False))
    print(f"{text}-> {args.out}.md, .csv")


# What it costs: train.py measures itself; this runs it and collects

BENCH_EPOCHS, TURNS = 3, 2  # an epoch is a step or more; the first does not count


def bench_flags(batch, device):
    """Flags of train.py for each row: {preset: {row: flags}}; the rows of a preset take turns."""
    small, paper = ["--preset", "small"], ["--batch-size", str(batch), "--micro-batch", "32"]
    if device.type == "cpu":  # 2500 tokens take ten seconds a record: take every fourth
        paper = ["--batch-size", "4", "--micro-batch", "2", "--time-stride", "4"]
    plain, once = ["--negatives", "micro"], ["--epochs", "2"]
    rows = {"small": {"small": [], "small, plain accumulation": plain,
                      "small, one micro-batch": ["--batch-size", "64"],
                      "small, stochastic": ["--view", "stochastic"]},
            "paper": {"paper": [], "paper, plain accumulation": plain,
                      "paper, one micro-batch": ["--batch-size", paper[3]],
                      "paper, torch.nn's layers": ["--arch", "torchnn"],
                      "paper, compiled": ["--compile"]}}
    if device.type == "cpu" or torch.cuda.device_count() > 1:
        rows["small"]["small, two processes"] = []
    for stride in (1, 2, 8):
        few = ["--batch-size", "2", *once, "--max-steps", "5"] if device.type == "cpu" else []
        rows["paper"][f"paper, --time-stride {stride}"] = ["--time-stride", str(stride), *few]
    base = {"small": [*small, "--batch-size", str(batch)], "paper": paper}
    return {preset: {row: [*base[preset], *flags] for row, flags in some.items()}
            for preset, some in rows.items()}


def write_part(cache, n_train, n_val, out):
    """A cache of n_train records for folds 1-8 and n_val for fold 9, some of them repeated."""
    rows = np.resize(cache.rows(TRAIN_FOLDS), n_train + n_val)
    folds = [*np.resize(TRAIN_FOLDS, n_train), *[VAL_FOLD] * n_val]
    out.mkdir()
    cache.signals[rows].tofile(out / "signals.int16")
    cache.index.iloc[rows].assign(strat_fold=folds).to_csv(out / "index.csv", index=False)
    meta = cache.meta | dict(records=len(rows), index=sha256(out / "index.csv"))
    (out / "meta.json").write_text(json.dumps(meta))


def measure_loading(cache, device):
    """Records a second: by wfdb, one float32 record at a time, and as training cuts each view."""
    import wfdb

    rows, found = np.resize(cache.rows(TRAIN_FOLDS), 512), []

    def rate(name, n, function):
        seconds = []
        for _ in range(4):
            began = time.monotonic()
            function()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            seconds.append(time.monotonic() - began)
        found.append(dict(row=name, records_per_second=n / np.median(seconds[1:])))

    def one_by_one():  # what many loaders do
        for x in signals:
            x = (x - x.mean(0)) / (x.std(0) + 1e-8)
            np.stack([x[i::2] * (np.random.rand(C) >= 0.5).astype(np.float32) for i in (0, 1)])

    def cut(view, rows):
        (batch,) = Feed(cache, ViewConfig(view=view), 0, device)([(0, rows)])
        for i in range(0, len(rows), 16):
            torch.cat(batch.cut(slice(i, min(i + 16, len(rows)))))

    try:
        table = load_tables(cache.meta["data"])
        paths = [str(Path(cache.meta["data"]) / name) for name in table[RATES[cache.meta["rate"]]]]
        rate("wfdb", len(paths[:64]), lambda: [wfdb.rdrecord(p) for p in paths[:64]])
    except (InputError, OSError) as error:
        print(f"note: nothing is read with wfdb: {error}")
    signals = cache.signals[rows].astype(np.float32)
    rate("one float32 record at a time", len(rows), one_by_one)
    for view in VIEWS:
        some = rows[:64] if view == "stochastic" else rows
        rate(view, len(some), lambda: cut(view, some))
    return pd.DataFrame(found)


def run_train(row, flags, folder):
    """The log of a short run of train.py in a process of its own, but for its first epoch."""
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2 --".split()
    done = subprocess.run(
        [sys.executable, *(launch if "processes" in row else []), "train.py", "--epochs",
         str(BENCH_EPOCHS), *flags, "--run", folder],
        cwd=Path(__file__).parent, text=True, capture_output=True)
    if done.returncode:
        raise InputError(f"{row}: not measured: {(done.stderr or done.stdout)[-300:]}")
    log, start = read_log(folder).iloc[1:], read_args(folder)["start_mib"]
    return log.assign(row=row, mib_above_start=log.peak_mib - start)


def steps_table(logs):
    """Medians of the logs of each row, peaks of memory; ratios to the row `small` or `paper`."""
    columns = ["records_per_second", "data_share", "gflop_per_record", "of_peak"]
    groups = pd.concat(logs).groupby("row", sort=False)
    steps = groups[columns].median().join(groups[["peak_mib", "mib_above_start"]].max())
    base = steps.reindex(steps.index.str.split(",").str[0]).set_index(steps.index)
    steps["speed_ratio"] = steps.records_per_second / base.records_per_second
    steps["memory_ratio"] = steps.mib_above_start / base.mib_above_start
    return steps.reset_index()


def bench(args):
    """Measure what loading and training cost here: tables on the screen, numbers in args.out."""
    device, logs, failed = pick_device(args.device), [], []
    if args.batch % 128:
        raise InputError(f"--batch {args.batch}: give a multiple of 128")
    presets, caches = bench_flags(args.batch, device), [open_cache(path) for path in args.caches]
    loading = measure_loading(caches[-1], device)
    for base in set(loading.row) & {"wfdb", "one float32 record at a time"}:
        loading[f"over {base}"] = loading.records_per_second / loading.set_index(
            "row").records_per_second[base]
    with tempfile.TemporaryDirectory() as tmp:
        for (preset, rows), cache in zip(presets.items(), caches):
            few = preset == "paper" and device.type == "cpu"
            write_part(cache, 8 if few else args.batch, 2 if few else 8, Path(tmp) / preset)
            for turn, (row, flags) in [(t, item) for t in range(TURNS) for item in rows.items()]:
                if turn and ("--time-stride" in row or "stochastic" in row):
                    continue  # not compared with the others, and slow
                more = ["--cache", f"{tmp}/{preset}", "--device", args.device]
                try:
                    logs.append(run_train(row, [*flags, *more], f"{tmp}/{row}-{turn}"))
                except InputError as error:  # no memory, or no compiler: other rows still count
                    failed.append(str(error))
                    continue
                print(f"  {row}: {logs[-1].records_per_second.median():.2f} records/s", flush=True)
                steps = steps_table(logs)
                found = dict(device=str(device), threads=torch.get_num_threads(),
                             torch=torch.__version__, caches=[cache.meta for cache in caches],
                             loading=loading.to_dict("records"), steps=steps.to_dict("records"),
                             failed=failed)
                write_atomic(args.out, lambda tmp: tmp.write_text(json.dumps(found, indent=1)))
    for table in (loading, steps) if logs else (loading,):
        print("\n" + markdown(table.columns, [[value if isinstance(value, str) else f"{value:.3g}"
                                               for value in line]
                                              for line in table.itertuples(index=False)]))
    print(f"ratios: to the row of that name; for training to `small` or `paper`\n-> {args.out}")
    if failed:
        raise InputError("; ".join(failed))


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    style = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    p = commands.add_parser("run", help="evaluate one run", **style)
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
    p.add_argument("--first-view", action="store_true", help="a segment model sees the first view "
                   "of a record alone; by default its two views are averaged")
    p.add_argument("--labels", nargs="+", default=["10shot", "10%"], help="few labels: 10shot for "
                   "10 records a class, or shares such as 1%% 10%% 100%%")
    p.add_argument("--seeds", type=bounded(int, 1), default=3, help="draws of few labels")
    p.add_argument("--label-lr", type=bounded(float, 1e-12), help="peak learning rate of networks "
                   "trained with labels (a fine-tuned encoder takes a tenth); by default the run's "
                   "--max-lr")
    p.add_argument("--bootstrap", type=bounded(int, 1), default=1000, help="resamples, by patient")
    add_shared(p, "cache", "device", "format")
    p = commands.add_parser("compare", help="tables over several evaluated runs", **style)
    p.add_argument("runs", nargs="*", help="run folders; those not evaluated are named, left out")
    p.add_argument("--out", default="runs/compare", help="tables go to OUT.md and OUT.csv")
    p = commands.add_parser("bench", help="what loading and training cost here", **style)
    p.add_argument("caches", nargs="+", help="the cache for the preset small and, if wanted, the "
                   "one for paper")
    p.add_argument("--batch", type=bounded(int, 128), default=256, help="effective batch, in parts "
                   "of 64: a multiple of 128")
    p.add_argument("--out", default="runs/bench.json", help="where the numbers go")
    add_shared(p, "device")
    return parser.parse_args(argv)


def main(args):
    dict(run=evaluate, compare=compare, bench=bench)[args.command](args)


if __name__ == "__main__":
    run_script(lambda: main(get_args()))
