"""Is it right? Record every operation, compare with transformers or another run, name the first that differs, and why.

    with minillm.verify.trace(model) as recorded:          # name -> tensor, every operation
        model(tokens)
    recorded["blocks.0.attention.weights"]                 # (B, H, T, S)

`minillm verify FOLDER` does the whole of it. Reading order: operations, reference (the formulas), trace,
attention_calls, transformers_oracle, compare, gradients, scene, causes, diagnose, report, run, checkpoints.
"""

from minillm.verify.trace import Trace, trace

__all__ = ["Trace", "trace"]
