import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from geon.optim.linalg import Precision, ieee_products, multiply_add, rough_product
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


@pytest.mark.parametrize("stored", ["by rows", "by columns", "in steps"])
def test_a_bf16x3_product_is_one_product_and_copies_nothing_in_another_order(stored):
    """Three calls and their sums cost a GPU more than the arithmetic; so do strided copies."""
    a, b = gauss((3, 48, 64)), gauss((3, 64, 32), 1)
    if stored == "by columns":
        a, b = a.mT.contiguous().mT, b.mT.contiguous().mT
    elif stored == "in steps":
        a, b = gauss((3, 48, 128))[..., ::2], gauss((3, 64, 64), 1)[..., ::2]
    with FlopCounterMode(display=False) as counter, Multiplied() as seen:
        got = Precision.BF16X3.product(a, b)
    assert counter.get_total_flops() == 3 * 2 * 3 * 48 * 64 * 32
    assert len(seen.operands) == 1
    x, y = seen.operands[0]
    assert x.shape == (3, 48, 192) and y.shape == (3, 192, 32)
    if stored == "by columns":
        assert x.mT.is_contiguous() and y.mT.is_contiguous()
    exact = a.double() @ b.double()
    assert (got - exact).norm() < 1e-5 * exact.norm()


class Multiplied(TorchDispatchMode):
    """Notes the operands of batched products."""

    def __init__(self):
        super().__init__()
        self.operands = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten.bmm:
            self.operands.append(args[:2])
        return func(*args, **(kwargs or {}))


def test_bf16x3_adds_a_base():
    base, a, b = gauss((2, 48, 32)), gauss((2, 48, 64), 1), gauss((2, 64, 32), 2)
    got = multiply_add(0.5, base, -2.0, a, b, Precision.BF16X3)
    exact = 0.5 * base.double() - 2.0 * (a.double() @ b.double())
    assert (got - exact).norm() < 1e-5 * exact.norm()


def test_rough_products_round_operands_alone():
    """Beside bf16x3: one bf16 product with a wide result. Beside fp32 there is nothing rough."""
    a, b = gauss((48, 64)), gauss((64, 32), 1)
    exact = a.bfloat16().double() @ b.bfloat16().double()
    torch.testing.assert_close(
        rough_product(a, b, Precision.BF16X3).double(), exact, atol=1e-4, rtol=0
    )
    for precision in (None, Precision.FP32):
        assert torch.equal(rough_product(a, b, precision), a @ b)


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
