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
const ROUTES = {
  distil: "distilled", rl: "reinforced", both: "distilled and reinforced", nll: "trained on its reference", skip: "skipped",
};
// How a conversation ended, in words.
const ENDED = {
  over: "the environment ended it", limit: "the limit of turns was reached", length: "a reply was cut at the length limit",
  context: "the context was full", error: "the environment failed", hang: "the environment did not answer in time",
  not_text: "the environment said no text", bad_reward: "the environment gave no finite reward",
};
// What a token is trained by, in words. A distilled token of weight 0 does not feed the distillation loss.
const KINDS = {
  distil: "distilled towards the teacher", rl: "reinforced by the reward", both: "distilled and reinforced",
  nll: "trained on as the reference", none: "in no loss",
};
// How a token is coloured: share in [-1, 1] of the strongest colour, negative shares blue; or by the losses it feeds.
// `taught` are colours that only a completion scored by a teacher has.
const COLOURINGS = {
  "divergence": {
    taught: true,
    share: (streams, i) => Math.sqrt(Math.min(1, Math.max(0, streams[DIVERGENCE][i]) / data.rollouts.scale)),
    low: "0", high: () => `${data.rollouts.scale} nats or more`,
  },
  "gate: weight in the distillation loss": {
    taught: true, weight: true,
    share: (streams, i) => Math.max(-1, Math.min(1, streams[GATE][i])),
    low: "0: ignored", high: () => "1: full weight",
    bottom: "\u22121: pushed away",
  },
  "component: which losses it feeds": { kinds: true },
  "teacher minus student log-prob": {
    taught: true,
    share: (streams, i) => Math.max(-1, Math.min(1, (streams[STUDENT][i] - streams[TEACHER][i]) / 3)),
    bottom: "teacher finds it likelier (+3)", high: () => "less likely (\u22123)", both: true,
  },
  "student entropy": { share: (streams, i) => Math.min(1, streams[ENTROPY][i] / 2), low: "0", high: () => "2 nats or more" },
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
  const colourings = Object.keys(COLOURINGS).filter((name) => data.rollouts.taught || !COLOURINGS[name].taught);
  const reading = element("div");
  const tooltip = element("div", { class: "tooltip", role: "status", hidden: "" });
  const steps = () => runs[Number(run.select.value)].steps;
  let wanted = null; // the step to stay at when another run is chosen; at first none
  root.append(element("div", { class: "pickers" }, run.label, step.label, problem.label, colouring.label), reading);
  document.body.append(tooltip);
  fill(run.select, runs.map((one) => one.label), 0);
  fill(colouring.select, colourings, 0);
  refill();

  function refill() {
    const found = steps().findIndex((one) => one.step === wanted);
    const index = Math.max(0, found);
    fill(step.select, steps().map(dated), index);
    fill(problem.select, steps()[index].rows.map(named), Number(problem.select.value) || 0);
    show();
  }

  function show() {
    hide();
    const row = steps()[Number(step.select.value)].rows[Number(problem.select.value)];
    const style = COLOURINGS[colourings[Number(colouring.select.value)]];
    reading.replaceChildren(
      element("div", { class: "reading" },
        block("Problem", row.problem),
        distilled(row) ? hint(row)
          : block("Hint", "None: no teacher read this completion."),
        row.turns ? conversation(row, style) : completion(row, style)),
    );
    for (const view of reading.querySelectorAll(".view")) view.scrollTop = view.scrollHeight; // what is new stands last
  }

  function completion(row, style) {
    return element("div", { class: "wide" },
      element("h3", {}, `The student's completion: ${outcome(row)}`),
      training(row), tokens(row, style), key([row], style),
      ...[["What the student read", row.student], ["What the teacher read", row.teacher]].filter(([, text]) => text)
        .map(([title, text]) => folded(title, text)));
  }

  // A masked hint is shown whole, each token as dark as the share of layers and heads whose attention reaches it.
  function hint(row) {
    const title = `Hint as the teacher saw it (ratio ${round(row.ratio, 3)}${attended(row)})`;
    if (!row.shades) return block(title, row.hint);
    const text = element("pre", { class: "text shaded", tabindex: "0" });
    for (const [part, share] of row.shades) {
      const said = `reached by ${round(100 * share, 0)} % of layers and heads`;
      const span = element("span", { title: said, "data-share": share }, part);
      span.style.setProperty("--share", share);
      text.append(span);
    }
    return element("div", {}, element("h3", {}, title), text,
      element("p", { class: "muted" }, "The stronger a token's ground, the more layers and heads of the teacher reach it; none reach a faint one."));
  }

  // Of its tokens attention reaches as many in every layer and head, or on average.
  function attended(row) {
    return row.attended ? `; attention reaches ${row.attended[0]} of ${row.attended[1]} tokens` : "";
  }

  // Turn by turn: what the environment said, the action, and beside it what the teacher had read when it scored that.
  function conversation(row, style) {
    const read = { student: [], teacher: [] };
    const cards = row.turns.map((turn, index) => {
      for (const role of ["student", "teacher"]) {
        const before = turn.anew.includes(role) ? [] : read[role][index - 1] || [];
        read[role].push([...before, turn[role]]);
      }
      return element("li", { class: "turn" },
        element("div", {},
          element("h4", {}, `Turn ${index + 1}: observation`),
          element("pre", { class: "text", tabindex: "0" }, turn.observation || "nothing besides the problem"),
          element("h4", {}, "Action"),
          tokens(turn, style, !style.kinds && !style.weight), strength(turn),
          folded("What the student read", read.student[index].join(""))),
        element("div", {}, element("h4", {}, "The teacher's view"), ...view(row, turn, read.teacher[index], index)));
    });
    return element("div", { class: "wide" },
      element("h3", {}, `The conversation: ${outcome(row)}`),
      training(row), key(row.turns, style), ...(distilled(row) && !style.kinds && !style.weight ? [bars(row.turns)] : []),
      element("ol", { class: "turns" }, ...cards));
  }

  // The teacher's prompt at a turn: its history is faint, the hint is marked.
  function view(row, turn, parts, index) {
    if (!distilled(turn)) return [element("p", { class: "muted" }, "No teacher read this turn.")];
    const text = element("pre", { class: "text view", tabindex: "0" });
    parts.forEach((part, place) => {
      const at = place === 0 && row.hint ? part.indexOf(row.hint) : -1;
      const inside = at < 0 ? [part] : [part.slice(0, at), element("mark", {}, row.hint), part.slice(at + row.hint.length)];
      text.append(element("span", { class: place === parts.length - 1 ? "fresh" : "history" }, ...inside));
    });
    const what = index ? `Its own conversation up to this turn, ratio ${round(row.ratio, 3)}:`
      : `The problem, the hint (marked) at ratio ${round(row.ratio, 3)}, the observation:`;
    return [element("p", { class: "muted" }, what), text];
  }

  function tokens(row, style, barred = false) {
    const scored = row.streams.length > 0;
    const box = element("div", { class: "tokens", tabindex: "0", role: "group", "aria-label": "Completion; arrow keys move between tokens" });
    row.tokens.forEach((text, i) => {
      const span = element("span", { "data-token": i }, visible(text));
      if (style.kinds) span.classList.add("kind", `kind-${kind(row, i)}`);
      else if (scored) paint(span, style.share(row.streams, i));
      if (scored && style.weight && row.streams[GATE][i] === 0) span.classList.add("weightless");
      if (barred && scored && row.streams[GATE].length) bar(span, row.streams[GATE][i]);
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
    reading.querySelector(".chosen")?.classList.remove("chosen");
    const span = box.querySelector(`[data-token="${i}"]`);
    span.classList.add("chosen");
    const rows = VALUES.map(([name, value]) => element("tr", {},
      element("th", { scope: "row" }, name), element("td", { class: "number" }, round(value(row.streams, i), 3))));
    rows.push(element("tr", {}, element("th", { scope: "row" }, "component"), element("td", {}, KINDS[kind(row, i)])));
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

// The gate as a bar under a token, as strong as the weight; another colour where it is negative.
function bar(span, gate) {
  span.classList.add("gated");
  span.style.setProperty("--bar", gate < 0 ? "var(--rl)" : "var(--distil)");
  span.style.setProperty("--gate", Math.min(1, Math.abs(gate)).toFixed(3));
}

function bars(turns) {
  const example = (gate) => {
    const span = element("span", { class: "sample" }, "\u2003");
    bar(span, gate);
    return span;
  };
  const negative = turns.some((turn) => turn.streams.length && turn.streams[GATE].some((gate) => gate < 0));
  return element("div", { class: "scalebar" }, "The bar under a token is its gate:", example(0.1), "0.1", example(1), "1",
    ...(negative ? [example(-1), "\u22121: pushed away"] : []));
}

// Means over an action's tokens, in words.
function strength(turn) {
  const parts = [["divergence", DIVERGENCE, " nats"], ["gate", GATE, ""]]
    .filter(([, stream]) => turn.streams.length && turn.streams[stream].length)
    .map(([name, stream, unit]) => `${name} ${round(mean(turn.streams[stream]), 3)}${unit}`);
  return element("p", { class: "muted" }, parts.length ? `Mean over the action: ${parts.join(", ")}` : "Not scored by a teacher.");
}

function mean(values) {
  return values.reduce((sum, value) => sum + value, 0) / values.length;
}

function folded(title, text) {
  return element("details", {}, element("summary", {}, title), element("pre", { class: "text" }, text));
}

// How the group and the completion were trained.
function training(row) {
  const fact = (name, value) => element("li", {}, `${name}: `, element("b", {}, value));
  const reinforced = row.components.includes("rl");
  const sign = row.advantage > 0 ? "+" : "";
  return element("ul", { class: "facts" },
    ...(row.route ? [fact("Route of the group", ROUTES[row.route] || row.route)] : []),
    fact("Components", row.components.join(", ") || "none, not trained on"),
    fact("Advantage", row.advantage === null || !(reinforced || row.advantage) ? "none" : sign + round(row.advantage, 3)));
}

function distilled(row) {
  return row.components.includes("distil");
}

function kind(row, i) {
  const weight = row.streams.length ? row.streams[GATE][i] : 1;
  const distils = distilled(row) && weight !== 0;
  const reinforced = row.components.includes("rl");
  if (distils) return reinforced ? "both" : "distil";
  if (reinforced) return "rl";
  return row.components.includes("nll") ? "nll" : "none";
}

function key(turns, style) {
  return style.kinds ? kindlist(turns) : scalebar(turns, style);
}

// The losses that tokens of these completions feed, each drawn as its tokens are, in words, with its number of tokens.
function kindlist(turns) {
  const counts = {};
  for (const row of turns) row.tokens.forEach((_, i) => { counts[kind(row, i)] = (counts[kind(row, i)] || 0) + 1; });
  const total = turns.reduce((sum, row) => sum + row.tokens.length, 0);
  return element("ul", { class: "kinds", "aria-label": "Losses that the tokens feed" },
    ...Object.keys(KINDS).filter((name) => counts[name]).map((name) => element("li", {},
      element("span", { class: `kind kind-${name}` }, name), ` ${KINDS[name]}: ${counts[name]} of ${total} tokens`)));
}

function scalebar(turns, style) {
  const what = turns.length > 1 ? "conversation" : "completion";
  if (!turns.some((row) => row.streams.length)) return element("div", { class: "scalebar" }, `No loss was taken on this ${what}.`);
  if (style.taught && !turns.some(distilled)) {
    return element("div", { class: "scalebar" }, `No teacher scored this ${what}: it can be coloured by component or by entropy.`);
  }
  const both = style.both || (style.weight && turns.some((row) => row.streams.length && row.streams[GATE].some((value) => value < 0)));
  const ramp = element("span", { class: "ramp", "aria-hidden": "true" });
  const strong = (tint) => `color-mix(in srgb, var(${tint}) 62%, transparent)`;
  ramp.style.background = `linear-gradient(90deg, ${both ? strong("--cool") + ", " : ""}transparent, ${strong("--heat")})`;
  return element("div", { class: "scalebar" }, both ? style.bottom : style.low, ramp, style.high());
}

function block(title, text) {
  return element("div", {}, element("h3", {}, title), element("pre", { class: "text", tabindex: "0" }, text));
}

function named(row, index) {
  const losses = row.components.join(" + ") || "no loss";
  return `${index + 1}: ${row.id}${row.level ? `, ${row.level}` : ""}, ${graded(row)}${row.turns ? `, ${row.of} turns` : ""}${losses === "distil" ? "" : `, ${losses}`}`;
}

// The exposure ratio belongs to the first completion that a teacher read.
function dated(one) {
  const read = one.rows.find(distilled);
  return read ? `${one.step} (ratio ${round(read.ratio, 2)})` : String(one.step);
}

function graded(row) {
  if (row.reward === null) return "not gradable";
  return row.reward === 1 ? "right" : row.reward === 0 ? "wrong" : `reward ${round(row.reward, 2)}`;
}

function outcome(row) {
  if (!row.turns) return graded(row) + (row.stop === "length" ? ", cut at the length limit" : "");
  const kept = row.turns.length < row.of ? `the first ${row.turns.length} of ${row.of} turns` : `${row.of} turn${row.of === 1 ? "" : "s"}`;
  const invalid = row.invalid ? `, ${row.invalid} invalid action${row.invalid === 1 ? "" : "s"}` : "";
  return `${graded(row)}, ${kept}${invalid}; ${ENDED[row.ended] || row.ended || "why it ended was not kept"}`;
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
