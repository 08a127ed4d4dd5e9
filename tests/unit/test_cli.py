"""The command as a person meets it: what it prints, where, and with which exit status."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import minillm
from minillm import cli
from minillm.cli import write
from tests import tiny_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint.write(tmp_path_factory.mktemp("model"))


def test_generate_prints_the_text_of_the_library_and_nothing_else(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = cli.main(["generate", str(folder), "def main", "--top-k", "5", "--max-new-tokens", "12", "--seed", "3"])
    printed = capsys.readouterr()
    model, tokenizer = minillm.load(folder)
    (answer,) = minillm.generate(model, tokenizer, "def main", top_k=5, max_new_tokens=12, seed=3)
    assert (status, printed.out) == (0, answer.text + "\n")
    assert f"[{len(answer.tokens)} tokens" in printed.err


def test_the_falcon_quickstart_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """do_sample, top_k 10, max_length, num_return_sequences, as in Falcon's launch post."""
    arguments = ["generate", str(folder), "def", "--top-k", "10", "--max-length", "20", "--num-return-sequences", "2"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.count("---\n") == 2


def test_generate_reads_standard_input(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("def main"))
    assert cli.main(["generate", str(folder), "-", "--max-new-tokens", "5"]) == 0
    piped = capsys.readouterr().out
    assert cli.main(["generate", str(folder), "def main", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out == piped


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "no/such/folder", "x"], "no such folder"),
        (["generate", "{folder}", "x", "--temperature", "0"], "temperature is 0.0"),
        (["generate", "{folder}", "x", "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["generate", "{folder}", "x", "--max-new-tokens", "-3"], "max_new_tokens is -3"),
        (["generate", "{folder}", "x " * 200], "shorten the prompt"),
        (["generate", "{folder}", ""], "no BOS token"),
        (["generate", "{folder}", "x", "--sample", "--greedy"], "contradict"),
        (["generate", "{folder}", "x", "--num-return-sequences", "0"], "num_return_sequences is 0"),
        (["generate", "{folder}", "x", "--device", "nowhere"], "nowhere"),
        (["info", "{folder}/config.json"], "config.json"),
        (["chat", "{folder}", "--chat-template", "none.jinja"], "none.jinja"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert cli.main([argument.format(folder=folder) for argument in arguments]) == 2
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("minillm: ") and said in lines[0], printed.err
    assert printed.out.strip() == ""


def test_debug_shows_where(folder: Path) -> None:
    with pytest.raises(minillm.MinillmError, match="max_new_tokens"):
        cli.main(["generate", str(folder), "x", "--max-new-tokens", "0", "--debug"])


def test_info_counts_without_reading_weights(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())  # and nothing else
    assert cli.main(["info", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    model, _ = minillm.load(folder)
    assert f"{sum(p.numel() for p in model.parameters()):,}" in printed
    assert "2 times smaller" in printed  # 4 query heads on 2
    assert "256 bytes a token" in printed  # 2 · 2 layers · 2 heads · 8 numbers · 4 bytes


def test_chat_remembers_and_resets(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[int] = []
    original = minillm.Tokenizer.chat

    def spy(self: minillm.Tokenizer, messages: list[dict[str, str]]) -> list[int]:
        prompts.append(len(messages))
        return original(self, messages)

    def says(lines: Iterator[str]) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    lines = iter(["def", "main", "/what", "/reset", "the", "/exit", "unheard"])
    monkeypatch.setattr(minillm.Tokenizer, "chat", spy)
    monkeypatch.setattr("builtins.input", lambda _: says(lines))
    assert cli.main(["chat", str(folder), "--max-new-tokens", "3", "--system", "be brief"]) == 0
    assert prompts == [2, 2, 4, 2]  # the check before the first question; system + user; + answer + user; reset
    assert "commands:" in capsys.readouterr().err


def test_chat_without_a_template_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_checkpoint.write(tmp_path, chat_template=None)
    assert cli.main(["chat", str(tmp_path)]) == 2
    assert "no chat template" in capsys.readouterr().err


def test_ctrl_c_ends_generate_quietly(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> Iterator[str]:
        yield "some"
        raise KeyboardInterrupt

    monkeypatch.setattr(write, "stream", interrupted)
    assert cli.main(["generate", str(folder), "x"]) == 130
    assert capsys.readouterr().out == "some\n"


@pytest.mark.parametrize("command", [[], ["generate"], ["chat"], ["info"]])
def test_help_teaches(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--help"])
    assert ended.value.code == 0
    assert "usage: minillm" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (  # Falcon-7B: num_kv_heads in its file is not to be read
            {"hidden_size": 4544, "num_attention_heads": 71, "num_kv_heads": 71, "multi_query": True},
            ("6,921,720,704", "8.19 kB a token", "71 times smaller"),
        ),
        (  # Falcon-40B
            {
                "hidden_size": 8192,
                "num_attention_heads": 128,
                "num_hidden_layers": 60,
                "num_kv_heads": 8,
                "new_decoder_architecture": True,
            },
            ("41,303,293,952", "123 kB a token", "16 times smaller"),
        ),
    ],
)
def test_info_shows_what_fewer_key_value_heads_save(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fields: dict[str, object], said: tuple[str, ...]
) -> None:
    """2 · layers · G · E numbers of 2 bytes: 2·32·1·64·2 = 8,192 and 2·60·8·64·2 = 122,880 bytes a token."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "falcon", **fields}))
    assert cli.main(["info", str(tmp_path)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert all(part in printed for part in said), printed
