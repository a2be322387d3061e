// The chosen place: pictures with one pan and zoom, what enters, what changed; and downloads.
const view = { hops: 1, inner: false, unified: false, box: null };

function button(text, title, onclick, pressed) {
  const made = el("button", { title, onclick }, text);
  if (pressed !== undefined) made.setAttribute("aria-pressed", String(pressed));
  return made;
}

function showTools() {
  const tools = document.getElementById("tools");
  const toggle = (name) => () => { view[name] = !view[name]; showPlace(); };
  tools.replaceChildren(
    "hops", ...[1, 2, 3].map((n) => button(String(n), `up to ${n} edges away (${n})`, () => { view.hops = n; view.box = null; showPlace(); }, view.hops === n)),
    button("quantiser nodes", "show the nodes that compute a formula (e)", () => { view.box = null; toggle("inner")(); }, view.inner),
    button("unified", "before and after in one picture (u)", toggle("unified"), view.unified),
    button("fit", "show all of it (f)", () => { view.box = null; showPlace(); }),
    el("span", { class: "space" }),
    button("SVG", "save the picture", () => saveSvg()), button("PNG", "save the picture", () => savePng()),
    button("JSON", "save the whole report", () => save("diff.json", "application/json", reportJson())),
  );
}

function showPlace() {
  showTools();
  const head = document.getElementById("head"), panes = document.getElementById("panes");
  const panel = document.getElementById("panel"), hidden = document.getElementById("hidden");
  panes.replaceChildren(); panel.replaceChildren(); hidden.textContent = ""; head.replaceChildren();
  if (!current) {
    head.append(el("p", { class: "faint" }, STOPS.length ? "Choose a place in the list, or press j." : "There is nothing to show: the two models are the same."));
    return;
  }
  head.append(el("h2", {}, mark(current.what, current.other), current.name), el("div", { class: "faint" }, current.kind === "node" ? `in ${placeName(current.graph)}` : current.kind));
  if (current.kind === "node" || current.kind === "function") showPictures(panes, hidden);
  showPanel(panel);
}

function currentPicture() {
  if (current.kind === "function") {
    const index = DATA.pictures.findIndex((p) => GRAPHS[p.g].name === current.name);
    return index < 0 ? null : pictureOf(index);
  }
  const at = PICTURE_AT.get(keyOf(current.graph, current.name));
  return at ? pictureOf(at[0]) : null;
}

function showPictures(panes, hidden) {
  const picture = currentPicture();
  if (!picture) {
    panes.append(el("div", { class: "pane" }, el("div", { class: "nothing" }, "No picture of this place is in the page; write it with --full to have all of them.")));
    return;
  }
  const spot = picture.spots.find((s) => s.name === current.name);
  const inner = view.inner || Boolean(spot && !spot.near);
  const far = spot ? (inner ? spot.far : spot.near).hops : 0;
  const arranged = arrange(picture, Math.max(view.hops, far), inner);
  view.box = view.box || extent(arranged);
  for (const side of view.unified ? ["both"] : ["before", "after"]) {
    const pane = el("div", { class: "pane", "data-side": side });
    const some = arranged.nodes.some((n) => side === "both" || (side === "before" ? n.ops[0] : n.ops[1]));
    if (some) {
      const made = draw(picture, arranged, side);
      movable(made);
      pane.append(made);
    } else pane.append(el("div", { class: "nothing" }, side === "before" ? "not in the first model" : "not in the second model"));
    pane.append(el("span", {}, side === "both" ? "before and after" : side));
    panes.append(pane);
  }
  place();
  const missing = Object.entries(picture.hidden).filter(([, count]) => count);
  const undrawn = picture.spots.length - arranged.nodes.length;
  hidden.textContent = [
    undrawn ? `${plural(undrawn, "node")} more within 3 hops` : "",
    ...missing.map(([state, count]) => `${count.toLocaleString("en")} ${state === "same" ? "unchanged" : state} ${count === 1 ? "node" : "nodes"} of ${placeName(picture.graph)} not shown`),
  ].filter(Boolean).join("; ");
}

/** One pan and zoom for both sides: they have one view box. */
function place() {
  for (const made of document.querySelectorAll("#panes svg")) made.setAttribute("viewBox", view.box.join(" "));
}

function movable(made) {
  made.addEventListener("wheel", (event) => {
    event.preventDefault();
    const [x, y, w, h] = view.box, r = made.getBoundingClientRect();
    const factor = Math.exp(event.deltaY * 0.0015);
    const scale = Math.max(w / r.width, h / r.height);
    const px = x + w / 2 + (event.clientX - r.left - r.width / 2) * scale, py = y + h / 2 + (event.clientY - r.top - r.height / 2) * scale;
    view.box = [px - (px - x) * factor, py - (py - y) * factor, w * factor, h * factor];
    place();
  }, { passive: false });
  made.addEventListener("pointerdown", (event) => {
    made.setPointerCapture(event.pointerId);
    let [px, py] = [event.clientX, event.clientY];
    const move = (e) => {
      const r = made.getBoundingClientRect(), scale = Math.max(view.box[2] / r.width, view.box[3] / r.height);
      view.box = [view.box[0] - (e.clientX - px) * scale, view.box[1] - (e.clientY - py) * scale, view.box[2], view.box[3]];
      [px, py] = [e.clientX, e.clientY];
      place();
    };
    made.addEventListener("pointermove", move);
    made.addEventListener("pointerup", () => made.removeEventListener("pointermove", move), { once: true });
  });
  made.addEventListener("dblclick", (event) => {
    const group = event.target.closest(".node");
    if (group) select({ kind: "node", graph: current.kind === "function" ? current.name : current.graph, name: group.dataset.name, what: group.dataset.state });
  });
}

function rows(head, body) {
  return el("table", {}, el("thead", {}, el("tr", {}, ...head.map((h) => el("th", {}, h)))), el("tbody", {}, ...body));
}

function showPanel(panel) {
  for (const site of current.kind === "node" ? SITES_AT.get(keyOf(current.graph, current.name)) || [] : []) {
    panel.append(el("h3", {}, `batch norm ${site.layer}: ${site.mode}, ${site.kind === "fused" ? "the fused kernel" : "single ops"}, ${site.status}${site.reason ? `: ${site.reason}` : ""}`));
    panel.append(rows(["role", "was", "is now", "first through", "enters at"], site.inputs.map((i) => {
      const formula = el("td", { class: i.formula ? "formula" : "", title: i.formula ? "show the nodes that compute it" : "" }, i.formula);
      if (i.formula) formula.addEventListener("click", () => { view.inner = true; view.box = null; showPlace(); });
      return el("tr", { class: "input", "data-port": i.port, "data-node": i.node },
        el("td", {}, i.use === "statistic" ? `${i.role} (batch)` : i.role), el("td", { class: "old" }, i.old === null ? "—" : i.old),
        el("td", { class: "new" }, i.new === null ? "—" : i.quantized || i.new), formula,
        el("td", { class: "port" }, i.node === site.node ? i.port : `${i.port} of ${i.node}`));
    })));
  }
  const own = CHANGES.filter((c) => c.kind === current.kind && c.graph === current.graph && c.name === current.name);
  for (const c of own) {
    const by = !RECORDED ? "" : c.by.length ? `, by ${c.by.join(", ")}` : ", by nothing that the record of the rewrite knows";
    const what = c.what === "missing" ? "the record of the rewrite has a change here that is not there" : `${SIGN[c.what]} ${c.what}`;
    panel.append(el("h3", {}, `${what}${by}${c.op ? ` (${c.kind === "function" ? `${c.op} nodes` : c.op})` : ""}`));
    if (c.details.length) {
      panel.append(rows(["aspect", "old", "new"], c.details.map((d) => el("tr", { class: "detail" },
        el("td", {}, d.port ? `${d.aspect} (${d.port})` : d.aspect), el("td", { class: "old" }, text(d.old)), el("td", { class: "new" }, text(d.new))))));
    }
  }
}

function text(value) {
  return value === null ? "—" : value === "" ? "(empty)" : value.length > 2000 ? `${value.slice(0, 2000)}… (${value.length} characters)` : value;
}

function save(name, type, content) {
  const link = el("a", { href: URL.createObjectURL(new Blob([content], { type })), download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

/** The picture as a file of its own: both models in one, with the colours in use. */
function pictureFile() {
  const picture = current && (current.kind === "node" || current.kind === "function") ? currentPicture() : null;
  if (!picture) return null;
  const arranged = arrange(picture, view.hops, view.inner);
  const made = draw(picture, arranged, view.unified ? "both" : "after");
  const box = extent(arranged);
  const style = getComputedStyle(document.documentElement);
  const rules = document.querySelector("style").textContent.split("\n").filter((rule) => rule.startsWith(".picture"));
  const css = rules.join("\n").replace(/var\((--[a-z-]+)\)/g, (_, name) => style.getPropertyValue(name).trim());
  made.setAttribute("xmlns", SVG);
  made.setAttribute("viewBox", box.join(" "));
  made.setAttribute("width", box[2]);
  made.setAttribute("height", box[3]);
  made.prepend(svg("rect", { x: box[0], y: box[1], width: box[2], height: box[3], fill: style.getPropertyValue("--ground").trim() }));
  const sheet = svg("style", {});
  sheet.textContent = css;
  made.prepend(sheet);
  return { content: new XMLSerializer().serializeToString(made), width: box[2], height: box[3] };
}

function saveSvg() {
  const file = pictureFile();
  if (file) save("site.svg", "image/svg+xml", file.content);
}

function savePng() {
  const file = pictureFile();
  if (!file) return;
  const image = new Image();
  image.onload = () => {
    const scale = Math.min(2, 8000 / Math.max(file.width, file.height));
    const canvas = el("canvas", { width: Math.ceil(file.width * scale), height: Math.ceil(file.height * scale) });
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    canvas.toBlob((blob) => save("site.png", "image/png", blob));
  };
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(file.content)}`;
}
