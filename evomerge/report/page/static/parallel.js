"use strict";

// The picture of a front of many objectives: a line a model, each objective scaled to what is shown, better upwards.
const Parallel = (() => {
  const { number } = Dom;
  const { referenceLabel, labelOf, hoverText, splitOf, rangesOf, description } = Models;
  const MAX_FAINT = 400; // dominated models that are drawn
  const MAX_MARKED = 120; // models of the front with markers on their lines
  const DASHES = { base: "dot", uniform: "dash", scalar: "dashdot", expert: "longdash" };

  // Where a subject's line goes, from objective to objective; null if it is not scored.
  function line(view, subject, split) {
    const { run, ranges } = view;
    if (!run.score(subject, run.steering[0], split)) return null;
    return run.steering.map((m) => {
      const [low, high] = ranges[m];
      const share = (run.score(subject, m, split).value - low) / (high - low);
      return run.objectives[m].sign > 0 ? share : 1 - share;
    });
  }

  // Lines that can be pointed at, with gaps between them.
  function traceOf(view, name, subjects, style, { split = view.state.split, ...more } = {}) {
    const { run, intervals } = view;
    const trace = { name, type: "scatter", mode: "lines+markers", line: style, hoverinfo: "text", ...more };
    Object.assign(trace, { x: [], y: [], customdata: [], hovertext: [] });
    trace.marker ??= { size: 4, color: style.color };
    for (const subject of subjects) {
      const heights = line(view, subject, split);
      if (!heights) continue;
      const text = hoverText(run, subject, split, intervals);
      trace.x.push(...heights.keys(), null);
      trace.y.push(...heights, null);
      trace.customdata.push(...heights.map(() => subject), null);
      trace.hovertext.push(...heights.map(() => text), null);
    }
    return trace;
  }

  // Any number of lines as one shape, and the trace that stands for it in the legend.
  function bundle(view, name, subjects, style, split) {
    const paths = subjects.map((subject) => {
      const heights = line(view, subject, split) ?? [];
      return heights.map((height, place) => `${place ? "L" : "M"}${place},${height.toFixed(4)}`).join("");
    });
    const { color, width, opacity } = style;
    const shape = { type: "path", path: paths.join(""), line: { color, width }, opacity, layer: "below" };
    return {
      shapes: view.hidden.has(name) ? [] : [shape],
      traces: [
        { name, legendgroup: name, type: "scatter", mode: "lines", x: [null], y: [null], line: { color, width: 2 } },
      ],
    };
  }

  function dominated(view) {
    const { run } = view;
    const trials = run.inState("dominated");
    if (!trials.length) return { shapes: [], traces: [] };
    const step = Math.ceil(trials.length / MAX_FAINT);
    const drawn = trials.filter((_, i) => i % step === 0).map((trial) => `trial:${trial}`);
    const some = step > 1 ? `, ${drawn.length} of ${trials.length}` : "";
    const style = { color: Plots.colours().faint, width: 0.8, opacity: 0.3 };
    return bundle(view, `dominated (search scores${some})`, drawn, style, "search");
  }

  // References, and what is compared and picked.
  function single(view) {
    const { run, state, chosen } = view;
    const colours = Plots.colours();
    const strong = (name, subject, color) => {
      const more = { split: splitOf(run, subject, state.split), marker: { size: 8, color } };
      return traceOf(view, name, [subject], { color, width: 3.5 }, more);
    };
    return [
      ...run.references.map((subject) => {
        const style = { color: colours.muted, width: 1.6, dash: DASHES[subject.split(":")[0]] };
        const visible = subject.startsWith("expert:") ? "legendonly" : true;
        return traceOf(view, referenceLabel(subject), [subject], style, { visible });
      }),
      ...(state.versus ? [strong(`compared: ${labelOf(run, state.versus)}`, state.versus, colours.versus)] : []),
      ...(chosen === null ? [] : [strong("picked", `trial:${chosen}`, colours.chosen)]),
    ];
  }

  // The front's lines, as a trace or a shape by their number.
  function front(view) {
    const members = view.run.front.map((trial) => `trial:${trial}`);
    const style = { color: Plots.colours().front, width: 1.3 };
    const opacity = members.length > 30 ? 0.5 : 0.75;
    if (members.length * view.run.steering.length > Plots.MAX_DRAWN) {
      const { shapes, traces } = bundle(view, "front", members, { ...style, opacity: 0.2 }, view.state.split);
      const touched = { mode: "none", legendgroup: "front", showlegend: false }; // nothing is drawn: where lines bend
      return { shapes, traces: [...traces, traceOf(view, "front, touched", members, style, touched)] };
    }
    const mode = members.length > MAX_MARKED ? "lines" : "lines+markers";
    return { shapes: [], traces: [traceOf(view, "front", members, style, { opacity, mode })] };
  }

  // What the ends of each axis stand for, in the user's sign.
  function ends({ run, ranges }) {
    const { muted, panel } = Plots.colours();
    const font = { size: 11, color: muted };
    return run.steering.flatMap((m, x) => {
      const [worst, best] = run.objectives[m].sign > 0 ? ranges[m] : [...ranges[m]].reverse();
      const at = { x, showarrow: false, xref: "x", yref: "y", font, bgcolor: panel };
      return [
        { ...at, y: 1.05, text: number(best) },
        { ...at, y: -0.05, text: number(worst) },
      ];
    });
  }

  function drawParallel(place, given) {
    const { run, state, choose } = given;
    const before = place.data ?? [];
    const hidden = new Set(before.filter((trace) => trace.visible === "legendonly").map((trace) => trace.name));
    const shown = new Set(before.filter((trace) => trace.visible === true).map((trace) => trace.name));
    const isDrawn = (subject) =>
      !subject.startsWith("expert:") || subject === state.versus || shown.has(referenceLabel(subject));
    const view = { ...given, hidden, ranges: rangesOf(run, state.split, run.references.filter(isDrawn), 0) };
    const { text, muted } = Plots.colours();
    const crowds = [dominated(view), front(view)];
    const layout = {
      height: 500,
      annotations: ends(view),
      shapes: crowds.flatMap((crowd) => crowd.shapes),
      margin: { l: 10, r: 10, t: 4, b: 104 },
      legend: { orientation: "h", y: -0.1, yanchor: "top" },
      xaxis: Plots.axis("", {
        tickvals: run.steering.map((_, i) => i),
        ticktext: run.steering.map((m) => Plots.plain(Plots.titled(run.objectives[m])).replace(" (", "<br>(")),
        range: [-0.3, run.steering.length - 0.7],
        ticklabeloverflow: "allow", // rather cut off than none
        ticks: "",
        gridcolor: muted,
        tickfont: { size: 12, color: text },
      }),
      yaxis: Plots.axis("", { range: [-0.1, 1.1], showticklabels: false, showgrid: false, ticks: "", showline: false }),
    };
    const drawn = [...crowds.flatMap((crowd) => crowd.traces), ...single(view)];
    return Plots.draw(place, description(view), drawn, layout, {
      onClick: choose,
      onLegend: () => drawParallel(place, given), // an expert that is shown now widens the axes; a shape has no trace
    });
  }

  return { drawParallel };
})();
