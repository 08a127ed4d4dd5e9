"""The engines that the benchmark compares, ours among them: one small function each, from a checkpoint to an `Engine`.

Every engine gets the same token ids, is greedy, and after a prompt gives nothing but the last position's logits.

    transformers   sdpa attention, dynamic cache, logits_to_keep=1
    bitsandbytes   int8: LLM.int8(), threshold 6; NF4: double quantisation, bf16 computation
    torchao        int8 weights a row, int8 activations a token; torch.compile, a static cache that just fits, one graph
                   for a prompt and one for a step
    CTranslate2    int8 weights; the time of a step lies between two calls of its callback
    llama.cpp      through its C interface; the whole prompt in one batch
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Rows = list[list[int]]  # token ids, B prompts of equal length


class Job(NamedTuple):
    """What to measure, and where to put the logits that are compared."""

    figures: list[str]
    rows: Rows  # prompts of the decode test; batch 1 takes the first
    long: list[int]  # the prompt of the prefill test
    new: int  # tokens to decode
    threads: int
    logits: str  # a .npy file


class Place(NamedTuple):
    """What an engine opens."""

    checkpoint: Path
    converted: Path
    job: Job

    @property
    def config(self) -> dict[str, Any]:
        """config.json."""
        return dict(json.loads((self.checkpoint / "config.json").read_text()))


class Engine(NamedTuple):
    """A model that is ready."""

    logits: Callable[[Rows], Any]  # prompts -> logits of their last position (B, V)
    decode: Callable[[Rows, int], float]  # prompts, n -> seconds of n steps, each token in -> logits -> argmax
    prefill: Callable[[Rows], Any]  # what is timed: as `logits`, or the nearest that the peer has
    batch: bool = True  # whether it is measured with several prompts


def stepwise(start: Callable[[Rows], Any], step: Callable[[Any], Any], batch: bool = True) -> Engine:
    """An engine that is driven token by token. start: prompts -> logits (B, V); step: tokens (B,) -> logits (B, V)."""

    def decode(rows: Rows, tokens: int) -> float:
        chosen = start(rows).argmax(-1)
        begin = time.perf_counter()
        for _ in range(tokens):
            chosen = step(chosen).argmax(-1)
        return time.perf_counter() - begin

    return Engine(start, decode, start, batch)


def minillm(place: Place, dtype: str = "bfloat16", quantize: str | None = None, **how: Any) -> Engine:
    """This project; how: what `Quantisation` takes beside the kind."""
    import torch

    import minillm
    from minillm.generation.generate import decode_step, prefill
    from minillm.quant.convert import Quantisation

    quantisation = None if quantize is None else Quantisation(quantize, **how)
    model = minillm.load_model(place.checkpoint, dtype=dtype, quantize=quantisation)
    cache: Any = None

    def start(rows: Rows) -> Any:
        nonlocal cache
        cache = model.new_cache(len(rows), len(rows[0]) + place.job.new + 1)
        return prefill(model, torch.tensor(rows), None, cache)

    return stepwise(start, lambda tokens: decode_step(model, tokens, cache))


def transformers(place: Place, dtype: str = "bfloat16", quantize: dict[str, Any] | None = None) -> Engine:
    """transformers; quantize: the arguments of BitsAndBytesConfig."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if quantize is not None:
        options |= {"quantization_config": BitsAndBytesConfig(**quantize), "device_map": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(place.checkpoint, **options).eval()
    cache: Any = None

    @torch.inference_mode()
    def run(tokens: Any) -> Any:
        nonlocal cache
        out = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        return out.logits[:, -1]

    def start(rows: Rows) -> Any:
        nonlocal cache
        cache = None
        return run(torch.tensor(rows))

    return stepwise(start, lambda tokens: run(tokens[:, None]))


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def bitsandbytes_nf4(place: Place) -> Engine:
    """transformers with bitsandbytes' NF4."""
    import torch

    return transformers(place, quantize=NF4 | {"bnb_4bit_compute_dtype": torch.bfloat16})


def torchao(place: Place) -> Engine:
    """torchao's int8 products, compiled by torch."""
    import torch
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    from transformers import AutoModelForCausalLM, StaticCache

    model = AutoModelForCausalLM.from_pretrained(place.checkpoint, dtype=torch.bfloat16).eval()
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    cache: Any = None

    def run(tokens: Any, cache: Any, positions: Any) -> Any:
        ids = positions[None]
        out = model(tokens, past_key_values=cache, position_ids=ids, cache_position=positions, logits_to_keep=1)
        return out.logits[:, -1]

    compiled, position = torch.compile(run, dynamic=False), 0

    @torch.no_grad()
    def start(rows: Rows) -> Any:
        nonlocal cache, position
        position, longest = len(rows[0]), max(len(place.job.long), len(place.job.rows[0]) + place.job.new + 1)
        if cache is None:
            cache = StaticCache(config=model.config, max_cache_len=longest)
        cache.reset()
        return compiled(torch.tensor(rows), cache, torch.arange(position))

    @torch.no_grad()
    def step(tokens: Any) -> Any:
        nonlocal position
        position += 1
        return compiled(tokens[:, None], cache, torch.arange(position - 1, position))

    return stepwise(start, step, batch=False)


def ctranslate2(place: Place) -> Engine:
    """CTranslate2. Its vocabulary is the ids written out; prefill is timed as the first token of an answer."""
    import ctranslate2

    model = ctranslate2.Generator(
        str(place.converted / "ct2-int8"), compute_type="int8", intra_threads=place.job.threads, inter_threads=1
    )

    def generate(rows: Rows, tokens: int) -> list[float]:
        ticks: list[float] = []
        prompts = [list(map(str, row)) for row in rows]
        model.generate_batch(
            prompts,
            max_length=tokens,
            min_length=tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
            callback=lambda _: ticks.append(time.perf_counter()),
        )
        return ticks

    def decode(rows: Rows, tokens: int) -> float:
        ticks = generate(rows, tokens + 1)
        assert len(ticks) == tokens + 1, f"{len(ticks)} tokens, asked for {tokens + 1}"
        return ticks[-1] - ticks[0]

    def logits(rows: Rows) -> Any:
        return np.array(model.forward_batch([list(map(str, row)) for row in rows]))[:, -1]

    return Engine(logits, decode, lambda rows: generate(rows, 1), batch=False)


def llama_cpp(place: Place, kind: str) -> Engine:
    """llama.cpp, of a GGUF file of that kind."""
    import llama_cpp as lib

    lib.llama_backend_init()
    silence = lib.llama_log_callback(lambda level, text, data: None)
    lib.llama_log_set(silence, None)
    file = place.converted / f"{kind}.gguf"
    model = lib.llama_model_load_from_file(str(file).encode(), lib.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp does not read {file.name}")
    options = lib.llama_context_default_params()
    options.n_ctx = 2 * max(len(place.job.long), len(place.job.rows[0]) + place.job.new)
    options.n_batch = options.n_ubatch = len(place.job.long)
    options.n_threads = options.n_threads_batch = place.job.threads
    context = lib.llama_init_from_model(model, options)
    vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))

    def feed(tokens: list[int]) -> Any:
        ids = (lib.llama_token * len(tokens))(*tokens)  # the batch only points to them
        if lib.llama_decode(context, lib.llama_batch_get_one(ids, len(tokens))):
            raise RuntimeError("llama_decode failed")
        return np.ctypeslib.as_array(lib.llama_get_logits_ith(context, -1), (vocabulary,))[None]

    def start(rows: Rows) -> Any:
        assert silence  # called from C as long as the model lives
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        return feed(rows[0])

    return stepwise(start, lambda tokens: feed([int(tokens[0])]), batch=False)
