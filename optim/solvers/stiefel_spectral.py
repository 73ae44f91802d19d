"""Spectral norm on the Stiefel manifold: Manifold Muon's direction."""

from torch import Tensor

from geon.optim.manifolds.stiefel import Stiefel, orient, orient_like, skew, tangent_unit
from geon.optim.norms.spectral import Spectral


def one_shot(grad: Tensor, weight: Tensor, manifold: Stiefel, norm: Spectral) -> Tensor:
    """Direction A on the tangent space at `weight`, close to argmax <grad, A>, ||A|| <= 1.

    Square: A = U msign(skew(U^T G)), the maximiser itself, because the tangent space is U times
    the skew matrices and U keeps the spectral norm.
    Otherwise: A = P msign(P G) with P the tangent projection. The second projection may raise the
    spectral norm from 1 to at most 2/sqrt(3); the descent is 0.90 to 0.95 of the optimum.
    The projections run in the gradient's dtype whatever the polar factor's dtype, so the result
    is tangent to rounding.

    Shapes: (..., d_out, d_in) as stored; the result has RMS -> RMS norm about 1.
    Source: square case, J. Su, kexue.fm 11215; 2/sqrt(3): Ab = [X; Y] b with x = |X b| gives
    |P A b|^2 <= ((1 + x)/2)^2 + 1 - x^2 <= 4/3.
    Cost: one polar factor, and 4 (square) or 12 (otherwise) l s^2 FLOPs.
    """
    u, g = manifold.unit(weight), orient(grad)
    if u.shape[-2] == u.shape[-1]:
        direction = u @ skew(norm.polar(skew(u.mT @ g)))
    else:
        direction = tangent_unit(u, norm.polar(tangent_unit(u, g)))
    return orient_like(direction, grad) * norm.factor(grad.shape)
