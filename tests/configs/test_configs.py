import re
from dataclasses import fields, is_dataclass
from functools import cache
from itertools import product
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from geon.configs.check import check_overrides, groups, keys, resolve
from geon.configs.schema import Config, RuleKind, Source, register
from geon.engine.build import make_corpus, make_model, make_routing
from geon.engine.planning import report_plan
from geon.errors import UsageError
from geon.models import IMAGE_MODELS
from geon.optim import Rule
from tests import warm

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "configs"
FILES = [f.relative_to(FOLDER).with_suffix("") for f in sorted(FOLDER.rglob("*/*.yaml"))]
OPTIONS = [  # experiment=folder/name, but model/size=name
    (f.parts[0], "/".join(f.parts[1:])) if f.parts[0] == "experiment" else (str(f.parent), f.name)
    for f in FILES
]


def options(group):
    return [option for g, option in OPTIONS if g == group]


@cache
def composed(*overrides) -> DictConfig:
    register()
    with initialize_config_dir(config_dir=str(FOLDER), version_base="1.3"):
        return compose("train", overrides=list(overrides))


def read(*overrides) -> Config:
    """Compose the chosen groups once, then set single values: Hydra needs 0.2 s a time."""
    check_overrides(overrides)
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    config = composed(*(o.input_line for o in parsed if o.key_or_group in groups())).copy()
    for override in parsed:
        if override.key_or_group not in groups():
            OmegaConf.update(config, override.key_or_group, override.value())
    return resolve(config)


def build(config):
    """Everything of a run that needs neither a process group nor much memory."""
    if config.data.source is Source.synthetic:
        make_corpus(config.data, config.seed)
    if config.plan.world_size:
        report_plan(config, config.plan.world_size)
    model = make_model(config.model)
    return model, make_routing(model, config.optim)


def leaves(schema=Config, prefix=""):
    """Dotted keys of the schema that hold values, found without the code under test."""
    for f in fields(schema):
        if is_dataclass(f.type):
            yield from leaves(f.type, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}"


LEAVES = list(leaves())


def run(*arguments, cwd):
    return warm.run(0, ROOT / "train.py", arguments, timeout=120, cwd=cwd)


def test_the_folder_is_what_check_and_the_defaults_list_know():
    assert {group: options(group) for group, _ in OPTIONS} == groups()
    defaults = OmegaConf.load(FOLDER / "train.yaml").defaults
    named = {
        key.split()[-1] for entry in defaults if isinstance(entry, DictConfig) for key in entry
    }
    assert {group for group, _ in OPTIONS} <= named


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_with_the_values_of_its_file(group, option):
    config = read(f"{group}={option}")
    place = {"model/size": [config.model], "experiment": [config], "task": [config]}.get(group)
    file = OmegaConf.to_container(OmegaConf.load(FOLDER / group / f"{option}.yaml"), resolve=False)
    for key, value in file.items():
        found = getattr(place[0] if place else getattr(config, group), key, None)
        assert found is not None or key == "defaults"
        if isinstance(value, int | float | str) and "${" not in str(value):
            assert getattr(found, "value", found) == value, key


@cache
def recipe_of(optim):
    return read(f"optim={optim}").optim


BOTH = product(options("model"), options("model/size"))


@pytest.mark.parametrize(
    ("arch", "size"), [one for one in BOTH if (one[0] in IMAGE_MODELS) == (one[1] == "image")]
)
def test_every_model_and_size_builds_and_routes_with_every_optimizer(arch, size):
    config = read(f"model={arch}", f"model/size={size}")
    model = make_model(config.model)
    names = [name for name, _ in model.named_parameters()]
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model.arch == arch
    assert model.parameter_count() == sum(p.numel() for p in model.parameters())
    for optim in options("optim"):
        recipe = recipe_of(optim)
        routing = make_routing(model, recipe)
        assert list(routing.assigned) == names
        assert set(routing.assigned.values()) == set(routing.rules)
        hidden = routing.rules["hidden"]
        assert isinstance(hidden, Rule) == (recipe.hidden.rule is RuleKind.steepest)


@pytest.mark.parametrize(
    ("size", "millions"), [("124m", 85), ("350m", 302), ("1b", 910), ("3b", 2830), ("tiny", 0.79)]
)
def test_sizes_have_the_hidden_weights_that_they_promise(size, millions):
    model, _ = build(read("model=gpt", f"model/size={size}"))
    hidden = sum(info.numel for info in model.roles() if info.role == "hidden")
    assert hidden / 1e6 == pytest.approx(millions, rel=0.01)


def test_one_number_moves_the_rates_of_a_sweep():
    for optim in options("optim"):
        config = read(f"optim={optim}", "optim.lr=0.125").optim
        assert config.hidden.lr == 0.125


def test_defaults_are_complete():
    assert not OmegaConf.missing_keys(OmegaConf.structured(read()))


def test_overrides_of_an_experiment_reach_their_parameters(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\n"
        "optim: {overrides: {first: {pattern: blocks.0.*, lr: 0.5, weight_decay: 0.1}}}\n"
    )
    config = resolve(composed(f"hydra.searchpath=[{tmp_path}]", "experiment=mine"))
    model, routing = build(config)
    taken = [name for name, route in routing.assigned.items() if route == "first"]
    assert taken == [n for n, _ in model.named_parameters() if n.startswith("blocks.0.")]
    assert routing.configs["first"].lr == 0.5
    assert routing.rules["first"].decay == 0.1


def test_overrides_of_the_command_line_reach_their_parameters():
    override = "+optim.overrides.q={pattern: '*.q.weight', lr: 0.01, manifold: euclidean}"
    check_overrides([override])
    _, routing = build(resolve(composed(override)))
    taken = [name for name, route in routing.assigned.items() if route == "q"]
    assert taken
    assert all(name.endswith(".q.weight") for name in taken)
    assert routing.configs["q"].lr == 0.01


@pytest.mark.parametrize("setting", ["lrr: 1", "lr: fast", "rule: adamv"])
def test_bad_settings_of_an_override_are_refused_by_key(setting):
    override = f"+optim.overrides.q={{pattern: a, {setting}}}"
    with pytest.raises((UsageError, HydraException)) as caught:
        check_overrides([override])
        resolve(composed(override))
    key = setting.split(":")[0]
    assert f"overrides.q.{key}" in f"{caught.value} {caught.value.__cause__}"


@pytest.mark.parametrize("flag", ["--cfg job", "--help"])
def test_config_and_help_are_printed(flag, tmp_path):
    done = run(*flag.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for group in ("model", "optim", "data", "parallel", "schedule"):
        assert re.search(rf"^ *{group}[: ]", done.stdout, re.MULTILINE), group
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "status", "said"),
    [
        ("+optim.lrr=3", 2, ["optim.lrr", "Did you mean 'optim.lr'?"]),
        ("model.n_layer=abc", 2, ["model.n_layer", "abc"]),
        ("schedule.steps=0", 2, ["schedule.steps", "positive", "0"]),
    ],
)
def test_the_command_line_refuses_without_a_traceback(override, status, said, tmp_path):
    done = run(override, cwd=tmp_path)
    assert done.returncode == status
    assert not [s for s in said if s not in done.stderr], done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("optim.lrr=3", "optim.lr"),
        ("+optim.lrr=3", "optim.lr"),
        ("++optim.lrr=3", "optim.lr"),
        ("~optim.lrr=3", "optim.lr"),
        ("~optim.lrr", "optim.lr"),
        ("optim.hiden.norm=sign", "optim.hidden.norm"),
        ("sed=1", "seed"),
        ("schedule.step=5", "schedule.steps"),
        ("+model/sizes=tiny", "model/size"),
        ("model.size=tiny", "model/size"),
        ("optims=adamw", "optim"),
        ("optim=hybrit", "hybrid"),
        ("model=gpt3", "gpt"),
        ("experiment=firstrun", "first_run"),
        ("+optim.overrides.mine.momentm=0.9", "momentum"),
    ],
)
def test_a_typo_is_refused_with_what_was_meant(override, meant):
    with pytest.raises(UsageError, match=f"Did you mean '[^']*{meant}'"):
        check_overrides([override])


@pytest.mark.parametrize(
    "override",
    ["model.n_layer=4", "optim=muon", "optim=muon,adamw", "model/size=1b", "seed=range(3)"]
    + [
        "optim.overrides.mine.lr=1",
        "+sweep.grid.seed=[1]",
        "--help",
        "name='a=b'",
    ],
)
def test_good_overrides_pass(override):
    check_overrides([override])


@pytest.mark.parametrize("group", ["model", "model/size", "experiment"])
def test_a_group_cannot_be_null(group):
    with pytest.raises(UsageError, match=f"{group}.*null"):
        check_overrides([f"{group}=null"])


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("+optim.lrr=3", "optim.lrr"),
        ("+foo=1", "foo"),
        ("+foo.bar=1", "foo"),
        ("+hydraa=1", "hydraa"),
    ],
)
def test_resolve_refuses_unknown_keys_that_hydra_lets_through(override, key):
    with pytest.raises(UsageError, match=key):
        resolve(composed(override))


@pytest.mark.parametrize("key", ["hydraa", "hydra_x.y"])
def test_only_hydra_itself_is_left_to_hydra(key):
    with pytest.raises(UsageError, match=key):
        check_overrides([f"+{key}=1"])


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("model.n_layer=abc", "model.n_layer"),
        ("model.n_layer=1.5", "model.n_layer"),
        ("optim.lr=fast", "optim.lr"),
        ("optim.lr=null", "optim.lr"),
        ("data.shuffle=maybe", "data.shuffle"),
        ("model.arch=gptt", "model.arch"),
        ("parallel.layout=zero", "parallel.layout"),
        ("optim.hidden.betas=[a,b]", "optim.hidden.betas"),
        ("optim.hidden=adamw", "optim.hidden"),
        ("+optim.hidden={lrr: 3}", "optim.hidden.lrr"),
    ],
)
def test_wrong_types_are_refused_by_key(override, key):
    check_overrides([override])
    with pytest.raises(HydraException) as caught:
        composed(override)
    assert key in f"{caught.value} {caught.value.__cause__}"


@pytest.mark.parametrize("value", ["???", "${nope}", "${optim.lr}", "${optim.hidden.lr}"])
def test_missing_values_and_bad_references_are_refused_by_key(value):
    with pytest.raises(UsageError, match=r"optim\.(hidden\.)?lr"):
        read(f"optim.lr={value}")


OUT_OF_RANGE = """
name=../x | name=.hidden | name=
schedule.steps=0 | schedule.warmup=1.5 | schedule.warmup=nan | schedule.decay=-0.1
schedule.floor=2 | schedule.budget_seconds=-1
data.batch_tokens=0 | data.micro_batch=-1 | data.val_tokens=-1 | data.bpe_vocab=-1
data.val_percent=0 | data.val_percent=100 | data.val_percent=nan | data.dtype=float32
logger.every=0 | logger.spectrum_every=-1
eval.every=-1 | eval.batch=0 | eval.sample_tokens=-1
checkpoint.every=-1 | checkpoint.keep=0
parallel.replicas=0 | parallel.timeout_seconds=nan | shard.max_buffer_mb=0
model.n_layer=0 | model.n_head=3 | model.d_model=-1 | model.context=0 | model.mlp_ratio=0
model.vocab_size=0 | model.softcap=-1 | model.softcap=nan | model.rope_base=-1
optim.max_norm=-1 | optim.max_norm=nan | optim.lr=-1 | optim.lr=nan | optim.lr=inf
optim.hidden.lr=-1 | optim.embedding.lr=nan
optim.hidden.momentum=1 | optim.hidden.momentum=-0.1 | optim.hidden.momentum=nan
optim.hidden.radius=0 | optim=manifold_muon optim.hidden.weight_decay=0.1
optim.hidden.norm=spectrall | optim.hidden.manifold=stiefle | optim.head.norm=sgn
optim.head.manifold=stiefel | optim.hidden.spectral_scale=rsm
optim.polar.coefficients=kellar | optim.polar.dtype=fp16 | optim.polar.steps=0
optim=uscion optim.hidden.radius=-1 | optim=uscion optim.hidden.radius=nan
optim=uscion optim.hidden.weight_decay=-1
optim=adamw optim.hidden.eps=-1 | optim=adamw optim.hidden.weight_decay=-1
optim=adamw optim.hidden.betas=[0.9] | optim=adamw optim.hidden.betas=[1.5,0.9]
data=synthetic data.tokens=-5 | data=synthetic data.tokens=0 | data=synthetic data.vocab_size=0
plan.world_size=-1 | cluster.nodes=0 | cluster.ranks_per_node=0 | cluster.cpus_per_rank=0
sweep.parallel_jobs=-1 | model.head_dim=-1 | model.base_width=0
"""


@pytest.mark.parametrize("line", re.split(r" \| |\n", OUT_OF_RANGE.strip()))
def test_values_out_of_range_are_refused_by_key(line):
    with pytest.raises(UsageError) as caught:
        build(read(*line.split(" ")))
    *place, leaf = line.split(" ")[-1].partition("=")[0].split(".")
    message = str(caught.value)
    words = leaf.replace("weight_", "").replace("spectral_", "").split("_")  # weight decay, scale
    assert ".".join([*place, leaf]) in message or (
        ".".join(place) in message and all(word in message for word in words)
    ), message


def typos(key):
    """Every way to leave out, double, swap or replace one letter, without the key itself."""
    for i, letter in enumerate(key):
        if letter.isalpha():
            yield key[:i] + key[i + 1 :]
            yield key[:i] + letter + key[i:]
            yield key[:i] + ("q" if letter != "q" else "z") + key[i + 1 :]
            if key[i + 1 : i + 2].isalpha():
                yield key[:i] + key[i + 1] + letter + key[i + 2 :]


def refusal(override):
    try:
        check_overrides([override])
    except UsageError as error:
        return str(error)
    return ""


def test_leaves_are_known_keys():
    assert set(LEAVES) <= set(keys())
    assert not [key for key in LEAVES if key != "task" and refusal(f"{key}=1")]  # a group as well


@pytest.mark.parametrize("key", LEAVES)
def test_a_doubled_letter_in_any_key_is_refused_and_the_key_suggested(key):
    i = max(i for i, letter in enumerate(key) if letter.isalpha())
    typo = key[:i] + key[i] + key[i:]
    for prefix in ("", "+", "++"):
        message = refusal(f"{prefix}{typo}=1")
        assert f"'{typo}'" in message
        assert f"Did you mean '{key}'?" in message


@given(data=st.data(), prefix=st.sampled_from(["", "+", "++", "~"]))
@settings(deadline=None, max_examples=200)
def test_any_one_letter_typo_of_any_key_is_refused(data, prefix):
    key = data.draw(st.sampled_from(LEAVES))
    valid = {*keys(), *groups()}
    typo = data.draw(st.sampled_from([t for t in typos(key) if t not in valid]))
    assert f"'{typo}'" in refusal(f"{prefix}{typo}=1")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["parallel=tp", "model.fused_qkv=true"], "model.fused_qkv=true with 2 tensor ranks"),
        (["parallel=tp", "model.n_head=1"], "model.n_head 1 does not divide over 2 tensor ranks"),
        (["parallel=ddp", "parallel.tensor=2"], "parallel.tensor 2 goes with parallel=fsdp or"),
        (["parallel=fsdp_tp", "parallel.tensor=3"], "parallel.tensor 3 does not divide 2 ranks"),
        (["shard.transport=gram", "shard.reproducible=true"], "takes owners only"),
        (["shard.wire=bf16", "shard.reproducible=true"], "set shard.wire=fp32 or auto"),
    ],
)
def test_layouts_that_do_not_fit_are_refused_by_key(options, words):
    with pytest.raises(UsageError, match=words):
        build(read(*options, "plan.world_size=2"))
