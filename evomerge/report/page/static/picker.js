"use strict";

// The panel that picks a model of the front: by its balance, by weights, or by hand; and says how to export it.
const Picker = (() => {
  const { el, fill, number, choice, command } = Dom;
  const RULES = [
    ["knee", "Balance"],
    ["prefer", "Weights"],
    ["trial", "By hand"],
  ];
  const EXPLAINED = {
    knee: "The knee: farthest above the plane through the front's extremes.",
    prefer: "Weights say how much a shortfall in an objective counts.",
    trial: "Click a point or a row of a table.",
  };
  let parts = null; // elements that stay while the sliders move

  // The trial that the state picks on a run's front; null where there is none to pick.
  function pick(run, state) {
    if (state.rule === "trial") return state.trial !== null && state.trial < run.count ? state.trial : null;
    const rows = run.front.map((trial) => run.objectives.map((_, m) => run.values[m][trial]));
    const kept = Pick.within(rows, state.least, state.most);
    if (!kept.length) return null;
    const values = run.frontValues();
    const chosen = kept.map((place) => values[place]);
    const weights = run.steering.map((m) => state.weights[m]);
    if (state.rule === "prefer" && !weights.some((weight) => weight > 0)) return null;
    return run.front[kept[state.rule === "prefer" ? Pick.prefer(chosen, weights) : Pick.knee(chosen)]];
  }

  function slider(run, m, state, change) {
    const { name } = run.objectives[m];
    const shown = el("output", {}, String(state().weights[m]));
    const input = el("input", {
      type: "range",
      min: "0",
      max: "5",
      step: "0.1",
      value: String(state().weights[m]),
      "aria-label": `weight of ${name}`,
      oninput: (event) => {
        const weights = [...state().weights];
        weights[m] = Number(event.target.value);
        shown.textContent = String(weights[m]);
        change({ rule: "prefer", weights });
      },
    });
    return el("div", { class: "slider" }, el("span", { class: "legend" }, "weight"), input, shown);
  }

  function bound(run, m, which, state, change) {
    const { name } = run.objectives[m];
    const [sign, words] = { least: ["≥", "at least"], most: ["≤", "at most"] }[which];
    const current = state()[which][m];
    return el(
      "label",
      { class: "bound" },
      el("span", { class: "legend" }, sign),
      el("input", {
        type: "number",
        step: "any",
        value: current === null ? "" : String(current),
        "aria-label": `${name} ${words}`,
        title: words,
        oninput: (event) => {
          const bounds = [...state()[which]];
          bounds[m] =
            event.target.value === "" || Number.isNaN(event.target.valueAsNumber) ? null : event.target.valueAsNumber;
          change({ [which]: bounds, rule: state().rule === "trial" ? "knee" : state().rule });
        },
      }),
    );
  }

  function control(run, m, state, change) {
    const objective = run.objectives[m];
    return el(
      "fieldset",
      { class: "objective" },
      el(
        "legend",
        {},
        objective.name,
        el("small", {}, ` ${objective.sign > 0 ? "higher" : "lower"} is better `, parts.ranges[m]),
      ),
      objective.steers ? slider(run, m, state, change) : null,
      el("div", { class: "bounds" }, bound(run, m, "least", state, change), bound(run, m, "most", state, change)),
    );
  }

  // Make the panel: sliders and bounds stay as they are while a run grows.
  function make(place, run, state, change) {
    parts = {
      ranges: run.objectives.map(() => el("span")),
      rule: el("div"),
      note: el("p", { class: "note" }),
      picked: el("div", { class: "picked" }),
      said: el("p", { class: "sr", role: "status", "aria-live": "polite", id: "picked" }),
    };
    fill(
      place,
      el(
        "div",
        {},
        el("h2", {}, "Pick a model"),
        parts.rule,
        parts.note,
        el(
          "div",
          { class: "objectives" },
          run.objectives.map((_, m) => control(run, m, state, change)),
        ),
        el(
          "button",
          { type: "button", class: "quiet", onclick: () => change({ reset: true }) },
          "Reset weights and bounds",
        ),
      ),
      parts.said,
      parts.picked,
    );
  }

  function commandOf(run, trial) {
    return `evomerge export ${run.command} --trial ${trial} --out merged`;
  }

  function scoreRow(run, trial, m) {
    const cells = ["search", "test"].map((split) => {
      const score = run.score(`trial:${trial}`, m, split);
      return el("td", {}, score ? [number(score.value), el("small", {}, ` ±${number(score.error)}`)] : "–");
    });
    return el("tr", {}, el("th", { scope: "row" }, run.objectives[m].name), cells);
  }

  function whyNone(run, state) {
    if (state.rule === "trial") return "Click a model to pick it.";
    if (!run.front.length) return "There is no front yet: no trial has finished within the floors and ceilings.";
    const hasWeight = run.steering.some((m) => state.weights[m] > 0);
    return state.rule === "prefer" && !hasWeight
      ? "All weights are 0; give at least one objective a positive weight."
      : "No model of the front keeps these bounds.";
  }

  // Search scores choose, test scores stand beside: else they would flatter too.
  function howPicked(run, state, trial) {
    if (!run.isTested) return "The test items have not been used yet.";
    if (!run.testScores.has(`trial:${trial}`))
      return "It has no test scores: only the front is scored on the test items. Search scores flatter what is picked by them.";
    return state.rule === "trial"
      ? "Picked by hand; if by its test scores, these flatter it."
      : `Picked by search scores among ${Dom.count(run.front.length, "model")} of the front; test scores stand beside.`;
  }

  // What is picked becomes the model to compare with: the next one that is picked stands beside it.
  function compareButton(state, change, trial) {
    const subject = `trial:${trial}`;
    if (state.versus === subject)
      return el("p", { class: "note" }, "The next model that you pick is compared with it.");
    const attributes = { type: "button", class: "quiet", onclick: () => change({ versus: subject }) };
    return el("button", { ...attributes, "data-key": "compare" }, "Compare others with it");
  }

  // Show what is picked now.
  function update(run, state, change, trial) {
    fill(
      parts.rule,
      choice("By", RULES, state.rule, (rule) => change({ rule, trial: rule === "trial" ? trial : state.trial })),
    );
    parts.note.textContent = EXPLAINED[state.rule];
    parts.ranges.forEach((range, m) => {
      const values = run.front.map((member) => run.values[m][member]);
      const ends = () => `${number(Math.min(...values))} to ${number(Math.max(...values))}`;
      fill(range, values.length ? ["· ", el("span", { class: "range" }, ends())] : null);
    });
    if (trial === null) {
      const why = whyNone(run, state);
      fill(parts.picked, Dom.empty(why));
      parts.said.textContent = why;
      return;
    }
    const isScored = run.score(`trial:${trial}`, 0, "search") !== null;
    fill(
      parts.picked,
      el("h3", {}, el("span", { class: "swatch" }), `${run.label(trial)}`, el("small", {}, ` ${run.stateOf(trial)}`)),
      el(
        "table",
        {},
        el(
          "thead",
          {},
          el("tr", {}, el("th", {}, ""), el("th", { scope: "col" }, "search"), el("th", { scope: "col" }, "test")),
        ),
        el(
          "tbody",
          {},
          run.objectives.map((_, m) => scoreRow(run, trial, m)),
        ),
      ),
      el("p", { class: "note" }, howPicked(run, state, trial)),
      isScored
        ? [command(commandOf(run, trial)), compareButton(state, change, trial)]
        : el("p", { class: "note" }, run.failureOf(trial) || "It has no scores yet."),
    );
    const said =
      `Picked ${run.label(trial)}: ` +
      run.objectives.map((objective, m) => `${objective.name} ${number(run.values[m][trial])}`).join(", ");
    if (parts.said.textContent !== said) parts.said.textContent = said; // read once, not with every trial of a live run
  }

  return { pick, make, update, commandOf };
})();
