"""kill -9 at any moment, then `--resume`: the weights are those of the run that was never killed, to the last bit.

Moments are drawn at random over the whole life of a run, start and end included; and, since a random moment rarely
falls between two system calls, every fsync, rename and removal of the last steps is tried one after the other.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.training.forks import STATE, STEPS, WEIGHTS, Forks, Runs


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with Forks(tmp_path_factory.mktemp("forks")) as made:
        yield made


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(forks, tmp_path_factory.mktemp("runs"), ("--optimizer", request.param))


BOTH = pytest.mark.parametrize("runs", ["adamw", "adamw8"], indirect=True)
PLAIN = pytest.mark.parametrize("runs", ["adamw"], indirect=True)


def kill_at_random(runs: Runs, kills: int, seed: int) -> None:
    """One run for each kill, at a moment drawn from its own stretch of the life of a run."""
    draw, life, hits, resumed = random.Random(seed), runs.life, 0, 0
    while hits < kills:
        moment = life * (hits + draw.random()) / kills
        output = runs.fresh()
        if runs.into(output, kill_after=moment).status != -9:
            life *= 0.98  # it was quicker than the first
            continue
        hits += 1
        resumed += (output / STATE).exists()
        runs.finish(output)
        runs.check(output)
    assert resumed, "no kill found a state to go on from"


@BOTH
def test_killed_at_two_random_moments(runs: Runs) -> None:
    kill_at_random(runs, 2, seed=0)


@pytest.mark.slow
@BOTH
def test_killed_at_twenty_random_moments(runs: Runs) -> None:
    kill_at_random(runs, 20, seed=1)


@pytest.mark.slow
@BOTH
def test_killed_again_and_again(runs: Runs) -> None:
    """One run, killed every few steps, and now and then before it could save anything new."""
    output, draw, lives = runs.fresh(), random.Random(2), 0
    while not (output / "adapter_config.json").exists():
        resume = ["--resume"] if (output / STATE).exists() else []
        runs.into(output, *resume, events=str(runs.log), die_before=draw.randint(1, 20))
        lives += 1
    runs.finish(output)
    assert lives > STEPS // 7, "a save is three events, so no life made more than seven steps"
    runs.check(output)


def kill_resumed(runs: Runs, begun: Path, event: int) -> None:
    """Go on, be killed before that event, go on again."""
    output = runs.fresh()
    shutil.copytree(begun, output)
    assert runs.into(output, "--resume", events=str(runs.log), die_before=event).status == -9
    runs.finish(output)
    runs.check(output)


def events_of_resumed(runs: Runs, begun: Path) -> list[str]:
    output = runs.fresh()
    shutil.copytree(begun, output)
    assert runs.into(output, "--resume", events=str(runs.log)).status == 0
    runs.check(output)
    return runs.log.read_text().splitlines()


@PLAIN
def test_killed_around_the_end(runs: Runs) -> None:
    """Right after the last step was saved; halfway through the adapter; with all written and the state still there."""
    begun = runs.killed_after_saving(STEPS)
    assert any(name.endswith(".minillm") for name in os.listdir(begun)), "the kill left no half-written file"
    events = events_of_resumed(runs, begun)
    for event in ("replace adapter_config.json", f"unlink {STATE}"):
        kill_resumed(runs, begun, 1 + events.index(event))


@pytest.mark.slow
@BOTH
def test_killed_before_every_call_of_the_last_save_and_the_end(runs: Runs) -> None:
    begun = runs.killed_after_saving(STEPS - 1)
    events = events_of_resumed(runs, begun)
    assert f"replace {STATE}" in events and f"replace {WEIGHTS}" in events
    for event in range(1, 2 + events.index(f"unlink {STATE}")):
        kill_resumed(runs, begun, event)


@PLAIN
def test_a_run_killed_before_its_first_state_starts_anew(runs: Runs) -> None:
    output = runs.fresh()
    first = 1 + runs.events.index(f"replace {STATE}")
    assert runs.into(output, events=str(runs.log), die_before=first).status == -9
    left = os.listdir(output)
    assert STATE not in left and any(name.startswith(f".{STATE}.") for name in left)
    runs.finish(output)
    runs.check(output)


@PLAIN
def test_a_finished_run_is_not_resumed(runs: Runs) -> None:
    before = {name: (runs.straight / name).read_bytes() for name in os.listdir(runs.straight)}
    for flags in ([], ["--resume"]):
        refused = runs.into(runs.straight, *flags)
        assert (refused.status, refused.said.count("\n")) == (2, 1)
        assert refused.said.startswith(f"error: {runs.straight}: holds a finished run")
    assert before == {name: (runs.straight / name).read_bytes() for name in os.listdir(runs.straight)}


@PLAIN
def test_what_looks_finished_can_be_used(runs: Runs) -> None:
    """Killed when the adapter's config has just appeared, with no state to go on from: tokenizer and weights are
    there."""
    output, no_state = runs.fresh(), ("--save-minutes", "99")
    assert runs.into(runs.fresh(), *no_state, events=str(runs.log)).status == 0
    appeared = 1 + runs.log.read_text().splitlines().index("replace adapter_config.json")
    assert runs.into(output, *no_state, events=str(runs.log), die_before=appeared + 1).status == -9
    assert STATE not in os.listdir(output)
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} < set(os.listdir(output))
    assert (output / WEIGHTS).read_bytes() == (runs.straight / WEIGHTS).read_bytes()
