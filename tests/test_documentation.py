"""What README and documentation tell people to type is real: commands, options, files, Python and configurations."""

import ast
import re
import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
import yaml

from benchmarks.__main__ import BENCHMARKS, path_of
from openmm_se3.cli import app as runtime_app
from training.__main__ import app as training_app
from training.config import parse_config

ROOT = Path(__file__).parent.parent
FOLDERS = ("benchmarks", "docs", "torchscript_models", "training")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
APPS = {"openmm-se3": typer.main.get_command(runtime_app), "training": typer.main.get_command(training_app)}
#: This comment stands before a block that does not run everywhere, or that would make the tests slow.
MARK = re.compile(r"<!-- needs (a GPU|conda|seconds) -->\s*$")
#: Programs that are not ours, whose options are theirs.
FOREIGN = {"mkdocs", "pre-commit", "git", "torchrun"}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str
    marked: bool


def fenced_blocks(path):
    """All fenced blocks of a page, those inside lists too."""
    found, lines, i = [], path.read_text().splitlines(), 0
    while i < len(lines):
        fence = re.match(r"(\s*)```(\w*)", lines[i])
        if fence:
            end = next(k for k in range(i + 1, len(lines)) if lines[k].strip() == "```")
            text = "\n".join(line.removeprefix(fence[1]) for line in lines[i + 1 : end])
            found.append(Block(str(path.relative_to(ROOT)), i + 1, fence[2], text, bool(i and MARK.search(lines[i - 1]))))
            i = end
        i += 1
    return found


BLOCKS = [block for page in PAGES for block in fenced_blocks(page)]


def commands(text):
    """Argument lists of the commands in a shell text; continuation lines joined, comments and variables before a command dropped."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_0-9]+=.*", words[0]):
            words = words[1:]
        if words:
            yield words


def exists(word):
    """Refuse a path inside one of the repository's folders that is not there; other paths, and NAMEs to be filled in, are the reader's own."""
    if re.search(r"\b[A-Z]{4}", word):
        return
    if "/" in word and (ROOT / word.split("/")[0]).is_dir() and not word.startswith(("-", ".", "/")):
        assert (ROOT / word).exists(), f"{word} does not exist"


def check_ours(name, words):
    """Parse a command of ours as it would be, without running it: sub-command, options, types and missing arguments."""
    command, path = APPS[name], name
    while hasattr(command, "commands"):
        if words == ["--version"]:
            return
        assert set(words[:1]) & set(command.commands), f"{path} has no sub-command {words[:1]}; it has {sorted(command.commands)}"
        command, path, words = command.commands[words[0]], f"{path} {words[0]}", words[1:]
    if "--help" not in words:
        try:
            command.make_context(path, list(words))
        except Exception as error:  # typer's own kinds, which its versions name differently
            raise AssertionError(f"{path} {' '.join(words)}: {error}") from error


def check_script(path, words):
    """A Python file of the repository: it exists, and its argument parser knows the options."""
    assert path.is_file(), f"{path} does not exist"
    trees = [ast.parse(path.read_text())]
    if "parser_of(" in path.read_text():  # what benchmarks of time per step share
        trees.append(ast.parse(path.with_name("speed.py").read_text()))
    known = {
        constant.value
        for tree in trees
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "add_argument"
        for constant in call.args
        if isinstance(constant, ast.Constant)
    }
    unknown = {w.split("=")[0] for w in words if w.startswith("--")} - known
    assert not unknown, f"{path.name} has no option {unknown}; it has {sorted(known)}"


def check_pip(words):
    assert words[0] in {"install", "wheel", "uninstall"}, words
    for word in words:
        extras = re.fullmatch(r"(?:\.|openmm-se3)\[([\w,-]+)\]", word)
        if extras:
            assert set(extras[1].split(",")) <= set(PROJECT["optional-dependencies"]), word


def check_make(words):
    makefile = (ROOT / "Makefile").read_text()
    variables = dict(word.split("=", 1) for word in words if "=" in word)
    assert set(variables) <= set(re.findall(r"^(\w+) \?=", makefile, re.M)), variables
    assert variables.get("BUILD", "cpu") in PROJECT["optional-dependencies"]
    for target in (word for word in words if "=" not in word):
        assert re.search(rf"^{re.escape(target)}:", makefile, re.M), f"no target {target}"
        if target == "simulate":
            check(["openmm-se3", "simulate", variables.get("INPUT", "examples/ethanol.sdf"), *shlex.split(variables.get("ARGS", ""))])


def check_conda(words):
    if words[:2] == ["env", "create"]:
        assert (ROOT / words[words.index("-f") + 1]).is_file(), words
    elif words[0] == "activate":
        assert words[1] in {yaml.safe_load(path.read_text())["name"] for path in ROOT.glob("environment*.yml")}, words
    else:
        assert words[0] in {"install", "build"}, words


def check(words):
    """Refuse a command that cannot work."""
    for word in words[1:]:
        exists(word)
    program, rest = Path(words[0]).name, words[1:]
    if program == "python" and rest[0] == "-m":
        program, rest = rest[1], rest[2:]
        if program.startswith("benchmarks."):
            check_script(ROOT / (program.replace(".", "/") + ".py"), rest)
            return
        if program == "benchmarks":
            if rest:
                assert rest[0] in BENCHMARKS, f"no benchmark {rest[0]}; there are {', '.join(BENCHMARKS)}"
                check_script(path_of(rest[0]), rest[1:])
            return
    if program in APPS:
        check_ours(program, rest)
    elif program == "python":
        check_script(ROOT / rest[0], rest[1:])
    elif program in {"pip", "make", "conda"}:
        {"pip": check_pip, "make": check_make, "conda": check_conda}[program](rest)
    else:
        assert program in FOREIGN | {"venv", "zipfile", "pytest"}, f"unknown program {program}"


def named(blocks):
    return pytest.mark.parametrize("block", [pytest.param(b, id=f"{b.page}:{b.line}") for b in blocks])


@named([b for b in BLOCKS if b.language == "bash"])
def test_shell_commands_are_real(block):
    for words in commands(block.text):
        program = Path(words[0]).name
        assert program != "conda" or block.marked or words[1] == "env", f"mark the block as needing conda: {words}"
        check(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_within_sentences_are_real(page):
    """Their sub-commands, options and files; required arguments may be left out there."""
    prose = re.sub(r"^\s*```.*?^\s*```", "", page.read_text(), flags=re.M | re.S)
    spans = re.findall(r"`(?:\.venv/bin/)?((?:openmm-se3|python|make|conda env|pip) [^`|]+)`", prose)
    indented = re.findall(r"^    ((?:openmm-se3|python|make|pip) .+?)(?:   #.*)?$", prose, flags=re.M)
    for span in spans + indented:
        words = shlex.split(span)
        for word in words[1:]:
            exists(word)
        name = "training" if words[:3] == ["python", "-m", "training"] else words[0]
        if name in APPS:
            command, rest = APPS[name], words[3:] if name == "training" else words[1:]
            while hasattr(command, "commands") and rest and rest[0] in command.commands:
                command, rest = command.commands[rest[0]], rest[1:]
            assert not hasattr(command, "commands") or not rest, f"{span}: no such sub-command"
            options = {"--help", *(o for p in command.params for o in (*p.opts, *p.secondary_opts))}
            unknown = [w for w in rest if w.startswith("-") and w not in options]
            assert not unknown, f"{span}: no option {unknown}"
        else:
            check(words)


@named([b for b in BLOCKS if b.language == "yaml"])
def test_configurations_are_valid(block):
    parse_config(yaml.safe_load(block.text), block.page)


def test_configuration_page_has_every_key_with_its_default():
    (block,) = (b for b in BLOCKS if b.page == "docs/training/configuration.md" and b.language == "yaml")
    assert yaml.safe_load(block.text) == parse_config({"data": "packed"}, "defaults").model_dump(mode="json")


PYTHON_PAGES = sorted({b.page for b in BLOCKS if b.language == "python"})


@pytest.mark.parametrize("page", PYTHON_PAGES)
@pytest.mark.filterwarnings("ignore::UserWarning")  # where openmm-torch is missing the pages run through PythonForce
def test_python_runs(page, tmp_path, monkeypatch):
    """The blocks of a page make one program; it runs, with two steps of dynamics where the page has many; of marked blocks the imports do."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    for block in (b for b in BLOCKS if b.language == "python" and b.page == page):
        tree = ast.parse(re.sub(r"\.step\(\d+\)", ".step(2)", block.text), f"{page}:{block.line}")
        if block.marked:
            tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        exec(compile(tree, f"{page}:{block.line}", "exec"), names)


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r"[\w/-]+\.md", text[text.index("\nnav:") :]))
    assert listed == {str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md")}


def test_languages_of_blocks_are_known():
    """So that no block goes unchecked for want of a name; a block without one is no program."""
    assert {b.language for b in BLOCKS} <= {"bash", "python", "yaml", ""}


@pytest.mark.parametrize(
    "text",
    [
        "openmm-se3 simulat my.pdb",
        "openmm-se3 simulate my.pdb --fast",
        "openmm-se3 validate",
        "python -m training fit --devices two",
        "python examples/water_box_npt.py --waters 4",
        "python examples/nothing.py",
        "python -m benchmarks sped",
        "python -m benchmarks speed --fast",
        "make everything",
        "make simulate ARGS=--quick",
        "pip install '.[gpu]'",
        "conda env create -f environment-tpu.yml",
        "curl something",
    ],
)
def test_wrong_commands_are_refused(text):
    (words,) = commands(text)
    with pytest.raises(AssertionError):
        check(words)
