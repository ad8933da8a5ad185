"use strict";
// The picture: each box is laid out by Dagre on its own, from the inside out, and drawn by Cytoscape.
const graphDraw = (() => {
  const { MANY, shown, isBox, isOpen, standIn, sizes } = graphModel;
  const PAD = 18, HEAD = 28;
  const KINDS = ["chain", "bilinear", "head", "width", "frozen"];
  const PALETTES = {
    light: { chain: "#0b7285", bilinear: "#8a3ffc", head: "#c2570c", width: "#a17a00", frozen: "#7b8794",
      ink: "#17212b", dim: "#5b6875", card: "#ffffff", cut: "#e7ebef", line: "#c3ccd5", lit: "#ffe08a",
      use: "#bfe0ff", mark: "#1463b8", boxes: ["#f3f5f7", "#eaeef2", "#e1e7ec"], back: "#fbfcfd" },
    dark: { chain: "#3bc9db", bilinear: "#b78bff", head: "#ff9f5a", width: "#e3c04a", frozen: "#7d8a97",
      ink: "#e8edf2", dim: "#9aa7b4", card: "#26303a", cut: "#151b21", line: "#43505c", lit: "#6b5610",
      use: "#144c82", mark: "#74b9ff", boxes: ["#171d23", "#1c242b", "#222b33"], back: "#12171c" },
  };
  const count = value => value >= 1e9 ? (value / 1e9).toFixed(2) + "B" : value >= 1e6
    ? (value / 1e6).toFixed(2) + "M" : value >= 1e4 ? Math.round(value / 1e3) + "k" : String(value);

  const cut = ({ before, after }) => before === after ? count(before) : `${count(before)} → ${count(after)}`;

  function lines(node) {
    if (node.kind === "op") return ["Σ " + node.name.replace(/_default|_\d+$/g, "").replaceAll("_", " ")];
    if (isBox(node)) return ["▸ " + node.name, cut(sizes(node)) + " parameters"];
    const shape = p => p.shape.map((size, d) => size === p.after[d] ? size : `${size}→${p.after[d]}`).join(" × ");
    return [node.name, ...node.parameters.slice(0, 3).map(p => `${p.leaf} ${shape(p)}`),
      ...(node.parameters.length > 3 ? [`… ${node.parameters.length - 3} more`] : []),
      ...(node.inside ? [`↻ ${[...node.inside].join(", ")} within`] : [])];
  }

  function measure(node) {
    const text = lines(node);
    return { w: Math.max(...text.map(line => line.length)) * 7.2 + 22, h: text.length * 16 + 14, spots: new Map([[node.id, [0, 0]]]) };
  }

  // {w, h, spots: id -> centre relative to the node's own}
  function arrange(model, node, pairs, screen) {
    if (!isBox(node) || !isOpen(model, node)) return measure(node);
    const children = shown(node), inner = new Map(children.map(child => [child.id, arrange(model, child, pairs, screen)]));
    const edges = flow(children, pairs.get(node.id) || []);
    const scale = ({ width, height }) => Math.min(screen.w / width, screen.h / height);
    const options = ["TB", "LR"].map(direction => lay(inner, edges, direction));
    const { width, height, centres } = scale(options[0]) >= scale(options[1]) ? options[0] : options[1];
    const w = Math.max(width, node.name.length * 7 + 60) + 2 * PAD, spots = new Map();
    [...inner.values()].forEach((box, k) => {
      const { x, y } = centres[k];
      for (const [leaf, [dx, dy]] of box.spots) spots.set(leaf, [x + dx - width / 2, y + dy - height / 2 + HEAD / 2]);
    });
    return { w, h: height + 2 * PAD + HEAD, spots };
  }

  // Boxes with the same things inside are laid out once: layers are alike, and most boxes stay as they were.
  const laid = new Map();
  function lay(inner, edges, rankdir) {
    const at = new Map([...inner.keys()].map((id, k) => [id, k])), boxes = [...inner.values()].map(({ w, h }) => [w, h]);
    const pairs = [...new Set(edges.map(([from, to]) => `${at.get(from)} ${at.get(to)}`))];
    const key = JSON.stringify([rankdir, boxes, pairs]);
    if (!laid.has(key)) laid.set(key, byDagre(boxes, pairs.map(pair => pair.split(" ")), rankdir));
    return laid.get(key);
  }
  function byDagre(boxes, pairs, rankdir) {
    const graph = new dagre.graphlib.Graph();
    graph.setGraph({ rankdir, nodesep: 20, ranksep: 36 });
    graph.setDefaultEdgeLabel(() => ({}));
    boxes.forEach(([width, height], k) => graph.setNode(String(k), { width, height }));
    pairs.forEach(([from, to]) => graph.setEdge(from, to));
    dagre.layout(graph);
    return { ...graph.graph(), centres: boxes.map((_, k) => graph.node(String(k))) };
  }

  // Bands between children; parts that no band joins follow each other in the order of use, many of them in columns.
  function flow(children, pairs) {
    const part = new Map(children.map(child => [child.id, child.id]));
    const find = id => { while (part.get(id) !== id) id = part.get(id); return id; };
    for (const [from, to] of pairs) part.set(find(to), find(from));
    const parts = new Map();
    for (const child of children) {
      const key = find(child.id);
      if (!parts.has(key)) parts.set(key, []);
      parts.get(key).push(child.id);
    }
    const starts = new Set(pairs.map(pair => pair[1])), ends = new Set(pairs.map(pair => pair[0]));
    const order = [...parts.values()], found = [...pairs], columns = order.length > MANY ? Math.ceil(Math.sqrt(order.length)) : 1;
    for (let k = columns; k < order.length; k++) {
      for (const from of order[k - columns].filter(id => !ends.has(id))) {
        for (const to of order[k].filter(id => !starts.has(id))) found.push([from, to]);
      }
    }
    return found;
  }

  // Visible links, and for each box the pairs of its children that links join.
  function visibleLinks(model) {
    const edges = new Map(), pairs = new Map();
    for (const { from, to, g } of model.links) {
      const a = standIn(model, from), b = standIn(model, to);
      if (!a || !b || a === b) continue;
      const key = a.id + "\u0000" + b.id + "\u0000" + model.data.groups[g].kind;
      if (!edges.has(key)) edges.set(key, { a, b, groups: [] });
      edges.get(key).groups.push(g);
    }
    for (const { a, b, groups } of edges.values()) {
      if (model.data.groups[groups[0]].kind === "width") continue;
      const above = new Map();
      for (let at = a; at.parent; at = at.parent) above.set(at.parent, at);
      for (let at = b; at.parent; at = at.parent) {
        if (!above.has(at.parent)) continue;
        if (!pairs.has(at.parent.id)) pairs.set(at.parent.id, []);
        pairs.get(at.parent.id).push([above.get(at.parent).id, at.id]);
        break;
      }
    }
    return { edges, pairs };
  }

  function elements(model, screen) {
    const { edges, pairs } = visibleLinks(model), found = [];
    const { spots } = arrange(model, model.root, pairs, screen);
    const visit = (node, parent, depth) => {
      const box = isBox(node) && isOpen(model, node);
      const { before, after } = sizes(node), share = before ? Math.round(100 * after / before) : 100;
      const title = node.kind === "fold" && !node.spread
        ? `${node.name} · showing ${node.index + 1} of ${node.children.length} alike` : node.name;
      const label = box ? title : lines(node).join("\n"), size = box ? {} : measure(node);
      found.push({ group: "nodes", data: { id: node.id, parent, label, share, w: size.w, h: size.h, depth: depth % 3 },
        classes: box ? `box ${node.kind}` : isBox(node) ? "closed" : node.kind,
        position: box ? undefined : { x: spots.get(node.id)[0], y: spots.get(node.id)[1] } });
      if (box) shown(node).forEach(child => visit(child, node.id, depth + 1));
    };
    shown(model.root).forEach(child => visit(child, undefined, 0));
    for (const [key, { a, b, groups }] of edges) {
      const group = model.data.groups[groups[0]];
      found.push({ group: "edges", data: { id: `e:${key}`, source: a.id, target: b.id, groups,
        wide: 1.5 + Math.log2(1 + group.size) / 2.2 }, classes: group.kind });
    }
    return found;
  }

  function style(theme) {
    const c = PALETTES[theme], mono = "ui-monospace, SFMono-Regular, Menlo, Consolas, monospace";
    return [
      { selector: "node", style: { shape: "round-rectangle", label: "data(label)", color: c.ink, "font-size": 12,
        "font-family": mono, "text-wrap": "wrap", "text-valign": "center", "text-halign": "center",
        "line-height": 1.25, "border-width": 1, "border-color": c.line, "min-zoomed-font-size": 5 } },
      { selector: ".card, .closed", style: { width: "data(w)", height: "data(h)", "background-fill": "linear-gradient",
        "background-gradient-direction": "to-right", "background-gradient-stop-colors": `${c.card} ${c.card} ${c.cut} ${c.cut}`,
        "background-gradient-stop-positions": e => { const s = e.data("share"); return `0 ${s} ${s} 100`; } } },
      { selector: ".closed", style: { "border-style": "double", "border-width": 3, "font-weight": "bold" } },
      { selector: ".op", style: { "border-style": "dashed", width: "data(w)", height: "data(h)", "background-color": c.card,
        "border-color": c.bilinear, color: c.dim } },
      { selector: ".box", style: { "text-valign": "top", "text-margin-y": -5, "font-size": 13, "font-weight": "bold", color: c.dim,
        padding: PAD, "background-color": e => c.boxes[e.data("depth")], "background-opacity": 1 } },
      { selector: ".fold", style: { "border-style": "dashed", "border-width": 2, "border-color": c.dim } },
      { selector: "edge", style: { "curve-style": "bezier", width: "data(wide)", "line-opacity": 0.75,
        "target-arrow-shape": "triangle", "arrow-scale": 0.8 } },
      { selector: "edge.off", style: { display: "none" } },
      { selector: "edge.off.lit", style: { display: "element" } },
      { selector: "edge.width", style: { "line-style": "dashed", "line-opacity": 0.45 } },
      ...KINDS.map(kind => ({ selector: `edge.${kind}`, style: { "line-color": c[kind], "target-arrow-color": c[kind] } })),
      { selector: ".faint", style: { opacity: 0.3 } },
      { selector: "node.member", style: { "background-fill": "solid", "background-color": c.lit, "border-color": c.width, "border-width": 2 } },
      { selector: "node.consumer", style: { "background-fill": "solid", "background-color": c.use, "border-color": c.mark, "border-width": 2 } },
      { selector: "edge.lit", style: { opacity: 1, "line-opacity": 1, width: e => e.data("wide") + 3, "z-index": 9 } },
      { selector: "node.chosen", style: { "border-color": c.mark, "border-width": 4 } },
    ];
  }

  function start(container, theme) {
    const cy = cytoscape({ container, style: style(theme), minZoom: 0.03, maxZoom: 3, 
      boxSelectionEnabled: false, autounselectify: true, autoungrabify: true, hideEdgesOnViewport: false,
      textureOnViewport: false, pixelRatio: "auto" });
    return cy;
  }

  // What stays is kept: making an element costs more than moving it.
  function draw(cy, model, hidden) {
    const wanted = elements(model, { w: cy.width(), h: cy.height() }), ids = new Set(wanted.map(({ data }) => data.id));
    wanted.forEach(({ data, classes }) => { data.stamp = JSON.stringify([data, classes]); });
    cy.batch(() => {
      cy.remove(cy.elements().filter(held => !ids.has(held.id())));
      cy.add(wanted.filter(({ data, classes, position }) => {
        const held = cy.getElementById(data.id);
        if (held.empty()) return true;
        if (held.data("stamp") !== data.stamp) held.data(data).classes(classes);
        if (position && (held.position("x") !== position.x || held.position("y") !== position.y)) held.position(position);
        return false;
      }));
      cy.edges().removeClass("off");
      hidden.forEach(kind => cy.edges("." + kind).addClass("off"));
    });
  }

  // Light what a group owns and what sums it away; the rest goes faint.
  function light(cy, model, groups, chosen) {
    cy.batch(() => {
      cy.elements().removeClass("faint member consumer lit chosen");
      if (chosen) { const at = standIn(model, chosen); if (at) cy.getElementById(at.id).addClass("chosen"); }
      if (!groups.length) return;
      const wanted = new Set(groups), ids = { member: new Set(), consumer: new Set() };
      const mark = (node, name) => { const at = node && standIn(model, node); if (at) ids[name].add(at.id); };
      for (const g of wanted) {
        const group = model.data.groups[g];
        group.members.forEach(member => mark(model.cardOf.get(member.parameter), "member"));
        group.consumers.forEach(user => mark(model.cardOf.get(user.parameter) || model.byId.get("o:" + user.node), "consumer"));
      }
      cy.nodes(".card, .closed, .op").addClass("faint");
      cy.edges().forEach(edge => { edge.addClass(edge.data("groups").some(g => wanted.has(g)) ? "lit" : "faint"); });
      for (const name of ["member", "consumer"]) {
        ids[name].forEach(id => cy.getElementById(id).removeClass("faint member").addClass(name));
      }
    });
  }

  return { start, draw, light, style, count, PALETTES, KINDS };
})();
