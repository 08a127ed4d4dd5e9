"""What is taught of a text: from the true boundary on, with its end, once for every turn of the assistant."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import pytest

from minillm.data.boundaries import encode
from minillm.data.bpe import bytes_per_token
from minillm.data.formats import Completion, Conversation
from minillm.data.tokenizer import Tokenizer
from minillm.errors import InputError, TokenizerError
from tests import texts

BOS, EOS = 0, 1  # of texts.byte_level("llama3")

#: name -> a template whose {% generation %} says which tokens are the assistant's.
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|begin|>assistant\n"
        "{% generation %}{{ m.content }}<|end|>{% endgeneration %}{{ '\\n' }}"
        "{% else %}<|begin|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|begin|>assistant\n{% endif %}"
    ),
    # No prompt of its own for the answer; the answer begins with a space, which joins the first word's token.
    "llama 2": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
        "{% elif m.role == 'system' %}<<SYS>>{{ m.content }}<</SYS>>"
        "{% else %}{% generation %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endgeneration %}{% endif %}"
        "{% endfor %}"
    ),
    # The text ends in EOS where no answer is asked for, and in the prompt for one where it is.
    "phi 3": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>\n"
        "{% generation %}{{ m.content }}<|pad|>{% endgeneration %}{{ '\\n' }}"
        "{% else %}<|{{ m.role }}|>\n{{ m.content }}<|pad|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
    ),
    # The last turn is written otherwise than the others.
    "tulu": (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>\n"
        "{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% if not loop.last %}\n{% endif %}"
        "{% else %}<|{{ m.role }}|>\n{{ m.content }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
}


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


CONVERSATIONS = {
    "one turn": [message("user", "Hello world"), message("assistant", "The cat saw it.")],
    "three turns": [
        message("system", "dog"),
        *(message("user", "yes"), message("assistant", "yes")),  # the same text, taught in one place only
        *(message("user", "naïve\n12"), message("assistant", "你好 world\n\nx = 1 ")),
        *(message("user", "?"), message("assistant", "1234567890")),
    ],
    "ends in a question": [message("user", "a"), message("assistant", "b c"), message("user", "d")],
}


def tokenizer(template: str | None = None, **named: str) -> Tokenizer:
    names = named or {"bos": "<|begin|>", "eos": "<|end|>", "pad": "<|pad|>"}
    return Tokenizer.from_tokenizers(texts.byte_level(), chat_template=template, **names)


def taught_text(sample: Completion | Conversation, by: Tokenizer) -> str:
    ids, taught = encode(sample, by)
    assert len(ids) == len(taught) and not taught[0]
    return by.decode([i for i, learn in zip(ids, taught, strict=True) if learn], skip_special=False)


def test_a_completion_is_taught_with_its_end() -> None:
    by = tokenizer()
    ids, taught = encode(Completion("Hello", " world"), by)
    assert ids == [*by.encode("Hello world"), EOS] and ids.count(BOS) == 1
    assert taught == [False] * len(by.encode("Hello")) + [True] * (len(ids) - len(by.encode("Hello")))
    assert taught_text(Completion("Hello", " world"), by) == " world<|end|>"


def test_a_token_across_the_boundary_is_taught() -> None:
    """T12: `w|orld` joins to one token, so that len(encode(prompt)) would skip the answer's first letters."""
    by = tokenizer()
    prompt, completion = "Hello w", "orld saw"
    whole, alone = by.encode(prompt + completion), by.encode(prompt)
    assert whole[: len(alone)] != alone, "the example no longer joins across the boundary"
    assert taught_text(Completion(prompt, completion), by) == " world saw<|end|>"


@pytest.mark.parametrize("cut", range(1, 41))
def test_the_boundary_is_exact_wherever_it_is(cut: int) -> None:
    """In bytes: what is not taught ends within the prompt, and what is taught of the prompt is a part of one token.

    Only blanks at its end may be whole tokens: several are read as one, until a word follows and takes the last.
    """
    text = "The cat  saw 1234 naïve 你好 worlds\n\n  x ** 2"
    by = tokenizer()
    ids, taught = encode(Completion(text[:cut], text[cut:]), by)
    begin, ends = taught.index(True), bytes_per_token(texts.byte_level())[ids].cumsum(0)
    size = len(text[:cut].encode())
    assert ends[begin - 1] <= size
    assert not text.encode()[ends[begin - 1] : ends[ends <= size].max()].strip()
    assert all(taught[begin:])


def test_a_text_is_taught_whole_but_for_its_first_token() -> None:
    by = tokenizer()
    assert encode(Completion("", "Hello"), by)[1] == [False] + [True] * len(by.encode("Hello", bos=False)) + [True]
    by = Tokenizer.from_tokenizers(texts.byte_level("falcon"), eos="<|endoftext|>")
    ids, taught = encode(Completion("", "Hello world"), by)
    assert ids == [*by.encode("Hello world"), by.eos_id] and taught == [False] + [True] * (len(ids) - 1)


def test_the_end_is_taught_though_it_is_padding_too() -> None:
    """T10: Falcon and many others pad with EOS; bos is the same token here as well, as in GPT-2."""
    by = tokenizer(bos="<|end|>", eos="<|end|>", pad="<|end|>")
    ids, taught = encode(Completion("a<|end|>", "b"), by)
    assert [at for at, i in enumerate(ids) if i == EOS] == [0, 2, 4]
    assert taught == [False, False, False, True, True]


@pytest.mark.parametrize("adds", [{}, {"suffix": True}])
@pytest.mark.parametrize("completion", ["b c", "b c<|end|>"])
def test_there_is_one_end_whoever_writes_it(adds: dict[str, bool], completion: str, tmp_path: Path) -> None:
    """The record, the checkpoint (`add_eos_token`) or we; and none between prompt and completion."""
    by = tokenizer()
    if adds:
        by.save(tmp_path)
        config = (tmp_path / "tokenizer_config.json").read_text()
        (tmp_path / "tokenizer_config.json").write_text(config.replace("{", '{"add_eos_token": true,', 1))
        by = Tokenizer.load(tmp_path)
        assert by.encode("a")[-1] == EOS
    ids, taught = encode(Completion("a<|end|>", completion), by)
    assert ids == [*tokenizer().encode("a<|end|>b c"), EOS]
    assert taught == [False] * 3 + [True] * (len(ids) - 3)


def test_one_bos_and_two_are_an_error() -> None:
    """T11, in text and in a template."""
    by = tokenizer()
    assert encode(Completion("<|begin|>a", "b"), by) == encode(Completion("a", "b"), by)
    with pytest.raises(InputError, match=r"two BOS tokens \('<\|begin\|>'\)"):
        encode(Completion("<|begin|><|begin|>a", "b"), by)
    chat = Conversation(CONVERSATIONS["one turn"])
    assert encode(chat, tokenizer(TEMPLATES["llama 2"]))[0].count(BOS) == 1
    with pytest.raises(InputError, match="two BOS tokens"):
        encode(chat, tokenizer("{{ bos_token }}" + TEMPLATES["llama 2"]))


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("title", CONVERSATIONS)
def test_each_answer_is_taught_with_its_end(name: str, title: str) -> None:
    """Once each, in order, and nothing of anybody else's. Phi 3 ends a conversation as a whole, too."""
    sample = Conversation(CONVERSATIONS[title])
    by = tokenizer(TEMPLATES[name])
    mark = "<|pad|>" if name == "phi 3" else "<|end|>"
    answers = [m["content"] for m in sample.messages if m["role"] == "assistant"]
    written = [f" {answer.strip()} {mark}" if name == "llama 2" else answer + mark for answer in answers]
    last = "\n<|end|>" if name == "phi 3" and title != "ends in a question" else ""
    assert taught_text(sample, by) == "".join(written) + last
    assert encode(sample, by)[0] == by.chat(sample.messages, add_generation_prompt=False)


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["chatml", "llama 2", "tulu"])
@pytest.mark.parametrize("title", CONVERSATIONS)
def test_masks_are_transformers_own(name: str, title: str) -> None:
    """Where a template marks its answers, transformers reads the marks; we read none."""
    transformers = pytest.importorskip("transformers")
    by = transformers.PreTrainedTokenizerFast(
        tokenizer_object=texts.byte_level(), bos_token="<|begin|>", eos_token="<|end|>", pad_token="<|pad|>"
    )
    by.chat_template = TEMPLATES[name]
    theirs = by.apply_chat_template(CONVERSATIONS[title], return_assistant_tokens_mask=True, return_dict=True)
    ids, taught = encode(Conversation(CONVERSATIONS[title]), tokenizer(TEMPLATES[name]))
    assert ids == theirs["input_ids"]
    assert taught == [bool(mark) for mark in theirs["assistant_masks"]]


@pytest.mark.parametrize("title", CONVERSATIONS)
def test_sentencepiece_answers_keep_their_letters(title: str, tmp_path: Path) -> None:
    """Llama 2 as it was released: spaces are part of the tokens, rare letters are bytes."""
    pytest.importorskip("sentencepiece")
    (tmp_path / "tokenizer.model").write_bytes(texts.sentencepiece_bytes())
    by = Tokenizer.load(tmp_path)
    by.chat_template = TEMPLATES["llama 2"]
    ids, taught = encode(Conversation(CONVERSATIONS[title]), by)
    answers = [m["content"].strip() for m in CONVERSATIONS[title] if m["role"] == "assistant"]
    runs = [[i for i, _ in run] for learn, run in groupby(zip(ids, taught, strict=True), lambda pair: pair[1]) if learn]
    assert [by.decode(run).strip() for run in runs] == answers
    assert [run[-1] for run in runs] == [by.eos_id] * len(answers)
    prompt, completion = "The cat saw", " it. 你好"
    ids, taught = encode(Completion(prompt, completion), by)
    assert ids == [*by.encode(prompt + completion), by.eos_id] and ids.count(by.bos_id) == 1
    assert by.decode([i for i, learn in zip(ids, taught, strict=True) if not learn]) == prompt


def test_turns_before_the_first_are_not_taught() -> None:
    sample = Conversation(CONVERSATIONS["three turns"], first=3)
    assert taught_text(sample, tokenizer(TEMPLATES["tulu"])) == "你好 world\n\nx = 1 <|end|>1234567890<|end|>"


def test_tools_reach_the_template() -> None:
    template = "{{ tools[0].name }}" + TEMPLATES["chatml"]
    ids, _ = encode(Conversation(CONVERSATIONS["one turn"], tools=[{"name": "f12"}]), tokenizer(template))
    assert tokenizer().decode(ids).startswith("f12")


def test_a_template_without_an_end_gets_one() -> None:
    plain = (
        "{% for m in messages %}{{ '\n' + m.role + ': ' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\nassistant:' }}{% endif %}"
    )
    assert taught_text(Conversation(CONVERSATIONS["one turn"]), tokenizer(plain)) == " The cat saw it.<|end|>"
    asked = Conversation(CONVERSATIONS["ends in a question"])
    assert taught_text(asked, tokenizer(plain)) == " b c", "the end of a question was taught"


@pytest.mark.parametrize("end", ["", "{{ eos_token }}"])
def test_a_mark_inside_an_answer_is_not_its_end(end: str) -> None:
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}" + end + "{% endfor %}"
    by = tokenizer(template + "{% if add_generation_prompt %}[assistant]{% endif %}")
    sample = Conversation([message("user", "a"), message("assistant", "b<|pad|> c")])
    assert taught_text(sample, by) == "b<|pad|> c<|end|>"


def test_an_opened_thought_is_no_boundary() -> None:
    """DeepSeek's prompt for an answer goes on with <think>, which the answers of a data set lack."""
    template = TEMPLATES["chatml"].replace(
        "<|begin|>assistant\n{% endif %}", "<|begin|>assistant\n<think>\n{% endif %}"
    )
    assert "<think>" in tokenizer(template).render_chat(CONVERSATIONS["one turn"])
    assert taught_text(Conversation(CONVERSATIONS["one turn"]), tokenizer(template)) == "The cat saw it.<|end|>"


@pytest.mark.parametrize(
    "template",
    [
        # the system message stands in the last question (Mistral)
        "{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}"
        "{% for m in messages %}{% if m.role == 'user' %}"
        "[{% if loop.index == asked | length * 2 %}{{ messages[0].content }}{% endif %}{{ m.content }}]"
        "{% elif m.role == 'assistant' %}{{ m.content }}<|end|>{% endif %}{% endfor %}",
        # a turn that is not the last has its beginning cut off (Qwen3's thoughts)
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "<|begin|>assistant\n{{ m.content if loop.last else m.content[2:] }}<|end|>"
        "{% else %}<|begin|>{{ m.role }}\n{{ m.content }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|begin|>assistant\n{% endif %}",
    ],
    ids=["moved system", "cut answers"],
)
def test_a_rewritten_turn_is_refused(template: str) -> None:
    with pytest.raises(InputError, match=r"`messages\[2\]`: the chat template rewrites it.*a record of each answer"):
        encode(Conversation(CONVERSATIONS["three turns"]), tokenizer(template))


def test_a_beginning_that_is_rewritten_is_refused() -> None:
    """The whole text does go on as the answer does, but what comes before it never stood so in a prompt."""
    template = "{{ messages | length }} messages " + TEMPLATES["chatml"]
    with pytest.raises(InputError, match=r"`messages\[1\]`: the chat template rewrites it, or what precedes it"):
        encode(Conversation(CONVERSATIONS["one turn"]), tokenizer(template))


def test_what_the_template_says_is_the_records_fault() -> None:
    refusing = "{{ raise_exception('roles must alternate') }}"
    for template, expected in ((refusing, "roles must alternate"), ("{{ messages[9].content }}", "fails on these")):
        with pytest.raises(InputError, match=expected):
            encode(Conversation(CONVERSATIONS["one turn"]), tokenizer(template))


def test_what_gives_nothing_to_teach_is_refused() -> None:
    with pytest.raises(TokenizerError, match="names no EOS token"):
        encode(Completion("a", "b"), tokenizer(bos="<|begin|>"))
    with pytest.raises(InputError, match="no token is left to be taught"):
        encode(Conversation(CONVERSATIONS["one turn"][:1]), tokenizer(TEMPLATES["tulu"]))
    with pytest.raises(TokenizerError, match="no chat template"):
        encode(Conversation(CONVERSATIONS["one turn"]), tokenizer())
