"""The same function in fewer parts: factors multiplied into the weights that they scale."""

import torch

from geon.models.base import LanguageModel


@torch.no_grad()
def folded(model: LanguageModel) -> LanguageModel:
    """A model whose gains, activation scale and muP factor of the logits are in its weights.

    What it gives differs by rounding alone. It is for inference and export: the optimizer's rules
    were made for the weights of before. A tied gpt keeps the factor of muP, because nothing that
    its logits alone read could hold it.

    Returns: the model itself where there is nothing to fold; otherwise a new one, which shares the
    weights that stay.
    """
    old, params = model.shape, dict(model.named_parameters())
    shape = old.folded
    if shape == old:
        return model
    # Of logits W x + b, or of the last norm's gains and biases where W is the embedding's too.
    last = "head" if hasattr(model, "head") else "norm"
    logits = 1.0 if shape.mup else old.shrink
    with torch.device("meta"):
        plain = type(model)(shape)
    weights = {}
    for name, _ in plain.named_parameters():
        weight, stem = params[name].detach(), name.removesuffix(".weight")
        if f"{stem}.rows" in params:
            weight = params[f"{stem}.rows"][:, None] * weight * params[f"{stem}.cols"]
        if name.endswith("down.weight") and getattr(old, "activation_scale", 1.0) != 1.0:
            weight = weight * old.activation_scale
        if name.rsplit(".", 1)[0] == last and logits != 1.0:
            weight = weight * logits
        weights[name] = weight
    plain.load_state_dict(weights, assign=True)
    return plain.train(model.training)
