"""What `import fasp_graph` and light commands leave to the functions that need it; what the Auto
classes bring (transformers 5.17: dynamo, and with it much else) is not ours.
"""

import subprocess
import sys

import pytest

HEAVY = {
    *("datasets", "networkx", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "peft", "scipy"),
    *("sympy", "torch._dynamo", "torch._inductor", "transformers.modeling_utils"),
}
COMMAND = """
import sys
from fasp_graph.cli import main
sys.argv = ["fasp-graph", *%r]
try:
    main()
except SystemExit as done:
    assert not done.code
"""


def imported(code):
    code += "\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "code",
    ["import fasp_graph", COMMAND % ["prune", "--help"], COMMAND % ["zoo"]],
    ids=["package", "help", "zoo"],
)
def test_no_heavy_library_is_imported(code):
    found, brought = imported(code), imported("import transformers.models.auto.modeling_auto")

    assert "fasp_graph" in found
    assert not (found - brought) & {*HEAVY, "models_zoo.decoders"}
