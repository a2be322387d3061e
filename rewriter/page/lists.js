// The verdict, the counts of ops, and the list: other changes, batch norms, functions and their scopes, the rest.
function el(tag, properties, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties || {})) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "class") made.className = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((c) => c !== null && c !== undefined));
  return made;
}

const MANY = 300;
const plural = (n, noun) => `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;
const placeName = (graph) => graph || "the main graph";

function tile(what, value, more, state) {
  return el("div", { class: `tile ${state || ""}` }, el("div", { class: "what" }, what), el("div", { class: "value" }, value), el("div", { class: "more" }, more));
}

function showVerdict() {
  const v = REPORT.verdict;
  const new_ = CHANGES.filter((c) => c.kind === "signature" && c.what === "added").map((c) => c.name);
  const reasons = Object.entries(REPORT.skipped).map(([reason, count]) => `${count}: ${reason}`).join("; ");
  const intact = v.signatures_intact === v.signatures_found;
  const counts = { added: 0, removed: 0, changed: 0 };
  for (const c of CHANGES) if (c.kind === "variable") counts[c.what] += 1;
  document.getElementById("verdict").append(
    tile("other changes", !RECORDED ? "no record" : v.other_changes === 0 ? "✓ none" : `! ${v.other_changes.toLocaleString("en")}`,
      !RECORDED ? `${plural(CHANGES.length, "change")}; the second model holds no record of a rewrite of the first`
        : v.other_changes === 0 ? `the rewrite's record explains ${CHANGES.length ? "all " : ""}${plural(CHANGES.length, "change")}`
          : "that no record of a rewrite explains", !RECORDED ? "" : v.other_changes === 0 ? "good" : "bad"),
    tile("batch norms", String(v.batch_norms), `${plural(v.sites_found, "site")} in the first model`),
    tile("sites rewritten", `${v.sites_rewritten} of ${v.sites_found}`, v.sites_added ? `${v.sites_added} more in new places` : "",
      v.sites_rewritten && v.sites_rewritten === v.sites_found ? "good" : ""),
    tile("sites skipped", String(v.sites_skipped), reasons, ""),
    tile("signatures", intact ? `✓ ${v.signatures_intact} of ${v.signatures_found} intact` : `! ${v.signatures_intact} of ${v.signatures_found} intact`,
      new_.length ? `new: ${new_.join(", ")}` : "", intact ? "good" : "bad"),
    tile("variables", signs(counts) || "the same", ""),
  );
}

function signs(counts) {
  return ["added", "removed", "changed"].filter((w) => counts[w]).map((w) => `${SIGN[w]}${counts[w].toLocaleString("en")}`).join(" ");
}

function showOps() {
  const changed = Object.entries(REPORT.ops).filter(([, [a, b]]) => a !== b);
  const total = [0, 1].map((i) => Object.values(REPORT.ops).reduce((sum, both) => sum + both[i], 0).toLocaleString("en"));
  const text = ([op, [a, b]]) => `${op} ${a === b ? a : `${a} → ${b}`}`;
  changed.sort((a, b) => Math.abs(b[1][1] - b[1][0]) - Math.abs(a[1][1] - a[1][0]));
  const kernels = Object.entries(REPORT.ops).filter(([op]) => op.startsWith("FusedBatchNorm")).map(text);
  const rest = changed.filter(([op]) => !op.startsWith("FusedBatchNorm"));
  document.querySelector("#ops summary").append(
    `ops: ${total[0] === total[1] ? total[0] : `${total[0]} → ${total[1]}`} nodes; `, [...kernels, ...rest.slice(0, 6).map(text)].join(", "), rest.length > 6 ? ", …" : "",
  );
  const all = [...changed, ...Object.entries(REPORT.ops).filter(([, [a, b]]) => a === b)];
  document.querySelector("#ops div").append(...all.map((entry) => el("span", { class: entry[1][0] === entry[1][1] ? "faint" : "" }, text(entry))));
}

/** Names of shown things, at most MANY at once; a button shows the next ones. */
function listOf(items, make) {
  const list = el("ul");
  let shown = 0;
  const more = () => {
    list.append(...items.slice(shown, shown + MANY).map((item) => el("li", {}, ...[make(item)].flat())));
    shown = Math.min(items.length, shown + MANY);
    if (shown < items.length) {
      const button = el("button", { class: "faint", onclick: () => { button.parentElement.remove(); more(); } }, `… ${items.length - shown} more`);
      list.append(el("li", {}, button));
    }
  };
  more();
  return list;
}

function mark(what, other) {
  return other ? el("span", { class: "sign-other" }, "! ") : el("span", { class: `sign-${what}` }, `${what === "missing" ? "?" : SIGN[what] || "·"} `);
}

function stopButton(stop, label, more) {
  const button = el("button", { "data-key": stopKey(stop), onclick: () => select(stop) }, mark(stop.what, stop.other), label, more ? el("span", { class: "count faint" }, more) : "");
  if (current && stopKey(current) === stopKey(stop)) button.setAttribute("aria-current", "true");
  return button;
}

/** A line that opens: its content is made when it is opened first. */
function branch(label, counts, content, open) {
  const box = el("div", { hidden: "" });
  let made = false;
  const toggle = el("button", {
    "aria-expanded": "false",
    onclick: () => {
      if (!made) box.append(...content());
      made = true;
      box.hidden = !box.hidden;
      toggle.setAttribute("aria-expanded", String(!box.hidden));
      toggle.firstChild.textContent = box.hidden ? "▸ " : "▾ ";
    },
  }, el("span", { class: "faint" }, "▸ "), label, el("span", { class: "count" }, signs(counts)));
  if (open) toggle.click();
  return [toggle, box];
}

function tally(changes) {
  const counts = { added: 0, removed: 0, changed: 0 };
  for (const c of changes) if (c.what in counts) counts[c.what] += 1;
  return counts;
}

/** The changes of one graph below a scope: inner scopes with their counts, then nodes. */
function scopes(changes, depth) {
  const inner = new Map(), here = [];
  for (const c of changes) {
    const parts = c.name.split("/");
    if (parts.length > depth + 1) {
      if (!inner.has(parts[depth])) inner.set(parts[depth], []);
      inner.get(parts[depth]).push(c);
    } else here.push(c);
  }
  const entries = [...inner.entries()].sort(([a], [b]) => (a < b ? -1 : 1));
  return [
    listOf(entries, ([name, own]) => branch(`${name}/`, tally(own), () => scopes(own, depth + 1))),
    listOf(here, (c) => stopButton({ kind: "node", graph: c.graph, name: c.name, what: c.what, other: RECORDED && !c.by.length }, c.name.split("/").slice(depth).join("/"), c.op)),
  ];
}

function siteLabel(site) {
  const status = site.status === "skipped" ? "skipped" : site.status;
  return [`${site.mode}, ${status}`, placeName(site.graph)];
}

function showList(filter, pattern) {
  const box = document.getElementById("list");
  box.replaceChildren();
  const heading = (text) => box.append(el("h2", {}, text));
  if (pattern || filter) {
    const found = STOPS.filter((s) => !filter || filter(s)).filter((s) => !pattern || matches(s, pattern));
    const more = pattern ? nodesMatching(pattern, new Set(found.map(stopKey))).filter((s) => !filter || filter(s)) : [];
    const all = [...found, ...more];
    heading(plural(all.length, "match").replace("matchs", "matches"));
    box.append(listOf(all, (s) => stopButton(s, s.name || placeName(s.graph), s.site ? s.site.layer : s.kind === "node" ? placeName(s.graph) : s.kind)));
    visible = all;
    return;
  }
  visible = STOPS;
  if (OTHER.length) {
    heading("other changes");
    box.append(listOf(OTHER, (c) => stopButton({ kind: c.kind, graph: c.graph, name: c.name, what: c.what, other: true }, c.name, c.kind)));
  }
  if (REPORT.layers.length) {
    heading("batch norms");
    box.append(listOf(REPORT.layers, (layer) => branch(layer.name, {}, () => [listOf(layer.sites, (site) =>
      stopButton(STOPS.find((s) => s.kind === "node" && s.graph === site.graph && s.name === site.node), ...siteLabel(site)))], REPORT.layers.length === 1)));
  }
  const byGraph = new Map();
  for (const c of CHANGES) {
    if (c.kind !== "node") continue;
    if (!byGraph.has(c.graph)) byGraph.set(c.graph, []);
    byGraph.get(c.graph).push(c);
  }
  const graphs = [...byGraph.entries()].sort(([a], [b]) => (a < b ? -1 : 1));
  if (graphs.length) {
    heading("functions and scopes");
    box.append(listOf(graphs, ([name, own]) => branch(placeName(name), tally(own), () => scopes(own, 0), graphs.length === 1)));
  }
  const rest = new Map();
  for (const c of CHANGES) {
    if (c.kind === "node") continue;
    if (!rest.has(c.kind)) rest.set(c.kind, []);
    rest.get(c.kind).push(c);
  }
  if (rest.size) {
    heading("everything else");
    box.append(listOf([...rest.entries()], ([kind, own]) => branch(kind === "model" ? "the meta graph" : `${kind}s`, tally(own), () => [listOf(own, (c) =>
      stopButton({ kind: c.kind, graph: c.graph, name: c.name, what: c.what, other: RECORDED && !c.by.length }, c.name))])));
  }
  if (!CHANGES.length) box.append(el("p", { class: "faint" }, "The two models are the same."));
}

function matches(stop, pattern) {
  const ops = stop.kind === "node" ? opsOf(stop) : [];
  return [stop.name, stop.site ? stop.site.layer : "", ...ops].some((text) => pattern.test(text));
}

function opsOf(stop) {
  const found = CHANGE_AT.get(keyOf(stop.graph, stop.name));
  if (found) return found.map((c) => c.op);
  const at = PICTURE_AT.get(keyOf(stop.graph, stop.name));
  const spot = at && pictureOf(at[0]).spots.find((s) => s.name === stop.name);
  return spot ? spot.ops : [];
}

/** Nodes that are in pictures and no stops, by name or op. */
function nodesMatching(pattern, known) {
  const found = [];
  for (const g of GRAPHS) {
    for (const n of g.nodes) {
      if (found.length >= 2000) return found;
      if (pattern.test(n.name) || pattern.test(n.ops[0]) || pattern.test(n.ops[1])) {
        const stop = { kind: "node", graph: g.name, name: n.name, what: n.state };
        if (!known.has(stopKey(stop))) found.push(stop);
      }
    }
  }
  return found;
}
