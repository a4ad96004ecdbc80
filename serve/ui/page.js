// One page: a conversation, answered by one or two models side by side, each with its route.

import { showRoute, showTokens } from "./why.js";

const NOBODY = "";
const TITLES = { moie: "Mixture (moie)", base: "Base", [NOBODY]: "nobody" };
const at = (id) => document.getElementById(id);
const titleOf = (model) => TITLES[model] ?? model;
let turns = []; // {question, texts: {left, right}, experts: {left, right}}
let asking = null; // what stops the answers in progress

function headers() {
  const key = at("key").value.trim();
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

function say(text, wrong = false) {
  at("status").textContent = wrong ? `Error: ${text}` : text;
  at("status").classList.toggle("wrong", wrong);
}

async function ask(path, body, signal) {
  const how = body && { method: "POST", body: JSON.stringify(body) };
  const response = await fetch(path, { ...how, headers: headers(), signal }).catch((error) => {
    if (error.name === "AbortError") throw error;
    throw new Error("the service cannot be reached");
  });
  if (response.ok) return response;
  if (response.status === 401) at("settings").open = true;
  const told = await response.json().catch(() => null);
  throw new Error(told?.error?.message ?? `the service answered ${response.status}`);
}

async function listModels() {
  try {
    const names = (await (await ask("/v1/models")).json()).data.map((model) => model.id);
    fill(at("left"), names, names[0]);
    fill(at("right"), [NOBODY, ...names], names[0] === "base" ? NOBODY : "base");
    say("");
  } catch (error) {
    say(error.message, true);
  }
}

function fill(select, names, preset) {
  const kept = select.selectedIndex >= 0 ? select.value : preset;
  select.replaceChildren(...names.map((name) => new Option(titleOf(name), name)));
  select.value = names.includes(kept) ? kept : preset;
}

function messages(side, question) {
  const said = turns.flatMap(({ question, texts }) => [
    { role: "user", content: question },
    { role: "assistant", content: texts[side] ?? texts.left ?? texts.right },
  ]);
  return [...said, { role: "user", content: question }];
}

function options(side, model) {
  const previous = model === "moie" && turns.at(-1)?.experts[side];
  return previous ? { moie: { previous } } : {};
}

async function* readEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let kept = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the stream broke off");
    kept += value;
    const parts = kept.split("\n\n");
    kept = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function note(article, text, wrong = false) {
  const line = document.createElement("p");
  line.textContent = wrong ? `Error: ${text}` : text;
  line.className = wrong ? "wrong" : "note";
  article.querySelector(".text").after(line);
}

// Stream one answer into its card; what goes wrong is shown there.
async function answer(side, model, question, article, signal) {
  const said = { side, article, text: "", route: null, asked: messages(side, question) };
  const number = (id) => (at(id).value === "" ? undefined : Number(at(id).value));
  const how = { temperature: number("temperature"), max_tokens: number("tokens"), stream: true };
  said.options = options(side, model);
  try {
    const body = { model, messages: said.asked, ...how, ...said.options };
    for await (const event of readEvents(await ask("/v1/chat/completions", body, signal))) {
      if (event.error) throw new Error(event.error.message);
      if (event.route) showRoute(article, (said.route = event.route));
      said.text += event.choices[0]?.delta.content ?? "";
      article.querySelector(".text").textContent = said.text;
      if (event.choices[0]?.finish_reason === "length") note(article, "cut off: no more tokens were allowed");
    }
  } catch (error) {
    if (error.name === "AbortError") note(article, "stopped");
    else note(article, error.message, true);
  }
  return said;
}

// Ask once more, after the answers, what the router read where: no answer waits for it.
async function explain({ article, route, asked, options }) {
  if (!route?.reasons?.length) return;
  try {
    const body = { messages: asked, ...options, tokens: true };
    showTokens(article, route.reasons, (await (await ask("/v1/route", body)).json()).tokens);
  } catch (error) {
    article.querySelector(".case").after(Object.assign(document.createElement("p"), {
      className: "wrong", textContent: `Error: the request cannot be shown shaded: ${error.message}` }));
  }
}

function lay(question, sides) {
  const heading = Object.assign(document.createElement("h2"), { className: "question", textContent: question });
  heading.dir = "auto";
  const pair = Object.assign(document.createElement("div"), { className: "pair" });
  const cards = sides.map((side) => {
    const article = at("answer").content.firstElementChild.cloneNode(true);
    article.querySelector(".name").textContent = titleOf(at(side).value);
    return pair.appendChild(article);
  });
  at("turns").append(heading, pair);
  heading.scrollIntoView();
  return cards;
}

function busy(on) {
  at("turns").ariaBusy = String(on);
  at("send").disabled = on;
  at("halt").disabled = !on;
}

async function send(event) {
  event.preventDefault();
  const question = at("question").value;
  if (!question.trim() || asking || at("left").selectedIndex < 0) return;
  const mine = (asking = new AbortController());
  busy(true);
  say("Answering …");
  const sides = ["left", "right"].filter((side) => at(side).value !== NOBODY);
  const cards = lay(question, sides);
  const said = await Promise.all(sides.map((side, i) =>
    answer(side, at(side).value, question, cards[i], mine.signal)));
  if (asking !== mine) return; // a new conversation was begun
  asking = null;
  busy(false);
  const told = said.filter((one) => one.text);
  const by = (pick) => Object.fromEntries(told.map((one) => [one.side, pick(one)]));
  if (told.length) {
    turns.push({ question, texts: by((one) => one.text), experts: by((one) => one.route.experts[0]?.id) });
    at("question").value = "";
  }
  say(told.length ? "Answered." : "");
  at("question").focus({ preventScroll: true });
  said.forEach(explain);
}

function begin() {
  asking?.abort();
  asking = null;
  turns = [];
  at("turns").replaceChildren();
  busy(false);
  say("");
  at("question").focus();
  listModels();
}

at("ask").addEventListener("submit", send);
at("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") asking?.abort();
});
at("halt").addEventListener("click", () => asking?.abort());
at("anew").addEventListener("click", begin);
at("key").addEventListener("change", listModels);
at("who").addEventListener("submit", (event) => event.preventDefault());
listModels();
