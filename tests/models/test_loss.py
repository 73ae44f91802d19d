"""The loss from hidden activations, beside torch's cross-entropy of the logits."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from geon.models import GPT, GPT2, IGNORED, GPTTrack3, ModelShape, loss
from geon.models.layers import rotary_table
from geon.models.loss import linear_cross_entropy

ROWS, WIDTH, VOCAB = 13, 6, 9


def operands(dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, WIDTH, dtype=torch.float64, generator=draw).to(dtype)
    weight = torch.randn(VOCAB, WIDTH, dtype=torch.float64, generator=draw).to(dtype)
    targets = torch.randint(0, VOCAB, (ROWS,), generator=draw)
    targets[[0, 7]] = IGNORED
    return x.requires_grad_(), weight.requires_grad_(), targets


def reference(x, weight, targets, scale, softcap):
    logits = scale * (x.double() @ weight.double().mT)
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    return F.cross_entropy(logits, targets)


CASES = pytest.mark.parametrize(
    ("scale", "softcap", "chunks"), [(1.0, 0.0, 1), (0.5, 3.0, 1), (0.5, 0.0, 4), (1.0, 3.0, 50)]
)


@CASES
@pytest.mark.parametrize("block", [2**18, 2 * VOCAB])
def test_loss_and_gradients_are_those_of_the_logits(monkeypatch, block, scale, softcap, chunks):
    monkeypatch.setattr(loss, "_CPU_BLOCK", block)
    x, weight, targets = operands()
    ours = linear_cross_entropy(x, weight, targets, scale, softcap, chunks)
    theirs = reference(x, weight, targets, scale, softcap)
    torch.testing.assert_close(ours, theirs)
    for mine, other in zip(
        torch.autograd.grad(3 * ours, (x, weight)),
        torch.autograd.grad(3 * theirs, (x, weight)),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)
    assert torch.autograd.gradcheck(
        lambda *of: linear_cross_entropy(*of, targets, scale, softcap, chunks), (x, weight)
    )
    with torch.no_grad():
        alone = linear_cross_entropy(x, weight, targets, scale, softcap, chunks)
    assert alone == ours and not alone.requires_grad


@pytest.mark.parametrize(("scale", "chunks"), [(1.0, 1), (0.5, 4)])
@pytest.mark.parametrize("block", [2**18, 2 * VOCAB])
def test_a_bias_and_the_rational_softcap_have_their_exact_gradients(
    monkeypatch, block, scale, chunks
):
    """Beside torch's autograd of the formula; logits reach far beyond the cap of 3."""
    monkeypatch.setattr(loss, "_CPU_BLOCK", block)
    x, weight, targets = operands()
    bias = torch.linspace(-9, 9, VOCAB, dtype=torch.float64, requires_grad=True)
    ours = linear_cross_entropy(x, weight, targets, scale, 3.0, chunks, bias, True)
    z = scale * (x @ weight.mT + bias)
    theirs = F.cross_entropy(3 * z / (z**2 + 9).sqrt(), targets)
    torch.testing.assert_close(ours, theirs)
    inputs = (x, weight, bias)
    for mine, other in zip(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True
    ):
        torch.testing.assert_close(mine, other)


@CASES
@pytest.mark.parametrize("autocast", [False, True])
def test_in_bf16_sums_are_fp32(autocast, scale, softcap, chunks):
    x, weight, targets = operands(torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = linear_cross_entropy(x, weight, targets, scale, softcap, chunks)
    rounded = [one.detach().bfloat16().double().requires_grad_() for one in (x, weight)]
    theirs = reference(*rounded, targets, scale, softcap)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=5e-3)
    found = torch.autograd.grad(ours, (x, weight))
    for mine, other, of in zip(
        found, torch.autograd.grad(theirs, rounded), (x, weight), strict=True
    ):
        assert mine.dtype == of.dtype
        torch.testing.assert_close(mine.double(), other, rtol=0.02, atol=2e-3)


class Largest(TorchDispatchMode):
    """Numbers of entries of the storages that operations make, by address."""

    def __init__(self):
        super().__init__()
        self.kept = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, torch.Tensor):  # kept alive, so that no address comes twice
                self.kept[one.untyped_storage().data_ptr()] = (one.untyped_storage(), one)
        return out

    def sizes(self):
        return sorted((one.numel() for _, one in self.kept.values()), reverse=True)


@pytest.mark.parametrize("chunks", [1, 4])
def test_one_copy_of_the_logits_exists_and_of_a_piece_when_cut(monkeypatch, chunks):
    monkeypatch.setattr(loss, "_CPU_BLOCK", 2 * 500)
    rows, vocab = 64, 500
    x, weight = torch.randn(rows, 4, requires_grad=True), torch.randn(vocab, 4, requires_grad=True)
    with Largest() as seen:
        linear_cross_entropy(x, weight, torch.zeros(rows, dtype=torch.long), 0.5, 3.0, chunks)
    logits = [size for size in seen.sizes() if size > vocab * 4]
    assert logits == [rows * vocab // chunks] * chunks


def gpt(arch, **options):
    model = arch(ModelShape(500, 32, 2, 4, 64, **options))
    return model, torch.randint(0, 500, (2, 32), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("arch", [GPT, GPT2, GPTTrack3])
@pytest.mark.parametrize("softcap", [0.0, 15.0])
def test_a_model_s_loss_is_that_of_its_logits(arch, softcap):
    """The tied weight of gpt2 too, which gets gradients from both of its uses."""
    model, tokens = gpt(arch, softcap=softcap, mup=True, base_width=32)
    model.loss_chunks = 3
    ours = model(tokens, tokens)
    theirs = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    torch.testing.assert_close(ours, theirs)
    params = list(model.parameters())
    for mine, other in zip(
        torch.autograd.grad(ours, params), torch.autograd.grad(theirs, params), strict=True
    ):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("arch", [GPT, GPT2])
def test_compiled_in_bf16_nothing_large_is_kept_in_fp32_and_no_logits(arch):
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    kept = []

    def forward(graph, inputs):
        (output,) = graph.graph.find_nodes(op="output")
        made = [n for n in output.args[0] if n is not None and n.op != "placeholder"]
        kept.extend(n.meta["val"] for n in made)
        return make_boxed_func(graph)

    torch._dynamo.reset()
    backend = aot_autograd(
        fw_compiler=forward,
        bw_compiler=lambda graph, inputs: make_boxed_func(graph),
        partition_fn=min_cut_rematerialization_partition,
    )
    model, tokens = gpt(arch, softcap=15.0)
    with torch.autocast("cpu", torch.bfloat16):
        ours = torch.compile(model, backend=backend, dynamic=False)(tokens, tokens)
        ours.backward()
        torch.testing.assert_close(ours, model(tokens, tokens), atol=2e-3, rtol=0)
    torch._dynamo.reset()
    assert len(kept) > 20
    assert not [one.shape for one in kept if one.shape[-1:] == (500,)]
    stream = tokens.numel() * 64
    assert not [one.shape for one in kept if one.dtype == torch.float32 and one.numel() >= stream]


def test_rotary_tables_are_made_once_and_fake_ones_never_kept():
    cpu = torch.device("cpu")
    cos, sin = rotary_table(7, 8, 100.0, cpu)
    angle = torch.arange(7)[:, None] * 100.0 ** (-torch.arange(4) / 4)
    torch.testing.assert_close(cos, angle.cos())
    torch.testing.assert_close(sin, angle.sin())
    with FakeTensorMode():
        for time in (7, 9):
            fake, _ = rotary_table(time, 8, 100.0, cpu)
            assert type(fake) is not torch.Tensor and fake.shape == (time, 4)
    assert rotary_table(7, 8, 100.0, cpu)[0] is cos
    assert type(rotary_table(9, 8, 100.0, cpu)[0]) is torch.Tensor
    assert rotary_table(7, 8, 100.0, torch.device("meta"))[0].is_meta
