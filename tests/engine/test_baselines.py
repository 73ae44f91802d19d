"""Baselines in whole runs: curvature for Sophia, and what is refused."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from geon.engine import checkpoint, curvature
from geon.engine.build import build, make_batches, make_corpus, make_model, make_routing
from geon.engine.parallel import start
from geon.engine.trainer import Trainer
from geon.launch.compose import compose
from geon.launch.env import Env
from tests.distributed.jobs import train
from tests.launch.jobs import SMALLEST

SINGLE = [*SMALLEST, "parallel=single", "checkpoint=none"]


def trainer_of(*options):
    config = compose([*SINGLE, *options])
    corpus, model = make_corpus(config.data, 0), make_model(config.model)
    routing = make_routing(model, config.optim)
    parallel = start(config.parallel, config.device, Env(rank=0, world=1))
    batches = make_batches(config, corpus, 0, 1)
    run = build(config, parallel, corpus, batches, model, routing)
    return Trainer(run, None, [])


def test_curvature_is_on_average_the_diagonal_of_the_gauss_newton_matrix():
    """Beside the exact diagonal of the head: mean over tokens of x^2 (p - p^2)."""
    trainer = trainer_of("optim=sophia", "model.vocab_size=64", "data.batch_tokens=256")
    run, rules = trainer.run, trainer.run.optimizer.rules
    found, head = [], run.model.head.weight
    micros = run.batches.step(0)
    run.batches = SimpleNamespace(step=lambda _: micros)
    for step in range(300):
        trainer.step = 10 * step
        curvature.Curvature().before_update(trainer)
        found.append(rules["head"].curvature[head])
    assert {id(p) for rule in rules.values() for p in rule.curvature} == {
        id(p) for p in run.model.parameters()
    }
    tokens = micros[0][0]
    x = run.model.hidden(tokens).flatten(0, 1).detach()
    p = F.softmax(F.linear(x, head.detach()), -1)
    exact = (p - p.square()).mT @ x.square() / len(x)
    error = torch.stack(found).mean(0) / exact - 1.0
    # Each entry has a relative deviation of about sqrt(2); the mean of 300, 0.08.
    assert error.mean().abs() < 0.02
    assert error.square().mean().sqrt() < 0.12


def test_curvature_is_estimated_at_every_tenth_step_and_used_once():
    trainer = trainer_of("optim=sophia")
    rules = trainer.run.optimizer.rules.values()
    for step in (0, 1, 9, 10, 11):
        trainer.step = step
        curvature.Curvature().before_update(trainer)
        assert all((rule.curvature is not None) == (step in (0, 10)) for rule in rules)
        for param in trainer.run.model.parameters():
            param.grad = torch.ones_like(param)
        trainer.run.optimizer.step()
        assert all(rule.curvature is None for rule in rules)


@pytest.mark.dist
@pytest.mark.parametrize("optim", ["sophia", pytest.param("soap", marks=pytest.mark.slow)])
def test_a_run_on_two_ranks_with_copies_goes_on(tmp_path, optim):
    told = [f"optim={optim}", "parallel=ddp", "schedule.steps=12"]
    folder = train(tmp_path, "run", 2, *told)
    assert (folder / "report.json").is_file()
    train(tmp_path, "run", 2, *told, "schedule.steps=14")
    assert checkpoint.read_commit(checkpoint.find(folder))["step"] == 14


def test_cut_parameters_are_refused(tmp_path):
    done = train(tmp_path, "run", 1, "optim=lion", "parallel=fsdp", ok=False)
    assert done.returncode == 2
    assert "optim.hidden.rule=baseline ('lion') under parallel.layout=fsdp" in done.stderr
