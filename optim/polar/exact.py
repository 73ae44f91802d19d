import torch
from torch import Tensor


def polar_svd(matrix: Tensor, tol: float = 1e-12) -> Tensor:
    """Polar factor by SVD in float64: the reference for every fast path.

    Shapes: (..., d_out, d_in) -> same, in float64. Singular directions below `tol` times the
    largest singular value contribute nothing, so zero in gives zero out.

    Cost: one SVD per matrix.
    """
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    keep = (s > tol * s[..., :1]) & (s > 0)
    return (u * keep.to(u.dtype).unsqueeze(-2)) @ vh
