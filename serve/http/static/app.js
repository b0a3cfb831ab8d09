// The page of GET /: ask about an image, show the answer, show the same request for a shell.
//
// Whatever comes from the app, from a file or from a field is put on the page as text, never as
// markup.

const $ = (id) => document.getElementById(id);
const canvas = $("canvas"), brush = canvas.getContext("2d");
const RETRY_MS = 3000;
const INPUTS = {
  "nothing": "",
  "text": "a text",
  "region": "a region",
  "text or nothing": "a text, if you like",
};

let tasks = [];
let file = null, image = null;  // What is asked about, and as it is shown: null if it cannot be.
let objects = [], highlighted = -1;  // The answer's, with their masks decoded.
let draggedBox = null;
let isReady = false, isAsking = false;

// Text on the page

function element(name, text = "", className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  made.className = className;
  return made;
}

function row(...cells) {
  const tr = document.createElement("tr");
  for (const cell of cells) {
    const td = document.createElement("td");
    td.append(cell);
    tr.append(td);
  }
  return tr;
}

function say(text, isError = false) {
  $("message").textContent = text;
  $("message").className = isError ? "bad" : "";
}

function showButton() {
  $("ask").disabled = !isReady || isAsking;
}

// The app's routes

async function call(path, options = { method: "POST" }) {
  let response, answer;
  try {
    response = await fetch(path, options);
    answer = await response.json();
  } catch (error) {
    throw new Error(`The app did not answer: ${error.message}.`);
  }
  if (response.ok) return answer;
  const message = answer.message || answer.detail || `Status ${response.status}.`;
  throw Object.assign(new Error(message), { code: answer.code });
}

async function showTasks() {
  const answer = await call("tasks", { method: "GET" });
  tasks = answer.tasks;
  $("version").textContent = answer.version;
  $("task").replaceChildren(...tasks.map((task) => {
    const isChosen = task.token === "<OD>";
    return new Option(task.name.replaceAll("_", " "), task.token, isChosen, isChosen);
  }));
  $("tasks").tBodies[0].replaceChildren(...tasks.map((task) =>
    row(element("code", task.token), INPUTS[task.takes] ?? task.takes, task.summary)));
}

async function showModel() {
  let info;
  try {
    info = await call("get_session_info");
  } catch (error) {
    $("state").textContent =
      error.code === "not_deployed" ? "No model is loaded yet" : error.message;
    setTimeout(showModel, RETRY_MS);
    return;
  }
  $("model").textContent = info.model_name;
  $("state").textContent = "Ready";
  $("state").className = "chip ready";
  const facts = [info.device, info.precision.toLowerCase(), info.runtime];
  $("facts").replaceChildren(...facts.map((fact) => element("span", fact, "chip")));
  $("warning").textContent = info.device_warning ?? "";
  $("warning").hidden = !info.device_warning;
  $("notes").replaceChildren(...info.notes.map((note) => element("p", `Note: ${note}`)));
  isReady = true;
  showButton();
}

async function showSettings() {
  if (!$("settings").open) return;
  const shown = $("settings").lastElementChild;
  try {
    shown.textContent = (await call("get_custom_inference_settings")).settings;
  } catch (error) {
    shown.textContent = error.message;
  }
}

// The question

const task = () => tasks.find((one) => one.token === $("task").value);
const takesRegion = () => task()?.takes === "region";
const region = () => $("region").value.split(/[\s,;]+/).filter(Boolean).map(Number);
const isBox = (box) => box.length === 4 && box.every(Number.isFinite);

function settings() {
  const asked = { task_prompt: $("task").value };
  const text = $("text").value.trim();
  if (task().takes.includes("text") && text) asked.text = text;
  // What is no box goes as it was typed, so that the app can say what is wrong with it.
  const box = isBox(region()) ? region() : $("region").value.trim();
  if (takesRegion() && box) asked.regions = [box];
  const more = JSON.parse($("more").value.trim() || "{}");
  if (more === null || typeof more !== "object" || Array.isArray(more)) throw new TypeError("more");
  return Object.assign(asked, more);
}

function showForm() {
  const takes = task().takes;
  $("text-row").hidden = !takes.includes("text");
  $("text").required = takes === "text";
  $("region-row").hidden = takes !== "region";
  $("region").required = takes === "region";
  $("summary").textContent = task().summary;
  canvas.style.touchAction = takes === "region" ? "none" : "auto";
  let asked = { task_prompt: $("task").value };
  try {
    asked = settings();
  } catch {
    // Asking says so; the command shows what can be understood.
  }
  const state = JSON.stringify({ settings: asked }).replaceAll("'", "'\\''");
  const url = new URL("inference_image", location.href);
  $("curl").textContent = `curl -F files=@image.jpg --form-string 'state=${state}' ${url}`;
  draw();
}

async function chooseFile(chosen) {
  if (!chosen) return;
  file = chosen;
  clearAnswer();
  const opened = await createImageBitmap(chosen, { imageOrientation: "from-image" })
    .catch(() => null);
  if (file !== chosen) return;
  image = opened;
  if (!image) say("This browser cannot show the file; asking about it may work.");
  $("hint").hidden = image !== null;
  canvas.width = image ? image.width : 0;
  canvas.height = image ? image.height : 0;
  canvas.setAttribute("aria-label", image ? `The image ${chosen.name}` : "No image to show");
  draw();
}

async function ask(event) {
  event.preventDefault();
  clearAnswer();
  if (!file) return say("Choose an image first.", true);
  const asked = file, body = new FormData();
  body.append("files", asked);
  try {
    body.append("state", JSON.stringify({ settings: settings() }));
  } catch {
    return say("More settings must be a JSON object; correct them.", true);
  }
  isAsking = true;
  showButton();
  say("Asking…");
  const start = performance.now();
  try {
    const answer = await call("inference_image", { method: "POST", body });
    const seconds = (performance.now() - start) / 1000;
    await Promise.all(answer.annotation.objects.map(async (object) => {
      if (object.bitmap) masks.set(object, await readMask(object.bitmap));
    }));
    // The answer is about the image it was asked for, and another may be shown by now.
    if (file === asked) showAnswer(answer, seconds);
  } catch (error) {
    if (file === asked) say(error.message, true);
  } finally {
    isAsking = false;
    showButton();
  }
}

// The answer

function clearAnswer() {
  objects = [];
  highlighted = -1;
  hues.clear();
  $("objects").hidden = $("raw").hidden = true;
  $("tags").replaceChildren();
  say("");
  draw();
}

function confidence(object) {
  const tag = (object.tags || []).find((one) => one.name === "confidence");
  return typeof tag?.value === "number" ? tag.value : null;
}

function objectRow(object, index) {
  const score = confidence(object);
  const texts = (object.tags || []).filter((tag) => tag.name !== "confidence")
    .map((tag) => tag.value);
  const tr = row(
    [object.classTitle, ...texts].filter(Boolean).join(": "),
    object.geometryType,
    score === null ? "unknown" : score.toFixed(3),
  );
  const dot = element("span", "", "dot");
  dot.style.background = `hsl(${hue(object.classTitle)} 90% 50%)`;
  tr.firstChild.prepend(dot);
  tr.tabIndex = 0;
  const highlight = (which) => () => { highlighted = which; draw(); };
  tr.onmouseenter = tr.onfocus = highlight(index);
  tr.onmouseleave = tr.onblur = highlight(-1);
  return tr;
}

function showAnswer(answer, seconds) {
  const tags = answer.annotation.tags || [];
  objects = answer.annotation.objects;
  $("objects").tBodies[0].replaceChildren(...objects.map(objectRow));
  $("objects").hidden = objects.length === 0;
  $("tags").replaceChildren(...tags.map((tag) => {
    const p = document.createElement("p");
    p.append(element("b", tag.name), String(tag.value ?? ""));
    return p;
  }));
  $("raw").hidden = false;
  $("raw").lastElementChild.textContent = JSON.stringify(answer, null, 2);
  const found = objects.length === 1 ? "1 object" : `${objects.length} objects`;
  canvas.setAttribute("aria-label", `The image with ${found}; they are listed below`);
  const result = objects.length || !tags.length ? found : "Answered";
  const notes = (answer.notes || []).map((note) => ` Note: ${note}.`).join("");
  say(`${result} in ${seconds.toFixed(1)} s.${notes}`);
  draw();
}

// Drawing it on the image

const masks = new WeakMap();  // By object: a canvas, opaque where the object is.
const hues = new Map();  // By class, far from each other in the order of their appearance.

function hue(className) {
  if (!hues.has(className)) hues.set(className, (hues.size * 137.5 + 10) % 360);
  return hues.get(className);
}

// A bitmap is a PNG in zlib in base64; its opaque or white pixels are the object.
async function readMask(bitmap) {
  const zipped = Uint8Array.from(atob(bitmap.data), (letter) => letter.charCodeAt(0));
  const unzipped = new Blob([zipped]).stream().pipeThrough(new DecompressionStream("deflate"));
  const png = await createImageBitmap(await new Response(unzipped).blob());
  const mask = new OffscreenCanvas(png.width, png.height), maskBrush = mask.getContext("2d");
  maskBrush.drawImage(png, 0, 0);
  const pixels = maskBrush.getImageData(0, 0, png.width, png.height), values = pixels.data;
  for (let i = 0; i < values.length; i += 4) {
    values[i + 3] = values[i] && values[i + 3] ? 255 : 0;
  }
  maskBrush.putImageData(pixels, 0, 0);
  return mask;
}

function corners(left, top, right, bottom) {
  return [[left, top], [right, top], [right, bottom], [left, bottom]];
}

function rings(object) {
  const mask = masks.get(object);
  if (mask) {
    const [left, top] = object.bitmap.origin;
    return [corners(left, top, left + mask.width, top + mask.height)];
  }
  const { exterior = [], interior = [] } = object.points || {};
  if (object.geometryType !== "rectangle") return [exterior, ...interior];
  // The last row and column are inside.
  const [[left, top], [right, bottom]] = exterior;
  return [corners(left, top, right + 1, bottom + 1)];
}

function drawMask(object, color, opacity) {
  const mask = masks.get(object);
  const tinted = new OffscreenCanvas(mask.width, mask.height);
  const tint = tinted.getContext("2d");
  tint.drawImage(mask, 0, 0);
  tint.globalCompositeOperation = "source-in";
  tint.fillStyle = `hsl(${color} 90% 55% / ${opacity})`;
  tint.fillRect(0, 0, tinted.width, tinted.height);
  brush.drawImage(tinted, ...object.bitmap.origin);
}

function drawShape(object, color, isHighlighted, unit) {
  brush.beginPath();
  for (const ring of rings(object)) {
    ring.forEach(([x, y], i) => (i ? brush.lineTo(x, y) : brush.moveTo(x, y)));
    brush.closePath();
  }
  brush.fillStyle = `hsl(${color} 90% 55% / ${isHighlighted ? 0.45 : 0.15})`;
  brush.fill("evenodd");
  brush.lineWidth = (isHighlighted ? 4 : 2) * unit;
  brush.strokeStyle = `hsl(${color} 90% 50%)`;
  brush.stroke();
}

function drawName(object, color, unit) {
  const ring = rings(object)[0];
  if (!ring.length) return;
  const score = confidence(object);
  const text = object.classTitle + (score === null ? "" : ` ${score.toFixed(2)}`);
  brush.font = `600 ${13 * unit}px system-ui, sans-serif`;
  const width = brush.measureText(text).width + 10 * unit, height = 19 * unit;
  const x = Math.max(0, Math.min(Math.min(...ring.map((p) => p[0])), canvas.width - width));
  const y = Math.max(height, Math.min(...ring.map((p) => p[1])));
  brush.fillStyle = `hsl(${color} 75% 30%)`;
  brush.fillRect(x, y - height, width, height);
  brush.fillStyle = "#fff";
  brush.fillText(text, x + 5 * unit, y - 5 * unit);
}

function draw() {
  if (!image) return;
  brush.clearRect(0, 0, canvas.width, canvas.height);
  brush.drawImage(image, 0, 0);
  // Lines and letters keep their size on the screen, whatever the image's is.
  const unit = canvas.width / (canvas.clientWidth || canvas.width);
  objects.forEach((object, i) => {
    const color = hue(object.classTitle), isHighlighted = i === highlighted;
    if (masks.has(object)) drawMask(object, color, isHighlighted ? 0.75 : 0.45);
    else drawShape(object, color, isHighlighted, unit);
  });
  objects.forEach((object) => drawName(object, hue(object.classTitle), unit));
  const box = draggedBox || (takesRegion() ? region() : []);
  if (!isBox(box)) return;
  brush.setLineDash([6 * unit, 4 * unit]);
  brush.lineWidth = 2 * unit;
  brush.strokeStyle = "#fff";
  brush.strokeRect(box[0], box[1], box[2] - box[0], box[3] - box[1]);
  brush.setLineDash([]);
}

// Dragging a region, dropping a file

function pixelAt(event) {
  const box = canvas.getBoundingClientRect(), scale = canvas.width / box.width;
  const inside = (value, most) => Math.round(Math.max(0, Math.min(value * scale, most)));
  return [inside(event.clientX - box.left, canvas.width),
          inside(event.clientY - box.top, canvas.height)];
}

canvas.onpointerdown = (event) => {
  if (!image || !takesRegion()) return;
  canvas.setPointerCapture(event.pointerId);
  draggedBox = [...pixelAt(event), ...pixelAt(event)];
};
canvas.onpointermove = (event) => {
  if (!draggedBox) return;
  draggedBox = [draggedBox[0], draggedBox[1], ...pixelAt(event)];
  draw();
};
canvas.onpointerup = () => {
  if (!draggedBox) return;
  const [x1, y1, x2, y2] = draggedBox;
  draggedBox = null;
  const box = [Math.min(x1, x2), Math.min(y1, y2), Math.max(x1, x2), Math.max(y1, y2)];
  // A click is no box; it leaves the one before.
  if (box[0] < box[2] && box[1] < box[3]) $("region").value = box.join(", ");
  showForm();
};
canvas.onpointercancel = () => { draggedBox = null; draw(); };

const stage = $("stage");
stage.ondragover = (event) => { event.preventDefault(); stage.classList.add("over"); };
stage.ondragleave = () => stage.classList.remove("over");
stage.ondrop = (event) => {
  event.preventDefault();
  stage.classList.remove("over");
  const dropped = event.dataTransfer.files;
  if (!dropped.length) return;
  $("file").files = dropped;
  chooseFile(dropped[0]);
};

$("form").onsubmit = ask;
$("file").onchange = () => chooseFile($("file").files[0]);
$("settings").ontoggle = showSettings;
window.onresize = draw;
chooseFile($("file").files[0]);
try {
  await showTasks();
  $("form").oninput = showForm;
  showForm();
  showModel();
} catch (error) {
  say(error.message, true);
}
