"""Contrastive pretraining of a dual-view encoder on a cache of 12-lead ECGs (paper 4.4).

In:  a cache folder of data.py (int16 microvolt); labels are never used for training.
Out: a run folder: args.json, log.jsonl (a line an epoch), last.pt (to go on), model.pt (at the
     end), tensorboard/. The same command again resumes it, or says that it is finished.

    python train.py --cache cache/ptbxl-500 --view noncontig
    python train.py --cache cache/synth-100 --view contig --preset small --epochs 3 --run runs/try

Everything random is a function of (seed, epoch, step): a resumed run repeats the interrupted one.
"""
import argparse
import fcntl
import gc
import json
import math
import mmap
import os
import platform
import random
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a group, which its functions' defaults would hold
from sklearn.metrics import calinski_harabasz_score, davies_bouldin_score, silhouette_score
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data import (CLASSES, LEADS, TRAIN_FOLDS, VAL_FOLD, InputError, normalize, open_cache,
                  run_script, write_atomic)
from model import (Block, Config, Contrastive, CrossAttention, Layer, TimeStem, add_model_flags,
                   embed, n_parameters, nt_xent, parse)
from views import ViewConfig, add_flags, augment, draw_leads, from_args, pool, shift, split

BATCH = 1024  # effective batch of the paper
MIN_STEPS = 8  # steps an epoch that the automatic batch leaves
START_DIV, RISE = 25, 0.3  # one cycle: first lr is max / 25, 30 % of the steps rise (PyTorch's)
VAL_KEY = 2 ** 31  # stands where the epoch stands: validation views are the same in every epoch
STREAMS = "grad_norm_time_corrected", "grad_norm_channel_corrected"  # at the pooled streams
NOT_A_RESULT = {"run", "cache", "workers", "device", "save_minutes"}  # may differ on a resume


# Randomness and schedule: pure functions of the step

def set_seed(seed):
    """Seed every generator: the weights' initial values depend on it."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def derive(*key):
    """A 64-bit seed from non-negative integers; other keys give independent streams."""
    key = (*key, 1 + len(key))  # SeedSequence takes (0, 5) and (0, 5, 0) for the same
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def generator(*key):
    """A CPU generator seeded by derive(*key)."""
    return torch.Generator().manual_seed(derive(*key))


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
    share = (step - peak) / max(total - 1 - peak, 1)
    return final_lr + (max_lr - final_lr) * (1 + math.cos(math.pi * share)) / 2


def settle(args, n_train, n_val, processes=1):
    """The settings in effect: (dict of batch, micro, val_batch, steps, total, warmup; notes).

    A default batch leaves MIN_STEPS steps an epoch; so does one that exceeds the training set.
    Raises InputError for settings that cannot train.
    """
    notes, micro = [], args.micro_batch
    for name in ("batch_size", "micro_batch", "epochs", "max_steps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1")
    for name in ("seed", "workers", "save_minutes", "warmup", "clip", "weight_decay", "aux_weight"):
        if not 0 <= getattr(args, name) < math.inf:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: 0 or more")
    if args.batch_size == 1 or not (args.tau > 0 and args.max_lr >= args.final_lr > 0):
        raise InputError("--batch-size must be at least 2, --tau above 0, and --max-lr at least "
                         "--final-lr, which is above 0")
    batch = args.batch_size or BATCH
    if micro < batch and batch % micro:
        raise InputError(f"--micro-batch {micro} does not divide the batch of {batch}; give one "
                         f"that does, such as {math.gcd(micro, batch)}")
    if args.negatives == "micro" and micro == 1:
        raise InputError("--micro-batch 1 leaves no negatives with --negatives micro: at least 2")
    if n_train < 4 * processes or n_val < 2 * processes:
        raise InputError(f"{n_train} records in folds 1-8 and {n_val} in fold 9: at least 4 and 2 "
                         "are needed for each process; see: python data.py info")
    chosen = args.batch_size is not None and batch <= n_train
    if not chosen and batch * MIN_STEPS > n_train:
        batch = max(2, 2 ** int(math.log2(n_train / MIN_STEPS)))
        notes.append(f"batch {batch} instead of {args.batch_size or BATCH}: {n_train} training "
                     f"records, and an epoch needs some {MIN_STEPS} steps")
    if not chosen:
        batch -= batch % processes
    elif batch % processes:
        unit = math.lcm(processes, min(micro, batch))
        fits = max(batch // unit, 1) * unit
        raise InputError(f"{processes} processes cannot share a batch of {batch} evenly; give a "
                         f"--batch-size that they can, such as {fits}")
    alone, micro = micro, math.gcd(batch // processes, min(micro, batch // processes))
    if micro < min(alone, batch):
        notes.append(f"micro-batch {micro} instead of {alone}: a process has only "
                     f"{batch // processes} records of a batch")
    if args.negatives == "micro" and micro == 1:
        raise InputError(f"a batch of {batch} leaves {processes} processes no negatives with "
                         "--negatives micro: give a larger --batch-size")
    steps = n_train // batch
    total = min(args.epochs * steps, args.max_steps or math.inf)
    warmup = min(args.warmup, total // 5)
    if warmup < args.warmup:
        notes.append(f"warm-up {warmup} instead of {args.warmup} steps: the run has only {total}")
    return dict(batch=batch, micro=micro, processes=processes, val_batch=min(batch, n_val),
                steps=steps, total=total, warmup=warmup), notes


# Processes: torchrun starts several of this script, each with a device and a share of every batch.

def ranks():
    """(rank of this process, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share(n):
    """The slice of n items that this process works on; all of them without torchrun."""
    rank, processes = ranks()
    return slice(rank * n // processes, (rank + 1) * n // processes)


def gather(x, dim, even=True):
    """The processes' tensors x, one after another along dim, on this one's device; no gradient."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) if even else None for _ in range(ranks()[1])]
    if even:
        dist.all_gather(parts, x.contiguous())
    else:
        dist.all_gather_object(parts, x.cpu())
    return torch.cat([part.to(x.device) for part in parts], dim)


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
    else:  # torchrun leaves one thread each
        torch.set_num_threads(max(1, os.cpu_count() // int(os.environ["LOCAL_WORLD_SIZE"])))
    on_gpu = device.type == "cuda"
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    return device


def leave_processes():
    """Leave the group that join_processes() joined, when no shared model is in use any more.

    That ends gloo's threads: one that still lets go of a tensor while Python ends would abort it.
    """
    if dist.is_initialized():
        gc.collect()  # a DistributedDataParallel lies in cycles, and holds the group
        dist.destroy_process_group()


def share_statistics(model):
    """Average BatchNorm's running statistics over the processes, which each saw their share."""
    if dist.is_initialized():
        for buffer in model.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= ranks()[1]


# Batches: a batch is a function that gives the two views of a slice of it, on the device.

class Augmented(Dataset):
    """Two stochastic views (2, T, C) of a record; an item is a key (epoch, row)."""

    def __init__(self, cache, config, seed):
        self.cache, self.seed = cache, seed
        self.transforms = pool(config, cache.meta["rate"])

    def __getitem__(self, key):
        epoch, row = key
        x = normalize(torch.from_numpy(self.cache.signals[row].copy())).numpy()
        return torch.from_numpy(augment(x, self.transforms, (self.seed, epoch, row)))


class Clock:
    """Adds up the seconds spent within `with clock:`."""

    def __init__(self):
        self.seconds = 0.0

    def __enter__(self):
        self.began = time.monotonic()

    def __exit__(self, *error):
        self.seconds += time.monotonic() - self.began


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


def read_ahead(signals, rows):
    """Have the system read these rows of a memory-mapped array while something else is computed."""
    if hasattr(mmap, "MADV_WILLNEED") and hasattr(signals, "_mmap"):
        size = signals.strides[0]
        for start in rows * size:
            page = int(start) // mmap.PAGESIZE * mmap.PAGESIZE
            signals._mmap.madvise(mmap.MADV_WILLNEED, page, int(start) + size - page)


def batches(cache, config, seed, order, device, workers, clock=None):
    """Yield for each (epoch, rows) of order a function: slice -> views x1, x2 (b, T', C).

    Segment views are cut on the device when asked for, so that a large batch costs the memory of a
    slice; the system reads the next batch ahead. Stochastic ones come from worker processes ahead
    of time, in pieces of 16 records (shared memory can be small), and this process's share of a
    batch is held on the device: only its own slices may be asked for. clock: counts the waiting.
    """
    clock, order = clock or Clock(), list(order)
    if config.view == "stochastic":
        mine = [[(epoch, int(row)) for row in rows[share(len(rows))]] for epoch, rows in order]
        pieces = [keys[i:i + 16] for keys in mine for i in range(0, len(keys), 16)]
        made = iter(DataLoader(Augmented(cache, config, seed), batch_sampler=pieces,
                               num_workers=workers))
        for (_, rows), keys in zip(order, mine):
            with clock:
                x = torch.cat([next(made) for _ in range(0, len(keys), 16)]).to(device)
            # x: (b, 2, T, C)
            yield lambda part, x=x, first=share(len(rows)).start: x[
                part.start - first:part.stop - first].unbind(1)
    else:
        T = cache.signals.shape[1] // 2
        for (epoch, rows), (_, following) in zip(order, [*order[1:], order[-1]]):
            if cache.copies.get(device) is None:
                read_ahead(cache.signals, following[share(len(following))])
            offsets = torch.randint(T, (2, len(rows)), generator=generator(
                seed, epoch, int(rows[0]), 0)).to(device) if config.shift else None

            def cut(part, rows=rows, offsets=offsets):
                with clock:
                    x = fetch(cache, rows[part], device)
                pair = split(normalize(x), config.view)
                return pair if offsets is None else [
                    shift(v, at) for v, at in zip(pair, offsets[:, part])]

            yield cut


def epoch_order(rows, batch, seed, start, total):
    """(epoch, rows of the batch) for the steps start .. total - 1; each epoch is a new shuffle."""
    steps, epoch = len(rows) // batch, None
    for step in range(start, total):
        if step // steps != epoch:
            epoch = step // steps
            shuffled = rows[torch.randperm(len(rows), generator=generator(seed, epoch)).numpy()]
        at = step % steps * batch
        yield epoch, shuffled[at:at + batch]


def draw_keep(config, batch, *key, device="cpu"):
    """Leads that each view of a batch keeps: (2, B, C) bool, or None without masking."""
    if not config.mask_leads:
        return None
    return draw_leads((2, batch, len(LEADS)), config.mask_p, generator(*key)).to(device)


# The loss of one effective batch, and its exact gradient in the memory of a micro-batch

def total_loss(projections, tau, aux_weight):
    """NT-Xent of the representation, plus aux_weight times that of each stream, if there.

    projections: (1 or 3, 2, B, proj_dim)
    """
    losses = [nt_xent(z1, z2, tau) for z1, z2 in projections]
    return losses[0] + aux_weight * sum(losses[1:])


def project(model, views, keep, part, key, autocast=nullcontext):
    """Output and projections (1 or 3, 2, b, proj_dim) of a slice of a batch.

    keep: (2, B, C) bool or None. The same key gives the same dropout, in both passes.
    """
    torch.manual_seed(derive(*key, part.start))  # on every device
    x1, x2 = views(part)
    kept = None if keep is None else keep[:, part].flatten(0, 1).to(x1.device)
    with autocast():
        output, projections = model(torch.cat([x1, x2]), kept)
    return output, projections.unflatten(1, (2, -1))


@contextmanager
def frozen_statistics(model):
    """BatchNorm normalises as in training, but its running averages stand still."""
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm1d)]
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.momentum = 0.0
    try:
        yield
    finally:
        for m, momentum in zip(norms, momenta):
            m.momentum = momentum


def backward(forward, views, keep, batch, micro, key, tau=0.1, aux_weight=0.0, negatives="batch",
             autocast=nullcontext):
    """Add the gradient of one effective batch to .grad; return its loss and the streams' norms.

    negatives="batch": the gradient of NT-Xent over the whole batch, in three passes (GradCache,
    Gao et al. 2021, arXiv 2101.06983): project without a graph; differentiate the loss with
    respect to the projections of all processes; project again with a graph and the same
    randomness, and back-propagate. A process with one part projects it once, and keeps the graph.
    "micro": plain accumulation, negatives from the micro-batch alone (the paper).
    forward: the model, or it compiled or in DistributedDataParallel, which averages gradients
    ->  loss, [norm at time, norm at channel]: gradient norms at the pooled streams (0 if none)
    """
    processes, mine = ranks()[1], share(batch)
    parts = [slice(i, i + micro) for i in range(mine.start, mine.stop, micro)]
    squares, loss, kept = [0.0, 0.0], 0.0, None

    def exchange(part):  # gradients are exchanged between processes after the last part alone
        return nullcontext() if processes == 1 or part is parts[-1] else forward.no_sync()

    # What outlives a part is allocated before the first: later, it would tear the CPU's heap apart.
    for p in forward.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    if negatives == "batch":
        # deviation: the paper accumulates gradients of micro-batches, which is not NT-Xent on 1024
        plain = getattr(forward, "module", forward)
        if len(parts) == 1:  # then its graph is kept instead
            kept = project(forward, views, keep, parts[0], key, autocast)
            cached = kept[1].detach()
        else:
            cached = torch.empty(len(plain.heads), 2, mine.stop - mine.start,
                                 plain.config.proj_dim, device=next(plain.parameters()).device)
            with torch.no_grad(), frozen_statistics(plain):
                for part, rows in zip(parts, cached.split(micro, dim=2)):
                    rows.copy_(project(plain, views, keep, part, key, autocast)[1])
        cached = gather(cached, 2).requires_grad_()
        whole = total_loss(cached, tau, aux_weight)
        (grad,) = torch.autograd.grad(whole, cached)
        loss = whole.detach()
    for part in parts:
        with exchange(part):
            output, projections = kept or project(forward, views, keep, part, key, autocast)
            kept = None
            streams = [h for h in (output.time, output.channel) if h is not None]
            for h in streams:
                h.retain_grad()
            if negatives == "batch":
                projections.backward(processes * grad[:, :, part])
            else:
                part_loss = total_loss(projections, tau, aux_weight) * processes * micro / batch
                part_loss.backward()
                loss += part_loss.detach()  # mean over this process's parts
        for j, h in enumerate(streams):
            squares[j] += h.grad.float().square().sum() / processes ** 2
        del output, projections, streams  # before the next part's graph is made
    if processes > 1:
        sums = torch.tensor([loss / processes, *squares], device=next(forward.parameters()).device)
        dist.all_reduce(sums)
        loss, *squares = sums.tolist()
        share_statistics(forward)
    return float(loss), [math.sqrt(s) for s in squares]


def stream_norms(norms, n_tokens):
    """Gradient norms at the streams as the paper logged them, and corrected for token counts.

    norms: at the pooled vectors. Mean pooling hands each of N tokens 1/N of that gradient, so the
    norm at the token tensor, the paper's, is norm / sqrt(N) (design page, section 5).
    """
    (time_norm, channel_norm), (n_time, n_channel) = norms, n_tokens
    paper = [time_norm / math.sqrt(n_time), channel_norm / math.sqrt(n_channel)]
    return dict(grad_norm_time=paper[0], grad_norm_channel=paper[1],
                grad_norm_ratio=paper[1] / max(paper[0], 1e-12),
                **dict(zip(STREAMS, norms)),
                grad_norm_ratio_corrected=channel_norm / max(time_norm, 1e-12))


def parameter_norms(model):
    """Gradient norms of each stream's parameters (stem and layers)."""
    return {f"param_grad_norm_{name}": float(torch.nn.utils.get_total_norm(
        [p.grad for p in model.encoder.stream_parameters(name)]))
        for name in ("time", "channel")}


# Validation

@torch.no_grad()
def extract(function, cache, rows, device, autocast=nullcontext, size=64):
    """What a function of z-scored records (b, T, C) gives for the rows of a cache.

    size: records in memory at once  ->  (len(rows), ...) float32 array
    """
    parts = np.array_split(rows, math.ceil(max(len(rows), 1) / size))
    done = []
    for part in tqdm(parts, "records", leave=False, disable=None if len(parts) > 99 else True):
        x = normalize(fetch(cache, part, device))
        with autocast():
            done.append(function(x).float().cpu().numpy())
    return np.concatenate(done)


def clustering(z, labels):
    """Clustering scores of representations z (n, D) under labels (n,), from scikit-learn.

    silhouette in [-1, 1], higher is better; davies_bouldin >= 0, lower is better;
    calinski_harabasz >= 0, higher is better. All None with fewer than two classes or no spread.
    """
    names = ("silhouette", "davies_bouldin", "calinski_harabasz")
    if not 2 <= len(set(labels)) < len(labels) or np.ptp(z, axis=0).max() == 0:
        return dict.fromkeys(names)
    return {name: float(score(z, labels)) for name, score in zip(
        names, (silhouette_score, davies_bouldin_score, calinski_harabasz_score))}


def diverged(what, step, plan):
    """The error of a run whose numbers are no longer finite."""
    return FloatingPointError(
        f"{what} at epoch {step // plan['steps'] + 1}, step {step}; last.pt, if there, keeps the "
        "last good state. Try a lower --max-lr, --clip 1 or --precision float32, in another run "
        "folder")


@torch.no_grad()
def validate(model, cache, rows, step, config, args, plan, device, autocast):
    """val_loss on fixed views of fold 9, and clustering of its single-superclass records.

    Raises FloatingPointError, before anything is saved, when one of them is not finite.
    """
    model.eval()
    B, micro, losses, mine = plan["val_batch"], plan["micro"], [], share(plan["val_batch"])
    order = [(VAL_KEY, rows[i:i + B]) for i in range(0, len(rows) - B + 1, B)]
    for i, views in enumerate(batches(cache, config, args.seed, order, device, args.workers)):
        keep = draw_keep(config, B, args.seed, VAL_KEY, i)
        parts = [slice(j, min(j + micro, mine.stop)) for j in range(mine.start, mine.stop, micro)]
        projections = torch.cat([project(model, views, keep, part, (0,), autocast)[1]
                                 for part in parts], dim=2)
        projections = gather(projections, 2, even=False)
        losses.append(float(total_loss(projections, args.tau, args.aux_weight)))
    labels = cache.index.loc[rows, list(CLASSES)].to_numpy()
    single = labels.sum(1) == 1  # a fixed list of ids: never used to choose a checkpoint
    z = extract(lambda x: embed(model, x, config.view).mean(1), cache,
                rows[single][share(single.sum())], device, autocast, micro)
    z = gather(torch.from_numpy(z), 0, even=False).numpy()
    if not (np.isfinite(losses).all() and np.isfinite(z).all()):
        raise diverged(f"loss {np.mean(losses)} in validation", step, plan)
    return dict(val_loss=float(np.mean(losses)), **clustering(z, labels[single].argmax(1)))


# The run folder

def describe_run(args, model, cache, plan, device):
    """What args.json holds: arguments, settings in effect, sizes, versions, data."""
    try:
        commit = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"],
                                capture_output=True, text=True, cwd=Path(__file__).parent).stdout
    except OSError:  # no git here
        commit = ""
    packages = ("torch", "numpy", "scipy", "scikit-learn", "wfdb", "ecgmentations")
    return dict(args=vars(args), argv=sys.argv[1:], in_effect=plan, config=asdict(model.config),
                n_parameters=n_parameters(model), git_commit=commit.strip() or None,
                versions={"python": platform.python_version(), **{p: version(p) for p in packages}},
                device=str(device), threads=torch.get_num_threads(), data=cache.meta)


def check_run(run, record):
    """Refuse a run folder that was begun with other arguments or data; say which differ."""
    path = run / "args.json"
    if not (run / "last.pt").exists() and not (run / "model.pt").exists():  # nothing to lose
        return write_atomic(path, lambda tmp: tmp.write_text(json.dumps(record, indent=1)))
    try:
        old = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}); remove {run}") from error
    differ = [f"--{k.replace('_', '-')}: {old['args'][k]} then, {v} now"
              for k, v in record["args"].items()
              if k not in NOT_A_RESULT and old["args"].get(k, v) != v]
    if old["in_effect"]["micro"] != record["in_effect"]["micro"]:
        differ.append(f"micro-batch in effect: {old['in_effect']['micro']} then, "
                      f"{record['in_effect']['micro']} now, perhaps by another NPROC")
    if old["data"]["fingerprint"] != record["data"]["fingerprint"]:
        differ.append(f"data: {old['data']['data']} at {old['data']['rate']} Hz then, "
                      f"{record['data']['data']} at {record['data']['rate']} Hz now")
    if differ:
        raise InputError(f"{run} was made with other arguments; give another RUN= (--run), or "
                         f"remove the folder:\n  " + "\n  ".join(differ))
    if old["git_commit"] != record["git_commit"]:
        print(f"note: the code was at {old['git_commit']} when this run began")


def lock_run(run):
    """Make the folder and hold it while the returned file is open, against a second process."""
    run.mkdir(parents=True, exist_ok=True)
    file = open(run / ".lock", "a")
    try:  # lockf, not flock: workers that outlive a killed run for a moment do not hold it
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise InputError(f"{run}: another process trains there; wait for it, or give another RUN="
                         " (--run)") from error
    return file


def save(run, model, optimizer, step, sums, log):
    """Write last.pt, then log.jsonl from the same rows: after a kill the two agree."""
    state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=step, sums=sums,
                 log=log)
    write_atomic(run / "last.pt", lambda tmp: torch.save(state, tmp))
    lines = "".join(json.dumps(row) + "\n" for row in log)
    write_atomic(run / "log.jsonl", lambda tmp: tmp.write_text(lines))


def restore(run, model, optimizer):
    """Load last.pt, if there: (steps done, sums since the last row of the log, log)."""
    if not (run / "last.pt").exists():
        return 0, {}, []
    try:
        state = torch.load(run / "last.pt", map_location="cpu")
    except (RuntimeError, EOFError) as error:
        raise InputError(f"{run / 'last.pt'} is damaged ({error}); remove {run}") from error
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["sums"], state["log"]


def summary(sums, batch, n_tokens):
    """Means over the n steps of an epoch, from the sums of their statistics."""
    mean = {key: value / sums["n"] for key, value in sums.items() if key != "n"}
    mean["data_share"] = mean.pop("waited") / mean["seconds"]
    if STREAMS[0] in mean:
        mean |= stream_norms([mean[key] for key in STREAMS], n_tokens)
    else:  # a ResNet has no streams
        mean |= dict.fromkeys(stream_norms((1, 1), n_tokens))
    return mean | dict(records_per_second=batch / mean.pop("seconds"))


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


def pick_autocast(precision, device):
    """(precision in effect, a factory of context managers): bf16 autocast, or nothing."""
    if precision == "auto":
        has_it = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bfloat16" if has_it else "float32"
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    # deviation: the paper held the weights in bf16, where a step of lr 3e-5 is lost in rounding
    return precision, nullcontext if precision != "bfloat16" else (
        lambda: torch.autocast(device.type, torch.bfloat16))


def chance(args, plan):
    """The loss at chance, in training and in validation. args: a dict; plan: of settle()."""
    terms = 1 + 2 * args["aux_weight"] * args["aux_losses"]
    seen = plan["batch"] if args["negatives"] == "batch" else plan["micro"]
    return [terms * math.log(2 * n - 1) for n in (seen, plan["val_batch"])]


def announce(config, cache, rows, plan, notes, where, args):
    """Print what is about to be trained, on what, with which settings in effect."""
    steps, total, meta, val = plan["steps"], plan["total"], cache.meta, plan["val_batch"]
    chances = chance(vars(args), plan)
    print(f"view       {config.describe()}\n"
          f"data       {'SYNTHETIC, ' if meta['synthetic'] else ''}{meta['data']} at {meta['rate']}"
          f" Hz: {len(rows[0])} training records (folds 1-8), {len(rows[1])} validation (fold 9, "
          f"the loss on {len(rows[1]) // val * val} of them)\n"
          f"model      {where}\n"
          f"batch      {plan['batch']} in micro-batches of {plan['micro']}, negatives from the "
          f"{'whole batch' if args.negatives == 'batch' else 'micro-batch'}\n"
          f"schedule   {total} steps in {math.ceil(total / steps)} epochs of {steps}, warm-up "
          f"{plan['warmup']}, learning rate up to {args.max_lr:g}, then down to {args.final_lr:g}\n"
          f"chance     a loss of {chances[0]:.2f}, in validation {chances[1]:.2f}")
    for note in notes:
        print(f"note       {note}")


def show(row, epochs):
    """One aligned line for an epoch."""
    parts = [f"epoch {row['epoch']:>3}/{epochs}"]
    for key, name, form in (
            ("loss", "loss", ".4f"), ("val_loss", "val", ".4f"), ("lr", "lr", ".1e"),
            ("grad_norm_ratio", "channel/time", ".2f"),
            ("grad_norm_ratio_corrected", "corrected", ".2f"), ("silhouette", "sil", "+.3f"),
            ("davies_bouldin", "DB", ".2f"), ("calinski_harabasz", "CH", ".2f"),
            ("records_per_second", "rec/s", ".0f"), ("data_share", "data", ".1%")):
        parts.append(f"{name} " + ("-" if row[key] is None else f"{row[key]:{form}}"))
    tqdm.write("  ".join(parts))


def record(writer, row):
    """The numbers of an epoch, for TensorBoard."""
    for key, value in row.items():
        if value is not None:
            writer.add_scalar(key, value, row["epoch"])
    writer.flush()


def compute_gradient(model, forward, optimizer, views, step, config, args, plan, autocast):
    """Gradient and learning rate of one effective batch, ready to step; return its statistics.

    Raises FloatingPointError, before the weights change, when loss or gradient is not finite.
    """
    lr = learning_rate(step, plan["total"], plan["warmup"], args.max_lr, args.final_lr)
    for group in optimizer.param_groups:
        group["lr"] = lr
    model.train()
    optimizer.zero_grad(set_to_none=False)  # backward() wants them allocated
    keep = draw_keep(config, plan["batch"], args.seed, step, 1,  # once: each copy waits for the GPU
                     device=next(model.parameters()).device)
    loss, norms = backward(forward, views, keep, plan["batch"], plan["micro"], (args.seed, step),
                           args.tau, args.aux_weight, args.negatives, autocast)
    stats = dict(loss=loss)
    if hasattr(model.encoder, "stream_parameters"):
        stats |= {**dict(zip(STREAMS, norms)), **parameter_norms(model)}
    stats["grad_norm"] = float(torch.nn.utils.clip_grad_norm_(
        model.parameters(), args.clip or math.inf))
    if not (math.isfinite(loss) and math.isfinite(stats["grad_norm"])):
        raise diverged(f"loss {loss}, gradient norm {stats['grad_norm']}", step, plan)
    return stats | dict(lr=lr)


def check_folds(cache):
    """Rows of folds 1-8 and of fold 9; raise InputError when one of these folds is empty."""
    empty = sorted({*TRAIN_FOLDS, VAL_FOLD} - set(cache.index.strat_fold))
    if empty:
        raise InputError(f"{cache.folder} has no records in fold {', '.join(map(str, empty))}; "
                         "folds 1-8 train and 9 validates: see python data.py info")
    return cache.rows(TRAIN_FOLDS), cache.rows([VAL_FOLD])


def open_folder(args, config, record):
    """The run folder, locked and checked by the first process; what it raises, all raise."""
    run, lock = Path(args.run or f"runs/{config.view}-s{args.seed}"), None
    refused = [None]
    if any(path.is_file() for path in (run, *run.parents)):
        raise InputError(f"--run {run}: it, or a folder above it, is a file; give another")
    if ranks()[0] == 0:
        try:
            lock = lock_run(run)
            check_run(run, record)
        except (InputError, OSError) as error:
            refused = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(refused)
    if refused[0]:
        raise refused[0]
    return run, lock


def accelerate(model, args):
    """The model as training calls it: its blocks compiled if asked for, shared by all processes."""
    if args.compile:
        # on a CPU the same dropout as without; elsewhere it is fused, and repeats in both passes
        torch._inductor.config.fallback_random = next(model.parameters()).device.type == "cpu"
        torch._dynamo.config.recompile_limit = 64  # two streams, with and without a graph, ...
        for module in model.modules():
            if isinstance(module, (TimeStem, Layer, CrossAttention, Block)):
                module.compile()
    # share_statistics() has made BatchNorm's averages equal: no need to send them round again
    return model if ranks()[1] == 1 else DistributedDataParallel(model, forward_sync_buffers=False)


def train(args):
    """Pretrain and write the run folder. Raises InputError, before work starts, for bad input."""
    from torch.utils.tensorboard import SummaryWriter  # slow to import

    config, size = from_args(ViewConfig, args), from_args(Config, args)
    vars(args).update(asdict(config))  # aliases and automatic settings are resolved at once
    cache = open_cache(args.cache)
    rows = check_folds(cache)
    device = join_processes(args.device)
    plan, notes = settle(args, len(rows[0]), len(rows[1]), ranks()[1])
    precision, autocast = pick_autocast(args.precision, device)
    if config.view == "stochastic":
        pool(config, cache.meta["rate"])  # checks the band against the rate
    samples = cache.signals.shape[1] // (1 if config.view == "stochastic" else 2)
    if samples < size.time_stride:
        raise InputError(f"--time-stride {size.time_stride}: a view has only {samples} samples")
    n_tokens = samples // size.time_stride, len(LEADS)
    set_seed(args.seed)
    model, first = Contrastive(size).to(device), ranks()[0] == 0
    run, lock = open_folder(args, config, describe_run(args, model, cache, plan, device))
    if (run / "model.pt").exists():
        return first and print(f"{run}: finished, nothing to do; remove the folder to train again")

    optimizer = torch.optim.Adam(model.parameters(), weight_decay=args.weight_decay)
    start, sums, log = restore(run, model, optimizer)
    if start:
        notes.append(f"resumed at step {start} of {plan['total']}")
    where = (f"{size.arch}, {n_parameters(model):,} parameters, {samples} samples a view, on "
             f"{device} in {precision}{', compiled' * args.compile}; -> {run}")
    if first:
        announce(config, cache, rows, plan, notes, where, args)
    forward, clock = accelerate(model, args), Clock()
    writer = SummaryWriter(run / "tensorboard", purge_step=len(log) + 1) if first else None
    bar = tqdm(total=plan["total"], initial=start, desc=run.name, unit="step",
               disable=None if first else True)
    order = epoch_order(rows[0], plan["batch"], args.seed, start, plan["total"])
    saved = tick = time.monotonic()
    feed = batches(cache, config, args.seed, order, device, args.workers, clock)
    for step, views in enumerate(feed, start):
        stats = compute_gradient(model, forward, optimizer, views, step, config, args, plan,
                                 autocast)
        if first and time.monotonic() - saved > 60 * args.save_minutes:
            save(run, model, optimizer, step, sums, log)  # these weights gave a finite loss
            saved = time.monotonic()
        optimizer.step()
        stats |= dict(n=1, seconds=time.monotonic() - tick, waited=clock.seconds)
        tick, clock.seconds = time.monotonic(), 0.0
        sums = {key: sums.get(key, 0) + value for key, value in stats.items()}
        bar.set_postfix(loss=f"{stats['loss']:.3f}", refresh=False)
        bar.update()
        if (step + 1) % plan["steps"] == 0 or step + 1 == plan["total"]:
            row = dict(epoch=step // plan["steps"] + 1, step=step + 1)
            row |= summary(sums, plan["batch"], n_tokens) | dict(lr=stats["lr"])
            row |= validate(model, cache, rows[1], step, config, args, plan, device, autocast)
            log, sums = [*log, row], {}
            if first:
                show(row, math.ceil(plan["total"] / plan["steps"]))
                record(writer, row)
                save(run, model, optimizer, step + 1, sums, log)
            saved = tick = time.monotonic()
    bar.close()
    if first:
        writer.close()
        final = dict(model=model.state_dict(), config=asdict(size))
        write_atomic(run / "model.pt", lambda tmp: torch.save(final, tmp))
        lock.close()
        print(f"{run / 'model.pt'}: finished, {plan['total']} steps")


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    g = parser.add_argument_group("data and run")
    g.add_argument("--cache", default="cache/ptbxl-500", help="folder of: python data.py cache")
    g.add_argument("--run", help="run folder; by default runs/VIEW-sSEED")
    g.add_argument("--seed", type=int, default=0, help="of everything: same seed, same run")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    g.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1),
                   help="processes that make stochastic views ahead of the model; 0: none")
    g.add_argument("--save-minutes", type=float, default=10,
                   help="last.pt is written after each epoch, and this often within one")
    g = parser.add_argument_group("optimisation")
    g.add_argument("--epochs", type=int, default=50, help="passes over folds 1-8")
    g.add_argument("--max-steps", type=int, help="stop, with the whole schedule, after this many")
    g.add_argument("--batch-size", type=int, help=f"effective batch; by default {BATCH}, or less "
                   f"when that leaves under {MIN_STEPS} steps an epoch")
    g.add_argument("--micro-batch", type=int, default=16, help="records in memory at once; must "
                   "divide the batch; halve it if memory runs out")
    g.add_argument("--negatives", choices=("batch", "micro"), default="batch", help="batch: exact "
                   "gradient of the effective batch; micro: plain accumulation, as in the paper")
    g.add_argument("--tau", type=float, default=0.1, help="temperature of NT-Xent")
    g.add_argument("--aux-weight", type=float, default=0.5, help="weight of each auxiliary loss, "
                   "with --aux-losses")
    g.add_argument("--max-lr", type=float, default=3e-4, help="peak of the cycle; lower it if the "
                   "loss jumps")
    g.add_argument("--final-lr", type=float, default=3e-5, help="end of the cycle (paper)")
    g.add_argument("--warmup", type=int, default=20, help="steps of linear warm-up from 0 (paper)")
    g.add_argument("--weight-decay", type=float, default=0.0, help="L2 penalty of Adam")
    g.add_argument("--clip", type=float, default=1.0, help="largest gradient norm; 0: no clipping")
    g.add_argument("--precision", choices=("auto", "float32", "tf32", "bfloat16"), default="auto",
                   help="of the encoder's arithmetic; weights and loss stay float32 (tf32: the "
                   "loss's products too). auto: bfloat16 on GPUs that have it")
    g.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="compile"
                   " the model: a minute or more at the start, and a C++ compiler on a CPU")
    add_flags(parser, "views", ViewConfig)
    add_model_flags(parser)
    return parse(parser, argv)


def main():
    train(get_args())
    leave_processes()


if __name__ == "__main__":
    run_script(main)
