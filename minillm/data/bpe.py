"""A byte-pair vocabulary made from a text, and that text as ids.

    vocabulary = 256 bytes;   repeat: the most frequent pair of neighbours becomes a new token        GPT-2 paper §2.2

Byte-level: any text can be encoded, and every text comes back unchanged. Neighbours are joined inside words only, words
being GPT-2's: letters, digits, signs or blanks, with at most one blank before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from tokenizers import Tokenizer as Pipeline
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor

from minillm.errors import InputError

#: Stands before every document and is the only special token: to the left of it nothing belongs to the text.
END_OF_TEXT = "<|endoftext|>"


def train_bpe(texts: Iterable[str], vocab_size: int) -> Pipeline:
    """Join pairs until there are vocab_size tokens, bytes and `END_OF_TEXT` included, or no pair occurs twice.

    Raises InputError for a vocab_size that does not even hold the bytes.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise InputError(f"vocab_size is {vocab_size}; the bytes and {END_OF_TEXT} alone are {len(alphabet) + 1}")
    pipeline = Pipeline(models.BPE())
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pipeline.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    pipeline.train_from_iterator(texts, trainer)
    return pipeline


def bytes_per_token(pipeline: Pipeline) -> Tensor:
    """How many bytes of text each id stands for: (V,) int64; a special token stands for none.

    In a byte-level vocabulary each character of a token's spelling is one byte.
    """
    special = {i for i, token in pipeline.get_added_tokens_decoder().items() if token.special}
    spellings = [str(pipeline.id_to_token(i)) for i in range(pipeline.get_vocab_size())]
    return torch.tensor([0 if i in special else len(spelling) for i, spelling in enumerate(spellings)])


def encode(pipeline: Pipeline, texts: Sequence[str]) -> Tensor:
    """`END_OF_TEXT` and the ids of each text, one after the other: (N,) int32.

    A text that spells out a special token gets its characters, not its id: only the joints are real ones.
    """
    pipeline = Pipeline.from_str(pipeline.to_str())
    pipeline.encode_special_tokens = True
    joint = torch.tensor([pipeline.token_to_id(END_OF_TEXT)], dtype=torch.int32)
    encoded = pipeline.encode_batch_fast(list(texts), add_special_tokens=False)
    return torch.cat([part for text in encoded for part in (joint, torch.tensor(text.ids, dtype=torch.int32))])
