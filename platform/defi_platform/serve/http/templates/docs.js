// Shows /openapi.json. Texts are only ever set as textContent.
"use strict";

const made = (name, text, parent) => {
  const element = document.createElement(name);
  if (text) element.textContent = text;
  parent.append(element);
  return element;
};

function content(title, bodies, parent) {
  for (const [type, body] of Object.entries(bodies || {})) {
    const details = made("details", "", parent);
    made("summary", `${title}: ${type}`, details);
    if (body.example) made("pre", JSON.stringify(body.example, null, 2), details);
    if (body.schema) made("pre", JSON.stringify(body.schema, null, 2), details);
  }
}

async function start() {
  const token = document.getElementById("token").value.trim();
  const response = await fetch("/openapi.json", { headers: token ? { Authorization: `Bearer ${token}` } : {} });
  document.getElementById("ask").hidden = response.status !== 401;
  if (!response.ok) throw new Error(await response.text());
  const api = await response.json();
  document.getElementById("about").textContent = api.info.description;
  for (const [path, methods] of Object.entries(api.paths)) {
    for (const [method, operation] of Object.entries(methods)) {
      const box = made("div", "", document.getElementById("operations"));
      box.className = "operation";
      made("h2", `${method.toUpperCase()} ${path}`, box);
      made("p", operation.description || operation.summary, box);
      content("request", operation.requestBody && operation.requestBody.content, box);
      for (const [status, answer] of Object.entries(operation.responses)) {
        made("p", `${status}: ${answer.description}`, box);
        content(`response ${status}`, answer.content, box);
      }
    }
  }
}

const show = () => start().catch((error) => { document.getElementById("about").textContent = String(error); });
document.getElementById("token").addEventListener("change", show);
show();
