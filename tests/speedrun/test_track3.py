"""gpt_track3 and speedrun/track3_muon beside an independent reading of the rules."""

import math
from contextlib import closing

import numpy as np
import pytest
import torch

from geon.data.shards import write_bin
from geon.engine.build import make_model
from geon.engine.main import prepare
from geon.engine.schedule import fraction, progress
from geon.errors import UsageError
from geon.launch.compose import compose
from geon.launch.env import Env
from geon.models import MODELS, ModelShape
from geon.models.gpt_track3 import load_track_weights, track_name
from tests.speedrun import reading

VOCAB, HEADS, WIDTH, CONTEXT, ROWS, STEPS = 512, 6, 72, 64, 8, 20
"""A tenth of the width, near enough: 6 heads of 12."""


def words(count, seed=0):
    """Token ids that the last two tell something about."""
    draw = np.random.default_rng(seed)
    follows = draw.integers(0, VOCAB, (VOCAB, 4))
    found, now = np.empty(count, np.int64), 0
    for i in range(count):
        now = follows[now, draw.integers(0, 4)]
        found[i] = now
    return found


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two shards, and the options that read them."""
    folder = tmp_path_factory.mktemp("shards")
    tokens = words((STEPS + 2) * ROWS * CONTEXT)
    write_bin(folder / "a_train_000001.bin", tokens)
    write_bin(folder / "a_val_000000.bin", words(8 * CONTEXT + 1, 1))
    return tokens, [
        "data.dir=''",
        f'data.train="{folder}/*_train_*.bin"',
        f'data.val="{folder}/*_val_*.bin"',
        f'output="{folder}"',
    ]


def small(name, options, layers=2):
    """Config of an experiment at a tenth of the width, on a CPU."""
    return compose(
        [
            f"experiment=speedrun/{name}",
            *options,
            f"data.vocab_size={VOCAB}",
            f"data.batch_tokens={ROWS * CONTEXT}",
            "data.val_tokens=0",
            f"model.context={CONTEXT}",
            f"model.n_layer={layers}",
            f"model.d_model={WIDTH}",
            f"schedule.steps={STEPS}",
            "parallel=single",
            "checkpoint=none",
            "device=cpu",
        ]
    )


def step_all(config, weights=None):
    """Losses of all steps, from given weights by the track's names or our own."""
    trainer, _ = prepare(config, Env(), [])
    if weights is not None:
        load_track_weights(trainer.run.model, weights)
    losses = []
    with closing(trainer.loader):
        while len(losses) < config.schedule.steps:
            trainer.train_step()
            losses.append(trainer.loss.item())
    return losses, trainer.run.model


def test_stored_weights_and_shapes_at_full_size():
    """162M stored: 85M in matrices of blocks, two tables of 50304 x 768, biases and gains."""
    config = compose(["experiment=speedrun/track3_muon"])
    ours = {track_name(i.name): i.shape for i in make_model(config.model).infos}
    theirs = reading.shapes()
    assert ours == theirs
    assert list(ours).index("embed.weight") == 0
    stored = sum(math.prod(shape) for shape in ours.values())
    tables, matrices = 2 * 50304 * 768, 12 * 12 * 768**2
    vectors = 12 * (9 + 2) * 768 + 50304 + 2 * 768  # biases, gains
    assert stored == tables + matrices + vectors == 162_354_816


def test_steps_lie_where_the_rules_put_them():
    config = compose(["experiment=speedrun/track3_muon"])
    schedule = config.schedule
    assert schedule.steps == reading.STEPS
    by_hand = {0: 1.0, 974: 1.0, 975: 1.0, 976: 2274 / 2275, 2000: 1250 / 2275, 3249: 1 / 2275}
    for step, share in by_hand.items():
        ours = fraction(schedule, progress(schedule, step, 0.0))
        assert ours == pytest.approx(share, rel=1e-12)
        assert ours == pytest.approx(reading.rate(step), rel=1e-12)


def test_a_zero_head_says_nothing():
    """Loss at step 0: ln(50304) at the full vocabulary, whatever the tokens."""
    model = MODELS["gpt_track3"](ModelShape(50304, 16, 1, 1, 16, softcap=15.0, zero_init_proj=True))
    generator = torch.Generator().manual_seed(0)
    params = dict(model.named_parameters())
    with torch.no_grad():
        for info in model.infos:
            params[info.name].copy_(model.initial(info, generator))
    tokens = torch.randint(0, 50304, (2, 16), generator=generator)
    assert model(tokens, tokens).item() == pytest.approx(math.log(50304), abs=1e-5)


def test_initial_weights_are_drawn_as_the_rules_say(shards):
    config = small("track3_muon", shards[1])
    trainer, _ = prepare(config, Env(), [])
    trainer.loader.close()
    for name, param in trainer.run.model.named_parameters():
        drawn = reading.initial(
            {track_name(name): tuple(param.shape)}, torch.Generator().manual_seed(1)
        )[track_name(name)]
        assert param.std(correction=0).item() == pytest.approx(
            drawn.std(correction=0).item(), rel=0.1
        ), name
        assert param.mean().item() == pytest.approx(drawn.mean().item(), abs=0.02), name


@pytest.mark.parametrize("layers", [3, pytest.param(12, marks=pytest.mark.slow)])
def test_twenty_steps_agree_with_the_reading(shards, layers):
    """Same weights, same tokens: losses of all steps, and all weights at the end."""
    tokens, options = shards
    config = small("track3_muon", [*options, *mean_eps()], layers)
    weights = reading.initial(
        reading.shapes(VOCAB, layers, WIDTH), torch.Generator().manual_seed(3)
    )
    ours, model = step_all(config, weights)
    rows, size = torch.from_numpy(tokens), ROWS * CONTEXT
    batches = [
        (rows[at : at + size].view(ROWS, -1), rows[at + 1 : at + size + 1].view(ROWS, -1))
        for at in range(0, STEPS * size, size)
    ]
    theirs = reading.train(weights, batches, HEADS, STEPS)
    assert ours[0] == pytest.approx(math.log(VOCAB), abs=1e-5)
    assert ours[-1] < ours[0] - 0.5
    # An attention scale of 0.13 instead of 0.12 moves them by 7e-5.
    assert ours == pytest.approx(theirs, abs=1e-5)
    for name, param in model.named_parameters():
        other = weights[track_name(name)]
        assert (param - other).norm() <= 2e-3 * other.norm(), name


def mean_eps():
    """AdamW's eps 1e-10 is of sums over a batch; means are smaller by the batch's tokens."""
    eps = reading.ADAM["eps"] / (ROWS * CONTEXT)
    return [f"optim.{role}.eps={eps!r}" for role in ("embedding", "head", "rest")]


def test_track_weights_that_do_not_fit_are_refused():
    model = MODELS["gpt_track3"](ModelShape(32, 16, 1, 2, 16))
    given = {track_name(n): p.detach() for n, p in model.named_parameters()}
    with pytest.raises(UsageError, match="is in one"):
        load_track_weights(model, {k: v for k, v in given.items() if k != "proj.bias"})
    with pytest.raises(UsageError, match="size=track3"):
        load_track_weights(model, given | {"proj.bias": torch.zeros(31)})
    with pytest.raises(UsageError, match="gpt_track3"):
        load_track_weights(MODELS["gpt"](ModelShape(32, 16, 1, 2, 16)), given)
