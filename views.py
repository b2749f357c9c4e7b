"""Two views of each ECG record: the three strategies of the paper, and random lead masking.

In:  x (B, T, C) float32, z-scored (data.normalize), T = 10 s.
Out: x1, x2 with the same number of records: full length, half as many samples, or with --disturb
     windows of these.

    python views.py                                        # the table VIEWS
    python -c "import torch, views; print(views.noncontig(torch.arange(6.).view(1, 6, 1)))"

A view of your own is a function and an entry in VIEWS. Strengths are set here, in POOL and DISTURB.
"""
import math
from dataclasses import dataclass
from typing import Callable, Optional

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from scipy.signal import butter, sosfiltfilt

from data import SECONDS, InputError, bounded, setting

try:
    from ecgmentations import EcgOnlyAugmentation
except ImportError:  # a machine that only loads a trained encoder: it passes nothing through a pool
    EcgOnlyAugmentation = object

# Strengths of the pool (paper 4.2.1). The defaults are ecgmentations' own, and weak.
POOL = dict(
    warp=0.05,  # time warp: moves its inner knots by up to 0.4 % of the record; 1.0: by up to 8 %
    crop=0.8,  # smallest share of the record that a crop keeps
    band=(0.5, 47.0),  # edges of the band-pass, Hz
    noise=0.01,  # variance of the Gaussian noise; signals have 1
    scale=0.05)  # amplitude is scaled by 1 +- this

# Strengths of `disturb`: what separates records on small data (preset conv).
DISTURB = dict(
    window=0.5,  # share of a view that is seen, at a random place; window * (1 + speed) <= 1
    speed=0.2,  # each view is played faster or slower by up to this share
    lead_gain=0.4,  # gains of the leads: standard deviation of their logarithm
    wander=0.5,  # a slow wave in each lead: standard deviation of its amplitude
    max_noise=0.5)  # white noise of up to this standard deviation

# Whatever is random has a generator of its own, named by what it is for.
PURPOSES = "order", "dropout", "mask", "shift", "augment", "disturb", "equal"


def generator(purpose, seed, *key):
    """A NumPy generator: a function of purpose, seed and key (non-negative integers) alone."""
    return np.random.default_rng(
        np.random.SeedSequence(seed, spawn_key=(PURPOSES.index(purpose), *key)))


# What views are cut from a record: batch operations on whatever device x is on.

def contig(x):
    """The two halves of each record: each view is contiguous in time (paper 4.2.2).

    x: (B, T, C), T even  ->  two tensors (B, T // 2, C)
    """
    return x[:, :x.shape[1] // 2], x[:, x.shape[1] // 2:]


def noncontig(x):
    """Even and odd samples: two views that share no sample, each over all 10 s (paper 4.2.3).

    x: (B, T, C), T even  ->  two tensors (B, T // 2, C)
    """
    return x[:, 0::2], x[:, 1::2]


def whole(x):
    """The record itself, for strategies whose two views both have its full length."""
    return (x,)


@dataclass(frozen=True)
class View:
    """A strategy, as training, evaluation, figures, tables and the Makefile know it."""

    cut: Callable  # x (B, T, C) -> two views, or one that is taken twice, of evenly spaced samples
    words: str  # what the two are
    color: str  # in all figures
    alias: str = ""
    rate: int = 500  # Hz of the paper's runs
    pool: bool = False  # augmentations by default
    masked: bool = True  # lead masking by default
    table2: Optional[tuple] = None  # the paper's silhouette, Davies-Bouldin, Calinski-Harabasz
    table3: Optional[tuple] = None  # the paper's F1 of each of the CLASSES, accuracy, macro F1


VIEWS = {
    "stochastic": View(whole, alias="augment", rate=100, pool=True, masked=False, color="#997700",
                       words="two random passes through a pool of augmentations, full length",
                       table2=(-0.0168, 7.8849, 9.89), table3=(.78, .07, .33, .53, .11, .63, .36)),
    "contig": View(contig, alias="nonoverlap", color="#BB5566",
                   words="the two 5 s halves, each contiguous in time",
                   table2=(0.0327, 6.289, 37.55), table3=(.83, .42, .63, .66, .01, .72, .51)),
    "noncontig": View(noncontig, alias="interleaved", color="#004488",
                      words="even and odd samples, each over the whole 10 s",
                      table2=(0.0350, 6.424, 50.92), table3=(.82, .38, .57, .60, .00, .70, .47)),
    "masking": View(whole, rate=100, color="#228833",
                    words="the record twice, told apart by their masked leads alone"),
}


def list_views():
    """Names and aliases, for help and errors."""
    return ", ".join(f"{name} (or {view.alias})" if view.alias else name
                     for name, view in VIEWS.items())


def resolve_view(name):
    """The canonical name of a view; raise InputError that lists names and aliases."""
    for key, view in VIEWS.items():
        if name and name in (key, view.alias):
            return key
    raise InputError(f"unknown VIEW {name!r}; choose one of {list_views()}")


def view_duration(view):
    """Of one view, as shares of the record's: (its duration, its number of samples)."""
    times = VIEWS[view].cut(torch.arange(1000.)[None, :, None])[0][0, :, 0]
    samples = len(times) / 1000
    return samples * float(times[1] - times[0]), samples


def equal_pair(x, view, starts):
    """Two views of 5 s at half the record's rate, whatever the strategy.

    x: (B, T, C), starts: (B,) integers  ->  two tensors (B, T // 4, C). A view that spans more than
    5 s is cut from the 5 s of its record that begin at `starts`.
    """
    T, (duration, samples) = x.shape[1], view_duration(view)
    if duration > 0.5:
        x = shift(x, starts)[:, :round(T / 2 / duration)]
    every = 2 if duration == samples else 1  # noncontig halves the rate by itself
    return [part[:, ::every][:, :T // 4] for part in VIEWS[view].cut(x)]


def shift(x, offsets):
    """Start each record later, circularly: sample t + offset comes to t.

    x: (B, T, C), offsets: (B,) integers  ->  (B, T, C)
    """
    B, T, C = x.shape
    at = (torch.arange(T, device=x.device) + offsets[:, None]) % T
    return x.gather(1, at[:, :, None].expand(B, T, C))


def draw_leads(shape, p, rng):
    """Random lead masking: which leads a view keeps, each dropped with probability p.

    shape: (..., C); rng: a NumPy generator  ->  bool tensor of that shape. Where all leads fall,
    the draw is repeated (after Oh et al. 2022, arXiv 2203.06889).
    """
    keep = rng.random(shape) >= p
    while (lost := ~keep.any(-1)).any():
        keep[lost] = rng.random((int(lost.sum()), shape[-1])) >= p
    return torch.from_numpy(keep)


def disturb(x, rng):
    """Windows of views at random places, played faster or slower, with what recordings suffer from.

    x: (B, T, C), rng: a torch.Generator on x's device  ->  (B, round(window * T), C)
    Strengths: DISTURB. A window is read by linear interpolation, which softens its steepest parts.
    """
    B, T, C = x.shape
    W, drawn = round(DISTURB["window"] * T), dict(generator=rng, device=x.device)
    t = torch.linspace(0, 1, W, device=x.device)[:, None]  # (W, 1), time within the window
    speed = 1 + DISTURB["speed"] * (2 * torch.rand(B, 1, 1, **drawn) - 1)
    span = ((W - 1) * speed).clamp(max=T - 1)
    start = torch.rand(B, 1, 1, **drawn) * (T - 1 - span)
    at = start + span * t  # (B, W, 1), where each sample lies in x
    left = at.long().clamp(max=T - 2)
    here = x.gather(1, left.expand(B, W, C))
    after = x.gather(1, (left + 1).expand(B, W, C))
    x = torch.lerp(here, after, at - left)  # (B, W, C)
    x = x * (DISTURB["lead_gain"] * torch.randn(B, 1, C, **drawn)).exp()
    phase = 1.2 * torch.rand(B, 1, 1, **drawn) * t + torch.rand(B, 1, C, **drawn)  # in waves
    amplitude = DISTURB["wander"] * torch.randn(B, 1, C, **drawn)
    x = x + amplitude * torch.sin(2 * math.pi * phase)
    noise = DISTURB["max_noise"] * torch.rand(B, 1, 1, **drawn)
    return x + noise * torch.randn(B, W, C, **drawn)


# The pool of augmentations: numpy, one record at a time, in the workers of a DataLoader.

class BandPassFilter(EcgOnlyAugmentation):
    """Zero-phase band-pass along time; band: (low, high) in Hz, rate: Hz."""

    def __init__(self, band, rate, always_apply=False, p=0.5):
        super().__init__(always_apply, p)
        # deviation: ecgmentations 0.0.9 filters across the leads (lfilter without axis), causally,
        # and assumes 500 Hz
        self.sos = butter(3, band, "bandpass", fs=rate, output="sos")

    def apply(self, ecg, **params):
        return sosfiltfilt(self.sos, ecg, axis=0).astype(ecg.dtype)


class TimeCropResize(EcgOnlyAugmentation):
    """A random crop of at least `keep` of the record, stretched back to the full length."""

    def __init__(self, keep, always_apply=False, p=0.5):
        super().__init__(always_apply, p)
        self.keep = keep

    def get_params(self):
        share = np.random.uniform(self.keep, 1)
        return dict(share=share, start=np.random.uniform(0, 1 - share))

    def apply(self, ecg, share, start, **params):
        T = len(ecg)
        at = (start + share * np.arange(T) / T) * (T - 1)  # where each new sample lies in the old
        return CubicSpline(np.arange(T), ecg)(at).astype(ecg.dtype)


def pool(config, rate):
    """The transforms in sequence, each with p = augment_p and the strengths of POOL (paper 4.2.1).

    Call it as transforms(ecg=x)["ecg"] with x (T, C) float32; it draws from numpy's global state.
    """
    import ecgmentations as E  # here: a trained encoder is used without it

    p = config.augment_p
    return E.Sequential([
        E.RandomTimeWrap(wrap_limit=POOL["warp"], p=p),
        TimeCropResize(POOL["crop"], p=p),
        BandPassFilter(POOL["band"], rate, p=p),
        E.GaussNoise(variance=POOL["noise"], p=p),
        E.AmplitudeScale(scaling_range=(-POOL["scale"], POOL["scale"]), p=p)])


def augment(x, transforms, rng):
    """Two random passes of one record: (T, C) float32 array  ->  (2, T, C) float32 array."""
    np.random.seed(rng.integers(2 ** 32, size=4))  # the global one, which ecgmentations draws from
    return np.stack([transforms(ecg=x)["ecg"] for _ in range(2)]).astype(np.float32)


@dataclass
class ViewConfig:
    """The view strategy and what training does to its views."""

    view: str = setting("noncontig", f"view strategy, or its alias: {list_views()}")
    mask_leads: bool = setting(None, "random lead masking of each view; by default as the view "
                               "has it: off for stochastic alone, as in the paper")
    mask_p: float = setting(0.5, "probability that a lead of a view is masked",
                            type=bounded(float, 0, .95))
    augment_p: float = setting(None, "probability of each transform of the pool (POOL in views.py);"
                               " by default 0.5 for stochastic, else 0", type=bounded(float, 0, 1))
    disturb: bool = setting(False, "random windows of each view, at another speed, with gains, "
                            "wander and noise; strengths: DISTURB in views.py")
    equal: bool = setting(False, "views are 5 s at half the cache's rate whatever the strategy, "
                          "and evaluation sees both halves of a record")
    shift: bool = setting(False, "each view starts at a random time of its own, around the end: "
                          "interleaved views then no longer share the times of their beats")

    def __post_init__(self):
        self.view = resolve_view(self.view)
        view = VIEWS[self.view]
        if self.mask_leads is None:
            self.mask_leads = view.masked
        if self.augment_p is None:
            self.augment_p = 0.5 if view.pool else 0.0
        if not self.mask_leads and self.mask_p != ViewConfig.mask_p:
            raise InputError(f"--mask-p {self.mask_p} does nothing: give --mask-leads too")
        if self.equal:
            duration, samples = view_duration(self.view)
            if duration < 0.5 or duration / samples not in (1, 2):
                raise InputError(f"--equal needs views of {SECONDS / 2:g} s or more, at the whole "
                                 f"rate or half of it; leave it out for {self.view}")

    def describe(self):
        """The strategy in words, for the start of a run."""
        p = self.mask_p if self.mask_leads else 0
        switches = [name for name in ("disturb", "equal", "shift") if getattr(self, name)]
        return ", ".join([f"{self.view}: {VIEWS[self.view].words}; leads masked with p = {p:g}",
                          f"pool with p = {self.augment_p:g}", *switches])

    def split(self, x):
        """Views as evaluation sees them: x (B, T, C) -> one (B, T, C), or two as (B, T // 2, C)."""
        if self.equal:  # what every strategy's encoder can be asked
            return tuple(half[:, ::2] for half in contig(x))
        return VIEWS[self.view].cut(x)

    def timing(self):
        """Of one view, as shares of the record's: (its duration, its number of samples)."""
        return (0.5, 0.25) if self.equal else view_duration(self.view)

    def samples(self, T):
        """Samples of a training view of a record of T samples."""
        n = round(self.timing()[1] * T)
        return round(DISTURB["window"] * n) if self.disturb else n


if __name__ == "__main__":
    for name, view in VIEWS.items():
        print(f"{name:12} {view.alias:12} {view.rate} Hz  {view.words}")
