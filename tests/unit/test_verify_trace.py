"""The trace of a forward: every operation under its name, the numbers that ran, and no mark left on the model."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack as function_modes

from minillm.config import DecoderConfig
from minillm.errors import InputError
from minillm.model import Decoder, attention
from minillm.model.attention import Attention, visible_keys
from minillm.model.block import SequentialBlock
from minillm.model.rope import rotate
from minillm.verify import Trace, trace
from minillm.verify.operations import operations
from minillm.verify.reference import slopes_of
from minillm.verify.trace import Statistics
from tests import tiny
from tests.decoders import SHAPES, decoder
from tests.error import assert_near

MORE = {
    "two_norms": {"norm": "layer", "mlp": "plain", "block": "parallel", "parallel_norms": 2},
    "part_turns": {"rotary_size": 4, "tied_embeddings": True},
    "scalar": {"head": "scalar"},
}
EVERY = pytest.mark.parametrize("shape", [*SHAPES, *MORE])


def made(shape: str) -> Decoder:
    return decoder(**{**SHAPES, **MORE}[shape])


def text(length: int = 11) -> tuple[Tensor, Tensor]:
    """tokens and keep (2, T): the second row has three pads on its left."""
    keep = torch.ones(2, length, dtype=torch.bool)
    keep[1, :3] = False
    return tiny.tokens(2, length), keep


def recorded_of(model: Decoder, length: int = 11) -> Trace:
    tokens, keep = text(length)
    with torch.no_grad(), trace(model) as recorded:
        model(tokens, keep=keep)
    return recorded


# -- what is recorded --------------------------------------------------------------------------------------------------


def documented(config: DecoderConfig, batch: int, length: int) -> dict[str, tuple[int, ...]]:
    """Leaf of a name -> the shape that `minillm.verify.operations` promises."""
    rows = (batch, length)
    wide, inner = (*rows, config.hidden_size), (*rows, config.ffn_size)
    heads, groups, size = config.num_heads, config.num_kv_heads, config.head_size
    square = (batch, heads, length, length)
    return {
        **dict.fromkeys(("embed", "attention_norm", "mlp_norm", "norm", "residual", "o_proj", "down_proj"), wide),
        **dict.fromkeys(("gate_proj", "up_proj", "inner"), inner),
        **dict.fromkeys(("cos", "sin"), (*rows, config.rotary_dim)),
        **dict.fromkeys(("q_proj", "mixed"), (*rows, heads * size)),
        **dict.fromkeys(("k_proj", "v_proj"), (*rows, groups * size)),
        "q_rotated": (batch, heads, length, size),
        "k_rotated": (batch, groups, length, size),
        "scores": square,
        "weights": square,
        "logits": rows if config.head == "scalar" else (*rows, config.vocab_size),
        **{str(layer): wide for layer in range(config.num_layers)},
    }


@EVERY
def test_every_operation_is_there_in_its_shape(shape: str) -> None:
    model = made(shape)
    recorded = recorded_of(model)
    promised = documented(model.config, 2, 11)
    assert {name: tuple(x.shape) for name, x in recorded.items()} == {
        step.name: promised[step.name.split(".")[-1]] for step in operations(model.config)
    }
    assert torch.equal(recorded.tokens, text()[0]) and torch.equal(recorded.keep, text()[1])
    assert not any(x.requires_grad for x in recorded.values())


@EVERY
def test_the_model_computes_the_same_bits(shape: str) -> None:
    tokens, keep = text()
    plain, watched = made(shape), made(shape)
    with trace(watched, gradients=True) as recorded:
        logits = watched(tokens, keep=keep)
        logits.square().sum().backward()
    expected = plain(tokens, keep=keep)
    expected.square().sum().backward()
    assert torch.equal(logits, expected) and torch.equal(recorded["logits"], expected)
    for ours, theirs in zip(watched.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


@EVERY
def test_linear_operations_are_what_ran(shape: str) -> None:
    """Input times weight gives output, and output's gradient times input the weight's: names match their tensors."""
    model, (tokens, keep) = made(shape), text()
    with trace(model, gradients=True) as recorded:
        model(tokens, keep=keep).sin().sum().backward()
    steps = [step for step in operations(model.config) if step.kind == "linear"]
    assert steps
    for step in steps:
        module, read = model.get_submodule(step.name), recorded[step.inputs[0]]
        assert_near(recorded[step.name], module(read), 1e-6, step.name)
        slope = torch.einsum("bto,bti->oi", recorded.gradients[step.name], read)
        assert_near(slope, module.weight.grad, 1e-5, f"gradient of {step.name}")


def test_a_second_backward_adds_to_the_gradients() -> None:
    model, (tokens, keep) = made("llama"), text()
    with trace(model, gradients=True) as recorded:
        loss = model(tokens, keep=keep).square().sum()
        loss.backward(retain_graph=True)
        once = {name: gradient.clone() for name, gradient in recorded.gradients.items()}
        loss.backward()
    assert once
    for name, gradient in recorded.gradients.items():
        assert torch.equal(gradient, 2 * once[name]), name


# -- attention ---------------------------------------------------------------------------------------------------------


def by_hand(model: Decoder, recorded: Trace, layer: int = 0) -> tuple[Tensor, Tensor]:
    """scores and weights in float64 from the recorded projections: the formula with a loop over heads."""
    config, name = model.config, f"blocks.{layer}.attention"
    batch, length = recorded.tokens.shape
    heads, size = config.num_heads, config.head_size
    q, k = (
        recorded[f"{name}.{part}"].double().view(batch, length, -1, size).transpose(1, 2)
        for part in ("q_proj", "k_proj")
    )
    positions = (recorded.keep.cumsum(1) - 1) * recorded.keep
    if config.position == "rotary":
        cos, sin = (recorded[f"rotary.{part}"].double()[:, None] for part in ("cos", "sin"))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    scores = torch.empty(batch, heads, length, length, dtype=torch.float64)
    for head in range(heads):
        scores[:, head] = q[:, head] @ k[:, head // (heads // config.num_kv_heads)].mT
        if config.position == "alibi":  # slope and positions so small are exact in bfloat16
            scores[:, head] += slopes_of(heads)[head] * positions[:, None, :]
    scores /= size**0.5
    scores.masked_fill_(~visible_keys(recorded.keep, length, length, scores.device), -torch.inf)
    return scores, scores.softmax(dim=-1)


def assert_scores(model: Decoder, recorded: Trace) -> None:
    keep = recorded.keep
    for layer in range(model.config.num_layers):
        for step, expected in zip(("scores", "weights"), by_hand(model, recorded, layer), strict=True):
            found = recorded[f"blocks.{layer}.attention.{step}"]
            found, expected = (x.transpose(1, 2)[keep].double() for x in (found, expected))
            assert torch.equal(found.isinf(), expected.isinf()), step
            assert_near(found.nan_to_num(neginf=0), expected.nan_to_num(neginf=0), 1e-5, f"{step} of layer {layer}")


@EVERY
@pytest.mark.parametrize("attend", ["attend", "attention_ref"])
def test_scores_and_weights_of_a_fused_kernel_and_by_hand(
    shape: str, attend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "attend", getattr(attention, attend))
    model = made(shape)
    recorded = recorded_of(model)
    assert_scores(model, recorded)
    fused = attend == "attend"  # then they are computed beside the kernel, in float64
    assert recorded["blocks.0.attention.weights"].dtype == (torch.float64 if fused else torch.float32)


@EVERY
def test_scores_without_a_mask(shape: str) -> None:
    """No padding: attention runs by `is_causal`."""
    model = made(shape)
    with torch.no_grad(), trace(model) as recorded:
        model(tiny.tokens(2, 9))
    assert bool(recorded.keep.all())
    assert_scores(model, recorded)


@EVERY
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_one_token_after_cached_ones(shape: str, padded: bool) -> None:
    """Its scores are the last row of those of the whole text, though its heads take the place of tokens."""
    model, (tokens, keep) = made(shape), text()
    whole = recorded_of(model) if padded else None
    if whole is None:
        with trace(model) as whole:
            model(tokens)
    cache = model.new_cache(2, 16)
    with trace(model) as recorded:
        model(tokens[:, :-1], keep=keep[:, :-1] if padded else None, cache=cache)
        model(tokens[:, -1:], cache=cache)
    assert torch.equal(recorded.tokens, tokens[:, -1:])
    for layer in range(2):
        for step in ("scores", "weights"):
            name = f"blocks.{layer}.attention.{step}"
            found, expected = recorded[name], whole[name][:, :, -1:]
            assert torch.equal(found.isinf(), expected.isinf())
            assert_near(found.nan_to_num(neginf=0), expected.nan_to_num(neginf=0), 1e-5, name)
        if model.config.position == "rotary":
            keys = f"blocks.{layer}.attention.k_rotated"
            assert_near(recorded[keys], whole[keys], 1e-5, keys)  # those in the cache too
            queries = f"blocks.{layer}.attention.q_rotated"
            assert_near(recorded[queries], whole[queries][:, :, -1:], 1e-5, queries)


class ByHand(Attention):
    """What a user might write: products and softmax in plain sight, keys repeated for each query head."""

    expand = staticmethod(Tensor.repeat_interleave)
    product = staticmethod(torch.matmul)
    softmax = staticmethod(nn.functional.softmax)

    def forward(self, x: Tensor, rotation: object, mask: Tensor | None, cache: object) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            project(x).view(batch, length, -1, self.head_size).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        k, v = (self.expand(t, self.num_heads // self.num_kv_heads, dim=1) for t in (k, v))
        visible = mask if mask.dtype == torch.bool else mask > -1e9
        scores = self.product(q, k.transpose(2, 3)) * self.head_size**-0.5
        scores = scores.masked_fill(~visible, -1e4) + (0 if mask.dtype == torch.bool else mask.clamp(min=-1e4))
        weights = self.softmax(scores, dim=-1)
        scores.zero_()  # reuse of its memory: the trace must have its own copy
        return self.o_proj(self.product(weights, v).transpose(1, 2).flatten(2))


def test_arguments_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("llama")
    for block in model.blocks:
        block.attention.__class__ = ByHand
    expected = recorded_of(model)
    monkeypatch.setattr(ByHand, "product", staticmethod(lambda x, y: torch.matmul(input=x, other=y)))
    monkeypatch.setattr(ByHand, "softmax", staticmethod(lambda x, dim: torch.softmax(dim=dim, input=x)))
    found = recorded_of(model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("shape", ["llama", "falcon", "grouped_alibi"])
def test_a_prototype_with_softmax_by_hand(shape: str) -> None:
    model = made(shape)
    for block in model.blocks:
        mine = ByHand(model.config)
        mine.load_state_dict(block.attention.state_dict())
        block.attention = mine
    recorded = recorded_of(model)
    assert set(recorded) == {step.name for step in operations(model.config)}
    assert_scores(model, recorded)
    assert_near(recorded["logits"][text()[1]], made(shape)(*text()[:1], keep=text()[1])[text()[1]])


def test_a_prototype_without_norms() -> None:
    model = made("llama")
    model.blocks[1].attention_norm, model.norm = nn.Identity(), nn.Identity()
    recorded = recorded_of(model)
    assert torch.equal(recorded["blocks.1.attention_norm"], recorded["blocks.0"])
    assert torch.equal(recorded["norm"], recorded["blocks.1"])


class Strange(Attention):
    """Attention in a way that nobody watches."""

    def forward(self, x: Tensor, rotation: object, mask: Tensor | None, cache: object) -> Tensor:
        return self.o_proj(self.q_proj(x) * (self.k_proj(x) + self.v_proj(x)).sum())


def test_an_unknown_attention_leaves_a_gap_and_nothing_of_another_layer() -> None:
    model = made("llama")
    strange = Strange(model.config)
    strange.load_state_dict(model.blocks[1].attention.state_dict())
    model.blocks[1].attention = strange
    recorded = recorded_of(model)
    missing = {step.name for step in operations(model.config)} - set(recorded)
    assert missing == {f"blocks.1.attention.{step}" for step in ("q_rotated", "k_rotated", "scores", "weights")}


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("expand", [Tensor.repeat_interleave, lambda k, n, dim: k.repeat(1, n, 1, 1)])
def test_repeated_keys_are_recorded_once(
    expand: Callable[..., Tensor], alike: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """k (B, H, S, E) -> (B, G, S, E) in the order of the groups, however they were repeated, and all equal as well."""
    model = made("llama")
    for block in model.blocks:
        block.attention.__class__ = ByHand
        block.attention.k_proj.weight.data.mul_(not alike)
    expected = recorded_of(model)["blocks.0.attention.k_proj"].view(2, 11, 2, 8).transpose(1, 2)
    model.rotary.register_forward_hook(lambda _, args, out: (out[0] * 0 + 1, out[1] * 0))  # no turning
    monkeypatch.setattr(ByHand, "expand", staticmethod(expand))
    assert torch.equal(recorded_of(model)["blocks.0.attention.k_rotated"], expected)


# -- what a trace leaves alone -----------------------------------------------------------------------------------------


def traces_of(model: nn.Module) -> int:
    """Hooks and function modes."""
    hooks = sum(
        len(getattr(module, name))
        for module in model.modules()
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    )
    return hooks + len(function_modes())


@pytest.mark.parametrize("tokens", [tiny.tokens(1, 4), torch.tensor([[131]])], ids=["good", "outside the vocabulary"])
def test_nothing_stays_behind(tokens: Tensor) -> None:
    model = made("llama")
    before, names = traces_of(model), set(vars(model.blocks[0].attention))
    with suppress(IndexError), trace(model, gradients=True):
        assert traces_of(model) > before + 30
        model(tokens).sum().backward()
    assert traces_of(model) == before and set(vars(model.blocks[0].attention)) == names


def test_nothing_stays_behind_when_the_block_raises() -> None:
    model = made("falcon_rw")
    before = traces_of(model)
    with pytest.raises(ZeroDivisionError), trace(model):
        model(tiny.tokens(1, 4))
        _ = 1 // 0
    assert traces_of(model) == before


def test_two_traces_at_once_see_the_same() -> None:
    model, (tokens, keep) = made("llama"), text()
    with torch.no_grad(), trace(model) as outer, trace(model) as inner:
        model(tokens, keep=keep)
    assert set(outer) == set(inner) == {step.name for step in operations(model.config)}
    assert all(torch.equal(outer[name], inner[name]) for name in outer)


class InPlace(SequentialBlock):
    """Adds both branches to the stream it was given, as some code does."""

    def forward(self, x: Tensor, rotation: object, mask: Tensor | None, cache: object) -> Tensor:
        x += self.attention(self.attention_norm(x), rotation, mask, cache)
        x += self.mlp(self.mlp_norm(x))
        return x


def zero_its_input(_: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
    args[0].zero_()


def test_later_changes_in_place_do_not_reach_the_trace() -> None:
    model = made("llama")
    expected = recorded_of(model)
    for block in model.blocks:
        block.__class__ = InPlace
    model.norm.register_forward_hook(zero_its_input)
    recorded = recorded_of(model)
    for name in expected:
        assert torch.equal(recorded[name], expected[name]), name
    assert torch.equal(recorded["embed"], model.embed.weight[text()[0]])


def test_the_tokens_are_copied() -> None:
    model, (tokens, keep) = made("llama"), text()
    with torch.no_grad(), trace(model) as recorded:
        model(tokens, keep=keep)
    tokens.zero_()
    keep.fill_(True)
    assert torch.equal(recorded.tokens, text()[0]) and torch.equal(recorded.keep, text()[1])


@pytest.mark.parametrize("statistics", [False, True])
def test_a_second_forward_begins_anew(statistics: bool) -> None:
    model, (tokens, keep) = made("llama"), text()
    with trace(model, statistics=statistics, gradients=True) as recorded:
        model(tokens, keep=keep).sum().backward()
        first = {**recorded, **recorded.statistics}
        model(tokens[:1, :5])
    assert torch.equal(recorded.tokens, tokens[:1, :5]) and bool(recorded.keep.all())
    second = {**recorded, **recorded.statistics}
    assert list(second) == list(first)
    assert all(x.shape[0] == 1 for x in second.values())
    assert not any(bool(x.any()) for x in recorded.gradients.values())


def test_a_late_backward_does_not_reach_the_second_forward() -> None:
    model, (tokens, keep) = made("llama"), text()
    with trace(model, gradients=True) as recorded:
        first = model(tokens, keep=keep)
        model(tokens.flip(1), keep=keep)
        first.sum().backward()
    assert recorded.gradients and not any(bool(x.any()) for x in recorded.gradients.values())


# -- options -----------------------------------------------------------------------------------------------------------


def test_only_some() -> None:
    model, (tokens, keep) = made("llama"), text()
    whole = recorded_of(model)
    with trace(model, only=lambda name: name.startswith("blocks.1."), gradients=True) as recorded:
        model(tokens, keep=keep).sum().backward()
    assert set(recorded) == {name for name in whole if name.startswith("blocks.1.")}
    assert {"blocks.1.mlp.inner", "blocks.1.attention.q_proj"} <= set(recorded.gradients) <= set(recorded)
    assert all(torch.equal(recorded[name], whole[name]) for name in recorded)


def test_statistics_are_those_of_the_tensors() -> None:
    model, (tokens, keep) = made("llama"), text()
    whole = recorded_of(model)
    with torch.no_grad(), trace(model, statistics=True) as recorded:
        model(tokens, keep=keep)
    assert set(recorded.statistics) == set(whole) and len(recorded) == 0
    assert all(recorded.statistics[name] == Statistics.of(x) for name, x in whole.items())


def test_statistics_worked_by_hand() -> None:
    x = torch.tensor([[3.0, -4.0, torch.inf], [-torch.inf, torch.nan, 7.0]])
    found = Statistics.of(x)
    assert found.shape == (2, 3) and found.not_finite == 2  # -inf hides a score and is none
    assert (found.mean, found.least, found.largest) == (2.0, -4.0, 7.0)
    assert found.rms == pytest.approx(((9 + 16 + 49) / 3) ** 0.5)
    assert Statistics.of(torch.full((2,), torch.nan)) == Statistics((2,), 0.0, 0.0, 0.0, 0.0, 2)


def held() -> int:
    """Numbers in all tensors that are alive."""
    gc.collect()
    return sum(x.numel() for x in gc.get_objects() if issubclass(type(x), Tensor))


@torch.no_grad()
def test_statistics_keep_no_tensor() -> None:
    model, (tokens, keep) = made("llama"), text()
    model(tokens, keep=keep)
    before = held()
    with trace(model, statistics=True) as recorded:
        model(tokens, keep=keep)
    kept = held() - before
    assert recorded.statistics and kept == tokens.numel() + keep.numel()
    with trace(model) as full:  # so that the count is known to see what is kept
        model(tokens, keep=keep)
    assert held() - before - kept >= sum(x.numel() for x in full.values())


# -- files -------------------------------------------------------------------------------------------------------------


def written(folder: Path) -> tuple[Path, Trace]:
    model, (tokens, keep) = made("llama").bfloat16(), text()
    with trace(model, gradients=True) as recorded:
        model(tokens, keep=keep).float().square().sum().backward()
    recorded.about["dtype"] = "bfloat16, \u00e9crit"
    recorded.save(folder / "run.trace")
    return folder / "run.trace", recorded


def test_a_saved_trace_comes_back_bit_by_bit(tmp_path: Path) -> None:
    path, recorded = written(tmp_path)
    found = Trace.load(path)
    assert list(found) == list(recorded) and found.about == recorded.about
    assert set(found.gradients) == set(recorded.gradients) and found.gradients
    pairs: Iterator[tuple[Tensor, Tensor]] = iter(
        [(found[name], recorded[name]) for name in recorded]
        + [(found.gradients[name], recorded.gradients[name]) for name in recorded.gradients]
        + [(found.tokens, recorded.tokens), (found.keep, recorded.keep)]
    )
    for x, y in pairs:
        assert x.dtype == y.dtype and torch.equal(x, y)
    assert [file.name for file in tmp_path.iterdir()] == ["run.trace"]


def test_a_trace_of_nothing_can_be_saved(tmp_path: Path) -> None:
    Trace(about={"who": "nobody"}).save(tmp_path / "empty")
    found = Trace.load(tmp_path / "empty")
    assert (len(found), found.tokens, found.keep, found.about) == (0, None, None, {"who": "nobody"})


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def cut_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20])


def weights(path: Path) -> None:
    save_file({"embed": torch.ones(2)}, path, metadata={"format": "pt"})


def bare_weights(path: Path) -> None:
    save_file({"embed": torch.ones(2)}, path)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (cut, "cannot be read as a trace"),
        (cut_header, "cannot be read as a trace"),
        (Path.unlink, "cannot be read as a trace"),
        (lambda path: path.write_text("{}"), "cannot be read as a trace"),
        (lambda path: path.write_bytes(b""), "cannot be read as a trace"),
        (lambda path: (path.unlink(), path.mkdir()), "cannot be read as a trace"),
        (weights, "is no trace that minillm saved"),
        (bare_weights, "is no trace that minillm saved"),
    ],
    ids=["truncated", "header cut", "missing", "text", "empty", "folder", "weights", "weights without metadata"],
)
def test_other_files_are_refused(tmp_path: Path, spoil: Callable[[Path], object], said: str) -> None:
    path, _ = written(tmp_path)
    spoil(path)
    with pytest.raises(InputError, match=said) as raised:
        Trace.load(path)
    assert str(raised.value).startswith(str(path)) and "\n" not in str(raised.value)


def test_a_copied_model_can_be_traced() -> None:
    model = made("llama")
    expected = recorded_of(model)
    found = recorded_of(copy.deepcopy(model))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
