"use strict";
// The page: its state, the figures, the list of solutions, the step that is opened, and the keys.

const PAGE_OF_ROWS = 50; // solutions that are shown at a time
const DASHES = 4;        // ways in which the judges' lines are dashed (page.css)

let page;      // the header: {threshold, judges, curves, texts, texts_left_out}
let solutions; // [{source, id, problem, steps, label}]
let judges;    // what page_numbers.js says

const state = {
  threshold: 0.5, k: 1, judge: 0, source: "",
  outcome: "all", disagreeing: false, cutOff: false, nullReward: false, differing: false, find: "",
  shown: PAGE_OF_ROWS,
  opened: new Map(), // solution -> {judge, step}
};
const rows = new Map();  // solution -> its row, once made
const texts = new Map(); // name of a data block -> its texts, once unpacked

let tabStop = null;      // the bar that the Tab key goes to

const byId = id => document.getElementById(id);
/** named(2, "step") -> "2 steps". */
const named = (number, noun, plural = `${noun}s`) => `${number} ${number === 1 ? noun : plural}`;

async function start() {
  if (!("DecompressionStream" in window)) {
    byId("about").textContent = "This browser cannot unpack the page: it has no DecompressionStream. Please take one from 2023 or later.";
    return;
  }
  page = await unpackJson("page");
  solutions = await unpackJson("solutions");
  judges = await Promise.all(page.judges.map((header, i) => unpackJudge(i, header, solutions.length)));
  byId("about").textContent = describePage();
  if (judges.length) startScores();
  if (page.curves.length) startCurves();
  document.body.dataset.ready = "yes";
}

function describePage() {
  const parts = [];
  if (judges.length) {
    const steps = sum(judges.map(judge => judge.firstAnalysis.length - 1));
    const analyses = sum(judges.map(judge => judge.pYes.length));
    parts.push(`${named(solutions.length, "solution")} judged by ${judges.map(judge => judge.name).join(", ")}: ` +
      `${named(steps, "judged step")}, ${named(analyses, "analysis", "analyses")}.`);
  }
  if (page.curves.length) parts.push(`Training runs: ${page.curves.map(run => run.name).join(", ")}.`);
  if (page.texts_left_out) {
    parts.push(`The texts of the analyses of ${page.texts_left_out} of ${page.texts} judged solutions are left out, since the page ` +
      "would be too large; those of wrong predictions and disagreeing samples were kept first.");
  }
  return parts.join(" ");
}

/** Show a section, and the link to it. */
function reveal(id) {
  byId(id).hidden = false;
  document.querySelector(`a[href="#${id}"]`).hidden = false;
}

function startScores() {
  state.threshold = page.threshold;
  state.k = Math.max(...judges.map(judge => judge.k));
  state.judge = judges.length - 1;
  makeControls();
  reveal("scores");
  reveal("solutions-section");
  byId("list").addEventListener("keydown", moveByKeys);
  byId("list").addEventListener("focusin", event => event.target.matches(".step") && makeTabStop(event.target));
  update();
}

// ------------------------------------------------------------------------------------------------ controls

function makeControls() {
  judges.forEach((judge, i) => byId("judges").append(judgeChoice(judge, i)));
  byId("judges").hidden = judges.length < 2;
  byId("differing-label").hidden = judges.length < 2;

  for (let k = 1; k <= state.k; k++) byId("k").append(new Option(k, k));
  byId("k").value = state.k;
  const sources = [...new Set(solutions.map(solution => solution.source))];
  byId("source").append(new Option("all", ""), ...sources.map(source => new Option(source, source)));
  byId("source-label").hidden = sources.length < 2;
  byId("threshold").value = state.threshold;

  bind("threshold", "input", input => { state.threshold = Number(input.value); });
  bind("k", "change", input => { state.k = Number(input.value); });
  bind("source", "change", input => { state.source = input.value; });
  bind("outcome", "change", input => { state.outcome = input.value; });
  bind("disagreeing", "change", input => { state.disagreeing = input.checked; });
  bind("cut-off", "change", input => { state.cutOff = input.checked; });
  bind("null", "change", input => { state.nullReward = input.checked; });
  bind("differing", "change", input => { state.differing = input.checked; });
  bind("find", "input", input => { state.find = input.value; });
  byId("more").addEventListener("click", showMore);
}

/** The input changes the state, and all that is drawn follows; the list begins anew. */
function bind(id, event, change) {
  byId(id).addEventListener(event, () => {
    change(byId(id));
    state.shown = PAGE_OF_ROWS;
    update();
  });
}

function judgeChoice(judge, i) {
  const choose = () => { state.judge = i; update(); };
  const input = element("input", {type: "radio", name: "judge", value: i, checked: i === state.judge, onchange: choose});
  const sample = svgElement("svg", {class: "sample", viewBox: "0 0 30 10", "aria-hidden": "true"},
    svgElement("path", {class: `curve dash${i % DASHES}`, d: "M0 5 L30 5"}));
  return element("label", {}, input, " ", judge.name, " ", sample);
}

function update() {
  document.documentElement.style.setProperty("--threshold", state.threshold);
  byId("threshold-value").value = state.threshold.toFixed(2);
  drawHeadline();
  drawSummary();
  byId("figures").replaceChildren(...figures());
  drawList();
}

// ------------------------------------------------------------------------------------------------ figures

const focused = () => judges[state.judge];
const kOf = judge => Math.min(state.k, judge.k);
const styleOf = judge => `${judge === focused() ? "focus" : "other"} dash${judge.number % DASHES}`;
/** The judges, the one in focus last, so that it is drawn over the others. */
const focusLast = () => [...judges.filter(judge => judge !== focused()), focused()];

function drawHeadline() {
  const {f1, error_accuracy, correct_accuracy} = headline(focused(), solutions, state.source, kOf(focused()), state.threshold);
  const figure = (name, value) => [`${name} `, element("strong", {}, fixed(value)), " "];
  byId("headline").replaceChildren(
    ...figure("F1", f1), ...figure("error", error_accuracy), ...figure("correct", correct_accuracy));
}

const COLUMNS = [["K", "k", 0], ["solutions", "solutions", 0], ["error acc.", "error_accuracy", 1], ["correct acc.", "correct_accuracy", 1],
  ["F1", "f1", 1], ["unparsed", "unparsed", 1], ["cut off", "truncated", 1], ["forced", "forced", 0], ["null", "null_rewards", 0],
  ["tokens/step", "tokens_per_step", 0]];

function drawSummary() {
  const cells = [];
  for (const judge of judges) {
    const all = summaryRows(judge, solutions, kOf(judge), state.threshold);
    for (const row of all.filter(row => !state.source || row.source === state.source)) {
      const name = judges.length > 1 ? `${judge.name}: ${row.source}` : row.source;
      cells.push([name, ...COLUMNS.map(([, field, digits]) => fixed(row[field], digits))]);
    }
  }
  const caption = `Accuracies at threshold ${state.threshold.toFixed(2)}`;
  fillTable(byId("summary"), caption, [judges.length > 1 ? "judge: file" : "file", ...COLUMNS.map(([title]) => title)], cells);
}

function figures() {
  return [f1AgainstThreshold(), rewardsOfSteps(), reliabilityOfRewards(), f1AgainstK(), f1AgainstTokens(), tokensOfAnalyses()];
}

const PERCENT = {label: "F1 (%)", min: 0, max: 100};

function f1AgainstThreshold() {
  const curves = focusLast().map(judge => ({judge, points: thresholdCurve(judge)}));
  const lines = curves.map(({judge, points}) => ({kind: "line", className: styleOf(judge), points}));
  const rowsOfTable = curves.flatMap(({judge, points}) =>
    points.filter((_, i) => i % 10 === 0).map(([threshold, f1]) => [judge.name, threshold.toFixed(1), fixed(f1)]));
  return chart({
    title: "F1 against the threshold",
    note: "A threshold that is chosen here is chosen on these solutions; report what it gives on others.",
    x: {label: "threshold", min: 0, max: 1}, y: PERCENT,
    marks: [{kind: "upright", at: state.threshold}, ...lines],
    table: {head: ["judge", "threshold", "F1"], rows: rowsOfTable},
  });
}

/** [[threshold, F1]] at 0, 0.01, ..., 1. */
function thresholdCurve(judge) {
  return remembered(judge, `threshold curve ${kOf(judge)} ${state.source}`, () => {
    const points = [];
    for (let i = 0; i <= 100; i++) {
      const {f1} = headline(judge, solutions, state.source, kOf(judge), i / 100);
      if (f1 !== null) points.push([i / 100, f1]);
    }
    return points;
  });
}

/** Steps with their labels, as `labelledSteps` gives them, at the K and the source in use. */
function labelled(judge) {
  const key = `labelled ${kOf(judge)} ${state.source}`;
  return remembered(judge, key, () => labelledSteps(judge, solutions, state.source, kOf(judge)));
}

function rewardsOfSteps() {
  const steps = labelled(focused());
  const shares = wanted => {
    const rewards = steps.filter(({right}) => right === wanted).map(({reward}) => reward);
    return histogram(rewards, 0, 1, 20).map(count => rewards.length ? 100 * count / rewards.length : 0);
  };
  const right = shares(true);
  const wrong = shares(false);
  const bars = (values, sign) => values.map((value, i) => [i / 20, (i + 1) / 20, 0, sign * value]);
  const most = Math.max(...right, ...wrong, 10);
  const rightCount = steps.filter(step => step.right).length;
  return chart({
    title: "Rewards of right and wrong steps",
    note: `By ${focused().name}: ${named(rightCount, "right step")} upwards, ${steps.length - rightCount} wrong downwards. ` +
      "The steps up to the first wrong one; later ones have no label.",
    x: {label: "reward", min: 0, max: 1},
    y: {label: "share (%)", min: -most, max: most, format: value => String(Math.abs(value))},
    marks: [{kind: "bars", className: "right", points: bars(right, 1)}, {kind: "bars", className: "wrong", points: bars(wrong, -1)},
      {kind: "upright", at: state.threshold}],
    table: {
      head: ["reward from", "right steps (%)", "wrong steps (%)"],
      rows: right.map((value, i) => [(i / 20).toFixed(2), fixed(value), fixed(wrong[i])]),
    },
  });
}

function reliabilityOfRewards() {
  const curves = focusLast().map(judge => ({judge, bins: reliability(labelled(judge))}));
  const lines = curves.map(({judge, bins}) =>
    ({kind: "line", className: styleOf(judge), dots: judge === focused(), points: bins.map(bin => [bin.reward, bin.share])}));
  const own = curves.at(-1).bins;
  return chart({
    title: "Reliability",
    note: "How often a step of a given reward is right; on the diagonal, rewards are probabilities. Ten bins, those with 5 steps or more; " +
      "bars: 95%.",
    x: {label: "reward", min: 0, max: 1}, y: {label: "share of right steps", min: 0, max: 1},
    marks: [{kind: "diagonal"}, {kind: "intervals", className: "focus", points: own.map(bin => [bin.reward, bin.low, bin.high])}, ...lines],
    table: {
      head: ["judge", "mean reward", "right", "95% from", "to", "steps"],
      rows: curves.flatMap(({judge, bins}) => bins.map(bin =>
        [judge.name, fixed(bin.reward, 3), fixed(bin.share, 3), fixed(bin.low, 3), fixed(bin.high, 3), bin.count])),
    },
  });
}

/** [{judge, k, f1, tokens}] at the odd K. */
function pointsOverK(judge) {
  return oddKs(judge).map(k => ({
    judge, k, f1: headline(judge, solutions, state.source, k, state.threshold).f1,
    tokens: tokensPerStep(judge, solutions, state.source, k),
  })).filter(({f1}) => f1 !== null);
}

function f1AgainstK() {
  const most = Math.max(...judges.map(judge => judge.k), 2);
  const curves = focusLast().map(pointsOverK);
  const lines = curves.filter(points => points.length).map(points => ({
    kind: "line", className: styleOf(points[0].judge), dots: points[0].judge.k > 1, points: levelOverK(points, most),
  }));
  const {f1} = headline(focused(), solutions, state.source, kOf(focused()), state.threshold);
  const ring = f1 === null ? [] : [[kOf(focused()), f1]];
  return chart({
    title: "F1 against K",
    note: "Odd K only: at an even K samples can tie. Where half of them say Yes and half No, the mean lies next to ½, just below if No is " +
      "the surer word, and the step counts as wrong; so the curve would zigzag between odd and even K. Ring: the K in use.",
    x: {label: "K, analyses per step", min: 0.5, max: most + 0.5, ticks: oddKs({k: most})}, y: PERCENT,
    marks: [...lines, {kind: "rings", className: "focus", points: ring}],
    table: {head: ["judge", "K", "F1"], rows: curves.flat().map(({judge, k, f1}) => [judge.name, k, fixed(f1)])},
  });
}

/** [[K, F1]]; a judge with one number a step, as a direct PRM, is a level line. */
function levelOverK(points, most) {
  const found = points.map(({k, f1}) => [k, f1]);
  return points[0].judge.k === 1 ? [[0.5, found[0][1]], [most + 0.5, found[0][1]]] : found;
}

function f1AgainstTokens() {
  const curves = focusLast().map(pointsOverK);
  const lines = curves.filter(points => points.length).map(points =>
    ({kind: "line", className: styleOf(points[0].judge), dots: true, points: points.map(({tokens, f1}) => [tokens, f1])}));
  const most = Math.max(...curves.flat().map(({tokens}) => tokens), 1);
  return chart({
    title: "F1 against tokens",
    note: "The same odd K by what they cost: the tokens that are sampled for a step.",
    x: {label: "tokens per step", min: 0, max: most * 1.05}, y: PERCENT,
    marks: lines,
    table: {
      head: ["judge", "K", "tokens per step", "F1"],
      rows: curves.flat().map(({judge, k, tokens, f1}) => [judge.name, k, fixed(tokens, 0), fixed(f1)]),
    },
  });
}

function tokensOfAnalyses() {
  const judge = focused();
  const {width, whole, cut} = remembered(judge, `tokens ${kOf(judge)} ${state.source}`, () => tokenBins(judge, 20));
  const highest = Math.max(...whole.map((count, i) => count + cut[i]), 1);
  return chart({
    title: "Tokens of an analysis",
    note: `By ${judge.name}: ${sum(whole)} that ended by themselves, ${sum(cut)} cut off (in the other colour, on top).`,
    x: {label: "tokens", min: 0, max: 20 * width}, y: {label: "analyses", min: 0, max: highest * 1.05},
    marks: [
      {kind: "bars", className: "right", points: whole.map((count, i) => [i * width, (i + 1) * width, 0, count])},
      {kind: "bars", className: "wrong", points: cut.map((count, i) => [i * width, (i + 1) * width, whole[i], whole[i] + count])},
    ],
    table: {
      head: ["tokens from", "ended", "cut off"],
      rows: whole.map((count, i) => [fixed(i * width, 0), count, cut[i]]),
    },
  });
}

/** {width, whole, cut}: how many analyses have so many tokens, in bins of that width. */
function tokenBins(judge, count) {
  const longest = judge.tokens.reduce((a, b) => Math.max(a, b), 0);
  const most = Math.max(longest, count);
  const {whole, cut} = tokensByEnd(judge, solutions, state.source, kOf(judge));
  return {width: most / count, whole: histogram(whole, 0, most, count), cut: histogram(cut, 0, most, count)};
}

// ------------------------------------------------------------------------------------------------ training runs

function startCurves() {
  reveal("curves-section");
  for (const run of page.curves) byId("curves").append(...run.panels.map(panel => runChart(run, panel)));
}

function runChart(run, {title, series}) {
  const values = series.flatMap(({points}) => points.map(([, value]) => value));
  const note = series.map(({name, points}) => `${name}: ${points[0][1].toPrecision(3)} to ${points.at(-1)[1].toPrecision(3)}`).join("; ");
  const hasRejected = series.some(({name}) => name.startsWith("rejected"));
  return chart({
    title: `${run.name}: ${title.toLowerCase()}`,
    note: note + "." + (hasRejected ? " Dashed: rejected." : "") +
      (run.not_finite ? ` ${named(run.not_finite, "value")} of this run not finite and left out.` : ""),
    x: {label: "optimizer steps", min: 0, max: run.steps}, y: axisOver(values, title.toLowerCase()),
    marks: series.map(({name, points}) => ({
      kind: "line", points, dots: name.endsWith("validation"),
      className: `${name.endsWith("validation") ? "focus" : "other"} dash${name.startsWith("rejected") ? 1 : 0}`,
    })),
    table: {
      head: ["curve", "step", "value"],
      rows: series.flatMap(({name, points}) => points.map(([step, value]) => [name, +step.toFixed(1), +value.toPrecision(4)])),
    },
  });
}

// ------------------------------------------------------------------------------------------------ the list

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
  byId("more").hidden = shown.length === matching.length;
  byId("more").textContent = `Show ${Math.min(PAGE_OF_ROWS, matching.length - shown.length)} more of ${matching.length - shown.length}`;
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
    text += `; the judges differ on ${named(sum(differing), "step")} of ${named(differing.filter(Boolean).length, "solution")} of these`;
  }
  return text + ".";
}

function legendText() {
  return "A bar for each step: its height and colour are the reward, the line across is the threshold, and the box is the first step that " +
    "is predicted wrong. ▲ marks the first wrong step by the label" + (judges.length > 1 ? ", • a step on which the judges differ" : "") +
    ". Enter opens a step; the arrow keys go from bar to bar, Escape closes." +
    (judges.length > 1 ? ` Filters go by the judge in focus, ${focused().name}.` : "");
}

const stepName = t => t === NO_STEP ? "none" : `step ${t + 1}`;
const labelName = label => label === null ? "no label" : label === NO_STEP ? "all right" : `wrong: step ${label + 1}`;

function makeRow(number) {
  const {id, problem, label} = solutions[number];
  const name = element("div", {class: "name"}, element("strong", {}, id), " ", element("span", {class: "problem-start"}, problem));
  const groups = judges.map(judge => judgeGroup(judge, number));
  return element("li", {class: "solution", "--judges": judges.length},
    name, element("div", {class: "label"}, labelName(label)), ...groups, element("div", {class: "opened", hidden: true}));
}

function judgeGroup(judge, number) {
  const line = judge.lineOf[number];
  const group = element("div", {class: "judge", role: "group"});
  if (judges.length > 1) group.append(element("span", {class: "judge-name", "aria-hidden": "true"}, judge.name));
  if (line < 0) {
    group.append(element("span", {class: "note"}, "not judged"));
    return group;
  }
  const steps = stepsOf(judge, line);
  const bars = steps.map((step, t) => element("button", {
    type: "button", class: "step", tabindex: -1, "aria-expanded": "false", onclick: () => toggle(number, judge.number, t),
  }, element("span", {class: "bar-track"}, element("span", {class: "bar-fill"})), element("span", {class: "bar-mark", "aria-hidden": "true"})));
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
  group.setAttribute("aria-label", `${judge.name}: first wrong step predicted: ${stepName(predicted)}` + (label === null ? "" : `; ${outcome}`));
  const said = group.querySelector(".said");
  said.className = `said ${outcome}`;
  said.textContent = ({right: "✓ ", wrong: "✗ ", unlabelled: ""})[outcome] + stepName(predicted);
  group.querySelectorAll(".step").forEach((bar, t) => {
    const reward = rewards[judge.firstStep[line] + t];
    const isOpen = opened?.judge === judge.number && opened.step === t;
    bar.style.setProperty("--reward", Number.isNaN(reward) ? 0 : reward);
    bar.classList.toggle("null", Number.isNaN(reward));
    bar.classList.toggle("predicted", t === predicted);
    bar.querySelector(".bar-mark").textContent = (t === label ? "▲" : "") + (differing.has(t) ? "•" : "");
    bar.setAttribute("aria-expanded", isOpen);
    bar.setAttribute("aria-label", barName(judge, t, reward, {predicted, label, differs: differing.has(t)}));
  });
}

function barName(judge, t, reward, {predicted, label, differs}) {
  const parts = [`${judge.name}, step ${t + 1}`, Number.isNaN(reward) ? "reward null" : `reward ${reward.toFixed(3)}`];
  if (t === predicted) parts.push("first predicted wrong");
  if (t === label) parts.push("labelled the first wrong");
  if (differs) parts.push("judges differ");
  return parts.join(", ");
}

// ------------------------------------------------------------------------------------------------ an opened step

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
  const {problem, steps, label} = solutions[number];
  const close = element("button", {type: "button", class: "close", onclick: () => closeOpened(number)}, "Close");
  const listed = steps.map((text, i) => element("li", {
    class: i === t ? "now" : i > t ? "later" : "", "aria-current": i === t ? "step" : false,
  }, text, i === label ? element("span", {class: "mark"}, " ▲ the first wrong step") : ""));
  return [
    element("p", {class: "problem"}, problem),
    element("ol", {class: "steps", "aria-label": "Steps"}, ...listed),
    element("h3", {}, `Step ${t + 1}: P(Yes) of its analyses`, close),
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
  const reward = known.length ? sum(known.map(sample => sample.pYes)) / known.length : NaN;
  const piles = new Map();
  const dots = known.map(sample => {
    const pile = Math.round(sample.pYes * 60);
    piles.set(pile, (piles.get(pile) ?? -1) + 1);
    const title = `analysis ${sample.number}: ${sample.verdict}, P(Yes) ${sample.pYes.toFixed(3)}`;
    return element("span", {class: `sample-dot ${sample.verdict}`, "--p": sample.pYes, "--pile": piles.get(pile), title});
  });
  const tallest = Math.max(1, ...piles.values());
  const mean = known.length ? [element("span", {class: "mean", "--p": reward})] : [];
  const text = known.length ? `reward ${reward.toFixed(3)}` : "reward null";
  const spoken = `${judge.name}: ${text}; P(Yes) ${known.map(sample => sample.pYes.toFixed(3)).join(", ")}`;
  return element("div", {class: `dot-row${isOpened ? " in-focus" : ""}`},
    element("span", {class: "dot-name"}, judge.name),
    element("div", {class: "dots", role: "img", "aria-label": spoken, "--height": tallest, "--rise": `${Math.min(5, 50 / tallest)}px`},
      element("span", {class: "threshold-tick"}), ...mean, ...dots),
    element("span", {class: "dot-reward"}, text));
}

/** [{number, verdict, pYes, tokens, cutOff, forced, counted, text}] of a step; null where it is not judged. */
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
      number: i - first + 1, pYes: judge.pYes[i], tokens: judge.tokens[i], text: written?.[i - first],
      verdict: flags & YES ? "Yes" : flags & NO ? "No" : "missing",
      cutOff: Boolean(flags & CUT_OFF), forced: Boolean(flags & FORCED), counted: i - first < state.k,
    });
  }
  return samples;
}

/** A card for each text, with all samples that have it. */
function analysesOfStep(judge, number, t) {
  const samples = samplesOf(judge, number, t);
  if (samples[0].text === undefined) {
    return [element("p", {class: "note"}, "The texts of these analyses are left out, since the page would be too large.")];
  }
  const cards = new Map();
  for (const sample of samples) {
    const key = JSON.stringify({...sample, number: 0});
    if (!cards.has(key)) cards.set(key, []);
    cards.get(key).push(sample);
  }
  return [element("ul", {class: "analyses", "aria-label": `Analyses by ${judge.name}`}, ...[...cards.values()].map(analysisCard))];
}

function analysisCard(samples) {
  const {verdict, pYes, tokens, cutOff, forced, counted, text} = samples[0];
  const numbers = samples.map(sample => sample.number).join(", ");
  const facts = [Number.isNaN(pYes) ? "P(Yes) unknown" : `P(Yes) ${pYes.toFixed(3)}`, named(tokens, "token")];
  if (cutOff) facts.push("cut off");
  if (forced) facts.push("forced: read after an added line");
  if (!counted) facts.push(`not counted at K = ${state.k}`);
  return element("li", {class: counted ? "" : "uncounted"},
    element("p", {class: "facts"}, element("span", {class: "numbers"}, `${samples.length > 1 ? "Analyses" : "Analysis"} ${numbers}`), " ",
      element("strong", {class: `verdict ${verdict}`}, verdict === "missing" ? "no verdict" : verdict), " ", facts.join(" · ")),
    element("p", {class: "text"}, text || "(no text: P(Yes) was read straight after the prompt)"));
}

// ------------------------------------------------------------------------------------------------ keys

/** The list is one tab stop: the bar that was last in focus. */
function makeTabStop(bar) {
  tabStop?.setAttribute("tabindex", "-1");
  bar.setAttribute("tabindex", "0");
  tabStop = bar;
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
    ArrowRight: bars[at + 1], ArrowLeft: bars[at - 1], Home: bars[0], End: bars.at(-1),
    ArrowDown: barIn(row.nextElementSibling, at), ArrowUp: barIn(row.previousElementSibling, at),
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

start();
