"""Contrastive pretraining of a dual-view encoder on a cache of 12-lead ECGs (paper 4.4).

In:  a cache folder of data.py (int16 microvolt); labels are never used for training.
Out: a run folder: args.json, log.jsonl (a line an epoch), last.pt (to go on), model.pt (at the
     end), tensorboard/. The same command again resumes it, after a kill too; SIGTERM or Ctrl-C end
     it once the step at hand is saved.

    python train.py --cache cache/ptbxl-500 --view noncontig
    python train.py --cache cache/synth-100 --view contig --preset small --epochs 3 --run runs/try

The method comes first: train(), and what a step calls: batches() makes two views of each record,
exact_step() sets the gradient of NT-Xent over the whole batch in the memory of a micro-batch, then
Adam. All randomness is a function of (seed, step): a resumed run repeats the interrupted one.
"""
import argparse
import fcntl
import json
import math
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple, Optional

import numpy as np
import torch
import torch.distributed as dist
from sklearn.metrics import calinski_harabasz_score, davies_bouldin_score, silhouette_score
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data import (LEADS, TRAIN_FOLDS, VAL_FOLD, InputError, add_flags, add_shared, bounded,
                  fold_names, from_args, normalize, open_cache, read_labels, reading, run_script,
                  setting, write_atomic, write_json, write_text)
from model import (Config, Contrastive, add_model_flags, compile_blocks, embed, load_run,
                   n_parameters, nt_xent, parse, read_args)
from views import (DISTURB, POOL, VIEWS, ViewConfig, augment, disturb, draw_leads, equal_pair,
                   generator, pool, shift)

BATCH = 1024  # effective batch of the paper
MIN_STEPS = 8  # steps an epoch that the automatic batch leaves
START_DIV, RISE = 25, 0.3  # one cycle: first lr is max / 25, 30 % of the steps rise (PyTorch's)
VAL_STEP = 2 ** 31  # a step that training never reaches: validation has the same views each time
CHUNK = 16  # records that a worker hands over at once: a container's shared memory can be small
STREAM_NORMS = "grad_norm_time_corrected", "grad_norm_channel_corrected"  # at the pooled streams
SIGNALS = signal.SIGTERM, signal.SIGINT  # SLURM or a spot machine ask to stop so; Ctrl-C
NOT_A_RESULT = {"run", "cache", "workers", "device", "save_minutes", "keep_every"}  # may change
SHOWN = ("epoch", "loss", "val_loss", "lr", "grad_norm_ratio_corrected", "silhouette",
         "records_per_second", "data_share", "peak_mib")  # of a row of the log, on the screen


# The method

def train(args, asked_to_stop=lambda device: False):
    """Pretrain and write the run folder. Raises InputError, before work starts, for bad input.

    asked_to_stop: read in each step; once true, the state is saved, and the same command goes on
    """
    config, size, objective = (from_args(cls, vars(args))
                               for cls in (ViewConfig, Config, Objective))
    vars(args).update(asdict(config))  # aliases and automatic settings are resolved at once
    cache = open_cache(args.cache)
    rows, val_rows = check_data(cache, config, size)
    device = join_processes(args.device)
    plan = settle(args, len(rows), len(val_rows), ranks()[1])
    torch.manual_seed(args.seed)  # of the initial weights; all else has streams of its own
    model = Contrastive(size).to(device)
    model.precision = pick_precision(args.precision, device)
    run = RunFolder(args.run or f"runs/{config.view}-s{args.seed}",
                    describe_run(args, config, model, cache, plan))
    if run.finished:
        return run.close(f"finished, nothing to do; next: make eval RUN={run.path}")
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=args.weight_decay)
    start, sums = run.restore(model, optimizer)
    if run.first:
        announce(run, len(rows), len(val_rows), start)
    if args.compile:
        compile_blocks(model)
    load = partial(batches, cache, config, args.seed, device=device, workers=args.workers)
    val_order = [(VAL_STEP + i, val_rows[i:i + plan.val_batch])
                 for i in range(0, len(val_rows) - plan.val_batch + 1, plan.val_batch)]
    single_rows, single_classes = single_labels(cache, val_rows)

    tick = time.monotonic()
    for batch in tqdm(load(epoch_order(rows, plan, args.seed, start)), run.path.name, plan.total,
                      initial=start, unit="step", disable=None if run.first else True):
        step, waited = batch.step, time.monotonic() - tick
        lr = learning_rate(step, plan.total, plan.warmup, args.max_lr, args.final_lr)
        optimizer.param_groups[0]["lr"] = lr
        model.train()
        loss, norms = STEPS[objective.negatives](model, batch, objective, plan.micro)
        stats = dict(n=1, loss=loss, waited=waited) | stream_statistics(model, norms)
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf))
        check_finite(step, plan, loss=loss, gradient_norm=norm)
        optimizer.step()

        stats |= dict(grad_norm=norm, seconds=time.monotonic() - tick)
        sums = {key: sums.get(key, 0) + value for key, value in stats.items()}
        epoch_ends = (step + 1) % plan.steps == 0 or step + 1 == plan.total
        if epoch_ends:
            model.eval()
            val_loss = np.mean([float(objective(project_all(model, val_batch, plan.micro)))
                                for val_batch in load(val_order)])
            z = extract(lambda x: embed(model, x, config).mean(1), cache, single_rows, device,
                        plan.micro)
            check_finite(step, plan, loss_in_validation=val_loss, representations=z)
            row = dict(epoch=step // plan.steps + 1, step=step + 1, lr=lr, val_loss=float(val_loss))
            run.add(row | summary(sums, run.record) | clustering(z, single_classes))
            sums = {}
            if args.keep_every and row["epoch"] % args.keep_every == 0:
                run.write_model(model, run.path / f"epoch-{row['epoch']:03}")
        stopping = asked_to_stop(device)
        if epoch_ends or stopping or time.monotonic() - run.saved_at > 60 * args.save_minutes:
            run.save(model, optimizer, step + 1, sums)
        if stopping and step + 1 < plan.total:
            return run.close(f"stopped at step {step + 1} of {plan.total}; the same command goes "
                             "on from here")
        tick = time.monotonic()
    run.write_model(model, run.path)
    run.close(f"finished, {plan.total} steps; next: make eval RUN={run.path}")


def exact_step(model, batch, objective, micro):
    """Set .grad to the gradient of the loss over the whole effective batch.

    GradCache (Gao et al. 2021, arXiv 2101.06983): project all micro-batches without a graph; take
    the loss of all processes' projections, and its gradient there; project each micro-batch again
    with a graph and the same randomness, and back-propagate its share of that gradient.
    ->  loss, [norm at time, norm at channel]: gradient norms at what the streams hand on, or 0
    """
    # deviation: the paper accumulates gradients of micro-batches, which is not NT-Xent on 1024
    rank, processes = ranks()
    n = batch.views.shape[1]  # records of this process
    if processes == 1 and n <= micro:
        return accumulate_step(model, batch, objective, micro)  # the same, in one pass
    projections = project_all(model, batch, micro).requires_grad_()  # (1 or 3, V, B, P)
    loss = objective(projections)
    (gradient,) = torch.autograd.grad(loss, projections)
    gradient = gradient.chunk(processes, dim=2)[rank]  # (1 or 3, V, n, P)
    model.zero_grad(set_to_none=False)
    squares = torch.zeros(2, device=model.device)
    for i in range(0, n, micro):
        output, projections = project(model, batch, slice(i, i + micro))
        squares += back_propagate(projections, gradient[:, :, i:i + micro], output)
    return total_over_processes(model, loss.detach() / processes, squares)


def accumulate_step(model, batch, objective, micro):
    """Set .grad to the mean gradient of the losses of micro-batches, as the paper does.

    The negatives of a record come from its micro-batch alone.  ->  as exact_step
    """
    n = batch.views.shape[1]
    model.zero_grad(set_to_none=False)
    total, squares = torch.zeros((), device=model.device), torch.zeros(2, device=model.device)
    for i in range(0, n, micro):
        output, projections = project(model, batch, slice(i, i + micro))
        loss = objective(projections) * (projections.shape[2] / (n * ranks()[1]))
        squares += back_propagate(loss, None, output)
        total += loss.detach()
    return total_over_processes(model, total, squares)


STEPS = {"batch": exact_step, "micro": accumulate_step}  # where --negatives come from


def project(model, batch, part):
    """Output and projections (1 or 3, V, b, P) of a slice of a batch.

    The same each time, dropout included: its seed follows from the batch and the first record.
    """
    seed = generator("dropout", batch.seed, batch.step, part.start).integers(2 ** 63)
    torch.manual_seed(int(seed))  # on every device; a CPU's generator keeps 32 bits of it
    keep = None if batch.keep is None else batch.keep[:, part].flatten(0, 1)
    output, projections = model(batch.views[:, part].flatten(0, 1), keep)
    return output, projections.unflatten(1, (len(batch.views), -1))


@torch.no_grad()
def project_all(model, batch, micro):
    """Projections (1 or 3, V, B, P) of a batch, of all processes, without a graph.

    BatchNorm normalises as in training, but its running averages stand still.
    """
    n, before = batch.views.shape[1], [b.clone() for b in model.buffers()]
    parts = [project(model, batch, slice(i, i + micro))[1] for i in range(0, n, micro)]
    projections = torch.cat(parts, dim=2)
    for b, old in zip(model.buffers(), before):
        b.copy_(old)
    if not dist.is_initialized():
        return projections
    everyones = [torch.empty_like(projections) for _ in range(ranks()[1])]
    dist.all_gather(everyones, projections)
    return torch.cat(everyones, dim=2)


def back_propagate(tensor, gradient, output):
    """Add to .grad; return the squared gradient norms (2,) at output.time and output.channel."""
    streams = [h for h in (output.time, output.channel) if h is not None]
    for h in streams:
        h.retain_grad()
    tensor.backward(gradient)
    squares = [h.grad.float().square().sum() for h in streams]
    return torch.stack(squares) if streams else torch.zeros(2, device=tensor.device)


def total_over_processes(model, loss, squares):
    """Add up gradients, loss and squared norms; BatchNorm's averages become the processes' mean."""
    if dist.is_initialized():
        averages = [b for b in model.buffers() if b.is_floating_point()]
        tensors = [*(p.grad for p in model.parameters()), *averages, loss, squares]
        flat = torch.cat([t.flatten() for t in tensors])  # one message
        dist.all_reduce(flat)
        for t, total in zip(tensors, flat.split([t.numel() for t in tensors])):
            t.copy_(total.view_as(t))
        for b in averages:
            b /= ranks()[1]
    return float(loss), [math.sqrt(s) for s in squares.tolist()]


# What is in effect: the loss, batches and steps, the learning rate, the device

@dataclass(frozen=True)
class Objective:
    """NT-Xent of the projections, plus a share of that of each stream, if there."""

    tau: float = setting(0.1, "temperature of NT-Xent", type=bounded(float, 1e-6))
    aux_weight: float = setting(0.5, "weight of each auxiliary loss, with --aux-losses",
                                type=bounded(float, 0))
    negatives: str = setting("batch", "batch: exact gradient of the effective batch; micro: plain "
                             "accumulation, as in the paper", choices=STEPS)

    def __call__(self, projections):
        """projections: (1 or 3, 2, B, P)  ->  the loss, a scalar"""
        losses = [nt_xent(z1, z2, self.tau) for z1, z2 in projections]
        return losses[0] + self.aux_weight * sum(losses[1:])


def settle(args, n_train, n_val, processes=1):
    """The plan: records a batch, a micro-batch and a validation batch, and steps; all are numbers.

    An automatic batch leaves MIN_STEPS steps an epoch. Micro-batches are as even as can be.
    Raises InputError for settings that cannot train.
    """
    if args.max_lr < args.final_lr:
        raise InputError(f"--max-lr {args.max_lr} is below --final-lr {args.final_lr}")
    batch = args.batch_size
    if batch is None:
        fits = BATCH
        if fits * MIN_STEPS > n_train:
            fits = max(2, 2 ** int(math.log2(n_train / MIN_STEPS)))
        batch = max(1, fits // processes) * processes
    if batch > n_train or batch % processes or n_val < 2 * processes:
        raise InputError(
            f"--batch-size {batch}: a batch holds at most the {n_train} records of "
            f"{fold_names(TRAIN_FOLDS)}, in equal parts for each of {processes} processes, which "
            f"needs 2 of the {n_val} of {fold_names(VAL_FOLD)} too; see: python data.py info")
    mine = batch // processes
    micro = math.ceil(mine / math.ceil(mine / args.micro_batch))
    if args.negatives == "micro" and micro == 1:
        raise InputError("a micro-batch of 1 leaves no negatives with --negatives micro: give a "
                         "larger --micro-batch, or a larger --batch-size")
    steps = n_train // batch
    total = min(args.epochs * steps, args.max_steps or math.inf)
    return SimpleNamespace(batch=batch, micro=micro, processes=processes, steps=steps, total=total,
                           val_batch=min(batch, n_val // processes * processes),
                           epochs=math.ceil(total / steps), warmup=min(args.warmup, total // 5))


def learning_rate(step, total, warmup, max_lr, final_lr):
    """Linear warm-up from 0, then one cosine cycle max_lr / 25 -> max_lr -> final_lr (paper 4.4).

    step: 0 .. total - 1. The cycle is torch.optim.lr_scheduler.OneCycleLR's.
    """
    first = max_lr / START_DIV
    if step < warmup:
        return first * step / warmup
    step, total = step - warmup, total - warmup
    peak = max(RISE * total - 1, 0)
    if step < peak:
        return max_lr + (first - max_lr) * (1 + math.cos(math.pi * step / peak)) / 2
    done = (step - peak) / max(total - 1 - peak, 1)
    return final_lr + (max_lr - final_lr) * (1 + math.cos(math.pi * done)) / 2


def chance(args, in_effect):
    """The loss at chance, [in training, in validation]; both dicts, as in args.json."""
    n = in_effect["batch" if args["negatives"] == "batch" else "micro"]
    terms = 1 + 2 * args["aux_weight"] * args["aux_losses"]
    return [terms * math.log(2 * b - 1) for b in (n, in_effect["val_batch"])]


def pick_device(name):
    """torch.device for auto, cpu, cuda, cuda:1 or mps; raise InputError when it is not there."""
    if name == "auto":
        there = torch.accelerator.is_available()
        name = torch.accelerator.current_accelerator().type if there else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {error}; --device cpu always works") from error


def pick_precision(name, device):
    """The precision in effect: float32, tf32 or bfloat16."""
    if name == "auto":
        has_it = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bfloat16" if has_it else "float32"
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = name == "tf32"
    return name


# Processes: torchrun starts several of this script, each with a device and a share of every batch.

def ranks():
    """(rank of this process, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def join_processes(name):
    """Join the processes that torchrun started, if it did; return this one's device."""
    device = pick_device(name)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def listen():
    """For train(): a function that says, in all processes alike, whether one was asked to stop.

    By SIGTERM or Ctrl-C, or by the end of torchrun. A second Ctrl-C stops at once.
    """
    heard, parent = [], os.getppid()

    def hear(number, _):
        heard.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def asked_to_stop(device):
        if not dist.is_initialized():
            return bool(heard)
        votes = torch.tensor(float(bool(heard) or os.getppid() != parent), device=device)
        dist.all_reduce(votes)
        return bool(votes)

    for number in SIGNALS:
        signal.signal(number, hear)
    return asked_to_stop


def ignore_signals(_):
    """Of a worker: signals go to all processes, and the step at hand still needs its records."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


# Batches

class Batch(NamedTuple):
    """Two views of each record, and the leads that each view keeps, or None for all.

    Of an effective batch, or of this process's share of it; seed and step name its randomness.
    """

    views: torch.Tensor  # (V, B, T', C) float32 on the device
    keep: Optional[torch.Tensor]  # (V, B, C) bool
    step: int
    seed: int = 0


class Augmented(Dataset):
    """Two passes (2, T, C) of a record through the pool; an item is a key (step, row)."""

    def __init__(self, cache, config, seed):
        self.cache, self.seed = cache, seed
        self.transforms = pool(config, cache.meta["rate"])

    def __getitem__(self, key):
        x = normalize(torch.from_numpy(self.cache.signals[key[1]].copy())).numpy()
        return torch.from_numpy(augment(x, self.transforms, generator("augment", self.seed, *key)))


def batches(cache, config, seed, order, device, workers=0):
    """Yield a Batch for each (step, rows) of order; of several processes each has a share.

    Views are drawn for all of it, whatever --micro-batch. Workers pass records through the pool,
    where the view has one, ahead of the model.
    """
    rank, processes = ranks()
    seed += rank * 2 ** 32  # each process draws its own
    order = [(step, rows[rank * len(rows) // processes:(rank + 1) * len(rows) // processes])
             for step, rows in order]
    if config.augment_p:
        chunks = [[(step, int(row)) for row in rows[i:i + CHUNK]]
                  for step, rows in order for i in range(0, len(rows), CHUNK)]
        passes = iter(DataLoader(Augmented(cache, config, seed), batch_sampler=chunks,
                                 num_workers=workers, worker_init_fn=ignore_signals))
    for step, rows in order:
        if config.augment_p:
            x = torch.cat([next(passes) for _ in range(0, len(rows), CHUNK)])  # (B, 2, T, C)
            first, second = x.to(device).unbind(1)
        else:
            first = second = normalize(fetch(cache, rows, device))
        cut = VIEWS[config.view].cut
        if config.equal:
            T = first.shape[1]
            starts = generator("equal", seed, step).integers(T // 2 + 1, size=len(rows))
            cut = partial(equal_pair, view=config.view, starts=torch.from_numpy(starts).to(device))
        views = [cut(first)[0], cut(second)[-1]]
        if config.shift:
            T = views[0].shape[1]
            offsets = generator("shift", seed, step).integers(T, size=(2, len(rows)))
            views = [shift(x, at) for x, at in zip(views, torch.from_numpy(offsets).to(device))]
        if config.disturb:
            number = generator("disturb", seed, step, 0).integers(2 ** 63)
            rng = torch.Generator(device).manual_seed(int(number))
            views = [disturb(x, rng) for x in views]
        keep = None
        if config.mask_leads:
            shape = 2, len(rows), len(LEADS)
            keep = draw_leads(shape, config.mask_p, generator("mask", seed, step)).to(device)
        yield Batch(torch.stack(views), keep, step, seed)


def fetch(cache, rows, device):
    """Records (b, T, C) int16 on the device, by their row numbers.

    The whole array lives on a GPU when it takes no more than a quarter of what is free there
    (2.6 GB for all of PTB-XL at 500 Hz); else rows come from the memory-mapped file.
    """
    if device.type == "cuda" and device not in cache.copies:
        fits = cache.signals.nbytes < torch.cuda.mem_get_info(device)[0] / 4
        cache.copies[device] = torch.tensor(cache.signals, device=device) if fits else None
    on_gpu = cache.copies.get(device)
    if on_gpu is None:
        return torch.from_numpy(cache.signals[rows]).to(device)
    return on_gpu[torch.from_numpy(rows).to(device)]


def epoch_order(rows, plan, seed, start):
    """Yield (step, rows of its batch) from step `start` to the end; each epoch is a new shuffle."""
    for epoch in range(start // plan.steps, plan.epochs):
        shuffled = generator("order", seed, epoch).permutation(rows)
        for i in range(plan.steps):
            step = epoch * plan.steps + i
            if start <= step < plan.total:
                yield step, shuffled[i * plan.batch:(i + 1) * plan.batch]


# Statistics, representations and validation

def stream_norms(norms, n_tokens):
    """Gradient norms at the streams as the paper logged them, and corrected for token counts.

    norms: at what the streams hand on. Mean pooling gives each of N tokens 1/N of that gradient, so
    the norm at the token tensor, the paper's, is norm / sqrt(N).
    """
    (time_norm, channel_norm), (n_time, n_channel) = norms, n_tokens
    paper = [time_norm / math.sqrt(n_time), channel_norm / math.sqrt(n_channel)]
    return dict(grad_norm_time=paper[0], grad_norm_channel=paper[1],
                grad_norm_ratio=paper[1] / max(paper[0], 1e-12),
                **dict(zip(STREAM_NORMS, norms)),
                grad_norm_ratio_corrected=channel_norm / max(time_norm, 1e-12))


def stream_statistics(model, norms):
    """Gradient norms of the two streams, at the pooled vectors and of their parameters, if any."""
    if model.config.arch == "resnet18":
        return {}
    row = dict(zip(STREAM_NORMS, norms))
    for stream in ("time", "channel"):  # its stem and its layers
        row[f"param_grad_norm_{stream}"] = float(torch.nn.utils.get_total_norm([
            p.grad for name, p in model.encoder.named_parameters() if name.startswith(stream)]))
    return row


def summary(sums, record):
    """The row of an epoch: means over its steps, from the sums of their statistics; speed."""
    mean = {key: value / sums["n"] for key, value in sums.items() if key != "n"}
    norms = stream_norms([mean.get(name, 0) for name in STREAM_NORMS], record["tokens"])
    if record["config"]["arch"] == "resnet18":  # it has no streams
        norms = dict.fromkeys(norms)
    elif record["config"]["stems"] == "conv":  # not mean pooling alone: no norm at the tokens
        norms |= dict.fromkeys(("grad_norm_time", "grad_norm_channel", "grad_norm_ratio"))
    seconds, waited = mean.pop("seconds"), mean.pop("waited")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 10  # KiB on Linux
    if sys.platform == "darwin":  # bytes there
        peak /= 2 ** 10
    if record["device"].startswith("cuda"):
        peak = torch.cuda.max_memory_allocated(record["device"]) / 2 ** 20
    return mean | norms | dict(records_per_second=record["in_effect"]["batch"] / seconds,
                               data_share=waited / seconds, peak_mib=peak)


@torch.no_grad()
def extract(function, cache, rows, device, size=64):
    """What a function of z-scored records (b, T, C) gives for the rows of a cache.

    size: records in memory at once  ->  (len(rows), ...) float32 array
    """
    parts = np.array_split(rows, math.ceil(max(len(rows), 1) / size))
    return np.concatenate([function(normalize(fetch(cache, part, device))).float().cpu().numpy()
                           for part in parts])


def single_labels(cache, rows):
    """The rows with exactly one superclass, and its number; none where a source has no such set."""
    if "superclass" not in cache.meta["label_sets"]:
        return rows[:0], rows[:0]
    y = read_labels(cache, "superclass").y  # (N, K)
    single = rows[y[rows].sum(1) == 1]
    return single, y[single].argmax(1)


def clustering(z, labels):
    """Clustering scores of representations z (n, D) under labels (n,), from scikit-learn.

    silhouette in [-1, 1], higher is better; davies_bouldin >= 0, lower is better;
    calinski_harabasz >= 0, higher is better. All None with fewer than two classes or no spread.
    They are never used to choose a checkpoint.
    """
    scores = dict(silhouette=silhouette_score, davies_bouldin=davies_bouldin_score,
                  calinski_harabasz=calinski_harabasz_score)
    if not 2 <= len(set(labels)) < len(labels) or np.ptp(z, axis=0).max() == 0:
        return dict.fromkeys(scores)
    return {name: float(score(z, labels)) for name, score in scores.items()}


def check_finite(step, plan, **numbers):
    """Raise FloatingPointError where one of the numbers is not finite."""
    for name, value in numbers.items():
        if not np.isfinite(value).all():
            raise FloatingPointError(
                f"{name.replace('_', ' ')} {np.mean(value)} at epoch {step // plan.steps + 1}, "
                f"step {step}; try a lower --max-lr, --clip 1 or --precision float32, in another "
                "run folder")


# The run folder

def check_data(cache, config, size):
    """Rows that train and rows that validate; raise InputError for what lacks."""
    empty = sorted({*TRAIN_FOLDS, VAL_FOLD} - set(cache.index.strat_fold))
    if empty:
        raise InputError(f"{cache.folder} has no records in {fold_names(empty)}, to train on or to "
                         "validate: take more, or give a table with strat_fold (see the README)")
    if config.augment_p:
        pool(config, cache.meta["rate"])  # checks the band against the rate
    samples = config.samples(cache.signals.shape[1])
    if samples < size.time_stride:
        raise InputError(f"--time-stride {size.time_stride}: a view has only {samples} samples")
    return cache.rows(TRAIN_FOLDS), cache.rows([VAL_FOLD])


def describe_run(args, config, model, cache, plan):
    """What args.json holds: arguments, settings in effect, sizes, versions, data."""
    try:
        commit = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"],
                                capture_output=True, text=True, cwd=Path(__file__).parent).stdout
    except OSError:  # no git here
        commit = ""
    packages = ("torch", "numpy", "scipy", "scikit-learn", "wfdb", "ecgmentations")
    samples = config.samples(cache.signals.shape[1])
    return dict(args=vars(args), argv=sys.argv[1:], in_effect=vars(plan),
                strengths=dict(POOL=POOL, DISTURB=DISTURB), config=asdict(model.config),
                n_parameters=n_parameters(model), samples=samples,
                tokens=[samples // model.config.time_stride, len(LEADS)],
                precision=model.precision, device=str(model.device),
                threads=torch.get_num_threads(), git_commit=commit.strip() or None,
                versions={"python": platform.python_version(), **{p: version(p) for p in packages}},
                data=cache.meta)


def settings_of(record):
    """What decides a result, as users know it: {setting: value}; record: as in args.json."""
    data, in_effect = record["data"], record["in_effect"]
    settings = {"micro-batch in effect": in_effect["micro"], "precision": record["precision"],
                "processes (NPROC)": in_effect["processes"]}
    settings["data"] = f"{data['data']} at {data['rate']} Hz, fingerprint {data['fingerprint'][:8]}"
    for name, value in record["args"].items():
        if name not in NOT_A_RESULT:
            settings[f"--{name.replace('_', '-')}"] = value
    for name, strengths in record["strengths"].items():
        for key, value in strengths.items():
            settings[f"{name}[{key!r}] in views.py"] = value
    return settings


class RunFolder:
    """The folder of a run, written by the first process alone; `log` has a row an epoch.

    Raises InputError, in all processes, when the folder is in use, or was begun with other
    arguments or data; it says which differ.
    """

    def __init__(self, path, record):
        self.path, self.first = Path(path), ranks()[0] == 0
        self.record = json.loads(json.dumps(record))  # as it is read back
        self.log, self.writer, self.saved_at = [], None, time.monotonic()
        errors = [None]  # of the first process, for all
        try:
            if self.first:
                self.open()
        except (InputError, OSError) as error:
            errors = [error]
        if dist.is_initialized():
            dist.broadcast_object_list(errors)
        if errors[0]:
            raise errors[0]
        self.finished = (self.path / "model.pt").exists()

    def open(self):
        """Lock the folder, and compare args.json with the arguments of today."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.path / ".lock", "a")  # held while it is open
        try:  # lockf, not flock: workers that outlive a killed run for a moment do not hold it
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"{self.path}: another process trains there; wait for it, or give "
                             "another RUN= (--run)") from error
        if not any((self.path / name).exists() for name in ("last.pt", "model.pt")):
            write_json(self.path / "args.json", self.record)  # nothing to lose yet
        old, new = settings_of(read_args(self.path)), settings_of(self.record)
        if old != new:
            lines = [f"{key}: {old.get(key)} then, {new.get(key)} now"
                     for key in old | new if old.get(key) != new.get(key)]
            raise InputError(f"{self.path} was made with other arguments; give another RUN= "
                             "(--run), or remove the folder:\n  " + "\n  ".join(lines))
        if (self.path / "model.pt").exists():
            load_run(self.path)  # a damaged one is no finished run

    def restore(self, model, optimizer):
        """Load last.pt, if there: (steps done, sums since the log's last row)."""
        state, path = dict(step=0, sums={}, log=[]), self.path / "last.pt"
        if path.exists():
            with reading(path, f"remove {self.path} to train again"):
                state = torch.load(path, map_location="cpu")
                model.load_state_dict(state["model"])
                optimizer.load_state_dict(state["optimizer"])
        self.log = state["log"]
        if self.first:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self.writer = SummaryWriter(self.path / "tensorboard", purge_step=len(self.log) + 1)
        return state["step"], state["sums"]

    def save(self, model, optimizer, step, sums):
        """Write log.jsonl, and last.pt: what is needed to go on at `step`, the log too."""
        if self.first:
            lines = [json.dumps(row) + "\n" for row in self.log]
            write_text(self.path / "log.jsonl", "".join(lines))
            state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=step,
                         sums=sums, log=self.log)
            write_atomic(self.path / "last.pt", lambda tmp: torch.save(state, tmp))
        self.saved_at = time.monotonic()

    def add(self, row):
        """Add the row of an epoch to the log, to TensorBoard and to the screen."""
        self.log.append(row)
        if self.first:
            known = {key: value for key, value in row.items() if value is not None}
            tqdm.write("  ".join(f"{key} {known[key]:.4g}" for key in SHOWN if key in known))
            for key, value in known.items():
                self.writer.add_scalar(key, value, row["epoch"])
            self.writer.flush()

    def write_model(self, model, folder):
        """Write what evaluation needs, model.pt and args.json, to the run's or another folder."""
        if self.first:
            write_json(folder / "args.json", self.record)
            final = dict(model=model.state_dict(), config=asdict(model.config))
            write_atomic(folder / "model.pt", lambda tmp: torch.save(final, tmp))

    def close(self, text):
        """Let go of the folder, and say why."""
        if self.first:
            if self.writer:
                self.writer.close()
            self.lock.close()
            print(f"{self.path}: {text}")


def announce(run, n_train, n_val, start):
    """Print what is about to be trained, on what, with which settings in effect."""
    record, args, meta = run.record, run.record["args"], run.record["data"]
    plan, (at_chance, val_chance) = record["in_effect"], chance(args, record["in_effect"])
    synthetic = "SYNTHETIC, " if meta["synthetic"] else ""
    print(f"""\
view      {from_args(ViewConfig, args).describe()}
data      {synthetic}{meta['data']} at {meta['rate']} Hz
records   {n_train} of {fold_names(TRAIN_FOLDS)} train, {n_val} of {fold_names(VAL_FOLD)} validate
model     {record['n_parameters']:,} parameters, {record['samples']} samples a view
on        {record['device']} in {record['precision']}
batch     {plan['batch']} in micro-batches of {plan['micro']}
negatives from the {args['negatives']}
steps     {plan['total']} in {plan['epochs']} epochs, warm-up {plan['warmup']}, from step {start}
loss      at chance {at_chance:.2f}, in validation {val_chance:.2f}
folder    {run.path}""")


# The command line

def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    group = parser.add_argument_group("data and run")
    add, switch = group.add_argument, argparse.BooleanOptionalAction
    add("--cache", default="cache/ptbxl-500", help="folder of: python data.py cache")
    add("--run", help="run folder; by default runs/VIEW-sSEED")
    add("--seed", type=bounded(int, 0), default=0, help="same seed, same run")
    add_shared(group, "device")
    add("--workers", type=bounded(int, 0), default=min(4, os.cpu_count() or 1),
        help="processes that pass records through the pool ahead of the model; 0: none")
    add("--save-minutes", type=bounded(float, 0), default=10,
        help="last.pt is written after each epoch, and this often within one")
    add("--keep-every", type=bounded(int, 1), help="keep the weights of every so many epochs, each "
        "in a folder RUN/epoch-... that evaluate.py takes for a run")
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=bounded(int, 1), default=50,
        help=f"passes over {fold_names(TRAIN_FOLDS)}")
    add("--max-steps", type=bounded(int, 1), help="end after this many, with the whole schedule")
    add("--batch-size", type=bounded(int, 2), help=f"effective batch; by default {BATCH}, or less "
        f"when that leaves under {MIN_STEPS} steps an epoch")
    add("--micro-batch", type=bounded(int, 1), default=16,
        help="records in memory at once; halve it if memory runs out. Views and gradient do not "
        "depend on it, but dropout draws other masks")
    add("--max-lr", type=bounded(float, 1e-12), default=3e-4,
        help="peak of the cycle; lower it if the loss jumps")
    add("--final-lr", type=bounded(float, 1e-12), default=3e-5, help="end of the cycle (paper)")
    add("--warmup", type=bounded(int, 0), default=20, help="steps of linear warm-up (paper)")
    add("--weight-decay", type=bounded(float, 0), default=0.0, help="decoupled (AdamW)")
    add("--clip", type=bounded(float, 0), default=1.0, help="largest gradient norm; 0: any")
    add("--precision", choices=("auto", "float32", "tf32", "bfloat16"), default="auto",
        help="of the encoder's arithmetic; weights and loss stay float32 (tf32: the loss's "
        "products too). auto: bfloat16 on GPUs that have it")
    add("--compile", action=switch, default=False, help="compile the model: a minute or more at "
        "the start, and a C++ compiler on a CPU")
    add_flags(parser, "loss", Objective)
    add_flags(parser, "views", ViewConfig)
    add_model_flags(parser)
    return parse(parser, argv)


def main():
    args = get_args()
    try:
        train(args, listen())
    except (RuntimeError, MemoryError) as error:
        if not re.search("MemoryError|out of memory|can't allocate memory", repr(error)):
            raise
        raise InputError(f"out of memory ({str(error)[:80]!r}): halve --micro-batch "
                         f"{args.micro_batch}, in another run folder if this one has a last.pt"
                         ) from error
    if dist.is_initialized():  # gloo's threads end, of which one could abort Python at its end
        dist.destroy_process_group()


if __name__ == "__main__":
    run_script(main)
