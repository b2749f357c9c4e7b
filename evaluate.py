"""What a pretrained encoder is worth on PTB-XL's superclasses, beside baselines (paper 5.1, 5.3).

In:  a finished run folder of train.py, and the cache that it was trained on (or one like it).
Out: in that folder metrics.json (every number), report.md, figures/ and eval/: finished pieces of
     work, each kept while nothing changes that it depends on. eval/embeddings-pretrained.npz has
     z (N, S, rep_dim) float32, S = 1 or 2 views, with ecg_id, patient_id, strat_fold and labels.

    python evaluate.py run --run runs/noncontig-s0
    python evaluate.py run --run runs/demo-noncontig-s0 --fast
    python evaluate.py compare runs/noncontig-s0 runs/contig-s0 --out runs/compare
    python evaluate.py bench --cache cache/ptbxl-500
"""
import argparse
import json
import math
import multiprocessing
import os
import platform
import re
import resource
import socket
import tempfile
import time
import zipfile
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import reduce
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn as nn
import torch.nn.functional as F
import wfdb
from matplotlib.figure import Figure
from scipy.spatial.distance import pdist
from scipy.special import expit
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.metrics import (accuracy_score, confusion_matrix, f1_score,
                             multilabel_confusion_matrix, precision_recall_curve, roc_auc_score,
                             roc_curve)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch.multiprocessing.spawn import ProcessException, spawn
from torch.utils.data import DataLoader, Dataset, Subset
from torch.utils.flop_counter import (FlopCounterMode, sdpa_backward_flop_count,
                                      sdpa_flop_count)

from data import (CLASSES, LEADS, RATES, TEST_FOLD, TRAIN_FOLDS, VAL_FOLD, InputError, load_tables,
                  normalize, open_cache, run_script, sha256, write_atomic)
from model import C, Config, Contrastive, DualView, embed, load_run
from train import (NOT_A_RESULT, VAL_KEY, Clock, accelerate, backward, batches, clustering,
                   draw_keep, extract, fetch, join_processes, leave_processes, pick_autocast,
                   pick_device, project, ranks, set_seed, share, train)
from train import get_args as default_args
from views import VIEWS, ViewConfig, from_args, shift

K = len(CLASSES)
FORMAT = 1  # raise it when the meaning of a piece in eval/ changes: older ones are then made anew
STRENGTHS = 10.0 ** np.arange(-5, 1)  # inverse L2 penalties that a probe chooses from
LEAD_SETS = {12: LEADS, 6: LEADS[:6], 3: ("I", "II", "V2"), 2: ("I", "II"), 1: ("II",)}
LABEL_EPOCHS, LABEL_STEPS, LABEL_BATCH = 60, 100, 32  # of networks that learn from labels
MEASURES = ("macro_auroc", "macro_f1", "accuracy")
CLUSTERING = ("silhouette", "davies_bouldin", "calinski_harabasz")
QUALITY = ("shift", "alignment", "uniformity", "rankme")
TABLE3_MEASURES = (*(f"f1/{name}" for name in CLASSES), "accuracy", "macro_f1")
# Okabe and Ito's colours, safe for the colour-blind: one a class and one a row, in every figure.
CLASS_COLORS = dict(zip(CLASSES, ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")))
ROWS = {"majority": "the most frequent classes, always",
        "rocket": "random convolutions (ROCKET), probed",
        "untrained": "this encoder untrained, probed", "pretrained": "this run, probed",
        "resnet18": "ResNet-18 pretrained, probed", "finetuned": "this run, fine-tuned",
        "supervised": "this encoder, from scratch",
        "resnet18-supervised": "ResNet-18, from scratch"}
PROBED = ("majority", "rocket", "untrained", "pretrained", "resnet18")
START = {"finetuned": "pretrained", "supervised": "untrained",  # networks: where they start from
         "resnet18-supervised": "resnet18-untrained"}
SLOW = {"resnet18", *START}  # rows that train networks: --fast leaves them out
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


# Protocols (design page, section 6)

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
                accuracy=accuracy_score(y, predicted), auroc=dict(zip(CLASSES, auroc)),
                f1=dict(zip(CLASSES, f1)))


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
        for k in range(K):
            yes, no = y[:, k] == 1, y[:, k] == 0
            above = p[yes, k][:, None] - p[no, k]
            wins = (above > 0) + 0.5 * (above == 0)  # Mann-Whitney
            auroc[:, k] = ((w[:, yes] @ wins) * w[:, no]).sum(1) / (
                w[:, yes].sum(1) * w[:, no].sum(1))
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
    A class that no record has, or all have, gets its share as a constant score.
    """
    def fit(target):
        constant = len(np.unique(target)) == 1
        return (DummyClassifier() if constant else make_pipeline(
            StandardScaler(), LogisticRegression(C=strength, max_iter=5000))).fit(z, target)

    fits = [fit(target) for target in ([y.argmax(1)] if single else y.T)]
    values = [np.eye(K)[f.classes_] if single else f.classes_[:, None] for f in fits]
    return lambda new: np.concatenate(
        [f.predict_proba(new) @ v for f, v in zip(fits, values)], axis=1)


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
        self.head = nn.Linear(model.config.rep_dim, K)

    def forward(self, x, keep=None):
        z = embed(self.model, x, self.view, keep, self.n_views)
        return self.head(z.mean(1, keepdim=True))


def fit_network(net, cache, task, rows, lr, micro, device, autocast, seed):
    """Train encoder and head of a Classifier on the labels of some rows, a sigmoid for each class.

    Each record starts at a random time, circularly: without that small sets are overfitted. The
    weights that end up in net are those with the highest macro AUROC on `choose`, looked at
    ten times. lr: peak rates of encoder and head. Raises FloatingPointError on a non-finite loss.
    """
    set_seed(seed)
    batch = min(LABEL_BATCH, max(8, len(rows) // 4), len(rows))  # few labels: smaller batches
    steps = max(LABEL_EPOCHS * math.ceil(len(rows) / batch), LABEL_STEPS)
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(rows) for _ in range(steps * batch // len(rows) + 1)])
    y = torch.from_numpy(task.y).float().to(device)
    optimizer = torch.optim.AdamW([dict(params=net.model.encoder.parameters()),
                                   dict(params=net.head.parameters())], weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, list(lr), total_steps=steps)
    best = -math.inf
    for step in range(steps):
        net.train()
        optimizer.zero_grad(set_to_none=True)
        now = order[step * batch:(step + 1) * batch]
        for part in np.array_split(now, math.ceil(batch / micro)):
            x = normalize(torch.from_numpy(cache.signals[part]).to(device))
            x = shift(x, torch.from_numpy(rng.integers(x.shape[1], size=len(x))).to(device))
            with autocast():
                logits = net(x)[:, 0].float()
            loss = F.binary_cross_entropy_with_logits(logits, y[part]) * len(part) / batch
            if not loss.isfinite():
                raise FloatingPointError(f"loss {loss} at step {step} of training with labels; try "
                                         "a lower --label-lr")
            loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % (steps // 10) == 0:
            p = extract(net.eval(), cache, task.choose, device, autocast, 2 * micro)[:, 0]
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


# One run, and its finished pieces of work

def save_arrays(path, arrays):
    """Write an .npz file, whole or not at all."""
    def write(tmp):
        with open(tmp, "wb") as file:  # savez would add a suffix to a name
            np.savez(file, **arrays)

    write_atomic(path, write)


def open_data(folder, saved, cache=None):
    """What a run was trained with and the records to look at: (its arguments as a dict, Cache).

    saved: its args.json; cache: a folder, by default the run's own. Raises InputError when its rate
    is another one.
    """
    trained = vars(default_args([])) | saved["args"]  # a flag may be younger than the run
    cache = open_cache(cache or trained["cache"])
    rate, was = cache.meta["rate"], saved["data"]["rate"]
    if rate != was:
        raise InputError(f"{folder} was trained at {was} Hz, {cache.folder} is at {rate} Hz: give "
                         f"a --cache at {was} Hz (make cache RATE={was} DATA=...)")
    return trained, cache


def untrained(config, seed, device):
    """A Contrastive with fresh weights: those that a run of this seed began with."""
    set_seed(seed)
    return Contrastive(Config(**config)).to(device).eval()


def describe_data(meta):
    """The data of a cache in a few words, for titles."""
    return f"{'SYNTHETIC data ' if meta['synthetic'] else ''}{Path(meta['data']).name}"


def describe(saved, meta):
    """A run and its data in one line, for titles; meta: of the cache."""
    return (f"View {saved['args']['view']}, seed {saved['args']['seed']}, "
            f"{saved['config']['arch']}; {describe_data(meta)}, {meta['records']} records at "
            f"{meta['rate']} Hz")


class Evaluation:
    """A finished run, the cache it is tested on, and the pieces of work done so far in RUN/eval."""

    def __init__(self, args):
        self.args, self.run = args, Path(args.run)
        self.device = pick_device(args.device)
        self.model, self.saved = load_run(self.run, self.device)
        trained, self.cache = open_data(self.run, self.saved, args.cache)
        self.trained, self.view, self.seed = trained, trained["view"], trained["seed"]
        self.micro, self.n_views = trained["micro_batch"], 1 if args.first_view else None
        precision, self.autocast = pick_autocast(trained["precision"], self.device)
        for budget in args.labels:
            if not re.fullmatch(r"[1-9]\d*shot|(100|[1-9]\d?)%", budget):
                raise InputError(f"--labels {budget}: give such as 10shot, for 10 records a class, "
                                 "or 1%, 10%, 100% of the training records")
        if min(args.seeds, args.bootstrap) < 1 or not (args.label_lr is None or args.label_lr > 0):
            raise InputError(f"--seeds {args.seeds} --bootstrap {args.bootstrap} --label-lr "
                             f"{args.label_lr}: at least 1, 1, and above 0")
        self.tasks = protocols(self.cache.index)
        self.notes = [note for task in self.tasks.values() for note in gaps(task)]
        if self.cache.meta["fingerprint"] != self.saved["data"]["fingerprint"]:
            self.notes.append(f"pretrained on {self.saved['data']['data']}, evaluated on other "
                              f"data: {self.cache.meta['data']}")
        resnet = self.model.config.arch == "resnet18"
        self.rows = [name for name in ROWS if not (args.fast and name in SLOW)
                     and not (resnet and name.startswith("resnet18"))]
        self.depends = dict(
            format=FORMAT, model=sha256(self.run / "model.pt"), first_view=args.first_view,
            data=self.cache.meta["fingerprint"], precision=precision,
            leads=list(LEAD_SETS.values()),
            labels=[LABEL_EPOCHS, LABEL_STEPS, LABEL_BATCH], strengths=STRENGTHS.tolist())
        self.made, self.draws = {}, {}

    def piece(self, name, make, **depends):
        """Arrays that make() gives, kept in eval/NAME.npz while what they depend on is the same."""
        path = self.run / "eval" / f"{name}.npz"
        key = json.dumps(self.depends | depends, sort_keys=True)
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

    def encoder(self, name, seed):
        """A Contrastive: `pretrained`; `resnet18`, pretrained in RUN/resnet18 as this run was; or
        `untrained` and `resnet18-untrained`, with fresh weights (this run's own for its seed)."""
        if name == "pretrained":
            return self.model
        plain = dict(arch="resnet18", aux_losses=False, late_masking=False, gate_channel=False,
                     channel_dropout=0.0, mix_leads=False)
        if name == "resnet18":
            run, cache = self.run / name, self.cache.folder
            if self.cache.meta["fingerprint"] != self.saved["data"]["fingerprint"]:
                cache = self.trained["cache"]  # of what this run was trained on
            if not (run / "model.pt").exists():
                train(argparse.Namespace(**self.trained | plain | dict(
                    run=str(run), cache=str(cache), device=str(self.device))))
            return load_run(run, self.device)[0]
        config = self.saved["config"] | (plain if name == "resnet18-untrained" else {})
        return untrained(config, seed, self.device)

    def function(self, name):
        """What turns x (B, T, C), keep (B, C) or None into the features (B, S, d) of a row."""
        if name not in self.made:
            if name == "rocket":
                rocket = Rocket(self.cache.signals.shape[1], seed=self.seed)
                self.made[name] = lambda x, keep=None: rocket(
                    x if keep is None else x * keep[:, None])
            else:
                model = self.encoder(name, self.seed)
                self.made[name] = lambda x, keep=None: embed(model, x, self.view, keep,
                                                             self.n_views)
        return self.made[name]

    def extract(self, function, rows, leads=LEADS):
        """What function(x, keep) gives for some rows (n, ...), from some of the leads."""
        kept = torch.tensor([lead in leads for lead in LEADS], device=self.device)
        return extract(lambda x: function(x, None if kept.all() else kept.expand(len(x), -1)),
                       self.cache, rows, self.device, self.autocast, max(self.micro, 16))

    def features(self, name):
        """Features z (N, S, d) of all records, and the seconds that they cost."""
        def make():
            function, began = self.function(name), time.monotonic()
            z = self.extract(function, np.arange(len(self.cache.index)))
            if not np.isfinite(z).all():
                raise FloatingPointError(f"{name}: features of {self.cache.folder} are not finite")
            index = self.cache.index
            return dict(z=z, seconds=time.monotonic() - began, labels=index[list(CLASSES)],
                        **{key: index[key] for key in ("ecg_id", "patient_id", "strat_fold")})

        key = f"embeddings-{name}"
        if key not in self.made:
            self.made[key] = self.piece(key, make, **self.origin(name))
        return self.made[key]["z"], float(self.made[key]["seconds"])

    def origin(self, name):
        """What the pieces of a row depend on besides: the weights of the ResNet-18, made now."""
        if name != "resnet18":
            return {}
        if not (self.run / name / "model.pt").exists():
            self.function(name)
        return dict(resnet=sha256(self.run / name / "model.pt"))

    def probe(self, name, task, rows):
        """Scores (n, K) of a probe on `choose`, on `test` and on `test` with fewer leads."""
        z, seconds = self.features(name)
        began = time.monotonic()
        probe, strength = choose_probe(z, task, rows)
        scores = dict(strength=strength, seconds=seconds + time.monotonic() - began,
                      **{part: probe(task.samples(z, getattr(task, part))[0])
                         for part in ("choose", "test")})
        if not task.single and len(rows) == len(task.train):
            scores["leads"] = [probe(self.extract(self.function(name), task.test, leads).mean(1))
                               for leads in LEAD_SETS.values()]
        return scores

    def network(self, name, task, rows, seed):
        """The same of a network that is trained on the labels of some rows."""
        lr, began = self.args.label_lr or self.trained["max_lr"], time.monotonic()
        seed += 1000 * self.seed  # other runs, other weights; the labels drawn are the same
        set_seed(seed)
        net = Classifier(deepcopy(self.encoder(START[name], seed)), self.view, self.n_views)
        fit_network(net.to(self.device), self.cache, task, rows,
                    (0.1 * lr if name == "finetuned" else lr, lr), self.micro, self.device,
                    self.autocast, seed)
        seconds = time.monotonic() - began

        def sees(rows, leads=LEADS):
            return expit(self.extract(net, rows, leads)[:, 0])

        scores = dict(seconds=seconds, choose=sees(task.choose), test=sees(task.test))
        if len(rows) == len(task.train):
            scores["leads"] = [sees(task.test, leads) for leads in LEAD_SETS.values()]
        return scores

    def scores(self, name, task, budget="100%", seed=0):
        """Scores of a row under a protocol, from the labels of a budget: arrays `choose`, `test`.

        Networks are trained once, for `official`; the largest of their scores decides in `paper`.
        """
        if name == "majority":
            share = task.y[task.train].mean(0)
            sets, count = np.unique(task.y[task.train], axis=0, return_counts=True)
            test = np.tile(share, (len(task.test), 1))
            return dict(test=test, predicted=np.tile(sets[count.argmax()], (len(test), 1)),
                        leads=[test] * len(LEAD_SETS), seconds=0.0)
        if name in START and task.single:
            official = self.tasks["official"]
            scores = self.scores(name, official, budget, seed)
            return scores | {part: scores[part][np.isin(getattr(official, part),
                                                        getattr(task, part))]
                             for part in ("choose", "test")}
        rows = draw_labels(task, budget, seed)
        if name in START:
            return self.piece(f"{task.name}-{name}-{budget}-{seed}",
                              lambda: self.network(name, task, rows, seed), lr=self.args.label_lr)
        return self.piece(f"{task.name}-{name}-{budget}-{seed}",
                          lambda: self.probe(name, task, rows), **self.origin(name))

    def result(self, name, task):
        """The numbers of a row of a protocol's table, with intervals."""
        scores = self.scores(name, task)
        p, predicted = scores["test"], decide(task, scores)
        rows = np.repeat(task.test, len(p) // len(task.test))  # several samples a record, or one
        y = task.y[rows]
        draws = bootstrap(y, p, predicted, task.patients[rows], self.args.bootstrap)
        self.draws[f"{task.name}-{name}"] = draws
        confusion = (confusion_matrix(y.argmax(1), predicted.argmax(1), labels=range(K))
                     if task.single else multilabel_confusion_matrix(y, predicted))
        trained = {"pretrained": self.run, "finetuned": self.run, "resnet18": self.run / name}
        return score(y, p, predicted) | dict(
            intervals={m: interval(d) for m, d in zip(MEASURES, draws.T)}, confusion=confusion,
            seconds=scores["seconds"], strength=scores.get("strength"),
            pretraining_seconds=seconds_of(trained[name]) if name in trained else None)

    def limited(self, name, budget):
        """The MEASURES over seeds, from the labels of a budget (official protocol)."""
        task, found = self.tasks["official"], []
        for seed in range(1 if budget == "100%" and name in PROBED else self.args.seeds):
            s = self.scores(name, task, budget, seed)
            found.append(score(task.y[task.test], s["test"], decide(task, s)))
        found = pd.DataFrame(found)[[*MEASURES]]
        return dict(found.mean(), sd=found.std().to_dict(), draws=found.to_dict("list"),
                    records=len(draw_labels(task, budget, 0)), seconds=s["seconds"])

    def clusters(self, name):
        """Clustering scores of a row's representation; `chance`: of this run's, labels permuted."""
        rows = self.tasks["table3"].test
        z = self.features("pretrained" if name == "chance" else name)[0].mean(1)
        if name == "rocket":  # its shares and maxima have different scales
            z = StandardScaler().fit_transform(z)
        z, labels = z[rows], self.tasks["table3"].y[rows].argmax(1)
        if name != "chance":
            return clustering(z, labels)
        rng = np.random.default_rng(0)
        found = pd.DataFrame([clustering(z, rng.permutation(labels)) for _ in range(20)])
        return found.astype(float).mean().to_dict()

    def quality(self, name):
        """Label-free quality of a row's representation."""
        rows, z = self.tasks["table3"].test, self.features(name)[0].mean(1)
        later = self.piece(f"later-{name}", lambda: dict(z=self.extract(
            lambda x, keep: self.function(name)(x.roll(-self.cache.meta["rate"] // 2, 1)), rows)),
            **self.origin(name))
        out = dict(shift=shift_distance(z[rows], later["z"].mean(1)))
        if name != "rocket":
            z1, z2 = self.piece(f"views-{name}", lambda: dict(z=self.two_views(name)),
                                **self.origin(name))["z"]
            out |= dict(rankme=rankme(z), alignment=alignment(z1, z2),
                        uniformity=(uniformity(z1) + uniformity(z2)) / 2)
        return out

    @torch.no_grad()
    def two_views(self, name):
        """Representations (2, n, d) of the two views of fold 10 as in training, with masking."""
        config = from_args(ViewConfig, argparse.Namespace(**self.trained))
        rows, model = self.cache.rows([TEST_FOLD]), self.encoder(name, self.seed)
        (views,) = batches(self.cache, config, self.seed, [(VAL_KEY, rows)], self.device, 0)
        keep, z = draw_keep(config, len(rows), self.seed, VAL_KEY, 0), []
        for i in range(0, len(rows), self.micro):
            part = slice(i, i + self.micro)
            output, _ = project(model, views, keep, part, (0,), self.autocast)
            z.append(output.z.unflatten(0, (2, -1)))
        return torch.cat(z, dim=1).float().cpu()

    def streams(self):
        """Macro AUROC of this run's probe when one stream sees another record, or nothing.

        The other stream sees the record as before, and the cross-attention joins the two.
        """
        task, out = self.tasks["official"], {}
        z = self.features("pretrained")[0]
        strength = float(self.scores("pretrained", task)["strength"])
        probe = fit_probe(task.samples(z, task.train)[0], task.y[task.train], strength, False)
        for stream in ("time", "channel"):
            stem = getattr(self.model.encoder, f"{stream}_stem")
            for how, change in (("another record", lambda x: x.roll(1, 0)),
                                ("nothing", torch.zeros_like)):
                hook = stem.register_forward_pre_hook(lambda module, x: change(x[0]))
                p = probe(self.extract(self.function("pretrained"), task.test).mean(1))
                hook.remove()
                out[f"{stream} stream sees {how}"] = mean_of_known(aurocs(task.y[task.test], p))
        return out


def seconds_of(run):
    """Training time of a run, from its log; None without one."""
    if not (run / "log.jsonl").exists():
        return None
    saved = json.loads((run / "args.json").read_text())
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    steps = np.diff([0, *(row["step"] for row in log)])
    return float(sum(n * saved["in_effect"]["batch"] / row["records_per_second"]
                     for n, row in zip(steps, log)))


# Tables

def plain(value):
    """Numbers as JSON has them: NumPy's become Python's, NaN becomes null."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number(value, bounds=None, digits=3):
    """A table's cell: 0.781 [0.712, 0.840]; a dash for what could not be computed."""
    if value is None or not math.isfinite(value):
        return "-"
    ends = "" if not bounds else " [" + ", ".join(f"{b:.{digits}f}" for b in bounds) + "]"
    return f"{value:.{digits}f}{ends}"


def spread(mean, sd):
    """A table's cell: 0.781 ± 0.012, or the mean alone when there is no spread to tell."""
    return number(mean) + ("" if number(sd) == "-" else f" ± {number(sd)}")


def markdown(head, rows):
    """A Markdown table, columns aligned so that it reads as plain text too."""
    cells = [[str(c) for c in row] for row in (head, *rows)]
    width = [max(map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, width)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in width) + "|", *lines[1:]])


def protocol_table(results):
    """The table of one protocol: a row for each method of results {name: numbers}."""
    head = ["", "macro AUROC [95 %]", "macro F1 [95 %]", "accuracy [95 %]",
            *(f"{name}: AUROC, F1" for name in CLASSES), "C", "s", "pretraining s"]
    return markdown(head, [
        [ROWS[name], *(number(r[m], r["intervals"][m]) for m in MEASURES),
         *(f"{number(r['auroc'][c])}, {number(r['f1'][c])}" for c in CLASSES),
         "-" if r["strength"] is None else f"{r['strength']:g}",
         *(number(r[key], digits=0) for key in ("seconds", "pretraining_seconds"))]
        for name, r in results.items()])


ABOUT = {
    "official": "Records with at least one superclass, several at once: a sigmoid for each class, "
    "thresholds for F1 chosen on fold 9. Accuracy: all five classes right. Majority: the most "
    "frequent set of classes, and class shares as scores.",
    "paper": "Records with exactly one superclass, the largest score wins. Networks are those of "
    "the official protocol, trained on all labelled records.",
    "table3": "As the paper's Table 3: one superclass, each view of a record a sample of its own "
    "(majority and ROCKET have no views: the whole record), tested on folds 9 and 10. C is chosen "
    "on fold 8. Networks, which stop by fold 9, are left out.",
    "seconds": "s: to represent all records, or train the network, and to fit, with the choice of "
    "C. Intervals: 95 %, bootstrap by patient; they tell of the test records, not of the seed.",
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
    "record of the batch, or zeros; the cross-attention still joins the two. Intact: {}."}


def differences(pairs):
    """Paired bootstrap: [(protocol, a, b, points a, points b, draws a, draws b)] as dicts.

    points: {measure: value}; draws: (n, 3) on the same resamples of the same test records.
    """
    return [dict(protocol=protocol, a=a, b=b, measure=m, difference=pa[m] - pb[m],
                 interval=interval(da[:, k] - db[:, k]))
            for protocol, a, b, pa, pb, da, db in pairs for k, m in enumerate(MEASURES)]


def difference_table(found):
    """Table of what differences() gives: a row for each pair, a column for each measure."""
    n = len(MEASURES)
    return markdown(["protocol", "a - b", *(f"{m} [95 %]" for m in MEASURES)], [
        [d[0]["protocol"], f"{d[0]['a']} - {d[0]['b']}",
         *(number(x["difference"], x["interval"]) for x in d)]
        for d in (found[i:i + n] for i in range(0, len(found), n))])


def bare(name):
    """What a row is called where its representation is not probed."""
    return ROWS.get(name, "by chance").removesuffix(", probed")


def report(metrics, figures):
    """The text of report.md: every table, what it means, and the figures."""
    data, results = metrics["data"], metrics["protocols"]
    out = [f"# {metrics['run']}", metrics["about"], ""]
    out += [f"- {note}" for note in metrics["notes"]]
    for name, title in (("official", "Official protocol (the headline)"),
                        ("paper", "The paper's protocol"), ("table3", "As the paper's Table 3")):
        n = data["records"][name]
        out += [f"\n## {title}", f"{ABOUT[name]} {n['train']} records train, {n['choose']} choose, "
                f"{n['test']} test. {ABOUT['seconds']}\n", protocol_table(results[name])]
    out += ["\n## Against what it must beat", "Paired by patient on the same test records; where an"
            " interval holds 0, these records do not tell which is better.\n",
            difference_table(metrics["differences"])]
    out += ["\n## Few labels", ABOUT["labels"] + "\n", markdown(
        ["", "labels", "records", *MEASURES, "s"],
        [[ROWS[name], budget, r["records"],
          *(spread(r[m], r["sd"][m]) for m in MEASURES),
          number(r["seconds"], digits=0)]
         for budget, rows in metrics["labels"].items() for name, r in rows.items()])]
    for key, title, columns in (
            ("clustering", "Clustering", CLUSTERING),
            ("quality", "Quality without labels", QUALITY)):
        out += [f"\n## {title}", ABOUT[key] + "\n", markdown(["", *columns], [
            [bare(name), *(number(r.get(c)) for c in columns)]
            for name, r in metrics[key].items()])]
    out += ["\n## Fewer leads", ABOUT["leads"] + "\n", markdown(
        ["", *(f"{n}: {' '.join(s)}" if n < 6 else f"{n}" for n, s in LEAD_SETS.items())],
        [[ROWS[name], *map(number, row.values())] for name, row in metrics["leads"].items()])]
    if metrics["streams"]:
        intact = number(results["official"]["pretrained"]["macro_auroc"])
        out += ["\n## The two streams", ABOUT["streams"].format(intact) + "\n", markdown(
            ["", "macro AUROC"], [[k, number(v)] for k, v in metrics["streams"].items()])]
    return "\n".join(out + ["\n## Figures", *(f"\n![{f.stem}](figures/{f.name})" for f in figures)
                            ]) + "\n"


# Figures

def save_figure(figure, path, numbers):
    """Write a figure and, next to it, its numbers: rows as CSV, a dict of arrays as NPZ."""
    write_atomic(path, lambda tmp: figure.savefig(tmp, format=path.suffix[1:], dpi=150))
    if isinstance(numbers, dict):
        return save_arrays(path.with_suffix(".npz"), numbers)
    write_atomic(path.with_suffix(".csv"), lambda tmp: pd.DataFrame(numbers).to_csv(
        tmp, index=False, float_format="%.6g"))


def plot_tsne(points, labels, ids, title, path):
    """t-SNE of representations side by side, one colour a class: Fig. 10 of the paper.

    points: {panel: (n, 2)}; labels, ids: (n,)
    """
    figure = Figure((4.6 * len(points), 4.4), layout="constrained")
    axes, rows = figure.subplots(1, len(points), squeeze=False)[0], []
    for axis, (panel, xy) in zip(axes, points.items()):
        for k, name in enumerate(CLASSES):
            at = labels == k
            axis.scatter(*xy[at].T, s=14, color=CLASS_COLORS[name], label=f"{name} ({at.sum()})")
        axis.set(title=panel, xlabel="t-SNE 1", ylabel="t-SNE 2", xticks=[], yticks=[])
        rows += [dict(panel=panel, ecg_id=i, superclass=CLASSES[k], x=x, y=y)
                 for i, k, (x, y) in zip(ids, labels, xy)]
    axes[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path, rows)


def plot_confusion(results, title, path):
    """Confusion matrices {name: (K, K)}: rows are the truth, shares of each row coloured."""
    across = min(4, len(results))
    down = math.ceil(len(results) / across)
    figure = Figure((3.3 * across, 3.2 * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).flat
    for (name, counts), axis in zip(results.items(), axes):
        counts = np.asarray(counts)
        share = counts / counts.sum(1, keepdims=True).clip(1)
        axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for i, j in np.ndindex(K, K):
            axis.text(j, i, counts[i, j], ha="center", va="center", fontsize=8,
                      color="white" if share[i, j] > 0.6 else "black")
        axis.set(xticks=range(K), yticks=range(K), xlabel="predicted", ylabel="true")
        axis.set_xticklabels(CLASSES, fontsize=7)
        axis.set_yticklabels(CLASSES, fontsize=7)
        axis.set_title(ROWS[name], fontsize=8)
    for axis in axes:  # what is left of the grid
        axis.remove()
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path, [dict(row=name, true=CLASSES[i], predicted=CLASSES[j], records=n)
                               for name, counts in results.items()
                               for (i, j), n in np.ndenumerate(np.asarray(counts))])


def plot_roc(y, scores, title, path):
    """ROC curves of each class, a panel a method. y (n, K); scores {name: (n, K)}."""
    figure, rows = Figure((3.6 * len(scores), 4.0), layout="constrained"), []
    for axis, (name, p) in zip(figure.subplots(1, len(scores), squeeze=False)[0], scores.items()):
        for k in np.flatnonzero(y.any(0) & ~y.all(0)):
            fpr, tpr, _ = roc_curve(y[:, k], p[:, k])
            area = roc_auc_score(y[:, k], p[:, k])
            axis.plot(fpr, tpr, color=CLASS_COLORS[CLASSES[k]], label=f"{CLASSES[k]} {area:.2f}")
            rows += [dict(row=name, superclass=CLASSES[k], false_positive_rate=f,
                          true_positive_rate=t) for f, t in zip(fpr, tpr)]
        axis.plot([0, 1], [0, 1], color="0.7", linewidth=0.8, linestyle="--")
        axis.set(xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
        axis.set_title(ROWS[name], fontsize=9)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7, loc="lower right", title="AUROC", title_fontsize=7)
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path, rows)


def plot_lines(lines, xlabel, title, path, ticks, log=False):
    """Macro AUROC of each method against something: {name: [(x, mean, sd)]}."""
    figure = Figure((8.4, 4.2), layout="constrained")
    axis = figure.subplots()
    for i, (name, points) in enumerate(lines.items()):
        x, mean, sd = np.array(points, dtype=float).T
        aside = 1 + 0.02 * (i - len(lines) / 2) if log else 1  # so that the bars do not overlap
        axis.errorbar(x * aside, mean, sd if sd.any() else None, marker="osD^vPX<"[i], capsize=2,
                      markersize=5, color=ROW_COLORS[name], label=ROWS[name],
                      linestyle="--" if name in START else "-")
    axis.set(xlabel=xlabel, ylabel="macro AUROC, fold 10", xscale="log" if log else "linear")
    axis.set_xticks(*zip(*ticks.items()))
    axis.minorticks_off()
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(title, fontsize=9)
    save_figure(figure, path, [dict(row=name, x=x, mean=m, sd=s)
                               for name, points in lines.items() for x, m, s in points])


def draw(e, metrics):
    """All figures of a run, in RUN/figures; returns their paths."""
    folder, end, about = e.run / "figures", e.args.format, metrics["about"]
    official, paper, table3 = (e.tasks[name] for name in ("official", "paper", "table3"))

    def project():
        out = {}
        for name in ("untrained", "pretrained"):
            z = e.features(name)[0].mean(1)[table3.test]
            perplexity = min(30, (len(z) - 1) / 3)
            out[name] = TSNE(perplexity=perplexity, random_state=0).fit_transform(z)
        return out

    points = e.piece("tsne", project)
    path = folder / f"tsne.{end}"
    plot_tsne({bare(name): points[name] for name in ("untrained", "pretrained")},
              table3.y[table3.test].argmax(1), e.cache.index.ecg_id.to_numpy()[table3.test],
              f"t-SNE, folds 9 and 10, one superclass. {about}", path)
    paths = [path, folder / f"confusion.{end}", folder / f"roc.{end}", folder / f"leads.{end}",
             folder / f"labels.{end}"]
    plot_confusion({name: r["confusion"] for name, r in metrics["protocols"]["paper"].items()},
                   f"Fold 10, one superclass ({len(paper.test)} records). {about}", paths[1])
    plot_roc(official.y[official.test], {name: e.scores(name, official)["test"] for name in
                                         ("rocket", "untrained", "pretrained")},
             f"Fold 10, official protocol ({len(official.test)} records). {about}", paths[2])
    plot_lines({name: [(n, auroc, 0) for n, auroc in zip(LEAD_SETS, row.values())]
                for name, row in metrics["leads"].items()}, "leads at test",
               f"Trained on 12 leads, tested on fewer. {about}", paths[3],
               {n: str(n) for n in LEAD_SETS})
    lines, full = {}, metrics["protocols"]["official"]
    for name in e.rows:
        few = [rows[name] for rows in metrics["labels"].values()]
        lines[name] = [(r["records"], r["macro_auroc"], r["sd"]["macro_auroc"]) for r in few]
        if "100%" not in metrics["labels"] and name in full:
            lines[name].append((len(official.train), full[name]["macro_auroc"], 0))
    ticks = {int(n): f"{n:.0f}" for points in lines.values() for n, _, _ in points}
    plot_lines({name: sorted(points, key=lambda point: point[0])
                for name, points in lines.items()}, "records with labels",
               f"Few labels, mean and sd; draws: {e.args.seeds}. {about}", paths[4], ticks, True)
    return paths


def evaluate(args):
    """Evaluate one run: metrics.json, report.md and figures/ in its folder."""
    e = Evaluation(args)
    meta, about = e.cache.meta, describe(e.saved, e.cache.meta)
    print(f"{e.run}: {about}\nworking on what is not done yet:", flush=True)
    full = [name for name in e.rows if name != "finetuned" or "100%" in args.labels]
    metrics = dict(
        run=str(e.run), about=about, settings=vars(args), view=e.view, seed=e.seed, notes=e.notes,
        data=dict(meta, pretrained_on=e.saved["data"]["data"], records={"all": meta["records"]} | {
            name: {part: len(getattr(task, part)) for part in ("train", "choose", "test")}
            for name, task in e.tasks.items()} | dict(views=len(e.cache.rows([TEST_FOLD])))),
        protocols={name: {row: e.result(row, task) for row in full
                          if name != "table3" or row in PROBED} for name, task in e.tasks.items()},
        labels={budget: {row: e.limited(row, budget) for row in e.rows} for budget in args.labels})
    official = e.tasks["official"]
    y = official.y[official.test]
    metrics["leads"] = {row: {n: mean_of_known(aurocs(y, p)) for n, p in zip(
        LEAD_SETS, e.scores(row, official)["leads"])} for row in full}
    represented = [row for row in PROBED if row in e.rows and row != "majority"]
    metrics["clustering"] = {row: e.clusters(row) for row in (*represented, "chance")}
    metrics["quality"] = {row: e.quality(row) for row in represented}
    metrics["differences"] = differences([
        (task, ROWS["pretrained"], ROWS[row], results["pretrained"], results[row],
         e.draws[f"{task}-pretrained"], e.draws[f"{task}-{row}"])
        for task, results in metrics["protocols"].items() if task != "table3"
        for row in results if row != "pretrained"])
    metrics["streams"] = e.streams() if isinstance(e.model.encoder, DualView) else None
    metrics = plain(metrics)
    text = report(metrics, draw(e, metrics))
    save_arrays(e.run / "eval" / "draws.npz", e.draws)
    write_atomic(e.run / "report.md", lambda tmp: tmp.write_text(text))
    write_atomic(e.run / "metrics.json", lambda tmp: tmp.write_text(json.dumps(metrics, indent=1)))
    print(f"{text}\n-> {e.run}/report.md, metrics.json, figures/")


# Several runs

def read_runs(folders):
    """The evaluated ones among run folders: dicts of folder, metrics, saved (args.json), draws."""
    runs = []
    for folder in map(Path, folders):
        if not (folder / "metrics.json").exists():
            print(f"note: {folder} has no metrics.json and is left out; make eval RUN={folder}")
            continue
        try:
            metrics, saved = (json.loads((folder / name).read_text())
                              for name in ("metrics.json", "args.json"))
            if not {"settings", "protocols", "clustering", "quality"} <= set(metrics):
                raise ValueError("metrics.json is of another version")
            with np.load(folder / "eval" / "draws.npz") as draws:
                runs.append(dict(folder=folder, metrics=metrics, saved=saved, draws=dict(draws)))
        except (OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
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
    args, settings = run["saved"]["args"], run["metrics"]["settings"]
    usual = default_args(["--preset", args["preset"], "--view", args["view"]])
    usual = vars(usual) | asdict(from_args(ViewConfig, usual))  # settings that follow the view
    found = {k: v for k, v in args.items()
             if k not in NOT_A_RESULT | {"seed"} and usual.get(k, v) != v}
    return found | {k: settings[k] for k in ("first_view", "label_lr") if settings[k]}


def group_runs(runs):
    """Runs that differ by their seed alone, together: a list of dict(label, view, data, runs).

    Raises InputError when a seed is there twice in a group.
    """
    groups = {}
    for run in runs:
        args, meta = run["saved"]["args"], run["metrics"]["data"]
        label = " ".join([args["view"], *["small"] * (args["preset"] == "small"),
                          *(f"{k}={v}" for k, v in sorted(changes(run).items()))])
        groups.setdefault((label, meta["fingerprint"]), []).append(run)
    out = []
    for (label, fingerprint), members in groups.items():
        seeds, meta = [run["metrics"]["seed"] for run in members], members[0]["metrics"]["data"]
        if len(set(seeds)) < len(seeds):
            raise InputError("the same seed twice: "
                             f"{', '.join(str(run['folder']) for run in members)}; leave one out")
        data = (f"{'SYNTHETIC ' if meta['synthetic'] else ''}{Path(meta['data']).name}, "
                f"{meta['rate']} Hz, {meta['records']['all']} records")
        if [name for name, _ in groups].count(label) > 1:
            label += f" ({data}, {fingerprint[:6]})"
        out.append(dict(label=label, view=members[0]["metrics"]["view"], data=data, seeds=seeds,
                        meta=meta, runs=members))
    return sorted(out, key=lambda g: (list(VIEWS).index(g["view"]), len(g["label"])))


def paper_numbers(view):
    """The paper's Tables 2 and 3 for a view, by our metrics' names."""
    return dict(zip([f"clustering/pretrained/{m}" for m in CLUSTERING], TABLE2[view])) | dict(
        zip([f"protocols/table3/pretrained/{m}" for m in TABLE3_MEASURES], TABLE3[view]))


def collect(groups):
    """All numbers as a long table: group, metric, mean and sd over seeds, the paper's, data."""
    rows = []
    for g in groups:
        paper = paper_numbers(g["view"])
        found = pd.concat([pd.json_normalize({key: run["metrics"][key] for key in (
            "protocols", "labels", "clustering", "quality", "leads", "streams")}, sep="/")
            for run in g["runs"]]).select_dtypes("number")
        for metric, values in found.items():
            part, table = metric.split("/")[:2]
            key = {"protocols": table, "clustering": "table3", "quality": "views"}.get(
                part, "official")
            n = g["meta"]["records"]
            tested = (n["all"] if metric.endswith("rankme") else n["table3"]["test"]
                      if metric.endswith("shift") else n[key] if key == "views" else n[key]["test"])
            rows.append(dict(group=g["label"], metric=metric, mean=values.mean(), sd=values.std(),
                             runs=values.count(), paper=paper.get(metric), data=g["data"],
                             tested_on=tested))
    return pd.DataFrame(rows)


def pairs(groups):
    """What differences() wants: within each group, and between groups on the same records.

    Draws are averaged over the seeds of a group first.
    """
    def mean(group, task, row):
        points = {m: np.mean(np.array([run["metrics"]["protocols"][task][row][m]
                                       for run in group["runs"]], float)) for m in MEASURES}
        return points, np.mean([run["draws"][f"{task}-{row}"] for run in group["runs"]], axis=0)

    wanted = [((g, "pretrained"), (g, row)) for g in groups for row in ("untrained", "rocket")] + [
        ((a, row), (b, row)) for a, b in combinations(groups, 2)
        if a["meta"]["index"] == b["meta"]["index"] for row in ("pretrained", "untrained")]
    for task in ("official", "paper"):
        for a, b in wanted:
            (pa, da), (pb, db) = mean(a[0], task, a[1]), mean(b[0], task, b[1])
            yield (task, *(f"{g['label']}, {bare(row)}" for g, row in (a, b)), pa, pb,
                   da, db)


def compare(args):
    """Tables over several runs, the paper's numbers beside ours: OUT.md, OUT.csv, OUT.json."""
    groups = group_runs(read_runs(args.runs))
    rows, found = collect(groups), differences(pairs(groups))
    at = {(r["group"], r["metric"]): r for r in rows.to_dict("records")}

    def cell(group, metric):
        r = at.get((group["label"], metric), dict(mean=None, sd=None, runs=0))
        n = len(group["seeds"])
        few = f" ({r['runs']} of {n} seeds)" if 0 < r["runs"] < n else ""
        return spread(r["mean"], r["sd"]) + few

    def table(title, about, prefix, measures, paper=False):
        lines = []
        for g in groups:
            there = {name for run in g["runs"] for name in reduce(
                dict.get, prefix.split("/"), run["metrics"])}
            for name in (name for name in (*ROWS, "chance") if name in there):
                lines.append([g["label"], ROWS[name] if "/" in prefix else bare(name),
                              *(cell(g, f"{prefix}/{name}/{m}") for m in measures)])
            if paper and g is [other for other in groups if other["view"] == g["view"]][-1]:
                lines.append([g["view"], "**the paper**", *(number(paper_numbers(g["view"])[
                    f"{prefix}/pretrained/{m}"]) for m in measures)])
        return f"\n## {title}\n{about}\n\n" + markdown(["view", "", *measures], lines)

    out = ["# Comparison of runs\nMean ± standard deviation over seeds. **The paper**: its own "
           "numbers, on all of PTB-XL (its clustering scores are the best of each run, ours those "
           "of the final weights).\n", markdown(
               ["view", "data", "test records, official", "paper", "table3", "seeds"],
               [[g["label"], g["data"], *(g["meta"]["records"][t]["test"] for t in
                                          ("official", "paper", "table3")),
                 " ".join(map(str, g["seeds"]))] for g in groups]),
           table("Clustering: Table 2 of the paper", ABOUT["clustering"], "clustering", CLUSTERING,
                 True),
           table("Quality without labels", ABOUT["quality"], "quality", QUALITY),
           table("Linear probe: Table 3 of the paper", ABOUT["table3"], "protocols/table3",
                 TABLE3_MEASURES, True),
           table("Official protocol", ABOUT["official"], "protocols/official", MEASURES),
           table("The paper's protocol, fold 10", ABOUT["paper"], "protocols/paper", MEASURES),
           "\n## Differences\nProbes on the same test records, means over seeds, with a bootstrap "
           "interval paired by patient. It tells of the test records alone, not of what another "
           "seed would give. Views differ untrained already: a probe sees other inputs.\n",
           difference_table(found),
           "\n## Published on all of PTB-XL\nMacro AUROC, fold 10, official protocol, as others "
           "report it: not measured here, and not comparable with runs on other data.\n", markdown(
               ["method", "macro AUROC", "source"], [[n, number(v), s or "not checked by us"]
                                                     for n, v, s in PUBLISHED])]
    text, path = "\n".join(out) + "\n", Path(args.out)
    write_atomic(f"{path}.md", lambda tmp: tmp.write_text(text))
    write_atomic(f"{path}.csv", lambda tmp: rows.to_csv(tmp, index=False))
    write_atomic(f"{path}.json", lambda tmp: tmp.write_text(json.dumps(plain(dict(
        rows=rows.to_dict("records"), differences=found, published=PUBLISHED)), indent=1)))
    print(f"{text}-> {path}.md, .csv, .json")


# What it costs

def seconds_of_call(function, device, repeats=5):
    """Median wall seconds of a call, after one that does not count."""
    def once():
        began = time.monotonic()
        function()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.monotonic() - began

    once()
    return float(np.median([once() for _ in range(repeats)]))


def peak_bytes(device):
    """Peak memory of this process, or on its GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # ru_maxrss would begin with what the parent had
    if status.exists():
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def as_rank(rank, processes, port, out, function, args, named):
    """Run a function as one of several processes, which find each other as under torchrun."""
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes),
                       LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR="localhost",
                       MASTER_PORT=str(port))
    found = function(*args, **named)
    if rank == 0:
        Path(out).write_text(json.dumps(found))
    leave_processes()


def apart(function, *args, processes=1, **named):
    """A function's result in fresh processes, whose peak memory is their own; the first one's.

    Raises ProcessException when one fails; the others are then ended.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/found"
        spawn(as_rank, (processes, port, out, function, args, named), processes)
        return json.loads(Path(out).read_text())


class PlainCross(nn.Module):
    """CrossAttention written with torch.nn.MultiheadAttention, to compare with."""

    def __init__(self, config):
        super().__init__()
        D, H = config.width, config.heads
        self.t, self.c = (nn.MultiheadAttention(D, H, batch_first=True) for _ in "tc")
        self.norm_time, self.norm_channel = nn.LayerNorm(D), nn.LayerNorm(D)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, t, c):
        return (self.norm_time(t + self.dropout(self.t(t, c, c, need_weights=False)[0])),
                self.norm_channel(c + self.dropout(self.c(c, t, t, need_weights=False)[0])))


def plain_modules(model):
    """A copy of a model with torch.nn's encoder layers and attention in the place of ours."""
    model = deepcopy(model)
    config, encoder = model.config, model.encoder
    for layers in (encoder.time_layers, encoder.channel_layers):
        for i in range(config.depth):
            layers[i] = nn.TransformerEncoderLayer(
                config.width, config.heads, config.ff_mult * config.width, config.dropout, "gelu",
                batch_first=True, norm_first=True)
            layers[i].self_attn.dropout = 0.0  # as ours; with it the CPU has no fused kernel
            layers[i].dropout = nn.Identity()  # nor have ours one within the feed-forward
    encoder.cross = PlainCross(config)
    return model


def count_flops(step):
    """Floating-point operations of a call, by PyTorch's counter; it lacks the CPU's attention."""
    def forward(q, k, v, *rest, **more):
        return sdpa_flop_count(q, k, v)

    def backward(grad, q, k, v, *rest, **more):
        return sdpa_backward_flop_count(grad, q, k, v)

    aten = torch.ops.aten
    with FlopCounterMode(display=False, custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: forward,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: backward}) as counter:
        step()
    return counter.get_total_flops()


def measure_step(folder, argv, batch, every=1, theirs=False, repeats=0):
    """Training steps of `batch` records from a cache, in processes of their own.

    argv: of train.py; every: take one sample in so many; theirs: with torch.nn's modules; repeats:
    steps to take the median of, at least 3 on a CPU and 10 on a GPU
    ->  dict: median seconds of a step and of its parts, peak_bytes, flop of a step
    """
    args, cache = default_args(argv), open_cache(folder)
    config, size, device = from_args(ViewConfig, args), from_args(Config, args), join_processes(
        args.device)
    rows = cache.rows(TRAIN_FOLDS)[:batch]
    if every > 1:
        cache = replace(cache, signals=cache.signals[rows, ::every], meta=cache.meta | dict(
            rate=cache.meta["rate"] // every))
        rows = np.arange(len(rows))
    _, autocast = pick_autocast(args.precision, device)
    set_seed(0)
    model = Contrastive(size)
    model = (plain_modules(model) if theirs else model).to(device).train()
    forward, clock = accelerate(model, args), Clock()
    optimizer = torch.optim.Adam(model.parameters())
    rows, mine = np.resize(rows, batch), share(batch)
    keep = draw_keep(config, batch, 0, device=device)
    micro = math.gcd(mine.stop - mine.start, min(args.micro_batch, mine.stop - mine.start))
    parts = (mine.stop - mine.start) // micro
    few = 3 if device.type == "cpu" else 10
    repeats = max(few, repeats)
    feed = batches(cache, config, 0, [(0, rows)] * (repeats + 4), device, args.workers, clock)

    def step():
        backward(forward, next(feed), keep, batch, micro, (0,), negatives=args.negatives,
                 autocast=autocast)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    def once():
        part = slice(mine.start, mine.start + micro)
        return project(model, views, keep, part, (0,), autocast)[1]

    def seconds(function):
        return seconds_of_call(function, device, few)

    fetch(cache, rows[:1], device)
    before = peak_bytes(device)
    step()
    clock.seconds = 0.0  # workers have begun
    out = dict(step=seconds_of_call(step, device, repeats), peak_bytes=peak_bytes(device),
               bytes_before=before, first_pass=0.0, data=clock.seconds / (repeats + 1))
    views = next(feed)
    if parts > 1 and args.negatives == "batch":
        out["first_pass"] = parts * seconds(torch.no_grad()(once))
    out["forward"] = parts * seconds(once)
    out["backward"] = parts * seconds(lambda: once().sum().backward()) - out["forward"]
    out["optimiser"] = seconds(optimizer.step)
    with torch.compiler.set_stance("force_eager"):
        out["flop"] = count_flops(step) * ranks()[1]
    return out | dict(batch=batch, micro_batch=micro, processes=ranks()[1],
                      records_per_second=batch / out["step"],
                      tokens=views(slice(mine.start, mine.start + 1))[0].shape[1]
                      // size.time_stride)


class PerItem(Dataset):
    """What many loaders do, to compare with: one float32 record at a time, NumPy's z-score."""

    def __init__(self, signals):
        self.signals = signals

    def __len__(self):
        return len(self.signals)

    def __getitem__(self, i):
        x = np.array(self.signals[i])
        x = (x - x.mean(0)) / (x.std(0) + 1e-8)
        return torch.from_numpy(np.stack([v * (np.random.rand(C) >= 0.5).astype(np.float32)
                                          for v in (x[0::2], x[1::2])]))


def measure_loading(cache, batch, device):
    """Records a second: by wfdb, one float32 record at a time, and as training cuts each view."""
    rows, out = np.resize(cache.rows(TRAIN_FOLDS), batch), {}

    def rate(n, function):
        return n / seconds_of_call(function, device, 3)

    try:
        table = load_tables(cache.meta["data"])
        paths = [str(Path(cache.meta["data"]) / name) for name in table[RATES[cache.meta["rate"]]]]
        out["wfdb"] = rate(len(paths[:64]), lambda: [wfdb.rdrecord(p) for p in paths[:64]])
    except (InputError, OSError) as error:
        print(f"note: nothing is read with wfdb: {error}")
    with tempfile.TemporaryDirectory() as folder:
        shape = (min(len(cache.signals), 512), *cache.signals.shape[1:])
        signals = np.memmap(f"{folder}/float32", np.float32, "w+", shape=shape)
        signals[:] = cache.signals[:len(signals)]
        some = Subset(PerItem(signals), np.resize(np.arange(len(signals)), batch))
        for name, workers in (("per item", 0), ("per item, workers", multiprocessing.cpu_count())):
            out[name] = rate(batch, lambda: list(DataLoader(some, 64, num_workers=workers)))
    for name, flags in {"contig": {}, "noncontig": {}, "noncontig, 64 records": {},
                        "noncontig, shift": dict(shift=True), "stochastic": {},
                        "stochastic, workers": {}}.items():
        config = ViewConfig(view=name.split(",")[0], **flags)
        keep = draw_keep(config, batch, 0, device=device)
        few = np.resize(rows[:64], batch) if "64" in name else (
            rows[:256] if config.view == "stochastic" else rows)

        def cut():
            workers = multiprocessing.cpu_count() if "workers" in name else 0
            (views,) = batches(cache, config, 0, [(0, few)], device, workers)
            for i in range(0, len(few), 16):
                pair = views(slice(i, min(i + 16, len(few))))
                if keep is not None:
                    pair = [v * k[i:i + 16, None] for v, k in zip(pair, keep)]

        out[name] = rate(len(few), cut)
    return out


def bench_plan(args, rate, device):
    """The steps to measure: name -> (argv of train.py, batch, more for measure_step)."""
    cpu = device.type == "cpu"
    n, micro = (2, 1) if cpu else (args.batch, 32)  # of `paper`
    processes = 2 if cpu else 1
    if args.device in ("auto", "cuda") and device.type == "cuda":
        processes = math.gcd(args.batch, torch.cuda.device_count())
    small, paper = ["--preset", "small", "--micro-batch"], ["--micro-batch", str(micro)]
    accumulate = ["--negatives", "micro"]
    steps = 7  # fewer moved the ratio of exact batch and plain accumulation by a tenth
    plan = {"small": ([*small, "64"], args.batch, dict(repeats=steps)),
            "small, plain accumulation": ([*small, "64", *accumulate], args.batch,
                                          dict(repeats=steps)),
            # as many steps as the large batch has parts: the heap grows for a while
            "small, one micro-batch": ([*small, "64"], 64, dict(repeats=steps * args.batch // 64)),
            "small, micro-batch 16": ([*small, "16"], 64, {}),
            "small, stochastic": ([*small, "64", "--view", "stochastic"], 64, dict(repeats=10))}
    if processes > 1:
        plan[f"small, {processes} processes"] = [*small, "64"], args.batch, dict(
            processes=processes)
    plan = {name: (argv, batch, dict(every=rate // 100) | more)
            for name, (argv, batch, more) in plan.items()}
    plan |= {f"small, {rate // every} Hz": ([*small, "64"], 64, dict(every=every))
             for every in (1, 2) if rate == 500}
    if not args.small:
        plan |= {"paper": (paper, n, {}), "paper, torch.nn": (paper, n, dict(theirs=True)),
                 "paper, compiled": ([*paper, "--compile"], n, {}),
                 "paper, plain accumulation": ([*paper, *accumulate], n, {}),
                 "paper, one micro-batch": (paper, micro, dict(repeats=3 * n // micro))}
        plan |= {f"paper, --time-stride {s}": ([*paper, "--time-stride", str(s)], n, {})
                 for s in (2, 4, 8)}
    return plan


def bench_ratios(loading, steps):
    """What the rows say of each other; without those that could not be measured."""
    ratios = {name: loading["noncontig"] / loading[base] for name, base in (
        ("noncontig views over reading with wfdb", "wfdb"),
        ("noncontig views over one record at a time", "per item")) if base in loading}

    def add(name, key, above, below):
        if above in steps and below in steps:
            ratios[name] = key(steps[above]) / key(steps[below])

    for preset in "small", "paper":
        one = f"{preset}, one micro-batch"
        add(f"{preset}, exact batch over a micro-batch, peak memory",
            lambda row: row["peak_bytes"], preset, one)
        add(f"{preset}, exact batch over a micro-batch, peak memory above the start",
            lambda row: row["peak_bytes"] - row["bytes_before"], preset, one)
        add(f"{preset}, exact batch over plain accumulation, time",
            lambda row: row["step"], preset, f"{preset}, plain accumulation")
    for name in steps:
        if "processes" in name:
            add(f"{name} over one, records/s", lambda row: row["records_per_second"], name, "small")
    add("paper, torch.nn over ours, time", lambda row: row["step"], "paper, torch.nn", "paper")
    add("paper, ours over compiled, time", lambda row: row["step"], "paper", "paper, compiled")
    return ratios


def bench(args):
    """Measure what loading and training cost here: tables on the screen, numbers in args.out."""
    cache, device = open_cache(args.cache), pick_device(args.device)
    rate = cache.meta["rate"]
    if args.batch % 256 or args.batch < 256:
        raise InputError(f"--batch {args.batch}: give a multiple of 256, two parts for each of two "
                         "processes")
    dtype, n = (torch.float32, 3072) if device.type == "cpu" else (torch.bfloat16, 8192)
    matrix = torch.randn(n, n, device=device, dtype=dtype)
    peak = 2 * n ** 3 / seconds_of_call(lambda: matrix @ matrix, device)
    found = dict(peak_flops=peak, dtype=str(dtype), data=cache.meta["data"], rate=rate,
                 records=cache.meta["records"], device=torch.cuda.get_device_name(device)
                 if device.type == "cuda" else platform.processor() or platform.machine(),
                 threads=torch.get_num_threads(), torch=torch.__version__,
                 loading=measure_loading(cache, args.batch, device))
    print(f"{describe_data(cache.meta)}: {cache.meta['records']} records at {rate} Hz; {device}, "
          f"{torch.get_num_threads()} threads, {peak / 1e9:.0f} GFLOP/s in a {dtype} product\n\n"
          + markdown(["loading and views", "records/s"], [[k, number(v, digits=0)]
                                                          for k, v in found["loading"].items()]))
    plan, steps, lines = bench_plan(args, rate, device), {}, []

    def save():
        numbers = found | dict(steps=steps, ratios=bench_ratios(found["loading"], steps))
        write_atomic(args.out, lambda tmp: tmp.write_text(json.dumps(plain(numbers), indent=1)))
        return numbers["ratios"]

    ratios = save()
    for name, (argv, batch, more) in plan.items():
        try:
            row = apart(measure_step, args.cache, [*argv, "--device", args.device], batch, **more)
        except ProcessException as error:  # no memory, or no compiler: other rows still count
            print(f"  {name}: not measured: {str(error)[-300:]}", flush=True)
            continue
        print(f"  {name}: {row['records_per_second']:.2f} records/s", flush=True)
        steps[name] = row
        ratios = save()
        devices = row["processes"] if device.type == "cuda" else 1
        lines.append([name, row["tokens"], batch, row["micro_batch"], number(
            row["records_per_second"], digits=2), *(f"{row[part] / row['step']:.1%}" for part in (
                "data", "first_pass", "forward", "backward", "optimiser")),
            f"{row['peak_bytes'] / 2 ** 20:.0f}", number(row["flop"] / batch / 1e9, digits=1),
            number(row["flop"] / row["step"] / peak / devices, digits=2)])
    print("\n" + markdown(["step", "tokens", "batch", "micro", "records/s", "data", "first pass",
                           "forward", "backward", "optimiser", "peak MiB", "GFLOP/record",
                           "of peak"], lines))
    print("\n" + markdown(["ratio", ""], [[k, number(v, digits=2)] for k, v in ratios.items()]))
    print(f"-> {args.out}")
    if len(steps) < len(plan):
        raise InputError(f"not measured: {'; '.join(k for k in plan if k not in steps)}: the "
                         "reasons are above")


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    style = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    p = commands.add_parser("run", help="evaluate one run", **style)
    p.add_argument("--run", default="runs/noncontig-s0", help="a finished run folder")
    p.add_argument("--cache", help="folder of: python data.py cache; by default the run's own")
    p.add_argument("--fast", action="store_true", help="leave out the rows that train networks: "
                   "fine-tuning, from scratch, ResNet-18; the report is then without them")
    p.add_argument("--first-view", action="store_true", help="a segment model sees the first view "
                   "of a record alone; by default its two views are averaged")
    p.add_argument("--labels", nargs="+", default=["10shot", "10%"], help="few labels: 10shot for "
                   "10 records a class, or shares such as 1%% 10%% 100%%")
    p.add_argument("--seeds", type=int, default=3, help="draws of few labels")
    p.add_argument("--label-lr", type=float, help="peak learning rate of networks trained with "
                   "labels (a fine-tuned encoder takes a tenth); by default the run's --max-lr")
    p.add_argument("--bootstrap", type=int, default=1000, help="resamples, by patient")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    p.add_argument("--format", choices=("png", "pdf"), default="png", help="of the figures")
    p = commands.add_parser("bench", help="what loading and training cost here", **style)
    p.add_argument("--cache", default="cache/ptbxl-500", help="folder of: python data.py cache")
    p.add_argument("--batch", type=int, default=1024,
                   help="effective batch, for loading and steps: a multiple of 256")
    p.add_argument("--small", action="store_true", help="leave out the paper preset")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    p.add_argument("--out", default="runs/bench.json", help="where the numbers go")
    p = commands.add_parser("compare", help="tables over several evaluated runs", **style)
    p.add_argument("runs", nargs="*", help="run folders; those not evaluated are named, left out")
    p.add_argument("--out", default="runs/compare", help="tables go to OUT.md, OUT.csv, OUT.json")
    return parser.parse_args(argv)


def main(args):
    dict(run=evaluate, bench=bench, compare=compare)[args.command](args)


if __name__ == "__main__":
    run_script(lambda: main(get_args()))
