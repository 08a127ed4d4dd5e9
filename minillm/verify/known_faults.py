"""Where the libraries that we compare with are themselves wrong: for programs, with versions and what to use instead.

`minillm verify` avoids these paths, and names the entry when it is made to take one. A test runs each transformers
entry and fails when upstream has mended it, so that the list does not outlive its faults.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KnownFault:
    """One wrong path of one library.

    seen: the versions it was observed in. operation and cause: what `minillm verify` finds there (`Operation.short` and
    the key of a cause); empty where the fault is not in a forward pass that is compared. instead: the path to take.
    """

    name: str
    library: str
    seen: tuple[str, ...]
    where: str
    fault: str
    instead: str
    operation: str = ""
    cause: str = ""


KNOWN_FAULTS = (
    KnownFault(
        "falcon-eager-alibi",
        "transformers",
        ("5.23.0",),
        'Falcon with alibi=True, attn_implementation="eager" or output_attentions=True',
        "ALiBi is added twice: once merged into the causal mask, once in the eager branch",
        'load with attn_implementation="sdpa", without output_attentions',
        operation="scores",
        cause="alibi",
    ),
    KnownFault(
        "falcon-set-attention",
        "transformers",
        ("5.23.0",),
        'Falcon, model.set_attn_implementation("eager") on a loaded model',
        "silently stays on sdpa",
        "choose the implementation when loading",
    ),
    KnownFault(
        "bitsandbytes-cpu-train",
        "bitsandbytes",
        ("0.50.2",),
        "int8 linear on CPU in train()",
        "the plain dequantised product instead of LLM.int8: 1.8e-2 from eval()",
        "eval()",
    ),
    KnownFault(
        "bitsandbytes-int8-constant",
        "bitsandbytes",
        ("0.50.2",),
        "int8 default backend",
        "dequantisation constant 6.200124e-05 for 1/127^2 = 6.2000124e-05: 1.8e-5 too high",
        "row and column statistics and int32 products exactly; floats to more than 2e-5",
    ),
    KnownFault(
        "bitsandbytes-cuda-adamw",
        "bitsandbytes",
        ("0.50.2",),
        "CUDA AdamW",
        "weight decay after the update",
        "the CPU backend, and torch.optim.AdamW",
    ),
    KnownFault(
        "peft-int8-merge-bias",
        "peft",
        ("0.21.2",),
        "8-bit merge with lora_bias=True",
        "the bias is added without its scaling",
        "the float merge",
    ),
    KnownFault(
        "trl-ppo-score",
        "trl",
        ("1.9.0",),
        "experimental PPOTrainer",
        "the score lands on the padding after the end of text",
        "trl 0.11.4 and the formulas",
    ),
)


def known_fault(library: str, operation: str, cause: str) -> KnownFault | None:
    """The entry that explains a fault found in a library, if there is one.

    >>> known_fault("transformers", "scores", "alibi").name
    'falcon-eager-alibi'
    """
    for entry in KNOWN_FAULTS:
        if entry.operation and (entry.library, entry.operation, entry.cause) == (library, operation, cause):
            return entry
    return None
