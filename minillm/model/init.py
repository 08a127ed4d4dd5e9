"""The weights that training starts from.

    matrices                     normal(0, 0.02)                    GPT-2's code and transformers' `initializer_range`
    o_proj, down_proj            normal(0, 0.02 / sqrt(2 L))        GPT-2 paper §2.3
    norm weights 1, biases 0

Each of the L layers adds two branches to the residual stream. Were their outputs as wide as all others, the stream's
variance would grow with 2 L; divided by its root, a deep model starts as calm as a shallow one.
"""

from __future__ import annotations

import math

import torch

from minillm.model.decoder import Decoder

_ENDS_A_BRANCH = ("o_proj.weight", "down_proj.weight")


@torch.no_grad()
def initialise(model: Decoder, *, seed: int, std: float = 0.02) -> None:
    """Fill every parameter in place, as above.

    Numbers come from a generator of their own, on the CPU and in fp32: the same seed gives the same model on every
    device and in every dtype (up to rounding), and torch's global random state is neither read nor changed.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    branch_std = std / math.sqrt(2 * model.config.num_layers)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            drawn = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
            drawn.normal_(0.0, branch_std if name.endswith(_ENDS_A_BRANCH) else std, generator=generator)
            parameter.copy_(drawn)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
