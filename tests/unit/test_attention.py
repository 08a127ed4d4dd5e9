"""`attend` against the formula in every shape it folds or groups, with gradients; masks; grouped heads."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.model.alibi import alibi_bias
from minillm.model.attention import Attention, attend, attention_ref, visible_keys
from tests.decoders import config, decoder
from tests.error import assert_near, assert_rule_of_two


class Size(NamedTuple):
    B: int
    H: int
    G: int
    T: int
    S: int
    E: int


SIZES = [
    Size(1, 1, 1, 1, 1, 1),
    Size(1, 1, 1, 5, 5, 2),
    Size(2, 4, 4, 7, 7, 8),  # multi-head
    Size(2, 4, 2, 7, 7, 8),  # grouped
    Size(2, 4, 1, 7, 7, 8),  # multi-query
    Size(3, 6, 3, 5, 17, 5),  # a chunk behind cached tokens, odd sizes
    Size(2, 71, 1, 3, 9, 4),
    Size(2, 4, 4, 1, 13, 8),  # one token: folded
    Size(3, 6, 2, 1, 13, 5),
    Size(2, 71, 1, 1, 33, 4),
    Size(1, 8, 2, 1, 1, 16),
    Size(1, 2, 1, 40, 70, 3),  # more than one block of the kernel
]
CASES = pytest.mark.parametrize(
    ("size", "kind"),
    [(size, kind) for size in SIZES for kind in ("none", "bool", "alibi") if kind != "none" or size.T in (1, size.S)],
    ids=lambda value: value if isinstance(value, str) else "_".join(map(str, value)),
)


def drawn(size: Size, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((size.H, size.T), (size.G, size.S), (size.G, size.S))
    q, k, v = (torch.randn(size.B, heads, t, size.E, generator=generator).to(dtype) for heads, t in shapes)
    return q, k, v


def mask_of(kind: str, size: Size, dtype: torch.dtype) -> Tensor | None:
    """Row r has r pads on the left, as the decoder would mask them."""
    if kind == "none":
        return None
    keep = torch.arange(size.S) >= torch.arange(size.B)[:, None].clamp(max=size.S - 1)
    visible = visible_keys(keep, size.T, size.S, keep.device)
    if kind == "bool":
        return visible
    bias = alibi_bias((keep.long().cumsum(1) - 1) * keep, size.H, size.E, dtype)
    return torch.where(visible, bias, torch.finfo(dtype).min)


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The formula in the dtype of its arguments, every step rounded to it, one query head after the other.

    A head at a time, because the gradients of a shared k and v are sums over its heads: how many roundings such a sum
    takes is its order's affair, and torch's own order is another on every processor.
    """
    heads, size = q.shape[1], q.shape[-1]
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])[None, None]
    mask = mask.expand(-1, heads, -1, -1)
    outputs = []
    for head in range(heads):
        group = head // (heads // k.shape[1])
        scores = q[:, head] @ k[:, group].mT / size**0.5
        visible = mask[:, head]
        scores = scores.masked_fill(~visible, -torch.inf) if mask.dtype == torch.bool else scores + visible
        outputs.append(scores.softmax(-1) @ v[:, group])
    return torch.stack(outputs, dim=1)


def with_gradients(function: Any, inputs: tuple[Tensor, ...], mask: Tensor | None) -> list[Tensor]:
    """The output and the gradients of q, k, v for one fixed direction."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = function(*leaves, mask)
    direction = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).cos().view(y.shape)
    y.backward(direction.to(y.dtype))
    return [y.detach(), *(x.grad for x in leaves if x.grad is not None)]


NAMES = ("output", "gradient of q", "gradient of k", "gradient of v")


@CASES
def test_the_formula_in_float64(size: Size, kind: str) -> None:
    """Three ways to write it: the plain formula, `attention_ref`, `attend`."""
    inputs, mask = drawn(size, torch.float64), mask_of(kind, size, torch.float64)
    expected = with_gradients(plain, inputs, mask)
    for function in (attention_ref, attend):
        found = with_gradients(function, inputs, mask)
        for name, ours, reference in zip(NAMES, found, expected, strict=True):
            # float64 rounds at 1e-16, some hundred times; gradients that cancel are measured against 1
            assert float((ours - reference).abs().max()) < 1e-13, name


@CASES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rule_of_two(size: Size, kind: str, dtype: torch.dtype) -> None:
    inputs, mask = drawn(size, dtype), mask_of(kind, size, dtype)
    wide = mask.double() if mask is not None and mask.is_floating_point() else mask
    exact = with_gradients(plain, tuple(x.double() for x in inputs), wide)
    rough = with_gradients(plain, inputs, mask)
    for function in (attention_ref, attend):
        found = with_gradients(function, inputs, mask)
        assert [x.dtype for x in found] == [dtype] * 4
        for name, *three in zip(NAMES, found, rough, exact, strict=True):
            if float(three[2].norm()) > 1e-6:  # one key alone: softmax is 1, its gradient zero but for rounding
                assert_rule_of_two(*three, name)


def test_a_kernel_may_lay_its_output_out_as_it_likes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA torch's memory-efficient kernel returns (B, T, H, E) in memory; folded, that is (B, H/G, G, E)."""
    size = Size(2, 6, 3, 1, 9, 4)
    inputs = drawn(size, torch.float32)
    expected, right = attend(*inputs, None), F.scaled_dot_product_attention

    def transposed(*args: Any, **options: Any) -> Tensor:
        return right(*args, **options).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(F, "scaled_dot_product_attention", transposed)
    assert torch.equal(attend(*inputs, None), expected)


# -- masks -------------------------------------------------------------------------------------------------------------


def test_visible_keys_by_hand() -> None:
    cpu = torch.device("cpu")
    assert visible_keys(None, 2, 3, cpu).int().tolist() == [[[[1, 1, 0], [1, 1, 1]]]]
    keep = torch.tensor([[False, False, True], [True, True, False]])
    assert visible_keys(keep, 3, 3, cpu).int().tolist() == [
        [[[1, 0, 0], [0, 1, 0], [0, 0, 1]]],  # a pad sees itself and nothing else
        [[[1, 0, 0], [1, 1, 0], [1, 1, 1]]],
    ]
    assert visible_keys(keep, 1, 3, cpu).int().tolist() == [[[[0, 0, 1]]], [[[1, 1, 1]]]]


@pytest.mark.parametrize("queries", [1, 4, 9])
def test_no_mask_is_the_causal_mask(queries: int) -> None:
    q, k, v = drawn(Size(2, 4, 2, queries, 9, 8), torch.float64)
    causal = visible_keys(None, queries, 9, q.device)
    assert_near(attention_ref(q, k, v, None), attention_ref(q, k, v, causal), 0)


# -- grouped heads -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("queries", [1, 9])
def test_grouped_heads_are_repeated_heads(groups: int, queries: int) -> None:
    q, k, v = drawn(Size(2, 4, groups, queries, 9, 8), torch.float64)
    repeated = (x.repeat_interleave(4 // groups, dim=1) for x in (k, v))
    assert_near(attend(q, k, v, None), attend(q, *repeated, None), 1e-13)


@pytest.mark.parametrize("position", ["rotary", "alibi"])
def test_a_grouped_model_is_a_multi_head_model_with_equal_heads(position: str) -> None:
    """The projections' rows of each key/value head, written once for every query head that reads it."""
    grouped = decoder(position=position, num_kv_heads=2, attention_bias=True)
    multi_head = decoder(position=position, num_kv_heads=4, attention_bias=True)
    state = grouped.state_dict()
    for name, value in state.items():
        if "k_proj" in name or "v_proj" in name:
            state[name] = value.unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1)
    multi_head.load_state_dict(state)
    tokens = torch.arange(26).view(2, 13)
    with torch.inference_mode():
        assert_near(grouped(tokens), multi_head(tokens))


def test_multi_head_is_torchs() -> None:
    """Without rotation, G = H: `nn.MultiheadAttention`, whose fused weight is q, k, v one below the other."""
    ours = Attention(config(num_kv_heads=4, attention_bias=True))
    theirs = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    parts = (ours.q_proj, ours.k_proj, ours.v_proj)
    theirs.load_state_dict(
        {
            "in_proj_weight": torch.cat([part.weight for part in parts]),
            "in_proj_bias": torch.cat([part.bias for part in parts]),
            "out_proj.weight": ours.o_proj.weight,
            "out_proj.bias": ours.o_proj.bias,
        }
    )
    x = torch.randn(2, 7, 32)
    hidden = torch.ones(7, 7, dtype=torch.bool).triu(1)
    with torch.inference_mode():
        assert_near(ours(x, None, None, None), theirs(x, x, x, attn_mask=hidden, need_weights=False)[0])
