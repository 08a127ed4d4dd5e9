"""Candidate causes by the kind of operation they can explain, the particular before the general.

Each is a generator `scene -> candidates`; see `minillm.verify.scene`. To teach the tool a new fault, write the faulty
formula as one more candidate in the file of its operation.
"""

from __future__ import annotations

from minillm.verify.causes import attention, backward, generic, orders, positions, quantised, stream, weights
from minillm.verify.scene import Generator

_LINEAR, _BACKWARD = ("linear",), ("gradient",)

#: (kinds of operation, generator); no kinds means all but gradients. The order is the order of trying.
GENERATORS: tuple[tuple[tuple[str, ...], Generator], ...] = (
    (("embed",), weights.embedding),
    (("norm",), weights.norm_settings),
    (("cosine", "sine"), positions.table),
    (("rotate",), positions.rotation),
    (("scores",), attention.scores),
    (("weights",), attention.softmax),
    (("mixed",), attention.mixed),
    (("inner",), stream.activation),
    (("add", "parallel_add"), stream.sum_of_terms),
    (_LINEAR, orders.meta_order),
    (_LINEAR, orders.fused_layout),
    (_LINEAR, weights.bias),
    (_LINEAR, quantised.linear),
    (("linear", "norm"), weights.scaled_weight),
    (("linear", "norm"), weights.other_weight),
    (_LINEAR, orders.transposed),
    (_LINEAR, orders.input_heads),
    (("logits",), weights.head),
    (("linear", "norm", "logits"), weights.wrong_input),
    (("linear", "rotate", "scores", "mixed"), attention.heads_reordered),
    (("linear", "norm", "logits"), weights.rounded),
    ((), generic.rounded_input),
    ((), generic.zeros),
    ((), generic.shifted),
    ((), generic.scaled),
    ((), generic.rounded_output),
    (_BACKWARD, backward.terms),
    (_BACKWARD, generic.zeros),
    (_BACKWARD, generic.shifted),
    (_BACKWARD, generic.scaled),
)
