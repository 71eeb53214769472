"use strict";
// The page of bushpc.report.gallery. State lives in the controls and, as a link that can be shared, in the URL's hash.
const DATA = JSON.parse(document.getElementById("data").textContent);
const MANY = 40; // a filter of more values is a text field with suggestions
const NONE = "(none)";
const get = (id) => document.getElementById(id);
const whole = new Intl.NumberFormat("en");
const scans = DATA.scans.map((scan, place) => ({ ...scan, place, low: scan.key.toLowerCase() }));
const byId = new Map(scans.map((scan) => [scan.id, scan]));
const SVG = "http://www.w3.org/2000/svg";
let found = scans;
let page = 0;
let shown = null; // the scan of the large view

function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function text(value) {
  if (value === null || value === undefined) return NONE;
  return typeof value === "number" && !Number.isInteger(value) ? String(Number(value.toPrecision(4))) : String(value);
}

const capital = (name) => name.charAt(0).toUpperCase() + name.slice(1).replaceAll("_", " ");
const valueOf = (scan, name) => scan.values[DATA.fields.indexOf(name)];
const natural = new Intl.Collator("en", { numeric: true }).compare;

function compare(a, b) {
  if (a === null || b === null) return (a === null) - (b === null);
  return typeof a === "number" && typeof b === "number" ? a - b : natural(text(a), text(b));
}

// --- controls -------------------------------------------------------------------------------------------------------

const filters = DATA.filters.map((name, number) => {
  const counts = new Map();
  for (const scan of scans) counts.set(text(valueOf(scan, name)), (counts.get(text(valueOf(scan, name))) ?? 0) + 1);
  const values = [...counts.keys()].sort((a, b) => (a === NONE) - (b === NONE) || natural(a, b));
  const id = `filter-${number}`;
  let control;
  if (values.length > MANY) {
    control = make("input", { id, type: "text", list: `${id}-values`, placeholder: "all", autocomplete: "off" });
    const list = make("datalist", { id: `${id}-values` }, ...values.map((value) => make("option", { value })));
    get("filters").append(make("div", { class: "field" }, make("label", { for: id }, capital(name)), control, list));
  } else {
    const options = values.map((value) => make("option", { value }, `${value} (${whole.format(counts.get(value))})`));
    control = make("select", { id }, make("option", { value: "" }, "all"), ...options);
    get("filters").append(make("div", { class: "field" }, make("label", { for: id }, capital(name)), control));
  }
  return { name, values, control, low: new Set(values.map((value) => value.toLowerCase())) };
});

const kinds = new Map();
for (const scan of scans) for (const kind of new Set(scan.notes.map((note) => note.kind))) kinds.set(kind, (kinds.get(kind) ?? 0) + 1);
const remarked = scans.filter((scan) => scan.notes.length).length;
get("finding").append(
  make("option", { value: "" }, "all scans"),
  make("option", { value: "any" }, `with any (${whole.format(remarked)})`),
  make("option", { value: "none" }, `without (${whole.format(scans.length - remarked)})`),
  ...[...kinds].map(([kind, count]) => make("option", { value: kind }, `${kind} (${whole.format(count)})`)),
);
get("finding").parentElement.hidden = !remarked;
get("sort").append(
  make("option", { value: "" }, "order of the dataset"),
  make("option", { value: "key" }, "key"),
  ...DATA.fields.filter((name) => name !== "key").map((name) => make("option", { value: name }, capital(name).toLowerCase())),
  ...(remarked ? [make("option", { value: "findings" }, "number of findings")] : []),
);
const controls = new Map([
  ["search", get("search")],
  ...filters.map((filter) => [filter.name, filter.control]),
  ["finding", get("finding")],
  ["sort", get("sort")],
  ["order", get("order")],
  ["per", get("per")],
]);
const usual = new Map([...controls].map(([name, control]) => [name, control.value]));

function matches(filter, value) {
  const wanted = filter.control.value.trim().toLowerCase();
  const low = text(value).toLowerCase();
  return wanted === "" || (filter.low.has(wanted) ? low === wanted : low.includes(wanted));
}

function apply() {
  const search = get("search").value.trim().toLowerCase();
  const finding = get("finding").value;
  found = scans.filter(
    (scan) =>
      scan.low.includes(search) &&
      filters.every((filter) => matches(filter, valueOf(scan, filter.name))) &&
      (finding === "" || (finding === "none" ? !scan.notes.length : scan.notes.some((note) => finding === "any" || note.kind === finding))),
  );
  const sort = get("sort").value;
  const sign = get("order").value === "down" ? -1 : 1;
  const of = { "": (scan) => scan.place, key: (scan) => scan.key, findings: (scan) => scan.notes.length }[sort] ?? ((scan) => valueOf(scan, sort));
  found.sort((a, b) => {
    const [x, y] = [of(a), of(b)];
    const missing = x === null || y === null; // they come last in either order
    return (missing ? 1 : sign) * compare(x, y) || a.place - b.place;
  });
  page = 0;
  draw();
  remember();
}

function reset() {
  for (const [name, control] of controls) control.value = usual.get(name);
  get("message").hidden = true;
  apply();
}

// --- the scans of a page --------------------------------------------------------------------------------------------

const perPage = () => (get("per").value === "all" ? Math.max(found.length, 1) : Number(get("per").value));

function picture(scan, alt) {
  const box = make("span", { class: "picture" });
  if (!scan.picture) {
    box.append(make("span", { class: "problem" }, `Cannot be shown: ${scan.problem}`));
    return box;
  }
  const image = make("img", { alt, loading: "lazy", src: `data:image/webp;base64,${scan.picture}`, width: scan.width, height: scan.height });
  const lines = document.createElementNS(SVG, "svg");
  lines.setAttribute("viewBox", `0 0 ${scan.width} ${scan.height}`);
  lines.setAttribute("aria-hidden", "true");
  for (const kind of ["halo", "outline"]) {
    scan.outlines.forEach((d, k) => {
      if (!d) return;
      const path = document.createElementNS(SVG, "path");
      path.setAttribute("class", `${kind} class-${k}`);
      path.setAttribute("d", d);
      lines.append(path);
    });
  }
  box.append(image, lines);
  return box;
}

function card(scan) {
  const values = DATA.filters.map((name) => [name, valueOf(scan, name)]).filter(([, value]) => value !== null && value !== scan.key);
  const about = values.map(([name, value]) => (/^[\d.]/.test(text(value)) ? `${name.replaceAll("_", " ")} ${text(value)}` : text(value)));
  const sort = get("sort").value;
  if (DATA.fields.includes(sort) && !DATA.filters.includes(sort)) about.push(`${sort.replaceAll("_", " ")} ${text(valueOf(scan, sort))}`);
  const tags = make("span", { class: "tags" });
  for (const kind of new Set(scan.notes.map((note) => note.kind))) {
    const grave = scan.notes.some((note) => note.kind === kind && note.grave);
    tags.append(tags.childNodes.length ? " · " : "", grave ? make("b", {}, kind) : kind);
  }
  const link = make("a", { class: "card", href: `#scan=${encodeURIComponent(scan.id)}` }, picture(scan, ""));
  link.append(make("span", { class: "key" }, scan.key), make("span", { class: "line2" }, about.join(" · ")), tags);
  link.dataset.id = scan.id;
  return make("li", {}, link);
}

function draw() {
  const per = perPage();
  const pages = Math.max(1, Math.ceil(found.length / per));
  page = Math.min(page, pages - 1);
  const part = found.slice(page * per, (page + 1) * per);
  get("scans").replaceChildren(...part.map(card));
  const all = found.length === scans.length ? `${whole.format(scans.length)} scans` : `${whole.format(found.length)} of ${whole.format(scans.length)} scans`;
  const which = pages > 1 ? `, ${whole.format(page * per + 1)} to ${whole.format(page * per + part.length)} on this page` : "";
  const chosen = [...controls].filter(([name, control]) => !["sort", "order", "per"].includes(name) && control.value !== usual.get(name));
  const by = chosen.map(([name, control]) => `${name.replaceAll("_", " ")} ${control.value}`).join(", ");
  get("count").textContent = all + (by ? ` (${by})` : "") + which;
  if (!found.length) get("count").textContent = `No scan fits (${by}). Change the filters, or reset them.`;
  for (const bar of document.querySelectorAll(".pages")) {
    bar.replaceChildren();
    if (pages === 1) continue;
    const step = (name, by) => {
      const button = make("button", { type: "button" }, name);
      button.disabled = page + by < 0 || page + by >= pages;
      button.addEventListener("click", () => turn(page + by));
      return button;
    };
    bar.append(step("← Previous page", -1), make("span", {}, `${page + 1} of ${pages}`), step("Next page →", 1));
  }
}

function turn(to) {
  page = to;
  draw();
  remember();
  get("scans").focus({ preventScroll: true });
  document.querySelector(".bar").scrollIntoView();
}

const cards = () => [...document.querySelectorAll("#scans .card")];

document.addEventListener("click", (event) => {
  const link = event.target.closest("a[data-id]");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  open(byId.get(link.dataset.id));
});

get("scans").addEventListener("keydown", (event) => {
  const all = cards();
  const here = all.indexOf(document.activeElement);
  if (here < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
  const top = all[0].getBoundingClientRect().top;
  const columns = all.findIndex((each) => each.getBoundingClientRect().top > top + 1);
  const row = columns < 0 ? all.length : columns;
  const to = { ArrowRight: here + 1, ArrowLeft: here - 1, ArrowDown: here + row, ArrowUp: here - row, Home: 0, End: all.length - 1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  all[to]?.focus();
});

// --- the large view -------------------------------------------------------------------------------------------------

function open(scan) {
  if (!found.includes(scan)) reset();
  shown = scan;
  const place = found.indexOf(scan);
  get("large-key").textContent = scan.key;
  get("large-place").textContent = `${whole.format(place + 1)} of ${whole.format(found.length)}`;
  get("large-picture").replaceChildren(picture(scan, `Scan ${scan.key}`));
  get("previous").disabled = place === 0;
  get("next").disabled = place === found.length - 1;
  get("large-values").replaceChildren(
    ...DATA.fields.flatMap((name) => [make("dt", {}, capital(name)), make("dd", {}, text(valueOf(scan, name)))]),
  );
  get("large-notes").replaceChildren(...scan.notes.map(remark));
  get("large-notes").hidden = !scan.notes.length;
  if (!get("large").open) get("large").showModal();
  remember();
}

function remark(note) {
  const line = make("li", note.grave ? { class: "grave" } : {}, make("strong", {}, (note.grave ? "Grave: " : "") + note.kind), note.text);
  const other = byId.get(note.other);
  if (other) {
    const link = make("a", { href: `#scan=${encodeURIComponent(other.id)}` }, `Show ${other.key}`);
    link.dataset.id = other.id;
    line.append(" ", link);
  }
  return line;
}

function move(to) {
  const scan = found[Math.max(0, Math.min(to, found.length - 1))];
  const button = document.activeElement;
  open(scan);
  if (button.disabled) get(button.id === "next" ? "previous" : "next").focus();
}

get("previous").addEventListener("click", () => move(found.indexOf(shown) - 1));
get("next").addEventListener("click", () => move(found.indexOf(shown) + 1));
get("close").addEventListener("click", () => get("large").close());
get("large").addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const here = found.indexOf(shown);
  const to = { ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: found.length - 1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  move(to);
});
get("large").addEventListener("close", () => {
  const scan = shown;
  shown = null;
  page = Math.floor(found.indexOf(scan) / perPage());
  draw();
  remember();
  cards().find((each) => each.dataset.id === scan.id)?.focus();
});

// --- links and outlines ---------------------------------------------------------------------------------------------

function remember() {
  const parts = new URLSearchParams();
  for (const [name, control] of controls) if (control.value !== usual.get(name)) parts.set(name, control.value);
  if (page) parts.set("page", page + 1);
  if (shown) parts.set("scan", shown.id);
  const hash = parts.toString();
  history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
}

function follow() {
  const parts = new URLSearchParams(location.hash.slice(1));
  if (location.hash === "#scans") return;
  const problems = [];
  for (const [name, control] of controls) {
    const value = parts.get(name) ?? usual.get(name);
    control.value = value;
    const filter = filters.find((each) => each.name === name);
    const valid = control.tagName === "SELECT" ? [...control.options].map((option) => option.value).filter(Boolean) : filter?.values;
    const wrong = control.tagName === "SELECT" ? control.value !== value : filter && value && !filter.values.some((each) => each.toLowerCase().includes(value.toLowerCase()));
    if (!wrong) continue;
    control.value = usual.get(name);
    const some = valid.slice(0, 12).join(", ") + (valid.length > 12 ? " …" : "");
    problems.push(`The link asks for ${name} ${value}, which no scan here has; there are: ${some}. It is left out.`);
  }
  for (const name of parts.keys()) {
    if (!controls.has(name) && !["page", "scan"].includes(name)) problems.push(`The link has an unknown filter ${name}; there are: ${[...controls.keys()].join(", ")}.`);
  }
  const wanted = parts.get("scan");
  const number = Number(parts.get("page") ?? 1);
  shown = null;
  apply();
  if (number > 1) {
    page = number - 1;
    draw();
  }
  if (wanted !== null && !byId.has(wanted)) problems.push(`There is no scan ${wanted} here. Search by a part of its key.`);
  get("message").textContent = problems.join(" ");
  get("message").hidden = !problems.length;
  if (byId.has(wanted)) open(byId.get(wanted));
  else if (get("large").open) get("large").close();
}

for (const control of controls.values()) control.addEventListener("input", apply);
get("controls").addEventListener("submit", (event) => event.preventDefault());
get("reset").addEventListener("click", (event) => {
  event.preventDefault();
  reset();
});
document.addEventListener("change", (event) => {
  const k = event.target.dataset.class;
  if (k === undefined) return;
  for (const box of document.querySelectorAll(`[data-class="${k}"]`)) box.checked = event.target.checked;
  document.documentElement.classList.toggle(`without-${k}`, !event.target.checked);
});
window.addEventListener("hashchange", follow);
window.addEventListener("beforeprint", () => {
  for (const image of document.querySelectorAll("#scans img")) image.loading = "eager";
});
follow();
