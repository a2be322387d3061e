"use strict";
// Where the boxes of a picture stand: a layered drawing from left to right, after Sugiyama, Tagawa and Toda (1981).
// An edge over several layers has a place in each of them, so that it never runs through a box.
const GAP = { x: 44, y: 14, line: 8 };

/**
 * Set x and y of each box, and `via` of each edge: the places where it passes the layers between its ends.
 * Boxes have a width and a height. Edges have a source and a target (boxes), and `out` and `in`: how far below the tops
 * of these they begin and end.
 */
function layered(boxes, edges) {
  const layers = layersOf(boxes, edges);
  const columns = [];
  const stand = (thing, layer) => { (columns[layer] = columns[layer] || []).push(thing); };
  for (const box of boxes) stand(box, layers.get(box));
  const links = [];
  for (const edge of edges) {
    edge.via = [];
    const [first, last] = [layers.get(edge.source), layers.get(edge.target)];
    let from = edge.source, out = edge.out;
    for (let layer = first + 1; layer < last; layer += 1) {
      const passing = { width: 0, height: GAP.line, passing: true };
      edge.via.push(passing);
      stand(passing, layer);
      links.push({ from, to: passing, out, in: GAP.line / 2 });
      [from, out] = [passing, GAP.line / 2];
    }
    if (last > first) links.push({ from, to: edge.target, out, in: edge.in });
  }
  order(columns, links);
  spread(columns, links);
}

/** Box -> its layer: left of all its users, next to the nearest one. Edges that close a cycle are passed over. */
function layersOf(boxes, edges) {
  const leaving = new Map(boxes.map((box) => [box, []]));
  for (const edge of edges) if (edge.source !== edge.target) leaving.get(edge.source).push(edge.target);
  const done = [], state = new Map();
  const forward = new Map(boxes.map((box) => [box, []]));
  const visit = (start) => {
    const stack = [[start, 0]];
    state.set(start, "open");
    while (stack.length) {
      const top = stack[stack.length - 1], [box, next] = top;
      if (next === leaving.get(box).length) {
        state.set(box, "done");
        done.push(box);
        stack.pop();
        continue;
      }
      top[1] += 1;
      const target = leaving.get(box)[next];
      if (state.get(target) === "open") continue;
      forward.get(box).push(target);
      if (!state.has(target)) {
        state.set(target, "open");
        stack.push([target, 0]);
      }
    }
  };
  for (const box of boxes) if (!state.has(box)) visit(box);
  const layers = new Map(boxes.map((box) => [box, 0]));
  for (const box of done.slice().reverse()) for (const target of forward.get(box)) layers.set(target, Math.max(layers.get(target), layers.get(box) + 1));
  for (const box of done) if (forward.get(box).length) layers.set(box, Math.min(...forward.get(box).map((target) => layers.get(target))) - 1);
  const least = Math.min(...layers.values());
  for (const [box, layer] of layers) layers.set(box, layer - least);
  return layers;
}

/** Sort each column by the mean place of what its things are linked to (the barycentre heuristic). */
function order(columns, links) {
  const rank = new Map();
  const number = (column) => column.forEach((thing, index) => rank.set(thing, index - column.length / 2));
  columns.forEach(number);
  const neighbours = (key, other) => {
    const found = new Map();
    for (const link of links) found.set(link[key], [...(found.get(link[key]) || []), [link[other], link[key === "to" ? "in" : "out"]]]);
    return found;
  };
  const before = neighbours("to", "from"), behind = neighbours("from", "to");
  const mean = (thing, near) => {
    const places = near.get(thing);
    return places ? places.reduce((sum, [other]) => sum + rank.get(other), 0) / places.length : rank.get(thing);
  };
  // Where an edge ends in the target's list of inputs decides between things that one box uses.
  const slot = (thing) => ((behind.get(thing) || [])[0] ? links.find((link) => link.from === thing).in : 0);
  for (let sweep = 0; sweep < 4; sweep += 1) {
    for (const column of columns) { column.sort((a, b) => mean(a, before) - mean(b, before)); number(column); }
    for (const column of columns.slice().reverse()) {
      column.sort((a, b) => mean(a, behind) - mean(b, behind) || slot(a) - slot(b));
      number(column);
    }
  }
}

/** Give each thing its x and y: columns beside each other, and edges as level as the order allows. */
function spread(columns, links) {
  let x = 0;
  for (const column of columns) {
    const width = Math.max(...column.map((thing) => thing.width));
    let y = -column.reduce((sum, thing) => sum + thing.height + GAP.y, -GAP.y) / 2;
    for (const thing of column) {
      Object.assign(thing, { x, y, columnEnd: x + width });
      y += thing.height + GAP.y;
    }
    x += width + GAP.x + Math.min(40, 2 * column.length);
  }
  const level = (column, key, other, own, its) => {
    const wanted = new Map();
    for (const link of links) wanted.set(link[key], [...(wanted.get(link[key]) || []), link[other].y + link[its] - link[own]]);
    settle(column, column.map((thing) => {
      const places = wanted.get(thing);
      return places ? places.reduce((sum, place) => sum + place, 0) / places.length : thing.y;
    }));
  };
  for (let sweep = 0; sweep < 3; sweep += 1) {
    for (const column of columns.slice().reverse()) level(column, "from", "to", "out", "in");
    for (const column of columns) level(column, "to", "from", "in", "out");
  }
  for (const column of columns.slice().reverse()) level(column, "from", "to", "out", "in");
}

/** Move the things of a column as near as possible to the wanted tops without overlap (isotonic regression). */
function settle(column, wanted) {
  const blocks = [];
  let offset = 0;
  column.forEach((thing, index) => {
    blocks.push({ sum: wanted[index] - offset, things: [[thing, offset]] });
    offset += thing.height + GAP.y;
    while (blocks.length > 1) {
      const [upper, lower] = blocks.slice(-2);
      if (upper.sum / upper.things.length <= lower.sum / lower.things.length) break;
      blocks.splice(-2, 2, { sum: upper.sum + lower.sum, things: [...upper.things, ...lower.things] });
    }
  });
  for (const { sum, things } of blocks) for (const [thing, at] of things) thing.y = sum / things.length + at;
}
