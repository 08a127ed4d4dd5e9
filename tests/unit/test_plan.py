"""What `minillm plan` counts, against hand-computed numbers, against autograd itself, and as a person meets it."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import minillm
from minillm import cli
from minillm.checkpoint import falcon
from minillm.losses import next_token_loss
from minillm.model import Decoder
from minillm.ops import attention
from minillm.plan import Plan, Use, activations, parse_size, plan
from minillm.plan.activations import kept_by_autograd
from minillm.plan.moments import Parts
from minillm.plan.weights import optimizer_bytes, shapes_of
from minillm.training.optim import adamw
from minillm.training.token_loss import TokenLoss, whole_rows
from tests import decoders

#: The fields of the public config.json files that shape the model.
FALCON_7B: dict[str, Any] = {
    "model_type": "falcon",
    "hidden_size": 4544,
    "num_hidden_layers": 32,
    "num_attention_heads": 71,
    "multi_query": True,
    "parallel_attn": True,
    "bias": False,
    "alibi": False,
    "vocab_size": 65024,
    "torch_dtype": "bfloat16",
}
FALCON_40B: dict[str, Any] = {
    **FALCON_7B,
    "hidden_size": 8192,
    "num_hidden_layers": 60,
    "num_attention_heads": 128,
    "num_kv_heads": 8,
    "new_decoder_architecture": True,
}


def of(raw: dict[str, Any], **use: Any) -> Plan:
    return plan(falcon.config_from_hf(raw, "config.json"), Use(**use))


# --- weights, against numbers worked out by hand ---

#: By layer of Falcon-40B: q 8192², k and v 512 · 8192, o 8192², up and down 4 · 8192²; rows 8192 + 2 · 512 + 8192 +
#: 32768 + 8192. Two norms a layer and the last, 2 · 8192 each; the embedding 65024 · 8192, tied to the head.
MATRICES = 60 * (10 * 8192**2 + 2 * 512 * 8192)
ROWS = 60 * (8192 + 2 * 512 + 8192 + 32768 + 8192)
REST = 65024 * 8192 + (2 * 60 + 1) * 2 * 8192


@pytest.mark.parametrize(
    ("use", "expected"),
    [
        ({}, 2 * (MATRICES + REST)),
        ({"dtype": "float32"}, 4 * (MATRICES + REST)),
        ({"quantize": "int8"}, MATRICES + 4 * ROWS + 2 * REST),
        ({"quantize": "nf4"}, MATRICES // 2 + MATRICES * 4 // 64 + 2 * REST),
        (
            {"quantize": "nf4", "double_quant": True},
            MATRICES // 2 + MATRICES // 64 + MATRICES * 4 // (64 * 256) + 2 * REST,
        ),
    ],
)
def test_weights_of_falcon_40b(use: dict[str, Any], expected: int) -> None:
    assert of(FALCON_40B, **use).whole.weights == expected


def test_nf4_blocks_that_are_not_full_count_whole() -> None:
    """A (5, 13) matrix, 65 numbers: 33 bytes and 2 scales; (2, 3): 3 bytes and one."""
    config = decoders.config(hidden_size=13, num_layers=1, num_heads=1, num_kv_heads=1, head_size=2, ffn_size=5)
    # q, k, v (2, 13): 13 bytes + 1 scale each; o (13, 2): the same; gate, up (5, 13); down (13, 5)
    matrices = 4 * (13 + 4) + 3 * (33 + 2 * 4)
    doubled = 4 * (13 + 1 + 4) + 3 * (33 + 2 + 4)
    rest = 2 * (2 * 131 * 13 + 3 * 13)
    assert plan(config, Use(quantize="nf4")).whole.weights == matrices + rest
    assert plan(config, Use(quantize="nf4", double_quant=True)).whole.weights == doubled + rest


@pytest.mark.parametrize(
    ("raw", "use", "said"),
    [
        (FALCON_40B, {}, 90e9),
        (FALCON_40B, {"quantize": "int8"}, 45e9),
        (FALCON_40B, {"quantize": "nf4"}, 27e9),
        (FALCON_7B, {}, 15e9),
    ],
)
def test_the_figures_of_falcons_launch_post(raw: dict[str, Any], use: dict[str, Any], said: float) -> None:
    """They are the weights and a margin of 7 to 13 %, in which prompt and cache of 2048 tokens find room."""
    found = of(raw, context=2048, **use)
    assert found.whole.weights < found.total < said
    assert 1.07 < said / found.whole.weights < 1.13


@pytest.mark.parametrize("shape", decoders.SHAPES.values(), ids=decoders.SHAPES)
@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_every_parameter_is_counted(shape: dict[str, Any], head: str) -> None:
    config = decoders.config(**shape, head=head, num_layers=3)
    found = plan(config, Use(dtype="float32"))
    assert found.parameters == sum(p.numel() for p in Decoder(config).parameters())
    assert found.whole.weights == found.read == 4 * found.parameters


def test_the_cache_holds_key_value_heads_only() -> None:
    """2 · layers · G · E numbers a token and row: Falcon-40B 2 · 60 · 8 · 64."""
    assert of(FALCON_40B, context=100, batch=3).whole.cache == 2 * 60 * 8 * 64 * 2 * 100 * 3
    config = decoders.config()
    cache = Decoder(config).new_cache(3, 20)
    held = sum(x.numel() * x.element_size() for x in (*cache.keys, *cache.values))
    assert plan(config, Use(dtype="float32", context=20, batch=3)).whole.cache == held


# --- adapters and optimizer ---


def test_adapters_are_rank_times_both_sides() -> None:
    """fp32; Falcon-7B: q (4544, 4544), v (64, 4544)."""
    found = of(FALCON_7B, lora_rank=16, quantize="int8", train=True, context=8)
    numbers = 32 * 16 * ((4544 + 4544) + (64 + 4544))
    assert found.whole.adapters == found.whole.gradients == 4 * numbers
    assert found.whole.optimizer == 8 * numbers
    everything = of(FALCON_7B, lora_rank=16, lora_targets=("all-linear",)).whole.adapters
    inner = 4 * 4544
    pairs = 2 * (4544 + 4544) + 2 * (64 + 4544) + 2 * (4544 + inner)
    assert everything == 4 * 32 * 16 * pairs


@pytest.mark.parametrize(
    ("size", "expected"), [(4095, 8 * 4095), (4096, 2 * 4096 + 2 * 4 * 16), (4097, 2 * 4097 + 2 * 4 * 17)]
)
def test_8_bit_moments(size: int, expected: int) -> None:
    assert optimizer_bytes(size, 4, Use(optimizer="adamw8")) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adamw_keeps_two_moments_in_the_parameters_format(dtype: Any) -> None:
    """The real optimizer, one step."""
    config = decoders.config()
    model = Decoder(config).to(getattr(torch, dtype))
    optimizer = adamw(model, learning_rate=1e-3)
    next_token_loss(model(torch.ones(1, 4, dtype=torch.long)), torch.ones(1, 4, dtype=torch.long)).backward()
    optimizer.step()
    held = [x.numel() * x.element_size() for state in optimizer.state.values() for x in state.values() if x.numel() > 1]
    found = plan(config, Use(dtype=dtype, train=True))
    assert found.whole.optimizer == sum(held)
    assert (
        found.peak.gradients
        <= found.whole.gradients
        == sum(p.grad.numel() * p.grad.element_size() for p in model.parameters() if p.grad is not None)
    )


# --- activations, against what autograd says it keeps ---


def kept(model: Decoder, rows: int, length: int) -> int:
    """Bytes of all tensors that a forward pass up to the loss saves for backward, parameters not counted."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    tokens = torch.randint(0, model.config.vocab_size, (rows, length))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        TokenLoss(model)(whole_rows(tokens), tokens.numel())
    return sum(size for size, _ in found.values())


ACTIVATION_SHAPES: dict[str, dict[str, Any]] = {
    **decoders.SHAPES,
    "two_norms": {**decoders.SHAPES["falcon"], "parallel_norms": 2, "norm": "rms"},
    "two_layer_norms": {**decoders.SHAPES["falcon"], "parallel_norms": 2},
    "gated_relu": {"activation": "relu"},
    "plain_relu": {"mlp": "plain", "activation": "relu"},
}
LORA: list[tuple[str, ...]] = [
    (),
    ("q_proj", "v_proj"),
    ("down_proj",),
    ("o_proj", "up_proj"),
    ("up_proj", "down_proj"),
    ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"),
    ("all-linear",),
]


@pytest.mark.parametrize("targets", LORA, ids=lambda targets: "+".join(targets) or "full")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", ACTIVATION_SHAPES.values(), ids=ACTIVATION_SHAPES)
def test_what_autograd_keeps(
    shape: dict[str, Any], dtype: Any, targets: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte, for every kind of block, all weights trained or adapters only."""
    if not attention.is_chosen():
        monkeypatch.setattr(activations, "STATISTICS", 1)  # torch's kernel serves
    rows, length, layers = 3, 21, 3
    config = decoders.config(**shape, num_layers=layers)
    model = Decoder(config).to(getattr(torch, dtype))
    use = Use(
        dtype=dtype, context=length, batch=rows, train=True, lora_rank=4 if targets else None, lora_targets=targets
    )
    if targets:
        minillm.lora.add(model, targets="all-linear" if targets == ("all-linear",) else targets, rank=4)
    found = kept_by_autograd(config, use, use.targets(shapes_of(config).linears))
    head = 4 * config.vocab_size * config.hidden_size if use.full else 0  # its gradient, in at least fp32
    assert kept(model, rows, length) == found.first + (layers - 1) * found.block + found.positions + found.end + head


# --- the whole ---


def test_parts_of_the_peak_add_up() -> None:
    for use in (Use(), Use(train=True), Use(train=True, checkpointing=True), Use(lora_rank=2, train=True)):
        found = plan(decoders.config(), use)
        assert found.total == sum(getattr(found.peak, part.name) for part in fields(Parts))
        assert all(getattr(found.peak, part.name) <= getattr(found.whole, part.name) for part in fields(Parts))


def test_a_frozen_linear_keeps_no_input() -> None:
    """Nor where the native product serves, from 64 rows and numbers on."""
    config = decoders.config(hidden_size=64, ffn_size=128)
    model = Decoder(config)
    minillm.lora.add(model, targets=["q_proj"], rank=4)
    use = Use(dtype="float32", context=64, batch=2, train=True, lora_rank=4, lora_targets=("q_proj",))
    found = kept_by_autograd(config, use, use.lora_targets)
    fewer = 0 if attention.is_chosen() else 2 * 4 * 4 * 2 * 64  # torch's kernel keeps half of the statistics
    assert kept(model, 2, 64) == found.first + found.block + found.positions + found.end - fewer


def test_checkpointing_keeps_the_input_of_each_block() -> None:
    config = decoders.config(num_layers=8, num_kv_heads=4, vocab_size=5)
    whole = plan(config, Use(train=True, dtype="float32")).whole.activations
    less = plan(config, Use(train=True, dtype="float32", checkpointing=True)).whole.activations
    tokens, width, inner = config.context, config.hidden_size, config.ffn_size
    again = tokens * 4 * (3 * width + 2 * 32 + 2 * 32 + 3 * inner + 2 * 4 + 2)
    entries, rotation, working = 8 * tokens * width * 4, 2 * tokens * 8 * 4, tokens * 4 * (width + 2 * inner)
    assert less == entries + rotation + again + working
    assert whole > 8 * again > less


def test_accumulated_gradients_stand_beside_the_activations() -> None:
    use = Use(train=True, context=64, batch=16)
    alone, added = plan(decoders.config(), use), plan(decoders.config(), replace(use, accumulate=True))
    head = (4 + 2 + 4) * 131 * 32  # its gradient in fp32, and what a chunk adds to it in bf16 and widened
    assert (alone.peak.gradients, added.peak.gradients) == (head, head + 2 * added.parameters)
    assert added.total == alone.total + 2 * added.parameters


@pytest.mark.parametrize(("dtype", "each"), [("float32", 4), ("bfloat16", 2 + 4)])
@pytest.mark.parametrize(("vocabulary", "rows"), [(9_000, 1008), (100_000, 252)])  # of 16 * 63: all, and a quarter
def test_the_loss_holds_a_chunk_of_logits(vocabulary: int, rows: int, dtype: Any, each: int) -> None:
    """In fp32 their gradient takes their place; in bf16 they are there in fp32 as well."""
    found = plan(decoders.config(vocab_size=vocabulary), Use(dtype=dtype, train=True, context=64, batch=16))
    assert found.moment == "when the loss is taken"
    assert found.peak.logits == each * rows * vocabulary
    assert found.peak.gradients == (4 if dtype == "float32" else 4 + 2 + 4) * vocabulary * 32  # of the head


def test_in_bf16_a_chunk_of_the_heads_gradient_is_widened_before_it_is_added() -> None:
    """V D of 2 and 4 bytes beside the sum."""
    config = decoders.config(vocab_size=9000)
    less, more = (plan(config, Use(train=True, context=9, accumulate=True, lora_rank=rank)) for rank in (2, None))
    assert less.whole.logits == (2 + 4) * 8 * 9000
    assert more.moment == "when the loss is taken"
    assert more.peak.logits == (2 + 4) * 8 * 9000
    assert more.peak.gradients == 2 * more.parameters + (4 + 2 + 4) * 9000 * 32


def test_a_scalar_heads_values_are_whole() -> None:
    found = plan(decoders.config(head="scalar"), Use(dtype="float32", train=True, context=64, batch=2))
    assert found.whole.logits == (4 + 12) * 64 * 2


@pytest.mark.parametrize(("accumulate", "more"), [(False, 1), (True, 2)])
def test_a_tied_embeddings_gradient_is_there_more_than_once(accumulate: bool, more: int) -> None:
    """That of the head waits for the lookup's; where an earlier batch left a sum, a third stands beside it."""
    config = decoders.config(tied_embeddings=True, vocab_size=9000)
    found = plan(config, Use(dtype="float32", train=True, context=1, accumulate=accumulate))
    assert found.moment == "when the backward pass ends"
    assert found.peak.gradients == 4 * (found.parameters + more * 9000 * 32)


def test_fits() -> None:
    found = plan(decoders.config())
    assert found.fits(found.total) and not found.fits(found.total - 1)


def test_shapes_name_the_linears() -> None:
    config = decoders.config(attention_bias=True)
    assert shapes_of(config).linears["k_proj"] == (16, 32)
    assert list(shapes_of(config).linears) == "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("24GB", 24 * 10**9),
        ("24 gib", 24 * 2**30),
        ("24G", 24 * 10**9),
        ("1.5Ti", 3 * 2**39),
        ("512", 512),
        ("1kb", 1000),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "24XB", "-3GB", "0", "1e9", "24 GB x", "１GB", "1.GB.", "nan"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(minillm.MinillmError, match="as in 24GB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("use", "said"),
    [
        ({"context": 65}, "context is 65, but the model takes 64"),
        ({"context": 0}, "context is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"lora_rank": 0}, "lora_rank is 0"),
        ({"lora_rank": 2, "lora_targets": ("q_porj",)}, "nearest: q_proj"),
        ({"lora_rank": 2, "lora_targets": ()}, "lora_targets is empty"),
        ({"quantize": "nf3"}, "nearest: nf4"),
        ({"dtype": "float8"}, "dtype 'float8'"),
        ({"optimizer": "sgd"}, "optimizer 'sgd'"),
        ({"quantize": "int8", "train": True}, "cannot be trained"),
        ({"double_quant": True}, "double_quant is for nf4"),
        ({"checkpointing": True}, "checkpointing matters in training only"),
        ({"accumulate": True}, "accumulate matters"),
        ({"optimizer": "adamw8"}, "optimizer matters"),
    ],
)
def test_bad_use(use: dict[str, Any], said: str) -> None:
    with pytest.raises(minillm.MinillmError, match=said) as caught:
        plan(decoders.config(), Use(**use))
    assert "\n" not in str(caught.value)


# --- the command ---


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Falcon-40B's config.json and nothing else."""
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "config.json").write_text(json.dumps(FALCON_40B))
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "said", "status"),
    [
        ([], ("82.6 GB", "83.3 GB", "122,880 bytes a token"), 0),
        (["--quantize", "int8", "--available", "45GB"], ("41.9 GB", "42.5 GB", "fits, 2.49 GB to spare"), 0),
        (["--quantize", "nf4", "--available", "24GB"], ("24.0 GB", "does not fit"), 1),
        (["--available", "48GB"], ("35.3 GB short; with --quantize int8: 42.5 GB",), 1),
        (["--train", "--lora-rank", "8", "--lora-targets", "q_proj", "k_proj"], ("rank 8", "q_proj k_proj"), 0),
    ],
)
def test_the_command(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: tuple[str, ...], status: int
) -> None:
    assert cli.main(["plan", str(folder), *arguments]) == status
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    flat = " ".join(printed.replace("│", " ").split())
    assert all(part in flat for part in said), printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--available", "24 bananas"], "24 bananas"),
        (["--context", "4096"], "the model takes 2048"),
        (["--lora-rank", "0"], "lora_rank is 0"),
        (["--lora-rank", "2", "--lora-targets", "query_key_value"], "choose from q_proj"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert cli.main(["plan", str(folder), *arguments]) == 2
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 1 and said in printed.err and not printed.out


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", "--help"])
    assert ended.value.code == 0
    assert "minillm plan tiiuae/falcon-40b --quantize nf4 --available 24GB" in " ".join(capsys.readouterr().out.split())
