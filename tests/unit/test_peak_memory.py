"""Loading needs the model and the tensor in hand, no more: the peak of a fresh process, as the kernel counts it.

Peak is VmHWM (what `ru_maxrss` says too) over what the same process had resident with torch and minillm imported and
nothing loaded. Weights are written here tensor by tensor.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minillm.checkpoint.families import family_of
from minillm.checkpoint.shards import save_checkpoint
from minillm.config import DecoderConfig
from minillm.model import Decoder

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

LLAMA = DecoderConfig(
    vocab_size=16_000,
    hidden_size=1024,
    num_layers=6,
    num_heads=16,
    num_kv_heads=4,
    head_size=64,
    ffn_size=2816,
    context=2048,
)
TINY_LLAMA = replace(LLAMA, vocab_size=32_000, hidden_size=2048, num_layers=22, num_heads=32, ffn_size=5632)
FALCON = replace(
    LLAMA, norm="layer", mlp="plain", activation="gelu", block="parallel", parallel_norms=2, family="falcon"
)

MEASURE = """
import re, sys
import torch, minillm

def status(field):
    with open("/proc/self/status") as file:
        return 1024 * int(re.search(field + r":\\s+(\\d+) kB", file.read())[1])

torch.set_num_threads(2)
torch.ones(99, 99, dtype=torch.bfloat16).float().sum()  # what the first operation of all maps
bare = status("VmRSS")
model = minillm.load_model(sys.argv[1], dtype=sys.argv[2])
assert not any(parameter.is_meta for parameter in model.parameters())
print(status("VmHWM") - bare)
"""


def write(config: DecoderConfig, folder: Path) -> Path:
    """A checkpoint of random bf16 weights, of which one tensor at a time is in memory."""
    with torch.device("meta"):
        model = Decoder(config).to(torch.bfloat16)
    parameters = dict(model.named_parameters())
    layout = {
        rule.theirs: rule.join([parameters[name] for name in rule.ours])
        for rule in family_of(config.family, "").weight_map(config).rules
    }

    def produce(key: str) -> torch.Tensor:
        return torch.empty(layout[key].shape, dtype=torch.bfloat16).uniform_(-1, 1)

    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(family_of(config.family, "").config_to_hf(config)))
    save_checkpoint(layout, produce, folder)
    return folder


def numbers(config: DecoderConfig) -> tuple[int, int]:
    """How many the model holds, and how many its largest parameter."""
    with torch.device("meta"):
        counts = [parameter.numel() for parameter in Decoder(config).parameters()]
    return sum(counts), max(counts)


def peak_of_loading(folder: Path, dtype: str) -> int:
    """Bytes over the bare interpreter."""
    done = subprocess.run([sys.executable, "-c", MEASURE, folder, dtype], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_as_stored(tmp_path: Path) -> None:
    """Falcon: its fused q, k, v is split, so that the tensor in hand is there twice."""
    total, _ = numbers(FALCON)
    assert 2 * total < peak_of_loading(write(FALCON, tmp_path), "bfloat16") < 1.25 * 2 * total


def test_converted_on_the_way(tmp_path: Path) -> None:
    """bf16 on disk, fp32 in memory: the model and no more than its largest parameter once again."""
    total, largest = numbers(LLAMA)
    assert 4 * total < peak_of_loading(write(LLAMA, tmp_path), "float32") < 4 * (total + largest)


@pytest.mark.slow
def test_the_shape_of_tiny_llama(tmp_path: Path) -> None:
    """1.1 billion numbers, 2.2 GB on disk and in memory."""
    total, _ = numbers(TINY_LLAMA)
    assert total == 1_100_048_384
    assert peak_of_loading(write(TINY_LLAMA, tmp_path), "bfloat16") < 1.25 * 2 * total
