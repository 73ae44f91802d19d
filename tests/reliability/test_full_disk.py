"""R19: a disk that is full while the small files of a run folder are written is one line."""

import errno

import pytest

from geon.engine import opening, report
from geon.launch.leave import guard
from tests.reliability.identity_job import report as facts
from tests.reliability.identity_job import train

pytestmark = pytest.mark.row("R19")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (opening.history, "name"),  # run.json
        (opening.history, "append"),  # history.jsonl
        (opening, "_write_config"),  # config.yaml
        (opening, "write_json"),  # plan.json
        (opening.runfolder, "report_aside"),  # after the first step
        (report, "write_json"),  # report.json
    ],
)
def test_small_files_on_a_full_disk(tmp_path, monkeypatch, capsys, module, name):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "/disk/file")

    with monkeypatch.context() as patch:
        patch.setattr(module, name, full)
        assert guard(lambda: train(tmp_path) and None) == 1
    told = capsys.readouterr().err
    assert "geon: error: [Errno 28] No space left on device: '/disk/file'\n" in told
    assert "Traceback" not in told
    assert facts(train(tmp_path))["steps"] == 8
