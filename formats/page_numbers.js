"use strict";
// What is computed from the scores: rewards, predictions, accuracies. All functions are pure but `unpack`, that
// reads the page's data blocks.
//
// A judge is an object of flat arrays, made by formats/page.py:
//
//   lineOf         solution -> its line in the arrays below, -1 where the judge has not seen it
//   order          line -> its solution
//   firstStep      line -> its first step; firstStep[line + 1] is one past its last
//   firstAnalysis  step -> its first analysis, likewise
//   pYes, tokens, flags    of each analysis; a P(Yes) that is not known is NaN
//   rewards        of each analysis: its step's reward over the analyses up to this one (rprm.reward); null is NaN
//
// A solution is {source, id, problem, steps, label, wrong}. `wrong` has all wrong steps in the rows of PRMBench,
// and is null in others. PRMBench's rows are in no accuracy of ProcessBench's kind.

const [YES, NO, CUT_OFF, FORCED] = [1, 2, 4, 8]; // the bits of a flag
const NO_STEP = -1; // a prediction or a label: no step is wrong

// -------------------------------------------------------------------------------------- unpacking

/** The bytes of a data block: base64 of a zlib stream. */
async function unpack(name) {
  const letters = atob(document.getElementById(name).textContent);
  const packed = Uint8Array.from(letters, letter => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

async function unpackJson(name) {
  return JSON.parse(new TextDecoder().decode(await unpack(name)));
}

async function unpackJudge(number, header, solutionCount) {
  const block = name => unpack(`judge-${number}-${name}`);
  const order = new Int32Array(await block("order"));
  const judged = new Int32Array(await block("judged"));
  const samples = new Int32Array(await block("samples"));
  const FloatArray = header.float === "float32" ? Float32Array : Float64Array;
  const lineOf = new Int32Array(solutionCount).fill(-1);
  order.forEach((solution, line) => {
    lineOf[solution] = line;
  });
  return {
    number,
    name: header.name,
    k: header.k,
    order,
    lineOf,
    firstStep: startsOf(judged),
    firstAnalysis: startsOf(samples),
    pYes: new FloatArray(await block("p_yes")),
    rewards: new Float64Array(await block("rewards")),
    tokens: new Int32Array(await block("tokens")),
    flags: new Uint8Array(await block("flags")),
    memory: new Map(), // what has been computed of it (`remembered`)
  };
}

/** [2, 3, 1] -> [0, 2, 5, 6]: where each group begins, and where the last one ends. */
function startsOf(lengths) {
  const starts = new Int32Array(lengths.length + 1);
  lengths.forEach((length, i) => {
    starts[i + 1] = starts[i] + length;
  });
  return starts;
}

// -------------------------------------------------------------------------------- rewards and predictions

/** The reward of each step over its first K analyses; NaN where it has none. */
function rewardsOf(judge, k) {
  return remembered(judge, `rewards ${k}`, () => {
    const stepCount = judge.firstAnalysis.length - 1;
    const rewards = new Float64Array(stepCount);
    for (let step = 0; step < stepCount; step++) {
      const [first, end] = analysesOf(judge, step, k);
      rewards[step] = first < end ? judge.rewards[end - 1] : NaN;
    }
    return rewards;
  });
}

/** What `compute` gives, computed once for each key: a threshold that moves costs only what depends on it. */
function remembered(judge, key, compute) {
  if (!judge.memory.has(key)) judge.memory.set(key, compute());
  return judge.memory.get(key);
}

/** [first, end) of the first K analyses of a step. */
function analysesOf(judge, step, k) {
  const first = judge.firstAnalysis[step];
  return [first, Math.min(first + k, judge.firstAnalysis[step + 1])];
}

/** The first step of a line whose reward is below the threshold; NO_STEP if none. NaN is below nothing. */
function predict(judge, line, rewards, threshold) {
  for (let step = judge.firstStep[line]; step < judge.firstStep[line + 1]; step++) {
    if (rewards[step] < threshold) return step - judge.firstStep[line];
  }
  return NO_STEP;
}

// -------------------------------------------------------------------------------------- accuracies

/** ProcessBench's figures in percent, null where there is nothing to take them over (as in tables.py). */
function accuracies(found, wrong, kept, correct) {
  const error = wrong ? (100 * found) / wrong : null;
  const right = correct ? (100 * kept) / correct : null;
  let f1 = null;
  if (error !== null && right !== null) f1 = error + right ? (2 * error * right) / (error + right) : 0;
  return {error_accuracy: error, correct_accuracy: right, f1};
}

/** The accuracies of a judge on the solutions of one source. */
function measure(judge, solutions, source, k, threshold) {
  const rewards = rewardsOf(judge, k);
  let found = 0,
    wrong = 0,
    kept = 0,
    correct = 0;
  judge.order.forEach((number, line) => {
    const {label, source: own, wrong: ofPrmBench} = solutions[number];
    if (own !== source || label === null || ofPrmBench) return;
    const hit = predict(judge, line, rewards, threshold) === label;
    if (label === NO_STEP) {
      correct++;
      kept += hit;
    } else {
      wrong++;
      found += hit;
    }
  });
  return accuracies(found, wrong, kept, correct);
}

/** How many solutions, steps and analyses a judge has of one source, and what they are like. */
function tally(judge, solutions, source, k) {
  return remembered(judge, `tally ${k} ${source}`, () => countAll(judge, solutions, source, k));
}

function countAll(judge, solutions, source, k) {
  const rewards = rewardsOf(judge, k);
  const n = {
    solutions: 0,
    unlabelled: 0,
    steps: 0,
    null_rewards: 0,
    analyses: 0,
    unparsed: 0,
    truncated: 0,
    forced: 0,
    tokens: 0,
  };
  judge.order.forEach((number, line) => {
    if (solutions[number].source !== source || solutions[number].wrong) return;
    n.solutions++;
    n.unlabelled += solutions[number].label === null;
    for (let step = judge.firstStep[line]; step < judge.firstStep[line + 1]; step++) {
      n.steps++;
      n.null_rewards += Number.isNaN(rewards[step]);
      const [first, end] = analysesOf(judge, step, k);
      for (let i = first; i < end; i++) {
        n.analyses++;
        n.unparsed += !(judge.flags[i] & (YES | NO));
        n.truncated += Boolean(judge.flags[i] & CUT_OFF);
        n.forced += Boolean(judge.flags[i] & FORCED);
        n.tokens += judge.tokens[i];
      }
    }
  });
  return n;
}

/** A row of the table, with the names that scores.summary.json has. */
function summaryRow(judge, solutions, source, k, threshold) {
  const n = tally(judge, solutions, source, k);
  return {
    source,
    k,
    solutions: n.solutions,
    unlabelled: n.unlabelled,
    ...measure(judge, solutions, source, k, threshold),
    unparsed: n.analyses ? (100 * n.unparsed) / n.analyses : null,
    truncated: n.analyses ? (100 * n.truncated) / n.analyses : null,
    forced: n.forced,
    null_rewards: n.null_rewards,
    tokens_per_step: n.tokens / n.steps,
  };
}

const MEANS = ["error_accuracy", "correct_accuracy", "f1", "unparsed", "truncated", "tokens_per_step"];
const SUMS = ["solutions", "unlabelled", "forced", "null_rewards"];

/** A row for each source, and their average where there are several that all have an F1. */
function summaryRows(judge, solutions, k, threshold) {
  const own = sourcesOf(judge, solutions);
  const rows = own.map(source => summaryRow(judge, solutions, source, k, threshold));
  if (rows.length < 2 || rows.some(row => row.f1 === null)) return rows;
  const average = {source: "average", k};
  for (const name of SUMS) average[name] = sum(rows.map(row => row[name]));
  for (const name of MEANS) average[name] = meanOf(rows.map(row => row[name]));
  return [...rows, average];
}

/** The files whose accuracies are taken. */
function sourcesOf(judge, solutions) {
  return remembered(judge, "sources", () => {
    const counted = Array.from(judge.order, number => solutions[number]).filter(({wrong}) => !wrong);
    return [...new Set(counted.map(({source}) => source))];
  });
}

/** The accuracies on one source, or their averages over all (source ""); null where a source lacks one. */
function headline(judge, solutions, source, k, threshold) {
  const sources = source ? [source] : sourcesOf(judge, solutions);
  const all = sources.map(own => measure(judge, solutions, own, k, threshold));
  const means = {};
  for (const name of ["error_accuracy", "correct_accuracy", "f1"]) {
    means[name] = meanOf(all.map(row => row[name]));
  }
  return means;
}

/** The mean; null where there is no value, or one is null. */
function meanOf(values) {
  return values.length && !values.includes(null) ? sum(values) / values.length : null;
}

function sum(values) {
  return values.reduce((total, value) => total + value, 0);
}

// -------------------------------------------------------------------------------------- for the figures

/** Is a step named by the label: as the first wrong one, in PRMBench's rows as a wrong one? */
function isWrong({label, wrong}, t) {
  return wrong ? wrong.includes(t) : t === label;
}

/** [{reward, right}] of the steps whose label is known: up to the first wrong one, in PRMBench's rows all. */
function labelledSteps(judge, solutions, source, k) {
  const rewards = rewardsOf(judge, k);
  const found = [];
  judge.order.forEach((number, line) => {
    const {label, source: own, wrong: ofPrmBench} = solutions[number];
    if ((label === null && !ofPrmBench) || (source && own !== source)) return;
    const first = judge.firstStep[line];
    for (let step = first; step < judge.firstStep[line + 1]; step++) {
      const right = !isWrong(solutions[number], step - first);
      if (!Number.isNaN(rewards[step])) found.push({reward: rewards[step], right});
      if (!right && !ofPrmBench) return;
    }
  });
  return found;
}

/** Shares of right steps in ten bins of equal width: [{count, reward (their mean), share, low, high}]. */
function reliability(steps, leastCount = 5) {
  const bins = Array.from({length: 10}, () => ({count: 0, rewards: 0, right: 0}));
  for (const {reward, right} of steps) {
    const bin = bins[Math.min(Math.floor(reward * 10), 9)];
    bin.count++;
    bin.rewards += reward;
    bin.right += right;
  }
  const used = bins.filter(bin => bin.count >= leastCount);
  return used.map(({count, rewards, right}) => ({
    count,
    reward: rewards / count,
    share: right / count,
    ...wilson(right, count),
  }));
}

/** The 95% interval of a share (Wilson): it stays within 0 and 1 where a share is 0 or 1. */
function wilson(hits, count) {
  const z = 1.96;
  const centre = (hits + (z * z) / 2) / (count + z * z);
  const half = (z / (count + z * z)) * Math.sqrt((hits * (count - hits)) / count + (z * z) / 4);
  return {low: centre - half, high: centre + half};
}

/** How many values lie in each of `count` bins of equal width between low and high. */
function histogram(values, low, high, count) {
  const bins = new Array(count).fill(0);
  for (const value of values) bins[Math.min(Math.floor(((value - low) / (high - low)) * count), count - 1)]++;
  return bins;
}

/** The odd K up to the judge's own: 1, 3, 5, ... */
function oddKs(judge) {
  const found = [];
  for (let k = 1; k <= judge.k; k += 2) found.push(k);
  return found;
}

/** {whole, cut}: the tokens of the analyses that ended by themselves, and of those that were cut off. */
function tokensByEnd(judge, solutions, source, k) {
  const found = {whole: [], cut: []};
  judge.order.forEach((number, line) => {
    if (source && solutions[number].source !== source) return;
    for (const step of stepsOf(judge, line)) {
      const [first, end] = analysesOf(judge, step, k);
      for (let i = first; i < end; i++)
        found[judge.flags[i] & CUT_OFF ? "cut" : "whole"].push(judge.tokens[i]);
    }
  });
  return found;
}

/** The mean number of tokens that K analyses of a step take. */
function tokensPerStep(judge, solutions, source, k) {
  const sources = source ? [source] : sourcesOf(judge, solutions);
  const rows = sources.map(own => tally(judge, solutions, own, k));
  return sum(rows.map(n => n.tokens)) / sum(rows.map(n => n.steps));
}

// -------------------------------------------------------------------------------------- for the list

/** Do samples of a step of this line lie on both sides of the threshold? */
function samplesDisagree(judge, line, k, threshold) {
  return stepsOf(judge, line).some(step => {
    const [first, end] = analysesOf(judge, step, k);
    const known = judge.pYes.subarray(first, end).filter(p => !Number.isNaN(p));
    return known.some(p => p < threshold) && known.some(p => p >= threshold);
  });
}

function hasCutOff(judge, line, k) {
  return stepsOf(judge, line).some(step => {
    const [first, end] = analysesOf(judge, step, k);
    return judge.flags.subarray(first, end).some(flags => flags & CUT_OFF);
  });
}

function hasNullReward(judge, line, k) {
  return stepsOf(judge, line).some(step => Number.isNaN(rewardsOf(judge, k)[step]));
}

/** The steps of a line, as indices into firstAnalysis. */
function stepsOf(judge, line) {
  const steps = [];
  for (let step = judge.firstStep[line]; step < judge.firstStep[line + 1]; step++) steps.push(step);
  return steps;
}

/** The steps of a solution (from 0) that some judge predicts wrong and another one right. Null is neither. */
function differingSteps(judges, number, k, threshold) {
  const below = new Set();
  const above = new Set();
  for (const judge of judges) {
    const line = judge.lineOf[number];
    if (line < 0) continue;
    stepsOf(judge, line).forEach((step, t) => {
      const reward = rewardsOf(judge, k)[step];
      if (reward < threshold) below.add(t);
      if (reward >= threshold) above.add(t);
    });
  }
  return new Set([...below].filter(t => above.has(t)));
}
