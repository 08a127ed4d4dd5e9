"""Faults between rotation and o_proj: scale, mask, ALiBi, softmax, and which head goes with which."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from minillm.verify.causes.positions import describe_positions
from minillm.verify.compare import tokens_of
from minillm.verify.ranges import ranges
from minillm.verify.reference import slopes_of
from minillm.verify.scene import Candidate, Scene


def scores(scene: Scene) -> Iterator[Candidate]:
    """scores = a q k + b m p, hidden where the mask says so: another mask, another a, another b, other heads."""
    formula, config = scene.formula, scene.formula.config
    q, k = (formula.split(x) for x in scene.inputs())
    raw = q @ formula.shared(k).mT  # (B, H, T, S), before any scale
    root = math.sqrt(config.head_size)
    bias = formula.alibi().double() if config.position == "alibi" else torch.zeros((), dtype=torch.float64)
    visible, seen = formula.visible(), scene.case.found.isfinite()

    def masked(values: Tensor, mask: Tensor = visible) -> Tensor:
        return values.masked_fill(~mask, -math.inf)

    right = raw / root + bias / root
    yield Candidate("mask", describe_mask(seen, scene), masked(right, seen))
    yield from _soft_mask(scene, right)
    if config.num_kv_heads not in (1, config.num_heads):
        text = "with key heads shared in turn (repeat), not in groups (repeat_interleave)"
        tiled = q @ k.repeat(1, config.heads_per_group, 1, 1).mT
        yield Candidate("groups", text, masked(tiled / root + bias / root))
    if config.position == "alibi":
        for text, other in _other_alibi(scene, raw, root):
            yield Candidate("alibi", text, masked(raw / root + other / root))
        yield from _alibi_positions(scene, raw, root)
    yield from _scaled(scene, raw, bias)


def _soft_mask(scene: Scene, right: Tensor) -> Iterator[Candidate]:
    """What may not be seen got a number that softmax still sees."""
    hidden = ~scene.formula.visible() & scene.formula.keep[:, None, :, None]
    extra = (scene.case.found.double() - right)[hidden.expand_as(right)]
    if len(extra) and bool(extra.isfinite().all()):
        added = float(extra.mean())
        text = f"with {added:.4g} added where a query may not look"
        yield Candidate("mask", text, torch.where(scene.formula.visible(), right, right + added))
    text = "with scores times the mask: 0 where a query may not look"
    yield Candidate("mask", text, right * scene.formula.visible())


def describe_mask(seen: Tensor, scene: Scene) -> str:
    """In what way the keys that were seen, (B, H, T, S) bool, are others than those that may be."""
    formula = scene.formula
    index = torch.arange(seen.shape[-1], device=seen.device)
    back = index[:, None] - index  # queries look back by so many tokens
    asking = formula.keep[:, None, :, None].expand_as(seen)
    real = formula.keep[:, None, None, :] & asking
    for least, causal in (
        (0, ""),
        (-1, "each token sees the next"),
        (1, "no token sees itself"),
        (None, "nothing is causal"),
    ):
        for allowed, padding in ((real, ""), (asking, "padding is visible")):
            keys = allowed if least is None else (back >= least) & allowed
            if (causal or padding) and bool((seen == keys)[asking].all()):
                return "with a mask in which " + " and ".join(filter(None, (causal, padding)))
    both = seen & real
    window = int(back.expand_as(both)[both].max()) + 1 if bool(both.any()) else 0
    if bool((both == ((back >= 0) & (back < window) & real)).all()) and window < seen.shape[-1]:
        return f"with a window: each token sees {window} and no more"
    return "with another mask"


def _other_alibi(scene: Scene, raw: Tensor, root: float) -> Iterator[tuple[str, Tensor]]:
    """ALiBi terms m p before the division by sqrt(E), as others have them."""
    formula, heads = scene.formula, scene.formula.config.num_heads
    right = formula.alibi().double()
    positions = formula.positions[:, None, None, :].double()
    slopes = slopes_of(heads).to(right.device)[:, None, None].double()
    index = torch.arange(raw.shape[-1], device=raw.device, dtype=torch.float64)
    yield "without ALiBi", torch.zeros_like(right)
    yield "with ALiBi outside the division by sqrt(E), as BLOOM has it", right * root
    yield "with ALiBi added twice", right * 2
    yield "with ALiBi divided by sqrt(E) twice", right / root
    yield "with ALiBi's sign turned", -right
    yield "with slopes and positions not rounded to bfloat16", slopes * positions
    yield "with the slopes of heads in reverse order", right.flip(1)
    smooth = torch.tensor([2 ** (-8 * (h + 1) / heads) for h in range(heads)], device=raw.device)[:, None, None]
    text = "with slopes 2^(-8h/H) for a number of heads that is no power of two"
    yield text, (smooth.bfloat16() * positions.bfloat16()).double()
    yield f"{text}, not rounded", smooth.double() * positions
    yield "with distances in place of positions, which softmax cannot tell", slopes * (index - index[:, None])
    yield "with distances, of the wrong sign", slopes * (index[:, None] - index)


def _alibi_positions(scene: Scene, raw: Tensor, root: float) -> Iterator[Candidate]:
    """The key positions that the recorded scores imply: (scores sqrt(E) - q k) / m, where a token sees itself."""
    formula = scene.formula
    slopes = slopes_of(formula.config.num_heads).to(raw.device, torch.bfloat16).double()
    excess = (scene.case.found.double() * root - raw) / slopes[:, None, None]
    own = excess.diagonal(dim1=-2, dim2=-1)[:, :1].mean(dim=1)  # (B, T), the first head: the steepest slope
    if not bool(own[formula.keep].isfinite().all()):
        return
    found = own.nan_to_num(0.0, 0.0, 0.0).round().long()
    term = slopes[:, None, None] * found[:, None, None, :].to(torch.bfloat16).double()
    output = (raw / root + term / root).masked_fill(~formula.visible(), -math.inf)
    yield Candidate("positions", describe_positions(found, formula), output)


def _scaled(scene: Scene, raw: Tensor, bias: Tensor) -> Iterator[Candidate]:
    """The factors a and b that fit best, and what they are."""
    formula, config = scene.formula, scene.formula.config
    found, root = scene.case.found.double(), math.sqrt(config.head_size)
    used = found.isfinite() & formula.visible() & formula.keep[:, None, :, None]
    terms = [raw[used]] + ([bias.expand_as(raw)[used]] if bias.ndim else [])
    matrix = torch.stack(terms, dim=1)
    factors = torch.linalg.lstsq(matrix.T @ matrix, matrix.T @ found[used]).solution.tolist()
    a, b = factors[0], factors[1] if bias.ndim else 0.0
    names = {1.0: "no scale", 1 / config.head_size: "1/E", 1 / math.sqrt(config.hidden_size): "1/sqrt(D)"}
    name = next((f" ({text})" for value, text in names.items() if abs(a - value) < 1e-4 * value), "")
    output = (a * raw + b * bias).masked_fill(~formula.visible(), -math.inf)
    if abs(a * root - 1) > 1e-3:
        yield Candidate("scale", f"with q k times {a:.6g}{name} in place of 1/sqrt(E) = {1 / root:.6g}", output)
    elif bias.ndim:
        yield Candidate("alibi", f"with ALiBi times {b * root:.6g}", output)


def softmax(scene: Scene) -> Iterator[Candidate]:
    """Weights that are another function of the scores."""
    (x,) = scene.inputs()
    for dim, text in ((2, "queries"), (1, "heads")):
        yield Candidate("softmax", f"with softmax over {text}, not keys", x.softmax(dim=dim).nan_to_num(0.0))
    top = x.amax(dim=-1, keepdim=True).clamp(min=0)
    grown = (x - top).exp()
    yield Candidate(
        "softmax", "with 1 added to the sum of softmax", grown / (grown.sum(-1, keepdim=True) + (-top).exp())
    )
    yield Candidate("softmax", "with sigmoid for softmax", x.sigmoid())
    sharper = scene.formula.config.head_size**0.5
    for factor, what in ((1 / sharper, "divided"), (sharper, "multiplied")):
        yield Candidate("scale", f"with the scores {what} by sqrt(E) once more", (x * factor).softmax(dim=-1))


def mixed(scene: Scene) -> Iterator[Candidate]:
    """Weights times values: values of other heads, or heads put together in another way."""
    formula, config = scene.formula, scene.formula.config
    x, v = scene.inputs()
    weights, values = x.softmax(dim=-1), formula.split(v)
    mixture = weights @ formula.shared(values)  # (B, H, T, E)
    text = "with heads and tokens not exchanged before they are joined"
    yield Candidate("head_layout", text, mixture.reshape(scene.case.exact.shape))
    text = "with the numbers of heads interleaved, (E, H) for (H, E)"
    yield Candidate("head_layout", text, mixture.permute(0, 2, 3, 1).flatten(2))
    if config.num_kv_heads not in (1, config.num_heads):
        tiled = weights @ values.repeat(1, config.heads_per_group, 1, 1)
        text = "with value heads shared in turn (repeat), not in groups (repeat_interleave)"
        yield Candidate("groups", text, tiled.transpose(1, 2).flatten(2))
    for dtype in (torch.bfloat16, torch.float16):
        if torch.finfo(dtype).eps > torch.finfo(scene.case.dtype).eps:
            coarse = weights.to(dtype).double() @ formula.shared(values)
            yield Candidate(
                "weights_rounded", f"with softmax rounded to {str(dtype)[6:]}", coarse.transpose(1, 2).flatten(2)
            )
    keys = scene.recorded(scene.name.replace("mixed", "k_proj"))
    if keys is not None:
        yield Candidate("wrong_input", "of keys in the place of values", scene.compute([x, keys]))
    yield Candidate("softmax", "of raw scores, without softmax", _without_softmax(scene))


def _without_softmax(scene: Scene) -> Tensor:
    x, v = scene.inputs()
    mixture = x.masked_fill(x == -math.inf, 0.0) @ scene.formula.shared(scene.formula.split(v))
    return mixture.transpose(1, 2).flatten(2)


def heads_reordered(scene: Scene) -> Iterator[Candidate]:
    """Each recorded head beside the right one that it is most like; a cause if all are exact and not in order."""
    size, exact, found = scene.formula.config.head_size, scene.case.exact, scene.case.found.double()
    if ".attention." not in scene.name or (scene.case.operation.kind == "linear" and scene.name.endswith("o_proj")):
        return
    flat = exact.ndim == 3
    right, given = (x.unflatten(-1, (-1, size)).transpose(1, 2) if flat else x for x in (exact, found))
    keep = scene.formula.keep
    rows = [tokens_of(x, keep).unflatten(1, (right.shape[1], -1)).transpose(0, 1).flatten(1) for x in (right, given)]
    a, b = (x.nan_to_num(0.0, 0.0, 0.0) for x in rows)
    nearest = torch.cdist(b[None], a[None])[0].argmin(dim=1)
    moved = [head for head, source in enumerate(nearest.tolist()) if head != source]
    if moved:
        output = right[:, nearest]
        output = output.transpose(1, 2).flatten(2) if flat else output
        sources = nearest[moved].tolist()
        text = f"with head{'s' if len(moved) > 1 else ''} {ranges(sources)} in the place of {ranges(moved)}"
        yield Candidate("heads_reordered", text, output)
