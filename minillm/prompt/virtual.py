"""What is trained: a table of P rows, and for some kinds an encoder that makes the virtual tokens of it.

    prompt           values = table                                               (P, D)
    p-tuning, mlp    values = W3 relu(W2 relu(W1 table))                           D -> width -> width -> D
    p-tuning, lstm   values = W2 relu(W1 bilstm(table))                            D -> 2 width -> 2 width -> D
    prefix           values = table                                               (P, 2 L N E)
    prefix, mlp      values = W2 tanh(W1 table)                                    N E -> width -> 2 L N E

Every W has a bias. The encoder only helps training (2101.00190 §4.3: a prefix trained directly is unstable); files hold
the values. Sources: peft/tuners/{prompt_tuning,p_tuning,prefix_tuning}/model.py (0.21).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minillm.config import DecoderConfig
from minillm.data.tokenizer import Tokenizer
from minillm.errors import InputError
from minillm.model import Decoder
from minillm.prompt.cache import cached_heads
from minillm.prompt.config import PromptConfig


class Virtual(nn.Module):
    """() -> values (P, W) of the virtual tokens, W = D or 2 L N E."""

    def __init__(self, table: Tensor, encoder: nn.Module | None = None) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.encoder = encoder

    def forward(self) -> Tensor:
        return self.table if self.encoder is None else self.encoder(self.table)

    @torch.no_grad()
    def finished(self) -> Tensor:
        """The values without dropout, for a file. peft writes those of the moment, dropout and all, while training."""
        was_training = self.training
        values: Tensor = self.eval()()
        self.train(was_training)
        return values.detach()


class LstmEncoder(nn.Module):
    """table (P, D) -> (P, D): each virtual token knows those before and after it."""

    def __init__(self, inputs: int, width: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.lstm = nn.LSTM(inputs, width, layers, dropout=dropout, bidirectional=True)
        self.head = nn.Sequential(nn.Linear(2 * width, 2 * width), nn.ReLU(), nn.Linear(2 * width, inputs))

    def forward(self, table: Tensor) -> Tensor:
        states, _ = self.lstm(table)  # (P, 2 width)
        values: Tensor = self.head(states)
        return values


def sizes(config: DecoderConfig, kind: str, heads: int | None = None) -> tuple[int, int]:
    """Numbers of one token in peft's `token_dim`, and in the values: D and D, or N E and 2 L N E with N heads."""
    if kind != "prefix":
        return config.hidden_size, config.hidden_size
    size = (heads or cached_heads(config)) * config.head_size
    return size, 2 * config.num_layers * size


def fresh(model: Decoder, config: PromptConfig, tokenizer: Tokenizer | None) -> Virtual:
    """A prompt before its first step, fp32; the numbers that peft draws after the same `torch.manual_seed`."""
    inner, outer = sizes(model.config, config.kind)
    table = torch.empty(config.tokens, outer if config.encoder is None else inner).normal_()
    encoder = _encoder(config, inner, outer)
    if config.init == "zero":
        last = table if encoder is None else encoder[-1]  # type: ignore[index]  # an MLP
        for each in [last] if isinstance(last, Tensor) else [last.weight, last.bias]:
            nn.init.zeros_(each)
    if config.init in ("vocab", "text"):
        table = _embedded(model, _chosen_tokens(model, config, tokenizer))
    return Virtual(table, encoder).to(model.embed.weight.device)


def _encoder(config: PromptConfig, inputs: int, outputs: int) -> nn.Module | None:
    width = config.width or inputs
    if config.encoder is None:
        return None
    if config.encoder == "lstm":
        return LstmEncoder(inputs, width, config.layers, config.dropout)
    if config.kind == "prefix":
        return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, outputs))
    first, second = nn.Linear(inputs, width), nn.Linear(width, width)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(width, outputs))


def _chosen_tokens(model: Decoder, config: PromptConfig, tokenizer: Tokenizer | None) -> Tensor:
    """Whose embeddings a prompt starts from: (P,) int64. A text is cut, or repeated from its beginning."""
    if config.init == "vocab":
        return torch.randint(0, model.config.vocab_size, (config.tokens,))
    if tokenizer is None:
        raise InputError("init is 'text' and there is no tokenizer; pass the model's")
    ids = tokenizer.encode(config.text)
    if not ids or max(ids) >= model.config.vocab_size:
        raise InputError(f"text {config.text!r:.40} has no tokens of this model; give another text or its tokenizer")
    return torch.tensor([ids[place % len(ids)] for place in range(config.tokens)])


@torch.no_grad()
def _embedded(model: Decoder, tokens: Tensor) -> Tensor:
    rows: Tensor = model.embed(tokens.to(model.embed.weight.device))
    return rows.float().clone()
