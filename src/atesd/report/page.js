"use strict";
// Draws the figures and the inspector from the JSON in #data. Text from runs enters the page through textContent only.

const data = JSON.parse(document.getElementById("data").textContent);
const hidden = new Set();
const chosen = {};

// ---- figures ----

// "@arm0" is the style sheet's --arm0; "@arm0/0.2" the same at 20 % opacity.
function colour(name) {
  const [variable, opacity] = name.slice(1).split("/");
  const value = getComputedStyle(document.documentElement).getPropertyValue("--" + variable).trim();
  if (!opacity) return value;
  const [r, g, b] = [1, 3, 5].map((at) => parseInt(value.slice(at, at + 2), 16));
  return `rgba(${r},${g},${b},${opacity})`;
}

function painted(value) {
  if (typeof value === "string") return value.startsWith("@") ? colour(value) : value;
  if (Array.isArray(value)) return value.map(painted);
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, painted(inner)]));
}

function draw(name) {
  const { data: traces, layout } = painted(data.figures[name][chosen[name] || 0]);
  for (const trace of traces) trace.visible = !(trace.meta && hidden.has(trace.meta.arm));
  layout.font.family = getComputedStyle(document.body).fontFamily;
  Plotly.react("figure-" + name, traces, layout, { responsive: true, displayModeBar: false });
}

function drawAll() {
  Object.keys(data.figures).forEach(draw);
}

for (const select of document.querySelectorAll("select[data-figure]")) {
  select.addEventListener("change", () => {
    chosen[select.dataset.figure] = Number(select.value);
    draw(select.dataset.figure);
  });
}

for (const chip of document.querySelectorAll(".chip")) {
  chip.addEventListener("click", () => {
    const arm = Number(chip.dataset.arm);
    if (!hidden.delete(arm)) hidden.add(arm);
    chip.setAttribute("aria-pressed", String(!hidden.has(arm)));
    drawAll();
  });
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);

// ---- inspector ----

const DIVERGENCE = 0, STUDENT = 1, TEACHER = 2, ENTROPY = 3, GATE = 4;
const VALUES = [
  ["divergence, nats", (streams, i) => streams[DIVERGENCE][i]],
  ["student log-prob", (streams, i) => streams[STUDENT][i]],
  ["teacher log-prob", (streams, i) => streams[TEACHER][i]],
  ["student entropy, nats", (streams, i) => streams[ENTROPY][i]],
  ["gate", (streams, i) => streams[GATE][i]],
];
// How a token is coloured: share in [-1, 1] of the strongest colour; negative shares are blue.
const COLOURINGS = {
  "divergence": {
    share: (streams, i) => Math.sqrt(Math.min(1, Math.max(0, streams[DIVERGENCE][i]) / data.rollouts.scale)),
    low: "0", high: () => `${data.rollouts.scale} nats or more`,
  },
  "teacher minus student log-prob": {
    share: (streams, i) => Math.max(-1, Math.min(1, (streams[STUDENT][i] - streams[TEACHER][i]) / 3)),
    low: "teacher finds it likelier (+3)", high: () => "less likely (\u22123)", both: true,
  },
  "student entropy": { share: (streams, i) => Math.min(1, streams[ENTROPY][i] / 2), low: "0", high: () => "2 nats or more" },
  "gate": { share: (streams, i) => Math.min(1, Math.abs(streams[GATE][i])), low: "0: ignored", high: () => "1: full weight" },
};

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function picker(label, onChange) {
  const select = element("select");
  select.addEventListener("change", onChange);
  return { select, label: element("label", {}, label, select) };
}

function fill(select, labels, index) {
  select.replaceChildren(...labels.map((label, value) => element("option", { value }, label)));
  select.value = String(Math.min(index, labels.length - 1));
}

function inspector(root) {
  const runs = data.rollouts.runs;
  const run = picker("Run", () => refill());
  const step = picker("Step", () => {
    wanted = steps()[Number(step.select.value)].step;
    refill();
  });
  const problem = picker("Problem", () => show());
  const colouring = picker("Colour by", () => show());
  const reading = element("div");
  const tooltip = element("div", { class: "tooltip", role: "status", hidden: "" });
  const steps = () => runs[Number(run.select.value)].steps;
  let wanted = null; // the step to stay at when another run is chosen; at first none
  root.append(element("div", { class: "pickers" }, run.label, step.label, problem.label, colouring.label), reading);
  document.body.append(tooltip);
  fill(run.select, runs.map((one) => one.label), 0);
  fill(colouring.select, Object.keys(COLOURINGS), 0);
  refill();

  function refill() {
    const found = steps().findIndex((one) => one.step === wanted);
    const index = Math.max(0, found);
    fill(step.select, steps().map((one) => `${one.step} (ratio ${round(one.rows[0].ratio, 2)})`), index);
    fill(problem.select, steps()[index].rows.map(named), Number(problem.select.value) || 0);
    show();
  }

  function show() {
    hide();
    const row = steps()[Number(step.select.value)].rows[Number(problem.select.value)];
    const style = COLOURINGS[Object.keys(COLOURINGS)[Number(colouring.select.value)]];
    reading.replaceChildren(
      element("div", { class: "reading" },
        block("Problem", row.problem),
        block(`Hint as the teacher saw it (ratio ${round(row.ratio, 3)})`, row.hint || "No hint: no teacher view was scored."),
        element("div", { class: "wide" },
          element("h3", {}, `The student's completion: ${outcome(row)}`),
          tokens(row, style), scalebar(row, style),
          ...[["What the student read", row.student], ["What the teacher read", row.teacher]].filter(([, text]) => text)
            .map(([title, text]) => element("details", {}, element("summary", {}, title), element("pre", { class: "text" }, text))))),
    );
  }

  function tokens(row, style) {
    const scored = row.streams.length > 0;
    const box = element("div", { class: "tokens", tabindex: "0", role: "group", "aria-label": "Completion; arrow keys move between tokens" });
    row.tokens.forEach((text, i) => {
      const span = element("span", { "data-token": i }, visible(text));
      if (scored) paint(span, style.share(row.streams, i));
      box.append(span);
    });
    if (row.hidden) box.append(element("span", { class: "special" }, ` ... (${row.hidden} more tokens)`));
    const choose = (i) => scored && row.tokens[i] !== undefined && select(box, row, i);
    box.addEventListener("pointerover", (event) => event.target.dataset.token && choose(Number(event.target.dataset.token)));
    box.addEventListener("click", (event) => event.target.dataset.token && choose(Number(event.target.dataset.token)));
    box.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hide());
    box.addEventListener("focusout", hide);
    box.addEventListener("keydown", (event) => {
      if (event.key === "Escape") return hide();
      const move = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!move) return undefined;
      event.preventDefault();
      const at = box.querySelector(".chosen");
      return choose(at ? Math.max(0, Math.min(row.tokens.length - 1, Number(at.dataset.token) + move)) : 0);
    });
    return box;
  }

  function select(box, row, i) {
    box.querySelector(".chosen")?.classList.remove("chosen");
    const span = box.querySelector(`[data-token="${i}"]`);
    span.classList.add("chosen");
    const rows = VALUES.map(([name, value]) => element("tr", {},
      element("th", { scope: "row" }, name), element("td", { class: "number" }, round(value(row.streams, i), 3))));
    tooltip.replaceChildren(element("b", {}, `${i + 1}: ${JSON.stringify(row.tokens[i])}`), element("table", {}, element("tbody", {}, ...rows)));
    tooltip.hidden = false;
    const place = span.getClientRects()[0] || span.getBoundingClientRect();
    const width = document.documentElement.clientWidth;
    const below = place.bottom + 8 + tooltip.offsetHeight < window.innerHeight;
    tooltip.style.left = `${window.scrollX + Math.max(8, Math.min(place.left, width - tooltip.offsetWidth - 8))}px`;
    tooltip.style.top = `${window.scrollY + (below ? place.bottom + 8 : place.top - tooltip.offsetHeight - 8)}px`;
  }

  function hide() {
    tooltip.hidden = true;
    reading.querySelector(".chosen")?.classList.remove("chosen");
  }
}

function paint(span, share) {
  if (!(Math.abs(share) > 0.02)) return;
  span.classList.add("heat");
  span.style.setProperty("--tint", share > 0 ? "var(--heat)" : "var(--cool)");
  span.style.setProperty("--share", Math.abs(share).toFixed(3));
}

function scalebar(row, style) {
  if (!row.streams.length) return element("p", { class: "muted" }, "This completion was not scored by a teacher.");
  const ramp = element("span", { class: "ramp", "aria-hidden": "true" });
  const strong = (tint) => `color-mix(in srgb, var(${tint}) 62%, transparent)`;
  ramp.style.background = `linear-gradient(90deg, ${style.both ? strong("--cool") + ", " : ""}transparent, ${strong("--heat")})`;
  return element("div", { class: "scalebar" }, style.low, ramp, style.high());
}

function block(title, text) {
  return element("div", {}, element("h3", {}, title), element("pre", { class: "text", tabindex: "0" }, text));
}

function named(row, index) {
  return `${index + 1}: ${row.id}${row.level ? `, ${row.level}` : ""}, ${graded(row)}`;
}

function graded(row) {
  if (row.reward === null) return "not gradable";
  return row.reward === 1 ? "right" : row.reward === 0 ? "wrong" : `reward ${round(row.reward, 2)}`;
}

function outcome(row) {
  return graded(row) + (row.stop === "length" ? ", cut at the length limit" : "");
}

// A line break would be invisible and an empty token impossible to point at: show a mark.
function visible(text) {
  return text.replaceAll("\n", "\u21b5\n") || "\u2205";
}

function round(value, digits) {
  return value === null || value === undefined ? "n/a" : String(Number(value.toFixed(digits))).replace("-", "\u2212");
}

drawAll();
const root = document.getElementById("inspector");
if (root) inspector(root);
