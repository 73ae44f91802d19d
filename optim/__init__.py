"""Optimizers that know the geometry of each weight. Importing this costs torch alone."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from geon.optim.adamw import AdamW
from geon.optim.baselines import BASELINES, Baseline
from geon.optim.entries import EntryRule
from geon.optim.finishes import FINISHES, Finish
from geon.optim.groups import Group, on_manifold, project_
from geon.optim.hybrid import HybridOptimizer
from geon.optim.linalg import Precision
from geon.optim.manifolds import MANIFOLDS, Euclidean, Manifold, Stiefel
from geon.optim.matrices import block_scale, check_per_head, matrices_of, plan_of
from geon.optim.norms import NORMS, Norm, Sign, Spectral
from geon.optim.polar import Polar, polar, polar_svd
from geon.optim.roles import Block, ParamInfo, Role
from geon.optim.router import Route, route, table
from geon.optim.row_adam import RowAdam
from geon.optim.rule import Rule
from geon.optim.shard import Placement, Sharding
from geon.optim.solvers import Ladder, certify, steepest

if TYPE_CHECKING:
    from geon.optim.builder import build
    from geon.optim.declare import Declared, fused, stored
    from geon.optim.foreign import classify
    from geon.optim.routing import Routing, route_by

_LATER = {
    "build": "builder",
    "classify": "foreign",
    "Declared": "declare",
    "fused": "declare",
    "stored": "declare",
    "Routing": "routing",
    "route_by": "routing",
}
"""Names that are imported when first asked for, and their files: they double the import's time."""


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'geon.optim' has no attribute '{name}'")
    found = getattr(import_module(f"geon.optim.{_LATER[name]}"), name)
    globals()[name] = found
    return found


__all__ = [
    "BASELINES",
    "FINISHES",
    "MANIFOLDS",
    "NORMS",
    "AdamW",
    "Baseline",
    "Block",
    "Declared",
    "EntryRule",
    "Euclidean",
    "Finish",
    "Group",
    "HybridOptimizer",
    "Ladder",
    "Manifold",
    "Norm",
    "ParamInfo",
    "Placement",
    "Polar",
    "Precision",
    "Role",
    "Route",
    "Routing",
    "RowAdam",
    "Rule",
    "Sharding",
    "Sign",
    "Spectral",
    "Stiefel",
    "block_scale",
    "build",
    "certify",
    "check_per_head",
    "classify",
    "fused",
    "matrices_of",
    "on_manifold",
    "plan_of",
    "polar",
    "polar_svd",
    "project_",
    "route",
    "route_by",
    "steepest",
    "stored",
    "table",
]
