"""The page in a real headless Chromium: it loads, answers clicks and keys, and stays fast."""

import re
from pathlib import Path
from types import SimpleNamespace

import browser as chromium
import numpy as np
import pytest
import torch
from programs_of_zoo import program
from torch import nn

import fasp_graph as fg
from fasp_graph.pages import view
from passes.groups import Consumer, DependencyGraph, Group, Layer, Member

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
PICTURE = Path(__file__).parents[1] / "docs" / "viewer.png"
HOSTILE = "</script><img src=x onerror=alert(1)>&"


@pytest.fixture(scope="module")
def browser():
    driver = chromium.start()
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pruned():
    entry, known = program("llama-random")
    config = fg.Config(sparsity=0.3)
    return fg.prune(entry.model, entry.inputs, entry.calibration, config, program=known)


@pytest.fixture
def show(browser, tmp_path, request):
    """Opens a page; at the end of the test the console must be silent. A picture stays behind."""

    def opened(deps, *rest):
        browser.get(view.to_html(deps, tmp_path / "graph.html", *rest).as_uri())
        return browser

    yield opened
    chromium.picture(browser, request.node.name)
    assert browser.get_log("browser") == []


def find(browser, selector):
    return browser.find_elements("css selector", selector)


def rows(browser):
    return [row.text for row in find(browser, "#outline [role=treeitem]")]


def centre(browser, node):
    """Where a node of the picture stands on the screen."""
    return browser.execute_script(
        "const p = faspGraph.cy.getElementById(arguments[0]).renderedPosition();"
        "const r = document.getElementById('picture').getBoundingClientRect();"
        "return [r.x + p.x, r.y + p.y];",
        node,
    )


def click_at(browser, node, times=1):
    actions = webdriver.ActionChains(browser)
    x, y = centre(browser, node)
    actions.w3c_actions.pointer_action.move_to_location(round(x), round(y))
    for _ in range(times):
        actions.w3c_actions.pointer_action.click()
    actions.perform()


def lit(browser, name):
    return set(
        browser.execute_script(
            f"return faspGraph.cy.nodes('.{name}').map(node => node.id().slice(2))"
        )
    )


def test_a_click_on_a_weight_lights_what_goes_with_it(show, pruned):
    browser = show(pruned.deps, pruned.plan, pruned.report)

    click_at(browser, "m:model.layers.0.mlp.gate_proj")

    mlp = "model.layers.0.mlp."
    assert lit(browser, "member") == {mlp + "gate_proj", mlp + "up_proj"}
    assert lit(browser, "consumer") == {mlp + "down_proj"}
    detail = find(browser, "#detail")[0].text
    kept = pruned.model.model.layers[0].mlp.gate_proj.out_features
    assert mlp + "gate_proj.weight" in detail and "rows 0-79" in detail and f"{kept} × 48" in detail
    assert mlp + "up_proj.weight" in detail


def test_a_click_on_a_group_tells_all_about_it(show, pruned):
    browser = show(pruned.deps, pruned.plan, pruned.report)

    find(browser, "#groups .chip")[0].click()

    group = next(group for group in pruned.deps.groups if group.kind == "chain")
    detail = find(browser, "#detail")[0].text
    assert group.name in detail and group.symmetry in detail
    assert f"{len(pruned.plan.kept[group.name])} of {group.size}" in detail
    assert "error after repair" in detail and group.consumers[0].line in detail
    stopped = (group.size - len(pruned.plan.kept[group.name])) // group.blocks
    terms = [term.text for term in find(browser, "#detail dt")]
    assert len(terms) == len(set(terms)) and "blocks" in terms
    assert f"Stopped at {stopped}: " in detail and find(browser, "#detail .curve circle")
    assert all(member.parameter in detail for member in group.members)


def test_the_picture_of_the_documentation(show, request):
    """`--update-golden` takes it anew."""
    entry, known = program("llama")
    batches, config = entry.calibration[:2], fg.Config(sparsity=0.3)
    pruned = fg.prune(entry.model, entry.inputs, batches, config, program=known)
    browser = show(pruned.deps, pruned.plan, pruned.report, "zoo:llama")

    click_at(browser, "m:model.layers.0.mlp.gate_proj")
    find(browser, "#detail .chip")[0].click()

    mlp = "model.layers.0.mlp."
    assert lit(browser, "member") == {mlp + "gate_proj", mlp + "up_proj"}
    assert find(browser, "#detail .curve")
    if request.config.getoption("--update-golden"):
        browser.save_screenshot(str(PICTURE))


def test_what_was_not_measured_is_left_out(show):
    entry, known = program("llama-random")
    config = fg.Config(method="magnitude")
    pruned = fg.prune(entry.model, entry.inputs, None, config, program=known)
    browser = show(pruned.deps, pruned.plan, pruned.report)

    find(browser, "#groups .chip")[0].click()

    detail = find(browser, "#detail")[0].text
    assert "kept" in detail and "error" not in detail and not find(browser, ".curve")


def test_a_frozen_group_says_why(show, pruned):
    browser = show(pruned.deps)
    frozen = next(group for group in pruned.deps.groups if group.kind == "frozen")

    find(browser, "#search")[0].send_keys(frozen.name)
    find(browser, "#found .hit")[0].click()

    assert frozen.reason in find(browser, "#detail")[0].text


def test_search_finds_groups_weights_and_modules_and_escape_clears(show, pruned):
    browser = show(pruned.deps)
    body = find(browser, "body")[0]

    body.send_keys("/")
    browser.switch_to.active_element.send_keys("o_proj")
    hits = [hit.text.split("\n") for hit in find(browser, "#found .hit")]
    assert {kind for kind, _ in hits} == {"weight"} and all("o_proj" in name for _, name in hits)
    browser.switch_to.active_element.send_keys(webdriver.Keys.ESCAPE)

    assert not find(browser, "#found")[0].is_displayed()
    assert find(browser, "#outline")[0].is_displayed()


def test_the_outline_is_driven_by_keys(show, pruned):
    browser = show(pruned.deps)
    before = rows(browser)
    find(browser, "#outline [role=treeitem]")[0].click()

    browser.switch_to.active_element.send_keys(webdriver.Keys.ARROW_LEFT)

    closed = rows(browser)
    assert len(closed) < len(before)
    assert browser.switch_to.active_element.get_attribute("aria-expanded") == "false"
    browser.switch_to.active_element.send_keys(webdriver.Keys.ARROW_RIGHT)
    assert rows(browser) == before
    parts = [part for part in find(browser, "button, input, select, [role]") if part.is_displayed()]
    assert len(parts) > 9 and all(part.accessible_name for part in parts)


def test_arrows_go_through_the_outline_and_enter_chooses(show, pruned):
    browser = show(pruned.deps, pruned.plan, pruned.report)
    find(browser, "#outline [role=treeitem]")[0].click()
    keys, names = webdriver.Keys, rows(browser)

    def press(key):
        browser.switch_to.active_element.send_keys(key)
        return browser.switch_to.active_element.text

    assert press(keys.ARROW_DOWN) == names[1] and press(keys.END) == names[-1]
    assert press(keys.ARROW_UP) == names[-2] and press(keys.HOME) == names[0]
    press(keys.END)
    press(keys.ENTER)
    chosen = browser.switch_to.active_element
    assert chosen.get_attribute("aria-selected") == "true"
    assert "lm_head" in find(browser, "#detail h2")[0].text


def test_keys_zoom_fit_and_change_the_theme(show, pruned):
    browser = show(pruned.deps)
    body, zoom = find(browser, "body")[0], "return faspGraph.cy.zoom()"
    fitted, offered = browser.execute_script(zoom), find(browser, "#theme")[0].text

    body.send_keys("+")
    larger = browser.execute_script(zoom)
    body.send_keys("--")
    smaller = browser.execute_script(zoom)
    body.send_keys("f")
    back = browser.execute_script(zoom)
    body.send_keys("d")

    assert smaller < fitted < larger and back == pytest.approx(fitted, rel=0.01)
    assert find(browser, "#theme")[0].text != offered


def test_a_click_on_a_band_tells_of_its_group(show, pruned):
    browser = show(pruned.deps)
    place = (
        "const e = faspGraph.cy.edges().filter(e => e.data('groups').length == 1)[0];"
        "const g = faspGraph.model.data.groups[e.data('groups')[0]];"
        "e.emit('tap'); return g.name;"
    )

    name = browser.execute_script(place)

    assert find(browser, "#detail h2")[0].text == name and lit(browser, "member")


def test_the_legend_switches_bands_and_the_list_chooses_a_kind(show, pruned):
    browser = show(pruned.deps)
    drawn = "return faspGraph.cy.edges('.chain').filter(edge => edge.visible()).length"
    assert browser.execute_script(drawn)

    find(browser, "#legend input")[0].click()  # of chain
    assert not browser.execute_script(drawn)

    find(browser, "#kind option[value=frozen]")[0].click()
    frozen = [group.name for group in pruned.deps.groups if group.kind == "frozen"]
    assert [chip.text.split("\n")[0] for chip in find(browser, "#groups .chip")] == frozen


def test_open_all_opens_what_close_all_closed(show, pruned):
    browser = show(pruned.deps, pruned.plan, pruned.report, "llama-random")
    drawn = "return faspGraph.cy.nodes().map(node => node.data('label'))"

    find(browser, "#close")[0].click()
    (closed,) = [label for label in browser.execute_script(drawn) if label.startswith("▸ model")]
    find(browser, "#open")[0].click()

    assert re.fullmatch(r"▸ model\n\S+ → \S+ parameters", closed)
    labels = browser.execute_script(drawn)
    assert not any(label.startswith("▸") for label in labels)
    assert any(label.startswith("gate_proj\nweight") for label in labels)
    assert browser.title == find(browser, "h1")[0].text == "Coupled weights of llama-random"


@pytest.mark.parametrize("name", ["unet", "mixtral"])
def test_the_first_view_holds_the_whole_graph(show, name):
    browser = show(program(name)[1].deps)

    left, top, right, bottom, width, height = browser.execute_script(
        "const { cy } = faspGraph, b = cy.elements().renderedBoundingBox();"
        "return [b.x1, b.y1, b.x2, b.y2, cy.width(), cy.height()];"
    )
    assert 0 <= left < right <= width and 0 <= top < bottom <= height


def test_experts_of_one_card_are_marked_as_coupled_within(show):
    browser = show(program("mixtral")[1].deps)

    labels = browser.execute_script("return faspGraph.cy.nodes().map(node => node.data('label'))")
    marked = [label for label in labels if "within" in label]
    assert marked and all("experts" in label and "↻ chain" in label for label in marked)


def test_a_double_click_closes_and_opens_a_module(show, pruned):
    browser = show(pruned.deps)
    drawn = "return faspGraph.cy.nodes().length"
    before = browser.execute_script(drawn)

    find(browser, "#close")[0].click()
    closed = browser.execute_script(drawn)
    click_at(browser, "m:model", times=2)

    assert closed < browser.execute_script(drawn) < before


def test_a_fold_is_turned_by_keys_and_spread_by_a_double_click(show):
    browser = show(many_layers(4))
    body = find(browser, "body")[0]
    drawn = "return faspGraph.cy.nodes().map(node => node.id())"
    assert "m:net.0.part0.a" in browser.execute_script(drawn)

    body.send_keys("]")
    turned = browser.execute_script(drawn)
    browser.execute_script("faspGraph.cy.zoom(0.5); faspGraph.cy.center()")
    body.send_keys("[")
    back = browser.execute_script(drawn)
    find(browser, "#outline .twist")[1].click()

    assert "m:net.1.part0.a" in turned and "m:net.0.part0.a" not in turned
    assert "m:net.0.part0.a" in back
    assert {"m:net.0", "m:net.3"} <= set(browser.execute_script(drawn))


@pytest.mark.parametrize("layers", [1, 4])
def test_only_a_fold_has_buttons_that_turn_it(show, layers):
    browser = show(many_layers(layers, parts=1))

    shown = [button.text for button in find(browser, "header button") if button.is_displayed()]

    assert ("‹ layer" in shown, "layer ›" in shown) == (layers > 1, layers > 1)
    assert "Open all" in shown


def test_the_legend_counts_the_groups_of_each_kind(show, pruned):
    browser = show(pruned.deps)

    rows = [row.text for row in find(browser, "#legend li")]

    kinds = [group.kind for group in pruned.deps.groups]
    for kind in ("chain", "bilinear", "head", "width", "frozen"):
        assert any(
            row.startswith(f"{kind}: ") and row.endswith(f"({kinds.count(kind)})") for row in rows
        )


def test_dark_and_light(show, pruned):
    browser = show(pruned.deps)
    first = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    offered = find(browser, "#theme")[0].text

    find(browser, "#theme")[0].click()

    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") != first
    assert (offered, find(browser, "#theme")[0].text) in (("Dark", "Light"), ("Light", "Dark"))


def test_hostile_names_are_only_text(show):
    model = nn.Sequential()
    model.add_module(HOSTILE, nn.Linear(5, 8))
    model.add_module("act", nn.ReLU())
    model.add_module("out", nn.Linear(8, 3))

    browser = show(fg.analyze(model, torch.randn(3, 5)))

    assert HOSTILE in rows(browser) and not find(browser, "img")


def many_layers(layers, width=8, parts=50):
    """A graph of layers * 2 * parts parameters, as `analyze` would give for a very deep model."""
    each = np.arange(width)[:, None]
    places = [f"net.{k}.part{j}" for k in range(layers) for j in range(parts)]
    names = [f"{place}.{w}" for place in places for w in ("a", "b")]
    groups = tuple(
        Group(
            name=f"{up}.0",
            kind="chain",
            symmetry="permutation",
            size=width,
            blocks=1,
            members=(Member(f"{up}.weight", 0, each), Member(f"{down}.weight", 1, each)),
            consumers=(Consumer(f"linear_{k}", f"{down}.weight", 1, f"module {down}"),),
            reason="",
            block_of=np.zeros(width, int),
        )
        for k, (up, down) in enumerate(zip(names[::2], names[1::2], strict=True))
    )
    shapes = {f"{name}.weight": (width, width) for name in names}
    layer = Layer(SimpleNamespace(sites=[]), np.zeros(0))
    return DependencyGraph(groups, shapes, (layer,))


def test_ten_thousand_weights_are_folded(show):
    browser = show(many_layers(100))

    assert browser.execute_script("return faspGraph.model.parameterOf.size") == 10_000
    assert browser.execute_script("return faspGraph.cy.nodes().length") < 300
    find(browser, "#search")[0].send_keys("net.57.part3.b.weight")
    find(browser, "#found .hit")[0].click()
    assert lit(browser, "chosen") == {"net.57.part3.b"}
    assert lit(browser, "member") == {"net.57.part3.a"}


def test_a_hundred_layers_spread_out_are_a_grid_of_closed_boxes(show):
    browser = show(many_layers(100))
    spread = "faspGraph.act.toggle(faspGraph.model.byId.get('f:net:0'))"
    drawn = "return faspGraph.cy.nodes().map(node => node.id())"

    find(browser, "#open")[0].click()
    browser.execute_script(spread)

    assert {"m:net.0", "m:net.57", "m:net.99"} <= set(browser.execute_script(drawn))
    assert len(browser.execute_script(drawn)) < 300
    width, height = browser.execute_script(
        "const b = faspGraph.cy.getElementById('f:net:0').boundingBox(); return [b.w, b.h]"
    )
    assert 0.25 < width / height < 4


def test_what_stays_in_the_picture_is_kept(show, pruned):
    browser = show(pruned.deps)
    kept = "return faspGraph.cy.nodes().filter(node => node.scratch('old')).map(node => node.id())"
    browser.execute_script("faspGraph.cy.nodes().forEach(node => node.scratch('old', true))")
    before = browser.execute_script(kept)
    toggle = "faspGraph.act.toggle(faspGraph.model.byId.get('m:model.layers.0.mlp'))"

    browser.execute_script(toggle)
    closed = browser.execute_script(kept)
    browser.execute_script(toggle)

    inner = {f"m:model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert set(before) - set(closed) == inner and browser.execute_script(kept) == closed
    labels = browser.execute_script("return faspGraph.cy.nodes().map(node => node.data('label'))")
    assert "mlp" in labels and len(labels) == len(before)


def test_a_notebook_frame_draws(browser, pruned, tmp_path):
    (tmp_path / "notebook.html").write_text(view.show(pruned.deps)._repr_html_(), encoding="utf-8")
    browser.get((tmp_path / "notebook.html").as_uri())

    browser.switch_to.frame(find(browser, "iframe")[0])

    assert find(browser, "canvas") and rows(browser)
