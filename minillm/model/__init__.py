"""The decoder transformer, one idea a file.

Shape letters, used in every comment and docstring of the project:

    B  batch rows           T  query tokens (this call)     S  tokens seen so far, cached ones included
    D  model width          H  query heads                  G  key/value heads          E  head size
    F  feed-forward width   V  vocabulary                   R  LoRA rank                M, N, K  matrix sizes in kernels

Reading order: norms, rope, alibi, attention, mlp, block, cache, heads, decoder.

`import minillm.model` imports torch and nothing that quantises, loads or trains.
"""

from minillm.model.cache import KVCache
from minillm.model.decoder import Decoder

__all__ = ["Decoder", "KVCache"]
