"""A whole block in one call against its modules: the same bits, and only where nobody can tell the difference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minillm.generation.generate import decode_step, left_pad, prefill
from minillm.model import Decoder
from minillm.model import block as blocks
from minillm.model import step as step_module
from minillm.ops import native
from minillm.ops.attention import is_chosen
from minillm.ops.block import streamed_rows
from minillm.ops.step import Block, BlockStep, Floating, Past
from minillm.quant.convert import Quantisation, quantize_linears
from tests.decoders import decoder

pytestmark = pytest.mark.skipif(not is_chosen(), reason="attention runs through torch here")
FORMATS = (torch.float32, torch.bfloat16, torch.float16)
PROMPTS = [[1, 2, 3, 4], [5, 6], [7, 8, 9], [1], [2, 2], [3]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each native step had."""
    seen: list[int] = []
    real = BlockStep.__call__

    def counted(self: BlockStep, x: Tensor, *rest: Any) -> Tensor:
        seen.append(len(x))
        return real(self, x, *rest)

    monkeypatch.setattr(BlockStep, "__call__", counted)
    return seen


@contextmanager
def modules_only() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "one_call", lambda *_: None)
        yield


def logits(model: Decoder, prompts: list[list[int]], steps: int = 3) -> Tensor:
    """Of a few tokens after prompts that are padded on the left."""
    tokens, keep = left_pad(prompts)
    cache = model.new_cache(len(prompts), tokens.shape[1] + steps)
    found = [prefill(model, tokens, None if bool(keep.all()) else keep, cache)]
    for _ in range(steps):
        found.append(decode_step(model, found[-1].argmax(-1), cache))
    return torch.stack(found)


def model_of(kind: str, dtype: torch.dtype, **fields: Any) -> Decoder:
    model = decoder(hidden_size=64, head_size=16, ffn_size=192, **fields).to(dtype)
    if kind == "single":
        quantize_linears(model, Quantisation("nf4", double_quant=False))
    elif kind != "float":
        quantize_linears(model, Quantisation(kind, threshold=1.0 if kind == "int8" else 6.0))
    return model


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("kind", ["float", "int8", "nf4", "single"])
@pytest.mark.parametrize("rows", [1, 3, 6])
@pytest.mark.parametrize("fields", [{}, {"attention_bias": True, "mlp_bias": True}, {"rotary_size": 8}], ids=str)
def test_the_bits_of_the_modules(
    kind: str, dtype: torch.dtype, rows: int, fields: dict[str, Any], calls: list[int]
) -> None:
    model = model_of(kind, dtype, **fields)
    found = logits(model, PROMPTS[:rows])
    streams = kind != "float" or rows <= streamed_rows(dtype)
    assert calls == [rows] * (3 * model.config.num_layers if streams else 0)
    with modules_only():
        assert torch.equal(found, logits(model, PROMPTS[:rows]))


def test_more_threads_and_mixed_kinds(calls: list[int]) -> None:
    model = model_of("int8", torch.bfloat16)
    attention, mlp = model.blocks[0].attention, model.blocks[1].mlp
    attention.k_proj.threshold = 0.0  # not quantised together with q and v
    mlp.up_proj, mlp.down_proj = (
        nn.Module.get_submodule(decoder(ffn_size=192, hidden_size=64).blocks[0].mlp, name)
        for name in ("up_proj", "down_proj")
    )
    model.to(torch.bfloat16)
    found, threads = logits(model, PROMPTS[:1]), torch.get_num_threads()
    assert len(calls) == 6
    try:
        torch.set_num_threads(3 if threads != 3 else 2)
        assert torch.equal(found, logits(model, PROMPTS[:1]))
    finally:
        torch.set_num_threads(threads)
    with modules_only():
        assert torch.equal(found, logits(model, PROMPTS[:1]))


def _hook(model: Decoder) -> None:
    model.blocks[0].mlp.down_proj.register_forward_hook(lambda *_: None)
    model.blocks[1].attention.register_forward_pre_hook(lambda *_: None)


def _patched(model: Decoder) -> None:
    for layer in model.blocks:
        layer.mlp.forward = lambda x: 0 * x


def _other_kind(model: Decoder) -> None:
    for layer in model.blocks:
        layer.attention.o_proj = nn.Sequential(layer.attention.o_proj)


def _other_norm(model: Decoder) -> None:
    for layer in model.blocks:
        layer.mlp_norm = nn.LayerNorm(64).to(torch.bfloat16)


@pytest.mark.parametrize("change", [_hook, _patched, _other_kind, _other_norm])
def test_whoever_watches_sees_the_modules_run(change: Callable[[Decoder], None], calls: list[int]) -> None:
    model = model_of("int8", torch.bfloat16)
    change(model)
    found = logits(model, PROMPTS)
    assert not calls
    with modules_only():
        assert torch.equal(found, logits(model, PROMPTS))


def test_not_with_gradients_nor_aside_nor_without_a_cache(calls: list[int]) -> None:
    model = model_of("float", torch.float32)
    model(torch.tensor([[1]]), cache=model.new_cache(1, 2))  # with gradients
    with torch.no_grad():
        model(torch.tensor([[1]]))
        with native.aside():
            model(torch.tensor([[1]]), cache=model.new_cache(1, 2))
        assert not calls
        model(torch.tensor([[1]]), cache=model.new_cache(1, 2))
    assert calls


@pytest.mark.parametrize("kind", ["gelu", "falcon"])
def test_other_blocks_go_through_their_modules(kind: str, calls: list[int]) -> None:
    fields = {"activation": "gelu"} if kind == "gelu" else {"norm": "layer", "mlp": "plain", "block": "parallel"}
    logits(decoder(**fields), PROMPTS)
    assert not calls


def _assign(model: Decoder) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.5


def _replace(model: Decoder) -> None:
    model.blocks[0].attention_norm.weight = nn.Parameter(model.blocks[0].attention_norm.weight.detach() * 2)


def _in_place(model: Decoder) -> None:
    with torch.no_grad():
        model.blocks[1].mlp.up_proj.weight.mul_(2)


def _epsilon(model: Decoder) -> None:
    for layer in model.blocks:
        layer.attention_norm.eps = layer.mlp_norm.eps = 0.5


@pytest.mark.parametrize(
    "change",
    [_assign, _replace, _in_place, _epsilon, lambda m: m.to(torch.bfloat16), lambda m: quantize_linears(m, "int8"),
     lambda m: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}, assign=True)],
    ids=["assign", "replace", "in place", "eps", "cast", "quantise", "load"],
)  # fmt: skip
def test_a_changed_model_is_seen(change: Callable[[Decoder], object], calls: list[int]) -> None:
    model = model_of("float", torch.float32)
    before = logits(model, PROMPTS[:1])
    change(model)
    after = logits(model, PROMPTS[:1])
    assert not torch.equal(before, after.float())
    assert len(calls) == 12
    with modules_only():
        assert torch.equal(after, logits(model, PROMPTS[:1]))


def test_a_transposed_weight_is_seen(calls: list[int]) -> None:
    """The same numbers at the same place, read the other way round: for the modules, and torch's product."""
    model = model_of("float", torch.float32)
    before = logits(model, PROMPTS[:1])
    for layer in model.blocks:
        weight = layer.attention.q_proj.weight
        weight.data = weight.data.T
    after = logits(model, PROMPTS[:1])
    assert not torch.equal(before, after) and len(calls) == 6
    with modules_only():
        assert torch.equal(after, logits(model, PROMPTS[:1]))


def test_threshold_is_seen() -> None:
    model = model_of("int8", torch.float32)
    before = logits(model, PROMPTS[:1])
    for layer in model.blocks:
        layer.mlp.gate_proj.threshold = layer.mlp.up_proj.threshold = 0.0
    after = logits(model, PROMPTS[:1])
    assert not torch.equal(before, after)


def test_a_step_dies_with_its_block() -> None:
    before = len(step_module._made)
    model = model_of("float", torch.float32)
    logits(model, PROMPTS[:1])
    assert len(step_module._made) == before + 2
    del model
    assert len(step_module._made) == before


def block_of(**changed: Any) -> Block:
    """Of width 8, two heads of 4, F = 12."""
    sizes = [(8, 8), (4, 8), (4, 8), (8, 8), (12, 8), (12, 8), (8, 12)]
    linears = tuple(Floating(torch.randn(*size)) for size in sizes)
    return Block((torch.ones(8), torch.ones(8)), 1e-5, 2, 1, 4, linears)._replace(**changed)


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"norms": (torch.ones(8), torch.ones(7))}, ValueError, "norm has shape"),
        ({"norms": (torch.ones(8), torch.ones(8).half())}, TypeError, "norm is torch.float16"),
        ({"heads": 4}, ValueError, "a linear of the block"),
        ({"linears": (Floating(torch.ones(8, 8).half()), *block_of().linears[1:])}, TypeError, "weight is"),
        ({"linears": (Floating(torch.ones(8, 8).T[:, :8]), *block_of().linears[1:])}, ValueError, "contiguous"),
        ({"linears": (Floating(torch.ones(8, 8), torch.ones(3)), *block_of().linears[1:])}, ValueError, "bias"),
    ],
)
def test_misuse_of_weights_names_the_argument(changed: dict[str, Any], error: type[Exception], words: str) -> None:
    if words == "contiguous":
        changed = {"linears": (Floating(torch.ones(8, 16)[:, ::2]), *block_of().linears[1:])}
    with pytest.raises(error, match=words):
        BlockStep(block_of(**changed))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"x": torch.ones(2, 1, 7)}, "x has shape"),
        ({"x": torch.ones(2, 2, 8)}, "x has shape"),
        ({"cos": torch.ones(3, 1, 1, 4)}, "do not fit"),
        ({"sin": torch.ones(2, 1, 1, 2)}, "sin has shape"),
        ({"cos": torch.ones(1, 1, 1, 6), "sin": torch.ones(1, 1, 1, 6)}, "do not fit"),
        ({"keys": torch.ones(2, 1, 5, 8)[..., ::2]}, "keys is not contiguous"),
        ({"keys": torch.ones(1, 1, 5, 4)}, "keys has shape"),
        ({"values": torch.ones(2, 1, 6, 4)}, "values has shape"),
        ({"length": 5}, "5 tokens in keys"),
        ({"length": -1}, "-1 tokens in keys"),
        ({"keep": torch.ones(2, 2, dtype=torch.bool)}, "keep has shape"),
    ],
)
def test_misuse_of_a_step_names_the_argument(changed: dict[str, Any], words: str) -> None:
    step = BlockStep(block := block_of())
    given: dict[str, Any] = {"x": torch.ones(2, 1, 8), "cos": torch.ones(1, 1, 1, 4), "sin": torch.ones(1, 1, 1, 4)}
    past: dict[str, Any] = {"keys": torch.ones(2, 1, 5, 4), "values": torch.ones(2, 1, 5, 4), "length": 2, "keep": None}
    given |= {key: value for key, value in changed.items() if key in given}
    past |= {key: value for key, value in changed.items() if key in past}
    with pytest.raises(ValueError, match=words):
        step(**given, past=Past(**past))
    assert block.heads == 2  # whose tensors the step needs alive
