"""What `classify` sees through, what it is told, and what it says when it is unsure."""

import re

import pytest
import torch
import torch.distributed as dist
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from geon.errors import UsageError
from geon.optim import ParamInfo, Role, classify, fused, stored
from tests.library.families import HEADS, WIDTH, NanoGPT, make


def roles(model, **options):
    return {info.name: str(info.role) for info in classify(model, **options)}


def weights(model, **options):
    """Roles of weights of two dimensions or more."""
    return {
        i.name: str(i.role)
        for i in classify(model, **options)
        if len(i.shape) > 1 and i.role != "bias"
    }


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


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


def net(*layers):
    return nn.Sequential(*layers)


class Holds(nn.Module):
    """A module with these parts."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def linear(rows=8, cols=8):
    return nn.Linear(cols, rows, bias=False)


def block():
    return Holds(mlp=net(linear(16, 8), nn.GELU(), linear(8, 16)))


HEADS_OF = {
    "mlp": (net(linear(), nn.ReLU(), linear(), nn.ReLU(), linear(3)), ["4.weight"]),
    "nested": (net(linear(), net(nn.ReLU(), net(linear(), linear(3)))), ["1.1.1.weight"]),
    "ends in a norm": (net(linear(), linear(3), nn.BatchNorm1d(3)), ["1.weight"]),
    "a module's": (Holds(net=net(linear(), nn.ReLU(), linear(3))), ["net.2.weight"]),
    "its own": (Holds(one=linear(), two=linear(), three=linear(3)), ["three.weight"]),
    "named head": (
        Holds(head=net(linear(), nn.ReLU(), linear(3)), trunk=net(linear(), block())),
        ["head.2.weight"],
    ),
    "blocks": (Holds(embed=nn.Embedding(5, 8), blocks=net(block(), block())), []),
    "list of blocks": (Holds(blocks=nn.ModuleList([block(), block()])), []),
    "names": (
        Holds(**{n: linear(3) for n in ("score", "classifier", "decoder", "qa_outputs")}),
        ["score.weight", "classifier.weight", "decoder.weight", "qa_outputs.weight"],
    ),
    "as wide as the vocabulary": (
        Holds(tokens=nn.Embedding(31, 8), to_words=linear(31), after=linear()),
        ["to_words.weight"],
    ),
    "hidden as wide as the vocabulary": (
        Holds(
            tokens=nn.Embedding(16, 8),
            blocks=nn.ModuleList([block(), block()]),
            lm_head=linear(16),
        ),
        ["lm_head.weight"],
    ),
    "one alone": (linear(), []),
}


@pytest.mark.parametrize("kind", list(HEADS_OF))
def test_last_layers_are_heads(kind):
    model, heads = HEADS_OF[kind]
    assert [name for name, role in weights(model).items() if role == "head"] == heads


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
    lines = re.findall(r'^    ("[^"]+"): (.+),$', said, re.M)
    written = {
        eval(glob): eval(said.split("#")[0], {"fused": fused, "stored": stored})
        for glob, said in lines
    }
    assert sorted(written) == ["layers.*.mix.weight", "layers.*.qkv.weight", "table"]
    found = {i.name: i for i in classify(unknown(), {**written, "layers.*.mix.weight": "other"})}
    assert found["layers.1.qkv.weight"].splits == (8, 8, 8)


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
    over = {"*qkv.weight": "other"}
    assert {i.name: i for i in classify(model, over)}[
        f"{'core.' * inside}qkv.weight"
    ].role == "other"


def test_roles_that_do_not_fit_are_refused():
    with pytest.raises(
        UsageError, match=r"roles\(\) of Declares declares 'qvk.weight'.*qkv.weight"
    ):
        classify(Declares({"qvk.weight": "hidden"}))
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
