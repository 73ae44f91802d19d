"""A mixture of experts: llama whose MLP is many, of which a router picks a few for each token.

Shazeer et al., arXiv 1701.06538; without shared experts it is Mixtral (arXiv 2401.04088).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from geon.errors import UsageError
from geon.models.cache import BlockCache, Cache
from geon.models.hf import HFMap
from geon.models.kept import FP32, Pass
from geon.models.layers import Norm, lowered
from geon.models.llama import (
    INSIDE,
    KEYS,
    OUTSIDE,
    Llama,
    LlamaShape,
    llama_config,
)
from geon.optim.modular import Network
from geon.optim.roles import ParamInfo, Role


@dataclass(frozen=True)
class MoEShape(LlamaShape):
    """Options of moe, beside those of llama.

    Attributes:
        n_expert: experts of a block, each of width d_ff.
        top_k: experts that a token goes to; their odds are divided by their sum.
        balance: factor on the load-balancing loss (Fedus et al., arXiv 2101.03961): the mean over
            blocks of n_expert sum_e f_e p_e, of the share f_e of choices that fell on an expert and
            its mean odds p_e, over the tokens of a micro-batch. It is 1 where all are used alike.
            It is part of the loss in training alone; 0 leaves it out.
    """

    arch = "moe"

    n_expert: int = 8
    top_k: int = 2
    balance: float = 0.0

    def check(self) -> None:
        """Refuse more choices than experts, besides.

        Raises:
            UsageError: names the key.
        """
        super().check()
        if not 1 <= self.top_k <= self.n_expert:
            raise UsageError(
                f"model.options.top_k={self.top_k}: it must be from 1 to n_expert {self.n_expert}"
            )
        if self.balance < 0:
            raise UsageError(f"model.options.balance={self.balance}: it must be 0 or more")

    def check_tensor(self, ranks: int) -> None:
        """Refuse tensor parallelism.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            f"model.arch={self.arch} with {ranks} tensor ranks: there is no plan that cuts "
            "experts; choose parallel=ddp, fsdp or hsdp with parallel.tensor=1"
        )


class Experts(nn.Module):
    """SwiGLU MLPs, whose matrices are batches (experts, d_out, d_in)."""

    def __init__(self, shape: MoEShape) -> None:
        super().__init__()
        count, d, width = shape.n_expert, shape.d_model, shape.mlp_width
        self.gate, self.up = (nn.Parameter(torch.empty(count, width, d)) for _ in range(2))
        self.down = nn.Parameter(torch.empty(count, d, width))
        for batch in self.parameters():  # as nn.Linear does: never what memory held
            nn.init.normal_(batch, std=batch.shape[-1] ** -0.5)

    @torch.compiler.disable  # how many tokens an expert has is known only when it runs
    def forward(self, x: Tensor, chosen: Tensor, odds: Tensor) -> Tensor:
        """Sum over a token's experts, by odds. x (N, D), chosen and odds (N, k) -> (N, D)."""
        count, k = len(self.gate), chosen.shape[1]
        order = chosen.flatten().argsort(stable=True)
        loads = torch.bincount(chosen.flatten(), minlength=count).tolist()
        weights = (batch.unbind(0) for batch in (self.gate, self.up, self.down))
        outs = []
        for part, gate, up, down in zip(x[order // k].split(loads), *weights, strict=True):
            inner = F.silu(F.linear(part, gate)) * F.linear(part, up)
            outs.append(F.linear(inner, down))
        out = torch.cat(outs)[order.argsort()].unflatten(0, (-1, k))
        return (out * odds[..., None].to(out.dtype)).sum(1)


class Block(nn.Module):
    """Attention and experts, each behind a norm, each added to the residual stream."""

    def __init__(self, shape: MoEShape) -> None:
        super().__init__()
        self.top_k = shape.top_k
        self.norm1, self.norm2 = (Norm(shape.d_model, shape.norm_eps) for _ in range(2))
        self.attention = shape.attention()
        self.router = nn.Linear(shape.d_model, shape.n_expert, bias=False)
        self.experts = Experts(shape)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, past: BlockCache | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, T, D) -> (B, T, D), and how unevenly experts are used: 1 is even, n_expert most."""
        x = x + self.attention(self.norm1(x), cos, sin, past)
        inner = self.norm2(x)
        with torch.autocast(x.device.type, enabled=False):  # in fp32: near ties decide a choice
            odds = F.linear(inner.float(), self.router.weight.float()).softmax(-1).flatten(0, 1)
        best, chosen = odds.topk(self.top_k, dim=-1)
        best = best / best.sum(-1, keepdim=True)
        count = odds.shape[1]
        loads = F.one_hot(chosen, count).float().mean((0, 1))
        uneven = count * (loads * odds.mean(0)).sum()
        return x + self.experts(inner.flatten(0, 1), chosen, best).view_as(x), uneven


class MoE(Llama):
    """Llama whose blocks have experts."""

    shape_type = MoEShape

    def _block(self) -> nn.Module:
        return Block(self.shape)

    def hidden(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """(B, T) -> (B, T, D), normalised."""
        return self._read(tokens, cache)[0]

    def _read(self, tokens: Tensor, cache: Cache | None = None) -> tuple[Tensor, Tensor]:
        """What the head reads, and the mean over blocks of how unevenly experts are used."""
        x, angles = lowered(self.embed(tokens)), self.angles(tokens, cache)
        total = torch.zeros((), device=tokens.device)
        for i, block in enumerate(self.blocks):
            past = () if cache is None else (cache.blocks[i],)
            run: Any = block if past else lambda *args, block=block: self.run_block(block, *args)
            x, uneven = run(x, *angles, *past)
            total = total + uneven
        if cache is not None:
            cache.advance(x.shape[1])
        return self.norm(x), total / self.shape.n_layer

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits, or with targets the mean cross-entropy in nats; see `MoEShape.balance`."""
        x, uneven = self._read(tokens)
        if targets is None:
            return self.unembed(x)
        loss, factor = self.loss(x, targets), self.shape.balance
        return loss + factor * uneven if factor and torch.is_grad_enabled() else loss

    def roles(self) -> list[ParamInfo]:
        """As llama's; experts are batches of hidden matrices, the router is stepped by entries."""
        own = {f"experts.{part}": Role.HIDDEN for part in ("gate", "up", "down")}
        return self.declared({**own, "router.weight": Role.OTHER})

    def modular(self) -> Network:
        """Nothing: a choice of experts jumps, so no sensitivity bounds it.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "model.arch=moe has no modular norm, as a choice of experts jumps: leave out "
            "optim.budget=modular, mode=certify and logger.certify_every"
        )

    def flops_per_token(self) -> int:
        """FLOPs of forward and backward for one token: of the experts that it goes to."""
        s = self.shape
        experts = sum(i.numel for i in self.infos if ".experts." in i.name)
        router = s.n_layer * s.n_expert * s.d_model
        idle = experts - experts * s.top_k // s.n_expert
        return super().flops_per_token() - 6 * idle + 6 * router

    def tp_plan(self) -> dict[str, Any]:
        """None: refused by `MoEShape.check_tensor`."""
        return {}

    @classmethod
    def hf_map(cls) -> HFMap:
        """Mixtral; experts are tensors of their own there."""
        return HFMap(_kind, _config, {**KEYS, **_KEYS}, OUTSIDE, {**INSIDE, **_MIXTRAL})

    def block_bytes(self, at: Pass) -> int:
        """Norms and attention; the router; and of each choice what an expert keeps of a token."""
        s, size = self.shape, at.size
        router = (s.d_model * FP32 if size < FP32 else 0) + 2 * s.n_expert * FP32
        expert = (s.d_model * 2 + 4 * s.mlp_width) * size
        return at.tokens * (self.attention_bytes(at) + router + s.top_k * expert)

    @property
    def flow_width(self) -> int:
        """As llama's, of each choice."""
        return self.shape.top_k * 3 * self.shape.mlp_width


def _kind(shape: MoEShape) -> tuple[str, str]:
    return "MixtralForCausalLM", "mixtral"


def _config(shape: MoEShape) -> dict[str, Any]:
    if shape.qk_norm:
        raise UsageError(
            "model.options.qk_norm=true: Mixtral of transformers has no norm of queries and keys; "
            "a moe with it is not exported"
        )
    found = llama_config(shape)
    del found["attention_bias"]
    return found | {
        "num_local_experts": shape.n_expert,
        "num_experts_per_tok": shape.top_k,
        "sliding_window": None,
    }


_KEYS = {"num_local_experts": "options.n_expert", "num_experts_per_tok": "options.top_k"}
_MOE = "block_sparse_moe"
_MIXTRAL = {
    "router": f"{_MOE}.gate",
    **{
        f"experts.{ours}": f"{_MOE}.experts.{{}}.{theirs}.weight"
        for ours, theirs in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
    },
}
