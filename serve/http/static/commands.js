// The request of the page for a shell and for Python. Whatever a user typed is quoted.

const THRESHOLDS = ["confidence_threshold", "conf", "confidence", "confidence_thresh",
                    "box_threshold"];

// The settings with the threshold that the page filters by, where those do not ask for more.
export function withThreshold(settings, threshold) {
  const key = THRESHOLDS.find((one) => one in settings) ?? THRESHOLDS[0];
  const own = settings[key] ?? 0;
  if (typeof own !== "number" || own >= threshold) return settings;
  return { ...settings, [key]: threshold };
}

export function shellQuoted(word) {
  return /^[\w@%+:,./-][\w@%+:,./=-]*$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`;
}

// curl reads commas, semicolons and quotes in the name of a file unless it is quoted for curl too.
function curlFile(name) {
  if (name === "-") return "files=@./-";
  if (!/[",;\\]/.test(name)) return `files=@${name}`;
  return `files=@"${name.replaceAll(/["\\]/g, "\\$&")}"`;
}

// `image` has a `name`, and the `url` of a sample, which nobody has as a file.
export function curlCommand(url, image, settings) {
  const state = `state=${JSON.stringify({ settings })}`;
  const form = image.url ? "files=@-" : curlFile(image.name);
  const ask = ["curl", "-sS", "-F", form, "--form-string", state, url].map(shellQuoted).join(" ");
  return image.url ? `curl -sS ${shellQuoted(image.url)} | ${ask}` : ask;
}

const WORDS = { null: "None", true: "True", false: "False" };

// A string or number of JSON is one of Python too.
function literal(value, indent = "") {
  if (typeof value !== "object" || value === null) {
    const text = JSON.stringify(value);
    return WORDS[text] ?? text;
  }
  const deeper = `${indent}    `;
  const parts = Array.isArray(value)
    ? value.map((one) => literal(one, deeper))
    : Object.entries(value).map(([key, one]) => `${JSON.stringify(key)}: ${literal(one, deeper)}`);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  const line = open + parts.join(", ") + close;
  if (line.length < 80 && !line.includes("\n")) return line;
  return `${open}\n${parts.map((part) => `${deeper}${part},\n`).join("")}${indent}${close}`;
}

export function pythonProgram(url, image, settings) {
  const [library, bytes] = image.url
    ? ["", `requests.get(${literal(image.url)}).content`]
    : ["from pathlib import Path\n", `Path(${literal(image.name)}).read_bytes()`];
  return `import json
${library}
import requests

state = ${literal({ settings })}
image = ${bytes}
answer = requests.post(
    ${literal(url)},
    files={"files": image},
    data={"state": json.dumps(state)},
)
answer.raise_for_status()
print(json.dumps(answer.json()["annotation"], indent=2))
`;
}
