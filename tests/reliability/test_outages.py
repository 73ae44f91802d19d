"""R27: what loggers lose is told on one line; training goes on, and gives the same weights."""

import errno
import json
import os
import re
import resource
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from geon.configs.schema import LoggerConfig
from geon.engine import loggers, main, report, trackers
from geon.engine.loggers import Jsonl, open_loggers
from geon.engine.trainer import Callback
from geon.launch.compose import compose
from geon.launch.env import Env
from tests.distributed.jobs import metrics, weights
from tests.launch.jobs import SMALLEST
from tests.reliability.wandb_server import Server

pytestmark = pytest.mark.row("R27")

STEPS = 8


class At(Callback):
    """Do something to the run after some step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step(self, trainer):
        if trainer.step == self.step:
            self.action(trainer)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Train in this process; returns the run folder."""

    def train(name, *options, do=None, step=3):
        made = main._callbacks
        if do is not None:
            monkeypatch.setattr(main, "_callbacks", lambda config: [At(step, do), *made(config)])
        options = [f"schedule.steps={STEPS}", "logger.every=1", *options]
        main.execute(
            compose([*SMALLEST, f"output={tmp_path}", f"name={name}", *options]),
            Env(0, 1, 0, False),
        )
        monkeypatch.setattr(main, "_callbacks", made)
        return tmp_path / name

    return train


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Weights of the same run with nothing but metrics.jsonl."""
    folder = tmp_path_factory.mktemp("plain")
    options = [f"output={folder}", "name=plain", f"schedule.steps={STEPS}", "logger.every=1"]
    main.execute(compose([*SMALLEST, *options]), Env(0, 1, 0, False))
    return weights(folder / "plain")


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a) and a.keys() == b.keys()


def warnings(text):
    return [line for line in text.splitlines() if line.startswith("geon: warning:")]


def complete(folder):
    """Whether metrics.jsonl has one row of each step, and the report is there."""
    steps = [row["step"] for row in metrics(folder, "train")]
    return steps == list(range(1, STEPS + 1)) and (folder / "report.json").exists()


def children():
    """(pid, name) of the processes that this one started."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, rest = re.fullmatch(r"\d+ \((.*)\) (.*)", stat.read_text().strip()).groups()
        except OSError:
            continue
        if int(rest.split()[1]) == os.getpid():
            yield int(stat.parent.name), name


@pytest.fixture
def silent(monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)


def test_weights_and_biases_out_of_reach_is_kept_offline(run, plain, silent, monkeypatch, capsys):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        folder = run("away", "logger=wandb", "logger.wandb_mode=online")
    (said,) = warnings(capsys.readouterr().err)
    assert "cannot be reached" in said and "wandb sync" in said
    assert complete(folder) and same(weights(folder), plain)
    (kept,) = folder.glob("wandb/offline-run-*/*.wandb")
    assert kept.stat().st_size > 500


def test_a_killed_process_of_weights_and_biases_is_told_once(run, plain, silent, capsys):
    def kill(trainer):
        for pid, name in children():
            if name.startswith("wandb-core"):
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
        time.sleep(0.2)

    killed = []
    folder = run("killed", "logger=wandb", do=kill)
    assert killed
    (said,) = warnings(capsys.readouterr().err)
    assert re.search("Weights & Biases failed at step [345] ", said), said
    assert complete(folder) and same(weights(folder), plain)


class Stuck:
    """A run of Weights & Biases whose end never comes."""

    step = starting_step = 0

    def __init__(self):
        self.rows, self.given, self.axes = [], {}, {}

    def log(self, row, step):
        self.rows.append((step, row))

    def define_metric(self, name, **options):
        self.axes[name] = options.get("step_metric")

    def finish(self):
        threading.Event().wait()


@pytest.fixture
def stub(monkeypatch, silent):
    """Stands for the package where only our side of it is looked at."""

    class Package:
        Settings = type("Settings", (), {"model_fields": {}})
        run = Stuck()
        teardown = threading.Event().wait

        @classmethod
        def init(cls, **given):
            cls.run.given = given
            return cls.run

    monkeypatch.setitem(sys.modules, "wandb", Package)
    return Package


def test_waits_for_weights_and_biases_are_bounded(tmp_path, stub, monkeypatch, capsys):
    monkeypatch.setattr(trackers, "FINISH_SECONDS", -4.7)
    monkeypatch.setattr(trackers, "LEAVE_SECONDS", 0.3)
    monkeypatch.setattr(trackers, "OPEN_SECONDS", 0.3)
    config = LoggerConfig(wandb=True)
    begin = time.monotonic()
    for logger in open_loggers(tmp_path, config, "name", {}, "id", 0):
        logger.close()
    assert "could not be closed (TimeoutError" in capsys.readouterr().err
    monkeypatch.setattr(stub, "init", lambda **given: threading.Event().wait())
    assert len(open_loggers(tmp_path, config, "name", {}, "id", 0)) == 1
    assert "opening Weights & Biases took more than" in capsys.readouterr().err
    assert time.monotonic() - begin < 3
    assert trackers.OPEN_SECONDS <= 15 and trackers.FINISH_SECONDS <= 30


def test_weights_and_biases_knows_a_run_by_its_id_and_shows_no_step_twice(tmp_path, stub):
    stub.run.starting_step = 3  # what lies there of an earlier stretch is 0, 1 and 2
    stub.run.finish = stub.teardown = lambda: None
    _, logger = open_loggers(tmp_path, LoggerConfig(wandb=True), "name", {}, "5eed", 2)
    assert (stub.run.given["id"], stub.run.given["name"]) == ("5eed", "name")
    for step in (2, 3, 4):
        logger.write({"kind": "train", "step": step, "loss": 1.0})
    assert [step for step, _ in stub.run.rows] == [3, 4]
    logger.close()


def events(folder, tag):
    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return [event.step for event in found.Scalars(tag)]


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    config = LoggerConfig(tensorboard=True)
    for behind, steps in ((0, range(1, 7)), (3, range(4, 9))):  # dies after 6, goes on from 3
        opened = open_loggers(tmp_path, config, "name", {}, "id", behind)
        opened[1].write({"kind": "start", "step": behind, "parameters": 5})
        for step in steps:
            opened[1].write({"kind": "train", "step": step, "loss": 1.0})
        opened[1].close()
    assert events(tmp_path, "train/loss") == list(range(1, 9))


def test_a_dead_writer_of_tensorboard_is_told_once(run, plain, capsys):
    def break_writer(trainer):
        inside = trainer.loggers[1]._logger._writer.file_writer.event_writer._async_writer

        def full(data):
            raise OSError(errno.ENOSPC, "No space left on device")

        inside._writer.write = full

    folder = run("full", "logger=tensorboard", do=break_writer)
    err = capsys.readouterr().err
    (said,) = warnings(err)
    assert "TensorBoard failed at step" in said and "No space left" in said
    assert "Traceback" not in err
    assert complete(folder) and same(weights(folder), plain)


def test_tensorboard_that_cannot_be_opened_is_left_out(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    assert len(open_loggers(tmp_path, LoggerConfig(tensorboard=True), "n", {}, "id", 0)) == 1
    (said,) = warnings(capsys.readouterr().err)
    assert "TensorBoard cannot be opened" in said


class Disk:
    """`os.write` on a disk with so many bytes left."""

    def __init__(self, free):
        self.free, self._write = free, os.write

    def __call__(self, file, data):
        taken = min(len(data), self.free)
        if data and not taken:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.free -= taken
        return self._write(file, data[:taken])


@pytest.mark.parametrize("free", [0, 1, 40, 700])
def test_a_full_disk_costs_no_row_that_fits_later(run, plain, monkeypatch, capsys, free):
    disk = Disk(1 << 30)
    monkeypatch.setattr(os, "write", disk)

    def fill(trainer):
        disk.free = free

    def clear(trainer):
        seen.append((trainer.folder / "metrics.jsonl").read_text())
        disk.free = 1 << 30

    seen = []
    made = main._callbacks
    monkeypatch.setattr(main, "_callbacks", lambda config: [At(6, clear), *made(config)])
    folder = run("full", do=fill)
    (first, second) = warnings(capsys.readouterr().err)
    assert "cannot be written" in first and "is written again" in second
    assert seen[0].endswith("}\n") and all(json.loads(row) for row in seen[0].splitlines())
    assert complete(folder) and same(weights(folder), plain)


def test_a_disk_that_stays_full_is_told_at_the_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loggers, "ROWS_KEPT", 3)
    logger = Jsonl(tmp_path)
    logger.write({"kind": "train", "step": 1})
    monkeypatch.setattr(os, "write", Disk(5))
    for step in range(2, 8):
        logger.write({"kind": "train", "step": step})
    assert len(logger._waiting) == 3
    logger.close()
    first, last = warnings(capsys.readouterr().err)
    assert "cannot be written (OSError: 5 of" in first and "from step 2 on" in first
    assert "lacks 6 rows from step 2 on" in last
    assert metrics(tmp_path, "train") == [{"kind": "train", "step": 1}]


def test_a_log_that_cannot_be_opened_is_tried_again(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").mkdir()
    logger = Jsonl(tmp_path)
    logger.write({"kind": "train", "step": 1})
    (tmp_path / "metrics.jsonl").rmdir()
    logger.write({"kind": "train", "step": 2})
    logger.close()
    first, second = warnings(capsys.readouterr().err)
    assert "cannot be written (IsADirectoryError" in first and "since step 1" in second
    assert [row["step"] for row in metrics(tmp_path, "train")] == [1, 2]


@pytest.mark.parametrize(("room", "fits"), [(28, 0), (100, 3), (29 * 4, 4), (10**6, 40)])
def test_a_limit_of_the_system_never_tears_a_line(tmp_path, room, fits):
    logger, before = Jsonl(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        for step in range(40):
            logger.write({"kind": "train", "step": step})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [row["step"] for row in metrics(tmp_path, "train")] == list(range(fits))
    logger.close()
    assert [row["step"] for row in metrics(tmp_path, "train")] == list(range(40))


def test_an_output_that_is_full_or_gone_ends_no_run(run, plain, monkeypatch):
    class Gone:
        def write(self, text):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

        flush = isatty = lambda self: None

    def leave(trainer):
        monkeypatch.setattr(sys, "stdout", Gone())

    folder = run("unheard", do=leave)
    assert complete(folder) and same(weights(folder), plain)


def test_the_report_is_written_where_no_picture_can_be(run, plain, monkeypatch, capsys):
    def broken(folder, facts):
        raise ImportError("No module named 'matplotlib'")

    monkeypatch.setattr(report, "draw", broken)
    folder = run("blind")
    (said,) = warnings(capsys.readouterr().err)
    assert "no pictures were drawn (ImportError" in said
    assert complete(folder) and same(weights(folder), plain)


@pytest.fixture
def server(silent, monkeypatch):
    one = Server()
    monkeypatch.setenv("WANDB_BASE_URL", one.url)
    yield one
    one.close()


def test_online_a_run_keeps_its_id_and_each_step_is_sent_once(tmp_path, server, capfd):
    config = LoggerConfig(wandb=True, wandb_mode="online")
    for behind, steps in ((0, range(1, 7)), (3, range(4, 10))):  # dies after 6, goes on from 3
        _, logger = open_loggers(tmp_path, config, "name", {}, "5eed", behind)
        logger.write({"kind": "start", "step": behind, "parameters": 5})
        for step in steps:
            logger.write({"kind": "train", "step": step, "loss": float(step)})
        logger.close()
    assert server.runs == {"5eed"}
    assert [row["_step"] for row in server.rows] == list(range(10))
    assert [row.get("train/loss") for row in server.rows] == [None, *range(1, 10)]
    assert not warnings(capfd.readouterr().err)


@pytest.mark.slow
def test_a_server_that_goes_away_costs_a_bounded_wait(run, plain, server, monkeypatch, capsys):
    monkeypatch.setattr(trackers, "FINISH_SECONDS", 4.0)
    begin = time.monotonic()
    options = ["logger=wandb", "logger.wandb_mode=online"]
    folder = run("cut", *options, do=lambda trainer: server.close())
    assert time.monotonic() - begin < 30
    assert complete(folder) and same(weights(folder), plain)
    (kept,) = folder.glob("wandb/run-*/*.wandb")  # what was not sent is on the disk
    assert kept.stat().st_size > 500


@pytest.mark.slow
def test_a_server_that_breaks_its_own_client_costs_only_its_curves(run, plain, server, capsys):
    """It answers each request with nothing: wandb-core 0.31 dies of it."""
    server.vague = True
    begin = time.monotonic()
    folder = run("vague", "logger=wandb", "logger.wandb_mode=online")
    assert time.monotonic() - begin < 60
    assert len(warnings(capsys.readouterr().err)) <= 1
    assert complete(folder) and same(weights(folder), plain)
