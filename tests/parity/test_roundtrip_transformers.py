"""Their folder -> our model -> our folder, bit for bit; and what transformers makes of that folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import minillm
from minillm.checkpoint.families import read_config
from minillm.errors import CheckpointError
from tests import tiny
from tests.conftest import Pair
from tests.error import assert_near

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle

Pairs = Callable[[str], Pair]
TWO = ("llama_eps", "llama_mha")  # different config, same names and shapes
SHARDED = ("llama_gqa_8_2", "llama_tied", "mistral", "falcon_7b", "falcon_40b_bias", "falcon_rw")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, read by the safetensors library, without the index."""
    files = sorted(folder.glob("*.safetensors"))
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


def assert_same_bits(found: Path, expected: Path) -> None:
    ours, theirs = tensors_of(found), tensors_of(expected)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype, key
        assert torch.equal(ours[key].view(torch.uint8), tensor.view(torch.uint8)), key


def assert_they_load(folder: Path, theirs: Any) -> None:
    """transformers finds every key, no other key, and computes the same bits as from its own folder."""
    kind = type(theirs)
    loaded, report = kind.from_pretrained(folder, output_loading_info=True, attn_implementation="sdpa")
    assert not any(report.values()), report
    tokens = tiny.tokens(1, 12)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens).logits, theirs(tokens).logits)


@pytest.mark.parametrize("name", tiny.VARIANTS)
def test_there_and_back(pair: Pairs, name: str, tmp_path: Path) -> None:
    _, theirs, ours = pair(name)
    original = tiny.save(theirs, tmp_path / "theirs")
    minillm.save(ours, tmp_path / "ours")
    assert_same_bits(tmp_path / "ours", original)
    assert read_config(tmp_path / "ours") == read_config(original)
    assert_they_load(tmp_path / "ours", theirs)


@pytest.mark.parametrize("name", SHARDED)
def test_there_and_back_in_shards(pair: Pairs, name: str, tmp_path: Path) -> None:
    _, theirs, _ = pair(name)
    original = tiny.save(theirs, tmp_path / "theirs", max_shard_size="20KB")
    assert len(list(original.glob("model-*.safetensors"))) > 2
    minillm.save(minillm.load_model(original), tmp_path / "ours", max_shard_bytes=30_000)
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 2
    assert_same_bits(tmp_path / "ours", original)
    assert_they_load(tmp_path / "ours", theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = tiny.build(tiny.VARIANTS["falcon_40b_bias"]).to(dtype)
    original = tiny.save(theirs, tmp_path / "theirs")
    minillm.save(minillm.load_model(original), tmp_path / "ours")
    assert_same_bits(tmp_path / "ours", original)
    # Read again, because `.to(dtype)` also rounds their rotary frequencies, which loading keeps in fp32.
    assert_they_load(tmp_path / "ours", type(theirs).from_pretrained(original, attn_implementation="sdpa").eval())


def test_generation_settings_survive(tmp_path: Path) -> None:
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    theirs = tiny.build(tiny.Variant("Llama", {**tiny.VARIANTS["llama_one_layer"].fields, **ids}))
    theirs.generation_config.update(eos_token_id=[2, 7], do_sample=True, temperature=0.6, top_p=0.9)
    original = tiny.save(theirs, tmp_path / "theirs")
    minillm.save(minillm.load_model(original), tmp_path / "ours")
    written, expected = (
        transformers.GenerationConfig.from_pretrained(folder).to_dict() for folder in (tmp_path / "ours", original)
    )
    assert written == expected and written["eos_token_id"] == [2, 7]
    config = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    assert (config.bos_token_id, config.pad_token_id) == (1, 0)


@pytest.mark.parametrize("name", ["llama_gqa_8_2", "mistral", "falcon_40b"])
def test_scalar_head(name: str, tmp_path: Path) -> None:
    """A sequence classifier of one label: their `score` on their hidden states, at every position."""
    variant = tiny.VARIANTS[name]
    config = getattr(transformers, f"{variant.family}Config")(**variant.fields, num_labels=1)
    torch.manual_seed(0)
    kind = getattr(transformers, f"{variant.family}ForSequenceClassification")
    theirs = kind._from_config(config, attn_implementation="sdpa").eval()
    original = tiny.save(theirs, tmp_path / "theirs")
    ours, tokens = minillm.load_model(original), tiny.tokens(2, 20)
    with torch.no_grad():
        expected = theirs.score(theirs.base_model(tokens).last_hidden_state).squeeze(-1)
        assert_near(ours(tokens), expected, what="values")
    minillm.save(ours, tmp_path / "ours")
    assert_same_bits(tmp_path / "ours", original)
    assert torch.equal(minillm.load_model(tmp_path / "ours")(tokens), ours(tokens))
    _, report = kind.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report


@pytest.mark.parametrize("name", ["llama_tied", "falcon_7b", "falcon_rw"])
def test_a_body_saved_without_its_head(pair: Pairs, name: str, tmp_path: Path) -> None:
    """`LlamaModel` and `FalconModel` write their keys without prefix; tied, the head is the embedding they hold."""
    _, theirs, ours = pair(name)
    body = tiny.save(theirs.base_model, tmp_path)
    assert not any(key.startswith(("model.", "transformer.", "lm_head")) for key in tensors_of(body))
    tokens = tiny.tokens(1, 12)
    with torch.no_grad():
        assert torch.equal(minillm.load_model(body)(tokens), ours(tokens))


def test_an_untied_body_has_no_head(pair: Pairs, tmp_path: Path) -> None:
    body = tiny.save(pair("llama_mha").theirs.base_model, tmp_path)
    with pytest.raises(CheckpointError, match=r"lacks lm_head\.weight"):
        minillm.load_model(body)


def rewrite(folder: Path, extra: dict[str, torch.Tensor]) -> None:
    save_file(tensors_of(folder) | extra, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "body"), [("llama_tied", "model.embed_tokens"), ("falcon_7b", "transformer.word_embeddings")]
)
@pytest.mark.parametrize("scale", [1.0, 1.5], ids=["equal", "different"])
def test_a_head_beside_a_tied_embedding(pair: Pairs, name: str, body: str, scale: float, tmp_path: Path) -> None:
    """Equal (falcon-7b's own files): one parameter. Different: the file wins over config.json, as in transformers."""
    _, theirs, _ = pair(name)
    folder = tiny.save(theirs, tmp_path)
    rewrite(folder, {"lm_head.weight": tensors_of(folder)[f"{body}.weight"] * scale})
    ours, tokens = minillm.load_model(folder), tiny.tokens(1, 12)
    assert (ours.lm_head is None) == (scale == 1.0)
    again = type(theirs).from_pretrained(folder, attn_implementation="sdpa").eval()
    with torch.no_grad():
        assert_near(ours(tokens), again(tokens).logits)


OLD_BUFFERS = {
    "llama_mha": ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"),
    "falcon_7b": (
        "transformer.h.1.self_attention.maybe_rotary.inv_freq",
        "transformer.h.0.self_attention.rotary_emb.inv_freq",
        "transformer.h.0.self_attention.masked_bias",
    ),
}


@pytest.mark.parametrize("name", OLD_BUFFERS)
def test_buffers_of_old_files_are_dropped_by_name(pair: Pairs, name: str, tmp_path: Path) -> None:
    _, theirs, ours = pair(name)
    folder = tiny.save(theirs, tmp_path)
    rewrite(folder, {key: torch.full((4,), 9.0) for key in OLD_BUFFERS[name]})
    tokens = tiny.tokens(1, 12)
    with torch.no_grad():
        assert torch.equal(minillm.load_model(folder)(tokens), ours(tokens))
    rewrite(folder, {OLD_BUFFERS[name][0] + "s": torch.ones(4)})
    with pytest.raises(CheckpointError, match="inv_freqs, which the config"):
        minillm.load_model(folder)


def test_what_we_write_is_plain(pair: Pairs, tmp_path: Path) -> None:
    """config.json holds nothing but fields transformers knows, and names no version of it."""
    minillm.save(pair("llama_gqa_8_2").ours, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    known = transformers.LlamaConfig().to_dict().keys() | {"torch_dtype", "rope_theta", "rope_scaling"}
    assert written.keys() <= known


def test_weights_of_several_dtypes_load_as_the_config_says(tmp_path: Path) -> None:
    """bf16 matrices beside fp32 norms: transformers makes all of it config.json's dtype, and so do we."""
    theirs = tiny.build(tiny.VARIANTS["llama_gqa_8_2"]).to(torch.bfloat16)
    tiny.save(theirs, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {name: tensor.float() if tensor.ndim == 1 else tensor for name, tensor in tensors.items()},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    ours = minillm.load_model(tmp_path)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.bfloat16}
    again = type(theirs).from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    tokens = tiny.tokens(1, 12)
    with torch.no_grad():
        assert torch.equal(ours(tokens), again(tokens).logits)


def test_a_save_over_another_model_leaves_nothing_of_it(tmp_path: Path) -> None:
    first, second = (minillm.load_model(tiny.save(tiny.build(tiny.VARIANTS[name]), tmp_path / name)) for name in TWO)
    first.generation_defaults, second.generation_defaults = {"eos_token_id": 5}, {}
    minillm.save(first, tmp_path / "out", max_shard_bytes=40_000)
    minillm.save(second, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


def test_a_save_stopped_between_two_renames_leaves_no_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old config.json beside new weights would load, and be another model."""
    first, second = (minillm.load_model(tiny.save(tiny.build(tiny.VARIANTS[name]), tmp_path / name)) for name in TWO)
    minillm.save(first, tmp_path / "out")
    rename = os.replace

    def killed(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
        if Path(target).name == "config.json":
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        minillm.save(second, tmp_path / "out")
    with pytest.raises(minillm.MinillmError, match=r"config\.json: missing"):
        minillm.load_model(tmp_path / "out")
