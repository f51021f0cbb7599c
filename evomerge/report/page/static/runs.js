"use strict";

// The list of runs of a folder or a database, each with a page of its own.
const Runs = (() => {
  const { el, fill, number, significant, card, empty } = Dom;
  const TEXTS = new Set(["run", "campaign", "state"]);

  // What is said of runs; what none of them has is left out.
  function columnsOf(runs) {
    const any = (name) => runs.some((run) => !run.problem && run[name] !== null);
    return ["run", "campaign", "state", "trials", "front", ...["best", "hypervolume"].filter(any), "last written"];
  }

  function row(run, columns) {
    const link = el("a", { href: `/run/${encodeURIComponent(run.run)}/` }, run.run);
    if (run.problem)
      return el(
        "tr",
        {},
        el("th", { scope: "row" }, run.run),
        el("td", { class: "text problem", colspan: String(columns.length - 1) }, run.problem),
      );
    return el(
      "tr",
      {},
      el("th", { scope: "row" }, link),
      el("td", { class: "text" }, run.name),
      el("td", { class: "text" }, el("span", { class: `state is-${run.state}`, title: run.holder ?? "" }, run.state)),
      el("td", {}, `${run.num_finished} of ${run.num_evaluations}`),
      el("td", {}, String(run.num_on_front)),
      columns.includes("best") ? el("td", {}, run.best === null ? "" : number(run.best, 4)) : null,
      columns.includes("hypervolume")
        ? el("td", {}, run.hypervolume === null ? "" : significant(run.hypervolume))
        : null,
      el("td", {}, new Date(1000 * run.written).toLocaleString([], { dateStyle: "medium", timeStyle: "short" })),
    );
  }

  async function show(place) {
    const answer = await fetch("/runs", { cache: "no-store" });
    if (!answer.ok) throw new Error(await answer.text());
    const { place: where, runs } = await answer.json();
    document.getElementById("name").textContent = `Runs in ${where}`;
    document.title = `${where}: evomerge`;
    if (!runs.length) return fill(place, empty("No runs here yet; runs start with evomerge search."));
    const columns = columnsOf(runs);
    fill(
      place,
      card(
        null,
        el(
          "div",
          { class: "scroll" },
          el(
            "table",
            { class: "runs" },
            el(
              "thead",
              {},
              el(
                "tr",
                {},
                columns.map((name) => el("th", { scope: "col", class: TEXTS.has(name) ? "text" : null }, name)),
              ),
            ),
            el(
              "tbody",
              {},
              runs.map((run) => row(run, columns)),
            ),
          ),
        ),
      ),
    );
  }

  return { show };
})();
