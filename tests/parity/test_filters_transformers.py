"""Each logits filter, and chains of them, against the processors of transformers: same tokens removed, same values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minillm.generation import filters
from minillm.generation.sampling import Sampling, process

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle

from transformers.generation import logits_process as oracle  # noqa: E402

NO_TOKENS = torch.zeros(1, 0, dtype=torch.int64)


def rows(kind: str) -> Tensor:
    """(B, V) float32 of the named shape."""
    generator = torch.Generator().manual_seed(0)
    if kind == "wide":
        return torch.randn(2, 128_256, generator=generator) * 4  # Llama 3's vocabulary
    x = torch.randn(16, 2_500, generator=generator)
    return {
        "random": x * 3,
        "flat": x * 0.01,  # the nucleus is larger than the head that is searched first
        "peaked": x * 30,
        "mixed": x * torch.logspace(-2, 2, 16)[:, None],
        "negative": x * 3 - 40,
        "filtered": (x * 3).masked_fill(x > 1, -torch.inf),
        "small": x[:, :5],
        "one": x[:, :1],
    }[kind]


KINDS = ["random", "flat", "peaked", "mixed", "negative", "filtered", "small", "one", "wide"]
TIED = torch.randn(8, 700, generator=torch.Generator().manual_seed(1)).bfloat16().float()  # 8 bits: many ties


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.3, 0.7, 1.5])
def test_temperature(kind: str, value: float) -> None:
    x = rows(kind)
    assert torch.equal(filters.temperature(x, value=value), oracle.TemperatureLogitsWarper(value)(NO_TOKENS, x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 2, 50, 5_000])
def test_top_k(kind: str, k: int) -> None:
    x = rows(kind)
    assert torch.equal(filters.top_k(x, k=k), oracle.TopKLogitsWarper(k)(NO_TOKENS, x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", [0.01, 0.5, 0.9, 0.95, 0.999])
def test_top_p(kind: str, p: float) -> None:
    x = rows(kind)
    assert torch.equal(filters.top_p(x, p=p), oracle.TopPLogitsWarper(p)(NO_TOKENS, x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 1.0])
def test_min_p(kind: str, p: float) -> None:
    x = rows(kind)
    assert torch.equal(filters.min_p(x, p=p), oracle.MinPLogitsWarper(p)(NO_TOKENS, x))


@pytest.mark.parametrize("kind", ["random", "peaked", "negative", "filtered", "small", "one"])
@pytest.mark.parametrize("p", [0.01, 0.2, 0.9])
def test_typical(kind: str, p: float) -> None:
    x = rows(kind)
    assert torch.equal(filters.typical(x, p=p), oracle.TypicalLogitsWarper(p)(NO_TOKENS, x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", [0.01, 0.9, 0.99, 0.999])
def test_typical_is_no_further_from_the_formula_than_theirs(kind: str, p: float) -> None:
    # Near mass 1, and on flat rows, neighbours at the edge are closer than float32 can tell: the two sets differ, and
    # float64 decides. The rule of two, in tokens, plus one swapped pair. (V = 128k, 0.999: theirs is hundreds off.)
    x = rows(kind)
    logprobs = x.double().log_softmax(-1)
    distance = (logprobs - (logprobs * logprobs.exp()).nansum(-1, keepdim=True)).abs()
    by_distance, order = distance.sort(-1)
    last = (logprobs.exp().gather(1, order).cumsum(-1) < p).sum(-1, keepdim=True).clamp(max=x.shape[1] - 1)
    kept = (distance <= by_distance.gather(1, last)) & (x > -torch.inf)

    ours = ((filters.typical(x, p=p) > -torch.inf) != kept).sum()
    theirs = ((oracle.TypicalLogitsWarper(p)(NO_TOKENS, x) > -torch.inf) != kept).sum()
    assert ours <= 2 * theirs + 2


def test_ties_survive_together_where_a_threshold_decides() -> None:
    for ours, theirs in [
        (filters.top_k(TIED, k=7), oracle.TopKLogitsWarper(7)),
        (filters.min_p(TIED, p=0.2), oracle.MinPLogitsWarper(0.2)),
        (filters.typical(TIED, p=0.4), oracle.TypicalLogitsWarper(0.4)),
    ]:
        assert torch.equal(ours, theirs(NO_TOKENS, TIED))
    assert ((filters.top_k(TIED, k=7) > -torch.inf).sum(-1) > 7).any()  # the case does hold ties


def test_ties_in_top_p_leave_the_same_values() -> None:
    # Which of two equal tokens stays is up to the sort; how many stay, and their logits, is not.
    for x in (TIED, torch.zeros(2, 1_500)):  # 0.905 * 1500 is no whole number: no edge within rounding
        ours, theirs = filters.top_p(x, p=0.905), oracle.TopPLogitsWarper(0.905)(NO_TOKENS, x)
        assert torch.equal(ours.sort(-1).values, theirs.sort(-1).values)


def history(length: int, vocabulary: int) -> Tensor:
    return torch.randint(0, vocabulary, (16, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", ["random", "negative", "filtered"])
@pytest.mark.parametrize("penalty", [0.8, 1.2, 5.0])
def test_repetition_penalty(kind: str, penalty: float) -> None:
    x, tokens = rows(kind), history(400, 300)
    ours = filters.repetition_penalty(x, tokens, torch.ones_like(tokens, dtype=torch.bool), penalty=penalty)
    assert torch.equal(ours, oracle.RepetitionPenaltyLogitsProcessor(penalty)(tokens, x))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("length", [1, 3, 60])
def test_no_repeat_ngram(size: int, length: int) -> None:
    x, tokens = rows("random"), history(length, 3)  # three different tokens: every n-gram repeats soon
    ours = filters.no_repeat_ngram(x, tokens, torch.ones_like(tokens, dtype=torch.bool), size=size)
    assert torch.equal(ours, oracle.NoRepeatNGramLogitsProcessor(size)(tokens, x))


def test_min_new_tokens() -> None:
    x, tokens, eos = rows("random"), history(10, 3), (3, 17, 99_999)
    keep = torch.ones_like(tokens, dtype=torch.bool)
    for prompt in (5, 6, 7, 8):  # 10 tokens, so 5, 4, 3, 2 of them new
        ours = process(x, tokens, keep, sampling=Sampling(min_new_tokens=4, eos_ids=eos), step=10 - prompt)
        assert torch.equal(ours, oracle.MinNewTokensLengthLogitsProcessor(prompt, 4, list(eos))(tokens, x))


def test_left_padding_is_history_for_neither_penalty() -> None:
    x, tokens = rows("random"), history(30, 40)
    padding = torch.arange(16)  # row r has r pads
    keep = torch.arange(30)[None] >= padding[:, None]
    ours = filters.repetition_penalty(x, tokens, keep, penalty=1.3)
    theirs = oracle.RepetitionPenaltyLogitsProcessor(1.3, prompt_ignore_length=padding)  # as `generate` builds it
    assert torch.equal(ours, theirs(tokens, x))


def test_transformers_counts_padding_in_ngrams_and_we_do_not() -> None:
    x = torch.zeros(1, 10)
    padded, alone = torch.tensor([[7, 7, 5, 7]]), torch.tensor([[5, 7]])  # 7 is both the pad and a real last token
    theirs = oracle.NoRepeatNGramLogitsProcessor(2)
    assert not torch.equal(theirs(padded, x), theirs(alone, x)), "mended upstream: drop the note in filters.py"
    ours = filters.no_repeat_ngram(x, padded, torch.tensor([[False, False, True, True]]), size=2)
    assert torch.equal(ours, theirs(alone, x))


CHAINS = [
    {"do_sample": True},
    {"do_sample": True, "temperature": 0.6, "top_p": 0.9},  # Llama 3's own file
    {"do_sample": True, "top_k": 0, "top_p": 0.8, "min_p": 0.02},
    {"do_sample": True, "top_k": 10, "temperature": 1.7, "typical_p": 0.8},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 5},
    {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1},
    {"temperature": 0.5, "top_k": 5},  # greedy: the file alone does not ask for sampling
    {
        "do_sample": True,
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 2,
        "min_new_tokens": 5,
        "temperature": 0.7,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.03,
        "typical_p": 0.9,
    },
]


@pytest.fixture(scope="module")
def their_model():  # type: ignore[no-untyped-def]
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    return transformers.LlamaForCausalLM(config)


@pytest.mark.filterwarnings("ignore")  # transformers warns of sampling fields in a greedy file; that file is the case
@pytest.mark.parametrize("stored", CHAINS)
@pytest.mark.parametrize("kind", ["random", "peaked", "negative"])
def test_a_generation_config_gives_the_chain_of_generate(their_model, stored: dict, kind: str) -> None:  # type: ignore[no-untyped-def]
    stored = {**stored, "eos_token_id": [3, 17]}
    config, _ = their_model._prepare_generation_config(transformers.GenerationConfig(**stored))
    their_model._prepare_special_tokens(config)
    theirs = their_model._get_logits_processor(config, input_ids_seq_length=58, device="cpu", model_kwargs={})

    x, tokens = rows(kind), history(60, 3)
    keep = torch.ones_like(tokens, dtype=torch.bool)
    ours = process(x, tokens, keep, sampling=Sampling.from_hf(stored), step=2)
    assert torch.equal(ours, theirs(tokens, x))


def test_every_field_of_their_generation_config_is_known() -> None:
    theirs = transformers.GenerationConfig().to_dict()
    assert Sampling.from_hf(theirs) == Sampling()
    assert Sampling.from_hf({**theirs, **transformers.GenerationConfig._get_default_generation_params()}).top_k == 0
