"""What training.py measures, one in this process: a step of LoRA by minillm, or by transformers and peft.

    python trainers.py LIBRARY KIND FOLDER JOB      JOB: ids, steps, targets, recompute as JSON; prints figures as JSON

Needs nothing but the library itself, so that it runs under any interpreter.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from peers import peak_bytes

RANK = 16


def minillm(folder: str, kind: str, job: dict[str, Any]) -> Callable[[], float]:
    """A step of this project, which returns its loss."""
    import torch

    import minillm as library
    from minillm import lora
    from minillm.training.loop import accumulate
    from minillm.training.optim import adamw

    quantize, dtype = (kind, "bfloat16") if kind in ("int8", "nf4") else (None, inference_dtype(kind))
    model = library.load_model(folder, dtype=dtype, quantize=quantize)
    lora.add(model, targets=job["targets"], rank=RANK, alpha=RANK)
    model.train().recompute = job["recompute"]
    optimizer, trained = adamw(model, learning_rate=1e-4), lora.parameters(model, "default")
    tokens = torch.tensor(job["ids"])

    def step() -> float:
        loss = accumulate(model, [tokens])
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def peft(folder: str, kind: str, job: dict[str, Any]) -> Callable[[], float]:
    """A step of transformers with peft."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": getattr(torch, inference_dtype(kind))}
    if kind == "int8":
        options |= {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": "cpu"}
    if kind == "nf4":
        four = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        options |= {"quantization_config": four, "device_map": "cpu"}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
    if kind in ("int8", "nf4"):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=job["recompute"])
    elif job["recompute"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=job["targets"])).train()
    trained = [x for x in model.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    tokens = torch.tensor(job["ids"])

    def step() -> float:
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def inference_dtype(kind: str) -> str:
    """The format of what is not quantised."""
    return "float32" if kind == "fp32" else "bfloat16"


LIBRARIES = {"minillm": minillm, "peft": peft}


def measure(library: str, kind: str, folder: str, job: str) -> dict[str, float]:
    """Tokens a second, peak GB and the first and last loss, in this process."""
    settings = json.loads(job)
    step = LIBRARIES[library](folder, kind, settings)
    first = step()
    seconds = []
    for _ in range(settings["steps"]):
        begin = time.perf_counter()
        last = step()
        seconds.append(time.perf_counter() - begin)
    tokens = len(settings["ids"]) * len(settings["ids"][0])
    return {"rate": tokens / statistics.median(seconds), "peak": peak_bytes() / 1e9, "first": first, "last": last}


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
