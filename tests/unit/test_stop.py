"""Stop strings, wherever the text is cut into pieces."""

from __future__ import annotations

import itertools

import pytest

from minillm.generation.stop import StopStrings


def run(strings: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    stop, out = StopStrings(strings), []
    for piece in pieces:
        out.append(stop.push(piece))
        if stop.found:
            return out, True
    return [*out, stop.finish()], False


def cuts(text: str) -> list[list[str]]:
    """Every way to cut a text into pieces."""
    places = range(1, len(text))
    chosen = itertools.chain.from_iterable(itertools.combinations(places, n) for n in range(len(text)))
    return [[text[a:b] for a, b in itertools.pairwise((0, *cut, len(text)))] for cut in chosen]


@pytest.mark.parametrize(
    ("string", "text", "before"),
    [
        ("END", "a ENDing", "a "),
        ("END", "ENDEND", ""),
        ("aab", "caaab", "ca"),  # a beginning inside a beginning
        ("abab", "aabaabab", "aaba"),
        ("\n\n", "a\nb\n\nc", "a\nb"),
        ("x", "abx", "ab"),
    ],
)
def test_found_in_every_cut_and_never_shown(string: str, text: str, before: str) -> None:
    for pieces in cuts(text):
        out, found = run([string], pieces)
        assert found and "".join(out) == before, pieces


@pytest.mark.parametrize("text", ["the E", "EN EN E", "E", "ENENEN", "an ED"])
def test_what_only_looks_like_a_beginning_comes_out_whole(text: str) -> None:
    for pieces in cuts(text):
        out, found = run(["END"], pieces)
        assert not found and "".join(out) == text, pieces


def test_no_more_is_held_back_than_must_be() -> None:
    stop = StopStrings(["END", "\n\n"])
    assert [stop.push(piece) for piece in ("ab", "E", "N", "x", "\n", "c")] == ["ab", "", "", "ENx", "", "\nc"]


def test_the_first_to_appear_wins() -> None:
    assert run(["later", "b"], ["a b later"]) == (["a "], True)
    assert run(["bc", "b"], ["ab"]) == (["a"], True)


def test_nothing_to_stop_at_holds_nothing_back() -> None:
    assert run([], ["a", "", "b"]) == (["a", "", "b", ""], False)


def test_finish_empties_it() -> None:
    stop = StopStrings(["END"])
    assert stop.push("EN") == ""
    assert stop.finish() == "EN"
    assert stop.finish() == ""
