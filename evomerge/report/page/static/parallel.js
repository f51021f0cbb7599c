"use strict";

// The picture of a front of many objectives: a line a model, each objective scaled to what is shown, better upwards.
const Parallel = (() => {
  const { number } = Dom;
  const { referenceLabel, labelOf, hoverText, rangesOf, description } = Models;
  const MAX_FAINT = 400; // dominated models that are drawn
  const MAX_MARKED = 120; // models of the front with markers on their lines

  // A line a model over all objectives, each scaled to what is shown, better upwards.
  function drawParallel(place, view) {
    const { run, state, choose, chosen, intervals } = view;
    const colours = Plots.colours();
    const names = run.steering;
    const ranges = rangesOf(
      run,
      state.split,
      run.references.filter((subject) => !subject.startsWith("expert:")),
      0,
    );
    const up = (m, value) => {
      const [low, high] = ranges[m];
      const share = (value - low) / (high - low);
      return run.objectives[m].sign > 0 ? share : 1 - share;
    };
    const lines = (name, subjects, line, more = {}) => {
      const trace = {
        name,
        type: "scatter",
        mode: "lines+markers",
        x: [],
        y: [],
        customdata: [],
        hovertext: [],
        hoverinfo: "text",
        line,
        marker: { size: 4, color: line.color, opacity: more.opacity ?? 1 },
        connectgaps: false,
        ...more,
      };
      for (const subject of subjects) {
        const split = more.split ?? state.split;
        if (!run.score(subject, names[0], split)) continue;
        const text = hoverText(run, subject, split, intervals);
        names.forEach((m, place_) => {
          trace.x.push(place_);
          trace.y.push(up(m, run.score(subject, m, split).value));
          trace.customdata.push(subject);
          trace.hovertext.push(text);
        });
        trace.x.push(null);
        trace.y.push(null);
        trace.customdata.push(null);
        trace.hovertext.push(null);
      }
      return trace;
    };
    const dominated = run.inState("dominated");
    const step = Math.max(1, Math.ceil(dominated.length / MAX_FAINT));
    const drawn = dominated.filter((_, i) => i % step === 0).map((trial) => `trial:${trial}`);
    const some = step > 1 ? `, ${drawn.length} of ${dominated.length}` : "";
    const dashes = { base: "dot", uniform: "dash", scalar: "dashdot", expert: "longdash" };
    const traces = [
      lines(
        `dominated (search scores${some})`,
        drawn,
        { color: colours.faint, width: 0.8 },
        { opacity: 0.3, split: "search", mode: "lines" },
      ),
      lines(
        "front",
        run.front.map((trial) => `trial:${trial}`),
        { color: colours.front, width: 1.3 },
        {
          opacity: run.front.length > 60 ? 0.35 : 0.75,
          mode: run.front.length > MAX_MARKED ? "lines" : "lines+markers",
        },
      ),
      ...run.references.map((subject) =>
        lines(
          referenceLabel(subject),
          [subject],
          { color: colours.muted, width: 1.6, dash: dashes[subject.split(":")[0]] },
          { visible: subject.startsWith("expert:") ? "legendonly" : true },
        ),
      ),
    ];
    if (state.versus)
      traces.push(
        lines(
          `compared: ${labelOf(run, state.versus)}`,
          [state.versus],
          { color: colours.versus, width: 3.5 },
          { marker: { size: 8, color: colours.versus } },
        ),
      );
    if (chosen !== null)
      traces.push(
        lines(
          "picked",
          [`trial:${chosen}`],
          { color: colours.chosen, width: 3.5 },
          { marker: { size: 8, color: colours.chosen } },
        ),
      );
    const annotations = names.flatMap((m, place_) => {
      const [low, high] = run.objectives[m].sign > 0 ? ranges[m] : [...ranges[m]].reverse();
      const at = { x: place_, showarrow: false, xref: "x", yref: "y", font: { size: 11, color: colours.muted } };
      return [
        { ...at, y: 1.05, text: number(high) },
        { ...at, y: -0.05, text: number(low) },
      ];
    });
    return Plots.draw(
      place,
      description(view),
      traces,
      {
        height: 500,
        annotations,
        margin: { l: 10, r: 10, t: 4, b: 104 },
        legend: { orientation: "h", y: -0.1, yanchor: "top" },
        xaxis: Plots.axis("", {
          tickvals: names.map((_, i) => i),
          ticktext: names.map((m) => Plots.plain(Plots.titled(run.objectives[m]))),
          range: [-0.3, names.length - 0.7],
          ticks: "",
          gridcolor: colours.muted,
          tickfont: { size: 12, color: colours.text },
        }),
        yaxis: Plots.axis("", {
          range: [-0.1, 1.1],
          showticklabels: false,
          showgrid: false,
          ticks: "",
          showline: false,
        }),
      },
      choose,
    );
  }

  return { drawParallel };
})();
