"use strict";
// The figures, each drawn anew when the threshold, K, the file or the judge in focus changes; and the curves of
// training runs.

const focused = () => judges[state.judge];
const kOf = judge => Math.min(state.k, judge.k);
const styleOf = judge => `${judge === focused() ? "focus" : "other"} dash${judge.number % DASHES}`;
/** The judges, the one in focus last, so that it is drawn over the others. */
const focusLast = () => [...judges.filter(judge => judge !== focused()), focused()];

/** The accuracies of a judge on the file and at the threshold in use. */
function headlineAt(judge, k) {
  return headline(judge, solutions, state.source, k, state.threshold);
}

function drawHeadline() {
  const {f1, error_accuracy, correct_accuracy} = headlineAt(focused(), kOf(focused()));
  const figure = (name, value) => [`${name} `, element("strong", {}, fixed(value)), " "];
  byId("headline").replaceChildren(
    ...figure("F1", f1),
    ...figure("error", error_accuracy),
    ...figure("correct", correct_accuracy),
  );
}

const COLUMNS = [
  ["K", "k", 0],
  ["solutions", "solutions", 0],
  ["error acc.", "error_accuracy", 1],
  ["correct acc.", "correct_accuracy", 1],
  ["F1", "f1", 1],
  ["unparsed", "unparsed", 1],
  ["cut off", "truncated", 1],
  ["forced", "forced", 0],
  ["null", "null_rewards", 0],
  ["tokens/step", "tokens_per_step", 0],
];

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
  const head = [judges.length > 1 ? "judge: file" : "file", ...COLUMNS.map(([title]) => title)];
  fillTable(byId("summary"), caption, head, cells);
}

function figures() {
  return [
    f1AgainstThreshold(),
    rewardsOfSteps(),
    reliabilityOfRewards(),
    f1AgainstK(),
    f1AgainstTokens(),
    tokensOfAnalyses(),
  ];
}

const PERCENT = {label: "F1 (%)", min: 0, max: 100};

function f1AgainstThreshold() {
  const curves = focusLast().map(judge => ({judge, points: thresholdCurve(judge)}));
  const lines = curves.map(({judge, points}) => ({kind: "line", className: styleOf(judge), points}));
  const rowsOfTable = curves.flatMap(({judge, points}) =>
    points
      .filter((_, i) => i % 10 === 0)
      .map(([threshold, f1]) => [judge.name, threshold.toFixed(1), fixed(f1)]),
  );
  return chart({
    title: "F1 against the threshold",
    note: "A threshold that is chosen here is chosen on these solutions; report what it gives on others.",
    x: {label: "threshold", min: 0, max: 1},
    y: PERCENT,
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
    return histogram(rewards, 0, 1, 20).map(count => (rewards.length ? (100 * count) / rewards.length : 0));
  };
  const right = shares(true);
  const wrong = shares(false);
  const bars = (values, sign) => values.map((value, i) => [i / 20, (i + 1) / 20, 0, sign * value]);
  const most = Math.max(...right, ...wrong, 10);
  const rightCount = steps.filter(step => step.right).length;
  const wrongCount = steps.length - rightCount;
  return chart({
    title: "Rewards of right and wrong steps",
    note:
      `By ${focused().name}: ${named(rightCount, "right step")} upwards, ${wrongCount} wrong downwards. ` +
      "Steps up to the first wrong one; later ones have no label.",
    x: {label: "reward", min: 0, max: 1},
    y: {label: "share (%)", min: -most, max: most, format: value => String(Math.abs(value))},
    marks: [
      {kind: "bars", className: "right", points: bars(right, 1)},
      {kind: "bars", className: "wrong", points: bars(wrong, -1)},
      {kind: "upright", at: state.threshold},
    ],
    table: {
      head: ["reward from", "right steps (%)", "wrong steps (%)"],
      rows: right.map((value, i) => [(i / 20).toFixed(2), fixed(value), fixed(wrong[i])]),
    },
  });
}

function reliabilityOfRewards() {
  const curves = focusLast().map(judge => ({judge, bins: reliability(labelled(judge))}));
  const lines = curves.map(({judge, bins}) => ({
    kind: "line",
    className: styleOf(judge),
    dots: judge === focused(),
    points: bins.map(bin => [bin.reward, bin.share]),
  }));
  const own = curves.at(-1).bins;
  return chart({
    title: "Reliability",
    note:
      "How often a step of a given reward is right; on the diagonal, rewards are probabilities. " +
      "Ten bins, those with 5 steps or more; bars: 95%.",
    x: {label: "reward", min: 0, max: 1},
    y: {label: "share of right steps", min: 0, max: 1},
    marks: [
      {kind: "diagonal"},
      {kind: "intervals", className: "focus", points: own.map(bin => [bin.reward, bin.low, bin.high])},
      ...lines,
    ],
    table: {
      head: ["judge", "mean reward", "right", "95% from", "to", "steps"],
      rows: curves.flatMap(({judge, bins}) =>
        bins.map(bin => [
          judge.name,
          fixed(bin.reward, 3),
          fixed(bin.share, 3),
          fixed(bin.low, 3),
          fixed(bin.high, 3),
          bin.count,
        ]),
      ),
    },
  });
}

/** [{judge, k, f1, tokens}] at the odd K. */
function pointsOverK(judge) {
  return oddKs(judge)
    .map(k => ({
      judge,
      k,
      f1: headlineAt(judge, k).f1,
      tokens: tokensPerStep(judge, solutions, state.source, k),
    }))
    .filter(({f1}) => f1 !== null);
}

function f1AgainstK() {
  const most = Math.max(...judges.map(judge => judge.k), 2);
  const curves = focusLast().map(pointsOverK);
  const lines = curves
    .filter(points => points.length)
    .map(points => ({
      kind: "line",
      className: styleOf(points[0].judge),
      dots: points[0].judge.k > 1,
      points: levelOverK(points, most),
    }));
  const {f1} = headlineAt(focused(), kOf(focused()));
  const ring = f1 === null ? [] : [[kOf(focused()), f1]];
  return chart({
    title: "F1 against K",
    note:
      "Odd K only: at an even K samples can tie. Where half of them say Yes and half No, the mean lies next " +
      "to ½, just below if No is the surer word, and the step counts as wrong; so the curve would zigzag " +
      "between odd and even K. Ring: the K in use.",
    x: {label: "K, analyses per step", min: 0.5, max: most + 0.5, ticks: oddKs({k: most})},
    y: PERCENT,
    marks: [...lines, {kind: "rings", className: "focus", points: ring}],
    table: {
      head: ["judge", "K", "F1"],
      rows: curves.flat().map(({judge, k, f1}) => [judge.name, k, fixed(f1)]),
    },
  });
}

/** [[K, F1]]; a judge with one number a step, as a direct PRM, is a level line. */
function levelOverK(points, most) {
  const found = points.map(({k, f1}) => [k, f1]);
  if (points[0].judge.k > 1) return found;
  const [[, f1]] = found;
  return [0.5, most + 0.5].map(k => [k, f1]);
}

function f1AgainstTokens() {
  const curves = focusLast().map(pointsOverK);
  const lines = curves
    .filter(points => points.length)
    .map(points => ({
      kind: "line",
      className: styleOf(points[0].judge),
      dots: true,
      points: points.map(({tokens, f1}) => [tokens, f1]),
    }));
  const most = Math.max(...curves.flat().map(({tokens}) => tokens), 1);
  return chart({
    title: "F1 against tokens",
    note: "The same odd K by what they cost: the tokens that are sampled for a step.",
    x: {label: "tokens per step", min: 0, max: most * 1.05},
    y: PERCENT,
    marks: lines,
    table: {
      head: ["judge", "K", "tokens per step", "F1"],
      rows: curves.flat().map(({judge, k, tokens, f1}) => [judge.name, k, fixed(tokens, 0), fixed(f1)]),
    },
  });
}

function tokensOfAnalyses() {
  const judge = focused();
  const {width, whole, cut} = remembered(judge, `tokens ${kOf(judge)} ${state.source}`, () =>
    tokenBins(judge, 20),
  );
  const highest = Math.max(...whole.map((count, i) => count + cut[i]), 1);
  return chart({
    title: "Tokens of an analysis",
    note: `By ${judge.name}: ${sum(whole)} that ended by themselves, ${sum(cut)} cut off (on top, in red).`,
    x: {label: "tokens", min: 0, max: 20 * width},
    y: {label: "analyses", min: 0, max: highest * 1.05},
    marks: [
      {
        kind: "bars",
        className: "right",
        points: whole.map((count, i) => [i * width, (i + 1) * width, 0, count]),
      },
      {
        kind: "bars",
        className: "wrong",
        points: cut.map((count, i) => [i * width, (i + 1) * width, whole[i], whole[i] + count]),
      },
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

// -------------------------------------------------------------------------------------- training runs

function startCurves() {
  reveal("curves-section");
  for (const run of page.curves) byId("curves").append(...run.panels.map(panel => runChart(run, panel)));
}

function runChart(run, {title, series}) {
  const values = series.flatMap(({points}) => points.map(([, value]) => value));
  const notes = series.map(
    ({name, points}) => `${name}: ${shortest(points[0])} to ${shortest(points.at(-1))}`,
  );
  let note = `${notes.join("; ")}.`;
  if (series.some(isOfRejected)) note += " Dashed: rejected.";
  if (run.not_finite) note += ` ${named(run.not_finite, "value")} of this run not finite and left out.`;
  return chart({
    title: `${run.name}: ${title.toLowerCase()}`,
    note,
    x: {label: "optimizer steps", min: 0, max: run.steps},
    y: axisOver(values, title.toLowerCase()),
    marks: series.map(runCurve),
    table: {
      head: ["curve", "step", "value"],
      rows: series.flatMap(({name, points}) =>
        points.map(([step, value]) => [name, +step.toFixed(1), +value.toPrecision(4)]),
      ),
    },
  });
}

const isOfRejected = ({name}) => name.startsWith("rejected");
const shortest = ([, value]) => value.toPrecision(3);

function runCurve(curve) {
  const ofValidation = curve.name.endsWith("validation");
  const className = `${ofValidation ? "focus" : "other"} dash${isOfRejected(curve) ? 1 : 0}`;
  return {kind: "line", points: curve.points, dots: ofValidation, className};
}
