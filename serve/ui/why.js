// Why a route was taken: its reasons, where in the request they were read, and how sure the router is.

const FAINTEST = 0.1; // of a latent's strongest activation in the request: under it nothing is shaded
const NUM_PLACES = 3;
let numRoutes = 0;

function make(tag, text, className = "") {
  const element = document.createElement(tag);
  element.textContent = text;
  element.className = className;
  return element;
}

function bar(share, against = false) {
  const element = make("span", "", against ? "bar against" : "bar");
  element.style.setProperty("--share", Math.min(1, Math.abs(share)).toFixed(3));
  return element;
}

const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(3);
const nameOf = (reason) => (reason.label === "unlabelled" ? `latent ${reason.latent}` : reason.label);

export function showRoute(article, route) {
  const names = route.experts.map((one) => one.name);
  const line = article.querySelector(".route");
  if (route.chosen_by === "client") {
    line.textContent = names.length ? "asked by name" : "without any expert";
    return;
  }
  line.textContent = names.length ? `sent to ${names.join(" and ")}` : "no expert is sure: the base answers";
  const scores = Object.entries(route.scores).sort((a, b) => b[1] - a[1]);
  const nearest = scores.find(([name]) => name !== "base")?.[0];
  article.querySelector(".case").textContent = caseFor(route, names[0], nearest);
  if (route.reasons.length) article.querySelector(".reasons").replaceChildren(tableOfReasons(route.reasons));
  article.querySelector(".scores").replaceChildren(tableOfScores(scores));
  article.querySelector(".why").hidden = false;
}

function caseFor(route, chosen, nearest) {
  if (!route.reasons.length) return "There is no latent to name.";
  return route.abstained
    ? `What the router read in the request against ${nearest}, the expert that came nearest:`
    : `What the router read in the request that speaks for ${chosen}:`;
}

function tableOfReasons(reasons) {
  const table = document.createElement("table");
  table.appendChild(make("caption", "The shades above are those of:"));
  const head = table.createTHead().insertRow();
  for (const [title, scope] of [["Latent", "col"], ["Strongest at", "col"], ["Contribution", "col"]]) {
    head.appendChild(make("th", title)).scope = scope;
  }
  head.lastChild.title = "What the likeness to the expert would lose with the latent at its average";
  const group = `reason-${numRoutes++}`;
  const body = table.createTBody();
  const most = Math.max(...reasons.map((one) => Math.abs(one.contribution)));
  addRow(body, group, "", "all of these").querySelector("input").checked = true;
  reasons.forEach((reason, i) => {
    const row = addRow(body, group, reason.latent, nameOf(reason), `l${i}`);
    if (reason.label !== "unlabelled") row.cells[0].appendChild(make("span", `latent ${reason.latent}`, "quiet"));
    row.cells[2].append(signed(reason.contribution), bar(reason.contribution / most, reason.contribution < 0));
  });
  return table;
}

function addRow(body, group, value, name, hue) {
  const row = body.insertRow();
  const label = row.insertCell().appendChild(document.createElement("label"));
  const radio = label.appendChild(document.createElement("input"));
  Object.assign(radio, { type: "radio", name: group, value });
  if (hue) label.appendChild(make("span", "", `swatch ${hue}`));
  label.append(name);
  row.insertCell();
  row.insertCell();
  return row;
}

function tableOfScores(scores) {
  const table = document.createElement("table");
  const head = table.createTHead().insertRow();
  for (const title of ["Who might answer", "Probability"]) head.appendChild(make("th", title)).scope = "col";
  const body = table.createTBody();
  for (const [name, score] of scores) {
    const row = body.insertRow();
    row.insertCell().textContent = name === "base" ? "the base" : name;
    row.insertCell().append(`${(100 * score).toFixed(1)} %`, bar(score));
  }
  return table;
}

// Shade the request's tokens, as the router read them, by the latents of the reasons.
export function showTokens(article, reasons, tokens) {
  const read = joined(tokens);
  const peak = Object.fromEntries(
    reasons.map(({ latent }) => [latent, Math.max(0, ...read.map((one) => one.activations[latent] ?? 0))]));
  const place = article.querySelector(".request");
  const shade = (chosen) => {
    const shown = reasons.map((reason, i) => ({ ...reason, hue: `l${i}` }))
      .filter(({ latent }) => !chosen || String(latent) === chosen);
    place.replaceChildren(...read.map((one) => shaded(one, shown, peak)));
  };
  article.querySelectorAll(".reasons input").forEach((radio) => {
    radio.addEventListener("change", () => shade(radio.value));
    if (radio.value) radio.closest("tr").cells[1].textContent = strongest(read, radio.value);
    if (radio.checked) shade(radio.value);
  });
  place.hidden = !read.length;
}

// A token without text is part of a character that the one before it shows.
function joined(tokens) {
  const read = [];
  for (const { text, activations } of tokens) {
    if (text || !read.length) {
      read.push({ text, activations: { ...activations } });
      continue;
    }
    const last = read.at(-1).activations;
    for (const [latent, z] of Object.entries(activations)) last[latent] = Math.max(last[latent] ?? 0, z);
  }
  return read;
}

function shaded({ text, activations }, reasons, peak) {
  const strength = ({ latent }) => (activations[latent] ?? 0) / Math.max(peak[latent], 1e-9);
  const first = reasons.toSorted((a, b) => strength(b) - strength(a))[0];
  if (!first || strength(first) < FAINTEST) return document.createTextNode(text);
  const mark = make("mark", text, first.hue);
  mark.title = `${nameOf(first)} · ${activations[first.latent].toFixed(2)}`;
  mark.style.setProperty("--strength", strength(first).toFixed(3));
  return mark;
}

const visible = (text) => text.trim() || text.replaceAll("\n", "⏎").replaceAll(" ", "␣");

function strongest(read, latent) {
  const on = read.filter((one) => one.activations[latent] > 0)
    .sort((a, b) => b.activations[latent] - a.activations[latent]);
  return on.slice(0, NUM_PLACES)
    .map(({ text, activations }) => `“${visible(text)}” ${activations[latent].toFixed(2)}`).join(", ");
}
