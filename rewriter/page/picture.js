// A picture: its boxes and edges on one side of the comparison, and how they are drawn.
const BOX = { least: 96, head: 38, port: 16 };
const SIGN = { added: "+", removed: "−", changed: "~", same: "" };
const SVG = "http://www.w3.org/2000/svg";
const SYMBOLS = "v: the value, s: the distance between two levels, l: the logarithm, ε: epsilon of the batch norm";
const OPS = { Arg: "argument" };

function svg(tag, attributes, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  for (const child of children) made.append(child);
  return made;
}

/** The width of a text in pixels, as this browser draws it. */
const MEASURE = document.createElement("canvas").getContext("2d");
function widthOf(text, font) {
  MEASURE.font = `${font} system-ui, sans-serif`;
  return MEASURE.measureText(text).width;
}

/** The end of a text, as names in one scope begin alike. */
function shorten(text, most) {
  return text.length <= most ? text : "…" + text.slice(1 - most);
}

/** The lines in a box: the op and the name, or the variable that a node reads or sets. */
function textsOf(n, side) {
  const [was, is] = n.ops.map((op) => OPS[op] || op);
  const op = side === "before" ? was : side === "after" ? is : was && is && was !== is ? `${was} → ${is}` : is || was;
  const sign = SIGN[n.state];
  if (n.variable) {
    const parts = n.variable.split("/"), last = parts.pop();
    return [`${sign} ${op.startsWith("Assign") ? "set " : ""}${last}`.trim(), parts.slice(-2).join("/") || "variable"];
  }
  return [`${sign} ${op}`.trim(), n.name.split("/").slice(-2).join("/")];
}

/** Nodes up to so many edges away. With all nodes, those that are drawn without are drawn as well. */
function within(spot, hops, inner) {
  return (spot.near !== null && spot.near <= hops) || (inner && spot.far <= hops);
}

/** Boxes and edges of a picture on one side: "before", "after" or "both"; null if there are none. The middle is at 0, 0. */
function arrange(picture, hops, inner, side) {
  const there = (n) => side === "both" || Boolean(n.ops[side === "before" ? 0 : 1]);
  const kept = (e) => side === "both" || (side === "before" ? e.old : e.new);
  const boxes = new Map();
  for (const spot of picture.spots) {
    if (!within(spot, hops, inner) || !there(spot)) continue;
    boxes.set(spot.name, { ...spot, texts: textsOf(spot, side), middle: spot.name === picture.middle });
  }
  if (!boxes.size) return null;
  const lines = picture.lines.filter((e) => kept(e) && boxes.has(e.source) && boxes.has(e.target) && (e.inner === null || e.inner === inner));
  const arriving = new Map();
  for (const e of lines) arriving.set(e.target, [...(arriving.get(e.target) || []), e]);
  for (const box of boxes.values()) measure(box, arriving.get(box.name) || []);
  const edges = [], pills = new Map();
  for (const e of lines) {
    const [source, target] = [boxes.get(e.source), boxes.get(e.target)];
    const end = { target, in: target.slots.get(e.position), line: e };
    const formula = side === "before" ? "" : e.formula;
    if (!formula) {
      edges.push({ source, out: source.height / 2, ...end, state: stateOf(e, side) });
      continue;
    }
    const key = `${e.source}\n${formula}`;
    if (!pills.has(key)) {
      const pill = pillOf(formula);
      pills.set(key, pill);
      edges.push({ source, out: source.height / 2, target: pill, in: pill.height / 2, state: "formula", line: e, part: true });
    }
    edges.push({ source: pills.get(key), out: pills.get(key).height / 2, ...end, state: "formula" });
  }
  const all = [...boxes.values(), ...pills.values()];
  layered(all, edges);
  const middle = boxes.get(picture.middle) || all[0];
  const [x, y] = [middle.x + middle.width / 2, middle.y + middle.height / 2];
  for (const thing of [...all, ...edges.flatMap((edge) => edge.via)]) Object.assign(thing, { x: thing.x - x, y: thing.y - y, columnEnd: thing.columnEnd - x });
  return { side, boxes: all, edges, box: extent(all) };
}

/** Set a box's width, height, its named inputs, and for each input how far below the top its edge ends. */
function measure(box, arriving) {
  const positions = [...new Set(arriving.map((e) => e.position))].sort((a, b) => a - b);
  const ports = new Map(arriving.map((e) => [e.position, e.port]));
  const named = positions.length > 2 && positions.length <= 12 && positions.every((p) => p < 0 || ports.get(p));
  box.ports = named ? positions.map((p) => (p < 0 ? "(waits for)" : ports.get(p))) : [];
  box.texts = [shorten(box.texts[0], 30), shorten(box.texts[1], 34)];
  box.width = Math.max(BOX.least, 20 + Math.max(widthOf(box.texts[0], "600 12px"), widthOf(box.texts[1], "11px")));
  box.height = named ? BOX.head + 4 + positions.length * BOX.port : Math.max(BOX.head, Math.min(30, positions.length) * 9);
  box.slots = new Map(positions.map((p, slot) => [p, named ? BOX.head + BOX.port * (slot + 0.5) : (box.height * (slot + 1)) / (positions.length + 1)]));
}

/** A quantiser as one box: `gamma ─ affine, 4 bits` above `round(v/s)·s`. */
function pillOf(formula) {
  const [first, ...rest] = formula.split(": ");
  const texts = [first, rest.join(": ")];
  return { pill: true, formula, texts, width: 30 + Math.max(widthOf(texts[0], "600 11px"), widthOf(texts[1], "11px")), height: BOX.head };
}

function stateOf(e, side) {
  if (side === "both") return e.old === e.new ? "same" : e.new ? "added" : "removed";
  return e.old === e.new ? "same" : side === "before" ? "removed" : "added";
}

/** The part of the plane that boxes need: left, top, right, bottom. */
function extent(boxes) {
  return {
    left: Math.min(...boxes.map((b) => b.x)) - 16, top: Math.min(...boxes.map((b) => b.y)) - 16,
    right: Math.max(...boxes.map((b) => b.x + b.width)) + 16, bottom: Math.max(...boxes.map((b) => b.y + b.height)) + 16,
  };
}

/** The picture as SVG, in the given part of the plane. */
function draw(picture, arranged, box) {
  const made = svg("svg", {
    class: "picture", role: "img", "aria-label": `${arranged.side}: around ${picture.middle}`,
    viewBox: `${box.left} ${box.top} ${box.right - box.left} ${box.bottom - box.top}`,
  });
  for (const edge of arranged.edges) made.append(...drawEdge(edge));
  for (const box_ of arranged.boxes) made.append(box_.pill ? drawPill(box_) : drawNode(box_));
  return made;
}

function drawEdge(edge) {
  const curve = (x1, y1, x2, y2) => `C${(x1 + x2) / 2},${y1} ${(x1 + x2) / 2},${y2} ${x2},${y2}`;
  let [x, y] = [edge.source.x + edge.source.width, edge.source.y + edge.out];
  let path = `M${x},${y}`;
  if (edge.target.x >= edge.source.columnEnd) {
    path += ` H${edge.source.columnEnd}`;
    x = edge.source.columnEnd;
  }
  for (const passing of edge.via) {
    const level = passing.y + passing.height / 2;
    path += ` ${curve(x, y, passing.x, level)} H${passing.columnEnd}`;
    [x, y] = [passing.columnEnd, level];
  }
  const [x2, y2] = [edge.target.x - 6, edge.target.y + edge.in];
  path += ` ${curve(x, y, x2, y2)}`;
  const ends = edge.part ? { "data-source": edge.line.source } : { "data-source": edge.line.source, "data-target": edge.line.target, "data-port": edge.line.port };
  return [
    svg("path", { class: `edge ${edge.state}${edge.line.position < 0 ? " control" : ""}`, d: path, ...ends }),
    svg("path", { class: "arrow", d: `M${x2 + 6},${y2} l-7,-3.5 v7 z` }),
  ];
}

function words(kind, x, y, text) {
  const made = svg("text", { class: kind, x, y });
  made.textContent = text;
  return made;
}

function drawPill(pill) {
  const group = svg("g", { class: "pill", transform: `translate(${pill.x},${pill.y})`, "data-formula": pill.formula });
  const title = svg("title", {});
  title.textContent = `a quantiser: ${pill.formula}\n${SYMBOLS}`;
  group.append(title, svg("rect", { width: pill.width, height: pill.height, rx: pill.height / 2 }), words("first", pill.height / 3, 16, pill.texts[0]), words("second", pill.height / 3, 30, pill.texts[1]));
  return group;
}

function drawNode(box) {
  const group = svg("g", {
    class: `node ${box.state}${box.middle ? " middle" : ""}`, "data-name": box.name, "data-state": box.state,
    transform: `translate(${box.x},${box.y})`,
  });
  const title = svg("title", {});
  title.textContent = [box.name, box.variable ? `variable ${box.variable}` : "", box.state].filter(Boolean).join("\n");
  group.append(title, svg("rect", { width: box.width, height: box.height, rx: 5 }), words("op", 9, 16, box.texts[0]), words("name", 9, 31, box.texts[1]));
  box.ports.forEach((port, slot) => group.append(words("port", 9, BOX.head + BOX.port * (slot + 0.5) + 4, shorten(port, 28))));
  return group;
}
