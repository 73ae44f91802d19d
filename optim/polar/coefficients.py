"""Odd quintic polynomials p(x) = a x + b x^3 + c x^5 whose composition drives x in (0, 1] to 1."""

from dataclasses import dataclass

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Coefficients:
    """A table of quintic steps.

    Attributes:
        name: key in configs.
        source: where the numbers come from.
        triples: (a, b, c) of each step; the last one repeats when more steps are asked for.
        safety: singular values are divided by this before every step but the last, so that
            rounding cannot push them past the interval on which the step contracts. 1.01 covers
            bf16; in fp32 1.005 does as well (our prototypes of the Gram form).
    """

    name: str
    source: str
    triples: tuple[Triple, ...]
    safety: float = 1.0

    def steps(self, count: int) -> list[Triple]:
        """Return the first `count` steps, safety applied.

        Raises:
            ValueError: count below 1 (optim.polar.steps).
        """
        if count < 1:
            raise ValueError(f"polar steps must be at least 1, got {count} (optim.polar.steps)")
        chosen = []
        for i in range(count):
            a, b, c = self.triples[min(i, len(self.triples) - 1)]
            s = self.safety if i < count - 1 else 1.0
            chosen.append((a / s, b / s**3, c / s**5))
        return chosen


CUBIC = Coefficients(
    name="cubic",
    source="Newton-Schulz: N. Higham, Functions of Matrices (2008), eq. 8.20. Converges on "
    "(0, sqrt 3), grows small values by only 1.5 a step, and saves the square of the Gram",
    triples=((1.5, -0.5, 0.0),),
)

KELLER = Coefficients(
    name="keller",
    source="K. Jordan, Muon (2024). Fast at 0, not convergent: singular values end in [0.68, 1.13]",
    triples=((3.4445, -4.7750, 2.0315),),
)

QUINTIC = Coefficients(
    name="quintic",
    source="K. Jordan's track 3 of the NanoGPT speedrun (2026): converges on (0, 1], grows small "
    "values by 2 a step; 12 steps bring those above 1e-3 to 1",
    triples=((2.0, -1.5, 0.5),),
)

POLAR_EXPRESS = Coefficients(
    name="polar_express",
    source="Amsel et al., arXiv 2505.16932: minimax for singular values in [1e-3, 1] "
    "(minimax.py computes it), which six steps bring within 6e-3 of 1, the floor of bf16, and "
    "seven within 1e-6",
    triples=(
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
        (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
        (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
        (1.875, -1.25, 0.375),
    ),
    safety=1.01,
)

TABLES = {table.name: table for table in (KELLER, POLAR_EXPRESS, CUBIC, QUINTIC)}
