"""Meta's format: a checkpoint written here out of transformers' model, in 1, 2 and 4 slices, gives the same bits.

The way from Hugging Face's rows to Meta's is written a second time below, index by index, so that the loader's own
reshapes are not tested against themselves.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import minillm
from minillm.checkpoint import meta
from minillm.errors import CheckpointError, ConfigError, MinillmError
from tests import tiny

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle

HEADS, GROUPS, SIZE, LAYERS = 8, 4, 8, 2
VARIANT = tiny.VARIANTS["llama_gqa_8_4"]
PARAMS = {"dim": 64, "n_heads": HEADS, "n_kv_heads": GROUPS, "n_layers": LAYERS, "norm_eps": 1e-6, "vocab_size": -1}
PARAMS |= {"multiple_of": 32, "rope_theta": 10_000.0}
LLAMA_2, LLAMA_3 = 1, 0  # the dimension along which tok_embeddings is sliced


def to_metas_rows(weight: Tensor, heads: int) -> Tensor:
    """Row i of a head and row i + E/2 become neighbours, 2i and 2i + 1."""
    order = [head * SIZE + i + half for head in range(heads) for i in range(SIZE // 2) for half in (0, SIZE // 2)]
    return weight[order]


def metas_tensors(theirs: Any, key_heads: int = GROUPS) -> dict[str, tuple[Tensor, int | None]]:
    """Meta's name -> the whole tensor, and the dimension along which ranks slice it (None: each holds all)."""
    body = theirs.model
    tensors: dict[str, tuple[Tensor, int | None]] = {
        "norm.weight": (body.norm.weight, None),
        "output.weight": (theirs.lm_head.weight, 0),
        "rope.freqs": (torch.ones(SIZE // 2), None),
    }
    for n, layer in enumerate(body.layers):
        attention, mlp = layer.self_attn, layer.mlp
        tensors |= {
            f"layers.{n}.attention_norm.weight": (layer.input_layernorm.weight, None),
            f"layers.{n}.ffn_norm.weight": (layer.post_attention_layernorm.weight, None),
            f"layers.{n}.attention.wq.weight": (to_metas_rows(attention.q_proj.weight, HEADS), 0),
            f"layers.{n}.attention.wk.weight": (to_metas_rows(attention.k_proj.weight, key_heads), 0),
            f"layers.{n}.attention.wv.weight": (attention.v_proj.weight, 0),
            f"layers.{n}.attention.wo.weight": (attention.o_proj.weight, 1),
            f"layers.{n}.feed_forward.w1.weight": (mlp.gate_proj.weight, 0),
            f"layers.{n}.feed_forward.w3.weight": (mlp.up_proj.weight, 0),
            f"layers.{n}.feed_forward.w2.weight": (mlp.down_proj.weight, 1),
        }
    return tensors


def write(folder: Path, theirs: Any, ranks: int, embedding_dim: int, **params: Any) -> Path:
    """params.json and consolidated.NN.pth."""
    tensors = metas_tensors(theirs) | {"tok_embeddings.weight": (theirs.model.embed_tokens.weight, embedding_dim)}
    folder.mkdir(exist_ok=True)
    for rank in range(ranks):
        sliced = {
            name: (tensor if dim is None else tensor.chunk(ranks, dim)[rank]).detach().clone()
            for name, (tensor, dim) in tensors.items()
        }
        torch.save(sliced, folder / f"consolidated.{rank:02d}.pth")
    (folder / "params.json").write_text(json.dumps(PARAMS | params))
    return folder


@pytest.fixture(scope="module")
def theirs() -> Any:
    """transformers' model; a vocabulary of 132, which 4 ranks share evenly."""
    return tiny.build(tiny.Variant("Llama", {**VARIANT.fields, "vocab_size": 132}))


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        found = model(tokens)
    return found if isinstance(found, Tensor) else found.logits


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("embedding_dim", [LLAMA_2, LLAMA_3], ids=["llama 2", "llama 3"])
def test_the_same_bits_as_its_twin(theirs: Any, tmp_path: Path, ranks: int, embedding_dim: int) -> None:
    """GQA 8/4: with k's rows permuted as q's, these would be another model's logits (next test)."""
    folder = write(tmp_path / "meta", theirs, ranks, embedding_dim)
    ours = minillm.load_model(folder, allow_pickle=True)
    twin = minillm.load_model(tiny.save(theirs, tmp_path / "hf"))
    for (name, found), (_, expected) in zip(ours.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.equal(found, expected), name
    tokens = tiny.tokens(2, 50)
    assert torch.equal(logits(ours, tokens), logits(theirs, tokens))


def test_k_permuted_with_the_heads_of_q_is_seen(theirs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The classic fault: no error, fluent for some tokens, then nonsense."""
    folder = write(tmp_path / "meta", theirs, 2, LLAMA_2)
    right = meta.to_half_split
    monkeypatch.setattr(meta, "to_half_split", lambda weight, *, heads: right(weight, heads=HEADS))
    ours, tokens = minillm.load_model(folder, allow_pickle=True), tiny.tokens(2, 50)
    assert not torch.allclose(logits(ours, tokens), logits(theirs, tokens), atol=0.01)


def test_saved_as_a_hugging_face_folder(theirs: Any, tmp_path: Path) -> None:
    """Meta's format in, Hugging Face's out: transformers reads the same model."""
    minillm.save(minillm.load_model(write(tmp_path / "meta", theirs, 2, LLAMA_3), allow_pickle=True), tmp_path / "hf")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="sdpa").eval()
    tokens = tiny.tokens(2, 50)
    assert torch.equal(logits(again, tokens), logits(theirs, tokens))


def test_a_missing_output_is_a_tied_one(theirs: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "meta", theirs, 1, LLAMA_3)
    tensors = torch.load(folder / "consolidated.00.pth", weights_only=True)
    del tensors["output.weight"]
    torch.save(tensors, folder / "consolidated.00.pth")
    assert minillm.load_model(folder, allow_pickle=True).config.tied_embeddings


@pytest.mark.parametrize(
    ("params", "context", "theta", "scaled"),
    [
        ({"norm_eps": 1e-6, "rope_theta": None}, 2048, 10_000.0, False),  # Llama 1
        ({"norm_eps": 1e-5, "rope_theta": None, "ffn_dim_multiplier": 1.3}, 4096, 10_000.0, False),  # Llama 2
        ({"norm_eps": 1e-5, "rope_theta": 1_000_000}, 16_384, 1e6, False),  # Code Llama
        ({"norm_eps": 1e-5, "rope_theta": 500_000.0}, 8192, 5e5, False),  # Llama 3
        ({"norm_eps": 1e-5, "rope_theta": 500_000.0, "use_scaled_rope": True}, 131_072, 5e5, True),  # Llama 3.1
    ],
)
def test_contexts(
    theirs: Any, tmp_path: Path, params: dict[str, Any], context: int, theta: float, scaled: bool
) -> None:
    folder = write(tmp_path / "meta", theirs, 1, LLAMA_3, **params)
    config = minillm.load_model(folder, allow_pickle=True).config
    assert (config.context, config.rope_theta, config.rope_scaling is not None) == (context, theta, scaled)


def test_params_nested_under_model(theirs: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "meta", theirs, 1, LLAMA_3)
    (folder / "params.json").write_text(json.dumps({"model": PARAMS}))
    assert minillm.load_model(folder, allow_pickle=True).config.num_kv_heads == GROUPS


def refusal(folder: Path, kind: type[MinillmError] = CheckpointError, allow_pickle: bool = True) -> str:
    with pytest.raises(kind) as caught:
        minillm.load_model(folder, allow_pickle=allow_pickle)
    text = str(caught.value)
    assert str(folder) in text and "\n" not in text
    return text.replace(str(folder), "FOLDER")


def test_pickles_are_read_only_where_asked_for(theirs: Any, tmp_path: Path) -> None:
    assert "pass allow_pickle=True" in refusal(write(tmp_path / "meta", theirs, 2, LLAMA_2), allow_pickle=False)


def test_a_missing_rank(theirs: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "meta", theirs, 4, LLAMA_3)
    (folder / "consolidated.02.pth").rename(tmp_path / "2")
    assert "without gaps, found consolidated.00.pth, consolidated.01.pth, consolidated.03.pth" in refusal(folder)
    (folder / "consolidated.03.pth").unlink()
    assert "FOLDER: its .pth files hold 32 of the 64 columns of layers.0.attention.wo.weight; " in refusal(folder)
    for path in folder.glob("*.pth"):
        path.unlink()
    assert "found none" in refusal(folder)


def test_ranks_of_different_checkpoints(theirs: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "meta", theirs, 2, LLAMA_3)
    torch.save({"norm.weight": torch.ones(64)}, folder / "consolidated.01.pth")
    assert "FOLDER/consolidated.01.pth: layers.0.attention.wk.weight is in some ranks only" in refusal(folder)


def test_files_that_are_no_llama(theirs: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "meta", theirs, 1, LLAMA_3)
    torch.save({"weight": torch.ones(3)}, folder / "consolidated.00.pth")
    assert "FOLDER: tensor tok_embeddings.weight is missing; " in refusal(folder)
    torch.save({"tok_embeddings.weight": torch.ones(3)}, folder / "consolidated.00.pth")
    assert "FOLDER/consolidated.00.pth: tensor tok_embeddings.weight is no matrix; " in refusal(folder)
    (folder / "consolidated.00.pth").write_bytes(b"not a pickle")
    assert "FOLDER/consolidated.00.pth: torch.load(weights_only=True) refuses it" in refusal(folder)


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        ("{", CheckpointError, "not valid JSON"),
        ("[1]", CheckpointError, "holds a list, not a JSON object"),
        ('{"model": 3}', CheckpointError, "field model is no JSON object"),
        (json.dumps({**PARAMS, "dim": None}), ConfigError, "field dim is missing"),
        (json.dumps({**PARAMS, "n_heads": "8"}), ConfigError, "field n_heads is '8'"),
        (json.dumps({**PARAMS, "n_heads": 7}), ConfigError, "dim 64 is no multiple of n_heads 7"),
        (json.dumps({**PARAMS, "n_kv_heads": 3}), ConfigError, "8 query heads cannot share 3"),
        (json.dumps({**PARAMS, "norm_eps": float("nan")}), ConfigError, "field norm_eps is nan"),
        (json.dumps({**PARAMS, "moe": {"num_experts": 8}}), ConfigError, "field moe = {'num_experts': 8} is unknown"),
    ],
)
def test_bad_params(theirs: Any, tmp_path: Path, content: str, kind: type[MinillmError], message: str) -> None:
    folder = write(tmp_path / "meta", theirs, 1, LLAMA_3)
    (folder / "params.json").write_text(content)
    assert f"FOLDER/params.json: {message}" in refusal(folder, kind)


def test_params_of_another_model(theirs: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "meta", theirs, 1, LLAMA_3, n_layers=3)
    assert "FOLDER: the checkpoint lacks layers.2.attention_norm.weight, " in refusal(folder)
    folder = write(tmp_path / "meta", theirs, 1, LLAMA_3, n_kv_heads=2)
    assert (
        "FOLDER: tensor layers.0.attention.wk.weight has shape (32, 64), but the config asks for (16, 64)"
        in refusal(folder)
    )
