"""What GPUs run for AdamW, by torch's fused kernel for the CPU."""

import copy

import torch

from geon.optim import adamw
from tests.optim.contract import LR, RULES, make, train


def test_the_fused_kernel_steps_as_torch_s_and_takes_state_of_the_other(monkeypatch):
    net, optimizer = make("adamw")
    train(net, optimizer, [0])
    monkeypatch.setattr(adamw, "_FUSED", ("cpu",))
    twin, rule = copy.deepcopy(net), RULES["adamw"]
    theirs = torch.optim.AdamW(twin.named_parameters(), LR, rule.betas, rule.eps, rule.decay)
    third, ours = make("adamw")
    third.load_state_dict(net.state_dict())
    for one in (theirs, ours):
        one.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch would share it
    theirs.param_groups[0]["fused"] = True
    train(twin, theirs, [1, 2])
    train(third, ours, [1, 2])
    assert torch.equal(third.a, twin.a)
    assert ours.state[third.a]["step"] == 3
    monkeypatch.undo()
    train(net, optimizer, [1, 2])
    torch.testing.assert_close(third.a, net.a)
