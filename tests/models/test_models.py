"""Architectures: declared roles, costs, causality, and logits beside Hugging Face's own code."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from geon.errors import UsageError
from geon.models import GPT, GPT2, MODELS, ModelShape
from geon.models.layers import rotary_table
from geon.optim import Role

SMALL = {"vocab_size": 50, "context": 32, "n_layer": 2, "n_head": 4, "d_model": 64}

OPTIONS = {arch: model.shape_type.defaults() for arch, model in MODELS.items()}
FUSED = [
    (arch, {"fused_qkv": fused} if "fused_qkv" in OPTIONS[arch] else {})
    for arch in sorted(MODELS)
    for fused in ([False, True] if "fused_qkv" in OPTIONS[arch] else [False])
]


def cut(arch):
    """Whether a model has a plan of tensor parallelism."""
    try:
        MODELS[arch].shape_type(**SMALL).check_tensor(2)
    except UsageError:
        return False
    return True


CUT = [arch for arch in MODELS if cut(arch)]


def make(arch, seed=0, **options):
    model = MODELS[arch](ModelShape(**{**SMALL, **options}))
    generator = torch.Generator().manual_seed(seed)
    params = dict(model.named_parameters())
    with torch.no_grad():
        for info in model.roles():
            params[info.name].copy_(model.initial(info, generator))
    return model


def tokens(batch=2, time=32, vocab=50):
    return torch.randint(0, vocab, (batch, time), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("arch", "fused"), FUSED)
def test_every_parameter_has_its_role(arch, fused):
    model = make(arch, **fused)
    infos = {i.name: i for i in model.roles()}
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == {
        n: i.shape for n, i in infos.items()
    }
    hidden = [i for i in infos.values() if i.role is Role.HIDDEN]
    matrices = 0  # experts are a batch of them
    for name, param in model.blocks.named_parameters():
        if param.ndim > 1 and infos[f"blocks.{name}"].role is not Role.OTHER:
            matrices += len(param) if param.ndim == 3 else 3 if "qkv" in name else 1
    assert sum(len(i.parts) for i in hidden) == matrices >= 6 * SMALL["n_layer"]
    assert {i.splits for i in hidden} == ({(64, 64, 64), ()} if fused.get("fused_qkv") else {()})
    blocks = [b for i in hidden for b in i.blocks(per_head=True)]
    assert len(blocks) == matrices + 4 * (SMALL["n_head"] - 1) * SMALL["n_layer"]
    ends = {i.role for n, i in infos.items() if n in ("embed.weight", "head.weight")}
    assert ends == ({Role.EMBEDDING, Role.HEAD} if hasattr(model, "head") else {Role.TIED})


@pytest.mark.parametrize(("arch", "fused"), FUSED)
def test_declared_heads_are_the_heads_that_attend(arch, fused):
    """A head whose output block is zero has blocks of v that nothing depends on."""
    model = make(arch, **fused)
    params = dict(model.named_parameters())
    infos = {i.name: i for i in model.roles() if i.heads}
    (out,) = (n for n in infos if n.startswith("blocks.0") and "proj_out" in n)
    (into,) = (
        n for n in infos if n.startswith("blocks.0") and n.endswith(("qkv.weight", "v.weight"))
    )
    with torch.no_grad():
        params[out][infos[out].blocks(per_head=True)[2].slices] = 0.0
    model(tokens(), tokens()).backward()
    dead = [bool(params[into].grad[b.slices].any()) for b in infos[into].blocks(per_head=True)]
    assert dead[-4:] == [True, True, False, True]  # the last four are those of v


@pytest.mark.parametrize("arch", sorted(MODELS))
def test_the_future_is_not_seen(arch):
    model, x = make(arch), tokens()
    changed = x.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 50
    with torch.no_grad():
        before, after = model(x), model(changed)
    torch.testing.assert_close(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20:], after[:, 20:])


@pytest.mark.parametrize("arch", sorted(MODELS))
def test_flops_are_those_that_torch_counts(arch):
    model, x = make(arch), tokens()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x, x).backward()
    assert counter.get_total_flops() == model.flops_per_token() * x.numel()


@pytest.mark.parametrize("arch", sorted(MODELS))
def test_loss_starts_at_the_uniform_guess_with_a_zero_head(arch):
    model = make(arch, zero_init_proj=True)
    loss = model(tokens(), tokens().roll(7))
    assert loss.item() == pytest.approx(torch.tensor(50.0).log().item(), rel=0.02)


@pytest.mark.parametrize("arch", sorted(MODELS))
def test_activation_checkpointing_changes_nothing(arch):
    grads = []
    for keep in (False, True):
        model = make(arch)
        model.checkpoint_activations = keep
        model(tokens(), tokens()).backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("arch", sorted(MODELS))
def test_compiled_blocks_agree(arch):
    eager, compiled = make(arch), make(arch)
    for block in compiled.shard_units():
        block.compile(backend="aot_eager")
    losses = []
    for model in (eager, compiled):
        loss = model(tokens(), tokens())
        loss.backward()
        losses.append(loss)
    torch.testing.assert_close(*losses)
    for a, b in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_relu_squared_has_the_gradient_that_autograd_finds():
    from geon.models.layers import relu_squared

    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(relu_squared, (x,))
    assert torch.autograd.gradcheck(relu_squared, (x, 2.0))
    torch.testing.assert_close(relu_squared(x, 2.0), (2**0.5 * x.relu()) ** 2)
    torch.testing.assert_close(relu_squared(x), x.relu() ** 2)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 15.0])
def test_gpt_is_nanochat(fused, softcap):
    """Logits of transformers' NanoChatForCausalLM with our weights."""
    hf = pytest.importorskip("transformers")
    model = make("gpt", fused_qkv=fused, softcap=softcap)
    other = hf.NanoChatForCausalLM(
        hf.NanoChatConfig(
            vocab_size=50,
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=32,
            final_logit_softcapping=softcap or None,
            tie_word_embeddings=False,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    state = {"model.embed_tokens.weight": model.embed.weight, "lm_head.weight": model.head.weight}
    for i, block in enumerate(model.blocks):
        proj, layer = block.attention.proj_in, f"model.layers.{i}"
        q, k, v = (
            proj.qkv.weight.chunk(3) if fused else (proj.q.weight, proj.k.weight, proj.v.weight)
        )
        state |= {
            f"{layer}.self_attn.q_proj.weight": q,
            f"{layer}.self_attn.k_proj.weight": k,
            f"{layer}.self_attn.v_proj.weight": v,
            f"{layer}.self_attn.o_proj.weight": block.attention.proj_out.weight,
            f"{layer}.mlp.fc1.weight": block.up.weight,
            f"{layer}.mlp.fc2.weight": block.down.weight,
        }
    other.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()), other(tokens()).logits, atol=2e-5, rtol=1e-4)


def test_gpt2_is_gpt2():
    """Logits of transformers' GPT2LMHeadModel, whose Conv1D stores (in, out) and fuses q, k, v."""
    hf = pytest.importorskip("transformers")
    model = make("gpt2", fused_qkv=True)
    other = hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=50, n_positions=32, n_embd=64, n_layer=2, n_head=4)
    ).eval()
    ours, names = dict(model.named_parameters()), {}
    names |= {"embed": "wte", "positions": "wpe", "norm": "ln_f"}
    for i in range(2):
        pairs = ("norm1 ln_1", "proj_in.qkv attn.c_attn", "proj_out attn.c_proj")
        for pair in (*pairs, "norm2 ln_2", "up mlp.c_fc", "down mlp.c_proj"):
            a, b = pair.split()
            names[f"blocks.{i}.{a}"] = f"h.{i}.{b}"
    state = other.state_dict()
    with torch.no_grad():
        for a, b in names.items():
            for leaf in ("weight", "bias"):
                if f"{a}.{leaf}" in ours:
                    value = ours[f"{a}.{leaf}"]
                    transposed = ".c_" in b and leaf == "weight"
                    state[f"transformer.{b}.{leaf}"].copy_(value.mT if transposed else value)
        torch.testing.assert_close(model(tokens()), other(tokens()).logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("model", "published"),
    [
        # GPT-2 small, medium: parameter counts of the released models, vocabulary 50257.
        (GPT2, {"n_layer": 12, "n_head": 12, "d_model": 768, "count": 124_439_808}),
        (GPT2, {"n_layer": 24, "n_head": 16, "d_model": 1024, "count": 354_823_168}),
        # 12 L d^2 hidden weights and two tables.
        (GPT, {"n_layer": 4, "n_head": 4, "d_model": 128, "count": 786_432 + 2 * 50257 * 128}),
    ],
)
def test_parameter_counts(model, published):
    sizes = dict(published)
    count = sizes.pop("count")
    with torch.device("meta"):
        built = model(ModelShape(vocab_size=50257, context=1024, **sizes))
    assert built.parameter_count() == count == sum(p.numel() for p in built.parameters())


def test_bad_shapes_name_the_key():
    with pytest.raises(UsageError, match=r"model.d_model 64.*model.n_head 5"):
        make("gpt", n_head=5)
    with pytest.raises(UsageError, match="model.n_layer must be positive"):
        make("gpt", n_layer=0)
    with pytest.raises(UsageError, match=r"33 tokens.*model.context"):
        make("gpt2")(tokens(time=33))


@pytest.mark.parametrize("arch", CUT)
def test_tensor_parallelism_cuts_every_hidden_matrix_and_whole_heads(arch):
    from geon.configs.schema import Layouts, ParallelConfig
    from geon.engine.parallel import planned_layouts

    model = MODELS[arch](ModelShape(64, 16, 2, 4, 32))
    layouts = planned_layouts(model, ParallelConfig(Layouts.tp), 2)
    for info in model.infos:
        held = layouts[info.name].name
        if info.role == "hidden":
            by_cols = info.name.endswith(("proj_out.weight", "down.weight"))
            assert held == ("cols/2" if by_cols else "rows/2"), info.name
        elif info.role in ("gain", "tied"):
            assert held == "whole x2", info.name
    # Two mesh dimensions on one axis: tensor parallelism first, FSDP2 within.
    both = planned_layouts(model, ParallelConfig(Layouts.fsdp, tensor=2), 4)
    assert both["blocks.0.up.weight"].name == "rows/4"
    assert both["blocks.0.down.weight"].name == "cols/4"  # wide: along its long side
    rows = planned_layouts(model, ParallelConfig(Layouts.fsdp, tensor=2, long_side=False), 4)
    assert rows["blocks.0.down.weight"].name == "rows/2 cols/2"


def test_planned_cuts_name_the_mesh_dimensions_in_order_of_cutting():
    from geon.configs.schema import Layouts, ParallelConfig
    from geon.engine.parallel import mesh_shape, planned_cuts

    model = MODELS["gpt"](ModelShape(64, 16, 2, 4, 32))
    config = ParallelConfig(Layouts.hsdp, replicas=2, tensor=2)
    assert list(mesh_shape(config, 8).items()) == [("replicate", 2), ("shard", 2), ("tensor", 2)]
    cuts = planned_cuts(model, config, 8)
    both = {name: list(own.items()) for name, own in cuts.items()}
    assert both["blocks.0.up.weight"] == [("tensor", 0), ("shard", 0)]
    assert both["blocks.0.down.weight"] == [("tensor", 1), ("shard", 1)]
    assert both["blocks.0.attention.proj_out.weight"] == [("tensor", 1), ("shard", 0)]
    assert both["embed.weight"] == both["head.weight"] == [("tensor", 0), ("shard", 0)]
    tied = planned_cuts(MODELS["gpt2"](ModelShape(64, 16, 2, 4, 32)), config, 8)
    assert tied["embed.weight"] == tied["blocks.0.norm1.weight"] == {"shard": 0}
    assert tied["blocks.0.up.bias"] == {"tensor": 0, "shard": 0}
    assert tied["blocks.0.down.bias"] == {"shard": 0}
    assert not any(planned_cuts(model, ParallelConfig(Layouts.ddp), 4).values())
    # 24 columns divide by 8 shards, but not the 12 that 2 tensor ranks leave of them.
    small = MODELS["gpt"](ModelShape(64, 16, 1, 4, 8, mlp_ratio=3))
    cuts = planned_cuts(small, ParallelConfig(Layouts.fsdp, tensor=2), 16)
    assert cuts["blocks.0.down.weight"] == {"tensor": 1, "shard": 0}


@pytest.mark.parametrize("arch", CUT)
def test_tensor_ranks_attend_with_their_own_heads(arch):
    """Branches of the cut weights add up to the branch of the whole ones."""
    from geon.configs.schema import Layouts, ParallelConfig
    from geon.engine.parallel import planned_cuts

    def branch(cut):
        model = make(arch)
        torch.nn.init.zeros_(model.blocks[0].down.weight)  # attention alone
        for name, cuts in planned_cuts(model, ParallelConfig(Layouts.tp), 2).items():
            if name.startswith("blocks.0.") and cuts and cut is not None:
                param = model.get_parameter(name)
                param.data = param.data.chunk(2, cuts["tensor"])[cut]
        with torch.no_grad():
            return model.blocks[0](x, *rotary) - x

    x = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(2))
    rotary = rotary_table(8, 16, 10000.0, x.device) if arch != "gpt2" else ()
    torch.testing.assert_close(branch(0) + branch(1), branch(None), atol=1e-5, rtol=1e-4)


def test_gains_multiply_rows_and_columns_and_change_nothing_at_first():
    plain, model = make("gpt"), make("gpt", gains=True)
    shared = {n: p for n, p in model.named_parameters() if n.endswith("weight")}
    plain.load_state_dict(shared)
    x = tokens()
    assert torch.equal(plain(x), model(x))
    gains = [i for i in model.infos if i.role is Role.GAIN]
    assert len(gains) == 2 * 6 * SMALL["n_layer"]
    params = dict(model.named_parameters())
    with torch.no_grad():
        for i, info in enumerate(gains):
            params[info.name].copy_(1 + 0.3 * torch.randn(info.shape, generator=gen(i)))
        for name, weight in plain.named_parameters():
            at = name.removesuffix("weight")
            if f"{at}rows" in params:
                weight.copy_(params[f"{at}rows"].diag() @ shared[name] @ params[f"{at}cols"].diag())
    assert torch.allclose(plain(x), model(x), atol=1e-5)


def test_a_tied_gpt_reads_and_predicts_by_one_weight_without_a_norm_between():
    """By the formula, with branches that are zero: head of the normalised embedding."""
    model = make("gpt", tied=True, zero_init_proj=True, activation_scale=2.0)
    names = [name for name, _ in model.named_parameters()]
    assert "head.weight" not in names and "embed" not in model.tp_plan()
    weight = model.get_parameter("embed.weight")
    assert 0.9 < weight.std() * (3 * 64) ** 0.5 < 1.1
    x = weight[tokens()]
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() @ weight.mT
    torch.testing.assert_close(model(tokens()), expected)
    (info,) = (i for i in model.infos if i.name == "embed.weight")
    assert info.role is Role.TIED


@pytest.mark.parametrize("arch", ["gpt2", "gpt_track3"])
@pytest.mark.parametrize("option", [{"tied": True}, {"activation_scale": 2.0}, {"gains": True}])
def test_options_of_gpt_are_refused_by_the_others(arch, option):
    with pytest.raises(UsageError, match=f"model.{next(iter(option))}"):
        make(arch, **option)


def gen(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("arch", sorted(MODELS))
def test_mup_changes_nothing_at_the_base_width_and_scales_by_role_beyond(arch):
    standard, base = make(arch), make(arch, mup=True, base_width=64)
    assert all(
        torch.equal(a, b) for a, b in zip(standard.parameters(), base.parameters(), strict=True)
    )
    assert torch.equal(standard(tokens()), base(tokens()))
    wide = make(arch, mup=True, base_width=16)
    by_role = {info.role: wide.rate_scale(info) for info in wide.infos}
    assert by_role.pop(Role.HIDDEN) == 0.25
    assert set(by_role.values()) == {1.0}
    x = wide.hidden(tokens())
    weight = wide.embed.weight if arch == "gpt2" else wide.head.weight
    bias = 0 if wide.head_bias is None else wide.head_bias
    assert torch.allclose(wide.unembed(x), 0.25 * (x @ weight.mT + bias), atol=1e-6)


@pytest.mark.parametrize("arch", sorted(MODELS))
def test_the_draw_of_mup_keeps_the_head_and_shrinks_hidden_matrices_with_the_width(arch):
    sizes = {}
    for width in (64, 256):
        model = make(arch, mup=True, base_width=64, d_model=width)
        params = dict(model.named_parameters())
        for role in (Role.HIDDEN, Role.HEAD, Role.TIED):
            stds = [params[i.name].detach().std() for i in model.infos if i.role is role]
            if stds:
                sizes[role, width] = float(torch.stack(stds).mean())
    for (role, width), size in sizes.items():
        wanted = 0.5 if role is Role.HIDDEN and width == 256 else 1.0
        assert size / sizes[role, 64] == pytest.approx(wanted, rel=0.05)
