"use strict";

// The view of the front: its picture by the number of objectives, hypervolume over cost, claims, and its models.
const Front = (() => {
  const { el, fill, number, choice, card } = Dom;
  const SYMBOLS = { base: "x", expert: "diamond", uniform: "square", scalar: "triangle-up" };
  const MAX_BARS = 120; // models with error bars
  const MAX_LINES = 400; // faint ones among parallel coordinates
  let places = null;

  function referenceLabel(subject) {
    const [kind, name] = subject.split(":");
    return kind === "expert" ? `expert ${name}` : kind === "scalar" ? `best scalar ${name}` : kind;
  }

  function labelOf(run, subject) {
    const trial = Data.trialOf(subject);
    return trial === null ? referenceLabel(subject) : run.label(trial);
  }

  // The 95 % intervals of the part "evidence": (split, subject, m) -> [low, high] or null.
  function intervalsOf(part) {
    const bySplit = Object.fromEntries(Object.entries(part.intervals).map(([split, { subjects, ends }]) => {
      const rows = new Map(subjects.map((subject, row) => [subject, row]));
      const unpacked = ends.map(Data.unpack);
      return [split, (subject, m) => (rows.has(subject) ? [...unpacked[m].subarray(2 * rows.get(subject), 2 * rows.get(subject) + 2)] : null)];
    }));
    return (split, subject, m) => bySplit[split](subject, m);
  }

  function hoverText(run, subject, split, intervals) {
    const lines = run.objectives.map((objective, m) => {
      const score = run.score(subject, m, split);
      if (!score) return "";
      const ends = intervals && intervals(split, subject, m);
      const interval = ends ? `, 95 % ${number(ends[0])} to ${number(ends[1])}` : "";
      return `<br>${Plots.plain(objective.name)} ${number(score.value)} ±${number(score.error)}${interval}`;
    });
    return `<b>${Plots.plain(labelOf(run, subject))}</b>${lines.join("")}`;
  }

  // Groups of subjects with how they look, faint ones first. Faint ones have search scores, whatever the others show.
  function groups(view) {
    const { run, state, chosen } = view;
    const colours = Plots.colours();
    const members = run.front.map((trial) => `trial:${trial}`);
    const found = [
      { name: `dominated${run.isTested && state.split === "test" ? " (search scores)" : ""}`, faint: true, trials: run.inState("dominated"), marker: { color: colours.faint, size: 5, opacity: 0.55 } },
      { name: "out of bounds", faint: true, trials: run.inState("out of bounds"), marker: { color: colours.faint, size: 6, symbol: "x-thin-open", opacity: 0.7 } },
      { name: "stopped early (estimates)", faint: true, trials: run.inState("stopped"), marker: { color: colours.faint, size: 6, symbol: "circle-open", opacity: 0.75 } },
      { name: "front", subjects: members, bars: true, marker: { color: colours.front, size: 7.5, line: { color: colours.panel, width: 0.7 } } },
    ];
    for (const kind of Object.keys(SYMBOLS)) {
      const subjects = run.references.filter((subject) => subject.split(":")[0] === kind);
      const name = { expert: "experts", scalar: "best scalar" }[kind] ?? kind;
      found.push({ name, subjects, bars: true, named: kind === "expert", marker: { color: colours.mark, size: 9.5, symbol: SYMBOLS[kind], line: { color: colours.panel, width: 0.7 } } });
    }
    if (state.versus) found.push({ name: `compared: ${labelOf(run, state.versus)}`, subjects: [state.versus], ring: true, marker: { color: colours.versus, size: 15, symbol: "circle-open", line: { width: 2.5, color: colours.versus } } });
    if (chosen !== null) found.push({ name: "picked", subjects: [`trial:${chosen}`], ring: true, marker: { color: colours.chosen, size: 16, symbol: "circle-open", line: { width: 3, color: colours.chosen } } });
    return found;
  }

  // One trace of a group over two objectives; null and an image where its points are too many.
  function pairTrace(view, group, [x, y], axes, ranges, isFirst) {
    const { run, state, intervals } = view;
    const split = group.faint ? "search" : state.split;
    const common = { name: group.name, legendgroup: group.name, showlegend: isFirst, xaxis: axes[0], yaxis: axes[1], mode: "markers", type: "scatter", marker: group.marker };
    if (group.faint) {
      const xs = group.trials.map((trial) => run.values[x][trial]);
      const ys = group.trials.map((trial) => run.values[y][trial]);
      if (!xs.length) return {};
      if (xs.length > Plots.MAX_DRAWN) {
        const image = Plots.faintImage(xs, ys, ranges[x], ranges[y], axes);
        return { image, trace: isFirst ? { ...common, x: [null], y: [null] } : null };
      }
      const customdata = group.trials.map((trial) => `trial:${trial}`);
      return { trace: { ...common, x: xs, y: ys, customdata, text: group.trials.map((trial) => Plots.plain(run.label(trial))), hovertemplate: "%{text}<br>%{x:.3f}, %{y:.3f}<extra></extra>" } };
    }
    const held = group.subjects.filter((subject) => run.score(subject, x, split));
    if (!held.length) return {};
    const scores = (m) => held.map((subject) => run.score(subject, m, split));
    const trace = {
      ...common, x: scores(x).map((score) => score.value), y: scores(y).map((score) => score.value), customdata: held,
      text: group.named ? held.map((subject) => Plots.plain(subject.split(":")[1])) : undefined, textposition: "top center", textfont: { size: 10.5, color: Plots.colours().muted },
      hovertext: held.map((subject) => hoverText(run, subject, split, intervals)), hoverinfo: group.ring ? "skip" : "text",
      mode: group.named && run.steering.length === 2 ? "markers+text" : "markers",
    };
    if (group.bars && run.steering.length === 2 && held.length <= MAX_BARS) {
      const bar = (m) => ({ array: scores(m).map((score) => score.error), thickness: 1, width: 0, color: group.named || group.marker.symbol ? Plots.colours().muted : `${Plots.colours().front}66` });
      Object.assign(trace, { error_x: bar(x), error_y: bar(y) });
    }
    return { trace };
  }

  function rangesOf(run, split, references = run.references, share = 0.05) {
    return run.objectives.map((_, m) => {
      const shown = [...run.values[m].filter((_, trial) => ["dominated", "front", "stopped", "out of bounds"].includes(run.stateOf(trial)))];
      for (const subject of [...references, ...run.front.map((trial) => `trial:${trial}`)]) {
        const score = run.score(subject, m, split);
        if (score) shown.push(score.value - score.error, score.value + score.error);
      }
      return Plots.rangeOf(shown, share);
    });
  }

  // Two objectives: one panel. More: a panel for every pair, below the diagonal.
  function drawPairs(place, view) {
    const { run, state, choose } = view;
    const names = run.steering;
    const size = names.length - 1;
    const ranges = rangesOf(run, state.split);
    const layout = { images: [], height: size === 1 ? 480 : Math.min(230 * size + 40, 860), margin: { l: 56, r: 14, t: 14, b: 48 } };
    const gap = size === 1 ? 0 : 0.035;
    const width = (1 - gap * (size - 1)) / size;
    const traces = [];
    let panel = 0;
    for (let row = 1; row <= size; row++) {
      for (let column = 0; column < row; column++) {
        panel += 1;
        const suffix = panel === 1 ? "" : String(panel);
        const axes = [`x${suffix}`, `y${suffix}`];
        const from = column * (width + gap);
        const bottom = (size - row) * (width + gap);
        const [x, y] = [names[column], names[row]];
        layout[`xaxis${suffix}`] = Plots.axis(row === size ? Plots.titled(run.objectives[x]) : "", { domain: [from, from + width], range: ranges[x], anchor: axes[1], showticklabels: row === size, nticks: size > 2 ? 5 : 8, matches: row === size ? undefined : axisOf(size, column, size, "x") });
        layout[`yaxis${suffix}`] = Plots.axis(column === 0 ? Plots.titled(run.objectives[y]) : "", { domain: [bottom, bottom + width], range: ranges[y], anchor: axes[0], showticklabels: column === 0, nticks: size > 2 ? 5 : 8, matches: column === 0 ? undefined : axisOf(row, 0, size, "y") });
        for (const group of groups(view)) {
          const { trace, image } = pairTrace(view, group, [x, y], axes, ranges, panel === 1);
          if (trace) traces.push(trace);
          if (image) layout.images.push(image);
        }
      }
    }
    layout.legend = size === 1 ? { orientation: "h", y: -0.13, yanchor: "top" } : { x: 1, xanchor: "right", y: 1 };
    if (size === 1) layout.margin.b = 72;
    return Plots.draw(place, description(view), traces, layout, choose);
  }

  // The axis of the panel in a row and column of the triangle.
  function axisOf(row, column, _, kind) {
    const panel = (row * (row - 1)) / 2 + column + 1;
    return panel === 1 ? kind : `${kind}${panel}`;
  }

  // A line a model over all objectives, each scaled to what is shown, better upwards.
  function drawParallel(place, view) {
    const { run, state, choose, chosen, intervals } = view;
    const colours = Plots.colours();
    const names = run.steering;
    const ranges = rangesOf(run, state.split, run.references.filter((subject) => !subject.startsWith("expert:")), 0);
    const up = (m, value) => {
      const [low, high] = ranges[m];
      const share = (value - low) / (high - low);
      return run.objectives[m].sign > 0 ? share : 1 - share;
    };
    const lines = (name, subjects, line, more = {}) => {
      const trace = { name, type: "scatter", mode: "lines+markers", x: [], y: [], customdata: [], hovertext: [], hoverinfo: "text", line, marker: { size: 4, color: line.color, opacity: more.opacity ?? 1 }, connectgaps: false, ...more };
      for (const subject of subjects) {
        const split = more.split ?? state.split;
        if (!run.score(subject, names[0], split)) continue;
        names.forEach((m, place_) => {
          trace.x.push(place_);
          trace.y.push(up(m, run.score(subject, m, split).value));
          trace.customdata.push(subject);
          trace.hovertext.push(hoverText(run, subject, split, intervals));
        });
        trace.x.push(null);
        trace.y.push(null);
        trace.customdata.push(null);
        trace.hovertext.push(null);
      }
      return trace;
    };
    const dominated = run.inState("dominated");
    const step = Math.max(1, Math.ceil(dominated.length / MAX_LINES));
    const drawn = dominated.filter((_, i) => i % step === 0).map((trial) => `trial:${trial}`);
    const some = step > 1 ? `, ${drawn.length} of ${dominated.length}` : "";
    const dashes = { base: "dot", uniform: "dash", scalar: "dashdot", expert: "longdash" };
    const traces = [
      lines(`dominated (search scores${some})`, drawn, { color: colours.faint, width: 0.8 }, { opacity: 0.3, split: "search", mode: "lines" }),
      lines("front", run.front.map((trial) => `trial:${trial}`), { color: colours.front, width: 1.3 }, { opacity: run.front.length > 60 ? 0.35 : 0.75 }),
      ...run.references.map((subject) => lines(referenceLabel(subject), [subject], { color: colours.muted, width: 1.6, dash: dashes[subject.split(":")[0]] }, { visible: subject.startsWith("expert:") ? "legendonly" : true })),
    ];
    if (state.versus) traces.push(lines(`compared: ${labelOf(run, state.versus)}`, [state.versus], { color: colours.versus, width: 3.5 }, { marker: { size: 8, color: colours.versus } }));
    if (chosen !== null) traces.push(lines("picked", [`trial:${chosen}`], { color: colours.chosen, width: 3.5 }, { marker: { size: 8, color: colours.chosen } }));
    const annotations = names.flatMap((m, place_) => {
      const [low, high] = run.objectives[m].sign > 0 ? ranges[m] : [...ranges[m]].reverse();
      const at = { x: place_, showarrow: false, xref: "x", yref: "y", font: { size: 11, color: colours.muted } };
      return [{ ...at, y: 1.05, text: number(high) }, { ...at, y: -0.05, text: number(low) }];
    });
    return Plots.draw(place, description(view), traces, {
      height: 500, annotations, margin: { l: 10, r: 10, t: 4, b: 104 },
      legend: { orientation: "h", y: -0.1, yanchor: "top" },
      xaxis: Plots.axis("", { tickvals: names.map((_, i) => i), ticktext: names.map((m) => Plots.plain(Plots.titled(run.objectives[m]))), range: [-0.3, names.length - 0.7], ticks: "", gridcolor: colours.muted, tickfont: { size: 12, color: colours.text } }),
      yaxis: Plots.axis("", { range: [-0.1, 1.1], showticklabels: false, showgrid: false, ticks: "", showline: false }),
    }, choose);
  }

  // One objective: every trial in the order of trials, references as lines.
  function drawSingle(place, view) {
    const { run, chosen, choose, state } = view;
    const colours = Plots.colours();
    const m = run.steering[0];
    const trials = run.inState("dominated", "front", "out of bounds", "stopped");
    const lines = run.references.map((subject) => {
      const score = run.score(subject, m, "search");
      return score && { name: referenceLabel(subject), type: "scatter", mode: "lines", x: [0, run.count], y: [score.value, score.value], line: { dash: "dot", width: 1.4, color: colours.muted }, hoverinfo: "name" };
    });
    const points = { name: "trials", type: "scatter", mode: "markers", x: trials, y: trials.map((trial) => run.values[m][trial]), marker: { color: colours.front, size: 6, opacity: trials.length > 500 ? 0.4 : 0.8 }, customdata: trials.map((trial) => `trial:${trial}`), hovertemplate: "trial %{x}: %{y:.4f}<extra></extra>" };
    const rings = [[chosen === null ? null : `trial:${chosen}`, "picked", colours.chosen], [state.versus, "compared", colours.versus]]
      .filter(([subject]) => Data.trialOf(subject) !== null)
      .map(([subject, name, color]) => ({ name, type: "scatter", mode: "markers", x: [Data.trialOf(subject)], y: [run.values[m][Data.trialOf(subject)]], marker: { color, size: 16, symbol: "circle-open", line: { width: 3 } }, hoverinfo: "skip" }));
    return Plots.draw(place, description(view), [...lines.filter(Boolean), points, ...rings], {
      height: 480, margin: { l: 56, r: 14, t: 14, b: 84 }, legend: { orientation: "h", y: -0.13, yanchor: "top" },
      xaxis: Plots.axis("trial"), yaxis: Plots.axis(`${Plots.titled(run.objectives[m])}, search items`),
    }, choose);
  }

  function description({ run, state, chosen }) {
    return `${run.front.length} models on the front of ${run.steering.map((m) => run.objectives[m].name).join(", ")}, scores of ${state.split} items`
      + (chosen === null ? "" : `; picked ${run.label(chosen)}`) + "; the same numbers are in the table of models below";
  }

  function drawCurve(place, run) {
    if (!run.curve) return fill(place, Dom.empty("The base is not scored yet."));
    const { cost, volume } = run.curve;
    if (volume.at(-1) === 0) return fill(place, Dom.empty("It is 0: no trial within the bounds is better than the base in every objective."));
    const trace = { type: "scatter", mode: "lines", x: cost, y: volume, line: { shape: "hv", color: Plots.colours().front, width: 2.5 }, hovertemplate: "cost %{x:.1f}: %{y:.4g}<extra></extra>" };
    return Plots.draw(place, `hypervolume rises to ${number(volume.at(-1), 4)} at a cost of ${number(cost.at(-1), 1)}`, [trace], {
      height: 250, xaxis: Plots.axis("cost in full-evaluation equivalents", { rangemode: "tozero" }), yaxis: Plots.axis("", { rangemode: "tozero" }),
    });
  }

  function claimsList(run, claims) {
    const touched = run.touches === 0 ? "the test items have not been used yet"
      : run.touches === 1 ? "the test items were used once, for the front that is shown"
        : `the test items were used ${run.touches} times: later fronts were chosen knowing more than the search items`;
    const sentences = [...run.lineage, ...claims, touched];
    return el("ul", { class: "claims" }, sentences.map((sentence) => el("li", {}, `${sentence[0].toUpperCase()}${sentence.slice(1)}.`)));
  }

  function modelsTable(view) {
    const { run, state, chosen, choose, intervals } = view;
    const row = (subject) => {
      const trial = Data.trialOf(subject);
      const cells = run.objectives.map((_, m) => {
        const score = run.score(subject, m, state.split);
        const ends = score && intervals && intervals(state.split, subject, m);
        return el("td", {}, score ? [number(score.value), el("small", {}, ` ±${number(score.error)}`), ends ? el("small", { class: "interval" }, `${number(ends[0])} to ${number(ends[1])}`) : null] : "–");
      });
      const kind = trial === null ? "reference" : trial === chosen ? "is-chosen" : "";
      const button = el("button", { type: "button", class: "link", onclick: () => choose(subject) }, labelOf(run, subject));
      return el("tr", { class: kind, "data-subject": subject }, el("th", { scope: "row" }, button), cells);
    };
    const heads = run.objectives.map((objective) => el("th", { scope: "col" }, objective.name, objective.sign < 0 ? el("small", {}, " lower is better") : null));
    return el("div", { class: "scroll tall", tabindex: "0", role: "region", "aria-label": "models" }, el("table", { class: "models" },
      el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "model"), heads)),
      el("tbody", {}, run.references.map(row), run.front.map((trial) => row(`trial:${trial}`)))));
  }

  function make(place) {
    places = { tools: el("div", { class: "tools" }), plot: el("div", { class: "plot", id: "front-plot" }), curve: el("div", { class: "plot" }), claims: el("div"), table: el("div") };
    fill(place,
      card("The front", places.tools, places.plot),
      el("div", { class: "two" }, card("Hypervolume above the base, over cost", places.curve), card("What the items allow to be said", places.claims)),
      card("Models", places.table));
  }

  async function render(place, view) {
    if (!places || !place.contains(places.plot)) make(place);
    const { run, state, change } = view;
    const tools = [];
    if (run.isTested) tools.push(choice("Scores of", [["search", "search items"], ["test", "test items"]], state.split, (split) => change({ split })));
    if (run.steering.length > 2) tools.push(choice("As", [["pairs", "pairs"], ["parallel", "parallel coordinates"]], state.as, (as) => change({ as })));
    fill(places.tools, tools, el("span", { class: "note" }, "± and bars: one standard error; small ranges: 95 % intervals"));
    const drawing = run.steering.length === 1 ? drawSingle : state.as === "parallel" && run.steering.length > 2 ? drawParallel : drawPairs;
    await drawing(places.plot, view);
    await drawCurve(places.curve, run);
    fill(places.claims, claimsList(run, view.claims ?? []));
    fill(places.table, modelsTable(view));
  }

  return { render, labelOf, intervalsOf };
})();
