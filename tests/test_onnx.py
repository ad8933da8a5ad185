"""ONNX files: metadata, dynamic axes, and nothing half-written."""

import json

import onnx
import pytest
import torch

import fasp_graph as fg
import models_zoo
from fasp_graph import onnx as emitter
from passes.errors import VerificationError


@pytest.fixture(scope="module")
def pruned():
    entry = models_zoo.load("opt-random")
    return fg.prune(entry.model, entry.inputs, entry.calibration, fg.Config(sparsity=0.2))


def test_the_file_holds_the_plan_and_the_opset(pruned, tmp_path, capfd):
    path = fg.export_onnx(pruned, tmp_path / "small.onnx")

    model = onnx.load(path)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    plan = json.loads(metadata["fasp_graph.plan"])
    assert plan == json.loads(json.dumps(pruned.plan.to_dict()))
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [emitter.OPSET]
    assert all(
        isinstance(size, str)
        for entry in emitter.onnx_session(path).get_inputs()
        for size in entry.shape
    )
    assert [file.name for file in tmp_path.iterdir()] == ["small.onnx"]
    assert "torch.onnx" not in "".join(capfd.readouterr())


def test_a_mismatch_leaves_the_old_file(pruned, tmp_path, monkeypatch):
    path = tmp_path / "small.onnx"
    path.write_text("old")
    run = emitter.run_session
    monkeypatch.setattr(
        emitter, "run_session", lambda session, inputs: [run(session, inputs)[0] + 1]
    )

    with pytest.raises(VerificationError, match="differ by"):
        fg.export_onnx(pruned, path)

    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["small.onnx"]


def test_other_sizes_are_compared(pruned, tmp_path, monkeypatch):
    shapes = []
    run = emitter.run_session

    def spy(session, inputs):
        shapes.append({tuple(v.shape) for v in torch.utils._pytree.tree_leaves(inputs)})
        return run(session, inputs)

    monkeypatch.setattr(emitter, "run_session", spy)

    fg.export_onnx(pruned, tmp_path / "small.onnx")

    assert len(shapes) == 2 and shapes[0].isdisjoint(shapes[1])


def test_paths_that_cannot_be_written(pruned, tmp_path):
    with pytest.raises(fg.FaspGraphError, match="does not exist"):
        fg.export_onnx(pruned, tmp_path / "nowhere" / "small.onnx")
    with pytest.raises(fg.FaspGraphError, match="is a folder"):
        fg.export_onnx(pruned, tmp_path)
