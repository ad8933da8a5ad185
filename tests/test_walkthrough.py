"""What a newcomer does with the README alone: real processes, a real browser, ONNX Runtime.

bundled model -> a Hugging Face folder -> a model of one's own -> graph, report, ONNX
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import browser as chromium
import onnxruntime
import pytest

ROOT = Path(__file__).parents[1]
STORIES = ROOT.parent / "shared/assets/stories260K-hf"
TALES = ROOT.parent / "shared/assets/text/tinystories.txt"
MINE = """
import torch
from torch import nn

class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside, self.gate = nn.Linear(10, 48), nn.Linear(10, 48)
        self.back, self.head = nn.Linear(48, 10), nn.Linear(10, 3)

    def forward(self, x):
        return self.head(x + self.back(torch.tanh(self.inside(x)) * self.gate(x)))

def build():
    torch.manual_seed(0)
    return Mixer(), torch.randn(5, 10), [torch.randn(64, 10) for _ in range(2)]
"""

SHELL = """
import json, os, sys
from fasp_graph import cli
for line in sys.stdin:  # a fork is as fresh as the process, and the libraries are loaded once
    child = os.fork()
    if not child:
        for number, name in ((1, "out"), (2, "error")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.argv = ["fasp-graph", *json.loads(line)]
        cli.main()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """An empty folder to work in."""
    return tmp_path_factory.mktemp("newcomer")


@pytest.fixture(scope="module")
def say(desk):
    """The command line in a process of its own: its words -> its JSON."""
    variables = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    shell = subprocess.Popen(
        [sys.executable, "-c", SHELL],
        cwd=desk,
        env={**os.environ, **variables},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def call(*words):
        print(json.dumps([*map(str, words), "--json"]), file=shell.stdin, flush=True)
        assert shell.stdout.readline() == "0\n", (desk / "error").read_text()
        return json.loads((desk / "out").read_text())

    yield call
    shell.communicate()


def _the_bundled_model(say):
    models = {row["name"] for row in say("zoo")}
    assert "zoo:opt" in models

    asked = ("prune", "zoo:opt", "--sparsity", 0.2, "--method", "fasp")
    found = say(*asked, "--output", "bundled")

    assert found["params_after"] < found["params_before"]
    assert found["perplexity_before"] < found["perplexity_after"] < 2 * found["perplexity_before"]
    text = ("--data", ROOT / "passes", "--length", 64, "--windows", 16)
    again = say("eval", "bundled", *text)
    assert again["parameters"] == found["params_after"]
    assert again["perplexity"] < 200


def folders():
    """A Hugging Face folder that is always there, and a trained one of others."""
    yield pytest.param(ROOT / "models_zoo/data/llama", ROOT / "passes", id="bundled")
    absent = pytest.mark.skipif(not STORIES.is_dir(), reason="the shared assets are not here")
    yield pytest.param(STORIES, TALES, id="stories", marks=absent)


@pytest.mark.parametrize(("folder", "text"), folders())
def test_a_hugging_face_folder(say, folder, text):
    asked = ("prune", folder, "--calibration", text, "--evaluation", text, "--length", 128)
    asked += ("--method", "fasp", "--sparsity", 0.2, "--windows", 16)

    found = say(*asked, "--output", "folder")

    assert found["params_after"] < found["params_before"]
    assert found["perplexity_after"] < 2 * found["perplexity_before"]


def _a_model_of_ones_own(say, desk):
    (desk / "mine.py").write_text(MINE)

    (desk / "options.toml").write_text('sparsity = 0.5\nallocation = "uniform"\n')
    asked = ("prune", "mine:build", "--config", "options.toml")
    plan = say(*asked, "--dry-run")
    found = say(*asked, "--output", "own")

    assert found["params_after"] == plan["params_after"] < 0.7 * found["params_before"]
    assert found["verify_max_error"] < 1e-9


def _the_graph_and_the_report_in_a_browser(say, desk):
    say("inspect", "mine:build", "--html", "graph.html")
    driver = chromium.start()
    try:
        driver.get((desk / "graph.html").as_uri())
        driver.find_element("css selector", "#groups .chip").click()
        detail = driver.find_element("id", "detail").text
        assert "inside.weight" in detail and "gate.weight" in detail and "mine.py:12" in detail
        chromium.picture(driver, "walkthrough-graph")
        driver.get((desk / "own/report.html").as_uri())
        page = driver.find_element("tag name", "body").text
        assert "Before and after" in page and "Left alone, and why" in page
        chromium.picture(driver, "walkthrough-report")
        assert driver.get_log("browser") == []
    finally:
        driver.quit()


def _the_result_in_onnx_runtime(say, desk):
    say("export", "own@mine:build", "own.onnx")

    session = onnxruntime.InferenceSession(str(desk / "own.onnx"))
    (held,) = session.get_inputs()
    logits = session.run(None, {held.name: [[1.0] * 10] * 4})[0]

    assert logits.shape == (4, 3)
    asked = ("--runs", 2, "--no-memory", "--no-onnx")
    dense, small = say("bench", "zoo:opt", "bundled", *asked)
    assert small["flops"] < dense["flops"] and small["median"] > 0


def test_a_newcomer_goes_all_the_way(say, desk):
    _the_bundled_model(say)
    _a_model_of_ones_own(say, desk)
    _the_graph_and_the_report_in_a_browser(say, desk)
    _the_result_in_onnx_runtime(say, desk)
