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
import zipfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from scipy.signal import butter, resample_poly, sosfilt
from scipy.spatial.transform import Rotation
from tqdm import tqdm

LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
CLASSES = ("NORM", "MI", "STTC", "CD", "HYP")  # of the default label set, PTB-XL's superclasses
PEOPLE = ("ecg_id", "patient_id", "strat_fold")  # the columns that decide who is trained on
COLUMNS = (*PEOPLE, "age", "sex", "source", "record", "statements")  # of index.csv
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
    rate=dict(type=int, choices=RATES, default=500, help="Hz"),
    cache=dict(help="folder of: python data.py cache; by default the run's own"),
    device=dict(default="auto", help="auto, cpu, cuda, cuda:1, mps"),
    labels_of=dict(default="superclass", help="a label set: superclass, subclass, diagnostic, "
                   "form, rhythm or all of PTB-XL; or codes or columns, each a class: 'AFIB AFLT'; "
                   "or several that make a class: AF=AFIB+AFLT"),
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
    """How texts name a fold or several: "fold 10", "folds 9 and 10", "folds 1-8"."""
    folds = sorted([folds] if isinstance(folds, (int, np.integer)) else set(folds))
    first, last = folds[0], folds[-1]
    if len(folds) == 1:
        return f"fold {first}"
    if len(folds) == 2:
        return f"folds {first} and {last}"
    if len(folds) == last - first + 1:
        return f"folds {first}-{last}"
    return f"folds {', '.join(map(str, folds))}"


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
        raise OSError(f"{path} cannot be written ({str(error)[:80]}); is the disk full? What was "
                      "there is kept: make room, and give the same command again") from error
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


def read_arrays(path):
    """The arrays of an .npz file; an error of any kind if its bits are not what was written."""
    if part := zipfile.ZipFile(path).testzip():  # NumPy looks at checksums of what it reads alone
        raise ValueError(f"{part} has changed since it was written")
    with np.load(path) as arrays:
        return dict(arrays)


def sha256(*paths):
    """Hex digest of a file, or of several one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def goes_down(name):
    """Whether a path leads down from where it starts, as it is written: not absolute, without .."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


# Until their last users are rewritten
NORMALISATION = f"each lead of each {SECONDS} s: mean 0, standard deviation 1"


@contextmanager
def writing(path):
    try:
        yield
    except OSError as error:
        raise OSError(f"{path} cannot be written ({str(error)[:80]})") from error


# Download

def open_session():
    """An HTTP session that asks a busy or failing server again, with growing pauses."""
    import requests  # here, as pandas, wfdb and h5py below: loading an encoder needs none of them
    from requests.adapters import HTTPAdapter
    from urllib3.util import Retry

    session = requests.Session()
    retry = Retry(TRIES, backoff_factor=BACKOFF_S, backoff_max=PAUSE_S, retry_after_max=PAUSE_S,
                  status_forcelist=(429, 500, 502, 503, 504), raise_on_status=False)
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry))
    return session


def fetch_file(session, url, path, digest=None):
    """Download url to path, checked against its SHA-256; raise InputError when it cannot be had."""
    import requests

    for _ in range(TRIES):  # what urllib3 does not try again: bodies cut short, or wrong
        try:
            answer = session.get(url, timeout=TIMEOUT_S)
            answer.raise_for_status()
        except requests.HTTPError as error:
            raise InputError(str(error)) from error
        except requests.RequestException as error:
            problem = str(error)
            continue
        got = hashlib.sha256(answer.content).hexdigest()
        if digest in (None, got):
            write_atomic(path, lambda tmp: tmp.write_bytes(answer.content))
            return
        problem = f"its SHA-256 is {got}, SHA256SUMS.txt says {digest}"
    raise InputError(f"{url}: {problem}")


def read_sums(path):
    """SHA256SUMS.txt as {file: digest}; raise InputError on a line of another form.

    A path out of its folder is refused: a server must not choose where to write.
    """
    sums = {}
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.strip().partition(" ")
        name = name.strip().lstrip("*")
        if not (re.fullmatch("[0-9a-f]{64}", digest) and goes_down(name)):
            raise InputError(f"{path}: {line[:80]!r} is not 'digest file' of a file within its "
                             "folder; is the address right?")
        sums[name] = digest
    return sums


def download(folder, rate, url=URL, workers=8):
    """Fetch what `rate` needs of PTB-XL into folder; files that are there and whole are kept.

    Raises InputError when files cannot be had, OSError of a full disk; run again to go on.
    """
    folder, url = Path(folder), url.rstrip("/") + "/"
    session = open_session()  # its pool of connections serves all threads
    fetch_file(session, url + "SHA256SUMS.txt", folder / "SHA256SUMS.txt")
    sums = read_sums(folder / "SHA256SUMS.txt")
    if not set(TABLES) <= set(sums):
        raise InputError(f"{url} does not list {' and '.join(TABLES)}: not a PTB-XL folder")
    wanted = [name for name in sums
              if name in (*TABLES, "LICENSE.txt", SYNTHETIC) or name.startswith(f"records{rate}/")]
    new = [name for name in wanted if not (folder / name).exists()]
    # SHA256SUMS.txt has no sizes: a data file is known from the rate, a header takes a disk block
    size = sum(cache_bytes(1, rate) if name.endswith(".dat") else 4096 for name in new)
    free = shutil.disk_usage(folder).free
    print(f"{url}: {len(wanted)} files, {len(new)} to come, {size / 1e6:,.1f} MB: at 5 MB/s some "
          f"{math.ceil(size / 5e6 / 60)} min", flush=True)
    if free < size:
        raise InputError(f"{folder} has no room for {size / 1e6:,.1f} MB: {free / 1e6:,.1f} MB are "
                         "free; make room, or give another folder")

    def ensure(name):
        if not ((folder / name).exists() and sha256(folder / name) == sums[name]):
            fetch_file(session, url + name, folder / name, sums[name])

    pool, failed = ThreadPoolExecutor(workers), []
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
        pool.shutdown(cancel_futures=True)
    if failed:
        raise InputError(f"{len(failed)} files could not be downloaded; the rest is kept, run the "
                         "same command again to go on:\n  " + "\n  ".join(failed[:5]))
    (folder / f".complete-{rate}").touch()
    print(f"{folder}: {len(wanted)} files at {rate} Hz, all checksums right")


# Labels: a source tells statements of a record, {code: 1 or 0}; a label set says which of them make
# a class: {class: [codes]}. A record has a class when any of the class's codes is 1.

@dataclass(frozen=True)
class Labels:
    """A label set over the N records of a cache, with K classes.

    y: (N, K) int, 1 where a record has the class, else 0
    member: (N,) bool, the records that take part
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

    with reading(path, "get it again: python data.py download, or synth"):
        table = pd.read_csv(path, index_col=0)
        if table.index.has_duplicates:
            raise ValueError(f"{table.index[table.index.duplicated()][0]} is in two rows")
        # coerced: one cell that is no number would make text of all, and lose every label
        codes = {kind: list(table.index[pd.to_numeric(table[kind], errors="coerce") == 1])
                 for kind in ("diagnostic", "form", "rhythm")}
        superclass, subclass = table.diagnostic_class, table.diagnostic_subclass
    sets = dict(superclass={name: [] for name in CLASSES}, subclass={})
    for name in CLASSES:
        for code in codes["diagnostic"]:
            if superclass[code] == name:
                sets["superclass"][name].append(code)
                sets["subclass"].setdefault(str(subclass[code]), []).append(code)
    for kind in codes:
        sets[kind] = {code: [code] for code in codes[kind]}
    sets["all"] = {code: [code] for code in table.index}
    return sets


def own_label_set(spec, counts, sets):
    """The label set {class: [codes]} of words CODE or NAME=CODE+CODE; raises InputError.

    counts: a Counter of the codes that there are; sets: names of label sets that there are
    """
    classes = {}
    for word in spec.split():
        if word in counts or "=" not in word:
            name, codes = word, [word]
        else:
            name, _, listed = word.partition("=")
            codes = listed.split("+")
        unknown = [code for code in codes if code not in counts]
        if unknown or name in classes:
            fault = f"{unknown[0]!r} is unknown" if unknown else f"{name!r} is there twice"
            there = ", ".join(f"{code} ({n})" for code, n in counts.most_common(80)) or "none"
            raise InputError(
                f"labels {spec!r}: {fault}; give a label set ({', '.join(sets)}), or statements, "
                f"each a class, or NAME=CODE+CODE. Statements (records that have them): {there}")
        classes[name] = codes
    if not classes:
        raise InputError("no labels given; give such as superclass")
    return classes


def assign_labels(statements, spec, label_sets, vocabularies):
    """The Labels that `spec` asks for, of N records; see read_labels().

    statements: a dict {code: 1 or 0} a record; vocabularies: for each record the codes whose
    absence means 0, unless its source tells nothing of it at all
    """
    sets = dict(superclass={name: [] for name in CLASSES}) | label_sets
    counts = Counter({code: 0 for codes in set(map(tuple, vocabularies)) for code in codes})
    for told in statements:
        counts.update(told)
    if spec in sets:  # a table may have a column of the class's name instead of its codes
        classes = {name: [*codes, name] for name, codes in sets[spec].items()}
    else:
        classes = own_label_set(spec, counts, sets)

    column = {code: i for i, code in enumerate(dict.fromkeys(sum(classes.values(), [])))}
    answer = np.full((len(statements), len(column)), -1)  # 1, 0, or -1: not known
    for row, (told, vocabulary) in enumerate(zip(statements, vocabularies)):
        if told:
            answer[row, [column[code] for code in vocabulary if code in column]] = 0
        for code in column.keys() & told.keys():
            answer[row, column[code]] = told[code]

    parts = [answer[:, [column[code] for code in codes]] for codes in classes.values()]
    y = np.stack([(part == 1).any(1) for part in parts], axis=1)  # (N, K)
    known = np.stack([(part >= 0).all(1) for part in parts], axis=1) | y
    member = y.any(1) if spec in sets else known.all(1)
    return Labels(" ".join(spec.split()), tuple(classes), y.astype(int), member)


def read_labels(cache, spec="superclass"):
    """The Labels that `spec` asks for, of the N records of a cache.

    spec: a named set of PTB-XL, of which records with at least one label take part; or words CODE,
    each a class, or NAME=CODE+CODE, of which those take part for which all labels are known.
    Raises InputError for unknown words.
    """
    statements = [json.loads(text) for text in cache.index.statements]
    vocabularies = [cache.meta["vocabulary"][source] for source in cache.index.source]
    return assign_labels(statements, spec, cache.meta["label_sets"], vocabularies)


# Tables

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

    fold = pd.to_numeric(table.strat_fold, errors="coerce")
    refuse_cells(path, table.strat_fold, ~fold.isin(range(1, 11)), "an integer from 1 to 10")
    table["strat_fold"] = fold.astype(int)
    folds = table.groupby(table.patient_id.astype(str)).strat_fold.transform("nunique")
    refuse_cells(path, table.patient_id, folds > 1,
                 "a patient in one fold alone: test records would be seen in training")
    for column, valid in (table.age, "a number"), (table.sex, "0 for male, 1 for female"):
        unclear = pd.to_numeric(column, errors="coerce").isna() & column.notna()
        refuse_cells(path, column, unclear, f"{valid}, or nothing where it is not known")


def parse_codes(text):
    """The statements {SCP code: 1} in a cell of scp_codes; None if it holds no dict of codes."""
    try:
        codes = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    if isinstance(codes, dict) and all(isinstance(code, str) for code in codes):
        return dict.fromkeys(codes, 1)  # whatever the likelihood: Table 1 of the paper counts so


def load_tables(folder):
    """The record table of a PTB-XL folder, with a column `statements`: {SCP code: 1}.

    Raises InputError for a missing table or column and for cells that cannot be.
    """
    import pandas as pd

    path = Path(folder) / TABLES[0]
    with reading(path, f"give a folder in PTB-XL's layout with --data, or get it: python data.py "
                 f"download --data {folder} --rate 100|500"):
        table = pd.read_csv(path)
    lacking = {*PEOPLE, "age", "sex", "scp_codes", *RATES.values()} - set(table)
    if lacking or table.empty:
        raise InputError(f"{path} lacks {', '.join(sorted(lacking)) or 'records'}; get it again")
    for column in ("ecg_id", "patient_id"):
        number = pd.to_numeric(table[column], errors="coerce").astype(float)
        refuse_cells(path, table[column], ~((number.abs() < 1e15) & (number % 1 == 0)),
                     "an integer")
        table[column] = number.astype(int)
    refuse_cells(path, table.ecg_id, table.ecg_id.duplicated(keep=False), "each once")
    for column in RATES.values():
        names = table[column] = table[column].fillna("").astype(str)
        refuse_cells(path, names, ~names.map(goes_down), f"a path within {folder}")
        # else the check of patients could be passed by while test records are trained on
        refuse_cells(path, names, names.map(os.path.normpath).duplicated(keep=False),
                     "another record in each row")
    table["statements"] = table.scp_codes.map(parse_codes)
    refuse_cells(path, table.scp_codes, table.statements.isna(), "a dict such as {'NORM': 100.0}")
    check_people(path, table)
    return table


# Records and recordings

UNITS = {"v": 1e6, "mv": 1e3, "uv": 1.0, "µv": 1.0, "μv": 1.0}  # microvolt; micro has two signs
ARRAYS = ".npy", ".npz", ".h5", ".hdf5"  # ends of files that may hold several recordings
ENDS = ".hea", ".csv", *ARRAYS
KEYS = {"rate": ("rate", "fs", "sampling_rate"), "unit": ("unit", "units"),
        "leads": ("leads", "lead_names", "sig_name"), "ids": ("ids", "ecg_id", "exam_id")}
PLAUSIBLE_MV = 0.3, 5  # range of a lead, median over a record's; of 488 real ones 0.57 to 4.5


@dataclass
class Recording:
    """A recording as a file has it: signal (T, n) at `rate` Hz; unit: one name, or one a lead."""

    name: str
    signal: np.ndarray
    rate: float
    unit: list
    leads: list


def open_wfdb(path):
    """The wfdb.Record of a header, with d_signal (T, n); raises whatever wfdb meets in it.

    A header that tells of more samples than its files can hold would cost memory, and one of a
    gain of 0 (unknown) is read by wfdb as 200 per mV: they are refused.
    """
    import wfdb

    lines = [line for line in path.read_text(errors="replace").splitlines()
             if line.strip() and not line.startswith("#")]
    head, files = lines[0].split(), {line.split()[0] for line in lines[1:]}
    if strange := [name for name in files if Path(name).name != name]:
        raise ValueError(f"samples in {strange[0]}; needs a file beside the header")
    size = sum((path.parent / name).stat().st_size for name in files)
    if len(head) > 3 and int(head[1]) * int(head[3]) > size:  # a byte a sample is the least
        raise ValueError(f"{head[1]} leads of {head[3]} samples in {size} bytes")
    if any(re.match(r"\S+\s+\S+\s+[-+]?[0.]+([(/e\s]|$)", line) for line in lines[1:]):
        raise ValueError("a gain of 0")
    if len(head) <= 4:
        return wfdb.rdrecord(str(path.with_suffix("")), physical=False)
    # wfdb refuses a header whose date cannot be (00/00/0000), so it reads one without time and date
    with tempfile.TemporaryDirectory() as folder:
        for name in files:
            (Path(folder) / name).symlink_to((path.parent / name).resolve())
        copy = Path(folder) / path.name
        copy.write_text("\n".join([" ".join(head[:4]), *lines[1:]]))
        return wfdb.rdrecord(str(copy.with_suffix("")), physical=False)


def read_record(path, rate):
    """One WFDB record as (T, C) int16 microvolt, leads in the order of LEADS, found by name.

    Raises InputError for what makes it unusable; a flat lead is usable (see normalize).
    """
    path, T = Path(path), SECONDS * rate

    def need(good, problem):
        if not good:
            raise InputError(f"{path.name}: {problem}")

    with reading(path.name, "header and samples may disagree"):
        record = open_wfdb(path.with_suffix(".hea"))
        names = [(name or "?").strip().upper() for name in record.sig_name or ()]
        need(sorted(names) == sorted(lead.upper() for lead in LEADS),
             f"{record.n_sig} leads {' '.join(names)[:200]}; needs {' '.join(LEADS)}")
        need(record.fs == rate and record.sig_len == T,
             f"{record.sig_len} samples at {record.fs:g} Hz; needs {T} at {rate} Hz")
        need(set(record.units) == {"mV"}, f"units {' '.join(sorted(set(record.units)))}; needs mV")
        need(all(1 <= gain <= 1e6 for gain in record.adc_gain),
             f"gains {sorted(set(record.adc_gain))}; needs 1 to 1e6 per mV")
        sums = record.d_signal.sum(0)
        need(None in record.checksum or not ((sums - record.checksum) % 65536).any(),
             "the samples do not add up to the header's checksum")
        signal = record.dac() * 1000  # microvolt; WFDB's invalid samples become NaN here
        need((np.abs(signal) <= np.iinfo(np.int16).max).all(),
             f"{int(np.isnan(signal).any(1).sum())} time points hold an invalid sample, or a value "
             "exceeds 32.767 mV")
    order = [names.index(lead.upper()) for lead in LEADS]
    return np.rint(signal[:, order]).astype("<i2", order="C")


def list_recordings(paths):
    """[(file, row)] of all recordings in files and folders; row: in a file of several, else None.

    Raises InputError when there is none.
    """
    found = []
    for path in map(Path, paths):
        if not path.exists() and path.with_name(path.name + ".hea").exists():
            path = path.with_name(path.name + ".hea")  # as WFDB names a record
        if path.suffix in (".dat", ".mat"):
            path = path.with_suffix(".hea")
        files = [file for file in (sorted(path.rglob("*")) if path.is_dir() else [path])
                 if file.suffix.lower() in (*ENDS, ".edf") and file.is_file()
                 and not (path.is_dir() and is_about(file))]
        if not files:
            raise InputError(f"{path} holds no recording: give files, or folders of files, that end"
                             f" in {' '.join(ENDS)} (a .mat file needs its .hea)")
        for file in files:
            found += [(file, row) for row in count_rows(file)]
    return found


def is_about(path):
    """Whether a CSV file is about recordings, and none itself: words at its head, but no lead."""
    if path.suffix.lower() != ".csv":
        return False
    with open(path, errors="replace") as file:
        head = [cell.strip(' "') for cell in file.readline().strip().split(",")]
    return any(re.search("[A-Za-z]{3}", cell) for cell in head) and not any(map(lead_name, head))


def count_rows(path):
    """The rows of a file of several recordings, or [None] for a file of one."""
    if path.suffix.lower() in ARRAYS:
        try:
            shape = open_arrays(path)["signal"].shape
        except Exception:  # it is said, file by file, when they are read
            return [None]
        if len(shape) == 3:
            return range(shape[0])
    return [None]


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
        arrays = dict(file.attrs)
        for name, array in file.items():
            if hasattr(array, "shape"):
                arrays |= {**array.attrs, name: array}
    signals = [name for name, array in arrays.items() if np.ndim(array) in (2, 3)]
    if len(signals) != 1:
        raise ValueError(f"{len(signals)} arrays with two or three axes {signals}; needs one: "
                         "(time, leads), or several of these")
    stated = {key: np.ravel(arrays[name]) for key, names in KEYS.items() for name in names
              if name in arrays}
    return stated | dict(signal=arrays[signals[0]])


def read_columns(path):
    """A CSV file of a column a lead, and perhaps one of `time` in s: a dict like open_arrays()."""
    import pandas as pd

    table = pd.read_csv(path)
    if not any(map(lead_name, table)):  # without names
        return dict(signal=pd.read_csv(path, header=None).to_numpy())
    stated = {}
    for name in [name for name in table if name.lower() == "time"]:
        step = np.median(np.diff(table.pop(name)))
        stated["rate"] = [round(1 / step, 4)]
    return stated | dict(signal=table.to_numpy(), leads=list(table))


def read_wfdb(path):
    """A record of a WFDB header: a dict like open_arrays()."""
    record = open_wfdb(path)
    leads = record.sig_name if any(record.sig_name) else []  # a lead without a name is None
    return dict(signal=record.dac(), rate=[record.fs], leads=leads,
                unit=[unit or "?" for unit in record.units])


def read_recording(path, row=None, rate=None, unit=None, leads=None):
    """The Recording in a WFDB, .npy, .npz, CSV or HDF5 file; row: where it holds several.

    rate (Hz), unit (mV, uV or V) and leads (names, in the order of the columns) stand in for what
    the file does not tell. Raises InputError for what lacks or cannot be.
    """
    path = Path(path)
    kind, name = path.suffix.lower(), path.stem if row is None else f"{path.stem}-{row}"
    if kind == ".edf":
        raise InputError(f"{path.name}: EDF is not read, as wfdb gives wrong rates and amplitudes "
                         "for most such files; read it with another library and give an .npz file "
                         "with signal (time, leads), fs, leads and units")
    read = {".hea": read_wfdb, ".csv": read_columns}.get(kind, open_arrays)
    with reading(path.name, "mend it, or give it in another form"):
        stated = read(path)
        signal, ids = stated["signal"], stated.get("ids", ())
        if row is not None:
            name = str(ids[row]) if len(ids) == len(signal) else name
            signal = signal[row]
        signal = np.asarray(signal)
        rate = stated.get("rate", [rate])[0]
        units, names = ([text.decode() if isinstance(text, bytes) else str(text)
                         for text in stated.get(key, ())] for key in ("unit", "leads"))
        if unit and not any(text.lower() in UNITS for text in units):  # none, or none that we know
            units = [unit]
        if leads and not any(map(lead_name, names)):
            names = list(leads)
        lacking = {"--source-rate 500": rate is None, "--unit mV": not units,
                   "--leads I II": not names}
        if any(lacking.values()):
            flags = " ".join(flag for flag, lacks in lacking.items() if lacks)
            raise InputError(f"{path.name} does not tell all; give such as {flags}")
        return Recording(name, signal, float(rate), units, names)


def lead_name(text):
    """The lead of LEADS that a file calls "avr", "ECG V1", "Lead II" or the like; or None."""
    bare = re.sub(r"^(MDC_ECG_LEAD|ECG|EKG|LEAD)[ _:-]*|\s*[\[(].*$", "", text.strip().upper())
    return next((lead for lead in LEADS if lead.upper() == bare), None)


def in_leads(recording):
    """The signal of a Recording in the order of LEADS: (T, C) float64 microvolt; what lacks is 0.

    ->  that, (C,) bool: the leads that are there, and notes for the user. Raises InputError.
    """
    r, names, notes = recording, [lead_name(str(text)) for text in recording.leads], []
    signal, n = r.signal, len(names)
    if signal.ndim == 2 and signal.shape[1] != n == signal.shape[0]:  # (leads, time)
        signal = signal.T
    if signal.ndim != 2 or signal.shape[1] != n or signal.dtype.kind not in "iuf":
        raise InputError(f"{r.name}: an array {signal.shape} of {signal.dtype}, and {n} leads; "
                         "needs numbers (time, leads), in CSV between commas")
    here = {name: i for i, name in enumerate(names) if name}
    if not here or len(here) < n - names.count(None):
        raise InputError(f"{r.name}: leads {' '.join(map(str, r.leads))[:200]}; needs some of "
                         f"{' '.join(LEADS)}, each once")
    units = r.unit if len(r.unit) == n else r.unit * n
    if wrong := {units[i] for i in here.values() if units[i].lower() not in UNITS}:
        raise InputError(f"{r.name}: unit {' '.join(sorted(wrong))}; needs mV, uV or V (--unit)")
    x = np.zeros((len(signal), len(LEADS)))
    for name, i in here.items():
        x[:, LEADS.index(name)] = signal[:, i] * UNITS[units[i].lower()]
    live = np.flatnonzero(np.nan_to_num(x).any(1))
    padding = len(x) - (live[-1] + 1 - live[0]) if len(live) else 0
    if padding > 0.1 * r.rate:
        x = x[live[0]:live[-1] + 1]
        notes.append(f"{padding / r.rate:.1f} s of zeros or NaN at its ends are cut off")
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
    windows = [x[start:start + length] for start in starts]
    live = [window for window in windows if (window.std(0) >= FLAT_UV).any()]
    if len(live) < len(windows):
        notes.append(f"{len(windows) - len(live)} of {len(windows)} windows without a signal left "
                     "out")
    return np.stack(live).astype(np.float32), there, notes


# Sources: PTB-XL's own layout, or recordings from anywhere with what is told of them

@dataclass
class Source:
    """A collection: a row a recording with COLUMNS but ecg_id, and what try_record() reads.

    items: a Path for a record of PTB-XL, else (file, row) of list_recordings(); digest: changes
    when its files do; label_sets, vocabulary: see assign_labels()
    """

    path: Path
    table: object  # a DataFrame
    items: list
    digest: str
    vocabulary: list
    label_sets: dict


def header_facts(path):
    """Age, sex and statements {code: 1} that comments of a WFDB header tell, as the Challenges write
    them: `# Dx:` lists numbers or words.
    """
    text = path.read_text(errors="replace") if path.suffix == ".hea" else ""
    comments = re.findall(r"^# *<?(Age|Sex|Dx)>?:(.*)$", text, re.M | re.I)
    facts = {key.lower(): value.strip() for key, value in comments}
    codes = ["_".join(code.split()) for code in facts.get("dx", "").split(",")]
    age = facts.get("age", "")
    return dict(age=float(age) if age.isdecimal() else math.nan,
                sex={"m": 0, "f": 1}.get(facts.get("sex", "")[:1].lower(), math.nan),
                statements={code: 1 for code in codes if code})


def read_list(path):
    """A CSV file with a row a recording -> its table, with statements, and [(file, row)].

    Columns: path, from its folder on; if known patient_id (or subject_id), strat_fold, age, sex;
    any others of 0, 1 and nothing (not known) become statements. Raises InputError.
    """
    import pandas as pd

    with reading(path, "mend it, or give a folder of recordings"):
        table = pd.read_csv(path)
    if "patient_id" not in table:
        table = table.rename(columns=dict(subject_id="patient_id"))
    if "path" not in table or table.empty:
        raise InputError(f"{path}: a table of recordings needs a column path (and, if known, "
                         "patient_id, strat_fold, age, sex and columns of 0 and 1); it has "
                         f"{len(table)} rows of {', '.join(table)[:200]}")
    facts = [name for name in ("path", "patient_id", "strat_fold", "age", "sex") if name in table]
    statements, unused = [{} for _ in range(len(table))], []
    for name in table.columns.drop(facts):
        value = pd.to_numeric(table[name], errors="coerce")
        if value.isna().all() or not (value.isin((0, 1)) | table[name].isna()).all():
            unused.append(name)
            continue
        for row in np.flatnonzero(value.notna()):
            statements[row]["_".join(name.split())] = int(value[row])
    if unused:
        print(f"note: {path}: columns that are not used, as they hold more than 0, 1 and nothing: "
              f"{', '.join(unused)}")
    items = list_recordings(path.parent / str(name) for name in table.path)
    if len(items) != len(table):
        raise InputError(f"{path}: some of its {len(table)} paths hold several recordings; "
                         "give such a file, or folder, as a source of its own")
    return table[facts].assign(statements=statements), items


def open_source(path, rate):
    """The Source in a folder in PTB-XL's layout, a folder of recordings, a table or a file of them.

    Without patients each recording is one; without folds a hash of the patient gives them. Raises
    InputError.
    """
    import pandas as pd

    path = Path(path)
    if not path.exists() or (path / TABLES[0]).exists():
        return open_ptbxl(path, rate)
    vocabulary = []
    if path.suffix.lower() == ".csv":
        table, items = read_list(path)
    else:
        items = list_recordings([path])
        table = pd.DataFrame([header_facts(file) for file, _ in items])
        vocabulary = sorted({code for statements in table.statements for code in statements})
    home = path if path.is_dir() else path.parent
    table["record"] = [os.path.relpath(file, home) + (f"#{row}" if row is not None else "")
                       for file, row in items]
    if "patient_id" not in table:
        print(f"note: {path}: no patients are told, so each recording counts as one; if some are "
              "of one patient, give a table (CSV with path and patient_id)")
        table["patient_id"] = table.record
    if "strat_fold" not in table:  # the same for a patient wherever else it turns up
        table["strat_fold"] = [1 + int(hashlib.sha256(str(patient).encode()).hexdigest(), 16) % 10
                               for patient in table.patient_id]
    for name in {"age", "sex"} - set(table):
        table[name] = math.nan
    check_people(path, table)
    stems = {file.with_suffix("") for file, _ in items}
    files = [file for folder in sorted({stem.parent for stem in stems})
             for file in sorted(folder.iterdir()) if file.with_suffix("") in stems]  # .dat too
    return Source(path, table, items, digest_of(table, files), vocabulary, {})


def open_ptbxl(folder, rate):
    """The Source in a folder in PTB-XL's layout; raises InputError when records are missing."""
    table, label_sets = load_tables(folder), read_label_sets(folder / TABLES[1])
    table["record"] = table[RATES[rate]]
    items = [folder / name for name in table.record]
    files = [item.with_suffix(end) for item in items for end in (".hea", ".dat")]
    missing = [file for file in files if not file.exists()]
    if missing:
        remedy = f"complete it: python data.py download --data {folder} --rate {rate}"
        if (folder / SYNTHETIC).exists():
            remedy = "make it again: python data.py synth"
        raise InputError(f"{len(missing)} of {len(files)} record files are missing in {folder} "
                         f"(first: {missing[0].name}); {remedy}")
    files += [folder / name for name in TABLES]
    return Source(folder, table, items, digest_of(table, files), list(label_sets["all"]),
                  label_sets)


def digest_of(table, files):
    """Digest of a table and of each file's name, size and time: another when they change."""
    digest = hashlib.sha256(f"format {FORMAT} {table.to_csv()}".encode())
    for file in files:
        stat = file.stat()
        digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()


def try_record(item, rate, given):
    """(windows (W, T, C) int16 microvolt, None) of an item of a Source, or (None, what is wrong).

    given: of recordings from anywhere, what read_recording() takes, and all_windows, without which
    the first one is taken. A worker that never raises.
    """
    try:
        if isinstance(item, Path):
            return read_record(item, rate)[None], None
        given = dict(given)
        count = None if given.pop("all_windows", False) else 1
        recording = read_recording(*item, **given)
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
    index: object  # a DataFrame of COLUMNS
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


def source_names(meta):
    """The names of the sources of a cache, from its meta.json."""
    return " + ".join(Path(path).name for path in meta["data"].split(" + "))


def people_bytes(index):
    """The columns PEOPLE of index.csv: with the samples all that pretraining depends on."""
    return index[list(PEOPLE)].to_csv(index=False).encode()


def join_sources(sources, given):
    """Sources as one table, and what meta.json says of them; raises InputError for equal names."""
    import pandas as pd

    names = [source.path.resolve().stem for source in sources]
    if len(set(names)) < len(names):
        raise InputError(f"sources {' '.join(names)}: needs other names, as results are told by "
                         "them; rename a folder or file")
    table = pd.concat([source.table.assign(source=name) for name, source in zip(names, sources)],
                      ignore_index=True)
    if not (len(sources) == 1 and sources[0].label_sets):  # else patients are PTB-XL's
        table["patient_id"] = table.groupby(["source", table.patient_id.astype(str)]).ngroup()
    digest = json.dumps([*given.items(), *(source.digest for source in sources)])
    label_sets = {}
    for source in sources:
        label_sets |= source.label_sets
    return table, dict(
        source=hashlib.sha256(digest.encode()).hexdigest(),
        data=" + ".join(str(source.path.resolve()) for source in sources),
        synthetic=any((source.path / SYNTHETIC).exists() for source in sources),
        label_sets=label_sets,
        vocabulary={name: source.vocabulary for name, source in zip(names, sources)})


def write_signals(results, names, path):
    """Write what try_record() gave of each recording to path, but no samples twice.

    ->  number of the recording of each signal; how many have a flat lead; what was unusable, and
    what was there already; a hashlib digest of the signals
    """
    numbers, flat, bad, twice, first, digest = [], 0, [], [], {}, hashlib.sha256()
    with open(path, "wb") as file:
        for i, (windows, problem) in enumerate(results):
            if problem:
                bad.append(problem)
                continue
            for signal in windows:
                key = hashlib.sha256(signal).digest()
                if key in first:
                    twice.append(f"{names[i]}: the same samples as {first[key]}")
                    continue
                first[key] = names[i]
                file.write(signal)
                digest.update(signal)  # of what is in memory: a disk's fault is told from it
                numbers.append(i)
                flat += (signal == signal[:1]).all(0).any()
    return numbers, int(flat), bad, twice, digest


def is_up_to_date(out, source):
    """Whether the cache in `out` is of this digest of sources; says so, or why it is made anew.

    Raises InputError when it is something else than a cache, or damaged.
    """
    if not (out / "meta.json").exists():
        if out.exists():
            raise InputError(f"{out} exists and is no cache; remove it, or give another --out")
        return False
    text = (out / "meta.json").read_text(errors="replace")
    if f'"{source}"' not in text:
        old = re.search(r'"format": (\d+)', text)
        reason = "its sources, or what is said of them, have changed"
        if old and int(old[1]) != FORMAT:
            reason = f"it has format {old[1]}, this code reads {FORMAT}"
        print(f"{out}: made anew, as {reason}", flush=True)
        return False
    meta = open_cache(out, check=True).meta
    print(f"{out}: up to date, {meta['records']} records at {meta['rate']} Hz, "
          f"{len(meta['left_out'])} left out")
    return True


def build_cache(paths, rate, out, workers=None, skip_bad=False, given=()):
    """Read every record of one or several sources once into the cache folder `out`, unless it is
    there already; what has the same samples as one before is left out.

    paths: as open_source() takes them; given: as try_record() does. Raises InputError when records
    are missing or unusable; with skip_bad those are left out.
    """
    out, given = Path(out), dict(given)
    paths = [paths] if isinstance(paths, (str, Path)) else paths
    sources = [open_source(path, rate) for path in paths]
    items = [item for source in sources for item in source.items]
    table, meta = join_sources(sources, given)
    if is_up_to_date(out, meta["source"]):
        return
    final = out.resolve()  # out may be a link to another disk
    tmp, old = (final.with_name(f"{final.name}.{word}-{os.getpid()}") for word in ("tmp", "old"))
    tmp.mkdir(parents=True)
    # Ctrl-C is for this process alone, which then cancels what has not begun.
    pool = ProcessPoolExecutor(workers, initializer=signals.signal,
                               initargs=(signals.SIGINT, signals.SIG_IGN))
    try:
        results = pool.map(partial(try_record, rate=rate, given=given), items, chunksize=32)
        bar = tqdm(results, "cache", len(items), unit="record", disable=None)
        numbers, flat, bad, twice, digest = write_signals(bar, table.record, tmp / "signals.int16")
        if bad and not (skip_bad and numbers):
            raise InputError(f"{len(bad)} of {len(items)} records cannot be used; mend them, "
                             "or leave them out with --skip-bad:\n  " + "\n  ".join(bad[:10]))
        index = table.iloc[numbers].assign(statements=lambda table: table.statements.map(json.dumps))
        if "ecg_id" not in sources[0].table or len(sources) > 1:
            index["ecg_id"] = np.arange(1, len(index) + 1)
        index[list(COLUMNS)].to_csv(tmp / "index.csv", index=False)
        digest.update(people_bytes(index))
        meta |= dict(format=FORMAT, rate=rate, records=len(index), records_with_a_flat_lead=flat,
                     left_out=bad + twice, index=sha256(tmp / "index.csv"),
                     fingerprint=digest.hexdigest())
        write_json(tmp / "meta.json", meta)
        if final.exists():
            final.rename(old)  # removing takes longer: a kill before the next line loses it
        tmp.rename(final)
    finally:
        pool.shutdown(cancel_futures=True)
        shutil.rmtree(tmp, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    print(f"{out}: {len(index)} records at {rate} Hz, {flat} with a flat lead, "
          f"{len(meta['left_out'])} left out")
    for problem in meta["left_out"]:
        print(f"  left out: {problem}")


def open_cache(folder, check=False):
    """The Cache in a folder; raise InputError when missing, truncated or of another format.

    check: the samples too, against the fingerprint; of PTB-XL at 500 Hz that takes 4 s, so only
    where the cache is found up to date, which make does before it trains.
    """
    import pandas as pd

    folder = Path(folder)
    make = f"python data.py cache --data DIR --rate HZ --out {folder}"
    if not (folder / "meta.json").exists():
        raise InputError(f"no cache in {folder}; make it: {make}")
    with reading(folder, f"make it again: rm -r {folder}; {make}"):
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if meta["format"] != FORMAT:
            raise ValueError(f"format {meta['format']}, this code reads {FORMAT}")
        shape = (meta["records"], SECONDS * meta["rate"], len(LEADS))
        size = (folder / "signals.int16").stat().st_size
        if size != cache_bytes(meta["records"], meta["rate"]):
            raise ValueError(f"{size} bytes for {shape} samples"[:80])
        if sha256(folder / "index.csv") != meta["index"]:
            raise ValueError("index.csv is not the one that was written")
        index = pd.read_csv(folder / "index.csv", dtype=dict(source=str, record=str))
        if check:
            with open(folder / "signals.int16", "rb") as file:
                digest = hashlib.file_digest(file, "sha256")
            digest.update(people_bytes(index))
            if digest.hexdigest() != meta["fingerprint"]:
                raise ValueError("signals.int16 is not what was written")
        signals = np.memmap(folder / "signals.int16", "<i2", "r", shape=shape)
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
         "R'": (.055, .020, 0, 0, 0), "ST": (.11, .035, 0, 0, 0), "T": (.27, .05, .26, .24, -.14)}
# SCP code: wave, factors of its dipole, and what is then added to its five numbers
CHANGES = {
    "NORM": [],
    "AMI": [("Q", 1, (.002, .004, -.13, 0, .52)),  # lost muscle: the dipole points away at first,
            ("ST", 1, (0, 0, .04, 0, -.15)),  # ST elevation over it, T inverted
            ("T", 1, (0, 0, -.05, 0, .20))],
    "IMI": [("Q", 1, (.002, .004, .05, -.52, -.05)),
            ("R", 1, (0, 0, .03, -.26, -.03)),
            ("ST", 1, (0, 0, -.01, .15, .01)),
            ("T", 1, (0, 0, .02, -.20, -.02))],
    "ISC_": [("ST", 1, (0, 0, -.18, -.11, .07)),  # ST depression in the lateral leads
             ("T", -.1, (0, 0, 0, 0, 0))],
    "NDT": [("T", -.3, (0, 0, 0, 0, 0))],  # flat or inverted T without much ST change
    "CRBBB": [("R'", 1, (.007, -.002, -.50, .09, -.68)),  # late right ventricle: rSR' in V1
              ("T", 1, (0, 0, .10, 0, .12))],
    "CLBBB": [("Q", 0, (0, 0, 0, 0, 0)),  # no septal Q, broad notched R to the left, T against it
              ("R", (.9, .6, 1.6), (-.005, .010, 0, 0, 0)),
              ("R'", 1, (-.007, .004, .95, .19, .67)),
              ("S", 0, (0, 0, 0, 0, 0)),
              ("ST", 1, (0, 0, -.12, -.03, -.12)),
              ("T", (-1, -.3, 2), (0, 0, 0, 0, 0))],
    "LVH": [("R", (2.2, 1.6, 3.2), (0, 0, 0, 0, 0)),  # high voltage to the left and back, strain
            ("S", 2, (0, 0, 0, 0, 0)),
            ("ST", 1, (0, 0, -.10, -.04, .05)),
            ("T", (-.6, .2, -.4), (0, 0, 0, 0, 0))]}
SCP_CLASS = {"NORM": "NORM", "AMI": "MI", "IMI": "MI", "ISC_": "STTC", "NDT": "STTC",
             "CRBBB": "CD", "CLBBB": "CD", "LVH": "HYP"}
RHYTHMS = "SBRAD", "SR", "STACH"  # below 60 beats a minute, up to 100, above


def change_waves(codes, severity):
    """A beat's waves {name: (time, width, x, y, z)}: normal at severity 0, full disease at 1."""
    waves = {name: np.array(wave, float) for name, wave in WAVES.items()}
    for code in codes:
        for name, factor, add in CHANGES[code]:
            sick = waves[name] + add
            sick[2:] = waves[name][2:] * factor + add[2:]
            waves[name] += severity * (sick - waves[name])
    return waves


def all_leads(x):
    """I, II and V1 to V6 (..., 8) -> LEADS (..., 12), by Einthoven's and Goldberger's equations."""
    I, II = x[..., 0], x[..., 1]
    limb = np.stack([I, II, II - I, -(I + II) / 2, I - II / 2, II - I / 2], axis=-1)
    return np.concatenate([limb, x[..., 2:]], axis=-1)


def synth_record(codes, heart, rng):
    """One 10 s ECG at 500 Hz: (T, C) float64 mV.

    heart: the patient's own anatomy, a dict of rotation (3, 3), voltage, width and rate (1/s).
    """
    rate = 500
    t, n = np.arange(SECONDS * rate) / rate, SECONDS * 3 + 4
    breath = rng.uniform(.2, .35)  # 1/s
    mean_rr = 1 / heart["rate"]
    rr = mean_rr * (1 + .03 * np.sin(2 * np.pi * breath * mean_rr * np.arange(n))
                    + .015 * rng.standard_normal(n))  # respiratory and random variability
    beats = np.cumsum(rr) - rng.uniform(1, 2) * mean_rr  # some before 0, some after the end
    dipole = np.zeros((len(t), 3))
    for start, width, *vector in change_waves(codes, rng.uniform(.25, 1)).values():
        late = start > .08  # ST and T follow the rate (Bazett), the QRS does not
        at = beats + start * (np.sqrt(rr) if late else heart["width"])
        width = width * (np.sqrt(mean_rr) if late else heart["width"])
        z = (t[:, None] - at) / width  # (T, beats)
        gain = 1 + .03 * rng.standard_normal(n)
        dipole += (np.exp(-z * z / 2) @ gain)[:, None] * (heart["rotation"] @ vector)

    noise = rng.standard_normal((len(t), 8)) * rng.lognormal(np.log(.012), .5)  # muscle
    noise = sosfilt(butter(2, 20, "high", fs=rate, output="sos"), noise, axis=0)
    for f in (breath, rng.uniform(.03, .12)):  # baseline wander
        size = rng.lognormal(np.log(.04), .6) * rng.standard_normal(8)
        noise += np.outer(np.sin(2 * np.pi * f * t + rng.uniform(0, 2 * np.pi)), size)
    return all_leads(heart["voltage"] * dipole @ DOWER + noise)


def random_patient(number, rng):
    """A patient's row of the table, SCP codes and heart; two in five are normal, one in eight sick
    in two ways.
    """
    sick = [code for code in CHANGES if code != "NORM"]
    codes = ["NORM"] if rng.random() < .4 else list(rng.choice(sick, 1 + (rng.random() < .2), False))
    heart = dict(rotation=Rotation.from_euler("ZYX", rng.normal(0, (.45, .3, .35))).as_matrix(),
                 voltage=rng.lognormal(0, .3), width=rng.normal(1, .06),
                 rate=np.clip(rng.normal(75, 16), 45, 130) / 60)
    codes.append(RHYTHMS[int(np.digitize(heart["rate"] * 60, (60, 100)))])
    row = dict(patient_id=number, age=int(np.clip(rng.normal(60, 16), 18, 89)),
               sex=int(rng.integers(2)), strat_fold=1 + (number - 1) % 10, report="synthetic",
               scp_codes=str({str(code): 100.0 for code in codes}))
    return row, codes, heart


def synthesize(out, records, seed=0):
    """Write a synthetic PTB-XL: `records` WFDB records at both rates, tables, checksums.

    About one patient in six has two records. Raises InputError when `out` holds something else.
    """
    import pandas as pd
    import wfdb

    out, rng, rows, patient = Path(out), np.random.default_rng(seed), [], 0
    if out.is_file() or out.exists() and any(out.iterdir()) and not (out / SYNTHETIC).exists():
        raise InputError(f"{out} is not empty and holds no synthetic data; give another --out")
    shutil.rmtree(out, ignore_errors=True)
    for ecg_id in tqdm(range(1, records + 1), "synth", unit="record", disable=None):
        if not patient or rng.random() > 1 / 6:
            patient += 1
            row, codes, heart = random_patient(patient, rng)
        signal = synth_record([code for code in codes if code in CHANGES], heart, rng)
        names = {}
        for rate, end in ((100, "lr"), (500, "hr")):
            names[RATES[rate]] = f"records{rate}/{ecg_id // 1000 * 1000:05d}/{ecg_id:05d}_{end}"
            path = out / names[RATES[rate]]
            path.parent.mkdir(parents=True, exist_ok=True)
            x = np.rint(resample_poly(signal, rate, 500, axis=0) * 1000).clip(-32000, 32000)
            wfdb.wrsamp(path.name, rate, ["mV"] * 12, [lead.upper() for lead in LEADS],
                        d_signal=x.astype(np.int64), fmt=["16"] * 12, adc_gain=[1000.0] * 12,
                        baseline=[0] * 12, write_dir=str(path.parent))
        rows.append(dict(ecg_id=ecg_id, **row, **names))
    pd.DataFrame(rows).to_csv(out / TABLES[0], index=False)
    statements = [dict(code=code, diagnostic=1, diagnostic_class=name, diagnostic_subclass=code)
                  for code, name in SCP_CLASS.items()]
    statements += [dict(code=code, rhythm=1) for code in RHYTHMS]
    pd.DataFrame(statements).assign(form=math.nan).set_index("code").to_csv(out / TABLES[1])
    write_text(out / SYNTHETIC, f"Synthetic records, seed {seed}: a model, not patients. Made by: "
               "python data.py synth\n")
    files = sorted(file for file in out.rglob("*") if file.is_file())
    sums = "".join(f"{sha256(file)} {file.relative_to(out)}\n" for file in files)
    write_text(out / "SHA256SUMS.txt", sums)
    print(f"{out}: {records} synthetic records of {patient} patients, both rates")


def info(path, spec="superclass"):
    """Print records of a source by fold and class of a label set (Table 1 of the paper)."""
    import pandas as pd

    path = Path(path)
    if (path / TABLES[0]).exists():  # whatever rate was downloaded
        table, label_sets = load_tables(path), read_label_sets(path / TABLES[1])
        vocabulary = list(label_sets["all"])
    else:
        source = open_source(path, 100)
        table, label_sets, vocabulary = source.table, source.label_sets, source.vocabulary
    labels = assign_labels(table.statements, spec, label_sets, [vocabulary] * len(table))
    y = labels.y * labels.member[:, None]
    counts = pd.DataFrame(dict(zip(labels.classes, y.T))).assign(
        one=y.sum(1) == 1, members=labels.member, records=1)
    folds = counts.groupby(table.strat_fold).sum().T
    synthetic = " (synthetic)" if (path / SYNTHETIC).exists() else ""
    print(f"{path}{synthetic}: {labels.name} by fold\n{folds.assign(all=folds.sum(axis=1)).to_string()}")
    print("a record may have several classes; one: exactly one; members: records that take part")
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
    p = commands.add_parser("info", help="counts by fold and class", **style)
    p.add_argument("--data", nargs="+", default=["data/ptbxl"], help="sources, as of cache")
    add_shared(p, "labels_of")
    return parser.parse_args(argv)


def main(args):
    if args.command == "download":
        download(args.data, args.rate, args.url)
    elif args.command == "cache":
        given = dict(rate=args.source_rate, unit=args.unit, leads=args.leads,
                     all_windows=args.all_windows)
        build_cache(args.data, args.rate, args.out, args.workers, args.skip_bad, given)
    elif args.command == "synth":
        synthesize(args.out, args.records, args.seed)
    else:
        for path in args.data:
            info(path, args.labels_of)


if __name__ == "__main__":
    run_script(lambda: main(get_args()))
