"""From words in the config to rules: finishes, options of manifolds, and what is refused."""

import pytest

from geon.engine.build import make_model, make_routing
from geon.errors import UsageError
from geon.launch.compose import compose
from geon.optim.finishes import CautiousDecay, EvenRows, RowCap, UpdateFloor
from tests.launch.jobs import SMALLEST


def rule_of(*options, route="hidden"):
    config = compose([*SMALLEST, *options])
    return make_routing(make_model(config.model), config.optim).rules[route]


def test_finishes_come_in_the_order_of_the_config_and_before_the_short_words():
    words = (
        "{row_cap: {most: 3}, update_floor: {least: 0.2}, cautious_decay: {}, radial_brake: null}"
    )
    rule = rule_of("optim=muon", f"+optim.hidden.finishes={words}", "optim.hidden.even_rows=true")
    assert rule.finishes == (RowCap(3), UpdateFloor(0.2), CautiousDecay(), EvenRows())
    assert rule_of("optim=muon").finishes == ()


def test_a_manifold_takes_its_parameters_from_the_config():
    told = ["optim=nsgd", "optim.hidden.manifold=oblique", "optim.hidden.radius=2"]
    rule = rule_of(*told, "+optim.hidden.manifold_options={axis: columns}")
    assert (rule.manifold.axis, rule.manifold.radius) == ("columns", 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["+@finishes={rowcap: {}}"], "optim.hidden.finishes 'rowcap' is not .* mean .*row_cap"),
        (["+@finishes={row_cap: {least: 1}}"], "finish row_cap takes most, not least"),
        (["+@finishes={row_cap: {most: -1}}"], "row_cap most -1: the longest row must be above 0"),
        (["+@finishes={row_cap: 3}"], "finish row_cap: options must be a mapping, got 3"),
        (["+@finishes={cautious_decay: {}}", "@weight_decay=0"], "but weight_decay is 0"),
        (
            ["@manifold=stiefel", "@weight_decay=0", "+@finishes={row_cap: {}}"],
            "finish row_cap would",
        ),
        (["+@manifold_options={axis: rows}"], "manifold euclidean takes no options, not axis"),
        (
            [
                "@manifold=oblique_columns",
                "@weight_decay=0",
                "@norm=frobenius",
                "+@manifold_options={axis: rows}",
            ],
            "takes no options, not axis",
        ),
    ],
)
def test_refusals_name_the_setting(options, message):
    with pytest.raises(UsageError, match=message):
        rule_of("optim=muon", *(option.replace("@", "optim.hidden.") for option in options))


def test_idle_is_refused_where_it_has_no_effect():
    with pytest.raises(UsageError, match="optim.head: idle='coast' has no effect under AdamW"):
        rule_of("optim=muon", "optim.head.idle=coast")
