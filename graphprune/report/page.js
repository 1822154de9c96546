"use strict";
// Draws what can be long: two plots, and tables that show a page of rows at a time.
const data = JSON.parse(document.getElementById("data").textContent);

function el(tag, props, ...children) {
  const it = document.createElement(tag);
  for (const [key, value] of Object.entries(props || {})) {
    if (key.startsWith("on")) it.addEventListener(key.slice(2), value);
    else if (value === true) it.setAttribute(key, "");
    else if (value !== false && value != null) it.setAttribute(key, value);
  }
  it.append(...children.flat().filter((child) => child != null && child !== false));
  return it;
}

function svg(tag, props, text) {
  const it = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(props)) it.setAttribute(key, value);
  if (text != null) it.textContent = text;
  return it;
}

// ---- numbers: [digits, unit]

const whole = (value) => [value.toLocaleString("en", { maximumFractionDigits: 1 }), ""];

function scaled(value) {
  if (Math.abs(value) < 1000) return whole(value);
  const units = ["", "k", "M", "G", "T"];
  let power = 0;
  while (Math.abs(value) >= 1000 && power < units.length - 1) [value, power] = [value / 1000, power + 1];
  return [String(Number(value.toPrecision(4))), units[power]];
}

const text = ([digits, unit]) => (unit ? `${digits}\u202f${unit}` : digits);
const percent = (part, of) => (of ? `${Number(((100 * part) / of).toPrecision(3))}\u202f%` : "");

const LAYER = { name: 0, op: 1, params: 2, macs: 4, width: 6, ms: 8 }; // positions in a row of data.layers; after follows before
const MEASURES = {
  width: { label: "Width", noun: "outputs", write: whole },
  macs: { label: "MACs", noun: "MACs", write: scaled },
  params: { label: "Parameters", noun: "parameters", write: scaled },
  ms: { label: "Time", noun: "ms", write: millis },
};
const slowest = data.layers.reduce((most, row) => Math.max(most, row[8] || 0, row[9] || 0), 0);
const decimals = slowest >= 100 ? 1 : slowest >= 10 ? 2 : 3; // the same for all, so that points stand below each other
function millis(value) {
  return [value.toLocaleString("en", { minimumFractionDigits: decimals, maximumFractionDigits: decimals }), ""];
}
const known = (measure) => data.layers.some((row) => row[LAYER[measure]] != null);

// A long name may break after its dots and slashes.
const breakable = (name) => name.split(/(?<=[./_:])/).flatMap((part, i) => (i ? [el("wbr"), part] : [part]));

// ---- tables

const short = matchMedia("(max-width: 680px)").matches;
const counted = (number, [one, many]) => `${number.toLocaleString("en")} ${number === 1 ? one : many}`;

/* columns: {label, over, get(row) -> sort key, show(row) -> nodes, or [digits, unit] of a number, number, blank(row), style(row)}
   The first column names the row. `noun` is [one, many]. `detail(row)` makes what opens below it. `sum(rows)` gives cells of a last row.
   `longCells` puts every figure on a line of its own on a narrow screen. */
function table(host, { caption, noun, columns, rows, detail, sum, longCells, page = short ? 10 : 25 }) {
  const state = { filter: "", start: 0, column: -1, down: false, open: new Set() };
  const hay = rows.map((row) => columns.filter((c) => !c.number).map((c) => String(c.get(row))).join(" ").toLowerCase());
  const order = rows.map((_, i) => i);
  const body = el("tbody", { role: "rowgroup" }), foot = el("tfoot", { role: "rowgroup" });
  const heads = columns.map((column, i) =>
    el("th", { scope: "col", role: "columnheader", class: column.number && "num", "aria-sort": "none" },
      el("button", { type: "button", title: column.hint, onclick: () => sort(i) },
        column.over && el("span", { class: "long" }, `${column.over} `), column.label)));
  const over = [];
  columns.forEach((column, i) => {
    const last = over[over.length - 1];
    if (last && last.name === column.over && column.over) last.span += 1;
    else over.push({ name: column.over || "", span: 1 });
  });
  const head = el("thead", { role: "rowgroup" },
    over.some((it) => it.name) && el("tr", { class: "over", role: "row" },
      over.map((it) => (it.name ? el("th", { scope: "colgroup", colspan: it.span, role: "columnheader" }, el("span", {}, it.name)) : el("td", { colspan: it.span, role: "cell" })))),
    el("tr", { role: "row" }, heads));
  const found = el("output", {}), shown = el("span", {});
  const back = el("button", { type: "button", onclick: () => turn(-page) }, "Previous");
  const next = el("button", { type: "button", onclick: () => turn(page) }, "Next");
  const pager = el("div", { class: "pager" }, shown, el("span", {}, back, " ", next));
  const field = el("input", { type: "search", placeholder: "Filter by name", "aria-label": `Filter ${noun[1]} by name`, oninput: () => filter(field.value) });
  let visible = order;

  function sort(i) {
    const first = columns[i].number;
    if (state.column !== i) [state.column, state.down] = [i, Boolean(first)];
    else if (state.down === Boolean(first)) state.down = !first;
    else state.column = -1; // a third time: the order in which they came
    arrange();
  }
  function arrange() {
    order.sort((a, b) => a - b);
    if (state.column >= 0) {
      const keys = rows.map(columns[state.column].get), sign = state.down ? -1 : 1;
      const compare = columns[state.column].number ? (a, b) => a - b : (a, b) => String(a).localeCompare(String(b), "en", { numeric: true });
      order.sort((a, b) => {
        if (keys[a] == null || keys[b] == null) return (keys[a] == null) - (keys[b] == null);
        return sign * compare(keys[a], keys[b]) || a - b;
      });
    }
    heads.forEach((it, i) => it.setAttribute("aria-sort", i !== state.column ? "none" : state.down ? "descending" : "ascending"));
    filter(state.filter);
  }
  function filter(words) {
    state.filter = words;
    const wanted = words.toLowerCase().split(/\s+/).filter(Boolean);
    visible = wanted.length ? order.filter((i) => wanted.every((word) => hay[i].includes(word))) : order;
    found.textContent = (wanted.length ? `${visible.length.toLocaleString("en")} of ` : "") + counted(rows.length, noun);
    state.start = 0;
    draw();
  }
  function turn(by) {
    state.start += by;
    draw();
    if (head.getBoundingClientRect().top < 0) host.scrollIntoView();
  }
  function cell(column, value, style, first) {
    if (first) return el("th", { scope: "row", role: "rowheader" }, value);
    const content = column.number ? [value[0], el("span", { class: "u" }, value[1] && `\u202f${value[1]}`)] : value;
    return el("td", { role: "cell", class: [column.number ? "num" : "line", column.after && "pair", style].filter(Boolean).join(" "), "data-label": column.over || column.label }, el("span", {}, content));
  }
  function line(i) {
    const row = rows[i], cells = columns.map((column, k) => cell(column, column.show(row), column.style ? column.style(row) : "", k === 0));
    if (!detail) return [el("tr", { role: "row" }, cells)];
    const button = el("button", { type: "button", class: "unfold", "aria-expanded": String(state.open.has(i)), onclick: () => {
      state.open.has(i) ? state.open.delete(i) : state.open.add(i);
      draw();
      body.querySelector(`[data-row="${i}"]`).focus();
    }, "data-row": i }, ...cells[0].childNodes);
    cells[0].replaceChildren(button);
    const below = state.open.has(i) && el("tr", { class: "inside", role: "row" }, el("td", { colspan: columns.length, role: "cell" }, detail(row)));
    return [el("tr", { role: "row" }, cells), below || null];
  }
  function draw() {
    const part = visible.slice(state.start, state.start + page);
    body.replaceChildren(...part.flatMap(line).filter(Boolean));
    if (!part.length) body.append(el("tr", { role: "row" }, el("td", { colspan: columns.length, role: "cell", class: "line" }, "Nothing has this name.")));
    foot.replaceChildren();
    if (sum && visible.length > 1) foot.append(el("tr", { role: "row" }, sum(visible.map((i) => rows[i])).map((value, k) => cell(columns[k], value, value[0] === "" ? "blank" : columns[k].after ? "after" : "", k === 0))));
    shown.textContent = `${(state.start + 1).toLocaleString("en")} to ${(state.start + part.length).toLocaleString("en")} of ${visible.length.toLocaleString("en")}`;
    pager.hidden = visible.length <= page;
    pager.style.display = pager.hidden ? "none" : "";
    back.disabled = state.start === 0;
    next.disabled = state.start + page >= visible.length;
  }
  host.replaceChildren(...[
    rows.length > 8 && el("div", { class: "bar" }, field, found),
    el("div", { class: "wide" }, el("table", { class: longCells ? "grid long-cells" : "grid", role: "table" }, el("caption", {}, caption), head, body, foot)), pager].filter(Boolean));
  arrange();
  return { find: (name) => { field.value = name; filter(name); host.scrollIntoView({ block: "nearest" }); } };
}

// ---- plots

function ticks(top) {
  const rough = top / 4, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((it) => it * power).find((it) => it >= rough) || 10 * power;
  return Array.from({ length: Math.floor(top / step + 1e-9) + 1 }, (_, i) => i * step);
}

/* Names under the axis: runs of layers with a common prefix, as deep as most of their labels find room. */
function runs(names, step) {
  const split = names.map((name) => name.split(/[./]/).filter(Boolean));
  let best = [], share = 0;
  for (let depth = 1; depth <= 6; depth += 1) {
    const found = [];
    split.forEach((parts, i) => {
      const prefix = parts.slice(0, Math.max(1, Math.min(depth, parts.length - 1))), key = prefix.join(".");
      if (found.length && found[found.length - 1].key === key) found[found.length - 1].end = i + 1;
      else found.push({ key, start: i, end: i + 1, label: prefix.slice(/^\d+$/.test(prefix[prefix.length - 1]) ? -2 : -1).join(".") });
    });
    for (const run of found) run.fits = (run.end - run.start) * step > 6.6 * run.label.length + 6;
    const labelled = found.reduce((sum, run) => sum + (run.fits ? run.end - run.start : 0), 0) / names.length;
    const clear = new Set(found.map((run) => run.label)).size === new Set(found.map((run) => run.key)).size; // "mlp" twice says little
    if (clear && labelled >= Math.min(share, 0.75)) [best, share] = [found, labelled];
  }
  return best;
}

/* Layers too many for a bar each: means of `size` consecutive ones. */
function means(rows, size) {
  return Array.from({ length: Math.ceil(rows.length / size) }, (_, i) => {
    const part = rows.slice(i * size, (i + 1) * size), mean = (k) => part.reduce((sum, row) => sum + row[k], 0) / part.length;
    const name = part.length > 1 ? `${part[0][0]} … ${part[part.length - 1][0]}` : part[0][0];
    return [name, part.length > 1 ? `mean of ${part.length} layers` : part[0][1], mean(2), mean(3), part[0][0]];
  });
}

/* Bars of rows [name, op, before, after, name of the first layer]: what stayed in front of what was. */
function plot(host, { label, measures, layers, pick }) {
  let measure = measures[0], at = -1, single = [], rows = []; // single: one per layer; rows: one per bar
  const area = el("div", { class: "area" }), tip = el("div", { class: "tip", hidden: true });
  const legend = [["kept", "kept"], ["gone", "removed"], ["same", "layer without a cut"]].map(([name, words]) => el("span", { class: "key", style: `--colour:var(--${name})` }, words));
  const note = el("span", {});
  const choice = measures.length > 1 && el("fieldset", { class: "choice" }, el("legend", { class: "hidden" }, "What the bars show"),
    measures.map((name) => el("label", {}, el("input", { type: "radio", name: `${host.id}-measure`, value: name, checked: name === measure, onchange: () => show(name) }), el("span", {}, MEASURES[name].label))));
  host.replaceChildren(el("figure", { class: "plot" }, el("figcaption", {}, legend, note, choice), area));
  let geometry = null;

  function show(name) {
    measure = name;
    const k = LAYER[name];
    const drawn = layers.filter((row) => row[k] != null && (row[k] > 0 || row[k + 1] > 0));
    single = drawn.map((row) => [row[LAYER.name], row[LAYER.op], row[k], row[k + 1], row[LAYER.name]]);
    draw();
  }
  function draw() {
    const width = area.clientWidth, height = width < 500 ? 220 : 280;
    if (!width) return;
    const size = Math.ceil((2.5 * single.length) / Math.max(width - 60, 60));
    rows = size > 1 ? means(single, size) : single;
    at = -1;
    if (!rows.length) return area.replaceChildren(el("p", { class: "empty" }, "There is nothing to draw: no layer has this figure."));
    const { write, noun } = MEASURES[measure], exact = measure !== "ms";
    const cut = rows.filter((row) => row[2] !== row[3]).map((row) => Math.max(row[2], row[3]));
    const all = rows.map((row) => Math.max(row[2], row[3])), highest = all.reduce((a, b) => Math.max(a, b));
    const ofCut = cut.reduce((a, b) => Math.max(a, b), 0);
    const top = ofCut && highest > 3 * ofCut ? 1.15 * ofCut : highest; // one huge layer without a cut must not flatten the others
    const beyond = rows.filter((row) => Math.max(row[2], row[3]) > top);
    const binned = size > 1 ? `each bar is the mean of ${size} layers` : "";
    note.textContent = binned ? binned : beyond.length > 1 ? `${beyond.length} bars go off the scale` : beyond.length ? `${beyond[0][0]} (${text(write(beyond[0][2]))}) goes off the scale` : "";
    const labels = ticks(top), left = 12 + 7 * Math.max(...labels.map((it) => text(write(it)).length)), bottom = 34, high = height - bottom - 8;
    const step = (width - left - 4) / rows.length, gap = step > 14 ? step * 0.3 : step > 4 ? step * 0.2 : 0, wide = Math.max(step - gap, 0.75);
    const y = (value) => 8 + high * (1 - Math.min(value, top) / top);
    const bar = (i, from, to) => `M${(left + i * step + gap / 2).toFixed(2)} ${y(from).toFixed(2)}h${wide.toFixed(2)}V${y(to).toFixed(2)}h${(-wide).toFixed(2)}Z`;
    const paths = { gone: "", kept: "", same: "", break: "" };
    rows.forEach(([, , before, after], i) => {
      if (before === after) paths.same += bar(i, 0, before);
      else {
        if (before > after) paths.gone += bar(i, exact ? after : 0, before);
        paths.kept += bar(i, 0, after);
      }
      if (Math.max(before, after) > top) paths.break += `M${left + i * step} ${8 + 0.1 * high}h${step}v3h${-step}Z`;
    });
    const box = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": `${label}: ${single.length} layers, ${single.filter((row) => row[2] !== row[3]).length} of them cut; a table below lists the figures` });
    for (const value of labels) {
      box.append(svg("line", { x1: left, x2: width - 4, y1: y(value), y2: y(value), class: value ? "rule" : "base" }));
      box.append(svg("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, text(write(value))));
    }
    for (const [name, d] of Object.entries(paths)) if (d) box.append(svg("path", { d, class: name }));
    for (const run of runs(rows.map((row) => row[4]), step)) {
      const from = left + run.start * step, room = (run.end - run.start) * step;
      if (run.start) box.append(svg("line", { x1: from, x2: from, y1: height - bottom, y2: height - bottom + 6, class: "base" }));
      if (run.fits) box.append(svg("text", { x: from + room / 2, y: height - 14, "text-anchor": "middle" }, run.label));
    }
    const cursor = svg("rect", { class: "cursor", y: 8, height: high, width: Math.max(step, 2), visibility: "hidden" });
    box.append(cursor);
    geometry = { left, step, cursor, noun, write, width };
    const slider = el("div", { class: "area", role: "slider", tabindex: "0", "aria-label": `${label}, layer by layer`, "aria-valuemin": 1, "aria-valuemax": rows.length, "aria-valuenow": 1,
      onpointermove: (event) => point(index(event), slider), onpointerdown: (event) => point(index(event), slider), onpointerleave: () => point(-1, slider), onblur: () => point(-1, slider),
      onclick: (event) => pick && rows[index(event)] && pick(rows[index(event)][4]), onkeydown: (event) => key(event, slider) }, box);
    area.replaceChildren(slider, tip);
    tip.hidden = true;
  }
  function index(event) {
    const x = event.clientX - area.getBoundingClientRect().left;
    const i = Math.floor((x - geometry.left) / geometry.step);
    return i < 0 || i >= rows.length ? -1 : i;
  }
  function key(event, slider) {
    const to = { ArrowRight: at + 1, ArrowUp: at + 1, ArrowLeft: at - 1, ArrowDown: at - 1, Home: 0, End: rows.length - 1, PageUp: at + 10, PageDown: at - 10 }[event.key];
    if (event.key === "Enter" && at >= 0 && pick) pick(rows[at][4]);
    if (to === undefined) return;
    event.preventDefault();
    point(Math.max(0, Math.min(rows.length - 1, to)), slider);
  }
  function point(i, slider) {
    at = i;
    tip.hidden = i < 0;
    geometry.cursor.setAttribute("visibility", i < 0 ? "hidden" : "visible");
    geometry.cursor.setAttribute("x", geometry.left + Math.max(i, 0) * geometry.step);
    if (i < 0) return;
    const [name, op, before, after] = rows[i], { write, noun } = geometry;
    const words = before === after ? `${text(write(before))} ${noun}` : `${text(write(before))} → ${text(write(after))} ${noun}, ${percent(after, before)} kept`;
    tip.replaceChildren(el("b", {}, name), `${op}: ${words}`);
    slider.setAttribute("aria-valuenow", i + 1);
    slider.setAttribute("aria-valuetext", `${name}, ${words}`);
    const x = geometry.left + (i + 0.5) * geometry.step, half = x > geometry.width / 2;
    tip.style.left = half ? "auto" : `${x + 12}px`;
    tip.style.right = half ? `${geometry.width - x + 12}px` : "auto";
  }
  show(measure);
  new ResizeObserver(() => geometry && area.clientWidth !== geometry.width && draw()).observe(area);
}

// ---- the page

const byId = (id) => document.getElementById(id);
const empty = (words) => el("p", { class: "empty" }, words);

const figures = ["width", "params", "macs", "ms"].filter(known).flatMap((name) => {
  const before = LAYER[name], after = before + 1, { label, write } = MEASURES[name], over = name === "ms" ? "Time (ms)" : label;
  const column = (at, words, style) => ({
    label: words, over, number: true, at, after: at === after, get: (row) => row[at], show: (row) => (row[at] == null ? ["", ""] : write(row[at])),
    style: (row) => (row[before] || row[after] ? (row[before] === row[after] ? "same-figure" : style) : "blank"),
  });
  return [column(before, "before", ""), column(after, "after", "after")];
});

if (data.layers.length) {
  const costs = table(byId("cost-table"), {
    caption: "Figures of every layer, in the order in which they run; a heading sorts by it", noun: ["layer", "layers"], rows: data.layers,
    columns: [
      { label: "Layer", get: (row) => `${row[LAYER.name]} ${row[LAYER.op]}`, show: (row) => [...breakable(row[LAYER.name]), " ", el("span", { class: "op" }, row[LAYER.op])] },
      ...figures,
    ],
    sum: (rows) => ["Sum", ...figures.map((it) => (it.over === "Width" ? ["", ""] : it.show({ [it.at]: rows.reduce((sum, row) => sum + (row[it.at] || 0), 0) })))],
  });
  plot(byId("width-plot"), { label: "Width of every layer before and after", measures: ["width"], layers: data.layers, pick: costs.find });
  plot(byId("cost-plot"), { label: "Cost of every layer before and after", measures: ["macs", "params", "ms"].filter(known), layers: data.layers, pick: costs.find });
} else {
  for (const id of ["width-plot", "cost-plot"]) byId(id).replaceChildren(empty("The report holds no figures for single layers."));
}

const shape = (sizes) => (sizes ? sizes.join(" × ") || "scalar" : "–");
if (data.shapes.length) {
  byId("shapes").querySelector("summary").append(el("span", { class: "count" }, ` (${data.shapes.length.toLocaleString("en")})`));
  byId("shapes").addEventListener("toggle", () => table(byId("shapes").querySelector("div"), {
    caption: "Shapes before and after", noun: ["weight", "weights"], rows: data.shapes, longCells: true,
    columns: [
      { label: "Weight", get: (row) => row[0], show: (row) => breakable(row[0]) },
      { label: "Before", number: true, get: (row) => (row[1] || [0]).reduce((a, b) => a * b, 1), show: (row) => [shape(row[1]), ""] },
      { label: "After", number: true, get: (row) => (row[2] || [0]).reduce((a, b) => a * b, 1), show: (row) => [shape(row[2]), ""], style: () => "after" },
    ],
  }), { once: true });
} else byId("shapes").remove();

function members([, , , , , , note, list, spared]) {
  const items = list.map((member) => {
    const [, name, axis, role] = member.match(/^(.*)\[(\d+)\] (\w+)$/) || [null, member, "", ""];
    return el("li", {}, el("code", {}, breakable(name)), el("em", {}, axis && ` axis ${axis}, ${role}`));
  });
  const why = spared && el("p", {}, `Left as it is: ${spared}.`);
  return [why, note && el("p", {}, `Decided at node `, el("code", {}, note), "."), el("ul", { class: "members" }, items)].filter(Boolean);
}

if (data.groups.length) {
  table(byId("group-table"), {
    caption: "All groups; open one to see its members", noun: ["group", "groups"], rows: data.groups,
    columns: [
      { label: "Group", get: (row) => row[0], show: (row) => breakable(row[0]) },
      { label: "Kind", get: (row) => row[1], show: (row) => row[1] },
      { label: "Exactness", get: (row) => row[5], show: (row) => row[5] },
      { label: "before", over: "Units", number: true, get: (row) => row[2], show: (row) => whole(row[2]) },
      { label: "after", over: "Units", number: true, get: (row) => row[3], after: true, show: (row) => whole(row[3]), style: (row) => (row[2] === row[3] ? "same-figure" : "after") },
      { label: "Weights per unit", number: true, get: (row) => row[4], show: (row) => scaled(row[4]), hint: "entries of all members that one unit owns" },
      { label: "Tensors", number: true, get: (row) => row[7].length, show: (row) => whole(row[7].length) },
    ],
    detail: members,
  });
} else byId("group-table").replaceChildren(empty("No group was found: nothing in this network can be cut."));

const reasons = data.frozen.map(([reason, meaning, hints, rows]) => {
  const inside = el("div", {});
  const it = el("details", {}, el("summary", {}, reason[0].toUpperCase() + reason.slice(1), el("span", { class: "count" }, ` (${counted(rows.length, ["axis", "axes"])})`), el("span", { class: "hint" }, meaning), hints.map((hint) => el("span", { class: "hint" }, `What you can do: ${hint}`))), inside);
  it.addEventListener("toggle", () => table(inside, {
    caption: "Axes and the nodes that hold them", noun: ["axis", "axes"], rows,
    columns: [
      { label: "Axis", get: (row) => row[0], show: (row) => breakable(row[0]) },
      { label: "Node", get: (row) => row[1], show: (row) => breakable(row[1]) },
    ],
  }), { once: true });
  return it;
});
byId("frozen-list").replaceChildren(...(reasons.length ? reasons : [empty("Everything that holds weights can be cut.")]));

for (const block of document.querySelectorAll(".code")) {
  const code = block.querySelector("code");
  const button = el("button", { type: "button", class: "copy", "aria-label": `Copy: ${block.querySelector("figcaption").textContent}`, onclick: async () => {
    const done = navigator.clipboard && (await navigator.clipboard.writeText(code.textContent).then(() => true, () => false));
    if (!done) getSelection().selectAllChildren(code); // ready for the keyboard
    button.textContent = done ? "Copied" : "Selected";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  } }, "Copy");
  block.append(button);
}
