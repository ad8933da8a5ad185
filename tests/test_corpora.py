"""Data: every form that the command line takes, and what it says when one is wrong."""

import gzip
import json
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet as parquet
import pytest
import torch

import fasp_graph as fg
from fasp_graph import corpora, data, targets


def letters(text, **_):
    """A tokenizer of one id per character."""
    return {"input_ids": [ord(letter) for letter in text]}


@pytest.fixture
def target():
    model = torch.nn.Embedding(300, 4)
    inputs = {"input_ids": torch.zeros(2, 3, dtype=torch.long)}
    return data.Target("mine", model, inputs, tokenizer=letters)


def test_text_comes_from_files_and_folders(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n\n{"text": "three", "more": 1}\n')
    parquet.write_table(pyarrow.table({"text": ["four", "", "five"]}), tmp_path / "c.parquet")
    (tmp_path / "d.bin").write_bytes(b"\0")

    assert corpora.text_of(str(tmp_path / "a.txt")) == "one"
    assert corpora.text_of(str(tmp_path / "b.jsonl")) == "two\n\nthree"
    assert corpora.text_of(str(tmp_path)) == "one\n\ntwo\n\nthree\n\nfour\n\nfive"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", bytes(range(256)) * 9, "is no text in UTF-8: 6"),
        ("a.bin", b"\0\1\2\3", "is no text in UTF-8: 100% of its characters"),
        ("a.pdf", b"%PDF-1.7 obj stream" + b"\x9c\xff\x03" * 20, "help: convert it"),
        ("a.txt", "Füße für Bären".encode("latin-1"), "is no text in UTF-8"),
        ("a.txt", "words".encode("utf-16"), "is no text in UTF-8"),
        ("a.jsonl", b"{", "a.jsonl:1 is not JSON"),
        ("a.jsonl", b"\xff\xfe\0", "a.jsonl:1 is not JSON"),
        ("a.jsonl", b'{"words": 1}', "no key `text`"),
        ("a.parquet", b"no", "is not parquet"),
        ("a.png", b"", "is an image"),
    ],
)
def test_wrong_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)

    with pytest.raises(fg.FaspGraphError, match=message):
        corpora.text_of(str(tmp_path / name))


def test_a_missing_file_and_a_parquet_without_text(tmp_path):
    parquet.write_table(pyarrow.table({"words": ["x"]}), tmp_path / "c.parquet")

    with pytest.raises(fg.FaspGraphError, match="cannot read .*none.txt"):
        corpora.text_of(str(tmp_path / "none.txt"))
    with pytest.raises(fg.FaspGraphError, match="no column `text` but words"):
        corpora.text_of(str(tmp_path / "c.parquet"))


def test_a_byte_order_mark_and_a_few_odd_bytes_are_no_harm(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffwords ".encode() * 50 + b"\xff\x1b")
    (tmp_path / "b.jsonl").write_bytes('\ufeff{"text": "words"}'.encode())

    assert corpora.text_of(str(tmp_path / "a.txt")).startswith("words ")
    assert corpora.text_of(str(tmp_path / "b.jsonl")) == "words"


@pytest.mark.parametrize("source", ["wikitext2", "c4", "ptb", "someone/texts"])
def test_the_hub_is_asked_for_the_usual_split(monkeypatch, source):
    import datasets

    asked = []

    def load_dataset(path, **options):
        asked.append((path, options["split"]))
        return [{"text": "words", "sentence": "words"}, {"text": "", "sentence": ""}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    assert corpora.text_of(source) == corpora.text_of(source, evaluation=True) == "words"
    assert [split for _, split in asked][0] == "train"
    assert asked[1][1] == ("validation" if source == "c4" else "test")


@pytest.mark.parametrize(
    ("source", "folder", "suffixes"),
    [
        ("wikitext2", "wikitext-2-raw-v1", (".parquet", ".parquet")),
        ("ptb", "penn_treebank", (".parquet", ".parquet")),
        ("c4", "en", ("c4-train.00000-of-01024.json.gz", "c4-validation.00000-of-00008.json.gz")),
    ],
)
def test_the_usual_corpora_are_read_by_datasets_itself(
    monkeypatch, tmp_path, source, folder, suffixes
):
    """Files laid out as on the hub, in a local folder that stands for the repository."""
    import datasets

    corpus, load = corpora.CORPORA[source], datasets.load_dataset
    splits, files = (corpus.calibration, corpus.evaluation), {}
    (tmp_path / folder).mkdir()
    for split, suffix in zip(splits, suffixes, strict=True):
        table = pyarrow.table({corpus.column: [f"words of {split}", "", "more"]})
        name = suffix if source == "c4" else f"{split}-00000-of-00001{suffix}"
        files[split] = str(tmp_path / folder / name)
        if source != "c4":
            parquet.write_table(table, files[split])
            continue
        with gzip.open(files[split], "wt") as lines:
            lines.writelines(json.dumps(row) + "\n" for row in table.to_pylist())
    asked = dict(corpus.options.get("data_files", {}))
    assert all(files[split].endswith(asked[split]) for split in asked)

    def local(path, split, streaming, **options):
        assert path == corpus.path and options.keys() <= {"name", "data_files", "revision"}
        kind = "json" if source == "c4" else "parquet"
        return load(kind, data_files=files, split=split, streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", local)

    for evaluation, split in zip((False, True), splits, strict=True):
        assert corpora.text_of(source, evaluation) == f"words of {split}\n\nmore"


def test_without_a_network_the_error_says_what_to_pass(monkeypatch, target):
    import datasets

    def refused(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", refused)

    with pytest.raises(fg.FaspGraphError, match="pass a local .txt, .jsonl or .parquet"):
        data.calibration_batches(target, "wikitext2", 8, 4)


def test_windows_spread_over_the_text(tmp_path, target):
    text = "abcdefgh" * 8
    (tmp_path / "text.txt").write_text(text)

    rows = data.windows_of(text, letters, 10, 3)
    assert rows.shape == (3, 10) and rows[0, :3].tolist() == [97, 98, 99]
    batches = data.calibration_batches(target, str(tmp_path / "text.txt"), 6, 9)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(8, 6), (1, 6)]
    with pytest.raises(fg.FaspGraphError, match="longer text"):
        data.windows_of(text, letters, 65, None)


def test_factories_give_batches_and_tokens(tmp_path, monkeypatch, target):
    (tmp_path / "my_data.py").write_text(
        "import torch\n"
        "def batches():\n    yield {'input_ids': torch.zeros(1, 5, dtype=torch.long)}\n"
        "def tokens():\n    return torch.zeros(3, 7, dtype=torch.long)\n"
        "def wrong():\n    return 3\n"
    )
    monkeypatch.chdir(tmp_path)

    (batch,) = data.calibration_batches(target, "my_data:batches", 8, 4)
    assert batch["input_ids"].shape == (1, 5)
    assert data.heldout_tokens(target, "my_data:tokens", 8, 4).shape == (3, 7)
    with pytest.raises(fg.FaspGraphError, match=r"returns ids \[windows, length\]"):
        data.heldout_tokens(target, "my_data:wrong", 8, 4)


def test_a_folder_of_images(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    for number in range(3):
        image.new("RGB", (9, 7), (255, 0, 51)).save(tmp_path / f"{number}.png")
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 1.0, 0.1]})
    )
    pixels = targets._pixels(tmp_path)
    target = data.Target("v", torch.nn.Flatten(), torch.zeros(2, 3, 4, 6), pixels=pixels)

    (batch,) = data.calibration_batches(target, str(tmp_path), 8, 2)

    assert batch.shape == (2, 3, 4, 6)
    assert batch[0, :, 0, 0].tolist() == pytest.approx([1.0, -0.5, -3.0])
    ids = data.Target("t", torch.nn.Flatten(), {"input_ids": torch.zeros(2, 3)})
    with pytest.raises(fg.FaspGraphError, match="takes no images"):
        data.calibration_batches(ids, str(tmp_path), 8, 2)


def test_a_factory_that_fails_or_returns_something_else(tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(
        "import torch\n"
        "def fails():\n    raise IndexError('out of layers')\n"
        "def alone():\n    return torch.nn.Linear(2, 2)\n"
        "def swapped():\n    return torch.zeros(2, 2), torch.nn.Linear(2, 2)\n"
        "def five():\n    return torch.nn.Linear(2, 2), torch.zeros(2, 2), 5\n"
        "def rows():\n    return torch.nn.Linear(2, 2), torch.zeros(2, 2), torch.zeros(4, 2)\n"
    )
    monkeypatch.chdir(tmp_path)

    for name, message in (
        ("fails", "failed: IndexError: out of layers"),
        ("alone", "help: return "),
        ("swapped", "where the model stands"),
        ("five", "returned int where the calibration stands"),
        ("rows", "returned Tensor where .* help: return .model, inputs, a list of batches"),
        ("absent", "cannot import"),
    ):
        with pytest.raises(fg.FaspGraphError, match=message):
            data.load_target(f"my_models:{name}")


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(fg.FaspGraphError, match="no config.json"):
        data.load_target(str(tmp_path))


def test_a_model_whose_inputs_cannot_be_guessed():
    model = SimpleNamespace(main_input_name="input_values", config=None)

    with pytest.raises(fg.FaspGraphError, match="package.module:factory"):
        targets.example_inputs(model)
