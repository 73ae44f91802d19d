"""The fit of best rates, on searches whose answer is a formula."""

import pytest

from geon.configs.rate import BATCH_POWER, TOKENS_POWER
from geon.launch.local import ROOT
from geon.studies import rate_rule
from geon.studies.rate_rule import Found


def test_a_power_law_is_found_again():
    points = [
        Found("made", tokens, batch, 0.3 * tokens**-0.4 * batch**0.7)
        for tokens in (1e5, 1e6, 1e7)
        for batch in (512, 4096)
    ]
    fitted = rate_rule.fit(points)
    assert fitted[1:] == pytest.approx((-0.4, 0.7))
    assert rate_rule.rate(fitted, 2e6, 1024) == pytest.approx(0.3 * 2e6**-0.4 * 1024**0.7)


def test_the_powers_that_runs_use_are_those_of_the_hybrids_searches():
    found = rate_rule.verdict(ROOT / "docs", "hybrid")
    powers = found["tokens_power"], found["batch_power"]
    assert powers == pytest.approx((TOKENS_POWER, BATCH_POWER), abs=0.005)
    assert found["rms_octaves"] < 0.15
