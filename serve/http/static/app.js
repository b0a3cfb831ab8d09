// The page of GET /: ask about an image, show the answer, show the same request for others.
//
// Whatever comes from the app, from a file or from a field is put on the page as text, never as
// markup.

import { AnswerView, counted, element, row } from "./answer.js";
import { curlCommand, pythonProgram, withThreshold } from "./commands.js";
import { readMasks } from "./drawing.js";

const $ = (id) => document.getElementById(id);
const RETRY_MS = 3000;
const INPUTS = {
  "nothing": "",
  "text": "a text",
  "region": "a region",
  "text or nothing": "a text, if you like",
};
const OUTLINES = ["polygons", "description_with_bboxes_or_polygons"];
const GROUPS = {
  "Find what is there": (task) => task.takes === "nothing" && task.gives !== "pure_text",
  "Find what you name": (task) => task.takes.includes("text"),
  "Say or read what the image holds": (task) =>
    task.takes === "nothing" && task.gives === "pure_text",
  "About a region": (task) => task.takes === "region",
};

let tasks = [];
let file = null;  // What is asked about; `url` is where a sample is from.
let image = null;  // As it is shown: null if it cannot be.
let draggedBox = null;
let session = null;  // What runs: the model's name, its device, precision and runtime.
let isReady = false, isAsking = false;
let longest = 0;  // Seconds of the slowest answer about the image.

const current = new AnswerView("This answer");
const kept = new AnswerView("Kept answer");
kept.root.hidden = true;
kept.find(".remove").hidden = false;
kept.find(".hint").hidden = true;
$("answers").append(current.root, kept.root);
const { canvas } = current.drawing, stage = current.find(".stage");

function say(text, isError = false) {
  $("message").textContent = text;
  $("message").className = isError ? "bad" : "";
}

function showButtons() {
  $("ask").disabled = $("load").disabled = !isReady || isAsking;
  $("keep").disabled = !current.shown;
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

function friendly(task) {
  const words = task.name.replaceAll("_", " ").replace(/\bocr\b/, "OCR");
  return words[0].toUpperCase() + words.slice(1);
}

function grouped(among, chosen) {
  return Object.entries(GROUPS).flatMap(([label, isIn]) => {
    const listed = among.filter(isIn);
    if (!listed.length) return [];
    const group = Object.assign(document.createElement("optgroup"), { label });
    group.append(...listed.map((task) => {
      const isChosen = task.token === chosen;
      return new Option(friendly(task), task.token, isChosen, isChosen);
    }));
    return [group];
  });
}

async function showTasks() {
  const answer = await call("tasks", { method: "GET" });
  tasks = answer.tasks;
  $("version").textContent = answer.version;
  $("task").replaceChildren(...grouped(tasks, "<OD>"));
  showNextTasks();
  $("tasks").tBodies[0].replaceChildren(...tasks.map((task) =>
    row(element("code", task.token), INPUTS[task.takes] ?? task.takes, task.summary)));
}

async function showModel() {
  try {
    session = await call("get_session_info");
  } catch (error) {
    $("state").textContent =
      error.code === "not_deployed" ? "No model is loaded yet" : error.message;
    setTimeout(showModel, RETRY_MS);
    return;
  }
  $("model").textContent = session.model_name;
  $("state").textContent = "Ready";
  $("state").className = "chip ready";
  const precision = session.precision.toLowerCase();
  const facts = [session.device, precision, session.runtime];
  $("facts").replaceChildren(...facts.map((fact) => element("span", fact, "chip")));
  $("warning").textContent = session.device_warning ?? "";
  $("warning").hidden = !session.device_warning;
  $("notes").replaceChildren(...session.notes.map((note) => element("p", `Note: ${note}`)));
  chooseAmong("precision", session.precisions, precision);
  chooseAmong("runtime", session.runtimes, session.runtime);
  // Only "auto" and what it chooses is no choice.
  $("runtime-row").hidden = session.runtimes.length < 3;
  isReady = true;
  showButtons();
}

function chooseAmong(id, names, chosen) {
  $(id).replaceChildren(...names.map((name) => new Option(name, name, false, name === chosen)));
}

async function loadModel(event) {
  event.preventDefault();
  const { model_name, device } = session;
  const precision = $("precision").value, runtime = $("runtime").value;
  const state = { model_name, deploy_params: { device, precision, runtime } };
  isReady = false;
  showButtons();
  $("state").textContent = "Loading…";
  $("state").className = "chip waiting";
  say(`Loading ${model_name} in ${precision}…`);
  try {
    await call("deploy_from_api", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ state }),
    });
    say("Loaded. Ask again to compare.");
  } catch (error) {
    say(error.message, true);
  }
  await showModel();
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

// The image

function showSamples(names) {
  $("samples").hidden = names.length === 0;
  $("samples").lastElementChild.replaceChildren(...names.map((name) => {
    const label = document.createElement("label"), url = `page/samples/${encodeURIComponent(name)}`;
    const radio = Object.assign(document.createElement("input"),
      { type: "radio", name: "sample", value: name });
    const alt = name.replace(/\.\w+$/, "").replaceAll("_", " ");
    label.append(radio, Object.assign(new Image(), { src: url, alt }));
    radio.onchange = () => chooseSample(name, url);
    return label;
  }));
  // So that the first thing to do may be to ask.
  if (names.length && !file) $("samples").querySelector("input").click();
}

async function chooseSample(name, url) {
  $("file").value = "";
  let blob;
  try {
    const response = await fetch(url);
    if (!response.ok) throw new Error(`status ${response.status}`);
    blob = await response.blob();
  } catch (error) {
    return say(`The sample cannot be had: ${error.message}.`, true);
  }
  const isChosen = document.querySelector("#samples input:checked")?.value === name;
  const sample = new File([blob], name, { type: blob.type });
  sample.url = new URL(url, location.href).href;
  if (isChosen) await chooseFile(sample);
}

async function chooseFile(chosen) {
  if (!chosen) return;
  file = chosen;
  if (!file.url) {
    for (const radio of document.querySelectorAll("#samples input")) radio.checked = false;
  }
  longest = 0;
  clearAnswer();
  const opened = await createImageBitmap(chosen, { imageOrientation: "from-image" })
    .catch(() => null);
  if (file !== chosen) return;
  image = opened;
  if (!image) say("This browser cannot show the file; asking about it may work.");
  current.showImage(image, chosen.name);
  showForm();
}

// Text that comes with an image, as from a word processor, is for the field it is pasted into.
function pasteImage(event) {
  const pasted = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
  if (!pasted || event.clipboardData.getData("text/plain")) return;
  event.preventDefault();
  $("file").value = "";
  chooseFile(pasted);
}

function dropImage(event) {
  const dropped = event.dataTransfer.files;
  event.preventDefault();
  stage.classList.remove("over");
  if (!dropped.length) return;
  $("file").files = dropped;
  chooseFile(dropped[0]);
}

// The question

const find = (token) => tasks.find((one) => one.token === token);
const task = () => find($("task").value);
const nextTask = () => find($("next").value);
const takesText = () => task()?.takes.includes("text") ?? false;
const takesRegion = () => task()?.takes === "region";
const region = () => $("region").value.split(/[\s,;]+/).filter(Boolean).map(Number);
const isBox = (box) => box.length === 4 && box.every(Number.isFinite);

function showNextTasks() {
  const following = tasks.filter((one) => task().next.includes(one.token));
  const before = following.some((one) => one.token === $("next").value) ? $("next").value : "";
  $("next").replaceChildren(new Option("nothing more", ""), ...grouped(following, before));
  $("next-row").hidden = following.length === 0;
}

function addClass() {
  const added = $("class-template").content.firstElementChild.cloneNode(true);
  const number = $("class-rows").childElementCount + 1;
  added.setAttribute("aria-label", `Class ${number}`);
  added.querySelector("button").onclick = () => {
    added.remove();
    $("add-class").focus();
    showForm();
  };
  $("class-rows").append(added);
  added.querySelector("input").focus();
}

// Prompts by class; a class without prompts is asked for by its own name.
function mapping() {
  const prompts = new Map();
  for (const one of $("class-rows").children) {
    const [name, text] = [...one.querySelectorAll("input")].map((input) => input.value.trim());
    if (name) prompts.set(name, [prompts.get(name), text || name].filter(Boolean).join("\n"));
  }
  return Object.fromEntries(prompts);
}

function settings() {
  const asked = { task_prompt: [$("task").value, $("next").value].filter(Boolean).join("+") };
  const text = $("text").value.trim(), classes = mapping();
  if (takesText() && text) asked.text = text;
  if (takesText() && Object.keys(classes).length) asked.mapping = classes;
  // What is no box goes as it was typed, so that the app can say what is wrong with it.
  const box = isBox(region()) ? region() : $("region").value.trim();
  if (takesRegion() && box) asked.regions = [box];
  if (givesOutlines() && $("geometry").value !== "polygon") asked.geometry = $("geometry").value;
  const more = JSON.parse($("more").value.trim() || "{}");
  if (more === null || typeof more !== "object" || Array.isArray(more)) throw new TypeError("more");
  return { ...asked, ...more };
}

const givesOutlines = () => OUTLINES.includes((nextTask() ?? task())?.gives);

function showForm() {
  if (!task()) return;
  $("text-row").hidden = $("text-help").hidden = $("classes").hidden = !takesText();
  $("text").required = task().takes === "text" && Object.keys(mapping()).length === 0;
  for (const one of $("class-rows").children) {
    const [name, prompts] = one.querySelectorAll("input");
    name.required = takesText() && prompts.value.trim() !== "";
  }
  $("region-row").hidden = !takesRegion();
  $("region").required = takesRegion();
  $("geometry-row").hidden = !givesOutlines();
  const parts = [task().summary, nextTask() && `then ${nextTask().summary}`];
  $("summary").textContent = parts.filter(Boolean).join(", ");
  canvas.classList.toggle("drags", takesRegion());
  showCommands();
  showRegion();
}

function showRegion() {
  const box = draggedBox || (takesRegion() ? region() : []);
  current.drawing.region = isBox(box) ? box : null;
  current.drawing.draw();
}

function showCommands() {
  let asked = { task_prompt: $("task").value };
  try {
    asked = settings();
  } catch {
    // Asking says so; the commands show what can be understood.
  }
  const url = new URL("inference_image", location.href).href;
  const sent = [url, file ?? { name: "image.jpg" }, withThreshold(asked, threshold())];
  $("curl").textContent = curlCommand(...sent);
  $("python").textContent = pythonProgram(...sent);
}

async function copy(event) {
  await navigator.clipboard.writeText($(event.target.dataset.copies).textContent);
  say("Copied.");
}

// The same in words, for who looks at two answers.
function inWords(asked, model) {
  const steps = asked.task_prompt.split("+").map((token) => find(token));
  const names = steps.map((one) => (one ? friendly(one) : asked.task_prompt)).join(", then ");
  const classes = Object.entries(asked.mapping ?? {})
    .map(([name, prompts]) => `${name} (${String(prompts).replaceAll("\n", ", ")})`);
  const boxes = (asked.regions ?? []).map((box) => `region ${box}`);
  const facts = [asked.text, ...classes, ...boxes, file.name].filter(Boolean);
  const { name, precision, device, runtime } = model ?? {};
  const answeredBy = model ? `${name}, ${precision} on ${device} (${runtime})` : "";
  return [names, ...facts, answeredBy].filter(Boolean).join(" · ");
}

async function ask(event) {
  event.preventDefault();
  clearAnswer();
  if (!file) return say("Choose an image first.", true);
  const askedFile = file, body = new FormData();
  let asked;
  try {
    asked = settings();
  } catch {
    return say("More settings must be a JSON object; correct them.", true);
  }
  body.append("files", askedFile);
  body.append("state", JSON.stringify({ settings: asked, details: true }));
  isAsking = true;
  showButtons();
  say("Asking…");
  const start = performance.now();
  try {
    const entry = await call("inference_image", { method: "POST", body });
    const seconds = (performance.now() - start) / 1000;
    await readMasks(entry.annotation.objects);
    // The answer is about the image it was asked for, and another may be shown by now.
    if (file === askedFile) showAnswer(entry, asked, seconds);
  } catch (error) {
    if (file === askedFile) say(error.message, true);
  } finally {
    isAsking = false;
    showButtons();
  }
}

// The answer

const threshold = () => Number($("threshold").value);

function clearAnswer() {
  current.clear();
  say("");
  showButtons();
}

function showAnswer(entry, asked, seconds) {
  const { objects, tags } = entry.annotation;
  current.show({
    entry,
    seconds,
    image,
    name: file.name,
    question: inWords(asked, entry.details?.model),
    ownThresholds: new Set(Object.keys(asked.class_thresholds ?? {}).map((one) =>
      one.toLowerCase())),
  });
  longest = Math.max(longest, seconds);
  showTimes();
  // On a small screen the picture is below the question.
  stage.scrollIntoView({ block: "nearest" });
  const found = counted(objects.length, "object");
  const result = objects.length || !tags?.length ? found : "Answered";
  const notes = (entry.notes || []).map((note) => ` Note: ${note}.`).join("");
  say(`${result} in ${seconds.toFixed(1)} s.${notes}`);
}

function showTimes() {
  const scale = Math.max(longest, kept.shown?.seconds ?? 0);
  for (const view of [current, kept]) {
    if (view.shown) view.showTimes(scale);
  }
}

function keepAnswer() {
  kept.threshold = threshold();
  kept.showImage(current.shown.image, current.shown.name);
  kept.show(current.shown);
  kept.root.hidden = false;
  document.body.classList.add("compares");
  showTimes();
  current.drawing.draw();
  kept.drawing.draw();
  say("Kept. Ask something else, or the same in another precision, to see both side by side.");
}

function removeKept() {
  kept.clear();
  kept.root.hidden = true;
  document.body.classList.remove("compares");
  current.drawing.draw();
  $("keep").focus();
}

function filterAnswers() {
  $("threshold-value").textContent = threshold().toFixed(2);
  for (const view of [current, kept]) {
    view.threshold = threshold();
    view.filter();
  }
  showCommands();
}

// Dragging a region

canvas.onpointerdown = (event) => {
  if (!image || !takesRegion()) return;
  canvas.setPointerCapture(event.pointerId);
  const start = current.drawing.pixelAt(event);
  draggedBox = [...start, ...start];
};
canvas.onpointermove = (event) => {
  if (!draggedBox) return;
  draggedBox = [draggedBox[0], draggedBox[1], ...current.drawing.pixelAt(event)];
  showRegion();
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
canvas.onpointercancel = () => { draggedBox = null; showRegion(); };

document.ondragover = (event) => { event.preventDefault(); stage.classList.add("over"); };
document.ondragleave = (event) => {
  if (!event.relatedTarget) stage.classList.remove("over");
};
document.ondrop = dropImage;
document.onpaste = pasteImage;

$("form").onsubmit = ask;
$("deploy-form").onsubmit = loadModel;
$("file").onchange = () => chooseFile($("file").files[0]);
$("task").onchange = showNextTasks;
$("add-class").onclick = () => { addClass(); showForm(); };
$("threshold").oninput = filterAnswers;
$("keep").onclick = keepAnswer;
kept.find(".remove").onclick = removeKept;
$("settings").ontoggle = showSettings;
for (const button of document.querySelectorAll(".copy")) {
  // A browser lends the clipboard only to pages of this machine and of https.
  button.hidden = !navigator.clipboard;
  button.onclick = copy;
}
filterAnswers();
chooseFile($("file").files[0]);
try {
  await showTasks();
  $("form").oninput = $("form").onchange = showForm;
  showForm();
  // What is to be clicked comes last: the notes about the model would move it from under the mouse.
  const [names] = await Promise.all([call("page/samples", { method: "GET" }), showModel()]);
  showSamples(names);
} catch (error) {
  say(error.message, true);
}
