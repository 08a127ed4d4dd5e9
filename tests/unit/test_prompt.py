"""Prompts of virtual tokens: the base they leave alone, padding, cache, training, refused files, the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import minillm
from minillm import cli, lora, prompt
from minillm.errors import CheckpointError, InputError, MinillmError, NumericsError
from minillm.generation.generate import Completion
from minillm.generation.session import Session
from minillm.model import Decoder
from minillm.ops import native
from minillm.prompt import Prompted
from minillm.quant.convert import Quantisation, quantize_linears
from tests import decoders, tiny_checkpoint
from tests.error import assert_near

SHAPES: dict[str, dict[str, Any]] = {
    **decoders.SHAPES,
    "falcon_grouped": {
        **decoders.SHAPES["falcon"],
        "num_kv_heads": 2,
        "parallel_norms": 2,
        "family": "falcon",
        "attention_bias": True,
        "mlp_bias": True,
    },
}
KINDS: dict[str, dict[str, Any]] = {
    "prompt": {},
    "vocab": {"init": "vocab"},
    "p-tuning": {"kind": "p-tuning"},
    "p-tuning lstm": {"kind": "p-tuning", "encoder": "lstm", "width": 12, "dropout": 0.3},
    "prefix": {"kind": "prefix"},
    "prefix mlp": {"kind": "prefix", "encoder": "mlp"},
}
THREE = ["prompt", "p-tuning", "prefix"]
P = 4


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(131, (rows, length), generator=torch.Generator().manual_seed(2))


def prompted(kind: str = "prompt", shape: str = "llama", how: str | None = None, **fields: Any) -> Prompted:
    model = decoders.decoder(**SHAPES[shape])
    if how is not None:  # no columns in float: which ones depends on the rows that are beside a row
        quantize_linears(model, Quantisation(how, threshold=0.0))
    torch.manual_seed(4)
    return prompt.add(model, tokens=P, **{**KINDS[kind], **fields}).eval()


def state(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", [None, "int8", "nf4"])
def test_training_moves_the_prompt_and_nothing_else(kind: str, how: str | None) -> None:
    model = prompted(kind, how=how).train()
    before, base = state(model.prompt), state(model.base)
    text, losses = tokens(2, 7), []
    optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=0.02)
    for _ in range(20):
        logits = model(text)
        assert logits.shape == (2, 7, 131)
        losses.append(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten()))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(not torch.equal(before[name], value) for name, value in state(model.prompt).items())
    after = state(model.base)
    assert base.keys() == after.keys() and all(torch.equal(base[name], after[name]) for name in base)


@pytest.mark.parametrize("kind", THREE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("how", [None, "int8", "nf4"])
def test_cached_is_uncached(kind: str, shape: str, how: str | None) -> None:
    """Rows of 3 and 8 tokens, padded on the left; then one token at a time."""
    model, text = prompted(kind, shape, how), tokens(2, 8)
    keep = torch.arange(8) >= torch.tensor([[5], [0]])
    with torch.no_grad():
        whole, cache = model(text, keep=keep), model.new_cache(2, 8)
        first = model(text[:, :6], keep=keep[:, :6], cache=cache)
        steps = [model(text[:, place : place + 1], cache=cache) for place in (6, 7)]
        assert cache.length == cache.capacity == 8
        assert_near(torch.cat([first, *steps], dim=1)[keep], whole[keep])
        assert_near(model(text[:1, 5:])[0], whole[0, 5:])
        cache.rewind(6)
        assert_near(model(text[:, 6:], cache=cache), whole[:, 6:])


@pytest.mark.parametrize("kind", THREE)
def test_generation_is_the_argmax_of_whole_forwards(kind: str) -> None:
    model, texts = prompted(kind), [[5, 6, 7], [8, 9, 10, 11, 12]]
    found = minillm.generate(model, None, texts, max_new_tokens=6, do_sample=False)
    for text, answer in zip(texts, found, strict=True):
        for token in answer.tokens:
            assert int(model(torch.tensor([text]))[0, -1].argmax()) == token
            text.append(token)
    plain = minillm.generate(model.base, None, [8, 9, 10, 11, 12], max_new_tokens=6, do_sample=False)
    assert plain[0].tokens != found[1].tokens


@pytest.mark.parametrize("kind", THREE)
def test_stream_and_session(kind: str, tmp_path: Path) -> None:
    base, tokenizer = minillm.load(tiny_checkpoint.write(tmp_path, eos=None))
    model = prompt.add(base, tokens=P, **KINDS[kind])
    session, text = Session(model, tokenizer), tokenizer.encode("def main")
    for turn in (text, [*text, *tokenizer.encode("the other")], text[:-1]):
        told = "".join(session.stream(turn, Completion(), max_new_tokens=6))
        (fresh,) = minillm.generate(model, tokenizer, turn, max_new_tokens=6)
        assert told == fresh.text == "".join(minillm.stream(model, tokenizer, turn, max_new_tokens=6))


def test_virtual_tokens_take_their_part_of_the_context() -> None:
    for scaling, longest in ((None, 64 - P), (minillm.config.LinearRope(factor=2.5), 160 - 5)):  # 2 of 64 are 5 of 160
        model = prompt.add(decoders.decoder(rope_scaling=scaling), tokens=P)
        assert model.config.longest == longest
        (answer,) = minillm.generate(model, None, [3] * (longest - 2), max_new_tokens=9, do_sample=False)
        assert len(answer.tokens) == 2
    with pytest.raises(InputError, match="no room in a context of 64"):
        prompt.add(decoders.decoder(), tokens=64)


@pytest.mark.parametrize("kind", ["prefix", "prefix mlp"])
def test_one_token_has_the_gradient_of_the_plain_functions(kind: str) -> None:
    """The native block for single tokens has none and must not be taken."""
    found = []
    for _ in range(2):
        model = prompted(kind)
        if found:
            with native.aside():
                model(tokens(1, 1)).square().mean().backward()
        else:
            model(tokens(1, 1)).square().mean().backward()
        found.append([x.grad for x in model.prompt.parameters()])
    for one, other in zip(*found, strict=True):
        assert one is not None and other is not None
        assert_near(one, other)
    grad = model.prompt.table.grad
    assert grad is not None and (kind != "prefix" or bool((grad != 0).all()))  # keys and values of every layer


@pytest.mark.parametrize("kind", THREE)
def test_recompute_and_half_precision(kind: str) -> None:
    plain, again = prompted(kind).train(), prompted(kind).train()
    again.base.recompute = True
    for model in (plain, again):
        model(tokens(2, 5)).square().mean().backward()
    for one, other in zip(plain.prompt.parameters(), again.prompt.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        assert_near(one.grad, other.grad, 1e-6)
    plain.base.to(torch.bfloat16)
    logits = plain(tokens(2, 5))
    assert logits.dtype == torch.bfloat16 and plain.prompt.table.dtype == torch.float32
    assert_near(logits.float(), again(tokens(2, 5)), 0.1)  # some tens of roundings of 2^-9, wide weights


@pytest.mark.parametrize("kind", THREE)
def test_beside_an_adapter(kind: str) -> None:
    base = decoders.decoder()
    lora.add(base, targets=["q_proj", "v_proj"], init="linear")
    model = prompt.add(base, tokens=P, **KINDS[kind])
    assert {name.split(".")[0] for name, x in model.named_parameters() if x.requires_grad} == {"prompt"}
    with torch.no_grad():
        on = model(tokens(1, 6))
        with lora.disabled(base):
            off = model(tokens(1, 6))
            assert not torch.equal(off, on)
        with lora.disabled(model):  # the base's adapters, seen through the prompted model
            assert torch.equal(model(tokens(1, 6)), off)


def test_adapters_are_the_models_within(tmp_path: Path) -> None:
    """On the prompted model their names would be of no checkpoint, and the prompt itself frozen."""
    model = prompted()
    asks: list[Any] = [lambda: lora.add(model, rank=2, targets=["q_proj"]), lambda: lora.merged(model)]
    asks += [lambda: lora.save(model, tmp_path), lambda: lora.remove(model, "default")]
    for ask in asks:
        with pytest.raises(InputError, match="adapters are the Decoder's, not a Prompted's; give the `base` of it"):
            ask()
    assert [name for name, x in model.named_parameters() if x.requires_grad] == ["prompt.table"]


def test_starts() -> None:
    words = decoders.decoder().embed.weight
    table = prompted("vocab").prompt.table
    assert all(any(torch.equal(row, word) for word in words) for row in table)
    zero = prompted("prefix", init="zero")
    assert not bool(zero.prompt().any())
    assert not torch.allclose(zero(tokens(1, 6)), zero.base(tokens(1, 6)), atol=1e-2)
    grouped = prompted("prefix", "falcon_grouped")
    assert prompted("prefix").prompt.table.shape == (P, 2 * 2 * 2 * 8)  # 2 L G E
    assert grouped.prompt.table.shape == (P, 2 * 2 * 4 * 8)  # 2 L H E: transformers' cache is that wide


@pytest.mark.parametrize("heads", [2, 4])
def test_a_prefix_of_grouped_falcon_may_have_either_number_of_heads(heads: int, tmp_path: Path) -> None:
    """One for a group is one that all its query heads have."""
    model = prompted("prefix", "falcon_grouped")
    values = model.prompt.table.data.view(P, 4, 2, 2, 8)
    values[:, :, :, 1] = values[:, :, :, 0]
    prompt.save(model, tmp_path)
    if heads == 2:
        narrow = values[:, :, :, 0].reshape(P, -1).clone()
        save_file({"prompt_embeddings": narrow}, tmp_path / "adapter_model.safetensors")
        edit(tmp_path, num_attention_heads=2, token_dim=16)
    loaded = prompt.load(model.base, tmp_path)
    assert loaded.prompt.table.shape == (P, 32 * heads)
    assert_near(loaded(tokens(1, 6)), model(tokens(1, 6)))
    prompt.save(loaded, tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert torch.equal(again["prompt_embeddings"], loaded.prompt.table)


def test_the_file_of_an_encoder_with_dropout_has_none(tmp_path: Path) -> None:
    model = prompted("p-tuning lstm").train()
    prompt.save(model, tmp_path)
    assert model.prompt.training and not torch.equal(model.prompt(), model.prompt())
    saved = load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"]
    assert_near(saved, model.eval().prompt(), 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_loaded_prompts_are_frozen_or_trained_as_values(kind: str, tmp_path: Path) -> None:
    model = prompted(kind)
    prompt.save(model, tmp_path)
    frozen, trained = prompt.load(model.base, tmp_path), prompt.load(model.base, tmp_path, trainable=True)
    assert not any(x.requires_grad for x in frozen.parameters())
    assert [name for name, x in trained.named_parameters() if x.requires_grad] == ["prompt.table"]
    assert_near(trained(tokens(1, 6)), model(tokens(1, 6)))
    settings = trained.settings
    assert (settings.kind, settings.tokens, settings.encoder) == (model.settings.kind, P, model.settings.encoder)
    assert (settings.layers, settings.dropout) == (model.settings.layers, model.settings.dropout)


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (
            "prompt",
            {"peft_type": "MULTITASK_PROMPT_TUNING"},
            "peft_type is 'MULTITASK_PROMPT_TUNING'; this loads PROMPT",
        ),
        ("prompt", {"num_virtual_token": 4}, r"'num_virtual_token' is unknown \(nearest: num_virtual_tokens"),
        ("prompt", {"prefix_projection": True}, "'prefix_projection' is unknown"),
        ("prompt", {"modules_to_save": ["score"]}, r"modules_to_save is \['score'\], which minillm does not have"),
        ("prompt", {"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'.*; CAUSAL_LM"),
        ("prompt", {"num_transformer_submodules": 2}, "num_transformer_submodules is 2"),
        ("prompt", {"num_virtual_tokens": None}, "num_virtual_tokens is missing"),
        ("prompt", {"num_virtual_tokens": True}, "num_virtual_tokens is True; it must be a whole number"),
        ("prompt", {"num_virtual_tokens": 5}, r"shape \(4, 32\), and adapter_config.json says 5"),
        ("prompt", {"token_dim": 64}, "token_dim is 64, and this model asks for 32; .* another base model"),
        ("prompt", {"num_layers": 3}, "num_layers is 3"),
        ("prompt", {"num_attention_heads": 8}, "num_attention_heads is 8, and this model has 4"),
        ("prompt", {"prompt_tuning_init": "WORDS"}, "prompt_tuning_init is 'WORDS'"),
        ("prompt", {"tokenizer_kwargs": [1]}, "tokenizer_kwargs is .*must be an object"),
        ("p-tuning", {"encoder_reparameterization_type": "GRU"}, "type is 'GRU'.*; MLP, LSTM"),
        ("p-tuning", {"encoder_dropout": 1.5}, "encoder_dropout is 1.5"),
        ("p-tuning", {"encoder_dropout": "much"}, "encoder_dropout is 'much'; it must be a number"),
        ("p-tuning", {"encoder_num_layers": 0}, "encoder_num_layers is 0"),
        ("prefix", {"init_weights": "ones"}, "init_weights is 'ones'"),
        ("prefix", {"prefix_projection": 1}, "prefix_projection is 1"),
        ("prefix", {"num_attention_heads": 4}, "num_attention_heads is 4, and this model has 2"),
        ("prefix", {"token_dim": 32}, "token_dim is 32, and this model asks for 16"),
    ],
)
def test_fields_that_are_refused(kind: str, fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = prompted(kind)
    prompt.save(model, tmp_path)
    edit(tmp_path, **fields)
    base = decoders.decoder()
    with pytest.raises(CheckpointError, match=message):
        prompt.load(base, tmp_path)
    assert all(x.requires_grad for x in base.parameters())


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"prompt_embeddings": torch.ones(4, 16)}, r"shape \(4, 16\), and this model asks for \(4, 32\)"),
        ({"prompt_embeddings": torch.ones(128)}, r"shape \(128,\)"),
        ({"prompt_embeddings": torch.ones(4, 0)}, r"shape \(4, 0\)"),
        ({"prompt_embeddings": torch.ones(4, 32).long()}, "torch.int64; prompts are in floating point"),
        ({"prompt_embeddings": torch.full((4, 32), torch.nan)}, "NaN or infinite"),
        ({"prompt_embeddings": torch.ones(4, 32), "more": torch.ones(1)}, "holds more"),
        ({"prompt_embedding": torch.ones(4, 32)}, r"holds prompt_embedding \(nearest"),
        ({}, "holds nothing"),
        (None, "has no adapter_model.safetensors"),
    ],
)
def test_files_that_are_refused(found: dict[str, Tensor] | None, message: str, tmp_path: Path) -> None:
    model = prompted()
    prompt.save(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.unlink() if found is None else save_file(found, path)
    with pytest.raises(CheckpointError, match=message):
        prompt.load(model.base, tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "prefx"}, r"kind is 'prefx' \(nearest: prefix\); have prompt, p-tuning, prefix"),
        ({"token": 3}, r"token is no setting of a prompt \(nearest: tokens"),
        ({"tokens": 0}, "tokens is 0"),
        ({"tokens": True}, "tokens is True"),
        ({"init": "zero"}, "init of a prompt is 'zero'"),
        ({"kind": "prefix", "init": "vocab"}, "init of a prefix is 'vocab'; have random, zero"),
        ({"kind": "prefix", "encoder": "lstm"}, "encoder of a prefix is 'lstm'"),
        ({"encoder": "mlp"}, "encoder of a prompt is 'mlp'"),
        ({"init": "text"}, "go together"),
        ({"text": "words"}, "go together"),
        ({"init": "text", "text": "words"}, "there is no tokenizer"),
        ({"width": 8}, "this prompt has none"),
        ({"kind": "p-tuning", "layers": 3}, "are the LSTM encoder's"),
        ({"kind": "p-tuning", "dropout": 0.1}, "are the LSTM encoder's"),
        ({"kind": "p-tuning", "encoder": "lstm", "dropout": 1}, "dropout is 1"),
        ({"kind": "p-tuning", "encoder": "lstm", "dropout": 0.1, "layers": 1}, "there is one"),
    ],
)
def test_settings_that_are_refused(fields: dict[str, Any], message: str) -> None:
    model = decoders.decoder()
    with pytest.raises(InputError, match=message):
        prompt.add(model, **fields)
    assert all(x.requires_grad for x in model.parameters())


def test_misuse_is_refused(tmp_path: Path) -> None:
    model, text = prompted(), tokens(2, 3)
    with pytest.raises(InputError, match="cache has no virtual tokens"):
        model(text, cache=model.base.new_cache(2, 9))
    with pytest.raises(InputError, match="do not pack"):
        model(text, segments=torch.zeros_like(text))
    with pytest.raises(InputError, match="must be bool"):
        model(text, keep=torch.ones(2, 3))
    with pytest.raises(InputError, match="must be bool"):
        prompted("prefix")(text, keep=torch.ones(2, 4).bool())
    with pytest.raises(InputError, match="not a Prompted"):
        prompt.add(model)
    with pytest.raises(InputError, match="scalar head"):
        prompt.add(Decoder(decoders.config(head="scalar")))
    with torch.no_grad():
        model.prompt.table[0, 0] = torch.inf
    with pytest.raises(NumericsError, match="not saved"):
        prompt.save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", THREE)
def test_the_command(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_checkpoint.write(tmp_path / "base")
    other = tiny_checkpoint.write(tmp_path / "other", num_layers=3)
    model = prompt.add(minillm.load_model(base, dtype="float32"), tokens=P, **KINDS[kind])
    prompt.save(model, tmp_path / "adapter", base="someone/base")
    folder, values = str(tmp_path / "adapter"), model.prompt.finished()
    assert cli.main(["adapter", folder, "--base", str(base), "--json", str(tmp_path / "x.json")]) == 0
    shown, found = capsys.readouterr().out, json.loads((tmp_path / "x.json").read_text())
    assert "someone/base" in shown and f"{P}, each of {values.shape[1]} numbers" in shown
    assert found["shape"] == list(values.shape) and found["numbers"] == values.numel()
    layers = model.config.num_layers
    names = [f"layer {n} {what}" for n in range(layers) for what in ("keys", "values")]
    assert [part["part"] for part in found["parts"]] == (names if kind == "prefix" else ["prompt"])
    rows = values.view(P, 2 * layers, -1)[:, 1] if kind == "prefix" else values
    part, lengths, sigma = found["parts"][kind == "prefix"], rows.norm(dim=1), torch.linalg.svdvals(rows)
    p = sigma / sigma.sum()
    expected = {
        "mean": lengths.mean(), "least": lengths.min(), "most": lengths.max(), "largest": sigma.max(),
        "effective_rank": torch.exp(-(p * p.log()).sum()),
    }  # fmt: skip
    assert {name: part[name] for name in expected} == pytest.approx(
        {k: float(v) for k, v in expected.items()}, rel=1e-4
    )
    word = model.base.embed.weight.norm(dim=1).mean()
    relative = None if kind == "prefix" else pytest.approx(float(lengths.mean() / word), rel=1e-5)
    assert part["relative"] == relative
    assert cli.main(["adapter", folder]) == 0
    assert cli.main(["adapter", folder, "--base", str(other)]) == 2
    assert "another base model" in capsys.readouterr().err
    edit(tmp_path / "adapter", num_layers=7)
    assert cli.main(["adapter", folder]) == (2 if kind == "prefix" else 0)


def test_lora_does_not_read_prompts_nor_the_other_way(tmp_path: Path) -> None:
    model = prompted()
    prompt.save(model, tmp_path)
    with pytest.raises(MinillmError, match="peft_type is 'PROMPT_TUNING'"):
        lora.load(model.base, tmp_path)
    edit(tmp_path, peft_type="LORA")
    with pytest.raises(MinillmError, match="peft_type is 'LORA'"):
        prompt.load(model.base, tmp_path)
