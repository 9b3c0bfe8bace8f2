// The page that sends one observation to POST /v1/act and draws the actions. Texts of the server are only ever set as
// textContent, so that no name of a policy can become markup.
"use strict";

const at = (id) => document.getElementById(id);
const made = (name, properties = {}, parent = null) => {
  const element = Object.assign(document.createElement(name), properties);
  if (parent) parent.append(element);
  return element;
};
const drawn = (name, attributes, parent) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  parent.append(element);
  return element;
};
const color = (index, count) => `hsl(${Math.round((360 * index) / Math.max(count, 1))} 65% 45%)`;

let metadata = null;
const images = {}; // key -> base64 of a PNG or JPEG file

function headers() {
  const token = at("token").value.trim();
  return token ? { Authorization: `Bearer ${token}` } : {};
}

function fail(words) {
  at("error").textContent = words;
  at("error").hidden = !words;
  if (words) at("answer").hidden = true;
}

async function base64(blob) {
  const url = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
  return url.slice(url.indexOf(",") + 1);
}

// PNG and JPEG files go as they are; what else the browser can show is sent as PNG.
async function encoded(file) {
  if (file.type === "image/png" || file.type === "image/jpeg") return base64(file);
  const bitmap = await createImageBitmap(file);
  const canvas = made("canvas", { width: bitmap.width, height: bitmap.height });
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  return base64(await new Promise((resolve) => canvas.toBlob(resolve, "image/png")));
}

function testPicture() {
  const canvas = made("canvas", { width: 256, height: 256 });
  const context = canvas.getContext("2d");
  const shade = context.createLinearGradient(0, 0, 256, 256);
  shade.addColorStop(0, "#d9c7a3");
  shade.addColorStop(1, "#35506b");
  context.fillStyle = shade;
  context.fillRect(0, 0, 256, 256);
  context.fillStyle = "#b5412f";
  context.fillRect(88, 128, 80, 56);
  return canvas.toDataURL("image/png");
}

function addCamera(name, key) {
  const box = made("div", { className: "camera" }, at("cameras"));
  const label = made("label", { textContent: `Image of camera ${name === "*" ? "(any name)" : name} ` }, box);
  const input = made("input", { type: "file", accept: "image/*" }, label);
  const preview = made("img", { alt: `what is sent as ${key}` }, box);
  const picture = testPicture();
  preview.src = picture;
  images[key] = picture.slice(picture.indexOf(",") + 1);
  input.addEventListener("change", async () => {
    const file = input.files[0];
    if (!file) return;
    try {
      images[key] = await encoded(file);
      if (preview.src.startsWith("blob:")) URL.revokeObjectURL(preview.src);
      preview.src = URL.createObjectURL(file);
      fail("");
    } catch (error) {
      fail(`${file.name} is no image that this browser can read: ${error}`);
    }
  });
}

function addState(key, value) {
  const label = made("label", { textContent: `${key} ` }, at("state"));
  made("textarea", { value, id: `state:${key}` }, label);
}

async function start() {
  const response = await fetch("/metadata", { headers: headers() });
  if (!response.ok) {
    at("policy").textContent = await response.text();
    if (response.status === 401) at("token").addEventListener("change", start, { once: true });
    return;
  }
  metadata = await response.json();
  at("policy").textContent =
    `${metadata.policy} (preset ${metadata.preset}): chunks of ${metadata.chunk} actions of ` +
    `${metadata.action_dim} numbers; digest ${metadata.policy_digest}`;
  at("cameras").replaceChildren();
  at("state").replaceChildren();
  for (const [name, key] of Object.entries(metadata.keys.images)) addCamera(name, key);
  if (metadata.state_dim) {
    const zeros = Array(metadata.state_dim).fill(0).join(", ");
    metadata.keys.state.forEach((key) => addState(key, metadata.keys.state.length === 1 ? zeros : ""));
  }
  at("ask").disabled = false;
}

function observation() {
  const message = { ...images, [metadata.keys.prompt]: at("prompt").value };
  if (metadata.state_dim) {
    for (const key of metadata.keys.state) {
      const words = at(`state:${key}`).value.split(/[\s,;]+/).filter(Boolean);
      message[key] = words.map((word) => {
        if (!Number.isFinite(Number(word))) throw new Error(`${key}: '${word}' is no number`);
        return Number(word);
      });
    }
  }
  const seed = at("seed").value.trim();
  if (seed) {
    // Seeds may be larger than what a JavaScript number holds exactly: the digits go as they are.
    if (!/^\d{1,19}$/.test(seed)) throw new Error("seed: a whole number from 0");
    return JSON.stringify(message).replace(/}$/, `, "seed": ${BigInt(seed)}}`);
  }
  return JSON.stringify(message);
}

async function ask(event) {
  event.preventDefault();
  fail("");
  at("ask").disabled = true;
  try {
    const started = performance.now();
    const response = await fetch("/v1/act", {
      method: "POST",
      headers: { "Content-Type": "application/json", ...headers() },
      body: observation(),
    });
    const text = await response.text();
    let answer = null;
    try { answer = JSON.parse(text); } catch { /* a refusal in plain text */ }
    if (!response.ok || !answer) throw new Error((answer && answer.error) || text || `status ${response.status}`);
    show(answer, performance.now() - started);
  } catch (error) {
    fail(error.message || String(error));
  } finally {
    at("ask").disabled = false;
  }
}

function names(count) {
  const said = metadata.action && metadata.action.names;
  return Array.isArray(said) && said.length === count ? said.map(String) : [...Array(count).keys()].map((i) => `a${i}`);
}

function show(answer, elapsed) {
  const actions = answer.actions;
  const dims = actions[0].length;
  const labels = names(dims);
  const timing = answer.server_timing;
  at("facts").textContent =
    `${actions.length} actions of ${dims} numbers, seed ${answer.seed}, digest ${answer.policy_digest}. Server ` +
    `${timing.total_ms.toFixed(1)} ms (queue ${timing.queue_ms.toFixed(1)}, policy ${timing.infer_ms.toFixed(1)}, ` +
    `batch of ${timing.batch_size}); with the way there and back ${elapsed.toFixed(1)} ms.`;
  plot(at("plot"), actions);
  at("legend").replaceChildren(
    ...labels.map((label, index) => {
      const item = made("li");
      made("span", { textContent: "■ " }, item).style.color = color(index, dims);
      item.append(label);
      return item;
    }),
  );
  const table = at("numbers");
  table.replaceChildren();
  const head = made("tr", {}, table);
  ["step", ...labels].forEach((label) => made("th", { textContent: label }, head));
  actions.forEach((action, step) => {
    const row = made("tr", {}, table);
    [step, ...action.map((value) => value.toFixed(4))].forEach((cell) => made("td", { textContent: cell }, row));
  });
  at("answer").hidden = false;
}

function plot(svg, actions) {
  const [width, height, left, edge] = [640, 300, 60, 20];
  const values = actions.flat();
  let [low, high] = [Math.min(...values), Math.max(...values)];
  if (low === high) [low, high] = [low - 1, high + 1];
  const x = (step) => left + ((width - left - edge) * step) / Math.max(actions.length - 1, 1);
  const y = (value) => height - edge - ((height - 2 * edge) * (value - low)) / (high - low);
  svg.replaceChildren();
  for (const value of [low, (low + high) / 2, high]) {
    drawn("line", { class: "axis", x1: left, x2: width - edge, y1: y(value), y2: y(value) }, svg);
    drawn("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, svg).textContent = value.toPrecision(3);
  }
  for (const step of new Set([0, Math.floor((actions.length - 1) / 2), actions.length - 1]))
    drawn("text", { x: x(step), y: height - 4, "text-anchor": "middle" }, svg).textContent = step;
  const dims = actions[0].length;
  for (let dim = 0; dim < dims; dim += 1) {
    const points = actions.map((action, step) => `${x(step).toFixed(1)},${y(action[dim]).toFixed(1)}`);
    const line = drawn("path", { d: `M${points.join("L")}` }, svg);
    line.style.stroke = color(dim, dims);
    if (points.length === 1) drawn("circle", { cx: x(0), cy: y(actions[0][dim]), r: 3 }, svg).style.fill = color(dim, dims);
  }
}

at("form").addEventListener("submit", ask);
start().catch((error) => fail(String(error)));
