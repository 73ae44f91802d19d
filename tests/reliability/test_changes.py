"""What may change over a resume, key by key."""

from dataclasses import asdict

import pytest

from geon.configs.changes import (
    TABLE,
    Kind,
    changes,
    check_allowed,
    flat,
    kind_of,
    plain,
    refused,
)
from geon.configs.recipes import keys
from geon.configs.schema import Config
from geon.errors import UsageError
from geon.launch.compose import compose

LEAVES = [key for key in keys(Config) if not any(k.startswith(f"{key}.") for k in keys(Config))]


def settings(*overrides):
    return flat(plain(asdict(compose(overrides))))


def test_every_key_of_the_schema_has_a_class():
    assert len(LEAVES) > 150
    assert not [key for key in LEAVES if kind_of(key) is None]
    assert kind_of("tomorrow.key") is None  # which is taken for refused


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("optim.hidden.momentum", "refused"),
        ("optim.overrides.qk.manifold", "refused"),
        ("optim.polar.dtype", "refused"),
        ("seed", "refused"),
        ("data.batch_tokens", "refused"),
        ("data.bpe_vocab", "refused"),
        ("data.val_percent", "refused"),
        ("model.rope_base", "refused"),
        ("schedule.steps", "said"),
        ("parallel.precision", "said"),
        ("parallel.layout", "free"),
        ("parallel.timeout_seconds", "free"),
        ("data.micro_batch", "free"),
        ("checkpoint.keep", "free"),
        ("logger.wandb", "free"),
    ],
)
def test_classes(key, kind):
    assert kind_of(key) is Kind(kind)


def test_what_differs_is_found_value_by_value_and_a_key_that_is_new_had_its_default():
    there, here = settings("optim=muon"), settings("optim=muon", "seed=3", "schedule.steps=7")
    found = {c.key: (c.old, c.new, c.kind) for c in changes(there, here)}
    assert found == {
        "seed": (0, 3, Kind.refused),
        "schedule.steps": (1000, 7, Kind.said),
    }
    older = {key: value for key, value in there.items() if key != "optim.max_norm"}
    assert not changes(older, there)
    (one,) = changes(older, {**there, "optim.max_norm": 2.0})
    assert (one.key, one.old, one.new) == ("optim.max_norm", 1.0, 2.0)
    assert not changes({**there, "optim.gone": 1}, there)


def test_rates_that_follow_the_main_rate_are_one_change():
    found = changes(settings("optim=muon"), settings("optim=muon", "optim.lr=0.5"))
    assert len(found) == 2
    assert [c.key for c in refused(found, [])] == ["optim.lr"]
    assert not refused(found, ["optim.lr"])
    own = changes(settings("optim=muon"), settings("optim=muon", "optim.head.lr=0.5"))
    assert [c.key for c in refused(own, ["optim.lr"])] == ["optim.head.lr"]


@pytest.mark.parametrize("entry", ["seed", "optim", "*.momentum", "optim.overrides.new.lr"])
def test_keys_groups_and_globs_may_be_allowed(entry):
    check_allowed([entry], settings())


def test_a_key_that_does_not_exist_cannot_be_allowed():
    with pytest.raises(UsageError, match="'optim.lrr' is no key of a config.*'optim.lr'"):
        check_allowed(["optim.lrr"], settings())


def test_the_table_says_nothing_twice():
    assert list(TABLE).index("parallel.precision") < list(TABLE).index("parallel.*")
