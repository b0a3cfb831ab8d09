// An image on a canvas, and the objects of an answer drawn on it.

const hues = new Map();  // By class, far from each other in the order of their appearance.
const masks = new WeakMap();  // By object: a canvas, opaque where the object is.
const LONGEST_NAME = 40;
const MOST_SIDE = 2048;  // Pixels of a canvas; larger photographs are drawn smaller.

export function hue(className) {
  if (!hues.has(className)) hues.set(className, (hues.size * 137.5 + 10) % 360);
  return hues.get(className);
}

export function confidence(object) {
  const tag = (object.tags || []).find((one) => one.name === "confidence");
  return typeof tag?.value === "number" ? tag.value : null;
}

function textsOf(object) {
  return (object.tags || []).filter((tag) => tag.name !== "confidence")
    .map((tag) => tag.value).filter(Boolean);
}

// What an object is called: its class, and the texts that the model gave for it.
export function nameOf(object) {
  return [object.classTitle, ...textsOf(object)].join(": ");
}

export function shortened(name) {
  return name.length > LONGEST_NAME ? `${name.slice(0, LONGEST_NAME)}…` : name;
}

// To be awaited before bitmaps among the objects are drawn.
export async function readMasks(objects) {
  await Promise.all(objects.map(async (object) => {
    if (object.bitmap) masks.set(object, await readMask(object.bitmap));
  }));
}

// A bitmap is a PNG in zlib in base64; its opaque or white pixels are the object.
async function readMask(bitmap) {
  const zipped = Uint8Array.from(atob(bitmap.data), (letter) => letter.charCodeAt(0));
  const unzipped = new Blob([zipped]).stream().pipeThrough(new DecompressionStream("deflate"));
  const png = await createImageBitmap(await new Response(unzipped).blob());
  const mask = new OffscreenCanvas(png.width, png.height);
  const brush = mask.getContext("2d", { willReadFrequently: true });
  brush.drawImage(png, 0, 0);
  const pixels = brush.getImageData(0, 0, png.width, png.height), values = pixels.data;
  for (let i = 0; i < values.length; i += 4) {
    values[i + 3] = values[i] && values[i + 3] ? 255 : 0;
  }
  brush.putImageData(pixels, 0, 0);
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

function outline(object) {
  const path = new Path2D();
  for (const ring of rings(object)) {
    ring.forEach(([x, y], i) => (i ? path.lineTo(x, y) : path.moveTo(x, y)));
    path.closePath();
  }
  return path;
}

function boxArea(object) {
  const points = rings(object)[0] || [];
  const sides = [0, 1].map((axis) => {
    const values = points.map((point) => point[axis]);
    return Math.max(...values) - Math.min(...values);
  });
  return sides[0] * sides[1];
}

export class Drawing {
  objects = [];
  highlighted = null;  // One of the objects.
  region = null;  // Left, top, right, bottom.
  image = null;

  constructor(canvas) {
    this.canvas = canvas;
    this.brush = canvas.getContext("2d");
    window.addEventListener("resize", () => this.draw());
  }

  setImage(image) {
    this.image = image;
    this.objects = [];
    this.highlighted = null;
    const { width, height } = image ?? { width: 0, height: 0 };
    this.scale = Math.min(1, MOST_SIDE / Math.max(width, height, 1));
    this.canvas.width = Math.round(width * this.scale);
    this.canvas.height = Math.round(height * this.scale);
    this.draw();
  }

  // The pixel of the image under a pointer, held inside of it.
  pixelAt(event) {
    const { width, height } = this.image, box = this.canvas.getBoundingClientRect();
    const inside = (share, most) => Math.round(most * Math.max(0, Math.min(share, 1)));
    return [inside((event.clientX - box.left) / box.width, width),
            inside((event.clientY - box.top) / box.height, height)];
  }

  // The smallest object at a pixel, as one inside of another could not be pointed at otherwise.
  objectAt(x, y) {
    const there = this.objects.filter((object) => {
      const mask = masks.get(object);
      // The path is scaled as all that is drawn, and the point is not.
      const point = [x * this.scale, y * this.scale];
      if (!mask) return this.brush.isPointInPath(outline(object), ...point, "evenodd");
      const [left, top] = object.bitmap.origin;
      return mask.getContext("2d").getImageData(x - left, y - top, 1, 1).data[3] > 0;
    });
    return there.sort((a, b) => boxArea(a) - boxArea(b))[0] ?? null;
  }

  draw() {
    if (!this.image) return;
    const { brush, canvas, image } = this;
    brush.setTransform(1, 0, 0, 1, 0, 0);
    brush.clearRect(0, 0, canvas.width, canvas.height);
    // From here on in pixels of the image.
    brush.setTransform(canvas.width / image.width, 0, 0, canvas.height / image.height, 0, 0);
    brush.drawImage(image, 0, 0);
    // Lines and letters keep their size on the screen, whatever the image's is.
    this.unit = image.width / (canvas.clientWidth || canvas.width);
    for (const object of this.objects) {
      const color = hue(object.classTitle), isHighlighted = object === this.highlighted;
      if (masks.has(object)) this.drawMask(object, color, isHighlighted ? 0.75 : 0.45);
      else this.drawShape(object, color, isHighlighted);
    }
    // Where names overlap, the one that is looked for is on top.
    const last = this.objects.filter((object) => object === this.highlighted);
    for (const object of [...this.objects, ...last]) {
      this.drawName(object, hue(object.classTitle));
    }
    this.drawRegion();
  }

  drawMask(object, color, opacity) {
    const mask = masks.get(object);
    const tinted = new OffscreenCanvas(mask.width, mask.height);
    const tint = tinted.getContext("2d");
    tint.drawImage(mask, 0, 0);
    tint.globalCompositeOperation = "source-in";
    tint.fillStyle = `hsl(${color} 90% 55% / ${opacity})`;
    tint.fillRect(0, 0, tinted.width, tinted.height);
    this.brush.drawImage(tinted, ...object.bitmap.origin);
  }

  drawShape(object, color, isHighlighted) {
    const { brush, unit } = this, path = outline(object);
    brush.fillStyle = `hsl(${color} 90% 55% / ${isHighlighted ? 0.45 : 0.15})`;
    brush.fill(path, "evenodd");
    brush.lineWidth = (isHighlighted ? 4 : 2) * unit;
    brush.strokeStyle = `hsl(${color} 90% 50%)`;
    brush.stroke(path);
  }

  drawName(object, color) {
    const { brush, image, unit } = this, ring = rings(object)[0];
    if (!ring.length) return;
    // There is little room, and what the model said says more than "object" or "text".
    const name = textsOf(object).join(": ") || object.classTitle, score = confidence(object);
    const text = shortened(name) + (score === null ? "" : ` ${score.toFixed(2)}`);
    brush.font = `600 ${13 * unit}px system-ui, sans-serif`;
    const width = brush.measureText(text).width + 10 * unit, height = 19 * unit;
    const x = Math.max(0, Math.min(Math.min(...ring.map((p) => p[0])), image.width - width));
    const y = Math.max(height, Math.min(...ring.map((p) => p[1])));
    brush.fillStyle = `hsl(${color} 75% 25%)`;
    brush.fillRect(x, y - height, width, height);
    brush.fillStyle = "#fff";
    brush.fillText(text, x + 5 * unit, y - 5 * unit);
  }

  drawRegion() {
    if (!this.region) return;
    const { brush, unit } = this, [left, top, right, bottom] = this.region;
    // White over black, to be seen on any image.
    for (const [color, dash] of [["#000", []], ["#fff", [6 * unit, 4 * unit]]]) {
      brush.setLineDash(dash);
      brush.lineWidth = 2 * unit;
      brush.strokeStyle = color;
      brush.strokeRect(left, top, right - left, bottom - top);
    }
    brush.setLineDash([]);
  }
}
