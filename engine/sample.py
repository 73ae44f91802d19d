"""Text from a model, one token at a time."""

import torch
from torch import Generator, Tensor

from geon.models import LanguageModel


@torch.no_grad()
def sample(
    model: LanguageModel,
    prompt: Tensor,
    count: int,
    temperature: float = 1.0,
    generator: Generator | None = None,
    top_k: int = 0,
) -> Tensor:
    """Continue a prompt by `count` tokens.

    The last `context` tokens are run again for each new one. Under FSDP every rank must call
    this with a generator of the same seed.

    Shapes: prompt (time,) int64 -> (time + count,).
    temperature: 0 takes the likeliest token. top_k: draw from the k likeliest only; 0 from all.
    """
    tokens = prompt
    for _ in range(count):
        logits = model(tokens[None, -model.shape.context :])[0, -1].float().cpu()
        if top_k:
            floor = logits.topk(min(top_k, len(logits))).values[-1]
            logits = logits.masked_fill(logits < floor, -torch.inf)
        if temperature == 0.0:
            following = logits.argmax()[None]
        else:
            odds = torch.softmax(logits / temperature, dim=-1)
            following = torch.multinomial(odds, 1, generator=generator)
        tokens = torch.cat([tokens, following.to(tokens.device)])
    return tokens
