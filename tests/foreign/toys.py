"""Small modules, and what `classify` says of them."""

from torch import nn

from geon.optim import classify


def roles(model, **options):
    return {info.name: str(info.role) for info in classify(model, **options)}


def weights(model, **options):
    """Roles of weights of two dimensions or more."""
    return {
        i.name: str(i.role)
        for i in classify(model, **options)
        if len(i.shape) > 1 and i.role != "bias"
    }


def net(*layers):
    return nn.Sequential(*layers)


class Holds(nn.Module):
    """A module with these parts."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def linear(rows=8, cols=8):
    return nn.Linear(cols, rows, bias=False)


def block():
    return Holds(mlp=net(linear(16, 8), nn.GELU(), linear(8, 16)))
