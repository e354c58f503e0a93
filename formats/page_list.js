"use strict";
// The list of solutions: its rows, the step that is opened, and the keys.

function drawList() {
  const matching = solutions.map((_, number) => number).filter(isShown);
  const shown = matching.slice(0, state.shown);
  for (const number of shown) {
    if (!rows.has(number)) rows.set(number, makeRow(number));
    refreshRow(number);
  }
  byId("list").replaceChildren(...shown.map(number => rows.get(number)));
  ensureTabStop();
  byId("count").textContent = countText(matching);
  const hidden = matching.length - shown.length;
  byId("more").hidden = hidden === 0;
  byId("more").textContent = `Show ${Math.min(PAGE_OF_ROWS, hidden)} more of ${hidden}`;
  byId("legend").textContent = legendText();
}

function showMore() {
  const before = state.shown;
  state.shown += PAGE_OF_ROWS;
  drawList();
  byId("list").children[before]?.querySelector(".step")?.focus();
}

function isShown(number) {
  const {source, label, id, problem} = solutions[number];
  if (state.source && source !== state.source) return false;
  const words = state.find.trim().toLowerCase();
  if (words && !`${id} ${problem}`.toLowerCase().includes(words)) return false;
  if (state.differing && !differingSteps(judges, number, state.k, state.threshold).size) return false;
  const judge = focused();
  const line = judge.lineOf[number];
  if (line < 0) return state.outcome === "all" && !state.disagreeing && !state.cutOff && !state.nullReward;
  const outcome = outcomeOf(judge, line, label);
  if (state.outcome !== "all" && outcome !== state.outcome) return false;
  if (state.disagreeing && !samplesDisagree(judge, line, kOf(judge), state.threshold)) return false;
  if (state.cutOff && !hasCutOff(judge, line, kOf(judge))) return false;
  return !state.nullReward || hasNullReward(judge, line, kOf(judge));
}

function outcomeOf(judge, line, label) {
  if (label === null) return "unlabelled";
  return predict(judge, line, rewardsOf(judge, kOf(judge)), state.threshold) === label ? "right" : "wrong";
}

function countText(matching) {
  let text = `${matching.length} of ${named(solutions.length, "solution")}`;
  if (judges.length > 1) {
    const differing = matching.map(number => differingSteps(judges, number, state.k, state.threshold).size);
    const steps = named(sum(differing), "step");
    const ofSolutions = named(differing.filter(Boolean).length, "solution");
    text += `; the judges differ on ${steps} of ${ofSolutions} of these`;
  }
  return text + ".";
}

function legendText() {
  return (
    "A bar for each step: its height and colour are the reward, the line across is the threshold, and the " +
    "box is the first step that is predicted wrong. ▲ marks the first wrong step by the label" +
    (hasPrmBench() ? " (every wrong one in PRMBench's rows)" : "") +
    (judges.length > 1 ? ", • a step on which the judges differ" : "") +
    ". Enter opens a step; the arrow keys go from bar to bar, Escape closes." +
    (judges.length > 1 ? ` Filters go by the judge in focus, ${focused().name}.` : "")
  );
}

const stepName = t => (t === NO_STEP ? "none" : `step ${t + 1}`);

function labelName({label, wrong}) {
  if (wrong?.length)
    return `wrong: ${wrong.length > 1 ? "steps" : "step"} ${wrong.map(t => t + 1).join(", ")}`;
  if (label === null) return "no label";
  return label === NO_STEP ? "all right" : `wrong: step ${label + 1}`;
}

function makeRow(number) {
  const {id, problem} = solutions[number];
  const name = element(
    "div",
    {class: "name"},
    element("strong", {}, id),
    " ",
    element("span", {class: "problem-start"}, problem),
  );
  const groups = judges.map(judge => judgeGroup(judge, number));
  return element(
    "li",
    {class: "solution", "--judges": judges.length},
    name,
    element("div", {class: "label"}, labelName(solutions[number])),
    ...groups,
    element("div", {class: "opened", hidden: true}),
  );
}

function judgeGroup(judge, number) {
  const line = judge.lineOf[number];
  const group = element("div", {class: "judge", role: "group"});
  if (judges.length > 1)
    group.append(element("span", {class: "judge-name", "aria-hidden": "true"}, judge.name));
  if (line < 0) {
    group.append(element("span", {class: "note"}, "not judged"));
    return group;
  }
  const steps = stepsOf(judge, line);
  const bars = steps.map((step, t) =>
    element(
      "button",
      {
        type: "button",
        class: "step",
        tabindex: -1,
        "aria-expanded": "false",
        onclick: () => toggle(number, judge.number, t),
      },
      element("span", {class: "bar-track"}, element("span", {class: "bar-fill"})),
      element("span", {class: "bar-mark", "aria-hidden": "true"}),
    ),
  );
  const unjudged = solutions[number].steps.length - steps.length;
  if (unjudged) bars.push(element("span", {class: "unjudged"}, `+${unjudged} not judged`));
  group.append(element("div", {class: "bars"}, ...bars), element("span", {class: "said"}));
  return group;
}

/** What depends on the threshold, K and what is open. */
function refreshRow(number) {
  const row = rows.get(number);
  const differing = judges.length > 1 ? differingSteps(judges, number, state.k, state.threshold) : new Set();
  row.querySelectorAll(".judge").forEach((group, i) => {
    if (judges[i].lineOf[number] >= 0) refreshGroup(group, judges[i], number, differing);
  });
  refreshOpened(row, number);
}

function refreshGroup(group, judge, number, differing) {
  const {label} = solutions[number];
  const line = judge.lineOf[number];
  const rewards = rewardsOf(judge, kOf(judge));
  const predicted = predict(judge, line, rewards, state.threshold);
  const outcome = outcomeOf(judge, line, label);
  const opened = state.opened.get(number);
  group.classList.toggle("in-focus", judge === focused());
  group.setAttribute(
    "aria-label",
    `${judge.name}: first wrong step predicted: ${stepName(predicted)}` +
      (label === null ? "" : `; ${outcome}`),
  );
  const said = group.querySelector(".said");
  said.className = `said ${outcome}`;
  said.textContent = {right: "✓ ", wrong: "✗ ", unlabelled: ""}[outcome] + stepName(predicted);
  group.querySelectorAll(".step").forEach((bar, t) => {
    const reward = rewards[judge.firstStep[line] + t];
    const isOpen = opened?.judge === judge.number && opened.step === t;
    bar.style.setProperty("--reward", Number.isNaN(reward) ? 0 : reward);
    bar.classList.toggle("null", Number.isNaN(reward));
    bar.classList.toggle("predicted", t === predicted);
    const marked = isWrong(solutions[number], t);
    bar.querySelector(".bar-mark").textContent = (marked ? "▲" : "") + (differing.has(t) ? "•" : "");
    bar.setAttribute("aria-expanded", isOpen);
    bar.setAttribute("aria-label", barName(judge, t, reward, {predicted, marked, differs: differing.has(t)}));
  });
}

function barName(judge, t, reward, {predicted, marked, differs}) {
  const parts = [
    `${judge.name}, step ${t + 1}`,
    Number.isNaN(reward) ? "reward null" : `reward ${reward.toFixed(3)}`,
  ];
  if (t === predicted) parts.push("first predicted wrong");
  if (marked) parts.push("labelled wrong");
  if (differs) parts.push("judges differ");
  return parts.join(", ");
}

// -------------------------------------------------------------------------------------- an opened step

async function toggle(number, judge, step) {
  const opened = state.opened.get(number);
  if (opened?.judge === judge && opened.step === step) {
    state.opened.delete(number);
  } else {
    await loadTexts(judge, number);
    state.opened.set(number, {judge, step});
  }
  refreshRow(number);
}

/** Unpack the analyses of a judged solution, once. null: they are not in the page. */
async function loadTexts(judge, number) {
  const name = `texts-${judge}-${number}`;
  if (!texts.has(name)) texts.set(name, byId(name) ? await unpackJson(name) : null);
}

function refreshOpened(row, number) {
  const panel = row.querySelector(".opened");
  const opened = state.opened.get(number);
  panel.hidden = !opened;
  panel.replaceChildren(...(opened ? openedStep(number, judges[opened.judge], opened.step) : []));
}

function openedStep(number, judge, t) {
  const {problem, steps} = solutions[number];
  const close = element(
    "button",
    {type: "button", class: "close", onclick: () => closeOpened(number)},
    "Close",
  );
  const listed = steps.map((text, i) => {
    const item = element("li", {class: i > t ? "later" : ""}, text);
    if (i === t) item.className = "now";
    if (i === t) item.setAttribute("aria-current", "step");
    if (isWrong(solutions[number], i)) item.append(element("span", {class: "mark"}, " ▲ wrong"));
    return item;
  });
  return [
    element("p", {class: "problem"}, problem),
    element("ol", {class: "steps", "aria-label": "Steps"}, ...listed),
    close,
    element("h3", {}, `Step ${t + 1}: P(Yes) of its analyses`),
    ...judges.map(own => dotLine(own, number, t, own === judge)),
    ...analysesOfStep(judge, number, t),
  ];
}

function closeOpened(number) {
  const {judge, step} = state.opened.get(number);
  const group = rows.get(number).querySelectorAll(".judge")[judge];
  state.opened.delete(number);
  refreshRow(number);
  group.querySelectorAll(".step")[step].focus();
}

/** The samples of a judge as dots on a line from 0 to 1; those that would hide each other are piled up. */
function dotLine(judge, number, t, isOpened) {
  const samples = samplesOf(judge, number, t);
  if (!samples) return "";
  const known = samples.filter(sample => sample.counted && !Number.isNaN(sample.pYes));
  const step = judge.firstStep[judge.lineOf[number]] + t;
  const reward = rewardsOf(judge, kOf(judge))[step];
  const piles = new Map();
  const dots = known.map(sample => {
    const pile = Math.round(sample.pYes * 60);
    piles.set(pile, (piles.get(pile) ?? -1) + 1);
    const title = `analysis ${sample.number}: ${sample.verdict}, P(Yes) ${sample.pYes.toFixed(3)}`;
    return element("span", {
      class: `sample-dot ${sample.verdict}`,
      "--p": sample.pYes,
      "--pile": piles.get(pile),
      title,
    });
  });
  const tallest = Math.max(1, ...piles.values());
  const isNull = Number.isNaN(reward);
  const mark = isNull ? [] : [element("span", {class: "reward-tick", "--p": reward})];
  const text = isNull ? "reward null" : `reward ${reward.toFixed(3)}`;
  const spoken = `${judge.name}: ${text}; P(Yes) ${known.map(sample => sample.pYes.toFixed(3)).join(", ")}`;
  return element(
    "div",
    {class: `dot-row${isOpened ? " in-focus" : ""}`},
    element("span", {class: "dot-name"}, judge.name),
    element(
      "div",
      {
        class: "dots",
        role: "img",
        "aria-label": spoken,
        "--height": tallest,
        "--rise": `${Math.min(5, 50 / tallest)}px`,
      },
      element("span", {class: "threshold-tick"}),
      ...mark,
      ...dots,
    ),
    element("span", {class: "dot-reward"}, text),
  );
}

/** [{number, verdict, pYes, tokens, cutOff, forced, counted, text}] of a step; null where not judged. */
function samplesOf(judge, number, t) {
  const line = judge.lineOf[number];
  if (line < 0 || judge.firstStep[line] + t >= judge.firstStep[line + 1]) return null;
  const step = judge.firstStep[line] + t;
  const [first, end] = analysesOf(judge, step, judge.k);
  const written = texts.get(`texts-${judge.number}-${number}`)?.[t];
  const samples = [];
  for (let i = first; i < end; i++) {
    const flags = judge.flags[i];
    samples.push({
      number: i - first + 1,
      pYes: judge.pYes[i],
      tokens: judge.tokens[i],
      text: written?.[i - first],
      verdict: flags & YES ? "Yes" : flags & NO ? "No" : "missing",
      cutOff: Boolean(flags & CUT_OFF),
      forced: Boolean(flags & FORCED),
      counted: i - first < state.k,
    });
  }
  return samples;
}

/** A card for each text, with all samples that have it. */
function analysesOfStep(judge, number, t) {
  const samples = samplesOf(judge, number, t);
  if (!samples.length) {
    const note = "This step has no analyses: its prompt was longer than the model's context.";
    return [element("p", {class: "note"}, note)];
  }
  if (samples[0].text === undefined) {
    const note = "The texts of these analyses are left out, since the page would be too large.";
    return [element("p", {class: "note"}, note)];
  }
  const cards = new Map();
  for (const sample of samples) {
    const key = JSON.stringify({...sample, number: 0});
    if (!cards.has(key)) cards.set(key, []);
    cards.get(key).push(sample);
  }
  const attributes = {class: "analyses", "aria-label": `Analyses by ${judge.name}`};
  return [element("ul", attributes, ...[...cards.values()].map(analysisCard))];
}

function analysisCard(samples) {
  const {verdict, pYes, tokens, cutOff, forced, counted, text} = samples[0];
  const numbers = samples.map(sample => sample.number).join(", ");
  const facts = [Number.isNaN(pYes) ? "P(Yes) unknown" : `P(Yes) ${pYes.toFixed(3)}`, named(tokens, "token")];
  if (cutOff) facts.push("cut off");
  if (forced) facts.push("forced: read after an added line");
  if (!counted) facts.push(`not counted at K = ${state.k}`);
  return element(
    "li",
    {class: counted ? "" : "uncounted"},
    element(
      "p",
      {class: "facts"},
      element("span", {class: "numbers"}, `${samples.length > 1 ? "Analyses" : "Analysis"} ${numbers}`),
      " ",
      element("strong", {class: `verdict ${verdict}`}, verdict === "missing" ? "no verdict" : verdict),
      " ",
      facts.join(" · "),
    ),
    element("p", {class: "text"}, text || "(no text: P(Yes) was read straight after the prompt)"),
  );
}

// -------------------------------------------------------------------------------------- keys

/** The list is one tab stop: the bar that was last in focus. */
function makeTabStop(bar) {
  tabStop?.setAttribute("tabindex", "-1");
  bar.setAttribute("tabindex", "0");
  tabStop = bar;
}

function keepTabStop(event) {
  if (event.target.matches(".step")) makeTabStop(event.target);
}

function ensureTabStop() {
  const bar = tabStop?.isConnected ? tabStop : byId("list").querySelector(".step");
  if (bar) makeTabStop(bar);
}

function moveByKeys(event) {
  const row = event.target.closest(".solution");
  if (event.key === "Escape" && row) {
    const number = [...rows].find(([, own]) => own === row)[0];
    if (state.opened.has(number)) closeOpened(number);
    return;
  }
  if (!event.target.matches(".step")) return;
  const bars = [...row.querySelectorAll(".step")];
  const at = bars.indexOf(event.target);
  const targets = {
    ArrowRight: bars[at + 1],
    ArrowLeft: bars[at - 1],
    Home: bars[0],
    End: bars.at(-1),
    ArrowDown: barIn(row.nextElementSibling, at),
    ArrowUp: barIn(row.previousElementSibling, at),
  };
  if (!(event.key in targets)) return;
  event.preventDefault();
  targets[event.key]?.focus();
}

/** The bar of a row at the same number, or its last one. */
function barIn(row, at) {
  const bars = row ? [...row.querySelectorAll(".step")] : [];
  return bars[Math.min(at, bars.length - 1)];
}
