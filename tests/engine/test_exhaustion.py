"""Running out of memory: one message, on the rank that does, and nobody waits for it."""

import time

import pytest
import torch

from geon.engine.exhaustion import explained
from geon.engine.fitting import choose
from geon.engine.metrics import PeakMemory
from geon.engine.planning import plan_ahead
from geon.errors import OutOfMemory
from geon.launch.compose import compose
from geon.launch.env import under_launcher
from geon.launch.leave import guard
from geon.launch.local import ROOT, torchrun_command
from tests.distributed.jobs import TINY, launch

GPU = "CUDA out of memory. Tried to allocate 12.28 GiB. GPU 0 has a total capacity of 79.18 GiB"
CPU = "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"


def predicted():
    from geon.engine.build import make_model, make_routing

    config = compose([*TINY, "parallel=single"])
    model = make_model(config.model)
    routing = make_routing(model, config.optim)
    plan = plan_ahead(config, model, routing, 1)
    return config, choose(config, model, routing, plan, 1, "cpu", 1e18)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(GPU), RuntimeError(CPU)])
def test_the_message_tells_what_was_asked_predicted_and_what_to_try(error):
    config, found = predicted()
    with pytest.raises(OutOfMemory) as told, explained(config, found, 3):
        raise error
    words = str(told.value)
    assert words.startswith(f"rank 3 ran out of memory in training: {error}\n")
    assert found.table() in words
    keys = ["data.micro_batch lower (now 32)", "activation_checkpointing", "loss_chunks", "=fsdp"]
    order = [words.index(key) for key in keys]
    assert order == sorted(order)
    ways = r"eval.batch lower \(now 64\), parallel.loss_chunks"
    with pytest.raises(OutOfMemory, match=ways), explained(config, found, 0, "evaluation"):
        raise error


def test_one_that_the_exchange_has_told_of_is_found_and_others_pass():
    config, found = predicted()
    with pytest.raises(OutOfMemory), explained(config, found, 0):
        raise RuntimeError("a collective failed") from torch.OutOfMemoryError(GPU)
    with pytest.raises(RuntimeError, match="shapes"), explained(config, found, 0):
        raise RuntimeError("shapes do not match")


def test_a_real_allocation_that_fails_is_one_message_and_status_1(capsys):
    config, found = predicted()

    def action():
        with explained(config, found, 0):
            torch.empty(2**60, dtype=torch.uint8)

    assert not under_launcher()
    assert guard(action) == 1
    told = capsys.readouterr().err
    assert told.startswith("geon: error: rank 0 ran out of memory in training: ")
    assert "Traceback" not in told


@pytest.mark.dist
def test_other_ranks_do_not_wait_for_the_one_that_has_none(tmp_path):
    program = ROOT / "tests" / "engine" / "exhaustion_job.py"
    options = [*TINY, "parallel=ddp", "optim=muon", f"output={tmp_path}"]
    begin = time.monotonic()
    done = launch(torchrun_command(2, options, program), timeout=100)
    assert time.monotonic() - begin < 60
    assert done.returncode != 0
    assert done.stderr.count("ran out of memory") == 1
    assert "geon: error: rank 1 ran out of memory in training: CUDA out of memory" in done.stderr
    assert "data.micro_batch lower (now 16)" in done.stderr


def test_the_peak_of_a_process_is_at_least_what_it_holds():
    peak = PeakMemory(torch.device("cpu"))
    before = peak.read()
    held = torch.ones(2**26)  # 256 MiB
    after = peak.read()
    assert after >= before + 0.5 * held.nbytes or before > 2**30
    assert peak.training == after >= held.nbytes


def test_an_evaluation_has_a_peak_of_its_own(monkeypatch):
    """The counter of a GPU, played: it grows to the largest since it was reset."""
    counter = [0]
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: counter[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: counter.__setitem__(0, 1))
    peak = PeakMemory(torch.device("cuda", 0))
    counter[0] = 50  # training
    peak.pause()
    counter[0] = 90  # evaluation
    assert peak.set_aside() == 90
    counter[0] = 40
    assert peak.read() == 50
    counter[0] = 30
    assert peak.read() == 30
    assert peak.training == 50
