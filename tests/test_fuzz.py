"""Readers of files that nobody vouches for: whatever they hold, only our own errors come out."""

import copy
import hashlib
import json
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import fasp_graph as fg
from fasp_graph.commands.flags import config_from

FUZZ = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


class Attention(nn.Module):
    """Its weights are padded and its MLP native, so that a manifest has both."""

    def __init__(self):
        super().__init__()
        self.mix = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))

    def forward(self, x):
        return self.mlp(self.mix(x, x, x, need_weights=False)[0])


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    return Attention().eval()


@pytest.fixture(scope="module")
def saved(dense, tmp_path_factory):
    """A folder, its manifest, its bytes, and the state that it holds."""
    config = fg.Config(method="magnitude", sparsity=0.3)
    result = fg.prune(dense, torch.randn(3, 5, 8), None, config)
    folder = result.save(tmp_path_factory.mktemp("fuzz") / "small")
    manifest = json.loads((folder / "fasp_graph.json").read_text())
    assert any(manifest["emission"][table] for table in ("padded", "scatter", "gather"))
    return folder, manifest, (folder / "model.safetensors").read_bytes(), fg.load(folder, dense)


def places(value, path=()):
    """Every path into a JSON value."""
    yield path
    inner = value.items() if isinstance(value, dict) else ()
    inner = enumerate(value) if isinstance(value, list) else inner
    for key, held in inner:
        yield from places(held, (*path, key))


def replaced(value, path, new):
    if not path:
        return new
    value = copy.copy(value)
    value[path[0]] = replaced(value[path[0]], path[1:], new)
    return value


def loads(folder, dense):
    """The state that is loaded, or None if the folder is refused."""
    try:
        return fg.load(folder, dense).state_dict()
    except fg.FaspGraphError:
        return None


@FUZZ
@given(data=st.data())
def test_a_manifest_with_anything_in_any_place(saved, dense, data):
    folder, manifest, weights, model = saved
    (folder / "model.safetensors").write_bytes(weights)
    keys = ("weights", "settings", "aliases", "emission", "files", "format")
    used = {key: manifest[key] for key in keys}
    path = data.draw(st.sampled_from(list(places(used))))
    altered = replaced(manifest, path, data.draw(JSON)) if path else data.draw(JSON)
    (folder / "fasp_graph.json").write_text(json.dumps(altered))

    state = loads(folder, dense)

    expected = model.state_dict()
    assert state is None or all(torch.equal(state[name], t) for name, t in expected.items())


@FUZZ
@given(noise=st.binary(max_size=60), at=st.integers(0, 10**6), cut=st.booleans())
@pytest.mark.parametrize("restated", [False, True])
def test_weights_with_anything_anywhere(saved, dense, restated, noise, at, cut):
    """With their old sha256 never; with a sha256 to match they load or are refused."""
    folder, manifest, weights, _ = saved
    at %= len(weights)
    broken = weights[:at] + noise + (b"" if cut else weights[at + len(noise) :])
    (folder / "model.safetensors").write_bytes(broken)
    known = {"model.safetensors": hashlib.sha256(broken).hexdigest()}
    stated = {**manifest, "weights": known if restated else manifest["weights"]}
    (folder / "fasp_graph.json").write_text(json.dumps(stated))

    state = loads(folder, dense)

    assert restated or broken == weights or state is None


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
HEADERS = {
    "longer than the file": struct.pack("<Q", 2**63) + b"{}",
    "oversized": struct.pack("<Q", 200_000_000) + b"{}",
    "deep": json.dumps({"a": 0}).encode()[:5] + b"[" * 100_000,
    "a larger shape": {"mlp.0.bias": {**ENTRY, "shape": [10**9]}},
    "a shape that overflows": {"mlp.0.bias": {**ENTRY, "shape": [2**62, 4]}},
    "a negative shape": {"mlp.0.bias": {**ENTRY, "shape": [-1]}},
    "one place for two": {"a": ENTRY, "b": ENTRY},
    "a type without a name": {"mlp.0.bias": {**ENTRY, "dtype": "F6_E2M3"}},
    "no tensors": {},
    "no header": b"",
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_lie_are_refused(saved, dense, case):
    folder, manifest, _, _ = saved
    held = HEADERS[case]
    if isinstance(held, dict):
        text = json.dumps(held).encode()
        held = struct.pack("<Q", len(text)) + text + bytes(4 * bool(text != b"{}"))
    (folder / "model.safetensors").write_bytes(held)
    known = {"model.safetensors": hashlib.sha256(held).hexdigest()}
    (folder / "fasp_graph.json").write_text(json.dumps({**manifest, "weights": known}))

    with pytest.raises(fg.FaspGraphError):
        fg.load(folder, dense)


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 10_000, "\x00", '{"format": 1' + "]", "[1]"])
def test_manifests_that_break_readers_are_refused(tmp_path, text):
    (tmp_path / "fasp_graph.json").write_text(text)

    with pytest.raises(fg.FaspGraphError):
        fg.load(tmp_path)


def test_an_enormous_manifest_is_not_read(tmp_path):
    with (tmp_path / "fasp_graph.json").open("wb") as stream:
        stream.truncate(1 << 33)

    with pytest.raises(fg.FaspGraphError, match="8,589,934,592 bytes"):
        fg.load(tmp_path)


KEYS = st.sampled_from([*fg.Config.__dataclass_fields__, "min-keep", "nothing"])
VALUES = st.one_of(
    st.sampled_from(['"best"', '"fasp"', '["chain"]', "0.3", "2", "true", "nan", "inf", "1e999"]),
    st.sampled_from(["[]", "{}", "1979-05-27", '"\\u0000"', "-1", "[[1]]", '"none"', "9" * 400]),
    st.text(max_size=8),
)


@FUZZ
@given(lines=st.lists(st.tuples(KEYS, VALUES), max_size=3), noise=st.binary(max_size=8))
def test_toml_with_anything_gives_options_or_our_error(tmp_path, lines, noise):
    path = tmp_path / "options.toml"
    text = "".join(f"{key} = {value}\n" for key, value in lines)
    path.write_bytes(text.encode("utf-8", "surrogatepass") + noise)

    try:
        found = config_from(path, {})
    except fg.FaspGraphError:
        return

    assert 0 < found.sparsity < 1 and isinstance(found.seed, int) and found.ridge < float("inf")


def test_toml_that_is_too_deep_is_refused(tmp_path):
    (tmp_path / "options.toml").write_text("kinds = " + "[" * 100_000)

    with pytest.raises(fg.FaspGraphError, match="is not TOML"):
        config_from(tmp_path / "options.toml", {})
