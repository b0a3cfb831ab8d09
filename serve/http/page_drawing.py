"""How the page draws an answer on the image: boxes, outlines, masks, and their names."""

from __future__ import annotations

from typing import Final

DRAWING: Final = r"""
function corners(left, top, right, bottom) {
  return [[left, top], [right, top], [right, bottom], [left, bottom]];
}

function rings(thing) {
  if (thing.mask) {
    const [left, top] = thing.bitmap.origin;
    return [corners(left, top, left + thing.mask.width, top + thing.mask.height)];
  }
  const { exterior = [], interior = [] } = thing.points || {};
  if (thing.geometryType !== "rectangle") return [exterior, ...interior];
  // The last row and column are inside.
  const [[left, top], [right, bottom]] = exterior;
  return [corners(left, top, right + 1, bottom + 1)];
}

// A bitmap is a PNG in zlib in base64; its opaque or white pixels are the object.
async function readMask(thing) {
  const zipped = Uint8Array.from(atob(thing.bitmap.data), (letter) => letter.charCodeAt(0));
  const unzipped = new Blob([zipped]).stream().pipeThrough(new DecompressionStream("deflate"));
  const mask = await createImageBitmap(await new Response(unzipped).blob());
  const sheet = new OffscreenCanvas(mask.width, mask.height), brush = sheet.getContext("2d");
  brush.drawImage(mask, 0, 0);
  const pixels = brush.getImageData(0, 0, mask.width, mask.height), values = pixels.data;
  for (let i = 0; i < values.length; i += 4) {
    values[i + 3] = values[i] && values[i + 3] ? 255 : 0;
  }
  brush.putImageData(pixels, 0, 0);
  return sheet;
}

function paintMask(thing, color, opacity) {
  const sheet = new OffscreenCanvas(thing.mask.width, thing.mask.height);
  const brush = sheet.getContext("2d");
  brush.drawImage(thing.mask, 0, 0);
  brush.globalCompositeOperation = "source-in";
  brush.fillStyle = `hsl(${color} 90% 55% / ${opacity})`;
  brush.fillRect(0, 0, sheet.width, sheet.height);
  pen.drawImage(sheet, ...thing.bitmap.origin);
}

function trace(thing) {
  pen.beginPath();
  for (const ring of rings(thing)) {
    ring.forEach(([x, y], i) => (i ? pen.lineTo(x, y) : pen.moveTo(x, y)));
    pen.closePath();
  }
}

function draw() {
  if (!picture) return;
  pen.drawImage(picture, 0, 0);
  const unit = canvas.width / (canvas.clientWidth || canvas.width);
  objects.forEach((thing, i) => {
    const color = hue(thing.classTitle);
    if (thing.mask) return paintMask(thing, color, i === active ? 0.75 : 0.45);
    trace(thing);
    pen.fillStyle = `hsl(${color} 90% 55% / ${i === active ? 0.45 : 0.15})`;
    pen.fill("evenodd");
    pen.lineWidth = (i === active ? 4 : 2) * unit;
    pen.strokeStyle = `hsl(${color} 90% 50%)`;
    pen.stroke();
  });
  objects.forEach((thing) => label(thing, unit));
  const box = drag || (takes() === "region" ? region() : []);
  if (!isBox(box)) return;
  pen.setLineDash([6 * unit, 4 * unit]);
  pen.lineWidth = 2 * unit;
  pen.strokeStyle = "#fff";
  pen.strokeRect(box[0], box[1], box[2] - box[0], box[3] - box[1]);
  pen.setLineDash([]);
}

function label(thing, unit) {
  const ring = rings(thing)[0];
  if (!ring.length) return;
  const score = confidence(thing);
  const words = thing.classTitle + (score === null ? "" : " " + score.toFixed(2));
  pen.font = `600 ${13 * unit}px system-ui, sans-serif`;
  const width = pen.measureText(words).width + 10 * unit, height = 19 * unit;
  const x = Math.max(0, Math.min(Math.min(...ring.map((p) => p[0])), canvas.width - width));
  const y = Math.max(height, Math.min(...ring.map((p) => p[1])));
  pen.fillStyle = `hsl(${hue(thing.classTitle)} 75% 30%)`;
  pen.fillRect(x, y - height, width, height);
  pen.fillStyle = "#fff";
  pen.fillText(words, x + 5 * unit, y - 5 * unit);
}
"""
