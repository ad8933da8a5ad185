"""What a user does with a result in one process: predict, generate, train, move, compile."""

import copy
import re
import shutil

import pytest
import torch
from families import EVERY, free_length, output, program, prompt, pruned

from passes.compare import tensors

pytestmark = pytest.mark.xdist_group("families")  # captured and pruned in one process, once
GENERATING = [name for name, family in EVERY.items() if family.kind != "encoder"]
DECODERS = [name for name, family in EVERY.items() if family.kind == "decoder"]
TEXT = {"max_new_tokens": 6, "min_new_tokens": 6}
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2.0**-24}


@pytest.mark.parametrize("name", EVERY)
def test_the_users_class_has_the_graphs_numbers(name):
    result, inputs = pruned(name), EVERY[name].batch(2, 9 if free_length(name) else 11)

    expected = output(result.graph_module, inputs)

    assert type(result.model) is type(program(name)[0])
    assert "graph" not in result.emission.ways.values()
    assert torch.allclose(output(result.model, inputs), expected, atol=1e-5)
    again = copy.deepcopy(result.model)
    again.load_state_dict({k: v.clone() for k, v in result.model.state_dict().items()})
    assert torch.equal(output(again, inputs), output(result.model, inputs))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_it_moves_to_other_types(name, dtype):
    def typed(value):
        return value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value

    model, inputs = copy.deepcopy(pruned(name).model).to(dtype), EVERY[name].batch(2, 9)
    moved = {key: typed(value) for key, value in inputs.items()}
    try:
        dense = output(copy.deepcopy(program(name)[0]).to(dtype), moved)
    except RuntimeError as error:
        pytest.skip(f"the dense model does not run in it: {error}")

    found = output(model, moved)

    expected = output(pruned(name).model, inputs)
    rounding = 16 * ROUNDING[dtype]  # of about sixteen sums in a row
    assert found.dtype == dense.dtype
    assert float((found.float() - expected).norm() / expected.norm()) < rounding


@pytest.mark.parametrize("name", GENERATING)
def test_it_generates(name):
    model, inputs = pruned(name).model, prompt(name)

    def ids(**more):
        torch.manual_seed(0)
        return model.generate(**inputs, **TEXT, **more)

    for way in ({"do_sample": False}, {"do_sample": True, "top_k": 20}, {"num_beams": 2}):
        assert torch.equal(ids(**way, use_cache=True), ids(**way, use_cache=False)), way


@pytest.mark.parametrize("name", DECODERS)
def test_greedy_text_is_the_graphs(name):
    if not free_length(name):
        pytest.skip("its code unrolls the sequence, so the graph holds for one length")
    result, ids = pruned(name), prompt(name)["input_ids"]

    text = result.model.generate(ids, do_sample=False, **TEXT)

    for _ in range(6):
        logits = output(result.graph_module, {"input_ids": ids})[:, -1]
        logits[:, result.model.generation_config.eos_token_id] = -torch.inf  # min_new_tokens
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(text, ids)


@pytest.mark.parametrize("name", DECODERS)
def test_left_padding_in_a_batch_changes_no_text(name):
    model, (long, other) = pruned(name).model, prompt(name)["input_ids"]
    short = other[:4]
    batch = torch.stack([long, torch.cat([torch.full((2,), 2), short])])
    mask = torch.ones_like(batch)
    mask[1, :2] = 0
    options = {**TEXT, "do_sample": False}

    both = model.generate(batch, attention_mask=mask, **options)[:, 6:]

    assert torch.equal(both[0], model.generate(long[None], **options)[0, 6:])
    assert torch.equal(both[1], model.generate(short[None], **options)[0, 4:])


@pytest.mark.parametrize("name", EVERY)
def test_it_fine_tunes(name):
    model = copy.deepcopy(pruned(name).model).train()
    dense, inputs, _ = program(name)
    target = 2 * output(dense, inputs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    losses = []
    for _ in range(20):
        loss = (tensors(model(**inputs))[0] - target).square().mean()
        loss.backward()
        used = {plain(key) for key, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))

    dense.zero_grad()
    tensors(dense(**inputs))[0].square().mean().backward()
    assert losses[-1] < losses[0]
    assert used == {key for key, p in dense.named_parameters() if p.grad is not None}


def plain(key):
    """A padded weight under the name that it has in the dense model."""
    return re.sub(r"parametrizations\.(\w+)\.original", r"\1", key)


@pytest.mark.parametrize("name", EVERY)
def test_low_rank_adapters_train_and_merge(name):
    peft = pytest.importorskip("peft")
    inputs = EVERY[name].batch(2, 9)
    config = peft.LoraConfig(target_modules=EVERY[name].lora, r=2, init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(copy.deepcopy(pruned(name).model), config)

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    tensors(model(**inputs))[0].square().mean().backward()
    optimizer.step()
    tuned = output(model.eval(), inputs)
    merged = model.merge_and_unload()

    before = output(pruned(name).model, inputs)
    assert type(merged) is type(pruned(name).model)
    assert merged.state_dict().keys() == pruned(name).model.state_dict().keys()
    assert not torch.allclose(tuned, before, atol=1e-3)
    assert torch.allclose(output(merged, inputs), tuned, atol=1e-5 * float(tuned.abs().max() + 1))


@pytest.mark.parametrize("name", ["opt", "phi3", "mixtral", "bert"])  # one of every way
def test_it_compiles(name):
    torch._dynamo.reset()
    inputs = EVERY[name].batch(2, 9)

    found = output(torch.compile(pruned(name).model, backend="eager"), inputs)

    assert torch.allclose(found, output(pruned(name).model, inputs), atol=1e-6)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a compiler")
def test_inductor_compiles_adapters(mlp):
    from fasp_graph.emit.emission import Emission, apply_shapes

    recipe = Emission(
        shapes={"2.weight": (9, 16), "2.bias": (9,), "4.weight": (5, 9)},
        scatter={"2": (-1, 12, tuple(range(1, 10)))},
        gather={"4": (-1, 12, tuple(range(1, 10)))},
    )
    model = apply_shapes(mlp, recipe)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    inputs = torch.randn(3, 7)

    found = torch.compile(model)(inputs)

    assert torch.allclose(found, model(inputs), atol=1e-5)
