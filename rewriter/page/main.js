// What is chosen, and the ways to choose: list, keys, the address.
const stopKey = (stop) => JSON.stringify([stop.kind, stop.graph, stop.name]);
const STOPS = stops();
let current = null;
let visible = STOPS;
const chosen = new Set();

const FILTERS = {
  "+ added": (s) => s.what === "added", "− removed": (s) => s.what === "removed", "~ changed": (s) => s.what === "changed",
  "! other changes": (s) => Boolean(s.other), "not quantised": (s) => Boolean(s.skipped),
};

function select(stop, address = true) {
  const known = STOPS.find((s) => stopKey(s) === stopKey(stop)) || stop;
  current = known;
  markCurrent();
  if (address) {
    const where = new URLSearchParams({ kind: known.kind, graph: known.graph, name: known.name });
    try { history.replaceState(null, "", `#${where}`); } catch { /* a frame without an address of its own */ }
  }
  showPlace();
}

/** Mark the chosen place in the list: its own line, or its batch norm's if that is closed. */
function markCurrent() {
  for (const marked of document.querySelectorAll("#list [aria-current]")) marked.removeAttribute("aria-current");
  if (!current) return;
  const own = [...document.querySelectorAll("#list [data-key]")].find((b) => b.dataset.key === stopKey(current))
    || (current.site && [...document.querySelectorAll("#list [data-layer]")].find((b) => b.dataset.layer === current.site.layer));
  if (!own) return;
  own.setAttribute("aria-current", "true");
  own.scrollIntoView({ block: "nearest" });
}

function step(by) {
  if (!visible.length) return;
  const at = current ? visible.findIndex((s) => stopKey(s) === stopKey(current)) : -1;
  select(visible[at < 0 ? (by > 0 ? 0 : visible.length - 1) : (at + by + visible.length) % visible.length]);
}

function follow() {
  const where = new URLSearchParams(location.hash.slice(1));
  const name = where.get("name");
  if (name === null) return false;
  const kind = where.get("kind") || "node", graph = where.get("graph") || "";
  const at = PICTURE_AT.get(keyOf(graph, name));
  const spot = at && pictureOf(at[0]).spots.find((s) => s.name === name);
  const stop = STOPS.find((s) => stopKey(s) === stopKey({ kind, graph, name })) || (spot && { kind, graph, name, what: spot.state });
  if (stop) select(stop, false);
  return Boolean(stop);
}

function refresh() {
  const field = document.getElementById("search");
  let pattern = null;
  field.classList.remove("wrong");
  document.getElementById("wrong").hidden = true;
  if (field.value) {
    try { pattern = new RegExp(field.value, "i"); } catch {
      field.classList.add("wrong");
      document.getElementById("wrong").hidden = false;
      return;
    }
  }
  const wanted = [...chosen].map((name) => FILTERS[name]);
  showList(wanted.length ? (s) => wanted.some((f) => f(s)) : null, pattern);
  markCurrent();
}

const KEYS = {
  j: ["next place or change", () => step(1)], k: ["previous", () => step(-1)],
  "/": ["search", () => document.getElementById("search").focus()],
  u: ["before and after in one picture, or apart", () => { view.unified = !view.unified; showPlace(); }],
  e: ["every node, or only what matters", () => { view.inner = !view.inner; showPlace(); }],
  ...Object.fromEntries([1, 2, 3].map((n) => [n, [`${plural(n, "step")} around the place`, () => { view.hops = n; showPlace(); }]])),
  "+": ["larger", () => zoomBy(1.25)], "-": ["smaller", () => zoomBy(0.8)],
  f: ["all of the picture, however small", () => zoomToFit()], t: ["light or dark", () => switchTheme()],
  "?": ["this help", () => document.getElementById("help").showModal()],
};

function switchTheme() {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
}

document.addEventListener("keydown", (event) => {
  const typing = event.target instanceof HTMLInputElement;
  if (typing && event.key === "Escape") {
    event.target.value = "";
    event.target.blur();
    refresh();
  } else if (typing && event.key === "Enter") {
    event.target.blur();
    step(1);
  } else if (!typing && event.key === "Escape" && document.getElementById("search").value) {
    document.getElementById("search").value = "";
    refresh();
  } else if (!typing && !event.ctrlKey && !event.metaKey && !event.altKey && KEYS[event.key] && !document.getElementById("help").open) {
    event.preventDefault();
    KEYS[event.key][1]();
  }
});
document.getElementById("search").addEventListener("input", refresh);
document.getElementById("theme").addEventListener("click", switchTheme);
document.getElementById("help-button").addEventListener("click", () => KEYS["?"][1]());
const SHOWN_KEYS = [...Object.entries(KEYS), ["Esc", ["end the search"]]];
document.querySelector("#help table").append(...SHOWN_KEYS.map(([key, [what]]) => el("tr", {}, el("td", {}, el("kbd", {}, key)), el("td", {}, what))));
document.getElementById("filters").append(...Object.keys(FILTERS).map((name) => {
  const made = button(name, `only ${name}`, () => {
    if (!chosen.delete(name)) chosen.add(name);
    made.setAttribute("aria-pressed", String(chosen.has(name)));
    refresh();
  }, false);
  return made;
}));
addEventListener("hashchange", follow);
showVerdict();
showOps();
refresh();
if (!follow() && STOPS.length) select(STOPS[0], false);
else if (!STOPS.length) showPlace();
