"""Faults of parameters: rows in another order, another parameter's numbers, a bias or an eps that is not the file's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from minillm.verify.compare import tokens_of
from minillm.verify.scene import Candidate, Scene

_QKV = ("q_proj", "k_proj", "v_proj")
_EPS = (0.0, 1e-12, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)


def embedding(scene: Scene) -> Iterator[Candidate]:
    """Ids off by one, or a scale on the embedding."""
    formula = scene.formula
    for step in (1, -1):
        tokens = (formula.tokens + step) % formula.config.vocab_size
        yield Candidate("token_ids", f"with {step:+d} added to every token id", scene.compute(tokens=tokens))
    root = math.sqrt(formula.config.hidden_size)
    yield Candidate("embedding_scale", f"times sqrt(D) = {root:.4g}, as Gemma has it", scene.case.exact * root)


# --- norms


def norm_settings(scene: Scene) -> Iterator[Candidate]:
    """Another eps, another use of weight and bias, the other norm."""
    eps = scene.formula.config.norm_eps
    for other in _EPS:
        if other != eps:
            changed = _with_eps(scene, other)
            yield Candidate("eps", f"with eps {other:g} in place of {eps:g}", changed)
    for key, text, change in (
        ("offset_weight", "with 1 added to the weight", lambda w: w + 1),
        ("offset_weight", "with 1 taken from the weight", lambda w: w - 1),
        ("no_weight", "without the weight", torch.ones_like),
    ):
        yield Candidate(key, text, scene.with_parameter(_only("weight", change)))
    yield Candidate("not_normed", "left out: the input came through", scene.inputs()[0])
    if scene.formula.config.norm == "layer":
        yield Candidate("no_bias", "without the bias", scene.with_parameter(_only("bias", torch.zeros_like)))
        yield Candidate("other_norm", "as RMSNorm: the mean not taken off", scene.with_config(norm="rms"))
        return
    yield Candidate("other_norm", "as LayerNorm: the mean taken off", _as_layer_norm(scene))


def _with_eps(scene: Scene, eps: float) -> Tensor:
    """DecoderConfig refuses an eps of 0; adding to the square mean is the same thing said otherwise."""
    if eps:
        return scene.with_config(norm_eps=eps)
    x, tiny = scene.inputs()[0], 1e-30
    return scene.compute([x], config=replace(scene.formula.config, norm_eps=tiny))


def _as_layer_norm(scene: Scene) -> Tensor:
    def parameter(name: str) -> Tensor:
        if name.endswith("bias"):
            return torch.zeros_like(scene.formula.parameter(name.replace("bias", "weight")))
        return scene.formula.parameter(name)

    return scene.compute(parameter=parameter, config=replace(scene.formula.config, norm="layer"))


def _only(leaf: str, change: Callable[[Tensor], Tensor]) -> Callable[[str, Tensor], Tensor]:
    return lambda name, value: change(value) if name.endswith(leaf) else value


# --- rows of q, k and v


def half_split(rows: Tensor, heads: int) -> Tensor:
    """Meta's order of a head's rows (pairs side by side) -> half-split: (heads E, ..) -> same."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `half_split`."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def meta_order(scene: Scene) -> Iterator[Candidate]:
    """Meta pairs numbers 2i and 2i + 1 of a head, Hugging Face i and i + E/2; loaders reorder the rows of q and k."""
    part, config = scene.case.operation.short, scene.formula.config
    if part not in ("q_proj", "k_proj") or config.head_size % 2:
        return
    queries, own = config.num_heads, config.num_heads if part == "q_proj" else config.num_kv_heads
    rows = torch.arange(scene.case.exact.shape[-1])
    metas = interleaved(rows, own)
    orders = [
        ("meta_order", f"with {part} in Meta's order of rows: Meta-format weights read as Hugging Face's", metas),
        ("meta_order", f"with {part} reordered from Meta's order, in which it was not", half_split(rows, own)),
    ]
    if own != queries and len(rows) % (2 * queries) == 0:
        wrong = f"with {part} un-permuted with {queries} heads; it has n_kv_heads = {own}"
        orders += [
            ("permuted_with_heads", f"{wrong} (Meta-format weights)", half_split(metas, queries)),
            ("permuted_with_heads", wrong, half_split(rows, queries)),
            (
                "permuted_with_heads",
                f"with {part} permuted with {queries} heads; it has {own}",
                interleaved(rows, queries),
            ),
        ]
    for key, text, order in orders:
        yield from _reordered(scene, key, text, order.to(scene.case.exact.device))


def _reordered(scene: Scene, key: str, text: str, order: Tensor) -> Iterator[Candidate]:
    """Rows of the weight in another order, those of the bias too or not: outputs in that order."""
    exact = scene.case.exact
    yield Candidate(key, text, exact[..., order])
    offset = _bias_of(scene)
    if offset is not None:
        yield Candidate(key, f"{text}, its bias not", (exact - offset)[..., order] + offset)


def _bias_of(scene: Scene) -> Tensor | None:
    """The float64 bias of a linear operation, or None."""
    config = scene.formula.config
    has = config.attention_bias if ".attention." in scene.name else config.mlp_bias
    return scene.formula.parameter(f"{scene.name}.bias").double() if has else None


def fused_layout(scene: Scene) -> Iterator[Candidate]:
    """Falcon's query_key_value: for each key/value head its query heads, then k, then v. Read in other ways:"""
    part, config = scene.case.operation.short, scene.formula.config
    if part not in _QKV or config.family != "falcon":
        return
    outputs = [scene.formula.linear(scene.inputs()[0], name=scene.name.replace(part, name)) for name in _QKV]
    everything = torch.cat(outputs, dim=-1)
    each, groups, size = config.heads_per_group, config.num_kv_heads, config.head_size
    ids = torch.arange(everything.shape[-1], device=everything.device)
    q, k, v = ids.split([groups * each * size, groups * size, groups * size])
    fused = torch.cat((q.view(groups, each, size), k.view(groups, 1, size), v.view(groups, 1, size)), dim=1).flatten()
    index = _QKV.index(part)
    for text, read in (
        ("as all of q, then all of k, then all of v", _as_blocks),
        ("with key/value heads innermost", _groups_inside),
        ("as k, v, then the query heads", _keys_first),
        ("as [q, k, v] of each number of a head", _numbers_inside),
    ):
        chosen = read(fused, each, groups, size)
        if chosen is not None:
            text_ = f"with the fused query_key_value read {text}"
            yield Candidate("fused_layout", text_, everything[..., chosen[index]])


_Parts = tuple[Tensor, Tensor, Tensor]


def _as_blocks(fused: Tensor, each: int, groups: int, size: int) -> _Parts:
    q, k, v = fused.split([groups * each * size, groups * size, groups * size])
    return q, k, v


def _groups_inside(fused: Tensor, each: int, groups: int, size: int) -> _Parts:
    rows = fused.view(each + 2, groups, size)
    return rows[:each].flatten(), rows[each].flatten(), rows[each + 1].flatten()


def _keys_first(fused: Tensor, each: int, groups: int, size: int) -> _Parts:
    rows = fused.view(groups, each + 2, size)
    return rows[:, 2:].flatten(), rows[:, 0].flatten(), rows[:, 1].flatten()


def _numbers_inside(fused: Tensor, each: int, groups: int, size: int) -> _Parts | None:
    if each != 1:
        return None
    rows = fused.view(groups, size, 3)
    return rows[..., 0].flatten(), rows[..., 1].flatten(), rows[..., 2].flatten()


# --- whole weights


def bias(scene: Scene) -> Iterator[Candidate]:
    """The bias left out or added twice."""
    offset = _bias_of(scene)
    if offset is not None:
        yield Candidate("no_bias", "without the bias", scene.case.exact - offset)
        yield Candidate("bias_twice", "with the bias added twice", scene.case.exact + offset)


def scaled_weight(scene: Scene) -> Iterator[Candidate]:
    """A factor on the weight that the bias does not have."""
    has_bias = (
        scene.formula.config.norm == "layer" if scene.case.operation.kind == "norm" else _bias_of(scene) is not None
    )
    if not has_bias:
        return
    offset = scene.formula.parameter(f"{scene.name}.bias").double()
    exact, found = (tokens_of(x, scene.formula.keep) - offset for x in (scene.case.exact, scene.case.found))
    factor = float((exact * found).sum() / exact.square().sum())
    if abs(factor - 1) > 1e-6:
        text = f"with the weight times {factor:.6g}"
        yield Candidate("scaled", text, (scene.case.exact - offset) * factor + offset)


def other_weight(scene: Scene) -> Iterator[Candidate]:
    """The numbers of another parameter of the same shape: a neighbour in the block, or its like in another layer."""
    layer, layers = scene.case.operation.layer, scene.formula.config.num_layers
    names = [_sibling(scene, name) for name in _SIBLINGS] if layer is not None else []
    for other in dict.fromkeys((-1 if layer is None else layer + d) for d in (1, -1, 2, -2)):
        if layer is not None and 0 <= other < layers:
            names.append(scene.name.replace(f"blocks.{layer}.", f"blocks.{other}.", 1))
    shape = _shape(scene, scene.name)
    for name in dict.fromkeys(names):
        if name != scene.name and _shape(scene, name) == shape:
            yield Candidate(
                "other_weight",
                f"with the parameters of {name}",
                scene.compute(parameter=lambda own, name=name: scene.formula.parameter(own.replace(scene.name, name))),
            )


_SIBLINGS = (
    "attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.gate_proj", "mlp.up_proj",
    "mlp.down_proj", "attention_norm", "mlp_norm",
)  # fmt: skip


def _sibling(scene: Scene, name: str) -> str:
    return f"{scene.block}.{name}"


def _shape(scene: Scene, name: str) -> tuple[int, ...] | None:
    try:
        return tuple(scene.formula.parameter(f"{name}.weight").shape)
    except (KeyError, AttributeError):
        return None


def transposed(scene: Scene) -> Iterator[Candidate]:
    """The whole weight, or the square of one head, with rows for columns."""
    weight = scene.formula.parameter(f"{scene.name}.weight")
    if weight.shape[0] != weight.shape[1]:
        return
    yield Candidate("transposed", "with the weight transposed", scene.with_parameter(_only("weight", lambda w: w.T)))
    x, exact, size = scene.inputs()[0], scene.case.exact, scene.formula.config.head_size
    for head in range(weight.shape[0] // size if ".attention." in scene.name else 0):
        part = slice(head * size, (head + 1) * size)
        square = weight[part, part].double()
        output = exact.clone()
        output[..., part] += x[..., part] @ (square - square.T)
        yield Candidate("head_transposed", f"with the square of head {head} transposed", output)


def head(scene: Scene) -> Iterator[Candidate]:
    """The other of tied and untied head; soft-capped logits."""
    config = scene.formula.config
    if config.head == "lm" and not config.tied_embeddings:
        text = "with the embedding as its weight: the head was tied and must not be"
        yield Candidate("tied_head", text, scene.with_config(tied_embeddings=True))
    for cap in (30.0, 50.0):
        yield Candidate("softcap", f"soft-capped at {cap:g}", cap * torch.tanh(scene.case.exact / cap))


def wrong_input(scene: Scene) -> Iterator[Candidate]:
    """The formula of something else than what it should read."""
    right, layer = scene.case.operation.inputs[0], scene.case.operation.layer
    read = scene.case.inputs[0]
    before = "embed" if layer in (0, None) else f"blocks.{layer - 1}"
    near = [name for name in scene.trace if name == before or name.startswith(f"{scene.block or 'blocks'}.")]
    if layer is None:
        near = [f"blocks.{scene.formula.config.num_layers - 1}", "embed"]
    for name in near:
        other = scene.recorded(name)
        if name not in (right, scene.name) and other is not None and other.shape == read.shape:
            yield Candidate("wrong_input", f"of {name}, where it should read {right}", scene.compute([other]))
    yield from _of_the_residual(scene, before)


def _of_the_residual(scene: Scene, before: str) -> Iterator[Candidate]:
    """In a parallel block the feed-forward reads the layer's input, not what attention added to it."""
    config, layer = scene.formula.config, scene.case.operation.layer
    if (
        config.block != "parallel"
        or layer is None
        or scene.case.operation.short not in ("gate_proj", "up_proj", "mlp_norm")
    ):
        return
    x, attended = scene.recorded(before), scene.recorded(f"{scene.block}.attention.o_proj")
    if x is None or attended is None:
        return
    text = "of the stream with attention already added: a sequential block where it should be parallel"
    stream = x.expand_as(attended) + attended
    if scene.case.operation.kind == "linear":
        norm = "attention_norm" if config.parallel_norms == 1 else "mlp_norm"
        stream = scene.formula.norm(stream, name=f"{scene.block}.{norm}")
    yield Candidate("sequential_for_parallel", text, scene.compute([stream]))


def rounded(scene: Scene) -> Iterator[Candidate]:
    """Parameters that went through a smaller format."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.finfo(dtype).eps > torch.finfo(scene.case.dtype).eps:
            output = scene.with_parameter(_through(dtype))
            yield Candidate("weight_rounded", f"with the weight rounded to {str(dtype)[6:]}", output)
    if scene.case.operation.kind == "linear":
        output = scene.with_parameter(_only("weight", _through_int8))
        yield Candidate("weight_rounded", "with the weight rounded to int8, one scale a row", output)


def _through(dtype: torch.dtype) -> Callable[[str, Tensor], Tensor]:
    return lambda _, value: value.to(dtype)


def _through_int8(weight: Tensor) -> Tensor:
    scale = weight.double().abs().amax(dim=1, keepdim=True) / 127
    return (weight.double() / scale).round() * scale
