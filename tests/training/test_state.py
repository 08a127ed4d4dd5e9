"""A run stopped and continued is the run that never stopped, to the last bit; and no save is half a save."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from minillm.config import DecoderConfig
from minillm.errors import CheckpointError, InputError, NumericsError
from minillm.losses import next_token_loss
from minillm.model import Decoder
from minillm.model.init import initialise
from minillm.training.loop import Clock, accumulate, faster_precision, interruptible
from minillm.training.optim import adamw
from minillm.training.state import load_state, read_progress, save_state

TINY = DecoderConfig(
    vocab_size=19, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_size=4, ffn_size=32, context=16
)


def fresh(seed: int = 0) -> tuple[Decoder, torch.optim.AdamW]:
    model = Decoder(TINY)
    initialise(model, seed=seed)
    return model, adamw(model, learning_rate=1e-2)


def step(model: Decoder, optimizer: torch.optim.AdamW) -> float:
    tokens = torch.randint(19, (3, 8))  # from torch's global random state, which a state has to bring back too
    loss = accumulate(model, tokens.split(1))
    optimizer.step()
    optimizer.zero_grad()
    return loss


def test_stopped_and_continued_equals_never_stopped(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, optimizer = fresh()
    straight = [step(model, optimizer) for _ in range(9)]

    torch.manual_seed(0)
    first, its_optimizer = fresh()
    losses = [step(first, its_optimizer) for _ in range(4)]
    save_state(tmp_path / "state.safetensors", first, its_optimizer, {"losses": losses})
    torch.manual_seed(99)
    second, its_optimizer = fresh(seed=1)
    losses = load_state(tmp_path / "state.safetensors", second, its_optimizer)["losses"]
    losses += [step(second, its_optimizer) for _ in range(5)]

    assert losses == straight
    for (name, ours), theirs in zip(second.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    for ours, theirs in zip(second.parameters(), model.parameters(), strict=True):
        for key, value in optimizer.state[theirs].items():
            assert torch.equal(its_optimizer.state[ours][key], value), key


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpus_random_state_comes_back(tmp_path: Path) -> None:
    model, optimizer = fresh()
    model.cuda()
    save_state(tmp_path / "s", model, optimizer, {})
    drawn = torch.rand(3, device="cuda")
    torch.cuda.manual_seed(99)
    load_state(tmp_path / "s", model, optimizer)
    assert torch.equal(torch.rand(3, device="cuda"), drawn)


def test_progress_comes_back_as_it_was(tmp_path: Path) -> None:
    progress = {"step": 7, "seconds": 0.1 + 0.2, "losses": [1 / 3, 2e-308], "recipe": {"text": None, "é": "\n"}}
    save_state(tmp_path / "s", *fresh(), progress)
    assert read_progress(tmp_path / "s") == progress


def test_another_models_state_is_refused_before_anything_changes(tmp_path: Path) -> None:
    save_state(tmp_path / "s", *fresh(), {})
    other = Decoder(DecoderConfig(**(vars(TINY) | {"ffn_size": 48})))
    before = [parameter.clone() for parameter in other.parameters()]
    with pytest.raises(CheckpointError, match=r"model\.blocks\.0\.mlp\.down_proj\.weight has shape \(16, 32\)"):
        load_state(tmp_path / "s", other, adamw(other, learning_rate=1.0))
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))


def test_what_is_no_state_is_refused(tmp_path: Path) -> None:
    (tmp_path / "torn").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    save_file({"a": torch.zeros(1)}, tmp_path / "weights")
    for name in ("torn", "weights", "absent"):
        with pytest.raises(CheckpointError, match=f"{name}: is no training state"):
            read_progress(tmp_path / name)


KILLED = """
import sys, torch
from minillm.checkpoint import tensor_file
from minillm.training import state
from tests.training.test_state import fresh

model, optimizer = fresh()
state.save_state(sys.argv[1], model, optimizer, {"step": 1})
written, plain = 0, state.as_bytes

def dying(tensor):
    global written
    written += 1
    if written == 5:
        print("half", flush=True)
        sys.stdin.read()  # killed here
    return plain(tensor)

state.as_bytes = dying
state.save_state(sys.argv[1], model, optimizer, {"step": 2})
"""


def test_killed_while_saving_leaves_the_state_before(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "s")],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"half\n"
        child.kill()
    assert load_state(tmp_path / "s", *fresh(seed=1)) == {"step": 1}


def test_accumulation_weighs_every_token_the_same() -> None:
    def gradients(batches: list[torch.Tensor]) -> tuple[float, list[torch.Tensor]]:
        model, _ = fresh()
        loss = accumulate(model, batches)
        return loss, [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    rows = torch.randint(19, (4, 12), generator=torch.Generator().manual_seed(0))
    whole, together = gradients([rows])
    for pieces in (list(rows.split(1)), [rows[:3], rows[3:]]):
        loss, apart = gradients(pieces)
        assert abs(loss - whole) < 1e-6  # the same 44 numbers of about 3, added in another order
        for one, other in zip(apart, together, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    uneven = [rows[:1, :3], rows[1:, :]]
    model, _ = fresh()
    tokens = sum(batch[:, 1:].numel() for batch in uneven)
    expected = sum(next_token_loss(model(batch), batch).item() * batch[:, 1:].numel() for batch in uneven) / tokens
    assert abs(gradients(uneven)[0] - expected) < 1e-6


def test_one_batch_is_learnt_by_heart() -> None:
    model, optimizer = fresh()
    tokens = torch.randint(19, (2, 16), generator=torch.Generator().manual_seed(0))
    for _ in range(150):
        loss = accumulate(model, [tokens])
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1


def test_a_loss_that_is_no_number_is_named_before_the_weights_change() -> None:
    model, _ = fresh()
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    with pytest.raises(NumericsError, match="the loss is nan; lower the learning rate"):
        accumulate(model, [torch.zeros(1, 4, dtype=torch.int64)])


def test_trying_out_precisions_leaves_no_trace() -> None:
    model, _ = fresh()
    before, random = [parameter.clone() for parameter in model.parameters()], torch.get_rng_state()
    assert faster_precision(model, torch.zeros(2, 8, dtype=torch.int64)) in ("float32", "bfloat16")
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, model.parameters(), strict=True))
    assert torch.equal(random, torch.get_rng_state())


def test_a_clock_of_steps_goes_from_the_first_half_step_to_the_last() -> None:
    clock = Clock(steps=4)
    seen = []
    while not clock.over:
        seen.append(clock.done)
        clock.tick()
    assert seen == [0.125, 0.375, 0.625, 0.875] and clock.count == clock.total == 4


def test_a_clock_of_minutes_counts_all_parts_of_a_run() -> None:
    clock = Clock(minutes=0.5)
    assert clock.unit == "s" and clock.total == 30 and not clock.over
    clock.resume(step=12, seconds=29.0)
    assert clock.step == 12 and 29 / 30 <= clock.done < 1
    clock.resume(step=12, seconds=31.0)
    assert clock.over and clock.done == 1.0


@pytest.mark.parametrize("length", [{}, {"steps": 1, "minutes": 1.0}, {"steps": 0}, {"minutes": 0.0}, {"steps": -3}])
def test_a_clock_needs_one_length(length: dict[str, int]) -> None:
    with pytest.raises(InputError):
        Clock(**length)  # type: ignore[arg-type]


def test_the_first_interrupt_asks_and_the_second_insists() -> None:
    handler = signal.getsignal(signal.SIGINT)
    with interruptible() as asked:
        assert not asked.is_set()
        os.kill(os.getpid(), signal.SIGINT)
        deadline = time.monotonic() + 5
        while not asked.is_set() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert asked.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is handler
