"""transformers' Llama, Mistral and Falcon under the same names: the one file that may import transformers.

It is imported when `minillm verify` runs, not before; the extra is `pip install "minillm[verify]"`. What is recorded
comes from hooks on its modules, as for our own model, and is brought to our names and shapes:

    Llama, Mistral     renames                                  (layers.N.self_attn -> blocks.N.attention)
    Falcon             the fused query_key_value, its numbers picked apart by transformers' own `_split_heads`

Nothing here uses our loader or our weight maps: weights and settings are those transformers read, so that they can
convict ours. Attention runs through torch's fused kernel unless another is asked for; what is wrong with the others is
listed in `minillm.verify.known_faults`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minillm.config import DecoderConfig
from minillm.errors import InputError
from minillm.verify.attention_calls import AttentionCalls
from minillm.verify.gradients import pull_back
from minillm.verify.trace import Take, Trace, after, before, gradient_of, sink, take_rotary, watch_attention

_LLAMA = {
    "self_attn.q_proj": "attention.q_proj",
    "self_attn.k_proj": "attention.k_proj",
    "self_attn.v_proj": "attention.v_proj",
    "self_attn.o_proj": "attention.o_proj",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.up_proj",
    "mlp.down_proj": "mlp.down_proj",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "mlp_norm",
}
_FALCON = {
    "self_attention.dense": "attention.o_proj",
    "mlp.dense_h_to_4h": "mlp.up_proj",
    "mlp.dense_4h_to_h": "mlp.down_proj",
    "input_layernorm": "attention_norm",
    "ln_attn": "attention_norm",
    "post_attention_layernorm": "mlp_norm",
    "ln_mlp": "mlp_norm",
}


def available() -> bool:
    """Whether transformers is installed."""
    return importlib.util.find_spec("transformers") is not None


def version() -> str:
    """Of the transformers installed, e.g. "5.23.0"."""
    import transformers

    return str(transformers.__version__)


def load(folder: Path, *, dtype: torch.dtype, attention: str = "sdpa", device: str = "cpu") -> Oracle:
    """transformers' own loader on a folder of safetensors, in eval mode; no code of the repository is run.

    attention: "sdpa" or "eager". Raises InputError where transformers is absent or refuses the folder.
    """
    if not available():
        raise InputError('transformers is not installed; pip install "minillm[verify]", or compare with --against')
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=attention, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"{folder}: transformers {version()} cannot load it: {str(error).splitlines()[0]}") from error
    return Oracle(model.eval().to(torch.device(device)))


class Oracle:
    """A transformers causal language model, seen through our names."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.falcon = model.config.model_type == "falcon"
        self.body = model.transformer if self.falcon else model.model
        self.layers = self.body.h if self.falcon else self.body.layers
        self.config = _config(model)
        self._qkv = _fused_rows(self.layers[0].self_attention, self.config) if self.falcon else {}
        self._modules = dict(self._named_modules())

    def _named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        yield "embed", self.body.word_embeddings if self.falcon else self.body.embed_tokens
        for layer, block in enumerate(self.layers):
            for theirs, ours in (_FALCON if self.falcon else _LLAMA).items():
                if _has(block, theirs):
                    yield f"blocks.{layer}.{ours}", block.get_submodule(theirs)
        yield "norm", self.body.ln_f if self.falcon else self.body.norm
        yield "lm_head", self.model.lm_head

    def parameter(self, name: str) -> Tensor:
        """A weight or bias under our name, as transformers holds it; q, k and v are picked out of a fused weight."""
        module, _, leaf = name.rpartition(".")
        part = module.rpartition(".")[2]
        if part in self._qkv:
            fused = self.layers[int(module.split(".")[1])].self_attention.query_key_value
            return getattr(fused, leaf)[self._qkv[part]]
        return getattr(self._modules[module], leaf)

    def _gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Our name of each parameter that is not frozen, and its gradient; zero where backward left none."""
        for name, module in self._modules.items():
            if name != "lm_head" or not self.config.tied_embeddings:
                yield from ((f"{name}.{leaf}", gradient_of(x)) for leaf, x in _trained(module))
        for layer, block in enumerate(self.layers if self.falcon else ()):
            for leaf, x in _trained(block.self_attention.query_key_value):
                fused = gradient_of(x)
                for part, rows in self._qkv.items():
                    yield f"blocks.{layer}.attention.{part}.{leaf}", fused[rows]

    def frequencies(self, positions: Tensor) -> tuple[Tensor | None, float]:
        """Rotary frequencies (d/2,) fp32 and the factor of cos and sin, from a fresh module: the model's own may have
        been cast. Some depend on the longest position, hence the argument."""
        if self.config.position != "rotary":
            return None, 1.0
        fresh = type(self.body.rotary_emb)(config=self.model.config).to(positions.device)
        fresh(torch.zeros(1, dtype=torch.float32, device=positions.device), position_ids=positions)
        return fresh.inv_freq.float(), float(fresh.attention_scaling)

    def record(self, tokens: Tensor, keep: Tensor, *, gradients: bool = False) -> Trace:
        """One forward without a cache, positions counted over real tokens.

        gradients: also backward from `next_token_loss`; the trace has the parameters' gradients too, the model none.
        """
        recorded = Trace()
        recorded.begin(tokens, keep)
        with torch.set_grad_enabled(gradients), self._watching(sink(recorded, gradients=gradients)):
            positions = ((keep.long().cumsum(dim=1) - 1) * keep).to(tokens.device)
            logits = self.model(tokens, attention_mask=keep.long(), position_ids=positions, use_cache=False).logits
            if gradients:
                self.model.zero_grad(set_to_none=True)
                pull_back(logits, tokens, keep)
                recorded.gradients |= dict(self._gradients())
                self.model.zero_grad(set_to_none=True)
        return recorded

    @contextmanager
    def _watching(self, take: Take) -> Iterator[None]:
        calls = AttentionCalls()
        hooks = [*self._hooks(take, calls)]
        try:
            with calls:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hooks(self, take: Take, calls: AttentionCalls) -> Iterator[Any]:
        for name, module in self._modules.items():
            yield after(module, "logits" if name == "lm_head" else name, take)
            if name.endswith(("o_proj", "down_proj")):
                inner = name.replace("o_proj", "mixed").replace("down_proj", "inner")
                yield before(module, inner, take)
            if name.endswith("mlp_norm") and self.config.block == "sequential":
                yield before(module, name.replace("mlp_norm", "residual"), take)
        if self.config.position == "rotary":
            yield self.body.rotary_emb.register_forward_hook(lambda _, args, out: take_rotary(take, *out))
        for layer, block in enumerate(self.layers):
            name = f"blocks.{layer}"
            attention = block.self_attention if self.falcon else block.self_attn
            if self.falcon:
                yield _after_fused(attention.query_key_value, f"{name}.attention", self._qkv, take)
            yield from watch_attention(attention, f"{name}.attention", calls, take, self.config)
            yield after(block, name, take)


def _trained(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, x) for name, x in module.named_parameters() if x.requires_grad)


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def _after_fused(module: nn.Module, name: str, rows: dict[str, Tensor], take: Take) -> Any:
    def split(_: nn.Module, args: Any, fused: Tensor) -> None:
        for part, index in rows.items():
            take(f"{name}.{part}", fused[..., index], of=fused, pick=partial(_columns, index=index))

    return module.register_forward_hook(split)


def _columns(fused: Tensor, index: Tensor) -> Tensor:
    return fused[..., index]


def _fused_rows(attention: Any, config: DecoderConfig) -> dict[str, Tensor]:
    """Which outputs of `query_key_value` are q, k and v: their own `_split_heads`, applied to 0, 1, 2, .."""
    width = attention.query_key_value.weight.shape[0]
    q, k, v = (part[0, 0] for part in attention._split_heads(torch.arange(width)[None, None]))
    each = config.num_heads // config.num_kv_heads
    k, v = (x[::each] if len(x) == config.num_heads else x for x in (k, v))  # (H or G, E) -> (G, E)
    return {"q_proj": q.flatten(), "k_proj": k.flatten(), "v_proj": v.flatten()}


_ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu",
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
}  # fmt: skip


def _config(model: Any) -> DecoderConfig:
    """What transformers made of config.json, in our terms. Rotary scaling is left out: `frequencies` speaks for it."""
    theirs = model.config
    shared: dict[str, Any] = {
        "vocab_size": theirs.vocab_size,
        "hidden_size": theirs.hidden_size,
        "num_layers": theirs.num_hidden_layers,
        "num_heads": theirs.num_attention_heads,
        "context": theirs.max_position_embeddings,
        "tied_embeddings": model.lm_head.weight is model.get_input_embeddings().weight,
        "rope_theta": (getattr(theirs, "rope_parameters", None) or {}).get("rope_theta", 10_000.0),
        "family": theirs.model_type,
    }
    if theirs.model_type == "falcon":
        return DecoderConfig(**shared, **_falcon(theirs))
    if theirs.model_type in ("llama", "mistral"):
        return DecoderConfig(**shared, **_llama(theirs))
    raise InputError(f"transformers read a {theirs.model_type!r}; minillm compares llama, mistral and falcon")


def _llama(theirs: Any) -> dict[str, Any]:
    return {
        "num_kv_heads": theirs.num_key_value_heads,
        "head_size": getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads,
        "ffn_size": theirs.intermediate_size,
        "norm_eps": theirs.rms_norm_eps,
        "activation": _ACTIVATIONS[theirs.hidden_act],
        "attention_bias": getattr(theirs, "attention_bias", False),
        "mlp_bias": getattr(theirs, "mlp_bias", False),
    }


def _falcon(theirs: Any) -> dict[str, Any]:
    grouped = theirs.new_decoder_architecture
    multi_query = 1 if theirs.multi_query else theirs.num_attention_heads
    return {
        "num_kv_heads": theirs.num_kv_heads if grouped else multi_query,
        "head_size": theirs.hidden_size // theirs.num_attention_heads,
        "ffn_size": theirs.ffn_hidden_size,
        "norm": "layer",
        "norm_eps": theirs.layer_norm_epsilon,
        "position": "alibi" if theirs.alibi else "rotary",
        "mlp": "plain",
        "activation": _ACTIVATIONS[theirs.activation],
        "block": "parallel" if grouped or theirs.parallel_attn else "sequential",
        "parallel_norms": 2 if grouped and theirs.num_ln_in_parallel_attn in (None, 2) else 1,
        "attention_bias": theirs.bias,
        "mlp_bias": theirs.bias,
        "separate_bias": theirs.bias,
    }
