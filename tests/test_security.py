"""What SECURITY.md promises: nothing is executed, nothing gets in by a name, nothing lies open."""

import ast
import hashlib
import re
import stat
import tempfile
from pathlib import Path

import browser as chromium
import pytest
import torch
from torch import nn

import fasp_graph as fg
from fasp_graph.pages.graphfiles import FORMATS, text
from fasp_graph.pages.report_page import write_report
from fasp_graph.scale import spill

ROOT = Path(__file__).parents[1]
SOURCES = [
    p for name in ("fasp_graph", "passes", "models_zoo") for p in (ROOT / name).rglob("*.py")
]
HOSTILE = "</script><img src=x onerror=alert(1)>&'"
FORBIDDEN = re.compile(
    r"^(eval|exec|compile|__import__|input)$"
    r"|(^|\.)(pickle|dill|joblib|shelve|marshal|cloudpickle|yaml)\b"
    r"|^torch\.load$|\.torch_load$|^numpy\.load$|^np\.load$"
    r"|^os\.(system|popen)$|^tempfile\.mktemp$"
)


def calls(path):
    """(line, dotted name, keyword arguments) of every call; imports count as calls of a module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func), {k.arg: k.value for k in node.keywords}
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, held.name + ".", {}) for held in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, f"{node.module}.", {}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_pickle_no_eval_no_shell_no_remote_code(path):
    for line, name, options in calls(path):
        at = f"{path.name}:{line} {name}"
        assert not FORBIDDEN.search(name), at
        for risky in ("shell", "trust_remote_code", "allow_pickle"):
            value = options.get(risky)
            assert value is None or ast.unparse(value) == "False", f"{at} {risky}"


def test_modules_are_imported_by_a_name_in_a_variable_only_where_that_is_known():
    """The user's factory; the zoo's own families; a package that is optional."""
    nodes = [(p, n) for p in SOURCES for n in ast.walk(ast.parse(p.read_text(encoding="utf-8")))]
    found = {
        str(path.relative_to(ROOT))
        for path, node in nodes
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module")
        if not isinstance(node.args[0], ast.Constant)
    }

    assert found == {"fasp_graph/corpora.py", "models_zoo/__init__.py", "fasp_graph/training.py"}


def test_vendored_scripts_are_those_that_their_table_lists():
    vendor = ROOT / "fasp_graph/pages/templates/vendor"
    listed = re.findall(
        r"^\| (\S+\.js) .*\| ([0-9a-f]{64}) \|$", (vendor / "README.md").read_text(), re.M
    )

    assert [name for name, _ in listed] == sorted(path.name for path in vendor.glob("*.js"))
    for name, expected in listed:
        assert hashlib.sha256((vendor / name).read_bytes()).hexdigest() == expected, name


@pytest.fixture(scope="module")
def hostile():
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module(HOSTILE, nn.Linear(5, 8))
    model.add_module("act", nn.ReLU())
    model.add_module("out", nn.Linear(8, 3))
    config = fg.Config(sparsity=0.3, method="magnitude")
    return fg.prune(model, torch.randn(3, 5), None, config)


@pytest.fixture(scope="module")
def browser():
    driver = chromium.start()
    yield driver
    driver.quit()


def test_a_report_shows_hostile_names_as_text(hostile, browser, tmp_path):
    write_report(tmp_path, HOSTILE, hostile.report.to_dict(), {HOSTILE: 1})

    browser.get((tmp_path / "report.html").as_uri())

    body = browser.find_element("css selector", "body").text
    assert browser.title == f"{HOSTILE}, pruned" and f"{HOSTILE}.0" in body
    assert not browser.find_elements("css selector", "img, script, [onerror]")
    assert browser.get_log("browser") == []


def test_a_picture_with_hostile_names_is_one_document(hostile, browser, tmp_path):
    (tmp_path / "graph.svg").write_text(text(hostile.deps, "svg"))

    browser.get((tmp_path / "graph.svg").as_uri())

    shown = [
        held.get_attribute("textContent") for held in browser.find_elements("css selector", "text")
    ]
    assert f"{HOSTILE}.weight" in shown
    assert not browser.find_elements("css selector", "img, script, [onerror], parsererror")


@pytest.mark.parametrize("form", FORMATS)
def test_no_format_holds_a_name_as_markup(hostile, form):
    found = text(hostile.deps, form)

    assert "<img" not in found or form in ("json", "dot")  # these quote a name, no page holds them
    if form == "dot":
        assert f'"{HOSTILE}.weight" -> "group:{HOSTILE}.0"' in found


def test_a_folder_holds_hostile_names_as_data(hostile, tmp_path):
    folder = hostile.save(tmp_path / "small")

    loaded = fg.load(folder, hostile.model)

    assert f"{HOSTILE}.weight" in loaded.state_dict()
    assert "<img" not in (folder / "README.md").read_text()


@pytest.mark.parametrize("name", ["../other", "/etc/passwd", "a/b", "..", "", 3, None])
def test_a_manifest_lists_plain_file_names_only(hostile, tmp_path, name):
    folder = hostile.save(tmp_path / "small")
    path = folder / "fasp_graph.json"
    path.write_text(path.read_text().replace('"files": [', f'"files": [{_json(name)},', 1))

    with pytest.raises(fg.FaspGraphError, match="plain file name"):
        fg.load(folder, hostile.model)


def _json(value):
    return "null" if value is None else str(value) if isinstance(value, int) else f'"{value}"'


def test_weights_behind_a_link_are_still_those_of_the_manifest(hostile, tmp_path):
    folder = hostile.save(tmp_path / "small")
    secret = tmp_path / "secret"
    secret.write_text("root:x:0:0")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(secret)

    with pytest.raises(fg.FaspGraphError, match="sha256") as caught:
        fg.load(folder, hostile.model)

    assert "root:x" not in str(caught.value)


def test_spilled_activations_have_no_name_and_no_readers(tmp_path, monkeypatch):
    modes = []

    def watched(*arguments, **options):
        handle, name = real(*arguments, **options)
        modes.append(stat.S_IMODE(Path(name).stat().st_mode))
        return handle, name

    real = tempfile.mkstemp
    monkeypatch.setattr(tempfile, "mkstemp", watched)
    held = spill.Spill(1, tmp_path)
    held([{torch.fx.Graph().placeholder("x"): torch.zeros(8)}])
    held._file(1 << 16)

    assert modes == [0o600] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ['a"); print("run', "a\nb", "a\\", "a\r"])
def test_names_that_torch_would_write_into_code_are_refused(name):
    model = nn.Sequential()
    model.add_module(name, nn.Linear(5, 8))

    with pytest.raises(fg.FaspGraphError, match="torch.fx writes"):
        fg.analyze(model, torch.randn(3, 5))
