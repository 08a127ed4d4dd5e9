"""Prompt tuning, P-tuning and prefix tuning against peft: starts, logits, loss, gradients, files both ways, generation.

The same `torch.manual_seed` gives both the same start, encoders included; then everything trained is moved at random,
by the same numbers. Warnings are errors in these tests, peft's about missing keys included.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import minillm
from minillm import prompt
from minillm.prompt import Prompted
from tests import tiny_checkpoint
from tests.error import assert_near, distance
from tests.tiny import VARIANTS, build, save, tokens

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # between peft and transformers
]
P = 5
MODELS = [
    "llama_mha", "llama_gqa_8_2", "llama_head_dim",
    "falcon_7b", "falcon_40b", "falcon_rw",
]  # fmt: skip
#: Our settings, peft's config class and its fields.
KINDS: dict[str, tuple[dict[str, Any], type, dict[str, Any]]] = {
    "prompt": ({}, peft.PromptTuningConfig, {}),
    "vocab": ({"init": "vocab"}, peft.PromptTuningConfig, {"prompt_tuning_init": "SAMPLE_VOCAB"}),
    "p-tuning": (
        {"kind": "p-tuning", "width": 24}, peft.PromptEncoderConfig, {"encoder_hidden_size": 24},
    ),
    "p-tuning lstm": (
        {"kind": "p-tuning", "encoder": "lstm", "layers": 3},
        peft.PromptEncoderConfig,
        {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 3},
    ),
    "prefix": ({"kind": "prefix"}, peft.PrefixTuningConfig, {}),
    "prefix mlp": (
        {"kind": "prefix", "encoder": "mlp", "width": 24},
        peft.PrefixTuningConfig,
        {"prefix_projection": True, "encoder_hidden_size": 24},
    ),
    "prefix zero": ({"kind": "prefix", "init": "zero"}, peft.PrefixTuningConfig, {"init_weights": "zero"}),
    "prefix mlp zero": (
        {"kind": "prefix", "encoder": "mlp", "init": "zero"},
        peft.PrefixTuningConfig,
        {"prefix_projection": True, "init_weights": "zero"},
    ),
}  # fmt: skip
TOKENS = tokens(3, 9)


def make(variant: str, kind: str, folder: Path) -> tuple[Any, Prompted]:
    """Theirs and ours from one seed."""
    own, config, fields = KINDS[kind]
    base = build(VARIANTS[variant])
    save(base, folder / "base")
    if config is peft.PrefixTuningConfig and base.config.model_type == "falcon" and not grouped(base):
        fields = fields | {"num_attention_heads": heads(base), "token_dim": heads(base) * 8}  # peft has H, and fails
    torch.manual_seed(3)
    theirs = peft.get_peft_model(base, config(task_type="CAUSAL_LM", num_virtual_tokens=P, **fields)).eval()
    model = minillm.load_model(folder / "base", dtype="float32")
    torch.manual_seed(3)
    return theirs, prompt.add(model, tokens=P, **own).eval()


def grouped(base: Any) -> bool:
    return bool(base.config.new_decoder_architecture)


def heads(base: Any) -> int:
    return 1 if base.config.multi_query else int(base.config.num_attention_heads)


@pytest.fixture(params=MODELS)
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def paired(theirs: Any, ours: Prompted) -> list[tuple[str, Tensor, Tensor]]:
    """Parameters by name, theirs and ours; none is left over on either side."""
    known = dict(theirs.prompt_encoder["default"].named_parameters())
    head = "transform." if any(name.startswith("transform") for name in known) else "mlp_head."
    found = []
    for name, parameter in ours.prompt.named_parameters():
        their = name.replace("table", "embedding.weight").replace("encoder.lstm.", "lstm_head.")
        their = their.replace("encoder.head.", "mlp_head.").replace("encoder.", head)
        found.append((name, known.pop(their), parameter))
    assert not known
    return found


def shake(theirs: Any, ours: Prompted) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, their, our in paired(theirs, ours):
            noise = 0.1 * torch.randn(their.shape, generator=generator)
            their += noise
            our += noise


def real(logits: Tensor, count: int = TOKENS.shape[1]) -> Tensor:
    """Without those of virtual tokens, which peft gives for prompts."""
    return logits[:, -count:]


def test_start_logits_loss_and_gradients(variant: str, kind: str, tmp_path: Path) -> None:
    theirs, ours = make(variant, kind, tmp_path)
    for name, their, our in paired(theirs, ours):
        assert torch.equal(their, our), name
    shake(theirs, ours)
    labels = TOKENS.clone()
    labels[:, 0] = -100  # peft would ask the last virtual token for it
    answer = theirs(TOKENS, labels=labels)
    found = ours(TOKENS)
    assert_near(found, real(answer.logits))
    with torch.no_grad():
        assert distance(ours.base(TOKENS), found) > 1e-2  # the prompt shows
    loss = torch.nn.functional.cross_entropy(found[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    assert_near(loss, answer.loss, what="loss")
    loss.backward()
    answer.loss.backward()
    for name, their, our in paired(theirs, ours):
        assert our.grad is not None
        assert_near(our.grad, their.grad, 1e-5, name)
    assert all(parameter.grad is None for parameter in ours.base.parameters())


def test_padding(variant: str, kind: str, tmp_path: Path) -> None:
    """Rows of 4, 9 and 6 tokens, padded on the right and on the left, are those of rows alone."""
    theirs, ours = make(variant, kind, tmp_path)
    shake(theirs, ours)
    lengths = (4, 9, 6)
    right = torch.stack([torch.arange(9) < length for length in lengths])
    left = right.flip(1)
    padded = torch.stack([torch.cat((row[length:], row[:length])) for row, length in zip(TOKENS, lengths, strict=True)])
    with torch.no_grad():
        from_right, from_left = ours(TOKENS, keep=right), ours(padded, keep=left)
        at_right = real(theirs(TOKENS, attention_mask=right.long()).logits)
        for row, length in enumerate(lengths):
            alone = real(theirs(TOKENS[row : row + 1, :length]).logits, length)
            assert_near(from_right[row, :length], alone[0])
            assert_near(from_right[row, :length], at_right[row, :length])
            assert_near(from_left[row, -length:], alone[0])


@pytest.mark.parametrize("model", ["llama_gqa_8_2", "falcon_7b", "falcon_40b"])
def test_peft_is_off_with_padding_on_the_left(model: str, tmp_path: Path) -> None:
    """What the docstring of `minillm.prompt.prompted` says of peft; should this fail, peft has been mended."""
    keep = torch.arange(9) >= torch.tensor([[5], [0], [3]])
    positions = (keep.long().cumsum(1) - 1).clamp(min=0)
    for kind in ("prompt", "prefix"):
        theirs, ours = make(model, kind, tmp_path)
        shake(theirs, ours)
        with torch.no_grad():
            found = ours(TOKENS, keep=keep)
            off = real(theirs(TOKENS, attention_mask=keep.long()).logits)
            assert distance(found[keep], off[keep]) > 1e-3
            if kind == "prefix":
                right = theirs(TOKENS, attention_mask=keep.long(), position_ids=positions).logits
                assert_near(found[keep], right[keep])
            else:
                with pytest.warns(UserWarning, match="Ignoring position ids"):
                    ignored = theirs(TOKENS, attention_mask=keep.long(), position_ids=positions).logits
                assert torch.equal(real(ignored), off)


def test_files_both_ways(variant: str, kind: str, tmp_path: Path) -> None:
    theirs, ours = make(variant, kind, tmp_path)
    shake(theirs, ours)
    theirs.save_pretrained(tmp_path / "theirs")
    prompt.save(ours, tmp_path / "ours", base="someone/base")
    loaded = prompt.load(ours.base, tmp_path / "theirs")
    again = peft.PeftModel.from_pretrained(build(VARIANTS[variant]), tmp_path / "ours").eval()
    with torch.no_grad():
        expected = real(theirs(TOKENS).logits)
        assert_near(loaded(TOKENS), expected)
        assert_near(real(again(TOKENS).logits), expected)
    prompt.save(loaded, tmp_path / "again")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "again", "ours")]
    assert files[0].keys() == files[1].keys() == files[2].keys() == {"prompt_embeddings"}
    assert torch.equal(*(file["prompt_embeddings"] for file in files[:2]))
    assert_near(files[2]["prompt_embeddings"], files[0]["prompt_embeddings"], 1e-6)
    configs = [peft.PeftConfig.from_pretrained(tmp_path / name).to_dict() for name in ("theirs", "ours")]
    for config in configs:
        for name in ("base_model_name_or_path", "task_type", "peft_version"):
            config.pop(name)
    assert configs[0] == configs[1]


@pytest.mark.filterwarnings("ignore:Position ids are not supported")  # transformers gives them, peft drops them
def test_generation(variant: str, kind: str, tmp_path: Path) -> None:
    """Greedy, one prompt, since peft is off with padding."""
    theirs, ours = make(variant, kind, tmp_path)
    shake(theirs, ours)
    written = theirs.generate(
        input_ids=TOKENS[:1], attention_mask=torch.ones(1, 9).long(), max_new_tokens=12, do_sample=False
    )
    found = minillm.generate(ours, None, TOKENS[0].tolist(), max_new_tokens=12, do_sample=False)
    assert found[0].tokens == written[0, 9:].tolist()


@pytest.mark.parametrize("text", ["return", "the other thing, and a longer text than there are tokens"])
def test_a_prompt_that_starts_from_a_text(text: str, tmp_path: Path) -> None:
    import transformers

    folder = tiny_checkpoint.write(tmp_path / "base")
    model, tokenizer = minillm.load(folder, dtype="float32")
    ours = prompt.add(model, tokens=P, init="text", text=text, tokenizer=tokenizer)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=P, prompt_tuning_init="TEXT", prompt_tuning_init_text=text,
        tokenizer_name_or_path=str(folder),
    )  # fmt: skip
    theirs = peft.get_peft_model(base, config)
    assert torch.equal(ours.prompt.table, theirs.prompt_encoder["default"].embedding.weight)
    theirs.save_pretrained(tmp_path / "theirs")
    assert prompt.load(model, tmp_path / "theirs").settings.init == "random"
