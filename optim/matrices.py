"""From parameters and rules to the matrices that a plan is made of."""

import math
from collections.abc import Iterable, Mapping

from geon.errors import UsageError
from geon.optim.costs import Cost
from geon.optim.entries import EntryRule
from geon.optim.norms import Reach
from geon.optim.roles import Block, ParamInfo
from geon.optim.rule import Rule
from geon.optim.shard import Layout, Matrix, Plan, Region, Sharding, Sums, make_plan


def check_per_head(rule: Rule | EntryRule, per_head: bool, where: str) -> None:
    """Refuse blocks for a rule that has no matrices.

    Raises:
        UsageError: names the place.
    """
    if per_head and not isinstance(rule, Rule):
        kind = type(rule).__name__.lower()
        raise UsageError(
            f"{where}: per_head cuts matrices into heads, but rule={kind} does not step matrices: "
            "set per_head=false, or rule=steepest"
        )


def block_scale(rule: Rule, block: Block) -> float:
    """Size of a block over the size that its rule gives to a matrix of its shape.

    A head's block keeps the size it has in the whole matrix, so that a whole orthogonal matrix is
    also a point whose heads are each on the Stiefel manifold. Positions of a kernel share the size
    of a matrix. Otherwise 1.

    Raises:
        UsageError: the manifold has no point of this shape.
    """
    if block.whole is None:
        return block.view.scale(block.box)
    own_shape = block.forms[0].shape
    try:
        whole, own = (_typical_singular_value(rule, s) for s in (block.whole, own_shape))
    except ValueError as error:
        raise UsageError(f"per_head: {error}") from None
    return whole / own


def _typical_singular_value(rule: Rule, shape: tuple[int, int]) -> float:
    """Root mean square of the singular values of a point, or in Euclidean space of a direction.

    sqrt(d_out/d_in) and the radius for Stiefel and the spectral norm.
    """
    if rule.manifold.constrains:
        return rule.manifold.length(shape) / math.sqrt(min(shape))
    return rule.norm.extent(shape) / math.sqrt(min(shape))


def matrices_of(
    info: ParamInfo,
    route: str,
    rule: Rule,
    layout: Layout,
    per_head: bool = False,
    wire_bytes: int = 4,
    device: str = "cpu",
) -> list[Matrix]:
    """Matrices that a rule steps in one parameter: itself, its parts, or heads' blocks."""
    try:
        return [
            Matrix(
                param=info.name,
                box=Region(block.rows, block.cols),
                layout=layout,
                route=route,
                reach=rule.reach if block.view.plain else Reach.MATRIX,
                operands=2 if rule.needs_weight else 1,
                wire_bytes=wire_bytes,
                cost=_cost(rule, block, device),
                orthogonalizes=rule.orthogonalizes,
                scale=block_scale(rule, block),
                sums=sums_of(rule, block.box) if block.view.plain else None,
                row_states=len(rule.row_states),
                view=block.view,
                states=block.states,
            )
            for block in info.blocks(per_head)
            if block.box[0] * block.box[1]
        ]
    except ValueError as error:
        raise UsageError(f"parameter '{info.name}': {error}") from None


def _cost(rule: Rule, block: Block, device: str) -> Cost:
    """Cost of a step of all matrices in a block."""
    found = Cost()
    for form in block.forms:
        found += rule.cost(form.shape, device).batch(form.count)
    return found


def sums_of(rule: Rule, shape: tuple[int, int]) -> Sums | None:
    """What a step of this rule needs sums of, if it can do with sums."""
    if rule.row_form is not None:
        return Sums("norms", down=2, up=1, owner_cost=Cost(), shared_cost=rule.cost(shape))
    form, short = rule.gram_form(shape), min(shape)
    if form is None:
        return None
    return Sums(
        "gram",
        form.down(short),
        form.up(short),
        form.owner_cost(shape),
        form.shared_cost(shape),
    )


def plan_of(
    members: Iterable[tuple[ParamInfo, str, Rule, bool]],
    layouts: Mapping[str, Layout],
    sharding: Sharding,
    device: str,
) -> Plan:
    """The plan of parameters that lie as `layouts` says.

    members: (parameter, route, rule, per_head), those of steepest rules alone.
    device: kind of device that computes.
    """
    matrices: list[Matrix] = []
    for info, route, rule, per_head in members:
        matrices += matrices_of(
            info, route, rule, layouts[info.name], per_head, sharding.wire_bytes, device
        )
    return make_plan(matrices, sharding)
