"""minillm: the modern LLM stack, by hand and readable.

model, tokenizer = minillm.load("tiiuae/falcon-7b", dtype="bfloat16")            # id or folder
for piece in minillm.stream(model, tokenizer, "Write a poem about Valencia.", top_k=10, seed=0):
    print(piece, end="", flush=True)
logits = model(tokens)                                                           # (B, T) -> (B, T, V)
minillm.save(model, "out/", tokenizer=tokenizer)                                 # a folder transformers loads
minillm.lora.add(model, rank=16, alpha=32, targets=["q_proj", "v_proj"])         # adapters, peft's files both ways
prompted = minillm.prompt.add(model, kind="prefix", tokens=20)                   # virtual tokens, likewise
with minillm.verify.trace(model) as recorded:                                    # name -> tensor, every operation
    model(tokens)
"""

from minillm import lora, prompt, verify
from minillm.checkpoint.load import load, load_model
from minillm.checkpoint.save import save
from minillm.config import DecoderConfig
from minillm.data.tokenizer import Tokenizer
from minillm.errors import MinillmError
from minillm.generation.generate import Completion, generate, stream
from minillm.generation.sampling import Sampling
from minillm.model import Decoder, KVCache

__all__ = [
    "Completion",
    "Decoder",
    "DecoderConfig",
    "KVCache",
    "MinillmError",
    "Sampling",
    "Tokenizer",
    "generate",
    "load",
    "load_model",
    "lora",
    "prompt",
    "save",
    "stream",
    "verify",
]
