"use strict";

// The list of runs of a folder or a database, each with a page of its own.
const Runs = (() => {
  const { el, fill, number, card, empty } = Dom;
  const COLUMNS = ["run", "campaign", "state", "trials", "front", "best", "hypervolume", "last written"];

  function row(run) {
    const link = el("a", { href: `/run/${encodeURIComponent(run.run)}/` }, run.run);
    if (run.problem)
      return el(
        "tr",
        {},
        el("th", { scope: "row" }, run.run),
        el("td", { class: "text problem", colspan: String(COLUMNS.length - 1) }, run.problem),
      );
    return el(
      "tr",
      {},
      el("th", { scope: "row" }, link),
      el("td", { class: "text" }, run.name),
      el("td", { class: "text" }, el("span", { class: `state is-${run.state}`, title: run.holder ?? "" }, run.state)),
      el("td", {}, `${run.num_finished} of ${run.num_evaluations}`),
      el("td", {}, String(run.num_on_front)),
      el("td", {}, run.best === null ? "" : number(run.best, 4)),
      el("td", {}, run.hypervolume === null ? "" : number(run.hypervolume, 4)),
      el("td", {}, new Date(1000 * run.written).toLocaleString()),
    );
  }

  async function show(place) {
    const answer = await fetch("/runs", { cache: "no-store" });
    if (!answer.ok) throw new Error(await answer.text());
    const { place: where, runs } = await answer.json();
    document.getElementById("name").textContent = `Runs in ${where}`;
    document.title = `${where}: evomerge`;
    if (!runs.length) return fill(place, empty("No runs here yet; runs start with evomerge search."));
    const texts = new Set(["run", "campaign", "state"]);
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
                COLUMNS.map((name) => el("th", { scope: "col", class: texts.has(name) ? "text" : null }, name)),
              ),
            ),
            el("tbody", {}, runs.map(row)),
          ),
        ),
      ),
    );
  }

  return { show };
})();
