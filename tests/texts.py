"""Texts that break tokenizers, and tiny tokenizers trained on them: what the tokenizer tests share."""

from __future__ import annotations

import base64
import io
from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from minillm.data.tiktoken_model import SPLIT

NASTY = [
    *("", " ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", " \n ", "a", " a", "a ", "  a  b  ", "\u00a0", "\u3000x"),
    *(
        "Hello world",
        " Hello world",
        "Hello  world",
        "don't we'll I'M",
        "x=1;y=22;z=333;w=4444",
        "1234567890",
        "3.14e-10",
    ),
    *(
        "def f(x):\n    return x ** 2\n",
        "\tif a:\n\t\tb()\n\n\n",
        "<html><s><b>",
        "foo_bar.baz-qux/42",
        "!!!???...",
        "(((())))",
    ),
    *("café", "cafe\u0301", "naïve Ærøskøbing", "Straße", "Привет, мир", "γειά σου", "שלום", "مرحبا", "नमस्ते", "สวัสดี"),
    *(
        "你好，世界",
        "日本語テキスト",
        "한국어",
        "你好 world 你好",
        "😀",
        "👩‍👩‍👧‍👦",
        "🏳️‍🌈🇪🇸",
        "a😀b😀c",
        "\u200b\ufeff",
        "e\u0323\u0302",
    ),
    *(
        "\ufffd",
        "a\ufffdb",
        "\x00",
        "\x7f\x1b[0m",
        "𝒳𝔘𐍈",
        "\u2581",
        "a\u2581b",
        "<unk>",
        "</s>x",
        "a</s> b",
        "x </s></s>",
    ),
    *(
        "[INST] hi [/INST]",
        "<0x41>",
        "<|not_special|>",
        "é" * 9,
        "ab" * 40,
        "The quick brown fox jumps over the lazy dog.",
    ),
]
CORPUS = [text for text in NASTY if text.strip() and "<" not in text] * 3 + [
    f"{a} {b} {c}." for a in ("the", "The cat", "a dog") for b in ("saw", "was", "has") for c in ("world", "it", "12")
]


def _special(*tokens: str) -> list[AddedToken]:
    return [AddedToken(token, normalized=False, special=True) for token in tokens]


@cache
def _trained(kind: str) -> str:
    pipeline = Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
    first = (
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        if kind == "llama3"
        else [pre_tokenizers.Punctuation("contiguous"), pre_tokenizers.ByteLevel(False), pre_tokenizers.Digits(False)]
    )
    pipeline.pre_tokenizer = pre_tokenizers.Sequence(first)
    pipeline.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    names = ["<|begin|>", "<|end|>", "<|pad|>"] if kind == "llama3" else ["<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=_special(*names), initial_alphabet=alphabet, show_progress=False
    )
    pipeline.train_from_iterator(CORPUS, trainer)
    if kind == "llama3":
        pipeline.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single="<|begin|> $A", pair="<|begin|> $A <|begin|> $B:1", special_tokens=[("<|begin|>", 0)]
                ),
            ]
        )
    return str(pipeline.to_str())


def byte_level(kind: str = "llama3") -> Tokenizer:
    """Byte-level BPE: `llama3` has <|begin|> <|end|> <|pad|>, adds the first; `falcon` has <|endoftext|>, adds none."""
    return Tokenizer.from_str(_trained(kind))


@cache
def sentencepiece_bytes() -> bytes:
    """A Llama-2-like sentencepiece model: BPE, byte fallback, identity normaliser. Needs the sentencepiece library."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text for text in CORPUS if "\x00" not in text]),
        model_writer=model,
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        character_coverage=0.98,
        minloglevel=2,
    )
    return model.getvalue()


def tiktoken_ranks() -> dict[bytes, int]:
    """Ranks as Llama 3 ships them: the 256 bytes, then merged tokens in the order of training."""
    letters = {letter: byte for byte, letter in _letters().items()}
    ranks = {bytes([byte]): byte for byte in range(256)}
    pipeline = byte_level("llama3")
    for token, _ in sorted(pipeline.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1]):
        if len(token) > 1 and all(letter in letters for letter in token):
            ranks.setdefault(bytes(letters[letter] for letter in token), len(ranks))
    return ranks


def tiktoken_file() -> bytes:
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in tiktoken_ranks().items())


def _letters() -> dict[int, str]:
    """Byte -> the letter that byte-level BPE writes for it, asked of the library."""
    level = pre_tokenizers.ByteLevel(False, use_regex=False)
    points = [*range(0x800), *range(0x800, 0xD800, 0x400), *range(0xE000, 0x110000, 0x1000)]
    return {
        byte: letter
        for point in points
        for byte, letter in zip(chr(point).encode(), level.pre_tokenize_str(chr(point))[0][0], strict=True)
    }
