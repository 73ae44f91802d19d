"""What the pages call yours: `model`, batches of tokens, examples. Tiny, on a CPU."""

import torch


def llama():
    """A Llama of transformers with 2 layers of width 16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 8}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, **shape, **heads))


def tokens(count):
    """Batches of 4 rows of 8 tokens."""
    return torch.randint(0, 32, (count, 4, 8))


def examples():
    """Rows as a Trainer takes them."""
    return [{"input_ids": row, "labels": row} for row in tokens(4).flatten(0, 1)]


class Holds(torch.nn.Module):
    """A module with these parts."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def unusual():
    """Weights that only their owner can name: fused, transposed, a kernel, a table."""
    nn = torch.nn
    return Holds(
        pos_table=nn.Parameter(torch.randn(8, 64)),
        layer=Holds(
            attn=Holds(qkv=nn.Linear(64, 768, bias=False)),
            query_key_value=nn.Linear(64, 1536, bias=False),
            w_in=nn.Parameter(torch.randn(64, 128)),
            conv=nn.Conv2d(8, 16, 3, bias=False),
            o_proj=nn.Linear(64, 64, bias=False),
        ),
    )


def exported():
    """A folder `exported` as export_hf leaves it: a model and a tokenizer of bytes."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    llama().save_pretrained("exported")
    vocabulary = {chr(97 + i): i for i in range(26)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(vocabulary, [])))
    tokenizer.save_pretrained("exported")
