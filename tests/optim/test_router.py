import pytest
import torch
from torch import nn

from geon.errors import UsageError
from geon.optim import ParamInfo, Role, Route, classify, route
from geon.optim.router import check_partition, table

INFOS = [
    ParamInfo("embed.weight", (10, 4), Role.EMBEDDING),
    ParamInfo("blocks.0.q.weight", (4, 4), Role.HIDDEN),
    ParamInfo("blocks.0.up.weight", (16, 4), Role.HIDDEN),
    ParamInfo("head.weight", (10, 4), Role.HEAD),
    ParamInfo("norm.weight", (4,), Role.GAIN),
]


def by_role(name, *roles):
    return Route(name, frozenset(roles))


ALL = [
    by_role("hidden", Role.HIDDEN),
    by_role("ends", Role.EMBEDDING, Role.HEAD),
    by_role("rest", Role.GAIN, Role.BIAS, Role.SCALAR),
]


def test_each_parameter_once_in_order():
    assigned = route(INFOS, ALL)
    assert assigned == {
        "embed.weight": "ends",
        "blocks.0.q.weight": "hidden",
        "blocks.0.up.weight": "hidden",
        "head.weight": "ends",
        "norm.weight": "rest",
    }
    text = table(INFOS, assigned, dict.fromkeys(("hidden", "ends", "rest"), "rule"))
    assert "blocks.0.q.weight" in text


def test_patterns_win_over_roles_when_first():
    assigned = route(INFOS, [Route("q", pattern="*.q.weight"), *ALL])
    assert assigned["blocks.0.q.weight"] == "q"
    assert assigned["blocks.0.up.weight"] == "hidden"


def test_a_parameter_without_route_is_refused_by_name():
    with pytest.raises(UsageError, match=r"'norm.weight' of role 'gain'.*optim.gain"):
        route(INFOS, ALL[:2])


def test_a_pattern_that_takes_nothing_is_refused():
    with pytest.raises(UsageError, match=r"'\*\.kq\.weight'.*takes no parameter"):
        route(INFOS, [Route("typo", pattern="*.kq.weight"), *ALL])


def test_partition_is_proved():
    check_partition(["a", "b"], [["a"], ["b"]])
    for groups, words in (
        ([["a"]], "no param group: b"),
        ([["a", "b"], ["b"]], "'b' is in two"),
        ([["a", "b", "c"]], "'c', which the model does not have"),
    ):
        with pytest.raises(UsageError, match=words):
            check_partition(["a", "b"], groups)


def test_matrix_roles_need_matrices_and_splits_must_add_up():
    with pytest.raises(ValueError, match="needs a matrix"):
        ParamInfo("w", (3, 4, 5), Role.HEAD)
    with pytest.raises(ValueError, match="needs a matrix"):
        ParamInfo("w", (3, 4, 5, 6), Role.HIDDEN)
    with pytest.raises(ValueError, match="of a batch of matrices"):
        ParamInfo("w", (3, 4, 5), Role.HIDDEN, splits=(1, 2))
    assert ParamInfo("w", (2, 4, 5), Role.HIDDEN).parts == ((0, 4), (4, 8))
    with pytest.raises(ValueError, match="sum to 5"):
        ParamInfo("w", (6, 4), Role.HIDDEN, splits=(2, 3))


class Foreign(nn.Module):
    def __init__(self, tie):
        super().__init__()
        self.wte = nn.Embedding(10, 4)
        self.up = nn.Linear(4, 8)
        self.norm = nn.LayerNorm(4)
        self.temperature = nn.Parameter(torch.ones(()))
        self.lm_head = nn.Linear(4, 10, bias=False)
        if tie:
            self.lm_head.weight = self.wte.weight


def test_foreign_models_are_classified_by_module_type():
    roles = {i.name: i.role for i in classify(Foreign(tie=False))}
    assert roles == {
        "temperature": Role.SCALAR,
        "wte.weight": Role.EMBEDDING,
        "up.weight": Role.HIDDEN,
        "up.bias": Role.BIAS,
        "norm.weight": Role.GAIN,
        "norm.bias": Role.BIAS,
        "lm_head.weight": Role.HEAD,
    }
    tied = {i.name: i.role for i in classify(Foreign(tie=True))}
    assert tied["wte.weight"] == Role.TIED
    assert "lm_head.weight" not in tied


@pytest.mark.parametrize(
    "module",
    [
        nn.ConvTranspose1d(3, 4, 5),
        nn.ModuleDict({"c_attn": nn.Linear(4, 12)}),
        nn.Bilinear(2, 3, 4),
    ],
)
def test_foreign_parameters_that_are_unsure_are_refused(module):
    with pytest.raises(UsageError, match="unsure about"):
        classify(module)


def test_an_optional_pattern_may_take_nothing():
    infos = [ParamInfo("a.weight", (4, 4), Role.HIDDEN)]
    routes = [Route("q", pattern="*.q.*", optional=True), Route("rest", frozenset({Role.HIDDEN}))]
    assert route(infos, routes) == {"a.weight": "rest"}
