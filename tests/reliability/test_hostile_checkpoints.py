"""Checkpoints that somebody else made up: nothing in them runs, and nothing outside is read."""

import io
import json
import os
import pickle
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    Metadata,
)

from geon.engine import checkpoint, integrity
from geon.engine.integrity import Refused
from geon.engine.reading import TensorReader, _Unpickler
from geon.engine.writing import quiet
from geon.errors import UsageError
from geon.models import MODELS, ModelShape
from geon.scripts import generate, merge
from tests.reliability.checkpoints_job import run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return run(tmp_path_factory.mktemp("made"), "optim=adamw", "schedule.steps=2")


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run")


def newest(folder):
    return folder / "checkpoints" / "step-0000002"


def forge(path, name, data):
    """Replace a file, and make the digests fit: what one who knows the format would do."""
    (path / name).write_bytes(data)
    facts = json.loads((path / "commit.json").read_text())
    facts.pop("sha256")
    facts["files"] = {
        p.name: {"size": p.stat().st_size, "sha256": integrity._sha256(p)}
        for p in path.iterdir()
        if p.name != "commit.json"
    }
    (path / "commit.json").write_text(integrity.sealed(facts))


class Calls:
    """Pickles to a call of `function`."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def canaries(flag):
    """Six ways to create a file while being unpickled."""
    yield "os.system", Calls(os.system, f"touch {flag}")
    yield "eval", Calls(eval, f"open({str(flag)!r}, 'w')")
    yield "Path.touch", Calls(Path.touch, Path(flag))
    yield "subprocess", Calls(subprocess.check_call, ["touch", str(flag)])
    yield "torch.save", Calls(torch.save, torch.zeros(1), str(flag))
    yield "getattr", Calls(os.mkdir, str(flag))


@pytest.mark.row("R29")
@pytest.mark.parametrize("kind", range(6))
def test_canaries_in_the_index_do_not_run(folder, tmp_path, capsys, kind):
    """R29: by resume, generate and merge; each names what was refused."""
    name, call = list(canaries(tmp_path / "flag"))[kind]
    path = newest(folder)
    index = TensorReader(path).read_metadata()
    index.planner_data = call
    forge(path, ".metadata", pickle.dumps(index))
    with pytest.raises(UsageError, match="'.metadata' names .*: it was not run"):
        run(folder.parent, "optim=adamw", f"checkpoint.resume={folder}", name="other")
    with pytest.raises(UsageError, match="'.metadata' names .*: it was not run"):
        checkpoint.load_weights(path, model())
    assert generate.main([str(folder)]) == 2
    assert merge.main([str(folder), "--last", "1", "--out", str(tmp_path / "merged")]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "flag").exists(), name
    pickle.loads((path / ".metadata").read_bytes())  # the control: it does run elsewhere
    assert (tmp_path / "flag").exists(), name


def model():
    sizes = {"vocab_size": 64, "context": 32, "n_layer": 1, "n_head": 2, "d_model": 32}
    return MODELS["gpt"](ModelShape(**sizes))


@pytest.mark.row("R29")
def test_a_pickle_in_the_place_of_a_tensor_does_not_run(folder, tmp_path):
    """R29: torch reads entries with weights_only."""
    path = newest(folder)
    index = TensorReader(path).read_metadata()
    for place in index.storage_data.values():
        data = io.BytesIO()
        torch.save(Calls(open, str(tmp_path / "flag"), "w"), data)
        place.offset, place.length, file = 0, len(data.getvalue()), place.relative_path
    forge(path, file, data.getvalue())
    for other in {p.relative_path for p in index.storage_data.values()} - {file}:
        forge(path, other, data.getvalue())
    forge(path, ".metadata", pickle.dumps(index))
    with pytest.raises(UsageError, match="cannot be loaded"):
        checkpoint.load_weights(path, model())
    assert not (tmp_path / "flag").exists()


@pytest.mark.row("R29")
@pytest.mark.parametrize("aim", ["../other", "/etc/passwd", "..", ""])
def test_paths_out_of_the_folder_are_refused(folder, aim):
    """R29."""
    path = newest(folder)
    index = TensorReader(path).read_metadata()
    next(iter(index.storage_data.values())).relative_path = aim
    forge(path, ".metadata", pickle.dumps(index))
    assert "out of the folder" in integrity.sound(path)
    with pytest.raises(Refused, match="out of the folder"):
        checkpoint.load_weights(path, model())


@pytest.mark.row("R29")
def test_entries_that_are_no_tensors_are_refused(tmp_path):
    """R29: they would be unpickled."""
    with quiet():
        dcp.save({"a": torch.ones(2), "b": {"c": 1}}, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(Refused, match="BytesStorageMetadata"):
        TensorReader(tmp_path).read_metadata()
    assert BytesStorageMetadata.__name__ not in str(integrity.FIELDS)


@pytest.mark.row("R29")
@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"arch": "nope"}, "describes no model"),
        ({"arch": "gpt"}, "describes no model"),
        ({"n_layer": 10**9}, "more layers than"),
        ({"d_model": 2**50}, "beyond 2\\^40"),
        ({"d_model": "x"}, "describes no model"),
        ({"d_model": 64}, "of shape"),
        ({"unknown": 1}, "describes no model"),
    ],
)
def test_generate_refuses_models_that_do_not_fit(folder, capsys, model, words):
    """R29: one message, no traceback, no memory for what is not there."""
    path = newest(folder)
    facts = json.loads((path / "commit.json").read_text())
    facts.pop("sha256")
    whole = {"arch": model["arch"]} if "arch" in model else facts["model"] | model
    facts |= {"model": whole, "codec": "bytes"}
    (path / "commit.json").write_text(integrity.sealed(facts))
    assert generate.main([str(folder), "--tokens", "1"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("geon: error: ")
    assert re.search(words, said), said


def test_generate_refuses_a_garbled_tokenizer(folder, capsys):
    path = newest(folder)
    facts = json.loads((path / "commit.json").read_text())
    facts.pop("sha256")
    (path / "commit.json").write_text(integrity.sealed(facts | {"codec": "{}"}))
    assert generate.main([str(folder), "--tokens", "1"]) == 2
    assert "holds no tokenizer that can be read" in capsys.readouterr().err


@pytest.mark.row("R29")
def test_members_of_the_one_enum_are_read_as_any_python_pickles_them():
    """Python before 3.11.4 pickles them by getattr, which gets at nothing else here."""
    for call in (
        Calls(getattr, _MEM_FORMAT_ENCODING, "TORCH_CHANNELS_LAST"),
        Calls(_MEM_FORMAT_ENCODING, 1),
    ):
        found = _Unpickler(io.BytesIO(pickle.dumps(call))).load()
        assert found is _MEM_FORMAT_ENCODING.TORCH_CHANNELS_LAST
    for asked in ((_MEM_FORMAT_ENCODING, "mro"), (Metadata, "__init__"), (torch.Size, "numel")):
        with pytest.raises(Refused, match="asks for an attribute"):
            _Unpickler(io.BytesIO(pickle.dumps(Calls(getattr, *asked)))).load()
