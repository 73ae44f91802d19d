"""One exit status for one kind of end, whatever command it is (docs/reliability.md)."""

import errno
import re
import subprocess
import sys
from pathlib import Path

import pytest

from geon.errors import OutOfMemory, Preempted, RankLost, SaveError, UsageError
from geon.launch import leave, signals
from geon.scripts import merge, plot
from geon.studies import first_run_report, theory_plots

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("launch", "scripts", "benches", "studies")
COMMANDS = sorted(
    file.relative_to(ROOT).as_posix()
    for file in (ROOT / "train.py", *(f for room in ROOMS for f in (ROOT / room).glob("*.py")))
    if re.search(r'^if __name__ == "__main__":', file.read_text(), re.MULTILINE)
)
ENDS = {
    0: [None],
    1: [OutOfMemory, SaveError, RankLost, FloatingPointError, OSError(errno.ENOSPC, "full")],
    2: [UsageError],
    75: [Preempted],
    130: [KeyboardInterrupt],
}
"""Status -> what ends a command with it."""


@pytest.mark.parametrize(("status", "ends"), ENDS.items())
def test_a_kind_of_end_has_one_status(status, ends, monkeypatch, capsys):
    monkeypatch.setattr(signals, "remember_bad_input", lambda: None)
    for end in ends:

        def act(end=end):
            if end is not None:
                raise end if isinstance(end, OSError) else end("why")

        assert leave.guard(act) == status
    said = capsys.readouterr().err
    assert ("why" in said) == (status in (1, 2, 75))
    assert "Traceback" not in said


def test_the_table_lists_the_statuses_of_guard():
    table = (ROOT / "docs" / "reliability.md").read_text()
    assert {int(row) for row in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)} == set(ENDS)


def test_there_are_commands_of_every_room():
    assert {name.split("/")[0] for name in COMMANDS} == {"train.py", *ROOMS}
    assert len(COMMANDS) > 35


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_ends_by_guard(name):
    text = (ROOT / ("geon/train.py" if name == "train.py" else name)).read_text()
    body = text[text.index('if __name__ == "__main__":') :]
    main = re.search(r"^def main\(.*?(?=^\S|\Z)", text, re.MULTILINE | re.DOTALL)
    assert "guard(" in body or main and "guard(" in main.group(), name
    assert not re.search(r"sys\.exit\((?!main|guard|0\))", body)


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (plot.main, ["nowhere"]),
        (merge.main, ["nowhere", "--out", "new"]),
        (first_run_report.main, ["nowhere"]),
        (theory_plots.main, ["--pairs", "a=nowhere"]),
    ],
)
def test_a_folder_that_is_not_there_is_bad_input(command, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert leave.guard(lambda: command(arguments)) == 2
    assert "nowhere" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_bad_key_is_2_from_every_launcher(tmp_path):
    for module in ("geon.launch.sweep", "geon.launch.slurm"):
        line = [sys.executable, "-m", module, "optim.lrr=1"]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        assert "optim.lrr" in done.stderr
        assert "Traceback" not in done.stderr
