"use strict";

// The picture of a front of one objective, of two, or of every pair of several.
const Scatter = (() => {
  const { referenceLabel, labelOf, hoverText, splitOf, rangesOf, description } = Models;
  const SYMBOLS = { base: "x", expert: "diamond", uniform: "square", scalar: "triangle-up" };
  const MAX_BARS = 120; // models with error bars

  // Groups of subjects with how they look, faint ones first. Faint ones have search scores, whatever the others show.
  function groups(view) {
    const { run, state, chosen } = view;
    const colours = Plots.colours();
    const members = run.front.map((trial) => `trial:${trial}`);
    const isCrowded = members.length > MAX_BARS;
    const found = [
      {
        name: `dominated${run.isTested && state.split === "test" ? " (search scores)" : ""}`,
        faint: true,
        trials: run.inState("dominated"),
        marker: { color: colours.faint, size: 5, opacity: 0.55 },
      },
      {
        name: "out of bounds",
        faint: true,
        trials: run.inState("out of bounds"),
        marker: { color: colours.faint, size: 6, symbol: "x-thin-open", opacity: 0.7 },
      },
      {
        name: "stopped early (estimates)",
        faint: true,
        trials: run.inState("stopped"),
        marker: { color: colours.faint, size: 6, symbol: "circle-open", opacity: 0.75 },
      },
      {
        name: "front",
        subjects: members,
        bars: true,
        marker: {
          color: colours.front,
          size: isCrowded ? 5 : 7.5,
          line: { color: colours.panel, width: isCrowded ? 0.3 : 0.7 },
        },
      },
    ];
    for (const kind of Object.keys(SYMBOLS)) {
      const subjects = run.references.filter((subject) => subject.split(":")[0] === kind);
      const name = { expert: "experts", scalar: "best scalar" }[kind] ?? kind;
      found.push({
        name,
        subjects,
        bars: true,
        named: kind === "expert",
        marker: { color: colours.mark, size: 9.5, symbol: SYMBOLS[kind], line: { color: colours.panel, width: 0.7 } },
      });
    }
    const ring = (name, subject, color, size, width) => {
      const split = splitOf(run, subject, state.split);
      const marker = { color, size, symbol: "circle-open", line: { width, color } };
      found.push({ name, subjects: [subject], split, ring: true, marker });
    };
    if (state.versus) ring(`compared: ${labelOf(run, state.versus)}`, state.versus, colours.versus, 15, 2.5);
    if (chosen !== null) ring("picked", `trial:${chosen}`, colours.chosen, 16, 3);
    return found.map((group) => ({ ...group, ...told(view, group) }));
  }

  // Which of a group's subjects are drawn, their scores' split, and what pointing at them says: the same in all panels.
  function told({ run, state, intervals }, group) {
    if (group.faint) {
      const labels = group.trials.map((trial) => Plots.plain(run.label(trial)));
      return { held: group.trials.map((trial) => `trial:${trial}`), hover: labels };
    }
    const split = group.split ?? state.split;
    const held = group.subjects.filter((subject) => run.score(subject, run.steering[0], split));
    return { split, held, hover: group.ring ? [] : held.map((subject) => hoverText(run, subject, split, intervals)) };
  }

  // A trace of too many points to draw one by one: an image shows them, and the one that is left stands for them in the
  // legend. The trace still knows where each is, and which is the nearest to a pointer.
  function crowded(trace) {
    const { name, x, y, marker } = trace;
    return { trace: { ...trace, marker: { ...marker, maxdisplayed: 1 } }, crowd: { name, values: [x, y], marker } };
  }

  // The trace of a group over two objectives, and its crowd if it is one.
  function pairTrace(view, group, [x, y], axes, isFirst) {
    const { run, numPanels } = view;
    const { held } = group;
    if (!held.length) return {};
    const common = {
      name: group.name,
      legendgroup: group.name,
      showlegend: isFirst,
      xaxis: axes[0],
      yaxis: axes[1],
      mode: "markers",
      type: "scatter",
      marker: group.marker,
      customdata: held,
    };
    if (group.faint) {
      const [xs, ys] = [x, y].map((m) => group.trials.map((trial) => run.values[m][trial]));
      const hover = { text: group.hover, hovertemplate: "%{text}<br>%{x:.3f}, %{y:.3f}<extra></extra>" };
      const trace = { ...common, x: xs, y: ys, ...hover };
      return held.length > Plots.MAX_DRAWN ? crowded(trace) : { trace };
    }
    const third = Shades.thirdOf(run, [x, y]);
    if (group.name === "front" && third !== null) {
      const look = { size: group.marker.size + 1, line: { color: Plots.colours().muted, width: 1 } };
      common.marker = { ...group.marker, ...look, color: Shades.coloursOf(view, held, third) };
    }
    const scores = (m) => held.map((subject) => run.score(subject, m, group.split));
    const trace = {
      ...common,
      x: scores(x).map((score) => score.value),
      y: scores(y).map((score) => score.value),
      text: group.named ? held.map((subject) => Plots.plain(subject.split(":")[1])) : undefined,
      textposition: "top center",
      textfont: { size: 10.5, color: Plots.colours().muted },
      hovertext: group.hover,
      hoverinfo: group.ring ? "skip" : "text",
      mode: group.named && run.steering.length === 2 ? "markers+text" : "markers",
    };
    if (held.length * numPanels > 2 * Plots.MAX_DRAWN) return crowded(trace);
    if (group.bars && run.steering.length === 2 && held.length <= MAX_BARS) {
      const bar = (m) => ({
        array: scores(m).map((score) => score.error),
        thickness: 1,
        width: 0,
        color: group.named || group.marker.symbol ? Plots.colours().muted : `${Plots.colours().front}66`,
      });
      Object.assign(trace, { error_x: bar(x), error_y: bar(y) });
    }
    return { trace };
  }

  // Two objectives: one panel. More: a panel for every pair, below the diagonal.
  function drawPairs(place, view) {
    const { run, state, choose } = view;
    const names = run.steering;
    const size = names.length - 1;
    const numPanels = (size * (size + 1)) / 2;
    const ranges = rangesOf(run, state.split);
    const isShaded = names.length === 3; // with a bar of colours above each panel
    const parts = groups(view);
    const layout = {
      hoverdistance: 8, // pixels
      images: [],
      annotations: [],
      height: { 1: 480, 2: 700 }[size] ?? Math.min(230 * size + 40, 860),
      margin: { l: 56, r: 14, t: isShaded ? 44 : 14, b: size === 1 ? 72 : 48 },
      legend: size === 1 ? { orientation: "h", y: -0.13, yanchor: "top" } : { x: 1, xanchor: "right", y: 1 },
    };
    const [gapX, gapY] = [0.035, isShaded ? 0.1 : 0.035];
    const [width, tall] = [gapX, gapY].map((gap) => (1 - gap * (size - 1)) / size);
    const hidden = new Set(place.data?.filter((trace) => trace.visible === "legendonly").map((trace) => trace.name));
    const traces = [];
    let number = 0;
    for (let row = 1; row <= size; row++) {
      for (let column = 0; column < row; column++) {
        number += 1;
        const suffix = number === 1 ? "" : String(number);
        const axes = [`x${suffix}`, `y${suffix}`];
        const from = column * (width + gapX);
        const bottom = (size - row) * (tall + gapY);
        const panel = { x: [from, from + width], y: [bottom, bottom + tall] };
        const [x, y] = [names[column], names[row]];
        layout[`xaxis${suffix}`] = Plots.axis(row === size ? Plots.titled(run.objectives[x]) : "", {
          domain: panel.x,
          range: ranges[x],
          anchor: axes[1],
          showticklabels: row === size,
          nticks: size > 2 ? 5 : 8,
          matches: row === size ? undefined : axisOf(size, column, "x"),
        });
        layout[`yaxis${suffix}`] = Plots.axis(column === 0 ? Plots.titled(run.objectives[y]) : "", {
          domain: panel.y,
          range: ranges[y],
          anchor: axes[0],
          showticklabels: column === 0,
          nticks: size > 2 ? 5 : 8,
          matches: column === 0 ? undefined : axisOf(row, 0, "y"),
        });
        const drawn = parts.map((group) => pairTrace({ ...view, numPanels }, group, [x, y], axes, number === 1));
        traces.push(...drawn.map(({ trace }) => trace).filter(Boolean));
        const crowds = drawn.map(({ crowd }) => crowd).filter((crowd) => crowd && !hidden.has(crowd.name));
        if (crowds.length) layout.images.push(Plots.pointsImage(crowds, [ranges[x], ranges[y]], axes));
        if (isShaded && run.front.length) {
          const height = layout.height - layout.margin.t - layout.margin.b;
          Shades.addBar(layout, view, Shades.thirdOf(run, [x, y]), panel, height);
        }
      }
    }
    const onLegend = () => drawPairs(place, view); // a crowd's image knows nothing of the legend
    return Plots.draw(place, description(view), traces, layout, { onClick: choose, onLegend });
  }

  // The axis of the panel in a row and column of the triangle.
  function axisOf(row, column, kind) {
    const panel = (row * (row - 1)) / 2 + column + 1;
    return panel === 1 ? kind : `${kind}${panel}`;
  }

  // One objective: every trial in the order of trials, references as lines.
  function drawSingle(place, view) {
    const { run, chosen, choose, state } = view;
    const colours = Plots.colours();
    const m = run.steering[0];
    const trials = run.inState("dominated", "front", "out of bounds", "stopped");
    const lines = run.references.map((subject) => {
      const score = run.score(subject, m, "search");
      return (
        score && {
          name: referenceLabel(subject),
          type: "scatter",
          mode: "lines+text",
          x: [0, run.count],
          y: [score.value, score.value],
          text: ["", Plots.plain(referenceLabel(subject))],
          textposition: "top left",
          textfont: { size: 11, color: colours.muted },
          line: { dash: "dot", width: 1.4, color: colours.muted },
          showlegend: false,
          hoverinfo: "skip",
        }
      );
    });
    const points = {
      name: "trials",
      type: "scatter",
      mode: "markers",
      x: trials,
      y: trials.map((trial) => run.values[m][trial]),
      marker: { color: colours.front, size: 6, opacity: trials.length > 500 ? 0.4 : 0.8 },
      customdata: trials.map((trial) => `trial:${trial}`),
      hovertemplate: "trial %{x}: %{y:.4f}<extra></extra>",
    };
    const rings = [
      [chosen === null ? null : `trial:${chosen}`, "picked", colours.chosen],
      [state.versus, "compared", colours.versus],
    ]
      .filter(([subject]) => Data.trialOf(subject) !== null)
      .map(([subject, name, color]) => ({
        name,
        type: "scatter",
        mode: "markers",
        x: [Data.trialOf(subject)],
        y: [run.values[m][Data.trialOf(subject)]],
        marker: { color, size: 16, symbol: "circle-open", line: { width: 3 } },
        hoverinfo: "skip",
      }));
    return Plots.draw(
      place,
      description(view),
      [...lines.filter(Boolean), points, ...rings],
      {
        height: 480,
        margin: { l: 56, r: 14, t: 14, b: 72 },
        legend: { orientation: "h", y: -0.13, yanchor: "top" },
        xaxis: Plots.axis("trial", { rangemode: "tozero" }),
        yaxis: Plots.axis(`${Plots.titled(run.objectives[m])}, search items`),
      },
      { onClick: choose },
    );
  }

  return { drawPairs, drawSingle };
})();
