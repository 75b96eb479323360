// Figures of the page "The idea". NEARFOLD holds what the library's own layers read: see docsite/figures.py.
"use strict";

(() => {
  const { side } = NEARFOLD;
  const bytes = (text, Kind) => Kind.from(atob(text), (c) => c.charCodeAt(0));
  const signed = (text) => new Int8Array(bytes(text, Uint8Array).buffer);
  const cells = bytes(NEARFOLD.cells, Uint8Array);
  const SVG = "http://www.w3.org/2000/svg";

  const make = (name, attributes = {}, parent = null) => {
    const node = name === "svg" || name === "rect" ? document.createElementNS(SVG, name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (parent) parent.append(node);
    return node;
  };

  // A grid of the photograph's cells: a click or the arrow keys move the query, draw(query) says what it reads.
  const grid = (parent, draw) => {
    const svg = make("svg", { viewBox: `0 0 ${side * 10} ${side * 10}`, tabindex: "0", role: "img", class: "nf-grid" }, parent);
    const below = [], above = [];
    for (let i = 0; i < side * side; i++) {
      const place = { x: (i % side) * 10, y: Math.floor(i / side) * 10, width: 10, height: 10 };
      below.push(make("rect", { ...place, fill: `rgb(${cells.slice(3 * i, 3 * i + 3).join(",")})` }, svg));
      above.push(make("rect", place, svg));
    }
    const frame = make("rect", { width: 10, height: 10, class: "nf-query" }, svg);
    let query = Math.floor(side / 2) * side + Math.floor(side / 2);
    const show = () => {
      const { weights, said } = draw(query);
      const most = Math.max(...weights.map(Math.abs)) || 1;
      weights.forEach((weight, i) => {
        above[i].setAttribute("class", weight < 0 ? "nf-negative" : "nf-positive");
        above[i].setAttribute("opacity", weight ? 0.25 + 0.7 * Math.sqrt(Math.abs(weight) / most) : 0);
        below[i].setAttribute("opacity", weight ? 1 : 0.45);
      });
      frame.setAttribute("x", (query % side) * 10);
      frame.setAttribute("y", Math.floor(query / side) * 10);
      svg.setAttribute("aria-label", `Row ${Math.floor(query / side) + 1}, column ${(query % side) + 1}: ${said}`);
      return said;
    };
    let after = () => {};
    const move = (to) => {
      query = to;
      after(show());
    };
    above.forEach((rect, i) => rect.addEventListener("click", () => move(i)));
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (!step) return;
      event.preventDefault();
      const row = Math.floor(query / side) + step[0], column = (query % side) + step[1];
      if (row >= 0 && row < side && column >= 0 && column < side) move(row * side + column);
    });
    return { show: () => after(show()), onshow: (f) => (after = f) };
  };

  const slider = (parent, name, least, most, step, value, act) => {
    const label = make("label", {}, parent);
    label.append(`${name} `);
    const said = make("output", {}, label);
    const input = make("input", { type: "range", min: least, max: most, step, value, "aria-label": name }, label);
    input.addEventListener("input", () => { said.textContent = input.value; act(Number(input.value)); });
    said.textContent = value;
  };

  // From space to features: lambda and k of one operation.
  const spectrum = (root) => {
    root.replaceChildren();
    const orders = NEARFOLD.orders.map((order) => bytes(order, Uint8Array));
    let lam = 0, k = 9;
    const tools = make("div", { class: "nf-tools" }, root);
    const code = make("code", {}, root);
    const map = grid(root, (query) => {
      const order = orders[Math.round(lam * (NEARFOLD.lams.length - 1))];
      const weights = new Array(side * side).fill(0);
      for (let rank = 0; rank < k; rank++) weights[order[query * NEARFOLD.nearest + rank]] = 1;
      return { weights, said: `reads ${k} of ${side * side} positions` };
    });
    const said = make("p", { class: "nf-said", "aria-live": "polite" }, root);
    map.onshow((text) => {
      code.textContent = `nearest(${k}, blend(${lam}), self) | ranked | kernel`;
      said.textContent = text;
    });
    slider(tools, "lambda", 0, 1, 1 / (NEARFOLD.lams.length - 1), lam, (value) => { lam = value; map.show(); });
    slider(tools, "k", 1, NEARFOLD.nearest, 1, k, (value) => { k = value; map.show(); });
    map.show();
  };

  // Two operators side by side, on one photograph.
  const operators = (root) => {
    root.replaceChildren();
    for (const first of [0, 7]) {
      const half = make("div", {}, root);
      const label = make("label", { class: "nf-tools" }, half);
      label.append("Operator ");
      const choice = make("select", {}, label);
      NEARFOLD.operators.forEach(({ name }, i) => {
        const option = make("option", { value: i }, choice);
        option.textContent = name;
        option.selected = i === first;
      });
      const code = make("code", {}, half);
      const rows = NEARFOLD.operators.map((operator) => signed(operator.rows));
      const map = grid(half, (query) => {
        const weights = Array.from(rows[choice.value].slice(query * side * side, (query + 1) * side * side));
        return { weights, said: `reads ${weights.filter((w) => w).length} of ${side * side} positions above a 250th of the largest weight` };
      });
      const said = make("p", { class: "nf-said", "aria-live": "polite" }, half);
      map.onshow((text) => {
        code.textContent = NEARFOLD.operators[choice.value].notation;
        said.textContent = text;
      });
      choice.addEventListener("change", map.show);
      map.show();
    }
  };

  const start = () => {
    document.querySelectorAll(".nf-spectrum").forEach(spectrum);
    document.querySelectorAll(".nf-operators").forEach(operators);
  };
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
})();
