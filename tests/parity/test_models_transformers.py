"""Every variant of Llama, Mistral and Falcon against transformers: their files, our loader, the same numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import minillm
from minillm.checkpoint.families import family_of
from minillm.generation.generate import left_pad
from minillm.model import Decoder
from tests import tiny
from tests.conftest import Pair
from tests.error import assert_near, assert_rule_of_two
from tests.explained import explained

pytestmark = pytest.mark.oracle

Pairs = Callable[[str], Pair]
EVERY = pytest.mark.parametrize("name", tiny.VARIANTS)


@EVERY
def test_logits(pair: Pairs, name: str) -> None:
    _, theirs, ours = pair(name)
    tokens = tiny.tokens(2, 100)  # beyond the original context of every stretched rope
    with explained(ours, theirs, tokens), torch.no_grad():
        assert_near(ours(tokens), theirs(tokens).logits)


@EVERY
def test_cached_decoding(pair: Pairs, name: str) -> None:
    """A prompt, a chunk and single tokens through the cache, against theirs and against one uncached forward.

    The single tokens cross 48 and 64, where longrope and dynamic change their frequencies.
    """
    variant, theirs, ours = pair(name)
    tokens = tiny.tokens(2, 67)
    cache, past, found, expected = ours.new_cache(2, 67), None, [], []
    with explained(ours, theirs, tokens), torch.no_grad():
        for start, end in ((0, 40), (40, 46), *((t, t + 1) for t in range(46, 67))):
            found.append(ours(tokens[:, start:end], cache=cache))
            out = theirs(tokens[:, start:end], past_key_values=past, use_cache=True)
            past = out.past_key_values
            expected.append(out.logits)
        assert_near(torch.cat(found, dim=1), torch.cat(expected, dim=1))
        if not variant.length_dependent:
            assert_near(torch.cat(found, dim=1), ours(tokens))


@EVERY
def test_left_padded_rows_equal_single_rows(pair: Pairs, name: str) -> None:
    _, theirs, ours = pair(name)
    rows = [tiny.tokens(1, length, seed=length)[0].tolist() for length in (3, 17, 40)]
    tokens, keep = left_pad(rows)
    more = tiny.tokens(3, 1)
    with explained(ours, theirs, tokens, keep), torch.no_grad():
        padded = ours(tokens, keep=keep)
        theirs_padded = theirs(
            tokens, attention_mask=keep.long(), position_ids=(keep.cumsum(1) - 1).clamp(min=0)
        ).logits
        cache = ours.new_cache(3, 41)
        ours(tokens, keep=keep, cache=cache)
        decoded = ours(more, cache=cache)
        for r, row in enumerate(rows):
            single = ours(torch.tensor([row]))[0]
            assert_near(padded[r, -len(row) :], single, what=f"row {r}")
            assert_near(theirs_padded[r, -len(row) :], single, what=f"their row {r}")
            alone = ours(torch.tensor([[*row, int(more[r])]]))[0, -1:]
            assert_near(decoded[r], alone, what=f"row {r}, one token later")


@EVERY
def test_64_greedy_tokens(pair: Pairs, name: str) -> None:
    _, theirs, ours = pair(name)
    prompt = tiny.tokens(1, 30)
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=64)
    found = minillm.generate(ours, None, prompt[0].tolist(), max_new_tokens=64)
    with explained(ours, theirs, prompt):
        assert found[0].tokens == expected[0, 30:].tolist()


@EVERY
def test_every_gradient(pair: Pairs, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against their model in float64; theirs in float32 is the plain formula."""
    _, theirs, ours = pair(name)
    tokens = tiny.tokens(2, 24)
    plain = _their_gradients(theirs, tokens)
    _let_norms_keep_float64(monkeypatch)
    exact = _their_gradients(copy.deepcopy(theirs).double(), tokens)
    found = _our_gradients(ours, tokens)
    assert found.keys() == exact.keys()
    for key in exact:
        assert_rule_of_two(found[key], plain[key], exact[key], key)


@EVERY
def test_bfloat16_bits(pair: Pairs, name: str, tmp_path: Any) -> None:
    """Loaded in bf16 the logits are theirs to the last bit, or within the rule of two where kernels differ.

    transformers hands Falcon's single key head to torch unexpanded, and torch takes another kernel for that.
    """
    _, theirs, _ = pair(name)
    folder = tiny.save(theirs, tmp_path)
    half = type(theirs).from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    ours = minillm.load_model(folder, dtype="bfloat16")
    tokens = tiny.tokens(2, 24)
    with explained(ours, half, tokens), torch.no_grad():
        found, plain = ours(tokens), half(tokens).logits
        if ours.config.family == "falcon" and ours.config.num_kv_heads == 1:
            assert_rule_of_two(found, plain, minillm.load_model(folder, dtype="float64")(tokens), "bf16 logits")
        else:
            assert torch.equal(found, plain)


def _our_gradients(model: Decoder, tokens: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    _loss(model(tokens), tokens).backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    rules = family_of(model.config.family, "").weight_map(model.config).rules
    return {rule.theirs: rule.join([grads[name] for name in rule.ours]) for rule in rules}


def _their_gradients(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    _loss(model(tokens).logits, tokens).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def _loss(logits: Tensor, tokens: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def _let_norms_keep_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their RMSNorm casts to float32 whatever comes in; for a float64 reference it must not."""
    from transformers.models.llama import modeling_llama
    from transformers.models.mistral import modeling_mistral

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", forward)
    monkeypatch.setattr(modeling_mistral.MistralRMSNorm, "forward", forward)
