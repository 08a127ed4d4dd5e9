"""Faults of parameters: another one's numbers, a scale, a bias or an eps that is not the file's; and of inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from minillm.verify.compare import tokens_of
from minillm.verify.scene import Candidate, Scene, only

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
        yield Candidate(key, text, scene.with_parameter(only("weight", change)))
    yield from _eps_outside(scene)
    yield Candidate("not_normed", "left out: the input came through", scene.inputs()[0])
    if scene.formula.config.norm == "layer":
        yield Candidate("no_bias", "without the bias", scene.with_parameter(only("bias", torch.zeros_like)))
        rms, offset = scene.with_config(norm="rms"), scene.formula.parameter(f"{scene.name}.bias").double()
        yield Candidate("other_norm", "as RMSNorm: neither mean nor bias", rms)
        yield Candidate("other_norm", "as RMSNorm: the mean not taken off", rms + offset)
        return
    yield Candidate("other_norm", "as LayerNorm: the mean taken off", _as_layer_norm(scene))


def _eps_outside(scene: Scene) -> Iterator[Candidate]:
    x, config = scene.inputs()[0], scene.formula.config
    centred = x - x.mean(-1, keepdim=True) if config.norm == "layer" else x
    root = centred.square().mean(-1, keepdim=True)
    ratio = (root + config.norm_eps).sqrt() / (root.sqrt() + config.norm_eps)
    offset = scene.formula.parameter(f"{scene.name}.bias").double() if config.norm == "layer" else 0.0
    text = "with eps added to the root, not under it"
    yield Candidate("eps", text, (scene.case.exact - offset) * ratio + offset)


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


# --- whole weights


def bias(scene: Scene) -> Iterator[Candidate]:
    """The bias left out or added twice."""
    offset = scene.bias()
    if offset is not None:
        yield Candidate("no_bias", "without the bias", scene.case.exact - offset)
        yield Candidate("bias_twice", "with the bias added twice", scene.case.exact + offset)


def scaled_weight(scene: Scene) -> Iterator[Candidate]:
    """A factor on the weight that the bias does not have."""
    has_bias = scene.formula.config.norm == "layer" if scene.case.operation.kind == "norm" else scene.bias() is not None
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
    own_bias = scene.bias() if scene.case.operation.kind == "linear" else None
    for name in dict.fromkeys(names):
        if name != scene.name and _shape(scene, name) == shape:
            yield Candidate(
                "other_weight",
                f"with the parameters of {name}",
                scene.compute(parameter=lambda own, name=name: scene.formula.parameter(own.replace(scene.name, name))),
            )
            if own_bias is not None:
                offset = scene.formula.parameter(f"{name}.bias").double()
                yield Candidate("other_weight", f"with the bias of {name}", scene.case.exact - own_bias + offset)


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
            yield Candidate("weight_rounded", f"with the parameters rounded to {str(dtype)[6:]}", output)
            alone = scene.with_parameter(only("weight", _to(dtype)))
            yield Candidate("weight_rounded", f"with the weight rounded to {str(dtype)[6:]}, its bias not", alone)
    if scene.case.operation.kind == "linear":
        output = scene.with_parameter(only("weight", _through_int8))
        yield Candidate("weight_rounded", "with the weight rounded to int8, one scale a row", output)


def _to(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda weight: weight.to(dtype)


def _through(dtype: torch.dtype) -> Callable[[str, Tensor], Tensor]:
    return lambda _, value: value.to(dtype)


def _through_int8(weight: Tensor) -> Tensor:
    scale = weight.double().abs().amax(dim=1, keepdim=True) / 127
    return (weight.double() / scale).round() * scale
