"""Optimizers that know the geometry of each weight. Importing this costs torch alone."""

from geon.optim.adamw import AdamW
from geon.optim.baselines import BASELINES, Baseline
from geon.optim.hybrid import Group, HybridOptimizer
from geon.optim.manifolds import MANIFOLDS, Euclidean, Manifold, Stiefel
from geon.optim.matrices import block_scale, check_per_head, matrices_of
from geon.optim.norms import NORMS, Norm, Sign, Spectral
from geon.optim.polar import Polar, Precision, polar, polar_svd
from geon.optim.roles import Block, ParamInfo, Role
from geon.optim.router import Route, classify, route, table
from geon.optim.rule import Rule
from geon.optim.solvers import Ladder, certify, steepest

__all__ = [
    "MANIFOLDS",
    "NORMS",
    "AdamW",
    "BASELINES",
    "Baseline",
    "Block",
    "Euclidean",
    "Group",
    "HybridOptimizer",
    "Ladder",
    "Manifold",
    "Norm",
    "ParamInfo",
    "Polar",
    "Precision",
    "Role",
    "Route",
    "Rule",
    "Sign",
    "Spectral",
    "Stiefel",
    "block_scale",
    "certify",
    "check_per_head",
    "classify",
    "matrices_of",
    "polar",
    "polar_svd",
    "route",
    "steepest",
    "table",
]
