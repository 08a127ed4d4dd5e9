"""The request, the filters' properties and the draw; parity with transformers is in tests/parity."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from minillm.errors import ConfigError, InputError, NumericsError
from minillm.generation import filters
from minillm.generation.sampling import Sampling, choose, process, row_generators, token_logprobs, uniforms

INF = torch.inf
ONE_BELOW = 1 - 2.0**-53  # the largest number that `uniforms` can give


def logits_of(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities]).log()


def random_rows(rows: int, vocabulary: int) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0)) * 3


# -- filters -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.001, 1, 1000])
def test_one_token_always_survives_even_the_sharpest_setting(scale: float) -> None:
    x = random_rows(9, 3_000) * scale
    x[:3, 1:] = -INF  # rows with a single candidate
    for kept in (
        filters.top_k(x, k=1),
        filters.top_p(x, p=1e-9),
        filters.min_p(x, p=1.0),
        filters.typical(x, p=1e-9),
    ):
        assert (kept > -INF).any(-1).all()
        assert kept[:3, 0].equal(x[:3, 0])


def test_filters_leave_their_input_alone() -> None:
    x, tokens, keep = random_rows(4, 50), torch.arange(20).view(4, 5) % 3, torch.ones(4, 5, dtype=torch.bool)
    before = x.clone()
    everything = Sampling(
        do_sample=True,
        temperature=0.5,
        top_k=20,
        top_p=0.8,
        min_p=0.01,
        typical_p=0.8,
        repetition_penalty=1.5,
        no_repeat_ngram_size=1,
        min_new_tokens=3,
        eos_ids=(4,),
    )
    assert not process(x, tokens, keep, sampling=everything, step=0).equal(x)
    assert x.equal(before)


@pytest.mark.parametrize("std", [0.01, 3.0, 20.0])
def test_the_nucleus_is_that_of_a_full_sort(std: float) -> None:
    # 0.01: larger than the head that is searched first. Float64 from the top, as the paper writes it.
    x = random_rows(5, 4_000) / 3 * std
    ordered, ids = x.double().softmax(-1).sort(-1, descending=True)
    above = ordered.cumsum(-1) - ordered
    expected = torch.zeros_like(x, dtype=torch.bool).scatter_(1, ids, above < 0.9)
    assert (filters.top_p(x, p=0.9) > -INF).equal(expected)


def test_a_padded_row_is_filtered_as_the_row_alone() -> None:
    texts = [[3, 1, 3, 1, 3], [1, 1], [2], [0, 1, 2, 0, 1]]
    tokens = torch.tensor([[1] * (5 - len(text)) + text for text in texts])  # the pad is also a real token
    keep = torch.tensor([[False] * (5 - len(text)) + [True] * len(text) for text in texts])
    x = random_rows(4, 6)
    sampling = Sampling(repetition_penalty=1.7, no_repeat_ngram_size=2)
    batch = process(x, tokens, keep, sampling=sampling, step=0)
    for row, text in enumerate(texts):
        alone = torch.tensor([text])
        single = process(x[row : row + 1], alone, torch.ones_like(alone, dtype=torch.bool), sampling=sampling, step=0)
        assert batch[row].equal(single[0])
    assert (batch == -INF).nonzero().tolist() == [[0, 1], [1, 1], [3, 2]]


def test_eos_is_forbidden_until_min_new_tokens() -> None:
    x, none = torch.zeros(1, 4), torch.zeros(1, 0, dtype=torch.int64)
    sampling = Sampling(min_new_tokens=2, eos_ids=(1, 3, 400))
    for step, forbidden in ((0, [1, 3]), (1, [1, 3]), (2, [])):
        scores = process(x, none, none.bool(), sampling=sampling, step=step)
        assert (scores[0] == -INF).nonzero().flatten().tolist() == forbidden


def test_bfloat16_logits_are_filtered_in_float32() -> None:
    x, none = random_rows(1, 50).bfloat16(), torch.zeros(1, 0, dtype=torch.int64)
    scores = process(x, none, none.bool(), sampling=Sampling(do_sample=True, temperature=0.7), step=0)
    assert scores.equal(x.float() / 0.7)


# -- the draw ----------------------------------------------------------------------------------------------------------


def test_a_draw_inverts_the_cumulative_distribution() -> None:
    x = logits_of(0.5, 0.25, 0.25)
    for u, token in ((0.0, 0), (0.4999, 0), (0.5001, 1), (0.7499, 1), (0.7501, 2), (ONE_BELOW, 2)):
        assert choose(x, torch.tensor([u], dtype=torch.float64), step=0).item() == token


def test_draws_follow_the_distribution() -> None:
    count, vocabulary = 100_000, 20
    x = random_rows(1, vocabulary) / 3
    generators = row_generators(0, 10)  # ten neighbouring seeds together must be as good as one stream
    draws = torch.cat([uniforms(generators) for _ in range(count // 10)])
    drawn = choose(x.expand(count, -1), draws, step=0).bincount(minlength=vocabulary)
    expected = x[0].double().softmax(-1) * count
    chi_square = ((drawn - expected) ** 2 / expected).sum()
    assert chi_square < 43.82  # 99.9th percentile at 19 degrees of freedom


def test_first_draws_of_neighbouring_seeds_are_independent() -> None:
    first = uniforms(row_generators(0, 4_000))
    correlation = torch.corrcoef(torch.stack([first[:-1], first[1:]]))[0, 1]
    assert abs(correlation) < 4 / math.sqrt(4_000)  # four standard errors
    assert abs(first.mean() - 0.5) < 4 * math.sqrt(1 / 12 / 4_000)


@pytest.mark.parametrize("u", [0.0, 0.3, ONE_BELOW])
def test_a_removed_token_is_never_drawn(u: float) -> None:
    x = random_rows(200, 301)
    x[:, :7] = x[:, -7:] = x[:, 100:120] = -INF
    tokens = choose(x, torch.full((200,), u, dtype=torch.float64), step=0)
    assert (x.gather(1, tokens[:, None]) > -INF).all()


def test_rare_tokens_late_in_the_vocabulary_can_be_drawn() -> None:
    # 1e-8 vanishes beside a float32 sum of 1, whose steps are 6e-8.
    x = logits_of(1.0, 1e-8, 1e-8)
    draws = torch.tensor([1 - 1.5e-8, 1 - 0.5e-8], dtype=torch.float64)
    assert choose(x.expand(2, -1), draws, step=0).tolist() == [1, 2]


def test_a_row_does_not_feel_its_batch() -> None:
    x = random_rows(6, 40_000)  # long enough that torch splits a row's sum among threads when it is alone
    none = torch.zeros(6, 0, dtype=torch.int64)
    sampling = Sampling(do_sample=True, temperature=0.9, top_p=0.95, typical_p=0.9, min_p=1e-4)
    draws = uniforms(row_generators(3, 6))
    together = process(x, none, none.bool(), sampling=sampling, step=0)
    tokens = choose(together, draws, step=0)
    for row in range(6):
        one = slice(row, row + 1)
        alone = process(x[one], none[one], none[one].bool(), sampling=sampling, step=0)
        assert alone.equal(together[one])
        assert choose(alone, uniforms(row_generators(3 + row, 1)), step=0).equal(tokens[one])


def test_the_entropy_of_a_row_does_not_feel_its_batch() -> None:
    x = random_rows(4, 130_000) * 0.01  # flat: the last bit of the entropy decides which tokens are nearest to it
    together = filters.typical(x, p=0.5)
    for row in range(4):
        assert filters.typical(x[row : row + 1], p=0.5)[0].equal(together[row])


def test_a_seed_fixes_the_stream_and_another_changes_it() -> None:
    def stream(seed: int | None) -> list[float]:
        generators = row_generators(seed, 1)
        return [uniforms(generators).item() for _ in range(5)]

    assert stream(1) == stream(1) != stream(2)
    assert len(set(stream(1))) == 5
    torch.manual_seed(0)
    first = stream(None)
    assert stream(None) != first
    torch.manual_seed(0)
    assert stream(None) == first
    assert [g.initial_seed() for g in row_generators(2**32 - 1, 2)] == [2**32 - 1, 0]


def test_greedy_takes_the_first_of_equals() -> None:
    assert choose(torch.tensor([[1.0, 5.0, 5.0], [-INF, -9.0, -INF]]), None, step=0).tolist() == [1, 1]


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "row 1, step 7: the logit of token 2 is nan"),
        (INF, "row 1, step 7: the logit of token 2 is inf"),
        (-INF, "row 1, step 7: no token is left"),
    ],
)
@pytest.mark.parametrize("filtered", [False, True])
def test_a_broken_row_is_named(sampled: bool, value: float, message: str, filtered: bool) -> None:
    x = random_rows(3, 5)
    x[1, 2] = value
    if value == -INF:
        x[1] = value
    if filtered and sampled:
        none = torch.zeros(3, 0, dtype=torch.int64)
        sampling = Sampling(do_sample=True, top_k=4, top_p=0.9, min_p=0.1, typical_p=0.9)
        x = process(x, none, none.bool(), sampling=sampling, step=7)
    draws = torch.full((3,), 0.5, dtype=torch.float64) if sampled else None
    with pytest.raises(NumericsError, match=message):
        choose(x, draws, step=7)


def test_token_logprobs_are_the_models_own() -> None:
    x = random_rows(4, 30)
    tokens = torch.tensor([0, 5, 29, 7])
    expected = x.double().softmax(-1)[torch.arange(4), tokens].log()
    assert (token_logprobs(x, tokens).double() - expected).abs().max() < 1e-5  # float32, |value| below 16
    assert token_logprobs(x.bfloat16(), tokens).dtype == torch.float32


# -- the request -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", -3),
        ("max_new_tokens", 2.5),
        ("max_length", 0),
        ("min_new_tokens", -1),
        ("do_sample", "yes"),
        ("temperature", 0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "0.7"),
        ("temperature", 10**400),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_k", True),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("typical_p", 0),
        ("repetition_penalty", 0),
        ("repetition_penalty", math.nan),
        ("no_repeat_ngram_size", -1),
        ("eos_ids", (-1,)),
        ("eos_ids", [2]),
        ("stop", "x"),
        ("stop", ("",)),
        ("seed", -1),
        ("seed", 2**32),
    ],
)
def test_a_value_out_of_range_is_one_line(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"^{name} is [^\n]*; give [^\n]*$"):
        Sampling(**{"do_sample": True, name: value})


def test_nothing_given_is_ignored() -> None:
    with pytest.raises(InputError, match="top_k=10 has no effect on greedy"):
        Sampling(top_k=10)
    with pytest.raises(InputError, match=r"temperature=0\.7 has no effect on greedy"):
        Sampling.from_hf({}, do_sample=False, temperature=0.7)
    with pytest.raises(InputError, match="min_new_tokens is 9, above max_new_tokens 8"):
        Sampling(min_new_tokens=9, max_new_tokens=8)


def test_an_override_asks_for_sampling_and_the_file_alone_does_not() -> None:
    llama2 = {"temperature": 0.6, "top_p": 0.9, "max_length": 4096, "eos_token_id": 2, "pad_token_id": 0}
    assert Sampling.from_hf(llama2) == Sampling(max_length=4096, eos_ids=(2,))
    sampled = Sampling.from_hf(llama2, top_k=10, seed=0)
    assert sampled == Sampling(
        do_sample=True, top_k=10, temperature=0.6, top_p=0.9, max_length=4096, eos_ids=(2,), seed=0
    )
    assert Sampling.from_hf({"do_sample": True, "temperature": 0.6}, do_sample=False) == Sampling()
    assert Sampling.from_hf({}, seed=3) == Sampling(seed=3)  # a seed alone draws nothing
    assert Sampling.from_hf({}, top_p=0.5, top_k=None) == Sampling(do_sample=True, top_p=0.5, top_k=50)
    assert Sampling.from_hf({}, top_p=0.5, top_k=0) == Sampling(do_sample=True, top_p=0.5)


def test_ids_and_strings_may_be_one_or_many() -> None:
    assert Sampling.from_hf({"eos_token_id": [1, 2], "stop_strings": "a"}) == Sampling(eos_ids=(1, 2), stop=("a",))
    assert Sampling.from_hf({"eos_token_id": None, "top_k": None}) == Sampling()
    assert Sampling.from_hf({"eos_token_id": 1}, eos_token_id=5, stop=["a", "b"]).eos_ids == (5,)


def test_the_callers_length_retires_the_files() -> None:
    def lengths(stored: dict[str, int], **given: int) -> tuple[int | None, int | None]:
        sampling = Sampling.from_hf(stored, **given)
        return sampling.max_new_tokens, sampling.max_length

    assert lengths({"max_length": 9}) == (None, 9)
    assert lengths({"max_length": 9}, max_new_tokens=5) == (5, None)
    assert lengths({"max_new_tokens": 5}, max_length=9) == (None, 9)
    assert lengths({"max_new_tokens": 5, "max_length": 9}) == (5, None)
    assert lengths({}, max_new_tokens=5, max_length=9) == (5, 9)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"num_beams": 4}, "num_beams is 4, .*pass num_beams=1"),
        ({"penalty_alpha": 0.6}, "pass penalty_alpha=0"),
        ({"guidance_scale": 1.5}, "pass guidance_scale=1"),
        ({"epsilon_cutoff": 3e-4}, "pass epsilon_cutoff=0"),
        ({"suppress_tokens": [1, 2]}, "pass suppress_tokens=None"),
        ({"forced_eos_token_id": 0}, "pass forced_eos_token_id=None"),
        ({"bad_words_ids": [[1]]}, "pass bad_words_ids=None"),
        ({"min_length": 5}, "pass min_length=0"),
        ({"encoder_repetition_penalty": 1.1}, "pass encoder_repetition_penalty=1"),
        ({"top_kk": 5}, r"top_kk is unknown .*nearest: top_k.*pass top_kk=None"),
        ({"repetition_penalty": -1}, "repetition_penalty is -1; .*override it with repetition_penalty="),
        ({"eos_token_id": "2"}, "eos_ids is .*override it"),
        ({"do_sample": True, "temperature": "hot"}, "temperature is 'hot'"),
    ],
)
def test_a_file_that_asks_for_something_else_is_refused_and_can_be_overridden(stored: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^generation_config.json: .*{message}"):
        Sampling.from_hf(stored)
    off = {"num_beams": 1, "penalty_alpha": 0, "guidance_scale": 1, "min_length": 0, "repetition_penalty": 1.0}
    name = next(key for key in stored if key != "do_sample")
    override = {"eos_token_id": 2, "temperature": 0.5}.get(name, off.get(name))
    Sampling.from_hf(stored, **{name: override})


def test_what_means_off_and_what_changes_nothing_is_fine() -> None:
    harmless = {
        "_from_model_config": True,
        "transformers_version": "5.23.0",
        "num_beams": 1,
        "suppress_tokens": [],
        "bad_words_ids": None,
        "guidance_scale": None,
        "epsilon_cutoff": 0.0,
        "use_cache": False,
        "bos_token_id": 1,
        "an_unknown_null": None,
    }
    assert Sampling.from_hf(harmless) == Sampling()


def test_an_unknown_option_of_the_caller_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"temprature is not a sampling option \(nearest: temperature"):
        Sampling.from_hf({}, temprature=0.5)
    with pytest.raises(InputError, match="num_beams=4 asks for a decoding"):
        Sampling.from_hf({}, num_beams=4)
