"""AdamW, which parameters decay, and how the learning rate moves.

AdamW (arXiv 1711.05101, algorithm 2), for the gradient g at step t:

    m = b1 m + (1 - b1) g          v = b2 v + (1 - b2) g^2
    w = w - lr * wd * w - lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from minillm.training.adamw8 import AdamW8


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: the matrices of linear layers decay, all others do not.

    Not the norms and biases: they have no direction to keep short, a norm's weight belongs near 1. Not the embeddings
    (nor a head tied to them): a token that is absent from the batch gets no gradient, and would only shrink. nanoGPT
    decays them; OLMo 2 (arXiv 2501.00656) stopped, since behind a norm small embeddings get large gradients.
    """
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    decays = [p.ndim >= 2 and id(p) not in embeddings for p in trainable]
    return [
        {"params": [p for p, yes in zip(trainable, decays, strict=True) if yes], "weight_decay": weight_decay},
        {"params": [p for p, yes in zip(trainable, decays, strict=True) if not yes], "weight_decay": 0.0},
    ]


def adamw(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> torch.optim.AdamW:
    """torch's AdamW over `parameter_groups`, fused: one pass over a tensor for the whole formula.

    b2 = 0.95 instead of 0.999 follows GPT-3 (arXiv 2005.14165, appendix B): gradients of a language model change scale
    early on, and v has to forget as fast.
    """
    return torch.optim.AdamW(parameter_groups(model, weight_decay), lr=learning_rate, betas=betas, eps=eps, fused=True)


def make_optimizer(
    model: nn.Module, kind: str, *, learning_rate: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """ "adamw", torch's, or "adamw8", whose moments are kept in 8 bits (`minillm.training.adamw8`)."""
    if kind == "adamw":
        return adamw(model, learning_rate=learning_rate, weight_decay=weight_decay, betas=betas)
    return AdamW8(parameter_groups(model, weight_decay), lr=learning_rate, betas=betas)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """The same rate for every group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def warmup_linear(done: float, *, warmup: float) -> float:
    """The same with a straight fall to 0, as transformers' "linear".

    >>> [warmup_linear(done, warmup=0.2) for done in (0.0, 0.1, 0.2, 0.6, 1.0)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    return done / warmup if done < warmup else (1 - done) / (1 - warmup) if warmup < 1 else 0.0


def warmup_cosine(done: float, *, warmup: float, floor: float = 0.0) -> float:
    """What to multiply the peak learning rate by when the fraction `done` (0 to 1) of the run is over.

        done / warmup                                               done < warmup
        floor + (1 - floor) (1 + cos(pi x)) / 2                     x = (done - warmup) / (1 - warmup)

    warmup: fraction of the run with a linear rise; floor: what the fall (arXiv 1608.03983 eq. 5) ends at. In fractions,
    not in steps, so that a run may be measured in steps or in minutes.

    >>> [round(warmup_cosine(done, warmup=0.2), 3) for done in (0.0, 0.1, 0.2, 0.6, 1.0)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if done < warmup:
        return done / warmup
    fall = min((done - warmup) / (1 - warmup), 1.0) if warmup < 1 else 0.0
    return floor + (1 - floor) * (1 + math.cos(math.pi * fall)) / 2
