"""What `import fasp_graph` and light commands leave to the functions that need it; what the Auto
classes bring (transformers 5.17: dynamo, and with it much else) is not ours.
"""

import subprocess
import sys

HEAVY = {
    *("datasets", "networkx", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "peft", "scipy"),
    *("sympy", "torch._dynamo", "torch._inductor", "transformers.modeling_utils"),
}
LIGHT = """
import sys
from fasp_graph.cli import main
for words in (["prune", "--help"], ["zoo"]):
    sys.argv = ["fasp-graph", *words]
    try:
        main()
    except SystemExit as done:
        assert not done.code
"""


def imported(code):
    code += "\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_no_heavy_library_is_imported():
    found, brought = imported(LIGHT), imported("import transformers.models.auto.modeling_auto")

    assert "fasp_graph" in found
    assert not (found - brought) & {*HEAVY, "models_zoo.decoders"}
