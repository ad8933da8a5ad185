"""The public names and how they are called; a change is seen in tests/golden/api.txt.

python -m pytest tests/test_public_names.py --update-golden
"""

import ast
import dataclasses
import inspect
from pathlib import Path

import fasp_graph as fg

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden" / "api.txt"


def signature(held):
    return str(inspect.signature(held)).replace("'", "")


def of_product():
    """fasp_graph.__all__: signatures, fields of dataclasses and public methods."""
    for name in sorted(fg.__all__):
        held = getattr(fg, name)
        plain = inspect.isclass(held) and not dataclasses.is_dataclass(held)
        yield f"fasp_graph.{name}{'' if plain else signature(held)}"
        for inner, method in sorted(vars(held).items()) if inspect.isclass(held) else ():
            if not inner.startswith("_") and inspect.isfunction(method):
                yield f"fasp_graph.{name}.{inner}{signature(method)}"


def of_compiler():
    """Functions and classes of passes/ without an underscore, by module."""
    for path in sorted((ROOT / "passes").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        kinds = (ast.FunctionDef, ast.ClassDef)
        names = [n.name for n in ast.parse(path.read_text()).body if isinstance(n, kinds)]
        public = sorted(name for name in names if not name.startswith("_"))
        if public:
            yield f"{module}: {', '.join(public)}"


def test_public_names_are_those_of_the_golden_text(request):
    found = "\n".join([*of_product(), "", *of_compiler()]) + "\n"
    if request.config.getoption("--update-golden"):
        GOLDEN.write_text(found)

    assert GOLDEN.read_text() == found


def test_every_public_name_is_explained():
    for name in fg.__all__:
        assert (getattr(fg, name).__doc__ or "").strip(), name
