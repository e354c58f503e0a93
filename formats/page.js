"use strict";
// The page: what it holds, its state, its controls. page_figures.js draws the figures, page_list.js the list.

const PAGE_OF_ROWS = 50; // solutions that are shown at a time
const DASHES = 4; // ways in which the judges' lines are dashed (page.css)

let page; // the header: {threshold, judges, curves, texts, texts_left_out}
let solutions; // [{source, id, problem, steps, label}]
let judges; // what page_numbers.js says

const state = {
  threshold: 0.5,
  k: 1,
  judge: 0,
  source: "",
  outcome: "all",
  disagreeing: false,
  cutOff: false,
  nullReward: false,
  differing: false,
  find: "",
  shown: PAGE_OF_ROWS,
  opened: new Map(), // solution -> {judge, step}
};
const rows = new Map(); // solution -> its row, once made
const texts = new Map(); // name of a data block -> its texts, once unpacked

let tabStop = null; // the bar that the Tab key goes to

const byId = id => document.getElementById(id);
/** named(2, "step") -> "2 steps". */
const named = (number, noun, plural = `${noun}s`) => `${number} ${number === 1 ? noun : plural}`;

async function start() {
  if (!("DecompressionStream" in window)) {
    byId("about").textContent =
      "This browser has no DecompressionStream, which unpacks the page. Please take one from 2023 or later.";
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
    parts.push(
      `${named(solutions.length, "solution")} judged by ${judges.map(judge => judge.name).join(", ")}: ` +
        `${named(steps, "judged step")}, ${named(analyses, "analysis", "analyses")}.`,
    );
  }
  if (hasPrmBench()) {
    parts.push("PRMBench's rows are in no accuracy here; their PRMScore is in the table of score.py.");
  }
  if (page.curves.length) parts.push(`Training runs: ${page.curves.map(run => run.name).join(", ")}.`);
  if (page.texts_left_out) {
    parts.push(
      `The texts of the analyses of ${page.texts_left_out} of ${page.texts} judged solutions are left out, ` +
        "since the page would be too large; those of wrong predictions and disagreeing samples came first.",
    );
  }
  return parts.join(" ");
}

const hasPrmBench = () => solutions.some(({wrong}) => wrong !== null);

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
  byId("list").addEventListener("focusin", keepTabStop);
  update();
}

// -------------------------------------------------------------------------------------- controls

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

  const number = input => Number(input.value);
  const text = input => input.value;
  const checked = input => input.checked;
  bind("threshold", "threshold", number);
  bind("k", "k", number);
  bind("source", "source", text);
  bind("outcome", "outcome", text);
  bind("disagreeing", "disagreeing", checked);
  bind("cut-off", "cutOff", checked);
  bind("null", "nullReward", checked);
  bind("differing", "differing", checked);
  bind("find", "find", text);
  byId("more").addEventListener("click", showMore);
}

/** What an input holds goes into the state under `name`; all that is drawn follows. */
function bind(id, name, read) {
  byId(id).addEventListener("input", () => {
    state[name] = read(byId(id));
    state.shown = PAGE_OF_ROWS;
    update();
  });
}

function judgeChoice(judge, i) {
  const choose = () => {
    state.judge = i;
    update();
  };
  const input = element("input", {
    type: "radio",
    name: "judge",
    value: i,
    checked: i === state.judge,
    onchange: choose,
  });
  const sample = svgElement(
    "svg",
    {class: "sample", viewBox: "0 0 30 10", "aria-hidden": "true"},
    svgElement("path", {class: `curve dash${i % DASHES}`, d: "M0 5 L30 5"}),
  );
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

start();
