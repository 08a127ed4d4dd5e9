"""Rules of the code base that a linter does not know: who may import whom, what is never called, how long is too long.

Each rule is a function from a parsed module to the faults it finds. `test_rule` runs it over the package;
`test_rule_sees_its_fault` runs it over a line that breaks it, so that no rule can go blind.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent


class Module(NamedTuple):
    """One file of the package: its dotted name, its text, its syntax tree."""

    name: str
    text: str
    tree: ast.Module

    @property
    def package(self) -> str:
        """`minillm.checkpoint` for `minillm.checkpoint.load`; `minillm` for a file at the top."""
        parts = self.name.split(".")
        return ".".join(parts[:2]) if len(parts) > 2 else self.name


def read(path: Path) -> Module:
    parts = path.relative_to(ROOT).with_suffix("").parts
    text = path.read_text(encoding="utf-8")
    return Module(".".join(parts).removesuffix(".__init__"), text, ast.parse(text))


MODULES = {module.name: module for module in map(read, sorted((ROOT / "minillm").rglob("*.py")))}

#: The longest prefix counts. A module may import what is below it and, in its own package, what is not above it;
#: BASE is everybody's. A new module without a level fails `test_every_module_has_a_level`.
LEVELS = {
    "minillm.errors": 0,
    "minillm.atomic": 0,
    "minillm.hub": 0,
    "minillm.placement": 0,
    "minillm.memory": 0,
    "minillm.config": 0,
    "minillm.ops": -1,  # kernels serve everybody, losses too
    "minillm.losses": 0,
    "minillm.data": 0,
    **{
        f"minillm.checkpoint.{name}": 0
        for name in (
            "families falcon hf_config index llama meta resolve safetensors_header shards tensor_file tensors "
            "weight_map"
        ).split()
    },
    "minillm.model": 1,
    "minillm.checkpoint": 3,  # load, save: they know the model and its quantised layers
    "minillm.generation": 2,
    "minillm.lora": 2,
    "minillm.prompt": 2,
    "minillm.quant": 2,
    "minillm.training": 4,
    "minillm.verify": 4,
    "minillm.info": 4,
    "minillm.plan": 4,
    "minillm.doctor": 4,
    "minillm.cli": 5,
    "minillm": 5,  # __init__, which gathers the public names
}
BASE = ("minillm.errors", "minillm.config", "minillm.atomic", "minillm.hub", "minillm.placement", "minillm.memory")
#: The model can be read, copied and tested without the rest of the project.
ALONE = {"minillm.model": (*BASE, "minillm.ops", "minillm.model")}

ORACLES = ("transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets")
MAY_IMPORT_ORACLES = "minillm.verify.transformers_oracle"
MAY_MAKE_ENVIRONMENTS = "minillm.data.sandbox"
MAY_PRINT = ("minillm.cli", "minillm.cli.terminal", "minillm.cli.write", "minillm.training.recipe")
#: The tokenizers library raises bare Exception for every fault of a file.
MAY_CATCH_ALL = ("minillm.data.tokenizer",)
LONGEST_FUNCTION, LONGEST_FILE = 60, 400
MACHINE_PATH = r"/(home|root|work|Users|mnt)/\w"


def level(name: str) -> int | None:
    if name == "minillm":
        return LEVELS[name]
    parts = name.split(".")
    known = (".".join(parts[:n]) for n in range(len(parts), 1, -1))
    return next((LEVELS[prefix] for prefix in known if prefix in LEVELS), None)


def imports(module: Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, those inside functions and under TYPE_CHECKING included."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield node.lineno, full if full in MODULES else base


def within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def upward_imports(module: Module) -> Iterator[str]:
    own = level(module.name)
    assert own is not None
    for line, name in imports(module):
        if not within(name, ("minillm",)) or name in BASE:
            continue
        target = level(name)
        if target is None:
            yield f"line {line}: imports {name}, which does not exist"
            continue
        same_package = within(name, (module.package,)) or module.package == "minillm"
        if target > own or (target == own and not same_package):
            yield f"line {line}: level {own} imports {name} of level {target}"
        allowed = ALONE.get(module.package)
        if allowed and not within(name, allowed):
            yield f"line {line}: {module.package} imports {name}"


def oracle_imports(module: Module) -> Iterator[str]:
    for line, name in imports(module):
        if name.partition(".")[0] in ORACLES and module.name != MAY_IMPORT_ORACLES:
            yield f"line {line}: imports {name}"


def called(node: ast.Call) -> str:
    """`torch.load` for `torch.load(...)`."""
    return ast.unparse(node.func)


def unsafe_calls(module: Module) -> Iterator[str]:
    """Whatever can run code out of a file or a string."""
    banned = (
        r"(eval|exec|compile|__import__|(c?pickle|marshal|dill|shelve)\.(load|loads|open|Unpickler)|os\.system|popen)"
    )
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.Call):
            continue
        name, keywords = called(node), {k.arg: k.value for k in node.keywords}
        if re.fullmatch(banned, name):
            yield f"line {node.lineno}: {name}"
        for function, argument, safe in (("torch.load", "weights_only", True), ("np.load", "allow_pickle", False)):
            value = keywords.get(argument)
            if name == function and not (isinstance(value, ast.Constant) and value.value is safe):
                yield f"line {node.lineno}: {name} without {argument}={safe}"
        if "shell" in keywords:
            yield f"line {node.lineno}: {name} through a shell"


def template_environments(module: Module) -> Iterator[str]:
    """One file makes template environments, and they are sandboxed."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and called(node).split(".")[-1] in ("Template", "Environment"):
            yield f"line {node.lineno}: {called(node)} has no sandbox"
    if module.name != MAY_MAKE_ENVIRONMENTS:
        for line, name in imports(module):
            if name in ("jinja2.sandbox", "jinja2.environment", "jinja2.nativetypes"):
                yield f"line {line}: imports {name}"


def broad_excepts(module: Module) -> Iterator[str]:
    """`except:` and `except Exception` hide bugs; BaseException is for cleaning up and must be raised on."""
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        names = {ast.unparse(kind) for kind in ast.walk(node.type) if isinstance(kind, ast.Name)} if node.type else {""}
        reraises = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
        if "" in names or ("BaseException" in names and not reraises):
            yield f"line {node.lineno}: catches everything"
        if "Exception" in names and module.name not in MAY_CATCH_ALL:
            yield f"line {node.lineno}: catches Exception"


def prints(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and called(node) == "print" and module.name not in MAY_PRINT:
            yield f"line {node.lineno}: prints; return it, or leave it to the command line"


def missing_docstrings(module: Module) -> Iterator[str]:
    """The module, and its public classes and functions. A method speaks through its class."""
    if not ast.get_docstring(module.tree):
        yield "line 1: no module docstring"
    for node in module.tree.body:
        named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if named and not node.name.startswith("_") and not ast.get_docstring(node):
            yield f"line {node.lineno}: {node.name} has no docstring"


def too_long(module: Module) -> Iterator[str]:
    lines = module.text.count("\n")
    if lines > LONGEST_FILE:
        yield f"{lines} lines; split it at an idea"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > LONGEST_FUNCTION:
                yield f"line {node.lineno}: {node.name} has {length} lines"


def vague_names(module: Module) -> Iterator[str]:
    vague = r"(?i)(.*_)?(utils?|helpers?|common|misc)|.*Manager"
    names = [(1, module.name.split(".")[-1])]
    names += [(node.lineno, node.name) for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef)]
    yield from (f"line {line}: the name {name} says nothing" for line, name in names if re.fullmatch(vague, name))


def machine_paths(module: Module) -> Iterator[str]:
    for number, line in enumerate(module.text.splitlines(), 1):
        if re.search(MACHINE_PATH, line):
            yield f"line {number}: a path of one machine"


Rule = Callable[[Module], Iterator[str]]
#: Rule -> a module's name and a text that breaks it.
RULES: dict[Rule, tuple[str, str]] = {
    upward_imports: ("minillm.data.x", "from minillm.model import Decoder"),
    oracle_imports: ("minillm.checkpoint.load", "def f():\n    import transformers.models"),
    unsafe_calls: ("minillm.checkpoint.load", "torch.load(path, weights_only=flag)"),
    template_environments: ("minillm.data.chat", "from jinja2.sandbox import SandboxedEnvironment"),
    broad_excepts: ("minillm.info", "try:\n    f()\nexcept (OSError, Exception):\n    pass"),
    prints: ("minillm.info", "print(1)"),
    missing_docstrings: ("minillm.info", '"""Doc."""\ndef f(): ...'),
    too_long: ("minillm.info", "def f():\n" + "    x = 1\n" * 60),
    vague_names: ("minillm.data.utils", ""),
    machine_paths: ("minillm.info", "PATH = '/ho" + "me/me/model'"),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule: Rule) -> None:
    faults = [f"{module.name}: {fault}" for module in MODULES.values() for fault in rule(module)]
    assert not faults, "\n" + "\n".join(faults)


def module(name: str, text: str) -> Module:
    return Module(name, text, ast.parse(text))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_sees_its_fault(rule: Rule) -> None:
    assert len(list(rule(module(*RULES[rule])))) == 1


@pytest.mark.parametrize(
    ("rule", "name", "text"),
    [
        (upward_imports, "minillm.checkpoint.shards", "from minillm.checkpoint import load"),
        (upward_imports, "minillm.checkpoint.shards", "from minillm.data.tokenizer import Tokenizer"),
        (upward_imports, "minillm.generation.generate", "from minillm.checkpoint.load import load"),
        (upward_imports, "minillm.model.block", "from minillm.checkpoint.shards import open_checkpoint"),
        (upward_imports, "minillm.errors", "import minillm"),
        (unsafe_calls, "minillm.x", "torch.load(path)"),
        (unsafe_calls, "minillm.x", "pickle.loads(text)"),
        (unsafe_calls, "minillm.x", "subprocess.run(text, shell=True)"),
        (template_environments, "minillm.data.sandbox", "jinja2.Template(text)"),
        (broad_excepts, "minillm.x", "try:\n    f()\nexcept:\n    raise"),
        (broad_excepts, "minillm.x", "try:\n    f()\nexcept BaseException:\n    pass"),
        (vague_names, "minillm.x", "class CheckpointManager: ..."),
        (too_long, "minillm.x", "\n" * 401),
    ],
)
def test_rules_see_more_faults(rule: Rule, name: str, text: str) -> None:
    assert list(rule(module(name, text)))


@pytest.mark.parametrize(
    ("rule", "name", "text"),
    [
        (upward_imports, "minillm.checkpoint.load", "from minillm.model import Decoder"),
        (upward_imports, "minillm.checkpoint.falcon", "from minillm.checkpoint.weight_map import Rule"),
        (upward_imports, "minillm.data.chat", "from minillm.errors import InputError"),
        (unsafe_calls, "minillm.x", "torch.load(path, weights_only=True)"),
        (unsafe_calls, "minillm.x", "model.eval(); re.compile('a')"),
        (broad_excepts, "minillm.x", "try:\n    f()\nexcept BaseException:\n    clean()\n    raise"),
    ],
)
def test_rules_leave_good_code_alone(rule: Rule, name: str, text: str) -> None:
    assert not list(rule(module(name, text)))


def test_every_module_has_a_level() -> None:
    assert not [name for name in MODULES if level(name) is None]


def test_no_import_cycles() -> None:
    """A package's __init__ may name its modules; beyond that no module reaches itself through imports."""
    graph = {
        name: {target for _, target in imports(found) if target in MODULES and target != name}
        for name, found in MODULES.items()
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


TOP_LEVEL = {"pyproject.toml", "setup.py", "README.md", "LICENSE", "minillm", "csrc", "scripts", "tests"}


def tracked() -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    found = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip("git does not answer")
    return found.stdout.splitlines()


def test_the_top_level_is_fixed() -> None:
    names = {path.split("/")[0] for path in tracked()}
    assert {name for name in names if not name.startswith(".")} <= TOP_LEVEL


def test_no_large_or_binary_files() -> None:
    """Weights, data and builds stay out; figures and fixtures are small."""
    large = [path for path in tracked() if (ROOT / path).is_file() and (ROOT / path).stat().st_size > 300_000]
    assert not large


def test_no_machine_paths_outside_the_package() -> None:
    """Scripts, tests, kernels and documents too."""
    texts = [
        ROOT / path for path in tracked() if Path(path).suffix in (".py", ".md", ".sh", ".toml", ".h", ".cpp", ".cu")
    ]
    found = [
        path.name for path in texts if path.is_file() and re.search(MACHINE_PATH, path.read_text(encoding="utf-8"))
    ]
    assert not found
