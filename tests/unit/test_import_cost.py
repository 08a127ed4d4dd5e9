"""`import minillm` is cheap and touches nothing: the promise of `minillm/__init__.py`, measured in fresh processes."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

LIMIT = 0.3  # seconds over `import torch`

#: Needed by some command only; each is imported where it is used.
LAZY = (
    *("transformers", "huggingface_hub", "rich", "tyro", "matplotlib", "sentencepiece", "tiktoken", "safetensors"),
    "pyarrow",
)

MEASURE = """
import json, os, socket, sys, threading, time
import torch

def refuse(*_, **__):
    raise AssertionError("the network was used")

socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
written = []
type(os.environ).__setitem__ = lambda _, name, value: written.append(name)
start = time.perf_counter()
import minillm
seconds = time.perf_counter() - start
print(json.dumps({
    "seconds": seconds,
    "modules": sorted({name.partition(".")[0] for name in sys.modules}),
    "cuda": torch.cuda.is_initialized(),
    "environment": written,
    "threads": threading.active_count(),
}))
"""


def import_minillm() -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    assert not done.stderr, done.stderr
    return json.loads(done.stdout)


def test_import_costs_little_and_touches_nothing() -> None:
    """The smallest of three times: a busy machine only ever adds."""
    runs = [import_minillm() for _ in range(3)]
    assert min(run["seconds"] for run in runs) < LIMIT, runs
    first = runs[0]
    assert not set(LAZY) & set(first["modules"])
    assert not first["cuda"] and not first["environment"] and first["threads"] == 1


def test_importing_the_model_alone_needs_torch_only() -> None:
    """`minillm.model` through a bare package: no tokenizers, no templates, nothing that loads."""
    code = (
        "import sys, types, importlib.util, torch\n"
        "found = importlib.util.find_spec('minillm')\n"
        "package = types.ModuleType('minillm')\n"
        "package.__path__ = found.submodule_search_locations\n"
        "sys.modules['minillm'] = package\n"
        "import minillm.model\n"
        "print(sorted(name for name in sys.modules if name.startswith('minillm.')))\n"
        "assert 'tokenizers' not in sys.modules and 'jinja2' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "checkpoint" not in done.stdout and "data" not in done.stdout
