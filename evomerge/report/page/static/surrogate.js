"use strict";

// The view of the surrogate: how well it knows the trials, which numbers matter, and what comes next.
const SurrogateView = (() => {
  const { el, fill, number, card, empty } = Dom;

  function ranks(numbers) {
    const order = Array.from(numbers.keys()).sort((a, b) => numbers[a] - numbers[b]);
    const found = new Float64Array(numbers.length);
    for (let i = 0; i < order.length;) {
      let end = i;
      while (end + 1 < order.length && numbers[order[end + 1]] === numbers[order[i]]) end += 1;
      for (let j = i; j <= end; j++) found[order[j]] = (i + end) / 2;
      i = end + 1;
    }
    return found;
  }

  // Spearman's rank correlation, ties sharing their mean rank.
  function rankCorrelation(one, other) {
    const [a, b] = [ranks(one), ranks(other)];
    const middle = (a.length - 1) / 2;
    let [products, first, second] = [0, 0, 0];
    for (let i = 0; i < a.length; i++) {
      products += (a[i] - middle) * (b[i] - middle);
      first += (a[i] - middle) ** 2;
      second += (b[i] - middle) ** 2;
    }
    return first && second ? products / Math.sqrt(first * second) : NaN;
  }

  function drawKnown(place, run, m, known, trials) {
    const colours = Plots.colours();
    const [measured, predicted, deviations] = ["measured", "predicted", "deviations"].map((name) =>
      Data.unpack(known[name]),
    );
    const held = measured.filter((value, i) => Math.abs(value - predicted[i]) <= 1.96 * deviations[i]).length;
    const rho = rankCorrelation(measured, predicted);
    const range = Plots.rangeOf([...measured, ...predicted]);
    const summary = `rank correlation ${number(rho, 2)}; ${held} of ${measured.length} within 95\u00a0% of what was predicted`;
    const plot = el("div", { class: "plot" });
    fill(place, el("h3", {}, run.objectives[m].name), plot, el("p", { class: "note" }, summary));
    return Plots.draw(
      plot,
      `${run.objectives[m].name}, predicted against measured: ${summary}`,
      [
        {
          type: "scatter",
          mode: "lines",
          x: range,
          y: range,
          line: { color: colours.muted, dash: "dot", width: 1 },
          hoverinfo: "skip",
        },
        {
          type: "scatter",
          mode: "markers",
          x: predicted,
          y: measured,
          marker: { color: colours.front, size: 5.5, opacity: 0.75 },
          text: Array.from(trials, (trial) => `trial ${trial}`),
          error_x: { array: deviations, color: `${colours.front}44`, thickness: 1, width: 0 },
          hovertemplate: "%{text}: predicted %{x:.3f}, measured %{y:.3f}<extra></extra>",
        },
      ],
      {
        height: 260,
        showlegend: false,
        xaxis: Plots.axis("predicted without it", { range }),
        yaxis: Plots.axis("measured", { range }),
      },
    );
  }

  function drawSlopes(place, run, m, known, names) {
    const slopes = Data.unpack(known.slopes);
    const cells = names.map(([parameter, expert, group], i) => ({
      row: [parameter === "coefficient" ? "" : parameter, expert].filter(Boolean).join(" ") || parameter,
      column: group || "all groups",
      number: slopes[i],
    }));
    const most = cells.reduce((best, cell) => (cell.number > best.number ? cell : best), cells[0]);
    const plot = el("div", { class: "plot" });
    fill(place, el("h3", {}, run.objectives[m].name), plot);
    return Plots.heatMap(
      plot,
      `slopes of ${run.objectives[m].name}; the steepest is that of ${most.row}, ${most.column}: ${number(most.number, 4)}`,
      cells,
      { diverging: false, digits: 3 },
    );
  }

  function waitingTable(run, part) {
    if (!part.waiting.length)
      return empty(
        run.state === "running" ? "Nothing waits at this moment." : "Nothing waits: no trial is under way or planned.",
      );
    const expected = part.objectives.map((known) => [
      Data.unpack(known.expected),
      Data.unpack(known.expected_deviations),
    ]);
    return el(
      "div",
      { class: "scroll tall" },
      el(
        "table",
        {},
        el(
          "thead",
          {},
          el(
            "tr",
            {},
            el("th", {}, "what comes next"),
            run.steering.map((m) => el("th", { scope: "col" }, `${run.objectives[m].name} expected`)),
          ),
        ),
        el(
          "tbody",
          {},
          part.waiting.map((name, i) =>
            el(
              "tr",
              {},
              el("th", { scope: "row" }, name),
              expected.map(([mean, deviation]) =>
                el("td", {}, number(mean[i]), el("small", {}, ` ±${number(deviation[i])}`)),
              ),
            ),
          ),
        ),
      ),
    );
  }

  async function render(place, view) {
    const { run, surrogate: part } = view;
    if (!part || part.absent) return fill(place, card("Surrogates", empty(part?.absent ?? "Fitting them…")));
    if (place.part === part && place.theme === view.theme) return undefined; // it has not changed
    [place.part, place.theme] = [part, view.theme];
    const trials = Data.unpack(part.trials);
    const [known, slopes] = ["grid", "two"].map((columns) =>
      el(
        "div",
        { class: columns },
        run.steering.map(() => el("div")),
      ),
    ); // all, so that each has its width
    const about = `A Gaussian process an objective, fitted for this page to the scores of ${Dom.count(trials.length, "trial")} of stage ${part.stage + 1}. A search may know more than it: losses, gradients.`;
    fill(
      place,
      card(
        "Predicted against measured",
        el(
          "p",
          { class: "note" },
          `${about} Each trial is predicted from all others; bars are one standard deviation.`,
        ),
        known,
      ),
      card(
        "Which numbers matter",
        el(
          "p",
          { class: "note" },
          "How much the expected score changes as a number moves by a tenth of its range: root mean square over the trials.",
        ),
        slopes,
      ),
      card("Where the search goes next", waitingTable(run, part)),
    );
    for (const [i, m] of run.steering.entries()) {
      await drawKnown(known.children[i], run, m, part.objectives[i], trials);
      await drawSlopes(slopes.children[i], run, m, part.objectives[i], part.names);
    }
    return undefined;
  }

  return { render, rankCorrelation };
})();
