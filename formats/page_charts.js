"use strict";
// Drawing: elements, and charts as inline SVG. A chart is described, not drawn by hand:
//
//   chart({
//     title: "F1 against K", note: "Odd K only ...",
//     x: {label: "K", min: 1, max: 9, ticks: [1, 3, 5]}, y: {label: "F1 (%)", min: 0, max: 100},
//     marks: [{kind: "line", className: "focus dash0", points: [[1, 55], [3, 60]], dots: true}, ...],
//     table: {head: ["judge", "K", "F1"], rows: [["dpo", 1, 55]]},
//   })
//
// Each figure carries its numbers as a table too, for those who do not see it.
// Texts enter the page as text only.

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 400,
  HEIGHT = 240;
const LEFT = 54,
  RIGHT = 12,
  TOP = 10,
  BOTTOM = 40; // margins around the plot

// -------------------------------------------------------------------------------------- elements

/** element("p", {class: "note", onclick: f, hidden: true}, "text", child, ...). False ones are left out. */
function element(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function svgElement(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) node.style.setProperty(name, value);
    else if (value !== false && value !== null) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

/** A table with a head row; the first column names the row. Numbers stand right. */
function fillTable(table, caption, head, rows) {
  const headRow = element("tr", {}, ...head.map(title => element("th", {scope: "col"}, title)));
  const bodyRows = rows.map(cells => element("tr", {}, ...cells.map(tableCell)));
  table.replaceChildren(
    element("caption", {}, caption),
    element("thead", {}, headRow),
    element("tbody", {}, ...bodyRows),
  );
  return table;
}

function tableCell(value, column) {
  return column ? element("td", {}, String(value)) : element("th", {scope: "row"}, String(value));
}

/** 12.345 -> "12.3"; null -> "–". */
function fixed(value, digits = 1) {
  return value === null || Number.isNaN(value) ? "–" : value.toFixed(digits);
}

// -------------------------------------------------------------------------------------- charts

function chart({title, note, x, y, marks, table}) {
  const scaleX = value => LEFT + ((value - x.min) / (x.max - x.min)) * (WIDTH - LEFT - RIGHT);
  const scaleY = value => HEIGHT - BOTTOM - ((value - y.min) / (y.max - y.min)) * (HEIGHT - TOP - BOTTOM);
  const svg = svgElement("svg", {
    viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
    role: "img",
    "aria-label": `${title}; its numbers are in the table below`,
  });
  svg.append(...axes(x, y, scaleX, scaleY));
  for (const mark of marks) svg.append(...MARKS[mark.kind](mark, scaleX, scaleY, x, y));
  return element(
    "figure",
    {},
    element("figcaption", {}, element("strong", {}, title), " ", element("span", {class: "note"}, note)),
    svg,
    element(
      "details",
      {},
      element("summary", {}, "Numbers"),
      element("div", {class: "scroll"}, fillTable(element("table"), title, table.head, table.rows)),
    ),
  );
}

function axes(x, y, scaleX, scaleY) {
  const parts = [];
  const bottom = HEIGHT - BOTTOM;
  for (const value of y.ticks ?? niceTicks(y.min, y.max)) {
    const height = scaleY(value);
    parts.push(svgElement("line", {class: "gridline", x1: LEFT, x2: WIDTH - RIGHT, y1: height, y2: height}));
    parts.push(
      svgElement("text", {class: "tick", x: LEFT - 6, y: height + 4, "text-anchor": "end"}, label(y, value)),
    );
  }
  for (const value of x.ticks ?? niceTicks(x.min, x.max)) {
    parts.push(
      svgElement(
        "text",
        {class: "tick", x: scaleX(value), y: bottom + 16, "text-anchor": "middle"},
        label(x, value),
      ),
    );
  }
  parts.push(svgElement("line", {class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: bottom, y2: bottom}));
  parts.push(
    svgElement(
      "text",
      {class: "axis-label", x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 6, "text-anchor": "middle"},
      x.label,
    ),
  );
  const middle = (TOP + bottom) / 2;
  parts.push(
    svgElement(
      "text",
      {class: "axis-label", "text-anchor": "middle", transform: `translate(11 ${middle}) rotate(-90)`},
      y.label,
    ),
  );
  return parts;
}

function label(axis, value) {
  return axis.format ? axis.format(value) : String(+value.toPrecision(6));
}

/** About five round numbers between min and max: steps of 1, 2 or 5 times a power of ten. */
function niceTicks(min, max) {
  const rough = (max - min) / 5;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(factor => factor * power).find(step => step >= rough * 0.999);
  const ticks = [];
  for (let i = Math.ceil(min / step - 1e-9); i * step <= max + step * 1e-9; i++) ticks.push(i * step);
  return ticks;
}

/** An axis that holds all values with some air; a single value stands in the middle. */
function axisOver(values, label) {
  const low = Math.min(...values);
  const high = Math.max(...values);
  const air = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
  return {label, min: low - air, max: high + air};
}

const MARKS = {
  /** A line through points, with dots on request; a lone point is a dot. */
  line({points, className, dots}, scaleX, scaleY) {
    const places = points.map(([px, py]) => [scaleX(px), scaleY(py)]);
    const path = places.map(place => place.map(number => number.toFixed(1)).join(" ")).join(" L");
    const parts = points.length > 1 ? [svgElement("path", {class: `curve ${className}`, d: `M${path}`})] : [];
    if (dots || points.length === 1) {
      parts.push(
        ...places.map(([cx, cy]) => svgElement("circle", {class: `dot ${className}`, cx, cy, r: 3})),
      );
    }
    return parts;
  },
  /** Rings around single points. */
  rings({points, className}, scaleX, scaleY) {
    return points.map(([px, py]) =>
      svgElement("circle", {class: `ring ${className}`, cx: scaleX(px), cy: scaleY(py), r: 5}),
    );
  },
  /** Upright intervals: [x, low, high]. */
  intervals({points, className}, scaleX, scaleY) {
    return points.map(([px, low, high]) =>
      svgElement("line", {
        class: `interval ${className}`,
        x1: scaleX(px),
        x2: scaleX(px),
        y1: scaleY(low),
        y2: scaleY(high),
      }),
    );
  },
  /** Bars from y = base to the value: [x from, x to, base, value]. */
  bars({points, className}, scaleX, scaleY) {
    return points.map(([from, to, base, value]) =>
      svgElement("rect", {
        class: `bar ${className}`,
        x: scaleX(from) + 0.5,
        width: Math.max(scaleX(to) - scaleX(from) - 1, 0.5),
        y: Math.min(scaleY(base), scaleY(value)),
        height: Math.abs(scaleY(base) - scaleY(value)),
      }),
    );
  },
  /** A line over the whole plot: upright at `at`. */
  upright({at}, scaleX) {
    return [
      svgElement("line", {class: "rule", x1: scaleX(at), x2: scaleX(at), y1: TOP, y2: HEIGHT - BOTTOM}),
    ];
  },
  /** The line y = x. */
  diagonal(_, scaleX, scaleY) {
    return [svgElement("line", {class: "rule", x1: scaleX(0), x2: scaleX(1), y1: scaleY(0), y2: scaleY(1)})];
  },
};
