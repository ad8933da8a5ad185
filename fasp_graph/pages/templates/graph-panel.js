"use strict";
// The words beside the picture. Names are untrusted: text nodes only.
const graphPanel = (() => {
  const { sizes, isBox, every } = graphModel;
  const at = id => document.getElementById(id);
  const full = value => value.toLocaleString("en-US");
  const short = value => value === 0 ? "0" : value.toPrecision(3);
  const NAMES = { error_before: "error before repair", error_after: "error after repair",
    score_kept: "median score of what stays", score_removed: "median score of what goes" };

  // A long name goes on in the next line before a dot.
  const pieces = text => /\s/.test(text) ? [text]
    : text.split(/(?<!\d)(?=\.\w)|(?<=\d)(?=\.\D)/).flatMap((part, k) => k ? [document.createElement("wbr"), part] : [part]);

  function make(tag, name, text, parent) {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (text !== undefined) element.append(...pieces(text));
    if (parent) parent.append(element);
    return element;
  }
  function button(name, text, parent, action) {
    const element = make("button", name, text, parent);
    element.type = "button";
    element.addEventListener("click", action);
    return element;
  }
  function terms(parent, pairs) {
    const list = make("dl", "", undefined, parent);
    for (const [name, value] of pairs) {
      if (value === undefined || value === "") continue;
      make("dt", "", name, list);
      make("dd", "", String(value), list);
    }
  }
  function bar(parent, kept, size, what) {
    const share = size ? kept / size : 1, outer = make("div", "bar", undefined, parent);
    outer.setAttribute("role", "img");
    outer.setAttribute("aria-label", `${Math.round(100 * share)}% of the ${what} kept`);
    make("i", "", undefined, outer).style.width = `${100 * share}%`;
  }
  // What removing more and more units costs, the sum of their scores; the dot: where the plan stopped.
  function curve(parent, [stop, ...points]) {
    const errors = points.map(([, error]) => error).filter(error => error > 0), most = points.at(-1)[0];
    const [low, high] = [Math.log(Math.min(...errors)), Math.log(Math.max(...errors))];
    const x = k => 320 * k / most, y = error => error > 0 ? 56 - 50 * (Math.log(error) - low) / ((high - low) || 1) : 56;
    const draw = (tag, values, inside) => {
      const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
      for (const [name, value] of Object.entries(values)) element.setAttribute(name, value);
      inside.append(element);
      return element;
    };
    make("h3", "", "Predicted error of removal", parent);
    const picture = draw("svg", { viewBox: "-4 0 328 60", class: "curve", role: "img" }, parent);
    picture.setAttribute("aria-label", `rises to ${short(points.at(-1)[1])} at ${full(most)} units removed from each block`);
    draw("polyline", { points: points.map(([k, error]) => `${x(k)},${y(error)}`).join(" ") }, picture);
    draw("circle", { cx: x(stop[0]), cy: y(stop[1]), r: 4 }, picture);
    make("p", "dim", `Across: 0 to ${full(most)} units removed from each block. Up: log scale, to ${short(points.at(-1)[1])}. `
      + `Stopped at ${full(stop[0])}: ${short(stop[1])}.`, parent);
  }
  const axis = (dim, rank) => rank < 2 ? "entries" : dim === 0 ? "rows" : dim === 1 && rank === 2 ? "columns" : `dim ${dim}`;

  function group(model, g, act) {
    const found = model.data.groups[g], panel = clear(), planned = found.planned;
    const head = make("h2", "", undefined, panel);
    make("span", `dot ${found.kind}`, "", head).setAttribute("aria-hidden", "true");
    make("span", "", found.name, head);
    make("p", "dim", `Group of kind ${found.kind}: all of this goes together or stays.`, panel);
    terms(panel, [["units", full(found.size)], ["blocks", found.blocks > 1 ? `${found.blocks}, each keeps equally many` : "1"],
      ["symmetry", found.symmetry], ["kept", planned ? `${full(found.kept)} of ${full(found.size)}` : undefined],
      ...figures(found.figures || {}),
      ["reason", found.reason]]);
    if (planned) bar(panel, found.kept, found.size, "units");
    if (found.curve?.length) curve(panel, found.curve);
    weights(model, panel, "Weights that hold it", found.members, act);
    users(model, panel, found, act);
  }

  // What was not measured is null.
  function figures(held) {
    return Object.entries(held).filter(([, value]) => value !== null)
      .map(([name, value]) => [NAMES[name] || name.replaceAll("_", " "), short(value)]);
  }

  function weights(model, panel, title, members, act) {
    make("h3", "", `${title} (${members.length})`, panel);
    const list = make("ul", "rows", undefined, panel);
    for (const member of members.slice(0, 200)) {
      const item = make("li", "", undefined, list), parameter = model.parameterOf.get(member.parameter);
      button("link", member.parameter, item, () => act.parameter(member.parameter));
      const shape = parameter.shape.length ? parameter.shape.join(" × ") : "buffer";
      const small = parameter.after.join() !== parameter.shape.join() ? ` → ${parameter.after.join(" × ")}` : "";
      make("div", "dim", `${shape}${small} · ${axis(member.dim, parameter.shape.length)} ${member.rows}`
        + (member.unit ? ` · unit 0 owns ${member.unit}` : ""), item);
    }
    if (members.length > 200) make("li", "dim", `and ${members.length - 200} more`, list);
  }

  function users(model, panel, found, act) {
    if (!found.consumers.length) return;
    make("h3", "", `Summed away by (${found.consumers.length})`, panel);
    const list = make("ul", "rows", undefined, panel);
    for (const user of found.consumers.slice(0, 200)) {
      const item = make("li", "", undefined, list);
      if (user.parameter) button("link", user.parameter, item, () => act.parameter(user.parameter));
      else make("span", "", `${user.node}, between two activations`, item);
      make("div", "dim", [user.module, user.line].filter(Boolean).join(" · "), item);
    }
  }

  // What can be pruned first.
  function byKind(model, held) {
    const rank = ({ g }) => graphDraw.KINDS.indexOf(model.data.groups[g].kind);
    return [...held].sort((a, b) => rank(a) - rank(b));
  }

  function parameter(model, name, act) {
    const found = model.parameterOf.get(name), panel = clear(), held = byKind(model, model.groupsOf.get(name) || []);
    make("h2", "", name, panel);
    const before = found.shape.join(" × "), after = found.after.join(" × ");
    terms(panel, [["shape", found.shape.length ? before : "a buffer"], ["after", after === before ? "" : after]]);
    make("h3", "", held.length ? "Its dims belong to" : "No group holds it", panel);
    const list = make("ul", "rows", undefined, panel);
    for (const { g, member } of held) {
      const item = make("li", "", undefined, list), group = model.data.groups[g];
      chip(model, g, item, act);
      make("div", "dim", `${axis(member.dim, found.shape.length)} ${member.rows}`
        + (group.reason ? ` · ${group.reason}` : ""), item);
      const others = group.members.filter(other => other.parameter !== name);
      if (!others.length) continue;
      const most = group.kind === "frozen" || group.kind === "width" ? 3 : 12;
      make("div", "dim", others.length > most ? `with ${others.length} others, some of them` : "with", item);
      for (const other of others.slice(0, most)) {
        button("link", other.parameter, make("div", "", undefined, item), () => act.parameter(other.parameter));
      }
    }
  }

  function chip(model, g, parent, act) {
    const found = model.data.groups[g];
    const share = found.planned ? `, ${Math.round(100 * found.kept / found.size)}% kept` : "";
    const element = button("chip", undefined, parent, () => act.group(g));
    make("span", `dot ${found.kind}`, "", element).setAttribute("aria-hidden", "true");
    const words = make("span", "", found.name, element);
    make("div", "dim", `${full(found.size)} unit${found.size === 1 ? "" : "s"}${share}`, words);
    return element;
  }

  function node(model, chosen, act) {
    const panel = clear(), { before, after } = sizes(chosen);
    make("h2", "", chosen.path || chosen.name, panel);
    if (chosen.kind === "op") terms(panel, [["operation", chosen.name], ["line", chosen.line]]);
    else terms(panel, [["parameters", full(before)], ["after", after === before ? "" : full(after)]]);
    if (before && model.data.planned) bar(panel, after, before, "parameters");
    if (chosen.kind === "fold") make("p", "dim", `${chosen.children.length} modules of the same form.`, panel);
    for (const held of chosen.parameters || []) {
      const item = make("div", "", undefined, panel);
      button("link", held.name, item, () => act.parameter(held.name));
      make("span", "dim", "  " + held.shape.join(" × "), item);
    }
    const names = new Set(), found = new Set();
    every(chosen, below => (below.parameters || []).forEach(p => names.add(p.name)));
    for (const name of names) (model.groupsOf.get(name) || []).forEach(({ g }) => found.add(g));
    if (chosen.kind === "op") model.data.groups.forEach((group, g) => group.consumers.some(c => c.node === chosen.name) && found.add(g));
    if (found.size) make("h3", "", `Groups (${found.size})`, panel);
    const list = make("div", "chips", undefined, panel);
    [...found].slice(0, 100).forEach(g => chip(model, g, list, act));
    return [...found];
  }

  function clear() {
    at("detail").replaceChildren();
    return at("detail");
  }

  function welcome(model) {
    const panel = clear();
    make("h2", "", "What goes together", panel);
    make("p", "", "Every box is a module, every card holds weights. A band joins the weights whose rows make an axis to those "
      + "whose columns sum it away: its units can only be removed from all of them at once.", panel);
    make("p", "dim", "Click a card, a band or a group. Double-click a module to open or close it.", panel);
  }

  // One checkbox for each kind: its bands are drawn or not.
  function legend(counts, hidden, changed) {
    const texts = { chain: "chain: exact to remove, repaired", bilinear: "bilinear: two activations meet (Q·K)",
      head: "head: whole heads or experts", width: "width: the residual stream", frozen: "frozen: never removed" };
    for (const kind of graphDraw.KINDS) {
      const item = make("label", "", undefined, make("li", "", undefined, at("legend"))), box = make("input", "", undefined, item);
      box.type = "checkbox";
      box.checked = !hidden.has(kind);
      box.disabled = kind === "frozen";
      box.addEventListener("change", () => { hidden[box.checked ? "delete" : "add"](kind); changed(); });
      make("span", `dot ${kind}`, "", item).setAttribute("aria-hidden", "true");
      make("span", "", `${texts[kind]} (${counts[kind] || 0})`, item);
    }
    make("li", "swatch member", "owns the chosen group", at("legend"));
    make("li", "swatch consumer", "sums it away", at("legend"));
    make("li", "dim", "grey right part of a card: removed share", at("legend")).hidden = !counts.planned;
  }

  return { group, parameter, node, welcome, legend, chip, make, button, at, full };
})();
