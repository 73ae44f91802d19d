from dataclasses import dataclass

from geon.optim.manifolds.stiefel import Stiefel


@dataclass(frozen=True)
class Orthogonal(Stiefel):
    """Square matrices with all singular values equal to the radius: rotations and reflections.

    The same set as `Stiefel` for a square weight; the name promises that the weight is square,
    where the steepest spectral direction has a closed form. Small steps keep the determinant.
    """

    def scale(self, shape: tuple[int, ...]) -> float:
        """The common singular value: the radius.

        Raises:
            ValueError: the shape is not square.
        """
        if shape[-2] != shape[-1]:
            raise ValueError(
                f"a weight of shape {tuple(shape)} is not square: the orthogonal manifold holds "
                "square weights only; use manifold=stiefel"
            )
        return super().scale(shape)
