"""What is said of a parameter apart from its name and shape: in overrides, and for known models."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from dataclasses import fields as dataclass_fields
from typing import Any

from geon.errors import UsageError, nearest
from geon.optim.roles import ParamInfo, Role


@dataclass(frozen=True)
class Declared:
    """A role, and the fields of `ParamInfo` that say how the weight is stored.

    Attributes:
        role: what the parameter does.
        fields: by name; what is left out has ParamInfo's default.
    """

    role: Role = Role.HIDDEN
    fields: Mapping[str, Any] = field(default_factory=dict)

    def info(self, name: str, shape: Iterable[int]) -> ParamInfo:
        """The declaration of a parameter.

        Raises:
            UsageError: the parameter cannot be stored like that; names it.
        """
        try:
            given: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value
                for key, value in self.fields.items()
            }
            return ParamInfo(name, tuple(shape), self.role, **given)
        except (TypeError, ValueError) as error:
            raise UsageError(str(error)) from None


def stored(role: Role | str = Role.HIDDEN, **fields: Any) -> Declared:
    """Say what one weight is: `stored(transposed=True)`, `stored("head")`, `stored(kernel=2)`.

    fields: those of `ParamInfo`.

    Raises:
        UsageError: an unknown role or field.
    """
    known = [f.name for f in dataclass_fields(ParamInfo)][3:]
    if unknown := set(fields) - set(known):
        name = min(unknown)
        raise UsageError(f"stored() takes {', '.join(known)}, not {name}.{nearest(name, known)}")
    if role not in list(Role):
        raise UsageError(f"role '{role}' is not one of {', '.join(Role)}.{nearest(role, [*Role])}")
    return Declared(Role(role), fields)


def fused(
    *,
    heads: int | tuple[int, ...] = 0,
    interleaved: int = 0,
    transposed: bool = False,
    axis: int = 0,
    **parts: int,
) -> Declared:
    """Say which matrices share a weight: `fused(q=512, k=128, v=128)`.

    heads: of all parts, or of each.
    interleaved: number of stretches, each with its share of every part: the number of heads if the
        rows are q, k, v of the first head, then of the second; 0 for all of q, then all of k.
    transposed: the weight is stored (d_in, d_out).
    axis: 0 for parts that share their input, 1 for parts that share their output.
    parts: size of each, in order; the names are for people.

    Raises:
        UsageError: no parts.
    """
    if not parts or not all(type(size) is int for size in parts.values()):
        given = ", ".join(f"{name}={size!r}" for name, size in parts.items())
        raise UsageError(
            f"fused({given}) needs the size of each part, e.g. fused(q=512, k=128, v=128)"
        )
    fields: dict[str, Any] = {"splits": tuple(parts.values()), "split_axis": axis}
    fields |= {"heads": heads, "interleaved": interleaved, "transposed": transposed}
    return Declared(Role.HIDDEN, fields)
