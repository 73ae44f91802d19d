import io
import sys

import pytest
from tqdm import tqdm

from geon.configs.choices import Outcome
from geon.configs.schema import LoggerConfig
from geon.engine import trackers
from geon.engine.console import Console
from geon.engine.loggers import open_loggers
from geon.engine.main import execute
from geon.engine.runfolder import objective
from geon.errors import UsageError
from geon.launch.compose import compose
from geon.launch.env import Env
from tests.launch.jobs import SMALLEST


def test_what_is_printed_before_and_after_there_is_a_folder_is_in_the_log(tmp_path, capsys):
    with Console(True) as console:
        print("before")
        console.keep(tmp_path)
        print("after", end="")
        print("!", file=sys.stderr)
        sys.stdout.write("cut")
    print("beyond")
    assert (tmp_path / "train.log").read_text() == "before\n!\naftercut\n"
    told = capsys.readouterr()
    assert (told.out, told.err) == ("before\naftercutbeyond\n", "!\n"), "the console has it all"


def test_of_a_bar_the_last_state_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Console(True) as console:
        console.keep(tmp_path)
        for _ in tqdm(range(50), mininterval=0):
            pass
    (line,) = (tmp_path / "train.log").read_text().splitlines()
    assert "50/50" in line and sys.stderr.getvalue().count("\r") > 2


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path, capsys):
    (tmp_path / "train.log").mkdir()
    with Console(True) as console:
        console.keep(tmp_path)
        print("said")
    assert capsys.readouterr().out == "said\n"
    stream = sys.stdout
    with Console(False):
        assert sys.stdout is stream, "other ranks copy nothing"


def test_a_run_keeps_its_words_its_log_and_its_objective(tmp_path, capsys):
    words = [*SMALLEST, "parallel=single", f"output={tmp_path}", "logger.progress=false"]
    words += ["eval.every=1", "schedule.steps=3", "optim=adamw", "eval.objective=best"]
    found = execute(compose(words), Env(), words)
    out, folder = capsys.readouterr().out, tmp_path / "run"
    log = (folder / "train.log").read_text()
    assert log == out, "all that the console showed"
    assert [line.split()[1] for line in log.splitlines() if "validation loss" in line] == [
        "1:", "2:", "3:"
    ]  # fmt: skip
    assert (folder / "overrides.txt").read_text().splitlines() == words
    assert found == objective(folder, Outcome.best) <= objective(folder, Outcome.last)
    again = execute(compose(words), Env(), words)
    assert again == found and "nothing was trained" in capsys.readouterr().out


def test_the_objective_is_of_bytes_where_they_are_known(tmp_path):
    rows = ['{"kind": "eval", "step": %d, "val_nats_per_token": 9.0, "val_nats_per_byte": %s}\n']
    values = {2: "1.5", 1: "1.25", 3: "1.75"}
    (tmp_path / "metrics.jsonl").write_text("".join(rows[0] % pair for pair in values.items()))
    assert objective(tmp_path, Outcome.last) == 1.75
    assert objective(tmp_path, Outcome.best) == 1.25


class Package:
    """Stands for wandb: keeps what it is given."""

    Settings = type("Settings", (), {"model_fields": {}})
    teardown = staticmethod(lambda: None)

    def __init__(self):
        self.rows, self.axes, self.starting_step = [], {}, 0

    def init(self, **given):
        self.given = given
        return self

    def log(self, row, step):
        self.rows.append((step, row))

    def define_metric(self, name, step_metric=None):
        self.axes[name] = step_metric

    def finish(self):
        pass


def test_wandb_is_told_whose_run_it_is_and_what_curves_are_drawn_over(tmp_path, monkeypatch):
    package = Package()
    monkeypatch.setitem(sys.modules, "wandb", package)
    config = LoggerConfig(
        wandb=True, wandb_entity="team", wandb_group="seeds", wandb_tags=["a", "b"]
    )
    _, logger = open_loggers(tmp_path, config, "name", {}, "id7", 0)
    logger.write({"kind": "train", "step": 2, "loss": 1.0, "tokens": 512})
    logger.write({"kind": "eval", "step": 2, "val_nats_per_token": 3.0, "tokens": 512})
    logger.close()
    told = {key: package.given[key] for key in ("project", "entity", "group", "tags", "id", "mode")}
    assert told == {"project": "geon", "entity": "team", "group": "seeds", "tags": ["a", "b"],
                    "id": "id7", "mode": "offline"}  # fmt: skip
    assert package.axes == {"step": None, "tokens": None, "train/*": "step", "eval/*": "step"}
    assert package.rows[0] == (2, {"train/loss": 1.0, "train/tokens": 512, "train/step": 2,
                                   "step": 2, "tokens": 512})  # fmt: skip


def test_an_agent_of_wandb_says_itself_which_run_it_is(tmp_path, monkeypatch):
    package = Package()
    monkeypatch.setitem(sys.modules, "wandb", package)
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    monkeypatch.setenv("WANDB_RUN_ID", "ab12")
    open_loggers(tmp_path, LoggerConfig(wandb=True), "name", {}, "id7", 0)[1].close()
    assert not {"project", "entity", "id"} & set(package.given) and package.given["name"] == "name"


@pytest.mark.parametrize("known", ["", "environment", "netrc"])
def test_a_missing_key_is_one_line_before_there_is_a_folder(tmp_path, monkeypatch, known):
    settings = type("Settings", (), {"base_url": "https://api.wandb.ai", "api_key": None})
    if known == "environment":
        settings.api_key = "k"
    monkeypatch.setitem(sys.modules, "wandb", type("P", (), {}))
    sys.modules["wandb"].setup = lambda: type("S", (), {"settings": settings})
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    if known == "netrc":
        (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password k\n")
    config = LoggerConfig(wandb=True, wandb_mode="online")
    if known:
        trackers.check_key(config)
    else:
        with pytest.raises(UsageError, match="set WANDB_API_KEY, or type `wandb login`"):
            trackers.check_key(config)
    trackers.check_key(LoggerConfig(wandb=True))
