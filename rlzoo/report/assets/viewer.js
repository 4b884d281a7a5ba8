// The tree viewer: x is the position in the response in tokens, every leaf has a row, and a node spans the rows of the leaves below it.

const MARKS = {
  EOS: ["M5 1A4 4 0 1 0 5 9A4 4 0 1 0 5 1Z", "end of text"],
  ANSWER: ["M1 1H9V9H1Z", "answer in a box, and ended"],
  LENGTH: ["M1 0H3V10H1ZM5 0H9V10H5Z", "cut off at the length limit"],
  DEPTH: ["M0 1H10L5 10Z", "cut off at the depth limit"],
  REPETITION: ["M0 3H10V4.6H0ZM0 6.4H10V8H0Z", "stopped for repeating itself"],
  PRUNED: ["M0 2L2 0L5 3L8 0L10 2L7 5L10 8L8 10L5 7L2 10L0 8L3 5Z", "pruned"],
  OPEN: ["M5 0L10 5L5 10L0 5Z", "segment limit: could go on"],
};

const mark = (stop) => svg("svg", { class: "mark", viewBox: "0 0 10 10", "aria-hidden": "true" }, svg("path", { d: MARKS[stop][0] }));

/** Colour on the scale from low (-1) over nothing (0) to high (+1); follows the theme by itself. */
function tint(x) {
  if (x === null) return "var(--unknown)";
  const share = Math.round(100 * Math.min(1, Math.abs(x)));
  return `color-mix(in oklab, var(${x < 0 ? "--low" : "--high"}) ${share}%, var(--middle))`;
}

/** Children, rows and depths of a tree's nodes. */
function arrange(tree) {
  const nodes = tree.parent.length;
  const children = Array.from({ length: nodes }, () => []);
  for (const node of tree.order) if (node !== 0) children[tree.parent[node]].push(node);
  const top = new Array(nodes).fill(0), rows = new Array(nodes).fill(1), depth = new Array(nodes).fill(0);
  for (let n = 1; n < nodes; n++) depth[n] = depth[tree.parent[n]] + 1; // parents precede children
  for (let n = nodes - 1; n >= 0; n--) if (children[n].length) rows[n] = children[n].reduce((sum, c) => sum + rows[c], 0);
  for (let n = 0; n < nodes; n++) {
    let next = top[n];
    for (const c of children[n]) { top[c] = next; next += rows[c]; }
  }
  const leafOf = new Map(tree.leaves.map((node, i) => [node, i]));
  const longest = Math.max(1, ...tree.start.map((s, n) => (n ? s + tree.length[n] : 0)));
  const known = tree.leaves.map((_, i) => i).filter((i) => tree.reward[i] !== null);
  const median = (wanted) => {
    const found = known.filter((i) => tree.correct[i] === wanted).map((i) => tree.reward[i]).sort((a, b) => a - b);
    return found.length ? found[Math.floor(found.length / 2)] : null;
  };
  let low = median(0), high = median(1);
  if (low === null) low = high === null ? 0 : Math.min(0, high - 1);
  if (high === null) high = Math.max(1, low + 1);
  const credits = tree.credits.map((c) => ({ ...c, most: c.pieces ? Math.max(1e-9, ...c.pieces.flat().map((p) => Math.abs(p[2]))) : 0 }));
  return { tree, nodes, children, top, rows, depth, leafOf, longest, low, high, credits, probes: new Set(tree.probe) };
}

/** Mean advantage over the tokens of a node that have one; null where none has. */
function nodeCredit(pieces) {
  let sum = 0, tokens = 0;
  for (const [start, stop, mean] of pieces) {
    sum += mean * Math.max(1, stop - start);
    tokens += Math.max(1, stop - start);
  }
  return tokens ? sum / tokens : null;
}

const meanLogprob = (values) => {
  const known = values.filter((v) => v !== null);
  return known.length ? known.reduce((a, b) => a + b, 0) / known.length / 100 : null;
};

const creditName = (tree, c) => (c.name === "training" ? `as trained (${tree.algorithm})` : `${c.name}, counterfactual`);
const visible = (text) => text.replace(/\r\n|\r|\n/g, "⏎ ").replace(/\t/g, "⇥ ");

class Viewer {
  constructor(host) {
    this.texts = DATA.viewer.texts;
    this.colour = "value";
    this.shade = "advantage";
    this.source = 0;
    this.zoom = 0;
    this.run = dropdown("run", (v) => this.show(DATA.viewer.trees.find((t) => t.run === v)));
    this.step = dropdown("step", (v) => this.show(this.siblingsOf("run").find((t) => String(t.step) === v)));
    this.tree = dropdown("tree", (v) => this.show(DATA.viewer.trees[Number(v)]));
    this.credit = dropdown("credit", (v) => { this.source = Number(v); this.paint(); this.panel(); });
    const turn = (by) => () => {
      const all = DATA.viewer.trees;
      this.show(all[(all.indexOf(this.now.tree) + by + all.length) % all.length]);
    };
    const zoom = (by) => () => { this.zoom += by; this.place(); };
    const small = (text, title, press) => el("button", { type: "button", class: "small", title, "aria-label": title, on: { click: press } }, text);
    this.head = el("div", { class: "tree-head" });
    this.legend = el("div", { class: "legend", id: "tree-legend" });
    this.ruler = el("div", { class: "ruler", "aria-hidden": "true" });
    this.canvas = el("div", { class: "icicle", role: "tree", "aria-label": "Tree of segments; arrow keys: parent, child, siblings" });
    this.canvas.addEventListener("click", (e) => { const box = e.target.closest("[data-node]"); if (box) this.select(Number(box.dataset.node), true); });
    this.canvas.addEventListener("keydown", (e) => this.key(e));
    this.side = el("aside", { class: "panel", "aria-label": "Selected node" });
    this.scroll = el("div", { class: "icicle-scroll" }, this.ruler, this.canvas);
    host.append(
      el("div", { class: "tools" }, this.run.node, this.step.node, this.tree.node, small("‹", "previous tree", turn(-1)), small("›", "next tree", turn(1))),
      this.head,
      el("div", { class: "tools" },
        choices("colour", ["value", "credit", "log-prob"], this.colour, (v) => { this.colour = v; this.paint(); }),
        this.credit.node,
        choices("shade tokens by", ["advantage", "log-prob", "nothing"], this.shade, (v) => { this.shade = v; this.panel(); }),
        el("span", { class: "choices" }, el("span", { class: "choices-label" }, "rows"), small("−", "lower rows", zoom(-1)), small("+", "higher rows", zoom(1)))),
      this.legend,
      el("div", { class: "tree-body" }, this.scroll, this.side),
      el("p", { class: "note" }, "Width: tokens. Height: leaves below. Click a node, or walk with the arrow keys: ← parent, → child, ↑ ↓ siblings, Home the prompt."),
    );
    new ResizeObserver(() => this.place()).observe(host);
    this.show(DATA.viewer.trees.reduce((a, b) => (b.run === a.run && b.step >= a.step ? (b.step > a.step ? b : a) : a)));
  }

  siblingsOf(what) {
    const { run, step } = this.now.tree;
    return DATA.viewer.trees.filter((t) => t.run === run && (what === "run" || t.step === step));
  }

  show(tree) {
    this.now = arrange(tree);
    if (!tree.credits[this.source] || tree.credits[this.source].refused) this.source = Math.max(0, tree.credits.findIndex((c) => c.pieces));
    const all = DATA.viewer.trees;
    this.run.fill([...new Set(all.map((t) => t.run))].map((r) => [r, r]), tree.run);
    this.step.fill([...new Set(this.siblingsOf("run").map((t) => String(t.step)))].map((s) => [s, s]), String(tree.step));
    const told = (t) => `#${t.index} · ${t.correct.filter((c) => c === 1).length} of ${t.leaves.length} right · ${visible(t.problem).slice(0, 48)}`;
    this.tree.fill(this.siblingsOf("step").map((t) => [String(all.indexOf(t)), told(t)]), String(all.indexOf(tree)));
    this.credit.fill(tree.credits.map((c, i) => [String(i), creditName(tree, c) + (c.refused ? ": none" : "")]), String(this.source));
    this.header();
    this.build();
    const right = tree.leaves[tree.correct.indexOf(1)];
    this.select(right ?? tree.leaves[0] ?? 0, false);
  }

  header() {
    const t = this.now.tree;
    const right = t.correct.filter((c) => c === 1).length, wrong = t.correct.filter((c) => c === 0).length;
    const parts = [`${t.leaves.length} responses: ${right} right, ${wrong} wrong${right + wrong < t.leaves.length ? `, ${t.leaves.length - right - wrong} not graded` : ""}`,
      `${count(t.sampled)} tokens sampled, ${count(t.unrolled)} if every response were its own (${(t.unrolled / Math.max(1, t.sampled)).toFixed(2)} ×)`];
    this.head.replaceChildren(
      el("div", { class: "problem" }, el("bdi", {}, t.problem || t.id || "?")),
      el("div", {}, "gold answer ", el("bdi", { class: "gold" }, t.gold || "?"), ...parts.map((p) => el("span", { class: "fact" }, p))));
  }

  build() {
    const { tree, nodes, leafOf, probes, depth, longest } = this.now;
    this.boxes = [];
    for (let n = 0; n < nodes; n++) {
      const leaf = leafOf.get(n);
      const kind = [n === 0 ? "root" : "", probes.has(n) ? "probe" : "", tree.length[n] === 0 ? "empty" : ""].filter(Boolean).join(" ");
      const box = el("div", { class: `node ${kind}`, role: "treeitem", tabindex: "-1", "data-node": n, "aria-level": depth[n] + 1, "aria-label": this.spoken(n, leaf) });
      box.append(el("span", { class: "label" }, el("b", { class: "figure" }), el("bdi", {}, n ? this.snippet(n) : "prompt")));
      if (n) {
        box.style.left = `${(100 * tree.start[n]) / longest}%`;
        box.style.width = `${(100 * tree.length[n]) / longest}%`;
      }
      this.boxes.push(box);
    }
    const ends = tree.leaves.map((n, i) => {
      const end = el("div", { class: "leaf-end", "data-node": n, title: this.ending(n, i) }, mark(tree.stop[n]), el("span", { class: `verdict ${this.verdict(i)}` }, { right: "✓", wrong: "✗", failed: "?" }[this.verdict(i)]));
      end.style.left = `${(100 * (tree.start[n] + tree.length[n])) / longest}%`;
      return end;
    });
    this.ends = ends;
    const marks = ticks(0, longest, 8).filter((t) => t <= longest);
    const lines = marks.slice(1).map((t) => el("div", { class: "grid-line", style: { left: `${(100 * t) / longest}%` } }));
    this.canvas.replaceChildren(this.boxes[0], el("div", { class: "icicle-plot", role: "none" }, ...lines, ...this.boxes.slice(1), ...ends));
    this.ruler.replaceChildren(el("span", { class: "ruler-prompt" }, "tokens"), el("div", { class: "ruler-plot" }, ...marks.map((t) => el("span", { style: { left: `${(100 * t) / longest}%` } }, String(t)))));
    this.place();
    this.paint();
  }

  /** Heights and tops, by the row height that fits, and which labels have room. */
  place() {
    const { tree, rows, top, longest } = this.now;
    const perToken = (this.canvas.clientWidth - 112) / longest; // less the prompt's and the marks' margins
    const fitting = Math.max(rows[0] > 90 ? 8 : 12, Math.min(26, Math.floor(680 / rows[0])));
    const height = Math.max(5, Math.min(40, fitting + 3 * this.zoom));
    this.canvas.style.height = `${rows[0] * height}px`;
    this.canvas.style.setProperty("--row", `${height}px`);
    this.boxes.forEach((box, n) => {
      const high = rows[n] * height - 1;
      box.style.top = `${top[n] * height}px`;
      box.style.height = `${high}px`;
      const wide = n ? tree.length[n] * perToken : 1000;
      box.style.setProperty("--box", `${high}px`);
      box.classList.toggle("flat", high < 15);
      box.classList.toggle("narrow", wide < 84);
      box.classList.toggle("bare", high < 10 || wide < (high < 15 ? 38 : 48));
    });
    this.ends.forEach((end) => {
      end.style.top = `${top[Number(end.dataset.node)] * height}px`;
      end.style.height = `${height - 1}px`;
    });
  }

  /** Colours and figures of all nodes, and the legend that explains them. */
  paint() {
    const { tree, low, high, credits } = this.now;
    const credit = credits[this.source];
    const shown = (n) => {
      if (this.colour === "value") return [tree.value[n], tree.value[n] === null ? null : (2 * (tree.value[n] - low)) / (high - low) - 1];
      if (this.colour === "log-prob") {
        const mean = n ? meanLogprob(tree.logprobs[n]) : null;
        return [mean, mean === null ? null : mean];
      }
      const a = credit.pieces ? nodeCredit(credit.pieces[n]) : null;
      return [a, a === null ? null : a / credit.most];
    };
    this.boxes.forEach((box, n) => {
      const [value, share] = shown(n);
      box.style.backgroundColor = tint(share);
      box.classList.toggle("nothing", share === null);
      box.querySelector(".figure").textContent = n && value === null ? "" : figure(value, this.colour === "credit", 2);
    });
    const ends = { value: [figure(low), figure((low + high) / 2), figure(high)], credit: [figure(-credit.most), "0", figure(credit.most, true)], "log-prob": ["−1 or less", "", "0"] }[this.colour];
    const what = { value: "value: mean over children", credit: `advantage, ${creditName(tree, credit)}`, "log-prob": "mean log-prob of the node's tokens" }[this.colour];
    const scale = el("span", { class: this.colour === "log-prob" ? "scale half" : "scale" });
    const stops = [...new Set(tree.leaves.map((n) => tree.stop[n]))];
    this.legend.replaceChildren(
      el("span", {}, `${what} `, ends[0], scale, ends[2]),
      el("span", {}, el("span", { class: "dot nothing" }), this.colour === "value" ? "not graded" : "none"),
      ...stops.map((s) => el("span", {}, mark(s), `${MARKS[s][1]} (${tree.leaves.filter((n) => tree.stop[n] === s).length})`)),
      el("span", {}, el("span", { class: "verdict right" }, "✓"), " right ", el("span", { class: "verdict wrong" }, "✗"), " wrong"),
    );
  }

  verdict(leaf) {
    const correct = this.now.tree.correct[leaf];
    return correct === null ? "failed" : correct > 0 ? "right" : "wrong";
  }

  ending(node, leaf) {
    const t = this.now.tree;
    return `${MARKS[t.stop[node]][1]}; ${t.kind[leaf] || this.verdict(leaf)}, reward ${figure(t.reward[leaf])}`;
  }

  spoken(n, leaf) {
    const t = this.now.tree;
    return n === 0 ? `prompt, ${t.length[0]} tokens, value ${figure(t.value[0])}` : `node ${n}, ${t.length[n]} tokens, value ${figure(t.value[n])}${leaf === undefined ? "" : `, ${this.ending(n, leaf)}`}`;
  }

  snippet(n) {
    return visible(this.now.tree.tokens[n].slice(0, 60).map((i) => this.texts[i]).join("")).slice(0, 160);
  }

  ancestors(n) {
    const found = [];
    for (let at = n; at > 0; at = this.now.tree.parent[at]) found.unshift(at);
    return found;
  }

  select(n, focus) {
    this.selected = n;
    const path = new Set([0, ...this.ancestors(n)]);
    this.boxes.forEach((box, i) => {
      box.classList.toggle("on-path", path.has(i));
      box.setAttribute("aria-selected", String(i === n));
      box.tabIndex = i === n ? 0 : -1;
    });
    if (focus) this.boxes[n].focus({ preventScroll: true });
    this.reveal(this.boxes[n]);
    this.panel();
  }

  /** Scrolls the tree, not the page, so that some of the box is in sight. */
  reveal(box) {
    const area = this.scroll, top = box.offsetTop + this.canvas.offsetTop, bottom = top + Math.min(box.offsetHeight, area.clientHeight / 2);
    if (top < area.scrollTop + 28) area.scrollTop = Math.max(0, top - 40);
    else if (bottom > area.scrollTop + area.clientHeight) area.scrollTop = bottom - area.clientHeight + 20;
  }

  key(event) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const { tree, children, depth, top, nodes } = this.now;
    const n = this.selected;
    const level = () => Array.from({ length: nodes }, (_, i) => i).filter((i) => depth[i] === depth[n]).sort((a, b) => top[a] - top[b]);
    const beside = (by) => { const all = level(); return all[all.indexOf(n) + by]; };
    const next = {
      ArrowLeft: () => (n ? tree.parent[n] : undefined),
      ArrowRight: () => children[n][0],
      ArrowUp: () => beside(-1), // siblings, then cousins
      ArrowDown: () => beside(1),
      Home: () => 0,
    }[event.key];
    if (!next) return;
    event.preventDefault();
    const to = next();
    if (to !== undefined) this.select(to, true);
  }

  panel() {
    const { tree, depth, leafOf, credits } = this.now;
    const n = this.selected, leaf = leafOf.get(n);
    const end = tree.start[n] + tree.length[n];
    const facts = [["value", figure(tree.value[n])]];
    if (leaf === undefined && tree.leafMean[n] !== null && Math.abs(tree.leafMean[n] - (tree.value[n] ?? 0)) > 5e-4) facts.push(["mean of leaves", figure(tree.leafMean[n])]);
    if (leaf !== undefined) facts.push(["verdict", tree.kind[leaf] || this.verdict(leaf)], ["response", plural(end, "token")]);
    facts.push(["tokens", n ? `${tree.length[n]} (${tree.start[n]} to ${end})` : String(tree.length[n])]);
    if (n) facts.push(["mean log-prob", figure(meanLogprob(tree.logprobs[n]))]);
    if (n) facts.push(["stopped by", MARKS[tree.stop[n]][1]]);
    if (this.now.probes.has(n)) facts.push(["role", "probe: counts in cost, never in reward"]);
    this.side.replaceChildren(
      el("h3", {}, n ? `Node ${n}` : "Prompt", el("small", {}, n ? ` depth ${depth[n]}` : "")),
      el("dl", { class: "facts" }, ...facts.map(([k, v]) => el("div", {}, el("dt", {}, k), el("dd", {}, el("bdi", {}, v))))),
      n ? this.creditTable(n, credits) : "",
      this.text(n, credits[this.source]),
    );
  }

  creditTable(n, credits) {
    const line = (c, i) => {
      const name = c.name === "training" ? this.now.tree.algorithm : c.name;
      if (c.refused) return el("tr", { class: "refused" }, el("th", { scope: "row" }, name), el("td", { colspan: 2 }, c.refused));
      const pieces = c.pieces[n], mean = nodeCredit(pieces);
      const low = Math.min(...pieces.map((p) => p[3])), high = Math.max(...pieces.map((p) => p[4])), terms = Math.max(0, ...pieces.map((p) => p[5]));
      const spread = !pieces.length ? "no term: not trained on" : high - low > 1e-9 ? `${figure(low, true)} to ${figure(high, true)} in ${plural(terms, "row")}` : terms > 1 ? `in ${plural(terms, "row")}` : "";
      const bar = el("span", { class: "bar" });
      if (mean !== null) bar.append(el("span", { style: { background: tint(Math.sign(mean)), width: `${(50 * Math.abs(mean)) / c.most}%`, [mean < 0 ? "right" : "left"]: "50%" } }));
      return el("tr", { class: i === this.source ? "chosen" : "", title: c.note || null }, el("th", { scope: "row" }, name, c.note ? " *" : ""), el("td", { class: "amount" }, mean === null ? "–" : figure(mean, true)), el("td", {}, bar, el("span", { class: "spread" }, spread)));
    };
    const notes = [...new Set(credits.filter((c) => c.note).map((c) => c.note))];
    return el("table", { class: "credits" }, el("colgroup", {}, el("col"), el("col"), el("col")),
      el("thead", {}, el("tr", {}, el("th", { colspan: 3 }, "Training credit, as stored"))),
      el("tbody", {}, line(credits[0], 0)),
      el("thead", {}, el("tr", {}, el("th", { colspan: 3 }, "Counterfactual, unwhitened"))),
      el("tbody", {}, ...credits.slice(1).map((c, i) => line(c, i + 1)), ...notes.map((t) => el("tr", { class: "refused" }, el("td", { colspan: 3 }, `* ${t}`)))));
  }

  /** The whole response up to the node; what is the node's own is shaded, what is above it is dim and leads there. */
  text(n, credit) {
    const { tree } = this.now;
    const block = el("div", { class: "text" });
    const kind = this.shade === "advantage" && credit.pieces ? "advantage" : this.shade === "log-prob" ? "log-prob" : "nothing";
    for (const node of n ? this.ancestors(n) : [0]) {
      const own = el("span", { class: node === n ? "own" : "above", "data-of": node });
      if (node !== n) own.addEventListener("click", () => this.select(node, true));
      const perToken = new Array(tree.length[node]).fill(null);
      if (kind === "advantage") for (const [from, to, mean] of credit.pieces[node]) perToken.fill(mean, from, to);
      tree.tokens[node].forEach((id, k) => {
        const token = el("span", { class: "token" }, this.texts[id].replace(/\n/g, "⏎\n"));
        const logprob = tree.logprobs[node][k];
        const share = kind === "advantage" ? (perToken[k] === null ? null : perToken[k] / credit.most) : kind === "log-prob" && logprob !== null ? Math.max(-1, logprob / 300) : null;
        if (share !== null && node === n) token.style.background = tint(share);
        if (node === n) token.title = [logprob === null ? "" : `log-prob ${figure(logprob / 100)}`, perToken[k] === null ? "" : `advantage ${figure(perToken[k], true)}`].filter(Boolean).join(", ");
        own.append(token);
      });
      block.append(own);
    }
    const told = kind === "advantage" ? `tokens shaded by advantage, ${creditName(tree, credit)}` : kind === "log-prob" ? "tokens shaded by log-prob: the darker, the less likely" : this.shade === "advantage" ? "no advantage to shade by" : "";
    return el("div", {}, el("h4", {}, n ? "Response up to here" : "Prompt", el("small", {}, told ? ` ${told}` : "")), block);
  }
}

function startViewer(host) {
  if (!DATA.viewer.trees.length) {
    host.append(el("p", { class: "note" }, "This report holds no trees."));
    return;
  }
  const started = performance.now();
  window.treeViewer = new Viewer(host);
  host.dataset.renderMs = (performance.now() - started).toFixed(1);
  if (DATA.viewer.leftOut) host.append(el("p", { class: "note" }, `${plural(DATA.viewer.leftOut, "more tree")} had no room in this page.`));
}
