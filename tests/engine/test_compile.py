"""A compiled run: how often it is compiled, that it trains as an eager one, what it says."""

import gc
import shutil

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from geon.configs.schema import Layouts, ParallelConfig
from geon.engine.evaluate import evaluate
from geon.engine.main import execute
from geon.engine.parallel import Parallel
from geon.engine.trainer import collected_seldom
from geon.errors import UsageError
from geon.launch.compose import compose
from geon.launch.env import Env
from tests.distributed.jobs import metrics, train
from tests.engine.test_baselines import trainer_of
from tests.launch.jobs import SMALLEST


@pytest.fixture
def graphs(monkeypatch):
    """Graphs that torch.compile finds; they run by AOT autograd, without a compiler."""
    found, compiled = [], torch.compile

    def backend(graph, inputs):
        found.append(torch.is_grad_enabled())
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    monkeypatch.setattr(
        torch, "compile", lambda of, **options: compiled(of, backend=backend, **options)
    )
    yield found
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["parallel.activation_checkpointing=true", "parallel.loss_chunks=2", "model=gpt2"],
        ["model=gpt_track3", "parallel.loss_chunks=2"],
    ],
)
def test_training_and_evaluation_are_compiled_once_each(tmp_path, graphs, capsys, more):
    (tmp_path / "a.txt").write_text("".join(f"{i} squared is {i * i}.\n" for i in range(2000)))
    options = [*SMALLEST, "data=text", f"data.path={tmp_path / 'a.txt'}", "data.vocab_size=256"]
    options += ["parallel=single", "data.micro_batch=4", "schedule.steps=50", "data.tokens=0"]
    options += ["schedule.warmup=0.2", "eval.every=20", "data.val_tokens=352", "eval.batch=4"]
    options += ["eval.sample_tokens=5", "logger.spectrum_every=25", "checkpoint.every=30"]
    options += ["logger.every=5", f"output={tmp_path}", *more]
    for name, on in (("eager", "false"), ("compiled", "true")):
        execute(compose([*options, f"name={name}", f"parallel.compile={on}"]), Env())
    assert graphs == [True, False]
    eager, compiled = (tmp_path / name for name in ("eager", "compiled"))
    for kind, key in (("train", "loss"), ("eval", "val_nats_per_token")):
        a, b = ([row[key] for row in metrics(of, kind)] for of in (eager, compiled))
        assert b == pytest.approx(a, abs=1e-5)
    assert len({row["lr_fraction"] for row in metrics(compiled, "train")}) > 5
    said = capsys.readouterr().out
    assert said.count("compiling the model (parallel.compile=false trains without)") == 1
    assert said.count("compiled, and the first gradients found, in") == 1


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
@pytest.mark.parametrize(
    ("layout", "ranks"), [("ddp", 2), ("fsdp", 2), ("hsdp", 4), ("tp", 2), ("fsdp_tp", 4)]
)
def test_compiled_ranks_train_as_eager_ones(tmp_path, layout, ranks):
    options = [f"parallel={layout}", "optim=muon", "eval.every=7", "logger.every=1"]
    options += ["data.micro_batch=8", "parallel.activation_checkpointing=true"]
    runs = [
        train(tmp_path, f"compile_{on}", ranks, *options, f"parallel.compile={on}")
        for on in ("false", "true")
    ]
    for kind, key in (("train", "loss"), ("eval", "val_nats_per_token")):
        eager, compiled = ([row[key] for row in metrics(run, kind)] for run in runs)
        assert compiled == pytest.approx(eager, abs=1e-5)


def test_every_evaluation_batch_has_one_shape_and_padding_does_not_count():
    """11 windows in batches of 4, beside torch's cross-entropy of each window."""
    trainer = trainer_of("optim=muon", "data.micro_batch=4")
    run, seen = trainer.run, []
    loss = run.parallel.loss
    run.parallel.loss = lambda x, y: seen.append((x.shape, y.shape)) or loss(x, y)
    with torch.no_grad():
        torch.nn.init.normal_(run.model.head.weight)
    found = evaluate(run.parallel, run.corpus, 32, 352, 4)
    assert seen == [((4, 32), (4, 32))] * 3
    tokens = torch.from_numpy(run.corpus.val.window(0, 353).astype("int64"))
    with torch.no_grad():
        logits = run.model(tokens[:-1].view(11, 32)).flatten(0, 1).double()
    wanted = torch.nn.functional.cross_entropy(logits, tokens[1:])
    assert found.tokens == 352
    assert found.nats_per_token == pytest.approx(wanted.item(), rel=1e-6)
    seen.clear()
    evaluate(run.parallel, run.corpus, 32, 64, 4)
    assert seen == [((2, 32), (2, 32))]


def test_deepspeed_refuses_to_be_compiled(tmp_path):
    options = [*SMALLEST, "parallel=deepspeed_z1", "optim=muon", "optim.max_norm=0"]
    options += ["parallel.compile=true", f"output={tmp_path}"]
    with pytest.raises(UsageError, match=r"parallel\.compile=true with parallel=deepspeed"):
        execute(compose(options), Env())


@pytest.mark.parametrize("layout", list(Layouts))
def test_null_compiles_on_a_gpu_where_the_layout_can(layout):
    def compiles(device, chosen=None):
        config = ParallelConfig(layout, compile=chosen)
        return Parallel(config, Env(), torch.device(device)).compiles

    assert not compiles("cpu")
    assert compiles("cuda") is (layout is not Layouts.deepspeed)
    assert not compiles("cuda", False)
    assert compiles("cpu", True)


def test_garbage_is_collected_again_after_training_even_when_that_fails():
    with pytest.raises(RuntimeError, match="in training"), collected_seldom():
        assert not gc.isenabled()
        raise RuntimeError("in training")
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    gc.disable()
    try:
        with collected_seldom():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
