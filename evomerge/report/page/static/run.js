"use strict";

// The view of the run: its trials, what failed and why, where the time went, who worked.
const RunView = (() => {
  const { el, fill, number, seconds, count, card, empty } = Dom;
  const MAX_NAMED = 8; // trials beside a reason
  const MAX_EVENT = 240; // characters of an event
  let places = null;

  // Texts that trials have, most frequent first: [text, trials].
  function grouped(run, textOf) {
    const found = new Map();
    for (let trial = 0; trial < run.count; trial++) {
      const text = textOf(trial);
      if (text) found.set(text, [...(found.get(text) ?? []), trial]);
    }
    return [...found].sort((a, b) => b[1].length - a[1].length);
  }

  function reasons(run, textOf, none, choose) {
    const found = grouped(run, textOf);
    if (!found.length) return empty(none);
    return el(
      "ul",
      { class: "reasons" },
      found.map(([reason, trials]) =>
        el(
          "li",
          {},
          el("strong", {}, `${trials.length}× `),
          reason,
          el(
            "small",
            {},
            " trials ",
            trials
              .slice(0, MAX_NAMED)
              .map((trial, i) => [
                i ? ", " : "",
                el("button", { type: "button", class: "link", onclick: () => choose(`trial:${trial}`) }, String(trial)),
              ])
              .flat(),
            trials.length > MAX_NAMED ? " …" : "",
          ),
        ),
      ),
    );
  }

  // Rows of a name, a length and a text.
  function bars(rows) {
    const most = Math.max(...rows.map(([, size]) => size), 1e-9);
    return el(
      "table",
      { class: "bars" },
      el(
        "tbody",
        {},
        rows.map(([name, size, text]) => {
          const bar = el("i");
          bar.style.width = `${(100 * size) / most}%`;
          return el("tr", {}, el("th", { scope: "row" }, name), el("td", { class: "length" }, bar), el("td", {}, text));
        }),
      ),
    );
  }

  function timing(run) {
    const parts = Object.entries(run.seconds);
    if (!parts.length) return empty("Nothing is timed yet.");
    const total = parts.reduce((sum, [, size]) => sum + size, 0);
    return [
      bars(parts.map(([name, size]) => [name, size, `${seconds(size)} · ${((100 * size) / total).toFixed(0)} %`])),
      el("p", { class: "note" }, `${seconds(total)} of workers' time: all trials, references and test scores.`),
    ];
  }

  function workers({ times }) {
    if (!times.workers.length) return empty("No result says who brought it.");
    return bars(
      times.workers.map(({ worker, num_results: results, busy_s: busy, idle_s: idle }) => {
        const share = ((100 * busy) / Math.max(busy + idle, 1e-9)).toFixed(0);
        return [worker, busy, `${count(results, "result")} · ${seconds(busy)}, ${share} % of its time`];
      }),
    );
  }

  function driver({ times }) {
    const parts = Object.entries(times.driver);
    if (!parts.length) return empty("Nothing is timed yet.");
    return bars(parts.map(([name, size]) => [name, size, seconds(size)]));
  }

  // The log's latest events first, each with what it says beside its name.
  function log(events) {
    if (!events?.length) return empty(events ? "No log is shown here; a run has its log beside it." : "Reading the log…");
    const row = ({ time, event, ...rest }) =>
      el(
        "li",
        {},
        el("time", {}, new Date(time).toLocaleString()),
        el("strong", {}, ` ${event} `),
        el("small", {}, JSON.stringify(rest).slice(1, -1).replaceAll('"', " ").trim().slice(0, MAX_EVENT)),
      );
    return el(
      "ul",
      { class: "items", tabindex: "0", role: "log", "aria-label": "log" },
      [...events].reverse().map(row),
    );
  }

  function stages(run) {
    return el(
      "table",
      {},
      el(
        "thead",
        {},
        el(
          "tr",
          {},
          ["stage", "trials", "on the front"].map((name) => el("th", { scope: "col" }, name)),
        ),
      ),
      el(
        "tbody",
        {},
        run.stages.map((name, i) => {
          const own = run.stageOf.filter((stage) => stage === i).length;
          return el(
            "tr",
            {},
            el("th", { scope: "row" }, `${i + 1}: ${name}`),
            el("td", {}, own.toLocaleString("en")),
            el("td", {}, String(run.front.filter((trial) => run.stageOf[trial] === i).length)),
          );
        }),
      ),
    );
  }

  function make(place) {
    places = {
      driver: el("div"),
      log: el("div"),
      trials: el("div"),
      stages: el("div"),
      failures: el("div"),
      stopped: el("div"),
      timing: el("div"),
      workers: el("div"),
    };
    fill(
      place,
      card("Trials", places.trials),
      el(
        "div",
        { class: "two" },
        card("Stages", places.stages),
        card("Failures, by reason", places.failures),
        card("Where the time went", places.timing),
        card("Workers", places.workers),
        card("What the driver did", places.driver),
        card("Stopped early, by reason", places.stopped),
      ),
      card("Log", places.log),
    );
  }

  function render(place, view) {
    if (!places || !place.contains(places.trials)) make(place);
    const { run, choose } = view;
    Trials.render(places.trials, view);
    fill(places.stages, stages(run));
    fill(places.failures, reasons(run, run.failureOf, "No trial has failed.", choose));
    fill(places.stopped, reasons(run, run.stoppedOf, "No trial was stopped early.", choose));
    places.stopped.parentElement.hidden = !run.inState("stopped").length;
    fill(places.timing, timing(run));
    fill(places.workers, workers(run));
    fill(places.driver, driver(run));
    fill(places.log, log(view.log));
  }

  return { render };
})();
