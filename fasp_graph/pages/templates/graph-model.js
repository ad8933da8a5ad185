"use strict";
// The model behind the picture: modules as a tree, what is open, and which cards a group joins.
//   module  a box that opens          card  a module's own parameters
//   fold    a run of alike modules, shown one at a time     op  a node that sums two activations
const graphModel = (() => {
  const FOLD_FROM = 3, OPEN_CARDS = 90, MANY = 12;

  function build(data) {
    const root = { id: "m:", name: "model", path: "", kind: "module", children: [], parent: null };
    const byId = new Map([[root.id, root]]), cardOf = new Map(), parameterOf = new Map();
    const add = (node, parent) => {
      node.parent = parent;
      parent.children.push(node);
      byId.set(node.id, node);
      return node;
    };
    const module = path => {
      if (byId.has("m:" + path)) return byId.get("m:" + path);
      const cut = path.lastIndexOf(".");
      const parent = module(cut < 0 ? "" : path.slice(0, cut));
      return add({ id: "m:" + path, name: path.slice(cut + 1), path, kind: "module", children: [] }, parent);
    };
    for (const entry of data.modules) module(entry.name).parameters = entry.parameters;
    for (const group of data.groups) for (const user of group.consumers) {
      if (user.parameter || byId.has("o:" + user.node)) continue;
      add({ id: "o:" + user.node, name: user.node, path: user.module, kind: "op", children: [],
        line: user.line, parameters: [] }, module(user.module));
    }
    for (const node of [...byId.values()]) {
      if (!node.parameters || node.kind === "op") continue;
      let card = node;
      if (node.children.length) {
        card = add({ id: "p:" + node.path, name: node.name, path: node.path, kind: "card", children: [],
          parameters: node.parameters }, node);
        node.children.unshift(node.children.pop());
        node.parameters = undefined;
      } else node.kind = "card";
      for (const parameter of card.parameters) {
        cardOf.set(parameter.name, card);
        parameterOf.set(parameter.name, parameter);
      }
    }
    const model = { data, root, byId, cardOf, parameterOf, open: new Set([root.id]) };
    fold(root, model);
    model.groupsOf = memberships(data);
    data.groups.forEach(group => markInside(model, group));
    model.links = data.groups.flatMap((group, g) => links(model, group, g));
    openSome(model);
    return model;
  }

  // A group whose weights all lie in one card has no band: the card says so.
  function markInside(model, group) {
    const cards = new Set([...group.members, ...group.consumers].map(held => model.cardOf.get(held.parameter)));
    const [card] = cards;
    if (cards.size !== 1 || !card || !group.consumers.length || group.kind === "frozen") return;
    card.inside = (card.inside || new Set()).add(group.kind);
  }

  function memberships(data) {
    const found = new Map();
    data.groups.forEach((group, g) => group.members.forEach(member => {
      if (!found.has(member.parameter)) found.set(member.parameter, []);
      found.get(member.parameter).push({ g, member });
    }));
    return found;
  }

  function fold(node, model) {
    node.children.forEach(child => fold(child, model));
    node.signature = node.kind === "op" ? "op" : node.parameters
      ? "(" + node.parameters.map(p => p.leaf + p.shape).join() + ")"
      : "{" + node.children.map(c => (c.kind === "op" ? "" : c.name) + c.signature).join() + "}";
    const kept = [];
    for (let at = 0; at < node.children.length;) {
      let end = at + 1;
      while (end < node.children.length && node.children[end].signature === node.children[at].signature
        && node.children[at].kind === "module") end++;
      if (end - at < FOLD_FROM) { kept.push(node.children[at++]); continue; }
      const items = node.children.slice(at, end);
      const box = { id: `f:${node.path}:${at}`, name: `${items[0].name} … ${items.at(-1).name}`, path: node.path,
        kind: "fold", children: items, parent: node, index: 0, spread: false, signature: "fold" };
      items.forEach(item => { item.parent = box; });
      model.byId.set(box.id, box);
      kept.push(box);
      at = end;
    }
    node.children = kept;
  }

  // A producer goes to the consumers used next after it, up to the next producer: bands follow the run.
  function links(model, group, g) {
    if (group.kind === "frozen") return [];
    const ends = new Map(), used = new Set(group.consumers.map(user => user.parameter + user.dim)), made = new Map();
    for (const user of group.consumers) {
      const end = model.cardOf.get(user.parameter) || model.byId.get("o:" + user.node);
      if (end) ends.set(end, user.order);
    }
    for (const { parameter, dim } of group.members) {
      if (!used.has(parameter + dim)) made.set(model.cardOf.get(parameter), model.parameterOf.get(parameter).order);
    }
    const stops = [...made].filter(([card]) => !ends.has(card)).map(([, order]) => order);
    const users = [...ends].sort((a, b) => a[1] - b[1]), found = [];
    for (const [from, order] of made) {
      const next = users.filter(([to, at]) => (order < 0 || at > order) && to !== from);
      const stop = next.length ? Math.min(...stops.filter(at => at > next[0][1]), Infinity) : 0;
      next.filter(([, at]) => at < stop).forEach(([to]) => found.push({ from, to, g }));
    }
    return found;
  }

  function openSome(model) {
    let level = [model.root], cards = 0;
    while (level.length) {
      const next = level.flatMap(node => shown(node));
      cards += next.filter(node => !isBox(node)).length;
      if (cards > OPEN_CARDS) return;
      level.forEach(node => { if (node.kind === "module") model.open.add(node.id); });
      level = next.filter(isBox);
    }
  }

  const isBox = node => node.kind === "module" || node.kind === "fold";
  const shown = node => node.kind === "fold" && !node.spread ? [node.children[node.index]] : node.children;
  const isOpen = (model, node) => node.kind === "fold" || model.open.has(node.id);

  // What stands for a node in the picture: itself, a closed ancestor, or null (another item of a fold).
  function standIn(model, node) {
    const path = [];
    for (let at = node; at; at = at.parent) path.unshift(at);
    for (const at of path) {
      if (at.parent?.kind === "fold" && !at.parent.spread && at.parent.children[at.parent.index] !== at) return null;
      if (at === node || (at.kind === "module" && !model.open.has(at.id))) return at;
    }
    return node;
  }

  // Show another item of a fold, opened as far as the one before.
  function turn(model, fold, index) {
    const alike = (from, to) => {
      if (model.open.has(from.id)) model.open.add(to.id);
      from.children.forEach((child, k) => to.children[k] && alike(child, to.children[k]));
    };
    if (index !== fold.index) alike(fold.children[fold.index], fold.children[index]);
    fold.index = index;
  }

  function reveal(model, node) {
    for (let at = node; at.parent; at = at.parent) {
      if (at.parent.kind === "fold") turn(model, at.parent, at.parent.children.indexOf(at));
      if (at.parent.kind === "module") model.open.add(at.parent.id);
    }
  }

  // Open all below a node; of a fold of many one item, as thousands of cards neither fit nor draw in time.
  function openBelow(model, node) {
    model.open.add(node.id);
    const few = node.kind !== "fold" || node.children.length <= MANY;
    (few ? node.children : [node.children[node.index]]).filter(isBox).forEach(child => openBelow(model, child));
  }

  function every(node, visit) {
    visit(node);
    node.children.forEach(child => every(child, visit));
  }

  // Parameters below a node, before and after.
  function sizes(node) {
    if (node.sizes) return node.sizes;
    let before = 0, after = 0;
    every(node, at => (at.parameters || []).filter(p => p.counted).forEach(parameter => {
      before += parameter.shape.reduce((a, b) => a * b, 1);
      after += parameter.after.reduce((a, b) => a * b, 1);
    }));
    return node.sizes = { before, after };
  }

  return { MANY, build, shown, isBox, isOpen, standIn, turn, reveal, openBelow, every, sizes };
})();
