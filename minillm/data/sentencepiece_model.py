"""A sentencepiece `tokenizer.model` (Llama 1 and 2, Mistral, TinyLlama), rebuilt as a `tokenizers` pipeline.

A sentencepiece BPE model is a list of pieces, each with a score, in a protobuf file. Encoding starts from single
characters and repeatedly joins the neighbouring pair whose *joined* piece has the highest score. That is byte-pair
encoding whose merge list holds every split of every piece into two pieces, highest score first, so the same ids come
out of the `tokenizers` library and minillm needs neither sentencepiece nor protobuf at run time.

    ModelProto      1: SentencePiece*   2: TrainerSpec   3: NormalizerSpec
    SentencePiece   1: piece (string)   2: score (float)
                    3: type (1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte)
    TrainerSpec     3: model_type (2 = BPE)  40/41/42/43: unk, bos, eos, pad id
    NormalizerSpec  2: precompiled_charsmap  3: add_dummy_prefix  4: remove_extra_whitespaces

Source: sentencepiece_model.proto of google/sentencepiece; the wire format of protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from minillm.errors import TokenizerError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BPE = 2
SPACE = "\u2581"  # sentencepiece writes a space as LOWER ONE EIGHTH BLOCK


@dataclass
class SentencePieceModel:
    """What minillm needs of the protobuf; the defaults are those of the .proto file."""

    pieces: list[tuple[str, float, int]] = field(default_factory=list)  # (piece, score, type), position = id
    model_type: int = 1
    ids: dict[str, int] = field(default_factory=lambda: {"unk": 0, "bos": 1, "eos": 2, "pad": -1})
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True

    def named(self) -> dict[str, str]:
        """`bos_token` and the like, for the ids that the model defines (-1 means it has none)."""
        return {f"{name}_token": self.pieces[i][0] for name, i in self.ids.items() if 0 <= i < len(self.pieces)}


def read(path: Path) -> SentencePieceModel:
    """Parse the file; `TokenizerError` where it is broken or not a Llama-style BPE model."""
    try:
        model = _parse(path.read_bytes())
    except (IndexError, ValueError, struct.error) as error:
        raise TokenizerError(f"{path}: not a sentencepiece model, or truncated ({error}): download it again") from error
    if not model.pieces:
        raise TokenizerError(f"{path}: a sentencepiece model without pieces: download it again")
    wrong = (
        f"model type {model.model_type}, not BPE" * (model.model_type != BPE)
        or "a normaliser with rules" * bool(model.charsmap)
        or "remove_extra_whitespaces" * model.remove_extra_whitespaces
    )
    if wrong:
        raise TokenizerError(
            f"{path}: {wrong}; minillm reads Llama-style sentencepiece models only: give a tokenizer.json beside it"
        )
    return model


def to_tokenizers(model: SentencePieceModel, *, legacy: bool = True) -> Tokenizer:
    """The same tokenizer as a `tokenizers` pipeline.

    legacy=True: every stretch of text between special tokens gets sentencepiece's dummy space in front, as the
    sentencepiece library does and as the `tokenizer.json` that Llama 2 was published with does.
    legacy=False: only text at the very start gets it, and only if it does not start with a space (transformers 5.23).
    """
    vocab = {piece: i for i, (piece, _, _) in enumerate(model.pieces)}
    unknown = model.named().get("unk_token")
    backend = Tokenizer(
        models.BPE(vocab, _merges(model), unk_token=unknown, fuse_unk=True, byte_fallback=_has_all_bytes(vocab))
    )
    if model.add_dummy_prefix and legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    else:
        scheme = "first" if model.add_dummy_prefix else "never"
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=False)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * model.add_dummy_prefix)
    backend.add_special_tokens(
        [AddedToken(p, normalized=False, special=True) for p, _, t in model.pieces if t in (UNKNOWN, CONTROL)]
    )
    backend.add_tokens([AddedToken(p, normalized=False) for p, _, t in model.pieces if t == USER_DEFINED])
    return backend


def _merges(model: SentencePieceModel) -> list[tuple[str, str]]:
    """Every split of every normal piece into two normal pieces, best score first, then the shorter left half."""
    scores = {piece: score for piece, score, kind in model.pieces if kind == NORMAL}
    splits = [
        (-score, cut, piece)
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return [(piece[:cut], piece[cut:]) for _, cut, piece in sorted(splits)]


def _has_all_bytes(vocab: dict[str, int]) -> bool:
    return all(f"<0x{byte:02X}>" in vocab for byte in range(256))


def _parse(data: bytes) -> SentencePieceModel:
    model = SentencePieceModel()
    for number, value in _fields(data):
        if number == 1:
            entry = {1: b"", 2: struct.pack("<f", 0.0), 3: NORMAL, **dict(_fields(_bytes(value)))}
            score = struct.unpack("<f", _bytes(entry[2]))[0]
            model.pieces.append((_bytes(entry[1]).decode(), score, _int(entry[3])))
        elif number == 2:
            spec = dict(_fields(_bytes(value)))
            model.model_type = _int(spec.get(3, 1))
            for name, key in (("unk", 40), ("bos", 41), ("eos", 42), ("pad", 43)):
                model.ids[name] = _int(spec.get(key, model.ids[name]))
        elif number == 3:
            spec = dict(_fields(_bytes(value)))
            model.charsmap = _bytes(spec.get(2, b""))
            model.add_dummy_prefix = bool(spec.get(3, True))
            model.remove_extra_whitespaces = bool(spec.get(4, True))
    return model


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of one protobuf message: an int for a varint, bytes for every other wire type."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if at + size > len(data):
            raise ValueError(f"{size} bytes promised at byte {at}, {len(data) - at} there")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError(f"varint too long at byte {at}")


def _int(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise ValueError("bytes where a number was needed")
    return value - (1 << 64) if value >> 63 else value  # int32 -1 is written as ten bytes


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where bytes were needed")
    return value
