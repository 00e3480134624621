"use strict";
(() => {
  const D = JSON.parse(document.getElementById("data").textContent);
  const T = D.texts, VIEWS = D.views, SIDES = D.sides, TWO = SIDES.length === 2, LAST = SIDES.length - 1;
  const LETTERS = ["A", "B"], ROW = 28, SPARE = 10;
  const $ = (id) => document.getElementById(id);

  // --- elements: text only, never markup ---

  function fill(node, props, children) {
    for (const [key, value] of Object.entries(props || {})) {
      if (key === "on") for (const [event, run] of Object.entries(value)) node.addEventListener(event, run);
      else if (key === "css") for (const [name, text] of Object.entries(value)) node.style.setProperty(name, text);
      else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value);
    }
    for (const child of children.flat(3)) if (child !== null && child !== undefined && child !== false) node.append(child);
    return node;
  }
  const el = (tag, props, ...children) => fill(document.createElement(tag), props, children);
  const svg = (tag, props, ...children) => fill(document.createElementNS("http://www.w3.org/2000/svg", tag), props, children);

  // --- numbers ---

  const whole = new Intl.NumberFormat("en-US");
  const count = (n, one, many) => `${whole.format(n)} ${n === 1 ? one : many || one + "s"}`;
  function size(bytes) {
    for (const [unit, scale] of [["GB", 1e9], ["MB", 1e6], ["KB", 1e3]]) if (bytes >= scale) return `${digits(bytes / scale)} ${unit}`;
    return `${whole.format(bytes)} B`;
  }
  const digits = (x) => (x >= 100 ? whole.format(Math.round(x)) : x >= 10 ? x.toFixed(1) : x.toFixed(2));
  function micros(us) {
    if (us >= 1e6) return `${digits(us / 1e6)} s`;
    return us >= 1e3 ? `${digits(us / 1e3)} ms` : `${digits(us)} µs`;
  }
  const percent = (share) => `${(100 * share).toFixed(share > 0.0995 && share < 0.9995 ? 0 : 1).replace(/\.0$/, "")}%`;

  // --- cells: [before, after, scheme, layout, kernels, reason, dtype, marks, shape, views, aliases, verified] ---

  const exists = (cell) => cell.length > 0;
  const schemeOf = (cell) => T[cell[2]], kernelsOf = (cell) => T[cell[4]], reasonOf = (cell) => T[cell[5]], marksOf = (cell) => T[cell[7]];
  const cellsOf = (row) => row.slice(2);
  const main = (row) => (exists(row[2 + LAST]) ? row[2 + LAST] : row[2]);
  const kernelNames = T.map((text) => [...new Set(text.split(/, | \/ /).map((part) => part.replace(/^[mt][<>]=?\d+: /, "")).filter(Boolean))]);

  // --- schemes and their colours, the largest first ---

  const schemes = new Map();
  for (const row of D.rows)
    for (const cell of cellsOf(row)) if (exists(cell) && schemeOf(cell)) schemes.set(schemeOf(cell), (schemes.get(schemeOf(cell)) || 0) + cell[1]);
  const ranked = [...schemes.keys()].sort((a, b) => schemes.get(b) - schemes.get(a));
  const colourAt = (i) => (i < 8 ? `var(--c${i})` : `color-mix(in oklab, var(--c${i % 8}), var(--c${(i + 3) % 8}))`);
  const colours = new Map(ranked.map((name, i) => [name, colourAt(i)]));
  const colour = (scheme) => colours.get(scheme) || "var(--kept)";
  const named = (scheme) => scheme || "kept";

  // --- the tree: modules by the parts of names; a module's only weight stands for it ---

  let nodeCount = 0;
  const NO_KIDS = Object.freeze([]);  // most nodes are weights: what they share costs nothing
  const makeNode = (name, parent) => ({ id: nodeCount++, name, parent, kids: NO_KIDS, at: null, row: -1, hits: 0, place: 0, of: 0, line: -1 });
  const root = makeNode("", null);
  D.rows.forEach((row, i) => {
    const parts = row[0].split(".");
    let here = root;
    for (let p = 0; p < parts.length; p++) {
      if (here.at === null) { here.at = new Map(); here.kids = []; }
      let next = p === parts.length - 1 ? undefined : here.at.get(parts[p]);
      if (next === undefined || next.row >= 0) {
        next = makeNode(parts[p], here);
        here.kids.push(next);
        if (p < parts.length - 1) here.at.set(parts[p], next);
      }
      here = next;
    }
    here.row = i;
  });
  const leaves = new Array(D.rows.length);
  (function settle(node, depth) {
    node.depth = depth;
    node.at = null;
    for (let i = 0; i < node.kids.length; i++) {
      const kid = node.kids[i];
      if (kid.row < 0 && kid.kids.length === 1 && kid.kids[0].row >= 0) {
        const only = kid.kids[0];
        only.name = `${kid.name}.${only.name}`;
        only.parent = node;
        node.kids[i] = only;
      }
      settle(node.kids[i], depth + 1);
    }
    if (node.row >= 0) {
      const row = D.rows[node.row], cell = main(row);
      leaves[node.row] = node;
      node.weights = 1;
      node.sizes = cellsOf(row).map((c) => (exists(c) ? [c[0], c[1]] : [0, 0]));
      node.changes = row[1].length ? 1 : 0;
      node.missed = marksOf(cell).includes("missed") ? 1 : 0;
      return;
    }
    Object.assign(node, { weights: 0, sizes: SIDES.map(() => [0, 0]), changes: 0, missed: 0, splits: [new Map(), new Map()] });
    for (const kid of node.kids) {
      node.weights += kid.weights;
      node.changes += kid.changes;
      node.missed += kid.missed;
      kid.sizes.forEach((own, s) => { node.sizes[s][0] += own[0]; node.sizes[s][1] += own[1]; });
      // Bytes by scheme of what the treemap draws: after, of A and of B; of one report before and after.
      node.splits.forEach((split, s) => {
        const add = (bytes, scheme) => split.set(scheme, (split.get(scheme) || 0) + bytes);
        if (kid.row < 0) return kid.splits[s].forEach(add);
        const cell = D.rows[kid.row][2 + (TWO ? s : 0)];
        if (exists(cell)) add(TWO ? cell[1] : cell[s], schemeOf(cell));
      });
    }
  })(root, 0);
  const pathOf = (node) => (node.parent && node.parent !== root ? `${pathOf(node.parent)}.${node.name}` : node.name);
  const after = (node) => node.sizes[LAST][1], before = (node) => (TWO ? node.sizes[0][1] : node.sizes[0][0]);

  // --- filters ---

  const lowerNames = D.rows.map((row) => row[0].toLowerCase() + (main(row)[10].length ? " " + main(row)[10].join(" ").toLowerCase() : ""));
  const lowerTexts = T.map((text) => text.toLowerCase());
  const opened = new Set(), flipped = new Set();
  let filtering = false, auto = false, hits = D.rows.length, shown = [], selected = root, active = root;

  function filter() {
    const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const scheme = $("by-scheme").value, kernel = $("by-kernel").value, reason = $("by-reason").value, change = $("by-change").value;
    filtering = Boolean(words.length || scheme || kernel || reason || change);
    flipped.clear();
    hits = D.rows.length;
    if (filtering) {
      const inText = words.map((word) => lowerTexts.map((text) => text.includes(word)));
      clearHits(root);
      hits = 0;
      D.rows.forEach((row, i) => {
        const cells = cellsOf(row).filter(exists);
        const good =
          words.every((word, w) => lowerNames[i].includes(word) || cells.some((c) => inText[w][c[2]] || inText[w][c[4]] || inText[w][c[5]])) &&
          (!scheme || cells.some((c) => named(schemeOf(c)) === scheme)) &&
          (!kernel || cells.some((c) => kernelNames[c[4]].includes(kernel))) &&
          (!reason || cells.some((c) => c[5] === Number(reason))) &&
          (!change || (change === "any" ? row[1].length > 0 : row[1].includes(change)));
        if (!good) return;
        hits++;
        for (let node = leaves[i]; node; node = node.parent) node.hits++;
      });
      auto = hits <= 400;
    }
    say();
    list();
    $("scroll").scrollTop = 0;
    paint();
  }
  function clearHits(node) {
    node.hits = 0;
    for (const kid of node.kids) clearHits(kid);
  }
  function say() {
    const all = count(D.rows.length, "weight");
    $("count").textContent = filtering ? `${whole.format(hits)} of ${all} ${hits === 1 ? "matches" : "match"}` : all;
  }
  const isOpen = (node) => (filtering && auto ? !flipped.has(node) : opened.has(node));
  function setOpen(node, open) {
    if (!node.kids.length || isOpen(node) === open) return;
    const set = filtering && auto ? flipped : opened;
    if (set.has(node)) set.delete(node);
    else set.add(node);
  }

  // --- the visible list: only rows in sight are elements ---

  function list() {
    shown = [];
    (function walk(node) {
      const kids = filtering ? node.kids.filter((kid) => kid.hits) : node.kids;
      kids.forEach((kid, i) => {
        kid.place = i + 1;
        kid.of = kids.length;
        kid.line = shown.length;
        shown.push(kid);
        if (kid.kids.length && isOpen(kid)) walk(kid);
      });
    })(root);
    if (!shown.includes(active)) active = shown[0] || root;
    $("tree").style.height = `${Math.max(shown.length, 1) * ROW}px`;
  }
  let waiting = false;
  function later() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; paint(); });
  }
  function paint() {
    const box = $("scroll"), tree = $("tree");
    const first = Math.max(0, Math.floor(box.scrollTop / ROW) - SPARE);
    const end = Math.min(shown.length, Math.ceil((box.scrollTop + box.clientHeight) / ROW) + SPARE);
    const rows = shown.slice(first, end);
    if (shown.length && (active.line < first || active.line >= end) && shown[active.line] === active) rows.push(active);
    tree.replaceChildren(...rows.map(rowOf));
    if (!shown.length) tree.append(el("div", { role: "treeitem", class: "empty", "aria-disabled": "true", id: "none" }, "No weight matches. Reset the filters to see all."));
    tree.setAttribute("aria-activedescendant", shown.length ? `n${active.id}` : "none");
  }
  const chevron = () => svg("svg", { viewBox: "0 0 10 10", "aria-hidden": "true" }, svg("path", { d: "M3 1l4 4-4 4", fill: "none", stroke: "currentColor", "stroke-width": "1.7" }));
  function rowOf(node) {
    const module = node.row < 0, cell = module ? null : main(D.rows[node.row]);
    const kept = cell && exists(cell) ? named(schemeOf(cell)) : "";
    const label = module
      ? `${node.name}, ${count(filtering ? node.hits : node.weights, "weight")}, ${size(after(node))}`
      : `${node.name}, ${words(node)}, ${size(after(node))}`;
    return el("div", {
        role: "treeitem", id: `n${node.id}`, class: node === active ? "row active" : "row", "aria-level": node.depth, "aria-label": label,
        "aria-setsize": node.of, "aria-posinset": node.place, "aria-selected": node === selected, "aria-expanded": module ? isOpen(node) : null,
        css: { top: `${node.line * ROW}px` }, on: { click: (event) => press(node, event) },
      },
      el("span", { class: "who", css: { "padding-left": `${(node.depth - 1) * 14}px` } },
        el("span", { class: "twist" }, module && chevron()),
        el("span", { class: "text", title: pathOf(node) }, node.name),
        module && el("span", { class: "tally" }, whole.format(filtering ? node.hits : node.weights)),
        node.missed > 0 && el("span", { class: "flag", title: "some graph reads it unquantized, against the policy" }),
        node.changes > 0 && el("span", { class: module ? "changed" : "flag mark", title: module ? null : `changed: ${D.rows[node.row][1].join(", ")}` }, module && `${whole.format(node.changes)} changed`)),
      module ? el("span", { class: "what" }, splitBar(node.splits[1])) : el("span", { class: "what" }, dot(cell && exists(cell) ? schemeOf(cell) : ""), el("span", {}, TWO ? words(node) : kept)),
      el("span", { class: "size" }, before(node) === after(node) ? el("b", {}, size(after(node))) : [`${size(before(node))} → `, el("b", {}, size(after(node)))]));
  }
  function words(node) {
    const own = cellsOf(D.rows[node.row]).map((cell) => (exists(cell) ? named(schemeOf(cell)) : "none"));
    return own.length === 2 && own[0] !== own[1] ? own.join(" → ") : own[own.length - 1];
  }
  const dot = (scheme) => el("i", { class: "dot", css: { background: colour(scheme) } });
  function splitBar(split) {
    const total = [...split.values()].reduce((a, b) => a + b, 0) || 1;
    return el("span", { class: "bar" }, sorted(split).map(([scheme, bytes]) => el("i", { css: { background: colour(scheme), width: `${(100 * bytes) / total}%` } })));
  }
  const sorted = (map) => [...map].sort((a, b) => b[1] - a[1]);

  function press(node, event) {
    if (node.kids.length && (event.detail !== 0 || event.type === "click")) setOpen(node, !isOpen(node));
    select(node);
  }
  function select(node) {
    selected = active = node;
    list();
    paint();
    details();
    markPicked();
  }
  function reveal(node) {
    if (filtering && !node.hits) resetFilters();
    for (let up = node.parent; up && up !== root; up = up.parent) setOpen(up, true);
    select(node);
    $("scroll").scrollTop = Math.max(0, node.line * ROW - $("scroll").clientHeight / 2);
    paint();
  }
  function move(to) {
    if (!shown.length) return;
    active = shown[Math.max(0, Math.min(shown.length - 1, to))];
    const box = $("scroll"), top = active.line * ROW;
    if (top < box.scrollTop) box.scrollTop = top;
    else if (top + ROW > box.scrollTop + box.clientHeight) box.scrollTop = top + ROW - box.clientHeight;
    paint();
  }
  let typed = "", typedAt = 0;
  function jump(letter) {
    const now = performance.now();
    typed = now - typedAt < 700 ? typed + letter : letter;
    typedAt = now;
    const from = active.line + (typed.length === 1 ? 1 : 0);
    for (let i = 0; i < shown.length; i++) {
      const node = shown[(from + i) % shown.length];
      if (node.name.toLowerCase().startsWith(typed)) return move(node.line);
    }
  }
  function unfold(node, open) {
    setOpen(node, open);
    list();
    paint();
  }
  const KEYS = {
    ArrowDown: () => move(active.line + 1),
    ArrowUp: () => move(active.line - 1),
    PageDown: () => move(active.line + Math.floor($("scroll").clientHeight / ROW) - 1),
    PageUp: () => move(active.line - Math.floor($("scroll").clientHeight / ROW) + 1),
    Home: () => move(0),
    End: () => move(shown.length - 1),
    ArrowRight: () => (active.kids.length && !isOpen(active) ? unfold(active, true) : active.kids.length && move(active.line + 1)),
    ArrowLeft: () => (active.kids.length && isOpen(active) ? unfold(active, false) : active.parent && active.parent !== root && move(active.parent.line)),
    Enter: () => select(active),
    " ": () => { if (active.kids.length) setOpen(active, !isOpen(active)); select(active); },
    "*": () => { for (const kid of active.parent.kids) setOpen(kid, true); list(); paint(); },
  };
  $("tree").addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !shown.length) return;
    if (KEYS[event.key]) KEYS[event.key]();
    else if (event.key.length === 1 && event.key !== "/") jump(event.key.toLowerCase());
    else return;
    event.preventDefault();
  });
  $("scroll").addEventListener("scroll", later, { passive: true });
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && !/^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName)) {
      event.preventDefault();
      $("search").focus();
    }
  });

  // --- details of what is selected ---

  function details() {
    const node = selected, box = $("details");
    box.setAttribute("aria-label", node === root ? "Details: whole model" : `Details: ${pathOf(node)}`);
    box.replaceChildren(crumbs(node), el("h2", {}, node === root ? "Whole model" : node.name), ...(node.row < 0 ? moduleDetails(node) : weightDetails(D.rows[node.row])));
  }
  function crumbs(node) {
    const way = [];
    for (let up = node.parent; up; up = up.parent) way.unshift(up);
    return el("p", { class: "crumbs" }, way.map((up, i) => [i > 0 && " . ", el("button", { type: "button", on: { click: () => { if (up === root) select(root); else reveal(up); $("tree").focus(); } } }, up === root ? "all" : up.name)]));
  }
  function rowsBelow(node, out = []) {
    if (node.row >= 0) out.push(D.rows[node.row]);
    for (const kid of node.kids) rowsBelow(kid, out);
    return out;
  }
  function tableOf(head, rows, caption) {
    return el("table", { "aria-label": caption },
      el("thead", {}, el("tr", {}, head.map((text, i) => el("th", { scope: "col", class: i > 0 && i < head.length && head[i].startsWith("#") ? "num" : null }, text.replace(/^#/, ""))))),
      el("tbody", {}, rows.map((cells) => el("tr", {}, cells.map((cell, i) => el("td", { class: head[i].startsWith("#") ? "num" : null }, cell))))));
  }
  function grouped(rows, keyOf) {
    const out = new Map();
    for (const row of rows) {
      const cell = main(row), key = keyOf(cell, row), sum = out.get(key) || [0, 0, 0];
      sum[0]++;
      sum[1] += cell[0];
      sum[2] += cell[1];
      out.set(key, sum);
    }
    return [...out].sort((a, b) => b[1][1] - a[1][1]);
  }
  function schemesOfBoth(rows) {
    const sums = new Map();
    for (const row of rows) cellsOf(row).forEach((cell, s) => {
      if (!exists(cell)) return;
      const sum = sums.get(schemeOf(cell)) || [[0, 0], [0, 0]];
      sum[s][0]++;
      sum[s][1] += cell[1];
      sums.set(schemeOf(cell), sum);
    });
    const found = [...sums].sort((a, b) => b[1][0][1] + b[1][1][1] - a[1][0][1] - a[1][1][1]);
    return tableOf(["scheme", "#weights in A", "#bytes", "#weights in B", "#bytes"], found.map(([scheme, [a, b]]) => [
      el("span", {}, dot(scheme), pick("by-scheme", named(scheme), named(scheme))), whole.format(a[0]), size(a[1]), whole.format(b[0]), size(b[1])]), "By scheme");
  }
  function moduleDetails(node) {
    const rows = rowsBelow(node), [b, a] = [before(node), after(node)];
    const schemesHere = grouped(rows, (cell) => schemeOf(cell));
    const reasons = grouped(rows.filter((row) => exists(row[2 + LAST])), (cell) => cell[5]);
    const parts = [
      el("div", { class: "chips" }, el("span", { class: "chip" }, count(node.weights, "weight")), el("span", { class: "chip" }, b === a ? size(a) : `${size(b)} → ${size(a)}`),
        node.missed > 0 && el("span", { class: "badge warn" }, `${count(node.missed, "weight")} missed`), node.changes > 0 && el("span", { class: "chip" }, `${whole.format(node.changes)} changed`)),
      el("h3", {}, "By scheme"),
      TWO ? schemesOfBoth(rows) : tableOf(["scheme", "#weights", "#before", "#after"], schemesHere.map(([scheme, sum]) => [
        el("span", {}, dot(scheme), pick("by-scheme", named(scheme), named(scheme))), whole.format(sum[0]), size(sum[1]), size(sum[2])]), "By scheme"),
      el("h3", {}, TWO ? "By reason, of B" : "By reason"),
      tableOf(["reason", "#weights", "#bytes"], reasons.slice(0, 40).map(([text, sum]) => [pick("by-reason", String(text), T[text] || "none"), whole.format(sum[0]), size(sum[1])]), "By reason"),
    ];
    if (reasons.length > 40) parts.push(el("p", { class: "muted" }, `${whole.format(reasons.length - 40)} more reasons; search finds them.`));
    if (node === root) parts.push(...attention());
    return parts;
  }
  function pick(id, value, text) {
    return el("button", { type: "button", class: "link", on: { click: () => { $(id).value = value; filter(); } } }, text);
  }
  function attention() {
    const lines = SIDES.flatMap((side, s) => side.attention.map((one) => [(TWO ? `${LETTERS[s]}: ` : "") + one.what, one.runs, one.reason, whole.format(one.count)]));
    return lines.length ? [el("h3", {}, "Attention"), tableOf(["what", "runs", "reason", "#sites"], lines, "Attention")] : [];
  }
  function weightDetails(row) {
    const cells = cellsOf(row), cell = main(row);
    const parts = [
      el("div", { class: "chips" }, el("span", { class: "chip" }, dot(schemeOf(cell)), words(leaves[D.rows.indexOf(row)])),
        el("span", { class: "chip" }, cell[0] === cell[1] ? size(cell[1]) : `${size(cell[0])} → ${size(cell[1])}, ${percent(cell[1] / (cell[0] || 1))}`),
        marksOf(cell).split(" ").filter((mark) => mark && mark !== "named").map((mark) => el("span", { class: mark === "missed" ? "badge warn" : "badge" }, mark)),
        row[1].map((what) => el("span", { class: "badge" }, `${what} changed`.replace(/^(added|removed) changed/, "$1")))),
      TWO ? comparedFacts(cells, row) : facts(cell, row),
    ];
    const seen = new Set();
    cells.forEach((one, s) => {
      if (!exists(one)) return;
      one[9].forEach((v, i) => {
        if (seen.has(v)) return;
        seen.add(v);
        const shared = TWO && exists(cells[1 - s]) && cells[1 - s][9].includes(v);
        const label = [TWO && !shared ? LETTERS[s] : "", one[9].length > 1 ? `graph ${i + 1} of ${one[9].length}` : ""].filter(Boolean).join(", ");
        parts.push(...viewParts(VIEWS[v], label));
      });
    });
    if (!cells.some((one) => exists(one) && one[9].length)) parts.push(el("h3", {}, "Graph"), el("p", { class: "muted" }, "No compiled graph multiplies by this weight."));
    return parts;
  }
  function factRows(cell) {
    return [
      ["shape", cell[8].length ? `${cell[8].join(" × ")} ${T[cell[6]]}` : T[cell[6]]],
      ["scheme", named(schemeOf(cell))],
      ["kernels", kernelsOf(cell).split(", ").join("\n") || "none"],
      ["layout", T[cell[3]] || "none"],
      ["bytes", cell[0] === cell[1] ? size(cell[1]) : `${whole.format(cell[0])} → ${whole.format(cell[1])}`],
      ["reason", reasonOf(cell)],
      ["verified", cell[11] === null ? "" : `at most ${cell[11].toExponential(1)} off, relative to the unfused reference`],
      ["other names", cell[10].join("\n")],
    ];
  }
  const facts = (cell, row) => el("dl", { class: "facts" }, [["name", row[0]], ...factRows(cell)].filter(([, text]) => text).map(([key, text]) => [el("dt", {}, key), el("dd", {}, text)]));
  function comparedFacts(cells, row) {
    const both = cells.map((cell) => (exists(cell) ? factRows(cell) : []));
    const keys = (both[0].length ? both[0] : both[1]).map(([key]) => key);
    const lines = keys.map((key, i) => [key, ...both.map((side) => (side.length ? side[i][1] : "not there"))]).filter((line) => line[1] || line[2]);
    return el("table", { "aria-label": `${row[0]} in both reports`, css: { "margin-top": "14px" } },
      el("thead", {}, el("tr", {}, ["", ...SIDES.map((side, s) => `${LETTERS[s]} ${side.policy}`)].map((text) => (text ? el("th", { scope: "col" }, text) : el("td", {}))))),
      el("tbody", {}, lines.map(([key, a, b]) => el("tr", {}, el("th", { scope: "row" }, key), [a, b].map((text) => el("td", { class: a === b ? null : "differs" }, text))))));
  }
  function viewParts(view, label) {
    const suffix = label ? ` (${label})` : "";
    const parts = [el("h3", {}, view.after ? `Graph, before and after${suffix}` : `Graph, left as written${suffix}`),
      graphs([drawing(view.before, "Before"), ...(view.after ? [drawing(view.after, "After")] : [])])];
    if (view.fused.length) parts.push(el("h3", {}, "Joined"), el("ul", { class: "notes" }, view.fused.map((text) => el("li", {}, text))));
    if (view.missed.length) parts.push(el("h3", {}, "Nearly done, and why not"), el("ul", { class: "notes near" }, view.missed.map((text) => el("li", {}, text))));
    if (view.times.length) parts.push(el("h3", {}, `Kernels by m${suffix}, `, timesBadge(view.times)), timesTable(view));
    if (view.source.length) parts.push(el("h3", {}, "In the model's code"), el("ol", { class: "source", tabindex: "0", "aria-label": "Lines of the model's code" }, view.source.map(sourceLine)));
    return parts;
  }
  function graphs(figures) {
    const widest = Math.max(...figures.map((figure) => Number(figure.querySelector("svg").getAttribute("width"))));
    return el("div", { class: widest > 330 ? "graphs stacked" : "graphs" }, figures);
  }
  function sourceLine(text) {
    const cut = text.indexOf(": ");
    return el("li", {}, el("span", { class: "where" }, text.slice(0, cut)), `\n    ${text.slice(cut + 2)}`);
  }
  function timesBadge(times) {
    const measured = times.filter((time) => time[3]).length;
    if (measured === times.length) return el("span", { class: "badge good" }, "measured");
    return el("span", { class: "badge" }, measured ? `${measured} of ${times.length} measured, others by estimate` : "the kernels' own estimates");
  }
  function timesTable(view) {
    const most = Math.max(...view.times.map((time) => time[2] || 0), 1e-9);
    const anyMeasured = view.times.some((time) => time[3]);
    const rows = view.times.map(([m, kernel, us, measured, floor]) => [
      whole.format(m), kernel, us === null ? "unknown" : `${measured ? "" : "≈ "}${micros(us)}`,
      el("i", { class: "cell-bar", css: { width: `${(100 * Math.log1p(us || 0)) / Math.log1p(most)}%` } }),
      micros(floor), measured && us ? percent(floor / us) : "–"]);
    const head = ["m", "kernel", "#time", "", "#floor", "#of the floor"];
    const table = tableOf(anyMeasured ? head : head.slice(0, 5), anyMeasured ? rows : rows.map((row) => row.slice(0, 5)), "Kernels by m");
    table.querySelectorAll("tbody td:nth-child(4)").forEach((cell) => cell.classList.add("cell-track"));
    table.querySelector("th:nth-child(4)").replaceWith(el("td", {}));
    return table;
  }

  // --- drawings: layers from top to bottom, by the longest way from what is read ---

  const GAP_X = 16, GAP_Y = 30, PAD = 10, LINE = 15;
  const cut = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);
  function boxOf([label, shape, kind, note]) {
    const titles = label.split(" + ");
    const top = titles.length > 4 ? [...titles.slice(0, 3), `and ${titles.length - 3} more`] : titles;
    const small = [...shape.split(/(?<=\])\s+/), ...note.split(", ")].filter(Boolean);
    const kept = small.length > 6 ? [...small.slice(0, 5), `and ${small.length - 5} more`] : small;
    const lines = [...top.map((text) => [cut(text, 32), false]), ...kept.map((text) => [cut(text, 36), true])];
    const width = Math.max(74, ...lines.map(([text, tiny]) => text.length * (tiny ? 6.5 : 7.5))) + 2 * PAD;
    return { lines, kind, width, height: lines.length * LINE + 2 * PAD - 5, full: [label, shape, note].filter(Boolean).join("\n"), up: [], down: [] };
  }
  function layered(data) {
    const boxes = data.boxes.map(boxOf);
    for (const [start, end] of data.edges) { boxes[end].up.push(start); boxes[start].down.push(end); }
    boxes.forEach((box) => { box.layer = Math.max(0, ...box.up.filter((i) => boxes[i].layer !== undefined).map((i) => boxes[i].layer + 1)); });
    boxes.forEach((box) => { if (!box.up.length && box.down.length) box.layer = Math.max(0, Math.min(...box.down.map((i) => boxes[i].layer)) - 1); });
    const layers = [];
    boxes.forEach((box) => (layers[box.layer] = layers[box.layer] || []).push(box));
    let y = 0, wide = 0;
    const present = layers.filter(Boolean);
    for (const layer of present) {
      layer.forEach((box, i) => { box.pull = box.up.length ? box.up.reduce((sum, u) => sum + (boxes[u].order || 0), 0) / box.up.length : i; });
      layer.sort((a, b) => a.pull - b.pull);
      layer.forEach((box, i) => (box.order = i));
      box_rows(layer, y);
      y += Math.max(...layer.map((box) => box.height)) + GAP_Y;
      wide = Math.max(wide, layer.reduce((sum, box) => sum + box.width + GAP_X, -GAP_X));
    }
    for (const layer of present) {
      let x = (wide - layer.reduce((sum, box) => sum + box.width + GAP_X, -GAP_X)) / 2;
      for (const box of layer) { box.x = x; x += box.width + GAP_X; }
    }
    return { boxes, width: wide, height: y - GAP_Y };
  }
  function box_rows(layer, y) {
    const tall = Math.max(...layer.map((box) => box.height));
    for (const box of layer) box.y = y + (tall - box.height) / 2;
  }
  let drawings = 0;
  function drawing(data, title) {
    const { boxes, width, height } = layered(data), tip = `tip${drawings++}`;
    const edges = data.edges.map(([start, end]) => {
      const a = boxes[start], b = boxes[end];
      const x1 = a.x + a.width / 2, y1 = a.y + a.height, x2 = b.x + b.width / 2, y2 = b.y - 2, bend = Math.max(12, (y2 - y1) / 2);
      return svg("path", { class: "edge", d: `M${x1} ${y1}C${x1} ${y1 + bend} ${x2} ${y2 - bend} ${x2} ${y2}`, "marker-end": `url(#${tip})` });
    });
    const shapes = boxes.map((box) => svg("g", { class: box.kind },
      svg("title", {}, box.full),
      svg("rect", { class: "box", x: box.x, y: box.y, width: box.width, height: box.height, rx: box.kind === "op" ? 5 : 9 }),
      box.lines.map(([text, tiny], i) => svg("text", { class: tiny ? "small" : null, x: box.x + box.width / 2, y: box.y + PAD + 8 + i * LINE, "text-anchor": "middle" }, text))));
    const picture = svg("svg", { role: "img", "aria-label": `${title}: ${count(boxes.length, "box", "boxes")}, listed as text below`, viewBox: `-2 -2 ${width + 4} ${height + 4}`, width: width + 4, height: height + 4 },
      svg("defs", {}, svg("marker", { id: tip, viewBox: "0 0 8 8", refX: 6, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto" }, svg("path", { class: "tip", d: "M0 0.8L7 4L0 7.2z" }))), edges, shapes);
    const items = data.boxes.map(([label, shape, kind, note], i) => {
      const readers = data.edges.filter(([start]) => start === i).map(([, end]) => data.boxes[end][0]);
      return el("li", {}, `${kind === "op" ? "" : kind + " "}${label} ${shape}${note ? `, ${note}` : ""}${readers.length ? `; read by ${readers.join(", ")}` : ""}`);
    });
    return el("figure", {}, el("figcaption", {}, title), el("div", { class: "canvas" }, picture), el("details", {}, el("summary", {}, "As text"), el("ol", {}, items)));
  }

  // --- totals ---

  function tiles() {
    const add = (label, value, detail, share) => $("tiles").append(el("div", { class: "tile" }, el("p", { class: "label" }, label), el("p", { class: "value" }, value),
      share === undefined ? null : el("div", { class: "meter", "aria-hidden": "true" }, el("i", { css: { width: `${Math.min(100, 100 * share)}%` } })), el("p", { class: "detail" }, detail)));
    if (TWO) {
      const [a, b] = SIDES, changed = D.rows.filter((row) => row[1].length).length;
      add("Changed weights", whole.format(changed), `of ${count(D.rows.length, "weight")}`, changed / (D.rows.length || 1));
      add("Bytes", [size(a.bytes_after), el("small", {}, ` → ${size(b.bytes_after)}`)], `A → B; ${signed(b.bytes_after - a.bytes_after)}`);
      add("Coverage", [percent(a.coverage), el("small", {}, ` → ${percent(b.coverage)}`)], "of the bytes that the policies name");
      add("Quantized", [percent(a.share), el("small", {}, ` → ${percent(b.share)}`)], "of all bytes");
      return;
    }
    const side = SIDES[0], quantized = D.rows.filter((row) => schemeOf(main(row))).length;
    add("Weights", [size(side.bytes_after), el("small", {}, ` of ${size(side.bytes_before)}`)], `${percent(side.bytes_after / (side.bytes_before || 1))} of what they were`, side.bytes_after / (side.bytes_before || 1));
    add("Coverage", percent(side.coverage), "of the bytes that the policy names", side.coverage);
    add("Quantized", [whole.format(quantized), el("small", {}, ` of ${count(D.rows.length, "weight")}`)], `${percent(side.share)} of all bytes`, side.share);
    const seconds = side.timings.reduce((sum, [, s]) => sum + s, 0);
    add(doing(side), seconds ? micros(seconds * 1e6) : "–", side.timings.length ? sortedTimings(side).slice(0, 2).map(([name, s]) => `${name} ${micros(s * 1e6)}`).join(", ") : "no graph yet");
  }
  const doing = (side) => (side.timings.some(([name]) => name === "packing") ? "Compiling" : "Planning");
  const sortedTimings = (side) => [...side.timings].sort((a, b) => b[1] - a[1]);
  const signed = (bytes) => `${bytes < 0 ? "−" : "+"}${size(Math.abs(bytes))}`;

  // --- treemap ---

  let drawnSide = 1;
  const valueOf = (node) => (TWO ? node.sizes[drawnSide][1] : node.sizes[0][drawnSide]);
  const splitOf = (node) => (node.row >= 0 ? schemeOf(TWO && exists(D.rows[node.row][2 + drawnSide]) ? D.rows[node.row][2 + drawnSide] : main(D.rows[node.row])) : (sorted(node.splits[drawnSide])[0] || [""])[0]);
  let cells = new Map();
  function squarify(kids, x, y, w, h, place) {
    let total = kids.reduce((sum, kid) => sum + valueOf(kid), 0), i = 0;
    while (i < kids.length && total > 0 && w > 0 && h > 0) {
      const side = Math.min(w, h), scale = (w * h) / total;
      let sum = 0, worst = Infinity, end = i;
      while (end < kids.length) {
        const more = sum + valueOf(kids[end]) * scale, big = valueOf(kids[i]) * scale, small = valueOf(kids[end]) * scale;
        const ratio = Math.max((side * side * big) / (more * more), (more * more) / (side * side * (small || 1e-9)));
        if (ratio > worst) break;
        worst = ratio;
        sum = more;
        end++;
      }
      const thick = sum / side;
      let at = w >= h ? y : x;
      for (; i < end; i++) {
        const long = (valueOf(kids[i]) * scale) / thick;
        total -= valueOf(kids[i]);
        if (w >= h) place(kids[i], x, at, thick, long);
        else place(kids[i], at, y, long, thick);
        at += long;
      }
      if (w >= h) { x += thick; w -= thick; } else { y += thick; h -= thick; }
    }
  }
  function treemap() {
    const box = $("treemap"), w = box.clientWidth, h = box.clientHeight, parts = [];
    cells = new Map();
    if (!w) return;
    (function fillIn(node, x, y, w, h) {
      const kids = node.kids.filter((kid) => valueOf(kid) > 0).sort((a, b) => valueOf(b) - valueOf(a));
      squarify(kids, x, y, w, h, (kid, x, y, w, h) => {
        if (parts.length > 4000) return;
        cells.set(kid, [x, y, w, h]);
        const group = kid.kids.length && w > 22 && h > 16 && w * h > 700;
        if (!group) {
          if (w * h < 0.6) return;
          const scheme = splitOf(kid), gap = w > 3 && h > 3 ? 0.75 : 0, split = kid.row >= 0 || w < 24 ? [[scheme, 1]] : sorted(kid.splits[drawnSide]);
          const total = split.reduce((sum, [, bytes]) => sum + bytes, 0) || 1, title = `${pathOf(kid)}\n${size(valueOf(kid))}, ${split.map(([one]) => named(one)).join(", ")}`;
          let left = x + gap;
          for (const [one, bytes] of split) {
            const wide = (Math.max(0, w - 2 * gap) * bytes) / total;
            parts.push(svg("rect", { class: "cell", "data-node": kid.id, x: left, y: y + gap, width: wide, height: Math.max(0, h - 2 * gap), rx: split.length === 1 && w > 12 && h > 12 ? 3 : 0, fill: colour(one) }, w * h > 60 && svg("title", {}, title)));
            left += wide;
          }
          const text = fit(kid.name, w - 10);
          if (h > 18 && text) parts.push(svg("text", { x: x + 6, y: y + 15, class: scheme ? null : "on-kept" }, text));
          return;
        }
        const head = w > 60 && h > 44 ? 15 : 0;
        parts.push(svg("rect", { class: "frame", x: x + 0.5, y: y + 0.5, width: Math.max(0, w - 1), height: Math.max(0, h - 1), rx: 4 }));
        if (head) parts.push(svg("text", { class: "group", x: x + 6, y: y + 12 }, fit(kid.name, w - 10)));
        fillIn(kid, x + 2, y + 2 + head, w - 4, h - 4 - head);
      });
    })(topOf(root), 0, 0, w, h);
    const label = `Treemap of ${size(valueOf(root))}: ${sorted(root.splits[drawnSide]).map(([scheme, bytes]) => `${named(scheme)} ${size(bytes)}`).join(", ")}`;
    box.replaceChildren(svg("svg", { width: w, height: h, role: "img", "aria-label": label }, parts, svg("rect", { class: "picked", id: "picked", width: 0, height: 0 })));
    markPicked();
  }
  const topOf = (node) => (node.kids.length === 1 && node.kids[0].kids.length ? topOf(node.kids[0]) : node);
  const fit = (text, width) => { const most = Math.floor(width / 6.2); return most < 3 ? "" : cut(text, most); };
  function markPicked() {
    const mark = $("picked");
    if (!mark) return;
    let node = selected;
    while (node && node !== root && !cells.has(node)) node = node.parent;
    const [x, y, w, h] = (node && cells.get(node)) || [0, 0, 0, 0];
    Object.entries({ x: x + 1, y: y + 1, width: Math.max(0, w - 2), height: Math.max(0, h - 2), rx: 3, display: w ? "inline" : "none" }).forEach(([key, value]) => mark.setAttribute(key, value));
  }
  $("treemap").addEventListener("click", (event) => {
    const id = event.target.dataset && event.target.dataset.node;
    if (id === undefined) return;
    for (const node of cells.keys()) if (node.id === Number(id)) return reveal(node);
  });
  function legend() {
    const total = valueOf(root) || 1, split = new Map();
    for (const row of D.rows) {
      const cell = TWO ? row[2 + drawnSide] : row[2];
      if (exists(cell)) split.set(schemeOf(cell), (split.get(schemeOf(cell)) || 0) + (TWO ? cell[1] : cell[drawnSide]));
    }
    $("legend").replaceChildren(...sorted(split).map(([scheme, bytes]) => el("li", {}, dot(scheme), el("b", {}, named(scheme)), ` ${size(bytes)}, ${percent(bytes / total)}`)));
  }

  // --- time ---

  function allTimes() {
    const out = new Map();
    D.rows.forEach((row) => cellsOf(row).forEach((cell, s) => {
      const v = exists(cell) && cell[9].find((i) => VIEWS[i].times.length);
      if (v === undefined || v === false) return;
      const view = VIEWS[v];
      for (const [m, kernel, us, measured, floor] of view.times) {
        if (us === null) continue;
        if (!out.has(m)) out.set(m, SIDES.map(() => ({ kernels: new Map(), total: 0, floor: 0, measured: 0, jobs: 0 })));
        const sum = out.get(m)[s], share = 1 / view.weights.length;
        sum.kernels.set(kernel, (sum.kernels.get(kernel) || 0) + us * share);
        sum.total += us * share;
        sum.floor += floor * share;
        sum.jobs += share;
        if (measured) sum.measured += share;
      }
    }));
    return out;
  }
  function timePanel() {
    const times = allTimes(), box = $("time");
    const body = el("div", {});
    const points = [...times.keys()].sort((a, b) => a - b);
    if (!points.length) box.append(el("p", { class: "muted" }, "No graph has kernels, so there are no times."));
    else {
      const choices = points.filter((m) => [1, 16, 64, 512, 4096].includes(m));
      const group = segmented(choices.length ? choices : points, (m) => `${m}`, (m) => body.replaceChildren(...SIDES.map((side, s) => timeRow(times.get(m)[s], m, s))));
      group.setAttribute("aria-label", "Rows that are multiplied, m");
      box.append(el("div", { class: "ms" }, el("span", { class: "muted", css: { "margin-right": "10px" } }, "m ="), group), body);
      group.firstChild.click();
    }
    SIDES.forEach((side, s) => {
      if (!side.timings.length) return;
      const list = sortedTimings(side), total = list.reduce((sum, [, t]) => sum + t, 0) || 1;
      box.append(stack((TWO ? `${LETTERS[s]}: ` : "") + doing(side), `${micros(total * 1e6)}`, list.map(([name, t]) => [name, t * 1e6]), total * 1e6, 4));
    });
  }
  const kernelColours = new Map();
  const kernelColour = (name) => { if (!kernelColours.has(name)) kernelColours.set(name, colourAt(kernelColours.size % 8)); return kernelColours.get(name); };
  function timeRow(sum, m, s) {
    if (!sum.jobs) return el("p", { class: "muted" }, `${TWO ? LETTERS[s] + ": " : ""}no kernels.`);
    const how = sum.measured >= sum.jobs - 1e-6 ? `${percent(sum.floor / sum.total)} of the floor` : sum.measured ? "partly measured" : "by estimate";
    return stack(`${TWO ? LETTERS[s] + ": " : ""}${sum.measured ? "" : "≈ "}${micros(sum.total)}`, el("span", { class: sum.measured >= sum.jobs - 1e-6 ? "badge good" : "badge" }, how), sorted(sum.kernels), sum.total, 8);
  }
  function stack(title, right, parts, total, most) {
    const rest = parts.slice(most), more = rest.reduce((sum, [, value]) => sum + value, 0);
    const kept = rest.length ? [...parts.slice(0, most), [`${rest.length} more`, more]] : parts;
    return el("div", { class: "time-row" }, el("p", { class: "head" }, el("b", {}, title), el("span", { class: "muted" }, right)),
      el("div", { class: "bar", "aria-hidden": "true" }, kept.map(([name, value]) => el("i", { css: { width: `${(100 * value) / total}%`, background: kernelColour(name) } }))),
      el("ul", { class: "time-list" }, kept.map(([name, value]) => el("li", {}, el("i", { class: "dot", css: { background: kernelColour(name) } }), el("span", { class: "name", title: name }, name), el("span", { class: "num" }, micros(value)), el("span", { class: "num" }, percent(value / total))))));
  }
  function segmented(values, label, choose, box = el("div", { class: "segmented", role: "group" })) {
    box.append(...values.map((value) => el("button", { type: "button", "aria-pressed": "false", on: { click: (event) => {
      for (const button of box.children) button.setAttribute("aria-pressed", String(button === event.currentTarget));
      choose(value);
    } } }, label(value))));
    return box;
  }

  // --- controls ---

  function option(value, text) { return el("option", { value }, text); }
  function controls() {
    const byScheme = grouped(D.rows, (cell) => named(schemeOf(cell))), kernels = new Map(), reasons = new Map();
    for (const row of D.rows)
      for (const cell of cellsOf(row)) {
        if (!exists(cell)) continue;
        for (const name of kernelNames[cell[4]]) kernels.set(name, (kernels.get(name) || 0) + 1);
        reasons.set(cell[5], (reasons.get(cell[5]) || 0) + 1);
      }
    $("by-scheme").append(option("", "any"), ...byScheme.map(([name, sum]) => option(name, `${name} (${whole.format(sum[0])})`)));
    $("by-kernel").append(option("", "any"), ...sorted(kernels).map(([name, n]) => option(name, `${name} (${whole.format(n)})`)));
    const top = sorted(reasons);
    $("by-reason").append(option("", "any"), ...top.slice(0, 300).map(([text, n]) => option(String(text), `${cut(T[text] || "none", 90)} (${whole.format(n)})`)));
    if (top.length > 300) $("by-reason").append(el("option", { disabled: "" }, `${whole.format(top.length - 300)} more: use the search`));
    const kinds = new Map();
    for (const row of D.rows) for (const what of row[1]) kinds.set(what, (kinds.get(what) || 0) + 1);
    $("by-change").append(option("", "any weight"), option("any", "changed"), ...sorted(kinds).map(([what, n]) => option(what, `${what} (${whole.format(n)})`)));
    $("changed-label").hidden = !TWO;
    $("changed-label").style.display = TWO ? "" : "none";
    for (const id of ["by-scheme", "by-kernel", "by-reason", "by-change"]) $(id).addEventListener("change", filter);
    $("search").addEventListener("input", filter);
    $("search").addEventListener("keydown", (event) => { if (event.key === "Escape" && $("search").value) { $("search").value = ""; filter(); event.preventDefault(); } else if (event.key === "ArrowDown") { $("tree").focus(); event.preventDefault(); } });
    $("reset").addEventListener("click", () => { resetFilters(); $("search").focus(); });
  }
  function resetFilters() {
    for (const id of ["search", "by-scheme", "by-kernel", "by-reason", "by-change"]) $(id).value = "";
    filter();
  }
  function theme() {
    const key = "sglquant-theme";
    let kept = "auto";
    try { kept = localStorage.getItem(key) || "auto"; } catch { /* a file may have no storage */ }
    const choose = (choice) => {
      if (choice === "auto") document.documentElement.removeAttribute("data-theme");
      else document.documentElement.dataset.theme = choice;
      for (const button of $("theme").children) button.setAttribute("aria-pressed", String(button.dataset.themeChoice === choice));
    };
    for (const button of $("theme").children) button.addEventListener("click", () => {
      choose(button.dataset.themeChoice);
      try { localStorage.setItem(key, button.dataset.themeChoice); } catch { /* the same */ }
    });
    choose(["light", "dark"].includes(kept) ? kept : "auto");
  }

  theme();
  tiles();
  controls();
  for (let node = root; node.kids.length && node.kids.length < 40 && node.depth < 4; ) {
    const modules = node.kids.filter((kid) => kid.kids.length);
    if (!modules.length) break;
    node = modules[0].kids.length < 60 ? modules[0] : modules[modules.length - 1];
    opened.add(node);
  }
  segmented(TWO ? [0, 1] : [0, 1], (s) => (TWO ? LETTERS[s] : ["Before", "After"][s]), (s) => { drawnSide = s; legend(); treemap(); }, $("bytes-side"));
  timePanel();
  if (TWO && D.rows.some((row) => row[1].length)) $("by-change").value = "any";
  filter();
  details();
  $("bytes-side").children[1].click();
  let resized = 0;
  new ResizeObserver(() => { cancelAnimationFrame(resized); resized = requestAnimationFrame(() => { treemap(); paint(); }); }).observe($("treemap"));
  performance.mark("ready");
})();
