"""`minillm plot`: what is read from a run's folder, what is in the picture, and what is said to bad input."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from minillm import cli
from minillm.training.history import read_histories, read_history, short_names
from minillm.training.picture import _MOST, _thin, draw, draw_curve, panels, smooth

figure = pytest.importorskip("matplotlib.figure")


def write(folder: Path, steps: int = 100, *, end: str = "", finished: bool = True, **more: float) -> Path:
    """A run whose loss is 10 / step, with looks at steps 0 and every 50; 64 tokens and 3 seconds a step."""
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, float]] = [{"step": 0, "held_out": 11.0}]
    for step in range(1, steps + 1):
        lines.append({"step": step, "tokens": 64 * step, "seconds": 3.0 * step, "loss": 10 / step, "memory": 2e9})
        lines[-1] |= {"learning_rate": 1e-5 * step, "gradient_norm": 100 / step, "tokens_per_second": 9000.0, **more}
        if step % 50 == 0:
            lines.append({"step": step, "seconds": 3.0 * step, "held_out": 11 / step})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + end)
    if finished:
        (folder / "config.json").touch()
    return folder


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The figures that are saved, laid out as they are saved."""
    found: list[Any] = []
    save = figure.Figure.savefig
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *a, **k: (found.append(self), save(self, *a, **k)))
    yield found


def test_a_run_is_read_along_steps_tokens_or_minutes(tmp_path: Path) -> None:
    folder = write(tmp_path / "demo")
    for x, places in (("step", [0, 50, 100]), ("tokens", [0, 3200, 6400]), ("minutes", [0, 2.5, 5.0])):
        found = read_history(folder, x)  # type: ignore[arg-type]
        assert found.series["held_out"] == (places, [11.0, 0.22, 0.11])
        assert found.series["loss"][0][-1] == places[-1] and len(found.series["loss"][1]) == 100
    assert (found.name, found.step, found.finished) == ("demo", 100, True)
    assert not {"step", "tokens", "seconds"} & found.series.keys()


def test_a_run_that_trains_is_read_without_its_half_line(tmp_path: Path) -> None:
    found = read_history(write(tmp_path, 20, end='{"step": 21, "los', finished=False))
    assert found.step == 20 and not found.finished


def test_numbers_that_are_none_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": null, "kl": 0.5, "note": "x", "on": true}\n{"step": 2, "loss": 3, "kl": NaN}\n'
    )
    assert read_history(tmp_path).series == {"kl": ([1.0], [0.5]), "loss": ([2.0], [3.0])}


def test_a_finished_run_from_before_there_were_metrics(tmp_path: Path) -> None:
    run = {"losses": [4.0, 3.0], "evaluated": [[0, 5.0], [2, 3.5]], "steps": 2, "tokens": 128, "seconds": 6.0}
    (tmp_path / "training.json").write_text(json.dumps(run))
    assert read_history(tmp_path, "tokens").series == {
        "held_out": ([0.0, 128.0], [5.0, 3.5]),
        "loss": ([64.0, 128.0], [4.0, 3.0]),
    }


@pytest.mark.parametrize(
    ("files", "x", "said"),
    [
        (None, "step", "no such folder"),
        ({}, "step", "holds no metrics.jsonl and no training.json"),
        ({"metrics.jsonl": ""}, "step", "no step is finished yet"),
        ({"metrics.jsonl": '{"step": 1, "los'}, "step", "no step is finished yet"),
        ({"metrics.jsonl": '{"step": 1, "loss": 1}\nx\n{"step": 3}\n'}, "step", "line 2 is no JSON object with a step"),
        ({"metrics.jsonl": '{"step": 1, "loss": 1}\n'}, "tokens", "its lines do not say tokens; choose --x step"),
        ({"metrics.jsonl": '{"step": 1, "loss": 1}\n'}, "minutes", "its lines do not say seconds; choose --x step"),
        ({"training.json": "{"}, "step", "training.json: is not what a run writes"),
        ({"training.json": '{"losses": 3}'}, "step", "training.json: is not what a run writes"),
        ({"training.json": "[]"}, "step", "training.json: is not what a run writes"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], files: dict[str, str] | None, x: str, said: str
) -> None:
    folder = tmp_path / "run"
    if files is not None:
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
    assert cli.main(["plot", str(folder), "--x", x]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("minillm: ") and printed.err.count("\n") == 1 and said in printed.err
    assert not list(tmp_path.rglob("*.png")) and printed.out == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no run is given"),
        (["{run}", "--out", "x.pdf"], "give a name that ends in .png"),
        (["{run}", "--out", "none/x.png"], "there is no folder none"),
    ],
)
def test_where_to_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    run = write(tmp_path, 3)
    assert cli.main(["plot", *(argument.format(run=run) for argument in arguments)]) == 2
    assert said in capsys.readouterr().err


def test_without_matplotlib_it_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run = write(tmp_path, 3)
    assert cli.main(["plot", str(run)]) == 2
    assert 'pip install -e ".[plot]"' in capsys.readouterr().err
    told: list[str] = []
    assert draw_curve(run, title="", say=told.append) is None and "pip install" in told[0]


def test_the_command_writes_a_png_and_says_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = write(tmp_path / "a"), write(tmp_path / "b", finished=False)
    monkeypatch.chdir(tmp_path)
    for arguments, file in (
        ([str(first)], first / "curve.png"),
        ([str(first), str(second)], Path("curves.png")),
        ([str(first), "--out", "x.png", "--x", "minutes"], Path("x.png")),
    ):
        assert cli.main(["plot", *arguments]) == 0
        assert capsys.readouterr().out == f"{file}\n" and file.read_bytes().startswith(b"\x89PNG")


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["plot", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "minillm plot runs/sft" in printed and "--out" in printed and "minutes" in printed


def test_the_loss_is_large_with_its_held_out_points(tmp_path: Path, drawn: list[Any]) -> None:
    draw_curve(write(tmp_path / "demo"), title="the title", say=pytest.fail)
    large, *small = drawn[0].axes
    assert large.get_title() == "the title" and "loss" in large.get_ylabel() and large.get_xlabel() == "step"
    raw, smoothed, held_out = large.get_lines()
    assert list(raw.get_ydata()) == [10 / step for step in range(1, 101)]
    assert list(smoothed.get_ydata()) == smooth([10 / step for step in range(1, 101)])
    assert [list(held_out.get_xdata()), list(held_out.get_ydata())] == [[0, 50, 100], [11.0, 0.22, 0.11]]
    assert [each.get_title(loc="left") for each in small] == [
        *("learning rate", "gradient norm, before clipping", "tokens a second", "peak of memory, GB"),
    ]
    assert small[1].get_yscale() == "log" and list(small[3].get_lines()[0].get_ydata()) == [2.0] * 100


def test_several_runs_have_names_and_colours_of_their_own(tmp_path: Path, drawn: list[Any]) -> None:
    folders = [write(tmp_path / name / "sft", 60, finished=name != "c") for name in "abc"]
    draw(read_histories(folders), tmp_path / "x.png")
    labels = [each.get_text() for each in drawn[0].legends[0].get_texts()]
    assert [label.split(":")[0] for label in labels] == ["a/sft", "b/sft", "c/sft", "held out"]
    assert labels[2].endswith("step 60, unfinished") and "unfinished" not in labels[0] + labels[1]
    lines = drawn[0].axes[0].get_lines()
    assert [line.get_color() for line in lines[::3]] == [line.get_color() for line in lines[2::3]]
    assert len({line.get_color() for line in lines}) == 3


def test_whatever_else_is_a_number_has_a_panel(tmp_path: Path, drawn: list[Any]) -> None:
    folder = tmp_path / "ppo"
    folder.mkdir()
    lines = [{"step": step, "kl": 0.1, "reward": step, "value_loss": 1.0, "learning_rate": 1e-5} for step in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert panels([read_history(folder)]) == ("reward", ["learning_rate", "kl", "value_loss"])
    draw([read_history(folder)], tmp_path / "x.png")
    assert [axes.get_title(loc="left") for axes in drawn[0].axes[1:]] == ["learning rate", "kl", "value loss"]


@pytest.mark.parametrize("runs", [1, 2, 9])
def test_nothing_overlaps(tmp_path: Path, drawn: list[Any], runs: int) -> None:
    """The legend, and each panel with its numbers, title and labels, have room of their own."""
    more = {f"number_{at}": 1234.5 for at in range(5)}
    folders = [write(tmp_path / f"a_long_name_of_a_run_{at}", 30, finished=False, **more) for at in range(runs)]
    draw(read_histories(folders), tmp_path / "x.png", title="A title that is there")
    canvas = pytest.importorskip("matplotlib.backends.backend_agg").FigureCanvasAgg(drawn[0])
    canvas.draw()
    renderer = canvas.get_renderer()
    boxes = [axes.get_tightbbox(renderer) for axes in drawn[0].axes]
    boxes.append(drawn[0].legends[0].get_window_extent(renderer))
    for one, other in combinations(boxes, 2):
        assert not one.overlaps(other)
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= drawn[0].bbox.x1 for box in boxes)
    for axes in drawn[0].axes:
        numbers = [text.get_window_extent(renderer) for text in axes.get_xticklabels() if text.get_text()]
        assert not any(one.overlaps(other) for one, other in combinations(numbers, 2))


def test_smoothing_is_a_mean_of_what_was(tmp_path: Path) -> None:
    assert smooth([4.0, 2.0]) == [4.0, 2.0]
    values = [float(step % 2) for step in range(40)]
    assert smooth(values)[:3] == [0.0, 0.5, pytest.approx(1 / 3)] and smooth(values)[-1] == pytest.approx(0.6)
    assert smooth([1.0] * 50 + [0.0] * 950)[59] == pytest.approx(10 / 20)  # 2% of 1000


def test_a_long_run_is_thinned_and_keeps_its_spikes() -> None:
    values = [0.0] * 100_000
    values[12_345], values[77_777] = 9.0, -9.0
    places, thinned = _thin(list(map(float, range(100_000))), values)
    assert len(thinned) <= _MOST and places == sorted(places)
    assert dict(zip(places, thinned, strict=True))[12_345] == 9.0 and min(thinned) == -9.0


def test_names_are_as_short_as_tells_them_apart(tmp_path: Path) -> None:
    assert short_names([tmp_path / "a/x/r", tmp_path / "b/x/r"]) == ["a/x/r", "b/x/r"]
    assert short_names([tmp_path / "a/x", tmp_path / "b/y"]) == ["x", "y"]
    assert short_names([tmp_path / "a", tmp_path / "a"]) == ["a", "a"]
