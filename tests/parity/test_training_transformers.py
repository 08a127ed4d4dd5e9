"""Ten steps of training, ours and transformers' with torch's AdamW, from the same weights on the same batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minillm.checkpoint.load import load_model
from minillm.checkpoint.save import save
from minillm.config import DecoderConfig
from minillm.model import Decoder
from minillm.model.init import initialise
from minillm.training.loop import accumulate
from minillm.training.optim import adamw, set_learning_rate, warmup_cosine
from tests.error import assert_near

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle

STEPS, PEAK, DECAY, CLIP = 10, 1e-2, 0.1, 1.0
CONFIG = DecoderConfig(
    vocab_size=61, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_size=8, ffn_size=64, context=32
)


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(61, (4, 16), generator=generator) for _ in range(STEPS)]


def ours(model: Decoder) -> list[float]:
    model.train()
    optimizer, losses = adamw(model, learning_rate=PEAK, weight_decay=DECAY), []
    for step, rows in enumerate(batches()):
        losses.append(accumulate(model, rows.split(2)))
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        set_learning_rate(optimizer, PEAK * warmup_cosine((step + 0.5) / STEPS, warmup=0.3))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def theirs(model: torch.nn.Module) -> list[float]:
    """Written with nothing of ours but the schedule's values: their loss, torch's AdamW not fused, groups by name."""
    spared = ("norm.weight", "embed_tokens.weight")
    named = list(model.named_parameters())
    groups = [
        {"params": [p for name, p in named if not name.endswith(spared)], "weight_decay": DECAY},
        {"params": [p for name, p in named if name.endswith(spared)], "weight_decay": 0.0},
    ]
    optimizer, losses = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.95), eps=1e-8, fused=False, foreach=False), []
    for step, rows in enumerate(batches()):
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = PEAK * warmup_cosine((step + 0.5) / STEPS, warmup=0.3)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_ten_losses_equal(tmp_path: Path) -> None:
    model = Decoder(CONFIG)
    initialise(model, seed=0, std=0.1)
    save(model, tmp_path)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).train()
    found, expected = ours(load_model(tmp_path)), theirs(reference)
    assert expected[0] - expected[-1] > 0.01, "nothing was learnt, so nothing was tested"
    # fp32 losses of about 4 come with a rounding of 2e-7; ten steps of Adam, which divides by small roots, amplify it
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 1e-5


def test_ten_steps_lead_to_the_same_model(tmp_path: Path) -> None:
    model = Decoder(CONFIG)
    initialise(model, seed=0, std=0.1)
    save(model, tmp_path)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).train()
    ours(model)
    theirs(reference)
    rows = batches()[0]
    with torch.inference_mode():
        # a hundred times the bound of an untrained model: each step's rounding moves the weights of the next
        assert_near(model(rows), reference(input_ids=rows).logits, bound=1e-3)
