"use strict";

// The view of the front: its picture by the number of objectives, hypervolume over cost, claims, and its models.
const Front = (() => {
  const { el, fill, number, significant, choice, card } = Dom;
  const MAX_ROWS = 100; // of the table of models, until more are asked for
  let places = null;

  // Where the curve ends, and how sure that is; a live run may have grown since it was estimated.
  function volumeNote(volume) {
    if (!volume) return null;
    const [value, error, low, high] = Array.from(volume, significant);
    return el(
      "p",
      { class: "note" },
      `${value} ±${error} on search items, 95 % ${low} to ${high}: noise makes it larger, and the interval is lower by that much.`,
    );
  }

  function drawCurve(place, { run, volume: estimate }) {
    const { cost, volume } = run.curve ?? { cost: [], volume: [] };
    if (!volume.at(-1)) {
      const isZero = "It is 0: no trial within the bounds is better than the base in every objective.";
      return fill(place, Dom.empty(run.curve ? isZero : "Nothing is scored yet."));
    }
    if (!place.querySelector(".plot")) fill(place, el("div", { class: "plot" }), el("div"));
    fill(place.lastChild, volumeNote(estimate));
    const trace = {
      type: "scatter",
      mode: "lines",
      x: cost,
      y: volume,
      line: { shape: "hv", color: Plots.colours().front, width: 2.5 },
      hovertemplate: "cost %{x:.1f}: %{y:.4g}<extra></extra>",
    };
    return Plots.draw(
      place.firstChild,
      `hypervolume rises to ${significant(volume.at(-1))} at a cost of ${number(cost.at(-1), 1)}`,
      [trace],
      {
        height: 250,
        xaxis: Plots.axis("cost in full-evaluation equivalents", { rangemode: "tozero" }),
        yaxis: Plots.axis("", { rangemode: "tozero" }),
      },
    );
  }

  function claimsList(run, claims) {
    const sentences = [...run.lineage, ...claims, run.use_of_test_items];
    return el(
      "ul",
      { class: "claims" },
      sentences.map((sentence) => el("li", {}, `${sentence[0].toUpperCase()}${sentence.slice(1)}.`)),
    );
  }

  function modelsTable(view) {
    const { run, state, chosen, choose, change, intervals } = view;
    const shown = state.every ? run.front : run.front.slice(0, MAX_ROWS);
    // What is picked and compared: it may be far down, or not on the front.
    const above = [chosen, Data.trialOf(state.versus)].filter((trial) => trial !== null);
    const row = (subject) => {
      const trial = Data.trialOf(subject);
      const cells = run.objectives.map((_, m) => {
        const score = run.score(subject, m, state.split);
        const ends = score && intervals && intervals(state.split, subject, m);
        return el(
          "td",
          {},
          score
            ? [
                number(score.value),
                el("small", {}, ` ±${number(score.error)}`),
                ends ? el("small", { class: "interval" }, `${number(ends[0])} to ${number(ends[1])}`) : null,
              ]
            : "–",
        );
      });
      const kind = trial === null ? "reference" : trial === chosen ? "is-chosen" : "";
      const mark = subject === state.versus ? " is-versus" : "";
      const button = el(
        "button",
        { type: "button", class: "link", onclick: () => choose(subject) },
        Models.labelOf(run, subject),
      );
      return el("tr", { class: kind + mark, "data-subject": subject }, el("th", { scope: "row" }, button), cells);
    };
    const heads = run.objectives.map((objective) =>
      el("th", { scope: "col" }, objective.name, objective.sign < 0 ? el("small", {}, " lower is better") : null),
    );
    return el(
      "div",
      { class: "scroll tall", tabindex: "0", role: "region", "aria-label": "models" },
      el(
        "table",
        { class: "models" },
        el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "model"), heads)),
        el(
          "tbody",
          {},
          above.map((trial) => row(`trial:${trial}`)),
          run.references.map(row),
          shown.map((trial) => row(`trial:${trial}`)),
        ),
      ),
      shown.length < run.front.length
        ? el(
            "button",
            { type: "button", class: "quiet", onclick: () => change({ every: true }) },
            `Show all ${run.front.length.toLocaleString("en")}`,
          )
        : null,
    );
  }

  function make(place, isSingle) {
    places = {
      tools: el("div", { class: "tools" }),
      plot: el("div", { class: "plot", id: "front-plot" }),
      curve: el("div"),
      claims: el("div"),
      table: el("div"),
    };
    fill(
      place,
      card(isSingle ? "Trials" : "The front", places.tools, places.plot),
      el(
        "div",
        { class: "two" },
        card(`${isSingle ? "Best score" : "Hypervolume"} above the base, over cost`, places.curve),
        card("What the items allow to be said", places.claims),
      ),
      card("Models", places.table),
    );
  }

  async function render(place, view) {
    const { run, state, change } = view;
    if (!places || !place.contains(places.plot)) make(place, run.steering.length === 1);
    const tools = [];
    if (run.isTested)
      tools.push(
        choice(
          "Scores of",
          [
            ["search", "search items"],
            ["test", "test items"],
          ],
          state.split,
          (split) => change({ split }),
        ),
      );
    if (run.steering.length > 2)
      tools.push(
        choice(
          "As",
          [
            ["pairs", "pairs"],
            ["parallel", "parallel coordinates"],
          ],
          state.as,
          (as) => change({ as }),
        ),
      );
    fill(
      places.tools,
      tools,
      el("span", { class: "note" }, "± and bars: one standard error; small ranges: 95 % intervals"),
    );
    const drawing =
      run.steering.length === 1
        ? Scatter.drawSingle
        : state.as === "parallel" && run.steering.length > 2
          ? Parallel.drawParallel
          : Scatter.drawPairs;
    await drawing(places.plot, view);
    await drawCurve(places.curve, view);
    fill(places.claims, claimsList(run, view.claims ?? []));
    fill(places.table, modelsTable(view));
  }

  return { render };
})();
