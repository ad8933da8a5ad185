"""Greedy text from flat programs: step(feed) -> outputs, by the names of the exported files."""

import numpy as np
import torch
import transformers as tf


def windows():
    """Tokens [4, 9] of the small random decoders."""
    return torch.randint(3, 101, (4, 9), generator=torch.Generator().manual_seed(0))


def llama(vocabulary=101):
    """A small random decoder of one layer, example inputs and calibration: MODEL for commands."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
    config = tf.LlamaConfig(vocab_size=vocabulary, max_position_embeddings=64, **sizes, **heads)
    batches = [{"input_ids": torch.randint(3, vocabulary, (3, 11))} for _ in range(5)]
    return tf.LlamaForCausalLM(config).eval(), batches[0], batches[1:]


def on_weights_of(model, graph):
    """Whether a graph holds no number of a parameter twice that `model` holds already."""
    held = {parameter.data_ptr() for parameter in model.parameters()}
    return {parameter.data_ptr() for parameter in graph.parameters()} <= held


def positions(mask):
    return np.clip(mask.cumsum(1) - 1, 0, None)


def greedy(session, ids, mask, steps):
    """Token ids [B, T + steps] of a decoder with past_key_values; `mask` 0: left padding."""
    entries = session.get_inputs()
    names = [entry.name for entry in session.get_outputs()]
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    feed = {
        entry.name: np.zeros(
            [len(ids), *[n if isinstance(n, int) else 0 for n in entry.shape[1:]]]
        ).astype(kinds[entry.type])
        for entry in entries
        if entry.name.startswith("past_key_values")
    }
    found, new = ids, ids
    for _ in range(steps):
        feed |= {"input_ids": new, "attention_mask": mask}
        if any(entry.name == "position_ids" for entry in entries):
            feed["position_ids"] = positions(mask)[:, -new.shape[1] :]
        outputs = dict(zip(names, session.run(None, feed), strict=True))
        new = outputs["logits"][:, -1:].argmax(-1)
        found = np.concatenate([found, new], 1)
        mask = np.concatenate([mask, np.ones_like(new)], 1)
        feed = {n.replace("present", "past_key_values"): v for n, v in outputs.items()}
        feed.pop("logits")
    return found


def greedy_in_parts(encoder, first, later, value, mask, start, steps):
    """Token ids [B, 1 + steps] of an encoder-decoder in three files."""
    given = [entry.name for entry in encoder.get_inputs()]
    (states,) = encoder.run(None, dict(zip(given, (value, mask), strict=False)))
    found = new = np.full((len(value), 1), start)
    feed = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
    part, past = first, {}
    for _ in range(steps):
        feed = {"input_ids": new, **feed, **past}
        held = {entry.name for entry in part.get_inputs()}
        names = [entry.name for entry in part.get_outputs()]
        outputs = part.run(None, {k: v for k, v in feed.items() if k in held})
        outputs = dict(zip(names, outputs, strict=True))
        new = outputs.pop("logits")[:, -1:].argmax(-1)
        found = np.concatenate([found, new], 1)
        past |= {n.replace("present", "past_key_values"): v for n, v in outputs.items()}
        part, feed = later, {"encoder_attention_mask": mask}
    return found
