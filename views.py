"""Two views of each ECG record: the three strategies of the paper, and random lead masking.

In:  x (B, T, C) float32, z-scored (data.normalize), T = 10 s.
Out: x1, x2 with the same number of records; full length, half as many samples, or windows of
     them, which may be disturbed (`disturb`).

    python views.py                                        # the table VIEWS
    python -c "import torch, views; print(views.split(torch.arange(6.).view(1, 6, 1), 'noncontig'))"

A view of your own is a function and an entry in VIEWS.
"""
import math
from dataclasses import dataclass
from typing import Callable, Optional

import ecgmentations as E
import numpy as np
import torch
from scipy.interpolate import CubicSpline
from scipy.signal import butter, sosfiltfilt

from data import InputError, bounded, setting

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
    """A strategy, as training, evaluation, figures, tables and the Makefile know it.

    cut: x (B, T, C) -> two views, or one that is taken twice, of evenly spaced samples; the same
    each time; words: what the two are; color: in all figures; alias: another name; rate: Hz of the
    paper's runs; pool: augmentations by default; masked: lead masking by default; table2, table3:
    the paper's numbers (silhouette, Davies-Bouldin, Calinski-Harabasz, the best of a run; F1 of the
    CLASSES, accuracy, macro F1).
    """

    cut: Callable
    words: str
    color: str
    alias: str = ""
    rate: int = 500
    pool: bool = False
    masked: bool = True
    table2: Optional[tuple] = None
    table3: Optional[tuple] = None


# The Makefile reads names (lower case), aliases and rates on the first line of each entry.
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
    return ", ".join(key + f" (or {view.alias})" * bool(view.alias) for key, view in VIEWS.items())


def resolve_view(name):
    """The canonical name of a view; raise InputError that lists names and aliases."""
    for key, view in VIEWS.items():
        if name and name in (key, view.alias):
            return key
    raise InputError(f"unknown VIEW {name!r}; choose one of {list_views()}")


def split(x, view, equal=False):
    """The unmasked, unaugmented views of a record, as evaluation sees them.

    x: (B, T, C)  ->  one tensor (B, T, C) or two such as (B, T // 2, C). equal: every view's
    encoder sees the same two, the record's halves, every second sample of them.
    """
    if equal:
        return tuple(half[:, ::2] for half in contig(x))
    return VIEWS[view].cut(x)


def lasts(view):
    """(seconds that a view spans, samples of it) as shares of the record's."""
    at = split(torch.arange(1000.)[None, :, None], view)[0][0, :, 0]
    return len(at) * float(at[1] - at[0]) / 1000, len(at) / 1000


def equal_pair(x, view, starts):
    """Two views of 5 s at half the record's rate, whatever the strategy: x (B, T, C) -> two
    (B, T // 4, C).

    Where a view spans more than 5 s, of what begins at `starts` (B,) and is as much shorter; where
    its samples are not apart already, every second of them.
    """
    T, (seconds, samples) = x.shape[1], lasts(view)
    if seconds > 0.5:
        x = shift(x, starts)[:, :round(T / 2 / seconds)]
    pair = VIEWS[view].cut(x)
    return [part[:, ::2 if seconds == samples else 1][:, :T // 4] for part in pair]


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


def disturb(x, config, rng):
    """Windows of views at random places, played faster or slower, with what recordings suffer from.

    In this order, each of a strength of its own in the ViewConfig: window, speed, lead_gain, wander
    (a slow wave in each lead), max_noise, time_out. All of it in one batch, on x's device. A window
    starts between samples and is read by linear interpolation, which softens its steepest parts.
    x: (B, T, C), rng: a torch.Generator there  ->  (B, round(window T), C)
    """
    B, T, C = x.shape

    def uniform(*shape):
        return torch.rand(shape, generator=rng, device=x.device)

    def normal(*shape):
        return torch.randn(shape, generator=rng, device=x.device)

    W = round(config.window * T)
    t = torch.linspace(0, 1, W, device=x.device)[:, None]  # (W, 1)
    span = ((W - 1) * (1 + config.speed * (2 * uniform(B, 1, 1) - 1))).clamp(max=T - 1)
    at = uniform(B, 1, 1) * (T - 1 - span) + span * t  # (B, W, 1), where each sample lies in x
    left = at.long().clamp(max=T - 2)
    here, after = (x.gather(1, i.expand(B, W, C)) for i in (left, left + 1))
    x = torch.lerp(here, after, at - left)
    x = x * (config.lead_gain * normal(B, 1, C)).exp()
    waves = 1.2 * uniform(B, 1, 1) * t + uniform(B, 1, C)  # up to 1.2 of them in a window
    x = x + config.wander * normal(B, 1, C) * torch.sin(2 * math.pi * waves)
    x = x + config.max_noise * uniform(B, 1, 1) * normal(B, W, C)
    lost = config.time_out * uniform(B, 1, 1)
    start = uniform(B, 1, 1) * (1 - lost)
    return x * ((t < start) | (t >= start + lost))


# The pool of augmentations: numpy, one record at a time, in the workers of a DataLoader.

class BandPassFilter(E.EcgOnlyAugmentation):
    """Band-pass along time, zero-phase, on (T, C) arrays; composes with ecgmentations' transforms.

    band: (low, high) in Hz; rate: Hz
    """

    def __init__(self, band, rate, always_apply=False, p=0.5):
        super().__init__(always_apply, p)
        # deviation: ecgmentations 0.0.9 filters across the leads (lfilter without axis), causally,
        # and assumes 500 Hz; --shipped-filter brings that back to measure what it costs
        self.sos = butter(3, band, "bandpass", fs=rate, output="sos")

    def apply(self, ecg, **params):
        return sosfiltfilt(self.sos, ecg, axis=0).astype(ecg.dtype)

    def get_transform_init_args_names(self):
        return ("sos",)


class TimeWrap(E.RandomTimeWrap):
    """The library's time warp on all leads at once: the same numbers, several times as fast."""

    def apply(self, ecg, cells, ncells, **params):
        T = len(ecg)
        old, new = (T * cells).astype(int), (T * ncells).astype(int)
        at = np.concatenate([np.linspace(a, b - 1, d - c) for a, b, c, d in zip(
            old, old[1:], new, new[1:])])  # where each new sample lies in the old
        left = at.astype(int).clip(max=T - 2)
        share = (at - left)[:, None].astype(ecg.dtype)
        return ecg[left] * (1 - share) + ecg[left + 1] * share


class TimeCropResize(E.EcgOnlyAugmentation):
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

    def get_transform_init_args_names(self):
        return ("keep",)


DISTURBANCES = "windows", "window", "speed", "lead_gain", "wander", "max_noise", "time_out"
POOL = "warp", "crop", "band_low", "band_high", "noise", "scale", "shipped_filter"


@dataclass
class ViewConfig:
    """The view strategy and its strengths. Defaults of the pool are ecgmentations' own."""

    view: str = setting("noncontig", f"view strategy, or its alias: {list_views()}")
    mask_leads: bool = setting(None, "random lead masking of each view; by default as the view "
                               "has it: off for stochastic alone, as in the paper")
    mask_p: float = setting(0.5, "probability that a lead of a view is masked",
                            type=bounded(float, 0, .95))
    equal: bool = setting(False, "views are 5 s at half the cache's rate whatever the strategy; "
                          "encoders are evaluated on the same input, both halves of a record")
    shift: bool = setting(False, "each view starts at a random time of its own, around the end: "
                          "interleaved views then no longer share the times of their beats")
    windows: int = setting(1, "windows that are cut out of each view, all of a record pairs of "
                           "another: a step costs as many times as much", type=bounded(int, 1, 16))
    window: float = setting(1.0, "share of each view that is seen, at a random place",
                            type=bounded(float, .05, 1))
    speed: float = setting(0.0, "each view is played faster or slower by up to this share",
                           type=bounded(float, 0, .9))
    lead_gain: float = setting(0.0, "gains of the leads: standard deviation of their logarithm",
                               type=bounded(float, 0, 3))
    wander: float = setting(0.0, "slow waves in the leads: standard deviation of their amplitude",
                            type=bounded(float, 0))
    max_noise: float = setting(0.0, "white noise of up to this standard deviation",
                               type=bounded(float, 0))
    time_out: float = setting(0.0, "up to this share of a view becomes zeros",
                              type=bounded(float, 0, .95))
    augment_p: float = setting(None, "probability of each transform of the pool, which the record "
                               "passes once for each view; by default 0.5 for stochastic, else 0",
                               type=bounded(float, 0, 1))
    warp: float = setting(0.05, "pool: time warp; the library's 0.05 moves its knots by at most "
                          "0.4 %% of the record, 1.0 by 8 %%", type=bounded(float, 0, 1))
    crop: float = setting(0.8, "pool: smallest share of the record that a crop keeps",
                          type=bounded(float, .1, 1))
    band_low: float = setting(0.5, "pool: lower edge of the band-pass, Hz")
    band_high: float = setting(47.0, "pool: upper edge of the band-pass, Hz")
    noise: float = setting(0.01, "pool: variance of the Gaussian noise; signals have 1",
                           type=bounded(float, 0))
    scale: float = setting(0.05, "pool: amplitude is scaled by 1 +- this",
                           type=bounded(float, 0, .99))
    shipped_filter: bool = setting(False, "pool: ecgmentations' own band-pass, which filters "
                                   "across the leads")

    def __post_init__(self):
        self.view = resolve_view(self.view)
        view = VIEWS[self.view]
        if not callable(view.cut):
            raise InputError(f"the entry of {self.view} in VIEWS has no function that cuts a "
                             "record; give it one: x (B, T, C) -> two views, or one")
        if self.mask_leads is None:
            self.mask_leads = view.masked
        if self.augment_p is None:
            self.augment_p = 0.5 if view.pool else 0.0
        if self.window * (1 + self.speed) > 1:
            raise InputError(f"--window {self.window} --speed {self.speed}: a window would not fit "
                             "into its view; window x (1 + speed) may be 1 at most")
        if self.windows > 1 and self.window == 1:
            raise InputError(f"--windows {self.windows} of whole views are the same: give a "
                             "--window below 1")
        if self.equal:
            seconds, samples = lasts(self.view)
            if seconds < 0.5 or seconds / samples not in (1, 2):
                raise InputError(f"--equal: views of {self.view} span {10 * seconds:g} s, at "
                                 f"{samples / seconds:g} of the rate; it is for 5 s or more, at "
                                 "the whole rate or half of it")
        for names, used, flag in ((POOL, self.augment_p, "--augment-p 0.5"),
                                  (("mask_p",), self.mask_leads, "--mask-leads")):
            for name in names:
                if not used and (value := getattr(self, name)) != getattr(ViewConfig, name):
                    raise InputError(f"--{name.replace('_', '-')} {value} does nothing for this "
                                     f"{self.view} view: leave it out, or give {flag}")

    @property
    def disturbances(self):
        """What `disturb` has to do: its settings, but for those that change nothing."""
        return {name: getattr(self, name) for name in DISTURBANCES
                if getattr(self, name) != getattr(ViewConfig, name)}

    def describe(self):
        """The strategy in words, for the start of a run."""
        masked = f"masked with p = {self.mask_p}" if self.mask_leads else "kept"
        parts = [f"{self.view}: {VIEWS[self.view].words}; each lead {masked}",
                 f"pool with p = {self.augment_p}" * bool(self.augment_p),
                 "equal: 5 s at half the rate" * self.equal, "shifted" * self.shift]
        parts += [f"{name.replace('_', ' ')} {value:g}"
                  for name, value in self.disturbances.items()]
        return ", ".join(filter(None, parts))

    def split(self, x):
        """split() as this strategy is evaluated."""
        return split(x, self.view, self.equal)

    def timing(self):
        """(seconds that a view spans, samples of it) as shares of the record's."""
        return (0.5, 0.25) if self.equal else lasts(self.view)


def pool(config, rate):
    """The transforms in sequence, each with p = augment_p (paper 4.2.1).

    Call it as transforms(ecg=x)["ecg"] with x (T, C) float32; it draws from numpy's global state.
    """
    if not 0 < config.band_low < config.band_high < rate / 2:
        raise InputError(f"--band-low {config.band_low} --band-high {config.band_high}: must rise "
                         f"and stay between 0 and {rate / 2} Hz at {rate} Hz")
    p = config.augment_p
    band = BandPassFilter((config.band_low, config.band_high), rate, p=p)
    if config.shipped_filter:
        band = E.BandPassFilter(p=p)  # untouched: its 500 Hz, its axis
    return E.Sequential([
        TimeWrap(wrap_limit=config.warp, p=p), TimeCropResize(config.crop, p=p), band,
        E.GaussNoise(variance=config.noise, p=p),
        E.AmplitudeScale(scaling_range=(-config.scale, config.scale), p=p)])


def augment(x, transforms, rng):
    """Two random passes of one record: (T, C) float32 array  ->  (2, T, C) float32 array."""
    before = np.random.get_state()  # NumPy's global one, which ecgmentations draws from
    np.random.seed(rng.integers(2 ** 32, size=4))
    try:
        return np.stack([transforms(ecg=x)["ecg"] for _ in range(2)]).astype(np.float32)
    finally:
        np.random.set_state(before)


if __name__ == "__main__":
    for name, view in VIEWS.items():
        print(f"{name:12} {view.alias:12} {view.rate} Hz  {view.words}")
