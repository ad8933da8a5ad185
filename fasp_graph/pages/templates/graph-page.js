"use strict";
// The page: what is chosen, the outline, search, keys.
(() => {
  const { isBox, shown, turn, reveal, openBelow, every, standIn } = graphModel;
  const { make, at, full } = graphPanel;
  const model = graphModel.build(JSON.parse(at("data").textContent));
  const { data } = model, root = document.documentElement;
  const counts = {};
  data.groups.forEach(group => { counts[group.kind] = (counts[group.kind] || 0) + 1; });
  const hidden = new Set(["width", "frozen"]);
  let theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light", lit = [], chosen = null;
  root.dataset.theme = theme;
  const cy = graphDraw.start(at("picture"), theme);

  const act = {
    group(g, show = true) {
      lit = [g];
      chosen = null;
      const group = data.groups[g], first = model.cardOf.get(group.members[0]?.parameter);
      if (show && first && !group.members.some(m => standIn(model, model.cardOf.get(m.parameter)))) { reveal(model, first); redraw(); }
      graphPanel.group(model, g, act);
      relight();
    },
    parameter(name) {
      const card = model.cardOf.get(name);
      chosen = card;
      lit = (model.groupsOf.get(name) || []).map(held => held.g);
      const free = lit.filter(g => !["frozen", "width"].includes(data.groups[g].kind));
      if (free.length) lit = free;
      if (standIn(model, card) !== card) { reveal(model, card); redraw(); }
      graphPanel.parameter(model, name, act);
      relight();
    },
    node(node) {
      if (node.parameters?.length === 1) return act.parameter(node.parameters[0].name);
      chosen = node;
      const groups = graphPanel.node(model, node, act);
      lit = isBox(node) ? [] : groups.filter(g => !["frozen", "width"].includes(data.groups[g].kind));
      if (!isBox(node) && !lit.length) lit = groups;
      relight();
    },
    toggle(node) {
      const fold = node.kind === "fold";
      if (fold) node.spread = !node.spread;
      else if (!model.open.delete(node.id)) model.open.add(node.id);
      redraw();
      if (fold) fit();
    },
  };

  function redraw() {
    graphDraw.draw(cy, model, hidden);
    outline();
    relight();
  }
  function relight() {
    graphDraw.light(cy, model, lit, chosen);
    document.querySelectorAll("[role=treeitem]").forEach(item => {
      item.setAttribute("aria-selected", String(item.dataset.id === chosen?.id));
    });
  }
  const fit = () => cy.resize().fit(undefined, 24);

  // The outline: the picture for the keyboard and for screen readers. Closed boxes have no rows below.
  function outline() {
    const focused = document.activeElement?.dataset?.id, tree = at("outline");
    tree.replaceChildren();
    const visit = (node, level) => {
      const row = make("div", "item", undefined, tree), box = isBox(node);
      const open = node.kind === "fold" ? node.spread : model.open.has(node.id);
      row.setAttribute("role", "treeitem");
      row.setAttribute("aria-level", String(level));
      if (box) row.setAttribute("aria-expanded", String(open));
      row.tabIndex = -1;
      row.dataset.id = node.id;
      row.style.setProperty("--level", level);
      const mark = make("span", "twist", node.kind === "fold" ? "×" + node.children.length : box ? (open ? "▾" : "▸") : "", row);
      mark.setAttribute("aria-hidden", "true");
      make("span", "name", node.name || "(root)", row);
      mark.addEventListener("click", event => { event.stopPropagation(); if (box) act.toggle(node); });
      row.addEventListener("click", () => { act.node(node); centre(node); });
      if (box && (open || node.kind === "fold")) shown(node).forEach(child => visit(child, level + 1));
    };
    model.root.children.forEach(child => visit(child, 1));
    const again = [...tree.children].find(row => row.dataset.id === focused);
    (again || tree.firstElementChild)?.setAttribute("tabindex", "0");
    if (again) again.focus();
  }
  function centre(node) {
    const found = standIn(model, node), element = found && cy.getElementById(found.id);
    if (!element?.nonempty()) return;
    const box = element.renderedBoundingBox();
    if (box.x1 < 0 || box.y1 < 0 || box.x2 > cy.width() || box.y2 > cy.height()) cy.center(element);
  }
  at("outline").addEventListener("keydown", event => {
    const rows = [...at("outline").children], here = rows.indexOf(document.activeElement);
    const node = model.byId.get(rows[here]?.dataset.id);
    if (!node) return;
    const open = rows[here].getAttribute("aria-expanded");
    const go = to => { rows[here].tabIndex = -1; rows[to].tabIndex = 0; rows[to].focus(); };
    const moves = {
      ArrowDown: () => go(Math.min(here + 1, rows.length - 1)),
      ArrowUp: () => go(Math.max(here - 1, 0)),
      Home: () => go(0), End: () => go(rows.length - 1),
      ArrowRight: () => (open === "false" ? act.toggle(node) : go(Math.min(here + 1, rows.length - 1))),
      ArrowLeft: () => (open === "true" ? act.toggle(node) : go(Math.max(0, rows.findIndex(r => r.dataset.id === node.parent?.id)))),
      Enter: () => { act.node(node); centre(node); }, " ": () => { act.node(node); centre(node); },
    };
    if (!moves[event.key]) return;
    event.preventDefault();
    moves[event.key]();
  });

  function search() {
    const wanted = at("search").value.trim().toLowerCase(), list = at("found");
    list.replaceChildren();
    list.hidden = at("outline").hidden = false;
    if (!wanted) { list.hidden = true; return; }
    at("outline").hidden = true;
    let hits = 0;
    const hit = (kind, name, action) => {
      if (!name.toLowerCase().includes(wanted) || ++hits > 60) return;
      const row = graphPanel.button("hit", undefined, list, action);
      make("span", "dim", kind, row);
      make("span", "", name, row);
    };
    data.groups.forEach((group, g) => hit(group.kind, group.name, () => act.group(g)));
    model.parameterOf.forEach((_, name) => hit("weight", name, () => act.parameter(name)));
    every(model.root, node => isBox(node) && node.path && hit("module", node.path, () => { reveal(model, node); redraw(); act.node(node); centre(node); }));
    make("p", "dim", hits > 60 ? `${full(hits)} hits, 60 shown` : `${hits} hit${hits === 1 ? "" : "s"}`, list).setAttribute("role", "status");
  }

  function groups() {
    const list = at("groups"), kinds = at("kind").value;
    list.replaceChildren();
    const rows = data.groups.map((group, g) => [group, g]).filter(([group]) => kinds === "all" || group.kind === kinds);
    rows.slice(0, 300).forEach(([, g]) => graphPanel.chip(model, g, list, act));
    if (rows.length > 300) make("p", "dim", `and ${full(rows.length - 300)} more: search them`, list);
    if (!rows.length) make("p", "dim", "none", list);
  }
  function setTheme(next) {
    theme = root.dataset.theme = next;
    cy.style(graphDraw.style(theme));
    at("theme").textContent = theme === "dark" ? "Light" : "Dark";
  }
  function step(by) {
    const folds = cy.nodes(".fold").map(node => model.byId.get(node.id()));
    let near = folds.find(fold => fold === chosen) || folds[0];
    for (let up = chosen; up; up = up.parent) if (up.kind === "fold") near = up;
    if (!near) return;
    turn(model, near, (near.index + by + near.children.length) % near.children.length);
    redraw();
  }

  cy.on("tap", "node", event => act.node(model.byId.get(event.target.id())));
  cy.on("tap", "edge", event => act.group(event.target.data("groups")[0], false));
  cy.on("dbltap", ".box, .closed", event => { event.stopPropagation(); act.toggle(model.byId.get(event.target.id())); });
  cy.on("tap", event => { if (event.target === cy) clear(); });
  function clear() { lit = []; chosen = null; graphPanel.welcome(model); relight(); }

  at("search").addEventListener("input", search);
  at("kind").addEventListener("change", groups);
  at("fit").addEventListener("click", fit);
  at("theme").addEventListener("click", () => setTheme(theme === "dark" ? "light" : "dark"));
  at("earlier").addEventListener("click", () => step(-1));
  at("later").addEventListener("click", () => step(1));
  at("open").addEventListener("click", () => { openBelow(model, model.root); redraw(); fit(); });
  at("close").addEventListener("click", () => { model.open = new Set([model.root.id]); redraw(); fit(); });
  document.addEventListener("keydown", event => {
    const typing = ["INPUT", "SELECT"].includes(document.activeElement?.tagName);
    if (event.key === "Escape") { at("search").value = ""; search(); clear(); }
    if (typing) return;
    const keys = { "/": () => at("search").focus(), f: fit, d: () => at("theme").click(), "[": () => step(-1), "]": () => step(1),
      "+": () => cy.zoom(cy.zoom() * 1.25), "-": () => cy.zoom(cy.zoom() / 1.25) };
    if (keys[event.key] && !event.ctrlKey && !event.metaKey) { event.preventDefault(); keys[event.key](); }
  });

  if (data.name) document.title = at("title").textContent = `Coupled weights of ${data.name}`;
  const free = data.groups.length - (counts.frozen || 0);
  at("count").textContent = at("count").title = `${full(data.modules.length)} module${data.modules.length === 1 ? "" : "s"} with weights · ${full(free)} prunable group${free === 1 ? "" : "s"}, ${full(counts.frozen || 0)} frozen · `
    + (data.planned ? `${full(data.before)} → ${full(data.after)} parameters` : `${full(data.before)} parameters`);
  graphPanel.legend({ ...counts, planned: data.planned }, hidden, redraw);
  graphPanel.welcome(model);
  at("earlier").hidden = at("later").hidden = ![...model.byId.values()].some(node => node.kind === "fold");
  at("kind").value = counts.chain ? "chain" : "all";
  groups();
  setTheme(theme);
  redraw();
  fit();
  if (cy.zoom() > 1.2) { cy.zoom(1.2); cy.center(); }
  window.faspGraph = { cy, model, act };
})();
