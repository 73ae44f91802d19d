"""What is given to the optimizer, and what is changed under its hands."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from geon.errors import UsageError
from geon.optim import AdamW, Group, HybridOptimizer, ParamInfo, Role, Rule, Spectral, Stiefel
from tests.optim.contract import (
    LR,
    ROLES,
    RULES,
    Net,
    feed,
    gauss,
    group,
    make,
    same,
    snap,
    train,
)

every_kind = pytest.mark.parametrize("kind", list(RULES))


def test_what_is_not_a_group_is_refused_with_what_to_do():
    net = Net("muon")
    _, optimizer = make("muon")
    for given in (net.named_parameters(), net.parameters(), [{"params": list(net.parameters())}]):
        with pytest.raises(UsageError, match=r"takes Groups, not .* classify\(model\), then \["):
            HybridOptimizer(given)
    with pytest.raises(UsageError, match="takes Groups, not dict"):
        optimizer.add_param_group({"params": [nn.Parameter(gauss((3, 4)))]})
    for lr in (-0.1, math.nan, math.inf):
        with pytest.raises(UsageError, match="group 'g': lr"):
            group(net, lr=lr)
    with pytest.raises(UsageError, match="HybridOptimizer|no group|no param"):
        HybridOptimizer([])
    with pytest.raises(UsageError, match="takes Groups"):
        HybridOptimizer(net)
    assert len(HybridOptimizer(group(net)).param_groups) == 1


def test_parameters_may_be_given_by_an_iterator():
    """Which must not be used up by the checks."""
    net = Net("muon")
    members = group(net).params
    optimizer = HybridOptimizer([Group("g", RULES["muon"], LR, iter(members))])
    before = net.a.detach().clone()
    train(net, optimizer, [0])
    assert not torch.equal(net.a, before)


@pytest.mark.parametrize(
    ("names", "change", "message"),
    [
        ("aa", None, "'a' is in two param groups|'a' and 'a' are one"),
        ("ab", "same", "'a' and 'b' are one tensor: declare a tied weight once"),
        ("ab", "storage", "'a' and 'b' are one tensor"),
        ("a", "shape", r"'a' is declared with shape \(12, 8\) but has \(3, 8\)"),
    ],
)
def test_every_parameter_once_as_declared(names, change, message):
    net = Net("muon")
    one = group(net, names=names)
    (info, param), *rest = one.params
    if change == "same":
        one.params = [(info, param), (rest[0][0], param)]
    elif change == "storage":
        net.b.data = net.a.data
    elif change == "shape":
        param.data = param.data[:3]
    with pytest.raises(UsageError, match=message):
        HybridOptimizer([one])


@pytest.mark.parametrize("role", [Role.GAIN, Role.BIAS, Role.EMBEDDING, Role.TIED])
def test_polar_factors_are_of_matrices_between_activations(role):
    shape = (8,) if role in (Role.GAIN, Role.BIAS) else (8, 4)
    member = (ParamInfo("w", shape, role), nn.Parameter(gauss(shape)))
    with pytest.raises(UsageError, match=f"'w' of role '{role}'"):
        HybridOptimizer([Group("g", RULES["muon"], LR, [member])])


@every_kind
def test_parameters_without_entries_do_no_harm(kind):
    net, optimizer = make(kind)
    shape = (0, 8) if kind != "rms" else (0,)
    empty = nn.Parameter(torch.zeros(shape))
    twin = Net(kind)
    both = group(twin)
    both.params.append((ParamInfo("empty", shape, ROLES.get(kind, Role.HIDDEN)), empty))
    other = HybridOptimizer([both])
    for seed in range(2):
        train(net, optimizer, [seed])
        feed(twin, seed)
        empty.grad = torch.zeros(shape)
        other.step()
    assert same({k: p.detach() for k, p in net.named_parameters()}, dict(twin.state_dict()))
    other.load_state_dict(other.state_dict())


@every_kind
def test_a_grown_parameter_is_refused_at_the_step(kind):
    """A vocabulary that grew after the optimizer was made."""
    net, optimizer = make(kind)
    train(net, optimizer, [0])
    small, more = net.a.data, torch.zeros((3, *net.a.shape[1:]))
    net.a.data, net.a.grad = torch.cat([small, more]), None
    feed(net, 1)
    with pytest.raises(UsageError, match="parameter 'a' has shape .* was made for .* again after"):
        optimizer.step()
    net.a.data, net.a.grad = small, None
    train(net, optimizer, [1])
    twin, other = make(kind)
    train(twin, other, [0, 1])
    assert same(snap(net, optimizer), snap(twin, other))


@every_kind
def test_a_group_that_is_taken_away_is_stepped_no_more(kind):
    net = Net(kind)
    twin, other = make(kind)
    optimizer = HybridOptimizer([group(net, names=n, name=n) for n in "ab"])
    train(net, optimizer, [0])
    before = net.b.detach().clone()
    optimizer.param_groups.pop()
    train(net, optimizer, [1])
    train(twin, other, [0, 1])
    assert torch.equal(net.b, before)
    assert torch.equal(net.a, twin.a)
    net.b.requires_grad_(False)
    net.a.requires_grad_(False)
    optimizer.step()
    planned = optimizer.exchange
    optimizer.step()
    assert optimizer.exchange is planned, "a step plans again only where something changed"


@pytest.mark.parametrize("kind", ["muon", "normuon", "adamw"])
def test_state_that_is_cleared_begins_anew(kind):
    """As torch.optim makes state where it finds none."""
    net, optimizer = make(kind)
    train(net, optimizer, [0])
    twin = copy.deepcopy(net)
    optimizer.state.clear()
    other = HybridOptimizer([group(twin)])
    train(net, optimizer, [1])
    train(twin, other, [1])
    assert same(snap(net, optimizer), snap(twin, other))


@every_kind
def test_a_model_that_is_cast_keeps_its_state(kind):
    """model.to(bfloat16) mid-run: as if the state had been loaded into a bf16 run."""
    net, optimizer = make(kind)
    train(net, optimizer, [0, 1])
    saved = optimizer.state_dict()
    twin = copy.deepcopy(net).to(torch.bfloat16)
    net.to(torch.bfloat16)
    other = HybridOptimizer([group(twin)])
    other.load_state_dict(saved)
    train(net, optimizer, [2, 3])
    train(twin, other, [2, 3])
    one, two = snap(net, optimizer), snap(twin, other)
    for key in one:
        tight = {"atol": 1e-2, "rtol": 2e-2} if kind == "adamw" else {}
        torch.testing.assert_close(one[key].float(), two[key].float(), **tight)


@every_kind
def test_parameters_replaced_by_others_of_their_shape_go_on(kind):
    """As accelerate does: the group's list holds new Parameters."""
    (net, optimizer), (twin, other) = make(kind), make(kind)
    train(net, optimizer, [0, 1])
    train(twin, other, range(4))
    for name in "ab":
        setattr(net, name, nn.Parameter(net.get_parameter(name).detach().clone()))
    optimizer.param_groups[0]["params"] = list(net.parameters())
    train(net, optimizer, [2, 3])
    assert same(snap(net, optimizer), snap(twin, other))
    assert set(optimizer.state) == set(net.parameters())


@every_kind
def test_copies_step_alike_and_by_themselves(kind):
    net, optimizer = make(kind)
    train(net, optimizer, [0])
    optimizer.param_groups[0]["lr"] = 0.03
    for made in (copy.deepcopy((net, optimizer)), pickle.loads(pickle.dumps((net, optimizer)))):
        twin, other = made
        before = snap(net, optimizer)
        train(twin, other, [1, 2])
        assert same(before, snap(net, optimizer))
        again, third = copy.deepcopy((net, optimizer))
        train(again, third, [1, 2])
        assert same(snap(twin, other), snap(again, third))
    train(net, optimizer, [1, 2])
    assert same(snap(net, optimizer), snap(twin, other))


@every_kind
def test_a_group_may_be_added(kind):
    net, (twin, other) = Net(kind), make(kind)
    optimizer = HybridOptimizer([group(net, names="a")])
    one = optimizer.plan.orthogonalized
    optimizer.add_param_group(group(net, names="b", name="more"))
    assert optimizer.plan.orthogonalized == 2 * one == other.plan.orthogonalized
    train(net, optimizer, [0, 1])
    train(twin, other, [0, 1])
    assert same(snap(net, optimizer), snap(twin, other))
    with pytest.raises(UsageError, match="'a' is in two"):
        optimizer.add_param_group(group(net, names="a", name="again"))
    assert len(optimizer.param_groups) == 2


def test_a_group_that_cannot_be_added_is_not_there_afterwards():
    net, free = make("muon")[0], Net("muon")
    optimizer = HybridOptimizer([group(net, names="a")])
    off = group(free, Rule(Spectral(), Stiefel()), names="b", name="off")
    with pytest.raises(UsageError, match="not on Stiefel"):
        optimizer.add_param_group(off)
    assert [one["name"] for one in optimizer.param_groups] == ["g"]
    off.project_()
    optimizer.add_param_group(off)
    optimizer.step()


def test_a_group_without_parameters_is_none():
    net, optimizer = make("muon")
    nothing = Group("nothing", RULES["adamw"], LR, [])
    assert len(HybridOptimizer([group(net), nothing]).param_groups) == 1
    optimizer.add_param_group(nothing)
    train(net, optimizer, [0])
    assert len(optimizer.param_groups) == 1


def test_momentum_is_cycled_in_groups_that_were_added():
    """torch looks in `defaults` for what may be cycled, which the first group has set."""
    net, other = Net("adamw"), Net("muon")
    optimizer = HybridOptimizer([group(net, names="a")])
    optimizer.add_param_group(group(other, names="b", name="muon"))
    OneCycleLR(optimizer, 0.1, 10, base_momentum=0.7, max_momentum=0.9)
    net.a.grad = torch.ones_like(net.a)
    optimizer.step()
    entries, muon = optimizer.param_groups
    assert muon["momentum"] == 0.9
    assert entries["betas"] == (0.9, 0.95)


def test_weights_off_their_manifold_are_refused_with_what_mends_it():
    def free():
        net = Net("muon")
        return net, group(net, Rule(Spectral(), Stiefel()))

    _, one = free()
    with pytest.raises(UsageError, match=r"'a' is not on Stiefel: .* residual is .* project=True"):
        HybridOptimizer([one])
    _, one = free()
    HybridOptimizer([one], project=True)
    _, one = free()
    one.project_()
    optimizer = HybridOptimizer([one])
    with torch.no_grad():
        optimizer.param_groups[0]["params"][0].add_(1.0)
    with pytest.raises(UsageError, match="residual"):
        optimizer.check_on_manifold()
    optimizer.project_()
    optimizer.check_on_manifold()
    net, one = free()
    net.a.data.zero_()
    for options in ({}, {"project": True}):
        with pytest.raises(UsageError, match="parameter 'a'"):
            HybridOptimizer([one], **options)


def test_a_thawed_weight_off_its_manifold_is_refused_too():
    """It was not looked at while it was frozen."""
    net = Net("muon")
    net.a.requires_grad_(False)
    one = group(net, Rule(Spectral(), Stiefel()))
    one.project_()
    net.a.data.mul_(3.0)
    optimizer = HybridOptimizer([one])
    net.a.requires_grad_(True)
    with pytest.raises(UsageError, match="'a' is not on Stiefel"):
        train(net, optimizer, [0])


@pytest.mark.parametrize("kind", ["manifold muon", "hybrid"])
def test_bf16_weights_train_on_their_manifold(kind):
    net, optimizer = make(kind, torch.bfloat16)
    train(net, optimizer, range(20))
    assert all(p.isfinite().all() and p.dtype == torch.bfloat16 for p in net.parameters())
    optimizer.check_on_manifold()


def test_flattened_groups_are_refused_by_name():
    """DeepSpeed's ZeRO puts one flat tensor in the place of all parameters of a group."""
    model = nn.Linear(4, 4)
    infos = [ParamInfo(n, tuple(p.shape), Role.OTHER) for n, p in model.named_parameters()]
    members = list(zip(infos, model.parameters(), strict=True))
    optimizer = HybridOptimizer([Group("rest", AdamW(), 0.1, members)])
    optimizer.param_groups[0]["params"] = [torch.zeros(20)]
    for call in (optimizer.step, optimizer.state_dict):
        with pytest.raises(
            UsageError, match="'rest' was made of 2 parameters and now holds 1 tens"
        ):
            call()
