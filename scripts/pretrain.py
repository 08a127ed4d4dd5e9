"""Train a small language model from nothing: any folder of text, any size.

    python scripts/pretrain.py                                            Python's own standard library, 3 minutes
    python scripts/pretrain.py --text ~/notes --steps 20000 --width 512   other text, a larger model, a repeatable run

    folder ─▶ documents ─▶ byte-pair vocabulary ─▶ one stream of ids ─▶ batches ─▶ AdamW ─▶ a folder transformers loads

Written: config.json, model.safetensors and the tokenizer (what `minillm generate` wants), curve.png, training.json; and
while it trains metrics.jsonl, which `minillm plot` draws.
Ctrl-C leaves a state that `--resume` continues; a run counted in steps then ends with the same bits as without a stop.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from tokenizers import Tokenizer as Pipeline

from minillm import Decoder, DecoderConfig, Tokenizer, load, stream
from minillm.atomic import write_atomically
from minillm.data.bpe import END_OF_TEXT, bytes_per_token
from minillm.data.corpus import Text, Windows, fingerprint, read_text
from minillm.errors import ConfigError, InputError
from minillm.model.init import initialise
from minillm.placement import as_device
from minillm.training import ranks
from minillm.training.evaluate import HeldOut, held_out
from minillm.training.loop import Clock, Precision, accumulate, clip_gradients, faster_precision, interruptible
from minillm.training.metrics import Metrics, need_tensorboard, peak_memory
from minillm.training.optim import adamw, set_learning_rate, warmup_cosine
from minillm.training.output import STATE, check_same, claim, clear, comparable, save_checked
from minillm.training.picture import draw_curve
from minillm.training.progress import Progress
from minillm.training.recipe import Interrupted, resume_command, run
from minillm.training.samples import overfitting
from minillm.training.state import load_state, read_progress, save_state


@dataclass(frozen=True)
class Pretrain:
    """The choices of a run. The defaults are what three minutes on two cores learn most from; see scripts/README.md."""

    text: Path | None = None
    """Folder of text; without one, the source of this Python's standard library."""
    output: Path = Path("runs/pretrain")
    """Where the model goes."""
    suffixes: tuple[str, ...] = (".py", ".txt", ".md", ".rst")
    """Endings of the files to read."""
    leave_out: tuple[str, ...] = ()
    """Names of folders not to enter, at any depth."""
    held_out: float = 0.05
    """Fraction of the files that is never trained on."""
    vocabulary: int = 4096
    """Tokens in the byte-pair vocabulary."""
    width: int = 192
    """Size of the residual stream, D."""
    layers: int = 4
    """Number of blocks, L."""
    heads: int = 3
    """Query heads, H; they share the width evenly."""
    kv_heads: int = 3
    """Key/value heads, G."""
    feed_forward: int = 512
    """Inner width of the gated mlp, F."""
    tied: bool = False
    """Use the embedding as the output head too: V · D parameters fewer."""
    context: int = 256
    """Tokens in a window, and the longest text the model will ever read."""
    minutes: float = 3.0
    """Length of the training, where `steps` is not given. The learning rate follows the time spent."""
    steps: int | None = None
    """Length in steps instead: the same result on every run of the same machine."""
    batch: int = 4
    """Windows in a step."""
    micro_batch: int | None = None
    """Windows that go through the model at once, where a batch does not fit the memory."""
    learning_rate: float = 2.5e-3
    """Peak of AdamW's learning rate; warm-up before, cosine to zero after."""
    warmup: float = 0.15
    """Fraction of the run in which the learning rate rises."""
    weight_decay: float = 0.1
    """Of the matrices; norms and embeddings are spared."""
    clip: float = 1.0
    """Longest gradient, all parameters taken as one vector."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the matrix products; auto tries both for a second and keeps the faster (with `steps`: float32)."""
    device: str = "cpu"
    """Where to train: cpu, cuda, cuda:1 ..."""
    seed: int = 0
    """Of the weights and of the order of the text."""
    evaluations: int = 6
    """How often the held-out loss is looked at on the way."""
    tensorboard: bool = False
    """Write the numbers of metrics.jsonl for TensorBoard too (pip install tensorboard)."""
    save_minutes: float = 10.0
    """How often a state is saved on the way."""
    prompts: tuple[str, ...] = ("def", "class", "    def __init__(self")
    """What the finished model is asked to continue. No blank at the end: it belongs to the word that follows."""
    resume: bool = False
    """Go on with the unfinished run in `output`, which must have the same recipe."""
    overwrite: bool = False
    """Start anew where `output` already holds a run."""

    def __post_init__(self) -> None:
        if self.tensorboard:
            need_tensorboard()
        for name in ("batch", "micro_batch", "learning_rate", "clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{name} is {value}; it must be above 0")
        for name in ("held_out", "warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}; it is a fraction, between 0 and 1")
        for name, least, most in (("heads", 1, self.width), ("evaluations", 0, 10**6), ("seed", 0, 2**32 - 1)):
            if not least <= getattr(self, name) <= most:
                raise InputError(f"{name} is {getattr(self, name)}; it must lie between {least} and {most}")


#: Fields that a continued run may change.
FREE = ("prompts", "save_minutes", "tensorboard")


class Run:
    """A recipe with its text read and its model made: everything that changes while training."""

    def __init__(self, recipe: Pretrain, text: Text) -> None:
        self.recipe, self.text = recipe, text
        self.windows = Windows(text.training, context=recipe.context, seed=recipe.seed)
        self.held = Windows(text.held_out, context=recipe.context, seed=recipe.seed)
        self.model = make_model(recipe, text.pipeline)
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.optimizer = adamw(self.model, learning_rate=recipe.learning_rate, weight_decay=recipe.weight_decay)
        self.losses: list[float] = []  # one a step
        self.evaluated: list[tuple[int, float]] = []  # (steps made, held-out loss)
        self.precision = self._precision()
        self.clock = Clock(steps=recipe.steps, minutes=recipe.minutes if recipe.steps is None else None)
        if recipe.resume:
            self._resume()
        resumed = self.clock.step if recipe.resume else None
        self.metrics = Metrics(recipe.output, resumed=resumed, tensorboard=recipe.tensorboard)

    def _precision(self) -> Precision:
        """As the recipe says; auto may look at the clock only where the run does too, so that steps repeat."""
        if self.recipe.precision != "auto":
            return self.recipe.precision
        if self.recipe.steps is not None or self.recipe.resume:
            return "float32"  # a resumed run takes that of its state
        return faster_precision(self.model, self.windows.batch(0, self.recipe.batch).to(self.recipe.device))

    def save(self) -> None:
        progress: dict[str, Any] = {
            "recipe": comparable(self.recipe, free=FREE),
            "text": fingerprint(self.text.training, self.text.held_out),
        }
        progress |= {"precision": self.precision, "step": self.clock.step, "seconds": self.clock.seconds}
        progress |= {"losses": self.losses, "evaluated": self.evaluated}
        save_state(self.recipe.output / STATE, self.model, self.optimizer, progress)

    def _resume(self) -> None:
        progress = read_progress(self.recipe.output / STATE)
        check_same(comparable(self.recipe, free=FREE), progress["recipe"])
        if progress["text"] != fingerprint(self.text.training, self.text.held_out):
            raise InputError("--resume: the text has changed since the run began; start anew with --overwrite")
        load_state(self.recipe.output / STATE, self.model, self.optimizer)
        self.precision, self.losses = progress["precision"], progress["losses"]
        self.evaluated = [(step, loss) for step, loss in progress["evaluated"]]
        self.clock.resume(progress["step"], progress["seconds"])

    def evaluate(self, most: int, precision: Precision) -> HeldOut:
        sizes, device = bytes_per_token(self.text.pipeline), self.recipe.device
        return held_out(self.model, self.held, sizes, most=most, device=device, precision=precision)

    def note(self, found: HeldOut, say: Callable[[str], Any] | None = None) -> None:
        """Remember a held-out loss, write it down, and say so where it has risen."""
        self.evaluated.append((self.clock.step, found.loss))
        self.metrics.write(self.clock.step, seconds=round(self.clock.seconds, 3), held_out=found.loss)
        word = overfitting(self.evaluated)
        if say is not None and word is not None:
            say(word)


def main(recipe: Pretrain) -> dict[str, Any]:
    """Read, train, measure, save, load back, write samples; returns the figures of the run."""
    say = Console(stderr=True, highlight=False, soft_wrap=True).print
    ranks.refuse("pretrain.py")
    as_device(recipe.device)
    claim(recipe.output, resume=recipe.resume, overwrite=recipe.overwrite)
    text = read(recipe)
    if not recipe.resume:
        clear(recipe.output)
    tokenizer = Tokenizer.from_tokenizers(text.pipeline, bos=END_OF_TEXT, eos=END_OF_TEXT)
    tokenizer.save(recipe.output)  # a resumed run needs the same
    say(f"text: {text.source}, {len(text.training):,} tokens to train on, {len(text.held_out):,} held out")
    run = Run(recipe, text)
    say(f"model: {run.parameters:,} parameters, matrix products in {run.precision}")
    with run.metrics:
        train(run)
        say("measuring on the held-out text, saving, loading back")
        result = figures(run)
    save_checked(run.model.cpu(), recipe.output, tokenizer=tokenizer, tokens=run.held.window(0)[None])
    title = f"{run.parameters / 1e6:.1f} M parameters, held-out perplexity {result['held_out_perplexity']:.1f}"
    curve = draw_curve(recipe.output, title=title, say=say)
    if curve is not None:
        result["curve"] = str(curve)
    history = {"losses": run.losses, "evaluated": run.evaluated, "recipe": comparable(recipe)}
    write_atomically(recipe.output / "training.json", json.dumps(result | history))
    (recipe.output / STATE).unlink(missing_ok=True)
    write_samples(recipe)
    return result


def read(recipe: Pretrain) -> Text:
    """The text, in a vocabulary made for it (or kept, in a resumed run)."""
    vocabulary: int | Pipeline = recipe.vocabulary
    if recipe.resume:
        vocabulary = Pipeline.from_file(str(recipe.output / "tokenizer.json"))
    chosen: dict[str, Any] = {"suffixes": recipe.suffixes, "leave_out": recipe.leave_out} if recipe.text else {}
    return read_text(recipe.text, held_out=recipe.held_out, vocabulary=vocabulary, **chosen)


def make_model(recipe: Pretrain, pipeline: Pipeline) -> Decoder:
    """A Llama of the recipe's shape with the weights that training starts from."""
    if recipe.width % recipe.heads:
        raise ConfigError(f"{recipe.heads} heads cannot share a width of {recipe.width} evenly; change one of the two")
    config = DecoderConfig(
        vocab_size=pipeline.get_vocab_size(),
        hidden_size=recipe.width,
        num_layers=recipe.layers,
        num_heads=recipe.heads,
        num_kv_heads=recipe.kv_heads,
        head_size=recipe.width // recipe.heads,
        ffn_size=recipe.feed_forward,
        context=recipe.context,
        tied_embeddings=recipe.tied,
    )
    model = Decoder(config).to(recipe.device)
    initialise(model, seed=recipe.seed)
    end = pipeline.token_to_id(END_OF_TEXT)
    model.generation_defaults = {"bos_token_id": end, "eos_token_id": end}
    return model


def train(run: Run) -> None:
    """The loop: one step an iteration, a look at the held-out text now and then, a state on Ctrl-C."""
    recipe, clock, model, optimizer = run.recipe, run.clock, run.model, run.optimizer
    bar = Progress("pretrain", total=clock.total, unit=clock.unit, done=clock.count)
    saved = clock.seconds
    with interruptible() as stop, bar:
        while not clock.over:
            rows = run.windows.batch(clock.step, recipe.batch).to(recipe.device)  # (B, T)
            loss = accumulate(model, rows.split(recipe.micro_batch or recipe.batch), precision=run.precision)
            norm = clip_gradients(list(model.parameters()), recipe.clip)
            learning_rate = recipe.learning_rate * warmup_cosine(clock.done, warmup=recipe.warmup)
            set_learning_rate(optimizer, learning_rate)
            optimizer.step()
            optimizer.zero_grad()
            clock.tick()
            run.losses.append(loss)
            told = {"loss": loss, "tokens": rows.numel(), "memory": peak_memory(recipe.device)}
            bar.update(clock.count, **told)
            told |= {"seconds": round(clock.seconds, 3), "learning_rate": learning_rate, "gradient_norm": norm}
            run.metrics.write(clock.step, **told)
            if len(run.evaluated) < int(recipe.evaluations * clock.count / clock.total) < recipe.evaluations:
                run.note(run.evaluate(32, run.precision), bar.note)
            if stop.is_set() or clock.seconds - saved > 60 * recipe.save_minutes:
                run.save()
                saved = clock.seconds
            if stop.is_set():
                raise Interrupted(f"step {clock.step} is saved; go on with: {resume_command()}")


def figures(run: Run) -> dict[str, Any]:
    """What the run came to, as the JSON line tells it."""
    seconds, tokens = run.clock.seconds, run.clock.step * run.recipe.batch * run.recipe.context
    final = run.evaluate(512, "float32")
    run.note(final)  # over more windows than before, so a difference is no rise
    return {
        "model": str(run.recipe.output),
        "parameters": run.parameters,
        "steps": run.clock.step,
        "tokens": tokens,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(tokens / seconds),
        **{f"held_out_{name}": value for name, value in final._asdict().items()},
    }


def write_samples(recipe: Pretrain) -> None:
    """Let the saved model continue each prompt, greedily and by chance, on standard output as it is written."""
    model, tokenizer = load(recipe.output)
    chance = {"temperature": 0.7, "top_p": 0.9, "seed": recipe.seed}
    for prompt in (text for text in recipe.prompts if len(tokenizer.encode(text)) < recipe.context):
        for name, options in (("greedy", {"do_sample": False}), ("temperature 0.7, top_p 0.9", chance)):
            print(f"\n--- {name}\n{prompt}", end="", flush=True)
            for piece in stream(model, tokenizer, prompt, max_new_tokens=80, **options):
                print(piece, end="", flush=True)
            print()


if __name__ == "__main__":
    run(main, Pretrain)
