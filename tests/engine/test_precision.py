"""parallel.precision: what the words stand for on each kind of device."""

import pytest
import torch

from geon.configs.choices import Precision
from geon.engine import devices, metrics
from geon.engine.build import make_model, make_routing, native_half
from geon.engine.devices import arithmetic
from geon.launch.compose import compose
from geon.optim.linalg import Precision as Products
from tests.launch.jobs import SMALLEST


@pytest.mark.parametrize("instructions", [True, False])
def test_words_and_devices(monkeypatch, instructions):
    monkeypatch.setattr(devices, "bf16_instructions", lambda: instructions)
    found = {
        (word.value, device): arithmetic(word, device) is torch.bfloat16
        for word in Precision
        for device in ("cpu", "cuda")
    }
    assert found == {
        ("auto", "cpu"): False,
        ("auto", "cuda"): True,
        ("native", "cpu"): instructions,
        ("native", "cuda"): True,
        ("fp32", "cpu"): False,
        ("fp32", "cuda"): False,
        ("bf16", "cpu"): True,
        ("bf16", "cuda"): True,
    }


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": True}, True),
        ({"avx512_f": True, "avx512_bf16": False}, False),
        ({"cpu_name": "bf"}, False),
    ],
)
def test_instructions_are_those_that_torch_reports(monkeypatch, flags, found):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    assert metrics.bf16_instructions() == found


@pytest.mark.parametrize(
    ("words", "products"),
    [
        (["parallel.precision=native"], Products.BF16),
        (["parallel.precision=native", "optim.polar.dtype=fp32"], Products.FP32),
        (["parallel.precision=bf16"], None),
        ([], None),
    ],
)
def test_polar_factors_follow_native_unless_told(monkeypatch, words, products):
    monkeypatch.setattr(devices, "bf16_instructions", lambda: True)
    config = compose([*SMALLEST, "optim=muon", *words])
    routing = make_routing(make_model(config.model), config.optim, native_half(config, "cpu"))
    assert routing.rules["hidden"].norm.polar.precision is products
