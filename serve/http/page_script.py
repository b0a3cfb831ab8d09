"""What the page does: ask, show the answer, show the same request for a shell.

Everything that comes from an answer is put on the page as text, never as markup.
"""

from __future__ import annotations

from typing import Final

from serve.http.page_drawing import DRAWING

_ASKING: Final = r"""
const $ = (id) => document.getElementById(id);
const canvas = $("canvas"), pen = canvas.getContext("2d");
const ready = document.body.dataset.ready === "true";
let picture = null, file = null, objects = [], active = -1, drag = null;

const takes = () => $("task").selectedOptions[0].dataset.takes;
const region = () => $("region").value.split(/[\s,;]+/).filter(Boolean).map(Number);
const isBox = (box) => box.length === 4 && box.every(Number.isFinite);
const names = [];
function hue(name) {
  if (!names.includes(name)) names.push(name);
  return (names.indexOf(name) * 137.5 + 10) % 360;
}

function settings() {
  const wanted = { task_prompt: $("task").value };
  if (takes().includes("text") && $("text").value.trim()) wanted.text = $("text").value.trim();
  // What is no box goes as it was typed, so that the app can say what is wrong with it.
  const box = isBox(region()) ? region() : $("region").value.trim();
  if (takes() === "region" && box) wanted.regions = [box];
  const more = JSON.parse($("more").value.trim() || "{}");
  if (more === null || typeof more !== "object" || Array.isArray(more)) throw new TypeError("more");
  return Object.assign(wanted, more);
}

function say(text, bad = false) {
  $("message").textContent = text;
  $("message").className = bad ? "bad" : "";
}

function refresh() {
  $("text-row").hidden = !takes().includes("text");
  $("text").required = takes() === "text";
  $("region-row").hidden = takes() !== "region";
  $("region").required = takes() === "region";
  $("summary").textContent = $("task").selectedOptions[0].dataset.summary;
  canvas.style.touchAction = takes() === "region" ? "none" : "auto";
  let wanted = null;
  try { wanted = settings(); } catch { wanted = { task_prompt: $("task").value }; }
  const state = JSON.stringify({ settings: wanted }).replaceAll("'", "'\\''");
  const url = new URL("inference_image", location.href);
  $("curl").textContent = `curl -F files=@image.jpg --form-string 'state=${state}' ${url}`;
  draw();
}

async function choose(chosen) {
  if (!chosen) return;
  file = chosen;
  clear();
  const opened = await createImageBitmap(chosen, { imageOrientation: "from-image" })
    .catch(() => null);
  if (file !== chosen) return;
  picture = opened;
  if (!picture) say("This browser cannot show the file; asking about it may work.");
  $("hint").hidden = picture !== null;
  canvas.width = picture ? picture.width : 0;
  canvas.height = picture ? picture.height : 0;
  canvas.setAttribute("aria-label", picture ? `The image ${chosen.name}` : "No image to show");
  draw();
}

function clear() {
  objects = []; active = -1; names.length = 0;
  $("objects").hidden = $("raw").hidden = true;
  $("tags").replaceChildren();
  say("");
}

function confidence(thing) {
  const tag = (thing.tags || []).find((t) => t.name === "confidence");
  return tag && typeof tag.value === "number" ? tag.value : null;
}

function cell(text) {
  const td = document.createElement("td");
  td.textContent = text;
  return td;
}

function row(thing, i) {
  const tr = document.createElement("tr"), score = confidence(thing);
  const notes = (thing.tags || []).filter((t) => t.name !== "confidence").map((t) => t.value);
  tr.append(cell([thing.classTitle, ...notes].filter(Boolean).join(": ")));
  tr.append(cell(thing.geometryType), cell(score === null ? "unknown" : score.toFixed(3)));
  const dot = document.createElement("span");
  dot.className = "dot";
  dot.style.background = `hsl(${hue(thing.classTitle)} 90% 50%)`;
  tr.firstChild.prepend(dot);
  tr.tabIndex = 0;
  const mark = (index) => () => { active = index; draw(); };
  tr.onmouseenter = tr.onfocus = mark(i);
  tr.onmouseleave = tr.onblur = mark(-1);
  return tr;
}

function show(answer, seconds) {
  const annotation = answer.annotation;
  objects = annotation.objects;
  $("objects").tBodies[0].replaceChildren(...objects.map(row));
  $("objects").hidden = objects.length === 0;
  $("tags").replaceChildren(...(annotation.tags || []).map((tag) => {
    const p = document.createElement("p"), name = document.createElement("b");
    name.textContent = tag.name;
    p.append(name, String(tag.value ?? ""));
    return p;
  }));
  $("raw").hidden = false;
  $("raw").lastElementChild.textContent = JSON.stringify(answer, null, 2);
  const found = objects.length === 1 ? "1 object" : `${objects.length} objects`;
  canvas.setAttribute("aria-label", `The image with ${found}; they are listed below`);
  const words = objects.length || !annotation.tags?.length ? found : "Answered";
  const notes = (answer.notes || []).map((note) => ` Note: ${note}.`).join("");
  say(`${words} in ${seconds.toFixed(1)} s.${notes}`);
  draw();
}

async function ask(event) {
  event.preventDefault();
  clear();
  if (!file) return say("Choose an image first.", true);
  const asked = file, body = new FormData();
  body.append("files", asked);
  try { body.append("state", JSON.stringify({ settings: settings() })); }
  catch { return say("More settings must be a JSON object; correct them.", true); }
  $("run").disabled = true;
  say("Asking…");
  const start = performance.now();
  try {
    const response = await fetch("inference_image", { method: "POST", body });
    const answer = await response.json();
    const seconds = (performance.now() - start) / 1000;
    const masked = (answer.annotation?.objects || []).filter((thing) => thing.bitmap);
    await Promise.all(masked.map(async (thing) => { thing.mask = await readMask(thing); }));
    // The answer is about the image it was asked for, and another may be shown by now.
    if (file !== asked) return;
    if (response.ok) show(answer, seconds);
    else say(answer.message || answer.detail || `Status ${response.status}.`, true);
  } catch (error) { say(`The app did not answer: ${error.message}.`, true); }
  finally { $("run").disabled = false; }
}

async function showSettings() {
  if (!$("settings").open) return;
  const shown = $("settings").lastElementChild;
  try {
    const response = await fetch("get_custom_inference_settings", { method: "POST" });
    const answer = await response.json();
    shown.textContent = response.ok ? answer.settings : answer.message;
  } catch (error) { shown.textContent = `The app did not answer: ${error.message}.`; }
}

function place(event) {
  const box = canvas.getBoundingClientRect(), scale = canvas.width / box.width;
  const inside = (value, most) => Math.round(Math.max(0, Math.min(value * scale, most)));
  return [inside(event.clientX - box.left, canvas.width),
          inside(event.clientY - box.top, canvas.height)];
}

canvas.onpointerdown = (event) => {
  if (!picture || takes() !== "region") return;
  canvas.setPointerCapture(event.pointerId);
  drag = [...place(event), ...place(event)];
};
canvas.onpointermove = (event) => {
  if (!drag) return;
  drag = [drag[0], drag[1], ...place(event)];
  draw();
};
canvas.onpointerup = () => {
  if (!drag) return;
  const [x1, y1, x2, y2] = drag;
  drag = null;
  const box = [Math.min(x1, x2), Math.min(y1, y2), Math.max(x1, x2), Math.max(y1, y2)];
  // A click is no box; it leaves the one before.
  if (box[0] < box[2] && box[1] < box[3]) $("region").value = box.join(", ");
  refresh();
};
canvas.onpointercancel = () => { drag = null; draw(); };
const stage = $("stage");
stage.ondragover = (event) => { event.preventDefault(); stage.classList.add("over"); };
stage.ondragleave = () => stage.classList.remove("over");
stage.ondrop = (event) => {
  event.preventDefault();
  stage.classList.remove("over");
  const dropped = event.dataTransfer.files;
  if (dropped.length) { $("file").files = dropped; choose(dropped[0]); }
};
$("form").onsubmit = ask;
$("form").oninput = refresh;
$("file").onchange = () => choose($("file").files[0]);
$("settings").ontoggle = showSettings;
window.onresize = draw;
refresh();
choose($("file").files[0]);

async function waitForModel() {
  const response = await fetch("is_ready").catch(() => null);
  if (response && response.ok) location.reload();
  else setTimeout(waitForModel, 3000);
}
if (!ready) {
  $("run").disabled = true;
  setTimeout(waitForModel, 3000);
}
"""

SCRIPT: Final = f'\n"use strict";{_ASKING}\n{DRAWING}'
