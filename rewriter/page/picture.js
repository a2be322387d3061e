"use strict";
// A picture: where its nodes stand, and how they are drawn. Positions in layers come with the data.
const BOX = { width: 150, height: 38, gap: 40, space: 16, slot: 14 };
const SIGN = { added: "+", removed: "−", changed: "~", same: "" };
const SVG = "http://www.w3.org/2000/svg";

function svg(tag, attributes, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  for (const child of children) made.append(child);
  return made;
}

function shorten(text, most) {
  return text.length <= most ? text : "…" + text.slice(1 - most);
}

/** What is to be drawn of a picture: nodes with x, y and height, and edges, for both models at once. */
function arrange(picture, hops, inner) {
  const spots = picture.spots.map((s) => ({ ...s, at: inner ? s.far : s.near })).filter((s) => s.at && s.at.hops <= hops);
  const names = new Set(spots.map((s) => s.name));
  const lines = picture.lines.filter(
    (e) => names.has(e.source) && names.has(e.target) && (e.inner === null || e.inner === inner),
  );
  const inputs = new Map();
  for (const e of lines) inputs.set(e.target, (inputs.get(e.target) || 0) + 1);
  const columns = new Map();
  for (const s of spots) columns.set(s.at.layer, [...(columns.get(s.at.layer) || []), s]);
  const nodes = new Map();
  let x = 0;
  for (const layer of [...columns.keys()].sort((a, b) => a - b)) {
    const column = columns.get(layer).sort((a, b) => a.at.row - b.at.row);
    const heights = column.map((s) => Math.max(BOX.height, Math.min(40, inputs.get(s.name) || 0) * BOX.slot + 6));
    let y = -heights.reduce((sum, height) => sum + height + BOX.space, -BOX.space) / 2;
    column.forEach((s, index) => {
      nodes.set(s.name, { ...s, x, y, height: heights[index] });
      y += heights[index] + BOX.space;
    });
    const held = new Set(column.map((s) => s.name));
    const leaving = lines.filter((e) => held.has(e.source));
    const labels = leaving.map((e) => Math.max(0, ...labelOf(e).map((text) => text.length * 5.5 + 14)));
    x += BOX.width + Math.max(BOX.gap, ...labels) + (leaving.some((e) => e.port) ? 44 : 0);
  }
  return { nodes: [...nodes.values()], lines: lines.map((e) => ({ ...e, from: nodes.get(e.source), to: nodes.get(e.target) })) };
}

/** What an edge says of the nodes that are passed over, in two lines: `gamma ─ affine, 4 bits`, `round(v/s)·s`. */
function labelOf(line) {
  const [first, ...rest] = line.formula.split(": ");
  return line.formula ? [first, rest.join(": ")].filter(Boolean) : [];
}

/** The picture as one SVG: of the model before, of the one after, or of "both". */
function draw(picture, arranged, side) {
  const keep = (thing) => side === "both" || (side === "before" ? thing.old : thing.new);
  const there = (n) => side === "both" || Boolean(n.ops[side === "before" ? 0 : 1]);
  const made = svg("svg", { class: "picture", role: "img", "aria-label": `${side}: around ${picture.middle}` });
  const inputs = new Map();
  for (const e of arranged.lines) if (keep(e)) inputs.set(e.target, (inputs.get(e.target) || 0) + 1);
  const taken = new Map();
  const sorted = arranged.lines.filter(keep).sort((a, b) => a.position - b.position);
  for (const e of sorted) {
    const slot = (taken.get(e.target) || 0) + 1;
    taken.set(e.target, slot);
    made.append(...edge(e, side, slot / (inputs.get(e.target) + 1)));
  }
  for (const n of arranged.nodes) if (there(n)) made.append(node(picture, n, side));
  return made;
}

function edge(e, side, fraction) {
  const formula = side === "before" ? "" : e.formula;
  const state = formula ? "formula" : side === "both" && e.old !== e.new ? (e.new ? "added" : "removed")
    : side === "before" && !e.new ? "removed" : side === "after" && !e.old ? "added" : "same";
  const [x1, y1] = [e.from.x + BOX.width, e.from.y + e.from.height / 2];
  const [x2, y2] = [e.to.x - 6, e.to.y + e.to.height * fraction];
  const bend = Math.max(30, Math.abs(x2 - x1) / 2);
  const path = `M${x1},${y1} C${x1 + bend},${y1} ${x2 - bend},${y2} ${x2},${y2}`;
  const made = [
    svg("path", {
      class: `edge ${state}${e.position < 0 ? " control" : ""}`, d: path,
      "data-source": e.source, "data-target": e.target, "data-port": e.port,
    }),
    svg("path", { class: "arrow", d: `M${x2 + 6},${y2} l-7,-3.5 v7 z` }),
  ];
  if (formula) {
    const label = svg("text", { class: "label", "data-formula": formula });
    labelOf(e).forEach((text, line) => label.append(svg("tspan", { x: x1 + 6, y: y1 + (line ? 13 : -5) }, text)));
    made.push(label);
  } else if (state !== "same") {
    const sign = svg("text", { class: `label ${state}`, x: x1 + 4, y: y1 - 4 });
    sign.textContent = SIGN[state];
    made.push(sign);
  }
  if (e.port && (e.to.middle || state !== "same")) {
    const port = svg("text", { class: "port", x: x2 - 3, y: y2 - 3, "text-anchor": "end" });
    port.textContent = shorten(e.port, 14);
    made.push(port);
  }
  return made;
}

function node(picture, n, side) {
  const group = svg("g", {
    class: `node ${n.state}${n.name === picture.middle ? " middle" : ""}`, "data-name": n.name, "data-state": n.state,
    transform: `translate(${n.x},${n.y})`,
  });
  const title = svg("title", {});
  title.textContent = `${n.name}\n${n.state}`;
  const op = svg("text", { class: "op", x: 8, y: 16 });
  const [was, is] = n.ops;
  const named = side === "before" ? was : side === "after" ? is : was && is && was !== is ? `${was} → ${is}` : is || was;
  op.textContent = shorten(`${SIGN[n.state]} ${named}`.trim(), 19);
  const name = svg("text", { class: "name", x: 8, y: 30 });
  name.textContent = shorten(n.name, 21);
  group.append(title, svg("rect", { width: BOX.width, height: n.height, rx: 5 }), op, name);
  return group;
}

/** The part of the plane that a picture needs: x, y, width, height. */
function extent(arranged) {
  const xs = arranged.nodes.map((n) => n.x), ys = arranged.nodes.map((n) => n.y);
  const [x, y] = [Math.min(...xs) - 16, Math.min(...ys) - 20];
  return [x, y, Math.max(...xs) + BOX.width + 16 - x, Math.max(...arranged.nodes.map((n) => n.y + n.height)) + 20 - y];
}
