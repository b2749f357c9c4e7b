"""The tests: each compares with an oracle (a double loop, a closed form, another library).

    make test                       # everything, under ten minutes on two cores
    make test FAST=1                # without the slow ones, under two minutes
    make test PTBXL=../shared/ptbxl500     # with real records, in PTB-XL's layout
"""
import os

os.environ["OMP_NUM_THREADS"] = "1"  # tiny models: threads only get in each other's way

import contextlib
import copy
import dataclasses
import http.server
import io
import json
import math
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import ecgmentations
import numpy as np
import pandas as pd
import pytest
import scipy.ndimage
import scipy.stats
import torch
import torch.nn as nn
import torch.nn.functional as F
import wfdb
from matplotlib.figure import Figure
from sklearn import metrics
from sklearn.linear_model import LogisticRegression

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
CPU = torch.device("cpu")
TINY = dict(width=24, heads=2, depth=1, ff_mult=2, stem_width=12, time_stride=20, channel_bins=16,
            fusion_width=32, rep_dim=16, proj_dim=8)
TORCHRUN = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"
TINY_FLAGS = [f"--{k.replace('_', '-')}={v}" for k, v in TINY.items()]


def script(*argv, ok=True, **more):
    """Run a script of the project; return its output. With ok=False it must fail."""
    done = subprocess.run([sys.executable, *map(str, argv)], cwd=HERE, text=True,
                          capture_output=True, **more)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout + done.stderr


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


def rewrite(folder, ecg_id=3, rate=100, signal=None, **changes):
    """Write one record of a folder again, with other samples or header fields."""
    table = pd.read_csv(folder / data.TABLES[0]).set_index("ecg_id")
    path = folder / table.loc[ecg_id, data.RATES[rate]]
    old = wfdb.rdrecord(str(path), physical=False)
    fields = dict(fs=rate, units=old.units, sig_name=old.sig_name, fmt=old.fmt,
                  adc_gain=old.adc_gain, baseline=old.baseline,
                  d_signal=old.d_signal if signal is None else signal) | changes
    wfdb.wrsamp(path.name, write_dir=str(path.parent), **fields)
    return path


def cached(folder, out="cache", **more):
    data.build_cache(folder, 100, folder.parent / out, workers=1, **more)
    return data.open_cache(folder.parent / out)


class TestData:
    def test_normalize_is_the_z_score_of_each_lead(self):
        x = np.random.default_rng(0).integers(-3000, 3000, (4, 100, 12)).astype(np.int16)
        want = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
        got = data.normalize(torch.from_numpy(x))
        assert got.dtype == torch.float32
        np.testing.assert_allclose(got, want, atol=1e-4)
        np.testing.assert_allclose(data.normalize(torch.from_numpy(x[0])), want[0], atol=1e-4)

    @pytest.mark.parametrize("level", [0, 1, 1234, -32767])
    def test_a_flat_lead_becomes_zeros(self, level):
        x = torch.randint(-500, 500, (2, 1000, 12), dtype=torch.int16)
        x[:, :, 4] = level
        x[0, 500:, 4] += 1  # one step of the recorder is flat too
        y = data.normalize(x)
        assert (y[:, :, 4] == 0).all() and y.isfinite().all()
        assert y[:, :, 5].std() > 0.9

    @pytest.mark.parametrize("rate", data.RATES)
    def test_the_cache_holds_what_wfdb_reads(self, synth, tmp_path, rate):
        data.build_cache(synth, rate, tmp_path / "c", workers=2)
        c, table = data.open_cache(tmp_path / "c"), data.load_tables(synth)
        for row in (0, 31, 99):
            path = synth / table[data.RATES[rate]][row]
            np.testing.assert_allclose(c.signals[row], wfdb.rdrecord(str(path)).p_signal * 1000,
                                       atol=1e-6)
        assert list(c.index.ecg_id) == list(table.ecg_id) and c.meta["synthetic"]
        assert c.signals.shape == (100, 10 * rate, 12)

    def test_leads_are_found_by_name_in_any_case_and_order(self, small):
        before = cached(small).signals[2].copy()
        path = small / pd.read_csv(small / data.TABLES[0]).filename_lr[2]
        order = np.random.default_rng(0).permutation(12)
        rewrite(small, signal=wfdb.rdrecord(str(path), physical=False).d_signal[:, order],
                sig_name=[LEADS[i].lower() for i in order])
        np.testing.assert_array_equal(cached(small).signals[2], before)

    def test_the_cache_is_kept_until_its_source_or_format_changes(self, small, capsys, monkeypatch):
        first = cached(small).meta
        assert cached(small).meta == first and "up to date" in capsys.readouterr().out
        path = rewrite(small)
        os.utime(path.with_suffix(".dat"), (1, 1))
        second = cached(small).meta
        assert second["source"] != first["source"]
        assert second["fingerprint"] == first["fingerprint"]  # the samples are the same
        monkeypatch.setattr(data, "FORMAT", 99)
        with pytest.raises(InputError, match="format 1, this code reads 99"):
            data.open_cache(small.parent / "cache")
        assert cached(small).meta["format"] == 99

    @pytest.mark.parametrize("changes, says", [
        (dict(sig_name=["I", "II", "III", "AVR", "AVL", "AVF", "V1", "V2", "V3", "V4", "V5", "X"]),
         "leads .* X; needs"),
        (dict(fs=250), "1000 samples at 250 Hz; needs 1000 at 100 Hz"),
        (dict(units=["uV"] * 12), "units uV; needs mV"),
        ("short", "500 samples at 100 Hz"), ("11 leads", "leads I .*V5; needs"),
        ("invalid", "1 time points hold an invalid sample"),
        ("cut", "header"), ("long", "the header tells of 24000 bytes, the file has 24024"),
        ("flip", "checksum"), ("garbage", "unreadable")])
    def test_an_unusable_record_is_named_with_its_fault(self, small, changes, says, capsys):
        path = small / pd.read_csv(small / data.TABLES[0]).filename_lr[2]
        dat, hea = path.with_suffix(".dat"), path.with_suffix(".hea")
        old = wfdb.rdrecord(str(path), physical=False).d_signal
        raw = bytearray(dat.read_bytes())
        if isinstance(changes, dict):
            rewrite(small, **changes)
        elif changes == "short":
            rewrite(small, signal=old[:500])
        elif changes == "11 leads":
            rewrite(small, signal=old[:, :11], units=["mV"] * 11, fmt=["16"] * 11,
                    sig_name=[n.upper() for n in LEADS[:11]], adc_gain=[1000.] * 11,
                    baseline=[0] * 11)
        elif changes == "invalid":
            old[77, 3] = -32768
            rewrite(small, signal=old)
        elif changes == "garbage":
            hea.write_bytes(os.urandom(300))
        else:
            raw = raw[:-24] if changes == "cut" else raw + raw[:24] if changes == "long" else raw
            raw[100] ^= changes == "flip"
            dat.write_bytes(raw)
        with pytest.raises(InputError, match=f"1 of 20 records(.|\n)*00003_lr.*({says})"):
            cached(small)
        assert not (small.parent / "cache").exists()
        assert not list(small.parent.glob("cache.tmp*"))
        kept = cached(small, skip_bad=True)
        assert len(kept.signals) == 19 and 3 not in set(kept.index.ecg_id)
        capsys.readouterr()
        cached(small)
        assert "19 records at 100 Hz, 1 left out" in capsys.readouterr().out

    def test_a_flat_lead_is_usable_and_counted(self, small):
        path = small / pd.read_csv(small / data.TABLES[0]).filename_lr[2]
        signal = wfdb.rdrecord(str(path), physical=False).d_signal
        signal[:, 7] = 5
        rewrite(small, signal=signal)
        assert cached(small).meta["records_with_a_flat_lead"] == 1

    def test_missing_and_half_downloaded_folders(self, small, tmp_path):
        with pytest.raises(InputError, match="no ptbxl_database.csv in .*nowhere.*py download"):
            data.build_cache(tmp_path / "nowhere", 100, tmp_path / "c")
        for path in list((small / "records100").rglob("*.dat"))[:5]:
            path.unlink()
        with pytest.raises(InputError, match="5 of 40 record files are missing.*data.py synth"):
            cached(small)
        (small / data.SYNTHETIC).unlink()
        with pytest.raises(InputError, match="5 of 40 record files are missing.*data.py download"):
            cached(small)

    def test_damaged_caches(self, small, tmp_path):
        out = small.parent / "cache"
        with pytest.raises(InputError, match="no cache in"):
            data.open_cache(out)
        cached(small)
        with open(out / "signals.int16", "r+b") as file:
            file.truncate(1000)
        with pytest.raises(InputError, match="damaged or old: 1000 bytes.*make it again: rm -r"):
            data.open_cache(out)
        for name, text in (("index.csv", "ecg_id\n"), ("meta.json", "{"), ("meta.json", "{}")):
            (out / name).write_text(text)
            with pytest.raises(InputError, match="damaged or old"):
                data.open_cache(out)
        (out / "signals.int16").unlink()
        with pytest.raises(InputError, match="damaged or old"):
            data.open_cache(out)
        (tmp_path / "mine").mkdir()
        with pytest.raises(InputError, match="exists and is no cache"):
            data.build_cache(small, 100, tmp_path / "mine")

    def test_a_cache_travels_to_a_worker_as_a_path(self, cache):
        c = data.open_cache(cache)
        sent = pickle.dumps(c)
        assert len(sent) < 1000
        np.testing.assert_array_equal(pickle.loads(sent).signals[7], c.signals[7])

    @pytest.mark.parametrize("column, value", [("patient_id", None), ("strat_fold", None),
                                               ("scp_codes", "{'NORM"), ("filename_lr", None)])
    def test_a_damaged_table_is_refused(self, small, column, value):
        table = pd.read_csv(small / data.TABLES[0])
        table[column] = table[column].astype(object)
        table.loc[4, column] = value
        table.to_csv(small / data.TABLES[0], index=False)
        with pytest.raises(InputError, match="is damaged .* get it again"):
            data.load_tables(small)

    def test_a_patient_in_two_folds_is_refused(self, small):
        table = pd.read_csv(small / data.TABLES[0])
        table.loc[0, "patient_id"] = table.patient_id[11]
        table.to_csv(small / data.TABLES[0], index=False)
        with pytest.raises(InputError, match="more than one fold"):
            data.load_tables(small)

    def test_write_atomic_leaves_the_old_file_when_writing_fails(self, tmp_path):
        path = tmp_path / "a" / "file"
        data.write_atomic(path, lambda tmp: tmp.write_text("old"))

        def fail(tmp):
            tmp.write_text("half")
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            data.write_atomic(path, fail)
        assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]

    def test_info_counts_by_fold_and_class(self, synth):
        out = script("data.py", "info", "--data", synth)
        table = data.load_tables(synth)
        assert re.search(r"all +100 +" + " +".join(str(table[c].sum()) for c in CLASSES), out), out
        assert f"{table.patient_id.nunique()} patients" in out and "(synthetic)" in out

    @real
    def test_real_superclass_counts_are_table_1(self):
        folder = Path(PTBXL).parent / "ptbxl_metadata"
        if not folder.exists():
            pytest.skip(f"no {folder} with the tables of all records")
        table = data.load_tables(folder)
        assert len(table) == 21799 and table.patient_id.nunique() == 18869
        assert list(table[list(CLASSES)].sum()) == [9514, 5469, 5235, 4898, 2649]

    @real
    def test_real_records_match_wfdb_and_obey_einthoven(self, tmp_path):
        data.build_cache(PTBXL, 100, tmp_path / "c")
        c, table = data.open_cache(tmp_path / "c"), data.load_tables(PTBXL)
        for row in range(0, len(table), 50):
            record = wfdb.rdrecord(f"{PTBXL}/{table.filename_lr[row]}")
            np.testing.assert_array_equal(c.signals[row], np.rint(record.p_signal * 1000))
        x = c.signals.astype(int)
        assert np.median(np.abs(x[..., 0] + x[..., 2] - x[..., 1])) <= 2  # I + III = II


class TestSynth:
    def test_limb_leads_obey_einthoven_and_goldberger(self, cache):
        x = np.asarray(data.open_cache(cache).signals, dtype=int)
        I, II, III, aVR, aVL, aVF = np.moveaxis(x[..., :6], -1, 0)
        for left, right in ((III, II - I), (aVR, -(I + II) / 2), (aVL, I - II / 2),
                            (aVF, II - I / 2)):
            assert np.abs(left - right).max() <= 2  # microvolt, from rounding

    def test_the_same_seed_gives_the_same_files(self, small, tmp_path):
        data.synthesize(tmp_path / "again", 20, seed=2)
        data.synthesize(tmp_path / "other", 20, seed=3)
        sums = [(f / "SHA256SUMS.txt").read_text() for f in (small, tmp_path / "again",
                                                             tmp_path / "other")]
        assert sums[0] == sums[1] != sums[2]
        assert all(data.sha256(small / name) == s for name, s in
                   data.read_sums(small / "SHA256SUMS.txt").items())

    def beat(self, codes):
        """A noiseless beat (T, C) in mV around its R peak at sample 250, at 500 Hz."""
        rng, t = np.random.default_rng(0), (np.arange(500) - 250) / 500
        dipole = sum(np.exp(-((t - at) / width) ** 2 / 2)[:, None] * vector
                     for at, width, vector in data.mild(data.diseased(data.WAVES, codes, rng), 1))
        return dict(zip(LEADS, (dipole @ data.lead_matrix()).T))

    def test_each_diagnosis_changes_what_it_changes_in_patients(self):
        normal, st = self.beat([]), slice(300, 310)  # 100 to 120 ms after R
        assert normal["V1"].min() < -.5 and normal["V5"].max() > .8  # rS in V1, tall R in V5
        assert self.beat(["AMI"])["V2"][235:245].min() < normal["V2"][235:245].min() - .3  # Q
        assert self.beat(["AMI"])["V2"][st].mean() > normal["V2"][st].mean() + .05  # ST elevation
        assert self.beat(["IMI"])["aVF"][235:245].min() < normal["aVF"][235:245].min() - .2
        assert self.beat(["ISC_"])["V5"][st].mean() < normal["V5"][st].mean() - .05  # ST depression
        assert self.beat(["NDT"])["V5"][375:395].mean() < .5 * normal["V5"][375:395].mean()
        assert self.beat(["CRBBB"])["V1"][270:290].max() > .4 > normal["V1"][270:290].max()  # R'
        assert self.beat(["CLBBB"])["V6"][270:280].min() > .4  # still up 50 ms after R: wide QRS
        lvh = self.beat(["LVH"])
        assert lvh["V5"].max() - lvh["V1"].min() > 3.5 > normal["V5"].max() - normal["V1"].min()

    def test_severity_runs_from_the_normal_beat_to_the_diseased_one(self):
        waves = data.diseased(data.WAVES, ["CRBBB", "IMI"], np.random.default_rng(0))
        for (at, width, dipole), name in zip(data.mild(waves, 0), waves):
            want = data.WAVES.get(name, (at, width, np.zeros(3)))
            np.testing.assert_allclose(dipole, want[2])
            assert (at, width) == (want[0], want[1])
        for got, want in zip(data.mild(waves, 1), waves.values()):
            np.testing.assert_allclose(got[2], want[2])

    def test_it_says_so_and_refuses_a_folder_of_something_else(self, synth, tmp_path):
        assert "not patients" in (synth / data.SYNTHETIC).read_text()
        (tmp_path / "thesis.txt").touch()
        with pytest.raises(InputError, match="holds no synthetic data"):
            data.synthesize(tmp_path, 20)
        with pytest.raises(InputError, match="at least 20"):
            data.synthesize(tmp_path / "few", 3)

    def test_every_fold_and_class_occurs_and_some_patients_return(self, synth):
        table = data.load_tables(synth)
        assert set(table.strat_fold) == set(range(1, 11))
        assert (table[list(CLASSES)].sum() > 0).all()
        assert 1 < len(table) / table.patient_id.nunique() < 1.6


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder at /ptbxl/, with the faults of real servers: {path: [fault, ...]}."""

    daemon_threads = True

    def __init__(self, folder, faults=()):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.faults, self.asked = folder, dict(faults), []
        self.url = f"http://127.0.0.1:{self.server_port}/ptbxl"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        name = self.path.removeprefix("/ptbxl/")
        self.server.asked.append(name)
        faults, path = self.server.faults.get(name, []), self.server.folder / name
        fault = faults.pop(0) if faults else None
        if fault == "reset":
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        status = fault if isinstance(fault, int) else 200 if path.is_file() else 404
        body = path.read_bytes() if status == 200 else b"sorry"
        length = len(body)
        if fault == "cut":
            body, self.close_connection = body[:len(body) // 2], True
        elif fault == "wrong":
            body = bytes(reversed(body))
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


class TestDownload:
    @pytest.fixture(autouse=True)
    def no_waiting(self, monkeypatch):
        monkeypatch.setattr(data, "BACKOFF_S", 0.001)

    @pytest.fixture
    def serve(self, synth):
        servers = []

        def start(**faults):
            servers.append(Server(synth, {k.replace("__", "/"): v for k, v in faults.items()}))
            return servers[-1]

        yield start
        for server in servers:
            server.shutdown()
            server.server_close()

    def faulty(self, synth, *faults):
        names = sorted(n for n in data.read_sums(synth / "SHA256SUMS.txt") if "records100" in n)
        return {n.replace("/", "__"): list(f) for n, f in zip(names, faults)}

    def test_faults_that_pass_are_overcome(self, synth, serve, tmp_path):
        server = serve(**self.faulty(synth, ["cut"], ["wrong"], [503, 500], ["reset"], [429],
                                     ["cut", "wrong", 502]))
        data.download(tmp_path / "d", 100, server.url)
        assert not (tmp_path / "d" / "records500").exists()  # only what the rate needs
        data.build_cache(tmp_path / "d", 100, tmp_path / "c", workers=1)
        assert data.open_cache(tmp_path / "c").meta["synthetic"]  # the mark comes along

    def test_a_second_run_fetches_what_is_missing_or_broken_and_nothing_else(self, synth, serve,
                                                                             tmp_path):
        server, folder = serve(**self.faulty(synth, [404])), tmp_path / "d"
        with pytest.raises(InputError, match="1 files could not be downloaded(.|\n)*HTTP 404"):
            data.download(folder, 100, server.url)
        assert not (folder / ".complete-100").exists()
        broken = sorted(folder.rglob("*.dat"))[7]
        broken.write_bytes(b"half")
        server.asked.clear()
        data.download(folder, 100, server.url)
        wanted = {str(broken.relative_to(folder)), "SHA256SUMS.txt", *[
            name.replace("__", "/") for name in self.faulty(synth, [0])]}
        assert set(server.asked) == wanted and (folder / ".complete-100").exists()
        assert not list(folder.rglob("*.tmp*"))

    @pytest.mark.parametrize("sums, says", [
        ("<html>Sign in</html>", "not 'digest file'"), ("0" * 64 + " ../../etc/x", "not 'digest"),
        ("0" * 64 + " README", "not a PTB-XL folder")])
    def test_another_site_is_refused_before_records_come(self, tmp_path, sums, says):
        site = tmp_path / "site"
        site.mkdir()
        (site / "SHA256SUMS.txt").write_text(sums)
        server = Server(site)
        with pytest.raises(InputError, match=says):
            data.download(tmp_path / "d", 100, server.url)
        server.shutdown()

    def test_a_server_that_is_not_there(self, tmp_path):
        with pytest.raises(InputError, match="127.0.0.1"):
            data.download(tmp_path / "d", 100, "http://127.0.0.1:9/")

    def test_files_that_stay_wrong_are_named(self, synth, serve, tmp_path):
        server = serve(**self.faulty(synth, ["wrong"] * 9))
        with pytest.raises(InputError, match="SHA-256 is .* SHA256SUMS.txt says"):
            data.download(tmp_path / "d", 100, server.url)


def tone(rate, hz=20):
    """A tone in lead aVR alone: (T, C) float32."""
    x = np.zeros((10 * rate, 12), np.float32)
    x[:, 3] = np.sin(2 * np.pi * hz * np.arange(len(x)) / rate)
    return x


class TestViews:
    def test_segments_glue_back_to_the_record(self):
        x = torch.randn(3, 10, 12)
        a, b = views.split(x, "contig")
        torch.testing.assert_close(torch.cat([a, b], 1), x)
        a, b = views.split(x, "noncontig")
        torch.testing.assert_close(torch.stack([a, b], 2).flatten(1, 2), x)
        assert views.split(x, "stochastic")[0] is x

    def test_an_alias_is_resolved_and_an_unknown_view_lists_them_all(self):
        assert views.ViewConfig(view="interleaved").view == "noncontig"
        with pytest.raises(InputError) as error:
            views.ViewConfig(view="zigzag")
        assert all(name in str(error.value) for name in [*views.VIEWS, *views.ALIASES])

    def test_masking_is_on_for_segments_and_off_for_stochastic_unless_told(self):
        assert views.ViewConfig(view="contig").mask_leads
        assert not views.ViewConfig(view="stochastic").mask_leads
        assert views.ViewConfig(view="stochastic", mask_leads=True).mask_leads
        assert not views.ViewConfig(view="contig", mask_leads=False).mask_leads

    @pytest.mark.parametrize("p", [0, 0.5, 0.9])
    def test_lead_masks_follow_the_distribution_without_the_empty_mask(self, p):
        keep = views.draw_leads((20000, 3), p, torch.Generator().manual_seed(0))
        assert keep.any(-1).all()
        counts = np.bincount(keep.sum(-1), minlength=4) / len(keep)
        for k in (1, 2, 3):
            want = math.comb(3, k) * (1 - p) ** k * p ** (3 - k) / (1 - p ** 3)
            assert abs(counts[k] - want) < 0.015, (k, counts[k], want)

    @pytest.mark.parametrize("rate", data.RATES)
    def test_a_tone_stays_in_its_lead_and_leaks_through_the_shipped_filter(self, rate):
        for shipped in (False, True):
            config = views.ViewConfig("stochastic", augment_p=1, noise=0, shipped_filter=shipped)
            out = views.augment(tone(rate), views.pool(config, rate), (0, 0, 0))[0]
            others = np.abs(np.delete(out, 3, axis=1)).max()
            if shipped:
                assert others > 0.1, others
            else:
                assert others == 0 and 0.6 < out[:, 3].std() < 0.8, (others, out[:, 3].std())

    @pytest.mark.parametrize("rate", data.RATES)
    @pytest.mark.parametrize("hz, low, high", [(0.05, 0, .1), (10, .99, 1.01), (20, .99, 1.01)])
    def test_the_filter_passes_its_band_without_delay(self, rate, hz, low, high):
        x = tone(rate, hz)
        y = views.BandPassFilter((0.5, 47.), rate).apply(x)
        inner = slice(2 * rate, 8 * rate)  # away from the edges
        gain = (x[inner, 3] @ y[inner, 3]) / (x[inner, 3] @ x[inner, 3])
        assert low <= abs(gain) <= high, gain

    def test_a_crop_is_a_stretched_part_of_the_record(self):
        x = np.random.default_rng(0).standard_normal((500, 12)).astype(np.float32)
        y = views.TimeCropResize(0.5).apply(x, share=0.6, start=0.3)
        at = (0.3 + 0.6 * np.arange(500) / 500) * 499
        want = scipy.ndimage.map_coordinates(x[:, 3], [at], order=3, mode="mirror")
        np.testing.assert_allclose(y[5:-5, 3], want[5:-5], atol=1e-2)
        np.testing.assert_allclose(views.TimeCropResize(1).apply(x, share=1, start=0)[0], x[0])

    def test_augmented_views_repeat_with_the_key_and_leave_numpys_state_alone(self):
        x = np.random.default_rng(0).standard_normal((1000, 12)).astype(np.float32)
        transforms = views.pool(views.ViewConfig(view="stochastic"), 100)
        state = np.random.get_state()[1].copy()
        a, b, c = (views.augment(x, transforms, key) for key in ((0, 1, 2), (0, 1, 2), (0, 1, 3)))
        assert a.shape == (2, 1000, 12) and a.dtype == np.float32
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, c) and not np.array_equal(a[0], a[1])
        np.testing.assert_array_equal(np.random.get_state()[1], state)

    @pytest.mark.parametrize("limit", [.05, 1.])
    def test_the_time_warp_is_the_librarys(self, limit):
        x = np.random.default_rng(0).normal(size=(500, 12)).astype(np.float32)
        for seed in range(20):
            with views.numpy_seed(seed):
                want = ecgmentations.RandomTimeWrap(wrap_limit=limit, p=1)(ecg=x)["ecg"]
            with views.numpy_seed(seed):
                got = views.TimeWrap(wrap_limit=limit, p=1)(ecg=x)["ecg"]
            np.testing.assert_allclose(got, want, atol=1e-4)
            assert got.dtype == np.float32 and np.abs(got - x).max() > .01

    def test_strengths_do_what_they_say(self):
        x = np.random.default_rng(0).standard_normal((1000, 12)).astype(np.float32)
        off = dict(view="stochastic", augment_p=1, warp=0., crop=1., band_low=.01, band_high=49.9)
        scaled = views.pool(views.ViewConfig(**off, noise=0., scale=.5), 100).transformations[-1]
        ratios = [scaled(ecg=x)["ecg"][0, 0] / x[0, 0] for _ in range(200)]
        assert .5 <= min(ratios) < .6 and 1.4 < max(ratios) <= 1.5
        noisy = views.pool(views.ViewConfig(**off, noise=.25, scale=0.), 100).transformations[3]
        assert abs((noisy(ecg=x)["ecg"] - x).std() - .5) < .02

    @pytest.mark.parametrize("bad", [dict(mask_p=1.), dict(crop=0.), dict(warp=2.), dict(scale=1.)])
    def test_bad_strengths_are_refused(self, bad):
        with pytest.raises(InputError, match="--" + next(iter(bad)).replace("_", "-")):
            views.ViewConfig(**bad)

    def test_a_band_beyond_the_rate_is_refused(self):
        with pytest.raises(InputError, match="--band-high 60.0.*50.0 Hz at 100 Hz"):
            views.pool(views.ViewConfig(view="stochastic", band_high=60.), 100)


def tiny(**more):
    torch.manual_seed(0)
    return model.Contrastive(model.Config(**(TINY | more)))


def double_loop(z1, z2, tau):
    """NT-Xent as its definition reads."""
    z, n = [*z1, *z2], len(z1)
    total = 0.0
    for i in range(2 * n):
        positive = math.exp(float(z[i] @ z[(i + n) % (2 * n)]) / tau)
        others = sum(math.exp(float(z[i] @ z[j]) / tau) for j in range(2 * n) if j != i)
        total -= math.log(positive / others)
    return total / (2 * n)


class TestModel:
    @pytest.mark.parametrize("shape", [(64, 50, 96), (7, 3, 5), (1, 1)])
    def test_dropout_is_that_of_torch_in_law(self, shape):
        dropout, x = model.Dropout(.1), torch.randn(shape).requires_grad_()
        torch.manual_seed(3)
        y = dropout(x)
        y.sum().backward()
        kept = x.grad != 0
        share = round(.1 * 2 ** 16) / 2 ** 16
        torch.testing.assert_close(x.grad, kept / (1 - share))
        torch.testing.assert_close(y, x * x.grad)
        if x.numel() > 1e5:  # a share within 5 standard deviations, also of each of 4 neighbours,
            flat = ~kept.flatten()  # which come from one draw, and of pairs of them
            parts = [flat, *(flat[i::4] for i in range(4))]
            pairs = [flat[i::4] & flat[j::4] for i in range(4) for j in range(i)]
            for p, drops in [(.1, d) for d in parts] + [(.01, d) for d in pairs]:
                assert abs(drops.float().mean() - p) < 5 * (p * (1 - p) / len(drops)) ** .5
        torch.manual_seed(3)
        assert torch.equal(dropout(x), y)
        assert torch.equal(dropout.eval()(x), x) and torch.equal(model.Dropout(0.)(x), x)
        assert model.Dropout(.999999)(x).isfinite().all()

    def test_the_default_is_the_papers_size(self):
        config = model.Config()
        assert 21.4e6 < model.n_parameters(model.Contrastive(config)) < 21.6e6
        mixed = model.Contrastive(model.Config(mix_leads=True))
        assert model.n_parameters(mixed) == 21_477_233  # design page
        assert model.PRESETS["paper"] == {}

    @pytest.mark.parametrize("tau", [0.05, 0.1, 1.0])
    def test_nt_xent_is_the_double_loop(self, tau):
        z1, z2 = F.normalize(torch.randn(2, 7, 5, dtype=torch.float64), dim=-1)
        torch.testing.assert_close(float(model.nt_xent(z1, z2, tau)), double_loop(z1, z2, tau))

    def test_nt_xent_at_chance_and_at_its_best(self):
        same = torch.ones(6, 4) / 2
        assert math.isclose(model.nt_xent(same, same), math.log(11), rel_tol=1e-6)
        eye = torch.eye(6)
        assert math.isclose(model.nt_xent(eye, eye), math.log(1 + 10 * math.exp(-10)), rel_tol=1e-3)

    def test_attention_is_torchs(self):
        ours, theirs = model.Attention(24, 3), nn.MultiheadAttention(24, 3, batch_first=True)
        theirs.in_proj_weight, theirs.in_proj_bias = ours.qkv.weight, ours.qkv.bias
        theirs.out_proj = ours.out
        x, context = torch.randn(2, 9, 24), torch.randn(2, 5, 24)
        for args, other in (((x,), x), ((x, context), context)):
            want, weights = theirs(x, other, other, average_attn_weights=False)
            torch.testing.assert_close(ours(*args), want, atol=1e-5, rtol=1e-5)
            seen = []
            ours.see = lambda head, w: seen.append(w)
            torch.testing.assert_close(ours(*args), want, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(torch.stack(seen, 1), weights, atol=1e-5, rtol=1e-5)
            ours.see = None

    def test_a_layer_is_torchs_pre_norm_encoder_layer(self):
        ours = model.Layer(model.Config(**TINY)).eval()
        theirs = nn.TransformerEncoderLayer(24, 2, 48, activation="gelu", batch_first=True,
                                            norm_first=True).eval()
        theirs.load_state_dict({
            "self_attn.in_proj_weight": ours.attention.qkv.weight,
            "self_attn.in_proj_bias": ours.attention.qkv.bias,
            "self_attn.out_proj.weight": ours.attention.out.weight,
            "self_attn.out_proj.bias": ours.attention.out.bias,
            **{f"linear{i}.{n}": getattr(ours.ff[2 * i - 2], n) for i in (1, 2)
               for n in ("weight", "bias")},
            **{f"norm{i}.{n}": getattr(getattr(ours, f"norm{i}"), n) for i in (1, 2)
               for n in ("weight", "bias")}})
        x = torch.randn(2, 7, 24)
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)

    def test_positions_are_sines_and_cosines(self):
        got = model.positions(50, 8, "cpu")
        for n in (0, 1, 49):
            for i in range(4):
                angle = n / 10000 ** (2 * i / 8)
                assert abs(got[n, 2 * i] - math.sin(angle)) < 1e-4
                assert abs(got[n, 2 * i + 1] - math.cos(angle)) < 1e-4

    @pytest.mark.parametrize("T, stride", [(2500, 1), (500, 4), (503, 4), (1000, 7)])
    def test_tokens_and_shapes(self, T, stride):
        m = tiny(time_stride=stride).eval()
        x = torch.randn(2, T, 12)
        assert m.encoder.time_stem(x).shape == (2, T // stride, 24)
        output, projections = m(x)
        assert output.z.shape == (2, 16) and projections.shape == (1, 2, 8)
        torch.testing.assert_close(projections.norm(dim=-1), torch.ones(1, 2))

    @pytest.mark.parametrize("n, bins", [(625, 512), (125, 128), (625, 64), (10, 10), (7, 3)])
    def test_pooling_is_torchs_adaptive_average(self, n, bins):
        x = torch.randn(2, 3, n)
        torch.testing.assert_close(x @ model.pooling(n, bins, x.device),
                                   F.adaptive_avg_pool1d(x, bins), atol=1e-5, rtol=1e-5)

    def test_a_channel_token_sees_its_lead_alone_unless_leads_are_mixed(self):
        x = torch.randn(1, 500, 12)
        other = x.clone()
        other[:, :, 5] = 0
        for mix in (False, True):
            stem = tiny(mix_leads=mix).encoder.channel_stem
            changed = (stem(x) - stem(other)).abs().amax(-1)[0] > 1e-6
            assert changed[5] and changed.sum() == (12 if mix else 1)

    def test_masking_zeroes_the_signal_by_default(self):
        m, x = tiny().eval(), torch.randn(2, 500, 12)
        keep = torch.rand(2, 12) > .5
        torch.testing.assert_close(m(x, keep)[0].z, m(x * keep[:, None])[0].z)

    def test_late_masking_zeroes_features_of_lifted_tokens_and_channels_of_the_signal(self):
        m, x, keep = tiny(late_masking=True).eval(), torch.randn(1, 500, 12), torch.ones(1, 12)
        seen, keep[0, 3] = {}, 0
        m.encoder.time_layers[0].register_forward_pre_hook(lambda _, a: seen.update(t=a[0]))
        m.encoder.channel_stem.register_forward_pre_hook(lambda _, a: seen.update(c=a[0]))
        m(x, keep.bool())
        lifted = seen["t"] - model.positions(25, 24, "cpu")
        assert (lifted[..., 6:8] == 0).all() and (lifted[..., [5, 8]] != 0).all()
        torch.testing.assert_close(lifted[..., 8:], m.encoder.time_stem(x)[..., 8:])
        assert (seen["c"][..., 3] == 0).all() and (seen["c"][..., 4] != 0).all()

    def test_channel_dropout_drops_whole_tokens_in_training_only(self):
        m, x = tiny(channel_dropout=.5), torch.randn(64, 500, 12)
        seen = {}
        m.encoder.channel_dropout.register_forward_hook(lambda _, a, out: seen.update(c=out))
        m(x)
        dropped = (seen["c"] == 0).all(-1).float()
        assert .4 < dropped.mean() < .6 and ((seen["c"] == 0).any(-1).float() == dropped).all()
        m.eval()(x)
        assert not (seen["c"] == 0).any()

    def test_gates_scale_the_residual_branches_of_the_channel_stream(self):
        m, x = tiny(gate_channel=True).eval(), torch.randn(2, 12, 24)
        layer = m.encoder.channel_layers[0]
        assert m.encoder.time_layers[0].gates is None
        layer.gates.data.fill_(-100)  # closed
        torch.testing.assert_close(layer(x), x)
        layer.gates.data.fill_(100)
        plain = model.Layer(m.config).eval()
        plain.load_state_dict(layer.state_dict(), strict=False)
        torch.testing.assert_close(layer(x), plain(x))

    def test_auxiliary_losses_add_the_streams_nt_xent(self):
        m = tiny(aux_losses=True).eval()
        output, p = m(torch.randn(6, 500, 12))
        assert p.shape == (3, 6, 8)
        torch.testing.assert_close(p[1], F.normalize(m.heads[1](output.time), dim=-1))
        p = p.unflatten(1, (2, -1))
        want = [double_loop(z1.double(), z2.double(), .1) for z1, z2 in p.detach()]
        got = float(train.total_loss(p.detach(), .1, .5))
        assert abs(got - (want[0] + .5 * (want[1] + want[2]))) < 1e-5

    def test_the_representation_of_a_record_is_the_mean_over_its_views(self):
        m, x = tiny().eval(), torch.randn(3, 1000, 12)
        want = (m.encoder(x[:, ::2]).z + m.encoder(x[:, 1::2]).z) / 2
        torch.testing.assert_close(model.embed(m, x, "noncontig").mean(1), want)
        torch.testing.assert_close(model.embed(m, x, "stochastic")[:, 0], m.encoder(x).z)

    def test_watched_attention_is_an_independent_softmax_and_changes_nothing(self):
        m, x, seen, calls = tiny(depth=2).eval(), torch.randn(2, 500, 12), {}, {}
        for name, module in m.encoder.named_modules():
            if isinstance(module, model.Attention):  # what each is called with, q first
                module.register_forward_pre_hook(
                    lambda module, args, name=name: calls.__setitem__(name, args))
        with torch.no_grad():
            fused = m.encoder(x).z
        out = []
        m.encoder.register_forward_hook(lambda module, args, output: out.append(output.z))
        model.watch_attention(m, x, lambda *key: seen.__setitem__(key[:3], key[3]))
        torch.testing.assert_close(out[0], fused, atol=1e-5, rtol=1e-5)
        assert {key[:2] for key in seen} == {("time", 0), ("time", 1), ("channel", 0),
                                             ("channel", 1), ("time_to_channel", 0),
                                             ("channel_to_time", 0)}
        modules = dict(m.encoder.named_modules())
        for (stream, layer, head), weights in seen.items():
            name = (f"cross.{stream}" if "_to_" in stream else
                    f"{stream}_layers.{layer}.attention")
            q, k = calls[name][0], calls[name][-1]
            w, b, part = modules[name].qkv.weight, modules[name].qkv.bias, 12 * head
            q = q @ w[part:part + 12].T + b[part:part + 12]
            k = k @ w[24 + part:36 + part].T + b[24 + part:36 + part]
            want = np.exp((q @ k.mT / math.sqrt(12)).detach().double().numpy())
            np.testing.assert_allclose(weights, want / want.sum(-1, keepdims=True), atol=1e-6)
        assert all(modules[name].see is None for name in calls)

    def test_resnet_goes_through_the_same_interface(self):
        m = tiny(arch="resnet18")
        output, projections = m(torch.randn(4, 500, 12), torch.ones(4, 12).bool())
        assert output.z.shape == (4, 16) and output.time is None and projections.shape == (1, 4, 8)
        kernels = [c.kernel_size[0] for c in m.modules() if isinstance(c, nn.Conv1d)]
        assert sum(k > 1 for k in kernels) + 1 == 18  # and one linear layer
        with pytest.raises(InputError, match="no attention"):
            model.watch_attention(m, torch.randn(1, 500, 12), print)

    @pytest.mark.parametrize("bad, says", [
        (dict(heads=0), "heads: at least 1"), (dict(depth=-1), "depth: at least 1"),
        (dict(heads=5), "--heads 5 does not divide --width 24"), (dict(arch="vit"), "--arch vit"),
        (dict(width=26, late_masking=True), "--late-masking needs a --width that 12 divides"),
        (dict(arch="resnet18", aux_losses=True), "no streams")])
    def test_impossible_sizes_are_refused(self, bad, says):
        with pytest.raises(InputError, match=says):
            model.Config(**(TINY | bad))


def big_batch(n=12, **more):
    """A tiny model with dropout, views of n random records, and their masks."""
    m = tiny(dropout=0.3, aux_losses=True, **more)
    x = torch.randn(2, n, 500, 12, generator=torch.Generator().manual_seed(1))
    keep = views.draw_leads((2, n, 12), .5, torch.Generator().manual_seed(2))
    return m, lambda part: (x[0, part], x[1, part]), keep


def gradient(m):
    return torch.cat([p.grad.flatten() for p in m.parameters()])


def steps_of_a_process(cases):
    """For each case [gradient, loss, norms]; BatchNorm's averages; threads left in the end."""
    def steps():
        for micro, negatives in cases:
            m, pair, keep = big_batch()
            forward = train.accelerate(m, train.get_args([]))
            loss, norms = train.backward(forward, pair, keep, 12, micro, (0, 5), aux_weight=.5,
                                         negatives=negatives)
            yield gradient(m).tolist(), loss, norms
        m, pair = tiny(arch="resnet18"), big_batch()[1]
        forward = train.accelerate(m, train.get_args([]))
        for step in range(2):
            train.backward(forward, pair, None, 12, 6, (0, step))
        yield m.encoder.body[1].running_mean.tolist()

    train.join_processes("cpu")
    found = list(steps())
    train.leave_processes()
    return [*found, [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]]


class TestTrain:
    @pytest.mark.parametrize("micro", [3, 4, 6])
    def test_the_chunked_gradient_is_that_of_the_whole_batch_with_dropout_on(self, micro):
        m, pair, keep = big_batch()
        loss, norms = train.backward(m, pair, keep, 12, micro, (0, 5), aux_weight=.5)
        got = gradient(m)
        m.zero_grad()
        outputs, projections = zip(*[train.project(m, pair, keep, slice(i, i + micro), (0, 5))
                                     for i in range(0, 12, micro)])  # every graph is kept
        whole = train.total_loss(torch.cat(projections, dim=2), .1, .5)
        pooled = [h for output in outputs for h in (output.time, output.channel)]
        grads = torch.autograd.grad(whole, pooled, retain_graph=True)
        whole.backward()
        torch.testing.assert_close(got, gradient(m), atol=1e-5, rtol=1e-5)
        assert abs(loss - whole.item()) < 1e-5
        for i, norm in enumerate(norms):
            want = math.sqrt(sum(float(g.square().sum()) for g in grads[i::2]))
            assert abs(norm - want) < 1e-4 * want

    def test_the_second_pass_repeats_the_first_under_autocast(self):
        m, pair, keep = big_batch()
        bf16 = train.pick_autocast("bfloat16", torch.device("cpu"))[1]
        first, second = (train.project(m, pair, keep, slice(3, 6), (0, 5), bf16)[1] for _ in "12")
        assert torch.equal(first, second) and first.dtype == torch.float32
        assert not torch.equal(first, train.project(m, pair, keep, slice(3, 6), (0, 6), bf16)[1])

    def test_two_processes_give_the_gradient_of_one(self):
        cases = [(6, "batch"), (2, "batch"), (2, "micro")]
        *found, mean, threads = evaluate.apart(steps_of_a_process, cases, processes=2)
        for (micro, negatives), (got, loss, norms) in zip(cases, found):
            m, pair, keep = big_batch()
            want = train.backward(m, pair, keep, 12, micro, (0, 5), aux_weight=.5,
                                  negatives=negatives)
            torch.testing.assert_close(torch.tensor(got), gradient(m), atol=1e-5, rtol=1e-5)
            assert abs(loss - want[0]) < 1e-5
            np.testing.assert_allclose(norms, want[1], rtol=1e-4)
        halves = []  # BatchNorm's averages: both processes count, in both steps
        for first in (0, 6):
            m = tiny(arch="resnet18")
            train.backward(m, lambda part, first=first: [x[first:first + 6] for x in pair(
                slice(0, 12))], None, 6, 6, (0, 0))
            halves.append(m.encoder.body[1].running_mean / .1)
        torch.testing.assert_close(torch.tensor(mean), (1 - .9 ** 2) * sum(halves) / 2)
        assert not [name for name in threads if "gloo" in name]  # see leave_processes

    @slow
    def test_compiled_blocks_give_the_same_gradient_with_dropout_on(self):
        found = []
        for flags in ([], ["--compile"]):
            m, pair, keep = big_batch()
            forward = train.accelerate(m, train.get_args(flags))
            loss, _ = train.backward(forward, pair, keep, 12, 3, (0, 5), aux_weight=.5)
            found.append((gradient(m), loss))
        torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-4)
        assert abs(found[0][1] - found[1][1]) < 1e-5
        torch._inductor.config.fallback_random = False  # as on a GPU, with the dropout that it has
        for module in m.modules():
            if isinstance(module, model.Dropout):
                module.__class__ = torch.nn.Dropout
        torch.compiler.reset()
        one = train.project(m, pair, keep, slice(3, 6), (0, 5))[1]
        with torch.no_grad():
            two, other = (train.project(m, pair, keep, slice(3, 6), key)[1]
                          for key in ((0, 5), (0, 6)))
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)
        assert not torch.allclose(one, other, atol=1e-3)

    def test_reading_ahead_takes_any_rows(self, cache):
        signals = data.open_cache(cache).signals
        train.read_ahead(signals, np.array([0, 99, 50]))
        train.read_ahead(np.array(signals[:3]), np.array([2]))  # not a mapped file

    def test_batch_norm_counts_a_batch_once(self):
        means = []
        for negatives in ("batch", "micro"):
            m = tiny(arch="resnet18")
            x = torch.randn(2, 8, 500, 12, generator=torch.Generator().manual_seed(1))
            train.backward(m, lambda part: (x[0, part], x[1, part]), None, 8, 4, (0, 0),
                           negatives=negatives)
            means.append(m.encoder.body[1].running_mean.clone())
        torch.testing.assert_close(*means)
        assert means[0].abs().max() > 0

    def test_plain_accumulation_is_another_gradient(self):
        m, pair, keep = big_batch()
        cosine = []
        for negatives in ("batch", "micro"):
            m.zero_grad()
            loss, _ = train.backward(m, pair, keep, 12, 3, (0, 5), negatives=negatives)
            cosine.append(gradient(m))
        assert F.cosine_similarity(*cosine, dim=0) < .99
        parts = [train.project(m, pair, keep, slice(i, i + 3), (0, 5))[1] for i in range(0, 12, 3)]
        assert abs(loss - np.mean([train.total_loss(p, .1, 0).item() for p in parts])) < 1e-5

    def test_stream_norms_are_those_at_the_token_tensors(self):
        tokens = [torch.randn(3, n, 8, requires_grad=True) for n in (50, 12)]
        pooled = [t.mean(1) for t in tokens]
        for h in pooled:
            h.retain_grad()
        (pooled[0].sin() * pooled[1]).sum().backward()
        norms = train.stream_norms([float(h.grad.norm()) for h in pooled], (50, 12))
        for name, t in zip(("time", "channel"), tokens):
            assert math.isclose(norms[f"grad_norm_{name}"], float(t.grad.norm()), rel_tol=1e-5)
        assert norms["grad_norm_ratio"] == norms["grad_norm_channel"] / norms["grad_norm_time"]

    def test_equal_streams_have_the_papers_ratio_and_a_corrected_ratio_of_one(self):
        norms = train.stream_norms([2., 2.], (2500, 12))
        assert abs(norms["grad_norm_ratio"] - 14.43) < .01  # the paper's logs read 14.6 to 14.8
        assert norms["grad_norm_ratio_corrected"] == 1

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

    def test_a_run_of_one_step_takes_a_real_one(self):
        assert train.learning_rate(0, 1, 0, 3e-4, 3e-5) > 0

    def settle(self, n_train, n_val=50, *argv, processes=1):
        return train.settle(train.get_args(argv), n_train, n_val, processes)

    def test_settings_fit_the_data(self):
        plan, notes = self.settle(17418, 2183)
        assert (plan["batch"], plan["steps"], plan["warmup"], notes) == (1024, 17, 20, [])
        plan, notes = self.settle(344, 78, "--preset", "small")
        assert plan["batch"] == 32 and plan["steps"] == 10
        assert "batch 32 instead of 1024" in notes[0]
        plan, notes = self.settle(344, 78, "--epochs", "3")
        assert plan["total"] == 30 and plan["warmup"] == 6 and "warm-up 6 instead" in notes[1]
        plan, _ = self.settle(344, 78, "--batch-size", "64", "--micro-batch", "16")
        assert plan["batch"] == 64 and plan["micro"] == 16  # an explicit batch stands
        plan, notes = self.settle(344, 78, "--batch-size", "512")
        assert plan["batch"] == 32 and "512" in notes[0]
        assert self.settle(4, 2)[0]["batch"] == 2
        plan, _ = self.settle(344, 78, "--batch-size", "64", processes=4)
        assert (plan["micro"], plan["processes"]) == (16, 4)
        assert self.settle(344, 78, processes=3)[0]["batch"] == 30
        with pytest.raises(InputError, match="3 processes cannot share a batch of 64") as error:
            self.settle(344, 78, "--batch-size", "64", processes=3)
        better = re.search(r"such as (\d+)", str(error.value))[1]
        assert self.settle(344, 78, "--batch-size", better, processes=3)[0]["micro"] == 16
        for flags in (["600", "--micro-batch", "8"], ["384", "--micro-batch", "128"]):
            assert self.settle(344, 78, "--batch-size", *flags, processes=3)[0]["batch"] == 30
        _, notes = self.settle(344, 78, "--batch-size", "64", "--micro-batch", "32", processes=4)
        assert "micro-batch 16 instead of 32" in notes[0]
        with pytest.raises(InputError, match="for each process"):
            self.settle(344, 5, processes=3)

    @pytest.mark.parametrize("argv, n, says", [
        (["--batch-size", "64", "--micro-batch", "24"], 99, "24 does not divide .*64.*such as 8"),
        (["--epochs", "0"], 99, "--epochs 0"), (["--batch-size", "1"], 99, "at least 2"),
        ([], 3, "3 records in folds 1-8"), (["--tau", "nan"], 99, "--tau"),
        (["--micro-batch", "15"], 99, "15 does not divide the batch of 1024"),
        (["--micro-batch", "1", "--negatives", "micro"], 99, "no negatives"),
        (["--workers", "-1"], 99, "--workers"), (["--aux-weight", "nan"], 99, "--aux-weight"),
        (["--seed", "-1"], 99, "--seed"), (["--max-lr", "-1"], 99, "--max-lr")])
    def test_impossible_settings_are_refused(self, argv, n, says):
        with pytest.raises(InputError, match=says):
            self.settle(n, 50, *argv)

    def test_keys_of_any_length_give_different_seeds(self):
        keys = [(0,), (0, 0), (0, 5), (0, 5, 0), (5, 0), (0, 5, 3), (0, 5, 1), (train.VAL_KEY, 5)]
        assert len({train.derive(*key) for key in keys}) == len(keys)
        assert train.derive(1, 2) == train.derive(1, 2)

    def test_an_epoch_shows_a_record_once_and_a_resume_goes_on_in_the_same_order(self):
        rows = np.arange(100, 150)
        order = list(train.epoch_order(rows, 8, 0, 0, 14))
        assert [epoch for epoch, _ in order] == [0] * 6 + [1] * 6 + [2] * 2
        for i in (0, 6):
            seen = np.concatenate([r for _, r in order[i:i + 6]])
            assert len(set(seen)) == 48 and set(seen) <= set(rows)
        assert not np.array_equal(order[0][1], order[6][1])
        for (a, b), (c, d) in zip(order[9:], train.epoch_order(rows, 8, 0, 9, 14)):
            assert a == c and np.array_equal(b, d)

    def test_batches_are_normalised_views_of_their_rows(self, cache):
        c, rows = data.open_cache(cache), np.array([5, 3, 40])
        x = data.normalize(torch.from_numpy(c.signals[rows]))
        for view in ("contig", "noncontig"):
            (pair,) = train.batches(c, views.ViewConfig(view=view), 0, [(0, rows)], CPU, 0)
            for got, want in zip(pair(slice(1, 3)), views.split(x, view)):
                torch.testing.assert_close(got, want[1:3])

    def test_shifted_views_are_views_that_start_elsewhere_each(self, cache):
        c, rows = data.open_cache(cache), np.arange(12)
        config = views.ViewConfig(view="noncontig", shift=True)
        (cut,) = train.batches(c, config, 5, [(3, rows)], CPU, 0)
        pair = views.split(data.normalize(torch.from_numpy(c.signals[rows])), "noncontig")
        found = []
        for got, view in zip(cut(slice(0, 12)), pair):
            for a, b in zip(got, view):
                at = [s for s in range(len(b)) if torch.equal(a, b.roll(-s, 0))]
                assert len(at) == 1
                found += at
        assert len(set(found)) > 15  # independent of one another
        for i in range(0, 12, 4):  # the second pass of a micro-batch sees the same
            for whole, part in zip(cut(slice(0, 12)), cut(slice(i, i + 4))):
                assert torch.equal(whole[i:i + 4], part)
        with pytest.raises(InputError, match="--shift is for segment views"):
            views.ViewConfig(view="stochastic", shift=True)

    def test_stochastic_batches_do_not_depend_on_the_workers(self, cache):
        c, config = data.open_cache(cache), views.ViewConfig(view="stochastic")
        order = [(0, np.array([5, 3])), (1, np.array([5, 8]))]
        runs = [[pair(slice(0, 2)) for pair in train.batches(c, config, 0, order, CPU, workers)]
                for workers in (0, 2)]
        for alone, parallel in zip(*runs):
            for a, b in zip(alone, parallel):
                torch.testing.assert_close(a, b, atol=0, rtol=0)
        assert not torch.equal(runs[0][0][0][0], runs[0][1][0][0])  # record 5, another epoch

    def test_clustering_is_none_where_it_cannot_be_computed(self):
        z = np.random.default_rng(0).standard_normal((6, 3))
        assert set(train.clustering(z, np.zeros(6)).values()) == {None}
        assert set(train.clustering(z * 0, np.arange(6) % 2).values()) == {None}
        far = z + 100 * (np.arange(6) % 2)[:, None]
        assert train.clustering(far, np.arange(6) % 2)["silhouette"] > .9


def log_of(run):
    """The rows of a run's log."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def argv_of(cache, run, *argv):
    """The command line of a tiny run."""
    return [str(a) for a in ("--cache", cache, "--run", run, "--batch-size", 8, "--micro-batch", 4,
                             *TINY_FLAGS, *argv)]


def run_train(cache, run, *argv):
    """Train in this process."""
    train.train(train.get_args(argv_of(cache, run, *argv)))


LOGGED = {"epoch", "loss", "val_loss", "lr", "grad_norm_time", "grad_norm_channel",
          "grad_norm_ratio", "silhouette", "davies_bouldin", "calinski_harabasz",
          "records_per_second", "data_share"}


@pytest.fixture(scope="session")
def finished(cache, tmp_path_factory):
    """A finished run of two epochs, and what it printed."""
    run = tmp_path_factory.mktemp("runs") / "one"
    return run, script("train.py", *argv_of(cache, run, "--view", "interleaved", "--epochs", 2))


class TestRun:

    def test_a_run_folder_holds_what_it_should(self, finished, cache):
        run, out = finished
        assert "noncontig: even and odd samples" in out and "SYNTHETIC" in out
        assert {p.name for p in run.iterdir()} == {".lock", "args.json", "log.jsonl", "last.pt",
                                                   "model.pt", "tensorboard"}
        args = json.loads((run / "args.json").read_text())
        assert args["args"]["view"] == "noncontig" and args["args"]["epochs"] == 2
        m, same = model.load_run(run)
        assert args == same and args["n_parameters"] == model.n_parameters(m)
        assert args["data"]["fingerprint"] == data.open_cache(cache).meta["fingerprint"]
        rows = log_of(run)
        assert [row["epoch"] for row in rows] == [1, 2] and LOGGED <= set(rows[0])
        assert all(row[key] is not None for row in rows for key in LOGGED)

    def test_tensorboards_reader_reads_the_same_numbers(self, finished):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        events = EventAccumulator(str(finished[0] / "tensorboard")).Reload()
        rows = log_of(finished[0])
        for key in LOGGED:
            got = [(event.step, event.value) for event in events.Scalars(key)]
            assert [step for step, _ in got] == [1, 2]
            np.testing.assert_allclose([v for _, v in got], [row[key] for row in rows], rtol=1e-5)

    def test_the_last_validation_numbers_follow_from_the_saved_model(self, finished, cache):
        from sklearn.metrics import silhouette_score
        m, args = model.load_run(finished[0])
        c = data.open_cache(cache)
        labels = c.index[list(CLASSES)].to_numpy()
        rows = np.flatnonzero((c.index.strat_fold == 9) & (labels.sum(1) == 1))
        with torch.no_grad():
            x = data.normalize(torch.from_numpy(c.signals[rows]))
            z = model.embed(m, x, "noncontig").mean(1)
        last = log_of(finished[0])[-1]
        assert abs(last["silhouette"] - silhouette_score(z, labels[rows].argmax(1))) < 1e-4

    def test_the_same_command_again_says_finished(self, finished, cache, capsys):
        capsys.readouterr()
        run_train(cache, finished[0], "--view", "noncontig", "--epochs", 2, "--workers", 0)
        assert "finished, nothing to do" in capsys.readouterr().out

    def test_other_arguments_or_data_are_refused_and_named(self, finished, cache, small):
        before = (finished[0] / "model.pt").read_bytes()
        out = script("train.py", *argv_of(cache, finished[0], "--epochs", 3, "--tau", .2), ok=False)
        assert "--epochs: 2 then, 3 now" in out and "--tau: 0.1 then, 0.2 now" in out
        assert "--seed" not in out and "Traceback" not in out
        cached(small)
        with pytest.raises(InputError, match="data: .* then, .* now"):
            run_train(small.parent / "cache", finished[0], "--epochs", 2)
        assert (finished[0] / "model.pt").read_bytes() == before

    def test_the_chance_line_counts_the_negatives_and_losses_that_there_are(self, cache, tmp_path,
                                                                           capsys):
        run_train(cache, tmp_path / "r", "--max-steps", 1, "--negatives", "micro", "--aux-losses")
        want = 2 * math.log(2 * 4 - 1), 2 * math.log(2 * 8 - 1)  # two auxiliary losses of 0.5
        assert "a loss of {:.2f}, in validation {:.2f}".format(*want) in capsys.readouterr().out

    @pytest.mark.parametrize("argv", [["--view", "contig", "--negatives", "micro", "--aux-losses"],
                                      ["--view", "stochastic", "--mask-leads", "--workers", 1],
                                      ["--arch", "resnet18", "--stem-width", 24],
                                      ["--late-masking", "--precision", "bfloat16"]])
    def test_each_option_trains(self, cache, tmp_path, argv):
        run_train(cache, tmp_path / "r", "--max-steps", 2, *argv)
        (row,) = log_of(tmp_path / "r")
        assert LOGGED <= set(row) and (tmp_path / "r" / "model.pt").exists()
        assert (row["grad_norm_time"] is None) == ("resnet18" in argv)

    def test_errors_come_before_work_and_leave_no_folder(self, cache, tmp_path):
        for argv, says in ((["--view", "zigzag"], "unknown VIEW"), (["--heads", 7], "--heads 7"),
                           (["--micro-batch", 3], "does not divide"),
                           (["--device", "cuda:9"], "--device cuda:9"),
                           (["--view", "stochastic", "--band-high", "80"], "--band-high")):
            with pytest.raises(InputError, match=says):
                run_train(cache, tmp_path / "r", *argv)
        with pytest.raises(InputError, match="no cache in"):
            run_train(tmp_path / "none", tmp_path / "r")
        assert not (tmp_path / "r").exists()

    def test_a_fold_without_records_is_named(self, small, tmp_path):
        table = pd.read_csv(small / data.TABLES[0])
        table.loc[table.strat_fold == 9, "strat_fold"] = 10
        table.to_csv(small / data.TABLES[0], index=False)
        cached(small)
        with pytest.raises(InputError, match="no records in fold 9"):
            run_train(small.parent / "cache", tmp_path / "r")

    def test_a_non_finite_loss_stops_and_keeps_the_last_good_state(self, cache, tmp_path):
        run = tmp_path / "r"
        with pytest.raises(FloatingPointError, match=r"loss \S+, .* at epoch \d, step \d+"):
            run_train(cache, run, "--epochs", 4, "--max-lr", "1e30", "--clip", 0,
                      "--save-minutes", 0)
        state = torch.load(run / "last.pt")
        assert state["step"] >= 1 and not (run / "model.pt").exists()
        m = tiny()
        m.load_state_dict(state["model"])
        assert m(torch.randn(2, 500, 12))[1].isfinite().all()  # the last good one

    def test_a_loss_that_fails_in_validation_stops_too(self, cache, tmp_path):
        with pytest.raises(FloatingPointError, match="in validation at epoch 1, step 0"):
            run_train(cache, tmp_path / "r", "--max-steps", 1, "--max-lr", "1e30", "--clip", 0)
        assert not (tmp_path / "r" / "last.pt").exists()

    def test_a_run_that_saved_nothing_may_begin_with_other_arguments(self, cache, tmp_path):
        run_train(cache, tmp_path / "other", "--max-steps", 1)
        (tmp_path / "r").mkdir()
        shutil.copy(tmp_path / "other" / "args.json", tmp_path / "r")
        run_train(cache, tmp_path / "r", "--max-steps", 2)
        assert json.loads((tmp_path / "r" / "args.json").read_text())["args"]["max_steps"] == 2
        (tmp_path / "r" / "model.pt").unlink()
        for name, text in (("last.pt", ""), ("args.json", "{")):
            (tmp_path / "r" / name).write_text(text)
            with pytest.raises(InputError, match=f"{name} is damaged"):
                run_train(cache, tmp_path / "r", "--max-steps", 2)

    @pytest.mark.parametrize("save", ["10", "0"], ids=["epoch", "step"])
    @pytest.mark.parametrize("view", ["contig", pytest.param("stochastic", marks=slow)])
    def test_a_killed_run_ends_with_the_weights_of_an_uninterrupted_one(self, cache, tmp_path, view,
                                                                        save, capsys):
        flags = ["--view", view, "--epochs", 6, "--save-minutes", save]
        run_train(cache, tmp_path / "whole", *flags)
        argv = argv_of(cache, tmp_path / "cut", *flags)
        process = subprocess.Popen([sys.executable, "train.py", *argv], cwd=HERE,
                                   stdout=subprocess.DEVNULL)
        while not (tmp_path / "cut" / "last.pt").exists():
            time.sleep(.02)
            assert process.poll() is None
        time.sleep(random.uniform(0, .2))  # somewhere within an epoch
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "cut" / "model.pt").exists(), "it was too quick to be killed"
        capsys.readouterr()
        run_train(cache, tmp_path / "cut", *flags)
        assert "resumed at step" in capsys.readouterr().out
        whole, cut = (torch.load(tmp_path / n / "model.pt")["model"] for n in ("whole", "cut"))
        assert all(torch.equal(whole[key], cut[key]) for key in whole)
        logs = [[{k: v for k, v in row.items() if k not in ("records_per_second", "data_share")}
                 for row in log_of(tmp_path / n)] for n in ("whole", "cut")]
        assert logs[0] == logs[1] and len(logs[0]) == 6

    @slow
    def test_two_processes_share_batch_norms_statistics(self, cache, tmp_path):
        flags = ["--view", "contig", "--epochs", 2, "--arch", "resnet18"]
        run_train(cache, tmp_path / "one", *flags)
        script(*TORCHRUN, "train.py", *argv_of(cache, tmp_path / "two", *flags))
        for a, b in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
            assert a["val_loss"] == pytest.approx(b["val_loss"], rel=.05)

    @slow
    @pytest.mark.parametrize("view", ["contig", "stochastic"])
    def test_two_processes_train_as_one_does(self, cache, tmp_path, view):
        flags = ["--view", view, "--epochs", 2]
        run_train(cache, tmp_path / "one", *flags)
        said = script(*TORCHRUN, "train.py", *argv_of(cache, tmp_path / "two", *flags))
        assert said.count("finished, 20 steps") == 1 == said.count("epoch   2/2")
        for a, b in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
            assert a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-3)
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
            assert a["grad_norm_ratio"] == pytest.approx(b["grad_norm_ratio"], rel=.01)
        assert "finished, nothing to do" in script(
            *TORCHRUN, "train.py", *argv_of(cache, tmp_path / "two", *flags))
        said = script(*TORCHRUN, "train.py", *argv_of(cache, tmp_path / "two", *flags, "--tau", .2),
                      ok=False)
        assert "made with other arguments" in said and 'train.py", line' not in said

    @slow
    def test_two_processes_that_were_stopped_resume(self, cache, tmp_path):
        flags = ["--view", "contig", "--epochs", 6, "--save-minutes", 0]
        script(*TORCHRUN, "train.py", *argv_of(cache, tmp_path / "whole", *flags))
        process = subprocess.Popen(
            [sys.executable, *TORCHRUN, "train.py", *argv_of(cache, tmp_path / "cut", *flags)],
            cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        log = tmp_path / "cut" / "log.jsonl"
        while not (log.exists() and log.read_text()):
            time.sleep(.02)
            assert process.poll() is None
        process.terminate()  # torchrun hands it on
        process.wait()
        assert not (tmp_path / "cut" / "model.pt").exists(), "it was too quick to be killed"
        said = script(*TORCHRUN, "train.py", *argv_of(cache, tmp_path / "cut", *flags))
        assert "resumed at step" in said
        whole, cut = (torch.load(tmp_path / n / "model.pt")["model"] for n in ("whole", "cut"))
        assert all(torch.equal(whole[key], cut[key]) for key in whole)

    def test_a_second_process_is_kept_out_of_a_run_in_progress(self, finished, cache):
        lock = train.lock_run(finished[0])
        argv = argv_of(cache, finished[0], "--view", "noncontig", "--epochs", 2)
        assert "another process trains there" in script("train.py", *argv, ok=False)
        lock.close()
        assert "finished" in script("train.py", *argv)

    def test_an_unfinished_run_cannot_be_loaded(self, finished, tmp_path):
        with pytest.raises(InputError, match="make pretrain"):
            model.load_run(tmp_path)
        shutil.copy(finished[0] / "last.pt", tmp_path)
        with pytest.raises(InputError, match="not finished"):
            model.load_run(tmp_path)

    def test_one_batch_is_overfitted(self):
        m, pair, keep = big_batch(8)
        m.train()
        optimizer = torch.optim.Adam(m.parameters(), lr=2e-3)
        for step in range(100):
            optimizer.zero_grad()
            loss, _ = train.backward(m, pair, None, 8, 4, (0, step))
            optimizer.step()
        assert loss < .3 < math.log(15), loss

    @slow
    @pytest.mark.parametrize("view", ["contig", "noncontig"])
    def test_the_first_loss_is_near_chance_with_1024_records(self, view):
        torch.manual_seed(0)
        m = model.Contrastive(model.Config(time_stride=25))  # fewer tokens, to be quick
        rng = np.random.default_rng(0)
        codes = [data.DIAGNOSES[i][1].split() for i in rng.integers(len(data.DIAGNOSES), size=1024)]
        x = np.stack([data.synth_record(c, data.random_heart(rng), rng)[::5] for c in codes])
        x = data.normalize(torch.from_numpy(1000 * x))
        keep = views.draw_leads((2, 1024, 12), .5, torch.Generator().manual_seed(0))
        with torch.no_grad():
            p = torch.cat([train.project(m, lambda part: views.split(x[part], view), keep,
                                         slice(i, i + 64), (0,))[1] for i in range(0, 1024, 64)], 2)
        assert abs(float(train.total_loss(p, .1, 0)) - math.log(2047)) < .3

    @slow
    def test_a_batch_of_1024_takes_the_memory_of_a_micro_batch(self, tmp_path):
        code = ("import sys, torch, model, train, evaluate\n"
                "n = int(sys.argv[1])\n"
                "m = model.Contrastive(model.Config(width=96, heads=4, depth=1))\n"
                "x = torch.randn(16, 500, 12)\n"
                "pair = lambda part: (x[:, :250], x[:, 250:])\n"
                "before = evaluate.peak_bytes(torch.device('cpu'))\n"
                "for _ in range(min(8, 1024 // n)):\n"  # the heap grows for a while
                "    train.backward(m, pair, None, n, 16, (0, 0))\n"
                "print(evaluate.peak_bytes(torch.device('cpu')) - before)")
        small, large = (int(script("-c", code, n)) for n in (16, 1024))
        assert large < 1.15 * small, (small, large)

    @real
    @slow
    def test_real_records_are_learned_from_within_three_epochs(self, tmp_path):
        data.build_cache(PTBXL, 100, tmp_path / "c")
        for view in views.VIEWS:
            script("train.py", "--cache", tmp_path / "c", "--preset", "small", "--view", view,
                   "--epochs", 3, "--run", tmp_path / view)
            rows = log_of(tmp_path / view)
            assert rows[-1]["loss"] < rows[0]["loss"], (view, rows)


@pytest.fixture(scope="session")
def evaluated(finished, cache):
    """The finished run, evaluated without the slow rows; its encoder's bytes before."""
    before = (finished[0] / "model.pt").read_bytes()
    with contextlib.redirect_stdout(io.StringIO()) as out:
        run_evaluate(*quick(finished[0]))
    return finished[0], before, out.getvalue()


def quick(run, *more):
    """The command line of a quick evaluation."""
    return "run", "--run", run, "--fast", "--labels", "3shot", "--seeds", 1, *more


def run_evaluate(*argv):
    """Evaluate, or compare, in this process."""
    evaluate.main(evaluate.get_args([str(a) for a in argv]))


def metrics_of(run):
    return json.loads((run / "metrics.json").read_text())


def random_scores(n=200, seed=0):
    """Labels, scores with ties, predictions, patients with several records."""
    rng = np.random.default_rng(seed)
    y = (rng.random((n, 5)) < [.5, .3, .2, .2, .1]).astype(int)
    p = np.round(.3 * y + rng.random((n, 5)), 1)
    return y, p, (p > .6).astype(int), rng.integers(0, n // 3, n)


class TestScores:
    def test_scores_are_scikit_learns(self):
        y, p, predicted, _ = random_scores()
        got = evaluate.score(y, p, predicted)
        assert got["macro_auroc"] == pytest.approx(metrics.roc_auc_score(y, p))
        assert got["macro_f1"] == pytest.approx(metrics.f1_score(y, predicted, average="macro"))
        assert got["accuracy"] == pytest.approx((y == predicted).all(1).mean())

    def test_a_class_without_positives_is_left_out_of_the_means(self):
        y, p, predicted, _ = random_scores()
        y[:, 3] = 0
        got, rest = evaluate.score(y, p, predicted), [0, 1, 2, 4]
        assert math.isnan(got["auroc"]["CD"]) and math.isnan(got["f1"]["CD"])
        assert got["macro_auroc"] == pytest.approx(metrics.roc_auc_score(y[:, rest], p[:, rest]))
        assert got["macro_f1"] == pytest.approx(metrics.f1_score(
            y[:, rest], predicted[:, rest], average="macro"))

    def test_each_bootstrap_draw_is_the_score_of_the_repeated_records_of_patients(self):
        y, p, predicted, patients = random_scores(60)
        draws = evaluate.bootstrap(y, p, predicted, patients, 50, seed=3)
        who = np.unique(patients)
        counts = np.random.default_rng(3).multinomial(len(who), np.full(len(who), 1 / len(who)), 50)
        for draw, count in zip(draws, counts):
            at = np.concatenate([np.flatnonzero(patients == w) for w, n in zip(who, count)
                                 for _ in range(n)])
            want = evaluate.score(y[at], p[at], predicted[at])
            if y[at].any(0).all():
                np.testing.assert_allclose(draw, [want[m] for m in evaluate.MEASURES])
            else:  # the mean of fewer classes is another number
                assert np.isnan(draw[:2]).all() and draw[2] == pytest.approx(want["accuracy"])

    def test_the_interval_has_the_width_of_the_binomial(self):
        rng = np.random.default_rng(0)
        y = np.eye(5, dtype=int)[rng.integers(0, 5, 1000)]
        predicted = np.where(rng.random((1000, 1)) < .8, y, 1 - y)
        low, high = evaluate.interval(evaluate.bootstrap(y, predicted + 0., predicted,
                                                         np.arange(1000), 2000)[:, 2])
        right = (y == predicted).all(1).mean()
        assert abs((high - low) - 2 * 1.96 * math.sqrt(right * (1 - right) / 1000)) < .004
        assert low < right < high

    def test_thresholds_have_the_best_f1(self):
        y, p, _, _ = random_scores(80)
        y[:, 2] = 0
        got = evaluate.best_thresholds(y, p)
        for k in (0, 1, 3, 4):
            f1 = [metrics.f1_score(y[:, k], p[:, k] >= t) for t in np.unique(p[:, k])]
            assert metrics.f1_score(y[:, k], p[:, k] >= got[k]) == pytest.approx(max(f1))
        assert got[2] == 0.5

    def test_alignment_and_uniformity_are_their_double_loops(self):
        z1, z2 = np.random.default_rng(0).standard_normal((2, 9, 4))
        a, b = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (z1, z2))
        want = np.mean([sum((u - v) ** 2) for u, v in zip(a, b)])
        assert evaluate.alignment(z1, z2) == pytest.approx(want)
        pairs = [math.exp(-2 * sum((a[i] - a[j]) ** 2)) for i in range(9) for j in range(i)]
        assert evaluate.uniformity(z1) == pytest.approx(math.log(np.mean(pairs)))

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


class TestProbe:
    def test_protocols_keep_patients_and_folds_apart(self, cache):
        index = data.open_cache(cache).index
        y, fold, patient = (index[c].to_numpy() for c in (list(CLASSES), "strat_fold",
                                                          "patient_id"))
        for name, task in evaluate.protocols(index).items():
            parts = [set(patient[rows]) for rows in (task.train, task.choose, task.test)]
            assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
            assert set(fold[task.test]) == ({9, 10} if name == "table3" else {10})
            used = np.concatenate([task.train, task.choose, task.test])
            assert (y[used].sum(1) == 1).all() if task.single else (y[used].sum(1) > 0).all()
            if name != "table3":
                assert set(fold[task.train]) == set(range(1, 9)) and set(fold[task.choose]) == {9}
                assert len(used) == ((y.sum(1) == 1) if task.single else y.any(1)).sum()

    @pytest.mark.parametrize("budget", ["3shot", "10shot", "10%", "1%", "100%"])
    def test_few_labels_come_from_training_folds_only(self, cache, budget):
        index = data.open_cache(cache).index
        task, seen = evaluate.protocols(index)["official"], []
        for seed in range(5):
            rows = evaluate.draw_labels(task, budget, seed)
            assert set(rows) <= set(task.train) and len(set(rows)) == len(rows)
            assert index.strat_fold[rows].max() <= 8
            if budget.endswith("shot"):
                n = int(budget[:-4])
                held = task.y[task.train].sum(0)
                assert (task.y[rows].sum(0) >= np.minimum(held, n)).all() and len(rows) <= 5 * n
            else:
                assert len(rows) == max(1, round(len(task.train) * int(budget[:-1]) / 100))
            seen.append(tuple(rows))
        assert len(set(seen)) > 1 or budget == "100%"
        np.testing.assert_array_equal(rows, evaluate.draw_labels(task, budget, 4))

    @pytest.mark.parametrize("single", [True, False])
    def test_a_probe_is_scikit_learns_logistic_regression(self, single):
        rng = np.random.default_rng(0)
        z = rng.standard_normal((80, 6)) * [1, 10, .1, 1, 1, 1]
        y = np.eye(5, dtype=int)[rng.integers(0, 5, 80)]
        x = (z - z.mean(0)) / z.std(0)
        got = evaluate.fit_probe(z, y, 0.1, single)(z)
        if single:
            want = LogisticRegression(C=0.1).fit(x, y.argmax(1)).predict_proba(x)
        else:
            want = np.stack([LogisticRegression(C=0.1).fit(x, t).predict_proba(x)[:, 1]
                             for t in y.T], axis=1)
        np.testing.assert_allclose(got, want, atol=1e-3)

    @pytest.mark.parametrize("single", [True, False])
    def test_a_class_that_training_lacks_or_always_has_gets_a_constant(self, single):
        z = np.random.default_rng(0).standard_normal((30, 4))
        y = np.eye(5, dtype=int)[np.arange(30) % 2 + 1]  # MI and STTC alone
        if not single:
            y[:, 4] = 1
        p = evaluate.fit_probe(z, y, 1.0, single)(z)
        assert (p[:, [0, 3]] == 0).all() and np.ptp(p[:, 1]) > 0
        assert (p[:, 4] == (0 if single else 1)).all()

    def test_the_penalty_is_the_one_with_the_least_cross_entropy_on_fold_9(self):
        rng = np.random.default_rng(0)
        y = np.eye(5, dtype=int)[rng.integers(0, 5, 300)]
        z = (y @ rng.standard_normal((5, 20)) + 2 * rng.standard_normal((300, 20)))[:, None]
        train_, choose, test = np.split(np.arange(300), [150, 220])
        task = evaluate.Task("t", y, np.arange(300), train_, choose, test, single=True)
        loss = [metrics.log_loss(y[choose].argmax(1), evaluate.fit_probe(
            z[train_, 0], y[train_], c, True)(z[choose, 0])) for c in evaluate.STRENGTHS]
        assert evaluate.choose_probe(z, task)[1] == evaluate.STRENGTHS[np.argmin(loss)]

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
    def test_training_with_labels_changes_a_copy_and_finds_the_classes(self, cache):
        c = data.open_cache(cache)
        task, m = evaluate.protocols(c.index)["official"], tiny()
        net = evaluate.Classifier(copy.deepcopy(m), "contig", None)
        start = copy.deepcopy(m.state_dict())
        evaluate.fit_network(net, c, task, task.train, (3e-3, 3e-3), 16, torch.device("cpu"),
                             contextlib.nullcontext, seed=0)
        for key, value in m.state_dict().items():
            assert torch.equal(value, start[key])
        assert any(not torch.equal(v, start[k]) for k, v in net.model.state_dict().items())
        with torch.no_grad():
            p = net(data.normalize(torch.from_numpy(c.signals[task.train])))[:, 0]
        assert metrics.roc_auc_score(task.y[task.train], p) > 0.75

    def test_fewer_leads_are_zeros(self):
        m, x = tiny().eval(), torch.randn(3, 200, 12)
        keep = torch.arange(12) < 6
        with torch.no_grad():
            torch.testing.assert_close(model.embed(m, x, "contig", keep.expand(3, -1)),
                                       model.embed(m, x * keep, "contig"))


class TestEvaluate:
    def test_the_numbers_follow_from_the_cached_embeddings(self, evaluated):
        run, _, out = evaluated
        got = metrics_of(run)
        with np.load(run / "eval" / "embeddings-pretrained.npz") as saved:
            z, y, fold, patient = (saved[k] for k in ("z", "labels", "strat_fold", "patient_id"))
        assert z.shape == (100, 2, 16)
        z, known = z.mean(1).astype(float), y.any(1)
        at = {part: known & np.isin(fold, f) for part, f in
              (("train", range(1, 9)), ("choose", [9]), ("test", [10]))}
        x = (z - z[at["train"]].mean(0)) / z[at["train"]].std(0)
        row = got["protocols"]["official"]["pretrained"]
        p = np.stack([LogisticRegression(C=row["strength"], max_iter=5000).fit(
            x[at["train"]], y[at["train"], k]).predict_proba(x)[:, 1] for k in range(5)], axis=1)
        test = at["test"]
        present = y[test].any(0)
        aurocs = [metrics.roc_auc_score(y[test, k], p[test, k]) for k in np.flatnonzero(present)]
        assert row["macro_auroc"] == pytest.approx(np.mean(aurocs), abs=.01)
        rng, draws, who = np.random.default_rng(9), [], np.unique(patient[test])
        for _ in range(400):  # another random state: the interval is only near
            rows = np.concatenate([np.flatnonzero(test & (patient == w)) for w in
                                   rng.choice(who, len(who))])
            ok = [k for k in range(5) if 0 < y[rows, k].sum() < len(rows)]
            if len(ok) == present.sum():
                draws.append(np.mean([metrics.roc_auc_score(y[rows, k], p[rows, k]) for k in ok]))
        np.testing.assert_allclose(row["intervals"]["macro_auroc"],
                                   np.percentile(draws, (2.5, 97.5)), atol=.1)
        one = (y.sum(1) == 1) & (fold >= 9)
        want = train.clustering(z[one].astype(np.float32), y[one].argmax(1))
        for key, value in want.items():
            assert got["clustering"]["pretrained"][key] == pytest.approx(value, rel=1e-3)
        assert "SYNTHETIC" in got["about"] and "SYNTHETIC" in out

    def test_a_probe_leaves_the_run_bit_for_bit_untouched(self, evaluated):
        run, before, _ = evaluated
        assert (run / "model.pt").read_bytes() == before
        m, args = model.load_run(run)
        c = data.open_cache(args["args"]["cache"])
        x = data.normalize(torch.from_numpy(c.signals[:4].copy()))
        with torch.no_grad(), np.load(run / "eval" / "embeddings-pretrained.npz") as saved:
            np.testing.assert_allclose(saved["z"][:4], model.embed(m, x, "noncontig"), atol=1e-5)

    def test_untrained_is_the_runs_own_beginning(self, evaluated):
        e = evaluate.Evaluation(evaluate.get_args(["run", "--run", str(evaluated[0])]))
        train.set_seed(e.seed)
        begun = model.Contrastive(e.model.config).state_dict()
        for key, value in e.encoder("untrained", e.seed).state_dict().items():
            assert torch.equal(value, begun[key])

    def test_report_figures_and_numbers_are_there(self, evaluated):
        run = evaluated[0]
        text = (run / "report.md").read_text()
        for name in ("tsne", "confusion", "roc", "leads", "labels"):
            assert f"(figures/{name}.png)" in text
            assert (run / "figures" / f"{name}.png").stat().st_size > 10_000
            assert len(pd.read_csv(run / "figures" / f"{name}.csv")) > 3
        got = metrics_of(run)
        assert set(got["protocols"]) == {"official", "paper", "table3"}
        assert set(got["leads"]["rocket"]) and len(got["leads"]["pretrained"]) == 5
        assert "NaN" not in (run / "metrics.json").read_text()
        assert set(got["streams"]) == {f"{s} stream sees {what}" for s in ("time", "channel")
                                       for what in ("another record", "nothing")}

    def test_no_panel_of_the_confusion_matrices_stays_empty(self, tmp_path, monkeypatch):
        kept = []
        monkeypatch.setattr(evaluate, "save_figure", lambda figure, *rest: kept.append(figure))
        for n in (1, 4, 5, 7, 8):
            evaluate.plot_confusion(dict.fromkeys(list(evaluate.ROWS)[:n], np.eye(5, dtype=int)),
                                    "title", tmp_path / "x.png")
            assert [len(axis.images) for axis in kept[-1].axes] == [1] * n

    @slow
    def test_a_second_time_nothing_is_done_again(self, evaluated):
        run = evaluated[0]
        stamps = {f: f.stat().st_mtime_ns for f in (run / "eval").glob("*-*.npz")}
        run_evaluate(*quick(run))
        assert stamps == {f: f.stat().st_mtime_ns for f in (run / "eval").glob("*-*.npz")}
        first = metrics_of(run)
        run_evaluate(*quick(run, "--first-view"))
        with np.load(run / "eval" / "embeddings-pretrained.npz") as saved:
            assert saved["z"].shape[1] == 1
        run_evaluate(*quick(run))
        again = metrics_of(run)
        for one in (first, again):  # but for the seconds that it took
            for results in one["protocols"].values():
                for row in results.values():
                    row.pop("seconds")
            for rows in one["labels"].values():
                for row in rows.values():
                    row.pop("seconds")
        assert first == again

    @slow
    def test_every_row_is_there_also_for_stochastic_and_few_labels(self, cache, tmp_path):
        run_train(cache, tmp_path / "r", "--view", "stochastic", "--max-steps", 2, "--workers", 0)
        run_evaluate("run", "--run", tmp_path / "r", "--seeds", 2, "--labels", "3shot", "100%")
        got = metrics_of(tmp_path / "r")
        assert list(got["protocols"]["official"]) == list(evaluate.ROWS)
        assert set(got["protocols"]["table3"]) == set(evaluate.PROBED)
        assert set(got["labels"]["3shot"]) == set(evaluate.ROWS)
        assert len(got["labels"]["3shot"]["finetuned"]["draws"]["macro_auroc"]) == 2
        assert (tmp_path / "r" / "resnet18" / "model.pt").exists()
        assert got["quality"]["resnet18"]["alignment"] > 0
        assert got["labels"]["3shot"]["supervised"]["sd"]["macro_auroc"] > 0

    @slow
    def test_a_resnet_run_is_evaluated_too(self, cache, tmp_path):
        run_train(cache, tmp_path / "r", "--arch", "resnet18", "--max-steps", 2)
        run_evaluate(*quick(tmp_path / "r"))
        assert metrics_of(tmp_path / "r")["streams"] is None

    def test_bad_input_is_named(self, evaluated, small, tmp_path):
        data.build_cache(small, 500, tmp_path / "c500", workers=1)
        for argv, says in (
                (["--run", tmp_path], "no model.pt in"),
                (["--cache", tmp_path / "c500"], "was trained at 100 Hz, .* 500 Hz.*RATE=100"),
                (["--labels", "ten"], "--labels ten: give such as 10shot"),
                (["--seeds", 0], "--seeds 0"), (["--label-lr", 0], "--label-lr 0.0: at least")):
            with pytest.raises(InputError, match=says):
                run_evaluate("run", "--run", evaluated[0], *argv)

    def test_a_fold_without_records_or_a_class_is_named(self, cache):
        index = data.open_cache(cache).index
        with pytest.raises(InputError, match="none in fold 10 has a superclass"):
            evaluate.protocols(index[index.strat_fold != 10])
        few = index.copy()
        few.loc[few.strat_fold == 10, "HYP"] = 0
        few.loc[few.strat_fold == 9, "CD"] = 0
        notes = "\n".join(note for t in evaluate.protocols(few).values() for note in
                          evaluate.gaps(t))
        assert re.search("official: 0 of the .* to test on have HYP: its AUROC and F1", notes)
        assert re.search("0 of the .* to choose on have CD: its threshold is 0.5", notes)
        assert re.search("official: only .* test records have MI", notes)

    def test_other_data_is_noted(self, evaluated, small, tmp_path):
        data.build_cache(small, 100, tmp_path / "c", workers=1)
        run = Path(shutil.copytree(evaluated[0], tmp_path / "r"))
        args = evaluate.get_args(["run", "--run", str(run), "--cache", str(tmp_path / "c")])
        assert any("evaluated on other data" in note for note in evaluate.Evaluation(args).notes)

    @slow
    def test_compare_pools_seeds_and_prints_the_papers_numbers(self, evaluated, cache, tmp_path):
        runs = [evaluated[0]]
        for view, seed in (("noncontig", 1), ("contig", 0)):
            runs.append(tmp_path / f"{view}-{seed}")
            argv = ["--view", view, "--epochs", 2, "--seed", seed]
            run_train(cache, runs[-1], *argv)
            run_evaluate(*quick(runs[-1]))
        (tmp_path / "bare").mkdir()
        out = script("evaluate.py", "compare", *runs, tmp_path / "bare", "--out", tmp_path / "all")
        assert "bare has no metrics.json and is left out" in out
        rows = pd.read_csv(tmp_path / "all.csv")
        rows["group"] = rows.group.str.split(" ").str[0]  # the label tells the flags, too
        rows = rows.set_index(["group", "metric"])
        values = [metrics_of(r)["protocols"]["official"]["pretrained"]["macro_f1"] for r in runs]
        got = rows.loc[("noncontig", "protocols/official/pretrained/macro_f1")]
        assert got["mean"] == pytest.approx(np.mean(values[:2]))
        assert got["sd"] == pytest.approx(np.std(values[:2], ddof=1)) and got["runs"] == 2
        assert rows.loc[("contig", "protocols/table3/pretrained/accuracy"), "paper"] == .72
        assert rows.loc[("noncontig", "clustering/pretrained/silhouette"), "paper"] == .035
        text = (tmp_path / "all.md").read_text()
        for word in ("SYNTHETIC", "**the paper**", "6.424", "50.920", "by chance", "±",
                     "S4, supervised"):
            assert word in text, word
        saved = json.loads((tmp_path / "all.json").read_text())
        (found,) = [d for d in saved["differences"] if d["measure"] == "macro_f1"
                    and d["protocol"] == "official" and re.match("contig.*, this run$", d["a"])
                    and re.match("noncontig.*, this run$", d["b"])]
        assert found["difference"] == pytest.approx(values[2] - np.mean(values[:2]))
        draws = [np.load(run / "eval" / "draws.npz")["official-pretrained"][:, 1] for run in runs]
        paired = draws[2] - (draws[0] + draws[1]) / 2
        np.testing.assert_allclose(found["interval"], np.nanpercentile(paired, (2.5, 97.5)))

    def test_runs_that_are_not_repetitions_are_kept_apart(self, evaluated, tmp_path):
        def copy_of(name, args=(), data_=(), **settings):
            run = Path(shutil.copytree(evaluated[0], tmp_path / name))
            for file, key, change in (("args.json", "args", dict(args)),
                                      ("metrics.json", "data", dict(data_)),
                                      ("metrics.json", "settings", settings)):
                saved = json.loads((run / file).read_text())
                saved[key] |= change
                (run / file).write_text(json.dumps(saved))
            return run

        runs = [evaluated[0], copy_of("a", args=dict(tau=.5)), copy_of("e", args=dict(shift=True)),
                copy_of("b", data_=dict(fingerprint="f" * 64)), copy_of("c", first_view=True)]
        groups = evaluate.group_runs(evaluate.read_runs(runs))
        labels = "\n".join(g["label"] for g in groups)
        assert len({g["label"] for g in groups}) == 5 and labels.startswith("noncontig batch_size")
        for word in ("tau=0.5", "shift=True", "first_view=True", "ffffff", "epochs=2"):
            assert word in labels, word
        saved = json.loads((evaluated[0] / "args.json").read_text())
        del saved["args"]["shift"]  # a run that is older than a flag
        older = copy_of("older")
        saved["args"]["seed"] = 1
        (older / "args.json").write_text(json.dumps(saved))
        numbers = metrics_of(older) | dict(seed=1)
        (older / "metrics.json").write_text(json.dumps(numbers))
        (one,) = evaluate.group_runs(evaluate.read_runs([evaluated[0], older]))
        assert one["seeds"] == [0, 1]
        with pytest.raises(InputError, match="the same seed twice"):
            evaluate.group_runs(evaluate.read_runs([evaluated[0], copy_of("d")]))
        evaluate.Evaluation(evaluate.get_args(["run", "--run", str(older)]))

    def test_always_answering_the_most_frequent_classes_is_the_majority_row(self, evaluated, cache):
        index = data.open_cache(cache).index
        row = metrics_of(evaluated[0])["protocols"]["official"]["majority"]
        y = index.loc[index[list(CLASSES)].any(axis=1) & (index.strat_fold == 10), list(CLASSES)]
        assert row["accuracy"] == pytest.approx((y == [1, 0, 0, 0, 0]).all(axis=1).mean())
        assert row["macro_auroc"] == 0.5

    def test_rows_of_any_seed_are_shown_and_counted(self, evaluated, tmp_path, capsys):
        runs = [Path(shutil.copytree(evaluated[0], tmp_path / name)) for name in "ab"]
        for run, seed in zip(runs, (3, 4)):
            numbers = metrics_of(run)
            numbers["seed"] = seed
            if seed == 4:
                rows = numbers["protocols"]["official"]
                rows["supervised"] = rows["untrained"] | dict(macro_auroc=.777)
            (run / "metrics.json").write_text(json.dumps(numbers))
        run_evaluate("compare", *runs, "--out", tmp_path / "all")
        assert re.search("from scratch.*0.777 .1 of 2 seeds", capsys.readouterr().out)

    def test_compare_names_what_is_damaged(self, evaluated, tmp_path):
        for i, (name, text) in enumerate((("metrics.json", "{}"), ("metrics.json", "[1"),
                                          ("eval/draws.npz", "PK"), ("args.json", ""))):
            run = Path(shutil.copytree(evaluated[0], tmp_path / f"r{i}"))
            (run / name).write_text(text)
            with pytest.raises(InputError, match="is damaged .*evaluate it again"):
                evaluate.read_runs([run])
        with pytest.raises(InputError, match="args.json in .* is damaged"):
            model.load_run(run)

    def test_compare_without_an_evaluated_run_says_so(self, tmp_path):
        assert "train and evaluate some first" in script(
            "evaluate.py", "compare", tmp_path, "--out", tmp_path / "x", ok=False)
        assert not list(tmp_path.glob("x*"))


def fail_in_the_second():
    """A process that fails while the other would wait for it for half an hour."""
    if os.environ["RANK"] == "1":
        raise ValueError("broken")
    time.sleep(1800)


class TestBench:
    def test_a_thinned_cache_goes_to_workers_as_it_is(self, cache):
        whole = data.open_cache(cache)
        thin = dataclasses.replace(whole, signals=whole.signals[:3, ::5], meta={"rate": 20})
        copy = pickle.loads(pickle.dumps(thin))
        assert copy.meta["rate"] == 20 and np.array_equal(copy.signals, thin.signals)

    def test_several_processes_cannot_share_a_gpu(self, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        with pytest.raises(data.InputError, match="--device cuda:1"):
            train.join_processes("cuda:1")

    @slow
    def test_a_process_that_fails_ends_the_others(self):
        with pytest.raises(evaluate.ProcessException):  # bench: the next row
            evaluate.apart(fail_in_the_second, processes=2)

    def test_rows_that_fail_are_named_in_the_end(self, cache, tmp_path, monkeypatch):
        def fail(*args, **more):
            raise evaluate.ProcessException("no memory", 0, 1)

        monkeypatch.setattr(evaluate, "apart", fail)
        monkeypatch.setattr(evaluate, "measure_loading", lambda *args: dict(noncontig=1.))
        with pytest.raises(InputError, match="not measured: small; small, plain acc"):
            run_evaluate("bench", "--cache", cache, "--small", "--batch", 256, "--out",
                         tmp_path / "bench.json")
        assert json.loads((tmp_path / "bench.json").read_text())["steps"] == {}

    def test_ratios_are_left_out_when_a_row_is_missing(self):
        row = dict(step=2., peak_bytes=30, bytes_before=10, records_per_second=5.)
        loading = {"noncontig": 8., "per item": 2.}
        found = evaluate.bench_ratios(loading, {"paper": row, "small": row, "small, 2 processes":
                                                row | dict(records_per_second=6.)})
        assert found == {"noncontig views over one record at a time": 4.,
                         "small, 2 processes over one, records/s": 1.2}

    def test_operations_are_counted_as_by_hand(self):
        q, w = torch.randn(2, 3, 50, 8, requires_grad=True), torch.randn(8, 16)
        assert evaluate.count_flops(lambda: q @ w) == 2 * 2 * 3 * 50 * 8 * 16
        attend = lambda: F.scaled_dot_product_attention(q, q, q)  # noqa: E731
        products = 2 * 2 * 3 * 50 * 50 * 8  # one of the two
        assert evaluate.count_flops(attend) == 2 * products
        # backward: both again for the gradients of each factor, and the scores once more
        assert evaluate.count_flops(lambda: attend().sum().backward()) == 7 * products

    def test_the_yardstick_is_the_same_architecture(self):
        ours = tiny(depth=2).eval()
        theirs = evaluate.plain_modules(ours).eval()
        assert model.n_parameters(ours) == model.n_parameters(theirs)
        pairs = [(a, b) for layers in ("time_layers", "channel_layers") for a, b in zip(
            getattr(ours.encoder, layers), getattr(theirs.encoder, layers))]
        for a, b in pairs:
            for mine, other in ((a.norm1, b.norm1), (a.norm2, b.norm2), (a.ff[0], b.linear1),
                                (a.ff[2], b.linear2), (a.attention.out, b.self_attn.out_proj)):
                other.load_state_dict(mine.state_dict())
            b.self_attn.in_proj_weight, b.self_attn.in_proj_bias = (a.attention.qkv.weight,
                                                                    a.attention.qkv.bias)
        for a, b in ((ours.encoder.cross.time_to_channel, theirs.encoder.cross.t),
                     (ours.encoder.cross.channel_to_time, theirs.encoder.cross.c)):
            b.in_proj_weight, b.in_proj_bias, b.out_proj = a.qkv.weight, a.qkv.bias, a.out
        x = torch.randn(3, 500, 12)
        torch.testing.assert_close(ours(x)[1], theirs(x)[1], atol=1e-5, rtol=1e-4)

    @slow
    def test_a_benchmark_measures_and_saves_what_it_prints(self, cache, tmp_path, monkeypatch,
                                                           capsys):
        plan, rows = evaluate.bench_plan, ("small", "small, plain accumulation")
        monkeypatch.setattr(evaluate, "bench_plan", lambda *args: {  # .ci/run measures all of them
            name: row for name, row in plan(*args).items() if name in rows})
        run_evaluate("bench", "--cache", cache, "--small", "--batch", 256, "--out",
                     tmp_path / "bench.json")
        said, found = capsys.readouterr().out, json.loads((tmp_path / "bench.json").read_text())
        assert set(found["steps"]) == set(rows)
        step = found["steps"]["small"]
        assert step["tokens"] == 125 and step["batch"] == 256 and step["step"] > 0
        parts = sum(step[key] for key in ("data", "first_pass", "forward", "backward", "optimiser"))
        assert .3 < parts / step["step"] < 3  # measured apart, on a machine with other work
        assert set(found["loading"]) > {"wfdb", "per item", "contig", "noncontig", "stochastic"}
        for name, ratio in found["ratios"].items():
            assert re.search(rf"\| {re.escape(name)} *\| {ratio:.2f}", said), name
        assert "SYNTHETIC" in said


def run_attention(*argv):
    """Draw in this process."""
    attention.main(attention.get_args([str(a) for a in argv]))


def beats(rate, every=0.8, first=0.5):
    """A record (T, C) int16 with an R wave of 1 mV and a T wave each `every` s; its R times."""
    t, times = np.arange(10 * rate) / rate, np.arange(first, 9.9, every)
    mv = sum(np.exp(-((t - r) / .012) ** 2 / 2) + .3 * np.exp(-((t - r - .25) / .05) ** 2 / 2)
             for r in times)
    return np.repeat(np.rint(1000 * mv).astype(np.int16)[:, None], 12, axis=1), times


@pytest.fixture(scope="session")
def drawn(finished, tmp_path_factory):
    """A copy of the finished run with every figure, and what was printed."""
    run = Path(shutil.copytree(finished[0], tmp_path_factory.mktemp("drawn") / "one",
                               ignore=shutil.ignore_patterns("figures")))
    return run, script("attention.py", "plots", run)


class TestAttention:
    def test_what_is_observed_follows_from_the_weights(self):
        m, x, heads = tiny(depth=2).eval(), torch.randn(1, 500, 12), {}
        model.watch_attention(m, x, lambda name, layer, head, w: heads.setdefault(
            (name, layer), []).append(w[0].double().numpy()))
        found = attention.observe(m, x)
        assert list(found) == list(heads)
        for key, at in found.items():
            w = np.stack(heads[key])  # (H, N, M)
            np.testing.assert_allclose(at["map"], w.mean(0), atol=1e-6)
            np.testing.assert_allclose(at["map"].sum(1), 1, atol=1e-5)
            np.testing.assert_allclose(at["received"], w.shape[2] * w.mean(1), atol=1e-5)
            want = scipy.stats.entropy(w, axis=2).mean(1) / math.log(w.shape[2])
            np.testing.assert_allclose(at["entropy"], want, atol=1e-5)

    def test_the_running_mean_has_students_interval(self):
        x, mean = np.random.default_rng(0).normal(size=(7, 3)), attention.Mean()
        for row in x:
            mean.add(row)
        low, high = scipy.stats.t.interval(.95, 6, x.mean(0), scipy.stats.sem(x))
        np.testing.assert_allclose(mean.mean, x.mean(0))
        np.testing.assert_allclose(mean.half, (high - low) / 2)
        one = attention.Mean()
        one.add(x[0])
        assert np.isnan(one.half).all()

    @pytest.mark.parametrize("rate", data.RATES)
    def test_r_peaks_are_found_where_they_are(self, rate):
        signal, times = beats(rate)
        found = attention.r_peaks(signal, rate)
        assert len(found) >= len(times) - 1  # the detector learns on the first
        assert np.abs(found[:, None] - times).min(1).max() < .01
        assert not len(attention.r_peaks(0 * signal, rate))
        np.testing.assert_array_equal(attention.r_peaks(-signal, rate), found)  # either way up
        signal[:, LEADS.index("II")] = 0  # then another lead
        assert len(attention.r_peaks(signal, rate)) >= len(times) - 1

    @real
    def test_the_same_r_peaks_are_found_at_both_rates_of_real_records(self):
        table, both, all_of_them = data.load_tables(PTBXL), 0, 0
        for i in table.index[::10]:
            a, b = (attention.r_peaks(data.read_record(Path(PTBXL) / table[name][i], rate), rate)
                    for rate, name in data.RATES.items())
            hits = sum(np.abs(b - r).min(initial=9) < .05 for r in a)
            both, all_of_them = both + hits, all_of_them + len(a) + len(b) - hits
        assert both > .95 * all_of_them > 0, (both, all_of_them)

    @pytest.mark.parametrize("stride", [1, 4])
    def test_a_token_stands_at_the_mean_time_of_its_samples(self, stride):
        t = np.arange(500) * .02  # an interleaved view of 10 s
        np.testing.assert_allclose(attention.token_times(500, stride, 10),
                                   t.reshape(-1, stride).mean(1))

    def test_attention_on_peaks_is_1_by_chance_and_has_its_double_loop(self):
        rng, seconds, peaks = np.random.default_rng(0), np.arange(100) * .1, np.array([1.0, 4.02])
        near = np.zeros(100)
        near[[10, 40]] = 1
        assert attention.on_peaks(np.ones((2, 100)), seconds, peaks)["lift"] == pytest.approx(1)
        all_there = attention.on_peaks(near[None] * 50, seconds, peaks)
        assert all_there["share"] == pytest.approx(1) and all_there["lift"] == pytest.approx(50)
        received = rng.random((3, 100))
        received *= 100 / received.sum(1, keepdims=True)
        got = attention.on_peaks(received, seconds, peaks)
        share = [sum(received[h, j] for j in (10, 40)) / 100 for h in range(3)]
        np.testing.assert_allclose(got["lift_heads"], np.array(share) / .02)
        null = [sum(received[:, (j + i) % 100].mean() for j in (10, 40)) / 2 for i in range(100)]
        assert np.mean(null) == pytest.approx(1)
        np.testing.assert_allclose(got["null"], np.quantile(null, [.025, .975]))

    def test_the_mean_beat_is_the_signal_around_whole_beats(self):
        seconds = np.arange(1000) / 100
        wave = np.cos(2 * np.pi * seconds)  # each full second is a peak
        got = attention.around_peaks(wave, seconds, np.array([.1, 3., 7., 9.8]))
        np.testing.assert_allclose(got, np.cos(2 * np.pi * attention.BEAT_S), atol=1e-3)
        assert attention.around_peaks(wave, seconds, np.array([.1])) is None

    @pytest.mark.parametrize("seconds", [10, 5])
    def test_an_ecg_is_drawn_at_25_mm_a_second_and_10_mm_a_millivolt(self, seconds):
        mv = beats(100)[0][:100 * seconds] / 1000. * np.arange(1, 13)
        mv[:, 7] *= -.3
        figure = Figure(attention.ecg_size(mv), dpi=254)  # ten dots a millimetre
        attention.draw_ecg(figure, mv, "")
        axis = figure.axes[0]
        at = axis.transData.transform([(0, 0), (1, 0), (0, 1)])
        np.testing.assert_allclose(at[1] - at[0], [250, 0], atol=.01)
        np.testing.assert_allclose(at[2] - at[0], [0, 100], atol=.01)
        _, rows, offsets = attention.ecg_rows(mv)
        apart = (rows[:-1].clip(-4, 4).min(1) + offsets[:-1]) - (
            rows[1:].clip(-4, 4).max(1) + offsets[1:])
        np.testing.assert_allclose(apart, .6)
        shown = [mv[:250, 1], mv[250:500, 4], mv[500:750, 7], mv[750:, 10]] if seconds == 10 else [
            mv[:, 1], mv[:, 7]]  # II aVL V2 V5 one after another; or II and V2 at the same time
        middle = np.median(mv, axis=0)[[1, 4, 7, 10] if seconds == 10 else [1, 7]]
        np.testing.assert_allclose(rows[1], np.concatenate(
            [lead - m for lead, m in zip(shown, middle)]))
        assert {text.get_text() for text in axis.texts} == set(LEADS)

    def capture(self, monkeypatch, *argv):
        """The figures that a command draws, by file name."""
        figures = {}

        def keep(figure, path, numbers):
            figure.numbers, figures[path.stem] = numbers, figure

        monkeypatch.setattr(attention, "save_figure", keep)
        run_attention(*argv)
        return figures

    def patients(self, run, ids, n):
        """Views of records that --superclass NORM chose, checked to be of n patients."""
        cache = data.open_cache(json.loads((run / "args.json").read_text())["args"]["cache"])
        chosen = cache.index[cache.index.ecg_id.isin(ids)]
        assert len(chosen) == n and chosen.patient_id.is_unique and (chosen.NORM == 1).all()
        assert chosen.strat_fold.isin([9, 10]).all()
        return data.normalize(torch.from_numpy(cache.signals[chosen.index]))[:, ::2]

    @pytest.mark.parametrize("flags, word", [([], "lead"),
                                             (["--mix-leads"], "mixed channel token")])
    def test_maps_have_queries_and_keys_where_the_labels_say(self, cache, tmp_path, monkeypatch,
                                                             flags, word):
        run_train(cache, tmp_path, "--max-steps", 1, "--time-stride", 64, *flags)  # 7 tokens of 64
        figures = self.capture(monkeypatch, "maps", "--run", tmp_path, "--ecg-id", 5, "--raw")
        signal = data.open_cache(cache).signals[[4]]
        x = data.normalize(torch.from_numpy(signal))[:, ::2]
        found = attention.observe(model.load_run(tmp_path)[0], x)
        end = 7 * 64 * .02  # s: an interleaved view has a sample each 20 ms
        pictures = {}
        for name, figure in figures.items():
            for axis in (a for sub in figure.subfigs for a in sub.axes if a.images):
                pictures[name.split("-")[1], axis.get_title().split(":")[0]] = axis
        for name, want, extent, x_label, y_label in (
                (("time", "layer 1"), found["time", 0]["map"], (0, end, end, 0), "",
                 "query: time (s)"),
                (("channel", "layer 1"), found["channel", 0]["map"], (-.5, 11.5, 11.5, -.5), "",
                 f"query: {word}"),
                (("cross", "time attends to channels"), found["time_to_channel", 0]["map"].T,
                 (0, end, 11.5, -.5), "query: time (s)", f"key: {word}"),
                (("cross", "channels attend to time"), found["channel_to_time", 0]["map"],
                 (0, end, 11.5, -.5), "key: time (s)", f"query: {word}")):
            axis = pictures[name]
            np.testing.assert_allclose(axis.images[0].get_array().data, want, atol=1e-6)
            np.testing.assert_allclose(axis.images[0].get_extent(), extent)
            assert (axis.get_xlabel(), axis.get_ylabel()) == (x_label, y_label)
        names = [text.get_text() for text in pictures["channel", "layer 1"].get_yticklabels()]
        assert names == list(LEADS) if word == "lead" else "aVR" not in names
        curve = figures["attention-time-ecg5"].subfigs[1].axes[1].lines[0]
        np.testing.assert_allclose(curve.get_xdata(), (np.arange(7) * 64 + 31.5) * .02)
        np.testing.assert_allclose(curve.get_ydata(), 7 * found["time", 0]["map"].mean(0),
                                   rtol=1e-5)
        figure = figures["attention-time-ecg5"]  # the ECG that is saved is to scale too
        figure.set_dpi(254)
        figure.draw_without_rendering()
        at = figure.subfigs[0].axes[0].transData.transform([(0, 0), (1, 0), (0, 1)])
        np.testing.assert_allclose(at[1:] - at[0], [[250, 0], [0, 100]], atol=.05)

    def test_intervals_and_chance_are_drawn_where_they_are(self, finished, drawn, monkeypatch):
        figures = self.capture(monkeypatch, "maps", "--run", drawn[0], "--superclass", "NORM")
        axis = figures["attention-channel-NORM"].subfigs[0].axes[1]
        ids = figures["attention-channel-NORM"].numbers["ecg_id"]
        x = self.patients(drawn[0], ids, len(ids))
        m = model.load_run(drawn[0])[0]
        each = np.array([attention.observe(m, one[None])["channel", 0]["received"].mean(0)
                         for one in x])
        (container,) = axis.containers
        drawn_ends = np.array([segment[:, 1] for segment in container[2][0].get_segments()])
        want = scipy.stats.t.interval(.95, len(x) - 1, each.mean(0), scipy.stats.sem(each))
        np.testing.assert_allclose(drawn_ends, np.stack(want, 1), rtol=1e-4)
        figures = self.capture(monkeypatch, "plots", drawn[0])
        lines = figures["training-loss"].axes[0].lines
        flat = sorted(line.get_ydata()[0] for line in lines if line.get_label().startswith("_"))
        plan = json.loads((drawn[0] / "args.json").read_text())["in_effect"]
        assert flat == pytest.approx(sorted([math.log(2 * plan["batch"] - 1),
                                             math.log(2 * plan["val_batch"] - 1)]))

    def test_the_saved_maps_are_the_runs_and_relative_means_times_keys(self, drawn):
        run, said = drawn
        index = data.open_cache(json.loads((run / "args.json").read_text())["args"]["cache"]).index
        row = index[(index.strat_fold == 10) & (index.NORM == 1)
                    & (index[list(CLASSES)].sum(axis=1) == 1)].iloc[0]
        assert f"SYNTHETIC data synth: ecg_id {row.ecg_id} (NORM), fold 10" in said
        with np.load(run / "figures" / f"attention-time-ecg{row.ecg_id}.npz") as saved:
            assert saved["map"].shape == (1, 25, 25) and saved["ecg_id"] == [row.ecg_id]
            np.testing.assert_allclose(saved["map"].sum(-1), 1, atol=1e-5)
            np.testing.assert_allclose(saved["received_ratio"], 25 * saved["map"].mean(1),
                                       atol=1e-5)
        means = attention.Mean()
        means.add(np.full((3, 8), 1 / 8))
        assert (attention.shown(dict(map=means), raw=False) == 1).all()

    def test_every_figure_is_there_with_its_numbers(self, drawn, cache):
        folder = drawn[0] / "figures"
        names = {path.stem for path in folder.glob("*.png")}
        assert {re.sub("ecg[0-9]+", "ID", name) for name in names} == {
            "training-loss", "training-gradients", "training-clustering", "data-ages",
            "data-superclasses", "data-rates", "views-stochastic", "views-contig",
            "views-noncontig", "spectra", "attention-time-ID", "attention-channel-ID",
            "attention-cross-ID", "attention-beats-ID"}
        for name in names:
            assert (folder / f"{name}.csv").exists() or (folder / f"{name}.npz").exists(), name
        loss = pd.read_csv(folder / "training-loss.csv")
        np.testing.assert_allclose(loss.val_loss, [row["val_loss"] for row in log_of(drawn[0])],
                                   rtol=1e-5)
        index = data.open_cache(cache).index
        table = pd.read_csv(folder / "data-superclasses.csv", index_col="superclass")
        for a in CLASSES:
            for b in CLASSES:
                both = sum(1 for _, r in index.iterrows() if r[a] and r[b])
                assert table[f"with_{b}"][a] == both
            assert table.alone[a] == ((index[a] == 1) & (index[list(CLASSES)].sum(axis=1) == 1)
                                      ).sum()

    def test_views_are_those_of_training_with_masked_leads_marked(self, drawn, cache):
        saved = json.loads((drawn[0] / "args.json").read_text())["args"]
        c, config = data.open_cache(cache), views.ViewConfig(view="noncontig")
        with np.load(drawn[0] / "figures" / "views-noncontig.npz") as numbers:
            row = int(np.flatnonzero((c.signals[:] / np.float32(1000) == numbers["millivolt"])
                                     .all((1, 2)))[0])
            x = data.normalize(torch.from_numpy(c.signals[[row]].copy()))
            for got, want in zip(numbers["views"], views.noncontig(x)):
                np.testing.assert_allclose(got, want[0], atol=1e-6)
            keep = train.draw_keep(config, 1, saved["seed"], 0, row)
            np.testing.assert_array_equal(numbers["kept"], keep[:, 0])
        with np.load(drawn[0] / "figures" / "views-stochastic.npz") as numbers:
            assert all(np.abs(view - numbers["normalized"]).max() > 0 for view in numbers["views"])
        axis = Figure().subplots()
        attention.draw_leads_apart(axis, x[0].numpy(), np.arange(1000), keep[0, 0].numpy(),
                                   np.arange(12), "red", "")
        assert len(axis.texts) == (~keep[0, 0]).sum()
        flat = [line for line in axis.lines if np.ptp(line.get_ydata()) == 0]
        assert len(flat) == len(axis.texts)

    def test_ages_above_89_are_a_bar_of_their_own(self, tmp_path):
        index = pd.DataFrame(dict(age=[300, 300, 300, 0, 4, 5, 89, 42, np.nan], sex=1))
        attention.plot_ages(index, "", tmp_path / "ages.png")
        rows = pd.read_csv(tmp_path / "ages.csv").set_index("age_from").records
        assert rows[90] == 3 and rows[0] == 2 and rows[5] == 1 and rows[85] == 1 and rows[40] == 1
        assert rows.sum() == 8

    def test_spectral_distance_is_0_for_a_gain_and_known_for_a_filter(self):
        x = np.random.default_rng(0).normal(size=(4, 1000, 12))
        f, plain = attention.spectra(x, 100)
        distance = attention.log_spectral_distance
        np.testing.assert_allclose(distance(attention.spectra(3 * x, 100)[1], plain), 0, atol=1e-9)
        tilt = plain * np.where(f < 20, 2, .5)[:, None]  # 3 dB up, 3 dB down
        np.testing.assert_allclose(distance(tilt, plain), 10 * math.log10(2))
        got = attention.lead_correlation(x, np.roll(x, 1, axis=0))
        want = [[np.corrcoef(x[i, :, c], x[i - 1, :, c])[0, 1] for c in range(12)]
                for i in range(4)]
        np.testing.assert_allclose(got, want)
        np.testing.assert_allclose(attention.lead_correlation(x, 5 - 2 * x), -1)

    def test_the_shipped_filter_changes_spectra_and_leads_more_than_ours(self, cache):
        trained = vars(train.get_args([])) | dict(view="contig")
        _, found = attention.frequency_check(data.open_cache(cache), trained)
        for shipped, ours in (("band-pass as shipped", "band-pass along time"),
                              ("pool, band-pass as shipped", "pool, band-pass along time")):
            assert found[shipped][1] > found[ours][1] > 0
            assert found[shipped][2] < found[ours][2] < 1

    def test_a_superclass_is_the_mean_over_its_patients(self, drawn):
        run_attention("maps", "--run", drawn[0], "--superclass", "NORM", "--records", 3,
                      "--format", "pdf")
        folder, m = drawn[0] / "figures", model.load_run(drawn[0])[0]
        with np.load(folder / "attention-channel-NORM.npz") as saved:
            x = self.patients(drawn[0], saved["ecg_id"], 3)
            each = [attention.observe(m, one[None])["channel", 0] for one in x]
            np.testing.assert_allclose(saved["map"][0], np.mean([e["map"] for e in each], 0),
                                       atol=1e-6)
            half = scipy.stats.sem([e["map"] for e in each]) * scipy.stats.t.ppf(.975, 2)
            np.testing.assert_allclose(saved["map_half"][0], half, atol=1e-6)
        table = pd.read_csv(folder / "attention-NORM.csv").query(
            "encoder == 'this run' and attention == 'channel stream'").iloc[0]
        entropies = [e["entropy"].mean() for e in each]
        assert table.entropy == pytest.approx(np.mean(entropies), abs=1e-5)
        assert table.records == 3 and table.entropy_half == pytest.approx(
            scipy.stats.sem(entropies) * scipy.stats.t.ppf(.975, 2), rel=1e-3)
        assert (folder / "attention-beats-NORM.pdf").read_bytes()[:4] == b"%PDF"

    def test_several_runs_share_the_figures_of_training(self, finished, drawn, tmp_path):
        other = Path(shutil.copytree(finished[0], tmp_path / "other"))
        (other / "model.pt").unlink()  # as in the middle of training
        run_attention("plots", drawn[0], other, "--out", tmp_path / "both")
        table = pd.read_csv(tmp_path / "both" / "training-gradients.csv")
        assert set(table.run) == {"one, SYNTHETIC", "other, SYNTHETIC"} and len(table) == 4
        assert {p.stem for p in (tmp_path / "both").iterdir()} == {
            "training-loss", "training-gradients", "training-clustering"}

    def test_bad_input_is_named(self, finished, cache, tmp_path, capsys):
        with pytest.raises(InputError, match="--ecg-id 999 is not in the data.*such as 1, 2"):
            run_attention("maps", "--run", finished[0], "--ecg-id", 999)
        with pytest.raises(InputError, match="--records 1: an interval needs at least 2"):
            run_attention("maps", "--run", finished[0], "--superclass", "HYP", "--records", 1)
        with pytest.raises(InputError, match="the same run twice"):
            run_attention("plots", finished[0], finished[0])
        with pytest.raises(InputError, match="--ecg-id is for the figures of one run"):
            run_attention("plots", finished[0], tmp_path, "--ecg-id", 3)
        with pytest.raises(InputError, match="none has no args.json.*make pretrain"):
            run_attention("plots", tmp_path / "none")
        bare = Path(shutil.copytree(finished[0], tmp_path / "bare"))
        (bare / "log.jsonl").unlink()
        with pytest.raises(InputError, match="bare has no log.jsonl"):
            run_attention("plots", bare)
        (bare / "log.jsonl").write_text('{"epoch": 1, "lo')
        with pytest.raises(InputError, match="log.jsonl in .*bare is damaged"):
            run_attention("plots", bare)
        run_train(cache, tmp_path / "resnet", "--arch", "resnet18", "--epochs", 1)
        with pytest.raises(InputError, match="ResNet-18: it has no attention"):
            run_attention("maps", "--run", tmp_path / "resnet")
        capsys.readouterr()
        run_attention("plots", tmp_path / "resnet")
        said = capsys.readouterr().out
        assert "no attention maps: this run is a ResNet-18" in said and "no gradient norms" in said
        assert (tmp_path / "resnet" / "figures" / "spectra.png").exists()


class TestMake:
    def make(self, *argv, ok=True):
        done = subprocess.run(["make", *argv], cwd=HERE, capture_output=True, text=True)
        assert (done.returncode == 0) == ok, done.stdout + done.stderr
        return done.stdout + done.stderr

    def test_make_alone_lists_every_public_target_and_variable(self):
        out = self.make()
        for word in ("demo", "test", "download", "cache", "pretrain", "eval", "compare", "plots",
                     "attention", "bench", "NPROC", "clean",
                     "VIEW", "SEED", "RATE", "PRESET", "DATA", "RUN", "RUNS", "ARGS"):
            assert re.search(rf"\b{word}\b", out), word

    def test_targets_chain_and_names_carry_the_canonical_view(self):
        for alias, view in views.ALIASES.items():
            out = self.make("-n", "pretrain", f"VIEW={alias}")
            rate = 100 if view == "stochastic" else 500
            steps = ["data.py download", f"--rate {rate}", "data.py cache", f"runs/{view}-s0"]
            assert [s for s in steps if s not in out] == []
        out = self.make("-n", "pretrain", "DATA=../elsewhere", "RATE=100")
        assert "data.py download" not in out and "cache/elsewhere-100" in out

    def test_an_unknown_view_stops_make_at_once(self):
        out = self.make("-n", "pretrain", "VIEW=zigzag", ok=False)
        assert all(name in out for name in ["zigzag", *views.VIEWS, *views.ALIASES])

    @pytest.mark.parametrize("name", ["data", "train", "evaluate", "attention"])
    def test_every_flag_that_is_parsed_is_used(self, name):
        source = (HERE / f"{name}.py").read_text()
        for flag in re.findall(r'add_argument\("--([a-z-]+)"', source):
            assert re.search(rf'args\.{flag.replace("-", "_")}\b', source) or flag == "preset", flag
        fields = {**views.ViewConfig.__dataclass_fields__, **model.Config.__dataclass_fields__}
        sources = "".join((HERE / f"{n}.py").read_text() for n in ("views", "model", "train"))
        for field in fields:
            assert re.search(rf"(config|size)\.{field}\b", sources), field

    @pytest.mark.parametrize("script, command", [
        (train, []), (model, []), (data, ["cache"]), (evaluate, ["run"]), (evaluate, ["compare"]),
        (evaluate, ["bench"]),
        (attention, ["maps"]), (attention, ["plots"])])
    def test_help(self, script, command, capsys):
        with pytest.raises(SystemExit) as stop:
            script.get_args([*command, "--help"])
        assert stop.value.code == 0 and "show this help" in capsys.readouterr().out

    def test_importing_a_script_does_nothing(self, tmp_path):
        code = ("import sys, torch, numpy as np\n"
                "a, b = torch.get_rng_state(), np.random.get_state()[1].copy()\n"
                f"sys.path.insert(0, {str(HERE)!r}); import attention\n"
                "assert (torch.get_rng_state() == a).all()\n"
                "assert (np.random.get_state()[1] == b).all()")
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
        assert not list(tmp_path.iterdir())
