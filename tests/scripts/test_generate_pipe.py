"""generate into a pipe that nobody reads on."""

import subprocess
import sys

from geon.data import ByteCodec
from geon.launch.local import ROOT
from geon.models import MODELS, ModelShape

PROGRAM = """
import sys
from geon.scripts import generate
from tests.scripts.test_generate_pipe import loaded
generate.load = loaded
sys.stdin.read()  # until the reader is gone
sys.exit(generate.main(["run", "--tokens", "2", "--device", "cpu"]))
"""


def loaded(path, device):
    """A model of one block that reads bytes."""
    return MODELS["gpt"](ModelShape(256, 16, 1, 1, 16)).eval(), ByteCodec()


def test_a_closed_pipe_ends_without_a_traceback():
    job = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    job.stdout.close()
    job.stdin.close()
    said = job.stderr.read()
    assert job.wait(60) == 0, said
    assert "BrokenPipeError" not in said
