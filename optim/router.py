"""Every parameter to exactly one route, in order, by role and name; refused when unsure."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from geon.errors import UsageError
from geon.optim.roles import ParamInfo, Role


@dataclass(frozen=True)
class Route:
    """A named set of parameters: those of one of `roles`, or whose name matches `pattern`.

    Attributes:
        name: the route's name, e.g. "hidden"; also the name of its param group.
        roles: roles that this route takes.
        pattern: globs over parameter names, with | between them; when given, `roles` is not read.
        optional: whether the pattern may take nothing.
        with_heads: whether the pattern takes only parameters whose heads are known.
    """

    name: str
    roles: frozenset[Role] = frozenset()
    pattern: str | None = None
    optional: bool = False
    with_heads: bool = False

    def takes(self, info: ParamInfo) -> bool:
        """Whether this route takes the parameter."""
        if self.pattern is not None:
            fits = any(fnmatchcase(info.name, glob) for glob in self.pattern.split("|"))
            return fits and (bool(info.heads) or not self.with_heads)
        return info.role in self.roles


def route(infos: Sequence[ParamInfo], routes: Sequence[Route]) -> dict[str, str]:
    """Assign each parameter to the first route that takes it.

    Returns:
        parameter name -> route name, in the order of `infos`.

    Raises:
        UsageError: a parameter that no route takes, a name that occurs twice, or a pattern that
            matches no parameter (a typo would otherwise pass unseen).
    """
    assigned: dict[str, str] = {}
    for info in infos:
        if info.name in assigned:
            raise UsageError(f"parameter '{info.name}' is declared twice by the model")
        taker = next((r for r in routes if r.takes(info)), None)
        if taker is None:
            known = ", ".join(r.name for r in routes)
            raise UsageError(
                f"no route takes parameter '{info.name}' of role '{info.role}' and shape "
                f"{info.shape} (routes: {known}); give optim.{info.role} a rule"
            )
        assigned[info.name] = taker.name
    for r in routes:
        if r.pattern is not None and not r.optional and r.name not in assigned.values():
            raise UsageError(
                f"pattern '{r.pattern}' of route '{r.name}' takes no parameter; patterns are "
                f"globs over names such as '{infos[0].name}' (optim.overrides)"
            )
    return assigned


def check_partition(names: Iterable[str], groups: Iterable[Iterable[str]]) -> None:
    """Prove that the groups hold each trainable parameter exactly once.

    Raises:
        UsageError: names a parameter that is missing, unknown or in two groups.
    """
    wanted, seen = set(names), set[str]()
    for group in groups:
        for name in group:
            if name in seen:
                raise UsageError(f"parameter '{name}' is in two param groups")
            if name not in wanted:
                raise UsageError(f"param groups hold '{name}', which the model does not have")
            seen.add(name)
    if wanted - seen:
        raise UsageError(f"parameters in no param group: {', '.join(sorted(wanted - seen))}")


def table(
    infos: Sequence[ParamInfo],
    assigned: Mapping[str, str],
    rules: Mapping[str, str],
    per_head: Collection[str] = (),
) -> str:
    """Format the role/route table: one line per (route, role, shape), with counts.

    per_head: routes that step heads one by one.
    """
    rows: dict[tuple[str, str, str], list[ParamInfo]] = {}
    for info in infos:
        shape = " x ".join(map(str, info.shape)) or "scalar"
        marks = [info.storage] if info.storage else []
        if info.heads and assigned[info.name] in per_head:
            marks.append(f"{info.heads} heads")
        if marks:
            shape += f" ({', '.join(marks)})"
        rows.setdefault((assigned[info.name], info.role, shape), []).append(info)
    wide = max([10, *(len(taker) for taker, _, _ in rows)])
    head = (
        f"{'route':<{wide}} {'role':<10} {'shape':<31} {'count':>5} {'params':>13}  rule; example"
    )
    lines = [head]
    for (taker, role, shape), members in rows.items():
        total = sum(m.numel for m in members)
        lines.append(
            f"{taker:<{wide}} {role:<10} {shape:<31} {len(members):>5} {total:>13,}  "
            f"{rules[taker]}; {members[0].name}"
        )
    return "\n".join(lines)
