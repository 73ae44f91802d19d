"""Tiny random models of the families that docs/library.md lists; prints that table.

python -m tests.foreign.families
"""

from collections import defaultdict

import torch
import transformers as hf
from torch import nn

from geon.optim import Role, classify

VOCAB, WIDTH, INNER, HEADS, KV = 97, 32, 44, 4, 2
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
}
GROUPED = {**SIZES, "num_key_value_heads": KV}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {**GROUPED, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
FALCON = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
}
LATENT = {
    "num_key_value_heads": HEADS,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 6,
}


class CausalSelfAttention(nn.Module):
    """nanoGPT's attention."""

    def __init__(self):
        super().__init__()
        self.n_head, self.n_embd = HEADS, WIDTH
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH)
        self.c_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = self.c_attn(x).split(d, dim=2)
        q, k, v = (m.view(b, t, self.n_head, -1).transpose(1, 2) for m in (q, k, v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(b, t, d))


class NanoBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(WIDTH), CausalSelfAttention()
        self.ln_2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(WIDTH, 4 * WIDTH), "c_proj": nn.Linear(4 * WIDTH, WIDTH)}
        )

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp.c_proj(nn.functional.gelu(self.mlp.c_fc(self.ln_2(x))))


class NanoGPT(nn.Module):
    """A model in nanoGPT's form: the head is tied to wte, and registered after it."""

    def __init__(self):
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCAB, WIDTH),
                "wpe": nn.Embedding(64, WIDTH),
                "h": nn.ModuleList(NanoBlock() for _ in range(2)),
                "ln_f": nn.LayerNorm(WIDTH),
            }
        )
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, input_ids, labels=None):
        place = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.transformer.wte(input_ids) + self.transformer.wpe(place)
        for block in self.transformer.h:
            x = block(x)
        logits = self.lm_head(self.transformer.ln_f(x))
        if labels is None:
            return logits
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class Recurrent(nn.Module):
    """A character model with a recurrent core."""

    def __init__(self, kind):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.core = kind(WIDTH, WIDTH, num_layers=2, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids, labels):
        logits = self.head(self.core(self.embed(input_ids))[0])
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


class TorchEncoder(nn.Module):
    """torch's own encoder layer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, INNER, batch_first=True, dropout=0.0)
        self.layers = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids, labels):
        logits = self.head(self.layers(self.embed(input_ids)))
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


class ConvNet(nn.Module):
    """Convolutions of images and sequences: plain, in groups, of single channels."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 16, 3, groups=2)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.norm = nn.BatchNorm2d(16)
        self.line = nn.Conv1d(16, 12, 5)
        self.fc = nn.Linear(12, 10)

    def forward(self, pixel_values, labels):
        x = self.norm(self.depthwise(self.grouped(self.stem(pixel_values)).relu()))
        logits = self.fc(self.line(x.flatten(2)).relu().mean(-1))
        return nn.functional.cross_entropy(logits, labels)


FAMILIES = {
    "Llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)),
    "Llama, tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, tie_word_embeddings=True)),
    "Mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED)),
    "Qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**GROUPED)),
    "Qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED, head_dim=12)),
    "Gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**GROUPED, head_dim=12)),
    "OLMo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**GROUPED)),
    "Phi-3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**GROUPED, **ENDS)),
    "GPT-2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=VOCAB, n_embd=WIDTH, n_layer=2, n_head=HEADS, n_positions=64)
    ),
    "nanoGPT": NanoGPT,
    "GPT-NeoX": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SIZES)),
    "Bloom": lambda: hf.BloomForCausalLM(
        hf.BloomConfig(vocab_size=VOCAB, hidden_size=WIDTH, n_layer=2, n_head=HEADS)
    ),
    "Falcon": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(**FALCON, num_kv_heads=KV, new_decoder_architecture=True)
    ),
    "Falcon 7B": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(**FALCON, multi_query=True, new_decoder_architecture=False)
    ),
    "Falcon RW": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(**FALCON, multi_query=False, new_decoder_architecture=False, alibi=True)
    ),
    "Mixtral": lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(**GROUPED, num_local_experts=3, num_experts_per_tok=2)
    ),
    "Qwen3-MoE": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**EXPERTS, num_experts=4)),
    "GPT-OSS": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(**GROUPED, num_local_experts=3, num_experts_per_tok=2, head_dim=8)
    ),
    "DeepSeek-V3": lambda: hf.DeepseekV3ForCausalLM(
        hf.DeepseekV3Config(**{**EXPERTS, **LATENT, "q_lora_rank": 10})
    ),
    "T5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=VOCAB,
            d_model=WIDTH,
            d_kv=8,
            d_ff=INNER,
            num_layers=2,
            num_heads=HEADS,
            decoder_start_token_id=0,
        )
    ),
    "BERT": lambda: hf.BertForMaskedLM(hf.BertConfig(**SIZES)),
    "BERT, classifier": lambda: hf.BertForSequenceClassification(hf.BertConfig(**SIZES)),
    "ModernBERT": lambda: hf.ModernBertForMaskedLM(
        hf.ModernBertConfig(**SIZES, **ENDS, cls_token_id=1, sep_token_id=2)
    ),
    "ViT": lambda: hf.ViTForImageClassification(
        hf.ViTConfig(
            hidden_size=WIDTH,
            intermediate_size=INNER,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
            image_size=16,
            patch_size=4,
            num_labels=10,
        )
    ),
    "nn.TransformerEncoder": TorchEncoder,
    "nn.GRU": lambda: Recurrent(nn.GRU),
    "nn.LSTM": lambda: Recurrent(nn.LSTM),
    "nn.Conv1d, nn.Conv2d": ConvNet,
}


def make(name):
    """The model of a family, drawn from a fixed seed."""
    torch.manual_seed(0)
    return FAMILIES[name]()


def loss(name, model, seed=0):
    """Loss of a random batch."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCAB, (2, 12), generator=draw)
    labels = {"labels": tokens}
    if name in ("ViT", "nn.Conv1d, nn.Conv2d"):
        inputs = {"pixel_values": torch.randn(2, 3, 16, 16, generator=draw)}
        labels = {"labels": torch.tensor([0, 1])}
    else:
        inputs = {"input_ids": tokens}
        if name == "BERT, classifier":
            labels = {"labels": torch.tensor([0, 1])}
    found = model(**inputs, **labels)
    return getattr(found, "loss", found)


def kinds(infos):
    """What kinds of weights there are: role and storage -> names, of weights that are matrices."""
    found = defaultdict(dict)
    for info in infos:
        if len(info.shape) < 2 or info.role in (Role.BIAS, Role.GAIN):
            continue
        parts = [p for p in info.name.split(".") if not p.isdigit() and p != "weight"]
        what = f"{info.role}, {info.storage}" if info.storage else str(info.role)
        found[what][parts[-1]] = None
    return found


def table():
    """The table of docs/library.md."""
    lines = ["| family | weights |", "|---|---|"]
    for name in FAMILIES:
        own = kinds(classify(make(name)))
        told = [f"{what}: {', '.join(f'`{n}`' for n in names)}" for what, names in own.items()]
        lines.append(f"| {name} | {'; '.join(told)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
