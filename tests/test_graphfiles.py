"""Graph files for other tools: each holds every group, with what makes it and what sums it away."""

import re
import xml.etree.ElementTree as tree

import networkx as nx
import pytest
from programs_of_zoo import program

from fasp_graph.pages.graphfiles import text
from passes.names import folded, pattern


def couplings(deps):
    """(weight, group) for each weight that makes an axis, (group, weight or op) for each sum."""
    for group in deps.groups:
        if group.kind in ("frozen", "width"):
            continue
        users = {(held.parameter, held.dim) for held in group.consumers}
        node = f"group:{group.name}"
        for held in group.members:
            if (held.parameter, held.dim) not in users:
                yield held.parameter, node
        yield from ((node, held.parameter or held.node) for held in group.consumers)


@pytest.fixture(scope="module", params=["llama-random", "resnet", "mixtral"])
def deps(request):
    return program(request.param)[1].deps


def test_the_value_heads_chain_and_the_whole_heads_are_both_there():
    pairs = set(couplings(program("llama-random")[1].deps))

    weight = "model.layers.0.self_attn.v_proj.weight"
    assert {maker for maker, group in pairs if group.endswith("v_proj.0")} >= {weight}
    assert (weight, "group:model.layers.0.self_attn.q_proj.0.blocks") in pairs


def test_graphml_holds_every_coupling(deps):
    graph = nx.parse_graphml(text(deps, "graphml"))

    assert set(graph.edges) == set(couplings(deps))
    for group in deps.groups:
        if group.kind not in ("frozen", "width"):
            held = graph.nodes[f"group:{group.name}"]
            assert (held["kind"], held["units"]) == (group.kind, group.size)
            assert held["label"] == f"{group.kind} {group.size}"
    shapes = nx.get_node_attributes(graph, "shape")
    for name in set(deps.parameters) & set(shapes):
        assert shapes[name] == " x ".join(map(str, deps.parameters[name]))


def test_dot_holds_every_coupling(deps):
    found = text(deps, "dot")

    edges = re.findall(r'^  "(.*)" -> "(.*)" \[color="#\w{6}"\];$', found, re.M)
    assert set(edges) == set(couplings(deps)) and len(edges) == len(set(edges))
    nodes = set(re.findall(r'^  "(.*?)" \[label="[^"]+"', found, re.M))
    assert nodes == {name for pair in edges for name in pair}
    assert found.startswith("digraph coupled {") and found.endswith("\n}\n")


def test_mermaid_holds_every_coupling(deps):
    found = text(deps, "mermaid")

    names = nx.parse_graphml(text(deps, "graphml")).nodes(data="label")
    labels = dict(re.findall(r'^  (n\d+)(?:\(\[|\[)"(.*)"(?:\]\)|\])$', found, re.M))
    edges = re.findall(r"^  (n\d+) --> (n\d+)$", found, re.M)
    told = {(labels[left], labels[right]) for left, right in edges}
    expected = {(names[left], names[right]) for left, right in couplings(deps)}
    assert len(edges) == len(set(couplings(deps)))
    plain = {tuple(re.sub(r"#(\d+);", lambda m: chr(int(m[1])), t) for t in pair) for pair in told}
    assert plain == expected


def test_svg_shows_each_group_with_its_makers_left_and_its_consumers_right(deps):
    space = "{http://www.w3.org/2000/svg}"
    shown = {}
    for held in tree.fromstring(text(deps, "svg")).iter(f"{space}text"):
        if held.get("font-weight"):
            section = shown.setdefault(held.text, (set(), set()))
        else:
            section[held.get("x") != "16"].add(held.text)

    alike = {}
    for group in deps.groups:
        pairs = [pair for pair in couplings(deps) if f"group:{group.name}" in pair]
        if pairs:
            ends = sorted({end for _, end in pairs if not end.startswith("group:")})
            makers = sorted({maker for maker, _ in pairs if not maker.startswith("group:")})
            key = (pattern(group.name), group.kind, group.size)
            alike.setdefault(key, []).append((group.name, makers, ends))
    expected = {}
    for (_, kind, size), held in alike.items():
        name = ", ".join(folded(name for name, _, _ in held))
        sides = (set(folded(n for entry in held for n in entry[k])) for k in (1, 2))
        expected[f"{name}: {kind}, {size} units"] = tuple(sides)
    assert shown == expected
