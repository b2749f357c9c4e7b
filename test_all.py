"""The tests: each compares with an oracle (a double loop, a closed form, another library).

    make test                       # everything, some five minutes on two cores
    make test FAST=1                # without the slow ones, about a minute
    make test PTBXL=../shared/ptbxl500     # with real records, in PTB-XL's layout

Faults, what is promised then, and the tests of it:

    a server stalls, cuts, lies    tried again, else named; once each byte   TestDownload
    a hostile list or table        nothing outside the folder; cells named   TestHostileData
    a damaged cache or recording   named; the others go on                   *Hostile*, TestEmbed
    a damaged file of a run        named, with what to do; it is kept        test_a_damaged_file_*
    a full disk                    named; what was there is kept             *_full_disk_*
    SIGTERM, Ctrl-C                the step is saved; no traceback           *_signal_*, *_ctrl_c_*
    kill -9                        goes on, and ends bit for bit the same    *_killed_*
    torchrun killed, told to stop  all stop, at the same step; goes on       *_torchrun_*, *_told
    another device                 goes on there                             *_gpu_*, *_device
    out of memory                  one line: what to halve                   *_out_of_memory_*
"""
import os

os.environ["OMP_NUM_THREADS"] = "1"  # tiny models: threads only get in each other's way

import argparse
import contextlib
import dataclasses
import functools
import http.server
import io
import itertools
import json
import math
import pickle
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import types
from pathlib import Path
from unittest import mock

import h5py
import numpy as np
import pandas as pd
import pytest
import requests
import scipy.ndimage
import scipy.signal
import scipy.special
import scipy.stats
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.tensorboard
import wfdb
from matplotlib.colors import to_hex
from sklearn import metrics
from sklearn.linear_model import LogisticRegression
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wfdb.processing import xqrs_detect

import attention
import data
import evaluate
import model
import train
import views
from data import CLASSES, LEADS, InputError

HERE = Path(__file__).parent
PTBXL = os.environ.get("PTBXL")
slow = pytest.mark.skipif(bool(os.environ.get("FAST")), reason="FAST is set")
real = pytest.mark.skipif(not PTBXL, reason="PTBXL names no folder of real records")
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
CPU = torch.device("cpu")
ALIASES = {view.alias: name for name, view in views.VIEWS.items() if view.alias}
TINY = dict(width=24, heads=2, depth=1, ff_mult=2, stem_width=12, time_stride=20, channel_bins=16,
            fusion_width=32, rep_dim=16, proj_dim=8)
CONV = dict(stems="conv", aux_losses=True, stem_width=16, time_stride=8)
TINY_FLAGS = [f"--{k.replace('_', '-')}={v}" for k, v in TINY.items()]
RECORD = "records100/00000/00003_lr"  # a record of `small`
LOGGED = {"epoch", "loss", "val_loss", "lr", "grad_norm_time", "grad_norm_channel",
          "grad_norm_ratio", "silhouette", "davies_bouldin", "calinski_harabasz"}
MEASURED = {"records_per_second", "data_share", "peak_mib"}  # another each time
evaluate.STRENGTHS = evaluate.STRENGTHS[::4]  # an evaluation of a tiny run is mostly probes


# Scripts and processes


def script(*argv, ok=True, cwd=HERE):
    """Run a script of the project; return its output. With ok=False it must fail in one line."""
    done = subprocess.run([sys.executable, *map(str, argv)], cwd=cwd, text=True,
                          capture_output=True)
    out = done.stdout + done.stderr
    ours = re.search(rf'File "{re.escape(str(HERE))}/\w+\.py"', out)  # a traceback of ours
    assert (done.returncode == 0) == ok and not ours, out
    return out


def started(*argv, **more):
    """A script of the project, in a process group of its own, that hears Ctrl-C wherever we run."""
    return subprocess.Popen(
        [sys.executable, *map(str, argv)], cwd=HERE, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        **dict(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) | more)


def said(function, *args):
    """What function(*args) prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        function(*args)
    return out.getvalue()


@contextlib.contextmanager
def refused(says):
    """What is done here must end in an error of the user, argparse's or ours, that says so."""
    with contextlib.redirect_stderr(io.StringIO()) as err, pytest.raises(
            (InputError, SystemExit)) as error:
        yield
    assert re.search(says, f"{error.value} {err.getvalue()}"), (says, error, err.getvalue())


# Data


@pytest.fixture(scope="session")
def synth(tmp_path_factory):
    """A synthetic PTB-XL of 100 records, at both rates."""
    folder = tmp_path_factory.mktemp("data") / "synth"
    data.synthesize(folder, 100, seed=1)
    return folder


@pytest.fixture(scope="session")
def cache(synth):
    """Its cache at 100 Hz."""
    out = synth.parent / "cache-100"
    data.build_cache(synth, 100, out, workers=1)
    return out


@pytest.fixture(scope="session")
def twenty(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "twenty"
    data.synthesize(folder, 20, seed=2)
    return folder


@pytest.fixture
def small(twenty, tmp_path):
    """A folder of 20 synthetic records that a test may break."""
    return Path(shutil.copytree(twenty, tmp_path / "small"))


def write_record(path, signal=None, **changes):
    """Write a WFDB record, by default 10 s of noise, with other header fields; return it."""
    if signal is None:
        signal = np.random.default_rng(0).integers(-2000, 2000, (1000, 12))
    C = signal.shape[1]
    wfdb.wrsamp(path.name, write_dir=str(path.parent), d_signal=signal, **dict(
        fs=100, units=["mV"] * C, sig_name=[name.upper() for name in LEADS[:C]], fmt=["16"] * C,
        adc_gain=[1000.] * C, baseline=[0] * C) | changes)
    return signal


def change_table(folder, column, value, rows):
    """Change a column of some rows of a PTB-XL folder's table."""
    table = pd.read_csv(folder / data.TABLES[0]).astype({column: object})
    table.loc[rows(table), column] = value
    table.to_csv(folder / data.TABLES[0], index=False)


@pytest.fixture(scope="session")
def real_cache(tmp_path_factory):
    """The cache of the real records at 100 Hz."""
    out = tmp_path_factory.mktemp("real") / "cache-100"
    data.build_cache(PTBXL, 100, out)
    return data.open_cache(out)


def cached(folder, **more):
    """The cache of a folder, beside it."""
    data.build_cache(folder, 100, folder.parent / "cache", workers=1, **more)
    return data.open_cache(folder.parent / "cache")


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder at /ptbxl/, with the faults of real servers: {path: [fault, ...]}."""

    daemon_threads = True

    def __init__(self, folder, faults=()):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.faults, self.asked = folder, dict(faults), []
        self.url = f"http://127.0.0.1:{self.server_port}/ptbxl"
        threading.Thread(target=self.serve_forever, args=[.02], daemon=True).start()

    def handle_error(self, request, client_address):
        pass  # a client that gave up


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        name = self.path.removeprefix("/ptbxl/")
        path, faults = self.server.folder / name, self.server.faults.get(name)
        self.server.asked.append(name)
        fault = faults.pop(0) if faults else None
        self.close_connection = fault in ("reset", "cut")
        if fault == "reset":
            return self.connection.shutdown(socket.SHUT_RDWR)
        if fault == "stall":
            time.sleep(1)
        busy = fault.partition(" ") if str(fault).startswith("busy") else None
        status = 503 if busy else fault if isinstance(fault, int) else (
            200 if path.is_file() else 404)
        body = path.read_bytes() if status == 200 else b"sorry"
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if busy:
            self.send_header("Retry-After", busy[2])
        self.end_headers()
        self.wfile.write({"cut": body[:len(body) // 2], "wrong": body[::-1]}.get(fault, body))

    def log_message(self, *args):
        pass


def begun(words, *argv):
    """A command of data.py in a forked process, a group of its own; what it says goes to a file."""
    def run():
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stdout = sys.stderr = open(words, "w", 1)
        data.run_script(lambda: data.main(data.get_args([str(a) for a in argv])))

    process = torch.multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def until(done, process):
    while not done():
        assert process.is_alive()
        time.sleep(.002)


def tone(rate, hz=20):
    """A tone in lead aVR alone: (T, C) float32."""
    x = np.zeros((10 * rate, 12), np.float32)
    x[:, 3] = np.sin(2 * np.pi * hz * np.arange(len(x)) / rate)
    return x


def noise(T=1000):
    """Gaussian noise (T, C) float32."""
    return np.random.default_rng(0).standard_normal((T, 12)).astype(np.float32)


def normalized(cache, rows):
    """Some records of an open cache, normalised: (n, T, C)."""
    return data.normalize(torch.tensor(cache.signals[rows]))


# Models and batches


def tiny(**more):
    torch.manual_seed(0)
    return model.Contrastive(model.Config(**(TINY | more)))


def double_loop(z1, z2, tau):
    """NT-Xent as its definition reads."""
    z, n, total = [*z1, *z2], len(z1), 0.0
    for i in range(2 * n):
        others = sum(math.exp(float(z[i] @ z[j]) / tau) for j in range(2 * n) if j != i)
        total += math.log(others) - float(z[i] @ z[(i + n) % (2 * n)]) / tau
    return total / (2 * n)


def big_batch(n=12, step=5, masked=True, seed=0):
    """A Batch of n random records: views (2, n, 500, 12) and, if masked, the leads they keep."""
    x = torch.randn(2, n, 500, 12, generator=torch.Generator().manual_seed(1))
    keep = views.draw_leads((2, n, 12), .5, np.random.default_rng(2)) if masked else None
    return train.Batch(x, keep, step, seed)


def with_dropout(**more):
    """A tiny model with much dropout and auxiliary losses."""
    return tiny(dropout=0.3, aux_losses=True, **more)


def gradient(m):
    return torch.cat([p.grad.flatten() for p in m.parameters()])


# Runs


def log_of(run):
    """The rows of a run's log."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@contextlib.contextmanager
def changed_json(path):
    """What a file of JSON holds, to be changed in place."""
    held = json.loads(path.read_text())
    yield held
    path.write_text(json.dumps(held))


def repeatable(run):
    """The log without what depends on the clock."""
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in log_of(run)]


def same_weights(a, b):
    """Whether the weights and buffers of two finished runs are the same, bit for bit."""
    a, b = (torch.load(run / "model.pt")["model"] for run in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def scalars(run):
    """What TensorBoard shows of a run, without what depends on the clock: [(epoch, value), ...]."""
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    return {key: [(event.step, event.value) for event in events.Scalars(key)]
            for key in events.Tags()["scalars"] if key not in MEASURED}


def assert_same(a, b):
    """Two runs are one, bit for bit: weights, BatchNorm's averages, log, TensorBoard."""
    assert same_weights(a, b) and repeatable(a) == repeatable(b) and scalars(a) == scalars(b)


def argv_of(cache, run, *argv):
    """The command line of a tiny run."""
    return [str(a) for a in ("--cache", cache, "--run", run, "--batch-size", 8, "--micro-batch", 4,
                             *TINY_FLAGS, *argv)]


def run_train(cache, run, *argv, stop=None):
    """Train in this process; stop: the so-manieth step to ask, from 1, is told to stop."""
    asked = itertools.count(1)
    train.train(train.get_args(argv_of(cache, run, *argv)), lambda device: next(asked) == stop)


class Killed(BaseException):
    pass


def run_cut_short(saves, *argv):
    """Train in this process; as it is about to write last.pt once more, it is as if killed."""
    write, done = data.write_atomic, itertools.count()

    def write_or_die(path, how):
        if path.name == "last.pt" and next(done) == saves:
            raise Killed
        write(path, how)

    with mock.patch.object(train, "write_atomic", write_or_die), pytest.raises(Killed):
        run_train(*argv)


SAME = "--view", "interleaved", "--epochs", 2


@pytest.fixture(scope="session")
def finished(cache, tmp_path_factory):
    """A finished run of two epochs, and what it printed."""
    run = tmp_path_factory.mktemp("runs") / "one"
    return run, said(run_train, cache, run, *SAME)


# Evaluations


def run_evaluate(*argv):
    """Evaluate, or compare, in this process."""
    evaluate.main(evaluate.get_args([str(a) for a in argv]))


def quick(run, *more):
    """The command line of a quick evaluation."""
    return ("run", "--run", run, "--fast", "--labels", "3shot", "--seeds", 1, "--bootstrap", 200,
            *more)


@pytest.fixture(scope="session")
def evaluated(finished, cache):
    """The finished run, evaluated without the slow rows; its encoder's bytes before; what it said.
    """
    before = (finished[0] / "model.pt").read_bytes()
    return finished[0], before, said(run_evaluate, *quick(finished[0], "--cv", "--seeds", 2))


def random_scores(n=200, seed=0):
    """Labels, scores with ties, predictions, patients with several records."""
    rng = np.random.default_rng(seed)
    y = (rng.random((n, 5)) < [.5, .3, .2, .2, .1]).astype(int)
    p = np.round(.3 * y + rng.random((n, 5)), 1)
    return y, p, (p > .6).astype(int), rng.integers(0, n // 3, n)


# Figures


def run_attention(*argv):
    """Draw in this process."""
    attention.main(attention.get_args([str(a) for a in argv]))


def beats(rate, every=0.8, first=0.5):
    """A record (T, C) int16 with an R wave of 1 mV and a T wave each `every` s; its R times."""
    t, times = np.arange(10 * rate) / rate, np.arange(first, 9.9, every)
    mv = sum(np.exp(-((t - r) / .012) ** 2 / 2) + .3 * np.exp(-((t - r - .25) / .05) ** 2 / 2)
             for r in times)
    return np.repeat(np.rint(1000 * mv).astype(np.int16)[:, None], 12, axis=1), times


def read_signal(table, row, rate):
    """A real record (T, C) in microvolt, of a table of load_tables()."""
    return data.in_leads(data.read_recording(f"{PTBXL}/{table[data.RATES[rate]][row]}.hea"))[0]


def figures_of(*argv):
    """What a command draws, {file name: (figure, numbers)}, unsaved; and what it prints."""
    figures = {}

    def keep(figure, path, numbers):
        figures[path.stem] = figure, numbers

    with mock.patch.object(attention, "save_figure", keep):
        return figures, said(run_attention, *argv)


@pytest.fixture(scope="session")
def drawn(finished, tmp_path_factory):
    """All that `plots` draws of the finished run, and what it prints."""
    return figures_of("plots", finished[0], "--out", tmp_path_factory.mktemp("drawn"))


class TestData:
    def test_normalize_is_the_z_score_of_each_lead_and_a_flat_one_becomes_zeros(self):
        x = np.random.default_rng(0).integers(-3000, 3000, (4, 100, 12)).astype(np.int16)
        want = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
        for level in (0, 1234, -32767):
            x[:, :, 4], want[:, :, 4] = level, 0
            x[0, 50:, 4] += 1  # one step of the recorder is flat too
            np.testing.assert_allclose(data.normalize(torch.from_numpy(x)), want, atol=1e-4)

    def test_the_cache_holds_what_wfdb_reads_and_travels_to_a_worker_as_a_path(
            self, synth, cache, twenty, tmp_path):
        data.build_cache(twenty, 500, tmp_path / "c", workers=2)
        for folder, rate, out in ((synth, 100, cache), (twenty, 500, tmp_path / "c")):
            c, table = data.open_cache(out), data.load_tables(folder)
            sent = pickle.dumps(c)
            assert len(sent) < 1000
            for row in (0, len(table) - 1):
                path = folder / table[data.RATES[rate]][row]
                for found in (c, pickle.loads(sent)):
                    np.testing.assert_allclose(found.signals[row], atol=1e-6,
                                               desired=wfdb.rdrecord(str(path)).p_signal * 1000)
            assert list(c.index) == list(data.COLUMNS) and c.meta["synthetic"]
            assert list(c.index.ecg_id) == list(table.ecg_id)
            assert c.signals.shape == (len(table), 10 * rate, 12)

    def test_the_cache_is_kept_until_its_source_or_format_changes(self, small, capsys, monkeypatch):
        first = cached(small).meta
        assert cached(small).meta == first and "up to date, 20 records" in capsys.readouterr().out
        os.utime(small / f"{RECORD}.dat", (1, 1))
        second = cached(small).meta
        assert second["source"] != first["source"]
        assert second["fingerprint"] == first["fingerprint"]  # it covers samples and folds,
        change_table(small, "scp_codes", "{'AFIB': 100.0}", lambda table: 3)
        c = cached(small)  # but no statements
        assert c.meta["fingerprint"] == first["fingerprint"]
        assert c.index.statements[3] == '{"AFIB": 1}'
        change_table(small, "strat_fold", 7, lambda table: table.patient_id == table.patient_id[3])
        assert cached(small).meta["fingerprint"] != first["fingerprint"]
        monkeypatch.setattr(data, "FORMAT", 99)
        with pytest.raises(InputError, match="format 2, this code reads 99.*rm -r"):
            data.open_cache(small.parent / "cache")
        assert cached(small).meta["format"] == 99 and "made anew" in capsys.readouterr().out

    def test_missing_records_and_unusable_ones_stop_the_cache_or_are_left_out(self, small, capsys):
        for path in sorted((small / "records100").rglob("*.hea"))[3:16]:
            write_record(path.with_suffix(""), fs=250)
        with pytest.raises(InputError, match="13 of 20 records cannot be used; .*--skip") as got:
            cached(small)
        assert len(str(got.value).splitlines()) == 11 and "00008_lr: 4 s long" in str(got.value)
        assert not list(small.parent.glob("cache*"))
        c = cached(small, skip_bad=True)
        assert len(c.signals) == 7 and list(c.index.ecg_id) == [1, 2, 3, *range(17, 21)]
        assert capsys.readouterr().out.count("  left out: 000") == 13
        cached(small)
        assert "7 records, 13 left out" in capsys.readouterr().out
        (small / f"{RECORD}.hea").unlink()
        for folder, says in ((small, "1 of 20 files of records are .*"), (small / "no", "/no/.*")):
            with pytest.raises(InputError, match=f"{says}python data.py download"):
                cached(folder)

    def test_files_are_synced_then_renamed_and_the_old_one_stays_when_writing_fails(
            self, tmp_path, monkeypatch):
        path, calls = tmp_path / "a" / "file", []
        fsync, replace = os.fsync, os.replace
        monkeypatch.setattr(os, "fsync", lambda fd: (
            calls.append(os.readlink(f"/proc/self/fd/{fd}").split("/")[-1][:8]), fsync(fd)))
        monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), replace(a, b)))
        data.write_json(path, dict(a=[1, None], b="µ"))
        assert calls == ["file.tmp", "rename", "a"]

        def fail(error):
            def write(tmp):
                tmp.write_text("half")
                raise error
            return write

        with pytest.raises(KeyboardInterrupt):
            data.write_atomic(path, fail(KeyboardInterrupt()))
        for error in (OSError(28, "No space left on device"), RuntimeError("iostream error")):
            with pytest.raises(OSError, match="a/file cannot be written .*(No space|iostream).*"
                               "is kept: make room, and give the same command again"):
                data.write_atomic(path, fail(error))
        assert json.loads(path.read_text()) == dict(a=[1, None], b="µ")
        assert list(path.parent.iterdir()) == [path]
        data.save_arrays(path, dict(x=np.arange(3), names=np.array(["µ", "b"])))
        with np.load(path) as arrays:
            assert [list(a) for a in arrays.values()] == [[0, 1, 2], ["µ", "b"]]

    def test_texts_name_folds(self):
        for folds, name in ((10, "fold 10"), ([np.int64(3)], "fold 3"), ((9, 10), "folds 9 and 10"),
                            (range(1, 9), "folds 1-8"), ({4, 1, 3}, "folds 1, 3 and 4")):
            assert data.fold_names(folds) == name

    @real
    def test_real_records_are_what_wfdb_reads(self, real_cache):
        table = data.load_tables(PTBXL)
        for row in range(0, len(table), 50):
            record = wfdb.rdrecord(f"{PTBXL}/{table.filename_lr[row]}")
            np.testing.assert_array_equal(real_cache.signals[row], np.rint(record.p_signal * 1000))
            cut, there, notes = data.prepare(
                data.read_recording(f"{PTBXL}/{table.filename_hr[row]}.hea"), 500)
            record = wfdb.rdrecord(f"{PTBXL}/{table.filename_hr[row]}")
            np.testing.assert_allclose(cut[0], record.p_signal * 1000, atol=1e-3)


class TestLabels:
    def labels(self, statements, spec, label_sets=(), vocabulary=()):
        index = pd.DataFrame(dict(source="s", statements=list(map(json.dumps, statements))))
        meta = dict(label_sets=dict(label_sets), vocabulary=dict(s=vocabulary))
        return data.read_labels(data.Cache(None, None, index, meta), spec)

    def test_a_class_is_any_of_its_codes_and_members_are_known(self):
        records = [dict(A=1), dict(B=1), dict(A=0, B=0), dict(A=0), dict(C=1), {}]
        for spec, vocabulary, y, member in (
                ("A", (), [1, 0, 0, 0, 0, 0], [1, 0, 1, 1, 0, 0]),
                ("X=A+B", (), [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]),  # one that is 1 is enough
                ("X=A+B", "ABC", [1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0]),  # of {} nothing is known
                ("X=C", "ABC", [0, 0, 0, 0, 1, 0], [1, 1, 1, 1, 1, 0])):
            got = self.labels(records, spec, vocabulary=vocabulary)
            assert got.y[:, 0].tolist() == y and got.member.astype(int).tolist() == member, spec
        got = self.labels(records, "A X=B+C", vocabulary="ABC")
        assert got.classes == ("A", "X") and got.y[:5].tolist() == [
            [1, 0], [0, 1], [0, 0], [0, 0], [0, 1]]

    def test_of_a_named_set_those_with_a_label_take_part_and_a_column_may_bear_its_name(self):
        sets = dict(superclass=dict(NORM=["NORM"], MI=["IMI", "AMI"]))
        records = [dict(IMI=1, NORM=1), dict(MI=1), dict(SR=1), dict(MI=0)]
        got = self.labels(records, "superclass", sets, ("IMI", "AMI", "NORM", "SR"))
        assert got.y.tolist() == [[1, 1], [0, 1], [0, 0], [0, 0]]
        assert got.member.tolist() == [True, True, False, False]
        got = self.labels(records, "superclass")  # of a source that is not PTB-XL's
        assert got.classes == CLASSES and got.y.sum(0).tolist() == [1, 1, 0, 0, 0]

    @pytest.mark.parametrize("spec", ["B", "X=A+B", "form", "", "A form"])
    def test_unknown_words_are_refused_with_what_there_is(self, spec):
        with pytest.raises(InputError, match=r"unknown; give a label set \(superclass, rhythm\).*"
                           r"NAME=CODE\+CODE.*A \(2\), SR \(1\)"):
            self.labels([dict(A=1, SR=1), dict(A=1)], spec, dict(rhythm=dict(SR=["SR"])))

    def test_labels_of_a_cache_are_its_table_s(self, synth, cache, capsys):
        c, table = data.open_cache(cache), data.load_tables(synth)
        for spec, codes in (("rhythm", data.RHYTHMS), ("all", [*data.CHANGES, *data.RHYTHMS]),
                            ("SR AMI", ["SR", "AMI"])):
            got = data.read_labels(c, spec)
            assert got.name == spec and got.classes == tuple(codes) and got.member.all()
            want = [[int(f"'{code}'" in text) for code in codes] for text in table.scp_codes]
            assert got.y.tolist() == want
        data.info([synth], "SR")
        out, is_sr = capsys.readouterr().out, table.scp_codes.str.contains("'SR'")
        counts = is_sr.groupby(table.strat_fold).sum()
        assert re.search(f"SR +{' +'.join(map(str, counts))} +{is_sr.sum()}\n", out), out
        assert re.search(r"synth \(synthetic\): SR by fold(.|\n)*records .* 100\n", out)
        assert f"{table.patient_id.nunique()} patients" in out

    @real
    def test_the_label_sets_of_all_of_ptb_xl_have_the_benchmark_s_records(self):
        folder = Path(PTBXL).parent / "ptbxl_metadata"
        if not folder.exists():
            pytest.skip(f"no {folder} with the tables of all records")
        table, meta = data.join_sources([folder], 100)
        assert len(table) == 21799 and table.patient_id.nunique() == 18869
        splits = [table.strat_fold.isin(list(data.TRAIN_FOLDS)),
                  table.strat_fold == data.VAL_FOLD, table.strat_fold == data.TEST_FOLD]
        for spec, classes, records in (
                ("superclass", 5, [17084, 2146, 2158]), ("subclass", 23, [17084, 2146, 2158]),
                ("diagnostic", 44, [17084, 2146, 2158]), ("form", 19, [7197, 901, 880]),
                ("rhythm", 12, [16832, 2100, 2098]), ("all", 71, [17418, 2183, 2198])):
            got = data.read_labels(data.Cache(None, None, table, meta), spec)
            assert len(got.classes) == classes, spec
            assert [int(got.member[split].sum()) for split in splits] == records, spec
            if spec == "superclass":  # Table 1 of the paper
                assert got.classes == CLASSES
                assert got.y.sum(0).tolist() == [9514, 5469, 5235, 4898, 2649]


class TestSynth:
    def test_limb_leads_obey_einthoven_and_folds_patients_and_classes_are_as_in_ptb_xl(
            self, synth, cache):
        c = data.open_cache(cache)
        I, II, III, aVR, aVL, aVF = np.moveaxis(np.asarray(c.signals, dtype=int)[..., :6], -1, 0)
        for left, right in ((III, II - I), (aVR, -(I + II) / 2), (aVL, I - II / 2),
                            (aVF, II - I / 2)):
            assert np.abs(left - right).max() <= 2  # microvolt, from rounding
        assert (data.read_labels(c).y.sum(0) > 0).all() and {*c.index.strat_fold} == {*range(1, 11)}
        assert 1 < len(c.index) / c.index.patient_id.nunique() < 1.6
        assert "not patients" in (synth / data.SYNTHETIC).read_text()

    def test_the_same_seed_gives_the_same_files(self, twenty, synth, tmp_path):
        data.synthesize(tmp_path / "again", 20, seed=2)
        sums, again, other = (data.read_sums(folder / "SHA256SUMS.txt") for folder in (
            twenty, tmp_path / "again", synth))
        assert sums == again and sums[f"{RECORD}.dat"] != other[f"{RECORD}.dat"]
        assert all(data.sha256(twenty / name) == digest for name, digest in sums.items())

    def beat(self, codes, severity=1):
        """A noiseless beat {lead: mV} around its R peak at sample 250, at 500 Hz."""
        t = (np.arange(500) - 250) / 500
        dipole = sum(np.exp(-((t - at) / width) ** 2 / 2)[:, None] * vector
                     for at, width, *vector in data.change_waves(codes, severity).values())
        return dict(zip(LEADS, data.all_leads(dipole @ data.DOWER).T))

    def test_each_diagnosis_changes_what_it_changes_in_patients(self):
        normal, st = self.beat(["NORM"]), slice(300, 310)  # 100 to 120 ms after R
        assert normal["V1"].min() < -.5 and normal["V5"].max() > .8  # rS in V1, tall R in V5
        assert self.beat(["AMI"])["V2"][235:245].min() < normal["V2"][235:245].min() - .3  # Q
        assert self.beat(["AMI"])["V2"][st].mean() > normal["V2"][st].mean() + .05  # ST elevation
        assert self.beat(["ISC_"])["V5"][st].mean() < normal["V5"][st].mean() - .05  # ST depression
        assert self.beat(["NDT"])["V5"][375:395].mean() < .5 * normal["V5"][375:395].mean()
        assert self.beat(["CRBBB"])["V1"][270:290].max() > .4 > normal["V1"][270:290].max()  # R'
        lvh = self.beat(["LVH"])
        assert lvh["V5"].max() - lvh["V1"].min() > 3.5 > normal["V5"].max() - normal["V1"].min()
        np.testing.assert_allclose(self.beat(["LVH", "AMI"], 0)["V2"], normal["V2"])


class TestDownload:
    @pytest.fixture(autouse=True)
    def no_waiting(self, monkeypatch):
        monkeypatch.setattr(data, "BACKOFF_S", 0.001)

    def faulty(self, folder, *faults):
        """A server of the folder, with faults of its first records."""
        names = sorted(n for n in data.read_sums(folder / "SHA256SUMS.txt") if "records100" in n)
        return Server(folder, {name: list(f) for name, f in zip(names, faults)})

    def test_faults_that_pass_are_overcome_and_a_second_run_fetches_what_is_missing_or_broken(
            self, twenty, tmp_path):
        server = self.faulty(twenty, [404], ["cut"], ["wrong"], [503, 500], ["reset"], ["busy 0"],
                             ["cut", "wrong", 502], ["busy soon"])
        folder, missing = tmp_path / "d", next(iter(server.faults))
        with pytest.raises(InputError, match="1 files could not be downloaded(.|\n)*HTTP 404"):
            data.download(folder, 100, server.url)
        assert not (folder / ".complete-100").exists()
        broken = sorted(folder.rglob("*.dat"))[7]
        broken.write_bytes(b"half")
        server.asked.clear()
        data.download(folder, 100, server.url)
        assert {*server.asked} == {str(broken.relative_to(folder)), "SHA256SUMS.txt", missing}
        assert (folder / ".complete-100").exists() and not list(folder.rglob("*.tmp*"))
        sums = data.read_sums(twenty / "SHA256SUMS.txt")  # all come but those of the other rate
        got = {name: data.sha256(folder / name) for name in sums if (folder / name).exists()}
        assert got == {name: sums[name] for name in sums if "records500" not in name}

    @pytest.mark.parametrize("sums, says", [
        (b"<html>Sign in</html>", "not 'digest file'"), (b"\xff\xfe\x00", "not 'digest file'"),
        (b"0" * 64 + b" README", "not a PTB-XL folder"), (b"0" * 64 + b" ../x", "within it"),
        (b"0" * 64 + b" a/../../x", "within it"), (b"0" * 64 + b" /etc/x", "within it")])
    def test_another_site_or_a_list_that_leads_elsewhere_is_refused_before_records_come(
            self, tmp_path, sums, says):
        (tmp_path / "SHA256SUMS.txt").write_bytes(sums)
        with pytest.raises(InputError, match=says):
            data.download(tmp_path / "d", 100, Server(tmp_path).url)

    def test_a_server_that_is_not_there_and_files_that_stay_wrong_are_named(
            self, twenty, tmp_path, monkeypatch):
        monkeypatch.setattr(data, "TIMEOUT_S", .3)
        with pytest.raises(InputError, match="127.0.0.1"):
            data.download(tmp_path / "d", 100, "http://127.0.0.1:9/")
        for fault, says in (("wrong", "SHA-256 is .* SHA256SUMS.txt says"), (503, "HTTP 503"),
                            ("stall", "timed out")):
            server = self.faulty(twenty, [fault] * 25)
            with pytest.raises(InputError, match=f"1 files could not be downloaded(.|\n)*{says}"):
                data.download(tmp_path / "d", 100, server.url)

    def test_both_schemes_wait_for_a_busy_server_but_not_for_long(self):
        for url in ("http://a/b", "https://a/b"):
            retry = data.open_session().get_adapter(url).max_retries
            assert retry.total == data.TRIES and retry.parse_retry_after("7") == 7
            assert retry.parse_retry_after("9" * 9) == data.PAUSE_S
            assert retry.is_retry("GET", 429) and not retry.is_retry("GET", 404)

    def test_room_for_what_comes_is_checked_before(self, twenty, tmp_path, capsys, monkeypatch):
        server = Server(twenty)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1e5))
        with pytest.raises(InputError, match="d has no room: 0.1 MB are free; make some"):
            data.download(tmp_path / "d", 100, server.url)
        assert server.asked == ["SHA256SUMS.txt"]
        assert "43 files, 43 to come, 0.6 MB" in capsys.readouterr().out


class TestHostileData:
    @pytest.mark.parametrize("column, cell, says", [
        ("strat_fold", 11, "'11' in lines 6; needs an integer from 1 to 10"),
        ("strat_fold", "x", "'x' in lines 6; needs an integer from 1 to 10"),
        ("ecg_id", "x", "Error"), ("ecg_id", 1.5, "Error"), ("patient_id", "inf", "Error"),
        ("ecg_id", 4, "lines 5, 6; needs each once"),
        ("patient_id", 11, "needs a patient in one fold alone"),
        ("scp_codes", "5", "Error"), ("scp_codes", "{'NORM': 1", "Error"),
        ("scp_codes", "[" * 9999, "Error"), ("scp_codes", None, "Error"),
        ("filename_lr", None, "lines 6; needs a path within"),
        ("filename_lr", "../records100/x", "lines 6; needs a path within"),
        ("filename_hr", "/etc/passwd", "lines 6; needs a path within"),
        ("filename_lr", RECORD, "lines 4, 6; needs another record in"),
        ("filename_lr", RECORD.replace("/", "//./"), "lines 4, 6; needs another record in")])
    def test_a_table_with_an_impossible_cell_is_refused(self, twenty, tmp_path, column, cell, says):
        shutil.copy(twenty / data.TABLES[0], tmp_path)
        change_table(tmp_path, column, cell, lambda table: 4)
        with pytest.raises(InputError, match=f"database.csv cannot be read.*{says}.*download"):
            data.load_tables(tmp_path)

    def test_a_statement_s_cell_that_is_no_number_costs_that_cell_alone(self, twenty, tmp_path):
        path, want = tmp_path / "s.csv", data.read_label_sets(twenty / data.TABLES[1])
        codes = pd.read_csv(twenty / data.TABLES[1]).astype({"diagnostic": object})
        codes.loc[7, "diagnostic"] = "?"  # of a rhythm
        codes.to_csv(path, index=False)
        assert data.read_label_sets(path) == want
        pd.concat([codes, codes[:1]]).to_csv(path, index=False)
        with pytest.raises(InputError, match="s.csv cannot be read.*a code has two rows"):
            data.read_label_sets(path)

    @pytest.mark.parametrize("name", ["meta.json", "index.csv", "signals.int16"])
    @pytest.mark.parametrize("how", ["cut", "empty", "junk"])
    def test_a_damaged_cache_is_refused(self, cache, tmp_path, name, how):
        out = Path(shutil.copytree(cache, tmp_path / "c"))
        raw = (out / name).read_bytes()
        (out / name).write_bytes({"cut": raw[:-100], "empty": b"", "junk": b"\xff\xfe" * 50}[how])
        with pytest.raises(InputError, match="c cannot be read.*; make it again: rm -r") as caught:
            data.open_cache(out)
        assert len(str(caught.value)) < 700

    @pytest.mark.parametrize("how", ["cut", "empty", "junk"])
    def test_a_damaged_recording_or_table_is_named_and_what_to_do(self, tmp_path, how):
        x = np.random.default_rng(0).normal(0, .3, (1000, 12))
        files = write_forms(tmp_path / "f", x, 100)
        for file, flags in files.items():
            victim = file.with_suffix(".dat") if file.suffix == ".hea" and how != "junk" else file
            raw = victim.read_bytes()
            victim.write_bytes({"cut": raw[:len(raw) // 2 + 1], "empty": b"",
                                "junk": b"\x81\xc3\0{\x1f" * 50}[how])
            with pytest.raises(InputError, match=f"^{file.stem}.*(mend it|need|--)"):
                (path, row), *_ = data.list_recordings([file])
                data.prepare(data.read_recording(path, row, **flags), 100)
        for name in data.TABLES:
            (tmp_path / name).write_bytes({"cut": b"a,", "empty": b"", "junk": b"\x81\xc3\0"}[how])
        for read, source in ((data.load_tables, tmp_path),
                             (data.read_label_sets, tmp_path / data.TABLES[1])):
            with pytest.raises(InputError, match="csv cannot be read, it may be damaged.*download"):
                read(source)

    def test_what_is_no_cache_is_kept_and_another_replaced_also_behind_a_link(
            self, cache, synth, tmp_path):
        out, meta = tmp_path / "c", tmp_path / "disk" / "meta.json"
        meta.parent.mkdir()
        out.symlink_to(meta.parent)
        with refused("no cache in"):
            data.open_cache(out)
        with refused("exists and is no cache"):
            data.build_cache(synth, 100, out)
        meta.write_bytes(b"\xff\xfe")
        with refused("remove it: rm -r"):
            data.build_cache(synth, 100, out)
        meta.write_text('{"format": 1}')
        data.build_cache(synth, 100, out, workers=1)
        assert data.open_cache(tmp_path / "disk").meta == data.open_cache(cache).meta
        assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "disk"]

    @slow
    @pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL])
    def test_a_build_that_is_stopped_leaves_the_old_cache(self, cache, synth, tmp_path, kill):
        out = Path(shutil.copytree(cache, tmp_path / "cache"))
        folder = Path(shutil.copytree(synth, tmp_path / "d"))
        change_table(folder, "age", 50, lambda table: 0)
        process = begun(tmp_path / "words", "cache", "--data", folder, "--rate", 100, "--out", out,
                        "--workers", 1)
        until(lambda: any(path.stat().st_size for path in tmp_path.glob("cache.new-*/signals*")),
              process)
        os.killpg(process.pid, kill)
        process.join(60)
        assert data.open_cache(out).meta == data.open_cache(cache).meta
        if kill == signal.SIGINT:
            assert (tmp_path / "words").read_text().endswith(
                "made anew\nstopped; the same command goes on from here\n")
            assert not list(tmp_path.glob("cache.*"))
        data.build_cache(folder, 100, out, workers=1)
        assert data.open_cache(out).index.age[0] == 50


class TestViews:
    def test_streams_are_numpys_spawned_ones_and_never_coincide(self):
        purposes = "order", "dropout", "mask", "shift", "augment", "disturb", "equal"
        keys, drawn = ((), (0,), (1,), (5,), (0, 0), (0, 1), (1, 0), (5, 1), (5, 1, 0)), []
        for (i, purpose), seed, key in itertools.product(enumerate(purposes), (0, 1, 5), keys):
            stream = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(i, *key)))
            drawn.append(views.generator(purpose, seed, *key).integers(2 ** 63))
            assert drawn[-1] == stream.integers(2 ** 63)
        assert len(set(drawn)) == len(drawn)

    def test_segments_glue_back_to_the_record_and_the_others_are_all_of_it(self):
        x = torch.randn(3, 10, 12)
        a, b = views.ViewConfig("contig").split(x)
        assert torch.equal(torch.cat([a, b], 1), x)
        a, b = views.ViewConfig("noncontig").split(x)
        assert torch.equal(torch.stack([a, b], 2).flatten(1, 2), x)
        assert all(views.ViewConfig(view).split(x) == (x,) for view in ("stochastic", "masking"))
        assert [views.view_duration(view) for view in views.VIEWS] == [
            (1, 1), (.5, .5), (1, .5), (1, 1)]

    @pytest.mark.parametrize("view, p, masked", [
        ("stochastic", .5, False), ("contig", 0, True), ("noncontig", 0, True),
        ("masking", 0, True)])
    def test_a_view_has_its_masking_and_pool_unless_asked_otherwise(self, view, p, masked):
        config = views.ViewConfig(view=view)
        assert views.ViewConfig(view=view, mask_leads=not masked).mask_leads != masked
        assert (config.augment_p, config.mask_leads) == (p, masked)
        assert config.describe() == (f"{view}: {views.VIEWS[view].words}; leads masked with "
                                     f"p = {.5 if masked else 0:g}, pool with p = {p}")

    def test_aliases_are_resolved_and_what_does_nothing_is_refused(self):
        assert views.ViewConfig(view="interleaved").view == "noncontig"
        for name in [*views.VIEWS, *ALIASES]:
            with refused(f"zigzag.*{name}"):
                views.ViewConfig(view="zigzag")
        with refused("--mask-p 0.3 does nothing.*--mask-leads"):
            views.ViewConfig(view="stochastic", mask_p=.3)

    @pytest.mark.parametrize("p", [0, 0.5, 0.9])
    def test_lead_masks_follow_the_distribution_without_the_empty_mask(self, p):
        keep = views.draw_leads((20000, 3), p, np.random.default_rng(0))
        assert keep.any(-1).all()
        counts = np.bincount(keep.sum(-1), minlength=4) / len(keep)
        for k in (1, 2, 3):
            want = math.comb(3, k) * (1 - p) ** k * p ** (3 - k) / (1 - p ** 3)
            assert abs(counts[k] - want) < 0.015, (k, counts[k], want)

    @pytest.mark.parametrize("rate", data.RATES)
    def test_the_filter_keeps_a_tone_in_its_lead_and_its_band_without_delay(self, rate):
        band_pass = views.BandPassFilter(views.POOL["band"], rate)
        for hz, low, high in ((0.05, 0, .1), (10, .99, 1.01), (20, .99, 1.01)):
            x = tone(rate, hz)
            y = band_pass.apply(x)
            assert not np.delete(y, 3, axis=1).any()
            x, y = x[2 * rate:8 * rate, 3], y[2 * rate:8 * rate, 3]  # away from the edges
            assert low <= abs(x @ y / (x @ x)) <= high, (hz, x @ y / (x @ x))

    def test_a_crop_is_a_stretched_part_of_the_record(self):
        x = noise(500)
        y = views.TimeCropResize(0.5).apply(x, share=0.6, start=0.3)
        at = (0.3 + 0.6 * np.arange(500) / 500) * 499
        want = scipy.ndimage.map_coordinates(x[:, 3], [at], order=3, mode="mirror")
        np.testing.assert_allclose(y[5:-5, 3], want[5:-5], atol=1e-2)
        drawn = [views.TimeCropResize(0.5).get_params() for _ in range(500)]
        shares, starts = (np.array([d[name] for d in drawn]) for name in ("share", "start"))
        assert .5 <= shares.min() < .51 and .99 < shares.max() <= 1
        assert (starts >= 0).all() and (starts + shares <= 1).all()

    def test_the_pool_is_its_five_transforms_in_turn_with_the_strengths_of_the_table(
            self, monkeypatch):
        monkeypatch.setattr(views, "POOL", views.POOL | dict(noise=.25, scale=.5, warp=1.))
        transforms = views.pool(views.ViewConfig("stochastic", augment_p=1), 100)
        warp, crop, band, noisy, scaled = transforms.transformations
        assert type(crop) is views.TimeCropResize and type(band) is views.BandPassFilter
        ratios = [scaled(ecg=noise())["ecg"][0, 0] / noise()[0, 0] for _ in range(200)]
        assert .5 <= min(ratios) < .6 and 1.4 < max(ratios) <= 1.5
        assert abs((noisy(ecg=noise())["ecg"] - noise()).std() - .5) < .02
        warped = warp(ecg=np.repeat(np.arange(1000.)[:, None], 12, 1))["ecg"]
        assert 5 < np.abs(warped[:, 0] - np.arange(1000)).max() < 90  # samples, of the 8 %
        got = views.augment(noise(), transforms, np.random.default_rng(3))
        np.random.seed(np.random.default_rng(3).integers(2 ** 32, size=4))
        for one in got:  # the library's order of draws: its sequence, then each transform
            want = noise()
            np.random.random()
            for transform in (warp, crop, band, noisy, scaled):
                want = transform(ecg=want)["ecg"]
            np.testing.assert_array_equal(one, want.astype(np.float32))
        assert got.dtype == np.float32 and not np.allclose(*got)

    def test_equal_views_are_5_s_at_half_the_rate_whatever_the_strategy(self, monkeypatch):
        x, starts = torch.arange(80.).view(2, 40, 1), torch.tensor([3, 20])
        cut = torch.stack([x[0, 3:23], x[1, 20:40]])
        for view, want in (("noncontig", [cut[:, ::2], cut[:, 1::2]]), ("masking", [cut[:, ::2]]),
                           ("contig", [x[:, 0:20:2], x[:, 20::2]])):
            for got, one in zip(views.equal_pair(x, view, starts), want, strict=True):
                assert torch.equal(got, one)
            config = views.ViewConfig(view=view, equal=True)
            assert config.timing() == (.5, .25) and config.samples(40) == 10
            for part, half in zip(config.split(x), (x[:, 0:20:2], x[:, 20::2])):
                assert torch.equal(part, half)
        short = views.View(lambda x: (x[:, :8],), words="-", color="k")
        monkeypatch.setitem(views.VIEWS, "short", short)
        with pytest.raises(InputError, match="--equal needs views of 5 s or more"):
            views.ViewConfig("short", equal=True)


class TestDisturb:
    """Each strength by itself: the others are set to what changes nothing."""

    NONE = dict(window=1, speed=0, lead_gain=0, wander=0, max_noise=0)

    def views(self, x, **strengths):
        with mock.patch.dict(views.DISTURB, self.NONE | strengths):
            return views.disturb(x, torch.Generator().manual_seed(0))

    def test_a_window_is_a_stretch_of_the_view_at_its_own_place_and_speed(self):
        ramp = torch.arange(400.)[None, :, None].expand(64, 400, 12)  # each sample is its own time
        got = self.views(ramp, window=.25, speed=.2)
        assert got.shape == (64, 100, 12) and (got == got[:, :, :1]).all()
        first, last = got[:, 0, 0], got[:, -1, 0]
        torch.testing.assert_close(got[:, :, 0], first[:, None] + (last - first)[:, None]
                                   * torch.linspace(0, 1, 100), atol=1e-3, rtol=0)
        speed = (last - first) / 99
        assert .79 < speed.min() < .85 and 1.15 < speed.max() < 1.21
        assert first.min() >= 0 and last.max() <= 399 and first.std() > 60  # anywhere
        torch.testing.assert_close(self.views(ramp), ramp)  # all strengths 0: the view itself
        with mock.patch.dict(views.DISTURB, window=.25):
            assert views.ViewConfig("contig", disturb=True).samples(800) == 100

    def test_each_strength_does_what_it_says_and_no_more(self):
        x = 1 + torch.rand(400, 200, 12, generator=torch.Generator().manual_seed(1))
        x = self.views(x)  # read between samples, as the others are
        gain = self.views(x, lead_gain=.4) / x
        torch.testing.assert_close(gain, gain[:, :1].expand_as(gain), rtol=1e-4,
                                   atol=0)  # one a record and lead
        assert abs(gain[:, 0].log().std() - .4) < .02 and abs(gain[:, 0].log().mean()) < .02
        noise = (self.views(x, max_noise=.5) - x).std((1, 2))  # one strength a record
        assert .45 < noise.max() < .52 and scipy.stats.kstest(noise / .5, "uniform").pvalue > 1e-3
        wave = self.views(x, wander=.5) - x  # A sin(2 pi (f t + phase)): second differences
        ratio = (wave[:, 2:] - 2 * wave[:, 1:-1] + wave[:, :-2]) / wave[:, 1:-1]
        want = 2 * torch.cos(2 * math.pi * torch.linspace(0, 1.2, 99) / 199) - 2
        middle = ratio[wave[:, 1:-1].abs() > .3]  # elsewhere it is rounding
        assert want.min() - 2e-4 < middle.min() < .9 * want.min() and middle.max() < 2e-4
        top = wave.abs().amax(1) / .5  # at least a third of a period is seen of most
        assert .5 < top.square().mean() < 1 and 2 < top.max() < 5  # a normal amplitude


class TestModel:
    def test_the_default_is_the_papers_size(self):
        plain, mixed = (model.n_parameters(model.Contrastive(model.Config(mix_leads=mix)))
                        for mix in (False, True))
        assert mixed == 21_477_233 and plain == mixed - 2 * 13 * 12  # the paper's 21.5 million

    @pytest.mark.parametrize("tau", [0.05, 0.1, 1.0])
    def test_nt_xent_is_the_double_loop_and_ln_2b_1_at_chance(self, tau):
        z1, z2 = F.normalize(torch.randn(2, 7, 5, dtype=torch.float64), dim=-1)
        assert float(model.nt_xent(z1, z2, tau)) == pytest.approx(double_loop(z1, z2, tau))
        same = torch.ones(6, 4) / 2
        assert math.isclose(model.nt_xent(same, same, tau), math.log(11), rel_tol=1e-6)

    def test_attention_is_torchs(self):
        ours, theirs = model.Attention(24, 3), nn.MultiheadAttention(24, 3, batch_first=True)
        theirs.in_proj_weight, theirs.in_proj_bias = ours.qkv.weight, ours.qkv.bias
        theirs.out_proj = ours.out
        x, context = torch.randn(2, 9, 24), torch.randn(2, 5, 24)
        for args, other in (((x,), x), ((x, context), context)):
            want, weights = theirs(x, other, other, average_attn_weights=False)
            torch.testing.assert_close(ours(*args), want, atol=1e-5, rtol=1e-5)
            seen = []
            ours.watch = lambda head, w: seen.append(w)
            torch.testing.assert_close(ours(*args), want, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(torch.stack(seen, 1), weights, atol=1e-5, rtol=1e-5)
            ours.watch = None

    def test_a_layer_is_torchs_pre_norm_layer_and_drops_its_branches(self):
        config, x = model.Config(**TINY | dict(dropout=.5)), torch.randn(3, 50, 24)
        ours = model.Layer(config).eval()
        theirs = nn.TransformerEncoderLayer(24, 2, 48, 0, "gelu", batch_first=True,
                                            norm_first=True).eval()
        parts = ours.attention, ours.ff, ours.norm1, ours.norm2
        values = [p for part in parts for p in part.parameters()]
        theirs.load_state_dict(dict(zip(theirs.state_dict(), values, strict=True)))
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-4)
        kept = (ours.train()(x) == x).float().mean()  # both branches of an element dropped
        assert .2 < kept < .3
        layers = [module.p for module in tiny(dropout=.5).modules() if type(module) is nn.Dropout]
        assert layers == [.5] * 3  # of two layers and the cross-attention

    @pytest.mark.parametrize("T, config", [
        (600, dict(time_stride=1)), (503, dict(time_stride=4)), (1000, dict(time_stride=7)),
        (250, CONV), (255, CONV), (256, CONV)])
    def test_a_view_has_a_time_token_for_each_whole_stride(self, T, config):
        tokens = tiny(**config).encoder.time_stem(torch.randn(2, T, 12))
        assert tokens.shape == (2, T // config["time_stride"], 24)

    @pytest.mark.parametrize("config, tokens", [({}, 1), (CONV, 1), (dict(mix_leads=True), 12)])
    def test_a_channel_token_sees_its_lead_alone_unless_leads_are_mixed(self, config, tokens):
        stem, x = tiny(**config).encoder.channel_stem, torch.randn(1, 500, 12)
        other = x.clone()
        other[:, :, 5] = 0
        changed = (stem(x) - stem(other)).abs().amax(-1)[0] > 1e-6
        assert changed[5] and changed.sum() == tokens

    def test_conv_stems_know_the_lead_but_not_the_time(self):
        config = model.Config(**TINY | CONV)
        time, channel = model.ConvTimeStem(config), model.ConvChannelStem(config)
        beat = torch.zeros(1, 256, 12)
        beat[:, 100:110] = torch.randn(10, 12)
        torch.testing.assert_close(channel(beat), channel(beat.roll(64, 1)), atol=1e-5, rtol=1e-4)
        tokens, later = time(beat)[:, 8:16], time(beat.roll(64, 1))
        moved, stayed = ((later[:, i:i + 8] - tokens).abs().max() for i in (16, 8))
        assert moved < .1 * stayed  # the ends of the record are a little seen everywhere
        assert channel(torch.randn(0, 256, 12)).shape == (0, 12, 24)  # no record of one class
        for lead, got in enumerate(channel(beat).unbind(1)):  # one net for all leads
            h = channel.net(beat[:, None, :, lead])
            want = channel.out(torch.cat([h.mean(2), h.max(2).values], 1)) + channel.lead[lead]
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
        assert .4 < channel.lead.std() < .6

    @pytest.mark.parametrize("config", [{}, CONV])
    def test_streams_are_joined_crosswise_and_z_has_a_gated_share_of_early_features(self, config):
        """Linear stems: places of sines and cosines, means. Conv: none; maxima, tokens, streams."""
        m, x, linear = tiny(**config).eval(), torch.randn(2, 256, 12), not config

        def pool(t, c):
            parts = [t.mean(1), c.mean(1)] if linear else [t.mean(1), t.amax(1), c.flatten(1)]
            return torch.cat(parts, 1)

        e = m.encoder
        t, c = e.time_stem(x), e.channel_stem(x)
        early = pool(t, c)
        if linear:
            angle = torch.arange(t.shape[1])[:, None] / 1e4 ** (torch.arange(12) / 12)
            t = t + torch.stack([angle.sin(), angle.cos()], 2).flatten(1)
        t, c = e.time_layers[0](t), e.channel_layers[0](c)
        late = pool(t + e.cross(t, c)[0], c + e.cross(t, c)[1])
        z = e.fusion(late) + e.shortcut(early) / (1 + math.exp(-.1))
        output, _ = m(x)
        want = z if linear else torch.cat([z, late], 1)
        for got, want in ((output.z, z), (torch.cat(output[1:], 1), late), (m.represent(x), want)):
            torch.testing.assert_close(got, want)
        assert m.width == want.shape[1]

    def test_weights_are_glorots_and_bfloat16_is_of_the_arithmetic_alone(self):
        m, x = tiny().eval(), torch.randn(2, 500, 12)
        for layer in (module for module in m.modules() if isinstance(module, nn.Linear)):
            bound = math.sqrt(6 / (layer.in_features + layer.out_features))
            assert .9 * bound < layer.weight.abs().max() <= bound
        z, m.precision = m.represent(x), "bfloat16"
        rounded = m.represent(x)
        assert rounded.dtype == m(x)[1].dtype == torch.float32
        assert 1e-4 < (rounded - z).abs().max() < .2

    def test_masking_zeroes_the_signal_or_late_the_features_of_both_views_and_streams(self):
        m, x, keep = tiny().eval(), torch.randn(3, 1000, 12), torch.arange(12).expand(3, -1) < 6
        for leads, seen in ((None, x), (keep, x * keep[:, None])):
            got = model.embed(m, x, views.ViewConfig(view="noncontig"), leads)
            want = torch.stack([m.encoder(seen[:, i::2]).z for i in (0, 1)], dim=1)
            torch.testing.assert_close(got, want)
        got = model.embed(m, x, views.ViewConfig(view="stochastic"))
        torch.testing.assert_close(got[:, 0], m.encoder(x).z)
        m, other = tiny(late_masking=True, stem_width=24).eval(), x.clone()
        other[:, :, 6:] = torch.randn(3, 1000, 6)
        for got, want in zip(m.encoder(x, keep), m.encoder(other, keep)):
            assert torch.equal(got, want)
        lifted = F.gelu(m.encoder.time_stem.lift(x.transpose(1, 2)))
        assert (lifted != 0).all()  # the signal itself is whole: its features fall
        assert not torch.equal(m.encoder(x)[1], m.encoder(other)[1])

    def test_channel_dropout_drops_whole_tokens_in_training_only(self):
        m, x, seen = tiny(channel_dropout=.5), torch.randn(64, 500, 12), []
        m.encoder.channel_dropout.register_forward_hook(lambda _, a, out: seen.append(out == 0))
        m(x)
        m.eval()(x)
        dropped, never = seen  # (B, C, D)
        assert .4 < dropped.float().mean() < .6 and not never.any()
        assert torch.equal(dropped.all(-1), dropped.any(-1))

    def test_gates_scale_the_residual_branches_of_the_channel_stream(self):
        m, x = tiny(gate_channel=True).eval(), torch.randn(2, 12, 24)
        layer, plain = m.encoder.channel_layers[0], model.Layer(m.config).eval()
        assert m.encoder.time_layers[0].gates is None
        plain.load_state_dict(layer.state_dict(), strict=False)
        for gate, want in ((-100, x), (100, plain(x))):  # closed, open
            layer.gates.data.fill_(gate)
            torch.testing.assert_close(layer(x), want)

    def test_projections_are_of_z_and_with_aux_losses_of_each_stream_whose_loss_counts_less(self):
        x = torch.randn(6, 500, 12)
        for aux, n in ((False, 1), (True, 3)):
            m = tiny(aux_losses=aux).eval()
            output, p = m(x)
            assert p.shape == (n, 6, 8)
            for got, head, h in zip(p, m.heads, output):
                torch.testing.assert_close(got, F.normalize(head(h), dim=-1))
            p = p.detach().double().unflatten(1, (2, -1))
            want = [double_loop(z1, z2, .2) * share for (z1, z2), share in zip(p, (1, .5, .5))]
            loss = float(train.Objective(tau=.2, aux_weight=.5)(p))
            assert loss == pytest.approx(sum(want), abs=1e-6)

    def test_watched_attention_is_that_of_each_module_and_changes_nothing(self):
        m, x, seen, out = tiny(depth=2).eval(), torch.randn(2, 500, 12), {}, []
        for layers in (m.encoder.time_layers, m.encoder.channel_layers):
            layers[0].attention.qkv.weight.data *= 0  # attention alike everywhere
        want = m(x)[0].z
        m.encoder.register_forward_hook(lambda module, args, output: out.append(output.z))
        model.watch_attention(m, x, lambda *key: seen.update({key[:3]: key[3]}))
        torch.testing.assert_close(out[0], want, atol=1e-5, rtol=1e-5)
        sizes = {("time", 0): (25, 25), ("time", 1): (25, 25), ("channel", 0): (12, 12),
                 ("channel", 1): (12, 12), ("time_to_channel", 0): (25, 12),
                 ("channel_to_time", 0): (12, 25)}
        assert {key: weights.shape for key, weights in seen.items()} == {
            (*key, head): (2, *size) for key, size in sizes.items() for head in (0, 1)}
        even = {key[:2] for key, w in seen.items() if w.std() < 1e-6}
        assert even == {("time", 0), ("channel", 0)}
        assert all(a.watch is None for a in m.modules() if isinstance(a, model.Attention))

    def test_resnet_goes_through_the_same_interface(self):
        m, x, keep = tiny(arch="resnet18").eval(), torch.randn(2, 500, 12), torch.arange(12) < 6
        torch.testing.assert_close(m(x, keep[None])[0].z, m(x * keep)[0].z)
        assert torch.equal(m.represent(x), m(x)[0].z) and m.width == TINY["rep_dim"]
        kernels = [c.kernel_size[0] for c in m.modules() if isinstance(c, nn.Conv1d)]
        assert sum(k > 1 for k in kernels) + 1 == 18  # and one linear layer
        with pytest.raises(InputError, match="no attention"):
            model.watch_attention(m, torch.randn(1, 500, 12), print)

    @pytest.mark.parametrize("config, says", [
        (dict(width=25), "--heads 2 does not divide --width 25"),
        (CONV | dict(time_stride=12), "--time-stride 12: --stems conv needs 2, 4, 8"),
        (CONV | dict(mix_leads=True), "leave out --mix-leads and --late-masking"),
        (CONV | dict(late_masking=True), "leave out --mix-leads and --late-masking"),
        (dict(arch="resnet18", aux_losses=True), "no streams.*--stems linear --no-aux-losses"),
        (CONV | dict(arch="resnet18", aux_losses=False), "no streams.*--stems linear")])
    def test_settings_that_cannot_be_are_refused_where_torch_would_be_silent(self, config, says):
        with pytest.raises(InputError, match=says):
            model.Config(**TINY | config)
        assert model.Config(**TINY | config | model.NO_STREAMS | dict(arch="resnet18", width=24))


class TestEncoder:
    @pytest.fixture
    def run(self, tmp_path):
        """A run folder as train.py and evaluate.py leave it."""
        m, K, rng = tiny(), 3, np.random.default_rng(0)
        config = dataclasses.asdict(m.config)
        data.write_json(tmp_path / "args.json", dict(
            args=dict(view="contig", equal=False), config=config, data=dict(rate=100)))
        torch.save(dict(model=m.state_dict(), config=config), tmp_path / "model.pt")
        shapes = dict(weights=(K, m.width), biases=K, thresholds=K)
        self.probe = {prefix + name: rng.normal(size=shape) for prefix in ("", "masked_")
                      for name, shape in shapes.items()}
        data.save_arrays(tmp_path / "eval" / "probe.npz",
                         self.probe | dict(classes=np.array(["A", "B", "C"])))
        return tmp_path

    def test_probabilities_are_the_probes_and_with_missing_leads_those_of_the_masked_one(self, run):
        encoder = model.load_encoder(run)
        assert encoder.classes == ["A", "B", "C"] and (encoder.rate, encoder.shortest) == (100, 5)
        z, keep = torch.randn(2, encoder.model.width), torch.ones(2, 12).bool()
        keep[1, 4] = False
        got = encoder.probabilities(z, keep)
        for i, prefix in enumerate(("", "masked_")):
            w, b = (self.probe[prefix + name] for name in ("weights", "biases"))
            want = scipy.special.expit(w @ z[i].double().numpy() + b)
            for p in (got[i], encoder.probabilities(z[i], keep[i])):
                np.testing.assert_allclose(p, want)
        assert torch.equal(encoder.probabilities(z)[0], got[0])
        with changed_json(run / "args.json") as saved:
            saved["args"]["equal"] = True
        assert model.load_encoder(run).views.timing() == (.5, .25)

    def test_missing_leads_are_masked_as_in_training_and_windows_are_of_one_view_or_two(self, run):
        encoder, rng = model.load_encoder(run), np.random.default_rng(0)
        x, keep = encoder.prepare(rng.normal(0, .3, (1000, 2)), 100, "mV", ["v5", "Lead II"])
        assert [LEADS[c] for c in np.flatnonzero(keep[0])] == ["II", "V5"]
        assert x.shape == (1, 1000, 12) and not x[:, :, ~keep[0]].any()
        with torch.no_grad():
            other = torch.where(keep[:, None], x, torch.randn(1, 1000, 12))
            views_ = [encoder.model.represent(half) for half in (x[:, :500], x[:, 500:])]
            torch.testing.assert_close(encoder(other, keep), torch.stack(views_).mean(0))
            x, keep = encoder.prepare(rng.normal(0, 1, (620, 12)), 100, "mV", LEADS)
            assert x.shape == (2, 500, 12) and keep.all()
            torch.testing.assert_close(encoder(x, keep), encoder.model.represent(x))
            encoder.views = views.ViewConfig("contig", equal=True)
            torch.testing.assert_close(encoder(x), encoder.model.represent(x[:, ::2]))

    def test_a_run_opens_without_the_data_pandas_wfdb_or_ecgmentations(self, run, tmp_path):
        code = (f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
                "for name in 'pandas', 'wfdb', 'ecgmentations', 'h5py', 'sklearn':\n"
                "    sys.modules[name] = None\n"  # to import it is an error
                "import model, numpy as np\n"
                "encoder = model.load_encoder(sys.argv[1])\n"
                "x, keep = encoder.prepare(np.load(sys.argv[2]), 100, 'mV', ['I', 'V1'])\n"
                "np.save(sys.argv[2], encoder.probabilities(encoder(x, keep), keep))")
        x, path = np.random.default_rng(0).normal(0, .3, (1000, 2)), tmp_path / "x.npy"
        np.save(path, x)
        subprocess.run([sys.executable, "-c", code, run, path], cwd=tmp_path, check=True)
        encoder = model.load_encoder(run)
        x, keep = encoder.prepare(x, 100, "mV", ["I", "V1"])
        want = encoder.probabilities(encoder(x, keep), keep)
        np.testing.assert_allclose(np.load(path), want, rtol=1e-6)

    def test_a_log_is_a_table_by_epoch_and_what_is_missing_is_named_with_what_to_do(self, run):
        with refused("log.jsonl .*one epoch"):
            model.read_log(run)
        rows = [dict(epoch=1, loss=2.5, silhouette=None), dict(epoch=2, loss=1.5, silhouette=.1)]
        (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        log = model.read_log(run)
        assert log.loss.to_dict() == {1: 2.5, 2: 1.5} and math.isnan(log.silhouette[1])
        (run / "eval" / "probe.npz").unlink()
        with refused("no probe: make eval"):
            model.load_encoder(run).probabilities(torch.randn(1, 16))
        (run / "model.pt").unlink()
        with refused("model.pt .*the run's command again"):
            model.load_run(run)
        for config in (dict(time_stem="conv"), 5, dict(width=25)):
            with changed_json(run / "args.json") as saved:
                saved["config"] = config
            with refused("args.json .*make pretrain|--heads 6 does not divide --width 25"):
                model.read_args(run)
        with refused("args.json .*make pretrain"):
            model.read_args(run / "none")


CASES = [(6, "batch"), (2, "batch"), (2, "micro")]  # micro-batch, negatives


def step_of(m, micro, negatives="batch", batch=None):
    """(gradient, loss, norms) of one step of a model."""
    loss, norms = train.STEPS[negatives](m, batch or big_batch(), train.Objective(), micro)
    return gradient(m), loss, norms


def step_with_graph(m, micro, negatives, *shares):
    """The same by its definition, every graph kept; shares: the batches of the processes."""
    outputs, projections = zip(*[train.project(m, batch, slice(i, i + micro)) for batch in shares
                                 for i in range(0, batch.views.shape[1], micro)])
    sizes, objective = [p.shape[2] for p in projections], train.Objective()
    loss = objective(torch.cat(projections, dim=2))
    if negatives == "micro":
        loss = sum(n * objective(p) for n, p in zip(sizes, projections)) / sum(sizes)
    streams = [h for output in outputs for h in (output.time, output.channel)]
    grads = torch.autograd.grad(loss, streams, retain_graph=True)
    m.zero_grad()
    loss.backward()
    norms = [math.sqrt(sum(float(g.square().sum()) for g in grads[i::2])) for i in (0, 1)]
    return gradient(m), loss.item(), norms


def assert_close_steps(got, want):
    torch.testing.assert_close(got[0], want[0], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose([got[1], *got[2]], [want[1], *want[2]], rtol=1e-4)


def process_batches():
    """The shares of two processes of a batch, each with a seed of its own."""
    whole = big_batch()
    return [train.Batch(whole.views[:, at], whole.keep[:, at], 5, seed)
            for at, seed in ((slice(0, 6), 0), (slice(6, 12), 1))]


TWO = dict(contig=["--view", "contig", "--epochs", 3, "--no-mask-leads", "--dropout", 0],
           stochastic=["--view", "stochastic", "--workers", 0, "--max-steps", 2])


def work_of_a_process(rank, port, cache, folder):
    """One of two: each of TWO trained; step_of each case; BatchNorm's averages after a step; how
    often it was asked whether to stop, until the second process got a SIGTERM.
    """
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                       MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # as torchrun does
    told, asked = train.listen(), []
    train.join_processes = functools.lru_cache(train.join_processes)  # one group for all runs
    for name, flags in TWO.items():
        run_train(cache, folder / name, *flags)
    batch = process_batches()[rank]
    found, m = [step_of(with_dropout(), *case, batch) for case in CASES], tiny(arch="resnet18")
    step_of(m, 6, batch=batch._replace(keep=None))
    with pytest.raises(InputError, match="made with other arguments"):  # by each of them
        run_train(cache, folder / "contig", *TWO["contig"], "--tau", .2)

    def one_is_told(device):
        asked.append(device)
        if len(asked) == 5 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return told(device)

    train.train(train.get_args(argv_of(cache, folder / "told")), one_is_told)
    config, order = views.ViewConfig(view="noncontig"), [(0, np.arange(6))]
    drawn = next(train.batches(data.open_cache(cache), config, 0, order, CPU))
    torch.distributed.destroy_process_group()
    torch.save((found, m.encoder.body[1].running_mean, len(asked), drawn), folder / f"{rank}.pt")


@pytest.fixture(scope="session")
def two(cache, tmp_path_factory):
    """The folder in which two processes worked, and what each of them found."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work_of_a_process, (port, cache, folder), 2)
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


class TestTrain:
    def test_the_objective_is_nt_xent_and_a_share_of_that_of_the_streams(self):
        p = F.normalize(torch.randn(3, 2, 5, 8), dim=-1)
        want = [double_loop(z1.double(), z2.double(), .2) for z1, z2 in p]
        for terms, total in ((p, want[0] + .5 * sum(want[1:])), (p[:1], want[0])):
            got = float(train.Objective(tau=.2, aux_weight=.5)(terms))
            assert got == pytest.approx(total, abs=1e-4)

    @pytest.mark.parametrize("micro, negatives", [
        (3, "batch"), (5, "batch"), (12, "batch"), (3, "micro"), (5, "micro"), (12, "micro")])
    def test_the_gradient_is_that_of_the_whole_batch_or_of_the_mean_over_micro_batches(
            self, micro, negatives):
        m = with_dropout()
        for _ in range(2):  # gradients of the step before are gone
            got = step_of(m, micro, negatives)
        assert_close_steps(got, step_with_graph(m, micro, negatives, big_batch()))

    def test_micro_batches_change_neither_views_nor_gradient(self, cache):
        """Of `conv` with all that is random but dropout."""
        config = views.ViewConfig(view="contig", disturb=True, shift=True)
        (batch,) = train.batches(data.open_cache(cache), config, 0, [(3, np.arange(8))], CPU)
        m = model.Contrastive(model.Config(**TINY | dict(stems="conv", stem_width=16,
                                                         time_stride=4, dropout=0.)))
        assert_close_steps(step_of(m, 8, batch=batch), step_of(m, 4, batch=batch))

    def test_the_second_pass_repeats_the_first_under_autocast(self):
        m = with_dropout()
        m.precision = "bfloat16"
        first, second, other = (train.project(m, big_batch(step=step), slice(3, 6))[1]
                                for step in (5, 5, 6))
        assert torch.equal(first, second) and first.dtype == torch.float32
        m.precision = "float32"
        exact = train.project(m, big_batch(), slice(3, 6))[1]
        assert 0 < (first - exact).abs().max() < .1 < (first - other).abs().max()
        alike = train.Batch(big_batch().views[:, :1].expand(-1, 12, -1, -1), None, 5)
        a, b = (train.project(m, alike, slice(i, i + 3))[1] for i in (0, 3))
        assert (a - b).abs().max() > .1  # each micro-batch has dropout of its own

    @slow
    def test_two_processes_give_the_gradient_of_one(self, two):
        (found, mean, *_), (others, *_) = two[1]
        for case, got, other in zip(CASES, found, others):
            assert_close_steps(got, step_with_graph(with_dropout(), *case, *process_batches()))
            assert torch.equal(got[0], other[0])
        stem = tiny(arch="resnet18").encoder.body[0]  # BatchNorm's averages: of both
        halves = [stem(batch.views.flatten(0, 1).mT).mean((0, 2)) for batch in process_batches()]
        torch.testing.assert_close(mean, .1 * sum(halves) / 2)

    @slow
    def test_a_compiled_block_gives_the_same_and_repeats_its_dropout(self):
        layer, x = with_dropout().encoder.channel_layers[0], torch.randn(4, 12, 24)

        def seeded(seed):
            torch.manual_seed(seed)
            return layer(x)

        plain = seeded(0)
        model.compile_blocks(nn.ModuleList([layer]))
        first = seeded(0)
        with torch.no_grad():
            second, other = seeded(0), seeded(1)
        torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(first, plain, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(first, other, atol=1e-3)

    @pytest.mark.parametrize("negatives", ["batch", "micro"])
    def test_batch_norm_counts_each_micro_batch_once(self, negatives):
        m, batch, want = tiny(arch="resnet18"), big_batch(masked=False), 0
        stem = m.encoder.body[0]
        for i in range(0, 12, 4):
            x = batch.views[:, i:i + 4].flatten(0, 1)
            want = .9 * want + .1 * stem(x.mT).mean((0, 2)).detach()
        step_of(m, 4, negatives, batch)
        torch.testing.assert_close(m.encoder.body[1].running_mean, want)

    def test_stream_norms_are_those_at_the_token_tensors(self):
        tokens = [torch.randn(3, n, 8, requires_grad=True) for n in (50, 12)]
        pooled = [t.mean(1) for t in tokens]
        at_tokens, at_pooled = (
            [float(g.norm()) for g in torch.autograd.grad(
                (pooled[0].sin() * pooled[1]).sum(), at, retain_graph=True)]
            for at in (tokens, pooled))
        norms = train.stream_norms(at_pooled, (50, 12))
        assert [norms["grad_norm_time"], norms["grad_norm_channel"]] == pytest.approx(at_tokens)
        norms = train.stream_norms([2., 2.], (2500, 12))
        assert abs(norms["grad_norm_ratio"] - 14.43) < .01  # the paper's logs read 14.6 to 14.8
        assert norms["grad_norm_ratio_corrected"] == 1

    def test_parameter_norms_are_those_of_each_streams_stem_and_layers(self):
        m = tiny()
        step_of(m, 12)
        got = train.stream_statistics(m, [1., 2.])
        for name in ("time", "channel"):
            squares = [float(p.grad.square().sum()) for key, p in m.encoder.named_parameters()
                       if key.startswith((f"{name}_stem", f"{name}_layers"))]
            assert got[f"param_grad_norm_{name}"] == pytest.approx(math.sqrt(sum(squares)))

    @pytest.mark.parametrize("total, warmup", [(100, 20), (37, 5), (1000, 20)])
    def test_the_schedule_is_a_warm_up_and_then_torchs_one_cycle(self, total, warmup):
        got = [train.learning_rate(s, total, warmup, 3e-4, 3e-5) for s in range(total)]
        assert got[0] == 0 and math.isclose(got[warmup], 3e-4 / 25) and math.isclose(got[-1], 3e-5)
        assert math.isclose(max(got), 3e-4, rel_tol=.01)
        np.testing.assert_allclose(np.diff(got[:warmup], 2), 0, atol=1e-12)
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1)
        cycle = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 3e-4, total_steps=total - warmup, final_div_factor=1 / 2.5)
        for value in got[warmup:]:
            assert math.isclose(value, optimizer.param_groups[0]["lr"], rel_tol=1e-6)
            optimizer.step()
            cycle.step()
        assert train.learning_rate(0, 1, 0, 3e-4, 3e-5) > 0  # a run of one step takes a real one

    @pytest.mark.parametrize("argv, records, processes, want", [
        ("", (17418, 2183), 1, dict(batch=1024, micro=16, steps=17, epochs=50, total=850,
                                    warmup=20, val_batch=1024)),
        ("--micro-batch 24", (344, 78), 1, dict(batch=32, micro=16, steps=10, val_batch=32)),
        ("--epochs 3", (344, 78), 1, dict(total=30, warmup=6)),
        ("--batch-size 64 --max-steps 7", (344, 78), 1, dict(batch=64, total=7, epochs=2,
                                                             warmup=1)),
        ("--batch-size 20 --micro-batch 8", (344, 78), 1, dict(micro=7)),  # 7, 7, 6
        ("", (8 * 1024 - 1, 78), 1, dict(batch=512)), ("", (8 * 1024, 78), 1, dict(batch=1024)),
        ("", (4, 2), 1, dict(batch=2, micro=2, val_batch=2)),
        ("--batch-size 64 --micro-batch 32", (344, 78), 4, dict(micro=16, val_batch=64)),
        ("", (344, 31), 3, dict(batch=30, micro=10, val_batch=30))])
    def test_settings_fit_the_data(self, argv, records, processes, want):
        plan = train.settle(train.get_args(argv.split()), *records, processes)
        assert {key: getattr(plan, key) for key in want} == want

    @pytest.mark.parametrize("n, processes, argv, says", [
        (1, 1, "", "--batch-size 2: a batch holds at most the 1 records of folds 1-8"),
        (2, 3, "", "equal parts for each of 3 processes, which needs 2 of the 50 of fold 9"),
        (344, 3, "--batch-size 64", "--batch-size 64: .* in equal parts for each of 3 processes"),
        (344, 1, "--batch-size 512", "--batch-size 512: a batch holds at most the 344 records"),
        *((99, 1, flag, f"argument {flag.split()[0]}") for flag in (
            "--epochs 0", "--batch-size 1", "--tau nan", "--workers -1", "--aux-weight nan",
            "--seed -1", "--max-lr -1", "--micro-batch 1.5", "--mask-p 1", "--negatives none")),
        (99, 1, "--micro-batch 1 --negatives micro", "no negatives"),
        (99, 1, "--max-lr 1e-5", "--max-lr 1e-05 is below --final-lr")])
    def test_impossible_settings_are_refused(self, n, processes, argv, says):
        with refused(says):
            train.settle(train.get_args(argv.split()), n, 50, processes)

    def test_an_epoch_shows_a_record_once_and_each_has_another_order(self):
        plan = train.settle(train.get_args(["--batch-size", "8", "--max-steps", "14"]), 50, 8)
        rows = np.arange(100, 150)
        order = list(train.epoch_order(rows, plan, 0, 0))
        assert [step for step, _ in order] == list(range(14))
        for i in (0, 6):
            seen = np.concatenate([r for _, r in order[i:i + 6]])
            assert len(set(seen)) == 48 and set(seen) <= set(rows)
        assert not np.array_equal(order[0][1], order[6][1])
        for (step, seen), (again, same) in zip(order[9:], train.epoch_order(rows, plan, 0, 9)):
            assert step == again and np.array_equal(seen, same)

    def batches(self, cache, *order, seed=0, workers=0, **config):
        """Batches of some steps and rows, as (step, rows)."""
        config = views.ViewConfig(**config)
        return list(train.batches(data.open_cache(cache), config, seed, order, CPU, workers))

    @pytest.mark.parametrize("view", ["contig", "noncontig"])
    def test_batches_are_normalised_views_of_their_rows_with_masks_of_their_step(self, cache, view):
        c, rows = data.open_cache(cache), np.array([5, 3, 40])
        a, b = self.batches(cache, (0, rows), (7, rows), view=view)
        torch.testing.assert_close(a.views, torch.stack(views.VIEWS[view].cut(normalized(c, rows))))
        assert (a.step, b.step) == (0, 7) and a.keep.shape == (2, 3, 12)
        assert torch.equal(b.keep, views.draw_leads((2, 3, 12), .5, views.generator("mask", 0, 7)))
        assert not torch.equal(a.keep, b.keep) and not torch.equal(*a.keep)
        assert self.batches(cache, (0, rows), view=view, mask_leads=False)[0].keep is None

    def test_shifted_views_are_views_that_start_elsewhere_each(self, cache):
        c, rows, found = data.open_cache(cache), np.arange(12), []
        (batch,) = self.batches(cache, (3, rows), seed=5, view="noncontig", shift=True)
        for got, view in zip(batch.views, views.noncontig(normalized(c, rows))):
            for a, b in zip(got, view):
                found += [s for s in range(len(b)) if torch.equal(a, b.roll(-s, 0))]
        assert len(found) == 24 and len(set(found)) > 15  # independent of one another

    def test_equal_views_start_where_the_step_says(self, cache):
        c, rows = data.open_cache(cache), np.arange(12)
        (batch,) = self.batches(cache, (3, rows), view="noncontig", equal=True)
        starts = views.generator("equal", 0, 3).integers(501, size=12)
        want = views.equal_pair(normalized(c, rows), "noncontig", torch.from_numpy(starts))
        assert torch.equal(batch.views, torch.stack(want)) and len(set(starts)) > 8

    @pytest.mark.parametrize("view", views.VIEWS)
    def test_disturbed_views_repeat_and_differ_from_each_other_and_from_step_to_step(self, cache,
                                                                                    view):
        order = [(step, np.arange(8)) for step in (3, 3, 4)]
        seen, again, other = (batch.views for batch in self.batches(
            cache, *order, view=view, disturb=True, augment_p=0, mask_leads=False))
        (plain,) = self.batches(cache, order[0], view=view, augment_p=0, mask_leads=False)
        assert torch.equal(seen, again) and not torch.equal(seen, other)
        assert not torch.equal(*seen) and seen.shape[2] <= plain.views.shape[2]

    def test_the_pool_on_segment_views_cuts_each_from_its_own_pass(self, cache):
        batch, passed = (self.batches(cache, (3, np.arange(6)), augment_p=.9, mask_leads=True,
                                      view=view)[0] for view in ("noncontig", "stochastic"))
        (a, b), (x, y) = batch.views, passed.views
        assert torch.equal(a, x[:, ::2]) and torch.equal(b, y[:, 1::2])
        assert torch.equal(batch.keep, passed.keep)

    def test_stochastic_batches_are_augmented_records_whatever_the_workers(self, cache):
        c, config = data.open_cache(cache), views.ViewConfig(view="stochastic")
        order = (0, np.array([5, 3])), (1, np.resize(np.array([5, 8]), 18))
        runs = [[batch.views for batch in self.batches(
            cache, *order, seed=4, workers=workers, view="stochastic")] for workers in (0, 2)]
        for (step, rows), alone, parallel in zip(order, *runs):
            assert torch.equal(alone, parallel) and alone.shape == (2, len(rows), 1000, 12)
            for j, x in enumerate(normalized(c, rows).numpy()):
                want = views.augment(x, views.pool(config, 100),
                                     views.generator("augment", 4, step, rows[j]))
                np.testing.assert_array_equal(alone[:, j], want)
        (first, second), (later, _) = (found[:, 0] for found in runs[0])  # of record 5
        assert not torch.equal(first, second) and not torch.equal(first, later)

    def test_clustering_is_none_where_it_cannot_be_computed(self):
        z, classes = np.random.default_rng(0).standard_normal((6, 3)), np.arange(6) % 2
        for got in (train.clustering(z, np.zeros(6)), train.clustering(z * 0, classes)):
            assert set(got.values()) == {None}
        assert train.clustering(z + 100 * classes[:, None], classes)["silhouette"] > .9

    @slow
    def test_one_batch_is_overfitted(self):
        m = with_dropout()
        optimizer = torch.optim.Adam(m.parameters(), lr=2e-3)
        for step in range(100):
            batch = big_batch(8, step, masked=False)
            loss, _ = train.exact_step(m, batch, train.Objective(aux_weight=0), 4)
            optimizer.step()
        assert loss < .3 < math.log(15), loss


class TestRun:
    def test_a_run_folder_holds_what_it_should(self, finished, cache):
        run, out = finished
        assert "noncontig: even and odd samples" in out and "SYNTHETIC" in out
        assert re.search(rf"finished, \d+ steps; next: make eval RUN={run}", out)
        assert {path.name for path in run.iterdir()} - {"eval", "figures"} >= {
            ".lock", "args.json", "log.jsonl", "last.pt", "model.pt", "tensorboard"}
        m, saved = model.load_run(run)
        assert saved["args"]["view"] == "noncontig" and saved["args"]["epochs"] == 2
        assert saved["n_parameters"] == model.n_parameters(m)
        assert saved["data"]["fingerprint"] == data.open_cache(cache).meta["fingerprint"]

    def test_the_log_has_every_number_and_tensorboard_shows_the_same(self, finished):
        rows, shown = log_of(finished[0]), scalars(finished[0])
        assert [row["epoch"] for row in rows] == [1, 2] and MEASURED <= set(rows[0])
        assert all(0 < row["data_share"] < 1 for row in rows)
        for key in LOGGED:
            np.testing.assert_allclose(shown[key], [(r["epoch"], r[key]) for r in rows], rtol=1e-5)

    def test_the_last_validation_numbers_follow_from_the_saved_model(self, finished, cache):
        m, c, last = model.load_run(finished[0])[0], data.open_cache(cache), log_of(finished[0])[-1]
        rows, losses = np.flatnonzero(c.index.strat_fold == 9), []
        x = normalized(c, rows)
        with torch.no_grad():
            z = (m.encoder(x[:, 0::2]).z + m.encoder(x[:, 1::2]).z) / 2
            for i in range(0, len(rows) - 7, 8):  # the step is one that training never has
                keep = views.draw_leads((2, 8, 12), .5, views.generator("mask", 0, 2 ** 31 + i))
                losses.append(double_loop(*(m(x[i:i + 8, j::2], keep[j])[1][0] for j in (0, 1)),
                                          .1))
        assert last["val_loss"] == pytest.approx(np.mean(losses), abs=1e-4)
        labels = data.read_labels(c).y[rows]
        one = labels.sum(1) == 1
        want = metrics.silhouette_score(z[one], labels[one].argmax(1))
        assert last["silhouette"] == pytest.approx(want, abs=1e-4)

    def test_a_run_is_adam_on_clipped_gradients_with_the_rates_of_the_schedule(self, cache,
                                                                               tmp_path):
        run_train(cache, tmp_path, "--view", "contig", "--epochs", 2, "--dropout", 0, "--warmup", 3,
                  "--weight-decay", 1, "--clip", .05, "--max-lr", 1e-3)
        c, m = data.open_cache(cache), tiny(dropout=0.)
        rows = c.rows(data.TRAIN_FOLDS)
        optimizer, steps = torch.optim.AdamW(m.parameters(), weight_decay=1), len(rows) // 8
        for epoch, logged in enumerate(log_of(tmp_path)):
            order, losses = views.generator("order", 0, epoch).permutation(rows), []
            for i in range(steps):
                step, x = epoch * steps + i, normalized(c, order[8 * i:8 * i + 8])
                keep = views.draw_leads((2, 8, 12), .5, views.generator("mask", 0, step))
                z1, z2 = (m(view, k)[1][0] for view, k in zip(views.contig(x), keep))
                loss = model.nt_xent(z1, z2, .1)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(m.parameters(), .05)
                optimizer.param_groups[0]["lr"] = train.learning_rate(step, 2 * steps, 3, 1e-3,
                                                                      3e-5)
                optimizer.step()
                losses.append(loss.item())
            assert logged["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
        for got, want in zip(model.load_run(tmp_path)[0].parameters(), m.parameters()):
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)

    def test_without_superclasses_training_goes_on_without_clustering(self, cache, tmp_path):
        c = data.open_cache(cache)
        c.meta["label_sets"] = {}
        with mock.patch.object(train, "open_cache", lambda folder: c):
            run_train(cache, tmp_path / "r", "--max-steps", 1)
        assert log_of(tmp_path / "r")[0]["silhouette"] is None

    def test_the_same_command_is_finished_and_another_is_refused_by_name(
            self, finished, cache, tmp_path, capsys):
        run = shutil.copytree(finished[0], tmp_path / "r")
        run_train(cache, run, *SAME, "--view", "noncontig", "--workers", 0)
        assert f"finished, nothing to do; next: make eval RUN={run}" in capsys.readouterr().out
        with pytest.raises(InputError, match="(?s)--epochs: 2 then, 3 now.*--tau: 0.1 then, 0.2 now"
                           ) as error:
            run_train(cache, run, "--epochs", 3, "--tau", .2)
        assert "--seed" not in str(error.value)
        other = data.open_cache(cache)
        other.meta["fingerprint"] = "another"
        with mock.patch.object(train, "open_cache", lambda folder: other), pytest.raises(
                InputError, match="data: .* then, .* fingerprint another now"):
            run_train(cache, run, *SAME)
        for name in ("POOL", "DISTURB"):
            strengths = getattr(views, name)
            key = next(iter(strengths))
            with mock.patch.dict(strengths, {key: .123}), pytest.raises(
                    InputError, match=rf"{name}\['{key}'\] in views.py: .* then, 0.123 now"):
                run_train(cache, run, *SAME)
        assert (run / "model.pt").read_bytes() == (finished[0] / "model.pt").read_bytes()

    def test_a_second_process_is_kept_out_of_a_run_in_progress(self, cache, tmp_path):
        code = ("import fcntl, sys; file = open(sys.argv[1], 'a')\n"
                "fcntl.lockf(file, fcntl.LOCK_EX); print('held', flush=True); input()")
        with subprocess.Popen([sys.executable, "-c", code, tmp_path / ".lock"], text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            assert other.stdout.readline() == "held\n"
            with pytest.raises(InputError, match="another process trains there"):
                run_train(cache, tmp_path, "--max-steps", 1)
            other.communicate("\n")

    def test_the_loss_at_chance_counts_the_negatives_and_losses_that_there_are(self, finished):
        assert f"at chance {math.log(15):.2f}, in validation {math.log(15):.2f}" in finished[1]
        args = dict(aux_weight=.5, aux_losses=True, negatives="micro")
        got = train.chance(args, dict(batch=64, micro=4, val_batch=8))
        assert got == pytest.approx([2 * math.log(2 * 4 - 1), 2 * math.log(2 * 8 - 1)])

    @pytest.mark.parametrize("argv", [["--view", "contig", "--negatives", "micro", "--shift"],
                                      ["--view", "stochastic", "--mask-leads", "--workers", 1],
                                      ["--equal", "--clip", 0, "--precision", "tf32"],
                                      ["--late-masking", "--precision", "bfloat16"],
                                      ["--preset", "conv", "--stem-width", 16, "--time-stride", 8]])
    def test_each_option_trains_also_where_another_run_saved_nothing(self, finished, cache,
                                                                     tmp_path, argv):
        shutil.copy(finished[0] / "args.json", tmp_path)
        run_train(cache, tmp_path, "--max-steps", 2, *argv)
        (row,) = log_of(tmp_path)
        assert LOGGED <= set(row) and row["step"] == 2 and (tmp_path / "model.pt").exists()

    def test_errors_come_before_work_and_leave_no_folder(self, cache, small, tmp_path):
        for argv, says in ((["--view", "zigzag"], "unknown VIEW"),
                           (["--device", "cuda:9"], "--device cuda:9"),
                           (["--time-stride", 501], "a view has only 500 samples"),
                           (["--cache", tmp_path / "none"], "no cache in"),
                           (["--batch-size", 999], "--batch-size 999: a batch holds at most")):
            with pytest.raises(InputError, match=says):
                run_train(cache, tmp_path / "r", *argv)
        with mock.patch.dict(views.POOL, band=(.5, 80)), pytest.raises(ValueError, match="fs/2=50"):
            run_train(cache, tmp_path / "r", "--view", "stochastic")
        change_table(small, "strat_fold", 10, lambda table: table.strat_fold == 9)
        with pytest.raises(InputError, match="no records in fold 9"):
            run_train(cached(small).folder, tmp_path / "r")
        assert not (tmp_path / "r").exists()

    def test_a_non_finite_loss_stops_the_run_and_names_epoch_and_step(self, cache, tmp_path):
        wild = "--max-lr", "1e30", "--clip", 0
        with pytest.raises(FloatingPointError, match=r"(loss|norm) nan at epoch \d, step \d+; try"):
            run_train(cache, tmp_path / "r", "--epochs", 4, *wild)
        assert not (tmp_path / "r" / "model.pt").exists()
        with pytest.raises(FloatingPointError, match="in validation nan at epoch 1, step 0"):
            run_train(cache, tmp_path / "v", "--max-steps", 1, *wild)
        assert not (tmp_path / "v" / "last.pt").exists()

    @pytest.mark.parametrize("argv", [
        ["--view", "contig", "--shift"], ["--arch", "resnet18"],
        pytest.param(["--view", "stochastic", "--workers", 1], marks=slow)])
    def test_a_run_killed_at_a_random_save_and_told_to_stop_ends_bit_for_bit_like_another(
            self, cache, tmp_path, argv, capsys):
        whole, cut, argv = tmp_path / "whole", tmp_path / "cut", (*argv, "--epochs", 2)
        saves = int(np.random.default_rng().integers(1, 14))
        run_train(cache, whole, *argv)
        run_cut_short(saves, cache, cut, *argv, "--save-minutes", 0)
        run_train(cache, cut, *argv, stop=4)
        assert f"stopped at step {saves + 4} of " in capsys.readouterr().out, saves
        assert not (cut / "model.pt").exists()
        run_train(cache, cut, *argv)
        assert f"from step {saves + 4}" in capsys.readouterr().out
        assert_same(whole, cut)

    def test_a_run_killed_between_its_last_save_and_its_end_is_finished(self, finished, cache,
                                                                        tmp_path):
        run = Path(shutil.copytree(finished[0], tmp_path / "r"))
        (run / "model.pt").unlink()
        run_train(cache, run, *SAME)
        assert_same(run, finished[0])

    def test_kept_weights_are_a_run_of_their_own(self, cache, tmp_path):
        run_train(cache, tmp_path / "r", "--view", "contig", "--epochs", 2, "--keep-every", 1)
        assert same_weights(tmp_path / "r" / "epoch-002", tmp_path / "r")
        assert not same_weights(tmp_path / "r" / "epoch-001", tmp_path / "r")
        assert model.load_run(tmp_path / "r" / "epoch-001")[1]["args"]["view"] == "contig"

    @slow
    def test_a_run_that_was_really_killed_ends_like_an_undisturbed_one(self, cache, tmp_path):
        flags = "--epochs", 4, "--save-minutes", 0, "--view", "stochastic", "--workers", 1
        process = started("train.py", *argv_of(cache, tmp_path / "cut", *flags))
        wait_for_an_epoch(process, tmp_path / "cut")
        process.kill()
        process.wait()  # its worker outlives it for a moment
        assert not (tmp_path / "cut" / "model.pt").exists(), "it was too quick to be killed"
        for name in ("cut", "whole"):
            run_train(cache, tmp_path / name, *flags)
        assert_same(tmp_path / "cut", tmp_path / "whole")

    @slow
    def test_two_processes_share_the_rows_and_draw_masks_of_their_own(self, cache, two):
        a, b = (drawn for *_, drawn in two[1])
        x = normalized(data.open_cache(cache), np.arange(6))
        assert torch.equal(torch.cat([a.views, b.views], 1), torch.stack(views.noncontig(x)))
        assert a.keep.shape == b.keep.shape == (2, 3, 12) and not torch.equal(a.keep, b.keep)

    @slow
    def test_two_processes_train_as_one_does(self, cache, two, tmp_path):
        """Each draws its own views, which only a run without chance can be compared in."""
        run_train(cache, tmp_path, *TWO["contig"])
        for a, b in zip(log_of(tmp_path), log_of(two[0] / "contig"), strict=True):
            for key in ("loss", "val_loss", "grad_norm", "silhouette"):
                assert a[key] == pytest.approx(b[key], rel=.01), key
        assert len(log_of(two[0] / "stochastic")) == 1

    @real
    @slow
    @pytest.mark.parametrize("view", views.VIEWS)
    def test_real_records_are_learned_from_within_three_epochs(self, real_cache, tmp_path, view):
        run_train(real_cache.folder, tmp_path / "r", "--view", view, "--epochs", 3, "--batch-size",
                  32, "--micro-batch", 16, "--max-lr", 1e-3)
        rows = log_of(tmp_path / "r")
        assert rows[-1]["loss"] < rows[0]["loss"], rows


def settings_of(run, **more):
    """The arguments of a quick evaluation."""
    return argparse.Namespace(**dict(run=run, cache=None, device="cpu", cv=True, labels=["3shot"],
                                     labels_of="superclass", seeds=2, label_lr=None, fast=True,
                                     bootstrap=200) | more)


@pytest.fixture(scope="session")
def measured(evaluated):
    """The evaluated run as an evaluate.Run with its encoders, its metrics.csv, {Key: Scores}."""
    run = evaluate.open_run(settings_of(evaluated[0]))
    evaluate.add_models(run, [])
    blank = dict.fromkeys(("value", "low", "high"), [""])
    table = pd.read_csv(run.out / "metrics.csv", keep_default_na=False, na_values=blank)
    return run, table, evaluate.read_scores(run.out / "eval" / "scores.npz")


def protocol(y, fold=None, table3=False):
    """A Protocol of records of ten patients each: folds 1-8 / 9 / 10, or, by `fold`, all ten."""
    n = len(y)
    if fold is None:
        folds = [evaluate.Fold(*np.split(np.arange(n), [n // 2, 3 * n // 4]))]
    else:
        folds = [evaluate.Fold(np.flatnonzero((fold != f) & (fold != f % 10 + 1)),
                               np.flatnonzero(fold == f % 10 + 1), np.flatnonzero(fold == f))
                 for f in range(1, 11)]
    return evaluate.Protocol("some", y, np.arange(n) // 10, folds, table3)


def fit(z, y, strength, single=False):
    """A probe as a function z (n, d) -> scores (n, K)."""
    pipeline = evaluate.fit_pipeline(z, y, strength, single)
    return lambda new: evaluate.predict(pipeline, new, y.shape[1])


class TestScores:
    @pytest.mark.parametrize("rest", [[0, 1, 2, 3, 4], [0, 1, 2, 4]])
    def test_scores_are_scikit_learns_and_leave_out_a_class_without_positives(self, rest):
        y, p, predicted, _ = random_scores()
        y *= np.isin(range(5), rest)
        got = evaluate.score(y, p, predicted, CLASSES)
        assert got["accuracy"] == (y == predicted).all(1).mean()
        assert math.isnan(got["auroc/CD"]) == math.isnan(got["f1/CD"]) == (3 not in rest)
        y, p, predicted = (a[:, rest] for a in (y, p, predicted))
        assert got["macro_auroc"] == pytest.approx(metrics.roc_auc_score(y, p))
        assert got["macro_f1"] == pytest.approx(metrics.f1_score(y, predicted, average="macro"))
        assert got["f1/HYP"] == pytest.approx(metrics.f1_score(y[:, -1], predicted[:, -1]))

    @pytest.mark.parametrize("K", [1, 5])
    def test_each_bootstrap_draw_is_the_score_of_the_repeated_records_of_patients(self, K):
        *arrays, patients = random_scores(60)
        y, p, predicted = (a[:, :K] for a in arrays)
        y[:, -1] = patients == patients[0]  # many draws lack the class
        draws = evaluate.bootstrap(y, p, predicted, patients, 50, seed=3)
        assert 5 < np.isnan(draws[:, 0]).sum() < 45
        who = np.unique(patients)
        counts = np.random.default_rng(3).multinomial(len(who), np.full(len(who), 1 / len(who)), 50)
        for draw, count in zip(draws, counts):
            at = np.concatenate([np.flatnonzero(patients == w) for w, n in zip(who, count)
                                 for _ in range(n)])
            want = evaluate.score(y[at], p[at], predicted[at], CLASSES[:K])
            if y[at].any(0).all():
                np.testing.assert_allclose(draw, [want[m] for m in evaluate.MEASURES])
            else:  # the mean of fewer classes is another number
                assert np.isnan(draw[:2]).all() and draw[2] == pytest.approx(want["accuracy"])

    @pytest.mark.parametrize("sides", [1, 2])
    @pytest.mark.parametrize("spread", [0, .5, 2, 8])
    @pytest.mark.parametrize("runs", [2, 3, 5])
    def test_intervals_over_patients_and_runs_hold_the_truth_in_19_of_20(self, runs, spread, sides):
        """spread: deviation of runs over that of patients. The truth is 0."""
        rng, held, n = np.random.default_rng(runs), 0, 800
        for _ in range(n):
            groups = []
            for _ in range(sides):
                values = rng.normal() + spread * rng.normal(size=runs) + .3 * rng.normal(size=runs)
                noise = rng.normal(size=200) + .3 * rng.normal(size=(runs, 200))
                groups.append((values, values[:, None] + noise))
            low, high = evaluate.interval_over_runs(*groups[0], *groups[1:])
            held += low <= 0 <= high
        assert .93 < held / n < .985

    def test_two_runs_that_agree_have_an_interval_as_wide_as_either_alone(self):
        noise = np.random.default_rng(0).normal(0, .0025, 4000)
        values = np.array([.009, .010])
        low, high = evaluate.interval_over_runs(values, values[:, None] + noise)
        assert low == pytest.approx(.004, abs=.001) and high == pytest.approx(.015, abs=.001)
        one = noise + .009
        one[:5] = np.nan  # draws that lacked a class
        assert evaluate.interval_over_runs(values[:1], one[None]) == evaluate.interval(one)
        apart = evaluate.interval_over_runs(values[:1], one[None], (values[1:], one[None] ** 2))
        assert apart == evaluate.interval(one - one ** 2)

    def test_thresholds_have_the_best_f1(self):
        y, p, _, _ = random_scores(80)
        y[:, 2] = 0
        got = evaluate.best_thresholds(y, p)
        for k in (0, 1, 3, 4):
            f1 = [metrics.f1_score(y[:, k], p[:, k] >= t) for t in np.unique(p[:, k])]
            assert metrics.f1_score(y[:, k], p[:, k] >= got[k]) == pytest.approx(max(f1))
        assert got[2] == 0.5

    def test_rankme_counts_equal_directions(self):
        q = np.linalg.qr(np.random.default_rng(0).standard_normal((50, 8)))[0]
        assert evaluate.rankme(q) == pytest.approx(8, rel=1e-3)
        assert evaluate.rankme(q[:, :1] @ np.ones((1, 8))) == pytest.approx(1, rel=1e-2)

    def test_shift_distance_is_0_for_what_ignores_time_and_1_for_strangers(self):
        z, other = np.random.default_rng(0).standard_normal((2, 300, 16))
        assert evaluate.shift_distance(z, z) == 0
        assert evaluate.shift_distance(z, other) == pytest.approx(1, abs=.03)
        three = np.array([[0., 0], [3, 4], [0, 8]])  # 5, 8 and 5 apart
        assert evaluate.shift_distance(three, three + [0, 2]) == pytest.approx(2 / 6)

    def test_scores_come_back_as_they_were_written_and_damage_is_named(self, tmp_path):
        path, scores = tmp_path / "scores.npz", evaluate.Scores(*random_scores(9))
        keys = [evaluate.Key("official", "rocket", "10%", draw=1),
                evaluate.Key("cv", "both streams", leads="12")]
        evaluate.write_scores(path, {key: scores._replace(p=scores.p + i)
                                     for i, key in enumerate(keys)})
        back = evaluate.read_scores(path)
        assert list(back) == keys and np.array_equal(back[keys[1]].p, scores.p + 1)
        assert all(map(np.array_equal, back[keys[0]], scores))
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(InputError, match="scores.npz .*evaluate the run again"):
            evaluate.read_scores(path)


class TestProbe:
    def test_protocols_keep_patients_and_folds_apart(self, cache):
        c = data.open_cache(cache)
        labels, fold, patient = data.read_labels(c), c.index.strat_fold, c.index.patient_id
        tasks = evaluate.protocols(c.index, labels, cv=True)
        assert list(tasks) == ["official", "table3", "cv"] and len(tasks["cv"].folds) == 10
        for name, task in tasks.items():
            one = labels.y.sum(1) == 1
            member = one if name == "table3" else labels.member
            for part in task.folds:
                people = [set(patient[rows]) for rows in part]
                assert not (people[0] & people[1] or people[0] & people[2]
                            or people[1] & people[2])
                assert len(np.concatenate(part)) == member.sum()
            tested = {"official": [10], "table3": [9, 10], "cv": range(1, 11)}[name]
            np.testing.assert_array_equal(task.tested, np.flatnonzero(member & fold.isin(tested)))
        (official,), (table3,) = tasks["official"].folds, tasks["table3"].folds
        assert set(fold[official.choose]) == {9} and set(fold[table3.choose]) == {8}
        other = dataclasses.replace(labels, name="rhythm", member=labels.y[:, 0] > 0)
        tasks = evaluate.protocols(c.index, other)
        assert list(tasks) == ["official"] and other.member[tasks["official"].tested].all()

    def test_a_part_without_records_or_a_rare_class_is_named(self, cache):
        c = data.open_cache(cache)
        labels = data.read_labels(c)
        with pytest.raises(InputError, match="fold 10 has none with a label for the protocol off"):
            evaluate.protocols(c.index, dataclasses.replace(
                labels, member=labels.member & (c.index.strat_fold < 10)))
        labels.y[c.index.strat_fold == 10, 4] = 0
        note = evaluate.note_rare(evaluate.protocols(c.index, labels), CLASSES)
        n = labels.y[(c.index.strat_fold == 10) & labels.member, 1].sum()
        assert f"MI {n} (official)" in note and "HYP 0 (official)" in note and "\n" not in note

    @pytest.mark.parametrize("budget", ["3shot", "10shot", "10%", "1%", "100%", "10"])
    def test_few_labels_are_of_training_records_and_of_each_class(self, cache, budget):
        c = data.open_cache(cache)
        y = data.read_labels(c).y
        rows = np.flatnonzero(y.any(1) & (c.index.strat_fold < 9))
        drawn = [evaluate.draw_labels(y, rows, budget, seed) for seed in (0, 1, 2, 2)]
        for some in drawn:
            assert set(some) <= set(rows) and len(set(some)) == len(some)
            if budget.endswith("shot"):
                n = int(budget[:-4])
                assert (y[some].sum(0) >= np.minimum(y[rows].sum(0), n)).all()
                assert len(some) <= 5 * n
            else:
                count = int(budget.removesuffix("%"))
                want = max(1, round(len(rows) * count / 100)) if "%" in budget else count
                assert len(some) == want
        assert len({tuple(some) for some in drawn}) == (1 if budget == "100%" else 3)

    @pytest.mark.parametrize("single", [True, False])
    def test_a_probe_is_scikit_learns_logistic_regression(self, single):
        rng = np.random.default_rng(0)
        z = rng.standard_normal((80, 6)) * [1, 10, .1, 1, 1, 1]
        y = np.eye(5, dtype=int)[rng.integers(0, 5, 80)]
        x = (z - z.mean(0)) / z.std(0)
        want = [LogisticRegression(C=0.1).fit(x, target).predict_proba(x)
                for target in ([y.argmax(1)] if single else y.T)]
        np.testing.assert_allclose(
            fit(z, y, 0.1, single)(z), atol=1e-3,
            desired=want[0] if single else np.stack([p[:, 1] for p in want], axis=1))

    def test_one_class_alone_is_scored_like_one_of_several(self):
        rng = np.random.default_rng(0)
        z, y = rng.standard_normal((80, 6)), rng.integers(0, 2, (80, 2))
        one, both = fit(z, y[:, :1], 0.1, False)(z), fit(z, y, 0.1, False)(z)
        np.testing.assert_allclose(one, both[:, :1], atol=1e-6)

    @pytest.mark.parametrize("single", [True, False])
    def test_a_class_that_training_lacks_or_always_has_gets_a_constant(self, single):
        z = np.random.default_rng(0).standard_normal((30, 4))
        y = np.eye(5, dtype=int)[np.arange(30) % 2 + 1]  # MI and STTC alone
        y[:, 4] = not single
        p = fit(z, y, 1.0, single)(z)
        assert (p[:, [0, 3, 4]] == [0, 0, not single]).all() and np.ptp(p[:, 1]) > 0
        one = fit(z, np.eye(5, dtype=int)[[2] * 30], 1.0, single)(z)
        assert (one == np.eye(5)[2]).all()

    def test_the_weights_of_a_probe_give_its_probabilities(self):
        z, y = self.blurred(80)
        y[:, 0], y[:, 1] = 0, 1
        pipeline = evaluate.fit_pipeline(z[:, 0], y, .1, False)
        weights, biases = evaluate.weights_of(pipeline)
        logits = z[:, 0] @ weights.T + biases
        np.testing.assert_allclose(scipy.special.expit(logits),
                                   evaluate.predict(pipeline, z[:, 0], 5), atol=1e-9)

    def blurred(self, n=300):
        """Features (n, 1, 20) from which one of five classes can nearly be told, and labels."""
        rng = np.random.default_rng(0)
        y = np.eye(5, dtype=int)[rng.integers(0, 5, n)]
        return (y @ rng.standard_normal((5, 20)) + 2 * rng.standard_normal((n, 20)))[:, None], y

    @pytest.mark.parametrize("single", [True, False])
    @mock.patch.object(evaluate, "STRENGTHS", [.01, .1, 1, 10, 100])
    def test_the_penalty_is_the_one_with_the_least_cross_entropy_on_fold_9(self, single):
        z, y = self.blurred()
        task = protocol(y, table3=single)
        (fold,), loss = task.folds, []
        for strength in evaluate.STRENGTHS:
            p, true = fit(z[fold.train, 0], y[fold.train], strength, single)(z[fold.choose, 0]), (
                y[fold.choose])
            loss.append(metrics.log_loss(true.argmax(1), p) if single else
                        sum(metrics.log_loss(true[:, k], p[:, k]) for k in range(5)))
        got = evaluate.choose_probe(z, task, fold, fold.train)[1]
        assert got == evaluate.STRENGTHS[np.argmin(loss)] and 0 < np.argmin(loss) < 4

    @mock.patch.object(evaluate, "STRENGTHS", [.1])
    def test_each_record_is_scored_by_the_probe_of_a_fold_that_never_saw_its_label(self):
        (z, y), fold = self.blurred(200), np.random.default_rng(1).integers(1, 11, 200)
        got, learned = evaluate.score_probe(z, protocol(y, fold))
        for f in (1, 10):
            at, following = fold == f, fold == {1: 2, 10: 1}[f]
            learn = ~(at | following)
            probe = fit(z[learn, 0], y[learn], .1)
            p = probe(z[at, 0])
            cut = evaluate.best_thresholds(y[following], probe(z[following, 0]))
            np.testing.assert_allclose(got.p[at], p)
            np.testing.assert_array_equal(got.predicted[at], p >= cut)
            assert learned[f - 1]["records"] == learn.sum()
        assert np.array_equal(got.y, y) and np.array_equal(got.patients, np.arange(200) // 10)

    @mock.patch.object(evaluate, "STRENGTHS", [.1])
    def test_of_table_3_each_view_is_a_sample_and_the_choosing_fold_trains_too(self):
        z, y = self.blurred(80)
        z = np.concatenate([z, z + np.random.default_rng(1).normal(size=z.shape)], axis=1)
        task = protocol(y, table3=True)
        (fold,), (got, _) = task.folds, evaluate.score_probe(z, task)
        learn = np.append(fold.train, fold.choose)
        probe = fit(z[learn].reshape(-1, 20), np.repeat(y[learn], 2, axis=0), .1, True)
        want = probe(z[fold.test].reshape(-1, 20))
        np.testing.assert_allclose(got.p, want, atol=1e-3)
        assert np.array_equal(got.predicted, np.eye(5)[got.p.argmax(1)])
        assert np.array_equal(got.y, np.repeat(y[fold.test], 2, axis=0))

    def test_a_probe_for_fewer_leads_learns_from_masked_copies_of_other_folds(self):
        (z, y), fold = self.blurred(200), np.random.default_rng(1).integers(1, 11, 200)
        z, masked, six = z[:, 0], z[:, 0] * .5, z[:, 0] * (np.arange(20) < 10)
        got, learned = evaluate.score_masked_probe([z, masked], {12: z, 6: six},
                                                   protocol(y, fold), [.1] * 10)
        at, following = fold == 3, fold == 4
        learn = ~(at | following)
        probe = fit(np.concatenate([z[learn], masked[learn]]), np.tile(y[learn], (2, 1)), .1 / 2)
        np.testing.assert_allclose(got[6].p[at], probe(six[at]))
        np.testing.assert_allclose(got[12].p[at], probe(z[at]))
        cut = evaluate.best_thresholds(np.tile(y[following], (2, 1)), probe(
            np.concatenate([z[following], masked[following]])))
        np.testing.assert_allclose(learned[2]["thresholds"], cut)
        np.testing.assert_array_equal(got[6].predicted[at], probe(six[at]) >= cut)

    def test_rocket_is_its_double_loop(self):
        T, n = 60, 40
        rocket = evaluate.Rocket(T, n, seed=1)
        x = torch.randn(2, T, 12)
        got, at = rocket(x)[:, 0].numpy(), 0
        assert got.shape == (2, 2 * n)
        for dilation, padding, w, b in rocket.groups:
            m, _, length = w.shape
            wide = np.pad(x.numpy(), ((0, 0), (padding, padding), (0, 0)))
            for i in range(m):
                out = np.array([[b[i].item() + sum(float(w[i, :, j].numpy() @ r[t + j * dilation])
                                                   for j in range(length))
                                 for t in range(len(r) - (length - 1) * dilation)] for r in wide])
                np.testing.assert_allclose(got[:, at + i], (out > 0).mean(1), atol=1e-5)
                np.testing.assert_allclose(got[:, at + m + i], out.max(1), atol=1e-4)
            at += 2 * m

    @slow
    def test_training_with_labels_finds_the_classes(self, cache, finished, monkeypatch):
        monkeypatch.setattr(evaluate, "LABEL_EPOCHS", 40)
        run = evaluate.open_run(settings_of(finished[0]))
        task, net = run.protocols["official"], evaluate.Classifier(tiny(), run.views, 5)
        (fold,) = task.folds
        evaluate.fit_network(net, run, task, fold.train, (1e-2, 1e-2), seed=0)
        with torch.no_grad():
            p = net(normalized(run.cache, fold.train))[:, 0]
        assert metrics.roc_auc_score(task.y[fold.train], p) > 0.8


class TestEvaluate:
    def value(self, table, metric="macro_auroc", **facts):
        """The one line of a table for a metric and other columns."""
        facts = dict(row="pretrained", minus="", protocol="official", labels="100%", leads="all",
                     metric=metric) | facts
        (line,) = table[(table[list(facts)] == pd.Series(facts)).all(axis=1)].itertuples()
        return line

    def test_the_numbers_follow_from_the_saved_embeddings(self, measured):
        run, table, scores = measured
        with np.load(run.out / "eval" / "embeddings-pretrained.npz") as saved:
            z, y, fold = (saved[k] for k in ("z", "labels", "strat_fold"))
        assert z.shape == (100, 2, 16)
        z, known = z.mean(1).astype(float), y.any(1)
        learn, test = known & (fold <= 8), known & (fold == 10)
        x = (z - z[learn].mean(0)) / z[learn].std(0)
        strength = self.value(table, "strength").value
        p = np.stack([LogisticRegression(C=strength, max_iter=5000).fit(
            x[learn], y[learn, k]).predict_proba(x)[:, 1] for k in range(5)], axis=1)
        present = np.flatnonzero(y[test].any(0))
        aurocs = [metrics.roc_auc_score(y[test, k], p[test, k]) for k in present]
        line = self.value(table)
        assert line.value == pytest.approx(np.mean(aurocs), abs=.01)
        assert self.value(table, "records").value == learn.sum()
        draws = {row: evaluate.bootstrap(*scores["official", row, "100%", "all", 0], 200)[:, 0]
                 for row in ("pretrained", "rocket")}
        assert (line.low, line.high) == evaluate.interval(draws["pretrained"])
        minus = self.value(table, minus="rocket")
        assert minus.value == pytest.approx(line.value - self.value(table, row="rocket").value)
        assert (minus.low, minus.high) == evaluate.interval(draws["pretrained"] - draws["rocket"])
        one = (y.sum(1) == 1) & (fold >= 9)
        want = metrics.silhouette_score(z[one], y[one].argmax(1))
        assert self.value(table, "silhouette", protocol="clustering").value == pytest.approx(
            want, rel=1e-3)

    def test_each_number_has_one_line_and_every_row_has_its_numbers(self, measured):
        run, table, scores = measured
        assert list(table) == evaluate.COLUMNS and set(table.group) == {"one"}
        assert not table.duplicated(evaluate.COLUMNS[:-3]).any()
        probed = {"rocket", "untrained", "pretrained"}
        for protocol_ in ("official", "cv"):
            part = table[(table.protocol == protocol_) & (table.minus == "")]
            assert set(part.row) == probed | {"majority"}
            for leads in ("12", "6", "3", "2", "1"):
                assert set(part[part.leads == leads].row) == probed
            assert set(part[part.labels == "3shot"].row) == probed
        draws = {(key.protocol, key.draw) for key in scores if key.labels == "3shot"}
        assert draws == {("official", 0), ("official", 1), ("cv", 0)}
        assert 3 < self.value(table, "records", labels="3shot").value <= 15
        few = [metrics.roc_auc_score(s.y, s.p) for key, s in scores.items()
               if key[:3] == ("official", "pretrained", "3shot") and s.y.any(0).all()]
        if few:
            assert self.value(table, labels="3shot").value == pytest.approx(np.mean(few))
        n = len(data.read_labels(run.cache).member.nonzero()[0])
        assert len(scores["cv", "pretrained", "100%", "all", 0].y) == n

    def test_always_answering_the_most_frequent_classes_is_the_majority_row(self, measured):
        run, table, _ = measured
        y = run.labels.y[run.labels.member & (run.cache.index.strat_fold == 10)]
        assert self.value(table, "accuracy", row="majority").value == pytest.approx(
            (y == [1, 0, 0, 0, 0]).all(axis=1).mean())
        assert self.value(table, row="majority").value == 0.5

    def test_representations_are_of_the_runs_model_with_the_leads_that_are_there(self, measured):
        run, rows, keep = measured[0], np.arange(4), np.isin(LEADS, ("I", "II", "V2"))
        torch.manual_seed(0)  # the run's own beginning
        begun = model.Contrastive(model.Config(**TINY)).eval()
        x = normalized(run.cache, rows)
        there = torch.from_numpy(keep).expand(4, 12)
        for row, m in (("pretrained", model.load_run(run.folder)[0]), ("untrained", begun)):
            with torch.no_grad():
                whole, three = (model.embed(m, signal, run.views, mask).numpy() for signal, mask in
                                ((x, None), (x * there[:, None], there)))
            np.testing.assert_allclose(run.represent(row, rows), whole, atol=1e-5)
            np.testing.assert_allclose(run.represent(row, rows, keep), three, atol=1e-5)
            assert np.abs(three - whole).max() > .01
        later = run.represent("rocket", rows, change="later")
        rocket = evaluate.Rocket(1000, seed=0)
        np.testing.assert_allclose(later, rocket(x.roll(-50, 1)), atol=1e-5)

    def test_a_stream_that_sees_nothing_changes_scores_and_leaves_the_model_alone(self, measured):
        run, rows = measured[0], np.arange(8)
        before = run.represent("pretrained", rows)

        def encode(change):
            return run.apply(lambda x, keep: run.encode("pretrained", x, keep, change), rows)

        stem = run.models["pretrained"].encoder.channel_stem
        with mock.patch.object(type(stem), "forward", lambda self, x, forward=type(stem).forward:
                               forward(self, x * 0)):
            want = encode(None)
        got = encode("channel stream sees nothing")
        np.testing.assert_allclose(got, want, atol=1e-6)
        other = encode("time stream sees another record")
        assert np.abs(got - before).max() > .01 and np.abs(other - before).max() > .01
        np.testing.assert_array_equal(encode(None), before)
        assert {key.row for key in measured[2] if key.protocol == "streams"} == {
            evaluate.BOTH_STREAMS, *evaluate.ONE_STREAM}

    def test_the_probes_that_are_kept_give_the_scores_of_the_report(self, measured):
        run, _, scores = measured
        encoder, tested = model.load_encoder(run.folder), run.protocols["official"].tested
        assert encoder.classes == list(CLASSES)
        x = normalized(run.cache, tested)
        p = encoder.probabilities(encoder(x)).numpy()
        found = scores["official", "pretrained", "100%", "all", 0]
        np.testing.assert_allclose(p, found.p, atol=1e-5)
        np.testing.assert_array_equal(p >= encoder.probe["thresholds"].numpy(), found.predicted)
        keep = torch.from_numpy(np.isin(LEADS, evaluate.LEAD_SETS[3])).expand(len(x), 12)
        p = encoder.probabilities(encoder(x, keep), keep).numpy()
        found = scores["official", "pretrained", "100%", "3", 0]
        np.testing.assert_allclose(p, found.p, atol=1e-5)
        np.testing.assert_array_equal(p >= encoder.probe["masked_thresholds"].numpy(),
                                      found.predicted)

    def test_the_probe_for_fewer_leads_learned_from_whole_and_from_masked_records(self, measured):
        run, table, _ = measured
        everything, y = np.arange(100), run.labels.y
        copies = [run.represent("pretrained", everything).mean(1)]
        for p in (.5, .8):
            rng = views.generator("mask", 0, train.VAL_STEP)
            keep = views.draw_leads((100, 12), p, rng).numpy()
            assert keep.mean() == pytest.approx(1 - p, abs=.05)
            copies.append(run.represent("pretrained", everything, keep).mean(1))
        (fold,), strength = run.protocols["official"].folds, self.value(table, "strength").value
        pipeline = evaluate.fit_pipeline(np.concatenate([z[fold.train] for z in copies]),
                                         np.tile(y[fold.train], (3, 1)), strength / 3, False)
        with np.load(run.out / "eval" / "probe.npz") as probe:
            for name, want in zip(("weights", "biases"), evaluate.weights_of(pipeline)):
                np.testing.assert_allclose(probe[f"masked_{name}"], want)

    def test_a_piece_is_made_again_only_if_damaged_or_if_what_it_depends_on_changes(
            self, measured, tmp_path):
        folder = Path(shutil.copytree(measured[0].folder, tmp_path / "r"))
        run = evaluate.open_run(settings_of(folder))
        evaluate.add_models(run, [])
        made, rows = [], np.arange(100)

        def work(row="pretrained", rows=rows, keep=None):
            with mock.patch.object(evaluate.Run, "apply", lambda *_: made.append(row) or z):
                return run.represent(row, rows, keep)

        z = measured[0].represent("pretrained", rows)
        np.testing.assert_array_equal(work(), z)
        work("rocket")  # of another run of this seed, in the cache's folder
        assert made == []
        work(rows=rows[:50])
        work(keep=np.ones(12, bool))
        run.weights["pretrained"] = "other"
        work()
        run.views = views.ViewConfig(view="contig")
        work()
        run.cache.meta["fingerprint"] = "other"
        work("rocket")
        assert made == ["pretrained"] * 4 + ["rocket"]
        for path in (folder / "eval" / "pieces").rglob("output.pkl"):
            path.write_bytes(path.read_bytes()[:100])
        run = evaluate.open_run(settings_of(folder))
        evaluate.add_models(run, [])
        np.testing.assert_array_equal(work(), z)
        assert made[5:] == ["pretrained"]

    def test_other_data_have_a_folder_of_their_own_and_another_rate_is_refused(
            self, measured, synth, small, tmp_path):
        data.build_cache(small, 100, tmp_path / "c100", workers=1)
        data.build_cache(small, 500, tmp_path / "c500", workers=1)
        folder = measured[0].folder
        with pytest.raises(InputError, match="was trained at 100 Hz, .* 500 Hz.*RATE=100"):
            evaluate.open_run(settings_of(folder, cache=tmp_path / "c500"))
        other = evaluate.open_run(settings_of(folder, cache=tmp_path / "c100", cv=False))
        assert measured[0].out == folder and other.out == folder / "on-c100"
        with pytest.raises(InputError, match="no model.pt|args.json"):
            evaluate.open_run(settings_of(tmp_path))

    @slow
    @mock.patch.multiple(evaluate, LABEL_EPOCHS=1, LABEL_STEPS=10, LABEL_BATCH=8,
                         STRENGTHS=np.array([.1]))
    def test_every_row_is_there_also_for_stochastic_views(self, cache, tmp_path):
        run_train(cache, tmp_path / "r", "--view", "stochastic", "--max-steps", 2, "--workers", 0)
        settings = settings_of(tmp_path / "r", cv=False, labels=["3shot", "100%"])
        table = evaluate.measure(evaluate.open_run(settings), evaluate.ROWS)
        rows = {name: set(part.row) for name, part in table[table.minus == ""].groupby("protocol")}
        assert rows["official"] == set(evaluate.ROWS)
        assert rows["table3"] == rows["official"] - {*evaluate.NETWORKS}
        assert (tmp_path / "r" / "resnet18" / "model.pt").exists()
        for row in ("finetuned", "supervised", "resnet18-supervised"):
            assert 0 <= self.value(table, row=row, labels="3shot").value <= 1
        with mock.patch.object(evaluate, "fit_network", None):  # it is not trained again
            again = evaluate.measure(evaluate.open_run(settings), evaluate.ROWS)
        pd.testing.assert_frame_equal(table, again)


def write_results(folder, seed=0, view="contig", **changes):
    """A run folder as evaluate() leaves it, from random scores, which are returned: {Key: Scores}.

    changes: of what args.json holds
    """
    rng, (y, _, _, patients) = np.random.default_rng(seed), random_scores()
    keys = [evaluate.Key("official", row, *more) for row in ("rocket", "untrained", "pretrained")
            for more in ((), ("10",), ("10", "all", 1), ("100%", "1"))]
    scores = {}
    for key in keys:
        p = .5 * rng.random(y.shape) + .2 * y * (key.row == "pretrained")
        scores[key] = evaluate.Scores(y, p, (p > .3).astype(int), patients)
    found = evaluate.results(scores, CLASSES, 20)
    table = pd.DataFrame(
        evaluate.score_lines(found, {keys[9]: [dict(records=10)]})
        + evaluate.lines(evaluate.Key("clustering", "pretrained"), dict(silhouette=seed / 10)))
    folder.mkdir(parents=True)
    table.assign(group="x")[evaluate.COLUMNS].to_csv(folder / "metrics.csv", index=False)
    evaluate.write_scores(folder / "eval" / "scores.npz", scores)
    data.write_json(folder / "args.json", dict(args=dict(view=view, tau=.1), config={},
                                               strengths={}) | changes)
    meta = dict(data="d/synth", rate=100, records=200, synthetic=True, fingerprint="f" * 64)
    data.write_json(folder / "eval" / "about.json", dict(
        format=evaluate.FORMAT, settings=dict(label_lr=None, seeds=3), view=view, seed=seed,
        labels="superclass", classes=CLASSES, tested=dict(official=200), data=meta))
    return scores


def read_lines(path):
    """A table of metrics from its CSV file."""
    numbers = dict.fromkeys(("value", "low", "high", "sd"), [""])
    return pd.read_csv(path, dtype=dict(labels=str, leads=str), keep_default_na=False,
                       na_values=numbers)


def metric_lines(**numbers):
    """A table of metrics of one run: {`row` or `row_minus_other`: (value, low, high)}."""
    rows = []
    for name, (value, low, high) in numbers.items():
        row, _, minus = name.partition("_minus_")
        for leads in ("all", "1"):
            rows.append(("g", row, minus, "official", "100%", leads, "macro_auroc", value, low,
                         high))
    return pd.DataFrame(rows, columns=evaluate.COLUMNS)


def about_of(**changes):
    return dict(tested=dict(official=64), data=dict(synthetic=False)) | changes


class TestReport:
    @pytest.mark.parametrize("low, high, words", [
        (.01, .09, "yes.* above the untrained"), (-.09, -.01, "no, it does harm.* below the untr"),
        (-.01, .09, "these records do not tell.* not told apart from the untrained"),
        (np.nan, np.nan, "these records do not tell")])
    def test_the_answer_is_what_the_interval_of_the_difference_says(self, low, high, words):
        table = metric_lines(pretrained=(.8, .7, .9), pretrained_minus_untrained=(.04, low, high),
                             pretrained_minus_rocket=(-.02, -.031, -.01))
        text = "\n".join(evaluate.answer(table, dict(g=about_of())))
        assert re.search(words, text), text
        for number in ("0.800 [0.700, 0.900]", "+0.040", "below ROCKET (-0.020 [-0.031, -0.010])",
                       f"64 records (fold {data.TEST_FOLD})", "From lead II alone"):
            assert number in text, (number, text)
        assert "SYNTHETIC" not in text and 3 <= len(text.splitlines()) <= 6
        real = about_of(data=dict(synthetic=True))
        assert "SYNTHETIC" in "\n".join(evaluate.answer(table, dict(g=real)))

    def test_of_groups_the_highest_is_named_and_stands_against_a_base(self):
        parts = []
        for group, value in dict(a=.7, b=.9, c=.8).items():
            parts.append(metric_lines(
                pretrained=(value, value, value), pretrained_minus_untrained=(.1, .05, .2),
                pretrained_minus_rocket=(.1, .05, .2)).assign(group=group, minus_group=""))
        between = metric_lines(pretrained_minus_pretrained=(-.1, -.2, -.05))
        for one, other in (("a", "b"), ("c", "b"), ("b", "a")):
            parts.append(between.assign(group=one, minus_group=other))
        groups = {group: about_of() for group in "abc"}
        text = "\n".join(evaluate.answer(pd.concat(parts), groups))
        assert "The highest is b. Against b: a is below it (-0.100 [-0.200, -0.050]), c is" in text
        text = "\n".join(evaluate.answer(pd.concat(parts), groups, "a"))
        assert "The highest is b. Against a: b is below it" in text
        assert evaluate.headline(pd.concat([*parts, parts[0].assign(protocol="cv")])) == "official"
        assert evaluate.headline(pd.concat([parts[0], parts[0].assign(protocol="cv")])) == "cv"

    def test_a_table_holds_each_number_at_its_row_and_column(self):
        rows = [("g", row, "", "official", "100%", "all", metric, value, np.nan, np.nan)
                for row, value in (("rocket", .25), ("pretrained", .5))
                for metric, value in (("macro_auroc", value), ("rankme", 100 * value))]
        table = pd.DataFrame(rows[:-1], columns=evaluate.COLUMNS)
        text = evaluate.pivot(table, ["row"], dict(rankme="R", macro_auroc="A", absent="X"))
        cells = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()]
        assert cells[0] == ["row", "R", "A"] and len({len(line) for line in text.splitlines()}) == 1
        assert cells[2:] == [[evaluate.ROWS["rocket"], "25.0", "0.250"],
                             [evaluate.ROWS["pretrained"], "-", "0.500"]]
        assert evaluate.cell(None) == "-"

    def test_a_report_answers_first_in_under_80_lines_and_holds_the_numbers(self, evaluated):
        run, _, printed = evaluated
        text, table = (run / "report.md").read_text(), pd.read_csv(run / "metrics.csv")
        assert len(text.splitlines()) < 80
        first = text.split("\n\n")[1]
        assert first.startswith("Does pretraining help?") and first in printed
        assert "SYNTHETIC" in first and "|" not in printed and "report.md" in printed
        own = table[(table.protocol == "official") & (table.labels == "100%")
                    & (table.leads == "all") & (table.metric == "macro_auroc")]
        for line in own.itertuples():
            assert f"{line.value:.3f} [{line.low:.3f}, {line.high:.3f}]" in text, line
        for number in views.VIEWS["noncontig"].table3:  # the paper's, beside ours
            assert f"{number:.3f}" in re.search(r"\| the paper .*0.820.*", text)[0]
        assert text.count("the paper  ") == 2 and "6.424" in text

    def test_figures_show_the_numbers_beside_them(self, evaluated, cache):
        run = evaluated[0]
        table = read_lines(run / "metrics.csv")
        for name in ("fewer", "tsne"):
            assert f"(figures/{name}.png)" in (run / "report.md").read_text()
            assert (run / "figures" / f"{name}.png").stat().st_size > 10_000
        drawn = pd.read_csv(run / "figures" / "fewer.csv")
        assert {*drawn.leads} == {"all", *map(str, evaluate.LEAD_SETS)}
        for line in drawn.itertuples():
            same = table[(table.protocol == evaluate.headline(table))
                         & (table.metric == "macro_auroc")
                         & (table.minus == "") & (table.row == line.row)
                         & (table.labels == line.labels) & (table.leads == line.leads)]
            assert same.value.item() == pytest.approx(line.value, rel=1e-5)
        dots = pd.read_csv(run / "figures" / "tsne.csv")
        index, labels = data.open_cache(cache).index, data.read_labels(data.open_cache(cache))
        one = (labels.y.sum(1) == 1) & (index.strat_fold >= 9)
        assert sorted(dots.ecg_id) == sorted([*index.ecg_id[one]] * 2)
        k = labels.y[index.ecg_id.searchsorted(dots.ecg_id)].argmax(1)
        assert list(dots.label) == [CLASSES[i] for i in k]

    def test_there_is_a_colour_for_each_of_any_number_of_classes(self):
        for n in (1, 5, 9, 71):
            colors = evaluate.class_colors([f"c{i}" for i in range(n)])
            assert len({to_hex(c) for c in colors.values()}) == n

    def test_each_label_set_and_each_other_data_has_a_folder_of_its_own(self):
        specs = ["superclass", "rhythm", "AFIB AFLT", "AF=AFIB+AFLT", "A/B", "A_B", ".."]
        folders = [evaluate.results_folder("r", labels, data=other)
                   for labels in specs for other in (None, "cache/c")]
        assert len(set(folders)) == len(folders) and folders[0] == Path("r")
        for folder in folders:
            assert ".." not in folder.parts and len(folder.parts) <= 3


class TestCompare:
    def run(self, tmp_path, *names, more=()):
        """What `compare` of folders prints, its report and its table."""
        words = said(run_evaluate, "compare", *(tmp_path / name for name in names), "--bootstrap",
                     50, "--out", tmp_path / "all", *more)
        return words, (tmp_path / "all.md").read_text(), read_lines(tmp_path / "all.csv")

    def test_means_and_intervals_are_of_the_runs_of_a_group(self, tmp_path):
        scores = {name: write_results(tmp_path / name, seed, view) for name, seed, view in (
            ("a-s0", 0, "contig"), ("a-s1", 1, "contig"), ("b-s0", 5, "noncontig"))}
        words, text, table = self.run(tmp_path, *scores)

        def sample(name, row, labels="100%"):
            """Value and bootstrap draws of macro F1, means over draws of the labels."""
            found = [s for k, s in scores[name].items()
                     if (k.row, k.labels, k.leads) == (row, labels, "all")]
            return (np.mean([metrics.f1_score(s.y, s.predicted, average="macro") for s in found]),
                    np.mean([evaluate.bootstrap(*s, 50)[:, 1] for s in found], axis=0))

        for labels in ("100%", "10"):
            (a0, a0s), (a1, a1s), (b, bs) = (sample(name, "pretrained", labels) for name in scores)
            (u0, u0s), (u1, u1s) = (sample(f"a-s{i}", "untrained", labels) for i in (0, 1))
            values, draws = np.array([a0, a1]), np.stack([a0s, a1s])
            for facts, value, limits in (
                    (dict(), values.mean(), evaluate.interval_over_runs(values, draws)),
                    (dict(minus="untrained", minus_group="a"), np.mean([a0 - u0, a1 - u1]),
                     evaluate.interval_over_runs(values - [u0, u1], draws - [u0s, u1s])),
                    (dict(minus="pretrained", minus_group="b"), values.mean() - b,
                     evaluate.interval_over_runs(values, draws, (np.array([b]), bs[None])))):
                line = evaluate.look_up(table, group="a", metric="macro_f1", labels=labels, **facts)
                assert line.value == pytest.approx(value), facts
                least = -1 if facts else 0
                np.testing.assert_allclose([line.low, line.high], np.clip(limits, least, 1))
        line = evaluate.look_up(table, group="a", protocol="clustering", metric="silhouette")
        assert (line.value, line.sd) == pytest.approx((.05, .1 / math.sqrt(2)))
        assert "0.050 ± 0.071" in text and text.split("\n\n")[1] in words and "|" not in words
        for view in ("contig", "noncontig"):
            assert f"{views.VIEWS[view].table2[0]:.3f}" in text  # the paper's
        assert "SYNTHETIC" in words and "Against a: b is" in self.run(
            tmp_path, *scores, more=("--base", "a"))[0]
        with refused("--base c: give one of a, b"):
            self.run(tmp_path, *scores, more=("--base", "c"))

    @pytest.mark.parametrize("changes, words", [
        (dict(args=dict(view="contig", tau=.5)), "tau 0.1 and 0.5"),
        (dict(strengths=dict(POOL=1)), "strengths {} and"), (dict(seed=0), "seed 0 twice")])
    def test_runs_of_one_name_differ_by_their_seed_alone(self, tmp_path, changes, words):
        write_results(tmp_path / "r-s0")
        write_results(tmp_path / "r-s1", **dict(seed=1) | changes)
        with refused(f"r-s0 and .*r-s1 are of one name, but .*{words}.*rename"):
            self.run(tmp_path, "r-s0", "r-s1")

    def test_runs_on_other_patients_are_not_compared(self, tmp_path):
        for name in ("a", "b"):
            scores = write_results(tmp_path / name)
        moved = {key: s._replace(patients=s.patients + 1) for key, s in scores.items()}
        evaluate.write_scores(tmp_path / "b" / "eval" / "scores.npz", moved)
        table = self.run(tmp_path, "a", "b")[2]
        assert set(table.minus) == {"", "untrained", "rocket"} and set(table.group) == {"a", "b"}

    @pytest.mark.parametrize("file, old, new", [
        ("eval/about.json", '"label_lr"', '"x"'), ("eval/about.json", "}", ""),
        ("metrics.csv", "low", "lower"), ("metrics.csv", r"[^\n]*,untrained,[^\n]*\n", ""),
        ("metrics.csv", r"(?s)(.{300}).*", r"\1"), ("eval/scores.npz", None, None)])
    def test_damaged_results_are_named_with_what_to_do(self, tmp_path, file, old, new):
        write_results(tmp_path / "r")
        path = tmp_path / "r" / file
        if old is None:
            path.write_bytes(path.read_bytes()[:-500])
        else:
            path.write_text(re.sub(old, new, path.read_text()))
        with refused(f"{file} cannot be read.*evaluate .*again: make eval"):
            self.run(tmp_path, "r")
        assert not list(tmp_path.glob("all*"))

    def test_what_is_not_evaluated_by_this_code_for_these_labels_is_left_out(self, tmp_path):
        for name in ("good", "old"):
            write_results(tmp_path / name)
        (tmp_path / "bare").mkdir()
        with changed_json(tmp_path / "old" / "eval" / "about.json") as about:
            about["format"] -= 1
        words = self.run(tmp_path, "good", "old", "bare")[0]
        assert re.search("old is left out: evaluated by other code; make eval", words)
        assert re.search("bare is left out: not evaluated for the labels superclass", words)
        with refused("no evaluated run among 1 folders"):
            self.run(tmp_path, "good", more=("--labels-of", "rhythm"))


class TestAttention:
    def test_what_an_encoder_attends_to_follows_from_the_weights_of_its_heads(self):
        m, x, heads = tiny(depth=2).eval(), torch.randn(1, 500, 12), {}
        model.watch_attention(m, x, lambda name, layer, head, w: heads.setdefault(
            (name, layer), []).append(w[0].double().numpy()))
        found = attention.attend(m, x)
        assert list(found) == list(heads) and len(found) == 6
        for key, (weights, entropy) in found.items():
            w = np.stack(heads[key])  # (H, N, M)
            np.testing.assert_allclose(weights, w.mean(0), atol=1e-6)
            np.testing.assert_allclose(weights.sum(1), 1, atol=1e-5)
            want = scipy.stats.entropy(w, axis=2).mean() / math.log(w.shape[2])
            assert entropy == pytest.approx(want, abs=1e-5)

    @pytest.mark.parametrize("rate", data.RATES)
    @pytest.mark.parametrize("every", [.33, .8, 1.8])  # s: 180 to 33 beats a minute
    def test_r_peaks_are_found_where_they_are_and_only_in_half_of_the_leads(self, rate, every):
        signal, times = beats(rate, every)
        found = attention.r_peaks(signal, rate)
        np.testing.assert_allclose(found, times, atol=.01)
        np.testing.assert_array_equal(attention.r_peaks(-signal, rate), found)  # either way up
        rng = np.random.default_rng(0)
        spike, few, missing = signal + rng.normal(0, 10, signal.shape), 0 * signal, signal.copy()
        spike[33 * rate // 10:334 * rate // 100, :5] += 3000  # where there is no beat
        few[:, :4], missing[:, [1, 4, 7]] = signal[:, :4], 0
        for some in (spike, missing):
            assert len(attention.r_peaks(some, rate)) == len(times)
        for nothing in (0 * signal, rng.normal(0, 100, signal.shape),
                        few + rng.normal(0, 100, signal.shape)):
            assert not len(attention.r_peaks(nothing, rate))

    @real
    def test_r_peaks_of_real_records_agree_with_another_detector_and_at_both_rates(self):
        """Within 80 ms of an R peak XQRS (wfdb) finds a complex in most of eight leads; or not."""
        table, extra, missed, n = data.load_tables(PTBXL), 0, 0, 0
        for row in table.index[8::100]:  # the first is ecg_id 9
            high, low = (read_signal(table, row, rate) for rate in (500, 100))
            found, same = attention.r_peaks(high, 500), attention.r_peaks(low, 100)
            if table.ecg_id[row] == 9:  # its ten complexes, by eye
                for peaks in (found, same):
                    np.testing.assert_allclose(peaks, [.86, 1.78, 2.73, 3.71, 4.69, 5.70, 6.72,
                                                       7.74, 8.75, 9.73], atol=.03)
            others = [xqrs_detect(high[:, k] / 1000, fs=500, verbose=False) / 500
                      for k in (0, 1, 6, 7, 8, 9, 10, 11)]

            def votes(t):
                return sum(np.abs(other - t).min(initial=9) < .08 for other in others)

            inside = [t for t in found if .2 < t < 9.8]
            extra += sum(votes(t) < 4 for t in inside)
            missed += sum(np.abs(found - t).min() > .1 for t in np.concatenate(others)
                          if votes(t) >= 6 and .2 < t < 9.8)
            n += len(inside)
            assert max(np.abs(same - t).min() for t in inside) < .03
        assert n > 40 and extra + missed == 0, (n, extra, missed)

    def test_an_ecg_has_25_mm_a_second_and_10_mm_a_millivolt(self, tmp_path):
        signal = (beats(100)[0] * np.arange(1, 13) / 12).astype(np.int16)
        with mock.patch.object(attention, "save_figure") as save:
            attention.plot_ecg(signal, 100, "", tmp_path / "ecg.png")
        figure, _, numbers = save.call_args[0]
        figure.set_dpi(254)  # ten dots a millimetre
        (axis,) = figure.axes
        at = axis.transData.transform([(0, 0), (1, 0), (0, 1)]) / 10
        np.testing.assert_allclose(at[1:] - at[0], [[25, 0], [0, 10]], atol=1e-6)
        assert {text.get_text() for text in axis.texts} > set(LEADS)
        rows = np.stack([line.get_ydata() for line in axis.lines[:4]])
        want = np.concatenate([numbers["millivolt"][i * 250:(i + 1) * 250, k]
                               for i, k in enumerate((1, 4, 7, 10))])  # II aVL V2 V5
        np.testing.assert_allclose(rows[1] - rows[1, 0], want - want[0], atol=1e-9)
        np.testing.assert_allclose(rows[:-1].min(1) - rows[1:].max(1), .6)

    @pytest.mark.parametrize("flags", [[], ["--mix-leads"]])
    def test_maps_have_queries_and_keys_where_the_labels_say(self, cache, tmp_path, flags):
        run_train(cache, tmp_path / "r", "--max-steps", 1, "--time-stride", 64, *flags)
        figures, out = figures_of("maps", tmp_path / "r", "--ecg-id", 5)
        found = attention.attend(model.load_run(tmp_path / "r")[0],
                                 normalized(data.open_cache(cache), [4])[:, ::2])
        assert "ecg_id 5" in out and "attention-record-ecg5" in figures
        # 7 tokens of 64 samples, 20 ms apart in an interleaved view
        ends = {7: (-.01, 7 * 64 * .02 - .01), 12: (-.5, 11.5)}
        words = {7: "time (s)", 12: "channel token"}
        for (stream, layer), (want, _) in found.items():
            kind = "cross" if "_to_" in stream else stream
            figure, numbers = figures[f"attention-{kind}-ecg5"]
            axis = [a for a in figure.axes if a.images][stream == "channel_to_time"]
            np.testing.assert_array_equal(numbers[f"r/{stream}-1"], want)
            queries, keys = want.shape
            np.testing.assert_allclose(axis.images[0].get_array(), np.log2(
                (want * keys).clip(1 / 16, 16)), atol=1e-5)
            np.testing.assert_allclose(axis.images[0].get_extent(),
                                       (*ends[keys], *ends[queries][::-1]), atol=1e-5)
            assert axis.get_xlabel() == f"key: {words[keys]}"
            assert axis.get_ylabel().endswith(f"query: {words[queries]}")
            names = {text.get_text() for text in axis.get_xticklabels() + axis.get_yticklabels()}
            assert ("aVR" in names) == (12 in want.shape and not flags)
            assert len(axis.child_axes) == (keys == 7)  # lead II, along its own time
        np.testing.assert_allclose(numbers["r/seconds"], (np.arange(7) * 64 + 31.5) * .02)

    def test_a_superclass_is_the_mean_over_patients_with_intervals_and_the_untrained_beside(
            self, finished, cache, tmp_path):
        run, c = finished[0], data.open_cache(cache)
        argv = "maps", run, "--superclass", "NORM", "--out", tmp_path
        args = attention.get_args([str(a) for a in argv])
        rows, subject = attention.choose(c, args)
        has_it = data.read_labels(c).y[:, CLASSES.index("NORM")] == 1
        pool = c.index[has_it & c.index.strat_fold.isin([9, 10])]
        assert len(rows) == pool.patient_id.nunique() > 2 and set(rows) <= set(pool.index)
        assert f"{len(rows)} records of folds 9 and 10 with NORM" in subject
        figures, _ = figures_of(*argv)
        (m, _), fresh, x = model.load_run(run), tiny().eval(), normalized(c, rows)[:, ::2]
        found, before = ([attention.attend(n, one[None]) for one in x] for n in (m, fresh))
        np.testing.assert_allclose(figures["attention-channel-NORM"][1]["one/channel-1"],
                                   np.mean([one["channel", 0][0] for one in found], 0), atol=1e-6)
        entropy, untrained = ([one["channel", 0][1] for one in of] for of in (found, before))
        low, high = scipy.stats.t.interval(.95, len(rows) - 1, np.mean(entropy),
                                           scipy.stats.sem(entropy))
        table = pd.read_csv(tmp_path / "attention-NORM.csv").set_index("attention")
        columns = ["entropy", "entropy, half", "entropy, untrained", "ratio"]
        np.testing.assert_allclose(
            table.loc["channel", columns].astype(float),
            [(low + high) / 2, (high - low) / 2, np.mean(untrained), np.nan], rtol=1e-4)
        tokens, shares = .19 + .4 * np.arange(25)[:, None], []  # s
        for record, one in zip(c.signals[rows], found):
            near = (np.abs(tokens - attention.r_peaks(record, 100)) < .05 + 1e-6).any(1)
            if near.any():
                share = one["time", 0][0].mean(0)[near].sum()
                shares.append((share, near.mean(), share / near.mean()))
        np.testing.assert_allclose(
            table.loc["time", ["on R peaks", "chance", "ratio"]].astype(float),
            np.mean(shares, 0), rtol=1e-4)
        c.index.loc[pool.index[:2], "patient_id"] = -1  # one patient's, who counts once
        assert len(attention.choose(c, args)[0]) == len(rows) - 1

    def test_every_figure_of_a_run_is_there_with_its_numbers(self, drawn, finished, cache):
        c, (figures, out) = data.open_cache(cache), drawn
        y = data.read_labels(c).y
        row = np.flatnonzero((c.index.strat_fold == 10) & (y[:, 0] == 1) & (y.sum(1) == 1))[0]
        first = c.index.ecg_id[row]
        assert f"ecg_id {first} (NORM), fold 10" in out and "SYNTHETIC data synth" in out
        assert {name.replace(f"ecg{first}", "ID") for name in figures} == {
            "training-loss", "training-gradients", "training-clustering", "data-ages",
            "views-noncontig", "attention-record-ID", "attention-time-ID", "attention-channel-ID",
            "attention-cross-ID"}
        figure, numbers = figures["training-loss"]
        assert list(numbers.val_loss) == [row["val_loss"] for row in log_of(finished[0])]
        for axis in figure.axes:  # the level of chance, of 8 records
            assert math.log(15) in [pytest.approx(line.get_ydata()[0]) for line in axis.lines]
        assert "SYNTHETIC" in figure.legends[0].get_texts()[0].get_text()

    def test_views_are_those_of_training_with_masked_leads_flat_and_spectra(self, drawn, cache):
        figure, numbers = drawn[0]["views-noncontig"]
        every, x = normalized(data.open_cache(cache), range(100)), numbers["normalized"]
        assert (every - torch.tensor(x)).abs().amax((1, 2)).min() < 1e-6
        for got, want in zip(numbers["views"], views.noncontig(torch.tensor(x)[None])):
            np.testing.assert_allclose(got, want[0], atol=1e-6)
        keep = views.draw_leads((2, 1, 12), .5, views.generator("mask", 0, 0))[:, 0].numpy()
        np.testing.assert_array_equal(numbers["keep"], keep)
        for axis, kept in zip(figure.axes[2:4], keep):
            assert [np.ptp(line.get_ydata()) > 0 for line in axis.lines] == kept.tolist()
            assert f"{kept.sum()} of 12 leads" in axis.get_title()
        hz, power = scipy.signal.welch(x[:, 1], 100, nperseg=250)
        record, view, _ = figure.axes[4].lines
        np.testing.assert_allclose(record.get_xydata(), np.stack([hz, power], 1)[1:], rtol=1e-5)
        assert 24 < view.get_xdata()[-1] <= 25  # half of an interleaved view's rate

    def test_ages_above_89_are_a_bar_of_their_own(self, tmp_path):
        index = pd.DataFrame(dict(age=[300, 300, 300, 0, 4, 5, 89, 42, np.nan], sex=1))
        attention.plot_ages(index, "", tmp_path / "ages.png")
        rows = pd.read_csv(tmp_path / "ages.csv").set_index("age_from").records
        assert dict(rows) == {0: 2, 5: 1, 40: 1, 85: 1, 90: 3}

    def test_several_runs_share_a_figure_and_the_colours_of_the_stronger(self, finished, tmp_path):
        other = Path(shutil.copytree(finished[0], tmp_path / "other"))
        saved = torch.load(other / "model.pt")
        for key in saved["model"]:
            if "qkv" in key:
                saved["model"][key] *= 3  # attention that is less uniform
        torch.save(saved, other / "model.pt")
        half = Path(shutil.copytree(finished[0], tmp_path / "half"))
        (half / "model.pt").unlink()  # as in the middle of training
        figures, out = figures_of("plots", finished[0], other, half, "--superclass", "NORM",
                                  "--out", tmp_path)
        assert set(figures) == {
            "training-loss", "training-gradients", "training-clustering", "attention-time-NORM",
            "attention-channel-NORM", "attention-cross-NORM"}
        table = figures["training-gradients"][1]
        assert list(table.run) == ["one"] * 2 + ["other"] * 2 + ["half"] * 2
        assert "no attention maps of half" in out
        figure, numbers = figures["attention-time-NORM"]
        one, two = (np.quantile(np.abs(np.log2((w * w.shape[1]).clip(1 / 16, 16))), .995)
                    for w in (numbers["one/time-1"], numbers["other/time-1"]))
        assert two > 1.1 * one
        limits = [axis.images[0].get_clim() for axis in figure.axes if axis.images]
        np.testing.assert_allclose(limits, [(-two, two)] * 2, rtol=1e-3)
        assert set(pd.read_csv(tmp_path / "attention-NORM.csv").run) == {"one", "other"}

    def test_bad_input_is_named(self, finished, tmp_path):
        bare = Path(shutil.copytree(finished[0], tmp_path / "bare"))
        (bare / "log.jsonl").unlink()
        for says, *argv in (
                ("--ecg-id 999 is not in .*such as 1", "maps", finished[0], "--ecg-id", 999),
                ("two runs of one name", "plots", finished[0], finished[0]),
                ("none/args.json cannot be read.*make pretrain", "plots", tmp_path / "none"),
                ("bare/log.jsonl cannot be read", "plots", bare)):
            with refused(says):
                run_attention(*argv)
        with mock.patch.object(attention, "RECORDS", 1), refused("1 records .* needs 2"):
            run_attention("maps", finished[0], "--superclass", "HYP")

    @slow
    def test_figures_are_files_also_of_a_run_without_attention(self, cache, finished, tmp_path):
        run_train(cache, tmp_path / "resnet", "--arch", "resnet18", "--max-steps", 1)
        with refused("a resnet18 has no attention"):
            run_attention("maps", tmp_path / "resnet")
        out = said(run_attention, "plots", tmp_path / "resnet")
        assert "no attention maps of resnet" in out
        figures = {path.name for path in (tmp_path / "resnet/figures").iterdir()}
        assert figures >= {
            "data-ages.png", "data-ages.csv", "views-noncontig.png", "views-noncontig.npz",
            "training-loss.png", "training-loss.csv"}
        assert "training-gradients.png" not in figures  # it has no streams
        run_attention("maps", finished[0], "--format", "pdf", "--out", tmp_path)
        assert len(list(tmp_path.glob("attention-*.pdf"))) == 4


def write_forms(folder, mv, rate):
    """Write a recording mv (T, 12) in each form that data.py reads: {file: flags that it needs}."""
    folder.mkdir()
    table = pd.DataFrame(mv, columns=LEADS)
    timed = table.assign(time=np.arange(len(mv)) / rate)
    wfdb.wrsamp("w", rate, ["mV"] * 12, [lead.lower() for lead in LEADS], p_signal=mv,
                fmt=["16"] * 12, adc_gain=[1000] * 12, baseline=[0] * 12, write_dir=str(folder))
    table.to_csv(folder / "c.csv", index=False)
    timed[["time", *reversed(LEADS)]].to_csv(folder / "t.csv", index=False)
    np.save(folder / "n.npy", mv * 1e-3)
    np.savez(folder / "z.npz", signal=mv.T * 1000, fs=rate, units=["uV"] * 12, leads=LEADS)
    with h5py.File(folder / "h.h5", "w") as file:
        file["tracings"] = np.stack([mv[::-1], mv]).astype(np.float32)
        file.attrs.update(fs=rate, units="mV", leads=list(LEADS))
        file["exam_id"] = [7, 8]  # without use
    files = {"w.hea": {}, "c.csv": dict(rate=rate, unit="mV"), "t.csv": dict(unit="mV"),
             "n.npy": dict(rate=rate, unit="V", leads=LEADS), "z.npz": {}, "h.h5": {}}
    return {folder / name: flags for name, flags in files.items()}


class TestCollections:
    """Sources other than PTB-XL's own layout (Challenge folders, tables, arrays), and several."""

    @pytest.fixture
    def challenge(self, tmp_path):
        """Noise with real quirks: samples after 24 bytes of a .mat file, dates that wfdb refuses,
        names, rates, lengths, padding, a flat lead."""
        folder, rng = tmp_path / "georgia", np.random.default_rng(0)
        (folder / "g1").mkdir(parents=True)
        for i, (rate, seconds, date, sex, dx) in enumerate((
                (257, 30, "", "M", "164889003"), (400, 12, " 00/00/0000", "Female", "426783006"),
                (1000, 10, " 05-May-2020 14:50:55", "M", "164873001,426783006"),
                (500, 10, " 14:50:55 31/02/2020", "F", "Sinus rhythm, 164865005"),
                (500, 60, "", "Unknown", ""), (250, 10, "", "male", "428750005"))):
            x = rng.integers(-900, 900, (rate * seconds, 12)).astype("<i2")
            if i == 1:
                x[:rate], x[-rate:] = 0, 0  # padded, as CODE-15 is
            if i == 3:
                x[:, 5] = 0  # as in Ningbo
            (folder / "g1" / f"E{i}.mat").write_bytes(bytes(24) + x.tobytes())
            (folder / "g1" / f"E{i}.hea").write_text(
                f"E{i} 12 {rate} {len(x)}{date}\n" + "".join(
                    f"E{i}.mat 16+24 1000/mV 16 0 {x[0, c]} 0 0 {lead.lower() if i else lead}\n"
                    for c, lead in enumerate(LEADS))
                + f"#Age: 5{i}\n#Sex: {sex}\n# Dx: {dx}\n")
        return folder

    def test_a_folder_of_the_challenge_becomes_a_cache(self, challenge, capsys):
        c = cached(challenge)
        assert list(c.index.record) == [f"g1/E{i}.hea" for i in range(6)]
        assert list(c.index.ecg_id) == [*range(1, 7)] and set(c.index.source) == {"georgia"}
        assert list(c.index.age) == [50, 51, 52, 53, 54, 55]
        np.testing.assert_array_equal(c.index.sex, [0, 1, 0, 1, np.nan, 0])
        labels = data.read_labels(c, "426783006 HYP=164873001+164865005 Sinus_rhythm")
        assert labels.classes == ("426783006", "HYP", "Sinus_rhythm")
        assert labels.y.tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 1], [0] * 3, [0] * 3]
        assert labels.member.tolist() == [True] * 4 + [False, True]  # nothing is told of the fifth
        assert not data.read_labels(c).member.any()
        for i, rate in enumerate((257, 400, 1000, 500, 500, 250)):
            file = challenge / "g1" / f"E{i}.mat"
            assert data.list_recordings([file]) == [(file.with_suffix(".hea"), None)]
            x = np.fromfile(file, "<i2", offset=24).reshape(-1, 12).astype(float)
            x = x[rate:-rate] if i == 1 else x
            want = scipy.signal.resample_poly(x, 100, rate, padtype="line")[:1000]
            np.testing.assert_allclose(c.signals[i], want, atol=.51)
        data.main(data.get_args(["info", "--data", str(challenge), "--labels-of", "426783006"]))
        assert re.search(r"426783006 .* 2\n(.*\n)*members .* 5\n", capsys.readouterr().out)

    def test_a_table_tells_patients_folds_and_statements_of_0_and_1(self, challenge, capsys):
        """As MIMIC-IV-ECG's record_list.csv; ages as LUDB has them."""
        path, header = challenge / "record_list.csv", challenge / "g1" / "E0.hea"
        table = pd.DataFrame(dict(subject_id=list("aabbcd"), path=[f"g1/E{i}" for i in range(6)],
                                  abnormal=[0, 0, 1, 1, None, 0], MI=[1, 0, 0, 0, 0, 0],
                                  grade=[0, 1, 2, 0, 0, 0]))
        table.to_csv(path, index=False)
        header.write_text(header.read_text().replace("#Age: 50", "# <age>: 50"))
        found, label_sets, vocabulary = data.open_source(challenge, 100)  # without the table in it
        assert len(found) == 6 and found.age[0] == 50 and label_sets == {} and len(vocabulary) == 6
        assert "each recording counts as a patient" in capsys.readouterr().out
        c = cached(path)
        assert "column grade is not used" in capsys.readouterr().out
        assert list(c.index.patient_id) == [0, 0, 1, 1, 2, 3]
        fold = c.index.groupby("patient_id").strat_fold
        assert fold.nunique().max() == 1 and fold.first().nunique() > 1
        labels = data.read_labels(c, "abnormal")
        assert labels.y[:, 0].tolist() == [0, 0, 1, 1, 0, 0]
        assert labels.member.tolist() == [True] * 4 + [False, True]  # an empty cell: not known
        assert data.read_labels(c).y[:, 1].tolist() == [1, 0, 0, 0, 0, 0]
        for bad, says in (
                (table.assign(strat_fold=[1, 2, 3, 3, 4, 4]), "patient_id is 'a', 'a' in lines 2"),
                (table.assign(strat_fold=11), "strat_fold is '11'.* in lines 2, 3"),
                (table.assign(path="g1"), "path holds several recordings"),
                (table.assign(path="g1/none"), "holds no recording"),
                (table.drop(columns="path"), "6 rows of .*needs a column path"),
                (table[:0], "0 rows of .*needs a column path")):
            bad.to_csv(path, index=False)
            with refused(says):
                data.open_source(path, 100)

    def test_several_sources_make_one_cache_without_what_is_there_twice(self, synth, tmp_path,
                                                                       capsys):
        x = np.stack([wfdb.rdrecord(str(synth / f"records100/00000/{i:05d}_lr")).p_signal * 1000
                      for i in (1, 2, 3)] + [np.random.default_rng(0).integers(-900, 900,
                                                                               (1000, 12))])
        with h5py.File(tmp_path / "code15.h5", "w") as file:
            file["tracings"], file["exam_id"] = x[[0, 3, 3]], [4, 5, 6]
        paths, given = [synth, tmp_path / "code15.h5"], dict(rate=100, unit="uV", leads=LEADS)
        data.build_cache(paths, 100, tmp_path / "c", 1, given=given)
        c, words = data.open_cache(tmp_path / "c"), capsys.readouterr().out
        assert len(c.index) == 101 and list(c.index.ecg_id) == [*range(1, 102)]
        np.testing.assert_array_equal(c.signals[100], x[3])
        assert c.meta["left_out"] == [
            "code15.h5#0: the same samples as records100/00000/00001_lr",
            "code15.h5#2: the same samples as code15.h5#1"] and "left out: code15" in words
        assert c.index.groupby("source").size().to_dict() == dict(code15=1, synth=100)
        assert data.source_names(c.meta) == "synth + code15.h5"
        table = data.load_tables(synth)
        np.testing.assert_array_equal(c.index.strat_fold[:100], table.strat_fold)
        assert c.index.patient_id[:100].nunique() == table.patient_id.nunique()
        labels = data.read_labels(c, "SR")
        assert labels.member.tolist() == [True] * 100 + [False]
        with pytest.raises(InputError, match="3 of 103 records cannot be used.*\n.*unit"):
            data.build_cache(paths, 100, tmp_path / "d", 1)
        with pytest.raises(InputError, match="two of one name"):
            data.build_cache([synth, synth], 100, tmp_path / "d", 1)


def prepared(x, rate=100, unit="mV", leads=LEADS):
    """A signal (T, n) as an encoder at 100 Hz sees it; the leads that are there; notes."""
    return data.prepare(data.Recording("r", x, rate, [unit], list(leads)), 100)


class TestRecordings:
    def test_a_recording_is_the_same_in_every_form(self, tmp_path):
        mv = np.random.default_rng(0).integers(-900, 900, (2500, 12)) / 1000
        want = scipy.signal.resample_poly(mv * 1000, 100, 250, padtype="line")[None]
        for file, flags in write_forms(tmp_path / "f", mv, 250).items():
            (path, row), *_ = data.list_recordings([file])[::-1]
            recording = data.read_recording(path, row, **flags)
            assert recording.name == ("h-1" if file.suffix == ".h5" else file.stem)
            cut, there, notes = data.prepare(recording, 100)
            assert there.all() and notes == ["resampled from 250 to 100 Hz"], file
            np.testing.assert_allclose(cut, want, atol=1e-3, err_msg=str(file))
        assert {path.name for path, _ in data.list_recordings([tmp_path / "f"])} == {
            "w.hea", "n.npy", "z.npz", "h.h5"}  # CSV files are to be named

    def test_leads_are_found_by_name_and_what_lacks_is_masked(self):
        x = np.random.default_rng(0).normal(0, .3, (1000, 6))
        x[500, 2], x[:, 3] = np.nan, 1.5
        names = ["v2", "Lead II", "AVR", "V1", "RESP", "MDC_ECG_LEAD_I"]
        for signal in (x, x.T):
            got, there, notes = prepared(signal, leads=names)
            assert [LEADS[c] for c in np.flatnonzero(there)] == ["I", "II", "V2"]
            assert not got[:, :, ~there].any()
            for lead, column in (("V2", 0), ("II", 1), ("I", 5)):
                np.testing.assert_allclose(got[0, :, LEADS.index(lead)], 1000 * x[:, column],
                                           rtol=1e-5)
            assert notes == ["III, aVR, aVL, aVF, V1, V3, V4, V5, V6 missing, flat or not finite: "
                             "masked"]

    def test_windows_cover_a_recording_and_padding_is_cut_off(self):
        x, ends = 300 * noise(2345), "s of zeros or NaN at its ends are cut off"
        ten, none = x[:1000], np.zeros((3000, 12))
        for parts, windows, notes in (
                ([x], [ten, x[1000:2000], x[1345:]], []),
                ([none[:300], ten, none[:200]], [ten], [f"5.0 {ends}"]),
                ([ten, none + np.nan], [ten], [f"30.0 {ends}"]),
                ([none[:50], x[:950]], [np.concatenate([none[:50], x[:950]])], []),  # PTB-XL's 10 s
                ([ten, none, ten], [ten, ten], []), ([ten, none + 7.5], [ten], [])):
            got, there, words = prepared(np.concatenate(parts), unit="uV")
            np.testing.assert_allclose(got, windows, rtol=1e-5)
            assert there.all() and words == notes

    @pytest.mark.parametrize("end, old, new, says", [
        ("hea", b"V6$", b"V5", "needs some of .* each once"),
        ("hea", b"/mV", b"/furlong", "unit furlong; needs"),
        ("hea", rb"(?s)\A.*", b"\x81\xc3\0{\x1f", "cannot be read"),
        ("hea", b"^r 12 100", b"r 12 250", "4 s long"),
        ("hea", b"^r 12 100", b"r 12 9", "rate of 9"),
        ("hea", rb"(?s)\A.*", b"r/1 12 100 1000\ns 1000\n", "cannot be read"),
        ("hea", b"dat 16 1000.0(?=.* V6$)", b"dat 16 0.0", "a gain of 0"),
        ("hea", b"dat 16 1000.0", b"dat 17 1000.0", "cannot be read"),
        ("hea", rb"r\.dat", b"../r.dat", "cannot be read"),
        ("dat", rb"(?s).{24}\Z", b"", "cannot be read")])
    def test_an_unusable_record_is_named_with_its_fault(self, tmp_path, end, old, new, says):
        write_record(tmp_path / "r", comments=["age: 0 0 0", "x y 0"])  # which are no gains of 0
        path = tmp_path / "r.hea"
        assert data.try_record((path, None), 100, {})[1] is None
        raw = path.with_suffix(f".{end}").read_bytes()
        path.with_suffix(f".{end}").write_bytes(re.sub(old, new, raw, flags=re.M))
        assert re.search(f"^r.*({says})", data.try_record((path, None), 100, {})[1])

    def test_what_a_file_does_not_tell_is_asked_for(self, tmp_path):
        x = np.random.default_rng(0).normal(0, .3, (1000, 12))
        np.save(tmp_path / "n.npy", x)
        pd.DataFrame(x).to_csv(tmp_path / "c.csv", index=False, header=False)
        says = "does not tell its rate, unit or leads; give such as --source-rate 500 --unit mV"
        given = dict(rate=100, unit="mV", leads=LEADS)
        for file in (tmp_path / "n.npy", tmp_path / "c.csv"):
            for name in given:
                with refused(says):
                    data.read_recording(file, **given | {name: None})
            with refused("12.* 3 leads and 3 units"):
                data.prepare(data.read_recording(file, **given | dict(leads=LEADS[:3])), 100)
        write_record(tmp_path / "w")
        header = (tmp_path / "w.hea").read_text()
        (tmp_path / "w.hea").write_text(re.sub(r" \S+$", "", header, flags=re.M))  # without names
        with refused(says):
            data.read_recording(tmp_path / "w.hea")
        assert data.read_recording(tmp_path / "w.hea", leads=LEADS).leads == list(LEADS)

    def test_what_cannot_be_is_refused(self, tmp_path):
        x = np.random.default_rng(0).normal(0, .3, (1000, 12))
        drift = np.linspace(0, .003, 3000)[:, None] * np.ones(12)
        for changes, says in ((dict(unit="furlong"), "unit furlong; needs mV, uV or V"),
                              (dict(leads=["I"] * 12), "each once"), (dict(rate=0), "rate of 0"),
                              (dict(leads=["EEG"] * 12), "needs some of I II"),
                              (dict(x=x * 0), "all leads are flat"),
                              (dict(x=drift), "all leads are flat"),  # in each window
                              (dict(x=x * np.nan), "all leads are"),
                              (dict(x=x * 1e30), "not finite"), (dict(x=x[:900]), "9 s long"),
                              (dict(x=x[:, :2]), "12 leads and 12 units; needs numbers")):
            with refused(says):
                prepared(**dict(x=x) | changes)
        (tmp_path / "t.edf").write_text("x")
        (tmp_path / "e").mkdir()
        for path in (tmp_path / "t.edf", tmp_path / "no", tmp_path / "e"):
            with refused("holds no recording: give files .*EDF and others: see README"):
                data.list_recordings([path])


def embedded(run, tmp_path, *argv):
    """What `evaluate.py embed` writes for some files: its table by file, its arrays, its words."""
    words = said(run_evaluate, "embed", *argv, "--run", run, "--out", tmp_path / "out")
    with np.load(tmp_path / "out.npz") as arrays:
        return pd.read_csv(tmp_path / "out.csv").set_index("file"), dict(arrays), words


class TestEmbed:
    def test_probabilities_of_the_data_set_are_those_of_its_evaluation(self, evaluated, synth,
                                                                       cache, tmp_path):
        index, labels = data.open_cache(cache).index, data.read_labels(data.open_cache(cache))
        test = index.ecg_id[(index.strat_fold == data.TEST_FOLD) & labels.member]
        paths = [synth / f"records100/00000/{i:05d}_lr" for i in test]
        table, arrays, words = embedded(evaluated[0], tmp_path, *paths)
        scores = evaluate.read_scores(evaluated[0] / "eval" / "scores.npz")
        want = scores[evaluate.Key("official", "pretrained")].p
        np.testing.assert_allclose(arrays["probabilities"], want, atol=1e-5)
        np.testing.assert_allclose(table[list(CLASSES)], want, atol=1e-4)
        with np.load(evaluated[0] / "eval" / "probe.npz") as probe:
            assert f"NORM {probe['thresholds'][0]:.2f}" in words and "no medical device" in words

    def test_where_leads_are_missing_the_masked_probe_answers_and_it_says_so(self, evaluated,
                                                                             tmp_path):
        x = np.random.default_rng(0).normal(0, .3, (1000, 2))
        np.savez(tmp_path / "two.npz", ecg=x, fs=100, units="mV", leads=["I", "V2"])
        table, arrays, words = embedded(evaluated[0], tmp_path, tmp_path / "two.npz")
        encoder = model.load_encoder(evaluated[0])
        windows, keep = encoder.prepare(x, 100, "mV", ["I", "V2"])
        z = encoder(windows, keep)[0]
        np.testing.assert_allclose(arrays["z"][0], z, atol=1e-5)
        np.testing.assert_allclose(arrays["probabilities"][0], encoder.probabilities(z, keep[0]))
        line = table.iloc[0]
        assert (line["name"], line.leads, line.windows) == ("two", 2, 1)
        assert "probe that learned from masked leads" in line.notes
        assert f"NORM {encoder.probe['masked_thresholds'][0]:.2f}" in words
        assert (tmp_path / "out-ecg.png").stat().st_size > 20_000  # a single one is drawn
        with np.load(tmp_path / "out-ecg.npz") as drawn:
            assert drawn["x"].shape == (1000, 12) and not drawn["x"][:, 1].any()

    def test_bad_files_are_named_and_the_others_go_on(self, evaluated, synth, tmp_path):
        shutil.copytree(synth / "records100", tmp_path / "some")
        bad = tmp_path / "some" / "bad.hea"
        bad.write_text("bad 12 100 1000\n")
        table, arrays, words = embedded(evaluated[0], tmp_path, tmp_path / "some")
        assert "100 of 101 recordings" in words and not list(tmp_path.glob("*.png"))
        assert table.windows[str(bad)] == 0 and "cannot be read" in table.notes[str(bad)]
        assert list(arrays["files"]) == [file for file in table.index if file != str(bad)]
        assert arrays["z"].shape == (100, TINY["rep_dim"])
        with refused(r"none of 1 recordings can be used:\n.*cannot be read"):
            embedded(evaluated[0], tmp_path, bad)

    def test_without_a_probe_there_are_representations_alone(self, finished, synth, tmp_path):
        run = Path(shutil.copytree(finished[0], tmp_path / "r"))
        (run / "eval" / "probe.npz").unlink(missing_ok=True)
        table, arrays, words = embedded(run, tmp_path, synth / RECORD)
        assert list(table) == ["name", "leads", "windows", "notes"] and "make eval" in words
        assert arrays["z"].shape == (1, TINY["rep_dim"]) and arrays["probabilities"].size == 0

    def test_recordings_of_one_name_are_told_apart_by_their_files(self, evaluated, tmp_path):
        x = np.random.default_rng(0).normal(0, .3, (2, 1000, 12))
        for folder in ("a", "b"):
            (tmp_path / folder).mkdir()
            np.savez(tmp_path / folder / "r.npz", ecg=x[0], fs=100, units="mV", leads=LEADS)
        with h5py.File(tmp_path / "b" / "h.h5", "w") as file:
            file["tracings"] = x
        table, arrays, _ = embedded(evaluated[0], tmp_path, tmp_path / "a", tmp_path / "b",
                                    "--source-rate", 100, "--unit", "mV", "--leads", *LEADS)
        files = [str(tmp_path / name) for name in ("a/r.npz", "b/h.h5#0", "b/h.h5#1", "b/r.npz")]
        assert list(table.index) == list(arrays["files"]) == files
        assert list(table["name"].astype(str)) == list(arrays["names"]) == [
            "r", "h-0", "h-1", "r"]

    def test_the_lines_of_the_readme_embed_a_signal(self, evaluated):
        (lines,) = (block for block in re.findall(
            r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S) if "encoder" in block)
        here = dict(signal=np.random.default_rng(0).normal(0, 1, (5100, 3)))
        exec(lines.replace("runs/conv-s0", str(evaluated[0])), here)
        assert here["x"].shape == (3, 1000, 12) and here["keep"].sum(1).tolist() == [3] * 3
        assert here["z"].shape == (3, TINY["rep_dim"]) and here["p"].shape == (3, len(CLASSES))


def wait_for_an_epoch(process, folder):
    """Until the process has written a row of its log more than was there."""
    log = folder / "log.jsonl"
    before = log.read_text() if log.exists() else ""
    while not log.exists() or len(log.read_text()) <= len(before):
        time.sleep(.02)
        assert process.poll() is None, process.communicate()


def stop_in(process, folder, number, send):
    """Send a signal once an epoch is done; what is said until all have ended."""
    wait_for_an_epoch(process, folder)
    send(process.pid, number)
    try:
        return process.communicate(timeout=60)[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def go_on(run, cache):
    """The command that made the run."""
    run_train(cache, run, *SAME)


# A kind of file, and a command that reads it: called with the folder of a run and its cache.
READ = [("args.json", go_on), ("last.pt", go_on), ("model.pt", go_on),
        ("model.pt", lambda run, cache: model.load_encoder(run)),
        ("log.jsonl", lambda run, cache: model.read_log(run)),
        ("eval/probe.npz", lambda run, cache: model.load_encoder(run)),
        *[(name, lambda run, cache: evaluate.read_evaluated(run, "superclass"))
          for name in ("metrics.csv", "eval/about.json", "eval/scores.npz")]]


class TestSurvives:
    @pytest.mark.parametrize("how", ["cut", "emptied", "junk"])
    @pytest.mark.parametrize("name, command", READ)
    def test_a_damaged_file_is_named(self, request, finished, cache, tmp_path, name, command, how):
        if name.startswith(("eval/", "metrics")):
            request.getfixturevalue("evaluated")  # in the folder of the finished run
        run = Path(shutil.copytree(finished[0], tmp_path / "r"))
        if name == "last.pt":
            (run / "model.pt").unlink()  # a finished run does not read it
        content = (run / name).read_bytes()
        junk = np.random.default_rng(0).bytes(len(content))
        damaged = dict(cut=content[:len(content) // 2], emptied=b"", junk=junk)[how]
        (run / name).write_bytes(damaged)
        with refused(re.escape(str(run / name))):
            command(run, cache)
        assert (run / name).read_bytes() == damaged  # it is not touched

    def test_an_unfinished_run_cannot_be_loaded(self, finished, tmp_path):
        with pytest.raises(InputError, match="args.json"):
            model.load_run(tmp_path)
        shutil.copy(finished[0] / "args.json", tmp_path)
        with pytest.raises(InputError, match="model.pt"):
            model.load_run(tmp_path)

    @slow
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_to_all_processes_saves_the_step_and_ends_without_an_error(self, cache,
                                                                                tmp_path, number):
        process = started("train.py", *argv_of(cache, tmp_path / "r", "--epochs", 500, "--view",
                                               "stochastic", "--workers", 1))
        out = stop_in(process, tmp_path / "r", number, os.killpg)
        assert process.returncode == 0 and "Traceback" not in out, out
        step = torch.load(tmp_path / "r" / "last.pt")["step"]
        assert re.search(rf"stopped at step {step} of \d+; the same command goes on", out)
        assert not (tmp_path / "r" / "model.pt").exists()

    @slow
    def test_torchrun_killed_and_told_to_stop_leaves_no_process_and_goes_on(self, cache, two,
                                                                            tmp_path):
        run, whole = tmp_path / "r", two[0] / "contig"
        argv = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "--",
                "train.py", *argv_of(cache, run, *TWO["contig"], "--device", "cpu")]
        for number in (signal.SIGKILL, signal.SIGTERM):  # to torchrun alone
            out = stop_in(started(*argv), run, number, os.kill)  # it ends when all have ended
            assert out.count("stopped at step") == 1, out
        out = script(*argv)
        assert out.count(": finished, ") == 1 == out.count("epoch 3  loss")
        assert_same(whole, run)

    @slow
    def test_two_processes_stop_at_the_same_step_when_one_is_told(self, two):
        folder, found = two
        assert [asked for _, _, asked, _ in found] == [5, 5]
        assert torch.load(folder / "told" / "last.pt")["step"] == 5

    def test_a_second_ctrl_c_stops_at_once(self):
        before = [signal.getsignal(number) for number in train.SIGNALS]
        told = train.listen()
        try:
            assert not told(CPU)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
                assert signal.getsignal(number) != signal.SIG_DFL  # of which we would die
                os.kill(os.getpid(), number)
            assert told(CPU)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        finally:
            for number, handler in zip(train.SIGNALS, before):
                signal.signal(number, handler)

    def test_a_run_of_a_gpu_goes_on_without_one(self, cache, finished, tmp_path):
        run_cut_short(1, cache, tmp_path, *SAME)
        with mock.patch.object(torch.serialization, "location_tag", lambda storage: "cuda:7"):
            torch.save(torch.load(tmp_path / "last.pt"), tmp_path / "last.pt")
        with pytest.raises(RuntimeError, match="(?i)cuda"):
            torch.load(tmp_path / "last.pt")
        run_train(cache, tmp_path, *SAME)
        assert_same(finished[0], tmp_path)

    @cuda
    @pytest.mark.parametrize("first, then", [("cuda", "cpu"), ("cpu", "cuda")])
    def test_a_run_goes_on_on_another_device(self, finished, cache, tmp_path, first, then):
        flags = *SAME, "--precision", "float32", "--device"
        run_cut_short(1, cache, tmp_path, *flags, first)
        run_train(cache, tmp_path, *flags, then)
        for got, want in zip(log_of(tmp_path), log_of(finished[0]), strict=True):
            assert got["val_loss"] == pytest.approx(want["val_loss"], rel=.05)

    def test_a_full_disk_is_named_and_the_state_of_before_kept(self, cache, tmp_path):
        run_cut_short(1, cache, tmp_path, *SAME)
        before = (tmp_path / "last.pt").read_bytes()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        # a write beyond it fails as one on a full disk does
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
        try:
            with pytest.raises(OSError, match=r"last.pt cannot be written .* make room, and give"):
                run_train(cache, tmp_path, *SAME)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (tmp_path / "last.pt").read_bytes() == before
        assert not list(tmp_path.glob("*.tmp*"))

    def test_out_of_memory_says_what_to_halve(self, cache, tmp_path, monkeypatch):
        monkeypatch.setattr(train, "listen", lambda: lambda device: False)
        monkeypatch.setattr(sys, "argv", ["train.py", *argv_of(cache, tmp_path / "r")])
        for fail in (lambda *_: torch.empty(1 << 55), lambda *_: np.empty(1 << 55),
                     mock.Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory."))):
            monkeypatch.setitem(train.STEPS, "batch", fail)
            with pytest.raises(InputError, match="out of memory .* halve --micro-batch 4"):
                train.main()
        monkeypatch.setitem(train.STEPS, "batch", lambda *args: torch.ones(2) @ torch.ones(3))
        with pytest.raises(RuntimeError, match="size"):
            train.main()


class TestMake:
    def make(self, *argv, cwd=HERE, ok=True):
        done = subprocess.run(["make", *argv], cwd=cwd, capture_output=True, text=True)
        assert (done.returncode == 0) == ok, done.stdout + done.stderr
        return done.stdout + done.stderr

    @pytest.fixture
    def folder(self, tmp_path):
        """The Makefile beside a `.venv` whose python notes its command line, makes the files that
        the scripts would; it fails for command lines that hold a line of the file `broken`, and
        takes a minute for the script that the file `long` names.
        """
        for name in ("Makefile", "requirements.txt"):
            shutil.copy(HERE / name, tmp_path)
        python = tmp_path / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(textwrap.dedent("""\
            #!/bin/sh
            echo "$@ threads=$OMP_NUM_THREADS" >> log
            touch broken long
            if echo "$@" | grep -qFf broken; then exit 1; fi
            if test "$1" = "$(cat long)"; then echo $$ > pid; exec sleep 60; fi
            run=$(echo "$@" | sed -n 's/.* --run \\([^ ]*\\).*/\\1/p')
            case "$1 $2" in
                train.py*) mkdir -p $run; test -e $run/model.pt || touch $run/model.pt;;
                "evaluate.py run") touch $run/report.md;;
            esac
            """))
        python.chmod(0o755)
        (tmp_path / ".venv" / ".done").touch()
        return tmp_path

    def test_make_alone_lists_every_public_target_and_variable(self):
        text = (HERE / "Makefile").read_text()
        wanted = {*re.search(r"\.PHONY: (.*)", text)[1].split()}
        wanted |= {*re.findall(r"^([A-Z]+) *\?=", text, re.M)}
        assert len(wanted) > 30 and wanted - {*re.findall(r"\w+", self.make())} == set()

    def test_views_aliases_rates_and_presets_are_those_of_the_scripts(self):
        text = (HERE / "Makefile").read_text()
        assert re.search(r"NAMES +:= (.*)", text)[1].split() == list(views.VIEWS)
        assert re.search(r"filter (paper.*?),", text)[1].split() == list(model.PRESETS)
        for name, view in views.VIEWS.items():
            for word in {name, view.alias} - {""}:
                out = self.make("-n", "pretrain", f"VIEW={word}")
                assert f"download --data data/ptbxl --rate {view.rate}\n" in out
                assert f"cache/ptbxl-{view.rate} --run runs/{name}-s0 " in out
        assert "--cache cache/ptbxl-100" in self.make("-n", "pretrain", "PRESET=conv")

    def test_other_data_are_not_downloaded(self):
        out = self.make("-n", "pretrain", "DATA=../elsewhere /b/more", "RATE=100", "NPROC=2")
        assert "data.py download" not in out and "--out cache/elsewhere+more-100" in out
        assert "--shutdown-timeout 600" in out  # longer than a step may take

    @pytest.mark.parametrize("given, valid", (
        ("VEIW=contig", "VIEW SEED PRESET"), ("VIEW=zigzag", "stochastic contig noncontig"),
        ("PRESET=large", "paper, small, conv"), ("RATE=250", "100 or 500"),
        ("ROWS=contig+equal zigzag", "stochastic contig noncontig"),
        ("ARGS=--epochs 2 --view contig", "VIEW, SEED, RUN"), ("ARGS=--run=there", "RUN")))
    def test_what_is_mistyped_ends_before_any_work(self, folder, given, valid):
        for target in ("pretrain", "study"):
            out = self.make(target, given, cwd=folder, ok=False)
            assert given.split("=")[1].split()[-1] in out or "unknown variable VEIW" in out
            assert valid in out and not (folder / "log").exists()

    def test_an_old_python_is_refused_before_an_environment_is_made(self, folder):
        old = folder / "old"
        old.write_text(f"""#!/bin/sh
            test "$1" = -c || touch made
            exec {sys.executable} -c 'import sys; sys.version_info = 3, 10; exec(sys.argv[1])' "$2"
            """)
        old.chmod(0o755)
        shutil.rmtree(folder / ".venv")
        out = self.make("pretrain", f"PYTHON={old}", cwd=folder, ok=False)
        assert "3.11 or later" in out and "Traceback" not in out
        assert not (folder / "made").exists() and not (folder / ".venv").exists()

    def test_a_study_goes_on_after_a_failure_names_it_and_resumes(self, folder):
        """Runs that ended are not evaluated again, others not left out: `broken` stands for all."""
        study = ("study", "ROWS=contig noncontig+equal+tau=0.2", "SEEDS=2", "JOBS=2", "RATE=100")
        (folder / "broken").write_text("contig-s1\n")
        out = self.make(*study, "ARGS=--epochs 1", cwd=folder, ok=False)
        assert out.count("without result: runs/study/contig-s1\n") == 1
        log = (folder / "log").read_text()
        assert log.count("train.py") == 4 and log.count("evaluate.py run") == 3
        assert "--view noncontig" in log and "--equal --tau=0.2 --epochs 1" in log
        both = [f"runs/study/{row}-s0" for row in ("contig", "noncontig+equal+tau=0.2")]
        done = " ".join([*both, both[1][:-1] + "1"])
        assert f"compare {done} --labels-of superclass --out runs/study/compare" in log
        assert f"plots {' '.join(both)} --out runs/study/figures" in log
        share = -(-os.cpu_count() // 2)
        assert log.count(f"--epochs 1 threads={share}\n") == 4
        for broken in ("", "noncontig+equal+tau=0.2-s0 --seed\n"):  # then: trained with other flags
            (folder / "log").unlink()
            (folder / "broken").write_text(broken)
            out = self.make(*study, "ARGS=--epochs 1", cwd=folder, ok=not broken)
            log = (folder / "log").read_text()
            assert log.count("train.py") == 4 and log.count("evaluate.py run") == (not broken)
            assert f"without result: {both[1] if broken else 'none'}\n" in out

    @slow
    def test_a_view_of_ones_own_is_a_function_an_entry_and_a_name(self, cache, tmp_path):
        """As the README says it."""
        for path in [*HERE.glob("*.py"), HERE / "Makefile", HERE / "requirements.txt"]:
            shutil.copy(path, tmp_path)
        example = re.search(r"```python\n(def skip.*?)\n\n(.*?)```",
                            (HERE / "README.md").read_text(), re.S)
        for name, old, new in (
                ("views.py", "\nVIEWS = {\n", f"\n{example[1]}\n\nVIEWS = {{\n{example[2]}"),
                ("Makefile", ":= stochastic contig", ":= skip stochastic contig")):
            text = (tmp_path / name).read_text()
            assert text.count(old) == 1
            (tmp_path / name).write_text(text.replace(old, new))
        out = self.make("-n", "pretrain", "VIEW=skip", cwd=tmp_path)
        assert "--rate 500" in out and "--view skip" in out and "runs/skip-s0" in out
        out = script("train.py", "--cache", cache, "--view", "jump", *TINY_FLAGS, "--max-steps", 2,
                     cwd=tmp_path)
        assert "two windows of 7.5 s" in out
        assert (tmp_path / "runs" / "skip-s0" / "model.pt").exists()

    @pytest.mark.parametrize("script", ("train.py", "evaluate.py"))
    def test_a_signal_to_make_ends_the_study_and_the_script_that_runs(self, folder, script):
        (folder / "long").write_text(script)
        (folder / "pid").touch()
        study = subprocess.Popen(["make", "study", "SEEDS=1", "RATE=100"], cwd=folder,
                                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (folder / "pid").read_text().endswith("\n"):
            assert study.poll() is None
            time.sleep(.01)
        study.terminate()
        assert study.wait(20) != 0
        with pytest.raises(ProcessLookupError):
            os.kill(int((folder / "pid").read_text()), 0)
        assert (folder / "log").read_text().splitlines()[-1].startswith(script)

    def test_help(self, capsys):
        for script, commands in (
                (train, [""]), (model, [""]), (data, ["download", "cache", "synth", "info"]),
                (evaluate, ["run", "embed", "compare"]), (attention, ["maps", "plots"])):
            for command in commands:
                with pytest.raises(SystemExit, match="^0$"):
                    script.get_args([*command.split(), "--help"])
                assert "show this help" in capsys.readouterr().out

    @slow
    def test_importing_does_nothing_and_loading_a_run_needs_no_readers(self, finished, tmp_path):
        code = ("import sys, torch, numpy as np\n"
                f"sys.path.insert(0, {str(HERE)!r}); import model; model.load_run(sys.argv[1])\n"
                "assert not {'requests', 'wfdb', 'pandas'} & set(sys.modules)\n"
                "a, b = torch.get_rng_state(), np.random.get_state()[1].copy()\n"
                "import attention\n"
                "assert (torch.get_rng_state() == a).all()\n"
                "assert (np.random.get_state()[1] == b).all()")
        subprocess.run([sys.executable, "-c", code, finished[0]], cwd=tmp_path, check=True)
        assert not list(tmp_path.iterdir())
