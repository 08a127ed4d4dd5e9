"""A tiny checkpoint folder of our own making, tokenizer and chat template included: for tests that need no oracle."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer as Pipeline
from tokenizers import models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel

import minillm
from tests import decoders

CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"
SPECIAL = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def tokenizer(chat_template: str | None = CHAT) -> minillm.Tokenizer:
    """Byte-level BPE of 300 tokens; `<|end|>` is id 0 and ends a text."""
    pipeline = Pipeline(models.BPE())
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pipeline.decoder = ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pipeline.train_from_iterator(["def main(): return the other thing\n" * 20], trainer)
    return minillm.Tokenizer.from_tokenizers(pipeline, eos="<|end|>", chat_template=chat_template)


def write(folder: Path, *, chat_template: str | None = CHAT, eos: int | None = 0, **changes: object) -> Path:
    """A saved random model and its tokenizer."""
    torch.manual_seed(0)
    model = minillm.Decoder(decoders.config(**{"vocab_size": 300, "context": 128, **changes}))
    model.generation_defaults = {} if eos is None else {"eos_token_id": eos}
    minillm.save(model, folder, tokenizer=tokenizer(chat_template))
    return folder
