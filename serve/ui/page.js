"use strict";

// One page: a conversation, answered by one or two models side by side, each with its route.

const NONE = "";
const at = (id) => document.getElementById(id);
const turns = []; // {question, answers: {left, right}, experts: {left, right}}
let halting = null;

function headers() {
  const key = at("key").value.trim();
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

function say(text, wrong = false) {
  at("status").textContent = text;
  at("status").classList.toggle("wrong", wrong);
}

async function fail(response) {
  const told = await response.json().catch(() => null);
  throw new Error(told?.error?.message ?? `the service answered ${response.status}`);
}

async function listModels() {
  try {
    const response = await fetch("/v1/models", { headers: headers() });
    if (!response.ok) await fail(response);
    const names = (await response.json()).data.map((model) => model.id);
    fill(at("left"), names, names[0]);
    fill(at("right"), [NONE, ...names], names[0] === "base" ? NONE : "base");
    say("");
  } catch (error) {
    say(error.message, true);
  }
}

function fill(select, names, chosen) {
  const kept = select.value;
  select.replaceChildren(...names.map((name) => new Option(name || "nobody", name)));
  select.value = names.includes(kept) && kept !== NONE ? kept : chosen;
}

function messages(side, question) {
  const said = turns.flatMap((turn) => [
    { role: "user", content: turn.question },
    { role: "assistant", content: turn.answers[side] ?? turn.answers.left },
  ]);
  return [...said, { role: "user", content: question }];
}

function card(model) {
  const article = at("answer").content.firstElementChild.cloneNode(true);
  article.querySelector(".name").textContent = model;
  return article;
}

function showRoute(article, route) {
  const names = route.experts.map((one) => one.name);
  const line = article.querySelector(".route");
  if (route.chosen_by === "client") {
    line.textContent = names.length ? "asked by name" : "the base, without any expert";
    return;
  }
  line.textContent = names.length ? `sent to ${names.join(" and ")}` : "no expert is sure: the base answers";
  const rows = route.reasons.map((reason) => {
    const row = document.createElement("tr");
    for (const value of [reason.latent, reason.label, reason.contribution.toFixed(3)]) {
      row.appendChild(document.createElement("td")).textContent = value;
    }
    return row;
  });
  article.querySelector("tbody").replaceChildren(...rows);
  article.querySelector("table").hidden = !rows.length;
  const scores = Object.entries(route.scores).sort((a, b) => b[1] - a[1]);
  article.querySelector(".scores").textContent =
    scores.map(([name, score]) => `${name} ${score.toFixed(3)}`).join(", ");
  article.querySelector(".why").hidden = false;
  article.querySelector(".why").open = rows.length > 0;
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

async function answer(side, model, question, article, signal) {
  const text = article.querySelector(".text");
  const previous = turns.at(-1)?.experts[side];
  const body = {
    model,
    messages: messages(side, question),
    temperature: Number(at("temperature").value),
    max_tokens: Number(at("tokens").value),
    stream: true,
    ...(model === "moie" && previous && { moie: { previous } }),
  };
  const said = { text: "", expert: null };
  try {
    const request = { method: "POST", headers: headers(), body: JSON.stringify(body), signal };
    const response = await fetch("/v1/chat/completions", request);
    if (!response.ok) await fail(response);
    for await (const event of readEvents(response)) {
      if (event.error) throw new Error(event.error.message);
      if (event.route) {
        showRoute(article, event.route);
        said.expert = event.route.experts[0]?.id ?? null;
      }
      said.text += event.choices[0]?.delta.content ?? "";
      text.textContent = said.text;
    }
  } catch (error) {
    const told = error.name === "AbortError" ? "stopped" : error.message;
    const line = article.appendChild(document.createElement("p"));
    line.className = "wrong";
    line.textContent = told;
  }
  return said;
}

async function send(event) {
  event.preventDefault();
  const question = at("question").value;
  if (!question.trim() || halting) return;
  halting = new AbortController();
  at("send").disabled = true;
  at("halt").disabled = false;
  say("answering");
  const sides = ["left", "right"].filter((side) => at(side).value !== NONE);
  const asked = document.createElement("h2");
  asked.className = "question";
  asked.textContent = question;
  const pair = document.createElement("div");
  pair.className = "pair";
  const cards = sides.map((side) => pair.appendChild(card(at(side).value)));
  at("turns").append(asked, pair);
  const jobs = sides.map((side, i) =>
    answer(side, at(side).value, question, cards[i], halting.signal));
  const said = await Promise.all(jobs);
  const by = (pick) => Object.fromEntries(sides.map((side, i) => [side, pick(said[i])]));
  turns.push({ question, answers: by((one) => one.text), experts: by((one) => one.expert) });
  halting = null;
  at("send").disabled = false;
  at("halt").disabled = true;
  at("question").value = "";
  at("question").focus();
  say("");
}

at("ask").addEventListener("submit", send);
at("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) send(event);
});
at("halt").addEventListener("click", () => halting?.abort());
at("anew").addEventListener("click", () => {
  halting?.abort();
  turns.length = 0;
  at("turns").replaceChildren();
});
at("key").addEventListener("change", listModels);
at("who").addEventListener("submit", (event) => event.preventDefault());
listModels();
