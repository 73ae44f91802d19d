"""Optimizers that know the geometry of each weight. Importing this costs torch alone."""

from geon.optim.adamw import AdamW
from geon.optim.baselines import BASELINES, Baseline
from geon.optim.build import build
from geon.optim.classify import classify
from geon.optim.declare import Declared, fused, stored
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
from geon.optim.routing import Routing, route_by
from geon.optim.rule import Rule
from geon.optim.shard import Placement, Sharding
from geon.optim.solvers import Ladder, certify, steepest

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
