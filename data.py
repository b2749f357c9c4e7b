"""12-lead ECGs in, one int16 array out: download, check, read, cache, label, synthesise.

In:  a folder in PTB-XL's layout (ptbxl_database.csv, scp_statements.csv, records100/, records500/),
     or other collections: see open_source(); single recordings in any form: see read_recording().
Out: a cache folder: signals.int16 (records, T, C) microvolt, raw little-endian; index.csv, a row a
     record (see COLUMNS; statements: JSON, what its source tells of the record); meta.json.

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
import tempfile
import threading
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from scipy.signal import resample_poly
from scipy.spatial.transform import Rotation
from tqdm import tqdm

LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
CLASSES = ("NORM", "MI", "STTC", "CD", "HYP")  # of the default label set, PTB-XL's superclasses
COLUMNS = ("ecg_id", "patient_id", "strat_fold", "age", "sex", "source", "record", "statements")
RATES = {100: "filename_lr", 500: "filename_hr"}  # Hz -> column that names the record
SECONDS = 10
FLAT_UV = 1.0  # a lead whose standard deviation is below one step of the recorder is flat
TRAIN_FOLDS, VAL_FOLD, TEST_FOLD = range(1, 9), 9, 10  # PTB-XL's recommended split
URL = "https://physionet.org/files/ptb-xl/1.0.3/"
TABLES = ("ptbxl_database.csv", "scp_statements.csv")
SYNTHETIC = "SYNTHETIC.txt"  # its presence marks a folder whose records are not from patients
FORMAT = 2  # raise it when the cache's layout changes: older caches are then rebuilt
TRIES = 4  # downloads of one file before it counts as failed
BACKOFF_S, PAUSE_S = 0.5, 20  # between tries, doubled each time; at most, whatever a server asks
TIMEOUT_S = 30  # without a byte


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
    data=dict(nargs="+", default=["data/ptbxl"], help="folders in PTB-XL's layout or of "
              "recordings, tables (CSV with a column path), npy, npz or HDF5 files"),
    rate=dict(type=int, choices=RATES, default=500, help="Hz"),
    cache=dict(help="folder of: python data.py cache; by default the run's own"),
    device=dict(default="auto", help="auto, cpu, cuda, cuda:1, mps"),
    labels_of=dict(default="superclass", help="a label set of PTB-XL (superclass, subclass, "
                   "diagnostic, form, rhythm, all), or codes: 'CRBBB AF=AFIB+AFLT'"),
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
        parser.add_argument("--" + name.replace("_", "-"), **SHARED[name])


def fold_names(folds):
    """How texts name one fold or several: "fold 10", "folds 9 and 10", "folds 1-8"."""
    folds = [int(fold) for fold in np.unique(list(folds) if np.iterable(folds) else folds)]
    if len(folds) == 1:
        return f"fold {folds[0]}"
    if len(folds) > 2 and folds[-1] - folds[0] == len(folds) - 1:
        return f"folds {folds[0]}-{folds[-1]}"
    return f"folds {', '.join(map(str, folds[:-1]))} and {folds[-1]}"


def normalize(signals):
    """Z-score each lead of each record over time (paper 4.2); a flat lead becomes zeros.

    The one place where signals are normalised, for training, evaluation and figures alike.
    signals: (..., T, C) int16 microvolt  ->  (..., T, C) float32, mean 0 and deviation 1
    """
    x = signals.to(torch.float32, copy=True)  # then in place: fresh memory is what costs
    x -= x.mean(-2, keepdim=True)
    std = (x * x).mean(-2, keepdim=True).sqrt()
    x *= torch.where(std < FLAT_UV, 0.0, 1 / std.clamp(min=FLAT_UV))
    return x


# Files

@contextmanager
def reading(path, remedy):
    """Turn whatever a damaged file leads a library to into one InputError.

    It names the path, the fault, and the remedy: what to do. An InputError passes through.
    """
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{path} cannot be read: not there ({error}); {remedy}") from error
    except Exception as error:  # wfdb, pandas, torch and json raise whatever they stumble over
        fault = f"{type(error).__name__} {str(error)[:200]}".strip()
        raise InputError(f"{path} cannot be read, it may be damaged ({fault}); {remedy}") from error


def sync(path):
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path, write):
    """Call write(temporary path), then rename it to path: a kill or a power cut leaves the old file
    or the new. Raises OSError, which says what to do, when it cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f"{path.name}.tmp-{os.getpid()}-{threading.get_ident()}")
    try:
        write(tmp)
        sync(tmp)
        os.replace(tmp, path)
        sync(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter on a full disk
        raise OSError(f"{path} cannot be written ({str(error)[:80]}), as on a full disk; what "
                      "was there is kept: make room, and give the same command again") from error
    finally:
        tmp.unlink(missing_ok=True)


def write_text(path, text):
    """Write a text file, whole or not at all."""
    write_atomic(path, lambda tmp: tmp.write_text(text, encoding="utf-8"))


def write_json(path, record):
    """Write a record of plain types as JSON, whole or not at all."""
    write_text(path, json.dumps(record, indent=1))


def save_arrays(path, arrays):
    """Write a dict of arrays as an .npz file, whole or not at all."""
    def write(tmp):
        with open(tmp, "wb") as file:  # savez would add a suffix to a name
            np.savez(file, **arrays)

    write_atomic(path, write)


def sha256(path):
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def goes_down(name):
    """Whether a path, as it is written, leads down from where it starts."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


# Download

def open_session():
    """An HTTP session that asks a busy or failing server again, with growing pauses."""
    import requests  # here, as pandas, wfdb and h5py below: loading an encoder needs none of them
    from requests.adapters import HTTPAdapter
    from urllib3.util import Retry

    retry = Retry(TRIES, backoff_factor=BACKOFF_S, backoff_max=PAUSE_S, retry_after_max=PAUSE_S,
                  status_forcelist=(429, 500, 502, 503, 504), raise_on_status=False)
    session = requests.Session()
    session.mount("http://", HTTPAdapter(max_retries=retry))
    session.mount("https://", HTTPAdapter(max_retries=retry))
    return session


def fetch_file(session, url, path, digest=None):
    """Download url to path, unless it is there with its SHA-256, digest; raise InputError."""
    import requests

    if path.exists() and sha256(path) == digest:
        return
    for _ in range(TRIES):  # what urllib3 does not try again: bodies cut short, or wrong
        try:
            answer = session.get(url, timeout=TIMEOUT_S)
        except requests.RequestException as error:
            problem = str(error)
            continue
        got = hashlib.sha256(answer.content).hexdigest()
        if answer.status_code != 200:
            raise InputError(f"{url}: HTTP {answer.status_code} {answer.reason}")
        if digest in (None, got):
            write_atomic(path, lambda tmp: tmp.write_bytes(answer.content))
            return
        problem = f"its SHA-256 is {got}, SHA256SUMS.txt says {digest}"
    raise InputError(f"{url}: {problem}")


def read_sums(path):
    """SHA256SUMS.txt as {file: digest}; raise InputError on a line of another form."""
    sums = {}
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        found = re.fullmatch(r"([0-9a-f]{64}) +\*?(.+)", line.strip())
        if not (found and goes_down(found[2])):
            raise InputError(f"{path}: {line[:60]!r} is not 'digest file' of a file within it")
        sums[found[2]] = found[1]
    return sums


def download(folder, rate, url=URL, workers=8):
    """Fetch what `rate` needs of PTB-XL into folder; files that are there and whole are kept.

    Raises InputError when files cannot be had, OSError of a full disk; run again to go on.
    """
    folder, url, session = Path(folder), url.rstrip("/") + "/", open_session()
    fetch_file(session, url + "SHA256SUMS.txt", folder / "SHA256SUMS.txt")
    sums = read_sums(folder / "SHA256SUMS.txt")
    if not set(TABLES) <= set(sums):
        raise InputError(f"{url} does not list {' and '.join(TABLES)}: not a PTB-XL folder")
    wanted = [name for name in sums
              if name in (*TABLES, "LICENSE.txt", SYNTHETIC) or name.startswith(f"records{rate}/")]
    new = [name for name in wanted if not (folder / name).exists()]
    # SHA256SUMS.txt has no sizes: a data file is known from the rate, a header takes a disk block
    size = sum(240 * rate if name.endswith(".dat") else 4096 for name in new)
    free = shutil.disk_usage(folder).free
    print(f"{url}: {len(wanted)} files, {len(new)} to come, {size / 1e6:,.1f} MB", flush=True)
    if free < size:
        raise InputError(f"{folder} has no room: {free / 1e6:,.1f} MB are free; make some")

    pool, failed = ThreadPoolExecutor(workers), []
    try:
        jobs = [pool.submit(fetch_file, session, url + name, folder / name, sums[name])
                for name in wanted]
        for job in tqdm(as_completed(jobs), "download", len(jobs), unit="file", disable=None):
            try:
                job.result()
            except InputError as error:  # another error is of the disk, and ends it
                failed.append(str(error))
            if len(failed) >= 20:
                break  # the server is gone, or is the wrong one
    finally:
        pool.shutdown(cancel_futures=True)
    if failed:
        raise InputError(f"{len(failed)} files could not be downloaded; give the same command "
                         "again to go on:\n  " + "\n  ".join(failed[:5]))
    (folder / f".complete-{rate}").touch()
    print(f"{folder}: {len(wanted)} files at {rate} Hz, all checksums right")


# Labels. A source tells statements of a record, {code: 1 or 0}; a label set {class: [codes]} says
# which of them make a class: a record has it when any of its codes is 1.

@dataclass(frozen=True)
class Labels:
    """A label set over the N records of a cache, with K classes.

    y: (N, K) int, 1 where a record has the class; member: (N,) bool, the records that take part
    """

    name: str
    classes: tuple
    y: np.ndarray
    member: np.ndarray


def read_label_sets(path):
    """PTB-XL's six label sets {set: {class: [SCP codes]}}, from scp_statements.csv.

    They are those of the benchmark of Strodthoff et al. 2021 (doi 10.1109/JBHI.2020.3022989).
    """
    import pandas as pd

    sets = dict(superclass={name: [] for name in CLASSES}, subclass={})
    with reading(path, "get PTB-XL's tables again: python data.py download, or synth"):
        table = pd.read_csv(path, index_col=0)
        if table.index.has_duplicates:
            raise ValueError("a code has two rows")
        for kind in ("diagnostic", "form", "rhythm"):
            # coerced: one cell that is no number would make text of all, and lose every label
            codes = table.index[pd.to_numeric(table[kind], errors="coerce") == 1]
            sets[kind] = {code: [code] for code in codes}
        for code in sets["diagnostic"]:
            superclass, subclass = table.loc[code, ["diagnostic_class", "diagnostic_subclass"]]
            sets["superclass"][superclass].append(code)
            sets["subclass"].setdefault(subclass, []).append(code)
        sets["all"] = {code: [code] for code in table.index}
    return sets


def own_label_set(spec, counts, sets):
    """The label set {class: [codes]} of words CODE or NAME=CODE+CODE, with codes of a Counter;
    raises InputError, which names `sets` too.
    """
    classes = {}
    for word in spec.split() or [spec]:
        name, codes = word, [word]
        if word not in counts and "=" in word:
            name, codes = word.split("=", 1)
            codes = codes.split("+")
        unknown = [code for code in codes if code not in counts]
        if unknown:
            there = ", ".join(f"{code} ({n})" for code, n in counts.most_common(80)) or "none"
            raise InputError(f"labels {spec!r}: {unknown[0]!r} is unknown; give a label set "
                             f"({', '.join(sets)}), or CODE or NAME=CODE+CODE, of: {there}")
        classes[name] = codes
    return classes


def read_labels(cache, spec="superclass"):
    """The Labels that `spec` asks for, of the N records of a cache.

    spec: a named set, of which records with at least one label take part; or words CODE, each a
    class, or NAME=CODE+CODE, of which those take part for which all labels are known. A code that
    a record lacks is 0 if it is in its source's vocabulary, which tells something of the record.
    Raises InputError for unknown words.
    """
    statements = [json.loads(text) for text in cache.index.statements]
    vocabularies = [cache.meta["vocabulary"][source] for source in cache.index.source]
    sets = dict(superclass={name: [] for name in CLASSES}) | cache.meta["label_sets"]
    if spec in sets:  # a table may have a column of the class's name instead of its codes
        classes = {name: [*codes, name] for name, codes in sets[spec].items()}
    else:
        counts = Counter({code: 0 for codes in vocabularies for code in codes})
        for record in statements:
            counts.update(record)
        classes = own_label_set(spec, counts, sets)
    y, known = np.zeros((2, len(statements), len(classes)), int)
    for row, (record, vocabulary) in enumerate(zip(statements, vocabularies)):
        codes_known = {*vocabulary, *record} if record else set()
        has = {code for code, answer in record.items() if answer}
        for k, codes in enumerate(classes.values()):
            y[row, k] = not has.isdisjoint(codes)
            known[row, k] = y[row, k] or codes_known.issuperset(codes)
    member = y.any(1) if spec in sets else known.all(1)
    return Labels(spec, tuple(classes), y, member)


# Tables

def refuse_cells(column, bad, valid):
    """Raise ValueError where cells of a table's column are bad: the first, and their lines."""
    if bad.any():
        cells = ", ".join(map(repr, column[bad].astype(str).str[:40][:5]))
        lines = ", ".join(str(i + 2) for i in np.flatnonzero(bad)[:5])
        raise ValueError(f"{column.name} is {cells} in lines {lines}; needs {valid}")


def check_people(table):
    """Make numbers of folds, ages and sexes; raise ValueError for folds that cannot be."""
    import pandas as pd

    for name in ("age", "sex"):
        table[name] = pd.to_numeric(table[name], errors="coerce")
    fold = pd.to_numeric(table.strat_fold, errors="coerce")
    refuse_cells(table.strat_fold, ~fold.isin(range(1, 11)), "an integer from 1 to 10")
    table["strat_fold"] = fold.astype(int)
    folds = table.groupby(table.patient_id.astype(str)).strat_fold.transform("nunique")
    refuse_cells(table.patient_id, folds > 1, "a patient in one fold alone")


def load_tables(folder):
    """The record table of a PTB-XL folder, with a column `statements`: {SCP code: 1}.

    Raises InputError for a missing table or column and for cells that cannot be.
    """
    import pandas as pd

    path = Path(folder) / TABLES[0]
    with reading(path, f"give another --data, or: python data.py download --data {folder}"):
        table = pd.read_csv(path)
        for name in ("ecg_id", "patient_id"):
            table[name] = table[name].astype("Int64").astype(int)  # raises for what is no integer
        refuse_cells(table.ecg_id, table.ecg_id.duplicated(keep=False), "each once")
        for name in RATES.values():
            files = table[name].fillna("").astype(str)
            refuse_cells(files, ~files.map(goes_down), f"a path within {folder}")
            # else the check of patients could be passed by while test records are trained on
            refuse_cells(files, files.map(os.path.normpath).duplicated(keep=False),
                         "another record in each row")
            table[name] = files
        check_people(table)
        table["statements"] = [dict.fromkeys(ast.literal_eval(codes), 1)  # of any likelihood, as
                               for codes in table.scp_codes]  # Table 1 of the paper counts
    return table


# Recordings, of PTB-XL and from anywhere

UNITS = {"v": 1e6, "mv": 1e3, "uv": 1.0, "µv": 1.0, "μv": 1.0}  # microvolt; micro has two signs
ARRAYS = ".npy", ".npz", ".h5", ".hdf5"  # ends of files that may hold several recordings
ENDS = ".hea", ".csv", *ARRAYS  # not EDF, whose rates and amplitudes wfdb gets wrong


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

    Raises InputError for a path without recordings.
    """
    found = []
    for path in map(Path, paths):
        if path.is_dir():  # where CSV files tend to be tables
            files = [file for file in sorted(path.rglob("*")) if file.suffix.lower() != ".csv"]
        elif path.suffix in (".dat", ".mat"):
            files = [path.with_suffix(".hea")]
        else:
            files = [path, Path(f"{path}.hea")]  # the latter: a record as WFDB names it
        files = [file for file in files if file.suffix.lower() in ENDS and file.exists()]
        if not files:
            raise InputError(f"{path} holds no recording: give files that end in {' '.join(ENDS)}, "
                             "or folders of them (but of CSV); EDF and others: see README.md")
        for file in files:
            rows = [None]
            with suppress(Exception):  # it is said when the file is read, and others go on
                shape = open_arrays(file)["signal"].shape if file.suffix.lower() in ARRAYS else ()
                rows = range(shape[0]) if len(shape) == 3 else [None]
            found += [(file, row) for row in rows]
    return found


@lru_cache(maxsize=2)  # of a large file many recordings are read, one after another
def open_arrays(path):
    """What an .npz or HDF5 file holds: signal, (T, n) or several of these, and fs, units, leads."""
    if path.suffix.lower() == ".npy":
        return dict(signal=np.load(path, mmap_mode="r"))
    if path.suffix.lower() == ".npz":
        with np.load(path) as file:
            arrays = dict(file)
    else:
        import h5py

        file = h5py.File(path)  # stays open: its arrays are read when they are asked for
        arrays = dict(file.attrs) | dict(file)
    signals = [name for name, array in arrays.items() if len(getattr(array, "shape", ())) in (2, 3)]
    if len(signals) != 1:
        raise ValueError(f"arrays with two or three axes: {signals}; needs one")
    stated = {name: arrays[name] for name in ("fs", "units", "leads") if name in arrays}
    return stated | dict(signal=arrays[signals[0]])


def read_columns(path):
    """A CSV file of a column a lead, and perhaps one of `time` in s: a dict like open_arrays()."""
    import pandas as pd

    table, stated = pd.read_csv(path), {}
    if not any(map(lead_name, table)):  # without names
        return dict(signal=pd.read_csv(path, header=None).to_numpy())
    if "time" in table:
        stated["fs"] = round(1 / np.median(np.diff(table.pop("time"))), 4)
    return stated | dict(signal=table.to_numpy(), leads=list(table))


def read_wfdb(path):
    """The record of a WFDB header, through wfdb: a dict like open_arrays()."""
    import wfdb

    lines = [line for line in path.read_text(errors="replace").splitlines()
             if line.strip() and not line.startswith("#")]
    words, files = lines[0].split(), {line.split()[0] for line in lines[1:]}
    if any(re.match(r"\S+\s+\S+\s+[-+]?[0.]+([(/e\s]|$)", line) for line in lines[1:]):
        raise ValueError("a gain of 0, which means unknown; wfdb would take it for 200 per mV")
    with tempfile.TemporaryDirectory() as folder:
        # wfdb refuses a date that cannot be (00/00/0000): it reads a header without time and date
        copy = Path(folder) / path.name
        copy.write_text("\n".join([" ".join(words[:4]), *lines[1:]]))
        for name in files:
            (copy.parent / Path(name).name).symlink_to((path.parent / name).resolve())
        record = wfdb.rdrecord(str(copy.with_suffix("")))
    leads = record.sig_name if any(record.sig_name) else []  # a lead without a name is None
    return dict(signal=record.p_signal, fs=record.fs, leads=leads, units=record.units)


def read_recording(path, row=None, rate=None, unit=None, leads=None):
    """The Recording in a WFDB, .npy, .npz, CSV or HDF5 file; row: where it holds several.

    rate (Hz), unit (mV, uV or V) and leads (names, in the order of the columns) stand in for what
    the file does not tell. Raises InputError for what lacks or cannot be.
    """
    path = Path(path)
    name = path.stem if row is None else f"{path.stem}-{row}"
    read = {".hea": read_wfdb, ".csv": read_columns}.get(path.suffix.lower(), open_arrays)
    with reading(path.name, "mend it, or give it in another form"):
        stated = read(path)
        signal = stated["signal"] if row is None else stated["signal"][row]
        rate = stated.get("fs", rate)
        units, names = ([text.decode() if isinstance(text, bytes) else str(text)
                         for text in np.ravel(stated.get(key, ()))] for key in ("units", "leads"))
        if unit and not any(text.lower() in UNITS for text in units):  # none, or none that we know
            units = [unit]
        if leads and not any(map(lead_name, names)):
            names = list(leads)
        if rate is None or not units or not names:
            raise InputError(f"{path.name} does not tell its rate, unit or leads; give such as "
                             "--source-rate 500 --unit mV --leads I II V1")
        return Recording(name, np.asarray(signal), float(rate), units, names)


def lead_name(text):
    """The lead of LEADS that a file calls "avr", "ECG V1", "Lead II" or the like; or None."""
    bare = re.sub(r"^(MDC_ECG_LEAD|ECG|EKG|LEAD)[ _:-]*|\s*[\[(].*$", "", text.strip().upper())
    return next((lead for lead in LEADS if lead.upper() == bare), None)


def in_leads(recording):
    """The signal of a Recording in the order of LEADS: (T, C) float64 microvolt; what lacks is 0.

    ->  that, (C,) bool: the leads that are there, and notes for the user. Raises InputError.
    """
    name, signal, units = recording.name, recording.signal, recording.unit
    leads, n = [lead_name(str(text)) for text in recording.leads], len(recording.leads)
    if len(units) == 1:
        units = units * n
    if signal.ndim == 2 and signal.shape[1] != n == signal.shape[0]:  # (leads, time)
        signal = signal.T
    if signal.shape[1:] != (n,) or len(units) != n or signal.dtype.kind not in "iuf":
        raise InputError(f"{name}: an array {signal.shape} of {signal.dtype}, {n} leads and "
                         f"{len(units)} units; needs numbers (time, leads), in CSV between commas")
    columns = {lead: column for column, lead in enumerate(leads) if lead}
    if not columns or len(columns) < n - leads.count(None):
        raise InputError(f"{name}: leads {' '.join(map(str, recording.leads))[:200]}; needs some "
                         f"of {' '.join(LEADS)}, each once")
    x, notes = np.zeros((len(signal), len(LEADS))), []
    for lead, column in columns.items():
        unit = units[column].lower()
        if unit not in UNITS:
            raise InputError(f"{name}: unit {unit}; needs mV, uV or V (--unit)")
        x[:, LEADS.index(lead)] = signal[:, column] * UNITS[unit]
    live = np.flatnonzero(np.nan_to_num(x).any(1))
    padding = len(x) - np.ptp(live) - 1 if len(live) else 0
    if padding > 0.1 * recording.rate and len(x) > SECONDS * recording.rate:
        x = x[live[0]:live[-1] + 1]
        notes.append(f"{padding / recording.rate:.1f} s of zeros or NaN at its ends are cut off")
    x[:, ~(np.abs(x) < 1e15).all(0)] = 0  # not finite, or squares leave float32
    there = x.std(0) >= FLAT_UV
    if not there.all():
        notes.append(f"{', '.join(np.array(LEADS)[~there])} missing, flat or not finite: masked")
    return x * there, there, notes


def prepare(recording, rate, shortest=SECONDS):
    """A Recording as encoders see it, at their rate and with their leads, before normalize().

    Leads that lack, hold a NaN or are flat become zeros, as masked ones are in training. Padding
    of what is longer than 10 s is cut off. Windows of 10 s lie side by side, the last ends with the
    recording; they are of `shortest` s when it has no 10 s. Raises InputError.
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
    length = round(rate * (SECONDS if len(x) >= SECONDS * rate else shortest))
    if len(x) < length:
        raise InputError(f"{name}: {len(x) / rate:g} s long; at least {shortest:g} s are needed")
    starts = [*range(0, len(x) - length, length), len(x) - length]
    windows = np.stack([x[start:start + length] for start in starts])
    live = (windows.std(1) >= FLAT_UV).any(1)
    if not live.any():
        raise InputError(f"{name}: all leads are flat or not finite; is the unit right?")
    return windows[live].astype(np.float32), there, notes


# Sources: PTB-XL's own layout, or recordings from anywhere with what is told of them

def header_facts(path):
    """Age, sex and statements {code: 1} of a header of the Challenges: `# Dx:` lists codes."""
    text = path.read_text(errors="replace") if path.suffix == ".hea" else ""
    comments = re.findall(r"^# *<?(Age|Sex|Dx)>?:(.*)$", text, re.M | re.I)
    facts = {key.lower(): value.strip() for key, value in comments}
    codes = ["_".join(code.split()) for code in facts.get("dx", "").split(",")]
    return dict(age=facts.get("age"), sex={"m": 0, "f": 1}.get(facts.get("sex", "")[:1].lower()),
                statements={code: 1 for code in codes if code})


def read_list(path):
    """A CSV file with a row a recording -> the table that open_source() needs.

    Statements are its columns of 0, 1 and nothing, which means not known. Raises InputError.
    """
    import pandas as pd

    with reading(path, "mend it, or give a folder of recordings"):
        table = pd.read_csv(path)
        if "path" not in table or table.empty:
            raise ValueError(f"{len(table)} rows of {', '.join(table)[:200]}; needs a column path")
    if "patient_id" not in table:
        table = table.rename(columns=dict(subject_id="patient_id"))
    facts = [name for name in ("path", "patient_id", "strat_fold", "age", "sex") if name in table]
    statements = [{} for _ in range(len(table))]
    for name in table.columns.drop(facts):
        value = pd.to_numeric(table[name], errors="coerce")
        if not (value.isin((0, 1)) | table[name].isna()).all():
            print(f"note: {path}: column {name} is not used: not all of it is 0, 1 or nothing")
            continue
        for row in np.flatnonzero(value.notna()):
            statements[row]["_".join(name.split())] = int(value[row])
    items = list_recordings(path.parent / str(name) for name in table.path)
    if len(items) != len(table):
        raise InputError(f"{path}: a path holds several recordings; give it as another source")
    return table[facts].assign(item=items, statements=statements)


def open_source(path, rate):
    """A folder in PTB-XL's layout, a folder of recordings, a table or a file of them.

    ->  a table of COLUMNS but source (ecg_id: only PTB-XL's), and item: see list_recordings();
    label sets and vocabulary: see read_labels(). Raises InputError.
    """
    import pandas as pd

    path = Path(path)
    if not path.exists() or (path / TABLES[0]).exists():
        table, label_sets = load_tables(path), read_label_sets(path / TABLES[1])
        table["record"] = table[RATES[rate]]
        table["item"] = [(path / f"{name}.hea", None) for name in table.record]
        return table, label_sets, list(label_sets["all"])
    vocabulary, home = [], path if path.is_dir() else path.parent
    if path.suffix.lower() == ".csv":
        table = read_list(path)
    else:
        items = list_recordings([path])
        table = pd.DataFrame([header_facts(file) for file, _ in items]).assign(item=items)
        vocabulary = sorted({code for record in table.statements for code in record})
    table["record"] = [os.path.relpath(file, home) + ("" if row is None else f"#{row}")
                       for file, row in table.item]
    if "patient_id" not in table:
        print(f"note: {path}: each recording counts as a patient; to change that, give a table "
              "(CSV with path and patient_id)")
        table["patient_id"] = table.record
    if "strat_fold" not in table:  # the same for a patient wherever else it turns up
        table["strat_fold"] = [1 + int(hashlib.sha256(str(patient).encode()).hexdigest(), 16) % 10
                               for patient in table.patient_id]
    table = table.reindex(columns=["item", *COLUMNS]).drop(columns=["ecg_id", "source"])
    with reading(path, "mend it"):
        check_people(table)
    return table, {}, vocabulary


def digest_of(table):
    """Digest of a table of records and of their files' sizes and times. Raises InputError for
    files that are not there.
    """
    digest = hashlib.sha256(f"format {FORMAT} {table.drop(columns='item').to_csv()}".encode())
    files = dict.fromkeys(file for file, _ in table.item)
    missing = [file for file in files if not file.exists()]
    if missing:
        raise InputError(f"{len(missing)} of {len(files)} files of records are missing, such as "
                         f"{missing[0]}; get them: python data.py download")
    for file in files:
        for part in (file, file.with_suffix(".dat"), file.with_suffix(".mat")):  # samples too
            if part.exists():
                stat = part.stat()
                digest.update(f"{part} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()


def try_record(item, rate, given):
    """((T, C) int16 microvolt, None) of a recording's first 10 s, or (None, what is wrong).

    given: keywords of read_recording()
    """
    try:
        recording = read_recording(*item, **given)
        windows, _, _ = prepare(recording, rate)
        x = np.rint(windows[0])
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
    index: object  # a DataFrame of COLUMNS
    meta: dict
    copies: dict = field(default_factory=dict)  # device -> the signals as a tensor there

    def __reduce__(self):  # a spawned worker maps the file again, and gets no copy of it
        return open_cache, (self.folder,)

    def rows(self, folds):
        """Row numbers of the records in the given folds."""
        return np.flatnonzero(self.index.strat_fold.isin(folds))


def source_names(meta):
    """The names of the sources of a cache, from its meta.json."""
    return " + ".join(Path(path).name for path in meta["data"].split(" + "))


def join_sources(paths, rate):
    """Sources as one table like that of open_source(), and what meta.json says of them.

    Raises InputError for sources of the same name.
    """
    import pandas as pd

    paths = [Path(path).resolve() for path in paths]
    names = [path.name if path.is_dir() else path.stem for path in paths]
    if len(set(names)) < len(names):
        raise InputError(f"sources {' '.join(names)}: two of one name; rename a folder or file")
    tables, label_sets, vocabulary = [], {}, {}
    for path, name in zip(paths, names):
        table, sets, vocabulary[name] = open_source(path, rate)
        tables.append(table.assign(source=name))
        label_sets |= sets
    table = pd.concat(tables, ignore_index=True)
    if len(paths) > 1 or not label_sets:  # else numbers are PTB-XL's own
        table["ecg_id"] = 0  # given when it is known which records are usable
        table["patient_id"] = table.groupby(["source", table.patient_id.astype(str)]).ngroup()
    table["statements"] = table.statements.map(json.dumps)
    synthetic = any((path / SYNTHETIC).exists() for path in paths)
    return table[["item", *COLUMNS]], dict(
        format=FORMAT, rate=rate, data=" + ".join(map(str, paths)), synthetic=synthetic,
        label_sets=label_sets, vocabulary=vocabulary)


def write_signals(results, names, path):
    """Write what try_record() gave of each recording to path, but no samples twice.

    ->  the number of the recording of each signal, what was unusable, what was there already
    """
    numbers, bad, twice, first = [], [], [], {}
    with open(path, "wb") as file:
        for number, (x, problem) in enumerate(results):
            if problem:
                bad.append(problem)
                continue
            digest = hashlib.sha256(x).digest()
            if digest in first:
                twice.append(f"{names[number]}: the same samples as {first[digest]}")
                continue
            first[digest] = names[number]
            file.write(x)
            numbers.append(number)
    return numbers, bad, twice


def build_cache(paths, rate, out, workers=None, skip_bad=False, given=()):
    """Read every record of one or several sources once into the cache folder `out`, unless it is
    there already; what has the same samples as one before is left out.

    paths: see open_source(); given: see try_record(). Raises InputError when records are missing
    or unusable; with skip_bad the latter are left out.
    """
    out = Path(out).resolve()  # it may be a link to another disk
    paths = [paths] if isinstance(paths, (str, Path)) else paths
    given = {name: value for name, value in dict(given).items() if value}
    table, meta = join_sources(paths, rate)
    meta["source"] = f"{digest_of(table)} {json.dumps(given)}"
    if out.exists():
        if not (out / "meta.json").exists():
            raise InputError(f"{out} exists and is no cache; remove it, or give another --out")
        with reading(out, f"remove it: rm -r {out}"):
            old = dict(json.loads((out / "meta.json").read_text()))
        if old.get("source") == meta["source"]:
            old = open_cache(out).meta
            print(f"{out}: up to date, {old['records']} records, {len(old['left_out'])} left out")
            return
        print(f"{out} is of other data or code: it is made anew", flush=True)

    new, was = (out.with_name(f"{out.name}.{word}-{os.getpid()}") for word in ("new", "was"))
    for folder in (new, was):  # of a process of the same number that was killed
        shutil.rmtree(folder, ignore_errors=True)
    new.mkdir(parents=True)
    # Ctrl-C is for this process alone, which then cancels what has not begun.
    pool = ProcessPoolExecutor(workers, initializer=signals.signal,
                               initargs=(signals.SIGINT, signals.SIG_IGN))
    try:
        results = pool.map(partial(try_record, rate=rate, given=given), table.item, chunksize=32)
        bar = tqdm(results, "cache", len(table), unit="record", disable=None)
        numbers, bad, twice = write_signals(bar, table.record, new / "signals.int16")
        if bad and not (skip_bad and numbers):
            raise InputError(f"{len(bad)} of {len(table)} records cannot be used; mend them, "
                             "or leave them out with --skip-bad:\n  " + "\n  ".join(bad[:10]))
        index = table.iloc[numbers].drop(columns="item")
        if not index.ecg_id.all():
            index["ecg_id"] = range(1, len(index) + 1)
        index.to_csv(new / "index.csv", index=False)
        # what pretraining depends on: the samples, and who is in which fold
        text = sha256(new / "signals.int16") + index[
            ["ecg_id", "patient_id", "strat_fold"]].to_csv(index=False)
        meta |= dict(records=len(index), left_out=bad + twice, index=sha256(new / "index.csv"),
                     fingerprint=hashlib.sha256(text.encode()).hexdigest())
        write_json(new / "meta.json", meta)
        if out.exists():
            out.rename(was)  # removing takes longer: a kill before the next line loses it
        new.rename(out)
    finally:
        pool.shutdown(cancel_futures=True)
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(was, ignore_errors=True)
    print(f"{out}: {len(index)} records at {rate} Hz, {len(meta['left_out'])} left out")
    for problem in meta["left_out"]:
        print(f"  left out: {problem}")


def open_cache(folder):
    """The Cache in a folder; raise InputError when missing, truncated or of another format."""
    import pandas as pd

    folder = Path(folder)
    make = f"python data.py cache --data DIR --rate HZ --out {folder}"
    if not (folder / "meta.json").exists():
        raise InputError(f"no cache in {folder}; make it: {make}")
    with reading(folder, f"make it again: rm -r {folder}; {make}"):
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if meta["format"] != FORMAT:
            raise ValueError(f"format {meta['format']}, this code reads {FORMAT}")
        if sha256(folder / "index.csv") != meta["index"]:
            raise ValueError("index.csv is not the one that was written")
        index = pd.read_csv(folder / "index.csv", dtype=dict(source=str, record=str))
        signals = np.memmap(folder / "signals.int16", "<i2", "r",
                            shape=(meta["records"], SECONDS * meta["rate"], len(LEADS)))
        return Cache(folder, signals, index, meta)


# Synthetic PTB-XL. A heart dipole (x left, y foot, z back; mV) is a sum of Gaussian waves (after
# McSharry et al. 2003, doi 10.1109/TBME.2003.808805), projected on the leads by Dower's matrix
# (Dower, Machado, Osborne 1980, Clin. Cardiol. 3:87); limb leads follow from I and II.

DOWER = np.array([  # dipole to I, II and V1 to V6
    [.632, .235, -.515, .044, .882, 1.213, 1.125, .831],
    [-.235, 1.066, .157, .164, .098, .127, .127, .076],
    [.059, -.132, -.917, -1.387, -1.277, -.601, -.086, .230]])
# wave: time from R (s), width (s), dipole x, y, z (mV); R' and ST are flat in health
WAVES = {"P": (-.16, .022, .05, .11, -.02), "Q": (-.022, .009, -.13, -.05, -.25),
         "R": (0, .012, 1., .7, .25), "S": (.028, .010, -.15, -.1, .40),
         "R'": (.062, .018, 0, 0, 0), "ST": (.11, .035, 0, 0, 0), "T": (.27, .05, .26, .24, -.14)}
CHANGES = {  # SCP code: its superclass, and the dipole of each wave that full disease changes
    "NORM": ("NORM", {}),
    "AMI": ("MI", {"Q": (-.26, -.05, .27), "ST": (.04, 0, -.15), "T": (.21, .24, .06)}),
    "ISC_": ("STTC", {"ST": (-.18, -.11, .07), "T": (-.03, -.02, .01)}),
    "NDT": ("STTC", {"T": (-.08, -.07, .04)}),
    "CRBBB": ("CD", {"R'": (-.50, .09, -.68), "T": (.36, .24, -.02)}),
    "LVH": ("HYP", {"R": (2.2, 1.12, .8), "S": (-.3, -.2, .8), "ST": (-.10, -.04, .05),
                    "T": (-.16, .05, .06)})}
RHYTHMS = "SBRAD", "SR", "STACH"  # below 60 beats a minute, up to 100, above


def change_waves(codes, severity):
    """A beat's waves {name: (time, width, x, y, z)}: normal at severity 0, full disease at 1."""
    waves = {name: np.array(wave, float) for name, wave in WAVES.items()}
    for code in codes:
        for name, dipole in CHANGES[code][1].items():
            waves[name][2:] += severity * np.subtract(dipole, WAVES[name][2:])
    return waves


def all_leads(x):
    """I, II and V1 to V6 (..., 8) -> LEADS (..., 12), by Einthoven's and Goldberger's equations."""
    I, II = x[..., 0], x[..., 1]
    limb = np.stack([I, II, II - I, -(I + II) / 2, I - II / 2, II - I / 2], axis=-1)
    return np.concatenate([limb, x[..., 2:]], axis=-1)


def synth_record(codes, heart, rng):
    """One 10 s ECG at 500 Hz: (T, C) float64 mV.

    heart: the patient's own anatomy, a dict of rotation (3, 3), voltage and rate (1/s)
    """
    t = np.arange(SECONDS * 500) / 500
    intervals = rng.normal(1, .03, SECONDS * 3 + 4) / heart["rate"]
    beats = np.cumsum(intervals) - rng.uniform(1, 2) / heart["rate"]  # some before 0
    dipole = np.zeros((len(t), 3))
    for start, width, *vector in change_waves(codes, rng.uniform(0, .8)).values():
        if start > .08:  # ST and T follow the rate (Bazett), the QRS does not
            start, width = start / heart["rate"] ** .5, width / heart["rate"] ** .5
        z = (t[:, None] - beats - start) / width  # (T, beats)
        dipole += np.outer(np.exp(-z * z / 2).sum(1), heart["rotation"] @ vector)
    muscle = rng.normal(0, rng.lognormal(np.log(.03), .5), (len(t), 8))
    breath = np.sin(2 * np.pi * (rng.uniform(.1, .35) * t + rng.random()))
    wander = np.outer(breath, rng.normal(0, .08, 8))  # of the baseline
    return all_leads(heart["voltage"] * dipole @ DOWER + muscle + wander)


def random_patient(number, rng):
    """A patient's row of the table, SCP codes and heart; two in five are normal."""
    codes = ["NORM"]
    if rng.random() > .4:  # one in five of them in two ways
        codes = rng.choice(list(CHANGES)[1:], 1 + (rng.random() < .2), replace=False).tolist()
    heart = dict(rotation=Rotation.from_rotvec(rng.normal(0, .45, 3)).as_matrix(),
                 voltage=rng.lognormal(0, .3), rate=np.clip(rng.normal(75, 16), 45, 130) / 60)
    rhythm = RHYTHMS[np.digitize(heart["rate"] * 60, (60, 100))]
    row = dict(patient_id=number, age=int(np.clip(rng.normal(60, 16), 18, 89)),
               sex=int(rng.integers(2)), strat_fold=1 + (number - 1) % 10, report="synthetic",
               scp_codes=str(dict.fromkeys([*codes, rhythm], 100.0)))
    return row, codes, heart


def synthesize(out, records, seed=0):
    """Write a synthetic PTB-XL: `records` WFDB records at both rates, tables, checksums.

    About one patient in six has two records. Raises InputError when `out` holds something else.
    """
    import pandas as pd

    out, rng, rows, patient = Path(out), np.random.default_rng(seed), [], 0
    if out.is_file() or out.exists() and any(out.iterdir()) and not (out / SYNTHETIC).exists():
        raise InputError(f"{out} is not empty and holds no synthetic data; give another --out")
    shutil.rmtree(out, ignore_errors=True)
    for ecg_id in tqdm(range(1, records + 1), "synth", unit="record", disable=None):
        if patient == 0 or rng.random() > 1 / 6:
            patient += 1
            row, codes, heart = random_patient(patient, rng)
        signal, names = synth_record(codes, heart, rng), {}
        for rate, end in ((100, "lr"), (500, "hr")):
            names[RATES[rate]] = f"records{rate}/{ecg_id // 1000 * 1000:05d}/{ecg_id:05d}_{end}"
            path = out / names[RATES[rate]]
            path.parent.mkdir(parents=True, exist_ok=True)
            x = np.rint(resample_poly(signal, rate, 500, axis=0) * 1000).clip(-32000, 32000)
            x = x.astype("<i2")
            x.tofile(f"{path}.dat")
            header = [f"{path.name} 12 {rate} {len(x)}"]  # wfdb.wrsamp takes ten times as long
            header += [f"{path.name}.dat 16 1000.0(0)/mV 16 0 {column[0]} "
                       f"{column.sum(dtype='<i2')} 0 {lead.upper()}"
                       for lead, column in zip(LEADS, x.T)]
            Path(f"{path}.hea").write_text("\n".join(header) + "\n")
        rows.append(dict(ecg_id=ecg_id, **row, **names))
    pd.DataFrame(rows).to_csv(out / TABLES[0], index=False)
    statements = [dict(code=code, diagnostic=1, form=0, rhythm=0, diagnostic_class=superclass,
                       diagnostic_subclass=code) for code, (superclass, _) in CHANGES.items()]
    statements += [dict(code=code, diagnostic=0, form=0, rhythm=1) for code in RHYTHMS]
    pd.DataFrame(statements).to_csv(out / TABLES[1], index=False)
    write_text(out / SYNTHETIC, f"Synthetic records, seed {seed}: a model, not patients.\n")
    files = sorted(file for file in out.rglob("*") if file.is_file())
    write_text(out / "SHA256SUMS.txt",
               "".join(f"{sha256(file)} {file.relative_to(out)}\n" for file in files))
    print(f"{out}: {records} synthetic records of {patient} patients, both rates")


def info(paths, spec="superclass"):
    """Print records of sources by fold and class of a label set (Table 1 of the paper)."""
    import pandas as pd

    table, meta = join_sources(paths, 100)
    labels = read_labels(Cache(None, None, table, meta), spec)
    counts = pd.DataFrame(labels.y * labels.member[:, None], columns=labels.classes)
    counts = counts.assign(one=counts.sum(axis=1) == 1, members=labels.member, records=1)
    folds = counts.groupby(table.strat_fold).sum().T
    synthetic = " (synthetic)" if meta["synthetic"] else ""
    print(f"{source_names(meta)}{synthetic}: {labels.name} by fold; one: records of one class")
    print(folds.assign(all=folds.sum(axis=1)).to_string())
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
    p = commands.add_parser("cache", help="records of one or more sources in one array", **style)
    add_shared(p, "data", "rate")
    p.add_argument("--unit", help="of recordings that do not tell it: mV, uV or V")
    p.add_argument("--source-rate", type=float, help="theirs, in Hz")
    p.add_argument("--leads", nargs="+", help="theirs, in the order of the columns")
    p.add_argument("--out", default="cache/ptbxl-500", help="cache folder")
    p.add_argument("--workers", type=int, default=None, help="processes; None: one a core")
    p.add_argument("--skip-bad", action="store_true", help="leave out records that are unusable")
    p = commands.add_parser("synth", help="synthetic records in the same layout", **style)
    p.add_argument("--out", default="data/synth", help="folder to write")
    p.add_argument("--records", type=bounded(int, 20), default=400, help="how many")
    p.add_argument("--seed", type=bounded(int, 0), default=0, help="same seed, same records")
    p = commands.add_parser("info", help="counts by fold and class", **style)
    add_shared(p, "data", "labels_of")
    return parser.parse_args(argv)


def main(args):
    if args.command == "download":
        download(args.data, args.rate, args.url)
    elif args.command == "cache":
        given = dict(rate=args.source_rate, unit=args.unit, leads=args.leads)
        build_cache(args.data, args.rate, args.out, args.workers, args.skip_bad, given)
    elif args.command == "synth":
        synthesize(args.out, args.records, args.seed)
    else:
        info(args.data, args.labels_of)


if __name__ == "__main__":
    run_script(lambda: main(get_args()))
