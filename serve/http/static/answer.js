// One answer on the page: its picture, texts, objects, tokens, times and JSON.

import { Drawing, confidence, hue, nameOf, shortened } from "./drawing.js";

const STAGES = {
  vision: "encoding the image",
  prompt: "reading the prompt",
  decode: "writing the answer",
  rest: "waiting, opening, sending",
};

export function element(name, text = "", className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  made.className = className;
  return made;
}

export function row(...cells) {
  const tr = document.createElement("tr");
  for (const cell of cells) {
    const td = document.createElement("td");
    td.append(cell);
    tr.append(td);
  }
  return tr;
}

export function counted(number, noun) {
  return number === 1 ? `1 ${noun}` : `${number} ${noun}s`;
}

function percent(probability) {
  return probability === null ? "unknown" : `${(100 * probability).toFixed(1)} %`;
}

// A probability in digits, and as the length of a line below them.
function measured(probability, name = "") {
  const bar = element("span", "", "probability");
  bar.style.width = `${100 * (probability ?? 0)}%`;
  return [element("span", `${name} ${percent(probability)}`.trim(), name), bar];
}

function shownScore(score) {
  return score === null ? "unknown" : score.toFixed(3);
}

export class AnswerView {
  shown = null;  // What `show` was given.
  threshold = 0;

  constructor(title) {
    const template = document.getElementById("answer-template").content;
    this.root = template.firstElementChild.cloneNode(true);
    this.root.setAttribute("aria-label", title);
    this.find("h3").textContent = title;
    this.drawing = new Drawing(this.find("canvas"));
    this.drawing.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.drawing.canvas.addEventListener("pointerdown", (event) => this.point(event));
    this.drawing.canvas.addEventListener("pointerleave", () => this.highlight(null));
  }

  find(selector) {
    return this.root.querySelector(selector);
  }

  showImage(image, name) {
    this.drawing.setImage(image);
    this.find(".hint").hidden = image !== null;
    this.label(image ? `The image ${name}` : "No image to show");
  }

  label(text) {
    this.drawing.canvas.setAttribute("aria-label", text);
  }

  clear() {
    this.shown = null;
    this.drawing.objects = [];
    this.drawing.highlighted = null;
    for (const part of [".objects", ".tokens", ".times", ".raw", ".json"]) {
      this.find(part).hidden = true;
    }
    this.find(".tags").replaceChildren();
    this.find(".question").textContent = "";
    this.drawing.draw();
  }

  // `entry` is the app's answer, `question` what was asked in words, `seconds` from asking to
  // having it; classes in `ownThresholds` have one that the app has looked at.
  show(shown) {
    this.shown = shown;
    this.details = shown.entry.details ?? {};
    const { objects, tags } = shown.entry.annotation;
    this.find(".question").textContent = shown.question;
    this.rows = objects.map((object, index) => this.objectRow(object, index));
    this.find(".objects tbody").replaceChildren(...this.rows);
    this.find(".tags").replaceChildren(...(tags || []).map((tag) => this.textOf(tag)));
    this.find(".tokens").hidden = true;
    this.showRaw();
    this.filter();
  }

  // Only the objects that are as certain as the threshold asks.
  filter() {
    if (!this.shown) return;
    const all = this.shown.entry.annotation.objects;
    const kept = all.filter((object, index) => this.isCertain(object, index));
    this.drawing.objects = kept;
    this.rows.forEach((tr, index) => { tr.hidden = !kept.includes(all[index]); });
    this.find(".objects").hidden = kept.length === 0;
    if (!kept.includes(this.drawing.highlighted)) this.drawing.highlighted = null;
    if (this.tokensOf && !kept.includes(this.tokensOf)) this.find(".tokens").hidden = true;
    const { name } = this.shown;
    this.label(`The image ${name} with ${counted(kept.length, "object")}; they are listed below`);
    const annotation = { ...this.shown.entry.annotation, objects: kept };
    this.find(".json").hidden = false;
    this.find(".json pre").textContent = JSON.stringify(annotation, null, 2);
    this.drawing.draw();
  }

  isCertain(object, index) {
    const score = this.details.objects?.[index]?.score ?? confidence(object);
    return score === null || score >= this.threshold
      || this.shown.ownThresholds.has(object.classTitle.toLowerCase());
  }

  objectRow(object, index) {
    const tr = row(nameOf(object), object.geometryType, shownScore(confidence(object)));
    const dot = element("span", "", "dot");
    dot.style.background = `hsl(${hue(object.classTitle)} 90% 50%)`;
    tr.firstChild.prepend(dot);
    tr.tabIndex = 0;
    tr.onmouseenter = tr.onfocus = () => {
      this.highlight(object);
      this.showTokens(nameOf(object), this.details.objects?.[index], object);
    };
    tr.onmouseleave = tr.onblur = () => this.highlight(null);
    return tr;
  }

  // A text about the whole image, with the tokens behind it where the app says them.
  textOf(tag) {
    const p = document.createElement("p"), value = String(tag.value ?? "");
    const spelled = this.details.texts?.find((one) => one.tag === tag.name && one.text === value);
    p.append(element("b", tag.name), value);
    if (spelled) {
      p.append(" ", element("span", shownScore(spelled.score), "score"));
      p.tabIndex = 0;
      p.onmouseenter = p.onfocus = () => this.showTokens(value, spelled, null);
    }
    return p;
  }

  highlight(object) {
    if (this.drawing.highlighted === object) return;
    this.drawing.highlighted = object;
    const all = this.shown?.entry.annotation.objects ?? [];
    (this.rows ?? []).forEach((tr, i) => tr.classList.toggle("highlighted", all[i] === object));
    this.drawing.draw();
  }

  point(event) {
    if (!this.shown?.image || event.buttons > 0 && event.type === "pointermove") return;
    const object = this.drawing.objectAt(...this.drawing.pixelAt(event));
    if (object === this.drawing.highlighted) return;
    this.highlight(object);
    if (!object) return;
    const index = this.shown.entry.annotation.objects.indexOf(object);
    this.showTokens(nameOf(object), this.details.objects?.[index], object);
  }

  // They stay until others are shown, so that they can be gone to and read.
  showTokens(name, spelled, object) {
    const tokens = spelled?.tokens ?? [];
    this.tokensOf = object;
    this.find(".tokens").hidden = tokens.length === 0;
    if (!tokens.length) return;
    // What counts in a score.
    const counting = (token) => token.near_probability ?? token.probability;
    const known = tokens.filter((token) => counting(token) !== null);
    const least = known.reduce((a, b) => (counting(b) < counting(a) ? b : a), known[0]);
    const surety = least
      ? `; the least sure, ${least.text.trim()}, has ${percent(counting(least))}` : "";
    this.find(".tokens [role=status]").textContent =
      `${shortened(name)}: ${counted(tokens.length, "token")}${surety}.`;
    this.find(".near-help").hidden = !tokens.some((token) => "near_probability" in token);
    this.find(".tokens ol").setAttribute("aria-label", `Tokens of ${shortened(name)}`);
    this.find(".tokens ol").replaceChildren(...tokens.map((token) => {
      const li = document.createElement("li"), near = token.near_probability ?? null;
      li.append(element("code", token.text), " ", ...measured(token.probability));
      if (near !== null) li.append(" ", ...measured(near, "near"));
      return li;
    }));
  }

  showRaw() {
    const answers = this.details.answers ?? [];
    this.find(".raw").hidden = answers.length === 0;
    this.find(".raw pre").textContent = answers.map((answer) => {
      const asked = [answer.task, answer.text, answer.region?.join(", ")].filter(Boolean);
      const cut = answer.is_truncated ? "\n(cut at its longest length)" : "";
      return `${asked.join(" ")}\n${answer.answer}${cut}`;
    }).join("\n\n");
  }

  // `longest` is the time that fills the whole width, so that the bars of answers compare.
  showTimes(longest) {
    const stages = this.details.seconds;
    this.find(".times").hidden = !stages;
    if (!stages) return;
    const spent = Object.values(stages).reduce((a, b) => a + b, 0);
    const seconds = { ...stages, rest: Math.max(0, this.shown.seconds - spent) };
    const isEncoded = this.details.is_image_encoded_before;
    if (isEncoded) delete seconds.vision;
    this.find(".encoded").hidden = !isEncoded;
    const entries = Object.entries(seconds);
    this.find(".bar").replaceChildren(...entries.map(([stage, value]) => {
      const part = element("span", "", stage);
      part.style.width = `${100 * value / longest}%`;
      return part;
    }));
    this.find(".times dl").replaceChildren(...entries.map(([stage, value]) => {
      const group = document.createElement("div");
      const term = element("dt", `${stage} `);
      term.prepend(element("span", "", `dot ${stage}`));
      term.append(element("span", STAGES[stage], "help"));
      group.append(term, element("dd", `${value.toFixed(3)} s`));
      return group;
    }));
  }
}
