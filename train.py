"""Contrastive pretraining of a dual-view encoder on a cache of 12-lead ECGs (paper 4.4).

In:  a cache folder of data.py (int16 microvolt); labels are never used for training.
Out: a run folder: args.json, log.jsonl (a line an epoch), last.pt (to go on) and previous.pt (the
     save before), model.pt (at the end), tensorboard/. The same command again resumes it, after a
     kill too, or says that it is finished; SIGTERM or Ctrl-C end it once the step at hand is saved.

    python train.py --cache cache/ptbxl-500 --view noncontig
    python train.py --cache cache/synth-100 --view contig --preset small --epochs 3 --run runs/try

The method comes first: train(), and under it what a step calls. Feed draws the rows of a batch and
cuts two views of each; backward() projects them without a graph, takes NT-Xent over the whole batch
and its gradient at the projections, and projects again, part by part, to hand that gradient on;
then clip and Adam. Everything random is a function of (seed, step), dropout and disturbances of the
slice of a batch too: a resumed run repeats the interrupted one.
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
from itertools import combinations
from importlib.metadata import version
from pathlib import Path
from typing import Callable, Optional

import numpy as np
import torch
import torch.distributed as dist
from sklearn.metrics import calinski_harabasz_score, davies_bouldin_score, silhouette_score
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data import (CLASSES, LEADS, TRAIN_FOLDS, VAL_FOLD, InputError, add_flags, add_shared,
                  bounded, from_args, normalize, open_cache, run_script, setting, write_atomic,
                  writing)
from model import (PRESETS, Config, Contrastive, add_model_flags, barlow_twins, compile_blocks,
                   count_flops, embed, load_run, n_parameters, nt_xent, parse, read_args,
                   read_tensors)
from views import (VIEWS, ViewConfig, augment, disturb, draw_leads, equal_pair, generator, pool,
                   shift)

BATCH = 1024  # effective batch of the paper
MIN_STEPS = 8  # steps an epoch that the automatic batch leaves
START_DIV, RISE = 25, 0.3  # one cycle: first lr is max / 25, 30 % of the steps rise (PyTorch's)
VAL_STEP = 2 ** 31  # a step that training never reaches: validation has the same views each time
SAVES = "last.pt", "previous.pt"  # what a run goes on from, and the save before it
STREAM_NORMS = "grad_norm_time_corrected", "grad_norm_channel_corrected"  # at the pooled streams
SIGNALS = signal.SIGTERM, signal.SIGINT  # SLURM or a spot machine ask to stop so; Ctrl-C
# what may differ on a resume
NOT_A_RESULT = {"run", "cache", "workers", "device", "save_minutes", "keep_every"}


# The method

def train(args, told_to_stop=lambda device: False):
    """Pretrain and write the run folder. Raises InputError, before work starts, for bad input.

    told_to_stop: asked in each step; then the state is saved, and the same command goes on from it
    """
    config, size, objective = (from_args(cls, vars(args))
                               for cls in (ViewConfig, Config, Objective))
    vars(args).update(asdict(config))  # aliases and automatic settings are resolved at once
    cache = open_cache(args.cache)
    rows, val_rows, samples = check_data(cache, config, size)
    flops = count_flops(size, samples)  # what this imports would hold on to a group of processes
    device = join_processes(args.device)
    plan, notes = settle(args, len(rows), len(val_rows), ranks()[1])
    torch.manual_seed(args.seed)  # of the initial weights; all else has streams of its own
    model = Contrastive(size).to(device)
    model.precision = pick_precision(args.precision, device)
    run = RunFolder(args.run or f"runs/{config.view}-s{args.seed}",
                    describe_run(args, model, cache, plan, samples, flops))
    if run.finished:
        return run.leave("finished, nothing to do; remove the folder to train again")
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=args.weight_decay)
    if args.bf16_weights:
        hold_in_bf16(model)
        optimizer.register_step_post_hook(lambda *_: hold_in_bf16(model))
    start, sums = run.restore(model, optimizer)
    if run.first:
        announce(run, len(rows), len(val_rows), notes, start)
    if args.compile:
        compile_blocks(model)
    feed = Feed(cache, config, args.seed, device, args.workers)
    bar = tqdm(total=plan.total, initial=start, desc=run.path.name, unit="step",
               disable=None if run.first else True)

    tick = time.monotonic()
    for step, batch in enumerate(feed(epoch_order(rows, plan, args.seed, start)), start):
        lr = learning_rate(step, plan.total, plan.warmup, args.max_lr, args.final_lr)
        optimizer.param_groups[0]["lr"] = lr
        averages = {key: b.clone() for key, b in model.named_buffers()}  # BatchNorm's, of before
        model.train()
        loss, norms = backward(model, batch, objective, plan.micro)
        stats = dict(n=1, loss=loss) | stream_statistics(model, norms)
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise diverged(f"loss {loss}, gradient norm {norm}", step, plan)
        stopping = told_to_stop(device)
        if stopping or time.monotonic() - run.saved_at > 60 * args.save_minutes:
            run.save(model.state_dict() | averages, optimizer, step, sums)  # its loss is finite
        if stopping:
            bar.close()
            return run.leave(f"stopped at step {step} of {plan.total}; the same command goes on "
                             "from here")
        optimizer.step()

        stats |= dict(grad_norm=norm, seconds=time.monotonic() - tick, waited=feed.waited)
        sums = {key: sums.get(key, 0) + value for key, value in stats.items()}
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        bar.update()
        if (step + 1) % plan.steps == 0 or step + 1 == plan.total:  # the end of an epoch
            row = dict(epoch=step // plan.steps + 1, step=step + 1, lr=lr)
            run.add(row | summary(sums, run.record)
                    | validate(model, feed, val_rows, plan, objective, step))
            sums = {}
            if args.keep_every and row["epoch"] % args.keep_every == 0:
                run.keep(model, run.path / f"epoch-{row['epoch']:03}")
            run.save(model.state_dict(), optimizer, step + 1, sums)
        tick, feed.waited = time.monotonic(), 0.0
    bar.close()
    run.finish(model)


def backward(model, batch, objective, micro):
    """Set .grad to the gradient of one effective batch; return its loss and the streams' norms.

    negatives="batch": the gradient of NT-Xent over the whole batch, in three passes (GradCache,
    Gao et al. 2021, arXiv 2101.06983): project without a graph; differentiate the loss with
    respect to the projections of all processes; project again with a graph and the same
    randomness, and back-propagate. A process with one part projects it once, and keeps the graph.
    "micro": plain accumulation, negatives from the micro-batch alone (the paper).
    ->  loss, [norm at time, norm at channel]: gradient norms at the pooled streams (0 if none)
    """
    parts, processes = parts_of(batch.size, micro), ranks()[1]
    # What outlives a part is allocated before the first: later, it would tear the CPU's heap apart.
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()
    sums, kept = torch.zeros(3, device=model.device), None  # loss, squared norms at the streams
    if objective.negatives == "batch":
        # deviation: the paper accumulates gradients of micro-batches, which is not NT-Xent on 1024
        if len(parts) == 1:
            kept = project(model, batch, parts[0])
        cached = project_all(model, batch, parts, kept).requires_grad_()
        whole = objective(cached)
        (grad,) = torch.autograd.grad(whole, cached)
        sums[0] = whole.detach() / processes  # each process counts its share
    for part in parts:
        output, projections = kept or project(model, batch, part)
        streams = [h for h in (output.time, output.channel) if h is not None]
        for h in streams:
            h.retain_grad()
        if objective.negatives == "batch":
            projections.backward(grad[:, :, part])
        else:
            loss = objective(projections) * micro / batch.size
            loss.backward()
            sums[0] += loss.detach()
        for j, h in enumerate(streams, 1):
            sums[j] += h.grad.float().square().sum()
        del output, projections, streams  # before the next part's graph is made
    averages = [b.div_(processes) for b in model.buffers() if b.is_floating_point()]  # BatchNorm's
    add_up([*(p.grad for p in model.parameters()), *averages, sums])
    loss, *squares = sums.tolist()
    return loss, [math.sqrt(s) for s in squares]


def project(model, batch, part):
    """Output and projections (1 or 3, V, b, proj_dim) of a slice of a batch.

    The same each time, dropout included: its seed follows from the batch's key and the slice.
    """
    seed = generator("dropout", *batch.key, part.start).integers(2 ** 63)
    torch.manual_seed(int(seed))  # on every device; a CPU's generator keeps 32 bits of it
    keep = None if batch.keep is None else batch.keep[:, part].flatten(0, 1)
    output, projections = model(torch.cat(batch.cut(part)), keep)
    return output, projections.unflatten(1, (batch.n_views, -1))


@torch.no_grad()
def project_all(model, batch, parts, kept=None):
    """Projections (1 or 3, V, B, proj_dim) of a batch, of which this process makes some parts.

    Without a graph. BatchNorm normalises as in training, but its running averages stand still.
    kept: what project() gave for the only part, if it is there already
    """
    before = [b.clone() for b in model.buffers()]
    out = torch.zeros(len(model.heads), batch.n_views, batch.size, model.config.proj_dim,
                      device=model.device)
    for part in parts:
        out[:, :, part] = (kept or project(model, batch, part))[1]
    if not kept:  # the graph of what is kept needs its buffers as they are
        for b, old in zip(model.buffers(), before):
            b.copy_(old)
    add_up([out])
    return out


# What is in effect: the loss, batches and steps, the learning rate, the device

@dataclass(frozen=True)
class Objective:
    """The loss of the projections, plus a share of that of each stream, if there."""

    loss: str = setting("ntxent", "ntxent; decoupled, without the positive in its denominator; or "
                        "barlow, Barlow Twins, without negatives",
                        choices=("ntxent", "decoupled", "barlow"))
    tau: float = setting(0.1, "temperature of NT-Xent", type=bounded(float, 1e-6))
    aux_weight: float = setting(0.5, "weight of each auxiliary loss, with --aux-losses",
                                type=bounded(float, 0))
    negatives: str = setting("batch", "batch: exact gradient of the effective batch; micro: plain "
                             "accumulation, as in the paper", choices=("batch", "micro"))

    def __call__(self, projections):
        """projections: (1 or 3, V, B, proj_dim)  ->  the loss, mean over pairs of views"""
        one = barlow_twins if self.loss == "barlow" else partial(
            nt_xent, tau=self.tau, decoupled=self.loss == "decoupled")
        losses = [sum(one(*pair) for pair in combinations(views, 2)) / math.comb(len(views), 2)
                  for views in projections]
        return losses[0] + self.aux_weight * sum(losses[1:])


@dataclass(frozen=True)
class Plan:
    """What is in effect: records a batch, a part of it, a validation batch; steps."""

    batch: int
    micro: int
    processes: int
    val_batch: int
    steps: int  # an epoch
    total: int  # steps of the run
    warmup: int

    @property
    def epochs(self):
        return math.ceil(self.total / self.steps)


def settle(args, n_train, n_val, processes=1):
    """The Plan for so many records and processes, and notes on what differs from the arguments.

    An automatic batch leaves MIN_STEPS steps an epoch; so does one that exceeds the training set.
    Raises InputError for settings that cannot train.
    """
    if args.max_lr < args.final_lr:
        raise InputError(f"--max-lr {args.max_lr} is below --final-lr {args.final_lr}")
    if n_train < 4 * processes or n_val < 2 * processes:
        raise InputError(f"{n_train} records in folds 1-8 and {n_val} in fold 9: at least 4 and 2 "
                         "are needed for each process; see: python data.py info")
    wanted, notes = args.batch_size or BATCH, []
    batch, chosen = wanted, args.batch_size is not None and wanted <= n_train
    if chosen and batch % processes:
        raise InputError(f"{processes} processes cannot share a batch of {batch} evenly; give a "
                         f"--batch-size that they can, such as "
                         f"{max(processes, batch - batch % processes)}")
    if not chosen and batch * MIN_STEPS > n_train:
        batch = max(2, 2 ** int(math.log2(n_train / MIN_STEPS)))
        notes.append(f"batch {batch} instead of {wanted}: {n_train} training records, and an epoch "
                     f"needs some {MIN_STEPS} steps")
    batch = max(batch - batch % processes, processes)
    mine = batch // processes
    micro = max(n for n in range(1, min(args.micro_batch, mine) + 1) if mine % n == 0)
    if 4 * micro < min(args.micro_batch, mine):
        raise InputError(f"--micro-batch {args.micro_batch}: the {mine} records that a process has "
                         f"of a batch are divided by {micro} at most; give another --batch-size")
    if micro < min(args.micro_batch, batch):
        notes.append(f"micro-batch {micro} instead of {args.micro_batch}, so that it divides the "
                     f"{mine} records that a process has of a batch")
    if args.negatives == "micro" and micro == 1:
        raise InputError("a micro-batch of 1 leaves no negatives with --negatives micro: give a "
                         "larger --micro-batch, or a larger --batch-size")
    steps = n_train // batch
    total = min(args.epochs * steps, args.max_steps or math.inf)
    warmup = min(args.warmup, total // 5)
    if warmup < args.warmup:
        notes.append(f"warm-up {warmup} instead of {args.warmup} steps: the run has only {total}")
    return Plan(batch, micro, processes, min(batch, n_val), steps, total, warmup), notes


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


def chance(args, plan):
    """The loss at chance, in training and in validation; both dicts, as in args.json."""
    terms = 1 + 2 * args["aux_weight"] * args["aux_losses"]
    seen = plan["batch"] if args["negatives"] == "batch" else plan["micro"]
    one = dict(ntxent=lambda n: math.log(2 * n - 1), decoupled=lambda n: math.log(2 * n - 2),
               barlow=lambda n: 1.0)[args["loss"]]
    return [terms * one(n) for n in (seen, plan["val_batch"])]


def pick_device(name):
    """torch.device for auto, cpu, cuda, cuda:1 or mps; raise InputError when it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else (
            "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        if name.split(":")[0] not in ("cpu", "cuda", "mps"):
            raise RuntimeError("give cpu, cuda, cuda:1 or mps")
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {error}; --device cpu always works") from error
    return torch.device(name)


def pick_precision(name, device):
    """The precision in effect: float32, tf32 or bfloat16."""
    if name == "auto":
        has_it = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bfloat16" if has_it else "float32"
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = name == "tf32"
    return name


@torch.no_grad()
def hold_in_bf16(model):
    """Round the weights to bfloat16, in place."""
    for p in model.parameters():
        p.copy_(p.bfloat16())


# Processes: torchrun starts several of this script, each with a device and a share of every batch.

def ranks():
    """(rank of this process, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share(n):
    """The slice of n items that this process works on; all of them without torchrun."""
    rank, processes = ranks()
    return slice(rank * n // processes, (rank + 1) * n // processes)


def parts_of(n, micro):
    """The same in slices of at most `micro` items."""
    mine = share(n)
    return [slice(i, min(i + micro, mine.stop)) for i in range(mine.start, mine.stop, micro)]


def join_processes(name):
    """Join the processes that torchrun started, if it did; return this one's device."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return pick_device(name)
    if name.startswith("cuda:") and int(os.environ["LOCAL_WORLD_SIZE"]) > 1:
        raise InputError(f"--device {name}: several processes cannot share it; give --device cuda")
    if name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = pick_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:  # torchrun leaves one thread each
        torch.set_num_threads(max(1, os.cpu_count() // int(os.environ["LOCAL_WORLD_SIZE"])))
        dist.init_process_group("gloo")
    return device


def leave_processes():
    """Leave the group: gloo's threads end, of which one could abort Python at its end."""
    if dist.is_initialized():
        dist.destroy_process_group()


def listen():
    """A function that says, in all processes alike, whether to stop; a second Ctrl-C does at once.

    One is to stop after SIGTERM or Ctrl-C, here or in another process, or when torchrun is gone.
    """
    asked, parent = [], os.getppid()

    def hear(number, _):
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    def told_to_stop(device):
        gone = dist.is_initialized() and os.getppid() != parent  # as after kill -9 of torchrun
        votes = torch.tensor(float(bool(asked) or gone), device=device)
        add_up([votes])
        return bool(votes)

    for number in SIGNALS:
        signal.signal(number, hear)
    return told_to_stop


def ignore_signals(_):
    """Of a worker: signals go to all processes, and the step at hand still needs its records."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def add_up(tensors):
    """Replace each tensor by its sum over the processes."""
    if dist.is_initialized():
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            work.wait()


# Batches

@dataclass
class Batch:
    """An effective batch of `size` records, of which cut(part) makes the V views of a slice.

    cut: slice -> V of (b, T', C) float32 on the device, the same each time; keep: (V, B, C) bool,
    the leads that each view keeps, or None for all; key: (seed, step), names its randomness;
    n_views: V, 2 or with --windows twice as many as those
    """

    size: int
    cut: Callable
    keep: Optional[torch.Tensor]
    key: tuple
    n_views: int = 2


class Augmented(Dataset):
    """Two passes (2, T, C) of a record through the pool; an item is a key (step, row)."""

    def __init__(self, cache, config, seed):
        self.cache, self.seed = cache, seed
        self.transforms = pool(config, cache.meta["rate"])

    def __getitem__(self, key):
        x = normalize(torch.from_numpy(self.cache.signals[key[1]].copy())).numpy()
        return torch.from_numpy(augment(x, self.transforms, generator("augment", self.seed, *key)))


def fetch(cache, rows, device):
    """Records (b, T, C) int16 on the device, by their row numbers.

    The whole array lives on a GPU when it takes no more than a quarter of what is free there
    (2.6 GB for all of PTB-XL at 500 Hz); else rows come from the memory-mapped file.
    """
    if device.type == "cuda" and device not in cache.copies:
        fits = cache.signals.nbytes < torch.cuda.mem_get_info(device)[0] / 4
        cache.copies[device] = torch.tensor(cache.signals, device=device) if fits else None
    whole = cache.copies.get(device)
    if whole is None:
        return torch.from_numpy(cache.signals[rows]).to(device)
    return whole[torch.from_numpy(rows).pin_memory().to(device, non_blocking=True)]


class Feed:
    """Makes Batches of a cache; `waited` adds up the seconds spent waiting for records.

    Called with order, an iterable of (step, rows), it yields a Batch for each. Views are cut on the
    device when asked for, so that a large batch costs the memory of a slice. Passes through the
    pool come from `workers` processes ahead of time, in pieces of 16 records (shared memory can be
    small), and this process's share of a batch is held: only its own slices may be asked for.
    """

    def __init__(self, cache, config, seed, device, workers=0):
        self.cache, self.config, self.seed = cache, config, seed
        self.device, self.workers, self.waited = device, workers, 0.0

    def __call__(self, order):
        order, n_views = list(order), 2 * self.config.windows
        sources = self.passes(order) if self.config.augment_p else (
            partial(self.records, rows) for _, rows in order)
        for (step, rows), source in zip(order, sources):
            keep = None
            if self.config.mask_leads:
                keep = draw_leads((n_views, len(rows), len(LEADS)), self.config.mask_p,
                                  generator("mask", self.seed, step)).to(self.device)
            cut = partial(self.cut, source, step, len(rows))
            yield Batch(len(rows), cut, keep, (self.seed, step), n_views)

    def cut(self, source, step, size, part):
        """The views of a slice of a batch: the same each time, for the same slices.

        source(part) gives each record of the slice twice, (b, T, C): one for each view.
        """
        def starts(purpose, n, *shape):  # drawn for the whole batch
            at = generator(purpose, self.seed, step).integers(n, size=(*shape, size))
            return torch.from_numpy(at[..., part]).to(self.device)

        config, (first, second) = self.config, source(part)
        cut = VIEWS[config.view].cut
        if config.equal:
            cut = partial(equal_pair, view=config.view,
                          starts=starts("equal", first.shape[1] // 2 + 1))
        one = cut(first)
        pair = [one[0], (one if second is first else cut(second))[-1]]
        if config.shift:
            pair = [shift(view, at) for view, at in zip(pair, starts("shift", pair[0].shape[1], 2))]
        if not config.disturbances:
            return pair
        seed = int(generator("disturb", self.seed, step, part.start).integers(2 ** 63))
        rng = torch.Generator(self.device).manual_seed(seed)
        return [disturb(view, config, rng) for view in pair for _ in range(config.windows)]

    def records(self, rows, part):
        """A slice of some records, twice the same."""
        began = time.monotonic()
        x = fetch(self.cache, rows[part], self.device)
        self.waited += time.monotonic() - began
        return [normalize(x)] * 2

    def passes(self, order):
        """Yield for each batch the function that gives a slice of it, two passes of the pool."""
        mine = [[(step, int(row)) for row in rows[share(len(rows))]] for step, rows in order]
        pieces = [keys[i:i + 16] for keys in mine for i in range(0, len(keys), 16)]
        made = iter(DataLoader(Augmented(self.cache, self.config, self.seed),
                               batch_sampler=pieces, num_workers=self.workers,
                               worker_init_fn=ignore_signals))

        def get(x, first, part):
            return x[part.start - first:part.stop - first].unbind(1)

        for (_, rows), keys in zip(order, mine):
            began = time.monotonic()  # x: (b, 2, T, C)
            x = torch.cat([next(made) for _ in range(0, len(keys), 16)]).to(self.device)
            self.waited += time.monotonic() - began
            yield partial(get, x, share(len(rows)).start)


def epoch_order(rows, plan, seed, start):
    """Yield (step, rows of its batch) from step `start` to the end; each epoch is a new shuffle."""
    shuffled_for = None
    for step in range(start, plan.total):
        epoch, i = divmod(step, plan.steps)
        if epoch != shuffled_for:
            shuffled, shuffled_for = generator("order", seed, epoch).permutation(rows), epoch
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
    found = dict(zip(STREAM_NORMS, norms))
    for name in ("time", "channel"):
        gradients = [p.grad for p in model.encoder.stream_parameters(name)]
        found[f"param_grad_norm_{name}"] = float(torch.nn.utils.get_total_norm(gradients))
    return found


@torch.no_grad()
def extract(function, cache, rows, device, size=64):
    """What a function of z-scored records (b, T, C) gives for the rows of a cache.

    size: records in memory at once  ->  (len(rows), ...) float32 array
    """
    parts = np.array_split(rows, math.ceil(max(len(rows), 1) / size))
    bar = tqdm(parts, "records", leave=False, disable=None if len(parts) > 99 else True)
    return np.concatenate([function(normalize(fetch(cache, part, device))).float().cpu().numpy()
                           for part in bar])


def clustering(z, labels):
    """Clustering scores of representations z (n, D) under labels (n,), from scikit-learn.

    silhouette in [-1, 1], higher is better; davies_bouldin >= 0, lower is better;
    calinski_harabasz >= 0, higher is better. All None with fewer than two classes or no spread.
    """
    scores = dict(silhouette=silhouette_score, davies_bouldin=davies_bouldin_score,
                  calinski_harabasz=calinski_harabasz_score)
    if not 2 <= len(set(labels)) < len(labels) or np.ptp(z, axis=0).max() == 0:
        return dict.fromkeys(scores)
    return {name: float(score(z, labels)) for name, score in scores.items()}


def diverged(what, step, plan):
    """The error of a run whose numbers are no longer finite."""
    return FloatingPointError(
        f"{what} at epoch {step // plan.steps + 1}, step {step}; last.pt, if there, keeps the last "
        "good state. Try a lower --max-lr, --clip 1 or --precision float32, in another run folder")


@torch.no_grad()
def validate(model, feed, rows, plan, objective, step):
    """val_loss on fixed views of fold 9's rows, and clustering of those with one superclass.

    Raises FloatingPointError, naming the step, when one of them is not finite.
    """
    model.eval()
    B, parts = plan.val_batch, parts_of(plan.val_batch, plan.micro)
    order = [(VAL_STEP + i, rows[i:i + B]) for i in range(0, len(rows) - B + 1, B)]
    losses = [float(objective(project_all(model, batch, parts))) for batch in feed(order)]
    labels = feed.cache.index.loc[rows, list(CLASSES)].to_numpy()
    single = labels.sum(1) == 1  # a fixed list of ids: never used to choose a checkpoint
    mine = share(single.sum())
    found = extract(lambda x: embed(model, x, feed.config).mean(1), feed.cache,
                    rows[single][mine], feed.device, plan.micro)
    z = torch.zeros(single.sum(), found.shape[1], device=feed.device)
    z[mine] = torch.from_numpy(found).to(feed.device)
    add_up([z])
    z = z.cpu().numpy()
    if not (np.isfinite(losses).all() and np.isfinite(z).all()):
        raise diverged(f"loss {np.mean(losses)} in validation", step, plan)
    return dict(val_loss=float(np.mean(losses)), **clustering(z, labels[single].argmax(1)))


# What a run tells of its speed

def matmul_peak(device, precision):
    """FLOP/s of a large matrix product here, of all processes: what no training step exceeds."""
    n = 1024 if device.type == "cpu" else 8192
    matrix = torch.randn(n, n, device=device,
                         dtype=torch.bfloat16 if precision == "bfloat16" else torch.float32)
    best = math.inf
    for _ in range(6):
        began = time.monotonic()
        matrix @ matrix
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        best = min(best, time.monotonic() - began)
    del matrix  # before the peak is reset: it is none of training's memory
    total = torch.tensor(2 * n ** 3 / best, device=device)
    add_up([total])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return float(total)


def peak_mib(device):
    """Peak memory of this process, or on its GPU, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    status = Path("/proc/self/status")  # ru_maxrss would begin with what the parent had
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 2 ** 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20  # macOS: bytes


# The run folder

def describe_run(args, model, cache, plan, samples, flops):
    """What args.json holds: arguments, settings in effect, sizes, speed, versions, data."""
    try:
        commit = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"],
                                capture_output=True, text=True, cwd=Path(__file__).parent).stdout
    except OSError:  # no git here
        commit = ""
    packages = ("torch", "numpy", "scipy", "scikit-learn", "wfdb", "ecgmentations")
    forward, both = flops
    twice = args.negatives == "batch" and plan.batch > plan.micro * plan.processes
    return dict(args=vars(args), argv=sys.argv[1:], in_effect=asdict(plan),
                config=asdict(model.config), n_parameters=n_parameters(model), samples=samples,
                tokens=[samples // model.config.time_stride, len(LEADS)],
                flop_per_record=2 * args.windows * (both + forward * twice),
                peak_flops=matmul_peak(model.device, model.precision), precision=model.precision,
                start_mib=peak_mib(model.device),
                device=str(model.device), threads=torch.get_num_threads(),
                git_commit=commit.strip() or None,
                versions={"python": platform.python_version(), **{p: version(p) for p in packages}},
                data=cache.meta)


def differences(old, new):
    """In which arguments, settings and data two args.json differ, a line each."""
    lines = [f"--{key.replace('_', '-')}: {old['args'][key]} then, {value} now"
             for key, value in new["args"].items()
             if key not in NOT_A_RESULT and old["args"][key] != value]
    then, now = old["in_effect"]["micro"], new["in_effect"]["micro"]
    if then != now:
        lines.append(f"micro-batch in effect (NPROC?): {then} then, {now} now")
    then, now = old["data"], new["data"]
    if then["fingerprint"] != now["fingerprint"]:
        lines.append(f"data: {then['data']} at {then['rate']} Hz then, {now['data']} at "
                     f"{now['rate']} Hz now")
    return lines


class RunFolder:
    """The folder of a run, written by the first process alone; `log` has a row an epoch.

    Raises InputError, in all processes, when the folder is in use, or was begun with other
    arguments or data; it says which differ.
    """

    def __init__(self, path, record):
        self.path, self.record, self.first = Path(path), record, ranks()[0] == 0
        self.log, self.writer, self.saved_at = [], None, time.monotonic()
        refused = [None]  # by the first process, for all
        try:
            if self.first:
                self.open()
        except (InputError, OSError) as error:
            refused = [error]
        if dist.is_initialized():
            dist.broadcast_object_list(refused)
        if refused[0]:
            raise refused[0]
        self.finished = (self.path / "model.pt").exists()

    def open(self):
        """Lock the folder, and compare args.json with the arguments of today."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:  # such as a file of that name
            raise InputError(f"--run {self.path}: {error}; give another folder") from error
        self.lock = open(self.path / ".lock", "a")  # held while it is open
        try:  # lockf, not flock: workers that outlive a killed run for a moment do not hold it
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"{self.path}: another process trains there; wait for it, or give "
                             "another RUN= (--run)") from error
        if not any((self.path / name).exists() for name in (*SAVES, "model.pt")):
            self.write_record(self.path)  # nothing to lose yet
        old = read_args(self.path)
        old["args"] = with_defaults(old["args"])
        if lines := differences(old, self.record):
            raise InputError(f"{self.path} was made with other arguments; give another RUN= "
                             "(--run), or remove the folder:\n  " + "\n  ".join(lines))
        if old.get("git_commit") != self.record["git_commit"]:
            print(f"note: the code was at {old.get('git_commit')} when this run began")
        if (self.path / "model.pt").exists():
            load_run(self.path)  # a damaged one is no finished run

    def restore(self, model, optimizer):
        """Load the last save that is whole, if any: (steps done, sums since the log's last row)."""
        state, total, faults = dict(step=0, sums={}, log=[]), self.record["in_effect"]["total"], []
        for path in filter(Path.exists, map(self.path.joinpath, SAVES)):
            try:
                state = read_tensors(path, {"model", "optimizer", "step", "sums", "log"})
                if type(state["step"]) is not int or not 0 <= state["step"] <= total:
                    raise ValueError(f"step {state['step']!r} of {total}")
                model.load_state_dict(state["model"])
                optimizer.load_state_dict(state["optimizer"])
                break
            except Exception as error:  # whatever a damaged file leads torch to
                faults.append(f"{path} is damaged ({str(error)[:80]!r})")
        else:
            if faults:
                raise InputError(f"{'; '.join(faults)}; remove {self.path} to train again")
        if faults and self.first:
            print(f"note: {faults[0]}; going on from the save before it, {path}")
        if dist.is_initialized():  # machines may differ in what a seed gives
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor.detach(), 0)
        self.log = state["log"]
        if self.first:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self.writer = SummaryWriter(self.path / "tensorboard", purge_step=len(self.log) + 1)
            self.write_log()  # a kill may have come between last.pt and it
        return state["step"], state["sums"]

    def save(self, weights, optimizer, step, sums):
        """Write last.pt, what is needed to go on at `step`; then log.jsonl, which is within it."""
        if self.first:
            state = dict(model=weights, optimizer=optimizer.state_dict(), step=step, sums=sums,
                         log=self.log)
            last, before = map(self.path.joinpath, SAVES)

            def write(tmp):
                torch.save(state, tmp)
                if last.exists():  # it makes room only for one that is whole
                    os.replace(last, before)

            write_atomic(last, write)
            self.write_log()
        self.saved_at = time.monotonic()

    def write_log(self):
        """Write log.jsonl, a line an epoch."""
        lines = "".join(json.dumps(row) + "\n" for row in self.log)
        write_atomic(self.path / "log.jsonl", lambda tmp: tmp.write_text(lines))

    def write_record(self, folder):
        """Write args.json."""
        text = json.dumps(self.record, indent=1)
        write_atomic(folder / "args.json", lambda tmp: tmp.write_text(text))

    def add(self, row):
        """Add the row of an epoch to the log, to TensorBoard and to the screen."""
        self.log.append(row)
        if self.first:
            parts = [f"epoch {row['epoch']:>3}/{Plan(**self.record['in_effect']).epochs}"]
            for key, (name, form) in SHOWN.items():
                parts.append(f"{name} " + ("-" if row[key] is None else f"{row[key]:{form}}"))
            tqdm.write("  ".join(parts))
            with writing(self.path / "tensorboard"):
                for key, value in row.items():
                    if value is not None:
                        self.writer.add_scalar(key, value, row["epoch"])
                self.writer.flush()

    def keep(self, model, folder):
        """Write what evaluation needs: model.pt, and args.json in a folder other than the run's."""
        if self.first:
            if folder != self.path:
                self.write_record(folder)
            final = dict(model=model.state_dict(), config=asdict(model.config))
            write_atomic(folder / "model.pt", lambda tmp: torch.save(final, tmp))

    def finish(self, model):
        """Write model.pt and let go of the folder."""
        self.keep(model, self.path)
        if self.first:
            (self.path / SAVES[1]).unlink(missing_ok=True)
        self.leave(f"finished, {self.record['in_effect']['total']} steps")

    def leave(self, text):
        """Let go of the folder, and say why."""
        if self.first:
            if self.writer:
                self.writer.close()
            self.lock.close()
            print(f"{self.path}: {text}")


def summary(sums, record):
    """The row of an epoch: means over its steps, from the sums of their statistics."""
    mean = {key: value / sums["n"] for key, value in sums.items() if key != "n"}
    norms = stream_norms([mean.get(name, 0) for name in STREAM_NORMS], record["tokens"])
    if STREAM_NORMS[0] not in mean:  # a ResNet has no streams
        norms = dict.fromkeys(norms)
    elif record["config"]["max_pool"] or record["config"]["lead_tokens"]:  # not the mean alone
        norms |= dict.fromkeys(("grad_norm_time", "grad_norm_channel", "grad_norm_ratio"))
    seconds, waited, flop = mean.pop("seconds"), mean.pop("waited"), record["flop_per_record"]
    speed = record["in_effect"]["batch"] / seconds
    return mean | norms | dict(
        records_per_second=speed, data_share=waited / seconds,
        gflop_per_record=flop / 1e9, of_peak=speed * flop / record["peak_flops"],
        peak_mib=peak_mib(torch.device(record["device"])))


def announce(run, n_train, n_val, notes, start):
    """Print what is about to be trained, on what, with which settings in effect."""
    record, args, plan = run.record, run.record["args"], Plan(**run.record["in_effect"])
    meta, validated = record["data"], n_val // plan.val_batch * plan.val_batch
    lines = dict(
        view=from_args(ViewConfig, args).describe(),
        data=("SYNTHETIC, " if meta["synthetic"] else "") + f"{meta['data']} at {meta['rate']} Hz: "
        f"{n_train} training records (folds 1-8), {n_val} validation (fold 9, the loss on "
        f"{validated} of them); {len(meta['left_out'])} left out",
        model=f"{args['arch']}, {record['n_parameters']:,} parameters, {record['samples']} samples "
        f"a view, on {record['device']} in {record['precision']}",
        batch=f"{plan.batch} in micro-batches of {plan.micro}, negatives from the "
        f"{args['negatives']}",
        schedule=f"{plan.total} steps in {plan.epochs} epochs of {plan.steps}, warm-up "
        f"{plan.warmup}, rate up to {args['max_lr']:g}, then down to {args['final_lr']:g}",
        chance="a loss of {:.2f}, in validation {:.2f}".format(
            *chance(args, record["in_effect"])))
    if start:
        notes = [*notes, f"resumed at step {start} of {plan.total}"]
    for what, text in (*lines.items(), *(("note", note) for note in notes),
                       ("note", f"writing to {run.path}")):
        print(f"{what:10} {text}")


SHOWN = dict(  # of a row on the screen: name there, format
    loss=("loss", ".4f"), val_loss=("val", ".4f"), lr=("lr", ".1e"),
    grad_norm_ratio=("channel/time", ".2f"), grad_norm_ratio_corrected=("corrected", ".2f"),
    silhouette=("sil", "+.3f"), davies_bouldin=("DB", ".2f"), calinski_harabasz=("CH", ".2f"),
    records_per_second=("rec/s", ".0f"), of_peak=("of peak", ".0%"), data_share=("data", ".1%"),
    peak_mib=("MiB", ".0f"))


def check_data(cache, config, size):
    """Rows of folds 1-8, rows of fold 9, samples of a view; raise InputError for what lacks."""
    empty = sorted({*TRAIN_FOLDS, VAL_FOLD} - set(cache.index.strat_fold))
    if empty:
        raise InputError(f"{cache.folder} has no records in fold {', '.join(map(str, empty))}; "
                         "folds 1-8 train and 9 validates: take more records, or give a table "
                         "with strat_fold (see the README)")
    if config.augment_p:
        pool(config, cache.meta["rate"])  # checks the band against the rate
    samples = round(config.window * config.timing()[1] * cache.signals.shape[1])
    if samples < size.time_stride:
        raise InputError(f"--time-stride {size.time_stride}: a view has only {samples} samples")
    return cache.rows(TRAIN_FOLDS), cache.rows([VAL_FOLD]), samples


# The command line

def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     usage="%(prog)s [--help] [flags]",
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
    add("--epochs", type=bounded(int, 1), default=50, help="passes over folds 1-8")
    add("--max-steps", type=bounded(int, 1), help="end after this many, with the whole schedule")
    add("--batch-size", type=bounded(int, 2), help=f"effective batch; by default {BATCH}, or less "
        f"when that leaves under {MIN_STEPS} steps an epoch")
    add("--micro-batch", type=bounded(int, 1), default=16,
        help="records in memory at once; halve it if memory runs out")
    add("--max-lr", type=bounded(float, 1e-12), default=3e-4,
        help="peak of the cycle; lower it if the loss jumps")
    add("--final-lr", type=bounded(float, 1e-12), default=3e-5, help="end of the cycle (paper)")
    add("--warmup", type=bounded(int, 0), default=20, help="steps of linear warm-up (paper)")
    add("--weight-decay", type=bounded(float, 0), default=0.0, help="decoupled (AdamW)")
    add("--clip", type=bounded(float, 0), default=1.0, help="largest gradient norm; 0: any")
    add("--precision", choices=("auto", "float32", "tf32", "bfloat16"), default="auto",
        help="of the encoder's arithmetic; weights and loss stay float32 (tf32: the loss's "
        "products too). auto: bfloat16 on GPUs that have it")
    add("--bf16-weights", action=switch, default=False,
        help="hold the weights in bfloat16, as the paper did: steps are rounded to it")
    add("--compile", action=switch, default=False, help="compile the model: a minute or more at "
        "the start, and a C++ compiler on a CPU")
    add_flags(parser, "loss", Objective)
    add_flags(parser, "views", ViewConfig)
    add_model_flags(parser)
    return parse(parser, argv)


def with_defaults(saved):
    """Saved arguments of a run, with the defaults of its preset for flags younger than the run."""
    if saved["preset"] not in PRESETS:
        raise InputError(f"args.json is damaged (preset: {saved['preset']!r}); mend it, or train "
                         "again")
    usual = vars(get_args([])) | PRESETS[saved["preset"]]
    kinds = {str: str, type(None): (int, float, str, type(None))}  # of a default: else a number
    for key, value in saved.items():
        if not isinstance(value, kinds.get(type(usual.get(key)), (int, float))):
            raise InputError(f"args.json is damaged ({key}: {value!r}); mend it, or train again")
    return usual | saved


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
    leave_processes()


if __name__ == "__main__":
    run_script(main)
