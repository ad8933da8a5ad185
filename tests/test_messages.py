"""What a user reads when a call cannot work: each message says what is wrong and the way out."""

import ast
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import fasp_graph as fg
from fasp_graph.commands.demo import run_demo
from fasp_graph.commands.flags import read_toml
from fasp_graph.folders.auto import FaspConfig, FaspModel
from fasp_graph.folders.loading import _check_emission
from fasp_graph.folders.manifest import FORMAT, checked_files, read_manifest
from passes import rules
from passes.errors import BudgetError, ConfigError, FaspGraphError, UnsupportedOp
from passes.removal import count
from passes.select import allocate

OPTIONS = [
    (
        {"sparsity": 1.0},
        "sparsity=1.0 must lie between 0 and 1, both excluded · help: ",
    ),
    ({"method": "fsap"}, "method='fsap' is unknown · help: one of best, fasp"),
    ({"score": "taylr"}, "score='taylr' is unknown · help: one of fasp, "),
    ({"restore": "all"}, "restore='all' is unknown · help: one of none, "),
    ({"allocation": "even"}, "allocation='even' is unknown"),
    ({"layout": "square"}, "layout='square' is unknown · help: one of free, uniform"),
    ({"kinds": ("row",)}, "kinds='row' is unknown · help: one of chain, bilinear, head, width"),
    (
        {"max_memory": 0},
        "max_memory=0 is no number of bytes above 0 · help: say 2000000000",
    ),
    ({"align": 0}, "align=0 is too small · help: at least 1; the default is 1"),
    ({"min_keep": 0}, "min_keep=0 is too small · help: at least 1; the default is 1"),
    ({"ridge": -1.0}, "ridge=-1.0 is too small · help: at least 0; the default is 0.01"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS)
def test_an_option_out_of_its_range(options, message):
    with pytest.raises(ConfigError) as caught:
        fg.Config(**options)

    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a b", "the rule 'a b' has no '->'"),
        ("a -> a; crossed a", "names the kind 'crossed'; kinds are "),
    ],
)
def test_a_rule_that_is_none(text, message):
    with pytest.raises(ValueError, match="the rule") as caught:
        rules.parse(text)

    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["a b b -> a b", "a b -> a, a a", "..., ... c -> ... c ..."])
def test_a_rule_with_an_axis_twice_in_one_tensor(text):
    with pytest.raises(
        FaspGraphError, match=r"names the axis (\w|\.{3}) twice .* · help: give each"
    ):
        rules.parse(text)


def test_two_families_may_not_hold_one_rule(monkeypatch):
    from passes.rules import lookup, spectral

    monkeypatch.setitem(spectral.RULES, next(iter(lookup.RULES)), "a -> a")

    with pytest.raises(ValueError, match="rules defined twice"):
        rules.table()


def test_a_sample_must_tell_axes_apart():
    with pytest.raises(FaspGraphError, match="do not name the axes · help: give every axis a size"):
        rules.probe(torch.mm, [torch.randn(4, 4), torch.randn(4, 5)])
    with pytest.raises(FaspGraphError, match=r"\[\(3, 3\), \(3, 3\)\], do not name the axes"):
        rules.probe(lambda x: [half.clone() for half in x.chunk(2, -1)], [torch.randn(3, 6)])


def manifest(folder, **changes):
    held = {"format": FORMAT, "weights": {}, "aliases": {}, "emission": {}, "files": []}
    (folder / "fasp_graph.json").write_text(json.dumps(held | changes))


def test_a_folder_that_is_none_of_ours(tmp_path):
    with pytest.raises(FaspGraphError, match="holds no fasp_graph.json · help: give a folder"):
        read_manifest(tmp_path)

    manifest(tmp_path, format=99)
    with pytest.raises(FaspGraphError, match="has format 99; this version reads .* · help: update"):
        read_manifest(tmp_path)

    manifest(tmp_path, aliases=[])
    with pytest.raises(FaspGraphError, match="is damaged: 'aliases' is missing or of the wrong"):
        read_manifest(tmp_path)

    (tmp_path / "fasp_graph.json").write_text("{")
    with pytest.raises(FaspGraphError, match="is not JSON"):
        read_manifest(tmp_path)

    with pytest.raises(FaspGraphError, match=r"model\.safetensors is missing"):
        checked_files(tmp_path, {"model.safetensors": ""})


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 16), nn.ReLU(), nn.Linear(16, 5))
    config = fg.Config(sparsity=0.4, method="magnitude")
    return fg.prune(model, torch.randn(3, 7), None, config)


def test_a_folder_holds_nothing_but_what_save_wrote(plain, tmp_path):
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter1.txt").write_text("mine")
    with pytest.raises(FaspGraphError, match="exists and is no fasp_graph folder · help: choose"):
        fg.save(plain, other)

    manifest(other)
    with pytest.raises(FaspGraphError, match=r"also holds .* which would be lost · help: move it"):
        fg.save(plain, other)
    assert (other / "chapter1.txt").read_text() == "mine"


def test_positions_beyond_a_weight():
    emission = {"shapes": {}, "attributes": {}, "padded": {}, "gather": {}}

    with pytest.raises(FaspGraphError, match="positions of 0 are out of range"):
        _check_emission(
            nn.Sequential(nn.Linear(3, 4)), {**emission, "scatter": {"0": (1, 4, [0, 9])}}, {}
        )


def test_an_unknown_key_in_a_file_of_options(tmp_path):
    path = tmp_path / "options.toml"
    path.write_text("sparsty = 0.2\n")

    with pytest.raises(ConfigError, match="sets 'sparsty', which no option has · help: try spars"):
        read_toml(path)


def test_an_auto_class_of_another_task(tmp_path, monkeypatch):
    other = type("FaspOther", (FaspModel,), {"auto": transformers.AutoModelForMaskedLM})
    model = SimpleNamespace(config=transformers.LlamaConfig(), base_model=None)
    monkeypatch.setattr("fasp_graph.folders.auto.load", lambda root: model)

    with pytest.raises(FaspGraphError, match="does not make · help: take the Auto class of its"):
        other.from_pretrained(tmp_path)


def test_a_model_of_the_configuration_alone():
    with pytest.raises(FaspGraphError, match="are in its folder, .* · help: from_pretrained"):
        transformers.AutoModelForCausalLM.from_config(FaspConfig())


def test_a_demo_without_text(tmp_path):
    target = SimpleNamespace(name="mine", heldout=None)

    with pytest.raises(FaspGraphError, match="mine has no held-out tokens"):
        run_demo(tmp_path, None, target)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[True, True], [True, False]], "blocks would keep unequal numbers of units"),
        ([[False, False], [False, False]], "nothing would be left of an axis"),
    ],
)
def test_a_plan_that_leaves_no_rectangle(mask, message):
    with pytest.raises(UnsupportedOp, match=message):
        count(torch.from_numpy(np.array(mask)), 1)


def test_a_budget_outside_its_range(plain):
    with pytest.raises(BudgetError, match="sparsity 1.5 is not between 0 and 1 · help"):
        allocate(plain.deps, list(plain.deps.groups), 1.5)


def test_weights_that_are_plain_tensors_are_no_parameters():
    model = nn.Module()
    model.up, model.down = torch.randn(16, 7), torch.randn(5, 16)
    model.forward = lambda x: torch.relu(x @ model.up.T) @ model.down.T

    with pytest.raises(BudgetError, match="they are plain tensors · help: make them"):
        fg.prune(model, torch.randn(3, 7), None, fg.Config(sparsity=0.4, method="magnitude"))


RAISED = ("BudgetError", "CalibrationError", "CaptureError", "ConfigError", "FaspGraphError")
MADE_ELSEWHERE = (
    "explain(",
    "{reason}",
    "_lacking(",
    "_mute(",
    "fault(",
    "under_autocast(",
)  # with the way out


def errors_raised(source):
    """Each `raise` of an error that a user may meet, as it is written."""
    for node in ast.walk(ast.parse(source)):
        call = node.exc if isinstance(node, ast.Raise) else None
        if isinstance(call, ast.Call) and ast.unparse(call.func) in (*RAISED, "VerificationError"):
            yield ast.get_source_segment(source, node)


@pytest.mark.parametrize("folder", ["passes", "fasp_graph"])
def test_every_error_says_the_way_out(folder):
    held = (Path(__file__).parents[1] / folder).rglob("*.py")
    told = ("help:", "REPORT", "AGAIN", "_DAMAGED", *MADE_ELSEWHERE)
    raised = [raise_ for path in held for raise_ in errors_raised(path.read_text())]

    assert len(raised) > 20
    assert [text for text in raised if not any(word in text for word in told)] == []


def told_by(source):
    """The texts, without the values in them, of each error that a user may cause; what is to be
    reported is none.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in (*RAISED, "VerificationError"):
            parts = [part for held in node.args for part in ast.walk(held)]
            texts = [part.value for part in parts if isinstance(part, ast.Constant)]
            if not any(isinstance(part, ast.Name) and part.id == "REPORT" for part in parts):
                yield [text for text in texts if isinstance(text, str)]


@pytest.mark.parametrize("folder", ["passes", "fasp_graph"])
def test_every_error_that_a_user_can_cause_is_met_by_a_test(folder):
    """Eleven letters in a row of what it says before the way out stand in a text of a test."""
    root = Path(__file__).parents[1]
    held = [ast.parse(path.read_text()) for path in (root / "tests").glob("test_*.py")]
    nodes = [node for tree in held for node in ast.walk(tree)]
    known = "\n".join(str(n.value) for n in nodes if isinstance(n, ast.Constant))
    known = known.replace("\\", "")  # of regular expressions

    unmet = []
    for path in (root / folder).rglob("*.py"):
        for texts in told_by(path.read_text()):
            told = [text.partition(" · help")[0].strip(" :,") for text in texts]
            told = [text for text in told if len(text) > 6]
            pieces = {text[at : at + 11] for text in told for at in range(max(1, len(text) - 10))}
            if told and not any(piece in known for piece in pieces):
                unmet.append(texts)
    assert unmet == []
