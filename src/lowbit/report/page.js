"use strict";
// The page's own script: draws the charts that Python prepared, filters them, and turns their data into tables.
(() => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const state = { task: 0, hidden: new Set(), metric: "GBitOPs", quantity: "", against: "step", lines: "runs", run: 0, operand: 0 };
  const task = () => data.tasks[state.task];
  const shown = (label) => !state.hidden.has(label);

  function make(name, attributes = {}, ...children) {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  }
  // Names come escaped for plotly, which reads a little HTML.
  const plain = (text) => String(text ?? "").replaceAll("&lt;", "<").replaceAll("&gt;", ">").replaceAll("&amp;", "&");
  const mean = (numbers) => numbers.reduce((sum, each) => sum + each, 0) / numbers.length;
  const escaped = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  const number = (value) =>
    typeof value !== "number" ? plain(value) : Number.isInteger(value) ? value.toLocaleString("en") : String(Number(value.toPrecision(5)));

  // Filters.

  function pick(trace, keep) {
    const only = (values) => (Array.isArray(values) ? values.filter((_, i) => keep[i]) : values);
    return { ...trace, x: only(trace.x), y: only(trace.y), text: only(trace.text) };
  }
  function filtered(chart) {
    const traces = [];
    for (const trace of chart.data) {
      const meta = trace.meta ?? {};
      if (meta.label !== undefined && !shown(meta.label)) continue;
      traces.push(meta.labels ? pick(trace, meta.labels.map(shown)) : trace);
    }
    return { data: traces, layout: chart.layout };
  }
  function withFront(chart) {
    const means = chart.data.filter((trace) => trace.meta?.role === "mean");
    const sign = /lower is better/.test(chart.layout.yaxis.title.text) ? -1 : 1;
    const points = means.map((trace) => [trace.x[0], trace.y[0]]).sort((a, b) => a[0] - b[0] || sign * (b[1] - a[1]));
    let top = -Infinity;
    const best = points.filter(([, score]) => sign * score > top && ((top = sign * score), true));
    const narrow = innerWidth < 600;
    const traces = chart.data.map((trace) => {
      if (trace.meta?.role === "front") return { ...trace, x: best.map((p) => p[0]), y: best.map((p) => p[1]) };
      if (trace.meta?.role !== "mean") return trace;
      // Names beside the marks help while they are few; beyond that the hover text and the chips name them.
      return { ...trace, mode: means.length > (narrow ? 6 : 12) ? "markers" : "markers+text" };
    });
    return { data: traces, layout: chart.layout };
  }
  function againstCost(chart) {
    const at = ([steps, costs], step) => {
      let high = steps.findIndex((s) => s >= step);
      if (high < 0) high = steps.length - 1;
      if (high === 0) return costs[0];
      const share = Math.min((step - steps[high - 1]) / (steps[high] - steps[high - 1]), 1);
      return costs[high - 1] + share * (costs[high] - costs[high - 1]);
    };
    const traces = chart.data.map((trace) => {
      const runs = (trace.meta.runs ?? [trace.meta.run]).map((run) => task().costs[run]);
      return { ...trace, x: trace.x.map((step) => Number(mean(runs.map((run) => at(run, step))).toPrecision(5))) };
    });
    const xaxis = { ...chart.layout.xaxis, title: { text: task().costTitle } };
    return { data: traces, layout: { ...chart.layout, xaxis } };
  }

  function meansOf(chart) {
    const groups = new Map();
    for (const trace of chart.data) groups.set(trace.meta.label, [...(groups.get(trace.meta.label) ?? []), trace]);
    const traces = [...groups].map(([label, runs]) => {
      // Runs of one setting are logged at the same steps; one that stopped early ends its mean.
      const values = new Map(runs[0].x.map((x) => [x, []]));
      for (const run of runs) run.x.forEach((x, i) => values.get(x)?.push(run.y[i]));
      const x = [...values.keys()].filter((each) => values.get(each).length === runs.length);
      const line = { ...runs[0].line, width: 2 };
      const name = `${escaped(label)}, mean of ${runs.length}`;
      const y = x.map((each) => mean(values.get(each)));
      const meta = { ...runs[0].meta, runs: runs.map((run) => run.meta.run) };
      return { ...runs[0], name, line, x, y, meta, showlegend: groups.size <= 12 };
    });
    return { data: traces, layout: chart.layout };
  }
  // Charts.

  const dark = matchMedia("(prefers-color-scheme: dark)");
  function themed(layout) {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(`--${name}`).trim();
    const axis = { gridcolor: colour("line"), linecolor: colour("line"), zerolinecolor: colour("line"), tickcolor: colour("line") };
    const narrow = innerWidth < 600;
    const all = { ...layout, title: undefined };
    for (const name of ["xaxis", "yaxis"]) all[name] = { ...axis, ...layout[name] };
    const named = layout.xaxis.title.text;
    all.xaxis.title = { text: narrow ? named.replace(" (", "<br>(") : named, standoff: 10 };
    const height = layout.height ?? (narrow ? 330 : 430);
    return {
      ...all,
      height,
      autosize: true,
      margin: { l: 12, r: 14, t: 14, b: 44 },
      legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", traceorder: "normal", itemclick: false, itemdoubleclick: false },
      font: { color: colour("ink"), size: narrow ? 11 : 13, family: getComputedStyle(document.body).fontFamily },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      hoverlabel: { bgcolor: colour("card"), bordercolor: colour("quiet"), font: { color: colour("ink") }, align: "left" },
      dragmode: narrow ? false : "zoom",
    };
  }
  const drawn = new Map(); // id -> chart, for tables and a change of theme
  const config = { displaylogo: false, responsive: true, displayModeBar: false, scrollZoom: false };

  function draw(id, chart) {
    const figure = $(id);
    figure.hidden = !chart;
    if (!chart) return drawn.delete(id);
    drawn.set(id, chart);
    fill(figure);
    if (globalThis.Plotly) {
      const data = chart.data.map((trace) => ({ ...trace }));
      return Plotly.react(figure.querySelector(".plot"), data, themed(chart.layout), config);
    }
  }

  // Tables.

  function table(header, rows, words) {
    const head = make("thead", {}, make("tr", {}, ...header.map((cell) => make("th", { scope: "col" }, plain(cell)))));
    const body = make("tbody");
    for (const [first, ...rest] of rows) {
      body.append(make("tr", {}, make("th", { scope: "row" }, number(first)), ...rest.map((cell) => make("td", {}, number(cell)))));
    }
    return make("table", words ? { class: "words" } : {}, head, body);
  }
  function tableOf({ data: traces, layout }) {
    const x = layout.xaxis.title.text, y = layout.yaxis.title.text;
    if (traces[0]?.type === "heatmap") {
      const { x: steps, y: layers, z } = traces[0];
      return table(["layer", ...steps.map((step) => `step ${step}`)], layers.map((layer, i) => [layer, ...z[i]]));
    }
    if (layout.yaxis.type === "category") {
      const names = [...new Set(traces.flatMap((trace) => trace.y))];
      const value = (trace, name) => trace.x[trace.y.indexOf(name)] ?? "-";
      return table(["", ...traces.map((trace) => `${trace.name}, ${x}`)], names.map((name) => [name, ...traces.map((trace) => value(trace, name))]));
    }
    const points = traces.filter((trace) => trace.meta?.role !== "front");
    const name = (trace, i) => (trace.meta?.role === "mean" ? `${trace.name}, mean` : (trace.text?.[i] ?? trace.name).trim());
    return table(["", x, y], points.flatMap((trace) => trace.x.map((value, i) => [name(trace, i), value, trace.y[i]])));
  }
  function fill(figure) {
    const details = figure.querySelector("details.data");
    details.querySelector("div").replaceChildren(...(details.open ? [tableOf(drawn.get(figure.id))] : []));
  }
  for (const details of document.querySelectorAll("details.data")) {
    details.addEventListener("toggle", () => fill(details.closest("figure")));
  }

  // What is drawn where.

  function drawCompared() {
    const now = task();
    const accuracy = now.accuracy[state.metric];
    draw("accuracy", withFront(filtered(accuracy)));
    $("accuracy").querySelector("h3").textContent = plain(accuracy.layout.title.text.split(", ")[0]);
    const metric = data.metrics.find((each) => each.name === state.metric);
    $("accuracy").querySelector(".formula").textContent = `${metric.name}: ${metric.formula}; m MACs, a and b bits of the operands`;
    let curves = now.curves[state.quantity] && filtered(now.curves[state.quantity]);
    if (curves && state.lines === "means") curves = meansOf(curves);
    if (curves && state.against === "cost") curves = againstCost(curves);
    draw("curves", curves);
    const products = filtered(now.products[state.metric]);
    const bars = products.data[0].y.length;
    draw("products", { ...products, layout: { ...products.layout, height: 130 + 34 * Math.max(bars, 1) } });
    for (const row of document.querySelectorAll(`.results[data-task="${state.task}"] tr[data-label]`)) {
      row.hidden = !shown(row.dataset.label);
    }
  }
  function drawBits() {
    const choice = task().runs[state.run].bits[state.operand];
    draw("bits", choice && data.pool[choice.chart]);
  }
  function list(id, lines) {
    $(id).replaceChildren(...lines.map((line) => make("li", {}, line)));
    $(id).hidden = !lines.length;
  }
  function pairs(id, entries) {
    $(id).replaceChildren(...entries.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
  }
  function drawRun() {
    const run = task().runs[state.run];
    list("problems", run.problems);
    list("notes", run.notes);
    pairs("facts", run.facts);
    pairs("machine", run.machines.map((text) => ["ran with", text]));
    const operands = run.bits.map((choice, i) => make("option", { value: i }, choice.names.join(", ")));
    $("operand").replaceChildren(...operands);
    state.operand = 0;
    drawBits();
    for (const name of ["gates", "gateCost", "sqnr", "angle", "layers", "engines", "energy"]) {
      const chart = data.pool[run.charts[name]];
      if (name === "energy" && chart) $(name).querySelector("h3").textContent = plain(chart.layout.title.text);
      draw(name, run.charts[name] === undefined ? undefined : data.pool[run.charts[name]]);
    }
    for (const name of ["conversion", "proof"]) {
      const { header, rows } = data.pool[run[name]];
      $(name).hidden = !rows.length;
      $(name).querySelector("div").replaceChildren(table(header, rows, true));
    }
    $("command").textContent = run.command;
    $("changes").hidden = !run.changes;
    $("changes").textContent = run.changes && `Settings changed on the way: ${run.changes}`;
    $("settings").replaceChildren(table(["setting", "value"], data.pool[run.settings], true));
  }
  function chooseTask() {
    const now = task();
    state.hidden.clear();
    state.run = 0;
    const chips = Object.entries(now.labels).map(([label, style]) => {
      const box = make("input", { type: "checkbox" });
      box.checked = true;
      box.dataset.label = label;
      const swatch = make("span", { class: "swatch", "aria-hidden": "true" });
      swatch.style.background = style.color;
      return make("label", { class: "chip" }, box, swatch, label);
    });
    $("chips").replaceChildren(...chips);
    $("search-field").hidden = chips.length <= 12;
    $("toolbar").querySelector("fieldset").hidden = chips.length < 2;
    $("search").value = "";
    state.lines = now.runs.length > 12 ? "means" : "runs"; // more lines than that hide each other
    $("lines").value = state.lines;
    if (!now.curves[state.quantity]) state.quantity = Object.keys(now.curves)[0] ?? "";
    $("quantity").replaceChildren(...Object.keys(now.curves).map((name) => make("option", { value: name }, data.quantities[name])));
    $("quantity").value = state.quantity;
    const groups = new Map();
    now.runs.forEach((run, i) => {
      if (!groups.has(run.label)) groups.set(run.label, make("optgroup", { label: run.label }));
      groups.get(run.label).append(make("option", { value: i }, run.name));
    });
    $("run").replaceChildren(...groups.values());
    for (const card of document.querySelectorAll(".results")) card.hidden = card.dataset.task !== String(state.task);
    drawCompared();
    drawRun();
  }

  // What the reader does.

  function setHidden(boxes, hide) {
    for (const box of boxes) {
      box.checked = !hide;
      state.hidden[hide ? "add" : "delete"](box.dataset.label);
    }
    drawCompared();
  }
  const visibleBoxes = () => [...$("chips").querySelectorAll(".chip:not([hidden]) input")];
  $("toolbar").addEventListener("submit", (event) => event.preventDefault());
  $("chips").addEventListener("change", (event) => setHidden([event.target], !event.target.checked));
  $("all").addEventListener("click", () => setHidden(visibleBoxes(), false));
  $("none").addEventListener("click", () => setHidden(visibleBoxes(), true));
  $("search").addEventListener("input", () => {
    const wanted = $("search").value.toLowerCase();
    for (const chip of $("chips").children) chip.hidden = !chip.textContent.toLowerCase().includes(wanted);
  });
  const choose = (id, name, then, read = String) =>
    $(id).addEventListener("change", () => {
      state[name] = read($(id).value);
      then();
    });
  choose("task", "task", chooseTask, Number);
  choose("metric", "metric", drawCompared);
  choose("quantity", "quantity", drawCompared);
  choose("against", "against", drawCompared);
  choose("lines", "lines", drawCompared);
  choose("run", "run", drawRun, Number);
  choose("operand", "operand", drawBits, Number);
  $("copy").addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText($("command").textContent);
      $("copy").textContent = "Copied";
    } catch {
      getSelection().selectAllChildren($("command"));
      $("copy").textContent = "Selected";
    }
  });
  const redraw = () => drawn.forEach((chart, id) => draw(id, chart));
  dark.addEventListener("change", redraw);
  let width = innerWidth;
  addEventListener("resize", () => {
    if (width < 600 !== innerWidth < 600) redraw();
    width = innerWidth;
  });

  // plotly.js is in the page, compressed.
  async function load() {
    const packed = Uint8Array.from(atob($("plotly").textContent), (character) => character.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = await new Response(stream).blob();
    const address = URL.createObjectURL(new Blob([script], { type: "text/javascript" }));
    await new Promise((resolve, reject) => document.head.append(Object.assign(make("script"), { src: address, onload: resolve, onerror: reject })));
    URL.revokeObjectURL(address);
  }
  chooseTask(); // the tables need no charts
  load().then(
    () => {
      redraw();
      document.body.dataset.ready = "yes";
    },
    (error) => {
      $("failure").hidden = false;
      $("failure").textContent = `This browser cannot draw the charts (${error}); their data are in the tables below them.`;
    },
  );
})();
