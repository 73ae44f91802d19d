"""What `classify` sees through, what it is told, and what it says when it is unsure."""

import re

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from geon.errors import UsageError
from geon.optim import ParamInfo, Role, classify, fused, stored
from tests.foreign.families import HEADS, WIDTH, NanoGPT, make
from tests.foreign.toys import Holds, linear, net, roles, weights


def bare(names):
    return [re.sub(r"(module|_orig_mod)\.", "", name) for name in names]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: torch.compile(m, backend="eager"),
        DistributedDataParallel,
        lambda m: torch.compile(DistributedDataParallel(m), backend="eager"),
        checkpoint_wrapper,
    ],
    ids=["compiled", "ddp", "compiled ddp", "checkpointed"],
)
@pytest.mark.parametrize("family", ["nanoGPT", "GPT-2", "GPT-NeoX", "ViT", "GPT-OSS"])
def test_wrappers_are_looked_through(family, wrap, one_rank):
    plain, wrapped = classify(make(family)), wrap(make(family))
    found = classify(wrapped)
    assert [info.name for info in found] == [name for name, _ in wrapped.named_parameters()]
    assert bare(i.name for i in found) == [i.name for i in plain]
    for one, other in zip(plain, found, strict=True):
        assert (one.role, one.storage, one.heads) == (other.role, other.storage, other.heads)


def test_layers_that_are_compiled_checkpointed_or_sharded_are_looked_through(one_rank):
    plain = weights(make("nanoGPT"))
    model = make("nanoGPT")
    for index, block in enumerate(model.transformer.h):
        model.transformer.h[index] = checkpoint_wrapper(torch.compile(block, backend="eager"))
    assert list(weights(model).values()) == list(plain.values())
    model = make("Phi-3")
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert weights(model) == weights(make("Phi-3"))
    assert [i.splits for i in classify(model)] == [i.splits for i in classify(make("Phi-3"))]


def test_flat_parameters_are_refused(one_rank):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(make("nanoGPT"), device_id=torch.device("cpu"))
    with pytest.raises(UsageError, match="FullyShardedDataParallel.*fully_shard"):
        classify(model)


def lora(family, targets, **options):
    return get_peft_model(make(family), LoraConfig(r=4, target_modules=targets, **options))


def test_adapters_are_hidden_matrices_and_their_base_is_what_it_was():
    phi = {i.name.split("layers.0.")[-1]: i for i in classify(lora("Phi-3", ["qkv_proj"]))}
    assert phi["self_attn.qkv_proj.lora_B.default.weight"].splits == (32, 16, 16)
    found = {i.name: i for i in classify(lora("GPT-2", ["c_attn", "c_fc"]))}
    base = "base_model.model.transformer.h.0.attn.c_attn."
    assert found[f"{base}base_layer.weight"].splits == (WIDTH,) * 3
    assert found[f"{base}base_layer.weight"].transposed
    assert found[f"{base}lora_A.default.weight"].role == Role.HIDDEN
    # delta W = B A: what q, k and v share is A, and each has its rows of B.
    assert found[f"{base}lora_B.default.weight"].splits == (WIDTH,) * 3
    assert not found[f"{base}lora_B.default.weight"].transposed
    assert found["base_model.model.transformer.wte.weight"].role == Role.TIED


def test_frozen_parameters_need_no_word():
    """No adapter is unsure, and a base that nobody trains may be of any kind."""
    model = nn.ModuleDict({"qkv": nn.Linear(8, 24), "last": nn.Linear(8, 8)})
    with pytest.raises(UsageError, match="unsure about 1 parameters"):
        classify(model)
    model["qkv"].requires_grad_(False)
    assert roles(model)["qkv.weight"] == "other"
    model["qkv"].weight = nn.Parameter(torch.zeros(24, 8, dtype=torch.int8), requires_grad=False)
    assert "qkv.weight" not in roles(model)  # quantised: no optimizer steps it


class Tied(nn.Module):
    def __init__(self, head_first):
        super().__init__()
        names = ["out", "tokens"] if head_first else ["tokens", "out"]
        for name in names:
            module = nn.Embedding(31, 8) if name == "tokens" else nn.Linear(8, 31, bias=False)
            setattr(self, name, module)
        self.out.weight = self.tokens.weight
        self.up = nn.Linear(8, 16)


@pytest.mark.parametrize("head_first", [False, True])
def test_a_head_that_shares_an_embedding_is_tied_whichever_comes_first(head_first):
    name = "out.weight" if head_first else "tokens.weight"
    assert weights(Tied(head_first)) == {name: "tied", "up.weight": "hidden"}


def unknown():
    return Holds(
        layers=nn.ModuleList(
            Holds(qkv=linear(24), mix=nn.Bilinear(2, 3, 4, bias=False)) for _ in range(3)
        ),
        table=nn.Parameter(torch.zeros(5, 8)),
        head=linear(3),
    )


def test_all_unsure_parameters_are_named_at_once_with_lines_that_work():
    with pytest.raises(UsageError) as caught:
        classify(unknown())
    said = str(caught.value)
    assert "unsure about 7 parameters" in said
    for words in ("'layers.0.qkv.weight' (24, 8), 3 of them", "'table' (5, 8)", "fallback=True"):
        assert words in said
    written = pasted(said)
    assert sorted(written) == ["layers.*.mix.weight", "layers.*.qkv.weight", "table"]
    found = {i.name: i for i in classify(unknown(), written)}
    assert found["layers.1.qkv.weight"].splits == (8, 8, 8)


def pasted(said):
    """The lines of a refusal, as a user would paste them into a call."""
    lines = [line for line in said.splitlines() if line.startswith("    ")]
    return eval("{\n" + "\n".join(lines) + "\n}", {"fused": fused, "stored": stored})


def test_a_line_names_no_parameter_but_those_that_are_unsure():
    """Where a glob would match others, or weights of other shapes, each is written out."""
    model = net(nn.ConvTranspose2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), linear(3))
    sure = {"1.weight": "hidden", "3.weight": "head"}
    assert {n: r for n, r in weights(model, fallback=True).items() if n in sure} == sure
    with pytest.raises(UsageError, match='"0.weight": "other",') as caught:
        classify(model)
    found = weights(model, overrides=pasted(str(caught.value)))
    assert found == {"0.weight": "other", **sure}
    stages = Holds(
        stages=nn.ModuleList(Holds(qkv=linear(3 * size, size)) for size in (8, 8, 16)),
        head=linear(3),
    )
    with pytest.raises(UsageError) as caught:
        classify(stages)
    splits = [i.splits for i in classify(stages, pasted(str(caught.value))) if i.splits]
    assert splits == [(8,) * 3, (8,) * 3, (16,) * 3]


class NormalisedLinear(nn.Linear):
    """A Linear with a norm in its name."""


class GEGLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = linear(32)


UNSURE = {
    "k and v": Holds(q=linear(), kv=linear(16), proj=linear(), head=linear(3)),
    "q and k": Holds(attn=Holds(qk=linear(16), v=linear()), head=linear(3)),
    "under a name": Holds(qkv=Holds(linear=linear(24)), head=linear(3)),
    "latent": Holds(wkv_b=linear(24), head=linear(3)),
    "gated": Holds(mlp=Holds(w_in=linear(32), w_out=linear(8, 16)), head=linear(3)),
    "gated by a module": Holds(
        ff=Holds(net=nn.ModuleList([GEGLU(), linear(8, 16)])), head=linear(3)
    ),
    "three in one": Holds(mix=Holds(there=linear(24), back=linear()), head=linear(3)),
    "convolution": Holds(qkv=Holds(conv=nn.Conv1d(8, 24, 1, bias=False)), head=linear(3)),
}


@pytest.mark.parametrize("kind", list(UNSURE))
def test_what_several_matrices_may_share_is_never_one_without_a_word(kind):
    with pytest.raises(UsageError, match="unsure about 1 parameters"):
        classify(UNSURE[kind])


def test_a_plain_mlp_is_not_suspected():
    for model in (
        Holds(fc1=linear(16), fc2=linear(8, 16), head=linear(3)),
        Holds(up=linear(32), act=nn.GELU(), down=linear(8, 32), head=linear(3)),
        Holds(a=linear(16), b=linear(16), both=linear(8, 16), head=linear(3)),
        Holds(normal=NormalisedLinear(8, 16, bias=False), back=linear(8, 16), head=linear(3)),
    ):
        assert set(weights(model).values()) == {"hidden", "head"}


def test_gated_queries_are_fused_head_by_head():
    """Qwen3-Next's q_proj holds q and the gate of the output for each head."""
    config = hf.Qwen3NextConfig(
        vocab_size=97,
        hidden_size=WIDTH,
        intermediate_size=44,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        head_dim=8,
        layer_types=["full_attention"],
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )
    found = {i.name: i for i in classify(hf.Qwen3NextForCausalLM(config), fallback=True)}
    info = found["model.layers.0.self_attn.q_proj.weight"]
    assert (info.splits, info.interleaved) == ((WIDTH, WIDTH), HEADS)


def test_the_fallback_leaves_them_to_the_rest():
    found = weights(unknown(), fallback=True)
    assert found.pop("head.weight") == "head"
    assert set(found.values()) == {"other"}


def test_overrides_decide_and_must_match():
    said = {
        "*.qkv.weight": fused(q=8, k=8, v=8, heads=2),
        "*.mix.*": Role.OTHER,
        "table": "embedding",
        "head.weight": "hidden",
    }
    found = {i.name: i for i in classify(unknown(), said)}
    assert found["layers.2.qkv.weight"] == ParamInfo(
        "layers.2.qkv.weight", (24, 8), Role.HIDDEN, (8, 8, 8), 2
    )
    assert str(found["table"].role) == "embedding"
    assert str(found["head.weight"].role) == "hidden"
    compiled = torch.compile(unknown(), backend="eager")
    assert [i.role for i in classify(compiled, said)] == [i.role for i in found.values()]
    with pytest.raises(UsageError, match=r"'\*.qvk.weight' matches no parameter"):
        classify(unknown(), {"*.qvk.weight": fused(q=8, k=8, v=8)})
    with pytest.raises(UsageError, match="splits .* sum to 16, but d_out is 24"):
        classify(unknown(), {**said, "*.qkv.weight": fused(q=8, k=8)})
    with pytest.raises(UsageError, match="'matrix' is not one of embedding, head"):
        classify(unknown(), {"table": "matrix"})


class Declares(nn.Module):
    """A module that says itself what its parameters are."""

    def __init__(self, said):
        super().__init__()
        self.qkv, self.table = linear(24), nn.Parameter(torch.zeros(5, 8))
        self.up = linear()
        self.said = said

    def roles(self):
        return self.said


@pytest.mark.parametrize(
    "said",
    [
        {"qkv.weight": fused(q=8, k=8, v=8), "table": "embedding"},
        [
            ParamInfo("qkv.weight", (24, 8), Role.HIDDEN, (8, 8, 8)),
            ParamInfo("table", (5, 8), Role.EMBEDDING),
        ],
    ],
    ids=["mapping", "list"],
)
@pytest.mark.parametrize("inside", [False, True])
def test_roles_of_a_model_or_of_a_module_in_it_are_read(said, inside):
    model = Holds(core=Declares(said), head=linear(3)) if inside else Declares(said)
    found = {i.name.removeprefix("core."): i for i in classify(model)}
    assert found["qkv.weight"].splits == (8, 8, 8)
    assert found["table"].role == Role.EMBEDDING
    assert {"core.table"} <= set(roles(model)) if inside else True
    compiled = torch.compile(model, backend="eager")
    assert list(roles(compiled).values()) == list(roles(model).values())
    over = {"*qkv.weight": "other"}
    assert {i.name: i for i in classify(model, over)}[
        f"{'core.' * inside}qkv.weight"
    ].role == "other"


def test_roles_that_do_not_fit_are_refused():
    with pytest.raises(
        UsageError, match=r"roles\(\) of Declares declares 'qvk.weight'.*qkv.weight"
    ):
        classify(Declares({"qvk.weight": "hidden"}))
    twice = [ParamInfo("qkv.weight", (24, 8), Role.HIDDEN)] * 2
    with pytest.raises(UsageError, match="declares 'qkv.weight' twice"):
        classify(Declares(twice))
    for said in (None, "hidden", 3, [("qkv.weight", "hidden")]):
        with pytest.raises(UsageError, match="expected a list of ParamInfo"):
            classify(Declares(said))
    with pytest.raises(UsageError, match="map to a role, stored"):
        classify(Declares({"table": None}))
    wrong = [ParamInfo("qkv.weight", (16, 8), Role.HIDDEN)]
    with pytest.raises(UsageError, match=r"'qkv.weight'.*\(16, 8\).*\(24, 8\)"):
        classify(Declares(wrong))


def test_layers_that_are_shared_are_declared_once():
    layer = linear(16)
    infos = classify(Holds(one=layer, two=net(layer), head=linear(3, 16)))
    assert [i.name for i in infos] == ["one.weight", "head.weight"]


def test_grouped_and_multi_query_gpt_bigcode():
    """One k and v for all heads, after all of q; or q, k, v head by head."""
    for multi, wanted in (
        (True, ((WIDTH, 8, 8), (HEADS, 1, 1), 0)),
        (False, ((WIDTH,) * 3, HEADS, HEADS)),
    ):
        config = hf.GPTBigCodeConfig(
            vocab_size=97, n_embd=WIDTH, n_layer=1, n_head=HEADS, n_positions=16, multi_query=multi
        )
        info = next(i for i in classify(hf.GPTBigCodeForCausalLM(config)) if "c_attn.w" in i.name)
        assert (info.splits, info.heads, info.interleaved) == wanted


def test_the_model_here_is_not_changed():
    model = NanoGPT()
    before = {name: param.clone() for name, param in model.named_parameters()}
    classify(model)
    assert all(torch.equal(before[name], param) for name, param in model.named_parameters())
