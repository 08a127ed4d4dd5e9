"""The inference benchmark's own sums on made-up figures, and the files it writes for its peers."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench"
SIZES = {"all": 1_100_000_000, "linears": 900_000_000, "head": 100_000_000}
LIMITS = {"read_gbs": 50.0, "fp32_gops": 200.0, "bf16_gops": 450.0, "int8_gops": 900.0}


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The scripts import each other by their bare names, as they do when they are run; nothing of that stays."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCH))
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(BENCH)):
            del sys.modules[name]


def peers() -> dict[str, dict[str, Any]]:
    """Two of 8 bits, one of 16 that has nobody to be compared with, one that does not know its agreement."""
    eight: dict[str, Any] = {"bits": 8, "versions": {}}
    return {
        "minillm-int8": eight | {"r": 0.999, "load": 2.0, "peak": 1.5, "prefill": 300.0, "decode": 40.0, "batch": 90.0},
        "ctranslate2-int8": eight | {"r": None, "load": 1.0, "peak": 3.0, "prefill": 200.0, "decode": 10.0},
        "transformers-bf16": {"bits": 16, "versions": {}, "r": 1.0, "load": 1.0, "peak": 3.0, "prefill": 150.0},
    }


def result() -> dict[str, Any]:
    import report

    return {
        "sizes": SIZES,
        "machine": {"cpu": "made up", "threads": 2},
        "limits": LIMITS,
        "bounds": report.bounds(SIZES, LIMITS),
        "peers": peers(),
        "ratios": report.ratios(peers()),
        "rounds": [{}, {}],
    }


def test_ratios_are_above_one_where_ours_is_better() -> None:
    import report

    expected = {"ctranslate2-int8": {"load": 0.5, "peak": 2.0, "prefill": 1.5, "decode": 4.0}}
    assert report.ratios(peers()) == expected


def test_bounds() -> None:
    """A step reads 10^9 weights, a token of a prompt costs 1.8 10^9 operations."""
    import report

    found = report.bounds(SIZES, LIMITS)
    assert {bits: bound["decode"] for bits, bound in found.items()} == {32: 12.5, 16: 25.0, 8: 50.0, 4: 100.0}
    assert found[8]["prefill"] == found[4]["prefill"] == 500.0
    assert found[16]["prefill"] == 250.0


def test_the_table_ends_with_the_ratios() -> None:
    import report

    console = Console(width=200, file=io.StringIO())
    with console.capture() as shown:
        console.print(report.table(result()))
    lines = shown.get().splitlines()
    row = next(line for line in lines if "ctranslate2" in line)
    assert row.replace("│", "").split() == "ctranslate2-int8 1.00 3.00 200 10.0 0.50 2.00 1.50 4.00".split()
    assert next(line for line in lines if "limit, 8" in line).replace("│", "").split()[-2:] == ["500", "50.0"]


def test_the_chart(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    import report

    report.draw(result(), tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_only_takes_parts_of_names_and_figures() -> None:
    import inference

    every = dict.fromkeys(["minillm-int8", "llama.cpp-q8_0", "minillm-bf16"])
    assert list(inference.chosen(every, ("decode",))) == list(every)
    assert list(inference.chosen(every, ("decode", "int8"))) == ["minillm-int8"]
    with pytest.raises(SystemExit, match=r"--only gptq: .*minillm-int8"):
        inference.chosen(every, ("gptq",))


def test_what_fails_is_told_in_its_last_words() -> None:
    import inference

    with pytest.raises(RuntimeError, match=r"^peers\.py: TypeError: main\(\)"):
        inference.called(sys.executable, "peers.py")


def shape(family: str) -> dict[str, Any]:
    sizes = {"layers": 2, "width": 64, "heads": 4, "kv_heads": 2, "ffn": 96, "vocab": 128}
    return sizes | {"family": family, "outliers": 3} | ({"kv_heads": 1, "ffn": 256} if family == "falcon" else {})


@pytest.mark.parametrize("family", ["llama", "falcon"])
def test_random_checkpoint_is_read_back_and_counted(family: str, tmp_path: Path) -> None:
    import checkpoint
    import inference

    import minillm

    checkpoint.write(tmp_path, shape(family))
    model = minillm.load_model(tmp_path)
    assert model.config.family == family
    assert model.embed.weight.dtype == torch.bfloat16
    counted = inference.sizes(tmp_path)
    linears = sum(x.numel() for name, x in model.blocks.named_parameters() if x.ndim == 2)
    assert counted == {"all": sum(x.numel() for x in model.parameters()), "linears": linears, "head": 128 * 64}


@pytest.mark.oracle
@pytest.mark.parametrize("family", ["llama", "falcon"])
def test_random_checkpoint_means_the_same_to_transformers(family: str, tmp_path: Path) -> None:
    import checkpoint
    import transformers

    import minillm

    checkpoint.write(tmp_path, shape(family))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        ours, expected = minillm.load_model(tmp_path, dtype="float32")(tokens), theirs(tokens).logits
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_pairs_that_turn_together_become_neighbours() -> None:
    import convert

    rows = torch.arange(12)[:, None]  # two heads of six
    assert convert.interleaved(rows, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


@pytest.mark.parametrize("family", ["llama", "falcon"])
def test_gguf_holds_the_checkpoint(family: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    import checkpoint
    import convert
    from safetensors.torch import load_file

    checkpoint.write(tmp_path, shape(family))
    convert.main("bf16.gguf", str(tmp_path), str(tmp_path))
    reader = gguf.GGUFReader(tmp_path / "bf16.gguf")
    written = {tensor.name: tensor for tensor in reader.tensors}
    weights = load_file(tmp_path / "model.safetensors")
    assert len(written) == len(weights)
    assert reader.get_field(f"{family}.attention.head_count_kv").contents() == shape(family)["kv_heads"]
    key = "model.layers.1.self_attn.q_proj" if family == "llama" else "transformer.h.1.self_attention.query_key_value"
    expected = weights[f"{key}.weight"]
    name = "blk.1.attn_q.weight" if family == "llama" else "blk.1.attn_qkv.weight"
    if family == "llama":
        expected = convert.interleaved(expected, 4)
    stored = torch.from_numpy(np.array(written[name].data)).view(torch.bfloat16).reshape(expected.shape)
    assert torch.equal(stored, expected)
    norm = torch.from_numpy(np.array(written["output_norm.weight"].data))
    assert torch.equal(norm, torch.ones(64))


def test_gguf_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    import convert

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(ValueError, match="mamba"):
        convert.write_gguf(tmp_path, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def test_limits_are_measured() -> None:
    import machine

    found = machine.limits(2**20, 64)
    assert set(found) == set(LIMITS) and all(rate > 0 for rate in found.values())
    assert machine.description()["cores"] >= 1


@pytest.mark.parametrize(("number", "text"), [(None, ""), (0.126, "0.13"), (12.34, "12.3"), (123.4, "123")])
def test_numbers(number: float | None, text: str) -> None:
    import report

    assert report._number(number) == text
