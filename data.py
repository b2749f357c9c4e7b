"""12-lead ECGs in, one int16 array out: download, check, read, cache, describe, synthesise.

In:  a folder in PTB-XL's layout (ptbxl_database.csv, scp_statements.csv, records100/, records500/),
     or other collections: see open_source(); single recordings in any form: see read_recording().
Out: a cache folder: signals.int16 (records, T, C) microvolt, raw little-endian; index.csv, a row a
     record (ecg_id, patient_id, strat_fold, age, sex, NORM MI STTC CD HYP; of other collections
     source and record too); meta.json.

    python data.py download --data data/ptbxl --rate 500
    python data.py cache --data data/ptbxl --rate 500 --out cache/ptbxl-500
    python data.py synth --out data/synth --records 200 && python data.py info --data data/synth
"""
import argparse
import ast
import hashlib
import json
import math
import os
import re
import shutil
import signal as signals
import sys
import threading
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, fields
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import numpy as np
import torch
from scipy.signal import butter, resample_poly, sosfilt
from scipy.spatial.transform import Rotation
from tqdm import tqdm

LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
CLASSES = ("NORM", "MI", "STTC", "CD", "HYP")  # diagnostic superclasses, in PTB-XL's order
COLUMNS = "patient_id", "strat_fold", "age", "sex", *CLASSES  # of index.csv, after ecg_id
RATES = {100: "filename_lr", 500: "filename_hr"}  # Hz -> column that names the record
SECONDS = 10
FLAT_UV = 1.0  # a lead whose standard deviation is below one step of the recorder is flat
TRAIN_FOLDS, VAL_FOLD, TEST_FOLD = range(1, 9), 9, 10  # PTB-XL's recommended split
URL = "https://physionet.org/files/ptb-xl/1.0.3/"
TABLES = ("ptbxl_database.csv", "scp_statements.csv")
SYNTHETIC = "SYNTHETIC.txt"  # its presence marks a folder whose records are not from patients
FORMAT = 1  # raise it when the cache's layout changes: older caches are then rebuilt
EINTHOVEN_UV = 5  # limb leads of PTB-XL agree within 0.5 (median), exchanged ones never within 8
TRIES = 4  # downloads of one file before it counts as failed
BACKOFF_S = 0.5
TIMEOUT_S, MAX_WAIT_S = 30, 60  # without a byte; of the wait that a busy server asks for


class InputError(ValueError):
    """What a user can get wrong; the message says what was given, what is valid, what to do."""


def run_script(main):
    """Call main(); errors of the user and Ctrl-C end in one line, not in a traceback."""
    try:
        main()
    except (InputError, FloatingPointError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")


# Flags: those of a dataclass, whose fields hold default and help, and those that scripts share.

SHARED = dict(
    rate=dict(type=int, choices=RATES, default=500, help="Hz"),
    cache=dict(help="folder of: python data.py cache; by default the run's own"),
    device=dict(default="auto", help="auto, cpu, cuda, cuda:1, mps"),
    format=dict(choices=("png", "pdf"), default="png", help="of the figures"))


def setting(default, text, **more):
    """A dataclass field that is also a command-line flag."""
    return field(default=default, metadata=dict(help=text, **more))


def add_flags(parser, title, cls):
    """Add a flag for each field of a dataclass made of `setting`s."""
    group = parser.add_argument_group(title)
    for f in fields(cls):
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=f.type)
        group.add_argument("--" + f.name.replace("_", "-"), default=f.default,
                           **kind | dict(f.metadata))


def bounded(kind, low, high=math.inf):
    """The `type` of a flag that takes a number from low to high."""
    def parse(text):
        if not low <= kind(text) <= high or math.isinf(kind(text)):
            ends = f"at least {low}" if math.isinf(high) else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text}: give a number {ends}")
        return kind(text)

    parse.__name__ = kind.__name__  # argparse says it of what is no number
    return parse


def from_args(cls, args):
    """The dataclass, filled from a dict of arguments."""
    return cls(**{f.name: args[f.name] for f in fields(cls)})


def add_shared(parser, *names):
    """Add flags of SHARED."""
    for name in names:
        parser.add_argument(f"--{name}", **SHARED[name])


# Normalisation: the one place, for training, evaluation and figures alike.

NORMALISATION = (f"each lead of each {SECONDS} s: mean 0, standard deviation 1; zeros where that "
                 f"is under {FLAT_UV:g} microvolt")  # as an export says it


def normalize(signals):
    """Z-score each lead of each record over time (paper 4.2); a flat lead becomes zeros.

    signals: (..., T, C) int16 microvolt  ->  (..., T, C) float32, mean 0 and deviation 1
    """
    x = signals.to(torch.float32, copy=True)  # then in place: fresh memory is what costs
    x -= x.mean(-2, keepdim=True)
    std = (x * x).mean(-2, keepdim=True).sqrt()
    x *= torch.where(std < FLAT_UV, 0.0, 1 / std.clamp(min=FLAT_UV))
    return x


# Files

@contextmanager
def writing(path):
    """Name the path in an error of writing to it, and say what to do."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save's of a full disk: [enforce fail at inline_container.cc:672], or iostream error
        if isinstance(error, RuntimeError) and not re.search("inline_con|iostream", str(error)):
            raise
        raise OSError(f"{path} cannot be written ({str(error)[:80]}), as on a full disk; what was "
                      "there is kept: make room, and give the same command again") from error


def write_atomic(path, write):
    """Call write(temporary path), then rename it to path: a kill leaves the old file or the new."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f"{path.name}.tmp-{os.getpid()}-{threading.get_ident()}")
    try:
        with writing(path):
            write(tmp)
            os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def sha256(*paths):
    """Hex digest of a file, or of several one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def read_arrays(path):
    """The arrays of an .npz file; an error of any kind if its bits are not what was written."""
    if part := zipfile.ZipFile(path).testzip():  # NumPy looks at checksums of what it reads alone
        raise ValueError(f"{part} has changed since it was written")
    with np.load(path) as arrays:
        return dict(arrays)


def goes_down(name):
    """Whether a path leads down from where it starts, as it is written: not absolute, without .."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and not (
        {"..", "\\", "\0"} & {*path.parts, *name})


def check_room(folder, size):
    """Raise InputError when the disk of folder has no room for so many bytes."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise InputError(f"{folder} has no room for {size / 1e6:,.1f} MB: {free / 1e6:,.1f} MB are "
                         "free; make room, or give another folder")


# Download

def fetch_file(session, url, path, digest=None, wait=time.sleep):
    """Download url to path, checked against its SHA-256; raise InputError when it cannot be had.

    wait: called with seconds between tries; a true answer ends them.
    """
    import requests  # here, as pandas, wfdb and h5py below: loading an encoder needs none of them
    from urllib3.exceptions import InvalidHeader
    from urllib3.util import Retry

    pause = 0
    for attempt in range(TRIES):
        if attempt and wait(max(pause, BACKOFF_S * 2 ** attempt)):
            break
        pause = 0
        try:
            answer = session.get(url, timeout=TIMEOUT_S)
        except requests.RequestException as error:  # refused, reset, timed out, cut short
            problem = str(error)
            continue
        if answer.status_code == 200:
            got = hashlib.sha256(answer.content).hexdigest()
            if digest in (None, got):
                return write_atomic(path, lambda tmp: tmp.write_bytes(answer.content))
            problem = f"its SHA-256 is {got}, SHA256SUMS.txt says {digest}"
        else:
            problem = f"HTTP {answer.status_code} {answer.reason}"
            with suppress(InvalidHeader, ValueError, OverflowError):  # seconds, or a date
                pause = min(MAX_WAIT_S, Retry().parse_retry_after(
                    answer.headers.get("Retry-After", "")))
            if answer.status_code < 500 and answer.status_code != 429:
                break  # asking again does not help
    raise InputError(f"{url}: {problem}")


def read_sums(path):
    """SHA256SUMS.txt as {file: digest}; raise InputError on a line of another form.

    A file outside the folder of SHA256SUMS.txt is refused: a server must not choose where to write.
    """
    home, sums, real = Path(path).parent.resolve(), {}, lru_cache(Path.resolve)
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.strip().partition(" ")
        name = name.strip().lstrip("*")
        if not (re.fullmatch("[0-9a-f]{64}", digest) and goes_down(name)
                and real((home / name).parent).is_relative_to(home)):
            raise InputError(f"{path}: {line[:80]!r} is not 'digest file' of a file within its "
                             "folder, links followed; is the address right, or a folder a link?")
        sums[name] = digest
    return sums


def download(folder, rate, url=URL, workers=8):
    """Fetch what `rate` needs of PTB-XL into folder; files that are there and whole are kept.

    Raises InputError when files cannot be had, OSError of a full disk; run again to go on.
    """
    import requests

    folder, url, local = Path(folder), url.rstrip("/") + "/", threading.local()
    fetch_file(requests.Session(), url + "SHA256SUMS.txt", folder / "SHA256SUMS.txt")
    sums = read_sums(folder / "SHA256SUMS.txt")
    if not set(TABLES) <= set(sums):
        raise InputError(f"{url} does not list {' and '.join(TABLES)}: not a PTB-XL folder")
    wanted = [name for name in sums
              if name in (*TABLES, "LICENSE.txt", SYNTHETIC) or name.startswith(f"records{rate}/")]
    new = [name for name in wanted if not (folder / name).exists()]
    # SHA256SUMS.txt has no sizes: a data file is known from the rate, a header takes a disk block
    size = sum(cache_bytes(1, rate) if name.endswith(".dat") else 4096 for name in new)
    print(f"{url}: {len(wanted)} files, {len(new)} to come, {size / 1e6:,.1f} MB: at 5 MB/s some "
          f"{math.ceil(size / 5e6 / 60)} min", flush=True)
    check_room(folder, size)

    def ensure(name):
        if not ((folder / name).exists() and sha256(folder / name) == sums[name]):
            local.session = getattr(local, "session", None) or requests.Session()  # keeps alive
            fetch_file(local.session, url + name, folder / name, sums[name], stop.wait)

    pool, failed, stop = ThreadPoolExecutor(workers), [], threading.Event()
    try:
        jobs = [pool.submit(ensure, name) for name in wanted]
        for job in tqdm(as_completed(jobs), "download", len(jobs), unit="file", disable=None):
            try:
                job.result()
            except InputError as error:  # another error is of the disk, and ends it
                failed.append(str(error))
            if len(failed) >= 20:
                break  # the server is gone, or is the wrong one
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
    if failed:
        raise InputError(f"{len(failed)} files could not be downloaded; the rest is kept, run the "
                         "same command again to go on:\n  " + "\n  ".join(failed[:5]))
    (folder / f".complete-{rate}").touch()
    print(f"{folder}: {len(wanted)} files at {rate} Hz, all checksums right")


# Tables and records

def parse_codes(text):
    """The dict {SCP code: likelihood} in a cell of scp_codes; None if it is none."""
    with suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        codes = ast.literal_eval(text)
        if isinstance(codes, dict) and all(isinstance(code, str) for code in codes):
            return codes


def load_tables(folder):
    """The record table of a PTB-XL folder, with one 0/1 column for each superclass.

    A record has a superclass when any of its SCP codes has it (Table 1 of the paper counts so).
    Raises InputError for a missing table or column and for cells that cannot be.
    """
    import pandas as pd

    folder = Path(folder)
    try:
        table = pd.read_csv(folder / TABLES[0])
        statements = pd.read_csv(folder / TABLES[1], index_col=0)
    except (OSError, ValueError) as error:
        raise InputError(f"no tables of PTB-XL in {folder} ({error}): give a folder in its layout "
                         f"with --data, or get it: python data.py download --data {folder} "
                         "--rate 100|500") from error
    lacking = {"ecg_id", "patient_id", "strat_fold", "age", "sex", "scp_codes",
               *RATES.values()} - set(table) | {"diagnostic", "diagnostic_class"} - set(statements)
    if lacking or table.empty:
        raise InputError(f"the tables in {folder} lack {', '.join(sorted(lacking)) or 'records'}")

    refuse = partial(refuse_cells, folder / TABLES[0])
    for column in ("ecg_id", "patient_id"):
        number = pd.to_numeric(table[column], errors="coerce").astype(float)
        refuse(table[column], ~((number.abs() < 1e15) & (number % 1 == 0)), "an integer")
        table[column] = number.astype(int)
    refuse(table.ecg_id, table.ecg_id.duplicated(keep=False), "each once")
    for column in RATES.values():
        names = table[column] = table[column].fillna("").astype(str)
        refuse(names, ~names.map(goes_down), f"a path within {folder}")
        # else the check of patients could be passed by while test records are trained on
        refuse(names, names.map(os.path.normpath).duplicated(keep=False),
               "another record in each row")
    codes = table.scp_codes.map(parse_codes)
    refuse(table.scp_codes, codes.isna(), "a dict such as {'NORM': 100.0}")
    check_people(folder / TABLES[0], table)
    explained = statements.index.to_series(name="code")
    refuse_cells(folder / TABLES[1], explained, explained.duplicated(keep=False), "each once")
    # coerced: one cell that is no number would make text of all, and lose every label
    is_diagnostic = pd.to_numeric(statements.diagnostic, errors="coerce") == 1
    superclass = statements[is_diagnostic].diagnostic_class.to_dict()
    for name in CLASSES:
        table[name] = codes.map(lambda c: int(any(superclass.get(code) == name for code in c)))
    return table


def refuse_cells(path, column, bad, valid):
    """Raise InputError where cells of a table's column are bad: the first, and their lines."""
    if bad.any():
        cells = ", ".join(map(repr, column[bad].astype(str).str[:40][:5]))
        lines = ", ".join(str(i + 2) for i in np.flatnonzero(bad)[:5])
        raise InputError(f"{path} is damaged ({column.name} is {cells} in {bad.sum()} rows, lines "
                         f"{lines}; needs {valid}); mend it, or get it again")


def check_people(path, table):
    """Raise InputError for folds, patients, ages or sexes that cannot be; make folds integers."""
    import pandas as pd

    fold, patient = pd.to_numeric(table.strat_fold, errors="coerce"), table.patient_id.astype(str)
    refuse_cells(path, table.strat_fold, ~fold.isin(range(1, 11)), "an integer from 1 to 10")
    table["strat_fold"] = fold.astype(int)
    refuse_cells(path, table.patient_id, table.groupby(patient).strat_fold.transform("nunique") > 1,
                 "a patient in one fold alone: test records would be seen in training")
    for column, valid in (table.age, "a number"), (table.sex, "0 for male, 1 for female"):
        unclear = pd.to_numeric(column, errors="coerce").isna() & column.notna()
        refuse_cells(path, column, unclear, f"{valid}, or nothing where it is not known")


@lru_cache
def our_wfdb():
    """The module wfdb, which then reads headers faster, and also those with an impossible date."""
    import wfdb
    from wfdb.io import _header

    # For a header of 12 leads it looks up some 230 cells of a DataFrame: 2 of 2.6 ms a record.
    table = _header.SIGNAL_SPECS
    cells = {(row, column): table.at[row, column] for row in table.index for column in table}
    _header.SIGNAL_SPECS = quick = SimpleNamespace(index=table.index, loc=cells)
    quick.copy = lambda: quick
    parse = _header._parse_record_line

    def parse_record_line(line):
        try:
            return parse(line)
        except ValueError:  # once more without time and date, as in the Challenges' records
            return parse(" ".join(line.split()[:4]))

    _header._parse_record_line = parse_record_line
    return wfdb


def open_wfdb(path):
    """The wfdb.Record of a header, with d_signal; raises whatever wfdb meets in a broken file.

    A header that tells of more samples than its files can hold would cost memory, and is refused.
    """
    lines = [line for line in path.read_text(errors="replace").splitlines()
             if line.strip() and not line.startswith("#")]
    _, leads, *rest = lines[0].split()
    names = {line.split()[0] for line in lines[1:]}
    size = sum((path.parent / name).stat().st_size for name in names)
    if rest[1:] and int(leads) * int(rest[1]) > size:  # a byte a sample is the least
        raise ValueError(f"{leads} leads of {rest[1]} samples in {size} bytes")
    return our_wfdb().rdrecord(str(path.with_suffix("")), physical=False)


def read_record(path, rate):
    """One WFDB record as (T, C) int16 microvolt, leads in the order of LEADS, found by name.

    Raises InputError for what makes it unusable; a flat lead is usable (see normalize).
    """
    path = Path(path)
    header, T, C = path.with_suffix(".hea"), SECONDS * rate, len(LEADS)

    def need(good, problem):
        if not good:
            raise InputError(f"{path.name}: {problem}")

    try:
        record = our_wfdb().rdheader(str(path))  # first: samples are read only if there is room
        names = [(name or "?").strip().upper() for name in record.sig_name or ()]
        need(sorted(names) == sorted(lead.upper() for lead in LEADS) and record.n_sig == C,
             f"{record.n_sig} leads {' '.join(names)[:200]}; needs {' '.join(LEADS)}")
        need(record.fs == rate and record.sig_len == T,
             f"{record.sig_len} samples at {record.fs:g} Hz; needs {T} at {rate} Hz")
        need(set(record.units) == {"mV"},
             f"units {' '.join(sorted(set(record.units)))}; needs mV")
        # wfdb reads a gain of 0 (unknown) as 200: hence the text
        zero = re.search(r"^[^#\s]\S*\s+\S+\s+[-+]?[0.]+([(/e\s]|$)",
                         header.read_text(errors="replace"), re.M)
        need(all(1 <= gain <= 1e6 for gain in record.adc_gain) and not zero,
             f"gains {'0' if zero else sorted(set(record.adc_gain))}; needs 1 to 1e6 per mV")
        file = header.with_suffix(".dat")
        need(set(record.file_name) == {file.name},
             f"samples in {' '.join(sorted(set(record.file_name)))[:200]}; needs {file.name}")
        need(set(record.fmt) != {"16"} or file.stat().st_size == 2 * T * C,
             f"the header tells of {2 * T * C} bytes, the file has {file.stat().st_size}")
        record = our_wfdb().rdrecord(str(path), physical=False)
        sums, said = record.d_signal.sum(0), record.checksum
        need(None in said or not ((sums - said) % 65536).any(),
             "the samples do not add up to the header's checksum")
        signal = record.dac() * 1000  # microvolt; WFDB's invalid samples become NaN here
        need((np.abs(signal) <= np.iinfo(np.int16).max).all(),
             f"{int(np.isnan(signal).any(1).sum())} time points hold an invalid sample, or a value "
             "exceeds 32.767 mV")
    except InputError:
        raise
    except Exception as error:  # wfdb raises whatever its parser meets in a broken file
        raise InputError(f"{path.name}: unreadable, header and data may disagree: "
                         f"{type(error).__name__} {error}") from error
    order = [names.index(lead.upper()) for lead in LEADS]
    return np.rint(signal[:, order]).astype("<i2", order="C")


def all_leads(x):
    """I, II and V1 to V6 (..., 8) -> LEADS (..., 12), by Einthoven's and Goldberger's equations.

    Of I and II alone (..., 2) it makes the six limb leads.
    """
    x = np.asarray(x, float)
    I, II = x[..., 0], x[..., 1]
    limb = np.stack([I, II, II - I, -(I + II) / 2, I - II / 2, II - I / 2], axis=-1)
    return np.concatenate([limb, x[..., 2:]], axis=-1)


def limb_leads_agree(signal):
    """Whether III, aVR, aVL and aVF follow from I and II most of the time.

    They do not where leads were exchanged, or scaled one by one.
    """
    if not signal[:, :6].any(0).all():  # some are not there
        return True
    off = np.abs(signal[:, :6] - all_leads(signal[:, :2]))
    return (off.max(1) <= EINTHOVEN_UV).mean() > .5  # most: a spike in one lead is no exchange


# Recordings from anywhere

UNITS = {"v": 1e6, "mv": 1e3, "uv": 1.0, "µv": 1.0, "μv": 1.0}  # microvolt; micro has two signs
ARRAYS = ".npy", ".npz", ".h5", ".hdf5"  # ends of files that may hold several recordings
ENDS = ".hea", ".edf", ".csv", *ARRAYS
KEYS = {"rate": ("rate", "fs", "sampling_rate"), "unit": ("unit", "units"),
        "leads": ("leads", "lead_names", "sig_name"), "ids": ("ids", "ecg_id", "exam_id")}
PLAUSIBLE_MV = 0.3, 5  # range of a lead, median over a record's; of 488 real ones 0.57 to 4.5
USUAL_MV = 0.6, 3  # the same, median over a collection; of those 1.3


@dataclass
class Recording:
    """A recording as a file has it: signal (T, n) at `rate` Hz; unit: one name, or one a lead."""

    name: str
    signal: np.ndarray
    rate: float
    unit: list
    leads: list


def list_recordings(paths):
    """[(file, row)] of all recordings in files and folders; row: in a file of several, else None.

    Raises InputError when there is none.
    """
    found = []
    for path in map(Path, paths):
        if not path.exists() and path.with_name(path.name + ".hea").exists():
            path = path.with_name(path.name + ".hea")  # as WFDB names a record
        if path.is_dir():
            files = sorted(file for file in path.rglob("*")
                           if file.suffix.lower() in ENDS and not is_about(file))
        else:
            file = path.with_suffix(".hea") if path.suffix in (".dat", ".mat") else path
            files = [file] if file.suffix.lower() in ENDS and file.exists() else []
        if not files:
            raise InputError(f"{path} holds no recording: give files, or folders of files, that end"
                             f" in {' '.join(ENDS)} (a .mat file needs its .hea)")
        for file in files:
            shape = ()
            if file.suffix.lower() in ARRAYS:
                with suppress(Exception):  # it is said when the file is read
                    shape = open_arrays(file)["signal"].shape
            found += [(file, i) for i in range(shape[0])] if len(shape) == 3 else [(file, None)]
    return found


def is_about(path):
    """Whether a CSV file is about recordings, and none itself: words at its head, but no lead."""
    if path.suffix.lower() != ".csv":
        return False
    with open(path, errors="replace") as file:
        head = [cell.strip(' "') for cell in file.readline().strip().split(",")]
    return any(re.search("[A-Za-z]{3}", cell) for cell in head) and not any(map(lead_name, head))


@lru_cache(maxsize=2)  # of a large file many recordings are read, one after another
def open_arrays(path):
    """What a .npy, .npz or HDF5 file holds: signal, an array on disk where it can be, and KEYS."""
    kind = path.suffix.lower()
    if kind == ".npy":
        arrays = dict(signal=np.load(path, mmap_mode="r"))
    elif kind == ".npz":
        arrays = read_arrays(path)
    else:
        import h5py

        file = h5py.File(path)  # stays open: its arrays are read when they are asked for
        arrays = dict(file.attrs) | {k: v for k, v in file.items() if hasattr(v, "shape")}
        for of_array in [dict(v.attrs) for v in arrays.values() if hasattr(v, "attrs")]:
            arrays |= of_array
    signals = [k for k, v in arrays.items() if len(getattr(v, "shape", ())) in (2, 3)]
    if len(signals) != 1:
        raise ValueError(f"{len(signals)} arrays with two or three axes {signals}; needs one: "
                         "(time, leads), or several of these")
    return dict(signal=arrays[signals[0]]) | {
        key: np.ravel(arrays[name]) for key, names in KEYS.items() for name in names
        if name in arrays}


def read_table(path):
    """A CSV file of a column a lead, and perhaps one of `time` in s: a dict like open_arrays()."""
    import pandas as pd

    table, told = pd.read_csv(path), {}
    if not any(map(lead_name, table)):  # without names
        return dict(signal=pd.read_csv(path, header=None).to_numpy())
    for name in [name for name in table if name.lower() == "time"]:
        step = np.median(np.diff(table.pop(name)))
        told["rate"] = [round(1 / step, 4)]
    return told | dict(signal=table.to_numpy(), leads=list(table))


def read_wfdb(path):
    """A record of a WFDB header or an EDF file, through wfdb: a dict like open_arrays()."""
    if path.suffix.lower() == ".edf":
        from wfdb.io.convert.edf import read_edf

        record = read_edf(str(path))
        signal = record.p_signal
    else:
        record = open_wfdb(path)
        signal = record.dac()
    leads = record.sig_name if any(record.sig_name) else []  # a lead without a name is None
    return dict(signal=signal, rate=[record.fs], leads=leads,
                unit=[unit or "?" for unit in record.units])


def read_recording(path, row=None, rate=None, unit=None, leads=None):
    """The Recording in a WFDB, EDF, .npy, .npz, CSV or HDF5 file; row: where it holds several.

    rate (Hz), unit (mV, uV or V) and leads (names, in the order of the columns) stand in for what
    the file does not tell. Raises InputError for what lacks or cannot be.
    """
    path = Path(path)
    name = path.stem if row is None else f"{path.stem}-{row}"
    read = {".hea": read_wfdb, ".edf": read_wfdb, ".csv": read_table}.get(
        path.suffix.lower(), open_arrays)
    try:
        told = read(path)
        signal, ids, rate = told["signal"], told.get("ids", ()), told.get("rate", [rate])[0]
        if row is not None:
            signal, name = signal[row], str(ids[row]) if len(ids) == len(signal) else name
        units, names = ([t.decode() if isinstance(t, bytes) else str(t) for t in told.get(key, ())]
                        for key in ("unit", "leads"))
        if unit and not any(text.lower() in UNITS for text in units):  # none, or none that we know
            units = [unit]
        if leads and not any(map(lead_name, names)):
            names = list(leads)
        asked = (["--source-rate 500"] * (rate is None) + ["--unit mV"] * (not units)
                 + ["--leads I II"] * (not names))
        if asked:
            raise InputError(f"{path.name} does not tell all; give such as {' '.join(asked)}")
        signal, rate = np.asarray(signal), float(rate)
    except InputError:
        raise
    except Exception as error:  # whatever a damaged file leads the libraries to
        problem = "it holds no plain arrays" if "pickle" in str(error) else str(error)[:200]
        raise InputError(f"{path.name}: unreadable: {problem}") from error
    if signal.ndim == 2 and signal.shape[1] != len(names) == signal.shape[0]:
        signal = signal.T
    return Recording(name, signal, rate, units, names)


def lead_name(text):
    """The lead of LEADS that a file calls "avr", "ECG V1", "Lead II" or the like; or None."""
    bare = re.sub(r"^(MDC_ECG_LEAD|ECG|EKG|LEAD)[ _:-]*|\s*[\[(].*$", "", text.strip().upper())
    return next((lead for lead in LEADS if lead.upper() == bare), None)


def in_leads(recording):
    """The signal of a Recording in the order of LEADS: (T, C) float64 microvolt; what lacks is 0.

    ->  that, (C,) bool: the leads that are there, and notes for the user. Raises InputError.
    """
    r, names, notes = recording, [lead_name(str(text)) for text in recording.leads], []
    if r.signal.ndim != 2 or r.signal.shape[1] != len(names) or r.signal.dtype.kind not in "iuf":
        raise InputError(f"{r.name}: an array {r.signal.shape} of {r.signal.dtype}, and "
                         f"{len(names)} leads; needs numbers (time, leads), in CSV between commas")
    here = {name: i for i, name in enumerate(names) if name}
    if len(here) < len(names) - names.count(None) or not here:
        raise InputError(f"{r.name}: leads {' '.join(r.leads)[:200]}; needs some of "
                         f"{' '.join(LEADS)}, each once")
    units = r.unit if len(r.unit) == len(names) else r.unit * len(names)
    if wrong := {units[i] for i in here.values() if units[i].lower() not in UNITS}:
        raise InputError(f"{r.name}: unit {' '.join(sorted(wrong))}; needs mV, uV or V (--unit)")
    x = np.zeros((len(r.signal), len(LEADS)))
    for name, i in here.items():
        x[:, LEADS.index(name)] = r.signal[:, i] * UNITS[units[i].lower()]
    seen = np.flatnonzero(np.nan_to_num(x).any(1))
    if len(seen) and (cut := len(x) - (seen[-1] + 1 - seen[0])) > 0.1 * r.rate:
        x = x[seen[0]:seen[-1] + 1]
        notes.append(f"{cut / r.rate:.1f} s of zeros or NaN at its ends are cut off")
    finite = (np.abs(x) < 1e15).all(0)  # squares of more leave float32
    x[:, ~finite] = 0
    if strange := [str(text) for text, name in zip(r.leads, names) if not name]:
        notes.append(f"{', '.join(strange)[:80]} not among the 12 leads: not used")
    named = np.array([lead in here for lead in LEADS])
    there = x.std(0) >= FLAT_UV  # what lacks, or is not finite, is zeros by now
    for why, at in (("not there", ~named), ("not finite", ~finite),
                    ("flat", named & finite & ~there)):
        if at.any():
            notes.append(f"{', '.join(np.array(LEADS)[at])} {why}: masked")
    if not there.any():
        raise InputError(f"{r.name}: no lead to look at: {'; '.join(notes)}; is the unit right?")
    size = np.median(np.ptp(x[:, there], axis=0)) / 1000
    if not PLAUSIBLE_MV[0] < size < PLAUSIBLE_MV[1]:
        notes.append(f"leads range over {size:.3g} mV, an ECG's over {PLAUSIBLE_MV[0]:g} to "
                     f"{PLAUSIBLE_MV[1]:g}: is the unit or the gain right?")
    return x * there, there, notes


def prepare(recording, rate, shortest=SECONDS):
    """A Recording as encoders see it, at their rate and with their leads, before normalize().

    Leads are found by name; those that lack, that hold a NaN, or that are flat become zeros, as
    masked ones are in training. Zeros or NaN of all leads at both ends are cut off, as padding.
    Another rate is reached by polyphase filtering. Cut into windows of 10 s side by side, of which
    the last ends with the recording; into windows of `shortest` s when it has no 10 s.
    ->  (W, T, C) float32 microvolt, (C,) bool: the leads that are there, notes for the user
    """
    name, old = recording.name, recording.rate
    if not 50 <= old <= 20000:
        raise InputError(f"{name}: a rate of {old} Hz; needs 50 to 20000")
    x, there, notes = in_leads(recording)
    if old != rate:
        ratio = Fraction(rate / old).limit_denominator(1000)
        x = resample_poly(x, ratio.numerator, ratio.denominator, axis=0, padtype="line")
        notes.append(f"resampled from {old:g} to {rate} Hz")
    length = round((SECONDS if len(x) >= SECONDS * rate else shortest) * rate)
    starts = list(range(0, len(x) - length + 1, length))
    if not starts:
        raise InputError(f"{name}: {len(x) / rate:g} s long; at least {shortest:g} s are needed")
    if starts[-1] + length < len(x):
        starts.append(len(x) - length)
    cut = [x[i:i + length] for i in starts]
    live = [part for part in cut if (part.std(0) >= FLAT_UV).any()]
    if len(live) < len(cut):
        notes.append(f"{len(cut) - len(live)} of {len(cut)} windows without a signal left out")
    return np.stack(live).astype(np.float32), there, notes


# Collections: PTB-XL's own layout, or recordings from anywhere with what is told about them

# SNOMED CT codes of the PhysioNet Challenges 2020 and 2021 (doi 10.1088/1361-6579/abc960 and
# 10.1088/1361-6579/ac79fd) by the superclass of the statements of PTB-XL that are nearest.
SNOMED = {
    "MI": "164865005 57054005 54329005 164867002",
    "STTC": "164861001 413444003 426434006 425419005 425623009 413844008 428750005 55930002 "
            "164930006 429622005 164931005 704997005 164934002 59931005 111975006",
    "CD": "270492004 195042002 54016002 28189009 426183003 27885002 233917008 164909002 733534002 "
          "251120003 59118001 713427006 713426002 6374002 445118002 445211001 698252002 82226007 "
          "74390002 195060002",
    "HYP": "164873001 89792004 266249003 370365005 446813000 446358003 195126007 "
           "67741000119109 67751000119106 253352002 253339007"}
SINUS = "426783006"  # alone it is what the Challenges made of PTB-XL's NORM


@dataclass
class Source:
    """A collection: a row a recording with the columns of index.csv, and what try_record() reads.

    items: a Path for a record of PTB-XL, else (file, row) of list_recordings(); digest: changes
    when its files do.
    """

    name: str
    path: Path
    table: object  # a DataFrame
    items: list
    digest: str


def header_facts(path):
    """Age, sex and superclasses that comments of a WFDB header tell, as the Challenges write them.

    A record has a superclass when any of its codes has it; NORM when sinus rhythm is all it has.
    """
    text = path.read_text(errors="replace") if path.suffix == ".hea" else ""
    told = {key.lower(): value.strip() for key, value in
            re.findall(r"^# *<?(Age|Sex|Dx)>?:(.*)$", text, re.M | re.I)}
    codes = set(re.findall(r"\d+", told.get("dx", "")))
    age = told.get("age", "")
    return dict(age=float(age) if age.isdecimal() else math.nan,
                sex={"m": 0, "f": 1}.get(told.get("sex", "")[:1].lower(), math.nan),
                NORM=int(codes == {SINUS}),
                **{name: int(bool(codes & set(SNOMED[name].split()))) for name in SNOMED})


def open_source(path, rate):
    """The Source in a folder in PTB-XL's layout, a folder of recordings, a table or a file of them.

    A table is a CSV file with a column `path`, from its folder on, and, as far as it tells them,
    patient_id (or subject_id), strat_fold, age, sex and 0 or 1 for each of the CLASSES. Without
    patients each recording is one; without folds a hash of the patient gives them. Raises
    InputError.
    """
    import pandas as pd

    path = Path(path)
    if not path.exists() or (path / TABLES[0]).exists():
        return open_ptbxl(path, rate)
    if path.suffix.lower() == ".csv":
        try:
            table = pd.read_csv(path).rename(columns=dict(subject_id="patient_id"))
        except ValueError as error:
            raise InputError(f"{path} is no table ({error}); mend it") from error
        if "path" not in table or table.empty:
            raise InputError(f"{path}: a table of recordings needs a column path (and, if known, "
                             f"{', '.join(COLUMNS)}); it has {len(table)} rows of "
                             f"{', '.join(table)[:200]}")
        if unused := ", ".join(sorted(set(table) - {"path", *COLUMNS})):
            print(f"note: {path}: columns that are not used: {unused}")
        items = list_recordings(path.parent / str(name) for name in table.path)
        if len(items) != len(table):
            raise InputError(f"{path}: some of its {len(table)} paths hold several recordings; "
                             "give such a file, or folder, as a source of its own")
    else:
        items = list_recordings([path])
        table = pd.DataFrame([header_facts(file) for file, _ in items])
    if "patient_id" not in table:
        print(f"note: {path}: no patients are told, so each recording counts as one; if some are "
              "of one patient, give a table (CSV with path and patient_id)")
    home = path if path.is_dir() else path.parent
    names = [os.path.relpath(file, home) + (f"#{row}" if row is not None else "")
             for file, row in items]
    table = pd.DataFrame(dict(record=names, patient_id=names, age=math.nan, sex=math.nan)
                         | dict.fromkeys(CLASSES, 0) | dict(table))
    if "strat_fold" not in table:  # the same for a patient wherever else it turns up
        table["strat_fold"] = [1 + int(hashlib.sha256(str(patient).encode()).hexdigest(), 16) % 10
                               for patient in table.patient_id]
    check_people(path, table)
    for name in CLASSES:
        refuse_cells(path, table[name], ~table[name].isin((0, 1)), "0 or 1")
    stems = {file.with_suffix("") for file, _ in items}
    files = [file for folder in sorted({stem.parent for stem in stems})
             for file in sorted(folder.iterdir()) if file.with_suffix("") in stems]  # .dat too
    return Source(path.stem, path, table, items, digest_of(f" {table.to_csv()}".encode(), files))


def open_ptbxl(folder, rate):
    """The Source in a folder in PTB-XL's layout; raises InputError when records are missing."""
    table = load_tables(folder)
    table["record"] = table[RATES[rate]]
    items = [folder / name for name in table.record]
    files = [item.with_suffix(end) for item in items for end in (".hea", ".dat")]
    missing = [file for file in files if not file.exists()]
    if missing:
        remedy = "make it again: python data.py synth" if (folder / SYNTHETIC).exists() else (
            f"complete it: python data.py download --data {folder} --rate {rate}")
        raise InputError(f"{len(missing)} of {len(files)} record files are missing in {folder} "
                         f"(first: {missing[0].name}); {remedy}")
    tables = b"".join((folder / name).read_bytes() for name in TABLES)
    return Source(folder.name, folder, table, items, digest_of(tables, files))


def digest_of(told, files):
    """Digest of bytes and of each file's name, size and time: another when they change."""
    digest = hashlib.sha256(f"format {FORMAT}".encode() + told)
    for file in files:
        stat = file.stat()
        digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()


def try_record(item, rate, reading):
    """(windows (W, T, C) int16 microvolt, None) of an item of a Source, or (None, what is wrong).

    reading: of recordings from anywhere, what read_recording() takes, and all_windows, without
    which the first one is taken. A worker that never raises.
    """
    try:
        if isinstance(item, Path):
            return read_record(item, rate)[None], None
        reading = dict(reading)
        count = None if reading.pop("all_windows", False) else 1
        recording = read_recording(*item, **reading)
        x = np.rint(prepare(recording, rate)[0][:count])
        if np.abs(x).max() > np.iinfo(np.int16).max:
            raise InputError(f"{recording.name}: a value exceeds 32.767 mV; is the unit right?")
        return x.astype("<i2"), None
    except InputError as error:
        return None, str(error)


# Cache

@dataclass
class Cache:
    """An open cache: signals (records, T, C) int16 microvolt, memory-mapped; index; meta.json."""

    folder: Path
    signals: np.ndarray
    index: object  # a DataFrame
    meta: dict
    copies: dict = field(default_factory=dict)  # device -> the signals as a tensor there

    def __reduce__(self):  # a spawned worker maps the file again, and gets no copy of it
        return open_cache, (self.folder,)

    def rows(self, folds):
        """Row numbers of the records in the given folds."""
        return np.flatnonzero(self.index.strat_fold.isin(folds))


def cache_bytes(records, rate):
    """Size of the array."""
    return 2 * records * SECONDS * rate * len(LEADS)


@contextmanager
def new_folder(out):
    """A temporary folder that takes the place of `out` when the block ends without an error."""
    out.parent.mkdir(parents=True, exist_ok=True)
    for old in out.parent.glob(f"{out.name}.tmp-*"):  # of a process that was killed days ago
        with suppress(OSError):
            if time.time() - old.stat().st_mtime > 48 * 3600:
                shutil.rmtree(old)
    tmp = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    replaced = out.with_name(f"{tmp.name}-replaced")
    tmp.mkdir()
    try:
        yield tmp
        with suppress(FileNotFoundError):
            out.rename(replaced)  # a kill before the next line loses it: removing takes longer
        tmp.rename(out)
    finally:
        for folder in (tmp, replaced):
            shutil.rmtree(folder, ignore_errors=True)


def source_names(meta):
    """The names of the sources of a cache, from its meta.json."""
    return " + ".join(Path(path).name for path in meta["data"].split(" + "))


def join_sources(paths, rate, reading):
    """Sources as one: their items, table, columns of index.csv, and what meta.json says of them."""
    import pandas as pd

    sources = [open_source(path, rate) for path in paths]
    items = [item for source in sources for item in source.items]
    table = pd.concat([source.table.assign(source=source.name) for source in sources],
                      ignore_index=True)
    columns, digest = ["ecg_id", *COLUMNS], sources[0].digest
    if len(sources) > 1 or not isinstance(items[0], Path):  # else all is as PTB-XL has it
        columns += ["source", "record"]
        table["patient_id"] = table.groupby(["source", table.patient_id.astype(str)]).ngroup()
        told = json.dumps([*reading.items(), *(source.digest for source in sources)])
        digest = hashlib.sha256(told.encode()).hexdigest()
    return items, table, columns, dict(
        rate=rate, format=FORMAT, source=digest,
        data=" + ".join(str(source.path.resolve()) for source in sources),
        synthetic=any((source.path / SYNTHETIC).exists() for source in sources))


def write_signals(results, names, file, written):
    """Write what try_record() gave of each recording, but no samples twice; `written` digests it.

    ->  a table with a row a signal: number of its recording, has_flat_lead, limbs_agree, size (mV);
    what was unusable; what was there already
    """
    import pandas as pd

    rows, bad, twice, seen = [], [], [], {}
    for i, (windows, problem) in enumerate(results):
        if problem:
            bad.append(problem)
            continue
        for signal in windows:
            digest = hashlib.sha256(signal).digest()
            if digest in seen:
                twice.append(f"{names[i]}: the same samples as {seen[digest]}")
                continue
            seen[digest] = names[i]
            file.write(signal)
            written.update(signal)
            rows.append(dict(number=i, has_flat_lead=(signal == signal[:1]).all(0).any(),
                             limbs_agree=limb_leads_agree(signal),
                             size=np.median(np.ptp(signal[:, signal.any(0)], axis=0)) / 1000))
    return pd.DataFrame(rows), bad, twice


def build_cache(paths, rate, out, workers=None, skip_bad=False, reading=()):
    """Read every record of one or several sources once into the cache folder `out`, unless it is
    there already; what has the same samples as one before is left out.

    paths: as open_source() takes them; reading: as try_record() does. Raises InputError when
    records are missing or unusable; with skip_bad those are left out.
    """
    out, reading = Path(out), dict(reading)
    items, table, columns, meta = join_sources(
        [paths] if isinstance(paths, (str, Path)) else paths, rate, reading)
    if (out / "meta.json").exists():
        if f'"{meta["source"]}"'.encode() in (out / "meta.json").read_bytes():
            meta = open_cache(out, check=True).meta
            print(f"{out}: up to date, {meta['records']} records at {rate} Hz, "
                  f"{len(meta['left_out'])} left out")
            return
    elif out.exists():
        raise InputError(f"{out} exists and is no cache; remove it, or give another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    check_room(out.parent, cache_bytes(len(items), rate))

    written = hashlib.sha256()  # of what is in memory: a disk's fault is told from it
    with new_folder(out.resolve()) as tmp:  # out may be a link to another disk
        # Ctrl-C is for this process alone, which then cancels what has not begun.
        with (ProcessPoolExecutor(workers, None, signals.signal,
                                  (signals.SIGINT, signals.SIG_IGN)) as pool,
              closing(pool.map(partial(try_record, rate=rate, reading=reading), items,
                               chunksize=32)) as results,
              open(tmp / "signals.int16", "wb") as file):
            bar = tqdm(results, "cache", len(items), unit="record", disable=None)
            found, bad, twice = write_signals(bar, table.record, file, written)
        if bad and (not skip_bad or found.empty):
            raise InputError(f"{len(bad)} of {len(items)} records cannot be used; mend them, "
                             "or leave them out with --skip-bad:\n  " + "\n  ".join(bad[:10]))
        index = table.iloc[found.number]
        if "record" in columns:
            index = index.assign(ecg_id=np.arange(1, len(found) + 1))
        index[columns].to_csv(tmp / "index.csv", index=False)
        written.update((tmp / "index.csv").read_bytes())
        meta |= dict(records=len(found), records_with_a_flat_lead=int(found.has_flat_lead.sum()),
                     left_out=bad + twice, index=sha256(tmp / "index.csv"),
                     fingerprint=written.hexdigest())
        (tmp / "meta.json").write_text(json.dumps(meta, indent=1))
    print(f"{out}: {len(found)} records at {rate} Hz, {meta['records_with_a_flat_lead']} with a "
          f"flat lead, {len(meta['left_out'])} left out")
    for problem in meta["left_out"]:
        print(f"  left out: {problem}")
    disagree = list(index.record[~found.limbs_agree.to_numpy()])
    if disagree:
        print(f"  warning: in {len(disagree)} records limb leads do not follow from I and II: were "
              f"leads exchanged, or scaled one by one? {' '.join(disagree[:10])}")
    for name, size in found["size"].groupby(index.source.to_numpy()).median().items():
        if not USUAL_MV[0] < size < USUAL_MV[1]:
            print(f"  warning: leads of {name} range over {size:.2g} mV (median), an ECG's over "
                  f"{USUAL_MV[0]} to {USUAL_MV[1]:g}: are its unit and gains right?")


def open_cache(folder, check=False):
    """The Cache in a folder; raise InputError when missing, truncated or of another format.

    check: the samples too, against the fingerprint; of PTB-XL at 500 Hz that takes 4 s, so only
    where the cache is found up to date, which make does before it trains.
    """
    import pandas as pd

    folder = Path(folder)
    make = f"python data.py cache --data DIR --rate HZ --out {folder}"
    again = f"make it again: rm -r {folder}; {make}"
    if not (folder / "meta.json").exists():
        raise InputError(f"no cache in {folder}; make it: {make}")
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if meta["format"] != FORMAT:
            raise ValueError(f"format {meta['format']}, this code reads {FORMAT}")
        for key, kind in (("records", int), ("rate", int), ("data", str), ("synthetic", bool),
                          ("left_out", list), ("fingerprint", str)):
            if type(meta[key]) is not kind:
                raise ValueError(f"{key} is {str(meta[key])[:80]}")
        records = meta["records"]
        shape = (records, SECONDS * meta["rate"], len(LEADS))
        size = (folder / "signals.int16").stat().st_size
        if size != cache_bytes(records, meta["rate"]):
            raise ValueError(f"{size} bytes for {shape} samples"[:80])
        if sha256(folder / "index.csv") != meta["index"]:
            raise ValueError("index.csv is not the one that was written")
        index = pd.read_csv(folder / "index.csv")
        if len(index) != records:
            raise ValueError(f"{len(index)} rows in index.csv for {records} records")
        if check and sha256(folder / "signals.int16", folder / "index.csv") != meta["fingerprint"]:
            raise ValueError("signals.int16 is not what was written")
        signals = np.memmap(folder / "signals.int16", "<i2", "r", shape=shape)
    except (OSError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{folder} is truncated, damaged or old: {error}; {again}") from error
    return Cache(folder, signals, index, meta)


# Synthetic PTB-XL. A heart dipole (x left, y foot, z back; mV) is a sum of Gaussian waves (after
# McSharry et al. 2003, doi 10.1109/TBME.2003.808805), projected on the leads by Dower's matrix
# (Dower, Machado, Osborne 1980, Clin. Cardiol. 3:87); limb leads follow from I and II.

DOWER = np.array([  # dipole to I, II and V1 to V6
    [.632, .235, -.515, .044, .882, 1.213, 1.125, .831],
    [-.235, 1.066, .157, .164, .098, .127, .127, .076],
    [.059, -.132, -.917, -1.387, -1.277, -.601, -.086, .230]])
# wave: time from R (s), width (s), dipole x, y, z (mV)
WAVES = {"P": (-.16, .022, .05, .11, -.02), "Q": (-.022, .009, -.13, -.05, -.25),
         "R": (.0, .012, 1., .7, .25), "S": (.028, .010, -.15, -.1, .40),
         "ST": (.11, .035, .0, .0, .0), "T": (.27, .05, .26, .24, -.14)}
TERRITORIES = {"AMI": (.25, .0, -1.), "IMI": (-.1, 1., .1), "LMI": (1., -.2, .0)}  # infarct faces
SCP_CLASS = {"NORM": "NORM", "AMI": "MI", "IMI": "MI", "LMI": "MI", "ISC_": "STTC", "NDT": "STTC",
             "CRBBB": "CD", "CLBBB": "CD", "LVH": "HYP"}
# SCP codes of a record: share of the patients
DIAGNOSES = {"NORM": .40, "AMI": .04, "IMI": .05, "LMI": .02, "ISC_": .08, "NDT": .05,
             "CRBBB": .07, "CLBBB": .05, "LVH": .04, "AMI ISC_": .03, "IMI NDT": .02,
             "IMI CRBBB": .03, "AMI CRBBB": .02, "LVH ISC_": .04, "LVH CLBBB": .02,
             "CRBBB NDT": .02, "": .02}


def diseased(codes, rng):
    """A beat's waves {name: (time, width, x, y, z)}, changed as each SCP code changes them."""
    waves = {name: np.array(wave) for name, wave in WAVES.items()}
    q, r, s, st, t = (waves[name][2:] for name in ("Q", "R", "S", "ST", "T"))  # their dipoles
    if "CRBBB" in codes:  # late activation of the right ventricle: rSR' in V1, wide S in I and V6
        waves["R'"] = np.array([.062, .018, *rng.uniform(.7, 1.1) * np.array([-.55, .1, -.75])])
        t += .1, .0, .12
    if "CLBBB" in codes:  # no septal Q, broad notched R to the left, T against it
        waves["R"][:2] = -.005, .022
        waves["R'"] = np.array([.048, .024, *rng.uniform(.8, 1.1) * np.array([1., .2, .7])])
        q *= 0
        r *= .9, .6, 1.6
        s *= 0
        st += -.12, -.03, -.12
        t *= -1., -.3, 2.
    if "LVH" in codes:  # high voltage to the left and back, with strain
        gain = rng.uniform(1.7, 2.3)
        r *= gain * np.array([1.1, .8, 1.6])
        s *= gain
        st += -.10, -.04, .05
        t *= -.6, .2, -.4
    for code in set(codes) & set(TERRITORIES):  # lost muscle: the dipole points away at first
        face, size = np.array(TERRITORIES[code]), rng.uniform(.7, 1.2)
        acute = rng.uniform(.2, 1.)  # ST elevation over the territory, less of it when old
        waves["Q"][:2] = -.020, .013
        q -= .55 * size * face
        r -= .45 * size * face * (face @ r) / (face @ face)
        st += .25 * size * acute * face
        t -= .35 * size * (1.2 - acute) * face
    if "ISC_" in codes:  # subendocardial ischaemia: ST depression in the lateral leads
        st -= rng.uniform(.12, .25) * np.array([1., .6, -.4])
        t *= rng.uniform(-.5, .3)
    if "NDT" in codes:  # flat or inverted T without much ST change
        t *= rng.uniform(-.8, .15)
    return waves


def mild(waves, severity):
    """[(time, width, x, y, z)] between the normal beat (severity 0) and the diseased one (1)."""
    normal = {name: (*wave[:2], 0, 0, 0) for name, wave in waves.items()} | WAVES
    return [normal[name] + severity * (wave - normal[name]) for name, wave in waves.items()]


def synth_record(codes, heart, rng):
    """One 10 s ECG at 500 Hz: (T, C) float64 mV.

    heart: the patient's own anatomy, a dict of rotation (3, 3), voltage, width and rate (1/s).
    """
    rate = 500
    t = np.arange(SECONDS * rate) / rate
    n = SECONDS * 3 + 4
    breath, phase = rng.uniform(.2, .35), rng.uniform(0, 2 * np.pi)
    mean_rr = 1 / (heart["rate"] * rng.uniform(.92, 1.08))
    rr = mean_rr * (1 + .03 * np.sin(2 * np.pi * breath * mean_rr * np.arange(n) + phase)
                    + .015 * rng.standard_normal(n))  # respiratory and random variability
    beats = np.cumsum(rr) - rng.uniform(1, 2) * mean_rr  # some before 0, some after the end
    dipole = np.zeros((len(t), 3))
    for start, width, *vector in mild(diseased(codes, rng), rng.uniform(.25, 1)):
        late = start > .08  # ST and T follow the rate (Bazett), the QRS does not
        at = beats + start * (np.sqrt(rr) if late else heart["width"])
        width = width * (np.sqrt(mean_rr) if late else heart["width"])
        z = (t[:, None] - at) / width  # (T, beats)
        gain = 1 + .03 * rng.standard_normal(n)
        dipole += (np.exp(-z * z / 2) @ gain)[:, None] * (heart["rotation"] @ vector)

    noise = rng.standard_normal((len(t), 8)) * rng.lognormal(np.log(.012), .5)  # muscle
    noise = sosfilt(butter(2, 20, "high", fs=rate, output="sos"), noise, axis=0)
    mains = rng.lognormal(np.log(.004), .8) * np.sin(2 * np.pi * 50 * t + phase)
    noise += np.outer(mains, rng.uniform(.3, 1, 8))
    for f in (breath, rng.uniform(.03, .12)):  # baseline wander
        size = rng.lognormal(np.log(.04), .6) * rng.standard_normal(8)
        noise += np.outer(np.sin(2 * np.pi * f * t + rng.uniform(0, 2 * np.pi)), size)
    return all_leads(heart["voltage"] * dipole @ DOWER + noise)


def random_heart(rng):
    """A patient's anatomy: the heart's turn in the chest, voltage, conduction width, heart rate."""
    return dict(rotation=Rotation.from_euler("ZYX", rng.normal(0, (.45, .3, .35))).as_matrix(),
                voltage=rng.lognormal(0, .3), width=rng.normal(1, .06),
                rate=np.clip(rng.normal(72, 12), 48, 115) / 60)


def write_synthetic(out, names, codes, heart, seed):
    """Write one synthetic record in WFDB form at both rates."""
    signal = synth_record(codes, heart, np.random.default_rng(seed))
    for rate, column in RATES.items():
        path = out / names[column]
        path.parent.mkdir(parents=True, exist_ok=True)
        x = resample_poly(signal, rate, 500, axis=0)
        our_wfdb().wrsamp(
            path.name, rate, ["mV"] * 12, [lead.upper() for lead in LEADS], fmt=["16"] * 12,
            d_signal=np.rint(x * 1000).clip(-32000, 32000).astype(np.int64),
            adc_gain=[1000.0] * 12, baseline=[0] * 12, write_dir=str(path.parent))


def synthesize(out, records, seed=0):
    """Write a synthetic PTB-XL: `records` WFDB records at both rates, tables, checksums.

    About one patient in six has two records. Raises InputError when `out` holds something else.
    """
    import pandas as pd

    out = Path(out)
    if out.is_file() or out.exists() and any(out.iterdir()) and not (out / SYNTHETIC).exists():
        raise InputError(f"{out} is not empty and holds no synthetic data; give another --out")
    rng = np.random.default_rng(seed)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / SYNTHETIC).write_text(f"Synthetic records, seed {seed}: a model, not patients. "
                                 "Made by: python data.py synth\n")
    share = np.array([*DIAGNOSES.values()])
    rows, jobs, patient, heart = [], [], 0, None
    for ecg_id in range(1, records + 1):
        if heart is None or rng.random() > 1 / 6:
            patient, heart = patient + 1, random_heart(rng)
            codes = rng.choice([*DIAGNOSES], p=share / share.sum()).split()
            who = dict(patient_id=patient, age=int(np.clip(rng.normal(60, 16), 18, 89)),
                       sex=int(rng.integers(2)), strat_fold=1 + (patient - 1) % 10)
        names = {RATES[rate]: f"records{rate}/{ecg_id // 1000 * 1000:05d}/{ecg_id:05d}_{end}"
                 for rate, end in ((100, "lr"), (500, "hr"))}
        jobs.append((out, names, codes, heart, [seed, ecg_id]))
        rows.append(dict(ecg_id=ecg_id, **who, report="synthetic",
                         scp_codes=str({code: 100.0 for code in [*codes, "SR"]}), **names))
    with ProcessPoolExecutor() as pool:
        list(tqdm(pool.map(write_synthetic, *zip(*jobs), chunksize=8), "synth", records,
                  unit="record", disable=None))
    pd.DataFrame(rows).to_csv(out / TABLES[0], index=False)
    statements = [dict(code=code, diagnostic=1.0, diagnostic_class=name)
                  for code, name in SCP_CLASS.items()] + [dict(code="SR", rhythm=1.0)]
    pd.DataFrame(statements).set_index("code").to_csv(out / TABLES[1], index_label="")
    files = sorted(f for f in out.rglob("*") if f.is_file())
    sums = "".join(f"{sha256(f)} {f.relative_to(out)}\n" for f in files)
    write_atomic(out / "SHA256SUMS.txt", lambda tmp: tmp.write_text(sums))
    print(f"{out}: {records} synthetic records of {patient} patients, both rates")


def info(path):
    """Print Table 1 of the paper for a source: superclasses by fold, and patients."""
    path = Path(path)
    table = load_tables(path) if (path / TABLES[0]).exists() else open_source(path, 100).table
    count = table[list(CLASSES)].sum(axis=1)
    table = table.assign(records=1, one=count == 1, none=count == 0)
    folds = table.groupby("strat_fold")[["records", *CLASSES, "one", "none"]].sum()
    folds.loc["all"] = folds.sum()
    print(f"{path}{' (synthetic)' * (path / SYNTHETIC).exists()}\n{folds}")
    print("a record may hold several superclasses; one: exactly one, none: no diagnostic one")
    print(f"{table.patient_id.nunique()} patients, none in two folds")


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    style = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    p = commands.add_parser("download", help="PTB-XL 1.0.3 from PhysioNet (CC BY 4.0)", **style)
    p.add_argument("--data", default="data/ptbxl", help="folder to fill")
    add_shared(p, "rate")
    p.add_argument("--url", default=URL, help="a mirror in the same layout, "
                   "such as https://physionet-open.s3.amazonaws.com/ptb-xl/1.0.3/")
    p = commands.add_parser("cache", help="all records of one or more sources in one array",
                            **style)
    p.add_argument("--data", nargs="+", default=["data/ptbxl"], help="folders in PTB-XL's layout, "
                   "or of recordings; tables of them (CSV with a column path); files of several "
                   "(npy, npz, HDF5)")
    add_shared(p, "rate")
    p.add_argument("--unit", help="of recordings that do not tell it: mV, uV or V")
    p.add_argument("--source-rate", type=float, help="theirs, in Hz")
    p.add_argument("--leads", nargs="+", help="theirs, in the order of the columns")
    p.add_argument("--all-windows", action="store_true", help="of longer recordings all windows of "
                   "10 s; by default the first")
    p.add_argument("--out", default="cache/ptbxl-500", help="cache folder")
    p.add_argument("--workers", type=int, default=None, help="processes; None: one a core")
    p.add_argument("--skip-bad", action="store_true", help="leave out records that are unusable")
    p = commands.add_parser("synth", help="synthetic records in the same layout", **style)
    p.add_argument("--out", default="data/synth", help="folder to write")
    p.add_argument("--records", type=bounded(int, 20), default=400, help="how many")
    p.add_argument("--seed", type=bounded(int, 0), default=0, help="same seed, same records")
    p = commands.add_parser("info", help="counts by fold and superclass", **style)
    p.add_argument("--data", nargs="+", default=["data/ptbxl"], help="sources, as of cache")
    return parser.parse_args(argv)


def main(args):
    if args.command == "download":
        download(args.data, args.rate, args.url)
    elif args.command == "cache":
        reading = dict(rate=args.source_rate, unit=args.unit, leads=args.leads,
                       all_windows=args.all_windows)
        build_cache(args.data, args.rate, args.out, args.workers, args.skip_bad, reading)
    elif args.command == "synth":
        synthesize(args.out, args.records, args.seed)
    else:
        for path in args.data:
            info(path)


if __name__ == "__main__":
    run_script(lambda: main(get_args()))
