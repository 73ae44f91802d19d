"""Which Linears are heads: by name, by place, by width; in wrappers too."""

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from tests.foreign.families import HEADS, WIDTH
from tests.foreign.toys import Holds, block, linear, net, weights

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
    "after convolutions": (
        Holds(conv1=nn.Conv2d(3, 8, 3), layer1=net(nn.Conv2d(8, 8, 3)), fc=linear(3)),
        ["fc.weight"],
    ),
    "after a recurrence": (
        Holds(bag=nn.EmbeddingBag(31, 8), core=nn.LSTM(8, 8), last=linear(3)),
        ["last.weight"],
    ),
    "inside a holder": (
        Holds(model=Holds(fc1=linear(), fc2=linear(), fc3=linear(3))),
        ["model.fc3.weight"],
    ),
    "policy and value": (
        Holds(trunk=net(linear(), nn.ReLU()), pi=linear(4), v=linear(2)),
        ["pi.weight", "v.weight"],
    ),
    "actor and critic": (
        Holds(
            actor=net(linear(16), nn.ReLU(), linear(4, 16)),
            critic=net(linear(16), nn.ReLU(), linear(2, 16)),
        ),
        ["actor.2.weight", "critic.2.weight"],
    ),
    "list of heads": (
        Holds(trunk=linear(), heads=nn.ModuleList([linear(3), linear(5)])),
        ["heads.0.weight", "heads.1.weight"],
    ),
    "heads by name": (
        Holds(trunk=linear(), heads=nn.ModuleDict({"pos": linear(3), "ner": linear(5)})),
        ["heads.pos.weight", "heads.ner.weight"],
    ),
    "inner outputs": (
        Holds(
            emb=nn.Embedding(31, 8),
            block_a=Holds(mlp=net(linear(), linear()), out=linear()),
            block_b=Holds(mlp=net(linear(), linear()), out=linear()),
            to_tokens=linear(31),
        ),
        ["to_tokens.weight"],
    ),
    "an MLP as wide as the vocabulary": (
        Holds(emb=nn.Embedding(16, 8), up=linear(16), down=linear(8, 16), last=linear(3)),
        ["last.weight"],
    ),
    "an MLP as wide as the positions": (
        Holds(
            tok=nn.Embedding(31, 8),
            pos=nn.Embedding(16, 8),
            up=linear(16),
            down=linear(8, 16),
            to_words=linear(31),
        ),
        ["to_words.weight"],
    ),
    "classes as many as channels": (
        Holds(
            conv1=nn.Conv2d(1, 10, 5),
            conv2=nn.Conv2d(10, 20, 5),
            fc1=linear(50, 320),
            fc2=linear(10, 50),
        ),
        ["fc2.weight"],
    ),
    "auto-encoder": (
        Holds(fc1=linear(16, 64), fc2=linear(4, 16), fc3=linear(16, 4), fc4=linear(64, 16)),
        ["fc4.weight"],
    ),
    "weak names that are read": (
        Holds(fc=linear(16, 64), output=linear(8, 16), classifier=linear(3)),
        ["classifier.weight"],
    ),
    "before the classifier": (
        Holds(pre_classifier=linear(), pre_logits=linear(), classifier=linear(3)),
        ["classifier.weight"],
    ),
    "a list inside a head": (
        Holds(
            trunk=linear(),
            box_head=Holds(layers=nn.ModuleList([linear(16), linear(16, 16), linear(4, 16)])),
        ),
        ["box_head.layers.2.weight"],
    ),
    "heads of attention": (
        Holds(sa_head=Holds(key=linear(2), query=linear(2), value=linear(2)), lm_head=linear(31)),
        ["lm_head.weight"],
    ),
    "logits and value": (
        Holds(trunk=linear(), logits=linear(4), value=linear(1, 8)),
        ["logits.weight", "value.weight"],
    ),
    "of a decoder": (
        Holds(
            encoder=Holds(tokens=nn.Embedding(97, 8), core=nn.LSTM(8, 16)),
            decoder=Holds(words=nn.Embedding(89, 8), core=nn.LSTM(8, 16), to_words=linear(89, 16)),
        ),
        ["decoder.to_words.weight"],
    ),
    "after a modulation": (
        Holds(
            trunk=linear(),
            final_layer=Holds(linear=linear(3), adaln=net(nn.SiLU(), linear(16))),
        ),
        ["final_layer.linear.weight"],
    ),
    "a generator": (
        Holds(fc=net(linear(64), nn.ReLU()), conv=net(nn.Conv2d(4, 3, 3))),
        [],
    ),
    "two towers": (
        Holds(
            bottom=net(linear(16, 5), linear(6, 16)),
            tables=nn.Embedding(31, 6),
            top=net(linear(16, 12), linear(1, 16)),
        ),
        ["top.1.weight"],
    ),
    "no head, fused": (Holds(qkv=linear(24), proj=linear()), []),
    "of a block": (Holds(head=Holds(dense=linear(), norm=nn.LayerNorm(8))), []),
}


@pytest.mark.parametrize("kind", list(HEADS_OF))
def test_last_layers_are_heads(kind):
    model, heads = HEADS_OF[kind]
    found = weights(model, fallback=True)
    assert [name for name, role in found.items() if role == "head"] == heads


class AttentionPoolNet(Holds):
    """A model whose own name says attention and pool."""


def test_the_class_of_the_model_says_nothing_of_its_head():
    model = AttentionPoolNet(embed=nn.Embedding(5, 8), mix=linear(), fc=linear(3))
    assert weights(model)["fc.weight"] == "head"


BERT = {
    "vocab_size": 97,
    "hidden_size": WIDTH,
    "intermediate_size": 44,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
}
HF_HEADS = {
    "pretraining": (lambda: hf.BertForPreTraining(hf.BertConfig(**BERT)), ["cls.seq_relationship"]),
    "questions": (lambda: hf.BertForQuestionAnswering(hf.BertConfig(**BERT)), ["qa_outputs"]),
    "a classification head": (
        lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**BERT)),
        ["classifier.out_proj"],
    ),
    "a backbone": (lambda: hf.BertModel(hf.BertConfig(**{**BERT, "vocab_size": WIDTH})), []),
    "quantised": (lambda: hf.IBertForMaskedLM(hf.IBertConfig(**BERT)), []),
    "saved beside adapters": (
        lambda: get_peft_model(
            hf.BertForSequenceClassification(hf.BertConfig(**BERT)),
            LoraConfig(task_type="SEQ_CLS", target_modules=["query"]),
        ),
        ["classifier.original_module", "classifier.modules_to_save.default"],
    ),
}


@pytest.mark.parametrize("kind", list(HF_HEADS))
def test_last_layers_of_transformers_are_heads(kind):
    make_model, heads = HF_HEADS[kind]
    found = weights(make_model(), fallback=True)
    assert [
        name.removeprefix("base_model.model.").removesuffix(".weight")
        for name, role in found.items()
        if role == "head"
    ] == heads
    if kind == "quantised":
        assert next(role for n, role in found.items() if "word_embeddings" in n) == "tied"


def test_a_last_layer_that_is_wrapped_itself_is_a_head():
    for wrap in (lambda m: torch.compile(m, backend="eager"), checkpoint_wrapper):
        model = Holds(up=linear(16), classifier=wrap(linear(3, 16)))
        assert list(weights(model).values()) == ["hidden", "head"]
