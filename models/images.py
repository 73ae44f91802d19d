"""Classifiers of 32 x 32 images: an MLP, a small ViT and a convolutional net.

To the trainer an image is a sequence of one prediction: images (B, 3, 32, 32) -> logits (B, 1,
classes). `vocab_size` counts classes, `context` is 1. None has biases or gains.
"""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Generator, Tensor, nn
from torch.nn import functional as F

from geon.errors import UsageError
from geon.models.base import LanguageModel, declare, normal
from geon.models.kept import Pass
from geon.models.layers import Projections, head_axes, lowered, relu_squared, rms_norm
from geon.models.shapes import Shape
from geon.optim.modular import Network
from geon.optim.roles import ParamInfo, Role

CHANNELS, SIDE = 3, 32
PATCH = 4
"""Pixels of a side of the ViT's patches."""


class MLPShape(Shape):
    """Options of mlp: none of its own."""

    arch = "mlp"


@dataclass(frozen=True)
class ViTShape(Shape):
    """Options of vit. mlp_ratio: hidden width of the MLP over d_model."""

    arch = "vit"

    mlp_ratio: int = 4


class ConvNetShape(Shape):
    """Options of conv: none of its own."""

    arch = "conv"


class ImageModel(LanguageModel):
    """What the three share: a head without bias, and an initial draw that keeps variances."""

    head: nn.Linear

    @abstractmethod
    def flops_per_token(self) -> int:
        """FLOPs of forward and backward for one image: 6 a weight, at each place of use."""

    @abstractmethod
    def activations(self) -> int:
        """About how many numbers autograd keeps for one image."""

    def block_bytes(self, at: Pass) -> int:
        """Nothing: engine/images.py reckons with `activations`."""
        return 0

    def outer_bytes(self, at: Pass) -> int:
        """Nothing, as above."""
        return 0

    def project(self, x: Tensor) -> Tensor:
        """(B, 1, D) -> (B, 1, classes)."""
        return self.head(x)

    @property
    def head_weight(self) -> Tensor:
        """Weight of the head (classes, D)."""
        return self.head.weight

    def roles(self) -> list[ParamInfo]:
        """A head; all other matrices are hidden, the one that reads pixels too."""
        return declare(self, {"head.weight": Role.HEAD, "weight": Role.HIDDEN}, {}, {})

    def initial(self, info: ParamInfo, generator: Generator) -> Tensor:
        """N(0, 2 / inputs) before a ReLU, N(0, 1 / inputs) at the head."""
        inputs = math.prod(info.shape[1:])
        gain = 1.0 if info.role is Role.HEAD else 2.0
        return normal(info, math.sqrt(gain / inputs), generator)

    def modular(self) -> Network:
        """Nothing: these models do not describe themselves.

        Raises:
            UsageError: always; a budget and a certificate are for language models.
        """
        raise UsageError(
            f"model.arch={self.arch} has no modular norm: leave out optim.budget=modular, "
            "mode=certify and logger.certify_every with task=image"
        )

    def shard_units(self) -> list[nn.Module]:
        """None: the models are small, and FSDP2's root holds all of them."""
        return []

    def tp_plan(self) -> dict[str, Any]:
        """None: every tensor rank would do the same."""
        return {}


class MLP(ImageModel):
    """n_layer matrices with ReLU between them: 3072, d_model, d_model / 2, ..., classes.

    With 3 and 128 the network of the modular manifolds post (J. Bernstein, 2025): 3072-128-64-10.
    """

    shape_type = MLPShape

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        shape = self.shape
        widths = [max(1, shape.d_model >> i) for i in range(shape.n_layer - 1)]
        if shape.n_layer < 2:
            raise UsageError(f"model.n_layer {shape.n_layer}: an mlp has at least 2 matrices")
        sides = [CHANNELS * SIDE * SIDE, *widths]
        pairs = zip(sides[:-1], sides[1:], strict=True)
        self.layers = nn.ModuleList(nn.Linear(*pair, bias=False) for pair in pairs)
        self.head = nn.Linear(widths[-1], shape.vocab_size, bias=False)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Images (B, 3, 32, 32) -> (B, 1, D)."""
        x = lowered(tokens.flatten(1))
        for layer in self.layers:
            x = F.relu(layer(x))
        return x[:, None]

    def initial(self, info: ParamInfo, generator: Generator) -> Tensor:
        """N(0, 1 / (3 inputs)): the variance of torch's own draw, as in the post."""
        return normal(info, math.sqrt(1.0 / (3.0 * info.shape[1])), generator)

    def flops_per_token(self) -> int:
        """FLOPs of forward and backward for one image."""
        return 6 * self.parameter_count()

    def activations(self) -> int:
        """About how many numbers autograd keeps for one image."""
        return CHANNELS * SIDE * SIDE + 4 * self.shape.d_model


class _Block(nn.Module):
    """Attention without a mask, and an MLP, each behind an RMSNorm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        d = shape.d_model
        self.head_dim = shape.head_dim
        self.proj_in = Projections(d, False, bias=False)
        self.proj_out = nn.Linear(d, d, bias=False)
        self.up = nn.Linear(d, shape.mlp_ratio * d, bias=False)
        self.down = nn.Linear(shape.mlp_ratio * d, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        parts = (t.unflatten(-1, (-1, self.head_dim)) for t in self.proj_in(rms_norm(x)))
        q, k, v = (t.transpose(1, 2) for t in parts)
        mixed = F.scaled_dot_product_attention(rms_norm(q), rms_norm(k), v)
        x = x + self.proj_out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(relu_squared(self.up(rms_norm(x))))


class ViT(ImageModel):
    """A vision transformer (Dosovitskiy et al., arXiv 2010.11929) that averages its patches."""

    shape_type = ViTShape
    patches = (SIDE // PATCH) ** 2

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        shape = self.shape
        self.inputs = nn.Linear(CHANNELS * PATCH * PATCH, shape.d_model, bias=False)
        self.positions = nn.Embedding(self.patches, shape.d_model)
        self.blocks = nn.ModuleList(_Block(shape) for _ in range(shape.n_layer))
        self.head = nn.Linear(shape.d_model, shape.vocab_size, bias=False)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Images (B, 3, 32, 32) -> (B, 1, D)."""
        cut = F.unfold(tokens, PATCH, stride=PATCH).mT
        x = lowered(self.inputs(cut) + self.positions.weight)
        for block in self.blocks:
            x = self.run_block(block, x)
        return rms_norm(x).mean(1, keepdim=True)

    def roles(self) -> list[ParamInfo]:
        """Positions are an embedding; heads are declared as in the language models."""
        roles = {
            "positions.weight": Role.EMBEDDING,
            "head.weight": Role.HEAD,
            "weight": Role.HIDDEN,
        }
        return declare(self, roles, {}, head_axes(self.shape.n_head))

    def initial(self, info: ParamInfo, generator: Generator) -> Tensor:
        """Positions N(0, 0.02^2), matrices N(0, 1 / inputs), branches' ends / sqrt(2 layers)."""
        if info.role is Role.EMBEDDING:
            return normal(info, 0.02, generator)
        end = info.name.endswith(("proj_out.weight", "down.weight"))
        depth = 2 * self.shape.n_layer if end else 1
        return normal(info, 1.0 / math.sqrt(info.shape[1] * depth), generator)

    def shard_units(self) -> list[nn.Module]:
        """The blocks."""
        return list(self.blocks)

    def flops_per_token(self) -> int:
        """FLOPs of forward and backward for one image."""
        s, count = self.shape, self.patches
        matrices = sum(i.numel for i in self.infos if i.role is Role.HIDDEN)
        attention = 12 * s.n_layer * s.d_model * count * count
        return 6 * (matrices * count + self.head.weight.numel()) + attention

    def activations(self) -> int:
        """About how many numbers autograd keeps for one image."""
        s = self.shape
        block = (10 + 3 * s.mlp_ratio) * s.d_model + s.n_head * self.patches
        return self.patches * (s.n_layer * block + 4 * s.d_model)


class ConvNet(ImageModel):
    """n_layer convolutions of 3 x 3 and stride 2, the last of d_model channels, then an average.

    Each layer has twice the channels of the one before. Kernels are declared by position: nine
    matrices (d_out, d_in), each stepped by 1/9, which is Scion's norm of a convolution.
    """

    shape_type = ConvNetShape

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        shape = self.shape
        widths = [max(1, shape.d_model >> i) for i in range(shape.n_layer)][::-1]
        pairs = zip([CHANNELS, *widths[:-1]], widths, strict=True)
        self.layers = nn.ModuleList(
            nn.Conv2d(*pair, 3, stride=2, padding=1, bias=False) for pair in pairs
        )
        self.head = nn.Linear(shape.d_model, shape.vocab_size, bias=False)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Images (B, 3, 32, 32) -> (B, 1, D)."""
        x = lowered(tokens)
        for layer in self.layers:
            x = F.relu(rms_norm(layer(x).movedim(1, -1))).movedim(-1, 1)
        return x.flatten(2).mean(2)[:, None]

    def roles(self) -> list[ParamInfo]:
        """Kernels by position, and a head."""
        infos = []
        for name, param in self.named_parameters():
            kernel = 2 if param.ndim == 4 else 0
            role = Role.HIDDEN if kernel else Role.HEAD
            infos.append(
                ParamInfo(name, tuple(param.shape), role, kernel=kernel, by_position=bool(kernel))
            )
        return infos

    def _places(self) -> list[int]:
        """Pixels that each layer's kernel is used at."""
        return [max(1, SIDE >> i) ** 2 for i in range(1, self.shape.n_layer + 1)]

    def flops_per_token(self) -> int:
        """FLOPs of forward and backward for one image."""
        layers = zip(self.layers, self._places(), strict=True)
        used = sum(layer.weight.numel() * places for layer, places in layers)
        return 6 * (used + self.head.weight.numel())

    def activations(self) -> int:
        """About how many numbers autograd keeps for one image."""
        layers = zip(self.layers, self._places(), strict=True)
        pixels = CHANNELS * SIDE * SIDE
        return pixels + sum(4 * layer.weight.shape[0] * places for layer, places in layers)


IMAGE_MODELS: dict[str, type[ImageModel]] = {"mlp": MLP, "vit": ViT, "conv": ConvNet}
