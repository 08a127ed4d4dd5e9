"""The key/value cache: its bytes, its limits, and that rewinding, growing and padding in chunks change no logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minillm.errors import InputError
from minillm.model import Decoder, KVCache
from tests import tiny
from tests.decoders import SHAPES, config, decoder
from tests.error import assert_near

EVERY = pytest.mark.parametrize("shape", SHAPES)


@pytest.fixture(autouse=True)
def without_gradients() -> object:
    with torch.inference_mode():
        yield


def chunks(model: Decoder, tokens: Tensor, cache: KVCache, *ends: int, keep: Tensor | None = None) -> Tensor:
    """Logits of `tokens`, computed up to each of `ends` in turn."""
    starts = (0, *ends[:-1])
    parts = [
        model(tokens[:, a:b], keep=None if keep is None else keep[:, a:b], cache=cache)
        for a, b in zip(starts, ends, strict=True)
    ]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_groups_are_stored(groups: int, dtype: torch.dtype) -> None:
    model = decoder(num_kv_heads=groups).to(dtype)
    cache = model.new_cache(3, 10)
    model(tiny.tokens(3, 7), cache=cache)
    stored = [*cache.keys, *cache.values]
    assert all(x.shape == (3, groups, 10, 8) and x.dtype == dtype for x in stored)
    size = torch.finfo(dtype).bits // 8
    assert sum(x.nbytes for x in stored) == 3 * 10 * model.config.cache_bytes_per_token(size)


@EVERY
@pytest.mark.parametrize("ends", [(1, 2, 20), (7, 8, 9, 20), (19, 20), (5, 11, 20)])
def test_chunks_of_any_size_are_one_forward(shape: str, ends: tuple[int, ...]) -> None:
    model, tokens = decoder(**SHAPES[shape]), tiny.tokens(2, 20)
    cache = model.new_cache(2, 20)
    assert_near(chunks(model, tokens, cache, *ends), model(tokens))
    assert cache.length == 20


@EVERY
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_remembered_across_chunks(shape: str, side: str) -> None:
    """Rows of 3 and 9 tokens; then two more tokens each, for which no mask is given."""
    model, tokens = decoder(**SHAPES[shape]), tiny.tokens(2, 11)
    keep = torch.ones(2, 9, dtype=torch.bool)
    pads = slice(0, 6) if side == "left" else slice(3, 9)
    keep[0, pads] = False
    cache = model.new_cache(2, 11)
    first = chunks(model, tokens, cache, 4, 9, keep=keep)
    rest = torch.cat([model(tokens[:, t : t + 1], cache=cache) for t in (9, 10)], dim=1)
    both = torch.cat((first, rest), dim=1)
    real = torch.cat((keep, torch.ones(2, 2, dtype=torch.bool)), dim=1)
    for r in range(2):
        assert_near(both[r, real[r]], model(tokens[r : r + 1, real[r]])[0], what=f"row {r}")


@EVERY
def test_padding_that_begins_later(shape: str) -> None:
    """Full rows first, then a chunk that is padded on the right in one of them, then one more token."""
    model, tokens = decoder(**SHAPES[shape]), tiny.tokens(2, 10)
    keep = torch.ones(2, 10, dtype=torch.bool)
    keep[0, 6:9] = False
    cache = model.new_cache(2, 10)
    model(tokens[:, :5], cache=cache)
    model(tokens[:, 5:9], keep=keep[:, 5:9], cache=cache)
    last = model(tokens[:, 9:], cache=cache)
    for r in range(2):
        assert_near(last[r], model(tokens[r : r + 1, keep[r]])[0, -1:], what=f"row {r}")


@EVERY
@pytest.mark.parametrize("length", [0, 1, 6, 12])
def test_rewound_and_continued_is_fresh(shape: str, length: int) -> None:
    model, tokens, other = decoder(**SHAPES[shape]), tiny.tokens(2, 12), tiny.tokens(2, 12, seed=2)
    keep = torch.ones(2, 12, dtype=torch.bool)
    keep[0, :4] = False
    cache = model.new_cache(2, 24)
    model(tokens, keep=keep, cache=cache)
    cache.rewind(length)
    found = model(other, cache=cache)
    fresh = model.new_cache(2, 24)
    if length:
        model(tokens[:, :length], keep=keep[:, :length], cache=fresh)
    assert_near(found, model(other, cache=fresh))


@EVERY
def test_growing_keeps_what_is_cached(shape: str) -> None:
    model, tokens = decoder(**SHAPES[shape]), tiny.tokens(2, 12)
    cache = model.new_cache(2, 7)
    model(tokens[:, :7], cache=cache)
    before = [x.clone() for x in (*cache.keys, *cache.values)]
    cache.grow(3)
    assert cache.capacity == 7
    cache.grow(12)
    assert cache.capacity == 12 and cache.length == 7
    assert all(torch.equal(x[:, :, :7], y) for x, y in zip((*cache.keys, *cache.values), before, strict=True))
    assert_near(model(tokens[:, 7:], cache=cache), model(tokens)[:, 7:])


def test_a_cache_can_start_empty_and_grow() -> None:
    model, tokens = decoder(), tiny.tokens(1, 5)
    cache = model.new_cache(1, 0)
    cache.grow(5)
    assert_near(model(tokens, cache=cache), model(tokens))


def test_full() -> None:
    model, cache = decoder(), decoder().new_cache(1, 5)
    model(tiny.tokens(1, 4), cache=cache)
    with pytest.raises(InputError, match="6 tokens do not fit a cache of 5; ask for a larger capacity"):
        model(tiny.tokens(1, 2), cache=cache)
    assert cache.length == 4  # nothing half-done
    model(tiny.tokens(1, 1), cache=cache)


@pytest.mark.parametrize("rows", [1, 3])
def test_another_batch(rows: int) -> None:
    model, cache = decoder(), decoder().new_cache(2, 5)
    with pytest.raises(InputError, match=f"the batch has {rows} rows, its cache 2; use one cache a batch"):
        model(tiny.tokens(rows, 4), cache=cache)


@pytest.mark.parametrize("length", [-1, 4])
def test_rewinding_out_of_range(length: int) -> None:
    model, cache = decoder(), decoder().new_cache(1, 5)
    model(tiny.tokens(1, 3), cache=cache)
    with pytest.raises(InputError, match=f"cannot rewind a cache of 3 tokens to {length}"):
        cache.rewind(length)


def test_a_layer_writes_and_does_not_advance() -> None:
    cache = KVCache(config(), 1, 4, dtype=torch.float32, device="cpu")
    k = torch.ones(1, 2, 3, 8)
    keys, values = cache.layer(0).write(k, 2 * k)
    assert cache.length == 0
    assert torch.equal(keys, k) and torch.equal(values, 2 * k)
    assert keys.data_ptr() == cache.keys[0].data_ptr()  # a view: nothing is copied a second time
