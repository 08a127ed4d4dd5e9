"""Fine-tune a model on answers: all of it, or adapters on a float, int8 or NF4 base, by the same file.

    python scripts/sft.py --model runs/pretrain --data answers.jsonl                       LoRA on the model as it is
    python scripts/sft.py --model FOLDER --data alpaca.json --quantize int8                LoRA on an int8 base
    python scripts/sft.py --model FOLDER --data chats/ --quantize nf4 --optimizer adamw8   QLoRA
    python scripts/sft.py --model FOLDER --data answers.jsonl --method full                every weight
    torchrun --nproc-per-node 2 scripts/sft.py ... --device cuda --parallel fsdp           the same, on two GPUs

    records ─▶ examples ─▶ batches of like length ─▶ loss of the answers' tokens alone ─▶ AdamW ─▶ adapter or model
       └─ held out by a fraction, and watched: the best state so far is kept, and a rising loss ends the run

Written: adapter_config.json and adapter_model.safetensors, which peft loads too (or a model's folder), curve.png,
training.json; and while it trains metrics.jsonl, samples.jsonl (`minillm plot`). Ctrl-C leaves a state that `--resume`
continues with the same bits.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from minillm import Decoder, Tokenizer, load, lora, save
from minillm.atomic import write_atomically
from minillm.data.batches import Batches
from minillm.data.examples import Example, divided, make_examples
from minillm.data.records import read_records
from minillm.errors import InputError
from minillm.losses import count_targets
from minillm.placement import as_device
from minillm.quant.convert import Quantisation
from minillm.training import ranks
from minillm.training.loop import (
    Clock,
    Precision,
    accumulate,
    autocast,
    clip_gradients,
    interruptible,
    loss_scale,
    naming,
)
from minillm.training.metrics import Metrics, need_tensorboard, peak_memory
from minillm.training.optim import make_optimizer, set_learning_rate, warmup_cosine, warmup_linear
from minillm.training.output import BEST, STATE, check_same, claim, clear, comparable
from minillm.training.picture import draw_curve
from minillm.training.progress import Progress
from minillm.training.recipe import Interrupted, resume_command, run
from minillm.training.samples import overfitting, show_samples
from minillm.training.spread import gather, is_sharded, spread
from minillm.training.state import load_parameters, load_state, read_progress, save_parameters, save_state
from minillm.training.token_loss import TokenLoss


@dataclass(frozen=True)
class Sft:
    """The choices of a run. Rates and batches are those of Unsloth's Alpaca recipe: 2 rows, 4 at a time, rate 2e-4."""

    model: str
    """Folder or id of the model to start from."""
    data: tuple[Path, ...]
    """Files, folders, or hub:owner/name: .json, .jsonl, .parquet, .csv, .tsv, .txt; Alpaca, chats (ShareGPT's too),
    prompt/completion or text."""
    output: Path = Path("runs/sft")
    """Where adapter or model goes."""
    method: Literal["lora", "full"] = "lora"
    """Adapters beside frozen weights, or all weights."""
    quantize: Literal["int8", "nf4"] | None = None
    """Round the frozen weights to 8 or 4 bits; for lora."""
    rank: int = 16
    """Of the adapters, R."""
    alpha: float = 16
    """The adapters' scale is alpha / R."""
    targets: tuple[str, ...] = ()
    """Names of linears that get an adapter; all but the head, where none is given."""
    dropout: float = 0.0
    """Of the adapters' input."""
    rslora: bool = False
    """Scale by alpha / sqrt(R)."""
    dora: bool = False
    """Train the lengths of the weights' rows apart (DoRA)."""
    init: Literal["kaiming", "gaussian", "pissa", "olora"] = "kaiming"
    """How adapters start."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Format of the frozen weights; auto is the checkpoint's own. Trained weights are fp32."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the matrix products, where weights are fp32. In float16 the loss is scaled, and what overflows is left out."""
    format: str | None = None
    """chat, sharegpt, completion, alpaca or text; recognised from the fields where not given."""
    context: int | None = None
    """Longest example in tokens; the model's own where not given."""
    pack: bool = False
    """Put several short examples in one row of the context's length; none sees another."""
    cut: bool = False
    """Cut longer examples on the right, where they are left out otherwise."""
    held_out: float = 0.05
    """Fraction of the examples that is never trained on."""
    epochs: float = 1.0
    """How often every example is seen, where neither steps nor minutes are given."""
    steps: int | None = None
    """Length of the run in steps instead."""
    minutes: float | None = None
    """Length of the run in minutes instead."""
    batch: int = 8
    """Examples in a step."""
    micro_batch: int | None = None
    """Examples that go through the model at once, where a batch does not fit the memory."""
    recompute: bool = False
    """Keep the blocks' inputs alone and compute the rest again backward: less memory, a third more time."""
    optimizer: Literal["adamw", "adamw8"] = "adamw"
    """adamw8 keeps its moments in 8 bits."""
    learning_rate: float = 2e-4
    """Peak of the learning rate."""
    warmup: float = 0.05
    """Fraction of the run in which the learning rate rises."""
    schedule: Literal["linear", "cosine"] = "linear"
    """How it falls to zero."""
    weight_decay: float = 0.01
    """Of matrices."""
    clip: float = 1.0
    """Longest gradient, all parameters taken as one vector."""
    evaluations: int = 5
    """How often the held-out loss is looked at on the way."""
    samples: int = 2
    """How many held-out prompts the model continues at each of them, to be read."""
    tensorboard: bool = False
    """Write the numbers of metrics.jsonl for TensorBoard too (pip install tensorboard)."""
    patience: int = 2
    """Evaluations in a row that may be worse than the best before the run ends early."""
    seed: int = 0
    """Of adapters, dropout, and the order of the examples."""
    device: str = "cpu"
    """Where to train: cpu, cuda, cuda:1 ... Under torchrun cuda is a GPU for each process."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun: every process has the whole model, or its share of every weight (less memory, more traffic)."""
    save_minutes: float = 10.0
    """How often a state is saved on the way."""
    resume: bool = False
    """Go on with the unfinished run in `output`, which must have the same recipe."""
    overwrite: bool = False
    """Start anew where `output` already holds a run."""

    def __post_init__(self) -> None:
        for name in ("batch", "micro_batch", "learning_rate", "clip", "epochs", "steps", "minutes", "patience"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{name} is {value}; it must be above 0")
        for name in ("held_out", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it is a fraction, at least 0 and below 1")
        if self.steps is not None and self.minutes is not None:
            raise InputError("give the length of the run in steps or in minutes, not in both")
        if self.samples < 0:
            raise InputError(f"samples is {self.samples}; it must be at least 0")
        if self.tensorboard:
            need_tensorboard()
        if self.method == "full" and self.quantize is not None:
            raise InputError(
                f"weights in {self.quantize} cannot be trained; leave out --quantize or take --method lora"
            )


#: Fields that a continued run may change.
FREE = ("save_minutes", "samples", "tensorboard", "parallel")


class Run:
    """A recipe with its model made and its examples read: everything that changes while training."""

    def __init__(self, recipe: Sft, model: Decoder, tokenizer: Tokenizer, examples: Sequence[Example]) -> None:
        self.recipe, self.model, self.tokenizer = recipe, model, tokenizer
        self.measured = spread(TokenLoss(model), recipe.parallel)
        held, training = divided(examples, recipe.held_out, seed=recipe.seed)
        pack_to = min(recipe.context or model.config.context, model.config.longest) if recipe.pack else None
        self.batches = Batches(training, size=recipe.batch, seed=recipe.seed, pack_to=pack_to)
        self.held = held
        self.fingerprint = hashlib.blake2b(b"".join(each.tokens.numpy().tobytes() for each in examples)).hexdigest()
        self.optimizer = make_optimizer(
            model,
            recipe.optimizer,
            learning_rate=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            betas=(0.9, 0.999),
        )
        self.scale = loss_scale(recipe.device, recipe.precision)
        self.losses: list[float] = []  # one a step
        self.evaluated: list[tuple[int, float]] = []  # (steps made, held-out loss)
        self.tokens = 0
        steps = None if recipe.minutes is not None else recipe.steps or math.ceil(recipe.epochs * len(self.batches))
        self.clock = Clock(steps=steps, minutes=recipe.minutes)
        if recipe.resume:
            self._resume()
        resumed = self.clock.step if recipe.resume else None
        self.metrics = Metrics(recipe.output, resumed=resumed, tensorboard=recipe.tensorboard)

    def save(self) -> None:
        progress: dict[str, Any] = {"recipe": comparable(self.recipe, free=FREE), "data": self.fingerprint}
        progress |= {"step": self.clock.step, "seconds": self.clock.seconds, "tokens": self.tokens}
        progress |= {"losses": self.losses, "evaluated": self.evaluated, "scale": self.scale.state_dict()}
        save_state(self.recipe.output / STATE, self.model, self.optimizer, progress)

    def _resume(self) -> None:
        progress = read_progress(self.recipe.output / STATE)
        check_same(comparable(self.recipe, free=FREE), progress["recipe"])
        if progress["data"] != self.fingerprint:
            raise InputError("--resume: the examples have changed since the run began; start anew with --overwrite")
        load_state(self.recipe.output / STATE, self.model, self.optimizer)
        self.scale.load_state_dict(progress["scale"])
        self.losses, self.tokens = progress["losses"], progress["tokens"]
        self.evaluated = [(step, loss) for step, loss in progress["evaluated"]]
        self.clock.resume(progress["step"], progress["seconds"])

    def look(self, say: Callable[[str], Any]) -> None:
        """Measure the held-out loss, let the model write after held-out prompts, and tell both."""
        step = self.clock.step
        self.evaluated.append((step, self.evaluate()))
        self.metrics.write(step, seconds=round(self.clock.seconds, 3), held_out=self.evaluated[-1][1])
        say(overfitting(self.evaluated) or f"step {step}: the held-out loss is {self.evaluated[-1][1]:.3f}")
        if step and self.best() == step:
            save_parameters(self.recipe.output / BEST, self.model, {"step": step})
        examples = self.held[: self.recipe.samples]
        if ranks.is_first() and not is_sharded(self.measured):  # a model of which one has a part cannot write alone
            show_samples(self.model, self.tokenizer, examples, step, metrics=self.metrics, say=say)

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss of the answers' tokens in the held-out examples."""
        self.model.eval()
        nats, tokens, size = 0.0, 0, self.recipe.batch
        for begin in range(0, len(self.held), size):
            for part in ranks.own_parts([[each] for each in self.held[begin : begin + size]], size):
                batch = part.to(self.recipe.device)
                with autocast(self.recipe.device, self.recipe.precision):
                    nats += self.measured(batch, 1).item()
                tokens += int(count_targets(batch.tokens, batch.taught))
        self.model.train()
        return ranks.total(nats) / max(ranks.total(tokens), 1)

    def best(self) -> int:
        """The step, of those with a look at the held-out loss, where it was least; the last one if there is none."""
        looks = [(loss, step) for step, loss in self.evaluated if step]
        return min(looks)[1] if looks else self.clock.step

    def take_best(self) -> int:
        """Go back to that step's parameters, if others came after; returns it."""
        step = self.best()
        if step != self.clock.step:
            load_parameters(self.recipe.output / BEST, self.model)
        return step

    def rises(self) -> bool:
        """Whether the last `patience` looks at the held-out loss were all worse than the best before: over-fitting."""
        losses, patience = [loss for _, loss in self.evaluated], self.recipe.patience
        return len(losses) > patience and min(losses[-patience:]) > min(losses[:-patience])


def main(recipe: Sft) -> dict[str, Any]:
    """Read, train, watch, save; returns the figures of the run. Under torchrun, as one rank of several."""
    with ranks.joined(recipe.device):
        return fine_tune(recipe)


def fine_tune(recipe: Sft) -> dict[str, Any]:
    """`main`, within the group of ranks."""
    quiet = not ranks.is_first()
    say = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True, quiet=quiet).print
    as_device(recipe.device)
    if ranks.is_first():
        claim(recipe.output, resume=recipe.resume, overwrite=recipe.overwrite)
    records = read_records(recipe.data)
    model, tokenizer = make_model(recipe)
    context = min(recipe.context or model.config.context, model.config.longest)
    examples, tally = make_examples(records, tokenizer, context=context, format=recipe.format, cut=recipe.cut)
    say(f"data: {tally}")
    if ranks.is_first() and not recipe.resume:
        clear(recipe.output)
    run = Run(recipe, model, tokenizer, examples)
    trained = sum(x.numel() for x in model.parameters() if x.requires_grad)
    say(f"model: {trained:,} numbers are trained, {sum(x.numel() for x in model.parameters()) - trained:,} are not")
    with run.metrics:
        if not recipe.resume and run.held:
            run.look(say)
        ended_early = train(run)
    if ended_early:
        say(f"the held-out loss has risen {recipe.patience} times: the model learns the examples by heart; ended")
    kept = run.take_best()
    if kept != run.clock.step:
        say(f"kept: what was trained by step {kept}, where the held-out loss was least")
    result = figures(run, kept) | {"trained": trained, "ended_early": ended_early, "records": str(tally)}
    gather(model)
    if ranks.is_first():
        finish(run, result)
        draw_curve(recipe.output, title=f"{recipe.model}, {recipe.method}", say=say)
    return result


def make_model(recipe: Sft) -> tuple[Decoder, Tokenizer]:
    """The base, frozen and quantised as asked, with fresh adapters; or all of it in fp32."""
    how = None if recipe.quantize is None else Quantisation(recipe.quantize)
    dtype = "float32" if recipe.method == "full" else None if recipe.dtype == "auto" else recipe.dtype
    model, tokenizer = load(recipe.model, dtype=dtype, device=recipe.device, quantize=how)
    if recipe.method == "lora":
        lora.add(
            model,
            targets=recipe.targets or lora.ALL_LINEAR,
            rank=recipe.rank,
            alpha=recipe.alpha,
            dropout=recipe.dropout,
            rslora=recipe.rslora,
            dora=recipe.dora,
            init=recipe.init,
            generator=torch.Generator(recipe.device).manual_seed(recipe.seed),
        )
    torch.manual_seed(recipe.seed)  # dropout
    model.recompute = recipe.recompute
    return model.train(), tokenizer


def train(run: Run) -> bool:
    """The loop: one step an iteration, a look at the held-out examples now and then; True where it ended early."""
    recipe, clock, model, optimizer, scale = run.recipe, run.clock, run.model, run.optimizer, run.scale
    rate = warmup_linear if recipe.schedule == "linear" else warmup_cosine
    precision: Precision = recipe.precision
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    saved = clock.seconds
    with interruptible() as stop, Progress("sft", total=clock.total, unit=clock.unit, done=clock.count) as bar:
        while not clock.over:
            rows = run.batches.rows(clock.step)
            parts = [part.to(recipe.device) for part in ranks.own_parts(rows, recipe.micro_batch or recipe.batch)]
            ranks.seed(recipe.seed, clock.step)
            with naming(clock.step, (each.place for row in rows for each in row)):
                loss = accumulate(run.measured, parts, precision=precision, scale=scale)
                scale.unscale_(optimizer)
                norm = clip_gradients(trained, recipe.clip, may_overflow=scale.is_enabled())
            learning_rate = recipe.learning_rate * rate(clock.done, warmup=recipe.warmup)
            set_learning_rate(optimizer, learning_rate)
            scale.step(optimizer)
            scale.update()
            optimizer.zero_grad()
            clock.tick()
            run.losses.append(loss)
            seen = sum(len(each) for row in rows for each in row)
            run.tokens += seen
            told = {"loss": loss, "tokens": seen, "memory": peak_memory(recipe.device)}
            bar.update(clock.count, **told)
            told |= {"seconds": round(clock.seconds, 3), "learning_rate": learning_rate, "gradient_norm": norm}
            run.metrics.write(clock.step, **told)
            if run.held and len(run.evaluated) < 1 + int(recipe.evaluations * clock.count / clock.total):
                run.look(bar.note)
                if run.rises():
                    return True
            stopping = ranks.total(stop.is_set()) > 0
            if stopping or clock.seconds - saved > 60 * recipe.save_minutes:
                run.save()
                saved = clock.seconds
            if stopping:
                raise Interrupted(f"step {clock.step} is saved; go on with: {resume_command()}")
    return False


def figures(run: Run, kept: int) -> dict[str, Any]:
    """What the run came to, as the JSON line tells it; kept: the step whose parameters are the result."""
    return {
        "output": str(run.recipe.output),
        "steps": run.clock.step,
        "kept_step": kept,
        "tokens": run.tokens,
        "seconds": round(run.clock.seconds, 1),
        "tokens_per_second": round(run.tokens / max(run.clock.seconds, 1e-9)),
        "loss": run.losses[-1] if run.losses else None,
        "held_out_before": run.evaluated[0][1] if run.evaluated else None,
        "held_out": dict(run.evaluated).get(kept),
    }


def finish(run: Run, result: dict[str, Any]) -> None:
    """Adapter or model, and the history; the state goes."""
    recipe = run.recipe
    if recipe.method == "lora":
        run.tokenizer.save(recipe.output)
        lora.save(run.model, recipe.output, base=recipe.model)  # its config last: a folder that has one is whole
    else:
        save(run.model, recipe.output, tokenizer=run.tokenizer)
    history = {"losses": run.losses, "evaluated": run.evaluated, "recipe": comparable(recipe)}
    write_atomically(recipe.output / "training.json", json.dumps(result | history))
    (recipe.output / STATE).unlink(missing_ok=True)
    (recipe.output / BEST).unlink(missing_ok=True)


if __name__ == "__main__":
    run(main, Sft)
