"""Encoder-decoders as separate files: the same text as the model in one piece."""

import families
import pytest
import torch
import transformers as tf
from decoding import greedy_in_parts, on_weights_of

import fasp_graph as fg
from fasp_graph.emit.dense import dense_twin
from fasp_graph.exports import parts
from fasp_graph.exports.onnx import onnx_session
from passes.errors import VerificationError

pytestmark = pytest.mark.xdist_group("families")
FILES = ("decoder_model.onnx", "decoder_with_past_model.onnx", "encoder_model.onnx")


@pytest.fixture(scope="module")
def t5():
    config = tf.T5Config(
        **{"vocab_size": 101, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 1},
        **{"num_heads": 3, "decoder_start_token_id": 2, "eos_token_id": 1, "pad_token_id": 0},
    )
    torch.manual_seed(0)
    model = tf.T5ForConditionalGeneration(config).eval()
    return fg.prune(model, families.pairs(), None, fg.Config(method="magnitude", sparsity=0.3))


def test_t5_in_onnx_runtime(t5, tmp_path):
    found = fg.export(t5, tmp_path / "parts", cache=True)

    assert found.files == FILES and found.uncut == ()
    assert found.cache_bytes < found.dense_cache_bytes == 4 * 2 * 24
    first, later, encoder = (onnx_session(tmp_path / "parts" / name) for name in FILES)
    shapes = {entry.name: entry.shape for entry in later.get_inputs()}
    ends = ("decoder.key", "decoder.value", "encoder.key", "encoder.value")
    past = [f"past_key_values.0.{end}" for end in ends]
    assert list(shapes) == ["input_ids", *past, "encoder_attention_mask"]
    assert [shapes[name][3] < 8 for name in past] == [False, True, False, True]
    assert shapes[past[2]][::2] == ["batch_size", "encoder_sequence_length"]
    torch.manual_seed(1)
    ids, mask = torch.randint(3, 101, (2, 8)), torch.ones(2, 8, dtype=torch.long)
    mask[1, 5:] = 0
    made = greedy_in_parts(encoder, first, later, ids.numpy(), mask.numpy(), 2, 6)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "eos_token_id": None}
    expected = t5.model.generate(ids, attention_mask=mask, do_sample=False, **options)
    assert made.tolist() == expected.tolist()
    with pytest.raises(fg.FaspGraphError, match="exists"):
        fg.export(t5, tmp_path / "parts", cache=True)


def test_speech_in_parts():
    model, inputs, known = families.program("whisper")
    config = fg.Config(method="magnitude", sparsity=0.3)
    result = fg.prune(model, inputs, None, config, program=known)
    twin = dense_twin(result.model, result.deps, result.plan.kept)

    found = parts.parts_of(twin, result.inputs)

    assert found.cache_numbers < found.dense_cache_numbers == 2 * 48
    assert found.encoder.inputs == ("input_features",)
    assert found.first.inputs == ("input_ids", "encoder_hidden_states")
    for part in (found.encoder, found.first, found.later):
        assert on_weights_of(result.model, part.captured.graph_module)
    with pytest.raises(VerificationError, match="in parts"):
        parts.verify(found, families.build("whisper"), result.inputs[1]["input_features"])
