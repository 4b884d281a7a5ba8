// Curves, histograms and the ledger, as SVG drawn to the width that there is.

/** Round steps that cut [low, high] into about `wanted` parts. */
function ticks(low, high, wanted) {
  const raw = (high - low || 1) / wanted;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) found.push(Number((k * step).toPrecision(12)));
  return found;
}

/** A chart's frame: host, title, and `draw(frame)` again whenever its width changes. */
function chart(title, height, draw) {
  const area = el("div", { class: "chart-area" });
  const host = el("figure", { class: "chart" }, el("figcaption", {}, title), area);
  let drawn = 0;
  const again = () => {
    const width = (drawn = Math.max(260, area.clientWidth));
    const canvas = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": title });
    area.replaceChildren(canvas);
    draw({ canvas, area, width, height, left: 46, right: 14, top: 10, bottom: 40 });
  };
  new ResizeObserver(() => { if (Math.max(260, area.clientWidth) !== drawn) again(); }).observe(area);
  return { host, again };
}

function axes(f, x, y, xName, xFormat, yFormat) {
  f.x = (v) => f.left + ((v - x[0]) / (x[1] - x[0] || 1)) * (f.width - f.left - f.right);
  f.y = (v) => f.height - f.bottom - ((v - y[0]) / (y[1] - y[0] || 1)) * (f.height - f.top - f.bottom);
  for (const t of ticks(y[0], y[1], 5)) {
    f.canvas.append(svg("line", { class: "grid", x1: f.left, x2: f.width - f.right, y1: f.y(t), y2: f.y(t) }));
    f.canvas.append(svg("text", { class: "tick", x: f.left - 7, y: f.y(t) + 4, "text-anchor": "end" }, yFormat(t)));
  }
  for (const t of ticks(x[0], x[1], Math.max(3, Math.floor(f.width / 90)))) {
    f.canvas.append(svg("text", { class: "tick", x: f.x(t), y: f.height - f.bottom + 17, "text-anchor": "middle" }, xFormat(t)));
  }
  f.canvas.append(svg("line", { class: "axis", x1: f.left, x2: f.width - f.right, y1: f.y(y[0]), y2: f.y(y[0]) }));
  f.canvas.append(svg("text", { class: "axis-name", x: (f.left + f.width - f.right) / 2, y: f.height - 5, "text-anchor": "middle" }, xName));
}

/** The range of values with a little air, from 0 if that is near. */
function range(values, { zero = false } = {}) {
  if (!values.length) return [0, 1];
  let low = Math.min(...values), high = Math.max(...values);
  const air = (high - low || Math.abs(high) || 1) * 0.06;
  low = zero || (low >= 0 && low < 0.25 * high) ? 0 : low - air;
  return [low, high + air];
}

const path = (x, y, f) => x.map((v, i) => `${i ? "L" : "M"}${f.x(v).toFixed(1)} ${f.y(y[i]).toFixed(1)}`).join("");
const ribbon = (band, f) => `${path(band.x, band.high, f)}${path([...band.x].reverse(), [...band.low].reverse(), f).replace("M", "L")}Z`;

function drawCurves(f, perArm, axis, percent) {
  const all = Object.values(perArm);
  const xs = all.flatMap((a) => a.lines.flatMap((l) => l.x));
  const ys = all.flatMap((a) => [...a.lines.flatMap((l) => l.y), ...(a.band ? [...a.band.low, ...a.band.high] : [])]);
  if (!xs.length) {
    f.canvas.append(svg("text", { class: "tick", x: f.width / 2, y: f.height / 2, "text-anchor": "middle" }, "nothing measured"));
    return;
  }
  const shown = (v) => (percent ? `${Number((100 * v).toFixed(1))}` : figure(v));
  axes(f, [0, Math.max(...xs) || 1], range(ys), axis, count, percent ? shown : (v) => String(v));
  const traces = [];
  Object.entries(perArm).forEach(([arm, a], i) => {
    if (a.band) f.canvas.append(svg("path", { d: ribbon(a.band, f), class: "band", fill: armColor(i) }));
    const main = a.band && a.band.mean ? { x: a.band.x, y: a.band.mean } : a.lines[0];
    if (a.lines.length > 1) for (const l of a.lines) f.canvas.append(svg("path", { d: path(l.x, l.y, f), class: "seed", stroke: armColor(i) }));
    if (!main) return;
    f.canvas.append(svg("path", { d: path(main.x, main.y, f), class: "line", stroke: armColor(i) }));
    if (a.lines.length === 1 && main.x.length <= 20) main.x.forEach((x, k) => f.canvas.append(svg("circle", { cx: f.x(x), cy: f.y(main.y[k]), r: 3, fill: armColor(i) })));
    traces.push({ arm, i, ...main });
  });
  follow(f, traces, axis, shown);
}

/** A line and a small table of values under the pointer. */
function follow(f, traces, axis, shown) {
  const line = svg("line", { class: "guide", y1: f.top, y2: f.height - f.bottom });
  const tip = el("div", { class: "tip", hidden: true });
  f.canvas.append(line);
  f.area.append(tip);
  const hide = () => { tip.hidden = true; line.removeAttribute("data-on"); };
  hide();
  f.canvas.addEventListener("pointerleave", hide);
  f.canvas.addEventListener("pointermove", (event) => {
    const at = event.clientX - f.canvas.getBoundingClientRect().left;
    const points = traces.flatMap((t) => t.x.map((x, k) => ({ t, x, y: t.y[k], away: Math.abs(f.x(x) - at) })));
    if (!points.length) return;
    const nearest = points.reduce((a, b) => (b.away < a.away ? b : a));
    const rows = traces.map((t) => points.filter((p) => p.t === t).reduce((a, b) => (Math.abs(b.x - nearest.x) < Math.abs(a.x - nearest.x) ? b : a)));
    line.setAttribute("x1", f.x(nearest.x));
    line.setAttribute("x2", f.x(nearest.x));
    line.dataset.on = "";
    tip.replaceChildren(el("b", {}, `${axis}: ${count(nearest.x)}`), ...rows.map((r) => el("div", {}, dot(r.t.i), `${r.t.arm} `, el("b", {}, shown(r.y)))));
    tip.hidden = false;
    tip.style.left = `${Math.min(Math.max(0, f.x(nearest.x) + 10), f.width - tip.offsetWidth)}px`;
  });
}

/** Per arm the best so far for its cost. */
function drawFrontiers(f, perArm, axis) {
  const shown = (v) => `${Number((100 * v).toFixed(1))}`;
  const all = Object.values(perArm);
  axes(f, [0, Math.max(...all.map((a) => a.x.at(-1))) || 1], range(all.flatMap((a) => a.y)), axis, count, shown);
  const traces = Object.entries(perArm).map(([arm, a]) => ({ arm, i: Object.keys(DATA.arms).indexOf(arm), ...a }));
  for (const t of traces) f.canvas.append(svg("path", { class: "best", d: path(t.x, t.y, f), stroke: armColor(t.i) }));
  follow(f, traces, axis, shown);
}

const dot = (i) => el("span", { class: "dot", style: { background: armColor(i) } });

/** Accuracy of each finished run against what it cost, with its interval; the base stands at cost 0. The dashed line goes through
 * the runs that no cheaper run reaches or beats. */
function drawOutcomes(f, outcomes, axis, armOf) {
  const y = range(outcomes.flatMap((o) => [o.base, o.low ?? o.mean, o.high ?? o.mean]));
  axes(f, [0, 1.1 * Math.max(...outcomes.map((o) => o.cost[axis])) || 1], y, axis, count, (v) => `${Number((100 * v).toFixed(1))}`);
  const frontier = [];
  for (const o of [...outcomes].sort((a, b) => a.cost[axis] - b.cost[axis] || b.mean - a.mean)) if (!frontier.length || o.mean > frontier.at(-1).mean) frontier.push(o);
  f.canvas.append(svg("path", { class: "frontier", d: path([0, ...frontier.map((o) => o.cost[axis])], [frontier[0].base, ...frontier.map((o) => o.mean)], f) }));
  for (const o of outcomes) {
    const x = f.x(o.cost[axis]), color = armColor(armOf[o.run]);
    const told = `${o.run}: ${(100 * o.mean).toFixed(1)} % for ${count(o.cost[axis])} ${axis}; base ${(100 * o.base).toFixed(1)} %`;
    f.canvas.append(svg("circle", { cx: f.x(0), cy: f.y(o.base), r: 4, class: "base" }));
    if (o.low !== null && o.high !== null) f.canvas.append(svg("line", { class: "whisker", stroke: color, x1: x, x2: x, y1: f.y(o.low), y2: f.y(o.high) }));
    f.canvas.append(svg("circle", { cx: x, cy: f.y(o.mean), r: 5, fill: color }, svg("title", {}, told)));
  }
}

function startCurves() {
  const arms = Object.entries(DATA.arms);
  const armOf = Object.fromEntries(arms.flatMap(([, runs], i) => runs.map((r) => [r, i])));
  const measured = Object.values(DATA.curves.dev.pass_at_1.steps).some((a) => a.lines.length);
  const state = { data: measured ? "dev" : "training", axis: "sampled tokens" };
  const at = (measure) => DATA.curves[state.data][measure][state.axis];
  const plots = [
    chart("Pass@1, %", 280, (f) => drawCurves(f, at("pass_at_1"), state.axis, true)),
    chart("Response length, tokens", 280, (f) => drawCurves(f, at("length"), state.axis, false)),
  ];
  if (Object.keys(DATA.frontiers.steps).length) plots.push(chart("Best dev Pass@1 reached for its cost, %", 280, (f) => drawFrontiers(f, DATA.frontiers[state.axis], state.axis)));
  if (DATA.outcomes.length) plots.push(chart("Final Pass@1 over all sets against training cost, %", 280, (f) => drawOutcomes(f, DATA.outcomes, state.axis === "steps" ? "sampled tokens" : state.axis, armOf)));
  const again = () => {
    for (const p of plots) p.again();
    const seeds = Object.values(at("pass_at_1"));
    const told = [];
    if (seeds.some((a) => a.seeds > 1)) told.push("thick: mean of the seeds, thin: each seed, band: the range of the seeds");
    if (seeds.some((a) => a.seeds === 1 && a.band)) told.push("band of a single run: 95 % interval over the dev problems");
    if (state.data === "training") told.push("training: the problems of each step, which differ from step to step");
    if (Object.keys(DATA.frontiers.steps).length) told.push("best: so far, of the mean of the seeds, straight between measurements");
    if (DATA.outcomes.length) told.push("dashed: the most accuracy for its cost; circle: the base");
    byId("curve-note").textContent = told.length ? `${told.join("; ")}.` : "";
  };
  byId("curve-tools").append(
    choices("measured on", ["dev", "training"], state.data, (v) => { state.data = v; again(); }),
    choices("against", Object.keys(DATA.curves.dev.pass_at_1), state.axis, (v) => { state.axis = v; again(); }),
  );
  byId("arms").append(...arms.map(([arm, runs], i) => el("span", {}, dot(i), `${arm} (${plural(runs.length, "run")})`)));
  byId("curve-plots").append(...plots.map((p) => p.host));
  again();
}

function startLengths(host) {
  const runs = [...new Set(DATA.lengths.map((h) => h.run))];
  const tallest = Math.max(...DATA.lengths.flatMap((h) => h.counts.map((c) => c / (h.n || 1))), 0.01);
  for (const run of runs) {
    const shown = DATA.lengths.filter((h) => h.run === run);
    const plot = chart(`${run}: ${shown[0].source}`, 200, (f) => {
      axes(f, [0, shown[0].edges.at(-1)], [0, tallest * 1.05], "tokens", count, (v) => `${Math.round(100 * v)} %`);
      shown.forEach((h, k) => {
        let d = `M${f.x(0)} ${f.y(0)}`;
        h.counts.forEach((c, i) => { d += `L${f.x(h.edges[i])} ${f.y(c / (h.n || 1))}L${f.x(h.edges[i + 1])} ${f.y(c / (h.n || 1))}`; });
        f.canvas.append(svg("path", { d: `${d}L${f.x(h.edges.at(-1))} ${f.y(0)}`, class: `bars bars-${k}` }));
      });
      shown.forEach((h, k) => f.canvas.append(svg("line", { class: `mean mean-${k}`, x1: f.x(h.mean), x2: f.x(h.mean), y1: f.top, y2: f.y(0) })));
    });
    const legend = shown.map((h, k) => el("span", {}, el("span", { class: `dot bars-${k}` }), `${h.what}: mean ${figure(h.mean)} over ${plural(h.n, "response")}`));
    plot.host.append(el("div", { class: "legend" }, ...legend));
    host.append(plot.host);
    plot.again();
  }
  if (!runs.length) host.append(el("p", { class: "note" }, "No responses were stored."));
}

function startLedger(host, legend) {
  const phases = DATA.ledgers.length ? Object.keys(DATA.ledgers[0].hours) : [];
  const used = phases.filter((p) => DATA.ledgers.some((l) => l.hours[p] > 0));
  legend.append(...used.map((p) => el("span", {}, el("span", { class: "dot", style: { background: `var(--phase-${p})` } }), p)));
  const total = (l) => Object.values(l.hours).reduce((a, b) => a + b, 0);
  const most = Math.max(...DATA.ledgers.map(total), 1e-12);
  for (const l of DATA.ledgers) {
    const bar = el("div", { class: "stack", style: { width: `${(100 * total(l)) / most}%` } });
    for (const p of used.filter((q) => l.hours[q] > 0)) {
      const share = l.hours[p] / total(l);
      const part = el("div", { title: `${p}: ${l.hours[p].toPrecision(3)} device-hours, ${(100 * share).toFixed(1)} %`, style: { "flex-grow": share, background: `var(--phase-${p})` } });
      if (share * total(l) > 0.08 * most) part.append(`${Math.round(100 * share)} %`);
      bar.append(part);
    }
    const told = `${total(l).toPrecision(3)} device-hours on ${l.devices} × ${l.device}${l.finished ? "" : ", not finished"}`;
    host.append(el("div", { class: "ledger-row" }, el("div", { class: "ledger-name" }, el("b", {}, l.run), el("span", {}, told)), el("div", { class: "ledger-track" }, bar), ...l.beside.map((line) => el("p", { class: "note" }, line))));
  }
}
