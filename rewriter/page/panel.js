// What is known of the chosen place: what enters a batch norm, and what changed.
function rows(head, body) {
  return el("table", {}, el("thead", {}, el("tr", {}, ...head.map((h) => el("th", {}, h)))), el("tbody", {}, ...body));
}

/** The cell of a value that reaches an input: the variable, or the tensor by the end of its name; the whole name on request. */
function valueCell(name, variable, kind) {
  if (name === null) return el("td", { class: `${kind} faint` }, "—");
  return el("td", { class: kind, title: name }, variable || shorten(name, 48));
}

function inputRow(site, i) {
  const formula = el("td", { class: i.formula ? "formula" : "", title: i.formula ? "show the nodes that compute it" : "" }, i.formula);
  if (i.formula) formula.addEventListener("click", () => { view.inner = true; showPlace(); });
  return el("tr", { class: "input", "data-port": i.port, "data-node": i.node },
    el("td", {}, i.use === "statistic" ? `${i.role} of the batch` : i.role),
    i.old === null && i.variable && site.what === "same" ? el("td", { class: "old" }, i.variable) : valueCell(i.old, i.variable, "old"), valueCell(i.new === null ? null : i.quantized || i.new, i.variable, "new"), formula,
    el("td", { class: "port", title: i.node === site.node ? i.port : `${i.port} of ${i.node}` }, i.node === site.node ? i.port : `${i.port} of ${shorten(i.node, 40)}`));
}

function showPanel(panel) {
  for (const site of current.kind === "node" ? SITES_AT.get(keyOf(current.graph, current.name)) || [] : []) {
    const how = { fused: "computed by the fused kernel", decomposed: "computed by single ops" }[site.kind] || `taken by ${site.kind}`;
    panel.append(el("h3", {}, `${site.layer}: ${site.status}, ${how}${site.reason ? `; ${site.reason}` : ""}`));
    panel.append(rows(["value", "comes from, before", "comes from, after", "rounded by", "goes into"], site.inputs.map((i) => inputRow(site, i))));
  }
  const own = CHANGES.filter((c) => c.kind === current.kind && c.graph === current.graph && c.name === current.name);
  for (const c of own) {
    const by = !RECORDED ? "" : c.by.length ? `, by ${c.by.join(", ")}` : ", by nothing that the record of the rewrite knows";
    const what = c.what === "missing" ? "the record of the rewrite has a change here that is not there" : `${SIGN[c.what]} ${c.what}`;
    panel.append(el("h3", {}, `${what}${by}${c.op ? ` (${c.kind === "function" ? `${c.op} nodes` : c.op})` : ""}`));
    if (c.details.length) {
      panel.append(rows(["what changed", "before", "after"], c.details.map((d) => el("tr", { class: "detail" },
        el("td", {}, d.port ? `${d.aspect} (${d.port})` : d.aspect), el("td", { class: "old" }, detailText(c, d, d.old)), el("td", { class: "new" }, detailText(c, d, d.new))))));
    }
  }
}

/** An attribute that a node leaves out has the default of the op's definition. */
function detailText(change, detail, value) {
  return value === null && change.what === "changed" && detail.aspect.startsWith("attribute ") ? "the op's default" : text(value);
}

function text(value) {
  return value === null ? "—" : value === "" ? "(empty)" : value.length > 2000 ? `${value.slice(0, 2000)}… (${value.length} characters)` : value;
}
