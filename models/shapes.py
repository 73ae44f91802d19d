"""Sizes and options of architectures: what all have, and how each reads its own of a config."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass
from typing import Any, ClassVar, Self

from geon.errors import UsageError


@dataclass(frozen=True)
class Shape:
    """What every architecture has; each declares its own fields in a subclass, with defaults.

    Attributes:
        arch: name of the architecture, in configs and checkpoints.
        vocab_size: number of token ids.
        context: longest sequence, tokens.
        n_layer: blocks.
        n_head: attention heads, where there are some; divides d_model.
        d_model: width.
        softcap: bound of the logits, in the architecture's form; 0 leaves them.
        zero_init_proj: start output projections and head at zero.
        mup: maximal update parametrisation for AdamW: initial draw, rate and logit scales by role.
        base_width: width at which mup changes nothing.
    """

    arch: ClassVar[str] = ""

    vocab_size: int
    context: int
    n_layer: int
    n_head: int
    d_model: int
    softcap: float = 0.0
    zero_init_proj: bool = False
    mup: bool = False
    base_width: int = 64

    def __post_init__(self) -> None:
        for field in ("vocab_size", "context", "n_layer", "n_head", "d_model", "base_width"):
            if getattr(self, field) < 1:
                raise UsageError(f"model.{field} must be positive, got {getattr(self, field)}")
        self.check()

    def check(self) -> None:
        """Refuse sizes that make no model.

        Raises:
            UsageError: names the key.
        """
        if self.d_model % self.n_head:
            raise UsageError(
                f"model.d_model {self.d_model} does not divide into model.n_head {self.n_head}"
            )
        if self.head_dim % 2:
            raise UsageError(
                f"model.d_model / model.n_head = {self.head_dim}: rotary positions need it even"
            )

    def check_tensor(self, ranks: int) -> None:
        """Refuse a number of tensor ranks that does not divide what they cut.

        Raises:
            UsageError: names the key.
        """
        if self.n_head % ranks:
            raise UsageError(
                f"model.n_head {self.n_head} does not divide over {ranks} tensor ranks "
                "(parallel.tensor, or all ranks under parallel=tp)"
            )

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.d_model // self.n_head

    @property
    def shrink(self) -> float:
        """What muP multiplies logits and the rates of hidden matrices by: base_width / d_model."""
        return self.base_width / self.d_model if self.mup else 1.0

    @property
    def folded(self) -> Self:
        """The shape of the same function with its factors in its weights (models/fold.py)."""
        return dataclasses.replace(self, mup=False)

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Fields that have a default; what a checkpoint does not say is as here."""
        return {f.name: f.default for f in dataclasses.fields(cls) if f.default is not MISSING}

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Self:
        """A shape of fields by name, some of which may be of other architectures.

        Raises:
            UsageError: names a field that this one lacks, and that is not as by default.
            ValueError: a field that no architecture has.
        """
        own = {field.name for field in dataclasses.fields(cls)}
        for key, value in fields.items():
            if key in own:
                continue
            readers = [kind for kind in _kinds() if key in kind.defaults()]
            if not readers:
                raise ValueError(f"no architecture has a field '{key}'")
            if all(value != kind.defaults()[key] for kind in readers):
                names = " or ".join(sorted(kind.arch for kind in readers))
                raise UsageError(
                    f"model.{key}={_said(value)}: {cls.arch} has no such option; choose "
                    f"model={names}"
                )
        return cls(**{key: value for key, value in fields.items() if key in own})

    @classmethod
    def check_options(cls, options: Mapping[str, Any], common: Collection[str]) -> None:
        """Refuse options (model.options) that are not this architecture's.

        common: fields that have a config key of their own.

        Raises:
            UsageError: names the key, and those that there are or the kind that is expected.
        """
        own = {key: value for key, value in cls.defaults().items() if key not in common}
        for key, value in options.items():
            if key not in own:
                told = f"it has {', '.join(own)}" if own else "it has none of its own"
                where = f"write model.{key}" if key in common else told
                raise UsageError(f"model.options.{key}: {cls.arch} has no such option; {where}")
            kind = type(own[key])
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise UsageError(
                    f"model.options.{key}={_said(value)}: {cls.arch} takes a {kind.__name__}, such "
                    f"as {_said(own[key])}"
                )


def _said(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _kinds(kind: type[Shape] = Shape) -> Iterator[type[Shape]]:
    """The shapes of all architectures."""
    for below in kind.__subclasses__():
        if below.arch:
            yield below
        yield from _kinds(below)


@dataclass(frozen=True)
class DecoderShape(Shape):
    """A decoder with as many keys as queries, whose MLP has two matrices.

    Attributes:
        mlp_ratio: hidden width of the MLP over d_model.
        fused_qkv: one projection for q, k and v, with its splits declared.
    """

    mlp_ratio: int = 4
    fused_qkv: bool = False

    def check(self) -> None:
        """Refuse an MLP without width, besides.

        Raises:
            UsageError: names the key.
        """
        if self.mlp_ratio < 1:
            raise UsageError(f"model.mlp_ratio must be positive, got {self.mlp_ratio}")
        super().check()

    def check_tensor(self, ranks: int) -> None:
        """Refuse a fused projection, besides.

        Raises:
            UsageError: names the key.
        """
        if self.fused_qkv:
            raise UsageError(
                f"model.fused_qkv=true with {ranks} tensor ranks: a cut of the fused weight is not "
                "whole heads of q, k and v; set model.fused_qkv=false"
            )
        super().check_tensor(ranks)

    @property
    def mlp_width(self) -> int:
        """Hidden width of the MLP."""
        return self.mlp_ratio * self.d_model
