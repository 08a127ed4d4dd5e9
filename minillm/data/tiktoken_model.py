"""Llama 3's `tokenizer.model`: tiktoken ranks, rebuilt as a `tokenizers` pipeline.

The file is text, one token a line: the token's bytes in base64, a space, its rank. The rank is both the token's id and
its priority: byte-pair encoding joins the neighbouring pair whose *joined* token has the lowest rank. That is a merge
list of every split of every token into two tokens, lowest rank first. The file has no special tokens: Llama 3 puts 256
of them after the last rank, and splits the text with the regular expression below before any merge.

Source: the file format of openai/tiktoken; names and regular expression of meta-llama/llama-models (Llama 3.1).
Llama 3.0 used the same ids; some that 3.1 names were still `<|reserved_special_token_N|>` there, and a
`tokenizer_config.json` beside the file says so.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from minillm.errors import TokenizerError

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NAMED = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(3, 256 - 8)),
)
_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\s*")


def is_ranks(head: bytes) -> bool:
    """Whether the first bytes of a file are tiktoken ranks.

    >>> is_ranks(b"IQ== 0\\nIg== 1\\n"), is_ranks(b"\\n\\x0e\\n\\x05<unk>")
    (True, False)
    """
    return _LINE.fullmatch(head.split(b"\n", 1)[0]) is not None


def read(path: Path) -> dict[bytes, int]:
    """Token bytes -> rank; `TokenizerError` names the broken line."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise TokenizerError(f"{path}, line {number}: not 'base64 rank' ({error}): download it again") from error
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing or sorted(ranks.values()) != list(range(len(ranks))):
        raise TokenizerError(f"{path}: ranks or single bytes are missing: truncated? download it again")
    return ranks


def to_tokenizers(ranks: Mapping[bytes, int], *, names: Mapping[int, str] | None = None) -> Tokenizer:
    """The same tokenizer as a `tokenizers` pipeline; `names` (id -> token) renames special tokens."""
    letters = _byte_letters()

    def written(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    splits = sorted(
        (rank, ranks[token[:cut]], cut, token)
        for token, rank in ranks.items()
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    )
    merges = [(written(token[:cut]), written(token[cut:])) for _, _, cut, token in splits]
    vocab = {written(token): rank for token, rank in ranks.items()}
    # tiktoken takes a whole chunk that is a token as that token, before any merge
    backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    special = [(names or {}).get(len(ranks) + i, name) for i, name in enumerate(SPECIAL_TOKENS)]
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    return backend


def _byte_letters() -> list[str]:
    """The printable character by which byte-level BPE writes each byte (GPT-2's table).

    Bytes that print stand for themselves; the others take the code points from 256 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
