// The model of the page: what the data says, decoded where it is needed.
const DATA = JSON.parse(document.getElementById("data").textContent);
const REPORT = DATA.report;
const STATES = ["same", "added", "removed", "changed", "missing"];

/** Changes are rows of numbers into tables; this is the report's form of one. */
function changeOf(row) {
  const [kind, what, graph, name, op, details, fingerprint, by] = row;
  return {
    kind: DATA.texts[kind], what: STATES[what], graph: DATA.texts[graph], name: DATA.texts[name], op: DATA.texts[op],
    details: details || [], fingerprint, by: DATA.authors[by],
  };
}

const CHANGES = DATA.changes.map(changeOf);
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
  name: DATA.texts[g.name], before: g.before, after: g.after,
  nodes: g.nodes.map(([name, was, is, state]) => ({
    name: DATA.texts[name], ops: [DATA.texts[was], DATA.texts[is]], state: STATES[state],
  })),
}));

/** The pictures, decoded when first drawn. */
const decoded = new Map();
function pictureOf(index) {
  if (!decoded.has(index)) {
    const { g, m, s, l, h } = DATA.pictures[index];
    const graph = GRAPHS[g];
    const spots = [];
    for (let i = 0; i < s.length; i += 7) {
      const [hops, layer, row, farHops, farLayer, farRow] = s.slice(i + 1, i + 7);
      const near = hops < 0 ? null : { hops, layer, row };
      spots.push({ ...graph.nodes[s[i]], near, far: { hops: farHops, layer: farLayer, row: farRow }, middle: s[i] === m });
    }
    const lines = [];
    for (let i = 0; i < l.length; i += 7) {
      lines.push({
        source: spots[l[i]].name, target: spots[l[i + 1]].name, port: DATA.texts[l[i + 2]], position: l[i + 3],
        old: Boolean(l[i + 4] & 1), new: Boolean(l[i + 4] & 2), inner: [null, false, true][l[i + 5]],
        formula: DATA.texts[l[i + 6]],
      });
    }
    decoded.set(index, { graph: graph.name, middle: graph.nodes[m].name, spots, lines, hidden: h });
  }
  return decoded.get(index);
}

/** (graph, node) -> the index of the picture in whose middle it is, or that it is nearest to the middle of. */
const PICTURE_AT = new Map();
DATA.pictures.forEach((p, index) => {
  const graph = GRAPHS[p.g];
  for (let i = 0; i < p.s.length; i += 7) {
    const key = keyOf(graph.name, graph.nodes[p.s[i]].name);
    const far = p.s[i] === p.m ? -1 : p.s[i + 1] < 0 ? 9 + p.s[i + 4] : p.s[i + 1];
    const known = PICTURE_AT.get(key);
    if (known === undefined || far < known[1]) PICTURE_AT.set(key, [index, far]);
  }
});

/** The report as `bnqat diff --format json` prints it. */
function reportJson() {
  const { verdict, layers, ops, renamed, skipped, schema_version } = REPORT;
  return JSON.stringify({ verdict, changes: CHANGES, layers, ops, renamed, skipped, schema_version }, null, 1);
}

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
