// The chosen place: its title, and pictures that scroll and zoom together.
const view = { hops: 1, inner: false, unified: false, zoom: 1 };
const ZOOM = { least: 0.2, most: 3 };

function button(text, title, onclick, pressed) {
  const made = el("button", { title, onclick }, text);
  if (pressed !== undefined) made.setAttribute("aria-pressed", String(pressed));
  return made;
}

function showTools() {
  const tools = document.getElementById("tools");
  const toggle = (name) => () => { view[name] = !view[name]; showPlace(); };
  tools.replaceChildren(
    "steps around", ...[1, 2, 3].map((n) => button(String(n), `boxes up to ${plural(n, "edge")} away (${n})`, () => { view.hops = n; showPlace(); }, view.hops === n)),
    button("every node", "also the nodes that compute a quantiser, handles of variables and control inputs (e)", toggle("inner"), view.inner),
    button("in one picture", "before and after in one picture (u)", toggle("unified"), view.unified),
    el("span", { class: "space" }),
    button("−", "smaller (-)", () => zoomBy(0.8)), button("+", "larger (+)", () => zoomBy(1.25)),
    button("fit", "all of it, however small (f)", () => zoomToFit()),
    el("span", { class: "space" }), "save",
    button("SVG", "save the picture", () => saveSvg()), button("PNG", "save the picture", () => savePng()),
    button("JSON", "save the whole report", () => save("diff.json", "application/json", reportJson())),
  );
}

function showPlace() {
  showTools();
  const [head, panes, panel, hidden] = ["head", "panes", "panel", "hidden"].map((id) => document.getElementById(id));
  for (const part of [head, panes, panel, hidden]) part.replaceChildren();
  document.getElementById("legend").hidden = true;
  if (!current) {
    head.append(el("p", { class: "faint" }, STOPS.length ? "Choose a place in the list, or press j." : "There is nothing to show: the two models are the same."));
    return;
  }
  showHead(head);
  if (current.kind === "node" || current.kind === "function") showPictures(panes, hidden);
  showPanel(panel);
}

/** A batch norm goes by its layer's name, and where it is computed goes by what runs it. */
function showHead(head) {
  const site = current.kind === "node" ? (SITES_AT.get(keyOf(current.graph, current.name)) || [])[0] : null;
  const where = [];
  if (current.kind === "node") {
    const users = site ? site.users : usersOf(current.graph);
    if (site) where.push(site.mode === "both" ? "in training and inference" : `in ${site.mode}`);
    if (users.length) where.push(`run by ${namedList(users)}`);
    where.push(el("span", { title: current.graph }, current.graph ? `function ${placeName(current.graph)}` : "the main graph"));
    if (site) where.push(`node ${current.name}`);
  } else where.push(current.kind);
  const name = site ? site.layer : current.kind === "function" ? placeName(current.name) : current.name;
  head.append(
    el("h2", {}, mark(current.what, current.other), name),
    el("div", { class: "faint" }, ...where.flatMap((part, index) => (index ? [" · ", part] : [part]))),
  );
}

function currentPicture() {
  if (current.kind === "function") {
    const index = DATA.pictures.findIndex((p) => GRAPHS[p.g].name === current.name);
    return index < 0 ? null : pictureOf(index);
  }
  const at = PICTURE_AT.get(keyOf(current.graph, current.name));
  return at ? pictureOf(at[0]) : null;
}

/** The distance that a picture goes to for the current place, and if it has all nodes: a hidden or distant node that is chosen is drawn. */
function reach(picture) {
  const spot = picture.spots.find((s) => s.name === current.name);
  const inner = view.inner || Boolean(spot && spot.near === null);
  return [Math.max(view.hops, spot ? (inner ? spot.far : spot.near) : 0), inner];
}

function showPictures(panes, hidden) {
  const picture = currentPicture();
  if (!picture) {
    panes.append(el("div", { class: "pane" }, el("div", { class: "nothing" }, "No picture of this place is in the page; write it with --full to have all of them.")));
    return;
  }
  document.getElementById("legend").hidden = false;
  const [hops, inner] = reach(picture);
  const sides = view.unified ? ["both"] : ["before", "after"];
  const arranged = sides.map((side) => arrange(picture, hops, inner, side));
  const drawn = arranged.filter(Boolean);
  // One width for both, with the chosen node in one place, so that they scroll together.
  const [left, right] = [Math.min(...drawn.map((a) => a.box.left)), Math.max(...drawn.map((a) => a.box.right))];
  sides.forEach((side, index) => {
    const pane = el("div", { class: "pane", "data-side": side }, el("div", { class: "bar" }, el("span", {}, side === "both" ? "before and after" : side)));
    panes.append(pane);
    if (arranged[index]) scrollable(pane, draw(picture, arranged[index], { ...arranged[index].box, left, right }), arranged[index]);
    else pane.append(el("div", { class: "nothing" }, side === "before" ? "the first model has nothing here" : "the second model has nothing here"));
  });
  zoomTo(1);
  openAt(left, right);
  hidden.textContent = notDrawn(picture, hops, inner);
}

/** Counts of the nodes of a function that are not drawn, and the keys that show them. */
function notDrawn(picture, hops, inner) {
  const farther = picture.spots.filter((s) => !within(s, hops, inner) && within(s, 3, inner)).length;
  const plumbing = inner ? 0 : picture.spots.filter((s) => !within(s, hops, false) && within(s, hops, true)).length;
  const rest = Object.values(picture.hidden).reduce((sum, count) => sum + count, 0);
  return [
    farther ? `${farther} more ${farther === 1 ? "box" : "boxes"} up to 3 steps away: press ${hops < 2 ? "2 or 3" : "3"}.` : "",
    plumbing ? `${plumbing} more among every node: press e.` : "",
    rest ? `Elsewhere in this function: ${plural(rest, "node")}.` : "",
    "A double click on a box goes there.",
  ].filter(Boolean).join(" ");
}

const SCROLLED = () => [...document.querySelectorAll("#panes .scroll")];

/** Put a picture into a pane, at its natural size, with the ways to move it: drag, scroll bars, buttons, a zoom. */
function scrollable(pane, made, arranged) {
  const box = el("div", { class: "scroll", tabindex: "0" }, made);
  pane.append(box);
  const beyond = Object.fromEntries(["left", "right", "up", "down"].map((way) => {
    const [x, y] = { left: [-0.7, 0], right: [0.7, 0], up: [0, -0.7], down: [0, 0.7] }[way];
    const go = button("", `scroll ${way}`, () => box.scrollBy({ left: x * box.clientWidth, top: y * box.clientHeight }));
    go.className = `beyond ${way}`;
    pane.firstChild.append(go);
    return [way, go];
  }));
  box.addEventListener("scroll", () => {
    if (!box.isConnected) return; // an event of a picture that another one has replaced
    for (const other of SCROLLED()) if (other.scrollLeft !== box.scrollLeft) other.scrollLeft = box.scrollLeft;
    countBeyond(box, made, arranged, beyond);
  });
  made.addEventListener("refresh", () => countBeyond(box, made, arranged, beyond));
  box.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    zoomBy(Math.exp(-event.deltaY * 0.0015));
  }, { passive: false });
  drag(box, made);
}

/** Say at each side of a pane how many boxes are outside of it. */
function countBeyond(box, made, arranged, beyond) {
  const { x, y } = made.viewBox.baseVal;
  const seen = { left: box.scrollLeft / view.zoom + x, top: box.scrollTop / view.zoom + y };
  [seen.right, seen.bottom] = [seen.left + box.clientWidth / view.zoom, seen.top + box.clientHeight / view.zoom];
  const outside = {
    left: arranged.boxes.filter((b) => b.x + b.width / 2 < seen.left), right: arranged.boxes.filter((b) => b.x + b.width / 2 > seen.right),
    up: arranged.boxes.filter((b) => b.y + b.height / 2 < seen.top), down: arranged.boxes.filter((b) => b.y + b.height / 2 > seen.bottom),
  };
  const arrow = { left: "◂", right: "▸", up: "▴", down: "▾" };
  for (const [way, boxes] of Object.entries(outside)) {
    beyond[way].hidden = !boxes.length;
    beyond[way].textContent = way === "left" ? `${arrow[way]} ${boxes.length} more` : `${boxes.length} more ${arrow[way]}`;
  }
}

function drag(box, made) {
  made.addEventListener("pointerdown", (event) => {
    made.setPointerCapture(event.pointerId);
    let [px, py] = [event.clientX, event.clientY];
    const move = (e) => {
      box.scrollBy(px - e.clientX, py - e.clientY);
      [px, py] = [e.clientX, e.clientY];
    };
    made.addEventListener("pointermove", move);
    made.addEventListener("pointerup", () => made.removeEventListener("pointermove", move), { once: true });
  });
  made.addEventListener("dblclick", (event) => {
    const group = event.target.closest(".node");
    if (group) select({ kind: "node", graph: current.kind === "function" ? current.name : current.graph, name: group.dataset.name, what: group.dataset.state });
  });
}

function zoomTo(zoom) {
  view.zoom = zoom;
  for (const box of SCROLLED()) {
    const made = box.querySelector("svg"), { width, height } = made.viewBox.baseVal;
    made.setAttribute("width", width * zoom);
    made.setAttribute("height", height * zoom);
    made.dispatchEvent(new Event("refresh"));
  }
}

/** Zoom, and keep what is in the middle of each pane there. */
function zoomBy(factor) {
  const zoom = Math.min(ZOOM.most, Math.max(ZOOM.least, view.zoom * factor)), change = zoom / view.zoom;
  const middles = SCROLLED().map((box) => [box, (box.scrollLeft + box.clientWidth / 2) * change, (box.scrollTop + box.clientHeight / 2) * change]);
  zoomTo(zoom);
  for (const [box, x, y] of middles) box.scrollTo(x - box.clientWidth / 2, y - box.clientHeight / 2);
}

function zoomToFit() {
  const sizes = SCROLLED().map((box) => [box, box.querySelector("svg").viewBox.baseVal]);
  zoomTo(Math.min(1, ...sizes.flatMap(([box, { width, height }]) => [box.clientWidth / width, box.clientHeight / height])));
}

/** Open with the chosen node in sight, and more of what leads to it than of what follows. */
function openAt(left, right) {
  for (const box of SCROLLED()) {
    const { y, height } = box.querySelector("svg").viewBox.baseVal;
    // All of what leads to the node if that fits, which ends at its right border.
    const wanted = Math.max(0, -left + 130 - box.clientWidth);
    box.scrollTo(Math.min(wanted, right - left), Math.max(0, -y - box.clientHeight / 2));
    if (height <= box.clientHeight) box.scrollTop = 0;
    box.querySelector("svg").dispatchEvent(new Event("refresh"));
  }
}
