// The facts, the counts of ops, and the list: other changes, batch norms, functions and their scopes, the rest.
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
const nouns = (noun) => `${noun.replaceAll("_", " ")}${/(s|x|ch|sh)$/.test(noun) ? "es" : "s"}`;
const plural = (n, noun) => `${n.toLocaleString("en")} ${n === 1 ? noun.replaceAll("_", " ") : nouns(noun)}`;

/** Facts below the first sentence: a mark, the fact in bold, and what more there is to say of it. */
function fact(id, state, value, more) {
  const sign = { good: "✓", bad: "!" }[state] || "·";
  return el("li", { id, class: state }, el("span", { class: "sign" }, sign), el("b", {}, value), more ? el("span", { class: "faint" }, more) : null);
}

function showVerdict() {
  const v = REPORT.verdict;
  document.getElementById("headline").append(REPORT.headline);
  const facts = document.getElementById("verdict");
  const all = plural(CHANGES.length, "change");
  if (!RECORDED) facts.append(fact("others", "", CHANGES.length ? "No record of a rewrite" : "No changes", CHANGES.length ? `so nothing says who made the ${all}` : ""));
  else if (v.other_changes) facts.append(fact("others", "bad", `${plural(v.other_changes, "other change")}`, "which the record of the rewrite does not explain"));
  else facts.append(fact("others", "good", "No other changes", `the record of the rewrite explains all ${all}`));
  const added = CHANGES.filter((c) => c.kind === "signature" && c.what === "added").map((c) => c.name);
  const intact = v.signatures_intact === v.signatures_found;
  if (v.signatures_found) {
    const are = v.signatures_found === 1 ? "signature is" : "signatures are";
    facts.append(fact("signatures", intact ? "good" : "bad", `${intact ? v.signatures_found : `${v.signatures_intact} of ${v.signatures_found}`} ${are} intact`, added.length ? `new: ${added.join(", ")}` : ""));
  }
  const left = REPORT.layers.filter((layer) => layer.status === "skipped" || layer.status === "partly");
  if (left.length) {
    const reasons = Object.keys(REPORT.skipped);
    const kinds = [...new Set(left.map((layer) => layer.kind))].map((kind) => plural(left.filter((l) => l.kind === kind).length, kind));
    facts.append(fact("skipped", "bad", `${namedList(kinds)} not quantised${left.some((l) => l.status === "partly") ? " everywhere" : ""}`, reasons.join("; ")));
  }
  const variables = CHANGES.filter((c) => c.kind === "variable");
  if (variables.length) {
    const aspects = [...new Set(variables.filter((c) => c.what === "changed").flatMap((c) => c.details.map((d) => d.aspect)))];
    facts.append(fact("variables", "", `Variables: ${inWords(tally(variables))}`, aspects.length ? `in ${namedList(aspects)}` : ""));
  }
}

/** Counts in words: "11 added, 118 changed". */
function inWords(counts) {
  return ["added", "removed", "changed"].filter((what) => counts[what]).map((what) => `${counts[what].toLocaleString("en")} ${what}`).join(", ");
}

/** Counts as in a diff: "+11 ~118". */
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
  const v = REPORT.verdict;
  document.querySelector("#ops summary").append(
    `In numbers: ${total[0] === total[1] ? total[0] : `${total[0]} → ${total[1]}`} nodes; `, [...kernels, ...rest.slice(0, 3).map(text)].join(", "), rest.length > 3 ? ", …" : "",
  );
  document.querySelector("#ops p").append([
    `The first model computes its ${plural(v.batch_norms, "batch norm")} in ${plural(v.sites_found, "place")}, ${v.sites_rewritten} of which a rewrite changed`,
    v.sites_added ? `; functions that are new compute them in ${v.sites_added} more` : "", ". Nodes by op:",
  ].join(""));
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
  const button = el("button", { "data-key": stopKey(stop), onclick: () => select(stop) }, mark(stop.what, stop.other), label, more ? el("span", { class: "where faint" }, more) : "");
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
  }, el("span", { class: "faint" }, "▸ "), label, el("span", { class: "count", title: inWords(counts) }, signs(counts)));
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

/** A site in the list: its mode, and what runs it. */
function siteButton(site) {
  const stop = STOPS.find((s) => s.kind === "node" && s.graph === site.graph && s.name === site.node);
  return stopButton(stop, `in ${site.mode === "both" ? "both modes" : site.mode}`, [site.status === "skipped" ? "skipped" : "", site.what === "removed" ? "no longer there" : site.users.length ? namedList(site.users) : "run by no signature"].filter(Boolean).join(", "));
}

const LAYER_SIGN = { quantised: "changed", partly: "changed", finalised: "changed", "no longer quantised": "changed", skipped: "same", new: "added", "as before": "same" };
const LAYER_NOTE = { partly: "in part", skipped: "not quantised", "as before": "", quantised: "" };

/** A layer in the list: a click shows its first place, and lists all of them. */
function layerEntry(layer) {
  const box = el("div", { hidden: "" });
  const toggle = () => {
    if (!box.children.length) box.append(listOf(layer.sites, siteButton));
    box.hidden = !box.hidden;
    button.setAttribute("aria-expanded", String(!box.hidden));
  };
  const chips = [layer.bits.length ? `${layer.bits.join(", ")}-bit` : "", layer.fused ? "fused" : "", layer.status in LAYER_NOTE ? LAYER_NOTE[layer.status] : layer.status].filter(Boolean);
  const button = el("button", {
    class: "layer", "aria-expanded": "false", "data-layer": layer.name,
    onclick: () => { toggle(); if (!box.hidden) box.querySelector("[data-key]")?.click(); },
  }, el("span", {}, mark(LAYER_SIGN[layer.status]), layer.name), el("span", { class: "chips" }, ...chips.map((chip) => el("span", { class: "chip" }, chip))));
  if (REPORT.layers.length === 1) toggle();
  return [button, box];
}

function showList(filter, pattern) {
  const box = document.getElementById("list");
  box.replaceChildren();
  const heading = (text) => box.append(el("h2", {}, text));
  if (pattern || filter) {
    const found = STOPS.filter((s) => !filter || filter(s)).filter((s) => !pattern || matches(s, pattern));
    const more = pattern ? nodesMatching(pattern, new Set(found.map(stopKey))).filter((s) => !filter || filter(s)) : [];
    const all = [...found, ...more];
    heading(plural(all.length, "match"));
    box.append(listOf(all, (s) => stopButton(s, s.name || placeName(s.graph), s.site ? s.site.layer : s.kind === "node" ? placeName(s.graph) : s.kind)));
    visible = all;
    return;
  }
  visible = STOPS;
  if (OTHER.length) {
    heading("other changes");
    box.append(listOf(OTHER, (c) => stopButton({ kind: c.kind, graph: c.graph, name: c.name, what: c.what, other: true }, c.name, c.kind)));
  }
  for (const kind of new Set(REPORT.layers.map((layer) => layer.kind))) {
    heading(nouns(kind));
    box.append(listOf(REPORT.layers.filter((layer) => layer.kind === kind), layerEntry));
  }
  const byGraph = new Map();
  for (const c of CHANGES) {
    if (c.kind !== "node") continue;
    if (!byGraph.has(c.graph)) byGraph.set(c.graph, []);
    byGraph.get(c.graph).push(c);
  }
  const graphs = [...byGraph.entries()].sort(([a], [b]) => (a < b ? -1 : 1));
  if (graphs.length) {
    heading("nodes, by function and scope");
    box.append(listOf(graphs, ([name, own]) => branch(el("span", { title: name }, placeName(name), el("span", { class: "faint" }, usersOf(name).length && name ? ` in ${namedList(usersOf(name))}` : "")), tally(own), () => scopes(own, 0), graphs.length === 1)));
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
