"""No key is ignored: beside any options, another value makes another run, or is refused."""

from pathlib import Path

import pytest

from geon.configs.check import groups
from geon.configs.effects import unread
from geon.engine import trackers
from geon.engine.main import execute
from geon.errors import UsageError
from geon.launch.compose import compose
from geon.launch.env import Env
from tests.configs.probe import accept, composed, leaves, outcomes, read
from tests.configs.reading import recorded

IN_A_RUN = {
    "name",
    "output",
    "seed",
    "mode",
    "device",
    "model.init_from",
    "schedule.budget_seconds",
}
IN_A_RUN |= {"optim.name", "optim.compile", "optim.record_pairs", "shard.reproducible"}
IN_A_RUN |= {f"parallel.{x}" for x in ("precision", "compile", "activation_checkpointing")}
"""Keys whose effect shows neither in a plan nor in three steps: that a run reads them is below."""
READ_BY_RUNS = ("checkpoint", "health", "logger", "eval", "plan")
"""Groups of such keys."""
ELSEWHERE = {
    "parallel.timeout_seconds": "tests/distributed/test_faults.py",
    "parallel.share_gpu": "tests/engine/test_devices.py",
    "shard.objective": "tests/optim/test_shard_cost.py",  # time and bytes may choose alike
    "parallel.layout": "tests/configs/test_every_option.py",
    "task": "tests/engine/test_images.py",
    "health.max_skips": "tests/reliability/test_numbers.py",
    "health.max_rewinds": "tests/reliability/test_numbers.py",
    "checkpoint.project": "tests/reliability/test_identity.py",
}
"""Keys whose effect shows on several ranks, a GPU or after an event, and the test that has it."""
FAST = [
    {"optim": "muon"},
    {"optim": "adamw", "model": "gpt2", "parallel": "ddp", "schedule": "constant"},
    {"optim": "manifold_muon", "parallel": "hsdp", "schedule": "cosine"},
    {"model": "vit", "optim": "soap", "parallel": "single"},
]
OPTIONS = [
    {group: option}
    for group, names in groups().items()
    for option in names
    if group in ("model", "optim", "parallel", "schedule", "checkpoint", "logger")
    if option != "sophia"  # which is given curvature by a trainer
]
OPTIONS += [{"data": "stdlib"}, {"data": "synthetic"}, {"data": "images"}]
OPTIONS += [{"optim": name, "model": "gpt2"} for name in ("hybrid", "scion", "adamw")]


def keep(key):
    group = key.split(".")[0]
    return key not in IN_A_RUN and key not in ELSEWHERE and group not in READ_BY_RUNS


def whole(options):
    """With a layout that the options' rules can do."""
    baseline = composed(**options)["optim"]["hidden"].get("rule") == "baseline"
    entries = options.get("parallel", "").startswith("deepspeed")
    more = {"parallel": "ddp"} if baseline else {"optim": "scion"} if entries else {}
    return more | options


@pytest.mark.parametrize("options", FAST, ids=lambda o: " ".join("=".join(x) for x in o.items()))
def test_no_key_is_ignored(options):
    found = outcomes(options, keep)
    assert not [one for one in found if one.word not in ("effect", "refused")]
    assert sum(one.word == "effect" for one in found) > 40


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: " ".join("=".join(x) for x in o.items()))
def test_no_key_is_ignored_beside_any_option(options):
    found = outcomes(whole(options), keep)
    alike = {("adam", "optim.embedding.rule"), ("spectral_sphere", "optim.hidden.finishes")}
    ignored = [one for one in found if one.word not in ("effect", "refused")]
    # Adam is AdamW without decay; steps on the spectral sphere are above the floor of update_floor.
    assert not [one for one in ignored if (options.get("optim"), one.key) not in alike]


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["oneshot", "lgm", "exact", "published"])
@pytest.mark.parametrize("form", ["gram", "rect"])
def test_no_key_of_a_solver_is_ignored(solver, form):
    more = {"optim__solver": {"method": solver} | ({"form": form} if solver == "lgm" else {})}
    found = outcomes(
        {"optim": "manifold_muon"}, lambda key: "polar" in key or "solver" in key, **more
    )
    assert not [one for one in found if one.word not in ("effect", "refused")]


def run(folder: Path, options, **settings):
    """A run of one step: its config, what it is read from, and the keys that it read."""
    raw = composed(**{"parallel": "single", **options})
    raw |= {"output": str(folder)}
    raw["schedule"]["steps"] = 1
    for place, values in settings.items():
        raw[place] = raw.get(place, {}) | values if isinstance(values, dict) else values
    config = read(raw)
    with recorded() as keys:
        execute(config, Env())
    return config, raw, keys


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ({}, {"health": {"policy": "skip"}, "optim": {"record_pairs": [1]}}),
        ({"optim": "adamw", "checkpoint": "none", "logger": "wandb"}, {}),
        (
            {},
            {
                "checkpoint": {"every": 1, "allow_change": ["optim.lr"]},
                "health": {"policy": "rewind"},
                "logger": {"spectrum_every": 1, "certify_every": 1},
            },
        ),
        ({}, {"mode": "plan"}),
    ],
    ids=["skip", "wandb", "rewind", "plan"],
)
def test_a_run_reads_the_keys_that_are_not_refused(options, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.Wandb, "_open", lambda self, mode: type("R", (), vars(trackers))())
    config, raw, read_keys = run(tmp_path, options, **settings)
    due = [
        key
        for key, _ in leaves()
        if key in IN_A_RUN or key.split(".")[0] in READ_BY_RUNS
        if key not in ELSEWHERE and not unread(config, key, raw)
    ]
    if config.mode.value == "plan":
        due = [key for key in due if key.split(".")[0] in ("plan", "mode")]
    ranks = ("shard.reproducible",)
    assert not [key for key in due if key not in read_keys and key not in ranks]
    assert len(due) > 3


def test_a_sample_is_made_of_the_keys_that_say_how(tmp_path):
    (tmp_path / "a.txt").write_text("def f(): pass\n" * 400)
    settings = {
        "data": {"path": str(tmp_path / "a.txt"), "tokens": 0},
        "eval": {"sample_tokens": 2},
    }
    _, _, keys = run(tmp_path / "runs", {"data": "text"}, **settings)
    assert keys >= {"eval.sample_tokens", "eval.sample_prompt", "eval.sample_temperature"}


def test_every_layout_is_planned_in_a_way_of_its_own():
    from tests.configs.probe import planned

    names = [name for name in groups()["parallel"] if name != "single"]
    plans = {name: planned(accept(read(composed(optim="scion", parallel=name)))) for name in names}
    told = {repr(plan) for plan in plans.values()}
    alike = {"deepspeed_z0", "ddp"}, {"deepspeed_z1", "deepspeed_z2"}
    assert len(told) >= len(names) - len(alike)


@pytest.mark.parametrize("file", sorted(set(ELSEWHERE.values())))
def test_effects_that_are_shown_elsewhere_are(file):
    text = (Path(__file__).parents[2] / file).read_text()
    due = [key for key, place in ELSEWHERE.items() if place == file and key != "parallel.layout"]
    assert all(key.split(".")[-1] in text for key in due)


WRONG = """
optim=adamw optim.hidden.manifold=stiefel : optim.hidden.rule=steepest, not adamw
optim=adamw optim.hidden.momentum=0 : optim.hidden.momentum=0 has no effect
data=stdlib data.path=x : data.path=x has no effect with data.source=stdlib
parallel=fsdp parallel.zero=3 : parallel.zero=3 has no effect with parallel.layout=fsdp
parallel=ddp parallel.long_side=false : parallel.long_side=False has no effect
model=moe parallel=fsdp parallel.long_side=false : parallel.long_side=False has no effect
schedule=cosine schedule.decay=0 : schedule.decay=0 has no effect
device=cpu shard.half_tflops=9 : shard.half_tflops=9 has no effect
optim=adamw shard.gbytes=9 : shard.gbytes=9 has no effect
device=cpu optim=manifold_muon optim.polar.steps=9 : optim.polar.steps=9 has no effect
task=image parallel.loss_chunks=2 : parallel.loss_chunks=2 has no effect
task=image optim.hidden.per_head=true : optim.hidden.per_head=True has no effect
"""


@pytest.mark.parametrize("line", WRONG.strip().splitlines())
def test_a_key_that_is_not_read_is_refused_with_the_reason(line):
    words, told = line.split(" : ")
    with pytest.raises(UsageError) as caught:
        compose(words.split(), "train")
    assert told in str(caught.value)
    assert "leave it out" in str(caught.value)


@pytest.mark.parametrize("key", ["cluster.partition=gpu", "cluster.cpus_per_rank=2"])
def test_a_sweep_refuses_keys_of_slurm_alone(key):
    compose(["sweep=lr", "cluster.ranks_per_node=2"], "sweep")
    with pytest.raises(UsageError, match="read by python -m geon.launch.slurm"):
        compose(["sweep=lr", key], "sweep")
