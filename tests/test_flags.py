"""Flags from fields, options from files."""

import ast
import dataclasses
import inspect
from pathlib import Path

import pytest
import torch
import typer

import fasp_graph as fg
from fasp_graph.cli import app
from fasp_graph.commands import flags


def test_every_field_has_a_flag_and_a_meaning():
    docs = flags.field_docs(fg.Config.__doc__)

    added = flags.config_parameters(set())
    assert [p.name for p in added] == [field.name for field in dataclasses.fields(fg.Config)]
    assert all(p.default is None for p in added)
    assert set(docs) == {field.name for field in dataclasses.fields(fg.Config)}


def test_help_tells_defaults_and_cuts_nothing(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 80)
    commands = typer.main.get_command(app).commands
    told = {name: run(name, "--help")[1] for name in commands}

    for name, command in commands.items():
        held = [flag for flag in command.params if flag.param_type_name == "option"]
        assert "…" not in told[name] and all(flag.opts[0] in told[name] for flag in held)
    words = " ".join(told["prune"].replace("│", " ").split())
    for field in dataclasses.fields(fg.Config):
        default = "chain" if field.name == "kinds" else field.default
        assert default in (None, ()) or f"[default: ({default})]" in words, field.name
    summary = " ".join(run("--help")[1].replace("│", " ").split())
    assert "parameters, FLOPs, latency, and its quality on data. bench" in summary


def test_version(run):
    code, out, _ = run("--version")

    assert code == 0 and out.startswith("fasp-graph ") and f"torch {torch.__version__}" in out


def test_a_meaning_may_go_on_and_hold_a_colon():
    text = "Options.\n\nAttributes:\n    seed: one: or\n        two\n    kinds: what"

    assert flags.field_docs(text) == {"seed": "one: or two", "kinds": "what"}


def test_a_flag_may_not_hide_an_argument():
    with pytest.raises(TypeError, match="Config.sparsity would hide"):
        flags.config_parameters({"sparsity"})


@pytest.mark.parametrize(
    ("hint", "text", "value"),
    [
        (str | None, "none", "none"),
        (float | str, "0.5", 0.5),
        (dict[str, float], "{'a': 1}", {"a": 1}),
        (dict[str, float], "not python", "not python"),
        (tuple[str, ...], ["a", "b"], ("a", "b")),
        (tuple[str, ...], ["a,b", " c"], ("a", "b", "c")),
        (tuple[int, ...], [1, 2], (1, 2)),
        (int, 3, 3),
    ],
)
def test_values_take_the_type_of_the_field(hint, text, value):
    assert flags._value(hint, text) == value


def test_the_command_keeps_its_own_arguments():
    @flags.with_config_flags
    def command(model: str, **given):
        pass

    names = list(inspect.signature(command).parameters)
    assert names[:2] == ["model", "sparsity"]


def test_a_file_and_flags_make_a_config(tmp_path):
    (tmp_path / "a.toml").write_text('sparsity = 0.4\nmin-keep = 2\nkinds = ["chain", "bilinear"]')

    found = flags.config_from(tmp_path / "a.toml", {"sparsity": 0.1, "method": None})

    assert found == fg.Config(sparsity=0.1, min_keep=2, kinds=("chain", "bilinear"))


@pytest.mark.parametrize("text", ['"chain, head"', '["chain,head"]', '["chain", "head"]'])
def test_kinds_in_a_file(tmp_path, text):
    (tmp_path / "a.toml").write_text(f"kinds = {text}")

    assert flags.config_from(tmp_path / "a.toml", {}).kinds == ("chain", "head")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sparsty = 0.4", "sets 'sparsty'.*try sparsity"),
        ("calibration = 'a.txt'", "no option has.*try sparsity, .*min-keep.*others are flags only"),
        ("[prune]\nsparsity = 0.4", r"sets 'prune', a table · help: .* under no \[heading\]"),
        ("kinds = 3", "wrong type"),
        ("sparsity = ", "is not TOML"),
        ('sparsity = "much"', "wrong type"),
    ],
)
def test_wrong_files(tmp_path, text, message):
    (tmp_path / "a.toml").write_text(text)

    with pytest.raises(fg.FaspGraphError, match=message):
        flags.config_from(tmp_path / "a.toml", {})


def words_of(node, named):
    """The texts in a call or tuple, in order; names and starred parts stand for what they hold."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.Name):
        return named.get(node.id, [])
    if isinstance(node, ast.Starred):
        return words_of(node.value, named)
    if isinstance(node, ast.Call):
        return [word for held in node.args for word in words_of(held, named)]
    if isinstance(node, (ast.Tuple, ast.List)):
        return [word for held in node.elts for word in words_of(held, named)]
    return []


def called_with(source):
    """(command, flag) of each call of the command line in a test's source."""
    tree = ast.parse(source)
    for scope in (tree, *(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef))):
        named = {}
        for node in ast.walk(scope):
            if isinstance(node, (ast.Assign, ast.AugAssign)):
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                pairs = [(target, node.value)]
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = zip(target.elts, node.value.elts, strict=True)
                for name, value in pairs:
                    held = words_of(value, named)
                    before = named.get(getattr(name, "id", None), [])
                    named[getattr(name, "id", None)] = [*before, *held]
        for node in ast.walk(scope):
            words = words_of(node, named)
            command = next((word for word in words if word in COMMANDS), None)
            yield from ((command, word) for word in words if word.startswith("--"))


COMMANDS = typer.main.get_command(app).commands
USED = """
def test(run):
    asked, more = ("prune", "a"), ["--json"]
    run(*asked, *("--seed", 1), *more)
    asked += ("--stream",)
    done = run([*asked, "--length"])
"""


def test_the_flags_of_a_call_are_found_in_its_source():
    found = {flag for command, flag in called_with(USED) if command == "prune"}

    assert found == {"--json", "--seed", "--stream", "--length"}


def test_every_flag_before_a_command_is_used_by_a_test():
    own = {flag.opts[0] for flag in typer.main.get_command(app).params}
    tests = Path(__file__).parent.glob("test_*.py")

    used = {
        flag for path in tests for command, flag in called_with(path.read_text()) if not command
    }

    assert own <= used and "--version" in own


def test_every_flag_of_every_command_is_used_by_a_test_of_that_command():
    tests = Path(__file__).parent.glob("test_*.py")
    used = {pair for path in tests for pair in called_with(path.read_text())}
    unused = [
        f"{name} {flag.opts[0]}"
        for name, command in COMMANDS.items()
        for flag in command.params
        if flag.param_type_name == "option"
        and not any((name, opt) in used for opt in (*flag.opts, *flag.secondary_opts))
    ]

    assert unused == []
