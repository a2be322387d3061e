// The model of the page: what the data says, decoded where it is needed.
const DATA = JSON.parse(document.getElementById("data").textContent);
const REPORT = DATA.report;
const INPUT = ["role", "use", "graph", "node", "port", "old", "new", "formula", "quantized", "variable"];
const STATES = ["same", "added", "removed", "changed", "missing"];

const textOf = (number) => (number < 0 ? null : DATA.texts[number]);

/** Rows of a flat list. */
function* inRows(flat, width) {
  for (let i = 0; i < flat.length; i += width) yield flat.slice(i, i + width);
}

/** Changes are rows of numbers into tables; this is the report's form of one. */
function changeOf(row) {
  const [kind, what, graph, name, op, flat, fingerprint, by] = row;
  const details = [...inRows(flat, 4)].map(([aspect, old, is, port]) => ({ aspect: textOf(aspect), old: textOf(old), new: textOf(is), port: textOf(port) }));
  return { kind: textOf(kind), what: STATES[what], graph: textOf(graph), name: textOf(name), op: textOf(op), details, fingerprint, by: DATA.authors[by] };
}

const CHANGES = DATA.changes.map(changeOf);
for (const site of REPORT.layers.flatMap((layer) => layer.sites)) {
  site.inputs = [...inRows(site.inputs, INPUT.length)].map((row) => Object.fromEntries(INPUT.map((name, i) => [name, textOf(row[i])])));
}
const RECORDED = REPORT.verdict.other_changes !== null;
const OTHER = RECORDED ? CHANGES.filter((c) => !c.by.length) : [];
const SITES = REPORT.layers.flatMap((layer) => layer.sites.map((site) => ({ layer: layer.name, ...site })));

const keyOf = (graph, node) => `${graph}\n${node}`;
const CHANGE_AT = new Map();
for (const c of CHANGES) {
  if (c.kind !== "node") continue;
  const key = keyOf(c.graph, c.name);
  CHANGE_AT.set(key, [...(CHANGE_AT.get(key) || []), c]);
}
const SITES_AT = new Map();
for (const s of SITES) {
  const key = keyOf(s.graph, s.node);
  SITES_AT.set(key, [...(SITES_AT.get(key) || []), s]);
}

const GRAPHS = DATA.graphs.map((g) => ({
  name: textOf(g.name), before: g.before, after: g.after, lines: g.lines, leaving: null,
  nodes: [...inRows(g.nodes, 5)].map(([name, was, is, state, variable]) => ({ name: textOf(name), ops: [textOf(was), textOf(is)], state: STATES[state], variable: textOf(variable) })),
}));

/** The edges of a graph by the number of the node where they begin; sorted out when first needed. */
function leaving(graph, node) {
  if (!graph.leaving) {
    graph.leaving = new Map();
    for (const row of inRows(graph.lines, 6)) {
      if (!graph.leaving.has(row[0])) graph.leaving.set(row[0], []);
      graph.leaving.get(row[0]).push(row);
    }
  }
  return graph.leaving.get(node) || [];
}

/** The pictures, decoded when first drawn. */
const decoded = new Map();
function pictureOf(index) {
  if (!decoded.has(index)) {
    const { g, m, s, h } = DATA.pictures[index];
    const graph = GRAPHS[g];
    const spots = new Map();
    for (const [number, near, far] of inRows(s, 3)) spots.set(number, { ...graph.nodes[number], near: near < 0 ? null : near, far });
    const lines = [];
    for (const number of spots.keys()) {
      for (const [source, target, port, position, kind, formula] of leaving(graph, number)) {
        if (!spots.has(target)) continue;
        lines.push({
          source: graph.nodes[source].name, target: graph.nodes[target].name, port: textOf(port), position, formula: textOf(formula),
          old: Boolean(kind & 1), new: Boolean(kind & 2), inner: [null, false, true][kind >> 2],
        });
      }
    }
    decoded.set(index, { graph: graph.name, middle: graph.nodes[m].name, spots: [...spots.values()], lines, hidden: h });
  }
  return decoded.get(index);
}

/** (graph, node) -> the index of the picture in whose middle it is, or that it is nearest to the middle of. */
const PICTURE_AT = new Map();
DATA.pictures.forEach((p, index) => {
  const graph = GRAPHS[p.g];
  for (const [number, near, hops] of inRows(p.s, 3)) {
    const key = keyOf(graph.name, graph.nodes[number].name);
    const far = number === p.m ? -1 : near < 0 ? 9 + hops : near;
    const known = PICTURE_AT.get(key);
    if (known === undefined || far < known[1]) PICTURE_AT.set(key, [index, far]);
  }
});

/** The report as `bnqat diff --format json` prints it. */
function reportJson() {
  return JSON.stringify({ ...REPORT, changes: CHANGES }, null, 1);
}

/** A function as a reader knows it: its name in the program, and what runs it. */
const placeName = (graph) => (graph ? REPORT.labels[graph] || graph : "the main graph");
const usersOf = (graph) => (graph && REPORT.users[graph]) || [];
const namedList = (names) => (names.length > 1 ? `${names.slice(0, -1).join(", ")} and ${names[names.length - 1]}` : names.join(""));

/** What "next" and "previous" go through: other changes, sites, what else changed in a graph, and all the rest. */
function stops() {
  const found = new Map();
  const add = (stop) => found.set(JSON.stringify([stop.kind, stop.graph, stop.name]), stop);
  for (const c of OTHER) add({ kind: c.kind, graph: c.graph, name: c.name, what: c.what, other: true });
  for (const s of SITES) {
    const what = s.what !== "same" ? s.what : CHANGE_AT.has(keyOf(s.graph, s.node)) || s.inputs.some((i) => i.formula) ? "changed" : "same";
    if (!found.has(JSON.stringify(["node", s.graph, s.node]))) {
      add({ kind: "node", graph: s.graph, name: s.node, what, site: s, skipped: s.status === "skipped" });
    }
  }
  DATA.pictures.forEach((p) => {
    const n = GRAPHS[p.g].nodes[p.m];
    const stop = { kind: "node", graph: GRAPHS[p.g].name, name: n.name, what: n.state };
    if (n.state !== "same" && !found.has(JSON.stringify([stop.kind, stop.graph, stop.name]))) add(stop);
  });
  for (const c of CHANGES) {
    if (c.kind !== "node" && !found.has(JSON.stringify([c.kind, c.graph, c.name]))) {
      add({ kind: c.kind, graph: c.graph, name: c.name, what: c.what });
    }
  }
  return [...found.values()];
}
