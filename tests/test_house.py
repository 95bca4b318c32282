"""The rules of the house that a machine can check; CONTRIBUTING.md gives them and their reasons."""
import ast
import re
import sys
import tomllib
from functools import cache

import pytest
from conftest import ROOT

# room: the rooms that it may import; an arrow is transitive, so it may also import those that they may
MAY_IMPORT = {
    "files": set(),
    "rounding": set(),
    "fast": set(),
    "gate": set(),
    "weights": {"files", "rounding"},
    "parallel": {"files"},
    "snapshot": {"files"},
    "checkpoints": {"parallel"},
    "model": {"fast", "weights"},
    "generate": {"model"},
    "messages": {"files"},
    "rows": {"messages"},
    "vocabulary": {"files"},
    "chat": {"messages"},
    "tokenizer": {"chat", "vocabulary"},
    "data": {"rows", "tokenizer"},
    "train": {"model", "checkpoints", "data"},
    "run": {"train"},
    "sft": {"run"},
    "dpo": {"run"},
    "encoder": {"data", "parallel", "weights"},
    "retrieve": {"encoder"},
    "adapt": {"rounding", "snapshot"},
    "ttt": {"adapt", "generate", "data", "retrieve"},
    "stats": set(),
    "plot": {"report"},
    "benchmarks": {"rows"},
    "leaks": {"retrieve"},
    "arms": {"benchmarks", "leaks"},
    "report": {"files", "stats"},
    "evaluate": {"ttt", "arms", "report"},
    "filters": {"leaks"},
    "reward": {"data", "model"},
    "calls": {"messages"},
    "local": {"calls", "generate", "chat", "parallel", "tokenizer"},
    "teachers": {"gate", "local"},
    "prompts": {"benchmarks"},
    "stages": {"calls", "prompts"},
    "dataset": {"prompts", "plot"},
    "synth": {"teachers", "stages", "dataset", "filters", "reward"},
}
DEPENDENCIES = {"torch", "safetensors", "tokenizers", "sentencepiece", "numpy", "faiss", "tqdm"}  # by import name
# imported in the function that needs them, pyarrow with an error that names the extra; torch itself needs jinja2
EXTRAS = {"files": {"pyarrow"}, "chat": {"jinja2"}, "plot": {"matplotlib", "sklearn", "threadpoolctl"},
          "calls": {"jsonschema", "referencing"}, "teachers": {"openai"},
          "filters": {"py3langid", "rapidfuzz", "rensa"}}
README_BYTES = 11_850  # 12,000 when serving stands
ROOMS = sorted(path.stem for path in ROOT.glob("*.py"))


def text_of(room):
    return (ROOT / f"{room}.py").read_text()


@cache
def tree_of(path):
    return ast.parse(path.read_text())


def imports_of(path):
    """The full names of the modules that a file imports anywhere, in functions too."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def tops_of(path):
    return {name.partition(".")[0] for name in imports_of(path)}


def reachable(arrows, room):
    """All rooms that `arrows` lead to from `room`, over any number of steps."""
    found, ahead = set(), list(arrows[room])
    while ahead:
        one = ahead.pop()
        if one not in found:
            found.add(one)
            ahead += arrows[one]
    return found

# ----- imports -------------------------------------------------------------------------------------------------------


def test_every_room_is_in_the_table_and_no_other():
    assert sorted(MAY_IMPORT) == ROOMS


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_it_may(room):
    ours = tops_of(ROOT / f"{room}.py") & {*ROOMS, *MAY_IMPORT}
    assert ours <= reachable(MAY_IMPORT, room)


def test_there_is_no_circle():
    arrows = {room: tops_of(ROOT / f"{room}.py") & set(ROOMS) for room in ROOMS}
    for table in (MAY_IMPORT, arrows):
        assert [room for room in table if room in reachable(table, room)] == []
        assert "dpo" not in reachable(table, "sft") and "sft" not in reachable(table, "dpo")


def test_the_demo_imports_only_files():
    paths = sorted((ROOT / "demo").glob("**/*.py"))
    assert paths
    for path in paths:
        assert tops_of(path) & set(ROOMS) <= {"files"}, path


@pytest.mark.parametrize("room", ROOMS)
def test_nothing_beyond_seven_dependencies_is_needed(room):
    extras = EXTRAS.get(room, set())
    assert tops_of(ROOT / f"{room}.py") <= DEPENDENCIES | set(sys.stdlib_module_names) | set(ROOMS) | extras
    for extra in extras:
        assert not re.search(rf"(?m)^(import|from) {extra}\b", text_of(room))


def test_the_package_lists_every_room():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert settings["tool"]["setuptools"]["py-modules"] == ROOMS
    names = {re.match(r"[\w-]+", dependency)[0] for dependency in settings["project"]["dependencies"]}
    assert names == DEPENDENCIES - {"faiss"} | {"faiss-cpu"}
    assert set(ROOMS) <= set(settings["tool"]["ruff"]["lint"]["isort"]["known-first-party"])

@pytest.mark.parametrize("room", ROOMS)
def test_what_a_platform_lacks_is_imported_where_it_is_used(room):
    for node in tree_of(ROOT / f"{room}.py").body:
        names = [alias.name for alias in getattr(node, "names", ())] + [getattr(node, "module", None)]
        assert not {"fcntl", "grp", "pwd", "resource", "termios"} & set(names), f"{room}.py:{node.lineno}"


@pytest.mark.parametrize("room", ROOMS)
def test_text_is_utf_8_wherever_the_program_runs(room):
    for node in ast.walk(tree_of(ROOT / f"{room}.py")):
        if isinstance(node, ast.Call) and re.fullmatch(r"open|.*\.(read|write)_text", ast.unparse(node.func)):
            assert re.search(r"'utf-8|'[rwa]?\+?b", ast.unparse(node)), f"{room}.py:{node.lineno}"

# ----- what lives in one room ----------------------------------------------------------------------------------------


def rooms_that_use(module):
    """The rooms whose text names `module`, or that import it or from it."""
    return {room for room in ROOMS if module in text_of(room) or any(
        f"{name}.".startswith(f"{module}.") for name in imports_of(ROOT / f"{room}.py"))}


def test_autograd_functions_live_in_fast():
    bases = {(room, ast.unparse(base)) for room in ROOMS for node in ast.walk(tree_of(ROOT / f"{room}.py"))
             if isinstance(node, ast.ClassDef) for base in node.bases}
    assert {room for room, base in bases if base.endswith("Function")} | rooms_that_use("autograd.Function") == {"fast"}


def test_processes_talk_in_parallel_and_checkpoints_only():
    assert rooms_that_use("torch.distributed") == {"parallel", "checkpoints"}

# ----- what a reader can hold ----------------------------------------------------------------------------------------


def test_the_block_stands_in_two_lines_by_line_160_of_300():
    source = text_of("model")
    assert len(source.splitlines()) <= 300
    block, = (node for node in tree_of(ROOT / "model.py").body if isinstance(node, ast.ClassDef)
              and node.name == "Block")
    lines = source.splitlines()[block.lineno - 1:block.end_lineno]
    for pattern in (r"h = h \+ self\.attention\(self\.attention_norm\(h\),.*\)",
                    r"(h =|return) h \+ self\.mlp\(self\.mlp_norm\(h\)\)"):
        found = [block.lineno + i for i, line in enumerate(lines) if re.fullmatch(pattern, line.strip())]
        assert len(found) == 1 and found[0] <= 160, pattern


@pytest.mark.parametrize("room", ROOMS)
def test_a_file_has_at_most_600_lines(room):
    assert len(text_of(room).splitlines()) <= 600


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= README_BYTES

# ----- nothing happens at import -------------------------------------------------------------------------------------


def is_constant(node):
    """An assignment, maybe of a tuple, to names of a constant: UPPER_CASE."""
    if not isinstance(node, (ast.Assign, ast.AnnAssign)):
        return False
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    names = [name for target in targets for name in (target.elts if isinstance(target, ast.Tuple) else [target])]
    return all(isinstance(name, ast.Name) and name.id.strip("_").isupper() for name in names)


def is_docstring(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def is_main(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'" and not node.orelse


@pytest.mark.parametrize("room", ROOMS)
def test_nothing_happens_at_import(room):
    definitions = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    parts = (ast.FunctionDef, ast.AsyncFunctionDef, ast.AnnAssign, ast.Assign, ast.Pass)
    for node in tree_of(ROOT / f"{room}.py").body:
        assert isinstance(node, definitions) or is_constant(node) or is_docstring(node) or is_main(node), \
            f"{room}.py:{node.lineno}: {ast.unparse(node)[:80]}"
        for inner in node.body if isinstance(node, ast.ClassDef) else ():
            assert isinstance(inner, parts) or is_docstring(inner), \
                f"{room}.py:{inner.lineno}: {ast.unparse(inner)[:80]}"
