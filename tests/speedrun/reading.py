"""Track 3 of modded-nanogpt, read from its rules: plain torch in fp32, and nothing of geon.

Weights are a dict by the track's names. Written apart from geon's own model, optimizer and
schedule, to hold them against: sums of losses, momenta and updates one parameter at a time.
"""

import math

import torch
from torch.nn import functional as F

STEPS = 3250
COOLDOWN = 0.7
MUON = {"lr": 0.025, "decay": 0.05, "kept": 0.95}
ADAM = {"decay": 0.001, "betas": (0.8, 0.95), "eps": 1e-10}
RATES = {"embed.weight": 0.7, "proj.weight": 0.004}
VECTORS = 0.015


def shapes(vocab=50304, layers=12, width=768):
    """Shapes of all weights by name."""
    found = {"embed.weight": (vocab, width)}
    linear = {"attn.q": (width, width), "attn.k": (width, width), "attn.v": (width, width)}
    linear |= {"attn.proj": (width, width), "mlp.fc": (4 * width, width)}
    linear |= {"mlp.proj": (width, 4 * width)}
    for i in range(layers):
        for name, (rows, cols) in linear.items():
            found[f"blocks.{i}.{name}.weight"] = (rows, cols)
            found[f"blocks.{i}.{name}.bias"] = (rows,)
        found[f"blocks.{i}.norm1.gains"] = found[f"blocks.{i}.norm2.gains"] = (width,)
    found["proj.weight"], found["proj.bias"] = (vocab, width), (vocab,)
    found["norm1.gains"] = found["norm2.gains"] = (width,)
    return found


def initial(sizes, generator):
    """Initial weights: what is called proj is zero, so no logit says anything at first."""
    weights = {}
    for name, shape in sizes.items():
        if name.endswith("gains"):
            weights[name] = torch.ones(shape)
        elif name.endswith("bias") or ".proj." in f".{name}":
            weights[name] = torch.zeros(shape)
        else:
            std = 1.0 if name == "embed.weight" else math.sqrt(0.33 / shape[-1])
            weights[name] = std * torch.randn(shape, generator=generator)
    return weights


def normed(x, gains=None):
    """x over its root mean square, eps that of fp32."""
    x = x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + torch.finfo(torch.float32).eps)
    return x if gains is None else x * gains


def turned(x):
    """RoPE of (B, T, H, K): a quarter of K has frequencies 1 to 1/1024, another quarter none."""
    time, width = x.shape[1], x.shape[-1]
    quarter = width // 4
    frequencies = [
        1024.0 ** (-i / (quarter - 1)) if i < quarter else 0.0 for i in range(width // 2)
    ]
    angle = torch.arange(time)[:, None, None] * torch.tensor(frequencies)
    a, b = x[..., : width // 2], x[..., width // 2 :]
    cos, sin = torch.cos(angle), torch.sin(angle)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], -1)


def attention(x, weights, at, heads):
    """Every head looks at earlier tokens: softmax of 0.12 times the products."""
    q, k, v = (
        F.linear(x, weights[f"{at}.{part}.weight"], weights[f"{at}.{part}.bias"]).unflatten(
            -1, (heads, -1)
        )
        for part in "qkv"
    )
    q, k = turned(normed(q)), turned(normed(k))
    time = x.shape[1]
    scores = 0.12 * torch.einsum("bthk,bshk->bhts", q, k)
    later = torch.ones(time, time, dtype=torch.bool).triu(1)
    mixed = torch.einsum("bhts,bshk->bthk", scores.masked_fill(later, -torch.inf).softmax(-1), v)
    return F.linear(mixed.flatten(-2), weights[f"{at}.proj.weight"], weights[f"{at}.proj.bias"])


def loss_sum(weights, tokens, targets, heads):
    """Sum of the cross-entropies in nats."""
    layers = 1 + max(int(n.split(".")[1]) for n in weights if n.startswith("blocks."))
    x = normed(weights["embed.weight"][tokens], weights["norm1.gains"])
    for i in range(layers):
        at = f"blocks.{i}"
        x = x + attention(normed(x, weights[f"{at}.norm1.gains"]), weights, f"{at}.attn", heads)
        inner = normed(x, weights[f"{at}.norm2.gains"])
        inner = F.linear(inner, weights[f"{at}.mlp.fc.weight"], weights[f"{at}.mlp.fc.bias"])
        inner = inner.clamp(min=0) ** 2
        x = x + F.linear(inner, weights[f"{at}.mlp.proj.weight"], weights[f"{at}.mlp.proj.bias"])
    z = F.linear(normed(x, weights["norm2.gains"]), weights["proj.weight"], weights["proj.bias"])
    z = 15 * z / torch.sqrt(z**2 + 225)
    return -(z.log_softmax(-1).gather(-1, targets[..., None])).sum()


def rate(step, steps=STEPS, cooldown=COOLDOWN):
    """Share of the peak rates at a step, the first of which is 0."""
    done = step / steps
    return 1.0 if done < 1 - cooldown else (1 - done) / cooldown


def orthogonal(matrix):
    """Twelve steps of 2 x - 1.5 x^3 + 0.5 x^5 on the singular values, which begin below 1."""
    x = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(12):
        gram = x @ x.T
        x = 2 * x - 1.5 * gram @ x + 0.5 * gram @ gram @ x
    return x.T if tall else x


class Optimizer:
    """Muon for the matrices of blocks, AdamW for the rest; takes gradients of sums of losses."""

    def __init__(self, weights):
        self.first = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.second = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.count = 0

    def step(self, weights, grads, eta):
        """Change the weights in place. eta: share of the peak rates."""
        self.count += 1
        for name, weight in weights.items():
            if name.startswith("blocks.") and weight.ndim == 2:
                self._muon(name, weight, grads[name], eta * MUON["lr"])
            else:
                self._adam(name, weight, grads[name], eta * RATES.get(name, VECTORS))

    def _muon(self, name, weight, grad, lr):
        kept, momentum = MUON["kept"], self.first[name]
        momentum.copy_(kept * momentum + (1 - kept) * grad)
        update = orthogonal((1 - kept) * grad + kept * momentum)
        update = update * math.sqrt(max(1, weight.shape[0] / weight.shape[1]))
        weight.copy_((1 - lr * MUON["decay"]) * weight - lr * update)

    def _adam(self, name, weight, grad, lr):
        (a, b), eps = ADAM["betas"], ADAM["eps"]
        self.first[name].copy_(a * self.first[name] + (1 - a) * grad)
        self.second[name].copy_(b * self.second[name] + (1 - b) * grad**2)
        mean = self.first[name] / (1 - a**self.count)
        size = torch.sqrt(self.second[name] / (1 - b**self.count)) + eps
        weight.copy_((1 - lr * ADAM["decay"]) * weight - lr * mean / size)


def train(weights, batches, heads, steps):
    """Mean losses, in nats a token, of steps over (tokens, targets); weights change in place."""
    optimizer, losses = Optimizer(weights), []
    for step, (tokens, targets) in enumerate(batches):
        for weight in weights.values():
            weight.requires_grad_(True)
        loss = loss_sum(weights, tokens, targets, heads)
        grads = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
        for weight in weights.values():
            weight.requires_grad_(False)
        optimizer.step(weights, grads, rate(step, steps))
        losses.append(loss.item() / targets.numel())
    return losses
