"""Tokens after prompts: a batch of rows, what each has read kept in a cache."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from geon.models import LanguageModel
from geon.models.cache import Cache


@dataclass(frozen=True)
class Draw:
    """How the next token is chosen from logits.

    Attributes:
        temperature: 0 takes the likeliest.
        top_k: draw from the k likeliest only; 0 from all.
        top_p: draw from the fewest likeliest whose odds add up to p; 1 from all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def choose(self, logits: Tensor, generator: Generator | None = None) -> Tensor:
        """Logits (rows, vocab) on a CPU -> ids (rows,)."""
        if self.temperature == 0.0:
            return logits.argmax(-1)
        logits = logits / self.temperature
        if self.top_k:
            floor = logits.topk(min(self.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < floor, -torch.inf)
        odds = logits.softmax(-1)
        if self.top_p < 1.0:
            ordered, places = odds.sort(descending=True, stable=True)
            # What stands before a token in that order is enough without it.
            ordered[ordered.cumsum(-1) - ordered >= self.top_p] = 0.0
            odds = torch.zeros_like(odds).scatter_(-1, places, ordered)
        return torch.multinomial(odds, 1, generator=generator)[:, 0]


@torch.inference_mode()
def continued(
    model: LanguageModel,
    prompts: Sequence[Tensor],
    count: int,
    draw: Draw,
    generator: Generator | None = None,
) -> Iterator[list[int]]:
    """Continue prompts by `count` tokens each; yields every row's next id as it is known.

    Cost: one pass over all of a prompt, then one over a single token, until a row is as long as the
    model's context. From there on the last `context` tokens are run again for each new one, because
    what they left in the cache came from tokens before them.

    Shapes: prompts (time,) int64 of any lengths above 0, on the model's device.
    """
    device, context = prompts[0].device, model.shape.context
    longest = max(len(prompt) for prompt in prompts)
    tokens = torch.zeros(len(prompts), longest + count, dtype=torch.long, device=device)
    pads = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[longest - len(prompt) : longest] = prompt
    cache = None
    for time in range(longest, longest + count):
        begin = max(0, time - context)
        if cache is None or begin:
            starts = (pads - begin).clamp(min=0)
            cache = Cache(model.shape.n_layer, context, starts if bool(starts.any()) else None)
            x = model.hidden(tokens[:, begin:time], cache)
        else:
            x = model.hidden(tokens[:, time - 1 : time], cache)
        logits = model.unembed(x[:, -1:])[:, 0].float().cpu()
        following = draw.choose(logits, generator)
        tokens[:, time] = following.to(device)
        yield following.tolist()
