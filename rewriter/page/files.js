// What can be saved: the picture as SVG and PNG.
function save(name, type, content) {
  const link = el("a", { href: URL.createObjectURL(new Blob([content], { type })), download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

/** The picture as a file of its own, with the colours in use: the model after, or both if they are in one picture. */
function pictureFile() {
  const picture = current && (current.kind === "node" || current.kind === "function") ? currentPicture() : null;
  if (!picture) return null;
  const [hops, inner] = reach(picture);
  const arranged = (view.unified ? ["both"] : ["after", "before"]).map((side) => arrange(picture, hops, inner, side)).find(Boolean);
  const { box } = arranged, [width, height] = [box.right - box.left, box.bottom - box.top];
  const made = draw(picture, arranged, box);
  const style = getComputedStyle(document.documentElement);
  const rules = document.querySelector("style").textContent.split("\n").filter((rule) => rule.startsWith(".picture"));
  const css = rules.join("\n").replace(/var\((--[a-z-]+)\)/g, (_, name) => style.getPropertyValue(name).trim());
  made.setAttribute("xmlns", SVG);
  made.setAttribute("width", width);
  made.setAttribute("height", height);
  made.prepend(svg("rect", { x: box.left, y: box.top, width, height, fill: style.getPropertyValue("--ground").trim() }));
  const sheet = svg("style", {});
  sheet.textContent = css;
  made.prepend(sheet);
  return { content: new XMLSerializer().serializeToString(made), width, height };
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
