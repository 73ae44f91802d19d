"""State dicts and schedulers are torch's, but matched by name; held for every kind of rule."""

import copy
import re

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CyclicLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from geon.errors import UsageError
from geon.optim import HybridOptimizer
from tests.optim.contract import (
    LR,
    RULES,
    Net,
    group,
    make,
    mixed,
    same,
    snap,
    train,
)

every_kind = pytest.mark.parametrize("kind", list(RULES))
SCHEDULERS = {
    "lambda": lambda o: LambdaLR(o, lambda step: 0.5**step),
    "cosine": lambda o: CosineAnnealingLR(o, 10),
    "one cycle": lambda o: OneCycleLR(o, 0.1, 10, base_momentum=0.7, max_momentum=0.9),
    "cyclic": lambda o: CyclicLR(o, 0.01, 0.1, 3),
    "plateau": lambda o: ReduceLROnPlateau(o, patience=0),
    "sequence": lambda o: SequentialLR(
        o, [LinearLR(o, 0.5, total_iters=2), CosineAnnealingLR(o, 8)], [2]
    ),
}


def twin_of(net):
    """Another net and optimizer with the same weights and no state."""
    other, optimizer = make(net.kind)
    other.load_state_dict(net.state_dict())
    return other, optimizer


def through_a_file(state, tmp_path):
    torch.save(state, tmp_path / "state.pt")
    return torch.load(tmp_path / "state.pt", weights_only=True)


# Saving and loading.


@every_kind
def test_a_loaded_optimizer_goes_on_to_the_last_bit(kind, tmp_path):
    net, optimizer = make(kind)
    train(net, optimizer, [0, 1])
    optimizer.param_groups[0]["lr"] = 0.03
    twin, other = twin_of(net)
    other.load_state_dict(through_a_file(optimizer.state_dict(), tmp_path))
    kept = snap(net, optimizer)
    train(twin, other, [2, 3])
    assert same(kept, snap(net, optimizer)), "nothing is shared"
    train(net, optimizer, [2, 3])
    assert same(snap(net, optimizer), snap(twin, other))
    assert optimizer.state_dict()["param_groups"] == other.state_dict()["param_groups"]


@pytest.mark.parametrize("momentum", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_kind
def test_dtypes_are_those_the_optimizer_was_made_with(kind, dtype, momentum, tmp_path):
    net, optimizer = make(kind, dtype, momentum=momentum)
    train(net, optimizer, [0])
    wanted = {k: v.dtype for k, v in optimizer.state_tensors().items()}
    for key, found in wanted.items():
        leaf = key.rsplit(".", 1)[-1]
        own = {"momentum": momentum, "exp_avg": dtype, "exp_avg_sq": dtype, "draws": torch.int64}
        assert found == own.get(leaf, torch.float32)
    twin, other = make(kind, dtype, momentum=momentum)
    twin.load_state_dict(net.state_dict())
    other.load_state_dict(through_a_file(optimizer.state_dict(), tmp_path))
    assert same(snap(net, optimizer), snap(twin, other))
    swapped = torch.bfloat16 if momentum == torch.float32 else torch.float32
    _, third = make(kind, dtype, momentum=swapped)
    third.load_state_dict(optimizer.state_dict())
    assert {v.dtype for k, v in third.state_tensors().items() if k.endswith(".momentum")} == (
        {swapped} if kind != "adamw" else set()
    )


@every_kind
def test_state_is_matched_by_name_and_never_by_position(kind):
    net, optimizer = make(kind)
    train(net, optimizer, [0, 1])
    saved = copy.deepcopy(optimizer.state_dict())
    train(net, optimizer, [2])
    for order in (["ba"], ["b", "a"], ["a", "b"]):
        twin = Net(kind)
        train(twin, HybridOptimizer([group(twin)]), [0, 1])
        groups = [group(twin, names=names, name=f"of {names}") for names in order]
        other = HybridOptimizer(groups)
        other.load_state_dict(saved)
        train(twin, other, [2])
        assert same(snap(net, optimizer), snap(twin, other))
        back, third = twin_of(twin)
        third.load_state_dict(other.state_dict())
        assert same(snap(net, optimizer), snap(back, third))


@pytest.mark.parametrize("where", ["saved", "own"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module."])
@every_kind
def test_wrappers_do_not_matter(kind, prefix, where):
    net, optimizer = make(kind)
    train(net, optimizer, [0])
    twin = Net(kind)
    wrapped = group(twin)
    wrapped.params = [
        (type(info)(**{**vars(info), "name": prefix + info.name}), param)
        for info, param in wrapped.params
    ]
    other = HybridOptimizer([wrapped])
    source, target = (optimizer, other) if where == "own" else (other, optimizer)
    if where == "saved":
        train(twin, other, [0])
    target.load_state_dict(source.state_dict())
    assert [v.tolist() for v in source.state_tensors().values()] == [
        v.tolist() for v in target.state_tensors().values()
    ]


def rewritten(state, **changes):
    """A state dict with other values in its first group."""
    state = copy.deepcopy(state)
    state["param_groups"][0].update(changes)
    return state


@every_kind
def test_what_does_not_fit_is_refused_and_changes_nothing(kind):
    net, optimizer = make(kind)
    train(net, optimizer, [0])
    saved = optimizer.state_dict()
    own = RULES[kind].name
    unnamed = copy.deepcopy(saved)
    del unnamed["param_groups"][0]["param_names"]
    fewer = copy.deepcopy(saved)
    fewer["param_groups"][0]["params"].pop()
    fewer["param_groups"][0]["param_names"].pop()
    cut = copy.deepcopy(saved)
    key = "exp_avg" if kind == "adamw" else "momentum"
    cut["state"][1][key] = cut["state"][1][key][:3]
    bare = copy.deepcopy(saved)
    bare["state"][1].pop(key)
    refused = {
        f"parameter 'a': .* rule 'Frobenius x Oblique', .* by '{re.escape(own)}'": rewritten(
            saved, rule="Frobenius x Oblique", lr=1.0
        ),
        r"of parameter 'z' and 0 more that this": rewritten(saved, param_names=["a", "z"]),
        r"has no parameter 'b', and 0 more": fewer,
        "does not name its parameters": unnamed,
        f"parameter 'b': saved {key} has shape": cut,
        "parameter 'b': the state dict has": bare,
    }
    twin, other = make(kind)
    train(twin, other, [5])
    other.param_groups[0]["lr"] = 0.5
    before, groups = snap(twin, other), other.state_dict()["param_groups"]
    for message, state in refused.items():
        with pytest.raises(UsageError, match=message):
            other.load_state_dict(state)
        assert same(before, snap(twin, other))
        assert other.state_dict()["param_groups"] == groups
    theirs = torch.optim.AdamW(Net(kind).parameters(), LR)
    with pytest.raises(UsageError, match="does not name its parameters"):
        other.load_state_dict(theirs.state_dict())
    other.load_state_dict(saved)


@pytest.mark.parametrize(("saved", "own"), [("muon", "normuon"), ("normuon", "muon")])
def test_the_state_of_a_rule_with_other_finishes_is_refused_by_both_names(saved, own):
    """Their norm and manifold are the same, their state is not."""
    _, optimizer = make(own)
    with pytest.raises(UsageError, match="parameter 'a'.*second_moment"):
        optimizer.load_state_dict(make(saved)[1].state_dict())


def test_a_torch_adamw_run_goes_on_where_it_named_its_parameters():
    net, ours = make("adamw")
    twin = copy.deepcopy(net)
    rule = RULES["adamw"]
    theirs = torch.optim.AdamW(twin.named_parameters(), LR, rule.betas, rule.eps, rule.decay)
    train(twin, theirs, [0, 1])
    net.load_state_dict(twin.state_dict())
    ours.load_state_dict(theirs.state_dict())
    train(twin, theirs, [2])
    train(net, ours, [2])
    assert torch.equal(net.a, twin.a)
    theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        ("muon", "Spectral x Euclidean, momentum 0.95 nesterov, radius 1, decay 0.1"),
        ("manifold muon", "Spectral x Stiefel, momentum 0.95, radius 1, per head"),
        ("adamw", "AdamW, betas 0.9 0.95"),
    ],
)
def test_state_dicts_of_before_still_load(kind, rule):
    """Groups with "names", "peak_lr" and the whole description of a rule."""
    net, optimizer = make(kind)
    train(net, optimizer, [0])
    before = optimizer.state_dict()
    keys = {"params": [0, 1], "names": ["a", "b"], "name": "old", "rule": rule}
    before["param_groups"] = [{**keys, "lr": 0.01, "peak_lr": 0.05}]
    twin, other = make(kind)
    other.load_state_dict(before)
    assert same(snap(net, optimizer, "a."), snap(twin, other, "a."))
    assert other.param_groups[0]["lr"] == 0.01
    other.set_lr(0.5)
    assert other.param_groups[0]["lr"] == 0.025
    before["param_groups"][0]["rule"] = "Sign x Euclidean, momentum 0.9, radius 10"
    with pytest.raises(UsageError, match="rule 'Sign x Euclidean'"):
        other.load_state_dict(before)


@every_kind
def test_a_parameter_saved_without_state_begins_anew(kind):
    """Saved while it was frozen: as in torch.optim, whatever state was there before is gone."""
    net = Net(kind)
    net.a.requires_grad_(False)
    saved = HybridOptimizer([group(net)]).state_dict()
    twin, other = make(kind)
    fresh = snap(twin, other, "a.")
    train(twin, other, [0])
    other.load_state_dict(saved)
    assert same(fresh, snap(twin, other, "a."))


@pytest.mark.parametrize("frozen", [False, True])
@every_kind
def test_torch_distributed_checkpoint_takes_and_gives_it(kind, frozen):
    """Of a parameter that was frozen mid-run too, whose state torch then leaves out."""
    net, optimizer = make(kind)
    train(net, optimizer, [0, 1])
    net.a.requires_grad_(not frozen)
    saved = get_optimizer_state_dict(net, optimizer)
    assert set(saved["state"]) == {"a", "b"}
    twin, other = twin_of(net)
    twin.a.requires_grad_(not frozen)
    set_optimizer_state_dict(twin, other, saved)
    train(net, optimizer, [2])
    train(twin, other, [2])
    only = "b" if frozen else ""
    assert same(snap(net, optimizer, only), snap(twin, other, only))


def test_a_checkpoint_of_adapters_holds_no_state_of_the_base():
    net = Net("muon")
    net.a.requires_grad_(False)
    optimizer = HybridOptimizer([group(net)])
    train(net, optimizer, [0])
    saved = get_optimizer_state_dict(net, optimizer)
    assert set(saved["state"]) == {"b"}
    twin = Net("muon")
    twin.a.requires_grad_(False)
    other = HybridOptimizer([group(twin)])
    set_optimizer_state_dict(twin, other, saved)
    assert same(snap(net, optimizer, "b."), snap(twin, other, "b."))


def test_load_hooks_are_called():
    (net, optimizer), seen = make("muon"), []
    train(net, optimizer, [0])
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("saving"))
    optimizer.register_load_state_dict_pre_hook(lambda o, s: rewritten(s, lr=0.7))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["saving", "loaded"]
    assert optimizer.param_groups[0]["lr"] == 0.7


# Schedulers.


def advance(scheduler):
    scheduler.step(*([1.0] if isinstance(scheduler, ReduceLROnPlateau) else []))


@pytest.mark.parametrize("which", list(SCHEDULERS))
def test_schedulers_go_on_after_a_load(which, tmp_path):
    net, optimizer = mixed()
    scheduler = SCHEDULERS[which](optimizer)
    for seed in range(3):
        train(net, optimizer, [seed])
        advance(scheduler)
    state = {"optim": optimizer.state_dict(), "net": net.state_dict()}
    saved = through_a_file(state, tmp_path)
    scheduled = copy.deepcopy(scheduler.state_dict())
    twin, other = mixed()
    again = SCHEDULERS[which](other)
    twin.load_state_dict(saved["net"])
    other.load_state_dict(saved["optim"])
    again.load_state_dict(scheduled)
    rates = []
    for seed in range(3, 6):
        for one, optim, by in ((net, optimizer, scheduler), (twin, other, again)):
            train(one, optim, [seed])
            advance(by)
        rates.append([g["lr"] for g in optimizer.param_groups])
        assert rates[-1] == [g["lr"] for g in other.param_groups]
    assert len({r[0] for r in rates}) > 1
    assert same(snap(net, optimizer), snap(twin, other))


@pytest.mark.parametrize("which", ["one cycle", "cyclic"])
def test_cycles_of_momentum_turn_beta1_too(which):
    net, optimizer = mixed()
    scheduler = SCHEDULERS[which](optimizer)
    muon, _, adamw = optimizer.param_groups
    seen = []
    for seed in range(4):
        train(net, optimizer, [seed])
        assert adamw["betas"] == (muon["momentum"], 0.95)
        seen.append(muon["momentum"])
        scheduler.step()
    assert len(set(seen)) == 4
    alone = make("adamw")[1]
    SCHEDULERS[which](alone)
    assert alone.param_groups[0]["betas"][1] == 0.95


def test_a_scheduler_starts_from_the_rate_it_finds():
    net, optimizer = make("muon")
    (one,) = optimizer.param_groups
    one["lr"] = 0.5
    first = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    assert one["initial_lr"] == 0.5
    train(net, optimizer, [0])
    first.step()
    assert one["lr"] == 0.25
    optimizer.set_lr(0.1)
    assert one["lr"] == 0.05
    second = CosineAnnealingLR(optimizer, 4)
    assert second.base_lrs == [0.5]


def test_set_lr_is_a_fraction_of_the_rate_at_its_first_call():
    _, optimizer = make("muon")
    optimizer.param_groups[0]["lr"] = 0.4
    optimizer.set_lr(0.5)
    optimizer.set_lr(0.25)
    assert optimizer.param_groups[0]["lr"] == 0.1
    _, other = make("muon")
    other.load_state_dict(optimizer.state_dict())
    other.set_lr(1.0)
    assert other.param_groups[0]["lr"] == 0.4


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_a_rate_may_be_a_tensor(kind):
    """As torch's own optimizers take it."""
    (net, optimizer), (twin, other) = make(kind), make(kind)
    optimizer.param_groups[0]["lr"] = torch.tensor(LR)
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    train(net, optimizer, [0])
    scheduler.step()
    train(net, optimizer, [1])
    train(twin, other, [0])
    other.param_groups[0]["lr"] = LR / 2
    train(twin, other, [1])
    torch.testing.assert_close(net.a, twin.a)
    other.load_state_dict(optimizer.state_dict())
    train(twin, other, [2])
