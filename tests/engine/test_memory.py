"""Predicted bytes beside what is really held, and the micro-batch that follows from them."""

from types import SimpleNamespace

import pytest
import torch

from geon.engine import fitting, memory
from geon.engine.build import build, make_batches, make_corpus, make_model, make_routing
from geon.engine.parallel import Parallel, start
from geon.engine.planning import plan_ahead
from geon.engine.trainer import Trainer
from geon.errors import UsageError
from geon.launch.compose import compose
from geon.launch.env import Env
from geon.launch.local import ROOT
from geon.models import MODELS
from tests.distributed.jobs import TINY, by_rank
from tests.engine.memory_counts import saved_bytes, step_peaks

SMALL = [
    *TINY,
    "data.vocab_size=1024",
    "model.n_layer=3",
    "model.n_head=4",
    "model.d_model=128",
    "parallel=single",
    "parallel.compile=false",
]


STEPS = ["model.d_model=256", "data.batch_tokens=512"]
"""Sizes of which the optimizer's step takes most memory."""


def job(*options, device="cpu"):
    """A trainer, and what is predicted of it."""
    config = compose([*SMALL, *options, f"device={device}"])
    corpus, model = make_corpus(config.data, 0), make_model(config.model)
    routing = make_routing(model, config.optim)
    batches = make_batches(config, corpus, 0, 1)
    parallel = start(config.parallel, device, Env())
    sizes = batches.micro, config.parallel.loss_chunks or 1
    plan = plan_ahead(config, model, routing, 1)
    found = memory.predict(config, model, routing, plan, 1, device, *sizes)
    return Trainer(build(config, parallel, corpus, batches, model, routing), None, []), found


ARITHMETIC = [
    (arch, precision, again)
    for arch in MODELS
    for precision in ("fp32", "bf16")
    for again in ("true", "false")
]


def more(arch):
    """Options that change what is kept, of those that an architecture has."""
    has = MODELS[arch].shape_type.defaults()
    found = [[], ["model.fused_qkv=true", "model.d_model=64"] if "fused_qkv" in has else None]
    found += [["model.residual=scaled"], ["model.norm=none"]] if "residual" in has else []
    grouped = ["model.options.n_kv_head=2", "model.options.qk_norm=true"]
    found += [grouped] if "n_kv_head" in has else []
    return [options for options in found if options is not None]


@pytest.mark.parametrize(
    ("arch", "precision", "again", "more"),
    [(*one, options) for one in ARITHMETIC for options in more(one[0])],
)
def test_what_autograd_saves_is_what_was_predicted(arch, precision, again, more):
    options = [f"model={arch}", f"parallel.precision={precision}", "optim=adamw"]
    trainer, found = job(*options, f"parallel.activation_checkpointing={again}", *more)
    run = trainer.run
    tokens, targets = run.batches.step(0)[0]
    with saved_bytes(run.model) as saved:
        run.parallel.loss(tokens, targets)
    parts = found.phases["loss"]
    kept = parts["activations"] + (parts["weight copies"] if again == "false" else 0)
    # The head's gradient, and the tokens, which the embedding keeps, are other parts.
    others = run.model.head_weight.nbytes + tokens.nbytes
    assert sum(saved.values()) - others == pytest.approx(kept, rel=0.03)


@pytest.mark.parametrize(
    "options",
    [
        ["model=gpt", "optim=muon"],
        ["model=gpt2", "optim=adamw", "optim.max_norm=0", "parallel.precision=bf16"],
        ["model=gpt", "optim=hybrid", "parallel.precision=bf16", "model.softcap=15"],
        ["model=gpt", "optim=normuon", "optim.momentum_dtype=bf16", "data.micro_batch=4"],
        ["model=gpt", "optim=manifold_muon", "data.micro_batch=1", "model.gains=true"],
        ["model=gpt2", "optim=muon", "parallel.activation_checkpointing=true"],
        ["model=gpt", "optim=muon", "model.softcap=15", "parallel.loss_chunks=8"],
        ["model=gpt_track3", "optim=muon", "parallel.precision=bf16"],
        ["model=gpt", "model.tied=true", "optim=scion", "data.micro_batch=1"],
        ["optim=muonh", *STEPS],
        ["optim=spectral_sphere", *STEPS],
        ["optim=hyperspherical", *STEPS],
        ["optim=signsgd", *STEPS],
    ],
)
def test_the_peak_of_a_step_is_the_predicted_one(options):
    """Every storage that lives is counted, as a GPU's allocator would; phases are told apart."""
    trainer, found = job(*options)
    run = trainer.run
    peaks = step_peaks(trainer)
    totals = found.totals
    training = max(totals[phase] for phase in memory.PHASES[:4])
    assert peaks[0] == pytest.approx(training, rel=0.1)
    assert peaks[1] == pytest.approx(totals["step"], rel=0.15)
    assert max(peaks) == pytest.approx(found.peak, rel=0.1)
    held = found.phases["step"]
    weights = sum(p.nbytes for p in run.model.parameters())
    assert held["weights"] == held["gradients"] == weights
    assert held["optimizer state"] == run.optimizer.state_bytes()


@pytest.mark.dist
def test_the_peak_of_a_step_on_two_ranks_is_the_predicted_one():
    """Counted on both ranks, the busiest taken; FSDP2 reduces its root last, TP gathers logits."""
    program = ROOT / "tests" / "engine" / "peak_job.py"
    found = by_rank(2, program, [], timeout=120)
    for case, *peaks in zip(*found, strict=True):
        name, training, step = case["options"], case["training"], case["step"]
        counted = [
            max(way) for way in zip(*(one["counted"] for one in (case, *peaks)), strict=True)
        ]
        assert counted[0] == pytest.approx(training, rel=0.1), name
        assert counted[1] == pytest.approx(step, rel=0.1), name


def predicted(world, *options, kind="cuda", room=1e18):
    config = compose([*SMALL, *options])
    model = make_model(config.model)
    routing = make_routing(model, config.optim)
    plan = plan_ahead(config, model, routing, world)
    return fitting.choose(config, model, routing, plan, world, kind, room), config


def test_sharding_divides_and_accumulating_does_not():
    """8 ranks, by hand: hidden matrices of 3 layers 12 d^2, embedding and head V d, all in fp32."""
    whole = 4 * (3 * 12 * 128**2 + 2 * 1024 * 128)
    cut, _ = predicted(8, "parallel=fsdp", "optim=muon")
    assert cut.phases["step"]["weights"] == whole // 8
    assert cut.phases["loss"]["gradients"] == 0
    many, _ = predicted(8, "parallel=fsdp", "optim=muon", "data.micro_batch=1")
    assert many.accumulation == 4
    assert many.phases["loss"]["gradients"] == whole  # until the last micro-batch is reduced
    copied, _ = predicted(8, "parallel=ddp", "optim=muon")
    assert copied.phases["step"]["gradient buckets"] == copied.phases["step"]["weights"] == whole
    half, _ = predicted(4, "parallel=tp", "optim=muon")
    assert half.phases["step"]["weights"] == whole // 4


@pytest.mark.slow
@pytest.mark.parametrize("arch", MODELS)
def test_what_the_compiler_saves_is_what_was_predicted(arch):
    options = [f"model={arch}", "parallel.precision=bf16", "optim=adamw", "parallel.compile=true"]
    trainer, found = job(*options)
    run = trainer.run
    tokens, targets = run.batches.step(0)[0]
    loss = run.parallel.loss(tokens, targets)
    own = {p.data_ptr() for p in run.model.parameters()}
    saved = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in loss.grad_fn.saved_tensors
        if t.data_ptr() not in own
    }
    parts = found.phases["loss"]
    others = run.model.head_weight.nbytes // 2 + tokens.nbytes  # its gradient in bf16
    kept = parts["activations"] + parts["weight copies"]
    assert sum(saved.values()) - others == pytest.approx(kept, rel=0.05)


def test_compiled_blocks_keep_what_a_fused_norm_would():
    """By hand, in bf16: 18 numbers of the width a token and block, factors, odds of heads."""
    found, _ = predicted(1, "parallel.precision=bf16", "parallel.compile=true", kind="cpu")
    tokens, d = 2048, 128
    outer = 3 * d * 2 + 2 * 4  # inputs of the two outer norms, and the gradient of the head's
    # Factors of two norms, and of those of q and k by head; the odds of 64 tokens by head.
    block = 18 * d * 2 + 4 * (2 + 2 * 4) + 4 * 64 * 2
    assert found.phases["loss"]["activations"] == tokens * (outer + 3 * block)


def test_the_largest_micro_batch_that_divides_and_fits_is_chosen():
    options = ["optim=muon", "data.batch_tokens=3072"]  # 48 sequences
    whole, config = predicted(1, *options)
    assert whole.micro_batch == 48
    found, _ = predicted(1, *options, room=whole.peak - 1)
    assert (found.micro_batch, found.accumulation) == (24, 2)
    assert found.peak < whole.peak
    asked, _ = predicted(1, *options, "data.micro_batch=16", room=1)
    assert asked.micro_batch == 16
    many = ["data.batch_tokens=1048576", "model.context=128"]
    assert predicted(1, *many)[0].micro_batch == 512  # 65,536 tokens
    assert predicted(1, *many, kind="cpu")[0].micro_batch == 8192
    assert predicted(4, *many, "parallel=ddp")[0].micro_batch == 512
    assert fitting.refusal(asked, config, 1) is not None  # the config without a wish


def test_more_loss_chunks_come_before_a_refusal():
    options = ["optim=adamw", "data.vocab_size=60000", "model.context=256", "model.d_model=32"]
    options += ["parallel.compile=true"]
    one, config = predicted(1, *options, "data.micro_batch=1")
    config.data.micro_batch = 0
    cut, _ = predicted(1, *options, room=one.peak - 1)
    assert cut.micro_batch == 1 < cut.loss_chunks <= 4  # two take more for the weight's gradient
    assert cut.peak < one.peak
    assert f"logits in {cut.loss_chunks} pieces" in cut.summary()
    last, _ = predicted(1, *options, room=1)
    words = fitting.refusal(last, config, 1)
    assert words.startswith("one sequence of model.context 256 needs 0.0")
    order = [words.index(key) for key in ("activation_checkpointing", "loss_chunks", "=fsdp")]
    assert order == sorted(order)


def test_logits_are_not_cut_where_the_optimizer_s_step_takes_most():
    found, config = predicted(1, "optim=muon", *STEPS, room=1)
    assert (found.micro_batch, found.loss_chunks) == (1, 1)
    assert fitting.refusal(found, config, 1) is not None


def test_ranks_take_what_the_smallest_has_room_for():
    config = compose([*SMALL, "parallel=ddp", "optim=muon"])
    model = make_model(config.model)
    routing = make_routing(model, config.optim)
    plan = plan_ahead(config, model, routing, 2)
    alike = fitting.choose(config, model, routing, plan, 2, "cpu", 1e18)
    parallel = Parallel(config.parallel, Env(world=2), torch.device("cpu"))
    parallel.gather = lambda own: [own, alike.peak - 1]
    assert fitting.fit(config, model, routing, plan, parallel).micro_batch == alike.micro_batch // 2
    parallel.gather = lambda own: [own, 1]
    with pytest.raises(UsageError, match="weights"):
        fitting.fit(config, model, routing, plan, parallel)


def test_a_device_tells_its_memory(monkeypatch):
    own = fitting.available_bytes(torch.device("cpu"), 2)
    assert fitting.available_bytes(torch.device("cpu"), 4) == pytest.approx(own / 2, rel=0.2)
    card = SimpleNamespace(total_memory=10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    assert fitting.available_bytes(torch.device("cuda", 0), 8) == 0.9e9
    config = compose([*SMALL, "plan.memory_gb=2"])
    assert fitting.planned_bytes(config, "cpu") == 1.8e9
    config.plan.memory_gb = 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fitting.planned_bytes(config, "cuda") == 0.9 * 80e9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("compiled", ["true", "false"])
def test_the_peak_on_a_gpu_is_the_predicted_one(compiled):
    torch.cuda.empty_cache()
    options = ["data.vocab_size=16384", "data.tokens=200000", "data.batch_tokens=32768"]
    options += ["model.context=512", "model.d_model=512", "model.n_layer=6", "optim=muon"]
    before = torch.cuda.memory_allocated()
    trainer, found = job(*options, f"parallel.compile={compiled}", device="cuda")
    for _ in range(2):
        trainer.train_step()
    torch.cuda.reset_peak_memory_stats()
    trainer.train_step()
    torch.cuda.synchronize()
    trainer.loader.close()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak == pytest.approx(found.peak, rel=0.1)
