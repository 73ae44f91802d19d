import pytest
import torch

from geon.optim.linalg import Precision, ieee_products
from geon.optim.polar import inverse_sqrt


def gauss(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(96, 64, 80), (1, 200, 1)])
@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
def test_three_bf16_products_are_nearly_fp32(shape, batch):
    m, k, n = shape
    a, b = gauss((*batch, m, k)), gauss((*batch, k, n), 1)
    exact = a.double() @ b.double()

    def error(precision):
        return ((precision.product(a, b).double() - exact).norm() / exact.norm()).item()

    assert error(Precision.BF16X3) < 2e-5
    assert error(Precision.FP32) < error(Precision.BF16X3)
    if m > 1:  # one entry may round well by luck
        assert error(Precision.BF16) > 50 * error(Precision.BF16X3)


def test_three_bf16_products_drop_only_lo_times_lo():
    """16 bits split into 8 + 8: the three products must be exact but for the smallest."""
    a = torch.tensor([[1 + 2.0**-7 + 2.0**-12]])
    b = torch.tensor([[1 + 2.0**-6 + 2.0**-13]])
    lost = a.double() * b.double() - Precision.BF16X3.product(a, b).double()
    assert lost.item() == pytest.approx(2.0**-25, abs=2.0**-23)


def test_operands_are_stored_as_the_precision_says():
    stored = {"fp32": torch.float32, "bf16": torch.bfloat16, "bf16x3": torch.float32}
    for word, dtype in stored.items():
        assert Precision(word).cast(gauss((2, 2))).dtype == dtype
        assert Precision(word).cast(gauss((2, 2)).bfloat16()).dtype == dtype
    assert Precision.BF16X3.cast(gauss((2, 2)).double()).dtype == torch.float64


@pytest.fixture
def backend():
    """Setting of fp32 products on CUDA, which a CPU build keeps too; restored by the test."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    yield matmul
    matmul.fp32_precision = before


@pytest.mark.parametrize("outside", ["tf32", "ieee", "none"])
def test_ieee_products_restores_the_setting_also_after_an_error(backend, monkeypatch, outside):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    backend.fp32_precision = outside
    with ieee_products():
        assert backend.fp32_precision == "ieee"
        with ieee_products():
            pass
        assert backend.fp32_precision == "ieee"
    assert backend.fp32_precision == outside
    with pytest.raises(RuntimeError, match="inside"), ieee_products():
        raise RuntimeError("inside")
    assert backend.fp32_precision == outside


def test_ieee_products_touches_nothing_without_cuda(backend, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    backend.fp32_precision = "tf32"
    with ieee_products():
        assert backend.fp32_precision == "tf32"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
def test_tensor_cores_agree_with_the_emulation(backend, batch):
    a, b = gauss((*batch, 96, 64)), gauss((*batch, 64, 80), 1)
    on_device = Precision.BF16X3.product(a.cuda(), b.cuda()).cpu()
    torch.testing.assert_close(on_device, Precision.BF16X3.product(a, b), atol=2e-5, rtol=0)
    backend.fp32_precision = "tf32"
    with ieee_products():
        exact = a.double() @ b.double()
        assert (a.cuda() @ b.cuda() - exact.cuda()).abs().max() < 2e-5


def test_the_gram_form_never_uses_tf32(backend, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    backend.fp32_precision = "tf32"
    seen = set()

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func in (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__):
                seen.add(backend.fp32_precision)
            return func(*args, **(kwargs or {}))

    g = gauss((8, 4))
    gram = g.mT @ g
    with Watch():
        inverse_sqrt(gram)
    assert seen == {"ieee"} and backend.fp32_precision == "tf32"
