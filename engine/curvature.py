"""Estimates of the Hessian's diagonal for the baselines that step by it."""

import torch

from geon.engine.trainer import Callback, Trainer
from geon.optim import Baseline


class Curvature(Callback):
    """Gauss-Newton-Bartlett estimate (Liu et al., Sophia, arXiv 2305.14342, algorithm 2).

    Labels are drawn from the model's own predictions; tokens times the square of the gradient of
    their mean loss estimates the diagonal of the Gauss-Newton matrix. Cost: one more forward and
    backward pass over a micro-batch, on the steps that ask for it.
    """

    def before_update(self, trainer: Trainer) -> None:
        """Hand an estimate of the Hessian's diagonal to the baselines that want one."""
        run, optimizer = trainer.run, trainer.run.optimizer
        wanting = [
            (group, rule)
            for group in optimizer.param_groups
            if isinstance(rule := optimizer.rules[group["name"]], Baseline)
            and rule.origin.curvature_every
            and trainer.step % rule.origin.curvature_every == 0
        ]
        if not wanting:
            return
        tokens = run.batches.step(trainer.step)[0][0].to(run.parallel.device)
        seed = run.config.seed * 1_000_003 + trainer.step * run.parallel.env.world
        generator = torch.Generator(tokens.device).manual_seed(seed + run.parallel.env.rank)
        logits = run.model(tokens).flatten(0, 1)
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).flatten()
        loss = torch.nn.functional.cross_entropy(logits, labels)
        params = list(run.model.parameters())
        grads = torch.autograd.grad(loss, params)
        diagonal = {
            param: run.parallel.mean(grad.square().mul_(labels.numel()))
            for param, grad in zip(params, grads, strict=True)
        }
        for group, rule in wanting:
            rule.curvature = {param: diagonal[param] for param in group["params"]}
