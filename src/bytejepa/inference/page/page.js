"use strict";
// Offsets are byte positions in the text. A cell is the width of one monospaced character; a row is what fits the width.
const about = JSON.parse(document.getElementById("about").textContent);
const byId = (id) => document.getElementById(id);
const LEVELS = [0.5, 1, 2, 3, 4, 5, 6, 8];
const ROW = 24, TALLEST = 8e6, ALTERNATIVES = 5; // browsers cap the height of an element; beyond TALLEST the scroll bar is scaled
const view = byId("view"), rowsBox = byId("rows"), space = byId("space"), tip = byId("tip");
let text, kinds, bits, alternatives, probabilities, prefix, lineStart, rowStart, rowLine;
let cursor = 0, cellWidth = 8, gutterWidth = 0, drawn = new Map();
let ownScroll = false; // the next scroll event comes from this program, not from the reader

async function unpack(name) {
  const node = byId("array-" + name), binary = atob(node.textContent.trim());
  const packed = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) packed[i] = binary.charCodeAt(i);
  node.remove();
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

const level = (value) => { let i = 0; while (i < LEVELS.length && value >= LEVELS[i]) i++; return i; };
const lengthAt = (offset) => (kinds[offset] === 5 ? 1 : kinds[offset]);
const costAt = (offset) => prefix[offset + lengthAt(offset)] - prefix[offset];
const hex = (byte) => byte.toString(16).padStart(2, "0");

function codePoint(o) {
  const a = text[o];
  if (kinds[o] === 2) return ((a & 31) << 6) | (text[o + 1] & 63);
  if (kinds[o] === 3) return ((a & 15) << 12) | ((text[o + 1] & 63) << 6) | (text[o + 2] & 63);
  if (kinds[o] === 4) return ((a & 7) << 18) | ((text[o + 1] & 63) << 12) | ((text[o + 2] & 63) << 6) | (text[o + 3] & 63);
  return a;
}

// East Asian wide and emoji ranges, roughly: such characters take two cells
const isWide = (c) => c >= 0x1100 && (c <= 0x115f || (c >= 0x2e80 && c <= 0xa4cf) || (c >= 0xac00 && c <= 0xd7a3) ||
  (c >= 0xf900 && c <= 0xfaff) || (c >= 0xfe30 && c <= 0xfe6f) || (c >= 0xff00 && c <= 0xff60) || (c >= 0x1f300 && c <= 0x1faff) || c >= 0x20000);

// [what is shown, cells, whether it stands for something invisible]
function glyph(o) {
  const a = text[o], kind = kinds[o];
  if (kind === 5) return ["\\x" + hex(a), 4, true];
  if (kind === 1) {
    if (a === 10) return ["⏎", 1, true];
    if (a === 9) return ["⇥", 4, true];
    if (a < 32 || a === 127) return ["\\x" + hex(a), 4, true];
    return [String.fromCharCode(a), 1, false];
  }
  const c = codePoint(o);
  return [String.fromCodePoint(c), isWide(c) ? 2 : 1, false];
}

function findLines() {
  const starts = [0];
  for (let i = 0; i < text.length - 1; i++) if (text[i] === 10) starts.push(i + 1);
  lineStart = Uint32Array.from([...starts.keys()], (i) => starts[i]);
}

function layOut() {
  // the gutter holds line number, bits and bits per byte; the last goes where there is no room
  const narrow = matchMedia("(max-width: 820px)").matches;
  const digits = String(lineStart.length).length;
  gutterWidth = narrow ? 24 + 7 * (digits + 7) : 40 + 7 * (digits + 8 + 6);
  view.style.setProperty("--gutter", gutterWidth + "px");
  const probe = document.createElement("span");
  probe.style.cssText = "position:absolute;visibility:hidden;font:14px var(--mono)";
  probe.textContent = "0".repeat(100);
  view.append(probe);
  cellWidth = probe.getBoundingClientRect().width / 100;
  probe.remove();
  const columns = Math.max(8, Math.floor((view.clientWidth - gutterWidth - 16) / cellWidth));
  const starts = [], lines = [];
  let line = -1, cells = 0, afterSpace = 0, cellsAtSpace = 0;
  const begin = (o) => { starts.push(o); lines.push(line); };
  for (let o = 0; o < text.length; o += lengthAt(o)) {
    if (line + 1 < lineStart.length && o === lineStart[line + 1]) { line++; begin(o); cells = 0; afterSpace = o; }
    const width = glyph(o)[1], a = text[o];
    if (cells + width > columns && a !== 10) {
      // break after the last blank of this row, or here if there is none
      const from = afterSpace > starts[starts.length - 1] ? afterSpace : o;
      cells = from === o ? 0 : cells - cellsAtSpace;
      begin(from); afterSpace = from;
    }
    cells += width;
    if (a === 32 || a === 9) { afterSpace = o + 1; cellsAtSpace = cells; }
  }
  rowStart = Uint32Array.from(starts); rowLine = Uint32Array.from(lines);
  drawn = new Map();
  space.style.height = Math.min(TALLEST, rowStart.length * ROW) + "px";
}

const totalHeight = () => rowStart.length * ROW;
// where the top of the view is, in pixels of the uncapped height
function virtualTop() {
  const total = totalHeight(), room = view.clientHeight;
  return total <= TALLEST ? view.scrollTop : (view.scrollTop / (TALLEST - room)) * (total - room);
}
function scrollToVirtual(top) {
  const total = totalHeight(), room = view.clientHeight, before = view.scrollTop;
  view.scrollTop = total <= TALLEST ? top : (top / (total - room)) * (TALLEST - room);
  ownScroll = view.scrollTop !== before;
}

function last(sorted, value) { // index of the last element that is at most `value`
  let low = 0, high = sorted.length;
  while (high - low > 1) { const middle = (low + high) >> 1; if (sorted[middle] <= value) low = middle; else high = middle; }
  return low;
}
const rowOf = (offset) => last(rowStart, offset);
const rowEnd = (row) => (row + 1 < rowStart.length ? rowStart[row + 1] : text.length);
const number = (value, digits) => value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });

function element(tag, className, content) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (content !== undefined) node.textContent = content;
  return node;
}

function buildRow(row) {
  const box = element("div", "row"), gutter = element("div", "gutter"), cells = element("div", "cells");
  const line = rowLine[row];
  if (lineStart[line] === rowStart[row]) {
    const end = line + 1 < lineStart.length ? lineStart[line + 1] : text.length;
    const total = prefix[end] - prefix[lineStart[line]];
    gutter.append(element("b", "", line + 1), element("b", "", number(total, total < 99.95 ? 1 : 0) + " b"), element("b", "", number(total / (end - lineStart[line]), 2)));
    gutter.title = `line ${line + 1}: ${number(total, 1)} bits for ${end - lineStart[line]} bytes, ${number(total / (end - lineStart[line]), 3)} bits a byte`;
  }
  for (let o = rowStart[row]; o < rowEnd(row); o += lengthAt(o)) {
    const [shown, width, stands] = glyph(o);
    const cell = element("span", "s" + level(costAt(o)) + (stands ? " mark" : "") + (o === cursor ? " cursor" : ""), shown);
    cell.dataset.offset = o;
    if (width > 1 || text[o] > 127) cell.style.width = width * cellWidth + "px";
    cells.append(cell);
  }
  box.append(gutter, cells);
  return box;
}

function draw() {
  if (!rowStart.length) { rowsBox.replaceChildren(element("p", "hint", "The file is empty: there is nothing to score.")); return; }
  const top = virtualTop(), first = Math.max(0, Math.floor(top / ROW) - 4);
  const end = Math.min(rowStart.length, Math.ceil((top + view.clientHeight) / ROW) + 4);
  const kept = new Map();
  for (let row = first; row < end; row++) kept.set(row, drawn.get(row) ?? buildRow(row));
  drawn = kept;
  rowsBox.replaceChildren(...kept.values());
  rowsBox.style.transform = `translateY(${view.scrollTop + first * ROW - top}px)`;
  drawCurve();
}

const cellOf = (offset) => rowsBox.querySelector(`[data-offset="${offset}"]`);

function moveCursor(offset, show) {
  cellOf(cursor)?.classList.remove("cursor");
  while (offset > 0 && kinds[offset] === 0) offset--;
  cursor = Math.max(0, Math.min(offset, text.length - 1));
  const row = rowOf(cursor), top = virtualTop(), room = view.clientHeight;
  if (row * ROW < top || (row + 1) * ROW > top + room) scrollToVirtual(Math.max(0, row * ROW - room / 2));
  drawn.delete(row);
  draw();
  if (show) {
    const cell = cellOf(cursor);
    showTip(cursor, cell.getBoundingClientRect());
    byId("spoken").textContent = tip.innerText;
  }
}

function byteName(byte) {
  const names = new Map([[32, "space"], [10, "⏎ line feed"], [9, "⇥ tab"], [13, "return"]]);
  return names.get(byte) ?? (byte > 32 && byte < 127 ? String.fromCharCode(byte) : "0x" + hex(byte));
}
const percent = (p) => (p >= 0.1 ? (100 * p).toFixed(1) : p >= 0.001 ? (100 * p).toFixed(2) : p > 0 ? "<0.1" : "0") + " %";

function showTip(offset, at) {
  const length = lengthAt(offset), shown = glyph(offset)[0], single = kinds[offset] === 1;
  const title = kinds[offset] === 5 ? "0x" + hex(text[offset]) + ", not valid UTF-8" : single ? byteName(text[offset]) : `${shown}  U+${codePoint(offset).toString(16).toUpperCase().padStart(4, "0")}`;
  const tables = element("div", "bytes");
  for (let o = offset; o < offset + length; o++) {
    const cost = prefix[o + 1] - prefix[o], table = element("table"), likelihood = 2 ** -cost;
    table.append(element("caption", "", `byte 0x${hex(text[o])}: ${number(cost, 2)} bits (${likelihood < 1e-3 ? likelihood.toExponential(1) : percent(likelihood)})`));
    for (let rank = 0; rank < ALTERNATIVES; rank++) {
      const other = alternatives[ALTERNATIVES * o + rank], p = probabilities[ALTERNATIVES * o + rank] / 65535;
      const line = element("tr", other === text[o] ? "seen" : ""), bar = element("td");
      bar.append(element("i"));
      bar.firstChild.style.width = Math.max(1, 90 * p) + "px";
      line.append(element("td", "", byteName(other)), element("td", "", percent(p)), bar);
      table.append(line);
    }
    tables.append(table);
  }
  tip.replaceChildren(element("h3", "", `${title}: ${number(costAt(offset), 2)} bits`), tables,
    element("p", "hint", `offset ${number(offset, 0)}, line ${number(last(lineStart, offset) + 1, 0)}, running bpb ${number(prefix[offset + length] / (offset + length), 3)}`));
  tip.hidden = false;
  tip.style.left = "0"; // its width is what it takes where there is room
  const box = tip.getBoundingClientRect();
  const below = at.bottom + 8 + box.height < innerHeight;
  tip.style.left = Math.max(6, Math.min(at.left, innerWidth - box.width - 8)) + "px";
  tip.style.top = Math.max(6, below ? at.bottom + 8 : at.top - box.height - 8) + "px";
}

function drawCurve() {
  const canvas = byId("curve"), scale = devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
  canvas.width = width * scale; canvas.height = height * scale;
  const pen = canvas.getContext("2d"), style = getComputedStyle(document.documentElement), n = text.length;
  const colour = (name) => style.getPropertyValue(name).trim();
  pen.scale(scale, scale);
  if (!n) return;
  const left = 34, bottom = height - 14, plot = width - left, columns = Math.max(1, Math.min(Math.floor(plot), n));
  const local = Array.from({ length: columns }, (_, i) => {
    const from = Math.floor((i * n) / columns), to = Math.max(from + 1, Math.floor(((i + 1) * n) / columns));
    return [from, to, (prefix[to] - prefix[from]) / (to - from)];
  });
  // the rare peaks are cut off, so that the rest can be read
  const sorted = local.map((bin) => bin[2]).sort((a, b) => a - b);
  const top = Math.max(1, sorted[Math.floor(0.98 * (columns - 1))] * 1.25, 1.2 * prefix[n] / n);
  const y = (value) => bottom - (bottom - 6) * Math.min(1, value / top), x = (offset) => left + (plot * offset) / n;
  const visible = rowStart.length ? [rowStart[Math.min(rowStart.length - 1, Math.floor(virtualTop() / ROW))], rowEnd(Math.min(rowStart.length - 1, Math.floor((virtualTop() + view.clientHeight) / ROW)))] : [0, 0];
  pen.fillStyle = colour("--line"); pen.globalAlpha = 0.55;
  pen.fillRect(x(visible[0]), 0, Math.max(2, x(visible[1]) - x(visible[0])), bottom);
  pen.globalAlpha = 1; pen.fillStyle = colour("--local");
  for (const [from, to, value] of local) pen.fillRect(x(from), y(value), Math.max(1, x(to) - x(from)), bottom - y(value));
  pen.strokeStyle = colour("--running"); pen.lineWidth = 1.8; pen.beginPath();
  for (const [, to] of local) pen.lineTo(x(to), y(prefix[to] / to));
  pen.stroke();
  pen.fillStyle = colour("--faint"); pen.font = "11px system-ui, sans-serif"; pen.textAlign = "right";
  pen.fillText(number(top, 1), left - 5, 12); pen.fillText("0", left - 5, bottom);
  pen.textAlign = "left"; pen.fillText("byte 0", left, height - 2);
  pen.textAlign = "right"; pen.fillText(number(n, 0), width, height - 2);
}

function listSpots() {
  const list = byId("spots").querySelector("ol");
  for (const offset of about.spots) {
    let start = offset, before = "", after = "";
    while (start > 0 && kinds[start] === 0) start--;
    let from = Math.max(0, start - 12);
    while (from < start && kinds[from] === 0) from++;
    for (let o = from; o < start; o += lengthAt(o)) before += glyph(o)[0];
    for (let o = start + lengthAt(start); o < Math.min(text.length, start + 28); o += lengthAt(o)) after += glyph(o)[0];
    const item = element("li"), button = element("button"), context = element("span", "", before), cost = prefix[offset + 1] - prefix[offset];
    button.type = "button";
    button.title = `offset ${number(offset, 0)}`;
    context.append(element("mark", "s" + level(cost), glyph(start)[0]), after);
    button.append(element("b", "", number(cost, 1)), context);
    button.addEventListener("click", () => { moveCursor(start, false); view.focus({ preventScroll: true }); moveCursor(start, true); });
    item.append(button);
    list.append(item);
  }
}

function showTotals() {
  byId("subtitle").textContent = `${about.model} · windows of ${number(about.window, 0)} bytes, stride ${number(about.stride, 0)}`;
  const entries = [["bits a byte (bpb)", about.numBytes ? number(about.totalBits / about.numBytes, 4) : "–"], ["bytes", number(about.numBytes, 0)], ["bits", number(about.totalBits, 0)], ["of 8 bits a byte", about.numBytes ? number(about.totalBits / about.numBytes / 0.08, 1) + " %" : "–"]];
  for (const [name, value] of entries) {
    const box = element("div");
    box.append(element("dt", "", name), element("dd", "", value));
    byId("totals").append(box);
  }
  [0, ...LEVELS].forEach((from, i) => byId("legend").append(element("i", "s" + i, i === LEVELS.length ? from + "+" : from)));
  byId("curve").setAttribute("aria-label", `Bits a byte along the text; the running value ends at ${about.numBytes ? number(about.totalBits / about.numBytes, 4) : "nothing"}.`);
}

function onKey(event) {
  if (event.altKey || event.metaKey || !text.length) return;
  const row = rowOf(cursor), page = Math.max(1, Math.floor(view.clientHeight / ROW) - 1);
  const sameColumn = (other) => {
    const target = Math.max(0, Math.min(rowStart.length - 1, other));
    return Math.min(rowStart[target] + cursor - rowStart[row], rowEnd(target) - 1);
  };
  const inOrder = [...about.spots].sort((a, b) => a - b);
  const moves = {
    ArrowLeft: () => cursor - 1, ArrowRight: () => cursor + lengthAt(cursor),
    ArrowUp: () => sameColumn(row - 1), ArrowDown: () => sameColumn(row + 1),
    PageUp: () => sameColumn(row - page), PageDown: () => sameColumn(row + page),
    Home: () => (event.ctrlKey ? 0 : rowStart[row]), End: () => (event.ctrlKey ? text.length - 1 : rowEnd(row) - 1),
    n: () => inOrder.find((offset) => offset >= cursor + lengthAt(cursor)) ?? cursor,
    p: () => inOrder.findLast((offset) => offset < cursor) ?? cursor,
  };
  if (event.key === "Escape") tip.hidden = true;
  if (!(event.key in moves)) return;
  event.preventDefault();
  moveCursor(moves[event.key](), true);
}

function listen() {
  let waiting = false;
  view.addEventListener("scroll", () => {
    if (!ownScroll) tip.hidden = true;
    ownScroll = false;
    if (!waiting) { waiting = true; requestAnimationFrame(() => { waiting = false; draw(); }); }
  });
  view.addEventListener("mouseover", (event) => {
    const offset = event.target.dataset?.offset;
    if (offset === undefined) tip.hidden = true;
    else showTip(Number(offset), event.target.getBoundingClientRect());
  });
  view.addEventListener("mouseleave", () => { tip.hidden = true; });
  view.addEventListener("click", (event) => { if (event.target.dataset?.offset !== undefined) moveCursor(Number(event.target.dataset.offset), true); });
  view.addEventListener("keydown", onKey);
  byId("curve").addEventListener("click", (event) => {
    const box = event.currentTarget.getBoundingClientRect();
    const share = Math.max(0, (event.clientX - box.left - 34) / (box.width - 34));
    if (text.length) moveCursor(Math.min(text.length - 1, Math.floor(share * text.length)), false);
  });
  let width = view.clientWidth;
  new ResizeObserver(() => {
    if (view.clientWidth === width) { draw(); return; }
    const kept = rowStart.length ? rowStart[Math.min(rowStart.length - 1, Math.floor(virtualTop() / ROW))] : 0;
    width = view.clientWidth;
    layOut();
    if (rowStart.length) scrollToVirtual(rowOf(kept) * ROW);
    draw();
  }).observe(view);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawCurve);
}

async function begin() {
  if (matchMedia("(max-width: 820px)").matches) byId("spots").open = false;
  showTotals();
  text = new Uint8Array(await unpack("text"));
  kinds = new Uint8Array(await unpack("kinds"));
  bits = new Uint16Array(await unpack("bits"));
  alternatives = new Uint8Array(await unpack("alternatives"));
  probabilities = new Uint16Array(await unpack("probabilities"));
  prefix = new Float64Array(text.length + 1);
  for (let i = 0; i < text.length; i++) prefix[i + 1] = prefix[i] + bits[i] / about.bitsScale;
  findLines();
  layOut();
  byId("loading").remove();
  listSpots();
  listen();
  draw();
  const spot = /^#byte-(\d+)$/.exec(location.hash);
  if (spot && text.length) moveCursor(Number(spot[1]), true);
  document.documentElement.dataset.ready = "true";
}
begin().catch((problem) => { view.textContent = "This page could not be drawn: " + problem; });
