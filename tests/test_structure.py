"""Code structure, from syntax trees: unique class names, import directions, docstrings, lines of --help."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from functools import cache
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("shards", "dali_pipelines", "iwm", "tools", "benchmarks")
SCRIPTS = ("tools", "benchmarks")
"""Folders of scripts; each is the root of its own imports."""

STAGES = (
    "shards",
    "dali_pipelines",
    "iwm",
    "iwm.kernels",
    "iwm.models",
    "iwm.training",
    "iwm.evaluation",
    "iwm.downstream",
    "iwm.report",
    "iwm.export",
    "iwm.ablation",
    "commands",
)
"""Stages from the lowest to the highest. A stage may import itself and lower stages."""

COMMANDS = {
    "iwm",
    "iwm.__main__",
    "iwm.train",
    "iwm.evaluate",
    "iwm.protocols",
    "iwm.ablate",
    "iwm.export.__main__",
    "iwm.report.__main__",
    "shards.__main__",
}
"""Entry points of the package and what they run, which are above every stage."""

NOT_FIRST = {"What", "Of", "Whether", "So"}
"""Words that must not begin a docstring, which is a noun phrase or an imperative sentence."""


@cache
def trees() -> dict[Path, ast.Module]:
    """Return the syntax tree of every source file, by its path in the project."""
    files = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))
    return {file.relative_to(ROOT): ast.parse(file.read_text()) for file in files}


def module_of(file: Path) -> str:
    parts = file.with_suffix("").parts
    parts = parts[1:] if parts[0] in SCRIPTS else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports() -> dict[str, set[str]]:
    """Return the project's modules that each of its modules imports."""
    modules = {module_of(file) for file in trees()}
    found: dict[str, set[str]] = {}
    for file, tree in trees().items():
        names: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                inside = {f"{node.module}.{alias.name}" for alias in node.names}
                names |= inside & modules or {node.module}
        found[module_of(file)] = (names & modules) - {module_of(file)}
    return found


def stage_of(module: str) -> int:
    head, _, rest = module.partition(".")
    if module in COMMANDS or head not in ("shards", "dali_pipelines", "iwm"):
        return STAGES.index("commands")
    folder = f"iwm.{rest.partition('.')[0]}"
    return STAGES.index(folder if head == "iwm" and folder in STAGES else head)


def test_class_names_are_unique() -> None:
    places = defaultdict(list)
    for file, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{file}:{node.lineno}")
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_there_are_no_import_cycles() -> None:
    try:
        TopologicalSorter(imports()).prepare()
    except CycleError as error:
        raise AssertionError(" → ".join(error.args[1])) from None


def test_no_module_imports_a_higher_stage() -> None:
    upward = {
        f"{module} → {other}" for module, others in imports().items() for other in others
        if stage_of(other) > stage_of(module)
    }  # fmt: skip
    assert upward == set()


def test_docstrings_are_noun_phrases_or_imperatives() -> None:
    found = []
    for file, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                text = node.value.value
                if isinstance(text, str) and text.split()[:1] and text.split()[0].strip(",.:") in NOT_FIRST:
                    found.append(f"{file}:{node.lineno}: {text.split(chr(10))[0]}")
    assert found == []


def test_tables_of_results_have_one_form() -> None:
    """TerminalTable is readable at any width; a table of rich's own cuts or breaks cells where it is too wide."""
    tables = {str(file) for file, tree in trees().items() for node in ast.walk(tree)
              if isinstance(node, ast.ImportFrom) and node.module == "rich.table"}  # fmt: skip
    assert tables == {"iwm/evaluation/terminal_table.py", "iwm/training/metrics.py", "shards/command_line.py"}


def option_classes() -> list[ast.ClassDef]:
    """Return the dataclasses of all commands' options: those named so, and those that they contain."""
    classes = {
        node.name: node
        for tree in trees().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(kind) for kind in node.decorator_list)
    }
    names = [name for name in classes if name.endswith(("Options", "Settings", "Config"))]
    for name in names:  # grows
        types = " ".join(
            ast.unparse(field.annotation) for field in classes[name].body if isinstance(field, ast.AnnAssign)
        )
        names += sorted(set(re.findall(r"\w+", types)) & classes.keys() - set(names))
    return [classes[name] for name in names]


def test_lines_of_an_options_help_end_with_a_sentence() -> None:
    """tyro keeps the line breaks of an option's docstring in --help."""
    broken = []
    for node in option_classes():
        for option, text in pairwise(node.body):
            if isinstance(option, ast.AnnAssign) and isinstance(text, ast.Expr):
                lines = str(ast.literal_eval(text.value)).splitlines()
                broken += [f"{node.name}.{ast.unparse(option.target)}: {x}" for x in lines[:-1] if x[-1] not in ".:"]
    assert broken == []
